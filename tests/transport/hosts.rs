//! Host names: looking them up, and which of their addresses is connected to.
//! Nothing here asks the network.

use std::cell::{Cell, RefCell};
use std::fs;
use std::io;
use std::net::{SocketAddr, TcpListener as StdTcpListener};
use std::rc::Rc;
use std::time::Duration;

use bowline::Tcp;
use bowline::endpoint::TcpConnect;
use bowline::error::LookupError;
use bowline::policies::{Backoff, Jitter, Reconnecting};
use bowline::resolve::{Answer, Resolver, SystemResolver};
use bowline::threads::{AtShutdown, ThreadPool, ThreadPoolSettings};
use bowline::{
    Address, BuildContext, ConnectError, ConnectorHandle, Destination, Factory, Reactor, Transports,
};

use crate::connectors::{Stage, deaf_tcp, refused_address};
use crate::harness::{Doorman, Script, failure_in_short};
use crate::support::{
    DescriptorLedger, Recorder, assert_no_pool_threads, in_short, open_descriptors, run_until,
};

const NAME: &str = "server.test";
const PORT: u16 = 7;

/// What a resolver was asked, and what it is to answer.
#[derive(Clone, Default)]
struct Table {
    asked: Rc<Cell<usize>>,
    addresses: Rc<RefCell<Vec<SocketAddr>>>,
}

impl Table {
    /// Has the reactor ask it.
    fn of(reactor: &mut Reactor, addresses: impl IntoIterator<Item = SocketAddr>) -> Self {
        let table = Self::default();
        table.set(addresses);
        let shown = table.clone();
        reactor.set_resolver(move |host: &str, port: u16| {
            assert_eq!((host, port), (NAME, PORT));
            shown.asked.set(shown.asked.get() + 1);
            Ok(shown.addresses.borrow().clone())
        });
        table
    }

    fn set(&self, addresses: impl IntoIterator<Item = SocketAddr>) {
        *self.addresses.borrow_mut() = addresses.into_iter().collect();
    }
}

/// Keeps the answers that it owes.
#[derive(Clone, Default)]
struct Slow {
    owed: Rc<RefCell<Vec<Answer>>>,
}

impl Resolver for Slow {
    fn resolve(&mut self, _: &mut Reactor, _: &str, _: u16, answer: Answer) {
        self.owed.borrow_mut().push(answer);
    }
}

