//! Connections that are made later than their sockets, or never.

use std::cell::{Cell, RefCell};
use std::io;
use std::rc::Rc;
use std::time::Duration;

use bowline::endpoint::{Adopt as _, Connect as _};
use bowline::policies::{Backoff, Reconnecting};
use bowline::testing::ManualClock;
use bowline::{
    Address, BuildContext, CloseReason, ConnectError, ConnectorHandle, ConnectorState, Factory,
    Handle, Reactor, TransportHandle, Transports, Unix, UnixTransport, WriteStatus,
};
use bowline_outside::{FrameKind, Settings};

use crate::harness::{
    Buffers, Kind, Passing, Peer, Raw, Script, over_every_layer, passing, scrambled,
};
use crate::support::{DescriptorLedger, Event, Record, Recorder, run_until, run_until_quiet};

over_every_layer!(
    a_peer_without_the_secret_is_refused,
    a_handshake_that_takes_too_long_ends,
    a_peer_that_ends_in_the_handshake_is_told_of,
    what_is_no_frame_ends_the_handshake,
    nothing_is_told_before_the_connection_is_made,
);

struct Half {
    reactor: Reactor,
    clock: ManualClock,
    record: Record,
    peer: Peer,
    is_server: bool,
    _directory: Option<tempfile::TempDir>,
    _ledger: DescriptorLedger,
}

impl Half {
    fn new(kind: Kind, script: Script) -> Self {
        let ledger = DescriptorLedger::open();
        let clock = ManualClock::new();
        let mut reactor = Reactor::with_clock(clock.clone()).unwrap();
        let record = script.record();
        let settings = Settings::default();
        let (raw, directory) = kind.connect_raw(&mut reactor, Buffers::Default, script, settings);
        let is_server = !matches!(
            kind,
            Kind::ConnectingTcp | Kind::ConnectingUnix | Kind::ConnectingPassing
        );
        run_until_quiet(&mut reactor);
        Self {
            reactor,
            clock,
            record,
            peer: Peer::new(raw, Some(is_server)),
            is_server,
            _directory: directory,
            _ledger: ledger,
        }
    }

    fn lost(&self) -> String {
        let lost = RefCell::new(None);
        self.record.count(|event| {
            if let Event::Lost(reason) = event {
                lost.replace(Some(reason.clone()));
            }
            false
        });
        lost.take().expect("it is lost")
    }

    #[track_caller]
    fn run_until_lost(&mut self) {
        let record = self.record.clone();
        run_until(&mut self.reactor, |_| record.is_lost());
        run_until_quiet(&mut self.reactor);
        assert_eq!(
            self.record.summary().len(),
            1,
            "{:?}",
            self.record.summary()
        );
    }
}

/// The refusal leaves before the end, and the reason says so.
fn a_peer_without_the_secret_is_refused(kind: Kind) {
    let mut half = Half::new(kind, Script::new());
    if half.is_server {
        half.peer.say(FrameKind::Hello, b"who");
        half.peer.next_frame(&mut half.reactor, FrameKind::Hello);
        half.peer.say(FrameKind::Proof, b"no proof");
        let why = half.peer.next_frame(&mut half.reactor, FrameKind::Refuse);
        assert_eq!(why, b"wrong secret");
        half.run_until_lost();
        assert!(
            half.lost().contains("the peer was refused"),
            "{}",
            half.lost()
        );
        assert_eq!(half.peer.raw.read(&mut [0]).unwrap(), 0);
    } else {
        half.peer.next_frame(&mut half.reactor, FrameKind::Hello);
        half.peer.say(FrameKind::Hello, b"who");
        half.peer.next_frame(&mut half.reactor, FrameKind::Proof);
        half.peer.say(FrameKind::Refuse, b"not you");
        half.run_until_lost();
        assert!(half.lost().ends_with("refused by the peer: not you"));
    }
}

fn a_handshake_that_takes_too_long_ends(kind: Kind) {
    let mut half = Half::new(kind, Script::new());
    half.clock.advance(Duration::from_millis(19_999));
    run_until_quiet(&mut half.reactor);
    assert!(!half.record.is_lost());
    half.clock.advance(Duration::from_millis(1));
    half.run_until_lost();
    assert!(half.lost().ends_with("the handshake took too long"));
}

