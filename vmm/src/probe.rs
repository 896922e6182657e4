//! Whether this host's KVM can run a guest kernel, found out by running a tiny one.
//!
//! Opening /dev/kvm is not enough: there are KVMs that run user code natively and emulate a guest's kernel one
//! instruction at a time, and fail at the first that they do not know.

use std::{
    sync::mpsc::{Receiver, RecvTimeoutError, channel},
    time::{Duration, Instant},
};

use devices::virtio::Memory;
use kvm_bindings::kvm_regs;
use kvm_ioctls::{Cap, Kvm, VcpuExit, VcpuFd, VmFd};
use serde::Serialize;
use vm_memory::{Bytes, GuestAddress};

use crate::{
    boot::registers,
    cpuid::Template,
    error::no_kvm,
    kick::{self, Kickable},
    memory,
    probe_code::{self, LOOP_INSTRUCTIONS, PORT, STEPS, place},
    seccomp::{self, Thread},
};

const API: i32 = 12;
/// A guest on the slowest sound host (QEMU emulating SVM) is through in 20 ms, and under load in some 100.
const TIME_LIMIT: Duration = Duration::from_secs(3);
/// How much slower than this process the guest may run its loop. Emulation was measured at 500 ns an instruction, which is
/// 1000 times, and sound hosts at 1 to 2.
const MAX_SLOWDOWN: u32 = 50;
const ECX1_XSAVE: u32 = 1 << 26;
const CR4_OSFXSR_OSXMMEXCPT: u64 = 0b11 << 9;
const CR4_OSXSAVE: u64 = 1 << 18;
const PROBE_MIB: u32 = 2;

/// What flyrun-vmm cannot do without.
const CAPABILITIES: [(Cap, &str); 8] = [
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
];

/// What the probe found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "verdict", rename_all = "snake_case")]
pub enum Verdict {
    /// A guest kernel runs.
    Ok {
        /// Mean time of one instruction of the guest's loop.
        ns_per_instruction: u64,
    },
    /// /dev/kvm is not there.
    NoDevice,
    /// /dev/kvm may not be opened.
    PermissionDenied,
    /// /dev/kvm does not open, or a first call fails, for another reason.
    Broken {
        /// What failed and how.
        reason: String,
    },
    /// Not the interface of Linux 2.6.22 and later.
    OldApi {
        /// Its version.
        version: i32,
    },
    /// The interface lacks something.
    MissingCapability {
        /// Its name in KVM's documentation.
        name: &'static str,
    },
    /// The guest's kernel is emulated, not run.
    EmulatesKernels {
        /// The step that failed or took too long.
        at: &'static str,
        /// What showed it.
        evidence: String,
    },
}

impl Verdict {
    /// Whether machines can run.
    pub fn usable(&self) -> bool {
        matches!(self, Self::Ok { .. })
    }

    /// One sentence for the user: what is the case, and what to do.
    pub fn message(&self) -> String {
        match self {
            Self::Ok { .. } => "KVM runs guest kernels".to_owned(),
            Self::NoDevice => no_kvm(&kvm_ioctls::Error::new(libc::ENOENT)),
            Self::PermissionDenied => no_kvm(&kvm_ioctls::Error::new(libc::EACCES)),
            Self::Broken { reason } => {
                format!("KVM is not usable: {reason}; see the host's kernel log (dmesg)")
            }
            Self::OldApi { version } => {
                format!(
                    "KVM speaks version {version} of its interface, {API} is needed: update the host's kernel"
                )
            }
            Self::MissingCapability { name } => {
                format!(
                    "KVM lacks {name}: update the host's kernel (Linux 5.10 or later has all that is needed)"
                )
            }
            Self::EmulatesKernels { at, evidence } => format!(
                "this host's KVM{} cannot run guests: it emulates a guest's kernel instead of running it (probe guest, {at}: \
                 {evidence}); use bare metal or a virtual machine with nested virtualization (vmx or svm in /proc/cpuinfo)",
                module()
            ),
        }
    }
}

/// Names the module where it is known for this.
fn module() -> &'static str {
    match std::path::Path::new("/sys/module/kvm_pvm").exists() {
        true => " (kvm_pvm)",
        false => "",
    }
}

/// Runs the probe: within about 2 s, also on a KVM that hangs.
pub fn probe() -> Verdict {
    run_probe().unwrap_or_else(|verdict| verdict)
}

