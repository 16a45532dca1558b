//! Frames that end with a delimiter.

use std::borrow::Cow;
use std::io::BufRead;

use crate::framing::{Decoded, EncodeError, Envelope, FrameEncoder, Framer, FramingError};

/// Lines: frames that end with a delimiter, CR LF by default. A line may have any bytes
/// in it, and may be empty.
///
/// # The limit
///
/// A line may be as long as the limit, 16,384 bytes by default, without its delimiter.
/// It is too long if no delimiter ends within as many bytes as the limit and the
/// delimiter have together. Only these bytes are looked at, and all of them are waited
/// for. So the verdict is the same however the bytes were cut, and the longest line may
/// end with half a delimiter while the other half is on its way. (Twisted's two line
/// receivers disagree here.)
#[derive(Clone, Debug)]
pub struct LineFramer {
    /// Invariant: not empty.
    delimiter: Cow<'static, [u8]>,
    max_length: usize,
    /// LF alone ends a line too. Invariant: the delimiter is CR LF then.
    takes_bare_lf: bool,
    /// No delimiter ends within this many bytes of the present line.
    scanned: usize,
}

impl LineFramer {
    /// The default [limit](Self::set_max_length) in bytes; Twisted's.
    pub const MAX_LENGTH: usize = 16_384;

    /// Lines that end with CR LF.
    pub fn new() -> Self {
        Self::with_delimiter(b"\r\n")
    }

    /// Lines that end with CR LF or with LF alone; both may occur in one stream. For
    /// protocols that people type, and whose peers disagree. The limit applies to the
    /// delivered line. Lines that are sent end with CR LF, and may contain no LF.
    pub fn with_any_line_end() -> Self {
        Self {
            takes_bare_lf: true,
            ..Self::new()
        }
    }

    /// Lines that end with `delimiter`.
    ///
    /// # Panics
    ///
    /// When `delimiter` is empty.
    #[track_caller]
    pub fn with_delimiter(delimiter: impl Into<Cow<'static, [u8]>>) -> Self {
        let delimiter = delimiter.into();
        assert!(!delimiter.is_empty(), "a delimiter has at least one byte");
        Self {
            delimiter,
            max_length: Self::MAX_LENGTH,
            takes_bare_lf: false,
            scanned: 0,
        }
    }

    /// The same with another [limit](Self::set_max_length).
    #[must_use]
    pub fn with_max_length(mut self, max_length: usize) -> Self {
        self.set_max_length(max_length);
        self
    }

    /// Sets how many bytes a received line may have, without its delimiter. Lines that
    /// are sent are not limited.
    pub fn set_max_length(&mut self, max_length: usize) {
        self.max_length = max_length;
        self.scanned = 0;
    }

    /// Sets the delimiter, from the next line on that is not yet decoded. Lines end with
    /// exactly this and nothing else.
    ///
    /// # Panics
    ///
    /// When `delimiter` is empty.
    #[track_caller]
    pub fn set_delimiter(&mut self, delimiter: impl Into<Cow<'static, [u8]>>) {
        *self = Self::with_delimiter(delimiter).with_max_length(self.max_length);
    }

    /// The delimiter.
    pub fn delimiter(&self) -> &[u8] {
        &self.delimiter
    }

    /// How many bytes a received line may have.
    pub fn max_length(&self) -> usize {
        self.max_length
    }

    /// What ends a line at the latest.
    fn end(&self) -> &[u8] {
        match self.takes_bare_lf {
            true => b"\n",
            false => &self.delimiter,
        }
    }

    /// Where the payload ends of a line that ends at `end`, its delimiter included.
    fn payload_end(&self, input: &[u8], end: usize) -> usize {
        let payload_end = end - self.end().len();
        match self.takes_bare_lf && input[..payload_end].ends_with(b"\r") {
            true => payload_end - 1,
            false => payload_end,
        }
    }

    /// How many bytes of the delimiter are missing at the least.
    fn missing(&self, input: &[u8]) -> usize {
        if self.takes_bare_lf {
            return 1;
        }
        let begun = (1..self.delimiter.len())
            .rev()
            .find(|&length| input.ends_with(&self.delimiter[..length]));
        self.delimiter.len() - begun.unwrap_or(0)
    }
}

impl Default for LineFramer {
    fn default() -> Self {
        Self::new()
    }
}

