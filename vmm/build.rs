//! Compiles the seccomp filters: `src/seccomp/lists` becomes constants of BPF, and the text that is printed.

// Both are modules of the crate too, which prints what is only compiled here.
#[allow(dead_code, reason = "the crate uses the rest")]
#[path = "src/seccomp/lists/mod.rs"]
mod lists;
#[allow(dead_code, reason = "the crate uses the rest")]
#[path = "src/seccomp/names.rs"]
mod names;
#[path = "build/order.rs"]
mod order;
#[path = "build/shorten.rs"]
mod shorten;

use std::{env, error::Error, fmt::Write, fs, path::PathBuf};

use lists::{Call, Check, LISTS, List, Test};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch, sock_filter,
};
use serde_json::{Value, json};

/// What seccompiler begins each program with: loads the architecture, goes on if it is x86-64, kills the process; then loads
/// the number of the call.
const PROLOGUE: usize = 4;
/// How many calls there are, about.
const NUMBERS: u32 = 470;
// linux/bpf_common.h.
const BPF_JMP_JA_K: u16 = 0x05;
const BPF_JMP_JEQ_K: u16 = 0x15;
const BPF_JMP_JGE_K: u16 = 0x35;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=build");
    println!("cargo::rerun-if-changed=src/seccomp");
    order::tell();
    let mut text = String::from("pub(super) const PROGRAMS: &[(&str, &[sock_filter])] = &[\n");
    for list in LISTS {
        writeln!(text, "({:?}, &[", list.thread)?;
        for sock_filter { code, jt, jf, k } in program(&list)? {
            writeln!(text, "sock_filter {{ code: {code}, jt: {jt}, jf: {jf}, k: {k} }},")?;
        }
        text.push_str("]),\n");
    }
    text.push_str("];\n");
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("cargo sets no OUT_DIR")?);
    fs::write(out.join("filters.rs"), text)?;
    Ok(fs::write(out.join("lists.json"), Value::from_iter(LISTS.map(told)).to_string())?)
}

/// A list as it is printed.
fn told(list: List) -> Value {
    let calls = list.calls.iter().map(|call| {
        let only = call.cases.iter().map(|case| case.iter().map(check).collect::<Vec<_>>().join(" and "));
        json!({ "call": call.name, "only": only.collect::<Vec<_>>(), "why": call.why })
    });
    let calls = Value::from_iter(calls);
    json!({ "thread": list.thread, "does": list.does, "count": list.calls.len(), "calls": calls })
}

fn check(check: &Check) -> String {
    let test = match check.test {
        Test::Is => "is",
        Test::Lacks => "lacks",
    };
    format!("argument {} {test} {}", check.argument, check.value.name)
}

/// A search by number leads to what seccompiler makes of a call: its own programs try one call behind another. That matters
/// when a filter is installed, as Linux then runs it for each number there is: 450 times, for two architectures.
fn program(list: &List) -> Result<BpfProgram, Box<dyn Error>> {
    let mut calls = Vec::with_capacity(list.calls.len());
    let (mut prologue, mut hot) = (Vec::new(), None);
    for call in list.calls {
        let number = names::number(call.name).ok_or_else(|| format!("no call is named {}", call.name))?;
        let program = alone(number, call)?;
        let (first, block) = program.split_at_checked(PROLOGUE).ok_or("seccompiler's prologue is another")?;
        prologue = first.to_vec();
        if call.name == list.hot {
            hot = Some((number, block.to_vec()));
        } else {
            calls.push((number, block.to_vec()));
        }
    }
    let (number, hot) = hot.ok_or_else(|| format!("{} is not in the list of {}", list.hot, list.thread))?;
    calls.sort_by_key(|(number, _)| *number);
    let rest = search(&calls, NUMBERS)?;
    prologue.push(jump(BPF_JMP_JEQ_K, number, 0, 1));
    prologue.push(jump(BPF_JMP_JA_K, u32::try_from(rest.len())?, 0, 0));
    Ok(shorten::shorten(&[prologue, rest, hot].concat())?)
}

/// Each block decides: a call that is not its own is none of the list's. Both halves have about as many numbers, so that few
/// instructions are run for most of them.
fn search(calls: &[(u32, BpfProgram)], end: u32) -> Result<BpfProgram, Box<dyn Error>> {
    if let [(_, block)] = calls {
        return Ok(block.clone());
    }
    let number = |index: usize| calls.get(index).map_or(end, |(number, _)| *number);
    let middle = number(0).midpoint(end);
    let at =
        (1..calls.len()).min_by_key(|index| number(*index).abs_diff(middle)).ok_or("a list has no call")?;
    let (below, from) = calls.split_at(at);
    let first = &number(at);
    let (below, above) = (search(below, *first)?, search(from, end)?);
    let mut program = vec![jump(BPF_JMP_JGE_K, *first, 0, 1)];
    program.push(jump(BPF_JMP_JA_K, u32::try_from(below.len())?, 0, 0));
    Ok([program, below, above].concat())
}

/// What seccompiler makes of one call.
fn alone(number: u32, call: &Call) -> Result<BpfProgram, Box<dyn Error>> {
    let rules = call.cases.iter().map(|case| {
        let conditions = case.iter().map(condition).collect::<Result<_, _>>()?;
        SeccompRule::new(conditions)
    });
    let rules = rules.collect::<Result<Vec<_>, _>>()?;
    let rules = [(number.into(), rules)].into_iter().collect();
    let filter = SeccompFilter::new(rules, SeccompAction::Trap, SeccompAction::Allow, TargetArch::x86_64)?;
    Ok(filter.try_into()?)
}

fn condition(check: &Check) -> Result<SeccompCondition, seccompiler::BackendError> {
    let number = u64::from(check.value.number);
    let (operator, value) = match check.test {
        Test::Is => (SeccompCmpOp::Eq, number),
        Test::Lacks => (SeccompCmpOp::MaskedEq(number), 0),
    };
    SeccompCondition::new(check.argument, SeccompCmpArgLen::Dword, operator, value)
}

fn jump(code: u16, k: u32, jt: u8, jf: u8) -> sock_filter {
    sock_filter { code, jt, jf, k }
}
