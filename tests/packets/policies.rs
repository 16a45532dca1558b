//! Factories and the layers around them, over connections of packets.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use bowline::endpoint::{Adopt as _, Carried};
use bowline::policies::{Backoff, Event, LimitConnections, Policy, ProtocolWrapper, Reconnecting};
use bowline::{Address, Context, Once, Reactor, Transports, UnixSeqpacket};

use crate::harness::{Origin, Plain, Script, Scripts};
use crate::support::{run_until, run_until_quiet};

/// The same as over streams.
#[test]
fn reconnecting_finds_a_listener_that_comes_later_and_comes_back() {
    let place = Origin::Connected.place();
    let mut reactor = Reactor::new().unwrap();
    let path = place.path();
    let scripts: Vec<_> = (0..2).map(|_| Script::new()).collect();
    let notes: Vec<_> = scripts.iter().map(Script::notes).collect();
    let inner = Scripts {
        waiting: scripts,
        ..Scripts::default()
    };
    let calls = Rc::clone(&inner.calls);
    let soon = Backoff::new().first(Duration::from_millis(1));
    let factory = Reconnecting::new(inner).backoff(soon);
    let reconnection = factory.reconnection();
    reactor
        .connect(UnixSeqpacket::to(path.clone()), factory)
        .unwrap();
    run_until(&mut reactor, |_| reconnection.retries() >= 2);
    let listening = Plain::listening(&path);
    run_until(&mut reactor, |_| notes[0].calls() == ["made"]);
    drop(listening.accept());
    run_until(&mut reactor, |_| notes[0].is_lost());
    run_until(&mut reactor, |_| notes[1].calls() == ["made"]);
    reconnection.stop_trying(&mut reactor);
    drop(listening.accept());
    run_until(&mut reactor, |_| {
        calls.borrow().contains(&"stopped".to_owned())
    });
    assert_eq!(
        calls
            .borrow()
            .iter()
            .filter(|call| *call == "built")
            .count(),
        2
    );
}

/// Counts the bytes that packets bring.
struct Meter(Rc<Cell<usize>>);

impl<T: ?Sized> Policy<T> for Meter {
    fn before(&mut self, _: &mut Context<'_, T>, event: &Event<'_>) {
        if let Event::PacketReceived { .. } = event {
            self.0.set(self.0.get() + event.received_bytes());
        }
    }
}

#[test]
fn connections_beyond_a_limit_are_declined_with_a_word() {
    let place = Origin::Accepted.place();
    let mut reactor = Reactor::new().unwrap();
    let path = place.path();
    let met = Rc::new(Cell::new(0));
    let meter = Rc::clone(&met);
    let build = move |_: &Address| ProtocolWrapper::new(Script::echo(), Meter(Rc::clone(&meter)));
    let factory = LimitConnections::new(build)
        .total(Some(1))
        .farewell(*b"full");
    let count = factory.count();
    let listener = reactor
        .listen(UnixSeqpacket::at(path.clone()), factory)
        .unwrap();
    let first = Plain::connected(&path).unwrap();
    first.send(b"to be met");
    run_until(&mut reactor, |_| {
        first.receive().is_ok_and(|it| it.0 == b"to be met")
    });
    assert_eq!((count.open(), met.get()), (1, 9));
    let second = Plain::connected(&path).unwrap();
    // What it says has no answer, and does not destroy the word.
    second.send(b"unheard");
    run_until(&mut reactor, |_| {
        second.receive().is_ok_and(|it| it.0 == b"full")
    });
    assert!(second.is_at_end());
    assert_eq!((count.open(), count.declined()), (1, 1));
    drop((first, second));
    run_until(&mut reactor, |_| count.open() == 0);
    reactor.get(listener).unwrap().stop_listening();
    run_until_quiet(&mut reactor);
}

#[test]
fn once_accepts_exactly_one() {
    let place = Origin::Accepted.place();
    let mut reactor = Reactor::new().unwrap();
    let path = place.path();
    let script = Script::echo();
    let notes = script.notes();
    reactor
        .listen(UnixSeqpacket::at(path.clone()), Once::new(script))
        .unwrap();
    let only = Plain::connected(&path).unwrap();
    run_until(&mut reactor, |_| notes.calls() == ["made"]);
    run_until_quiet(&mut reactor);
    assert!(Plain::connected(&path).is_err(), "it listens on");
    only.send(b"again");
    run_until(&mut reactor, |_| {
        only.receive().is_ok_and(|it| it.0 == b"again")
    });
}

/// Another holder of the socket sees its end when the one that serves it has closed.
#[test]
fn the_close_of_a_connection_ends_it_for_all_where_that_was_asked() {
    for ends_for_all in [false, true] {
        let (peer, fd) = Plain::pair();
        let mut reactor = Reactor::new().unwrap();
        let other = Plain(fd.try_clone().unwrap());
        let carried = Carried {
            ends_for_all,
            ..Carried::default()
        };
        let script = Script::new();
        let notes = script.notes();
        reactor
            .adopt(UnixSeqpacket.carrying(carried), fd, script)
            .unwrap();
        run_until(&mut reactor, |_| notes.calls() == ["made"]);
        let handle = notes.handle();
        reactor.get(handle).unwrap().lose_connection();
        run_until(&mut reactor, |_| notes.is_lost());
        assert_eq!(peer.is_at_end(), ends_for_all);
        drop(other);
        assert!(peer.is_at_end());
    }
}

/// A connection of packets has no bytes that were read and not used.
#[test]
fn unread_bytes_are_refused() {
    let (_peer, fd) = Plain::pair();
    let mut reactor = Reactor::new().unwrap();
    let carried = Carried {
        unread: b"bytes".to_vec(),
        ..Carried::default()
    };
    let refused = reactor.adopt(UnixSeqpacket.carrying(carried), fd, Script::new());
    let error = refused.unwrap_err();
    assert!(matches!(
        error.kind,
        bowline::error::AdoptErrorKind::UnfitDescriptors
    ));
}
