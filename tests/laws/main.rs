//! The laws that hold everywhere, each tried where it is easiest to break.

#[path = "../support/mod.rs"]
mod support;

mod budgets;
mod callbacks;
mod ends;
mod exhaustion;
mod fairness;
mod handles;
mod limits;
mod names;
mod panics;
mod replaced;
mod settings;
mod time;
