//! What to execute: the environment, the candidates of the PATH, and why none of them could be started.

use std::{fs::File, io::Read, path::Path};

use protocol::{FailureKind, RunConfig};
use rustix::io::Errno;

use super::user::User;
use crate::failure::Failure;

const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The environment of the workload: the one it is given, and what every container finds in it.
pub fn environment(given: &[String], config: &RunConfig, user: &User) -> Vec<String> {
    complete(given.to_vec(), user, &config.hostname, config.tty.is_some())
}

/// The environment of a command beside the workload: the workload's configured one with `own` on top.
pub fn environment_beside(
    workload: &[String],
    own: &[String],
    user: &User,
    hostname: &str,
    has_terminal: bool,
) -> Vec<String> {
    let is_own = |entry: &String| variable(own, key_of(entry)).is_some();
    let mut env: Vec<String> = workload.iter().filter(|entry| !is_own(entry)).cloned().collect();
    env.extend_from_slice(own);
    complete(env, user, hostname, has_terminal)
}

fn key_of(entry: &str) -> &str {
    entry.split_once('=').map_or(entry, |(key, _)| key)
}

/// Adds PATH, HOME (when empty, too), HOSTNAME and, with a terminal, TERM when absent, as docker does.
fn complete(mut env: Vec<String>, user: &User, hostname: &str, has_terminal: bool) -> Vec<String> {
    env.retain(|entry| entry != "HOME=");
    let mut default = |name: &str, value: &str| {
        if variable(&env, name).is_none() {
            env.push(format!("{name}={value}"));
        }
    };
    default("PATH", DEFAULT_PATH);
    default("HOME", &user.home);
    if !hostname.is_empty() {
        default("HOSTNAME", hostname);
    }
    if has_terminal {
        default("TERM", "xterm");
    }
    env
}

/// The value of a variable, the last one when it is there twice.
pub fn variable<'a>(env: &'a [String], name: &str) -> Option<&'a str> {
    env.iter().rev().find_map(|entry| entry.strip_prefix(name)?.strip_prefix('='))
}

/// The paths to try in order: the program itself when it has a slash, else one per directory of `path`.
pub fn candidates(program: &str, path: &str) -> Vec<String> {
    if program.contains('/') || program.is_empty() {
        return vec![program.to_owned()];
    }
    let join = |directory: &str| match directory {
        "" => format!("./{program}"),
        directory => format!("{}/{program}", directory.trim_end_matches('/')),
    };
    path.split(':').map(join).collect()
}

