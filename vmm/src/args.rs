//! The command line of `flyrun-vmm`. Plain parsing: the process starts with every machine, and has few options.

use std::path::PathBuf;

use crate::jail::Jail;
use crate::spec::{ConsoleSpec, DiskSpec, NetBackend, NetSpec, ShareSpec, VmSpec, VsockSpec, default_mtu};

/// The text of `--help`.
pub const HELP: &str = "\
flyrun-vmm: runs one KVM microVM and is that machine until it ends.

Usage: flyrun-vmm --spec FILE|- [--trace FILE] [--owner PID] [--cgroup DIR] [--control]
       flyrun-vmm --kernel FILE [OPTIONS] [--trace FILE] [--owner PID] [--cgroup DIR] [--control]
       flyrun-vmm --restore DIR [--spec FILE|-] [--text DIR] [--paused] [--verify] [--trace FILE] [--owner PID] [--cgroup DIR] [--control]
       flyrun-vmm --inspect DIR [--verify]
       flyrun-vmm --probe [--json]
       flyrun-vmm seccomp [--json]
       flyrun-vmm --probe --jail DIR [--uid N]

  --spec FILE        the whole machine as JSON (`VmSpec`), `-` for standard input
  --kernel FILE      an uncompressed vmlinux (ELF) or a bzImage
  --initrd FILE      initramfs; repeatable, the files follow one another
  --disk FILE[,ro]   a raw disk, /dev/vda first; `ro`: the guest may only read; repeatable
  --cpus N           vCPUs, 1 to 32 (default 1)
  --memory MIB       guest memory (default 128)
  --console WHERE    `stdio` (default), `off`, or a file that the output is added to
  --append WORDS     words added to the kernel's command line
  --net TAP,MAC[,BACKEND]
                     a network card on this TAP interface; BACKEND: auto (default), vhost, user; repeatable
  --vsock SOCKET     a vsock device with guest CID 3, mapped to unix sockets at this path
  --share TAG,SOCKET
                     a directory of the host, served by the virtiofsd that listens on this socket; repeatable
  --balloon          memory that the guest frees goes back to the host
  --trace FILE       add a line for each step of the start: CLOCK_MONOTONIC in µs, and the step
  --probe            say whether this host's KVM can run a guest kernel, by running a tiny one; --json: for programs
  --owner PID        end when this process, the parent of flyrun-vmm, ends
  --cgroup DIR       move into this cgroup first, so that all that is done for the machine counts there
  --jail DIR         before anything is read of what a kernel, a snapshot or a guest has written: go into namespaces of its own, in
                     which this directory, that of --vsock and alone in the one above it, is the root and cannot be written to, give up
                     all capabilities and keep nothing but what is open; with --probe: do that and no more
  --uid N            with --jail, for root: become this user and group, which no other process is
  --control          take requests on standard input, a stream socket: `pause`, `resume`, `snapshot DIR`,
                     `checked-snapshot DIR`, `base-snapshot DIR`, `working-set DIR`, a line each, answered by `ok` or
                     `error REASON`. A snapshot, of a paused machine, is answered by `ok` and JSON; a `resume` that comes
                     meanwhile gives it up
  --restore DIR      go on with the machine whose snapshot is in DIR; --spec gives the files and interfaces of this life,
                     the number and kind of everything is as it was. Without --spec the snapshot says which files of the
                     host are opened: only for one of your own
  --text DIR         with --restore: files of the text of kernels, each named by its SHA-256; the snapshot's is mapped from there, and
                     so in the host's memory once for all machines
  --paused           with --restore: no instruction runs before a `resume`
  --inspect DIR      print what a snapshot is of, as JSON
  --verify           with --restore or --inspect: read all of the snapshot, and compare its memory with the checksum that a
                     `checked-snapshot` has made
  --no-seccomp       for debugging: threads may make any system call
  seccomp            print which system calls each thread may make, with what arguments and why; --json: for programs
  --help, --version

Exit code: 0 the guest reset its machine, 1 the machine could not be set up, 2 wrong usage, 3 no usable KVM,
4 triple fault, 5 kernel panic, 6 KVM internal error, 7 SIGTERM or SIGINT, 8 the host's disk failed, 9 the snapshot
cannot be resumed here: missing, truncated, corrupted, too-new, other-cpu, other-kernel, changed-disk, other-machine, host,
10 a thread made a system call that its seccomp filter does not allow.
";

