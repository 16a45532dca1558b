//! Twisted's framings against ours, and what passes their limits.

use std::cell::RefCell;
use std::rc::Rc;

use bowline::framing::{
    FrameContext, FrameEncoder, FrameReceiver, Framed, Framer, LengthPrefixedFramer, LineFramer,
    NetstringFramer,
};
use bowline::{CloseReason, UnixTransport};

use crate::Scenario;
use crate::pair::{Direction, Link, Pair, adler32, both_directions, counted};
use crate::peer::Peers;
use crate::support::{Event, Record};

pub(crate) fn scenarios() -> Vec<Scenario> {
    [
        both_directions("lines", |peers, direction| {
            frames(
                peers,
                direction,
                "line",
                LineFramer::new,
                &[0, 1, 100, 16_384],
            );
        }),
        both_directions("netstrings", |peers, direction| {
            let lengths = [0, 1, 9, 10, 99, 100, 99_999];
            frames(
                peers,
                direction,
                "netstring",
                NetstringFramer::new,
                &lengths,
            );
        }),
        both_directions("prefix_of_8_bits", |peers, direction| {
            frames(
                peers,
                direction,
                "int8",
                LengthPrefixedFramer::u8,
                &[0, 1, 255],
            );
        }),
        both_directions("prefix_of_16_bits", |peers, direction| {
            let lengths = [0, 1, 256, 65_535];
            frames(
                peers,
                direction,
                "int16",
                LengthPrefixedFramer::u16,
                &lengths,
            );
        }),
        both_directions("prefix_of_32_bits", |peers, direction| {
            let lengths = [0, 1, 65_536, 99_999];
            frames(
                peers,
                direction,
                "int32",
                LengthPrefixedFramer::u32,
                &lengths,
            );
        }),
        both_directions("line_over_the_limit", |peers, direction| {
            over_the_limit(peers, direction, "line", LineFramer::new, 16_385);
        }),
        both_directions("netstring_over_the_limit", |peers, direction| {
            over_the_limit(peers, direction, "netstring", NetstringFramer::new, 100_000);
        }),
        both_directions("prefix_over_the_limit", |peers, direction| {
            over_the_limit(
                peers,
                direction,
                "int32",
                LengthPrefixedFramer::u32,
                100_000,
            );
        }),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// Keeps the frames it is given.
struct Frames {
    received: Rc<RefCell<Vec<Vec<u8>>>>,
    record: Record,
    link: Link,
}

impl<T: UnixTransport, F: 'static> FrameReceiver<T, F> for Frames {
    fn connection_made(&mut self, cx: &mut FrameContext<'_, T, F>) {
        self.link.set(Some(cx.transport.unix_handle()));
    }

    fn frame_received(&mut self, _: &mut FrameContext<'_, T, F>, frame: &[u8]) {
        self.received.borrow_mut().push(frame.to_vec());
    }

    fn connection_lost(&mut self, _: &mut FrameContext<'_, T, F>, reason: &CloseReason) {
        self.record.push(Event::Lost(reason.to_string()));
    }
}

/// What both sides send as a frame of this length; a line must not hold its own
/// end.
fn payload(protocol: &str, length: usize) -> Vec<u8> {
    if protocol == "line" {
        (b'a'..=b'z').cycle().take(length).collect()
    } else {
        counted(0..length)
    }
}

fn connect<F: Framer>(
    peers: &Peers,
    direction: Direction,
    protocol: &str,
    framer: fn() -> F,
) -> (Pair, Rc<RefCell<Vec<Vec<u8>>>>) {
    let received = Rc::default();
    let pair = Pair::with_protocol(peers, direction, protocol, {
        let received = Rc::clone(&received);
        move |record, link| {
            let frames = Frames {
                received: Rc::clone(&received),
                record: record.clone(),
                link: Rc::clone(link),
            };
            Framed::new(framer(), frames)
        }
    });
    (pair, received)
}

/// Frames of these lengths, glued as they come, both ways.
fn frames<F: Framer + FrameEncoder<Header = ()>>(
    peers: &Peers,
    direction: Direction,
    protocol: &str,
    framer: fn() -> F,
    lengths: &[usize],
) {
    let (mut pair, received) = connect(peers, direction, protocol, framer);
    let payloads: Vec<_> = lengths
        .iter()
        .map(|&length| payload(protocol, length))
        .collect();
    for payload in &payloads {
        framer()
            .send_to(pair.transport(), &(), payload)
            .expect("it fits the format");
    }
    let commands: Vec<_> = lengths
        .iter()
        .map(|length| format!("string={length}"))
        .collect();
    pair.tell(&commands.join(" "));
    pair.wait("all frames are at both ends", |pair| {
        pair.peer.told("string").len() == lengths.len() && received.borrow().len() == lengths.len()
    });
    let expected: Vec<_> = payloads
        .iter()
        .map(|payload| format!("{} {} 0", payload.len(), adler32(payload)))
        .collect();
    assert_eq!(pair.peer.told("string"), expected);
    assert!(
        *received.borrow() == payloads,
        "other frames than were sent"
    );
}

/// Each side ends the connection on a frame that is one byte too long, having
/// delivered the one before it and none behind it.
fn over_the_limit<F: Framer + FrameEncoder<Header = ()>>(
    peers: &Peers,
    direction: Direction,
    protocol: &str,
    framer: fn() -> F,
    too_long: usize,
) {
    let lengths = [3, too_long, 4];
    let (mut pair, _) = connect(peers, direction, protocol, framer);
    for length in lengths {
        framer()
            .send_to(pair.transport(), &(), &payload(protocol, length))
            .expect("it fits the format");
    }
    pair.wait_for_peers_loss();
    pair.wait_for_our_loss();
    let first = payload(protocol, 3);
    assert_eq!(
        pair.peer.told("string"),
        [format!("3 {} 0", adler32(&first))]
    );

    let (mut pair, received) = connect(peers, direction, protocol, framer);
    pair.tell(&format!("string=3 string={too_long} string=4"));
    pair.wait_for_our_loss();
    pair.wait_for_peers_loss();
    assert_eq!(*received.borrow(), [first]);
}
