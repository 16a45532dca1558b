//! Outgoing connections.

mod race;

use std::any::Any;
use std::borrow::Cow;
use std::io;
use std::marker::PhantomData;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;

use bowline_protocol::{
    Address, BuildContext, CloseReason, ConnectError, Connector, ConnectorHandle, ConnectorState,
    Destination, Factory, LookupError, Origin,
};
use bowline_reactor::{
    DelayedCall, Descriptor, DrainRound, Handle, Interest, Next, Panic, Reactor, Readiness, Token,
};

use crate::connection::{DescriptorTransport, connect_protocol, unix_address};
use crate::connection::{HostName, Names, Source};
use crate::log;
use crate::options::{HostConnectOptions, LEAST_ATTEMPT_DELAY};
use crate::resolver::{self, Lookup};
use crate::sys::{self, Connecting, Family, SocketName};

use self::race::Race;

/// The first and the longest wait for room in the queue of a UNIX listener:
/// no event says that there is some.
const FIRST_RETRY: Duration = Duration::from_millis(2);
const LONGEST_RETRY: Duration = Duration::from_millis(100);

/// How many addresses in a row may fail at once before others have their turn:
/// whoever answers for a name can name thousands.
const DIALS_PER_TURN: usize = 16;

/// Tells a connector that its connection has ended.
pub(crate) struct ConnectionEnded {
    pub(crate) reason: CloseReason,
}

/// Tells a connector what the resolver answered.
struct LookedUp {
    /// The attempt that asked.
    attempt: u64,
    result: Option<Result<Vec<SocketAddr>, LookupError>>,
}

/// How each attempt is made.
#[derive(Clone, Debug)]
pub(crate) struct Attempt {
    pub(crate) target: Target,
    pub(crate) bind_address: Option<SocketName>,
    pub(crate) timeout: Option<Duration>,
    pub(crate) no_delay: bool,
    pub(crate) keep_alive: bool,
    pub(crate) accepts_descriptors: bool,
}

/// Where an attempt leads.
#[derive(Clone, Debug)]
pub(crate) enum Target {
    Address(SocketName),
    Host {
        name: Rc<str>,
        port: u16,
        /// How long each address is tried alone; none is until it fails.
        attempt_delay: Option<Duration>,
    },
}

pub(crate) struct OutgoingConnection<T, F> {
    control: Control,
    attempt: Attempt,
    factory: F,
    /// The sockets that connect, all of them watched, the oldest first; there
    /// while an attempt runs.
    dialed: Vec<Dialed>,
    /// The addresses of a host: those that were not tried yet, and those that
    /// failed.
    race: Race,
    lookup: Option<Lookup>,
    /// How many attempts there were.
    attempts: u64,
    timeout: Option<DelayedCall>,
    /// When the next address is tried beside the present ones.
    next_dial: Option<DelayedCall>,
    /// When the next attempt begins; there while the connector waits.
    wait: Option<DelayedCall>,
    retry: Option<DelayedCall>,
    retry_after: Duration,
    /// Whether the factory was told of an attempt, and not yet that nothing
    /// more comes.
    is_started: bool,
    transport: PhantomData<fn() -> T>,
}

/// A socket that connects.
struct Dialed {
    fd: OwnedFd,
    name: SocketName,
}

/// What became of connecting a socket.
enum Dial {
    Connected(OwnedFd, HostName),
    InProgress,
    BacklogFull,
}

/// The part of a connector that handles give access to.
pub(crate) struct Control {
    token: Token,
    destination: Destination,
    state: ConnectorState,
    /// After what delay to connect, as was asked and not yet done.
    next_attempt: Option<Duration>,
    wants_to_stop: bool,
    /// To give up is the last that was asked.
    was_told_to_stop: bool,
    /// The reactor stops, and no further attempt begins.
    is_last: bool,
}

impl Connector for Control {
    fn destination(&self) -> Destination {
        self.destination.clone()
    }

    fn state(&self) -> ConnectorState {
        self.state
    }

    fn connect(&mut self) {
        self.connect_after(Duration::ZERO);
    }

    fn connect_after(&mut self, delay: Duration) {
        let is_without_attempt = matches!(
            self.state,
            ConnectorState::Disconnected | ConnectorState::Waiting
        );
        if is_without_attempt && !self.is_last {
            self.next_attempt = Some(delay);
            self.wants_to_stop = false;
            self.was_told_to_stop = false;
        }
    }

