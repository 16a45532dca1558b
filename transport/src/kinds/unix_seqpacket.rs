//! UNIX sockets of sequenced packets (`SOCK_SEQPACKET`).

use std::any::Any;
use std::cell::Cell;
use std::io;
use std::iter;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use bowline_protocol::{
    Acceptor, Address, AddressRef, ConnectError, ConnectorHandle, Credentials, ListenerHandle,
    PacketFactory, PacketHandle, PacketProtocol, SendRefusal, SocketFile, UnixAddress,
};
use bowline_reactor::Reactor;

use super::socket_file::{OwnedFile, StaleSocket};
use super::unix::{bind_unix, name_of};
use super::{BACKLOG, CONNECT_TIMEOUT, address_of, backlog, check_packets};
use crate::closer::close_elsewhere;
use crate::connector;
use crate::datagram::{
    self, AfterSendError, Arrivals, ConnectPackets, DatagramSocket, DialPackets, Outgoing,
    PacketSocket, Port, ServePackets,
};
use crate::detach::Unsent;
use crate::endpoint::{
    AcceptWith, AcceptedSocket, AdoptWith, ConnectWith, Dial, Inherit, ListenWith, ListeningSocket,
};
use crate::error::{AdoptError, AdoptErrorKind, ListenError, ListenStep};
use crate::file_descriptor::not_connected;
use crate::listener::{self, HandOver};
use crate::process::SocketDescription;
use crate::sys::{self, Beside, MAX_DESCRIPTORS, SocketName};

/// The transport of a connection of sequenced packets.
pub type UnixSeqpacketPort = Port<UnixSeqpacketSocket>;

/// What the kernel keeps of a send buffer for itself, beside the longest packet.
const BESIDE_LONGEST: usize = 32;

/// How much room there may be for a packet: what a send buffer can be set to hold.
const MOST_ROOM: usize = 1 << 30;

/// A connected UNIX socket of sequenced packets.
#[derive(Debug)]
pub struct UnixSeqpacketSocket {
    fd: Option<OwnedFd>,
    host: UnixAddress,
    peer: UnixAddress,
    room: usize,
    /// Whether packets have stamps, so that one of no bytes is told from the end.
    is_stamped: bool,
    has_ended: bool,
    /// The longest packet that the send buffer holds, when it was last asked.
    longest: Cell<usize>,
}

/// UNIX sockets of sequenced packets, as a kind of connection: where and how to listen and
/// to connect, and what to adopt.
///
/// A connection of packets keeps their boundaries and their order, loses none, and tells
/// the end. The descriptors that are sent with a packet arrive with exactly this packet.
///
/// By itself it is what [`adopt`](crate::Transports::adopt) takes a connected socket as:
/// one end of a socketpair, say.
///
/// # Packets of no bytes
///
/// One of no bytes is delivered like all others. Linux answers to a read of it what it
/// answers to a read of the end. Sockets that are made or accepted here have a stamp put on
/// each packet (`SO_TIMESTAMP`), which the end has not. Of a socket that is adopted nothing
/// is changed, since others may hold it: there, packets of no bytes and without descriptors
/// that the peer sends last before its end may be taken for a part of the end.
///
/// ```
/// # use bowline_protocol::{Address, Context, Packet, PacketProtocol, PacketTransport};
/// # use bowline_reactor::Reactor;
/// use bowline_transport::{Transports, UnixSeqpacket};
///
/// struct Echo;
///
/// impl<T: PacketTransport> PacketProtocol<T> for Echo {
///     fn packet_received(&mut self, cx: &mut Context<'_, T>, packet: &mut Packet<'_>) {
///         cx.transport.send(packet.data);
///     }
/// }
///
/// let mut reactor = Reactor::new()?;
/// let here = UnixSeqpacket::at("@an echo of packets").credentials(true);
/// reactor.listen(here, |_: &Address| Echo)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, Default)]
pub struct UnixSeqpacket;

