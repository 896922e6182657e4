//! `flyrun exec`: commands beside the workload.

use std::io::{BufRead, BufReader, Read};
use std::process::Stdio;

use rustix::process::{Pid, Signal, kill_process};
use tests::Flyrun;
use tests::background::{IDLE, Machine};
use tests::flyrun::scratch;
use tests::image::sha256;
use tests::terminal::Terminal;

#[test]
fn a_command_s_output_and_code_are_its_own() {
    let machine = Machine::idle();
    machine.sh("echo out; echo err >&2; exit 7").end().code(7).prints("out").complains_about("err");
    machine.exec(&[], &["true"]).end().code(0).prints("");
    machine.sh("kill -TERM $$").end().code(143);
}

#[test]
fn a_command_sees_the_workload() {
    let machine = Machine::start(&["-e", "COLOUR=red", "-w", "/srv", "-u", "www-data"], IDLE);
    machine.sh("ps | grep '[s]leep 1000000'").end().code(0);
    machine.sh("echo $COLOUR $PWD $HOME; id -un").end().code(0).prints("red /srv /var/www\nwww-data");
}

#[test]
fn variables_users_and_directories_can_be_chosen() {
    let directory = scratch();
    let file = directory.path().join("env");
    std::fs::write(&file, "# a comment\nB=file\nC=file\n").unwrap();
    let machine = Machine::start(&["-e", "A=workload", "-e", "B=workload"], IDLE);
    machine
        .exec(
            &[
                "--env-file",
                file.to_str().unwrap(),
                "-e",
                "C=flag",
                "-e",
                "D",
                "-e",
                "UNSET_HERE",
                "-w",
                "/tmp",
            ],
            &["sh", "-c", "echo $A $B $C $D ${UNSET_HERE-unset} $PWD"],
        )
        .env("D", "own")
        .end()
        .code(0)
        .prints("workload file flag own unset /tmp");
    machine.exec(&["-u", "www-data"], &["sh", "-c", "id -u; echo $HOME"]).end().prints("33\n/var/www");
    machine.exec(&["-u", "5:6"], &["id", "-g"]).end().prints("6");
    machine.exec(&["-w", "/no/such"], &["true"]).end().fails_clearly().complains_about("/no/such");
    machine.exec(&["-w", "tmp"], &["true"]).end().fails_clearly().complains_about("absolute");
    machine.exec(&["-e", "=x"], &["true"]).end().fails_clearly().complains_about("KEY=VALUE");
}

#[test]
fn a_command_that_cannot_run_has_docker_s_codes() {
    let machine = Machine::idle();
    machine.exec(&[], &["no-such-command"]).end().code(127).complains_about("no-such-command");
    machine.exec(&[], &["/etc/passwd"]).end().code(126).complains_about("/etc/passwd");
    machine.exec(&["-u", "somebody"], &["true"]).end().fails_clearly().complains_about("somebody");
}

#[test]
fn an_unknown_machine_is_named() {
    let flyrun = Flyrun::shared();
    flyrun.command(&["exec", "nowhere", "true"]).end().fails_clearly().complains_about("'nowhere'");
    flyrun.command(&["exec", "nowhere"]).end().code(125).complains_about("COMMAND");
    flyrun
        .command(&["exec", "-d", "-t", "nowhere", "true"])
        .end()
        .code(125)
        .complains_about("cannot be used");
}

#[test]
fn ten_megabytes_go_through_unharmed_both_ways() {
    let machine = Machine::idle();
    let sent: Vec<u8> = (0..10_000_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let outcome = machine.exec(&["-i"], &["cat"]).stdin(sent.clone()).end().code(0);
    assert_eq!(outcome.stdout.len(), sent.len());
    assert_eq!(sha256(&outcome.stdout), sha256(&sent));
    machine
        .exec(&["-i"], &["sha256sum"])
        .stdin(sent.clone())
        .end()
        .code(0)
        .prints(&format!("{}  -", sha256(&sent)));
}

#[test]
fn without_i_there_is_no_input() {
    Machine::idle().exec(&[], &["cat"]).stdin("unheard").end().code(0).prints("");
}

#[test]
fn a_command_that_reads_nothing_is_not_held_up_by_its_input() {
    let machine = Machine::idle();
    machine.exec(&["-i"], &["true"]).stdin(vec![0; 3_000_000]).end().code(0);
    machine
        .exec(&["-i"], &["sh", "-c", "exec <&-; sleep 1; echo alive"])
        .stdin(vec![0; 3_000_000])
        .end()
        .code(0)
        .prints("alive");
}

#[test]
fn a_signal_overtakes_the_input() {
    let machine = Machine::idle();
    let script = "trap 'echo got it; exit 3' TERM; echo ready; while :; do sleep 0.1; done";
    let mut command = machine.exec(&["-i"], &["sh", "-c", script]).build(&[]);
    // More than every buffer on the way holds.
    let zeros = std::fs::File::open("/dev/zero").unwrap();
    let mut child = command.stdin(zeros).stdout(Stdio::piped()).spawn().unwrap();
    let mut output = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    output.read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n");
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    let mut rest = String::new();
    output.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "got it\n");
    assert_eq!(child.wait().unwrap().code(), Some(3));
}

#[test]
fn a_reader_that_leaves_ends_the_writer() {
    let machine = Machine::idle();
    let program = tests::flyrun::program();
    let script =
        format!("{} exec {} yes | head -n 1; echo ${{PIPESTATUS[0]}}", program.display(), machine.name());
    let mut wrapped = machine.exec(&[], &[]).build(&["bash", "-c", &script]);
    let output = wrapped.output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "y\n141\n");
}