fn listen() -> (StdTcpListener, SocketAddr) {
    let listener = StdTcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

/// A doorman whose protocol notes the peer.
fn door(stage: &Stage) -> Doorman {
    let log = Rc::clone(&stage.log);
    Doorman::new(&stage.log).build(move |_| {
        let (made, lost) = (Rc::clone(&log), Rc::clone(&log));
        let script = Script::new()
            .made(move |cx| {
                made.borrow_mut()
                    .push(format!("made {}", cx.transport.peer()))
            })
            .lost(move |_, reason| {
                lost.borrow_mut()
                    .push(format!("protocol lost: {}", in_short(reason)))
            });
        Some(script)
    })
}

fn connect(stage: &mut Stage) -> ConnectorHandle {
    connect_with(stage, there())
}

fn there() -> TcpConnect {
    Tcp::to_host(NAME, PORT)
}

fn connect_with(stage: &mut Stage, endpoint: TcpConnect) -> ConnectorHandle {
    let factory = door(stage);
    let reactor = &mut stage.reactor;
    reactor.connect(endpoint, factory).unwrap()
}

#[track_caller]
fn assert_connected(stage: &Stage, address: SocketAddr) {
    stage.assert_log(&["started", "build", &format!("made {address}")]);
}

/// Contract C-13, C-05, E-06.
#[test]
fn a_host_is_resolved_first_and_the_peer_is_its_address() {
    let mut stage = Stage::new();
    let (listener, address) = listen();
    let table = Table::of(&mut stage.reactor, [address]);
    let connector = connect(&mut stage);
    stage.assert_log(&[]);
    assert_eq!(table.asked.get(), 0, "asked inside the call");
    stage.settle();
    assert_connected(&stage, address);
    assert_eq!(table.asked.get(), 1);
    let destination = stage.reactor.get(connector).unwrap().destination();
    assert_eq!(destination.to_string(), "server.test:7");
    let expected = Destination::Host {
        name: NAME.into(),
        port: PORT,
    };
    assert_eq!(destination, expected);
    assert_eq!(stage.reactor.delayed_calls().count(), 0);
    drop(listener.accept().unwrap());
    stage.run_until_stopped();
    drop(listener);
    stage.finish();
}

/// Contract C-13, R-45: an address in writing is not looked up.
#[test]
fn an_address_in_writing_is_connected_to_without_a_lookup() {
    for host in ["127.0.0.1", "::1"] {
        let mut stage = Stage::new();
        let Ok(listener) = StdTcpListener::bind((host, 0)) else {
            drop(stage);
            #[allow(clippy::print_stderr, reason = "a skipped test has to be seen")]
            {
                eprintln!("SKIPPED: {host} was NOT tested, it cannot be bound here");
            }
            continue;
        };
        let address = listener.local_addr().unwrap();
        stage
            .reactor
            .set_resolver(|_: &str, _: u16| panic!("it was looked up"));
        let factory = door(&stage);
        let reactor = &mut stage.reactor;
        let connector = reactor.connect_host(host, address.port(), factory).unwrap();
        stage.settle();
        assert_connected(&stage, address);
        // Written as an address is.
        let destination = stage.reactor.get(connector).unwrap().destination();
        assert_eq!(destination.to_string(), address.to_string());
        drop(listener.accept().unwrap());
        stage.run_until_stopped();
        drop(listener);
        stage.finish();
    }
}

/// Contract E-06, W-54: 250 ms, then the next beside it; the first that answers
/// wins, and nothing is left of the others.
#[test]
fn the_next_address_is_tried_beside_a_slow_one() {
    let mut stage = Stage::new();
    let (deaf, client, slow) = deaf_tcp();
    let (deafer, other_client, slower) = deaf_tcp();
    let (listener, address) = listen();
    Table::of(&mut stage.reactor, [slow, slower, address]);
    let before = open_descriptors().len();
    connect(&mut stage);
    stage.settle();
    let sockets = || open_descriptors().len() - before;
    assert_eq!(sockets(), 1);
    stage.clock.advance(Duration::from_millis(249));
    stage.settle();
    assert_eq!(sockets(), 1);
    stage.clock.advance(Duration::from_millis(1));
    stage.settle();
    assert_eq!(sockets(), 2);
    stage.assert_log(&["started"]);
    stage.clock.advance(Duration::from_millis(250));
    stage.settle();
    assert_connected(&stage, address);
    assert_eq!(sockets(), 1, "the slow ones are closed");
    assert_eq!(stage.reactor.delayed_calls().count(), 0);
    drop(listener.accept().unwrap());
    stage.run_until_stopped();
    drop((deaf, client, deafer, other_client, listener));
    stage.finish();
}

/// Contract E-06: the older of two attempts can win as well.
#[test]
fn the_first_address_wins_although_others_are_being_tried() {
    let mut stage = Stage::new();
    let (waking, client, first) = deaf_tcp();
    let (deaf, other_client, second) = deaf_tcp();
    Table::of(&mut stage.reactor, [first, second]);
    connect(&mut stage);
    stage.settle();
    stage.clock.advance(Duration::from_millis(250));
    stage.settle();
    // The kernel repeats its request after a second.
    drop(waking.accept().unwrap());
    let log = Rc::clone(&stage.log);
    run_until(&mut stage.reactor, |_| log.borrow().len() == 3);
    assert_connected(&stage, first);
    drop(waking.accept().unwrap());
    stage.run_until_stopped();
    drop((waking, client, deaf, other_client));
    stage.finish();
}

/// Contract E-06: no time is lost on a failure.
#[test]
fn a_failed_address_is_followed_by_the_next_at_once() {
    let mut stage = Stage::new();
    let (deaf, client, slow) = deaf_tcp();
    let (listener, address) = listen();
    let refused = refused_address();
    // The clock stands still.
    Table::of(&mut stage.reactor, [refused, address, slow]);
    connect(&mut stage);
    stage.settle();
    assert_connected(&stage, address);
    drop(listener.accept().unwrap());
    stage.run_until_stopped();
    drop((deaf, client, listener));
    stage.finish();
}

/// Notes the error it is told.
#[derive(Clone, Default)]
struct Keeps(Rc<RefCell<Option<String>>>, Rc<Cell<bool>>);

impl Keeps {
    fn told(&self) -> Option<String> {
        self.0.borrow().clone()
    }
}

impl Factory for Keeps {
    type Protocol = Recorder;

    fn build_protocol(&mut self, _: &mut BuildContext<'_>, _: &Address) -> Option<Recorder> {
        None
    }

    fn connection_failed(&mut self, _: &mut BuildContext<'_>, error: &ConnectError) {
        let attempts = error
            .attempts()
            .iter()
            .map(|attempt| format!("{} {}", attempt.address, failure_in_short(&attempt.error)));
        let text = match error {
            ConnectError::Lookup(error) => format!("{error:?}"),
            ConnectError::AllFailed(_) => {
                assert_eq!(
                    error.as_os().map(io::Error::kind),
                    Some(io::ErrorKind::ConnectionRefused)
                );
                attempts.collect::<Vec<_>>().join(", ")
            }
            other => other.to_string(),
        };
        *self.0.borrow_mut() = Some(text);
    }

    fn stopped(&mut self, _: &mut BuildContext<'_>) {
        self.1.set(true);
    }
}

/// Connects, and answers how it failed.
#[track_caller]
fn failure(stage: &mut Stage, endpoint: TcpConnect) -> String {
    let factory = Keeps::default();
    let reactor = &mut stage.reactor;
    reactor.connect(endpoint, factory.clone()).unwrap();
    assert_eq!(factory.told(), None, "told inside the call");
    run_until(&mut stage.reactor, |_| factory.1.get());
    stage.settle();
    assert_eq!(stage.reactor.registered(), 0);
    assert_eq!(stage.reactor.delayed_calls().count(), 0);
    factory.told().unwrap()
}

/// Contract W-54, E-06.
#[test]
fn when_all_addresses_fail_the_error_has_each() {
    let mut stage = Stage::new();
    let (one, two) = (refused_address(), refused_address());
    Table::of(&mut stage.reactor, [one, two, one]);
    let told = failure(&mut stage, there());
    assert_eq!(
        told,
        format!("{one} connection refused, {two} connection refused")
    );
    stage.finish();
}

/// Contract E-06, E-07, C-04.
#[test]
fn a_host_without_an_address_is_a_failed_lookup() {
    let mut stage = Stage::new();
    Table::of(&mut stage.reactor, []);
    assert_eq!(failure(&mut stage, there()), "NoAddress");
    assert!(failure(&mut stage, Tcp::to_host("", PORT)).contains("host name is empty"));
    let not_found = |_: &str, _: u16| Err(io::ErrorKind::NotFound.into());
    stage.reactor.set_resolver(not_found);
    assert_eq!(
        failure(&mut stage, Tcp::to_host("?", PORT)),
        "Failed(Kind(NotFound))"
    );
    stage.finish();
}

#[test]
fn a_resolver_that_panics_fails_the_lookup_and_is_asked_again() {
    let mut stage = Stage::new();
    let mut is_first = true;
    let (listener, address) = listen();
    stage.reactor.set_resolver(move |_: &str, _: u16| {
        assert!(!std::mem::take(&mut is_first), "on purpose, in a test");
        Ok(vec![address])
    });
    let told = failure(&mut stage, there());
    assert!(told.contains("resolver panicked"), "{told}");
    assert_eq!(stage.reactor.statistics().panics, 1);
    connect(&mut stage);
    stage.settle();
    assert_connected(&stage, address);
    drop(listener.accept().unwrap());
    stage.run_until_stopped();
    drop(listener);
    stage.finish();
}

/// Contract E-07: nothing is wrong before it connects.
#[test]
fn an_impossible_name_fails_like_any_other() {
    let ledger = DescriptorLedger::alone();
    let mut reactor = Reactor::new().unwrap();
    let factory = Keeps::default();
    reactor.connect_host("a\0b", 80, factory.clone()).unwrap();
    run_until(&mut reactor, |_| factory.1.get());
    assert!(factory.told().unwrap().starts_with("Failed("));
    stop(&mut reactor);
    drop(reactor);
    ledger.assert_balanced();
}

/// Contract C-14: what stands behind a name is part of it, and no service: there is none
/// to look up, and no port but the one that is given.
#[test]
fn a_service_behind_a_name_is_no_port() {
    let ledger = DescriptorLedger::alone();
    let server = StdTcpListener::bind("127.0.0.1:0").unwrap();
    server.set_nonblocking(true).unwrap();
    let port = server.local_addr().unwrap().port();
    let mut reactor = Reactor::new().unwrap();
    for name in ["127.0.0.1:http", "localhost:http", "127.0.0.1:80"] {
        let factory = Keeps::default();
        reactor.connect_host(name, port, factory.clone()).unwrap();
        assert!(!factory.1.get(), "never inside the call");
        run_until(&mut reactor, |_| factory.1.get());
        assert!(factory.told().unwrap().starts_with("Failed("), "{name}");
    }
    let nobody = server.accept().unwrap_err();
    assert_eq!(nobody.kind(), io::ErrorKind::WouldBlock);
    stop(&mut reactor);
    drop((reactor, server));
    ledger.assert_balanced();
}

/// Stops it, so that its threads are gone.
fn stop(reactor: &mut Reactor) {
    reactor.call_soon(|reactor| reactor.stop().unwrap());
    reactor.run().unwrap();
    assert_no_pool_threads();
}

/// Contract C-05, E-06: one time limit for all of it.
#[test]
fn the_time_limit_covers_the_lookup_and_all_addresses() {
    let mut stage = Stage::new();
    let slow = Slow::default();
    stage.reactor.set_resolver(slow.clone());
    connect(&mut stage);
    stage.settle();
    stage.clock.advance(Duration::from_millis(29_999));
    stage.settle();
    stage.assert_log(&["started"]);
    stage.clock.advance(Duration::from_millis(1));
    stage.run_until_stopped();
    let timed_out = [
        "started",
        "failed: connecting took longer than its timeout",
        "stopped",
    ];
    stage.assert_log(&timed_out);
    // The answer that comes later is ignored.
    let answer = slow.owed.borrow_mut().pop().unwrap();
    assert!(!answer.is_wanted());
    answer.give(&mut stage.reactor, Ok(vec![refused_address()]));
    stage.settle();
    stage.assert_log(&timed_out);

    stage.log.borrow_mut().clear();
    let (deaf, client, one) = deaf_tcp();
    let (deafer, other_client, two) = deaf_tcp();
    connect(&mut stage);
    stage.settle();
    stage.clock.advance(Duration::from_secs(20));
    stage.settle();
    let answer = slow.owed.borrow_mut().pop().unwrap();
    assert!(answer.is_wanted());
    answer.give(&mut stage.reactor, Ok(vec![one, two]));
    stage.settle();
    stage.clock.advance(Duration::from_millis(9_999));
    stage.settle();
    stage.assert_log(&["started"]);
    stage.clock.advance(Duration::from_millis(1));
    stage.run_until_stopped();
    stage.assert_log(&timed_out);
    drop((deaf, client, deafer, other_client));
    stage.finish();
}

/// Contract C-06, E-06.
#[test]
fn an_attempt_can_be_given_up_while_it_looks_up_and_while_it_races() {
    let cancelled = ["started", "failed: connecting was cancelled", "stopped"];
    let mut stage = Stage::new();
    let slow = Slow::default();
    stage.reactor.set_resolver(slow.clone());
    let connector = connect(&mut stage);
    stage.settle();
    stage.reactor.get(connector).unwrap().stop_connecting();
    stage.assert_log(&["started"]);
    stage.run_until_stopped();
    stage.assert_log(&cancelled);
    assert!(!slow.owed.borrow()[0].is_wanted());

    stage.log.borrow_mut().clear();
    let (deaf, client, one) = deaf_tcp();
    let (deafer, other_client, two) = deaf_tcp();
    Table::of(&mut stage.reactor, [one, two, refused_address()]);
    let before = open_descriptors();
    let connector = connect(&mut stage);
    stage.settle();
    stage.clock.advance(Duration::from_millis(250));
    stage.settle();
    assert_eq!(open_descriptors().len(), before.len() + 2);
    stage.reactor.get(connector).unwrap().stop_connecting();
    stage.run_until_stopped();
    stage.assert_log(&cancelled);
    assert_eq!(open_descriptors(), before);
    drop((deaf, client, deafer, other_client));
    stage.finish();
}

/// Contract C-18, W-52: with a lookup for each attempt, whose answer may change.
#[test]
fn connecting_again_looks_up_again() {
    let mut stage = Stage::new();
    let table = Table::of(&mut stage.reactor, [refused_address()]);
    let backoff = Backoff::new().jitter(Jitter::None);
    let factory = Reconnecting::new(door(&stage)).backoff(backoff);
    let reins = factory.reconnection();
    stage.reactor.connect_host(NAME, PORT, factory).unwrap();
    stage.settle();
    assert_eq!((table.asked.get(), reins.retries()), (1, 1));
    let (listener, address) = listen();
    table.set([address]);
    stage.clock.advance(Duration::from_secs(60));
    stage.settle();
    assert_eq!(table.asked.get(), 2);
    let made = format!("made {address}");
    assert_eq!(stage.log.borrow().last(), Some(&made));
    // And after a loss.
    drop(listener.accept().unwrap());
    stage.settle();
    stage.clock.advance(Duration::from_secs(60));
    stage.settle();
    assert_eq!(table.asked.get(), 3);
    assert_eq!(stage.log.borrow().last(), Some(&made));
    reins.stop_trying(&mut stage.reactor);
    drop(listener.accept().unwrap());
    stage.run_until_stopped();
    drop(listener);
    stage.finish();
}

/// One of a host's addresses may be the one connected from, where nobody else listens.
#[test]
fn the_next_address_is_tried_where_a_socket_was_connected_to_itself() {
    let mut stage = Stage::new();
    let (listener, address) = listen();
    let own = refused_address();
    let table = Table::of(&mut stage.reactor, [own, address]);
    connect_with(&mut stage, there().bind_address(own));
    stage.settle();
    assert_connected(&stage, address);
    let (client, peer) = listener.accept().unwrap();
    assert_eq!(peer, own);
    drop((client, table));
    stage.run_until_stopped();
    drop(listener);
    stage.finish();
}

/// Contract C-12: an address to connect from chooses the family, and one with a
/// port serves one attempt at a time.
#[test]
fn the_address_to_connect_from_is_honoured_by_each_attempt() {
    let mut stage = Stage::new();
    let (listener, address) = listen();
    let bound_to = |bound: SocketAddr| there().bind_address(bound);
    let v6 = "[::1]:9".parse().unwrap();
    let from = "127.0.0.2:0".parse().unwrap();
    let table = Table::of(&mut stage.reactor, [v6]);
    let told = failure(&mut stage, bound_to(from));
    assert_eq!(told, "NoAddress");
    table.set([v6, address]);
    connect_with(&mut stage, bound_to(from));
    stage.settle();
    assert_connected(&stage, address);
    let (client, peer) = listener.accept().unwrap();
    assert_eq!(peer.ip(), from.ip());
    drop(client);
    stage.run_until_stopped();

    stage.log.borrow_mut().clear();
    let (deaf, client, slow) = deaf_tcp();
    table.set([slow, address]);
    let connector = connect_with(&mut stage, bound_to(refused_address()));
    stage.settle();
    stage.clock.advance(Duration::from_secs(20));
    stage.settle();
    stage.assert_log(&["started"]);
    stage.reactor.get(connector).unwrap().stop_connecting();
    stage.run_until_stopped();
    drop((deaf, client, listener));
    stage.finish();
}

#[test]
fn the_delay_between_attempts_is_settable_and_never_below_ten_milliseconds() {
    for (asked, delay) in [(40, 40), (0, 10)] {
        let mut stage = Stage::new();
        let (deaf, client, slow) = deaf_tcp();
        let (listener, address) = listen();
        Table::of(&mut stage.reactor, [slow, address]);
        let endpoint = there().attempt_delay(Duration::from_millis(asked));
        connect_with(&mut stage, endpoint);
        stage.settle();
        stage.clock.advance(Duration::from_millis(delay - 1));
        stage.settle();
        stage.assert_log(&["started"]);
        stage.clock.advance(Duration::from_millis(1));
        stage.settle();
        assert_connected(&stage, address);
        drop(listener.accept().unwrap());
        stage.run_until_stopped();
        drop((deaf, client, listener));
        stage.finish();
    }
}

/// A name server can name thousands: the loop has its turn all the same.
#[test]
fn many_addresses_that_fail_leave_others_their_turn() {
    let mut stage = Stage::new();
    let port = refused_address().port();
    let addresses = (1..=1_000_u16).map(|number| {
        let [high, low] = number.to_be_bytes();
        SocketAddr::from(([127, 1, high, low], port))
    });
    Table::of(&mut stage.reactor, addresses);
    let calls = Rc::new(Cell::new(0));
    let seen = Rc::clone(&calls);
    let periodic = stage.reactor.call_every(Duration::ZERO, move |_, _| {
        seen.set(seen.get() + 1);
    });
    let factory = Keeps::default();
    let reactor = &mut stage.reactor;
    reactor.connect_host(NAME, PORT, factory.clone()).unwrap();
    run_until(&mut stage.reactor, |_| factory.1.get());
    assert!(calls.get() >= 1_000 / 16, "{} turns", calls.get());
    let failed = factory
        .told()
        .unwrap()
        .matches("connection refused")
        .count();
    assert_eq!(failed, 1_000);
    periodic.stop(&mut stage.reactor);
    stage.finish();
}

/// Contract.
#[test]
fn a_lookup_is_told_once_and_never_inside_the_call() {
    let mut stage = Stage::new();
    let slow = Slow::default();
    stage.reactor.set_resolver(slow.clone());
    let told: Rc<RefCell<Vec<String>>> = Rc::default();
    let resolve = |stage: &mut Stage, host: &str| {
        let told = Rc::clone(&told);
        stage.reactor.resolve(host, PORT, move |_, result| {
            told.borrow_mut().push(format!("{result:?}"));
        })
    };
    // An address in writing in this turn, the empty name as an error.
    resolve(&mut stage, "192.0.2.1");
    resolve(&mut stage, "");
    assert!(told.borrow().is_empty() && slow.owed.borrow().is_empty());
    stage.reactor.turn(Some(Duration::ZERO));
    assert_eq!(told.borrow()[0], "Ok([192.0.2.1:7])");
    assert!(told.borrow()[1].contains("host name is empty"));
    assert!(slow.owed.borrow().is_empty());
    told.borrow_mut().clear();

    // 60 seconds, after which an answer is ignored.
    resolve(&mut stage, NAME);
    stage.settle();
    stage.clock.advance(Duration::from_millis(59_999));
    stage.settle();
    assert!(told.borrow().is_empty());
    stage.clock.advance(Duration::from_millis(1));
    stage.settle();
    assert_eq!(*told.borrow(), ["Err(TimedOut)"]);
    let late = slow.owed.borrow_mut().pop().unwrap();
    late.give(&mut stage.reactor, Ok(vec![refused_address()]));
    stage.settle();
    assert_eq!(told.borrow().len(), 1);

    // In time: no timer is left.
    resolve(&mut stage, NAME);
    stage.settle();
    let answer = slow.owed.borrow_mut().pop().unwrap();
    answer.give(&mut stage.reactor, Err(io::ErrorKind::NotFound.into()));
    assert_eq!(told.borrow().len(), 1, "told inside the answer");
    stage.settle();
    assert_eq!(told.borrow()[1], "Err(Failed(Kind(NotFound)))");
    assert_eq!(stage.reactor.delayed_calls().count(), 0);

    // Taken back: before it is asked for, and when the answer has just come.
    for gives in [false, true] {
        let lookup = resolve(&mut stage, NAME);
        if gives {
            stage.settle();
            let answer = slow.owed.borrow_mut().pop().unwrap();
            answer.give(&mut stage.reactor, Ok(vec![refused_address()]));
        }
        lookup.cancel(&mut stage.reactor);
        stage.settle();
        assert!(slow.owed.borrow().is_empty());
        assert_eq!(stage.reactor.delayed_calls().count(), 0);
    }
    assert_eq!(told.borrow().len(), 2);

    // A resolver that loses its answer: the time limit is told.
    resolve(&mut stage, NAME);
    stage.settle();
    slow.owed.borrow_mut().clear();
    stage.clock.advance(Duration::from_secs(60));
    stage.settle();
    assert_eq!(told.borrow()[2], "Err(TimedOut)");
    stage.finish();
}

/// Contract R-45: the system is asked off the loop.
#[test]
fn the_system_knows_this_machine() {
    // First of all: the file below is a descriptor that others would count.
    let ledger = DescriptorLedger::alone();
    let hosts = fs::read_to_string("/etc/hosts").unwrap_or_default();
    if !hosts.split_whitespace().any(|word| word == "localhost") {
        #[allow(clippy::print_stderr, reason = "a skipped test has to be seen")]
        {
            eprintln!("SKIPPED: the system was NOT asked, its hosts file has no localhost");
        }
        return;
    }
    let mut reactor = Reactor::new().unwrap();
    type Found = Option<Result<Vec<SocketAddr>, LookupError>>;
    let told: Rc<RefCell<Found>> = Rc::default();
    let seen = Rc::clone(&told);
    reactor.resolve("localhost", PORT, move |_, result| {
        *seen.borrow_mut() = Some(result);
    });
    run_until(&mut reactor, |_| told.borrow().is_some());
    let addresses = told.take().unwrap().unwrap();
    assert!(!addresses.is_empty());
    for address in addresses {
        assert!(address.ip().is_loopback());
        assert_eq!(address.port(), PORT);
    }
    assert_eq!(reactor.delayed_calls().count(), 0);
    stop(&mut reactor);
    drop(reactor);
    ledger.assert_balanced();
}

/// Contract: neither a lookup that hangs nor one that waits.
#[test]
fn lookups_do_not_hold_the_shutdown() {
    let ledger = DescriptorLedger::alone();
    let mut reactor = Reactor::new().unwrap();
    let pool = ThreadPool::new(
        ThreadPoolSettings::default()
            .max_threads(1)
            .at_shutdown(AtShutdown::Abandon),
    );
    let (hang_up, hangs) = std::sync::mpsc::channel::<()>();
    pool.call_in_thread(&mut reactor, move || hangs.recv(), |_, _| ());
    reactor.set_resolver(SystemResolver::with_pool(pool.clone()));
    let factory = Keeps::default();
    reactor.connect_host(NAME, PORT, factory.clone()).unwrap();
    run_until(&mut reactor, |_| pool.counts().queued == 1);
    reactor.call_soon(|reactor| reactor.stop().unwrap());
    reactor.run().unwrap();
    assert_eq!(
        factory.told().as_deref(),
        Some("reactor stopped while connecting")
    );
    assert_eq!(reactor.registered(), 0);
    drop(reactor);
    drop(hang_up);
    assert_no_pool_threads();
    ledger.assert_balanced();
}