impl UnixSeqpacket {
    /// Listens at a path, or at a name in the abstract namespace;
    /// [`UnixAddress::Unnamed`] has the kernel choose such a name.
    ///
    /// The file is removed when the listener closes, unless another has taken its place.
    pub fn at(address: impl Into<UnixAddress>) -> UnixSeqpacketListen {
        UnixSeqpacketListen {
            address: address.into(),
            backlog: BACKLOG,
            mode: 0o666,
            stale: StaleSocket::Remove,
            settings: Settings::default(),
        }
    }

    /// Goes on with a socket that listens already; its file is neither touched now nor
    /// removed later.
    pub fn listening(fd: OwnedFd) -> UnixSeqpacketOn {
        Self::at(UnixAddress::Unnamed).inherit(fd)
    }

    /// Connects to a path, or to a name in the abstract namespace.
    pub fn to(address: impl Into<UnixAddress>) -> UnixSeqpacketConnect {
        UnixSeqpacketConnect {
            address: address.into(),
            timeout: Some(CONNECT_TIMEOUT),
            bind_address: None,
            settings: Settings::default(),
        }
    }

    /// Adopts a connection that was [detached](crate::Transports::detach) elsewhere, in
    /// another process say, with what had not left there: that leaves first.
    pub fn with_unsent(self, unsent: Unsent) -> UnixSeqpacketCarrying {
        UnixSeqpacketCarrying { unsent }
    }
}

/// A connection of packets to adopt, with what had not left; made by
/// [`UnixSeqpacket::with_unsent`].
#[derive(Debug)]
#[must_use = "nothing is adopted before it is given to `adopt`"]
pub struct UnixSeqpacketCarrying {
    unsent: Unsent,
}

/// What both sides can be set to.
#[derive(Clone, Copy, Debug)]
struct Settings {
    accepts_descriptors: bool,
    credentials: bool,
    pidfds: bool,
    max_packet: usize,
    send_buffer: Option<usize>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            accepts_descriptors: true,
            credentials: false,
            pidfds: false,
            max_packet: datagram::ROOM,
            send_buffer: None,
        }
    }
}

impl Settings {
    /// What accepted sockets inherit of a listener, or what a socket has itself.
    fn apply(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        if !self.accepts_descriptors {
            sys::set_pass_rights(fd, false)?;
        }
        if self.credentials {
            sys::set_pass_credentials(fd, true)?;
        }
        if self.pidfds {
            sys::set_pass_pidfd(fd, true)?;
        }
        Ok(())
    }

    /// What each socket has to be told.
    fn apply_to_each(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        if let Some(bytes) = self.send_buffer {
            sys::set_send_buffer_size(fd, bytes)?;
        }
        sys::set_stamps(fd)
    }
}

/// The settings that endpoints of both sides have.
macro_rules! settings {
    ($type:ty) => {
        impl $type {
            /// Sets whether the peer may send descriptors (`SO_PASSRIGHTS`, Linux 6.16),
            /// before it can send anything; default true. Where the kernel does not know
            /// the option, refusing fails.
            pub fn accepts_descriptors(mut self, accepted: bool) -> Self {
                self.settings.accepts_descriptors = accepted;
                self
            }

            /// Sets whether packets come with the [process that sent
            /// them](bowline_protocol::Packet::credentials) (`SO_PASSCRED`); default
            /// false. The kernel vouches for it. It gives the socket a name when it sends.
            pub fn credentials(mut self, wanted: bool) -> Self {
                self.settings.credentials = wanted;
                self
            }

            /// Sets whether they come with a [pidfd](bowline_protocol::Packet::pidfd) of
            /// that process (`SO_PASSPIDFD`, Linux 6.5); default false.
            pub fn pidfds(mut self, wanted: bool) -> Self {
                self.settings.pidfds = wanted;
                self
            }

            /// Sets how many bytes of a packet are delivered; default 65,536, at most
            /// 1 GiB. Of a longer one the rest is lost, and [that is
            /// told](bowline_protocol::Packet::is_truncated). With more than the default,
            /// memory for four packets is made for each read.
            pub fn max_packet(mut self, bytes: usize) -> Self {
                self.settings.max_packet = bytes.clamp(1, MOST_ROOM);
                self
            }

            /// Sets how many bytes that we have sent the kernel holds until they are read
            /// (`SO_SNDBUF`), which it doubles for what it needs beside them, up to
            /// `net.core.wmem_max`; by default `net.core.wmem_default`, 212,992. No packet
            /// can be longer.
            pub fn send_buffer(mut self, bytes: usize) -> Self {
                self.settings.send_buffer = Some(bytes);
                self
            }
        }
    };
}

