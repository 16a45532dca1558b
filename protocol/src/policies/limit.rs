//! Limits on the number of connections.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::rc::Rc;

use bowline_reactor::Description;

use super::wrapper::{Event, Policy, ProtocolWrapper};
use crate::address::Address;
use crate::context::Context;
use crate::factory::{BuildContext, Factory};
use crate::log;

/// Declines connections beyond a number, in all or from one peer. It is a layer around a
/// factory, with no limit unless one is set.
///
/// A peer is an IP address, whatever its port. An IPv6 address that stands for an IPv4
/// address counts as that one. All peers of UNIX sockets count as one peer;
/// [`per_user`](Self::per_user) tells them apart.
///
/// A connection counts from the moment its protocol is built until its `connection_lost`
/// has returned. It also stops counting when its protocol is dropped: after a panic, or
/// when a detached connection is served elsewhere. Connections that the inner factory
/// declines never count. Nor do those that no factory builds, unless they are
/// [counted](ConnectionCount::counted).
///
/// To limit several listeners together, give each an `Rc<RefCell<_>>` of the same
/// factory. (Twisted: `policies.LimitTotalConnectionsFactory`,
/// `LimitConnectionsByPeer`.)
///
/// # Examples
///
/// ```
/// use bowline::policies::LimitConnections;
/// use bowline::{Address, Context, Protocol, Transport};
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
    per_user: Option<usize>,
    farewell: Option<Box<[u8]>>,
    count: ConnectionCount,
}

impl<F> LimitConnections<F> {
    /// Counts connections, and declines none.
    pub fn new(factory: F) -> Self {
        Self {
            factory,
            total: None,
            per_peer: None,
            per_user: None,
            farewell: None,
            count: ConnectionCount::default(),
        }
    }

    /// Sets how many connections there may be in all. `None`, the default, is any number.
    #[must_use]
    pub fn total(mut self, total: Option<usize>) -> Self {
        self.total = total;
        self
    }

    /// Sets how many connections one peer may have. `None`, the default, is any number.
    #[must_use]
    pub fn per_peer(mut self, per_peer: Option<usize>) -> Self {
        self.per_peer = per_peer;
        self
    }

    /// Sets how many connections the processes of one user may have over UNIX sockets.
    /// `None`, the default, is any number.
    ///
    /// With a limit, the kernel is asked for the user of each connection
    /// ([`Listener::peer_credentials`](crate::Listener::peer_credentials)). If it does not
    /// say, over TCP for instance, no user is counted.
    #[must_use]
    pub fn per_user(mut self, per_user: Option<usize>) -> Self {
        self.per_user = per_user;
        self
    }

    /// Sets a last word for clients that are declined; none by default.
    /// [`Listener::decline_with`](crate::Listener::decline_with) says within which limits
    /// it is sent.
    #[must_use]
    pub fn farewell(mut self, word: impl Into<Vec<u8>>) -> Self {
        self.farewell = Some(word.into().into());
        self
    }

    /// The count, to look at from elsewhere.
    pub fn count(&self) -> ConnectionCount {
        self.count.clone()
    }

    /// Counts a connection with `peer`, if there may be one more.
    fn admit(&self, cx: &mut BuildContext<'_>, peer: &Address) -> Option<Counted> {
        let peer = peer_of(peer);
        let user = self.per_user.and_then(|_| {
            let credentials = cx.listener()?.peer_credentials();
            credentials.ok().map(|credentials| credentials.uid)
        });
        let mut counts = self.count.counts.borrow_mut();
        let of_peer = counts.by_peer.get(&peer).copied().unwrap_or(0);
        let of_user = user.and_then(|user| counts.by_user.get(&user).copied());
        if self.total.is_some_and(|most| counts.open >= most)
            || self.per_peer.is_some_and(|most| of_peer >= most)
            || user.is_some()
                && self
                    .per_user
                    .is_some_and(|most| of_user.unwrap_or(0) >= most)
        {
            counts.declined += 1;
            return None;
        }
        drop(counts);
        Some(Counted::new(self.count.clone(), (peer, user)))
    }
}

impl<F: Factory> Factory for LimitConnections<F> {
    type Protocol = ProtocolWrapper<F::Protocol, Counted>;

