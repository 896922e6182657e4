//! What stands between clients and machines: HTTP, TLS and TCP. It knows no machine; it is lent the use of one by
//! [`Machines`], which `flyrun serve` implements.
#![forbid(unsafe_code)]
#![deny(missing_docs)]

mod access;
mod backend;
mod date;
mod fields;
mod forward;
mod h1;
mod h2;
mod held;
mod id;
mod kept;
mod machines;
mod metrics;
mod options;
mod own;
mod phases;
mod proxy;
mod proxy_protocol;
mod registry;
mod replay;
mod routes;
mod shared;
mod socket;
mod tcp;
mod tls;
mod watch;
mod wire;

pub use access::{Log, Record};
pub use machines::{Failure, Lease, Machines, Refusal, Steer, Want};
pub use metrics::Metrics;
pub use options::Options;
pub use proxy::{Drained, Proxy, Site};
