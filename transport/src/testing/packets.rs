//! Connections of packets on a simulated kernel, under the real port.

use std::any::Any;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use bowline_protocol::{
    Address, AddressRef, ConnectError, Credentials, Destination, SendRefusal, UnixAddress,
};
use bowline_reactor::{Interest, Reactor, Token};

use super::kernel::{Holder, Shape, SimulatedKernel, SocketId};
use crate::datagram::{
    self, AfterSendError, Arrivals, DatagramSocket, Outgoing, PacketSocket, Port,
};
use crate::endpoint::{
    Adopt, Carried, Connect, ConnectionSocket, Dial, Listen, ListenAt, ListeningSocket, Side, Wrap,
};
use crate::error::{AdoptError, AdoptErrorKind, ListenError, ListenStep};
use crate::file_descriptor::not_connected;
use crate::kinds::Plain;
use crate::process::SocketDescription;
use crate::sys;

/// The transport of a connection of packets in memory: all of it is the real one, but for
/// the socket.
///
/// Feature `testing`.
pub type MemoryPacketPort = Port<MemoryPacketSocket>;

/// One end of a connection of packets of a [`SimulatedKernel`]. Dropping it closes it.
///
/// Feature `testing`.
#[derive(Debug)]
pub struct MemoryPacketSocket {
    kernel: SimulatedKernel,
    id: SocketId,
    holder: Holder,
    is_open: bool,
    has_ended: bool,
    /// Came behind packets, and is told by the next receive.
    error: Option<io::Error>,
}

impl MemoryPacketSocket {
    pub(super) fn new(kernel: SimulatedKernel, id: SocketId) -> Self {
        let holder = kernel.hold(id);
        Self {
            kernel,
            id,
            holder,
            is_open: true,
            has_ended: false,
            error: None,
        }
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

    /// Makes a socket of a descriptor that stands for it, as
    /// [`MemorySocket::from_descriptor`](super::MemorySocket::from_descriptor) does.
    ///
    /// # Errors
    ///
    /// Gives the descriptor back if it stands for no such socket of this thread.
    pub fn from_descriptor(fd: OwnedFd) -> Result<Self, OwnedFd> {
        match SimulatedKernel::unpark(fd.as_fd()) {
            Some((kernel, id)) if is_connection(&kernel, id) => Ok(Self::new(kernel, id)),
            _ => Err(fd),
        }
    }

    /// Its name in its kernel.
    pub fn id(&self) -> SocketId {
        self.id
    }

    /// Its kernel.
    pub fn kernel(&self) -> &SimulatedKernel {
        &self.kernel
    }
}

fn is_connection(kernel: &SimulatedKernel, id: SocketId) -> bool {
    kernel.name_of(id).is_none() && kernel.shape_of(id) == Some(Shape::Packets)
}

impl MemoryPacketPort {
    /// The name of the socket below, to tell its kernel what should happen to it.
    /// Feature `testing`.
    pub fn socket_id(&self) -> SocketId {
        self.socket.id
    }
}

impl DatagramSocket for MemoryPacketSocket {
    fn kind(&self) -> &'static str {
        "memory packets"
    }

    fn host(&self) -> Address {
        UnixAddress::Unnamed.into()
    }

    fn peer(&self) -> Option<Address> {
        Some(UnixAddress::Unnamed.into())
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
        datagram::ROOM
    }