#[test]
fn what_stays_in_the_background_does_not_hold_up_the_end() {
    let machine = Machine::idle();
    machine.sh("sleep 1000 & echo begun").end().code(0).prints("begun");
    machine.sh("ps | grep '[s]leep 1000$'").end().code(0);
}

#[test]
fn a_detached_command_goes_on_alone() {
    let machine = Machine::idle();
    machine
        .exec(
            &["-d"],
            &["sh", "-c", "echo unseen; while [ ! -e /go ]; do sleep 0.1; done; echo done > /result"],
        )
        .end()
        .code(0)
        .prints("");
    machine
        .sh("test ! -e /result && touch /go; while ! grep -q done /result; do sleep 0.1; done")
        .end()
        .code(0);
    machine.exec(&["-d"], &["no-such-command"]).end().code(127).complains_about("no-such-command");
}

#[test]
fn a_client_that_is_killed_leaves_its_command_without_streams() {
    let machine = Machine::idle();
    let script = "echo ready; cat > /got; echo ended > /ended";
    let mut command = machine.exec(&["-i"], &["sh", "-c", script]).build(&[]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    machine.sh("while ! grep -q ended /ended; do sleep 0.1; done").end().code(0);
}

#[test]
fn many_at_once_do_not_disturb_one_another() {
    let machine = Machine::idle();
    let sessions: Vec<_> = (0..20)
        .map(|number| {
            let invocation = machine.exec(&["-i"], &["sh", "-c", &format!("cat; exit {number}")]);
            std::thread::spawn(move || {
                let sent = format!("{number} ").repeat(40_000);
                let outcome = invocation.stdin(sent.clone()).end().code(number);
                assert!(outcome.stdout == sent.as_bytes(), "session {number} got another's bytes");
            })
        })
        .collect();
    sessions.into_iter().for_each(|session| session.join().unwrap());
}

#[test]
fn sessions_beyond_the_most_are_refused_and_the_others_live() {
    let machine = Machine::idle();
    let sessions: Vec<_> = (0..64)
        .map(|_| {
            let mut command = machine.exec(&["-i"], &["sh", "-c", "echo ready; cat"]).build(&[]);
            let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
            let mut output = BufReader::new(child.stdout.take().unwrap());
            let mut line = String::new();
            output.read_line(&mut line).unwrap();
            assert_eq!(line, "ready\n");
            (child, output)
        })
        .collect();
    machine.exec(&[], &["true"]).end().fails_clearly().complains_about("64 sessions");
    for (mut child, _output) in sessions {
        drop(child.stdin.take());
        assert_eq!(child.wait().unwrap().code(), Some(0));
    }
    machine.exec(&[], &["true"]).end().code(0);
}

#[test]
fn the_end_of_the_workload_ends_its_commands() {
    let machine = Machine::start(&[], "while [ ! -e /go ]; do sleep 0.1; done; exit 4");
    let mut command = machine.sh("echo ready; exec sleep 1000").build(&[]);
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    machine.exec(&[], &["touch", "/go"]).end();
    assert_eq!(machine.end().0, Some(4));
    assert_eq!(child.wait().unwrap().code(), Some(137));
}

#[test]
fn a_command_that_needs_too_much_memory_is_told_so_and_the_workload_lives() {
    let machine = Machine::start(&["--memory", "96m"], IDLE);
    machine
        .sh("echo 1000 > /proc/self/oom_score_adj; exec tail /dev/zero")
        .end()
        .code(137)
        .complains_about("out of memory");
    machine.sh("ps | grep '[s]leep 1000000'").end().code(0);
}

#[test]
fn a_terminal_has_the_user_s_size_and_follows_it() {
    let machine = Machine::idle();
    let script = "trap 'stty size' WINCH; stty size; tty; while :; do sleep 0.1; done";
    let terminal = Terminal::start(&machine.exec(&["-it"], &["sh", "-c", script]), 33, 101);
    terminal.wait_for("33 101");
    terminal.wait_for("/dev/pts/");
    terminal.resize(51, 133);
    terminal.wait_for("51 133");
    let mut terminal = terminal;
    terminal.send("\x03");
    assert_eq!(terminal.end().0.code(), Some(130));
}

#[test]
fn a_shell_answers_what_is_typed() {
    let machine = Machine::idle();
    let mut terminal = Terminal::start(&machine.exec(&["-it"], &["sh"]), 24, 80);
    terminal.wait_for("# ");
    terminal.send("echo six times seven is $((6 * 7)) on $TERM\n");
    terminal.wait_for("seven is 42 on xterm");
    terminal.send("exit 4\n");
    assert_eq!(terminal.end().0.code(), Some(4));
}

#[test]
fn a_terminal_without_input_still_passes_interrupts_on() {
    let machine = Machine::idle();
    let script = "trap 'echo caught; exit 6' INT; echo ready; while :; do sleep 0.1; done";
    let mut terminal = Terminal::start(&machine.exec(&["-t"], &["sh", "-c", script]), 24, 80);
    terminal.wait_for("ready");
    terminal.send("\x03");
    let (status, shown) = terminal.end();
    assert_eq!(status.code(), Some(6), "{shown}");
    assert!(shown.contains("caught"), "{shown}");
}

#[test]
fn a_terminal_with_input_needs_a_terminal() {
    Machine::idle().exec(&["-it"], &["true"]).end().fails_clearly().complains_about("terminal");
}
