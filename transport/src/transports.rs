//! What the transports add to the reactor.

use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::time::Duration;

use bowline_protocol::{
    Acceptor, Address, ConnectorHandle, Context, Factory, ListenerHandle, LookupError, Protocol,
    TransportHandle, UnixAddress, UnixTransport, UnixTransportHandle,
};
use bowline_reactor::{Handle, Next, Reactor};

use crate::connection::{DescriptorTransport, Names, Source, StreamTransport, establish_with};
use crate::connector::{self, Attempt, Target};
use crate::error::{AdoptError, AdoptErrorKind, DetachError, ListenError, ListenStep};
use crate::handoff::{
    self, Adopted, DetachListenerRequest, DetachRequest, Detached, ProtocolCall, ReattachError,
    Unsent,
};
use crate::listener::{self, HandOver, Serve, socket_name};
use crate::log;
use crate::options::{
    HostConnectOptions, TcpConnectOptions, TcpListenOptions, UnixConnectOptions, UnixListenOptions,
};
use crate::resolver::{self, LOOKUP_TIMEOUT, Lookup, Resolver};
use crate::shared::{DescriptorCounts, Shared, TransportBudgets};
use crate::sys::SocketName;
use crate::{TcpStream, UnixStream};

/// Listening, connecting, adopting and detaching: what the transports add to
/// [`Reactor`].
///
/// None of these calls user code before it returns.
///
/// # Examples
///
/// An echo server:
///
/// ```
/// use bowline_protocol::{Address, Context, Protocol, Transport};
/// use bowline_reactor::Reactor;
/// use bowline_transport::Transports;
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
/// let listener = reactor.listen_tcp(([127, 0, 0, 1], 0).into(), |_: &Address| Echo)?;
/// let address = reactor.get(listener).map(|listener| listener.address());
/// println!("listening on {}", address.expect("it listens"));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub trait Transports {
    /// Listens on TCP with the default options; port 0 lets the kernel choose.
    /// (Twisted: `reactor.listenTCP`.)
    ///
    /// # Errors
    ///
    /// [`ListenError`], with the step that failed.
    fn listen_tcp(
        &mut self,
        address: SocketAddr,
        factory: impl Factory<TcpStream>,
    ) -> Result<ListenerHandle, ListenError>;

    /// Listens on TCP.
    ///
    /// # Errors
    ///
    /// [`ListenError`], with the step that failed.
    fn listen_tcp_with(
        &mut self,
        address: SocketAddr,
        options: &TcpListenOptions,
        factory: impl Factory<TcpStream>,
    ) -> Result<ListenerHandle, ListenError>;

    /// Listens on a UNIX socket with the default options: a path, or a name in
    /// the abstract namespace, written `@name`. (Twisted: `reactor.listenUNIX`.)
    ///
    /// The file of a dead socket at the path is replaced
    /// ([`StaleSocket::Remove`](crate::StaleSocket::Remove)), so that a program that was
    /// killed can be started again. The file is removed when the listener closes, before
    /// the socket is, and unless another has taken its place. It is left alone by a
    /// process that was forked from the one that made it.
    /// [`UnixAddress::Unnamed`] has the kernel choose an abstract name, which
    /// [`Listener::address`](bowline_protocol::Listener::address) tells.
    ///
    /// Needs no /proc, but for one case: before Linux 6.6, a mode that the umask takes
    /// something from.
    ///
    /// # Errors
    ///
    /// [`ListenError`], with the step that failed: `AddrInUse` where somebody has a
    /// socket on the path or the name, or a file of another kind is there.
    fn listen_unix(
        &mut self,
        address: impl Into<UnixAddress>,
        factory: impl Factory<UnixStream>,
    ) -> Result<ListenerHandle, ListenError>;

    /// Listens on a UNIX socket.
    ///
    /// # Errors
    ///
    /// [`ListenError`], with the step that failed.
    fn listen_unix_with(
        &mut self,
        address: impl Into<UnixAddress>,
        options: &UnixListenOptions,
        factory: impl Factory<UnixStream>,
    ) -> Result<ListenerHandle, ListenError>;

    /// Listens on TCP and gives every accepted socket to `acceptor`, without
    /// putting a transport on it: for programs that pass connections on.
    ///
    /// # Errors
    ///
    /// [`ListenError`], with the step that failed.
    ///
    /// # Examples
    ///
    /// Every connection goes to another process, through the UNIX connection
    /// `worker`, as a message of its own: one byte, with the descriptor on it.
    /// (Descriptors of
    /// [`send_file_descriptor`](bowline_protocol::UnixTransport::send_file_descriptor)
    /// travel with whatever bytes leave next, so that two connections accepted in one
    /// turn would share a message, which a receiver of one each does not expect.)
    /// The bytes the client has sent stay in the kernel:
    ///
    /// ```
    /// # use std::os::fd::OwnedFd;
    /// # use bowline_protocol::{Address, BuildContext, UnixTransportHandle};
    /// # use bowline_reactor::Reactor;
    /// # use bowline_transport::{ListenError, TcpListenOptions, Transports};
    /// fn pass_on(reactor: &mut Reactor, worker: UnixTransportHandle) -> Result<(), ListenError> {
    ///     let options = TcpListenOptions::default();
    ///     let acceptor = move |cx: &mut BuildContext<'_>, socket: OwnedFd, _: &Address| {
    ///         let Some(worker) = cx.reactor.get(worker) else {
    ///             return; // the client sees the end
    ///         };
    ///         if let Err(error) = worker.write_with_descriptors(b"c", vec![socket.into()]) {
    ///             eprintln!("a client is turned away: {error}");
    ///         }
    ///     };
    ///     reactor.accept_tcp(([127, 0, 0, 1], 0).into(), &options, acceptor)?;
    ///     Ok(())
    /// }
    /// ```
    fn accept_tcp(
        &mut self,
        address: SocketAddr,
        options: &TcpListenOptions,
        acceptor: impl Acceptor,
    ) -> Result<ListenerHandle, ListenError>;

    /// Listens on a UNIX socket and gives every accepted socket to `acceptor`.
    ///
    /// # Errors
    ///
    /// [`ListenError`], with the step that failed.
    fn accept_unix(
        &mut self,
        address: impl Into<UnixAddress>,
        options: &UnixListenOptions,
        acceptor: impl Acceptor,
    ) -> Result<ListenerHandle, ListenError>;

    /// Connects over TCP with the default options. (Twisted:
    /// `reactor.connectTCP`.)
    ///
    /// Success and failure are told to the factory.
    ///
    /// # Errors
    ///
    /// Only when there are 2^24 descriptors.
    fn connect_tcp(
        &mut self,
        address: SocketAddr,
        factory: impl Factory<TcpStream>,
    ) -> io::Result<ConnectorHandle>;

    /// Connects over TCP.
    ///
    /// # Errors
    ///
    /// As [`connect_tcp`](Self::connect_tcp).
    fn connect_tcp_with(
        &mut self,
        address: SocketAddr,
        options: &TcpConnectOptions,
        factory: impl Factory<TcpStream>,
    ) -> io::Result<ConnectorHandle>;

    /// Connects over TCP to a host by its name, or by its IP address in writing,
    /// with the default options. (Twisted: `HostnameEndpoint`.)
    ///
    /// Each attempt looks the name up ([`Resolver`]) and tries its addresses as
    /// RFC 8305 says: the families by turns, each address beside those before it
    /// after a quarter of a second, and at once when one has failed. The first
    /// that is connected is the connection, and the others are closed. The
    /// factory sees one attempt; [`ConnectError`](bowline_protocol::ConnectError)
    /// tells it that the name has no address, or how each of them failed. The
    /// protocol is built for the address that was connected to.
    ///
    /// # Errors
    ///
    /// As [`connect_tcp`](Self::connect_tcp). What is wrong with the name is told
    /// to the factory.
    fn connect_host(
        &mut self,
        host: &str,
        port: u16,
        factory: impl Factory<TcpStream>,
    ) -> io::Result<ConnectorHandle>;

    /// Connects over TCP to a host by its name.
    ///
    /// # Errors
    ///
    /// As [`connect_host`](Self::connect_host).
    fn connect_host_with(
        &mut self,
        host: &str,
        port: u16,
        options: &HostConnectOptions,
        factory: impl Factory<TcpStream>,
    ) -> io::Result<ConnectorHandle>;

    /// Finds the addresses of a host and gives them to `done`, from the loop and
    /// once, within 60 seconds. (Twisted: `reactor.resolve`,
    /// `nameResolver.resolveHostName`.)
    ///
    /// They are in the order in which they are best tried, each with `port`. An
    /// IP address in writing is its own answer, in this turn. The empty name is
    /// refused, unlike in Twisted, where it is every address of this machine.
    fn resolve(
        &mut self,
        host: &str,
        port: u16,
        done: impl FnOnce(&mut Reactor, Result<Vec<SocketAddr>, LookupError>) + 'static,
    ) -> Lookup;

    /// As [`resolve`](Self::resolve), within `timeout`; `None` waits for as long
    /// as the resolver takes.
    fn resolve_within(
        &mut self,
        timeout: Option<Duration>,
        host: &str,
        port: u16,
        done: impl FnOnce(&mut Reactor, Result<Vec<SocketAddr>, LookupError>) + 'static,
    ) -> Lookup;

    /// Has `resolver` find the addresses of host names from now on, instead of
    /// the [`SystemResolver`](crate::SystemResolver).
    fn set_resolver(&mut self, resolver: impl Resolver);

    /// Connects to a UNIX socket with the default options. (Twisted:
    /// `reactor.connectUNIX`.)
    ///
    /// # Errors
    ///
    /// As [`connect_tcp`](Self::connect_tcp).
    fn connect_unix(
        &mut self,
        address: impl Into<UnixAddress>,
        factory: impl Factory<UnixStream>,
    ) -> io::Result<ConnectorHandle>;

    /// Connects to a UNIX socket.
    ///
    /// # Errors
    ///
    /// As [`connect_tcp`](Self::connect_tcp).
    fn connect_unix_with(
        &mut self,
        address: impl Into<UnixAddress>,
        options: &UnixConnectOptions,
        factory: impl Factory<UnixStream>,
    ) -> io::Result<ConnectorHandle>;

    /// Accepts on a TCP socket that listens already. (Twisted:
    /// `adoptStreamPort`.)
    ///
    /// The socket may be shared with other processes: it is made non-blocking
    /// and otherwise left as it is.
    ///
    /// # Errors
    ///
    /// [`AdoptError`] gives the descriptor back.
    fn adopt_tcp_listener(
        &mut self,
        fd: OwnedFd,
        factory: impl Factory<TcpStream>,
    ) -> Result<ListenerHandle, AdoptError>;

    /// Accepts on a UNIX socket that listens already; its file is neither
    /// touched now nor removed later. Whether it refuses descriptors
    /// ([`UnixListenOptions::accepts_descriptors`]) is asked of it once, now.
    ///
    /// # Errors
    ///
    /// [`AdoptError`] gives the descriptor back.
    fn adopt_unix_listener(
        &mut self,
        fd: OwnedFd,
        factory: impl Factory<UnixStream>,
    ) -> Result<ListenerHandle, AdoptError>;

    /// Accepts on a socket that listens already, TCP or UNIX, and gives every
    /// accepted socket to `acceptor`; see [`accept_tcp`](Self::accept_tcp).
    ///
    /// # Errors
    ///
    /// [`AdoptError`] gives the descriptor back.
    fn accept_adopted(
        &mut self,
        fd: OwnedFd,
        acceptor: impl Acceptor,
    ) -> Result<ListenerHandle, AdoptError>;

    /// Puts a protocol on a connected TCP socket. (Twisted:
    /// `adoptStreamConnection`.)
    ///
    /// The socket may be shared: ending the connection closes our descriptor
    /// and does not shut the socket down for others.
    ///
    /// # Errors
    ///
    /// [`AdoptError`] gives the descriptor back; the protocol is dropped.
    fn adopt_tcp_stream(
        &mut self,
        fd: OwnedFd,
        protocol: impl Protocol<TcpStream>,
    ) -> Result<TransportHandle, AdoptError>;

    /// Puts a protocol on a connected UNIX socket, one end of a socketpair for
    /// instance.
    ///
    /// # Errors
    ///
    /// [`AdoptError`] gives the descriptor back; the protocol is dropped.
    fn adopt_unix_stream(
        &mut self,
        fd: OwnedFd,
        protocol: impl Protocol<UnixStream>,
    ) -> Result<UnixTransportHandle, AdoptError>;

    /// As [`adopt_tcp_stream`](Self::adopt_tcp_stream), for a connection that
    /// was detached elsewhere, in another process say: `unsent` leaves first.
    /// Descriptors in it are closed: TCP passes none.
    ///
    /// # Errors
    ///
    /// [`AdoptError`] gives the descriptor back; the rest is dropped.
    fn adopt_tcp_stream_with(
        &mut self,
        fd: OwnedFd,
        unsent: Unsent,
        protocol: impl Protocol<TcpStream>,
    ) -> Result<TransportHandle, AdoptError>;

    /// As [`adopt_unix_stream`](Self::adopt_unix_stream), for a connection
    /// that was detached elsewhere: `unsent` leaves first, each descriptor with
    /// the bytes it belongs to.
    ///
    /// # Errors
    ///
    /// [`AdoptError`] gives the descriptor back; the rest is dropped. It is refused
    /// too where the descriptors [do not fit](crate::UnsentDescriptors) the bytes.
    fn adopt_unix_stream_with(
        &mut self,
        fd: OwnedFd,
        unsent: Unsent,
        protocol: impl Protocol<UnixStream>,
    ) -> Result<UnixTransportHandle, AdoptError>;

    /// Puts together again what [`detach`](Self::detach) took apart, as it was:
    /// with everything unsent, its producer, limits and pauses. `T` is its
    /// transport.
    ///
    /// For the protocol nothing has happened, but that its transport has a new
    /// handle, of which it is
    /// [told](bowline_protocol::Protocol::connection_reattached).
    ///
    /// # Errors
    ///
    /// [`ReattachError`] gives everything back.
    fn reattach<T: StreamTransport, P: Protocol<T>>(
        &mut self,
        detached: Detached<P>,
    ) -> Result<TransportHandle, ReattachError<P>>;

    /// Takes a connection apart, after the running callback and before anything
    /// else happens to it, and gives `then` its socket with everything that had
    /// not left. Nothing is lost, and neither the protocol nor a producer is told
    /// of an end. A connector is told that its connection has ended with
    /// [`Done`](bowline_protocol::CloseReason::Done), since it may connect again.
    ///
    /// `P` is the protocol's type. `then` runs in this turn.
    fn detach<P: 'static>(
        &mut self,
        handle: TransportHandle,
        then: impl FnOnce(&mut Reactor, Result<Detached<P>, DetachError>) + 'static,
    );

    /// Stops a listener without closing it, and gives `then` its socket;
    /// connections go on to queue up in it. Its file stays.
    fn detach_listener(
        &mut self,
        handle: ListenerHandle,
        then: impl FnOnce(&mut Reactor, Result<OwnedFd, DetachError>) + 'static,
    );

    /// Calls `call` with the protocol of a connection and its context, after
    /// the running callback, in this turn: how a timer or another connection
    /// reaches a protocol and not only its transport.
    ///
    /// `call` is dropped if the connection is lost, or is not of these types.
    fn call_protocol<T: StreamTransport, P: Protocol<T>>(
        &mut self,
        handle: TransportHandle,
        call: impl FnOnce(&mut P, &mut Context<'_, T>) + 'static,
    );

    /// What became of descriptors so far.
    fn descriptor_counts(&mut self) -> DescriptorCounts;

    /// How many descriptor numbers are left to the program itself.
    fn descriptor_reserve(&mut self) -> usize;

    /// Sets how many of the descriptor numbers that this process may use
    /// (`RLIMIT_NOFILE`) peers leave to the program itself; default 16, and 0
    /// for none. Where peers send descriptors, another 253 stay free for what
    /// one read brings. Together they are at most a third of all. Listeners then
    /// leave 64 more to what those send that are connected, so that no crowd of
    /// clients costs them their descriptors.
    ///
    /// When only these are free, listeners leave clients waiting and look ten
    /// times a second whether that has changed; and descriptors that a peer
    /// sends are closed and [lost](bowline_protocol::CloseReason::DescriptorsTruncated),
    /// as they would be without any number left. Whatever peers do, the program
    /// can then open a file, start a child, say in its log what is going on.
    fn set_descriptor_reserve(&mut self, count: usize);

    /// What one transport or listener may do per turn.
    fn transport_budgets(&mut self) -> TransportBudgets;

    /// Sets what one transport or listener may do per turn, for all of this
    /// reactor's.
    fn set_transport_budgets(&mut self, budgets: TransportBudgets);
}

