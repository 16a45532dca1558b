//! What a protocol asks of a connection that may have TLS.

use bowline_protocol::{Transport, TransportState};
use bowline_transport::StreamTransport;

use crate::error::StartTlsError;
use crate::layer::TlsState;
use crate::role::Role;

/// A connection that may have TLS. Every stream is one, so that the same protocol serves
/// with and without: it says `impl<T: TlsTransport> Protocol<T>`, or no more than
/// `T: Transport` where it does not ask.
///
/// Feature `tls`, or `tls-aws-lc-rs`.
pub trait TlsTransport: Transport {
    /// How TLS stands on this connection; `None` where there is no layer for it.
    fn tls(&self) -> Option<&TlsState>;

    /// Starts TLS in the middle of the connection (STARTTLS), as the server or as the
    /// client. Its endpoint has [`StartTls`](crate::StartTls) put on its connections.
    ///
    /// What was written before leaves in the clear, and then the handshake begins; what is
    /// written after this waits for it.
    /// [`connection_secured`](bowline_protocol::Protocol::connection_secured) says that it
    /// is done. A connection whose handshake fails is lost.
    ///
    /// `unread` is what has arrived behind the words that agreed on this, and what was
    /// [put back](Transport::push_back) is taken too. Both count as what TLS brought. A
    /// peer, or somebody between, that has smuggled in commands in the clear so breaks the
    /// handshake: none of it is ever read as a command
    /// ([CVE-2011-0411](https://www.cve.org/CVERecord?id=CVE-2011-0411)). A
    /// [`FrameReceiver`](bowline_protocol::framing::FrameReceiver) has it from
    /// [`take_rest`](bowline_protocol::framing::Framing::take_rest). Bytes that a protocol
    /// keeps elsewhere it has to forget.
    ///
    /// # Errors
    ///
    /// Nothing has changed.
    fn start_tls(&mut self, role: impl Into<Role>, unread: &[u8]) -> Result<(), StartTlsError>;
}

impl<T: StreamTransport> TlsTransport for T {
    fn tls(&self) -> Option<&TlsState> {
        self.stream().facet()
    }

    fn start_tls(&mut self, role: impl Into<Role>, unread: &[u8]) -> Result<(), StartTlsError> {
        if self.state() != TransportState::Connected || !self.is_open_for_reading() {
            return Err(StartTlsError::NotConnected);
        }
        let unsent = self.unsent_bytes() as u64;
        match self.stream_mut().facet_mut::<TlsState>() {
            Some((tls, link)) => tls.start_tls(link, role.into(), unsent, unread),
            None => Err(StartTlsError::NoLayer),
        }
    }
}
