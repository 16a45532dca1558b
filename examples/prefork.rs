//! A prefork server: one process accepts, and passes every connection to one of
//! its worker processes, which answers HTTP with its process id.
//!
//! ```text
//! cargo run --release --example prefork
//! cargo run --release --example prefork -- --serve --listen 127.0.0.1:8080 --workers 4
//! ```
//!
//! The first puts itself under a short load, kills a worker halfway, and prints
//! what became of it all. With the second, in another terminal:
//!
//! ```text
//! curl http://127.0.0.1:8080/
//! wrk -c 64 -t 2 http://127.0.0.1:8080/
//! kill -9 PID     # one of those that curl shows
//! ```
//!
//! The acceptor puts no transport on what it accepts: its acceptor callback
//! queues the socket on the worker's channel, a UNIX socketpair, where those of
//! one turn leave together. A full channel stops it from accepting. What had
//! not left when a worker died goes to another one; what had, dies with it.
//!
//! SIGTERM stops in an orderly way: the acceptor closes its listener and its
//! half of the channels, and each worker ends when everything that it was
//! passed has been answered.

#![allow(clippy::print_stdout)]

mod common;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::process::{self, Child, Command};
use std::rc::Rc;
use std::time::{Duration, Instant};

use bowline::{Address, AfterReadClosed, BuildContext, CloseReason, ConnectError, Context};
use bowline::{Factory, Hold, ListenerHandle, PassedDescriptor, Phase, Protocol, Reactor};
use bowline::{ReceivedDescriptors, SystemEvent, TcpListenOptions, TcpStream, Transport};
use bowline::{TransportHandle, Transports, UnixTransport, UnixTransportHandle};
use rustix::process::Signal;

use crate::common::{Arguments, STOP_DEADLINE};

const HELP: &str = "
A server whose workers are processes that are passed their connections.

Usage: prefork [--serve] [--listen HOST:PORT] [--workers N]

  --serve             stay up; without it, run a short load and end
  --listen HOST:PORT  where to accept [default: 127.0.0.1:0]
  --workers N         how many worker processes [default: 2]
";

/// The hidden argument of a worker.
const WORKER: &str = "--worker";

/// How long after its death a worker is replaced, so that one that cannot even
/// start does not keep the machine busy.
const REPLACE_AFTER: Duration = Duration::from_millis(100);

/// How often a worker that has closed its channel is asked whether it is gone.
const REAP_EVERY: Duration = Duration::from_millis(20);

fn main() -> common::Result {
    env_logger::init();
    let mut arguments = Arguments::parse(HELP);
    let is_worker = arguments.flag(WORKER);
    let serve = arguments.flag("--serve");
    let listen = arguments.option("--listen")?;
    let workers = arguments.option("--workers")?;
    arguments.finish()?;
    if is_worker {
        work()
    } else {
        let listen = listen.unwrap_or_else(|| SocketAddr::from(([127, 0, 0, 1], 0)));
        accept(listen, workers.unwrap_or(2), serve)
    }
}

// The acceptor.

type SharedPool = Rc<RefCell<Pool>>;
type Call = Box<dyn FnOnce(&mut Reactor)>;

/// The workers, and what is on its way to them.
struct Pool {
    workers: Vec<Worker>,
    /// Whose turn it is.
    next: usize,
    /// Accepted, and not queued to anybody yet. The listener is paused as long
    /// as there are any.
    held: Vec<PassedDescriptor>,
    listener: Option<ListenerHandle>,
    is_stopping: bool,
    /// How many descriptors have left to the workers.
    passed: u64,
    /// Those that are gone: process id, and how many connections it was given.
    ended: Vec<(u32, u64)>,
    /// Those that have closed their channel and may not be gone yet.
    dying: Vec<Child>,
    /// Called once when the next worker was replaced.
    on_replaced: Option<Call>,
}

