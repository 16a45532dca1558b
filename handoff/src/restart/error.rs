//! Why a take-over did not happen.

use std::error::Error;
use std::fmt;
use std::io;
use std::process::ExitStatus;

use super::messages::Refusal;

/// Why a take-over did not happen.
#[derive(Debug)]
#[non_exhaustive]
pub enum RestartError {
    /// Another successor is being served.
    Busy,
    /// This process does not serve: it is starting, has handed over, or is stopping.
    NotServing,
    /// The successor could not be started.
    Spawn(io::Error),
    /// The successor has ended, with or without success, before it took over.
    Exited(ExitStatus),
    /// The other process did not take the next step in time.
    TimedOut,
    /// The other process is gone.
    Lost,
    /// The other process gave up.
    GaveUp,
    /// The predecessor refuses this successor.
    Refused(Refusal),
    /// No process was found that hands over, and the control socket was not free, for the
    /// whole [search](super::RestartSettings::search).
    LookedInVain {
        /// How often it has looked.
        looks: u32,
        /// The outcome of the last look.
        last: Box<Self>,
    },
    /// The program could not listen.
    Listen(io::Error),
    /// The control socket could not be obtained.
    Control(io::Error),
    /// The service manager did not accept a notice.
    Manager(io::Error),
}

impl RestartError {
    /// Converts it into an `io::Error` of the fitting kind, with the same message.
    pub(super) fn to_io(&self) -> io::Error {
        let kind = match self {
            Self::Spawn(error)
            | Self::Listen(error)
            | Self::Control(error)
            | Self::Manager(error) => error.kind(),
            Self::TimedOut => io::ErrorKind::TimedOut,
            Self::LookedInVain { last, .. } => last.to_io().kind(),
            _ => io::ErrorKind::Other,
        };
        io::Error::new(kind, self.to_string())
    }
}

impl fmt::Display for RestartError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Busy => f.write_str("another successor is being served"),
            Self::NotServing => f.write_str("this process does not serve"),
            Self::Spawn(error) => write!(f, "cannot start the successor: {error}"),
            Self::Exited(status) => write!(f, "successor ended before it took over: {status}"),
            Self::TimedOut => f.write_str("the other process took too long"),
            Self::Lost => f.write_str("the other process is gone"),
            Self::GaveUp => f.write_str("the other process gave up"),
            Self::Refused(Refusal::Busy) => f.write_str("predecessor serves another successor"),
            Self::Refused(Refusal::Format) => f.write_str("predecessor is of another format"),
            Self::Refused(Refusal::NotServing) => f.write_str("predecessor does not serve"),
            Self::LookedInVain { looks: 1, last } => {
                write!(f, "looked for a predecessor once: {last}")
            }
            Self::LookedInVain { looks, last } => {
                write!(f, "looked for a predecessor {looks} times: {last}")
            }
            Self::Listen(error) => write!(f, "cannot listen: {error}"),
            Self::Control(error) => write!(f, "cannot have the control socket: {error}"),
            Self::Manager(error) => write!(f, "cannot tell the service manager: {error}"),
        }
    }
}

impl Error for RestartError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::Spawn(error)
            | Self::Listen(error)
            | Self::Control(error)
            | Self::Manager(error) => Some(error),
            Self::LookedInVain { last, .. } => Some(last),
            _ => None,
        }
    }
}
