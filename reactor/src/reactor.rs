//! The reactor as its users see it; `turn` has the phases of its loop.

mod forked;
mod inside;
mod limits;
mod stopping;
mod turn;
mod vacancy;

use std::any::{Any, TypeId};
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::rc::Rc;
use std::time::{Duration, Instant};

use mio::unix::SourceFd;

use crate::clock::{Clock, SystemClock};
use crate::delayed_call::DelayedCall;
use crate::descriptor::{Descriptor, Interest, Next};
use crate::error::{ReactorError, RunError, TriggerError};
use crate::handle::Handle;
use crate::log;
use crate::meter::Meter;
use crate::panic::{Contained, catch_panic};
use crate::remote::{RemoteCall, RemoteHandle};
use crate::simulated::Source;
use crate::slots::Slots;
use crate::sys::{self, TimerFd};
use crate::timers::{EmptyPlace, Moment, TimerKey, Timers};
use crate::token::Token;
use crate::triggers::{Hold, Phase, SystemEvent, TriggerId, Triggers};

use self::inside::Part;
pub use self::inside::{Descriptors, Registered};
use self::limits::{EVENTS_PER_TURN, MAX_EVENTS};
pub use self::limits::{Limits, Statistics};
use self::stopping::Stopping;
pub use self::stopping::{DrainRound, GracefulStop};
use self::turn::Turning;
pub use self::vacancy::Vacancy;

/// A single-threaded, callback-driven event loop.
///
/// It owns the registered [`Descriptor`]s, the delayed calls and the queued
/// calls. It runs their callbacks one at a time; they never nest. A program may
/// have any number of reactors, each in a thread of its own or turned by hand. A
/// reactor that has stopped can be run again.
///
/// # One turn
///
/// 1. **Poll**: wait for readiness or for the next delayed call. If anything is
///    left to do, look without waiting.
/// 2. **Calls**: from other threads, then of [`call_soon`](Self::call_soon).
/// 3. **Ready descriptors**: those with events, then those that asked for
///    another turn.
/// 4. **Notifications** that callbacks left for other descriptors.
/// 5. **Timers** that were due when the turn began: by time, then in the order
///    scheduled. Then the notifications that they leave.
/// 6. **System events**: startup and shutdown triggers.
///
/// Each phase has a budget ([`Limits`]). The rest is done in the next turn, whose
/// poll does not wait then.
///
/// # Forks
///
/// A forked process has a copy of the reactor. The copy shares the poller and the
/// timer descriptor with the parent: whatever the child did to them would happen to
/// the parent too. So the copy does nothing any more. It does not start or turn. It
/// watches and deregisters nothing, and removes no socket file. Requests to its
/// descriptors are not carried out. Dropping it closes the child's own copies of the
/// descriptors, and no peer notices.
///
/// A child that goes on as a server calls [`after_fork`](Self::after_fork), or makes a
/// reactor of its own. A daemon forks before it makes a reactor, since threads do not
/// survive a fork either. (Forks are noticed through pthread_atfork(3): those of
/// fork(3) and daemon(3), not a system call made by hand.)
///
/// Fork between turns: before [`run`](Self::run), or when it has returned after a
/// [`crash`](Self::crash). A child that was forked inside a callback must not return
/// from it, since the rest of the parent's turn would follow. It executes another
/// program, or ends with `_exit`.
///
/// # Late is not missed
///
/// In a turn, ready descriptors come before due timers. So a time limit never ends a
/// connection whose bytes have arrived in time.
///
/// Sometimes the loop itself is late: the process was stopped, the machine was
/// suspended, a callback took long. If it is 50 ms late or more, timers wait until
/// everything that is ready has been served. That may take several turns, some 64 at
/// the most. Time limits built on the reactor need no arithmetic of their own for
/// this.
///
/// # Panics
///
/// A panic in a callback is caught and logged. It costs only the descriptor, delayed
/// call or trigger that the callback belongs to.
///
/// A callback must not put another reactor in the place of the one it is given
/// ([`mem::swap`], [`mem::replace`]). If it does, it is treated as if it had panicked:
/// its descriptor ends. The turn goes on with the reactor that stands there now, and
/// [`run`](Self::run) answers [`RunError::Replaced`] in the end. The reactor that was
/// moved away can be turned where it is now. It has lost nothing else.
///
/// # Examples
///
/// ```
/// use std::time::Duration;
/// use bowline::Reactor;
///
/// let mut reactor = Reactor::new()?;
/// reactor.call_later(Duration::from_millis(1), |reactor| {
///     reactor.stop().expect("it runs: this is one of its callbacks");
/// });
/// reactor.run()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Reactor {
    pub(crate) slots: Slots,
    /// The descriptor whose callback runs, for the case that it panics;
    /// [`Token::WAKER`] while none does.
    pub(crate) current: Token,
    /// Those that asked for another turn.
    again: VecDeque<Token>,
    deferred: VecDeque<Deferred>,
    pub(crate) timers: Timers<TimerCall>,
    /// This turn's time, read when it is first asked for.
    now: Cell<Option<Instant>>,
    /// The time that was read last, as the timers count.
    moment: Cell<Moment>,
    /// When delayed calls ran last.
    timers_ran: Option<Instant>,
    /// For how many turns they have waited for what is ready, since the loop was
    /// in time; the largest number once they were not to wait any more.
    held_back: usize,
    clock: Box<dyn Clock>,
    soon: VecDeque<PlainCall>,
    remote: RemoteHandle,
    remote_calls: VecDeque<RemoteCall>,
    state: State,
    /// Why the program cannot go on, until `run` has answered it.
    failure: Option<io::Error>,
    stopping: Stopping,
    /// Whether a turn runs, and callbacks with it: they must not nest.
    is_turning: bool,
    /// Whether a callback asked for its own descriptor by its handle.
    has_missed_own: bool,
    /// The [process](sys::generation) that it was made in.
    process: u32,
    triggers: Triggers,
    limits: Limits,
    pub(crate) statistics: Statistics,
    pub(crate) meter: Meter,
    /// Made when the loop first waits for a delayed call.
    alarm: Option<Alarm>,
    extensions: Vec<(TypeId, Rc<dyn Any>)>,
    parts: RefCell<Vec<Part>>,
    pub(crate) source: Source,
    events: mio::Events,
    poll: mio::Poll,
}

