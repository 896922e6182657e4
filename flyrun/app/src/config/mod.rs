//! fly.toml: Fly.io's own names, types and defaults, as far as they mean something on one host.
//!
//! A file goes one way, and each step is a module:
//!
//! 1. `syntax`: bytes become a TOML tree that knows where each value stands;
//! 2. `read`: the tree becomes the model, table by table, through `table::Table`, which knows by [`keys`] what each
//!    table may have. Whatever is wrong is written to a `problem::Log`, and reading goes on;
//! 3. `cross`: what one table cannot know alone, such as a port that two services want;
//! 4. [`together()`]: what holds between the apps of one `flyrun serve`.
//!
//! What comes out is a [`model::App`], in which every default is filled in and every unit is a type. `render` writes it
//! as a fly.toml that reads as the same app.

mod cross;
mod hostname;
pub mod keys;
pub mod model;
mod names;
mod problem;
mod read;
mod render;
mod syntax;
mod table;
mod together;
mod units;

pub use hostname::Hostname;
pub use names::Named;
pub use problem::{Position, Problem, Refused};
pub use render::to_toml;
pub use together::together;
pub use units::Bytes;

use model::App;
use problem::Log;

/// The most machines of a group.
pub const MAX_MACHINES: u32 = 1000;

/// The most bytes that a file may have. `[[files]] raw_value` is what can make one long.
pub const MAX_FILE_BYTES: usize = 1 << 20;

/// A file that was read, with the places that a later complaint may want to point to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct File {
    /// What the file is called in messages.
    pub name: String,
    /// What it says.
    pub app: App,
    places: Vec<(Place, Position)>,
}

/// What a complaint about a file that was read can point to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// `app`.
    Name,
    /// `[build] image`.
    Image,
    /// An element of `[flyrun] hostnames`, or `[flyrun]` where there is none.
    Hostname(Hostname),
    /// The `ports` that begin with this one.
    Port(u16),
    /// A file of the host that the app names, as it is written.
    HostFile(String),
}

impl File {
    /// A complaint that this crate cannot make, because it would take more than reading the file.
    pub fn problem(&self, place: &Place, message: String, advice: impl Into<String>) -> Problem {
        let position = self.places.iter().find(|(known, _)| known == place).map(|(_, position)| *position);
        Problem { file: self.name.clone(), position, message, advice: Some(advice.into()) }
    }

    /// Each file of the host that the app names, as it is written: below the directory of its fly.toml unless absolute.
    pub fn host_files(&self) -> impl Iterator<Item = &str> {
        self.places.iter().filter_map(|(place, _)| match place {
            Place::HostFile(path) => Some(path.as_str()),
            _ => None,
        })
    }
}

/// Reads a fly.toml.
///
/// # Errors
/// All that is wrong with it.
pub fn read(name: &str, bytes: &[u8]) -> Result<File, Refused> {
    let text = syntax::text(name, bytes)?;
    let log = Log::new(name, text);
    let tree = syntax::tree(text, &log);
    // What a line that was not understood would have said is not missed in the others.
    log.checkpoint()?;
    let mut draft = read::app(&tree, &log);
    cross::check(&draft, &log);
    draft.remember_ports();
    log.checkpoint()?;
    let places = draft.places.into_iter().map(|(place, at)| (place, log.position(at))).collect();
    Ok(File { name: name.to_string(), app: draft.app, places })
}
