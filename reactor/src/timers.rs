//! The timers of the reactor: values that wait in a hierarchical timing [`wheel`].
//!
//! The wheel is a pure value. Time comes in as an argument, due timers go out
//! through [`Timers::pop_due`]; nothing here reads a clock, sleeps or calls
//! anybody.
//!
//! # Costs
//! Scheduling, cancelling and resetting take constant time: one timer, its
//! neighbours and one slot are touched. A timer that lives to its deadline
//! cascades at most five times in 292 years: once or not at all below 0.2 s,
//! mostly twice below two minutes. Empty slots are skipped by bitmaps, so a
//! jump over days costs what the timers in between cost.
//!
//! A timer takes 24 bytes and its value (56 in the reactor), a wheel 48 KiB. The
//! values stand apart: what is done to the neighbours of a timer does not touch
//! theirs. Room is reused and never given back, so nothing is allocated once the
//! peak has been seen.

mod wheel;

use std::collections::BTreeMap;
use std::fmt;
use std::mem;
use std::num::NonZeroU64;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use self::wheel::{FIRST_TIMER, MOST_NODES, Wheel};

/// A queue of values, each with the instant from which it is due.
///
/// Due timers come out in the order of their deadlines, those with equal
/// deadlines in the order in which they were scheduled. None comes out before
/// its deadline.
///
/// The loop asks [`next_wakeup`](Self::next_wakeup) how long it may sleep, then
/// calls [`expire`](Self::expire) with the time of the turn, then
/// [`pop_due`](Self::pop_due) until it has had enough.
///
/// Time is kept in nanoseconds and ends 292 years from the origin: a timer
/// beyond that can be held, reset and cancelled, but never becomes due.
pub(crate) struct Timers<T> {
    origin: Instant,
    /// What no other queue of the process has, so that a key means nothing there.
    number: u32,
    wheel: Wheel,
    /// What the nodes of the wheel belong to, in their order, from [`FIRST_TIMER`] on.
    places: Vec<TimerPlace<T>>,
    /// The deadlines, by node, that lie outside of our time.
    distant: BTreeMap<u32, Instant>,
}

/// An instant as the wheel counts: what is computed once for a whole turn, so
/// that scheduling is an addition.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Moment {
    /// Nanoseconds since the origin.
    nanos: i64,
}

impl Moment {
    pub(crate) const ORIGIN: Self = Self { nanos: 0 };

    /// Returns the moment `delay` later, `None` where it may lie outside of
    /// the wheel's time, or before its origin.
    #[inline]
    pub(crate) fn after(self, delay: Duration) -> Option<Self> {
        if delay.as_secs() >= MAX_SECS {
            return None;
        }
        let delay = delay.as_secs() * 1_000_000_000 + u64::from(delay.subsec_nanos());
        // Where that is too much it comes to be negative.
        let nanos = self.nanos.wrapping_add(delay.cast_signed());
        (0..NEVER).contains(&nanos).then_some(Self { nanos })
    }
}

/// The name of one scheduled timer.
///
/// Once the timer has been popped or cancelled the key is stale, and is so for
/// good: it never names a later timer. To another queue of the process it means
/// nothing, unless a million of them were made between the two.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct TimerKey(NonZeroU64);

/// A key is, from its lowest bit on: the node; the number of the queue, as much of it as
/// fits; and how many timers there were at its place before, one at the least.
const NODE_BITS: u32 = 24;
const QUEUE_BITS: u32 = 20;
const _: () = assert!(MOST_NODES == 1 << NODE_BITS);
const NODE_MASK: u64 = (1 << NODE_BITS) - 1;
const QUEUE_MASK: u64 = ((1 << QUEUE_BITS) - 1) << NODE_BITS;
const GENERATION: u64 = 1 << (NODE_BITS + QUEUE_BITS);

impl TimerKey {
    #[inline]
    fn new(node: u32, stamp: NonZeroU64) -> Self {
        Self(stamp | u64::from(node))
    }

    #[inline]
    fn node(self) -> u32 {
        (self.0.get() & NODE_MASK) as u32
    }

    #[inline]
    fn stamp(self) -> u64 {
        self.0.get() & !NODE_MASK
    }
}

/// How many queues there have been in the process.
static QUEUES: AtomicU32 = AtomicU32::new(0);

