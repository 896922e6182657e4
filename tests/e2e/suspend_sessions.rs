//! Commands and attachments in a machine that is suspended and resumed meanwhile.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStdout, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::process::{Pid, Signal, kill_process};
use tests::background::IDLE;
use tests::flyrun::{Invocation, scratch};
use tests::suspended::{COUNTER, Machine, command, wait_until};
use tests::terminal::Terminal;

/// A client with pipes.
struct Client {
    child: Child,
    output: BufReader<ChildStdout>,
}

impl Client {
    fn start(invocation: &Invocation<'_>) -> Client {
        let mut command = invocation.build(&[]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        Client { child, output }
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        line
    }

    /// Exit code, the rest of standard output, and standard error.
    fn end(mut self) -> (Option<i32>, String, String) {
        drop(self.child.stdin.take());
        let (mut rest, mut errors) = (String::new(), String::new());
        self.output.read_to_string(&mut rest).unwrap();
        self.child.stderr.take().unwrap().read_to_string(&mut errors).unwrap();
        (self.child.wait().unwrap().code(), rest, errors)
    }
}

fn exec(machine: &Machine, flags: &[&str], script: &str) -> Invocation<'static> {
    command(&[&["exec"], flags, &[&machine.0, "sh", "-c", script]].concat())
}

/// A stream of bytes in which every piece differs from every other.
struct Noise(u64);

impl Noise {
    fn fill(&mut self, bytes: &mut [u8]) {
        for byte in bytes {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            *byte = (self.0 >> 56) as u8;
        }
    }
}

#[test]
fn bytes_on_their_way_through_a_command_are_neither_lost_nor_doubled() {
    let machine = Machine::start("s-flow", &["--network", "none"], IDLE);
    let mut client = Client::start(&exec(&machine, &["-i"], "cat; exit 7"));
    let mut stdin = client.child.stdin.take().unwrap();
    let enough = Arc::new(AtomicBool::new(false));
    let writer = {
        let enough = Arc::clone(&enough);
        std::thread::spawn(move || {
            let (mut noise, mut sent, mut piece) = (Noise(1), 0u64, vec![0; 3001]);
            while !enough.load(Ordering::Relaxed) {
                noise.fill(&mut piece);
                stdin.write_all(&piece).unwrap();
                sent += piece.len() as u64;
            }
            sent
        })
    };
    let has_begun = Arc::new(AtomicBool::new(false));
    let begun = Arc::clone(&has_begun);
    let reader = std::thread::spawn(move || {
        let (mut noise, mut received, mut piece) = (Noise(1), 0u64, vec![0; 65_536]);
        loop {
            let count = client.output.read(&mut piece).unwrap();
            if count == 0 {
                return (client, received);
            }
            let mut expected = vec![0; count];
            noise.fill(&mut expected);
            assert!(piece[..count] == expected, "another byte than sent, behind {received}");
            received += count as u64;
            begun.store(true, Ordering::Relaxed);
        }
    });
    // Nobody gets into a machine that is suspending already.
    wait_until("the command has answered", || has_begun.load(Ordering::Relaxed));
    for _ in 0..4 {
        machine.call(&["suspend"]).code(0);
        machine.call(&["resume"]).code(0);
        assert_eq!(machine.last_start(), "resumed");
    }
    enough.store(true, Ordering::Relaxed);
    let sent = writer.join().unwrap();
    let (client, received) = reader.join().unwrap();
    assert_eq!(received, sent);
    let (code, _, errors) = client.end();
    assert_eq!((code, errors.as_str()), (Some(7), ""));
}