impl Transports for Reactor {
    fn listen_tcp(
        &mut self,
        address: SocketAddr,
        factory: impl Factory<TcpStream>,
    ) -> Result<ListenerHandle, ListenError> {
        self.listen_tcp_with(address, &TcpListenOptions::default(), factory)
    }

    fn listen_tcp_with(
        &mut self,
        address: SocketAddr,
        options: &TcpListenOptions,
        factory: impl Factory<TcpStream>,
    ) -> Result<ListenerHandle, ListenError> {
        let fd = listener::bind_tcp(address, options)?;
        listener::install(self, fd, None, Serve::<TcpStream, _>::new(factory))
            .map_err(|(error, _)| watch_failed(address.into(), error))
    }

    fn listen_unix(
        &mut self,
        address: impl Into<UnixAddress>,
        factory: impl Factory<UnixStream>,
    ) -> Result<ListenerHandle, ListenError> {
        self.listen_unix_with(address, &UnixListenOptions::default(), factory)
    }

    fn listen_unix_with(
        &mut self,
        address: impl Into<UnixAddress>,
        options: &UnixListenOptions,
        factory: impl Factory<UnixStream>,
    ) -> Result<ListenerHandle, ListenError> {
        let address = address.into();
        let (fd, file) = listener::bind_unix(&address, options)?;
        listener::install(self, fd, file, Serve::<UnixStream, _>::new(factory))
            .map_err(|(error, _)| watch_failed(address.into(), error))
    }