/// Why executing `program` failed, when the kernel said `errno` in the end. Looks at the files that were tried.
pub fn diagnose(program: &str, candidates: &[String], workdir: &str, errno: Errno) -> Failure {
    let not_found = |message: String| Failure::new(FailureKind::CommandNotFound, message);
    let not_executable = |message: String| Failure::new(FailureKind::CommandNotExecutable, message);
    let found = candidates.iter().map(|path| Path::new(workdir).join(path)).find(|path| path.exists());
    let Some(path) = found else {
        let message = if program.contains('/') {
            format!("{program}: no such file in the image")
        } else {
            format!("{program}: not found in the image's PATH")
        };
        return not_found(message);
    };
    let shown = path.display();
    if path.is_dir() {
        return not_executable(format!("{shown} is a directory"));
    }
    // What the kernel calls ENOENT here is 127 for docker too.
    match (errno, inspect(&path)) {
        (Errno::NOENT | Errno::NOTDIR, Some(Executable::Script(interpreter))) => {
            not_found(format!("{shown} needs the interpreter {interpreter:?}, which is not in the image"))
        }
        (Errno::NOENT | Errno::NOTDIR, Some(Executable::Elf { loader: Some(loader), .. })) => {
            not_found(format!("{shown} needs the loader {loader:?}, which is not in the image"))
        }
        (Errno::NOEXEC, Some(Executable::Elf { machine, .. })) if !is_native(machine) => {
            not_executable(format!("{shown} is built for {}, this machine is x86-64", machine_name(machine)))
        }
        (Errno::NOEXEC, _) => {
            not_executable(format!("{shown} is neither an x86-64 program nor a script with a #! line"))
        }
        (Errno::ACCESS, _) => not_executable(format!("{shown}: permission denied")),
        (errno, _) => not_executable(format!("{shown}: {errno}")),
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Executable {
    Script(String),
    Elf { machine: u16, loader: Option<String> },
}

fn inspect(path: &Path) -> Option<Executable> {
    let mut head = Vec::new();
    File::open(path).ok()?.take(8192).read_to_end(&mut head).ok()?;
    inspect_head(&head)
}

fn inspect_head(head: &[u8]) -> Option<Executable> {
    if let Some(line) = head.strip_prefix(b"#!") {
        let line = line.split(|byte| *byte == b'\n').next()?;
        let line = String::from_utf8_lossy(line.get(..line.len().min(255))?);
        // The carriage return of a file from Windows belongs to the name, and is then what is wrong with it.
        let name = line.trim_matches([' ', '\t']).split([' ', '\t']).next()?;
        return Some(Executable::Script(name.to_owned()));
    }
    if !head.starts_with(b"\x7fELF") {
        return None;
    }
    let big_endian = head.get(5) == Some(&2);
    let machine = head.get(18..20)?.try_into().ok()?;
    let machine = if big_endian { u16::from_be_bytes(machine) } else { u16::from_le_bytes(machine) };
    let loader = if head.get(4) == Some(&2) && !big_endian { elf64_loader(head) } else { None };
    Some(Executable::Elf { machine, loader })
}

/// The path in PT_INTERP, when it lies within the first bytes of the file, as linkers put it.
fn elf64_loader(head: &[u8]) -> Option<String> {
    const PT_INTERP: u64 = 3;
    let number = |offset: usize, length: usize| -> Option<u64> {
        let bytes = head.get(offset..offset.checked_add(length)?)?;
        Some(bytes.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte)))
    };
    let table = usize::try_from(number(32, 8)?).ok()?;
    let (entry_size, count) = (number(54, 2)? as usize, number(56, 2)? as usize);
    let headers = (0..count.min(64)).filter_map(|index| table.checked_add(index.checked_mul(entry_size)?));
    let interp = headers.into_iter().find(|offset| number(*offset, 4) == Some(PT_INTERP))?;
    let start = usize::try_from(number(interp.checked_add(8)?, 8)?).ok()?;
    let length = usize::try_from(number(interp.checked_add(32)?, 8)?).ok()?.min(4096);
    let bytes = head.get(start..start.checked_add(length)?)?;
    Some(String::from_utf8_lossy(bytes.split(|byte| *byte == 0).next()?).into_owned())
}

/// EM_X86_64 and EM_386.
fn is_native(machine: u16) -> bool {
    matches!(machine, 62 | 3)
}

