//! The state that a transport and its layers share: how far the connection is in its
//! life, its readiness and interest, and the notices that user code has to get.
//!
//! Nothing here calls user code. Notices are recorded in the flags. The connection
//! delivers them when no callback runs.

mod flags;

use std::any::TypeId;
use std::cell::Cell;
use std::fmt;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Duration;

use bowline_protocol::{
    CloseReason, LingeringClose, ProducerKind, ProducerRef, Remains, TransportState, Watermarks,
    WhenSent, WriteObserver,
};
use bowline_reactor::{DelayedCall, Token};

pub(crate) use self::flags::Flags;
use crate::connection::Draining;
use crate::file_descriptor::FileDescriptor;
use crate::log;
use crate::shared::{READ_BYTES, Shared};
use crate::sys;

/// The part of a connection that a [`FileDescriptor`](crate::FileDescriptor) may use.
/// With it a layer reports that it is [established](Self::established), that it [has
/// bytes of its own](Self::flush_soon), or that the connection [ends](Self::end).
#[derive(Debug)]
pub struct Link {
    pub(crate) shared: Rc<Shared>,
    pub(crate) token: Token,
    /// How many bytes were sent so far. This is the position of the first unsent byte
    /// in the stream that is written.
    pub(crate) sent: u64,
    /// State that most connections never need.
    cold: Option<Box<Cold>>,
    pub(crate) high_watermark: usize,
    /// How many bytes a read brings at the most; 0 for [`READ_BYTES`], which has no room.
    read_limit: u16,
    flags: Flags,
    /// Only [`Link::set_state`] changes it.
    state: State,
    /// Whether the socket was lent out. If so, somebody may hold a copy of it.
    pub(crate) has_lent: Cell<bool>,
    /// How many bytes were delivered: the lower half of the count.
    #[cfg(feature = "inspect")]
    received_bytes: u32,
    /// How often that came round. It does so itself after 256 TiB.
    #[cfg(feature = "inspect")]
    received_rounds: u16,
}

const _: () = assert!(READ_BYTES == u16::MAX as usize + 1);

/// How far a transport is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// Both sides are open.
    Open,
    /// Our side closes once everything was sent.
    WriteClosing,
    /// Our side is closed.
    WriteClosed,
    /// Everything closes once everything was sent.
    Closing,
    /// Everything was sent, and our side is closed. Bytes that still come are dropped.
    Lingering,
    /// The connection is over. The protocol is yet to be told.
    Ending,
    /// The socket is closed.
    Lost,
}

/// State that most connections never need, behind one pointer.
#[derive(Debug, Default)]
pub(crate) struct Cold {
    pub(crate) registration: Option<Registration>,
    pub(crate) next_serial: u32,
    low_watermark: usize,
    limit: Option<usize>,
    /// Producers that came after the loss and have to be stopped.
    pub(crate) rejected: Vec<ProducerRef>,
    /// The reason of the end. `None` means [`CloseReason::Done`].
    pub(crate) reason: Option<CloseReason>,
    /// Nothing more can be sent. Bytes that the peer sent before are read first.
    pub(crate) broken: Option<Broken>,
    /// The limit of `lose_connection_within`, until it is scheduled.
    pub(crate) close_within: Option<Duration>,
    pub(crate) close_deadline: Option<DelayedCall>,
    /// How to end with a lingering close, if the user asked for one.
    pub(crate) lingering: Option<LingeringClose>,
    pub(crate) retry: Option<DelayedCall>,
    /// How long to wait before the next retry.
    pub(crate) retry_after: Duration,
    /// How often in a row the kernel has refused to send for now, and the last error.
    /// Stays at the limit once that was logged.
    pub(crate) refusals: u32,
    pub(crate) refusal: Option<io::Error>,
    /// How many reasons there are not to read, besides the pause.
    holds: u32,
    write_observer: Option<Rc<dyn WriteObserver>>,
    /// Bytes that are delivered before anything is read.
    pushed_back: Vec<u8>,
    /// Asks a pull producer again that wrote nothing.
    pub(crate) ask_again: Option<DelayedCall>,
    /// Whether the connection was told that the reactor stops gracefully.
    pub(crate) was_told_to_drain: bool,
    /// What this connection waits for until it is lost when idle. The link stays
    /// unsettled as long.
    pub(crate) draining: Option<Draining>,
    /// When layers want to be called. Each layer that ever did has one entry.
    pub(crate) layer_timers: Vec<LayerTimer>,
    /// How many layers are not established yet.
    handshakes: u32,
    /// Whether a layer was established that the connector does not know of yet.
    pub(crate) had_handshake: bool,
    /// Whether the connection had been made when a handshake began.
    pub(crate) was_made: bool,
    /// Unsent bytes and descriptors, counted at the end.
    pub(crate) unsent: (usize, usize),
    /// Calls that wait for bytes to leave, the lowest position first.
    awaited: Vec<Awaited>,
    /// How many descriptors have left since the user was last told.
    pub(crate) descriptors_left: usize,
    /// How many unclaimed descriptors there were so far.
    pub(crate) unclaimed: u64,
    /// Whether the log has a warning of control messages of an unknown type.
    pub(crate) has_unknown: bool,
    pub(crate) received: usize,
    /// The kernel's number of this socket, once that was asked for.
    pub(crate) own_cookie: Option<u64>,
    /// The connector that is told of the loss.
    pub(crate) connector: Option<Token>,
    /// Whether reads went on without a reason of the log's, if received bytes are logged.
    #[cfg(feature = "inspect")]
    pub(crate) logs_received: Option<bool>,
}

