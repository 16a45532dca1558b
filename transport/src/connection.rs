//! A transport with its protocol, which the reactor drives.
//!
//! User code is called here, one callback at a time. A callback's requests are recorded
//! in the transport's [`Link`]. When it has returned, the work loop looks at that state
//! before it does anything else.

mod ancillary;
mod describing;
mod draining;
mod producers;

use std::any::{Any, TypeId};
use std::borrow::Cow;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use bowline_protocol::{
    AfterReadClosed, CloseReason, Context, NotSent, ProducerKind, ProducerRef, Protocol, Remains,
};
use bowline_reactor::{
    DelayedCall, Description, Descriptor, DrainRound, Next, Panic, Reactor, Readiness, catch_panic,
};

use crate::connector::{ConnectionEnded, ConnectorControl};
use crate::descriptor_queue::UnsentDescriptors;
use crate::detach::{DetachRequest, Detached, ProtocolCall};
use crate::error::{CallError, DetachError};
use crate::file_descriptor::{FileDescriptor, Received, is_same};
use crate::layer_state::{LayerState, Stays};
use crate::link::{Awaited, Flags, Kept, Link, State};
use crate::log;
use crate::shared::{Ledger, ReadBuffers, TransportBudgets};
use crate::stream::{Stream, StreamTransport};

pub(crate) use self::draining::Draining;
use self::producers::Tell;

/// The first and the longest wait after an error that no event ends (`ETOOMANYREFS`,
/// `ENOBUFS`).
const FIRST_RETRY: Duration = Duration::from_millis(1);
const LONGEST_RETRY: Duration = Duration::from_millis(50);

/// How many refusals in a row are logged as a warning. With those waits in between, a
/// second has passed.
const LASTING_REFUSALS: u32 = 26;

/// The least that a read counts. It is about the number of bytes that could be copied
/// in the time of a system call and a callback.
const LEAST_READ_COST: usize = 8_192;

/// How long to wait before a pull producer that wrote nothing is asked again.
const ASK_AGAIN_AFTER: Duration = Duration::from_millis(10);

/// A transport and the protocol it feeds.
pub(crate) struct Connection<T, P> {
    pub(crate) transport: T,
    /// Invariant: `Some` until the connection is detached, and then it is removed.
    pub(crate) protocol: Option<P>,
}

/// Why a connection is at work.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Visit {
    /// The reactor calls, once per turn.
    Turn,
    /// As `Turn`, after one read that brought this many bytes.
    AfterRead(usize),
    /// The first visit, in the turn that accepted the connection. No event has come
    /// yet. It reads once, since the peer may have sent something already.
    First,
    /// A callback or a timer asked for it. This may happen any number of times per
    /// turn, so it does not read. Otherwise two greedy connections that write to each
    /// other could keep the turn to themselves.
    Extra,
}

