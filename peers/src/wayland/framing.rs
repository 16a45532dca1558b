//! Finds messages in the bytes; pure.

use bowline::framing::{Decoded, EncodeError, Envelope, FrameEncoder, Framer, FramingError};

/// Bytes of a header.
pub(super) const HEADER: usize = 8;

/// The size of libwayland's buffer, and so of the longest message in bytes
/// (`WL_MAX_MESSAGE_SIZE`).
pub(super) const MAX_LENGTH: usize = 4_096;

/// How many descriptors libwayland can take in one receive (`MAX_FDS_OUT`).
const MAX_DESCRIPTORS: usize = 28;

/// The header of a message, without its length. That is set automatically.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WaylandHeader {
    /// The object that the message is sent to, or comes from.
    pub object: u32,
    /// The opcode: the position of the request or event in its interface.
    pub opcode: u16,
}

impl WaylandHeader {
    /// Parses a frame. Returns its header and its arguments.
    ///
    /// # Panics
    ///
    /// `frame` is shorter than a header. No frame of a [`WaylandFramer`] is.
    #[track_caller]
    pub fn of(frame: &[u8]) -> (Self, &[u8]) {
        let (header, arguments) = frame.split_at(HEADER);
        let object = word(&header[..4]);
        let opcode = word(&header[4..]) as u16;
        (Self { object, opcode }, arguments)
    }
}

/// Finds messages in the bytes, and encodes them.
///
/// It does not say how many descriptors a message has, since that depends on the object's
/// interface. The receiver of the frames takes them.
#[derive(Clone, Debug)]
pub struct WaylandFramer {
    max_length: usize,
}

impl WaylandFramer {
    /// Makes a framer with libwayland's limit, 4,096 bytes.
    pub fn new() -> Self {
        Self {
            max_length: MAX_LENGTH,
        }
    }

    /// Sets how many bytes a received or sent message may have, including the header; at
    /// most 65,532. Use more than 4,096 only if the peer is known to accept it.
    #[must_use]
    pub fn with_max_length(mut self, max_length: usize) -> Self {
        self.max_length = max_length.min(0xfffc);
        self
    }
}

impl Default for WaylandFramer {
    fn default() -> Self {
        Self::new()
    }
}

impl Framer for WaylandFramer {
    fn decode(&mut self, input: &[u8]) -> Result<Decoded, FramingError> {
        let Some(header) = input.get(..HEADER) else {
            let at_least = HEADER - input.len();
            return Ok(Decoded::NeedMore { at_least });
        };
        let length = (word(&header[4..]) >> 16) as usize;
        if length > self.max_length {
            return Err(FramingError::TooLong {
                length: Some(length as u64),
                limit: self.max_length,
            });
        }
        if length < HEADER || !length.is_multiple_of(4) {
            let what = "length of a message";
            return Err(FramingError::Malformed { what });
        }
        if input.len() < length {
            let at_least = length - input.len();
            return Ok(Decoded::NeedMore { at_least });
        }
        Ok(Decoded::Frame {
            payload: 0..length,
            consumed: length,
        })
    }
}

impl FrameEncoder for WaylandFramer {
    type Header = WaylandHeader;

    /// Refuses a message that is longer than the limit, since libwayland would end the
    /// connection. Also refuses one that is not a whole number of words.
    fn envelope(
        &self,
        header: &WaylandHeader,
        payload: &[u8],
        _: usize,
    ) -> Result<Envelope<'_>, EncodeError> {
        let length = HEADER + payload.len();
        if length > self.max_length {
            return Err(EncodeError::TooLong {
                length: payload.len(),
                limit: self.max_length.saturating_sub(HEADER) as u64,
            });
        }
        if !length.is_multiple_of(4) {
            let what = "arguments that are no whole words";
            return Err(EncodeError::Malformed { what });
        }
        let second = (length as u32) << 16 | u32::from(header.opcode);
        let mut head = [0; HEADER];
        head[..4].copy_from_slice(&header.object.to_ne_bytes());
        head[4..].copy_from_slice(&second.to_ne_bytes());
        Ok(Envelope::new(&head, b""))
    }

    /// 28. libwayland cannot take more in one receive, and would lose the rest.
    fn max_descriptors(&self) -> usize {
        MAX_DESCRIPTORS
    }
}

pub(super) fn word(bytes: &[u8]) -> u32 {
    u32::from_ne_bytes(*bytes.first_chunk().expect("a word"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn length_of_exactly_the_limit_is_accepted_and_one_more_is_refused() {
        let mut framer = WaylandFramer::new();
        let header = WaylandHeader {
            object: 3,
            opcode: 7,
        };
        let mut out = Vec::new();
        framer.encode(&header, &[1; 4_088], 0, &mut out).unwrap();
        assert!(matches!(framer.decode(&out), Ok(Decoded::Frame { .. })));
        assert_eq!(WaylandHeader::of(&out), (header, &[1; 4_088][..]));
        assert!(framer.encode(&header, &[1; 4_092], 0, &mut out).is_err());
        for (length, error) in [
            (4_100, "4100 bytes, 4096 are allowed"),
            (4, "length of a message"),
            (13, "length of a message"),
        ] {
            let second = (length << 16 | 7_u32).to_ne_bytes();
            out[4..8].copy_from_slice(&second);
            let refused = framer.decode(&out[..8]).unwrap_err().to_string();
            assert!(refused.contains(error), "{refused}");
        }
    }
}