#[test]
fn a_suspend_that_is_undone_leaves_commands_as_they_were() {
    let machine = Machine::start("s-undone", &["--network", "none"], IDLE);
    let mut client = Client::start(&exec(&machine, &["-i"], "echo ready; cat; exit 3"));
    assert_eq!(client.line(), "ready\n");
    // No room for its memory.
    let directory = machine.directory().join("snapshot");
    std::fs::create_dir_all(&directory).unwrap();
    let mounted = std::process::Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=1m", "none"])
        .arg(&directory)
        .status()
        .unwrap();
    assert!(mounted.success());
    machine.call(&["suspend"]).code(125).complains_about("no space");
    assert_eq!(machine.state(), "started");
    client.child.stdin.as_mut().unwrap().write_all(b"still here\n").unwrap();
    assert_eq!(client.line(), "still here\n");
    assert!(std::process::Command::new("umount").arg(&directory).status().unwrap().success());
    machine.call(&["suspend"]).code(0);
    machine.call(&["resume"]).code(0);
    let (code, rest, errors) = client.end();
    assert_eq!((code, rest.as_str(), errors.as_str()), (Some(3), "", ""));
}

#[test]
fn a_terminal_goes_on_with_what_was_typed_meanwhile() {
    let machine = Machine::start("s-terminal", &["--network", "none"], IDLE);
    let mut terminal = Terminal::start(&exec(&machine, &["-it"], "exec sh"), 33, 101);
    terminal.wait_for("# ");
    terminal.send("seen=before; echo $((6 * 7))\n");
    terminal.wait_for("42");
    machine.call(&["suspend"]).code(0);
    terminal.send("echo $seen-$((6 * 8))\n");
    terminal.resize(51, 133);
    machine.call(&["resume"]).code(0);
    terminal.wait_for("before-48");
    terminal.send("stty size; echo size-told\n");
    terminal.wait_for("51 133");
    terminal.send("exit 4\n");
    let (status, shown) = terminal.end();
    assert_eq!(status.code(), Some(4), "{shown}");
    assert!(!shown.contains("flyrun:"), "{shown}");
}

#[test]
fn a_signal_that_comes_meanwhile_is_delivered_and_an_end_is_heard() {
    let machine = Machine::start("s-signal", &["--network", "none"], IDLE);
    let script = "trap 'echo got it; exit 6' TERM; echo ready; while :; do sleep 0.1; done";
    let mut client = Client::start(&exec(&machine, &[], script));
    let mut brief = Client::start(&exec(&machine, &["-i"], "echo ready; read line; exit 9"));
    assert_eq!((client.line(), brief.line()), ("ready\n".into(), "ready\n".into()));
    machine.call(&["suspend"]).code(0);
    kill_process(Pid::from_child(&client.child), Signal::TERM).unwrap();
    machine.call(&["resume"]).code(0);
    assert_eq!(client.end(), (Some(6), "got it\n".into(), "".into()));
    assert_eq!(brief.end().0, Some(9));
}

#[test]
fn a_machine_that_was_booted_cold_tells_its_commands() {
    let machine = Machine::start("s-cold", &["--network", "none"], IDLE);
    let mut client = Client::start(&exec(&machine, &["-i"], "echo ready; cat"));
    assert_eq!(client.line(), "ready\n");
    machine.call(&["suspend"]).code(0);
    machine.damage_snapshot();
    machine.call(&["resume"]).code(0).complains_about("s-cold: cold_boot: ");
    assert_eq!(machine.last_start(), "cold_boot");
    let log = std::fs::read_to_string(machine.directory().join("monitor.log")).unwrap();
    assert!(log.contains("cold_boot: "), "{log}");
    let (code, _, errors) = client.end();
    assert_eq!(code, Some(125));
    assert!(errors.contains("the machine was booted cold; the session is gone"), "{errors}");
}

#[test]
fn a_machine_that_is_stopped_or_removed_while_suspended_ends_its_commands() {
    for words in [&["stop"][..], &["rm", "-f"]] {
        let machine = Machine::start("s-ended", &["--network", "none"], IDLE);
        let mut client = Client::start(&exec(&machine, &["-i"], "echo ready; cat"));
        assert_eq!(client.line(), "ready\n");
        machine.call(&["suspend"]).code(0);
        machine.call(words).code(0);
        let (code, _, errors) = client.end();
        assert_eq!(code, Some(137), "{errors}");
        assert!(errors.contains("the machine ended before the command did"), "{errors}");
    }
}

