//! What an echo costs in system calls, counted by `strace`.
//!
//! The server is this test binary, run again under strace; the load is 64
//! connections on which one message each is under way at a time.

#![allow(clippy::print_stdout, reason = "the table is what one wants to see")]

use std::cell::Cell;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::rc::Rc;
use std::time::Duration;
use std::{env, fs, io};

use bowline::Tcp;
use bowline::handoff::pool::{
    Live, PassedConnection, Pool, PoolSettings, Spawned, Worker, WorkerId, WorkerSettings,
};
use bowline::process::ChildProcess;
use bowline::{
    Address, BuildContext, CloseReason, Context, ListenerHandle, Protocol, Reactor, Transport,
    Transports,
};

const CONNECTIONS: u64 = 64;
const ROUNDS: u64 = 100;
const MESSAGES: u64 = CONNECTIONS * ROUNDS;
const MESSAGE: [u8; 64] = [b'm'; 64];

/// What the server and its test harness may do beside: start, listen, accept,
/// set connections up, close them, and end. For every connection there are two
/// calls (accept and close) and some to spare.
const CALLS_BESIDE: u64 = 500 + 4 * CONNECTIONS;

/// Names the variable that makes the second process a server, and where.
const SERVE: &str = "BOWLINE_SYSTEM_CALLS_SERVE";
/// Serves over TCP on a listener that was made elsewhere.
const ADOPTED: &str = "adopted";
const ADOPTED_ALONE: &str = "adopted, alone";
/// Accepts such connections, sends them through a pair of sockets and serves them
/// where they come out.
const PASSED: &str = "passed";
/// A pool accepts them, with a worker in the same process.
const POOLED: &str = "pooled";
/// The type of each of the pair; of the listener type, domain and whether it
/// listens; the identity of the socket through which connections come.
const OF_THE_CHANNELS: u64 = 2 + 3 + 1;

/// A socket of std that blocks.
trait Client: Read + Write {}
impl<S: Read + Write> Client for S {}

#[test]
fn echo_over_tcp_costs_one_receive_and_one_send() {
    let directory = tempfile::tempdir().unwrap();
    let counted = count_calls(directory.path(), "tcp", |address| {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_nodelay(true).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        Box::new(stream)
    });
    counted.assert_one_receive_and_one_send("recvfrom", "sendto");
}

#[test]
fn echo_over_unix_costs_one_receive_and_one_send() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("echo");
    let counted = count_calls(directory.path(), path.to_str().unwrap(), |address| {
        let stream = UnixStream::connect(address).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        Box::new(stream)
    });
    counted.assert_one_receive_and_one_send("recvmsg", "sendto");
}

/// Others may make it block, whom it may be taken to have none of.
#[test]
fn only_a_listener_that_others_may_hold_is_asked_before_each_accept() {
    for (serve, is_asked) in [(ADOPTED, true), (ADOPTED_ALONE, false)] {
        let directory = tempfile::tempdir().unwrap();
        let counted = count_calls(directory.path(), serve, |address| {
            Box::new(TcpStream::connect(address).unwrap())
        });
        let polls = counted.of("poll");
        assert_eq!(polls >= CONNECTIONS, is_asked, "{polls} poll, {serve}");
    }
}

/// A client waits for all of them.
#[test]
fn connection_that_was_accepted_elsewhere_is_asked_no_more_than_is_needed() {
    let directory = tempfile::tempdir().unwrap();
    let counted = count_calls(directory.path(), PASSED, |address| {
        Box::new(TcpStream::connect(address).unwrap())
    });
    // That it is not the channel itself, and that it is a stream.
    let asked = counted.of("getsockopt") - OF_THE_CHANNELS;
    assert_eq!(asked, 2 * CONNECTIONS, "getsockopt");
    // That it has a peer, and which; at the end, the name of this side of it.
    let of_the_channels = 2;
    assert_eq!(counted.of("getpeername"), CONNECTIONS + of_the_channels);
    assert!(counted.of("getsockname") <= CONNECTIONS + 10);
    // That its sender's linger time is off.
    let set = counted.of("setsockopt");
    assert!(
        (CONNECTIONS..=CONNECTIONS + 5).contains(&set),
        "{set} setsockopt"
    );
}

