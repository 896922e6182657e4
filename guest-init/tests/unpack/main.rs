//! Unpacking, on real directories: what must come out, what must not happen.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod hostile;
mod limits;
mod model;
mod snapshot;
mod tarball;
mod tools;
mod unpacked;
mod whiteouts;
