//! Framers: what they find does not depend on how the bytes were cut, and a read
//! of no more than they ask for never passes the end of a frame.

#![no_main]

use bowline::framing::{
    Decoded, FrameBuffer, Framer, FramingError, LengthPrefixedFramer, LineFramer, NetstringFramer,
};
use bowline::handoff::wire::WireFramer;

type Outcome = (Vec<Vec<u8>>, Option<FramingError>);

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let [kind, limit, step, input @ ..] = data else {
        return;
    };
    let max = usize::from(*limit);
    let step = usize::from(*step).max(1);
    match kind % 6 {
        0 => compare(|| LineFramer::new().with_max_length(max), input, step),
        1 => compare(|| NetstringFramer::new().with_max_length(max), input, step),
        2 => compare(
            || LengthPrefixedFramer::u8().with_max_length(max),
            input,
            step,
        ),
        3 => compare(
            || LengthPrefixedFramer::u16().with_max_length(max),
            input,
            step,
        ),
        4 => compare(|| WireFramer::new(max), input, step),
        _ => compare(
            || LengthPrefixedFramer::u32().with_max_length(max),
            input,
            step,
        ),
    }
});

fn compare<F: Framer>(make: impl Fn() -> F, input: &[u8], step: usize) {
    let whole = decode(make(), [input]);
    assert_eq!(decode(make(), input.chunks(step)), whole, "in pieces");
    assert_eq!(
        decode_exactly(make(), input),
        whole,
        "as much as is asked for"
    );
}

fn decode<'a, F: Framer>(framer: F, pieces: impl IntoIterator<Item = &'a [u8]>) -> Outcome {
    let mut buffer = FrameBuffer::new(framer);
    let mut frames = Vec::new();
    for mut piece in pieces {
        loop {
            match buffer.next_frame(&mut piece) {
                Ok(Some(frame)) => frames.push(frame.to_vec()),
                Ok(None) => break,
                Err(error) => return (frames, Some(error)),
            }
        }
    }
    (frames, None)
}

fn decode_exactly<F: Framer>(mut framer: F, input: &[u8]) -> Outcome {
    let (mut start, mut end) = (0, 0);
    let mut frames = Vec::new();
    loop {
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
            Ok(Decoded::NeedMore { .. }) => return (frames, None),
            Err(error) => return (frames, Some(error)),
        }
    }
}
