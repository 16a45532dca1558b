//! Listeners and connectors whose connections wait for the peer when they close.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener as StdTcpListener, TcpStream as StdTcpStream};
use std::num::NonZero;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::time::Duration;

use bowline::endpoint::{Connect, Listen, ListenAt, Side};
use bowline::layers::TcpSocket;
use bowline::testing::{ManualClock, Memory, MemorySocket, SimulatedKernel};
use bowline::{
    Address, BuildContext, CloseReason, Context, Factory, LingeringClose, Protocol, Reactor, Tcp,
    Transport, Transports, Unix,
};

use crate::support::{DEADLINE, DescriptorLedger, Event, Record};

const TIME: Duration = Duration::from_secs(3);
const BYTES: usize = 100_000;
const ANSWER: &[u8] = b"no";

fn limits() -> LingeringClose {
    LingeringClose::default().time(TIME).bytes(BYTES)
}

/// Reads one byte, answers, and closes, with the rest unread.
#[derive(Clone, Default)]
struct Refuses {
    record: Record,
    changes_its_mind: bool,
}

impl<T: Transport> Protocol<T> for Refuses {
    fn connection_made(&mut self, cx: &mut Context<'_, T>) {
        if self.changes_its_mind {
            cx.transport.set_lingering_close(None);
        }
        cx.transport.set_read_limit(NonZero::new(1));
    }

    fn data_received(&mut self, cx: &mut Context<'_, T>, _: &[u8]) {
        cx.transport.write(ANSWER);
        cx.transport.lose_connection();
    }

    fn connection_lost(&mut self, _: &mut Context<'_, T>, reason: &CloseReason) {
        self.record.push(Event::Lost(reason.to_string()));
    }
}

/// A reactor, with time that is moved by hand.
struct Stage {
    reactor: Reactor,
    clock: ManualClock,
    protocol: Refuses,
    _ledger: DescriptorLedger,
}

impl Stage {
    fn new() -> Self {
        let ledger = DescriptorLedger::open();
        let clock = ManualClock::new();
        let mut reactor = Reactor::with_clock(clock.clone()).unwrap();
        reactor.start().unwrap();
        Self {
            reactor,
            clock,
            protocol: Refuses::default(),
            _ledger: ledger,
        }
    }

    fn factory(&self) -> impl FnMut(&Address) -> Refuses + use<> {
        let protocol = self.protocol.clone();
        move |_| protocol.clone()
    }

    /// A client that has sent more than is read, and has the answer.
    fn refused(&mut self, address: SocketAddr) -> StdTcpStream {
        let mut client = StdTcpStream::connect(address).unwrap();
        client.write_all(&[0; 1_000]).unwrap();
        client.set_nonblocking(true).unwrap();
        for _ in 0..1_000 {
            self.settle();
            if client.peek(&mut [0]).is_ok() {
                return client;
            }
        }
        panic!("no answer");
    }

    fn settle(&mut self) {
        for _ in 0..30 {
            self.reactor.turn(Some(Duration::ZERO));
        }
    }

    fn advance(&mut self, by: Duration) {
        self.clock.advance(by);
        self.settle();
    }

    #[track_caller]
    fn assert_waits(&mut self) {
        self.settle();
        assert_eq!(self.protocol.record.summary(), [""; 0]);
    }

    #[track_caller]
    fn assert_lost(&mut self, how: &str) {
        for _ in 0..1_000 {
            self.settle();
            if self.protocol.record.is_lost() {
                break;
            }
        }
        assert_eq!(self.protocol.record.summary(), [format!("lost {how}")]);
    }
}

fn loopback() -> SocketAddr {
    ([127, 0, 0, 1], 0).into()
}

/// What has come until the end, which is one without a reset.
fn heard(client: &mut StdTcpStream) -> Vec<u8> {
    client.set_nonblocking(false).unwrap();
    client.set_read_timeout(Some(DEADLINE)).unwrap();
    let mut all = Vec::new();
    client.read_to_end(&mut all).unwrap();
    all
}

/// Every way to make a listener for TCP, with the option.
fn listeners(stage: &mut Stage) -> Vec<SocketAddr> {
    let bound = StdTcpListener::bind(loopback()).unwrap();
    let bound_at = bound.local_addr().unwrap();
    let layers = |socket: TcpSocket, _: Side| socket;
    let at = || Tcp::at(loopback());
    let mut addresses = vec![bound_at];
    let inherited = at().lingering_close(limits()).on(bound.into());
    stage.reactor.listen(inherited, stage.factory()).unwrap();
    let factory = stage.factory();
    let plain = stage
        .reactor
        .listen(at().lingering_close(limits()), factory);
    let factory = stage.factory();
    // In whichever order.
    let before = at().lingering_close(limits()).layer(layers);
    let before = stage.reactor.listen(before, factory);
    let factory = stage.factory();
    let after = at().layer(layers).lingering_close(limits());
    let after = stage.reactor.listen(after, factory);
    for listener in [plain, before, after] {
        let listener = stage.reactor.get(listener.unwrap()).unwrap();
        addresses.push(listener.address().as_inet().unwrap());
    }
    addresses
}

