//! Datagram sockets on a simulated kernel, under the real port: UDP and UNIX.

use std::fmt;
use std::io;
use std::marker::PhantomData;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use bowline_protocol::{
    Address, AddressRef, Credentials, DatagramProtocol, Linger, MulticastInterface, Offload,
    PassedDescriptor, SendDescriptorError, SendRefusal, SendStatus, UdpHandle, UdpTransport,
    UnixAddress, UnixAddressRef, UnixDatagramHandle, UnixDatagramTransport,
};
use bowline_reactor::{Handle, Interest, Reactor, Token};

use super::kernel::{
    ArrivedDatagram, Holder, LONGEST_V4, LONGEST_V6, PortFamily, SimulatedKernel, SocketId,
};
use crate::datagram::{self, AfterSendError, Arrivals, DatagramSocket, Outgoing, Port};
use crate::endpoint::{AdoptWith, ConnectWith, ListenWith};
use crate::error::{AdoptError, ListenError, ListenStep};
use crate::file_descriptor::not_connected;
use crate::sys;

/// The transport of a UDP socket in memory: all of it is the real one, but for the socket.
///
/// Feature `testing`.
pub type MemoryUdpPort = Port<MemoryDatagramSocket<MemoryUdp>>;

/// The transport of a UNIX datagram socket in memory.
///
/// Feature `testing`.
pub type MemoryUnixDatagramPort = Port<MemoryDatagramSocket<MemoryUnixDatagram>>;

/// UDP in memory, a kind like [`Udp`](crate::Udp).
///
/// By the settings of its kernel datagrams are lost, arrive twice, or are overtaken:
/// [`loss_percent`](super::KernelSettings::loss_percent) and those beside it.
///
/// # Examples
///
/// ```
/// use bowline::testing::{MemoryDatagramPeer, MemoryUdp, Simulation};
/// use bowline::{Context, Datagram, DatagramProtocol, DatagramTransport, Transports};
///
/// struct Echo;
///
/// impl<T: DatagramTransport> DatagramProtocol<T> for Echo {
///     fn datagram_received(&mut self, cx: &mut Context<'_, T>, datagram: &mut Datagram<'_>) {
///         cx.transport.send_to(datagram.data, datagram.from);
///     }
/// }
///
/// let mut simulation = Simulation::new(7);
/// let server = simulation.spawn()?;
/// let kernel = simulation.kernel().clone();
/// let here: std::net::SocketAddr = "192.0.2.1:53".parse()?;
/// let reactor = simulation.reactor(server).expect("it lives");
/// reactor.listen(MemoryUdp::at(&kernel, here), Echo)?;
///
/// let client = MemoryDatagramPeer::udp(&kernel, "192.0.2.7:0".parse()?)?;
/// client.send_to(b"hello", &here.into())?;
/// simulation.run();
/// assert_eq!(client.receive()?.bytes, b"hello");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// Feature `testing`.
#[derive(Clone, Copy, Debug, Default)]
pub struct MemoryUdp;

/// UNIX datagrams in memory, a kind like [`UnixDatagram`](crate::UnixDatagram). A
/// [`MemoryDatagramSocket`] is adopted as `MemoryUnixDatagram`.
///
/// A path names a socket in its kernel only; there is no file.
///
/// Feature `testing`.
#[derive(Clone, Copy, Debug, Default)]
pub struct MemoryUnixDatagram;

/// The kind of a datagram socket in memory: [`MemoryUdp`] or [`MemoryUnixDatagram`].
///
/// Feature `testing`.
pub trait MemoryDatagramKind: Copy + fmt::Debug + 'static {
    /// Its name in log lines.
    const NAME: &'static str;
    /// Whether it is UDP, and not UNIX.
    const IS_UDP: bool;
}

impl MemoryDatagramKind for MemoryUdp {
    const NAME: &'static str = "memory UDP";
    const IS_UDP: bool = true;
}

impl MemoryDatagramKind for MemoryUnixDatagram {
    const NAME: &'static str = "memory UNIX datagram";
    const IS_UDP: bool = false;
}

