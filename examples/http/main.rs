//! A web server: static files over HTTP/1.1, by worker processes, restarted without
//! losing a request.
//!
//! ```text
//! cargo run --release --example http -- --root . --metrics tcp:127.0.0.1:9090
//! curl http://127.0.0.1:8080/README.md
//! curl http://127.0.0.1:9090/metrics
//! kill -HUP PID       # a new process takes over, while requests go on
//! kill PID            # answers what has arrived, and ends
//! ```
//!
//! This process accepts, and passes each connection to a worker (`worker.rs`). It is
//! replaced on SIGHUP by the program that stands at its path then. Connections that are
//! open move to its workers, those with TLS too; those that are being sent a file are told,
//! and served to the end where they are. `connection.rs` is the protocol. Under systemd it
//! takes the sockets `web` and `metrics` (`--listen systemd:name=web`) and says what it does.

#![allow(clippy::print_stdout)]

#[path = "../common/mod.rs"]
mod common;
mod connection;
mod worker;

use std::cell::{Cell, RefCell};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{self, Command};
use std::rc::Rc;

use bowline::descriptor::EventCounter;
use bowline::endpoint::ServerEndpoint;
use bowline::handoff::pool::{CHANNEL_NUMBER, Pool, PoolSettings, Spawned, WorkerId};
use bowline::handoff::restart::{Listeners, Movable as _, Program, Restart};
use bowline::handoff::restart::{RestartError, RestartSettings};
use bowline::handoff::systemd::{self, Notifier, Watchdog};
use bowline::layers::LayerState;
use bowline::process::spawn_with_descriptors;
use bowline::signal::SIGHUP;
use bowline::{Address, GracefulStop, Reactor};

use crate::common::{Arguments, Inspect, STOP_DEADLINE, WorkersTls};
use crate::connection::{Body, Http, Response, Site};

const HELP: &str = "
A web server whose workers are passed their connections. SIGHUP restarts it.

Usage: http --root DIRECTORY [--listen ENDPOINT] [--tls CERT KEY] [--metrics ENDPOINT]
            [--workers N] [--state DIRECTORY]

  --root DIRECTORY    what is served
  --listen ENDPOINT   where [default: tcp:127.0.0.1:8080:backlog=4096:nodelay=1]
  --tls CERT KEY      HTTPS, which the workers speak: two PEM files
  --metrics ENDPOINT  where its counts are shown, at /metrics
  --workers N         how many worker processes [default: one for each processor]
  --state DIRECTORY   where processes find each other; ours alone [default:
                      bowline-http in the directory of temporary files]
  --inspect PLACE     show what is inside: on a UNIX socket (a path),
                      or to browsers (an address)
";

/// The hidden argument of a worker.
const WORKER: &str = "--worker";
/// The descriptor of the counter that all workers share.
const COUNTER_NUMBER: u32 = CHANNEL_NUMBER + 1;

fn main() -> common::Result {
    env_logger::init();
    let mut arguments = Arguments::parse(HELP);
    let inspect = Inspect::take(&mut arguments)?;
    let is_worker = arguments.flag(WORKER);
    let root = arguments.option::<PathBuf>("--root")?;
    let root = root.ok_or("--root DIRECTORY, please; try --help")?;
    let files = arguments.tls_files()?;
    if is_worker {
        return worker::run(&root, files);
    }
    let listen = arguments.option("--listen")?;
    let metrics = arguments.option("--metrics")?;
    let workers = arguments.option("--workers")?;
    let state = arguments.option("--state")?;
    arguments.finish()?;
    // First of all, while nothing else is open and no thread runs.
    let inherited = systemd::inherited()?;
    let mut reactor = Reactor::new()?;
    let notifier = Notifier::from_environment()?.map(Rc::new);
    let _watchdog = (notifier.clone()).and_then(|it| Watchdog::from_environment(&mut reactor, it));
    let state = state.unwrap_or_else(|| std::env::temp_dir().join("bowline-http"));
    let settings = RestartSettings::new(state)
        .inherited(inherited)
        .drain(STOP_DEADLINE)
        .notifier(notifier);
    let server = Server {
        inspect,
        listen: match listen {
            Some(listen) => Some(listen),
            None => Some("tcp:127.0.0.1:8080:backlog=4096:nodelay=1".parse()?),
        },
        metrics,
        root,
        tls: files.map(WorkersTls::new).transpose()?.map(Rc::new),
        workers: workers.unwrap_or_else(|| PoolSettings::default().workers),
    };
    let restart = Rc::new(RefCell::new(None));
    restart_on_hangup(&mut reactor, &restart)?;
    reactor.stop_on_signals_with(GracefulStop::new().deadline(STOP_DEADLINE))?;
    restart.replace(Some(Restart::begin(&mut reactor, settings, server)?));
    reactor.run()?;
    Ok(())
}

