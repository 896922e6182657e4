//! What stands between clients and machines: HTTP, TLS and TCP. It knows no machine; it is lent the use of one by
//! [`Machines`], which `flyrun serve` implements.
//!
//! A request goes one way, in one task, and each step is a module:
//!
//! 1. `proxy`: a connection is accepted and counted; TLS (`tls`) is agreed on by SNI. An authority that looks is shown its proof (`challenges`);
//! 2. `h1::server` or `h2::server`: the head is read, strictly. HTTP/1.1 is our own ([RFC 9112]): what two recipients could
//!    read as two different messages is refused, and no byte of it goes on. HTTP/2 is the h2 crate's;
//! 3. `routes`: the host name finds the app. What is served is replaced as a whole; requests under way keep their route;
//! 4. `forward`, `journey`: a machine is leased, waited for if need be, and given the request (`fields` tells what changes in it). If it
//!    breaks before it has answered, a safe request goes to another; if its answer is `fly-replay`, the request does (`replay`,
//!    `kept`);
//! 5. `backend`: connections to machines, kept by machine and life, and shut down with the life;
//! 6. `phases`: body up, answer down, or bytes both ways after an upgrade.
//!
//! Bodies are `wire`'s two traits, so that each protocol of a client meets each of a machine, and one loop copies them: never
//! more than a piece of a body is in memory, except the first MiB of a request's, which a replay would need. Whoever takes no
//! more is sent no more.
//!
//! # Limits
//!
//! Heads have at most 64 KiB ([`Options::max_head_bytes`]) and 128 fields; a client has `headers_read_timeout` for one. Nothing may stand
//! still longer than `idle_timeout`: a client that does not send its body gets 408, a machine that does not answer 504, and
//! whoever does not read is cut off. However much moves, an app's `body_timeout` ends a request whose body is not there by then (408), and
//! `total_timeout` one that is not answered whole (504, or an answer that breaks off): waiting for a machine counts. An answer that is a
//! stream of events, and a tunnel, only have to begin in time; raw connections are no requests. Connections are limited in number. Waiting for a machine is limited by whoever has them.
//! A client that ends its side of an HTTP connection while it waits is taken to be gone (499 in the log), as nginx has it, and waits for
//! no machine any more; on a raw connection only if it has said nothing.
//!
//! # What counts as use
//!
//! With `concurrency.type = "requests"` each request has a lease. With `"connections"` the requests under way on one connection of
//! a client share one: a connection without requests uses no machine, so that browsers that keep theirs open keep none awake.
//! A tunnel (WebSocket, CONNECT) and a raw connection have theirs to the end.
//!
//! # Who is believed
//!
//! No client: `Fly-*`, `X-Forwarded-*` and `Forwarded` that it sends are taken away, in any spelling that CGI would take for them. Of an
//! app's `trusted_proxies` (`believed`) the client, its protocol and its port are taken from `X-Forwarded-For`, `-Proto` and `-Port`, else
//! from `Forwarded`, else from `Fly-Client-IP`; the lists go on from the client, with the proxy added, and without what stood before it.
//! With `accept_proxy_protocol` their connections begin with that header (`proxy_protocol`), and are then connections of whom it names.
//! It may name a machine with `fly-force-instance-id` and `fly-prefer-instance-id`.
//!
//! [RFC 9112]: https://www.rfc-editor.org/rfc/rfc9112
#![forbid(unsafe_code)]
#![deny(missing_docs)]

mod access;
mod backend;
mod believed;
mod challenges;
mod date;
mod facts;
mod fields;
mod forward;
#[doc(hidden)]
pub mod fuzzing;
mod h1;
mod h2;
mod held;
mod id;
mod journey;
mod kept;
mod machines;
mod metrics;
mod opened;
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
pub use challenges::{Challenges, Proof};
pub use facts::Facts;
pub use machines::{Failure, Lease, Machines, Refusal, Steer, Want};
pub use metrics::Metrics;
pub use opened::Opened;
pub use options::Options;
pub use proxy::{Drained, Proxy, Site};
