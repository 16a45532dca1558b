//! The one successor that is started or served.

use std::io;
use std::process::ExitStatus;

use bowline_reactor::{DelayedCall, Reactor};
use bowline_transport::ChildWatch;

use super::applying::Applying;
use super::error::RestartError;
use crate::log;

/// How far a process is with replacing itself: at most one successor at a time is
/// started or served.
#[derive(Debug)]
pub(super) enum Attempt {
    /// Nobody is about to take over.
    Idle,
    /// A child was started, and has until then to ask.
    Started {
        child: ChildWatch,
        late: DelayedCall,
    },
    /// An applicant has asked, by its number. Its process, if it was started here: it
    /// may have ended.
    Served {
        applicant: u64,
        child: Option<ChildWatch>,
    },
    /// The child did not make it, and was killed. It is told why once it has ended, so
    /// that the next may be started.
    Failed { error: RestartError },
    /// Everything was handed over. The child is still ours to wait for.
    Over { child: Option<ChildWatch> },
}

impl Attempt {
    /// Whether this process may be served.
    pub(super) fn admits(&self, process: &Applying) -> bool {
        match self {
            Self::Idle => process.is_there(),
            // Nobody else is, while there is one.
            Self::Started { .. } => self.has_started(process),
            Self::Served { .. } | Self::Failed { .. } | Self::Over { .. } => false,
        }
    }

    /// Whether it is the child, which has yet to ask. Its number is its own until it was
    /// waited for.
    pub(super) fn has_started(&self, process: &Applying) -> bool {
        let Self::Started { child, .. } = self else {
            return false;
        };
        child.pid() == process.pid() && !child.has_ended()
    }

    /// Serves the applicant of this number.
    pub(super) fn serve(&mut self, reactor: &mut Reactor, applicant: u64) {
        let child = match std::mem::replace(self, Self::Idle) {
            Self::Started { child, late } => {
                // It is in time.
                let _ = late.cancel(reactor);
                Some(child)
            }
            _ => None,
        };
        *self = Self::Served { applicant, child };
    }

    pub(super) fn is_of(&self, wanted: u64) -> bool {
        matches!(self, Self::Served { applicant, .. } if *applicant == wanted)
    }

    /// Whether a successor is being started or served.
    pub(super) fn is_under_way(&self) -> bool {
        !matches!(self, Self::Idle | Self::Over { child: None })
    }

    /// Ends it. Answers the error if it is to be told at once: no process is left that
    /// has to end first.
    pub(super) fn fail(
        &mut self,
        reactor: &mut Reactor,
        error: RestartError,
    ) -> Option<RestartError> {
        let child = match std::mem::replace(self, Self::Idle) {
            Self::Started { child, late } => {
                // It may be what runs.
                let _ = late.cancel(reactor);
                child
            }
            Self::Served {
                child: Some(child), ..
            } if !child.has_ended() => child,
            Self::Idle | Self::Served { .. } => return Some(error),
            // The first reason is the one.
            other @ (Self::Failed { .. } | Self::Over { .. }) => {
                *self = other;
                return None;
            }
        };
        // Whatever state it is in.
        let _ = child.kill();
        *self = Self::Failed { error };
        None
    }

    /// The child has ended. Answers what is to be told of it, if anything is.
    pub(super) fn child_ended(
        &mut self,
        reactor: &mut Reactor,
        status: io::Result<ExitStatus>,
    ) -> Option<RestartError> {
        match std::mem::replace(self, Self::Idle) {
            Self::Failed { error } => Some(error),
            Self::Started { late, .. } => {
                let _ = late.cancel(reactor);
                Some(match status {
                    Ok(status) => RestartError::Exited(status),
                    // Somebody else has waited for it, or children are not waited for.
                    Err(error) => {
                        log::warn!(target: log::HANDOFF, "how the successor ended: {error}");
                        RestartError::Lost
                    }
                })
            }
            // Its channel tells what it was for.
            served @ Self::Served { .. } => {
                *self = served;
                None
            }
            Self::Over { .. } => {
                *self = Self::Over { child: None };
                None
            }
            Self::Idle => None,
        }
    }

    /// Kills the child that is served, if it was started here; whether it was.
    pub(super) fn kill_served(&self) -> bool {
        let Self::Served {
            child: Some(child), ..
        } = self
        else {
            return false;
        };
        log::warn!(target: log::HANDOFF, "killing the successor, which hangs");
        let _ = child.kill();
        true
    }

    /// Everything was handed over. Answers the child, which is on its own now.
    pub(super) fn finish(&mut self) -> Option<ChildWatch> {
        let child = match std::mem::replace(self, Self::Idle) {
            Self::Served { child, .. } => child.filter(|child| !child.has_ended()),
            _ => None,
        };
        *self = Self::Over {
            child: child.clone(),
        };
        child
    }
}
