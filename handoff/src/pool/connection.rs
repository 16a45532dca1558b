//! A connection on its way to a worker.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;

use bowline_reactor::Reactor;
use bowline_transport::endpoint::{
    Adopt, AdoptTransport, Carried, JustAccepted, SocketTransport, TransportFor,
};
use bowline_transport::{AdoptError, Detached, Transports, Unsent};

/// A connection that is passed from one process to another, with all that the kernel
/// does not know of it.
#[derive(Debug)]
#[non_exhaustive]
pub struct PassedConnection {
    /// The socket.
    pub fd: OwnedFd,
    /// The peer, over TCP.
    pub peer: Option<SocketAddr>,
    /// A number of the program's own choice, which may say by which listener it came.
    pub label: u32,
    /// Bytes that were read of it and not used. Its protocol sees them first.
    pub read: Vec<u8>,
    /// Bytes that were written on it and not sent. They leave first.
    pub unsent: Vec<u8>,
    /// Whether a worker that was recalled may still hold the socket, without ever using
    /// it. The end of the connection has to be that of the socket then (shutdown(2)):
    /// [`adopt`](Self::adopt) sees to it.
    pub is_recalled: bool,
    /// What is known of a socket that was accepted a moment ago.
    pub(super) accepted: Option<JustAccepted>,
}

impl PassedConnection {
    /// Makes one of a socket that nothing was read of or written on yet.
    pub fn new(fd: OwnedFd) -> Self {
        Self {
            fd,
            peer: None,
            label: 0,
            read: Vec::new(),
            unsent: Vec::new(),
            is_recalled: false,
            accepted: None,
        }
    }

    /// Makes one of a connection that was [detached](Transports::detach). Its protocol
    /// had read `read` and not used it.
    ///
    /// Some things cannot travel: queued descriptors, the rest of a message whose
    /// descriptors have left, producers, and layers that hold more than the socket. If
    /// there are any, the answer is `None`.
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

    /// Puts a protocol on it. `kind` is [`Tcp`](bowline_transport::Tcp) or
    /// [`Unix`](bowline_transport::Unix), for example. Unsent bytes leave first, and
    /// bytes that were read are delivered first.
    ///
    /// # Errors
    ///
    /// [`AdoptError`], if it is not of this kind. A connection that was reset meanwhile may
    /// be an error, or be adopted and end.
    pub fn adopt<K: Adopt<Source = OwnedFd>, P>(
        self,
        reactor: &mut Reactor,
        kind: K,
        protocol: P,
    ) -> Result<<AdoptTransport<K> as SocketTransport>::Handle, AdoptError>
    where
        AdoptTransport<K>: TransportFor<P>,
    {
        let carried = Carried {
            unsent: Unsent {
                bytes: self.unsent,
                descriptors: Vec::new(),
            },
            unread: self.read,
            ends_for_all: self.is_recalled,
        };
        match self.accepted {
            Some(known) => {
                let kind = kind.accepted(known).carrying(carried);
                reactor.adopt(kind, self.fd, protocol)
            }
            None => reactor.adopt(kind.carrying(carried), self.fd, protocol),
        }
    }
}
