//! Endpoints: where and how to listen, to connect and to adopt.
//!
//! A kind of connection is a file under `kinds/`, or belongs to a program. It has a
//! socket, which is a [`ConnectionSocket`], and values that implement [`Listen`],
//! [`Connect`] and [`Adopt`]. It implements those that it supports. Everything that
//! kinds have in common is written once, in terms of these traits: accepting in
//! batches, racing addresses, time limits, flow control.
//!
//! The transport that is put on the socket says what protocols it serves
//! ([`TransportFor`]). So streams and packets have the same listeners and connectors.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;

use bowline_protocol::{
    Address, ConnectError, ConnectorHandle, Credentials, Destination, Factory, LingeringClose,
    ListenerHandle, SocketFile,
};
use bowline_reactor::{Interest, Reactor, Token};

use crate::connector;
use crate::detach::Unsent;
use crate::error::{AdoptError, AdoptErrorKind, ListenError};
use crate::establish::{Beginning, Establish as _};
pub use crate::establish::{SocketTransport, TransportFor};
use crate::file_descriptor::FileDescriptor;
use crate::link::Link;
use crate::listener::{self, Serve};
use crate::process::SocketDescription;
use crate::stream::Stream;

/// How a connection came about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// A listener accepted it.
    Accepted,
    /// A connector made it.
    Connected,
    /// Its socket was adopted.
    Adopted,
}

/// Puts layers on a connected socket of the type `S`. [`layer`](Listen::layer) replaces
/// this part of an endpoint.
///
/// A closure can do so: `|socket: TcpSocket, side| MyLayer::new(socket, side)` makes
/// transports of the type `Stream<MyLayer<TcpSocket>>`.
pub trait Wrap<S>: 'static {
    /// The transport that the layers make.
    type Transport: SocketTransport;

    /// Puts the layers on a socket. The loop calls this once for each connection.
    fn wrap(&mut self, socket: S, side: Side) -> LayerOf<Self::Transport>;
}

/// The layers of a transport.
pub type LayerOf<T> = <T as SocketTransport>::Layer;

/// The transport of an endpoint that listens.
pub type ListenTransport<E> =
    <<E as Listen>::Wrap as Wrap<<<E as Listen>::Socket as ListeningSocket>::Accepted>>::Transport;

/// The transport of an endpoint that connects.
pub type ConnectTransport<E> = <<E as Connect>::Wrap as Wrap<<E as Connect>::Socket>>::Transport;

/// The transport of an adopted connection.
pub type AdoptTransport<K> = <<K as Adopt>::Wrap as Wrap<<K as Adopt>::Socket>>::Transport;

impl<S, L, F> Wrap<S> for F
where
    S: 'static,
    L: FileDescriptor,
    F: FnMut(S, Side) -> L + 'static,
{
    type Transport = Stream<L>;

    fn wrap(&mut self, socket: S, side: Side) -> L {
        self(socket, side)
    }
}

/// An endpoint that [`Transports::listen`](crate::Transports::listen) takes, together
/// with a server `F`. Every [`Listen`] takes a factory. An endpoint for datagrams takes a
/// datagram protocol.
pub trait ListenWith<F>: Sized {
    /// The handle of the listener or datagram socket.
    type Handle;

    /// The reason why it does not listen.
    type Error;

    /// Listens.
    ///
    /// # Errors
    ///
    /// The reason why it cannot listen. Nothing is left behind.
    fn listen_with(self, reactor: &mut Reactor, with: F) -> Result<Self::Handle, Self::Error>;
}

/// An endpoint that [`Transports::connect`](crate::Transports::connect) takes, together
/// with a factory or a datagram protocol. See [`ListenWith`].
pub trait ConnectWith<F>: Sized {
    /// The handle of the connector, or of the connected datagram socket.
    type Handle;

    /// The reason why there is no connector or socket.
    type Error;

    /// Connects.
    ///
    /// # Errors
    ///
    /// The reason why it cannot connect. Nothing is left behind.
    fn connect_with(self, reactor: &mut Reactor, with: F) -> Result<Self::Handle, Self::Error>;
}

