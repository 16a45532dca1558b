//! UNIX stream sockets.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;

use bowline_protocol::{
    Address, AddressRef, ConnectError, Credentials, Destination, SocketFile, UnixAddress,
    UnixAddressRef,
};

use super::socket_fd::SocketFd;
use super::socket_file::{OwnedFile, StaleSocket, bind_path, socket_file_settings};
use super::{
    BACKLOG, CONNECT_TIMEOUT, Of, Plain, backlog, check_connected, check_listening, outcome,
};
use crate::closer::close_elsewhere;
use crate::endpoint::{
    Adopt, Carried, Connect, Dial, Listen, ListenAt, ListeningSocket, On, Side, Wrap,
};
use crate::error::{AdoptError, ListenError, ListenStep};
use crate::file_descriptor::{DescriptorSocket, FileDescriptor, PassDescriptors, Received, Socket};
use crate::link::{Flags, Link};
use crate::sendmsg::SendmsgMixin;
use crate::shared::ReadBuffers;
use crate::sys::{self, Family, NameRef, SocketName};

stream_type! {
    /// A UNIX stream connection, which passes descriptors.
    UnixStream over SendmsgMixin<UnixSocket>, known by bowline_protocol::UnixTransportHandle
}

impl_unix_transport!(impl for UnixStream);

/// A UNIX stream socket.
#[derive(Debug)]
pub struct UnixSocket {
    fd: SocketFd,
    is_for_all: bool,
    host: UnixName,
    peer: UnixName,
}

/// The address of one end. All connections of a listener share its address. An end
/// without a name costs nothing. Most clients have none.
#[derive(Clone, Debug)]
pub(crate) struct UnixName(Option<Rc<UnixAddress>>);

impl From<UnixAddress> for UnixName {
    fn from(address: UnixAddress) -> Self {
        Self(match address {
            UnixAddress::Unnamed => None,
            named => Some(Rc::new(named)),
        })
    }
}

impl UnixName {
    fn address(&self) -> Address {
        let name = self.0.as_deref();
        Address::Unix(name.map_or(UnixAddress::Unnamed, UnixAddress::clone))
    }
}

impl UnixSocket {
    pub(crate) fn new(fd: OwnedFd, host: UnixName, peer: UnixName) -> Self {
        Self {
            fd: SocketFd::new(fd),
            is_for_all: false,
            host,
            peer,
        }
    }
}

impl FileDescriptor for UnixSocket {
    #[inline(always)]
    fn write_some_data(&mut self, _: &mut Link, data: &[u8]) -> io::Result<usize> {
        self.fd.send(data)
    }

    fn write_some_pieces(&mut self, _: &mut Link, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        self.fd.send_pieces(pieces)
    }

    /// A plain read. Descriptors that come with the bytes are lost.
    #[inline(always)]
    fn do_read(
        &mut self,
        _: &mut Link,
        buffers: &mut ReadBuffers,
        limit: usize,
    ) -> io::Result<Received> {
        self.fd.read(buffers, limit)
    }

    #[inline]
    fn socket(&self) -> &dyn Socket {
        self
    }

    #[inline]
    fn socket_mut(&mut self) -> &mut dyn Socket {
        self
    }

    fn take(&mut self) -> Option<Self> {
        Some(Self {
            fd: std::mem::take(&mut self.fd),
            is_for_all: self.is_for_all,
            host: self.host.clone(),
            peer: self.peer.clone(),
        })
    }

    fn travels(&self) -> bool {
        true
    }
}

impl PassDescriptors for UnixSocket {
    #[inline]
    fn send_with_descriptors(
        &mut self,
        link: &mut Link,
        data: &[u8],
        descriptors: &[BorrowedFd<'_>],
    ) -> io::Result<usize> {
        let mut control = link.shared.send_control.borrow_mut();
        let data = [IoSlice::new(data)];
        sys::send_with_descriptors(self.fd.open()?, &data, descriptors, &mut control)
    }

    #[inline(always)]
    fn receive(
        &mut self,
        _: &mut Link,
        buffers: &mut ReadBuffers,
        limit: usize,
    ) -> io::Result<Received> {
        let received = sys::receive(
            self.fd.open()?,
            buffers.data.get_mut(limit),
            &mut buffers.control,
            &mut buffers.ancillary,
        )?;
        Ok(Received::new(received.bytes, limit)
            .with_ancillary(received.had_ancillary, received.control_truncated))
    }

    fn descriptor_socket(&self) -> &dyn DescriptorSocket {
        self
    }
}

impl Socket for UnixSocket {
    fn kind(&self) -> &'static str {
        "UNIX"
    }

