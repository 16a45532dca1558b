//! Ways to feed a framer.

use super::{Decoded, FrameBuffer, Framer, FramingError};

/// What came of some input: frames, bytes that are left, the end.
pub(super) type Outcome = (Vec<Vec<u8>>, Vec<u8>, Option<FramingError>);

/// Decodes `pieces` one after the other; after an error nothing is decoded.
pub(super) fn decode_all(framer: impl Framer, pieces: &[&[u8]]) -> Outcome {
    let mut buffer = FrameBuffer::new(framer);
    let mut frames = Vec::new();
    for (at, piece) in pieces.iter().enumerate() {
        let mut input = *piece;
        loop {
            match buffer.next_frame(&mut input) {
                Ok(Some(frame)) => frames.push(frame.to_vec()),
                Ok(None) => break,
                Err(error) => {
                    let mut rest = buffer.take_rest(&mut input);
                    rest.extend(pieces[at + 1..].concat());
                    return (frames, rest, Some(error));
                }
            }
        }
        assert!(input.is_empty(), "what makes no frame is kept");
    }
    (frames, buffer.take_rest(&mut &[][..]), None)
}

/// Cuts `input` at these places, in any order and beyond the end too.
pub(super) fn cut<'a>(input: &'a [u8], cuts: &[usize]) -> Vec<&'a [u8]> {
    let mut cuts = cuts.to_vec();
    cuts.sort_unstable();
    let mut pieces = Vec::new();
    let mut start = 0;
    for cut in cuts {
        let end = cut.clamp(start, input.len());
        pieces.push(&input[start..end]);
        start = end;
    }
    pieces.push(&input[start..]);
    pieces
}

/// Decodes `input` whole, in two pieces cut at every byte, byte by byte, and
/// read by read of no more than the framer asks for; all must agree, and in the
/// last case no read may pass the end of a frame.
#[track_caller]
pub(super) fn decode_cut<F: Framer>(make: impl Fn() -> F, input: &[u8]) {
    let whole = decode_all(make(), &[input]);
    for at in 0..=input.len() {
        let (first, second) = input.split_at(at);
        assert_eq!(decode_all(make(), &[first, second]), whole, "cut at {at}");
    }
    let bytes = input.chunks(1).collect::<Vec<_>>();
    assert_eq!(decode_all(make(), &bytes), whole, "byte by byte");

    let (mut start, mut end) = (0, 0);
    let mut framer = make();
    let mut frames = Vec::new();
    let error = loop {
        match framer.decode(&input[start..end]) {
            Ok(Decoded::Frame { payload, consumed }) => {
                assert_eq!(start + consumed, end, "a read passed the end of a frame");
                frames.push(input[start..][payload].to_vec());
                start = end;
            }
            Ok(Decoded::NeedMore { at_least }) if end < input.len() => {
                assert!(at_least > 0);
                end = input.len().min(end.saturating_add(at_least));
            }
            Ok(Decoded::NeedMore { .. }) => break None,
            Err(error) => break Some(error),
        }
    };
    assert_eq!(
        (frames, input[start..].to_vec(), error),
        whole,
        "exact reads"
    );
}
