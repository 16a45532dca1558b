//! The methods that the transports add to the reactor.

use std::any::{Any, TypeId};
use std::cell::RefCell;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Duration;

use bowline_protocol::{
    Acceptor, ConnectorHandle, Context, Factory, ListenerHandle, LookupError, ProcessContext,
    ProcessHandle, ProcessProtocol, Protocol, TransportHandle, UnixAddress, UnixTransportHandle,
};
use bowline_reactor::{Next, Reactor, Token};

use crate::child::{self, ChildCommand, RunningChild, SpawnError};
use crate::detach::{DetachListenerRequest, DetachRequest, Detached, ProtocolCall, ReattachError};
use crate::endpoint::{AdoptWith, ConnectWith, Listen, ListenWith, On, TransportFor};
use crate::error::{AdoptError, AdoptErrorKind, CallError, DetachError, ListenError};
use crate::establish::Establish;
use crate::kinds::{Tcp, TcpListen, TcpStream, Unix, UnixStream};
use crate::listener::{self, HandOver};
use crate::log;
use crate::resolver::{self, LOOKUP_TIMEOUT, Lookup, Resolver};
use crate::shared::{DescriptorCounts, Shared, TransportBudgets};

/// Adds listening, connecting, adopting, detaching, and child processes to [`Reactor`].
///
/// None of these methods calls user code before it returns.
///
/// # Examples
///
/// An echo server:
///
/// ```
/// use bowline::{Address, Context, Protocol, Reactor, Transport, Transports};
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
    /// Listens and serves each connection with a protocol of a factory, or receives
    /// datagrams for one protocol.
    ///
    /// The endpoint says where and how. [`Tcp::at`], [`Unix::at`] and
    /// [`UnixSeqpacket::at`](crate::UnixSeqpacket::at) take a [`Factory`], whose
    /// protocols are those of the connections. [`Udp::at`](crate::Udp::at)
    /// and [`UnixDatagram::at`](crate::UnixDatagram::at) take a
    /// [`DatagramProtocol`](bowline_protocol::DatagramProtocol). An endpoint may also
    /// be one of your own.
    ///
    /// # Errors
    ///
    /// Those of the endpoint. An endpoint that binds fails with [`ListenError`], which
    /// names the step that failed. An endpoint that goes on with a socket that [listens
    /// already](crate::endpoint::ListenAt::on) fails with [`AdoptError`], which gives
    /// the descriptor back.
    fn listen<E: ListenWith<F>, F>(&mut self, endpoint: E, with: F) -> Result<E::Handle, E::Error>;

    /// Listens and gives every accepted socket to `acceptor`, without a transport on
    /// it. This is for programs that pass connections on.
    ///
    /// # Errors
    ///
    /// As [`listen`](Self::listen).
    ///
    /// # Examples
    ///
    /// Every connection goes to another process, through the UNIX connection `worker`.
    /// Bytes that the client has sent stay unread in the kernel. Each connection has a
    /// message of its own, since two that are queued for the next bytes could share one
    /// message.
    ///
    /// ```
    /// # use std::os::fd::OwnedFd;
    /// # use bowline::{Address, BuildContext, UnixTransportHandle};
    /// # use bowline::Reactor;
    /// # use bowline::error::ListenError;
    /// # use bowline::{Tcp, Transports};
    /// fn pass_on(reactor: &mut Reactor, worker: UnixTransportHandle) -> Result<(), ListenError> {
    ///     let acceptor = move |cx: &mut BuildContext<'_>, socket: OwnedFd, _: &Address| {
    ///         if let Some(worker) = cx.reactor.get(worker) {
    ///             // A socket that cannot be sent comes back in the error, and is closed.
    ///             let _ = worker.write_with_descriptors(b"c", vec![socket.into()]);
    ///         }
    ///     };
    ///     reactor.accept(Tcp::at(([127, 0, 0, 1], 0).into()), acceptor)?;
    ///     Ok(())
    /// }
    /// ```
    fn accept<E: Listen>(
        &mut self,
        endpoint: E,
        acceptor: impl Acceptor,
    ) -> Result<ListenerHandle, E::Error>;

    /// Connects and puts a protocol of a factory on the connection, or makes a datagram
    /// socket that has one peer, for one protocol.
    ///
    /// The endpoint says where and how. [`Tcp::to`], [`Tcp::to_host`], [`Unix::to`] and
    /// [`UnixSeqpacket::to`](crate::UnixSeqpacket::to) take a [`Factory`]. It is told of
    /// success and of failure. [`Udp::to`](crate::Udp::to) and
    /// [`UnixDatagram::to`](crate::UnixDatagram::to) take a
    /// [`DatagramProtocol`](bowline_protocol::DatagramProtocol). A datagram socket is
    /// connected at once, whether or not its peer is there.
    ///
    /// # Errors
    ///
    /// With a factory, an error means that the reactor is full (2^24 descriptors). With
    /// a datagram protocol it is a [`ListenError`], which names the step that failed.
    fn connect<C: ConnectWith<F>, F>(
        &mut self,
        endpoint: C,
        with: F,
    ) -> Result<C::Handle, C::Error>;

    /// Puts a protocol on a socket that came from somewhere else. `kind` says what the
    /// socket is: a connected one ([`Tcp`], [`Unix`],
    /// [`UnixSeqpacket`](crate::UnixSeqpacket)), or one for datagrams
    /// ([`Udp`](crate::Udp), [`UnixDatagram`](crate::UnixDatagram)). (Twisted:
    /// `adoptStreamConnection`, `adoptDatagramPort`.)
    ///
    /// # Errors
    ///
    /// [`AdoptError`] gives the descriptor back. The protocol is dropped.
    fn adopt<K: AdoptWith<S, P>, S, P>(
        &mut self,
        kind: K,
        source: S,
        protocol: P,
    ) -> Result<K::Handle, AdoptError<S>>;

    /// Listens on TCP with the defaults of [`Tcp::at`]. With port 0 the kernel chooses
    /// a port. (Twisted: `reactor.listenTCP`.)
    ///
    /// # Errors
    ///
    /// [`ListenError`], which names the step that failed.
    fn listen_tcp(
        &mut self,
        address: SocketAddr,
        factory: impl Factory<Protocol: Protocol<TcpStream>>,
    ) -> Result<ListenerHandle, ListenError> {
        self.listen(Tcp::at(address), factory)
    }

    /// Listens on a UNIX socket with the defaults of [`Unix::at`]. The address is a
    /// path, or a name in the abstract namespace. (Twisted: `reactor.listenUNIX`.)
    ///
    /// # Errors
    ///
    /// [`ListenError`], which names the step that failed.
    fn listen_unix(
        &mut self,
        address: impl Into<UnixAddress>,
        factory: impl Factory<Protocol: Protocol<UnixStream>>,
    ) -> Result<ListenerHandle, ListenError> {
        self.listen(Unix::at(address), factory)
    }

    /// Connects over TCP with the defaults of [`Tcp::to`]. (Twisted:
    /// `reactor.connectTCP`.)
    ///
    /// # Errors
    ///
    /// As [`connect`](Self::connect).
    fn connect_tcp(
        &mut self,
        address: SocketAddr,
        factory: impl Factory<Protocol: Protocol<TcpStream>>,
    ) -> io::Result<ConnectorHandle> {
        self.connect(Tcp::to(address), factory)
    }

    /// Connects over TCP to a host by its name. See [`Tcp::to_host`]. (Twisted:
    /// `HostnameEndpoint`.)
    ///
    /// # Errors
    ///
    /// As [`connect`](Self::connect). The factory is told if the name is wrong or is
    /// not found.
    fn connect_host(
        &mut self,
        host: &str,
        port: u16,
        factory: impl Factory<Protocol: Protocol<TcpStream>>,
    ) -> io::Result<ConnectorHandle> {
        self.connect(Tcp::to_host(host, port), factory)
    }

    /// Connects to a UNIX socket with the defaults of [`Unix::to`]. (Twisted:
    /// `reactor.connectUNIX`.)
    ///
    /// # Errors
    ///
    /// As [`connect`](Self::connect).
    fn connect_unix(
        &mut self,
        address: impl Into<UnixAddress>,
        factory: impl Factory<Protocol: Protocol<UnixStream>>,
    ) -> io::Result<ConnectorHandle> {
        self.connect(Unix::to(address), factory)
    }

    /// Puts a protocol on a connected TCP socket.
    ///
    /// # Errors
    ///
    /// As [`adopt`](Self::adopt).
    fn adopt_tcp_stream(
        &mut self,
        fd: OwnedFd,
        protocol: impl Protocol<TcpStream>,
    ) -> Result<TransportHandle, AdoptError> {
        self.adopt(Tcp, fd, protocol)
    }

    /// Puts a protocol on a connected UNIX socket, such as one end of a socketpair.
    ///
    /// # Errors
    ///
    /// As [`adopt`](Self::adopt).
    fn adopt_unix_stream(
        &mut self,
        fd: OwnedFd,
        protocol: impl Protocol<UnixStream>,
    ) -> Result<UnixTransportHandle, AdoptError> {
        self.adopt(Unix, fd, protocol)
    }

    /// Accepts on a TCP or UNIX socket that listens already, and gives every accepted
    /// socket to `acceptor`. See [`accept`](Self::accept).
    ///
    /// # Errors
    ///
    /// [`AdoptError`] gives the descriptor back.
    fn accept_adopted(
        &mut self,
        fd: OwnedFd,
        acceptor: impl Acceptor,
    ) -> Result<ListenerHandle, AdoptError>;

    /// Finds the addresses of a host and gives them to `done`. The loop calls `done`
    /// once, within 60 seconds. (Twisted: `reactor.resolve`,
    /// `nameResolver.resolveHostName`.)
    ///
    /// The addresses come in the order in which they are best tried, each with `port`.
    /// If `host` is an IP address in writing, that address is the answer, in this turn.
    /// The empty name is refused. In Twisted it means every address of this machine.
    fn resolve(
        &mut self,
        host: &str,
        port: u16,
        done: impl FnOnce(&mut Reactor, Result<Vec<SocketAddr>, LookupError>) + 'static,
    ) -> Lookup;

    /// As [`resolve`](Self::resolve), within `timeout`. `None` sets no limit.
    fn resolve_within(
        &mut self,
        timeout: Option<Duration>,
        host: &str,
        port: u16,
        done: impl FnOnce(&mut Reactor, Result<Vec<SocketAddr>, LookupError>) + 'static,
    ) -> Lookup;

    /// Has `resolver` find the addresses of hosts from now on, instead of the
    /// [`SystemResolver`](crate::SystemResolver).
    fn set_resolver(&mut self, resolver: impl Resolver);

    /// Puts a [detached](Self::detach) connection together again, with its unsent bytes
    /// and descriptors, producer, limits and pauses. `T` is the type of its transport.
    ///
    /// The protocol sees the connection go on. Only the handle of its transport is new,
    /// and the protocol is [told](bowline_protocol::Protocol::connection_reattached) of
    /// that.
    ///
    /// # Errors
    ///
    /// [`ReattachError`] gives everything back.
    fn reattach<T: TransportFor<P>, P>(
        &mut self,
        detached: Detached<P>,
    ) -> Result<T::Handle, ReattachError<P>>;

    /// Takes a connection apart, and gives `then` its socket and everything that is
    /// unsent. Nothing is lost.
    ///
    /// This happens after the running callback, in this turn, and before anything else
    /// happens to the connection. Neither the protocol nor a producer is told of an
    /// end. A connector is told that its connection has ended with
    /// [`Done`](bowline_protocol::CloseReason::Done), since it may connect again.
    ///
    /// `P` is the type of the protocol, or of a part of it. Policies around that part
    /// are dropped, however many there are.
    fn detach<P: 'static>(
        &mut self,
        handle: impl Into<Token>,
        then: impl FnOnce(&mut Reactor, Result<Detached<P>, DetachError>) + 'static,
    );

    /// [Detaches](Self::detach) several connections, and gives `then` all of them in
    /// one call.
    ///
    /// Each comes with the type (`TypeId::of::<P>()`) of the part of its protocol that
    /// is wanted. The results are in the same order: the detached connection, or the
    /// reason why it was not detached. [`Detached::downcast`] makes the part `P` again.
    fn detach_all(
        &mut self,
        parts: impl IntoIterator<Item = (impl Into<Token>, TypeId)>,
        then: impl FnOnce(&mut Reactor, Vec<Result<Detached<Box<dyn Any>>, DetachError>>) + 'static,
    );

    /// Stops a listener without closing it, and gives `then` its socket. Connections go
    /// on to queue up in it. Its socket file stays.
    fn detach_listener(
        &mut self,
        handle: ListenerHandle,
        then: impl FnOnce(&mut Reactor, Result<OwnedFd, DetachError>) + 'static,
    );

    /// Calls `call` with the protocol of a connection or of a datagram socket, and its
    /// context. With this, a timer or another connection reaches the protocol, and not
    /// only its transport. The call is made after the running callback, in this turn.
    ///
    /// `T` is the type of the transport. `P` is the type of the protocol, or of a part
    /// of it, such as a protocol inside a policy or a framing. If the connection is
    /// lost by then, or is not of these types, `call` is dropped, and a line is logged
    /// at `warn`.
    fn call_protocol<T: 'static, P: 'static>(
        &mut self,
        handle: impl Into<Token>,
        call: impl FnOnce(&mut P, &mut Context<'_, T>) + 'static,
    ) {
        let token = handle.into();
        self.call_protocol_or(token, call, move |_, error| {
            log::warn!(target: log::TRANSPORT, "{token}: its protocol was not called: {error}");
        });
    }

    /// As [`call_protocol`](Self::call_protocol). If `call` cannot be made, `otherwise`
    /// is called instead, in this turn too.
    fn call_protocol_or<T: 'static, P: 'static>(
        &mut self,
        handle: impl Into<Token>,
        call: impl FnOnce(&mut P, &mut Context<'_, T>) + 'static,
        otherwise: impl FnOnce(&mut Reactor, CallError) + 'static,
    );

    /// Starts a child process. `protocol` receives the output of the child, and is told
    /// of its exit and its end. [`ChildCommand`] says which program the child runs, and
    /// what each of its descriptor numbers is. (Twisted: `reactor.spawnProcess`.)
    ///
    /// The child runs its program when this returns.
    ///
    /// # Errors
    ///
    /// [`SpawnError`] names the step that failed, including steps in the child up to
    /// execve(2). The protocols are dropped. No callback is called, with one exception:
    /// a failure at [`Watch`](crate::SpawnStep::Watch) may end streams that had begun.
    fn spawn_process(
        &mut self,
        command: ChildCommand<'_>,
        protocol: impl ProcessProtocol,
    ) -> Result<ProcessHandle, SpawnError>;

    /// Puts a protocol on a process that runs already. See [`RunningChild`].
    ///
    /// # Errors
    ///
    /// [`SpawnError`], at the step [`Watch`](crate::SpawnStep::Watch). The process is
    /// killed.
    fn adopt_process(
        &mut self,
        running: RunningChild,
        protocol: impl ProcessProtocol,
    ) -> Result<ProcessHandle, SpawnError>;

    /// Calls `call` with the protocol of a process and its context. With this, a timer
    /// or a connection reaches the protocol, and not only its process. `P` is the type
    /// of the protocol.
    ///
    /// The call is made after the running callback, in this turn. If the process has
    /// ended by then, or has a protocol of another type, `otherwise` is called instead.
    fn call_process_protocol<P: 'static>(
        &mut self,
        process: ProcessHandle,
        call: impl FnOnce(&mut P, &mut ProcessContext<'_>) + 'static,
        otherwise: impl FnOnce(&mut Reactor, CallError) + 'static,
    );

    /// Does something that an operator asks for to the descriptor `token`: a connection or
    /// a listener of any kind. `then` is called after the running callback, in this turn,
    /// and says whether it was done. (Feature `inspect`.)
    #[cfg(feature = "inspect")]
    fn operate(
        &mut self,
        token: Token,
        operation: crate::Operation,
        then: impl FnOnce(&mut Reactor, Result<(), crate::OperateError>) + 'static,
    );

    /// Counts what connections of each kind did in this reactor so far. (Feature
    /// `inspect`.)
    #[cfg(feature = "inspect")]
    fn kind_counts(&mut self) -> Vec<crate::KindCounts>;

    /// Has `tally` know what a connection does that was made just now, until its end. What
    /// a listener accepts has one already. Nothing happens if it has ended. (Feature
    /// `inspect`.)
    #[cfg(feature = "inspect")]
    fn tally(&mut self, connection: Token, tally: &crate::Tally);

    /// Counts what happened to descriptors in this reactor so far.
    fn descriptor_counts(&mut self) -> DescriptorCounts;

    /// How many descriptor numbers are kept free for the program itself.
    fn descriptor_reserve(&mut self) -> usize;

    /// Sets how many descriptor numbers peers leave free for the program itself, of
    /// those that this process may use (`RLIMIT_NOFILE`). The default is 16; 0 keeps
    /// none free.
    ///
    /// Where peers send descriptors, another 253 stay free for those that one read may
    /// bring. Together these are at most a third of all numbers. Listeners leave 64
    /// more free for descriptors that connected peers send. So a crowd of clients does
    /// not cost these peers their descriptors.
    ///
    /// Once only these numbers are free, listeners leave clients waiting, and look ten
    /// times a second whether there are more. Descriptors that a peer sends are then
    /// closed and [lost](bowline_protocol::CloseReason::DescriptorsTruncated), as if no
    /// number were left. So the program can always open a file, start a child, or write
    /// to its log.
    fn set_descriptor_reserve(&mut self, count: usize);

    /// How much one transport or listener may do in a turn.
    fn transport_budgets(&mut self) -> TransportBudgets;

    /// Sets how much one transport or listener may do in a turn, for all of this
    /// reactor.
    fn set_transport_budgets(&mut self, budgets: TransportBudgets);
}

impl Transports for Reactor {
    fn listen<E: ListenWith<F>, F>(&mut self, endpoint: E, with: F) -> Result<E::Handle, E::Error> {
        endpoint.listen_with(self, with)
    }

    fn accept<E: Listen>(
        &mut self,
        endpoint: E,
        acceptor: impl Acceptor,
    ) -> Result<ListenerHandle, E::Error> {
        let (socket, _) = endpoint.open()?;
        listener::install::<E>(self, socket, HandOver { acceptor })
    }

    fn connect<C: ConnectWith<F>, F>(
        &mut self,
        endpoint: C,
        with: F,
    ) -> Result<C::Handle, C::Error> {
        endpoint.connect_with(self, with)
    }

    fn adopt<K: AdoptWith<S, P>, S, P>(
        &mut self,
        kind: K,
        source: S,
        protocol: P,
    ) -> Result<K::Handle, AdoptError<S>> {
        kind.adopt_with(self, source, protocol)
    }

    fn accept_adopted(
        &mut self,
        fd: OwnedFd,
        acceptor: impl Acceptor,
    ) -> Result<ListenerHandle, AdoptError> {
        match Tcp::listening(fd).open() {
            Ok((socket, _)) => {
                listener::install::<On<TcpListen>>(self, socket, HandOver { acceptor })
            }
            Err(AdoptError {
                kind: AdoptErrorKind::WrongFamily,
                fd,
            }) => self.accept(Unix::listening(fd), acceptor),
            Err(error) => Err(error),
        }
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

    fn reattach<T: TransportFor<P>, P>(
        &mut self,
        detached: Detached<P>,
    ) -> Result<T::Handle, ReattachError<P>> {
        <T as Establish<P>>::reattach(self, detached).map(T::named)
    }

    fn detach<P: 'static>(
        &mut self,
        handle: impl Into<Token>,
        then: impl FnOnce(&mut Self, Result<Detached<P>, DetachError>) + 'static,
    ) {
        self.detach_all([(handle.into(), TypeId::of::<P>())], |reactor, mut all| {
            let result = all.pop().unwrap_or(Err(DetachError::Lost));
            let own = |detached: Detached<Box<dyn Any>>| {
                detached.downcast().expect("it was asked for by its type")
            };
            then(reactor, result.map(own));
        });
    }

    fn detach_all(
        &mut self,
        parts: impl IntoIterator<Item = (impl Into<Token>, TypeId)>,
        then: impl FnOnce(&mut Self, Vec<Result<Detached<Box<dyn Any>>, DetachError>>) + 'static,
    ) {
        let all: Rc<RefCell<Vec<_>>> = Rc::default();
        for (place, (handle, part)) in parts.into_iter().enumerate() {
            // A token that belongs to no connection does not answer.
            all.borrow_mut().push(Err(DetachError::Lost));
            let (token, all) = (handle.into(), Rc::clone(&all));
            let shared = Shared::of(self);
            shared.hold(token);
            self.enter(token, move |descriptor, reactor| {
                shared.release(token);
                let mut request = DetachRequest { part, result: None };
                let next = match descriptor {
                    Some(descriptor) => descriptor.request(reactor, &mut request),
                    None => Next::Keep,
                };
                if let Some(result) = request.result {
                    all.borrow_mut()[place] = result;
                }
                next
            });
        }
        // This comes after all of them, since deferred calls keep their order. It is a
        // call of its own, so that its panic does not end a connection.
        self.defer(move |reactor| {
            let all = std::mem::take(&mut *all.borrow_mut());
            then(reactor, all);
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

    fn call_protocol_or<T: 'static, P: 'static>(
        &mut self,
        handle: impl Into<Token>,
        call: impl FnOnce(&mut P, &mut Context<'_, T>) + 'static,
        otherwise: impl FnOnce(&mut Self, CallError) + 'static,
    ) {
        self.enter(handle.into(), move |descriptor, reactor| {
            let call = move |part: &mut dyn Any, cx: &mut Context<'_, T>| {
                call(
                    part.downcast_mut().expect("it was asked for by its type"),
                    cx,
                );
            };
            let mut request = ProtocolCall::<T> {
                part: TypeId::of::<P>(),
                call: Some(Box::new(call)),
                error: CallError::WrongTransport,
            };
            let next = match descriptor {
                Some(descriptor) => descriptor.request(reactor, &mut request),
                None => {
                    request.error = CallError::Lost;
                    Next::Keep
                }
            };
            if request.call.is_some() {
                // A call of its own, so that its panic does not end the connection.
                reactor.defer(move |reactor| otherwise(reactor, request.error));
            }
            next
        });
    }

    fn spawn_process(
        &mut self,
        command: ChildCommand<'_>,
        protocol: impl ProcessProtocol,
    ) -> Result<ProcessHandle, SpawnError> {
        child::spawn_process(self, command, protocol)
    }

    fn adopt_process(
        &mut self,
        running: RunningChild,
        protocol: impl ProcessProtocol,
    ) -> Result<ProcessHandle, SpawnError> {
        child::adopt_process(self, running, protocol)
    }

    fn call_process_protocol<P: 'static>(
        &mut self,
        process: ProcessHandle,
        call: impl FnOnce(&mut P, &mut ProcessContext<'_>) + 'static,
        otherwise: impl FnOnce(&mut Self, CallError) + 'static,
    ) {
        child::call_process_protocol(self, process, call, otherwise);
    }

    #[cfg(feature = "inspect")]
    fn operate(
        &mut self,
        token: Token,
        operation: crate::Operation,
        then: impl FnOnce(&mut Self, Result<(), crate::OperateError>) + 'static,
    ) {
        crate::operation::operate(self, token, operation, then);
    }

    #[cfg(feature = "inspect")]
    fn kind_counts(&mut self) -> Vec<crate::KindCounts> {
        Shared::of(self).kinds.all()
    }

    #[cfg(feature = "inspect")]
    fn tally(&mut self, connection: Token, tally: &crate::Tally) {
        if self.is_registered(connection) {
            Shared::of(self).kinds.came(connection, tally);
        }
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
