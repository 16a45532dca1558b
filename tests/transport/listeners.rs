//! Listening: where, for whom, until when, and what becomes of the file.

use std::cell::RefCell;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener as StdTcpListener, TcpStream as StdTcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener as StdUnixListener, UnixStream as StdUnixStream};
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use bowline::Unix;
use bowline::error::ListenStep;
use bowline::{
    Address, CloseReason, Context, ListenerHandle, Protocol, Reactor, StaleSocket, Transport,
    Transports, UnixAddress,
};
use rustix::fs::Mode;

use crate::harness::{Doorman, Kind, Log, abstract_name, std_address};
use crate::support::{DescriptorLedger, Record, Recorder, run_until, run_until_quiet};

fn listen(reactor: &mut Reactor, factory: Doorman) -> (ListenerHandle, SocketAddr) {
    let listener = reactor
        .listen_tcp(([127, 0, 0, 1], 0).into(), factory)
        .unwrap();
    let address = reactor.get(listener).unwrap().address();
    (listener, address.as_inet().unwrap())
}

fn count(log: &Log, what: &str) -> usize {
    log.borrow().iter().filter(|line| *line == what).count()
}

fn is_closed(mut client: impl Read) -> bool {
    match client.read(&mut [0]) {
        Ok(0) => true,
        Err(error) => error.kind() == io::ErrorKind::ConnectionReset,
        Ok(_) => false,
    }
}

/// L-01, E-05.
#[test]
fn port_0_becomes_the_real_port() {
    for (address, kind) in [
        ("127.0.0.1:0", Kind::AcceptedTcpV4),
        ("[::1]:0", Kind::AcceptedTcpV6),
    ] {
        if !kind.is_available() {
            continue;
        }
        let ledger = DescriptorLedger::open();
        let mut reactor = Reactor::new().unwrap();
        let asked: SocketAddr = address.parse().unwrap();
        let listener = reactor
            .listen_tcp(asked, Doorman::new(&Log::default()))
            .unwrap();
        let got = reactor.get(listener).unwrap().address().as_inet().unwrap();
        assert_eq!(got.ip(), asked.ip());
        assert_ne!(got.port(), 0);
        drop(reactor);
        ledger.assert_balanced();
    }
}

/// L-02, L-19, W-47, E-05: what fails says where, and starts nothing.
#[test]
fn listening_where_one_cannot_is_an_error() {
    let ledger = DescriptorLedger::open();
    let directory = tempfile::tempdir().unwrap();
    let log = Log::default();
    let mut reactor = Reactor::new().unwrap();
    let occupied = StdTcpListener::bind("127.0.0.1:0").unwrap();
    let address = occupied.local_addr().unwrap();
    let error = reactor.listen_tcp(address, Doorman::new(&log)).unwrap_err();
    assert_eq!(error.error.kind(), io::ErrorKind::AddrInUse);
    assert_eq!(error.address, Address::Inet(address));
    assert!(matches!(error.step, ListenStep::Bind | ListenStep::Listen));

    // Not an address of this machine.
    let foreign = SocketAddr::from(([192, 0, 2, 1], 0));
    let error = reactor.listen_tcp(foreign, Doorman::new(&log)).unwrap_err();
    assert_eq!(error.error.kind(), io::ErrorKind::AddrNotAvailable);
    assert_eq!(error.address, Address::Inet(foreign));

    let missing = directory.path().join("missing/socket");
    let error = reactor
        .listen_unix(missing.clone(), Doorman::new(&log))
        .unwrap_err();
    assert_eq!(error.error.kind(), io::ErrorKind::NotFound);
    assert_eq!(error.step, ListenStep::Bind);
    assert_eq!(error.address, Address::Unix(missing.into()));

    let too_long = directory.path().join("x".repeat(200));
    assert!(reactor.listen_unix(too_long, Doorman::new(&log)).is_err());

    let name = UnixAddress::Abstract(abstract_name());
    let _occupied = StdUnixListener::bind_addr(&std_address(&name)).unwrap();
    let error = reactor.listen_unix(name, Doorman::new(&log)).unwrap_err();
    assert_eq!(error.error.kind(), io::ErrorKind::AddrInUse);

    run_until_quiet(&mut reactor);
    assert!(log.borrow().is_empty(), "{log:?}");
    assert_eq!(reactor.registered(), 0);
    drop((reactor, occupied, _occupied, directory));
    ledger.assert_balanced();
}

