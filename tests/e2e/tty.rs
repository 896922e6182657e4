//! Terminals.

use tests::Flyrun;
use tests::image::busybox;
use tests::terminal::Terminal;

#[test]
fn a_terminal_has_the_size_of_the_user_s() {
    let image = busybox();
    let terminal =
        Terminal::start(&Flyrun::shared().run(&["-it", &image, "sh", "-c", "stty size; tty"]), 33, 101);
    let (status, shown) = terminal.end();
    assert_eq!(status.code(), Some(0), "{shown}");
    assert!(shown.contains("33 101") && shown.contains("/dev/pts/"), "{shown}");
}

#[test]
fn a_resize_reaches_the_process() {
    let image = busybox();
    let script = "trap 'stty size' WINCH; echo ready; while :; do sleep 0.1; done";
    let mut terminal = Terminal::start(&Flyrun::shared().run(&["-it", &image, "sh", "-c", script]), 24, 80);
    terminal.wait_for("ready");
    terminal.resize(51, 133);
    terminal.wait_for("51 133");
    terminal.send("\x03");
    assert_eq!(terminal.end().0.code(), Some(130));
}

#[test]
fn a_shell_answers_what_is_typed() {
    let image = busybox();
    let mut terminal = Terminal::start(&Flyrun::shared().run(&["-it", &image, "sh"]), 24, 80);
    terminal.wait_for("# ");
    terminal.send("echo six times seven is $((6 * 7))\n");
    terminal.wait_for("seven is 42");
    terminal.send("exit 4\n");
    assert_eq!(terminal.end().0.code(), Some(4));
}

#[test]
fn control_c_interrupts_the_foreground_and_not_the_shell() {
    let image = busybox();
    let mut terminal = Terminal::start(&Flyrun::shared().run(&["-it", &image, "sh"]), 24, 80);
    terminal.wait_for("# ");
    // The child says it: an interrupt that comes before the terminal is the child's goes to the shell.
    terminal.send("sh -c 'echo begin; exec sleep 1000'\n");
    terminal.wait_for("begin\r\n");
    terminal.send("\x03");
    terminal.send("echo still $((40 + 2))\n");
    terminal.wait_for("still 42");
    terminal.send("exit\n");
    // A shell that is interrupted remembers 130 until its next command.
    assert_eq!(terminal.end().0.code(), Some(0));
}

#[test]
fn a_terminal_has_one_stream_and_no_stderr_of_its_own() {
    Flyrun::shared()
        .run(&["-t", &busybox(), "sh", "-c", "echo out; echo err >&2"])
        .end()
        .code(0)
        .prints("out\r\nerr");
}
