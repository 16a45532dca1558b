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
//! This file is the acceptor, `worker.rs` a worker, and `load.rs` makes the
//! load.
//!
//! SIGTERM stops in an orderly way: the acceptor closes its listener and its
//! half of the channels, and each worker ends when everything that it was
//! passed has been answered.

#![allow(clippy::print_stdout)]

#[path = "../common/mod.rs"]
mod common;
mod load;
mod worker;

use std::cell::RefCell;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::process::{Child, Command};
use std::rc::Rc;
use std::time::{Duration, Instant};

use bowline::{Address, BuildContext, CloseReason, Context, Hold, ListenerHandle};
use bowline::{PassedDescriptor, Phase, Protocol, Reactor, SystemEvent, TcpListenOptions};
use bowline::{Transports, UnixTransport, UnixTransportHandle};

use crate::common::Arguments;
use crate::load::Load;

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
        worker::run()
    } else {
        let listen = listen.unwrap_or_else(|| SocketAddr::from(([127, 0, 0, 1], 0)));
        accept(listen, workers.unwrap_or(2), serve)
    }
}

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
        Some(load::start(&mut reactor, &pool, address.ok_or("not TCP")?))
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
