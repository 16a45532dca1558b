//! UNIX sockets of sequenced packets (`SOCK_SEQPACKET`).

use std::any::Any;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use bowline_protocol::{
    Address, AddressRef, ConnectError, Credentials, Destination, SendRefusal, SocketFile,
    UnixAddress,
};

use super::socket_fd::SocketFd;
use super::socket_file::{OwnedFile, StaleSocket, socket_file_settings};
use super::unix::{UnixListener, bind_unix, host_of, name_of};
use super::unix_messages::{self, Longest, MOST_ROOM};
use super::{BACKLOG, CONNECT_TIMEOUT, Plain, address_of, backlog, check_packets, outcome};
use crate::closer::close_elsewhere;
use crate::datagram::{
    self, AfterSendError, Arrivals, DatagramSocket, Outgoing, PacketSocket, Port,
};
use crate::endpoint::{
    Adopt, Carried, Connect, ConnectionSocket, Dial, Listen, ListenAt, ListeningSocket, On, Side,
    Wrap,
};
use crate::error::{AdoptError, AdoptErrorKind, ListenError, ListenStep};
use crate::process::SocketDescription;
use crate::sys::{self, Beside, SocketName};

/// The transport of a connection of sequenced packets.
pub type UnixSeqpacketPort = Port<UnixSeqpacketSocket>;

/// A connected UNIX socket of sequenced packets.
#[derive(Debug)]
pub struct UnixSeqpacketSocket {
    fd: SocketFd,
    host: UnixAddress,
    peer: UnixAddress,
    room: usize,
    /// Whether packets have time stamps, which tell an empty packet from the end.
    is_stamped: bool,
    has_ended: bool,
    /// Whether the close ends the connection for other holders too.
    is_for_all: bool,
    longest: Longest,
}

/// The kind of UNIX connections of sequenced packets. [`at`](Self::at) says where to
/// listen, and [`to`](Self::to) where to connect.
///
/// Such a connection keeps the boundaries and the order of packets, loses none, and has
/// an end. The descriptors that are sent with a packet arrive with exactly this packet.
///
/// `UnixSeqpacket` itself is the kind to [`adopt`](crate::Transports::adopt) a
/// connected socket with, such as one end of a socketpair.
///
/// # Packets of no bytes
///
/// An empty packet is delivered like any other. But Linux answers a read of it as it
/// answers a read of the end. So sockets that are made or accepted here have a time
/// stamp on each packet (`SO_TIMESTAMP`), which the end has not. An adopted socket is
/// not changed, since others may hold it. There, empty packets without descriptors that
/// the peer sends just before its end may be taken for a part of the end.
///
/// ```
/// # use bowline::{Address, Context, Packet, PacketProtocol, PacketTransport};
/// # use bowline::Reactor;
/// use bowline::{Transports, UnixSeqpacket};
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
    /// Listens at a path, or at a name in the abstract namespace. With
    /// [`UnixAddress::Unnamed`] the kernel chooses an abstract name.
    ///
    /// The socket file is removed when the listener closes, unless another one has
    /// taken its place.
    pub fn at(address: impl Into<UnixAddress>) -> UnixSeqpacketListen {
        UnixSeqpacketListen {
            address: address.into(),
            backlog: BACKLOG,
            mode: 0o666,
            stale: StaleSocket::Remove,
            settings: Settings::default(),
        }
    }

    /// Goes on with a socket that listens already. Its socket file is neither touched
    /// now nor removed later.
    pub fn listening(fd: OwnedFd) -> On<UnixSeqpacketListen> {
        Self::at(UnixAddress::Unnamed).on(fd)
    }

    /// Connects to a path, or to a name in the abstract namespace.
    pub fn to(address: impl Into<UnixAddress>) -> UnixSeqpacketConnect {
        UnixSeqpacketConnect {
            address: address.into(),
            timeout: Some(CONNECT_TIMEOUT),
            bind_address: None,
            settings: Settings::default(),
            wrap: Plain,
        }
    }
}

