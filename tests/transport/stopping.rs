//! Graceful stops of listeners and connectors, and of those who serve through
//! others.

use std::cell::{Cell, RefCell};
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener as StdTcpListener, TcpStream as StdTcpStream};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::rc::Rc;
use std::time::Duration;

use bowline::Tcp;
use bowline::framing::{FrameContext, FrameReceiver, Framed, LineFramer};
use bowline::policies::{Backoff, Jitter, Reconnecting};
use bowline::{Address, GracefulStop, ListenerHandle, Reactor, Transport, Transports, Turn};

use crate::connectors::{Stage, deaf_tcp};
use crate::harness::{Doorman, Log, Script, logging_script};
use crate::support::{DescriptorLedger, run_until, run_until_quiet, socketpair};

/// Longer than anything here takes, shorter than the default.
const GRACE: Duration = Duration::from_millis(20);

fn stop(reactor: &mut Reactor) {
    reactor.start().unwrap();
    let how = GracefulStop::new().grace(GRACE);
    reactor.stop_gracefully(how).unwrap();
}

fn echo() -> Script {
    Script::new().data(|cx, data| {
        let _ = cx.transport.write(data);
    })
}

fn ask(client: &mut (impl Read + Write)) {
    let mut answer = [0; 4];
    client.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"ping");
    assert_eq!(client.read(&mut answer).unwrap(), 0, "its end");
}

fn tcp_address(reactor: &mut Reactor, listener: ListenerHandle) -> std::net::SocketAddr {
    let address = reactor.get(listener).unwrap().address();
    address.as_inet().unwrap()
}

/// They have connected, for all that they know, and have sent a request.
#[test]
fn who_waits_in_the_queue_is_served_and_nobody_after_that_is_accepted() {
    let ledger = DescriptorLedger::open();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let built = Rc::new(Cell::new(0));
    let counted = Rc::clone(&built);
    let factory = move |_: &Address| {
        counted.set(counted.get() + 1);
        echo()
    };
    let mut reactor = Reactor::new().unwrap();
    let any = ([127, 0, 0, 1], 0).into();
    let tcp = reactor.listen_tcp(any, factory.clone()).unwrap();
    reactor.listen_unix(&path, factory).unwrap();
    let address = tcp_address(&mut reactor, tcp);
    let came = Rc::new(Cell::new(None));
    let (late, place) = (Rc::clone(&came), path.clone());
    // So late in the turn that no event tells of them.
    reactor.call_soon(move |reactor| {
        reactor.defer(move |_| {
            let mut tcp: Vec<_> = (0..100)
                .map(|_| StdTcpStream::connect(address).unwrap())
                .collect();
            let mut unix: Vec<_> = (0..100)
                .map(|_| StdUnixStream::connect(&place).unwrap())
                .collect();
            tcp.iter_mut().for_each(|it| it.write_all(b"ping").unwrap());
            unix.iter_mut()
                .for_each(|it| it.write_all(b"ping").unwrap());
            late.set(Some((tcp, unix)));
        });
    });
    stop(&mut reactor);
    run_until(&mut reactor, |_| built.get() == 200);
    run_until_quiet(&mut reactor);
    let refused = StdTcpStream::connect(address).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
    assert!(StdUnixStream::connect(&path).is_err() && !path.exists());
    run_until(&mut reactor, |reactor| !reactor.is_running());
    let (mut clients, mut unix) = came.take().expect("they have connected");
    clients.iter_mut().for_each(ask);
    unix.iter_mut().for_each(ask);
    assert_eq!(reactor.statistics().cut, 0);
    drop((reactor, clients, unix, directory));
    ledger.assert_balanced();
}