    fn host(&self) -> Address {
        self.host.address()
    }

    fn peer(&self) -> Address {
        self.peer.address()
    }

    #[inline]
    fn reading(&self) -> Option<BorrowedFd<'_>> {
        self.fd.get()
    }

    fn shutdown_write(&mut self) -> io::Result<()> {
        self.fd.shutdown_write()
    }

    // There is no reset: the peer sees the end either way.

    fn end_for_all(&mut self) {
        self.is_for_all = true;
    }

    fn close(&mut self) {
        if self.is_for_all {
            self.fd.shut_down();
        }
        self.fd.close();
    }

    fn decline(&mut self) {
        if let Some(fd) = self.fd.take() {
            close_elsewhere(fd);
        }
    }

    fn detach(&mut self) -> Option<OwnedFd> {
        self.fd.take()
    }

    fn attach(&mut self, fd: OwnedFd) -> Result<(), OwnedFd> {
        self.fd.put(fd);
        Ok(())
    }
}

impl DescriptorSocket for UnixSocket {
    fn peer_credentials(&self) -> io::Result<Credentials> {
        sys::peer_credentials(self.fd.open()?).map(Credentials::from)
    }

    fn peer_pidfd(&self) -> io::Result<OwnedFd> {
        sys::peer_pidfd(self.fd.open()?)
    }

    fn set_passes_rights(&self, on: bool) -> io::Result<()> {
        sys::set_pass_rights(self.fd.open()?, on)
    }

    fn shutdown_read(&self) -> io::Result<()> {
        self.fd.shutdown_read()
    }

    fn has_unread(&self) -> bool {
        self.fd
            .get()
            .is_some_and(|fd| sys::has_waiting(fd).unwrap_or(true))
    }

    fn cookie(&self) -> Option<u64> {
        sys::cookie(self.fd.get()?).ok()
    }
}

impl From<sys::Credentials> for Credentials {
    fn from(credentials: sys::Credentials) -> Self {
        Self {
            pid: credentials.pid,
            uid: credentials.uid,
            gid: credentials.gid,
        }
    }
}

/// The kind of UNIX stream connections. [`at`](Self::at) says where to listen, and
/// [`to`](Self::to) where to connect.
///
/// Its sockets have [`SendmsgMixin`] on them, so the transport is a [`UnixStream`].
/// With other layers ([`layer`](Listen::layer)), put that one on top too:
///
/// ```
/// # use bowline::{Address, Context, Protocol, Transport};
/// # use bowline::Reactor;
/// use bowline::endpoint::Listen as _;
/// use bowline::layers::{SendmsgMixin, UnixSocket};
/// use bowline::{Transports, Unix};
/// # struct Echo;
/// # impl<T: Transport> Protocol<T> for Echo {
/// #     fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
/// #         cx.transport.write(data);
/// #     }
/// # }
///
/// let mut reactor = Reactor::new()?;
/// let here = Unix::at("@a name of the abstract namespace").mode(0o600);
/// // A layer of yours would go between the two.
/// let here = here.layer(|socket: UnixSocket, _| SendmsgMixin::new(socket));
/// reactor.listen(here, |_: &Address| Echo)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// `Unix` itself is the kind to [`adopt`](crate::Transports::adopt) a connected socket
/// with, such as one end of a socketpair. Others may hold the socket too. When the
/// connection ends, only our descriptor is closed; the socket is not shut down for
/// others.
#[derive(Clone, Copy, Debug, Default)]
pub struct Unix;

impl Unix {
    /// Listens at a path, or at a name in the abstract namespace.
    ///
    /// The socket file is removed when the listener closes, unless another one has
    /// taken its place.
    pub fn at(address: impl Into<UnixAddress>) -> UnixListen {
        UnixListen {
            address: address.into(),
            backlog: BACKLOG,
            mode: 0o666,
            stale: StaleSocket::Remove,
            accepts_descriptors: true,
        }
    }

