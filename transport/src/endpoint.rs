//! Where and how to listen, to connect and to adopt: what kinds of connection say of
//! themselves.
//!
//! A kind is a file under `kinds/`, or one of a program's own. It has a socket, which
//! is a [`FileDescriptor`], and values that implement [`Listen`], [`Connect`] and
//! [`Adopt`], for those of the verbs of [`Transports`](crate::Transports) that it
//! knows. What is common to kinds (accepting in batches, racing addresses, time
//! limits, flow control) is written once, in terms of these traits.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;

use bowline_protocol::{
    Acceptor, Address, ConnectError, ConnectorHandle, Credentials, Destination, Factory,
    ListenerHandle, Protocol, SocketFile,
};
use bowline_reactor::{Interest, Reactor, Token};

use crate::connection::establish;
use crate::connector;
use crate::detach::Unsent;
use crate::error::{AdoptError, ListenError};
use crate::file_descriptor::FileDescriptor;
use crate::link::{Flags, Link};
use crate::listener::{self, HandOver, Serve};
use crate::process::SocketDescription;
use crate::stream::{Stream, StreamTransport};

/// How a connection came about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// A listener accepted it.
    Accepted,
    /// A connector made it.
    Connected,
    /// It was adopted.
    Adopted,
}

/// Puts layers on a connected socket of the type `S`: the part of an endpoint that
/// [`layer`](Listen::layer) replaces.
///
/// A closure does: `|socket: TcpSocket, side| MyLayer::new(socket, side)` makes
/// transports of the type `Stream<MyLayer<TcpSocket>>`.
pub trait Wrap<S>: 'static {
    /// The transport that comes of it.
    type Transport: StreamTransport;

    /// Puts the layers on a socket. Called once for each connection, from the loop.
    fn wrap(&mut self, socket: S, side: Side) -> LayerOf<Self::Transport>;
}

/// The layers of a transport.
pub type LayerOf<T> = <T as StreamTransport>::Layer;

/// The transport of an endpoint that listens.
pub type ListenTransport<E> =
    <<E as Listen>::Wrap as Wrap<<<E as Listen>::Socket as ListeningSocket>::Accepted>>::Transport;

/// The transport of an endpoint that connects.
pub type ConnectTransport<E> = <<E as Connect>::Wrap as Wrap<<E as Connect>::Socket>>::Transport;

/// The transport of what is adopted.
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

/// What [`Transports::listen`](crate::Transports::listen) takes, together with what is to
/// serve there: a factory `F` for an endpoint that accepts connections, which
/// [`Listen`] says; or the protocol of a datagram socket.
///
/// A kind of datagram socket of your own implements it, in terms of
/// [`Port::open`](crate::Port::open).
pub trait ListenWith<F>: Sized {
    /// The name of what listens.
    type Handle;

    /// Why nothing does.
    type Error;

    /// Listens.
    ///
    /// # Errors
    ///
    /// Why it could not. Nothing is left behind.
    fn listen_with(self, reactor: &mut Reactor, with: F) -> Result<Self::Handle, Self::Error>;
}

/// What [`Transports::connect`](crate::Transports::connect) takes, together with a factory
/// or a protocol, as [`ListenWith`].
pub trait ConnectWith<F>: Sized {
    /// The name of what connects, or is connected.
    type Handle;

    /// Why nothing is.
    type Error;

    /// Connects.
    ///
    /// # Errors
    ///
    /// Why it could not. Nothing is left behind.
    fn connect_with(self, reactor: &mut Reactor, with: F) -> Result<Self::Handle, Self::Error>;
}

/// What [`Transports::adopt`](crate::Transports::adopt) takes, together with a source of
/// the type `S` and a protocol, as [`ListenWith`].
pub trait AdoptWith<S, P>: Sized {
    /// The name of what was adopted.
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

/// What [`Transports::accept`](crate::Transports::accept) takes, together with an acceptor:
/// every endpoint that accepts connections.
pub trait AcceptWith<A>: Sized {
    /// Why nothing listens.
    type Error;

