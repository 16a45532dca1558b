//! Why a connection ended.

use std::error::Error;
use std::fmt;
use std::io;

use bowline_reactor::Panic;

/// Why a connection ended. It is told once, in
/// [`connection_lost`](crate::Protocol::connection_lost).
///
/// The end of a connection is not an error; it has a reason.
#[derive(Debug)]
#[non_exhaustive]
pub enum CloseReason {
    /// The peer closed in an orderly way, or we did and everything was sent.
    Done,
    /// We aborted: [`abort_connection`](crate::AnyConnection::abort_connection).
    Aborted,
    /// The deadline of
    /// [`lose_connection_within`](crate::AnyConnection::lose_connection_within)
    /// passed before everything was sent.
    CloseTimedOut,
    /// The reactor stopped.
    ReactorStopped,
    /// The connection broke. This is the error of the read or write that found out.
    Lost(io::Error),
    /// A callback of this connection panicked.
    Panicked(Panic),
    /// We were asked to close while more descriptors were queued than bytes for them to
    /// travel with. The surplus was closed unsent. (Twisted: `FileDescriptorOverrun`.)
    FileDescriptorOverrun {
        /// How many descriptors had no byte.
        descriptors: usize,
    },
    /// The kernel refuses to pass one of our descriptors to anybody: an io_uring, for
    /// example. Its message was not sent, nor anything queued behind it. All descriptors
    /// that never left come back from
    /// [`reclaim_descriptors`](crate::UnixTransport::reclaim_descriptors).
    UnpassableDescriptor {
        /// Its place among those that come back, from 0.
        position: usize,
        /// The kernel's error.
        error: io::Error,
    },
    /// Descriptors that the peer sent were lost on the way to us (`MSG_CTRUNC`). There
    /// was no free descriptor number here outside of the reserve, or a security module
    /// refused them.
    DescriptorsTruncated {
        /// How many of that read did arrive. They were closed.
        received: usize,
    },
    /// The peer sent more descriptors than the
    /// [limits](crate::DescriptorLimits) allow.
    DescriptorLimit {
        /// The limit that was passed.
        limit: usize,
    },
    /// The peer sent this connection its own socket. That would have kept the connection
    /// open after everybody else had closed it.
    OwnSocket,
}

/// How much of the peer's stream can still be read once nothing more can be sent. See
/// [`Protocol::connection_broken`](crate::Protocol::connection_broken).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Remains {
    /// The bytes that have arrived, without an end. The peer has reset the connection,
    /// or is out of reach.
    Pieces,
    /// Everything that the peer sent, with its end.
    Everything,
    /// The peer's direction, where more may come.
    Reading,
}

impl CloseReason {
    /// Whether the connection ended because a side wanted it to, with nothing lost.
    pub fn is_clean(&self) -> bool {
        matches!(self, Self::Done)
    }
}

impl fmt::Display for CloseReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Done => f.write_str("closed cleanly"),
            Self::Aborted => f.write_str("aborted by us"),
            Self::CloseTimedOut => f.write_str("not everything could be sent before the deadline"),
            Self::ReactorStopped => f.write_str("reactor stopped"),
            Self::Lost(error) => write!(f, "connection lost: {error}"),
            Self::Panicked(panic) => write!(f, "a callback panicked: {}", panic.message()),
            Self::FileDescriptorOverrun { descriptors } => {
                write!(
                    f,
                    "closed with {descriptors} descriptors that had no byte to travel with"
                )
            }
            Self::UnpassableDescriptor { position, error } => {
                write!(
                    f,
                    "kernel does not pass descriptor {position} of those queued: {error}"
                )
            }
            Self::DescriptorsTruncated { received } => {
                write!(f, "received descriptors were truncated to {received}")
            }
            Self::DescriptorLimit { limit } => {
                write!(f, "peer sent more than {limit} descriptors")
            }
            Self::OwnSocket => f.write_str("peer sent the connection its own socket"),
        }
    }
}

impl Error for CloseReason {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::Lost(error) | Self::UnpassableDescriptor { error, .. } => Some(error),
            _ => None,
        }
    }
}
