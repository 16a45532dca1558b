//! What becomes of descriptors when the reactor stops.

use std::cell::RefCell;
use std::rc::Rc;

use bowline::lifecycle::{Phase, SystemEvent};
use bowline::{
    Address, BuildContext, CloseReason, ConnectError, Context, Factory, Protocol, Reactor,
    Transport, Transports,
};

use crate::support::{DescriptorLedger, Record, Recorder, run_until, socketpair};
use crate::{Notes, PANIC};

/// Stops the reactor and turns it until it has.
fn stop(reactor: &mut Reactor) {
    reactor.call_soon(|reactor| reactor.stop().unwrap());
    reactor.run().unwrap();
}

/// Contract.
#[test]
fn every_transport_is_told_once_paused_ones_included() {
    let ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let records: Vec<Record> = (0..6).map(|_| Record::default()).collect();
    let mut peers = Vec::new();
    for (number, record) in records.iter().enumerate() {
        let (ours, theirs) = socketpair();
        let handle = reactor
            .adopt_unix_stream(ours.into(), Recorder::new(record))
            .unwrap();
        let transport = reactor.get(handle).unwrap();
        match number {
            0 => transport.pause_producing(),
            1 => drop(transport.write(&vec![0; 1_000_000])),
            2 => {
                transport.write(&vec![0; 1_000_000]);
                transport.lose_connection();
            }
            3 => transport.lose_write_connection(),
            4 => {
                transport.pause_producing();
                std::io::Write::write_all(&mut &theirs, b"unread").unwrap();
            }
            _ => {}
        }
        peers.push(theirs);
    }
    reactor.turn(Some(std::time::Duration::ZERO));
    // One is not even told that it was made.
    let late = Record::default();
    let (ours, theirs) = socketpair();
    peers.push(theirs);
    let late_recorder = Recorder::new(&late);
    reactor.add_trigger(Phase::Before, SystemEvent::Shutdown, move |reactor| {
        reactor
            .adopt_unix_stream(ours.into(), late_recorder)
            .unwrap();
    });
    stop(&mut reactor);
    for (number, record) in records.iter().chain([&late]).enumerate() {
        let mut summary = record.summary();
        if number == 3 {
            assert_eq!(summary.remove(1), "write closed");
        }
        assert_eq!(summary, ["made", "lost reactor stopped"], "number {number}");
    }
    assert_eq!(reactor.registered(), 0);
    drop((reactor, peers));
    ledger.assert_balanced();
}

/// Contract R-14.
#[test]
fn connections_are_lost_between_the_first_and_the_second_phase() {
    let _alone = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let (ours, _theirs) = socketpair();
    let record = Record::default();
    let handle = reactor
        .adopt_unix_stream(ours.into(), Recorder::new(&record))
        .unwrap();
    let notes = Notes::new();
    for phase in [Phase::Before, Phase::During, Phase::After] {
        let (notes, record) = (notes.clone(), record.clone());
        reactor.add_trigger(phase, SystemEvent::Shutdown, move |reactor| {
            notes.push((record.is_lost(), reactor.get(handle).is_some()));
        });
    }
    stop(&mut reactor);
    assert_eq!(notes.all(), [(false, true), (true, false), (true, false)]);
}

struct Fails {
    record: Record,
}

impl<T: Transport> Protocol<T> for Fails {
    fn data_received(&mut self, _: &mut Context<'_, T>, _: &[u8]) {}

    fn connection_lost(&mut self, _: &mut Context<'_, T>, reason: &CloseReason) {
        self.record
            .push(crate::support::Event::Lost(reason.to_string()));
        panic!("{PANIC}");
    }
}

/// Contract R-12.
#[test]
fn failing_connection_lost_does_not_spare_the_others() {
    let ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let mut peers = Vec::new();
    let fails = Record::default();
    let works = Record::default();
    for number in 0..10 {
        let (ours, theirs) = socketpair();
        peers.push(theirs);
        if number % 2 == 0 {
            let protocol = Fails {
                record: fails.clone(),
            };
            reactor.adopt_unix_stream(ours.into(), protocol).unwrap();
        } else {
            reactor
                .adopt_unix_stream(ours.into(), Recorder::new(&works))
                .unwrap();
        }
    }
    let notes = Notes::new();
    reactor.add_trigger(Phase::After, SystemEvent::Shutdown, notes.noting("after"));
    stop(&mut reactor);
    assert_eq!(fails.summary(), ["lost reactor stopped"; 5]);
    let lost = works
        .summary()
        .into_iter()
        .filter(|it| it == "lost reactor stopped");
    assert_eq!(lost.count(), 5);
    assert_eq!(notes.len(), 1);
    assert_eq!(reactor.statistics().panics, 5);
    drop((reactor, peers));
    ledger.assert_balanced();
}

/// A factory that connects again whenever it can.
#[derive(Clone)]
struct Stubborn {
    notes: Notes<String>,
}

struct StubbornProtocol {
    notes: Notes<String>,
}

impl<T: Transport> Protocol<T> for StubbornProtocol {
    fn connection_made(&mut self, _: &mut Context<'_, T>) {
        self.notes.push("made".into());
    }

    fn data_received(&mut self, _: &mut Context<'_, T>, _: &[u8]) {}

    fn connection_lost(&mut self, _: &mut Context<'_, T>, reason: &CloseReason) {
        self.notes.push(format!("lost {reason}"));
    }
}

impl Factory for Stubborn {
    type Protocol = StubbornProtocol;

