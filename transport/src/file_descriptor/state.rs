//! What the layers of one transport share: its socket, its buffer, where it is in
//! its life, and what user code has to be told of it.

use std::any::Any;
use std::cell::Cell;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Duration;

use bowline_protocol::policies::WriteLog;
use bowline_protocol::{
    CloseReason, LingeringClose, ProducerKind, ProducerRef, TransportState, Watermarks,
};
use bowline_reactor::{DelayedCall, Reactor, Token};

use super::MIN_DIRECT_BYTES;
use crate::connection::Draining;
use crate::log;
use crate::shared::{READ_BYTES, Shared};
use crate::socket::{Remains, Socket};
use crate::sys;
use crate::write_buffer::WriteBuffer;

/// The state that all layers of one transport share.
#[derive(Debug)]
pub struct Core<S> {
    pub(crate) socket: S,
    pub(crate) shared: Rc<Shared>,
    pub(crate) token: Token,
    pub(crate) buffer: WriteBuffer,
    /// How many bytes the kernel has taken so far: the position of the first
    /// unsent byte in the stream.
    pub(crate) sent: u64,
    /// What most connections never need.
    cold: Option<Box<Cold>>,
    pub(crate) high_watermark: usize,
    pub(crate) read_limit: u32,
    /// The bits of [`flag`] and of [`pending`], in one word, so that most
    /// questions about a connection are one comparison.
    pub(crate) flags: u32,
    /// Changed by [`Core::set_state`] only.
    state: State,
    /// Whether the socket was lent out, so that somebody may hold a copy of it.
    pub(crate) has_lent: Cell<bool>,
}

/// Where in its life a transport is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// Both sides open.
    Open,
    /// Our side closes when everything was sent.
    WriteClosing,
    /// Our side is closed.
    WriteClosed,
    /// Everything closes when everything was sent.
    Closing,
    /// Everything was sent, and our side is closed; what still comes is dropped.
    Lingering,
    /// The connection is over; its end has to be told.
    Ending,
    /// The socket is closed.
    Lost,
}

/// The flags of [`Core::flags`].
///
/// Those of the second half follow from the state and are kept beside it, so
/// that each question on the way of every message is one comparison.
pub(crate) mod flag {
    /// Latched readiness. Set by events, cleared by `WouldBlock` and by short
    /// reads; interest does not touch it.
    pub(crate) const READABLE: u32 = 1;
    /// Latched, as above; a new socket counts as writable.
    pub(crate) const WRITABLE: u32 = 1 << 1;
    /// Short reads do not mean drained any more: the peer has said that nothing
    /// more comes, or has sent urgent data once.
    pub(crate) const READ_ON: u32 = 1 << 2;
    /// Interest: reading is paused.
    pub(crate) const PAUSED: u32 = 1 << 3;
    /// The peer's end was read.
    pub(crate) const READ_ENDED: u32 = 1 << 4;
    /// A producer is registered.
    pub(crate) const HAS_PRODUCER: u32 = 1 << 5;
    /// The poller reports writability too.
    pub(crate) const WATCHES_WRITING: u32 = 1 << 6;
    /// The kernel said later without saying when; a timer decides.
    pub(crate) const WAITS_FOR_TIMER: u32 = 1 << 7;
    /// The socket is shared with others, so that no option that would hurt
    /// them may be set on the way out.
    pub(crate) const SHARED: u32 = 1 << 8;

    /// Nothing more may be delivered: see `Core::is_open_for_reading`.
    pub(crate) const NOT_READING: u32 = 1 << 9;
    /// Nothing more may be sent: the connection is over.
    pub(crate) const NOT_WRITING: u32 = 1 << 10;
    /// Whether bytes are taken depends on more than that the connection is
    /// open.
    pub(crate) const WRITES_WITH_CARE: u32 = 1 << 11;
    /// There may be a step to take, or a timer to set, when nothing else is to
    /// be done.
    pub(crate) const UNSETTLED: u32 = 1 << 12;

    /// Interest: reading is held, as `Cold::holds` says.
    pub(crate) const HELD: u32 = 1 << 13;

    /// There are bytes to be delivered before anything is read:
    /// `Cold::pushed_back`.
    pub(crate) const PUSHED_BACK: u32 = 1 << 14;

