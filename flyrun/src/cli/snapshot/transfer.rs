//! `flyrun snapshot export` and `flyrun snapshot import`.

use std::fs::{self, File};
use std::io::{self, BufWriter, IsTerminal, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use clap::Args;

use super::super::{Context, print_line};
use crate::error::{Context as _, Error, Result};
use crate::exit_code::ExitCode;
use crate::snapshot::archive;

/// Write a snapshot as one file, for another host
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  flyrun snapshot export warm -o warm.snapshot
  flyrun snapshot export warm | ssh other flyrun snapshot import

The file holds all that the machine has in memory, secrets too: only its owner may read it. A host can go on from it whose CPU has
all that the machine's had, with the same kernel; another boots from its disk.")]
pub struct Export {
    /// The file to write, - for standard output
    #[arg(short, long, value_name = "FILE", default_value = "-")]
    output: PathBuf,
    /// Leave the image's root filesystem out: for a host that has imported it before
    #[arg(long)]
    without_rootfs: bool,
    /// Name, id, or beginning of an id
    snapshot: String,
}

/// Take in a snapshot that was exported
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  flyrun snapshot import --name warm warm.snapshot
  flyrun run --from-snapshot warm

All of it is checked. What it asks of this host beyond a machine of its own is refused.")]
pub struct Import {
    /// A name to speak of the snapshot by [default: the one it had]
    #[arg(long)]
    name: Option<String>,
    /// The file, - for standard input
    #[arg(value_name = "FILE", default_value = "-")]
    input: PathBuf,
}

pub fn export(context: &Context, arguments: &Export) -> Result<ExitCode> {
    let snapshots = context.snapshots();
    let record = snapshots.find(&arguments.snapshot)?;
    let (directory, store) = (snapshots.directory_of(&record.id), context.store()?);
    let write = |output: &mut dyn Write| {
        archive::export(&record, &directory, &store, !arguments.without_rootfs, BufWriter::new(output))
    };
    if arguments.output.as_os_str() != "-" {
        write_file(&arguments.output, write)?;
        return Ok(ExitCode::Success);
    }
    if io::stdout().is_terminal() {
        return Err(
            Error::new("a snapshot is nothing for a terminal").advice("Name a file with -o, or use a pipe.")
        );
    }
    write(&mut io::stdout().lock())?;
    Ok(ExitCode::Success)
}

/// A file is there whole or not at all. What is none, such as a pipe, is written as it is.
fn write_file(path: &Path, write: impl FnOnce(&mut dyn Write) -> Result<()>) -> Result<()> {
    let told = || format!("cannot write {}", path.display());
    if path.metadata().is_ok_and(|found| !found.is_file()) {
        let mut file = File::options().write(true).open(path).context(told())?;
        return write(&mut file);
    }
    let (Some(name), directory) = (path.file_name(), path.parent().unwrap_or(Path::new(""))) else {
        return Err(Error::new(format!("{}: it is no file's name", told())));
    };
    let mut draft_name = std::ffi::OsString::from(".");
    draft_name.push(name);
    draft_name.push(format!(".{}", std::process::id()));
    let draft = directory.join(draft_name);
    let mut file =
        File::options().write(true).create(true).truncate(true).mode(0o600).open(&draft).context(told())?;
    let written = write(&mut file)
        .and_then(|()| file.sync_all().context(told()))
        .and_then(|()| fs::rename(&draft, path).context(told()));
    if written.is_err() {
        let _ = fs::remove_file(&draft);
    }
    written
}

pub fn import(context: &Context, arguments: &Import) -> Result<ExitCode> {
    context.keep_house()?;
    let (snapshots, store) = (context.snapshots(), context.store()?);
    if let Some(name) = &arguments.name {
        snapshots.check_name(name)?;
    }
    let name = arguments.name.as_deref();
    let (record, left) = if arguments.input.as_os_str() == "-" {
        if io::stdin().is_terminal() {
            return Err(Error::new("standard input is a terminal, and no snapshot")
                .advice("Name a file, or use a pipe."));
        }
        archive::import(&snapshots, &store, io::stdin().lock(), name)?
    } else {
        let path = &arguments.input;
        let told = || format!("cannot read {}", path.display());
        let file = File::open(path).context(told())?;
        if file.metadata().context(told())?.is_dir() {
            return Err(Error::new(format!("{}: it is a directory", told())).advice("Name an exported file."));
        }
        archive::import(&snapshots, &store, file, name)?
    };
    if let Some(left) = left {
        anstream::eprintln!("flyrun: {left}");
        anstream::eprintln!("  `flyrun run --from-snapshot … --network NAME` joins one.");
    }
    print_line(&record.id)?;
    Ok(ExitCode::Success)
}
