//! A transport with its protocol: what the reactor drives.
//!
//! This is where user code is called, one callback at a time. What a callback
//! asks for stands in the transport's [`Core`] when it returns; the work loop
//! then looks at the state again before it does anything else.

mod ancillary;
mod draining;
mod establish;
mod producers;

use std::any::Any;
use std::borrow::Cow;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use bowline_protocol::{
    AfterReadClosed, CloseReason, Context, ProducerKind, ProducerRef, Protocol, Transport,
};
use bowline_reactor::{
    DelayedCall, Descriptor, DrainRound, Next, Panic, Reactor, Readiness, catch_panic,
};

use crate::connector::ConnectionEnded;
use crate::file_descriptor::{Core, FileDescriptor, State, flag, pending};
use crate::handoff::{DetachRequest, Detached, ProtocolCall};
use crate::log;
use crate::shared::{Ledger, READ_BYTES, ReadBuffers, TransportBudgets};
use crate::socket::Remains;
use crate::socket::private::Sealed;

pub(crate) use self::draining::Draining;
pub use self::establish::StreamTransport;
#[cfg(feature = "testing")]
pub(crate) use self::establish::private;
pub(crate) use self::establish::{
    DescriptorTransport, HostName, Names, Source, connect_protocol, establish_with, unix_address,
};
use self::producers::Tell;

/// The first and the longest wait after the kernel said later without saying
/// when (`ETOOMANYREFS`, `ENOBUFS`).
const FIRST_RETRY: Duration = Duration::from_millis(1);
const LONGEST_RETRY: Duration = Duration::from_millis(50);

/// What a read counts at the least: about the bytes that could be copied in the
/// time of its system call and callback.
const LEAST_READ_COST: usize = 8_192;

/// When a pull producer that wrote nothing is asked again.
const ASK_AGAIN_AFTER: Duration = Duration::from_millis(10);

/// How long a reset waits for a reader who has paused with something unread and
/// takes none of it.
const RESET_PATIENCE: Duration = Duration::from_millis(250);

/// A transport and the protocol it feeds.
pub(crate) struct Connection<F, P> {
    transport: F,
    /// Invariant: there until the connection is detached, and then it is
    /// removed.
    protocol: Option<P>,
}

/// Why a connection is at work.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Visit {
    /// The reactor's call, which comes once per turn.
    Turn,
    /// The same, with one read done that brought so many bytes.
    AfterRead(usize),
    /// The first, in the turn that accepted the connection, which has reported
    /// nothing yet: one read, of what the peer may have sent already.
    First,
    /// Callbacks or timers asked for it. That happens any number of times per
    /// turn, so nothing is read: two greedy connections that write to each
    /// other would otherwise keep the turn to themselves.
    Extra,
}