impl Framer for LineFramer {
    fn decode(&mut self, input: &[u8]) -> Result<Decoded, FramingError> {
        let longest = self.max_length.saturating_add(self.delimiter.len());
        let window = &input[..input.len().min(longest)];
        let end = find_end(window, self.end(), self.scanned);
        let line = end.map(|end| (self.payload_end(window, end), end));
        // One that ends with LF alone can be a byte too long here.
        if let Some((payload_end, end)) = line
            && payload_end <= self.max_length
        {
            self.scanned = 0;
            return Ok(Decoded::Frame {
                payload: 0..payload_end,
                consumed: end,
            });
        }
        if line.is_some() || window.len() == longest {
            self.scanned = 0;
            return Err(FramingError::TooLong {
                length: None,
                limit: self.max_length,
            });
        }
        self.scanned = input.len();
        Ok(Decoded::NeedMore {
            at_least: self.missing(input),
        })
    }

    fn reset(&mut self) {
        self.scanned = 0;
    }
}

impl FrameEncoder for LineFramer {
    type Header = ();

    /// Refuses a line whose end the peer would see too early.
    fn envelope(&self, _: &(), payload: &[u8], _: usize) -> Result<Envelope<'_>, EncodeError> {
        let delimiter = &*self.delimiter;
        // A delimiter such as `aa` can also begin in the payload and end in
        // the delimiter.
        let straddles = (1..delimiter.len()).any(|begun| {
            payload.ends_with(&delimiter[..begun]) && delimiter.starts_with(&delimiter[begun..])
        });
        if straddles || find_end(payload, self.end(), 0).is_some() {
            return Err(EncodeError::ContainsDelimiter);
        }
        Ok(Envelope::new(b"", delimiter))
    }
}