/// Where and how to listen for connections of packets; made by [`UnixSeqpacket::at`].
#[derive(Clone, Debug)]
#[must_use = "nothing listens before it is given to `listen` or `accept`"]
pub struct UnixSeqpacketListen {
    address: UnixAddress,
    backlog: u32,
    mode: u32,
    stale: StaleSocket,
    settings: Settings,
}

settings!(UnixSeqpacketListen);

impl UnixSeqpacketListen {
    /// Sets the length of the queue of connections not accepted yet; default 1,024,
    /// cut by the kernel to `net.core.somaxconn`.
    pub fn backlog(mut self, backlog: u32) -> Self {
        self.backlog = backlog;
        self
    }

    /// Sets the permissions of the socket file, in force before the first client can
    /// connect; default `0o666`. Who may connect needs write permission, and search
    /// permission on the directories above.
    pub fn mode(mut self, mode: u32) -> Self {
        self.mode = mode;
        self
    }

    /// Sets what to do about the file of a dead socket at the path; default
    /// [`StaleSocket::Remove`]. Whatever else is there, a live socket or a file of
    /// another kind, is `AddrInUse`.
    pub fn stale(mut self, stale: StaleSocket) -> Self {
        self.stale = stale;
        self
    }

    /// Makes the socket, to be given away: to a child with its start, or through a UNIX
    /// connection. Whoever gets it goes on with it ([`UnixSeqpacket::listening`]). A file
    /// that belongs to it stays.
    ///
    /// # Errors
    ///
    /// [`ListenError`], with the step that failed.
    pub fn bind(self) -> Result<OwnedFd, ListenError> {
        Ok(self.open()?.into_descriptor())
    }

    fn open(self) -> Result<UnixSeqpacketListener, ListenError> {
        let failed = |step| {
            let address = self.address.clone();
            move |error| ListenError {
                address: address.into(),
                step,
                error,
            }
        };
        let fd = sys::packet_socket().map_err(failed(ListenStep::Socket))?;
        // On the listener, so that nothing slips in before the accept.
        self.settings
            .apply(fd.as_fd())
            .map_err(failed(ListenStep::Socket))?;
        let file = bind_unix(fd.as_fd(), &self.address, self.mode, self.stale)
            .map_err(|(step, error)| failed(step)(error))?;
        sys::listen(fd.as_fd(), backlog(self.backlog)).map_err(failed(ListenStep::Listen))?;
        Ok(UnixSeqpacketListener::new(file, fd, self.settings))
    }
}

/// A socket that listens already, with how to go on with it; made by
/// [`UnixSeqpacket::listening`].
#[derive(Debug)]
#[must_use = "nothing listens before it is given to `listen` or `accept`"]
pub struct UnixSeqpacketOn {
    endpoint: UnixSeqpacketListen,
    fd: OwnedFd,
}

impl UnixSeqpacketOn {
    fn open(self) -> Result<UnixSeqpacketListener, AdoptError> {
        let fd = check_packets(self.fd, true)?.0;
        Ok(UnixSeqpacketListener::new(None, fd, self.endpoint.settings))
    }
}

impl Inherit for UnixSeqpacketListen {
    type Inherited = UnixSeqpacketOn;

    fn place(&self) -> Address {
        self.address.clone().into()
    }

    fn is_like(&self, found: &SocketDescription) -> bool {
        !found.is_stream
    }

