//! `Framed` over a transport that is only a script.

use std::cell::RefCell;
use std::fs::File;
use std::io::{self, PipeReader};
use std::rc::Rc;
use std::time::Duration;

use bowline_reactor::{Handle, Reactor, Token};
use proptest::prelude::*;

mod pairing;

use super::*;
use crate::address::{Address, UnixAddress};
use crate::connection::{AnyConnection, ConnectionHandle};
use crate::descriptors::{PassedDescriptor, ReceivedDescriptors};
use crate::error::{RegisterProducerError, SendDescriptorError, SendDescriptorErrorKind};
use crate::framing::{
    EncodeError, FrameEncoder, LengthPrefixedFramer, LineFramer, NetstringFramer,
    SendFrameErrorKind,
};
use crate::producer::{ProducerKind, ProducerRef};
use crate::transport::{
    Credentials, DescriptorLimits, Linger, TransportHandle, TransportState, UnixTransport,
    UnixTransportHandle, Watermarks, WriteStatus,
};

// Lines and the like.

#[test]
fn frames_reach_the_receiver_however_they_are_cut() {
    let input = b"one\r\ntwo\r\n\r\nthree\r\nrest";
    for at in 0..=input.len() {
        let mut peer = Peer::new(Framed::new(LineFramer::new(), Recorder::default()));
        peer.receive(&input[..at]);
        peer.receive(&input[at..]);
        assert_eq!(peer.events(), ["one", "two", "", "three"], "cut at {at}");
    }
}

/// Contract H-05.
#[test]
fn pause_holds_back_the_rest_and_resume_delivers_it() {
    let mut peer = Peer::new(Framed::new(LineFramer::new(), Recorder::default()));
    peer.receive(b"a\r\npause\r\nb\r\npause\r\nc\r\nd");
    assert_eq!(peer.events(), ["a", "pause"]);
    peer.resume();
    assert_eq!(peer.events(), ["resumed", "b", "pause"]);
    peer.resume();
    peer.receive(b"e\r\n");
    assert_eq!(peer.events(), ["resumed", "c", "de"]);
}

#[test]
fn many_pauses_do_not_move_the_rest_each_time() {
    // 65,536 pauses that copied the rest would move 4 GiB.
    let mut peer = Peer::new(Framed::new(
        LineFramer::with_delimiter(b"\n"),
        Recorder::scripted(|cx, event| {
            if event.is_empty() {
                cx.transport.pause_producing();
            }
        }),
    ));
    peer.receive(&[b'\n'; 65_536]);
    while !peer.protocol.buffer.is_empty() {
        peer.resume();
    }
    let delivered = peer
        .events()
        .iter()
        .filter(|event| event.is_empty())
        .count();
    assert_eq!(delivered, 65_536);
}

#[test]
fn rest_kept_while_paused_is_what_was_received_and_is_freed_afterwards() {
    let mut peer = Peer::new(Framed::new(LineFramer::new(), Recorder::default()));
    peer.receive(b"pause\r\nb\r\nc\r\n");
    assert_eq!(peer.protocol.buffer.kept, b"b\r\nc\r\n");
    peer.resume();
    assert_eq!(peer.protocol.buffer.kept.capacity(), 0);
    peer.receive(b"pau");
    peer.receive(b"se\r\n");
    assert_eq!(peer.protocol.buffer.kept.capacity(), 0);
}

/// Contract H-15, W-67.
#[test]
fn pause_and_resume_inside_a_callback_deliver_nothing_twice() {
    let mut peer = Peer::new(Framed::new(
        LengthPrefixedFramer::u8(),
        Recorder::scripted(|cx, _| {
            cx.transport.pause_producing();
            cx.transport.resume_producing();
        }),
    ));
    peer.receive(b"\x01a\x01b\x01c\x01");
    peer.resume();
    peer.receive(b"d");
    assert_eq!(peer.events(), ["a", "b", "c", "resumed", "d"]);
}

#[test]
fn pause_when_reading_is_resumed_holds_everything_back_again() {
    let mut peer = Peer::new(Framed::new(
        LineFramer::new(),
        Recorder::scripted(|cx, event| {
            if event == "pause" || event == "resumed" {
                cx.transport.pause_producing();
            }
        }),
    ));
    peer.receive(b"pause\r\nb\r\n");
    peer.resume();
    assert_eq!(peer.events(), ["pause", "resumed"]);
}

/// Contract H-06, W-67.
#[test]
fn nothing_is_delivered_once_the_connection_closes() {
    fn check<F: Framer + FrameEncoder<Header = ()> + Clone>(framer: F) {
        let mut stream = Vec::new();
        for payload in [&b"a"[..], b"close", b"b"] {
            framer.encode(&(), payload, 0, &mut stream).unwrap();
        }
        for word in ["close", "abort"] {
            let mut peer = Peer::new(Framed::new(
                framer.clone(),
                Recorder::scripted(move |cx, event| match (event, word) {
                    ("close", "close") => cx.transport.lose_connection(),
                    ("close", _) => cx.transport.abort_connection(),
                    _ => {}
                }),
            ));
            peer.receive(&stream);
            assert_eq!(peer.events(), ["a", "close"]);
            assert_eq!(peer.protocol.buffer.kept.capacity(), 0);
        }
    }
    check(LineFramer::new());
    check(NetstringFramer::new());
    check(LengthPrefixedFramer::u8());
    check(LengthPrefixedFramer::u16());
    check(LengthPrefixedFramer::u32());
}

#[test]
fn connection_closed_while_paused_delivers_nothing_when_resumed() {
    let mut peer = Peer::new(Framed::new(LineFramer::new(), Recorder::default()));
    peer.receive(b"pause\r\nb\r\n");
    peer.transport.lose_connection();
    peer.resume();
    assert_eq!(peer.events(), ["pause", "resumed"]);
}

/// Contract H-04.
#[test]
fn raw_mode_takes_the_rest_of_the_chunk_and_what_follows() {
    let mut peer = Peer::new(Framed::new(LineFramer::new(), Recorder::default()));
    peer.receive(b"a\r\nraw\r\nb\r\n");
    peer.receive(b"c\r\n");
    assert_eq!(peer.events(), ["a", "raw", "raw:b\r\n", "raw:c\r\n"]);
}

