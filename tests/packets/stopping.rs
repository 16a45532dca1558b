//! Connections of packets while the reactor stops.

use std::rc::Rc;
use std::time::Duration;

use bowline::{AtDrain, GracefulStop, Reactor, Transports};

use crate::harness::{Script, over_all};

#[test]
fn a_reactor_that_stops_tells_every_connection() {
    over_all(|place| {
        let mut reactor = Reactor::new().unwrap();
        let (_peer, notes) = place.connection(&mut reactor, Script::new());
        reactor.call_soon(|reactor| reactor.stop_now().unwrap());
        reactor.run().unwrap();
        assert_eq!(notes.calls(), ["made", "lost"]);
        assert_eq!(notes.lost(), ["reactor stopped"]);
    });
}

#[test]
fn a_graceful_stop_answers_what_has_arrived() {
    over_all(|place| {
        let mut reactor = Reactor::new().unwrap();
        let budgets = reactor.transport_budgets();
        reactor.set_transport_budgets(budgets.read_bytes(1_024));
        let (peer, notes) = place.connection(&mut reactor, Script::echo());
        for number in 0..20 {
            peer.send(&[number]);
        }
        reactor.call_soon(|reactor| {
            reactor.stop_gracefully(GracefulStop::default()).unwrap();
        });
        reactor.run().unwrap();
        let expected: Vec<_> = (0..20).map(|number| vec![number]).collect();
        assert_eq!(peer.receive_all(), expected);
        assert_eq!(notes.calls(), ["made", "draining", "lost"]);
        assert_eq!(notes.lost(), ["closed cleanly"]);
        assert_eq!(reactor.statistics().cut, 0);
    });
}

#[test]
fn a_graceful_stop_waits_for_who_is_not_idle_and_not_for_who_says_so() {
    over_all(|place| {
        let mut reactor = Reactor::new().unwrap();
        let script = Script::new();
        let is_busy = Rc::clone(&script.is_busy);
        is_busy.set(true);
        let (_peer, notes) = place.connection(&mut reactor, script);
        let unwaited = Script::new().at_drain(AtDrain::DoNotWait);
        let (_other, unwaited) = place.connection(&mut reactor, unwaited);
        reactor.call_soon(|reactor| {
            reactor.stop_gracefully(GracefulStop::default()).unwrap();
        });
        let (looked, work) = (notes.clone(), Rc::clone(&is_busy));
        reactor.call_later(Duration::from_millis(300), move |_| {
            assert!(looked.calls().contains(&"draining") && !looked.is_lost());
            work.set(false);
        });
        reactor.run().unwrap();
        assert!(!is_busy.get());
        assert_eq!(notes.lost(), ["closed cleanly"]);
        assert_eq!(unwaited.lost(), ["reactor stopped"]);
        assert_eq!(reactor.statistics().panics, 0);
    });
}
