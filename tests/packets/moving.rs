//! Taking connections of packets apart, and putting them together again.

use std::cell::RefCell;
use std::os::fd::AsFd;
use std::rc::Rc;

use bowline::endpoint::Adopt as _;
use bowline::error::{AdoptErrorKind, DetachError};
use bowline::{Detached, Reactor, Transports, UnixSeqpacket, UnixSeqpacketPort, Unsent};

use crate::harness::{Notes, Plain, Script, get, over_all, pipe};
use crate::support::{run_until, run_until_quiet};

type Apart = Result<Detached<Script>, DetachError>;

/// Takes a connection apart.
fn detach(reactor: &mut Reactor, notes: &Notes) -> Apart {
    let result: Rc<RefCell<Option<Apart>>> = Rc::default();
    let noted = Rc::clone(&result);
    reactor.detach(notes.handle(), move |_, detached| {
        *noted.borrow_mut() = Some(detached);
    });
    run_until(reactor, |_| result.borrow().is_some());
    result.borrow_mut().take().unwrap()
}

/// Fills a connection, and leaves packets in its queue: with bytes, without, with
/// descriptors; how many there are in all.
fn fill(reactor: &mut Reactor, notes: &Notes) -> usize {
    let mut count = 0;
    while get(reactor, notes.handle()).send(&[1; 5_000]).is_ready() {
        count += 1;
        reactor.turn(Some(std::time::Duration::ZERO));
    }
    let transport = get(reactor, notes.handle());
    assert!(transport.send(b"").is_taken());
    let (reading, _) = pipe();
    let two = vec![reading.into(), pipe().0.into()];
    assert!(
        transport
            .send_with_descriptors(b"two", two)
            .unwrap()
            .is_taken()
    );
    let one = vec![pipe().0.into()];
    assert!(
        transport
            .send_with_descriptors(b"", one)
            .unwrap()
            .is_taken()
    );
    assert!(transport.send(b"last").is_taken());
    assert!(transport.unsent_packets() > 4);
    count + 1 + 4
}

fn drain(reactor: &mut Reactor, peer: &Plain, count: usize) {
    let mut arrived = Vec::new();
    run_until(reactor, |_| {
        arrived.extend(std::iter::from_fn(|| peer.receive().ok()));
        arrived.len() == count
    });
    let tail = &arrived[count - 4..];
    let found: Vec<_> = tail
        .iter()
        .map(|(data, fds)| (&data[..], fds.len()))
        .collect();
    let expected: [(&[u8], usize); 4] = [(b"", 0), (b"two", 2), (b"", 1), (b"last", 0)];
    assert_eq!(found, expected);
}

#[test]
fn a_connection_goes_on_elsewhere_with_what_had_not_left() {
    over_all(|place| {
        let mut reactor = Reactor::new().unwrap();
        let (peer, notes) = place.connection(&mut reactor, Script::new());
        let count = fill(&mut reactor, &notes);
        peer.send(b"before");
        let detached = detach(&mut reactor, &notes).unwrap();
        assert!(detached.travels() && !notes.is_lost());
        peer.send(b"");
        peer.send(b"after");
        // In another process, say.
        let mut other = Reactor::new().unwrap();
        let script = Script::new();
        let moved = script.notes();
        let unsent = Unsent {
            bytes: detached.unsent,
            descriptors: detached.descriptors,
        };
        let kind = UnixSeqpacket.with_unsent(unsent);
        other.adopt(kind, detached.fd, script).unwrap();
        drain(&mut other, &peer, count);
        let here = notes.count();
        run_until(&mut other, |_| here + moved.count() == 3);
        let all = [notes.data(), moved.data()].concat();
        assert_eq!(all, [&b"before"[..], b"", b"after"]);
        drop(peer);
        run_until(&mut other, |_| moved.is_lost());
        assert_eq!(moved.calls(), ["made", "read lost", "lost"]);
    });
}

#[test]
fn a_connection_is_put_together_again_as_it_was() {
    over_all(|place| {
        let mut reactor = Reactor::new().unwrap();
        let (peer, notes) = place.connection(&mut reactor, Script::echo());
        let before = notes.handle();
        let limits = bowline::QueueLimits::default().full(300).most(2_000);
        get(&mut reactor, before).set_queue_limits(limits);
        let count = fill(&mut reactor, &notes);
        let detached = detach(&mut reactor, &notes).unwrap();
        run_until_quiet(&mut reactor);
        let handle = reactor.reattach::<UnixSeqpacketPort, _>(detached).unwrap();
        assert!(reactor.get(before).is_none());
        run_until(&mut reactor, |_| notes.calls().contains(&"reattached"));
        assert_eq!(notes.handle(), handle);
        assert_eq!(get(&mut reactor, handle).queue_limits(), limits);
        drain(&mut reactor, &peer, count);
        peer.send(b"goes on");
        run_until(&mut reactor, |_| {
            peer.receive().is_ok_and(|it| it.0 == b"goes on")
        });
        assert_eq!(notes.calls(), ["made", "reattached"]);
    });
}

#[test]
fn what_was_received_is_delivered_before_and_a_pause_keeps_it_here() {
    over_all(|place| {
        let mut reactor = Reactor::new().unwrap();
        let budgets = reactor.transport_budgets();
        reactor.set_transport_budgets(budgets.read_bytes(1_024));
        let (peer, notes) = place.connection(&mut reactor, Script::new());
        for number in 0..8 {
            peer.send(&[number]);
        }
        run_until(&mut reactor, |_| notes.count() > 0);
        drop(detach(&mut reactor, &notes).unwrap());
        assert_eq!(notes.count(), 8, "none is lost between two turns");

        let script = Script::new().on_packet(|transport, _, _| transport.pause_producing());
        let (peer, notes) = place.connection(&mut reactor, script);
        peer.send(b"one");
        peer.send(b"two");
        run_until(&mut reactor, |_| notes.count() == 1);
        let error = detach(&mut reactor, &notes).unwrap_err();
        assert_eq!(error, DetachError::NotDetachable);
        get(&mut reactor, notes.handle()).resume_producing();
        run_until(&mut reactor, |_| notes.count() == 2);
        let error: Rc<RefCell<Option<DetachError>>> = Rc::default();
        let noted = Rc::clone(&error);
        reactor.detach::<String>(notes.handle(), move |_, detached| {
            *noted.borrow_mut() = detached.err();
        });
        run_until(&mut reactor, |_| error.borrow().is_some());
        assert_eq!(*error.borrow(), Some(DetachError::WrongProtocol));
    });
}

#[test]
fn packets_that_are_none_are_refused_with_their_socket() {
    let _place = crate::harness::Origin::Adopted.place();
    let mut reactor = Reactor::new().unwrap();
    for bytes in [vec![1], vec![5, 0, 0, 0, 1], vec![255; 8]] {
        let (_peer, fd) = Plain::pair();
        let unsent = Unsent {
            bytes,
            descriptors: Vec::new(),
        };
        let refused = reactor
            .adopt(UnixSeqpacket.with_unsent(unsent), fd, Script::new())
            .unwrap_err();
        assert!(matches!(refused.kind, AdoptErrorKind::UnfitDescriptors));
        assert!(refused.fd.as_fd().try_clone_to_owned().is_ok());
    }
}
