//! Transports over real sockets.

#[path = "../support/mod.rs"]
mod support;

mod harness;
mod hosts;
mod link;

mod acceptor;
mod adoption;
mod awaited;
mod bytes;
mod connectors;
mod files;
mod half_closes;
mod lingering;
mod listeners;
mod observer;
mod once;
mod options;
mod paths;
mod pipes;
mod producers;
mod scoped;
mod stopping;
mod stream;
