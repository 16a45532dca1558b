//! TCP.

use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;

use bowline_protocol::{
    Address, ConnectError, Destination, PassedDescriptor, Remains, SendDescriptorError,
    TcpTransport, UnixTransport, WriteStatus,
};

use super::ends::Ends;
use super::socket_fd::SocketFd;
use super::{
    BACKLOG, CONNECT_TIMEOUT, Of, Plain, backlog, check_connected, check_listening, outcome,
};
use crate::endpoint::{
    Adopt, Carried, Connect, Dial, HostToTry, JustAccepted, Listen, ListenAt, ListeningSocket, On,
    Side, Wrap,
};
use crate::error::{AdoptError, ListenError, ListenStep};
use crate::file_descriptor::{FileDescriptor, Received, Socket};
use crate::link::Link;
use crate::shared::ReadBuffers;
use crate::stream::{Stream, StreamTransport};
use crate::sys::{self, Connecting, Family, SocketName};

stream_type! {
    /// A TCP connection.
    ///
    /// It passes no descriptors, and the compiler knows it. A protocol for UNIX
    /// connections may say
    ///
    /// ```
    /// use std::os::fd::OwnedFd;
    /// use bowline::{Context, Protocol, Transport, UnixStream, UnixTransport};
    ///
    /// struct Lender(Option<OwnedFd>);
    ///
    /// impl Protocol<UnixStream> for Lender {
    ///     fn data_received(&mut self, cx: &mut Context<'_, UnixStream>, data: &[u8]) {
    ///         if let Some(fd) = self.0.take() {
    ///             // An error gives it back, and closes it when it is dropped.
    ///             let _ = cx.transport.send_file_descriptor(fd.into());
    ///         }
    ///         cx.transport.write(data);
    ///     }
    /// }
    /// ```
    ///
    /// and the same over TCP is an error:
    ///
    /// ```compile_fail,E0277
    /// use std::os::fd::OwnedFd;
    /// use bowline::{Context, Protocol, TcpStream, Transport, UnixTransport};
    ///
    /// struct Lender(Option<OwnedFd>);
    ///
    /// impl Protocol<TcpStream> for Lender {
    ///     fn data_received(&mut self, cx: &mut Context<'_, TcpStream>, data: &[u8]) {
    ///         if let Some(fd) = self.0.take() {
    ///             // An error gives it back, and closes it when it is dropped.
    ///             let _ = cx.transport.send_file_descriptor(fd.into());
    ///         }
    ///         cx.transport.write(data);
    ///     }
    /// }
    /// ```
    ///
    /// So is a protocol that needs descriptors, on a TCP listener:
    ///
    /// ```compile_fail,E0277
    /// use bowline::{Address, Context, Protocol, Reactor, Transports, UnixTransport};
    ///
    /// struct Worker;
    ///
    /// impl<T: UnixTransport> Protocol<T> for Worker {
    ///     fn data_received(&mut self, _: &mut Context<'_, T>, _: &[u8]) {}
    /// }
    ///
    /// let mut reactor = Reactor::new()?;
    /// reactor.listen_tcp(([127, 0, 0, 1], 0).into(), |_: &Address| Worker)?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    TcpStream over TcpSocket, known by bowline_protocol::TransportHandle
}

/// What is not there. Were these methods missing altogether, the compiler would say just
/// that; so it says that TCP passes no descriptors, and what does.
///
/// (`for<'a>` keeps the compiler from looking at a bound that is never met before somebody
/// calls.)
impl TcpStream {
    /// Not over TCP. See [`UnixTransport::send_file_descriptor`].
    ///
    /// # Errors
    ///
    /// One of the compiler.
    #[doc(hidden)]
    pub fn send_file_descriptor(&mut self, fd: PassedDescriptor) -> Result<(), SendDescriptorError>
    where
        for<'a> Self: UnixTransport,
    {
        UnixTransport::send_file_descriptor(self, fd)
    }

    /// Not over TCP. See [`UnixTransport::write_with_descriptors`].
    ///
    /// # Errors
    ///
    /// One of the compiler.
    #[doc(hidden)]
    pub fn write_with_descriptors(
        &mut self,
        data: &[u8],
        descriptors: Vec<PassedDescriptor>,
    ) -> Result<WriteStatus, SendDescriptorError>
    where
        for<'a> Self: UnixTransport,
    {
        UnixTransport::write_with_descriptors(self, data, descriptors)
    }
}