    /// The kernel refuses descriptors from the peer; some that it took before
    /// may wait to be read.
    pub(crate) const REFUSES_DESCRIPTORS: u32 = 1 << 15;
    /// Nothing but bytes can come: none wait either. Never without
    /// `REFUSES_DESCRIPTORS`.
    pub(crate) const PLAIN_READS: u32 = 1 << 24;

    /// The poller does not know the socket yet. It counts as readable, and is
    /// registered when a read says that it would block, or before a wait for
    /// anything else: a peer that sends and closes at once is then served without.
    pub(crate) const UNWATCHED: u32 = 1 << 25;

    // 1 << 26 is pending::REATTACHED.

    /// The poller reported an error, which reading may tell of, or nothing.
    pub(crate) const FAILED: u32 = 1 << 27;
    /// The poller reported the peer's end, at a time when it reported no error.
    pub(crate) const END_ARRIVED: u32 = 1 << 28;

    // 1 << 29 is pending::DRAINING.

    /// The connection is lost when it is idle: `Cold::draining`. `UNSETTLED` stays
    /// as long.
    pub(crate) const DRAINING: u32 = 1 << 30;
}

/// The other bits of [`Core::flags`]: what user code has to be told, in the
/// order in which it is.
pub(crate) mod pending {
    pub(crate) const CONNECTION_MADE: u32 = 1 << 16;
    pub(crate) const STOP_REJECTED: u32 = 1 << 17;
    pub(crate) const PAUSE_PRODUCER: u32 = 1 << 18;
    pub(crate) const RESUME_PRODUCER: u32 = 1 << 19;
    pub(crate) const DESCRIPTORS_SENT: u32 = 1 << 20;
    pub(crate) const WRITE_CLOSED: u32 = 1 << 21;
    pub(crate) const READING_RESUMED: u32 = 1 << 22;
    pub(crate) const END: u32 = 1 << 23;

    /// In places of their own, as the last.
    pub(crate) const REATTACHED: u32 = 1 << 26;
    pub(crate) const DRAINING: u32 = 1 << 29;

    /// Anything at all.
    pub(crate) const ANY: u32 = 0xff << 16 | REATTACHED | DRAINING;
}

/// What most connections never need, behind one pointer.
#[derive(Debug, Default)]
pub(crate) struct Cold {
    pub(crate) registration: Option<Registration>,
    pub(super) next_serial: u32,
    low_watermark: usize,
    limit: Option<usize>,
    /// Producers that came after the loss and have to be stopped.
    pub(crate) rejected: Vec<ProducerRef>,
    /// Why the connection ends; [`CloseReason::Done`] if nothing stands here.
    pub(crate) reason: Option<CloseReason>,
    /// Nothing more can be sent, and what the peer sent before is read first.
    pub(crate) broken: Option<Broken>,
    /// Runs while a reset waits for a reader, with how much was unread when it was
    /// set.
    pub(crate) patience: Option<(DelayedCall, usize)>,
    /// Asked for by `lose_connection_within`, and not yet scheduled.
    pub(crate) close_within: Option<Duration>,
    pub(crate) close_deadline: Option<DelayedCall>,
    /// How to end in an orderly way, where that was asked for.
    pub(crate) lingering: Option<LingeringClose>,
    pub(crate) retry: Option<DelayedCall>,
    /// How long to wait before the next retry.
    pub(crate) retry_after: Duration,
    /// How many reasons there are not to read, beside the pause.
    holds: u32,
    write_log: Option<WriteLog>,
    /// Delivered before anything is read.
    pushed_back: Vec<u8>,
    /// A pull producer that wrote nothing is asked again then.
    pub(crate) ask_again: Option<DelayedCall>,
    /// The reactor stops gracefully, and the connection was told so.
    pub(crate) was_told_to_drain: bool,
    /// What is waited for then.
    pub(crate) draining: Option<Draining>,
    /// Unsent bytes and descriptors, counted at the end.
    pub(crate) unsent: (usize, usize),
    /// Descriptors that left and were not told of yet.
    pub(crate) descriptors_left: usize,
    /// Unwanted descriptors so far.
    pub(crate) unclaimed: u64,
    /// Whether control messages of an unknown kind were warned of.
    pub(crate) has_unknown: bool,
    pub(crate) received: usize,
    /// Which socket the kernel says it is, once that was asked.
    pub(crate) own_cookie: Option<u64>,
    /// The connector to be told of the loss.
    pub(crate) connector: Option<Token>,
}

