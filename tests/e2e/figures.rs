//! `flyrun top` and `flyrun stats`.

use tests::Flyrun;
use tests::background::Machine;

#[test]
fn top_lists_the_workload_and_its_commands_and_not_flyrun_s_own() {
    let machine = Machine::start(&["-u", "www-data"], "exec sleep 123456");
    machine.exec(&["-d", "-u", "root"], &["sleep", "654321"]).end().code(0);
    let flyrun = Flyrun::shared();
    let outcome = flyrun.command(&["top", machine.name()]).end().code(0);
    let text = outcome.text();
    let lines: Vec<&str> = text.lines().collect();
    assert!(lines[0].starts_with("UID") && lines[0].ends_with("COMMAND"), "{text}");
    assert_eq!(lines.len(), 3, "{text}");
    assert!(lines.iter().any(|line| line.starts_with("33 ") && line.ends_with("sleep 123456")), "{text}");
    assert!(lines.iter().any(|line| line.starts_with("0 ") && line.ends_with("sleep 654321")), "{text}");
    let mut json = flyrun.command(&["top", "--json", machine.name()]).end().code(0);
    assert_eq!(json.json().as_array().unwrap().len(), 2);
    flyrun.command(&["top", "nowhere"]).end().fails_clearly().complains_about("'nowhere'");
}

#[test]
fn top_lists_many_processes() {
    let machine = Machine::idle();
    machine.sh("for i in $(seq 300); do sleep 1000000 & done").end().code(0);
    let outcome = Flyrun::shared().command(&["top", machine.name()]).end().code(0);
    assert_eq!(outcome.text().lines().filter(|line| line.ends_with("sleep 1000000")).count(), 301);
}

#[test]
fn stats_tell_what_guest_and_host_use() {
    let machine = Machine::start(&["--memory", "128m"], "while :; do :; done");
    let flyrun = Flyrun::shared();
    let mut outcome = flyrun.command(&["stats", "--no-stream", "--json", machine.name()]).end().code(0);
    let line = outcome.json();
    let number = |path: &str| line.pointer(path).and_then(serde_json::Value::as_f64).unwrap();
    assert!(number("/cpu_percent") > 1.0, "{line}");
    assert!(number("/host_cpu_percent") > 1.0, "{line}");
    assert!(
        number("/guest/memory_total") > 90e6 && number("/guest/memory_total") < 128.0 * 1048576.0,
        "{line}"
    );
    assert!(number("/guest/memory_used") > 1e6, "{line}");
    assert!(number("/guest/processes") >= 1.0, "{line}");
    assert!(number("/guest/disk_read") > 100_000.0, "{line}");
    assert!(number("/host/pss") > 10e6 && number("/host/rss") >= number("/host/pss"), "{line}");
    let outcome = flyrun.command(&["stats", "--no-stream", machine.name()]).end().code(0);
    let text = outcome.text();
    assert!(
        text.starts_with("MACHINE") && text.lines().nth(1).unwrap().starts_with(machine.name()),
        "{text}"
    );
    flyrun.command(&["stats", "nowhere"]).end().fails_clearly().complains_about("'nowhere'");
}

#[test]
fn stats_without_names_tell_of_all_and_end_with_their_reader() {
    let machines = [Machine::idle(), Machine::idle()];
    let program = tests::flyrun::program();
    let script = format!("{} stats --json | head -n 5", program.display());
    let output = machines[0].exec(&[], &[]).build(&["bash", "-c", &script]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(text.lines().count(), 5, "{text}");
    assert!(machines.iter().all(|machine| text.contains(machine.name())), "{text}");
}
