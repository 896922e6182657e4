//! machine.json: what a machine is and what became of it.

use serde::{Deserialize, Serialize};

use crate::size::Size;

/// The version of the file's format.
pub const VERSION: u32 = 1;

/// A machine as it is kept on disk.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    pub version: u32,
    pub id: String,
    /// The user's name for it, or its id.
    pub name: String,
    pub image: String,
    /// The root filesystem it runs on.
    pub chain_id: String,
    pub cpus: u8,
    pub memory: Size,
    pub disk: Option<Size>,
    /// Whether it goes when it ends (`--rm`).
    pub auto_remove: bool,
    pub state: State,
    /// Seconds since the epoch.
    pub created_at: u64,
    pub outcome: Option<Outcome>,
}

/// Where in its life a machine is. A machine in the foreground knows these; lifecycle commands bring the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Its process runs, or will in a moment. Not true any more if nobody holds the machine's lock.
    Started,
    /// It has ended in an orderly way.
    Stopped,
    /// It could not be started, or its virtual machine failed.
    Failed,
}

/// How a machine ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    pub exit_code: u8,
    pub oom_killed: bool,
    /// Why flyrun failed, if it did.
    pub error: Option<String>,
    /// Seconds since the epoch.
    pub finished_at: u64,
}
