//! The timers of the reactor: a hierarchical timing wheel.
//!
//! The wheel is a pure value. Time comes in as an argument, due timers go out
//! through [`Timers::pop_due`]; nothing here reads a clock, sleeps or calls
//! anybody.
//!
//! # How it works
//! Time since the origin is counted in ticks of 1.024 us ([`TICK_SHIFT`]), and
//! a tick number is read as six digits of nine bits ([`DIGIT_BITS`]). A timer
//! stands on the level of the highest digit in which its tick differs from
//! the wheel's own, in the slot named by that digit. When the wheel's tick
//! enters a coarse slot, the timers in it cascade to finer levels, and those
//! on the finest level become due.
//!
//! A timer's place is thus a function of its deadline and of the wheel's
//! tick, of nothing else. Timers with equal deadlines always stand in the same
//! list, every move appends, and so the order of a list *is* the order of
//! scheduling: no sequence number is kept, and keeping the order of ties costs
//! nothing.
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

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fmt;
use std::mem;
use std::num::NonZeroU64;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

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
    /// The tick up to which the wheel has been turned.
    ///
    /// Invariant: on every level but the finest, the slot that contains this
    /// tick is empty, and so are the slots before it; on the finest level,
    /// those before it are.
    elapsed: u64,
    /// The heads of the lists ([`SLOTS`] slots, the finest level first, then
    /// [`DUE`]), then the timers.
    ///
    /// Invariant: the node of a timer is in exactly one of the circular lists.
    /// The due list is sorted by deadline, then by order of scheduling.
    nodes: Vec<Node>,
    /// The rest of the timers, from [`FIRST_TIMER`] on.
    places: Vec<TimerPlace<T>>,
    /// Invariant: a bit is set if and only if its slot is not empty.
    occupied: Bitmap,
    /// The first of the nodes to reuse, linked by `next`; [`NIL`] if none.
    free: u32,
    len: usize,
    /// When the wheel must be turned next, [`UNKNOWN`] where that must be
    /// worked out.
    ///
    /// Invariant: not later than any deadline on the wheel.
    wakeup: Cell<i64>,
    /// The deadlines, by node, that lie outside of our time.
    distant: BTreeMap<u32, Instant>,
    /// Room for sorting one slot, empty between calls.
    batch: Vec<Expired>,
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
    /// the wheel's time.
    #[inline]
    pub(crate) fn after(self, delay: Duration) -> Option<Self> {
        if delay.as_secs() >= MAX_SECS {
            return None;
        }
        let delay = delay.as_secs() * 1_000_000_000 + u64::from(delay.subsec_nanos());
        let nanos = self.nanos.checked_add(delay.cast_signed())?;
        (nanos != NEVER).then_some(Self { nanos })
    }
}

/// The name of one scheduled timer.
///
/// Once the timer has been popped or cancelled the key is stale, and is so for
/// good: it never names a later timer. To another queue of the process it means
/// nothing, unless a million of them were made between the two.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct TimerKey(NonZeroU64);