/// The settings of both sides.
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
    /// Sets the options that accepted sockets inherit from a listener.
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

    /// Sets the options that each socket needs.
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
            /// Sets whether the peer may send descriptors (`SO_PASSRIGHTS`, Linux
            /// 6.16), before it can send anything; default true. With false, making the
            /// socket fails if the kernel does not know the option.
            pub fn accepts_descriptors(mut self, accepted: bool) -> Self {
                self.settings.accepts_descriptors = accepted;
                self
            }

            /// Sets whether packets come with the [process that sent
            /// them](bowline_protocol::Packet::credentials) (`SO_PASSCRED`); default
            /// false. The kernel vouches for the process. It gives the socket a name
            /// when it sends.
            pub fn credentials(mut self, wanted: bool) -> Self {
                self.settings.credentials = wanted;
                self
            }

            /// Sets whether packets come with a
            /// [pidfd](bowline_protocol::Packet::pidfd) of that process
            /// (`SO_PASSPIDFD`, Linux 6.5); default false.
            pub fn pidfds(mut self, wanted: bool) -> Self {
                self.settings.pidfds = wanted;
                self
            }

            /// Sets how many bytes of a packet are delivered; default 65,536, at most 8
            /// MiB. (The kernel makes none of more than about 4 MiB.) The rest of a
            /// longer one is lost, and it is marked as
            /// [truncated](bowline_protocol::Packet::is_truncated). Above the default,
            /// each read makes memory for four packets.
            pub fn max_packet(mut self, bytes: usize) -> Self {
                self.settings.max_packet = bytes.clamp(1, MOST_ROOM);
                self
            }

            /// Sets how many sent bytes the kernel holds until they are read
            /// (`SO_SNDBUF`); default `net.core.wmem_default`, 212,992. The kernel
            /// doubles the number for its own needs, up to `net.core.wmem_max`. No
            /// packet can be longer.
            pub fn send_buffer(mut self, bytes: usize) -> Self {
                self.settings.send_buffer = Some(bytes);
                self
            }
        }
    };
}

/// The settings of a listener for packets. [`UnixSeqpacket::at`] makes it.
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
    /// Sets how many connections may wait to be accepted; default 1,024. The kernel
    /// cuts it to `net.core.somaxconn`.
    pub fn backlog(mut self, backlog: u32) -> Self {
        self.backlog = backlog;
        self
    }

    socket_file_settings!();
}

impl Listen for UnixSeqpacketListen {
    type Socket = UnixSeqpacketListener;
    type Wrap = Plain;
    type Error = ListenError;

    fn open(self) -> Result<(UnixSeqpacketListener, Plain), ListenError> {
        let failed = |step| ListenError::of(&self.address, step);
        let fd = sys::packet_socket().map_err(failed(ListenStep::Socket))?;
        // Set on the listener, so that nothing arrives before the accept.
        self.settings
            .apply(fd.as_fd())
            .map_err(failed(ListenStep::Socket))?;
        let file = bind_unix(fd.as_fd(), &self.address, self.mode, self.stale)
            .map_err(|(step, error)| failed(step)(error))?;
        sys::listen(fd.as_fd(), backlog(self.backlog)).map_err(failed(ListenStep::Listen))?;
        Ok((UnixSeqpacketListener::new(file, fd, self.settings), Plain))
    }

    fn not_installed(_: Self::Socket, address: Address, error: io::Error) -> ListenError {
        ListenError {
            address,
            step: ListenStep::Watch,
            error,
        }
    }
}

impl ListenAt for UnixSeqpacketListen {
    fn address(&self) -> Address {
        self.address.clone().into()
    }

    fn is_like(&self, found: &SocketDescription) -> bool {
        !found.is_stream
    }

    fn take(self, fd: OwnedFd) -> Result<(UnixSeqpacketListener, Plain), AdoptError> {
        let fd = check_packets(fd, true)?.0;
        Ok((UnixSeqpacketListener::new(None, fd, self.settings), Plain))
    }
}

/// A UNIX socket that listens for connections of packets.
#[derive(Debug)]
pub struct UnixSeqpacketListener {
    socket: UnixListener,
    settings: Settings,
}