impl<T, P> Connection<T, P>
where
    T: StreamTransport,
    P: Protocol<T>,
{
    /// Handles the usual event: one read, whose callback leaves only bytes to send, and
    /// one send that takes all of them. Leaves anything else to [`work`](Self::work).
    #[inline(always)]
    fn usual_work(&mut self, reactor: &mut Reactor) -> Next {
        let link = &self.transport.stream().link;
        if link.may_only_read() && !link.shared.is_held(link.token) {
            let bytes = self.read(reactor);
            let stream = self.transport.stream_mut();
            if stream.link.may_only_write() && !stream.buffer.is_empty() {
                stream.do_write();
            }
            if stream.link.is_at_rest() && stream.buffer.is_empty() {
                return Next::Keep;
            }
            return self.work(reactor, Visit::AfterRead(bytes));
        }
        self.work(reactor, Visit::Turn)
    }

    /// Does everything that is left to do, within this turn's budget.
    #[inline(never)]
    fn work(&mut self, reactor: &mut Reactor, visit: Visit) -> Next {
        let TransportBudgets {
            mut read_bytes,
            mut writes,
            mut notices,
            ..
        } = self.transport.stream().link.shared.budgets.get();
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
            let stream = self.transport.stream_mut();
            let link = &stream.link;
            if link.shared.is_held(link.token) {
                break;
            }
            if link.may_tell() {
                if notices == 0 {
                    break;
                }
                notices -= 1;
                if self.deliver(reactor) {
                    return Next::Remove;
                }
            } else if link.may_read() && read_bytes > 0 {
                let bytes = if link.has(Flags::PUSHED_BACK) && link.is_established() {
                    self.read_pushed_back(reactor)
                } else {
                    self.read(reactor)
                };
                read_bytes = read_bytes.saturating_sub(cost(bytes));
                received |= bytes;
            } else if link.may_flush() && writes > 0 {
                writes -= 1;
                stream.flush();
            } else if !stream.buffer.is_empty() && link.may_write() && writes > 0 {
                writes -= 1;
                stream.do_write();
            } else if visit == Visit::Extra && link.may_read() {
                // It is read in the next turn. A broken connection is read before it
                // ends.
                break;
            } else if link.may_drop() && read_bytes > 0 {
                read_bytes = read_bytes.saturating_sub(cost(self.drop_unread()));
            } else if !link.has(Flags::UNSETTLED)
                || !self.finish(reactor, writes > 0)
                    && !self.take_drain_step(reactor, visit, received)
            {
                break;
            }
        }
        self.settle(reactor)
    }

    /// Takes the next step of closing, once everything was sent. `may_send` says that
    /// the turn's budget is not spent.
    fn finish(&mut self, reactor: &mut Reactor, may_send: bool) -> bool {
        self.forget_spent_producer(reactor);
        let stream = self.transport.stream_mut();
        let link = &mut stream.link;
        if link.has(Flags::FAILED) && !link.may_read() && !link.is_ended() {
            link.clear(Flags::FAILED);
            if let Some(error) = stream.layer.socket().take_error() {
                let remains = stream.layer.socket().remains(&error);
                stream.break_off(CloseReason::Lost(error), remains);
                return true;
            }
        }
        if link.is_broken() && !link.is_ended() {
            return self.finish_broken(reactor);
        }
        if !link.is_established() {
            return self.finish_in_handshake();
        }
        if !stream.buffer.is_empty() || link.has_producer() {
            return false;
        }
        let queued = stream.layer.queued_descriptors();
        match link.state() {
            State::Closing | State::WriteClosing if queued > 0 => {
                link.end(CloseReason::FileDescriptorOverrun {
                    descriptors: queued,
                });
            }
            State::Closing if stream.layer.closing(link) => self.linger_or_end(reactor),
            // The layer's last bytes leave first.
            State::Closing => return may_send && link.may_flush(),
            State::WriteClosing if stream.layer.half_closing(link) => {
                if let Err(error) = stream.layer.socket_mut().shutdown_write() {
                    // The peer is gone. A read is going to report that.
                    log::debug!(target: log::TRANSPORT, "{}: shutdown: {error}", link.token);
                }
                link.set_state(State::WriteClosed);
                link.set(Flags::WRITE_CLOSED);
                stream.layer.socket_mut().release_writing(reactor);
            }
            State::WriteClosing => return may_send && link.may_flush(),
            State::WriteClosed if !link.is_open_for_reading() => link.end(CloseReason::Done),
            _ => return false,
        }
        true
    }

    /// Ends a connection that is to close and has nothing to send. If something was
    /// written, it waits for the handshake, whose time the layer limits.
    #[cold]
    fn finish_in_handshake(&mut self) -> bool {
        let stream = self.transport.stream_mut();
        let has_to_send = !stream.buffer.is_empty() || stream.link.has_producer();
        if stream.link.state() == State::Closing && !has_to_send {
            let descriptors = stream.layer.queued_descriptors();
            stream.link.end(match descriptors {
                0 => CloseReason::Done,
                _ => CloseReason::FileDescriptorOverrun { descriptors },
            });
        }
        stream.link.is_ended()
    }

    /// Ends the connection, now that everything was sent, or begins to linger. If
    /// something is unread, or comes later, a close would be a reset, and destroy bytes
    /// that are still on their way to the peer.
    fn linger_or_end(&mut self, reactor: &mut Reactor) {
        let Stream { link, layer, .. } = self.transport.stream_mut();
        let lingering = link.cold_ref().and_then(|cold| cold.lingering);
        // Where no reset can destroy the peer's bytes, there is nothing to wait for.
        let Some(lingering) = lingering.filter(|_| layer.socket().can_be_reset()) else {
            return link.end(CloseReason::Done);
        };
        // A socket that others hold is not ours to shut down.
        let is_over = link.has(Flags::READ_ENDED | Flags::SHARED) || link.has_lent.get();
        if is_over || layer.socket_mut().shutdown_write().is_err() {
            return link.end(CloseReason::Done);
        }
        link.set_state(State::Lingering);
        link.set(Flags::READABLE);
        let call = reactor.notify_later(lingering.time, link.token);
        let cold = link.cold();
        cold.close_within = None;
        if let Some(earlier) = cold.close_deadline.replace(call) {
            // The connection closed in time.
            let _ = earlier.cancel(reactor);
        }
    }

    /// Reads bytes once that nobody wants any more, and returns how many.
    #[cold]
    fn drop_unread(&mut self) -> usize {
        let Stream { link, layer, .. } = self.transport.stream_mut();
        let mut buffers = link.shared.take_buffers();
        // Their plain bytes are of no interest, so layers are left out.
        let read = bottom_of(layer).do_read(link, &mut buffers, ReadBuffers::CAPACITY);
        link.close_unclaimed(buffers.descriptors().drain(..));
        link.shared.return_buffers(buffers);
        match read {
            Ok(received) if received.is_end() => link.end(CloseReason::Done),
            Ok(received) => {
                if received.bytes == 0 && received.is_drained() {
                    link.clear(Flags::READABLE);
                }
                if let Some(lingering) = &mut link.cold().lingering {
                    lingering.bytes = lingering.bytes.saturating_sub(received.bytes);
                    if lingering.bytes == 0 {
                        link.end(CloseReason::Done);
                    }
                }
                return received.bytes;
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                link.clear(Flags::READABLE);
            }
            Err(error) => link.end(CloseReason::Lost(error)),
        }
        0
    }

    /// Ends a connection that can send nothing more, once everything that had arrived
    /// was delivered.
    #[cold]
    fn finish_broken(&mut self, reactor: &mut Reactor) -> bool {
        let stream = self.transport.stream_mut();
        if stream.link.may_read() {
            // More is unread, but this turn's budget is spent.
            return false;
        }
        if stream.link.is_open_for_reading() {
            let is_readable = stream.link.has(Flags::READABLE);
            if is_readable && stream.undelivered() > 0 || self.holds_back() {
                return self.tell_broken(reactor);
            }
            let stream = self.transport.stream();
            let has_end = stream.link.remains() == Some(Remains::Everything);
            if is_readable && has_end && !stream.layer.has_own_end() {
                self.read_ended(reactor);
            }
        }
        self.transport.stream_mut().link.end_broken();
        true
    }

    /// Whether the protocol holds bytes that it delivers to itself after the pause.
    fn holds_back(&mut self) -> bool {
        let is_paused = self.transport.stream().link.has(Flags::PAUSED);
        let protocol = self.protocol.as_mut().filter(|_| is_paused);
        protocol.is_some_and(Protocol::<T>::has_undelivered)
    }

    /// Tells a paused protocol, once, that the end waits for it to read. A pause may
    /// last for ever.
    fn tell_broken(&mut self, reactor: &mut Reactor) -> bool {
        let broken = self.transport.stream_mut().link.broken_mut();
        let (Some(broken), Some(protocol)) = (broken, &mut self.protocol) else {
            return false;
        };
        if std::mem::replace(&mut broken.was_told, true) {
            return false;
        }
        let remains = broken.remains;
        protocol.connection_broken(&mut Context::new(&mut self.transport, reactor), remains);
        true
    }

    /// Makes sure that the rest is done later.
    #[inline]
    fn settle(&mut self, reactor: &mut Reactor) -> Next {
        let stream = self.transport.stream_mut();
        if stream.link.has(Flags::UNWATCHED) {
            stream.watch_if_waiting(reactor);
        }
        let link = &mut stream.link;
        let wants_write = !stream.buffer.is_empty() || link.has(Flags::UNFLUSHED);
        if wants_write
            && !link.has(Flags::WRITABLE | Flags::WATCHES_WRITING)
            && link.state() != State::Lost
        {
            // Happens once in the life of a connection, if it ever falls behind. The
            // poller reports the socket again if it has become writable meanwhile.
            match stream.layer.socket().watch_writing(reactor, link.token) {
                Ok(()) => link.set(Flags::WATCHES_WRITING),
                Err(error) => link.end(CloseReason::Lost(error)),
            }
        }
        if link.has(Flags::UNSETTLED) {
            schedule(link, reactor);
        }
        let has_more = link.may_tell()
            || link.may_read()
            || link.may_drop()
            || link.may_flush()
            || (!stream.buffer.is_empty() && link.may_write());
        if has_more { Next::Again } else { Next::Keep }
    }

    /// Reads once, calls the protocol, and returns how many bytes there were.
    #[inline(always)]
    fn read(&mut self, reactor: &mut Reactor) -> usize {
        let mut buffers = self.transport.stream().link.shared.take_buffers();
        let bytes = self.read_into(reactor, &mut buffers);
        self.transport.stream().link.shared.return_buffers(buffers);
        bytes
    }

    #[inline(always)]
    fn read_into(&mut self, reactor: &mut Reactor, buffers: &mut ReadBuffers) -> usize {
        let stream = self.transport.stream_mut();
        let limit = stream.link.read_limit();
        match stream.layer.do_read(&mut stream.link, buffers, limit) {
            Ok(received) if received.bytes == 0 => {
                self.nothing_read(reactor, buffers, received);
                0
            }
            Ok(received) => {
                let link = &mut stream.link;
                debug_assert!(link.is_established(), "a handshake delivers nothing");
                #[cfg(feature = "inspect")]
                link.count_received(received.bytes);
                let reads_on = link.has(Flags::READ_ON | Flags::UNWATCHED);
                if reads_on {
                    #[cfg(feature = "inspect")]
                    link.note_received(buffers.data.get(received.bytes));
                } else if received.is_drained() {
                    link.clear(Flags::READABLE);
                }
                if received.had_ancillary() {
                    let is_truncated = received.is_truncated();
                    self.deliver_ancillary(reactor, buffers, received.bytes, is_truncated);
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

    /// Handles a read that has nothing for the protocol.
    #[cold]
    fn nothing_read(
        &mut self,
        reactor: &mut Reactor,
        buffers: &mut ReadBuffers,
        received: Received,
    ) {
        let link = &mut self.transport.stream_mut().link;
        // Credentials, if the socket asks for them, come beside the end too.
        // Descriptors always come with a byte, but a layer may have kept that byte.
        let descriptors = std::mem::take(&mut buffers.ancillary.descriptors);
        if !descriptors.is_empty() {
            Ledger::add(&link.shared.ledger.received, descriptors.len());
            link.close_unclaimed(descriptors);
        }
        buffers.ancillary.clear();
        if received.is_end() {
            self.read_ended(reactor);
        } else if received.is_drained() && !link.has(Flags::READ_ON | Flags::UNWATCHED) {
            link.clear(Flags::READABLE);
        }
    }

    #[cold]
    fn read_pushed_back(&mut self, reactor: &mut Reactor) -> usize {
        let data = self.transport.stream_mut().link.take_pushed_back();
        if let Some(protocol) = &mut self.protocol {
            let mut cx = Context::new(&mut self.transport, reactor);
            protocol.data_received(&mut cx, &data);
        }
        data.len()
    }

    #[cold]
    fn read_failed(&mut self, reactor: &mut Reactor, error: std::io::Error) {
        let stream = self.transport.stream_mut();
        let link = &mut stream.link;
        if error.kind() == std::io::ErrorKind::WouldBlock {
            link.clear(Flags::READABLE);
        } else if link.is_established()
            && !stream.layer.has_own_end()
            && error.raw_os_error().is_some()
            && stream.layer.socket().remains(&error) == Remains::Everything
        {
            // A UNIX peer has closed without reading everything. The kernel reports
            // that once, behind the last byte. The end follows nevertheless.
            if !link.is_broken() {
                stream.break_off(CloseReason::Lost(error), Remains::Everything);
            }
            self.read_ended(reactor);
        } else if link.is_broken() && error.kind() != std::io::ErrorKind::InvalidData {
            // The stream of a broken connection breaks off. That is no new error.
            link.end_broken();
        } else {
            link.end(CloseReason::Lost(error));
        }
    }

    #[cold]
    fn read_ended(&mut self, reactor: &mut Reactor) {
        let link = &mut self.transport.stream_mut().link;
        link.read_ended();
        if !link.is_established() {
            let text = "the connection ended before it was established";
            let error = std::io::Error::new(std::io::ErrorKind::UnexpectedEof, text);
            return link.end(CloseReason::Lost(error));
        }
        if link.remains() == Some(Remains::Pieces) {
            // After a reset, TCP only reports that nothing more comes. That is not the
            // peer's end.
            return;
        }
        let Some(protocol) = &mut self.protocol else {
            return;
        };
        let mut cx = Context::new(&mut self.transport, reactor);
        let after = protocol.read_connection_lost(&mut cx);
        let link = &mut self.transport.stream_mut().link;
        if link.is_broken() {
            // `finish` ends the connection, with its reason.
            return;
        }
        match after {
            AfterReadClosed::EndConnection => link.end(CloseReason::Done),
            AfterReadClosed::LoseConnection => link.lose_connection(),
            // If both halves are closed, `finish` ends the connection.
            AfterReadClosed::KeepWriting => {}
        }
        if link.state() == State::WriteClosed {
            link.end(CloseReason::Done);
        }
    }

    /// Delivers the first notice to user code. Returns true if the connection has ended
    /// and was told so.
    #[cold]
    fn deliver(&mut self, reactor: &mut Reactor) -> bool {
        let link = &mut self.transport.stream_mut().link;
        let first = link.first_pending();
        // Once the connection was made, the end goes before all other notices. They
        // would be of no use.
        if link.has(Flags::END) && first != Flags::CONNECTION_MADE {
            self.lose(reactor);
            return true;
        }
        link.clear(first);
        match first {
            Flags::CONNECTION_MADE => {
                if link.cold_ref().is_some_and(|cold| cold.was_made) {
                    if let Some(protocol) = &mut self.protocol {
                        let mut cx = Context::new(&mut self.transport, reactor);
                        protocol.connection_secured(&mut cx);
                    }
                } else if self.is_given_up(reactor) {
                    self.transport.stream_mut().link.end(CloseReason::Aborted);
                } else if let Some(protocol) = &mut self.protocol {
                    protocol.connection_made(&mut Context::new(&mut self.transport, reactor));
                }
            }
            Flags::STOP_REJECTED => self.stop_rejected(reactor),
            Flags::PAUSE_PRODUCER => {
                self.tell_producer(reactor, Tell::Pause);
            }
            Flags::RESUME_PRODUCER => self.resume_producer(reactor),
            Flags::LEFT => {
                let count = std::mem::take(&mut link.cold().descriptors_left);
                self.tell_awaited(reactor, false);
                if let Some(protocol) = &mut self.protocol
                    && count > 0
                {
                    protocol
                        .descriptors_sent(&mut Context::new(&mut self.transport, reactor), count);
                }
            }
            Flags::WRITE_CLOSED => {
                if let Some(protocol) = &mut self.protocol {
                    protocol.write_connection_lost(&mut Context::new(&mut self.transport, reactor));
                }
            }
            Flags::READING_RESUMED => {
                if let Some(protocol) = &mut self.protocol
                    && self.transport.stream().link.is_reading()
                {
                    protocol.reading_resumed(&mut Context::new(&mut self.transport, reactor));
                }
            }
            Flags::DRAINING => self.tell_draining(reactor),
            Flags::REATTACHED => {
                if let Some(protocol) = &mut self.protocol {
                    protocol.connection_reattached(&mut Context::new(&mut self.transport, reactor));
                }
            }
            _ => debug_assert!(false, "every bit is named"),
        }
        false
    }

    /// Ends the connection: stops the producer, closes the socket, tells the protocol.
    ///
    /// Each step is done once, even if a callback panics and this is called again.
    fn lose(&mut self, reactor: &mut Reactor) {
        let link = &mut self.transport.stream_mut().link;
        link.set_state(State::Lost);
        if link.has_producer()
            && let Some(registration) = link.cold().registration.take()
            && let Some(producer) = registration.producer
        {
            self.call_producer(reactor, producer, Tell::Stop);
        }
        self.tell_awaited(reactor, true);
        self.stop_rejected(reactor);
        self.close_socket(reactor);
        let link = &mut self.transport.stream_mut().link;
        link.clear(Flags::END);
        let reason = match link.cold_ref() {
            Some(_) => link.cold().reason.take().unwrap_or(CloseReason::Done),
            None => CloseReason::Done,
        };
        // A panic while logging must not keep the protocol from being told.
        let _ = catch_panic(|| self.log_end(&reason));
        if let Some(protocol) = &mut self.protocol {
            protocol.connection_lost(&mut Context::new(&mut self.transport, reactor), &reason);
        }
        // Only now, since the protocol could reclaim them.
        self.discard_descriptors();
        let link = &mut self.transport.stream_mut().link;
        if link.cold_ref().is_some() {
            // `connection_lost` was the protocol's last callback.
            let rejected = &mut link.cold().rejected;
            rejected.retain(|producer| !matches!(producer, ProducerRef::Protocol));
        }
        self.stop_rejected(reactor);
        self.tell_awaited(reactor, true);
        self.tell_connector(reactor, reason);
    }

    /// Calls those who await bytes, if the bytes have left or the connection is over.
    /// Each has a call of its own, so that its panic does not end the connection.
    fn tell_awaited(&mut self, reactor: &mut Reactor, is_over: bool) {
        let link = &mut self.transport.stream_mut().link;
        let sent = link.sent;
        for Awaited { position, then } in link.take_awaited(is_over) {
            let result = match position <= sent {
                true => Ok(()),
                false => Err(NotSent { sent }),
            };
            reactor.defer(move |reactor| then(reactor, result));
        }
    }

    fn discard_descriptors(&mut self) {
        let stream = self.transport.stream_mut();
        stream.layer.discard_descriptors(&mut stream.link);
    }

    fn close_socket(&mut self, reactor: &mut Reactor) {
        let stream = self.transport.stream_mut();
        let queued = stream.layer.queued_descriptors();
        let link = &mut stream.link;
        if !stream.buffer.is_empty() || queued > 0 {
            let unsent = stream.buffer.take().len();
            let cold = link.cold();
            cold.unsent.0 += unsent;
            cold.unsent.1 += queued;
        }
        let is_abort = matches!(
            link.cold_ref().and_then(|cold| cold.reason.as_ref()),
            Some(CloseReason::Aborted | CloseReason::CloseTimedOut)
        );
        // If others may hold the socket, its bytes are theirs to read.
        let is_ours_to_read = !link.has(Flags::SHARED | Flags::READ_ENDED) && !link.has_lent.get();
        if stream.layer.socket().is_open() {
            // Deregistered before the close. If others hold the socket too, epoll would
            // go on to report it.
            stream.unwatch(reactor);
            let link = &mut stream.link;
            if is_abort && !link.has(Flags::SHARED) {
                stream.layer.socket_mut().prepare_abort();
            } else if !is_abort {
                stream.say_last_words();
            }
            let link = &mut stream.link;
            Ledger::add(&link.shared.ledger.closed, 1);
            #[cfg(feature = "inspect")]
            link.shared
                .kinds
                .ended(stream.layer.socket().kind(), link, &stream.layer);
            if is_ours_to_read {
                stream.layer.disarm_unread(link);
            } else {
                stream.layer.leave_unread(link);
            }
        }
        stream.layer.socket_mut().close();
        let link = &mut stream.link;
        if link.cold_ref().is_some() {
            let cold = link.cold();
            for call in [
                cold.close_deadline.take(),
                cold.retry.take(),
                cold.ask_again.take(),
                cold.draining.take().and_then(Draining::into_look),
            ]
            .into_iter()
            .flatten()
            {
                // One of these timers may have just fired.
                let _ = call.cancel(reactor);
            }
            for call in cold.layer_timers.drain(..).filter_map(|it| it.call) {
                let _ = call.cancel(reactor);
            }
        }
    }

    fn log_end(&self, reason: &CloseReason) {
        let Stream { link, layer, .. } = self.transport.stream();
        let (bytes, descriptors) = link.cold_ref().map_or((0, 0), |cold| cold.unsent);
        log::debug!(
            target: log::TRANSPORT,
            "{} {},{},{}: {reason}; {bytes} bytes and {descriptors} descriptors unsent",
            link.token,
            self.protocol_name(),
            layer.socket().kind(),
            layer.socket().peer(),
        );
    }

    /// Logs, once, that the kernel has refused to send for long. Somebody may have to
    /// make room, and that need not be the peer.
    #[cold]
    fn note_refusal(&mut self) {
        let stream = self.transport.stream_mut();
        let (bytes, descriptors) = (stream.unsent(), stream.layer.queued_descriptors());
        let cold = stream.link.cold();
        if cold.refusals != LASTING_REFUSALS {
            return;
        }
        let Some(error) = cold.refusal.take() else {
            return;
        };
        let Stream { link, layer, .. } = self.transport.stream();
        log::warn!(
            target: log::TRANSPORT,
            "{} {},{},{}: the kernel has refused to send for a second, trying again: {error}; \
            {bytes} bytes and {descriptors} descriptors wait",
            link.token,
            self.protocol_name(),
            layer.socket().kind(),
            layer.socket().peer(),
        );
    }

    /// Whether the connector has given up this connection, whose handshake is just
    /// done.
    fn is_given_up(&mut self, reactor: &mut Reactor) -> bool {
        let link = &mut self.transport.stream_mut().link;
        if link.cold_ref().is_none_or(|cold| !cold.had_handshake) {
            return false;
        }
        let cold = link.cold();
        cold.had_handshake = false;
        let connector = cold.connector.map(ConnectorControl::named);
        let connector = connector.and_then(|connector| reactor.get(connector));
        connector.is_some_and(|connector| !connector.establish())
    }

    fn tell_connector(&mut self, reactor: &mut Reactor, reason: CloseReason) {
        let link = &mut self.transport.stream_mut().link;
        if link.cold_ref().is_some_and(|cold| cold.connector.is_some())
            && let Some(connector) = link.cold().connector.take()
        {
            let mut ended = ConnectionEnded(reason);
            reactor.enter(connector, move |connector, reactor| match connector {
                Some(connector) => connector.request(reactor, &mut ended),
                None => Next::Keep,
            });
        }
    }

    fn protocol_name(&self) -> Cow<'_, str> {
        self.protocol
            .as_ref()
            .map_or(Cow::Borrowed("-"), |it| log::name(|| it.log_prefix()))
    }

    /// Calls the wanted part of the protocol.
    fn call_part(&mut self, reactor: &mut Reactor, request: &mut ProtocolCall<T>) {
        if self.transport.stream().link.is_ended() {
            request.error = CallError::Lost;
        } else if let Some(part) = self
            .protocol
            .as_mut()
            .and_then(|protocol| protocol.part(request.part))
        {
            if let Some(call) = request.call.take() {
                call(part, &mut Context::new(&mut self.transport, reactor));
            }
        } else {
            request.error = CallError::WrongProtocol;
        }
    }

    /// Takes the connection apart, if it is open and its protocol has a part of the
    /// type `part`.
    fn detach(
        &mut self,
        reactor: &mut Reactor,
        part: TypeId,
    ) -> Result<Detached<Box<dyn Any>>, DetachError> {
        let stream = self.transport.stream_mut();
        let is_over = stream.link.is_ended() || stream.link.state() == State::Lingering;
        if is_over || !stream.layer.socket().is_open() {
            return Err(DetachError::Lost);
        }
        let has_part = |protocol: &mut P| protocol.part(part).is_some();
        if !self.protocol.as_mut().is_some_and(has_part) {
            return Err(DetachError::WrongProtocol);
        }
        stream.unwatch(reactor);
        let link = &mut stream.link;
        // The error was reported here, and would be lost elsewhere.
        let is_broken = link.is_broken();
        let travels = stream.layer.travels() && !is_broken;
        let descriptors = stream.layer.take_unsent_descriptors(link);
        let Some(mut layer) = stream.layer.take() else {
            return self.stay(descriptors);
        };
        let host = layer.socket().host();
        let peer = layer.socket().peer();
        let Some(fd) = layer.socket_mut().detach() else {
            stream.layer = layer;
            return self.stay(descriptors);
        };
        let writing = layer.socket_mut().detach_writing();
        let kept = keep(link, reactor);
        link.set_state(State::Lost);
        Ledger::add(&link.shared.ledger.closed, 1);
        #[cfg(feature = "inspect")]
        link.shared.kinds.ended(layer.socket().kind(), link, &layer);
        let unsent = stream.buffer.take();
        let unread = link.take_unread();
        let producer = link.take_producer();
        self.close_socket(reactor);
        self.tell_awaited(reactor, true);
        self.tell_connector(reactor, CloseReason::Done);
        let protocol = self.protocol.take().map(Box::new);
        let protocol = protocol.and_then(|protocol| protocol.into_part(part));
        Ok(Detached {
            fd,
            protocol: protocol.ok_or(DetachError::WrongProtocol)?,
            unsent,
            unread,
            descriptors,
            producer,
            host,
            peer,
            kept: Some(kept),
            layer: Box::new(layer),
            // The other process is told of one descriptor.
            travels: travels && writing.is_none(),
            pack: (!is_broken).then_some(pack::<T::Layer>),
            writing,
        })
    }

    /// Goes on after a detach that failed.
    #[cold]
    fn stay(
        &mut self,
        descriptors: Vec<UnsentDescriptors>,
    ) -> Result<Detached<Box<dyn Any>>, DetachError> {
        let stream = self.transport.stream_mut();
        stream
            .layer
            .restore_unsent_descriptors(&stream.link, descriptors);
        if !stream.link.has(Flags::UNWATCHED) {
            // The poller reports again what is ready now.
            stream.link.clear(Flags::WATCHES_WRITING);
            stream
                .link
                .set(Flags::UNWATCHED | Flags::READABLE | Flags::WRITABLE);
        }
        Err(DetachError::NotDetachable)
    }
}

/// See [`Detached::pack`].
fn pack<L: FileDescriptor>(layer: &mut dyn Any) -> Result<Vec<LayerState>, Stays> {
    match layer.downcast_mut::<L>() {
        Some(layer) => layer.pack(),
        None => Err(Stays::Layer),
    }
}

/// The settings and state that a detached connection keeps, with the time that is left
/// of its timers.
fn keep(link: &mut Link, reactor: &Reactor) -> Kept {
    let left = |call: DelayedCall| {
        let due = call.due(reactor)?;
        Some(due.saturating_duration_since(reactor.now()))
    };
    let mut kept = link.kept();
    for timer in &mut kept.layer_timers {
        let running = timer.call.take().and_then(left);
        timer.after = timer.after.or(running);
    }
    if let Some(deadline) = link.cold_ref().and_then(|cold| cold.close_deadline) {
        kept.close_within = left(deadline);
    }
    kept
}

/// The lowest of the layers: the socket.
fn bottom_of(layer: &mut dyn FileDescriptor) -> &mut dyn FileDescriptor {
    match layer.below().is_some() {
        true => bottom_of(layer.below_mut().expect("it was there")),
        false => layer,
    }
}

/// How much of the turn's budget a read takes.
fn cost(bytes: usize) -> usize {
    bytes.max(LEAST_READ_COST)
}

/// Records the reported readiness.
#[inline(never)]
fn latch(link: &mut Link, readiness: Readiness) {
    let closed = Readiness::READ_CLOSED | Readiness::ERROR;
    if readiness.intersects(Readiness::READABLE | closed) {
        link.set(Flags::READABLE);
    }
    if readiness.intersects(closed | Readiness::PRIORITY) {
        link.set(Flags::READ_ON);
    }
    if readiness.intersects(Readiness::ERROR) {
        link.set(Flags::FAILED | Flags::UNSETTLED);
    } else if readiness.intersects(Readiness::READ_CLOSED) {
        link.set(Flags::END_ARRIVED);
    }
    if readiness.intersects(Readiness::WRITABLE | Readiness::WRITE_CLOSED | Readiness::ERROR) {
        link.set(Flags::WRITABLE);
    }
}

/// Sets the timers that the transport asked for.
#[cold]
fn schedule(link: &mut Link, reactor: &mut Reactor) {
    let token = link.token;
    let waits = link.has(Flags::WAITS_FOR_TIMER);
    // A broken connection is yet to end, once it is read to its end.
    let is_at_work = link.has(Flags::FAILED | Flags::DRAINING) || link.is_draining();
    if link.state() == State::Open && !link.is_broken() && !is_at_work {
        link.clear(Flags::UNSETTLED);
    }
    for call in link
        .take_ended_timers()
        .into_iter()
        .filter_map(|it| it.call)
    {
        // This timer may have fired.
        let _ = call.cancel(reactor);
    }
    if link.cold_ref().is_none() && !waits {
        return;
    }
    let cold = link.cold();
    if waits && cold.retry.is_none() {
        cold.retry_after = (cold.retry_after * 2).clamp(FIRST_RETRY, LONGEST_RETRY);
        cold.retry = Some(reactor.notify_later(cold.retry_after, token));
    }
    let of_layers = cold.layer_timers.iter_mut();
    let of_layers = of_layers.map(|it| (&mut it.after, &mut it.call));
    let wanted = [(&mut cold.close_within, &mut cold.close_deadline)];
    for (after, call) in wanted.into_iter().chain(of_layers) {
        if let Some(after) = after.take() {
            if let Some(earlier) = call.take() {
                // This timer may have fired.
                let _ = earlier.cancel(reactor);
            }
            *call = Some(reactor.notify_later(after, token));
        }
    }
}

impl<T, P> Descriptor for Connection<T, P>
where
    T: StreamTransport,
    P: Protocol<T>,
{
    #[inline]
    fn ready(&mut self, reactor: &mut Reactor, readiness: Readiness) -> Next {
        let link = &mut self.transport.stream_mut().link;
        if readiness == Readiness::READABLE {
            link.set(Flags::READABLE);
        } else {
            latch(link, readiness);
        }
        self.usual_work(reactor)
    }

    fn attend(&mut self, reactor: &mut Reactor) -> Next {
        let link = &self.transport.stream().link;
        let visit = match link.has(Flags::UNWATCHED) && link.has(Flags::CONNECTION_MADE) {
            true => Visit::First,
            false => Visit::Extra,
        };
        self.work(reactor, visit)
    }

    fn timer_fired(&mut self, reactor: &mut Reactor, call: DelayedCall) -> Next {
        let Stream { link, buffer, .. } = self.transport.stream_mut();
        let cold = link.cold();
        let mut is_retry = false;
        if cold.retry == Some(call) {
            cold.retry = None;
            link.clear(Flags::WAITS_FOR_TIMER);
            link.set(Flags::WRITABLE);
            is_retry = true;
        } else if cold.ask_again == Some(call) {
            cold.ask_again = None;
            // The timer may have been set for an earlier producer.
            let is_pull = cold
                .registration
                .as_ref()
                .is_some_and(|registration| registration.kind == ProducerKind::Pull);
            if is_pull && buffer.is_empty() {
                link.set(Flags::RESUME_PRODUCER);
            }
        } else if cold.close_deadline == Some(call) {
            cold.close_deadline = None;
            link.end(match link.state() {
                // Everything was sent.
                State::Lingering => CloseReason::Done,
                _ => CloseReason::CloseTimedOut,
            });
        } else if let Some(layer) = cold.layer_of(call) {
            self.transport.stream_mut().wake_layer(layer, reactor.now());
        } else if cold.draining.as_ref().is_some_and(|it| it.looks_at(call)) {
            self.look_whether_idle(reactor);
        }
        let next = self.work(reactor, Visit::Extra);
        let link = &mut self.transport.stream_mut().link;
        if is_retry && link.has(Flags::WAITS_FOR_TIMER) {
            self.note_refusal();
        } else if is_retry {
            let cold = link.cold();
            cold.retry_after = Duration::ZERO;
            if cold.refusals < LASTING_REFUSALS {
                cold.refusals = 0;
            }
        }
        next
    }

    fn request(&mut self, reactor: &mut Reactor, request: &mut dyn Any) -> Next {
        if let Some(request) = request.downcast_mut::<DetachRequest>() {
            let result = self.detach(reactor, request.part);
            let is_apart = result.is_ok();
            request.result = Some(result);
            if is_apart {
                return Next::Remove;
            }
        } else if let Some(call) = request.downcast_mut::<ProtocolCall<T>>() {
            self.call_part(reactor, call);
        }
        #[cfg(feature = "inspect")]
        if let Some(request) = request.downcast_mut::<crate::operation::OperationRequest>() {
            request.of_connection(&mut self.transport);
        }
        self.work(reactor, Visit::Extra)
    }

    fn panicked(&mut self, reactor: &mut Reactor, panic: Panic) -> Next {
        let link = &mut self.transport.stream_mut().link;
        if link.state() == State::Lost && !link.has(Flags::END) {
            // `connection_lost` has panicked, or something after it.
            self.discard_descriptors();
            self.tell_awaited(reactor, true);
            self.tell_connector(reactor, CloseReason::Panicked(panic));
            return Next::Remove;
        }
        // The panic of a callback takes precedence over its requests.
        link.end(CloseReason::Done);
        link.cold().reason = Some(CloseReason::Panicked(panic));
        link.clear(Flags::PENDING);
        link.set(Flags::END);
        self.work(reactor, Visit::Extra)
    }

    fn drain(&mut self, reactor: &mut Reactor, round: DrainRound) -> Next {
        self.begin_draining(reactor, round)
    }

    fn shutdown(&mut self, reactor: &mut Reactor) {
        self.transport
            .stream_mut()
            .link
            .end(CloseReason::ReactorStopped);
        // Tells `connection_made` first, if it was not told yet.
        while !self.deliver(reactor) {}
    }

    fn forked(&mut self) {
        let link = &mut self.transport.stream_mut().link;
        link.set(Flags::SHARED);
        // The poller is asked again once there is something to write.
        link.clear(Flags::WATCHES_WRITING);
    }

    fn source(&self) -> Option<BorrowedFd<'_>> {
        let stream = self.transport.stream();
        let socket = stream.layer.socket();
        // What the poller refuses it need not be asked for again.
        let is_known = !stream.link.has(Flags::UNWATCHED) && !socket.is_always_ready();
        is_known.then(|| socket.reading()).flatten()
    }

    fn writing_source(&self) -> Option<BorrowedFd<'_>> {
        let stream = self.transport.stream();
        let socket = stream.layer.socket();
        let is_watched = stream.link.has(Flags::WATCHES_WRITING) || socket.watches_both();
        if stream.link.has(Flags::UNWATCHED) || !is_watched {
            return None;
        }
        let (reading, writing) = (socket.reading()?, socket.writing()?);
        (!is_same(reading, writing)).then_some(writing)
    }

    fn facet(&mut self) -> &mut dyn Any {
        &mut self.transport
    }

    fn describe(&self, description: &mut Description) {
        self.tell_all(description);
    }

    fn log_prefix(&self) -> Cow<'_, str> {
        let socket = self.transport.stream().layer.socket();
        Cow::Owned(format!(
            "{},{},{}",
            self.protocol_name(),
            socket.kind(),
            socket.peer()
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
        let counters = if cfg!(feature = "inspect") { 8 } else { 0 };
        assert_eq!(size_of::<Connection<TcpStream, ()>>(), 96 + counters);
        assert_eq!(size_of::<Connection<UnixStream, ()>>(), 104 + counters);
    }
}