/// L-03, M-04, L-04: one event stands for any number of connections.
#[test]
fn more_connections_than_a_batch_are_all_accepted() {
    const CLIENTS: usize = 230;
    let ledger = DescriptorLedger::open();
    let log = Log::default();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let mut reactor = Reactor::new().unwrap();
    let (_, address) = listen(&mut reactor, Doorman::new(&log));
    reactor
        .listen_unix(path.clone(), Doorman::new(&log))
        .unwrap();
    // What follows a new listener's first notice is a batch too.
    run_until_quiet(&mut reactor);
    let tcp: Vec<_> = (0..CLIENTS / 2)
        .map(|_| StdTcpStream::connect(address).unwrap())
        .collect();
    let unix: Vec<_> = (0..CLIENTS / 2 + 50)
        .map(|_| StdUnixStream::connect(&path).unwrap())
        .collect();
    run_until(&mut reactor, |_| {
        count(&log, "made") == tcp.len() + unix.len()
    });
    drop((reactor, tcp, unix, directory));
    ledger.assert_balanced();
}

/// L-10, L-11, W-48: it costs this connection, and only this one.
#[test]
fn a_factory_that_declines_or_panics_costs_one_connection() {
    let ledger = DescriptorLedger::open();
    let log = Log::default();
    let scripts = Rc::clone(&log);
    let mut asked = 0;
    let factory = Doorman::new(&log).build(move |_| {
        asked += 1;
        match asked {
            2 => None,
            4 => panic!("on purpose"),
            _ => Some(crate::harness::logging_script(&scripts)),
        }
    });
    let mut reactor = Reactor::new().unwrap();
    let (_, address) = listen(&mut reactor, factory);
    let clients: Vec<_> = (0..6)
        .map(|_| StdTcpStream::connect(address).unwrap())
        .collect();
    run_until(&mut reactor, |_| count(&log, "made") == 4);
    assert_eq!(count(&log, "build"), 6);
    for (at, client) in clients.iter().enumerate() {
        client.set_nonblocking(true).unwrap();
        assert_eq!(is_closed(client), at == 1 || at == 3, "client {at}");
    }
    drop((reactor, clients));
    ledger.assert_balanced();
}

/// L-16.
#[test]
fn stopping_inside_build_protocol_ends_the_batch() {
    let ledger = DescriptorLedger::open();
    let log = Log::default();
    let scripts = Rc::clone(&log);
    let factory = Doorman::new(&log).build(move |cx| {
        if count(&scripts, "build") == 2 {
            let listener = cx.listener().unwrap();
            listener.stop_listening();
            assert!(!listener.is_listening());
            assert_eq!(count(&scripts, "stopped"), 0, "told inside the call");
        }
        Some(crate::harness::logging_script(&scripts))
    });
    let mut reactor = Reactor::new().unwrap();
    let (listener, address) = listen(&mut reactor, factory);
    let clients: Vec<_> = (0..5)
        .map(|_| StdTcpStream::connect(address).unwrap())
        .collect();
    run_until_quiet(&mut reactor);
    assert_eq!(
        *log.borrow(),
        ["started", "build", "build", "stopped", "made", "made"]
    );
    assert!(reactor.get(listener).is_none());
    for (at, client) in clients.iter().enumerate() {
        client.set_nonblocking(true).unwrap();
        assert_eq!(is_closed(client), at >= 2, "client {at}");
    }
    drop((reactor, clients));
    ledger.assert_balanced();
}