/// A call that waits until all bytes before a position have left.
pub(crate) struct Awaited {
    pub(crate) position: u64,
    pub(crate) then: WhenSent,
}

impl fmt::Debug for Awaited {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Awaited({})", self.position)
    }
}

impl Cold {
    /// Whether all of it is as it was in the beginning.
    fn is_unused(&self) -> bool {
        let Self {
            registration: None,
            next_serial: 0,
            low_watermark: 0,
            limit: None,
            rejected,
            reason: None,
            broken: None,
            close_within: None,
            close_deadline: None,
            lingering: None,
            retry: None,
            retry_after: Duration::ZERO,
            refusals: 0,
            refusal: None,
            holds: 0,
            write_observer: None,
            pushed_back,
            ask_again: None,
            was_told_to_drain: false,
            draining: None,
            layer_timers,
            handshakes: 0,
            had_handshake: false,
            was_made: false,
            unsent: (0, 0),
            awaited,
            descriptors_left: 0,
            unclaimed: 0,
            has_unknown: false,
            received: 0,
            own_cookie: None,
            connector: None,
            #[cfg(feature = "inspect")]
                logs_received: None,
        } = self
        else {
            return false;
        };
        rejected.is_empty()
            && pushed_back.is_empty()
            && layer_timers.is_empty()
            && awaited.is_empty()
    }

    /// The type of the layer that `call` is a timer of, if it is one.
    pub(crate) fn layer_of(&mut self, call: DelayedCall) -> Option<TypeId> {
        let mut timers = self.layer_timers.iter_mut();
        let timer = timers.find(|timer| timer.call == Some(call))?;
        timer.call = None;
        Some(timer.layer)
    }
}

/// The time at which a layer wants to be called.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LayerTimer {
    /// The type of the layer.
    pub(crate) layer: TypeId,
    /// The delay, until it is scheduled.
    pub(crate) after: Option<Duration>,
    pub(crate) call: Option<DelayedCall>,
    /// Whether the layer wants no call any more.
    pub(crate) is_over: bool,
}

/// What ends a connection once it is read to its end.
#[derive(Debug)]
pub(crate) struct Broken {
    pub(crate) reason: CloseReason,
    pub(crate) remains: Remains,
    /// Whether the protocol was told already, since it does not read.
    pub(crate) was_told: bool,
}

#[derive(Debug)]
pub(crate) struct Registration {
    /// Taken out while one of its methods runs.
    pub(crate) producer: Option<ProducerRef>,
    pub(crate) kind: ProducerKind,
    pub(crate) is_paused: bool,
    /// Tells this registration apart from later ones.
    pub(crate) serial: u32,
}

/// The settings and state of a connection that was taken apart.
#[derive(Debug)]
pub(crate) struct Kept {
    sent: u64,
    state: State,
    flags: Flags,
    holds: u32,
    received: usize,
    unclaimed: u64,
    has_unknown: bool,
    descriptors_left: usize,
    /// The error of a connection that only has to be read to its end, and how many
    /// unsent bytes that cost.
    broken: Option<(Broken, usize)>,
    read_limit: u16,
    watermarks: Watermarks,
    write_observer: Option<Rc<dyn WriteObserver>>,
    handshakes: u32,
    was_made: bool,
    #[cfg(feature = "inspect")]
    received_bytes: u64,
    /// The times that are left of the layers' timers.
    pub(crate) layer_timers: Vec<LayerTimer>,
    pub(crate) lingering: Option<LingeringClose>,
    /// The time that is left for closing, if that is limited.
    pub(crate) close_within: Option<Duration>,
    /// Whether the producer, if there is one, was told to pause.
    pub(crate) producer_is_paused: bool,
}