/// What was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Print [`HELP`].
    Help,
    /// Print the version.
    Version,
    /// Find out whether KVM can run a guest kernel.
    Probe {
        /// Whether to print the verdict as JSON.
        json: bool,
    },
    /// Print what the threads may ask of the host.
    Seccomp {
        /// Whether to print it as JSON.
        json: bool,
    },
    /// Say what a snapshot is of.
    Inspect {
        /// Its directory.
        dir: PathBuf,
        /// Whether all of it is read.
        verify: bool,
    },
    /// Find out whether this host grants a jail.
    TryJail(Jail),
    /// Run a machine.
    Run(Box<Run>),
}

/// How a machine is to be run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// Where its spec comes from.
    pub machine: Machine,
    /// What the process is to do beside.
    pub process: Process,
}

/// What the process of a machine is to do beside running it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Process {
    /// Where the steps' times go.
    pub trace: Option<PathBuf>,
    /// The parent process, with which the machine ends.
    pub owner: Option<u32>,
    /// The cgroup to move into.
    pub cgroup: Option<PathBuf>,
    /// Whether requests come on standard input.
    pub control: bool,
    /// Whether the threads are not filtered.
    pub no_seccomp: bool,
    /// Where the process goes before it reads what a stranger wrote.
    pub jail: Option<Jail>,
}

/// Where the spec of a machine comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Machine {
    /// JSON in this file; `-` is standard input.
    File(PathBuf),
    /// The options themselves.
    Options(Box<VmSpec>),
    /// A snapshot.
    Snapshot {
        /// Its directory.
        dir: PathBuf,
        /// Where the spec of the new life comes from; without one it is that of the old.
        spec: Option<PathBuf>,
        /// The directory of kernels' text.
        text: Option<PathBuf>,
        /// Whether it waits for a `resume`.
        paused: bool,
        /// Whether its memory is compared with the checksum first.
        verify: bool,
    },
}