    fn stop_connecting(&mut self) {
        self.next_attempt = None;
        if self.state != ConnectorState::Connected {
            self.was_told_to_stop = true;
        }
        if matches!(
            self.state,
            ConnectorState::Connecting | ConnectorState::Waiting
        ) {
            self.wants_to_stop = true;
        }
    }

    fn was_told_to_stop(&self) -> bool {
        self.was_told_to_stop
    }

    fn handle(&self) -> ConnectorHandle {
        Handle::new(self.token, |facet| {
            facet.downcast_mut::<Self>().map(|control| control as _)
        })
    }
}

impl<T: DescriptorTransport, F: Factory<T>> OutgoingConnection<T, F> {
    fn work(&mut self, reactor: &mut Reactor) -> Next {
        if self.control.wants_to_stop {
            self.control.wants_to_stop = false;
            match self.control.state {
                ConnectorState::Connecting => self.fail(reactor, &ConnectError::Cancelled),
                ConnectorState::Waiting => {
                    self.end_wait(reactor);
                    self.stopped_unless_connecting(reactor);
                }
                ConnectorState::Disconnected | ConnectorState::Connected => {}
            }
        } else if self.control.next_attempt == Some(Duration::ZERO) && self.is_without_attempt() {
            self.end_wait(reactor);
            self.control.next_attempt = None;
            self.begin(reactor);
        }
        self.after(reactor)
    }

    fn is_without_attempt(&self) -> bool {
        matches!(
            self.control.state,
            ConnectorState::Disconnected | ConnectorState::Waiting
        )
    }

    /// What becomes of the connector: another attempt comes in the next turn,
    /// so that one that fails at once does not keep the loop.
    fn after(&mut self, reactor: &mut Reactor) -> Next {
        if self.control.wants_to_stop {
            return Next::Again;
        }
        if self.is_without_attempt()
            && let Some(delay) = self.control.next_attempt
        {
            if delay.is_zero() {
                return Next::Again;
            }
            self.end_wait(reactor);
            self.control.next_attempt = None;
            self.control.state = ConnectorState::Waiting;
            self.wait = Some(reactor.notify_later(delay, self.control.token));
        }
        match self.control.state {
            ConnectorState::Disconnected => {
                if self.is_started {
                    // Another attempt was asked for, and then taken back.
                    self.stopped_unless_connecting(reactor);
                }
                Next::Remove
            }
            ConnectorState::Waiting | ConnectorState::Connecting | ConnectorState::Connected => {
                Next::Keep
            }
        }
    }

    fn end_wait(&mut self, reactor: &mut Reactor) {
        if let Some(wait) = self.wait.take() {
            // It may be what ran.
            let _ = wait.cancel(reactor);
            self.control.state = ConnectorState::Disconnected;
        }
    }

    fn begin(&mut self, reactor: &mut Reactor) {
        self.control.state = ConnectorState::Connecting;
        log::debug!(
            target: log::TRANSPORT,
            "{}: connecting to {}",
            self.control.token,
            self.control.destination,
        );
        self.attempts += 1;
        self.retry_after = FIRST_RETRY;
        if let Some(timeout) = self.attempt.timeout {
            self.timeout = Some(reactor.notify_later(timeout, self.control.token));
        }
        self.tell_started(reactor);
        if !self.control.wants_to_stop {
            match &self.attempt.target {
                Target::Address(_) => self.dial_only_address(reactor),
                Target::Host { .. } => self.look_up(reactor),
            }
        }
    }

    fn tell_started(&mut self, reactor: &mut Reactor) {
        if !self.is_started {
            self.is_started = true;
            log::debug!(
                target: log::TRANSPORT,
                "{}: starting factory {}",
                self.control.token,
                log::name(|| self.factory.log_prefix()),
            );
        }
        self.factory.started(&mut BuildContext {
            origin: Origin::Connector(&mut self.control),
            reactor,
        });
    }

