//! The pieces of bowline by themselves, so that a change of one of them shows
//! before it drowns in system calls: `cargo bench -p bowline-bench`.
//!
//! Times compare on one machine and in one run only. What a regression has to
//! fail by is counted instead: `bowline-bench ceilings`.

use std::any::Any;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as Pair;
use std::time::Duration;

use bowline::descriptor::{Descriptor, Next, Readiness};
use bowline::framing::{FrameBuffer, Framer, LengthPrefixedFramer, LineFramer, NetstringFramer};
use bowline::testing::{ManualClock, Pump};
use bowline::{Context, Protocol, Reactor, Transport, Transports, UnixTransport};
use divan::counter::{BytesCount, ItemsCount};
use divan::{Bencher, black_box};

fn main() {
    divan::main();
}

/// How many timers wait beside those that are measured.
const PENDING: [usize; 3] = [1_000, 100_000, 1_000_000];

mod timers {
    use super::*;

    /// A reactor with so many timers far ahead, as time limits of connections.
    fn with_pending(count: usize) -> Reactor {
        let mut reactor = Reactor::with_clock(ManualClock::new()).expect("descriptors are left");
        for number in 0..count as u64 {
            let ahead =
                Duration::from_secs(30) + Duration::from_micros(number * 7_919 % 30_000_000);
            reactor.call_later(ahead, |_| {});
        }
        reactor
    }

    #[divan::bench(args = PENDING)]
    fn schedule_and_cancel(bencher: Bencher<'_, '_>, pending: usize) {
        let mut reactor = with_pending(pending);
        bencher.counter(ItemsCount::new(1_usize)).bench_local(|| {
            let call = reactor.call_later(black_box(Duration::from_secs(30)), |_| {});
            call.cancel(&mut reactor).expect("it waits");
        });
    }

    #[divan::bench(args = PENDING)]
    fn reset(bencher: Bencher<'_, '_>, pending: usize) {
        let mut reactor = with_pending(pending);
        let call = reactor.call_later(Duration::from_secs(30), |_| {});
        let mut ahead = 30_000_u64;
        bencher.counter(ItemsCount::new(1_usize)).bench_local(|| {
            ahead = 30_000 + (ahead + 7_919) % 10_000;
            call.reset(&mut reactor, Duration::from_millis(ahead))
                .expect("it waits");
        });
    }

    /// A hundred of them in one turn, the turn included.
    #[divan::bench(args = PENDING)]
    fn fire(bencher: Bencher<'_, '_>, pending: usize) {
        const EACH: usize = 100;
        let clock = ManualClock::new();
        let mut reactor = Reactor::with_clock(clock.clone()).expect("descriptors are left");
        for number in 0..pending as u64 {
            // Out of reach of the time that passes here.
            reactor.call_later(Duration::from_secs(1_000_000 + number % 1_000), |_| {});
        }
        bencher.counter(ItemsCount::new(EACH)).bench_local(|| {
            for number in 0..EACH as u64 {
                reactor.call_later(Duration::from_micros(number), |_| {});
            }
            clock.advance(Duration::from_millis(1));
            reactor.turn(Some(Duration::ZERO))
        });
    }
}

mod slots {
    use super::*;

    /// Watches nothing; counts how often it was looked after.
    struct Idle(u64);

    impl Descriptor for Idle {
        fn ready(&mut self, _: &mut Reactor, _: Readiness) -> Next {
            Next::Keep
        }

        fn attend(&mut self, _: &mut Reactor) -> Next {
            self.0 += 1;
            Next::Keep
        }

        fn facet(&mut self) -> &mut dyn Any {
            self
        }
    }

    #[divan::bench(args = [1, 10_000])]
    fn register_and_remove(bencher: Bencher<'_, '_>, others: usize) {
        let mut reactor = Reactor::new().expect("descriptors are left");
        for _ in 0..others {
            register(&mut reactor);
        }
        bencher.counter(ItemsCount::new(1_usize)).bench_local(|| {
            let token = register(&mut reactor);
            reactor.remove(token);
            // What was removed may be used again after a turn's batch only.
            reactor.turn(Some(Duration::ZERO))
        });
    }

    /// A hundred are noted, and looked after in the turn.
    #[divan::bench]
    fn attend_100(bencher: Bencher<'_, '_>) {
        let mut reactor = Reactor::new().expect("descriptors are left");
        let tokens: Vec<_> = (0..100).map(|_| register(&mut reactor)).collect();
        bencher.counter(ItemsCount::new(100_usize)).bench_local(|| {
            for &token in &tokens {
                reactor.notify(token);
            }
            reactor.turn(Some(Duration::ZERO))
        });
    }

    fn register(reactor: &mut Reactor) -> bowline::descriptor::Token {
        let vacancy = reactor.vacancy().expect("there is room");
        vacancy.install(Box::new(Idle(0)))
    }
}

/// From `write` to the simulated kernel and on to the peer: the write buffer and
/// what leads to it, without a system call.
mod write_buffer {
    use super::*;

    /// Answers each byte with `size` bytes in `pieces` writes.
    struct Answer {
        pieces: usize,
        data: Vec<u8>,
    }

