//! Outgoing connections.

mod race;

use std::any::Any;
use std::borrow::Cow;
use std::io;
use std::net::SocketAddr;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use bowline_protocol::{
    Address, BuildContext, CloseReason, ConnectError, Connector, ConnectorHandle, ConnectorState,
    Destination, Factory, LookupError, Origin, TransportHandle,
};
use bowline_reactor::{
    DelayedCall, Description, Descriptor, DrainRound, Handle, Interest, Next, Panic, Reactor,
    Readiness, Token,
};

use crate::endpoint::{Connect, ConnectTransport, ConnectionSocket, Dial, Side, Wrap};
use crate::establish::{Beginning, Establish, TransportFor};
use crate::file_descriptor::not_connected;
use crate::link::Link;
use crate::log;
use crate::resolver::{self, Lookup};

use self::race::Race;

/// The first and the longest wait for room in the accept queue of a UNIX listener. No
/// event reports room there.
const FIRST_RETRY: Duration = Duration::from_millis(2);
const LONGEST_RETRY: Duration = Duration::from_millis(100);

/// How many addresses in a row may fail at once before it is others' turn. Whoever
/// answers for a name can give thousands.
const DIALS_PER_TURN: usize = 16;

/// Tells a connector that its connection has ended.
pub(crate) struct ConnectionEnded(pub(crate) CloseReason);

/// Tells a connector what the resolver answered.
struct LookedUp {
    /// The attempt that asked.
    attempt: u64,
    result: Option<Result<Vec<SocketAddr>, LookupError>>,
}

struct OutgoingConnection<C: Connect, F> {
    control: ConnectorControl,
    endpoint: C,
    factory: F,
    /// The sockets that are connecting, the oldest first. All are watched. Empty unless
    /// an attempt runs.
    dialed: Vec<Dialed<C::Socket>>,
    /// The addresses of a host: those that are left to try, and those that failed.
    race: Race,
    lookup: Option<Lookup>,
    /// How many attempts there were.
    attempts: u64,
    timeout: Option<DelayedCall>,
    /// When the next address is tried beside those in progress.
    next_dial: Option<DelayedCall>,
    /// When the next attempt begins. `Some` while the connector waits.
    wait: Option<DelayedCall>,
    retry: Option<DelayedCall>,
    retry_after: Duration,
    /// Whether the factory was told that attempts begin, and not yet that none follows.
    is_started: bool,
}

/// A connection whose layers are not established yet.
struct Shaking {
    connection: TransportHandle,
    /// The reason why it was given up, if it was.
    error: Option<ConnectError>,
}

/// A socket that is connecting.
struct Dialed<S> {
    socket: S,
    address: Address,
}

/// The part of a connector that handles give access to.
pub(crate) struct ConnectorControl {
    token: Token,
    destination: Destination,
    state: ConnectorState,
    /// The delay of the next attempt, from the request until it is done.
    next_attempt: Option<Duration>,
    wants_to_stop: bool,
    /// Whether the last request was to give up.
    was_told_to_stop: bool,
    /// The reactor stops, so no further attempt begins.
    is_last: bool,
    /// The connection whose handshake is in progress.
    handshake: Option<Shaking>,
}

impl ConnectorControl {
    /// Called when the handshake is done. Returns whether the connection may be made.
    pub(crate) fn establish(&mut self) -> bool {
        let Some(shaking) = &mut self.handshake else {
            return true;
        };
        if std::mem::take(&mut self.wants_to_stop) {
            shaking.error.get_or_insert(ConnectError::Cancelled);
        }
        if shaking.error.is_some() {
            return false;
        }
        self.handshake = None;
        self.state = ConnectorState::Connected;
        true
    }

    /// Makes a handle of `token`, which has to be a connector's.
    pub(crate) fn named(token: Token) -> Handle<Self> {
        Handle::new(token, |facet| facet.downcast_mut())
    }
}

