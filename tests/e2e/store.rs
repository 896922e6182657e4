//! The image store: `pull`, `images`, `rmi`, `prune`.

use tests::Flyrun;
use tests::image::busybox;

#[test]
fn an_image_is_listed_removed_and_pruned() {
    let flyrun = Flyrun::fresh();
    let mut pulled = flyrun.command(&["pull", "--json", &busybox()]).end().code(0);
    let pulled = pulled.json();
    assert_eq!(pulled["layers"], 1, "{pulled}");
    let mut listed = flyrun.command(&["images", "--json"]).end().code(0);
    let listed = listed.json();
    assert_eq!(listed.as_array().unwrap().len(), 1, "{listed}");
    assert_eq!(listed[0]["name"], pulled["name"]);
    let name = pulled["name"].as_str().unwrap();
    flyrun.command(&["images"]).end().code(0).prints_something_with("IMAGE");

    flyrun.command(&["rmi", name]).end().code(0);
    flyrun.command(&["images", "--quiet"]).end().code(0).prints("");
    flyrun.command(&["rmi", name]).end().fails_clearly().complains_about("no image");
}

#[test]
fn prune_leaves_nothing_of_what_nobody_uses() {
    let flyrun = Flyrun::fresh();
    flyrun.run(&[&busybox(), "true"]).end().code(0);
    let before = flyrun.contents();
    assert!(before.iter().any(|line| line.contains("rootfs")), "{before:?}");
    flyrun.command(&["prune", "--all", "--json"]).end().code(0).json();
    let after = flyrun.contents();
    assert!(!after.iter().any(|line| line.starts_with("rootfs/") || line.starts_with("blobs/")), "{after:?}");
    flyrun.run(&[&busybox(), "echo", "again"]).end().code(0).prints("again");
}

#[test]
fn processes_that_want_the_same_image_at_once_share_it() {
    let flyrun = Flyrun::fresh();
    let outcomes: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..3)
            .map(|index| {
                let flyrun = &flyrun;
                scope.spawn(move || flyrun.run(&[&busybox(), "echo", &index.to_string()]).end())
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    for (index, outcome) in outcomes.into_iter().enumerate() {
        outcome.code(0).prints(&index.to_string());
    }
    let unpacked = flyrun.contents().iter().filter(|line| line.starts_with("rootfs/")).count();
    assert!(unpacked >= 1);
    let mut listed = flyrun.command(&["images", "--json"]).end().code(0);
    assert_eq!(listed.json().as_array().unwrap().len(), 1);
}

#[test]
fn rm_leaves_no_machine_behind() {
    let flyrun = Flyrun::fresh();
    flyrun.run(&[&busybox(), "true"]).end().code(0);
    // The lock on names belongs to all machines, and stays.
    let of_a_machine = |line: &String| line.starts_with("machines/") && !line.starts_with("machines/.names");
    let left: Vec<_> = flyrun.contents().into_iter().filter(of_a_machine).collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn a_name_is_taken_once() {
    let flyrun = Flyrun::fresh();
    flyrun.command(&["run", "--name", "one", &busybox(), "true"]).end().code(0);
    flyrun
        .command(&["run", "--name", "one", &busybox(), "true"])
        .end()
        .fails_clearly()
        .complains_about("one");
    flyrun.command(&["prune"]).end().code(0);
    flyrun.command(&["run", "--name", "one", &busybox(), "true"]).end().code(0);
}

#[test]
fn a_killed_flyrun_leaves_a_store_that_works() {
    let flyrun = Flyrun::fresh();
    for millis in [50, 200, 400, 800, 1600] {
        let mut child = flyrun.run(&[&busybox(), "true"]).build(&[]).spawn().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(millis));
        child.kill().unwrap();
        child.wait().unwrap();
    }
    flyrun.run(&[&busybox(), "echo", "fine"]).end().code(0).prints("fine");
}
