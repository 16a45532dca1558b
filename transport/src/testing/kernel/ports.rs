//! Datagram sockets of the simulated kernel: UDP, which loses, repeats and overtakes, and
//! UNIX, which does none of that and has its senders wait.
//!
//! What is modelled, and where it comes from: who receives a datagram
//! (`__udp4_lib_lookup`), what is dropped (`__udp_enqueue_schedule_skb`), the refusal that
//! a connected socket is told (`__udp4_lib_err`); whom a UNIX socket may send to, and when
//! it has to wait (`unix_dgram_sendmsg`, `unix_dgram_poll`, `unix_dgram_peer_wake_me`), and
//! what a socket that is connected to another peer forgets (`unix_dgram_disconnected`).

use std::collections::{BTreeSet, VecDeque};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{BorrowedFd, OwnedFd};

use bowline_protocol::{Address, Credentials, UnixAddress};
use bowline_reactor::{Interest, Readiness};

use super::{
    Cause, DESCRIPTION, Failing, SHARED_INFO, SimulatedKernel, SocketId, State, Watch,
    packet_charge,
};
use crate::sys::{self, MAX_DESCRIPTORS};

/// The first port of those that are given out (`net.ipv4.ip_local_port_range`).
pub(super) const FIRST_PORT: u16 = 32_768;

/// The kind of a datagram socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::testing) enum PortFamily {
    Udp,
    Unix,
}

/// A datagram that was received.
#[derive(Debug)]
pub(in crate::testing) struct ArrivedDatagram {
    pub(in crate::testing) bytes: Vec<u8>,
    pub(in crate::testing) from: Address,
    pub(in crate::testing) descriptors: Vec<OwnedFd>,
    pub(in crate::testing) is_truncated: bool,
    pub(in crate::testing) credentials: Option<Credentials>,
}

/// A datagram socket.
#[derive(Debug)]
pub(super) struct SimulatedPort {
    family: PortFamily,
    /// `None` for a UNIX socket without a name.
    host: Option<Address>,
    peer: Option<Address>,
    /// The socket that a UNIX socket is connected to; it may be gone.
    peer_id: Option<SocketId>,
    pub(super) holders: usize,
    inbox: VecDeque<QueuedDatagram>,
    /// What others overtake.
    late: Vec<QueuedDatagram>,
    /// What the unread datagrams take.
    unread: usize,
    /// What the datagrams take that were sent from here and not read. For UNIX sockets.
    charged: usize,
    /// It waits for its peer to have room, and is woken by that.
    waits_for_peer: bool,
    /// The error that the next call is told.
    error: Option<i32>,
    dropped: u32,
    is_told_credentials: bool,
    groups: BTreeSet<IpAddr>,
    hears_itself: bool,
    may_broadcast: bool,
    pub(super) watch: Option<Watch>,
    pub(super) failing: Failing,
    truncated_to: Option<usize>,
}

/// A datagram that has arrived, or is on its way.
#[derive(Debug)]
struct QueuedDatagram {
    bytes: Vec<u8>,
    from: Address,
    /// Whose memory it takes, for UNIX sockets.
    sender: SocketId,
    descriptors: Vec<OwnedFd>,
    charge: usize,
}

impl SimulatedKernel {
    /// Makes a datagram socket with an address, or without one.
    pub(in crate::testing) fn open_port(
        &self,
        family: PortFamily,
        host: Option<Address>,
    ) -> io::Result<SocketId> {
        let mut state = self.state.borrow_mut();
        state.reap();
        let host = match host {
            None => None,
            Some(host) => Some(state.address_for(family, host)?),
        };
        let id = state.new_id();
        state.ports.insert(id, SimulatedPort::new(family, host));
        state.note::<()>(20, id, &Ok(0));
        Ok(id)
    }

    /// Makes two UNIX datagram sockets that are connected with each other, as
    /// socketpair(2) does.
    pub(in crate::testing) fn pair_of_ports(&self) -> (SocketId, SocketId) {
        let mut state = self.state.borrow_mut();
        let (one, other) = (state.new_id(), state.new_id());
        for (id, peer) in [(one, other), (other, one)] {
            let mut port = SimulatedPort::new(PortFamily::Unix, None);
            port.peer = Some(UnixAddress::Unnamed.into());
            port.peer_id = Some(peer);
            state.ports.insert(id, port);
        }
        (one, other)
    }

