//! What connections of each kind, and of each origin, have done, with the feature `inspect`.

use std::cell::{Cell, RefCell};
use std::mem;
use std::rc::Rc;

use bowline_reactor::{Section, Token};

use crate::file_descriptor::FileDescriptor;
use crate::link::Link;

/// What the connections of one kind have done. See
/// [`Transports::kind_counts`](crate::Transports::kind_counts).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct KindCounts {
    /// The kind: `tcp`, `unix`, `pipe`, or what a kind of a program's own calls itself.
    pub kind: &'static str,
    /// Connections that were made, adopted or put together again.
    pub made: u64,
    /// Those of them that have ended or were taken apart.
    pub ended: u64,
    /// Bytes that the ended ones had sent. Add, with [`u64::wrapping_add`], what those that
    /// are open say of themselves, to have the bytes of all. (What a connection sent before
    /// it came here is taken off beforehand.)
    pub sent_bytes: u64,
    /// Bytes that were delivered to the protocols of the ended ones, as `sent_bytes`.
    pub received_bytes: u64,
    /// Descriptors that the ended ones had passed, as `sent_bytes`.
    pub sent_descriptors: u64,
    /// Descriptors that the ended ones had received, as `sent_bytes`.
    pub received_descriptors: u64,
}

impl KindCounts {
    /// How many there are now.
    pub fn open(&self) -> u64 {
        self.made - self.ended
    }
}

/// What the connections of one origin have done: those that a listener has accepted, or
/// the channels of a pool. A clone is the same. See
/// [`Transports::tally`](crate::Transports::tally).
///
/// Nothing is counted while a connection is open, which tells its own bytes. What it did
/// is added when it ends.
#[derive(Clone, Debug)]
pub struct Tally(Rc<Tallied>);

#[derive(Debug)]
struct Tallied {
    origin: &'static str,
    number: u64,
    open: Cell<u64>,
    ended: Cell<Done>,
    /// Where it was found last in [`Origins`].
    place: Cell<usize>,
}

/// What connections have done.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Done {
    pub(crate) connections: u64,
    pub(crate) sent_bytes: u64,
    pub(crate) received_bytes: u64,
    pub(crate) sent_descriptors: u64,
    pub(crate) received_descriptors: u64,
    pub(crate) sent_messages: u64,
    pub(crate) received_messages: u64,
}

impl Done {
    fn of(link: &Link, layer: &impl FileDescriptor) -> Self {
        Self {
            connections: 1,
            sent_bytes: link.sent,
            received_bytes: link.received_bytes(),
            sent_descriptors: layer.sent_descriptors(),
            received_descriptors: link.cold_ref().map_or(0, |cold| cold.received as u64),
            sent_messages: 0,
            received_messages: 0,
        }
    }

    fn and(self, other: Self) -> Self {
        Self {
            connections: self.connections + other.connections,
            sent_bytes: self.sent_bytes + other.sent_bytes,
            received_bytes: self.received_bytes + other.received_bytes,
            sent_descriptors: self.sent_descriptors + other.sent_descriptors,
            received_descriptors: self.received_descriptors + other.received_descriptors,
            sent_messages: self.sent_messages + other.sent_messages,
            received_messages: self.received_messages + other.received_messages,
        }
    }
}

impl Tally {
    /// Makes one. Each of its connections says of itself where it comes from: the fact
    /// `origin` is `number`.
    pub fn new(origin: &'static str, number: u64) -> Self {
        Self(Rc::new(Tallied {
            origin,
            number,
            open: Cell::new(0),
            ended: Cell::new(Done::default()),
            place: Cell::new(0),
        }))
    }

