//! The files of apps: one fly.toml, or a directory of them.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use app::config::{self, MAX_FILE_BYTES, Place, Problem, Refused, together};

use crate::error::Error;
use crate::guest_files;

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
    judge(path, &read(path)?)
}

/// The bytes of a file, as far as one may have.
///
/// # Errors
/// It cannot be read.
pub fn read(path: &Path) -> Result<Vec<u8>, Refused> {
    let mut bytes = Vec::new();
    let limit = MAX_FILE_BYTES as u64 + 1;
    let read = File::open(path).and_then(|file| file.take(limit).read_to_end(&mut bytes));
    read.map_err(|error| unreadable(path, &error))?;
    Ok(bytes)
}

/// Reads a file that has these bytes, or is to have them.
///
/// # Errors
/// All that is wrong with it.
pub fn judge(path: &Path, bytes: &[u8]) -> Result<AppFile, Refused> {
    let file = config::read(&path.to_string_lossy(), bytes)?;
    let mut problems: Vec<_> = image(&file).into_iter().chain(host_files(&file, path)).collect();
    if problems.is_empty() {
        problems.extend(guest_files(&file, path));
    }
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
        // Only what is a file is opened: a pipe would wait for its other end.
        let why = match fs::metadata(&path).map(|metadata| metadata.is_file().then(|| File::open(&path))) {
            Ok(Some(Ok(_))) => return None,
            Ok(None) => "it is not a file".to_string(),
            Ok(Some(Err(error))) | Err(error) => error.to_string(),
        };
        let place = Place::HostFile(name.to_string());
        let message = format!("cannot read {:?}: {why}", path.display().to_string());
        Some(file.problem(&place, message, "Paths count from the directory of the fly.toml."))
    })
}

/// What machines of each group are given, and whether they can be.
fn guest_files(file: &AppFile, path: &Path) -> Option<Problem> {
    let error =
        file.app.groups.values().find_map(|group| guest_files::of_group(group, path).err())?.to_string();
    let (message, advice) = error.split_once("\n  ").unwrap_or((&error, ""));
    Some(file.problem(&Place::Name, format!("[[files]]: {message}"), advice))
}

/// All that is wrong with files, as one error.
pub fn told(refused: &Refused) -> Error {
    let mut lines: Vec<_> = refused.problems.iter().map(ToString::to_string).collect();
    if refused.left_out > 0 {
        lines.push(format!("and {} more", refused.left_out));
    }
    Error::new(lines.join("\nflyrun: "))
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

#[cfg(test)]
mod tests {
    use super::*;

    const WEB: &str = "app = 'web'\nbuild.image = 'nginx'\n[http_service]\n";

    fn told(path: &Path) -> Vec<String> {
        match load(path) {
            Ok(files) => files.into_iter().map(|file| file.app.name).collect(),
            Err(refused) => refused.problems.into_iter().map(|problem| problem.message).collect(),
        }
    }

    #[test]
    fn a_directory_is_every_toml_in_it_by_name() {
        let directory = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(directory.path().join(name), text).unwrap();
        assert_eq!(told(directory.path()), ["no *.toml is in this directory"]);
        write("z.toml", WEB);
        write("a.toml", "app = 'job'\nbuild.image = 'oci:.'\n");
        write(".a.toml.swp.toml", "an editor's");
        write("notes.txt", "mine");
        fs::create_dir(directory.path().join("old.toml")).unwrap();
        assert_eq!(told(directory.path()), ["job", "web"]);
        write("b.toml", "app = 'web'\nbuild.image = 'Upper/x Y'\n");
        let told = told(directory.path());
        assert!(told.len() == 1 && told[0].contains("is not"), "{told:?}");
    }

    #[test]
    fn metrics_of_machines_and_bluegreen_are_known() {
        let told = |more: &str| match judge(Path::new("fly.toml"), format!("{WEB}{more}").as_bytes()) {
            Ok(_) => String::new(),
            Err(refused) => refused.problems[0].to_string(),
        };
        assert_eq!(told("[[metrics]]\nport = 9000\n"), "");
        assert_eq!(told("[[http_service.checks]]\n[deploy]\nstrategy = 'bluegreen'\n"), "");
    }

    #[test]
    fn files_that_an_app_names_count_from_its_own() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("fly.toml");
        let file =
            |local_path: &str| format!("{WEB}[[files]]\nguest_path = '/f'\nlocal_path = '{local_path}'\n");
        fs::write(directory.path().join("f"), "content").unwrap();
        fs::write(&path, file("f")).unwrap();
        assert_eq!(told(&path), ["web"]);
        fs::write(&path, file(".")).unwrap();
        assert!(told(&path)[0].ends_with("it is not a file"), "{:?}", told(&path));
        rustix::fs::mkfifoat(rustix::fs::CWD, directory.path().join("pipe"), 0o600.into()).unwrap();
        fs::write(&path, file("pipe")).unwrap();
        assert!(told(&path)[0].ends_with("it is not a file"), "{:?}", told(&path));
        fs::write(directory.path().join("long"), [b'x'; 70_000]).unwrap();
        fs::write(&path, file("long")).unwrap();
        assert!(told(&path)[0].contains("long is longer than 64 KiB"), "{:?}", told(&path));
        fs::write(&path, file("none")).unwrap();
        assert!(told(&path)[0].contains("none\": No such file"), "{:?}", told(&path));
    }
}