/// A key is, from its lowest bit on: the node; how many timers there were at its place
/// before, one at the least; and the number of the queue, as much of it as fits.
const NODE_BITS: u32 = 24;
const GENERATION_BITS: u32 = 20;
const NODE_MASK: u64 = (1 << NODE_BITS) - 1;
const GENERATION: u64 = 1 << NODE_BITS;
const GENERATION_MASK: u64 = ((1 << GENERATION_BITS) - 1) << NODE_BITS;

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
        let nodes = (0..FIRST_TIMER)
            .map(|list| Node {
                // Ends the search for a place in the due list.
                deadline: i64::MIN,
                prev: list,
                next: list,
            })
            .collect();
        Self {
            origin,
            number: QUEUES.fetch_add(1, Ordering::Relaxed),
            elapsed: 0,
            nodes,
            places: Vec::new(),
            occupied: Bitmap::EMPTY,
            free: NIL,
            len: 0,
            wakeup: Cell::new(i64::MAX),
            distant: BTreeMap::new(),
            batch: Vec::new(),
        }
    }

    /// Schedules `value` for `deadline`.
    #[cfg(test)]
    fn insert(&mut self, deadline: Instant, value: T) -> TimerKey {
        let (key, place) = self.insert_distant(deadline);
        *place = Some(value);
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
    pub(crate) fn insert_place(&mut self, deadline: Moment) -> (TimerKey, &mut Option<T>) {
        let list = self.enter_slot(deadline.nanos);
        let mut node = self.free;
        match self.nodes.get(node as usize) {
            Some(place) => self.free = place.next,
            None => node = self.add_place(),
        }
        let prev = mem::replace(&mut self.nodes[list as usize].prev, node);
        self.nodes[prev as usize].next = node;
        self.nodes[node as usize] = Node {
            deadline: deadline.nanos,
            prev,
            next: list,
        };
        self.len += 1;
        let place = &mut self.places[(node - FIRST_TIMER) as usize];
        (TimerKey::new(node, place.stamp), &mut place.value)
    }

    /// As [`insert_place`](Self::insert_place), for a deadline that may lie
    /// outside of the wheel's time.
    pub(crate) fn insert_distant(&mut self, deadline: Instant) -> (TimerKey, &mut Option<T>) {
        let (key, _) = self.insert_place(self.moment(deadline));
        self.note_if_distant(key, deadline);
        (
            key,
            &mut self.places[(key.node() - FIRST_TIMER) as usize].value,
        )
    }

    /// Takes a timer out of the queue and drops its value.
    ///
    /// Returns `false` if it has been popped or cancelled before. One that is
    /// due but not popped yet can still be cancelled. Takes constant time.
    #[inline]
    pub(crate) fn cancel(&mut self, key: TimerKey) -> bool {
        let Some(place) = place_of(&mut self.places, key) else {
            return false;
        };
        let node = &mut self.nodes[key.node() as usize];
        let &mut Node {
            deadline,
            prev,
            next,
        } = node;
        if place.vacate() {
            node.next = mem::replace(&mut self.free, key.node());
        }
        self.join(prev, next);
        self.not_waiting(key.node(), deadline);
        self.left();
        // Last, as it may panic; and where it is, not to be copied.
        self.places[(key.node() - FIRST_TIMER) as usize].value = None;
        true
    }

    /// Moves a timer to another deadline, as if it had been scheduled now.
    ///
    /// Among equal deadlines it comes last. One that is due but not popped yet
    /// goes back to waiting, and is not popped before the next
    /// [`expire`](Self::expire). Returns `false` if it has been popped or
    /// cancelled before. Takes constant time.
    pub(crate) fn reset(&mut self, key: TimerKey, deadline: Instant) -> bool {
        let moved = self.reset_at(key, self.moment(deadline));
        if moved {
            self.note_if_distant(key, deadline);
        }
        moved
    }

    /// As [`reset`](Self::reset), for a deadline within the wheel's time.
    #[inline]
    pub(crate) fn reset_at(&mut self, key: TimerKey, deadline: Moment) -> bool {
        if !self.contains(key) {
            return false;
        }
        let node = &mut self.nodes[key.node() as usize];
        let Node { prev, next, .. } = *node;
        let before = mem::replace(&mut node.deadline, deadline.nanos);
        self.join(prev, next);
        self.not_waiting(key.node(), before);
        let list = self.enter_slot(deadline.nanos);
        self.link_last(list, key.node());
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
        let now = now.nanos.min(NEVER - 1);
        let target = self.tick(now);
        if now < self.wakeup.get() && target >> DIGIT_BITS == self.elapsed >> DIGIT_BITS {
            // Nothing is due, and no coarse slot is entered.
            self.elapsed = target;
            return;
        }
        loop {
            self.expire_finest(target, now);
            match self.first_coarse() {
                Some((list, start)) if start <= target => {
                    self.elapsed = start;
                    self.cascade(list);
                }
                _ => break,
            }
        }
        self.elapsed = target;
        self.wakeup.set(UNKNOWN);
    }

    /// Takes the next due timer out of the queue.
    ///
    /// Timers scheduled or reset since the last [`expire`](Self::expire) are
    /// never among them, so a callback that schedules another one for at once
    /// does not keep the caller here for ever.
    #[inline]
    pub(crate) fn pop_due(&mut self) -> Option<(TimerKey, T)> {
        let node = self.nodes[DUE as usize].next;
        if node == DUE {
            return None;
        }
        // The due list has no bit to be cleared.
        let place = &mut self.places[(node - FIRST_TIMER) as usize];
        let key = TimerKey::new(node, place.stamp);
        let value = place.value.take()?;
        let is_free = place.vacate();
        let links = &mut self.nodes[node as usize];
        let next = links.next;
        if is_free {
            links.next = mem::replace(&mut self.free, node);
        }
        self.nodes[DUE as usize].next = next;
        self.nodes[next as usize].prev = DUE;
        self.left();
        Some((key, value))
    }

    /// Iterates over what [`pop_due`](Self::pop_due) would give.
    #[cfg(feature = "inspect")]
    pub(crate) fn due(&self) -> impl Iterator<Item = u32> {
        let after = |node: u32| Some(self.nodes[node as usize].next).filter(|next| *next != DUE);
        std::iter::successors(after(DUE), move |node| after(*node))
    }

    /// Returns whether [`pop_due`](Self::pop_due) would give something.
    pub(crate) fn has_due(&self) -> bool {
        self.nodes[DUE as usize].next != DUE
    }

    /// Returns whether the first of what [`pop_due`](Self::pop_due) would give has
    /// been due for that long at `now`; there has to be something.
    #[inline]
    pub(crate) fn is_overdue(&self, now: Moment, by: Duration) -> bool {
        let due = self.nodes[DUE as usize].next;
        let deadline = Moment {
            nanos: self.nodes[due as usize].deadline,
        };
        deadline
            .after(by)
            .is_some_and(|latest| latest.nanos <= now.nanos)
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
        if self.len == 0 {
            return None;
        }
        let mut wakeup = self.wakeup.get();
        if wakeup == UNKNOWN {
            wakeup = match self.occupied.first_from(0, digit(self.elapsed, 0)) {
                Some(list) => self.earliest_in(list),
                None => self
                    .first_coarse()
                    .map_or(i64::MAX, |(_, start)| (start << TICK_SHIFT).cast_signed()),
            };
            self.wakeup.set(wakeup);
        }
        let due = self.nodes[DUE as usize].next;
        if due != DUE {
            wakeup = wakeup.min(self.nodes[due as usize].deadline);
        }
        Some(self.instant(wakeup))
    }

    /// Returns the deadline that a timer was given last, `None` once it has
    /// been popped or cancelled.
    pub(crate) fn deadline(&self, key: TimerKey) -> Option<Instant> {
        if !self.contains(key) {
            return None;
        }
        let nanos = self.nodes[key.node() as usize].deadline;
        Some(match is_distant(nanos) {
            true => self.distant[&key.node()],
            false => self.instant(nanos),
        })
    }

    /// Returns whether a timer has been neither popped nor cancelled.
    #[inline]
    pub(crate) fn contains(&self, key: TimerKey) -> bool {
        self.places
            .get(key.node().wrapping_sub(FIRST_TIMER) as usize)
            .is_some_and(|place| place.stamp.get() == key.stamp())
    }

    /// Returns the number of timers that are neither popped nor cancelled.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Returns what no other queue of the process answers.
    pub(crate) fn number(&self) -> u32 {
        self.number
    }

    /// Returns whether no timer is left.
    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
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

    /// Adds a place, in no list yet.
    #[cold]
    fn add_place(&mut self) -> u32 {
        let node = self.nodes.len();
        assert!(node <= NODE_MASK as usize, "16 million timers are pending");
        let node = node as u32;
        self.nodes.push(Node {
            deadline: 0,
            prev: node,
            next: node,
        });
        self.places.push(TimerPlace {
            stamp: first_stamp(self.number),
            value: None,
        });
        node
    }

    /// Notes that a timer comes to stand in the slot for a deadline, which is
    /// returned.
    #[inline]
    fn enter_slot(&mut self, nanos: i64) -> u32 {
        self.wakeup.set(self.wakeup.get().min(nanos));
        let list = self.slot(nanos);
        self.occupied.set(list);
        list
    }

    /// Forgets what is known of a deadline that no longer holds.
    #[inline]
    fn not_waiting(&mut self, node: u32, deadline: i64) {
        if deadline == self.wakeup.get() {
            self.wakeup.set(UNKNOWN);
        }
        if is_distant(deadline) {
            self.forget_distant(node);
        }
    }

    fn note_if_distant(&mut self, key: TimerKey, deadline: Instant) {
        if is_distant(self.nodes[key.node() as usize].deadline) {
            self.distant.insert(key.node(), deadline);
        }
    }

    // Out of line, so that its needs do not weigh on every timer.
    #[cold]
    #[inline(never)]
    fn forget_distant(&mut self, node: u32) {
        self.distant.remove(&node);
    }

    /// Counts a timer that has been popped or cancelled.
    #[inline]
    fn left(&mut self) {
        self.len -= 1;
        if self.len == 0 {
            // The next one scheduled is the earliest.
            self.wakeup.set(i64::MAX);
        }
    }

    /// Makes due what stands on the finest level, as far as it reaches.
    fn expire_finest(&mut self, target: u64, now: i64) {
        let block = self.elapsed & !DIGIT_MASK;
        let mut from = digit(self.elapsed, 0);
        while let Some(list) = self.occupied.first_from(0, from) {
            let tick = block | u64::from(list);
            if tick < target {
                self.expire_slot(list);
            } else {
                if tick == target {
                    self.expire_part_of_slot(list, now);
                }
                break;
            }
            from = list;
        }
    }

    /// Makes all timers of a slot of the finest level due.
    fn expire_slot(&mut self, list: u32) {
        let (head, tail) = self.take_list(list);
        let due_tail = self.nodes[DUE as usize].prev;
        let mut latest = self.nodes[due_tail as usize].deadline;
        let mut sorted = true;
        let mut node = head;
        while node != list {
            let Node { deadline, next, .. } = self.nodes[node as usize];
            sorted &= latest <= deadline;
            latest = deadline;
            node = next;
        }
        if sorted {
            // Nearly always: the list joins the due ones as it is.
            self.nodes[due_tail as usize].next = head;
            self.nodes[head as usize].prev = due_tail;
            self.nodes[tail as usize].next = DUE;
            self.nodes[DUE as usize].prev = tail;
        } else {
            let mut node = head;
            while node != list {
                let Node { deadline, next, .. } = self.nodes[node as usize];
                self.add_to_batch(deadline, node);
                node = next;
            }
            self.merge_batch();
        }
    }

    /// Makes due those timers of the wheel's current slot whose deadline has
    /// come; the tick is not over, so others may stay.
    fn expire_part_of_slot(&mut self, list: u32, now: i64) {
        let mut node = self.nodes[list as usize].next;
        while node != list {
            let Node {
                deadline,
                prev,
                next,
                ..
            } = self.nodes[node as usize];
            if deadline <= now {
                self.join(prev, next);
                self.add_to_batch(deadline, node);
            }
            node = next;
        }
        self.merge_batch();
    }

    fn add_to_batch(&mut self, deadline: i64, node: u32) {
        let position = self.batch.len() as u32;
        self.batch.push(Expired {
            deadline,
            position,
            node,
        });
    }

    /// Sorts what is in `batch`, and in no list, into the due list.
    ///
    /// Where deadlines are equal, those that were due before come first: what
    /// is not yet due after an `expire` that reached its deadline was scheduled
    /// after it.
    fn merge_batch(&mut self) {
        // The position makes every key unique, so that the unstable sort, which
        // needs no memory, is stable in effect.
        self.batch.sort_unstable();
        let mut prev = self.nodes[DUE as usize].prev;
        while let Some(Expired { deadline, node, .. }) = self.batch.pop() {
            while self.nodes[prev as usize].deadline > deadline {
                prev = self.nodes[prev as usize].prev;
            }
            let next = mem::replace(&mut self.nodes[prev as usize].next, node);
            self.nodes[next as usize].prev = node;
            self.nodes[node as usize].prev = prev;
            self.nodes[node as usize].next = next;
        }
    }

    /// Distributes the timers of a coarse slot that the wheel has just entered
    /// over finer ones, in their order.
    fn cascade(&mut self, list: u32) {
        let (mut node, _) = self.take_list(list);
        while node != list {
            let Node { deadline, next, .. } = self.nodes[node as usize];
            let finer = self.slot(deadline);
            self.occupied.set(finer);
            self.link_last(finer, node);
            node = next;
        }
    }

    /// Empties a slot and returns the first and the last of its nodes, which
    /// stay linked; the last one names the slot as its next.
    fn take_list(&mut self, list: u32) -> (u32, u32) {
        self.occupied.clear(list);
        let head = &mut self.nodes[list as usize];
        (
            mem::replace(&mut head.next, list),
            mem::replace(&mut head.prev, list),
        )
    }

    /// Adds a node to the end of a list, whose bit is set.
    #[inline]
    fn link_last(&mut self, list: u32, node: u32) {
        let prev = mem::replace(&mut self.nodes[list as usize].prev, node);
        self.nodes[prev as usize].next = node;
        let links = &mut self.nodes[node as usize];
        links.prev = prev;
        links.next = list;
    }

    /// Links the neighbours of a node that leaves its list.
    #[inline]
    fn join(&mut self, prev: u32, next: u32) {
        self.nodes[prev as usize].next = next;
        self.nodes[next as usize].prev = prev;
        if prev == next {
            // Both are the head of the list: the node was alone in it.
            self.occupied.clear(next);
        }
    }

    /// Returns the earliest deadline in a list that is not empty.
    fn earliest_in(&self, list: u32) -> i64 {
        let mut node = self.nodes[list as usize].next;
        let mut earliest = i64::MAX;
        while node != list {
            let Node { deadline, next, .. } = self.nodes[node as usize];
            earliest = earliest.min(deadline);
            node = next;
        }
        earliest
    }

    /// Returns the occupied coarse slot that the wheel will enter first, and
    /// the tick at which it begins.
    fn first_coarse(&self) -> Option<(u32, u64)> {
        (1..LEVELS).find_map(|level| {
            let list = self
                .occupied
                .first_from(level, digit(self.elapsed, level))?;
            let shift = level * DIGIT_BITS;
            let block = (self.elapsed >> shift) & !DIGIT_MASK;
            Some((list, (block | (u64::from(list) & DIGIT_MASK)) << shift))
        })
    }

    /// Returns the slot in which a timer has to stand.
    #[inline]
    fn slot(&self, nanos: i64) -> u32 {
        let tick = self.tick(nanos);
        // `| 1` gives the current tick level 0.
        let level = ((tick ^ self.elapsed) | 1).ilog2() / DIGIT_BITS;
        level * DIGITS + digit(tick, level)
    }

    /// Returns the tick that contains a time, the current one for the past.
    #[inline]
    fn tick(&self, nanos: i64) -> u64 {
        (nanos >> TICK_SHIFT)
            .max(self.elapsed.cast_signed())
            .cast_unsigned()
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
            .field("len", &self.len)
            .field("has_due", &self.has_due())
            .field("next_wakeup", &self.next_wakeup())
            .finish_non_exhaustive()
    }
}