/// Where it is no option the answer is destroyed by a reset, or the client is at least
/// told of one.
#[test]
fn by_default_no_connection_waits() {
    let mut stage = Stage::new();
    let listener = stage.reactor.listen(Tcp::at(loopback()), stage.factory());
    let listener = stage.reactor.get(listener.unwrap()).unwrap();
    let address = listener.address().as_inet().unwrap();
    let mut client = StdTcpStream::connect(address).unwrap();
    client.write_all(&[0; 1_000]).unwrap();
    stage.assert_lost("closed cleanly");
    client.set_read_timeout(Some(DEADLINE)).unwrap();
    let error = client.read_to_end(&mut Vec::new()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
}

#[test]
fn each_connection_of_a_listener_waits_for_a_peer_that_stops_until_its_time_is_over() {
    for way in 0..4 {
        let mut stage = Stage::new();
        let address = listeners(&mut stage)[way];
        let mut client = stage.refused(address);
        assert_eq!(heard(&mut client), ANSWER, "way {way}");
        stage.advance(TIME - Duration::from_millis(1));
        stage.assert_waits();
        stage.advance(Duration::from_millis(1));
        stage.assert_lost("closed cleanly");
    }
}

#[test]
fn each_connection_of_a_listener_waits_for_its_peers_end() {
    for way in 0..4 {
        let mut stage = Stage::new();
        let address = listeners(&mut stage)[way];
        let mut client = stage.refused(address);
        stage.assert_waits();
        assert_eq!(heard(&mut client), ANSWER, "way {way}");
        drop(client);
        stage.assert_lost("closed cleanly");
    }
}

/// It has had its answer, whatever it sends then.
#[test]
fn a_peer_that_keeps_sending_is_heard_for_so_many_bytes() {
    let mut stage = Stage::new();
    let address = listeners(&mut stage)[1];
    let mut client = stage.refused(address);
    let mut sent = 0;
    while !stage.protocol.record.is_lost() {
        match client.write(&[0; 1_000]) {
            Ok(count) => sent += count,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => panic!("{error} after {sent} bytes"),
        }
        stage.settle();
        assert!(sent < BYTES + 10_000_000, "it never ends");
    }
    assert!(sent >= BYTES - 1_000, "{sent}");
    stage.assert_lost("closed cleanly");
}

#[test]
fn a_peer_that_resets_ends_the_wait() {
    let mut stage = Stage::new();
    let address = listeners(&mut stage)[1];
    let client = stage.refused(address);
    stage.assert_waits();
    rustix::net::sockopt::set_socket_linger(&client, Some(Duration::ZERO)).unwrap();
    drop(client);
    stage.assert_lost("connection lost");
}

#[test]
fn a_protocol_can_have_its_own_connection_not_wait() {
    let mut stage = Stage::new();
    stage.protocol.changes_its_mind = true;
    let address = listeners(&mut stage)[1];
    let _client = StdTcpStream::connect(address).unwrap();
    let mut client = StdTcpStream::connect(address).unwrap();
    client.write_all(b"?").unwrap();
    stage.assert_lost("closed cleanly");
}

/// Declines whoever comes, with a word.
struct Declines;

impl Factory for Declines {
    type Protocol = Refuses;

    fn build_protocol(&mut self, cx: &mut BuildContext<'_>, _: &Address) -> Option<Refuses> {
        cx.listener().unwrap().decline_with(ANSWER);
        None
    }
}

/// It had sent something by then, which nobody reads.
#[test]
fn a_client_that_is_declined_hears_the_word() {
    let mut stage = Stage::new();
    let endpoint = Tcp::at(loopback()).lingering_close(limits());
    let listener = stage.reactor.listen(endpoint, Declines).unwrap();
    let listener = stage.reactor.get(listener).unwrap();
    let address = listener.address().as_inet().unwrap();
    let mut client = stage.refused(address);
    let _ = client.write(&[0; 1_000]);
    stage.settle();
    assert_eq!(heard(&mut client), ANSWER);
    drop(client);
    stage.settle();
    assert_eq!(stage.reactor.registered(), 1, "the listener");
}

#[test]
fn the_connection_of_a_connector_waits_too() {
    for is_asked in [true, false] {
        let mut stage = Stage::new();
        let server = StdTcpListener::bind(loopback()).unwrap();
        let to = Tcp::to(server.local_addr().unwrap());
        let factory = stage.factory();
        if is_asked {
            let to = to.lingering_close(limits());
            stage.reactor.connect(to, factory).unwrap();
        } else {
            stage.reactor.connect(to, factory).unwrap();
        }
        stage.settle();
        let (mut peer, _) = server.accept().unwrap();
        peer.write_all(&[0; 1_000]).unwrap();
        if is_asked {
            for _ in 0..30 {
                stage.assert_waits();
            }
            assert_eq!(heard(&mut peer), ANSWER);
            stage.advance(TIME);
        }
        stage.assert_lost("closed cleanly");
    }
}

/// They have no resets that could destroy anything.
#[test]
fn kinds_without_resets_do_not_wait() {
    let mut stage = Stage::new();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let endpoint = Unix::at(&*path).lingering_close(limits());
    let factory = stage.factory();
    stage.reactor.listen(endpoint, factory).unwrap();
    let mut client = StdUnixStream::connect(&path).unwrap();
    client.write_all(&[0; 1_000]).unwrap();
    stage.assert_lost("closed cleanly");
    let mut answer = [0; 2];
    client.read_exact(&mut answer).unwrap();
    assert_eq!(answer, ANSWER);

    let mut stage = Stage::new();
    let kernel = SimulatedKernel::new();
    let endpoint = Memory::at(&kernel, "s").lingering_close(limits());
    let factory = stage.factory();
    stage.reactor.listen(endpoint, factory).unwrap();
    let client: MemorySocket = kernel.connect("s").unwrap();
    let other = stage.protocol.clone();
    let client = client.adopt(&mut stage.reactor, other).unwrap();
    let transport = stage.reactor.get(client.handle()).unwrap();
    transport.write(&[0; 1_000]);
    stage.settle();
    assert!(stage.protocol.record.is_lost());
}
