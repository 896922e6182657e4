//! The lists as `flyrun-vmm seccomp` prints them.
//!
//! From one text, which `build.rs` makes of them: each word of [`lists`](super::lists) would be an address that has to be relocated when the
//! program starts, which few of its starts need.

use std::fmt::Write;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

const LISTS: &str = include_str!(concat!(env!("OUT_DIR"), "/lists.json"));

/// The calls of one kind of thread.
#[derive(Serialize, Deserialize)]
struct List<'a> {
    thread: &'a str,
    does: &'a str,
    count: usize,
    #[serde(borrow)]
    calls: Vec<Call<'a>>,
}

#[derive(Serialize, Deserialize)]
struct Call<'a> {
    call: &'a str,
    /// What arguments it may have, one case each.
    #[serde(borrow)]
    only: Vec<&'a str>,
    why: &'a str,
}

/// For people.
pub fn table() -> String {
    let mut text = String::new();
    for List { thread, does, count, calls } in lists() {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{thread} ({count} calls): {does}");
        for Call { call, only, why } in calls {
            let _ = writeln!(text, "  {call:<16} {why}");
            for (line, word) in
                wrapped(&only, 80).iter().zip(["only"].into_iter().chain(std::iter::repeat("or")))
            {
                let _ = writeln!(text, "  {:<16}   {word:<4} {line}", "");
            }
        }
        text.push('\n');
    }
    text.push_str("Any other call, or one of these with other arguments, is not made: it ends flyrun-vmm with exit code 10.\n");
    text
}

/// For programs.
pub fn json() -> Value {
    let exit_code = crate::exit::VmExit::Forbidden.code();
    json!({ "threads": lists(), "otherwise": "trap", "exit_code": exit_code })
}

fn lists() -> Vec<List<'static>> {
    serde_json::from_str(LISTS).unwrap_or_default()
}

/// Lines of about this width; the cases of one argument are said once.
fn wrapped(cases: &[&str], width: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for case in cases {
        let common = case.rfind(' ').map_or("", |end| case.get(..=end).unwrap_or_default());
        match lines.last_mut() {
            Some(line) if line.len() + case.len() < width && line.starts_with(common) => {
                line.push_str(" or ");
                line.push_str(case.get(common.len()..).unwrap_or_default());
            }
            _ => lines.push((*case).to_owned()),
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::{super::lists::LISTS, *};

    #[test]
    fn both_forms_tell_all_calls_of_all_threads() {
        let (table, json) = (table(), json());
        assert_eq!(json["threads"].as_array().unwrap().len(), LISTS.len());
        for list in LISTS {
            let told =
                json["threads"].as_array().unwrap().iter().find(|it| it["thread"] == list.thread).unwrap();
            assert_eq!((&told["count"], &told["does"]), (&list.calls.len().into(), &list.does.into()));
            for call in list.calls {
                assert!(table.contains(call.why), "{}", call.why);
                let told =
                    told["calls"].as_array().unwrap().iter().find(|it| it["call"] == call.name).unwrap();
                assert_eq!(told["only"].as_array().unwrap().len(), call.cases.len(), "{}", call.name);
            }
        }
        assert!(table.contains("only argument 1 is KVM_RUN or KVM_KVMCLOCK_CTRL"), "{table}");
        assert!(table.contains("only argument 2 lacks PROT_EXEC"), "{table}");
        assert!(table.lines().all(|line| line.len() < 140));
    }
}
