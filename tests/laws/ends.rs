//! Ends that come, and are final: each within so many turns, so that one that does not
//! come is a failure that says so.

use std::cell::RefCell;
use std::io::Write;
use std::net::TcpStream as StdTcpStream;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::{Duration, Instant};

use bowline::testing::{ManualClock, MemoryPeer, SimulatedKernel};
use bowline::{
    Address, CloseReason, Context, Protocol, Reactor, Transport, TransportHandle, Transports,
    UnixTransport,
};

use crate::support::{DescriptorLedger, Record, Recorder, socketpair};

/// Turns that do not wait, many more than anything here needs.
fn turns(reactor: &mut Reactor) {
    for _ in 0..50 {
        reactor.turn(Some(Duration::ZERO));
    }
}

fn adopt(reactor: &mut Reactor, protocol: impl Protocol<bowline::UnixStream>) -> Peer {
    let (ours, theirs) = socketpair();
    let handle = reactor.adopt_unix_stream(ours.into(), protocol).unwrap();
    (handle, theirs)
}

type Peer = (bowline::UnixTransportHandle, std::os::unix::net::UnixStream);

/// Panics in its first data.
#[derive(Default)]
struct Panics(Rc<RefCell<Vec<String>>>);

impl<T: Transport> Protocol<T> for Panics {
    fn data_received(&mut self, _: &mut Context<'_, T>, _: &[u8]) {
        panic!("as it should");
    }

    fn connection_lost(&mut self, _: &mut Context<'_, T>, reason: &CloseReason) {
        self.0.borrow_mut().push(reason.to_string());
    }
}

#[test]
fn who_panicked_is_told_of_the_end() {
    let ledger = DescriptorLedger::open();
    {
        let mut reactor = Reactor::new().unwrap();
        let told = Rc::default();
        let (handle, mut peer) = adopt(&mut reactor, Panics(Rc::clone(&told)));
        turns(&mut reactor);
        peer.write_all(b"data").unwrap();
        turns(&mut reactor);
        assert_eq!(*told.borrow(), ["a callback panicked: as it should"]);
        assert!(reactor.get(handle).is_none());
    }
    ledger.assert_balanced();
}

/// Bytes and the end in one event: a short read is no reason not to read on.
#[test]
fn end_that_came_with_the_last_bytes_is_told() {
    let ledger = DescriptorLedger::open();
    for unwatched in [false, true] {
        let mut reactor = Reactor::new().unwrap();
        let record = Record::default();
        let mut peer = if unwatched {
            let it = Recorder::new(&record);
            let mut it = Some(it);
            let build = move |_: &Address| it.take().expect("one client");
            let listener = reactor
                .listen_tcp(([127, 0, 0, 1], 0).into(), build)
                .unwrap();
            let address = reactor.get(listener).unwrap().address();
            StdTcpStream::connect(address.as_inet().unwrap()).unwrap()
        } else {
            let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            let peer = StdTcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let ours = listener.accept().unwrap().0;
            reactor
                .adopt_tcp_stream(ours.into(), Recorder::new(&record))
                .unwrap();
            turns(&mut reactor);
            peer
        };
        peer.write_all(b"the last").unwrap();
        drop(peer);
        // Both are there when it is looked at.
        std::thread::yield_now();
        let started = Instant::now();
        while record.data().is_empty() && started.elapsed() < Duration::from_secs(5) {
            reactor.turn(Some(Duration::ZERO));
        }
        turns(&mut reactor);
        assert_eq!(record.data(), b"the last");
        assert!(record.is_lost(), "{unwatched}: {:?}", record.summary());
    }
    ledger.assert_balanced();
}

