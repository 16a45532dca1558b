//! The crate's interface to the `log` facade, and its fixed targets.

use std::borrow::Cow;

pub(crate) use ::log::{debug, error, warn};

pub(crate) const TRANSPORT: &str = "bowline::transport";
/// What connections receive and are written, for those who ask for it.
#[cfg(feature = "inspect")]
pub(crate) const TRAFFIC: &str = "bowline::traffic";
pub(crate) const DESCRIPTORS: &str = "bowline::descriptors";

/// The name that user code gives itself in log lines. If that panics, only the name is
/// lost.
pub(crate) fn name<'a>(log_prefix: impl FnOnce() -> Cow<'a, str>) -> Cow<'a, str> {
    bowline_reactor::catch_panic(log_prefix).unwrap_or(Cow::Borrowed("(whose log_prefix panics)"))
}
