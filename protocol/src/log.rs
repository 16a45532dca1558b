//! The crate's one door to the `log` facade, and its fixed targets.

pub(crate) use ::log::{debug, warn};

pub(crate) const TRANSPORT: &str = "bowline::transport";
