//! What is taken to be sent, what is not, and what becomes of it.

use std::cell::Cell;
use std::io::ErrorKind;
use std::rc::Rc;

use bowline::error::SendRefusal;
use bowline::{QueueLimits, Reactor, SendStatus, Transports, UnixDatagram};

use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, setrlimit};

use crate::harness::{Kind, Script, get, over_all};
use crate::support::faults::{Call, with_faults};
use crate::support::own_process::in_own_process;
use crate::support::{run_until, run_until_quiet};

/// Contract D-10, W-55.
#[test]
fn a_full_queue_is_told_and_room_is_told_again() {
    over_all(|place| {
        let mut reactor = Reactor::new().unwrap();
        let peer = place.plain();
        let limits = QueueLimits::default().full(4).most(6);
        let (left, refused) = (Rc::new(Cell::new(1_000_u32)), Rc::new(Cell::new(0)));
        let (sending, refusing) = (Rc::clone(&left), Rc::clone(&refused));
        // A client, so that room at its peer is told.
        let send = move |transport: &mut dyn bowline::DatagramTransport| {
            while sending.get() > 0 {
                match transport.send(&sending.get().to_ne_bytes()) {
                    SendStatus::Ready => sending.set(sending.get() - 1),
                    SendStatus::Full => {
                        sending.set(sending.get() - 1);
                        assert!(transport.is_send_buffer_full());
                        break;
                    }
                    SendStatus::Refused(why) => {
                        assert_eq!(why, SendRefusal::QueueFull);
                        refusing.set(refusing.get() + 1);
                        break;
                    }
                }
            }
        };
        let again = send.clone();
        let script = Script::new()
            .on_start(move |transport, _| {
                transport.set_queue_limits(limits);
                send(transport);
            })
            .on_room(move |transport, _| again(transport));
        let notes = script.notes();
        let handle = place
            .connect(&mut reactor, &peer.address(), script)
            .unwrap();
        let mut arrived = Vec::new();
        run_until(&mut reactor, |_| {
            arrived.extend(peer.receive_all());
            arrived.len() == 1_000
        });
        let expected = (1..=1_000_u32).rev().map(|it| it.to_ne_bytes().to_vec());
        let expected: Vec<_> = expected.collect();
        assert_eq!(arrived, expected, "each once, in order");
        assert!(notes.told(|told| told.resumed) >= 200, "told of room");
        assert_eq!(refused.get(), 0);
        assert_eq!(get(&mut reactor, handle).counts().sent, 1_000);
    });
}

#[test]
fn a_queue_takes_no_more_than_its_limit() {
    over_all(|place| {
        let mut reactor = Reactor::new().unwrap();
        let script = Script::new();
        let notes = script.notes();
        let (handle, _) = place.listen(&mut reactor, script);
        let peer = place.plain();
        let to = peer.address();
        let transport = get(&mut reactor, handle);
        let limits = QueueLimits::default().full(2).most(5).most_bytes(100);
        transport.set_queue_limits(limits);
        assert_eq!(transport.queue_limits(), limits);
        let refused = SendStatus::Refused(SendRefusal::QueueFull);
        let expected = [
            SendStatus::Ready,
            SendStatus::Full,
            SendStatus::Full,
            SendStatus::Full,
            SendStatus::Full,
            refused,
            refused,
        ];
        for status in expected {
            assert_eq!(transport.send_to(&[1; 10], to.as_ref()), status);
        }
        run_until(&mut reactor, |_| notes.told(|told| told.resumed) == 1);
        let transport = get(&mut reactor, handle);
        assert_eq!(transport.send_to(&[1; 60], to.as_ref()), SendStatus::Ready);
        assert_eq!(transport.send_to(&[1; 60], to.as_ref()), refused);
        // Longer than all, and there is nothing else.
        run_until_quiet(&mut reactor);
        assert_eq!(notes.told(|told| told.resumed), 2);
        let transport = get(&mut reactor, handle);
        assert_eq!(transport.send_to(&[1; 200], to.as_ref()), SendStatus::Ready);
        run_until_quiet(&mut reactor);
        let lengths: Vec<_> = peer.receive_all().iter().map(Vec::len).collect();
        assert_eq!(lengths, [10, 10, 10, 10, 10, 60, 200]);
        let counts = get(&mut reactor, handle).counts();
        assert_eq!((counts.sent, counts.refused), (7, 3));
    });
}

/// Contract D-09: what the kernel refuses is told, and costs nothing else.
#[test]
fn a_datagram_that_the_kernel_refuses_comes_back() {
    over_all(|place| {
        let mut reactor = Reactor::new().unwrap();
        let script = Script::new();
        let notes = script.notes();
        let (handle, _) = place.listen(&mut reactor, script);
        let peer = place.plain();
        // A port 0, or the name of nobody.
        let bad = place.address();
        let transport = get(&mut reactor, handle);
        for number in 0..3 {
            assert!(
                transport
                    .send_to(&[number], peer.address().as_ref())
                    .is_ready()
            );
            assert!(transport.send_to(&[100 + number], bad.as_ref()).is_ready());
        }
        run_until(&mut reactor, |_| notes.told(|told| told.failed.len()) == 3);
        run_until_quiet(&mut reactor);
        assert_eq!(peer.receive_all(), [[0], [1], [2]]);
        notes.told(|told| {
            for (number, (data, to, error, _)) in told.failed.iter().enumerate() {
                assert_eq!(data, &[100 + number as u8]);
                assert_eq!(to.as_ref(), Some(&bad));
                let expected = match place.kind {
                    Kind::UnixPath => ErrorKind::NotFound,
                    Kind::UnixAbstract => ErrorKind::ConnectionRefused,
                    _ => ErrorKind::InvalidInput,
                };
                assert_eq!(error.kind(), expected);
            }
        });
        let counts = get(&mut reactor, handle).counts();
        assert_eq!((counts.sent, counts.failed), (3, 3));
    });
}