impl<T> Timers<T> {
    /// Makes an empty queue whose time begins at `origin`.
    ///
    /// `origin` should be the first reading of the clock. Deadlines before it
    /// are served like any other.
    pub(crate) fn new(origin: Instant) -> Self {
        Self {
            origin,
            number: QUEUES.fetch_add(1, Ordering::Relaxed),
            wheel: Wheel::new(),
            places: Vec::new(),
            distant: BTreeMap::new(),
        }
    }

    /// Schedules `value` for `deadline`.
    #[cfg(test)]
    fn insert(&mut self, deadline: Instant, value: T) -> TimerKey {
        let (key, place) = self.insert_distant(deadline);
        place.fill(value);
        key
    }

    /// Schedules a timer for `deadline`, and returns the place of its value,
    /// which the caller fills at once: made where it stays, it is not copied.
    ///
    /// A deadline in the past is due at the next [`expire`](Self::expire), not
    /// before. Takes constant time.
    ///
    /// # Panics
    /// With 16 million timers pending, which is 1 GB of them.
    #[inline]
    pub(crate) fn insert_place(&mut self, deadline: Moment) -> (TimerKey, EmptyPlace<'_, T>) {
        let node = self.wheel.insert(deadline.nanos);
        let index = index_of(node);
        if index >= self.places.len() {
            return self.add_place(node);
        }
        self.places[index].begin(node)
    }

    /// As [`insert_place`](Self::insert_place), for a deadline that may lie
    /// outside of the wheel's time.
    pub(crate) fn insert_distant(&mut self, deadline: Instant) -> (TimerKey, EmptyPlace<'_, T>) {
        let moment = self.moment(deadline);
        let (key, _) = self.insert_place(moment);
        self.note_if_distant(key, moment, deadline);
        self.places[index_of(key.node())].begin(key.node())
    }

    /// Takes a timer out of the queue and drops its value.
    ///
    /// Returns `false` if it has been popped or cancelled before. One that is
    /// due but not popped yet can still be cancelled. Takes constant time.
    #[inline]
    pub(crate) fn cancel(&mut self, key: TimerKey) -> bool {
        let Some(value) = self.remove(key) else {
            return false;
        };
        // Last, as it may panic; and where it is, not to be copied.
        *value = None;
        true
    }

    /// Takes a timer out of the queue. Its value stays where it is, to be dropped at once.
    fn remove(&mut self, key: TimerKey) -> Option<&mut Option<T>> {
        let place = place_of(&mut self.places, key)?;
        let before = self.wheel.remove(key.node(), place.vacate());
        if !self.distant.is_empty() {
            forget_if_distant(&mut self.distant, key, before);
        }
        Some(&mut place.value)
    }

    /// Moves a timer to another deadline, as if it had been scheduled now.
    ///
    /// Among equal deadlines it comes last. One that is due but not popped yet
    /// goes back to waiting, and is not popped before the next
    /// [`expire`](Self::expire). Returns `false` if it has been popped or
    /// cancelled before. Takes constant time.
    pub(crate) fn reset(&mut self, key: TimerKey, deadline: Instant) -> bool {
        let moment = self.moment(deadline);
        let moved = self.reset_at(key, moment);
        if moved {
            self.note_if_distant(key, moment, deadline);
        }
        moved
    }

    /// As [`reset`](Self::reset), for a deadline within the wheel's time.
    #[inline]
    pub(crate) fn reset_at(&mut self, key: TimerKey, deadline: Moment) -> bool {
        if !self.contains(key) {
            return false;
        }
        let before = self.wheel.reset(key.node(), deadline.nanos);
        if !self.distant.is_empty() {
            forget_if_distant(&mut self.distant, key, before);
        }
        true
    }

    /// Returns an instant as the wheel counts.
    #[inline]
    pub(crate) fn moment(&self, instant: Instant) -> Moment {
        Moment {
            nanos: self.nanos(instant),
        }
    }

    /// Turns the wheel to `now`: whatever has its deadline at or before it
    /// becomes due.
    ///
    /// Timers that are still due from an earlier call keep their place in the
    /// order. A `now` before that of an earlier call does no harm. The cost is
    /// that of the timers that become due or cascade, however far `now` is from
    /// the last call; only a timer scheduled for a time before the deadline of
    /// one that was already due costs a walk along the due list.
    pub(crate) fn expire(&mut self, now: Moment) {
        self.wheel.expire(now.nanos.min(NEVER - 1));
    }