/// A kind that [`Transports::adopt`](crate::Transports::adopt) takes, together with a
/// source of the type `S` and a protocol `P`. See [`ListenWith`].
pub trait AdoptWith<S, P>: Sized {
    /// The handle of the connection or datagram socket.
    type Handle;

    /// Adopts.
    ///
    /// # Errors
    ///
    /// [`AdoptError`] gives the source back.
    fn adopt_with(
        self,
        reactor: &mut Reactor,
        source: S,
        protocol: P,
    ) -> Result<Self::Handle, AdoptError<S>>;
}

impl<E, F> ListenWith<F> for E
where
    E: Listen,
    F: Factory,
    ListenTransport<E>: TransportFor<F::Protocol>,
{
    type Handle = ListenerHandle;
    type Error = E::Error;

    fn listen_with(self, reactor: &mut Reactor, factory: F) -> Result<ListenerHandle, E::Error> {
        let lingering = self.lingering();
        let (socket, wrap) = self.open()?;
        let service = Serve {
            wrap,
            factory,
            lingering,
        };
        listener::install::<E>(reactor, socket, service)
    }
}

impl<C, F> ConnectWith<F> for C
where
    C: Connect,
    F: Factory,
    ConnectTransport<C>: TransportFor<F::Protocol>,
{
    type Handle = ConnectorHandle;
    type Error = io::Error;

    fn connect_with(self, reactor: &mut Reactor, factory: F) -> io::Result<ConnectorHandle> {
        connector::install(reactor, self, factory)
    }
}

impl<K, P> AdoptWith<K::Source, P> for K
where
    K: Adopt,
    AdoptTransport<K>: TransportFor<P>,
{
    type Handle = <AdoptTransport<K> as SocketTransport>::Handle;

    fn adopt_with(
        self,
        reactor: &mut Reactor,
        source: K::Source,
        protocol: P,
    ) -> Result<Self::Handle, AdoptError<K::Source>> {
        adopt(reactor, self, source, protocol).map(AdoptTransport::<K>::named)
    }
}

/// Adopts a connection for [`Transports::adopt`](crate::Transports::adopt), whatever
/// the type of its handle.
pub(crate) fn adopt<K: Adopt, P>(
    reactor: &mut Reactor,
    kind: K,
    source: K::Source,
    protocol: P,
) -> Result<Token, AdoptError<K::Source>>
where
    AdoptTransport<K>: TransportFor<P>,
{
    let socket = kind.check(source)?;
    let (is_shared, is_fresh) = (kind.is_shared(), kind.is_fresh());
    let (mut wrap, carried) = kind.into_parts();
    let side = Side::Adopted;
    let beginning = Beginning {
        is_shared,
        is_fresh,
        carried,
        ..Beginning::of(side)
    };
    let wrap = |socket| wrap.wrap(socket, side);
    AdoptTransport::<K>::establish(reactor, socket, wrap, protocol, beginning)
        .map(|made| made.token)
        .map_err(|(error, socket, _)| K::not_installed(socket, error))
}

/// Where and how to listen for connections. See
/// [`Transports::listen`](crate::Transports::listen).
pub trait Listen: Sized {
    /// The listening socket.
    type Socket: ListeningSocket;

    /// Puts layers on the accepted sockets.
    type Wrap: Wrap<<Self::Socket as ListeningSocket>::Accepted>;

    /// The error of a socket that cannot listen.
    type Error;

    /// Whether other processes may hold the socket, and may have made it block. The
    /// listener then polls it before each accept.
    const MAY_BLOCK: bool = false;

    /// Whether others may accept connections from the same queue. A listener that stops
    /// gracefully then leaves the queue to them.
    const SHARES_QUEUE: bool = false;

    /// Makes the socket, bound and listening.
    ///
    /// # Errors
    ///
    /// The step that failed. Nothing is left behind.
    fn open(self) -> Result<(Self::Socket, Self::Wrap), Self::Error>;

