//! What a kill, a stop or a change of mind leaves at each step of suspend and resume. Steps are reached and held
//! (tests/e2e/hold.rs), not guessed.

use tests::hold::{Hold, kill};
use tests::suspended::{COUNTER, Machine, command, wait_until};

/// Who is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    Command,
    Monitor,
    Vmm,
}
use Victim as V;

/// Its monitor's process, and its VMM's.
fn processes(machine: &Machine) -> (i32, i32) {
    let id = machine.inspect("id").as_str().unwrap().to_string();
    let find = |is: &dyn Fn(&[String]) -> bool| {
        let entries = std::fs::read_dir("/proc").unwrap().flatten();
        let mut pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        pids.find(|pid| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let words: Vec<_> =
                line.split(|byte| *byte == 0).map(String::from_utf8_lossy).map(String::from).collect();
            is(&words)
        })
    };
    let monitor = find(&|words| words.contains(&"monitor".to_string()) && words.contains(&id));
    let vmm = find(&|words| {
        words.first().is_some_and(|name| name.ends_with("flyrun-vmm"))
            && words.iter().any(|word| word.contains(&id))
    });
    (monitor.unwrap(), vmm.unwrap())
}

/// Runs `flyrun WORD MACHINE` until the hold is reached, kills the victim there, and lets the others go on.
fn kill_there(machine: &Machine, hold: &Hold, word: &str, victim: Victim) {
    let mut invocation = hold.on(machine.invoke(&[word])).build(&[]);
    invocation.stdin(std::process::Stdio::null());
    let mut client =
        invocation.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null()).spawn().unwrap();
    let held = hold.reached();
    let (monitor, vmm) = processes(machine);
    let killed = match victim {
        V::Command => client.id() as i32,
        V::Monitor => monitor,
        V::Vmm => vmm,
    };
    kill(killed);
    if killed != held {
        hold.release(held);
    }
    client.wait().unwrap();
}

/// The machine as it was left goes on, by the command that its state asks for, which is to stop at `next`.
#[track_caller]
fn check_repaired(machine: &Machine, left: &str, next: &Hold, told: &str) {
    let (word, how) = if left == "failed" { ("start", "cold_boot") } else { ("resume", "resumed") };
    if left != "started" {
        next.on(machine.invoke(&[word])).end().code(0);
    }
    assert_eq!((machine.state().as_str(), machine.last_start().as_str()), ("started", how), "{told}");
    machine.wait_for_lines(3);
    machine.check_count();
    // Its disk is written.
    machine.exec(
        "a=$(cat /count); until b=$(cat /count); [ -n \"$b\" -a \"$b\" != \"$a\" ]; do sleep 0.1; done",
    );
}

/// A step, a victim, and the state that is left.
type Case = (&'static str, Victim, &'static str);

