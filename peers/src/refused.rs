//! The error of D-Bus and varlink for a message that cannot be sent.

use bowline::PassedDescriptor;
use bowline::framing::{EncodeError, SendFrameError, SendFrameErrorKind};

/// Makes the error. Nothing is sent, and it returns the descriptors.
pub(crate) fn refusal(error: EncodeError, descriptors: Vec<PassedDescriptor>) -> SendFrameError {
    SendFrameError {
        kind: SendFrameErrorKind::Encode(error),
        descriptors,
    }
}
