//! Datagram sockets over the real thing: UDP and UNIX datagrams.

#[path = "../support/mod.rs"]
mod support;

mod harness;

mod adoption;
mod every_kind;
mod limits;
mod programs;
mod stopping;
mod udp;
mod unix;