#[test]
fn a_paused_listener_leaves_clients_waiting() {
    let ledger = DescriptorLedger::open();
    let log = Log::default();
    let mut reactor = Reactor::new().unwrap();
    let (listener, address) = listen(&mut reactor, Doorman::new(&log));
    reactor.get(listener).unwrap().pause_accepting();
    let client = StdTcpStream::connect(address).unwrap();
    run_until_quiet(&mut reactor);
    assert_eq!(*log.borrow(), ["started"]);
    reactor.get(listener).unwrap().resume_accepting();
    run_until(&mut reactor, |_| count(&log, "made") == 1);
    // Again, from a callback's point of view: paused before the event.
    reactor.get(listener).unwrap().pause_accepting();
    let other = StdTcpStream::connect(address).unwrap();
    run_until_quiet(&mut reactor);
    reactor.get(listener).unwrap().stop_listening();
    run_until_quiet(&mut reactor);
    assert_eq!(count(&log, "build"), 1);
    assert_eq!(log.borrow().last().unwrap(), "stopped");
    drop((reactor, client, other));
    ledger.assert_balanced();
}

/// A layer's reason not to accept and the program's know nothing of each other.
#[test]
fn a_held_listener_leaves_clients_waiting_whatever_is_resumed() {
    let ledger = DescriptorLedger::open();
    let log = Log::default();
    let mut reactor = Reactor::new().unwrap();
    let (listener, address) = listen(&mut reactor, Doorman::new(&log));
    let it = reactor.get(listener).unwrap();
    it.hold_accepting();
    it.hold_accepting();
    it.pause_accepting();
    it.resume_accepting();
    let client = StdTcpStream::connect(address).unwrap();
    run_until_quiet(&mut reactor);
    reactor.get(listener).unwrap().release_accepting();
    run_until_quiet(&mut reactor);
    let it = reactor.get(listener).unwrap();
    it.pause_accepting();
    it.release_accepting();
    // Once too often.
    it.release_accepting();
    run_until_quiet(&mut reactor);
    assert_eq!(*log.borrow(), ["started"]);
    reactor.get(listener).unwrap().resume_accepting();
    run_until(&mut reactor, |_| count(&log, "made") == 1);
    // What waits is accepted before the end, held or not.
    reactor.get(listener).unwrap().hold_accepting();
    let other = StdTcpStream::connect(address).unwrap();
    run_until_quiet(&mut reactor);
    assert_eq!(count(&log, "made"), 1);
    reactor.get(listener).unwrap().stop_listening_when_drained();
    run_until(&mut reactor, |reactor| reactor.get(listener).is_none());
    assert_eq!(count(&log, "build"), 2);
    drop((reactor, client, other));
    ledger.assert_balanced();
}

/// L-16, L-17, L-19, T-11.
#[test]
fn started_and_stopped_are_told_once_and_from_the_loop() {
    let ledger = DescriptorLedger::open();
    let log = Log::default();
    let mut reactor = Reactor::new().unwrap();
    let (listener, address) = listen(&mut reactor, Doorman::new(&log));
    assert!(log.borrow().is_empty());
    reactor.turn(Some(Duration::ZERO));
    assert_eq!(*log.borrow(), ["started"]);
    assert!(reactor.get(listener).unwrap().is_listening());
    let client = StdTcpStream::connect(address).unwrap();
    run_until(&mut reactor, |_| count(&log, "made") == 1);
    for _ in 0..2 {
        reactor.get(listener).unwrap().stop_listening();
    }
    assert_eq!(count(&log, "stopped"), 0);
    reactor.turn(Some(Duration::ZERO));
    assert_eq!(*log.borrow(), ["started", "build", "made", "stopped"]);
    assert!(reactor.get(listener).is_none());
    assert!(StdTcpStream::connect(address).is_err());
    // The same place can be taken again, though the connection is there.
    reactor.listen_tcp(address, Doorman::new(&log)).unwrap();
    drop((reactor, client));
    ledger.assert_balanced();
}