/// No event says that there is room again for descriptors on their way.
#[test]
fn send_that_was_refused_for_now_is_tried_again_by_a_timer() {
    const ETOOMANYREFS: i32 = 109;
    const ENOBUFS: i32 = 105;
    for error in [ETOOMANYREFS, ENOBUFS] {
        let ledger = DescriptorLedger::open();
        {
            let clock = ManualClock::new();
            let mut reactor = Reactor::with_clock(clock.clone()).unwrap();
            let kernel = SimulatedKernel::new();
            let (ours, theirs) = kernel.pair();
            let it = ours.adopt(&mut reactor, Recorder::default()).unwrap();
            let peer = MemoryPeer::new(theirs);
            turns(&mut reactor);
            kernel.fail_send(it.socket(), 0, std::io::Error::from_raw_os_error(error));
            let file = std::fs::File::open("/dev/null").unwrap();
            let transport = reactor.get(it.handle()).unwrap();
            transport.send_file_descriptor(file.into()).unwrap();
            transport.write(b"x");
            turns(&mut reactor);
            assert_eq!(reactor.delayed_calls().count(), 1, "nobody tries again");
            assert!(peer.receive(1).is_err(), "it was not refused");
            clock.advance(Duration::from_millis(50));
            turns(&mut reactor);
            let read = peer.receive(1).expect("it was sent again");
            assert_eq!((&read.bytes[..], read.descriptors.len()), (&b"x"[..], 1));
            assert_eq!(reactor.delayed_calls().count(), 0);
        }
        ledger.assert_balanced();
    }
}

/// How a connection goes.
type Ends = fn(&mut Reactor, TransportHandle);

/// epoll goes on reporting a socket that others hold, under a name that is gone.
#[test]
fn connection_that_others_hold_is_deregistered_before_it_is_closed() {
    let ways: [(&str, Ends); 4] = [
        ("lose", |reactor, it| {
            reactor.get(it).unwrap().lose_connection();
        }),
        ("abort", |reactor, it| {
            reactor.get(it).unwrap().abort_connection();
        }),
        ("detach", |reactor, it| {
            reactor.detach::<Recorder>(it, |_, detached| drop(detached.unwrap()));
        }),
        ("remove", |reactor, it| reactor.remove(it.token())),
    ];
    for (way, end) in ways {
        let ledger = DescriptorLedger::open();
        {
            let mut reactor = Reactor::new().unwrap();
            let (ours, mut theirs) = socketpair();
            let kept: OwnedFd = ours.try_clone().unwrap().into();
            let record = Record::default();
            reactor
                .adopt_unix_stream(ours.into(), Recorder::new(&record))
                .unwrap();
            turns(&mut reactor);
            end(&mut reactor, record.handle(0));
            turns(&mut reactor);
            let before = reactor.statistics();
            for _ in 0..4 {
                theirs.write_all(b"for the other holder").unwrap();
                reactor.turn(Some(Duration::from_millis(5)));
            }
            let after = reactor.statistics();
            assert_eq!(
                (after.stale_events, after.events),
                (before.stale_events, before.events),
                "{way}: it is still watched"
            );
            drop(kept);
        }
        ledger.assert_balanced();
    }
}

#[test]
fn listener_that_others_hold_is_deregistered_before_it_is_closed() {
    type Ends = fn(&mut Reactor, bowline::ListenerHandle);
    let ways: [(&str, Ends); 4] = [
        ("stop", |reactor, it| {
            reactor.get(it).unwrap().stop_listening()
        }),
        ("stop when drained", |reactor, it| {
            reactor.get(it).unwrap().stop_listening_when_drained();
        }),
        ("detach", |reactor, it| {
            reactor.detach_listener(it, |_, fd| drop(fd.unwrap()));
        }),
        ("remove", |reactor, it| reactor.remove(it.token())),
    ];
    for (way, end) in ways {
        let ledger = DescriptorLedger::open();
        {
            let mut reactor = Reactor::new().unwrap();
            let build = |_: &Address| Recorder::default();
            let listener = reactor
                .listen_tcp(([127, 0, 0, 1], 0).into(), build)
                .unwrap();
            turns(&mut reactor);
            let ours = reactor.get(listener).unwrap();
            let kept = ours.duplicate().unwrap();
            let address = ours.address().as_inet().unwrap();
            end(&mut reactor, listener);
            turns(&mut reactor);
            assert!(reactor.get(listener).is_none(), "{way}");
            let before = reactor.statistics();
            let clients: Vec<_> = (0..4)
                .map(|_| {
                    let client = StdTcpStream::connect(address).unwrap();
                    reactor.turn(Some(Duration::from_millis(5)));
                    client
                })
                .collect();
            let after = reactor.statistics();
            assert_eq!(
                (after.stale_events, after.events),
                (before.stale_events, before.events),
                "{way}: it is still watched"
            );
            drop((clients, kept));
        }
        ledger.assert_balanced();
    }
}
