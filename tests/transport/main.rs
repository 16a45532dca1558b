//! Transports over real sockets.

#[path = "../support/mod.rs"]
mod support;

mod acceptor;
mod bytes;
