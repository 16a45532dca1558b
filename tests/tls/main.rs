//! TLS: the suite of stream transports over it, and what is its own.

#[path = "../support/mod.rs"]
mod support;

mod harness;
// What the suite uses of it.
#[allow(dead_code)]
#[path = "../transport/link.rs"]
mod link;

#[path = "../transport/stream/mod.rs"]
mod stream;

mod handshakes;
mod moves;
mod pools;
mod programs;
mod recorder;
mod records;
mod restart;
mod starttls;