    fn accept_tcp(
        &mut self,
        address: SocketAddr,
        options: &TcpListenOptions,
        acceptor: impl Acceptor,
    ) -> Result<ListenerHandle, ListenError> {
        let fd = listener::bind_tcp(address, options)?;
        listener::install(self, fd, None, HandOver { acceptor })
            .map_err(|(error, _)| watch_failed(address.into(), error))
    }

    fn accept_unix(
        &mut self,
        address: impl Into<UnixAddress>,
        options: &UnixListenOptions,
        acceptor: impl Acceptor,
    ) -> Result<ListenerHandle, ListenError> {
        let address = address.into();
        let (fd, file) = listener::bind_unix(&address, options)?;
        listener::install(self, fd, file, HandOver { acceptor })
            .map_err(|(error, _)| watch_failed(address.into(), error))
    }

    fn connect_tcp(
        &mut self,
        address: SocketAddr,
        factory: impl Factory<TcpStream>,
    ) -> io::Result<ConnectorHandle> {
        self.connect_tcp_with(address, &TcpConnectOptions::default(), factory)
    }

    fn connect_tcp_with(
        &mut self,
        address: SocketAddr,
        options: &TcpConnectOptions,
        factory: impl Factory<TcpStream>,
    ) -> io::Result<ConnectorHandle> {
        let target = Target::Address(SocketName::Inet(address));
        connector::install(self, tcp_attempt(target, options), factory)
    }