/// Methods for layers.
impl Link {
    /// Delays `connection_made` until the layer is [established](Self::established).
    /// Called from [`start`](crate::FileDescriptor::start). The user's bytes and all
    /// other callbacks wait as well. Reading goes on even if it is paused. Several
    /// layers may call this, each for its own handshake.
    ///
    /// If the connection ends before that, only `connection_lost` is called. A
    /// connector then sees a [failed
    /// attempt](bowline_protocol::ConnectError::Handshake). A layer sets the time limit
    /// of its handshake by [`wake_after`](Self::wake_after). The limit of a connector
    /// holds too.
    ///
    /// If the user closes the connection during the handshake and has written before,
    /// the handshake goes on. Then the bytes leave, and the connection closes. If
    /// nothing was written, it ends at once.
    ///
    /// Called later, on a connection that was made, it delays what is to come in the same
    /// way. [`connection_secured`](bowline_protocol::Protocol::connection_secured) tells
    /// the protocol that the handshake is done. A layer that has bytes to send in the
    /// clear first calls this when they were taken.
    pub fn begin_handshake(&mut self) {
        let is_made = !self.has(Flags::CONNECTION_MADE | Flags::UNESTABLISHED);
        let cold = self.cold();
        cold.handshakes += 1;
        match is_made {
            true => cold.was_made = true,
            false => cold.had_handshake |= !cold.was_made,
        }
        self.flags = self.flags.without(Flags::CONNECTION_MADE) | Flags::UNESTABLISHED;
    }

    /// Ends the handshake of a layer. The call of
    /// [`do_read`](crate::FileDescriptor::do_read) that ends it delivers nothing. The
    /// next call may; it follows once the protocol was told.
    pub fn established(&mut self) {
        let cold = self.cold();
        cold.handshakes = cold.handshakes.saturating_sub(1);
        if cold.handshakes == 0 && self.has(Flags::UNESTABLISHED) {
            self.flags = self.flags.without(Flags::UNESTABLISHED) | Flags::CONNECTION_MADE;
            self.set(Flags::UNSETTLED);
        }
        // Everything that was held goes on, in a layer above too.
        self.set(Flags::READABLE | Flags::WRITABLE);
    }

    /// Whether all layers are established.
    #[inline]
    pub fn is_established(&self) -> bool {
        !self.has(Flags::UNESTABLISHED)
    }

    /// Has the bytes of a layer [flushed](crate::FileDescriptor::flush) as soon as the
    /// socket takes some. They go before any byte of the user's that no layer has
    /// taken, until [none is left](crate::FileDescriptor::unflushed).
    pub fn flush_soon(&mut self) {
        if !self.is_broken() {
            self.set(Flags::UNFLUSHED | Flags::UNSETTLED);
        }
    }

    /// Has [`do_read`](crate::FileDescriptor::do_read) called soon. For a layer that holds
    /// something to be delivered, for which no event comes.
    pub fn read_soon(&mut self) {
        self.set(Flags::READABLE);
    }

    /// Takes the bytes that were [put back](bowline_protocol::Transport::push_back) and not
    /// delivered. A layer that begins in the middle of a connection takes them as its own
    /// input.
    pub fn take_put_back(&mut self) -> Vec<u8> {
        self.take_unread()
    }

    /// Has [`timer_fired`](crate::FileDescriptor::timer_fired) of the layer `L` called
    /// once, after `delay`. This replaces an earlier call that is still to come. Each
    /// layer of a connection has a timer of its own. A detach stops the timer, and it
    /// goes on when the connection is put together again.
    pub fn wake_after<L: FileDescriptor>(&mut self, delay: Duration) {
        let layer = TypeId::of::<L>();
        let timers = &mut self.cold().layer_timers;
        match timers.iter_mut().find(|timer| timer.layer == layer) {
            Some(timer) => {
                timer.after = Some(delay);
                timer.is_over = false;
            }
            None => timers.push(LayerTimer {
                layer,
                after: Some(delay),
                call: None,
                is_over: false,
            }),
        }
        self.set(Flags::UNSETTLED);
    }

    /// Takes back what [`wake_after`](Self::wake_after) asked for, for the layer `L`. A
    /// connection that needs nothing else of the kind is then as small as before.
    pub fn wake_no_more<L: FileDescriptor>(&mut self) {
        let layer = TypeId::of::<L>();
        let timers = self.cold.iter_mut().flat_map(|it| &mut it.layer_timers);
        for timer in timers.filter(|timer| timer.layer == layer) {
            (timer.after, timer.is_over) = (None, true);
            self.flags = self.flags | Flags::UNSETTLED;
        }
    }

    /// Ends the connection for `reason`, unless there is a reason already. The
    /// [unflushed bytes](Self::flush_soon) of a layer are offered to the socket once
    /// more, unless the reason is an abort.
    pub fn end(&mut self, reason: CloseReason) {
        if self.is_ended() {
            return;
        }
        self.set_state(State::Ending);
        self.set(Flags::END);
        if !matches!(reason, CloseReason::Done) {
            self.cold().reason = Some(reason);
        }
    }

    /// Has an orderly close wait for the peer, if that can be reset.
    pub(crate) fn linger(&mut self, lingering: LingeringClose) {
        self.cold().lingering = Some(lingering);
    }