    fn inherit(self, fd: OwnedFd) -> UnixSeqpacketOn {
        UnixSeqpacketOn { endpoint: self, fd }
    }
}

impl<F: PacketFactory<UnixSeqpacketPort>> ListenWith<F> for UnixSeqpacketListen {
    type Handle = ListenerHandle;
    type Error = ListenError;

    fn listen_with(self, reactor: &mut Reactor, factory: F) -> Result<ListenerHandle, ListenError> {
        let socket = self.open()?;
        listener::install_socket(reactor, socket, ServePackets(factory), false).map_err(not_watched)
    }
}

impl<A: Acceptor> AcceptWith<A> for UnixSeqpacketListen {
    type Error = ListenError;

    fn accept_with(
        self,
        reactor: &mut Reactor,
        acceptor: A,
    ) -> Result<ListenerHandle, ListenError> {
        let socket = self.open()?;
        listener::install_socket(reactor, socket, HandOver { acceptor }, false).map_err(not_watched)
    }
}

impl<F: PacketFactory<UnixSeqpacketPort>> ListenWith<F> for UnixSeqpacketOn {
    type Handle = ListenerHandle;
    type Error = AdoptError;

    fn listen_with(self, reactor: &mut Reactor, factory: F) -> Result<ListenerHandle, AdoptError> {
        let socket = self.open()?;
        listener::install_socket(reactor, socket, ServePackets(factory), true)
            .map_err(|(socket, _, error)| AdoptError::os(error, socket.into_descriptor()))
    }
}

impl<A: Acceptor> AcceptWith<A> for UnixSeqpacketOn {
    type Error = AdoptError;

    fn accept_with(self, reactor: &mut Reactor, acceptor: A) -> Result<ListenerHandle, AdoptError> {
        let socket = self.open()?;
        listener::install_socket(reactor, socket, HandOver { acceptor }, true)
            .map_err(|(socket, _, error)| AdoptError::os(error, socket.into_descriptor()))
    }
}

fn not_watched((_, address, error): (UnixSeqpacketListener, Address, io::Error)) -> ListenError {
    ListenError {
        address,
        step: ListenStep::Watch,
        error,
    }
}

/// A UNIX socket that listens for connections of packets.
#[derive(Debug)]
struct UnixSeqpacketListener {
    /// Removed when we close, if it is still ours: before the socket, and so before it when
    /// this is dropped.
    file: Option<OwnedFile>,
    fd: OwnedFd,
    host: UnixAddress,
    settings: Settings,
}

impl UnixSeqpacketListener {
    fn new(file: Option<OwnedFile>, fd: OwnedFd, settings: Settings) -> Self {
        Self {
            file,
            host: host_of(fd.as_fd()),
            fd,
            settings,
        }
    }
}

impl ListeningSocket for UnixSeqpacketListener {
    type Accepted = UnixSeqpacketSocket;

    fn address(&self) -> io::Result<Address> {
        Ok(Address::Unix(address_of(sys::local_name(self.fd.as_fd())?)))
    }

    fn accept(&mut self, is_shared: bool) -> io::Result<(UnixSeqpacketSocket, Address)> {
        let (fd, peer) = self.accept_descriptor(is_shared)?;
        // The kernel refuses neither of a socket that was just made.
        self.settings.apply_to_each(fd.as_fd())?;
        let name = peer.as_unix().cloned().unwrap_or(UnixAddress::Unnamed);
        let mut socket = UnixSeqpacketSocket::new(fd, self.host.clone(), name);
        socket.room = self.settings.max_packet;
        Ok((socket, peer))
    }

    fn accept_descriptor(&mut self, is_shared: bool) -> io::Result<(OwnedFd, Address)> {
        let (fd, peer) = sys::accept_from(self.fd.as_fd(), is_shared)?;
        Ok((fd, Address::Unix(address_of(peer))))
    }

    fn credentials_of(&self, accepted: &UnixSeqpacketSocket) -> io::Result<Credentials> {
        accepted.peer_credentials()
    }