/// What ends a connection once it is read out.
#[derive(Debug)]
pub(crate) struct Broken {
    pub(crate) reason: CloseReason,
    pub(crate) remains: Remains,
}

#[derive(Debug)]
pub(crate) struct Registration {
    /// Out while one of its methods runs.
    pub(crate) producer: Option<ProducerRef>,
    pub(crate) kind: ProducerKind,
    pub(crate) is_paused: bool,
    /// Tells this registration from later ones.
    pub(crate) serial: u32,
}

/// What a connection was set to, and where it stood, when it was taken apart.
#[derive(Debug)]
pub(crate) struct Kept {
    sent: u64,
    state: State,
    flags: u32,
    holds: u32,
    received: usize,
    unclaimed: u64,
    has_unknown: bool,
    descriptors_left: usize,
    /// The error of a connection that only has to be read out, and how many bytes
    /// that cost.
    broken: Option<(Broken, usize)>,
    read_limit: u32,
    watermarks: Watermarks,
    write_log: Option<WriteLog>,
    lingering: Option<LingeringClose>,
    /// How much is left of the time for closing, if that is limited.
    pub(crate) close_within: Option<Duration>,
    /// Whether the producer, if there is one, was told to pause.
    pub(crate) producer_is_paused: bool,
    /// Of the layer above.
    pub(crate) settings: Option<Box<dyn Any>>,
}

impl<S: Socket> Core<S> {
    pub(crate) fn new(socket: S, shared: Rc<Shared>, token: Token) -> Self {
        Self {
            socket,
            shared,
            token,
            buffer: WriteBuffer::default(),
            sent: 0,
            cold: None,
            high_watermark: Watermarks::default().high,
            read_limit: READ_BYTES as u32,
            flags: flag::WRITABLE | pending::CONNECTION_MADE,
            state: State::Open,
            has_lent: Cell::new(false),
        }
    }

    /// The flags that a connection has again when it comes back; what is latched
    /// or registered is found out anew.
    const KEPT: u32 = flag::PAUSED
        | flag::HELD
        | flag::READ_ENDED
        | flag::READ_ON
        | flag::END_ARRIVED
        | flag::NOT_READING
        | flag::REFUSES_DESCRIPTORS
        | pending::CONNECTION_MADE
        | pending::PAUSE_PRODUCER
        | pending::RESUME_PRODUCER
        | pending::DESCRIPTORS_SENT
        | pending::WRITE_CLOSED
        | pending::READING_RESUMED;

    pub(crate) fn kept(&mut self) -> Kept {
        let broken = self.cold.as_mut().and_then(|cold| {
            let broken = cold.broken.take()?;
            Some((broken, cold.unsent.0))
        });
        let cold = self.cold_ref();
        Kept {
            sent: self.sent,
            state: self.state,
            flags: self.flags & Self::KEPT,
            holds: cold.map_or(0, |cold| cold.holds),
            received: cold.map_or(0, |cold| cold.received),
            unclaimed: cold.map_or(0, |cold| cold.unclaimed),
            has_unknown: cold.is_some_and(|cold| cold.has_unknown),
            descriptors_left: cold.map_or(0, |cold| cold.descriptors_left),
            broken,
            read_limit: self.read_limit,
            watermarks: self.watermarks(),
            write_log: cold.and_then(|cold| cold.write_log.clone()),
            lingering: cold.and_then(|cold| cold.lingering),
            close_within: cold.and_then(|cold| cold.close_within),
            producer_is_paused: self.is_producer_paused(),
            settings: None,
        }
    }

    /// Stands again where another stood.
    pub(crate) fn restore(&mut self, kept: &mut Kept) {
        self.sent = kept.sent;
        // It was in other hands.
        self.has_lent.set(true);
        self.read_limit = kept.read_limit;
        self.flags = self.flags & !Self::KEPT | kept.flags;
        if kept.watermarks != Watermarks::default() {
            self.set_watermarks(kept.watermarks);
        }
        if !self.has(pending::CONNECTION_MADE) {
            self.flags |= pending::REATTACHED;
        }
        if let Some(log) = &kept.write_log {
            self.set_write_log(Some(log.clone()));
        }
        // Most need none of it, and are as small as before.
        if kept.holds > 0
            || kept.received > 0
            || kept.unclaimed > 0
            || kept.has_unknown
            || kept.descriptors_left > 0
            || kept.close_within.is_some()
        {
            let cold = self.cold();
            cold.holds = kept.holds;
            cold.received = kept.received;
            cold.unclaimed = kept.unclaimed;
            cold.has_unknown = kept.has_unknown;
            cold.descriptors_left = kept.descriptors_left;
            cold.close_within = kept.close_within;
        }
        self.set_lingering_close(kept.lingering);
        if let Some((broken, unsent)) = kept.broken.take() {
            self.cold().unsent.0 = unsent;
            self.set_broken(broken);
        }
        self.set_state(kept.state);
    }

