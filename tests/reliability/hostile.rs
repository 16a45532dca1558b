//! Peers that mean harm, one at a time.

use std::cell::{Cell, RefCell};
use std::io::Write;
use std::net::{TcpListener as StdTcpListener, TcpStream as StdTcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener as StdUnixListener, UnixStream as StdUnixStream};
use std::path::Path;
use std::rc::Rc;
use std::time::{Duration, Instant};

use bowline::framing::{FrameContext, FrameReceiver, Framed, LengthPrefixedFramer, Pairing};
use bowline::testing::ManualClock;
use bowline::{
    AnyConnection as _, CloseReason, Context, DescriptorLimits, ProducerKind, ProducerRef,
    Protocol, Reactor, ReceivedDescriptors, Transport, Transports, UnixStream,
};
use rustix::net::SendFlags;

use crate::peer::{
    BytesOnly, OneByOne, Seen, adopt, file, raise_descriptor_limit, send, send_message, transport,
};
use crate::support::figures::{Bound, Figures, scaled};
use crate::support::own_process::{
    in_own_process, leave_free, limit_descriptors, resident_bytes, thread_time,
};
use crate::support::{
    DEADLINE, DescriptorLedger, Record, Recorder, run_until, run_until_quiet, socketpair,
};

/// Counts frames, keeps the descriptors of none.
struct Frames {
    received: Rc<Cell<usize>>,
    lost: Rc<RefCell<Option<String>>>,
}

type FrameCx<'a> = FrameContext<'a, UnixStream, LengthPrefixedFramer>;

impl FrameReceiver<UnixStream, LengthPrefixedFramer> for Frames {
    fn frame_received(&mut self, cx: &mut FrameCx<'_>, _: &[u8]) {
        drop(cx.framing.descriptors().collect::<Vec<OwnedFd>>());
        self.received.set(self.received.get() + 1);
    }

    fn connection_lost(&mut self, _: &mut FrameCx<'_>, reason: &CloseReason) {
        *self.lost.borrow_mut() = Some(reason.to_string());
    }
}

/// Frames with exactly their descriptors; how many came, and how it ended.
#[expect(clippy::type_complexity, reason = "named where it is taken apart")]
fn frames() -> (
    Framed<LengthPrefixedFramer, Frames>,
    Rc<Cell<usize>>,
    Rc<RefCell<Option<String>>>,
) {
    let (received, lost) = (Rc::default(), Rc::default());
    let frames = Frames {
        received: Rc::clone(&received),
        lost: Rc::clone(&lost),
    };
    let protocol = Framed::new(LengthPrefixedFramer::u32(), frames).pairing(Pairing::Exact);
    (protocol, received, lost)
}

/// Reliability T-11: descriptors whose frame never becomes complete are closed at
/// the deadline, in real time; a peer that is only slow is served for as long as
/// it likes, in the time of a clock that is moved by hand.
#[test]
fn descriptors_of_an_unfinished_frame_are_closed_at_the_deadline() {
    let ledger = DescriptorLedger::open();
    {
        let deadline = scaled(Duration::from_secs(1), Duration::from_secs(30));
        let mut reactor = Reactor::new().unwrap();
        let (protocol, received, lost) = frames();
        let protocol = protocol.descriptor_deadline(Some(deadline));
        let (_, peer) = adopt(&mut reactor, protocol);
        // Announced as of 100 bytes, of which one comes.
        let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::NONBLOCK).unwrap();
        let began = Instant::now();
        send_message(&peer, &[0, 0, 0, 100, b'x'], &[write, file()]);
        let is_closed = || rustix::io::read(&read, &mut [0; 1]) == Ok(0);
        while lost.borrow().is_none() {
            assert!(!is_closed(), "closed while its frame may be completed");
            // What a busy machine takes longer is not the library's.
            assert!(began.elapsed() < deadline + 6 * DEADLINE, "still open");
            reactor.turn(Some(Duration::from_millis(50)));
        }
        assert!(
            is_closed(),
            "the connection has ended, and what came is open"
        );
        let took = began.elapsed().as_secs_f64() / deadline.as_secs_f64();
        assert!(took >= 0.9, "closed after {took} of the deadline");
        let off = (took - 1.0).abs() * 100.0;
        assert_eq!(received.get(), 0);
        assert_eq!(reactor.descriptor_counts().unclaimed, 2);
        Figures::of("T-11").measured("closed off the deadline by", off, "%", Bound::AtMost, 10.0);
    }
    {
        let clock = ManualClock::new();
        let mut reactor = Reactor::with_clock(clock.clone()).unwrap();
        let (protocol, received, lost) = frames();
        let (_, peer) = adopt(&mut reactor, protocol);
        // One frame a second for ten minutes; at every moment the descriptors of
        // an unfinished one are here.
        for second in 0..600 {
            send_message(&peer, &[0, 0, 0, 2, b'x'], &[file()]);
            run_until_quiet(&mut reactor);
            clock.advance(Duration::from_secs(1));
            send_message(&peer, b"y", &[]);
            run_until(&mut reactor, |_| received.get() == second + 1);
        }
        // Nothing is waited for after that.
        clock.advance(Duration::from_secs(300));
        run_until_quiet(&mut reactor);
        let cut = usize::from(lost.borrow().is_some());
        Figures::of("T-11")
            .must(
                "frames of a slow sender",
                received.get(),
                Bound::Exactly,
                600,
            )
            .must("slow senders cut", cut, Bound::Exactly, 0);
        // And the same one is cut when it stops in the middle.
        send_message(&peer, &[0, 0, 0, 2, b'x'], &[file()]);
        run_until_quiet(&mut reactor);
        clock.advance(Duration::from_secs(29));
        run_until_quiet(&mut reactor);
        assert!(lost.borrow().is_none(), "cut before the deadline");
        clock.advance(Duration::from_secs(1));
        run_until(&mut reactor, |_| lost.borrow().is_some());
    }
    ledger.assert_balanced();
}