#[test]
fn raw_mode_for_a_count_ends_by_itself_however_it_is_cut() {
    let input = b"raw 5\r\n1\r\n45six\r\nraw 0\r\nraw 2\r\nxyseven\r\n";
    for at in 0..=input.len() {
        let mut peer = Peer::new(Framed::new(LineFramer::new(), Recorder::default()));
        peer.receive(&input[..at]);
        peer.receive(&input[at..]);
        let events = peer.events();
        let raw = events
            .iter()
            .filter_map(|event| event.strip_prefix("raw:"))
            .collect::<String>();
        assert_eq!(raw, "1\r\n45xy", "cut at {at}");
        let lines = events.iter().filter(|event| !event.starts_with("raw:"));
        assert!(
            lines.eq(["raw 5", "six", "raw 0", "raw 2", "seven"]),
            "cut at {at}"
        );
    }
}

/// Contract H-04.
#[test]
fn modes_switch_any_number_of_times_within_one_chunk() {
    // Raw data ends with a semicolon, wherever that is.
    let mut peer = Peer::new(Framed::new(
        LineFramer::new(),
        Recorder::scripted(|cx, event| {
            if event == "raw" {
                cx.framing.set_raw_mode();
            } else if let Some(data) = event.strip_prefix("raw:")
                && let Some(end) = data.find(';')
            {
                cx.framing.set_frame_mode(end + 1);
            }
        }),
    ));
    let rounds = 2_000;
    let chunk = b"raw\r\n\r\nx;line\r\n".repeat(rounds);
    peer.receive(&chunk);
    let events = peer.events();
    assert_eq!(
        events.iter().filter(|event| *event == "line").count(),
        rounds
    );
    assert_eq!(events.len(), 3 * rounds);
}

#[test]
fn mode_switches_survive_a_pause() {
    let mut peer = Peer::new(Framed::new(LineFramer::new(), Recorder::default()));
    peer.receive(b"pause\r\nraw 3\r\nabcpause\r\nx\r\nraw\r\n");
    peer.resume();
    peer.resume();
    peer.receive(b"y\r\n");
    assert_eq!(
        peer.events(),
        [
            "pause",
            "resumed",
            "raw 3",
            "raw:abc",
            "pause",
            "resumed",
            "x",
            "raw",
            "raw:y\r\n"
        ]
    );
}

/// Contract H-05.
#[test]
fn raw_data_is_held_back_while_paused() {
    let mut peer = Peer::new(Framed::new(
        LineFramer::new(),
        Recorder::scripted(|cx, event| {
            if event == "raw" {
                cx.framing.set_raw_mode();
                cx.transport.pause_producing();
            }
        }),
    ));
    peer.receive(b"raw\r\nabc");
    assert_eq!(peer.events(), ["raw"]);
    peer.resume();
    assert_eq!(peer.events(), ["resumed", "raw:abc"]);
}

/// Contract H-07.
#[test]
fn rest_can_be_taken_inside_a_callback() {
    let taken = Rc::new(RefCell::new(Vec::new()));
    let sink = Rc::clone(&taken);
    let mut peer = Peer::new(Framed::new(
        LineFramer::new(),
        Recorder::scripted(move |cx, event| {
            if event == "clear" {
                assert_eq!(cx.framing.rest_len(), 5);
                sink.borrow_mut().extend(cx.framing.take_rest());
                assert_eq!(cx.framing.take_rest(), b"");
            }
        }),
    ));
    peer.receive(b"a\r\nclear\r\nb\r\nc\n");
    peer.receive(b"d\r\n");
    assert_eq!(*taken.borrow(), b"b\r\nc\n");
    assert_eq!(peer.events(), ["a", "clear", "d"]);
}

#[test]
fn rest_of_a_frame_that_came_in_pieces_can_be_taken() {
    let taken = Rc::new(RefCell::new(Vec::new()));
    let sink = Rc::clone(&taken);
    let mut peer = Peer::new(Framed::new(
        LineFramer::new(),
        Recorder::scripted(move |cx, _| sink.borrow_mut().extend(cx.framing.take_rest())),
    ));
    peer.receive(b"cle");
    peer.receive(b"ar\r\nb\r\nc");
    assert_eq!(*taken.borrow(), b"b\r\nc");
    assert_eq!(peer.events(), ["clear"]);
    assert!(peer.protocol.buffer.is_empty());
}

/// Contract H-14.
#[test]
fn another_protocol_takes_over_in_the_middle_of_a_chunk() {
    struct Upgrade(Option<Framed<NetstringFramer, Recorder<NetstringFramer>>>);
    impl FrameReceiver<Script, LineFramer> for Upgrade {
        fn frame_received(&mut self, cx: &mut FrameContext<'_, Script, LineFramer>, _: &[u8]) {
            cx.framing.set_raw_mode();
            self.0 = Some(Framed::new(NetstringFramer::new(), Recorder::default()));
        }
        fn raw_data_received(
            &mut self,
            cx: &mut FrameContext<'_, Script, LineFramer>,
            data: &[u8],
        ) {
            let inner = self.0.as_mut().unwrap();
            inner.data_received(&mut cx.as_context(), data);
        }
    }
    let input = b"upgrade\r\n1:a,2:bc,";
    for at in 0..=input.len() {
        let mut peer = Peer::new(Framed::new(LineFramer::new(), Upgrade(None)));
        peer.receive(&input[..at]);
        peer.receive(&input[at..]);
        let inner = peer.protocol.receiver().0.as_ref().unwrap();
        assert_eq!(inner.receiver.events, ["a", "bc"], "cut at {at}");
    }
}

