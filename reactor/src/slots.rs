//! The slots of registered descriptors.
//!
//! A slot is taken by [`Slots::reserve`] and given up by [`Slots::release`].
//! What is released in a batch of events becomes free for reuse only at
//! [`Slots::recycle`], after the batch: together with the generation in the
//! token this makes it impossible for an event that was fetched for the old
//! occupant to reach a new one.

use std::mem;

use slab::Slab;

use crate::descriptor::{Descriptor, Interest, Readiness};
use crate::token::{Generations, Token};

pub(crate) struct Slots {
    slab: Slab<Slot>,
    /// Slots whose descriptor is gone and which wait for the batch to end.
    released: Vec<usize>,
    /// Those of the registrations to come. Never repeated in the process, so
    /// that a token means nothing in another reactor.
    generations: Generations,
    /// Invariant: how many slots are [`AWAITED`].
    awaited: usize,
}

/// The descriptor stands in the reactor's queue of those that wait for attention.
const QUEUED: u8 = 1;
/// A graceful stop waits for the descriptor. Changed by [`Slots::set_awaited`] only, and
/// by the release.
const AWAITED: u8 = 1 << 1;

// It is found by a shift.
const _: () = assert!(size_of::<Slot>() == 32);

pub(crate) struct Slot {
    token: Token,
    entry: Option<Box<dyn Descriptor>>,
    /// The lower half of the tick count when its last callback began.
    #[cfg(feature = "inspect")]
    began: u32,
    /// [`QUEUED`] and [`AWAITED`]: in one byte, so that a slot has 32.
    marks: u8,
    /// There while the descriptor stands in the reactor's queue of those that
    /// asked for another turn: what was reported meanwhile.
    pub(crate) again: Option<Readiness>,
    /// What its source is watched for, once it is.
    pub(crate) interest: Option<Interest>,
}

impl Slots {
    pub(crate) fn new() -> Self {
        Self {
            slab: Slab::new(),
            released: Vec::new(),
            generations: Generations::new(),
            awaited: 0,
        }
    }

    /// Names a new slot, or `None` when there are [`Token::MAX_SLOTS`].
    pub(crate) fn reserve(&mut self) -> Option<Token> {
        if self.slab.len() >= Token::MAX_SLOTS {
            return None;
        }
        let vacant = self.slab.vacant_entry();
        let token = Token::new(vacant.key(), self.generations.next());
        vacant.insert(Slot {
            token,
            entry: None,
            #[cfg(feature = "inspect")]
            began: 0,
            marks: 0,
            again: None,
            interest: None,
        });
        Some(token)
    }

    #[inline(always)]
    pub(crate) fn get_mut(&mut self, token: Token) -> Option<&mut Slot> {
        self.slab
            .get_mut(token.index())
            .filter(|slot| slot.token == token)
    }

