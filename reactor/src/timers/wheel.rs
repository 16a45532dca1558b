//! The wheel itself: deadlines in slots, without the values that wait for them.
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

use std::cell::Cell;
use std::mem;

/// Deadlines, each with the number of its node, which stays the same until the deadline
/// is taken out.
pub(super) struct Wheel {
    /// The tick up to which the wheel has been turned.
    ///
    /// Invariant: on every level but the finest, the slot that contains this
    /// tick is empty, and so are the slots before it; on the finest level,
    /// those before it are.
    elapsed: u64,
    /// The heads of the lists ([`SLOTS`] slots, the finest level first, then
    /// [`DUE`]), then the timers, from [`FIRST_TIMER`] on.
    ///
    /// Invariant: the node of a timer is in exactly one of the circular lists.
    /// The due list is sorted by deadline, then by order of scheduling.
    nodes: Vec<Node>,
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
    /// Room for sorting one slot, empty between calls.
    batch: Vec<Expired>,
}

impl Wheel {
    pub(super) fn new() -> Self {
        let nodes = (0..FIRST_TIMER)
            .map(|list| Node {
                // Ends the search for a place in the due list.
                deadline: i64::MIN,
                prev: list,
                next: list,
            })
            .collect();
        Self {
            elapsed: 0,
            nodes,
            occupied: Bitmap::EMPTY,
            free: NIL,
            len: 0,
            wakeup: Cell::new(i64::MAX),
            batch: Vec::new(),
        }
    }

    /// How many timers there are, due ones included.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// The deadline of a node.
    #[inline]
    pub(super) fn deadline(&self, node: u32) -> i64 {
        self.nodes[node as usize].deadline
    }

    /// Puts a deadline in, and returns its node: one that was freed, or the next number.
    ///
    /// # Panics
    /// Beyond [`MOST_NODES`].
    #[inline]
    pub(super) fn insert(&mut self, deadline: i64) -> u32 {
        let node = self.free;
        let Some(place) = self.nodes.get(node as usize) else {
            return self.insert_at_new_node(deadline);
        };
        self.free = place.next;
        let list = self.enter_slot(deadline);
        let prev = mem::replace(&mut self.nodes[list as usize].prev, node);
        self.nodes[prev as usize].next = node;
        self.nodes[node as usize] = Node {
            deadline,
            prev,
            next: list,
        };
        self.len += 1;
        node
    }

    /// Takes a deadline out, due or not, and returns it. Frees the node if that may have
    /// another one.
    #[inline]
    pub(super) fn remove(&mut self, node: u32, is_reusable: bool) -> i64 {
        let place = &mut self.nodes[node as usize];
        let &mut Node {
            deadline,
            prev,
            next,
        } = place;
        if is_reusable {
            place.next = mem::replace(&mut self.free, node);
        }
        self.join(prev, next);
        self.not_waiting(deadline);
        self.left();
        deadline
    }

    /// Moves a node to another deadline, and returns the one that it had.
    #[inline]
    pub(super) fn reset(&mut self, node: u32, deadline: i64) -> i64 {
        let place = &mut self.nodes[node as usize];
        let Node { prev, next, .. } = *place;
        let before = mem::replace(&mut place.deadline, deadline);
        self.join(prev, next);
        self.not_waiting(before);
        let list = self.enter_slot(deadline);
        self.link_last(list, node);
        before
    }

    /// Turns the wheel to `now`: whatever has its deadline at or before it becomes due.
    pub(super) fn expire(&mut self, now: i64) {
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

    /// The first of the nodes that are due.
    #[inline]
    pub(super) fn first_due(&self) -> Option<u32> {
        let node = self.nodes[DUE as usize].next;
        (node != DUE).then_some(node)
    }

    /// The node that is due behind `node`, which is due.
    #[cfg(feature = "inspect")]
    pub(super) fn due_after(&self, node: u32) -> Option<u32> {
        let next = self.nodes[node as usize].next;
        (next != DUE).then_some(next)
    }

    /// Takes out `node`, the first of those that are due. Frees it if it may have another
    /// deadline.
    #[inline]
    pub(super) fn pop_due(&mut self, node: u32, is_reusable: bool) {
        // The due list has no bit to be cleared.
        let place = &mut self.nodes[node as usize];
        let next = place.next;
        if is_reusable {
            place.next = mem::replace(&mut self.free, node);
        }
        self.nodes[DUE as usize].next = next;
        self.nodes[next as usize].prev = DUE;
        self.left();
    }

    /// When the wheel must be turned next, `None` without timers. See
    /// [`Timers::next_wakeup`](super::Timers::next_wakeup).
    pub(super) fn next_wakeup(&self) -> Option<i64> {
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
        match self.first_due() {
            Some(due) => Some(wakeup.min(self.deadline(due))),
            None => Some(wakeup),
        }
    }

    /// As [`insert`](Self::insert), where no node can be used again.
    #[cold]
    #[inline(never)]
    fn insert_at_new_node(&mut self, deadline: i64) -> u32 {
        let node = self.nodes.len();
        assert!(node < MOST_NODES, "16 million timers are pending");
        self.free = node as u32;
        self.nodes.push(Node {
            deadline,
            prev: NIL,
            next: NIL,
        });
        self.insert(deadline)
    }

    /// Forgets what is known of a deadline that no longer holds.
    #[inline]
    fn not_waiting(&self, deadline: i64) {
        if deadline == self.wakeup.get() {
            self.wakeup.set(UNKNOWN);
        }
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

    /// Whether the bit of each slot says what is in it.
    #[cfg(test)]
    #[track_caller]
    pub(super) fn check_bits(&self) {
        for (list, head) in (0_u32..).zip(&self.nodes[..SLOTS as usize]) {
            let bit = self.occupied.words[(list / 64) as usize] >> (list % 64) & 1;
            assert_eq!(bit == 1, head.next != list, "bit of slot {list}");
        }
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
}

/// The head of a list, or a timer without its value.
#[derive(Clone, Copy)]
struct Node {
    /// Nanoseconds since the origin.
    deadline: i64,
    prev: u32,
    next: u32,
}

/// A timer on its way to the due list. The order of the fields is that of
/// sorting.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Expired {
    deadline: i64,
    position: u32,
    node: u32,
}

/// A bit for each list. There are more words than are needed, so that whatever stands in the
/// bits of a level's number and a digit is within.
struct Bitmap {
    words: [u64; (LEVELS.next_power_of_two() * WORDS) as usize],
}

const _: () = assert!(DUE / 64 < LEVELS.next_power_of_two() * WORDS);

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
pub(super) const FIRST_TIMER: u32 = DUE + 1;
/// No node.
const NIL: u32 = u32::MAX;
/// How many nodes there are at the most, so that a key has room for more than their number.
pub(super) const MOST_NODES: usize = 1 << 24;
/// As `wakeup`: lower than anything, so that scheduling keeps it.
const UNKNOWN: i64 = i64::MIN;
