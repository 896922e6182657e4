//! What somebody who has taken over flyrun-vmm finds: goes to the jail as flyrun-vmm does, tries whatever may lead out of it, and
//! prints as JSON what came of each. Not a part of flyrun; tests/e2e/jail.rs judges.
//!
//! Usage: jail-probe ROOT UID LENT-DIRECTORY-FD HOST-PID HOST-TCP-PORT HOST-ABSTRACT-SOCKET
#![allow(clippy::unwrap_used, clippy::panic, reason = "a probe that cannot go on panics")]

use std::fs::File;
use std::io;
use std::net::TcpStream;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::Path;

use rustix::fs::{CWD, FileType, Mode, OFlags, mknodat, openat};
use rustix::process::{Pid, Resource, Signal, getrlimit, kill_process, test_kill_process};
use rustix::thread::{Gid, Uid, UnshareFlags};
use serde_json::{Map, Value, json};
use vmm::jail::{Jail, limits::Limits};

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [root, uid, lent, host, port, socket] = arguments.as_slice() else { panic!("{arguments:?}") };
    // As flyrun-vmm is given it.
    let kvm = File::open("/dev/kvm");
    // SAFETY: the test has passed this descriptor, and nobody else here has it.
    let lent = unsafe { File::from_raw_fd(lent.parse().unwrap()) };
    let jail = Jail { root: root.into(), uid: Some(uid.parse().unwrap()) };
    if let Err(error) = jail.enter(&Limits::default()) {
        println!("{}", json!({ "error": error.to_string() }));
        return;
    }
    let mut found = Map::new();
    let mut note = |what: &str, value: Value| _ = found.insert(what.to_string(), value);
    files(&mut note, &lent);
    processes(&mut note, host.parse().unwrap());
    network(&mut note, port.parse().unwrap(), socket);
    devices(&mut note, kvm);
    rights(&mut note);
    println!("{}", Value::Object(found));
}

/// `done`, or the number of the error.
fn outcome<T, E: Into<io::Error>>(result: Result<T, E>) -> Value {
    match result.map_err(Into::into) {
        Ok(_) => "done".into(),
        Err(error) => error.raw_os_error().map_or_else(|| error.to_string().into(), Value::from),
    }
}

fn last(result: libc::c_long) -> Result<(), io::Error> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

type Note<'a> = &'a mut dyn FnMut(&str, Value);

fn files(note: Note<'_>, lent: &File) {
    let names = |path: &str| -> Value {
        match std::fs::read_dir(path) {
            Ok(entries) => {
                entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
            }
            Err(error) => outcome::<(), _>(Err(error)),
        }
    };
    note("names in /", names("/"));
    note("names above /", names("/.."));
    for path in [
        "/etc/passwd",
        "/proc/self/status",
        "/proc/1/environ",
        "/sys/kernel",
        "/dev/null",
        "/run",
        "/var/lib/flyrun",
    ] {
        note(&format!("open {path}"), outcome(File::open(path)));
    }
    note("create a file", outcome(File::create("/x")));
    note("create a directory", outcome(std::fs::create_dir("/d")));
    // The one directory that is lent for a snapshot.
    let create = OFlags::WRONLY | OFlags::CREATE;
    note("write to what is lent", outcome(openat(lent, "new", create, Mode::RUSR)));
    for path in ["..", "../etc/passwd", "../../../../../../etc/passwd"] {
        let above = openat(lent, path, OFlags::RDONLY, Mode::empty());
        let inside = above.as_ref().is_ok_and(|above| same(above, lent));
        note(
            &format!("from what is lent to {path}"),
            if inside { "still there".into() } else { outcome(above) },
        );
    }
    note("link out of what is lent", {
        let _ = rustix::fs::symlinkat("/etc/passwd", lent, "link");
        outcome(openat(lent, "link", OFlags::RDONLY, Mode::empty()))
    });
    note("a descriptor of a directory by number", {
        // Whatever else is open and a directory leads no further either.
        let mut seen = Vec::new();
        for number in 3..64 {
            // SAFETY: a number that is not open is only answered with EBADF.
            let open = unsafe { BorrowedFd::borrow_raw(number) };
            if number != lent.as_raw_fd() && openat(open, ".", OFlags::RDONLY, Mode::empty()).is_ok() {
                seen.push(number);
            }
        }
        json!(seen)
    });
}

fn same(one: &impl std::os::fd::AsFd, other: &File) -> bool {
    let id = |stat: rustix::fs::Stat| (stat.st_dev, stat.st_ino);
    rustix::fs::fstat(one).map(id).ok() == rustix::fs::fstat(other).map(id).ok()
}

