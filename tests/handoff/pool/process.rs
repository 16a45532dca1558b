//! Worker processes: this test binary, told by a variable to be one.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio, exit};
use std::rc::Rc;
use std::time::{Duration, Instant};

use bowline::Tcp;
use bowline::handoff::pool::{
    Live, PassedConnection, Pool, PoolEvent, PoolSettings, WorkerRefusal, WorkerStage,
    WorkerStatistics,
};
use bowline::handoff::pool::{Service, Spawn, Worker, WorkerId, WorkerSettings};
use bowline::handoff::pool::{inherited_channel, spawn_command};
use bowline::policies::Backoff;
use bowline::{
    AfterReadClosed, AnyConnection as _, Context, Protocol, Reactor, TcpStream, Transport,
};
use rustix::process::{Pid, Signal, getpid, kill_process};

use crate::support::{open_descriptors, run_until_within};

/// How long all workers may take to end.
const PATIENCE: Duration = Duration::from_secs(120);

/// What the process is to do: [`Script`] in words.
const SCRIPT: &str = "BOWLINE_TEST_WORKER";

/// The file in which workers note whom they serve from its first byte on.
const LOG: &str = "BOWLINE_TEST_WORKER_LOG";

/// What a worker that has leaked or lost a descriptor exits with.
const UNBALANCED: i32 = 3;

/// Where a worker kills itself (SIGKILL), or what else it does that others do
/// not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Script {
    /// Answers everybody.
    Serve,
    /// Dies with a connection that it has received and not registered, this one
    /// or the first after it when it has no other.
    DieBeforeRegistering(u32),
    /// Dies when the pool has its answer, and nothing was read.
    DieAfterAnswering(u32),
    /// Dies with half of a request.
    DieInsideRequest(u32),
    /// Takes nothing.
    Refuse,
    /// Takes this many at a time.
    Limited(u32),
    /// Ends before it says hello.
    NeverReady,
}

impl Script {
    fn to_words(self) -> String {
        let (name, number) = match self {
            Self::Serve => ("serve", 0),
            Self::DieBeforeRegistering(number) => ("before-registering", number),
            Self::DieAfterAnswering(number) => ("after-answering", number),
            Self::DieInsideRequest(number) => ("inside-request", number),
            Self::Refuse => ("refuse", 0),
            Self::Limited(number) => ("limited", number),
            Self::NeverReady => ("never-ready", 0),
        };
        format!("{name} {number}")
    }

    fn from_words(words: &str) -> Self {
        let (name, number) = words.split_once(' ').expect("a name and a number");
        let number = number.parse().expect("a number");
        match name {
            "serve" => Self::Serve,
            "before-registering" => Self::DieBeforeRegistering(number),
            "after-answering" => Self::DieAfterAnswering(number),
            "inside-request" => Self::DieInsideRequest(number),
            "refuse" => Self::Refuse,
            "limited" => Self::Limited(number),
            "never-ready" => Self::NeverReady,
            name => panic!("no script {name}"),
        }
    }
}

/// Starts workers that follow the script that `choose` gives them.
pub(crate) fn scripted(
    log: PathBuf,
    mut choose: impl FnMut(WorkerId) -> Script + 'static,
) -> impl Spawn {
    let program = std::env::current_exe().expect("Linux knows");
    spawn_command(move |worker| {
        let mut command = Command::new(&program);
        command
            .args(["--exact", "--nocapture", "--test-threads=1"])
            .arg("pool::process::a_process_that_is_started_as_a_worker_is_one")
            .env(SCRIPT, choose(worker).to_words())
            .env(LOG, &log)
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        command
    })
}

/// Settings for tests: waits that a test can spend, limits that a slow machine
/// keeps.
pub(crate) fn settings(workers: usize) -> PoolSettings {
    let mut settings = PoolSettings::default();
    settings.workers = workers;
    settings.slow_after = Duration::from_secs(30);
    settings.ack_timeout = Duration::from_secs(30);
    settings.recalls = false;
    settings.kill_timeout = None;
    settings.queue_timeout = Duration::from_secs(60);
    settings.start_timeout = Duration::from_secs(60);
    settings.exit_timeout = Duration::from_secs(30);
    settings.drain_timeout = None;
    settings.max_attempts = 1_000;
    settings.backoff = Backoff::new()
        .first(Duration::from_millis(1))
        .cap(Duration::from_millis(5));
    settings
}