    fn dial_only_address(&mut self, reactor: &mut Reactor) {
        let Target::Address(name) = &self.attempt.target else {
            return;
        };
        let name = name.clone();
        match self.dial(reactor, &name) {
            Ok(Dial::Connected(fd, host)) => self.connected(reactor, fd, host, name),
            Ok(Dial::InProgress) => {}
            Ok(Dial::BacklogFull) => {
                self.retry = Some(reactor.notify_later(self.retry_after, self.control.token));
                self.retry_after = (self.retry_after * 2).min(LONGEST_RETRY);
            }
            Err(error) => self.fail(reactor, &error),
        }
    }

    fn look_up(&mut self, reactor: &mut Reactor) {
        let Target::Host { name, port, .. } = &self.attempt.target else {
            return;
        };
        let token = self.control.token;
        let attempt = self.attempts;
        // The time limit of the attempt is the limit for this too.
        let lookup = resolver::look_up(reactor, name, *port, None, move |reactor, result| {
            reactor.enter(token, move |descriptor, reactor| {
                let result = Some(result);
                let mut looked_up = LookedUp { attempt, result };
                descriptor.map_or(Next::Keep, |it| it.request(reactor, &mut looked_up))
            });
        });
        self.lookup = Some(lookup);
    }

    fn looked_up(&mut self, reactor: &mut Reactor, result: Result<Vec<SocketAddr>, LookupError>) {
        let addresses = match result {
            Ok(addresses) => addresses,
            Err(error) => return self.fail(reactor, &ConnectError::Lookup(error)),
        };
        let bound = match self.attempt.bind_address {
            Some(SocketName::Inet(address)) => Some(address),
            _ => None,
        };
        let fits = |address: &SocketAddr| bound.is_none_or(|it| it.is_ipv4() == address.is_ipv4());
        self.race = Race::new(addresses.into_iter().filter(fits));
        if self.race.has_next() {
            self.dial_next(reactor);
        } else {
            self.fail(reactor, &ConnectError::Lookup(LookupError::NoAddress));
        }
    }

    /// Tries the next address of the host, beside those that are being tried.
    fn dial_next(&mut self, reactor: &mut Reactor) {
        if let Some(call) = self.next_dial.take() {
            // It may be what ran.
            let _ = call.cancel(reactor);
        }
        let Target::Host { attempt_delay, .. } = self.attempt.target else {
            return;
        };
        for _ in 0..DIALS_PER_TURN {
            let Some(address) = self.race.next() else {
                if self.dialed.is_empty() {
                    let failed = std::mem::take(&mut self.race).into_failed();
                    self.fail(reactor, &ConnectError::AllFailed(failed));
                }
                return;
            };
            let name = SocketName::Inet(address);
            match self.dial(reactor, &name) {
                Ok(Dial::Connected(fd, host)) => {
                    return self.connected(reactor, fd, host, name);
                }
                Ok(Dial::InProgress | Dial::BacklogFull) => {
                    if self.race.has_next() {
                        self.next_dial = attempt_delay
                            .map(|delay| reactor.notify_later(delay, self.control.token));
                    }
                    return;
                }
                Err(error) => self.address_failed(address, error),
            }
        }
        self.next_dial = Some(reactor.notify_later(Duration::ZERO, self.control.token));
    }

    fn address_failed(&mut self, address: SocketAddr, error: ConnectError) {
        log::debug!(
            target: log::TRANSPORT,
            "{}: {} at {address}: {error}",
            self.control.token,
            self.control.destination,
        );
        self.race.failed(address, error);
    }

    /// Begins to connect a new socket.
    fn dial(&mut self, reactor: &mut Reactor, name: &SocketName) -> Result<Dial, ConnectError> {
        let family = match name {
            SocketName::Inet(address) if address.is_ipv4() => Family::Inet4,
            SocketName::Inet(_) => Family::Inet6,
            _ => Family::Unix,
        };
        let fd = sys::stream_socket(family).map_err(ConnectError::Os)?;
        if self.attempt.no_delay {
            sys::set_no_delay(fd.as_fd(), true).map_err(ConnectError::Os)?;
        }
        if self.attempt.keep_alive {
            sys::set_keep_alive(fd.as_fd(), true).map_err(ConnectError::Os)?;
        }
        if !self.attempt.accepts_descriptors {
            sys::set_pass_rights(fd.as_fd(), false).map_err(ConnectError::Os)?;
        }
        if let Some(name) = &self.attempt.bind_address {
            sys::bind(fd.as_fd(), name).map_err(ConnectError::Bind)?;
        }
        match sys::connect(fd.as_fd(), name).map_err(ConnectError::from_os)? {
            Connecting::Done => {
                let (fd, host) = unless_to_itself(fd, name)?;
                Ok(Dial::Connected(fd, host))
            }
            Connecting::InProgress => {
                reactor
                    .watch(self.control.token, fd.as_fd(), Interest::Writable)
                    .map_err(ConnectError::Os)?;
                let name = name.clone();
                self.dialed.push(Dialed { fd, name });
                Ok(Dial::InProgress)
            }
            Connecting::BacklogFull => Ok(Dial::BacklogFull),
        }
    }

