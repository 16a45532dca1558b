//! A framer with the bytes it could not use yet.

use std::fmt;
use std::num::NonZeroUsize;
use std::ops::Range;

use crate::framing::{Decoded, Framer, FramingError};

/// A framer with the bytes it could not use yet: bytes in, frames out. It is
/// [`Framed`](crate::framing::Framed) without a connection.
///
/// A frame that stands in the input as a whole is found there. Only an unfinished frame
/// at the end of the input is copied. An empty buffer owns no memory.
///
/// # Examples
///
/// ```
/// use bowline::framing::{FrameBuffer, FramingError, NetstringFramer};
///
/// let mut buffer = FrameBuffer::new(NetstringFramer::new());
/// let mut words = Vec::new();
/// for piece in [&b"5:hel"[..], b"lo,5:world,", b"3:"] {
///     let mut input = piece;
///     while let Some(word) = buffer.next_frame(&mut input)? {
///         words.push(word.to_vec());
///     }
/// }
/// assert_eq!(words, [b"hello", b"world"]);
/// assert_eq!(buffer.len(), 2);
/// # Ok::<(), FramingError>(())
/// ```
pub struct FrameBuffer<F> {
    pub(super) framer: F,
    /// Bytes of frames not yet found, from `start` on; what is before was
    /// used.
    ///
    /// Invariant: `start <= kept.len()`.
    pub(super) kept: Vec<u8>,
    pub(super) start: usize,
    /// How many bytes the framer asked for when it was last shown exactly what
    /// is kept; 0 when it has not been.
    pub(super) wanted: usize,
}

/// Where a piece for the receiver is, and where what follows it begins.
pub(super) enum Found {
    Kept { payload: Range<usize>, end: usize },
    Input { payload: Range<usize>, end: usize },
}

/// How much of the input is copied at first to complete an unfinished frame.
const FIRST_STEP: usize = 256;

/// A buffer with more room than this is not reused for what is shorter.
const REUSED_ROOM: usize = 4096;

impl<F: Framer> FrameBuffer<F> {
    /// An empty buffer.
    pub fn new(framer: F) -> Self {
        Self {
            framer,
            kept: Vec::new(),
            start: 0,
            wanted: 0,
        }
    }

