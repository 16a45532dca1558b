//! Frames with exactly their descriptors, over a real socket.

use std::cell::{Cell, RefCell};
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;

use bowline::framing::{
    Decoded, FrameContext, FrameReceiver, Framed, Framer, FramingError, LengthPrefixedFramer,
    LineFramer, Pairing, Unclaimed,
};
use bowline::testing::Pump;
use bowline::{
    AnyConnection as _, CloseReason, PassedDescriptor, Reactor, Remains, Transport, Transports,
    UnixStream, UnixTransport,
};

use crate::peer::{
    Identity, adopt, files, identities, receive, send_message, shrink_send_buffer, transport,
};
use crate::support::{DescriptorLedger, Recorder, run_until, run_until_quiet, socketpair};

const FRAMES: usize = 400;

type Frames = Rc<RefCell<Vec<(Vec<u8>, Vec<Identity>)>>>;

/// Keeps each frame with what its descriptors are.
struct Collector(Frames);

impl FrameReceiver<UnixStream, LengthPrefixedFramer> for Collector {
    fn frame_received(
        &mut self,
        cx: &mut FrameContext<'_, UnixStream, LengthPrefixedFramer>,
        frame: &[u8],
    ) {
        let taken: Vec<OwnedFd> = cx.framing.descriptors().collect();
        let frame = (frame.to_vec(), identities(&taken));
        self.0.borrow_mut().push(frame);
    }
}

/// From none to many, in no simple rhythm.
fn count_of(number: usize) -> usize {
    match number % 11 {
        0 | 4 | 5 => 0,
        1 => 16,
        other => other / 2,
    }
}

fn length_of(number: usize) -> usize {
    match number % 7 {
        0 => 0,
        1 => 1,
        2 => 40_000,
        other => number * other,
    }
}

/// Its reads are limited, so that there are many of them after the write that failed.
#[test]
fn frames_of_a_peer_that_is_gone_are_complete_although_a_send_fails() {
    let ledger = DescriptorLedger::open();
    {
        let arrived = Frames::default();
        let mut reactor = Reactor::new().unwrap();
        let (ours, theirs) = socketpair();
        let framed = Framed::new(LengthPrefixedFramer::u32(), Collector(Rc::clone(&arrived)))
            .pairing(Pairing::Exact);
        let handle = reactor.adopt_unix_stream(ours.into(), framed).unwrap();
        reactor.turn(Some(Duration::ZERO));
        transport(&mut reactor, handle).pause_producing();
        let mut expected = Vec::new();
        for number in 0..20_u8 {
            let (sent, known) = files(usize::from(number) % 3);
            send_message(&theirs, &[0, 0, 0, 2, number, number], &sent);
            expected.push((vec![number; 2], known));
        }
        drop(theirs);
        transport(&mut reactor, handle).write(b"too late");
        run_until_quiet(&mut reactor);
        assert!(arrived.borrow().is_empty());
        transport(&mut reactor, handle).resume_producing();
        run_until(&mut reactor, |reactor| reactor.get(handle).is_none());
        assert_eq!(*arrived.borrow(), expected);
    }
    ledger.assert_balanced();
}

/// Takes a pause after each frame.
struct Slow(Rc<RefCell<Vec<String>>>);

impl Slow {
    fn note(&self, what: impl Into<String>) {
        self.0.borrow_mut().push(what.into());
    }
}

impl FrameReceiver<UnixStream, LengthPrefixedFramer> for Slow {
    fn frame_received(
        &mut self,
        cx: &mut FrameContext<'_, UnixStream, LengthPrefixedFramer>,
        frame: &[u8],
    ) {
        let taken = cx.framing.descriptors().count();
        self.note(format!("{} with {taken}", String::from_utf8_lossy(frame)));
        cx.transport.pause_producing();
    }

    fn connection_broken(
        &mut self,
        _: &mut FrameContext<'_, UnixStream, LengthPrefixedFramer>,
        remains: Remains,
    ) {
        self.note(format!("broken {remains:?}"));
    }

    fn connection_lost(
        &mut self,
        _: &mut FrameContext<'_, UnixStream, LengthPrefixedFramer>,
        _: &CloseReason,
    ) {
        self.note("lost");
    }
}