/// Each step with each victim; nobody minds the end of the command.
fn cases(steps: &[(&'static str, &'static str, &'static str)], without: &'static str) -> Vec<Case> {
    let each = |&(step, by_monitor, by_vmm): &_| {
        [(step, V::Command, without), (step, V::Monitor, by_monitor), (step, V::Vmm, by_vmm)]
    };
    steps.iter().flat_map(each).collect()
}

#[test]
fn a_machine_that_starts_again_in_the_midst_of_a_suspend_tells_so_and_can_be_suspended() {
    let hold = Hold::at("vmm writes");
    let machine = Machine("k-restart".into());
    let flags = ["--network", "none", "--restart", "on-failure:1"];
    hold.on(Machine::invocation("k-restart", &flags, COUNTER)).end().code(0);
    machine.wait_for_lines(2);
    let mut suspend = machine.invoke(&["suspend"]).build(&[]);
    suspend.stdin(std::process::Stdio::null()).stdout(std::process::Stdio::null());
    let client = suspend.stderr(std::process::Stdio::piped()).spawn().unwrap();
    assert_eq!(hold.reached(), processes(&machine).1);
    kill(processes(&machine).1);
    let told = client.wait_with_output().unwrap();
    assert!(!told.status.success());
    let message = String::from_utf8(told.stderr).unwrap();
    assert!(message.contains("it ended before it was on disk"), "{message}");
    // Nobody is to wait there again.
    drop(hold);
    machine.wait_for_state("started");
    assert_eq!(machine.inspect("restarts"), 1);
    machine.invoke(&["suspend"]).end().code(0);
    assert_eq!(machine.state(), "suspended");
    machine.invoke(&["resume"]).end().code(0);
    machine.check_count();
}

#[test]
fn a_kill_at_any_step_of_a_suspend_leaves_what_there_was() {
    // Until its snapshot is whole, a machine ends with its monitor or its VMM as it does at any time; from then on it is on disk.
    // A VMM that writes goes on without its monitor.
    let steps = [
        ("suspending recorded", "failed", "failed"),
        ("stands", "failed", "failed"),
        ("vmm writes", "suspended", "failed"),
        ("vmm has written memory", "suspended", "failed"),
        ("vmm has written state", "suspended", "failed"),
        ("vmm has put in place", "suspended", "suspended"),
        ("snapshot told of", "suspended", "suspended"),
        ("suspended recorded", "suspended", "suspended"),
    ];
    let cases = cases(&steps, "suspended");
    let mut hold = Hold::at(cases[0].0);
    let machine = Machine("k-suspend".into());
    hold.on(Machine::invocation("k-suspend", &["--network", "none"], COUNTER)).end().code(0);
    for (index, (step, victim, left)) in cases.iter().enumerate() {
        let told = format!("{victim:?} killed at '{step}'");
        println!("{told}");
        machine.wait_for_lines(2);
        kill_there(&machine, &hold, "suspend", *victim);
        machine.wait_for_state(left);
        hold = Hold::at(cases.get(index + 1).map_or("none", |next| next.0));
        check_repaired(&machine, left, &hold, &told);
    }
}

#[test]
fn a_kill_at_any_step_of_a_resume_leaves_the_snapshot_or_the_machine() {
    // Once guest-init is told to go on the machine runs, and ends with its monitor or its VMM.
    let steps = [
        ("vmm spawned", "suspended", "suspended"),
        ("vmm has restored", "suspended", "suspended"),
        ("guest-init connected", "suspended", "suspended"),
        ("resume recorded", "suspended", "suspended"),
        ("snapshot invalidated", "failed", "failed"),
    ];
    let nowhere = Hold::at("none");
    let machine = Machine::start("k-resume", &["--network", "none"], COUNTER);
    for (step, victim, left) in cases(&steps, "started") {
        let told = format!("{victim:?} killed at '{step}'");
        println!("{told}");
        machine.wait_for_lines(2);
        machine.call(&["suspend"]).code(0);
        kill_there(&machine, &Hold::at(step), "resume", victim);
        machine.wait_for_state(left);
        check_repaired(&machine, left, &nowhere, &told);
    }
}

/// Answers its stop signal.
const POLITE: &str =
    "trap 'echo bye; exit 5' TERM; trap 'echo hup' HUP; echo ready; while :; do sleep 0.1; done";

#[test]
fn a_stop_reaches_a_machine_that_is_just_being_resumed() {
    for step in ["vmm has restored", "guest-init connected", "resume recorded"] {
        let machine = Machine::start("k-stop", &["--network", "none", "--stop-timeout", "600"], POLITE);
        wait_until("it is ready", || machine.log() == "ready");
        machine.call(&["suspend"]).code(0);
        let hold = Hold::at(step);
        let start = |word: &'static str| {
            let mut command = hold.on(machine.invoke(&[word])).build(&[]);
            command.stdout(std::process::Stdio::null()).spawn().unwrap()
        };
        let mut resume = start("resume");
        let held = hold.reached();
        let mut stop = start("stop");
        wait_until("the stop has been asked for", || clients(&machine) >= 1);
        hold.release(held);
        assert_eq!(stop.wait().unwrap().code(), Some(0), "{step}");
        resume.wait().unwrap();
        let outcome = machine.inspect("outcome");
        assert_eq!(outcome["exit_code"], 5, "{step}: {outcome}");
        assert_eq!(machine.log(), "ready\nbye", "{step}");
    }
}

#[test]
fn a_resume_ends_a_suspend_at_every_stage() {
    for step in
        ["suspending recorded", "stands", "vmm writes", "vmm has written memory", "vmm has written state"]
    {
        let hold = Hold::at(step);
        let machine = Machine("k-undo".into());
        hold.on(Machine::invocation("k-undo", &["--network", "none"], COUNTER)).end().code(0);
        machine.wait_for_lines(2);
        let spawn = |word: &'static str| {
            let mut command = machine.invoke(&[word]).build(&[]);
            command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::piped()).spawn().unwrap()
        };
        let suspend = spawn("suspend");
        let held = hold.reached();
        let resume = spawn("resume");
        // Where the monitor itself is held it has not read the request, which waits for it.
        wait_until("both have asked", || clients(&machine) >= 2);
        if step.starts_with("vmm") {
            wait_until("the VMM has been told", || has_unread(held));
        }
        hold.release(held);
        let resumed = resume.wait_with_output().unwrap();
        assert!(resumed.status.success(), "{step}: {}", String::from_utf8_lossy(&resumed.stderr));
        let given_up = suspend.wait_with_output().unwrap();
        let told = String::from_utf8_lossy(&given_up.stderr).into_owned();
        assert_eq!(given_up.status.code(), Some(125), "{step}: {told}");
        assert!(told.contains("told to go on instead"), "{step}: {told}");
        assert_eq!(machine.state(), "started", "{step}");
        assert_eq!(machine.last_start(), "cold_boot", "{step}: it has never been on disk");
        machine.wait_for_lines(3);
        machine.check_count();
        machine.call(&["suspend"]).code(0);
        machine.call(&["resume"]).code(0);
        machine.wait_for_lines(3);
        machine.check_count();
    }
}

