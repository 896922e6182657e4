//! PID 1 of the guests: this very test program, told to run its one ignored test. It keeps state, uses every device, and
//! answers questions on vsock port 10, one a connection.

use std::{
    fs::{File, OpenOptions},
    io::{self, BufRead, BufReader, Read, Write},
    net::{Ipv4Addr, UdpSocket},
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::fs::FileExt,
    },
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use rustix::time::{ClockId, clock_gettime};

const PORT: u32 = 10;
const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 2);
const HOST: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 1);
const PAGE: usize = 4096;
const PAGES: usize = 8192;

/// What a suspended machine must not lose.
struct Guest {
    questions: u64,
    pages: Vec<u8>,
    /// Memory that is used for nothing.
    used: Vec<u8>,
    disk: Option<File>,
    net: Option<UdpSocket>,
    /// Connections that were held open and have ended.
    ended: Arc<AtomicUsize>,
    /// A CPU that never rests.
    spinning: Arc<AtomicBool>,
}

#[test]
#[ignore = "it is the first process of a guest"]
fn pid_1() {
    if std::process::id() != 1 {
        return;
    }
    mount("devtmpfs", "/dev");
    mount("proc", "/proc");
    let mut guest = Guest {
        questions: 0,
        pages: vec![0; 0],
        used: vec![0; 0],
        disk: OpenOptions::new().read(true).write(true).open("/dev/vda").ok(),
        net: network().ok(),
        ended: Arc::default(),
        spinning: Arc::new(AtomicBool::new(false)),
    };
    let listener = listen().unwrap();
    println!("ready");
    loop {
        let mut stream = File::from(accept(&listener).unwrap());
        let mut line = String::new();
        if BufReader::new(&stream).read_line(&mut line).is_err() {
            continue;
        }
        guest.questions += 1;
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            ["hold"] => guest.hold(stream),
            ["end"] => break,
            words => {
                let answer = guest.answer(words).unwrap_or_else(|error| format!("error {error}"));
                // The host may have gone.
                let _ = stream.write_all(answer.as_bytes());
            }
        }
    }
    // SAFETY: no argument is a pointer.
    unsafe { libc::reboot(libc::LINUX_REBOOT_CMD_RESTART) };
}

