//! Secrets reach workloads and nothing else, and files that a machine is given are there.

use std::fs;
use std::os::unix::net::UnixStream;
use std::process::Command;

use tests::Flyrun;
use tests::flyrun::Outcome;
use tests::image::busybox;
use tests::suspended::wait_until;

const TOKEN: &str = "correct-horse-battery-staple";
/// base64 of what is to be a file; neither may be found.
const KEY: &str = "LS0tIHByaXZhdGUga2V5IC0tLQo=";
const KEY_FILE: &str = "--- private key ---";
/// Says what it has without saying what that is, and stays.
const WORKLOAD: &str = "printf %s \"$TOKEN\" | md5sum; exec sleep 1000000";
/// md5 of [`TOKEN`].
const TOKEN_SUM: &str = "d4bda60d8d790aa9cde7a92177bd0bc6";

/// A store with the secrets of an app that is called shop.
struct Shop(Flyrun);

impl Shop {
    fn new() -> Shop {
        let shop = Shop(Flyrun::fresh());
        shop.set("TOKEN", TOKEN);
        shop.set("KEY", KEY);
        shop
    }

    fn set(&self, name: &str, value: &str) {
        let word = format!("{name}=-");
        let set = self.0.command(&["secrets", "set", "-a", "shop", &word]).stdin(value).end();
        set.code(0).prints("shop: 1 secret set; machines have them from their next start on");
    }

    fn call(&self, words: &[&str]) -> Outcome {
        self.0.command(words).end()
    }

    fn run(&self, flags: &[&str], script: &str) -> Outcome {
        let image = busybox();
        self.call(
            &[&["run", "--disk", "64m", "--network", "none"], flags, &[&image, "sh", "-c", script]].concat(),
        )
    }

    fn exec(&self, machine: &str, script: &str) -> String {
        self.call(&["exec", machine, "sh", "-c", script]).code(0).text()
    }

    /// Where on this host something of the secrets can be found: files of the store, of running machines, command lines. What a
    /// running monitor removes meanwhile is not complained about.
    fn traces(&self, but: &str) -> String {
        let directory = self.0.root().parent().unwrap().to_path_buf();
        let patterns = directory.with_extension("patterns");
        fs::write(&patterns, format!("{TOKEN}\n{KEY}\n{KEY_FILE}\n")).unwrap();
        let script = format!(
            "grep -rlaszF -f {patterns} {directory} --exclude={but}
             for file in /proc/[0-9]*/cmdline /proc/[0-9]*/environ; do grep -lazF -f {patterns} $file; done 2> /dev/null",
            patterns = patterns.display(),
            directory = directory.display(),
        );
        let output = Command::new("sh").args(["-c", &script]).output().unwrap();
        fs::remove_file(patterns).unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stderr), "");
        String::from_utf8(output.stdout).unwrap()
    }
}

impl Drop for Shop {
    fn drop(&mut self) {
        let machines = self.call(&["ps", "-aq"]).text();
        let names: Vec<&str> = machines.lines().collect();
        let _ = self.call(&[&["rm", "-f"], names.as_slice()].concat());
    }
}

#[test]
fn secrets_are_in_the_workload_and_nowhere_on_the_host() {
    let shop = Shop::new();
    for (name, how) in [("cold", &["--cold"][..]), ("base", &[])] {
        let flags =
            [&["-d", "--name", name, "-u", "nobody", "--secrets", "shop", "-e", "TOKEN=of the flags"], how];
        let files = ["--file-secret", "/etc/shop/key=KEY", "--file-literal", "/etc/shop/mode=test"];
        shop.run(&[&flags.concat()[..], &files].concat(), WORKLOAD).code(0);
        let mut inspected = shop.call(&["inspect", name]).code(0);
        let record = inspected.json()[0].clone();
        assert_eq!(record["last_start"]["kind"], if how.is_empty() { "base" } else { "cold_boot" });
        assert_eq!(record["config"]["secrets"], "shop");
        let has_printed = || shop.call(&["logs", name]).code(0).text().contains(TOKEN_SUM);
        wait_until("the workload has its secret", has_printed);
        assert_eq!(
            shop.exec(name, "echo $TOKEN; cat /etc/shop/mode; cat /etc/shop/key"),
            format!("{TOKEN}\ntest{KEY_FILE}")
        );
        assert_eq!(shop.exec(name, "cd /etc/shop; stat -c '%n %a %U' *"), "key 400 nobody\nmode 644 root");
        // Another user sees neither the file nor the environment of the process.
        shop.call(&["exec", "-u", "33", name, "cat", "/etc/shop/key"]).code(1);
        // Nor does whoever connects as guest-init did.
        let run = fs::read_dir(shop.0.root().with_file_name("run")).unwrap().flatten();
        assert!(
            run.map(|machine| machine.path().join("j/s/v_5"))
                .all(|socket| UnixStream::connect(socket).is_err())
        );
        assert_eq!(shop.traces("nothing"), "", "{name}");
    }
    shop.call(&["suspend", "base"]).code(0);
    // Memory on disk is what the workload has.
    assert!(shop.traces("nothing").ends_with("/memory\n"));
    assert_eq!(shop.traces("memory"), "");
    shop.set("TOKEN", "another");
    shop.call(&["resume", "base"]).code(0);
    assert_eq!(shop.exec("base", "echo $TOKEN"), TOKEN);
    for name in ["cold", "base"] {
        shop.call(&["stop", "-t", "0", name]).code(0);
        shop.call(&["start", name]).code(0);
        assert_eq!(shop.exec(name, "echo $TOKEN; cat /etc/shop/key"), format!("another\n{KEY_FILE}"));
    }
    shop.call(&["suspend", "base"]).code(0);
    shop.call(&["snapshot", "create", "--name", "warm", "base"]).code(0);
    shop.call(&["snapshot", "export", "warm", "-o", "/dev/null"])
        .fails_clearly()
        .complains_about("secrets of app 'shop'");
}

