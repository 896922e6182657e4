//! Volumes: filesystems that outlive the machines they are attached to.
//!
//! A volume is a directory `volumes/<name>/` with `volume.json` and `data.ext4`. Its file `lock` is held by each machine that has
//! it attached, for as long as it lives: shared by those that only read, exclusively by one that writes. What is in the
//! filesystem is the guests' alone: the host makes an empty one and never looks into it again.

use std::fs::{self, File};
use std::io;
use std::path::PathBuf;

use images::{Store, TemplateKind};
use serde::{Deserialize, Serialize};

use crate::error::{Context, Error, Result, from_images};
use crate::files::{self, Lasting};
use crate::machine::{Record, is_name, now};
use crate::mounts::Place;
use crate::paths::make_private_dir;
use crate::size::Size;

const VERSION: u32 = 1;
const RECORD: &str = "volume.json";
const DATA: &str = "data.ext4";
const LOCK: &str = "lock";
/// What a volume has when nobody says otherwise; it takes up only what is written.
pub const DEFAULT_SIZE: Size = Size::gib(10);
pub const MIN_SIZE: Size = Size::mib(64);
pub const MAX_SIZE: Size = Size::gib(8 << 10);

/// What is known of a volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    pub version: u32,
    pub name: String,
    pub size: Size,
    /// Seconds since the epoch.
    pub created_at: u64,
}

/// A volume in a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Use {
    pub name: String,
    /// Where it is mounted: an absolute path.
    pub path: String,
    pub read_only: bool,
}

/// A volume that is attached, until this is dropped.
#[derive(Debug)]
pub struct Attached {
    pub data: PathBuf,
    _lock: File,
}

/// All volumes of a store.
#[derive(Clone, Debug)]
pub struct Volumes {
    directory: PathBuf,
}

impl Use {
    /// A volume of this name at this place.
    ///
    /// # Errors
    /// No volume can be called so.
    pub fn new(name: &str, place: Place) -> Result<Use> {
        if !is_name(name) {
            return Err(Error::new(format!("{name:?} cannot be a volume's name")).advice(
                "Use a name that `flyrun volume ls` lists, or the path of a directory of the host.",
            ));
        }
        Ok(Use { name: name.to_string(), path: place.path, read_only: place.read_only })
    }
}

impl Volumes {
    pub fn new(directory: PathBuf) -> Volumes {
        Volumes { directory }
    }

    /// Makes a volume with an empty filesystem.
    ///
    /// # Errors
    /// The name is taken or none, the size is out of range, or the disk is full.
    pub fn create(&self, store: &Store, name: &str, size: Size) -> Result<Volume> {
        if !is_name(name) {
            return Err(Error::new(format!("{name:?} cannot be a volume's name"))
                .advice("Use up to 63 letters, digits, '_', '.' and '-', a letter or digit first."));
        }
        check_size(size)?;
        let _all = self.lock_all()?;
        if self.read(name).is_some() {
            return Err(
                Error::new(format!("there is a volume '{name}' already")).advice("Choose another name.")
            );
        }
        let directory = self.directory.join(name);
        // What a crash left of one that was being made has no record, and no data.
        let _ = fs::remove_dir_all(&directory);
        make_private_dir(&directory)?;
        let volume =
            Volume { version: VERSION, name: name.to_string(), size: whole_mib(size), created_at: now() };
        let made = store
            .copy_template(TemplateKind::Volume, volume.size.0, &directory.join(DATA))
            .map_err(|error| from_images(&error))
            .and_then(|()| self.write(&volume));
        if let Err(error) = made {
            let _ = fs::remove_dir_all(&directory);
            return Err(error);
        }
        Ok(volume)
    }