    pub(in crate::testing) fn connect_port(&self, id: SocketId, peer: Address) -> io::Result<()> {
        let mut state = self.state.borrow_mut();
        let result = state.connect_port(id, peer);
        state.note(21, id, &result.as_ref().map(|()| 0));
        result
    }

    /// Sends one datagram, to `to` or to the peer.
    pub(in crate::testing) fn send_from_port(
        &self,
        id: SocketId,
        data: &[u8],
        to: Option<&Address>,
        descriptors: &[BorrowedFd<'_>],
    ) -> io::Result<()> {
        let mut state = self.state.borrow_mut();
        state.reap();
        let result = state.send_from_port(id, data, to, descriptors);
        state.note(22, id, &result.as_ref().map(|()| data.len()));
        result
    }

    /// Takes the first datagram that has arrived. An error that waits is told first, if
    /// `tells_error` says so.
    pub(in crate::testing) fn receive_at_port(
        &self,
        id: SocketId,
        tells_error: bool,
    ) -> io::Result<ArrivedDatagram> {
        let mut state = self.state.borrow_mut();
        state.reap();
        let result = state.receive_at_port(id, tells_error);
        let noted = result.as_ref().map(|it| it.bytes.len());
        state.note(23, id, &noted);
        result
    }

    /// The family, the own address and the peer's of a datagram socket. `None` if it is
    /// something else.
    pub(in crate::testing) fn names_of_port(
        &self,
        id: SocketId,
    ) -> Option<(PortFamily, Option<Address>, Option<Address>)> {
        let state = self.state.borrow();
        let port = state.ports.get(&id)?;
        Some((port.family, port.host.clone(), port.peer.clone()))
    }

    /// How many datagrams were lost for want of room.
    pub(in crate::testing) fn dropped_at_port(&self, id: SocketId) -> io::Result<u32> {
        let mut state = self.state.borrow_mut();
        state.port(id).map(|port| port.dropped)
    }

    /// Has datagrams come with the credentials of their senders.
    pub(in crate::testing) fn tell_credentials(&self, id: SocketId) -> io::Result<()> {
        let mut state = self.state.borrow_mut();
        state.port(id)?.is_told_credentials = true;
        Ok(())
    }

    /// Whether a UDP socket may send to a broadcast address, and whether what it sends to
    /// a group is received here.
    pub(in crate::testing) fn with_udp_flags<T>(
        &self,
        id: SocketId,
        with: impl FnOnce(&mut bool, &mut bool) -> T,
    ) -> io::Result<T> {
        let mut state = self.state.borrow_mut();
        let port = state.port(id)?;
        Ok(with(&mut port.may_broadcast, &mut port.hears_itself))
    }

    /// Joins a group, or leaves it.
    pub(in crate::testing) fn set_membership(
        &self,
        id: SocketId,
        group: IpAddr,
        joins: bool,
    ) -> io::Result<()> {
        let mut state = self.state.borrow_mut();
        let port = state.port(id)?;
        let is_own_family = port
            .host
            .as_ref()
            .and_then(Address::as_inet)
            .is_some_and(|host| host.is_ipv4() == group.is_ipv4());
        if !group.is_multicast() || !is_own_family {
            return Err(sys::simulated::invalid());
        }
        match (joins, port.groups.contains(&group)) {
            (true, true) => Err(io::ErrorKind::AddrInUse.into()),
            (false, false) => Err(io::ErrorKind::AddrNotAvailable.into()),
            (true, false) => {
                port.groups.insert(group);
                Ok(())
            }
            (false, true) => {
                port.groups.remove(&group);
                Ok(())
            }
        }
    }

    /// How many datagram sockets are open.
    pub fn open_datagram_sockets(&self) -> usize {
        let mut state = self.state.borrow_mut();
        state.reap();
        state.ports.len()
    }
}

impl SimulatedPort {
    fn new(family: PortFamily, host: Option<Address>) -> Self {
        Self {
            family,
            host,
            peer: None,
            peer_id: None,
            holders: 0,
            inbox: VecDeque::new(),
            late: Vec::new(),
            unread: 0,
            charged: 0,
            waits_for_peer: false,
            error: None,
            dropped: 0,
            is_told_credentials: false,
            groups: BTreeSet::new(),
            hears_itself: true,
            may_broadcast: false,
            watch: None,
            failing: Failing::default(),
            truncated_to: None,
        }
    }

