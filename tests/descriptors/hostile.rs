//! Peers that mean harm, and descriptors that do.

use std::io::{Read, Write};
use std::net::{TcpListener as StdTcpListener, TcpStream as StdTcpStream};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use bowline::{Address, DescriptorLimits, Reactor, Transports};

use crate::peer::{
    BytesOnly, OneByOne, Seen, adopt, file, receive_all, send, send_message, transport,
};
use crate::support::{DescriptorLedger, Record, Recorder, run_until, run_until_quiet};

/// How long the hostile socket lingers. It could be 68 years, but a test that
/// fails should end.
const LINGER: Duration = Duration::from_secs(20);

/// How long a turn may take with it. Without a defence it would be the linger
/// time.
const LONGEST_TURN: Duration = Duration::from_secs(5);

/// A TCP socket whose last close would block: it lingers, and has bytes that
/// its peer, the second one, does not read.
fn lingering_socket() -> (OwnedFd, StdTcpStream) {
    let listener = StdTcpListener::bind(("127.0.0.1", 0)).unwrap();
    let mut socket = StdTcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (peer, _) = listener.accept().unwrap();
    socket.set_nonblocking(true).unwrap();
    while socket.write(&[0; 65_536]).is_ok() {}
    rustix::net::sockopt::set_socket_linger(&socket, Some(LINGER)).unwrap();
    (socket.into(), peer)
}

/// Turns until `is_done`, and checks that no turn was held up.
#[track_caller]
fn run_swiftly(reactor: &mut Reactor, mut is_done: impl FnMut() -> bool) {
    let mut last = Instant::now();
    run_until(reactor, |_| {
        let turn = last.elapsed();
        assert!(turn < LONGEST_TURN, "a turn took {turn:?}");
        last = Instant::now();
        is_done()
    });
}

#[test]
fn unwanted_socket_that_lingers_does_not_hold_up_the_loop() {
    let ledger = DescriptorLedger::open();
    {
        let seen = Seen::default();
        let mut reactor = Reactor::new().unwrap();
        let (_, peer) = adopt(&mut reactor, BytesOnly { seen: seen.clone() });
        let (hostile, _unread) = lingering_socket();
        send_message(&peer, b"x", &[hostile]);
        run_swiftly(&mut reactor, || seen.has("data"));
    }
    ledger.assert_balanced();
}

#[test]
fn wanted_socket_that_lingers_is_disarmed_before_it_is_delivered() {
    let ledger = DescriptorLedger::open();
    {
        let record = Record::default();
        let mut reactor = Reactor::new().unwrap();
        let (_, peer) = adopt(&mut reactor, Recorder::new(&record));
        let (hostile, _unread) = lingering_socket();
        send_message(&peer, b"x", &[hostile]);
        run_swiftly(&mut reactor, || !record.data().is_empty());
        let received = record.take_descriptors().remove(0);
        let linger = rustix::net::sockopt::socket_linger(&received).unwrap();
        assert_eq!(linger, None);
    }
    ledger.assert_balanced();
}

#[test]
fn socket_that_lingers_and_is_left_by_a_panic_does_not_hold_up_the_loop() {
    let ledger = DescriptorLedger::open();
    {
        let seen = Seen::default();
        let mut reactor = Reactor::new().unwrap();
        let (handle, peer) = adopt(
            &mut reactor,
            OneByOne::new(&seen, |_, _| {
                // Without a backtrace, which takes its time too.
                std::panic::resume_unwind(Box::new("meant to panic"))
            }),
        );
        // Even where the protocol trusted its peer.
        transport(&mut reactor, handle).set_received_linger(bowline::Linger::Keep);
        let (hostile, _unread) = lingering_socket();
        send_message(&peer, b"x", &[file(), hostile]);
        run_swiftly(&mut reactor, || seen.has("lost"));
    }
    ledger.assert_balanced();
}

#[test]
fn linger_of_a_trusted_peer_is_kept() {
    let ledger = DescriptorLedger::open();
    {
        let record = Record::default();
        let mut reactor = Reactor::new().unwrap();
        let (handle, peer) = adopt(&mut reactor, Recorder::new(&record));
        transport(&mut reactor, handle).set_received_linger(bowline::Linger::Keep);
        let (hostile, _unread) = lingering_socket();
        send_message(&peer, b"x", &[hostile]);
        run_swiftly(&mut reactor, || !record.data().is_empty());
        let received = record.take_descriptors().remove(0);
        let linger = rustix::net::sockopt::socket_linger(&received).unwrap();
        assert_eq!(linger, Some(LINGER));
        rustix::net::sockopt::set_socket_linger(&received, None).unwrap();
    }
    ledger.assert_balanced();
}

