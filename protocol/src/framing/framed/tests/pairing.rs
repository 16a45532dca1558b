//! Which frame has which descriptors, by each rule, against naive models.

use std::os::fd::AsRawFd;

use super::*;
use crate::framing::{Decoded, Envelope};

/// A length of the whole, how many descriptors it claims, and anything.
struct Counted;

impl Framer for Counted {
    fn decode(&mut self, input: &[u8]) -> Result<Decoded, FramingError> {
        let end = input.first().map_or(2, |length| usize::from(*length));
        if end < 2 {
            return Err(FramingError::Malformed { what: "length" });
        }
        Ok(if input.len() < end {
            Decoded::NeedMore {
                at_least: end - input.len(),
            }
        } else {
            Decoded::Frame {
                payload: 2..end,
                consumed: end,
            }
        })
    }

    fn claims(&self, frame: &[u8]) -> Option<usize> {
        Some(frame[1].into())
    }
}

impl FrameEncoder for Counted {
    type Header = ();

    fn envelope(&self, _: &(), payload: &[u8], count: usize) -> Result<Envelope<'_>, EncodeError> {
        Ok(Envelope::new(&[payload.len() as u8 + 2, count as u8], b""))
    }

    fn max_descriptors(&self) -> usize {
        28
    }
}

/// The same, with the receiver to know what a frame claims.
struct Uncounted;

impl Framer for Uncounted {
    fn decode(&mut self, input: &[u8]) -> Result<Decoded, FramingError> {
        Counted.decode(input)
    }
}

/// A frame's payload and the numbers of its descriptors, which stay open.
type Delivered = (String, Vec<i32>);

/// Writes down the frames; a word in a frame has it do something.
#[derive(Default)]
struct Collector {
    delivered: Vec<Delivered>,
    loose: Vec<i32>,
    reads: usize,
    failed: Option<FramingError>,
    kept: Vec<OwnedFd>,
}

impl Collector {
    fn keep(&mut self, fd: OwnedFd) -> i32 {
        let number = fd.as_raw_fd();
        self.kept.push(fd);
        number
    }
}

impl<F: Framer> FrameReceiver<Script, F> for Collector {
    fn frame_received(&mut self, cx: &mut FrameContext<'_, Script, F>, frame: &[u8]) {
        let word = text(frame);
        let taken: Vec<OwnedFd> = match word.strip_prefix("take ") {
            Some(count) => {
                let count = count.parse().unwrap();
                cx.framing.descriptors().take(count).collect()
            }
            None if word == "leave" => Vec::new(),
            None => cx.framing.descriptors().collect(),
        };
        let numbers = taken.into_iter().map(|fd| self.keep(fd)).collect();
        match &*word {
            "exact" => cx.framing.set_pairing(Pairing::Exact),
            "claimed" => cx.framing.set_pairing(Pairing::Claimed(Unclaimed::Fail)),
            "last" => cx.framing.set_pairing(Pairing::ByLastByte),
            "loose" => cx.framing.set_pairing(Pairing::Loose),
            "raw" => cx.framing.set_raw_mode_for(3),
            "pause" => cx.transport.pause_producing(),
            _ => {}
        }
        self.delivered.push((word, numbers));
    }

    fn raw_data_received(&mut self, _: &mut FrameContext<'_, Script, F>, data: &[u8]) {
        self.delivered
            .push((format!("raw:{}", text(data)), Vec::new()));
    }

    fn frame_truncated(&mut self, _: &mut FrameContext<'_, Script, F>, frame: &[u8]) {
        self.delivered
            .push((format!("truncated:{}", text(frame)), Vec::new()));
    }

    fn file_descriptor_received(
        &mut self,
        _: &mut FrameContext<'_, Script, F>,
        fd: OwnedFd,
    ) -> Result<(), OwnedFd> {
        let number = self.keep(fd);
        self.loose.push(number);
        Ok(())
    }

    fn read_delivered(&mut self, _: &mut FrameContext<'_, Script, F>) {
        self.reads += 1;
    }

