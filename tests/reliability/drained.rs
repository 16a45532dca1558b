//! Clients that keep their connections alive, and servers that end under them:
//! with a successor on the same listener, or by a restart.

use std::cell::Cell;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream as StdTcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use bowline::Tcp;
use bowline::handoff::restart::{Listeners, Program, Restart, RestartSettings, Start};
use bowline::{Address, Context, Protocol, Reactor, Transport, TransportHandle, Transports};
use rustix::process::{Pid, Signal, kill_process};

use crate::support::DescriptorLedger;
use crate::support::figures::{Bound, Figures, scaled};
use crate::support::own_process::{end_with_owner, owned};
use crate::support::waiting::await_exit;

/// Says to the test binary that it is a server: `-` for one whose listener is
/// standard input, or the directory of one that is restarted.
const SERVER: &str = "BOWLINE_TEST_KEEP_ALIVE";

/// How long one step may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);

const CLIENTS: u64 = 8;

/// No test, but the server: what the tests start.
#[test]
fn server_process() {
    let Ok(how) = std::env::var(SERVER) else {
        return;
    };
    end_with_owner();
    let mut reactor = Reactor::new().expect("epoll");
    reactor.stop_on_signals().expect("handlers");
    if how == "-" {
        let listener = io::stdin().as_fd().try_clone_to_owned().expect("open");
        reactor
            .listen(Tcp::listening(listener), |_: &Address| Http::default())
            .expect("a listener");
        reactor.call_when_running(|_| say(&format!("serving {}", std::process::id())));
    } else {
        let settings = RestartSettings::new(&how);
        let restart = Restart::begin(&mut reactor, settings, Server).expect("ours");
        reactor
            .on_signals(&[Signal::HUP.as_raw()], move |reactor, _| {
                let next = command(&how);
                restart.start_successor(reactor, next).expect("it starts");
            })
            .expect("handlers");
    }
    reactor.run().expect("it does not run yet");
    say(&format!("cut {}", reactor.statistics().cut));
}

fn command(how: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().expect("Linux knows"));
    owned(&mut command)
        .args(["--exact", "--nocapture", "drained::server_process"])
        .env(SERVER, how);
    command
}

/// In one write, since other processes have the same standard output.
fn say(line: &str) {
    let written = io::stdout().write_all(format!("\n{line}\n").as_bytes());
    written.expect("the test reads");
}

struct Server;

impl Program for Server {
    fn listen(&mut self, reactor: &mut Reactor, listeners: &mut Listeners<'_>) -> io::Result<()> {
        let any = ([127, 0, 0, 1], 0).into();
        let web = listeners.listen(reactor, "web", Tcp::at(any), |_: &Address| Http::default())?;
        if let Some(listener) = reactor.get(web) {
            say(&format!("listening {}", listener.address()));
        }
        Ok(())
    }

    fn serving(&mut self, _: &mut Reactor, _: Start) {
        say(&format!("serving {}", std::process::id()));
    }
}

/// One HTTP connection: GET only, some answers late.
#[derive(Default)]
struct Http {
    partial: Vec<u8>,
    owed: Rc<Cell<u32>>,
}

impl<T: Transport> Protocol<T> for Http {
    fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
        self.partial.extend_from_slice(data);
        loop {
            let mut headers = [httparse::EMPTY_HEADER; 8];
            let mut request = httparse::Request::new(&mut headers);
            let Ok(httparse::Status::Complete(length)) = request.parse(&self.partial) else {
                return;
            };
            let is_slow = request.path == Some("/slow");
            self.partial.drain(..length);
            let me = cx.transport.handle();
            if is_slow {
                self.owed.set(self.owed.get() + 1);
                let owed = Rc::clone(&self.owed);
                let late = Duration::from_millis(30);
                cx.reactor.call_later(late, move |reactor| {
                    owed.set(owed.get() - 1);
                    answer(reactor, me);
                });
            } else {
                cx.reactor.defer(move |reactor| answer(reactor, me));
            }
        }
    }

    fn is_idle(&self) -> bool {
        self.owed.get() == 0 && self.partial.is_empty()
    }
}

fn answer(reactor: &mut Reactor, to: TransportHandle) {
    let is_last = reactor.is_stopping();
    let Some(transport) = reactor.get(to) else {
        return;
    };
    let last = if is_last { "Connection: close\r\n" } else { "" };
    let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n{last}\r\nok");
    transport.write(answer.as_bytes());
    if is_last {
        transport.lose_connection();
    }
}

