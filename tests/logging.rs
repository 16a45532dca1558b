//! What is written to the log, and who it says it is about.

#[path = "policies/capture.rs"]
mod capture;
#[path = "support/mod.rs"]
mod support;

use std::time::Duration;

use bowline::{
    Address, CloseReason, Context, Phase, Protocol, Reactor, SystemEvent, Transport, Transports,
};

use crate::support::{DescriptorLedger, Record, Recorder, run_until, run_until_quiet, socketpair};

const PANIC: &str = "on purpose, in a test";

/// Contract G-03, G-04, L-29.
#[test]
fn listeners_say_where_they_listen_and_that_they_closed() {
    let ledger = DescriptorLedger::open();
    capture::start();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let mut reactor = Reactor::new().unwrap();
    let factory = |_: &Address| Recorder::default();
    let any = ([127, 0, 0, 1], 0).into();
    let listeners = [
        reactor.listen_tcp(any, factory).unwrap(),
        reactor.listen_unix(path.clone(), factory).unwrap(),
    ];
    run_until_quiet(&mut reactor);
    let port = reactor.get(listeners[0]).unwrap().address().to_string();
    assert!(!port.ends_with(":0"));
    let path = path.to_str().unwrap();
    for address in [port.as_str(), path] {
        assert_eq!(capture::lines(&format!("listening on {address}")).len(), 1);
        assert!(capture::lines(&format!("closed {address}")).is_empty());
    }
    for listener in listeners {
        reactor.get(listener).unwrap().stop_listening();
    }
    run_until_quiet(&mut reactor);
    for address in [port.as_str(), path] {
        assert_eq!(capture::lines(&format!("closed {address}")).len(), 1);
    }
    drop((reactor, directory));
    ledger.assert_balanced();
}

/// Says so in a record when it is over; panics when it receives anything.
struct Fragile(Record);

impl<T: Transport> Protocol<T> for Fragile {
    fn data_received(&mut self, _: &mut Context<'_, T>, _: &[u8]) {
        panic!("{PANIC}");
    }

    fn connection_lost(&mut self, _: &mut Context<'_, T>, reason: &CloseReason) {
        self.0.push(support::Event::Lost(reason.to_string()));
    }
}

/// Contract L-14, T-14, G-10.
#[test]
fn both_ends_of_a_connection_have_their_protocol_and_peer_in_the_log() {
    let ledger = DescriptorLedger::open();
    capture::start();
    let mut reactor = Reactor::new().unwrap();
    let (server, client) = (Record::default(), Record::default());
    let at_server = Recorder::new(&server);
    let at_client = client.clone();
    let listener = reactor
        .listen_tcp(([127, 0, 0, 1], 0).into(), move |_: &Address| {
            at_server.clone()
        })
        .unwrap();
    let address = reactor.get(listener).unwrap().address().as_inet().unwrap();
    reactor
        .connect_tcp(address, move |_: &Address| Fragile(at_client.clone()))
        .unwrap();
    run_until(&mut reactor, |_| !server.summary().is_empty());
    let accepted = reactor.get(server.handle(0)).unwrap();
    let from = accepted.peer();
    accepted.lose_connection();
    run_until(&mut reactor, |_| server.is_lost() && client.is_lost());
    for (protocol, peer) in [
        ("Recorder", from.to_string()),
        ("Fragile", address.to_string()),
    ] {
        let lines = capture::lines("closed cleanly");
        let about = |line: &&String| line.contains(&format!("{protocol},TCP,{peer}: "));
        assert_eq!(lines.iter().filter(about).count(), 1, "{lines:?}");
    }
    drop(reactor);
    ledger.assert_balanced();
}

/// Contract G-09, G-10.
#[test]
fn each_panic_is_logged_once_and_says_whose_it_is() {
    let ledger = DescriptorLedger::open();
    capture::start();
    let message = format!("a callback panicked: {PANIC}");
    let mut reactor = Reactor::new().unwrap();
    let record = Record::default();
    let (ours, mut theirs) = socketpair();
    reactor
        .adopt_unix_stream(ours.into(), Fragile(record.clone()))
        .unwrap();
    std::io::Write::write_all(&mut theirs, b"x").unwrap();
    run_until(&mut reactor, |_| record.is_lost());
    let lines = capture::lines(&message);
    assert_eq!(lines.len(), 1);
    assert!(lines[0].starts_with("ERROR: "), "{lines:?}");
    assert!(lines[0].contains(" Fragile,UNIX,unnamed: "), "{lines:?}");

    // Those that are nobody's, each with its own text.
    reactor.call_later(Duration::ZERO, |_| panic!("timer"));
    let remote = reactor.remote();
    remote.call_from_thread(|_| panic!("call")).unwrap();
    reactor.add_trigger(Phase::Before, SystemEvent::Shutdown, |_| panic!("trigger"));
    reactor.call_later(Duration::from_millis(1), |reactor| reactor.stop().unwrap());
    reactor.run().unwrap();
    for text in ["timer", "call", "trigger"] {
        let message = format!("a callback panicked: {text}");
        assert_eq!(capture::lines(&message).len(), 1, "{text}");
    }
    drop((reactor, remote, theirs));
    ledger.assert_balanced();
}