    #[cfg_attr(
        not(feature = "inspect"),
        expect(dead_code, reason = "nobody asks an age")
    )]
    pub(crate) fn get(&self, token: Token) -> Option<&Slot> {
        self.slab
            .get(token.index())
            .filter(|slot| slot.token == token)
    }

    /// The first slot that is taken, from this place on.
    pub(crate) fn taken_from(&self, index: usize) -> Option<&Slot> {
        (index..self.slab.capacity())
            .filter_map(|index| self.slab.get(index))
            .find(|slot| slot.token != Token::WAKER)
    }

    /// Takes the descriptor out for the time of its callback.
    #[inline]
    pub(crate) fn take(&mut self, token: Token) -> Option<Box<dyn Descriptor>> {
        let slot = self.get_mut(token)?;
        #[cfg(feature = "inspect")]
        {
            slot.began = crate::sys::ticks() as u32;
        }
        slot.entry.take()
    }

    /// When the last callback of whatever has the slot of `token`, or had it until a moment
    /// ago, began: the lower half of the tick count.
    #[cfg(feature = "inspect")]
    pub(crate) fn began(&self, token: Token) -> Option<u32> {
        self.slab.get(token.index()).map(|slot| slot.began)
    }

    /// Takes the beginning of that callback back to when it was.
    #[cfg(feature = "inspect")]
    pub(crate) fn set_began(&mut self, token: Token, began: u32) {
        if let Some(slot) = self.slab.get_mut(token.index()) {
            slot.began = began;
        }
    }

    /// Puts a descriptor into its slot: the first time, or after a callback.
    /// Returns it if there is no such slot: these are the slots of another reactor.
    #[inline(always)]
    #[must_use]
    pub(crate) fn put(
        &mut self,
        token: Token,
        entry: Box<dyn Descriptor>,
    ) -> Option<Box<dyn Descriptor>> {
        match self.get_mut(token) {
            Some(slot) => {
                let earlier = slot.entry.replace(entry);
                debug_assert!(earlier.is_none());
                // Nothing, which does not have to be looked at to be dropped.
                mem::forget(earlier);
                None
            }
            None => Some(entry),
        }
    }

    /// Gives a descriptor a new name, and so makes all others stale; `None` if
    /// it is gone or out for its callback.
    pub(crate) fn rename(&mut self, token: Token) -> Option<Token> {
        let slot = self.slab.get_mut(token.index());
        let slot = slot.filter(|slot| slot.token == token && slot.is_occupied())?;
        slot.token = Token::new(token.index(), self.generations.next());
        slot.set_queued(false);
        slot.again = None;
        Some(slot.token)
    }

    /// Ends the life of `token`. Its slot is reusable after
    /// [`Slots::recycle`].
    pub(crate) fn release(&mut self, token: Token) -> Option<Box<dyn Descriptor>> {
        let slot = self.get_mut(token)?;
        // No token equals this one, so nothing finds the slot any more.
        slot.token = Token::WAKER;
        slot.set_queued(false);
        let entry = slot.entry.take();
        let was_awaited = slot.has(AWAITED);
        self.awaited -= usize::from(was_awaited);
        self.released.push(token.index());
        entry
    }

    /// Makes the slots that were released reusable.
    #[inline]
    pub(crate) fn recycle(&mut self) {
        while let Some(index) = self.released.pop() {
            self.slab.remove(index);
        }
    }

    /// Says whether a graceful stop waits for the descriptor; of one that is
    /// gone it says nothing.
    pub(crate) fn set_awaited(&mut self, token: Token, is_awaited: bool) {
        if let Some(slot) = self.get_mut(token) {
            let was_awaited = slot.has(AWAITED);
            slot.mark(AWAITED, is_awaited);
            self.awaited += usize::from(is_awaited);
            self.awaited -= usize::from(was_awaited);
        }
    }

    /// How many descriptors a graceful stop waits for.
    pub(crate) fn awaited(&self) -> usize {
        self.awaited
    }

    /// How many slots are taken.
    pub(crate) fn len(&self) -> usize {
        self.slab.len() - self.released.len()
    }

    /// Takes note of what the source of a descriptor is watched for.
    pub(crate) fn set_interest(&mut self, token: Token, interest: Interest) {
        if let Some(slot) = self.get_mut(token) {
            let all = slot
                .interest
                .map_or(interest, |before| before.and(interest));
            slot.interest = Some(all);
        }
    }

    /// Gives up the slots that are named and empty. While no callback runs there are
    /// none, but for one whose descriptor could not be put back.
    pub(crate) fn release_empty(&mut self) {
        let is_empty = |slot: &&Slot| slot.entry.is_none() && slot.token != Token::WAKER;
        let empty = self.slab.iter().map(|(_, slot)| slot).filter(is_empty);
        let empty: Vec<_> = empty.map(|slot| slot.token).collect();
        for token in empty {
            let _ = self.release(token);
        }
    }

    /// The names of all that is registered, in slot order.
    pub(crate) fn tokens(&self) -> Vec<Token> {
        self.slab
            .iter()
            .map(|(_, slot)| slot.token)
            .filter(|&token| token != Token::WAKER)
            .collect()
    }
}

impl Slot {
    fn has(&self, mark: u8) -> bool {
        self.marks & mark != 0
    }

    fn mark(&mut self, mark: u8, on: bool) {
        match on {
            true => self.marks |= mark,
            false => self.marks &= !mark,
        }
    }

    pub(crate) fn is_queued(&self) -> bool {
        self.has(QUEUED)
    }

    pub(crate) fn set_queued(&mut self, on: bool) {
        self.mark(QUEUED, on);
    }

    pub(crate) fn entry_mut(&mut self) -> Option<&mut dyn Descriptor> {
        self.entry.as_deref_mut()
    }

    pub(crate) fn entry(&self) -> Option<&dyn Descriptor> {
        self.entry.as_deref()
    }

    pub(crate) fn token(&self) -> Token {
        self.token
    }

    pub(crate) fn is_occupied(&self) -> bool {
        self.entry.is_some()
    }
}

#[cfg(test)]
mod tests {
    use std::any::Any;
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;
    use crate::descriptor::Next;
    use crate::reactor::Reactor;

    struct Numbered(u32);