impl<F, P> Connection<F, P>
where
    F: FileDescriptor + Transport,
    P: Protocol<F>,
{
    /// What most events ask for: one read, whose callback leaves nothing but
    /// bytes to be sent, and one send that takes them all. Anything else is
    /// left to [`work`](Self::work).
    #[inline(always)]
    fn usual_work(&mut self, reactor: &mut Reactor) -> Next {
        let core = self.transport.core();
        if core.may_only_read() && !core.shared.is_held(core.token) {
            let bytes = self.read(reactor);
            let core = self.transport.core();
            if core.may_only_write() && !core.buffer.is_empty() {
                self.transport.do_write();
            }
            if self.transport.core().is_at_rest() {
                return Next::Keep;
            }
            return self.work(reactor, Visit::AfterRead(bytes));
        }
        self.work(reactor, Visit::Turn)
    }

    /// Does what there is to do, within this turn's budget.
    #[inline(never)]
    fn work(&mut self, reactor: &mut Reactor, visit: Visit) -> Next {
        let TransportBudgets {
            mut read_bytes,
            mut writes,
            mut notices,
            ..
        } = self.transport.core().shared.budgets.get();
        match visit {
            Visit::Turn => {}
            Visit::AfterRead(bytes) => read_bytes = read_bytes.saturating_sub(cost(bytes)),
            Visit::First => read_bytes = 1,
            Visit::Extra => read_bytes = 0,
        }
        let mut received = match visit {
            Visit::AfterRead(bytes) => bytes,
            _ => 0,
        };
        loop {
            let core = self.transport.core();
            if core.shared.is_held(core.token) {
                break;
            }
            if core.has(pending::ANY) {
                if notices == 0 {
                    break;
                }
                notices -= 1;
                if self.deliver(reactor) {
                    return Next::Remove;
                }
            } else if core.may_read() && read_bytes > 0 {
                let bytes = if core.has(flag::PUSHED_BACK) {
                    self.read_pushed_back(reactor)
                } else {
                    self.read(reactor)
                };
                read_bytes = read_bytes.saturating_sub(cost(bytes));
                received |= bytes;
            } else if !core.buffer.is_empty() && core.may_write() && writes > 0 {
                writes -= 1;
                self.transport.do_write();
            } else if visit == Visit::Extra && core.may_read() {
                // Read in the next turn, and if it is broken before it ends.
                break;
            } else if core.may_drop() && read_bytes > 0 {
                read_bytes = read_bytes.saturating_sub(cost(self.drop_unread()));
            } else if !core.has(flag::UNSETTLED)
                || !self.finish(reactor) && !self.take_drain_step(reactor, visit, received)
            {
                break;
            }
        }
        self.settle(reactor)
    }

    /// Takes the next step of closing, when everything was sent.
    fn finish(&mut self, reactor: &mut Reactor) -> bool {
        self.forget_spent_producer(reactor);
        let queued = self.transport.queued_descriptors();
        let core = self.transport.core_mut();
        if core.has(flag::FAILED) && !core.may_read() && !core.is_ended() {
            core.flags &= !flag::FAILED;
            if let Some(error) = core.socket.take_error() {
                let remains = core.socket.remains(&error);
                core.break_off(CloseReason::Lost(error), remains);
                return true;
            }
        }
        if core.is_broken() && !core.is_ended() {
            return self.finish_broken(reactor);
        }
        let is_drained = core.buffer.is_empty() && !core.has_producer();
        match core.state() {
            State::Closing | State::WriteClosing if is_drained && queued > 0 => {
                core.end(CloseReason::FileDescriptorOverrun {
                    descriptors: queued,
                });
            }
            State::Closing if is_drained => self.linger_or_end(reactor),
            State::WriteClosing if is_drained => {
                if let Err(error) = core.socket.shutdown_write() {
                    // The peer is gone, which the read side is going to say.
                    log::debug!(target: log::TRANSPORT, "{}: shutdown: {error}", core.token);
                }
                core.set_state(State::WriteClosed);
                core.flags |= pending::WRITE_CLOSED;
            }
            State::WriteClosed if core.has(flag::READ_ENDED) => core.end(CloseReason::Done),
            _ => return false,
        }
        true
    }

    /// Everything was sent. A close would be a reset now if something is unread, or when
    /// something comes later, and destroy what is still on its way to the peer.
    fn linger_or_end(&mut self, reactor: &mut Reactor) {
        let core = self.transport.core_mut();
        let lingering = core.cold_ref().and_then(|cold| cold.lingering);
        let Some(lingering) = lingering else {
            return core.end(CloseReason::Done);
        };
        // What others hold too is theirs to shut.
        let is_over = core.has(flag::READ_ENDED | flag::SHARED) || core.has_lent.get();
        if is_over || core.socket.shutdown_write().is_err() {
            return core.end(CloseReason::Done);
        }
        core.set_state(State::Lingering);
        core.flags |= flag::READABLE;
        let call = reactor.notify_later(lingering.time, core.token);
        let cold = core.cold();
        cold.close_within = None;
        if let Some(earlier) = cold.close_deadline.replace(call) {
            // It was in time.
            let _ = earlier.cancel(reactor);
        }
    }

    /// Reads once of what nobody wants any more; how many bytes.
    #[cold]
    fn drop_unread(&mut self) -> usize {
        let core = self.transport.core_mut();
        let mut buffers = core.shared.take_buffers();
        let read = core.socket.recv(&mut buffers, READ_BYTES);
        core.shared.return_buffers(buffers);
        match read {
            Ok(taken) if taken.bytes > 0 => {
                if let Some(lingering) = &mut core.cold().lingering {
                    lingering.bytes = lingering.bytes.saturating_sub(taken.bytes);
                    if lingering.bytes == 0 {
                        core.end(CloseReason::Done);
                    }
                }
                taken.bytes
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                core.flags &= !flag::READABLE;
                0
            }
            Err(error) => {
                core.end(CloseReason::Lost(error));
                0
            }
            Ok(_) => {
                core.end(CloseReason::Done);
                0
            }
        }
    }

    /// Ends a connection over which nothing more can be sent, if what had arrived was
    /// delivered.
    #[cold]
    fn finish_broken(&mut self, reactor: &mut Reactor) -> bool {
        let core = self.transport.core_mut();
        if core.may_read() {
            // Not read out: this turn's budget is.
            return false;
        }
        if core.has(flag::READABLE) && core.is_open_for_reading() {
            let unread = core.undelivered();
            let remains = core.remains();
            if unread > 0 {
                // A pause may last for ever. Who only takes a breath can have the rest
                // of what a reset has cut off; nothing else waits for its reader in vain.
                if remains == Some(Remains::Pieces) && core.cold().patience.is_none() {
                    let call = reactor.notify_later(RESET_PATIENCE, core.token);
                    core.cold().patience = Some((call, unread));
                }
                return false;
            }
            if remains == Some(Remains::Everything) {
                self.read_ended(reactor);
            }
        }
        self.transport.core_mut().end_broken();
        true
    }

    /// Looks again at a reset that waits for a reader.
    fn patience_ends(&mut self, unread_before: usize) {
        let core = self.transport.core_mut();
        if core.is_broken() && !core.may_read() && core.undelivered() >= unread_before {
            core.end_broken();
        }
    }

    /// Makes sure that somebody comes back for what is left.
    #[inline]
    fn settle(&mut self, reactor: &mut Reactor) -> Next {
        let core = self.transport.core_mut();
        if core.has(flag::UNWATCHED) {
            core.watch_if_waiting(reactor);
        }
        let wants_write = !core.buffer.is_empty();
        if wants_write
            && !core.has(flag::WRITABLE | flag::WATCHES_WRITING)
            && core.state() != State::Lost
        {
            // Once in the life of a connection that ever fell behind. What has
            // become writable meanwhile is reported again.
            match core.socket.watch_writing(reactor, core.token) {
                Ok(()) => core.flags |= flag::WATCHES_WRITING,
                Err(error) => core.end(CloseReason::Lost(error)),
            }
        }
        if core.has(flag::UNSETTLED) {
            schedule(core, reactor);
        }
        let has_more = core.has(pending::ANY)
            || core.may_read()
            || core.may_drop()
            || (wants_write && core.may_write());
        if has_more { Next::Again } else { Next::Keep }
    }

    /// One read, and its callbacks; answers how many bytes it brought.
    #[inline(always)]
    fn read(&mut self, reactor: &mut Reactor) -> usize {
        let mut buffers = self.transport.core().shared.take_buffers();
        let bytes = self.read_into(reactor, &mut buffers);
        self.transport.core().shared.return_buffers(buffers);
        bytes
    }

    #[inline(always)]
    fn read_into(&mut self, reactor: &mut Reactor, buffers: &mut ReadBuffers) -> usize {
        match self.transport.do_read(buffers) {
            Ok(received) if received.bytes == 0 => {
                // Credentials, where the socket asks for them, come beside the
                // end too, and descriptors never without a byte.
                buffers.ancillary.clear();
                self.read_ended(reactor);
                0
            }
            Ok(received) => {
                let core = self.transport.core_mut();
                let is_short = received.bytes < core.read_limit as usize;
                let reads_on = core.has(flag::READ_ON | flag::UNWATCHED);
                if is_short && !received.had_ancillary && !reads_on {
                    core.flags &= !flag::READABLE;
                }
                if received.had_ancillary {
                    self.deliver_ancillary(reactor, buffers, received.bytes, received.is_truncated);
                } else if let Some(protocol) = &mut self.protocol {
                    let mut cx = Context::new(&mut self.transport, reactor);
                    protocol.data_received(&mut cx, buffers.data.get(received.bytes));
                }
                received.bytes
            }
            Err(error) => {
                self.read_failed(reactor, error);
                0
            }
        }
    }

    #[cold]
    fn read_pushed_back(&mut self, reactor: &mut Reactor) -> usize {
        let data = self.transport.core_mut().take_pushed_back();
        if let Some(protocol) = &mut self.protocol {
            let mut cx = Context::new(&mut self.transport, reactor);
            protocol.data_received(&mut cx, &data);
        }
        data.len()
    }

    #[cold]
    fn read_failed(&mut self, reactor: &mut Reactor, error: std::io::Error) {
        let core = self.transport.core_mut();
        if error.kind() == std::io::ErrorKind::WouldBlock {
            core.flags &= !flag::READABLE;
        } else if core.socket.remains(&error) == Remains::Everything {
            // Told once, behind the last byte: a UNIX peer has closed, and did not
            // read all that we sent. The end is there nevertheless.
            if !core.is_broken() {
                core.break_off(CloseReason::Lost(error), Remains::Everything);
            }
            self.read_ended(reactor);
        } else {
            core.end(CloseReason::Lost(error));
        }
    }

    #[cold]
    fn read_ended(&mut self, reactor: &mut Reactor) {
        let core = self.transport.core_mut();
        core.flags |= flag::READ_ENDED | flag::NOT_READING | flag::UNSETTLED;
        core.flags &= !flag::READABLE;
        if core.remains() == Some(Remains::Pieces) {
            // Once a reset was told, all that TCP says is that nothing more comes.
            return;
        }
        let Some(protocol) = &mut self.protocol else {
            return;
        };
        let mut cx = Context::new(&mut self.transport, reactor);
        let after = protocol.read_connection_lost(&mut cx);
        let core = self.transport.core_mut();
        if core.is_broken() {
            // `finish` ends it, and says why.
            return;
        }
        match after {
            AfterReadClosed::EndConnection => core.end(CloseReason::Done),
            AfterReadClosed::LoseConnection => core.lose_connection(),
            // Two closed halves are the end; `finish` sees to it.
            AfterReadClosed::KeepWriting => {}
        }
        if core.state() == State::WriteClosed {
            core.end(CloseReason::Done);
        }
    }

    /// Tells user code the first of what is pending. True when the connection
    /// has ended and was told so.
    #[cold]
    fn deliver(&mut self, reactor: &mut Reactor) -> bool {
        let core = self.transport.core_mut();
        let told = core.flags & pending::ANY;
        let first = told & told.wrapping_neg();
        // The end overtakes all but the beginning: nothing else is of any use.
        if core.has(pending::END) && first != pending::CONNECTION_MADE {
            self.lose(reactor);
            return true;
        }
        core.flags &= !first;
        match first {
            pending::CONNECTION_MADE => {
                if let Some(protocol) = &mut self.protocol {
                    protocol.connection_made(&mut Context::new(&mut self.transport, reactor));
                }
            }
            pending::STOP_REJECTED => self.stop_rejected(reactor),
            pending::PAUSE_PRODUCER => {
                self.tell_producer(reactor, Tell::Pause);
            }
            pending::RESUME_PRODUCER => self.resume_producer(reactor),
            pending::DESCRIPTORS_SENT => {
                let count = std::mem::take(&mut core.cold().descriptors_left);
                if let Some(protocol) = &mut self.protocol {
                    protocol
                        .descriptors_sent(&mut Context::new(&mut self.transport, reactor), count);
                }
            }
            pending::WRITE_CLOSED => {
                if let Some(protocol) = &mut self.protocol {
                    protocol.write_connection_lost(&mut Context::new(&mut self.transport, reactor));
                }
            }
            pending::READING_RESUMED => {
                if let Some(protocol) = &mut self.protocol
                    && self.transport.core().is_reading()
                {
                    protocol.reading_resumed(&mut Context::new(&mut self.transport, reactor));
                }
            }
            pending::DRAINING => self.tell_draining(reactor),
            pending::REATTACHED => {
                if let Some(protocol) = &mut self.protocol {
                    protocol.connection_reattached(&mut Context::new(&mut self.transport, reactor));
                }
            }
            _ => debug_assert!(false, "every bit is named"),
        }
        false
    }

    /// The end: stops the producer, closes the socket, tells the protocol.
    ///
    /// Each step is done once even when one of the callbacks panics and this
    /// is entered again.
    fn lose(&mut self, reactor: &mut Reactor) {
        let core = self.transport.core_mut();
        core.set_state(State::Lost);
        if core.has_producer() {
            core.flags &= !flag::HAS_PRODUCER;
            if let Some(registration) = core.cold().registration.take()
                && let Some(producer) = registration.producer
            {
                self.call_producer(reactor, producer, Tell::Stop);
            }
        }
        self.stop_rejected(reactor);
        self.close_socket(reactor);
        let core = self.transport.core_mut();
        core.flags &= !pending::END;
        let reason = match core.cold_ref() {
            Some(_) => core.cold().reason.take().unwrap_or(CloseReason::Done),
            None => CloseReason::Done,
        };
        // Nothing that is asked for the log's sake keeps it from being told.
        let _ = catch_panic(|| self.log_end(&reason));
        if let Some(protocol) = &mut self.protocol {
            protocol.connection_lost(&mut Context::new(&mut self.transport, reactor), &reason);
        }
        // Only now: the protocol could reclaim them.
        self.transport.discard_descriptors();
        let core = self.transport.core_mut();
        if core.cold_ref().is_some() {
            // The protocol was told the last there is.
            let rejected = &mut core.cold().rejected;
            rejected.retain(|producer| !matches!(producer, ProducerRef::Protocol));
        }
        self.stop_rejected(reactor);
        self.tell_connector(reactor, reason);
    }

    fn close_socket(&mut self, reactor: &mut Reactor) {
        let queued = self.transport.queued_descriptors();
        let core = self.transport.core_mut();
        if !core.buffer.is_empty() || queued > 0 {
            let unsent = core.buffer.take().len();
            let cold = core.cold();
            cold.unsent.0 += unsent;
            cold.unsent.1 += queued;
        }
        let is_abort = !core.has(flag::SHARED)
            && matches!(
                core.cold_ref().and_then(|cold| cold.reason.as_ref()),
                Some(CloseReason::Aborted | CloseReason::CloseTimedOut)
            );
        // What others may hold too is theirs to read.
        let is_ours_to_read = !core.has(flag::SHARED | flag::READ_ENDED) && !core.has_lent.get();
        if core.socket.is_open() {
            // Deregistered before it is closed: others may hold the socket too,
            // and epoll would report it for as long as they do.
            core.unwatch(reactor);
            if is_abort {
                core.socket.prepare_abort();
            }
            Ledger::add(&core.shared.ledger.closed, 1);
            if is_ours_to_read {
                self.transport.disarm_unread();
            } else {
                self.transport.leave_unread();
            }
        }
        let core = self.transport.core_mut();
        core.socket.close();
        if core.cold_ref().is_some() {
            let cold = core.cold();
            for call in [
                cold.close_deadline.take(),
                cold.retry.take(),
                cold.ask_again.take(),
                cold.patience.take().map(|(call, _)| call),
                cold.draining.take().and_then(Draining::into_look),
            ]
            .into_iter()
            .flatten()
            {
                // One of them may be what ran.
                let _ = call.cancel(reactor);
            }
        }
    }

    fn log_end(&self, reason: &CloseReason) {
        let core = self.transport.core();
        let (bytes, descriptors) = core.cold_ref().map_or((0, 0), |cold| cold.unsent);
        log::debug!(
            target: log::TRANSPORT,
            "{} {},{},{}: {reason}; {bytes} bytes and {descriptors} descriptors unsent",
            core.token,
            self.protocol_name(),
            F::Socket::KIND,
            core.socket.peer(),
        );
    }

    fn tell_connector(&mut self, reactor: &mut Reactor, reason: CloseReason) {
        let core = self.transport.core_mut();
        if core.cold_ref().is_some_and(|cold| cold.connector.is_some())
            && let Some(connector) = core.cold().connector.take()
        {
            reactor.enter(connector, move |connector, reactor| match connector {
                Some(connector) => connector.request(reactor, &mut ConnectionEnded { reason }),
                None => Next::Keep,
            });
        }
    }

    fn protocol_name(&self) -> Cow<'_, str> {
        self.protocol
            .as_ref()
            .map_or(Cow::Borrowed("-"), |it| log::name(|| it.log_prefix()))
    }

    /// Takes the connection apart, if it is open.
    fn detach(&mut self, reactor: &mut Reactor) -> Option<Detached<P>> {
        let core = self.transport.core_mut();
        if matches!(core.state(), State::Lingering | State::Ending | State::Lost) {
            return None;
        }
        if !core.socket.is_open() {
            return None;
        }
        core.unwatch(reactor);
        let host = core.socket.host();
        let peer = core.socket.peer();
        let fd = core.socket.detach()?;
        let mut kept = core.kept();
        if let Some(deadline) = core.cold_ref().and_then(|cold| cold.close_deadline) {
            let due = deadline.due(reactor);
            kept.close_within = due.map(|due| due.saturating_duration_since(reactor.now()));
        }
        core.set_state(State::Lost);
        Ledger::add(&core.shared.ledger.closed, 1);
        let descriptors = self.transport.take_unsent_descriptors();
        kept.settings = self.transport.take_settings();
        let core = self.transport.core_mut();
        let unsent = core.buffer.take();
        let unread = core.take_unread();
        let registration = core.cold().registration.take();
        let producer =
            registration.and_then(|registration| Some((registration.producer?, registration.kind)));
        self.close_socket(reactor);
        self.tell_connector(reactor, CloseReason::Done);
        Some(Detached {
            fd,
            protocol: self.protocol.take()?,
            unsent,
            unread,
            descriptors,
            producer,
            host,
            peer,
            kept,
        })
    }
}