    fn framing_failed(
        &mut self,
        cx: &mut FrameContext<'_, Script, F>,
        error: FramingError,
        _: &[u8],
    ) {
        self.failed = Some(error);
        cx.transport.abort_connection();
    }

    fn descriptors_truncated(
        &mut self,
        _: &mut FrameContext<'_, Script, F>,
        _: usize,
    ) -> AfterTruncation {
        AfterTruncation::KeepConnection
    }
}

/// What the peer sends, call by call, and how it is read.
#[derive(Default)]
struct Calls {
    bytes: Vec<u8>,
    /// Where a call with descriptors begins and ends, and those.
    calls: std::collections::VecDeque<(usize, usize, Vec<OwnedFd>)>,
    read: usize,
}

impl Calls {
    /// Sends `bytes` by one call, with so many descriptors; their numbers.
    fn send(&mut self, bytes: &[u8], count: usize) -> Vec<i32> {
        let begin = self.bytes.len();
        self.bytes.extend_from_slice(bytes);
        let descriptors: Vec<OwnedFd> = (0..count)
            .map(|_| File::open("/dev/null").unwrap().into())
            .collect();
        let numbers = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
        if count > 0 {
            let end = self.bytes.len();
            self.calls.push_back((begin, end, descriptors));
        }
        numbers
    }

    /// Reads once, as the kernel does it: no further than the limit, `at_most`,
    /// or the call that brought descriptors. Where the read ended, and which
    /// descriptors it brought.
    fn read<F: Framer>(
        &mut self,
        peer: &mut Peer<Framed<F, Collector>>,
        at_most: usize,
    ) -> (usize, Vec<i32>) {
        let limit = peer
            .transport
            .read_limit
            .map_or(usize::MAX, NonZeroUsize::get);
        let mut end = self
            .bytes
            .len()
            .min(self.read.saturating_add(limit.min(at_most)));
        let mut descriptors = Vec::new();
        if let Some((begin, upto, _)) = self.calls.front()
            && *begin < end
        {
            end = end.min(*upto);
            descriptors = self.calls.pop_front().unwrap().2;
        }
        let numbers = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
        let data = self.bytes[self.read..end].to_vec();
        self.read = end;
        if descriptors.is_empty() {
            peer.receive(&data);
        } else {
            let mut received = ReceivedDescriptors::new(&mut descriptors);
            peer.with(|protocol, cx| protocol.descriptors_received(cx, &mut received, &data));
        }
        (end, numbers)
    }

    fn read_all<F: Framer>(&mut self, peer: &mut Peer<Framed<F, Collector>>) {
        while self.read < self.bytes.len() && peer.transport.is_open_for_reading() {
            self.read(peer, usize::MAX);
        }
    }
}

fn frame(word: &str, claims: usize) -> Vec<u8> {
    let mut frame = Vec::new();
    Counted
        .encode(&(), word.as_bytes(), claims, &mut frame)
        .unwrap();
    frame
}

fn peer_by<F: Framer>(framer: F, pairing: Pairing) -> Peer<Framed<F, Collector>> {
    let framed = Framed::new(framer, Collector::default()).pairing(pairing);
    let mut peer = Peer::new(framed);
    peer.made();
    peer
}

fn counts(peer: &Peer<Framed<impl Framer, Collector>>) -> Vec<usize> {
    let delivered = &peer.protocol.receiver.delivered;
    delivered.iter().map(|(_, numbers)| numbers.len()).collect()
}

/// tmux, libwayland and libraries of D-Bus send so.
#[test]
fn frames_that_leave_by_one_call_have_what_they_claim() {
    for claims in [vec![0, 0, 1], vec![2, 1, 0], vec![1; 40]] {
        let mut peer = peer_by(Counted, Pairing::Claimed(Unclaimed::Fail));
        let mut calls = Calls::default();
        let all: Vec<u8> = claims.iter().flat_map(|count| frame("x", *count)).collect();
        let sent = calls.send(&all, claims.iter().sum());
        calls.read_all(&mut peer);
        assert_eq!(counts(&peer), claims);
        let delivered = &peer.protocol.receiver.delivered;
        let arrived: Vec<i32> = delivered.iter().flat_map(|(_, it)| it.clone()).collect();
        assert_eq!(arrived, sent);
        assert_eq!(peer.transport.unclaimed, 0);
        assert_eq!(peer.transport.read_limit, None);
    }
}

