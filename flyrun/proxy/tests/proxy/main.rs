//! The proxy over real sockets of this host, without machines: [`fake`] stands for them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test that cannot go on panics")]

mod chaos;
mod fake;
mod forwarding;
mod http1;
mod http2;
mod proxies;
mod refusals;
mod slow;
mod tcp;
mod timeouts;
mod tls;
