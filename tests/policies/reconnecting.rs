//! Connecting again (C-18 to C-21, G-11, W-52).

use std::cell::RefCell;
use std::net::TcpListener;
use std::os::unix::net::{UnixListener as StdUnixListener, UnixStream as StdUnixStream};
use std::path::PathBuf;
use std::rc::Rc;
use std::time::{Duration, Instant};

use bowline::policies::{Backoff, Jitter, Reconnecting, Reconnection};
use bowline::testing::ManualClock;
use bowline::{
    Address, BuildContext, CloseReason, ConnectError, ConnectorHandle, ConnectorState, Context,
    Factory, Protocol, Reactor, Transport, Transports,
};
use tempfile::TempDir;

use crate::support::{DescriptorLedger, Record, Recorder, run_until, run_until_quiet};
use crate::{capture, seconds};

type Log = Rc<RefCell<Vec<String>>>;

/// Notes what happens and when, in seconds.
struct Client {
    began: Instant,
    log: Log,
    record: Record,
}

impl Client {
    fn note(&self, cx: &BuildContext<'_>, what: &str) {
        let at = cx.reactor.now() - self.began;
        let line = format!("{} {what}", (at.as_secs_f64() * 1000.0).round() / 1000.0);
        self.log.borrow_mut().push(line);
    }
}

impl Factory for Client {
    type Protocol = Recorder;

    fn build_protocol(&mut self, cx: &mut BuildContext<'_>, _: &Address) -> Option<Recorder> {
        self.note(cx, "build");
        Some(Recorder::new(&self.record))
    }
    fn started(&mut self, cx: &mut BuildContext<'_>) {
        self.note(cx, "started");
    }
    fn stopped(&mut self, cx: &mut BuildContext<'_>) {
        self.note(cx, "stopped");
    }
    fn connection_failed(&mut self, cx: &mut BuildContext<'_>, error: &ConnectError) {
        if matches!(
            error,
            ConnectError::Cancelled | ConnectError::ReactorStopped
        ) {
            self.note(cx, &error.to_string());
        }
    }
    fn connection_lost(&mut self, cx: &mut BuildContext<'_>, _: &CloseReason) {
        self.note(cx, "lost");
    }
}

/// A client of a server that is there, or not.
struct Stage {
    reactor: Reactor,
    clock: ManualClock,
    log: Log,
    record: Record,
    path: PathBuf,
    server: Option<StdUnixListener>,
    reconnection: Option<Reconnection>,
    connector: Option<ConnectorHandle>,
    _directory: TempDir,
    ledger: DescriptorLedger,
}

impl Stage {
    fn new(settings: impl FnOnce(Reconnecting<Client>) -> Reconnecting<Client>) -> Self {
        let mut stage = Self::without_client();
        stage.connect(settings);
        stage
    }

    fn with_server(settings: impl FnOnce(Reconnecting<Client>) -> Reconnecting<Client>) -> Self {
        let mut stage = Self::without_client();
        stage.serve();
        stage.connect(settings);
        stage
    }

    fn without_client() -> Self {
        let ledger = DescriptorLedger::open();
        capture::start();
        let clock = ManualClock::new();
        let directory = TempDir::new().unwrap();
        Self {
            reactor: Reactor::with_clock(clock.clone()).unwrap(),
            clock,
            log: Log::default(),
            record: Record::default(),
            path: directory.path().join("server"),
            server: None,
            reconnection: None,
            connector: None,
            _directory: directory,
            ledger,
        }
    }

    fn connect(&mut self, settings: impl FnOnce(Reconnecting<Client>) -> Reconnecting<Client>) {
        let client = Client {
            began: self.reactor.now(),
            log: Rc::clone(&self.log),
            record: self.record.clone(),
        };
        let backoff = Backoff::new().jitter(Jitter::None).cap(seconds(5.0));
        let factory = settings(Reconnecting::new(client).backoff(backoff));
        self.reconnection = Some(factory.reconnection());
        let path = self.path.clone();
        self.connector = Some(self.reactor.connect_unix(path, factory).unwrap());
        run_until_quiet(&mut self.reactor);
    }

    fn serve(&mut self) {
        self.server = Some(StdUnixListener::bind(&self.path).unwrap());
    }

    fn accept(&mut self) -> StdUnixStream {
        let server = self.server.as_ref().expect("it serves");
        let (client, _) = server.accept().unwrap();
        run_until_quiet(&mut self.reactor);
        client
    }