    /// Makes the error for a socket that was opened but that the reactor could not
    /// take.
    fn not_installed(socket: Self::Socket, address: Address, error: io::Error) -> Self::Error;

    /// Makes the socket, to be given away: to a worker at its start, through a UNIX
    /// connection, or to another reactor. The receiver goes on with it by
    /// [`ListenAt::on`].
    ///
    /// The socket is non-blocking and close-on-exec. Connections queue up in it
    /// meanwhile. Its socket file stays.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open).
    fn bind(self) -> Result<OwnedFd, Self::Error> {
        Ok(self.open()?.0.into_descriptor())
    }

    /// Puts other layers on each accepted connection, instead of those of the kind.
    /// (UNIX sockets have [`SendmsgMixin`](crate::SendmsgMixin).)
    fn layer<W: Wrap<<Self::Socket as ListeningSocket>::Accepted>>(
        self,
        wrap: W,
    ) -> Layered<Self, W> {
        Layered {
            endpoint: self,
            wrap,
        }
    }

    /// Has each accepted connection [linger](bowline_protocol::Transport::set_lingering_close)
    /// when it closes, from its beginning on. A protocol can change that for its own. A
    /// connection that the factory declines with a word lingers too. Kinds without resets
    /// do not linger.
    fn lingering_close(self, lingering: LingeringClose) -> Lingering<Self> {
        Lingering {
            endpoint: self,
            lingering,
        }
    }

    /// How its connections linger, from their beginning on.
    fn lingering(&self) -> Option<LingeringClose> {
        None
    }
}

/// An endpoint that can bind, or go on with a socket that is bound already. A restart
/// needs this.
pub trait ListenAt: Listen<Error = ListenError> {
    /// The address to listen at.
    fn address(&self) -> Address;

    /// Whether a socket that others hold is of this kind, as far as the kernel can tell.
    fn is_like(&self, found: &SocketDescription) -> bool {
        found.is_stream
    }

    /// Goes on with a socket that listens already. Settings that belong to a socket
    /// from its beginning are left as they are.
    ///
    /// # Errors
    ///
    /// [`AdoptError`] gives the descriptor back.
    fn take(self, fd: OwnedFd) -> Result<(Self::Socket, Self::Wrap), AdoptError>;

    /// As [`take`](Self::take), made an endpoint of its own.
    fn on(self, fd: OwnedFd) -> On<Self> {
        On { endpoint: self, fd }
    }
}

/// An endpoint with a socket that listens already. [`ListenAt::on`] makes it.
#[derive(Debug)]
pub struct On<E> {
    endpoint: E,
    fd: OwnedFd,
}

impl<E: ListenAt> Listen for On<E> {
    type Socket = E::Socket;
    type Wrap = E::Wrap;
    type Error = AdoptError;

    const MAY_BLOCK: bool = true;
    const SHARES_QUEUE: bool = true;

    fn open(self) -> Result<(E::Socket, E::Wrap), AdoptError> {
        self.endpoint.take(self.fd)
    }

    fn lingering(&self) -> Option<LingeringClose> {
        self.endpoint.lingering()
    }

    fn not_installed(socket: E::Socket, _: Address, error: io::Error) -> AdoptError {
        AdoptError::os(error, socket.into_descriptor())
    }
}

/// The socket of a connection, without layers. Every [`FileDescriptor`] is one, and so
/// are the sockets of connections of packets.
pub trait ConnectionSocket: 'static {
    /// Its descriptor, if it has one.
    fn descriptor(&self) -> Option<BorrowedFd<'_>>;

    /// The descriptor that becomes writable once it is connected.
    fn connecting(&self) -> Option<BorrowedFd<'_>> {
        self.descriptor()
    }

    /// Has the poller report its readability under `token`.
    ///
    /// # Errors
    ///
    /// Those of epoll_ctl(2).
    fn watch(&self, reactor: &mut Reactor, token: Token) -> io::Result<()> {
        match self.descriptor() {
            Some(source) => reactor.watch(token, source, Interest::Readable),
            None => Err(crate::file_descriptor::not_connected()),
        }
    }

    /// Whether it is always ready, and the poller does not watch it.
    fn is_always_ready(&self) -> bool {
        false
    }

    /// Closes it, even if its peer has sent something already.
    fn decline(&mut self);

    /// Has its close end the connection for everybody who holds the socket.
    fn end_for_all(&mut self);
}