struct Worker {
    process: Child,
    channel: UnixTransportHandle,
    /// How many connections it was given.
    given: u64,
}

/// The acceptor's end of the channel to one worker.
struct Channel {
    pool: SharedPool,
    /// Lets a stop wait for this worker.
    _open: Hold,
}

impl<T: UnixTransport> Protocol<T> for Channel {
    fn data_received(&mut self, _: &mut Context<'_, T>, _: &[u8]) {}

    fn descriptors_sent(&mut self, cx: &mut Context<'_, T>, count: usize) {
        let mut pool = self.pool.borrow_mut();
        pool.passed += count as u64;
        if !pool.held.is_empty() {
            pass_held_later(cx.reactor, &self.pool);
        }
    }

    fn connection_lost(&mut self, cx: &mut Context<'_, T>, reason: &CloseReason) {
        let mut pool = self.pool.borrow_mut();
        let unsent = cx.transport.reclaim_descriptors();
        let me = cx.transport.unix_handle();
        if let Some(index) = pool.workers.iter().position(|worker| worker.channel == me) {
            let worker = pool.workers.swap_remove(index);
            let pid = worker.process.id();
            log::info!("worker {pid}: {reason}; {} to pass on", unsent.len());
            pool.ended.push((pid, worker.given - unsent.len() as u64));
            pool.dying.push(worker.process);
        }
        pool.held.extend(unsent);
        pass_held_later(cx.reactor, &self.pool);
        if !pool.is_stopping {
            let pool = Rc::clone(&self.pool);
            cx.reactor
                .call_later(REPLACE_AFTER, move |reactor| replace(reactor, &pool));
            let pool = Rc::clone(&self.pool);
            cx.reactor
                .call_later(REAP_EVERY, move |reactor| reap(reactor, &pool));
        }
    }
}

impl Pool {
    /// Queues a socket to the worker whose turn it is, or the next one that has
    /// room. It leaves at the end of the turn, together with others.
    fn pass(&mut self, reactor: &mut Reactor, mut socket: PassedDescriptor) {
        for _ in 0..self.workers.len() {
            self.next = (self.next + 1) % self.workers.len();
            let worker = &mut self.workers[self.next];
            let Some(channel) = reactor.get(worker.channel) else {
                continue;
            };
            if channel.is_send_buffer_full() {
                continue;
            }
            match channel.send_file_descriptor(socket) {
                Ok(()) => {
                    // A descriptor needs a byte to travel with.
                    channel.write(b"c");
                    worker.given += 1;
                    return;
                }
                // It is closing, and gives back what it did not take.
                Err(mut refused) => match refused.descriptors.pop() {
                    Some(back) => socket = back,
                    None => return,
                },
            }
        }
        self.held.push(socket);
    }
}

/// Passes on what was held, when no callback runs: a channel cannot be reached
/// from inside its own.
fn pass_held_later(reactor: &mut Reactor, pool: &SharedPool) {
    let pool = Rc::clone(pool);
    reactor.defer(move |reactor| {
        let mut pool = pool.borrow_mut();
        for socket in std::mem::take(&mut pool.held) {
            pool.pass(reactor, socket);
        }
        if pool.held.is_empty()
            && let Some(listener) = pool.listener
            && let Some(listener) = reactor.get(listener)
        {
            listener.resume_accepting();
        }
    });
}

/// Starts a worker: this program, with its end of the channel as standard
/// input. Every other descriptor is close-on-exec.
fn start_worker(reactor: &mut Reactor, pool: &SharedPool) -> io::Result<()> {
    let (ours, theirs) = StdUnixStream::pair()?;
    let process = Command::new(std::env::current_exe()?)
        .arg(WORKER)
        .stdin(OwnedFd::from(theirs))
        .spawn()?;
    let channel = Channel {
        pool: Rc::clone(pool),
        _open: reactor.hold(SystemEvent::Shutdown),
    };
    let channel = reactor.adopt_unix_stream(ours.into(), channel)?;
    pool.borrow_mut().workers.push(Worker {
        process,
        channel,
        given: 0,
    });
    Ok(())
}

fn replace(reactor: &mut Reactor, pool: &SharedPool) {
    if pool.borrow().is_stopping {
        return;
    }
    if let Err(error) = start_worker(reactor, pool) {
        log::error!("cannot start a worker, trying again: {error}");
        let pool = Rc::clone(pool);
        reactor.call_later(REPLACE_AFTER, move |reactor| replace(reactor, &pool));
        return;
    }
    pass_held_later(reactor, pool);
    if let Some(call) = pool.borrow_mut().on_replaced.take() {
        reactor.defer(call);
    }
}

/// Asks after the dying without waiting for them.
fn reap(reactor: &mut Reactor, pool: &SharedPool) {
    let dying = &mut pool.borrow_mut().dying;
    dying.retain_mut(|process| match process.try_wait() {
        Ok(Some(status)) => {
            log::info!("worker {}: {status}", process.id());
            false
        }
        Ok(None) => true,
        Err(error) => {
            log::error!("worker {}: {error}", process.id());
            false
        }
    });
    if !dying.is_empty() {
        let pool = Rc::clone(pool);
        reactor.call_later(REAP_EVERY, move |reactor| reap(reactor, &pool));
    }
}

fn accept(address: SocketAddr, workers: usize, serve: bool) -> common::Result {
    let mut reactor = Reactor::new()?;
    let pool = Rc::new(RefCell::new(Pool {
        workers: Vec::new(),
        next: 0,
        held: Vec::new(),
        listener: None,
        is_stopping: false,
        passed: 0,
        ended: Vec::new(),
        dying: Vec::new(),
        on_replaced: None,
    }));
    for _ in 0..workers.max(1) {
        start_worker(&mut reactor, &pool)?;
    }

    let options = TcpListenOptions {
        no_delay: true, // accepted sockets inherit it
        ..TcpListenOptions::default()
    };
    let accepting = Rc::clone(&pool);
    let accepted = move |cx: &mut BuildContext<'_>, socket: OwnedFd, _: &Address| {
        let mut pool = accepting.borrow_mut();
        pool.pass(cx.reactor, socket.into());
        if !pool.held.is_empty()
            && let Some(listener) = cx.listener()
        {
            listener.pause_accepting();
        }
    };
    let listener = reactor.accept_tcp(address, &options, accepted)?;
    pool.borrow_mut().listener = Some(listener);
    common::stop_gracefully_on_signals(&mut reactor, listener)?;

