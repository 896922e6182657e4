//! Files to read, and the ways to read them.
#![allow(dead_code)] // each test program uses some

use app::config::model::App;
use app::config::{self, Refused, to_toml};

macro_rules! fixtures {
    ($($name:literal),*) => { &[$(($name, include_str!(concat!("../fixtures/", $name)))),*] };
}

pub const FIXTURES: &[(&str, &str)] =
    fixtures!("smallest.toml", "web.toml", "database.toml", "older.toml", "edge.toml", "worker.toml");

pub fn read(text: &str) -> Result<App, Refused> {
    config::read("fly.toml", text.as_bytes()).map(|file| file.app)
}

/// What `flyrun config show` prints, read.
pub fn read_again(app: &App) -> Result<App, Refused> {
    read(&toml::to_string(&to_toml(app)).expect("TOML can be written"))
}

/// All that is wrong with a file, a line each and advice behind `|`.
pub fn refusals(text: &str) -> Vec<String> {
    match read(text) {
        Ok(_) => Vec::new(),
        Err(refused) => {
            refused.problems.iter().map(|problem| problem.to_string().replace("\n  ", " | ")).collect()
        }
    }
}