    /// All volumes, by name.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn list(&self) -> Result<Vec<Volume>> {
        let entries = match fs::read_dir(&self.directory) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(vec![]),
            Err(error) => {
                return Err(Error::caused(format!("cannot read {}", self.directory.display()), &error));
            }
        };
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let mut volumes: Vec<_> = names.filter_map(|name| self.read(&name)).collect();
        volumes.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(volumes)
    }

    /// The volume of this name.
    ///
    /// # Errors
    /// There is none.
    pub fn find(&self, name: &str) -> Result<Volume> {
        self.read(name).ok_or_else(|| {
            Error::new(format!("there is no volume '{name}'")).advice("`flyrun volume ls` lists all.")
        })
    }

    /// Bytes that a volume takes up on the host.
    pub fn used(&self, name: &str) -> u64 {
        use std::os::unix::fs::MetadataExt;
        fs::metadata(self.directory.join(name).join(DATA)).map_or(0, |metadata| metadata.blocks() * 512)
    }

    pub fn directory_of(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// Removes a volume that no machine has.
    ///
    /// # Errors
    /// A machine among `machines` has it, or one that is just starting.
    pub fn remove(&self, name: &str, machines: &[Record]) -> Result<()> {
        let _all = self.lock_all()?;
        let volume = self.find(name)?;
        if let Some(user) = users(machines, &volume.name).next() {
            return Err(Error::new(format!("volume '{name}' belongs to machine {}", user.name))
                .advice("Remove that machine first, with `flyrun rm`."));
        }
        let _lock = self.lock(name, false)?;
        let directory = self.directory.join(name);
        let told = || format!("cannot remove {}", directory.display());
        // Without the record it is no volume any more, whatever happens to the rest.
        fs::remove_file(directory.join(RECORD)).context(told())?;
        fs::remove_dir_all(&directory).context(told())
    }

    /// Makes a volume larger. Its filesystem grows when it is next mounted.
    ///
    /// # Errors
    /// It is attached, is larger already, or the size is out of range.
    pub fn extend(&self, name: &str, size: Size) -> Result<Volume> {
        let _all = self.lock_all()?;
        let mut volume = self.find(name)?;
        let size = whole_mib(size);
        check_size(size)?;
        if size < volume.size {
            return Err(Error::new(format!(
                "volume '{name}' has {}, and cannot shrink to {size}",
                volume.size
            ))
            .advice("Make a smaller one, and copy what you need with `flyrun cp`."));
        }
        let _lock = self.lock(name, false)?;
        let data = self.directory.join(name).join(DATA);
        let file =
            File::options().write(true).open(&data).context(format!("cannot open {}", data.display()))?;
        file.set_len(size.0)
            .and_then(|()| file.sync_all())
            .context(format!("cannot extend {}", data.display()))?;
        volume.size = size;
        self.write(&volume)?;
        Ok(volume)
    }

    /// Attaches a volume to a machine that starts.
    ///
    /// # Errors
    /// It is gone, or another machine has it.
    pub fn attach(&self, wanted: &Use) -> Result<Attached> {
        self.find(&wanted.name)?;
        let lock = self.lock(&wanted.name, wanted.read_only)?;
        Ok(Attached { data: self.directory.join(&wanted.name).join(DATA), _lock: lock })
    }

    fn lock(&self, name: &str, shared: bool) -> Result<File> {
        let path = self.directory.join(name).join(LOCK);
        let file = files::open_lock(&path).context(format!("cannot open the lock {}", path.display()))?;
        match if shared { file.try_lock_shared() } else { file.try_lock() } {
            Ok(()) => Ok(file),
            Err(_) => Err(Error::new(format!("volume '{name}' is in use by a running machine"))
                .advice("Stop that machine first, or attach it read-only everywhere; `flyrun volume inspect` names it.")),
        }
    }

    fn lock_all(&self) -> Result<File> {
        make_private_dir(&self.directory)?;
        let path = self.directory.join(".lock");
        let file = files::open_lock(&path).context(format!("cannot open the lock {}", path.display()))?;
        file.lock().context("cannot lock the volumes")?;
        Ok(file)
    }

    fn read(&self, name: &str) -> Option<Volume> {
        let text = is_name(name).then(|| fs::read(self.directory.join(name).join(RECORD)).ok()).flatten()?;
        let volume: Volume = serde_json::from_slice(&text).ok()?;
        (volume.version == VERSION && volume.name == name).then_some(volume)
    }

    fn write(&self, volume: &Volume) -> Result<()> {
        let directory = self.directory.join(&volume.name);
        let contents = serde_json::to_vec_pretty(volume).context("cannot write JSON")?;
        files::replace(&directory, RECORD, &contents, Lasting::PowerCut)
            .context(format!("cannot write {}", directory.join(RECORD).display()))
    }
}