    fn inet(&self) -> Option<SocketAddr> {
        self.host.as_ref().and_then(Address::as_inet)
    }
}

impl State {
    fn port(&mut self, id: SocketId) -> io::Result<&mut SimulatedPort> {
        let port = self.ports.get_mut(&id);
        port.ok_or_else(|| io::ErrorKind::NotConnected.into())
    }

    /// The address that a socket gets which asks for `wanted`.
    fn address_for(&mut self, family: PortFamily, wanted: Address) -> io::Result<Address> {
        let is_taken = |state: &Self, address: &Address| {
            state
                .ports
                .values()
                .any(|port| match (port.inet(), address) {
                    (Some(host), Address::Inet(wanted)) => {
                        let is_any = host.ip().is_unspecified() || wanted.ip().is_unspecified();
                        host.port() == wanted.port()
                            && host.is_ipv4() == wanted.is_ipv4()
                            && (is_any || host.ip() == wanted.ip())
                    }
                    _ => port.host.as_ref() == Some(address),
                })
        };
        let mut address = wanted;
        let chooses = match (&address, family) {
            (Address::Inet(address), PortFamily::Udp) => address.port() == 0,
            (Address::Unix(address), PortFamily::Unix) => *address == UnixAddress::Unnamed,
            _ => return Err(sys::simulated::invalid()),
        };
        if !chooses {
            return match is_taken(self, &address) {
                true => Err(io::ErrorKind::AddrInUse.into()),
                false => Ok(address),
            };
        }
        loop {
            let number = self.next_port;
            self.next_port = number.checked_add(1).unwrap_or(FIRST_PORT);
            match &mut address {
                Address::Inet(address) => address.set_port(number),
                address => {
                    let name = format!("{number:05x}").into_bytes();
                    *address = UnixAddress::Abstract(name).into();
                }
            }
            if !is_taken(self, &address) {
                return Ok(address);
            }
        }
    }

    fn connect_port(&mut self, id: SocketId, peer: Address) -> io::Result<()> {
        let family = self.port(id)?.family;
        match (family, &peer) {
            (PortFamily::Udp, Address::Inet(_)) => {
                self.port(id)?.peer = Some(peer);
                Ok(())
            }
            (PortFamily::Unix, Address::Unix(name)) => {
                let other = self.unix_called(name)?;
                self.may_send(id, other)?;
                let port = self.port(id)?;
                port.peer = Some(peer);
                let earlier = port.peer_id.replace(other);
                port.waits_for_peer = false;
                if earlier.is_some() {
                    // It may have waited for the earlier one.
                    self.raise(id, Cause::Room);
                }
                if let Some(earlier) = earlier.filter(|it| *it != other) {
                    self.part_from(id, earlier);
                }
                Ok(())
            }
            _ => Err(sys::simulated::invalid()),
        }
    }

    /// A socket forgets what it has not read of its former peer, and tells it so.
    fn part_from(&mut self, id: SocketId, earlier: SocketId) {
        let Some(port) = self.ports.get_mut(&id) else {
            return;
        };
        let forgotten = std::mem::take(&mut port.inbox);
        port.unread = 0;
        if forgotten.is_empty() {
            return;
        }
        for datagram in forgotten {
            self.release_port(datagram.sender, datagram.charge);
        }
        self.wake_senders(id);
        if let Some(other) = self.ports.get_mut(&earlier)
            && other.peer_id == Some(id)
        {
            other.error = sys::simulated::connection_reset().raw_os_error();
            self.raise(earlier, Cause::Any);
        }
    }

