//! What a machine is given over vsock when it starts, and never as a file: its app's secrets, and its files.
//!
//! The guest connects once, before its workload runs; then nobody can any more.

use std::fmt;
use std::io::Write;
use std::os::unix::net::UnixListener;
use std::time::Duration;

use protocol::{Delivery, DeliveryConfig, File, Owner, encode_delivery, port};
use zeroize::Zeroizing;

use crate::error::{Context, Result};
use crate::guest_files::Contents;
use crate::machine::Config;
use crate::paths::RunDir;
use crate::secrets::Secrets;
use crate::vm::{listen, spawn as spawn_thread};

/// How long a guest may take to read on.
const WRITE_LIMIT: Duration = Duration::from_secs(60);

/// A delivery that is ready. Nothing shows it, and it is wiped from memory.
pub struct Parcel {
    config: DeliveryConfig,
    bytes: Zeroizing<Vec<u8>>,
}

/// Where a parcel is waited for, until this is dropped.
#[derive(Debug)]
pub struct Handing {
    listener: UnixListener,
}

impl Parcel {
    /// What a machine is to be given; `None` if that is nothing.
    ///
    /// # Errors
    /// Secrets cannot be read, or one that is to be a file cannot be one.
    pub fn prepare(config: &Config, secrets: &Secrets) -> Result<Option<Parcel>> {
        if config.secrets.is_none() && config.files.is_empty() {
            return Ok(None);
        }
        let values = config.secrets.as_deref().map(|app| secrets.read(app)).transpose()?.unwrap_or_default();
        let value = |name: &_| Some(values.get(name)?.expose().as_bytes().to_vec());
        let mut files = Vec::with_capacity(config.files.len());
        for file in &config.files {
            let owner = match file.contents {
                Contents::Secret(_) => Owner::Workload,
                _ => Owner::Root,
            };
            files.push(File { path: file.path.clone(), owner, contents: file.bytes(value)? });
        }
        let paths = files.iter().map(|file| file.path.clone()).collect();
        let env = values.iter().map(|(name, value)| format!("{name}={}", value.expose())).collect();
        let mut delivery = Delivery { env, files };
        let bytes =
            encode_delivery(&delivery).map(Zeroizing::new).context("cannot deliver files and secrets");
        wipe(&mut delivery);
        Ok(Some(Parcel { config: DeliveryConfig { paths }, bytes: bytes? }))
    }

    /// What the machine's configuration tells of it.
    pub fn config(&self) -> DeliveryConfig {
        self.config.clone()
    }

    /// Waits for the guest and gives it everything. Call before the machine starts.
    ///
    /// # Errors
    /// The socket cannot be made.
    pub fn hand_over(self, run_dir: &RunDir) -> Result<Handing> {
        let listener = listen(run_dir, port::DELIVERY)?;
        let own = listener.try_clone().context("cannot share a socket")?;
        spawn_thread("delivery", move || {
            let accepted = own.accept();
            // Whoever asks after this is not guest-init. The socket's file may be that of the next life already.
            let _ = rustix::net::shutdown(&own, rustix::net::Shutdown::Both);
            if let Ok((mut stream, _)) = accepted {
                // A guest that does not take it fails by itself, and says so.
                let _ =
                    stream.set_write_timeout(Some(WRITE_LIMIT)).and_then(|()| stream.write_all(&self.bytes));
            }
        })
        .context("cannot start a thread")?;
        Ok(Handing { listener })
    }
}

fn wipe(delivery: &mut Delivery) {
    use zeroize::Zeroize;
    delivery.env.zeroize();
    delivery.files.iter_mut().for_each(|file| file.contents.zeroize());
}

impl fmt::Debug for Parcel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Parcel({} bytes)", self.bytes.len())
    }
}

impl Drop for Handing {
    fn drop(&mut self) {
        let _ = rustix::net::shutdown(&self.listener, rustix::net::Shutdown::Both);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use protocol::decode_delivery;

    use super::*;
    use crate::guest_files::GuestFile;
    use crate::machine::Record;
    use crate::paths::Paths;
    use crate::secrets::{Name, Value};

    fn set(secrets: &Secrets, name: &str, value: &str) {
        let name = Name::new(name).unwrap();
        let value = Value::new(&name, Zeroizing::new(value.into())).unwrap();
        secrets.set("shop", vec![(name, value)]).unwrap();
    }

    fn machine() -> (tempfile::TempDir, Paths, Config) {
        let directory = tempfile::tempdir().unwrap();
        let paths = Paths { root: directory.path().join("root"), run: directory.path().join("run") };
        let mut config = Record::example("web").config;
        config.secrets = Some("shop".into());
        let file = |path: &str, contents| GuestFile { path: path.into(), contents };
        config.files.push(file("/etc/shop.conf", Contents::Text("open".into())));
        config.files.push(file("/run/key", Contents::Secret(Name::new("KEY").unwrap())));
        (directory, paths, config)
    }

    #[test]
    fn the_first_who_asks_gets_everything_and_nobody_after() {
        let (_directory, paths, config) = machine();
        let secrets = Secrets::new(&paths);
        set(&secrets, "KEY", "aGk=");
        set(&secrets, "TOKEN", "hunter2");
        let parcel = Parcel::prepare(&config, &secrets).unwrap().unwrap();
        assert_eq!(parcel.config().paths, ["/etc/shop.conf", "/run/key"]);
        assert!(!format!("{parcel:?}").contains("hunter2"));
        let run_dir = paths.make_run_dir("m").unwrap();
        let _handing = parcel.hand_over(&run_dir).unwrap();
        let socket = run_dir.vsock_port(port::DELIVERY);
        let mut bytes = Vec::new();
        UnixStream::connect(&socket).unwrap().read_to_end(&mut bytes).unwrap();
        let delivery = decode_delivery(&bytes).unwrap();
        assert_eq!(delivery.env, ["KEY=aGk=", "TOKEN=hunter2"]);
        let files: Vec<_> =
            delivery.files.iter().map(|file| (file.owner, file.contents.as_slice())).collect();
        assert_eq!(files, [(Owner::Root, &b"open"[..]), (Owner::Workload, b"hi")]);
        assert!(UnixStream::connect(&socket).is_err());
    }

    #[test]
    fn a_machine_without_any_is_given_nothing() {
        let (_directory, paths, mut config) = machine();
        let secrets = Secrets::new(&paths);
        assert!(
            Parcel::prepare(&config, &secrets).unwrap_err().to_string().contains("KEY, which is not set")
        );
        config.files.clear();
        // An app without secrets may get some later.
        assert!(Parcel::prepare(&config, &secrets).unwrap().is_some());
        config.secrets = None;
        assert!(Parcel::prepare(&config, &secrets).unwrap().is_none());
    }
}