impl<S: FileDescriptor> ConnectionSocket for S {
    #[inline]
    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.socket().reading()
    }

    fn connecting(&self) -> Option<BorrowedFd<'_>> {
        self.socket().writing()
    }

    fn watch(&self, reactor: &mut Reactor, token: Token) -> io::Result<()> {
        self.socket().watch(reactor, token)
    }

    fn is_always_ready(&self) -> bool {
        self.socket().is_always_ready()
    }

    fn decline(&mut self) {
        self.socket_mut().decline();
    }

    fn end_for_all(&mut self) {
        self.socket_mut().end_for_all();
    }
}

/// A listening socket.
pub trait ListeningSocket: 'static {
    /// The sockets that it accepts.
    type Accepted: ConnectionSocket;

    /// The address at which it listens.
    ///
    /// # Errors
    ///
    /// The kernel's.
    fn address(&self) -> io::Result<Address>;

    /// Takes the first waiting connection, and the address of its peer. `may_block`
    /// says that other processes may have made the socket block.
    ///
    /// # Errors
    ///
    /// The kernel's. `WouldBlock` if no connection waits.
    fn accept(&mut self, may_block: bool) -> io::Result<(Self::Accepted, Address)>;

    /// As [`accept`](Self::accept), as a descriptor that is served elsewhere.
    ///
    /// # Errors
    ///
    /// As [`accept`](Self::accept).
    fn accept_descriptor(&mut self, may_block: bool) -> io::Result<(OwnedFd, Address)>;

    /// The process at the other end of an accepted connection.
    ///
    /// # Errors
    ///
    /// `Unsupported` if it is not known.
    fn credentials_of(&self, accepted: &Self::Accepted) -> io::Result<Credentials> {
        let _ = accepted;
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Tells an accepted connection what is known of all of them.
    fn prepare(&self, link: &mut Link) {
        let _ = link;
    }

    /// The descriptor for the poller. `None` if the poller does not watch this socket.
    fn source(&self) -> Option<BorrowedFd<'_>>;

    /// Has the poller report waiting connections under `token`.
    ///
    /// # Errors
    ///
    /// Those of epoll_ctl(2).
    fn watch(&self, reactor: &mut Reactor, token: Token) -> io::Result<()> {
        match self.source() {
            Some(source) => reactor.watch(token, source, Interest::Readable),
            None => Err(crate::file_descriptor::not_connected()),
        }
    }

    /// Has the poller report nothing any more.
    fn unwatch(&self, reactor: &mut Reactor) {
        if let Some(source) = self.source() {
            reactor.unwatch(source);
        }
    }

    /// Makes it non-blocking, whatever other holders of the socket have done.
    ///
    /// # Errors
    ///
    /// The kernel's.
    fn set_nonblocking(&self) -> io::Result<()> {
        Ok(())
    }

    /// Makes another descriptor of the same socket.
    ///
    /// # Errors
    ///
    /// The kernel's.
    fn duplicate(&self) -> io::Result<OwnedFd>;

    /// Turns it into its descriptor, to be used elsewhere. Its socket file stays.
    fn into_descriptor(self) -> OwnedFd;

    /// Closes it. Connections that wait to be accepted end.
    fn close(self);

    /// The socket file that it owns, if any.
    fn socket_file(&self) -> Option<SocketFile> {
        None
    }

    /// Leaves its socket file to the other holders of the socket.
    fn disown_socket_file(&mut self) {}

    /// Owns the socket file at its address from now on.
    ///
    /// # Errors
    ///
    /// `InvalidInput` if the socket has no path. `AlreadyExists` if another file is
    /// there.
    fn own_socket_file(&mut self, file: SocketFile) -> io::Result<()> {
        let _ = file;
        Err(io::Error::from(io::ErrorKind::InvalidInput))
    }
}