/// The head of a list, or a timer without its value.
#[derive(Clone, Copy)]
struct Node {
    /// Nanoseconds since the origin.
    deadline: i64,
    prev: u32,
    next: u32,
}

/// What a timer has besides its node.
struct TimerPlace<T> {
    /// The key of the timer without its node, counted up when the timer is gone.
    stamp: NonZeroU64,
    /// `None` where there is no timer.
    value: Option<T>,
}

impl<T> TimerPlace<T> {
    /// Ends the life of the timer's name; whether the place can have another.
    #[inline]
    fn vacate(&mut self) -> bool {
        // The last generation is never given out, so that a place that has come
        // to it can be retired: 56 bytes for a million timers, rather than an
        // old key that names a new timer.
        self.stamp = self.stamp.saturating_add(GENERATION);
        self.stamp.get() & GENERATION_MASK != GENERATION_MASK
    }
}

/// Returns the place of a timer that has been neither popped nor cancelled.
#[inline]
fn place_of<T>(places: &mut [TimerPlace<T>], key: TimerKey) -> Option<&mut TimerPlace<T>> {
    places
        .get_mut(key.node().wrapping_sub(FIRST_TIMER) as usize)
        .filter(|place| place.stamp.get() == key.stamp())
}

/// What the first timer at any place of a queue has.
fn first_stamp(queue: u32) -> NonZeroU64 {
    const FIRST: NonZeroU64 = NonZeroU64::new(GENERATION).expect("it is a power of two");
    FIRST | u64::from(queue) << (NODE_BITS + GENERATION_BITS)
}