    /// Makes the connection read-only. Called from
    /// [`start`](crate::FileDescriptor::start). Our half counts as closed from the
    /// beginning, and the peer's end ends the connection.
    pub fn never_writes(&mut self) {
        self.set_state(State::WriteClosed);
    }

    /// Makes the connection write-only. Called from
    /// [`start`](crate::FileDescriptor::start). Closing our half ends the connection.
    pub fn never_reads(&mut self) {
        self.set(Flags::NOT_READING);
    }

    /// How far the connection is in its life.
    pub fn transport_state(&self) -> TransportState {
        match self.state {
            State::Open | State::WriteClosing | State::WriteClosed => TransportState::Connected,
            State::Closing | State::Lingering => TransportState::Closing,
            State::Ending | State::Lost => TransportState::Lost,
        }
    }

    /// How many of the user's bytes were taken so far. In the user's stream, this is
    /// where the next call of
    /// [`write_some_data`](crate::FileDescriptor::write_some_data) begins.
    pub fn position(&self) -> u64 {
        self.sent
    }

    /// The number of unsent bytes above which a producer should wait.
    /// [`is_send_buffer_full`](crate::FileDescriptor::is_send_buffer_full) compares
    /// with it.
    pub fn high_watermark(&self) -> usize {
        self.high_watermark
    }
}

impl Link {
    pub(crate) fn new(shared: Rc<Shared>, token: Token) -> Self {
        Self {
            shared,
            token,
            sent: 0,
            cold: None,
            high_watermark: Watermarks::default().high,
            read_limit: 0,
            flags: Flags::WRITABLE.with(Flags::CONNECTION_MADE),
            state: State::Open,
            has_lent: Cell::new(false),
            #[cfg(feature = "inspect")]
            received_bytes: 0,
            #[cfg(feature = "inspect")]
            received_rounds: 0,
        }
    }

    /// Counts bytes that are delivered.
    #[cfg(feature = "inspect")]
    #[inline(always)]
    pub(crate) fn count_received(&mut self, bytes: usize) {
        // A read is shorter than 4 GiB. It stands in the way of each echo: two instructions,
        // and no branch.
        let (count, came_round) = self.received_bytes.overflowing_add(bytes as u32);
        self.received_bytes = count;
        self.received_rounds = self.received_rounds.wrapping_add(u16::from(came_round));
    }

    /// How many bytes were delivered so far.
    #[cfg(feature = "inspect")]
    pub(crate) fn received_bytes(&self) -> u64 {
        u64::from(self.received_rounds) << 32 | u64::from(self.received_bytes)
    }

    /// The flags that a connection keeps over a detach. Readiness and registration are
    /// found out anew.
    const KEPT: Flags = Flags::PAUSED
        .with(Flags::HELD)
        .with(Flags::READ_ENDED)
        .with(Flags::READ_ON)
        .with(Flags::END_ARRIVED)
        .with(Flags::NOT_READING)
        .with(Flags::REFUSES_DESCRIPTORS)
        .with(Flags::UNFLUSHED)
        .with(Flags::UNESTABLISHED)
        .with(Flags::CONNECTION_MADE)
        .with(Flags::PAUSE_PRODUCER)
        .with(Flags::RESUME_PRODUCER)
        .with(Flags::LEFT)
        .with(Flags::WRITE_CLOSED)
        .with(Flags::READING_RESUMED);

    pub(crate) fn kept(&mut self) -> Kept {
        let broken = self.cold.as_mut().and_then(|cold| {
            let broken = cold.broken.take()?;
            Some((broken, cold.unsent.0))
        });
        let cold = self.cold_ref();
        Kept {
            sent: self.sent,
            state: self.state,
            flags: self.flags.of(Self::KEPT),
            holds: cold.map_or(0, |cold| cold.holds),
            received: cold.map_or(0, |cold| cold.received),
            unclaimed: cold.map_or(0, |cold| cold.unclaimed),
            has_unknown: cold.is_some_and(|cold| cold.has_unknown),
            descriptors_left: cold.map_or(0, |cold| cold.descriptors_left),
            broken,
            read_limit: self.read_limit,
            watermarks: self.watermarks(),
            write_observer: cold.and_then(|cold| cold.write_observer.clone()),
            handshakes: cold.map_or(0, |cold| cold.handshakes),
            was_made: cold.is_some_and(|cold| cold.was_made),
            #[cfg(feature = "inspect")]
            received_bytes: self.received_bytes(),
            layer_timers: cold.map_or_else(Vec::new, |cold| cold.layer_timers.clone()),
            lingering: cold.and_then(|cold| cold.lingering),
            close_within: cold.and_then(|cold| cold.close_within),
            producer_is_paused: self.is_producer_paused(),
        }
    }