    fn build_protocol(
        &mut self,
        _: &mut BuildContext<'_>,
        _: &Address,
    ) -> Option<StubbornProtocol> {
        self.notes.push("build".into());
        Some(StubbornProtocol {
            notes: self.notes.clone(),
        })
    }

    fn started(&mut self, _: &mut BuildContext<'_>) {
        self.notes.push("started".into());
    }

    fn stopped(&mut self, _: &mut BuildContext<'_>) {
        self.notes.push("stopped".into());
    }

    fn connection_failed(&mut self, cx: &mut BuildContext<'_>, error: &ConnectError) {
        self.notes.push(format!("failed {error}"));
        if let Some(connector) = cx.connector() {
            connector.connect();
        }
    }

    fn connection_lost(&mut self, cx: &mut BuildContext<'_>, reason: &CloseReason) {
        self.notes.push(format!("factory lost {reason}"));
        if let Some(connector) = cx.connector() {
            connector.connect();
        }
    }
}

/// The connector stands in an older slot than its connection and used to be
/// told first; and one that asked for another attempt was never told that it
/// had been given up.
#[test]
fn connector_is_told_after_its_connection_and_then_stopped() {
    let ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let server = Record::default();
    let recorder = Recorder::new(&server);
    let listener = reactor
        .listen_tcp(([127, 0, 0, 1], 0).into(), move |_: &Address| {
            recorder.clone()
        })
        .unwrap();
    let address = reactor.get(listener).unwrap().address().as_inet().unwrap();
    let factory = Stubborn {
        notes: Notes::new(),
    };
    let notes = factory.notes.clone();
    reactor.connect_tcp(address, factory).unwrap();
    run_until(&mut reactor, |_| {
        notes.len() >= 3 && !server.summary().is_empty()
    });
    stop(&mut reactor);
    assert_eq!(
        notes.all(),
        [
            "started",
            "build",
            "made",
            "lost reactor stopped",
            "factory lost reactor stopped",
            "stopped",
        ]
    );
    drop(reactor);
    ledger.assert_balanced();
}

#[test]
fn attempt_that_runs_at_the_shutdown_fails_with_that_reason() {
    let ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let factory = Stubborn {
        notes: Notes::new(),
    };
    let notes = factory.notes.clone();
    // Nobody accepts here, and there is no room to wait.
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let full = rustix::net::socket_with(
        rustix::net::AddressFamily::UNIX,
        rustix::net::SocketType::STREAM,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )
    .unwrap();
    let name = rustix::net::SocketAddrUnix::new(&path).unwrap();
    rustix::net::bind(&full, &name).unwrap();
    rustix::net::listen(&full, 0).unwrap();
    let waiting = std::os::unix::net::UnixStream::connect(&path).unwrap();
    reactor
        .connect_unix(bowline::UnixAddress::Path(path), factory)
        .unwrap();
    run_until(&mut reactor, |_| notes.len() >= 1);
    stop(&mut reactor);
    assert_eq!(
        notes.all(),
        [
            "started",
            "failed reactor stopped while connecting",
            "stopped"
        ]
    );
    assert_eq!(reactor.delayed_calls().count(), 0);
    drop((reactor, full, waiting));
    ledger.assert_balanced();
}

/// Connects to `address` anew from its `connection_lost`.
struct Reconnects {
    address: std::net::SocketAddr,
    lost: Rc<RefCell<Vec<String>>>,
}

impl<T: Transport> Protocol<T> for Reconnects {
    fn data_received(&mut self, _: &mut Context<'_, T>, _: &[u8]) {}

    fn connection_lost(&mut self, cx: &mut Context<'_, T>, reason: &CloseReason) {
        self.lost.borrow_mut().push(reason.to_string());
        let (address, lost) = (self.address, Rc::clone(&self.lost));
        let factory = move |_: &Address| Self {
            address,
            lost: Rc::clone(&lost),
        };
        cx.reactor.connect_tcp(address, factory).unwrap();
    }
}

#[test]
fn reconnecting_in_connection_lost_does_not_keep_the_reactor() {
    let ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    // Another's listener, which is there for as long as anyone connects.
    let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let address = listener.local_addr().unwrap();
    let lost = Rc::new(RefCell::new(Vec::new()));
    let mut peers = Vec::new();
    for _ in 0..3 {
        let (ours, theirs) = socketpair();
        let protocol = Reconnects {
            address,
            lost: Rc::clone(&lost),
        };
        reactor.adopt_unix_stream(ours.into(), protocol).unwrap();
        peers.push(theirs);
    }
    stop(&mut reactor);
    assert!(lost.borrow().len() >= 3);
    assert_eq!(reactor.registered(), 0);
    drop((reactor, listener, peers));
    ledger.assert_balanced();
}

#[test]
fn all_notices_of_a_shutdown_arrive_however_many() {
    let _alone = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    reactor.set_limits(reactor.limits().notifications(1));
    struct Defers(Notes<u32>);
    impl<T: Transport> Protocol<T> for Defers {
        fn data_received(&mut self, _: &mut Context<'_, T>, _: &[u8]) {}
        fn connection_lost(&mut self, cx: &mut Context<'_, T>, _: &CloseReason) {
            cx.reactor.defer(self.0.noting(1));
        }
    }
    let notes = Notes::new();
    let peers: Vec<_> = (0..10)
        .map(|_| {
            let (ours, theirs) = socketpair();
            reactor
                .adopt_unix_stream(ours.into(), Defers(notes.clone()))
                .unwrap();
            theirs
        })
        .collect();
    stop(&mut reactor);
    assert_eq!(notes.len(), 10);
    drop(peers);
}
