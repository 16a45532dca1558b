//! Hand-off between processes: sockets that are inherited, pooled, taken over.

#[path = "../policies/capture.rs"]
mod capture;
#[path = "../support/mod.rs"]
mod support;

mod channel;
mod endpoints;
mod flood;
mod forks;
mod frames;
mod inherited;
mod manager;
mod mutated;
mod notices;
mod pool;
mod restart;
mod sharing;
mod systemd;
