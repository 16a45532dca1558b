//! Outgoing connections.

use std::any::Any;
use std::borrow::Cow;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use bowline_protocol::{
    Address, BuildContext, CloseReason, ConnectError, Connector, ConnectorHandle, ConnectorState,
    Factory, Origin,
};
use bowline_reactor::{
    DelayedCall, Descriptor, Handle, Interest, Next, Panic, Reactor, Readiness, Token,
};

use crate::connection::{DescriptorTransport, connect_protocol, unix_address};
use crate::connection::{HostName, Names};
use crate::log;
use crate::sys::{self, Connecting, Family, SocketName};

/// The first and the longest wait for room in the queue of a UNIX listener:
/// no event says that there is some.
const FIRST_RETRY: Duration = Duration::from_millis(2);
const LONGEST_RETRY: Duration = Duration::from_millis(100);

/// Tells a connector that its connection has ended.
pub(crate) struct ConnectionEnded {
    pub(crate) reason: CloseReason,
}

/// How each attempt is made.
#[derive(Clone, Debug)]
pub(crate) struct Attempt {
    pub(crate) destination: SocketName,
    pub(crate) bind_address: Option<SocketName>,
    pub(crate) timeout: Option<Duration>,
    pub(crate) no_delay: bool,
    pub(crate) keep_alive: bool,
}

pub(crate) struct OutgoingConnection<T, F> {
    control: Control,
    attempt: Attempt,
    factory: F,
    /// There while an attempt runs.
    socket: Option<OwnedFd>,
    is_watched: bool,
    timeout: Option<DelayedCall>,
    /// When the next attempt begins; there while the connector waits.
    wait: Option<DelayedCall>,
    retry: Option<DelayedCall>,
    retry_after: Duration,
    /// Whether the factory was told of an attempt, and not yet that nothing
    /// more comes.
    is_started: bool,
    transport: PhantomData<fn() -> T>,
}

/// The part of a connector that handles give access to.
pub(crate) struct Control {
    token: Token,
    destination: Address,
    state: ConnectorState,
    /// After what delay to connect, as was asked and not yet done.
    next_attempt: Option<Duration>,
    wants_to_stop: bool,
}

impl Connector for Control {
    fn destination(&self) -> Address {
        self.destination.clone()
    }

    fn state(&self) -> ConnectorState {
        self.state
    }

    fn connect(&mut self) {
        self.connect_after(Duration::ZERO);
    }

    fn connect_after(&mut self, delay: Duration) {
        if matches!(
            self.state,
            ConnectorState::Disconnected | ConnectorState::Waiting
        ) {
            self.next_attempt = Some(delay);
            self.wants_to_stop = false;
        }
    }

    fn stop_connecting(&mut self) {
        self.next_attempt = None;
        if matches!(
            self.state,
            ConnectorState::Connecting | ConnectorState::Waiting
        ) {
            self.wants_to_stop = true;
        }
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
        self.is_started = true;
        self.retry_after = FIRST_RETRY;
        if let Some(timeout) = self.attempt.timeout {
            self.timeout = Some(reactor.notify_later(timeout, self.control.token));
        }
        self.factory.started(&mut BuildContext {
            origin: Origin::Connector(&mut self.control),
            reactor,
        });
        if !self.control.wants_to_stop {
            self.try_connecting(reactor);
        }
    }

    fn try_connecting(&mut self, reactor: &mut Reactor) {
        match self.connect() {
            Ok(Connecting::Done) => self.connected(reactor),
            Ok(Connecting::InProgress) => {
                if let Some(socket) = &self.socket {
                    let watched =
                        reactor.watch(self.control.token, socket.as_fd(), Interest::Writable);
                    match watched {
                        Ok(()) => self.is_watched = true,
                        Err(error) => self.fail(reactor, &ConnectError::Os(error)),
                    }
                }
            }
            Ok(Connecting::BacklogFull) => {
                self.socket = None;
                self.retry = Some(reactor.notify_later(self.retry_after, self.control.token));
                self.retry_after = (self.retry_after * 2).min(LONGEST_RETRY);
            }
            Err(error) => self.fail(reactor, &error),
        }
    }

