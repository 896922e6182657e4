//! Commands that take several machines do what they can for each.

use super::{Context, print_line};
use crate::error::Result;
use crate::exit_code::ExitCode;
use crate::machine::Record;

/// Does `action` for each machine that is named and prints the name when it is done. A failure is told, and the others
/// still have their turn.
///
/// # Errors
/// Standard output cannot be written.
pub fn each(
    context: &Context,
    names: &[String],
    action: impl Fn(&Context, &Record) -> Result<()>,
) -> Result<ExitCode> {
    let mut code = ExitCode::Success;
    for name in names {
        match context.machines().find(name).and_then(|record| action(context, &record)) {
            Ok(()) => print_line(name)?,
            Err(error) => {
                anstream::eprintln!("flyrun: {name}: {error}");
                code = error.exit_code();
            }
        }
    }
    Ok(code)
}