    /// The UNIX socket of that name.
    fn unix_called(&self, name: &UnixAddress) -> io::Result<SocketId> {
        let is_it = |port: &SimulatedPort| {
            let host = port.host.as_ref().and_then(Address::as_unix);
            port.family == PortFamily::Unix && host == Some(name)
        };
        let found = self.ports.iter().find(|(_, port)| is_it(port));
        found.map(|(id, _)| *id).ok_or_else(|| {
            // Its file went with it.
            match name {
                UnixAddress::Path(_) => sys::simulated::no_file(),
                UnixAddress::Abstract(_) => sys::simulated::refused(),
                UnixAddress::Unnamed => sys::simulated::invalid(),
            }
        })
    }

    /// Whether `to` takes datagrams of `from`: not if it is connected to somebody else.
    fn may_send(&self, from: SocketId, to: SocketId) -> io::Result<()> {
        let peer = self.ports.get(&to).and_then(|port| port.peer_id);
        match peer.is_none_or(|peer| peer == from) {
            true => Ok(()),
            false => Err(sys::simulated::not_permitted()),
        }
    }

    fn send_from_port(
        &mut self,
        id: SocketId,
        data: &[u8],
        to: Option<&Address>,
        descriptors: &[BorrowedFd<'_>],
    ) -> io::Result<()> {
        let port = self.port(id)?;
        if let Some(error) = port.failing.send() {
            if error.kind() == io::ErrorKind::WouldBlock {
                self.raise(id, Cause::Room);
            }
            return Err(error);
        }
        if let Some(error) = self.error_by_chance(id, Cause::Room) {
            return Err(error);
        }
        if descriptors.len() > MAX_DESCRIPTORS {
            return Err(sys::simulated::invalid());
        }
        let port = self.port(id)?;
        match port.family {
            PortFamily::Udp => {
                let to = match to.or(port.peer.as_ref()) {
                    None => return Err(sys::simulated::no_destination()),
                    Some(to) => to.as_inet().filter(|to| to.port() > 0),
                };
                let to = to.ok_or_else(sys::simulated::invalid)?;
                self.send_udp(id, data, to)
            }
            PortFamily::Unix => {
                let name = match to {
                    None => None,
                    Some(Address::Unix(name)) => Some(name),
                    Some(_) => return Err(sys::simulated::invalid()),
                };
                self.send_unix(id, data, name, descriptors)
            }
        }
    }

    fn send_udp(&mut self, id: SocketId, data: &[u8], to: SocketAddr) -> io::Result<()> {
        let port = self.port(id)?;
        let longest = match to {
            SocketAddr::V4(_) => LONGEST_V4,
            SocketAddr::V6(_) => LONGEST_V6,
        };
        let host = port.inet().ok_or_else(sys::simulated::invalid)?;
        if host.is_ipv4() != to.is_ipv4() {
            return Err(sys::simulated::invalid());
        }
        if data.len() > longest {
            return Err(sys::simulated::too_long());
        }
        if to.ip() == IpAddr::V4(Ipv4Addr::BROADCAST) && !port.may_broadcast {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        if let Some(error) = port.error.take() {
            return Err(io::Error::from_raw_os_error(error));
        }
        let is_peer = port.peer == Some(Address::Inet(to));
        let from = seen_as(host);
        // The kernel's own copy leaves the socket at once, on the loopback device.
        self.raise(id, Cause::Room);
        if self.happens(self.settings.loss_percent) {
            return Ok(());
        }
        let copies = 1 + usize::from(self.happens(self.settings.duplicate_percent));
        let receivers = self.receivers(id, from, to);
        if receivers.is_empty() && is_peer && !to.ip().is_multicast() {
            // By ICMP, which arrives at once.
            self.port(id)?.error = sys::simulated::refused().raw_os_error();
            self.raise(id, Cause::Any);
        }
        for receiver in receivers {
            for _ in 0..copies {
                let datagram = QueuedDatagram {
                    bytes: data.to_vec(),
                    from: Address::Inet(from),
                    sender: id,
                    descriptors: Vec::new(),
                    charge: udp_charge(data.len()),
                };
                if self.happens(self.settings.reorder_percent)
                    && let Some(port) = self.ports.get_mut(&receiver)
                {
                    port.late.push(datagram);
                } else {
                    self.arrive(receiver, datagram);
                }
            }
        }
        Ok(())
    }

    /// The sockets that receive what is sent from `from` to `to`.
    fn receivers(&self, sender: SocketId, from: SocketAddr, to: SocketAddr) -> Vec<SocketId> {
        let hears_itself = self.ports.get(&sender).is_none_or(|it| it.hears_itself);
        let mut best: Option<(u8, SocketId)> = None;
        let mut all = Vec::new();
        let is_for_all = to.ip().is_multicast() || to.ip() == IpAddr::V4(Ipv4Addr::BROADCAST);
        for (id, port) in &self.ports {
            let Some(host) = port.inet() else {
                continue;
            };
            let is_of_peer = match &port.peer {
                None => true,
                Some(peer) => *peer == Address::Inet(from),
            };
            let is_any = host.ip().is_unspecified();
            if host.port() != to.port()
                || host.is_ipv4() != to.is_ipv4()
                || !is_of_peer
                || !(is_any || host.ip() == to.ip())
            {
                continue;
            }
            if is_for_all {
                let has_joined = !to.ip().is_multicast() || port.groups.contains(&to.ip());
                if has_joined && hears_itself {
                    all.push(*id);
                }
                continue;
            }
            let score = 2 * u8::from(port.peer.is_some()) + u8::from(!is_any);
            if best.is_none_or(|(other, _)| score > other) {
                best = Some((score, *id));
            }
        }
        all.extend(best.map(|(_, id)| id));
        all
    }

    fn arrive(&mut self, receiver: SocketId, datagram: QueuedDatagram) {
        let most = self.settings.receive_buffer;
        if let Some(port) = self.ports.get_mut(&receiver) {
            let is_full = port.unread + datagram.charge > most;
            if port.family == PortFamily::Udp && is_full {
                port.dropped += 1;
                return;
            }
            port.unread += datagram.charge;
            port.inbox.push_back(datagram);
            self.raise(receiver, Cause::Arrival);
        }
    }

    /// Some of what is late for the sockets of a poller arrives.
    pub(super) fn bring_late(&mut self, poller: usize) {
        let mut all = Vec::new();
        for (id, port) in &self.ports {
            let is_here = port.watch.as_ref().is_some_and(|it| it.poller == poller);
            if is_here && !port.late.is_empty() {
                all.push(*id);
            }
        }
        for id in all {
            while self.random.chance(50) && self.bring_one(id) {}
        }
    }

    fn bring_one(&mut self, id: SocketId) -> bool {
        let count = self.ports.get(&id).map_or(0, |port| port.late.len());
        if count == 0 {
            return false;
        }
        let chosen = self.random.below(count);
        if let Some(port) = self.ports.get_mut(&id) {
            let datagram = port.late.swap_remove(chosen);
            self.arrive(id, datagram);
        }
        true
    }

    /// Whether anything is late for a socket of a poller: time does not pass before it has
    /// arrived.
    pub(super) fn has_late(&self, poller: usize) -> bool {
        self.ports.values().any(|port| {
            let is_here = port.watch.as_ref().is_some_and(|it| it.poller == poller);
            is_here && !port.late.is_empty()
        })
    }

    fn send_unix(
        &mut self,
        id: SocketId,
        data: &[u8],
        to: Option<&UnixAddress>,
        descriptors: &[BorrowedFd<'_>],
    ) -> io::Result<()> {
        let limit = self.settings.send_buffer;
        let port = self.port(id)?;
        if data.len() > limit - 32 {
            return Err(sys::simulated::too_long());
        }
        if let Some(error) = port.error.take() {
            return Err(io::Error::from_raw_os_error(error));
        }
        if port.charged >= limit {
            return Err(sys::simulated::would_block());
        }
        let charge = packet_charge(data.len());
        port.charged += charge;
        let result = self.hand_over(id, data, to, descriptors, charge);
        if result.is_err() {
            // The kernel had made its copy by then, and frees it.
            self.release_port(id, charge);
        }
        result
    }

    /// The second half of a send, for which there was memory.
    fn hand_over(
        &mut self,
        id: SocketId,
        data: &[u8],
        to: Option<&UnixAddress>,
        descriptors: &[BorrowedFd<'_>],
        charge: usize,
    ) -> io::Result<()> {
        let port = self.port(id)?;
        let from = port.host.clone();
        let peer = port.peer_id;
        let other = match (to, peer) {
            (Some(name), _) => self.unix_called(name)?,
            (None, None) => return Err(io::ErrorKind::NotConnected.into()),
            (None, Some(peer)) if self.ports.contains_key(&peer) => peer,
            (None, Some(_)) => {
                // It is told once, and then is not connected any more.
                let port = self.port(id)?;
                port.peer = None;
                let gone = port.peer_id.take();
                if let Some(gone) = gone {
                    self.part_from(id, gone);
                }
                return Err(sys::simulated::refused());
            }
        };
        self.may_send(id, other)?;
        if self.is_queue_full(id, other) {
            let port = self.port(id)?;
            port.waits_for_peer |= port.peer_id == Some(other);
            return Err(sys::simulated::would_block());
        }
        let copies = descriptors.iter().map(BorrowedFd::try_clone_to_owned);
        let descriptors = copies.collect::<io::Result<Vec<_>>>()?;
        let datagram = QueuedDatagram {
            bytes: data.to_vec(),
            from: from.unwrap_or_else(|| UnixAddress::Unnamed.into()),
            sender: id,
            descriptors,
            charge,
        };
        self.arrive(other, datagram);
        Ok(())
    }

    /// Whether a UNIX socket has more unread than others may send it.
    fn is_queue_full(&self, sender: SocketId, receiver: SocketId) -> bool {
        self.ports.get(&receiver).is_some_and(|port| {
            sender != receiver
                && port.peer_id != Some(sender)
                && port.inbox.len() > self.settings.datagram_queue
        })
    }

    fn receive_at_port(&mut self, id: SocketId, tells_error: bool) -> io::Result<ArrivedDatagram> {
        let port = self.port(id)?;
        if let Some(error) = port.failing.read() {
            if error.kind() == io::ErrorKind::WouldBlock {
                self.raise(id, Cause::Arrival);
            }
            return Err(error);
        }
        if let Some(error) = self.error_by_chance(id, Cause::Arrival) {
            return Err(error);
        }
        let port = self.port(id)?;
        if tells_error && let Some(error) = port.error.take() {
            return Err(io::Error::from_raw_os_error(error));
        }
        if port.inbox.is_empty() && port.watch.is_none() {
            // Nobody polls for it.
            self.bring_one(id);
        }
        let credentials = self.credentials;
        let port = self.port(id)?;
        let mut datagram = port
            .inbox
            .pop_front()
            .ok_or_else(sys::simulated::would_block)?;
        port.unread -= datagram.charge;
        let mut is_truncated = false;
        if !datagram.descriptors.is_empty()
            && let Some(kept) = port.truncated_to.take()
        {
            is_truncated = kept < datagram.descriptors.len();
            datagram.descriptors.truncate(kept);
        }
        let credentials = credentials.filter(|_| port.is_told_credentials);
        if port.family == PortFamily::Unix {
            self.wake_senders(id);
            self.release_port(datagram.sender, datagram.charge);
        }
        Ok(ArrivedDatagram {
            bytes: datagram.bytes,
            from: datagram.from,
            descriptors: datagram.descriptors,
            is_truncated,
            credentials,
        })
    }

    /// There is room for whoever waits for that.
    fn wake_senders(&mut self, receiver: SocketId) {
        let mut woken = Vec::new();
        for (id, port) in &mut self.ports {
            if port.peer_id == Some(receiver) && std::mem::take(&mut port.waits_for_peer) {
                woken.push(*id);
            }
        }
        for id in woken {
            self.raise(id, Cause::Room);
        }
    }

    /// What a UNIX socket has sent is read, or gone.
    fn release_port(&mut self, sender: SocketId, charge: usize) {
        let limit = self.settings.send_buffer;
        if let Some(port) = self.ports.get_mut(&sender)
            && port.family == PortFamily::Unix
        {
            port.charged -= charge;
            // As for streams.
            if (port.charged + 2) * 4 <= limit {
                self.raise(sender, Cause::Room);
            }
        }
    }

    pub(super) fn port_readiness(&mut self, id: SocketId) -> Readiness {
        let limit = self.settings.send_buffer;
        let Some(port) = self.ports.get(&id) else {
            return Readiness::EMPTY;
        };
        let interest = port.watch.as_ref().map(|watch| watch.interest);
        let is_full = port
            .peer_id
            .is_some_and(|peer| self.is_queue_full(id, peer));
        let has_memory = port.family == PortFamily::Udp || (port.charged + 1) * 4 <= limit;
        let has_unread = !port.inbox.is_empty();
        let has_error = port.error.is_some();
        if has_memory
            && is_full
            && let Some(port) = self.ports.get_mut(&id)
        {
            port.waits_for_peer = true;
        }
        let is_writable = has_memory && !is_full;
        let mut readiness = Readiness::EMPTY;
        if has_unread && matches!(interest, Some(Interest::Readable | Interest::Both)) {
            readiness |= Readiness::READABLE;
        }
        if is_writable && matches!(interest, Some(Interest::Writable | Interest::Both)) {
            readiness |= Readiness::WRITABLE;
        }
        if has_error {
            let is_alone = readiness == Readiness::EMPTY;
            if is_alone || readiness.intersects(Readiness::WRITABLE) {
                readiness |= Readiness::WRITE_CLOSED;
            }
            readiness |= Readiness::ERROR;
        }
        readiness
    }

    pub(super) fn close_port(&mut self, id: SocketId) {
        let Some(port) = self.ports.remove(&id) else {
            return;
        };
        if let Some(watch) = &port.watch {
            self.forget_event(id, watch);
        }
        if port.family == PortFamily::Unix {
            for datagram in &port.inbox {
                self.release_port(datagram.sender, datagram.charge);
            }
            self.wake_senders(id);
        }
        // The descriptors in it are closed here.
        drop(port);
    }

    /// Cuts the next datagram with descriptors.
    pub(super) fn truncate_at_port(&mut self, id: SocketId, kept: usize) {
        if let Some(port) = self.ports.get_mut(&id) {
            port.truncated_to = Some(kept);
        }
    }
}

/// The longest datagrams, in bytes.
pub(in crate::testing) const LONGEST_V4: usize = 65_507;
pub(in crate::testing) const LONGEST_V6: usize = 65_527;

/// What an unread UDP datagram of so many bytes takes (x86-64, the loopback device).
fn udp_charge(length: usize) -> usize {
    match length + UDP_ROOM {
        // There is a cache for heads of this size.
        0..=SMALL_HEAD => SMALL_HEAD + SHARED_INFO + DESCRIPTION,
        size @ ..LARGE_HEAD => {
            let head = size.next_multiple_of(64) + SHARED_INFO;
            head.next_power_of_two() + DESCRIPTION
        }
        // Most of it is in pages, counted by the byte.
        _ => length + 1_024 + DESCRIPTION,
    }
}

/// What the kernel reserves beside the bytes: for the headers of the device, of IP and of
/// UDP, and to align them.
const UDP_ROOM: usize = 59;
/// Up to here a head comes from the cache of small ones.
const SMALL_HEAD: usize = 256;
/// From here on most is in pages.
const LARGE_HEAD: usize = 16_384 - SHARED_INFO;

/// The address that others see of a socket that is bound to all.
fn seen_as(host: SocketAddr) -> SocketAddr {
    match host {
        SocketAddr::V4(host) if host.ip().is_unspecified() => {
            (Ipv4Addr::LOCALHOST, host.port()).into()
        }
        SocketAddr::V6(host) if host.ip().is_unspecified() => {
            (Ipv6Addr::LOCALHOST, host.port()).into()
        }
        _ => host,
    }
}