    /// Listens.
    ///
    /// # Errors
    ///
    /// Why it could not. Nothing is left behind.
    fn accept_with(self, reactor: &mut Reactor, acceptor: A)
    -> Result<ListenerHandle, Self::Error>;
}

/// An endpoint at which one can bind, or go on with a socket that is bound there already,
/// whatever it is that is served there: every [`ListenAt`], and that of packets.
pub trait Inherit: Sized {
    /// The endpoint that goes on.
    type Inherited;

    /// Where it is going to listen.
    fn place(&self) -> Address;

    /// Whether a socket that was inherited is of this kind, as far as that is known from
    /// what the kernel says of it.
    fn is_like(&self, found: &SocketDescription) -> bool;

    /// The same, on a socket that listens already.
    fn inherit(self, fd: OwnedFd) -> Self::Inherited;
}

impl<E: Listen, A: Acceptor> AcceptWith<A> for E {
    type Error = E::Error;

    fn accept_with(self, reactor: &mut Reactor, acceptor: A) -> Result<ListenerHandle, E::Error> {
        let (socket, _) = self.open()?;
        listener::install::<E>(reactor, socket, HandOver { acceptor })
    }
}

impl<E: ListenAt> Inherit for E {
    type Inherited = On<E>;

    fn place(&self) -> Address {
        self.address()
    }

    fn is_like(&self, found: &SocketDescription) -> bool {
        found.is_stream
    }

    fn inherit(self, fd: OwnedFd) -> On<E> {
        self.on(fd)
    }
}

impl<E: Listen, F: Factory<ListenTransport<E>>> ListenWith<F> for E {
    type Handle = ListenerHandle;
    type Error = E::Error;

    fn listen_with(self, reactor: &mut Reactor, factory: F) -> Result<ListenerHandle, E::Error> {
        let (socket, wrap) = self.open()?;
        listener::install::<E>(reactor, socket, Serve { wrap, factory })
    }
}

impl<C: Connect, F: Factory<ConnectTransport<C>>> ConnectWith<F> for C {
    type Handle = ConnectorHandle;
    type Error = io::Error;

    fn connect_with(self, reactor: &mut Reactor, factory: F) -> io::Result<ConnectorHandle> {
        connector::install(reactor, self, factory)
    }
}

impl<K: Adopt, P: Protocol<AdoptTransport<K>>> AdoptWith<K::Source, P> for K {
    type Handle = <AdoptTransport<K> as StreamTransport>::Handle;

    fn adopt_with(
        self,
        reactor: &mut Reactor,
        source: K::Source,
        protocol: P,
    ) -> Result<Self::Handle, AdoptError<K::Source>> {
        adopt(reactor, self, source, protocol).map(AdoptTransport::<K>::named)
    }
}

/// What [`Transports::adopt`](crate::Transports::adopt) does for a connection, whatever
/// its handle is.
pub(crate) fn adopt<K: Adopt>(
    reactor: &mut Reactor,
    kind: K,
    source: K::Source,
    protocol: impl Protocol<AdoptTransport<K>>,
) -> Result<Token, AdoptError<K::Source>> {
    let socket = kind.check(source)?;
    let is_shared = kind.is_shared();
    let (mut wrap, carried) = kind.into_parts();
    let prepare = |stream: &mut Stream<_>| {
        if is_shared {
            stream.link.set(Flags::SHARED);
        }
        stream.restore_unsent(carried.unsent);
        stream.link.push_back(carried.unread);
        stream.start();
    };
    let side = Side::Adopted;
    let wrap = |socket| wrap.wrap(socket, side);
    establish::<AdoptTransport<K>, _, _>(reactor, socket, wrap, protocol, side, prepare)
        .map_err(|(error, socket, _)| K::not_installed(socket, error))
}

/// Where and how to listen for connections; see [`Transports::listen`](crate::Transports::listen).
pub trait Listen: Sized {
    /// What listens.
    type Socket: ListeningSocket<Accepted: FileDescriptor>;

    /// What is put on the sockets that it accepts.
    type Wrap: Wrap<<Self::Socket as ListeningSocket>::Accepted>;

