//! A guest that holds state in every way that programs do, as `guest.py` describes it, and what the host sees of it when it is
//! suspended, resumed and cloned again and again.

mod clients;

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::Value;

use self::clients::Clients;
use crate::Flyrun;
use crate::flyrun::Outcome;
use crate::image::layout;
use crate::suspended::pid_of;

const GUEST: &str = include_str!("guest.py");
/// Where the guest answers questions.
const QUESTIONS: u16 = 7000;
/// How far its time of day may be off when its processes go on.
const CLOCK_TOLERANCE_NS: i64 = 5_000_000;
/// What two clocks that are compared over seconds may differ by.
const RATE_TOLERANCE: Duration = Duration::from_millis(5);
/// How long it stands still at least.
const STANDING: Duration = Duration::from_secs(1);
/// How often something is tried that is to come true soon.
const ATTEMPTS: usize = 600;
/// How often it is asked for its time.
const CLOCK_ATTEMPTS: usize = 10_000;
const PAUSE: Duration = Duration::from_millis(100);
/// How many random numbers the guest keeps of each life.
const RANDOMS: usize = 64;

/// Suspends the guest `cycles` times. Each `clone_every`th time it is cloned instead, and every other clone takes its place.
pub fn survives(flyrun: &Flyrun, cycles: usize, clone_every: usize) {
    let mut seen = BTreeSet::new();
    let mut resident = Resident::start(flyrun, "resident");
    resident.learn_randoms(&mut seen);
    let clients = Clients::start(resident.address());
    for cycle in 1..=cycles {
        if cycle % clone_every == 0 {
            let clone = resident.clone_as(&format!("resident-{cycle}"));
            for (told, machine) in [("the machine", &resident), ("the clone", &clone)] {
                println!("cycle {cycle}, {told}: {}", machine.check(&resident.before, &mut seen));
            }
            let (next, last) =
                if cycle / clone_every % 2 == 1 { (clone, resident) } else { (resident, clone) };
            resident = next;
            clients.move_to(resident.address());
            last.stop_and_remove();
        } else {
            resident.suspend_and_resume();
            clients.move_to(resident.address());
            println!("cycle {cycle}: {}", resident.check(&resident.before, &mut seen));
        }
        clients.wait_for_answers();
        resident.before = resident.state();
    }
    println!("{}", clients.end());
    resident.boot_again();
    resident.stop_and_remove();
}

/// A machine with the guest.
struct Resident<'a> {
    flyrun: &'a Flyrun,
    name: String,
    /// What the guest said before it was suspended last.
    before: Value,
}