fn family<K: MemoryDatagramKind>() -> PortFamily {
    match K::IS_UDP {
        true => PortFamily::Udp,
        false => PortFamily::Unix,
    }
}

/// A datagram socket of a [`SimulatedKernel`]. Dropping it closes it.
///
/// Feature `testing`.
#[derive(Debug)]
pub struct MemoryDatagramSocket<K> {
    kernel: SimulatedKernel,
    id: SocketId,
    holder: Holder,
    is_open: bool,
    host: Address,
    peer: Option<Address>,
    room: usize,
    /// Came behind datagrams, and is told by the next receive.
    error: Option<io::Error>,
    kind: PhantomData<K>,
}

/// The settings of a datagram socket in memory. `P` is its peer, if it has one.
///
/// Feature `testing`.
#[derive(Clone, Debug)]
#[must_use = "nothing is bound before it is given to `listen` or `connect`"]
pub struct MemoryDatagramEndpoint<K, P> {
    kernel: SimulatedKernel,
    host: Option<Address>,
    peer: P,
    credentials: bool,
    max_datagram: usize,
    kind: PhantomData<K>,
}

impl MemoryUdp {
    /// Receives the datagrams that are sent to this address. Port 0 is a free one.
    pub fn at(kernel: &SimulatedKernel, address: SocketAddr) -> MemoryDatagramEndpoint<Self, ()> {
        MemoryDatagramEndpoint::new(kernel, Some(address.into()), ())
    }

    /// Exchanges datagrams with one peer, from a port of this machine's own address.
    pub fn to(kernel: &SimulatedKernel, peer: SocketAddr) -> MemoryDatagramEndpoint<Self, Address> {
        let host: SocketAddr = match peer {
            SocketAddr::V4(_) => ([127, 0, 0, 1], 0).into(),
            SocketAddr::V6(_) => (std::net::Ipv6Addr::LOCALHOST, 0).into(),
        };
        MemoryDatagramEndpoint::new(kernel, Some(host.into()), peer.into())
    }
}

impl MemoryUnixDatagram {
    /// Receives the datagrams that are sent to this name. With [`UnixAddress::Unnamed`]
    /// the kernel chooses one.
    pub fn at(
        kernel: &SimulatedKernel,
        address: impl Into<UnixAddress>,
    ) -> MemoryDatagramEndpoint<Self, ()> {
        MemoryDatagramEndpoint::new(kernel, Some(address.into().into()), ())
    }

    /// Exchanges datagrams with one peer, which has to be there already.
    pub fn to(
        kernel: &SimulatedKernel,
        peer: impl Into<UnixAddress>,
    ) -> MemoryDatagramEndpoint<Self, Address> {
        MemoryDatagramEndpoint::new(kernel, None, peer.into().into())
    }
}

impl<K, P> MemoryDatagramEndpoint<K, P> {
    fn new(kernel: &SimulatedKernel, host: Option<Address>, peer: P) -> Self {
        Self {
            kernel: kernel.clone(),
            host,
            peer,
            credentials: false,
            max_datagram: datagram::ROOM,
            kind: PhantomData,
        }
    }

    /// Sets how many bytes of a datagram are delivered; default 65,536.
    pub fn max_datagram(mut self, bytes: usize) -> Self {
        self.max_datagram = bytes.max(1);
        self
    }
}

impl<P> MemoryDatagramEndpoint<MemoryUnixDatagram, P> {
    /// Sets whether datagrams come with the
    /// [credentials](SimulatedKernel::set_peer_credentials) of their sender; default
    /// false.
    pub fn credentials(mut self, wanted: bool) -> Self {
        self.credentials = wanted;
        self
    }
}

impl<K: MemoryDatagramKind> MemoryDatagramEndpoint<K, Address> {
    /// Sets the address to send from.
    pub fn bind_address(mut self, address: impl Into<Address>) -> Self {
        self.host = Some(address.into());
        self
    }
}