/// Contract D-07: the socket is lost, and says why.
#[test]
fn a_read_that_fails_for_an_unknown_reason_is_the_end() {
    let name = "a_read_that_fails_for_an_unknown_reason_is_the_end";
    with_faults(module_path!(), name, |faults| {
        over_all(|place| {
            let mut reactor = Reactor::new().unwrap();
            let script = Script::new();
            let notes = script.notes();
            let (handle, here) = place.listen(&mut reactor, script);
            run_until_quiet(&mut reactor);
            let peer = place.plain();
            peer.send(b"never read", &here);
            faults.reset();
            faults.fail(Call::RecvMmsg, 0, 1, Errno::IO);
            faults.during(|| run_until(&mut reactor, |_| notes.is_stopped()));
            assert_eq!(faults.fired(), 1);
            notes.told(|told| {
                let why = "connection lost: Input/output error (os error 5)";
                assert_eq!(told.stopped, [why]);
                assert_eq!(told.calls, ["started", "stopped"]);
            });
            assert!(reactor.get(handle).is_none());
            assert_eq!(reactor.registered(), 0);
            // Nothing of it stands in the way of the next, once what is unread was closed,
            // elsewhere.
            run_until(&mut reactor, |reactor| {
                place.listen_at(reactor, &here, Script::new()).is_ok()
            });
        });
    });
}

/// Contract D-08: of what passes nobody hears anything.
#[test]
fn a_read_that_fails_in_passing_is_made_again() {
    let name = "a_read_that_fails_in_passing_is_made_again";
    with_faults(module_path!(), name, |faults| {
        over_all(|place| {
            let mut reactor = Reactor::new().unwrap();
            let script = Script::new();
            let notes = script.notes();
            let (_, here) = place.listen(&mut reactor, script);
            run_until_quiet(&mut reactor);
            let peer = place.plain();
            let errors = [Errno::INTR, Errno::AGAIN, Errno::NOBUFS, Errno::NOMEM];
            for (number, error) in errors.into_iter().enumerate() {
                peer.send(&[number as u8], &here);
                faults.reset();
                faults.fail(Call::RecvMmsg, 0, 3, error);
                faults.during(|| run_until(&mut reactor, |_| notes.count() > number));
                assert_eq!(faults.fired(), 3, "{error}");
            }
            assert_eq!(notes.data(), [[0], [1], [2], [3]]);
            notes.told(|told| {
                assert_eq!(told.calls[1..], ["datagram"; 4]);
            });
        });
    });
}

#[test]
fn a_queue_that_is_emptied_leaves_no_memory_of_its_own() {
    over_all(|place| {
        let mut reactor = Reactor::new().unwrap();
        let (handle, _) = place.listen(&mut reactor, Script::new());
        let peer = place.plain();
        for _ in 0..100 {
            let transport = get(&mut reactor, handle);
            for _ in 0..5 {
                transport.send_to(&[1; 1_000], peer.address().as_ref());
            }
            run_until_quiet(&mut reactor);
            assert_eq!(get(&mut reactor, handle).unsent_datagrams(), 0);
            assert_eq!(peer.receive_all().len(), 5);
        }
    });
}

/// The largest values make memory for what can come, and no more.
#[test]
fn all_the_room_there_can_be_is_little_memory() {
    let name = "all_the_room_there_can_be_is_little_memory";
    in_own_process(module_path!(), name, || {
        let place = Kind::UnixPath.place();
        let mut reactor = Reactor::new().unwrap();
        let script = Script::new();
        let notes = script.notes();
        let address = place.address();
        let endpoint = UnixDatagram::at(address.as_unix().unwrap().clone());
        reactor
            .listen(endpoint.max_datagram(usize::MAX), script)
            .unwrap();
        let sender = std::os::unix::net::UnixDatagram::unbound().unwrap();
        // Whoever asks for more is refused it.
        let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
        let pages: u64 = statm.split(' ').next().unwrap().parse().unwrap();
        let limit = Rlimit {
            current: Some(pages * 4_096 + (256 << 20)),
            maximum: None,
        };
        setrlimit(Resource::As, limit).unwrap();
        let Some(bowline::UnixAddress::Path(path)) = address.as_unix().cloned() else {
            panic!("it has a path");
        };
        sender.send_to(&[7; 100_000], path).unwrap();
        run_until(&mut reactor, |_| notes.count() == 1);
        notes.told(|told| assert_eq!(told.received[0].data, [7; 100_000]));
    });
}