/// A timer on its way to the due list. The order of the fields is that of
/// sorting.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Expired {
    deadline: i64,
    position: u32,
    node: u32,
}

/// A bit for each list.
struct Bitmap {
    words: [u64; (LEVELS * WORDS + 1) as usize],
}

impl Bitmap {
    const EMPTY: Self = Self { words: [0; _] };

    #[inline]
    fn set(&mut self, list: u32) {
        self.words[(list / 64) as usize] |= 1 << (list % 64);
    }

    #[inline]
    fn clear(&mut self, list: u32) {
        self.words[(list / 64) as usize] &= !(1 << (list % 64));
    }

    /// Returns the first occupied slot of a level that has at least the given
    /// digit.
    #[inline]
    fn first_from(&self, level: u32, digit: u32) -> Option<u32> {
        let first = level * DIGITS + digit;
        let word = first / 64;
        let here = self.words[word as usize] >> (first % 64);
        if here != 0 {
            return Some(first + here.trailing_zeros());
        }
        let end = (level + 1) * WORDS;
        (word + 1..end).find_map(|word| {
            let bits = self.words[word as usize];
            (bits != 0).then(|| word * 64 + bits.trailing_zeros())
        })
    }
}

/// Returns the digit of a tick that counts on a level.
#[inline]
fn digit(tick: u64, level: u32) -> u32 {
    ((tick >> (level * DIGIT_BITS)) & DIGIT_MASK) as u32
}

