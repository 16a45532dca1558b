//! How many connections there may be (H-19, H-20, W-71).

use std::cell::RefCell;
use std::io::{Read, Write};
use std::net::TcpStream as StdTcpStream;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::rc::Rc;

use bowline::policies::{ConnectionCount, LimitConnections, ProtocolWrapper};
use bowline::testing::{ManualClock, Pump, SimulatedKernel};
use bowline::{Address, Context, Factory, Protocol, Reactor, Transport, Transports, UnixAddress};

use crate::support::{DEADLINE, DescriptorLedger, run_until, run_until_quiet};
use crate::{build, client, seconds};

/// Panics when told to, or at its end if it was told so.
#[derive(Default)]
struct Brittle(bool);

impl<T: Transport> Protocol<T> for Brittle {
    fn data_received(&mut self, _: &mut Context<'_, T>, data: &[u8]) {
        self.0 = data == b"later";
        assert!(self.0, "told to panic");
    }

    fn connection_lost(&mut self, _: &mut Context<'_, T>, _: &bowline::CloseReason) {
        assert!(!self.0, "told to panic");
    }
}

fn brittle(_: &Address) -> Brittle {
    Brittle::default()
}

fn pump() -> Pump {
    Pump::with_kernel(SimulatedKernel::new()).unwrap()
}

fn silence_panics() {
    std::panic::set_hook(Box::new(|_| {}));
}

/// H-19, H-20: connections that were moved here are many already.
#[test]
fn adopted_connections_count_too() {
    let _ledger = DescriptorLedger::open();
    let mut pump = pump();
    let mut factory = LimitConnections::new(brittle)
        .total(Some(3))
        .per_peer(Some(2));
    let count = factory.count();
    let peers = ["192.0.2.1:1", "192.0.2.1:2", "192.0.2.2:1", "192.0.2.3:1"].map(client);
    let mut moved = Vec::new();
    for peer in &peers[..2] {
        let protocol = ProtocolWrapper::new(Brittle::default(), count.counted(peer));
        moved.push(pump.connect(protocol).unwrap().1);
    }
    pump.run();
    assert_eq!((count.open(), count.open_with(&peers[0])), (2, 2));
    assert!(build(&mut pump, &mut factory, &peers[0]).is_none());
    let third = build(&mut pump, &mut factory, &peers[2]);
    assert!(third.is_some() && build(&mut pump, &mut factory, &peers[3]).is_none());
    drop(moved);
    pump.run();
    assert_eq!((count.open(), count.declined()), (1, 2));
    assert!(build(&mut pump, &mut factory, &peers[0]).is_some());
}

/// H-20.
#[test]
fn beyond_the_total_connections_are_declined() {
    let _ledger = DescriptorLedger::open();
    let mut pump = pump();
    let mut factory = LimitConnections::new(brittle).total(Some(2));
    let count = factory.count();
    let peers = ["192.0.2.1:1", "192.0.2.2:1", "192.0.2.3:1"].map(client);
    let first = build(&mut pump, &mut factory, &peers[0]).unwrap();
    let second = build(&mut pump, &mut factory, &peers[1]);
    assert!(second.is_some());
    assert!(build(&mut pump, &mut factory, &peers[2]).is_none());
    assert_eq!((count.open(), count.declined()), (2, 1));
    let (_, peer) = pump.connect(first).unwrap();
    pump.run();
    peer.close();
    pump.run();
    assert_eq!(count.open(), 1);
    assert!(build(&mut pump, &mut factory, &peers[2]).is_some());
    // Built, and dropped without a connection.
    assert_eq!(count.open(), 1);
    drop(second);
    assert_eq!(count.open(), 0);
}

/// H-20: with no limit all are counted and none is declined.
#[test]
fn none_is_unlimited() {
    let _ledger = DescriptorLedger::open();
    let mut pump = pump();
    let mut factory = LimitConnections::new(brittle);
    let count = factory.count();
    let peer = client("192.0.2.1:1");
    let built: Vec<_> = (0..1000)
        .filter_map(|_| build(&mut pump, &mut factory, &peer))
        .collect();
    assert_eq!(
        (built.len(), count.open(), count.declined()),
        (1000, 1000, 0)
    );
}

/// H-19, W-71.
#[test]
fn a_peer_is_its_ip_address_or_any_unix_peer() {
    let _ledger = DescriptorLedger::open();
    let mut pump = pump();
    let mut factory = LimitConnections::new(brittle).per_peer(Some(2));
    let count = factory.count();
    let mut admitted = |address: &Address| build(&mut pump, &mut factory, address);
    let one = admitted(&client("192.0.2.1:1000")).unwrap();
    let mapped = admitted(&client("[::ffff:192.0.2.1]:2000"));
    assert!(mapped.is_some());
    assert!(admitted(&client("192.0.2.1:3000")).is_none());
    let other = admitted(&client("192.0.2.2:1000"));
    assert!(other.is_some());
    let unix = [
        UnixAddress::Unnamed,
        UnixAddress::Path("/run/one".into()),
        UnixAddress::Abstract(b"two".to_vec()),
    ]
    .map(|address| admitted(&Address::Unix(address)));
    assert!(unix[0].is_some() && unix[1].is_some() && unix[2].is_none());
    let peer = client("192.0.2.1:9");
    assert_eq!((count.open(), count.open_with(&peer)), (5, 2));
    drop(one);
    assert_eq!(count.open_with(&peer), 1);
    drop((mapped, other, unix));
    assert_eq!((count.open(), count.open_with(&peer)), (0, 0));
}