impl<K: MemoryDatagramKind, P> MemoryDatagramEndpoint<K, P> {
    fn open(self, peer: Option<Address>) -> Result<MemoryDatagramSocket<K>, ListenError> {
        let place = self.host.clone().or_else(|| peer.clone());
        let place = place.unwrap_or_else(|| UnixAddress::Unnamed.into());
        let failed = |address: &Address, step, error| ListenError {
            address: address.clone(),
            step,
            error,
        };
        let id = self.kernel.open_port(family::<K>(), self.host);
        let id = id.map_err(|error| failed(&place, ListenStep::Bind, error))?;
        let mut socket = MemoryDatagramSocket::new(self.kernel, id);
        socket.room = self.max_datagram;
        if self.credentials {
            let told = socket.kernel.tell_credentials(id);
            told.map_err(|error| failed(&place, ListenStep::Socket, error))?;
        }
        if let Some(peer) = peer {
            let connected = socket.connect(peer.as_ref());
            connected.map_err(|error| failed(&peer, ListenStep::Connect, error))?;
        }
        Ok(socket)
    }
}

impl<K: MemoryDatagramKind> MemoryDatagramSocket<K> {
    fn new(kernel: SimulatedKernel, id: SocketId) -> Self {
        let holder = kernel.hold(id);
        let (_, host, peer) = kernel
            .names_of_port(id)
            .unwrap_or_else(|| (family::<K>(), None, None));
        Self {
            kernel,
            id,
            holder,
            is_open: true,
            host: host.unwrap_or_else(|| UnixAddress::Unnamed.into()),
            peer,
            room: datagram::ROOM,
            error: None,
            kind: PhantomData,
        }
    }

    /// Why nothing can be sent to this address.
    fn refuses_address(&self, to: AddressRef<'_>) -> Option<SendRefusal> {
        match (&self.host, to) {
            (Address::Inet(host), AddressRef::Inet(to)) if host.is_ipv4() == to.is_ipv4() => None,
            (Address::Unix(_), AddressRef::Unix(UnixAddressRef::Unnamed)) => {
                Some(SendRefusal::BadAddress)
            }
            (Address::Unix(_), AddressRef::Unix(_)) => None,
            _ => Some(SendRefusal::WrongFamily),
        }
    }

    /// How long a datagram is at most.
    fn longest(&self) -> usize {
        match &self.host {
            Address::Inet(SocketAddr::V4(_)) => LONGEST_V4,
            Address::Inet(SocketAddr::V6(_)) => LONGEST_V6,
            _ => self.kernel.settings().send_buffer - 32,
        }
    }

    /// Its name in its kernel.
    pub fn id(&self) -> SocketId {
        self.id
    }

    /// Makes it a descriptor, as
    /// [`MemorySocket::into_descriptor`](super::MemorySocket::into_descriptor) does.
    ///
    /// # Errors
    ///
    /// `EMFILE`, since this takes two descriptors. The socket is closed then.
    pub fn into_descriptor(self) -> io::Result<OwnedFd> {
        self.kernel.park(self.id)
    }

    /// Makes a socket of a descriptor that stands for it, or of a copy.
    ///
    /// # Errors
    ///
    /// Gives the descriptor back if it stands for no such socket of this thread.
    pub fn from_descriptor(fd: OwnedFd) -> Result<Self, OwnedFd> {
        match SimulatedKernel::unpark(fd.as_fd()) {
            Some((kernel, id)) if is_port::<K>(&kernel, id) => Ok(Self::new(kernel, id)),
            _ => Err(fd),
        }
    }
}

/// The credentials as the kernel puts them beside a message.
fn as_told(credentials: Credentials) -> sys::Credentials {
    sys::Credentials {
        pid: credentials.pid,
        uid: credentials.uid,
        gid: credentials.gid,
    }
}

fn is_port<K: MemoryDatagramKind>(kernel: &SimulatedKernel, id: SocketId) -> bool {
    let names = kernel.names_of_port(id);
    names.is_some_and(|(it, ..)| it == family::<K>())
}

impl SimulatedKernel {
    /// Makes two UNIX datagram sockets that are connected with each other.
    pub fn pair_of_datagram_sockets(
        &self,
    ) -> (
        MemoryDatagramSocket<MemoryUnixDatagram>,
        MemoryDatagramSocket<MemoryUnixDatagram>,
    ) {
        let (one, other) = self.pair_of_ports();
        (
            MemoryDatagramSocket::new(self.clone(), one),
            MemoryDatagramSocket::new(self.clone(), other),
        )
    }
}