impl<'a> Resident<'a> {
    fn start(flyrun: &'a Flyrun, name: &str) -> Resident<'a> {
        let image = layout("services");
        let words = ["run", "-d", "--name", name, "--memory", "384m", &image, "python3", "-c", GUEST];
        flyrun.command(&words).end().code(0);
        Resident::begun(flyrun, name)
    }

    fn begun(flyrun: &'a Flyrun, name: &str) -> Resident<'a> {
        let mut resident = Resident { flyrun, name: name.to_string(), before: Value::Null };
        for _ in 0..ATTEMPTS {
            if TcpStream::connect((resident.address(), QUESTIONS)).is_ok() {
                resident.before = resident.state();
                return resident;
            }
            if resident.inspect()["state"] != "started" {
                break;
            }
            sleep(PAUSE);
        }
        resident.fail("the guest does not begin");
    }

    fn call(&self, command: &[&str]) -> Outcome {
        self.flyrun.command(&[command, &[self.name.as_str()]].concat()).end()
    }

    fn inspect(&self) -> Value {
        self.call(&["inspect"]).code(0).json()[0].take()
    }

    fn address(&self) -> String {
        self.inspect()["network"]["ipv4"].as_str().unwrap_or_default().to_string()
    }

    /// Ends the test with what the guest has printed last.
    #[track_caller]
    fn fail(&self, why: &str) -> ! {
        let log = self.call(&["logs", "--tail", "20"]);
        let state = self.inspect();
        let console =
            std::fs::read_to_string(format!("{}/console.log", state["directory"].as_str().unwrap()));
        panic!(
            "{}: {why}\n--- its log:\n{}{}\n--- its console:\n{}\n--- it is {}, {}, {}",
            self.name,
            log.text(),
            log.errors(),
            console.unwrap_or_default(),
            state["state"],
            state["last_start"],
            state["outcome"]
        );
    }

    /// A connection of its own for each batch of questions, as none outlasts a suspend.
    fn questions(&self) -> Questions<'_> {
        match TcpStream::connect((self.address(), QUESTIONS)) {
            Ok(stream) => {
                stream.set_nodelay(true).unwrap();
                stream.set_read_timeout(Some(clients::HANGS)).unwrap();
                Questions { machine: self, stream: BufReader::new(stream) }
            }
            Err(error) => self.fail(&format!("it cannot be asked: {error}")),
        }
    }

    /// What the guest says of itself; nothing of that may be wrong.
    #[track_caller]
    fn state(&self) -> Value {
        let answer = self.questions().ask("state");
        let Ok(state) = serde_json::from_str::<Value>(&answer) else {
            self.fail(&format!("it says: {answer}"));
        };
        for complaints in ["problems", "kernel"] {
            if state[complaints].as_array().is_none_or(|complaints| !complaints.is_empty()) {
                self.fail(&format!("{complaints}: {}", state[complaints]));
            }
        }
        state
    }

    fn suspend_and_resume(&self) {
        let asked = Instant::now();
        let (before, _) = self.questions().time();
        self.call(&["suspend"]).code(0);
        let stands = Instant::now();
        sleep(STANDING);
        let stood = stands.elapsed();
        self.call(&["resume"]).code(0);
        self.ensure_resumed();
        let (after, _) = self.questions().time();
        let passed = Duration::from_nanos(u64::try_from(after - before).unwrap_or_else(|_| {
            self.fail(&format!("monotonic time went from {before} to {after}"));
        }));
        let limit = asked.elapsed() - stood + RATE_TOLERANCE;
        if passed > limit {
            self.fail(&format!("monotonic time went on by {passed:?} where it ran for at most {limit:?}"));
        }
    }

    fn ensure_resumed(&self) {
        let start = self.inspect()["last_start"].take();
        if start["kind"] != "resumed" {
            self.fail(&format!("it was not resumed: {start}"));
        }
    }

    fn clone_as(&self, name: &str) -> Resident<'a> {
        self.flyrun.command(&["clone", "--name", name, &self.name]).end().code(0);
        let clone = Resident { flyrun: self.flyrun, name: name.to_string(), before: self.before.clone() };
        for machine in [self, &clone] {
            machine.ensure_resumed();
        }
        assert_ne!(self.address(), clone.address());
        clone
    }

    /// Compares what there is after a resume with what there was `before`. Gives a line for the test's reader.
    fn check(&self, before: &Value, seen: &mut BTreeSet<String>) -> String {
        let (least, most) = self.clock_error_ns();
        let after = self.learn_randoms(seen);
        if after["generation"] == before["generation"] {
            self.fail("its generation is the one it had");
        }
        for count in ["committed", "rows", "counter", "kept"] {
            if number(&after, count) < number(before, count) {
                self.fail(&format!("{count} went from {} to {}", before[count], after[count]));
            }
        }
        // Everything moves on.
        for count in ["committed", "counter", "kept"] {
            self.wait_for(|now| number(now, count) > number(&after, count), count);
        }
        format!(
            "{} rows, redis at {}, a timer of 10 ms fired {} times at once, time of day off by {:.1} to {:.1} ms",
            after["rows"],
            after["counter"],
            after["first_expirations"],
            least as f64 / 1e6,
            most as f64 / 1e6
        )
    }

    #[track_caller]
    fn wait_for(&self, is_true: impl Fn(&Value) -> bool, told: &str) -> Value {
        for _ in 0..ATTEMPTS {
            let state = self.state();
            if is_true(&state) {
                return state;
            }
            sleep(PAUSE);
        }
        self.fail(&format!("{told} stands still"));
    }

    /// The limits between which the error of the guest's time of day lay when its processes went on.
    ///
    /// Its answer was true at some time between question and answer, so each of several narrows the limits down. Beside another
    /// machine that is busy none did so for minutes, in which the clocks of guest and host drift apart by milliseconds: meanwhile
    /// whoever asks and whoever answers go before all others.
    fn clock_error_ns(&self) -> (i64, i64) {
        let offset = self.state()["offset_ns"].as_i64().unwrap();
        let _first = Urgent::new(pid_of("flyrun-vmm", self.inspect()["id"].as_str().unwrap()));
        let mut questions = self.questions();
        let (mut least, mut most) = (i64::MIN, i64::MAX);
        for _ in 0..CLOCK_ATTEMPTS {
            let asked = realtime_ns();
            let (monotonic, _) = questions.time();
            let answered = realtime_ns();
            least = least.max(monotonic + offset - answered);
            most = most.min(monotonic + offset - asked);
            if least > CLOCK_TOLERANCE_NS || most < -CLOCK_TOLERANCE_NS {
                self.fail(&format!("its time of day was off by {least} to {most} ns"));
            }
            if least >= -CLOCK_TOLERANCE_NS && most <= CLOCK_TOLERANCE_NS {
                return (least, most);
            }
        }
        self.fail(&format!("all answers take too long to tell its time: it is off by {least} to {most} ns"));
    }