/// What a timer is for; it is told its own name.
type TimerCall = sys::Call<DelayedCall>;

/// A call that is told nothing but the reactor.
pub(crate) type PlainCall = sys::Call<()>;

fn plain(call: impl FnOnce(&mut Reactor) + 'static) -> PlainCall {
    PlainCall::new(|reactor: &mut Reactor, ()| call(reactor))
}

type Entrance = Box<dyn FnOnce(Option<&mut dyn Descriptor>, &mut Reactor) -> Next>;

/// What is left for the notifications phase.
enum Deferred {
    Attend(Token),
    Enter(Token, Entrance),
    Call(PlainCall),
    /// Its callback put this reactor in the place of its own.
    Stray(Box<dyn Descriptor>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Idle,
    /// Waits for the holds on the startup.
    Starting,
    Running,
    /// Somebody called `stop`; the triggers have not begun.
    StopAsked,
    /// Waits for the holds on the shutdown, and in a graceful stop for what
    /// drains.
    Stopping,
}

/// The timer descriptor and what it was last set to.
struct Alarm {
    timer: TimerFd,
    set_to: Option<Instant>,
}

/// What a [turn](Reactor::turn) says about the reactor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// There may be more to do.
    Continue,
    /// The reactor is not running: it has stopped, or was never started.
    Stopped,
}

impl Reactor {
    /// Makes a reactor with a poller of its own. That takes two descriptors, and one
    /// more from the first delayed call on.
    ///
    /// # Errors
    ///
    /// Those of epoll_create1(2) and eventfd(2), `EMFILE` above all.
    pub fn new() -> io::Result<Self> {
        Self::with_clock(SystemClock)
    }

