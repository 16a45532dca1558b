//! Hands sockets from process to process, for [bowline]: worker pools, restarts
//! that lose nothing, and the interfaces of systemd.
//!
//! - [`wire`]: messages with their descriptors, in one stream;
//! - [`channel`]: the handshake, and the protocol that delivers messages;
//! - [`pool`]: worker processes that are passed connections;
//! - [`restart`]: a new process takes over from the old one;
//! - [`systemd`]: inherited sockets, and notices to the service manager;
//! - [`endpoints`]: where to listen and to connect, as strings.
//!
//! This crate uses only the public API of the crates below it. Most programs depend
//! on the facade crate `bowline`, which re-exports this one as `bowline::handoff`.
//!
//! [bowline]: https://docs.rs/bowline

#![forbid(unsafe_code)]
#![cfg_attr(not(test), warn(clippy::unwrap_used))]

pub mod channel;
pub mod endpoints;
mod inherited;
mod log;
pub mod pool;
pub mod restart;
pub mod systemd;
#[cfg(feature = "testing")]
mod testing;
pub mod wire;

pub use crate::inherited::Inherited;