    /// Why it could not.
    type Error;

    /// Whether others may hold the socket, and have made it block: then it is asked
    /// before each accept whether a connection waits.
    const IS_SHARED: bool = false;

    /// Makes the socket, bound and listening.
    ///
    /// # Errors
    ///
    /// The step that failed. Nothing is left behind.
    fn open(self) -> Result<(Self::Socket, Self::Wrap), Self::Error>;

    /// The error of a socket that was opened and that the reactor could not take.
    fn not_installed(socket: Self::Socket, address: Address, error: io::Error) -> Self::Error;

    /// Makes the socket, to be given away: to a worker with its start, through a UNIX
    /// connection, to another reactor. Whoever gets it goes on with it
    /// ([`ListenAt::on`]). Non-blocking and close-on-exec; connections queue up in it
    /// meanwhile. A file that belongs to it stays.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open).
    fn bind(self) -> Result<OwnedFd, Self::Error> {
        Ok(self.open()?.0.into_descriptor())
    }

    /// Puts layers on each connection that is accepted, instead of those that the
    /// kind puts there: for UNIX sockets that is
    /// [`SendmsgMixin`](crate::SendmsgMixin).
    fn layer<W: Wrap<<Self::Socket as ListeningSocket>::Accepted>>(
        self,
        wrap: W,
    ) -> Layered<Self, W> {
        Layered {
            endpoint: self,
            wrap,
        }
    }
}

/// An endpoint at which one can bind, or go on with a socket that is bound there
/// already: what a restart needs.
pub trait ListenAt: Listen<Error = ListenError> {
    /// Where it is going to listen.
    fn address(&self) -> Address;

    /// Goes on with a socket that listens already. Of the settings, those that
    /// belong to a socket from its beginning are left as they are.
    ///
    /// # Errors
    ///
    /// [`AdoptError`] gives the descriptor back.
    fn take(self, fd: OwnedFd) -> Result<(Self::Socket, Self::Wrap), AdoptError>;

    /// The same, as an endpoint.
    fn on(self, fd: OwnedFd) -> On<Self> {
        On { endpoint: self, fd }
    }
}

/// An endpoint with a socket that listens already, made by [`ListenAt::on`].
#[derive(Debug)]
pub struct On<E> {
    endpoint: E,
    fd: OwnedFd,
}

impl<E: ListenAt> Listen for On<E> {
    type Socket = E::Socket;
    type Wrap = E::Wrap;
    type Error = AdoptError;

    const IS_SHARED: bool = true;

    fn open(self) -> Result<(E::Socket, E::Wrap), AdoptError> {
        self.endpoint.take(self.fd)
    }

    fn not_installed(socket: E::Socket, _: Address, error: io::Error) -> AdoptError {
        AdoptError::os(error, socket.into_descriptor())
    }
}

/// What a listener accepts, before anything is put on it. Every [`FileDescriptor`] is one.
pub trait AcceptedSocket: 'static {
    /// Its descriptor, if it has one.
    fn descriptor(&self) -> Option<BorrowedFd<'_>>;

    /// Closes it, whatever its peer may have sent already.
    fn decline(&mut self);
}

impl<S: FileDescriptor> AcceptedSocket for S {
    #[inline]
    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.socket().reading()
    }

    fn decline(&mut self) {
        self.socket_mut().decline();
    }
}