    fn advance(&mut self, by: f64) {
        self.clock.advance(seconds(by));
        run_until_quiet(&mut self.reactor);
    }

    fn reins(&self) -> Reconnection {
        self.reconnection.clone().expect("it connects")
    }

    fn stop_trying(&mut self) {
        self.reins().stop_trying(&mut self.reactor);
        run_until_quiet(&mut self.reactor);
    }

    #[track_caller]
    fn assert_log(&self, expected: &[&str]) {
        assert_eq!(self.log.take(), expected);
    }

    #[track_caller]
    fn assert_over(self) {
        assert_eq!(self.reactor.delayed_calls().count(), 0);
        assert_eq!(self.reactor.registered(), 0);
        drop((self.reactor, self.server));
        self.ledger.assert_balanced();
    }
}

/// R-47, C-18, G-11, W-52: the first wait is the first, and none passes the cap.
#[test]
fn waits_grow_from_the_first_to_the_cap() {
    let mut stage = Stage::new(|it| it);
    for _ in 0..17 {
        stage.advance(1.0);
    }
    stage.assert_log(&[
        "0 started",
        "1 started",
        "3 started",
        "7 started",
        "12 started",
        "17 started",
    ]);
    assert_eq!(stage.reins().retries(), 6);
    let lines = capture::lines("will retry in");
    assert_eq!(lines.len(), 6);
    assert!(
        lines[2].starts_with("DEBUG: ")
            && lines[2].ends_with("server: will retry in 4.000 seconds")
    );
    stage.stop_trying();
    stage.assert_over();
}

/// W-52, C-18: with jitter, the waits of a seed are below their bounds, and spread.
#[test]
fn jitter_stays_below_the_bounds() {
    let mut stage = Stage::new(|it| it.backoff(Backoff::new().seed(4).cap(seconds(8.0))));
    for _ in 0..600 {
        stage.clock.advance(Duration::from_millis(100));
        stage.reactor.turn(Some(Duration::ZERO));
        stage.reactor.turn(Some(Duration::ZERO));
    }
    let log = stage.log.take();
    let times: Vec<f64> = log
        .iter()
        .map(|line| line.split(' ').next().unwrap().parse().unwrap())
        .collect();
    // What is due between two steps of the clock runs at the second.
    let mut shares = Vec::new();
    for (index, pair) in times.windows(2).enumerate() {
        let (wait, bound) = (pair[1] - pair[0], f64::from(1 << index.min(3)));
        assert!(wait <= bound + 0.2, "{times:?}");
        shares.push(wait / bound);
    }
    assert!(times.len() > 9, "{times:?}");
    // All of the way up to the bound, and not a little at its end.
    let below = |share: f64| shares.iter().filter(|it| **it < share).count();
    assert!(below(0.3) > 0, "no wait is short: {shares:?}");
    assert!(below(0.7) < shares.len(), "no wait is long: {shares:?}");
    stage.stop_trying();
    stage.assert_over();
}

/// C-19, G-11.
#[test]
fn it_gives_up_after_so_many_retries() {
    let mut stage = Stage::new(|it| it.max_retries(Some(2)));
    stage.advance(1.0);
    assert!(stage.reins().is_trying());
    stage.advance(2.0);
    stage.assert_log(&["0 started", "1 started", "3 started", "3 stopped"]);
    assert!(!stage.reins().is_trying());
    let lines = capture::lines("abandoned");
    assert_eq!(lines.len(), 1);
    assert!(lines[0].starts_with("WARN: ") && lines[0].ends_with("abandoned after 2 retries"));
    stage.assert_over();
}

/// C-20, G-11.
#[test]
fn stopping_ends_the_wait() {
    let mut stage = Stage::new(|it| it);
    let connector = stage.connector.unwrap();
    let state = stage.reactor.get(connector).unwrap().state();
    assert_eq!(state, ConnectorState::Waiting);
    stage.stop_trying();
    stage.assert_log(&["0 started", "0 stopped"]);
    assert_eq!(capture::lines("abandoned on request").len(), 1);
    stage.assert_over();
}

/// C-20: the same, asked of the connector.
#[test]
fn stopping_the_connector_in_its_wait_ends_it() {
    let mut stage = Stage::new(|it| it);
    let connector = stage.connector.unwrap();
    stage.reactor.get(connector).unwrap().stop_connecting();
    run_until_quiet(&mut stage.reactor);
    stage.assert_log(&["0 started", "0 stopped"]);
    assert!(!stage.reins().is_trying());
    assert_eq!(capture::lines("abandoned on request").len(), 1);
    stage.assert_over();
}

