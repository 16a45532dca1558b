//! The crate's one door to the `log` facade, and its fixed targets.

pub(crate) use ::log::{debug, error, warn};

pub(crate) const TRANSPORT: &str = "bowline::transport";
pub(crate) const DESCRIPTORS: &str = "bowline::descriptors";