    impl Descriptor for Numbered {
        fn ready(&mut self, _: &mut Reactor, _: Readiness) -> Next {
            Next::Keep
        }
        fn facet(&mut self) -> &mut dyn Any {
            &mut self.0
        }
    }

    fn number(entry: &mut dyn Descriptor) -> u32 {
        *entry
            .facet()
            .downcast_mut::<u32>()
            .expect("all are numbered")
    }

    #[test]
    fn released_slot_is_not_reused_before_the_batch_ends() {
        let mut slots = Slots::new();
        let first = slots.reserve().unwrap();
        slots.release(first);
        let second = slots.reserve().unwrap();
        assert_ne!(first.index(), second.index());
        slots.recycle();
        let third = slots.reserve().unwrap();
        assert_eq!(first.index(), third.index());
        assert_ne!(first, third);
        assert!(slots.get_mut(first).is_none());
    }

    #[test]
    fn descriptor_whose_slot_is_gone_is_answered_and_not_put_back() {
        let mut slots = Slots::new();
        let token = slots.reserve().unwrap();
        assert!(slots.put(token, Box::new(Numbered(1))).is_none());
        let out = slots.take(token).unwrap();
        assert!(slots.take(token).is_none(), "it is out");
        assert!(slots.rename(token).is_none(), "nobody renames what is out");
        assert!(slots.release(token).is_none(), "its slot is empty");
        assert!(slots.put(token, out).is_some());
        assert!(slots.get_mut(token).is_none());
        assert_eq!((slots.len(), slots.tokens()), (0, vec![]));
    }

    #[test]
    fn what_stood_in_a_queue_under_its_old_name_does_not_under_the_new() {
        let mut slots = Slots::new();
        let old = slots.reserve().unwrap();
        assert!(slots.put(old, Box::new(Numbered(1))).is_none());
        let slot = slots.get_mut(old).unwrap();
        slot.set_queued(true);
        slot.again = Some(Readiness::default());
        let new = slots.rename(old).unwrap();
        let slot = slots.get_mut(new).unwrap();
        assert!(!slot.is_queued() && slot.again.is_none());
    }

    proptest! {
        /// Any list of operations, against a map that never forgets a token.
        #[test]
        fn token_reaches_its_own_descriptor_or_nothing(operations in prop::collection::vec((0u8..6, 0usize..64), 1..400)) {
            let mut slots = Slots::new();
            let mut model = HashMap::new();
            let mut tokens = Vec::new();
            for (number_of, (operation, pick)) in operations.into_iter().enumerate() {
                match operation {
                    0 | 1 => {
                        let token = slots.reserve().unwrap();
                        prop_assert!(slots.put(token, Box::new(Numbered(number_of as u32))).is_none());
                        prop_assert!(model.insert(token, number_of as u32).is_none());
                        tokens.push(token);
                    }
                    2 if !tokens.is_empty() => {
                        let token = tokens[pick % tokens.len()];
                        let released = slots.release(token).map(|mut entry| number(&mut *entry));
                        prop_assert_eq!(released, model.remove(&token));
                    }
                    3 if !tokens.is_empty() => {
                        let token = tokens[pick % tokens.len()];
                        let renamed = slots.rename(token);
                        let number = model.remove(&token);
                        prop_assert_eq!(renamed.is_some(), number.is_some());
                        if let (Some(renamed), Some(number)) = (renamed, number) {
                            prop_assert_eq!(renamed.index(), token.index());
                            prop_assert!(!tokens.contains(&renamed));
                            model.insert(renamed, number);
                            tokens.push(renamed);
                        }
                    }
                    4 if !tokens.is_empty() => {
                        let token = tokens[pick % tokens.len()];
                        let out = slots.take(token);
                        prop_assert_eq!(out.is_some(), model.contains_key(&token));
                        if let Some(out) = out {
                            prop_assert!(!slots.get_mut(token).unwrap().is_occupied());
                            prop_assert!(slots.put(token, out).is_none());
                        }
                    }
                    _ => slots.recycle(),
                }
                prop_assert_eq!(slots.len(), model.len());
                let named = slots.tokens();
                prop_assert!(named.is_sorted_by_key(|token| token.index()));
                prop_assert_eq!(named.len(), model.len());
                prop_assert!(named.iter().all(|token| model.contains_key(token)));
                for token in &tokens {
                    let seen = slots.get_mut(*token).and_then(Slot::entry_mut).map(number);
                    prop_assert_eq!(seen, model.get(token).copied());
                }
            }
        }
    }
}