/// Contract R-39.
#[test]
fn listener_that_was_passed_on_stays_silent_here() {
    let ledger = DescriptorLedger::open();
    {
        let mut reactor = Reactor::new().unwrap();
        let (handle, peer) = adopt(&mut reactor, Recorder::default());
        let listener = reactor
            .listen_tcp(([127, 0, 0, 1], 0).into(), |_: &Address| {
                Recorder::default()
            })
            .unwrap();
        let address = reactor.get(listener).unwrap().address().as_inet().unwrap();
        let sender = transport(&mut reactor, handle).unix_handle();
        reactor.detach_listener(listener, move |reactor, fd| {
            let it = reactor.get(sender).expect("it is there");
            it.send_file_descriptor(fd.expect("it listens").into())
                .expect("queued");
            it.write(b"listener");
        });
        run_until_quiet(&mut reactor);
        let passed = receive_all(&peer).remove(0).descriptors.remove(0);
        let passed = StdTcpListener::from(passed);
        let before = reactor.statistics();
        for _ in 0..5 {
            let client = StdTcpStream::connect(address).unwrap();
            run_until_quiet(&mut reactor);
            drop((client, passed.accept().unwrap()));
        }
        let after = reactor.statistics();
        assert_eq!(after.events, before.events);
        assert_eq!(after.stale_events, before.stale_events);
    }
    ledger.assert_balanced();
}

#[test]
fn connection_that_was_detached_and_passed_on_stays_silent_here() {
    let ledger = DescriptorLedger::open();
    {
        let mut reactor = Reactor::new().unwrap();
        let (handle, peer) = adopt(&mut reactor, Recorder::default());
        let listener = StdTcpListener::bind(("127.0.0.1", 0)).unwrap();
        let mut client = StdTcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (accepted, _) = listener.accept().unwrap();
        let connection = reactor
            .adopt_tcp_stream(accepted.into(), Recorder::default())
            .unwrap();
        run_until_quiet(&mut reactor);
        reactor.detach::<Recorder>(connection, move |reactor, detached| {
            let fd = detached.expect("it is open").fd;
            let it = reactor.get(handle).expect("it is there");
            it.write_with_descriptors(b"connection", vec![fd.into()])
                .expect("queued");
        });
        run_until_quiet(&mut reactor);
        let passed = receive_all(&peer).remove(0).descriptors.remove(0);
        let mut passed = StdTcpStream::from(passed);
        passed.set_nonblocking(false).unwrap();
        let before = reactor.statistics();
        for _ in 0..5 {
            client.write_all(b"hello").unwrap();
            run_until_quiet(&mut reactor);
            passed.read_exact(&mut [0; 5]).unwrap();
        }
        drop(client);
        run_until_quiet(&mut reactor);
        assert_eq!(passed.read(&mut [0]).unwrap(), 0);
        let after = reactor.statistics();
        assert_eq!(after.events, before.events);
        assert_eq!(after.stale_events, before.stale_events);
    }
    ledger.assert_balanced();
}

#[test]
fn connection_that_is_sent_over_itself_leaves_nothing_open() {
    let ledger = DescriptorLedger::open();
    {
        let (one, other) = (Record::default(), Record::default());
        let mut reactor = Reactor::new().unwrap();
        let (ours, theirs) = crate::support::socketpair();
        // Own end, peer's end, and both over the peer's.
        let copies: Vec<OwnedFd> = vec![
            ours.try_clone().unwrap().into(),
            theirs.try_clone().unwrap().into(),
        ];
        let more: Vec<OwnedFd> = copies.iter().map(|fd| fd.try_clone().unwrap()).collect();
        let ours = reactor
            .adopt_unix_stream(ours.into(), Recorder::new(&one))
            .unwrap();
        let theirs = reactor
            .adopt_unix_stream(theirs.into(), Recorder::new(&other))
            .unwrap();
        for (handle, copies) in [(ours, copies), (theirs, more)] {
            for fd in copies {
                let it = transport(&mut reactor, handle);
                it.send_file_descriptor(fd.into()).unwrap();
                it.write(b"x");
            }
        }
        // Never read: they are in flight when their own sockets close.
        transport(&mut reactor, ours).pause_producing();
        run_until(&mut reactor, |_| other.is_lost());
        // Both came in one read, and its own ended the connection.
        assert_eq!(other.take_descriptors().len(), 0);
        assert_eq!(reactor.descriptor_counts().refused, 2);
        let last = other.summary().pop().unwrap();
        assert_eq!(last, "lost peer sent the connection its own socket");
        transport(&mut reactor, ours).abort_connection();
        run_until(&mut reactor, |_| one.is_lost());
    }
    ledger.assert_balanced();
}

#[test]
fn flood_of_descriptors_is_closed_as_it_comes() {
    let ledger = DescriptorLedger::open();
    {
        let seen = Seen::default();
        let mut reactor = Reactor::new().unwrap();
        let (handle, peer) = adopt(&mut reactor, BytesOnly { seen: seen.clone() });
        transport(&mut reactor, handle)
            .set_descriptor_limits(DescriptorLimits::default().unclaimed(usize::MAX));
        let copies: Vec<OwnedFd> = (0..253).map(|_| file()).collect();
        let borrowed: Vec<_> = copies.iter().map(std::os::fd::AsFd::as_fd).collect();
        let open = crate::support::open_descriptors().len();
        let mut sent = 0;
        run_until(&mut reactor, |_| {
            // As many as the socket holds at a time.
            while sent < 1_000 && send(&peer, b"x", &borrowed).is_ok() {
                sent += 1;
            }
            assert!(crate::support::open_descriptors().len() <= open);
            seen.all().len() == 1_000
        });
        let counts = reactor.descriptor_counts();
        assert_eq!((counts.received, counts.unclaimed), (253_000, 253_000));
    }
    ledger.assert_balanced();
}
