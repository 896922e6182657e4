//! The lists as `flyrun-vmm seccomp` prints them.

use std::fmt::Write;

use serde_json::{Value, json};

use super::lists::{Call, Check, LISTS, Test};

/// For people.
pub fn table() -> String {
    let mut text = String::new();
    for list in LISTS {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{} ({} calls): {}", list.thread, list.calls.len(), list.does);
        for call in list.calls {
            let _ = writeln!(text, "  {:<16} {}", call.name, call.why);
            for (line, word) in
                wrapped(&cases(call), 80).iter().zip(["only"].into_iter().chain(std::iter::repeat("or")))
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
    let call = |call: &Call| json!({ "call": call.name, "only": cases(call), "why": call.why });
    let lists = LISTS.map(|list| {
        let calls: Vec<_> = list.calls.iter().map(call).collect();
        json!({ "thread": list.thread, "does": list.does, "count": calls.len(), "calls": calls })
    });
    json!({ "threads": lists, "otherwise": "trap", "exit_code": crate::exit::VmExit::Forbidden.code() })
}

/// What arguments a call may have, one case each.
fn cases(call: &Call) -> Vec<String> {
    let case = |checks: &&[Check]| checks.iter().map(check).collect::<Vec<_>>().join(" and ");
    call.cases.iter().map(case).collect()
}

fn check(check: &Check) -> String {
    let test = match check.test {
        Test::Is => "is",
        Test::Lacks => "lacks",
    };
    format!("argument {} {test} {}", check.argument, check.value.name)
}

/// Lines of about this width; the cases of one argument are said once.
fn wrapped(cases: &[String], width: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for case in cases {
        let common = case.rfind(' ').map_or("", |end| case.get(..=end).unwrap_or_default());
        match lines.last_mut() {
            Some(line) if line.len() + case.len() < width && line.starts_with(common) => {
                line.push_str(" or ");
                line.push_str(case.get(common.len()..).unwrap_or_default());
            }
            _ => lines.push(case.clone()),
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_tell_all_calls_of_all_threads() {
        let (table, json) = (table(), json());
        for list in LISTS {
            let told =
                json["threads"].as_array().unwrap().iter().find(|it| it["thread"] == list.thread).unwrap();
            assert_eq!(told["count"], list.calls.len());
            for call in list.calls {
                assert!(table.contains(call.why), "{}", call.why);
                assert!(told["calls"].as_array().unwrap().iter().any(|it| it["call"] == call.name));
            }
        }
        assert!(table.contains("only argument 1 is KVM_RUN or KVM_KVMCLOCK_CTRL"), "{table}");
        assert!(table.contains("only argument 2 lacks PROT_EXEC"), "{table}");
        assert!(table.lines().all(|line| line.len() < 140));
    }
}