    /// Puts back the state that another connection had.
    pub(crate) fn restore(&mut self, kept: &mut Kept) {
        self.sent = kept.sent;
        #[cfg(feature = "inspect")]
        {
            self.received_bytes = kept.received_bytes as u32;
            self.received_rounds = (kept.received_bytes >> 32) as u16;
        }
        // The socket was in other hands.
        self.has_lent.set(true);
        self.read_limit = kept.read_limit;
        self.flags = self.flags.without(Self::KEPT) | kept.flags;
        if kept.watermarks != Watermarks::default() {
            self.set_watermarks(kept.watermarks);
        }
        if kept.was_made || !self.has(Flags::CONNECTION_MADE | Flags::UNESTABLISHED) {
            self.set(Flags::REATTACHED);
        }
        if let Some(observer) = &kept.write_observer {
            self.set_write_observer(Some(Rc::clone(observer)));
        }
        // Most connections have nothing to put there, and stay small.
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
        if kept.lingering.is_some() {
            self.cold().lingering = kept.lingering;
        }
        if kept.handshakes > 0 || !kept.layer_timers.is_empty() {
            let cold = self.cold();
            cold.handshakes = kept.handshakes;
            cold.was_made = kept.was_made;
            cold.layer_timers = std::mem::take(&mut kept.layer_timers);
            self.set(Flags::UNSETTLED);
        }
        if let Some((broken, unsent)) = kept.broken.take() {
            self.cold().unsent.0 = unsent;
            self.set_broken(broken);
        }
        self.set_state(kept.state);
    }

    /// Takes the timers out that layers want no more. If nothing else is rare about this
    /// connection, the memory for that is given back.
    pub(crate) fn take_ended_timers(&mut self) -> Vec<LayerTimer> {
        let Some(cold) = &mut self.cold else {
            return Vec::new();
        };
        if !cold.layer_timers.iter().any(|timer| timer.is_over) {
            return Vec::new();
        }
        let timers = std::mem::take(&mut cold.layer_timers).into_iter();
        let (ended, left) = timers.partition(|timer| timer.is_over);
        cold.layer_timers = left;
        if cold.is_unused() {
            self.cold = None;
        }
        ended
    }

    pub(crate) fn cold(&mut self) -> &mut Cold {
        self.cold.get_or_insert_default()
    }

    pub(crate) fn cold_ref(&self) -> Option<&Cold> {
        self.cold.as_deref()
    }

    #[inline(always)]
    pub(crate) fn has(&self, flags: Flags) -> bool {
        self.flags.intersects(flags)
    }

    #[inline(always)]
    pub(crate) fn set(&mut self, flags: Flags) {
        self.flags = self.flags | flags;
    }

    #[inline(always)]
    pub(crate) fn clear(&mut self, flags: Flags) {
        self.flags = self.flags.without(flags);
    }

    /// Whether there is a notice that can be delivered now. Before the connection is
    /// made, only its end can.
    #[inline]
    pub(crate) fn may_tell(&self) -> bool {
        self.has(Flags::PENDING) && (!self.has(Flags::UNESTABLISHED) || self.has(Flags::END))
    }

    /// The notice that is delivered next.
    pub(crate) fn first_pending(&self) -> Flags {
        self.flags.of(Flags::PENDING).first()
    }

    pub(crate) fn has_producer(&self) -> bool {
        self.has(Flags::FOLLOWED)
            && self
                .cold_ref()
                .is_some_and(|cold| cold.registration.is_some())
    }

    /// Whether somebody waits for bytes to leave: a producer, or a caller of
    /// `when_sent`.
    #[inline(always)]
    pub(crate) fn is_followed(&self) -> bool {
        self.has(Flags::FOLLOWED)
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
        self.set(match state {
            State::Open => Flags::NONE,
            State::WriteClosing | State::WriteClosed => Flags::WRITES_WITH_CARE | Flags::UNSETTLED,
            State::Closing | State::Lingering => {
                Flags::WRITES_WITH_CARE | Flags::UNSETTLED | Flags::NOT_READING
            }
            State::Ending | State::Lost => {
                Flags::WRITES_WITH_CARE | Flags::NOT_READING | Flags::NOT_WRITING
            }
        });
    }

    /// Whether a write has to ask [`takes_bytes`](Self::takes_bytes).
    #[inline(always)]
    pub(crate) fn writes_with_care(&self) -> bool {
        self.has(Flags::WRITES_WITH_CARE)
    }

    /// Returns other bits than none if a write [needs care](Self::writes_with_care).
    #[inline(always)]
    pub(crate) fn careful_bits(&self) -> usize {
        self.flags.bits(Flags::WRITES_WITH_CARE) as usize
    }

    /// Whether a write of `length` bytes is accepted, behind `unsent` bytes.
    #[inline]
    pub(crate) fn takes_bytes(&self, unsent: usize, length: usize) -> bool {
        !self.writes_with_care() || self.takes_bytes_by_state(unsent, length)
    }

