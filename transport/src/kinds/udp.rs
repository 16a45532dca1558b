//! UDP sockets.

use std::cell::Cell;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use bowline_protocol::{
    Address, AddressRef, DatagramProtocol, MulticastInterface, Offload, SendRefusal, UdpHandle,
    UdpTransport,
};
use bowline_reactor::{Handle, Reactor, Token};

use super::socket_fd::SocketFd;
use super::{Of, check_datagrams};
use crate::datagram::{self, AfterSendError, Arrivals, DatagramSocket, Outgoing, Port};
use crate::endpoint::{AdoptWith, ConnectWith, ListenWith};
use crate::error::{AdoptError, ListenError, ListenStep};
use crate::sys::{self, Beside, Family, Interface4, SocketName};

/// The transport of a UDP socket.
pub type UdpPort = Port<UdpSocket>;

/// The longest datagrams in bytes, which an IPv4 or IPv6 packet can hold beside the
/// headers.
const LONGEST4: usize = 65_507;
const LONGEST6: usize = 65_527;

/// How many datagrams Linux takes as one message (`UDP_MAX_SEGMENTS`; recently 128).
const MOST_SEGMENTS: usize = 64;

/// A UDP socket.
#[derive(Debug)]
pub struct UdpSocket {
    fd: SocketFd,
    family: Family,
    /// Our address, as it was last known.
    host: Cell<SocketAddr>,
    peer: Option<SocketAddr>,
    room: usize,
    /// How many datagrams are sent as one message, and how long each may be. A longer
    /// one cannot be cut by the kernel, and leaves by itself.
    segments: usize,
    longest_segment: usize,
    receives_offloaded: bool,
}

/// The kind of UDP sockets, over IPv4 and IPv6. [`at`](Self::at) says where to receive,
/// and [`to`](Self::to) who is the peer.
///
/// ```
/// # use bowline::{Context, Datagram, DatagramProtocol, DatagramTransport};
/// # use bowline::Reactor;
/// use bowline::{Transports, Udp};
/// # struct Echo;
/// # impl<T: DatagramTransport> DatagramProtocol<T> for Echo {
/// #     fn datagram_received(&mut self, cx: &mut Context<'_, T>, datagram: &mut Datagram<'_>) {
/// #         cx.transport.send_to(datagram.data, datagram.from);
/// #     }
/// # }
///
/// let mut reactor = Reactor::new()?;
/// let port = reactor.listen(Udp::at(([127, 0, 0, 1], 0).into()), Echo)?;
/// let here = reactor.get(port).map(|port| port.host());
/// # assert!(here.is_some());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// `Udp` itself is the kind to [`adopt`](crate::Transports::adopt) a socket with,
/// connected or not. Others may hold the socket too. Each datagram goes to the one that
/// reads it first.
#[derive(Clone, Copy, Debug, Default)]
pub struct Udp;

/// The settings of a UDP socket without a peer. [`Udp::at`] makes it.
pub type UdpListen = UdpEndpoint<()>;

/// The settings of a UDP socket with one peer. [`Udp::to`] makes it.
pub type UdpConnect = UdpEndpoint<SocketAddr>;

/// The settings of a UDP socket. `P` is its peer, if it has one.
#[derive(Clone, Debug)]
#[must_use = "nothing is bound before it is given to `listen` or `connect`"]
pub struct UdpEndpoint<P> {
    address: Option<SocketAddr>,
    peer: P,
    reuse_address: bool,
    reuse_port: bool,
    only_v6: bool,
    broadcast: bool,
    offload: bool,
    max_datagram: usize,
    receive_buffer: Option<usize>,
    send_buffer: Option<usize>,
}

impl Udp {
    /// Receives the datagrams that are sent to an address. With port 0 the kernel
    /// chooses a port. (Twisted: `listenUDP`.)
    pub fn at(address: SocketAddr) -> UdpListen {
        UdpEndpoint::new(Some(address), ())
    }