/// Whether something waits in one of a process's sockets.
fn has_unread(pid: i32) -> bool {
    let told = std::process::Command::new("ss").args(["-x", "-p", "-n", "-H"]).output().unwrap();
    let told = String::from_utf8_lossy(&told.stdout).into_owned();
    let own = format!("pid={pid},");
    told.lines().any(|line| line.contains(&own) && line.split_whitespace().nth(2) != Some("0"))
}

/// How many are connected to the machine's monitor.
fn clients(machine: &Machine) -> usize {
    let socket = format!("{}/monitor", machine.inspect("run_directory").as_str().unwrap());
    let sockets = std::fs::read_to_string("/proc/net/unix").unwrap();
    // State 03 is a connection (net/unix/af_unix.c, unix_seq_show).
    let is_client = |line: &&str| line.ends_with(&socket) && line.split_whitespace().nth(5) == Some("03");
    sockets.lines().filter(is_client).count()
}

#[test]
fn a_resume_ends_a_suspend_that_waits_for_a_process_which_cannot_stand_still() {
    // A process that writes to a frozen filesystem neither runs nor stands still.
    let script = "fsfreeze --freeze /data; echo ready; echo x > /data/file; echo written; exec sleep 100000";
    let machine = Machine::start("k-stuck", &["--network", "none", "-v", "k-stuck:/data"], script);
    wait_until("it is ready", || machine.log() == "ready");
    let mut suspend = machine.invoke(&["suspend"]).build(&[]);
    let suspend =
        suspend.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::piped()).spawn().unwrap();
    wait_until("it is being suspended", || machine.state() == "suspending");
    machine.call(&["resume"]).code(0);
    let told = suspend.wait_with_output().unwrap();
    let told = String::from_utf8_lossy(&told.stderr).into_owned();
    assert!(told.contains("told to go on instead"), "{told}");
    assert_eq!(machine.state(), "started");
    machine.exec("fsfreeze --unfreeze /data");
    wait_until("the process goes on", || machine.log() == "ready\nwritten");
    machine.call(&["rm", "-f"]).code(0);
    command(&["volume", "rm", "k-stuck"]).end().code(0);
}