impl<K: MemoryDatagramKind> DatagramSocket for MemoryDatagramSocket<K> {
    fn kind(&self) -> &'static str {
        K::NAME
    }

    fn host(&self) -> Address {
        self.host.clone()
    }

    fn peer(&self) -> Option<Address> {
        self.peer.clone()
    }

    fn source(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn is_open(&self) -> bool {
        self.is_open
    }

    fn watch(&self, reactor: &mut Reactor, token: Token, writes: bool) -> io::Result<()> {
        let interest = match writes {
            true => Interest::Both,
            false => Interest::Readable,
        };
        let place = (self.id, self.holder);
        self.kernel.watch(place, reactor, token, interest)
    }

    fn unwatch(&self, _: &mut Reactor) {
        self.kernel.unwatch(self.id, self.holder);
    }

    fn room(&self) -> usize {
        self.room
    }

    fn receive(&mut self, arrivals: &mut Arrivals, count: usize) -> io::Result<usize> {
        if let Some(error) = self.error.take() {
            return Err(error);
        }
        let mut received = 0;
        while received < count {
            match self.kernel.receive_at_port(self.id, received == 0) {
                Ok(datagram) => {
                    let ArrivedDatagram {
                        bytes,
                        from,
                        descriptors,
                        is_truncated,
                        credentials,
                    } = datagram;
                    arrivals.push(&bytes, from.as_ref(), descriptors, is_truncated);
                    arrivals
                        .batch
                        .set_credentials(received, credentials.map(as_told));
                    received += 1;
                }
                Err(error) if received == 0 => return Err(error),
                Err(error) => {
                    let is_room = error.kind() == io::ErrorKind::WouldBlock;
                    self.error = Some(error).filter(|_| !is_room);
                    // What is told by the next receive is asked for at once.
                    return Ok(if is_room { received } else { count });
                }
            }
        }
        Ok(received)
    }

    fn send(&mut self, outgoing: &Outgoing<'_>) -> io::Result<usize> {
        let mut sent = 0;
        for datagram in outgoing.datagrams() {
            let descriptors: Vec<_> = datagram.descriptors.iter().map(AsFd::as_fd).collect();
            let to = datagram.to.map(AddressRef::to_address);
            let data = datagram.data;
            let result = self
                .kernel
                .send_from_port(self.id, data, to.as_ref(), &descriptors);
            match result {
                Ok(()) => sent += 1,
                Err(error) if sent == 0 => return Err(error),
                // As sendmmsg(2), whose callers do not hear of it.
                Err(_) => break,
            }
        }
        Ok(sent)
    }

    fn after(&self, error: &io::Error, to: Option<AddressRef<'_>>) -> AfterSendError {
        let is_udp = K::IS_UDP;
        match error.kind() {
            io::ErrorKind::WouldBlock if is_udp || to.is_none() => AfterSendError::WaitForRoom,
            io::ErrorKind::WouldBlock => AfterSendError::WaitForPeer,
            _ if sys::is_transient(error) => AfterSendError::WaitForTime,
            _ if is_udp && to.is_none() && self.is_refusal(error) => AfterSendError::TryAgain,
            _ => AfterSendError::Fail,
        }
    }

    fn refuses(&self, length: usize, to: Option<AddressRef<'_>>) -> Option<SendRefusal> {
        if length > self.longest() {
            return Some(SendRefusal::TooLong);
        }
        match to {
            None if self.peer.is_none() => Some(SendRefusal::NotConnected),
            None => None,
            Some(to) => self.refuses_address(to),
        }
    }

    fn connect(&mut self, peer: AddressRef<'_>) -> io::Result<()> {
        if self.refuses_address(peer).is_some() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.kernel.connect_port(self.id, peer.to_address())?;
        self.peer = Some(peer.to_address());
        Ok(())
    }

    fn dropped(&self) -> io::Result<u32> {
        match self.is_open {
            true => self.kernel.dropped_at_port(self.id),
            false => Err(not_connected()),
        }
    }

    fn duplicate(&self) -> io::Result<OwnedFd> {
        match self.is_open {
            true => self.kernel.park(self.id),
            false => Err(not_connected()),
        }
    }

    fn close(&mut self) {
        if std::mem::take(&mut self.is_open) {
            self.kernel.close(self.id, self.holder);
        }
    }
}

