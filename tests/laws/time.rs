//! Time is a value: a clock that a test moves drives everything that waits.

use std::time::{Duration, Instant};

use bowline::Unix;
use bowline::testing::ManualClock;
use bowline::{
    Address, BuildContext, ConnectError, Connector, Factory, ProducerKind, ProducerRef, Reactor,
    Transports, UnixAddress,
};

use crate::support::{DescriptorLedger, Record, Recorder, settle, socketpair};

/// Contract R-47.
#[test]
fn deadline_of_closing_is_the_clocks() {
    let ledger = DescriptorLedger::open();
    let clock = ManualClock::new();
    let mut reactor = Reactor::with_clock(clock.clone()).unwrap();
    let (ours, theirs) = socketpair();
    let record = Record::default();
    let handle = reactor
        .adopt_unix_stream(ours.into(), Recorder::new(&record))
        .unwrap();
    let transport = reactor.get(handle).unwrap();
    transport.write(&vec![0; 2_000_000]);
    transport.lose_connection_within(Duration::from_secs(3600));
    settle(&mut reactor);
    clock.advance(Duration::from_secs(3599));
    settle(&mut reactor);
    assert_eq!(record.summary(), ["made"]);
    clock.advance(Duration::from_secs(1));
    settle(&mut reactor);
    assert_eq!(
        record.summary(),
        [
            "made",
            "lost not everything could be sent before the deadline"
        ]
    );
    drop((reactor, theirs));
    ledger.assert_balanced();
}

struct NotesFailure {
    record: Record,
}

impl Factory for NotesFailure {
    type Protocol = Recorder;

    fn build_protocol(&mut self, _: &mut BuildContext<'_>, _: &Address) -> Option<Recorder> {
        Some(Recorder::new(&self.record))
    }

    fn connection_failed(&mut self, _: &mut BuildContext<'_>, error: &ConnectError) {
        self.record
            .push(crate::support::Event::Lost(error.to_string()));
    }
}

/// Contract R-47.
#[test]
fn connecting_times_out_by_the_clock() {
    let ledger = DescriptorLedger::open();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let full = rustix::net::socket_with(
        rustix::net::AddressFamily::UNIX,
        rustix::net::SocketType::STREAM,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )
    .unwrap();
    rustix::net::bind(&full, &rustix::net::SocketAddrUnix::new(&path).unwrap()).unwrap();
    rustix::net::listen(&full, 0).unwrap();
    let waiting = std::os::unix::net::UnixStream::connect(&path).unwrap();
    let clock = ManualClock::new();
    clock.auto_advance(true);
    let mut reactor = Reactor::with_clock(clock).unwrap();
    let start = reactor.now();
    let record = Record::default();
    let connector = reactor
        .connect(
            Unix::to(UnixAddress::Path(path)).timeout(Duration::from_secs(60)),
            NotesFailure {
                record: record.clone(),
            },
        )
        .unwrap();
    let began = Instant::now();
    while record.summary().is_empty() {
        reactor.turn(None);
        assert!(began.elapsed() < crate::support::DEADLINE);
    }
    assert_eq!(
        record.summary(),
        ["lost connecting took longer than its timeout"]
    );
    assert_eq!(reactor.now() - start, Duration::from_secs(60));
    assert!(
        reactor
            .get(connector)
            .map(|it: &mut dyn Connector| it.state())
            .is_none()
    );
    assert_eq!(reactor.delayed_calls().count(), 0);
    drop((reactor, full, waiting, directory));
    ledger.assert_balanced();
}

/// Contract R-47.
#[test]
fn idle_pull_producer_is_asked_again_by_the_clock() {
    let _alone = DescriptorLedger::open();
    let clock = ManualClock::new();
    let mut reactor = Reactor::with_clock(clock.clone()).unwrap();
    let (ours, _theirs) = socketpair();
    let record = Record::default();
    let handle = reactor
        .adopt_unix_stream(ours.into(), Recorder::new(&record))
        .unwrap();
    let transport = reactor.get(handle).unwrap();
    transport
        .register_producer(ProducerRef::Protocol, ProducerKind::Pull)
        .unwrap();
    settle(&mut reactor);
    assert_eq!(record.summary(), ["made", "resumed"]);
    clock.advance(Duration::from_secs(1));
    settle(&mut reactor);
    assert_eq!(record.summary(), ["made", "resumed", "resumed"]);
}
