//! A port with its protocol. The reactor drives it, and user code is called here.
//!
//! As in a connection, callbacks are made one at a time, and the state is checked again
//! after each. The datagrams of one receive are delivered from the buffer. A pause, the
//! budget of a turn, or a callback that panics may interrupt this.

use std::any::Any;
use std::borrow::Cow;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::time::{Duration, Instant};

use bowline_protocol::{
    AtDrain, CloseReason, Context, DatagramProtocol, DatagramTransport, Linger, PacketProtocol,
};
use bowline_reactor::{
    DelayedCall, Description, Descriptor, DrainRound, Next, Panic, Reactor, Readiness, Token,
    Vacancy, catch_panic,
};

use super::packets::Packets;
use super::port::{Port, PortState, ReadEnd};
use super::served::{Arrived, Datagrams, Message, Served, Unsent};
use super::socket::{Arrivals, DatagramSocket, PacketSocket};
use crate::connector::ConnectionEnded;
use crate::detach::{DetachRequest, ProtocolCall};
use crate::endpoint::ConnectionSocket;
use crate::error::CallError;
use crate::kinds::address_ref;
use crate::log;
use crate::shared::{Ledger, Shared};
use crate::sys::{self, Ancillary, MOST_MESSAGES, NameRef};

/// The least that a datagram counts of a turn's budget of bytes. It is about the number
/// of bytes that could be copied in the time of its callback. By default a turn has 256
/// of them.
const LEAST_COST: usize = 1_024;

/// How many datagrams one call asks for at first. The number is doubled if as many have
/// come, and halved if it was far too large, since preparing each place costs
/// something.
const FIRST_COUNT: usize = 8;

/// The room for a datagram, unless more was asked for. A UDP datagram has less.
pub(crate) const ROOM: usize = 65_536;

/// How many datagrams there is room for if each may be larger than [`ROOM`].
const LARGE_ROOM_SLOTS: usize = 4;

/// The first and the longest wait for room that no event reports.
const FIRST_RETRY: Duration = Duration::from_millis(1);
const LONGEST_RETRY: Duration = Duration::from_millis(50);

/// How often the protocol of a draining socket is asked whether it is idle. Its state may
/// change without a call of its socket, so nothing reports the end of its work. Everything
/// else that keeps a socket from its end is reported when it is over.
const LOOK_AFTER: Duration = Duration::from_millis(50);

/// How many datagrams are delivered at the most once the reactor stops gracefully. A
/// flood would have no end.
const LAST_DATAGRAMS: usize = 4_096;

pub(super) struct Serving<S: DatagramSocket, P> {
    pub(super) port: Port<S>,
    pub(super) protocol: P,
    /// Received datagrams that are not all delivered yet.
    pub(super) arrivals: Option<Box<Arrivals>>,
    /// How many datagrams the next call asks for.
    count: usize,
    pub(super) stage: Stage,
    retry: Option<DelayedCall>,
    retry_after: Duration,
    deadline: Option<DelayedCall>,
    draining: Option<Draining>,
    /// The error of a datagram that was sent before, until the protocol is told.
    refused: Option<io::Error>,
}

/// How much of its life the protocol was told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    New,
    /// In `started`.
    Starting,
    Started,
    /// In `stopped`, or after it.
    Stopped,
}

/// The state of a graceful stop.
#[derive(Debug)]
struct Draining {
    is_told: bool,
    answer: AtDrain,
    /// How many datagrams are still delivered.
    left: usize,
    look: Option<DelayedCall>,
    /// How many datagrams had come and left at `quiet_since`.
    counted: (u64, u64),
    quiet_since: Instant,
    /// Whether it was not at rest when that was asked last.
    is_at_work: bool,
}

impl Draining {
    /// How much longer it has to be quiet.
    fn left_of_grace(&self, reactor: &Reactor) -> Duration {
        let quiet = reactor.now().saturating_duration_since(self.quiet_since);
        reactor.stop_grace().saturating_sub(quiet)
    }
}

/// Why a port is at work.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Visit {
    /// The reactor calls, once per turn.
    Turn,
    /// A callback or a timer asked for it, any number of times per turn. Nothing is
    /// received.
    Extra,
}