impl<K> Drop for MemoryDatagramSocket<K> {
    fn drop(&mut self) {
        if std::mem::take(&mut self.is_open) {
            self.kernel.close(self.id, self.holder);
        }
    }
}

impl<K: MemoryDatagramKind> Port<MemoryDatagramSocket<K>> {
    /// The name of the socket below, to tell its kernel what should happen to it.
    /// Feature `testing`.
    pub fn socket_id(&self) -> SocketId {
        self.socket.id
    }

    fn opened(&self) -> io::Result<&MemoryDatagramSocket<K>> {
        match self.socket.is_open {
            true => Ok(&self.socket),
            false => Err(not_connected()),
        }
    }
}

/// Groups and their loop work, broadcast too. Hops and interfaces have no effect.
impl UdpTransport for MemoryUdpPort {
    fn broadcast(&self) -> io::Result<bool> {
        let socket = self.opened()?;
        socket
            .kernel
            .with_udp_flags(socket.id, |allowed, _| *allowed)
    }

    fn set_broadcast(&mut self, allowed: bool) -> io::Result<()> {
        let socket = self.opened()?;
        socket
            .kernel
            .with_udp_flags(socket.id, |it, _| *it = allowed)
    }

    fn join_multicast(&mut self, group: IpAddr, _: MulticastInterface) -> io::Result<()> {
        let socket = self.opened()?;
        socket.kernel.set_membership(socket.id, group, true)
    }

    fn leave_multicast(&mut self, group: IpAddr, _: MulticastInterface) -> io::Result<()> {
        let socket = self.opened()?;
        socket.kernel.set_membership(socket.id, group, false)
    }

    fn set_multicast_interface(&mut self, _: MulticastInterface) -> io::Result<()> {
        self.opened().map(|_| ())
    }

    fn multicast_ttl(&self) -> io::Result<u32> {
        self.opened().map(|_| 1)
    }

    fn set_multicast_ttl(&mut self, hops: u32) -> io::Result<()> {
        self.opened()?;
        match hops {
            0..=255 => Ok(()),
            _ => Err(sys::simulated::invalid()),
        }
    }

    fn multicast_loopback(&self) -> io::Result<bool> {
        let socket = self.opened()?;
        socket.kernel.with_udp_flags(socket.id, |_, hears| *hears)
    }

    fn set_multicast_loopback(&mut self, on: bool) -> io::Result<()> {
        let socket = self.opened()?;
        socket
            .kernel
            .with_udp_flags(socket.id, |_, hears| *hears = on)
    }

    fn offload(&self) -> Offload {
        Offload::new(1, false)
    }

    fn udp_handle(&self) -> UdpHandle {
        self.named(|facet| facet.downcast_mut::<Self>().map(|port| port as _))
    }
}

impl UnixDatagramTransport for MemoryUnixDatagramPort {
    fn send_with_descriptors(
        &mut self,
        data: &[u8],
        to: Option<AddressRef<'_>>,
        descriptors: Vec<PassedDescriptor>,
    ) -> Result<SendStatus, SendDescriptorError> {
        self.queue_with_descriptors(data, to, descriptors)
    }

    fn unsent_descriptors(&self) -> usize {
        self.unsent_descriptor_count()
    }

    fn set_received_linger(&mut self, linger: Linger) {
        self.set_linger(linger);
    }

    fn set_descriptors_accepted(&mut self, _: bool) -> io::Result<()> {
        Err(not_connected())
    }

    fn unix_datagram_handle(&self) -> UnixDatagramHandle {
        self.named(|facet| facet.downcast_mut::<Self>().map(|port| port as _))
    }
}

