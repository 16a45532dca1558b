//! The loop seen from outside: timers, wake-ups, life cycle, descriptors,
//! shutdown, signals.

#[path = "../support/mod.rs"]
mod support;

mod descriptors;
mod graceful;
mod lifecycle;
mod periodic;
mod readable;
mod shutdown;
mod signals;
mod thread_pool;
mod timers;
mod wakeups;

use std::cell::RefCell;
use std::fmt::Debug;
use std::rc::Rc;

use bowline::Reactor;

/// Notes taken by callbacks, in order.
pub(crate) struct Notes<T>(Rc<RefCell<Vec<T>>>);

impl<T> Clone for Notes<T> {
    fn clone(&self) -> Self {
        Self(Rc::clone(&self.0))
    }
}

impl<T: Clone + Debug + 'static> Notes<T> {
    pub(crate) fn new() -> Self {
        Self(Rc::default())
    }

    pub(crate) fn push(&self, note: T) {
        self.0.borrow_mut().push(note);
    }

    pub(crate) fn all(&self) -> Vec<T> {
        self.0.borrow().clone()
    }

    pub(crate) fn len(&self) -> usize {
        self.0.borrow().len()
    }

    /// A callback that takes this note.
    pub(crate) fn noting(&self, note: T) -> impl FnOnce(&mut Reactor) + 'static {
        let notes = self.clone();
        move |_| notes.push(note)
    }
}

/// What the callbacks that fail on purpose say.
pub(crate) const PANIC: &str = "on purpose, in a test";