fn a_peer_that_ends_in_the_handshake_is_told_of(kind: Kind) {
    for has_begun in [false, true] {
        let mut half = Half::new(kind, Script::new());
        if has_begun {
            half.peer.say(FrameKind::Hello, b"who");
            run_until_quiet(&mut half.reactor);
        }
        half.peer = Peer::new(Raw::Unix(crate::support::socketpair().0), None);
        half.run_until_lost();
        assert!(half.lost().starts_with("connection lost"));
    }
}

fn what_is_no_frame_ends_the_handshake(kind: Kind) {
    let mut half = Half::new(kind, Script::new());
    half.peer.raw.write(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    half.run_until_lost();
    assert!(half.lost().ends_with("no frame"), "{}", half.lost());
}

/// Whatever is asked of the transport meanwhile, and though reading is paused.
fn nothing_is_told_before_the_connection_is_made(kind: Kind) {
    let mut half = Half::new(kind, Script::new());
    half.reactor.start().unwrap();
    half.reactor
        .stop_gracefully(bowline::GracefulStop::new())
        .unwrap();
    run_until_quiet(&mut half.reactor);
    assert!(half.record.summary().is_empty());
    assert!(
        half.reactor.is_stopping(),
        "does not wait for the handshake"
    );
    let secret = Settings::default().secret;
    half.peer
        .shake_hands(&mut half.reactor, &half.record, secret);
    assert_eq!(half.record.summary()[0], "made");
    let record = half.record.clone();
    run_until(&mut half.reactor, |_| record.summary().len() > 1);
    assert_eq!(half.record.summary()[1], "draining");
}

/// A connection of ours that has yet to be established, which was written to and is to
/// close.
fn written_and_lost(half: &mut Half, handle: TransportHandle) {
    let transport = half.reactor.get(handle).unwrap();
    assert_eq!(transport.write(b"before"), WriteStatus::Ready);
    transport.lose_connection();
    assert_eq!(transport.write(b"after"), WriteStatus::Refused);
    assert!(!transport.is_open_for_reading());
    run_until_quiet(&mut half.reactor);
    assert!(half.record.summary().is_empty(), "it waits");
}

fn adopted(script: Script) -> (Half, TransportHandle) {
    let ledger = DescriptorLedger::open();
    let clock = ManualClock::new();
    let mut reactor = Reactor::with_clock(clock.clone()).unwrap();
    let record = script.record();
    let (ours, theirs) = crate::support::socketpair();
    let kind = Unix.layer(passing(Settings::default()));
    let handle = reactor.adopt(kind, ours.into(), script).unwrap();
    let half = Half {
        reactor,
        clock,
        record,
        peer: Peer::new(Raw::Unix(theirs), Some(true)),
        is_server: true,
        _directory: None,
        _ledger: ledger,
    };
    (half, handle)
}

/// And then the connection closes, pause or not.
#[test]
fn what_was_written_before_the_handshake_leaves_although_it_is_to_close() {
    for is_paused in [false, true] {
        let (mut half, handle) = adopted(Script::new());
        if is_paused {
            half.reactor.get(handle).unwrap().pause_producing();
        }
        written_and_lost(&mut half, handle);
        let secret = Settings::default().secret;
        half.peer
            .shake_hands(&mut half.reactor, &half.record, secret);
        assert_eq!(
            half.peer.next_frame(&mut half.reactor, FrameKind::Data),
            b"before"
        );
        half.peer.next_frame(&mut half.reactor, FrameKind::Close);
        let record = half.record.clone();
        run_until(&mut half.reactor, |_| record.is_lost());
        assert_eq!(record.summary(), ["made", "lost closed cleanly"]);
    }
}

/// A peer that never shakes hands does not keep it.
#[test]
fn who_waits_for_the_handshake_to_close_waits_as_long_as_that_may_take() {
    let (mut half, handle) = adopted(Script::new());
    written_and_lost(&mut half, handle);
    half.clock.advance(Duration::from_millis(19_999));
    run_until_quiet(&mut half.reactor);
    assert!(!half.record.is_lost());
    half.clock.advance(Duration::from_millis(1));
    half.run_until_lost();
    assert!(half.lost().ends_with("the handshake took too long"));
}

#[test]
fn who_waits_for_the_handshake_to_close_waits_no_longer_than_it_wants() {
    let (mut half, handle) = adopted(Script::new());
    let transport = half.reactor.get(handle).unwrap();
    transport.write(b"before");
    transport.lose_connection_within(Duration::from_secs(1));
    run_until_quiet(&mut half.reactor);
    half.clock.advance(Duration::from_secs(1));
    half.run_until_lost();
    assert_eq!(half.lost(), CloseReason::CloseTimedOut.to_string());
}

#[test]
fn who_has_nothing_to_send_does_not_wait_for_the_handshake_to_close() {
    let (mut half, handle) = adopted(Script::new());
    half.reactor.get(handle).unwrap().lose_connection();
    half.run_until_lost();
    assert_eq!(half.lost(), CloseReason::Done.to_string());
}

/// Descriptors are no bytes, but are not dropped without a word either.
#[test]
fn a_descriptor_without_a_byte_is_missed_by_a_close_in_the_handshake() {
    let (mut half, handle) = adopted(Script::new());
    let (reading, _writing) = io::pipe().unwrap();
    let passing = Handle::new(handle.token(), |facet| facet.downcast_mut::<Passing>());
    let passing = half.reactor.get(passing).unwrap();
    passing.send_file_descriptor(reading.into()).unwrap();
    half.reactor.get(handle).unwrap().lose_connection();
    half.run_until_lost();
    let overrun = CloseReason::FileDescriptorOverrun { descriptors: 1 };
    assert_eq!(half.lost(), overrun.to_string());
}

/// What a factory is told of.
#[derive(Clone, Default)]
struct Told(Rc<RefCell<Vec<String>>>, Rc<Cell<u32>>);

impl Factory for Told {
    type Protocol = Script;

    fn build_protocol(&mut self, _: &mut BuildContext<'_>, _: &Address) -> Option<Script> {
        self.1.set(self.1.get() + 1);
        Some(Script::new())
    }

    fn connection_failed(&mut self, _: &mut BuildContext<'_>, error: &ConnectError) {
        assert!(matches!(
            error,
            ConnectError::Handshake(CloseReason::Lost(_))
        ));
        self.0.borrow_mut().push("failed".into());
    }

    fn connection_lost(&mut self, _: &mut BuildContext<'_>, _: &CloseReason) {
        self.0.borrow_mut().push("lost".into());
    }
}

/// Tells why its attempts failed, and keeps its connector.
#[derive(Clone, Default)]
struct Tries {
    failed: Rc<RefCell<Vec<String>>>,
    record: Record,
}

impl Factory for Tries {
    type Protocol = Recorder;

    fn build_protocol(&mut self, _: &mut BuildContext<'_>, _: &Address) -> Option<Recorder> {
        Some(Recorder::new(&self.record))
    }

    fn connection_failed(&mut self, _: &mut BuildContext<'_>, error: &ConnectError) {
        assert!(self.record.is_lost(), "its protocol was told first");
        self.failed.borrow_mut().push(error.to_string());
    }

    fn connection_lost(&mut self, _: &mut BuildContext<'_>, reason: &CloseReason) {
        self.failed.borrow_mut().push(format!("lost: {reason}"));
    }
}

/// A peer that takes the connection, and never says anything.
fn connecting(tries: &Tries) -> (Reactor, ManualClock, ConnectorHandle, Peer) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let clock = ManualClock::new();
    let mut reactor = Reactor::with_clock(clock.clone()).unwrap();
    let there = Unix::to(path.as_path())
        .timeout(Duration::from_secs(5))
        .layer(passing(Settings::default()));
    let connector = reactor.connect(there, tries.clone()).unwrap();
    run_until_quiet(&mut reactor);
    let peer = listener.accept().unwrap().0;
    peer.set_nonblocking(true).unwrap();
    (
        reactor,
        clock,
        connector,
        Peer::new(Raw::Unix(peer), Some(false)),
    )
}