    pub(crate) fn cold(&mut self) -> &mut Cold {
        self.cold.get_or_insert_default()
    }

    pub(crate) fn cold_ref(&self) -> Option<&Cold> {
        self.cold.as_deref()
    }

    #[inline]
    pub(crate) fn has(&self, flags: u32) -> bool {
        self.flags & flags != 0
    }

    pub(crate) fn has_producer(&self) -> bool {
        self.has(flag::HAS_PRODUCER)
    }

    /// Whether the connection is over.
    #[inline]
    pub(crate) fn is_ended(&self) -> bool {
        matches!(self.state, State::Ending | State::Lost)
    }

    pub(crate) fn state(&self) -> State {
        self.state
    }

    pub(crate) fn set_state(&mut self, state: State) {
        self.state = state;
        self.flags |= match state {
            State::Open => 0,
            State::WriteClosing | State::WriteClosed => flag::WRITES_WITH_CARE | flag::UNSETTLED,
            State::Closing | State::Lingering => {
                flag::WRITES_WITH_CARE | flag::UNSETTLED | flag::NOT_READING
            }
            State::Ending | State::Lost => {
                flag::WRITES_WITH_CARE | flag::NOT_READING | flag::NOT_WRITING
            }
        };
    }

    /// Whether a write of `length` bytes is taken.
    #[inline]
    pub(crate) fn takes_bytes(&self, length: usize) -> bool {
        !self.has(flag::WRITES_WITH_CARE) || self.takes_bytes_by_state(length)
    }

    fn takes_bytes_by_state(&self, length: usize) -> bool {
        let is_open = match self.state {
            State::Open => true,
            // What closes waits for its producer, which may go on meanwhile.
            State::Closing | State::WriteClosing => self.has_producer(),
            State::WriteClosed | State::Lingering | State::Ending | State::Lost => false,
        };
        let limit = self
            .cold_ref()
            .and_then(|cold| cold.limit)
            .unwrap_or(usize::MAX);
        is_open && !self.is_broken() && self.buffer.len().saturating_add(length) <= limit
    }

    pub(crate) fn set_write_log(&mut self, log: Option<WriteLog>) {
        self.cold().write_log = log;
        self.flags |= flag::WRITES_WITH_CARE;
    }

    /// Logs what was written, if that was asked for.
    #[inline]
    pub(crate) fn note_written(&self, data: &[u8]) {
        if self.has(flag::WRITES_WITH_CARE)
            && let Some(log) = self.cold_ref().and_then(|cold| cold.write_log.as_ref())
        {
            log.written(data);
        }
    }

    /// Whether a send may succeed now.
    #[inline]
    pub(crate) fn may_write(&self) -> bool {
        self.flags & (flag::WRITABLE | flag::WAITS_FOR_TIMER | flag::NOT_WRITING) == flag::WRITABLE
    }

    /// Whether a send may succeed now, and nothing comes before it.
    #[inline]
    pub(crate) fn may_only_write(&self) -> bool {
        let decisive = flag::WRITABLE | flag::WAITS_FOR_TIMER | flag::NOT_WRITING | pending::ANY;
        self.flags & decisive == flag::WRITABLE
    }

    /// Whether there is surely nothing to tell, to read, to send or to settle.
    /// Of what is paused with something to read that is not known.
    #[inline]
    pub(crate) fn is_at_rest(&self) -> bool {
        let unrest = flag::READABLE | flag::UNSETTLED | flag::UNWATCHED | pending::ANY;
        !self.has(unrest) && self.buffer.is_empty()
    }