    /// Tells how many connections there are now, and what those that have ended did: facts
    /// whose names begin with `ended`. The fact `origin` is the same that the connections
    /// have.
    pub fn describe(&self, section: &mut Section) {
        let ended = self.0.ended.get();
        self.tell_origin(section);
        section
            .set("open", self.0.open.get())
            .set("ended", ended.connections)
            .set("ended_sent_bytes", ended.sent_bytes)
            .set("ended_received_bytes", ended.received_bytes);
        let rare = [
            ("ended_sent_descriptors", ended.sent_descriptors),
            ("ended_received_descriptors", ended.received_descriptors),
            ("ended_sent_messages", ended.sent_messages),
            ("ended_received_messages", ended.received_messages),
        ];
        for (name, count) in rare.into_iter().filter(|(_, count)| *count > 0) {
            section.set(name, count);
        }
    }

    pub(crate) fn tell_origin(&self, section: &mut Section) {
        section.set(self.0.origin, self.0.number);
    }
}

#[derive(Debug, Default)]
pub(crate) struct Kinds {
    kinds: RefCell<Vec<KindCounts>>,
    origins: RefCell<Origins>,
}

/// Where open connections come from, if that is known.
#[derive(Debug, Default)]
struct Origins {
    /// Two bytes for each slot: one more than the place in `known`, and zero for none.
    of_slots: Vec<u16>,
    /// With how many connections each has. One without any leaves its place to others.
    /// Of more than 65,535 at once, the connections of the last ones are nobody's.
    known: Vec<Option<(Tally, u32)>>,
}

impl Origins {
    fn place_of(&mut self, tally: &Tally) -> usize {
        let is_it = |known: &Option<(Tally, u32)>| {
            let tallied = known.as_ref().map(|(known, _)| &known.0);
            tallied.is_some_and(|known| Rc::ptr_eq(known, &tally.0))
        };
        let last = tally.0.place.get();
        if self.known.get(last).is_some_and(is_it) {
            return last;
        }
        let place = self.known.iter().position(is_it).unwrap_or_else(|| {
            let free = self.known.iter().position(Option::is_none);
            let place = free.unwrap_or(self.known.len());
            if free.is_none() {
                self.known.push(None);
            }
            self.known[place] = Some((tally.clone(), 0));
            place
        });
        tally.0.place.set(place);
        place
    }

    /// Whether it has a place.
    fn add(&mut self, slot: usize, tally: &Tally) -> bool {
        let place = self.place_of(tally);
        let Ok(name) = u16::try_from(place + 1) else {
            self.known.truncate(place);
            return false;
        };
        if self.of_slots.len() <= slot {
            // Not twice as much as before, since each connection is to take little.
            let more = slot + 1 - self.of_slots.len();
            if self.of_slots.capacity() <= slot {
                self.of_slots.reserve_exact(more + slot / 8);
            }
            self.of_slots.resize(slot + 1, 0);
        }
        if let Some((_, count)) = &mut self.known[place] {
            *count += 1;
        }
        self.of_slots[slot] = name;
        true
    }

    fn take(&mut self, slot: usize) -> Option<Tally> {
        let place = mem::take(self.of_slots.get_mut(slot)?);
        let known = self.known.get_mut((place as usize).checked_sub(1)?)?;
        let (tally, count) = known.as_mut()?;
        *count -= 1;
        match *count {
            0 => known.take().map(|(tally, _)| tally),
            _ => Some(tally.clone()),
        }
    }

    fn get(&self, slot: usize) -> Option<&Tally> {
        let place = *self.of_slots.get(slot)? as usize;
        let known = self.known.get(place.checked_sub(1)?)?;
        known.as_ref().map(|(tally, _)| tally)
    }
}

impl Kinds {
    /// Of one that was elsewhere before, what it did there does not count.
    pub(crate) fn made(&self, kind: &'static str, link: &Link, layer: &impl FileDescriptor) {
        let done = Done::of(link, layer);
        self.change(kind, |counts| {
            counts.made += 1;
            let less = |count: &mut u64, done: u64| *count = count.wrapping_sub(done);
            less(&mut counts.sent_bytes, done.sent_bytes);
            less(&mut counts.received_bytes, done.received_bytes);
            less(&mut counts.sent_descriptors, done.sent_descriptors);
            less(&mut counts.received_descriptors, done.received_descriptors);
        });
    }