    /// Exchanges datagrams with one peer, and no others. If the system reports that
    /// some do not arrive,
    /// [`connection_refused`](bowline_protocol::DatagramProtocol::connection_refused)
    /// is called.
    pub fn to(peer: SocketAddr) -> UdpConnect {
        UdpEndpoint::new(None, peer)
    }
}

impl<P> UdpEndpoint<P> {
    fn new(address: Option<SocketAddr>, peer: P) -> Self {
        Self {
            address,
            peer,
            reuse_address: false,
            reuse_port: false,
            only_v6: false,
            broadcast: false,
            offload: true,
            max_datagram: datagram::ROOM,
            receive_buffer: None,
            send_buffer: None,
        }
    }

    /// Sets whether other sockets of this machine may be bound to the same address
    /// (`SO_REUSEADDR`), if they allow it too; default false. Each receives the
    /// datagrams to a group that it has joined. All other datagrams go to the socket
    /// that was bound last. (Twisted: `listenMultiple`.)
    pub fn reuse_address(mut self, reuse: bool) -> Self {
        self.reuse_address = reuse;
        self
    }

    /// Sets whether other sockets of the same user may be bound to the same address
    /// (`SO_REUSEPORT`); default false. The kernel distributes datagrams between them
    /// by the address of the sender.
    pub fn reuse_port(mut self, reuse: bool) -> Self {
        self.reuse_port = reuse;
        self
    }

    /// Sets whether a socket of IPv6 leaves IPv4 alone (`IPV6_V6ONLY`); default false.
    /// Then datagrams that come over IPv4 have a sender such as `[::ffff:192.0.2.1]`.
    pub fn only_v6(mut self, only: bool) -> Self {
        self.only_v6 = only;
        self
    }

    /// Sets whether datagrams may be sent to a broadcast address (`SO_BROADCAST`); default
    /// false.
    pub fn broadcast(mut self, allowed: bool) -> Self {
        self.broadcast = allowed;
        self
    }

    /// Sets whether the kernel may treat several datagrams of one length as one
    /// message, if it can (`UDP_SEGMENT`, `UDP_GRO`); default true. They arrive one by
    /// one all the same.
    pub fn offload(mut self, on: bool) -> Self {
        self.offload = on;
        self
    }

    /// Sets how many bytes of a datagram are delivered; default 65,536, more than a
    /// datagram can have. The rest of a longer one is lost, and it is marked as
    /// [truncated](bowline_protocol::Datagram::is_truncated). (Twisted:
    /// `maxPacketSize`, 8,192.)
    pub fn max_datagram(mut self, bytes: usize) -> Self {
        self.max_datagram = bytes.clamp(1, datagram::ROOM);
        self
    }

    /// Sets how many bytes the kernel holds until we read them (`SO_RCVBUF`); default
    /// `net.core.rmem_default`. The kernel doubles the number for its own needs, up to
    /// `net.core.rmem_max`. Datagrams that come when the buffer is full are
    /// [dropped](bowline_protocol::DatagramTransport::dropped_by_kernel).
    pub fn receive_buffer(mut self, bytes: usize) -> Self {
        self.receive_buffer = Some(bytes);
        self
    }

    /// Sets how many bytes the kernel holds until they have left (`SO_SNDBUF`). See
    /// [`receive_buffer`](Self::receive_buffer).
    pub fn send_buffer(mut self, bytes: usize) -> Self {
        self.send_buffer = Some(bytes);
        self
    }