fn install<K, P>(
    reactor: &mut Reactor,
    socket: MemoryDatagramSocket<K>,
    protocol: P,
) -> Result<Token, ListenError>
where
    K: MemoryDatagramKind,
    P: DatagramProtocol<Port<MemoryDatagramSocket<K>>>,
{
    datagram::install(reactor, socket, protocol).map_err(|(error, socket)| ListenError {
        address: socket.host(),
        step: ListenStep::Watch,
        error,
    })
}

fn udp_named(token: Token) -> UdpHandle {
    Handle::new(token, |facet| {
        facet.downcast_mut::<MemoryUdpPort>().map(|port| port as _)
    })
}

fn unix_named(token: Token) -> UnixDatagramHandle {
    Handle::new(token, |facet| {
        facet
            .downcast_mut::<MemoryUnixDatagramPort>()
            .map(|port| port as _)
    })
}

impl<P: DatagramProtocol<MemoryUdpPort>> ListenWith<P> for MemoryDatagramEndpoint<MemoryUdp, ()> {
    type Handle = UdpHandle;
    type Error = ListenError;

    fn listen_with(self, reactor: &mut Reactor, protocol: P) -> Result<UdpHandle, ListenError> {
        install(reactor, self.open(None)?, protocol).map(udp_named)
    }
}

impl<P: DatagramProtocol<MemoryUdpPort>> ConnectWith<P>
    for MemoryDatagramEndpoint<MemoryUdp, Address>
{
    type Handle = UdpHandle;
    type Error = ListenError;

    fn connect_with(self, reactor: &mut Reactor, protocol: P) -> Result<UdpHandle, ListenError> {
        let peer = self.peer.clone();
        install(reactor, self.open(Some(peer))?, protocol).map(udp_named)
    }
}

impl<P: DatagramProtocol<MemoryUnixDatagramPort>> ListenWith<P>
    for MemoryDatagramEndpoint<MemoryUnixDatagram, ()>
{
    type Handle = UnixDatagramHandle;
    type Error = ListenError;

    fn listen_with(self, reactor: &mut Reactor, protocol: P) -> Result<Self::Handle, ListenError> {
        install(reactor, self.open(None)?, protocol).map(unix_named)
    }
}

impl<P: DatagramProtocol<MemoryUnixDatagramPort>> ConnectWith<P>
    for MemoryDatagramEndpoint<MemoryUnixDatagram, Address>
{
    type Handle = UnixDatagramHandle;
    type Error = ListenError;

    fn connect_with(self, reactor: &mut Reactor, protocol: P) -> Result<Self::Handle, ListenError> {
        let peer = self.peer.clone();
        install(reactor, self.open(Some(peer))?, protocol).map(unix_named)
    }
}

impl<P: DatagramProtocol<MemoryUnixDatagramPort>> AdoptWith<MemoryDatagramSocket<Self>, P>
    for MemoryUnixDatagram
{
    type Handle = UnixDatagramHandle;

    fn adopt_with(
        self,
        reactor: &mut Reactor,
        socket: MemoryDatagramSocket<Self>,
        protocol: P,
    ) -> Result<Self::Handle, AdoptError<MemoryDatagramSocket<Self>>> {
        datagram::install(reactor, socket, protocol)
            .map(unix_named)
            .map_err(|(error, socket)| AdoptError::os(error, socket))
    }
}

/// A datagram socket that a test holds itself. Dropping it closes it.
///
/// Feature `testing`.
#[derive(Debug)]
pub struct MemoryDatagramPeer {
    kernel: SimulatedKernel,
    id: SocketId,
    holder: Holder,
}

/// A datagram that a [`MemoryDatagramPeer`] has received.
///
/// Feature `testing`.
#[derive(Debug)]
#[non_exhaustive]
pub struct DatagramRead {
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// Its sender.
    pub from: Address,
    /// The descriptors that came with it, in order.
    pub descriptors: Vec<OwnedFd>,
    /// The credentials of its sender. None, since a peer does not ask for them.
    pub credentials: Option<Credentials>,
}

impl MemoryDatagramPeer {
    /// A UDP socket with this address. Port 0 is a free one.
    ///
    /// # Errors
    ///
    /// `AddrInUse` if another socket has it.
    pub fn udp(kernel: &SimulatedKernel, address: SocketAddr) -> io::Result<Self> {
        Self::open(kernel, PortFamily::Udp, Some(address.into()))
    }

