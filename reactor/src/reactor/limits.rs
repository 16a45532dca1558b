//! What one turn may do, and what was done so far.

use std::time::Duration;

/// How many events one poll fetches. More cost latency for those at the end,
/// fewer cost polls; a kilo-event buffer is 12 KiB.
pub(super) const EVENTS_PER_TURN: usize = 1024;
/// The most that one poll fetches: 12 MiB of them, and as many descriptors as one
/// process may have by default (`fs.nr_open`).
pub(super) const MAX_EVENTS: usize = 1 << 20;
/// How many delayed calls one turn runs. A storm of timers then delays sockets
/// by some hundred microseconds rather than for as long as it lasts.
const TIMERS_PER_TURN: usize = 4096;
/// How long the loop sleeps at least between two wake-ups for delayed calls. A
/// wake-up costs some microseconds, so that a crowd of calls, each with a time
/// of its own, would otherwise keep a CPU busy. A hand-written wheel has ticks
/// of this length; a call that is alone is not delayed.
const TIMER_SLACK: Duration = Duration::from_micros(100);
/// How many calls from other threads and of `call_soon` one turn runs.
const CALLS_PER_TURN: usize = 4096;
/// How many deferred notifications one turn delivers. Callbacks that keep on
/// notifying each other share the loop with everything else.
const NOTIFICATIONS_PER_TURN: usize = 16_384;

/// The budgets of one turn. The rest of a phase waits for the next turn.
///
/// Any value is accepted. Zero counts as one; `usize::MAX` is no limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Limits {
    /// Events fetched by one poll; default 1,024, at the most 1,048,576. The reactor
    /// keeps room for as many, of 12 bytes each.
    pub events: usize,
    /// Delayed calls run; default 4,096.
    pub timers: usize,
    /// How long the loop may sleep after delayed calls have run, even if the next one
    /// becomes due earlier; default 100 us. A call that stands alone, or was
    /// scheduled without delay, does not wait for it.
    pub timer_slack: Duration,
    /// Calls from other threads run, and as many calls of
    /// [`call_soon`](crate::Reactor::call_soon); default 4,096.
    pub calls: usize,
    /// Deferred notifications delivered; default 16,384.
    pub notifications: usize,
}

crate::setters!(Limits {
    events: usize,
    timers: usize,
    timer_slack: Duration,
    calls: usize,
    notifications: usize,
});

impl Default for Limits {
    fn default() -> Self {
        Self {
            events: EVENTS_PER_TURN,
            timers: TIMERS_PER_TURN,
            timer_slack: TIMER_SLACK,
            calls: CALLS_PER_TURN,
            notifications: NOTIFICATIONS_PER_TURN,
        }
    }
}

/// Counters over a reactor's life so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Statistics {
    /// Turns of the loop.
    pub turns: u64,
    /// Readiness events delivered to descriptors.
    pub events: u64,
    /// Events for descriptors that were already gone. A few are normal: a callback
    /// removes a descriptor, and an event for it comes later in the same batch.
    pub stale_events: u64,
    /// Delayed calls that ran.
    pub timers: u64,
    /// Callbacks that panicked.
    pub panics: u64,
    /// Descriptors that had not ended when the
    /// [graceful stop](crate::Reactor::stop_gracefully) that waited for them was cut
    /// short.
    pub cut: u64,
}
