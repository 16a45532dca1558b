//! Control messages and framing: nothing lost, nothing doubled, nothing with
//! the wrong message.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::rc::Rc;
use std::time::{Duration, Instant};

use bowline::framing::{
    FrameContext, FrameReceiver, Framed, LengthPrefixedFramer, Pairing, Unclaimed,
};
use bowline::testing::Random;
use bowline::{
    AfterTruncation, CloseReason, Context, PassedDescriptor, Protocol, Reactor,
    ReceivedDescriptors, Transports, UnixStream, UnixTransportHandle,
};

use crate::peer::{
    Identity, file, files, identities, identity, receive, send, shrink_send_buffer, transport,
};
use crate::support::figures::{Bound, Figures, scaled};
use crate::support::own_process::{in_own_process, leave_free, limit_descriptors};
use crate::support::{
    DEADLINE, DescriptorLedger, Recorder, open_descriptors, run_until, run_until_quiet, settle,
    socketpair,
};

/// Counts bytes and descriptors.
struct Counter(Rc<Cell<(usize, usize)>>);

impl Protocol<UnixStream> for Counter {
    fn data_received(&mut self, _: &mut Context<'_, UnixStream>, data: &[u8]) {
        let (bytes, descriptors) = self.0.get();
        self.0.set((bytes + data.len(), descriptors));
    }

    fn descriptors_received(
        &mut self,
        cx: &mut Context<'_, UnixStream>,
        descriptors: &mut ReceivedDescriptors<'_>,
        data: &[u8],
    ) {
        let (bytes, so_far) = self.0.get();
        self.0.set((bytes, so_far + descriptors.count()));
        self.data_received(cx, data);
    }
}

/// Reliability T-7: all messages that were there before we looked are read,
/// although the kernel reports them once and stops each read behind one.
#[test]
fn all_messages_sent_before_we_look_are_seen() {
    let ledger = DescriptorLedger::open();
    let most = 500;
    let passed = file();
    let (mut messages, mut seen) = (0, 0);
    let (mut peers, mut events) = (0, 0);
    for count in (1..=most).step_by(scaled(7, 1)) {
        let mut reactor = Reactor::new().unwrap();
        let (ours, peer) = socketpair();
        // As much as the kernel allows: each message takes 768 bytes of it.
        rustix::net::sockopt::set_socket_send_buffer_size(&peer, 1 << 20).unwrap();
        let counted = Rc::new(Cell::new((0, 0)));
        reactor
            .adopt_unix_stream(ours.into(), Counter(Rc::clone(&counted)))
            .unwrap();
        run_until_quiet(&mut reactor);
        for _ in 0..count {
            send(&peer, b"x", &[passed.as_fd()]).expect("room");
        }
        let before = reactor.statistics().events;
        run_until(&mut reactor, |_| counted.get() == (count, count));
        settle(&mut reactor);
        peers += 1;
        events += (reactor.statistics().events - before) as usize;
        messages += count;
        seen += counted.get().1;
    }
    Figures::of("T-7")
        .must("messages seen", seen, Bound::Exactly, messages)
        .must(
            "events, of one for each peer",
            events,
            Bound::Exactly,
            peers,
        );
    drop(passed);
    ledger.assert_balanced();
}

/// The bytes of a frame, and what the descriptors are that came with it.
type Frame = (Vec<u8>, Vec<Identity>);

/// Keeps each frame; and what was said of lost descriptors.
#[derive(Default)]
struct Collected {
    frames: VecDeque<Frame>,
    truncated: VecDeque<Vec<u8>>,
    notices: usize,
    lost: Option<String>,
}

struct Collector {
    collected: Rc<RefCell<Collected>>,
    after_truncation: AfterTruncation,
    rule: Rule,
}

/// What says which descriptors are a frame's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rule {
    /// They came with its own bytes.
    Exact,
    /// Its first byte says how many it takes, which is for the receiver to know.
    Claimed,
}

type FrameCx<'a> = FrameContext<'a, UnixStream, LengthPrefixedFramer>;

impl FrameReceiver<UnixStream, LengthPrefixedFramer> for Collector {
    fn frame_received(&mut self, cx: &mut FrameCx<'_>, frame: &[u8]) {
        let most = match self.rule {
            Rule::Exact => usize::MAX,
            Rule::Claimed => usize::from(frame[0]),
        };
        let taken: Vec<OwnedFd> = cx.framing.descriptors().take(most).collect();
        let frame = (frame.to_vec(), identities(&taken));
        self.collected.borrow_mut().frames.push_back(frame);
    }

