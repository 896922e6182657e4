//! Images that are on this machine already: OCI layouts, archives, the local docker daemon.

use std::{
    fs::{self, File, OpenOptions},
    io::Read,
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::Path,
};

use crate::{Digest, Error, Event, Image, Platform, Progress, Reference, Result, Source, Store};

mod docker;
mod docker_archive;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzzing;
mod layout;
mod tar_index;

use self::{layout::Directory, tar_index::TarIndex};

/// What an import needs to know.
pub(crate) struct Import<'a> {
    pub store: &'a Store,
    /// Canonical name.
    pub name: &'a str,
    pub platform: &'a Platform,
    pub progress: &'a dyn Progress,
}

/// An image that an import found, and the documents on the way to it.
pub(crate) struct Imported {
    pub image: Image,
    pub other_blobs: Vec<Digest>,
}

/// The files of a layout or archive, by their names in it.
pub(crate) trait Files {
    /// A reader of the file and its size; none if there is no such file.
    fn open(&self, name: &str) -> Result<Option<(Box<dyn Read + '_>, u64)>>;

    /// What to call it in messages.
    fn path(&self) -> &Path;

    /// The whole of a small file; none if there is no such file.
    fn read(&self, name: &str, limit: u64) -> Result<Option<Vec<u8>>> {
        let Some((reader, size)) = self.open(name)? else { return Ok(None) };
        if size > limit {
            let what = format!("{name} in {} (bytes)", self.path().display());
            return Err(Error::TooLarge { what, limit, got: size });
        }
        let mut bytes = Vec::new();
        reader.take(limit).read_to_end(&mut bytes).map_err(|error| Error::io("read", self.path(), error))?;
        Ok(Some(bytes))
    }
}

impl Files for TarIndex {
    fn open(&self, name: &str) -> Result<Option<(Box<dyn Read + '_>, u64)>> {
        Ok(self.file(name).map(|(section, size)| (Box::new(section) as Box<dyn Read>, size)))
    }

    fn path(&self) -> &Path {
        self.location()
    }
}

/// The state of a local source. An image whose source says another one is read again. None when it can not be told.
pub(crate) fn stamp(reference: &Reference) -> Option<String> {
    match &reference.source {
        Source::Registry(_) => None,
        Source::OciLayout { path, .. } => file_stamp(&path.join("index.json")),
        Source::OciArchive { path, .. } | Source::DockerArchive { path, .. } | Source::Archive { path } => {
            file_stamp(path)
        }
        Source::DockerDaemon(name) => docker::image_id(name).ok(),
    }
}

fn file_stamp(path: &Path) -> Option<String> {
    let metadata = fs::metadata(path).ok()?;
    let (seconds, nanoseconds) = (metadata.ctime(), metadata.ctime_nsec());
    Some(format!("{}:{}:{seconds}.{nanoseconds:09}", metadata.ino(), metadata.len()))
}

/// Brings an image from a local source into the store and gives it its name.
pub(crate) fn import(
    store: &Store,
    reference: &Reference,
    platform: &Platform,
    progress: &dyn Progress,
) -> Result<Image> {
    let name = reference.canonical_name();
    let _adding = store.lock_for_adding()?;
    let import = Import { store, name: &name, platform, progress };
    progress.event(Event::Resolving { name: &name });
    // Taken before reading: a source that changes meanwhile is read again the next time.
    let stamp = stamp(reference);
    let Imported { image, other_blobs } = match &reference.source {
        Source::OciLayout { path, tag } => layout::import(&import, &Directory::new(path), tag.as_deref())?,
        Source::OciArchive { path, tag } => layout::import(&import, &TarIndex::open(path)?, tag.as_deref())?,
        Source::DockerArchive { path, tag } => {
            docker_archive::import(&import, &TarIndex::open(path)?, tag.as_deref())?
        }
        Source::Archive { path } => import_either(&import, &TarIndex::open(path)?)?,
        Source::DockerDaemon(image) => docker::import(&import, image)?,
        Source::Registry(_) => return Err(Error::NotInStore { name }),
    };
    store.admit(&image, other_blobs, stamp)?;
    Ok(image)
}

/// `docker save` since version 25 writes an archive that is both; its `manifest.json` names exactly what was saved.
fn import_either(import: &Import<'_>, archive: &TarIndex) -> Result<Imported> {
    if archive.file(docker_archive::MANIFEST).is_some() {
        return docker_archive::import(import, archive, None);
    }
    if archive.file(layout::INDEX).is_some() {
        return layout::import(import, archive, None);
    }
    let problem =
        "is neither a docker archive (it has no manifest.json) nor an OCI archive (it has no index.json)";
    Err(Error::Unsupported { what: archive.location().display().to_string(), problem: problem.into() })
}

/// Opens a file that must be a regular one: opening a FIFO would wait for ever.
fn open_regular(path: &Path) -> Result<File> {
    let nonblocking = rustix::fs::OFlags::NONBLOCK.bits() as i32;
    let file = OpenOptions::new().read(true).custom_flags(nonblocking).open(path);
    let file = file.map_err(|error| Error::io("open", path, error))?;
    if file.metadata().map_err(|error| Error::io("stat", path, error))?.is_file() {
        return Ok(file);
    }
    Err(Error::Unsupported { what: path.display().to_string(), problem: "is not a regular file".into() })
}