/// Where the first `delimiter` in `bytes` ends, when none ends within the first
/// `scanned` of them.
fn find_end(bytes: &[u8], delimiter: &[u8], scanned: usize) -> Option<usize> {
    let last = *delimiter.last()?;
    let mut end = scanned.min(bytes.len());
    while end < bytes.len() {
        // The library's way to its vectorised memchr.
        let mut unread = &bytes[end..];
        end += unread
            .skip_until(last)
            .expect("reading from a slice cannot fail");
        if bytes[..end].ends_with(delimiter) {
            return Some(end);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::framing::test_support::{decode_all, decode_cut};

    /// Splits everything at once.
    fn naive(mut input: &[u8], delimiter: &[u8], max: usize) -> (Vec<Vec<u8>>, bool) {
        let mut lines = Vec::new();
        loop {
            let end = input.windows(delimiter.len()).position(|w| w == delimiter);
            match end {
                Some(end) if end <= max => {
                    lines.push(input[..end].to_vec());
                    input = &input[end + delimiter.len()..];
                }
                Some(_) => return (lines, true),
                None => return (lines, input.len() >= max + delimiter.len()),
            }
        }
    }

    /// Contract H-01.
    #[test]
    fn lines_are_the_same_however_they_are_cut() {
        for input in [
            &b"one\r\ntwo\r\n\r\nthree\r\nrest"[..],
            b"\r\r\n\n\r\n\r",
            b"a\rb\nc\r\n",
            b"",
        ] {
            decode_cut(LineFramer::new, input);
        }
    }

    #[test]
    fn delimiter_may_overlap_itself() {
        let framer = || LineFramer::with_delimiter(b"aab");
        let (lines, rest, error) = decode_all(framer(), &[b"aaab", b"xaaaab"]);
        assert_eq!(lines, [&b"a"[..], b"xaa"]);
        assert_eq!((rest, error), (vec![], None));
        decode_cut(framer, b"aaabaabxaaaabaa");
    }

    /// Contract H-02.
    #[test]
    fn line_of_exactly_the_limit_is_delivered_and_one_byte_more_is_refused() {
        let mut input = vec![b'x'; 16_384];
        input.extend(b"\r\n");
        let (lines, ..) = decode_all(LineFramer::new(), &[&input]);
        assert_eq!(lines[0].len(), 16_384);
        input.insert(0, b'x');
        input.extend(b"next\r\n");
        let too_long = FramingError::TooLong {
            length: None,
            limit: 16_384,
        };
        let (lines, rest, error) = decode_all(LineFramer::new(), &[&input]);
        assert_eq!((lines.len(), error), (0, Some(too_long)));
        assert_eq!(rest, input, "the line, its delimiter and everything behind");
    }

    /// Contract H-03, W-68.
    #[test]
    fn unfinished_line_is_refused_only_when_no_delimiter_can_follow() {
        let mut framer = LineFramer::new().with_max_length(4);
        assert_eq!(
            framer.decode(b"1234\r"),
            Ok(Decoded::NeedMore { at_least: 1 })
        );
        assert!(matches!(
            framer.decode(b"1234\r\n"),
            Ok(Decoded::Frame { consumed: 6, .. })
        ));
        assert_eq!(
            framer.decode(b"12345"),
            Ok(Decoded::NeedMore { at_least: 2 })
        );
        assert!(framer.decode(b"12345\r").is_err());
        assert!(framer.decode(b"12345\r\n").is_err());
    }

    #[test]
    fn lf_alone_ends_a_line_too_where_any_end_is_taken() {
        let framer = LineFramer::with_any_line_end;
        let input = b"one\r\ntwo\n\nthree\r\r\n\r\nrest";
        let (lines, rest, error) = decode_all(framer(), &[input]);
        assert_eq!(lines, [&b"one"[..], b"two", b"", b"three\r", b""]);
        assert_eq!((&*rest, error), (&b"rest"[..], None));
        decode_cut(framer, input);
        // What is sent is what the strictest take.
        assert_eq!(framer().delimiter(), b"\r\n");
        assert!(
            framer().envelope(&(), b"a\nb", 0).is_err()
                && framer().envelope(&(), b"a\rb", 0).is_ok()
        );
        // The limit is that of the line, whatever ends it.
        let short = || framer().with_max_length(4);
        for whole in [&b"1234\r\n"[..], b"1234\n", b"1234\r\n5"] {
            assert_eq!(decode_all(short(), &[whole]).0, [b"1234"]);
        }
        for too_long in [&b"12345\r\n"[..], b"12345\n", b"123456", b"1234\r\r\n"] {
            assert!(decode_all(short(), &[too_long]).2.is_some(), "{too_long:?}");
            decode_cut(short, too_long);
        }
        let mut framer = short();
        let waits = Ok(Decoded::NeedMore { at_least: 1 });
        assert_eq!(framer.decode(b"1234\r"), waits);
        framer.set_delimiter(&b"\r\n"[..]);
        assert_eq!(decode_all(framer, &[b"a\nb\r\n"]).0, [b"a\nb"]);
    }

    #[test]
    fn line_that_would_end_early_is_not_encoded() {
        let framer = LineFramer::new();
        assert!(framer.envelope(&(), b"a\r\nb", 0).is_err());
        assert!(framer.envelope(&(), b"a\r", 0).is_ok());
        let framer = LineFramer::with_delimiter(b"aa");
        assert_eq!(
            framer.envelope(&(), b"ba", 0).unwrap_err(),
            EncodeError::ContainsDelimiter
        );
        assert!(framer.envelope(&(), b"ab", 0).is_ok());
    }

    #[test]
    fn settings_are_answered_as_they_are() {
        let mut framer = LineFramer::new();
        assert_eq!(framer.delimiter(), b"\r\n");
        assert_eq!(framer.max_length(), LineFramer::MAX_LENGTH);
        framer.set_max_length(7);
        framer.set_delimiter(&b"end"[..]);
        assert_eq!(framer.delimiter(), b"end");
        assert_eq!(framer.max_length(), 7);
    }

    #[test]
    #[should_panic(expected = "a delimiter has at least one byte")]
    fn empty_delimiter_panics() {
        LineFramer::with_delimiter(b"");
    }

    #[test]
    fn long_line_in_small_pieces_is_scanned_once() {
        // Quadratic scanning would look at 2^39 bytes here.
        let mut framer = LineFramer::with_delimiter(b"\n").with_max_length(1 << 20);
        let input = vec![b'x'; 1 << 20];
        for end in 0..input.len() {
            assert!(framer.decode(&input[..end]).is_ok());
        }
    }

    proptest! {
        /// Contract H-01.
        #[test]
        fn lines_are_those_of_the_naive_model(
            input in proptest::collection::vec(prop_oneof![Just(b'\r'), Just(b'\n'), Just(b'a')], 0..60),
            delimiter in proptest::sample::select(vec![&b"\r\n"[..], b"\n", b"\r\r", b"a\ra"]),
            max in 0usize..8,
            cuts in proptest::collection::vec(0usize..60, 0..6),
        ) {
            let framer = LineFramer::with_delimiter(delimiter).with_max_length(max);
            let pieces = crate::framing::test_support::cut(&input, &cuts);
            let (lines, _, error) = decode_all(framer, &pieces);
            prop_assert_eq!((lines, error.is_some()), naive(&input, delimiter, max));
        }

        #[test]
        fn what_is_encoded_is_decoded(
            payload in proptest::collection::vec(prop_oneof![Just(b'a'), Just(b'b')], 0..12),
            delimiter in proptest::sample::select(vec![&b"aa"[..], b"aba", b"b", b"abab"]),
        ) {
            let framer = LineFramer::with_delimiter(delimiter);
            let mut whole = payload.clone();
            whole.extend(delimiter);
            let (lines, rest, _) = decode_all(framer.clone(), &[&whole]);
            let survives = rest.is_empty() && lines == [payload.clone()];
            prop_assert_eq!(framer.envelope(&(), &payload, 0).is_ok(), survives);
        }
    }
}