fn run_probe() -> Result<Verdict, Verdict> {
    let kvm = Kvm::new().map_err(|e| match e.errno() {
        libc::ENOENT | libc::ENXIO | libc::ENODEV => Verdict::NoDevice,
        libc::EACCES | libc::EPERM => Verdict::PermissionDenied,
        _ => Verdict::Broken { reason: format!("/dev/kvm does not open: {e}") },
    })?;
    match kvm.get_api_version() {
        API => {}
        version => return Err(Verdict::OldApi { version }),
    }
    if let Some((_, name)) = CAPABILITIES.iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
        return Err(Verdict::MissingCapability { name });
    }
    let memory = load_guest().map_err(|reason| Verdict::Broken { reason })?;
    let (vm, vcpu) =
        make_guest(&kvm, &memory).map_err(|(call, e)| Verdict::Broken { reason: format!("{call}: {e}") })?;
    Ok(observe(vm, vcpu))
}

fn load_guest() -> Result<Memory, String> {
    let memory = memory::reserve(PROBE_MIB).map_err(|e| e.to_string())?;
    let handler = place::CODE + probe_code::handler_offset();
    let [low, high] = [handler & 0xffff, handler >> 16];
    // An interrupt gate to 0x10:handler (Intel SDM 3, 7.14.1).
    let gate = low | (0x10 << 16) | (0x8e00 << 32) | (high << 48);
    let write = |bytes: &[u8], at| memory.write_slice(bytes, GuestAddress(at)).map_err(|e| e.to_string());
    write(probe_code::bytes(), place::CODE)?;
    write(&gate.to_le_bytes(), place::IDT + 3 * 16)?;
    registers::write_tables(&memory).map_err(|e| e.to_string())?;
    Ok(memory)
}

fn make_guest(kvm: &Kvm, memory: &Memory) -> Result<(VmFd, VcpuFd), (&'static str, kvm_ioctls::Error)> {
    let vm = kvm.create_vm().map_err(|e| ("KVM_CREATE_VM", e))?;
    vm.set_tss_address(memory::KVM_TSS as usize).map_err(|e| ("KVM_SET_TSS_ADDR", e))?;
    memory::register(&vm, memory)
        .map_err(|_| ("KVM_SET_USER_MEMORY_REGION", kvm_ioctls::Error::new(libc::EINVAL)))?;
    let vcpu = vm.create_vcpu(0).map_err(|e| ("KVM_CREATE_VCPU", e))?;
    let supported = kvm.get_supported_cpuid(256).map_err(|e| ("KVM_GET_SUPPORTED_CPUID", e))?;
    let xsave = supported.as_slice().iter().any(|e| e.function == 1 && e.ecx & ECX1_XSAVE != 0);
    let cpuid = Template::new(supported.as_slice(), 1, false)
        .for_cpu(0)
        .map_err(|_| ("KVM_SET_CPUID2", kvm_ioctls::Error::new(libc::E2BIG)))?;
    vcpu.set_cpuid2(&cpuid).map_err(|e| ("KVM_SET_CPUID2", e))?;
    let mut sregs = vcpu.get_sregs().map_err(|e| ("KVM_GET_SREGS", e))?;
    registers::long_mode(&mut sregs);
    sregs.idt.base = place::IDT;
    sregs.idt.limit = 4 * 16 - 1;
    sregs.cr4 |= CR4_OSFXSR_OSXMMEXCPT | if xsave { CR4_OSXSAVE } else { 0 };
    vcpu.set_sregs(&sregs).map_err(|e| ("KVM_SET_SREGS", e))?;
    let regs =
        kvm_regs { rsp: place::STACK, r14: xsave.into(), ..registers::general(GuestAddress(place::CODE)) };
    vcpu.set_regs(&regs).map_err(|e| ("KVM_SET_REGS", e))?;
    Ok((vm, vcpu))
}

/// What the vCPU's thread tells.
enum Event {
    /// The guest did the step with this number, from 1 on, in this much of the thread's time.
    Step(u8, Duration),
    /// The guest stopped, and why.
    Stopped(String),
}

fn observe(vm: VmFd, mut vcpu: VcpuFd) -> Verdict {
    if let Err(e) = kick::install() {
        return Verdict::Broken { reason: format!("sigaction: {e}") };
    }
    let (send, receive) = channel();
    let thread = seccomp::spawn(Thread::Vcpu(0), move || {
        let mut vcpu = Kickable::new(&mut vcpu);
        let mut before = thread_time();
        loop {
            let event = run_once(&mut vcpu, &mut before);
            let over = matches!(event, Event::Stopped(_));
            if send.send(event).is_err() || over {
                return;
            }
        }
    });
    let thread = match thread {
        Ok(thread) => thread,
        Err(e) => return Verdict::Broken { reason: format!("thread: {e}") },
    };
    let verdict = judge(&receive, Instant::now() + TIME_LIMIT, own_speed());
    kick::kick(&thread);
    // The thread of a KVM that hangs is left to the process's end; a sound one is gone, or goes at its next event.
    drop(receive);
    drop(vm);
    verdict
}