#[test]
fn framer_is_adjusted_and_replaced_inside_a_callback() {
    type Any = Box<dyn Framer>;
    struct Chameleon(Vec<Vec<u8>>);
    impl FrameReceiver<Script, Any> for Chameleon {
        fn frame_received(&mut self, cx: &mut FrameContext<'_, Script, Any>, frame: &[u8]) {
            self.0.push(frame.to_vec());
            match frame {
                b"netstrings" => *cx.framing.framer_mut() = Box::new(NetstringFramer::new()),
                b"bytes" => *cx.framing.framer_mut() = Box::new(LengthPrefixedFramer::u8()),
                b"lines" => *cx.framing.framer_mut() = Box::new(LineFramer::new()),
                _ => {}
            }
        }
    }
    let input = b"netstrings\r\n3:a\r\n,5:bytes,\x01x\x05linesend\r\n";
    for at in 0..=input.len() {
        let framer: Any = Box::<LineFramer>::default();
        let mut peer = Peer::new(Framed::new(framer, Chameleon(Vec::new())));
        peer.receive(&input[..at]);
        peer.receive(&input[at..]);
        let frames: [&[u8]; 6] = [b"netstrings", b"a\r\n", b"bytes", b"x", b"lines", b"end"];
        assert_eq!(peer.protocol.receiver().0, frames, "cut at {at}");
    }

    let mut peer = Peer::new(Framed::new(
        LineFramer::new(),
        Recorder::<LineFramer>::scripted(|cx, event| {
            if event == "short" {
                cx.framing.framer_mut().set_max_length(3);
            }
        }),
    ));
    peer.receive(b"long enough\r\nshort\r\nabc\r\nabcd\r\n");
    assert_eq!(
        peer.events(),
        [
            "long enough",
            "short",
            "abc",
            "failed:peer sent a frame of more than 3 bytes:abcd\r\n"
        ]
    );
}

#[test]
fn changes_made_outside_of_a_frame_apply_to_what_is_kept() {
    let mut peer = Peer::new(Framed::new(
        LineFramer::new(),
        Recorder::<LineFramer>::scripted(|cx, event| {
            if event == "producer resumed" {
                cx.framing.framer_mut().set_delimiter(b";");
            }
        }),
    ));
    peer.receive(b"a;b;c");
    peer.with(|protocol, cx| protocol.resume_producing(cx));
    assert_eq!(peer.events(), ["producer resumed", "a", "b"]);
    peer.receive(b";");
    assert_eq!(peer.events(), ["c"]);
}

/// Contract H-10.
#[test]
fn broken_framing_is_told_once_with_everything_received_and_closes() {
    let input = b"1:a,3:abcd,1:b,";
    for at in 0..=input.len() {
        let mut peer = Peer::new(Framed::new(NetstringFramer::new(), Recorder::default()));
        peer.receive(&input[..at]);
        peer.receive(&input[at..]);
        let events = peer.events();
        assert_eq!(events.len(), 2, "cut at {at}");
        assert!(
            events[1].starts_with("failed:peer sent a netstring without its closing comma:3:abcd")
        );
        assert_eq!(peer.transport.state, TransportState::Closing);
        assert_eq!(peer.protocol.buffer.kept.capacity(), 0);
    }
}

/// Contract H-12.
#[test]
fn frame_over_the_limit_is_not_delivered_although_it_is_there() {
    let mut peer = Peer::new(Framed::new(
        LengthPrefixedFramer::u8().with_max_length(3),
        Recorder::default(),
    ));
    peer.receive(b"\x03abc\x04abcd\x01x");
    assert_eq!(
        peer.events(),
        [
            "abc",
            "failed:peer sent a frame of 4 bytes, 3 are allowed:\x04abcd\x01x"
        ]
    );
}

#[test]
fn receiver_that_neither_closes_nor_goes_on_gets_nothing_more() {
    let mut peer = Peer::new(Framed::new(
        LineFramer::new().with_max_length(3),
        Recorder::tolerant(|_, _| {}),
    ));
    peer.receive(b"abcdef\r\nx\r\n");
    peer.receive(b"y\r\n");
    assert_eq!(peer.events().len(), 1);
    assert!(peer.protocol.buffer.is_empty());
}

#[test]
fn receiver_can_go_on_behind_what_is_broken() {
    let mut peer = Peer::new(Framed::new(
        LineFramer::new().with_max_length(3),
        Recorder::tolerant(|cx, event| {
            if let Some(rest) = event.strip_prefix("failed:peer sent a frame of more than 3 bytes:")
            {
                cx.framing
                    .set_frame_mode(rest.find("\r\n").map_or(usize::MAX, |end| end + 2));
            }
        }),
    ));
    peer.receive(b"ab");
    peer.receive(b"cdef\r\nx\r\n");
    peer.receive(b"y\r\n");
    assert_eq!(peer.events()[1..], ["x", "y"]);
}

#[test]
fn receiver_that_skips_nothing_of_what_is_broken_does_not_loop() {
    let mut peer = Peer::new(Framed::new(
        NetstringFramer::new(),
        Recorder::tolerant(|cx, event| {
            if event.starts_with("failed:") {
                cx.framing.set_frame_mode(0);
            }
        }),
    ));
    peer.receive(b"xx1:a,");
    assert_eq!(peer.events().last().unwrap(), "a");
}

#[test]
fn unfinished_frame_can_be_taken_when_the_peer_has_closed() {
    let taken = Rc::new(RefCell::new(Vec::new()));
    let sink = Rc::clone(&taken);
    let mut peer = Peer::new(Framed::new(
        LineFramer::new(),
        Recorder::scripted(move |cx, event| {
            if event == "read lost" {
                sink.borrow_mut().extend(cx.framing.take_rest());
            }
        }),
    ));
    peer.receive(b"a\r\nlast words");
    peer.transport.read_closed = true;
    peer.with(|protocol, cx| {
        assert_eq!(
            protocol.read_connection_lost(cx),
            AfterReadClosed::KeepWriting
        );
    });
    assert_eq!(*taken.borrow(), b"last words");
}

/// Contract S-33.
#[test]
fn every_callback_is_forwarded() {
    let mut peer = Peer::new(Framed::new(LineFramer::new(), Recorder::default()));
    peer.with(|protocol, cx| {
        protocol.connection_made(cx);
        protocol.descriptors_sent(cx, 3);
        assert_eq!(
            protocol.descriptors_truncated(cx, 2),
            AfterTruncation::KeepConnection
        );
        protocol.pause_producing(cx);
        protocol.resume_producing(cx);
        protocol.stop_producing(cx);
        protocol.reading_resumed(cx);
        protocol.connection_reattached(cx);
        protocol.connection_secured(cx);
        protocol.read_connection_lost(cx);
        protocol.write_connection_lost(cx);
        protocol.connection_lost(cx, &CloseReason::Done);
    });
    assert_eq!(
        peer.events(),
        [
            "made",
            "sent 3",
            "truncated 2",
            "producer paused",
            "producer resumed",
            "producer stopped",
            "resumed",
            "reattached",
            "secured",
            "read lost",
            "write lost",
            "lost: closed cleanly",
        ]
    );
    assert_eq!(Protocol::<Script>::log_prefix(&peer.protocol), "Recorder");
}

