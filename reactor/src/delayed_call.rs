//! The handle on something scheduled.

use std::error::Error;
use std::fmt;
use std::time::{Duration, Instant};

use crate::reactor::Reactor;
use crate::timers::TimerKey;

/// The handle on a call that was scheduled with [`Reactor::call_later`].
///
/// It is `Copy`, and harmless to keep: once the call has run or was cancelled,
/// every method says so. Dropping the handle does not cancel the call. (Twisted:
/// `IDelayedCall`.)
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct DelayedCall {
    pub(crate) key: TimerKey,
}

impl DelayedCall {
    /// Takes the call back. It will not run.
    ///
    /// # Errors
    ///
    /// [`DelayedCallError`] when it has run, runs now, or was cancelled.
    pub fn cancel(self, reactor: &mut Reactor) -> Result<(), DelayedCallError> {
        if reactor.timers.cancel(self.key) {
            Ok(())
        } else {
            Err(DelayedCallError)
        }
    }

    /// Schedules the call anew, `delay` after the current turn's time.
    ///
    /// Among calls due at the same time it now counts as the last.
    ///
    /// # Errors
    ///
    /// [`DelayedCallError`] when it has run, runs now, or was cancelled.
    pub fn reset(self, reactor: &mut Reactor, delay: Duration) -> Result<(), DelayedCallError> {
        let Some(deadline) = reactor.moment_after(delay) else {
            let deadline = reactor.deadline_after(delay);
            return self.move_to(reactor, deadline);
        };
        if reactor.timers.reset_at(self.key, deadline) {
            Ok(())
        } else {
            Err(DelayedCallError)
        }
    }

    /// Moves the call `by` later than it was due.
    ///
    /// # Errors
    ///
    /// [`DelayedCallError`] when it has run, runs now, or was cancelled.
    pub fn delay(self, reactor: &mut Reactor, by: Duration) -> Result<(), DelayedCallError> {
        let due = self.due(reactor).ok_or(DelayedCallError)?;
        let deadline = due.checked_add(by);
        let deadline = deadline.unwrap_or_else(|| reactor.deadline_after(by));
        self.move_to(reactor, deadline)
    }

    /// Moves the call `by` earlier than it was due. If that lies in the past, the
    /// call runs in the next turn.
    ///
    /// # Errors
    ///
    /// [`DelayedCallError`] when it has run, runs now, or was cancelled.
    pub fn hasten(self, reactor: &mut Reactor, by: Duration) -> Result<(), DelayedCallError> {
        let due = self.due(reactor).ok_or(DelayedCallError)?;
        let earlier = due.checked_sub(by).unwrap_or_else(|| reactor.now());
        self.move_to(reactor, earlier)
    }

    /// When the call is due, or `None` when it no longer waits.
    pub fn due(self, reactor: &Reactor) -> Option<Instant> {
        reactor.timers.deadline(self.key)
    }

    /// Whether the call still waits.
    pub fn is_active(self, reactor: &Reactor) -> bool {
        reactor.timers.contains(self.key)
    }

    fn move_to(self, reactor: &mut Reactor, deadline: Instant) -> Result<(), DelayedCallError> {
        if reactor.timers.reset(self.key, deadline) {
            Ok(())
        } else {
            Err(DelayedCallError)
        }
    }
}

/// The delayed call no longer waits: it has run, runs now, or was cancelled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DelayedCallError;

impl fmt::Display for DelayedCallError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("delayed call was already called or cancelled")
    }
}

impl Error for DelayedCallError {}