/// A socket that listens.
pub trait ListeningSocket: 'static {
    /// What it accepts.
    type Accepted: AcceptedSocket;

    /// Where it listens.
    ///
    /// # Errors
    ///
    /// The kernel's.
    fn address(&self) -> io::Result<Address>;

    /// Takes the first connection that waits, with the address of its peer.
    /// `is_shared` says that others may hold the socket, and may have made it block.
    ///
    /// # Errors
    ///
    /// The kernel's; `WouldBlock` when none waits.
    fn accept(&mut self, is_shared: bool) -> io::Result<(Self::Accepted, Address)>;

    /// The same, as it is, to be served elsewhere.
    ///
    /// # Errors
    ///
    /// As [`accept`](Self::accept).
    fn accept_descriptor(&mut self, is_shared: bool) -> io::Result<(OwnedFd, Address)>;

    /// The process at the other end of a connection that was accepted.
    ///
    /// # Errors
    ///
    /// `Unsupported` where nobody knows.
    fn credentials_of(&self, accepted: &Self::Accepted) -> io::Result<Credentials> {
        let _ = accepted;
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Tells a connection that was accepted what is known of all of them.
    fn prepare(&self, link: &mut Link) {
        let _ = link;
    }

    /// What the poller watches; `None` if it knows nothing of it.
    fn source(&self) -> Option<BorrowedFd<'_>>;

    /// Has waiting connections reported under `token`.
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

    /// Has nothing reported any more.
    fn unwatch(&self, reactor: &mut Reactor) {
        if let Some(source) = self.source() {
            reactor.unwatch(source);
        }
    }

    /// Keeps it from blocking, whatever others who hold it have done.
    ///
    /// # Errors
    ///
    /// The kernel's.
    fn set_nonblocking(&self) -> io::Result<()> {
        Ok(())
    }

    /// Another descriptor of it.
    ///
    /// # Errors
    ///
    /// The kernel's.
    fn duplicate(&self) -> io::Result<OwnedFd>;

    /// The descriptor itself, to be used elsewhere. A file that belongs to it stays.
    fn into_descriptor(self) -> OwnedFd;

    /// Closes it, and with it whoever waits to be accepted.
    fn close(self);

    /// Which file it owns, if it owns one.
    fn socket_file(&self) -> Option<SocketFile> {
        None
    }

    /// Leaves its file to whoever holds the socket.
    fn disown_socket_file(&mut self) {}

    /// Owns the file at its address from now on.
    ///
    /// # Errors
    ///
    /// `InvalidInput` for one without a path; `AlreadyExists` where another file
    /// stands there.
    fn own_socket_file(&mut self, file: SocketFile) -> io::Result<()> {
        let _ = file;
        Err(io::Error::from(io::ErrorKind::InvalidInput))
    }
}

/// Where and how to connect; see [`Transports::connect`](crate::Transports::connect).
pub trait Connect: Sized + 'static {
    /// What connects.
    type Socket: FileDescriptor;

    /// What is put on it.
    type Wrap: Wrap<Self::Socket>;

    /// Where it connects to, as it is told.
    fn destination(&self) -> Destination;

    /// How long an attempt may take in all: until `connection_made`, so that the
    /// handshakes of layers are part of it.
    fn timeout(&self) -> Option<Duration>;

    /// The host whose addresses are to be found and tried; `None` if the destination
    /// is an address.
    fn host(&self) -> Option<HostToTry> {
        None
    }

    /// Begins to connect a new socket to an address.
    ///
    /// # Errors
    ///
    /// Why it could not be connected.
    fn dial(&mut self, address: &Address) -> Result<Dial<Self::Socket>, ConnectError>;

    /// Whether a socket that was [in progress](Dial::InProgress) has come to be
    /// connected, or why not; `None` for neither.
    fn outcome(&mut self, socket: &mut Self::Socket) -> Option<Result<(), ConnectError>> {
        let _ = socket;
        Some(Ok(()))
    }

    /// Tells a connection that was made what was asked for.
    fn prepare(&self, link: &mut Link) {
        let _ = link;
    }

    /// What is put on the socket.
    fn wrap(&mut self) -> &mut Self::Wrap;

    /// Puts layers on the connection, instead of those that the kind puts there.
    fn layer<W: Wrap<Self::Socket>>(self, wrap: W) -> Layered<Self, W> {
        Layered {
            endpoint: self,
            wrap,
        }
    }
}

/// A host whose addresses are tried; see RFC 8305.
#[derive(Clone, Debug)]
pub struct HostToTry {
    /// Its name.
    pub name: Rc<str>,
    /// The port at each address.
    pub port: u16,
    /// How long each address is tried alone; none is until it fails.
    pub attempt_delay: Option<Duration>,
    /// The family that is bound to, if one is: addresses of the other are left out.
    pub is_ipv4: Option<bool>,
}