// Sending.

#[test]
fn frame_is_sent_as_one_write() {
    let mut peer = Peer::new(Framed::new(
        LineFramer::new(),
        Recorder::scripted(|cx, event| {
            if event == "ask" {
                assert_eq!(cx.send_frame(b"answer"), Ok(WriteStatus::Ready));
                assert_eq!(
                    cx.send_frame(b"a\r\nb"),
                    Err(EncodeError::ContainsDelimiter)
                );
            }
        }),
    ));
    peer.receive(b"ask\r\n");
    assert_eq!(peer.transport.written, [b"answer\r\n"]);
}

/// Contract H-13.
#[test]
fn frame_that_does_not_fit_its_prefix_is_not_sent() {
    let mut peer = Peer::new(Framed::new(
        LengthPrefixedFramer::u8(),
        Recorder::scripted(|cx, _| {
            assert!(cx.send_frame(&[0; 256]).is_err());
            let passed = vec![File::open("/dev/null").unwrap().into()];
            let error = cx
                .send_frame_with_descriptors(&[0; 256], passed)
                .unwrap_err();
            assert!(matches!(error.kind, SendFrameErrorKind::Encode(_)));
            assert_eq!(error.descriptors.len(), 1);
            let error = cx
                .send_frame_with_descriptors(b"refused", error.descriptors)
                .unwrap_err();
            assert_eq!(
                error.kind,
                SendFrameErrorKind::Transport(SendDescriptorErrorKind::QueueFull)
            );
            cx.transport.takes_descriptors = true;
            cx.send_frame_with_descriptors(b"taken", error.descriptors)
                .unwrap();
        }),
    ));
    peer.receive(b"\x01x");
    assert_eq!(peer.transport.written, [b"\x05taken"]);
    assert_eq!(peer.transport.passed, 1);
}

// Descriptors.

fn exact<F: Framer, R>(framer: F, receiver: R) -> Framed<F, R> {
    Framed::new(framer, receiver).pairing(Pairing::Exact)
}

#[test]
fn loose_descriptors_come_before_the_frames_of_their_read() {
    let mut peer = Peer::new(Framed::new(LineFramer::new(), Recorder::default()));
    peer.receive_with(b"a\r\nb\r\n", 2);
    assert_eq!(peer.events(), ["fd", "fd", "a", "b"]);
    assert_eq!(peer.transport.unclaimed, 0);
    assert_eq!(peer.transport.read_limit, None);
}

#[test]
fn loose_descriptors_are_not_delivered_once_the_connection_closes() {
    let mut peer = Peer::new(Framed::new(
        LineFramer::new(),
        Recorder::scripted(|cx, event| {
            if event == "fd" {
                cx.transport.abort_connection();
            }
        }),
    ));
    peer.receive_with(b"a\r\n", 2);
    assert_eq!(peer.events(), ["fd"]);
}

#[test]
fn each_frame_has_exactly_its_descriptors() {
    let framer = LengthPrefixedFramer::u16();
    let mut peer = Peer::new(exact(framer.clone(), Recorder::default()));
    let mut wire = Wire::default();
    for (payload, count) in [("one", 1), ("", 2), ("none", 0), ("many", 16), ("last", 0)] {
        wire.send(&framer, payload.as_bytes(), count);
    }
    peer.made();
    peer.read_all(&mut wire);
    assert_eq!(
        peer.events(),
        ["made", "one+1", "+2", "none", "many+16", "last"]
    );
    assert_eq!(peer.transport.unclaimed, 0);
}

#[test]
fn lines_have_exactly_their_descriptors_too() {
    let mut peer = Peer::new(exact(LineFramer::new(), Recorder::default()));
    let mut wire = Wire::default();
    for (payload, count) in [("a", 1), ("", 1), ("b\r", 0), ("\n", 3)] {
        wire.send(&LineFramer::new(), payload.as_bytes(), count);
    }
    peer.made();
    peer.read_all(&mut wire);
    assert_eq!(peer.events(), ["made", "a+1", "+1", "b\r", "\n+3"]);
}

#[test]
fn read_limit_follows_the_frame() {
    let mut peer = Peer::new(exact(LengthPrefixedFramer::u32(), Recorder::default()));
    peer.made();
    let limit = |peer: &Peer<_>| peer.transport.read_limit.map(NonZeroUsize::get);
    assert_eq!(limit(&peer), Some(4));
    peer.receive(b"\0");
    assert_eq!(limit(&peer), Some(3));
    peer.receive(b"\0\0\x05");
    assert_eq!(limit(&peer), Some(5));
    peer.receive(b"raw");
    assert_eq!(limit(&peer), Some(2));
    peer.receive(b" 9");
    assert_eq!(limit(&peer), Some(9), "raw data");
    peer.receive(b"1234567");
    assert_eq!(limit(&peer), Some(2));
    peer.receive(b"89");
    assert_eq!(limit(&peer), Some(4));
    peer.receive(b"\0\0\0\x03raw");
    assert_eq!(limit(&peer), None, "raw data without end");
    peer.receive(b"and more of it");
    assert_eq!(limit(&peer), None, "raw data without end");
}

#[test]
fn descriptors_that_the_receiver_leaves_are_closed_as_unclaimed() {
    struct Picky(PipeEnds);
    impl FrameReceiver<Script, LengthPrefixedFramer> for Picky {
        fn frame_received(
            &mut self,
            cx: &mut FrameContext<'_, Script, LengthPrefixedFramer>,
            _: &[u8],
        ) {
            self.0.extend(cx.framing.descriptors().next());
        }
    }
    let framer = LengthPrefixedFramer::u8();
    let mut peer = Peer::new(exact(framer, Picky(Vec::new())));
    peer.receive_with(b"\x01x", 3);
    assert_eq!(peer.transport.unclaimed, 2);
    assert_eq!(peer.protocol.receiver().0.len(), 1);
}

