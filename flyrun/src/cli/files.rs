//! `--file-literal`, `--file-local` and `--file-secret`, as `fly machine run` has them.

use std::path::Path;

use clap::Args;

use crate::error::{Error, Result};
use crate::guest_files::{self, Contents, GuestFile};
use crate::secrets::Name;

/// Files that the machine is given at each start.
#[derive(Clone, Debug, Default, Args)]
pub struct FileArguments {
    /// Put a file with this text into the machine at each start
    #[arg(long, value_name = "/PATH=TEXT")]
    file_literal: Vec<String>,
    /// Put a file of the host, as it is now, into the machine at each start
    #[arg(long, value_name = "/PATH=FILE")]
    file_local: Vec<String>,
    /// Put a secret, which is base64, into the machine as a file that only the process's user reads
    #[arg(long, value_name = "/PATH=SECRET")]
    file_secret: Vec<String>,
}

impl FileArguments {
    /// The files, with those of the host read.
    ///
    /// # Errors
    /// One cannot be read, or cannot be put there.
    pub fn files(&self) -> Result<Vec<GuestFile>> {
        let mut files = Vec::new();
        for word in &self.file_literal {
            let (path, text) = split(word)?;
            files.push(GuestFile { path: path.into(), contents: Contents::Text(text.into()) });
        }
        for word in &self.file_local {
            let (path, host) = split(word)?;
            files.push(GuestFile::read(path, Path::new(host))?);
        }
        for word in &self.file_secret {
            let (path, name) = split(word)?;
            files.push(GuestFile { path: path.into(), contents: Contents::Secret(Name::new(name)?) });
        }
        guest_files::check(&files)?;
        Ok(files)
    }
}

fn split(word: &str) -> Result<(&str, &str)> {
    word.split_once('=').ok_or_else(|| {
        Error::new(format!("'{word}' names no file: there is no '='"))
            .advice("Write /PATH=…, with the path that the file has in the machine.")
    })
}
