//! Time that a test moves.

use std::cell::Cell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use crate::clock::{Clock, Sleep};

/// A clock that moves only when it is told to.
///
/// Clones share the time, so a test keeps one and gives the reactor another.
///
/// A reactor with a manual clock never waits for a delayed call. The clock stands
/// until it is advanced. With [`auto_advance`](Self::auto_advance) it jumps to the
/// next deadline when the loop has nothing else to do; that is the mode for
/// [`Reactor::run`](crate::Reactor::run) under virtual time. When there is no delayed
/// call at all, the reactor does wait for real descriptors.
///
/// # Examples
///
/// ```
/// # #[cfg(feature = "testing")] {
/// use std::{cell::Cell, rc::Rc, time::Duration};
/// use bowline::testing::ManualClock;
/// use bowline::Reactor;
///
/// let clock = ManualClock::new();
/// let mut reactor = Reactor::with_clock(clock.clone())?;
/// let called = Rc::new(Cell::new(false));
/// let seen = called.clone();
/// reactor.call_later(Duration::from_secs(3600), move |_| seen.set(true));
///
/// clock.advance(Duration::from_secs(3600));
/// reactor.turn(Some(Duration::ZERO));
/// assert!(called.get());
/// # }
/// # Ok::<(), std::io::Error>(())
/// ```
///
/// Feature `testing`.
#[derive(Clone, Debug)]
pub struct ManualClock {
    state: Rc<ManualState>,
}

#[derive(Debug)]
struct ManualState {
    now: Cell<Instant>,
    auto_advance: Cell<bool>,
}

impl ManualClock {
    /// A clock that stands still, at an arbitrary time.
    #[expect(
        clippy::new_without_default,
        reason = "two of them are different clocks"
    )]
    pub fn new() -> Self {
        Self {
            state: Rc::new(ManualState {
                now: Cell::new(Instant::now()),
                auto_advance: Cell::new(false),
            }),
        }
    }

    /// Moves the time forward.
    pub fn advance(&self, by: Duration) {
        self.state.now.set(self.state.now.get() + by);
    }

    /// Lets the clock jump to the next deadline whenever the loop has nothing
    /// else to do. Off by default.
    pub fn auto_advance(&self, on: bool) {
        self.state.auto_advance.set(on);
    }
}

impl Clock for ManualClock {
    fn now(&self) -> Instant {
        self.state.now.get()
    }

    fn before_sleep(&self, deadline: Option<Instant>) -> Sleep {
        let Some(deadline) = deadline else {
            return Sleep::Wait;
        };
        if self.state.auto_advance.get() && deadline > self.state.now.get() {
            self.state.now.set(deadline);
        }
        Sleep::Skip
    }
}