    /// Makes a reactor whose time comes from `clock`.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub fn with_clock(clock: impl Clock) -> io::Result<Self> {
        let poll = mio::Poll::new()?;
        let waker = mio::Waker::new(poll.registry(), Token::WAKER.to_mio())?;
        Ok(Self {
            slots: Slots::new(),
            current: Token::WAKER,
            again: VecDeque::new(),
            deferred: VecDeque::new(),
            timers: Timers::new(clock.now()),
            moment: Cell::new(Moment::ORIGIN),
            now: Cell::new(None),
            timers_ran: None,
            held_back: 0,
            clock: Box::new(clock),
            soon: VecDeque::new(),
            remote: RemoteHandle::new(waker),
            remote_calls: VecDeque::new(),
            state: State::Idle,
            process: sys::generation(),
            failure: None,
            stopping: Stopping::default(),
            is_turning: false,
            has_missed_own: false,
            triggers: Triggers::new(),
            limits: Limits::default(),
            statistics: Statistics::default(),
            meter: Meter::default(),
            alarm: None,
            extensions: Vec::new(),
            parts: RefCell::default(),
            source: Default::default(),
            events: mio::Events::with_capacity(EVENTS_PER_TURN),
            poll,
        })
    }

    // Running; `stopping` has the other end.

    /// Starts the reactor and turns it until it is stopped.
    ///
    /// Returns when the shutdown triggers have run and every descriptor has been
    /// disconnected, or at once after [`crash`](Self::crash). Can be called
    /// again afterwards. (Twisted: `reactor.run`.)
    ///
    /// # Errors
    ///
    /// - [`RunError::AlreadyRunning`] when it runs or is turned by hand. Inside a
    ///   callback that is always so.
    /// - [`RunError::Failed`] after [`fail`](Self::fail).
    /// - [`RunError::Forked`] in a forked child, before [`after_fork`](Self::after_fork).
    /// - [`RunError::Replaced`] when a callback put another reactor in its place.
    pub fn run(&mut self) -> Result<(), RunError> {
        let number = self.number();
        self.start().map_err(|error| match error {
            ReactorError::Forked => RunError::Forked,
            _ => RunError::AlreadyRunning,
        })?;
        if self.failure.is_some() {
            // Of before the start: what has begun ends as ever.
            let _ = self.stop();
        }
        while self.state != State::Idle {
            self.turn(None);
        }
        if self.number() != number {
            return Err(RunError::Replaced);
        }
        match self.failure.take() {
            Some(error) => Err(RunError::Failed(error)),
            None => Ok(()),
        }
    }

    /// Runs the startup triggers, for a reactor that is turned by hand.
    ///
    /// # Errors
    ///
    /// [`ReactorError::AlreadyRunning`], as for [`run`](Self::run).
    pub fn start(&mut self) -> Result<(), ReactorError> {
        if self.is_forked() {
            return Err(ReactorError::Forked);
        }
        // After a crash the state is idle while the callback still runs.
        if self.state != State::Idle || self.is_turning() {
            return Err(ReactorError::AlreadyRunning);
        }
        log::debug!(target: log::REACTOR, "the loop begins");
        self.forget_stop();
        self.state = State::Starting;
        self.now.set(None);
        let turning = Turning::begin(self);
        turning.reactor.fire(Phase::Before, SystemEvent::Startup);
        turning.reactor.system_events_phase();
        turning.end();
        Ok(())
    }

    /// Runs one turn of the loop: waits up to `timeout` for something to do
    /// (`None`: without end), then does it.
    ///
    /// To embed the reactor in another loop, call [`start`](Self::start) once. Then
    /// wait until the reactor's descriptor ([`AsFd`]) is readable or
    /// [`next_deadline`](Self::next_deadline) has come, and turn with a timeout of
    /// zero until [`is_idle`](Self::is_idle).
    ///
    /// Inside a callback this does nothing but log a warning: callbacks would nest.
    pub fn turn(&mut self, timeout: Option<Duration>) -> Turn {
        if self.is_turning && self.is_turning() {
            log::warn!(target: log::REACTOR, "turned from inside a callback: ignored");
        } else if self.is_forked() {
            log::error!(target: log::REACTOR, "{}: ignored", ReactorError::Forked);
            self.state = State::Idle;
        } else {
            let turning = Turning::begin(self);
            turning.reactor.turn_once(timeout);
            turning.end();
        }
        if self.state == State::Idle {
            Turn::Stopped
        } else {
            Turn::Continue
        }
    }

    /// Whether this process was forked from the one that made the reactor.
    fn is_forked(&self) -> bool {
        self.process != sys::known_generation()
    }

    /// Ends the loop because the program cannot go on.
    ///
    /// It [stops](Self::stop) the reactor and logs the error at once.
    /// [`run`](Self::run) then answers `error`, so a `main` that passes it on ends
    /// with a failure status. Of several errors the first is answered. If the reactor
    /// does not run yet, the next run ends with the error. A program that turns the
    /// reactor by hand asks [`take_failure`](Self::take_failure).
    pub fn fail(&mut self, error: io::Error) {
        log::error!(target: log::REACTOR, "stopping, since the program cannot go on: {error}");
        self.failure.get_or_insert(error);
        // It may not run yet, or be stopping.
        let _ = self.stop();
    }

    /// Takes the error that [`fail`](Self::fail) was given. For programs that turn the
    /// reactor by hand instead of calling [`run`](Self::run).
    pub fn take_failure(&mut self) -> Option<io::Error> {
        self.failure.take()
    }

    /// Ends the loop after this turn and leaves everything as it is. No trigger
    /// runs, descriptors stay registered, and the reactor can be run again.
    /// (Twisted: `reactor.crash`.)
    ///
    /// # Errors
    ///
    /// [`ReactorError::NotRunning`].
    pub fn crash(&mut self) -> Result<(), ReactorError> {
        if self.state == State::Idle {
            return Err(ReactorError::NotRunning);
        }
        self.state = State::Idle;
        log::debug!(target: log::REACTOR, "the loop ends, and leaves everything as it is");
        Ok(())
    }

    /// Whether the reactor was started and has not finished stopping. True in every
    /// callback except those before the startup.
    pub fn is_running(&self) -> bool {
        !matches!(self.state, State::Idle | State::Starting)
    }

    /// Whether a turn would only wait now, for descriptors or for
    /// [`next_deadline`](Self::next_deadline).
    pub fn is_idle(&self) -> bool {
        self.again.is_empty()
            && self.deferred.is_empty()
            && self.soon.is_empty()
            && self.remote_calls.is_empty()
            && !self.remote.is_waiting()
            && !self.timers.has_due()
            && (self.state == State::Running || !self.has_stop_to_do())
            && !self.source.has_events()
    }

    /// Adds a trigger: a call to run at startup or shutdown. Within a phase, triggers
    /// run in the order they were added. Each runs once and is then forgotten.
    /// (Twisted: `addSystemEventTrigger`.)
    pub fn add_trigger(
        &mut self,
        phase: Phase,
        event: SystemEvent,
        call: impl FnOnce(&mut Self) + 'static,
    ) -> TriggerId {
        self.triggers.add(phase, event, plain(call))
    }

    /// Takes a trigger back. Works inside another trigger too.
    ///
    /// # Errors
    ///
    /// [`TriggerError`] when it has run or was removed.
    pub fn remove_trigger(&mut self, id: TriggerId) -> Result<(), TriggerError> {
        if self.triggers.remove(id) {
            Ok(())
        } else {
            Err(TriggerError)
        }
    }

    /// Holds `event` in its [`Before`](Phase::Before) phase until the result is
    /// dropped. The loop turns meanwhile. Take it in a trigger of that phase, or
    /// earlier.
    pub fn hold(&self, event: SystemEvent) -> Hold {
        self.triggers.hold(event)
    }

    /// Runs `call` when the reactor runs: in this turn if it runs already, otherwise
    /// after its startup, in the order asked. (Twisted: `callWhenRunning`.)
    pub fn call_when_running(&mut self, call: impl FnOnce(&mut Self) + 'static) {
        if self.is_running() {
            self.defer(call);
        } else {
            self.add_trigger(Phase::After, SystemEvent::Startup, call);
        }
    }

    // Time.

    /// The time of this turn. The clock is read at most once per turn. Between turns
    /// this is the present time.
    pub fn now(&self) -> Instant {
        match self.now.get() {
            Some(now) if self.is_turning => now,
            _ => self.read_clock(),
        }
    }

    /// [`now`](Self::now), as the timers count.
    #[inline]
    fn moment(&self) -> Moment {
        if !self.is_turning || self.now.get().is_none() {
            self.read_clock();
        }
        self.moment.get()
    }

    #[inline(never)]
    fn read_clock(&self) -> Instant {
        let now = self.clock.now();
        self.moment.set(self.timers.moment(now));
        if self.is_turning {
            self.now.set(Some(now));
        }
        now
    }

    /// What the clock says at this moment, in the middle of a turn too.
    pub(crate) fn time_of_clock(&self) -> Instant {
        self.clock.now()
    }

    /// Runs `call` once `delay` has passed since this turn's time, never earlier.
    ///
    /// Calls that are due at the same time run in the order they were scheduled. A
    /// call with no delay, scheduled inside a callback, runs in a later turn, when
    /// descriptors have had their chance. A delay beyond what the clock can represent
    /// never ends. (Twisted: `reactor.callLater`.)
    ///
    /// Allocates only while more calls wait than ever before, and for a closure that
    /// captures more than 24 bytes, which is boxed.
    pub fn call_later(
        &mut self,
        delay: Duration,
        call: impl FnOnce(&mut Self) + 'static,
    ) -> DelayedCall {
        let (delayed, place) = self.schedule(delay);
        place.fill(sys::Call::new(|reactor: &mut Self, _| call(reactor)));
        delayed
    }

    /// Calls [`Descriptor::timer_fired`] of the descriptor `token` after `delay`,
    /// without a box. Nothing happens if the descriptor is gone by then.
    pub fn notify_later(&mut self, delay: Duration, token: Token) -> DelayedCall {
        let (delayed, place) = self.schedule(delay);
        place.fill(sys::Call::new(move |reactor: &mut Self, call| {
            reactor.dispatch(token, |descriptor, reactor| {
                descriptor.timer_fired(reactor, call)
            });
        }));
        delayed
    }

    /// What no other reactor of the process answers.
    pub(crate) fn number(&self) -> u32 {
        self.timers.number()
    }

    #[inline]
    fn schedule(&mut self, delay: Duration) -> (DelayedCall, EmptyPlace<'_, TimerCall>) {
        let (key, place) = match self.moment_after(delay) {
            Some(deadline) => self.timers.insert_place(deadline),
            None => self.schedule_distant(delay),
        };
        (DelayedCall { key }, place)
    }

    #[cold]
    fn schedule_distant(&mut self, delay: Duration) -> (TimerKey, EmptyPlace<'_, TimerCall>) {
        let deadline = self.deadline_after(delay);
        self.timers.insert_distant(deadline)
    }

    /// `None` for what only an `Instant` can say.
    #[inline]
    pub(crate) fn moment_after(&self, delay: Duration) -> Option<Moment> {
        self.moment().after(delay)
    }

    /// The delayed calls that wait, in no particular order. (Twisted:
    /// `getDelayedCalls`.)
    pub fn delayed_calls(&self) -> impl Iterator<Item = DelayedCall> + '_ {
        self.timers.keys().map(|key| DelayedCall { key })
    }

    /// When the loop has to turn next for delayed calls. Never later than the
    /// earliest of them is due. It may be earlier where that one is far away.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.timers.next_wakeup()
    }

    pub(crate) fn deadline_after(&self, delay: Duration) -> Instant {
        let now = self.now();
        // Some 30 years, should the sum be beyond what the clock can hold.
        const NEVER: Duration = Duration::from_secs(1_000_000_000);
        now.checked_add(delay).unwrap_or_else(|| now + NEVER)
    }

    // Calls.

    /// Runs `call` in the next turn, before timers and descriptors.
    ///
    /// Calls run in the order they were made.
    pub fn call_soon(&mut self, call: impl FnOnce(&mut Self) + 'static) {
        self.soon.push_back(plain(call));
    }

    /// Runs `call` in this turn, after the running callback and after what was
    /// deferred before. This is how a callback calls other user code without nesting.
    pub fn defer(&mut self, call: impl FnOnce(&mut Self) + 'static) {
        self.deferred.push_back(Deferred::Call(plain(call)));
    }

    /// A handle on this reactor that other threads may hold.
    pub fn remote(&self) -> RemoteHandle {
        self.remote.clone()
    }

    // Descriptors.

    /// Registers the descriptor that `build` makes and watches its
    /// [`source`](Descriptor::source) for `interest`. `build` is given the
    /// descriptor's name.
    ///
    /// A descriptor that has nothing to watch, and lives by notifications and timers,
    /// is installed in a [`vacancy`](Self::vacancy) instead.
    ///
    /// # Errors
    ///
    /// Those of epoll_ctl(2): `EEXIST` for a file that is watched already, `EPERM` for
    /// one that cannot be polled. `InvalidInput` for a descriptor without a source:
    /// nothing would ever call it. The descriptor is dropped.
    pub fn register(
        &mut self,
        interest: Interest,
        build: impl FnOnce(Token) -> Box<dyn Descriptor>,
    ) -> io::Result<Token> {
        let mut vacancy = self.vacancy()?;
        let entry = build(vacancy.token());
        let source = entry.source().ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::InvalidInput,
                "descriptor has no source to be watched",
            )
        })?;
        vacancy.watch(source, interest)?;
        Ok(vacancy.install(entry))
    }

    /// Reserves a slot, and its name, for a descriptor that is still to be built. For
    /// callers that need the name first, or may have to back out.
    ///
    /// # Errors
    ///
    /// When there are 2^24 descriptors.
    pub fn vacancy(&mut self) -> io::Result<Vacancy<'_>> {
        let token = self.slots.reserve().ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::OutOfMemory,
                "too many registered descriptors",
            )
        })?;
        let (now, clock) = (self.now.get(), &*self.clock);
        self.meter
            .registered(|| now.unwrap_or_else(|| clock.now()), token);
        Ok(Vacancy {
            reactor: self,
            token,
        })
    }

    /// Reports readiness of `source` under `token` from now on, edge-triggered.
    /// Readiness that is there already is reported at once.
    ///
    /// # Errors
    ///
    /// Those of epoll_ctl(2).
    pub fn watch(
        &mut self,
        token: Token,
        source: BorrowedFd<'_>,
        interest: Interest,
    ) -> io::Result<()> {
        if self.is_forked() {
            return Err(io::Error::other(ReactorError::Forked));
        }
        self.slots.set_interest(token, interest);
        self.poll.registry().register(
            &mut SourceFd(&source.as_raw_fd()),
            token.to_mio(),
            interest.to_mio(),
        )
    }

    /// Changes the name or the interest under which `source` is watched. Present
    /// readiness is reported again.
    ///
    /// # Errors
    ///
    /// Those of epoll_ctl(2).
    pub fn rewatch(
        &mut self,
        token: Token,
        source: BorrowedFd<'_>,
        interest: Interest,
    ) -> io::Result<()> {
        if self.is_forked() {
            return Err(io::Error::other(ReactorError::Forked));
        }
        self.slots.set_interest(token, interest);
        self.poll.registry().reregister(
            &mut SourceFd(&source.as_raw_fd()),
            token.to_mio(),
            interest.to_mio(),
        )
    }

    /// Stops watching `source`. Call it before the source is closed or passed on. A
    /// failure is logged, since a caller could do nothing about it.
    pub fn unwatch(&mut self, source: BorrowedFd<'_>) {
        if self.is_forked() {
            // The watch is the parent's.
            return;
        }
        let raw = source.as_raw_fd();
        if let Err(error) = self.poll.registry().deregister(&mut SourceFd(&raw)) {
            log::warn!(target: log::REACTOR, "cannot deregister descriptor {raw}: {error}");
        }
    }

    /// Reaches a registered descriptor through its handle, at once.
    ///
    /// The descriptor's [`attend`](Descriptor::attend) is called later in the same turn,
    /// so that it can act on the changes.
    ///
    /// Returns `None` if the descriptor is gone, and also while its own callback
    /// runs: it is out of its slot then. [`is_registered`](Self::is_registered) tells
    /// the two apart. A callback that writes to a whole list, its own transport
    /// included, uses `Context::get`, or [defers](Self::defer) a call that goes through
    /// the list. The first time that a callback asks for its own descriptor here, a
    /// warning is logged.
    pub fn get<T: ?Sized>(&mut self, handle: Handle<T>) -> Option<&mut T> {
        let token = handle.token();
        let slot = self.slots.get_mut(token)?;
        if !slot.is_occupied() {
            missed_own(&mut self.has_missed_own, token);
            return None;
        }
        if !slot.is_queued() {
            slot.set_queued(true);
            self.deferred.push_back(Deferred::Attend(token));
        }
        handle.view(slot.entry_mut()?.facet())
    }

    /// Whether `token` names a registered descriptor. Also true inside its own
    /// callback.
    pub fn is_registered(&mut self, token: Token) -> bool {
        self.slots.get_mut(token).is_some()
    }

    /// Asks for the [`attend`](Descriptor::attend) of a descriptor, later in
    /// this turn.
    pub fn notify(&mut self, token: Token) {
        if let Some(slot) = self.slots.get_mut(token)
            && !slot.is_queued()
        {
            slot.set_queued(true);
            self.deferred.push_back(Deferred::Attend(token));
        }
    }

    /// Calls `entrance` with the descriptor itself, later in this turn, when no
    /// callback runs. If the descriptor is gone by then, it is called with `None`.
    ///
    /// The answer of `entrance` says what the reactor does with the descriptor. A panic
    /// in it counts as the descriptor's.
    pub fn enter(
        &mut self,
        token: Token,
        entrance: impl FnOnce(Option<&mut dyn Descriptor>, &mut Self) -> Next + 'static,
    ) {
        self.deferred
            .push_back(Deferred::Enter(token, Box::new(entrance)));
    }

    /// Ends a descriptor, later in this turn: it is told
    /// ([`shutdown`](Descriptor::shutdown)), deregistered and dropped. Its name is
    /// stale at once, and events that the poller has already reported for it are
    /// dropped. Nothing happens if the descriptor is gone.
    pub fn remove(&mut self, token: Token) {
        // Not dropped here: what it owns may be user code's, and that would run
        // inside of the present callback.
        let token = self.slots.rename(token).unwrap_or(token);
        self.enter(token, |descriptor, reactor| {
            if let Some(descriptor) = descriptor {
                descriptor.shutdown(reactor);
            }
            Next::Remove
        });
    }

    /// How many descriptors are registered.
    pub fn registered(&self) -> usize {
        self.slots.len()
    }

    /// A value that lives as long as the reactor, one of each type. `make` makes it
    /// when it is first asked for. Layers above keep here what their descriptors share.
    pub fn extension<T: 'static>(&mut self, make: impl FnOnce() -> T) -> Rc<T> {
        let wanted = TypeId::of::<T>();
        let found = self.extensions.iter().find(|(id, _)| *id == wanted);
        let value = match found {
            Some((_, value)) => Rc::clone(value),
            None => {
                let value: Rc<dyn Any> = Rc::new(make());
                self.extensions.push((wanted, Rc::clone(&value)));
                value
            }
        };
        value.downcast().expect("stored under its own type")
    }

    /// The budgets of a turn.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// Sets the budgets of a turn. A budget of zero counts as one.
    pub fn set_limits(&mut self, limits: Limits) {
        let before = mem::replace(&mut self.limits, limits);
        if limits.events != before.events {
            self.make_room_for_events();
        }
    }

    fn make_room_for_events(&mut self) {
        let count = self.limits.events.clamp(1, MAX_EVENTS);
        self.events = mio::Events::with_capacity(count);
    }

    /// The counters so far.
    pub fn statistics(&self) -> Statistics {
        self.statistics
    }
}