#[test]
fn receiver_takes_what_a_frame_claims_and_the_next_has_the_others() {
    let mut peer = peer_by(Uncounted, Pairing::Claimed(Unclaimed::Wait));
    let mut calls = Calls::default();
    let words = ["take 1", "leave", "take 2", "take 1"];
    let all: Vec<u8> = words.iter().flat_map(|word| frame(word, 0)).collect();
    calls.send(&all, 4);
    calls.read_all(&mut peer);
    assert_eq!(counts(&peer), [1, 0, 2, 1]);
    assert_eq!(peer.transport.unclaimed, 0);
}

#[test]
fn what_the_frames_of_a_read_do_not_claim_waits_is_closed_or_breaks_the_framing() {
    for (unclaimed, expected, closed) in [
        (Unclaimed::Wait, vec![1, 0, 1], 0),
        (Unclaimed::Close, vec![1, 0, 1], 1),
        (Unclaimed::Fail, vec![1], 1),
    ] {
        let mut peer = peer_by(Counted, Pairing::Claimed(unclaimed));
        let mut calls = Calls::default();
        calls.send(&frame("one", 1), 2);
        calls.send(&frame("none", 0), 0);
        let last = calls.send(&frame("one", 1), 1);
        calls.read_all(&mut peer);
        assert_eq!(counts(&peer), expected, "{unclaimed:?}");
        assert_eq!(peer.transport.unclaimed, closed, "{unclaimed:?}");
        let receiver = &peer.protocol.receiver;
        match unclaimed {
            Unclaimed::Fail => assert_eq!(
                receiver.failed,
                Some(FramingError::DescriptorsUnclaimed { count: 1 })
            ),
            // The one too many has shifted the rest, or has not.
            _ => assert_eq!(receiver.delivered[2].1 == last, closed == 1),
        }
    }
}

#[test]
fn frame_that_claims_more_than_there_are_or_may_be_breaks_the_framing() {
    for (claims, sent, error) in [
        (
            2,
            1,
            FramingError::DescriptorsMissing {
                claimed: 2,
                received: 1,
            },
        ),
        (
            1,
            0,
            FramingError::DescriptorsMissing {
                claimed: 1,
                received: 0,
            },
        ),
        (17, 17, FramingError::TooManyDescriptors { limit: 16 }),
    ] {
        let mut peer = peer_by(Counted, Pairing::Claimed(Unclaimed::Wait));
        let mut calls = Calls::default();
        calls.send(&frame("x", claims), sent);
        calls.read_all(&mut peer);
        assert_eq!(peer.protocol.receiver.failed, Some(error));
        assert_eq!(peer.transport.unclaimed, sent);
    }
}

/// One that only sends descriptors cannot have us hold any number of them.
#[test]
fn more_than_may_wait_for_a_frame_break_the_framing() {
    let framed = Framed::new(Counted, Collector::default())
        .pairing(Pairing::Claimed(Unclaimed::Wait))
        .max_waiting(5);
    let mut peer = Peer::new(framed);
    let mut calls = Calls::default();
    for _ in 0..3 {
        calls.send(&frame("none", 0), 2);
    }
    calls.read(&mut peer, usize::MAX);
    calls.read(&mut peer, usize::MAX);
    assert_eq!(peer.protocol.receiver.failed, None);
    calls.read(&mut peer, usize::MAX);
    assert_eq!(
        peer.protocol.receiver.failed,
        Some(FramingError::DescriptorsUnclaimed { count: 6 })
    );
    assert_eq!(peer.transport.unclaimed, 6);
}

