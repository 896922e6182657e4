//! What `--volume` and `--mount` ask for. Pure.

use std::path::Path;

use crate::error::{Error, Result};
use crate::{share, volume};

/// What is to be mounted over a machine's root.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mounts {
    pub volumes: Vec<volume::Use>,
    /// Directories of the host.
    pub shares: Vec<share::Use>,
    /// As `--tmpfs` has them: a path, and options behind a colon.
    pub tmpfs: Vec<String>,
}

/// Where a volume or a directory is mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// An absolute path below the root.
    pub path: String,
    pub read_only: bool,
}

impl Place {
    fn new(path: &str, read_only: bool) -> std::result::Result<Place, String> {
        let inside = path.starts_with('/') && !path.trim_matches('/').is_empty();
        if !inside || path.split('/').any(|part| part == "..") {
            return Err("the path must be absolute, below the root and without '..'".into());
        }
        Ok(Place { path: path.to_string(), read_only })
    }
}

impl Mounts {
    /// Adds what one `--volume` asks for: `NAME:/PATH[:ro|rw]` or `/DIRECTORY:/PATH[:ro|rw]`. A directory may also count from
    /// `current`.
    ///
    /// # Errors
    /// It is something else, and the error says what is possible.
    pub fn add_volume(&mut self, text: &str, current: &Path) -> Result<()> {
        let bad = |why: String| {
            Error::new(format!("--volume '{text}': {why}"))
                .advice("Write NAME:/PATH for a volume, /DIRECTORY:/PATH for a directory of the host; ':ro' behind it.")
        };
        let mut parts = text.split(':');
        let (source, path) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
        let read_only = match (parts.next(), parts.next()) {
            (None, _) | (Some("rw"), None) => false,
            (Some("ro"), None) => true,
            _ => return Err(bad("behind the path only 'ro' or 'rw' can stand".into())),
        };
        let place = Place::new(path, read_only).map_err(bad)?;
        if share::Use::is_meant(source) {
            self.shares.push(share::Use::new(source, place, current)?);
        } else {
            self.volumes.push(volume::Use::new(source, place)?);
        }
        Ok(())
    }

    /// Where volumes and directories are mounted, without slashes at the end.
    pub fn paths(&self) -> impl Iterator<Item = &str> {
        let volumes = self.volumes.iter().map(|used| &used.path);
        volumes.chain(self.shares.iter().map(|share| &share.path)).map(|path| path.trim_end_matches('/'))
    }