    /// A socket reported something: whether it is connected, and which one it
    /// is, is known from the sockets, not from the event.
    fn check(&mut self, reactor: &mut Reactor) {
        let mut at = 0;
        let mut has_failed = false;
        while let Some(dialed) = self.dialed.get(at) {
            let Some(outcome) = outcome(dialed.fd.as_fd()) else {
                at += 1;
                continue;
            };
            let Dialed { fd, name } = self.dialed.remove(at);
            reactor.unwatch(fd.as_fd());
            // One that failed is closed here.
            let connected = outcome.and_then(|()| unless_to_itself(fd, &name));
            match (connected, name) {
                (Ok((fd, host)), name) => return self.connected(reactor, fd, host, name),
                (Err(error), SocketName::Inet(address)) if self.is_racing() => {
                    self.address_failed(address, error);
                    has_failed = true;
                }
                (Err(error), _) => return self.fail(reactor, &error),
            }
        }
        if has_failed {
            self.dial_next(reactor);
        }
    }

    fn is_racing(&self) -> bool {
        matches!(self.attempt.target, Target::Host { .. })
    }

    fn connected(&mut self, reactor: &mut Reactor, fd: OwnedFd, host: HostName, peer: SocketName) {
        self.end_attempt(reactor);
        self.control.state = ConnectorState::Connected;
        let address = match &peer {
            SocketName::Inet(address) => Address::Inet(*address),
            // A UNIX listener's name is what was asked for.
            other => Address::Unix(unix_address(other.clone())),
        };
        let protocol = self.factory.build_protocol(
            &mut BuildContext {
                origin: Origin::Connector(&mut self.control),
                reactor,
            },
            &address,
        );
        let Some(protocol) = protocol else {
            drop(fd);
            self.ended(reactor, &CloseReason::Done);
            return;
        };
        let names = Names {
            host,
            peer,
            refuses_descriptors: !self.attempt.accepts_descriptors,
        };
        let source = Source::Connected(self.control.token);
        if let Err(error) = connect_protocol::<T, F>(reactor, protocol, fd, names, source) {
            self.fail(reactor, &ConnectError::Os(error));
        }
    }

    /// Closes the sockets of the attempt, and ends its lookup and timers.
    fn end_attempt(&mut self, reactor: &mut Reactor) {
        let calls = [&mut self.timeout, &mut self.retry, &mut self.next_dial];
        for call in calls.into_iter().filter_map(Option::take) {
            // One of them may be what ran.
            let _ = call.cancel(reactor);
        }
        if let Some(lookup) = self.lookup.take() {
            lookup.cancel(reactor);
        }
        for Dialed { fd, .. } in self.dialed.drain(..) {
            reactor.unwatch(fd.as_fd());
        }
        self.race = Race::default();
    }

    fn fail(&mut self, reactor: &mut Reactor, error: &ConnectError) {
        self.end_attempt(reactor);
        self.control.state = ConnectorState::Disconnected;
        self.control.wants_to_stop = false;
        log::debug!(target: log::TRANSPORT, "{}: {}: {error}", self.control.token, self.control.destination);
        self.factory.connection_failed(
            &mut BuildContext {
                origin: Origin::Connector(&mut self.control),
                reactor,
            },
            error,
        );
        self.stopped_unless_connecting(reactor);
    }

    fn ended(&mut self, reactor: &mut Reactor, reason: &CloseReason) {
        self.control.state = ConnectorState::Disconnected;
        self.factory.connection_lost(
            &mut BuildContext {
                origin: Origin::Connector(&mut self.control),
                reactor,
            },
            reason,
        );
        self.stopped_unless_connecting(reactor);
    }