    pub(crate) fn ended(&self, kind: &'static str, link: &Link, layer: &impl FileDescriptor) {
        let done = Done::of(link, layer);
        self.change(kind, |counts| {
            counts.ended += 1;
            let more = |count: &mut u64, done: u64| *count = count.wrapping_add(done);
            more(&mut counts.sent_bytes, done.sent_bytes);
            more(&mut counts.received_bytes, done.received_bytes);
            more(&mut counts.sent_descriptors, done.sent_descriptors);
            more(&mut counts.received_descriptors, done.received_descriptors);
        });
        self.left(link.token, done);
    }

    /// Notes where a connection comes from.
    pub(crate) fn came(&self, token: Token, from: &Tally) {
        let mut origins = self.origins.borrow_mut();
        if let Some(earlier) = origins.take(token.slot()) {
            earlier.0.open.set(earlier.0.open.get() - 1);
        }
        if origins.add(token.slot(), from) {
            from.0.open.set(from.0.open.get() + 1);
        }
    }

    /// Adds what a connection did to what its origin knows.
    pub(crate) fn left(&self, token: Token, done: Done) {
        if let Some(origin) = self.origins.borrow_mut().take(token.slot()) {
            let it = &origin.0;
            it.open.set(it.open.get() - 1);
            it.ended.set(it.ended.get().and(done));
        }
    }

    pub(crate) fn tell_origin(&self, token: Token, section: &mut Section) {
        if let Some(origin) = self.origins.borrow().get(token.slot()) {
            origin.tell_origin(section);
        }
    }

    fn change(&self, kind: &'static str, change: impl FnOnce(&mut KindCounts)) {
        let mut all = self.kinds.borrow_mut();
        if let Some(counts) = all.iter_mut().find(|it| it.kind == kind) {
            return change(counts);
        }
        let mut counts = KindCounts {
            kind,
            made: 0,
            ended: 0,
            sent_bytes: 0,
            received_bytes: 0,
            sent_descriptors: 0,
            received_descriptors: 0,
        };
        change(&mut counts);
        all.push(counts);
    }

    pub(crate) fn all(&self) -> Vec<KindCounts> {
        self.kinds.borrow().clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_origin_keeps_its_place_while_it_has_connections_and_leaves_it_then() {
        let (one, two, three) = (Tally::new("a", 1), Tally::new("a", 2), Tally::new("a", 3));
        let mut origins = Origins::default();
        let number = |it: Option<&Tally>| it.map(|it| it.0.number);
        for (slot, tally) in [(0, &one), (5, &two), (3, &one)] {
            assert!(origins.add(slot, tally));
        }
        let all = |origins: &Origins| [0, 1, 3, 5, 9].map(|slot| number(origins.get(slot)));
        assert_eq!(all(&origins), [Some(1), None, Some(1), Some(2), None]);
        assert_eq!(number(origins.take(0).as_ref()), Some(1));
        assert_eq!(number(origins.take(0).as_ref()), None);
        assert_eq!(number(origins.take(9).as_ref()), None);
        // It still has one.
        assert!(origins.add(1, &three));
        assert_eq!(all(&origins), [None, Some(3), Some(1), Some(2), None]);
        assert_eq!(number(origins.take(3).as_ref()), Some(1));
        // The next takes its place, and it another one when it has some again.
        assert!(origins.add(9, &Tally::new("a", 4)));
        assert!(origins.add(0, &one));
        assert_eq!(all(&origins), [Some(1), Some(3), None, Some(2), Some(4)]);
        assert_eq!(origins.known.len(), 4);
        assert_eq!(Rc::strong_count(&one.0), 2);
        drop(origins);
        assert_eq!(Rc::strong_count(&one.0), 1);
    }
}
