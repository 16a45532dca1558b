//! The simulated socket, under the real transports.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use bowline_protocol::{
    Address, ConnectError, Credentials, Destination, Protocol, TcpTransport, TransportHandle,
    UnixAddress, UnixTransportHandle,
};
use bowline_reactor::{Handle, Interest, Reactor, Token};

use super::kernel::{Holder, Shape, SimulatedKernel, SocketId};
use super::listener::{MemoryListen, MemoryListener};
use crate::endpoint::{Adopt, Carried, Connect, Dial, Side, Wrap};
use crate::error::AdoptError;
use crate::file_descriptor::{
    DescriptorSocket, FileDescriptor, PassDescriptors, Received, Socket, not_connected,
};
use crate::kinds::Plain;
use crate::link::Link;
use crate::sendmsg::SendmsgMixin;
use crate::shared::ReadBuffers;
use crate::stream::StreamTransport;
use crate::{Transports, Unsent};

stream_type! {
    /// A connection in memory: the transport of UNIX connections, on a socket of a
    /// [`SimulatedKernel`].
    ///
    /// Everything above the socket is the same as for real connections. The credentials
    /// of the peer are those that the kernel was
    /// [told](SimulatedKernel::set_peer_credentials). There is no descriptor of the
    /// peer's process: `peer_pidfd` fails with `NotConnected`.
    MemoryStream over SendmsgMixin<MemorySocket>, known by UnixTransportHandle
}

impl_unix_transport!(impl for MemoryStream);

/// The name of a connection in memory. It names its transport in the reactor and its
/// socket in the kernel.
///
/// Feature `testing`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryHandle {
    handle: Handle<MemoryStream>,
    socket: SocketId,
}

impl MemoryHandle {
    /// The transport, in its reactor.
    pub fn handle(self) -> Handle<MemoryStream> {
        self.handle
    }

    /// The transport, as protocols know each other's.
    pub fn transport(self) -> TransportHandle {
        Handle::new(self.handle.token(), |facet| {
            facet
                .downcast_mut::<MemoryStream>()
                .map(|transport| transport as _)
        })
    }

    /// The transport, to pass descriptors through it.
    pub fn unix_transport(self) -> UnixTransportHandle {
        Handle::new(self.handle.token(), |facet| {
            facet
                .downcast_mut::<MemoryStream>()
                .map(|transport| transport as _)
        })
    }

    /// The socket, in its kernel.
    pub fn socket(self) -> SocketId {
        self.socket
    }
}

/// One end of a connection of a [`SimulatedKernel`]. Dropping it closes it.
///
/// Feature `testing`.
#[derive(Debug)]
pub struct MemorySocket {
    kernel: SimulatedKernel,
    id: SocketId,
    holder: Holder,
    is_open: bool,
    /// Its own and the peer's, as far as anybody is told.
    addresses: (Address, Address),
    tcp: TcpSettings,
}

/// What TCP would be set to.
#[derive(Clone, Copy, Debug, Default)]
struct TcpSettings {
    no_delay: bool,
    keep_alive: bool,
}

impl MemorySocket {
    pub(super) fn new(kernel: SimulatedKernel, id: SocketId) -> Self {
        let holder = kernel.hold(id);
        Self {
            kernel,
            id,
            holder,
            is_open: true,
            addresses: (UnixAddress::Unnamed.into(), UnixAddress::Unnamed.into()),
            tcp: TcpSettings::default(),
        }
    }

    /// Sets the addresses that its transport shows, its own and the peer's. By default
    /// they are unnamed UNIX ones. They do not go with a
    /// [descriptor](Self::into_descriptor).
    pub fn set_addresses(&mut self, host: Address, peer: Address) {
        self.addresses = (host, peer);
    }