/// Another process accepts them.
#[test]
fn who_waits_in_a_shared_queue_is_left_to_the_others() {
    let ledger = DescriptorLedger::open();
    let log = Log::default();
    for is_adopted in [false, true] {
        let mut reactor = Reactor::new().unwrap();
        let (others, address) = if is_adopted {
            let listener = StdTcpListener::bind("127.0.0.1:0").unwrap();
            let copy = listener.try_clone().unwrap().into();
            reactor
                .listen(Tcp::listening(copy), Doorman::new(&log))
                .unwrap();
            let address = listener.local_addr().unwrap();
            (listener, address)
        } else {
            let listener = reactor
                .listen_tcp(([127, 0, 0, 1], 0).into(), Doorman::new(&log))
                .unwrap();
            let copy = reactor.get(listener).unwrap().duplicate().unwrap();
            let address = tcp_address(&mut reactor, listener);
            (StdTcpListener::from(copy), address)
        };
        let client = Rc::new(Cell::new(None));
        let late = Rc::clone(&client);
        // So late in the turn that no event tells of it.
        reactor.call_soon(move |reactor| {
            reactor.defer(move |_| late.set(Some(StdTcpStream::connect(address).unwrap())));
        });
        stop(&mut reactor);
        assert_eq!(reactor.turn(Some(Duration::ZERO)), Turn::Stopped);
        assert_eq!(log.take(), ["started", "stopped"]);
        others.set_nonblocking(false).unwrap();
        let (_, peer) = others.accept().unwrap();
        let client = client.take().expect("it has connected");
        assert_eq!(peer, client.local_addr().unwrap());
    }
    ledger.assert_balanced();
}

/// None of the others does.
#[test]
fn who_waits_in_a_queue_that_is_to_be_served_is_accepted_though_others_have_it() {
    let ledger = DescriptorLedger::open();
    for is_adopted in [false, true] {
        let built = Rc::new(Cell::new(0));
        let counted = Rc::clone(&built);
        let factory = move |_: &Address| {
            counted.set(counted.get() + 1);
            echo()
        };
        let mut reactor = Reactor::new().unwrap();
        let bound = StdTcpListener::bind("127.0.0.1:0").unwrap();
        let listener = match is_adopted {
            true => {
                let copy = bound.try_clone().unwrap().into();
                reactor.listen(Tcp::listening(copy), factory).unwrap()
            }
            false => {
                let any = ([127, 0, 0, 1], 0).into();
                reactor.listen_tcp(any, factory).unwrap()
            }
        };
        let address = tcp_address(&mut reactor, listener);
        let transport = reactor.get(listener).unwrap();
        let other = transport.duplicate().unwrap();
        transport.serve_queue_at_stop();
        let mut client = StdTcpStream::connect(address).unwrap();
        client.write_all(b"ping").unwrap();
        stop(&mut reactor);
        run_until(&mut reactor, |reactor| !reactor.is_running());
        assert_eq!(built.get(), 1, "adopted: {is_adopted}");
        ask(&mut client);
        drop(other);
    }
    ledger.assert_balanced();
}

#[test]
fn who_waits_for_a_listener_that_is_paused_or_held_is_not_accepted() {
    let ledger = DescriptorLedger::open();
    for is_held in [false, true] {
        let log = Log::default();
        let mut reactor = Reactor::new().unwrap();
        let listener = reactor
            .listen_tcp(([127, 0, 0, 1], 0).into(), Doorman::new(&log))
            .unwrap();
        let address = tcp_address(&mut reactor, listener);
        let listener = reactor.get(listener).unwrap();
        match is_held {
            true => listener.hold_accepting(),
            false => listener.pause_accepting(),
        }
        let mut client = StdTcpStream::connect(address).unwrap();
        stop(&mut reactor);
        assert_eq!(reactor.turn(Some(Duration::ZERO)), Turn::Stopped);
        assert_eq!(log.take(), ["started", "stopped"]);
        let told = client.read(&mut [0]).unwrap_err();
        assert_eq!(told.kind(), ErrorKind::ConnectionReset);
    }
    ledger.assert_balanced();
}