/// Has the reactor drive a socket with a protocol. A failure gives the socket back.
pub(crate) fn install<S, P>(
    reactor: &mut Reactor,
    socket: S,
    protocol: P,
) -> Result<Token, (io::Error, S)>
where
    S: DatagramSocket,
    P: DatagramProtocol<Port<S>>,
{
    let mut vacancy = match reactor.vacancy() {
        Ok(vacancy) => vacancy,
        Err(error) => return Err((error, socket)),
    };
    let token = vacancy.token();
    if let Err(error) = socket.watch(vacancy.reactor(), token, false) {
        return Err((error, socket));
    }
    put_in(vacancy, socket, Datagrams(protocol), |_| {});
    reactor.notify(token);
    Ok(token)
}

/// As [`install`], for a connection of packets. `wrap` puts layers on its socket.
/// `prepare` is called before the protocol sees the port. A failure gives the protocol
/// back too.
pub(crate) fn install_packets<S, P, C>(
    reactor: &mut Reactor,
    socket: C,
    wrap: impl FnOnce(C) -> S,
    protocol: P,
    prepare: impl FnOnce(&mut Port<S>),
) -> Result<Token, (io::Error, C, P)>
where
    S: PacketSocket,
    P: PacketProtocol<Port<S>>,
    C: ConnectionSocket,
{
    let mut vacancy = match reactor.vacancy() {
        Ok(vacancy) => vacancy,
        Err(error) => return Err((error, socket, protocol)),
    };
    let token = vacancy.token();
    if let Err(error) = socket.watch(vacancy.reactor(), token) {
        return Err((error, socket, protocol));
    }
    put_in(vacancy, wrap(socket), Packets(Some(protocol)), prepare);
    reactor.notify(token);
    Ok(token)
}

fn put_in<S, P>(
    mut vacancy: Vacancy<'_>,
    socket: S,
    protocol: P,
    prepare: impl FnOnce(&mut Port<S>),
) where
    S: DatagramSocket,
    P: Served<S>,
{
    let token = vacancy.token();
    let shared = Shared::of(vacancy.reactor());
    Ledger::add(&shared.ledger.opened, 1);
    let mut port = Port::new(socket, shared, token);
    prepare(&mut port);
    vacancy.install(Box::new(Serving {
        port,
        protocol,
        arrivals: None,
        count: FIRST_COUNT,
        stage: Stage::New,
        retry: None,
        retry_after: Duration::ZERO,
        deadline: None,
        draining: None,
        refused: None,
    }));
}

