//! Connecting: the order of callbacks, every way to fail, and again.

use std::io;
use std::net::{SocketAddr, TcpListener as StdTcpListener, TcpStream as StdTcpStream};
use std::os::unix::net::{UnixListener as StdUnixListener, UnixStream as StdUnixStream};
use std::rc::Rc;
use std::time::Duration;

use bowline::lifecycle::{Phase, SystemEvent};
use bowline::testing::ManualClock;
use bowline::{Address, ConnectorHandle, ConnectorState, Reactor, Transports, UnixAddress};
use bowline::{Tcp, Unix};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use tempfile::TempDir;

use crate::harness::{Doorman, Log, abstract_name, logging_script, std_address, unix_address};
use crate::support::faults::{Call, with_faults};
use crate::support::{DEADLINE, DescriptorLedger, run_until, run_until_quiet};

/// A reactor whose clock stands still, and what is around it.
pub(crate) struct Stage {
    pub(crate) reactor: Reactor,
    pub(crate) clock: ManualClock,
    pub(crate) log: Log,
    ledger: DescriptorLedger,
}

impl Stage {
    pub(crate) fn new() -> Self {
        let ledger = DescriptorLedger::open();
        let clock = ManualClock::new();
        Self {
            reactor: Reactor::with_clock(clock.clone()).unwrap(),
            clock,
            log: Log::default(),
            ledger,
        }
    }

    pub(crate) fn settle(&mut self) {
        run_until_quiet(&mut self.reactor);
    }

    #[track_caller]
    pub(crate) fn assert_log(&self, expected: &[&str]) {
        assert_eq!(*self.log.borrow(), expected);
    }

    #[track_caller]
    pub(crate) fn run_until_stopped(&mut self) {
        let log = Rc::clone(&self.log);
        run_until(&mut self.reactor, |_| {
            log.borrow().last().is_some_and(|last| last == "stopped")
        });
        self.settle();
        assert_eq!(self.reactor.registered(), 0);
        assert_eq!(self.reactor.delayed_calls().count(), 0);
    }

    #[track_caller]
    pub(crate) fn finish(self) {
        drop(self.reactor);
        self.ledger.assert_balanced();
    }
}

/// An address at which nobody listens.
pub(crate) fn refused_address() -> SocketAddr {
    StdTcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
}

/// A TCP listener that answers nobody any more: its queue is full.
pub(crate) fn deaf_tcp() -> (StdTcpListener, StdTcpStream, SocketAddr) {
    let listener = StdTcpListener::bind("127.0.0.1:0").unwrap();
    rustix::net::listen(&listener, 0).unwrap();
    let address = listener.local_addr().unwrap();
    let client = StdTcpStream::connect(address).unwrap();
    // It is in the queue only when the listener has heard that its answer came.
    let mut polled = [PollFd::new(&listener, PollFlags::IN)];
    let patience = Timespec::try_from(DEADLINE).unwrap();
    assert_eq!(poll(&mut polled, Some(&patience)).unwrap(), 1);
    (listener, client, address)
}

/// A UNIX listener whose queue is full.
fn full_unix() -> (StdUnixListener, StdUnixStream, UnixAddress) {
    let address = UnixAddress::Abstract(abstract_name());
    let listener = StdUnixListener::bind_addr(&std_address(&address)).unwrap();
    rustix::net::listen(&listener, 0).unwrap();
    let client = StdUnixStream::connect_addr(&std_address(&address)).unwrap();
    (listener, client, address)
}