#[test]
fn by_last_byte_the_frame_in_which_the_read_ends_has_them() {
    let mut peer = peer_by(Uncounted, Pairing::ByLastByte);
    let mut calls = Calls::default();
    // Glued in front of the call that brings one.
    calls.send(&frame("plain", 0), 0);
    calls.send(&frame("has one", 0), 1);
    // By one call, as sd-varlink does.
    calls.send(&[frame("plain", 0), frame("has two", 0)].concat(), 2);
    // Ends in the middle of a frame.
    let long = frame("has three", 0);
    calls.send(&[&frame("plain", 0)[..], &long[..4]].concat(), 3);
    calls.send(&long[4..], 0);
    calls.read_all(&mut peer);
    assert_eq!(counts(&peer), [0, 1, 0, 2, 0, 3]);
    assert_eq!(peer.transport.read_limit, None);
}

/// As D-Bus: lines, and what follows the last of them in the same read are
/// messages that say how many descriptors they own.
#[test]
fn framer_and_rule_change_in_the_middle_of_a_read() {
    type Any = Box<dyn Framer>;
    #[derive(Default)]
    struct Bus(Vec<(String, usize)>, Option<FramingError>);
    impl FrameReceiver<Script, Any> for Bus {
        fn frame_received(&mut self, cx: &mut FrameContext<'_, Script, Any>, frame: &[u8]) {
            // Those that there are already are none of a line's.
            let has_begun = cx.framing.pairing() == Pairing::Claimed(Unclaimed::Wait);
            let count = if has_begun {
                cx.framing.descriptors().count()
            } else {
                0
            };
            if frame == b"BEGIN" {
                *cx.framing.framer_mut() = Box::new(Counted);
                cx.framing.set_pairing(Pairing::Claimed(Unclaimed::Wait));
            }
            self.0.push((text(frame), count));
        }
        fn framing_failed(
            &mut self,
            cx: &mut FrameContext<'_, Script, Any>,
            error: FramingError,
            _: &[u8],
        ) {
            self.1 = Some(error);
            cx.transport.abort_connection();
        }
    }
    let lines = b"AUTH\r\nBEGIN\r\n";
    let messages = [frame("one", 1), frame("none", 0), frame("two", 2)].concat();
    for cut in 0..lines.len() + messages.len() {
        let framer: Any = Box::<LineFramer>::default();
        let framed = Framed::new(framer, Bus::default()).pairing(Pairing::Claimed(Unclaimed::Fail));
        let mut peer = Peer::new(framed);
        let all = [lines, &messages[..]].concat();
        peer.receive(&all[..cut.min(lines.len())]);
        peer.receive_with(&all[cut.min(lines.len())..cut.max(lines.len() + 1)], 3);
        peer.receive(&all[cut.max(lines.len() + 1)..]);
        let told = ["AUTH/0", "BEGIN/0", "one/1", "none/0", "two/2"];
        let received = &peer.protocol.receiver.0;
        let received = received
            .iter()
            .map(|(word, count)| format!("{word}/{count}"));
        assert!(received.eq(told), "cut at {cut}");
        assert_eq!(peer.transport.unclaimed, 0);
    }
    // While there are lines, one is an error.
    let framer: Any = Box::<LineFramer>::default();
    let framed = Framed::new(framer, Bus::default()).pairing(Pairing::Claimed(Unclaimed::Fail));
    let mut peer = Peer::new(framed);
    peer.receive_with(b"AUTH\r\n", 1);
    assert!(peer.protocol.receiver.1.is_some());
}

#[test]
fn limit_of_reads_is_there_while_the_rule_is_exact_and_gone_afterwards() {
    let mut peer = peer_by(Counted, Pairing::Loose);
    let limit = |peer: &Peer<_>| peer.transport.read_limit.map(NonZeroUsize::get);
    assert_eq!(limit(&peer), None);
    peer.receive(&frame("exact", 0));
    assert_eq!(limit(&peer), Some(2));
    peer.receive(&frame("last", 0));
    assert_eq!(limit(&peer), None);
    // What somebody else has set is left alone.
    peer.transport.read_limit = NonZeroUsize::new(7);
    peer.receive(&frame("claimed", 0));
    assert_eq!(limit(&peer), Some(7));
}

