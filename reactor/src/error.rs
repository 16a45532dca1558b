//! What can be refused by the reactor itself.

use std::error::Error;
use std::fmt;

/// A call that does not fit the state the reactor is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ReactorError {
    /// `run` or `start` on a reactor that runs.
    AlreadyRunning,
    /// `stop` or `crash` on a reactor that does not run.
    NotRunning,
}

impl fmt::Display for ReactorError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::AlreadyRunning => "reactor is already running",
            Self::NotRunning => "reactor is not running",
        })
    }
}

impl Error for ReactorError {}

/// A trigger that is not there to be removed: it ran, was removed before, or
/// belongs to another reactor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TriggerError;

impl fmt::Display for TriggerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("no such trigger is waiting")
    }
}

impl Error for TriggerError {}