    /// Goes on with a socket that listens already. Its socket file is neither touched
    /// now nor removed later. The socket is asked now, once, whether it refuses
    /// descriptors ([`accepts_descriptors`](UnixListen::accepts_descriptors)).
    pub fn listening(fd: OwnedFd) -> On<UnixListen> {
        Self::at(UnixAddress::Unnamed).on(fd)
    }

    /// Connects to a path, or to a name in the abstract namespace.
    pub fn to(address: impl Into<UnixAddress>) -> UnixConnect {
        UnixConnect {
            address: address.into(),
            timeout: Some(CONNECT_TIMEOUT),
            bind_address: None,
            accepts_descriptors: true,
            wrap: Plain,
        }
    }
}

impl Adopt for Unix {
    type Source = OwnedFd;
    type Socket = UnixSocket;
    type Wrap = Plain;

    fn check(&self, fd: OwnedFd) -> Result<UnixSocket, AdoptError> {
        let (fd, peer) = check_connected(fd, Of::Unix)?;
        let host = host_of(fd.as_fd()).into();
        Ok(UnixSocket::new(fd, host, address_of(peer).into()))
    }

    fn not_installed(mut socket: UnixSocket, error: io::Error) -> AdoptError {
        AdoptError::os(error, socket.fd.take().expect("it was just put there"))
    }

    fn into_parts(self) -> (Plain, Carried) {
        (Plain, Carried::default())
    }
}

impl Wrap<UnixSocket> for Plain {
    type Transport = UnixStream;

    #[inline]
    fn wrap(&mut self, socket: UnixSocket, _: Side) -> SendmsgMixin<UnixSocket> {
        SendmsgMixin::new(socket)
    }
}

/// The settings of a UNIX listener. [`Unix::at`] makes it.
#[derive(Clone, Debug)]
#[must_use = "nothing listens before it is given to `listen` or `accept`"]
pub struct UnixListen {
    address: UnixAddress,
    backlog: u32,
    mode: u32,
    stale: StaleSocket,
    accepts_descriptors: bool,
}

impl UnixListen {
    /// Sets how many connections may wait to be accepted; default 1,024. The kernel
    /// cuts it to `net.core.somaxconn`.
    pub fn backlog(mut self, backlog: u32) -> Self {
        self.backlog = backlog;
        self
    }

    socket_file_settings!();

    /// Sets whether clients may send descriptors, before and after they are accepted
    /// (`SO_PASSRIGHTS`, Linux 6.16); default true. Accepted sockets inherit it. With
    /// false, reading costs less, and listening fails if the kernel does not know the
    /// option.
    pub fn accepts_descriptors(mut self, accepted: bool) -> Self {
        self.accepts_descriptors = accepted;
        self
    }

    /// Makes a listening socket, and its file, if it has one. The file has to be
    /// dropped before the socket.
    fn bound(&self) -> Result<(Option<OwnedFile>, OwnedFd), ListenError> {
        let failed = |step| ListenError::of(&self.address, step);
        let fd = sys::stream_socket(Family::Unix).map_err(failed(ListenStep::Socket))?;
        if !self.accepts_descriptors {
            // Set on the listener, so that no descriptor arrives before the accept.
            sys::set_pass_rights(fd.as_fd(), false).map_err(failed(ListenStep::Socket))?;
        }
        let file = bind_unix(fd.as_fd(), &self.address, self.mode, self.stale)
            .map_err(|(step, error)| failed(step)(error))?;
        sys::listen(fd.as_fd(), backlog(self.backlog)).map_err(failed(ListenStep::Listen))?;
        Ok((file, fd))
    }
}

impl Listen for UnixListen {
    type Socket = UnixListener;
    type Wrap = Plain;
    type Error = ListenError;

    fn open(self) -> Result<(UnixListener, Plain), ListenError> {
        let (file, fd) = self.bound()?;
        Ok((UnixListener::new(file, fd), Plain))
    }

    fn not_installed(_: UnixListener, address: Address, error: io::Error) -> ListenError {
        ListenError {
            address,
            step: ListenStep::Watch,
            error,
        }
    }
}