    fn frame_truncated(&mut self, _: &mut FrameCx<'_>, frame: &[u8]) {
        self.collected
            .borrow_mut()
            .truncated
            .push_back(frame.to_vec());
    }

    fn descriptors_truncated(&mut self, _: &mut FrameCx<'_>, _: usize) -> AfterTruncation {
        self.collected.borrow_mut().notices += 1;
        self.after_truncation
    }

    fn connection_lost(&mut self, _: &mut FrameCx<'_>, reason: &CloseReason) {
        self.collected.borrow_mut().lost = Some(reason.to_string());
    }
}

/// A framed protocol on a new connection, and the other end.
fn framed(
    reactor: &mut Reactor,
    after_truncation: AfterTruncation,
    rule: Rule,
) -> (UnixTransportHandle, StdUnixStream, Rc<RefCell<Collected>>) {
    let collected = Rc::new(RefCell::new(Collected::default()));
    let collector = Collector {
        collected: Rc::clone(&collected),
        after_truncation,
        rule,
    };
    let (ours, theirs) = socketpair();
    let pairing = match rule {
        Rule::Exact => Pairing::Exact,
        Rule::Claimed => Pairing::Claimed(Unclaimed::Wait),
    };
    let protocol = Framed::new(LengthPrefixedFramer::u32(), collector)
        .pairing(pairing)
        .max_waiting(MOST_FRAMES * MOST_OF_A_FRAME);
    let handle = reactor.adopt_unix_stream(ours.into(), protocol).unwrap();
    (handle, theirs, collected)
}

/// What is passed, over and over.
struct Files {
    all: Vec<Rc<OwnedFd>>,
    identities: Vec<Identity>,
    next: usize,
}

impl Files {
    fn new() -> Self {
        let (all, identities) = files(37);
        Self {
            all: all.into_iter().map(Rc::new).collect(),
            identities,
            next: 0,
        }
    }

    fn take(&mut self, count: usize) -> (Vec<Rc<OwnedFd>>, Vec<Identity>) {
        let places = (self.next..self.next + count).map(|at| at % self.all.len());
        self.next += count;
        places
            .map(|at| (Rc::clone(&self.all[at]), self.identities[at]))
            .unzip()
    }
}

/// A frame with its prefix: the first byte of its body says how many descriptors
/// it owns, for who reads by that alone.
fn encoded(random: &mut Random, length: usize, count: usize) -> Vec<u8> {
    let mut frame = u32::try_from(length).unwrap().to_be_bytes().to_vec();
    frame.push(count as u8);
    let filling = random.any() as u8;
    frame.resize(4 + length, filling);
    frame
}

/// One of `1..=most`, each power of two as likely as the next.
fn size(random: &mut Random, most: usize) -> usize {
    let power = 1 << random.below(most.ilog2() as usize + 1);
    (power + random.below(power)).min(most)
}

/// As [`run_until`], where the test itself is the other end: turns do not wait.
#[track_caller]
fn step_until(reactor: &mut Reactor, mut is_done: impl FnMut(&mut Reactor) -> bool) {
    let began = Instant::now();
    while !is_done(reactor) {
        assert!(began.elapsed() < DEADLINE, "nothing more happened");
        reactor.turn(Some(Duration::ZERO));
    }
}

/// Reads what a connection sends, and takes frames apart as D-Bus does: by a
/// queue of descriptors, and each frame's count.
#[derive(Default)]
struct Reader {
    bytes: Vec<u8>,
    queue: VecDeque<Identity>,
}

impl Reader {
    fn read(&mut self, peer: &StdUnixStream, limit: usize) -> bool {
        let Some(message) = receive(peer, limit) else {
            return false;
        };
        self.bytes.extend(&message.data);
        self.queue.extend(message.descriptors.iter().map(identity));
        true
    }

    fn next_frame(&mut self) -> Option<Frame> {
        let length = u32::from_be_bytes(*self.bytes.first_chunk()?) as usize;
        let body = self.bytes.get(4..4 + length)?.to_vec();
        self.bytes.drain(..4 + length);
        let owned = self.queue.drain(..usize::from(body[0])).collect();
        Some((body, owned))
    }
}

/// How many frames there are at a time, one way, and descriptors in one.
const MOST_FRAMES: usize = 8;
const MOST_OF_A_FRAME: usize = 16;