#[test]
fn files_are_there_on_a_read_only_root_too_and_cover_what_the_image_has() {
    let shop = Shop::new();
    let files = [
        "--file-literal",
        "/etc/passwd=nobody:x:65534:65534::/:/bin/sh",
        "--file-literal",
        "/new/dir/f=text",
    ];
    for root in [&["--read-only"][..], &[]] {
        let script = "cat /etc/passwd /new/dir/f; ls /dev/.delivery; touch /new/dir/g && echo written";
        let outcome = shop.run(&[&files[..], root].concat(), script);
        let expected = "nobody:x:65534:65534::/:/bin/shtext";
        let written = if root.is_empty() { "written" } else { "" };
        outcome.prints(&format!("{expected}{written}")).complains_about("/dev/.delivery");
    }
    let outcome = shop.run(&["--file-literal", "/etc=x"], "true");
    outcome.fails_clearly().complains_about("put a file at /etc");
}

#[test]
fn what_cannot_be_read_is_one_clear_error() {
    let shop = Shop::new();
    let run = |flags: &[&str]| shop.run(&[&["--secrets", "shop"], flags].concat(), "echo ran");
    run(&[]).code(0).prints("ran");
    shop.run(&["--secrets", "shoop"], "true").fails_clearly().complains_about("app 'shoop' has no secrets");
    run(&["--file-secret", "/k=NONE"]).fails_clearly().complains_about("NONE, which is not set");
    run(&["--file-secret", "/k=TOKEN"])
        .fails_clearly()
        .complains_about("TOKEN, which is to be the file /k, is not base64");

    let key = shop.0.root().join("other.key");
    fs::write(&key, "0".repeat(64)).unwrap();
    Command::new("chmod").arg("600").arg(&key).status().unwrap();
    let list = |key: &std::path::Path| {
        shop.0.command(&["secrets", "list", "-a", "shop"]).env("FLYRUN_SECRETS_KEY_FILE", key).end()
    };
    list(&key).fails_clearly().complains_about("encrypted with another key");
    Command::new("chmod").arg("644").arg(&key).status().unwrap();
    list(&key).fails_clearly().complains_about("chmod 600");

    let file = shop.0.root().join("secrets/shop");
    let whole = fs::read(&file).unwrap();
    fs::write(&file, &whole[..whole.len() / 10]).unwrap();
    run(&[]).fails_clearly().complains_about("truncated");
    let mut tampered = whole.clone();
    *tampered.last_mut().unwrap() ^= 1;
    fs::write(&file, tampered).unwrap();
    run(&[]).fails_clearly().complains_about("somebody has changed it");
    // A machine that is there already says the same at its next start.
    fs::write(&file, whole).unwrap();
    let image = busybox();
    shop.call(&["create", "--name", "made", "--network", "none", "--secrets", "shop", &image, "true"])
        .code(0);
    fs::remove_file(shop.0.root().join("secrets.key")).unwrap();
    shop.call(&["start", "made"]).fails_clearly().complains_about("is not there");
}

#[test]
fn secrets_are_imported_listed_and_unset() {
    let shop = Shop(Flyrun::fresh());
    let lines = "# of the shop\nA=1\nB=\"two words\"\nC=\"\"\"several\nlines\"\"\"\n";
    let import = shop.0.command(&["secrets", "import", "-a", "shop"]).stdin(lines).end();
    import.code(0).prints("shop: 3 secrets set; machines have them from their next start on");
    let mut listed = shop.call(&["secrets", "list", "-a", "shop", "--json"]).code(0);
    let listed = listed.json();
    let names: Vec<_> =
        listed.as_array().unwrap().iter().map(|secret| secret["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["A", "B", "C"]);
    assert!(
        listed[0]["digest"].as_str().is_some_and(|digest| digest.len() == 16)
            && listed[0].get("value").is_none()
    );
    shop.call(&["secrets", "unset", "-a", "shop", "A"]).code(0).prints_something_with("1 secret unset");
    shop.run(&["--rm", "--secrets", "shop"], "echo ${A-none} \"$B $C\"")
        .code(0)
        .prints("none two words several\nlines");
    for (words, told) in [
        (&["set", "-a", "shop", "FLY_REGION=x"][..], "FLY_"),
        (&["set", "-a", "shop", "noequals"], "without '='"),
        (&["set", "-a", "../x", "A=1"], "app's name"),
        (&["unset", "-a", "shop", "A"], "no secret A"),
        (&["import", "-a", "shop"], "no secrets"),
        (&["list"], "-a APP"),
    ] {
        shop.call(&[&["secrets"], words].concat()).fails_clearly().complains_about(told);
    }
}