/// F-32. They came with a read that was paused after the first of them: the kernel has nothing
/// more of them.
#[test]
fn frames_kept_back_by_a_pause_come_before_the_end_of_a_broken_connection() {
    let ledger = DescriptorLedger::open();
    // What is no whole frame, after the last that is, waits for nothing; it is what the
    // descriptors would have been for.
    for (behind, descriptors) in [(&b""[..], 2), (&[0, 0, 0, 9, b'x'], 0)] {
        let notes: Rc<RefCell<Vec<String>>> = Rc::default();
        let mut reactor = Reactor::new().unwrap();
        let (ours, theirs) = socketpair();
        let framed = Framed::new(LengthPrefixedFramer::u32(), Slow(Rc::clone(&notes)))
            .pairing(Pairing::ByLastByte);
        let handle = reactor.adopt_unix_stream(ours.into(), framed).unwrap();
        reactor.turn(Some(Duration::ZERO));
        let three = [&b"\0\0\0\x01a\0\0\0\x01b\0\0\0\x01c"[..], behind].concat();
        send_message(&theirs, &three, &files(2).0);
        drop(theirs);
        run_until_quiet(&mut reactor);
        assert_eq!(*notes.borrow(), ["a with 0"], "{behind:?}");
        transport(&mut reactor, handle).write(b"too late");
        run_until_quiet(&mut reactor);
        let told = ["a with 0", "broken Everything"];
        assert_eq!(*notes.borrow(), told, "{behind:?}");
        transport(&mut reactor, handle).resume_producing();
        run_until_quiet(&mut reactor);
        assert_eq!(notes.borrow().last().unwrap(), "b with 0", "{behind:?}");
        transport(&mut reactor, handle).resume_producing();
        // Reading is paused now too, and nothing more can come.
        run_until(&mut reactor, |reactor| reactor.get(handle).is_none());
        let last = format!("c with {descriptors}");
        assert_eq!(notes.borrow()[3..], [&last, "lost"], "{behind:?}");
    }
    ledger.assert_balanced();
}

#[test]
fn each_frame_has_exactly_its_descriptors() {
    let ledger = DescriptorLedger::open();
    {
        let (all, known) = files(37);
        let all: Vec<_> = all.into_iter().map(Rc::new).collect();
        let arrived = Frames::default();
        let mut reactor = Reactor::new().unwrap();
        let (ours, theirs) = socketpair();
        shrink_send_buffer(&ours);
        let sender = reactor
            .adopt_unix_stream(ours.into(), Recorder::default())
            .unwrap();
        let framed = Framed::new(LengthPrefixedFramer::u32(), Collector(Rc::clone(&arrived)))
            .pairing(Pairing::Exact);
        reactor.adopt_unix_stream(theirs.into(), framed).unwrap();

        let mut expected = Vec::new();
        let mut next = 0;
        for number in 0..FRAMES {
            let body = vec![number as u8; length_of(number)];
            let length = u32::try_from(body.len()).unwrap();
            let message = [&length.to_be_bytes()[..], &body].concat();
            let chosen: Vec<usize> = (next..next + count_of(number))
                .map(|at| at % all.len())
                .collect();
            next += chosen.len();
            let passed = chosen
                .iter()
                .map(|at| PassedDescriptor::shared(&all[*at]))
                .collect();
            transport(&mut reactor, sender)
                .write_with_descriptors(&message, passed)
                .unwrap();
            expected.push((body, chosen.iter().map(|at| known[*at]).collect()));
        }
        run_until(&mut reactor, |_| arrived.borrow().len() == FRAMES);
        for (number, (arrived, expected)) in arrived.borrow().iter().zip(&expected).enumerate() {
            assert!(arrived == expected, "frame {number}");
        }
    }
    ledger.assert_balanced();
}

/// How many descriptors it owns, and a number.
struct Numbered;

impl Framer for Numbered {
    fn decode(&mut self, input: &[u8]) -> Result<Decoded, FramingError> {
        Ok(match input.len() {
            0 | 1 => Decoded::NeedMore {
                at_least: 2 - input.len(),
            },
            _ => Decoded::Frame {
                payload: 0..2,
                consumed: 2,
            },
        })
    }