    /// Takes the next due timer out of the queue.
    ///
    /// Timers scheduled or reset since the last [`expire`](Self::expire) are
    /// never among them, so a callback that schedules another one for at once
    /// does not keep the caller here for ever.
    #[inline]
    pub(crate) fn pop_due(&mut self) -> Option<(TimerKey, T)> {
        let node = self.wheel.first_due()?;
        let place = &mut self.places[index_of(node)];
        let key = TimerKey::new(node, place.stamp);
        let value = place.value.take()?;
        self.wheel.pop_due(node, place.vacate());
        Some((key, value))
    }

    /// Iterates over what [`pop_due`](Self::pop_due) would give.
    #[cfg(feature = "inspect")]
    pub(crate) fn due(&self) -> impl Iterator<Item = u32> {
        std::iter::successors(self.wheel.first_due(), |node| self.wheel.due_after(*node))
    }

    /// Returns whether [`pop_due`](Self::pop_due) would give something.
    pub(crate) fn has_due(&self) -> bool {
        self.wheel.first_due().is_some()
    }

    /// Returns whether the first of what [`pop_due`](Self::pop_due) would give has
    /// been due for that long at `now`.
    #[inline]
    pub(crate) fn is_overdue(&self, now: Moment, by: Duration) -> bool {
        let due = self.wheel.first_due();
        let since = due.map(|due| now.nanos.saturating_sub(self.wheel.deadline(due)));
        since.is_some_and(|since| i128::from(since) >= by.as_nanos().cast_signed())
    }

    /// Returns the instant at which [`expire`](Self::expire) is to be called
    /// next, `None` without timers.
    ///
    /// It is never later than the earliest deadline. Where the earliest timer
    /// stands on the finest level it is exactly that; otherwise it may be the
    /// start of the coarse slot that holds it, so that a long wait takes a few
    /// calls (as many as the timer cascades). It lies in the past where a timer
    /// is due. Cancelled and reset timers are taken into account at once.
    ///
    /// The answer is kept until something may have changed it. Working it out
    /// takes a look at the bitmaps, and at the timers of a single slot of the
    /// finest level.
    pub(crate) fn next_wakeup(&self) -> Option<Instant> {
        self.wheel.next_wakeup().map(|nanos| self.instant(nanos))
    }

    /// Returns the deadline that a timer was given last, `None` once it has
    /// been popped or cancelled.
    pub(crate) fn deadline(&self, key: TimerKey) -> Option<Instant> {
        if !self.contains(key) {
            return None;
        }
        let nanos = self.wheel.deadline(key.node());
        Some(match is_distant(nanos) {
            true => self.distant[&key.node()],
            false => self.instant(nanos),
        })
    }

    /// Returns whether a timer has been neither popped nor cancelled.
    #[inline]
    pub(crate) fn contains(&self, key: TimerKey) -> bool {
        self.places
            .get(index_of(key.node()))
            .is_some_and(|place| place.stamp.get() == key.stamp())
    }

    /// Returns the number of timers that are neither popped nor cancelled.
    pub(crate) fn len(&self) -> usize {
        self.wheel.len()
    }

    /// Returns what no other queue of the process answers.
    pub(crate) fn number(&self) -> u32 {
        self.number
    }

    /// Returns whether no timer is left.
    pub(crate) fn is_empty(&self) -> bool {
        self.wheel.len() == 0
    }

    /// Iterates over the timers that are neither popped nor cancelled, in no
    /// particular order.
    ///
    /// Takes time in proportion to the most timers that were ever pending.
    pub(crate) fn keys(&self) -> impl Iterator<Item = TimerKey> {
        (FIRST_TIMER..)
            .zip(&self.places)
            .filter(|(_, place)| place.value.is_some())
            .map(|(node, place)| TimerKey::new(node, place.stamp))
    }

    /// Makes the place of a node that there was not before.
    #[cold]
    #[inline(never)]
    fn add_place(&mut self, node: u32) -> (TimerKey, EmptyPlace<'_, T>) {
        debug_assert_eq!(index_of(node), self.places.len());
        self.places.push(TimerPlace {
            stamp: first_stamp(self.number),
            value: None,
        });
        self.places[index_of(node)].begin(node)
    }

    fn note_if_distant(&mut self, key: TimerKey, moment: Moment, deadline: Instant) {
        if is_distant(moment.nanos) {
            self.distant.insert(key.node(), deadline);
        }
    }