/// A pool says who the peer is, and workers trust it: a client has waited long enough.
#[test]
fn connection_that_a_pool_passes_is_hardly_asked_anything() {
    let directory = tempfile::tempdir().unwrap();
    let counted = count_calls(directory.path(), POOLED, |address| {
        Box::new(TcpStream::connect(address).unwrap())
    });
    // That it is a stream, and does not listen.
    let of_the_channels = 10;
    let asked = counted.of("getsockopt");
    let most = 2 * CONNECTIONS + of_the_channels;
    assert!(asked <= most, "{asked} getsockopt");
    // At the end, the name of this side of it.
    let names = counted.of("getsockname");
    assert!(
        names <= CONNECTIONS + of_the_channels,
        "{names} getsockname"
    );
    for name in ["getpeername", "setsockopt"] {
        let calls = counted.of(name);
        assert!(calls <= of_the_channels, "{calls} {name}");
    }
}

/// The calls of a server, by name, and the turns that its reactor made.
struct Counted {
    table: String,
    calls: BTreeMap<String, u64>,
    turns: u64,
}

impl Counted {
    fn of(&self, name: &str) -> u64 {
        self.calls.get(name).copied().unwrap_or(0)
    }

    #[track_caller]
    fn assert_one_receive_and_one_send(&self, receive: &str, send: &str) {
        println!(
            "{CONNECTIONS} connections, {MESSAGES} messages, {} turns\n{}",
            self.turns, self.table
        );
        // A receive for each message, and one for the end of each connection.
        let expected = MESSAGES + CONNECTIONS;
        let received = self.of(receive);
        assert!(
            (expected..=expected + MESSAGES / 50).contains(&received),
            "{received} {receive} for {expected}"
        );
        let sent = self.of(send);
        assert!(
            (MESSAGES..=MESSAGES + MESSAGES / 50).contains(&sent),
            "{sent} {send} for {MESSAGES}"
        );
        // Once in, once out; the waker goes with the poller.
        let waker = 1;
        let listener = 2;
        assert_eq!(self.of("epoll_ctl"), waker + listener + 2 * CONNECTIONS);
        assert_eq!(self.of("epoll_wait"), self.turns);
        let counted = [receive, send, "epoll_ctl", "epoll_wait"];
        let beside: u64 = self
            .calls
            .iter()
            .filter(|(name, _)| !counted.contains(&name.as_str()))
            .map(|(_, calls)| calls)
            .sum();
        assert!(beside < CALLS_BESIDE, "{beside} other calls");
    }
}

/// Serves in another process under strace, and loads it.
#[track_caller]
fn count_calls(
    directory: &Path,
    serve: &str,
    connect: impl Fn(&str) -> Box<dyn Client>,
) -> Counted {
    let summary = directory.join("summary");
    let mut server = Command::new("strace")
        .args(["-f", "-c", "-o"])
        .arg(&summary)
        .arg(env::current_exe().unwrap())
        .args(["--exact", "server_process", "--ignored", "--nocapture"])
        .env(SERVE, serve)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| {
            panic!(
                "CANNOT RUN strace, which this test needs ({error}): install the package `strace`"
            )
        });
    let mut lines = BufReader::new(server.stdout.take().unwrap()).lines();
    let mut answer = |wanted: &str| {
        lines
            .by_ref()
            .map(|line| line.expect("the server writes text"))
            .find_map(|line| Some(line.split_once(wanted)?.1.to_owned()))
            .unwrap_or_else(|| {
                panic!("the server ended without saying {wanted:?}; may strace trace here?")
            })
    };
    let address = answer("listening on ");
    load(&address, connect);
    let turns = answer("turns: ").parse().unwrap();
    assert!(server.wait().unwrap().success());

    let table = fs::read_to_string(summary).unwrap();
    // Columns: share, seconds, microseconds a call, calls, perhaps errors, name.
    let calls = table
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>())
        .filter(|columns| columns.len() >= 5 && columns[columns.len() - 1] != "total")
        .filter_map(|columns| Some((columns.last()?.to_string(), columns[3].parse().ok()?)))
        .collect();
    Counted {
        table,
        calls,
        turns,
    }
}

/// Writes to every connection before it reads from any, so that several are
/// ready in one turn.
fn load(address: &str, connect: impl Fn(&str) -> Box<dyn Client>) {
    let mut clients: Vec<_> = (0..CONNECTIONS).map(|_| connect(address)).collect();
    for _ in 0..ROUNDS {
        for client in &mut clients {
            client.write_all(&MESSAGE).unwrap();
        }
        for client in &mut clients {
            let mut echoed = [0; MESSAGE.len()];
            client.read_exact(&mut echoed).unwrap();
            assert_eq!(echoed, MESSAGE);
        }
    }
}