/// Counts the workers that end otherwise than killed, or with success and a
/// balanced ledger. `ready` is told of those that begin.
pub(crate) fn expect_clean_exits(
    pool: &Pool,
    mut ready: impl FnMut(WorkerId, u32) + 'static,
) -> Rc<Cell<usize>> {
    let unclean = Rc::new(Cell::new(0));
    let seen = Rc::clone(&unclean);
    pool.on_event(move |_, event| match event {
        PoolEvent::Ready { worker, pid } => ready(worker, pid),
        PoolEvent::Exited { status, .. } => {
            let code = status.and_then(|status| status.code());
            // None: by a signal.
            if code.is_some_and(|code| code != 0) {
                seen.set(seen.get() + 1);
            }
        }
        _ => {}
    });
    unclean
}

/// Stops the pool, and waits until all processes are gone.
pub(crate) fn end(reactor: &mut Reactor, pool: &Pool) {
    let stopped = Rc::new(Cell::new(false));
    let told = Rc::clone(&stopped);
    pool.stop(reactor, Duration::from_secs(60), move |_| told.set(true));
    run_until_within(PATIENCE, reactor, pool, |_| stopped.get());
}

/// Turns until `is_done`; says how the pool stands where that takes too long.
#[track_caller]
pub(crate) fn turn_until(
    reactor: &mut Reactor,
    pool: &Pool,
    is_done: impl FnMut(&mut Reactor) -> bool,
) {
    run_until_within(Duration::from_secs(60), reactor, pool, is_done);
}

/// Turns until all workers are there: otherwise one may have done it all before.
#[track_caller]
pub(crate) fn turn_until_serving(reactor: &mut Reactor, pool: &Pool) {
    let serves = |worker: &WorkerStatistics| worker.stage == WorkerStage::Serving;
    turn_until(reactor, pool, |_| {
        pool.statistics().workers.iter().all(serves)
    });
}

pub(crate) fn signal(pid: u32, signal: Signal) {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    kill_process(pid.expect("a process"), signal).expect("it is there");
}

/// What a test has stopped. It goes on with the test's end, and ends with it then, also
/// where the test has failed: it holds the output open that others read to its end.
struct Stopped(RefCell<Vec<u32>>);

impl Drop for Stopped {
    fn drop(&mut self) {
        for pid in self.0.take() {
            let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
            // It may be gone.
            let _ = kill_process(pid.expect("a process"), Signal::CONT);
        }
    }
}

thread_local! {
    static STOPPED: Stopped = const { Stopped(RefCell::new(Vec::new())) };
}

/// Stops a process, and waits until it has stopped: the signal may find it
/// running, on another processor.
pub(crate) fn stop(pid: u32) {
    signal(pid, Signal::STOP);
    STOPPED.with(|stopped| stopped.0.borrow_mut().push(pid));
    let is_running = || {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("it is there");
        !stat.contains(") T ")
    };
    let began = Instant::now();
    while is_running() {
        assert!(began.elapsed() < PATIENCE, "it does not stop");
        std::thread::yield_now();
    }
}

/// What a worker notes when it takes a connection, before it answers: the port of the
/// client.
const TAKES: &str = "takes";

/// And when it is over.
const IS_OVER: &str = "over";

/// What a process had to do with connections, by its own account.
#[derive(Default)]
pub(crate) struct Account {
    /// The ports of the clients whose connections it had when it ended.
    pub(crate) held: BTreeSet<u16>,
    /// How many were over before that.
    pub(crate) over: u64,
}

/// The accounts of all workers, by their process.
pub(crate) fn accounts(log: &Path) -> BTreeMap<u32, Account> {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let mut accounts: BTreeMap<u32, Account> = BTreeMap::new();
    for line in text.lines() {
        let words: Vec<_> = line.split(' ').collect();
        let [what, port, process] = words[..] else {
            continue;
        };
        let (port, process) = (port.parse().expect("a port"), process.parse());
        let account = accounts.entry(process.expect("a number")).or_default();
        if what == TAKES {
            account.held.insert(port);
        } else {
            account.held.remove(&port);
            account.over += 1;
        }
    }
    accounts
}

/// Whom each connection was served by from its first byte on: its number, and
/// the process, in order.
pub(crate) fn served(log: &Path) -> Vec<(u32, u32)> {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    text.lines()
        .filter(|line| !line.starts_with(TAKES) && !line.starts_with(IS_OVER))
        .map(|line| {
            let (number, process) = line.split_once(' ').expect("two numbers");
            let number = number.parse().expect("a number");
            (number, process.parse().expect("a number"))
        })
        .collect()
}

/// The process of a worker, when this binary was started as one; nothing
/// otherwise.
#[test]
fn a_process_that_is_started_as_a_worker_is_one() {
    if let Ok(words) = std::env::var(SCRIPT) {
        exit(run(Script::from_words(&words)));
    }
}