    /// The next frame, made of the kept bytes and of `input`. The used bytes are removed
    /// from `input`. `None` if there is no whole frame; the rest of `input` is kept then,
    /// and `input` is empty.
    ///
    /// Call it until it answers `None`. If you stop earlier, [`keep`](Self::keep) the
    /// rest of `input`: it comes before whatever is received next.
    ///
    /// # Errors
    ///
    /// The peer broke the framing. Nothing is used up: the bytes, from the beginning of
    /// the broken frame on, can be [taken](Self::take_rest).
    ///
    /// # Panics
    ///
    /// When the framer gives an impossible answer: a frame of no bytes, or one that ends
    /// behind its input.
    pub fn next_frame<'a, 'i: 'a>(
        &'a mut self,
        input: &mut &'i [u8],
    ) -> Result<Option<&'a [u8]>, FramingError> {
        Ok(match self.find(input)? {
            None => None,
            Some(Found::Kept { payload, end }) => {
                self.start = end;
                Some(&self.kept[payload])
            }
            Some(Found::Input { payload, end }) => {
                let (frame, rest) = input.split_at(end);
                *input = rest;
                Some(&frame[payload])
            }
        })
    }

    /// Copies all of `input` for later. For callers that stop between two frames.
    pub fn keep(&mut self, input: &mut &[u8]) {
        if input.is_empty() {
            return;
        }
        self.wanted = 0;
        self.compact();
        if self.kept.capacity() > REUSED_ROOM && self.kept.is_empty() {
            self.kept = Vec::new();
        }
        self.kept.extend_from_slice(input);
        *input = &[];
    }

    /// Takes all bytes that belong to no frame yet, those of `input` last. For another
    /// protocol, or to throw them away.
    pub fn take_rest(&mut self, input: &mut &[u8]) -> Vec<u8> {
        self.keep(input);
        self.compact();
        self.forget();
        std::mem::take(&mut self.kept)
    }

    /// How many bytes can be received without passing the end of the next frame. `None`
    /// if that frame, or an error, is there already.
    pub fn bytes_wanted(&mut self) -> Option<NonZeroUsize> {
        if self.wanted == 0
            && let Ok(Decoded::NeedMore { at_least }) = self.framer.decode(&self.kept[self.start..])
        {
            self.wanted = at_least.max(1);
        }
        if self.wanted == 0 {
            // What was found is to be found again.
            self.framer.reset();
        }
        NonZeroUsize::new(self.wanted)
    }

    /// The framer, to adjust or replace it. The kept bytes are shown to it again.
    pub fn framer_mut(&mut self) -> &mut F {
        self.forget();
        &mut self.framer
    }

    /// The framer.
    pub fn framer(&self) -> &F {
        &self.framer
    }

    /// How many bytes are kept.
    pub fn len(&self) -> usize {
        self.kept.len() - self.start
    }

    /// Whether no bytes are kept.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Finds the next frame without using it up.
    pub(super) fn find(&mut self, input: &mut &[u8]) -> Result<Option<Found>, FramingError> {
        if !self.is_empty() {
            return self.find_in_kept(input);
        }
        self.wanted = 0;
        match decode(&mut self.framer, input)? {
            Decoded::Frame { payload, consumed } => Ok(Some(Found::Input {
                payload,
                end: consumed,
            })),
            Decoded::NeedMore { at_least } => {
                self.keep(input);
                self.wanted = at_least.max(1);
                self.shrink();
                Ok(None)
            }
        }
    }

    /// As [`find`](Self::find), with something kept: adds to it as much of
    /// `input` as it takes, so that the frames behind are found in `input`.
    fn find_in_kept(&mut self, input: &mut &[u8]) -> Result<Option<Found>, FramingError> {
        let mut copied = 0;
        let mut step = FIRST_STEP;
        loop {
            if self.wanted == 0 {
                match decode(&mut self.framer, &self.kept[self.start..]) {
                    Err(error) => {
                        self.kept.truncate(self.kept.len() - copied);
                        return Err(error);
                    }
                    Ok(Decoded::Frame { payload, consumed }) => {
                        let payload = self.start + payload.start..self.start + payload.end;
                        let end = self.start + consumed;
                        // What was copied and is not needed stays in the input.
                        let surplus = copied.min(self.kept.len() - end);
                        self.kept.truncate(self.kept.len() - surplus);
                        *input = &input[copied - surplus..];
                        return Ok(Some(Found::Kept { payload, end }));
                    }
                    Ok(Decoded::NeedMore { at_least }) => self.wanted = at_least.max(1),
                }
            }
            let more = self.wanted.max(step).min(input.len() - copied);
            if more == 0 {
                *input = &[];
                self.compact();
                return Ok(None);
            }
            self.kept.extend_from_slice(&input[copied..copied + more]);
            copied += more;
            step = step.saturating_mul(2);
            self.wanted = 0;
        }
    }

    /// Finds the next `at_most` bytes, whatever they are.
    pub(super) fn find_raw(&self, input: &[u8], at_most: u64) -> Option<Found> {
        let at_most = usize::try_from(at_most).unwrap_or(usize::MAX);
        if !self.is_empty() {
            let end = self.start + self.len().min(at_most);
            return Some(Found::Kept {
                payload: self.start..end,
                end,
            });
        }
        let end = input.len().min(at_most);
        (end > 0).then_some(Found::Input {
            payload: 0..end,
            end,
        })
    }

    /// No bytes, where the next frame begins.
    pub(super) fn find_nothing(&self) -> Found {
        Found::Kept {
            payload: self.start..self.start,
            end: self.start,
        }
    }

    /// How many bytes there are behind what was `found`.
    pub(super) fn left(&self, input: &[u8], found: &Found) -> usize {
        match found {
            Found::Kept { end, .. } => self.kept.len() - end + input.len(),
            Found::Input { end, .. } => input.len() - end,
        }
    }

    /// The frame that was `found`, with what surrounds its payload.
    pub(super) fn whole<'a>(&'a self, input: &'a [u8], found: &Found) -> &'a [u8] {
        match found {
            Found::Kept { end, .. } => &self.kept[self.start..*end],
            Found::Input { end, .. } => &input[..*end],
        }
    }

    /// Drops all bytes.
    pub(super) fn clear(&mut self) {
        self.forget();
        self.start = 0;
        self.kept = Vec::new();
    }

    /// The framer is shown other bytes from now on.
    pub(super) fn forget(&mut self) {
        self.framer.reset();
        self.wanted = 0;
    }

    /// Gives the memory back when nothing is kept.
    pub(super) fn shrink(&mut self) {
        if self.is_empty() {
            self.start = 0;
            self.kept = Vec::new();
        }
    }

    fn compact(&mut self) {
        self.kept.drain(..self.start);
        self.start = 0;
    }
}

fn decode(framer: &mut impl Framer, input: &[u8]) -> Result<Decoded, FramingError> {
    let decoded = framer.decode(input)?;
    if let Decoded::Frame { payload, consumed } = &decoded {
        assert!(
            *consumed > 0
                && *consumed <= input.len()
                && payload.start <= payload.end
                && payload.end <= *consumed,
            "framer found a frame where none can be"
        );
    }
    Ok(decoded)
}

