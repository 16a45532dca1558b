//! Frames behind their length.

use crate::framing::{Decoded, EncodeError, Envelope, FrameEncoder, Framer, FramingError};

/// Frames behind their length. The prefix has 8, 16 or 32 bits and counts the payload
/// only. It is in network order unless told otherwise.
#[derive(Clone, Debug)]
pub struct LengthPrefixedFramer {
    /// Bytes of the prefix: 1, 2 or 4.
    width: usize,
    order: ByteOrder,
    max_length: usize,
}

#[derive(Clone, Copy, Debug)]
enum ByteOrder {
    Big,
    Little,
}

impl LengthPrefixedFramer {
    /// The default [limit](Self::set_max_length) in bytes; Twisted's.
    pub const MAX_LENGTH: usize = 99_999;

    /// A prefix of one byte. (Twisted: `Int8StringReceiver`.)
    pub fn u8() -> Self {
        Self::with_width(1)
    }

    /// A prefix of two bytes. (Twisted: `Int16StringReceiver`.)
    pub fn u16() -> Self {
        Self::with_width(2)
    }

    /// A prefix of four bytes. (Twisted: `Int32StringReceiver`.)
    pub fn u32() -> Self {
        Self::with_width(4)
    }

    /// The same, with the least significant byte of the prefix first.
    #[must_use]
    pub fn little_endian(mut self) -> Self {
        self.order = ByteOrder::Little;
        self
    }

    /// The same with another [limit](Self::set_max_length).
    #[must_use]
    pub fn with_max_length(mut self, max_length: usize) -> Self {
        self.set_max_length(max_length);
        self
    }

    /// Sets how many bytes a received payload may have. Payloads that are sent are limited
    /// by the prefix only.
    pub fn set_max_length(&mut self, max_length: usize) {
        self.max_length = max_length;
    }

    /// How many bytes a received payload may have.
    pub fn max_length(&self) -> usize {
        self.max_length
    }

    fn with_width(width: usize) -> Self {
        Self {
            width,
            order: ByteOrder::Big,
            max_length: Self::MAX_LENGTH,
        }
    }
}

impl Framer for LengthPrefixedFramer {
    fn decode(&mut self, input: &[u8]) -> Result<Decoded, FramingError> {
        let Some(prefix) = input.get(..self.width) else {
            return Ok(Decoded::NeedMore {
                at_least: self.width - input.len(),
            });
        };
        let mut bytes = [0; 4];
        let length = match self.order {
            ByteOrder::Big => {
                bytes[4 - self.width..].copy_from_slice(prefix);
                u32::from_be_bytes(bytes)
            }
            ByteOrder::Little => {
                bytes[..self.width].copy_from_slice(prefix);
                u32::from_le_bytes(bytes)
            }
        };
        let end = usize::try_from(length)
            .ok()
            .filter(|&length| length <= self.max_length)
            .and_then(|length| self.width.checked_add(length))
            .ok_or_else(|| FramingError::TooLong {
                length: Some(length.into()),
                limit: self.max_length,
            })?;
        if input.len() < end {
            return Ok(Decoded::NeedMore {
                at_least: end - input.len(),
            });
        }
        Ok(Decoded::Frame {
            payload: self.width..end,
            consumed: end,
        })
    }
}

impl FrameEncoder for LengthPrefixedFramer {
    type Header = ();