    /// Takes the random numbers of this life, none of which may have been seen.
    fn learn_randoms(&self, seen: &mut BTreeSet<String>) -> Value {
        let is_enough = |state: &Value| state["randoms"].as_array().is_some_and(|all| all.len() >= RANDOMS);
        let state = self.wait_for(is_enough, "what reads random numbers");
        for random in state["randoms"].as_array().unwrap().iter().chain([&state["generation"]]) {
            if !seen.insert(random.as_str().unwrap().to_string()) {
                self.fail(&format!("{random} is no new random number"));
            }
        }
        state
    }

    /// What is on the disk is what was committed: all of it, before a boot and behind it.
    fn boot_again(&self) {
        let committed = number(&self.state(), "committed");
        self.stop();
        self.call(&["start"]).code(0);
        let booted = Resident::begun(self.flyrun, &self.name);
        let found = number(&booted.before, "found");
        if found < committed {
            self.fail(&format!("{committed} rows were committed, and {found} are there after a boot"));
        }
    }

    /// Ends the guest in good order, and lets e2fsck look at its disk.
    fn stop(&self) {
        self.call(&["stop", "-t", "120"]).code(0);
        let inspected = self.inspect();
        if inspected["outcome"]["exit_code"] != 0 {
            self.fail("it did not end in good order");
        }
        let disk = format!("{}/disk.ext4", inspected["directory"].as_str().unwrap());
        let checked = Command::new("e2fsck").args(["-f", "-n", &disk]).output().unwrap();
        if !checked.status.success() {
            self.fail(&format!("e2fsck: {}", String::from_utf8_lossy(&checked.stdout)));
        }
        self.check_log();
    }

    /// No line of the log is missing, whatever happened between two of them.
    fn check_log(&self) {
        let log = self.call(&["logs"]).code(0).text();
        let numbers = log.lines().filter_map(|line| line.strip_prefix("committed "));
        let numbers: Vec<u64> = numbers.map(|number| number.parse().unwrap()).collect();
        if let Some(gap) = numbers.windows(2).find(|pair| pair[1] != pair[0] + 1) {
            self.fail(&format!("in its log row {} follows row {}", gap[1], gap[0]));
        }
    }

    fn stop_and_remove(self) {
        self.stop();
        self.call(&["rm"]).code(0);
    }
}

/// Two that have the processor before all who have no priority, until this is dropped: this thread, and a machine's VMM with its guest.
struct Urgent {
    thread: i32,
    vmm: i32,
}

impl Urgent {
    fn new(vmm: i32) -> Urgent {
        let thread = rustix::thread::gettid().as_raw_nonzero().get();
        schedule(&["-f", "-p", "2", &thread.to_string()]);
        schedule(&["-a", "-f", "-p", "1", &vmm.to_string()]);
        Urgent { thread, vmm }
    }
}

impl Drop for Urgent {
    fn drop(&mut self) {
        schedule(&["-o", "-p", "0", &self.thread.to_string()]);
        // Its guest may have ended meanwhile, of which the test tells.
        let _ = Command::new("chrt").args(["-a", "-o", "-p", "0", &self.vmm.to_string()]).output();
    }
}

#[track_caller]
fn schedule(words: &[&str]) {
    let output = Command::new("chrt").args(words).output().unwrap();
    assert!(output.status.success(), "chrt {words:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A connection to the guest.
struct Questions<'a> {
    machine: &'a Resident<'a>,
    stream: BufReader<TcpStream>,
}

impl Questions<'_> {
    #[track_caller]
    fn ask(&mut self, question: &str) -> String {
        let mut answer = String::new();
        let asked = self.stream.get_mut().write_all(format!("{question}\n").as_bytes());
        match asked.and_then(|()| self.stream.read_line(&mut answer)) {
            Ok(1..) => answer,
            told => self.machine.fail(&format!("asked for its {question} it does not answer: {told:?}")),
        }
    }

    /// The guest's monotonic time and its time of day, in nanoseconds.
    #[track_caller]
    fn time(&mut self) -> (i64, i64) {
        let answer = self.ask("time");
        let (monotonic, real) = answer.trim().split_once(' ').unwrap();
        (monotonic.parse().unwrap(), real.parse().unwrap())
    }
}

fn number(state: &Value, name: &str) -> u64 {
    state[name].as_u64().unwrap()
}

fn realtime_ns() -> i64 {
    i64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos()).unwrap()
}
