//! Descriptors with exactly their packets, and who sends them.

use std::cell::Cell;
use std::fs;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::rc::Rc;

use bowline::error::{SendDescriptorErrorKind, SendRefusal};
use bowline::{PassedDescriptor, Reactor, SendStatus, Transports};

use crate::harness::{Origin, Script, get, is_closed, over_all, pipe};
use crate::support::{run_until, run_until_quiet, wait_for_closes};

/// The number of the file that a descriptor has open.
fn inode(fd: impl AsFd) -> u64 {
    let file = fs::File::from(fd.as_fd().try_clone_to_owned().unwrap());
    file.metadata().unwrap().ino()
}

/// Reliability T-15, contract W-16: no pairing rules, since there is nothing to pair.
#[test]
fn descriptors_arrive_with_exactly_their_packets() {
    over_all(|place| {
        let mut reactor = Reactor::new().unwrap();
        let (peer, notes) = place.connection(&mut reactor, Script::new());
        // With and without, of bytes and of none, in one go.
        let all: [(&[u8], usize); 8] = [
            (b"none", 0),
            (b"one", 1),
            (b"", 3),
            (b"", 0),
            (b"many", 253),
            (b"x", 1),
            (b"", 1),
            (b"none", 0),
        ];
        let mut inodes = Vec::new();
        for (data, count) in all {
            let pipes: Vec<_> = (0..count).map(|_| pipe().0).collect();
            let borrowed: Vec<BorrowedFd<'_>> = pipes.iter().map(AsFd::as_fd).collect();
            peer.try_send(data, &borrowed).unwrap();
            inodes.push(pipes.iter().map(inode).collect::<Vec<_>>());
            run_until_quiet(&mut reactor);
        }
        run_until(&mut reactor, |_| notes.count() == all.len());
        notes.told(|told| {
            for (number, received) in told.received.iter().enumerate() {
                assert_eq!(received.data, all[number].0);
                assert!(!received.lost_descriptors);
                let own: Vec<_> = received.descriptors.iter().map(inode).collect();
                assert_eq!(own, inodes[number], "packet {number}");
                for fd in &received.descriptors {
                    let flags = rustix::io::fcntl_getfd(fd).unwrap();
                    assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
                }
            }
        });
        assert_eq!(reactor.descriptor_counts().received, 259);
        notes.change(|told| told.received.clear());
    });
}

#[test]
fn descriptors_leave_with_exactly_their_packets_and_ours_are_closed() {
    over_all(|place| {
        let mut reactor = Reactor::new().unwrap();
        let (peer, notes) = place.connection(&mut reactor, Script::new());
        let shared = Rc::new(pipe().0);
        let own = pipe().0;
        let inodes = [inode(&*shared), inode(&own)];
        let transport = get(&mut reactor, notes.handle());
        transport.send(b"plain");
        let both = vec![PassedDescriptor::shared(&shared), own.into()];
        assert_eq!(
            transport.send_with_descriptors(b"two", both).unwrap(),
            SendStatus::Ready
        );
        let again = vec![PassedDescriptor::shared(&shared)];
        transport.send_with_descriptors(b"", again).unwrap();
        transport.send(b"plain");
        assert_eq!(transport.unsent_descriptors(), 3);
        let mut arrived = Vec::new();
        run_until(&mut reactor, |_| {
            arrived.extend(peer.receive().ok());
            arrived.len() == 4
        });
        let found: Vec<_> = arrived
            .iter()
            .map(|(data, fds)| (&data[..], fds.iter().map(inode).collect::<Vec<_>>()))
            .collect();
        let expected: [(&[u8], Vec<u64>); 4] = [
            (b"plain", vec![]),
            (b"two", inodes.to_vec()),
            (b"", vec![inodes[0]]),
            (b"plain", vec![]),
        ];
        assert_eq!(found, expected);
        assert_eq!(Rc::strong_count(&shared), 1, "the queue has let go of it");
        assert_eq!(get(&mut reactor, notes.handle()).unsent_descriptors(), 0);
        assert_eq!(reactor.descriptor_counts().passed, 3);
    });
}

#[test]
fn what_cannot_be_sent_hands_its_descriptors_back() {
    over_all(|place| {
        let mut reactor = Reactor::new().unwrap();
        let (_peer, notes) = place.connection(&mut reactor, Script::new());
        let transport = get(&mut reactor, notes.handle());
        let shared = Rc::new(pipe().0);
        let many = || {
            (0..254)
                .map(|_| PassedDescriptor::shared(&shared))
                .collect()
        };
        let error = transport.send_with_descriptors(b"x", many()).unwrap_err();
        assert_eq!(error.kind, SendDescriptorErrorKind::TooManyForOneMessage);
        assert_eq!(error.descriptors.len(), 254);
        let one = || vec![PassedDescriptor::shared(&shared)];
        let error = transport
            .send_with_descriptors(&vec![0; 10_000_000], one())
            .unwrap_err();
        let refusal = SendDescriptorErrorKind::Datagram(SendRefusal::TooLong);
        assert_eq!((error.kind, error.descriptors.len()), (refusal, 1));
        transport.lose_connection();
        let error = transport.send_with_descriptors(b"x", one()).unwrap_err();
        let refusal = SendDescriptorErrorKind::Datagram(SendRefusal::Closed);
        assert_eq!((error.kind, error.descriptors.len()), (refusal, 1));
        run_until(&mut reactor, |_| notes.is_lost());
    });
}

