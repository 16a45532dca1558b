//! Connections that are made later than their sockets, or never.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use bowline::endpoint::Connect as _;
use bowline::policies::{Backoff, Reconnecting};
use bowline::testing::ManualClock;
use bowline::{
    Address, BuildContext, CloseReason, ConnectError, Factory, Reactor, Transport, Transports, Unix,
};
use bowline_outside::{FrameKind, Settings};

use crate::harness::{Buffers, Kind, Peer, Raw, Script, over_every_layer, scrambled};
use crate::support::{DescriptorLedger, Event, Record, run_until, run_until_quiet};

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
    half.clock.advance(Duration::from_millis(29_999));
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

/// What a factory is told of.
#[derive(Clone, Default)]
struct Told(Rc<RefCell<Vec<String>>>, Rc<Cell<u32>>);

impl<T: Transport> Factory<T> for Told {
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