    fn stopped_unless_connecting(&mut self, reactor: &mut Reactor) {
        if self.control.next_attempt.is_none() {
            self.is_started = false;
            log::debug!(
                target: log::TRANSPORT,
                "{}: stopping factory {}",
                self.control.token,
                log::name(|| self.factory.log_prefix()),
            );
            self.factory.stopped(&mut BuildContext {
                origin: Origin::Connector(&mut self.control),
                reactor,
            });
            // Nothing more is called, so asking for more is in vain.
            self.control.next_attempt = None;
        }
    }
}

impl<T: DescriptorTransport, F: Factory<T>> Descriptor for OutgoingConnection<T, F> {
    fn ready(&mut self, reactor: &mut Reactor, readiness: Readiness) -> Next {
        if !readiness.is_empty() && !self.control.wants_to_stop {
            self.check(reactor);
        }
        self.work(reactor)
    }

    fn attend(&mut self, reactor: &mut Reactor) -> Next {
        self.work(reactor)
    }

    fn timer_fired(&mut self, reactor: &mut Reactor, call: DelayedCall) -> Next {
        if self.retry == Some(call) {
            self.retry = None;
            self.dial_only_address(reactor);
        } else if self.next_dial == Some(call) {
            self.dial_next(reactor);
        } else if self.timeout == Some(call) {
            self.timeout = None;
            self.fail(reactor, &ConnectError::TimedOut);
        } else if self.wait == Some(call) {
            self.end_wait(reactor);
            // What was asked meanwhile counts.
            self.control.next_attempt.get_or_insert_default();
        }
        self.work(reactor)
    }

    fn request(&mut self, reactor: &mut Reactor, request: &mut dyn Any) -> Next {
        if let Some(ended) = request.downcast_mut::<ConnectionEnded>()
            && self.control.state == ConnectorState::Connected
        {
            let reason = std::mem::replace(&mut ended.reason, CloseReason::Done);
            self.ended(reactor, &reason);
        } else if let Some(looked_up) = request.downcast_mut::<LookedUp>()
            && self.control.state == ConnectorState::Connecting
            && self.attempts == looked_up.attempt
            && !self.control.wants_to_stop
            && let Some(result) = looked_up.result.take()
        {
            self.looked_up(reactor, result);
        }
        self.work(reactor)
    }

    fn panicked(&mut self, reactor: &mut Reactor, panic: Panic) -> Next {
        self.end_attempt(reactor);
        if self.control.state == ConnectorState::Connected {
            // It was build_protocol: somebody waits to be told how it went.
            self.ended(reactor, &CloseReason::Panicked(panic));
            return self.after(reactor);
        }
        self.end_wait(reactor);
        self.control.state = ConnectorState::Disconnected;
        self.control.next_attempt = None;
        if self.is_started {
            self.stopped_unless_connecting(reactor);
        }
        Next::Remove
    }

    fn drain(&mut self, reactor: &mut Reactor, round: DrainRound) -> Next {
        if round < DrainRound::Support {
            // Connections that are served may need it.
            return Next::Keep;
        }
        self.control.is_last = true;
        if self.control.state == ConnectorState::Connected {
            // It ends with its connection.
            return Next::Keep;
        }
        self.shutdown(reactor);
        Next::Remove
    }

    fn shutdown(&mut self, reactor: &mut Reactor) {
        match self.control.state {
            ConnectorState::Connecting => self.fail(reactor, &ConnectError::ReactorStopped),
            ConnectorState::Connected => self.ended(reactor, &CloseReason::ReactorStopped),
            // The attempt that was to come did not begin, so it cannot fail.
            ConnectorState::Waiting => {
                self.end_wait(reactor);
                self.control.next_attempt = None;
                self.stopped_unless_connecting(reactor);
            }
            ConnectorState::Disconnected if self.is_started => {
                self.control.next_attempt = None;
                self.stopped_unless_connecting(reactor);
            }
            // The very first: whoever asked for it is told.
            ConnectorState::Disconnected if self.control.next_attempt.take().is_some() => {
                self.tell_started(reactor);
                self.fail(reactor, &ConnectError::ReactorStopped);
            }
            ConnectorState::Disconnected => {}
        }
        // Asked for by the last callback, and in vain.
        if self.control.next_attempt.take().is_some() {
            self.stopped_unless_connecting(reactor);
        }
    }