/// Where and how to connect. See [`Transports::connect`](crate::Transports::connect).
pub trait Connect: Sized + 'static {
    /// The connected socket.
    type Socket: ConnectionSocket;

    /// Puts layers on the socket.
    type Wrap: Wrap<Self::Socket>;

    /// The destination, as the factory is told of it.
    fn destination(&self) -> Destination;

    /// How long an attempt may take in all. It ends with `connection_made`, so the
    /// handshakes of layers count too.
    fn timeout(&self) -> Option<Duration>;

    /// The host whose addresses are looked up and tried. `None` if the destination is
    /// an address.
    fn host(&self) -> Option<HostToTry> {
        None
    }

    /// Begins to connect a new socket to an address.
    ///
    /// # Errors
    ///
    /// The reason why it cannot connect.
    fn dial(&mut self, address: &Address) -> Result<Dial<Self::Socket>, ConnectError>;

    /// Asks whether a socket that was [in progress](Dial::InProgress) is connected by
    /// now. `None` if it neither is nor has failed.
    fn outcome(&mut self, socket: &mut Self::Socket) -> Option<Result<(), ConnectError>> {
        let _ = socket;
        Some(Ok(()))
    }

    /// Hands settings of this endpoint to a new connection.
    fn prepare(&self, link: &mut Link) {
        let _ = link;
    }

    /// The layers to put on the socket.
    fn wrap(&mut self) -> &mut Self::Wrap;

    /// Puts other layers on the connection, instead of those of the kind.
    fn layer<W: Wrap<Self::Socket>>(self, wrap: W) -> Layered<Self, W> {
        Layered {
            endpoint: self,
            wrap,
        }
    }

    /// Has the connection [linger](bowline_protocol::Transport::set_lingering_close) when it
    /// closes, from its beginning on, and each that a
    /// [reconnecting](bowline_protocol::policies::Reconnecting) factory makes. Kinds without
    /// resets do not linger.
    fn lingering_close(self, lingering: LingeringClose) -> Lingering<Self> {
        Lingering {
            endpoint: self,
            lingering,
        }
    }
}

/// A host whose addresses are tried. See RFC 8305.
#[derive(Clone, Debug)]
pub struct HostToTry {
    /// Its name.
    pub name: Rc<str>,
    /// The port at each address.
    pub port: u16,
    /// How long each address is tried alone. With `None` the next one is tried only
    /// once it has failed.
    pub attempt_delay: Option<Duration>,
    /// The family of the local address that the socket is bound to, if any. Addresses
    /// of the other family are left out.
    pub is_ipv4: Option<bool>,
}

/// The result of dialling.
#[derive(Debug)]
pub enum Dial<S, P = S> {
    /// The socket is connected.
    Connected(S),
    /// The socket is connecting. It becomes writable when that has succeeded or failed.
    InProgress(P),
    /// The accept queue of the listener is full. The attempt is repeated.
    Full,
}

/// The kind of connection to adopt. See
/// [`Transports::adopt`](crate::Transports::adopt).
pub trait Adopt: Sized {
    /// The value that a connection is adopted from, mostly a descriptor.
    type Source;

    /// The socket that it becomes.
    type Socket: ConnectionSocket;

    /// Puts layers on the socket.
    type Wrap: Wrap<Self::Socket>;

    /// Checks the source, and makes its socket fit for the loop.
    ///
    /// # Errors
    ///
    /// [`AdoptError`] gives the source back.
    fn check(&self, source: Self::Source) -> Result<Self::Socket, AdoptError<Self::Source>>;

