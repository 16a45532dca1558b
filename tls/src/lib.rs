//! TLS for [bowline], by rustls: a layer over every kind of stream connection.
//!
//! - [`TlsServer`] and [`TlsClient`] are put on the connections of an endpoint, and
//!   [`StartTls`] on those that are secured later;
//! - [`TlsTransport`] is what a protocol asks of its connection beside that: what was
//!   agreed on, and to start TLS;
//! - [`Certificates`] are replaced while a server serves, [`Tickets`] shared by several;
//! - [`TlsError`] says by whose fault it ended.
//!
//! Everything else is as without TLS: protocols, factories, framing, producers, policies.
//! Configurations are those of [`rustls`], which makes the handshake.
//!
//! Most programs depend on the facade crate `bowline`, which re-exports this one as
//! `bowline::tls`.
//!
//! # Features
//!
//! - `ring` (default), `aws-lc-rs`: whose cryptography is used;
//! - `endpoints`: TLS in endpoints that are strings;
//! - `webpki-roots`, `platform-verifier`: which roots a client trusts.
//!
//! [bowline]: https://docs.rs/bowline

#![forbid(unsafe_code)]
#![cfg_attr(not(test), warn(clippy::unwrap_used))]

mod certificates;
mod client;
mod config;
mod encoding;
#[cfg(feature = "endpoints")]
mod endpoints;
mod envelope;
mod error;
mod handshake;
mod layer;
mod log;
mod memory;
mod outgoing;
mod record;
mod role;
mod secret;
mod server;
mod session;
mod tickets;
mod transport;

/// For the fuzz target, which is built with `--cfg fuzzing`. No public API.
#[cfg(fuzzing)]
#[doc(hidden)]
pub mod fuzzing {
    /// Has both ends of a session do what `data` says.
    pub fn records(data: &[u8]) {
        crate::session::fuzzing::records(data);
    }
}

pub use rustls;

pub use crate::certificates::Certificates;
pub use crate::client::TlsClient;
pub use crate::config::*;
#[cfg(feature = "endpoints")]
pub use crate::endpoints::TlsEndpoints;
pub use crate::error::{LoadError, StartTlsError, TlsError};
pub use crate::layer::{MoveError, MovedTls, Tls, TlsState};
pub use crate::role::{Role, StartTls};
pub use crate::server::{Passing, TlsServer};
pub use crate::tickets::{TICKET_KEY_BYTES, TicketKey, Tickets};
pub use crate::transport::TlsTransport;