/// C-01, C-03, C-07, C-08, C-22, F-20, E-01.
#[test]
fn callbacks_come_in_order() {
    let mut stage = Stage::new();
    let listener = StdTcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let same = Rc::new(std::cell::RefCell::new(Vec::new()));
    let note = || {
        let same = Rc::clone(&same);
        move |connector: &dyn bowline::Connector| {
            let seen = (connector.handle(), connector.destination());
            same.borrow_mut().push(seen);
        }
    };
    let (at_start, at_build, at_end) = (note(), note(), note());
    let log = Rc::clone(&stage.log);
    let factory = Doorman::new(&stage.log)
        .started(move |cx| {
            let connector = cx.connector().unwrap();
            at_start(connector);
            assert_eq!(connector.state(), ConnectorState::Connecting);
            connector.connect();
        })
        .build(move |cx| {
            at_build(cx.connector().unwrap());
            Some(logging_script(&log))
        })
        .lost(move |cx| {
            let connector = cx.connector().unwrap();
            at_end(connector);
            assert_eq!(connector.state(), ConnectorState::Disconnected);
        });
    let handle = stage.reactor.connect_tcp(address, factory).unwrap();
    stage.assert_log(&[]);
    let log = Rc::clone(&stage.log);
    run_until(&mut stage.reactor, |_| log.borrow().len() == 3);
    stage.assert_log(&["started", "build", "made"]);
    let connector = stage.reactor.get(handle).unwrap();
    assert_eq!(connector.state(), ConnectorState::Connected);
    assert_eq!(connector.destination(), address.into());
    assert_eq!(connector.handle(), handle);
    // Neither means anything to one that is connected.
    connector.connect();
    connector.stop_connecting();
    stage.settle();
    drop(listener.accept().unwrap());
    stage.run_until_stopped();
    stage.assert_log(&[
        "started",
        "build",
        "made",
        "protocol lost: closed cleanly",
        "lost: closed cleanly",
        "stopped",
    ]);
    assert!(stage.reactor.get(handle).is_none());
    assert_eq!(*same.borrow(), vec![(handle, address.into()); 3]);
    drop(listener);
    stage.finish();
}

/// C-02, C-04, C-10, E-01.
#[test]
fn failures_are_told_from_the_loop_with_their_errno() {
    let mut stage = Stage::new();
    let address = refused_address();
    stage
        .reactor
        .connect_tcp(address, Doorman::new(&stage.log))
        .unwrap();
    stage.assert_log(&[]);
    stage.run_until_stopped();
    stage.assert_log(&["started", "failed: connection refused", "stopped"]);

    stage.log.borrow_mut().clear();
    let directory = TempDir::new().unwrap();
    stage
        .reactor
        .connect_unix(directory.path().join("nobody"), Doorman::new(&stage.log))
        .unwrap();
    stage.assert_log(&[]);
    stage.run_until_stopped();
    stage.assert_log(&["started", "failed: cannot connect", "stopped"]);

    stage.log.borrow_mut().clear();
    let stale = directory.path().join("stale");
    drop(StdUnixListener::bind(&stale).unwrap());
    stage
        .reactor
        .connect_unix(stale, Doorman::new(&stage.log))
        .unwrap();
    stage.run_until_stopped();
    stage.assert_log(&["started", "failed: connection refused", "stopped"]);
    drop(directory);
    stage.finish();
}

