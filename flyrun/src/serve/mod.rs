//! `flyrun serve`: apps from files, machines for requests.
//!
//! ```text
//! proxy crate ── lease ──▶ engine ──▶ group: app::pool under a lock ── orders ──▶ worker of each slot ──▶ host: flyrun's commands
//!                                       ▲                                            │
//!                                       └──── ready, failed, at rest, died ◀─────────┴── life: monitor's socket, checks
//! ```
//! A pool decides, and knows neither clock nor machine (`app::pool`). A group is told what happens and hands out what is to be
//! done; a slot's worker does one thing after another, on threads that may block; a life is followed until its monitor leaves.
//! Machines are ordinary machines, told apart by labels. Nothing is kept anywhere else: whoever serves an app next finds its
//! machines by them and takes each over as it is, so that the end of this process at any point loses nothing.

mod acme;
mod check;
mod children;
mod choices;
mod clients;
mod control;
mod deploy;
mod engine;
mod events;
mod follow;
mod front;
mod group;
mod host;
mod latencies;
mod life;
mod limits;
mod listener;
mod log;
mod metrics;
mod page;
mod release;
mod reload;
mod room;
mod run;
mod status;
mod systemd;
mod targets;
mod template;
mod worker;

#[cfg(any(test, feature = "fuzzing"))]
pub use choices::Choices;
pub use clients::Wanted;
pub use control::{Ask, Deploy, Scale, Step, Strategy, ask};
pub use group::{MachineView, View};
pub use limits::default_memory_mib;
#[cfg(any(test, feature = "fuzzing"))]
pub use listener::asked_for;
pub use run::{Settings, run};
#[cfg(any(test, feature = "fuzzing"))]
pub use status::Status;
pub use status::ask_all;
pub use template::{APP, SLOT};