/// Has nothing but what it must have.
struct Least(Vec<String>);

impl<F: Framer> FrameReceiver<Script, F> for Least {
    fn frame_received(&mut self, _: &mut FrameContext<'_, Script, F>, frame: &[u8]) {
        self.0.push(text(frame));
    }
}

#[test]
fn receiver_that_knows_nothing_of_descriptors_gets_its_frames() {
    let framer = LengthPrefixedFramer::u8();
    let mut peer = Peer::new(exact(framer, Least(Vec::new())));
    peer.receive_with(b"\x01x", 2);
    assert_eq!(peer.transport.unclaimed, 2);
    assert_eq!(peer.protocol.receiver().0, ["x"]);

    let (_reader, writer) = io::pipe().unwrap();
    let framer = LengthPrefixedFramer::u8();
    let mut peer = Peer::new(Framed::new(framer, Least(Vec::new())));
    let answer = peer.with(|protocol, cx| protocol.file_descriptor_received(cx, writer.into()));
    assert!(answer.is_err(), "given back");
    peer.receive(b"\x01y");
    assert_eq!(peer.protocol.receiver().0, ["y"]);
}

#[test]
fn callback_knows_its_mode_its_transport_by_handle_and_how_to_print_both() {
    let framer = LengthPrefixedFramer::u8();
    let hook = |cx: &mut FrameContext<'_, Script, _>, event: &str| {
        let own = cx.transport.handle();
        assert!(cx.get(own).is_some(), "{event}");
        assert!(!cx.framing.is_raw_mode(), "{event}");
        if event == "made" {
            cx.framing.set_raw_mode_for(2);
            assert!(cx.framing.is_raw_mode());
        }
        let printed = format!("{cx:?}");
        assert!(printed.starts_with("FrameContext { transport: "));
        assert!(printed.contains("framing: Framing { framer: LengthPrefixedFramer"));
        let rest = if event == "raw:xy" {
            "rest: 3"
        } else {
            "rest: 0"
        };
        assert!(printed.contains(rest), "{printed}");
    };
    let mut peer = Peer::new(Framed::new(framer, Recorder::scripted(hook)));
    peer.made();
    peer.receive(b"xy\x02ab");
    assert_eq!(peer.events(), ["made", "raw:xy", "ab"]);
}

/// Contract H-02, H-10, H-12: of whatever framing, it closes by itself.
#[test]
fn receiver_that_knows_nothing_of_errors_loses_its_connection_by_one() {
    fn check<F: Framer>(framer: F, input: &[u8]) {
        let mut peer = Peer::new(Framed::new(framer, Least(Vec::new())));
        peer.receive(input);
        assert_eq!(peer.protocol.receiver().0, ["x"]);
        assert_eq!(peer.transport.state, TransportState::Closing);
    }
    let framer = LengthPrefixedFramer::u8().with_max_length(1);
    check(framer, b"\x01x\x02xy");
    check(LineFramer::new().with_max_length(1), b"x\r\nxy\r\n");
    check(NetstringFramer::new(), b"1:x,1:xy");
}

#[test]
fn lost_descriptors_cost_their_own_frame_only() {
    let mut peer = Peer::new(exact(LengthPrefixedFramer::u8(), Recorder::default()));
    peer.receive_with(b"\x01a", 1);
    peer.with(|protocol, cx| protocol.descriptors_truncated(cx, 2));
    peer.receive_with(b"\x01", 2);
    peer.receive(b"b");
    assert_eq!(peer.transport.unclaimed, 2);
    peer.receive_with(b"\x01c", 1);
    assert_eq!(peer.events(), ["a+1", "truncated 2", "c+1"]);

    // Those that were to come beside raw data belong to no frame.
    peer.receive(b"\x05raw 2");
    peer.with(|protocol, cx| protocol.descriptors_truncated(cx, 0));
    peer.receive_with(b"12", 1);
    peer.receive_with(b"\x01d", 1);
    assert_eq!(
        peer.events(),
        ["raw 2", "truncated 0", "fd", "raw:12", "d+1"]
    );
}

#[test]
fn descriptors_behind_what_is_broken_are_given_back() {
    let framer = LengthPrefixedFramer::u8().with_max_length(1);
    let mut peer = Peer::new(Framed::new(framer, Recorder::tolerant(|_, _| {})));
    peer.receive(b"\x02ab");
    assert_eq!(peer.events().len(), 1);
    let (_reader, writer) = io::pipe().unwrap();
    let answer = peer.with(|protocol, cx| protocol.file_descriptor_received(cx, writer.into()));
    assert!(answer.is_err(), "given back");
    assert_eq!(peer.events(), [""; 0]);
}

#[test]
fn frame_with_too_many_descriptors_breaks_the_framing() {
    let framer = LengthPrefixedFramer::u8;
    let exact = |max| exact(framer(), Recorder::default()).max_descriptors(max);
    let mut peer = Peer::new(exact(2));
    peer.receive_with(b"\x01", 1);
    peer.receive_with(b"a", 1);
    assert_eq!(peer.events(), ["a+2"]);
    let mut peer = Peer::new(exact(2));
    peer.receive_with(b"\x02", 1);
    peer.receive_with(b"a", 2);
    peer.receive_with(b"b", 1);
    assert_eq!(
        peer.events(),
        ["failed:peer sent more than 2 descriptors with a frame:\x02a"]
    );
    assert_eq!(peer.transport.unclaimed, 3);
    let mut peer = Peer::new(exact(0));
    peer.receive_with(b"\x00", 1);
    assert_eq!(peer.events().len(), 1);
}

#[test]
fn descriptors_of_an_unfinished_frame_are_closed_at_the_end() {
    let mut peer = Peer::new(exact(LengthPrefixedFramer::u8(), Recorder::default()));
    peer.receive_with(b"\x05ab", 2);
    peer.with(|protocol, cx| protocol.connection_lost(cx, &CloseReason::Aborted));
    assert_eq!(peer.transport.unclaimed, 2);
}

