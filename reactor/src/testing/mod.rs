//! Time and readiness under a test's control.

mod clock;

pub use self::clock::ManualClock;
use crate::Reactor;
pub use crate::simulated::{ProcessDied, ReadinessSource};

impl Reactor {
    /// Sets the source through which simulated descriptors report their readiness.
    /// Feature `testing`.
    pub fn set_readiness_source(&mut self, source: impl ReadinessSource) {
        self.source.set(source);
    }
}
