//! What users and clients write: fly.toml, files of variables, words of a command line, requests to the control sockets.

use std::io::Write as _;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;

use app::config;
use serde::de::DeserializeOwned;

use super::assert_harmless;
use crate::cli::{cp, new_machine, ps};
use crate::cpus::Cpus;
use crate::launch::env_file_lines;
use crate::machine::health::HttpTest;
use crate::machine::restart::RestartPolicy;
use crate::moment::{Moment, Period};
use crate::monitor::{Reply, Report, Request, read_line};
use crate::mounts::Mounts;
use crate::network::publish;
use crate::secrets::name::read_lines;
use crate::serve::{Ask, Status, Step};
use crate::signal::Signal;
use crate::size::Size;

/// A fly.toml that is read is the same when it is shown and read again; one that is not is refused in few words, with a place.
pub fn fly_toml(bytes: &[u8]) {
    let lines = bytes.split(|byte| *byte == b'\n').count();
    match config::read("fly.toml", bytes) {
        Ok(file) => {
            let shown = toml::to_string(&config::to_toml(&file.app)).expect("TOML can be written");
            let again = config::read("fly.toml", shown.as_bytes());
            assert_eq!(again.map(|again| again.app).ok(), Some(file.app), "{shown}");
        }
        Err(refused) => {
            assert!(!refused.problems.is_empty());
            for problem in &refused.problems {
                assert!(problem.position.is_none_or(|position| position.line <= lines), "{problem}");
                let told = problem.to_string();
                assert!(told.lines().count() <= 2 && told.len() < 1000, "{told}");
                assert_harmless(&told);
            }
        }
    }
}

/// Variables and secrets.
pub fn env_file(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    for line in env_file_lines(text) {
        assert!(!line.is_empty() && !line.starts_with('#') && !line.contains('\n'));
    }
    if let Ok(secrets) = read_lines(text) {
        assert!(secrets.iter().all(|(_, value)| !value.expose().contains('\0')));
    }
}

/// What stands behind options and in their place.
pub fn words(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Ok(ports) = publish::parse(text) {
        let shown: Vec<_> = ports.iter().map(ToString::to_string).collect();
        // A port of the host that is yet to be found cannot be asked for by its number.
        for (port, shown) in ports.iter().zip(&shown).filter(|(port, _)| port.host != 0) {
            assert_eq!(publish::parse(shown).ok().as_deref(), Some(&[*port][..]), "{shown}");
        }
    }
    let mut mounts = Mounts::default();
    let here = Path::new("/home/me");
    let _ = (mounts.add(text, here), mounts.add_volume(text, here));
    assert!(mounts.paths().all(|path| path.starts_with('/') && !path.split('/').any(|part| part == "..")));
    if let Ok(size) = text.parse::<Size>() {
        assert_eq!(format!("{}b", size.0).parse::<Size>(), Ok(size));
    }
    if let Ok(cpus) = text.parse::<Cpus>() {
        assert!(cpus.count() >= 1);
    }
    let _ = (text.parse::<Moment>().is_ok(), text.parse::<Period>().is_ok());
    let _ = (text.parse::<Signal>().is_ok(), text.parse::<RestartPolicy>().is_ok());
    let _ = (text.parse::<HttpTest>().is_ok(), ps::Filter::parse(text).is_ok());
    if let Ok(cp::Side::Machine { name, path }) = cp::Side::parse(text) {
        assert!(!name.is_empty() && path.starts_with('/') && !path.starts_with("//"));
    }
    let _ = new_machine::parse_labels(&text.lines().map(str::to_string).collect::<Vec<_>>());
}

/// Lines on the sockets of a monitor and of `flyrun serve`.
pub fn control(bytes: &[u8]) {
    line::<Request>(bytes);
    line::<Reply>(bytes);
    line::<Report>(bytes);
    line::<Ask>(bytes);
    line::<Step>(bytes);
    line::<Status>(bytes);
}

/// One line is read, whatever follows it.
fn line<T: DeserializeOwned>(bytes: &[u8]) {
    let (ours, mut theirs) = UnixStream::pair().expect("there are sockets");
    theirs.set_nonblocking(true).expect("it can be set");
    let _ = theirs.write_all(bytes);
    theirs.shutdown(Shutdown::Write).expect("it is connected");
    let first = bytes.split_inclusive(|byte| *byte == b'\n').next().unwrap_or_default();
    let read = read_line::<T>(&ours);
    assert_eq!(read.is_ok(), serde_json::from_slice::<T>(first).is_ok());
}