    fn connect_host(
        &mut self,
        host: &str,
        port: u16,
        factory: impl Factory<TcpStream>,
    ) -> io::Result<ConnectorHandle> {
        self.connect_host_with(host, port, &HostConnectOptions::default(), factory)
    }

    fn connect_host_with(
        &mut self,
        host: &str,
        port: u16,
        options: &HostConnectOptions,
        factory: impl Factory<TcpStream>,
    ) -> io::Result<ConnectorHandle> {
        let target = Target::host(host, port, options);
        connector::install(self, tcp_attempt(target, &options.tcp), factory)
    }

    fn resolve(
        &mut self,
        host: &str,
        port: u16,
        done: impl FnOnce(&mut Self, Result<Vec<SocketAddr>, LookupError>) + 'static,
    ) -> Lookup {
        self.resolve_within(Some(LOOKUP_TIMEOUT), host, port, done)
    }

    fn resolve_within(
        &mut self,
        timeout: Option<Duration>,
        host: &str,
        port: u16,
        done: impl FnOnce(&mut Self, Result<Vec<SocketAddr>, LookupError>) + 'static,
    ) -> Lookup {
        resolver::look_up(self, host, port, timeout, done)
    }

    fn set_resolver(&mut self, resolver: impl Resolver) {
        Shared::of(self).set_resolver(resolver);
    }