#[test]
fn stopping_before_the_first_turn_still_tells_both() {
    let ledger = DescriptorLedger::open();
    let log = Log::default();
    let mut reactor = Reactor::new().unwrap();
    let (listener, _) = listen(&mut reactor, Doorman::new(&log));
    reactor.get(listener).unwrap().stop_listening();
    run_until_quiet(&mut reactor);
    assert_eq!(*log.borrow(), ["started", "stopped"]);
    drop(reactor);
    ledger.assert_balanced();
}

/// Contract L-18.
#[test]
fn the_reactor_stopping_stops_the_listener_and_removes_its_file() {
    let ledger = DescriptorLedger::open();
    let log = Log::default();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let mut reactor = Reactor::new().unwrap();
    reactor
        .listen_unix(path.clone(), Doorman::new(&log))
        .unwrap();
    reactor.start().unwrap();
    reactor.turn(Some(Duration::ZERO));
    reactor.stop().unwrap();
    run_until(&mut reactor, |reactor| !reactor.is_running());
    assert_eq!(*log.borrow(), ["started", "stopped"]);
    assert!(!path.exists());
    drop((reactor, directory));
    ledger.assert_balanced();
}

fn mode(path: &Path) -> u32 {
    path.metadata().unwrap().permissions().mode() & 0o7777
}

/// L-21, W-46: exactly the mode that was asked for, whatever the umask.
#[test]
fn the_file_has_the_mode_asked_for() {
    let ledger = DescriptorLedger::alone();
    let directory = tempfile::tempdir().unwrap();
    let mut reactor = Reactor::new().unwrap();
    // Of the whole process, which has no other test meanwhile.
    for mask in [0o022, 0o077, 0] {
        let before = rustix::process::umask(Mode::from_raw_mode(mask));
        for asked in [0o666, 0o600, 0o660, 0o777] {
            let path = directory.path().join(format!("{mask:o}-{asked:o}"));
            reactor
                .listen(
                    Unix::at(path.clone()).mode(asked),
                    Doorman::new(&Log::default()),
                )
                .unwrap();
            assert_eq!(mode(&path), asked, "with umask {mask:o}");
        }
        rustix::process::umask(before);
    }
    let path = directory.path().join("default");
    reactor
        .listen_unix(path.clone(), Doorman::new(&Log::default()))
        .unwrap();
    assert_eq!(mode(&path), 0o666);
    drop((reactor, directory));
    ledger.assert_balanced();
}

/// L-22, W-45.
#[test]
fn the_file_is_removed_only_if_it_is_ours() {
    let ledger = DescriptorLedger::open();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let mut reactor = Reactor::new().unwrap();
    let listen = |reactor: &mut Reactor| {
        let log = Log::default();
        let listener = reactor
            .listen_unix(path.clone(), Doorman::new(&log))
            .unwrap();
        (listener, log)
    };
    let stop = |reactor: &mut Reactor, (listener, log): (ListenerHandle, Log)| {
        reactor.get(listener).unwrap().stop_listening();
        run_until_quiet(reactor);
        assert_eq!(*log.borrow(), ["started", "stopped"]);
    };

    let ours = listen(&mut reactor);
    stop(&mut reactor, ours);
    assert!(!path.exists());

    // Gone already: the close goes through.
    let ours = listen(&mut reactor);
    std::fs::remove_file(&path).unwrap();
    stop(&mut reactor, ours);

    // Another server's by now.
    let ours = listen(&mut reactor);
    std::fs::remove_file(&path).unwrap();
    let another = StdUnixListener::bind(&path).unwrap();
    stop(&mut reactor, ours);
    assert!(
        StdUnixStream::connect(&path).is_ok(),
        "another's was removed"
    );
    drop(another);
    std::fs::remove_file(&path).unwrap();

    // Not even a socket by now.
    let ours = listen(&mut reactor);
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, "precious").unwrap();
    stop(&mut reactor, ours);
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    std::fs::remove_file(&path).unwrap();

    // A reactor that is dropped takes its files with it.
    let _ours = listen(&mut reactor);
    drop(reactor);
    assert!(!path.exists());
    drop(directory);
    ledger.assert_balanced();
}

