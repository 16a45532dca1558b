//! The end: at once, within a time, and when what is in work is done.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use bowline::{AtDrain, GracefulStop, Reactor, Transports};

use crate::harness::{Kind, Script, get, over_all};
use crate::support::run_until;

#[test]
fn a_reactor_that_stops_tells_every_socket() {
    over_all(|place| {
        let mut reactor = Reactor::new().unwrap();
        let script = Script::new();
        let notes = script.notes();
        place.listen(&mut reactor, script);
        reactor.call_soon(|reactor| reactor.stop_now().unwrap());
        reactor.run().unwrap();
        notes.told(|told| {
            assert_eq!(told.calls, ["started", "stopped"]);
            assert_eq!(told.stopped, ["reactor stopped"]);
        });
    });
}

#[test]
fn a_graceful_stop_answers_what_has_arrived() {
    over_all(|place| {
        let mut reactor = Reactor::new().unwrap();
        // A few datagrams a turn, so that some wait when it is told.
        let budgets = reactor.transport_budgets();
        reactor.set_transport_budgets(budgets.read_bytes(1_024));
        let script = Script::echo();
        let notes = script.notes();
        let (_, here) = place.listen(&mut reactor, script);
        let peer = place.plain();
        for number in 0..8 {
            peer.send(&[number], &here);
        }
        reactor.call_soon(|reactor| {
            reactor.stop_gracefully(GracefulStop::default()).unwrap();
        });
        reactor.run().unwrap();
        let expected: Vec<_> = (0..8).map(|number| vec![number]).collect();
        assert_eq!(peer.receive_all(), expected);
        notes.told(|told| {
            assert_eq!(told.stopped, ["closed cleanly"]);
            assert_eq!(told.draining, 1);
        });
        assert_eq!(reactor.statistics().cut, 0);
    });
}

#[test]
fn a_graceful_stop_waits_for_work_that_is_not_done() {
    over_all(|place| {
        let mut reactor = Reactor::new().unwrap();
        let is_busy = Rc::new(Cell::new(false));
        let busy = Rc::clone(&is_busy);
        let script =
            Script::new()
                .busy(&is_busy)
                .on_datagram(move |transport, reactor, datagram| {
                    // Answered by a timer.
                    busy.set(true);
                    let (handle, from) = (transport.handle(), datagram.from.to_address());
                    let busy = Rc::clone(&busy);
                    reactor.call_later(Duration::from_millis(30), move |reactor| {
                        get(reactor, handle).send_to(b"late", from.as_ref());
                        busy.set(false);
                    });
                });
        let notes = script.notes();
        let (_, here) = place.listen(&mut reactor, script);
        let peer = place.plain();
        peer.send(b"question", &here);
        run_until(&mut reactor, |_| notes.count() == 1);
        reactor.call_soon(|reactor| {
            reactor.stop_gracefully(GracefulStop::default()).unwrap();
        });
        reactor.run().unwrap();
        assert_eq!(peer.receive_all(), [b"late"]);
        notes.told(|told| assert_eq!(told.stopped, ["closed cleanly"]));
    });
}

#[test]
fn a_socket_may_end_by_itself_or_not_be_waited_for() {
    over_all(|place| {
        for answer in [AtDrain::GoOn, AtDrain::DoNotWait] {
            let mut reactor = Reactor::new().unwrap();
            let script = Script::new().at_drain(answer);
            let notes = script.notes();
            let (handle, _) = place.listen(&mut reactor, script);
            reactor.call_soon(move |reactor| {
                reactor.stop_gracefully(GracefulStop::default()).unwrap();
                if answer == AtDrain::GoOn {
                    reactor.call_later(Duration::from_millis(20), move |reactor| {
                        get(reactor, handle).stop_listening();
                    });
                }
            });
            reactor.run().unwrap();
            let expected = match answer {
                AtDrain::GoOn => "closed cleanly",
                _ => "reactor stopped",
            };
            notes.told(|told| assert_eq!(told.stopped, [expected]));
        }
    });
}

#[test]
fn a_stop_within_a_time_drops_what_could_not_leave() {
    let place = Kind::UnixPath.place();
    let mut reactor = Reactor::new().unwrap();
    let unsent = Rc::new(Cell::new(0));
    let seen = Rc::clone(&unsent);
    let script = Script::new().on_stop(move |transport, _| seen.set(transport.unsent_datagrams()));
    let notes = script.notes();
    let (handle, _) = place.listen(&mut reactor, script);
    let lazy = place.plain();
    for _ in 0..100 {
        get(&mut reactor, handle).send_to(b"a", lazy.address().as_ref());
    }
    get(&mut reactor, handle).stop_listening_within(Duration::from_millis(50));
    run_until(&mut reactor, |_| notes.is_stopped());
    assert!(unsent.get() > 0);
    notes.told(|told| {
        assert!(told.stopped[0].contains("deadline"), "{:?}", told.stopped);
    });
    // What it had room for has arrived.
    assert_eq!(lazy.receive_all().len() + unsent.get(), 100);
}
