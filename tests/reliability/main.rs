//! The rows of the table of reliability (`tests/RELIABILITY.md`) that have no
//! better place. `cargo test` runs their short form; `tests/reliability/run`
//! prints the table.

#[path = "../policies/capture.rs"]
mod capture;
#[path = "../support/mod.rs"]
mod support;

#[path = "../descriptors/peer.rs"]
#[allow(dead_code, reason = "shared, and used in part")]
mod peer;

mod children;
mod crowds;
mod drained;
mod flooded;
mod framing;
mod hostile;
mod inspected;
mod packages;
mod spawned;
mod standard;
mod stopped;