    fn connect_unix(
        &mut self,
        address: impl Into<UnixAddress>,
        factory: impl Factory<UnixStream>,
    ) -> io::Result<ConnectorHandle> {
        self.connect_unix_with(address, &UnixConnectOptions::default(), factory)
    }

    fn connect_unix_with(
        &mut self,
        address: impl Into<UnixAddress>,
        options: &UnixConnectOptions,
        factory: impl Factory<UnixStream>,
    ) -> io::Result<ConnectorHandle> {
        let attempt = Attempt {
            target: Target::Address(socket_name(&address.into())),
            bind_address: options.bind_address.as_ref().map(socket_name),
            timeout: options.timeout,
            no_delay: false,
            keep_alive: false,
            accepts_descriptors: options.accepts_descriptors,
        };
        connector::install(self, attempt, factory)
    }

    fn adopt_tcp_listener(
        &mut self,
        fd: OwnedFd,
        factory: impl Factory<TcpStream>,
    ) -> Result<ListenerHandle, AdoptError> {
        let (fd, _) = handoff::check(fd, Adopted::TcpListener)?;
        listener::install_adopted(self, fd, Serve::<TcpStream, _>::new(factory))
            .map_err(adopt_failed)
    }

    fn adopt_unix_listener(
        &mut self,
        fd: OwnedFd,
        factory: impl Factory<UnixStream>,
    ) -> Result<ListenerHandle, AdoptError> {
        let (fd, _) = handoff::check(fd, Adopted::UnixListener)?;
        listener::install_adopted(self, fd, Serve::<UnixStream, _>::new(factory))
            .map_err(adopt_failed)
    }