    fn source(&self) -> Option<BorrowedFd<'_>> {
        Some(self.fd.as_fd())
    }

    fn set_nonblocking(&self) -> io::Result<()> {
        sys::set_nonblocking(self.fd.as_fd())
    }

    fn duplicate(&self) -> io::Result<OwnedFd> {
        self.fd.try_clone()
    }

    fn into_descriptor(self) -> OwnedFd {
        if let Some(file) = self.file {
            file.leave();
        }
        self.fd
    }

    fn close(self) {
        // The path first: a client that finds it finds a listener.
        drop(self.file);
        if sys::has_waiting(self.fd.as_fd()).unwrap_or(true) {
            close_elsewhere(self.fd);
        }
    }

    fn socket_file(&self) -> Option<SocketFile> {
        self.file.as_ref().map(OwnedFile::socket_file)
    }

    fn disown_socket_file(&mut self) {
        if let Some(file) = self.file.take() {
            file.leave();
        }
    }

    fn own_socket_file(&mut self, file: SocketFile) -> io::Result<()> {
        let found = OwnedFile::of_listener(self.fd.as_fd(), file)?;
        if let Some(before) = self.file.replace(found) {
            before.leave();
        }
        Ok(())
    }
}

/// Where and how to connect to a socket of packets; made by [`UnixSeqpacket::to`].
#[derive(Clone, Debug)]
#[must_use = "nothing connects before it is given to `connect`"]
pub struct UnixSeqpacketConnect {
    address: UnixAddress,
    timeout: Option<Duration>,
    bind_address: Option<UnixAddress>,
    settings: Settings,
}

settings!(UnixSeqpacketConnect);

impl UnixSeqpacketConnect {
    /// Sets how long the attempt may take; default 30 seconds, `None` for ever. It waits
    /// for room in the listener's queue.
    pub fn timeout(mut self, timeout: impl Into<Option<Duration>>) -> Self {
        self.timeout = timeout.into();
        self
    }

    /// Sets the address to connect from; default unnamed.
    pub fn bind_address(mut self, address: impl Into<UnixAddress>) -> Self {
        self.bind_address = Some(address.into());
        self
    }

    fn dial(&self, peer: &UnixAddress) -> Result<Dial<UnixSeqpacketSocket>, ConnectError> {
        let fd = sys::packet_socket().map_err(ConnectError::Os)?;
        // All of it before the peer can send anything.
        self.settings.apply(fd.as_fd()).map_err(ConnectError::Os)?;
        self.settings
            .apply_to_each(fd.as_fd())
            .map_err(ConnectError::Os)?;
        if let Some(address) = &self.bind_address {
            sys::bind(fd.as_fd(), &name_of(address)).map_err(ConnectError::Bind)?;
        }
        let connecting = sys::connect(fd.as_fd(), &name_of(peer));
        let connecting = connecting.map_err(ConnectError::from_os)?;
        let host = host_of(fd.as_fd());
        let mut socket = UnixSeqpacketSocket::new(fd, host, peer.clone());
        socket.room = self.settings.max_packet;
        Ok(connecting.dial(socket))
    }
}

impl<F: PacketFactory<UnixSeqpacketPort>> ConnectWith<F> for UnixSeqpacketConnect {
    type Handle = ConnectorHandle;
    type Error = io::Error;

    fn connect_with(self, reactor: &mut Reactor, factory: F) -> io::Result<ConnectorHandle> {
        let endpoint = self;
        connector::install_outgoing(reactor, ConnectPackets { endpoint, factory })
    }
}

impl DialPackets for UnixSeqpacketConnect {
    type Socket = UnixSeqpacketSocket;

    fn destination(&self) -> UnixAddress {
        self.address.clone()
    }

    fn timeout(&self) -> Option<Duration> {
        self.timeout
    }

    fn dial(&mut self, address: &UnixAddress) -> Result<Dial<UnixSeqpacketSocket>, ConnectError> {
        Self::dial(self, address)
    }
}

impl<P: PacketProtocol<UnixSeqpacketPort>> AdoptWith<OwnedFd, P> for UnixSeqpacket {
    type Handle = PacketHandle;