/// What a read takes of the turn's budget.
fn cost(bytes: usize) -> usize {
    bytes.max(LEAST_READ_COST)
}

/// Notes what was reported.
#[inline(never)]
fn latch<S: crate::Socket>(core: &mut Core<S>, readiness: Readiness) {
    let closed = Readiness::READ_CLOSED | Readiness::ERROR;
    if readiness.intersects(Readiness::READABLE | closed) {
        core.flags |= flag::READABLE;
    }
    if readiness.intersects(closed | Readiness::PRIORITY) {
        core.flags |= flag::READ_ON;
    }
    if readiness.intersects(Readiness::ERROR) {
        core.flags |= flag::FAILED | flag::UNSETTLED;
    } else if readiness.intersects(Readiness::READ_CLOSED) {
        core.flags |= flag::END_ARRIVED;
    }
    if readiness.intersects(Readiness::WRITABLE | Readiness::WRITE_CLOSED | Readiness::ERROR) {
        core.flags |= flag::WRITABLE;
    }
}

/// Sets the timers that the transport asked for.
#[cold]
fn schedule<S: crate::Socket>(core: &mut Core<S>, reactor: &mut Reactor) {
    let token = core.token;
    let waits = core.has(flag::WAITS_FOR_TIMER);
    // A broken connection has yet to end, once it is read out.
    if core.state() == State::Open && !core.is_broken() && !core.has(flag::FAILED | flag::DRAINING)
    {
        core.flags &= !flag::UNSETTLED;
    }
    let cold = core.cold();
    if waits && cold.retry.is_none() {
        cold.retry_after = (cold.retry_after * 2).clamp(FIRST_RETRY, LONGEST_RETRY);
        cold.retry = Some(reactor.notify_later(cold.retry_after, token));
    }
    if let Some(within) = cold.close_within.take() {
        if let Some(earlier) = cold.close_deadline.take() {
            // It may have run.
            let _ = earlier.cancel(reactor);
        }
        cold.close_deadline = Some(reactor.notify_later(within, token));
    }
}