    fn takes_bytes_by_state(&self, unsent: usize, length: usize) -> bool {
        let is_open = match self.state {
            State::Open => true,
            // A connection that closes waits for its producer, which may go on
            // meanwhile.
            State::Closing | State::WriteClosing => self.has_producer(),
            State::WriteClosed | State::Lingering | State::Ending | State::Lost => false,
        };
        let limit = self
            .cold_ref()
            .and_then(|cold| cold.limit)
            .unwrap_or(usize::MAX);
        is_open && !self.is_broken() && unsent.saturating_add(length) <= limit
    }

    /// Forgets the producer, without telling it.
    pub(crate) fn take_producer(&mut self) -> Option<(ProducerRef, ProducerKind)> {
        let registration = self.cold().registration.take()?;
        Some((registration.producer?, registration.kind))
    }

    pub(crate) fn set_write_observer(&mut self, observer: Option<Rc<dyn WriteObserver>>) {
        self.cold().write_observer = observer;
        self.set(Flags::WRITES_WITH_CARE);
    }

    /// Shows the observer, if there is one, the written bytes.
    #[inline]
    pub(crate) fn note_written(&self, data: &[u8]) {
        if self.writes_with_care()
            && !data.is_empty()
            && let Some(observer) = self
                .cold_ref()
                .and_then(|cold| cold.write_observer.as_ref())
        {
            observer.written(data);
        }
    }

    /// Whether the user's bytes can be sent now.
    #[inline]
    pub(crate) fn may_write(&self) -> bool {
        let masks = Flags::WAITS_FOR_TIMER | Flags::NOT_WRITING | Flags::UNESTABLISHED;
        self.flags.of(Flags::WRITABLE | masks) == Flags::WRITABLE
    }

    /// Whether bytes of a layer can be sent now.
    #[inline]
    pub(crate) fn may_flush(&self) -> bool {
        let decisive = Flags::UNFLUSHED | Flags::WRITABLE;
        let masks = Flags::WAITS_FOR_TIMER | Flags::NOT_WRITING;
        self.flags.of(decisive | masks) == decisive
    }

    /// Whether the user's bytes can be sent now, and nothing comes before them.
    #[inline]
    pub(crate) fn may_only_write(&self) -> bool {
        let masks = Flags::WAITS_FOR_TIMER
            | Flags::NOT_WRITING
            | Flags::UNESTABLISHED
            | Flags::UNFLUSHED
            | Flags::PENDING;
        self.flags.of(Flags::WRITABLE | masks) == Flags::WRITABLE
    }

    /// Whether there is surely nothing to tell, to read or to settle. False for a
    /// paused connection that may have something to read.
    #[inline]
    pub(crate) fn is_at_rest(&self) -> bool {
        let unrest = Flags::READABLE
            | Flags::UNSETTLED
            | Flags::UNWATCHED
            | Flags::UNFLUSHED
            | Flags::PENDING;
        !self.has(unrest)
    }

    /// Whether reading may succeed now, and either the protocol or a handshake wants
    /// it. A pause does not stop a handshake.
    #[inline]
    pub(crate) fn may_read(&self) -> bool {
        let masks = Flags::PAUSED | Flags::HELD | Flags::NOT_READING;
        let decisive = self.flags.of(Flags::READABLE | masks);
        decisive == Flags::READABLE || self.has(Flags::UNESTABLISHED) && self.may_shake_hands()
    }

    /// Whether reading may succeed now, and only a handshake wants it. A connection
    /// that closes goes on with its handshake if bytes were written.
    #[cold]
    fn may_shake_hands(&self) -> bool {
        let closes = self.state == State::Closing && !self.has(Flags::READ_ENDED);
        self.has(Flags::READABLE) && (closes || self.is_open_for_reading())
    }

    /// Whether reading may succeed now, is wanted, and nothing comes before it.
    #[inline]
    pub(crate) fn may_only_read(&self) -> bool {
        let masks = Flags::PAUSED
            | Flags::HELD
            | Flags::NOT_READING
            | Flags::PUSHED_BACK
            | Flags::UNFLUSHED
            | Flags::PENDING;
        self.flags.of(Flags::READABLE | masks) == Flags::READABLE
    }

    /// Whether data may be delivered at all. False once the connection closes, has
    /// ended, or is at the peer's end.
    #[inline]
    pub(crate) fn is_open_for_reading(&self) -> bool {
        !self.has(Flags::NOT_READING)
    }

    /// Whether data may be delivered now.
    #[inline]
    pub(crate) fn is_reading(&self) -> bool {
        !self.has(Flags::NOT_READING | Flags::PAUSED)
    }

    /// Notes that the peer's end was read.
    pub(crate) fn read_ended(&mut self) {
        self.set(Flags::READ_ENDED | Flags::NOT_READING | Flags::UNSETTLED);
        self.clear(Flags::READABLE);
    }

