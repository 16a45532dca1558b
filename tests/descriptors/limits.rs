//! Limits of the process and of the user, each in a process of its own: the
//! test runs itself again.

use std::cell::RefCell;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::{Duration, Instant};

use crate::peer::{
    MOST, OneByOne, Seen, adopt, files, identities, identity, receive, send, send_message,
    transport,
};
use crate::support::figures::{Bound, Figures};
use crate::support::own_process::{leave_free, limit_descriptors, limit_in_flight, thread_time};
use crate::support::{open_descriptors, run_until, run_until_quiet};
use bowline::{
    AfterTruncation, Context, DescriptorLimits, PassedDescriptor, Protocol, Reactor,
    ReceivedDescriptors, Transports, UnixStream,
};

/// Runs `test`, the named one, in a process of its own.
#[track_caller]
fn in_own_process(name: &str, test: impl FnOnce()) {
    crate::support::own_process::in_own_process(module_path!(), name, test);
}

/// How many descriptors the stalled reader is sent.
const BURST: usize = 1_000;
/// The limit of those in flight.
const IN_FLIGHT: u64 = 64;

/// S-16, M-07, S-14, W-08, where Twisted ends the connection. Reliability T-6.
#[test]
fn too_many_in_flight_wait_for_the_reader_and_all_arrive() {
    in_own_process(
        "too_many_in_flight_wait_for_the_reader_and_all_arrive",
        || {
            let (distinct, expected) = files(16);
            let distinct: Vec<Rc<OwnedFd>> = distinct.into_iter().map(Rc::new).collect();
            let seen = Seen::default();
            let mut reactor = Reactor::new().unwrap();
            let (handle, peer) = adopt(&mut reactor, OneByOne::new(&seen, |_, _| Ok(())));
            limit_in_flight(65_534, IN_FLIGHT);

            let it = transport(&mut reactor, handle);
            it.set_descriptor_limits(DescriptorLimits::default().per_message(1));
            for number in 0..BURST {
                let fd = &distinct[number % distinct.len()];
                it.send_file_descriptor(PassedDescriptor::shared(fd))
                    .unwrap();
            }
            let data: Vec<u8> = (0..BURST as u32 + 500).map(|n| n as u8).collect();
            it.write(&data);

            // The reader stalls: it must be the limit that holds them back, and
            // the loop must not spin against it.
            run_until_quiet(&mut reactor);
            let stalled = Instant::now();
            let (turns, busy) = (reactor.statistics().turns, thread_time());
            while stalled.elapsed() < Duration::from_secs(1) {
                reactor.turn(Some(Duration::from_millis(50)));
            }
            let busy = (thread_time() - busy) as f64 / stalled.elapsed().as_nanos() as f64;
            let turns = reactor.statistics().turns - turns;
            assert!(turns < 60, "{turns} turns in a second");
            let it = transport(&mut reactor, handle);
            let in_flight = BURST - it.unsent_descriptors();
            let limit = IN_FLIGHT as usize;
            assert!(in_flight <= limit + 1, "{in_flight} in flight");
            // Plain bytes would be taken, and stay behind.
            assert_eq!(data.len() - it.unsent_bytes(), in_flight);
            assert!(!seen.has("lost"));

            let (mut bytes, mut received) = (Vec::new(), Vec::new());
            run_until(&mut reactor, |_| {
                while let Some(message) = receive(&peer, 65_536) {
                    bytes.extend(message.data);
                    received.extend(message.descriptors.iter().map(identity));
                }
                bytes.len() == data.len()
            });
            assert!(bytes == data);
            let expected: Vec<_> = expected.iter().copied().cycle().take(BURST).collect();
            assert!(received == expected, "{} arrived", received.len());
            let lost = usize::from(seen.has("lost"));
            Figures::of("T-6")
                .must("delivered", received.len(), Bound::Exactly, BURST)
                .must("disconnects", lost, Bound::Exactly, 0)
                .measured(
                    "processor while stalled",
                    busy * 100.0,
                    "%",
                    Bound::Below,
                    5.0,
                );
            assert!(distinct.iter().all(|fd| Rc::strong_count(fd) == 1));
        },
    );
}

#[test]
fn neighbours_go_on_while_one_waits_for_room_in_flight() {
    in_own_process(
        "neighbours_go_on_while_one_waits_for_room_in_flight",
        || {
            let shared = Rc::new(files(1).0.remove(0));
            let seen = Seen::default();
            let mut reactor = Reactor::new().unwrap();
            let (waiting, stalled) = adopt(&mut reactor, OneByOne::new(&seen, |_, _| Ok(())));
            let (plain, peer) = adopt(&mut reactor, OneByOne::new(&seen, |_, _| Ok(())));
            limit_in_flight(65_533, IN_FLIGHT);
            let it = transport(&mut reactor, waiting);
            it.set_descriptor_limits(DescriptorLimits::default().per_message(16));
            for _ in 0..200 {
                it.send_file_descriptor(PassedDescriptor::shared(&shared))
                    .unwrap();
            }
            it.write(&[0; 200]);
            transport(&mut reactor, plain).write(b"bytes");
            run_until(&mut reactor, |_| receive(&peer, 10).is_some());
            let left = transport(&mut reactor, waiting).unsent_descriptors();
            assert!(left > 0, "none waits");
            // Close waits for them too, and loses none.
            transport(&mut reactor, waiting).lose_connection();
            let mut arrived = 0;
            run_until(&mut reactor, |_| {
                // One at a time: the limit is ours too.
                while let Some(message) = receive(&stalled, 65_536)
                    && !message.data.is_empty()
                {
                    arrived += message.descriptors.len();
                }
                arrived == 200 && seen.has("lost")
            });
            let last = seen.all().pop().unwrap();
            assert_eq!(last, "lost closed cleanly; 0 unsent");
        },
    );
}