/// What all clients together have seen.
#[derive(Default)]
struct Seen {
    answered: AtomicU64,
    lost: AtomicU64,
    told_to_close: AtomicU64,
    is_over: AtomicBool,
}

/// Clients as HTTP/1.1 wants them: they keep a connection until they are told that
/// an answer was the last one. None tries a request twice.
struct Clients {
    seen: Arc<Seen>,
    threads: Vec<JoinHandle<()>>,
}

impl Clients {
    fn start(address: SocketAddr) -> Self {
        let seen = Arc::new(Seen::default());
        let start = |number| {
            let seen = Arc::clone(&seen);
            thread::spawn(move || client(address, number, &seen))
        };
        Self {
            threads: (0..CLIENTS).map(start).collect(),
            seen,
        }
    }

    /// Waits until so many requests were answered or lost.
    fn wait_for(&self, requests: u64) {
        let done =
            || self.seen.answered.load(Ordering::SeqCst) + self.seen.lost.load(Ordering::SeqCst);
        let mut last = (done(), Instant::now());
        while done() < requests {
            thread::park_timeout(Duration::from_millis(2));
            if done() > last.0 {
                last = (done(), Instant::now());
            }
            assert!(last.1.elapsed() < PATIENCE, "nobody is answered any more");
        }
    }

    fn end(self, kind: &str, requests: u64, ends: usize) {
        self.seen.is_over.store(true, Ordering::SeqCst);
        for thread in self.threads {
            thread.join().expect("it does not panic");
        }
        let count = |it: &AtomicU64| it.load(Ordering::SeqCst) as usize;
        let what = |what: &str| format!("{what}, {kind}");
        let answered = count(&self.seen.answered);
        let last = count(&self.seen.told_to_close);
        let wanted = requests as usize;
        Figures::of("T-41")
            .must(
                &what("requests lost"),
                count(&self.seen.lost),
                Bound::Exactly,
                0,
            )
            .must(&what("requests answered"), answered, Bound::AtLeast, wanted)
            .must(&what("ends of a server"), ends, Bound::AtLeast, 1)
            .must(&what("last answers"), last, Bound::AtLeast, ends);
    }
}

fn client(address: SocketAddr, number: u64, seen: &Seen) {
    let mut connection = None;
    for turn in 0u64.. {
        if seen.is_over.load(Ordering::SeqCst) {
            return;
        }
        let path = if turn % 16 == number { "/slow" } else { "/" };
        match exchange(&mut connection, address, path) {
            Ok(is_last) => {
                seen.answered.fetch_add(1, Ordering::SeqCst);
                if is_last {
                    seen.told_to_close.fetch_add(1, Ordering::SeqCst);
                    connection = None;
                }
            }
            Err(_) => {
                seen.lost.fetch_add(1, Ordering::SeqCst);
                connection = None;
            }
        }
        // Some are at once, some think.
        if turn % 8 == 0 {
            thread::park_timeout(Duration::from_millis(number * 5));
        }
    }
}

/// One request and its answer; whether that was the last of the connection.
fn exchange(
    connection: &mut Option<StdTcpStream>,
    address: SocketAddr,
    path: &str,
) -> io::Result<bool> {
    let stream = match connection {
        Some(stream) => stream,
        none => {
            let stream = StdTcpStream::connect(address)?;
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            none.insert(stream)
        }
    };
    stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: here\r\n\r\n").as_bytes())?;
    let mut received = Vec::new();
    let mut buffer = [0; 512];
    loop {
        let count = stream.read(&mut buffer)?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        received.extend_from_slice(&buffer[..count]);
        let mut headers = [httparse::EMPTY_HEADER; 8];
        let mut response = httparse::Response::new(&mut headers);
        let parsed = response.parse(&received).map_err(io::Error::other)?;
        if let httparse::Status::Complete(length) = parsed
            && received.len() >= length + 2
        {
            return Ok(response.headers.iter().any(|it| it.name == "Connection"));
        }
    }
}

/// What servers say on their standard output, which successors have too.
struct Said {
    output: BufReader<ChildStdout>,
    /// Of each server that has ended, how many connections were cut.
    cut: Vec<usize>,
}

