//! A copy into a machine: the host's files as a tar.

use std::fs::{File, Metadata};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use protocol::ExitStatus;
use protocol::session::{FromSession, MAX_CHUNK, Request, ToSession};
use tar::{Builder, EntryType, Header, HeaderMode};

use super::Place;
use crate::error::{Context, Error, Result};
use crate::session::window::Window;
use crate::session::{Link, failure, unasked};

/// Copies a file or directory of the host to this place in the machine. Unless `keep_owner`, root owns it there.
///
/// # Errors
/// A file cannot be read, or the machine cannot take it.
pub fn copy_in(link: &Link, source: &Path, follow_link: bool, place: &Place, keep_owner: bool) -> Result<()> {
    let metadata = if follow_link { source.metadata() } else { source.symlink_metadata() };
    let metadata = metadata.context(format!("cannot read {}", source.display()))?;
    transfer(link, &place.directory, |stream| {
        let mut walk = Walk { tar: Builder::new(stream), keep_owner };
        walk.everything(source, metadata, Path::new(place.name.as_deref().unwrap_or_default()))?;
        walk.tar.into_inner().and_then(|stream| stream.flush()).map_err(Halt::Stream)
    })
}

/// Copies what a tar holds to this directory of the machine.
///
/// # Errors
/// The tar cannot be read, or the machine cannot unpack it.
pub fn copy_in_tar(link: &Link, mut source: impl Read, directory: &str) -> Result<()> {
    transfer(link, directory, |stream| {
        let mut buffer = vec![0; MAX_CHUNK];
        loop {
            let count = match source.read(&mut buffer) {
                Ok(0) => return stream.flush().map_err(Halt::Stream),
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(Halt::Source(Error::caused("cannot read standard input", &error))),
            };
            stream.write_all(buffer.get(..count).unwrap_or_default()).map_err(Halt::Stream)?;
        }
    })
}

/// Why the sending side stopped.
enum Halt {
    /// Something of the host's cannot be read: this is what the user is told.
    Source(Error),
    /// The machine takes no more: what it says is what the user is told.
    Stream(io::Error),
}

/// Sends in this thread while another hears what the machine says about it.
fn transfer(
    link: &Link,
    directory: &str,
    send: impl FnOnce(&mut Stream) -> std::result::Result<(), Halt>,
) -> Result<()> {
    link.request(&Request::CopyIn { directory: directory.to_string() })?;
    let window = Arc::new(Window::default());
    let mut stream = Stream { link: link.clone(), window: Arc::clone(&window), chunk: Vec::new() };
    thread::scope(|scope| {
        let heard = scope.spawn(|| {
            let outcome = hear(link, &window);
            window.shut();
            outcome
        });
        let sent = match send(&mut stream) {
            Ok(()) => link.send(&ToSession::StdinEnd).map_err(|error| Halt::Stream(io::Error::other(error))),
            Err(halt) => Err(halt),
        };
        if let Err(Halt::Source(error)) = sent {
            link.close();
            return Err(error);
        }
        heard.join().unwrap_or_else(|_| Err(Error::new("a thread failed")))?;
        match sent {
            Err(Halt::Stream(error)) => Err(Error::caused("the copy was not taken whole", &error)),
            _ => Ok(()),
        }
    })
}

fn hear(link: &Link, window: &Window) -> Result<()> {
    let mut frames = link.frames();
    loop {
        match frames.next().context("lost the machine")? {
            Some(FromSession::Started { .. }) => {}
            Some(FromSession::StdinTaken { bytes }) => window.widen(bytes as usize),
            Some(FromSession::Exited(ExitStatus::Code(0))) => return Ok(()),
            Some(FromSession::Failed { kind, message }) => return Err(failure(kind, message)),
            Some(_) => return Err(unasked()),
            None => return Err(Error::new("the machine ended before the copy was whole")),
        }
    }
}

/// A writer into the machine's input.
struct Stream {
    link: Link,
    window: Arc<Window>,
    chunk: Vec<u8>,
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = bytes.len().min(MAX_CHUNK - self.chunk.len());
        self.chunk.extend_from_slice(bytes.get(..count).unwrap_or_default());
        if self.chunk.len() == MAX_CHUNK {
            self.flush()?;
        }
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        while !self.chunk.is_empty() {
            let room = self.window.wait();
            if room == 0 {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            let rest = self.chunk.split_off(room.min(self.chunk.len()));
            let chunk = std::mem::replace(&mut self.chunk, rest);
            self.window.narrow(chunk.len());
            self.link.send(&ToSession::Stdin(chunk)).map_err(io::Error::other)?;
        }
        Ok(())
    }
}

struct Walk<W: Write> {
    tar: Builder<W>,
    keep_owner: bool,
}

impl<W: Write> Walk<W> {
    /// `name` is the path in the tar; without one, a directory's content stands at the top.
    fn everything(
        &mut self,
        source: &Path,
        metadata: Metadata,
        name: &Path,
    ) -> std::result::Result<(), Halt> {
        let mut waiting: Vec<(PathBuf, Metadata, PathBuf)> =
            vec![(source.to_path_buf(), metadata, name.to_path_buf())];
        while let Some((path, metadata, name)) = waiting.pop() {
            if !name.as_os_str().is_empty() {
                self.entry(&path, &metadata, &name)?;
            }
            if !metadata.is_dir() {
                continue;
            }
            for entry in path.read_dir().map_err(|error| unreadable(&path, &error))? {
                let entry = entry.map_err(|error| unreadable(&path, &error))?;
                let metadata = entry.metadata().map_err(|error| unreadable(&entry.path(), &error))?;
                waiting.push((entry.path(), metadata, name.join(entry.file_name())));
            }
        }
        Ok(())
    }

    fn entry(&mut self, path: &Path, metadata: &Metadata, name: &Path) -> std::result::Result<(), Halt> {
        let mut header = Header::new_gnu();
        header.set_metadata_in_mode(metadata, HeaderMode::Complete);
        if !self.keep_owner {
            header.set_uid(0);
            header.set_gid(0);
        }
        let written = if metadata.is_symlink() {
            header.set_size(0);
            let target = path.read_link().map_err(|error| unreadable(path, &error))?;
            self.tar.append_link(&mut header, name, target)
        } else if metadata.is_dir() {
            header.set_entry_type(EntryType::Directory);
            header.set_size(0);
            self.tar.append_data(&mut header, name, io::empty())
        } else if metadata.is_file() {
            let file = File::open(path).map_err(|error| unreadable(path, &error))?;
            // A file that shrinks meanwhile ends in zeros, as its size is told already.
            let content = file.chain(io::repeat(0)).take(metadata.len());
            self.tar.append_data(&mut header, name, content)
        } else {
            anstream::eprintln!("flyrun: left out {}, which is no file, directory or link", path.display());
            Ok(())
        };
        written.map_err(Halt::Stream)
    }
}

fn unreadable(path: &Path, error: &io::Error) -> Halt {
    Halt::Source(Error::caused(format!("cannot read {}", path.display()), error))
}