    fn accept_adopted(
        &mut self,
        fd: OwnedFd,
        acceptor: impl Acceptor,
    ) -> Result<ListenerHandle, AdoptError> {
        let (fd, _) = match handoff::check(fd, Adopted::TcpListener) {
            Err(AdoptError {
                kind: AdoptErrorKind::WrongFamily,
                fd,
            }) => handoff::check(fd, Adopted::UnixListener)?,
            checked => checked?,
        };
        listener::install_adopted(self, fd, HandOver { acceptor }).map_err(adopt_failed)
    }

    fn adopt_tcp_stream(
        &mut self,
        fd: OwnedFd,
        protocol: impl Protocol<TcpStream>,
    ) -> Result<TransportHandle, AdoptError> {
        self.adopt_tcp_stream_with(fd, Unsent::default(), protocol)
    }

    fn adopt_unix_stream(
        &mut self,
        fd: OwnedFd,
        protocol: impl Protocol<UnixStream>,
    ) -> Result<UnixTransportHandle, AdoptError> {
        self.adopt_unix_stream_with(fd, Unsent::default(), protocol)
    }

    fn adopt_tcp_stream_with(
        &mut self,
        fd: OwnedFd,
        unsent: Unsent,
        protocol: impl Protocol<TcpStream>,
    ) -> Result<TransportHandle, AdoptError> {
        let (fd, names) = handoff::check(fd, Adopted::TcpStream)?;
        adopt_stream(self, fd, names, protocol, unsent)
    }