/// The machines that a volume belongs to.
pub fn users<'a>(machines: &'a [Record], name: &'a str) -> impl Iterator<Item = &'a Record> {
    machines.iter().filter(move |machine| machine.config.volumes.iter().any(|used| used.name == name))
}

fn check_size(size: Size) -> Result<()> {
    if (MIN_SIZE..=MAX_SIZE).contains(&size) {
        return Ok(());
    }
    Err(Error::new(format!("a volume of {size} is out of range"))
        .advice(format!("Choose between {MIN_SIZE} and {MAX_SIZE}.")))
}

fn whole_mib(size: Size) -> Size {
    Size(size.to_mib() << 20)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn volumes() -> (tempfile::TempDir, Store, Volumes) {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path().join("store"));
        let volumes = Volumes::new(directory.path().join("volumes"));
        (directory, store, volumes)
    }

    fn used(name: &str, read_only: bool) -> Use {
        Use::new(name, Place { path: "/x".into(), read_only }).unwrap()
    }

    #[test]
    fn a_volume_is_made_found_extended_and_removed() {
        let (_directory, store, volumes) = volumes();
        volumes.create(&store, "data", Size(MIN_SIZE.0 + 1)).unwrap();
        assert_eq!(volumes.find("data").unwrap().size, Size::mib(65));
        assert!(volumes.create(&store, "data", MIN_SIZE).unwrap_err().to_string().contains("already"));
        assert!(volumes.extend("data", MIN_SIZE).unwrap_err().to_string().contains("shrink"));
        volumes.extend("data", Size::mib(128)).unwrap();
        let data = volumes.directory_of("data").join(DATA);
        assert_eq!(fs::metadata(data).unwrap().len(), 128 << 20);
        volumes.remove("data", &[]).unwrap();
        assert!(volumes.find("data").is_err() && volumes.list().unwrap().is_empty());
    }

    #[test]
    fn one_writer_or_many_readers() {
        let (_directory, store, volumes) = volumes();
        volumes.create(&store, "data", MIN_SIZE).unwrap();
        let writing = used("data", false);
        let reading = used("data", true);
        let readers = (volumes.attach(&reading).unwrap(), volumes.attach(&reading).unwrap());
        assert!(volumes.attach(&writing).unwrap_err().to_string().contains("in use"));
        assert!(volumes.remove("data", &[]).is_err() && volumes.extend("data", Size::gib(1)).is_err());
        drop(readers);
        let _writer = volumes.attach(&writing).unwrap();
        assert!(volumes.attach(&reading).is_err() && volumes.attach(&writing).is_err());
    }

    #[test]
    fn a_machine_keeps_its_volumes_also_when_it_does_not_run() {
        let (_directory, store, volumes) = volumes();
        volumes.create(&store, "data", MIN_SIZE).unwrap();
        let mut machine = Record::example("web");
        machine.config.volumes.push(used("data", false));
        let told = volumes.remove("data", &[machine]).unwrap_err().to_string();
        assert!(told.contains("web"), "{told}");
    }

    #[test]
    fn sizes_and_names_that_cannot_be_are_refused() {
        let (_directory, store, volumes) = volumes();
        for (name, size) in [("../x", MIN_SIZE), ("", MIN_SIZE), ("a", Size(1)), ("a", Size(MAX_SIZE.0 + 1))]
        {
            assert!(volumes.create(&store, name, size).is_err(), "{name} {size}");
        }
        assert!(volumes.list().unwrap().is_empty());
    }
}