/// Reads the arguments that follow the program's name.
///
/// # Errors
/// One line that says which argument is wrong and what is possible.
pub fn parse(arguments: impl IntoIterator<Item = String>) -> Result<Command, String> {
    let mut arguments = arguments.into_iter().peekable();
    if arguments.next_if(|first| first == "seccomp").is_some() {
        return seccomp(&mut arguments);
    }
    let mut spec_file = None;
    let mut process = Process::default();
    let mut options = Options::default();
    let (mut probe, mut json, mut paused, mut verify) = (false, false, false, false);
    let (mut restore, mut text, mut inspect, mut jail, mut uid) = (None, None, None, None, None);
    while let Some(name) = arguments.next() {
        match name.as_str() {
            "--help" | "-h" => return Ok(Command::Help),
            "--version" | "-V" => return Ok(Command::Version),
            "--probe" => {
                probe = true;
                continue;
            }
            "--json" => {
                json = true;
                continue;
            }
            "--control" => {
                process.control = true;
                continue;
            }
            "--no-seccomp" => {
                process.no_seccomp = true;
                continue;
            }
            "--paused" => {
                paused = true;
                continue;
            }
            "--verify" => {
                verify = true;
                continue;
            }
            "--balloon" => {
                options.balloon = true;
                options.given = Some(name);
                continue;
            }
            _ => {}
        }
        let (name, value) = match name.split_once('=') {
            Some((name, value)) => (name.to_owned(), Some(value.to_owned())),
            None => (name, None),
        };
        let mut value = || {
            value
                .clone()
                .or_else(|| arguments.next())
                .ok_or_else(|| format!("{name} wants a value; see --help"))
        };
        match name.as_str() {
            "--spec" => spec_file = Some(PathBuf::from(value()?)),
            "--restore" => restore = Some(PathBuf::from(value()?)),
            "--text" => text = Some(PathBuf::from(value()?)),
            "--inspect" => inspect = Some(PathBuf::from(value()?)),
            "--trace" => process.trace = Some(PathBuf::from(value()?)),
            "--cgroup" => process.cgroup = Some(PathBuf::from(value()?)),
            "--jail" => jail = Some(PathBuf::from(value()?)),
            "--uid" => uid = Some(number("--uid", &value()?)?),
            "--owner" => process.owner = Some(number("--owner", &value()?)?),
            _ => options.take(&name, &mut value)?,
        }
    }
    process.jail = match (jail, uid) {
        (Some(root), uid) => Some(Jail { root, uid }),
        (None, Some(_)) => return Err("--uid belongs to --jail; see --help".to_owned()),
        (None, None) => None,
    };
    if probe && let Some(jail) = process.jail {
        return Ok(Command::TryJail(jail));
    }
    let for_run = process != Process::default() || restore.is_some() || text.is_some() || paused;
    let for_run = for_run || spec_file.is_some() || options.given.is_some();
    if let Some(dir) = inspect {
        return match probe || json || for_run {
            true => Err("--inspect takes no other option than --verify; see --help".to_owned()),
            false => Ok(Command::Inspect { dir, verify }),
        };
    }
    match (probe, json, for_run) {
        (true, json, false) => return Ok(Command::Probe { json }),
        (true, _, true) => return Err("--probe takes no other option than --json; see --help".to_owned()),
        (false, true, _) => return Err("--json belongs to --probe; see --help".to_owned()),
        (false, false, _) => {}
    }
    let machine = match (restore, spec_file, options.given.take()) {
        (Some(_), _, Some(option)) => {
            return Err(format!("{option} and --restore exclude each other; see --help"));
        }
        (Some(_), None, None) if process.jail.is_some() => {
            return Err("--restore with --jail wants --spec; see --help".to_owned());
        }
        (Some(dir), spec, None) => Machine::Snapshot { dir, spec, text, paused, verify },
        (None, ..) if paused || verify || text.is_some() => {
            return Err("--text, --paused and --verify belong to --restore; see --help".to_owned());
        }
        (None, Some(_), Some(option)) => {
            return Err(format!("{option} and --spec exclude each other; see --help"));
        }
        (None, Some(file), None) => Machine::File(file),
        (None, None, _) => Machine::Options(Box::new(options.spec()?)),
    };
    Ok(Command::Run(Box::new(Run { machine, process })))
}

fn seccomp(rest: &mut dyn Iterator<Item = String>) -> Result<Command, String> {
    let rest: Vec<_> = rest.collect();
    match rest.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        [] => Ok(Command::Seccomp { json: false }),
        ["--json"] => Ok(Command::Seccomp { json: true }),
        _ => Err("seccomp takes no other option than --json; see --help".to_owned()),
    }
}

#[derive(Default)]
struct Options {
    /// One of the options that were given.
    given: Option<String>,
    kernel: Option<PathBuf>,
    initrd: Vec<PathBuf>,
    disks: Vec<DiskSpec>,
    cpus: Option<u8>,
    memory_mib: Option<u32>,
    console: Option<ConsoleSpec>,
    append: String,
    nets: Vec<NetSpec>,
    vsock: Option<VsockSpec>,
    shares: Vec<ShareSpec>,
    balloon: bool,
}

impl Options {
    fn take(&mut self, name: &str, value: &mut dyn FnMut() -> Result<String, String>) -> Result<(), String> {
        match name {
            "--kernel" => self.kernel = Some(value()?.into()),
            "--initrd" => self.initrd.push(value()?.into()),
            "--disk" => self.disks.push(disk(&value()?)),
            "--cpus" => self.cpus = Some(number(name, &value()?)?),
            "--memory" => self.memory_mib = Some(number(name, &value()?)?),
            "--console" => {
                self.console = Some(match value()?.as_str() {
                    "stdio" => ConsoleSpec::Stdio,
                    "off" => ConsoleSpec::Off,
                    file => ConsoleSpec::File(file.into()),
                });
            }
            "--append" => {
                self.append.push_str(&value()?);
                self.append.push(' ');
            }
            "--net" => self.nets.push(net(&value()?)?),
            "--vsock" => self.vsock = Some(VsockSpec { guest_cid: 3, socket: value()?.into() }),
            "--share" => self.shares.push(share(&value()?)?),
            _ => return Err(format!("unknown argument {name:?}; see --help")),
        }
        self.given = Some(name.to_owned());
        Ok(())
    }