    /// As [`check`](Self::check), for a source that was [accepted](Self::accepted) a moment
    /// ago. A kind that need not ask the kernel what is known leaves that out. By default
    /// it asks.
    ///
    /// # Errors
    ///
    /// As [`check`](Self::check).
    fn check_accepted(
        &self,
        source: Self::Source,
        known: &JustAccepted,
    ) -> Result<Self::Socket, AdoptError<Self::Source>> {
        let _ = known;
        self.check(source)
    }

    /// Makes the error for a socket that was checked but that the reactor could not
    /// take.
    fn not_installed(socket: Self::Socket, error: io::Error) -> AdoptError<Self::Source>;

    /// Whether other processes may hold the socket. If so, closing it must not harm
    /// them.
    fn is_shared(&self) -> bool {
        true
    }

    /// Whether the socket was [accepted](Self::accepted) a moment ago. It is read before
    /// the poller watches it, as what a listener accepts is: a client that has asked
    /// already, and is done with its answer, costs no epoll_ctl(2). By default it was not.
    fn is_fresh(&self) -> bool {
        false
    }

    /// Checks the state that a connection is to bring along, before its source is
    /// checked.
    ///
    /// # Errors
    ///
    /// The reason why it can never be used. By default only unsent descriptors are
    /// checked.
    fn check_carried(&self, carried: &Carried) -> Result<(), AdoptErrorKind> {
        carried.unsent.check()
    }

    /// The layers to put on the socket, and the state that it brings along.
    fn into_parts(self) -> (Self::Wrap, Carried);

    /// Puts other layers on the connection, instead of those of the kind.
    fn layer<W: Wrap<Self::Socket>>(self, wrap: W) -> Layered<Self, W> {
        Layered {
            endpoint: self,
            wrap,
        }
    }

    /// Adopts a connection that an [`Acceptor`](bowline_protocol::Acceptor), here or in
    /// another process, has accepted a moment ago. Then the kernel is asked less. If the peer
    /// is known, such a socket is taken for what it is said to be, and its flags stay as they
    /// are: it has to be close-on-exec, as those of a listener of bowline are. It is read
    /// before it is watched. A connection that was reset meanwhile is adopted, and ends.
    fn accepted(self, known: JustAccepted) -> Accepted<Self> {
        Accepted { kind: self, known }
    }

    /// Brings along the state of a connection that was detached elsewhere, such as in
    /// another process. Adopting is refused if its descriptors [do not
    /// fit](crate::UnsentDescriptors) its bytes. If the connection cannot pass
    /// descriptors, they are closed.
    fn carrying(self, carried: Carried) -> Carrying<Self> {
        Carrying {
            kind: self,
            carried,
        }
    }

    /// As [`carrying`](Self::carrying), with only what is unsent.
    fn with_unsent(self, unsent: Unsent) -> Carrying<Self> {
        self.carrying(Carried {
            unsent,
            ..Carried::default()
        })
    }
}

/// The state that a connection brings along when it was detached elsewhere.
#[derive(Debug, Default)]
pub struct Carried {
    /// Unsent bytes and descriptors. They leave first, each descriptor with the bytes
    /// that it belongs to.
    pub unsent: Unsent,
    /// Bytes that were read and not used. They are delivered first, after
    /// `connection_made`. A connection of packets cannot have any.
    pub unread: Vec<u8>,
    /// Whether the connection ends for everybody here. Another process may hold the socket
    /// that will never use it. By default the close of one holder is not the end.
    pub ends_for_all: bool,
}

/// An endpoint with other layers. `layer` makes it.
#[derive(Debug)]
pub struct Layered<E, W> {
    endpoint: E,
    wrap: W,
}

impl<E: Listen, W: Wrap<<E::Socket as ListeningSocket>::Accepted>> Listen for Layered<E, W> {
    type Socket = E::Socket;
    type Wrap = W;
    type Error = E::Error;

    const MAY_BLOCK: bool = E::MAY_BLOCK;
    const SHARES_QUEUE: bool = E::SHARES_QUEUE;

    fn lingering(&self) -> Option<LingeringClose> {
        self.endpoint.lingering()
    }