/// L-25, L-24, W-44: who asks for that is told of a dead socket; by default it is
/// replaced.
#[test]
fn a_stale_socket_is_removed_unless_that_is_refused() {
    let ledger = DescriptorLedger::open();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    drop(StdUnixListener::bind(&path).unwrap());
    let log = Log::default();
    let mut reactor = Reactor::new().unwrap();
    let error = reactor
        .listen(
            Unix::at(path.clone()).stale(StaleSocket::Refuse),
            Doorman::new(&log),
        )
        .unwrap_err();
    assert_eq!(error.error.kind(), io::ErrorKind::AddrInUse);
    assert!(path.exists());
    reactor
        .listen_unix(path.clone(), Doorman::new(&log))
        .unwrap();
    let client = StdUnixStream::connect(&path).unwrap();
    run_until(&mut reactor, |_| count(&log, "made") == 1);
    // One that is alive is left alone.
    let error = reactor
        .listen_unix(path.clone(), Doorman::new(&log))
        .unwrap_err();
    assert_eq!(error.error.kind(), io::ErrorKind::AddrInUse);
    // And was not bothered by the question whether it lives.
    let another = StdUnixStream::connect(&path).unwrap();
    run_until(&mut reactor, |_| count(&log, "made") == 2);
    run_until_quiet(&mut reactor);
    assert_eq!(count(&log, "made"), 2);
    // And so is what is no socket.
    let file = directory.path().join("file");
    std::fs::write(&file, "precious").unwrap();
    for stale in [StaleSocket::Remove, StaleSocket::Refuse] {
        let error = reactor
            .listen(Unix::at(file.clone()).stale(stale), Doorman::new(&log))
            .unwrap_err();
        assert_eq!(error.error.kind(), io::ErrorKind::AddrInUse);
        assert_eq!(std::fs::read(&file).unwrap(), b"precious");
    }
    drop((reactor, client, another, directory));
    ledger.assert_balanced();
}

/// L-23.
#[test]
fn an_abstract_name_is_no_file() {
    let ledger = DescriptorLedger::open();
    let log = Log::default();
    let mut reactor = Reactor::new().unwrap();
    // Bytes that no path could have.
    let mut name = abstract_name();
    name.extend(b"/\0/\xff");
    let address = UnixAddress::Abstract(name);
    let listener = reactor
        .listen_unix(address.clone(), Doorman::new(&log))
        .unwrap();
    assert_eq!(
        reactor.get(listener).unwrap().address(),
        Address::Unix(address.clone())
    );
    let client = StdUnixStream::connect_addr(&std_address(&address)).unwrap();
    run_until(&mut reactor, |_| count(&log, "made") == 1);
    reactor.get(listener).unwrap().stop_listening();
    run_until_quiet(&mut reactor);
    assert!(StdUnixStream::connect_addr(&std_address(&address)).is_err());
    drop((reactor, client));
    ledger.assert_balanced();
}

/// L-19.
#[test]
fn one_factory_serves_two_listeners() {
    let ledger = DescriptorLedger::open();
    let log = Log::default();
    let shared = Rc::new(RefCell::new(Doorman::new(&log)));
    let mut reactor = Reactor::new().unwrap();
    let name = UnixAddress::Abstract(abstract_name());
    let tcp = reactor
        .listen_tcp(([127, 0, 0, 1], 0).into(), Rc::clone(&shared))
        .unwrap();
    let unix = reactor
        .listen_unix(name.clone(), Rc::clone(&shared))
        .unwrap();
    let address = reactor.get(tcp).unwrap().address().as_inet().unwrap();
    let first = StdTcpStream::connect(address).unwrap();
    let second = StdUnixStream::connect_addr(&std_address(&name)).unwrap();
    run_until(&mut reactor, |_| count(&log, "made") == 2);
    reactor.get(tcp).unwrap().stop_listening();
    reactor.get(unix).unwrap().stop_listening();
    run_until_quiet(&mut reactor);
    assert_eq!((count(&log, "started"), count(&log, "stopped")), (2, 2));
    assert_eq!(Rc::strong_count(&shared), 1, "a listener kept its factory");
    drop((reactor, first, second));
    ledger.assert_balanced();
}