    fn receive(&mut self, arrivals: &mut Arrivals, count: usize) -> io::Result<usize> {
        if let Some(error) = self.error.take() {
            return Err(error);
        }
        let mut received = 0;
        while received < count {
            match self.kernel.read_packet(self.id) {
                Ok(Some(packet)) => {
                    let from = AddressRef::Unix(bowline_protocol::UnixAddressRef::Unnamed);
                    let (descriptors, lost) = (packet.descriptors, packet.is_truncated);
                    arrivals.push(&packet.bytes, from, descriptors, lost);
                    received += 1;
                }
                Ok(None) => {
                    self.has_ended = true;
                    break;
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
        for packet in outgoing.datagrams() {
            let descriptors: Vec<_> = packet.descriptors.iter().map(AsFd::as_fd).collect();
            match self.kernel.send_packet(self.id, packet.data, &descriptors) {
                Ok(()) => sent += 1,
                Err(error) if sent == 0 => return Err(error),
                Err(_) => break,
            }
        }
        Ok(sent)
    }

    fn after(&self, error: &io::Error, _: Option<AddressRef<'_>>) -> AfterSendError {
        match error.kind() {
            io::ErrorKind::WouldBlock => AfterSendError::WaitForRoom,
            _ if sys::is_transient(error) => AfterSendError::WaitForTime,
            // What the kernel was set to have happen is the end of the connection.
            _ if error.raw_os_error() != sys::simulated::too_long().raw_os_error() => {
                AfterSendError::Broken
            }
            _ => AfterSendError::Fail,
        }
    }

    fn is_refusal(&self, _: &io::Error) -> bool {
        false
    }

    fn take_error(&mut self) -> Option<io::Error> {
        self.error
            .take()
            .or_else(|| self.kernel.take_error(self.id))
    }

    fn refuses(&self, length: usize, to: Option<AddressRef<'_>>) -> Option<SendRefusal> {
        if length > self.kernel.settings().send_buffer - 32 {
            return Some(SendRefusal::TooLong);
        }
        to.map(|_| SendRefusal::BadAddress)
    }

    fn connect(&mut self, _: AddressRef<'_>) -> io::Result<()> {
        Err(io::ErrorKind::InvalidInput.into())
    }

    fn dropped(&self) -> io::Result<u32> {
        match self.is_open {
            true => Ok(0),
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

impl PacketSocket for MemoryPacketSocket {
    fn has_ended(&self) -> bool {
        self.has_ended
    }

    fn shutdown_write(&mut self) -> io::Result<()> {
        self.kernel.shutdown_write(self.id)
    }

    fn peer_credentials(&self) -> io::Result<Credentials> {
        match self.is_open {
            true => self.kernel.peer_credentials(),
            false => Err(not_connected()),
        }
    }

    fn peer_pidfd(&self) -> io::Result<OwnedFd> {
        Err(not_connected())
    }

    fn set_passes_rights(&self, _: bool) -> io::Result<()> {
        Err(not_connected())
    }

    fn detach(&mut self) -> Option<(OwnedFd, Box<dyn Any>)> {
        let fd = self.kernel.park(self.id);
        let fd = fd.expect("two descriptors are left for a socket that is detached");
        self.close();
        let rest = Self {
            kernel: self.kernel.clone(),
            error: None,
            ..*self
        };
        Some((fd, Box::new(rest)))
    }

    fn attach(&mut self, fd: OwnedFd) -> Result<(), OwnedFd> {
        *self = Self::from_descriptor(fd)?;
        Ok(())
    }
}

impl ConnectionSocket for MemoryPacketSocket {
    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn watch(&self, reactor: &mut Reactor, token: Token) -> io::Result<()> {
        DatagramSocket::watch(self, reactor, token, false)
    }

    fn decline(&mut self) {
        self.close();
    }

    fn end_for_all(&mut self) {}
}

impl Drop for MemoryPacketSocket {
    fn drop(&mut self) {
        self.close();
    }
}

/// Connections of packets in memory, a kind like
/// [`UnixSeqpacket`](crate::UnixSeqpacket). A [`MemoryPacketSocket`] is adopted as
/// `MemoryPackets`.
///
/// # Examples
///
/// ```
/// use bowline::testing::{MemoryPacketPeer, MemoryPackets, Simulation};
/// use bowline::{Address, Context, Packet, PacketProtocol, PacketTransport, Transports};
///
/// struct Echo;
///
/// impl<T: PacketTransport> PacketProtocol<T> for Echo {
///     fn packet_received(&mut self, cx: &mut Context<'_, T>, packet: &mut Packet<'_>) {
///         cx.transport.send(packet.data);
///     }
/// }
///
/// let mut simulation = Simulation::new(7);
/// let server = simulation.spawn()?;
/// let kernel = simulation.kernel().clone();
/// let reactor = simulation.reactor(server).expect("it lives");
/// reactor.listen(MemoryPackets::at(&kernel, "echo"), |_: &Address| Echo)?;
///
/// let client = MemoryPacketPeer::connect(&kernel, "echo")?;
/// client.send(b"")?;
/// client.send(b"whole")?;
/// simulation.run();
/// assert_eq!(client.receive()?.expect("no end").bytes, b"");
/// assert_eq!(client.receive()?.expect("no end").bytes, b"whole");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// Feature `testing`.
#[derive(Clone, Copy, Debug, Default)]
pub struct MemoryPackets;

impl MemoryPackets {
    /// Listens on a simulated kernel, under a name.
    pub fn at(kernel: &SimulatedKernel, name: impl Into<String>) -> MemoryPacketListen {
        MemoryPacketListen {
            kernel: kernel.clone(),
            name: name.into(),
        }
    }

    /// Connects to the listener of that name.
    pub fn to(kernel: &SimulatedKernel, name: impl Into<String>) -> MemoryPacketConnect {
        MemoryPacketConnect {
            kernel: kernel.clone(),
            name: name.into(),
            wrap: Plain,
        }
    }
}

impl Adopt for MemoryPackets {
    type Source = MemoryPacketSocket;
    type Socket = MemoryPacketSocket;
    type Wrap = Plain;

    fn check(
        &self,
        socket: MemoryPacketSocket,
    ) -> Result<MemoryPacketSocket, AdoptError<MemoryPacketSocket>> {
        Ok(socket)
    }

    fn check_carried(&self, carried: &Carried) -> Result<(), AdoptErrorKind> {
        datagram::check_packed(carried)
    }

    fn not_installed(
        socket: MemoryPacketSocket,
        error: io::Error,
    ) -> AdoptError<MemoryPacketSocket> {
        AdoptError::os(error, socket)
    }

    fn into_parts(self) -> (Plain, Carried) {
        (Plain, Carried::default())
    }
}

impl Wrap<MemoryPacketSocket> for Plain {
    type Transport = MemoryPacketPort;

    fn wrap(&mut self, socket: MemoryPacketSocket, _: Side) -> MemoryPacketSocket {
        socket
    }
}

/// Where to listen in memory for connections of packets. [`MemoryPackets::at`] makes it.
///
/// Feature `testing`.
#[derive(Clone, Debug)]
#[must_use = "nothing listens before it is given to `listen` or `accept`"]
pub struct MemoryPacketListen {
    kernel: SimulatedKernel,
    name: String,
}

impl Listen for MemoryPacketListen {
    type Socket = MemoryPacketListener;
    type Wrap = Plain;
    type Error = ListenError;

    const SHARES_QUEUE: bool = true;

    fn open(self) -> Result<(MemoryPacketListener, Plain), ListenError> {
        match self.kernel.listen_for(&self.name, Shape::Packets) {
            Ok(id) => Ok((MemoryPacketListener::new(self.kernel, id), Plain)),
            Err(error) => Err(ListenError {
                address: address_of(&self.name),
                step: ListenStep::Bind,
                error,
            }),
        }
    }

    fn not_installed(_: Self::Socket, address: Address, error: io::Error) -> ListenError {
        ListenError {
            address,
            step: ListenStep::Watch,
            error,
        }
    }
}

impl ListenAt for MemoryPacketListen {
    fn address(&self) -> Address {
        address_of(&self.name)
    }

    fn is_like(&self, found: &SocketDescription) -> bool {
        !found.is_stream
    }

    fn take(self, fd: OwnedFd) -> Result<(MemoryPacketListener, Plain), AdoptError> {
        match SimulatedKernel::unpark(fd.as_fd()) {
            Some((kernel, id)) if is_listener(&kernel, id) => {
                Ok((MemoryPacketListener::new(kernel, id), Plain))
            }
            _ => Err(AdoptError {
                kind: AdoptErrorKind::NotListening,
                fd,
            }),
        }
    }
}

fn is_listener(kernel: &SimulatedKernel, id: SocketId) -> bool {
    kernel.name_of(id).is_some() && kernel.shape_of(id) == Some(Shape::Packets)
}

fn address_of(name: &str) -> Address {
    Address::Unix(UnixAddress::Abstract(name.as_bytes().to_vec()))
}

/// A listener of connections of packets in memory.
///
/// Feature `testing`.
#[derive(Debug)]
pub struct MemoryPacketListener {
    kernel: SimulatedKernel,
    id: SocketId,
    holder: Holder,
}

impl MemoryPacketListener {
    fn new(kernel: SimulatedKernel, id: SocketId) -> Self {
        let holder = kernel.hold(id);
        Self { kernel, id, holder }
    }
}

impl ListeningSocket for MemoryPacketListener {
    type Accepted = MemoryPacketSocket;

    fn address(&self) -> io::Result<Address> {
        // It is open as long as we hold it.
        Ok(address_of(
            &self.kernel.name_of(self.id).unwrap_or_default(),
        ))
    }

    fn accept(&mut self, _: bool) -> io::Result<(MemoryPacketSocket, Address)> {
        let kernel = &self.kernel;
        let socket = kernel.accept_as(self.id, self.holder, MemoryPacketSocket::new)?;
        Ok((socket, Address::Unix(UnixAddress::Unnamed)))
    }

    fn accept_descriptor(&mut self, may_block: bool) -> io::Result<(OwnedFd, Address)> {
        let (socket, peer) = self.accept(may_block)?;
        Ok((socket.into_descriptor()?, peer))
    }

    fn source(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn watch(&self, reactor: &mut Reactor, token: Token) -> io::Result<()> {
        let place = (self.id, self.holder);
        self.kernel.watch(place, reactor, token, Interest::Readable)
    }

    fn unwatch(&self, _: &mut Reactor) {
        self.kernel.unwatch(self.id, self.holder);
    }

    fn duplicate(&self) -> io::Result<OwnedFd> {
        self.kernel.park(self.id)
    }

    fn into_descriptor(self) -> OwnedFd {
        self.duplicate()
            .expect("two descriptors are left for a listener that is detached")
    }

    fn close(self) {}
}

impl Drop for MemoryPacketListener {
    fn drop(&mut self) {
        self.kernel.close(self.id, self.holder);
    }
}

/// Where to connect in memory for packets. [`MemoryPackets::to`] makes it.
///
/// Feature `testing`.
#[derive(Clone, Debug)]
#[must_use = "nothing connects before it is given to `connect`"]
pub struct MemoryPacketConnect {
    kernel: SimulatedKernel,
    name: String,
    wrap: Plain,
}

impl Connect for MemoryPacketConnect {
    type Socket = MemoryPacketSocket;
    type Wrap = Plain;

    fn destination(&self) -> Destination {
        UnixAddress::Abstract(self.name.clone().into_bytes()).into()
    }

    fn timeout(&self) -> Option<Duration> {
        None
    }

    fn dial(&mut self, _: &Address) -> Result<Dial<MemoryPacketSocket>, ConnectError> {
        let id = self.kernel.connect_for(&self.name, Shape::Packets);
        let id = id.map_err(ConnectError::from_os)?;
        let kernel = self.kernel.clone();
        Ok(Dial::Connected(MemoryPacketSocket::new(kernel, id)))
    }

    fn wrap(&mut self) -> &mut Plain {
        &mut self.wrap
    }
}

/// The end of a connection of packets that a test holds itself, as a
/// [`MemoryPeer`](super::MemoryPeer) is of a stream.
///
/// Feature `testing`.
#[derive(Debug)]
pub struct MemoryPacketPeer {
    socket: MemoryPacketSocket,
}

/// A packet that a [`MemoryPacketPeer`] has received.
///
/// Feature `testing`.
#[derive(Debug)]
#[non_exhaustive]
pub struct PacketRead {
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// The descriptors that came with it, in order.
    pub descriptors: Vec<OwnedFd>,
}

impl MemoryPacketPeer {
    /// A peer that holds this socket.
    pub fn new(socket: MemoryPacketSocket) -> Self {
        Self { socket }
    }

    /// Connects to the listener of that name. It may accept now or later.
    ///
    /// # Errors
    ///
    /// `ConnectionRefused` if there is none; `EPROTOTYPE` if it is for streams.
    pub fn connect(kernel: &SimulatedKernel, name: &str) -> io::Result<Self> {
        let id = kernel.connect_for(name, Shape::Packets)?;
        Ok(Self::new(MemoryPacketSocket::new(kernel.clone(), id)))
    }

    /// Sends one packet.
    ///
    /// # Errors
    ///
    /// `WouldBlock` if there is no room, `BrokenPipe` if the other end is closed,
    /// `EMSGSIZE` if it is too long.
    pub fn send(&self, data: &[u8]) -> io::Result<()> {
        self.send_with_descriptors(data, &[])
    }

    /// Sends one packet with copies of `descriptors`.
    ///
    /// # Errors
    ///
    /// As [`send`](Self::send). `InvalidInput` if there are more than 253 descriptors.
    pub fn send_with_descriptors(
        &self,
        data: &[u8],
        descriptors: &[BorrowedFd<'_>],
    ) -> io::Result<()> {
        self.socket
            .kernel
            .send_packet(self.socket.id, data, descriptors)
    }

    /// Receives one packet; `None` is the end.
    ///
    /// # Errors
    ///
    /// `WouldBlock` if nothing is there. `ConnectionReset`, once and first, if the other
    /// end was closed with packets of ours unread.
    pub fn receive(&self) -> io::Result<Option<PacketRead>> {
        let packet = self.socket.kernel.read_packet(self.socket.id)?;
        Ok(packet.map(|packet| PacketRead {
            bytes: packet.bytes,
            descriptors: packet.descriptors,
        }))
    }

    /// Says that nothing more will be sent. Receiving goes on.
    pub fn shutdown_write(&self) {
        // Fails only for a socket that is closed.
        let _ = self.socket.kernel.shutdown_write(self.socket.id);
    }

    /// The name of this end in its kernel.
    pub fn id(&self) -> SocketId {
        self.socket.id
    }
}