    /// Makes it a descriptor, which can be passed like any other. The socket is open as
    /// long as a copy of the descriptor is open somewhere, or on its way.
    ///
    /// The descriptor is a real one that only stands for the socket: nothing can be sent
    /// through it. [`describe_socket`](crate::describe_socket) describes the socket.
    ///
    /// # Errors
    ///
    /// `EMFILE`, since this takes two descriptors. The socket is closed then.
    pub fn into_descriptor(self) -> io::Result<OwnedFd> {
        self.kernel.park(self.id)
    }

    /// Makes a socket of a descriptor that stands for it, made by
    /// [`into_descriptor`](Self::into_descriptor), or of a copy. Others may hold the
    /// socket too, as after dup(2). The last one to watch it is told of its events.
    ///
    /// # Errors
    ///
    /// Gives the descriptor back if it stands for no socket of this thread.
    pub fn from_descriptor(fd: OwnedFd) -> Result<Self, OwnedFd> {
        match SimulatedKernel::unpark(fd.as_fd()) {
            Some((kernel, id)) if is_connection(&kernel, id) => Ok(Self::new(kernel, id)),
            _ => Err(fd),
        }
    }

    /// Puts a protocol on this socket, in a reactor. The reactor belongs to the kernel
    /// of this socket from then on. `connection_made` follows in the reactor's next
    /// turn.
    ///
    /// # Errors
    ///
    /// `InvalidInput` if the reactor belongs to another simulated kernel; `OutOfMemory`
    /// if it has 2^24 descriptors. The socket is closed.
    pub fn adopt(
        self,
        reactor: &mut Reactor,
        protocol: impl Protocol<MemoryStream>,
    ) -> io::Result<MemoryHandle> {
        self.adopt_with(reactor, protocol, Unsent::default())
    }

    /// As [`adopt`](Self::adopt), for a connection that comes from elsewhere, with
    /// everything that had not left there.
    ///
    /// # Errors
    ///
    /// As [`adopt`](Self::adopt). Also `InvalidInput` if the descriptors do not fit the
    /// bytes.
    pub fn adopt_with(
        self,
        reactor: &mut Reactor,
        protocol: impl Protocol<MemoryStream>,
        unsent: Unsent,
    ) -> io::Result<MemoryHandle> {
        let socket = self.id;
        let handle = reactor.adopt(Memory.with_unsent(unsent), self, protocol)?;
        let handle = Handle::new(handle.token(), |facet| facet.downcast_mut());
        Ok(MemoryHandle { handle, socket })
    }

    /// Its name in its kernel.
    pub fn id(&self) -> SocketId {
        self.id
    }

    /// Its kernel.
    pub fn kernel(&self) -> &SimulatedKernel {
        &self.kernel
    }

    #[cfg(test)]
    pub(super) fn holder(&self) -> Holder {
        self.holder
    }
}

fn is_connection(kernel: &SimulatedKernel, id: SocketId) -> bool {
    kernel.name_of(id).is_none() && kernel.shape_of(id) == Some(Shape::Stream)
}

impl MemoryStream {
    /// The name of the socket below, to tell its kernel what should happen to it.
    /// Feature `testing`.
    pub fn socket_id(&self) -> SocketId {
        self.stream()
            .layer::<MemorySocket>()
            .expect("it is over one")
            .id()
    }
}

impl MemoryStream {
    fn tcp(&mut self) -> io::Result<&mut TcpSettings> {
        match self.stream_mut().layer_mut::<MemorySocket>() {
            Some((socket, _)) if socket.is_open => Ok(&mut socket.tcp),
            _ => Err(not_connected()),
        }
    }

    fn tcp_as_set(&self) -> io::Result<TcpSettings> {
        match self.stream().layer::<MemorySocket>() {
            Some(socket) if socket.is_open => Ok(socket.tcp),
            _ => Err(not_connected()),
        }
    }
}

/// So that protocols of TCP run in memory too. Settings are kept and have no effect.
impl TcpTransport for MemoryStream {
    fn no_delay(&self) -> io::Result<bool> {
        Ok(self.tcp_as_set()?.no_delay)
    }

    fn set_no_delay(&mut self, on: bool) -> io::Result<()> {
        self.tcp()?.no_delay = on;
        Ok(())
    }

