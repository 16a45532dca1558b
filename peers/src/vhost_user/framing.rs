//! Finds messages in the bytes, and how many descriptors each has; pure.

use bowline::framing::{Decoded, EncodeError, Envelope, FrameEncoder, Framer, FramingError};

use super::channel::of_back_end;
use super::messages::kind;

/// Bytes of a header.
const HEADER: usize = 12;

/// Bytes of the description of a log.
pub(super) const LOG: usize = 16;

/// The longest payload by default, in bytes: `MAX_MSG_SIZE` of rust-vmm.
const MAX_PAYLOAD: usize = 4_096;

/// How many descriptors a message may have (`VHOST_MEMORY_BASELINE_NREGIONS`).
pub(super) const MAX_DESCRIPTORS: usize = 8;

const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
const REPLY: u32 = 1 << 2;
const NEEDS_REPLY: u32 = 1 << 3;

/// The header of a message, without its length and version. Those are set automatically.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VhostUserHeader {
    /// The number of the request, as in the specification.
    pub request: u32,
    /// Whether this is the answer.
    pub is_reply: bool,
    /// Whether a request without an answer of its own is to be acknowledged.
    pub needs_reply: bool,
}

impl VhostUserHeader {
    /// Parses a frame. Returns its header and its payload.
    ///
    /// # Panics
    ///
    /// `frame` is shorter than a header. No frame of a [`VhostUserFramer`] is.
    #[track_caller]
    pub fn of(frame: &[u8]) -> (Self, &[u8]) {
        let (header, payload) = frame.split_at(HEADER);
        let flags = word(header, 4);
        let header = Self {
            request: word(header, 0),
            is_reply: flags & REPLY != 0,
            needs_reply: flags & NEEDS_REPLY != 0,
        };
        (header, payload)
    }

    /// Returns how many descriptors a message of a front-end has.
    fn claims(&self, payload: &[u8]) -> Option<usize> {
        let first = |payload: &[u8]| (payload.len() >= 4).then(|| word(payload, 0));
        Some(match self.request {
            kind::POSTCOPY_ADVISE | kind::GET_INFLIGHT_FD if self.is_reply => 1,
            _ if self.is_reply => 0,
            kind::SET_MEM_TABLE => first(payload).map_or(0, |count| count as usize),
            kind::SET_VRING_KICK | kind::SET_VRING_CALL | kind::SET_VRING_ERR => {
                one_unless_denied(payload)
            }
            // Shorter, it is an address in the front-end's memory.
            kind::SET_LOG_BASE => usize::from(payload.len() >= LOG),
            kind::SET_LOG_FD
            | kind::SET_BACKEND_REQ_FD
            | kind::SET_INFLIGHT_FD
            | kind::ADD_MEM_REG => 1,
            kind::FIRST..=kind::LAST => 0,
            // A later one: whatever has come with it.
            _ => return None,
        })
    }

    /// Returns how many descriptors a message on the channel of a back-end has.
    fn claims_of_back_end(&self, payload: &[u8]) -> Option<usize> {
        Some(match self.request {
            _ if self.is_reply => 0,
            of_back_end::HOST_NOTIFIER => one_unless_denied(payload),
            of_back_end::FIRST..=of_back_end::LAST => 0,
            _ => return None,
        })
    }
}

/// Returns 1, or 0 if bit 8 of the first word says that there is no descriptor.
fn one_unless_denied(payload: &[u8]) -> usize {
    usize::from(payload.len() >= 4 && word(payload, 0) & kind::NO_DESCRIPTOR == 0)
}

/// Finds messages in the bytes, and encodes them.
#[derive(Clone, Debug)]
pub struct VhostUserFramer {
    max_payload: usize,
    channel: Channel,
}

/// Who sends the requests: the same numbers mean different things.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Channel {
    FrontEnd,
    BackEnd,
}

impl VhostUserFramer {
    /// Makes a framer for the requests of a front-end and their answers, with the default
    /// limit.
    pub fn new() -> Self {
        Self {
            max_payload: MAX_PAYLOAD,
            channel: Channel::FrontEnd,
        }
    }