    fn spec(self) -> Result<VmSpec, String> {
        Ok(VmSpec {
            cpus: self.cpus.unwrap_or(1),
            memory_mib: self.memory_mib.unwrap_or(128),
            kernel: self.kernel.ok_or("--kernel FILE or --spec FILE is missing; see --help")?,
            initrd: self.initrd,
            command_line: self.append.trim_end().to_owned(),
            disks: self.disks,
            nets: self.nets,
            vsock: self.vsock,
            shares: self.shares,
            console: self.console.unwrap_or(ConsoleSpec::Stdio),
            balloon: self.balloon,
        })
    }
}

fn disk(value: &str) -> DiskSpec {
    match value.strip_suffix(",ro") {
        Some(file) => DiskSpec { files: vec![file.into()], read_only: true, rate: None },
        None => DiskSpec { files: vec![value.into()], read_only: false, rate: None },
    }
}

fn net(value: &str) -> Result<NetSpec, String> {
    let mut parts = value.splitn(3, ',');
    let (tap, mac, backend) = (parts.next(), parts.next(), parts.next());
    let (Some(tap), Some(mac)) = (tap, mac.and_then(mac_address)) else {
        return Err(format!("--net wants TAP,MAC[,BACKEND], such as tap0,02:00:00:00:00:01, not {value:?}"));
    };
    let backend =
        backend.map_or(Ok(NetBackend::Auto), str::parse).map_err(|told| format!("--net: {told}"))?;
    Ok(NetSpec { tap: tap.to_owned(), mac, mtu: default_mtu(), backend, queue_pairs: 1, rate: None })
}

fn share(value: &str) -> Result<ShareSpec, String> {
    let (tag, socket) =
        value.split_once(',').ok_or_else(|| format!("--share wants TAG,SOCKET, not {value:?}"))?;
    Ok(ShareSpec { tag: tag.to_owned(), socket: socket.into() })
}

/// Six pairs of hexadecimal digits.
fn mac_address(text: &str) -> Option<[u8; 6]> {
    let mut parts = text.split(':');
    let mut mac = [0; 6];
    for byte in &mut mac {
        let pair = parts.next().filter(|pair| pair.len() == 2)?;
        *byte = u8::from_str_radix(pair, 16).ok()?;
    }
    parts.next().is_none().then_some(mac)
}

