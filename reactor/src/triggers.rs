//! What runs when the reactor starts and stops.

use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::reactor::PlainCall;

/// The two events of a reactor's life that triggers can be attached to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SystemEvent {
    /// The reactor starts to run.
    Startup,
    /// The reactor was asked to stop.
    Shutdown,
}

/// The part of a [`SystemEvent`] in which a trigger runs.
///
/// (Twisted: `addSystemEventTrigger`.)
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// First. The event waits here for as long as somebody keeps a [`Hold`] on it. The
    /// loop turns meanwhile.
    Before,
    /// Second. At shutdown, every descriptor is disconnected before the first trigger
    /// of this phase runs.
    During,
    /// Last.
    After,
}

/// The name of a trigger, for
/// [`Reactor::remove_trigger`](crate::Reactor::remove_trigger).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TriggerId(u64);

/// Keeps a [`SystemEvent`] in its [`Before`](Phase::Before) phase until it is
/// dropped. With it a trigger says that it has not finished yet.
///
/// [`Reactor::hold`](crate::Reactor::hold) gives it out. Drop it inside a callback:
/// otherwise nothing wakes the loop to see it.
#[derive(Clone, Debug)]
pub struct Hold {
    _count: Rc<()>,
}

pub(crate) struct Triggers {
    waiting: Vec<Trigger>,
    startup: Rc<()>,
    shutdown: Rc<()>,
}

struct Trigger {
    id: TriggerId,
    event: SystemEvent,
    phase: Phase,
    call: PlainCall,
}

impl Triggers {
    pub(crate) fn new() -> Self {
        Self {
            waiting: Vec::new(),
            startup: Rc::new(()),
            shutdown: Rc::new(()),
        }
    }

    pub(crate) fn add(&mut self, phase: Phase, event: SystemEvent, call: PlainCall) -> TriggerId {
        // Of all reactors, so that none finds the trigger of another.
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let id = TriggerId(NEXT.fetch_add(1, Ordering::Relaxed));
        self.waiting.push(Trigger {
            id,
            event,
            phase,
            call,
        });
        id
    }

    pub(crate) fn remove(&mut self, id: TriggerId) -> bool {
        let found = self.waiting.iter().position(|trigger| trigger.id == id);
        if let Some(index) = found {
            self.waiting.remove(index);
        }
        found.is_some()
    }

    /// Takes the next trigger to run: one at a time, so that a running trigger
    /// may add and remove others.
    pub(crate) fn take(&mut self, phase: Phase, event: SystemEvent) -> Option<PlainCall> {
        let index = self
            .waiting
            .iter()
            .position(|trigger| trigger.phase == phase && trigger.event == event)?;
        Some(self.waiting.remove(index).call)
    }

    /// Takes all that wait, to be dropped.
    pub(crate) fn take_all(&mut self) -> impl Iterator<Item = PlainCall> {
        std::mem::take(&mut self.waiting)
            .into_iter()
            .map(|trigger| trigger.call)
    }

    pub(crate) fn hold(&self, event: SystemEvent) -> Hold {
        Hold {
            _count: Rc::clone(self.holds(event)),
        }
    }

    pub(crate) fn is_held(&self, event: SystemEvent) -> bool {
        Rc::strong_count(self.holds(event)) > 1
    }

    fn holds(&self, event: SystemEvent) -> &Rc<()> {
        match event {
            SystemEvent::Startup => &self.startup,
            SystemEvent::Shutdown => &self.shutdown,
        }
    }
}