    fn keep_alive(&self) -> io::Result<bool> {
        Ok(self.tcp_as_set()?.keep_alive)
    }

    fn set_keep_alive(&mut self, on: bool) -> io::Result<()> {
        self.tcp()?.keep_alive = on;
        Ok(())
    }

    fn set_keep_alive_times(&mut self, _: Duration, _: Duration, _: u32) -> io::Result<()> {
        self.tcp().map(|_| ())
    }
}

impl FileDescriptor for MemorySocket {
    fn write_some_data(&mut self, _: &mut Link, data: &[u8]) -> io::Result<usize> {
        self.kernel.send(self.id, &[IoSlice::new(data)], &[])
    }

    fn write_some_pieces(&mut self, _: &mut Link, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        self.kernel.send(self.id, pieces, &[])
    }

    fn do_read(
        &mut self,
        _: &mut Link,
        buffers: &mut ReadBuffers,
        limit: usize,
    ) -> io::Result<Received> {
        // A plain read closes what came along.
        let mut lost = Vec::new();
        let data = buffers.data.get_mut(limit);
        let read = self.kernel.read(self.id, data, &mut lost)?;
        Ok(Received::new(read.bytes, limit))
    }

    fn socket(&self) -> &dyn Socket {
        self
    }

    fn socket_mut(&mut self) -> &mut dyn Socket {
        self
    }

    fn take(&mut self) -> Option<Self> {
        let is_open = std::mem::take(&mut self.is_open);
        Some(Self {
            kernel: self.kernel.clone(),
            is_open,
            addresses: self.addresses.clone(),
            ..*self
        })
    }

    fn travels(&self) -> bool {
        true
    }
}

impl PassDescriptors for MemorySocket {
    fn send_with_descriptors(
        &mut self,
        _: &mut Link,
        data: &[u8],
        descriptors: &[BorrowedFd<'_>],
    ) -> io::Result<usize> {
        self.kernel
            .send(self.id, &[IoSlice::new(data)], descriptors)
    }

    fn receive(
        &mut self,
        _: &mut Link,
        buffers: &mut ReadBuffers,
        limit: usize,
    ) -> io::Result<Received> {
        let data = buffers.data.get_mut(limit);
        let descriptors = &mut buffers.ancillary.descriptors;
        let read = self.kernel.read(self.id, data, descriptors)?;
        Ok(
            Received::new(read.bytes, limit)
                .with_ancillary(read.had_descriptors, read.is_truncated),
        )
    }

    fn descriptor_socket(&self) -> &dyn DescriptorSocket {
        self
    }
}

impl Socket for MemorySocket {
    fn kind(&self) -> &'static str {
        "memory"
    }

    fn host(&self) -> Address {
        self.addresses.0.clone()
    }

    fn peer(&self) -> Address {
        self.addresses.1.clone()
    }

    fn reading(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn is_open(&self) -> bool {
        self.is_open
    }

    fn watch(&self, reactor: &mut Reactor, token: Token) -> io::Result<()> {
        self.kernel
            .watch((self.id, self.holder), reactor, token, Interest::Readable)
    }

    fn watch_writing(&self, reactor: &mut Reactor, token: Token) -> io::Result<()> {
        self.kernel
            .watch((self.id, self.holder), reactor, token, Interest::Both)
    }

    fn unwatch(&self, _: &mut Reactor, _: bool) {
        self.kernel.unwatch(self.id, self.holder);
    }

    fn take_error(&self) -> Option<io::Error> {
        self.kernel.take_error(self.id)
    }

    fn unread(&self) -> usize {
        self.kernel.unread(self.id).0
    }

    fn is_hung_up(&self) -> bool {
        self.kernel.is_hung_up(self.id)
    }

    fn shutdown_write(&mut self) -> io::Result<()> {
        self.kernel.shutdown_write(self.id)
    }

    fn close(&mut self) {
        if std::mem::take(&mut self.is_open) {
            self.kernel.close(self.id, self.holder);
        }
    }

    fn detach(&mut self) -> Option<OwnedFd> {
        let fd = self.kernel.park(self.id);
        let fd = fd.expect("two descriptors are left for a socket that is detached");
        self.close();
        Some(fd)
    }

    fn attach(&mut self, fd: OwnedFd) -> Result<(), OwnedFd> {
        let addresses = self.addresses.clone();
        let socket = Self::from_descriptor(fd)?;
        *self = socket;
        self.addresses = addresses;
        Ok(())
    }
}

impl DescriptorSocket for MemorySocket {
    fn peer_credentials(&self) -> io::Result<Credentials> {
        if self.is_open {
            self.kernel.peer_credentials()
        } else {
            Err(not_connected())
        }
    }