impl<F, P> Descriptor for Connection<F, P>
where
    F: FileDescriptor + Transport,
    P: Protocol<F>,
{
    #[inline]
    fn ready(&mut self, reactor: &mut Reactor, readiness: Readiness) -> Next {
        let core = self.transport.core_mut();
        if readiness == Readiness::READABLE {
            core.flags |= flag::READABLE;
        } else {
            latch(core, readiness);
        }
        self.usual_work(reactor)
    }

    fn attend(&mut self, reactor: &mut Reactor) -> Next {
        let core = self.transport.core();
        let visit = match core.has(flag::UNWATCHED) && core.has(pending::CONNECTION_MADE) {
            true => Visit::First,
            false => Visit::Extra,
        };
        self.work(reactor, visit)
    }

    fn timer_fired(&mut self, reactor: &mut Reactor, call: DelayedCall) -> Next {
        let core = self.transport.core_mut();
        let cold = core.cold();
        let mut is_retry = false;
        if cold.retry == Some(call) {
            cold.retry = None;
            core.flags &= !flag::WAITS_FOR_TIMER;
            core.flags |= flag::WRITABLE;
            is_retry = true;
        } else if cold.ask_again == Some(call) {
            cold.ask_again = None;
            // It may have been set for a producer that another has followed.
            let is_pull = cold
                .registration
                .as_ref()
                .is_some_and(|registration| registration.kind == ProducerKind::Pull);
            if is_pull && core.buffer.is_empty() {
                core.flags |= pending::RESUME_PRODUCER;
            }
        } else if cold.close_deadline == Some(call) {
            cold.close_deadline = None;
            core.end(match core.state() {
                // All of it was sent.
                State::Lingering => CloseReason::Done,
                _ => CloseReason::CloseTimedOut,
            });
        } else if let Some((_, unread)) = cold.patience.take_if(|(set, _)| *set == call) {
            self.patience_ends(unread);
        } else if cold.draining.as_ref().is_some_and(|it| it.looks_at(call)) {
            self.look_whether_idle(reactor);
        }
        let next = self.work(reactor, Visit::Extra);
        let core = self.transport.core_mut();
        if is_retry && !core.has(flag::WAITS_FOR_TIMER) {
            core.cold().retry_after = Duration::ZERO;
        }
        next
    }

    fn request(&mut self, reactor: &mut Reactor, request: &mut dyn Any) -> Next {
        if let Some(request) = request.downcast_mut::<DetachRequest<P>>() {
            request.result = self.detach(reactor);
            if request.result.is_some() {
                return Next::Remove;
            }
            request.is_lost = true;
        } else if let Some(call) = request.downcast_mut::<ProtocolCall<F, P>>()
            && !self.transport.core().is_ended()
            && let Some(protocol) = &mut self.protocol
            && let Some(call) = call.call.take()
        {
            call(protocol, &mut Context::new(&mut self.transport, reactor));
        }
        self.work(reactor, Visit::Extra)
    }

    fn panicked(&mut self, reactor: &mut Reactor, panic: Panic) -> Next {
        let core = self.transport.core_mut();
        if core.state() == State::Lost && !core.has(pending::END) {
            // It was connection_lost itself, or what followed.
            self.transport.discard_descriptors();
            self.tell_connector(reactor, CloseReason::Panicked(panic));
            return Next::Remove;
        }
        // The failure of a callback wins over what it asked for.
        core.end(CloseReason::Done);
        core.cold().reason = Some(CloseReason::Panicked(panic));
        core.flags = core.flags & !pending::ANY | pending::END;
        self.work(reactor, Visit::Extra)
    }

    fn drain(&mut self, reactor: &mut Reactor, round: DrainRound) -> Next {
        self.begin_draining(reactor, round)
    }

    fn shutdown(&mut self, reactor: &mut Reactor) {
        self.transport.core_mut().end(CloseReason::ReactorStopped);
        // connection_made first, if it was not told yet.
        while !self.deliver(reactor) {}
    }

    fn source(&self) -> Option<BorrowedFd<'_>> {
        let core = self.transport.core();
        match core.has(flag::UNWATCHED) {
            true => None,
            false => core.socket.source(),
        }
    }

    fn facet(&mut self) -> &mut dyn Any {
        &mut self.transport
    }

    fn log_prefix(&self) -> Cow<'_, str> {
        let peer = self.transport.core().socket.peer();
        Cow::Owned(format!(
            "{},{},{peer}",
            self.protocol_name(),
            F::Socket::KIND
        ))
    }
}

#[cfg(all(test, target_pointer_width = "64"))]
mod tests {
    use super::Connection;
    use crate::{TcpStream, UnixStream};

    // `benches/README.md` says what each byte is for.
    #[test]
    fn a_connection_is_as_small_as_its_parts() {
        assert_eq!(size_of::<Connection<TcpStream, ()>>(), 144);
        assert_eq!(size_of::<Connection<UnixStream, ()>>(), 112);
    }
}
