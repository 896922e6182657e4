//! HTTP/1.1 (RFC 9112), strictly: what two recipients could read as two different messages is refused.

pub(crate) mod chunk;
pub(crate) mod head;
mod reader;
mod server;
#[cfg(test)]
mod tests;
mod writer;

pub(crate) use reader::{Body, NoHead, Reader};
pub(crate) use server::{Limits, serve};
pub(crate) use writer::{Framing, Writer, decimal, put_field, put_fields, put_framing};
