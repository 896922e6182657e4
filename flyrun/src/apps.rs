//! The files of apps: one fly.toml, or a directory of them.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use app::config::{self, MAX_FILE_BYTES, Place, Problem, Refused, together};

/// A fly.toml that was read, and found to fit this host.
pub type AppFile = config::File;

/// Reads a file, or every `*.toml` of a directory as apps that one proxy serves.
///
/// # Errors
/// All that is wrong with them.
pub fn load(path: &Path) -> Result<Vec<AppFile>, Refused> {
    if !path.is_dir() {
        return Ok(vec![load_file(path)?]);
    }
    let paths = tomls(path).map_err(|error| unreadable(path, &error))?;
    if paths.is_empty() {
        return Err(
            problem(path, "no *.toml is in this directory", "Put a fly.toml of each app there.").into()
        );
    }
    let (mut files, mut refused) = (Vec::new(), Refused { problems: Vec::new(), left_out: 0 });
    for path in paths {
        match load_file(&path) {
            Ok(file) => files.push(file),
            Err(Refused { problems, left_out }) => {
                refused.problems.extend(problems);
                refused.left_out += left_out;
            }
        }
    }
    if let Err(Refused { problems, .. }) = together(&files) {
        refused.problems.extend(problems);
    }
    if refused.problems.is_empty() { Ok(files) } else { Err(refused) }
}

/// Reads one file.
///
/// # Errors
/// All that is wrong with it.
pub fn load_file(path: &Path) -> Result<AppFile, Refused> {
    let mut bytes = Vec::new();
    let limit = MAX_FILE_BYTES as u64 + 1;
    let read = File::open(path).and_then(|file| file.take(limit).read_to_end(&mut bytes));
    read.map_err(|error| unreadable(path, &error))?;
    let file = config::read(&path.to_string_lossy(), &bytes)?;
    let problems: Vec<_> = image(&file).into_iter().chain(host_files(&file, path)).collect();
    if problems.is_empty() { Ok(file) } else { Err(Refused { problems, left_out: 0 }) }
}

/// By name, so that messages and apps come in the same order each time.
fn tomls(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        // An editor's own files begin with a dot.
        let is_hidden = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        if !is_hidden && path.extension().is_some_and(|extension| extension == "toml") && path.is_file() {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

fn image(file: &AppFile) -> Option<Problem> {
    let error = images::Reference::parse(&file.app.image).err()?;
    Some(file.problem(&Place::Image, error.to_string(), "Name an image as `flyrun run` takes it."))
}

fn host_files<'f>(file: &'f AppFile, path: &'f Path) -> impl Iterator<Item = Problem> + 'f {
    let base = path.parent().unwrap_or(Path::new(""));
    file.host_files().filter_map(move |name| {
        let path = base.join(name);
        let why = match File::open(&path).and_then(|opened| opened.metadata()) {
            Ok(metadata) if metadata.is_file() => return None,
            Ok(_) => "it is not a file".to_string(),
            Err(error) => error.to_string(),
        };
        let place = Place::HostFile(name.to_string());
        let message = format!("cannot read {:?}: {why}", path.display().to_string());
        Some(file.problem(&place, message, "Paths count from the directory of the fly.toml."))
    })
}

fn unreadable(path: &Path, error: &io::Error) -> Refused {
    problem(path, &format!("cannot be read: {error}"), "Name a fly.toml, or a directory of them.").into()
}

fn problem(path: &Path, message: &str, advice: &str) -> Problem {
    Problem {
        file: path.to_string_lossy().into_owned(),
        position: None,
        message: message.to_string(),
        advice: Some(advice.to_string()),
    }
}