#[test]
fn what_waits_is_told_one_by_one_when_the_rule_becomes_loose() {
    let mut peer = peer_by(Counted, Pairing::Claimed(Unclaimed::Wait));
    let mut calls = Calls::default();
    let sent = calls.send(&frame("loose", 1), 3);
    let behind = calls.send(&frame("none", 0), 1);
    calls.read_all(&mut peer);
    let receiver = &peer.protocol.receiver;
    assert_eq!(receiver.delivered[0].1, sent[..1]);
    assert_eq!(receiver.loose, [&sent[1..], &behind].concat());
    assert_eq!(counts(&peer), [1, 0]);
}

#[test]
fn claimed_descriptors_that_were_lost_cost_their_own_frame_only() {
    let mut peer = peer_by(Counted, Pairing::Claimed(Unclaimed::Fail));
    let mut calls = Calls::default();
    let first = calls.send(&frame("kept", 1), 1);
    calls.read_all(&mut peer);
    peer.with(|protocol, cx| protocol.descriptors_truncated(cx, 0));
    // A plain one is glued in front of that which had them.
    peer.receive(&[frame("none", 0), frame("lost", 2)].concat());
    let last = calls.send(&frame("kept", 1), 1);
    calls.read_all(&mut peer);
    let expected = [
        ("kept", first),
        ("none", vec![]),
        ("truncated:lost", vec![]),
        ("kept", last),
    ];
    let expected = expected.map(|(word, numbers)| (word.to_owned(), numbers));
    assert_eq!(peer.protocol.receiver.delivered, expected);

    // Some there and some lost: not even their order is known.
    let mut peer = peer_by(Counted, Pairing::Claimed(Unclaimed::Wait));
    let mut calls = Calls::default();
    calls.send(&frame("none", 0), 1);
    calls.read_all(&mut peer);
    peer.with(|protocol, cx| protocol.descriptors_truncated(cx, 0));
    peer.receive(&frame("two", 2));
    let error = FramingError::DescriptorsMissing {
        claimed: 2,
        received: 1,
    };
    assert_eq!(peer.protocol.receiver.failed, Some(error));
}

#[test]
fn descriptors_of_a_frame_are_offered_inside_its_callback_only() {
    #[derive(Default)]
    struct Careless(Vec<(usize, usize)>);
    impl FrameReceiver<Script, Counted> for Careless {
        fn frame_received(&mut self, cx: &mut FrameContext<'_, Script, Counted>, frame: &[u8]) {
            let own = cx.framing.descriptors().len();
            let others = match frame {
                b"take" => cx.framing.take_descriptors().len(),
                _ => 0,
            };
            assert_eq!(cx.framing.descriptors().len(), own);
            self.0.push((own, others));
        }
        fn resume_producing(&mut self, cx: &mut FrameContext<'_, Script, Counted>) {
            assert!(cx.framing.descriptors().next().is_none());
        }
    }
    let framed = Framed::new(Counted, Careless::default());
    let mut peer = Peer::new(framed.pairing(Pairing::Claimed(Unclaimed::Wait)));
    peer.receive_with(&frame("take", 1), 3);
    peer.receive_with(&frame("leave", 1), 3);
    assert_eq!(peer.transport.unclaimed, 2, "each its own");
    peer.with(|protocol, cx| protocol.resume_producing(cx));
    peer.receive(&frame("take", 2));
    assert_eq!(peer.protocol.receiver.0, [(1, 2), (1, 0), (2, 0)]);
    assert_eq!(peer.transport.unclaimed, 4);
}

#[test]
fn what_one_read_brought_is_told_to_be_over_once() {
    let mut peer = peer_by(Counted, Pairing::Claimed(Unclaimed::Fail));
    let three = [frame("a", 0), frame("b", 0), frame("c", 0)].concat();
    peer.receive(&three);
    assert_eq!(peer.protocol.receiver.reads, 1);
    peer.receive(&three[..1]);
    assert_eq!(peer.protocol.receiver.reads, 2);
    peer.receive(&[&three[1..], &frame("pause", 0), &three].concat());
    assert_eq!(peer.protocol.receiver.reads, 2, "paused");
    peer.resume();
    assert_eq!(peer.protocol.receiver.reads, 3);
    assert_eq!(peer.protocol.receiver.delivered.len(), 10);
}