impl<F: fmt::Debug> fmt::Debug for FrameBuffer<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FrameBuffer")
            .field("framer", &self.framer)
            .field("bytes", &(self.kept.len() - self.start))
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::framing::{LengthPrefixedFramer, LineFramer};

    #[test]
    fn frame_that_is_whole_in_the_input_is_not_copied() {
        let mut buffer = FrameBuffer::new(LineFramer::new());
        let data = b"begi";
        assert_eq!(buffer.next_frame(&mut &data[..]), Ok(None));
        let data = b"n\r\nwhole\r\nen";
        let mut input = &data[..];
        assert_eq!(buffer.next_frame(&mut input), Ok(Some(&b"begin"[..])));
        let frame = buffer.next_frame(&mut input).unwrap().unwrap();
        assert_eq!(frame, b"whole");
        assert!(std::ptr::eq(frame, &data[3..8]));
        assert_eq!(buffer.next_frame(&mut input), Ok(None));
        assert_eq!(buffer.len(), 2);
    }

    #[test]
    fn idle_buffer_owns_no_memory() {
        let mut buffer = FrameBuffer::new(LineFramer::new());
        for piece in [&b"a"[..], b"b\r\nc\r\n"] {
            let mut input = piece;
            while buffer.next_frame(&mut input).unwrap().is_some() {}
        }
        assert_eq!(buffer.kept.capacity(), 0);
        buffer.keep(&mut &b"x\r\ny\r\n"[..]);
        while buffer.next_frame(&mut &[][..]).unwrap().is_some() {}
        assert_eq!(buffer.kept.capacity(), 0);
    }

    #[test]
    fn bytes_wanted_never_pass_the_end_of_a_frame() {
        let mut buffer = FrameBuffer::new(LengthPrefixedFramer::u32());
        assert_eq!(buffer.bytes_wanted(), NonZeroUsize::new(4));
        buffer.keep(&mut &b"\0\0"[..]);
        assert_eq!(buffer.bytes_wanted(), NonZeroUsize::new(2));
        buffer.keep(&mut &b"\0\x05he"[..]);
        assert_eq!(buffer.bytes_wanted(), NonZeroUsize::new(3));
        buffer.keep(&mut &b"llo"[..]);
        assert_eq!(buffer.bytes_wanted(), None);
        assert_eq!(buffer.next_frame(&mut &[][..]), Ok(Some(&b"hello"[..])));
        assert_eq!(buffer.bytes_wanted(), NonZeroUsize::new(4));
    }

    #[test]
    fn rest_holds_each_byte_once_after_an_error() {
        let mut buffer = FrameBuffer::new(LineFramer::new().with_max_length(3));
        assert_eq!(buffer.next_frame(&mut &b"ab"[..]), Ok(None));
        let mut input = &b"cd\r\nef\r\n"[..];
        assert!(buffer.next_frame(&mut input).is_err());
        assert_eq!(buffer.take_rest(&mut input), b"abcd\r\nef\r\n");
        assert!(buffer.is_empty() && input.is_empty());
        assert_eq!(buffer.next_frame(&mut &b"x\r\n"[..]), Ok(Some(&b"x"[..])));
    }

    #[test]
    fn taking_the_rest_makes_the_framer_forget_it() {
        let mut buffer = FrameBuffer::new(LineFramer::new());
        assert_eq!(buffer.next_frame(&mut &b"a long beginning"[..]), Ok(None));
        assert_eq!(buffer.take_rest(&mut &b"!"[..]), b"a long beginning!");
        assert_eq!(buffer.next_frame(&mut &b"x\r\n"[..]), Ok(Some(&b"x"[..])));
    }

    #[test]
    fn another_framer_looks_anew_at_what_is_kept() {
        let mut buffer = FrameBuffer::new(LineFramer::new());
        assert_eq!(buffer.next_frame(&mut &b"a;b;c"[..]), Ok(None));
        buffer.framer_mut().set_delimiter(b";");
        let mut input = &b"d;e"[..];
        let mut frames = Vec::new();
        while let Some(frame) = buffer.next_frame(&mut input).unwrap() {
            frames.push(frame.to_vec());
        }
        assert_eq!(frames, [&b"a"[..], b"b", b"cd"]);
        assert_eq!(buffer.take_rest(&mut input), b"e");
    }

    #[test]
    #[should_panic(expected = "framer found a frame where none can be")]
    fn framer_that_finds_a_frame_of_no_bytes_is_caught() {
        struct Endless;
        impl Framer for Endless {
            fn decode(&mut self, _: &[u8]) -> Result<Decoded, FramingError> {
                Ok(Decoded::Frame {
                    payload: 0..0,
                    consumed: 0,
                })
            }
        }
        let _ = FrameBuffer::new(Endless).next_frame(&mut &b"x"[..]);
    }

    #[test]
    fn room_of_a_long_frame_is_not_held_for_a_short_one() {
        for (length, is_reused) in [(REUSED_ROOM, true), (REUSED_ROOM + 1, false)] {
            let mut buffer = FrameBuffer::new(LineFramer::new());
            let mut line = vec![b'a'; length - 2];
            line.extend_from_slice(b"\r\n");
            buffer.keep(&mut &line[..]);
            let before = buffer.kept.capacity();
            assert!(buffer.next_frame(&mut &[][..]).unwrap().is_some());
            buffer.keep(&mut &b"x"[..]);
            assert_eq!(buffer.kept.capacity() == before, is_reused, "{length}");
            assert_eq!(buffer.take_rest(&mut &[][..]), b"x");
        }
    }

    #[test]
    fn long_beginning_is_kept_while_more_arrives() {
        let mut buffer = FrameBuffer::new(LineFramer::new());
        buffer.keep(&mut &vec![b'a'; REUSED_ROOM + 1][..]);
        buffer.keep(&mut &b"b"[..]);
        assert_eq!(buffer.len(), REUSED_ROOM + 2);
    }

    #[test]
    fn framer_looks_anew_only_when_what_it_found_is_to_be_found_again() {
        #[derive(Default)]
        struct Counted(LineFramer, usize);
        impl Framer for Counted {
            fn decode(&mut self, input: &[u8]) -> Result<Decoded, FramingError> {
                self.0.decode(input)
            }
            fn reset(&mut self) {
                self.1 += 1;
                self.0.reset();
            }
        }
        let mut buffer = FrameBuffer::new(Counted::default());
        buffer.keep(&mut &b"begin"[..]);
        assert!(buffer.bytes_wanted().is_some());
        assert_eq!(buffer.framer().1, 0);
        buffer.keep(&mut &b"\r\n"[..]);
        assert!(buffer.bytes_wanted().is_none());
        assert_eq!(buffer.framer().1, 1);
    }

    #[test]
    fn boxed_framer_forgets_as_well() {
        let framer: Box<dyn Framer> = Box::new(LineFramer::new());
        let mut buffer = FrameBuffer::new(framer);
        assert_eq!(buffer.next_frame(&mut &b"a long beginning"[..]), Ok(None));
        buffer.take_rest(&mut &[][..]);
        assert_eq!(buffer.next_frame(&mut &b"x\r\n"[..]), Ok(Some(&b"x"[..])));
    }

    #[test]
    fn frame_is_encoded_in_the_room_it_takes() {
        use crate::framing::FrameEncoder;
        let mut out = Vec::new();
        LineFramer::new()
            .encode(&(), &[b'a'; 1000], 0, &mut out)
            .unwrap();
        assert_eq!((out.len(), out.capacity()), (1002, 1002));
    }

    #[test]
    fn debug_output_says_what_is_kept_and_what_surrounds() {
        use crate::framing::FrameEncoder;
        let mut buffer = FrameBuffer::new(LineFramer::new());
        buffer.keep(&mut &b"a\r\nbc"[..]);
        assert!(buffer.next_frame(&mut &[][..]).unwrap().is_some());
        assert!(format!("{buffer:?}").contains("bytes: 2"));
        let framer = LineFramer::new();
        let envelope = framer.envelope(&(), b"a", 0).unwrap();
        let text = format!("{envelope:?}");
        assert!(text.contains("head: ") && text.contains("tail: "), "{text}");
    }

    proptest! {
        /// Stops after any frame, keeps the rest, and goes on later.
        #[test]
        fn frames_survive_stops_between_them(
            payloads in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..600), 0..12),
            pieces in proptest::collection::vec((1usize..900, 0usize..4), 1..20),
        ) {
            use crate::framing::FrameEncoder;
            let framer = LengthPrefixedFramer::u16();
            let mut stream = Vec::new();
            for payload in &payloads {
                framer.encode(&(), payload, 0, &mut stream).unwrap();
            }
            let mut buffer = FrameBuffer::new(framer);
            let mut frames = Vec::new();
            let mut unread = &stream[..];
            for (length, at_most) in pieces.into_iter().chain([(usize::MAX, usize::MAX)]) {
                let (mut input, rest) = unread.split_at(length.min(unread.len()));
                unread = rest;
                let mut taken = 0;
                while taken < at_most && let Some(frame) = buffer.next_frame(&mut input).unwrap() {
                    frames.push(frame.to_vec());
                    taken += 1;
                }
                buffer.keep(&mut input);
            }
            prop_assert_eq!(frames, payloads);
            prop_assert!(buffer.is_empty());
        }
    }
}
