//! Where this crate logs.

pub(crate) use ::log::{debug, warn};

/// Handshakes, and why they failed.
pub(crate) const TLS: &str = "bowline::tls";
