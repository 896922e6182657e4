//! Failures of `flyrun run`, and what the user reads.

use serde_json::json;
use tests::Flyrun;
use tests::flyrun::scratch;
use tests::image::{Layer, busybox, write_layout};
use tests::tar::Tar;

#[test]
fn a_missing_command_gives_127_and_its_name() {
    Flyrun::shared().run(&[&busybox(), "no-such-command"]).end().code(127).complains_about("no-such-command");
    Flyrun::shared().run(&[&busybox(), "/no/such/file"]).end().code(127).complains_about("/no/such/file");
}

#[test]
fn what_cannot_be_executed_gives_126() {
    Flyrun::shared().run(&[&busybox(), "/etc/passwd"]).end().code(126).complains_about("/etc/passwd");
    Flyrun::shared().run(&[&busybox(), "/etc"]).end().code(126).complains_about("/etc");
}

#[test]
fn a_program_of_no_known_format_gives_126() {
    let directory = scratch();
    let layer = Layer::gzip(&Tar::new().file("bin/odd", 0o755, b"\x7fNOT an ELF").finish());
    let image = write_layout(directory.path(), &[Layer::busybox(), layer], &json!({}));
    Flyrun::shared().run(&[&image, "/bin/odd"]).end().code(126).complains_about("/bin/odd");
}

#[test]
fn a_script_without_its_interpreter_gives_127() {
    let directory = scratch();
    let layer = Layer::gzip(&Tar::new().file("bin/script", 0o755, b"#!/bin/perl6\n").finish());
    let image = write_layout(directory.path(), &[Layer::busybox(), layer], &json!({}));
    Flyrun::shared().run(&[&image, "/bin/script"]).end().code(127).complains_about("/bin/script");
}

#[test]
fn an_unknown_user_or_group_gives_125() {
    Flyrun::shared()
        .run(&["-u", "somebody", &busybox(), "true"])
        .end()
        .fails_clearly()
        .complains_about("somebody");
    Flyrun::shared()
        .run(&["-u", "root:fellows", &busybox(), "true"])
        .end()
        .fails_clearly()
        .complains_about("fellows");
}

#[test]
fn an_image_without_a_command_asks_for_one() {
    let directory = scratch();
    let image = write_layout(directory.path(), &[Layer::busybox()], &json!({}));
    Flyrun::shared().run(&[&image]).end().fails_clearly().complains_about("command");
}

#[test]
fn a_missing_image_is_named() {
    Flyrun::shared()
        .run(&["oci:/no/such/layout", "true"])
        .end()
        .fails_clearly()
        .complains_about("/no/such/layout");
    Flyrun::shared().run(&["/no/such.tar", "true"]).end().fails_clearly().complains_about("/no/such.tar");
}

#[test]
fn wrong_usage_gives_125() {
    Flyrun::shared().run(&["--no-such-flag", &busybox()]).end().code(125).complains_about("--no-such-flag");
    Flyrun::shared().run(&["--cpus", "33", &busybox(), "true"]).end().code(125).complains_about("33");
    Flyrun::shared()
        .run(&["--memory", "7m", &busybox(), "true"])
        .end()
        .fails_clearly()
        .complains_about("memory");
    Flyrun::shared()
        .run(&["--kernel", "/no/kernel", &busybox(), "true"])
        .end()
        .fails_clearly()
        .complains_about("/no/kernel");
}

#[test]
fn a_file_that_is_no_kernel_is_refused() {
    Flyrun::shared()
        .run(&["--kernel", "/etc/passwd", &busybox(), "true"])
        .end()
        .fails_clearly()
        .complains_about("kernel");
}

#[test]
fn a_terminal_with_input_needs_a_terminal() {
    Flyrun::shared().run(&["-it", &busybox(), "true"]).end().fails_clearly().complains_about("terminal");
}

#[test]
fn parts_that_are_not_installed_are_named() {
    let directory = scratch();
    Flyrun::shared()
        .run(&[&busybox(), "true"])
        .env("FLYRUN_LIB", directory.path())
        .end()
        .fails_clearly()
        .complains_about("flyrun-vmm");
}

#[test]
fn a_host_without_kvm_is_told_so() {
    let hidden = ["unshare", "--mount", "sh", "-c", "mount --bind /dev/null /dev/kvm && exec \"$0\" \"$@\""];
    Flyrun::shared().run(&[&busybox(), "true"]).end_under(&hidden).fails_clearly().complains_about("kvm");
}

#[test]
fn a_full_disk_of_the_machine_is_the_process_s_own_error() {
    let script = "dd if=/dev/zero of=/big bs=1M count=100 2>/dev/shm/error; cat /dev/shm/error >&2";
    Flyrun::shared()
        .run(&["--disk", "64m", &busybox(), "sh", "-c", script])
        .end()
        .code(0)
        .complains_about("No space left");
}
