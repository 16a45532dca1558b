//! Looking into a reactor: what is registered, and what it says of itself.

use std::fmt;

use super::Reactor;
use crate::description::Description;
use crate::panic::{Contained, catch_panic};
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

    /// Adds a part of the program that is no descriptor to what those see who look into
    /// the reactor: a worker pool and a restart have one each, and a program may add its
    /// own.
    ///
    /// `describe` is called whenever somebody [looks](Self::parts), and begins a
    /// [section](Description::section). When it answers `None`, what it describes is gone:
    /// it is dropped and not called again. So it owns nothing, and asks a
    /// [`Weak`](std::rc::Weak). It may be called inside of any callback.
    ///
    /// # Examples
    ///
    /// ```
    /// use std::cell::Cell;
    /// use std::rc::Rc;
    /// use bowline::Reactor;
    ///
    /// let mut reactor = Reactor::new()?;
    /// let rooms = Rc::new(Cell::new(3_u64));
    /// let seen = Rc::downgrade(&rooms);
    /// reactor.add_part(move |description| {
    ///     let rooms = seen.upgrade()?;
    ///     description.section("Rooms").set("open", rooms.get());
    ///     Some(())
    /// });
    /// assert_eq!(reactor.parts().get("open"), Some(&3_u64.into()));
    /// drop(rooms);
    /// assert!(reactor.parts().sections().is_empty());
    /// # Ok::<(), std::io::Error>(())
    /// ```
    pub fn add_part(&mut self, describe: impl Fn(&mut Description) -> Option<()> + 'static) {
        let parts = self.parts.get_mut();
        parts.push(Contained::new(Box::new(describe)));
    }

    /// What the [parts](Self::add_part) of the program say of themselves, the oldest
    /// first.
    pub fn parts(&self) -> Description {
        let mut description = Description::default();
        let Ok(mut parts) = self.parts.try_borrow_mut() else {
            // A reactor is looked at by a part of it.
            return description;
        };
        parts.retain(|part| {
            let told = catch_panic(|| part(&mut description));
            if told.is_err() {
                description.section("(panicked while it described itself)");
            }
            !matches!(told, Ok(None))
        });
        description
    }
}

/// What describes a part of the program.
pub(super) type Part = Contained<Box<dyn Fn(&mut Description) -> Option<()>>>;

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