/// One line for each reactor: it is the program that does it, every time.
#[cold]
fn missed_own(is_told: &mut bool, token: Token) {
    if !mem::replace(is_told, true) {
        log::warn!(
            target: log::REACTOR,
            "{token}: asked for by its handle inside of its own callback, whose context has it",
        );
    }
}

impl Drop for Reactor {
    fn drop(&mut self) {
        // All that is user code's one by one: a panic of a drop is its own.
        drop_each(self.remote.close(self.is_forked()));
        // Descriptors go before the poller, each deregistered first: the file
        // may be shared, and the registration with it.
        for token in self.slots.tokens() {
            if let Err(panic) = catch_panic(|| self.discard(token)) {
                self.log_panic(token, &panic);
            }
        }
        drop_each(mem::take(&mut self.deferred));
        drop_each(mem::take(&mut self.soon));
        drop_each(mem::take(&mut self.remote_calls));
        drop_each(self.triggers.take_all());
        for key in self.timers.keys().collect::<Vec<_>>() {
            if let Err(panic) = catch_panic(|| self.timers.cancel(key)) {
                self.log_panic(Token::TIMER, &panic);
            }
        }
        drop_each(mem::take(&mut self.extensions));
        drop_each([mem::take(&mut self.source)]);
        drop_each([mem::replace(&mut self.clock, Box::new(SystemClock))]);
    }
}

fn drop_each<T>(values: impl IntoIterator<Item = T>) {
    for value in values {
        drop(Contained::new(value));
    }
}

/// The poller's own descriptor. It is readable when a turn has events to handle.
impl AsFd for Reactor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        sys::poll_descriptor(&self.poll)
    }
}

impl fmt::Debug for Reactor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reactor")
            .field("state", &self.state)
            .field("registered", &self.slots.len())
            .field("delayed_calls", &self.timers.len())
            .field("statistics", &self.statistics)
            .finish_non_exhaustive()
    }
}