    /// Has the poller watch a socket that it does not know yet, unless it is about
    /// to be read: who does not read waits for a reset at least.
    pub(crate) fn watch_if_waiting(&mut self, reactor: &mut Reactor) {
        let waits_to_write = !self.buffer.is_empty() && !self.has(flag::WRITABLE);
        if !self.socket.is_open() || self.may_read() && !waits_to_write {
            return;
        }
        match self.socket.watch(reactor, self.token) {
            // What has come up meanwhile is reported.
            Ok(()) => self.flags &= !flag::UNWATCHED,
            Err(error) => self.end(CloseReason::Lost(error)),
        }
    }

    /// Has nothing reported of the socket any more.
    pub(crate) fn unwatch(&self, reactor: &mut Reactor) {
        if !self.has(flag::UNWATCHED) {
            self.socket.unwatch(reactor);
        }
    }

    /// Whether a read may succeed now, and is wanted.
    #[inline]
    pub(crate) fn may_read(&self) -> bool {
        self.flags & (flag::READABLE | flag::PAUSED | flag::HELD | flag::NOT_READING)
            == flag::READABLE
    }

    /// Whether a read may succeed now, is wanted, and nothing comes before it.
    #[inline]
    pub(crate) fn may_only_read(&self) -> bool {
        let masks =
            flag::PAUSED | flag::HELD | flag::NOT_READING | flag::PUSHED_BACK | pending::ANY;
        self.flags & (flag::READABLE | masks) == flag::READABLE
    }

    /// Whether data may be delivered at all: neither closing, ended, nor at the
    /// peer's end.
    #[inline]
    pub(crate) fn is_open_for_reading(&self) -> bool {
        !self.has(flag::NOT_READING)
    }

    /// Whether data may be delivered now.
    #[inline]
    pub(crate) fn is_reading(&self) -> bool {
        !self.has(flag::NOT_READING | flag::PAUSED)
    }

    /// Appends bytes that are few, wanted, and fit into the memory that is
    /// there; does nothing to others.
    #[inline(always)]
    pub(crate) fn append(&mut self, data: &[u8]) -> bool {
        if data.is_empty() || data.len() >= MIN_DIRECT_BYTES || self.has(flag::WRITES_WITH_CARE) {
            return false;
        }
        if self.buffer.needs_storage() {
            let Some(storage) = self.shared.take_last_storage() else {
                return false;
            };
            self.buffer.lend_storage(storage);
        }
        self.buffer.append(data)
    }

    pub(crate) fn buffer_bytes(&mut self, data: &[u8]) {
        if data.is_empty() {
            return;
        }
        if self.buffer.needs_storage() {
            self.buffer.lend_storage(self.shared.take_storage());
        }
        self.buffer.push(data);
    }

    pub(crate) fn is_producer_paused(&self) -> bool {
        self.cold_ref()
            .and_then(|cold| cold.registration.as_ref())
            .is_some_and(|registration| registration.is_paused)
    }

    /// Pauses a push producer that is not paused.
    #[cold]
    #[inline(never)]
    pub(crate) fn pause_push_producer(&mut self) {
        let registration = self
            .cold
            .as_ref()
            .and_then(|cold| cold.registration.as_ref());
        if let Some(registration) = registration
            && registration.kind == ProducerKind::Push
            && !registration.is_paused
        {
            self.pause_producer();
        }
    }

    pub(super) fn pause_producer(&mut self) {
        if let Some(registration) = &mut self.cold().registration {
            registration.is_paused = true;
            self.flags |= pending::PAUSE_PRODUCER;
        }
    }

    pub(super) fn resume_producer_if_drained(&mut self, is_full: bool) {
        let unsent = self.buffer.len();
        let low = self.low_watermark();
        let Some(registration) = &mut self.cold().registration else {
            return;
        };
        match registration.kind {
            ProducerKind::Push => {
                if registration.is_paused && unsent <= low && !is_full {
                    // Cleared before it is told: the resume may fill the
                    // buffer again, and then pauses anew.
                    registration.is_paused = false;
                    self.flags |= pending::RESUME_PRODUCER;
                }
            }
            ProducerKind::Pull => {
                if unsent == 0 {
                    self.flags |= pending::RESUME_PRODUCER;
                }
            }
        }
    }

