//! Netstrings.

use crate::framing::{Decoded, EncodeError, Envelope, FrameEncoder, Framer, FramingError};

/// Netstrings: the length as a decimal number, a colon, the payload, a comma.
/// `5:hello,` is one, `0:,` an empty one.
///
/// A number has no leading zeros. A number with more digits than the limit is refused as
/// soon as its first surplus digit arrives, before it is read as a number.
#[derive(Clone, Debug)]
pub struct NetstringFramer {
    max_length: usize,
}

impl NetstringFramer {
    /// The default [limit](Self::set_max_length) in bytes; Twisted's.
    pub const MAX_LENGTH: usize = 99_999;

    /// Netstrings of at most 99,999 bytes.
    pub fn new() -> Self {
        Self {
            max_length: Self::MAX_LENGTH,
        }
    }

    /// The same with another [limit](Self::set_max_length).
    #[must_use]
    pub fn with_max_length(mut self, max_length: usize) -> Self {
        self.set_max_length(max_length);
        self
    }

    /// Sets how many bytes a received payload may have. Payloads that are sent are not
    /// limited.
    pub fn set_max_length(&mut self, max_length: usize) {
        self.max_length = max_length;
    }

    /// How many bytes a received payload may have.
    pub fn max_length(&self) -> usize {
        self.max_length
    }

    /// Reads the length, or says how many bytes are missing at the least.
    fn decode_length(&self, input: &[u8]) -> Result<Length, FramingError> {
        let digits = self.max_length.checked_ilog10().unwrap_or(0) as usize + 1;
        let mut value = 0_usize;
        for (at, &byte) in input.iter().enumerate() {
            match byte {
                b'0'..=b'9' if at == 1 && input[0] == b'0' => return Err(FramingError::BadLength),
                b'0'..=b'9' => {
                    let read = (at < digits)
                        .then(|| value.checked_mul(10)?.checked_add(usize::from(byte - b'0')))
                        .flatten();
                    value = read
                        .filter(|&value| value <= self.max_length)
                        .ok_or_else(|| FramingError::TooLong {
                            length: read.map(|value| value as u64),
                            limit: self.max_length,
                        })?;
                }
                b':' if at > 0 => {
                    return Ok(Length::Read {
                        header: at + 1,
                        value,
                    });
                }
                _ => return Err(FramingError::BadLength),
            }
        }
        // What is known of the number is its least value. The first digit is
        // missing, or the colon; the comma is in any case.
        let missing = if input.is_empty() { 2 } else { 1 };
        Ok(Length::Missing {
            at_least: value.saturating_add(missing + 1),
        })
    }
}

enum Length {
    Read { header: usize, value: usize },
    Missing { at_least: usize },
}

impl Default for NetstringFramer {
    fn default() -> Self {
        Self::new()
    }
}

impl Framer for NetstringFramer {
    fn decode(&mut self, input: &[u8]) -> Result<Decoded, FramingError> {
        let (header, value) = match self.decode_length(input)? {
            Length::Read { header, value } => (header, value),
            Length::Missing { at_least } => return Ok(Decoded::NeedMore { at_least }),
        };
        // No slice is longer than half of what a `usize` can count, so that
        // what saturates here never arrives.
        let comma = header.saturating_add(value);
        match input.get(comma) {
            Some(b',') => Ok(Decoded::Frame {
                payload: header..comma,
                consumed: comma + 1,
            }),
            Some(_) => Err(FramingError::MissingComma),
            None => Ok(Decoded::NeedMore {
                at_least: (comma - input.len()).saturating_add(1),
            }),
        }
    }
}

impl FrameEncoder for NetstringFramer {
    type Header = ();

    fn envelope(&self, _: &(), payload: &[u8], _: usize) -> Result<Envelope<'_>, EncodeError> {
        let mut head = [0; 21];
        let mut start = head.len() - 1;
        head[start] = b':';
        let mut value = payload.len();
        loop {
            start -= 1;
            head[start] = b'0' + (value % 10) as u8;
            value /= 10;
            if value == 0 {
                break;
            }
        }
        Ok(Envelope::new(&head[start..], b","))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::framing::test_support::{cut, decode_all, decode_cut};

    /// Contract H-09.
    #[test]
    fn netstrings_are_the_same_however_they_are_cut() {
        for input in [
            &b"5:hello,0:,12:3:abc,4:defg,,1:"[..],
            b"0:,0:,",
            b"3:,,,,",
            b"9999",
            b"4:abcde,",
            b"x",
        ] {
            decode_cut(NetstringFramer::new, input);
        }
    }