/// H-20: wherever the panic is, the count falls, once.
#[test]
fn the_count_falls_when_a_callback_panics() {
    let _ledger = DescriptorLedger::open();
    silence_panics();
    let mut pump = pump();
    let mut factory = LimitConnections::new(brittle).total(Some(1));
    let count = factory.count();
    for orders in [&b"now"[..], b"later"] {
        let protocol = build(&mut pump, &mut factory, &client("192.0.2.1:1")).unwrap();
        let (_, peer) = pump.connect(protocol).unwrap();
        pump.run();
        assert_eq!(count.open(), 1);
        peer.send(orders).unwrap();
        pump.run();
        peer.close();
        pump.run();
        assert_eq!(count.open(), 0);
    }
    assert!(pump.reactor().statistics().panics >= 2);

    // In build_protocol itself.
    let mut fails = LimitConnections::new(|_: &Address| -> Brittle { panic!("told to panic") });
    let count = fails.count();
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        build(&mut pump, &mut fails, &client("192.0.2.1:1"))
    }));
    assert!(result.is_err());
    assert_eq!(count.open(), 0);
}

#[test]
fn a_killed_connection_is_not_counted() {
    let _ledger = DescriptorLedger::open();
    let mut pump = pump();
    let mut factory = LimitConnections::new(brittle);
    let count = factory.count();
    let protocol = build(&mut pump, &mut factory, &client("192.0.2.1:1")).unwrap();
    let (transport, _peer) = pump.connect(protocol).unwrap();
    pump.run();
    pump.kill(transport);
    pump.run();
    assert_eq!(count.open(), 0);
}

/// H-19, H-20: two listeners under one limit, with real clients.
#[test]
fn real_listeners_share_a_limit() {
    fn listen<F>(reactor: &mut Reactor, factory: &Rc<RefCell<F>>) -> std::net::SocketAddr
    where
        F: Factory<Protocol: Protocol<bowline::TcpStream>>,
    {
        let any = ([127, 0, 0, 1], 0).into();
        let listener = reactor.listen_tcp(any, Rc::clone(factory)).unwrap();
        let address = reactor.get(listener).unwrap().address();
        address.as_inet().unwrap()
    }
    let ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let factory = LimitConnections::new(brittle).per_peer(Some(1));
    let count: ConnectionCount = factory.count();
    let factory = Rc::new(RefCell::new(factory));
    let (one, other) = (
        listen(&mut reactor, &factory),
        listen(&mut reactor, &factory),
    );
    let served = StdTcpStream::connect(one).unwrap();
    run_until(&mut reactor, |_| count.open() == 1);
    let mut declined = StdTcpStream::connect(other).unwrap();
    declined.set_read_timeout(Some(DEADLINE)).unwrap();
    run_until(&mut reactor, |_| count.declined() == 1);
    assert_eq!(declined.read(&mut [0]).unwrap(), 0, "closed");
    drop(served);
    run_until(&mut reactor, |_| count.open() == 0);
    let again = StdTcpStream::connect(other).unwrap();
    run_until(&mut reactor, |_| count.open() == 1);
    drop((again, declined, reactor, factory));
    assert_eq!(count.open(), 0);
    ledger.assert_balanced();
}

const FULL: &[u8] = b"come back later\n";

/// Whether it has sent before it was accepted, which would have its word destroyed by
/// a reset, or closes its side first.
#[derive(Clone, Copy, Debug)]
enum Client {
    Silent,
    HasSent,
    HasClosed,
}

/// What a client reads until the end.
fn last_word(mut client: impl Read + Write, kind: Client, mut turn: impl FnMut()) -> Vec<u8> {
    if matches!(kind, Client::HasSent) {
        client.write_all(&[b'x'; 100_000]).unwrap();
    }
    let mut all = Vec::new();
    let mut piece = [0; 64];
    for _ in 0..1_000_000 {
        turn();
        match client.read(&mut piece) {
            Ok(0) => return all,
            Ok(count) => all.extend(&piece[..count]),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => panic!("{kind:?}: {error}"),
        }
    }
    panic!("no end: {kind:?}");
}