#[test]
fn descriptors_that_nobody_takes_are_closed_and_counted() {
    over_all(|place| {
        let mut reactor = Reactor::new().unwrap();
        let script = Script::new().leave_descriptors();
        let (peer, notes) = place.connection(&mut reactor, script);
        let (reading, writing) = pipe();
        peer.try_send(b"a", &[writing.as_fd(), writing.as_fd()])
            .unwrap();
        peer.try_send(b"", &[writing.as_fd()]).unwrap();
        drop(writing);
        run_until(&mut reactor, |_| notes.count() == 2);
        wait_for_closes();
        assert!(is_closed(&reading));
        assert_eq!(reactor.descriptor_counts().unclaimed, 3);
        peer.send(b"goes on");
        run_until(&mut reactor, |_| notes.count() == 3);
    });
}

#[test]
fn a_callback_that_panics_leaks_none() {
    over_all(|place| {
        let mut reactor = Reactor::new().unwrap();
        let script = Script::new().leave_descriptors().on_packet(|_, _, packet| {
            let _first = packet.descriptors.next();
            panic!("as the test wants it");
        });
        let (peer, notes) = place.connection(&mut reactor, script);
        let (reading, writing) = pipe();
        for _ in 0..3 {
            peer.try_send(b"", &[writing.as_fd(), writing.as_fd()])
                .unwrap();
        }
        drop(writing);
        run_until(&mut reactor, |_| notes.is_lost());
        wait_for_closes();
        assert!(is_closed(&reading));
    });
}

#[test]
fn descriptors_on_their_way_are_closed_with_the_connection() {
    over_all(|place| {
        let mut reactor = Reactor::new().unwrap();
        let script = Script::new().on_packet(|transport, _, _| transport.pause_producing());
        let (peer, notes) = place.connection(&mut reactor, script);
        let (reading, writing) = pipe();
        // Some received and not delivered, some in the kernel.
        for _ in 0..100 {
            peer.try_send(b"x", &[writing.as_fd()]).unwrap();
        }
        drop(writing);
        run_until(&mut reactor, |_| notes.count() == 1);
        // Some that never leave.
        let (own_reading, own_writing) = pipe();
        let own = Rc::new(own_writing);
        let transport = get(&mut reactor, notes.handle());
        while transport.send(&[0; 1_000]).is_taken() {}
        transport
            .send_with_descriptors(b"", vec![PassedDescriptor::shared(&own)])
            .unwrap_err();
        run_until_quiet(&mut reactor);
        let transport = get(&mut reactor, notes.handle());
        transport.set_queue_limits(bowline::QueueLimits::default().most(100_000));
        transport
            .send_with_descriptors(b"", vec![PassedDescriptor::shared(&own)])
            .unwrap();
        drop(own);
        assert!(!is_closed(&own_reading));
        get(&mut reactor, notes.handle()).abort_connection();
        run_until(&mut reactor, |_| notes.is_lost());
        notes.change(|told| told.received.clear());
        wait_for_closes();
        assert!(is_closed(&own_reading) && is_closed(&reading));
        assert_eq!(reactor.descriptor_counts().unsent, 1);
        drop(peer);
    });
}

/// Contract W-15.
#[test]
fn each_packet_says_who_sent_it_where_that_is_asked_for() {
    for origin in [Origin::Accepted, Origin::Connected] {
        let place = origin.place();
        let mut reactor = Reactor::new().unwrap();
        let (peer, notes) = place.connection_with(
            &mut reactor,
            Script::new(),
            |endpoint| endpoint.credentials(true).pidfds(true),
            |endpoint| endpoint.credentials(true).pidfds(true),
        );
        peer.send(b"me");
        peer.send(b"");
        let (reading, _writing) = pipe();
        peer.try_send(b"", &[reading.as_fd()]).unwrap();
        run_until(&mut reactor, |_| notes.count() == 3);
        notes.told(|told| {
            for (number, received) in told.received.iter().enumerate() {
                let credentials = received.credentials.unwrap();
                assert_eq!(credentials.pid, Some(std::process::id()));
                let pidfd = received.pidfd.as_ref().unwrap();
                let info = format!("/proc/thread-self/fdinfo/{}", pidfd.as_raw_fd());
                let own = format!("Pid:\t{}", std::process::id());
                assert!(fs::read_to_string(info).unwrap().contains(&own));
                assert_eq!(received.descriptors.len(), usize::from(number == 2));
            }
        });
        notes.change(|told| told.received.clear());
    }
}

