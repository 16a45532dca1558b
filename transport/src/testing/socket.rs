//! The simulated socket, under the real transports.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use bowline_protocol::{
    Address, Credentials, Protocol, TcpTransport, TransportHandle, UnixAddress, UnixTransportHandle,
};
use bowline_reactor::{Handle, Interest, Reactor, Token};

use super::kernel::{Holder, SimulatedKernel, SocketId};
use crate::connection::{
    DescriptorTransport, Names, Source, StreamTransport, establish_with, private,
};
use crate::file_descriptor::{Core, FileDescriptor};
use crate::shared::{ReadBuffers, SendControl};
use crate::socket::Socket;
use crate::socket::private::{Sealed, Taken};
use crate::transports::restore_unsent;
use crate::{SendmsgMixin, Stream, Unsent};

/// A connection in memory: the transport of UNIX connections, on a socket of a
/// [`SimulatedKernel`].
///
/// All that is above the socket is what real connections have. Of the process at the
/// other end they know what the kernel was
/// [told](SimulatedKernel::set_peer_credentials), and have no descriptor: `peer_pidfd`
/// fails with `NotConnected`.
pub type MemoryStream = SendmsgMixin<Stream<MemorySocket>>;

/// The name of a connection in memory: of its transport in the reactor, and of
/// its socket in the kernel.
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

    /// The same, to pass descriptors through it.
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

    /// Sets which addresses its transport shows, its own and the peer's; unnamed
    /// UNIX ones unless set. They do not go with a [descriptor](Self::into_descriptor).
    pub fn set_addresses(&mut self, host: Address, peer: Address) {
        self.addresses = (host, peer);
    }

    /// Makes it a descriptor, to be passed like any other: as long as a copy of
    /// that is open somewhere, be it on its way, so is the socket.
    ///
    /// The descriptor is a real one that only stands for the socket: nothing
    /// can be sent through it. [`describe_socket`](crate::describe_socket) says of
    /// it what it stands for.
    ///
    /// # Errors
    ///
    /// `EMFILE`: this takes two descriptors. The socket is closed then.
    pub fn into_descriptor(self) -> io::Result<OwnedFd> {
        self.kernel.park(self.id)
    }

    /// The socket that a descriptor made by
    /// [`into_descriptor`](Self::into_descriptor), or a copy of it, stands for.
    /// Others may hold it too, as after dup(2); who watches it last is told of
    /// its events.
    ///
    /// # Errors
    ///
    /// Gives back a descriptor that stands for none of this thread's.
    pub fn from_descriptor(fd: OwnedFd) -> Result<Self, OwnedFd> {
        match SimulatedKernel::unpark(fd.as_fd()) {
            Some((kernel, id)) if kernel.name_of(id).is_none() => Ok(Self::new(kernel, id)),
            _ => Err(fd),
        }
    }

    /// Puts a protocol on this socket, in a reactor, which belongs to the
    /// kernel of this socket from then on. `connection_made` follows in the
    /// reactor's next turn.
    ///
    /// # Errors
    ///
    /// `InvalidInput` when the reactor belongs to another simulated kernel;
    /// `OutOfMemory` when it has 2^24 descriptors. The socket is closed.
    pub fn adopt(
        self,
        reactor: &mut Reactor,
        protocol: impl Protocol<MemoryStream>,
    ) -> io::Result<MemoryHandle> {
        self.adopt_with(reactor, protocol, Unsent::default())
    }

    /// As [`adopt`](Self::adopt), for a connection that comes from elsewhere, with
    /// what had not left there.
    ///
    /// # Errors
    ///
    /// As [`adopt`](Self::adopt); `InvalidInput` too where the descriptors do not fit
    /// the bytes.
    pub fn adopt_with(
        self,
        reactor: &mut Reactor,
        protocol: impl Protocol<MemoryStream>,
        unsent: Unsent,
    ) -> io::Result<MemoryHandle> {
        if unsent.check().is_err() {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        let socket = self.id;
        let prepare = |transport: &mut MemoryStream| restore_unsent(transport, unsent);
        let handle = establish_with(reactor, self, protocol, Source::Simulated, prepare)
            .map_err(|(error, ..)| error)?;
        let handle = Handle::new(handle.token(), |facet| facet.downcast_mut());
        Ok(MemoryHandle { handle, socket })
    }

    /// Its name in its kernel.
    pub fn id(&self) -> SocketId {
        self.id
    }

    /// The kernel it is of.
    pub fn kernel(&self) -> &SimulatedKernel {
        &self.kernel
    }

    #[cfg(test)]
    pub(super) fn holder(&self) -> Holder {
        self.holder
    }
}