fn run_once(vcpu: &mut Kickable<'_>, before: &mut Duration) -> Event {
    let reason = match vcpu.fd.run() {
        Ok(VcpuExit::IoOut(PORT, [step])) => {
            let now = thread_time();
            let took = now.saturating_sub(*before);
            *before = now;
            return Event::Step(*step, took);
        }
        Ok(VcpuExit::InternalError) => String::new(),
        Ok(other) => format!("{other:?}"),
        Err(error) => format!("KVM_RUN: {error}"),
    };
    match reason.as_str() {
        "" => Event::Stopped(format!("KVM internal error, suberror {}", vcpu.internal_suberror())),
        _ => Event::Stopped(reason),
    }
}

fn judge(events: &Receiver<Event>, deadline: Instant, native: Duration) -> Verdict {
    let mut done = 0usize;
    loop {
        let at = STEPS.get(done).copied().unwrap_or("end");
        let evidence = match events.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(Event::Step(step, took)) if usize::from(step) == done + 1 => {
                done += 1;
                if done < STEPS.len() {
                    continue;
                }
                let ns_per_instruction =
                    u64::try_from(took.as_nanos()).unwrap_or(u64::MAX) / LOOP_INSTRUCTIONS;
                if took <= native.saturating_mul(MAX_SLOWDOWN) {
                    return Verdict::Ok { ns_per_instruction };
                }
                format!(
                    "{ns_per_instruction} ns an instruction, more than {MAX_SLOWDOWN} times the host's own"
                )
            }
            Ok(Event::Step(step, _)) => format!("the guest reported step {step}"),
            Ok(Event::Stopped(reason)) => reason,
            Err(RecvTimeoutError::Timeout) => format!("not done after {} s", TIME_LIMIT.as_secs()),
            Err(RecvTimeoutError::Disconnected) => "the vCPU's thread is gone".to_owned(),
        };
        return Verdict::EmulatesKernels { at, evidence };
    }
}

/// How long this process takes for a loop like the guest's; at least what the clock can tell.
fn own_speed() -> Duration {
    let before = thread_time();
    let mut left = LOOP_INSTRUCTIONS / 2;
    while std::hint::black_box(left) > 0 {
        left -= 1;
    }
    thread_time().saturating_sub(before).max(Duration::from_micros(50))
}

/// CPU time of this thread, guest included: another load on the host does not slow it down.
fn thread_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a timespec of our own, and every thread has this clock.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::Sender;

    use super::*;

    fn judge_of(tell: impl FnOnce(&Sender<Event>)) -> Verdict {
        let (send, receive) = channel();
        tell(&send);
        drop(send);
        judge(&receive, Instant::now() + TIME_LIMIT, Duration::from_millis(1))
    }

    fn steps(send: &Sender<Event>, last_took: Duration) {
        for step in 1..=STEPS.len() as u8 {
            send.send(Event::Step(step, last_took)).unwrap();
        }
    }

    #[test]
    fn all_steps_at_speed_are_a_usable_kvm() {
        let verdict = judge_of(|send| steps(send, Duration::from_millis(4)));
        assert_eq!(verdict, Verdict::Ok { ns_per_instruction: 10 });
        assert!(verdict.usable());
    }

    #[test]
    fn a_slow_loop_is_emulation() {
        let verdict = judge_of(|send| steps(send, Duration::from_millis(200)));
        assert!(matches!(verdict, Verdict::EmulatesKernels { at: "counted loop", .. }), "{verdict:?}");
    }

    #[test]
    fn the_step_that_fails_is_named() {
        let verdict = judge_of(|send| {
            send.send(Event::Step(1, Duration::ZERO)).unwrap();
            send.send(Event::Stopped("KVM internal error, suberror 1".into())).unwrap();
        });
        let message = verdict.message();
        assert!(
            message.contains("popcnt") && message.contains("suberror 1") && message.contains("nested"),
            "{message}"
        );
    }

    #[test]
    fn a_step_out_of_order_is_not_believed() {
        assert!(!judge_of(|send| send.send(Event::Step(2, Duration::ZERO)).unwrap()).usable());
    }

    #[test]
    fn every_verdict_is_one_sentence() {
        for verdict in [
            Verdict::NoDevice,
            Verdict::PermissionDenied,
            Verdict::OldApi { version: 11 },
            Verdict::MissingCapability { name: "KVM_CAP_IRQFD" },
            Verdict::Broken { reason: "x".into() },
        ] {
            let message = verdict.message();
            assert!(!message.contains('\n') && message.contains(':'), "{message}");
            assert!(!verdict.usable());
        }
    }
}
