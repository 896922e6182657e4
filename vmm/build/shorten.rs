//! The same program with fewer instructions: what installing a filter costs grows with them, and a machine's resume waits for it.
//!
//! seccompiler leads every decision to a place of its own, by jumps to jumps, and loads what is looked at anew for each value. Here
//! jumps go where they end, what is loaded already is not loaded again, and each result stands once, at the end.
//! `vmm::seccomp` has a test that both programs decide alike.

use std::collections::BTreeMap;

use seccompiler::sock_filter;

// linux/bpf_common.h.
const CLASS: u16 = 0x07;
const RET: u16 = 0x06;
const JMP: u16 = 0x05;
const JA: u16 = 0x05;
const LD_W_ABS: u16 = 0x20;

/// What follows an instruction: where a jump goes if it is taken and if not; both are the same for what is no jump. BPF only jumps
/// forward.
#[derive(Clone, Copy)]
struct Edges(usize, usize);

/// The shorter program.
///
/// # Errors
/// It is no program of seccompiler's, or too long for its jumps.
pub fn shorten(program: &[sock_filter]) -> Result<Vec<sock_filter>, String> {
    let edges = edges(program)?;
    // In order, as all edges lead forward; results come behind the rest.
    let body: Vec<usize> = edges.keys().copied().collect();
    let mut results: Vec<u32> = Vec::new();
    for Edges(first, second) in edges.values() {
        for result in [first, second].into_iter().filter_map(|to| result(program, *to)) {
            if !results.contains(&result) {
                results.push(result);
            }
        }
    }
    let place = |index: usize| match result(program, index) {
        Some(result) => results.iter().position(|known| *known == result).map(|at| body.len() + at),
        None => body.binary_search(&index).ok(),
    };
    let mut short = Vec::with_capacity(body.len() + results.len());
    for (at, (index, Edges(taken, not))) in edges.iter().enumerate() {
        let skip = |to: usize| place(to)?.checked_sub(at + 1)?.try_into().ok();
        let (Some(jt), Some(jf)) = (skip(*taken), skip(*not)) else {
            return Err(format!("instruction {index} jumps too far"));
        };
        let instruction = instruction(program, *index)?;
        if instruction.code & CLASS != JMP && (jt, jf) != (0, 0) {
            return Err(format!("what follows instruction {index} is elsewhere"));
        }
        short.push(sock_filter { jt, jf, ..instruction });
    }
    short.extend(results.into_iter().map(|k| sock_filter { code: RET, jt: 0, jf: 0, k }));
    Ok(short)
}

/// All instructions that are reached and are neither results nor plain jumps, with what follows them.
fn edges(program: &[sock_filter]) -> Result<BTreeMap<usize, Edges>, String> {
    let mut edges = BTreeMap::new();
    // What the accumulator holds when an instruction is reached: what was loaded from there, or something else.
    let mut reached = BTreeMap::from([(0, None)]);
    while let Some((index, before)) = reached.pop_first() {
        let at = instruction(program, index)?;
        let after = match at.code {
            LD_W_ABS => Some(at.k),
            code if code & CLASS == JMP => before,
            _ => None,
        };
        let follow = |skip: u8| {
            let mut to = end_of_jumps(program, index + 1 + usize::from(skip))?;
            while after.is_some()
                && (instruction(program, to)?.code, Some(instruction(program, to)?.k)) == (LD_W_ABS, after)
            {
                to = end_of_jumps(program, to + 1)?;
            }
            Ok::<_, String>(to)
        };
        let found = match at.code & CLASS {
            JMP => Edges(follow(at.jt)?, follow(at.jf)?),
            _ => Edges(follow(0)?, follow(0)?),
        };
        for to in [found.0, found.1] {
            if result(program, to).is_none() {
                let known = reached.entry(to).or_insert(after);
                if *known != after {
                    *known = None;
                }
            }
        }
        edges.insert(index, found);
    }
    Ok(edges)
}

fn instruction(program: &[sock_filter], index: usize) -> Result<sock_filter, String> {
    program.get(index).cloned().ok_or_else(|| format!("nothing is at {index}"))
}

/// Where one gets who goes there.
fn end_of_jumps(program: &[sock_filter], mut index: usize) -> Result<usize, String> {
    loop {
        match instruction(program, index)? {
            sock_filter { code: JA, k, .. } => index += 1 + k as usize,
            _ => return Ok(index),
        }
    }
}

fn result(program: &[sock_filter], index: usize) -> Option<u32> {
    program.get(index).filter(|it| it.code == RET).map(|it| it.k)
}
