//! Where the reactor's time comes from.

use std::time::Instant;

/// The source of the reactor's time.
///
/// The reactor reads it once when it is built, and then once per turn, after the
/// poll. Everything within a turn happens at that time
/// ([`Reactor::now`](crate::Reactor::now)).
pub trait Clock: 'static {
    /// The time. Never earlier than an earlier answer.
    fn now(&self) -> Instant;

    /// Called when nothing is ready, before the loop waits for descriptors or
    /// for `deadline`, the time of the next delayed call.
    ///
    /// The default waits. A virtual clock jumps to the deadline instead.
    fn before_sleep(&self, deadline: Option<Instant>) -> Sleep {
        let _ = deadline;
        Sleep::Wait
    }
}

/// What the loop does when nothing is ready; see [`Clock::before_sleep`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Sleep {
    /// Wait in the poll until a descriptor is ready or the deadline has come.
    Wait,
    /// Look at the descriptors without waiting, and go on. The clock has moved by
    /// itself, or is moved from outside.
    Skip,
}

/// The monotonic clock of the system: [`Instant::now`].
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> Instant {
        Instant::now()
    }
}