    fn open(self) -> Result<(E::Socket, W), E::Error> {
        Ok((self.endpoint.open()?.0, self.wrap))
    }

    fn not_installed(socket: E::Socket, address: Address, error: io::Error) -> E::Error {
        E::not_installed(socket, address, error)
    }
}

impl<E: ListenAt, W: Wrap<<E::Socket as ListeningSocket>::Accepted>> ListenAt for Layered<E, W> {
    fn address(&self) -> Address {
        self.endpoint.address()
    }

    fn is_like(&self, found: &SocketDescription) -> bool {
        self.endpoint.is_like(found)
    }

    fn take(self, fd: OwnedFd) -> Result<(E::Socket, W), AdoptError> {
        Ok((self.endpoint.take(fd)?.0, self.wrap))
    }
}

impl<E: Connect, W: Wrap<E::Socket>> Connect for Layered<E, W> {
    type Socket = E::Socket;
    type Wrap = W;

    fn destination(&self) -> Destination {
        self.endpoint.destination()
    }

    fn timeout(&self) -> Option<Duration> {
        self.endpoint.timeout()
    }

    fn host(&self) -> Option<HostToTry> {
        self.endpoint.host()
    }

    fn dial(&mut self, address: &Address) -> Result<Dial<E::Socket>, ConnectError> {
        self.endpoint.dial(address)
    }

    fn outcome(&mut self, socket: &mut E::Socket) -> Option<Result<(), ConnectError>> {
        self.endpoint.outcome(socket)
    }

    fn prepare(&self, link: &mut Link) {
        self.endpoint.prepare(link);
    }

    fn wrap(&mut self) -> &mut W {
        &mut self.wrap
    }
}

impl<K: Adopt, W: Wrap<K::Socket>> Adopt for Layered<K, W> {
    type Source = K::Source;
    type Socket = K::Socket;
    type Wrap = W;

    fn check(&self, source: K::Source) -> Result<K::Socket, AdoptError<K::Source>> {
        self.endpoint.check(source)
    }

    fn check_accepted(
        &self,
        source: K::Source,
        known: &JustAccepted,
    ) -> Result<K::Socket, AdoptError<K::Source>> {
        self.endpoint.check_accepted(source, known)
    }

    fn not_installed(socket: K::Socket, error: io::Error) -> AdoptError<K::Source> {
        K::not_installed(socket, error)
    }

    fn is_shared(&self) -> bool {
        self.endpoint.is_shared()
    }

    fn is_fresh(&self) -> bool {
        self.endpoint.is_fresh()
    }

    fn into_parts(self) -> (W, Carried) {
        (self.wrap, self.endpoint.into_parts().1)
    }
}

/// An endpoint whose connections linger when they close. `lingering_close` makes it.
#[derive(Debug)]
pub struct Lingering<E> {
    endpoint: E,
    lingering: LingeringClose,
}

impl<E: Listen> Listen for Lingering<E> {
    type Socket = E::Socket;
    type Wrap = E::Wrap;
    type Error = E::Error;

    const MAY_BLOCK: bool = E::MAY_BLOCK;
    const SHARES_QUEUE: bool = E::SHARES_QUEUE;

    fn open(self) -> Result<(E::Socket, E::Wrap), E::Error> {
        self.endpoint.open()
    }

    fn not_installed(socket: E::Socket, address: Address, error: io::Error) -> E::Error {
        E::not_installed(socket, address, error)
    }

    fn lingering(&self) -> Option<LingeringClose> {
        Some(self.lingering)
    }
}

impl<E: ListenAt> ListenAt for Lingering<E> {
    fn address(&self) -> Address {
        self.endpoint.address()
    }

    fn is_like(&self, found: &SocketDescription) -> bool {
        self.endpoint.is_like(found)
    }

    fn take(self, fd: OwnedFd) -> Result<(E::Socket, E::Wrap), AdoptError> {
        self.endpoint.take(fd)
    }
}

