//! What a test sets in the time of its own: a clock that stands until the test moves it,
//! and the turns in which all happens that can happen at that time.

// Each test binary uses a part of it.
#![allow(unused_imports, unused_macros)]

use std::time::{Duration, Instant};

use bowline::Reactor;
use bowline::testing::ManualClock;
use bowline::time::Clock;

/// After how many turns at one time a reactor does not come to rest.
const MOST_TURNS: usize = 10_000;

/// A reactor, or a system of several, and its clock.
pub(crate) trait Staged {
    fn clock(&mut self) -> &ManualClock;

    /// When the next call is due.
    fn next_deadline(&mut self) -> Option<Instant>;

    /// Lets happen what can without the time moving on.
    fn settle(&mut self);

    /// Moves the time, and lets happen what is due on the way, each call at its own time.
    #[track_caller]
    fn advance(&mut self, by: Duration) {
        let end = self.clock().now() + by;
        self.settle();
        while let Some(due) = self.next_deadline()
            && due <= end
        {
            self.pass_to(due);
        }
        self.pass_to(end);
    }

    /// Moves the time at once, as if the process had been stopped meanwhile.
    #[track_caller]
    fn jump(&mut self, by: Duration) {
        self.clock().advance(by);
        self.settle();
    }

    #[track_caller]
    fn pass_to(&mut self, time: Instant) {
        let clock = self.clock();
        let wait = time.saturating_duration_since(clock.now());
        clock.advance(wait);
        self.settle();
    }
}

/// Makes [`Staged`] of what has a `reactor`, and its `clock`.
macro_rules! staged {
    ($type:ty) => {
        impl $crate::support::Staged for $type {
            fn clock(&mut self) -> &bowline::testing::ManualClock {
                &self.clock
            }

            fn next_deadline(&mut self) -> Option<std::time::Instant> {
                self.reactor.next_deadline()
            }

            #[track_caller]
            fn settle(&mut self) {
                $crate::support::settle(&mut self.reactor);
            }
        }
    };
}
pub(crate) use staged;

/// Turns the reactor until nothing happens any more, where all that can happen is in this
/// process: sockets of this machine report at once, and the clock stands.
#[track_caller]
pub(crate) fn settle(reactor: &mut Reactor) {
    let mut quiet = 0;
    for _ in 0..MOST_TURNS {
        let before = reactor.statistics();
        reactor.turn(Some(Duration::ZERO));
        let after = reactor.statistics();
        let has_happened = before.events != after.events || before.timers != after.timers;
        quiet = match reactor.is_idle() && !has_happened {
            true => quiet + 1,
            false => 0,
        };
        if quiet == 2 {
            return;
        }
    }
    panic!("it does not come to rest: {reactor:?}");
}
