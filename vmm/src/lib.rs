//! One KVM microVM.
#![deny(missing_docs)]

pub mod args;
pub mod attach;
pub mod boot;
pub mod bus;
pub mod channel;
pub mod console;
pub mod cpuid;
pub mod ending;
pub mod entry;
pub mod error;
pub mod event_loop;
pub mod exit;
pub mod heap;
pub mod hold;
pub mod jail;
pub mod kick;
pub mod lifecycle;
pub mod machine;
pub mod memory;
pub mod mptable;
pub mod owner;
pub mod parts;
pub mod probe;
pub mod probe_code;
pub mod reclaim;
pub mod seccomp;
pub mod snapshot;
pub mod spec;
pub mod trace;
pub mod validate;
pub mod vcpu;
pub mod vm;
pub mod worker;

/// For whoever makes the interfaces that a [`spec::NetSpec`] names.
pub use devices::virtio::net::PersistentTap;