    // Producers.

    pub(crate) fn is_producer_paused(&self) -> bool {
        self.cold_ref()
            .and_then(|cold| cold.registration.as_ref())
            .is_some_and(|registration| registration.is_paused)
    }

    /// Pauses a push producer, unless it is paused.
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

    pub(crate) fn pause_producer(&mut self) {
        if let Some(registration) = &mut self.cold().registration {
            registration.is_paused = true;
            self.set(Flags::PAUSE_PRODUCER);
        }
    }

    pub(crate) fn resume_producer_if_drained(&mut self, unsent: usize, is_full: bool) {
        let low = self.low_watermark();
        let Some(registration) = &mut self.cold().registration else {
            return;
        };
        match registration.kind {
            ProducerKind::Push => {
                if registration.is_paused && unsent <= low && !is_full {
                    // Cleared before the producer is told: it may fill the buffer
                    // again, and is then paused anew.
                    // buffer again, and then pauses anew.
                    registration.is_paused = false;
                    self.set(Flags::RESUME_PRODUCER);
                }
            }
            ProducerKind::Pull => {
                if unsent == 0 {
                    self.set(Flags::RESUME_PRODUCER);
                }
            }
        }
    }

    /// Registers a producer.
    pub(crate) fn put_producer(
        &mut self,
        producer: ProducerRef,
        kind: ProducerKind,
        is_paused: bool,
    ) {
        let cold = self.cold();
        let serial = cold.next_serial;
        cold.next_serial += 1;
        cold.registration = Some(Registration {
            producer: Some(producer),
            kind,
            is_paused,
            serial,
        });
        self.set(Flags::FOLLOWED);
    }

    pub(crate) fn unregister_producer(&mut self) {
        if let Some(cold) = &mut self.cold {
            cold.registration = None;
            if cold.awaited.is_empty() {
                self.clear(Flags::FOLLOWED);
            }
        }
        self.clear(Flags::PAUSE_PRODUCER | Flags::RESUME_PRODUCER);
    }

    // Awaited bytes.

    /// See [`Transport::when_sent`](bowline_protocol::Transport::when_sent).
    pub(crate) fn await_sent(&mut self, position: u64, then: WhenSent) {
        let awaited = &mut self.cold().awaited;
        let place = awaited.partition_point(|other| other.position <= position);
        awaited.insert(place, Awaited { position, then });
        self.set(Flags::FOLLOWED);
        self.note_sent();
    }

    /// Plans a notice if awaited bytes have left.
    pub(crate) fn note_sent(&mut self) {
        let first = self.cold_ref().and_then(|cold| cold.awaited.first());
        if first.is_some_and(|first| first.position <= self.sent) {
            self.set(Flags::LEFT);
        }
    }

    /// Takes the calls whose bytes have left, or all of them if nothing more leaves.
    pub(crate) fn take_awaited(&mut self, is_over: bool) -> Vec<Awaited> {
        let sent = self.sent;
        let Some(cold) = &mut self.cold else {
            return Vec::new();
        };
        let count = match is_over {
            true => cold.awaited.len(),
            false => cold.awaited.partition_point(|it| it.position <= sent),
        };
        let taken = cold.awaited.drain(..count).collect();
        if cold.awaited.is_empty() && cold.registration.is_none() {
            self.clear(Flags::FOLLOWED);
        }
        taken
    }

    // Ends.

    /// Handles an error of sending. Returns the error if a later attempt cannot
    /// succeed.
    pub(crate) fn lasting_error(&mut self, error: io::Error) -> Option<io::Error> {
        if error.kind() == io::ErrorKind::WouldBlock {
            self.clear(Flags::WRITABLE);
        } else if sys::is_transient(&error) {
            log::debug!(target: log::TRANSPORT, "{}: send refused for now: {error}", self.token);
            self.set(Flags::WAITS_FOR_TIMER | Flags::UNSETTLED);
            let cold = self.cold();
            cold.refusals = cold.refusals.saturating_add(1);
            cold.refusal = Some(error);
        } else {
            return Some(error);
        }
        None
    }

    pub(crate) fn set_broken(&mut self, broken: Broken) {
        self.cold().broken = Some(broken);
        // A short read means nothing now. Reading goes on until nothing is left.
        self.set(Flags::READABLE | Flags::READ_ON | Flags::UNSETTLED | Flags::WRITES_WITH_CARE);
        self.clear(Flags::UNFLUSHED);
    }

    /// Whether nothing more can be sent, and the connection is only read to its end.
    pub(crate) fn is_broken(&self) -> bool {
        self.remains().is_some()
    }

    pub(crate) fn broken_mut(&mut self) -> Option<&mut Broken> {
        self.cold.as_mut()?.broken.as_mut()
    }