/// L-28: closing ours is not the end of the socket.
#[test]
fn a_duplicate_goes_on_accepting() {
    let ledger = DescriptorLedger::open();
    let log = Log::default();
    let mut reactor = Reactor::new().unwrap();
    let (listener, address) = listen(&mut reactor, Doorman::new(&log));
    let duplicate = reactor.get(listener).unwrap().duplicate().unwrap();
    let duplicate = StdTcpListener::from(duplicate);
    reactor.get(listener).unwrap().stop_listening();
    run_until_quiet(&mut reactor);
    let client = StdTcpStream::connect(address).unwrap();
    let events = reactor.statistics().events + reactor.statistics().stale_events;
    assert!(duplicate.accept().is_ok());
    run_until_quiet(&mut reactor);
    let now = reactor.statistics();
    assert_eq!(now.events + now.stale_events, events, "still registered");
    assert_eq!(count(&log, "build"), 0);
    drop((reactor, client, duplicate));
    ledger.assert_balanced();
}

/// A listener that somebody else has shut down, who has the socket too, closes: nobody can
/// reach it any more, and each accept would fail.
#[test]
fn a_listener_that_somebody_shuts_down_closes() {
    for kind in ["TCP", "UNIX"] {
        for is_draining in [false, true] {
            let ledger = DescriptorLedger::open();
            let log = Log::default();
            let mut reactor = Reactor::new().unwrap();
            let listener = match kind {
                "TCP" => listen(&mut reactor, Doorman::new(&log)).0,
                _ => {
                    let name = Unix::at(UnixAddress::Abstract(abstract_name()));
                    reactor.listen(name, Doorman::new(&log)).unwrap()
                }
            };
            run_until_quiet(&mut reactor);
            let duplicate = reactor.get(listener).unwrap().duplicate().unwrap();
            rustix::net::shutdown(&duplicate, rustix::net::Shutdown::Both).unwrap();
            if is_draining {
                let listener = reactor.get(listener).unwrap();
                listener.stop_listening_when_drained();
            }
            run_until(&mut reactor, |reactor| reactor.get(listener).is_none());
            assert_eq!(*log.borrow(), ["started", "stopped"], "{kind}");
            assert_eq!(reactor.delayed_calls().count(), 0, "{kind}");
            drop((reactor, duplicate));
            ledger.assert_balanced();
        }
    }
}

/// L-13.
#[test]
fn build_protocol_is_given_the_peers_address() {
    let ledger = DescriptorLedger::open();
    let directory = tempfile::tempdir().unwrap();
    let server = UnixAddress::Path(directory.path().join("server"));
    let client = UnixAddress::Path(directory.path().join("client"));
    let seen = Rc::new(RefCell::new(Vec::new()));
    let record = Record::default();
    let mut reactor = Reactor::new().unwrap();
    let peers = Rc::clone(&seen);
    let recorder = Recorder::new(&record);
    let factory = move |peer: &Address| {
        peers.borrow_mut().push(peer.clone());
        recorder.clone()
    };
    let tcp = reactor
        .listen_tcp(([127, 0, 0, 1], 0).into(), factory.clone())
        .unwrap();
    reactor.listen_unix(server.clone(), factory).unwrap();
    let address = reactor.get(tcp).unwrap().address().as_inet().unwrap();
    let over_tcp = StdTcpStream::connect(address).unwrap();
    run_until(&mut reactor, |_| seen.borrow().len() == 1);
    let unnamed = StdUnixStream::connect_addr(&std_address(&server)).unwrap();
    run_until(&mut reactor, |_| seen.borrow().len() == 2);
    // std cannot bind a client.
    let bound = rustix::net::socket_with(
        rustix::net::AddressFamily::UNIX,
        rustix::net::SocketType::STREAM,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )
    .unwrap();
    let path = |address: &UnixAddress| {
        rustix::net::SocketAddrUnix::new(address.as_path().unwrap()).unwrap()
    };
    rustix::net::bind(&bound, &path(&client)).unwrap();
    rustix::net::connect(&bound, &path(&server)).unwrap();
    run_until(&mut reactor, |_| seen.borrow().len() == 3);
    assert_eq!(
        *seen.borrow(),
        [
            Address::Inet(over_tcp.local_addr().unwrap()),
            Address::Unix(UnixAddress::Unnamed),
            Address::Unix(client),
        ]
    );
    drop((reactor, over_tcp, unnamed, bound, directory));
    ledger.assert_balanced();
}