impl<E: Connect> Connect for Lingering<E> {
    type Socket = E::Socket;
    type Wrap = E::Wrap;

    fn destination(&self) -> Destination {
        self.endpoint.destination()
    }

    fn timeout(&self) -> Option<Duration> {
        self.endpoint.timeout()
    }

    fn host(&self) -> Option<HostToTry> {
        self.endpoint.host()
    }

    fn dial(&mut self, address: &Address) -> Result<Dial<E::Socket>, ConnectError> {
        self.endpoint.dial(address)
    }

    fn outcome(&mut self, socket: &mut E::Socket) -> Option<Result<(), ConnectError>> {
        self.endpoint.outcome(socket)
    }

    fn prepare(&self, link: &mut Link) {
        self.endpoint.prepare(link);
        link.linger(self.lingering);
    }

    fn wrap(&mut self) -> &mut E::Wrap {
        self.endpoint.wrap()
    }
}

/// A kind to adopt, with the state that the connection brings along.
/// [`Adopt::carrying`] makes it.
#[derive(Debug)]
pub struct Carrying<K> {
    kind: K,
    carried: Carried,
}

impl<K: Adopt> Adopt for Carrying<K> {
    type Source = K::Source;
    type Socket = K::Socket;
    type Wrap = K::Wrap;

    fn check(&self, source: K::Source) -> Result<K::Socket, AdoptError<K::Source>> {
        if let Err(kind) = self.kind.check_carried(&self.carried) {
            return Err(AdoptError { kind, fd: source });
        }
        let mut socket = self.kind.check(source)?;
        if self.carried.ends_for_all {
            socket.end_for_all();
        }
        Ok(socket)
    }

    fn not_installed(socket: K::Socket, error: io::Error) -> AdoptError<K::Source> {
        K::not_installed(socket, error)
    }

    fn is_shared(&self) -> bool {
        self.kind.is_shared()
    }

    fn is_fresh(&self) -> bool {
        self.kind.is_fresh()
    }

    fn into_parts(self) -> (K::Wrap, Carried) {
        (self.kind.into_parts().0, self.carried)
    }
}

/// What is known of a connection that was accepted a moment ago. See
/// [`Adopt::accepted`].
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct JustAccepted {
    /// Its peer, as accept(2) said. Where that is not known any more, the kernel is asked
    /// everything, as of any other connection.
    pub peer: Option<Address>,
    /// Our address, where the listener has one for all: then nobody has to ask.
    pub host: Option<Address>,
    /// Whether another process may hold the socket too, such as the one that accepted it.
    /// By default nobody does.
    pub is_shared: bool,
}

impl JustAccepted {
    /// Of a connection from this peer, which nobody else holds.
    pub fn from(peer: impl Into<Option<Address>>) -> Self {
        Self {
            peer: peer.into(),
            host: None,
            is_shared: false,
        }
    }
}

bowline_reactor::setters!(JustAccepted {
    host: Option<Address>,
    is_shared: bool,
});

/// A kind of connection that was accepted a moment ago. `accepted` makes it.
#[derive(Debug)]
pub struct Accepted<K> {
    kind: K,
    known: JustAccepted,
}

impl<K: Adopt> Adopt for Accepted<K> {
    type Source = K::Source;
    type Socket = K::Socket;
    type Wrap = K::Wrap;

    fn check(&self, source: K::Source) -> Result<K::Socket, AdoptError<K::Source>> {
        self.kind.check_accepted(source, &self.known)
    }

    fn check_carried(&self, carried: &Carried) -> Result<(), AdoptErrorKind> {
        self.kind.check_carried(carried)
    }

    fn not_installed(socket: K::Socket, error: io::Error) -> AdoptError<K::Source> {
        K::not_installed(socket, error)
    }

    fn is_shared(&self) -> bool {
        self.known.is_shared
    }

    fn is_fresh(&self) -> bool {
        true
    }

    fn into_parts(self) -> (K::Wrap, Carried) {
        self.kind.into_parts()
    }
}
