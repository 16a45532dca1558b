//! Looking into a reactor: what is registered, and what it says of itself.

use std::fmt;

use super::Reactor;
use crate::description::Description;
use crate::panic::catch_panic;
use crate::slots::Slot;
use crate::token::Token;

impl Reactor {
    /// What is registered: connections, listeners, connectors, children, timers that
    /// descriptors have, whatever implements [`Descriptor`](crate::Descriptor).
    ///
    /// A reactor of one thread stands still while it is looked at, so what is answered
    /// belongs to one moment. The order is that of the slots, which a new descriptor takes
    /// anywhere. To look at thousands in portions, go on
    /// [behind](Self::descriptors_after) the last one that was seen.
    pub fn descriptors(&self) -> Descriptors<'_> {
        Descriptors {
            reactor: self,
            next: 0,
        }
    }

    /// The [descriptors](Self::descriptors) in the slots behind that of `token`, which
    /// may be gone.
    pub fn descriptors_after(&self, token: Token) -> Descriptors<'_> {
        Descriptors {
            reactor: self,
            next: token.index().saturating_add(1),
        }
    }
}

/// The registered descriptors of a [`Reactor`]. See [`Reactor::descriptors`].
#[derive(Clone)]
pub struct Descriptors<'a> {
    reactor: &'a Reactor,
    next: usize,
}

impl<'a> Iterator for Descriptors<'a> {
    type Item = Registered<'a>;

    fn next(&mut self) -> Option<Registered<'a>> {
        let slot = self.reactor.slots.taken_from(self.next)?;
        self.next = slot.token().index() + 1;
        Some(Registered { slot })
    }
}

impl fmt::Debug for Descriptors<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.clone()).finish()
    }
}

/// A registered descriptor.
pub struct Registered<'a> {
    slot: &'a Slot,
}

impl Registered<'_> {
    /// Its name.
    pub fn token(&self) -> Token {
        self.slot.token()
    }

    /// What it says of itself. `None` for the descriptor whose callback runs: it is out of
    /// its slot. A call that is [deferred](Reactor::defer) sees all.
    ///
    /// What a protocol adds is user code. If that panics, the part says so.
    pub fn describe(&self) -> Option<Description> {
        let entry = self.slot.entry()?;
        let mut description = Description::default();
        if catch_panic(|| entry.describe(&mut description)).is_err() {
            description.section("(panicked while it described itself)");
        }
        Some(description)
    }
}

impl fmt::Debug for Registered<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registered")
            .field("token", &self.token())
            .finish_non_exhaustive()
    }
}