/// What was sent before the connection was accepted is read in the turn that
/// accepts it; and a client that is gone again by then needs no event.
#[test]
fn client_that_sends_and_closes_is_served_by_the_event_of_the_listener() {
    let ledger = DescriptorLedger::open();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("early");
    let record = Record::default();
    let mut reactor = Reactor::new().unwrap();
    let recorder = record.clone();
    reactor
        .listen_unix(&path, move |_: &Address| Recorder::new(&recorder))
        .unwrap();
    run_until_quiet(&mut reactor);
    let events = reactor.statistics().events;

    let mut client = StdUnixStream::connect(&path).unwrap();
    client.write_all(b"early").unwrap();
    drop(client);
    reactor.turn(Some(Duration::from_secs(20)));
    assert_eq!(record.summary(), ["made", "data 5"]);
    run_until(&mut reactor, |_| record.is_lost());
    assert_eq!(reactor.statistics().events, events + 1);

    // One that stays is watched from then on.
    let record = Record::default();
    let path = directory.path().join("patient");
    let recorder = record.clone();
    reactor
        .listen_unix(&path, move |_: &Address| Recorder::new(&recorder))
        .unwrap();
    let mut client = StdUnixStream::connect(&path).unwrap();
    run_until_quiet(&mut reactor);
    assert_eq!(record.summary(), ["made"]);
    client.write_all(b"later").unwrap();
    run_until(&mut reactor, |_| record.data() == b"later");
    let handle = record.handle(0);
    reactor.get(handle).unwrap().abort_connection();
    run_until(&mut reactor, |_| record.is_lost());
    drop(client);
    drop(reactor);
    ledger.assert_balanced();
}

/// A reader that pauses as soon as it can is not read, and what came meanwhile
/// is there when it goes on.
#[test]
fn connection_paused_when_it_is_made_loses_nothing_of_what_was_sent_before() {
    let ledger = DescriptorLedger::open();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("paused");
    let record = Record::default();
    let mut reactor = Reactor::new().unwrap();
    let recorder = record.clone();
    let listener = reactor
        .listen_unix(&path, move |_: &Address| Pausing(Recorder::new(&recorder)))
        .unwrap();
    let mut client = StdUnixStream::connect(&path).unwrap();
    client.write_all(b"before").unwrap();
    run_until_quiet(&mut reactor);
    assert_eq!(record.summary(), ["made"]);
    client.write_all(b" and after").unwrap();
    drop(client);
    run_until_quiet(&mut reactor);
    let handle = record.handle(0);
    reactor.get(handle).unwrap().resume_producing();
    run_until(&mut reactor, |_| record.is_lost());
    assert_eq!(record.data(), b"before and after");
    reactor.get(listener).unwrap().stop_listening();
    drop(reactor);
    ledger.assert_balanced();
}

struct Pausing(Recorder);

impl<T: Transport> Protocol<T> for Pausing {
    fn connection_made(&mut self, cx: &mut Context<'_, T>) {
        cx.transport.pause_producing();
        self.0.connection_made(cx);
    }

    fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
        self.0.data_received(cx, data);
    }

    fn connection_lost(&mut self, cx: &mut Context<'_, T>, reason: &CloseReason) {
        self.0.connection_lost(cx, reason);
    }
}
