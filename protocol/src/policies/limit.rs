//! How many connections there are.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::rc::Rc;

use super::wrapper::{Event, Policy, ProtocolWrapper};
use crate::address::Address;
use crate::context::Context;
use crate::factory::{BuildContext, Factory};
use crate::log;
use crate::transport::Transport;

/// Declines connections beyond a number, in all or from one peer; a layer
/// around a factory, with no limit unless one is set.
///
/// A peer is an IP address, whatever its port; one in IPv6 that stands for an
/// IPv4 address is that address. All peers of UNIX sockets are one. A connection
/// counts from the moment its protocol is built until its `connection_lost` has
/// returned, or until its protocol is dropped: after a panic, or where a
/// detached connection is served elsewhere. What the inner factory declines
/// never counts, nor what no factory builds, unless it is
/// [counted](ConnectionCount::counted).
///
/// To bound several listeners together, give each an `Rc<RefCell<_>>` of the
/// same one. (Twisted: `policies.LimitTotalConnectionsFactory`,
/// `LimitConnectionsByPeer`.)
///
/// # Examples
///
/// ```
/// use bowline_protocol::policies::LimitConnections;
/// use bowline_protocol::{Address, Context, Protocol, Transport};
///
/// struct Echo;
///
/// impl<T: Transport> Protocol<T> for Echo {
///     fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
///         cx.transport.write(data);
///     }
/// }
///
/// let factory = LimitConnections::new(|_: &Address| Echo)
///     .total(Some(10_000))
///     .per_peer(Some(20));
/// let count = factory.count();
/// // reactor.listen_tcp(address, factory)?;
/// assert_eq!(count.open(), 0);
/// ```
pub struct LimitConnections<F> {
    factory: F,
    total: Option<usize>,
    per_peer: Option<usize>,
    count: ConnectionCount,
}

impl<F> LimitConnections<F> {
    /// Counts, and declines nothing.
    pub fn new(factory: F) -> Self {
        Self {
            factory,
            total: None,
            per_peer: None,
            count: ConnectionCount::default(),
        }
    }

    /// Sets how many connections there may be in all; `None`, the default, is
    /// any number.
    #[must_use]
    pub fn total(mut self, total: Option<usize>) -> Self {
        self.total = total;
        self
    }

    /// Sets how many connections one peer may have; `None`, the default, is any
    /// number.
    #[must_use]
    pub fn per_peer(mut self, per_peer: Option<usize>) -> Self {
        self.per_peer = per_peer;
        self
    }

    /// The count, to be looked at from elsewhere.
    pub fn count(&self) -> ConnectionCount {
        self.count.clone()
    }

    /// Counts a connection with `peer`, if there may be one more.
    fn admit(&self, peer: &Address) -> Option<Counted> {
        let peer = peer_of(peer);
        let mut counts = self.count.counts.borrow_mut();
        let of_peer = counts.by_peer.get(&peer).copied().unwrap_or(0);
        if self.total.is_some_and(|most| counts.open >= most)
            || self.per_peer.is_some_and(|most| of_peer >= most)
        {
            counts.declined += 1;
            return None;
        }
        drop(counts);
        Some(Counted::new(self.count.clone(), peer))
    }
}

impl<T: Transport, F: Factory<T>> Factory<T> for LimitConnections<F> {
    type Protocol = ProtocolWrapper<F::Protocol, Counted>;

    fn build_protocol(
        &mut self,
        cx: &mut BuildContext<'_>,
        peer: &Address,
    ) -> Option<Self::Protocol> {
        let Some(counted) = self.admit(peer) else {
            // No warning: a flood would fill the disk with them.
            log::debug!(
                target: log::TRANSPORT,
                "declined a connection with {peer}: {} are open",
                self.count.open()
            );
            return None;
        };
        let protocol = self.factory.build_protocol(cx, peer)?;
        Some(ProtocolWrapper::new(protocol, counted))
    }

    forward_factory_events!();
}

impl<F> fmt::Debug for LimitConnections<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LimitConnections")
            .field("total", &self.total)
            .field("per_peer", &self.per_peer)
            .field("count", &self.count)
            .finish_non_exhaustive()
    }
}

/// How many connections a [`LimitConnections`] has. A clone shows the same.
#[derive(Clone, Debug, Default)]
pub struct ConnectionCount {
    counts: Rc<RefCell<Counts>>,
}

#[derive(Debug, Default)]
struct Counts {
    open: usize,
    by_peer: BTreeMap<Peer, usize>,
    declined: u64,
}

/// An IP address, or any peer of a UNIX socket.
type Peer = Option<IpAddr>;

impl ConnectionCount {
    /// How many there are.
    pub fn open(&self) -> usize {
        self.counts.borrow().open
    }

    /// How many there are with the peer that `address` is of.
    pub fn open_with(&self, address: &Address) -> usize {
        let counts = self.counts.borrow();
        counts.by_peer.get(&peer_of(address)).copied().unwrap_or(0)
    }

    /// How many were declined so far because of a limit.
    pub fn declined(&self) -> u64 {
        self.counts.borrow().declined
    }

    /// Counts one more connection with `peer`, one that no factory was asked for: it was
    /// adopted, from a predecessor say. Nothing declines it, and those that are
    /// accepted after it count it. For a
    /// [`ProtocolWrapper`](crate::policies::ProtocolWrapper) around its protocol.
    pub fn counted(&self, peer: &Address) -> Counted {
        Counted::new(self.clone(), peer_of(peer))
    }

    fn add(&self, peer: Peer) {
        let mut counts = self.counts.borrow_mut();
        counts.open += 1;
        *counts.by_peer.entry(peer).or_default() += 1;
    }

    fn remove(&self, peer: Peer) {
        let mut counts = self.counts.borrow_mut();
        counts.open -= 1;
        if let Some(of_peer) = counts.by_peer.get_mut(&peer) {
            *of_peer -= 1;
            if *of_peer == 0 {
                // Addresses come and go: they must not pile up.
                counts.by_peer.remove(&peer);
            }
        }
    }
}

fn peer_of(address: &Address) -> Peer {
    address.as_inet().map(|address| address.ip().to_canonical())
}

/// The policy of [`LimitConnections`], for one connection: counted until it is
/// lost or this is dropped.
#[derive(Debug)]
pub struct Counted {
    entry: Option<(ConnectionCount, Peer)>,
}

impl Counted {
    fn new(count: ConnectionCount, peer: Peer) -> Self {
        count.add(peer);
        Self {
            entry: Some((count, peer)),
        }
    }

    fn end(&mut self) {
        if let Some((count, peer)) = self.entry.take() {
            count.remove(peer);
        }
    }
}

impl<T: Transport + ?Sized> Policy<T> for Counted {
    fn after(&mut self, _: &mut Context<'_, T>, event: &Event<'_>) {
        if matches!(event, Event::ConnectionLost(_)) {
            self.end();
        }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.end();
    }
}