    let stopping = Rc::clone(&pool);
    reactor.add_trigger(Phase::Before, SystemEvent::Shutdown, move |reactor| {
        stopping.borrow_mut().is_stopping = true;
        for worker in &stopping.borrow().workers {
            if let Some(channel) = reactor.get(worker.channel) {
                channel.lose_write_connection();
            }
        }
    });

    common::print_address(&mut reactor, listener);
    let load = if serve {
        None
    } else {
        let listening = reactor.get(listener).map(|listener| listener.address());
        let address = listening.and_then(|address| address.as_inet());
        Some(start_load(&mut reactor, &pool, address.ok_or("not TCP")?))
    };
    let started = Instant::now();
    reactor.run()?;
    let took = started.elapsed();

    let mut pool = pool.borrow_mut();
    // Still connected: the stop was cut short.
    for worker in &mut pool.workers {
        worker.process.kill()?;
        worker.process.wait()?;
    }
    // Have closed their channels, which is the last thing they do.
    for process in &mut pool.dying {
        process.wait()?;
    }
    match load {
        Some(load) => print_table(&pool, &load.borrow(), took),
        None => Ok(()),
    }
}

// A worker.

/// What the connections of one worker share.
#[derive(Default)]
struct Server {
    open: RefCell<BTreeSet<TransportHandle>>,
    /// The answers that keep the connection, and that close it.
    keep: Vec<u8>,
    close: Vec<u8>,
}