    /// Registers the producer that was there before, which knows how it stands.
    pub(crate) fn restore_producer(
        &mut self,
        producer: ProducerRef,
        kind: ProducerKind,
        is_paused: bool,
    ) {
        let is_drained = self.buffer.is_empty();
        let serial = self.cold().next_serial;
        self.cold().next_serial += 1;
        self.cold().registration = Some(Registration {
            producer: Some(producer),
            kind,
            is_paused,
            serial,
        });
        self.flags |= flag::HAS_PRODUCER;
        if is_drained && kind == ProducerKind::Pull {
            // Nothing is going to leave that would have it asked.
            self.flags |= pending::RESUME_PRODUCER;
        }
    }

    pub(crate) fn unregister_producer(&mut self) {
        if let Some(cold) = &mut self.cold {
            cold.registration = None;
        }
        self.flags &= !flag::HAS_PRODUCER;
        self.flags &= !(pending::PAUSE_PRODUCER | pending::RESUME_PRODUCER);
    }

    /// Takes note of a send that failed; the error, if another will not do better.
    pub(crate) fn lasting_error(&mut self, error: io::Error) -> Option<io::Error> {
        if error.kind() == io::ErrorKind::WouldBlock {
            self.flags &= !flag::WRITABLE;
        } else if sys::is_transient(&error) {
            log::debug!(target: log::TRANSPORT, "{}: send refused for now: {error}", self.token);
            self.flags |= flag::WAITS_FOR_TIMER | flag::UNSETTLED;
        } else {
            return Some(error);
        }
        None
    }

    /// Takes note that nothing more can be sent. What the peer sent before it went
    /// is read first, as slowly as the reader wants to: the kernel has it.
    #[cold]
    pub(crate) fn break_off(&mut self, reason: CloseReason, remains: Remains) {
        if !self.is_open_for_reading() || self.is_broken() {
            self.end(reason);
            return;
        }
        let remains = match remains {
            Remains::Pieces if self.has(flag::END_ARRIVED) => Remains::Everything,
            remains => remains,
        };
        let dropped = self.buffer.take().len();
        self.cold().unsent.0 += dropped;
        self.set_broken(Broken { reason, remains });
        if self.has_producer() {
            // It may be what holds the reader: nothing is unsent any more.
            self.resume_producer_if_drained(false);
        }
    }

    fn set_broken(&mut self, broken: Broken) {
        self.cold().broken = Some(broken);
        // Short reads say nothing now: it is read until there is nothing.
        self.flags |= flag::READABLE | flag::READ_ON;
        self.flags |= flag::UNSETTLED | flag::WRITES_WITH_CARE;
    }

    /// Whether nothing more can be sent, and the connection goes on only to be read
    /// out.
    pub(crate) fn is_broken(&self) -> bool {
        self.remains().is_some()
    }

    /// What there is to be read out of a broken connection.
    pub(crate) fn remains(&self) -> Option<Remains> {
        let broken = self.cold_ref()?.broken.as_ref();
        broken.map(|broken| broken.remains)
    }

    /// Ends a connection that was read out, with what broke it.
    pub(crate) fn end_broken(&mut self) {
        let broken = self.cold().broken.take();
        self.end(broken.map_or(CloseReason::Done, |it| it.reason));
    }

    /// How many bytes have arrived and were not delivered.
    pub(crate) fn undelivered(&self) -> usize {
        let pushed_back = self.cold_ref().map_or(0, |cold| cold.pushed_back.len());
        pushed_back + self.socket.unread()
    }

    /// Ends the connection, for `reason` unless there is one already.
    pub(crate) fn end(&mut self, reason: CloseReason) {
        if self.is_ended() {
            return;
        }
        self.set_state(State::Ending);
        self.flags |= pending::END;
        if !matches!(reason, CloseReason::Done) {
            self.cold().reason = Some(reason);
        }
    }

    pub(crate) fn lose_connection(&mut self) {
        if matches!(
            self.state,
            State::Open | State::WriteClosing | State::WriteClosed
        ) {
            self.set_state(State::Closing);
        }
    }

    pub(crate) fn lose_connection_within(&mut self, deadline: Duration) {
        self.lose_connection();
        if self.state == State::Closing {
            self.cold().close_within = Some(deadline);
            self.flags |= flag::UNSETTLED;
        }
    }

    pub(crate) fn set_lingering_close(&mut self, lingering: Option<LingeringClose>) {
        // Where no reset can destroy what was sent there is nothing to wait for.
        if S::CAN_BE_RESET && (lingering.is_some() || self.cold.is_some()) {
            self.cold().lingering = lingering;
        }
    }