    /// Contract H-09.
    #[test]
    fn nested_netstring_is_not_misread() {
        let (frames, ..) = decode_all(NetstringFramer::new(), &[b"12:3:abc,4:defg,,"]);
        assert_eq!(frames, [b"3:abc,4:defg"]);
    }

    /// Contract H-10.
    #[test]
    fn broken_netstrings_are_refused_at_the_first_wrong_byte() {
        for (input, error) in [
            (&b":abc,"[..], FramingError::BadLength),
            (b"abc", FramingError::BadLength),
            (b"3abc", FramingError::BadLength),
            (b"03:abc,", FramingError::BadLength),
            (b"00", FramingError::BadLength),
            (b"-1:", FramingError::BadLength),
            (b"3:abcd", FramingError::MissingComma),
            (b"3:abc3:abc,", FramingError::MissingComma),
        ] {
            assert_eq!(
                NetstringFramer::new().decode(input),
                Err(error),
                "{input:?}"
            );
        }
    }

    #[test]
    fn least_that_is_missing_is_no_more_than_the_frame_needs_and_no_less() {
        let mut framer = NetstringFramer::new();
        assert_eq!(framer.max_length(), NetstringFramer::MAX_LENGTH);
        for (input, rest) in [
            (&b""[..], &b"0:,"[..]),
            (b"0", b":,"),
            (b"3", b":abc,"),
            (b"12", b":abcdefghijkl,"),
            (b"3:", b"abc,"),
            (b"3:abc", b","),
        ] {
            let at_least = rest.len();
            assert_eq!(framer.decode(input), Ok(Decoded::NeedMore { at_least }));
            let consumed = input.len() + at_least;
            let whole = [input, rest].concat();
            let is_whole = matches!(
                framer.decode(&whole),
                Ok(Decoded::Frame { consumed: all, .. }) if all == consumed
            );
            assert!(is_whole, "{whole:?}");
        }
    }

    /// Contract H-10.
    #[test]
    fn length_of_exactly_the_limit_is_accepted_and_one_more_is_refused() {
        let mut framer = NetstringFramer::new();
        assert_eq!(
            framer.decode(b"99999:"),
            Ok(Decoded::NeedMore { at_least: 100_000 })
        );
        assert_eq!(
            framer.decode(b"100000"),
            Err(FramingError::TooLong {
                length: None,
                limit: 99_999
            }),
            "by its digits, without the colon"
        );
        let mut framer = NetstringFramer::new().with_max_length(50);
        assert!(framer.decode(b"50:").is_ok());
        assert_eq!(
            framer.decode(b"51"),
            Err(FramingError::TooLong {
                length: Some(51),
                limit: 50
            })
        );
        let mut framer = NetstringFramer::new().with_max_length(0);
        assert!(framer.decode(b"0:,").is_ok());
        assert!(framer.decode(b"1").is_err());
    }

    #[test]
    fn unlimited_netstring_does_not_overflow() {
        let mut framer = NetstringFramer::new().with_max_length(usize::MAX);
        let longest = format!("{}:", usize::MAX);
        assert!(framer.decode(longest.as_bytes()).is_ok());
        let longer = format!("{}0:", usize::MAX);
        assert!(framer.decode(longer.as_bytes()).is_err());
        assert!(framer.decode(b"18446744073709551616:").is_err());
    }

    proptest! {
        /// Contract H-09.
        #[test]
        fn what_is_encoded_is_decoded(
            payloads in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..120), 0..6),
            cuts in proptest::collection::vec(0usize..700, 0..6),
        ) {
            let mut input = Vec::new();
            for payload in &payloads {
                NetstringFramer::new().encode(&(), payload, 0, &mut input).unwrap();
            }
            let (frames, rest, error) = decode_all(NetstringFramer::new(), &cut(&input, &cuts));
            prop_assert_eq!((frames, rest, error), (payloads, vec![], None));
        }

        #[test]
        fn any_bytes_are_judged_alike_however_they_are_cut(
            input in proptest::collection::vec(prop_oneof![b'0'..=b'3', Just(b':'), Just(b',')], 0..24),
        ) {
            decode_cut(|| NetstringFramer::new().with_max_length(12), &input);
        }
    }
}
