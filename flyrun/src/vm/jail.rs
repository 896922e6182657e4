//! The jail of a machine's flyrun-vmm, as its monitor makes it: who it is, where it is locked up, and what it is lent there.
//! What the jail is made of tells `vmm::jail`.

use std::fs::{self, File};
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;

use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, OFlags, RawDir, Uid, chownat, fchown, openat, statat, unlinkat,
};
use rustix::io::Errno;
use rustix::mount::{OpenTreeFlags, open_tree};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use vmm::jail::{
    spare,
    uids::{Claim, Range},
};
use vmm::snapshot::{MEMORY, WORKING_SET};

use crate::error::{Context, Error, Result};
use crate::paths::{Paths, RunDir};
use crate::share::is_root;

/// `off` runs flyrun-vmm with all the rights of whoever starts it.
pub const SWITCH: &str = "FLYRUN_JAIL";
const OFF: &str = "off";
/// The user ids that machines have, `FIRST-LAST`.
pub const UIDS: &str = "FLYRUN_UIDS";

/// Whether machines are jailed; without a word they are.
///
/// # Errors
/// FLYRUN_JAIL says neither.
pub fn is_on() -> Result<bool> {
    match std::env::var(SWITCH).as_deref() {
        Err(_) | Ok("" | "on") => Ok(true),
        Ok(OFF) => Ok(false),
        Ok(other) => Err(Error::new(format!("{SWITCH} is {other:?}, which is neither on nor off"))),
    }
}

/// The user ids that machines have.
///
/// # Errors
/// FLYRUN_UIDS is no range.
pub fn uids() -> Result<Range> {
    match std::env::var(UIDS) {
        Ok(text) => text.parse().map_err(|told| Error::new(format!("{UIDS}: {told}"))),
        Err(_) => Ok(Range::default()),
    }
}

/// Makes for the next machine what takes long. Without it, that makes its own.
pub fn leave_spare() {
    if is_root() && is_on().unwrap_or(false) {
        let _ = spare::leave();
    }
}

/// The jail of one machine.
#[derive(Debug)]
pub struct Jail {
    /// The machine's number as a user; `None` without root.
    claim: Option<Claim>,
}

impl Jail {
    /// That of the machine whose sockets are in this directory, unless machines are not jailed.
    ///
    /// # Errors
    /// All numbers are taken.
    pub fn prepare(run_dir: &RunDir) -> Result<Option<Jail>> {
        if !is_on()? {
            eprintln!(
                "flyrun: warning: {SWITCH}=off: flyrun-vmm is not jailed; whoever breaks out of the guest has this host"
            );
            return Ok(None);
        }
        let name = run_dir.path().file_name().unwrap_or_default().to_string_lossy();
        let claim = is_root().then(|| Claim::take(uids()?, &name).context("flyrun-vmm gets no user id"));
        Ok(Some(Jail { claim: claim.transpose()? }))
    }

    /// Has flyrun-vmm go there.
    pub fn apply(&self, command: &mut Command, run_dir: &RunDir) {
        command.arg("--jail").arg(run_dir.sockets());
        if let Some(claim) = &self.claim {
            command.arg("--uid").arg(claim.uid().to_string());
        }
    }

    /// Whether flyrun-vmm can be number 1 of its own process ids.
    pub fn has_own_pids(&self) -> bool {
        self.claim.is_some()
    }

    /// Opens the directory for flyrun-vmm to write a snapshot to: as a mount of it alone, from which `..` leads nowhere. To be taken
    /// back with [`take_back`].
    ///
    /// # Errors
    /// The system's.
    pub fn lend(&self, directory: &Path) -> Result<OwnedFd> {
        let told = || format!("cannot lend {} to flyrun-vmm", directory.display());
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let Some(claim) = &self.claim else {
            // Without root, flyrun-vmm is the same user.
            return openat(CWD, directory, flags, Mode::empty()).context(told());
        };
        let alone = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let tree = open_tree(CWD, directory, alone | OpenTreeFlags::AT_SYMLINK_NOFOLLOW).context(told())?;
        let open = openat(&tree, ".", flags, Mode::empty()).context(told())?;
        // Also what an earlier machine with another number, or one of another flyrun, has left.
        own_all(&open).context(told())?;
        let owner = (Some(Uid::from_raw(claim.uid())), Some(Gid::from_raw(claim.uid())));
        // What has other links belongs to other machines too, and is not written.
        match statat(&open, MEMORY, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(found) if found.st_nlink == 1 => {
                chownat(&open, MEMORY, owner.0, owner.1, AtFlags::SYMLINK_NOFOLLOW).context(told())?;
            }
            _ => {}
        }
        fchown(&open, owner.0, owner.1).context(told())?;
        Ok(open)
    }
}

/// Goes to a jail and comes back with what that was like.
///
/// # Errors
/// Which part of it this host does not grant.
pub fn check(vmm: &Path, paths: &Paths) -> Result<String> {
    let run_dir = paths.make_run_dir(&format!("doctor-{}", std::process::id()))?;
    let Some(jail) = Jail::prepare(&run_dir)? else { return Ok(format!("{SWITCH} is {OFF}")) };
    let mut command = Command::new(vmm);
    command.arg("--probe").stdin(std::process::Stdio::null());
    jail.apply(&mut command, &run_dir);
    let try_it = || {
        if jail.has_own_pids() {
            vmm::jail::ask_for_own_pids()?;
        }
        command.output()
    };
    // The thread's own property.
    let output = std::thread::scope(|scope| scope.spawn(try_it).join());
    let output = output.unwrap_or_else(|_| Err(std::io::ErrorKind::Other.into()));
    let output = output.context(format!("cannot start {}", vmm.display()))?;
    if !output.status.success() {
        let told = String::from_utf8_lossy(&output.stderr).trim().replace(char::is_control, " ");
        return Err(Error::new(told.trim_start_matches("flyrun-vmm: ").to_string()));
    }
    Ok(match &jail.claim {
        Some(_) => format!("machines are locked up, as users {}", uids()?),
        None => {
            "machines are locked up in a user namespace; only root can give each a user of its own".into()
        }
    })
}