impl MemoryStream {
    /// The name of the socket below, to tell its kernel what should happen to
    /// it; feature `testing`.
    pub fn socket_id(&self) -> SocketId {
        self.core().socket.id()
    }
}

impl MemoryStream {
    fn tcp(&mut self) -> io::Result<&mut TcpSettings> {
        let socket = &mut self.core_mut().socket;
        match socket.is_open {
            true => Ok(&mut socket.tcp),
            false => Err(io::ErrorKind::NotConnected.into()),
        }
    }

    fn tcp_as_set(&self) -> io::Result<TcpSettings> {
        let socket = &self.core().socket;
        let lost = || io::ErrorKind::NotConnected.into();
        socket.is_open.then_some(socket.tcp).ok_or_else(lost)
    }
}

/// So that protocols of TCP run in memory too: what is set is kept, and has no
/// effect.
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

impl Socket for MemorySocket {}

impl Sealed for MemorySocket {
    const KIND: &'static str = "memory";
    const CAN_BE_RESET: bool = false;

    fn send(&self, data: &[u8]) -> io::Result<usize> {
        self.kernel.send(self.id, &[IoSlice::new(data)], &[])
    }

    fn send_pieces(&self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        self.kernel.send(self.id, pieces, &[])
    }

    fn send_with_descriptors(
        &self,
        data: &[u8],
        descriptors: &[BorrowedFd<'_>],
        _: &mut SendControl,
    ) -> io::Result<usize> {
        self.kernel
            .send(self.id, &[IoSlice::new(data)], descriptors)
    }

    fn recv(&self, buffers: &mut ReadBuffers, limit: usize) -> io::Result<Taken> {
        // A plain read closes what came along.
        let mut lost = Vec::new();
        let data = buffers.data.get_mut(limit);
        let read = self.kernel.read(self.id, data, &mut lost)?;
        Ok(Taken {
            bytes: read.bytes,
            had_ancillary: false,
            is_truncated: false,
        })
    }

    fn receive(&self, buffers: &mut ReadBuffers, limit: usize) -> io::Result<Taken> {
        let data = buffers.data.get_mut(limit);
        let descriptors = &mut buffers.ancillary.descriptors;
        let read = self.kernel.read(self.id, data, descriptors)?;
        Ok(Taken {
            bytes: read.bytes,
            had_ancillary: read.had_descriptors,
            is_truncated: read.is_truncated,
        })
    }

    fn shutdown_write(&self) -> io::Result<()> {
        self.kernel.shutdown_write(self.id)
    }

    fn prepare_abort(&self) {
        // As a UNIX socket: the peer sees the end either way.
    }

    fn close(&mut self) {
        if std::mem::take(&mut self.is_open) {
            self.kernel.close(self.id, self.holder);
        }
    }

    fn host(&self) -> Address {
        self.addresses.0.clone()
    }

    fn peer(&self) -> Address {
        self.addresses.1.clone()
    }

    fn peer_credentials(&self) -> io::Result<Credentials> {
        if self.is_open {
            self.kernel.peer_credentials()
        } else {
            Err(io::Error::from(io::ErrorKind::NotConnected))
        }
    }

    fn source(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn detach(&mut self) -> Option<OwnedFd> {
        let fd = self.kernel.park(self.id);
        let fd = fd.expect("two descriptors are left for a socket that is detached");
        self.close();
        Some(fd)
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

    fn unwatch(&self, _: &mut Reactor) {
        self.kernel.unwatch(self.id, self.holder);
    }
}

impl Drop for MemorySocket {
    fn drop(&mut self) {
        self.close();
    }
}

impl private::Build for MemoryStream {
    fn build(core: Core<MemorySocket>) -> Self {
        Self::new(Stream::new(core))
    }

    fn socket_again(fd: OwnedFd, _: &Address, _: &Address) -> Result<Self::Socket, OwnedFd> {
        MemorySocket::from_descriptor(fd)
    }
}

impl StreamTransport for MemoryStream {}

impl DescriptorTransport for MemoryStream {
    fn socket(fd: OwnedFd, _: Names) -> MemorySocket {
        MemorySocket::from_descriptor(fd).expect("a simulated listener accepted it")
    }
}
