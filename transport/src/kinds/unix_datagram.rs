//! UNIX datagram sockets.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use bowline_protocol::{
    Address, AddressRef, DatagramProtocol, Linger, PassedDescriptor, SendDescriptorError,
    SendRefusal, SendStatus, UnixAddress, UnixAddressRef, UnixDatagramHandle,
    UnixDatagramTransport,
};
use bowline_reactor::{Handle, Reactor, Token};

use super::socket_fd::SocketFd;
use super::socket_file::{OwnedFile, StaleSocket, socket_file_settings};
use super::unix::{bind_unix, host_of, name_of};
use super::unix_messages::{self, Longest, MOST_ROOM};
use super::{Of, address_of, check_datagrams};
use crate::closer::close_elsewhere;
use crate::datagram::{self, AfterSendError, Arrivals, DatagramSocket, Outgoing, Port};
use crate::endpoint::{AdoptWith, ConnectWith, ListenWith};
use crate::error::{AdoptError, ListenError, ListenStep};
use crate::sys::{self, Beside, Connecting, Family};

/// The transport of a UNIX datagram socket.
pub type UnixDatagramPort = Port<UnixDatagramSocket>;

/// A UNIX datagram socket.
#[derive(Debug)]
pub struct UnixDatagramSocket {
    /// Removed when we close, if it is still ours. It goes before the socket.
    file: Option<OwnedFile>,
    fd: SocketFd,
    host: UnixAddress,
    peer: Option<UnixAddress>,
    room: usize,
    longest: Longest,
}

/// The kind of UNIX datagram sockets. [`at`](Self::at) says where to receive, and
/// [`to`](Self::to) who is the peer.
///
/// They are reliable. No datagram is lost or overtakes another, and a sender waits for
/// the receiver to read. A socket needs a name to be answered.
///
/// `UnixDatagram` itself is the kind to [`adopt`](crate::Transports::adopt) a socket
/// with, such as one end of a socketpair, or a socket from systemd.
///
/// ```
/// # use bowline::{Context, Datagram, DatagramProtocol, UnixDatagramTransport};
/// # use bowline::Reactor;
/// use bowline::{Transports, UnixDatagram};
///
/// struct Log;
///
/// impl<T: UnixDatagramTransport> DatagramProtocol<T> for Log {
///     fn datagram_received(&mut self, _: &mut Context<'_, T>, datagram: &mut Datagram<'_>) {
///         let pid = datagram.credentials.and_then(|it| it.pid);
///         println!("{pid:?}: {}", datagram.data.escape_ascii());
///     }
/// }
///
/// let mut reactor = Reactor::new()?;
/// let here = UnixDatagram::at("@a log of mine").credentials(true);
/// reactor.listen(here, Log)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, Default)]
pub struct UnixDatagram;

/// The settings of a UNIX datagram socket without a peer. [`UnixDatagram::at`] makes
/// it.
pub type UnixDatagramListen = UnixDatagramEndpoint<()>;

/// The settings of a UNIX datagram socket with one peer. [`UnixDatagram::to`] makes it.
pub type UnixDatagramConnect = UnixDatagramEndpoint<UnixAddress>;

/// The settings of a UNIX datagram socket. `P` is its peer, if it has one.
#[derive(Clone, Debug)]
#[must_use = "nothing is bound before it is given to `listen` or `connect`"]
pub struct UnixDatagramEndpoint<P> {
    address: Option<UnixAddress>,
    peer: P,
    mode: u32,
    stale: StaleSocket,
    accepts_descriptors: bool,
    credentials: bool,
    pidfds: bool,
    max_datagram: usize,
    send_buffer: Option<usize>,
}

impl UnixDatagram {
    /// Receives the datagrams that are sent to a path, or to a name in the abstract
    /// namespace. With [`UnixAddress::Unnamed`] the kernel chooses an abstract name.
    /// The socket file is removed when the socket closes, unless another one has taken
    /// its place. (Twisted: `listenUNIXDatagram`.)
    pub fn at(address: impl Into<UnixAddress>) -> UnixDatagramListen {
        UnixDatagramEndpoint::new(Some(address.into()), ())
    }

    /// Exchanges datagrams with one peer, which has to be there already. Only its
    /// datagrams are received, and the kernel reports room there. The peer cannot
    /// answer unless this socket is [bound](UnixDatagramConnect::bind_address).
    /// (Twisted: `connectUNIXDatagram`.)
    pub fn to(peer: impl Into<UnixAddress>) -> UnixDatagramConnect {
        UnixDatagramEndpoint::new(None, peer.into())
    }
}

impl<P> UnixDatagramEndpoint<P> {
    fn new(address: Option<UnixAddress>, peer: P) -> Self {
        Self {
            address,
            peer,
            mode: 0o666,
            stale: StaleSocket::Remove,
            accepts_descriptors: true,
            credentials: false,
            pidfds: false,
            max_datagram: datagram::ROOM,
            send_buffer: None,
        }
    }