/// A request in work asks a back end, over a connection of ours.
#[test]
fn outgoing_connections_are_told_when_the_accepted_have_ended() {
    let mut stage = Stage::new();
    let back_end = StdTcpListener::bind("127.0.0.1:0").unwrap();
    let log = Rc::clone(&stage.log);
    let build = move |who: &'static str| {
        let (told, lost) = (Rc::clone(&log), Rc::clone(&log));
        Script::new()
            .drain(move |_| {
                told.borrow_mut().push(format!("{who} told"));
                bowline::AtDrain::LoseWhenIdle
            })
            .lost(move |_, reason| lost.borrow_mut().push(format!("{who}: {reason}")))
    };
    let is_busy = Rc::new(Cell::new(true));
    let (ours, theirs) = socketpair();
    let front = build("front").busy(&is_busy);
    stage.reactor.adopt_unix_stream(ours.into(), front).unwrap();
    let address = back_end.local_addr().unwrap();
    let back = move |_: &Address| build("back");
    stage.reactor.connect_tcp(address, back).unwrap();
    stage.settle();
    let (server, _) = back_end.accept().unwrap();
    stop(&mut stage.reactor);
    for _ in 0..3 {
        stage.settle();
        stage.clock.advance(GRACE);
    }
    stage.assert_log(&["front told"]);
    is_busy.set(false);
    stage.settle();
    // It is quiet from now on.
    stage.assert_log(&["front told"]);
    stage.clock.advance(GRACE);
    stage.settle();
    let done = "front: closed cleanly";
    stage.assert_log(&["front told", done, "back told"]);
    stage.clock.advance(GRACE);
    stage.settle();
    stage.assert_log(&["front told", done, "back told", "back: closed cleanly"]);
    assert!(!stage.reactor.is_running());
    drop((server, theirs, back_end));
    stage.finish();
}

/// One that had to be made for an accepted connection is made.
#[test]
fn attempts_go_on_until_the_accepted_have_ended_and_then_fail() {
    let mut stage = Stage::new();
    let (listener, client, address) = deaf_tcp();
    let is_busy = Rc::new(Cell::new(true));
    let (ours, theirs) = socketpair();
    let front = Script::new().busy(&is_busy);
    stage.reactor.adopt_unix_stream(ours.into(), front).unwrap();
    stage
        .reactor
        .connect_tcp(address, Doorman::new(&stage.log))
        .unwrap();
    let made = StdTcpListener::bind("127.0.0.1:0").unwrap();
    stop(&mut stage.reactor);
    stage.settle();
    let late = Doorman::new(&Log::default());
    let connector = stage
        .reactor
        .connect_tcp(made.local_addr().unwrap(), late)
        .unwrap();
    run_until(&mut stage.reactor, |reactor| {
        let state = reactor.get(connector).map(|it| it.state());
        state == Some(bowline::ConnectorState::Connected)
    });
    let (server, _) = made.accept().unwrap();
    stage.assert_log(&["started"]);
    is_busy.set(false);
    for _ in 0..4 {
        stage.settle();
        stage.clock.advance(GRACE);
    }
    stage.settle();
    assert!(!stage.reactor.is_running());
    let told = [
        "started",
        "failed: reactor stopped while connecting",
        "stopped",
    ];
    stage.assert_log(&told);
    drop((server, made, listener, client, theirs));
    stage.finish();
}

/// Nothing connects again what the stop has closed.
#[test]
fn a_policy_that_reconnects_lets_it_end() {
    let mut stage = Stage::new();
    let server = StdTcpListener::bind("127.0.0.1:0").unwrap();
    let backoff = Backoff::new().first(Duration::ZERO).jitter(Jitter::None);
    let factory = Reconnecting::new(Doorman::new(&stage.log)).backoff(backoff);
    let address = server.local_addr().unwrap();
    stage.reactor.connect_tcp(address, factory).unwrap();
    stage.settle();
    let (first, _) = server.accept().unwrap();
    stop(&mut stage.reactor);
    stage.settle();
    stage.clock.advance(GRACE);
    stage.settle();
    assert!(!stage.reactor.is_running());
    stage.assert_log(&[
        "started",
        "build",
        "made",
        "protocol lost: closed cleanly",
        "lost: closed cleanly",
        "stopped",
    ]);
    server.set_nonblocking(true).unwrap();
    let nobody = server.accept().unwrap_err();
    assert_eq!(nobody.kind(), ErrorKind::WouldBlock);
    drop((first, server));
    stage.finish();
}

