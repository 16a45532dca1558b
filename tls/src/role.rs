//! Which side of a TLS connection we are.

use std::sync::Arc;
use std::time::Duration;

use bowline_transport::endpoint::{Side, Wrap};
use bowline_transport::{FileDescriptor, Stream};

use rustls::crypto::CryptoProvider;

use crate::client::TlsClient;
use crate::handshake::Handshake;
use crate::layer::Tls;
use crate::server::{Passing, TlsServer};

/// The side of a TLS connection that we are, with its configuration. It is the argument of
/// [`start_tls`](crate::TlsTransport::start_tls).
///
/// Feature `tls`, or `tls-aws-lc-rs`.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum TlsRole {
    /// The server. It waits for the client to begin.
    Server(TlsServer),
    /// The client. It sends the first message.
    Client(TlsClient),
}

impl TlsRole {
    pub(crate) fn timeout(&self) -> Duration {
        match self {
            Self::Server(server) => server.timeout(),
            Self::Client(client) => client.timeout(),
        }
    }

    pub(crate) fn mover(&self) -> Option<Arc<CryptoProvider>> {
        match self {
            Self::Server(server) => server.mover(),
            Self::Client(client) => client.mover(),
        }
    }

    pub(crate) fn begin(&self) -> Result<Handshake, rustls::Error> {
        match self {
            Self::Server(server) => server.begin(),
            Self::Client(client) => client.begin(),
        }
    }
}

impl From<&TlsServer> for TlsRole {
    fn from(server: &TlsServer) -> Self {
        Self::Server(server.clone())
    }
}

impl From<&TlsClient> for TlsRole {
    fn from(client: &TlsClient) -> Self {
        Self::Client(client.clone())
    }
}

/// STARTTLS: connections that begin in the clear and are secured once both ends have agreed
/// on it. It is put on the connections of an endpoint, on either side.
///
/// Their protocol starts TLS with [`start_tls`](crate::TlsTransport::start_tls).
///
/// Feature `tls`, or `tls-aws-lc-rs`.
#[derive(Clone, Copy, Debug, Default)]
pub struct StartTls;

impl StartTls {
    /// Returns the same for connections that pass descriptors; see
    /// [`TlsServer::passing`](crate::TlsServer::passing).
    pub fn passing(self) -> Passing<Self> {
        Passing(self)
    }
}

impl<S: FileDescriptor> Wrap<S> for StartTls {
    type Transport = Stream<Tls<S>>;

    fn wrap(&mut self, socket: S, _: Side) -> Tls<S> {
        Tls::plain(socket)
    }
}
