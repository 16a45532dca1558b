//! Memory transports: protocols joined by a pump, and whole runs from a seed.
//! (That one connection in memory behaves as one over a socket is shown by the
//! suite of `tests/transport`, which runs over both.)

#[path = "../support/mod.rs"]
mod support;

mod children;
mod datagrams;
mod listeners;
mod packets;
mod panics;
mod pipes;
mod processes;
mod pump;
mod restarts;
mod seeds;
mod simulation;
mod suspended;
mod tokens;