    impl<T: Transport> Protocol<T> for Answer {
        fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
            for _ in data {
                for _ in 0..self.pieces {
                    cx.transport.write(&self.data);
                }
            }
        }
    }

    #[divan::bench(args = [(1, 64), (10, 64), (1, 65_536), (16, 65_536)])]
    fn write_and_flush(bencher: Bencher<'_, '_>, (pieces, size): (usize, usize)) {
        let answer = Answer {
            pieces,
            data: vec![7; size],
        };
        let (mut pump, peer) = Pump::with_peer(answer).expect("descriptors are left");
        bencher
            .counter(BytesCount::new(pieces * size))
            .bench_local(|| pump.exchange(&peer, b"?").bytes.len());
    }
}

mod framers {
    use super::*;

    /// As long as one read.
    const INPUT_BYTES: usize = 65_536;
    const PAYLOAD_BYTES: usize = 100;

    /// `INPUT_BYTES` of one frame over and over, in pieces of `piece` bytes.
    fn decode<F: Framer>(bencher: Bencher<'_, '_>, framer: F, frame: &[u8], piece: usize) {
        let frames = INPUT_BYTES / frame.len();
        let input = frame.repeat(frames);
        let mut buffer = FrameBuffer::new(framer);
        bencher
            .counter(BytesCount::new(input.len()))
            .bench_local(|| {
                let mut found = 0;
                for mut piece in input.chunks(piece) {
                    while let Ok(Some(frame)) = buffer.next_frame(&mut piece) {
                        black_box(frame);
                        found += 1;
                    }
                }
                assert_eq!(found, frames);
            });
    }

    /// In one piece, as usual, and as a slow peer would send it.
    const PIECES: [usize; 2] = [INPUT_BYTES, 7];

    #[divan::bench(args = PIECES)]
    fn lines(bencher: Bencher<'_, '_>, piece: usize) {
        let mut frame = vec![b'x'; PAYLOAD_BYTES];
        frame.extend_from_slice(b"\r\n");
        decode(bencher, LineFramer::new(), &frame, piece);
    }

    #[divan::bench(args = PIECES)]
    fn netstrings(bencher: Bencher<'_, '_>, piece: usize) {
        let mut frame = format!("{PAYLOAD_BYTES}:").into_bytes();
        frame.resize(frame.len() + PAYLOAD_BYTES, b'x');
        frame.push(b',');
        decode(bencher, NetstringFramer::new(), &frame, piece);
    }

    #[divan::bench(args = PIECES)]
    fn length_prefixed(bencher: Bencher<'_, '_>, piece: usize) {
        let mut frame = (PAYLOAD_BYTES as u32).to_be_bytes().to_vec();
        frame.resize(frame.len() + PAYLOAD_BYTES, b'x');
        decode(bencher, LengthPrefixedFramer::u32(), &frame, piece);
    }
}

/// The control-message codec and the queue of descriptors, there and back over a
/// real socketpair: the kernel's part is the larger one.
mod descriptors {
    use super::*;

    /// Returns every descriptor as soon as `wanted` are there.
    struct Return {
        wanted: usize,
        held: Vec<OwnedFd>,
        rounds: usize,
    }

    impl<T: UnixTransport> Protocol<T> for Return {
        fn file_descriptor_received(
            &mut self,
            _: &mut Context<'_, T>,
            fd: OwnedFd,
        ) -> Result<(), OwnedFd> {
            self.held.push(fd);
            Ok(())
        }

        fn data_received(&mut self, cx: &mut Context<'_, T>, _: &[u8]) {
            if self.held.len() < self.wanted {
                return;
            }
            if self.rounds == 0 {
                cx.reactor.stop().expect("it runs: this is a callback");
                return;
            }
            self.rounds -= 1;
            let descriptors = self.held.drain(..).map(Into::into).collect();
            let bytes = vec![0; self.wanted];
            cx.transport
                .write_with_descriptors(&bytes, descriptors)
                .expect("it takes so many");
        }
    }

    #[divan::bench(args = [1, 64, 253])]
    fn there_and_back(bencher: Bencher<'_, '_>, count: usize) {
        const ROUNDS: usize = 100;
        let file = File::open("/dev/null").expect("Linux has it");
        bencher
            .counter(ItemsCount::new(count * ROUNDS * 2))
            .with_inputs(|| {
                let held = (0..count)
                    .map(|_| file.try_clone().expect("descriptors are left").into())
                    .collect();
                let (left, right) = Pair::pair().expect("descriptors are left");
                let mut reactor = Reactor::new().expect("descriptors are left");
                let starts = Return {
                    wanted: count,
                    held,
                    rounds: ROUNDS,
                };
                let answers = Return {
                    wanted: count,
                    held: Vec::new(),
                    rounds: usize::MAX,
                };
                let left = reactor
                    .adopt_unix_stream(left.into(), starts)
                    .expect("it is connected");
                reactor
                    .adopt_unix_stream(right.into(), answers)
                    .expect("it is connected");
                let left = reactor.get(left).expect("it is connected").handle();
                reactor.call_protocol::<bowline::UnixStream, Return>(left, |protocol, cx| {
                    protocol.data_received(cx, b"");
                });
                reactor
            })
            .bench_local_values(|mut reactor| {
                reactor.run().expect("it was made to run");
                reactor
            });
    }
}
