//! Descriptors that the kernel does not know, and processes that can die.

use std::any::Any;
use std::panic;
use std::vec;

use crate::descriptor::Readiness;
use crate::token::Token;

/// What unwinds out of [`Reactor::turn`](crate::Reactor::turn) when the simulated
/// process that it is of has died: unlike a panic it is not caught on the way, and
/// nothing is told of it. Whoever turns the reactor catches it and drops the reactor.
#[derive(Clone, Copy, Debug)]
pub struct ProcessDied;

/// Where simulated descriptors report their readiness; feature `testing`.
pub trait ReadinessSource: 'static {
    /// Moves what has become ready since the last call into `events`.
    fn poll(&mut self, events: &mut Vec<(Token, Readiness)>);

    /// Whether the next [`poll`](Self::poll) would report anything.
    fn has_events(&self) -> bool;
}

/// The source of a reactor, if it has one.
#[derive(Default)]
pub(crate) struct Source {
    source: Option<Box<dyn ReadinessSource>>,
}

impl Source {
    pub(crate) fn set(&mut self, source: impl ReadinessSource) {
        self.source = Some(Box::new(source));
    }

    /// What has become ready.
    pub(crate) fn poll(&mut self) -> Option<vec::IntoIter<(Token, Readiness)>> {
        let mut events = Vec::new();
        self.source.as_mut()?.poll(&mut events);
        Some(events.into_iter())
    }

    pub(crate) fn has_events(&self) -> bool {
        let source = self.source.as_ref();
        source.is_some_and(|source| source.has_events())
    }
}

/// Goes on unwinding if it is the death of a simulated process, of which
/// nothing runs any more.
pub(crate) fn unless_died(payload: Box<dyn Any + Send>) -> Box<dyn Any + Send> {
    if payload.is::<ProcessDied>() {
        panic::resume_unwind(payload);
    }
    payload
}
