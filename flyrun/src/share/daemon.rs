//! Which virtiofsd there is, and how it is called.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::error::{Context, Error, Result};

/// Where distributions put it, beside PATH: the one in Rust, then QEMU's in C.
const PLACES: [&str; 3] = ["/usr/libexec/virtiofsd", "/usr/lib/virtiofsd", "/usr/lib/qemu/virtiofsd"];

/// The two programs of this name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Kind {
    /// The one in Rust, <https://gitlab.com/virtio-fs/virtiofsd>.
    Rust,
    /// The one in Rust before 1.13, which cannot serve read-only by itself.
    EarlyRust,
    /// The one in C, which came with QEMU 5 to 7.
    C,
}

/// A virtiofsd that is installed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Daemon {
    pub program: PathBuf,
    pub kind: Kind,
}

impl Daemon {
    /// `FLYRUN_VIRTIOFSD` alone if it is set; otherwise in PATH, then where packages install.
    ///
    /// # Errors
    /// There is none, or it is some other program.
    pub fn find() -> Result<Daemon> {
        if let Some(own) = std::env::var_os("FLYRUN_VIRTIOFSD") {
            return Daemon::at(PathBuf::from(own));
        }
        let path = std::env::var_os("PATH").unwrap_or_default();
        let in_path = std::env::split_paths(&path).map(|place| place.join("virtiofsd"));
        let found = in_path.chain(PLACES.map(PathBuf::from)).find(|program| program.is_file());
        found.map_or_else(|| Err(missing("virtiofsd is not installed")), Daemon::at)
    }

    fn at(program: PathBuf) -> Result<Daemon> {
        if !program.is_file() {
            return Err(missing(&format!("FLYRUN_VIRTIOFSD: there is no {}", program.display())));
        }
        let output = Command::new(&program).arg("--help").stdin(Stdio::null()).output();
        let output = output.context(format!("cannot start {}", program.display()))?;
        let kind = Kind::from_help(&String::from_utf8_lossy(&output.stdout));
        let kind = kind.ok_or_else(|| missing(&format!("{} is no virtiofsd", program.display())))?;
        Ok(Daemon { program, kind })
    }

    /// Whether this user can share directories by it, also such that are kept from being written to whatever the guest tries.
    ///
    /// # Errors
    /// It takes root.
    pub fn check_rights(&self, read_only: bool) -> Result<()> {
        let able = match self.kind {
            Kind::Rust => true,
            Kind::EarlyRust => !read_only,
            Kind::C => false,
        };
        if able || is_root() {
            return Ok(());
        }
        let how = if read_only { " read-only" } else { "" };
        Err(Error::new(format!("{} can share directories{how} for root only", self.program.display()))
            .advice("Install the virtiofsd in Rust, version 1.13 or later, or run flyrun as root."))
    }
}

/// Root may mount, and then read-only is the kernel's promise and not only virtiofsd's.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

fn missing(what: &str) -> Error {
    Error::new(format!("{what}, which shares directories of the host")).advice(
        "Install it with `apt-get install virtiofsd`, on Debian 12 and Ubuntu 22.04 `apt-get install qemu-system-common`.",
    )
}

impl Kind {
    fn from_help(text: &str) -> Option<Kind> {
        if text.contains("--shared-dir") {
            return Some(if text.contains("--readonly") { Kind::Rust } else { Kind::EarlyRust });
        }
        text.contains("source=PATH").then_some(Kind::C)
    }

    /// The arguments that have it serve a directory to whoever connects to the listening socket `fd`. Its own sandbox
    /// stays as it is, a namespace with nothing but the directory.
    pub fn arguments(self, fd: i32, directory: &Path, read_only: bool) -> Vec<OsString> {
        let with = |option: &str, path: &[u8]| OsString::from_vec([option.as_bytes(), path].concat());
        let path = directory.as_os_str().as_bytes();
        let mut arguments = vec![OsString::from(format!("--fd={fd}"))];
        match self {
            Kind::Rust | Kind::EarlyRust => {
                arguments.extend([with("--shared-dir=", path), "--log-level=warn".into()]);
                if read_only && self == Kind::Rust {
                    arguments.push("--readonly".into());
                }
            }
            Kind::C => arguments.extend([
                "-f".into(),
                "-o".into(),
                with("source=", &escaped(path)),
                "-o".into(),
                "log_level=warn".into(),
            ]),
        }
        arguments
    }
}

/// A value of `-o`, where a comma would begin the next option (fuse_opt_parse).
fn escaped(value: &[u8]) -> Vec<u8> {
    let escape = |byte: &u8| if matches!(byte, b',' | b'\\') { vec![b'\\', *byte] } else { vec![*byte] };
    value.iter().flat_map(escape).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(kind: Kind, directory: &str, read_only: bool) -> String {
        let arguments = kind.arguments(5, Path::new(directory), read_only);
        arguments.join(std::ffi::OsStr::new(" ")).into_string().unwrap()
    }

    #[test]
    fn each_is_called_in_its_own_way() {
        assert_eq!(line(Kind::Rust, "/a b", false), "--fd=5 --shared-dir=/a b --log-level=warn");
        assert!(line(Kind::Rust, "/a", true).ends_with("--readonly"));
        assert!(!line(Kind::EarlyRust, "/a", true).contains("--readonly"));
        assert_eq!(line(Kind::C, "/a", true), "--fd=5 -f -o source=/a -o log_level=warn");
        assert!(
            line(Kind::C, r"/a,modcaps=+sys_admin\", false).contains(r"source=/a\,modcaps=+sys_admin\\ ")
        );
    }

    #[test]
    fn they_are_told_apart_by_their_help() {
        assert_eq!(Kind::from_help("--shared-dir <SHARED_DIR>\n --readonly"), Some(Kind::Rust));
        assert_eq!(Kind::from_help("--shared-dir <SHARED_DIR>"), Some(Kind::EarlyRust));
        assert_eq!(Kind::from_help("  -o source=PATH    shared directory tree"), Some(Kind::C));
        assert_eq!(Kind::from_help("Usage: cat [OPTION]... [FILE]..."), None);
    }

    #[test]
    fn what_is_not_there_or_no_virtiofsd_is_told_with_the_package() {
        for program in ["/nonexistent/virtiofsd", "/bin/cat"] {
            let told = Daemon::at(program.into()).unwrap_err().to_string();
            assert!(told.contains(program) && told.contains("apt-get install virtiofsd"), "{told}");
        }
    }
}