fn machine_name(machine: u16) -> String {
    match machine {
        183 => "arm64".into(),
        40 => "arm".into(),
        243 => "riscv64".into(),
        21 => "ppc64".into(),
        22 => "s390x".into(),
        8 => "mips".into(),
        258 => "loongarch64".into(),
        other => format!("ELF machine {other}"),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use proptest::prelude::*;
    use protocol::TtySize;

    use super::*;

    fn root() -> User {
        User { uid: 0, gid: 0, groups: vec![], home: "/root".into() }
    }

    #[test]
    fn what_is_missing_in_the_environment_is_added() {
        let config = RunConfig {
            env: vec!["A=1".into()],
            hostname: "web".into(),
            tty: Some(TtySize { rows: 1, cols: 1 }),
            ..RunConfig::default()
        };
        let env = environment(&config.env, &config, &root());
        let path = format!("PATH={DEFAULT_PATH}");
        assert_eq!(env, ["A=1", path.as_str(), "HOME=/root", "HOSTNAME=web", "TERM=xterm"]);
    }

    #[test]
    fn what_is_given_in_the_environment_stays() {
        let given = ["PATH=/x", "HOME=/h", "HOSTNAME=n", "TERM=vt100"].map(String::from).to_vec();
        let config = RunConfig {
            env: given.clone(),
            hostname: "web".into(),
            tty: Some(TtySize { rows: 1, cols: 1 }),
            ..RunConfig::default()
        };
        assert_eq!(environment(&config.env, &config, &root()), given);
    }

    #[test]
    fn a_command_beside_the_workload_has_its_environment_with_the_own_on_top() {
        let workload = ["A=1", "B=2", "PATH=/x"].map(String::from);
        let own = ["B=3", "C="].map(String::from);
        let env = environment_beside(&workload, &own, &root(), "web", true);
        assert_eq!(env, ["A=1", "PATH=/x", "B=3", "C=", "HOME=/root", "HOSTNAME=web", "TERM=xterm"]);
    }

    #[test]
    fn an_empty_home_is_filled_in() {
        let config = RunConfig { env: vec!["HOME=".into(), "PATH=".into()], ..RunConfig::default() };
        assert_eq!(environment(&config.env, &config, &root()), ["PATH=", "HOME=/root"]);
    }

    #[test]
    fn a_program_with_a_slash_is_not_looked_up() {
        assert_eq!(candidates("./run", "/bin"), ["./run"]);
        assert_eq!(candidates("/bin/sh", "/bin"), ["/bin/sh"]);
    }

    #[test]
    fn a_program_is_looked_up_in_the_order_of_the_path() {
        assert_eq!(candidates("sh", "/usr/bin:/bin/"), ["/usr/bin/sh", "/bin/sh"]);
        assert_eq!(candidates("sh", ":/bin"), ["./sh", "/bin/sh"]);
    }

    fn failure(name: &str, content: Option<&[u8]>, mode: u32, errno: Errno) -> Failure {
        let directory = tempfile::tempdir().unwrap();
        if let Some(content) = content {
            let path = directory.path().join(name);
            std::fs::write(&path, content).unwrap();
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
        }
        let bin = directory.path().to_str().unwrap();
        diagnose(name, &candidates(name, &format!("/nonexistent:{bin}")), "/", errno)
    }

    #[test]
    fn a_missing_program_is_not_found() {
        let failure = failure("prog", None, 0, Errno::NOENT);
        assert_eq!(failure.kind, FailureKind::CommandNotFound);
        assert_eq!(failure.message, "prog: not found in the image's PATH");
    }

    #[test]
    fn a_missing_interpreter_is_named() {
        let failure = failure("prog", Some(b"#! /opt/py -u\nx"), 0o755, Errno::NOENT);
        assert_eq!(failure.kind, FailureKind::CommandNotFound);
        assert!(failure.message.contains("\"/opt/py\""), "{failure}");
    }

    #[test]
    fn the_carriage_return_of_a_windows_script_is_shown() {
        let failure = failure("prog", Some(b"#!/bin/sh\r\nx"), 0o755, Errno::NOENT);
        assert!(failure.message.contains(r#""/bin/sh\r""#), "{failure}");
    }

    #[test]
    fn a_missing_loader_is_named() {
        let mut elf = vec![0; 256];
        elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
        elf[18] = 62;
        elf[32] = 64;
        elf[54] = 56;
        elf[56] = 1;
        elf[64] = 3;
        elf[72] = 128;
        elf[96] = 9;
        elf[128..137].copy_from_slice(b"/ld-x.so\0");
        let failure = failure("prog", Some(&elf), 0o755, Errno::NOENT);
        assert_eq!(failure.kind, FailureKind::CommandNotFound);
        assert!(failure.message.contains("\"/ld-x.so\""), "{failure}");
    }

    #[test]
    fn a_program_for_another_machine_is_named() {
        let mut elf = vec![0; 64];
        elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
        elf[18] = 183;
        let failure = failure("prog", Some(&elf), 0o755, Errno::NOEXEC);
        assert!(failure.message.contains("arm64"), "{failure}");
    }

    #[test]
    fn other_refusals_are_not_executable() {
        for (content, mode, errno, word) in [
            (&b"text"[..], 0o755, Errno::NOEXEC, "#! line"),
            (b"text", 0o644, Errno::ACCESS, "permission denied"),
            (b"", 0o755, Errno::TXTBSY, "busy"),
        ] {
            let failure = failure("prog", Some(content), mode, errno);
            assert_eq!(failure.kind, FailureKind::CommandNotExecutable);
            assert!(failure.message.contains(word), "{failure}");
        }
        let directory = diagnose("/etc", &["/etc".into()], "/", Errno::ACCESS);
        assert!(directory.message.contains("is a directory"));
    }

    proptest! {
        #[test]
        fn no_file_makes_the_inspection_panic(
            mut head in proptest::collection::vec(any::<u8>(), 0..300), elf in any::<bool>()
        ) {
            if elf && head.len() > 6 {
                head[..6].copy_from_slice(b"\x7fELF\x02\x01");
            }
            inspect_head(&head);
        }
    }
}
