//! `flyrun cp`: files between the host and a running machine.

use std::io;
use std::path::Path;

use clap::Args;
use protocol::session::{FromSession, Request};

use super::Context;
use crate::error::{Context as _, Error, Result};
use crate::exit_code::ExitCode;
use crate::machine::Record;
use crate::session::{self, Found, Place};

/// Copy files between a running machine and the host
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  flyrun cp web:/etc/nginx/nginx.conf .
  flyrun cp ./site web:/srv/
  flyrun cp web:/var/log/. logs
  flyrun cp web:/srv - | tar t
  tar c site | flyrun cp - web:/srv

Into a directory that exists, a file or directory goes under its own name, and DIR/. only its content; otherwise it
gets the name that is given. Paths in a machine begin at its root. In a machine, copies belong to root; on the host to
you, without set-user-id and set-group-id bits. A local path with a colon is written with ./ in front.

Exit codes: 0; 125 when something could not be copied.")]
pub struct Arguments {
    /// Keep owner and group as they are
    #[arg(short, long)]
    archive: bool,
    /// Follow a symbolic link that is named as SOURCE
    #[arg(short = 'L', long)]
    follow_link: bool,
    /// MACHINE:PATH, a path of the host, or - for a tar on standard input
    source: String,
    /// MACHINE:PATH, a path of the host, or - for a tar on standard output
    destination: String,
}

/// One side of a copy, as it is written.
#[derive(Debug, PartialEq, Eq)]
pub enum Side<'a> {
    Machine { name: &'a str, path: String },
    Host(&'a str),
}

pub fn execute(context: &Context, arguments: &Arguments) -> Result<ExitCode> {
    match (Side::parse(&arguments.source)?, Side::parse(&arguments.destination)?) {
        (Side::Machine { name, path }, Side::Host(destination)) => {
            let machine = session::find_running(&context.machines(), name)?;
            copy_out(context, arguments, &machine, &path, destination)?;
        }
        (Side::Host(source), Side::Machine { name, path }) => {
            let machine = session::find_running(&context.machines(), name)?;
            copy_in(context, arguments, &machine, source, &path)?;
        }
        _ => {
            return Err(Error::new("one side of a copy must be a machine's and the other the host's")
                .advice("Write the machine's side as MACHINE:PATH."));
        }
    }
    Ok(ExitCode::Success)
}

fn copy_out(
    context: &Context,
    arguments: &Arguments,
    machine: &Record,
    source: &str,
    destination: &str,
) -> Result<()> {
    let link = session::connect(&context.paths, machine)?;
    if destination == "-" {
        return session::copy_out_tar(&link, source, arguments.follow_link, io::stdout().lock());
    }
    session::copy_out(&link, source, arguments.follow_link, destination, arguments.archive)
}

fn copy_in(
    context: &Context,
    arguments: &Arguments,
    machine: &Record,
    source: &str,
    destination: &str,
) -> Result<()> {
    let found = found(context, machine, destination)?;
    let link = || session::connect(&context.paths, machine);
    if source == "-" {
        if found != Found::Directory {
            return Err(Error::new(format!("there is no directory {destination} in the machine"))
                .advice("A tar is unpacked into a directory that exists."));
        }
        return session::copy_in_tar(&link()?, io::stdin().lock(), destination);
    }
    let path = Path::new(source);
    let metadata = if arguments.follow_link || source.ends_with('/') {
        path.metadata()
    } else {
        path.symlink_metadata()
    };
    let is_directory = metadata.context(format!("cannot read {source}"))?.is_dir();
    let place = Place::decide(source, is_directory, destination, found)?;
    session::copy_in(&link()?, path, arguments.follow_link, &place, arguments.archive)
}

/// What is at a path of the machine.
fn found(context: &Context, machine: &Record, path: &str) -> Result<Found> {
    let mut found = None;
    session::ask(&context.paths, machine, &Request::Stat { path: path.to_string() }, |frame| match frame {
        FromSession::PathInfo(info) => {
            found = Some(match info {
                None => Found::Nothing,
                Some(info) if info.is_directory => Found::Directory,
                Some(_) => Found::Other,
            });
            Ok(())
        }
        _ => Err(session::unasked()),
    })?;
    found.ok_or_else(|| Error::new("the machine ended before the copy was whole"))
}

impl Side<'_> {
    pub fn parse(text: &str) -> Result<Side<'_>> {
        match text.split_once(':') {
            // A path with a slash before its colon is a path.
            Some((name, path)) if !name.contains('/') && !name.is_empty() => {
                let path = format!("/{}", path.trim_start_matches('/'));
                if path.ends_with("/..") {
                    return Err(
                        Error::new(format!("'{text}' ends in ..")).advice("Write the directory's own path.")
                    );
                }
                Ok(Side::Machine { name, path })
            }
            _ if text.is_empty() => Err(Error::new("a path is empty")),
            _ => Ok(Side::Host(text)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_s_side_has_a_colon_and_a_path_may_have_one_too() {
        let machine = |path: &str| Side::Machine { name: "web", path: path.into() };
        assert_eq!(Side::parse("web:/etc/hosts").unwrap(), machine("/etc/hosts"));
        assert_eq!(Side::parse("web:etc/").unwrap(), machine("/etc/"));
        assert_eq!(Side::parse("web:").unwrap(), machine("/"));
        assert_eq!(Side::parse("./a:b").unwrap(), Side::Host("./a:b"));
        assert_eq!(Side::parse("/a:b").unwrap(), Side::Host("/a:b"));
        assert_eq!(Side::parse("-").unwrap(), Side::Host("-"));
        assert!(Side::parse("web:/a/..").is_err());
        assert!(Side::parse("").is_err());
    }
}