/// C-20.
#[test]
fn stopping_gives_up_the_attempt() {
    let mut stage = Stage::without_client();
    stage.serve();
    // A full queue: the attempt goes on and on.
    rustix::net::listen(stage.server.as_ref().unwrap(), 0).unwrap();
    let first = StdUnixStream::connect(&stage.path).unwrap();
    stage.connect(|it| it);
    stage.stop_trying();
    let cancelled = format!("0 {}", ConnectError::Cancelled);
    stage.assert_log(&["0 started", &cancelled, "0 stopped"]);
    drop(first);
    stage.assert_over();
}

/// C-20: upstream's #4846.
#[test]
fn stopping_keeps_the_connection_and_nothing_follows_it() {
    let mut stage = Stage::with_server(|it| it);
    let peer = stage.accept();
    stage.stop_trying();
    stage.advance(100.0);
    stage.assert_log(&["0 started", "0 build"]);
    assert!(!stage.record.is_lost());
    drop(peer);
    let record = stage.record.clone();
    run_until(&mut stage.reactor, |_| record.is_lost());
    stage.advance(100.0);
    stage.assert_log(&["100 lost", "100 stopped"]);
    stage.assert_over();
}

/// C-21: after a connection that lasted, the waits begin anew; after others
/// they go on.
#[test]
fn a_connection_that_lasted_resets_the_waits() {
    let mut stage = Stage::with_server(|it| it.settled_after(seconds(10.0)));
    for expected in [1.0, 2.0, 4.0] {
        drop(stage.accept());
        run_until_quiet(&mut stage.reactor);
        stage.log.take();
        stage.advance(expected - 0.001);
        stage.assert_log(&[]);
        stage.advance(0.001);
        assert_eq!(stage.log.borrow().len(), 2, "started, built");
    }
    let peer = stage.accept();
    stage.advance(10.0);
    drop(peer);
    run_until_quiet(&mut stage.reactor);
    stage.log.take();
    stage.advance(0.999);
    stage.assert_log(&[]);
    stage.advance(0.001);
    stage.assert_log(&["18 started", "18 build"]);
    stage.stop_trying();
    drop(stage.accept());
    run_until_quiet(&mut stage.reactor);
    stage.assert_over();
}

/// C-21, W-52: a reset neither forgets the timer nor undoes a stop.
#[test]
fn reset_restores_the_delay_and_nothing_else() {
    let mut stage = Stage::new(|it| it);
    stage.advance(1.0);
    stage.advance(1.0);
    stage.reins().reset_delay();
    assert_eq!(stage.reins().retries(), 0);
    stage.advance(1.0);
    stage.advance(1.0);
    stage.assert_log(&["0 started", "1 started", "3 started", "4 started"]);
    stage.stop_trying();
    stage.reins().reset_delay();
    stage.advance(100.0);
    stage.assert_log(&["4 stopped"]);
    stage.assert_over();
}

#[test]
fn the_end_of_the_reactor_is_the_end() {
    for with_server in [false, true] {
        let mut stage = Stage::without_client();
        if with_server {
            stage.serve();
        }
        stage.reactor.start().unwrap();
        stage.connect(|it| it);
        stage.reactor.stop().unwrap();
        run_until(&mut stage.reactor, |reactor| !reactor.is_running());
        assert_eq!(stage.log.borrow().last().unwrap(), "0 stopped");
        assert!(capture::lines("abandoned").is_empty());
        stage.assert_over();
    }
}