    fn claims(&self, frame: &[u8]) -> Option<usize> {
        Some(frame[0].into())
    }
}

/// Keeps the numbers of frames with what their descriptors are; and what else it is
/// told.
#[derive(Clone, Default)]
struct Notes(Rc<RefCell<(Numbers, Vec<String>)>>);

type Numbers = Vec<(u8, Vec<Identity>)>;

impl<T: UnixTransport> FrameReceiver<T, Numbered> for Notes {
    fn frame_received(&mut self, cx: &mut FrameContext<'_, T, Numbered>, frame: &[u8]) {
        let taken: Vec<OwnedFd> = cx.framing.descriptors().collect();
        self.0.borrow_mut().0.push((frame[1], identities(&taken)));
    }

    fn framing_failed(
        &mut self,
        _: &mut FrameContext<'_, T, Numbered>,
        error: FramingError,
        rest: &[u8],
    ) {
        let rest = rest.escape_ascii();
        self.0.borrow_mut().1.push(format!("{error}: {rest}"));
    }

    fn connection_lost(&mut self, _: &mut FrameContext<'_, T, Numbered>, reason: &CloseReason) {
        self.0.borrow_mut().1.push(reason.to_string());
    }
}

/// `send_file_descriptor` says nothing about the byte that one travels with: four
/// frames of one turn leave by one call. Each has its own where it says how many.
#[test]
fn frames_sent_with_floating_descriptors_have_what_they_claim() {
    let ledger = DescriptorLedger::open();
    {
        let notes = Notes::default();
        let mut reactor = Reactor::new().unwrap();
        let (ours, theirs) = socketpair();
        let sender = reactor
            .adopt_unix_stream(ours.into(), Recorder::default())
            .unwrap();
        let framed =
            Framed::new(Numbered, notes.clone()).pairing(Pairing::Claimed(Unclaimed::Wait));
        reactor.adopt_unix_stream(theirs.into(), framed).unwrap();
        let (all, known) = files(7);
        let mut all = all.into_iter();
        let mut expected = Vec::new();
        let mut known = &known[..];
        for (number, count) in [1, 0, 4, 2].into_iter().enumerate() {
            let to = transport(&mut reactor, sender);
            for fd in all.by_ref().take(count) {
                to.send_file_descriptor(fd.into()).unwrap();
            }
            to.write(&[count as u8, number as u8]);
            let (own, rest) = known.split_at(count);
            expected.push((number as u8, own.to_vec()));
            known = rest;
        }
        run_until(&mut reactor, |_| notes.0.borrow().0.len() == 4);
        assert_eq!(notes.0.borrow().0, expected);
    }
    ledger.assert_balanced();
}

/// What nobody claims is closed at its deadline, and told; each has its own time, so
/// that a peer which always has some on the way is as good as any.
#[test]
fn descriptors_that_no_frame_claims_in_time_end_the_connection() {
    let ledger = DescriptorLedger::open();
    {
        let notes = Notes::default();
        let framed = Framed::new(Numbered, notes.clone())
            .pairing(Pairing::Claimed(Unclaimed::Wait))
            .descriptor_deadline(Some(Duration::from_secs(10)));
        let (mut pump, peer) = Pump::with_peer(framed).unwrap();
        let (all, _) = files(1);
        let send = |pump: &mut Pump, bytes: &[u8], count| {
            let fds = vec![all[0].as_fd(); count];
            peer.send_with_descriptors(bytes, &fds).unwrap();
            pump.run();
            pump.advance(Duration::from_secs(4));
        };
        // One ahead of those that claim it, always another.
        send(&mut pump, &[0, 0], 1);
        for number in 0..20 {
            send(&mut pump, &[1, number], 1);
        }
        assert_eq!(notes.0.borrow().1, [""; 0]);
        // The last is not claimed. Others that come and go do not keep it.
        send(&mut pump, &[1, 20], 1);
        send(&mut pump, &[0], 0);
        assert_eq!(notes.0.borrow().1, [""; 0]);
        pump.advance(Duration::from_secs(4));
        let told = [
            "peer sent 1 descriptors that no frame claims: \\x00",
            "aborted by us",
        ];
        assert_eq!(notes.0.borrow().1, told);
        assert_eq!(pump.reactor().descriptor_counts().unclaimed, 1);
    }
    ledger.assert_balanced();
}

