//! Those commands that somebody waits for with a machine in the balance, without the definitions of all others: to make those
//! takes longer than to find and lock the machine, or to find the image.

use std::ffi::OsString;

use clap::{Parser, Subcommand};

use super::{Cli, Command, Places, run, start, suspend};

#[derive(Debug, Parser)]
#[command(name = "flyrun", disable_help_flag = true, disable_version_flag = true)]
struct Short<T: Subcommand> {
    #[command(flatten)]
    places: Places,
    #[command(subcommand)]
    command: T,
}

/// Those that name machines.
#[derive(Debug, Subcommand)]
#[command(disable_help_subcommand = true)]
enum OfMachines {
    Resume(suspend::Resume),
    Start(start::Arguments),
    Suspend(suspend::Suspend),
}

/// The one with as many options as all of those and some more.
#[derive(Debug, Subcommand)]
#[command(disable_help_subcommand = true)]
enum OfAnImage {
    Run(Box<run::Arguments>),
}

/// `None` for all other command lines, and for those with mistakes or questions, which the whole definition answers.
pub fn read() -> Option<Cli> {
    read_from(std::env::args_os())
}

fn read_from(words: impl IntoIterator<Item = OsString>) -> Option<Cli> {
    let words: Vec<_> = words.into_iter().collect();
    // Wherever it stands, as behind an option's value.
    let command = words.iter().skip(1).find_map(|word| match word.to_str()? {
        word @ ("resume" | "run" | "start" | "suspend") => Some(word),
        _ => None,
    })?;
    if command == "run" {
        let short = Short::try_parse_from(words).ok()?;
        let OfAnImage::Run(arguments) = short.command;
        return Some(Cli { places: short.places, command: Command::Run(arguments) });
    }
    let short = Short::try_parse_from(words).ok()?;
    let command = match short.command {
        OfMachines::Resume(arguments) => Command::Resume(arguments),
        OfMachines::Start(arguments) => Command::Start(arguments),
        OfMachines::Suspend(arguments) => Command::Suspend(arguments),
    };
    Some(Cli { places: short.places, command })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<OsString> {
        line.split(' ').map(OsString::from).collect()
    }

    #[test]
    fn what_is_understood_means_the_same_as_by_the_whole_definition() {
        for line in [
            "flyrun resume web",
            "flyrun --root /r resume a b",
            "flyrun run --rm -it --root /r -m 1g alpine sh -c x --help",
            "flyrun run -d --cold --name web nginx",
            "flyrun run --from-snapshot warm",
            "flyrun suspend --force web --run-dir /x",
            "flyrun start -ai shell",
        ] {
            let short = read_from(words(line)).map(|cli| format!("{cli:?}"));
            assert_eq!(short, Some(format!("{:?}", Cli::try_parse_from(words(line)).unwrap())), "{line}");
        }
    }

    #[test]
    fn the_rest_is_left_to_it() {
        for line in [
            "flyrun",
            "flyrun ps",
            "flyrun resume",
            "flyrun resume --help",
            "flyrun run",
            "flyrun run --help",
            "flyrun run --rn alpine",
            "flyrun --version",
            "flyrun start -x a",
            "flyrun --root run resume web",
        ] {
            assert!(read_from(words(line)).is_none(), "{line}");
        }
    }
}