impl ListenAt for UnixListen {
    fn address(&self) -> Address {
        self.address.clone().into()
    }

    fn take(self, fd: OwnedFd) -> Result<(UnixListener, Plain), AdoptError> {
        let fd = check_listening(fd, Of::Unix)?;
        Ok((UnixListener::new(None, fd), Plain))
    }
}

/// A UNIX socket that listens.
#[derive(Debug)]
pub struct UnixListener {
    /// Removed when we close, if it is still ours. It goes before the socket, also if
    /// this is dropped.
    file: Option<OwnedFile>,
    fd: OwnedFd,
    host: UnixName,
    /// Whether the kernel refuses descriptors from all clients.
    refuses_descriptors: bool,
}

impl UnixListener {
    pub(super) fn new(file: Option<OwnedFile>, fd: OwnedFd) -> Self {
        Self {
            file,
            host: host_of(fd.as_fd()).into(),
            refuses_descriptors: !sys::passes_rights(fd.as_fd()),
            fd,
        }
    }

    /// Its name, which its connections inherit.
    pub(super) fn host(&self) -> UnixAddress {
        let name = self.host.0.as_deref();
        name.map_or(UnixAddress::Unnamed, UnixAddress::clone)
    }
}

impl ListeningSocket for UnixListener {
    type Accepted = UnixSocket;

    fn address(&self) -> io::Result<Address> {
        Ok(Address::Unix(address_of(sys::local_name(self.fd.as_fd())?)))
    }

    #[inline]
    fn accept(&mut self, may_block: bool) -> io::Result<(UnixSocket, Address)> {
        let (fd, peer) = self.accept_descriptor(may_block)?;
        let name = match &peer {
            Address::Unix(UnixAddress::Unnamed) => UnixName(None),
            Address::Unix(named) => named.clone().into(),
            _ => UnixName(None),
        };
        Ok((UnixSocket::new(fd, self.host.clone(), name), peer))
    }

    #[inline]
    fn accept_descriptor(&mut self, may_block: bool) -> io::Result<(OwnedFd, Address)> {
        let (fd, peer) = sys::accept_from(self.fd.as_fd(), may_block)?;
        Ok((fd, Address::Unix(address_of(peer))))
    }

    fn credentials_of(&self, accepted: &UnixSocket) -> io::Result<Credentials> {
        accepted.peer_credentials()
    }