    socket_file_settings!();

    /// Sets whether others may send descriptors (`SO_PASSRIGHTS`, Linux 6.16), before
    /// they can send anything; default true. With false, making the socket fails if the
    /// kernel does not know the option.
    pub fn accepts_descriptors(mut self, accepted: bool) -> Self {
        self.accepts_descriptors = accepted;
        self
    }

    /// Sets whether datagrams come with the [process that sent
    /// them](bowline_protocol::Datagram::credentials) (`SO_PASSCRED`); default false.
    /// The kernel vouches for the process. A socket without a name gets one from the
    /// kernel when it sends.
    pub fn credentials(mut self, wanted: bool) -> Self {
        self.credentials = wanted;
        self
    }

    /// Sets whether datagrams come with a [pidfd](bowline_protocol::Datagram::pidfd) of
    /// that process (`SO_PASSPIDFD`, Linux 6.5); default false. See
    /// [`credentials`](Self::credentials).
    pub fn pidfds(mut self, wanted: bool) -> Self {
        self.pidfds = wanted;
        self
    }

    /// Sets how many bytes of a datagram are delivered; default 65,536, at most 8 MiB.
    /// (The kernel makes none of more than about 4 MiB.) The rest of a longer one is
    /// lost, and it is marked as
    /// [truncated](bowline_protocol::Datagram::is_truncated). Above the default, each
    /// read makes memory for four datagrams.
    pub fn max_datagram(mut self, bytes: usize) -> Self {
        self.max_datagram = bytes.clamp(1, MOST_ROOM);
        self
    }

    /// Sets how many sent bytes the kernel holds until they are read (`SO_SNDBUF`);
    /// default `net.core.wmem_default`, 212,992. The kernel doubles the number for its
    /// own needs, up to `net.core.wmem_max`. No datagram can be longer.
    pub fn send_buffer(mut self, bytes: usize) -> Self {
        self.send_buffer = Some(bytes);
        self
    }

    fn open(&self, peer: Option<&UnixAddress>) -> Result<UnixDatagramSocket, ListenError> {
        let place = self.address.as_ref().or(peer);
        let place = place.unwrap_or(&UnixAddress::Unnamed);
        let fd = sys::datagram_socket(Family::Unix)
            .map_err(ListenError::of(place, ListenStep::Socket))?;
        self.set_options(fd.as_fd())
            .map_err(ListenError::of(place, ListenStep::Socket))?;
        let file = match &self.address {
            None => None,
            Some(address) => bind_unix(fd.as_fd(), address, self.mode, self.stale)
                .map_err(|(step, error)| ListenError::of(address, step)(error))?,
        };
        if let Some(peer) = peer {
            connect(fd.as_fd(), peer).map_err(ListenError::of(peer, ListenStep::Connect))?;
        }
        let mut socket = UnixDatagramSocket::new(file, fd, peer.cloned());
        socket.room = self.max_datagram;
        Ok(socket)
    }

    fn set_options(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        // Everything is set before anything can arrive.
        if !self.accepts_descriptors {
            sys::set_pass_rights(fd, false)?;
        }
        if self.credentials {
            sys::set_pass_credentials(fd, true)?;
        }
        if self.pidfds {
            sys::set_pass_pidfd(fd, true)?;
        }
        if let Some(bytes) = self.send_buffer {
            sys::set_send_buffer_size(fd, bytes)?;
        }
        Ok(())
    }
}

impl UnixDatagramConnect {
    /// Sets the address to send from; by default there is none, so nobody can answer.
    /// With [`UnixAddress::Unnamed`] the kernel chooses an abstract name.
    pub fn bind_address(mut self, address: impl Into<UnixAddress>) -> Self {
        self.address = Some(address.into());
        self
    }
}

fn connect(fd: BorrowedFd<'_>, peer: &UnixAddress) -> io::Result<()> {
    match sys::connect(fd, &name_of(peer))? {
        Connecting::Done => Ok(()),
        // Datagram sockets are connected at once.
        Connecting::InProgress | Connecting::BacklogFull => Err(io::ErrorKind::WouldBlock.into()),
    }
}

impl<P: DatagramProtocol<UnixDatagramPort>> ListenWith<P> for UnixDatagramListen {
    type Handle = UnixDatagramHandle;
    type Error = ListenError;

    fn listen_with(self, reactor: &mut Reactor, protocol: P) -> Result<Self::Handle, ListenError> {
        install(reactor, self.open(None)?, protocol)
    }
}

impl<P: DatagramProtocol<UnixDatagramPort>> ConnectWith<P> for UnixDatagramConnect {
    type Handle = UnixDatagramHandle;
    type Error = ListenError;

    fn connect_with(self, reactor: &mut Reactor, protocol: P) -> Result<Self::Handle, ListenError> {
        install(reactor, self.open(Some(&self.peer))?, protocol)
    }
}