/// A TCP socket.
#[derive(Debug)]
pub struct TcpSocket {
    fd: SocketFd,
    /// Whether the close ends the connection for other holders too.
    is_for_all: bool,
    /// Our address is asked for when it is needed, at the latest before the close.
    ends: Ends,
}

/// A TCP socket, or a layer on one at any depth. A transport over it has the options of
/// TCP.
pub trait OverTcp: FileDescriptor {
    /// The socket.
    fn tcp(&self) -> &TcpSocket;
}

impl TcpSocket {
    pub(crate) fn new(fd: OwnedFd, peer: SocketAddr, host: Option<SocketAddr>) -> Self {
        Self {
            fd: SocketFd::new(fd),
            is_for_all: false,
            ends: Ends::new(peer, host),
        }
    }

    /// Makes a socket whose peer has this name.
    fn named(fd: OwnedFd, peer: &SocketName, host: Option<SocketAddr>) -> Self {
        let peer = match peer {
            SocketName::Inet(address) => *address,
            // accept(2) can return a connection that was reset already.
            _ => SocketAddr::from(([0; 4], 0)),
        };
        Self::new(fd, peer, host)
    }

    /// Records our address. Fails if the peer is the socket itself.
    ///
    /// TCP connects a socket that sends to its own port with itself (simultaneous
    /// open). If nobody listens at a port, the kernel may choose just that port for a
    /// client.
    fn refuse_itself(&mut self) -> Result<(), ConnectError> {
        let Ok(SocketName::Inet(host)) = self.fd.name() else {
            return Ok(());
        };
        let peer = self.ends.peer();
        if (host.ip(), host.port()) != (peer.ip(), peer.port()) {
            self.ends.set_host(host);
            return Ok(());
        }
        // A usual close would keep the port from its server for a minute. This close is
        // a reset.
        self.prepare_abort();
        Err(ConnectError::Refused(io::Error::new(
            io::ErrorKind::ConnectionRefused,
            "nobody listens there: the socket was connected to itself",
        )))
    }

    fn find_host(&self) -> SocketAddr {
        let asked = || match self.fd.name() {
            Ok(SocketName::Inet(address)) => Some(address),
            _ => None,
        };
        self.ends
            .host()
            .or_else(asked)
            .unwrap_or_else(|| unspecified(self.ends.peer()))
    }
}

/// The unspecified address of the same family.
fn unspecified(like: SocketAddr) -> SocketAddr {
    match like {
        SocketAddr::V4(_) => SocketAddr::from(([0; 4], 0)),
        SocketAddr::V6(_) => SocketAddr::from(([0; 16], 0)),
    }
}

impl FileDescriptor for TcpSocket {
    #[inline(always)]
    fn write_some_data(&mut self, _: &mut Link, data: &[u8]) -> io::Result<usize> {
        self.fd.send(data)
    }

    fn write_some_pieces(&mut self, _: &mut Link, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        self.fd.send_pieces(pieces)
    }

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
        self.ends.set_host(self.find_host());
        Some(Self {
            fd: std::mem::take(&mut self.fd),
            ends: self.ends.clone(),
            is_for_all: self.is_for_all,
        })
    }

    fn travels(&self) -> bool {
        true
    }
}