    /// One of them. The sockets of an attempt are closed, each deregistered
    /// before, when it ends; this is for a reactor that is dropped.
    fn source(&self) -> Option<BorrowedFd<'_>> {
        self.dialed.first().map(|dialed| dialed.fd.as_fd())
    }

    fn facet(&mut self) -> &mut dyn Any {
        &mut self.control
    }

    fn log_prefix(&self) -> Cow<'_, str> {
        Cow::Owned(format!("connector,{}", self.control.destination))
    }
}

/// Whether a socket has come to be connected, or why not; `None` for neither,
/// after a spurious event.
fn outcome(socket: BorrowedFd<'_>) -> Option<Result<(), ConnectError>> {
    match sys::take_error(socket) {
        Ok(None) => match sys::peer_name(socket) {
            Ok(_) => Some(Ok(())),
            Err(error) if error.kind() == io::ErrorKind::NotConnected => None,
            Err(error) => Some(Err(ConnectError::Os(error))),
        },
        Ok(Some(error)) | Err(error) => Some(Err(ConnectError::from_os(error))),
    }
}

/// A connected socket, with the name of our end where that had to be asked for; an
/// error if its peer is the socket itself.
///
/// TCP makes a connection of one socket that sends to its own port (simultaneous
/// open), and the kernel may choose that port for who connects where nobody listens.
fn unless_to_itself(
    socket: OwnedFd,
    peer: &SocketName,
) -> Result<(OwnedFd, HostName), ConnectError> {
    let SocketName::Inet(peer) = peer else {
        return Ok((socket, HostName::Unknown));
    };
    let Ok(SocketName::Inet(host)) = sys::local_name(socket.as_fd()) else {
        return Ok((socket, HostName::Unknown));
    };
    if (host.ip(), host.port()) != (peer.ip(), peer.port()) {
        return Ok((socket, HostName::Inet(host)));
    }
    // A close in order would keep the port from its server for a minute. This one is a
    // reset; it can fail only for what is no socket.
    let _ = sys::set_linger(socket.as_fd(), Some(Duration::ZERO));
    Err(ConnectError::Refused(io::Error::new(
        io::ErrorKind::ConnectionRefused,
        "nobody listens there: the socket was connected to itself",
    )))
}

impl Target {
    pub(crate) fn host(name: &str, port: u16, options: &HostConnectOptions) -> Self {
        let is_bound_to_port = options.tcp.bind_address.is_some_and(|it| it.port() != 0);
        Self::Host {
            name: name.into(),
            port,
            attempt_delay: (!is_bound_to_port)
                .then(|| options.attempt_delay.max(LEAST_ATTEMPT_DELAY)),
        }
    }
}

/// Has the reactor connect. Nothing is called before the running callback has
/// returned.
pub(crate) fn install<T, F>(
    reactor: &mut Reactor,
    attempt: Attempt,
    factory: F,
) -> io::Result<ConnectorHandle>
where
    T: DescriptorTransport,
    F: Factory<T>,
{
    let vacancy = reactor.vacancy()?;
    let token = vacancy.token();
    let destination = match &attempt.target {
        Target::Address(SocketName::Inet(address)) => (*address).into(),
        Target::Address(other) => unix_address(other.clone()).into(),
        Target::Host { name, port, .. } => Destination::Host {
            name: Rc::clone(name),
            port: *port,
        },
    };
    let control = Control {
        token,
        destination,
        state: ConnectorState::Disconnected,
        next_attempt: Some(Duration::ZERO),
        wants_to_stop: false,
        was_told_to_stop: false,
        is_last: false,
    };
    let handle = control.handle();
    vacancy.install(Box::new(OutgoingConnection::<T, F> {
        control,
        attempt,
        factory,
        dialed: Vec::new(),
        race: Race::default(),
        lookup: None,
        attempts: 0,
        timeout: None,
        next_dial: None,
        wait: None,
        retry: None,
        retry_after: FIRST_RETRY,
        is_started: false,
        transport: PhantomData,
    }));
    reactor.notify(token);
    Ok(handle)
}
