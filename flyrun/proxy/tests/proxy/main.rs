//! The proxy over real sockets of this host, without machines: [`fake`] stands for them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod fake;
mod http1;
