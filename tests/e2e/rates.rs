//! Machines whose disks and network are held to a rate. Load makes all of it take longer, never shorter.

use tests::Flyrun;
use tests::flyrun::scratch;
use tests::image::busybox;
use tests::lab::{Lab, OUTSIDE};

/// Prints the guest's time in hundredths of a second.
const NOW: &str = "now() { cut -d ' ' -f 1 /proc/uptime | tr -d .; }; ";

/// The hundredths of a second that each step of a script took, from the times that it printed before and after each.
fn durations(text: &str) -> Vec<u32> {
    let times: Vec<u32> = text.lines().filter_map(|line| line.parse().ok()).collect();
    times.windows(2).map(|two| two[1] - two[0]).collect()
}

#[test]
fn a_disk_takes_no_more_bytes_in_a_second_than_it_may() {
    let write = "dd if=/dev/zero of=/file bs=64k count=128 conv=fsync 2> /dev/null";
    let read = "echo 3 > /proc/sys/vm/drop_caches; md5sum < /file > /dev/null";
    let script = format!("{NOW} now; {write}; now; {read}; now");
    let image = busybox();
    let outcome = Flyrun::shared().run(&["--disk-bandwidth", "2m", &image, "sh", "-c", &script]).end();
    // 8 MiB, less a tenth of a second's bytes and the last request, which Linux makes no larger than 1280 KiB.
    let durations = durations(&outcome.code(0).text());
    assert!(durations.len() == 2 && durations.iter().all(|time| *time > 300), "{durations:?}");
}

#[test]
fn a_disk_serves_no_more_requests_in_a_second_than_it_may() {
    let write = "for i in $(seq 100); do echo $i > /file; sync /file; done";
    let script = format!("{NOW} now; {write}; now");
    let image = busybox();
    let outcome = Flyrun::shared().run(&["--disk-iops", "50", &image, "sh", "-c", &script]).end();
    // Each is at least a write and a flush.
    let durations = durations(&outcome.code(0).text());
    assert!(durations.len() == 1 && durations[0] > 350, "{durations:?}");
}

#[test]
fn the_network_brings_no_more_bytes_in_a_second_than_it_may_either_way() {
    let lab = Lab::new("");
    let directory = scratch();
    let file = directory.path().join("data");
    let make =
        format!("dd if=/dev/urandom of={0} bs=1M count=4 status=none; sha256sum < {0}", file.display());
    let sum = lab.host(&make);
    let served = directory.path().display().to_string();
    let _server = lab.on_outside(&["busybox", "httpd", "-f", "-p", "8000", "-h", &served]);
    lab.wait_for(&format!("curl -s -m 20 -o /dev/null -w %{{http_code}} http://{OUTSIDE}:8000/data"));
    let fetch = format!(
        "{NOW} now; wget -q -O /tmp/data http://{OUTSIDE}:8000/data; now; sha256sum < /tmp/data; \
         exec httpd -f -p 80 -h /tmp"
    );
    let limits = ["--net-bandwidth", "1m", "--net-packets", "2000"];
    let log = directory.path().join("log");
    let flags = ["--name", "limited-net", "-p", "8083:80"];
    let machine = lab.machine(&[&flags[..], &limits, &[&busybox(), "sh", "-c", &fetch]].concat());
    let back = "curl -sf -m 120 -w %{stderr}%{time_total} http://127.0.0.1:8083/data 2> TIME | sha256sum";
    let back = back.replace("TIME", &log.display().to_string());
    // An answer cut short is one that began before the machine had fetched it all.
    lab.wait_for("curl -sf -m 5 -o /dev/null -r 0-0 -w %{http_code} http://127.0.0.1:8083/data");
    assert_eq!(lab.host(&back), sum);
    let seconds: f64 = std::fs::read_to_string(&log).unwrap().parse().unwrap();
    assert!(seconds > 3.0, "{seconds} s for 4 MiB to the host");
    let told = lab.command(&["logs", "limited-net"]).code(0).text();
    assert!(durations(&told).first().is_some_and(|time| *time > 300), "{told}");
    assert!(told.contains(&sum), "{told}");
    drop(machine);
}

#[test]
fn vhost_and_a_limit_exclude_each_other() {
    let flyrun = Flyrun::shared();
    let flags = ["create", "--net-backend", "vhost", "--net-packets", "9", &busybox()];
    flyrun.command(&flags).end().fails_clearly().complains_about("choose user or auto");
    let name = ["--name", "vhost-limits", "--net-backend", "vhost", &busybox()];
    flyrun.command(&[&["create"], &name[..]].concat()).end().code(0);
    let update = ["update", "--net-bandwidth", "1m", "vhost-limits"];
    flyrun.command(&update).end().fails_clearly().complains_about("choose user or auto");
    flyrun.command(&["rm", "vhost-limits"]).end().code(0);
}
