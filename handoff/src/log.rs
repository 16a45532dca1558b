//! Where log lines go; the only file that names the logging crate.

pub(crate) use ::log::{debug, error, trace, warn};

/// The target of this crate's lines.
pub(crate) const HANDOFF: &str = "bowline::handoff";
