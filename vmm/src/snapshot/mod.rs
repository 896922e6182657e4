//! A machine on disk: suspended in one process, resumed in another.
//!
//! A snapshot is a directory. `state` holds all but guest memory, and its beginning, the header, can be read alone
//! (FORMAT.md, [`format`]). `memory` holds guest memory, with holes where it is zero. It is the machine's own: a resumed
//! machine has it mapped privately, so that a page which differs from the file is a page that was written since, and the
//! next snapshot writes just those ([`pages`], [`image`]). A file with more than one link belongs to clones too and is
//! never written again: it becomes `base`, and `memory` then holds what differs from it.
//!
//! `state` takes its place last, by rename, and leaves first. Where it is, a snapshot is.
//!
//! What cannot be resumed here is refused by name ([`refusal`]), and the owner boots the machine instead. A snapshot file
//! is foreign input: all of it is checked like a guest's.

pub mod apart;
pub mod clock;
pub mod cpu;
pub mod dir;
pub mod files;
pub mod format;
pub mod header;
pub mod identity;
pub mod image;
pub mod pages;
pub mod refusal;
pub mod restore;
pub mod save;
pub mod sections;
pub mod subject;
pub mod text;
pub mod vcpu;
pub mod working_set;

/// The file of everything but guest memory.
pub const STATE: &str = "state";
/// The file of guest memory, or of what differs from [`BASE`].
pub const MEMORY: &str = "memory";
/// The file of guest memory that several machines have in common.
pub const BASE: &str = "base";
/// The file that says what to read ahead.
pub const WORKING_SET: &str = "working-set";
