//! The crate's one door to the `log` facade, and its fixed targets.

pub(crate) use ::log::{debug, error, trace, warn};

pub(crate) const REACTOR: &str = "bowline::reactor";
pub(crate) const TIMERS: &str = "bowline::timers";