impl<S, P> Serving<S, P>
where
    S: DatagramSocket,
    P: Served<S>,
{
    /// Does everything that is left to do, within this turn's budget.
    pub(super) fn work(&mut self, reactor: &mut Reactor, visit: Visit) -> Next {
        let budgets = self.port.shared.budgets.get();
        if P::IS_CONNECTION && self.port.shared.is_held(self.port.token) {
            // It is taken apart in this turn, as it is.
            return Next::Again;
        }
        let mut bytes = match visit {
            Visit::Turn => budgets.read_bytes,
            Visit::Extra => 0,
        };
        let (mut sends, mut notices) = (budgets.writes, budgets.notices);
        let mut is_through = false;
        loop {
            if self.port.state == PortState::Ending {
                return self.lose(reactor);
            }
            if self.stage == Stage::New {
                self.log_start();
                self.begin(reactor);
                self.stage = Stage::Started;
            } else if self.has_notice() {
                if notices == 0 {
                    break;
                }
                notices -= 1;
                self.tell(reactor);
            } else if self.port.may_send() && sends > 0 {
                sends -= 1;
                self.flush(reactor);
            } else if self.may_deliver() && bytes > 0 {
                bytes = self.deliver(reactor, bytes);
            } else if self.may_receive() && bytes > 0 {
                // What has arrived is wanted: nobody was called since that was asked.
                bytes = match self.receive() {
                    true => self.deliver(reactor, bytes),
                    false => bytes.saturating_sub(LEAST_COST),
                };
            } else if P::IS_CONNECTION && self.take_end_step(reactor) {
                // The loop checks the new state.
            } else if self.port.state == PortState::Stopping && !self.port.has_unsent() {
                self.port.end(CloseReason::Done);
            } else if !self.take_drain_step(reactor, visit) {
                // Nothing was left out for want of a budget, so there is no more.
                is_through = sends > 0 && bytes > 0;
                break;
            }
        }
        self.settle(reactor, is_through)
    }

    fn begin(&mut self, reactor: &mut Reactor) {
        self.stage = Stage::Starting;
        let mut cx = Context {
            transport: &mut self.port,
            reactor,
        };
        match cx.transport.is_reattached {
            true => self.protocol.reattached(&mut cx),
            false => self.protocol.began(&mut cx),
        }
    }

    fn log_start(&self) {
        log::debug!(
            target: log::TRANSPORT,
            "{}: {} on {}, for {}",
            self.port.token,
            self.port.socket.kind(),
            self.port.socket.host(),
            log::name(|| self.protocol.log_prefix()),
        );
    }

    // Notices.

    fn has_notice(&self) -> bool {
        self.refused.is_some()
            || self.port.has_room_again()
            || self.draining.as_ref().is_some_and(|it| !it.is_told)
    }

    #[cold]
    fn tell(&mut self, reactor: &mut Reactor) {
        let mut cx = Context {
            transport: &mut self.port,
            reactor,
        };
        if let Some(error) = self.refused.take() {
            self.protocol.refused(&mut cx, &error);
        } else if cx.transport.has_room_again() {
            cx.transport.owes_room = false;
            self.protocol.resumed(&mut cx);
        } else if let Some(draining) = self.draining.as_mut() {
            draining.is_told = true;
            if cx.transport.is_deaf() {
                return;
            }
            draining.answer = self.protocol.draining(&mut cx);
            if draining.answer == AtDrain::DoNotWait {
                reactor.await_no_more(self.port.token);
            }
            // The kernel is asked once more, whatever the latch says.
            self.port.is_readable = true;
        }
    }

    // Receiving.

    #[inline]
    fn may_deliver(&self) -> bool {
        self.arrivals.is_some() && self.port.is_receiving()
    }

    #[inline]
    fn may_receive(&self) -> bool {
        let is_wanted = self.draining.as_ref().is_none_or(|it| it.left > 0);
        self.port.is_readable
            && self.port.is_receiving()
            && self.port.ends.read == ReadEnd::Open
            && self.arrivals.is_none()
            && is_wanted
    }

    /// Receives by one call. Returns whether anything came.
    fn receive(&mut self) -> bool {
        let port = &mut self.port;
        let mut arrivals = take_arrivals(&port.shared, port.socket.room());
        let count = self.count.min(arrivals.batch.slots());
        match port.socket.receive(&mut arrivals, count) {
            Ok(received) => {
                // One that is broken by an error of our own ends once a receive would block,
                // which no event announces.
                port.is_readable = received >= count || port.ends.broken.is_some();
                if P::IS_CONNECTION && Self::notes_end(port) && received == 0 {
                    return_arrivals(&port.shared, arrivals);
                    return true;
                }
                if received == count {
                    self.count = (count * 2).min(MOST_MESSAGES);
                } else if received < count / 4 {
                    self.count = (count / 2).max(FIRST_COUNT);
                }
                self.arrivals = Some(arrivals);
                true
            }
            Err(error) => {
                return_arrivals(&port.shared, arrivals);
                self.receive_failed(error);
                false
            }
        }
    }

    #[cold]
    fn receive_failed(&mut self, error: io::Error) {
        let port = &mut self.port;
        if error.kind() == io::ErrorKind::WouldBlock {
            port.is_readable = false;
            port.end_if_read_out();
        } else if P::IS_CONNECTION && error.kind() == io::ErrorKind::ConnectionReset {
            // The kernel has reported the error once. Packets that the peer had sent
            // wait behind it.
            port.break_off(error);
        } else if port.socket.is_refusal(&error) {
            // The kernel has reported the error once. Datagrams may wait behind it.
            match port.socket.peer() {
                Some(_) => self.refused = Some(error),
                None => log::debug!(target: log::TRANSPORT, "{}: {error}", port.token),
            }
        } else if sys::is_transient(&error) {
            // The kernel has dropped what it had no room for.
            log::debug!(target: log::TRANSPORT, "{}: receive: {error}", port.token);
        } else {
            port.end(CloseReason::Lost(error));
        }
    }

    /// Takes the error of a datagram that was sent before, of a socket that receives
    /// nothing. Its protocol is told all the same.
    #[cold]
    fn note_refusal(&mut self) {
        if !self.port.is_receiving()
            && !matches!(self.port.state, PortState::Ending | PortState::Closed)
            && let Some(error) = self.port.socket.take_error()
        {
            self.receive_failed(error);
        }
    }

    /// Delivers received datagrams, as far as they are wanted. Returns how much is left
    /// of the turn's bytes.
    #[inline]
    pub(super) fn deliver(&mut self, reactor: &mut Reactor, mut bytes: usize) -> usize {
        let Self {
            port,
            protocol,
            arrivals,
            draining,
            ..
        } = self;
        let Some(batch) = arrivals.as_mut() else {
            return bytes;
        };
        let room = port.socket.room().min(batch.batch.room());
        while batch.next < batch.batch.len() {
            if !port.is_receiving() || bytes == 0 {
                return bytes;
            }
            let place = batch.next;
            let message = batch.batch.message(place);
            let (length, segment) = (message.length, message.segment);
            // Done before the callback, which may panic.
            let (from, whole) = if segment == 0 || length <= segment {
                batch.next += 1;
                (0, length)
            } else {
                let from = batch.offset;
                batch.offset += segment;
                if batch.offset >= length {
                    batch.next += 1;
                    batch.offset = 0;
                }
                (from, segment.min(length - from))
            };
            bytes = bytes.saturating_sub(whole.max(LEAST_COST));
            if let Some(draining) = draining {
                draining.left = draining.left.saturating_sub(1);
            }
            let (message, data, name, ancillary) = batch.batch.parts(place);
            // The message may have less room than that.
            let from = from.min(data.len());
            let data = &data[from..(from + whole.min(room)).min(data.len())];
            port.counts.received += 1;
            port.counts.truncated += u64::from(whole > data.len());
            let beside = match message.has_ancillary {
                true => port.take_ancillary(ancillary, message.control_truncated),
                false => Beside::default(),
            };
            call(
                protocol,
                port,
                reactor,
                (data, whole, name),
                beside,
                ancillary,
            );
        }
        if let Some(arrivals) = arrivals.take() {
            return_arrivals(&port.shared, arrivals);
        }
        bytes
    }

    // Sending.

    fn flush(&mut self, reactor: &mut Reactor) {
        if let Err(error) = self.port.flush() {
            self.flush_failed(reactor, error);
        }
    }

    #[cold]
    fn flush_failed(&mut self, reactor: &mut Reactor, error: io::Error) {
        let port = &mut self.port;
        let is_refusal = port.socket.is_refusal(&error) && port.socket.peer().is_some();
        if port.is_to_be_tried_again() {
            if is_refusal {
                self.refused = Some(error);
            }
            return;
        }
        let Some(failed) = port.take_failed() else {
            return;
        };
        let to = match &failed.name[..] {
            [] => None,
            name => Some(address_ref(NameRef::decode(name))),
        };
        if !std::mem::replace(&mut port.warned.failed, true) {
            let to = to.map(|to| to.to_address()).or_else(|| port.socket.peer());
            let to = to.map_or_else(|| "its peer".to_owned(), |to| to.to_string());
            log::warn!(
                target: log::TRANSPORT,
                "{} {} {}: a datagram to {to} was not sent: {error}",
                port.token,
                port.socket.kind(),
                port.socket.host(),
            );
        }
        if is_refusal && to.is_none() {
            self.refused = Some(io::Error::from(error.kind()));
            if let Some(number) = error.raw_os_error() {
                self.refused = Some(io::Error::from_raw_os_error(number));
            }
        }
        let count = failed.descriptors.len();
        Ledger::add(&port.shared.ledger.unsent, count);
        let unsent = Unsent {
            data: &failed.data,
            to,
            descriptors: failed.descriptors,
        };
        let mut cx = Context {
            transport: port,
            reactor,
        };
        self.protocol.failed(&mut cx, unsent, &error);
    }

    // Stopping gracefully.

    /// Takes a step towards the end. Returns true if that leaves something to do.
    #[inline]
    fn take_drain_step(&mut self, reactor: &Reactor, visit: Visit) -> bool {
        self.draining.is_some() && self.drain_on(reactor, visit)
    }

    #[cold]
    fn drain_on(&mut self, reactor: &Reactor, visit: Visit) -> bool {
        let is_at_rest = self.may_end_idle() && self.protocol.is_idle();
        let Some(draining) = &mut self.draining else {
            return false;
        };
        let counted = (self.port.counts.received, self.port.counts.sent);
        let was_at_work = std::mem::replace(&mut draining.is_at_work, !is_at_rest);
        if was_at_work || !is_at_rest || draining.counted != counted {
            draining.counted = counted;
            draining.quiet_since = reactor.now();
        }
        let is_quiet = !self.port.is_readable && draining.left_of_grace(reactor).is_zero();
        let is_over = visit == Visit::Turn
            && draining.is_told
            && (is_quiet || draining.left == 0)
            && is_at_rest;
        if is_over {
            self.port.stop_listening();
        }
        is_over
    }

    /// Whether the port drains, and nothing but time and its protocol keeps it from the
    /// end.
    fn may_end_idle(&self) -> bool {
        let draining = self.draining.as_ref();
        draining.is_some_and(|it| it.answer == AtDrain::LoseWhenIdle)
            && self.port.is_receiving()
            && self.port.ends.read == ReadEnd::Open
            && self.arrivals.is_none()
            && !self.port.has_unsent()
    }

    /// Sets the time of the next look at a port that drains.
    fn look_later(&mut self, reactor: &mut Reactor) {
        if !self.may_end_idle() {
            return;
        }
        let is_idle = self.protocol.is_idle();
        if let Some(draining) = &mut self.draining
            && draining.look.is_none()
        {
            let after = match is_idle {
                true => draining.left_of_grace(reactor),
                false => LOOK_AFTER,
            };
            draining.look = Some(reactor.notify_later(after, self.port.token));
        }
    }

    /// Makes sure that the rest is done later, if there is any.
    #[inline]
    fn settle(&mut self, reactor: &mut Reactor, is_through: bool) -> Next {
        let port = &mut self.port;
        let token = port.token;
        if port.has_unsent() && !port.is_writable && !port.watches_writing {
            // Happens once in the life of a port, if it ever falls behind. The poller
            // reports the socket again if it has become writable meanwhile.
            match port.socket.watch(reactor, token, true) {
                Ok(()) => port.watches_writing = true,
                Err(error) => port.end(CloseReason::Lost(error)),
            }
        }
        if (port.waits_for_timer || port.has_held()) && self.retry.is_none() {
            self.retry_after = (self.retry_after * 2).clamp(FIRST_RETRY, LONGEST_RETRY);
            self.retry = Some(reactor.notify_later(self.retry_after, token));
        }
        if let Some(within) = port.stop_within.take() {
            if let Some(earlier) = self.deadline.take() {
                // It may have run.
                let _ = earlier.cancel(reactor);
            }
            self.deadline = Some(reactor.notify_later(within, token));
        }
        self.look_later(reactor);
        if is_through && self.port.state != PortState::Ending {
            return Next::Keep;
        }
        let port = &self.port;
        let has_more = port.state == PortState::Ending
            || port.may_send()
            || self.has_notice()
            || self.may_deliver()
            || self.may_receive()
            || P::IS_CONNECTION && self.has_end_step();
        if has_more { Next::Again } else { Next::Keep }
    }

    /// Ends the port: closes the socket and tells the protocol. This is done once, even
    /// if the callback panics and this is called again.
    #[cold]
    fn lose(&mut self, reactor: &mut Reactor) -> Next {
        if self.stage == Stage::New {
            // The protocol is told of the beginning first.
            self.begin(reactor);
        }
        self.cancel_calls(reactor);
        self.arrivals = None;
        self.port.close(reactor);
        let reason = self.port.reason.take().unwrap_or(CloseReason::Done);
        // A panic while logging must not keep the protocol from being told.
        let _ = catch_panic(|| {
            log::debug!(
                target: log::TRANSPORT,
                "{} {},{},{}: {reason}; {} datagrams unsent",
                self.port.token,
                log::name(|| self.protocol.log_prefix()),
                self.port.socket.kind(),
                self.port.socket.host(),
                self.port.unsent_datagrams(),
            );
        });
        if self.stage != Stage::Stopped {
            self.stage = Stage::Stopped;
            let mut cx = Context {
                transport: &mut self.port,
                reactor,
            };
            self.protocol.ended(&mut cx, &reason);
        }
        self.tell_connector(reactor, reason);
        Next::Remove
    }

    pub(super) fn cancel_calls(&mut self, reactor: &mut Reactor) {
        let draining = self.draining.as_mut().and_then(|it| it.look.take());
        let calls = [self.retry.take(), self.deadline.take(), draining];
        for call in calls.into_iter().flatten() {
            // One of these timers may have just fired.
            let _ = call.cancel(reactor);
        }
    }

    /// Tells the connector, if there is one, that its connection has ended.
    pub(super) fn tell_connector(&mut self, reactor: &mut Reactor, reason: CloseReason) {
        if let Some(connector) = self.port.ends.connector.take() {
            let mut ended = ConnectionEnded(reason);
            reactor.enter(connector, move |connector, reactor| match connector {
                Some(connector) => connector.request(reactor, &mut ended),
                None => Next::Keep,
            });
        }
    }

    /// Calls the wanted part of the protocol.
    fn call_part(&mut self, reactor: &mut Reactor, request: &mut ProtocolCall<Port<S>>) {
        if matches!(self.port.state, PortState::Ending | PortState::Closed) {
            request.error = CallError::Lost;
        } else if let Some(part) = self.protocol.part(request.part) {
            if let Some(call) = request.call.take() {
                let mut cx = Context {
                    transport: &mut self.port,
                    reactor,
                };
                call(part, &mut cx);
            }
        } else {
            request.error = CallError::WrongProtocol;
        }
    }
}