fn processes(note: Note<'_>, host: i32) {
    note("own number", std::process::id().into());
    note("its parent", rustix::process::getppid().map_or(0, |pid| pid.as_raw_nonzero().get()).into());
    let others = (2..=host.max(4096)).filter(|pid| test_kill_process(Pid::from_raw(*pid).unwrap()).is_ok());
    note("other processes", json!(others.collect::<Vec<_>>()));
    note("kill a host's process", outcome(kill_process(Pid::from_raw(host).unwrap(), Signal::KILL)));
    // SAFETY: PTRACE_ATTACH takes no pointer.
    note("trace a host's process", outcome(last(unsafe { libc::ptrace(libc::PTRACE_ATTACH, host, 0, 0) })));
    let mut byte = 0u8;
    let local = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
    let remote = libc::iovec { iov_base: 0x40_0000 as *mut _, iov_len: 1 };
    // SAFETY: the kernel writes one byte to `byte`, at most.
    let read = unsafe { libc::process_vm_readv(host, &raw const local, 1, &raw const remote, 1, 0) };
    note("read a host's process", outcome(last(read as libc::c_long)));
}

fn network(note: Note<'_>, port: u16, socket: &str) {
    note("connect to the host's loopback", outcome(TcpStream::connect(("127.0.0.1", port))));
    note("connect to the internet", outcome(TcpStream::connect("192.0.2.1:80")));
    let address = SocketAddr::from_abstract_name(socket).unwrap();
    note("connect to an abstract socket of the host", outcome(UnixStream::connect_addr(&address)));
    note("take its name here", outcome(UnixListener::bind_addr(&address)));
    // SAFETY: socket(2) takes numbers.
    let raw = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW, 0) };
    note("listen to all packets", outcome(last(raw.into())));
    // SAFETY: as above.
    let raw = unsafe { libc::socket(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_ICMP) };
    note("send raw packets", outcome(last(raw.into())));
}

fn devices(note: Note<'_>, kvm: io::Result<File>) {
    note(
        "kvm that was given",
        match kvm {
            // SAFETY: KVM_GET_API_VERSION takes no argument.
            Ok(kvm) => unsafe { libc::ioctl(kvm.as_raw_fd(), 0xae00, 0) }.into(),
            Err(error) => outcome::<(), _>(Err(error)),
        },
    );
    for path in ["/dev/mem", "/dev/kvm", "/dev/net/tun", "/dev/vhost-net"] {
        note(&format!("open {path}"), outcome(File::open(path)));
    }
    let memory = rustix::fs::makedev(1, 1);
    note("make /dev/mem", outcome(mknodat(CWD, "/mem", FileType::CharacterDevice, Mode::RUSR, memory)));
}

fn rights(note: Note<'_>) {
    let (root, group) = (Uid::ROOT, Gid::ROOT);
    note("user", rustix::process::getuid().as_raw().into());
    note("group", rustix::process::getgid().as_raw().into());
    note(
        "groups",
        json!(rustix::process::getgroups().unwrap().iter().map(|gid| gid.as_raw()).collect::<Vec<_>>()),
    );
    note("become root", outcome(rustix::thread::set_thread_res_uid(root, root, root)));
    note("become root's group", outcome(rustix::thread::set_thread_res_gid(group, group, group)));
    note("take other groups", outcome(rustix::thread::set_thread_groups(&[group])));
    let sets = rustix::thread::capabilities(None).unwrap();
    let bits = |set: rustix::thread::CapabilitySet| json!(set.bits());
    note("capabilities", json!([bits(sets.effective), bits(sets.permitted), bits(sets.inheritable)]));
    let bounding = (0..41u32).filter(|number| {
        let one = rustix::thread::CapabilitySet::from_bits_retain(1 << number);
        rustix::thread::capability_is_in_bounding_set(one) == Ok(true)
            || rustix::thread::capability_is_in_ambient_set(one) == Ok(true)
    });
    note("bounding and ambient capabilities", json!(bounding.collect::<Vec<_>>()));
    note("no new privileges", json!(rustix::thread::no_new_privs().unwrap()));
    note("dumpable", format!("{:?}", rustix::process::dumpable_behavior().unwrap()).into());
    note("core dumps", json!(getrlimit(Resource::Core).maximum));
    note("threads", json!(getrlimit(Resource::Nproc).maximum));
    note("files", json!(getrlimit(Resource::Nofile).maximum));
    note(
        "more files",
        outcome(rustix::process::setrlimit(
            Resource::Nofile,
            rustix::process::Rlimit { current: Some(1 << 20), maximum: Some(1 << 20) },
        )),
    );
    let nothing = rustix::mount::MountFlags::empty();
    note("mount", outcome(rustix::mount::mount("none", "/", "tmpfs", nothing, None)));
    note(
        "make the root writable",
        outcome(rustix::mount::mount_remount("/", rustix::mount::MountFlags::BIND, "")),
    );
    note("unmount", outcome(rustix::mount::unmount("/", rustix::mount::UnmountFlags::DETACH)));
    note("change the root", outcome(rustix::process::chroot("/")));
    // SAFETY: file descriptors stay shared.
    note("be root of new users", outcome(unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWUSER) }));
    // SAFETY: as above.
    note("have new mounts", outcome(unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }));
    note("name the host", outcome(rustix::system::sethostname(b"mine")));
    note("load a module", {
        // SAFETY: delete_module reads a string that ends in a zero.
        outcome(last(unsafe { libc::syscall(libc::SYS_delete_module, c"kvm".as_ptr(), 0) }))
    });
    note("root still there", Path::new("/").exists().into());
}