impl Guest {
    fn answer(&mut self, words: &[&str]) -> io::Result<String> {
        Ok(match words {
            ["questions"] => self.questions.to_string(),
            ["monotonic"] => {
                let now = clock_gettime(ClockId::Monotonic);
                (now.tv_sec * 1_000_000_000 + now.tv_nsec).to_string()
            }
            ["cpus"] => std::thread::available_parallelism()?.to_string(),
            ["ended"] => self.ended.load(Ordering::SeqCst).to_string(),
            ["spin"] => {
                self.spinning.store(true, Ordering::SeqCst);
                let spinning = Arc::clone(&self.spinning);
                std::thread::spawn(move || while spinning.load(Ordering::SeqCst) {});
                "spinning".into()
            }
            ["rest"] => {
                self.spinning.store(false, Ordering::SeqCst);
                "resting".into()
            }
            // All pages get this byte, and the first so many another one.
            ["fill", byte] => {
                self.pages = vec![byte.parse().map_err(io::Error::other)?; PAGES * PAGE];
                "filled".into()
            }
            ["touch", count, byte] => {
                let (count, byte): (usize, u8) = (number(count)?, number(byte)?);
                self.pages.chunks_mut(PAGE).take(count).for_each(|page| page.fill(byte));
                "touched".into()
            }
            ["use", mib] => {
                self.used = vec![1; number::<usize>(mib)? << 20];
                "used".into()
            }
            ["free"] => {
                self.used = Vec::new();
                "freed".into()
            }
            // Each byte that occurs, and how often.
            ["sum"] => {
                let mut counts = [0usize; 256];
                self.pages.iter().for_each(|byte| counts[usize::from(*byte)] += 1);
                let seen = counts.iter().enumerate().filter(|(_, count)| **count > 0);
                seen.map(|(byte, count)| format!("{byte}:{count}")).collect::<Vec<_>>().join(" ")
            }
            ["write", at, text] => {
                let disk = self.disk()?;
                disk.write_all_at(text.as_bytes(), number(at)?)?;
                disk.sync_all()?;
                "written".into()
            }
            ["read", at, count] => {
                let mut bytes = vec![0; number(count)?];
                let disk = self.disk()?;
                // Not from this kernel's memory.
                // SAFETY: no argument is a pointer.
                unsafe { libc::posix_fadvise(disk.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
                disk.read_exact_at(&mut bytes, number(at)?)?;
                String::from_utf8_lossy(&bytes).into_owned()
            }
            ["random"] => {
                let mut bytes = [0; 16];
                File::open("/dev/hwrng")?.read_exact(&mut bytes)?;
                bytes.iter().map(|byte| format!("{byte:02x}")).collect()
            }
            ["ping", text] => {
                let socket = self.net.as_ref().ok_or(io::ErrorKind::NotFound)?;
                echoed(socket, text)?
            }
            other => format!("{other:?} is no question"),
        })
    }

    fn disk(&self) -> io::Result<&File> {
        self.disk.as_ref().ok_or(io::ErrorKind::NotFound.into())
    }

    fn hold(&self, mut stream: File) {
        let ended = Arc::clone(&self.ended);
        let _ = stream.write_all(b"held\n");
        std::thread::spawn(move || {
            let _ = stream.read(&mut [0; 16]);
            ended.fetch_add(1, Ordering::SeqCst);
        });
    }
}

/// Sends a text until it comes back. One packet may be lost: the host's kernel drops what it has for a TAP that has just been
/// opened, as long as it has not seen the carrier.
fn echoed(socket: &std::net::UdpSocket, text: &str) -> io::Result<String> {
    const ATTEMPTS: usize = 60;
    socket.set_read_timeout(Some(std::time::Duration::from_secs(1)))?;
    for _ in 0..ATTEMPTS {
        socket.send_to(text.as_bytes(), (HOST, 7))?;
        let mut bytes = [0; 100];
        while let Ok(count) = socket.recv(&mut bytes) {
            // Another is the late echo of a packet that was thought lost.
            if bytes.get(..count) == Some(text.as_bytes()) {
                return Ok(text.to_string());
            }
        }
    }
    Err(io::ErrorKind::TimedOut.into())
}

fn number<T: std::str::FromStr<Err: std::error::Error + Send + Sync + 'static>>(text: &str) -> io::Result<T> {
    text.parse().map_err(io::Error::other)
}

fn mount(kind: &str, path: &str) {
    let _ = std::fs::create_dir(path);
    let text = |text: &str| std::ffi::CString::new(text).unwrap();
    let (kind, path) = (text(kind), text(path));
    // SAFETY: the strings end in zeros and live through the call; there is no data.
    unsafe { libc::mount(kind.as_ptr(), path.as_ptr(), kind.as_ptr(), 0, std::ptr::null()) };
}

/// Gives eth0 its address.
fn network() -> io::Result<UdpSocket> {
    let any = UdpSocket::bind("0.0.0.0:0")?;
    let request = |set: &dyn Fn(&mut libc::ifreq), call: libc::c_ulong| {
        // SAFETY: ifreq is a plain C struct for which all zeros is valid.
        let mut request = unsafe { std::mem::zeroed::<libc::ifreq>() };
        request.ifr_name.iter_mut().zip(b"eth0").for_each(|(place, byte)| *place = *byte as libc::c_char);
        set(&mut request);
        // SAFETY: these calls read one ifreq.
        match unsafe { libc::ioctl(any.as_raw_fd(), call as _, &raw mut request) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    };
    let address = |ip: Ipv4Addr| {
        let mut address = libc::sockaddr { sa_family: libc::AF_INET as u16, sa_data: [0; 14] };
        let octets = ip.octets().map(|octet| octet as libc::c_char);
        address.sa_data[2..6].copy_from_slice(&octets);
        address
    };
    request(&|request| request.ifr_ifru.ifru_addr = address(ADDRESS), libc::SIOCSIFADDR)?;
    request(
        &|request| request.ifr_ifru.ifru_netmask = address(Ipv4Addr::new(255, 255, 255, 0)),
        libc::SIOCSIFNETMASK,
    )?;
    let up = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    request(&|request| request.ifr_ifru.ifru_flags = up, libc::SIOCSIFFLAGS)?;
    any.set_read_timeout(Some(std::time::Duration::from_secs(20)))?;
    Ok(any)
}

fn descriptor(result: libc::c_int) -> io::Result<OwnedFd> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made the descriptor, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(result) })
}

fn listen() -> io::Result<OwnedFd> {
    // SAFETY: no argument is a pointer.
    let socket = descriptor(unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM, 0) })?;
    // SAFETY: sockaddr_vm is a plain C struct for which all zeros is valid.
    let mut address = unsafe { std::mem::zeroed::<libc::sockaddr_vm>() };
    address.svm_family = libc::AF_VSOCK as u16;
    address.svm_cid = libc::VMADDR_CID_ANY;
    address.svm_port = PORT;
    let length = size_of_val(&address) as libc::socklen_t;
    // SAFETY: the address and its length are those of a sockaddr_vm.
    let bound = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) };
    // SAFETY: no argument is a pointer.
    if bound < 0 || unsafe { libc::listen(socket.as_raw_fd(), 16) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(socket)
}

fn accept(listener: &OwnedFd) -> io::Result<OwnedFd> {
    // SAFETY: no address is asked for.
    descriptor(unsafe { libc::accept(listener.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut()) })
}