    /// Returns the nanoseconds from the origin to an instant, an extreme value
    /// if there are too many.
    #[inline]
    fn nanos(&self, instant: Instant) -> i64 {
        match instant.checked_duration_since(self.origin) {
            Some(since) if since.as_secs() < MAX_SECS => {
                (since.as_secs() * 1_000_000_000 + u64::from(since.subsec_nanos())).cast_signed()
            }
            Some(since) => i64::try_from(since.as_nanos()).unwrap_or(NEVER),
            None => self.nanos_before_origin(instant),
        }
    }

    #[cold]
    fn nanos_before_origin(&self, instant: Instant) -> i64 {
        let before = self.origin.saturating_duration_since(instant);
        i64::try_from(before.as_nanos()).map_or(i64::MIN, |nanos| -nanos)
    }

    /// Returns the instant of a deadline, or of the beginning of a slot that is
    /// not empty; for one outside of our time, an instant closer to it.
    fn instant(&self, nanos: i64) -> Instant {
        let distance = Duration::from_nanos(nanos.unsigned_abs());
        let instant = match nanos {
            0.. => self.origin.checked_add(distance),
            _ => self.origin.checked_sub(distance),
        };
        instant.expect("it lies between the origin and an instant that was given")
    }
}

impl<T> fmt::Debug for Timers<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Timers")
            .field("len", &self.len())
            .field("has_due", &self.has_due())
            .field("next_wakeup", &self.next_wakeup())
            .finish_non_exhaustive()
    }
}

/// What a timer has besides its node.
struct TimerPlace<T> {
    /// The key of the timer without its node, counted up when the timer is gone.
    stamp: NonZeroU64,
    /// `None` where there is no timer.
    value: Option<T>,
}

/// The place of a timer's value that is to be filled at once.
pub(crate) struct EmptyPlace<'a, T>(&'a mut Option<T>);

impl<T> EmptyPlace<'_, T> {
    #[inline]
    pub(crate) fn fill(self, value: T) {
        let earlier = self.0.replace(value);
        debug_assert!(earlier.is_none());
        // Nothing, which does not have to be looked at to be dropped.
        mem::forget(earlier);
    }
}

impl<T> TimerPlace<T> {
    /// Gives the place to the timer of `node`, whose key is returned.
    #[inline]
    fn begin(&mut self, node: u32) -> (TimerKey, EmptyPlace<'_, T>) {
        let key = TimerKey::new(node, self.stamp);
        (key, EmptyPlace(&mut self.value))
    }

    /// Ends the life of the timer's name; whether the place can have another.
    #[inline]
    fn vacate(&mut self) -> bool {
        // A place that has used up its generations is retired: 56 bytes for a million
        // timers, rather than an old key that names a new timer.
        let next = self.stamp.checked_add(GENERATION);
        self.stamp = next.unwrap_or(RETIRED);
        next.is_some()
    }
}

/// Returns the place of a timer that has been neither popped nor cancelled.
#[inline]
fn place_of<T>(places: &mut [TimerPlace<T>], key: TimerKey) -> Option<&mut TimerPlace<T>> {
    places
        .get_mut(index_of(key.node()))
        .filter(|place| place.stamp.get() == key.stamp())
}

/// Where the place of a node is; beyond all of them if it is no timer's.
#[inline]
fn index_of(node: u32) -> usize {
    node.wrapping_sub(FIRST_TIMER) as usize
}

/// Forgets the instant of a timer that no longer has the deadline `before`.
// Out of line, so that its needs do not weigh on every timer.
#[cold]
#[inline(never)]
fn forget_if_distant(distant: &mut BTreeMap<u32, Instant>, key: TimerKey, before: i64) {
    if is_distant(before) {
        distant.remove(&key.node());
    }
}

/// What the first timer at any place of a queue has.
fn first_stamp(queue: u32) -> NonZeroU64 {
    const FIRST: NonZeroU64 = NonZeroU64::new(GENERATION).expect("it is a power of two");
    FIRST | (u64::from(queue) << NODE_BITS & QUEUE_MASK)
}

/// The stamp of a place that has no more timers; no key has it.
const RETIRED: NonZeroU64 = NonZeroU64::new(NODE_MASK).expect("it has bits");

/// Returns whether a deadline stands for one that cannot be expressed.
#[inline]
fn is_distant(nanos: i64) -> bool {
    // Either of the two extremes.
    nanos.wrapping_add(1) <= i64::MIN + 1
}

/// The last nanosecond of our time: a deadline at or after it never comes.
const NEVER: i64 = i64::MAX;
/// Whole seconds that certainly lie within our time.
const MAX_SECS: u64 = NEVER as u64 / 1_000_000_000;
#[cfg(test)]
mod tests;
