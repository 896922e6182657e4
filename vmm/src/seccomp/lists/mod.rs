//! What each kind of thread may ask of the host: one list a file. `build.rs` compiles them, `flyrun-vmm seccomp` prints them.
//!
//! What is not listed ends the process ([`super::report`]). So does a listed call whose arguments are none of its cases.

mod main_thread;
mod values;
mod vcpu;
mod watchdog;
mod worker;

/// A system call that may be made.
#[derive(Clone, Copy, Debug)]
pub struct Call {
    /// Its name.
    pub name: &'static str,
    /// With arguments that are one of these cases; with any if there is none.
    pub cases: &'static [Case],
    /// What it is for.
    pub why: &'static str,
}

/// Checks of arguments, all of which hold.
pub type Case = &'static [Check];

/// A check of one argument, whose low 32 bits are looked at: the kernel takes no more of those that are checked here.
#[derive(Clone, Copy, Debug)]
pub struct Check {
    /// Which, from 0 on.
    pub argument: u8,
    /// What is compared.
    pub test: Test,
    /// What with.
    pub value: Value,
}

/// A comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Test {
    /// The argument is the value.
    Is,
    /// The argument has none of the value's bits.
    Lacks,
}

/// A number, and what it is called.
#[derive(Clone, Copy, Debug)]
pub struct Value {
    /// Its name in the kernel's headers.
    pub name: &'static str,
    /// The number.
    pub number: u32,
}

/// The calls of one kind of thread.
#[derive(Clone, Copy, Debug)]
pub struct List {
    /// The kind, as [`super::Thread`] has it.
    pub thread: &'static str,
    /// What such a thread does.
    pub does: &'static str,
    /// The most it may have: what Firecracker 1.17 allows such a thread.
    pub limit: usize,
    /// This one is decided first, as it is made at each exit of the guest.
    pub hot: &'static str,
    /// What it may ask for.
    pub calls: &'static [Call],
}

/// All lists.
pub const LISTS: [List; 4] = [main_thread::LIST, vcpu::LIST, worker::LIST, watchdog::LIST];

const fn any(name: &'static str, why: &'static str) -> Call {
    Call { name, cases: &[], why }
}

const fn only(name: &'static str, cases: &'static [Case], why: &'static str) -> Call {
    Call { name, cases, why }
}

const fn is(argument: u8, value: Value) -> Check {
    Check { argument, test: Test::Is, value }
}

const fn lacks(argument: u8, value: Value) -> Check {
    Check { argument, test: Test::Lacks, value }
}

/// ioctl's request.
const fn request(value: Value) -> Check {
    is(1, value)
}