struct Echo {
    open: Rc<Cell<u64>>,
}

impl<T: Transport> Protocol<T> for Echo {
    fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
        cx.transport.write(data);
    }

    fn connection_lost(&mut self, cx: &mut Context<'_, T>, _: &CloseReason) {
        self.open.set(self.open.get() - 1);
        if self.open.get() == 0 {
            cx.reactor.stop().unwrap();
        }
    }
}

struct Channel<F> {
    factory: F,
}

impl<F: Fn(&Address) -> Echo + 'static> Protocol<bowline::UnixStream> for Channel<F> {
    fn data_received(&mut self, _: &mut Context<'_, bowline::UnixStream>, _: &[u8]) {}

    fn file_descriptor_received(
        &mut self,
        cx: &mut Context<'_, bowline::UnixStream>,
        fd: OwnedFd,
    ) -> Result<(), OwnedFd> {
        let peer = Address::Inet(([0; 4], 0).into());
        cx.reactor
            .adopt_tcp_stream(fd, (self.factory)(&peer))
            .unwrap();
        Ok(())
    }
}

fn pass_connections(
    reactor: &mut Reactor,
    factory: impl Fn(&Address) -> Echo + Clone + 'static,
) -> ListenerHandle {
    let (here, there) = UnixStream::pair().unwrap();
    let channel = |factory| Channel { factory };
    let here = reactor
        .adopt_unix_stream(here.into(), channel(factory.clone()))
        .unwrap();
    reactor
        .adopt_unix_stream(there.into(), channel(factory))
        .unwrap();
    let made = TcpListener::bind("127.0.0.1:0").unwrap();
    let acceptor = move |cx: &mut BuildContext<'_>, socket: OwnedFd, _: &Address| {
        let channel = cx.reactor.get(here).unwrap();
        channel
            .write_with_descriptors(b"c", vec![socket.into()])
            .unwrap();
    };
    reactor.accept_adopted(made.into(), acceptor).unwrap()
}

struct NoProcess;

impl ChildProcess for NoProcess {
    fn pid(&self) -> u32 {
        std::process::id()
    }

    fn kill(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn try_wait(&mut self) -> io::Result<Option<ExitStatus>> {
        Ok(Some(ExitStatus::default()))
    }
}

fn pool_connections(
    reactor: &mut Reactor,
    factory: impl Fn(&Address) -> Echo + Clone + 'static,
) -> ListenerHandle {
    let settings = PoolSettings::default().workers(1).drain_timeout(None);
    let spawn = move |reactor: &mut Reactor, _: WorkerId| {
        let (ours, theirs) = UnixStream::pair()?;
        let factory = factory.clone();
        let serve = move |reactor: &mut Reactor, connection: PassedConnection, _: Live| {
            let peer = Address::Inet(connection.peer.expect("over TCP"));
            connection.adopt(reactor, Tcp, factory(&peer)).unwrap();
        };
        Worker::start(reactor, theirs, WorkerSettings::default(), serve)?;
        Ok(Spawned {
            channel: ours,
            process: Box::new(NoProcess),
        })
    };
    let pool = Pool::start(reactor, settings, spawn);
    let here = Tcp::at(([127, 0, 0, 1], 0).into());
    reactor.accept(here, pool.acceptor(0)).unwrap()
}

#[test]
#[ignore = "the server of the other tests, which run it in a process of its own"]
fn server_process() {
    let Ok(serve) = env::var(SERVE) else {
        return;
    };
    let open = Rc::new(Cell::new(CONNECTIONS));
    let factory = move |_: &Address| Echo { open: open.clone() };
    let mut reactor = Reactor::new().unwrap();
    let listener = match &*serve {
        "tcp" => reactor
            .listen_tcp(([127, 0, 0, 1], 0).into(), factory)
            .unwrap(),
        ADOPTED | ADOPTED_ALONE => {
            let made = TcpListener::bind("127.0.0.1:0").unwrap();
            reactor
                .listen(Tcp::listening(made.into()), factory)
                .unwrap()
        }
        PASSED => pass_connections(&mut reactor, factory),
        POOLED => pool_connections(&mut reactor, factory),
        path => reactor.listen_unix(Path::new(path), factory).unwrap(),
    };
    let listener = reactor.get(listener).unwrap();
    if serve == ADOPTED_ALONE {
        listener.assume_sole_holder();
    }
    println!("listening on {}", listener.address());
    reactor.run().unwrap();
    println!("turns: {}", reactor.statistics().turns);
}