fn number<T: std::str::FromStr>(name: &str, value: &str) -> Result<T, String> {
    value.parse().map_err(|_| format!("{name} wants a number that fits, not {value:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_words(line: &str) -> Result<Command, String> {
        parse(line.split_whitespace().map(str::to_owned))
    }

    fn spec(line: &str) -> VmSpec {
        match parse_words(line).unwrap() {
            Command::Run(run) => match run.machine {
                Machine::Options(spec) => *spec,
                file => panic!("{file:?}"),
            },
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn options_make_a_spec() {
        let spec = spec(
            "--kernel k --initrd a --initrd=b --disk d --disk e,ro --cpus 4 --memory=512 --console off --append x=1 \
             --append y --vsock s --balloon",
        );
        assert!(spec.balloon);
        assert_eq!((spec.cpus, spec.memory_mib, spec.initrd.len()), (4, 512, 2));
        assert_eq!(spec.disks.iter().map(|d| d.read_only).collect::<Vec<_>>(), [false, true]);
        assert_eq!(spec.command_line, "x=1 y");
        assert_eq!((spec.console, spec.vsock.unwrap().guest_cid), (ConsoleSpec::Off, 3));
    }

    #[test]
    fn a_network_card_has_an_interface_an_address_and_a_backend() {
        let nets = spec("--kernel k --net tap0,02:00:00:00:00:0f --net=tap1,02:ab:00:00:00:00,user").nets;
        assert_eq!((nets[0].tap.as_str(), nets[0].mac[5], nets[0].backend), ("tap0", 15, NetBackend::Auto));
        assert_eq!((nets[1].mac[1], nets[1].backend, nets[1].mtu), (0xab, NetBackend::User, 1500));
        for bad in
            ["tap0", "tap0,02:00", "tap0,02:00:00:00:00:00:00", "tap0,2:0:0:0:0:0", "t,02:00:00:00:00:00,x"]
        {
            assert!(parse_words(&format!("--kernel k --net {bad}")).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_share_has_a_tag_and_a_socket() {
        let shares = spec("--kernel k --share fs0,/run/fs0 --share=fs1,a,b").shares;
        assert_eq!((shares[0].tag.as_str(), shares[1].socket.to_str()), ("fs0", Some("a,b")));
        assert!(parse_words("--kernel k --share fs0").is_err());
    }

    #[test]
    fn a_spec_file_is_taken_with_a_trace() {
        let run = parse_words("--trace t --owner 7 --control --no-seccomp --spec -").unwrap();
        let process = Process {
            trace: Some("t".into()),
            owner: Some(7),
            control: true,
            no_seccomp: true,
            ..Process::default()
        };
        assert_eq!(run, Command::Run(Box::new(Run { machine: Machine::File("-".into()), process })));
    }

    #[test]
    fn a_snapshot_is_restored_with_or_without_a_spec_and_inspected_alone() {
        let machine = |line| match parse_words(line).unwrap() {
            Command::Run(run) => run.machine,
            other => panic!("{other:?}"),
        };
        let dir = PathBuf::from("d");
        assert_eq!(
            machine("--restore d"),
            Machine::Snapshot { dir: dir.clone(), spec: None, text: None, paused: false, verify: false }
        );
        assert_eq!(
            machine("--restore=d --text t --paused --spec s --control --verify"),
            Machine::Snapshot {
                dir: dir.clone(),
                spec: Some("s".into()),
                text: Some("t".into()),
                paused: true,
                verify: true
            }
        );
        assert_eq!(parse_words("--inspect d --verify"), Ok(Command::Inspect { dir, verify: true }));
        for line in [
            "--restore d --cpus 1",
            "--paused --spec s",
            "--verify --kernel k",
            "--text t --kernel k",
            "--inspect d --paused",
            "--inspect d --restore d",
        ] {
            assert!(parse_words(line).is_err(), "{line}");
        }
    }

    #[test]
    fn a_jail_has_a_root_and_perhaps_a_user_and_a_snapshot_in_it_has_a_spec() {
        let jail = |line| match parse_words(line).unwrap() {
            Command::Run(run) => run.process.jail.unwrap(),
            Command::TryJail(jail) => jail,
            other => panic!("{other:?}"),
        };
        let root = PathBuf::from("/r");
        assert_eq!(jail("--spec s --jail /r --uid 7"), Jail { root: root.clone(), uid: Some(7) });
        assert_eq!(jail("--probe --jail=/r"), Jail { root, uid: None });
        for line in ["--spec s --uid 7", "--restore d --jail /r", "--spec s --jail /r --uid x"] {
            assert!(parse_words(line).is_err(), "{line}");
        }
    }

    #[test]
    fn a_probe_is_alone() {
        assert_eq!(parse_words("--probe"), Ok(Command::Probe { json: false }));
        assert_eq!(parse_words("--json --probe"), Ok(Command::Probe { json: true }));
        for line in ["--probe --kernel k", "--json", "--probe --trace t", "--json --kernel k"] {
            assert!(parse_words(line).is_err(), "{line}");
        }
    }

    #[test]
    fn mistakes_are_named() {
        for (line, word) in [
            ("", "--kernel"),
            ("--kernel", "--kernel"),
            ("--kernel k --cpus 300", "300"),
            ("--kernel k --frob", "--frob"),
            ("--spec s --cpus 1", "--cpus"),
        ] {
            let error = parse_words(line).unwrap_err();
            assert!(error.contains(word), "{line}: {error}");
        }
    }

    #[test]
    fn help_names_every_option() {
        for option in [
            "--spec",
            "--kernel",
            "--initrd",
            "--disk",
            "--cpus",
            "--memory",
            "--console",
            "--append",
            "--net",
            "--vsock",
            "--share",
            "--trace",
            "--restore",
            "--paused",
            "--inspect",
            "--verify",
            "--jail",
            "--uid",
            "--no-seccomp",
        ] {
            assert!(HELP.contains(option), "{option}");
        }
    }
}