/// A receiver that pauses its transport cannot blame the peer.
#[test]
fn deadline_of_an_unfinished_frame_waits_while_reading_is_paused() {
    let ledger = DescriptorLedger::open();
    {
        let clock = ManualClock::new();
        let mut reactor = Reactor::with_clock(clock.clone()).unwrap();
        let (protocol, received, lost) = frames();
        let (handle, peer) = adopt(&mut reactor, protocol);
        send_message(&peer, &[0, 0, 0, 2, b'x'], &[file()]);
        run_until_quiet(&mut reactor);
        transport(&mut reactor, handle).pause_producing();
        clock.advance(Duration::from_secs(300));
        run_until_quiet(&mut reactor);
        transport(&mut reactor, handle).resume_producing();
        send_message(&peer, b"y", &[]);
        run_until(&mut reactor, |_| received.get() == 1);
        // It counts from the end of the pause on.
        send_message(&peer, &[0, 0, 0, 2, b'x'], &[file()]);
        run_until_quiet(&mut reactor);
        transport(&mut reactor, handle).pause_producing();
        clock.advance(Duration::from_secs(300));
        run_until_quiet(&mut reactor);
        transport(&mut reactor, handle).resume_producing();
        run_until_quiet(&mut reactor);
        clock.advance(Duration::from_secs(30));
        run_until(&mut reactor, |_| lost.borrow().is_some());
    }
    ledger.assert_balanced();
}

/// How a peer vanishes.
#[derive(Clone, Copy, Debug)]
enum Vanishing {
    Closed,
    HalfClosed,
    Reset,
}

/// Reliability T-14.
#[test]
fn paused_connections_whose_peers_vanish_cost_nothing_and_end_once() {
    let ledger = DescriptorLedger::open();
    {
        raise_descriptor_limit();
        const EACH: usize = 333;
        let record: Vec<Record> = (0..3 * EACH + 1).map(|_| Record::default()).collect();
        let mut reactor = Reactor::new().unwrap();
        let listener = StdTcpListener::bind(("127.0.0.1", 0)).unwrap();
        let mut handles = Vec::new();
        let mut half_open = Vec::new();
        for (number, record) in record.iter().enumerate() {
            let way = [Vanishing::Closed, Vanishing::HalfClosed, Vanishing::Reset][number % 3];
            if let Vanishing::Reset = way {
                let mut peer = StdTcpStream::connect(listener.local_addr().unwrap()).unwrap();
                let (ours, _) = listener.accept().unwrap();
                let handle = reactor
                    .adopt_tcp_stream(ours.into(), Recorder::new(record))
                    .unwrap();
                reactor.get(handle).unwrap().pause_producing();
                peer.write_all(b"data").unwrap();
                run_until_quiet_once(&mut reactor);
                rustix::net::sockopt::set_socket_linger(&peer, Some(Duration::ZERO)).unwrap();
                handles.push(reactor.get(handle).unwrap().handle());
                continue;
            }
            let (handle, mut peer) = adopt(&mut reactor, Recorder::new(record));
            let it = transport(&mut reactor, handle);
            it.pause_producing();
            handles.push(it.handle());
            peer.write_all(b"data").unwrap();
            if let Vanishing::HalfClosed = way {
                peer.shutdown(std::net::Shutdown::Write).unwrap();
                half_open.push(peer);
            }
        }
        run_until_quiet(&mut reactor);
        let wait = scaled(Duration::from_secs(1), Duration::from_secs(10));
        let (turns, began, busy) = (reactor.statistics().turns, Instant::now(), thread_time());
        while began.elapsed() < wait {
            reactor.turn(Some(wait.saturating_sub(began.elapsed())));
        }
        let seconds = began.elapsed().as_secs_f64();
        let turns = (reactor.statistics().turns - turns) as f64 / seconds;
        let busy = (thread_time() - busy) as f64 / 1e7 / seconds;
        let was_reset = |number: usize| number % 3 == 2;
        for (number, handle) in handles.iter().enumerate() {
            // Told of a reset, the default goes on.
            let told: &[&str] = match was_reset(number) {
                true => &["made", "broken pieces"],
                false => &["made"],
            };
            assert_eq!(record[number].summary(), told, "connection {number}");
            let still_there = reactor.get(*handle).expect("it waits");
            still_there.resume_producing();
        }
        run_until(&mut reactor, |_| record.iter().all(Record::is_lost));
        run_until_quiet(&mut reactor);
        let mut wrong = 0;
        for (number, record) in record.iter().enumerate() {
            let told = record.summary();
            let (end, before) = told.split_last().unwrap();
            let before: Vec<&str> = before.iter().map(String::as_str).collect();
            let is_right = match was_reset(number) {
                true => {
                    end == "lost connection lost"
                        && before == ["made", "broken pieces", "reading resumed", "data 4"]
                }
                false => {
                    end == "lost closed cleanly" && before == ["made", "reading resumed", "data 4"]
                }
            };
            wrong += usize::from(!is_right);
            assert!(is_right, "{told:?}");
        }
        Figures::of("T-14")
            .must("connections", record.len(), Bound::AtLeast, 1_000)
            .measured("turns a second", turns, "", Bound::Below, 5.0)
            .measured("processor", busy, "%", Bound::Below, 1.0)
            .must("without data, then one end", wrong, Bound::Exactly, 0);
    }
    ledger.assert_balanced();
}