/// The layer would wait for longer.
#[test]
fn the_time_of_a_connector_is_over_in_the_handshake_too() {
    let _ledger = DescriptorLedger::open();
    let tries = Tries::default();
    let (mut reactor, clock, connector, _peer) = connecting(&tries);
    clock.advance(Duration::from_millis(4_999));
    run_until_quiet(&mut reactor);
    let state = reactor.get(connector).unwrap().state();
    assert_eq!(state, ConnectorState::Connecting);
    assert!(!tries.record.is_lost());
    clock.advance(Duration::from_millis(1));
    run_until(&mut reactor, |_| !tries.failed.borrow().is_empty());
    run_until_quiet(&mut reactor);
    assert_eq!(*tries.failed.borrow(), [ConnectError::TimedOut.to_string()]);
    assert_eq!(tries.record.summary(), ["lost aborted by us"]);
    assert_eq!(reactor.registered(), 0);
}

/// And not after it.
#[test]
fn the_time_of_a_connector_is_not_over_once_its_connection_is_made() {
    let _ledger = DescriptorLedger::open();
    let tries = Tries::default();
    let (mut reactor, clock, connector, mut peer) = connecting(&tries);
    clock.advance(Duration::from_millis(4_999));
    run_until_quiet(&mut reactor);
    let secret = Settings::default().secret;
    peer.shake_hands(&mut reactor, &tries.record, secret);
    clock.advance(Duration::from_secs(5));
    run_until_quiet(&mut reactor);
    assert_eq!(tries.record.summary(), ["made"]);
    let made = reactor.get(connector).unwrap();
    assert_eq!(made.state(), ConnectorState::Connected);
    made.stop_connecting();
    run_until_quiet(&mut reactor);
    assert_eq!(tries.record.summary(), ["made"], "a connection stays");
    drop(peer);
    run_until(&mut reactor, |_| tries.record.is_lost());
    run_until_quiet(&mut reactor);
    assert_eq!(tries.failed.borrow().len(), 1);
    assert!(tries.failed.borrow()[0].starts_with("lost: "));
    assert_eq!(reactor.registered(), 0);
}

