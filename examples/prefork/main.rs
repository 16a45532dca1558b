//! A prefork server: one process accepts, and passes every connection to one of
//! its worker processes, which answers HTTP with its process id.
//!
//! ```text
//! cargo run --release --example prefork
//! cargo run --release --example prefork -- --serve --listen tcp:127.0.0.1:8080 --workers 4
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
//! The accepting process has a [`Pool`], whose acceptor passes each socket on as
//! it is; a worker has a [`Worker`](bowline::handoff::pool::Worker). What a worker
//! had not taken when it died goes to another one; what it had, dies with it.
//!
//! This file is the acceptor, `worker.rs` a worker, and `load.rs` makes the
//! load.
//!
//! SIGTERM stops in an orderly way: the acceptor closes its listener and has
//! each worker answer everything that it was passed.

#![allow(clippy::print_stdout)]

#[path = "../common/mod.rs"]
mod common;
mod load;
mod worker;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;
use std::process::Command;
use std::rc::Rc;
use std::time::{Duration, Instant};

use bowline::endpoint::ServerEndpoint;
use bowline::handoff::pool::{Pool, PoolEvent, PoolSettings, WorkerId, spawn_command};
use bowline::{GracefulStop, Reactor};

use crate::common::{Arguments, Inspect, STOP_DEADLINE, WorkersTls};
use crate::load::Load;

const HELP: &str = "
A server whose workers are processes that are passed their connections.

Usage: prefork [--serve] [--listen ENDPOINT] [--tls CERT KEY] [--workers N]

  --serve             stay up; without it, run a short load and end
  --listen ENDPOINT   where to accept, on TCP [default: tcp:127.0.0.1:0:nodelay=1]
  --tls CERT KEY      with TLS, which the workers speak: two PEM files
  --workers N         how many worker processes [default: 2]
  --inspect PLACE     show what is inside: on a UNIX socket (a path),
                      or to browsers (an address)
";

/// The hidden argument of a worker.
const WORKER: &str = "--worker";

fn main() -> common::Result {
    env_logger::init();
    let mut arguments = Arguments::parse(HELP);
    let inspect = Inspect::take(&mut arguments)?;
    let is_worker = arguments.flag(WORKER);
    let serve = arguments.flag("--serve");
    let listen = arguments.option("--listen")?;
    let workers = arguments.option("--workers")?;
    let files = arguments.tls_files()?;
    arguments.finish()?;
    if is_worker {
        worker::run(files)
    } else {
        if files.is_some() && !serve {
            return Err("--tls is for --serve: the load is in the clear".into());
        }
        let listen = match listen {
            Some(listen) => listen,
            None => "tcp:127.0.0.1:0:nodelay=1".parse()?,
        };
        accept(listen, files, workers.unwrap_or(2), serve, inspect.as_ref())
    }
}

/// Nobody would be served.
const MAX_FAILED_STARTS: u32 = 20;

/// How many connections each process has taken, by its id: told when it ends.
type Taken = Rc<RefCell<BTreeMap<u32, u64>>>;

fn accept(
    endpoint: ServerEndpoint,
    tls: Option<[String; 2]>,
    workers: usize,
    serve: bool,
    inspect: Option<&Inspect>,
) -> common::Result {
    let mut reactor = Reactor::new()?;
    Inspect::show(inspect, &mut reactor)?;
    let settings = PoolSettings::default()
        .workers(workers.max(1))
        .drain_timeout(Some(STOP_DEADLINE))
        .max_failed_starts(Some(MAX_FAILED_STARTS));
    let program = std::env::current_exe()?;
    let tls = tls.map(WorkersTls::new).transpose()?;
    let command = move |_: WorkerId| {
        let mut command = Command::new(&program);
        command.arg(WORKER);
        if let Some(tls) = &tls
            && let Err(error) = tls.give(&mut command)
        {
            log::error!("a worker will not start: {error}");
        }
        command
    };
    let pool = Pool::start(&mut reactor, settings, spawn_command(command));

    let listener = endpoint.accept(&mut reactor, pool.acceptor(0))?;
    reactor.stop_on_signals_with(GracefulStop::new().deadline(STOP_DEADLINE))?;
    common::print_address(&mut reactor, listener);

    let load = if serve {
        None
    } else {
        let listening = reactor.get(listener).map(|listener| listener.address());
        let address = listening.and_then(|address| address.as_inet());
        Some(load::start(&mut reactor, &pool, address.ok_or("not TCP")?))
    };
    let taken = Taken::default();
    watch(&pool, load.clone(), Rc::clone(&taken));

    let started = Instant::now();
    reactor.run()?;
    match load {
        Some(load) => print_table(&pool, &taken.borrow(), &load.borrow(), started.elapsed()),
        None => Ok(()),
    }
}

/// Notes what workers have done, and goes on with the load once the one that was
/// killed is replaced.
fn watch(pool: &Pool, load: Option<load::SharedLoad>, taken: Taken) {
    pool.on_event(move |reactor, event| match event {
        PoolEvent::Ready { .. } => {
            if let Some(load) = &load {
                load::worker_ready(reactor, load);
            }
        }
        PoolEvent::Lost {
            pid, acknowledged, ..
        } => {
            taken.borrow_mut().insert(pid, acknowledged);
        }
        PoolEvent::Exited { pid, status, .. } => log::info!("worker {pid}: {status:?}"),
        PoolEvent::GaveUp { failures } => {
            let text = format!("{failures} workers in a row could not be started");
            reactor.fail(io::Error::other(text));
        }
        _ => {}
    });
}

fn print_table(
    pool: &Pool,
    taken: &BTreeMap<u32, u64>,
    load: &Load,
    took: Duration,
) -> common::Result {
    println!("{:>10} {:>12} {:>9}", "worker", "connections", "answers");
    for (pid, connections) in taken {
        let answers = load.answers.get(pid).copied().unwrap_or_default();
        println!("{pid:>10} {connections:>12} {answers:>9}");
    }
    let answers: u64 = load.answers.values().sum();
    let statistics = pool.statistics();
    println!("{:>10} {:>12} {answers:>9}", "all", statistics.acknowledged);
    println!(
        "{} descriptors passed, {} failures, {} ms; {} were given out again",
        statistics.acknowledged,
        load.failures,
        took.as_millis(),
        statistics.resent
    );
    if load.failures > 0 {
        return Err(format!("{} connections failed", load.failures).into());
    }
    Ok(())
}
