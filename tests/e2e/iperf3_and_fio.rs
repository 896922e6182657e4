//! The tools that everybody measures with: their own checks of what they moved must hold.

use rustix::process::Signal;
use serde_json::Value;
use tests::Flyrun;
use tests::image::layout;
use tests::lab::Lab;

/// Bytes that iperf3 moves each way.
const BYTES: u64 = 16 << 20;

/// Writes in both orders and both sizes, reads back, and compares checksums. Past the guest's page cache.
const FIO: &str = "fio --directory=$where --size=8m --direct=1 --ioengine=libaio --iodepth=8 --verify=crc32c \
    --verify_fatal=1 --fallocate=none --stonewall \
    --name=random4k --rw=randwrite --bs=4k --name=sequential4k --rw=write --bs=4k \
    --name=random1m --rw=randwrite --bs=1m --name=sequential1m --rw=write --bs=1m";

#[test]
fn iperf3_moves_every_byte_both_ways_over_both_backends() {
    let lab = Lab::new("");
    let mut backends = vec!["user"];
    if std::path::Path::new("/dev/vhost-net").exists() {
        backends.push("vhost");
    }
    for backend in backends {
        let machine =
            lab.machine(&["--net-backend", backend, "-p", "5201:5201", &layout("tools"), "iperf3", "-s"]);
        lab.wait_for("iperf3 -c 127.0.0.1 -n 1K");
        for direction in ["", "--reverse"] {
            let told = lab.host(&format!("iperf3 --json -c 127.0.0.1 -n {BYTES} {direction}"));
            let told: Value = serde_json::from_str(&told).unwrap();
            assert_eq!(told.get("error"), None, "{backend} {direction}");
            let end = told.pointer("/end").unwrap();
            let bytes = |side: &str| end.pointer(&format!("/{side}/bytes")).and_then(Value::as_u64).unwrap();
            assert!(bytes("sum_sent") >= BYTES, "{backend} {direction}: {end}");
            // iperf3's client ends when it has sent, with what is under way still uncounted at the other side.
            assert!(bytes("sum_received") > BYTES / 2, "{backend} {direction}: {end}");
        }
        machine.end(Signal::TERM);
    }
}

#[test]
fn fio_finds_on_the_machines_disk_and_on_a_volume_what_it_wrote() {
    let flyrun = Flyrun::shared();
    let volume = ["-v", "fio-data:/data"];
    let tools = layout("tools");
    let script = format!("set -e; for where in /var/tmp /data; do {FIO}; done");
    let outcome = flyrun.run(&[&volume[..], &[&tools, "bash", "-c", &script]].concat()).end().code(0);
    assert_eq!(outcome.text().matches("err= 0").count(), 8, "{}", outcome.text());
    // The volume's files are whole in the next machine.
    let script = format!("where=/data; {FIO} --verify_only");
    let outcome = flyrun.run(&[&volume[..], &[&tools, "bash", "-c", &script]].concat()).end().code(0);
    assert_eq!(outcome.text().matches("err= 0").count(), 4, "{}", outcome.text());
    flyrun.command(&["volume", "rm", "fio-data"]).end().code(0);
}