/// A few turns, so that what was sent to TCP has arrived.
fn run_until_quiet_once(reactor: &mut Reactor) {
    reactor.turn(Some(Duration::ZERO));
}

/// Reliability T-15, of streams: urgent data, with and without a descriptor, and a message
/// of no bytes that has one, which the kernel drops.
#[test]
fn urgent_data_is_no_end_and_its_descriptors_are_closed() {
    let ledger = DescriptorLedger::open();
    {
        let rounds = scaled(200, 5_000);
        let (mut hung, mut held, mut open) = (0, 0, 0);
        for round in 0..rounds {
            let seen = Seen::default();
            let mut reactor = Reactor::new().unwrap();
            let (_, peer) = adopt(&mut reactor, OneByOne::new(&seen, |_, _| Ok(())));
            let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
            rustix::io::ioctl_fionbio(&read, true).unwrap();
            send_message(&peer, b"a", &[]);
            let passed = [write.as_fd()];
            match round % 3 {
                0 => urgent(&peer, &passed),
                1 => urgent(&peer, &[]),
                _ => assert_eq!(send(&peer, b"", &passed).expect("room"), 0),
            }
            drop(write);
            send_message(&peer, b"b", &[]);
            run_until_quiet(&mut reactor);
            // The byte after it arrives at once, and not with the next.
            if !seen.all().concat().contains('b') {
                held += 1;
                send_message(&peer, b"c", &[]);
                run_until_quiet(&mut reactor);
            }
            let told = seen.all();
            hung += usize::from(!told.concat().contains('b'));
            assert!(!seen.has("lost"), "{told:?}");
            open += usize::from(rustix::io::read(&read, &mut [0; 1]) != Ok(0));
        }
        Figures::of("T-15")
            .must(
                "urgent bytes, and descriptors without any",
                rounds,
                Bound::AtLeast,
                scaled(200, 5_000),
            )
            .must("connections hung", hung, Bound::Exactly, 0)
            .must("bytes that waited for another", held, Bound::Exactly, 0)
            .must("descriptors left open", open, Bound::Exactly, 0);
    }
    ledger.assert_balanced();
}

fn urgent(peer: &StdUnixStream, descriptors: &[BorrowedFd<'_>]) {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage};
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(descriptors)));
    }
    let data = [std::io::IoSlice::new(b"!")];
    let flags = SendFlags::NOSIGNAL | SendFlags::OOB;
    rustix::net::sendmsg(peer, &data, &mut control, flags).unwrap();
}

/// Who sends what to whom, so that sockets lie in each other's queues.
fn tie(pattern: usize, ours: &StdUnixStream, theirs: &StdUnixStream, canary: BorrowedFd<'_>) {
    let more: Vec<(StdUnixStream, StdUnixStream)> = (0..2).map(|_| socketpair()).collect();
    let to = |to: &StdUnixStream, what: BorrowedFd<'_>| {
        send(to, b"x", &[what, canary]).expect("room");
    };
    match pattern {
        // Our own end, the peer's, both: in our queue.
        0 => to(theirs, ours.as_fd()),
        1 => to(theirs, theirs.as_fd()),
        2 => {
            to(theirs, ours.as_fd());
            to(theirs, theirs.as_fd());
        }
        // Two pairs that hold each other.
        3 => {
            to(theirs, more[0].0.as_fd());
            to(&more[0].1, ours.as_fd());
        }
        // Three.
        4 => {
            to(theirs, more[0].0.as_fd());
            to(&more[0].1, more[1].0.as_fd());
            to(&more[1].1, ours.as_fd());
        }
        // A listener with a connection that nobody accepted and that has the
        // listener in its queue; sent to us.
        _ => {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("socket");
            let listener = StdUnixListener::bind(&path).unwrap();
            let embryo = StdUnixStream::connect(&path).unwrap();
            to(&embryo, listener.as_fd());
            to(theirs, listener.as_fd());
        }
    }
}