/// A factory that does something each time that it is told of the end of an attempt
/// or a connection.
struct Hooked {
    log: Log,
    on_failed: fn(&mut BuildContext<'_>),
    on_lost: fn(&mut BuildContext<'_>),
}

impl Factory for Hooked {
    type Protocol = Leaves;

    fn build_protocol(&mut self, _: &mut BuildContext<'_>, _: &Address) -> Option<Leaves> {
        Some(Leaves)
    }

    fn started(&mut self, _: &mut BuildContext<'_>) {
        self.log.borrow_mut().push("started".into());
    }

    fn connection_failed(&mut self, cx: &mut BuildContext<'_>, _: &ConnectError) {
        self.log.borrow_mut().push("failed".into());
        (self.on_failed)(cx);
    }

    fn connection_lost(&mut self, cx: &mut BuildContext<'_>, _: &CloseReason) {
        self.log.borrow_mut().push("lost".into());
        (self.on_lost)(cx);
    }

    fn stopped(&mut self, _: &mut BuildContext<'_>) {
        self.log.borrow_mut().push("stopped".into());
    }
}

/// A protocol that hangs up at once.
struct Leaves;

impl<T: Transport> Protocol<T> for Leaves {
    fn connection_made(&mut self, cx: &mut Context<'_, T>) {
        cx.transport.lose_connection();
    }

    fn data_received(&mut self, _: &mut Context<'_, T>, _: &[u8]) {}
}

/// The ways to connect, to somebody or to nobody.
#[derive(Clone, Copy, Debug)]
enum Way {
    Unix,
    Tcp,
    Host,
}

/// What a client hears that connects again at once, until it is stopped: the rest is
/// the factory's.
fn heard(way: Way, is_served: bool, hooks: [fn(&mut BuildContext<'_>); 2]) -> Vec<String> {
    let ledger = DescriptorLedger::open();
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("server");
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = tcp.local_addr().unwrap();
    let unix = is_served.then(|| StdUnixListener::bind(&path).unwrap());
    let tcp = is_served.then_some(tcp);
    let mut reactor = Reactor::new().unwrap();
    reactor.start().unwrap();
    let log = Log::default();
    let [on_failed, on_lost] = hooks;
    let hooked = Hooked {
        log: Rc::clone(&log),
        on_failed,
        on_lost,
    };
    let factory = Reconnecting::new(hooked).backoff(Backoff::new().first(Duration::ZERO));
    match way {
        Way::Unix => reactor.connect_unix(path, factory),
        Way::Tcp => reactor.connect_tcp(address, factory),
        Way::Host => reactor.connect_host("127.0.0.1", address.port(), factory),
    }
    .unwrap();
    // Two attempts more than there may be, should it go on.
    run_until(&mut reactor, |_| {
        let log = log.borrow();
        log.iter().any(|line| line == "stopped") || log.len() >= 6
    });
    drop((reactor, tcp, unix, directory));
    ledger.assert_balanced();
    log.take()
}

/// C-20: wherever no connection is there.
#[test]
fn stopping_the_connector_in_the_inner_factory_ends_it() {
    let stop: fn(&mut BuildContext<'_>) = |cx| cx.connector().unwrap().stop_connecting();
    let asks_first: fn(&mut BuildContext<'_>) = |cx| {
        cx.connector().unwrap().connect();
        cx.connector().unwrap().stop_connecting();
    };
    let nothing: fn(&mut BuildContext<'_>) = |_| {};
    for way in [Way::Unix, Way::Tcp, Way::Host] {
        for stop in [stop, asks_first] {
            let failed = heard(way, false, [stop, nothing]);
            assert_eq!(failed, ["started", "failed", "stopped"], "{way:?}");
            let lost = heard(way, true, [nothing, stop]);
            assert_eq!(lost, ["started", "lost", "stopped"], "{way:?}");
        }
        // The last word counts.
        let twice = heard(
            way,
            false,
            [
                |cx| {
                    cx.connector().unwrap().stop_connecting();
                    cx.connector().unwrap().connect();
                },
                nothing,
            ],
        );
        assert_eq!(twice[..3], ["started", "failed", "started"], "{way:?}");
    }
}

/// C-02: the attempt that was to come never began.
#[test]
fn stopping_the_reactor_in_the_inner_factory_fails_no_attempt_more() {
    // It may be stopping already.
    let stop: fn(&mut BuildContext<'_>) = |cx| cx.reactor.stop().unwrap_or_default();
    let nothing: fn(&mut BuildContext<'_>) = |_| {};
    for way in [Way::Unix, Way::Tcp, Way::Host] {
        let failed = heard(way, false, [stop, nothing]);
        let count = |what: &str| failed.iter().filter(|it| *it == what).count();
        // The next one may begin still, and fails then.
        assert_eq!(count("failed"), count("started"), "{way:?}: {failed:?}");
        assert_eq!(failed.last().unwrap(), "stopped", "{way:?}");
        let lost = heard(way, true, [nothing, stop]);
        let count = |what: &str| lost.iter().filter(|it| *it == what).count();
        assert_eq!(
            count("lost") + count("failed"),
            count("started"),
            "{lost:?}"
        );
        assert_eq!(lost.last().unwrap(), "stopped", "{way:?}");
    }
}