    /// Makes a framer for the requests of a back-end, which are sent on a
    /// [channel](super::back_end_channel) of their own, with the default limit.
    pub fn of_back_end() -> Self {
        Self {
            channel: Channel::BackEnd,
            ..Self::new()
        }
    }

    /// Sets how many bytes a received or sent payload may have; default 4,096.
    #[must_use]
    pub fn with_max_payload(mut self, max_payload: usize) -> Self {
        self.max_payload = max_payload;
        self
    }
}

impl Default for VhostUserFramer {
    fn default() -> Self {
        Self::new()
    }
}

impl Framer for VhostUserFramer {
    fn decode(&mut self, input: &[u8]) -> Result<Decoded, FramingError> {
        let Some(header) = input.get(..HEADER) else {
            let at_least = HEADER - input.len();
            return Ok(Decoded::NeedMore { at_least });
        };
        if word(header, 4) & VERSION_MASK != VERSION {
            let what = "version of a message";
            return Err(FramingError::Malformed { what });
        }
        let length = word(header, 8);
        let end = usize::try_from(length)
            .ok()
            .filter(|length| *length <= self.max_payload)
            .and_then(|length| length.checked_add(HEADER))
            .ok_or_else(|| FramingError::TooLong {
                length: Some(length.into()),
                limit: self.max_payload,
            })?;
        if input.len() < end {
            let at_least = end - input.len();
            return Ok(Decoded::NeedMore { at_least });
        }
        Ok(Decoded::Frame {
            payload: 0..end,
            consumed: end,
        })
    }

    fn claims(&self, frame: &[u8]) -> Option<usize> {
        let (header, payload) = VhostUserHeader::of(frame);
        match self.channel {
            Channel::FrontEnd => header.claims(payload),
            Channel::BackEnd => header.claims_of_back_end(payload),
        }
    }
}

impl FrameEncoder for VhostUserFramer {
    type Header = VhostUserHeader;

    /// Refuses a payload that is longer than the limit.
    fn envelope(
        &self,
        header: &VhostUserHeader,
        payload: &[u8],
        _: usize,
    ) -> Result<Envelope<'_>, EncodeError> {
        let too_long = EncodeError::TooLong {
            length: payload.len(),
            limit: self.max_payload as u64,
        };
        let length = u32::try_from(payload.len())
            .ok()
            .filter(|_| payload.len() <= self.max_payload)
            .ok_or(too_long)?;
        let mut flags = VERSION;
        flags |= if header.is_reply { REPLY } else { 0 };
        flags |= if header.needs_reply { NEEDS_REPLY } else { 0 };
        let mut head = [0; HEADER];
        head[..4].copy_from_slice(&header.request.to_ne_bytes());
        head[4..8].copy_from_slice(&flags.to_ne_bytes());
        head[8..].copy_from_slice(&length.to_ne_bytes());
        Ok(Envelope::new(&head, b""))
    }

    /// 8. QEMU ends the connection if there are more.
    fn max_descriptors(&self) -> usize {
        MAX_DESCRIPTORS
    }
}

/// Returns the word at `at`, which must be there.
pub(super) fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(*bytes[at..].first_chunk().expect("a word"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn payload_of_exactly_the_limit_is_accepted_and_one_more_is_refused() {
        let mut framer = VhostUserFramer::new();
        let header = VhostUserHeader {
            request: kind::SET_OWNER,
            is_reply: false,
            needs_reply: true,
        };
        let mut out = Vec::new();
        framer.encode(&header, &[1; 4_096], 0, &mut out).unwrap();
        assert!(matches!(framer.decode(&out), Ok(Decoded::Frame { .. })));
        assert_eq!(VhostUserHeader::of(&out), (header, &[1; 4_096][..]));
        assert!(framer.encode(&header, &[1; 4_097], 0, &mut out).is_err());
        out[8..12].copy_from_slice(&4_097_u32.to_ne_bytes());
        assert_eq!(
            framer.decode(&out[..12]),
            Err(FramingError::TooLong {
                length: Some(4_097),
                limit: 4_096
            })
        );
        out[4..8].copy_from_slice(&2_u32.to_ne_bytes());
        assert!(framer.decode(&out[..12]).is_err(), "of another version");
    }
}
