//! What can be refused by the reactor itself.

use std::error::Error;
use std::fmt;
use std::io;

/// A call that does not fit the state of the reactor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ReactorError {
    /// `run` or `start` on a reactor that runs.
    AlreadyRunning,
    /// The reactor belongs to the process that this one was forked from. This is a
    /// copy.
    Forked,
    /// `after_fork` in the process that made the reactor.
    NotForked,
    /// `stop` or `crash` on a reactor that does not run.
    NotRunning,
}

impl fmt::Display for ReactorError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::AlreadyRunning => "reactor is already running",
            Self::Forked => "reactor belongs to the process that this one was forked from",
            Self::NotForked => "reactor belongs to this process already",
            Self::NotRunning => "reactor is not running",
        })
    }
}

impl Error for ReactorError {}

/// Why [`run`](crate::Reactor::run) did not run, or did not end well.
#[derive(Debug)]
#[non_exhaustive]
pub enum RunError {
    /// The reactor runs already, or is turned by hand.
    AlreadyRunning,
    /// As [`ReactorError::Forked`].
    Forked,
    /// A callback put another reactor in the place of this one. The other one has
    /// ended. The first is wherever it was moved to.
    Replaced,
    /// The program could not go on: [`fail`](crate::Reactor::fail) was called with
    /// this error.
    Failed(io::Error),
}

impl fmt::Display for RunError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AlreadyRunning => ReactorError::AlreadyRunning.fmt(f),
            Self::Forked => ReactorError::Forked.fmt(f),
            Self::Replaced => f.write_str("reactor was replaced inside of a callback"),
            Self::Failed(error) => write!(f, "cannot go on: {error}"),
        }
    }
}

impl Error for RunError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::AlreadyRunning | Self::Forked | Self::Replaced => None,
            Self::Failed(error) => Some(error),
        }
    }
}

impl From<RunError> for io::Error {
    fn from(error: RunError) -> Self {
        match error {
            RunError::AlreadyRunning | RunError::Forked | RunError::Replaced => Self::other(error),
            RunError::Failed(error) => error,
        }
    }
}

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