impl Socket for TcpSocket {
    fn kind(&self) -> &'static str {
        "TCP"
    }

    fn host(&self) -> Address {
        Address::Inet(self.find_host())
    }

    fn peer(&self) -> Address {
        Address::Inet(self.ends.peer())
    }

    #[inline]
    fn reading(&self) -> Option<BorrowedFd<'_>> {
        self.fd.get()
    }

    fn can_be_reset(&self) -> bool {
        true
    }

    fn remains(&self, error: &io::Error) -> Remains {
        if !self.is_hung_up() {
            Remains::Reading
        } else if error.kind() != io::ErrorKind::BrokenPipe {
            Remains::Pieces
        } else {
            // A reset that came behind the peer's end has this error (`tcp_reset` in
            // Linux).
            Remains::Everything
        }
    }

    fn shutdown_write(&mut self) -> io::Result<()> {
        self.fd.shutdown_write()
    }

    fn end_for_all(&mut self) {
        self.is_for_all = true;
    }

    fn prepare_abort(&mut self) {
        if let Some(fd) = self.fd.get() {
            // A linger time of zero turns close(2) into a reset. This fails only if it
            // is no socket.
            let _ = sys::set_linger(fd, Some(Duration::ZERO));
        }
    }

    fn close(&mut self) {
        if self.ends.host().is_none() && self.fd.get().is_some() {
            self.ends.set_host(self.find_host());
        }
        if self.is_for_all {
            self.fd.shut_down();
        }
        self.fd.close();
    }

    fn detach(&mut self) -> Option<OwnedFd> {
        self.ends.set_host(self.find_host());
        self.fd.take()
    }

    fn attach(&mut self, fd: OwnedFd) -> Result<(), OwnedFd> {
        self.fd.put(fd);
        Ok(())
    }
}

impl OverTcp for TcpSocket {
    fn tcp(&self) -> &TcpSocket {
        self
    }
}

/// `TcpTransport` in terms of a stream over TCP.
macro_rules! impl_tcp_transport {
    (impl $(<$parameter:ident: $bound:path>)? for $type:ty) => {
        impl $(<$parameter: $bound>)? TcpTransport for $type {
            fn no_delay(&self) -> io::Result<bool> {
                sys::no_delay(self.stream().layer.tcp().fd.open()?)
            }

            fn set_no_delay(&mut self, on: bool) -> io::Result<()> {
                sys::set_no_delay(self.stream().layer.tcp().fd.open()?, on)
            }

            fn keep_alive(&self) -> io::Result<bool> {
                sys::keep_alive(self.stream().layer.tcp().fd.open()?)
            }

            fn set_keep_alive(&mut self, on: bool) -> io::Result<()> {
                sys::set_keep_alive(self.stream().layer.tcp().fd.open()?, on)
            }

            fn set_keep_alive_times(
                &mut self,
                idle: Duration,
                interval: Duration,
                probes: u32,
            ) -> io::Result<()> {
                sys::set_keep_alive_times(self.stream().layer.tcp().fd.open()?, idle, interval, probes)
            }
        }
    };
}

impl_tcp_transport!(impl for TcpStream);
impl_tcp_transport!(impl<L: OverTcp> for Stream<L>);

/// The kind of TCP connections. [`at`](Self::at) says where to listen, [`to`](Self::to)
/// and [`to_host`](Self::to_host) where to connect.
///
/// ```
/// use bowline::{Address, Context, Protocol, Reactor, Tcp, Transport, Transports};
///
/// struct Echo;
///
/// impl<T: Transport> Protocol<T> for Echo {
///     fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
///         cx.transport.write(data);
///     }
/// }
///
/// let mut reactor = Reactor::new()?;
/// let here = Tcp::at(([127, 0, 0, 1], 0).into()).no_delay(true);
/// reactor.listen(here, |_: &Address| Echo)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// `Tcp` itself is the kind to [`adopt`](crate::Transports::adopt) a connected socket
/// with. Others may hold the socket too. When the connection ends, only our descriptor
/// is closed; the socket is not shut down for others.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tcp;

impl Tcp {
    /// Listens at an address. Port 0 lets the kernel choose.
    pub fn at(address: SocketAddr) -> TcpListen {
        TcpListen {
            address,
            backlog: BACKLOG,
            reuse_address: true,
            reuse_port: false,
            v6_only: true,
            options: Options::default(),
        }
    }

    /// Goes on with a socket that listens already. Other processes may share it, so it is
    /// made non-blocking and otherwise left as it is. (Twisted: `adoptStreamPort`.)
    pub fn listening(fd: OwnedFd) -> On<TcpListen> {
        Self::at(SocketAddr::from(([0; 4], 0))).on(fd)
    }

    /// Connects to an address.
    pub fn to(address: SocketAddr) -> TcpConnect {
        TcpConnect {
            target: Target::Address(address),
            timeout: Some(CONNECT_TIMEOUT),
            bind_address: None,
            options: Options::default(),
            wrap: Plain,
        }
    }