/// What becomes of sockets that a peer sends tied into each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// Nobody here wants them.
    Unwanted,
    /// They are of a frame that never becomes complete.
    Unfinished,
    /// The protocol takes them, and lets go of them when its connection is lost or
    /// they have all come.
    Taken,
    /// They lie unread in our socket when we close it.
    Unread,
}

/// Reliability T-17, R-29: whatever sockets a peer ties into each other, none of
/// ours stays open, and that while the connection goes on: our own end is refused, what
/// nobody wants is closed, what waits for the rest of its frame has its deadline. What
/// we do not hold is the kernel's to collect.
#[test]
fn sockets_tied_into_each_other_leave_nothing_open() {
    const FATES: [Fate; 4] = [Fate::Unwanted, Fate::Unfinished, Fate::Taken, Fate::Unread];
    let ledger = DescriptorLedger::open();
    let (mut patterns, mut left, mut refused, mut cut_off) = (0, 0, 0, 0);
    let mut longest = Duration::ZERO;
    for pattern in 0..6 {
        for fate in FATES {
            let (record, seen) = (Record::default(), Seen::default());
            let mut reactor = Reactor::new().unwrap();
            let (ours, theirs) = socketpair();
            let (frames, _, lost) = frames();
            let fd = OwnedFd::from(ours.try_clone().unwrap());
            let handle = match fate {
                Fate::Unwanted => {
                    let protocol = BytesOnly { seen: seen.clone() };
                    reactor.adopt_unix_stream(fd, protocol)
                }
                Fate::Unfinished => {
                    let soon = Some(Duration::from_millis(50));
                    reactor.adopt_unix_stream(fd, frames.descriptor_deadline(soon))
                }
                _ => reactor.adopt_unix_stream(fd, Recorder::new(&record)),
            };
            let handle = handle.unwrap();
            if fate == Fate::Unread {
                transport(&mut reactor, handle).pause_producing();
            }
            let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
            rustix::io::ioctl_fionbio(&read, true).unwrap();
            tie(pattern, &ours, &theirs, write.as_fd());
            drop((ours, write));
            // The peer stays, so that nothing ends for want of it.
            let peer = theirs;
            run_until_quiet(&mut reactor);
            match fate {
                Fate::Taken => drop(record.take_descriptors()),
                // This is the fate itself.
                Fate::Unread => reactor.get(handle).unwrap().abort_connection(),
                _ => {}
            }
            // What lies in each other's queues only is collected when any other
            // UNIX socket closes, by a thread of the kernel: on a busy machine later.
            let began = Instant::now();
            let mut is_gone = false;
            while !is_gone && began.elapsed() < 6 * DEADLINE {
                reactor.turn(Some(Duration::from_millis(1)));
                drop(socketpair());
                is_gone = rustix::io::read(&read, &mut [0; 1]) == Ok(0);
            }
            left += usize::from(!is_gone);
            longest = longest.max(began.elapsed());
            patterns += 1;
            let end = [record.summary(), seen.all()].concat().concat();
            let end = end + &lost.borrow().clone().unwrap_or_default();
            refused += usize::from(end.contains("its own socket"));
            cut_off += usize::from(fate == Fate::Unfinished && end == "aborted by us");
            // Only what was refused, or late, ended the connection.
            let goes_on = matches!(fate, Fate::Unwanted | Fate::Taken) && !is_own(pattern);
            assert_eq!(
                reactor.get(handle).is_some(),
                goes_on,
                "{pattern} {fate:?} {end}"
            );
            drop((peer, reactor));
        }
    }
    Figures::of("T-17")
        .must("patterns, times four fates", patterns, Bound::Exactly, 24)
        .must("refused as our own", refused, Bound::Exactly, 6)
        .must("cut off at the deadline", cut_off, Bound::Exactly, 4)
        .must("left open", left, Bound::Exactly, 0)
        .measured(
            "open for at most",
            longest.as_secs_f64(),
            "s",
            Bound::Below,
            5.0,
        );
    ledger.assert_balanced();
}

/// Whether the pattern has our own end in what we are sent.
fn is_own(pattern: usize) -> bool {
    matches!(pattern, 0 | 2)
}

/// A transport does not queue its own socket in itself.
#[test]
fn own_socket_that_was_lent_is_not_sent() {
    let ledger = DescriptorLedger::open();
    {
        let mut reactor = Reactor::new().unwrap();
        let (handle, _peer) = adopt(&mut reactor, Recorder::default());
        let it = transport(&mut reactor, handle);
        let copy = |it: &mut dyn bowline::UnixTransport| {
            let lent = it.socket_descriptor().unwrap();
            lent.try_clone_to_owned().unwrap()
        };
        let own = copy(it);
        let error = it.send_file_descriptor(own.into()).unwrap_err();
        assert_eq!(
            error.kind,
            bowline::error::SendDescriptorErrorKind::OwnSocket
        );
        let own = copy(it);
        let error = it
            .write_with_descriptors(b"x", vec![file().into(), own.into()])
            .unwrap_err();
        assert_eq!(
            error.kind,
            bowline::error::SendDescriptorErrorKind::OwnSocket
        );
        assert_eq!(error.descriptors.len(), 2, "they come back");
        it.send_file_descriptor(file().into()).unwrap();
    }
    ledger.assert_balanced();
}

