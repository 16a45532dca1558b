//! UNIX sockets of sequenced packets over the real thing.

#[path = "../support/mod.rs"]
mod support;

mod harness;

mod connection;
mod descriptors;
mod ends;
mod listening;
mod moving;
mod policies;
mod programs;
mod stopping;