    fn peer_pidfd(&self) -> io::Result<OwnedFd> {
        Err(not_connected())
    }

    fn set_passes_rights(&self, _: bool) -> io::Result<()> {
        Err(not_connected())
    }

    fn shutdown_read(&self) -> io::Result<()> {
        if self.is_open {
            self.kernel.shutdown_read(self.id)
        } else {
            Err(not_connected())
        }
    }

    fn has_unread(&self) -> bool {
        false
    }

    fn cookie(&self) -> Option<u64> {
        None
    }
}

/// Connections in memory, a kind like [`Tcp`](crate::Tcp). A [`MemorySocket`] is adopted
/// as `Memory`.
///
/// Feature `testing`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Memory;

impl Memory {
    /// Listens on a simulated kernel, under a name.
    pub fn at(kernel: &SimulatedKernel, name: impl Into<String>) -> MemoryListen {
        MemoryListen::new(kernel.clone(), name.into())
    }

    /// Goes on with an existing listener.
    pub fn listening(listener: MemoryListener) -> MemoryListener {
        listener
    }

    /// Connects to the listener of that name.
    pub fn to(kernel: &SimulatedKernel, name: impl Into<String>) -> MemoryConnect {
        MemoryConnect {
            kernel: kernel.clone(),
            name: name.into(),
            wrap: Plain,
        }
    }
}

impl Adopt for Memory {
    type Source = MemorySocket;
    type Socket = MemorySocket;
    type Wrap = Plain;

    fn check(&self, socket: MemorySocket) -> Result<MemorySocket, AdoptError<MemorySocket>> {
        Ok(socket)
    }

    fn not_installed(socket: MemorySocket, error: io::Error) -> AdoptError<MemorySocket> {
        AdoptError::os(error, socket)
    }

    /// Who holds it says so.
    fn is_shared(&self) -> bool {
        false
    }

    fn into_parts(self) -> (Plain, Carried) {
        (Plain, Carried::default())
    }
}

impl Wrap<MemorySocket> for Plain {
    type Transport = MemoryStream;

    fn wrap(&mut self, socket: MemorySocket, _: Side) -> SendmsgMixin<MemorySocket> {
        SendmsgMixin::new(socket)
    }
}

/// Where to connect in memory. [`Memory::to`] makes it.
///
/// Feature `testing`.
#[derive(Clone, Debug)]
#[must_use = "nothing connects before it is given to `connect`"]
pub struct MemoryConnect {
    kernel: SimulatedKernel,
    name: String,
    wrap: Plain,
}

impl Connect for MemoryConnect {
    type Socket = MemorySocket;
    type Wrap = Plain;

    fn destination(&self) -> Destination {
        UnixAddress::Abstract(self.name.clone().into_bytes()).into()
    }

    fn timeout(&self) -> Option<Duration> {
        None
    }

    fn dial(&mut self, _: &Address) -> Result<Dial<MemorySocket>, ConnectError> {
        let socket = self.kernel.connect(&self.name);
        Ok(Dial::Connected(socket.map_err(ConnectError::from_os)?))
    }

    fn wrap(&mut self) -> &mut Plain {
        &mut self.wrap
    }
}

impl Drop for MemorySocket {
    fn drop(&mut self) {
        self.close();
    }
}
