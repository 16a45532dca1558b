//! What both D-Bus and varlink say of a message that they do not send.

use bowline::PassedDescriptor;
use bowline::framing::{EncodeError, SendFrameError, SendFrameErrorKind};

/// Nothing is sent, and the descriptors come back.
pub(crate) fn refusal(error: EncodeError, descriptors: Vec<PassedDescriptor>) -> SendFrameError {
    SendFrameError {
        kind: SendFrameErrorKind::Encode(error),
        descriptors,
    }
}