fn run(script: Script) -> i32 {
    if script == Script::NeverReady {
        return 0;
    }
    let channel = inherited_channel().expect("it was given");
    let mut before = open_descriptors();
    let number = std::os::fd::AsRawFd::as_raw_fd(&channel);
    assert!(before.remove(&number), "it is open");
    let log = std::env::var_os(LOG).expect("it was given");
    let log = OpenOptions::new().append(true).create(true).open(log);
    let service = Scripted {
        script,
        log: Rc::new(log.expect("it can be written")),
        admitted: 0,
        open: Rc::default(),
        begun: 0,
    };
    let mut reactor = Reactor::new().expect("a reactor");
    let mut settings = WorkerSettings::default();
    if let Script::Limited(count) = script {
        settings.max_live = Some(count);
    }
    Worker::start(&mut reactor, channel, settings, service).expect("a channel");
    reactor.run().expect("it runs");
    drop(reactor);
    if open_descriptors() == before {
        0
    } else {
        UNBALANCED
    }
}

pub(crate) fn die() -> ! {
    kill_process(getpid(), Signal::KILL).expect("it is ours");
    loop {
        std::thread::park();
    }
}

struct Scripted {
    script: Script,
    log: Rc<File>,
    admitted: u32,
    /// Admitted, and not over.
    open: Rc<Cell<u32>>,
    begun: u32,
}

impl Service for Scripted {
    fn admit(
        &mut self,
        _: &mut Reactor,
        connection: &PassedConnection,
    ) -> Result<(), WorkerRefusal> {
        self.admitted += 1;
        note(&self.log, TAKES, port_of(connection));
        match self.script {
            Script::DieBeforeRegistering(number)
                if self.admitted >= number && self.open.get() == 0 =>
            {
                die();
            }
            Script::Refuse => {
                note(&self.log, IS_OVER, port_of(connection));
                return Err(WorkerRefusal::Unwanted);
            }
            _ => {}
        }
        self.open.set(self.open.get() + 1);
        Ok(())
    }

    fn serve(&mut self, reactor: &mut Reactor, connection: PassedConnection, live: Live) {
        self.begun += 1;
        if matches!(self.script, Script::DieAfterAnswering(number) if self.begun >= number) {
            die();
        }
        let answerer = Answerer {
            dies: matches!(self.script, Script::DieInsideRequest(number) if self.begun >= number),
            log: Rc::clone(&self.log),
            request: Vec::new(),
            port: port_of(&connection),
            open: Rc::clone(&self.open),
            _live: live,
        };
        // Reset by its client, if not.
        let _ = connection.adopt(reactor, Tcp, answerer);
    }
}

/// The port of the client, of a connection that is not over.
fn port_of(connection: &PassedConnection) -> u16 {
    let peer = rustix::net::getpeername(&connection.fd).ok().flatten();
    let peer = peer.and_then(|peer| SocketAddr::try_from(peer).ok());
    peer.map_or(0, |peer| peer.port())
}

/// One call, so that lines of several processes do not mix.
fn note(mut log: &File, what: &str, port: u16) {
    let note = format!("{what} {port} {}\n", std::process::id());
    log.write_all(note.as_bytes()).expect("it can be written");
}

/// Answers lines with a number: with that, and its process. "stay" before the
/// number keeps the connection for another line.
struct Answerer {
    dies: bool,
    log: Rc<File>,
    request: Vec<u8>,
    port: u16,
    open: Rc<Cell<u32>>,
    _live: Live,
}

impl Drop for Answerer {
    fn drop(&mut self) {
        self.open.set(self.open.get() - 1);
        note(&self.log, IS_OVER, self.port);
    }
}

impl Protocol<TcpStream> for Answerer {
    fn data_received(&mut self, cx: &mut Context<'_, TcpStream>, data: &[u8]) {
        self.request.extend_from_slice(data);
        if self.dies {
            die();
        }
        let Some(line) = self.request.strip_suffix(b"\n") else {
            return;
        };
        let line = std::str::from_utf8(line).expect("text");
        let (stays, number) = match line.strip_prefix("stay ") {
            Some(number) => (true, number),
            None => (false, line),
        };
        let process = std::process::id();
        // One call, so that lines of several processes do not mix.
        let note = format!("{number} {process}\n");
        (&*self.log)
            .write_all(note.as_bytes())
            .expect("it can be written");
        cx.transport.write(note.as_bytes());
        if !stays {
            cx.transport.lose_connection();
        }
        self.request.clear();
    }

    fn read_connection_lost(&mut self, _: &mut Context<'_, TcpStream>) -> AfterReadClosed {
        AfterReadClosed::LoseConnection
    }
}
