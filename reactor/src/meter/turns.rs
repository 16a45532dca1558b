//! The turns of the last moments, and what their phases took.

use std::time::Duration;

use super::phase;

/// How many turns are kept.
pub(super) const KEPT: usize = 128;

/// What is kept of a turn, in ticks.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Ticks {
    pub(super) began: u64,
    pub(super) phases: [u64; phase::COUNT],
    pub(super) events: u32,
    pub(super) timers: u32,
}

/// How long the phases of turns took: of one, or of all together. Waiting for something
/// to do is not a part of a turn.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct TurnTimes {
    /// Finding the timers that are due, calls of other threads, and of
    /// [`call_soon`](crate::Reactor::call_soon).
    pub calls: Duration,
    /// Descriptors that were ready.
    pub ready: Duration,
    /// Notifications and deferred calls.
    pub notifications: Duration,
    /// Delayed calls, and the notifications that they left.
    pub timers: Duration,
    /// Keeping the books, and the triggers of startup and shutdown.
    pub rest: Duration,
}

impl TurnTimes {
    pub(super) fn of(phases: &[u64; phase::COUNT], scale: impl Fn(u64) -> Duration) -> Self {
        Self {
            calls: scale(phases[phase::CALLS]),
            ready: scale(phases[phase::READY]),
            notifications: scale(phases[phase::NOTIFICATIONS]),
            timers: scale(phases[phase::TIMERS]),
            rest: scale(phases[phase::REST]),
        }
    }

    /// All phases together.
    pub fn total(&self) -> Duration {
        self.phases().map(|(_, took)| took).sum()
    }

    /// The phases with their names, in their order.
    pub fn phases(&self) -> impl Iterator<Item = (&'static str, Duration)> {
        [
            ("calls", self.calls),
            ("ready", self.ready),
            ("notifications", self.notifications),
            ("timers", self.timers),
            ("rest", self.rest),
        ]
        .into_iter()
    }
}

/// One of the last turns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct TurnRecord {
    /// How long ago it began.
    pub ago: Duration,
    /// What its phases took.
    pub times: TurnTimes,
    /// How many events were delivered.
    pub events: u32,
    /// How many delayed calls ran.
    pub timers: u32,
}