    /// Adds what one `--mount` asks for.
    ///
    /// # Errors
    /// A key or a value is not understood, or one is missing.
    pub fn add(&mut self, text: &str, current: &Path) -> Result<()> {
        let bad = |why: String| {
            Error::new(format!("--mount '{text}': {why}")).advice(
                "Write type=tmpfs,target=/PATH[,size=SIZE][,mode=MODE], type=volume,source=NAME,target=/PATH[,readonly] or \
                 type=bind,source=/DIRECTORY,target=/PATH[,readonly].",
            )
        };
        let (mut kind, mut source, mut target, mut read_only) = ("volume", None, None, false);
        let mut options = Vec::new();
        for part in text.split(',') {
            let (key, value) = part.split_once('=').unwrap_or((part, ""));
            match (key, value) {
                ("type", _) => kind = value,
                ("source" | "src", _) => source = Some(value),
                ("target" | "destination" | "dst", _) => target = Some(value),
                ("readonly" | "ro", "" | "true" | "1") => read_only = true,
                ("readonly" | "ro", "false" | "0") => read_only = false,
                ("tmpfs-size" | "size", _) => options.push(format!("size={value}")),
                ("tmpfs-mode" | "mode", _) => options.push(format!("mode={value}")),
                _ => return Err(bad(format!("'{part}' is not understood"))),
            }
        }
        let target = target.ok_or_else(|| bad("there is no target".into()))?;
        match (kind, source) {
            ("tmpfs", None) => {
                if read_only {
                    options.push("ro".into());
                }
                let joined = options.join(",");
                self.tmpfs.push(if joined.is_empty() { target.into() } else { format!("{target}:{joined}") });
                Ok(())
            }
            ("tmpfs", Some(_)) => Err(bad("a tmpfs has no source".into())),
            ("volume" | "bind", Some(source)) if options.is_empty() => {
                let place = Place::new(target, read_only).map_err(bad)?;
                if kind == "bind" {
                    self.shares.push(share::Use::new(source, place, current)?);
                } else {
                    self.volumes.push(volume::Use::new(source, place)?);
                }
                Ok(())
            }
            ("volume", Some(_)) => {
                Err(bad("size and mode are a tmpfs's; `flyrun volume create` takes a size".into()))
            }
            ("bind", Some(_)) => Err(bad("size and mode are a tmpfs's".into())),
            ("volume" | "bind", None) => Err(bad("there is no source".into())),
            (other, _) => Err(bad(format!("there is no type '{other}'"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Mounts> {
        let mut mounts = Mounts::default();
        mounts.add(text, Path::new("/home/me")).map(|()| mounts)
    }

    fn volume(text: &str) -> Result<Mounts> {
        let mut mounts = Mounts::default();
        mounts.add_volume(text, Path::new("/home/me")).map(|()| mounts)
    }

    fn shared(source: &str, path: &str, read_only: bool) -> share::Use {
        share::Use { source: source.into(), path: path.into(), read_only }
    }

    #[test]
    fn a_volume_is_a_name_a_path_and_perhaps_a_right() {
        let volumes = volume("data:/var/lib/x:ro").unwrap().volumes;
        let expected = volume::Use { name: "data".into(), path: "/var/lib/x".into(), read_only: true };
        assert_eq!(volumes, [expected]);
        assert!(!volume("data:/x:rw").unwrap().volumes[0].read_only);
        for bad in
            ["", "data", "data:", "data:x", "data:/", "data:/a/../b", "data:/x:rx", "d:/x:ro:z", "/a:/"]
        {
            assert!(volume(bad).unwrap_err().to_string().contains("NAME:/PATH"), "{bad}");
        }
        for bad in [":/x", "da ta:/x"] {
            assert!(volume(bad).unwrap_err().to_string().contains("volume's name"), "{bad}");
        }
    }

    #[test]
    fn a_source_that_is_a_path_is_a_directory_of_the_host() {
        assert_eq!(volume("/srv/www:/www:ro").unwrap().shares, [shared("/srv/www", "/www", true)]);
        assert_eq!(volume("./src:/src").unwrap().shares, [shared("/home/me/src", "/src", false)]);
        assert!(volume("~/src:/src").unwrap_err().to_string().contains("absolute"));
    }

    #[test]
    fn all_types_are_understood() {
        assert_eq!(parse("type=tmpfs,target=/x,size=64m,readonly").unwrap().tmpfs, ["/x:size=64m,ro"]);
        assert_eq!(parse("type=tmpfs,dst=/x").unwrap().tmpfs, ["/x"]);
        let volumes = parse("src=data,dst=/x,ro").unwrap().volumes;
        assert_eq!(volumes, [volume::Use { name: "data".into(), path: "/x".into(), read_only: true }]);
        let shares = parse("type=bind,source=/a:b,target=/c:d,readonly").unwrap().shares;
        assert_eq!(shares, [shared("/a:b", "/c:d", true)]);
    }

    #[test]
    fn what_is_not_understood_is_named() {
        for text in [
            "",
            "type=tmpfs",
            "type=bind,source=a,target=/b",
            "type=bind,source=/a,target=/b,size=1",
            "type=bind,source=/a",
            "type=bind,target=/b",
            "type=tmpfs,source=a,target=/b",
            "type=volume,target=/b",
            "source=a:b,target=/c",
            "source=a,target=/b,size=1g",
            "source=a,target=/b,uid=4",
            "source=a,target=b",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