#[test]
fn descriptors_of_a_frame_are_dropped_when_the_connection_closes_before_its_end() {
    let mut peer = Peer::new(exact(LengthPrefixedFramer::u8(), Recorder::default()));
    peer.receive_with(b"\x05ab", 2);
    peer.transport.lose_connection();
    peer.receive(b"cde");
    assert_eq!(peer.events(), [""; 0]);
    assert_eq!(peer.transport.unclaimed, 2);
}

#[test]
fn rest_is_taken_with_its_descriptors_or_they_are_closed() {
    for take in [true, false] {
        let taken = Rc::new(RefCell::new(Vec::new()));
        let sink = Rc::clone(&taken);
        let mut peer = Peer::new(exact(
            LengthPrefixedFramer::u8(),
            Recorder::scripted(move |cx, event| {
                if event == "producer resumed" {
                    assert_eq!(cx.framing.take_rest(), b"\x05ab");
                    if take {
                        sink.borrow_mut().extend(cx.framing.take_descriptors());
                    }
                }
            }),
        ));
        peer.receive_with(b"\x05ab", 2);
        peer.with(|protocol, cx| protocol.resume_producing(cx));
        assert_eq!(taken.borrow().len(), if take { 2 } else { 0 });
        assert_eq!(peer.transport.unclaimed, if take { 0 } else { 2 });
        assert_eq!(peer.transport.read_limit, NonZeroUsize::new(1));
        peer.receive(b"\x01x");
        assert_eq!(peer.events(), ["producer resumed", "x"]);
    }
}

#[test]
fn unfinished_frame_that_becomes_raw_gives_its_descriptors_first() {
    let mut peer = Peer::new(exact(
        LengthPrefixedFramer::u8(),
        Recorder::scripted(|cx, event| {
            if event == "producer resumed" {
                cx.framing.set_raw_mode();
            }
        }),
    ));
    peer.receive_with(b"\x05ab", 2);
    peer.with(|protocol, cx| protocol.resume_producing(cx));
    peer.receive_with(b"cd", 1);
    assert_eq!(
        peer.events(),
        ["producer resumed", "fd", "fd", "raw:\x05ab", "fd", "raw:cd"]
    );
}

proptest! {
    /// Frames with descriptors, reads that stop early anywhere: each frame comes
    /// once, in order, with its own.
    #[test]
    fn exact_descriptors_survive_short_reads(
        frames in proptest::collection::vec(("[a-z]{0,40}", 0usize..4), 0..12),
        reads in proptest::collection::vec(1usize..30, 1..20),
        framer in 0usize..3,
    ) {
        fn run<F: Framer + FrameEncoder<Header = ()> + Clone>(
            framer: F,
            frames: &[(String, usize)],
            reads: &[usize],
        ) -> Vec<String> {
            let mut wire = Wire::default();
            for (payload, count) in frames {
                wire.send(&framer, payload.as_bytes(), *count);
            }
            let mut peer = Peer::new(exact(framer, Recorder::default()));
            peer.made();
            let mut reads = reads.iter().cycle();
            while !wire.bytes.is_empty() {
                peer.read(&mut wire, *reads.next().unwrap());
            }
            peer.events().split_off(1)
        }
        let expected = frames.iter().map(|(payload, count)| match count {
            0 => payload.clone(),
            count => format!("{payload}+{count}"),
        }).collect::<Vec<_>>();
        let events = match framer {
            0 => run(LengthPrefixedFramer::u32(), &frames, &reads),
            1 => run(NetstringFramer::new(), &frames, &reads),
            _ => run(LineFramer::new(), &frames, &reads),
        };
        prop_assert_eq!(events, expected);
    }

    /// Commands in the lines, cut anywhere, resumed at once or later: what is
    /// delivered is always what a naive reading gives.
    #[test]
    fn pauses_and_modes_change_nothing_of_what_is_delivered(
        commands in proptest::collection::vec(
            prop_oneof![Just("x"), Just("pause"), Just("raw 3"), Just("")],
            0..30,
        ),
        cuts in proptest::collection::vec(0usize..200, 0..8),
    ) {
        let mut stream = String::new();
        let mut expected = String::new();
        for command in commands {
            stream.push_str(command);
            stream.push_str("\r\n");
            expected.push_str(&format!("[{command}]"));
            if command == "raw 3" {
                stream.push_str("\r\nz");
                expected.push_str("\r\nz");
            }
        }
        let mut peer = Peer::new(Framed::new(LineFramer::new(), Recorder::default()));
        for piece in crate::framing::test_support::cut(stream.as_bytes(), &cuts) {
            peer.receive(piece);
            while peer.transport.paused {
                peer.resume();
            }
        }
        let delivered = peer.events().into_iter().filter(|event| event != "resumed").map(|event| {
            event.strip_prefix("raw:").map_or_else(|| format!("[{event}]"), str::to_owned)
        }).collect::<String>();
        prop_assert_eq!(delivered, expected);
    }
}

// The script.

