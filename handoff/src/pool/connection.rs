//! A connection on its way.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;

use bowline_protocol::Protocol;
use bowline_reactor::Reactor;
use bowline_transport::endpoint::{Adopt, AdoptTransport, Carried};
use bowline_transport::{AdoptError, Detached, StreamTransport, Transports, Unsent};

/// A connection that is passed from one process to another, with what the
/// kernel does not know of it.
#[derive(Debug)]
#[non_exhaustive]
pub struct PassedConnection {
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

impl PassedConnection {
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
    /// of a message whose descriptors have left, producers, and layers that hold more than
    /// the socket does not travel: `None` where there are any.
    pub fn from_detached<P>(detached: Detached<P>, mut read: Vec<u8>) -> Option<Self> {
        let has_more = !detached.descriptors.is_empty() || detached.producer.is_some();
        if has_more || !detached.travels() {
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

    /// Puts a protocol on it, as what `kind` says: [`Tcp`](bowline_transport::Tcp),
    /// [`Unix`](bowline_transport::Unix). What was unsent leaves first, and what
    /// was read is delivered first.
    ///
    /// # Errors
    ///
    /// [`AdoptError`]: it was reset meanwhile, most likely.
    pub fn adopt<K: Adopt<Source = OwnedFd>>(
        self,
        reactor: &mut Reactor,
        kind: K,
        protocol: impl Protocol<AdoptTransport<K>>,
    ) -> Result<<AdoptTransport<K> as StreamTransport>::Handle, AdoptError> {
        let carried = Carried {
            unsent: Unsent {
                bytes: self.unsent,
                descriptors: Vec::new(),
            },
            unread: self.read,
        };
        reactor.adopt(kind.carrying(carried), self.fd, protocol)
    }
}