/// What we have not read is not lost to those who hold the socket too.
#[test]
fn copy_of_a_lent_socket_keeps_what_was_unread() {
    let ledger = DescriptorLedger::open();
    {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let record = Record::default();
        let recorder = record.clone();
        let mut reactor = Reactor::new().unwrap();
        reactor
            .listen_unix(path.clone(), move |_: &bowline::Address| {
                Recorder::new(&recorder)
            })
            .unwrap();
        let peer = StdUnixStream::connect(&path).unwrap();
        run_until(&mut reactor, |_| !record.summary().is_empty());
        let it = reactor.get(record.handle(0)).unwrap();
        it.pause_producing();
        let lent = it.socket_descriptor().unwrap();
        let copy = StdUnixStream::from(lent.try_clone_to_owned().unwrap());
        send_message(&peer, b"for the other", &[file()]);
        run_until_quiet(&mut reactor);
        let it = reactor.get(record.handle(0)).unwrap();
        it.abort_connection();
        run_until(&mut reactor, |_| record.is_lost());
        let message = crate::peer::receive(&copy, 100).unwrap();
        assert_eq!(
            (&message.data[..], message.descriptors.len()),
            (&b"for the other"[..], 1)
        );
        // Nor does anything keep descriptors from it.
        send_message(&peer, b"more", &[file()]);
    }
    ledger.assert_balanced();
}

/// A TCP socket whose last close waits a minute, since its peer, the second, does
/// not read.
fn lingering_socket(linger: Duration) -> (OwnedFd, StdTcpStream) {
    let listener = StdTcpListener::bind(("127.0.0.1", 0)).unwrap();
    let mut socket = StdTcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (peer, _) = listener.accept().unwrap();
    socket.set_nonblocking(true).unwrap();
    while socket.write(&[0; 65_536]).is_ok() {}
    rustix::net::sockopt::set_socket_linger(&socket, Some(linger)).unwrap();
    (socket.into(), peer)
}

/// The longest turn until it is done.
fn longest_turn(reactor: &mut Reactor, mut is_done: impl FnMut(&mut Reactor) -> bool) -> Duration {
    let mut longest = Duration::ZERO;
    run_until(reactor, |reactor| {
        // The turn itself, and not how long it waited for something to do.
        let began = Instant::now();
        reactor.turn(Some(Duration::ZERO));
        longest = longest.max(began.elapsed());
        is_done(reactor)
    });
    longest
}

/// What becomes of a descriptor that was sent.
const CASES: [&str; 6] = [
    "wanted",
    "unwanted",
    "over a limit",
    "truncated",
    "over the reserve",
    "unread at close",
];

/// The longest turn, or close, of a connection that is sent `hostile` with another
/// descriptor, and does with them what the case says; `close` closes what it took.
/// None if it did not come to that.
fn stall(case: &str, path: &Path, hostile: OwnedFd, close: fn(OwnedFd)) -> Option<Duration> {
    let (seen, record) = (Seen::default(), Record::default());
    let mut reactor = Reactor::new().unwrap();
    let (builder, recorder) = (seen.clone(), record.clone());
    let [is_wanted, is_limited, is_paused] =
        ["wanted", "over a limit", "unread at close"].map(|it| case == it);
    reactor
        .listen_unix(path, move |_: &bowline::Address| Hostile {
            is_wanted,
            is_limited,
            is_paused,
            seen: builder.clone(),
            record: recorder.clone(),
        })
        .unwrap();
    let peer = StdUnixStream::connect(path).unwrap();
    run_until(&mut reactor, |_| seen.has("made"));
    send_message(&peer, b"x", &[hostile, file()]);
    let mut fillers = Vec::new();
    match case {
        // The hostile one finds the last number.
        "truncated" => leave_free(1),
        // A third of a small table is the reserve's: all others are taken.
        "over the reserve" => {
            limit_descriptors(60);
            while fillers
                .last()
                .is_none_or(|fd: &OwnedFd| fd.as_raw_fd() < 45)
            {
                fillers.push(file());
            }
        }
        _ => {}
    }
    let longest = match case {
        "unread at close" => {
            run_until_quiet(&mut reactor);
            reactor.get(record.handle(0)).unwrap().abort_connection();
            longest_turn(&mut reactor, |_| seen.has("lost"))
        }
        "over a limit" | "truncated" | "over the reserve" => {
            longest_turn(&mut reactor, |_| seen.has("lost"))
        }
        _ => longest_turn(&mut reactor, |_| seen.has("data")),
    };
    limit_descriptors(1_000);
    let counts = reactor.descriptor_counts();
    let refused = match case {
        "over a limit" | "over the reserve" | "unread at close" => 2,
        // Another thread can have had a number for a moment, which was free then.
        "truncated" if counts.truncations == 0 => return None,
        "truncated" => 1,
        _ => 0,
    };
    assert_eq!(counts.refused, refused, "{case}");
    let began = Instant::now();
    record.take_descriptors().into_iter().for_each(close);
    Some(longest.max(began.elapsed()))
}

