//! Files that machines are given at each start: `[[files]]` of fly.toml, and `--file-…`.
//!
//! They are part of a machine's record, but for those that are secrets: of these the record has the name.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use app::config::model;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::{Deserialize, Serialize};

use crate::error::{Context, Error, Result};
use crate::secrets::Name;

/// The most bytes of one file, and of all of a machine. Each record that is read has them in it.
pub const MAX_FILE_BYTES: usize = 64 << 10;
pub const MAX_BYTES: usize = 256 << 10;
/// The most files of a machine.
pub const MAX_FILES: usize = 100;
/// The longest path (limits.h, PATH_MAX).
const MAX_PATH_BYTES: usize = 4095;

/// A file of a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestFile {
    /// An absolute path in the guest.
    pub path: String,
    #[serde(flatten)]
    pub contents: Contents,
}

/// What it contains.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Contents {
    Text(String),
    /// What is no text.
    Base64(String),
    /// The secret of this name, whose value is base64.
    Secret(Name),
}

impl GuestFile {
    /// A file of the host, as it is now.
    ///
    /// # Errors
    /// It cannot be read, is no file, or is too long.
    pub fn read(guest: &str, host: &Path) -> Result<GuestFile> {
        let told = || format!("cannot read {}", host.display());
        let metadata = std::fs::metadata(host).context(told())?;
        if !metadata.is_file() {
            return Err(Error::new(format!("{}: it is not a file", told())));
        }
        let mut bytes = Vec::new();
        let file = File::open(host).context(told())?;
        file.take(MAX_FILE_BYTES as u64 + 1).read_to_end(&mut bytes).context(told())?;
        if bytes.len() > MAX_FILE_BYTES {
            return Err(too_long(&host.display().to_string()));
        }
        let contents = match String::from_utf8(bytes) {
            Ok(text) => Contents::Text(text),
            Err(error) => Contents::Base64(BASE64.encode(error.as_bytes())),
        };
        Ok(GuestFile { path: guest.to_string(), contents })
    }

    /// What it contains, with the secret's value where it is one.
    ///
    /// # Errors
    /// What is to be base64 is not.
    pub fn bytes(&self, secret: impl Fn(&Name) -> Option<Vec<u8>>) -> Result<Vec<u8>> {
        match &self.contents {
            Contents::Text(text) => Ok(text.clone().into_bytes()),
            Contents::Base64(text) => BASE64
                .decode(text)
                .context(format!("the file {} of the machine's record is damaged", self.path)),
            Contents::Secret(name) => {
                let value = secret(name).ok_or_else(|| {
                    Error::new(format!("the file {} is to be the secret {name}, which is not set", self.path))
                        .advice(
                            "Set it, or leave the file away: `flyrun secrets list` tells which there are.",
                        )
                })?;
                // What base64 complains about would be a part of it.
                BASE64.decode(value.trim_ascii()).map_err(|_| {
                    Error::new(format!(
                        "the secret {name}, which is to be the file {}, is not base64",
                        self.path
                    ))
                    .advice(format!("Set it so: base64 -w0 FILE | flyrun secrets set {name}=-"))
                })
            }
        }
    }

    fn length(&self) -> usize {
        match &self.contents {
            Contents::Text(text) | Contents::Base64(text) => text.len(),
            Contents::Secret(_) => 0,
        }
    }
}

/// The files of one group of an app, with those of the host read. `file` is where the app's fly.toml is.
///
/// # Errors
/// One cannot be read, or they are too long.
pub fn of_group(group: &model::Group, file: &Path) -> Result<Vec<GuestFile>> {
    let base = file.parent().unwrap_or(Path::new(""));
    let read = |file: &model::GuestFile| {
        let path = file.guest_path.clone();
        match &file.content {
            model::Content::Text(text) => Ok(GuestFile { path, contents: Contents::Text(text.clone()) }),
            model::Content::HostFile(host) => GuestFile::read(&path, &base.join(host)),
            model::Content::Secret(name) => {
                Ok(GuestFile { path, contents: Contents::Secret(Name::new(name)?) })
            }
        }
    };
    let files = group.files.iter().map(read).collect::<Result<Vec<_>>>()?;
    check(&files)?;
    Ok(files)
}