impl UnixSeqpacketListener {
    fn new(file: Option<OwnedFile>, fd: OwnedFd, settings: Settings) -> Self {
        Self {
            socket: UnixListener::new(file, fd),
            settings,
        }
    }
}

impl ListeningSocket for UnixSeqpacketListener {
    type Accepted = UnixSeqpacketSocket;

    fn address(&self) -> io::Result<Address> {
        self.socket.address()
    }

    fn accept(&mut self, may_block: bool) -> io::Result<(UnixSeqpacketSocket, Address)> {
        let (fd, peer) = self.accept_descriptor(may_block)?;
        // The kernel refuses neither option for a socket that was just made.
        self.settings.apply_to_each(fd.as_fd())?;
        let name = peer.as_unix().cloned().unwrap_or(UnixAddress::Unnamed);
        let mut socket = UnixSeqpacketSocket::new(fd, self.socket.host(), name);
        socket.room = self.settings.max_packet;
        Ok((socket, peer))
    }

    fn accept_descriptor(&mut self, may_block: bool) -> io::Result<(OwnedFd, Address)> {
        self.socket.accept_descriptor(may_block)
    }

    fn credentials_of(&self, accepted: &UnixSeqpacketSocket) -> io::Result<Credentials> {
        accepted.peer_credentials()
    }

    fn source(&self) -> Option<BorrowedFd<'_>> {
        self.socket.source()
    }

    fn set_nonblocking(&self) -> io::Result<()> {
        self.socket.set_nonblocking()
    }

    fn duplicate(&self) -> io::Result<OwnedFd> {
        self.socket.duplicate()
    }

    fn into_descriptor(self) -> OwnedFd {
        self.socket.into_descriptor()
    }

    fn close(self) {
        self.socket.close();
    }

    fn socket_file(&self) -> Option<SocketFile> {
        self.socket.socket_file()
    }

    fn disown_socket_file(&mut self) {
        self.socket.disown_socket_file();
    }

    fn own_socket_file(&mut self, file: SocketFile) -> io::Result<()> {
        self.socket.own_socket_file(file)
    }
}

/// The settings of a connector for packets. [`UnixSeqpacket::to`] makes it.
#[derive(Clone, Debug)]
#[must_use = "nothing connects before it is given to `connect`"]
pub struct UnixSeqpacketConnect {
    address: UnixAddress,
    timeout: Option<Duration>,
    bind_address: Option<UnixAddress>,
    settings: Settings,
    wrap: Plain,
}

settings!(UnixSeqpacketConnect);

impl UnixSeqpacketConnect {
    /// Sets how long the attempt may take; default 30 seconds. `None` sets no limit.
    /// The attempt waits for room in the accept queue.
    pub fn timeout(mut self, timeout: impl Into<Option<Duration>>) -> Self {
        self.timeout = timeout.into();
        self
    }

    /// Sets the address to connect from; by default it has no name.
    pub fn bind_address(mut self, address: impl Into<UnixAddress>) -> Self {
        self.bind_address = Some(address.into());
        self
    }
}

impl Connect for UnixSeqpacketConnect {
    type Socket = UnixSeqpacketSocket;
    type Wrap = Plain;

    fn destination(&self) -> Destination {
        self.address.clone().into()
    }

    fn timeout(&self) -> Option<Duration> {
        self.timeout
    }

    fn dial(&mut self, address: &Address) -> Result<Dial<UnixSeqpacketSocket>, ConnectError> {
        let Some(peer) = address.as_unix() else {
            return Err(ConnectError::Os(io::ErrorKind::InvalidInput.into()));
        };
        let fd = sys::packet_socket().map_err(ConnectError::Os)?;
        // Everything is set before the peer can send anything.
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

    fn outcome(&mut self, socket: &mut UnixSeqpacketSocket) -> Option<Result<(), ConnectError>> {
        outcome(socket.fd.get()?)
    }

    fn wrap(&mut self) -> &mut Plain {
        &mut self.wrap
    }
}

impl Adopt for UnixSeqpacket {
    type Source = OwnedFd;
    type Socket = UnixSeqpacketSocket;
    type Wrap = Plain;

