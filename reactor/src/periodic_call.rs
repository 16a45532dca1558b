//! Calls at intervals.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::panic;
use std::rc::Rc;
use std::time::{Duration, Instant};

use crate::delayed_call::DelayedCall;
use crate::panic::{Contained, catch_panic};
use crate::reactor::Reactor;

type Periodic = Box<dyn FnMut(&mut Reactor, &PeriodicCall)>;
type Ended = Box<dyn FnOnce(&mut Reactor, PeriodicEnd)>;

/// A call that is made again and again. A clone is a handle on the same call.
/// (Twisted: `LoopingCall`.)
///
/// Runs are due at whole multiples of the interval after the start, so delays do
/// not add up. A run that is due during the one before, or while the loop is busy
/// elsewhere, is left out. The next run can ask how many were left out
/// ([`skipped`](Self::skipped)). Two runs never overlap. With an interval of zero
/// there is one run in each turn, and descriptors have their turn in between.
///
/// The call goes on without anybody holding the handle, until it is
/// [stopped](Self::stop), panics, or its reactor ends. Given a reactor that is not
/// its own, the methods do nothing.
///
/// # Examples
///
/// ```
/// use std::time::Duration;
/// use bowline::Reactor;
///
/// let mut reactor = Reactor::new()?;
/// let mut left = 3;
/// reactor.call_every(Duration::from_millis(1), move |reactor, periodic| {
///     left -= 1;
///     if left == 0 {
///         periodic.stop(reactor);
///         reactor.stop().expect("it runs: this is one of its callbacks");
///     }
/// });
/// reactor.run()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct PeriodicCall {
    state: Rc<State>,
}

struct State {
    /// The [number](Reactor::number) of the reactor that makes the call.
    reactor: u32,
    ended: RefCell<Vec<Ended>>,
    end: Cell<Option<PeriodicEnd>>,
    interval: Cell<Duration>,
    /// What the runs are counted from, and how many intervals after that the
    /// last one was, or would have been.
    origin: Cell<Instant>,
    count: Cell<u128>,
    skipped: Cell<u64>,
    /// The next run, which owns the call; none while one is under way.
    next: Cell<Option<DelayedCall>>,
}

/// How a [`PeriodicCall`] ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum PeriodicEnd {
    /// It was [stopped](PeriodicCall::stop).
    Stopped,
    /// A run panicked. The log has the message.
    Panicked,
}

impl Reactor {
    /// Runs `call` again and again. The first run is when `interval` has passed.
    /// (Twisted: `LoopingCall.start` with `now=False`.)
    pub fn call_every(
        &mut self,
        interval: Duration,
        call: impl FnMut(&mut Self, &PeriodicCall) + 'static,
    ) -> PeriodicCall {
        let periodic = PeriodicCall::new(interval, self);
        periodic.schedule(self, 1, Box::new(call));
        periodic
    }

    /// Runs `call` again and again. The first run is in this turn, after the running
    /// callback. (Twisted: `LoopingCall.start`.)
    pub fn call_now_and_every(
        &mut self,
        interval: Duration,
        call: impl FnMut(&mut Self, &PeriodicCall) + 'static,
    ) -> PeriodicCall {
        let periodic = PeriodicCall::new(interval, self);
        let first = periodic.clone();
        self.defer(move |reactor| first.run(reactor, Box::new(call)));
        periodic
    }
}

impl PeriodicCall {
    fn new(interval: Duration, reactor: &Reactor) -> Self {
        Self {
            state: Rc::new(State {
                reactor: reactor.number(),
                ended: RefCell::new(Vec::new()),
                end: Cell::new(None),
                interval: Cell::new(interval),
                origin: Cell::new(reactor.now()),
                count: Cell::new(0),
                skipped: Cell::new(0),
                next: Cell::new(None),
            }),
        }
    }

    /// Ends the call for good. Inside a run, that run is the last. Nothing happens if
    /// the call has ended.
    pub fn stop(&self, reactor: &mut Reactor) {
        self.end(reactor, PeriodicEnd::Stopped);
    }

    /// Counts the intervals from now on. The next run comes when a whole interval has
    /// passed. Nothing happens if the call has ended.
    pub fn reset(&self, reactor: &mut Reactor) {
        if !self.is_active() || !self.is_of(reactor) {
            return;
        }
        self.state.origin.set(reactor.now());
        self.state.count.set(0);
        // Inside of its own run it is scheduled afterwards.
        if let Some(next) = self.state.next.get() {
            let _ = next.reset(reactor, self.state.interval.get());
        }
    }

