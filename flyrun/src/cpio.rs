//! An initramfs archive of one file, in the "newc" format of the kernel's Documentation/driver-api/early-userspace/buffer-format.rst.

const TRAILER: &str = "TRAILER!!!";
/// The guest's kernel sizes some of its tables by the pages that its archives leave: whole ones, so that machines with a little more to
/// be told have the same settings, and those from a base snapshot too.
const PAGE: usize = 4096;

/// An archive with one regular file, readable by root only.
pub fn archive_of_one_file(name: &str, contents: &[u8]) -> Vec<u8> {
    let mut archive = Vec::with_capacity(contents.len() + 512);
    entry(&mut archive, name.trim_start_matches('/'), 0o100_400, contents);
    entry(&mut archive, TRAILER, 0, &[]);
    archive.resize(archive.len().next_multiple_of(PAGE), 0);
    archive
}

fn entry(archive: &mut Vec<u8>, name: &str, mode: u32, contents: &[u8]) {
    // ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor, namesize, check
    let fields = [0, mode, 0, 0, 1, 0, contents.len() as u32, 0, 0, 0, 0, name.len() as u32 + 1, 0];
    archive.extend_from_slice(b"070701");
    for field in fields {
        archive.extend_from_slice(format!("{field:08X}").as_bytes());
    }
    archive.extend_from_slice(name.as_bytes());
    archive.push(0);
    pad(archive);
    archive.extend_from_slice(contents);
    pad(archive);
}

fn pad(archive: &mut Vec<u8>) {
    archive.resize(archive.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn gnu_cpio_reads_the_archive() {
        let directory = tempfile::tempdir().unwrap();
        let mut cpio = Command::new("cpio")
            .args(["-i", "--quiet"])
            .current_dir(directory.path())
            .stdin(Stdio::piped())
            .spawn()
            .expect("cpio, from Debian's package cpio");
        cpio.stdin.take().unwrap().write_all(&archive_of_one_file("/flyrun.config", b"hello")).unwrap();
        assert!(cpio.wait().unwrap().success());
        assert_eq!(std::fs::read(directory.path().join("flyrun.config")).unwrap(), b"hello");
    }
}