/// As [`stall`], with what `hostile` makes, and what keeps that from ending by itself.
fn longest_stall(
    case: &str,
    path: &Path,
    close: fn(OwnedFd),
    mut hostile: impl FnMut() -> (OwnedFd, StdTcpStream),
) -> Duration {
    let mut tries = (0..20).filter_map(|_| {
        let (hostile, _unread) = hostile();
        let longest = stall(case, path, hostile, close);
        let _ = std::fs::remove_file(path);
        longest
    });
    tries.next().expect("one of many")
}

/// Reliability T-18: a socket that lingers does not stall the loop, wherever it
/// is closed.
#[test]
fn descriptors_that_linger_do_not_stall_the_loop() {
    let name = "descriptors_that_linger_do_not_stall_the_loop";
    in_own_process(module_path!(), name, || {
        const MINUTE: Duration = Duration::from_secs(60);
        let figures = Figures::of("T-18");
        let directory = tempfile::tempdir().unwrap();
        for case in CASES {
            let path = directory.path().join(case);
            let longest = longest_stall(case, &path, drop, || lingering_socket(MINUTE));
            let longest = longest.as_secs_f64() * 1e3;
            figures.measured(&format!("stall, {case}"), longest, "ms", Bound::Below, 20.0);
            // On a loaded machine too it is far from a minute.
            assert!(longest < 5_000.0, "{case}: {longest} ms");
        }
        // Refused by the kernel: the sender has it still.
        let seen = Seen::default();
        let mut reactor = Reactor::new().unwrap();
        let (handle, peer) = adopt(&mut reactor, BytesOnly { seen: seen.clone() });
        transport(&mut reactor, handle)
            .set_descriptors_accepted(false)
            .unwrap();
        let (hostile, _unread) = lingering_socket(MINUTE);
        assert!(send(&peer, b"x", &[hostile.as_fd()]).is_err());
        send_message(&peer, b"x", &[]);
        let longest = longest_turn(&mut reactor, |_| seen.has("data"));
        let longest = longest.as_secs_f64() * 1e3;
        figures.measured(
            "stall, refused in the kernel",
            longest,
            "ms",
            Bound::Below,
            20.0,
        );
        rustix::net::sockopt::set_socket_linger(&hostile, None).unwrap();
        drop((hostile, reactor));

        // What remains: the kernel itself closes what finds no number, in the
        // call that reads. It takes a program that has filled its own table.
        let seen = Seen::default();
        let mut reactor = Reactor::new().unwrap();
        let (_, peer) = adopt(&mut reactor, BytesOnly { seen: seen.clone() });
        let (hostile, _unread) = lingering_socket(Duration::from_secs(1));
        send_message(&peer, b"x", &[hostile]);
        leave_free(0);
        let longest = longest_turn(&mut reactor, |_| seen.has("lost"));
        limit_descriptors(1_000);
        figures.remark(&format!(
            "residual: with no number free at all the kernel closes it in our read, which took \
             {:.0} ms of a linger of 1 s; the reserve keeps room for that",
            longest.as_secs_f64() * 1e3
        ));
    });
}

/// A UNIX socket in whose queue, so many queues down, a socket lies that lingers for a
/// minute; beside it, what keeps that from ending by itself.
fn nested(depth: usize) -> (OwnedFd, StdTcpStream) {
    let (inner, unread) = lingering_socket(Duration::from_secs(60));
    (nested_in(depth, inner), unread)
}

fn nested_in(depth: usize, mut inner: OwnedFd) -> OwnedFd {
    for _ in 0..depth {
        let (sender, holder) = socketpair();
        send_message(&sender, b"x", &[inner]);
        inner = holder.into();
    }
    inner
}

/// Reliability T-18: nor does one that lies unread in a socket that we close: one that
/// was sent to us, or our own.
#[test]
fn descriptors_inside_of_others_do_not_stall_the_loop() {
    let name = "descriptors_inside_of_others_do_not_stall_the_loop";
    in_own_process(module_path!(), name, || {
        let directory = tempfile::tempdir().unwrap();
        for (case, depth) in CASES.iter().flat_map(|case| [(*case, 1), (*case, 3)]) {
            let path = directory.path().join(format!("{case}{depth}"));
            let close = bowline::process::close_received;
            let longest = longest_stall(case, &path, close, || nested(depth));
            not_stalled(&format!("{case}, {depth} down"), longest);
        }
    });
}