/// One list of frames both ways; answers how many did not arrive as they were
/// sent: what the peer sends in random pieces arrives
/// with its frames, and what we send is put together again by somebody who reads
/// in random pieces. Where frames claim their descriptors, some of ours are sent one by
/// one, and float.
fn frames_both_ways(
    reactor: &mut Reactor,
    files: &mut Files,
    random: &mut Random,
    rule: Rule,
) -> usize {
    let mut astray = 0;
    let (handle, peer, collected) = framed(reactor, AfterTruncation::LoseConnection, rule);
    let is_narrow = random.chance(20);
    if is_narrow {
        shrink_send_buffer(&peer);
    }
    let (mut to_us, mut from_us) = (VecDeque::new(), VecDeque::new());
    let (mut outgoing, mut reader) = (VecDeque::new(), Reader::default());
    for _ in 0..1 + random.below(MOST_FRAMES) {
        // Both ways: the same in kind.
        for is_ours in [false, true] {
            let most = if random.chance(5) { 90_000 } else { 3_000 };
            let length = size(random, most);
            let (passed, known) = files.take(random.below(MOST_OF_A_FRAME + 1));
            let frame = encoded(random, length, passed.len());
            let expected = (frame[4..].to_vec(), known);
            if is_ours {
                // Each needs a byte of the frame to come with.
                let floats =
                    rule == Rule::Claimed && passed.len() <= frame.len() && random.chance(50);
                let passed = passed.iter().map(PassedDescriptor::shared);
                let it = transport(reactor, handle);
                if floats {
                    passed.for_each(|fd| it.send_file_descriptor(fd).expect("room"));
                    it.write(&frame);
                } else {
                    it.write_with_descriptors(&frame, passed.collect())
                        .expect("room");
                }
                from_us.push_back(expected);
            } else {
                to_us.push_back(expected);
                outgoing.push_back((frame, passed));
            }
        }
    }
    step_until(reactor, |reactor| {
        // Several before we look, so that the end of one frame and the
        // beginning of the next lie side by side.
        for _ in 0..random.below(5) {
            let Some((frame, passed)) = outgoing.front_mut() else {
                break;
            };
            // Some of it, the descriptors with the first byte, which may be
            // glued to the end of the frame before.
            let piece = size(random, 65_536).min(frame.len());
            let borrowed: Vec<_> = passed.iter().map(|fd| fd.as_fd()).collect();
            if let Ok(sent) = send(&peer, &frame[..piece], &borrowed) {
                frame.drain(..sent);
                passed.clear();
                if frame.is_empty() {
                    outgoing.pop_front();
                }
            }
        }
        if random.chance(50) {
            reactor.turn(Some(Duration::ZERO));
        }
        if random.chance(60) {
            reader.read(&peer, size(random, 65_536));
        }
        while let Some(frame) = reader.next_frame() {
            astray += usize::from(Some(frame) != from_us.pop_front());
        }
        while let Some(frame) = collected.borrow_mut().frames.pop_front() {
            astray += usize::from(Some(frame) != to_us.pop_front());
        }
        to_us.is_empty() && from_us.is_empty()
    });
    assert!(reader.queue.is_empty() && reader.bytes.is_empty());
    transport(reactor, handle).abort_connection();
    run_until(reactor, |_| collected.borrow().lost.is_some());
    astray
}

/// Reliability T-4, by two of the rules that say what is a frame's: its own bytes, and its
/// own word.
#[test]
fn each_descriptor_reaches_its_frame_however_it_is_cut() {
    let ledger = DescriptorLedger::open();
    let cases = scaled(10_000, 100_000);
    let mut astray = 0;
    {
        let mut files = Files::new();
        let mut reactor = Reactor::new().unwrap();
        for seed in 0..cases {
            let guard = Seed(seed as u64);
            let rule = [Rule::Exact, Rule::Claimed][seed % 2];
            let random = &mut Random::new(seed as u64);
            astray += frames_both_ways(&mut reactor, &mut files, random, rule);
            std::mem::forget(guard);
        }
        assert!(files.all.iter().all(|fd| Rc::strong_count(fd) == 1));
        Figures::of("T-4")
            .must("cases", cases, Bound::AtLeast, scaled(10_000, 100_000))
            .must(
                "frames without exactly their own",
                astray,
                Bound::Exactly,
                0,
            )
            .must("descriptors passed", files.next, Bound::AtLeast, cases * 16);
    }
    ledger.assert_balanced();
}

/// Says which case it was, when one fails.
struct Seed(u64);

impl Drop for Seed {
    #[allow(clippy::print_stderr, reason = "what a failed test has to say")]
    fn drop(&mut self) {
        eprintln!("case {}", self.0);
    }
}