/// Whatever is to be changed each time does not have it called again and again.
#[test]
fn framing_changed_at_the_end_of_a_read_is_looked_at_once() {
    struct Restless(usize);
    impl FrameReceiver<Script, LineFramer> for Restless {
        fn frame_received(&mut self, _: &mut FrameContext<'_, Script, LineFramer>, _: &[u8]) {
            self.0 += 1;
        }
        fn read_delivered(&mut self, cx: &mut FrameContext<'_, Script, LineFramer>) {
            cx.framing.framer_mut().set_delimiter(&b";"[..]);
        }
    }
    let mut peer = Peer::new(Framed::new(LineFramer::new(), Restless(0)));
    peer.receive(b"a\r\nb;c;d");
    assert_eq!(peer.protocol.receiver.0, 3);
}

/// As from a timer, through `call_protocol`: no callback is made inside.
#[test]
fn everything_can_be_done_from_outside_of_callbacks_too() {
    let mut peer = Peer::new(Framed::new(
        LineFramer::new(),
        Recorder::<LineFramer>::default(),
    ));
    peer.receive(b"one;two;th");
    peer.with(|framed, cx| {
        framed.call(cx, |_, cx| {
            cx.send_frame(b"hello").unwrap();
            cx.framing.framer_mut().set_delimiter(&b";"[..]);
            cx.framing.set_pairing(Pairing::ByLastByte);
        });
    });
    assert_eq!(peer.transport.written, [b"hello\r\n"]);
    assert_eq!(peer.events(), [""; 0], "later");
    let pushed_back = std::mem::take(&mut peer.transport.pushed_back);
    assert_eq!(pushed_back, b"one;two;th");
    peer.receive(&pushed_back);
    peer.receive_with(b"ree;", 1);
    assert_eq!(peer.events(), ["one", "two", "three+1"]);

    // Paused, they stay where they are.
    peer.receive(b"four\r\n");
    peer.transport.pause_producing();
    peer.with(|framed, cx| {
        framed.call(cx, |_, cx| {
            cx.framing.framer_mut().set_delimiter(&b"\r\n"[..])
        });
    });
    assert!(peer.transport.pushed_back.is_empty());
    peer.resume();
    assert_eq!(peer.events(), ["resumed", "four"]);
}

/// Descriptors of what is pushed back stay with it.
#[test]
fn frames_cut_anew_from_outside_have_their_descriptors_still() {
    let framer: Box<dyn Framer> = Box::<LineFramer>::default();
    let framed = Framed::new(framer, Collector::default()).pairing(Pairing::ByLastByte);
    let mut peer = Peer::new(framed);
    let mut calls = Calls::default();
    calls.send(&frame("a", 0), 1);
    calls.send(&frame("b", 0), 2);
    calls.read_all(&mut peer);
    peer.with(|framed, cx| {
        framed.call(cx, |_, cx| *cx.framing.framer_mut() = Box::new(Counted));
    });
    let pushed_back = std::mem::take(&mut peer.transport.pushed_back);
    peer.receive(&pushed_back);
    assert_eq!(counts(&peer), [1, 2]);
}

