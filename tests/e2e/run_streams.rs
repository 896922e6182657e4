//! Exit codes and standard streams.

use tests::Flyrun;
use tests::image::{busybox, sha256};

#[test]
fn the_exit_code_is_the_process_s() {
    Flyrun::shared().run(&[&busybox(), "sh", "-c", "exit 7"]).end().code(7);
    Flyrun::shared().run(&[&busybox(), "true"]).end().code(0);
}

#[test]
fn a_process_ended_by_a_signal_gives_128_and_its_number() {
    Flyrun::shared().run(&[&busybox(), "sh", "-c", "kill -9 $$"]).end().code(137);
    Flyrun::shared().run(&[&busybox(), "sh", "-c", "kill -TERM $$"]).end().code(143);
}

#[test]
fn stdout_and_stderr_stay_apart() {
    let outcome = Flyrun::shared()
        .run(&[&busybox(), "sh", "-c", "echo to stdout; echo to stderr >&2"])
        .end()
        .code(0)
        .prints("to stdout");
    assert_eq!(outcome.errors(), "to stderr\n");
}

#[test]
fn a_silent_run_of_a_cached_image_says_nothing_of_its_own() {
    Flyrun::shared().run(&[&busybox(), "true"]).end().code(0);
    let outcome = Flyrun::shared().run(&[&busybox(), "true"]).end().code(0).prints("");
    assert_eq!(outcome.errors(), "");
}

#[test]
fn stdin_is_passed_with_i() {
    Flyrun::shared().run(&["-i", &busybox(), "cat"]).stdin("hi\n").end().code(0).prints("hi");
}

#[test]
fn stdin_is_empty_without_i() {
    Flyrun::shared()
        .run(&[&busybox(), "sh", "-c", "cat; echo end"])
        .stdin("hi\n")
        .end()
        .code(0)
        .prints("end");
}

#[test]
fn three_megabytes_of_every_byte_pass_through_unharmed() {
    let bytes: Vec<u8> =
        (0..3_000_000u32).map(|index| (index.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let outcome = Flyrun::shared().run(&["-i", &busybox(), "cat"]).stdin(bytes.clone()).end().code(0);
    assert_eq!(
        sha256(&outcome.stdout),
        sha256(&bytes),
        "{} of {} bytes came back",
        outcome.stdout.len(),
        bytes.len()
    );
}

#[test]
fn a_process_may_leave_its_input_unread() {
    Flyrun::shared().run(&["-i", &busybox(), "true"]).stdin(vec![b'x'; 1 << 20]).end().code(0).prints("");
}

#[test]
fn output_written_just_before_the_end_arrives_whole() {
    let script = "i=0; while [ $i -lt 2000 ]; do echo line $i; i=$((i+1)); done; exit 3";
    let outcome = Flyrun::shared().run(&[&busybox(), "sh", "-c", script]).end().code(3);
    assert_eq!(outcome.text().lines().count(), 2000);
    assert!(outcome.text().ends_with("line 1999"));
}

#[test]
fn output_of_processes_left_behind_does_not_keep_the_machine() {
    let script = "(while :; do sleep 1; done) & echo started";
    Flyrun::shared().run(&[&busybox(), "sh", "-c", script]).end().code(0).prints("started");
}