/// Contract C-04: each has its own kind, and its number.
#[test]
fn the_error_of_the_system_is_kept() {
    use bowline::{BuildContext, ConnectError, Factory};
    type Told = Rc<std::cell::RefCell<Option<(&'static str, Option<i32>)>>>;
    struct Keeps(Told);
    impl Factory for Keeps {
        type Protocol = crate::support::Recorder;

        fn build_protocol(
            &mut self,
            _: &mut BuildContext<'_>,
            _: &Address,
        ) -> Option<Self::Protocol> {
            None
        }

        fn connection_failed(&mut self, _: &mut BuildContext<'_>, error: &ConnectError) {
            let kind = match error {
                ConnectError::Refused(_) => "refused",
                ConnectError::Unreachable(_) => "unreachable",
                ConnectError::TimedOutByKernel(_) => "timed out",
                ConnectError::Bind(_) => "bind",
                ConnectError::Os(_) => "other",
                _ => "none of the system",
            };
            let number = error.as_os().and_then(io::Error::raw_os_error);
            *self.0.borrow_mut() = Some((kind, number));
        }
    }
    let name = "the_error_of_the_system_is_kept";
    with_faults(module_path!(), name, |faults| {
        let bound = ([127, 0, 0, 1], 0).into();
        let to = || Tcp::to(refused_address());
        for (call, error, endpoint, kind) in [
            // Of its own, at the first event.
            (None, Errno::CONNREFUSED, to(), "refused"),
            (Some(Call::Connect), Errno::NETUNREACH, to(), "unreachable"),
            (Some(Call::Connect), Errno::HOSTUNREACH, to(), "unreachable"),
            (Some(Call::Connect), Errno::TIMEDOUT, to(), "timed out"),
            (Some(Call::Connect), Errno::ACCESS, to(), "other"),
            (Some(Call::Socket), Errno::MFILE, to(), "other"),
            (
                Some(Call::Bind),
                Errno::ADDRINUSE,
                to().bind_address(bound),
                "bind",
            ),
        ] {
            let mut stage = Stage::new();
            let told = Told::default();
            let factory = Keeps(Rc::clone(&told));
            faults.reset();
            if let Some(call) = call {
                faults.fail(call, 0, 1, error);
            }
            faults.during(|| {
                stage.reactor.connect(endpoint, factory).unwrap();
                run_until(&mut stage.reactor, |_| told.borrow().is_some());
            });
            let told = told.take().unwrap();
            assert_eq!(told, (kind, Some(error.raw_os_error())), "{call:?}");
            stage.finish();
        }
    });
}

/// C-05.
#[test]
fn an_attempt_ends_at_its_timeout() {
    let mut stage = Stage::new();
    let (listener, client, address) = deaf_tcp();
    stage
        .reactor
        .connect_tcp(address, Doorman::new(&stage.log))
        .unwrap();
    stage.settle();
    stage.clock.advance(Duration::from_millis(29_999));
    stage.settle();
    stage.assert_log(&["started"]);
    stage.clock.advance(Duration::from_millis(1));
    stage.run_until_stopped();
    stage.assert_log(&[
        "started",
        "failed: connecting took longer than its timeout",
        "stopped",
    ]);
    drop((listener, client));
    stage.finish();
}

/// Contract C-05.
#[test]
fn no_timeout_means_none() {
    let mut stage = Stage::new();
    let (listener, client, address) = deaf_tcp();
    let handle = stage
        .reactor
        .connect(Tcp::to(address).timeout(None), Doorman::new(&stage.log))
        .unwrap();
    stage.settle();
    assert_eq!(stage.reactor.delayed_calls().count(), 0);
    stage.clock.advance(Duration::from_secs(1_000_000));
    stage.settle();
    stage.assert_log(&["started"]);
    stage.reactor.get(handle).unwrap().stop_connecting();
    stage.run_until_stopped();
    drop((listener, client));
    stage.finish();
}

/// C-17, W-51.
#[test]
fn a_full_unix_queue_is_tried_until_there_is_room() {
    let mut stage = Stage::new();
    let (listener, client, address) = full_unix();
    let handle = stage
        .reactor
        .connect_unix(address, Doorman::new(&stage.log))
        .unwrap();
    for _ in 0..50 {
        stage.reactor.turn(Some(Duration::ZERO));
        stage.clock.advance(Duration::from_millis(100));
    }
    stage.assert_log(&["started"]);
    assert_eq!(
        stage.reactor.get(handle).unwrap().state(),
        ConnectorState::Connecting
    );
    drop(listener.accept().unwrap());
    stage.clock.advance(Duration::from_millis(100));
    stage.settle();
    stage.assert_log(&["started", "build", "made"]);
    assert_eq!(stage.reactor.delayed_calls().count(), 0);
    drop(listener.accept().unwrap());
    stage.run_until_stopped();
    drop((listener, client));
    stage.finish();
}

/// C-17.
#[test]
fn a_full_unix_queue_is_tried_until_the_timeout() {
    let mut stage = Stage::new();
    let (listener, client, address) = full_unix();
    stage
        .reactor
        .connect(
            Unix::to(address).timeout(Duration::from_secs(2)),
            Doorman::new(&stage.log),
        )
        .unwrap();
    for _ in 0..20 {
        stage.settle();
        stage.assert_log(&["started"]);
        stage.clock.advance(Duration::from_millis(100));
    }
    stage.run_until_stopped();
    stage.assert_log(&[
        "started",
        "failed: connecting took longer than its timeout",
        "stopped",
    ]);
    drop((listener, client));
    stage.finish();
}

const CANCELLED: [&str; 3] = ["started", "failed: connecting was cancelled", "stopped"];

/// C-06, C-22, E-02.
#[test]
fn an_attempt_can_be_given_up_at_any_moment() {
    // Inside started.
    let mut stage = Stage::new();
    let listener = StdTcpListener::bind("127.0.0.1:0").unwrap();
    let factory = Doorman::new(&stage.log).started(|cx| cx.connector().unwrap().stop_connecting());
    let address = listener.local_addr().unwrap();
    stage.reactor.connect_tcp(address, factory).unwrap();
    stage.run_until_stopped();
    stage.assert_log(&CANCELLED);

    // While the kernel tries.
    stage.log.borrow_mut().clear();
    let (deaf, client, address) = deaf_tcp();
    let factory = Doorman::new(&stage.log);
    let handle = stage.reactor.connect_tcp(address, factory).unwrap();
    stage.settle();
    let connector = stage.reactor.get(handle).unwrap();
    connector.stop_connecting();
    connector.stop_connecting();
    stage.assert_log(&["started"]);
    stage.run_until_stopped();
    stage.assert_log(&CANCELLED);
    drop((deaf, client));

    // While it waits for room.
    stage.log.borrow_mut().clear();
    let (full, client, address) = full_unix();
    let factory = Doorman::new(&stage.log);
    let handle = stage.reactor.connect_unix(address, factory).unwrap();
    stage.settle();
    stage.reactor.get(handle).unwrap().stop_connecting();
    stage.run_until_stopped();
    stage.assert_log(&CANCELLED);
    drop((full, client));

    // When the connection is there and was not noticed yet.
    stage.log.borrow_mut().clear();
    let address = listener.local_addr().unwrap();
    let factory = Doorman::new(&stage.log);
    let handle = stage.reactor.connect_tcp(address, factory).unwrap();
    let log = Rc::clone(&stage.log);
    while log.borrow().is_empty() {
        stage.reactor.turn(Some(Duration::ZERO));
    }
    // Over the loopback it is there at once; the poller has not been asked again.
    let connector = stage.reactor.get(handle).unwrap();
    assert_eq!(connector.state(), ConnectorState::Connecting);
    let (mut peer, _) = listener.accept().unwrap();
    connector.stop_connecting();
    stage.run_until_stopped();
    stage.assert_log(&CANCELLED);
    assert_eq!(io::Read::read(&mut peer, &mut [0]).unwrap(), 0, "closed");
    drop((listener, peer));
    stage.finish();
}

/// Before the first turn nothing has begun: it is as if it had never been.
#[test]
fn an_attempt_can_be_given_up_before_it_begins() {
    let mut stage = Stage::new();
    let factory = Doorman::new(&stage.log);
    let handle = stage
        .reactor
        .connect_tcp(refused_address(), factory)
        .unwrap();
    stage.reactor.get(handle).unwrap().stop_connecting();
    stage.settle();
    assert_eq!(stage.reactor.registered(), 0);
    assert!(
        !stage
            .log
            .borrow()
            .iter()
            .any(|line| line.starts_with("failed: connection refused"))
    );
    stage.finish();
}

/// C-09.
#[test]
fn a_failed_attempt_can_be_followed_by_others() {
    let mut stage = Stage::new();
    let mut left = 2;
    let factory = Doorman::new(&stage.log).failed(move |cx| {
        let connector = cx.connector().unwrap();
        assert_eq!(connector.state(), ConnectorState::Disconnected);
        if left > 0 {
            left -= 1;
            connector.connect();
        }
    });
    stage
        .reactor
        .connect_tcp(refused_address(), factory)
        .unwrap();
    stage.run_until_stopped();
    let attempt = ["started", "failed: connection refused"];
    stage.assert_log(&[&attempt[..], &attempt, &attempt, &["stopped"]].concat());
    stage.finish();
}

const REFUSED: [&str; 2] = ["started", "failed: connection refused"];

/// A connector that was refused, and is to try again in five seconds.
fn waiting(stage: &mut Stage) -> ConnectorHandle {
    let factory = Doorman::new(&stage.log).failed(|cx| {
        let connector = cx.connector().unwrap();
        connector.connect_after(Duration::from_secs(5));
    });
    let address = refused_address();
    let handle = stage.reactor.connect_tcp(address, factory).unwrap();
    let log = Rc::clone(&stage.log);
    run_until(&mut stage.reactor, |_| log.borrow().len() == 2);
    stage.settle();
    stage.assert_log(&REFUSED);
    let connector = stage.reactor.get(handle).unwrap();
    assert_eq!(connector.state(), ConnectorState::Waiting);
    handle
}

/// C-18.
#[test]
fn another_attempt_can_come_after_a_delay() {
    let mut stage = Stage::new();
    let handle = waiting(&mut stage);
    stage.clock.advance(Duration::from_millis(4_999));
    stage.settle();
    stage.assert_log(&REFUSED);
    stage.clock.advance(Duration::from_millis(1));
    stage.settle();
    stage.assert_log(&[REFUSED, REFUSED].concat());
    // Neither the attempt nor the wait left a timer of another kind.
    assert_eq!(stage.reactor.delayed_calls().count(), 1);
    let connector = stage.reactor.get(handle).unwrap();
    assert_eq!(connector.state(), ConnectorState::Waiting);
    stage.finish();
}

/// C-20.
#[test]
fn a_wait_can_be_given_up() {
    let mut stage = Stage::new();
    let handle = waiting(&mut stage);
    stage.reactor.get(handle).unwrap().stop_connecting();
    stage.run_until_stopped();
    stage.assert_log(&["started", "failed: connection refused", "stopped"]);
    assert!(stage.reactor.get(handle).is_none());
    stage.finish();
}

#[test]
fn a_wait_can_be_cut_short_or_changed() {
    let mut stage = Stage::new();
    let handle = waiting(&mut stage);
    stage.reactor.get(handle).unwrap().connect();
    stage.settle();
    stage.assert_log(&[REFUSED, REFUSED].concat());
    let connector = stage.reactor.get(handle).unwrap();
    connector.stop_connecting();
    connector.connect_after(Duration::from_secs(9));
    stage.settle();
    stage.clock.advance(Duration::from_millis(8_999));
    stage.settle();
    stage.assert_log(&[REFUSED, REFUSED].concat());
    stage.clock.advance(Duration::from_millis(1));
    stage.settle();
    stage.assert_log(&[REFUSED; 3].concat());
    stage.finish();
}

#[test]
fn a_wait_ends_with_the_reactor() {
    let mut stage = Stage::new();
    waiting(&mut stage);
    stage.reactor.start().unwrap();
    stage.reactor.stop().unwrap();
    run_until(&mut stage.reactor, |reactor| !reactor.is_running());
    // The attempt that was to come did not begin.
    stage.assert_log(&["started", "failed: connection refused", "stopped"]);
    stage.finish();
}

/// Taken back after the callback that asked for it, and before it began: the
/// factory was left in the belief that there would be more.
#[test]
fn an_attempt_that_is_taken_back_is_the_last() {
    let mut stage = Stage::new();
    let factory = Doorman::new(&stage.log).failed(|cx| {
        cx.connector().unwrap().connect();
        let connector = cx.connector().unwrap().handle();
        cx.reactor.defer(move |reactor| {
            reactor.get(connector).unwrap().stop_connecting();
        });
    });
    let directory = TempDir::new().unwrap();
    let nobody = directory.path().join("nobody");
    stage.reactor.connect_unix(nobody, factory).unwrap();
    stage.run_until_stopped();
    stage.assert_log(&["started", "failed: cannot connect", "stopped"]);
    drop(directory);
    stage.finish();
}

/// C-09.
#[test]
fn a_lost_connection_can_be_followed_by_another() {
    let mut stage = Stage::new();
    let listener = StdTcpListener::bind("127.0.0.1:0").unwrap();
    let mut left = 1;
    let factory = Doorman::new(&stage.log).lost(move |cx| {
        if left > 0 {
            left -= 1;
            cx.connector().unwrap().connect();
        }
    });
    let address = listener.local_addr().unwrap();
    stage.reactor.connect_tcp(address, factory).unwrap();
    for connections in 1..=2 {
        let log = Rc::clone(&stage.log);
        run_until(&mut stage.reactor, |_| {
            log.borrow().iter().filter(|line| *line == "made").count() == connections
        });
        drop(listener.accept().unwrap());
    }
    stage.run_until_stopped();
    let connection = [
        "started",
        "build",
        "made",
        "protocol lost: closed cleanly",
        "lost: closed cleanly",
    ];
    stage.assert_log(&[&connection[..], &connection, &["stopped"]].concat());
    drop(listener);
    stage.finish();
}

/// C-11, E-03.
#[test]
fn a_factory_that_declines_closes_the_connection() {
    let mut stage = Stage::new();
    let listener = StdTcpListener::bind("127.0.0.1:0").unwrap();
    let factory = Doorman::new(&stage.log).build(|_| None);
    let address = listener.local_addr().unwrap();
    stage.reactor.connect_tcp(address, factory).unwrap();
    stage.run_until_stopped();
    stage.assert_log(&["started", "build", "lost: closed cleanly", "stopped"]);
    let (mut peer, _) = listener.accept().unwrap();
    assert_eq!(io::Read::read(&mut peer, &mut [0]).unwrap(), 0);
    drop((listener, peer));
    stage.finish();
}

/// Somebody waits to be told how it went, also when the factory has a bug. Contract E-03.
#[test]
fn a_factory_that_panics_is_told_of_the_end() {
    let mut stage = Stage::new();
    let listener = StdTcpListener::bind("127.0.0.1:0").unwrap();
    let factory = Doorman::new(&stage.log).build(|_| panic!("on purpose"));
    let address = listener.local_addr().unwrap();
    stage.reactor.connect_tcp(address, factory).unwrap();
    stage.run_until_stopped();
    stage.assert_log(&["started", "build", "lost: a callback panicked", "stopped"]);
    drop(listener);
    stage.finish();
}

#[test]
fn whatever_panics_the_factory_is_told_that_nothing_more_comes() {
    let mut stage = Stage::new();
    let factory = Doorman::new(&stage.log).started(|_| panic!("on purpose"));
    stage
        .reactor
        .connect_tcp(refused_address(), factory)
        .unwrap();
    stage.run_until_stopped();
    stage.assert_log(&["started", "stopped"]);

    stage.log.borrow_mut().clear();
    let factory = Doorman::new(&stage.log).failed(|_| panic!("on purpose"));
    stage
        .reactor
        .connect_tcp(refused_address(), factory)
        .unwrap();
    stage.run_until_stopped();
    stage.assert_log(&["started", "failed: connection refused", "stopped"]);
    stage.finish();
}

/// TCP connects a socket that sends to its own port to itself. Nobody is there, and
/// the port stays free for a server that is to come.
#[test]
fn a_socket_that_was_connected_to_itself_is_refused() {
    let mut stage = Stage::new();
    let address = refused_address();
    let factory = Doorman::new(&stage.log);
    stage
        .reactor
        .connect(Tcp::to(address).bind_address(address), factory)
        .unwrap();
    stage.run_until_stopped();
    stage.assert_log(&["started", "failed: connection refused", "stopped"]);
    // Of a close in order something stays for a minute.
    drop(StdTcpListener::bind(address).expect("the port is free"));
    stage.finish();
}

/// C-12.
#[test]
fn the_address_to_connect_from_is_honoured() {
    let mut stage = Stage::new();
    let listener = StdTcpListener::bind("127.0.0.1:0").unwrap();
    let hosts = Rc::new(std::cell::RefCell::new(Vec::new()));
    let seen = Rc::clone(&hosts);
    let build = move |log: &Log| {
        let seen = Rc::clone(&seen);
        logging_script(log).made(move |cx| seen.borrow_mut().push(cx.transport.host()))
    };
    let (log, builds) = (Rc::clone(&stage.log), build.clone());
    let factory = Doorman::new(&stage.log).build(move |_| Some(builds(&log)));
    let address = listener.local_addr().unwrap();
    stage
        .reactor
        .connect(
            Tcp::to(address).bind_address(([127, 0, 0, 3], 0).into()),
            factory,
        )
        .unwrap();
    run_until(&mut stage.reactor, |_| hosts.borrow().len() == 1);
    let (_, from) = listener.accept().unwrap();
    assert_eq!(from.ip().to_string(), "127.0.0.3");
    assert_eq!(hosts.borrow()[0], Address::Inet(from));
    stage.run_until_stopped();

    let directory = TempDir::new().unwrap();
    let name = UnixAddress::Abstract(abstract_name());
    let unix = StdUnixListener::bind_addr(&std_address(&name)).unwrap();
    let own = UnixAddress::Path(directory.path().join("client"));
    let (log, builds) = (Rc::clone(&stage.log), build);
    let factory = Doorman::new(&stage.log).build(move |_| Some(builds(&log)));
    stage
        .reactor
        .connect(Unix::to(name).bind_address(own.clone()), factory)
        .unwrap();
    run_until(&mut stage.reactor, |_| hosts.borrow().len() == 2);
    let (_, from) = unix.accept().unwrap();
    assert_eq!(unix_address(&from), own);
    assert_eq!(hosts.borrow()[1], Address::Unix(own));
    stage.run_until_stopped();
    drop((listener, unix, directory));
    stage.finish();
}

/// Contract C-04.
#[test]
fn an_address_that_cannot_be_bound_fails_the_attempt() {
    let mut stage = Stage::new();
    stage
        .reactor
        .connect(
            Tcp::to(refused_address()).bind_address(([192, 0, 2, 1], 0).into()),
            Doorman::new(&stage.log),
        )
        .unwrap();
    stage.run_until_stopped();
    stage.assert_log(&[
        "started",
        "failed: cannot bind the local address to connect from",
        "stopped",
    ]);
    stage.finish();
}

fn stop(stage: &mut Stage) {
    stage.reactor.stop().unwrap();
    run_until(&mut stage.reactor, |reactor| !reactor.is_running());
}

#[test]
fn the_reactor_stopping_fails_an_attempt() {
    let mut stage = Stage::new();
    let (listener, client, address) = deaf_tcp();
    // It asks for more, and does not get it.
    let factory = Doorman::new(&stage.log).failed(|cx| cx.connector().unwrap().connect());
    stage.reactor.start().unwrap();
    stage.reactor.connect_tcp(address, factory).unwrap();
    stage.settle();
    stop(&mut stage);
    stage.assert_log(&[
        "started",
        "failed: reactor stopped while connecting",
        "stopped",
    ]);
    drop((listener, client));
    stage.finish();
}

/// C-02: one failure for each attempt that was begun.
#[test]
fn an_attempt_that_was_asked_for_when_the_reactor_stops_does_not_fail() {
    for delay in [Duration::ZERO, Duration::from_secs(1)] {
        for is_unix in [false, true] {
            let mut stage = Stage::new();
            let factory = Doorman::new(&stage.log).failed(move |cx| {
                cx.connector().unwrap().connect_after(delay);
                cx.reactor.stop().unwrap();
            });
            stage.reactor.start().unwrap();
            let directory = TempDir::new().unwrap();
            let nobody = directory.path().join("nobody");
            let _: ConnectorHandle = match is_unix {
                true => stage.reactor.connect_unix(nobody, factory).unwrap(),
                false => stage
                    .reactor
                    .connect_tcp(refused_address(), factory)
                    .unwrap(),
            };
            run_until(&mut stage.reactor, |reactor| !reactor.is_running());
            let log = stage.log.take();
            let count = |what: &str| log.iter().filter(|it| it.starts_with(what)).count();
            // One that is asked for without a delay may begin still, and fails then.
            assert!(delay.is_zero() || count("started") == 1, "{log:?}");
            assert_eq!(count("failed"), count("started"), "{log:?}");
            assert_eq!((&*log[0], &*log[log.len() - 1]), ("started", "stopped"));
            drop(directory);
            stage.finish();
        }
    }
}

/// C-02: who asked for it is told all the same, in order.
#[test]
fn the_first_attempt_is_told_of_a_reactor_that_stops_before_it_begins() {
    let mut stage = Stage::new();
    let factory = Doorman::new(&stage.log);
    let address = refused_address();
    stage.reactor.start().unwrap();
    // In the shutdown, so that no turn comes in between.
    let (phase, event) = (Phase::Before, SystemEvent::Shutdown);
    stage.reactor.add_trigger(phase, event, move |reactor| {
        let _: ConnectorHandle = reactor.connect_tcp(address, factory).unwrap();
    });
    stage.reactor.stop().unwrap();
    run_until(&mut stage.reactor, |reactor| !reactor.is_running());
    let log = stage.log.take();
    assert_eq!(log.first().map(String::as_str), Some("started"), "{log:?}");
    assert_eq!(log.last().map(String::as_str), Some("stopped"), "{log:?}");
    assert_eq!(log.len(), 3, "{log:?}");
    stage.finish();
}

/// F-20: first the protocol, then the factory, at the shutdown too.
#[test]
fn the_reactor_stopping_tells_the_protocol_before_the_factory() {
    let mut stage = Stage::new();
    let listener = StdTcpListener::bind("127.0.0.1:0").unwrap();
    let factory = Doorman::new(&stage.log).lost(|cx| cx.connector().unwrap().connect());
    stage.reactor.start().unwrap();
    let address = listener.local_addr().unwrap();
    let _: ConnectorHandle = stage.reactor.connect_tcp(address, factory).unwrap();
    let log = Rc::clone(&stage.log);
    run_until(&mut stage.reactor, |_| log.borrow().len() == 3);
    stop(&mut stage);
    stage.assert_log(&[
        "started",
        "build",
        "made",
        "protocol lost: reactor stopped",
        "lost: reactor stopped",
        "stopped",
    ]);
    drop(listener);
    stage.finish();
}