/// Reliability T-18: however many of them are sent, there is somebody to close the next,
/// and to close on a client that is not wanted.
#[test]
fn many_descriptors_inside_of_others_hold_up_nobody() {
    let name = "many_descriptors_inside_of_others_hold_up_nobody";
    in_own_process(module_path!(), name, || {
        raise_descriptor_limit();
        const MOST_ASLEEP: usize = 64;
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let mut reactor = Reactor::new().unwrap();
        reactor.listen_unix(path.clone(), Declines).unwrap();
        let mut unread = Vec::new();
        let mut longest = Duration::ZERO;
        for _ in 0..3 {
            let seen = Seen::default();
            let (_, peer) = adopt(&mut reactor, BytesOnly { seen: seen.clone() });
            let sockets: Vec<OwnedFd> = (0..40)
                .map(|_| {
                    let (inner, unread_end) = small_lingering_socket();
                    unread.push(unread_end);
                    nested_in(2, inner)
                })
                .collect();
            send_message(&peer, b"x", &sockets);
            drop(sockets);
            longest = longest.max(longest_turn(&mut reactor, |_| seen.has("data")));
        }
        not_stalled("by 120 inside of others", longest);
        run_until(&mut reactor, |_| {
            bowline::process::descriptors_closing() == MOST_ASLEEP
        });
        let mut client = StdUnixStream::connect(&path).unwrap();
        client.set_nonblocking(true).unwrap();
        run_until(&mut reactor, |_| {
            std::io::Read::read(&mut client, &mut [0; 1]).is_ok_and(|bytes| bytes == 0)
        });
    });
}

/// As [`lingering_socket`], with little in it.
fn small_lingering_socket() -> (OwnedFd, StdTcpStream) {
    use rustix::net::sockopt;
    let listener = StdTcpListener::bind(("127.0.0.1", 0)).unwrap();
    sockopt::set_socket_recv_buffer_size(&listener, 4_096).unwrap();
    let mut socket = StdTcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (peer, _) = listener.accept().unwrap();
    sockopt::set_socket_send_buffer_size(&socket, 4_096).unwrap();
    socket.set_nonblocking(true).unwrap();
    while socket.write(&[0; 65_536]).is_ok() {}
    sockopt::set_socket_linger(&socket, Some(Duration::from_secs(600))).unwrap();
    (socket.into(), peer)
}

/// Declines everybody.
struct Declines;

impl bowline::Factory for Declines {
    type Protocol = BytesOnly;

    fn build_protocol(
        &mut self,
        _: &mut bowline::BuildContext<'_>,
        _: &bowline::Address,
    ) -> Option<BytesOnly> {
        None
    }
}

/// Reliability T-18: a client that sends a socket that lingers, and that we close
/// before we have read it.
#[test]
fn clients_that_nobody_serves_do_not_stall_the_loop() {
    let name = "clients_that_nobody_serves_do_not_stall_the_loop";
    in_own_process(module_path!(), name, || {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let client = |unread: &mut Vec<StdTcpStream>| {
            let client = StdUnixStream::connect(&path).unwrap();
            let (hostile, peer) = lingering_socket(Duration::from_secs(60));
            send_message(&client, b"x", &[hostile]);
            unread.push(peer);
            client
        };
        let mut unread = Vec::new();
        let mut reactor = Reactor::new().unwrap();
        let listener = reactor.listen_unix(path.clone(), Declines).unwrap();
        let mut declined = client(&mut unread);
        declined.set_nonblocking(true).unwrap();
        let longest = longest_turn(&mut reactor, |_| {
            std::io::Read::read(&mut declined, &mut [0; 1]).is_ok_and(|bytes| bytes == 0)
        });
        not_stalled("declined", longest);
        reactor.get(listener).unwrap().pause_accepting();
        let _waits = client(&mut unread);
        reactor.get(listener).unwrap().stop_listening();
        let longest = longest_turn(&mut reactor, |reactor| reactor.get(listener).is_none());
        not_stalled("never accepted", longest);

        // Adopted: others may hold the socket, so it is not read out.
        let seen = Seen::default();
        let (ours, peer) = socketpair();
        let handle = reactor
            .adopt_unix_stream(ours.into(), BytesOnly { seen: seen.clone() })
            .unwrap();
        transport(&mut reactor, handle).pause_producing();
        let (hostile, peer_of_it) = lingering_socket(Duration::from_secs(60));
        unread.push(peer_of_it);
        send_message(&peer, b"x", &[hostile]);
        transport(&mut reactor, handle).abort_connection();
        let longest = longest_turn(&mut reactor, |_| seen.has("lost"));
        not_stalled("adopted", longest);
    });
}

#[track_caller]
fn not_stalled(case: &str, longest: Duration) {
    let longest = longest.as_secs_f64() * 1e3;
    Figures::of("T-18").measured(&format!("stall, {case}"), longest, "ms", Bound::Below, 20.0);
    // On a loaded machine too it is far from a minute.
    assert!(longest < 5_000.0, "{case}: {longest} ms");
}

/// Does with descriptors what a case wants.
struct Hostile {
    is_wanted: bool,
    is_limited: bool,
    is_paused: bool,
    seen: Seen,
    record: Record,
}

