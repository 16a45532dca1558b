//! The crate's one door to the `log` facade, and its fixed targets.

pub(crate) use ::log::{debug, warn};

pub(crate) const TRANSPORT: &str = "bowline::transport";

/// What connections receive and are written, for those who ask for it.
pub(crate) const TRAFFIC: &str = "bowline::traffic";
pub(crate) const DESCRIPTORS: &str = "bowline::descriptors";
