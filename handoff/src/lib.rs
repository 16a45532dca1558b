//! Hand-off of sockets between processes for [bowline]: worker pools, restarts
//! that lose nothing, and the interfaces of systemd.
//!
//! - [`wire`]: messages and the descriptors they own, in one stream;
//! - [`channel`]: the handshake and the protocol that delivers them;
//! - [`pool`]: worker processes that are passed connections;
//! - [`restart`]: a new process takes over from the old one;
//! - [`systemd`]: sockets that were inherited, and notices.
//!
//! Built on the public API of the layers below only. Most programs depend on
//! the facade crate `bowline`, which re-exports this as `bowline::handoff`.
//!
//! [bowline]: https://docs.rs/bowline

#![forbid(unsafe_code)]
#![cfg_attr(not(test), warn(clippy::unwrap_used))]

pub mod channel;
mod inherited;
mod log;
pub mod pool;
pub mod restart;
pub mod systemd;
#[cfg(feature = "testing")]
mod testing;
pub mod wire;

pub use crate::inherited::Inherited;