    fn adopt_unix_stream_with(
        &mut self,
        fd: OwnedFd,
        unsent: Unsent,
        protocol: impl Protocol<UnixStream>,
    ) -> Result<UnixTransportHandle, AdoptError> {
        if let Err(kind) = unsent.check() {
            return Err(AdoptError { kind, fd });
        }
        let (fd, names) = handoff::check(fd, Adopted::UnixStream)?;
        let handle = adopt_stream(self, fd, names, protocol, unsent)?;
        Ok(unix_handle(handle))
    }

    fn reattach<T: StreamTransport, P: Protocol<T>>(
        &mut self,
        detached: Detached<P>,
    ) -> Result<TransportHandle, ReattachError<P>> {
        reattach(self, detached)
    }

    fn detach<P: 'static>(
        &mut self,
        handle: TransportHandle,
        then: impl FnOnce(&mut Self, Result<Detached<P>, DetachError>) + 'static,
    ) {
        let token = handle.token();
        let shared = Shared::of(self);
        shared.hold(token);
        self.enter(token, move |descriptor, reactor| {
            shared.release(token);
            let mut request = DetachRequest::<P> {
                result: None,
                is_lost: descriptor.is_none(),
            };
            let next = match descriptor {
                Some(descriptor) => descriptor.request(reactor, &mut request),
                None => Next::Keep,
            };
            let result = match request.result {
                Some(detached) => Ok(detached),
                None if request.is_lost => Err(DetachError::Lost),
                None => Err(DetachError::WrongProtocol),
            };
            // A turn of its own: its panic is not the connection's.
            reactor.defer(move |reactor| then(reactor, result));
            next
        });
    }

    fn detach_listener(
        &mut self,
        handle: ListenerHandle,
        then: impl FnOnce(&mut Self, Result<OwnedFd, DetachError>) + 'static,
    ) {
        self.enter(handle.token(), |descriptor, reactor| {
            let mut request = DetachListenerRequest { fd: None };
            let next = match descriptor {
                Some(descriptor) => descriptor.request(reactor, &mut request),
                None => Next::Keep,
            };
            let result = request.fd.ok_or(DetachError::Lost);
            reactor.defer(move |reactor| then(reactor, result));
            next
        });
    }

    fn call_protocol<T: StreamTransport, P: Protocol<T>>(
        &mut self,
        handle: TransportHandle,
        call: impl FnOnce(&mut P, &mut Context<'_, T>) + 'static,
    ) {
        let token = handle.token();
        self.enter(token, move |descriptor, reactor| {
            let mut request = ProtocolCall::<T, P> {
                call: Some(Box::new(call)),
            };
            let next = match descriptor {
                Some(descriptor) => descriptor.request(reactor, &mut request),
                None => Next::Keep,
            };
            if request.call.is_some() {
                log::debug!(target: log::TRANSPORT, "{token}: call of a protocol that is not there");
            }
            next
        });
    }

    fn descriptor_counts(&mut self) -> DescriptorCounts {
        Shared::of(self).ledger.counts()
    }

    fn descriptor_reserve(&mut self) -> usize {
        Shared::of(self).numbers.reserve()
    }

    fn set_descriptor_reserve(&mut self, count: usize) {
        Shared::of(self).numbers.set_reserve(count);
    }

    fn transport_budgets(&mut self) -> TransportBudgets {
        Shared::of(self).budgets.get()
    }

    fn set_transport_budgets(&mut self, budgets: TransportBudgets) {
        Shared::of(self).budgets.set(TransportBudgets {
            read_bytes: budgets.read_bytes.max(1),
            writes: budgets.writes.max(1),
            notices: budgets.notices.max(1),
            accepts: budgets.accepts.max(1),
        });
    }
}

