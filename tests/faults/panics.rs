//! Panics where there is no connection yet: in what builds protocols and takes
//! sockets.

use std::cell::Cell;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as Peer;
use std::panic::resume_unwind;
use std::rc::Rc;

use bowline::Unix;
use bowline::{
    Address, BuildContext, ConnectError, Context, Factory, Protocol, Reactor, Transport, Transports,
};

use crate::support::figures::{Bound, Figures, scaled};
use crate::support::{DEADLINE, DescriptorLedger, run_until};

/// Panics every other time.
struct Moody {
    calls: Rc<Cell<usize>>,
}

impl Moody {
    fn call(&self) {
        self.calls.set(self.calls.get() + 1);
        if self.calls.get().is_multiple_of(2) {
            resume_unwind(Box::new("deliberate"));
        }
    }
}

struct Echo;

impl<T: Transport> Protocol<T> for Echo {
    fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
        cx.transport.write(data);
    }
}

impl Factory for Moody {
    type Protocol = Echo;

    fn build_protocol(&mut self, _: &mut BuildContext<'_>, _: &Address) -> Option<Echo> {
        self.call();
        Some(Echo)
    }

    fn started(&mut self, _: &mut BuildContext<'_>) {
        self.call();
        self.call();
    }

    fn stopped(&mut self, _: &mut BuildContext<'_>) {
        self.call();
        self.call();
    }

    fn connection_failed(&mut self, _: &mut BuildContext<'_>, _: &ConnectError) {
        self.call();
        self.call();
    }
}

fn is_echoed(reactor: &mut Reactor, mut peer: &Peer) -> bool {
    let mut answer = None;
    run_until(reactor, |_| {
        let mut byte = [0];
        answer = match peer.read(&mut byte) {
            Ok(count) => Some(count == 1 && byte == *b"e"),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => None,
            Err(_) => Some(false),
        };
        answer.is_some()
    });
    answer.expect("it came")
}

/// Reliability T-33: a factory or an acceptor that panics loses the connection
/// that it was asked about; its listener serves the others.
#[test]
fn panic_of_a_factory_costs_only_the_connection_it_was_asked_for() {
    let ledger = DescriptorLedger::open();
    let wanted = scaled(500, 2_000);
    let folder = tempfile::tempdir().unwrap();
    let mut reactor = Reactor::new().unwrap();
    reactor.start().unwrap();
    let calls = Rc::new(Cell::new(0));
    let moody = || Moody {
        calls: Rc::clone(&calls),
    };
    let built = reactor
        .listen_unix(&*folder.path().join("built"), moody())
        .unwrap();
    let accepting = moody();
    let taken = move |_: &mut BuildContext<'_>, socket: OwnedFd, _: &Address| {
        accepting.call();
        Peer::from(socket).write_all(b"e").expect("room");
    };
    let taken = reactor
        .accept(Unix::at(&*folder.path().join("taken")), taken)
        .unwrap();
    let (mut served, mut closed) = (0, 0);
    while closed < wanted {
        let mut peers = Vec::new();
        for name in ["built", "taken", "built", "taken"] {
            let peer = Peer::connect(folder.path().join(name)).unwrap();
            (&peer).write_all(b"e").unwrap();
            peer.set_nonblocking(true).unwrap();
            peers.push(peer);
        }
        reactor
            .connect_unix(&*folder.path().join("nobody"), moody())
            .unwrap();
        for peer in &peers {
            if is_echoed(&mut reactor, peer) {
                served += 1;
            } else {
                closed += 1;
            }
        }
    }
    assert!(served >= wanted / 2, "{served} served, {closed} closed");
    for listener in [built, taken] {
        let listener = reactor.get(listener).expect("it goes on");
        assert!(listener.is_listening());
        listener.stop_listening();
    }
    run_until(&mut reactor, |reactor| reactor.registered() == 0);
    reactor.stop().unwrap();
    let before = std::time::Instant::now();
    while reactor.turn(Some(DEADLINE)) == bowline::Turn::Continue {
        assert!(before.elapsed() < DEADLINE);
    }
    let panics = reactor.statistics().panics as usize;
    Figures::of("T-33").must(
        "panics where connections are built",
        panics,
        Bound::AtLeast,
        wanted,
    );
    drop(reactor);
    ledger.assert_balanced();
}
