//! Why a connection ended.

use std::error::Error;
use std::fmt;
use std::io;

use bowline_reactor::Panic;

/// Why a connection ended; arrives once, in
/// [`connection_lost`](crate::Protocol::connection_lost).
///
/// The end of a connection is not an error of anybody's: it has a reason.
#[derive(Debug)]
#[non_exhaustive]
pub enum CloseReason {
    /// The peer closed in an orderly way, or we did and everything was sent.
    Done,
    /// We aborted: [`abort_connection`](crate::Transport::abort_connection).
    Aborted,
    /// The deadline of
    /// [`lose_connection_within`](crate::Transport::lose_connection_within)
    /// passed before everything was sent.
    CloseTimedOut,
    /// The reactor stopped.
    ReactorStopped,
    /// The connection broke: the error of the read or write that found out.
    Lost(io::Error),
    /// A callback of this connection panicked.
    Panicked(Panic),
    /// We were asked to close while more descriptors were queued than bytes
    /// for them to travel with; the surplus was closed unsent. (Twisted:
    /// `FileDescriptorOverrun`.)
    FileDescriptorOverrun {
        /// How many descriptors had no byte.
        descriptors: usize,
    },
    /// One of our descriptors is of a kind that the kernel passes to nobody, such as an
    /// io_uring. Nothing was sent of the message that it was to travel with, and of what
    /// was queued behind it. All that never left comes back from
    /// [`reclaim_descriptors`](crate::UnixTransport::reclaim_descriptors).
    UnpassableDescriptor {
        /// Its place among those, from 0.
        position: usize,
        /// What the kernel said.
        error: io::Error,
    },
    /// Descriptors that the peer sent were lost on the way to us: there was no
    /// free descriptor number here outside of the reserve, or a security module
    /// refused. (`MSG_CTRUNC`)
    DescriptorsTruncated {
        /// How many of that read did arrive; they were closed.
        received: usize,
    },
    /// The peer sent more descriptors than the
    /// [limits](crate::DescriptorLimits) allow.
    DescriptorLimit {
        /// The limit that was passed.
        limit: usize,
    },
    /// The peer sent this connection its own socket, which would have kept it
    /// open after everybody else had closed it.
    OwnSocket,
}

impl CloseReason {
    /// Whether the connection ended as at least one side meant it to, with
    /// nothing lost.
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