    fn adopt_with(
        self,
        reactor: &mut Reactor,
        fd: OwnedFd,
        protocol: P,
    ) -> Result<PacketHandle, AdoptError> {
        self.with_unsent(Unsent::default())
            .adopt_with(reactor, fd, protocol)
    }
}

impl<P: PacketProtocol<UnixSeqpacketPort>> AdoptWith<OwnedFd, P> for UnixSeqpacketCarrying {
    type Handle = PacketHandle;

    fn adopt_with(
        self,
        reactor: &mut Reactor,
        fd: OwnedFd,
        protocol: P,
    ) -> Result<PacketHandle, AdoptError> {
        if !datagram::is_packed(&self.unsent) {
            let kind = AdoptErrorKind::UnfitDescriptors;
            return Err(AdoptError { kind, fd });
        }
        let (fd, peer) = check_packets(fd, false)?;
        let peer = address_of(peer.unwrap_or(SocketName::UnixUnnamed));
        let host = host_of(fd.as_fd());
        let socket = UnixSeqpacketSocket::new(fd, host, peer);
        let prepare = |port: &mut UnixSeqpacketPort| port.restore_unsent(self.unsent);
        datagram::install_packets(reactor, socket, protocol, prepare)
            .map(datagram::packets_named::<UnixSeqpacketSocket>)
            .map_err(|(error, mut socket, _)| {
                let fd = socket.fd.take();
                AdoptError::os(error, fd.expect("it was just put there"))
            })
    }
}

/// What a socket itself is called.
fn host_of(fd: BorrowedFd<'_>) -> UnixAddress {
    address_of(sys::local_name(fd).unwrap_or(SocketName::UnixUnnamed))
}

impl UnixSeqpacketSocket {
    fn new(fd: OwnedFd, host: UnixAddress, peer: UnixAddress) -> Self {
        let longest = longest(fd.as_fd());
        Self {
            is_stamped: sys::has_stamps(fd.as_fd()),
            fd: Some(fd),
            host,
            peer,
            room: datagram::ROOM,
            has_ended: false,
            longest: Cell::new(longest),
        }
    }

    fn fd(&self) -> io::Result<BorrowedFd<'_>> {
        self.fd.as_ref().map(AsFd::as_fd).ok_or_else(not_connected)
    }

    #[cold]
    fn is_too_long(&self, length: usize) -> bool {
        // Somebody may have changed it.
        if let Some(fd) = &self.fd {
            self.longest.set(longest(fd.as_fd()));
        }
        length > self.longest.get()
    }
}

fn longest(fd: BorrowedFd<'_>) -> usize {
    let buffer = sys::send_buffer_size(fd).unwrap_or(usize::MAX);
    buffer.saturating_sub(BESIDE_LONGEST)
}