    /// Connects to a host by its name, or by its IP address as text. (Twisted:
    /// `HostnameEndpoint`.)
    ///
    /// Each attempt looks the name up ([`Resolver`](crate::Resolver)) and tries its
    /// addresses as RFC 8305 says: IPv6 and IPv4 by turns. The next address is tried after
    /// a quarter of a second, while the earlier ones go on, or at once when one has
    /// failed. The first that connects wins, and the others are closed.
    ///
    /// The factory sees one attempt. It builds its protocol for the address that won. If
    /// the attempt fails, [`ConnectError`] says that the name has no address, or how each
    /// address failed.
    pub fn to_host(name: &str, port: u16) -> TcpConnect {
        TcpConnect {
            target: Target::Host {
                name: name.into(),
                port,
                attempt_delay: ATTEMPT_DELAY,
            },
            ..Self::to(SocketAddr::from(([0; 4], 0)))
        }
    }
}

impl Adopt for Tcp {
    type Source = OwnedFd;
    type Socket = TcpSocket;
    type Wrap = Plain;

    fn check(&self, fd: OwnedFd) -> Result<TcpSocket, AdoptError> {
        let (fd, peer) = check_connected(fd, Of::Inet)?;
        Ok(TcpSocket::named(fd, &peer, None))
    }

    fn check_accepted(&self, fd: OwnedFd, known: &JustAccepted) -> Result<TcpSocket, AdoptError> {
        // Only a socket of TCP has such a peer, and no call of ours waits for a socket that
        // blocks.
        match known.peer.as_ref().and_then(Address::as_inet) {
            Some(peer) => {
                let host = known.host.as_ref().and_then(Address::as_inet);
                Ok(TcpSocket::new(fd, peer, host))
            }
            None => self.check(fd),
        }
    }

    fn not_installed(mut socket: TcpSocket, error: io::Error) -> AdoptError {
        AdoptError::os(error, socket.fd.take().expect("it was just put there"))
    }

    fn into_parts(self) -> (Plain, Carried) {
        (Plain, Carried::default())
    }
}

impl Wrap<TcpSocket> for Plain {
    type Transport = TcpStream;

    #[inline]
    fn wrap(&mut self, socket: TcpSocket, _: Side) -> TcpSocket {
        socket
    }
}

/// The settings of connections of both sides.
#[derive(Clone, Copy, Debug, Default)]
struct Options {
    no_delay: bool,
    keep_alive: bool,
}

impl Options {
    fn set(self, fd: BorrowedFd<'_>) -> io::Result<()> {
        if self.no_delay {
            sys::set_no_delay(fd, true)?;
        }
        if self.keep_alive {
            sys::set_keep_alive(fd, true)?;
        }
        Ok(())
    }
}

/// The settings of a TCP listener. [`Tcp::at`] makes it.
#[derive(Clone, Debug)]
#[must_use = "nothing listens before it is given to `listen` or `accept`"]
pub struct TcpListen {
    address: SocketAddr,
    backlog: u32,
    reuse_address: bool,
    reuse_port: bool,
    v6_only: bool,
    options: Options,
}

impl TcpListen {
    /// Sets how many connections may wait to be accepted; default 1,024. The kernel cuts
    /// it to `net.core.somaxconn`.
    pub fn backlog(mut self, backlog: u32) -> Self {
        self.backlog = backlog;
        self
    }

    /// Sets `SO_REUSEADDR`; default true. With it, binding succeeds even if connections
    /// of an earlier listener are still closing.
    pub fn reuse_address(mut self, on: bool) -> Self {
        self.reuse_address = on;
        self
    }

    /// Sets `SO_REUSEPORT`; default false. With it, several listeners have one address,
    /// and the kernel distributes connections between them. Closing one of them resets
    /// the connections in its queue. So for a restart, pass the listener on instead.
    pub fn reuse_port(mut self, on: bool) -> Self {
        self.reuse_port = on;
        self
    }

    /// Sets whether an IPv6 listener leaves IPv4 alone; default true.
    pub fn v6_only(mut self, on: bool) -> Self {
        self.v6_only = on;
        self
    }

    /// Sets `TCP_NODELAY` on accepted connections; default false. They inherit it from the
    /// listener, without a system call each.
    pub fn no_delay(mut self, on: bool) -> Self {
        self.options.no_delay = on;
        self
    }