/// Notes its lines.
struct Lines {
    seen: Rc<RefCell<Vec<String>>>,
    is_busy: Rc<Cell<bool>>,
}

impl<T: Transport> FrameReceiver<T, LineFramer> for Lines {
    fn frame_received(&mut self, cx: &mut FrameContext<'_, T, LineFramer>, line: &[u8]) {
        let line = String::from_utf8_lossy(line).into_owned();
        self.seen.borrow_mut().push(line);
        let _ = cx.transport.write(b"ok\n");
    }

    fn draining(&mut self, _: &mut FrameContext<'_, T, LineFramer>) -> bowline::AtDrain {
        self.seen.borrow_mut().push("drains".into());
        bowline::AtDrain::LoseWhenIdle
    }

    fn is_idle(&self) -> bool {
        !self.is_busy.get()
    }
}

/// What has begun to come is waited for, whatever the receiver says, and the
/// receiver's work as well.
#[test]
fn a_framed_receiver_is_not_idle_inside_of_a_frame() {
    let mut stage = Stage::new();
    let (ours, mut theirs) = socketpair();
    let (seen, is_busy) = (Rc::default(), Rc::new(Cell::new(false)));
    let lines = Lines {
        seen: Rc::clone(&seen),
        is_busy: Rc::clone(&is_busy),
    };
    let framed = Framed::new(LineFramer::with_delimiter(b"\n"), lines);
    stage
        .reactor
        .adopt_unix_stream(ours.into(), framed)
        .unwrap();
    theirs.write_all(b"the begin").unwrap();
    stage.settle();
    stop(&mut stage.reactor);
    let wait = |stage: &mut Stage| {
        for _ in 0..3 {
            stage.settle();
            stage.clock.advance(GRACE);
        }
        stage.settle();
    };
    wait(&mut stage);
    assert!(stage.reactor.is_stopping());
    is_busy.set(true);
    theirs.write_all(b"ning and the end\n").unwrap();
    wait(&mut stage);
    assert!(stage.reactor.is_stopping());
    assert_eq!(*seen.borrow(), ["drains", "the beginning and the end"]);
    is_busy.set(false);
    wait(&mut stage);
    assert!(!stage.reactor.is_running());
    let mut answer = Vec::new();
    theirs.read_to_end(&mut answer).unwrap();
    assert_eq!(answer, b"ok\n");
    drop(theirs);
    stage.finish();
}

/// One that is made while the others drain drains too.
#[test]
fn connections_that_are_adopted_meanwhile_are_told() {
    let mut stage = Stage::new();
    let (ours, theirs) = socketpair();
    let (late_ours, late_theirs) = socketpair();
    let late = RefCell::new(Some((late_ours, logging_script(&stage.log))));
    let first = Script::new().drain(move |cx| {
        if let Some((ours, script)) = late.take() {
            cx.reactor.adopt_unix_stream(ours.into(), script).unwrap();
        }
        bowline::AtDrain::LoseWhenIdle
    });
    stage.reactor.adopt_unix_stream(ours.into(), first).unwrap();
    stop(&mut stage.reactor);
    for _ in 0..3 {
        stage.settle();
        stage.clock.advance(GRACE);
    }
    stage.settle();
    assert!(!stage.reactor.is_running());
    stage.assert_log(&["made", "protocol lost: closed cleanly"]);
    drop((theirs, late_theirs));
    stage.finish();
}