    /// Refuses a payload whose length does not fit the prefix.
    fn envelope(&self, _: &(), payload: &[u8], _: usize) -> Result<Envelope<'_>, EncodeError> {
        let limit = u32::MAX >> (32 - 8 * self.width);
        let length = u32::try_from(payload.len())
            .ok()
            .filter(|&length| length <= limit)
            .ok_or_else(|| EncodeError::TooLong {
                length: payload.len(),
                limit: limit.into(),
            })?;
        Ok(match self.order {
            ByteOrder::Big => Envelope::new(&length.to_be_bytes()[4 - self.width..], b""),
            ByteOrder::Little => Envelope::new(&length.to_le_bytes()[..self.width], b""),
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::framing::test_support::{cut, decode_all, decode_cut};

    fn all() -> Vec<LengthPrefixedFramer> {
        let big = [
            LengthPrefixedFramer::u8(),
            LengthPrefixedFramer::u16(),
            LengthPrefixedFramer::u32(),
        ];
        let little = big.clone().map(LengthPrefixedFramer::little_endian);
        big.into_iter().chain(little).collect()
    }

    /// Contract H-11.
    #[test]
    fn frames_are_the_same_however_they_are_cut() {
        for framer in all() {
            let mut input = Vec::new();
            for payload in [&b"hello"[..], b"", b"\0\0\0\x01x", b"end"] {
                framer.encode(&(), payload, 0, &mut input).unwrap();
            }
            for length in 0..=input.len() {
                decode_cut(|| framer.clone(), &input[..length]);
            }
        }
    }

    /// Contract H-11.
    #[test]
    fn prefix_is_in_network_order_unless_told_otherwise() {
        let frame = |framer: LengthPrefixedFramer| {
            let mut out = Vec::new();
            framer.encode(&(), b"ab", 0, &mut out).unwrap();
            out
        };
        assert_eq!(frame(LengthPrefixedFramer::u8()), b"\x02ab");
        assert_eq!(frame(LengthPrefixedFramer::u16()), b"\0\x02ab");
        assert_eq!(frame(LengthPrefixedFramer::u32()), b"\0\0\0\x02ab");
        assert_eq!(
            frame(LengthPrefixedFramer::u32().little_endian()),
            b"\x02\0\0\0ab"
        );
    }

    /// Contract H-12.
    #[test]
    fn length_of_exactly_the_limit_is_accepted_and_one_more_is_refused() {
        let mut framer = LengthPrefixedFramer::u32();
        let mut input = 99_999_u32.to_be_bytes().to_vec();
        assert_eq!(
            framer.decode(&input),
            Ok(Decoded::NeedMore { at_least: 99_999 })
        );
        input.splice(..4, 100_000_u32.to_be_bytes());
        input.resize(200_000, 0);
        assert_eq!(
            framer.decode(&input),
            Err(FramingError::TooLong {
                length: Some(100_000),
                limit: 99_999
            }),
            "although it is there in full"
        );
        assert!(
            framer
                .with_max_length(usize::MAX)
                .decode(b"\xff\xff\xff\xff")
                .is_ok()
        );
    }

    #[test]
    fn limit_is_answered_as_it_is() {
        let framer = LengthPrefixedFramer::u16();
        assert_eq!(framer.max_length(), LengthPrefixedFramer::MAX_LENGTH);
        assert_eq!(framer.with_max_length(7).max_length(), 7);
    }

    /// Contract H-13.
    #[test]
    fn payload_too_long_for_its_prefix_is_not_encoded() {
        for (framer, limit) in [
            (LengthPrefixedFramer::u8(), 255),
            (LengthPrefixedFramer::u16(), 65_535),
        ] {
            let mut out = Vec::new();
            framer.encode(&(), &vec![0; limit], 0, &mut out).unwrap();
            out.clear();
            assert_eq!(
                framer.encode(&(), &vec![0; limit + 1], 0, &mut out),
                Err(EncodeError::TooLong {
                    length: limit + 1,
                    limit: limit as u64
                })
            );
            assert!(out.is_empty());
        }
    }

    proptest! {
        /// Contract H-11.
        #[test]
        fn what_is_encoded_is_decoded(
            which in 0usize..6,
            payloads in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..255), 0..6),
            cuts in proptest::collection::vec(0usize..1500, 0..6),
        ) {
            let framer = all().swap_remove(which);
            let mut input = Vec::new();
            for payload in &payloads {
                framer.encode(&(), payload, 0, &mut input).unwrap();
            }
            let (frames, rest, error) = decode_all(framer, &cut(&input, &cuts));
            prop_assert_eq!((frames, rest, error), (payloads, vec![], None));
        }
    }
}