impl Connector for ConnectorControl {
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

impl<C, F> OutgoingConnection<C, F>
where
    C: Connect,
    F: Factory,
    ConnectTransport<C>: TransportFor<F::Protocol>,
{
    fn work(&mut self, reactor: &mut Reactor) -> Next {
        if self.control.state == ConnectorState::Connected {
            self.end_timeout(reactor);
        }
        if self.control.wants_to_stop {
            self.control.wants_to_stop = false;
            match self.control.state {
                ConnectorState::Connecting => self.give_up(reactor, ConnectError::Cancelled),
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

    /// Decides how the connector goes on. Another attempt comes in the next turn, so
    /// that one that fails at once does not keep the loop.
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
                    // Another attempt was requested, and then cancelled.
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
            // This timer may be the one that has just fired.
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
        if let Some(timeout) = self.endpoint.timeout() {
            self.timeout = Some(reactor.notify_later(timeout, self.control.token));
        }
        self.tell_started(reactor);
        if !self.control.wants_to_stop {
            match self.endpoint.host().is_some() {
                true => self.look_up(reactor),
                false => self.dial_only_address(reactor),
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
        let Destination::Address(address) = self.endpoint.destination() else {
            return;
        };
        match self.dial(reactor, &address) {
            Ok(Dial::Connected(socket)) => self.connected(reactor, socket, address),
            Ok(Dial::InProgress(())) => {}
            Ok(Dial::Full) => {
                self.retry = Some(reactor.notify_later(self.retry_after, self.control.token));
                self.retry_after = (self.retry_after * 2).min(LONGEST_RETRY);
            }
            Err(error) => self.fail(reactor, &error),
        }
    }

    fn look_up(&mut self, reactor: &mut Reactor) {
        let Some(host) = self.endpoint.host() else {
            return;
        };
        let token = self.control.token;
        let attempt = self.attempts;
        // The time limit of the attempt holds for this lookup too.
        let done = move |reactor: &mut Reactor, result| {
            reactor.enter(token, move |descriptor, reactor| {
                let result = Some(result);
                let mut looked_up = LookedUp { attempt, result };
                descriptor.map_or(Next::Keep, |it| it.request(reactor, &mut looked_up))
            });
        };
        let lookup = resolver::look_up(reactor, &host.name, host.port, None, done);
        self.lookup = Some(lookup);
    }

    fn looked_up(&mut self, reactor: &mut Reactor, result: Result<Vec<SocketAddr>, LookupError>) {
        let addresses = match result {
            Ok(addresses) => addresses,
            Err(error) => return self.fail(reactor, &ConnectError::Lookup(error)),
        };
        let bound = self.endpoint.host().and_then(|host| host.is_ipv4);
        let fits = |address: &SocketAddr| bound.is_none_or(|is_ipv4| is_ipv4 == address.is_ipv4());
        self.race = Race::new(addresses.into_iter().filter(fits));
        if self.race.has_next() {
            self.dial_next(reactor);
        } else {
            self.fail(reactor, &ConnectError::Lookup(LookupError::NoAddress));
        }
    }

    /// Tries the next address of the host, beside those in progress.
    fn dial_next(&mut self, reactor: &mut Reactor) {
        if let Some(call) = self.next_dial.take() {
            // This timer may be the one that has just fired.
            let _ = call.cancel(reactor);
        }
        let Some(host) = self.endpoint.host() else {
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
            let place = Address::Inet(address);
            match self.dial(reactor, &place) {
                Ok(Dial::Connected(socket)) => return self.connected(reactor, socket, place),
                Ok(Dial::InProgress(()) | Dial::Full) => {
                    if self.race.has_next() {
                        self.next_dial = host
                            .attempt_delay
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

    /// Begins to connect a new socket, and keeps it if it is in progress.
    fn dial(
        &mut self,
        reactor: &mut Reactor,
        address: &Address,
    ) -> Result<Dial<C::Socket, ()>, ConnectError> {
        match self.endpoint.dial(address)? {
            Dial::Connected(socket) => Ok(Dial::Connected(socket)),
            Dial::Full => Ok(Dial::Full),
            Dial::InProgress(socket) => {
                let source = socket.connecting();
                let source = source.ok_or_else(|| ConnectError::Os(not_connected()))?;
                reactor
                    .watch(self.control.token, source, Interest::Writable)
                    .map_err(ConnectError::Os)?;
                let address = address.clone();
                self.dialed.push(Dialed { socket, address });
                Ok(Dial::InProgress(()))
            }
        }
    }

    /// Handles an event of one of the sockets. The sockets themselves are asked which
    /// of them is connected; the event does not say.
    fn check(&mut self, reactor: &mut Reactor) {
        let mut at = 0;
        let mut has_failed = false;
        while let Some(dialed) = self.dialed.get_mut(at) {
            let error = match self.endpoint.outcome(&mut dialed.socket) {
                None => {
                    at += 1;
                    continue;
                }
                Some(outcome) => outcome.err(),
            };
            let Dialed { socket, address } = self.dialed.remove(at);
            Self::unwatch(reactor, &socket);
            match (error, address) {
                (None, address) => return self.connected(reactor, socket, address),
                (Some(error), Address::Inet(address)) if self.is_racing() => {
                    self.address_failed(address, error);
                    has_failed = true;
                }
                (Some(error), _) => {
                    drop(socket);
                    return self.fail(reactor, &error);
                }
            }
        }
        if has_failed {
            self.dial_next(reactor);
        }
    }

    /// Has the poller no longer watch a socket that is connecting.
    fn unwatch(reactor: &mut Reactor, socket: &C::Socket) {
        if let Some(source) = socket.connecting() {
            reactor.unwatch(source);
        }
    }

    fn is_racing(&self) -> bool {
        self.endpoint.host().is_some()
    }

    fn connected(&mut self, reactor: &mut Reactor, socket: C::Socket, address: Address) {
        self.end_dialing(reactor);
        self.control.state = ConnectorState::Connected;
        let protocol = self.factory.build_protocol(
            &mut BuildContext {
                origin: Origin::Connector(&mut self.control),
                reactor,
            },
            &address,
        );
        let Some(protocol) = protocol else {
            drop(socket);
            self.end_timeout(reactor);
            self.ended(reactor, &CloseReason::Done);
            return;
        };
        match self.establish(reactor, socket, protocol) {
            Err(error) => self.fail(reactor, &ConnectError::Os(error)),
            Ok(None) => self.end_timeout(reactor),
            Ok(Some(connection)) => {
                // The attempt goes on until the connection is made.
                self.control.state = ConnectorState::Connecting;
                self.control.handshake = Some(Shaking {
                    connection,
                    error: None,
                });
            }
        }
    }

    /// Puts a protocol on a socket. Returns the connection if its layers are not
    /// established yet.
    fn establish(
        &mut self,
        reactor: &mut Reactor,
        socket: C::Socket,
        protocol: F::Protocol,
    ) -> io::Result<Option<TransportHandle>> {
        let side = Side::Connected;
        let endpoint = std::cell::RefCell::new(&mut self.endpoint);
        let wrap = |socket| endpoint.borrow_mut().wrap().wrap(socket, side);
        let beginning = Beginning {
            connector: Some(self.control.token),
            prepare: &|link: &mut Link| endpoint.borrow().prepare(link),
            ..Beginning::of(side)
        };
        ConnectTransport::<C>::establish(reactor, socket, wrap, protocol, beginning)
            .map(|made| made.handshake)
            .map_err(|(error, ..)| error)
    }

    /// Ends an attempt. If it has a connection, that is told first, and ends the
    /// attempt.
    fn give_up(&mut self, reactor: &mut Reactor, error: ConnectError) {
        if let Some(shaking) = &mut self.control.handshake
            && let Some(connection) = reactor.get(shaking.connection)
        {
            shaking.error.get_or_insert(error);
            connection.abort_connection();
        } else {
            self.fail(reactor, &error);
        }
    }

    fn end_timeout(&mut self, reactor: &mut Reactor) {
        if let Some(timeout) = self.timeout.take() {
            // This timer may be the one that has just fired.
            let _ = timeout.cancel(reactor);
        }
    }

    /// Closes the sockets of the attempt, and ends its lookup and timers.
    fn end_attempt(&mut self, reactor: &mut Reactor) {
        self.control.handshake = None;
        self.end_timeout(reactor);
        self.end_dialing(reactor);
    }

    /// As [`end_attempt`](Self::end_attempt), but leaves the time limit of the attempt.
    fn end_dialing(&mut self, reactor: &mut Reactor) {
        let calls = [&mut self.retry, &mut self.next_dial];
        for call in calls.into_iter().filter_map(Option::take) {
            // One of these timers may have just fired.
            let _ = call.cancel(reactor);
        }
        if let Some(lookup) = self.lookup.take() {
            lookup.cancel(reactor);
        }
        for Dialed { socket, .. } in self.dialed.drain(..) {
            Self::unwatch(reactor, &socket);
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
            // No callback follows, so a request made here cannot be met.
            self.control.next_attempt = None;
        }
    }
}

impl<C, F> Descriptor for OutgoingConnection<C, F>
where
    C: Connect,
    F: Factory,
    ConnectTransport<C>: TransportFor<F::Protocol>,
{
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
            if self.control.state == ConnectorState::Connecting {
                self.give_up(reactor, ConnectError::TimedOut);
            }
        } else if self.wait == Some(call) {
            self.end_wait(reactor);
            // A request made during the wait takes precedence.
            self.control.next_attempt.get_or_insert_default();
        }
        self.work(reactor)
    }

    fn request(&mut self, reactor: &mut Reactor, request: &mut dyn Any) -> Next {
        if let Some(ConnectionEnded(reason)) = request.downcast_mut() {
            let reason = std::mem::replace(reason, CloseReason::Done);
            if let Some(shaking) = self.control.handshake.take() {
                let error = shaking.error.unwrap_or(match reason {
                    CloseReason::ReactorStopped => ConnectError::ReactorStopped,
                    reason => ConnectError::Handshake(reason),
                });
                self.fail(reactor, &error);
            } else if self.control.state == ConnectorState::Connected {
                self.ended(reactor, &reason);
            }
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
            // `build_protocol` has panicked. The factory is yet to be told of the end.
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
            // Connections that are still served may need this one.
            return Next::Keep;
        }
        self.control.is_last = true;
        if self.control.state == ConnectorState::Connected || self.control.handshake.is_some() {
            // The connector ends with its connection.
            return Next::Keep;
        }
        self.shutdown(reactor);
        Next::Remove
    }

    fn shutdown(&mut self, reactor: &mut Reactor) {
        match self.control.state {
            ConnectorState::Connecting => self.fail(reactor, &ConnectError::ReactorStopped),
            ConnectorState::Connected => self.ended(reactor, &CloseReason::ReactorStopped),
            // The next attempt has not begun, so it cannot fail.
            ConnectorState::Waiting => {
                self.end_wait(reactor);
                self.control.next_attempt = None;
                self.stopped_unless_connecting(reactor);
            }
            ConnectorState::Disconnected if self.is_started => {
                self.control.next_attempt = None;
                self.stopped_unless_connecting(reactor);
            }
            // The very first attempt. The factory is told that it failed.
            ConnectorState::Disconnected if self.control.next_attempt.take().is_some() => {
                self.tell_started(reactor);
                self.fail(reactor, &ConnectError::ReactorStopped);
            }
            ConnectorState::Disconnected => {}
        }
        // The last callback requested an attempt that cannot begin any more.
        if self.control.next_attempt.take().is_some() {
            self.stopped_unless_connecting(reactor);
        }
    }

    /// One of the sockets, for a reactor that is dropped. In any other case the end of
    /// the attempt deregisters and closes them.
    fn source(&self) -> Option<BorrowedFd<'_>> {
        self.dialed.first()?.socket.connecting()
    }

    fn facet(&mut self) -> &mut dyn Any {
        &mut self.control
    }

    fn describe(&self, description: &mut Description) {
        let state = match self.control.state {
            _ if self.control.handshake.is_some() => "handshake",
            ConnectorState::Disconnected => "disconnected",
            ConnectorState::Waiting => "waiting",
            ConnectorState::Connecting => "connecting",
            ConnectorState::Connected => "connected",
        };
        description
            .section("connector")
            .set("role", "connector")
            .set(
                "factory",
                log::name(|| self.factory.log_prefix()).into_owned(),
            )
            .set("state", state)
            .set("peer", self.control.destination.to_string())
            .set("attempts", self.attempts);
        self.factory.describe(description);
    }

    fn log_prefix(&self) -> Cow<'_, str> {
        Cow::Owned(format!("connector,{}", self.control.destination))
    }
}

/// Has the reactor connect. No callback runs before the running one has returned.
pub(crate) fn install<C, F>(
    reactor: &mut Reactor,
    endpoint: C,
    factory: F,
) -> io::Result<ConnectorHandle>
where
    C: Connect,
    F: Factory,
    ConnectTransport<C>: TransportFor<F::Protocol>,
{
    let vacancy = reactor.vacancy()?;
    let token = vacancy.token();
    let control = ConnectorControl {
        token,
        destination: endpoint.destination(),
        state: ConnectorState::Disconnected,
        next_attempt: Some(Duration::ZERO),
        wants_to_stop: false,
        was_told_to_stop: false,
        is_last: false,
        handshake: None,
    };
    let handle = control.handle();
    vacancy.install(Box::new(OutgoingConnection {
        control,
        endpoint,
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
    }));
    reactor.notify(token);
    Ok(handle)
}