#[test]
fn a_connection_that_refuses_descriptors_refuses_them_in_the_kernel() {
    for origin in [Origin::Accepted, Origin::Connected] {
        let place = origin.place();
        let mut reactor = Reactor::new().unwrap();
        let (peer, notes) = place.connection_with(
            &mut reactor,
            Script::new(),
            |endpoint| endpoint.accepts_descriptors(false),
            |endpoint| endpoint.accepts_descriptors(false),
        );
        let (reading, _writing) = pipe();
        let refused = peer.try_send(b"x", &[reading.as_fd()]).unwrap_err();
        assert_eq!(refused.kind(), std::io::ErrorKind::PermissionDenied);
        let transport = get(&mut reactor, notes.handle());
        transport.set_descriptors_accepted(true).unwrap();
        peer.try_send(b"x", &[reading.as_fd()]).unwrap();
        run_until(&mut reactor, |_| notes.count() == 1);
        notes.change(|told| told.received.clear());
    }
    // And one of ours to a peer that refuses them is told, and costs nothing else.
    over_all(|place| {
        let mut reactor = Reactor::new().unwrap();
        let (peer, notes) = place.connection(&mut reactor, Script::new());
        let (_, theirs) = place.connection(&mut reactor, Script::new());
        drop(theirs);
        refuse_descriptors(&peer.0);
        let transport = get(&mut reactor, notes.handle());
        let (reading, _writing) = pipe();
        transport
            .send_with_descriptors(b"x", vec![reading.into()])
            .unwrap();
        transport.send(b"goes on");
        run_until(&mut reactor, |_| notes.told(|told| told.failed.len()) == 1);
        notes.told(|told| {
            let (_, error, count) = &told.failed[0];
            assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied);
            assert_eq!(*count, 1, "it came back");
        });
        run_until(&mut reactor, |_| {
            peer.receive().is_ok_and(|it| it.0 == b"goes on")
        });
    });
}

/// Through a connection of our own, which is given up then: rustix does not know the option.
fn refuse_descriptors(fd: &OwnedFd) {
    let mut reactor = Reactor::new().unwrap();
    let script = Script::new();
    let notes = script.notes();
    let copy = fd.try_clone().unwrap();
    reactor.adopt(bowline::UnixSeqpacket, copy, script).unwrap();
    run_until(&mut reactor, |_| !notes.calls().is_empty());
    get(&mut reactor, notes.handle())
        .set_descriptors_accepted(false)
        .unwrap();
}

/// Both sides at once, in an order by chance, each packet with as many descriptors as it says.
#[test]
fn random_packets_keep_their_descriptors() {
    over_all(|place| {
        let mut reactor = Reactor::new().unwrap();
        let mut random = 0x2545_f491_4f6c_dd1d_u64;
        let mut next = move |below: u64| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random % below
        };
        let script = Script::new().on_packet(|transport, _, packet| {
            // Answered with what it says; the descriptors are in the notes by then.
            transport.send(packet.data);
        });
        let (peer, notes) = place.connection(&mut reactor, script);
        let some: Vec<_> = (0..8).map(|_| pipe().0).collect();
        let (sent, answered) = (Cell::new(0_u64), Cell::new(0_u64));
        let mut rounds = 0;
        while answered.get() < 2_000 {
            rounds += 1;
            assert!(rounds < 100_000, "{sent:?} sent, {answered:?} answered");
            for _ in 0..next(20) {
                let count = next(9) as usize;
                let borrowed: Vec<_> = some[..count].iter().map(AsFd::as_fd).collect();
                let mut data = sent.get().to_ne_bytes().to_vec();
                data.push(count as u8);
                data.resize(9 + next(3_000) as usize, 0);
                match peer.try_send(&data, &borrowed) {
                    Ok(()) => sent.set(sent.get() + 1),
                    Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock),
                }
            }
            for _ in 0..next(3) {
                reactor.turn(Some(std::time::Duration::ZERO));
            }
            for _ in 0..next(30) {
                let Ok((data, _)) = peer.receive() else { break };
                assert_eq!(data[..8], answered.get().to_ne_bytes());
                answered.set(answered.get() + 1);
            }
            notes.change(|told| {
                for received in told.received.drain(..) {
                    let count = usize::from(received.data[8]);
                    assert_eq!(received.descriptors.len(), count);
                    let own = received.descriptors.iter().map(inode);
                    assert!(own.eq(some[..count].iter().map(inode)));
                }
            });
        }
    });
}