/// Reliability T-5: frames of all sizes through the smallest buffer, to somebody
/// who reads a little now and then.
#[test]
fn each_descriptor_is_sent_once_however_often_a_write_falls_short() {
    let ledger = DescriptorLedger::open();
    {
        let frames = scaled(300, 10_000);
        let largest = scaled(1 << 19, 1 << 22);
        let mut random = Random::new(5);
        let mut files = Files::new();
        let mut reactor = Reactor::new().unwrap();
        let (ours, peer) = socketpair();
        shrink_send_buffer(&ours);
        let sender = reactor
            .adopt_unix_stream(ours.into(), Recorder::default())
            .unwrap();
        let mut reader = Reader::default();
        let (mut doubled, mut arrived, mut written) = (0, 0, 0);
        while written < frames {
            // Several at a time: one that is sent in part has others behind it.
            let mut expected = VecDeque::new();
            for _ in 0..1 + random.below(4) {
                let length = size(&mut random, largest);
                let (passed, known) = files.take(1 + random.below(16));
                let frame = encoded(&mut random, length, passed.len());
                let passed = passed.iter().map(PassedDescriptor::shared).collect();
                transport(&mut reactor, sender)
                    .write_with_descriptors(&frame, passed)
                    .unwrap();
                expected.push_back((frame[4..].to_vec(), known));
                written += 1;
            }
            step_until(&mut reactor, |_| {
                // Less than the buffer holds, and not at every turn.
                if random.chance(80) {
                    reader.read(&peer, size(&mut random, 65_536));
                }
                while let Some(frame) = reader.next_frame() {
                    arrived += frame.1.len();
                    assert!(Some(frame) == expected.pop_front(), "another frame");
                }
                expected.is_empty()
            });
            doubled += reader.queue.len();
        }
        let sent = reactor.descriptor_counts().passed as usize;
        Figures::of("T-5")
            .must("frames", written, Bound::AtLeast, scaled(300, 10_000))
            .must("descriptors arrived", arrived, Bound::Exactly, files.next)
            .must("descriptors sent", sent, Bound::Exactly, files.next)
            .must("descriptors doubled", doubled, Bound::Exactly, 0);
    }
    ledger.assert_balanced();
}

/// Sends a frame whole, its descriptors with its first byte.
fn send_frame(peer: &StdUnixStream, frame: &[u8], passed: &[Rc<OwnedFd>]) {
    let borrowed: Vec<_> = passed.iter().map(|fd| fd.as_fd()).collect();
    assert_eq!(send(peer, frame, &borrowed).expect("room"), frame.len());
}

/// Turns while only `free` numbers are left in this process.
#[track_caller]
fn receive_with_free(reactor: &mut Reactor, free: usize, mut is_done: impl FnMut() -> bool) {
    leave_free(free);
    run_until(reactor, |_| is_done());
    limit_descriptors(1_000);
}

/// Says of each read what it brought, and goes on.
#[derive(Clone, Default)]
struct Told(Rc<RefCell<Vec<(usize, bool)>>>);

impl Protocol<UnixStream> for Told {
    fn data_received(&mut self, _: &mut Context<'_, UnixStream>, _: &[u8]) {
        // Of what was lost the bytes come behind, by themselves.
        if self.0.borrow().last().is_none_or(|(_, was_lost)| !was_lost) {
            self.0.borrow_mut().push((0, false));
        }
    }

    fn descriptors_received(
        &mut self,
        _: &mut Context<'_, UnixStream>,
        descriptors: &mut ReceivedDescriptors<'_>,
        _: &[u8],
    ) {
        self.0.borrow_mut().push((descriptors.count(), false));
    }

    fn descriptors_truncated(
        &mut self,
        _: &mut Context<'_, UnixStream>,
        received: usize,
    ) -> AfterTruncation {
        self.0.borrow_mut().push((received, true));
        AfterTruncation::KeepConnection
    }
}