/// Before anyone can know that we are there: SIGHUP would end us.
fn restart_on_hangup(
    reactor: &mut Reactor,
    restart: &Rc<RefCell<Option<Restart>>>,
) -> common::Result {
    let restart = Rc::clone(restart);
    reactor.on_signals(&[SIGHUP], move |reactor, _| {
        // By its path: a new version may stand there.
        let mut arguments = std::env::args_os();
        let mut command = Command::new(arguments.next().unwrap_or_default());
        command.args(arguments).stdin(process::Stdio::null());
        if let Some(restart) = restart.borrow().as_ref()
            && let Err(error) = restart.start_successor(reactor, command)
        {
            log::warn!("no restart now: {error}");
        }
    })?;
    Ok(())
}

/// The accepting process.
struct Server {
    inspect: Option<Inspect>,
    listen: Option<ServerEndpoint>,
    metrics: Option<ServerEndpoint>,
    root: PathBuf,
    tls: Option<Rc<WorkersTls>>,
    workers: usize,
}

impl Program for Server {
    fn listen(&mut self, reactor: &mut Reactor, listeners: &mut Listeners<'_>) -> io::Result<()> {
        let counter = EventCounter::new()?;
        let pool = self.start_pool(reactor, counter.try_clone()?);
        // Called once, and an endpoint may hold a socket.
        let listen = self.listen.take().ok_or(io::ErrorKind::InvalidInput)?;
        // Its workers' connections move to those of the next process.
        let web = listen.pool_among(listeners, reactor, "web", &pool, 0)?;
        let mut addresses = vec![("listening", web)];
        if let Some(metrics) = self.metrics.take() {
            let site = show_metrics(pool, counter);
            let http = move |_: &Address| Http::new(&site, None);
            let listener = metrics.listen_among(listeners, reactor, "metrics", http)?;
            addresses.push(("metrics", listener));
        }
        Inspect::show_among(self.inspect.as_ref(), listeners, reactor)?;
        for (what, listener) in addresses {
            if let Some(listener) = reactor.get(listener) {
                // A successor has inherited standard output, whose reader may be gone.
                let _ = writeln!(io::stdout(), "{what} on {}", listener.address());
            }
        }
        Ok(())
    }

    fn successor_failed(&mut self, _: &mut Reactor, error: &RestartError) {
        log::error!("serving on: {error}");
    }

    fn takes(&self, kind: &str) -> bool {
        kind == Http::KIND
    }

    /// With TLS, those whose version and suite workers have.
    fn takes_layers(&self, _: &str, layers: &[LayerState]) -> bool {
        match (&self.tls, layers) {
            (None, []) => true,
            (Some(tls), [state]) => tls.can_resume(state),
            _ => false,
        }
    }
}

impl Server {
    fn start_pool(&self, reactor: &mut Reactor, counter: EventCounter) -> Pool {
        let settings = PoolSettings::default()
            .workers(self.workers.max(1))
            .drain_timeout(Some(STOP_DEADLINE));
        let (root, tls) = (self.root.clone(), self.tls.clone());
        let spawn = move |_: &mut Reactor, _: WorkerId| {
            let (ours, theirs) = UnixStream::pair()?;
            // The version that this process is of, whatever stands at its path now.
            let mut command = Command::new("/proc/self/exe");
            command.arg(WORKER).arg("--root").arg(&root);
            if let Some(tls) = &tls {
                tls.give(&mut command)?;
            }
            let granted = [
                (theirs.as_fd(), CHANNEL_NUMBER),
                (counter.as_fd(), COUNTER_NUMBER),
            ];
            Ok(Spawned {
                channel: ours,
                process: Box::new(spawn_with_descriptors(command, &granted)?),
            })
        };
        Pool::start(reactor, settings, spawn)
    }
}

/// The counts of this process and its workers, as Prometheus reads them. They begin
/// anew with each restart.
fn show_metrics(pool: Pool, counter: EventCounter) -> Site {
    let requests = Cell::new(0);
    Rc::new(move |target| {
        if target != "/metrics" {
            return Response::not_found();
        }
        // An error would leave the count where it is, for the next time.
        requests.set(requests.get() + counter.take().unwrap_or(0));
        let pool = pool.statistics();
        let live: u32 = pool.workers.iter().map(|worker| worker.live).sum();
        let rows = [
            ("http_requests_total", requests.get()),
            ("http_connections_total", pool.acknowledged),
            ("http_connections", u64::from(live)),
            ("http_connections_waiting", pool.waiting as u64),
            ("http_workers", pool.workers.len() as u64),
            ("http_worker_deaths_total", pool.deaths),
            ("http_process_id", u64::from(process::id())),
        ];
        let text: String = (rows.iter())
            .map(|(name, value)| format!("{name} {value}\n"))
            .collect();
        Response::ok("text/plain; version=0.0.4", Body::Text(text))
    })
}