    /// Sets `SO_KEEPALIVE` on accepted connections; default false. They inherit it too.
    pub fn keep_alive(mut self, on: bool) -> Self {
        self.options.keep_alive = on;
        self
    }

    fn bound(&self) -> Result<OwnedFd, ListenError> {
        let failed = |step| ListenError::of(&self.address, step);
        let fd = self.unbound().map_err(failed(ListenStep::Socket))?;
        let name = SocketName::Inet(self.address);
        sys::bind(fd.as_fd(), &name).map_err(failed(ListenStep::Bind))?;
        sys::listen(fd.as_fd(), backlog(self.backlog)).map_err(failed(ListenStep::Listen))?;
        Ok(fd)
    }

    fn unbound(&self) -> io::Result<OwnedFd> {
        let fd = sys::stream_socket(family(self.address))?;
        sys::set_reuse_address(fd.as_fd(), self.reuse_address)?;
        if self.reuse_port {
            sys::set_reuse_port(fd.as_fd(), true)?;
        }
        if self.address.is_ipv6() {
            sys::set_v6_only(fd.as_fd(), self.v6_only)?;
        }
        self.options.set(fd.as_fd())?;
        Ok(fd)
    }
}

fn family(address: SocketAddr) -> Family {
    match address {
        SocketAddr::V4(_) => Family::Inet4,
        SocketAddr::V6(_) => Family::Inet6,
    }
}

impl Listen for TcpListen {
    type Socket = TcpListener;
    type Wrap = Plain;
    type Error = ListenError;

    fn open(self) -> Result<(TcpListener, Plain), ListenError> {
        let fd = self.bound()?;
        Ok((TcpListener::new(fd), Plain))
    }

    fn not_installed(_: TcpListener, address: Address, error: io::Error) -> ListenError {
        ListenError {
            address,
            step: ListenStep::Watch,
            error,
        }
    }
}

impl ListenAt for TcpListen {
    fn address(&self) -> Address {
        self.address.into()
    }

    fn take(self, fd: OwnedFd) -> Result<(TcpListener, Plain), AdoptError> {
        let fd = check_listening(fd, Of::Inet)?;
        Ok((TcpListener::new(fd), Plain))
    }
}

/// A TCP socket that listens.
#[derive(Debug)]
pub struct TcpListener {
    fd: OwnedFd,
    /// Our address in all connections. `None` for a listener on all addresses. Then
    /// each connection has its own, which is asked for when it is needed.
    host: Option<SocketAddr>,
}

impl TcpListener {
    fn new(fd: OwnedFd) -> Self {
        let host = match sys::local_name(fd.as_fd()) {
            Ok(SocketName::Inet(address)) if !address.ip().is_unspecified() => Some(address),
            _ => None,
        };
        Self { fd, host }
    }
}

impl ListeningSocket for TcpListener {
    type Accepted = TcpSocket;

    fn address(&self) -> io::Result<Address> {
        match sys::local_name(self.fd.as_fd())? {
            SocketName::Inet(address) => Ok(Address::Inet(address)),
            _ => Err(io::Error::from(io::ErrorKind::InvalidInput)),
        }
    }

    #[inline]
    fn accept(&mut self, may_block: bool) -> io::Result<(TcpSocket, Address)> {
        let (fd, peer) = sys::accept_from(self.fd.as_fd(), may_block)?;
        let socket = TcpSocket::named(fd, &peer, self.host);
        let peer = Address::Inet(socket.ends.peer());
        Ok((socket, peer))
    }

    fn accept_descriptor(&mut self, may_block: bool) -> io::Result<(OwnedFd, Address)> {
        let (fd, peer) = sys::accept_from(self.fd.as_fd(), may_block)?;
        let peer = match peer {
            SocketName::Inet(address) => address,
            _ => SocketAddr::from(([0; 4], 0)),
        };
        Ok((fd, Address::Inet(peer)))
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
        self.fd
    }

    fn close(self) {}
}

/// How long an address is tried before the next one is tried beside it, and the least
/// that may be set (RFC 8305, section 8).
const ATTEMPT_DELAY: Duration = Duration::from_millis(250);
const LEAST_ATTEMPT_DELAY: Duration = Duration::from_millis(10);