    /// A UNIX datagram socket with this name. With [`UnixAddress::Unnamed`] the kernel
    /// chooses one.
    ///
    /// # Errors
    ///
    /// `AddrInUse` if another socket has it.
    pub fn unix(kernel: &SimulatedKernel, address: impl Into<UnixAddress>) -> io::Result<Self> {
        Self::open(kernel, PortFamily::Unix, Some(address.into().into()))
    }

    /// A UNIX datagram socket without a name.
    pub fn unnamed(kernel: &SimulatedKernel) -> Self {
        let id = kernel.open_port(PortFamily::Unix, None);
        let id = id.expect("only a name can be taken");
        Self::new(kernel, id)
    }

    /// Takes a socket out of the hands of the loop.
    pub fn of<K: MemoryDatagramKind>(socket: MemoryDatagramSocket<K>) -> Self {
        Self::new(&socket.kernel.clone(), socket.id)
    }

    fn open(
        kernel: &SimulatedKernel,
        family: PortFamily,
        host: Option<Address>,
    ) -> io::Result<Self> {
        let id = kernel.open_port(family, host)?;
        Ok(Self::new(kernel, id))
    }

    fn new(kernel: &SimulatedKernel, id: SocketId) -> Self {
        Self {
            kernel: kernel.clone(),
            id,
            holder: kernel.hold(id),
        }
    }

    /// Its own address.
    pub fn address(&self) -> Address {
        let names = self.kernel.names_of_port(self.id);
        let host = names.and_then(|(_, host, _)| host);
        host.unwrap_or_else(|| UnixAddress::Unnamed.into())
    }

    /// Connects it to a peer.
    ///
    /// # Errors
    ///
    /// For a UNIX socket `NotFound` or `ConnectionRefused` if the peer is not there, and
    /// `PermissionDenied` if that is connected to somebody else.
    pub fn connect(&self, peer: &Address) -> io::Result<()> {
        self.kernel.connect_port(self.id, peer.clone())
    }

    /// Sends one datagram to its peer.
    ///
    /// # Errors
    ///
    /// `WouldBlock` if a UNIX socket has no room; `ConnectionRefused` if the peer is not
    /// there; `EMSGSIZE` if it is too long.
    pub fn send(&self, data: &[u8]) -> io::Result<()> {
        self.kernel.send_from_port(self.id, data, None, &[])
    }

    /// Sends one datagram to `to`.
    ///
    /// # Errors
    ///
    /// As [`send`](Self::send).
    pub fn send_to(&self, data: &[u8], to: &Address) -> io::Result<()> {
        self.kernel.send_from_port(self.id, data, Some(to), &[])
    }

    /// Sends one datagram with copies of `descriptors`, to `to` or to its peer.
    ///
    /// # Errors
    ///
    /// As [`send`](Self::send). `InvalidInput` if there are more than 253 descriptors.
    pub fn send_with_descriptors(
        &self,
        data: &[u8],
        to: Option<&Address>,
        descriptors: &[BorrowedFd<'_>],
    ) -> io::Result<()> {
        self.kernel.send_from_port(self.id, data, to, descriptors)
    }

    /// Receives one datagram.
    ///
    /// # Errors
    ///
    /// `WouldBlock` if nothing is there; `ConnectionRefused`, once, if the peer of a UDP
    /// socket was not there.
    pub fn receive(&self) -> io::Result<DatagramRead> {
        let datagram = self.kernel.receive_at_port(self.id, true)?;
        Ok(DatagramRead {
            bytes: datagram.bytes,
            from: datagram.from,
            descriptors: datagram.descriptors,
            credentials: datagram.credentials,
        })
    }

    /// The name of the socket in its kernel.
    pub fn id(&self) -> SocketId {
        self.id
    }

    #[cfg(test)]
    pub(super) fn holder(&self) -> Holder {
        self.holder
    }
}

impl Drop for MemoryDatagramPeer {
    fn drop(&mut self) {
        self.kernel.close(self.id, self.holder);
    }
}
