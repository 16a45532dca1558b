//! The framings of `bowline-peers`: what they find does not depend on how the bytes were
//! cut, what is read from a frame does not panic, and what is encoded is decoded.

#![no_main]

use bowline::framing::{Decoded, FrameBuffer, FrameEncoder, Framer, FramingError};
use bowline_peers::dbus::{DbusFramer, DbusMessage};
use bowline_peers::haproxy::{GetsocksFramer, GetsocksPart, ListenerName, SockpairFramer};
use bowline_peers::imsg::{Imsg, ImsgDialect, ImsgFramer, ImsgHeader};
use bowline_peers::node::NodeFramer;
use bowline_peers::varlink::{VarlinkCall, VarlinkFramer, VarlinkReply};
use bowline_peers::vhost_user::{VhostUserFramer, VhostUserHeader};
use bowline_peers::wayland::{WaylandFramer, WaylandHeader};

type Outcome = (Vec<(Vec<u8>, Option<usize>)>, Option<FramingError>);

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let [kind, limit, step, input @ ..] = data else {
        return;
    };
    let step = usize::from(*step).max(1);
    let limit = usize::from(*limit);
    let getsocks = |part| move || GetsocksFramer::new(part);
    match kind % 13 {
        0 => imsg(ImsgFramer::new(ImsgDialect::Legacy), limit, input, step),
        1 => imsg(ImsgFramer::new(ImsgDialect::Current), limit, input, step),
        2 => imsg(
            ImsgFramer::learning(ImsgDialect::Legacy),
            limit,
            input,
            step,
        ),
        3 => compare(getsocks(GetsocksPart::Request), input, step, |_| ()),
        4 => compare(getsocks(GetsocksPart::Count), input, step, |_| ()),
        5 => {
            compare(getsocks(GetsocksPart::Records), input, step, |frame| {
                encode_again(
                    GetsocksFramer::new(GetsocksPart::Records),
                    &ListenerName::of(frame),
                    b"",
                );
            });
        }
        6 => compare(|| SockpairFramer, input, step, |_| ()),
        7 => compare(DbusFramer::of_lines, input, step, |_| ()),
        8 => compare(
            || VarlinkFramer::new().with_max_length(limit),
            input,
            step,
            |frame| {
                encode_again(VarlinkFramer::new(), &(), frame);
                let _ = (
                    VarlinkCall::parse(frame).is_ok(),
                    VarlinkReply::parse(frame).is_ok(),
                );
            },
        ),
        9 => {
            let make = || DbusFramer::of_messages().with_max_length(4_096);
            compare(make, input, step, |frame| {
                let message = DbusMessage::parse(frame).expect("it was found to be one");
                assert!(message.body.len() < frame.len());
            });
        }
        10 => compare(
            || VhostUserFramer::new().with_max_payload(limit),
            input,
            step,
            |frame| {
                let (header, payload) = VhostUserHeader::of(frame);
                encode_again(VhostUserFramer::new(), &header, payload);
            },
        ),
        11 => compare(
            || WaylandFramer::new().with_max_length(4 * limit),
            input,
            step,
            |frame| {
                let (header, arguments) = WaylandHeader::of(frame);
                encode_again(WaylandFramer::new(), &header, arguments);
            },
        ),
        _ => compare(
            || NodeFramer::new().with_max_length(limit),
            input,
            step,
            |frame| {
                encode_again(NodeFramer::new(), &(), frame);
            },
        ),
    }
});

fn imsg(framer: ImsgFramer, limit: usize, input: &[u8], step: usize) {
    let make = || framer.clone().with_max_length(16 + limit);
    compare(make, input, step, |frame| {
        let Imsg { header, data } = Imsg::of(frame);
        encode_again::<_, ImsgHeader>(framer.clone(), &header, data);
    });
}

/// What was read is a frame again, and a whole one.
fn encode_again<F, H>(mut framer: F, header: &H, payload: &[u8])
where
    F: Framer + FrameEncoder<Header = H>,
{
    let mut frame = Vec::new();
    framer
        .encode(header, payload, 0, &mut frame)
        .expect("it was received");
    let length = frame.len();
    match framer.decode(&frame) {
        Ok(Decoded::Frame { consumed, .. }) => assert_eq!(consumed, length),
        other => panic!("{other:?} of {frame:?}"),
    }
}

fn compare<F: Framer>(make: impl Fn() -> F, input: &[u8], step: usize, look: impl Fn(&[u8])) {
    let whole = decode(make(), [input], &look);
    assert_eq!(
        decode(make(), input.chunks(step), &look),
        whole,
        "in pieces"
    );
    let bytes = decode(make(), input.chunks(1), &look);
    assert_eq!(bytes, whole, "byte for byte");
}

fn decode<'a, F: Framer>(
    framer: F,
    pieces: impl IntoIterator<Item = &'a [u8]>,
    look: &impl Fn(&[u8]),
) -> Outcome {
    let mut buffer = FrameBuffer::new(framer);
    let mut frames = Vec::new();
    for mut piece in pieces {
        loop {
            let found = match buffer.next_frame(&mut piece) {
                Ok(Some(frame)) => frame.to_vec(),
                Ok(None) => break,
                Err(error) => return (frames, Some(error)),
            };
            look(&found);
            let claims = buffer.framer().claims(&found);
            frames.push((found, claims));
        }
    }
    (frames, None)
}
