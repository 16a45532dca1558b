//! What channels run over.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net;

use bowline_protocol::{Protocol, UnixTransport, UnixTransportHandle};
use bowline_reactor::Reactor;
use bowline_transport::{AdoptError, Transports as _, UnixStream};

/// A connected socket that a channel can run over. It is a UNIX stream socket or, with
/// the feature `testing`, a socket of a simulated kernel.
///
/// [`Worker::start`](crate::pool::Worker::start) and the workers of a
/// [pool](crate::pool) take any of them, so that both also run as processes of a
/// `Simulation`.
pub trait ChannelSocket: Sized + 'static {
    /// The transport over such a socket.
    type Transport: UnixTransport;

    /// The error if it could not be adopted.
    type Error: Into<io::Error>;

    /// Puts a protocol on it.
    ///
    /// # Errors
    ///
    /// It is no connected UNIX stream socket, or there is no room for it.
    fn adopt(
        self,
        reactor: &mut Reactor,
        protocol: impl Protocol<Self::Transport>,
    ) -> Result<UnixTransportHandle, Self::Error>;
}

impl ChannelSocket for OwnedFd {
    type Transport = UnixStream;
    type Error = AdoptError;

    fn adopt(
        self,
        reactor: &mut Reactor,
        protocol: impl Protocol<UnixStream>,
    ) -> Result<UnixTransportHandle, AdoptError> {
        reactor.adopt_unix_stream(self, protocol)
    }
}

/// One end of [`net::UnixStream::pair`].
impl ChannelSocket for net::UnixStream {
    type Transport = UnixStream;
    type Error = AdoptError;

    fn adopt(
        self,
        reactor: &mut Reactor,
        protocol: impl Protocol<UnixStream>,
    ) -> Result<UnixTransportHandle, AdoptError> {
        reactor.adopt_unix_stream(self.into(), protocol)
    }
}