#[test]
fn encoder_is_told_of_header_and_descriptors_and_allows_no_more_than_the_peer_takes() {
    /// Native order, kind and number, a flag where there are descriptors.
    struct Headed;
    impl Framer for Headed {
        fn decode(&mut self, input: &[u8]) -> Result<Decoded, FramingError> {
            Counted.decode(input)
        }
    }
    impl FrameEncoder for Headed {
        type Header = (u8, Vec<u8>);
        fn envelope(
            &self,
            (kind, fields): &Self::Header,
            payload: &[u8],
            descriptors: usize,
        ) -> Result<Envelope<'_>, EncodeError> {
            if *kind == 0 {
                return Err(EncodeError::Malformed { what: "kind" });
            }
            let head = [
                &[*kind, descriptors as u8, payload.len() as u8],
                &fields[..],
            ]
            .concat();
            Ok(Envelope::new(&head, b"."))
        }
        fn max_descriptors(&self) -> usize {
            1
        }
    }
    let mut peer = peer_by(Headed, Pairing::Loose);
    peer.transport.takes_descriptors = true;
    let file = || PassedDescriptor::from(File::open("/dev/null").unwrap());
    peer.with(|framed, cx| {
        framed.call(cx, |_, cx| {
            // Longer than what is kept without an allocation.
            let fields = vec![b'-'; Envelope::MAX_HEAD];
            cx.send_frame_of(&(7, fields.clone()), b"ab").unwrap();
            let header = (8, fields);
            cx.send_frame_of_with_descriptors(&header, b"abc", vec![file()])
                .unwrap();
            let refused = cx.send_frame_of_with_descriptors(&header, b"", vec![file(), file()]);
            let error = refused.unwrap_err();
            let (count, limit) = (2, 1);
            let too_many = EncodeError::TooManyDescriptors { count, limit };
            assert_eq!(error.kind, SendFrameErrorKind::Encode(too_many));
            assert_eq!(error.descriptors.len(), 2);
            let error = cx.send_frame_of(&(0, Vec::new()), b"").unwrap_err();
            assert_eq!(error.to_string(), "frame cannot be made: kind");
        });
    });
    let line = "-".repeat(Envelope::MAX_HEAD);
    let expected = [
        format!("\x07\0\x02{line}ab."),
        format!("\x08\x01\x03{line}abc."),
    ];
    assert_eq!(peer.transport.written, expected.map(String::into_bytes));
    assert_eq!(peer.transport.passed, 1);
}

/// A word of a frame that has the receiver change something, or none.
fn words() -> impl Strategy<Value = &'static str> {
    prop_oneof![
        3 => Just("x"),
        1 => Just("exact"),
        1 => Just("claimed"),
        1 => Just("last"),
        1 => Just("raw"),
        1 => Just("pause"),
        1 => Just("a longer one"),
    ]
}

fn resume_all<F: Framer>(peer: &mut Peer<Framed<F, Collector>>) {
    while peer.transport.paused {
        peer.resume();
    }
}

