//! `--mount`: docker's long way to say what is mounted. Pure.

use crate::error::{Error, Result};
use crate::volume;

/// What is to be mounted over a machine's root.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mounts {
    pub volumes: Vec<volume::Use>,
    /// As `--tmpfs` has them: a path, and options behind a colon.
    pub tmpfs: Vec<String>,
}

impl Mounts {
    /// Adds what one `--mount` asks for.
    ///
    /// # Errors
    /// A key or a value is not understood, or one is missing.
    pub fn add(&mut self, text: &str) -> Result<()> {
        let bad = |why: String| {
            Error::new(format!("--mount '{text}': {why}")).advice(
                "Write type=tmpfs,target=/PATH[,size=SIZE][,mode=MODE] or type=volume,source=NAME,target=/PATH[,readonly].",
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
            ("volume", Some(source)) if options.is_empty() => {
                let right = if read_only { "ro" } else { "rw" };
                self.volumes.push(volume::Use::parse(&format!("{source}:{target}:{right}"))?);
                Ok(())
            }
            ("volume", Some(_)) => {
                Err(bad("size and mode are a tmpfs's; `flyrun volume create` takes a size".into()))
            }
            ("volume", None) => Err(bad("there is no source".into())),
            (other, _) => Err(bad(format!("there is no type '{other}'"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Mounts> {
        let mut mounts = Mounts::default();
        mounts.add(text).map(|()| mounts)
    }

    #[test]
    fn both_types_are_understood() {
        assert_eq!(parse("type=tmpfs,target=/x,size=64m,readonly").unwrap().tmpfs, ["/x:size=64m,ro"]);
        assert_eq!(parse("type=tmpfs,dst=/x").unwrap().tmpfs, ["/x"]);
        let volumes = parse("src=data,dst=/x,ro").unwrap().volumes;
        assert_eq!(volumes, [volume::Use { name: "data".into(), path: "/x".into(), read_only: true }]);
    }

    #[test]
    fn what_is_not_understood_is_named() {
        for text in [
            "",
            "type=tmpfs",
            "type=bind,source=/a,target=/b",
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