    /// Whether what the peer still sends is to be read and dropped.
    pub(crate) fn may_drop(&self) -> bool {
        self.state == State::Lingering && self.has(flag::READABLE)
    }

    pub(crate) fn lose_write_connection(&mut self) {
        if self.state == State::Open {
            self.set_state(State::WriteClosing);
        }
    }

    pub(crate) fn pause_producing(&mut self) {
        self.flags |= flag::PAUSED;
        self.flags &= !pending::READING_RESUMED;
    }

    pub(crate) fn resume_producing(&mut self) {
        if self.has(flag::PAUSED) {
            self.flags &= !flag::PAUSED;
            if self.is_open_for_reading() {
                self.flags |= pending::READING_RESUMED;
            }
        }
    }

    pub(crate) fn hold_reading(&mut self) {
        self.cold().holds += 1;
        self.flags |= flag::HELD;
    }

    pub(crate) fn release_reading(&mut self) {
        if self.has(flag::HELD) {
            let cold = self.cold();
            cold.holds -= 1;
            if cold.holds == 0 {
                self.flags &= !flag::HELD;
            }
        }
    }

    pub(crate) fn set_read_limit(&mut self, limit: Option<NonZeroUsize>) {
        let limit = limit.map_or(READ_BYTES, NonZeroUsize::get).min(READ_BYTES);
        self.read_limit = limit as u32;
    }

    pub(crate) fn push_back(&mut self, mut data: Vec<u8>) {
        if data.is_empty() || !self.is_open_for_reading() {
            return;
        }
        let cold = self.cold();
        data.append(&mut cold.pushed_back);
        cold.pushed_back = data;
        // Latched like any other bytes that are there to be read.
        self.flags |= flag::PUSHED_BACK | flag::READABLE;
    }

    /// Takes of what was put back as much as one read may.
    pub(crate) fn take_pushed_back(&mut self) -> Vec<u8> {
        let limit = self.read_limit as usize;
        let left = &mut self.cold().pushed_back;
        let rest = if left.len() > limit {
            left.split_off(limit)
        } else {
            Vec::new()
        };
        let taken = std::mem::replace(left, rest);
        if self.cold().pushed_back.is_empty() {
            self.flags &= !flag::PUSHED_BACK;
        }
        taken
    }

    /// Takes all of what was put back.
    pub(crate) fn take_unread(&mut self) -> Vec<u8> {
        if !self.has(flag::PUSHED_BACK) {
            return Vec::new();
        }
        self.flags &= !flag::PUSHED_BACK;
        std::mem::take(&mut self.cold().pushed_back)
    }

    fn low_watermark(&self) -> usize {
        self.cold_ref().map_or(0, |cold| cold.low_watermark)
    }

    pub(crate) fn watermarks(&self) -> Watermarks {
        Watermarks {
            low: self.low_watermark(),
            high: self.high_watermark,
            limit: self
                .cold_ref()
                .and_then(|cold| cold.limit)
                .unwrap_or(usize::MAX),
        }
    }

    pub(crate) fn set_watermarks(&mut self, watermarks: Watermarks) {
        self.high_watermark = watermarks.high;
        let cold = self.cold();
        cold.low_watermark = watermarks.low.min(watermarks.high);
        cold.limit = (watermarks.limit != usize::MAX).then_some(watermarks.limit);
        self.flags |= flag::WRITES_WITH_CARE;
    }

    pub(crate) fn unsent_bytes(&self) -> usize {
        let dropped = self.cold_ref().map_or(0, |cold| cold.unsent.0);
        self.buffer.len() + dropped
    }

    pub(crate) fn transport_state(&self) -> TransportState {
        match self.state {
            State::Open | State::WriteClosing | State::WriteClosed => TransportState::Connected,
            State::Closing | State::Lingering => TransportState::Closing,
            State::Ending | State::Lost => TransportState::Lost,
        }
    }

    /// Closes descriptors that the protocol does not want.
    pub(crate) fn close_unclaimed(&mut self, descriptors: impl IntoIterator<Item = OwnedFd>) {
        let count = self.shared.close_received(descriptors);
        if count > 0 {
            self.cold().unclaimed += count as u64;
        }
    }
}
