//! What a protocol asks of a connection that may have TLS.

use bowline_protocol::{Transport, TransportState};
use bowline_transport::StreamTransport;

use crate::error::StartTlsError;
use crate::layer::TlsState;
use crate::role::TlsRole;

/// A connection that may have TLS. Every stream is one, so the same protocol works with and
/// without TLS. A protocol that asks for TLS says `impl<T: TlsTransport> Protocol<T>`; for
/// others `T: Transport` is enough.
///
/// Feature `tls`, or `tls-aws-lc-rs`.
pub trait TlsTransport: Transport {
    /// Returns the state of TLS on this connection, or `None` if it has no TLS layer.
    fn tls(&self) -> Option<&TlsState>;

    /// Starts TLS in the middle of the connection (STARTTLS), as the server or as the
    /// client. The endpoint must have put [`StartTls`](crate::StartTls) on the connection.
    ///
    /// What was written before is sent in the clear; then the handshake begins. What is
    /// written afterwards waits for it.
    /// [`connection_secured`](bowline_protocol::Protocol::connection_secured) is called
    /// when the handshake is done. A connection whose handshake fails is lost.
    ///
    /// `unread` is what has arrived behind the words that agreed on TLS. What was [put
    /// back](Transport::push_back) is taken as well. Both are read as part of the
    /// handshake. So commands that somebody smuggled in ahead of TLS break the handshake;
    /// they are never read as commands
    /// ([CVE-2011-0411](https://www.cve.org/CVERecord?id=CVE-2011-0411)). A
    /// [`FrameReceiver`](bowline_protocol::framing::FrameReceiver) gets `unread` from
    /// [`take_rest`](bowline_protocol::framing::Framing::take_rest). Bytes that a protocol
    /// keeps elsewhere it has to forget.
    ///
    /// # Errors
    ///
    /// TLS cannot start; see [`StartTlsError`]. Nothing has changed then.
    fn start_tls(&mut self, role: impl Into<TlsRole>, unread: &[u8]) -> Result<(), StartTlsError>;
}

impl<T: StreamTransport> TlsTransport for T {
    fn tls(&self) -> Option<&TlsState> {
        self.stream().facet()
    }

    fn start_tls(&mut self, role: impl Into<TlsRole>, unread: &[u8]) -> Result<(), StartTlsError> {
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