impl Said {
    fn next(&mut self, what: &str) -> String {
        let found = self.find(what);
        found.unwrap_or_else(|| panic!("it ended before it was {what}"))
    }

    fn find(&mut self, what: &str) -> Option<String> {
        let mut line = String::new();
        loop {
            line.clear();
            if self.output.read_line(&mut line).expect("a pipe") == 0 {
                return None;
            }
            if let Some(cut) = line.trim().strip_prefix("cut ") {
                self.cut.push(cut.parse().expect("a number"));
            }
            if let Some(rest) = line.trim().strip_prefix(what) {
                return Some(rest.trim().to_owned());
            }
        }
    }

    /// Reads until the last one has ended, and answers what each said of its end.
    fn finish(mut self) -> Vec<usize> {
        let more = self.find("serving");
        assert_eq!(more, None, "nobody was started");
        self.cut
    }
}

fn pid(text: &str) -> Pid {
    text.parse().ok().and_then(Pid::from_raw).expect("a number")
}

fn start(how: &str, stdin: Stdio) -> (Child, Said) {
    let mut command = command(how);
    command.stdin(stdin).stdout(Stdio::piped());
    let mut child = command.spawn().expect("it starts");
    let said = Said {
        output: BufReader::new(child.stdout.take().expect("piped")),
        cut: Vec::new(),
    };
    (child, said)
}

/// The figures of servers that have ended, all that were started.
fn ended(kind: &str, ends: usize, cut: &[usize]) {
    let were_cut = cut.iter().filter(|connections| **connections > 0).count();
    Figures::of("T-41")
        .must(
            &format!("ends that said how they went, {kind}"),
            cut.len(),
            Bound::Exactly,
            ends,
        )
        .must(
            &format!("ends that were cut, {kind}"),
            were_cut,
            Bound::Exactly,
            0,
        );
}

/// Waits for the end of a server, which is a success.
fn ends(mut child: Child) {
    let status = await_exit(&mut child, 2 * PATIENCE);
    assert!(status.success(), "{status:?}");
}

/// Reliability T-41.
#[test]
fn no_request_is_lost_when_servers_are_ended_that_have_a_successor() {
    let ledger = DescriptorLedger::open();
    let (rounds, requests) = (scaled(3, 20), scaled(3_000, 100_000));
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("bound");
    let stdin = || Stdio::from(OwnedFd::from(listener.try_clone().expect("a number")));
    let (mut serving, mut said) = start("-", stdin());
    said.next("serving");
    let mut cut = Vec::new();
    let clients = Clients::start(address);
    for round in 1..=rounds as u64 {
        clients.wait_for(requests * round / (rounds as u64 + 1));
        let (next, mut next_said) = start("-", stdin());
        next_said.next("serving");
        let old = Pid::from_child(&serving);
        kill_process(old, Signal::TERM).expect("it runs");
        ends(std::mem::replace(&mut serving, next));
        cut.extend(std::mem::replace(&mut said, next_said).finish());
    }
    clients.wait_for(requests);
    clients.end("SIGTERM", requests, rounds);
    kill_process(Pid::from_child(&serving), Signal::TERM).expect("it runs");
    ends(serving);
    cut.extend(said.finish());
    ended("SIGTERM", rounds + 1, &cut);
    drop(listener);
    ledger.assert_balanced();
}

/// Reliability T-41.
#[test]
fn no_request_is_lost_when_a_server_is_restarted() {
    let ledger = DescriptorLedger::open();
    let (rounds, requests) = (scaled(3, 20), scaled(3_000, 100_000));
    let directory = tempfile::tempdir().expect("a directory");
    let control: &Path = &directory.path().join("control");
    let (first, mut said) = start(control.to_str().expect("text"), Stdio::null());
    let address = said.next("listening").parse().expect("an address");
    let mut serving = pid(&said.next("serving"));
    let clients = Clients::start(address);
    for round in 1..=rounds as u64 {
        clients.wait_for(requests * round / (rounds as u64 + 1));
        kill_process(serving, Signal::HUP).expect("it runs");
        serving = pid(&said.next("serving"));
    }
    clients.wait_for(requests);
    clients.end("restart", requests, rounds);
    kill_process(serving, Signal::TERM).expect("it runs");
    ends(first);
    // The last one has the other end, and ends after its grace.
    ended("restart", rounds + 1, &said.finish());
    drop(directory);
    ledger.assert_balanced();
}