impl DatagramSocket for UnixSeqpacketSocket {
    fn kind(&self) -> &'static str {
        "UNIX seqpacket"
    }

    fn host(&self) -> Address {
        self.host.clone().into()
    }

    fn peer(&self) -> Option<Address> {
        Some(self.peer.clone().into())
    }

    #[inline]
    fn source(&self) -> Option<BorrowedFd<'_>> {
        self.fd.as_ref().map(AsFd::as_fd)
    }

    #[inline]
    fn room(&self) -> usize {
        self.room
    }

    #[inline]
    fn receive(&mut self, arrivals: &mut Arrivals, count: usize) -> io::Result<usize> {
        let fd = self.fd.as_ref().ok_or_else(not_connected)?.as_fd();
        let received = arrivals.batch.receive(fd, count, Beside::Stamps)?;
        let is_over = || sys::is_read_closed(fd);
        match arrivals.batch.end(count, self.is_stamped, is_over) {
            None => Ok(received),
            Some(end) => {
                self.has_ended = true;
                arrivals.batch.truncate(end);
                Ok(end)
            }
        }
    }

    fn send(&mut self, outgoing: &Outgoing<'_>) -> io::Result<usize> {
        let fd = self.fd()?;
        if let Some(first) = outgoing.queue.in_line().next()
            && let Some(one) = first.descriptors.first()
        {
            let mut control = outgoing.shared.send_control.borrow_mut();
            let mut descriptors = [one.as_fd(); MAX_DESCRIPTORS];
            for (place, descriptor) in iter::zip(&mut descriptors, first.descriptors) {
                *place = descriptor.as_fd();
            }
            let descriptors = &descriptors[..first.descriptors.len()];
            sys::send_message(fd, &[], first.data, descriptors, &mut control)?;
            return Ok(1);
        }
        let mut batch = outgoing.shared.send_batch.borrow_mut();
        let messages = outgoing.queue.runs(1, 0).map(|(message, _)| message);
        sys::send_messages(fd, messages, &mut batch)
    }

    fn after(&self, error: &io::Error, _: Option<AddressRef<'_>>) -> AfterSendError {
        match error.kind() {
            io::ErrorKind::WouldBlock => AfterSendError::WaitForRoom,
            io::ErrorKind::BrokenPipe
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::NotConnected => AfterSendError::Broken,
            _ if sys::is_transient(error) => AfterSendError::WaitForTime,
            _ => AfterSendError::Fail,
        }
    }

    /// A peer that is gone is the end of the connection.
    fn is_refusal(&self, _: &io::Error) -> bool {
        false
    }

    #[inline]
    fn refuses(&self, length: usize, to: Option<AddressRef<'_>>) -> Option<SendRefusal> {
        if length > self.longest.get() && self.is_too_long(length) {
            return Some(SendRefusal::TooLong);
        }
        to.map(|_| SendRefusal::BadAddress)
    }

    fn connect(&mut self, _: AddressRef<'_>) -> io::Result<()> {
        Err(io::ErrorKind::InvalidInput.into())
    }

    fn dropped(&self) -> io::Result<u32> {
        sys::dropped(self.fd()?)
    }

    fn duplicate(&self) -> io::Result<OwnedFd> {
        self.fd()?.try_clone_to_owned()
    }

    fn close(&mut self) {
        // Descriptors that nobody has received are closed by the kernel, in our call, and
        // can linger. Behind the end there are none.
        if let Some(fd) = self.fd.take()
            && !self.has_ended
            && sys::has_waiting(fd.as_fd()).unwrap_or(true)
        {
            close_elsewhere(fd);
        }
    }
}

impl PacketSocket for UnixSeqpacketSocket {
    fn has_ended(&self) -> bool {
        self.has_ended
    }

    fn shutdown_write(&mut self) -> io::Result<()> {
        sys::shutdown(self.fd()?, Shutdown::Write)
    }

    fn take_error(&mut self) -> Option<io::Error> {
        sys::take_error(self.fd().ok()?).unwrap_or_else(Some)
    }

    fn peer_credentials(&self) -> io::Result<Credentials> {
        sys::peer_credentials(self.fd()?).map(Credentials::from)
    }

    fn peer_pidfd(&self) -> io::Result<OwnedFd> {
        sys::peer_pidfd(self.fd()?)
    }

    fn set_passes_rights(&self, on: bool) -> io::Result<()> {
        sys::set_pass_rights(self.fd()?, on)
    }

    fn detach(&mut self) -> Option<(OwnedFd, Box<dyn Any>)> {
        let fd = self.fd.take()?;
        let rest = Self {
            fd: None,
            host: self.host.clone(),
            peer: self.peer.clone(),
            longest: self.longest.clone(),
            ..*self
        };
        Some((fd, Box::new(rest)))
    }

    fn attach(&mut self, fd: OwnedFd) -> Result<(), OwnedFd> {
        self.fd = Some(fd);
        Ok(())
    }
}

impl AcceptedSocket for UnixSeqpacketSocket {
    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.source()
    }

    fn decline(&mut self) {
        self.close();
    }
}

impl Drop for UnixSeqpacketSocket {
    fn drop(&mut self) {
        self.close();
    }
}