    /// What is left to read of a broken connection.
    pub(crate) fn remains(&self) -> Option<Remains> {
        let broken = self.cold_ref()?.broken.as_ref();
        broken.map(|broken| broken.remains)
    }

    /// Ends a broken connection that was read to its end.
    pub(crate) fn end_broken(&mut self) {
        let broken = self.cold().broken.take();
        self.end(broken.map_or(CloseReason::Done, |it| it.reason));
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
            self.set(Flags::UNSETTLED);
        }
    }

    /// Whether the connection is to be lost once it is idle.
    pub(crate) fn is_draining(&self) -> bool {
        self.cold_ref().is_some_and(|cold| cold.draining.is_some())
    }

    /// Whether bytes that the peer still sends are read and dropped.
    pub(crate) fn may_drop(&self) -> bool {
        self.state == State::Lingering && self.has(Flags::READABLE)
    }

    pub(crate) fn lose_write_connection(&mut self) {
        if self.state == State::Open {
            self.set_state(State::WriteClosing);
        }
    }

    // Reading.

    pub(crate) fn pause_producing(&mut self) {
        self.set(Flags::PAUSED);
        self.clear(Flags::READING_RESUMED);
    }

    pub(crate) fn resume_producing(&mut self) {
        if self.has(Flags::PAUSED) {
            self.clear(Flags::PAUSED);
            if self.is_open_for_reading() {
                self.set(Flags::READING_RESUMED);
            }
        }
    }

    pub(crate) fn hold_reading(&mut self) {
        self.cold().holds += 1;
        self.set(Flags::HELD);
    }

    pub(crate) fn release_reading(&mut self) {
        if self.has(Flags::HELD) {
            let cold = self.cold();
            cold.holds -= 1;
            if cold.holds == 0 {
                self.clear(Flags::HELD);
            }
        }
    }

    /// How many bytes a read brings at the most.
    #[inline(always)]
    pub(crate) fn read_limit(&self) -> usize {
        match self.read_limit {
            0 => READ_BYTES,
            limit => usize::from(limit),
        }
    }

    pub(crate) fn set_read_limit(&mut self, limit: Option<NonZeroUsize>) {
        let limit = limit.map_or(READ_BYTES, NonZeroUsize::get).min(READ_BYTES);
        self.read_limit = (limit % READ_BYTES) as u16;
    }

    pub(crate) fn push_back(&mut self, mut data: Vec<u8>) {
        if data.is_empty() || !self.is_open_for_reading() {
            return;
        }
        let cold = self.cold();
        data.append(&mut cold.pushed_back);
        cold.pushed_back = data;
        // Latched, like any other bytes that wait to be read.
        self.set(Flags::PUSHED_BACK | Flags::READABLE);
    }

    /// Takes as many of the pushed-back bytes as one read may.
    pub(crate) fn take_pushed_back(&mut self) -> Vec<u8> {
        let limit = self.read_limit();
        let left = &mut self.cold().pushed_back;
        let rest = if left.len() > limit {
            left.split_off(limit)
        } else {
            Vec::new()
        };
        let taken = std::mem::replace(left, rest);
        if self.cold().pushed_back.is_empty() {
            self.clear(Flags::PUSHED_BACK);
        }
        taken
    }

    /// How many pushed-back bytes are not delivered yet.
    pub(crate) fn pushed_back(&self) -> usize {
        self.cold_ref().map_or(0, |cold| cold.pushed_back.len())
    }

    /// Takes all pushed-back bytes.
    pub(crate) fn take_unread(&mut self) -> Vec<u8> {
        if !self.has(Flags::PUSHED_BACK) {
            return Vec::new();
        }
        self.clear(Flags::PUSHED_BACK);
        std::mem::take(&mut self.cold().pushed_back)
    }

    // Settings.

    fn low_watermark(&self) -> usize {
        self.cold_ref().map_or(0, |cold| cold.low_watermark)
    }

    pub(crate) fn watermarks(&self) -> Watermarks {
        Watermarks::default()
            .low(self.low_watermark())
            .high(self.high_watermark)
            .limit(
                self.cold_ref()
                    .and_then(|cold| cold.limit)
                    .unwrap_or(usize::MAX),
            )
    }

    pub(crate) fn set_watermarks(&mut self, watermarks: Watermarks) {
        self.high_watermark = watermarks.high;
        let cold = self.cold();
        cold.low_watermark = watermarks.low.min(watermarks.high);
        cold.limit = (watermarks.limit != usize::MAX).then_some(watermarks.limit);
        self.set(Flags::WRITES_WITH_CARE);
    }

    /// Closes descriptors that the protocol does not want.
    pub(crate) fn close_unclaimed(&mut self, descriptors: impl IntoIterator<Item = OwnedFd>) {
        let count = self.shared.close_received(descriptors);
        if count > 0 {
            self.cold().unclaimed += count as u64;
        }
    }
}