    fn check(&self, fd: OwnedFd) -> Result<UnixSeqpacketSocket, AdoptError> {
        let (fd, peer) = check_packets(fd, false)?;
        let peer = address_of(peer.unwrap_or(SocketName::UnixUnnamed));
        let host = host_of(fd.as_fd());
        Ok(UnixSeqpacketSocket::new(fd, host, peer))
    }

    fn check_carried(&self, carried: &Carried) -> Result<(), AdoptErrorKind> {
        datagram::check_packed(carried)
    }

    fn not_installed(mut socket: UnixSeqpacketSocket, error: io::Error) -> AdoptError {
        AdoptError::os(error, socket.fd.take().expect("it was just put there"))
    }

    fn into_parts(self) -> (Plain, Carried) {
        (Plain, Carried::default())
    }
}

impl Wrap<UnixSeqpacketSocket> for Plain {
    type Transport = UnixSeqpacketPort;

    fn wrap(&mut self, socket: UnixSeqpacketSocket, _: Side) -> UnixSeqpacketSocket {
        socket
    }
}

impl UnixSeqpacketSocket {
    fn new(fd: OwnedFd, host: UnixAddress, peer: UnixAddress) -> Self {
        Self {
            is_stamped: sys::has_stamps(fd.as_fd()),
            longest: Longest::of(fd.as_fd()),
            fd: SocketFd::new(fd),
            host,
            peer,
            room: datagram::ROOM,
            has_ended: false,
            is_for_all: false,
        }
    }
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
        self.fd.get()
    }

    #[inline]
    fn room(&self) -> usize {
        self.room
    }

    #[inline]
    fn receive(&mut self, arrivals: &mut Arrivals, count: usize) -> io::Result<usize> {
        let fd = self.fd.open()?;
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
        unix_messages::send(self.fd.open()?, outgoing)
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

    fn take_error(&mut self) -> Option<io::Error> {
        sys::take_error(self.fd.get()?).unwrap_or_else(Some)
    }

    #[inline]
    fn refuses(&self, length: usize, to: Option<AddressRef<'_>>) -> Option<SendRefusal> {
        if self.longest.is_exceeded(length, &self.fd) {
            return Some(SendRefusal::TooLong);
        }
        to.map(|_| SendRefusal::BadAddress)
    }

    fn connect(&mut self, _: AddressRef<'_>) -> io::Result<()> {
        Err(io::ErrorKind::InvalidInput.into())
    }

    fn dropped(&self) -> io::Result<u32> {
        sys::dropped(self.fd.open()?)
    }

    fn duplicate(&self) -> io::Result<OwnedFd> {
        self.fd.duplicate()
    }

    fn close(&mut self) {
        if self.is_for_all {
            self.fd.shut_down();
        }
        // The kernel closes descriptors that nobody has received. In our close(2) that
        // could wait for one that lingers. There are none behind the end.
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
        self.fd.shutdown_write()
    }

    fn peer_credentials(&self) -> io::Result<Credentials> {
        sys::peer_credentials(self.fd.open()?).map(Credentials::from)
    }

    fn peer_pidfd(&self) -> io::Result<OwnedFd> {
        sys::peer_pidfd(self.fd.open()?)
    }

    fn set_passes_rights(&self, on: bool) -> io::Result<()> {
        sys::set_pass_rights(self.fd.open()?, on)
    }

    fn detach(&mut self) -> Option<(OwnedFd, Box<dyn Any>)> {
        let fd = self.fd.take()?;
        let rest = Self {
            fd: SocketFd::default(),
            host: self.host.clone(),
            peer: self.peer.clone(),
            longest: self.longest.clone(),
            ..*self
        };
        Some((fd, Box::new(rest)))
    }

    fn attach(&mut self, fd: OwnedFd) -> Result<(), OwnedFd> {
        self.fd.put(fd);
        Ok(())
    }
}

impl ConnectionSocket for UnixSeqpacketSocket {
    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.source()
    }

    fn decline(&mut self) {
        self.close();
    }

    fn end_for_all(&mut self) {
        self.is_for_all = true;
    }
}

impl Drop for UnixSeqpacketSocket {
    fn drop(&mut self) {
        self.close();
    }
}