/// A timer reaches what a callback does: here it turns a connection of lines into one
/// of numbered frames, behind the back of what had arrived already.
#[test]
fn timer_changes_framer_and_rule_of_a_connection_and_sends() {
    struct Either(bool, LineFramer);
    impl Framer for Either {
        fn decode(&mut self, input: &[u8]) -> Result<Decoded, FramingError> {
            if self.0 {
                Numbered.decode(input)
            } else {
                self.1.decode(input)
            }
        }
        fn claims(&self, frame: &[u8]) -> Option<usize> {
            self.0.then(|| frame[0].into())
        }
    }
    impl FrameReceiver<UnixStream, Either> for Notes {
        fn frame_received(&mut self, cx: &mut FrameContext<'_, UnixStream, Either>, frame: &[u8]) {
            let taken: Vec<OwnedFd> = cx.framing.descriptors().collect();
            self.0.borrow_mut().0.push((frame[1], identities(&taken)));
        }
    }
    let ledger = DescriptorLedger::open();
    {
        let notes = Notes::default();
        let mut reactor = Reactor::new().unwrap();
        let either = Either(false, LineFramer::new());
        let framed = Framed::new(either, notes.clone()).pairing(Pairing::Claimed(Unclaimed::Wait));
        let (handle, peer) = adopt(&mut reactor, framed);
        let (all, known) = files(3);
        send_message(&peer, &[0, 7, 2, 8, 1, 9], &all);
        run_until_quiet(&mut reactor);
        assert!(notes.0.borrow().0.is_empty(), "no line yet");
        let held = Rc::clone(&notes.0);
        let handle = transport(&mut reactor, handle).handle();
        reactor.call_soon(move |reactor| {
            reactor.call_protocol::<UnixStream, Framed<Either, Notes>>(
                handle,
                move |framed, cx| {
                    // Nothing is delivered while this is borrowed.
                    let held = held.borrow_mut();
                    framed.call(cx, |_, cx| {
                        cx.framing.framer_mut().0 = true;
                        cx.transport.write(b"changed");
                    });
                    drop(held);
                },
            );
        });
        run_until(&mut reactor, |_| notes.0.borrow().0.len() == 3);
        let expected = [
            (7, vec![]),
            (8, known[..2].to_vec()),
            (9, known[2..].to_vec()),
        ];
        assert_eq!(notes.0.borrow().0, expected);
        assert_eq!(receive(&peer, 100).unwrap().data, b"changed");
    }
    ledger.assert_balanced();
}

/// What the documentation says: claims are the cheap way for lines.
#[test]
fn claimed_lines_cost_no_read_of_their_own() {
    struct Counter(Rc<Cell<(usize, usize)>>);
    impl FrameReceiver<UnixStream, LineFramer> for Counter {
        fn frame_received(&mut self, _: &mut FrameContext<'_, UnixStream, LineFramer>, _: &[u8]) {
            let (lines, reads) = self.0.get();
            self.0.set((lines + 1, reads));
        }
        fn read_delivered(&mut self, _: &mut FrameContext<'_, UnixStream, LineFramer>) {
            let (lines, reads) = self.0.get();
            self.0.set((lines, reads + 1));
        }
    }
    let ledger = DescriptorLedger::open();
    for (pairing, most, least) in [
        (Pairing::Claimed(Unclaimed::Close), 1, 1),
        (Pairing::ByLastByte, 1, 1),
        (Pairing::Exact, usize::MAX, 300),
    ] {
        let counted = Rc::new(Cell::new((0, 0)));
        let mut reactor = Reactor::new().unwrap();
        let counter = Counter(Rc::clone(&counted));
        let framed = Framed::new(LineFramer::new(), counter).pairing(pairing);
        let (_, peer) = adopt(&mut reactor, framed);
        send_message(&peer, &b"a line\r\n".repeat(100), &[]);
        run_until(&mut reactor, |_| counted.get().0 == 100);
        let (_, reads) = counted.get();
        assert!((least..=most).contains(&reads), "{pairing:?}: {reads}");
    }
    ledger.assert_balanced();
}