#[test]
fn a_connector_can_be_given_up_in_the_handshake() {
    let _ledger = DescriptorLedger::open();
    // The second has the answer unread when it is given up.
    for is_late in [false, true] {
        let tries = Tries::default();
        let (mut reactor, _clock, connector, mut peer) = connecting(&tries);
        if is_late {
            peer.next_frame(&mut reactor, FrameKind::Hello);
            peer.say(FrameKind::Hello, b"who");
            peer.next_frame(&mut reactor, FrameKind::Proof);
            peer.say(FrameKind::Accept, b"");
        }
        reactor.get(connector).unwrap().stop_connecting();
        run_until(&mut reactor, |_| !tries.failed.borrow().is_empty());
        run_until_quiet(&mut reactor);
        let cancelled = ConnectError::Cancelled.to_string();
        assert_eq!(*tries.failed.borrow(), [cancelled], "late: {is_late}");
        assert_eq!(tries.record.summary(), ["lost aborted by us"]);
        assert_eq!(reactor.registered(), 0);
    }
}

/// It is no connection that was lost: waits grow, and retries are counted.
#[test]
fn a_failed_handshake_is_a_failed_attempt() {
    let _ledger = DescriptorLedger::open();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let clock = ManualClock::new();
    let mut reactor = Reactor::with_clock(clock.clone()).unwrap();
    let told = Told::default();
    let factory = Reconnecting::new(told.clone())
        .backoff(Backoff::new())
        .max_retries(Some(2));
    let there = Unix::to(path.as_path()).layer(scrambled(Settings::default()));
    reactor.connect(there, factory).unwrap();
    for attempt in 1..=3 {
        run_until(&mut reactor, |reactor| {
            clock.advance(Duration::from_secs(60));
            let _ = reactor;
            told.1.get() == attempt
        });
        drop(listener.accept().unwrap());
        run_until(&mut reactor, |_| told.0.borrow().len() == attempt as usize);
    }
    run_until_quiet(&mut reactor);
    assert_eq!(*told.0.borrow(), ["failed"; 3]);
    assert_eq!(reactor.registered(), 0);
}