/// Makes a lent directory and all in it the own of whoever runs this, and leaves nothing there but plain files: who follows a name
/// in it later is led nowhere else.
///
/// # Errors
/// The system's.
pub fn take_back(directory: &Path) -> Result<()> {
    let told = || format!("cannot take {} back from flyrun-vmm", directory.display());
    if !is_root() {
        return Ok(());
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let open = openat(CWD, directory, flags, Mode::empty()).context(told())?;
    fchown(&open, Some(Uid::ROOT), Some(Gid::ROOT)).context(told())?;
    own_all(&open).context(told())
}

fn own_all(directory: &OwnedFd) -> std::result::Result<(), Errno> {
    let mut space = [MaybeUninit::uninit(); 2048];
    let again = openat(directory, ".", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    let mut entries = RawDir::new(again, &mut space);
    while let Some(entry) = entries.next() {
        let entry = entry?;
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        let found = match statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(found) => found,
            Err(Errno::NOENT) => continue,
            Err(error) => return Err(error),
        };
        match FileType::from_raw_mode(found.st_mode) {
            FileType::RegularFile if found.st_uid == 0 && found.st_gid == 0 => {}
            FileType::RegularFile => {
                chownat(directory, name, Some(Uid::ROOT), Some(Gid::ROOT), AtFlags::SYMLINK_NOFOLLOW)?;
            }
            // Nobody looks into it, and it goes with the machine.
            FileType::Directory => {
                chownat(directory, name, Some(Uid::ROOT), None, AtFlags::SYMLINK_NOFOLLOW)?
            }
            _ => unlinkat(directory, name, AtFlags::empty())?,
        }
    }
    Ok(())
}

/// Sends a line with a descriptor.
///
/// # Errors
/// The system's, and that not all was taken.
pub fn send_with(stream: &UnixStream, line: &str, given: impl AsFd) -> std::io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut beside = SendAncillaryBuffer::new(&mut space);
    let rights = [given.as_fd()];
    if !beside.push(SendAncillaryMessage::ScmRights(&rights)) {
        return Err(std::io::ErrorKind::OutOfMemory.into());
    }
    let sent = sendmsg(stream, &[IoSlice::new(line.as_bytes())], &mut beside, SendFlags::NOSIGNAL)?;
    if sent == line.len() { Ok(()) } else { Err(std::io::ErrorKind::WriteZero.into()) }
}

/// A working set that flyrun-vmm writes, before it has its place.
#[derive(Debug)]
pub struct Draft<'a> {
    snapshot: &'a Path,
    path: std::path::PathBuf,
    pub file: File,
}

impl<'a> Draft<'a> {
    /// An empty one, beside the snapshot in that directory.
    ///
    /// # Errors
    /// The system's.
    pub fn new(snapshot: &'a Path) -> Result<Draft<'a>> {
        use std::os::unix::fs::OpenOptionsExt;
        let path = snapshot.join(format!("{WORKING_SET}.new{}", std::process::id()));
        let mut options = File::options();
        let file = options.write(true).create(true).truncate(true).mode(0o600).open(&path);
        Ok(Draft { snapshot, file: file.context(format!("cannot write {}", path.display()))?, path })
    }

    /// Does what flyrun-vmm has answered.
    ///
    /// # Errors
    /// The system's.
    pub fn settle(self, answer: &str) -> Result<()> {
        let place = self.snapshot.join(WORKING_SET);
        match answer {
            "written" => fs::rename(&self.path, &place),
            "outdated" => fs::remove_file(&place),
            _ => Ok(()),
        }
        .context(format!("cannot write {}", place.display()))
    }
}

impl Drop for Draft<'_> {
    fn drop(&mut self) {
        // Most often it has got its place.
        let _ = fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_working_set_takes_its_place_is_forgotten_or_leaves_all_as_it_was() {
        let directory = tempfile::tempdir().unwrap();
        let place = directory.path().join(WORKING_SET);
        let settle = |answer: &str| {
            let mut draft = Draft::new(directory.path()).unwrap();
            std::io::Write::write_all(&mut draft.file, answer.as_bytes()).unwrap();
            draft.settle(answer).unwrap();
            assert!(fs::read_dir(directory.path()).unwrap().count() <= 1);
        };
        settle("");
        assert!(!place.exists());
        settle("written");
        settle("");
        assert_eq!(fs::read_to_string(&place).unwrap(), "written");
        settle("outdated");
        assert!(!place.exists());
    }

    #[test]
    fn nothing_but_plain_files_is_left_in_a_directory_that_was_lent() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name| directory.path().join(name);
        fs::write(path("state"), "x").unwrap();
        symlink("/etc/passwd", path("memory")).unwrap();
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        let open = openat(CWD, directory.path(), flags, Mode::empty()).unwrap();
        if is_root() {
            own_all(&open).unwrap();
            assert!(path("state").exists() && path("memory").symlink_metadata().is_err());
        }
    }
}