    fn open(&self, peer: Option<SocketAddr>) -> Result<UdpSocket, ListenError> {
        let place = self.address.or(peer);
        let place = place.unwrap_or_else(|| (Ipv4Addr::UNSPECIFIED, 0).into());
        let family = family_of(place);
        let fd =
            sys::datagram_socket(family).map_err(ListenError::of(&place, ListenStep::Socket))?;
        self.set_options(fd.as_fd(), family)
            .map_err(ListenError::of(&place, ListenStep::Socket))?;
        if let Some(address) = self.address {
            sys::bind(fd.as_fd(), &SocketName::Inet(address))
                .map_err(ListenError::of(&address, ListenStep::Bind))?;
        }
        if let Some(peer) = peer {
            sys::connect(fd.as_fd(), &SocketName::Inet(peer))
                .map_err(ListenError::of(&peer, ListenStep::Connect))?;
        }
        let mut socket = UdpSocket::new(fd, family, peer);
        socket.room = self.max_datagram;
        if self.offload {
            socket.use_offload();
        }
        Ok(socket)
    }

    fn set_options(&self, fd: BorrowedFd<'_>, family: Family) -> io::Result<()> {
        if self.reuse_address {
            sys::set_reuse_address(fd, true)?;
        }
        if self.reuse_port {
            sys::set_reuse_port(fd, true)?;
        }
        if family == Family::Inet6 {
            sys::set_v6_only(fd, self.only_v6)?;
        }
        if self.broadcast {
            sys::set_broadcast(fd, true)?;
        }
        if let Some(bytes) = self.receive_buffer {
            sys::set_receive_buffer_size(fd, bytes)?;
        }
        if let Some(bytes) = self.send_buffer {
            sys::set_send_buffer_size(fd, bytes)?;
        }
        Ok(())
    }
}

impl UdpConnect {
    /// Sets the address to send from; by default the kernel chooses it.
    pub fn bind_address(mut self, address: SocketAddr) -> Self {
        self.address = Some(address);
        self
    }
}

fn family_of(address: SocketAddr) -> Family {
    match address {
        SocketAddr::V4(_) => Family::Inet4,
        SocketAddr::V6(_) => Family::Inet6,
    }
}

impl<P: DatagramProtocol<UdpPort>> ListenWith<P> for UdpListen {
    type Handle = UdpHandle;
    type Error = ListenError;

    fn listen_with(self, reactor: &mut Reactor, protocol: P) -> Result<UdpHandle, ListenError> {
        install(reactor, self.open(None)?, protocol)
    }
}

impl<P: DatagramProtocol<UdpPort>> ConnectWith<P> for UdpConnect {
    type Handle = UdpHandle;
    type Error = ListenError;

    fn connect_with(self, reactor: &mut Reactor, protocol: P) -> Result<UdpHandle, ListenError> {
        install(reactor, self.open(Some(self.peer))?, protocol)
    }
}

impl<P: DatagramProtocol<UdpPort>> AdoptWith<OwnedFd, P> for Udp {
    type Handle = UdpHandle;

    fn adopt_with(
        self,
        reactor: &mut Reactor,
        fd: OwnedFd,
        protocol: P,
    ) -> Result<UdpHandle, AdoptError> {
        let (fd, family, peer) = check_datagrams(fd, Of::Inet)?;
        let peer = match peer {
            Some(SocketName::Inet(peer)) => Some(peer),
            _ => None,
        };
        let mut socket = UdpSocket::new(fd, family, peer);
        // Receive offload is not set, since other holders of the socket may not expect
        // it.
        socket.use_segmentation();
        datagram::install(reactor, socket, protocol)
            .map(named)
            .map_err(|(error, mut socket)| {
                AdoptError::os(error, socket.fd.take().expect("it was just put there"))
            })
    }
}

fn install<P: DatagramProtocol<UdpPort>>(
    reactor: &mut Reactor,
    socket: UdpSocket,
    protocol: P,
) -> Result<UdpHandle, ListenError> {
    datagram::install(reactor, socket, protocol)
        .map(named)
        .map_err(|(error, socket)| ListenError {
            address: socket.host(),
            step: ListenStep::Watch,
            error,
        })
}

fn named(token: Token) -> UdpHandle {
    Handle::new(token, |facet| {
        facet.downcast_mut::<UdpPort>().map(|port| port as _)
    })
}