impl Protocol<UnixStream> for Hostile {
    fn connection_made(&mut self, cx: &mut Context<'_, UnixStream>) {
        use bowline::UnixTransport;
        if self.is_paused {
            cx.transport.pause_producing();
        }
        if self.is_limited {
            cx.transport
                .set_descriptor_limits(DescriptorLimits::default().received_per_read(1));
        }
        Recorder::new(&self.record).connection_made(cx);
        self.seen.push("made");
    }

    fn descriptors_received(
        &mut self,
        cx: &mut Context<'_, UnixStream>,
        descriptors: &mut ReceivedDescriptors<'_>,
        data: &[u8],
    ) {
        if self.is_wanted {
            Recorder::new(&self.record).descriptors_received(cx, descriptors, data);
        }
        self.data_received(cx, data);
    }

    fn data_received(&mut self, _: &mut Context<'_, UnixStream>, _: &[u8]) {
        self.seen.push("data");
    }

    fn connection_lost(&mut self, _: &mut Context<'_, UnixStream>, _: &CloseReason) {
        self.seen.push("lost");
    }
}

/// What those that pour have in common.
#[derive(Default)]
struct Poured {
    written: Cell<usize>,
    pauses: Cell<usize>,
    resumed: Cell<usize>,
    /// Portions that were written in the turn after the one that had filled the buffer: its
    /// writer ought to have been told by then.
    late: Cell<usize>,
}

/// Writes a portion in every turn, whatever a write answers, until it is told to pause.
struct Pouring {
    left: usize,
    is_paused: bool,
    poured: Rc<Poured>,
}

const PORTION: [u8; 4_096] = [7; 4_096];

impl Pouring {
    fn pour(&mut self, cx: &mut Context<'_, UnixStream>) {
        if self.is_paused || self.left == 0 {
            return;
        }
        if cx.transport.is_send_buffer_full() {
            self.poured.late.update(|count| count + 1);
        }
        self.left -= PORTION.len().min(self.left);
        cx.transport.write(&PORTION);
        self.poured.written.update(|count| count + PORTION.len());
        let me = Transport::handle(cx.transport);
        cx.reactor.call_soon(move |reactor| {
            reactor.call_protocol::<UnixStream, Self>(me, |it, cx| it.pour(cx));
        });
    }
}

impl Protocol<UnixStream> for Pouring {
    fn connection_made(&mut self, cx: &mut Context<'_, UnixStream>) {
        cx.transport
            .register_producer(ProducerRef::Protocol, ProducerKind::Push)
            .expect("the first");
        self.pour(cx);
    }

    fn data_received(&mut self, _: &mut Context<'_, UnixStream>, _: &[u8]) {}

    fn pause_producing(&mut self, _: &mut Context<'_, UnixStream>) {
        self.is_paused = true;
        self.poured.pauses.update(|count| count + 1);
    }

    fn resume_producing(&mut self, cx: &mut Context<'_, UnixStream>) {
        self.is_paused = false;
        self.poured.resumed.update(|count| count + 1);
        self.pour(cx);
    }
}

/// Reliability T-20: 1 GiB for a hundred peers that never read.
#[test]
fn peers_that_never_read_bound_what_is_buffered() {
    let ledger = DescriptorLedger::open();
    {
        const PEERS: usize = 100;
        let each = (1 << 30) / PEERS;
        let mut reactor = Reactor::new().unwrap();
        let before = resident_bytes();
        let poured = Rc::new(Poured::default());
        let mut peers = Vec::new();
        for _ in 0..PEERS {
            let pouring = Pouring {
                left: each,
                is_paused: false,
                poured: Rc::clone(&poured),
            };
            peers.push(adopt(&mut reactor, pouring));
        }
        run_until_quiet(&mut reactor);
        let paused = poured.pauses.get() - poured.resumed.get();
        let high = bowline::Watermarks::default().high;
        let mut over = 0;
        let mut buffered = 0;
        for (handle, _) in &peers {
            let it = transport(&mut reactor, *handle);
            over += usize::from(it.unsent_bytes() > high + PORTION.len());
            buffered += it.unsent_bytes();
            assert!(it.is_producer_paused());
        }
        let grown = resident_bytes().saturating_sub(before) as f64 / f64::from(1 << 20);
        assert!(poured.written.get() < PEERS * each, "it was all written");
        Figures::of("T-20")
            .must("producers that are paused", paused, Bound::Exactly, PEERS)
            .must(
                "buffers over the mark and one write",
                over,
                Bound::Exactly,
                0,
            )
            .must(
                "portions written later than in the turn that filled a buffer",
                poured.late.get(),
                Bound::Exactly,
                0,
            )
            .measured(
                "buffered",
                buffered as f64 / 1_048_576.0,
                "MiB",
                Bound::Below,
                64.0,
            )
            .measured("growth of memory", grown, "MiB", Bound::Below, 64.0)
            .remark("the pause begins with the write that passes the mark, so that one is over it");
        drop(peers);
    }
    ledger.assert_balanced();
}