#[test]
fn declined_clients_hear_a_word_and_the_end() {
    let ledger = DescriptorLedger::open();
    let directory = tempfile::tempdir().unwrap();
    let mut reactor = Reactor::new().unwrap();
    let factory = LimitConnections::new(brittle).total(Some(0)).farewell(FULL);
    let count = factory.count();
    let factory = Rc::new(RefCell::new(factory));
    let any = ([127, 0, 0, 1], 0).into();
    let tcp = reactor.listen_tcp(any, Rc::clone(&factory)).unwrap();
    let tcp = reactor.get(tcp).unwrap().address().as_inet().unwrap();
    let path = directory.path().join("socket");
    reactor.listen_unix(&*path, Rc::clone(&factory)).unwrap();
    for kind in [Client::Silent, Client::HasSent, Client::HasClosed] {
        let mut turn = || {
            reactor.turn(Some(std::time::Duration::from_millis(1)));
        };
        let client = StdTcpStream::connect(tcp).unwrap();
        client.set_nonblocking(true).unwrap();
        if matches!(kind, Client::HasClosed) {
            client.shutdown(std::net::Shutdown::Write).unwrap();
        }
        assert_eq!(last_word(client, kind, &mut turn), FULL, "TCP, {kind:?}");
        let client = StdUnixStream::connect(&path).unwrap();
        client.set_nonblocking(true).unwrap();
        if matches!(kind, Client::HasClosed) {
            client.shutdown(std::net::Shutdown::Write).unwrap();
        }
        assert_eq!(last_word(client, kind, &mut turn), FULL, "UNIX, {kind:?}");
    }
    assert_eq!((count.open(), count.declined()), (0, 6));
    // They are gone, and nothing is left of them.
    run_until(&mut reactor, |reactor| reactor.registered() == 2);
    drop((reactor, directory));
    ledger.assert_balanced();
}

/// A word is said to so many at a time, each for a second; the others are closed.
#[test]
fn a_flood_of_declined_clients_holds_on_to_little() {
    let ledger = DescriptorLedger::open();
    let clock = ManualClock::new();
    let mut reactor = Reactor::with_clock(clock.clone()).unwrap();
    let factory = LimitConnections::new(brittle).total(Some(0)).farewell(FULL);
    let any = ([127, 0, 0, 1], 0).into();
    let listener = reactor.listen_tcp(any, factory).unwrap();
    let address = reactor.get(listener).unwrap().address().as_inet().unwrap();
    let clients: Vec<_> = (0..100)
        .map(|_| StdTcpStream::connect(address).unwrap())
        .collect();
    run_until(&mut reactor, |reactor| reactor.registered() == 65);
    run_until_quiet(&mut reactor);
    let mut told = 0;
    for mut client in &clients {
        client.set_read_timeout(Some(DEADLINE)).unwrap();
        let mut text = Vec::new();
        client.read_to_end(&mut text).unwrap();
        told += usize::from(text == FULL);
    }
    assert_eq!(told, 64);
    clock.advance(seconds(0.999));
    run_until_quiet(&mut reactor);
    assert_eq!(reactor.registered(), 65);
    clock.advance(seconds(0.001));
    run_until(&mut reactor, |reactor| reactor.registered() == 1);
    // There is room for another one.
    let mut client = StdTcpStream::connect(address).unwrap();
    run_until(&mut reactor, |reactor| reactor.registered() == 2);
    client.set_read_timeout(Some(DEADLINE)).unwrap();
    let mut text = Vec::new();
    client.read_to_end(&mut text).unwrap();
    assert_eq!(text, FULL);
    drop((reactor, clients, client));
    ledger.assert_balanced();
}

#[test]
fn users_of_unix_sockets_are_told_apart() {
    let ledger = DescriptorLedger::open();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let me = rustix::process::geteuid().as_raw();
    let mut reactor = Reactor::new().unwrap();
    let factory = LimitConnections::new(brittle).per_user(Some(2));
    let count = factory.count();
    let factory = Rc::new(RefCell::new(factory));
    reactor.listen_unix(&*path, Rc::clone(&factory)).unwrap();
    let any = ([127, 0, 0, 1], 0).into();
    let tcp = reactor.listen_tcp(any, Rc::clone(&factory)).unwrap();
    let tcp = reactor.get(tcp).unwrap().address().as_inet().unwrap();
    let connect = || StdUnixStream::connect(&path).unwrap();
    let mut clients = vec![connect(), connect(), connect()];
    run_until(&mut reactor, |_| count.declined() == 1);
    assert_eq!((count.open(), count.open_of_user(me)), (2, 2));
    assert_eq!(count.open_of_user(me + 1), 0);
    assert_eq!(clients[2].read(&mut [0]).unwrap(), 0, "closed");
    // Where nobody knows the user, none is counted.
    let strangers: Vec<_> = (0..3)
        .map(|_| StdTcpStream::connect(tcp).unwrap())
        .collect();
    run_until(&mut reactor, |_| count.open() == 5);
    assert_eq!((count.open_of_user(me), count.declined()), (2, 1));
    clients.remove(0);
    run_until(&mut reactor, |_| count.open_of_user(me) == 1);
    clients.push(connect());
    run_until(&mut reactor, |_| count.open_of_user(me) == 2);
    drop((reactor, clients, strangers, factory, directory));
    assert_eq!((count.open(), count.open_of_user(me)), (0, 0));
    ledger.assert_balanced();
}