/// The settings of a TCP connector. [`Tcp::to`] and [`Tcp::to_host`] make it.
#[derive(Clone, Debug)]
#[must_use = "nothing connects before it is given to `connect`"]
pub struct TcpConnect {
    target: Target,
    timeout: Option<Duration>,
    bind_address: Option<SocketAddr>,
    options: Options,
    wrap: Plain,
}

#[derive(Clone, Debug)]
enum Target {
    Address(SocketAddr),
    Host {
        name: Rc<str>,
        port: u16,
        attempt_delay: Duration,
    },
}

impl TcpConnect {
    /// Sets how long an attempt may take until `connection_made`; default 30 seconds.
    /// This includes the lookup of a host, all its addresses, and the handshakes of
    /// layers. With `None` it takes as long as the kernel tries, and as the layers
    /// allow.
    pub fn timeout(mut self, timeout: impl Into<Option<Duration>>) -> Self {
        self.timeout = timeout.into();
        self
    }

    /// Sets the address to connect from; by default the kernel chooses it.
    ///
    /// For a host, addresses of the other family are left out then. If a port is set too,
    /// the addresses are tried one after the other, since two sockets cannot have the same
    /// port.
    pub fn bind_address(mut self, address: SocketAddr) -> Self {
        self.bind_address = Some(address);
        self
    }

    /// Sets `TCP_NODELAY`; default false.
    pub fn no_delay(mut self, on: bool) -> Self {
        self.options.no_delay = on;
        self
    }

    /// Sets `SO_KEEPALIVE`; default false.
    pub fn keep_alive(mut self, on: bool) -> Self {
        self.options.keep_alive = on;
        self
    }

    /// Sets how long one address of a host is tried before the next is tried beside it;
    /// default 250 ms, as RFC 8305 recommends. Less than 10 ms counts as 10 ms. Without a
    /// host it has no effect.
    pub fn attempt_delay(mut self, delay: Duration) -> Self {
        if let Target::Host { attempt_delay, .. } = &mut self.target {
            *attempt_delay = delay.max(LEAST_ATTEMPT_DELAY);
        }
        self
    }
}

impl Connect for TcpConnect {
    type Socket = TcpSocket;
    type Wrap = Plain;

    fn destination(&self) -> Destination {
        match &self.target {
            Target::Address(address) => (*address).into(),
            Target::Host { name, port, .. } => Destination::Host {
                name: Rc::clone(name),
                port: *port,
            },
        }
    }

    fn timeout(&self) -> Option<Duration> {
        self.timeout
    }

    fn host(&self) -> Option<HostToTry> {
        let Target::Host {
            name,
            port,
            attempt_delay,
        } = &self.target
        else {
            return None;
        };
        let is_bound_to_port = self.bind_address.is_some_and(|it| it.port() != 0);
        Some(HostToTry {
            name: Rc::clone(name),
            port: *port,
            attempt_delay: (!is_bound_to_port).then_some(*attempt_delay),
            is_ipv4: self.bind_address.map(|it| it.is_ipv4()),
        })
    }

    fn dial(&mut self, address: &Address) -> Result<Dial<TcpSocket>, ConnectError> {
        let Some(peer) = address.as_inet() else {
            return Err(ConnectError::Os(io::ErrorKind::InvalidInput.into()));
        };
        let fd = sys::stream_socket(family(peer)).map_err(ConnectError::Os)?;
        self.options.set(fd.as_fd()).map_err(ConnectError::Os)?;
        if let Some(address) = self.bind_address {
            sys::bind(fd.as_fd(), &SocketName::Inet(address)).map_err(ConnectError::Bind)?;
        }
        let connecting = sys::connect(fd.as_fd(), &SocketName::Inet(peer));
        let connecting = connecting.map_err(ConnectError::from_os)?;
        let mut socket = TcpSocket::new(fd, peer, None);
        if connecting == Connecting::Done {
            socket.refuse_itself()?;
        }
        Ok(connecting.dial(socket))
    }

    fn outcome(&mut self, socket: &mut TcpSocket) -> Option<Result<(), ConnectError>> {
        let outcome = outcome(socket.reading()?)?;
        Some(outcome.and_then(|()| socket.refuse_itself()))
    }

    fn wrap(&mut self) -> &mut Plain {
        &mut self.wrap
    }
}