impl UdpSocket {
    fn new(fd: OwnedFd, family: Family, peer: Option<SocketAddr>) -> Self {
        let unspecified = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
        let host = match sys::local_name(fd.as_fd()) {
            Ok(SocketName::Inet(address)) => address,
            _ => unspecified,
        };
        Self {
            fd: SocketFd::new(fd),
            family,
            host: Cell::new(host),
            peer,
            room: datagram::ROOM,
            segments: 1,
            longest_segment: usize::MAX,
            receives_offloaded: false,
        }
    }

    fn use_offload(&mut self) {
        self.use_segmentation();
        if let Some(fd) = self.fd.get() {
            self.receives_offloaded = sys::set_receive_offload(fd, true);
        }
    }

    fn use_segmentation(&mut self) {
        if self.fd.get().is_some_and(sys::has_segmentation) {
            self.segments = MOST_SEGMENTS;
        }
    }

    fn longest(&self) -> usize {
        match self.family {
            Family::Inet6 => LONGEST6,
            Family::Inet4 | Family::Unix => LONGEST4,
        }
    }
}

impl DatagramSocket for UdpSocket {
    fn kind(&self) -> &'static str {
        "UDP"
    }

    fn host(&self) -> Address {
        // The first send binds it at the latest.
        if let Ok(SocketName::Inet(address)) = self.fd.name() {
            self.host.set(address);
        }
        self.host.get().into()
    }

    fn peer(&self) -> Option<Address> {
        self.peer.map(Address::Inet)
    }

    #[inline]
    fn source(&self) -> Option<BorrowedFd<'_>> {
        self.fd.get()
    }

    #[inline]
    fn room(&self) -> usize {
        self.room
    }

    #[inline]
    fn receive(&mut self, arrivals: &mut Arrivals, count: usize) -> io::Result<usize> {
        let fd = self.fd.open()?;
        arrivals.batch.receive(fd, count, Beside::Segments)
    }

    fn send(&mut self, outgoing: &Outgoing<'_>) -> io::Result<usize> {
        if let Some(only) = outgoing.queue.only() {
            return sys::send_one(self.fd.open()?, only.name, only.data).map(|()| 1);
        }
        let mut batch = outgoing.shared.send_batch.borrow_mut();
        loop {
            let runs = || outgoing.queue.runs(self.segments, self.longest_segment);
            match sys::send_messages(self.fd.open()?, runs(), &mut batch) {
                Ok(sent) => return Ok(sent),
                Err(error) => {
                    let segment = runs().next().and_then(|(message, _)| message.segment);
                    let Some(segment) = segment.filter(|_| sys::is_of_segmentation(&error)) else {
                        return Err(error);
                    };
                    match error.kind() {
                        // Too long to be cut on this route. A single datagram may still
                        // be sent in fragments.
                        io::ErrorKind::InvalidInput => {
                            self.longest_segment = usize::from(segment) - 1;
                        }
                        // The network card cannot compute checksums.
                        _ => self.segments = 1,
                    }
                }
            }
        }
    }

    fn take_error(&mut self) -> Option<io::Error> {
        sys::take_error(self.fd.get()?).ok().flatten()
    }

    fn after(&self, error: &io::Error, to: Option<AddressRef<'_>>) -> AfterSendError {
        if error.kind() == io::ErrorKind::WouldBlock {
            AfterSendError::WaitForRoom
        } else if sys::is_transient(error) {
            AfterSendError::WaitForTime
        } else if to.is_none() && self.is_refusal(error) {
            AfterSendError::TryAgain
        } else {
            AfterSendError::Fail
        }
    }

    #[inline]
    fn refuses(&self, length: usize, to: Option<AddressRef<'_>>) -> Option<SendRefusal> {
        if length > self.longest() {
            return Some(SendRefusal::TooLong);
        }
        match to {
            None if self.peer.is_none() => Some(SendRefusal::NotConnected),
            None => None,
            Some(AddressRef::Inet(address)) if family_of(address) == self.family => None,
            Some(_) => Some(SendRefusal::WrongFamily),
        }
    }

    fn connect(&mut self, peer: AddressRef<'_>) -> io::Result<()> {
        let address = match peer {
            AddressRef::Inet(address) if family_of(address) == self.family => address,
            _ => return Err(io::ErrorKind::InvalidInput.into()),
        };
        sys::connect(self.fd.open()?, &SocketName::Inet(address))?;
        self.peer = Some(address);
        Ok(())
    }

    fn dropped(&self) -> io::Result<u32> {
        sys::dropped(self.fd.open()?)
    }

    fn duplicate(&self) -> io::Result<OwnedFd> {
        self.fd.duplicate()
    }

    fn close(&mut self) {
        self.host();
        self.fd.close();
    }
}