/// Whether a machine can have these.
///
/// # Errors
/// It cannot.
pub fn check(files: &[GuestFile]) -> Result<()> {
    for file in files {
        let path = &file.path;
        let is_place = path.starts_with('/')
            && !path.ends_with('/')
            && path.len() <= MAX_PATH_BYTES
            && !path.contains('\0')
            && !path.split('/').any(|part| part == ".." || part == ".");
        if !is_place {
            return Err(Error::new(format!("a file cannot be put at {path:?}"))
                .advice("Give an absolute path of the guest, without '..'."));
        }
        if file.length() > MAX_FILE_BYTES.div_ceil(3) * 4 {
            return Err(too_long(path));
        }
    }
    let mut paths: Vec<_> = files.iter().map(|file| &file.path).collect();
    paths.sort_unstable();
    if let Some(twice) = paths.windows(2).find(|two| two.first() == two.last()).and_then(|two| two.first()) {
        return Err(Error::new(format!("two files are to be put at {twice}")).advice("Choose another path."));
    }
    let bytes: usize = files.iter().map(GuestFile::length).sum();
    if files.len() > MAX_FILES || bytes > MAX_BYTES {
        let told = format!("a machine cannot have {} files with {bytes} bytes", files.len());
        return Err(Error::new(told).advice(format!(
            "{MAX_FILES} files with {} KiB together is the most; use a volume, or build them into the image.",
            MAX_BYTES >> 10
        )));
    }
    Ok(())
}

fn too_long(what: &str) -> Error {
    Error::new(format!("{what} is longer than {} KiB", MAX_FILE_BYTES >> 10))
        .advice("Use a volume for what is large, or build it into the image.")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str, contents: Contents) -> GuestFile {
        GuestFile { path: path.into(), contents }
    }

    fn secret() -> GuestFile {
        file("/key", Contents::Secret(Name::new("KEY").unwrap()))
    }

    #[test]
    fn a_file_of_the_host_is_kept_as_text_where_it_is_one() {
        let directory = tempfile::tempdir().unwrap();
        let host = directory.path().join("f");
        for (bytes, in_json) in [
            (&b"a\nb"[..], r#"{"path":"/f","text":"a\nb"}"#),
            (b"\xff\0", r#"{"path":"/f","base64":"/wA="}"#),
        ] {
            std::fs::write(&host, bytes).unwrap();
            let read = GuestFile::read("/f", &host).unwrap();
            assert_eq!(serde_json::to_string(&read).unwrap(), in_json);
            assert_eq!(serde_json::from_str::<GuestFile>(in_json).unwrap(), read);
            assert_eq!(read.bytes(|_| None).unwrap(), bytes);
        }
        std::fs::write(&host, vec![b'x'; MAX_FILE_BYTES + 1]).unwrap();
        assert!(GuestFile::read("/f", &host).unwrap_err().to_string().contains("64 KiB"));
        assert!(GuestFile::read("/f", directory.path()).unwrap_err().to_string().contains("not a file"));
    }

    #[test]
    fn a_secret_is_a_file_where_it_is_base64_and_never_told() {
        let bytes = |value: &'static [u8]| secret().bytes(|_| Some(value.to_vec()));
        assert_eq!(bytes(b"aGk=\n").unwrap(), b"hi");
        let told = bytes(b"hunter2!").unwrap_err().to_string();
        assert!(told.contains("KEY") && told.contains("base64 -w0") && !told.contains("hunter"), "{told}");
        assert!(secret().bytes(|_| None).unwrap_err().to_string().contains("not set"));
        assert_eq!(serde_json::to_string(&secret()).unwrap(), r#"{"path":"/key","secret":"KEY"}"#);
    }

    #[test]
    fn places_are_absolute_and_each_has_one_file() {
        let text = || Contents::Text("x".into());
        for path in ["a", "/", "/a/", "/../a", "/a/./b", "", "/a\0b"] {
            assert!(check(&[file(path, text())]).is_err(), "{path:?}");
        }
        assert!(check(&[file("/a", text()), file("/b", text())]).is_ok());
        assert!(check(&[file("/a", text()), secret(), file("/a", text())]).is_err());
        let long = || Contents::Text("x".repeat(MAX_FILE_BYTES));
        let many: Vec<_> = (0..5).map(|index| file(&format!("/{index}"), long())).collect();
        assert!(check(&many[..4]).is_ok() && check(&many).is_err());
    }

    #[test]
    fn those_of_a_group_count_from_the_fly_toml() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("local"), "of the host").unwrap();
        let text = "app = 'web'\nbuild.image = 'x'\n[[files]]\nguest_path = '/a'\nraw_value = 'raw'\n\
                    [[files]]\nguest_path = '/b'\nlocal_path = 'local'\n\
                    [[files]]\nguest_path = '/c'\nsecret_name = 'KEY'\n";
        let read = app::config::read("fly.toml", text.as_bytes()).unwrap();
        let group = read.app.groups.values().next().unwrap();
        let files = of_group(group, &directory.path().join("fly.toml")).unwrap();
        let contents: Vec<_> = files.into_iter().map(|file| file.contents).collect();
        let key = Contents::Secret(Name::new("KEY").unwrap());
        assert_eq!(contents, [Contents::Text("raw".into()), Contents::Text("of the host".into()), key]);
    }
}
