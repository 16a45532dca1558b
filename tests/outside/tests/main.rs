//! The suite of stream transports over a layer and a kind from outside, and what is
//! theirs alone.

#[path = "../../support/mod.rs"]
mod support;

mod harness;
// What the suite uses of it.
#[allow(dead_code)]
#[path = "../../transport/link.rs"]
mod link;

#[path = "../../transport/stream/mod.rs"]
mod stream;

mod descriptors;
mod handshakes;
mod layers;