impl UdpTransport for UdpPort {
    fn broadcast(&self) -> io::Result<bool> {
        sys::broadcast(self.open_socket()?)
    }

    fn set_broadcast(&mut self, allowed: bool) -> io::Result<()> {
        sys::set_broadcast(self.open_socket()?, allowed)
    }

    fn join_multicast(&mut self, group: IpAddr, interface: MulticastInterface) -> io::Result<()> {
        set_membership(&self.socket, group, interface, true)
    }

    fn leave_multicast(&mut self, group: IpAddr, interface: MulticastInterface) -> io::Result<()> {
        set_membership(&self.socket, group, interface, false)
    }

    fn set_multicast_interface(&mut self, interface: MulticastInterface) -> io::Result<()> {
        let fd = self.open_socket()?;
        match self.socket.family {
            Family::Inet6 => sys::set_multicast_interface6(fd, index_of(interface)?),
            Family::Inet4 | Family::Unix => sys::set_multicast_interface4(fd, of_v4(interface)),
        }
    }

    fn multicast_ttl(&self) -> io::Result<u32> {
        sys::multicast_hops(self.open_socket()?, self.socket.family)
    }

    fn set_multicast_ttl(&mut self, hops: u32) -> io::Result<()> {
        sys::set_multicast_hops(self.open_socket()?, self.socket.family, hops)
    }

    fn multicast_loopback(&self) -> io::Result<bool> {
        sys::multicast_loopback(self.open_socket()?, self.socket.family)
    }

    fn set_multicast_loopback(&mut self, on: bool) -> io::Result<()> {
        sys::set_multicast_loopback(self.open_socket()?, self.socket.family, on)
    }

    fn offload(&self) -> Offload {
        Offload::new(self.socket.segments, self.socket.receives_offloaded)
    }

    fn udp_handle(&self) -> UdpHandle {
        self.named(|facet| facet.downcast_mut::<Self>().map(|port| port as _))
    }
}

fn set_membership(
    socket: &UdpSocket,
    group: IpAddr,
    interface: MulticastInterface,
    joins: bool,
) -> io::Result<()> {
    let fd = socket.fd.open()?;
    match (group, socket.family) {
        _ if !group.is_multicast() => Err(io::ErrorKind::InvalidInput.into()),
        (IpAddr::V4(group), Family::Inet4) => {
            sys::set_membership4(fd, group, of_v4(interface), joins)
        }
        (IpAddr::V6(group), Family::Inet6) => {
            sys::set_membership6(fd, group, index_of(interface)?, joins)
        }
        _ => Err(io::ErrorKind::InvalidInput.into()),
    }
}

fn of_v4(interface: MulticastInterface) -> Interface4 {
    let (address, index) = match interface {
        MulticastInterface::Index(index) => (Ipv4Addr::UNSPECIFIED, index),
        MulticastInterface::Address(address) => (address, 0),
        _ => (Ipv4Addr::UNSPECIFIED, 0),
    };
    Interface4 { address, index }
}

fn index_of(interface: MulticastInterface) -> io::Result<u32> {
    match interface {
        MulticastInterface::Any => Ok(0),
        MulticastInterface::Index(index) => Ok(index),
        _ => Err(io::ErrorKind::InvalidInput.into()),
    }
}