/// Reliability T-3, at the protocol: each receipt of which something was lost for want of
/// numbers is told as that, once, with how many came; each other one is delivered whole;
/// and all are closed. The peer's credentials come with each of them.
#[test]
fn every_truncation_is_told_to_the_protocol() {
    let name = "every_truncation_is_told_to_the_protocol";
    in_own_process(module_path!(), name, || {
        let repeats = scaled(1_000, 10_000);
        let mut random = Random::new(3);
        let mut reactor = Reactor::new().unwrap();
        // It is the kernel that is to lose them.
        reactor.set_descriptor_reserve(0);
        let (ours, peer) = socketpair();
        rustix::net::sockopt::set_socket_passcred(&ours, true).unwrap();
        let told = Told::default();
        reactor
            .adopt_unix_stream(ours.into(), told.clone())
            .unwrap();
        let passed = file();
        run_until_quiet(&mut reactor);
        let before = open_descriptors();
        let (mut lost, mut wrong) = (0, 0);
        for _ in 0..repeats {
            let (count, free) = (random.below(17), random.below(20));
            send(&peer, b"x", &vec![passed.as_fd(); count]).expect("room");
            receive_with_free(&mut reactor, free, || !told.0.borrow().is_empty());
            settle(&mut reactor);
            let expected = (count.min(free), free < count);
            lost += usize::from(expected.1);
            wrong += usize::from(told.0.take() != [expected]);
        }
        let counts = reactor.descriptor_counts();
        Figures::of("T-3")
            .must(
                "receipts of a protocol",
                repeats,
                Bound::AtLeast,
                scaled(1_000, 10_000),
            )
            .must("truncations among them", lost, Bound::AtLeast, repeats / 4)
            .must("told otherwise than they were", wrong, Bound::Exactly, 0)
            .must(
                "truncations counted",
                counts.truncations as usize,
                Bound::Exactly,
                lost,
            )
            .must(
                "left open",
                open_descriptors().difference(&before).count(),
                Bound::Exactly,
                0,
            );
    });
}

/// Reliability T-8: descriptors that are lost cost their frame, or the
/// connection, as the receiver has it; never is one paired with another frame.
#[test]
fn truncation_costs_its_own_frame_or_the_connection() {
    in_own_process(
        module_path!(),
        "truncation_costs_its_own_frame_or_the_connection",
        || {
            let mut random = Random::new(8);
            let mut files = Files::new();
            let mut reactor = Reactor::new().unwrap();
            // It is the kernel that is to lose them.
            reactor.set_descriptor_reserve(0);
            let (mut truncations, mut frames, mut wrong) = (0, 0, 0);
            let (_, peer, collected) =
                framed(&mut reactor, AfterTruncation::KeepConnection, Rule::Exact);
            while truncations < 1_000 {
                // Several, so that the next one lies behind the one that is cut.
                let free = random.below(20);
                let mut sent = Vec::new();
                for _ in 0..1 + random.below(3) {
                    let (passed, known) = files.take(random.below(17));
                    let length = size(&mut random, 5_000);
                    let frame = encoded(&mut random, length, passed.len());
                    send_frame(&peer, &frame, &passed);
                    sent.push((frame, known));
                }
                frames += sent.len();
                receive_with_free(&mut reactor, free, || {
                    let collected = collected.borrow();
                    collected.frames.len() + collected.truncated.len() == sent.len()
                });
                let mut collected = collected.borrow_mut();
                for (frame, known) in sent {
                    // Each is closed before the next comes: all find as many numbers.
                    if free < known.len() {
                        truncations += 1;
                        let cut = collected.truncated.pop_front();
                        wrong += usize::from(cut.as_deref() != Some(&frame[4..]));
                    } else {
                        let whole = collected.frames.pop_front();
                        wrong += usize::from(whole != Some((frame[4..].to_vec(), known)));
                    }
                }
                assert!(collected.frames.is_empty() && collected.truncated.is_empty());
            }
            assert_eq!(collected.borrow().notices, truncations);
            let counted = reactor.descriptor_counts().truncations as usize;
            assert_eq!(counted, truncations);
            // The other policy: the default.
            let mut ended = 0;
            for _ in 0..100 {
                let (_, peer, collected) =
                    framed(&mut reactor, AfterTruncation::LoseConnection, Rule::Exact);
                let (passed, _) = files.take(1 + random.below(16));
                let free = random.below(passed.len());
                let frame = encoded(&mut random, 100, passed.len());
                send_frame(&peer, &frame, &passed);
                // It would come next, and does not any more.
                send_frame(&peer, &frame, &[]);
                receive_with_free(&mut reactor, free, || collected.borrow().lost.is_some());
                let collected = collected.borrow();
                let expected = format!("received descriptors were truncated to {free}");
                ended += usize::from(collected.lost.as_ref() == Some(&expected));
                assert!(collected.frames.is_empty() && collected.truncated.is_empty());
            }
            Figures::of("T-8")
                .must("truncations", truncations, Bound::AtLeast, 1_000)
                .must(
                    "frames before, between and behind them",
                    frames - truncations,
                    Bound::AtLeast,
                    1_000,
                )
                .must("frames paired wrongly", wrong, Bound::Exactly, 0)
                .must(
                    "connections ended by the default",
                    ended,
                    Bound::Exactly,
                    100,
                );
        },
    );
}