    fn prepare(&self, link: &mut Link) {
        if self.refuses_descriptors {
            link.set(Flags::REFUSES_DESCRIPTORS);
        }
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
        // The path goes first. So a client that finds it finds a listener. Nobody takes
        // the path over while the socket is open.
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

/// The settings of a UNIX connector. [`Unix::to`] makes it.
#[derive(Clone, Debug)]
#[must_use = "nothing connects before it is given to `connect`"]
pub struct UnixConnect {
    address: UnixAddress,
    timeout: Option<Duration>,
    bind_address: Option<UnixAddress>,
    accepts_descriptors: bool,
    wrap: Plain,
}

impl UnixConnect {
    /// Sets how long the attempt may take until `connection_made`; default 30 seconds.
    /// `None` sets no limit. This includes the wait for room in the accept queue, and
    /// the handshakes of layers.
    pub fn timeout(mut self, timeout: impl Into<Option<Duration>>) -> Self {
        self.timeout = timeout.into();
        self
    }

    /// Sets the address to connect from; by default it has no name.
    pub fn bind_address(mut self, address: impl Into<UnixAddress>) -> Self {
        self.bind_address = Some(address.into());
        self
    }

    /// Sets whether the peer may send descriptors (`SO_PASSRIGHTS`, Linux 6.16), before
    /// it can send anything; default true. With false, connecting fails if the kernel
    /// does not know the option.
    pub fn accepts_descriptors(mut self, accepted: bool) -> Self {
        self.accepts_descriptors = accepted;
        self
    }
}

impl Connect for UnixConnect {
    type Socket = UnixSocket;
    type Wrap = Plain;

    fn destination(&self) -> Destination {
        self.address.clone().into()
    }

    fn timeout(&self) -> Option<Duration> {
        self.timeout
    }

    fn dial(&mut self, address: &Address) -> Result<Dial<UnixSocket>, ConnectError> {
        let Some(peer) = address.as_unix() else {
            return Err(ConnectError::Os(io::ErrorKind::InvalidInput.into()));
        };
        let fd = sys::stream_socket(Family::Unix).map_err(ConnectError::Os)?;
        if !self.accepts_descriptors {
            sys::set_pass_rights(fd.as_fd(), false).map_err(ConnectError::Os)?;
        }
        if let Some(address) = &self.bind_address {
            sys::bind(fd.as_fd(), &name_of(address)).map_err(ConnectError::Bind)?;
        }
        let connecting = sys::connect(fd.as_fd(), &name_of(peer));
        let connecting = connecting.map_err(ConnectError::from_os)?;
        let host = match &self.bind_address {
            Some(_) => host_of(fd.as_fd()).into(),
            None => UnixName(None),
        };
        // The name of the listener is the address that was asked for.
        Ok(connecting.dial(UnixSocket::new(fd, host, peer.clone().into())))
    }

    fn outcome(&mut self, socket: &mut UnixSocket) -> Option<Result<(), ConnectError>> {
        outcome(socket.reading()?)
    }

    fn prepare(&self, link: &mut Link) {
        if !self.accepts_descriptors {
            link.set(Flags::REFUSES_DESCRIPTORS);
        }
    }

    fn wrap(&mut self) -> &mut Plain {
        &mut self.wrap
    }
}

/// Binds a UNIX socket of any type. Returns its file, if it has one, which has to be
/// dropped before the socket.
pub(super) fn bind_unix(
    fd: BorrowedFd<'_>,
    address: &UnixAddress,
    mode: u32,
    stale: StaleSocket,
) -> Result<Option<OwnedFile>, (ListenStep, io::Error)> {
    let failed = |step| move |error| (step, error);
    let name = name_of(address);
    let Some(path) = address.as_path() else {
        sys::bind(fd, &name).map_err(failed(ListenStep::Bind))?;
        return Ok(None);
    };
    // Linux gives the file the mode of the unbound socket, less the umask. So it is
    // never more open than asked.
    sys::set_mode(fd, mode).map_err(failed(ListenStep::Mode))?;
    bind_path(fd, path, &name, stale)?;
    // From here on the file is removed if anything fails, before the socket is closed.
    let file = OwnedFile::at(path).map_err(failed(ListenStep::Mode))?;
    // This adds the bits that the umask took away. Nobody connects until a socket
    // listens.
    sys::set_file_mode(file.path(), file.identity, mode).map_err(failed(ListenStep::Mode))?;
    Ok(Some(file))
}

/// The protocol's address for a UNIX socket name.
pub(crate) fn address_of(name: SocketName) -> UnixAddress {
    match name {
        SocketName::UnixPath(path) => UnixAddress::Path(path),
        SocketName::UnixAbstract(name) => UnixAddress::Abstract(name),
        SocketName::UnixUnnamed | SocketName::Inet(_) | SocketName::Other(_) => {
            UnixAddress::Unnamed
        }
    }
}

/// As [`address_of`], borrowed, for a name of any family.
#[inline]
pub(crate) fn address_ref(name: NameRef<'_>) -> AddressRef<'_> {
    match name {
        NameRef::Inet(address) => AddressRef::Inet(address),
        NameRef::UnixPath(path) => AddressRef::Unix(UnixAddressRef::Path(path)),
        NameRef::UnixAbstract(name) => AddressRef::Unix(UnixAddressRef::Abstract(name)),
        NameRef::UnixUnnamed | NameRef::Other(_) => AddressRef::Unix(UnixAddressRef::Unnamed),
    }
}

/// The system's name for a UNIX address.
pub(super) fn name_of(address: &UnixAddress) -> SocketName {
    match address {
        UnixAddress::Unnamed => SocketName::UnixUnnamed,
        UnixAddress::Path(path) => SocketName::UnixPath(path.clone()),
        UnixAddress::Abstract(name) => SocketName::UnixAbstract(name.clone()),
    }
}

/// The name of a socket.
pub(super) fn host_of(fd: BorrowedFd<'_>) -> UnixAddress {
    address_of(sys::local_name(fd).unwrap_or(SocketName::UnixUnnamed))
}
