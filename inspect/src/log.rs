//! The crate's one door to the `log` facade, and its fixed target.

pub(crate) use ::log::warn;

pub(crate) const INSPECT: &str = "bowline::inspect";