type PipeEnds = Vec<OwnedFd>;
type Hook<F> = Box<dyn FnMut(&mut FrameContext<'_, Script, F>, &str)>;

/// Writes down what it is called with. `pause`, `raw` and `raw <count>` do what
/// they say, unless it has a hook, which sees every event.
struct Recorder<F> {
    events: Vec<String>,
    hook: Option<Hook<F>>,
    closes_when_failed: bool,
    descriptors: PipeEnds,
}

impl<F> Default for Recorder<F> {
    fn default() -> Self {
        Self {
            events: Vec::new(),
            hook: None,
            closes_when_failed: true,
            descriptors: Vec::new(),
        }
    }
}

impl<F> Recorder<F> {
    fn scripted(hook: impl FnMut(&mut FrameContext<'_, Script, F>, &str) + 'static) -> Self {
        Self {
            hook: Some(Box::new(hook)),
            ..Self::default()
        }
    }

    fn tolerant(hook: impl FnMut(&mut FrameContext<'_, Script, F>, &str) + 'static) -> Self {
        Self {
            closes_when_failed: false,
            ..Self::scripted(hook)
        }
    }

    fn record(&mut self, cx: &mut FrameContext<'_, Script, F>, event: impl Into<String>) {
        assert!(
            !cx.transport.paused || cx.transport.state != TransportState::Connected,
            "called while paused"
        );
        self.note(cx, event);
    }

    /// For what may be told while reading is paused.
    fn note(&mut self, cx: &mut FrameContext<'_, Script, F>, event: impl Into<String>) {
        let event = event.into();
        match &mut self.hook {
            Some(hook) => hook(cx, &event),
            None if event == "pause" => cx.transport.pause_producing(),
            None if event == "raw" => cx.framing.set_raw_mode(),
            None => {
                if let Some(count) = event.strip_prefix("raw ") {
                    cx.framing.set_raw_mode_for(count.parse().unwrap());
                }
            }
        }
        self.events.push(event);
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

impl<F: Framer> FrameReceiver<Script, F> for Recorder<F> {
    fn connection_made(&mut self, cx: &mut FrameContext<'_, Script, F>) {
        self.note(cx, "made");
    }

    fn frame_received(&mut self, cx: &mut FrameContext<'_, Script, F>, frame: &[u8]) {
        let mut event = text(frame);
        let descriptors = cx.framing.descriptors();
        if descriptors.len() > 0 {
            event = format!("{event}+{}", descriptors.len());
            self.descriptors.extend(descriptors);
        }
        self.record(cx, event);
    }

    fn file_descriptor_received(
        &mut self,
        cx: &mut FrameContext<'_, Script, F>,
        fd: OwnedFd,
    ) -> Result<(), OwnedFd> {
        self.descriptors.push(fd);
        self.note(cx, "fd");
        Ok(())
    }

    fn raw_data_received(&mut self, cx: &mut FrameContext<'_, Script, F>, data: &[u8]) {
        self.record(cx, format!("raw:{}", text(data)));
    }

    fn framing_failed(
        &mut self,
        cx: &mut FrameContext<'_, Script, F>,
        error: FramingError,
        rest: &[u8],
    ) {
        self.record(cx, format!("failed:{error}:{}", text(rest)));
        if self.closes_when_failed {
            cx.transport.lose_connection();
        }
    }

    fn descriptors_truncated(
        &mut self,
        cx: &mut FrameContext<'_, Script, F>,
        received: usize,
    ) -> AfterTruncation {
        self.note(cx, format!("truncated {received}"));
        AfterTruncation::KeepConnection
    }

    fn descriptors_sent(&mut self, cx: &mut FrameContext<'_, Script, F>, count: usize) {
        self.note(cx, format!("sent {count}"));
    }

    fn read_connection_lost(&mut self, cx: &mut FrameContext<'_, Script, F>) -> AfterReadClosed {
        self.note(cx, "read lost");
        AfterReadClosed::KeepWriting
    }

    fn write_connection_lost(&mut self, cx: &mut FrameContext<'_, Script, F>) {
        self.note(cx, "write lost");
    }

    fn connection_lost(&mut self, cx: &mut FrameContext<'_, Script, F>, reason: &CloseReason) {
        self.note(cx, format!("lost: {reason}"));
    }

    fn reading_resumed(&mut self, cx: &mut FrameContext<'_, Script, F>) {
        self.note(cx, "resumed");
    }

    fn connection_reattached(&mut self, cx: &mut FrameContext<'_, Script, F>) {
        self.note(cx, "reattached");
    }

    fn connection_secured(&mut self, cx: &mut FrameContext<'_, Script, F>) {
        self.note(cx, "secured");
    }

    fn pause_producing(&mut self, cx: &mut FrameContext<'_, Script, F>) {
        self.note(cx, "producer paused");
    }

    fn resume_producing(&mut self, cx: &mut FrameContext<'_, Script, F>) {
        self.note(cx, "producer resumed");
    }

    fn stop_producing(&mut self, cx: &mut FrameContext<'_, Script, F>) {
        self.note(cx, "producer stopped");
    }
}

/// A protocol with all it stands between.
struct Peer<P> {
    protocol: P,
    transport: Script,
    reactor: Reactor,
    pipes: Vec<PipeReader>,
}

impl<P: Protocol<Script>> Peer<P> {
    fn new(protocol: P) -> Self {
        let mut reactor = Reactor::new().unwrap();
        let transport = Script {
            token: Some(reactor.vacancy().unwrap().token()),
            ..Script::default()
        };
        Self {
            protocol,
            transport,
            reactor,
            pipes: Vec::new(),
        }
    }

    fn with<A>(&mut self, act: impl FnOnce(&mut P, &mut Context<'_, Script>) -> A) -> A {
        let mut cx = Context::new(&mut self.transport, &mut self.reactor);
        act(&mut self.protocol, &mut cx)
    }

    fn made(&mut self) {
        self.with(|protocol, cx| protocol.connection_made(cx));
    }

    fn receive(&mut self, data: &[u8]) {
        self.with(|protocol, cx| protocol.data_received(cx, data));
    }

    fn receive_with(&mut self, data: &[u8], count: usize) {
        let mut descriptors = Vec::new();
        for _ in 0..count {
            let (reader, writer) = io::pipe().unwrap();
            self.pipes.push(reader);
            descriptors.push(writer.into());
        }
        let mut received = ReceivedDescriptors::new(&mut descriptors);
        self.with(|protocol, cx| protocol.descriptors_received(cx, &mut received, data));
    }

    fn resume(&mut self) {
        self.transport.resume_producing();
        self.with(|protocol, cx| protocol.reading_resumed(cx));
    }

    /// Reads once, as the kernel does it: no further than the limit, `at_most`,
    /// or the message that brought descriptors.
    fn read(&mut self, wire: &mut Wire, at_most: usize) {
        let limit = self
            .transport
            .read_limit
            .map_or(usize::MAX, NonZeroUsize::get);
        let mut length = limit.min(at_most).min(wire.bytes.len());
        let mut count = 0;
        if let Some(&(begin, end, descriptors)) = wire.messages.first()
            && begin < wire.read + length
        {
            count = descriptors;
            length = length.min(end - wire.read);
            wire.messages.remove(0);
        }
        let data = wire.bytes.drain(..length).collect::<Vec<_>>();
        wire.read += length;
        if count > 0 {
            self.receive_with(&data, count);
        } else {
            self.receive(&data);
        }
    }

    fn read_all(&mut self, wire: &mut Wire) {
        while !wire.bytes.is_empty() {
            self.read(wire, usize::MAX);
        }
    }
}

impl<F> Peer<Framed<F, Recorder<F>>> {
    /// What happened since the last call.
    fn events(&mut self) -> Vec<String> {
        std::mem::take(&mut self.protocol.receiver.events)
    }
}

/// What the peer has sent: bytes, and where messages with descriptors begin and
/// end, counted from the beginning of the stream.
#[derive(Default)]
struct Wire {
    bytes: Vec<u8>,
    messages: Vec<(usize, usize, usize)>,
    read: usize,
}

impl Wire {
    fn send(
        &mut self,
        framer: &impl FrameEncoder<Header = ()>,
        payload: &[u8],
        descriptors: usize,
    ) {
        let begin = self.bytes.len();
        framer
            .encode(&(), payload, descriptors, &mut self.bytes)
            .unwrap();
        if descriptors > 0 {
            self.messages.push((begin, self.bytes.len(), descriptors));
        }
    }
}

/// A transport that does nothing and remembers it.
struct Script {
    written: Vec<Vec<u8>>,
    passed: usize,
    takes_descriptors: bool,
    unclaimed: usize,
    pushed_back: Vec<u8>,
    paused: bool,
    read_closed: bool,
    state: TransportState,
    read_limit: Option<NonZeroUsize>,
    /// It leads nowhere.
    token: Option<Token>,
}

impl Default for Script {
    fn default() -> Self {
        Self {
            written: Vec::new(),
            passed: 0,
            takes_descriptors: false,
            unclaimed: 0,
            pushed_back: Vec::new(),
            paused: false,
            read_closed: false,
            state: TransportState::Connected,
            read_limit: None,
            token: None,
        }
    }
}

impl AnyConnection for Script {
    fn unsent_bytes(&self) -> usize {
        0
    }
    fn bytes_sent(&self) -> u64 {
        0
    }
    fn is_send_buffer_full(&self) -> bool {
        false
    }
    fn pause_producing(&mut self) {
        self.paused = true;
    }
    fn resume_producing(&mut self) {
        self.paused = false;
    }
    fn is_reading_paused(&self) -> bool {
        self.paused
    }
    fn hold_reading(&mut self) {}
    fn release_reading(&mut self) {}
    fn lose_connection(&mut self) {
        self.state = TransportState::Closing;
    }
    fn lose_connection_within(&mut self, _: Duration) {
        self.lose_connection();
    }
    fn abort_connection(&mut self) {
        self.state = TransportState::Lost;
    }
    fn lose_write_connection(&mut self) {}
    fn state(&self) -> TransportState {
        self.state
    }
    fn host(&self) -> Address {
        Address::Unix(UnixAddress::Unnamed)
    }
    fn peer(&self) -> Address {
        self.host()
    }
    fn connection_handle(&self) -> ConnectionHandle {
        Handle::new(self.token.expect("it has one"), |_| None)
    }
}

impl Transport for Script {
    fn write(&mut self, data: &[u8]) -> WriteStatus {
        self.write_sequence(&[data])
    }
    fn write_sequence(&mut self, parts: &[&[u8]]) -> WriteStatus {
        self.written.push(parts.concat());
        WriteStatus::Ready
    }
    fn write_owned(&mut self, data: Vec<u8>) -> WriteStatus {
        self.write(&data)
    }
    fn when_sent(&mut self, _: u64, _: crate::WhenSent) {}
    fn watermarks(&self) -> Watermarks {
        Watermarks::default()
    }
    fn set_watermarks(&mut self, _: Watermarks) {}
    fn register_producer(
        &mut self,
        _: ProducerRef,
        _: ProducerKind,
    ) -> Result<(), RegisterProducerError> {
        Err(RegisterProducerError::NotConnected)
    }
    fn unregister_producer(&mut self) {}
    fn is_producer_paused(&self) -> bool {
        false
    }
    fn is_open_for_reading(&self) -> bool {
        self.state == TransportState::Connected && !self.read_closed
    }
    fn set_read_limit(&mut self, limit: Option<NonZeroUsize>) {
        self.read_limit = limit;
    }
    fn push_back(&mut self, data: Vec<u8>) {
        self.pushed_back.extend(data);
    }
    fn handle(&self) -> TransportHandle {
        Handle::new(self.token.expect("it has one"), |_| None)
    }
    fn as_dyn(&mut self) -> &mut dyn Transport {
        self
    }
    fn close_unclaimed(&mut self, descriptors: Vec<OwnedFd>) {
        self.unclaimed += descriptors.len();
    }
}

impl UnixTransport for Script {
    fn send_file_descriptor(&mut self, fd: PassedDescriptor) -> Result<(), SendDescriptorError> {
        Err(SendDescriptorError {
            kind: SendDescriptorErrorKind::QueueFull,
            descriptors: vec![fd],
        })
    }
    fn write_with_descriptors(
        &mut self,
        data: &[u8],
        descriptors: Vec<PassedDescriptor>,
    ) -> Result<WriteStatus, SendDescriptorError> {
        if !self.takes_descriptors {
            return Err(SendDescriptorError {
                kind: SendDescriptorErrorKind::QueueFull,
                descriptors,
            });
        }
        self.passed += descriptors.len();
        Ok(self.write(data))
    }
    fn unsent_descriptors(&self) -> usize {
        0
    }
    fn descriptors_sent(&self) -> u64 {
        0
    }
    fn descriptor_limits(&self) -> DescriptorLimits {
        DescriptorLimits::default()
    }
    fn set_descriptor_limits(&mut self, _: DescriptorLimits) {}

    fn refuse_input(&mut self) -> io::Result<()> {
        Ok(())
    }
    fn set_received_linger(&mut self, _: Linger) {}
    fn set_descriptors_accepted(&mut self, _: bool) -> io::Result<()> {
        Ok(())
    }
    fn peer_credentials(&self) -> io::Result<Credentials> {
        Err(io::ErrorKind::NotConnected.into())
    }
    fn peer_pidfd(&self) -> io::Result<OwnedFd> {
        Err(io::ErrorKind::NotConnected.into())
    }
    fn unix_handle(&self) -> UnixTransportHandle {
        unreachable!("no test asks for a name")
    }
}
