//! TLS for [bowline], by rustls: a layer over every kind of stream connection.
//!
//! - [`TlsServer`] and [`TlsClient`] are put on the connections of an endpoint.
//!   [`StartTls`] is put on connections that are secured later (STARTTLS).
//! - [`TlsTransport`] is what a protocol asks of such a connection: it tells what was
//!   negotiated, and starts TLS.
//! - [`Certificates`] can be replaced while a server runs. [`Tickets`] can be shared by
//!   several processes.
//! - [`TlsError`] says why TLS failed, and whose fault that was.
//!
//! Everything else is the same as without TLS: protocols, factories, framing, producers,
//! policies. The configurations are those of [`rustls`], which also does the handshake.
//!
//! Most programs depend on the facade crate `bowline`, which re-exports this one as
//! `bowline::tls`.
//!
//! # Features
//!
//! - `ring` (default), `aws-lc-rs`: the cryptography to use;
//! - `endpoints`: the endpoint strings `tls:...`;
//! - `webpki-roots`, `platform-verifier`: the roots that a client trusts.
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

/// For the fuzz target, which is built with `--cfg fuzzing`. Not part of the public API.
#[cfg(fuzzing)]
#[doc(hidden)]
pub mod fuzzing {
    /// Makes both ends of a session do what `data` says.
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
pub use crate::role::{StartTls, TlsRole};
pub use crate::server::{Passing, TlsServer};
pub use crate::tickets::{TICKET_KEY_BYTES, TicketKey, Tickets};
pub use crate::transport::TlsTransport;
