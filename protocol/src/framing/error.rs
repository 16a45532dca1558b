//! The errors of a peer's bytes, and of our own payloads.

use std::error::Error;
use std::fmt;

use crate::descriptors::PassedDescriptor;
use crate::error::SendDescriptorErrorKind;

/// How the peer broke the framing.
///
/// Decoding cannot go on by itself, since nobody knows where the next frame begins.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FramingError {
    /// A frame is longer than the limit. It was not received in full, or not
    /// looked at.
    TooLong {
        /// How many bytes the peer announced. `None` if it announces nothing, or the
        /// number could not be read.
        length: Option<u64>,
        /// How many are allowed.
        limit: usize,
    },
    /// A netstring does not begin with a decimal number without leading zeros, followed
    /// by a colon.
    BadLength,
    /// A netstring has something else where its closing comma should be.
    MissingComma,
    /// A frame came with more descriptors than allowed.
    TooManyDescriptors {
        /// How many are allowed.
        limit: usize,
    },
    /// A frame says that it owns more descriptors than have arrived.
    DescriptorsMissing {
        /// How many it owns.
        claimed: usize,
        /// How many there are.
        received: usize,
    },
    /// Descriptors came that no frame claims: the frames of their read do not, or too
    /// many wait for a frame, or they have waited for too long.
    DescriptorsUnclaimed {
        /// How many.
        count: usize,
    },
    /// Anything else. For framers of your own.
    Malformed {
        /// What is wrong, as a lower-case phrase.
        what: &'static str,
    },
}

impl fmt::Display for FramingError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooLong {
                length: Some(length),
                limit,
            } => write!(
                f,
                "peer sent a frame of {length} bytes, {limit} are allowed"
            ),
            Self::TooLong {
                length: None,
                limit,
            } => write!(f, "peer sent a frame of more than {limit} bytes"),
            Self::BadLength => f.write_str("peer sent a netstring without a proper length"),
            Self::MissingComma => f.write_str("peer sent a netstring without its closing comma"),
            Self::TooManyDescriptors { limit } => {
                write!(f, "peer sent more than {limit} descriptors with a frame")
            }
            Self::DescriptorsMissing { claimed, received } => write!(
                f,
                "peer sent a frame of {claimed} descriptors with {received} of them"
            ),
            Self::DescriptorsUnclaimed { count } => {
                write!(f, "peer sent {count} descriptors that no frame claims")
            }
            Self::Malformed { what } => write!(f, "peer broke the framing: {what}"),
        }
    }
}

impl Error for FramingError {}

/// Why a payload cannot be made a frame. Nothing was sent.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum EncodeError {
    /// It is longer than the format can express.
    TooLong {
        /// How many bytes it has.
        length: usize,
        /// How many fit.
        limit: u64,
    },
    /// It contains the delimiter. The peer would see it end too early.
    ContainsDelimiter,
    /// More descriptors than one frame may own.
    TooManyDescriptors {
        /// How many were to go with it.
        count: usize,
        /// How many may go with it.
        limit: usize,
    },
    /// Anything else. For encoders of your own.
    Malformed {
        /// What is wrong, as a lower-case phrase.
        what: &'static str,
    },
}

impl fmt::Display for EncodeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooLong { length, limit } => {
                write!(f, "payload of {length} bytes does not fit, {limit} do")
            }
            Self::ContainsDelimiter => f.write_str("payload contains the delimiter"),
            Self::TooManyDescriptors { count, limit } => {
                write!(
                    f,
                    "frame of {count} descriptors, {limit} may be sent with one"
                )
            }
            Self::Malformed { what } => write!(f, "frame cannot be made: {what}"),
        }
    }
}

impl Error for EncodeError {}

/// A frame was not sent with its descriptors. The error says why, and hands the
/// descriptors back. Dropping it closes them.
#[derive(Debug)]
pub struct SendFrameError {
    /// Why.
    pub kind: SendFrameErrorKind,
    /// The descriptors that were to be sent, in order.
    pub descriptors: Vec<PassedDescriptor>,
}

/// Why a frame was not sent with its descriptors.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SendFrameErrorKind {
    /// The payload cannot be made a frame.
    Encode(EncodeError),
    /// The transport did not take the message.
    Transport(SendDescriptorErrorKind),
}

impl fmt::Display for SendFrameErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Encode(error) => error.fmt(f),
            Self::Transport(error) => error.fmt(f),
        }
    }
}

impl fmt::Display for SendFrameError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.kind.fmt(f)
    }
}

impl Error for SendFrameErrorKind {}
impl Error for SendFrameError {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frame_that_was_not_sent_says_why() {
        let full = SendDescriptorErrorKind::QueueFull;
        let too_long = EncodeError::TooLong {
            length: 256,
            limit: 255,
        };
        for (kind, text) in [
            (
                SendFrameErrorKind::Encode(too_long),
                "payload of 256 bytes does not fit, 255 do",
            ),
            (
                SendFrameErrorKind::Encode(EncodeError::ContainsDelimiter),
                "payload contains the delimiter",
            ),
            (SendFrameErrorKind::Transport(full), &*full.to_string()),
        ] {
            let descriptors = Vec::new();
            assert_eq!(SendFrameError { kind, descriptors }.to_string(), text);
        }
    }
}