/// What became of connecting a socket.
#[derive(Debug)]
pub enum Dial<S, P = S> {
    /// It is connected.
    Connected(S),
    /// It is going to report that it can be written to.
    InProgress(P),
    /// There is no room for it there; it is tried again.
    Full,
}

/// What kind of connection to adopt; see [`Transports::adopt`](crate::Transports::adopt).
pub trait Adopt: Sized {
    /// What a connection is adopted from: a descriptor, mostly.
    type Source;

    /// The socket that becomes of it.
    type Socket: FileDescriptor;

    /// What is put on it.
    type Wrap: Wrap<Self::Socket>;

    /// Checks what came from somewhere else, and makes it fit for the loop.
    ///
    /// # Errors
    ///
    /// [`AdoptError`] gives it back.
    fn check(&self, source: Self::Source) -> Result<Self::Socket, AdoptError<Self::Source>>;

    /// The error of a socket that was checked and that the reactor could not take.
    fn not_installed(socket: Self::Socket, error: io::Error) -> AdoptError<Self::Source>;

    /// Whether others may hold the socket, so that nothing may be done to it on the way
    /// out that would hurt them.
    fn is_shared(&self) -> bool {
        true
    }

    /// What is put on it, and what it brings along.
    fn into_parts(self) -> (Self::Wrap, Carried);

    /// Puts layers on the connection, instead of those that the kind puts there.
    fn layer<W: Wrap<Self::Socket>>(self, wrap: W) -> Layered<Self, W> {
        Layered {
            endpoint: self,
            wrap,
        }
    }

    /// For a connection that was detached elsewhere, in another process say, with what
    /// it brings along. Where no descriptors can be passed, those in it are closed. It is
    /// refused where they [do not fit](crate::UnsentDescriptors) the bytes.
    fn carrying(self, carried: Carried) -> Carrying<Self> {
        Carrying {
            kind: self,
            carried,
        }
    }

    /// The same, with nothing but what had not left.
    fn with_unsent(self, unsent: Unsent) -> Carrying<Self> {
        self.carrying(Carried {
            unsent,
            ..Carried::default()
        })
    }
}

/// What a connection that was detached elsewhere brings along.
#[derive(Debug, Default)]
pub struct Carried {
    /// What had not left there: that leaves first, each descriptor with the bytes it
    /// belongs to.
    pub unsent: Unsent,
    /// What was read there and not used: that is delivered first, after
    /// `connection_made`.
    pub unread: Vec<u8>,
}

/// An endpoint with other layers, made by `layer`.
#[derive(Debug)]
pub struct Layered<E, W> {
    endpoint: E,
    wrap: W,
}

impl<E: Listen, W: Wrap<<E::Socket as ListeningSocket>::Accepted>> Listen for Layered<E, W> {
    type Socket = E::Socket;
    type Wrap = W;
    type Error = E::Error;

    const IS_SHARED: bool = E::IS_SHARED;

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

    fn not_installed(socket: K::Socket, error: io::Error) -> AdoptError<K::Source> {
        K::not_installed(socket, error)
    }

    fn is_shared(&self) -> bool {
        self.endpoint.is_shared()
    }

    fn into_parts(self) -> (W, Carried) {
        (self.wrap, self.endpoint.into_parts().1)
    }
}

/// A kind to adopt, with what the connection brings along; made by
/// [`Adopt::carrying`].
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
        match self.carried.unsent.check() {
            Ok(()) => self.kind.check(source),
            Err(kind) => Err(AdoptError { kind, fd: source }),
        }
    }

    fn not_installed(socket: K::Socket, error: io::Error) -> AdoptError<K::Source> {
        K::not_installed(socket, error)
    }

    fn is_shared(&self) -> bool {
        self.kind.is_shared()
    }

    fn into_parts(self) -> (K::Wrap, Carried) {
        (self.kind.into_parts().0, self.carried)
    }
}