    /// Changes the interval and counts from now on, as [`reset`](Self::reset) does.
    pub fn set_interval(&self, reactor: &mut Reactor, interval: Duration) {
        if self.is_of(reactor) {
            self.state.interval.set(interval);
            self.reset(reactor);
        }
    }

    /// Calls `ended` when the call has ended, after the callback that ended it. If it
    /// has ended already, `ended` is called after the running callback. Not called
    /// when the reactor ends.
    pub fn on_end(
        &self,
        reactor: &mut Reactor,
        ended: impl FnOnce(&mut Reactor, PeriodicEnd) + 'static,
    ) {
        match self.state.end.get() {
            Some(end) => reactor.defer(move |reactor| ended(reactor, end)),
            None => self.state.ended.borrow_mut().push(Box::new(ended)),
        }
    }

    /// Whether the call goes on.
    pub fn is_active(&self) -> bool {
        self.state.end.get().is_none()
    }

    /// The interval.
    pub fn interval(&self) -> Duration {
        self.state.interval.get()
    }

    /// How many runs were left out just before the last run, or before the present
    /// one inside a run. Zero if all is well. (Twisted: `LoopingCall.withCount`, less
    /// one.)
    pub fn skipped(&self) -> u64 {
        self.state.skipped.get()
    }

    fn is_of(&self, reactor: &Reactor) -> bool {
        self.state.reactor == reactor.number()
    }

    fn run(&self, reactor: &mut Reactor, mut call: Periodic) {
        self.state.next.set(None);
        if !self.is_active() {
            return;
        }
        let count = self.intervals_until(reactor.now());
        let left_out = count.saturating_sub(self.state.count.get() + 1);
        self.state.count.set(count);
        let left_out = u64::try_from(left_out).unwrap_or(u64::MAX);
        self.state.skipped.set(left_out);
        if let Err(panic) = catch_panic(|| call(reactor, self)) {
            self.end(reactor, PeriodicEnd::Panicked);
            drop(Contained::new(call));
            // The reactor logs and counts it as any other.
            panic::resume_unwind(panic.into_payload());
        }
        if self.is_active() {
            // The time it is, not the turn's: one that takes longer than its
            // interval would be due at once, and leave no gap.
            let passed = self.intervals_until(reactor.time_of_clock());
            self.schedule(reactor, passed.max(self.state.count.get()) + 1, call);
        }
    }

    /// How many whole intervals have passed since the origin at `time`.
    fn intervals_until(&self, time: Instant) -> u128 {
        let passed = time.saturating_duration_since(self.state.origin.get());
        let interval = self.state.interval.get().as_nanos();
        passed.as_nanos().checked_div(interval).unwrap_or(0)
    }

    /// Schedules the run that is due so many intervals after the origin.
    fn schedule(&self, reactor: &mut Reactor, count: u128, call: Periodic) {
        let due_after = duration(self.state.interval.get().as_nanos().saturating_mul(count));
        let passed = reactor
            .now()
            .saturating_duration_since(self.state.origin.get());
        let periodic = self.clone();
        let next = reactor.call_later(due_after.saturating_sub(passed), move |reactor| {
            periodic.run(reactor, call);
        });
        self.state.next.set(Some(next));
    }

    fn end(&self, reactor: &mut Reactor, end: PeriodicEnd) {
        if !self.is_active() || !self.is_of(reactor) {
            return;
        }
        self.state.end.set(Some(end));
        if let Some(next) = self.state.next.take() {
            let _ = next.cancel(reactor);
        }
        for ended in self.state.ended.take() {
            reactor.defer(move |reactor| ended(reactor, end));
        }
    }
}

/// So many nanoseconds, or as many as a `Duration` can hold.
fn duration(nanos: u128) -> Duration {
    const PER_SECOND: u128 = 1_000_000_000;
    u64::try_from(nanos / PER_SECOND).map_or(Duration::MAX, |seconds| {
        Duration::new(seconds, (nanos % PER_SECOND) as u32)
    })
}

impl fmt::Debug for PeriodicCall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PeriodicCall")
            .field("interval", &self.state.interval.get())
            .field("end", &self.state.end.get())
            .finish_non_exhaustive()
    }
}