#[test]
fn a_client_that_does_not_come_back_leaves_its_command_without_streams() {
    let machine = Machine::start("s-gone", &["--network", "none"], IDLE);
    let mut client = Client::start(&exec(&machine, &["-i"], "echo ready; cat > /got; echo ended > /ended"));
    let hung_up = "trap 'echo hung up > /hup; exit' HUP; echo ready; while :; do sleep 0.1; done";
    let terminal = Terminal::start(&exec(&machine, &["-it"], hung_up), 24, 80);
    assert_eq!(client.line(), "ready\n");
    terminal.wait_for("ready");
    // Clones have no clients at all.
    command(&["clone", "--name", "s-gone-clone", "s-gone"]).end().code(0);
    let clone = Machine("s-gone-clone".into());
    machine.call(&["suspend"]).code(0);
    client.child.kill().unwrap();
    drop(client.end());
    machine.call(&["resume"]).code(0);
    for machine in [&clone, &machine] {
        wait_until("the command has seen the end of its input", || {
            machine.exec("cat /ended 2> /dev/null || true") == "ended"
        });
    }
    wait_until("the clone's terminal was hung up", || {
        clone.exec("cat /hup 2> /dev/null || true") == "hung up"
    });
    assert_eq!(machine.exec("cat /hup 2> /dev/null || true"), "");
    machine.call(&["stop", "-t", "0"]).code(0);
    assert_eq!(terminal.end().0.code(), Some(137));
}

#[test]
fn a_copy_holds_a_suspend_up_but_not_for_ever() {
    let machine = Machine::start("s-copy", &["--network", "none"], COUNTER);
    let mut copy = Client::start(&command(&["cp", "-", "s-copy:/tmp"]));
    let directory = scratch();
    std::fs::write(directory.path().join("large"), vec![7; 1 << 20]).unwrap();
    let mut tar = std::process::Command::new("tar");
    let tar = tar.arg("-C").arg(directory.path()).args(["-c", "large"]).output().unwrap().stdout;
    copy.child.stdin.as_mut().unwrap().write_all(&tar[..1 << 19]).unwrap();
    wait_until("the copy has begun", || !machine.exec("ls -A /tmp").is_empty());
    machine.call(&["suspend"]).code(125).complains_about("open sessions (cp, top, stats): 1");
    assert_eq!(machine.state(), "started");
    machine.wait_for_lines(3);
    machine.call(&["suspend", "--force"]).code(0);
    drop(copy.child.stdin.take());
    let (code, _, errors) = copy.end();
    assert_eq!(code, Some(125), "{errors}");
    machine.call(&["resume"]).code(0);
    machine.wait_for_lines(3);
    machine.check_count();
}

#[test]
fn whoever_is_attached_goes_on_with_the_machine() {
    let script = "while read line; do echo said $line; done; echo over; exit 5";
    let machine = Machine::start("s-attached", &["-i", "--network", "none"], script);
    let mut client = Client::start(&command(&["attach", "s-attached"]));
    let say = |client: &mut Client, text: &str| {
        client.child.stdin.as_mut().unwrap().write_all(format!("{text}\n").as_bytes()).unwrap();
    };
    say(&mut client, "one");
    assert_eq!(client.line(), "said one\n");
    for word in ["two", "three"] {
        machine.call(&["suspend"]).code(0);
        say(&mut client, word);
        machine.call(&["resume"]).code(0);
        assert_eq!(client.line(), format!("said {word}\n"));
    }
    assert_eq!(client.end(), (Some(5), "over\n".into(), "".into()));
    assert_eq!(machine.log(), "said one\nsaid two\nsaid three\nover");
}

#[test]
fn whoever_is_attached_to_a_machine_that_is_given_up_is_told() {
    let machine = Machine::start("s-given-up", &["--network", "none"], COUNTER);
    let mut client = Client::start(&command(&["attach", "s-given-up"]));
    assert!(client.line().starts_with("line "));
    machine.call(&["suspend"]).code(0);
    machine.call(&["stop"]).code(0);
    let (code, _, errors) = client.end();
    assert_eq!(code, Some(137), "{errors}");
    assert!(errors.contains("ended while it was suspended"), "{errors}");
}