/// The worker's end of its channel.
struct Inlet {
    server: Rc<Server>,
}

impl<T: UnixTransport> Protocol<T> for Inlet {
    fn data_received(&mut self, _: &mut Context<'_, T>, _: &[u8]) {}

    fn descriptors_received(
        &mut self,
        cx: &mut Context<'_, T>,
        descriptors: &mut ReceivedDescriptors<'_>,
        _: &[u8],
    ) {
        for socket in descriptors {
            let http = Http::new(&self.server, cx.reactor.hold(SystemEvent::Shutdown));
            if let Err(error) = cx.reactor.adopt_tcp_stream(socket, http) {
                // Reset before it got here, most likely.
                log::debug!("cannot serve: {error}");
            }
        }
    }

    fn read_connection_lost(&mut self, cx: &mut Context<'_, T>) -> AfterReadClosed {
        for &connection in &*self.server.open.borrow() {
            cx.reactor.call_protocol(
                connection,
                |http: &mut Http, cx: &mut Context<'_, TcpStream>| {
                    http.stop(cx);
                },
            );
        }
        AfterReadClosed::EndConnection
    }

    fn connection_lost(&mut self, cx: &mut Context<'_, T>, _: &CloseReason) {
        // Waits for the holds of the connections, and ends early only if they
        // take too long. An error says that it is stopping already.
        let _ = cx.reactor.stop();
        cx.reactor.call_later(STOP_DEADLINE, |reactor| {
            let _ = reactor.crash();
        });
    }
}

/// One HTTP connection. A shortcut: GET only, and no bodies.
struct Http {
    server: Rc<Server>,
    /// The beginning of a request that has not arrived whole.
    partial: Vec<u8>,
    has_answered: bool,
    is_last: bool,
    _open: Hold,
}

impl<T: Transport> Protocol<T> for Http {
    fn connection_made(&mut self, cx: &mut Context<'_, T>) {
        self.server.open.borrow_mut().insert(cx.transport.handle());
    }

    fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
        if self.partial.is_empty() {
            let used = self.answer(cx, data);
            self.partial.extend_from_slice(&data[used..]);
        } else {
            let mut requests = std::mem::take(&mut self.partial);
            requests.extend_from_slice(data);
            let used = self.answer(cx, &requests);
            requests.drain(..used);
            self.partial = requests;
        }
    }

    fn read_connection_lost(&mut self, _: &mut Context<'_, T>) -> AfterReadClosed {
        AfterReadClosed::LoseConnection
    }

    fn connection_lost(&mut self, cx: &mut Context<'_, T>, _: &CloseReason) {
        self.server.open.borrow_mut().remove(&cx.transport.handle());
    }
}

impl Http {
    const MAX_HEADERS: usize = 64;
    const MAX_REQUEST: usize = 16 * 1024;

    fn new(server: &Rc<Server>, open: Hold) -> Self {
        Self {
            server: Rc::clone(server),
            partial: Vec::new(),
            has_answered: false,
            is_last: false,
            _open: open,
        }
    }

    /// Answers every request that is whole; how many bytes those were.
    fn answer<T: Transport>(&mut self, cx: &mut Context<'_, T>, requests: &[u8]) -> usize {
        let mut used = 0;
        while used < requests.len() {
            let mut headers = [httparse::EMPTY_HEADER; Self::MAX_HEADERS];
            let mut request = httparse::Request::new(&mut headers);
            let length = match request.parse(&requests[used..]) {
                Ok(httparse::Status::Complete(length)) => length,
                Ok(httparse::Status::Partial) if requests.len() - used < Self::MAX_REQUEST => break,
                Ok(httparse::Status::Partial) => {
                    return refuse(cx, "431 Request Header Fields Too Large", requests);
                }
                Err(_) => return refuse(cx, "400 Bad Request", requests),
            };
            if request.method != Some("GET") {
                return refuse(cx, "405 Method Not Allowed", requests);
            }
            used += length;
            self.has_answered = true;
            if self.is_last || !is_kept_alive(&request) {
                cx.transport.write(&self.server.close);
                cx.transport.lose_connection();
                return requests.len();
            }
            cx.transport.write(&self.server.keep);
        }
        used
    }

