//! A connection on its way.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;

use bowline_protocol::{Protocol, TransportHandle, UnixTransportHandle};
use bowline_reactor::Reactor;
use bowline_transport::{AdoptError, Detached, TcpStream, Transports, UnixStream, Unsent};

/// A connection that is passed from one process to another, with what the
/// kernel does not know of it.
#[derive(Debug)]
#[non_exhaustive]
pub struct Connection {
    /// The socket.
    pub fd: OwnedFd,
    /// The peer, over TCP.
    pub peer: Option<SocketAddr>,
    /// What the program calls it: by which listener it came, say.
    pub label: u32,
    /// What was read of it and not used: its protocol sees that first.
    pub read: Vec<u8>,
    /// What was written on it and not sent: that leaves first.
    pub unsent: Vec<u8>,
}

impl Connection {
    /// A socket of which nothing is read or written yet.
    pub fn new(fd: OwnedFd) -> Self {
        Self {
            fd,
            peer: None,
            label: 0,
            read: Vec::new(),
            unsent: Vec::new(),
        }
    }

    /// A connection that was [detached](Transports::detach), and of which its
    /// protocol had read `read` without using it. Queued descriptors, the rest
    /// of a message whose descriptors have left, and producers do not travel:
    /// `None` where there are any.
    pub fn from_detached<P>(detached: Detached<P>, mut read: Vec<u8>) -> Option<Self> {
        if !detached.descriptors.is_empty() || detached.producer.is_some() {
            return None;
        }
        read.extend(detached.unread);
        Some(Self {
            peer: detached.peer.as_inet(),
            read,
            unsent: detached.unsent,
            ..Self::new(detached.fd)
        })
    }

    /// Puts a protocol on it, over TCP: what was unsent leaves first, and what
    /// was read is delivered first.
    ///
    /// # Errors
    ///
    /// [`AdoptError`]: it was reset meanwhile, most likely.
    pub fn adopt_tcp(
        self,
        reactor: &mut Reactor,
        protocol: impl Protocol<TcpStream>,
    ) -> Result<TransportHandle, AdoptError> {
        let unsent = unsent(self.unsent);
        let handle = reactor.adopt_tcp_stream_with(self.fd, unsent, protocol)?;
        if let Some(transport) = reactor.get(handle) {
            transport.push_back(self.read);
        }
        Ok(handle)
    }

    /// As [`adopt_tcp`](Self::adopt_tcp), over a UNIX socket.
    ///
    /// # Errors
    ///
    /// As [`adopt_tcp`](Self::adopt_tcp).
    pub fn adopt_unix(
        self,
        reactor: &mut Reactor,
        protocol: impl Protocol<UnixStream>,
    ) -> Result<UnixTransportHandle, AdoptError> {
        let unsent = unsent(self.unsent);
        let handle = reactor.adopt_unix_stream_with(self.fd, unsent, protocol)?;
        if let Some(transport) = reactor.get(handle) {
            transport.push_back(self.read);
        }
        Ok(handle)
    }
}

fn unsent(bytes: Vec<u8>) -> Unsent {
    Unsent {
        bytes,
        descriptors: Vec::new(),
    }
}
