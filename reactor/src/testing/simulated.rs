//! Descriptors that the kernel does not know, and processes that can die.

use std::any::Any;
use std::panic;
use std::vec;

use crate::descriptor::Readiness;
use crate::token::Token;

/// The value that unwinds out of [`Reactor::turn`](crate::Reactor::turn) when the
/// reactor's simulated process has died. Unlike a panic it is not caught on the way,
/// and nobody is told. The caller of `turn` catches it and drops the reactor.
///
/// Feature `testing`.
#[derive(Clone, Copy, Debug)]
pub struct ProcessDied;

/// The source through which simulated descriptors report their readiness. Feature
/// `testing`.
///
/// Feature `testing`.
pub trait ReadinessSource: 'static {
    /// Appends to `events` whatever has become ready since the last call.
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