    /// Ends the connection now if it is between requests, else with the answer
    /// to the one that it owes.
    fn stop<T: Transport>(&mut self, cx: &mut Context<'_, T>) {
        if self.has_answered && self.partial.is_empty() {
            cx.transport.lose_connection();
        } else {
            self.is_last = true;
        }
    }
}

fn is_kept_alive(request: &httparse::Request<'_, '_>) -> bool {
    let asks_to_close = |header: &httparse::Header<'_>| {
        header.name.eq_ignore_ascii_case("connection")
            && header.value.eq_ignore_ascii_case(b"close")
    };
    request.version == Some(1) && !request.headers.iter().any(asks_to_close)
}

/// Says no, and closes. All of the input counts as used.
fn refuse<T: Transport>(cx: &mut Context<'_, T>, status: &str, input: &[u8]) -> usize {
    let answer = format!("HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    cx.transport.write(answer.as_bytes());
    cx.transport.lose_connection();
    input.len()
}

fn work() -> common::Result {
    let mut reactor = Reactor::new()?;
    let body = format!("process {}\n", process::id());
    let answer = |header| {
        let length = body.len();
        format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n{header}\r\n{body}").into_bytes()
    };
    let server = Rc::new(Server {
        open: RefCell::default(),
        keep: answer(""),
        close: answer("Connection: close\r\n"),
    });
    // Standard input stays open beside its copy: the acceptor sees the channel
    // end when this process has ended, and not before.
    let channel = io::stdin().as_fd().try_clone_to_owned()?;
    reactor.adopt_unix_stream(channel, Inlet { server })?;
    // Ctrl-C goes to all processes of a terminal. It is the acceptor's to
    // decide; SIGTERM to a worker ends it at once.
    reactor.on_signals(&[Signal::INT.as_raw()], |_, _| {})?;
    reactor.run()?;
    Ok(())
}

// The load, which runs in the acceptor's process and reactor.

/// How many connections there are, one request on each, and how many of them
/// at a time.
const CONNECTIONS: usize = 4_000;
const AT_A_TIME: usize = 32;

/// How long all of it may take.
const LOAD_DEADLINE: Duration = Duration::from_secs(60);

type SharedLoad = Rc<RefCell<Load>>;

struct Load {
    address: SocketAddr,
    /// Not begun, and running.
    left: usize,
    running: usize,
    /// How many each process has answered.
    answers: BTreeMap<u32, u64>,
    failures: u64,
    when_done: Option<Call>,
}

/// Half of the load; then a worker is killed; once it was replaced, the rest.
fn start_load(reactor: &mut Reactor, pool: &SharedPool, address: SocketAddr) -> SharedLoad {
    let load = Rc::new(RefCell::new(Load {
        address,
        left: 0,
        running: 0,
        answers: BTreeMap::new(),
        failures: 0,
        when_done: None,
    }));
    let (pool, second) = (Rc::clone(pool), Rc::clone(&load));
    run_load(reactor, &load, CONNECTIONS / 2, move |_| {
        let mut pool = pool.borrow_mut();
        if let Some(worker) = pool.workers.first_mut() {
            println!("killing worker {} halfway", worker.process.id());
            if let Err(error) = worker.process.kill() {
                log::error!("it is gone already: {error}");
            }
        }
        pool.on_replaced = Some(Box::new(move |reactor| {
            run_load(reactor, &second, CONNECTIONS - CONNECTIONS / 2, |reactor| {
                // An error says that it is stopping already.
                let _ = reactor.stop();
            });
        }));
    });
    let late = Rc::clone(&load);
    reactor.call_later(LOAD_DEADLINE, move |reactor| {
        let mut late = late.borrow_mut();
        late.failures += (late.left + late.running).max(1) as u64;
        let _ = reactor.stop();
    });
    load
}

fn run_load(
    reactor: &mut Reactor,
    load: &SharedLoad,
    connections: usize,
    when_done: impl FnOnce(&mut Reactor) + 'static,
) {
    load.borrow_mut().left = connections;
    load.borrow_mut().when_done = Some(Box::new(when_done));
    for _ in 0..AT_A_TIME {
        next_connection(reactor, load);
    }
}

fn next_connection(reactor: &mut Reactor, load: &SharedLoad) {
    let mut state = load.borrow_mut();
    if state.left == 0 {
        if state.running == 0
            && let Some(when_done) = state.when_done.take()
        {
            reactor.defer(when_done);
        }
        return;
    }
    state.left -= 1;
    match reactor.connect_tcp(state.address, Client(Rc::clone(load))) {
        Ok(_) => state.running += 1,
        Err(error) => {
            log::error!("cannot connect: {error}");
            state.failures += 1;
        }
    }
}

/// Makes one connection.
struct Client(SharedLoad);

/// Asks once, and reads the answer to its end.
struct Request {
    load: SharedLoad,
    answer: Vec<u8>,
}

impl<T: Transport> Factory<T> for Client {
    type Protocol = Request;

    fn build_protocol(&mut self, _: &mut BuildContext<'_>, _: &Address) -> Option<Request> {
        Some(Request {
            load: Rc::clone(&self.0),
            answer: Vec::new(),
        })
    }

    fn connection_failed(&mut self, cx: &mut BuildContext<'_>, error: &ConnectError) {
        log::warn!("{error}");
        finished(cx.reactor, &self.0, None);
    }
}

impl<T: Transport> Protocol<T> for Request {
    fn connection_made(&mut self, cx: &mut Context<'_, T>) {
        cx.transport
            .write(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    }

    fn data_received(&mut self, _: &mut Context<'_, T>, data: &[u8]) {
        self.answer.extend_from_slice(data);
    }

    fn connection_lost(&mut self, cx: &mut Context<'_, T>, reason: &CloseReason) {
        let answer = String::from_utf8_lossy(&self.answer);
        let by = answer
            .strip_prefix("HTTP/1.1 200 OK\r\n")
            .and_then(|rest| rest.split_once("\r\n\r\nprocess "))
            .and_then(|(_, process)| process.trim_end().parse().ok());
        if by.is_none() {
            log::warn!("no answer: {reason}");
        }
        finished(cx.reactor, &self.load, by);
    }
}

fn finished(reactor: &mut Reactor, load: &SharedLoad, by: Option<u32>) {
    let mut state = load.borrow_mut();
    state.running -= 1;
    match by {
        Some(process) => *state.answers.entry(process).or_default() += 1,
        None => state.failures += 1,
    }
    drop(state);
    next_connection(reactor, load);
}

fn print_table(pool: &Pool, load: &Load, took: Duration) -> common::Result {
    println!("{:>10} {:>12} {:>9}", "worker", "connections", "answers");
    for (pid, given) in &pool.ended {
        let answers = load.answers.get(pid).copied().unwrap_or_default();
        println!("{pid:>10} {given:>12} {answers:>9}");
    }
    let answers: u64 = load.answers.values().sum();
    println!("{:>10} {:>12} {answers:>9}", "all", pool.passed);
    println!(
        "{} descriptors passed, {} failures, {} ms",
        pool.passed,
        load.failures,
        took.as_millis()
    );
    if load.failures > 0 {
        return Err(format!("{} connections failed", load.failures).into());
    }
    Ok(())
}