fn tcp_attempt(target: Target, options: &TcpConnectOptions) -> Attempt {
    Attempt {
        target,
        bind_address: options.bind_address.map(SocketName::Inet),
        timeout: options.timeout,
        no_delay: options.no_delay,
        keep_alive: options.keep_alive,
        accepts_descriptors: true,
    }
}

fn adopt_stream<T: DescriptorTransport>(
    reactor: &mut Reactor,
    fd: OwnedFd,
    names: Names,
    protocol: impl Protocol<T>,
    unsent: Unsent,
) -> Result<TransportHandle, AdoptError> {
    use crate::socket::private::Sealed;
    let socket = T::socket(fd, names);
    let prepare = |transport: &mut T| restore_unsent(transport, unsent);
    establish_with(reactor, socket, protocol, Source::Adopted, prepare).map_err(
        |(error, mut socket, _)| AdoptError {
            kind: AdoptErrorKind::Os(error),
            fd: socket.detach().expect("it was just put there"),
        },
    )
}

pub(crate) fn restore_unsent<T: StreamTransport>(transport: &mut T, unsent: Unsent) {
    transport.restore_unsent_descriptors(unsent.descriptors);
    transport.core_mut().buffer_bytes(&unsent.bytes);
}

fn reattach<T: StreamTransport, P: Protocol<T>>(
    reactor: &mut Reactor,
    detached: Detached<P>,
) -> Result<TransportHandle, ReattachError<P>> {
    use crate::socket::private::Sealed;
    let Detached {
        fd,
        protocol,
        unsent,
        unread,
        descriptors,
        producer,
        host,
        peer,
        mut kept,
    } = detached;
    let failed = |kind, fd, protocol, unsent: Unsent, unread, producer, kept| ReattachError {
        kind,
        detached: Box::new(Detached {
            fd,
            protocol,
            unsent: unsent.bytes,
            unread,
            descriptors: unsent.descriptors,
            producer,
            host: host.clone(),
            peer: peer.clone(),
            kept,
        }),
    };
    let unsent = Unsent {
        bytes: unsent,
        descriptors,
    };
    if let Err(kind) = unsent.check() {
        return Err(failed(kind, fd, protocol, unsent, unread, producer, kept));
    }
    let socket = match T::socket_again(fd, &host, &peer) {
        Ok(socket) => socket,
        Err(fd) => {
            let kind = AdoptErrorKind::WrongFamily;
            return Err(failed(kind, fd, protocol, unsent, unread, producer, kept));
        }
    };
    // Handed over only when nothing can fail any more.
    let mut parts = Some((unsent, unread, producer));
    let prepare = |transport: &mut T| {
        let (unsent, unread, producer) = parts.take().expect("prepared once");
        transport.core_mut().restore(&mut kept);
        if let Some(settings) = kept.settings.take() {
            transport.restore_settings(settings);
        }
        restore_unsent(transport, unsent);
        transport.core_mut().push_back(unread);
        if let Some((producer, kind)) = producer {
            transport
                .core_mut()
                .restore_producer(producer, kind, kept.producer_is_paused);
        }
    };
    match establish_with(reactor, socket, protocol, Source::Adopted, prepare) {
        Ok(handle) => Ok(handle),
        Err((error, mut socket, protocol)) => {
            let fd = socket.detach().expect("it was just put there");
            let (unsent, unread, producer) = parts.take().expect("nothing was prepared");
            let kind = AdoptErrorKind::Os(error);
            Err(failed(kind, fd, protocol, unsent, unread, producer, kept))
        }
    }
}

fn unix_handle(handle: TransportHandle) -> UnixTransportHandle {
    Handle::new(handle.token(), |facet| {
        facet
            .downcast_mut::<UnixStream>()
            .map(|transport| transport as &mut dyn UnixTransport)
    })
}

fn adopt_failed((error, fd): (io::Error, OwnedFd)) -> AdoptError {
    AdoptError {
        kind: AdoptErrorKind::Os(error),
        fd,
    }
}

fn watch_failed(address: Address, error: io::Error) -> ListenError {
    ListenError {
        address,
        step: ListenStep::Watch,
        error,
    }
}