/// Copes with lost descriptors, or does not.
struct Truncated {
    after: AfterTruncation,
    seen: Seen,
    kept: Rc<RefCell<Vec<OwnedFd>>>,
}

impl Protocol<UnixStream> for Truncated {
    fn data_received(&mut self, _: &mut Context<'_, UnixStream>, data: &[u8]) {
        self.seen.push(format!("data {}", data.escape_ascii()));
    }

    fn descriptors_received(
        &mut self,
        cx: &mut Context<'_, UnixStream>,
        descriptors: &mut ReceivedDescriptors<'_>,
        data: &[u8],
    ) {
        self.seen.push(format!("{} descriptors", descriptors.len()));
        self.kept.borrow_mut().extend(descriptors);
        self.data_received(cx, data);
    }

    fn descriptors_truncated(
        &mut self,
        _: &mut Context<'_, UnixStream>,
        received: usize,
    ) -> AfterTruncation {
        self.seen.push(format!("truncated to {received}"));
        self.after
    }

    fn connection_lost(&mut self, _: &mut Context<'_, UnixStream>, reason: &bowline::CloseReason) {
        self.seen.push(format!("lost {reason}"));
    }
}

/// S-44, W-09, where Twisted does not notice.
#[test]
fn lost_descriptors_end_the_connection() {
    in_own_process("lost_descriptors_end_the_connection", || {
        for free in 0..4 {
            let seen = Seen::default();
            let mut reactor = Reactor::new().unwrap();
            let kept = Rc::default();
            let (_, peer) = adopt(
                &mut reactor,
                Truncated {
                    after: AfterTruncation::LoseConnection,
                    seen: seen.clone(),
                    kept: Rc::clone(&kept),
                },
            );
            let (sent, _) = files(5);
            let before = open_descriptors();
            send_message(&peer, b"abc", &sent);
            leave_free(free);
            run_until(&mut reactor, |_| seen.has("lost"));
            limit_descriptors(1_000);
            let expected = [
                format!("truncated to {free}"),
                format!("lost received descriptors were truncated to {free}"),
            ];
            assert_eq!(seen.all(), expected);
            assert!(kept.borrow().is_empty());
            assert_eq!(open_descriptors().len(), before.len() - 1);
            assert_eq!(reactor.descriptor_counts().truncations, 1);
        }
    });
}

#[test]
fn protocol_that_copes_goes_on_after_lost_descriptors() {
    in_own_process("protocol_that_copes_goes_on_after_lost_descriptors", || {
        let seen = Seen::default();
        let kept = Rc::new(RefCell::new(Vec::new()));
        let mut reactor = Reactor::new().unwrap();
        let (_, peer) = adopt(
            &mut reactor,
            Truncated {
                after: AfterTruncation::KeepConnection,
                seen: seen.clone(),
                kept: Rc::clone(&kept),
            },
        );
        let (sent, expected) = files(3);
        send_message(&peer, b"abc", &sent);
        leave_free(1);
        run_until(&mut reactor, |_| seen.has("data"));
        // With room again, the next message is whole.
        limit_descriptors(1_000);
        send_message(&peer, b"def", &sent);
        run_until_quiet(&mut reactor);
        assert_eq!(
            seen.all(),
            ["truncated to 1", "data abc", "3 descriptors", "data def"]
        );
        assert_eq!(identities(&kept.borrow()), expected);
    });
}

#[test]
fn close_on_a_full_descriptor_table_leaves_nothing_open() {
    in_own_process(
        "close_on_a_full_descriptor_table_leaves_nothing_open",
        || {
            // As many as one message holds, into every number of free places.
            let shared = files(1).0.remove(0);
            let borrowed = vec![std::os::fd::AsFd::as_fd(&shared); MOST];
            for free in (0..MOST + 2).step_by(17) {
                let seen = Seen::default();
                let mut reactor = Reactor::new().unwrap();
                let (_, peer) = adopt(
                    &mut reactor,
                    Truncated {
                        after: AfterTruncation::KeepConnection,
                        seen: seen.clone(),
                        kept: Rc::default(),
                    },
                );
                let before = open_descriptors();
                send(&peer, b"x", &borrowed).unwrap();
                leave_free(free);
                run_until(&mut reactor, |_| seen.has("data"));
                limit_descriptors(1_000);
                let received = free.min(MOST);
                assert_eq!(seen.all()[0], format!("truncated to {received}"));
                assert_eq!(open_descriptors(), before);
            }
        },
    );
}
