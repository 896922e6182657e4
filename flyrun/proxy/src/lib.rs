//! What stands between clients and machines: HTTP, TLS and TCP. It knows no machine; it is lent the use of one by
//! [`Machines`], which `flyrun serve` implements.
#![forbid(unsafe_code)]
#![deny(missing_docs)]

mod machines;

pub use machines::{Failure, Lease, Machines, Refusal, Steer, Want};