/// Returns whether a deadline stands for one that cannot be expressed.
#[inline]
fn is_distant(nanos: i64) -> bool {
    // Either of the two extremes.
    nanos.wrapping_add(1) <= i64::MIN + 1
}

/// A tick is 2^10 ns, about the time of one turn of a loop that has nothing to
/// do. With longer ticks a slot would be looked through again and again by
/// turns that end within its tick (at a million timers a second, 2^16 ns made
/// firing four times as expensive); with shorter ones timers would cascade more
/// often. Precision does not depend on it.
const TICK_SHIFT: u32 = 10;

/// A level has 2^9 slots, which makes the levels reach 0.5 ms, 0.27 s, 137 s,
/// 19.5 hours, 416 days and 292 years: retries and protocol timeouts cascade
/// once or twice. Six such digits hold the 53 bits of a tick.
const DIGIT_BITS: u32 = 9;
const DIGITS: u32 = 1 << DIGIT_BITS;
const DIGIT_MASK: u64 = DIGITS as u64 - 1;
const LEVELS: u32 = (i64::BITS - 1 - TICK_SHIFT).div_ceil(DIGIT_BITS);
const SLOTS: u32 = LEVELS * DIGITS;
/// Words of bits for one level.
const WORDS: u32 = DIGITS / 64;

/// The list of due timers, which comes after the slots.
const DUE: u32 = SLOTS;
/// The node of the first timer.
const FIRST_TIMER: u32 = DUE + 1;
/// No node.
const NIL: u32 = u32::MAX;

/// The last nanosecond of our time: a deadline at or after it never comes.
const NEVER: i64 = i64::MAX;
/// Whole seconds that certainly lie within our time.
const MAX_SECS: u64 = NEVER as u64 / 1_000_000_000;
/// As `wakeup`: lower than anything, so that scheduling keeps it.
const UNKNOWN: i64 = i64::MIN;

#[cfg(test)]
mod tests;