impl<P: DatagramProtocol<UnixDatagramPort>> AdoptWith<OwnedFd, P> for UnixDatagram {
    type Handle = UnixDatagramHandle;

    fn adopt_with(
        self,
        reactor: &mut Reactor,
        fd: OwnedFd,
        protocol: P,
    ) -> Result<Self::Handle, AdoptError> {
        let (fd, _, peer) = check_datagrams(fd, Of::Unix)?;
        let socket = UnixDatagramSocket::new(None, fd, peer.map(address_of));
        datagram::install(reactor, socket, protocol)
            .map(named)
            .map_err(|(error, mut socket)| {
                let fd = socket.fd.take();
                AdoptError::os(error, fd.expect("it was just put there"))
            })
    }
}

fn install<P: DatagramProtocol<UnixDatagramPort>>(
    reactor: &mut Reactor,
    socket: UnixDatagramSocket,
    protocol: P,
) -> Result<UnixDatagramHandle, ListenError> {
    datagram::install(reactor, socket, protocol)
        .map(named)
        .map_err(|(error, socket)| ListenError {
            address: socket.host(),
            step: ListenStep::Watch,
            error,
        })
}

fn named(token: Token) -> UnixDatagramHandle {
    Handle::new(token, |facet| {
        facet
            .downcast_mut::<UnixDatagramPort>()
            .map(|port| port as _)
    })
}

impl UnixDatagramSocket {
    fn new(file: Option<OwnedFile>, fd: OwnedFd, peer: Option<UnixAddress>) -> Self {
        Self {
            file,
            host: host_of(fd.as_fd()),
            longest: Longest::of(fd.as_fd()),
            fd: SocketFd::new(fd),
            peer,
            room: datagram::ROOM,
        }
    }
}

impl DatagramSocket for UnixDatagramSocket {
    fn kind(&self) -> &'static str {
        "UNIX datagram"
    }

    fn host(&self) -> Address {
        if self.host == UnixAddress::Unnamed
            && let Ok(name) = self.fd.name()
        {
            // The kernel may have given it one.
            return address_of(name).into();
        }
        self.host.clone().into()
    }

    fn peer(&self) -> Option<Address> {
        self.peer.clone().map(Address::Unix)
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
        arrivals.batch.receive(fd, count, Beside::Descriptors)
    }

    fn send(&mut self, outgoing: &Outgoing<'_>) -> io::Result<usize> {
        unix_messages::send(self.fd.open()?, outgoing)
    }

    fn take_error(&mut self) -> Option<io::Error> {
        sys::take_error(self.fd.get()?).ok().flatten()
    }

    fn after(&self, error: &io::Error, to: Option<AddressRef<'_>>) -> AfterSendError {
        match error.kind() {
            io::ErrorKind::WouldBlock if to.is_none() => AfterSendError::WaitForRoom,
            io::ErrorKind::WouldBlock => AfterSendError::WaitForPeer,
            _ if sys::is_transient(error) => AfterSendError::WaitForTime,
            _ => AfterSendError::Fail,
        }
    }

    #[inline]
    fn refuses(&self, length: usize, to: Option<AddressRef<'_>>) -> Option<SendRefusal> {
        if self.longest.is_exceeded(length, &self.fd) {
            return Some(SendRefusal::TooLong);
        }
        match to {
            None if self.peer.is_none() => Some(SendRefusal::NotConnected),
            None => None,
            Some(AddressRef::Unix(UnixAddressRef::Unnamed)) => Some(SendRefusal::BadAddress),
            Some(AddressRef::Unix(_)) => None,
            Some(_) => Some(SendRefusal::WrongFamily),
        }
    }

    fn connect(&mut self, peer: AddressRef<'_>) -> io::Result<()> {
        let AddressRef::Unix(address) = peer else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        if address == UnixAddressRef::Unnamed {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let address = address.to_address();
        connect(self.fd.open()?, &address)?;
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
        if let Address::Unix(host) = self.host() {
            self.host = host;
        }
        // The path goes first. So whoever finds it finds a socket. Nobody takes the
        // path over while the socket is open.
        drop(self.file.take());
        // The kernel closes descriptors that nobody has received. In our close(2) that
        // could wait for one that lingers.
        if let Some(fd) = self.fd.take()
            && sys::has_waiting(fd.as_fd()).unwrap_or(true)
        {
            close_elsewhere(fd);
        }
    }
}

impl Drop for UnixDatagramSocket {
    fn drop(&mut self) {
        self.close();
    }
}

impl UnixDatagramTransport for UnixDatagramPort {
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

    fn set_descriptors_accepted(&mut self, accepted: bool) -> io::Result<()> {
        sys::set_pass_rights(self.open_socket()?, accepted)
    }

    fn unix_datagram_handle(&self) -> UnixDatagramHandle {
        self.named(|facet| facet.downcast_mut::<Self>().map(|port| port as _))
    }
}
