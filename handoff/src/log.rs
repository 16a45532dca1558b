//! Where log lines go; the only file that names the logging crate.

#[allow(unused_imports)]
pub(crate) use ::log::{debug, error, info, trace, warn};

/// The target of this crate's lines.
pub(crate) const HANDOFF: &str = "bowline::handoff";