    fn connect(&mut self) -> Result<Connecting, ConnectError> {
        let family = match &self.attempt.destination {
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
        if let Some(name) = &self.attempt.bind_address {
            sys::bind(fd.as_fd(), name).map_err(ConnectError::Bind)?;
        }
        let connecting =
            sys::connect(fd.as_fd(), &self.attempt.destination).map_err(ConnectError::from_os)?;
        self.socket = Some(fd);
        Ok(connecting)
    }

    /// The socket reported something: whether it is connected is known from the
    /// socket, not from the event.
    fn check(&mut self, reactor: &mut Reactor) {
        let Some(socket) = &self.socket else {
            return;
        };
        match sys::take_error(socket.as_fd()) {
            Ok(None) => match sys::peer_name(socket.as_fd()) {
                Ok(_) => self.connected(reactor),
                // A spurious event.
                Err(error) if error.kind() == io::ErrorKind::NotConnected => {}
                Err(error) => self.fail(reactor, &ConnectError::Os(error)),
            },
            Ok(Some(error)) | Err(error) => self.fail(reactor, &ConnectError::from_os(error)),
        }
    }

    fn connected(&mut self, reactor: &mut Reactor) {
        let Some(fd) = self.take_socket(reactor) else {
            return;
        };
        self.control.state = ConnectorState::Connected;
        let (peer, address) = match &self.attempt.destination {
            // A UNIX listener's name is what was asked for.
            name @ (SocketName::UnixPath(_)
            | SocketName::UnixAbstract(_)
            | SocketName::UnixUnnamed
            | SocketName::Other(_)) => (name.clone(), Address::Unix(unix_address(name.clone()))),
            SocketName::Inet(address) => (SocketName::Inet(*address), Address::Inet(*address)),
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
            host: HostName::Unknown,
            peer,
        };
        let token = self.control.token;
        if let Err(error) = connect_protocol::<T, F>(reactor, protocol, fd, names, Some(token)) {
            self.fail(reactor, &ConnectError::Os(error));
        }
    }

    /// Ends the attempt's use of the socket, and its timers.
    fn take_socket(&mut self, reactor: &mut Reactor) -> Option<OwnedFd> {
        for call in [self.timeout.take(), self.retry.take()]
            .into_iter()
            .flatten()
        {
            // One of them may be what ran.
            let _ = call.cancel(reactor);
        }
        let fd = self.socket.take()?;
        if std::mem::take(&mut self.is_watched) {
            reactor.unwatch(fd.as_fd());
        }
        Some(fd)
    }

    fn fail(&mut self, reactor: &mut Reactor, error: &ConnectError) {
        drop(self.take_socket(reactor));
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
            self.try_connecting(reactor);
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
        }
        self.work(reactor)
    }

    fn panicked(&mut self, reactor: &mut Reactor, panic: Panic) -> Next {
        drop(self.take_socket(reactor));
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

    fn shutdown(&mut self, reactor: &mut Reactor) {
        match self.control.state {
            ConnectorState::Connecting => self.fail(reactor, &ConnectError::ReactorStopped),
            ConnectorState::Connected => self.ended(reactor, &CloseReason::ReactorStopped),
            ConnectorState::Waiting if self.control.wants_to_stop => {
                self.end_wait(reactor);
                self.stopped_unless_connecting(reactor);
            }
            ConnectorState::Waiting => {
                self.end_wait(reactor);
                self.control.next_attempt = None;
                self.fail(reactor, &ConnectError::ReactorStopped);
            }
            ConnectorState::Disconnected if self.control.next_attempt.take().is_some() => {
                self.fail(reactor, &ConnectError::ReactorStopped);
            }
            ConnectorState::Disconnected => {}
        }
        // Asked for by the last callback, and in vain.
        if self.control.next_attempt.take().is_some() {
            self.stopped_unless_connecting(reactor);
        }
    }

    fn source(&self) -> Option<BorrowedFd<'_>> {
        self.socket
            .as_ref()
            .filter(|_| self.is_watched)
            .map(AsFd::as_fd)
    }

    fn facet(&mut self) -> &mut dyn Any {
        &mut self.control
    }

    fn log_prefix(&self) -> Cow<'_, str> {
        Cow::Owned(format!("connector,{}", self.control.destination))
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
    let token = reactor.reserve()?;
    let destination = match &attempt.destination {
        SocketName::Inet(address) => Address::Inet(*address),
        other => Address::Unix(unix_address(other.clone())),
    };
    let control = Control {
        token,
        destination,
        state: ConnectorState::Disconnected,
        next_attempt: Some(Duration::ZERO),
        wants_to_stop: false,
    };
    let handle = control.handle();
    reactor.install(
        token,
        Box::new(OutgoingConnection::<T, F> {
            control,
            attempt,
            factory,
            socket: None,
            is_watched: false,
            timeout: None,
            wait: None,
            retry: None,
            retry_after: FIRST_RETRY,
            is_started: false,
            transport: PhantomData,
        }),
    );
    reactor.notify(token);
    Ok(handle)
}