/// Control messages beside a datagram, without its descriptors.
#[derive(Default)]
struct Beside {
    lost: bool,
    credentials: Option<bowline_protocol::Credentials>,
    pidfd: Option<OwnedFd>,
}

/// Calls the protocol with a datagram. Closes the descriptors that it leaves, even if
/// it panics.
#[inline]
fn call<S, P>(
    protocol: &mut P,
    port: &mut Port<S>,
    reactor: &mut Reactor,
    (data, length, from): (&[u8], usize, NameRef<'_>),
    beside: Beside,
    ancillary: &mut Ancillary,
) where
    S: DatagramSocket,
    P: Served<S>,
{
    let has_descriptors = !ancillary.descriptors.is_empty();
    let mut message = P::message(Arrived {
        data,
        length,
        from: address_ref(from),
        descriptors: &mut ancillary.descriptors,
        lost: beside.lost,
        credentials: beside.credentials,
        pidfd: beside.pidfd,
    });
    if !has_descriptors {
        let mut cx = Context {
            transport: port,
            reactor,
        };
        return protocol.received(&mut cx, &mut message);
    }
    let mut offered = Offered {
        shared: Rc::clone(&port.shared),
        message,
    };
    let mut cx = Context {
        transport: port,
        reactor,
    };
    protocol.received(&mut cx, &mut offered.message);
    let left = offered.close_left();
    if left > 0 {
        port.warn_of_unclaimed(left, &log::name(|| protocol.log_prefix()));
    }
}

/// A message while its callback may take descriptors out of it.
struct Offered<M: Message> {
    shared: Rc<Shared>,
    message: M,
}

impl<M: Message> Offered<M> {
    fn close_left(&mut self) -> usize {
        let left = self.message.descriptors();
        match left.len() {
            0 => 0,
            _ => self.shared.close_received(left),
        }
    }
}

impl<M: Message> Drop for Offered<M> {
    fn drop(&mut self) {
        self.close_left();
    }
}

impl<S: DatagramSocket> Port<S> {
    /// Checks what came beside a datagram: whether some was lost, lingers, or would
    /// take the reserve.
    #[cold]
    fn take_ancillary(&mut self, ancillary: &mut Ancillary, is_truncated: bool) -> Beside {
        let count = ancillary.descriptors.len();
        if count > 0 {
            self.shared.numbers.expect_descriptors();
        }
        Ledger::add(&self.shared.ledger.received, count);
        if self.linger == Linger::Clear {
            for fd in &ancillary.descriptors {
                sys::disarm_linger(fd.as_fd());
            }
        }
        // The last one has the highest number.
        let last = ancillary.descriptors.last();
        let is_reserved = last.is_some_and(|fd| self.shared.numbers.is_reserved(fd.as_fd()));
        let lost = is_truncated || is_reserved;
        if is_truncated {
            Ledger::add(&self.shared.ledger.truncations, 1);
        }
        if lost {
            self.shared.refuse_received(ancillary.descriptors.drain(..));
            if !std::mem::replace(&mut self.warned.lost, true) {
                log::warn!(
                    target: log::DESCRIPTORS,
                    "{} {}: descriptors of a datagram were lost, {count} others closed",
                    self.token,
                    self.socket.host(),
                );
            }
        }
        if let Some((level, kind)) = ancillary.unknown.first().copied()
            && !std::mem::replace(&mut self.warned.unknown, true)
        {
            log::warn!(
                target: log::DESCRIPTORS,
                "{} {}: unsupported ancillary data: level {level}, type {kind}",
                self.token,
                self.socket.host(),
            );
        }
        ancillary.unknown.clear();
        Beside {
            lost,
            credentials: ancillary.credentials.take().map(Into::into),
            pidfd: ancillary.pidfd.take(),
        }
    }

    #[cold]
    fn warn_of_unclaimed(&mut self, count: usize, protocol: &str) {
        if !std::mem::replace(&mut self.warned.unclaimed, true) {
            log::warn!(
                target: log::DESCRIPTORS,
                "{}: {protocol} does not take descriptors: closed {count} received at {}",
                self.token,
                self.socket.host(),
            );
        }
    }
}

/// Takes room for received datagrams.
#[inline]
fn take_arrivals(shared: &Shared, room: usize) -> Box<Arrivals> {
    if room <= ROOM {
        // The socket may have asked for less room.
        if let Some(arrivals) = shared.take_arrivals() {
            return arrivals;
        }
        return Arrivals::new(MOST_MESSAGES, ROOM);
    }
    Arrivals::new(LARGE_ROOM_SLOTS, room)
}

#[inline]
fn return_arrivals(shared: &Shared, mut arrivals: Box<Arrivals>) {
    arrivals.batch.clear();
    arrivals.next = 0;
    arrivals.offset = 0;
    if arrivals.batch.room() == ROOM {
        shared.return_arrivals(arrivals);
    }
}

impl<S, P> Descriptor for Serving<S, P>
where
    S: DatagramSocket,
    P: Served<S>,
{
    #[inline]
    fn ready(&mut self, reactor: &mut Reactor, readiness: Readiness) -> Next {
        let incoming = Readiness::READABLE | Readiness::READ_CLOSED | Readiness::ERROR;
        // The next receive reports an error, unless the socket is paused. Otherwise a send
        // would get the error, which has nothing to do with its datagram.
        self.port.is_readable |= readiness.intersects(incoming);
        let outgoing = Readiness::WRITABLE | Readiness::WRITE_CLOSED | Readiness::ERROR;
        self.port.is_writable |= readiness.intersects(outgoing);
        if readiness.intersects(Readiness::ERROR) {
            match P::IS_CONNECTION {
                true => self.note_error(),
                false => self.note_refusal(),
            }
        }
        self.work(reactor, Visit::Turn)
    }

    fn attend(&mut self, reactor: &mut Reactor) -> Next {
        self.work(reactor, Visit::Extra)
    }

    fn timer_fired(&mut self, reactor: &mut Reactor, call: DelayedCall) -> Next {
        let (mut is_retry, mut is_look) = (false, false);
        if self.retry == Some(call) {
            self.retry = None;
            self.port.try_again();
            is_retry = true;
        } else if self.deadline == Some(call) {
            self.deadline = None;
            self.port.end(CloseReason::CloseTimedOut);
        } else if let Some(draining) = &mut self.draining
            && draining.look == Some(call)
        {
            draining.look = None;
            // It gets a turn, in which the socket is read.
            self.port.is_readable = true;
            is_look = true;
        }
        let next = self.work(reactor, Visit::Extra);
        if is_retry && self.retry.is_none() {
            self.retry_after = Duration::ZERO;
        }
        match next {
            Next::Keep if is_look => Next::Again,
            next => next,
        }
    }

    fn request(&mut self, reactor: &mut Reactor, request: &mut dyn Any) -> Next {
        if let Some(call) = request.downcast_mut::<ProtocolCall<Port<S>>>() {
            self.call_part(reactor, call);
        } else if let Some(detach) = request.downcast_mut::<DetachRequest>() {
            return self.detach(reactor, detach);
        }
        self.work(reactor, Visit::Extra)
    }

    fn panicked(&mut self, reactor: &mut Reactor, panic: Panic) -> Next {
        match self.stage {
            Stage::Stopped => {
                self.tell_connector(reactor, CloseReason::Panicked(panic));
                return Next::Remove;
            }
            Stage::Starting => {
                self.stage = Stage::Started;
                self.port.end(CloseReason::Panicked(panic));
            }
            Stage::Started if P::IS_CONNECTION => self.port.end(CloseReason::Panicked(panic)),
            // Only this datagram or notice is lost. The next turn delivers those behind
            // it.
            Stage::New | Stage::Started => {}
        }
        Next::Again
    }

    fn drain(&mut self, reactor: &mut Reactor, round: DrainRound) -> Next {
        let own_round = match P::is_support(&self.port) {
            true => DrainRound::Support,
            false => DrainRound::Work,
        };
        if round < own_round || self.draining.is_some() {
            return Next::Keep;
        }
        self.draining = Some(Draining {
            is_told: false,
            answer: AtDrain::LoseWhenIdle,
            left: LAST_DATAGRAMS,
            look: None,
            counted: (0, 0),
            quiet_since: reactor.now(),
            is_at_work: false,
        });
        reactor.await_end(self.port.token);
        self.work(reactor, Visit::Extra)
    }

    fn shutdown(&mut self, reactor: &mut Reactor) {
        self.port.end(CloseReason::ReactorStopped);
        let _ = self.lose(reactor);
    }

    fn forked(&mut self) {
        // The poller is asked again once there is something to send.
        self.port.watches_writing = false;
    }

    fn source(&self) -> Option<BorrowedFd<'_>> {
        self.port.socket.source()
    }

    fn facet(&mut self) -> &mut dyn Any {
        &mut self.port
    }

    fn describe(&self, description: &mut Description) {
        let port = &self.port;
        let state = match port.state {
            PortState::Open => "open",
            PortState::Stopping => "closing",
            PortState::Ending | PortState::Closed => "ending",
        };
        let role = match P::IS_CONNECTION {
            true => "connection",
            false => "datagrams",
        };
        let counts = port.counts;
        let section = description.section(port.socket.kind());
        section
            .set("role", role)
            .set(
                "protocol",
                log::name(|| self.protocol.log_prefix()).into_owned(),
            )
            .set("state", state)
            .set("local", port.socket.host().to_string())
            .set("sent_messages", counts.sent)
            .set("received_messages", counts.received)
            .set("truncated_messages", counts.truncated)
            .set("failed_messages", counts.failed)
            .set("refused_messages", counts.refused)
            .set("reading", port.reading());
        #[cfg(feature = "inspect")]
        port.shared.kinds.tell_origin(port.token, section);
        port.tell_queue(section);
        self.protocol.describe(description);
    }

    fn log_prefix(&self) -> Cow<'_, str> {
        Cow::Owned(format!(
            "{},{},{}",
            log::name(|| self.protocol.log_prefix()),
            self.port.socket.kind(),
            self.port.socket.host()
        ))
    }
}
