//! The socket device with any ring, any packets of the guest and any behaviour of the host's end.
#![no_main]
#![allow(clippy::expect_used, reason = "only fuzzers run this")]

use std::{
    io::{Read, Write},
    net::Shutdown,
    os::unix::net::{UnixListener, UnixStream},
    path::PathBuf,
    sync::{Arc, LazyLock, Mutex},
};

use devices::{testing::Guest, virtio::vsock::Vsock};
use devices_fuzz::{Input, directory, driver_step, start};
use libfuzzer_sys::fuzz_target;

const CID: u64 = 3;

static DIR: LazyLock<PathBuf> = LazyLock::new(|| directory("vsock"));
/// The service at port 1 of the host. Made once; what is left in its backlog belongs to runs before.
static SERVICE: LazyLock<UnixListener> = LazyLock::new(|| {
    let listener = UnixListener::bind(DIR.join("v_1")).expect("the service's socket");
    listener.set_nonblocking(true).expect("a socket that does not block");
    listener
});

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    while SERVICE.accept().is_ok() {}
    let path = DIR.join("v");
    let Ok(device) = Vsock::new(CID, &path) else { return };
    let device = Arc::new(Mutex::new(device));
    let mut guest = Guest::with_shared(device.clone());
    start(&mut guest, &mut input);
    let mut hosts: Vec<UnixStream> = Vec::new();
    while !input.is_empty() {
        match input.u8() % 8 {
            0 => driver_step(&mut guest, &mut input),
            1 => offer(&mut guest, &mut input),
            2..5 => send(&mut guest, &mut input),
            5 => {
                if let Ok((host, _)) = SERVICE.accept() {
                    hosts.push(host);
                } else if let Ok(mut host) = UnixStream::connect(&path) {
                    let line: &[u8] = if input.u8() & 1 == 0 { b"CONNECT 1\n" } else { input.bytes(24) };
                    let _ = host.write_all(line);
                    hosts.push(host);
                }
            }
            6 => host_step(&mut hosts, &mut input),
            _ => {
                while guest.used(0).is_some() {}
                while guest.used(1).is_some() {}
            }
        }
        guest.run();
    }
    let connections = device.lock().map(|device| device.connections());
    assert!(connections.is_ok_and(|connections| connections <= 1024));
});

fn offer(guest: &mut Guest, input: &mut Input) {
    for _ in 0..input.u8() % 8 {
        let length = 44 + u32::from(input.u8()) * 16;
        guest.add(0, &[(0x20_0000 + u64::from(input.u8()) * 4096, length, true)]);
    }
    guest.kick(0);
}

fn send(guest: &mut Guest, input: &mut Input) {
    if guest.queues.len() < 2 {
        return;
    }
    let data = u32::from(input.u8()) * u32::from(input.u8());
    let ports = input.u8();
    let mut packet = Vec::new();
    packet.extend(CID.to_le_bytes());
    packet.extend(2u64.to_le_bytes());
    packet.extend(u32::from(ports & 3).to_le_bytes());
    // Ports of connections that the host has begun count from 2^30.
    let host = u32::from(ports >> 2 & 7);
    packet.extend(if ports & 0x80 == 0 { host } else { (1 << 30) + host }.to_le_bytes());
    packet.extend(data.to_le_bytes());
    packet.extend(1u16.to_le_bytes());
    packet.extend(u16::from(input.u8() % 9).to_le_bytes());
    packet.extend(u32::from(input.u8() % 5).to_le_bytes());
    packet.extend(input.length().to_le_bytes());
    packet.extend(input.length().to_le_bytes());
    if input.u8() < 32 {
        let at = usize::from(input.u8()) % packet.len();
        packet[at] = input.u8();
    }
    guest.free_memory();
    let header = guest.place(&packet);
    let cut = 1 + u32::from(input.u8()) % 44;
    guest.add(
        1,
        &[(header, cut, false), (header + u64::from(cut), 44 - cut, false), (0x30_0000, data, false)],
    );
    guest.kick(1);
    guest.used(1);
}

fn host_step(hosts: &mut Vec<UnixStream>, input: &mut Input) {
    if hosts.is_empty() {
        return;
    }
    let n = usize::from(input.u8()) % hosts.len();
    let mut host = &hosts[n];
    let _ = host.set_nonblocking(true);
    match input.u8() % 5 {
        0 => {
            let _ = host.write(&vec![7; input.length() as usize % (1 << 18)]);
        }
        1 => {
            let _ = host.read(&mut vec![0; input.length() as usize % (1 << 18)]);
        }
        2 => {
            let _ = host.shutdown(Shutdown::Write);
        }
        3 => {
            let _ = host.shutdown(Shutdown::Read);
        }
        _ => {
            hosts.swap_remove(n);
        }
    }
}