    fn build_protocol(
        &mut self,
        cx: &mut BuildContext<'_>,
        peer: &Address,
    ) -> Option<Self::Protocol> {
        let Some(counted) = self.admit(cx, peer) else {
            if let (Some(word), Some(listener)) = (&self.farewell, cx.listener()) {
                listener.decline_with(word);
            }
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

    fn describe(&self, description: &mut Description) {
        let counts = self.count.counts.borrow();
        description
            .section_of::<Self>()
            .set("open", counts.open)
            .set("peers", counts.by_peer.len())
            .set("declined", counts.declined)
            .set_some("total", self.total)
            .set_some("per_peer", self.per_peer)
            .set_some("per_user", self.per_user);
        drop(counts);
        self.factory.describe(description);
    }

    forward_factory_events!();
}

impl<F> fmt::Debug for LimitConnections<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LimitConnections")
            .field("total", &self.total)
            .field("per_peer", &self.per_peer)
            .field("per_user", &self.per_user)
            .field("count", &self.count)
            .finish_non_exhaustive()
    }
}

/// Counts the connections of a [`LimitConnections`]. A clone shows the same count.
#[derive(Clone, Debug, Default)]
pub struct ConnectionCount {
    counts: Rc<RefCell<Counts>>,
}

#[derive(Debug, Default)]
struct Counts {
    open: usize,
    by_peer: BTreeMap<PeerKey, usize>,
    by_user: BTreeMap<u32, usize>,
    declined: u64,
}

/// An IP address, or any peer of a UNIX socket.
type PeerKey = Option<IpAddr>;

/// Whom a connection is counted for: its peer, and the user whose that is, where it
/// is known.
type Whose = (PeerKey, Option<u32>);

impl ConnectionCount {
    /// How many connections there are.
    pub fn open(&self) -> usize {
        self.counts.borrow().open
    }

    /// How many there are with the peer at `address`.
    pub fn open_with(&self, address: &Address) -> usize {
        let counts = self.counts.borrow();
        counts.by_peer.get(&peer_of(address)).copied().unwrap_or(0)
    }

    /// How many the processes of a user have, if there is a
    /// [limit](LimitConnections::per_user) per user.
    pub fn open_of_user(&self, user: u32) -> usize {
        self.counts
            .borrow()
            .by_user
            .get(&user)
            .copied()
            .unwrap_or(0)
    }

    /// How many were declined so far because of a limit.
    pub fn declined(&self) -> u64 {
        self.counts.borrow().declined
    }

    /// Counts one more connection with `peer`. For a connection that no factory built,
    /// such as one adopted from a predecessor.
    ///
    /// It is never declined, but it counts for those that are accepted after it. Put the
    /// answer around its protocol with a
    /// [`ProtocolWrapper`](crate::policies::ProtocolWrapper).
    pub fn counted(&self, peer: &Address) -> Counted {
        Counted::new(self.clone(), (peer_of(peer), None))
    }

    fn add(&self, (peer, user): Whose) {
        let mut counts = self.counts.borrow_mut();
        counts.open += 1;
        *counts.by_peer.entry(peer).or_default() += 1;
        if let Some(user) = user {
            *counts.by_user.entry(user).or_default() += 1;
        }
    }

    fn remove(&self, (peer, user): Whose) {
        let mut counts = self.counts.borrow_mut();
        counts.open -= 1;
        one_less(&mut counts.by_peer, &peer);
        if let Some(user) = user {
            one_less(&mut counts.by_user, &user);
        }
    }
}

/// Addresses come and go: they must not pile up.
fn one_less<K: Ord>(counts: &mut BTreeMap<K, usize>, key: &K) {
    if let Some(count) = counts.get_mut(key) {
        *count -= 1;
        if *count == 0 {
            counts.remove(key);
        }
    }
}

fn peer_of(address: &Address) -> PeerKey {
    address.as_inet().map(|address| address.ip().to_canonical())
}

/// The policy of [`LimitConnections`], for one connection. The connection counts until it
/// is lost or this is dropped.
#[derive(Debug)]
pub struct Counted {
    entry: Option<(ConnectionCount, Whose)>,
}

impl Counted {
    fn new(count: ConnectionCount, whose: Whose) -> Self {
        count.add(whose);
        Self {
            entry: Some((count, whose)),
        }
    }

    fn end(&mut self) {
        if let Some((count, whose)) = self.entry.take() {
            count.remove(whose);
        }
    }
}

impl<T: ?Sized> Policy<T> for Counted {
    fn describe(&self, description: &mut Description) {
        let open = self.entry.as_ref().map(|(count, _)| count.open());
        description
            .section_of::<Self>()
            .set_some("open_in_all", open);
    }

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