proptest! {
    /// A peer that sends each frame by a call of its own, descriptors on the first
    /// byte, is understood by every rule, whatever the reads, and wherever the
    /// rule changes.
    #[test]
    fn frames_sent_by_themselves_have_their_own_by_every_rule(
        frames in proptest::collection::vec((words(), 0usize..4), 0..16),
        reads in proptest::collection::vec(1usize..30, 1..20),
        first in 0usize..3,
    ) {
        let rules = [Pairing::Exact, Pairing::Claimed(Unclaimed::Fail), Pairing::ByLastByte];
        let mut peer = peer_by(Counted, rules[first]);
        let mut calls = Calls::default();
        let mut expected = Vec::new();
        for (word, count) in frames {
            let numbers = calls.send(&frame(word, count), count);
            expected.push((word.to_owned(), numbers));
            if word == "raw" {
                calls.send(b"123", 0);
            }
        }
        let mut reads = reads.iter().cycle();
        while calls.read < calls.bytes.len() {
            calls.read(&mut peer, *reads.next().unwrap());
            resume_all(&mut peer);
        }
        let receiver = &peer.protocol.receiver;
        prop_assert_eq!(&receiver.failed, &None);
        let frames: Vec<_> = receiver
            .delivered
            .iter()
            .filter(|(word, _)| !word.starts_with("raw:"))
            .cloned()
            .collect();
        prop_assert_eq!(frames, expected);
        prop_assert!(receiver.loose.is_empty() && peer.transport.unclaimed == 0);
    }

    /// Descriptors on any byte up to the last of their frame, several frames in a
    /// call, reads that stop anywhere: each frame has the next so many.
    #[test]
    fn claimed_descriptors_are_those_of_the_naive_queue(
        frames in proptest::collection::vec((0usize..4, 0usize..12), 1..16),
        cuts in proptest::collection::vec((0usize..300, 0usize..8), 0..12),
        reads in proptest::collection::vec(1usize..60, 1..20),
    ) {
        let bytes: Vec<Vec<u8>> = frames
            .iter()
            .map(|(claims, length)| frame(&"y".repeat(*length), *claims))
            .collect();
        let all = bytes.concat();
        // Cut into calls, each with what the frames that end in it still need and
        // some more of those to come.
        let mut cuts = cuts;
        cuts.push((all.len(), 0));
        cuts.sort_unstable();
        let total: usize = frames.iter().map(|(claims, _)| claims).sum();
        let (mut calls, mut sent, mut begin) = (Calls::default(), Vec::new(), 0);
        for (end, ahead) in cuts {
            let end = end.clamp(begin, all.len());
            if end == begin {
                continue;
            }
            let (mut needed, mut position) = (0, 0);
            for ((claims, _), bytes) in frames.iter().zip(&bytes) {
                position += bytes.len();
                if position <= end {
                    needed += claims;
                }
            }
            let count = (needed + ahead).min(total).saturating_sub(sent.len());
            sent.extend(calls.send(&all[begin..end], count));
            begin = end;
        }
        let mut peer = peer_by(Counted, Pairing::Claimed(Unclaimed::Wait));
        let mut reads = reads.iter().cycle();
        while calls.read < calls.bytes.len() {
            calls.read(&mut peer, *reads.next().unwrap());
        }
        prop_assert_eq!(&peer.protocol.receiver.failed, &None);
        let claims: Vec<usize> = frames.iter().map(|(claims, _)| *claims).collect();
        prop_assert_eq!(counts(&peer), claims);
        let delivered = &peer.protocol.receiver.delivered;
        let arrived: Vec<i32> = delivered.iter().flat_map(|(_, it)| it.clone()).collect();
        prop_assert_eq!(arrived, sent);
    }

    /// Exact or by last byte: those that came with a read are of the frame that
    /// holds its last byte. That they come with some other byte is the peer's
    /// matter.
    #[test]
    fn other_descriptors_are_of_the_frame_in_which_their_read_ends(
        frames in proptest::collection::vec(words(), 1..16),
        cuts in proptest::collection::vec((0usize..300, 0usize..3), 0..12),
        reads in proptest::collection::vec(1usize..60, 1..20),
        is_exact in any::<bool>(),
    ) {
        // Every word but those that have other rules.
        let frames: Vec<&str> = frames
            .into_iter()
            .map(|word| match word {
                "claimed" => "last",
                "raw" => "x",
                word => word,
            })
            .collect();
        let bytes: Vec<Vec<u8>> = frames.iter().map(|word| frame(word, 0)).collect();
        let all = bytes.concat();
        let mut cuts = cuts;
        cuts.push((all.len(), 0));
        cuts.sort_unstable();
        let (mut calls, mut begin) = (Calls::default(), 0);
        for (end, count) in cuts {
            let end = end.clamp(begin, all.len());
            if end > begin {
                calls.send(&all[begin..end], count);
            }
            begin = end;
        }
        let rule = if is_exact { Pairing::Exact } else { Pairing::ByLastByte };
        let framed = Framed::new(Counted, Collector::default())
            .pairing(rule)
            .max_descriptors(100);
        let mut peer = Peer::new(framed);
        peer.made();
        let mut expected: Vec<Delivered> =
            frames.iter().map(|word| ((*word).to_owned(), Vec::new())).collect();
        let mut reads = reads.iter().cycle();
        while calls.read < calls.bytes.len() {
            let (end, numbers) = calls.read(&mut peer, *reads.next().unwrap());
            resume_all(&mut peer);
            let mut position = 0;
            let owner = bytes.iter().position(|bytes| {
                position += bytes.len();
                end <= position
            });
            expected[owner.unwrap()].1.extend(numbers);
        }
        prop_assert_eq!(&peer.protocol.receiver.failed, &None);
        prop_assert_eq!(&peer.protocol.receiver.delivered, &expected);
    }
}
