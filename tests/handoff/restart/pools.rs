//! Programs with workers that are restarted: connections of workers move to the workers of
//! the next process, whoever accepts them; what cannot move is served to the end.
//!
//! The program is this test binary. It counts the lines of each connection, and answers
//! each with the count and its process.

use std::cell::OnceCell;
use std::fs::{self, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{self, Command, Stdio};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use bowline::endpoint::Adopt as _;
use bowline::handoff::pool::{
    Accepting, Live, PassedConnection, Pool, PoolSettings, Service, Worker, WorkerId,
    WorkerSettings, inherited_channel, spawn_command,
};
use bowline::handoff::restart::{
    Listeners, Movable, MoveTicket, Moved, Packed, Program, Restart, RestartSettings, Start,
};
use bowline::{Context, GracefulStop, Protocol, Reactor, Tcp, Transport, Transports};
use rustix::process::{Pid, Signal, kill_process};

use crate::support::figures::{Bound, Figures, scaled};
use crate::support::waiting::{await_end_of, await_in, is_running};

/// Says to the test that it is to be the program, and where its files are.
pub(crate) const DIRECTORY: &str = "BOWLINE_TEST_POOL_SERVER";

/// Says that it is to be a worker of it.
const WORKER: &str = "BOWLINE_TEST_POOL_WORKER";

const TEST: &str = "restart::pool_process";

/// How long a step may take on any machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// How long connections have that do not move.
const DRAIN: Duration = Duration::from_secs(60);

// The program.

fn command(directory: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().expect("Linux knows"));
    command
        .args(["--exact", "--nocapture", TEST])
        .env(DIRECTORY, directory)
        .env_remove("NOTIFY_SOCKET")
        .env_remove(WORKER)
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    command
}

pub(crate) fn run(directory: &Path) {
    let _ = env_logger::try_init();
    match std::env::var_os(WORKER) {
        Some(_) => work(),
        None => serve(directory),
    }
}

struct Server {
    directory: std::path::PathBuf,
    pool: Option<Pool>,
    address: Option<SocketAddr>,
}

fn serve(directory: &Path) {
    let mut reactor = Reactor::new().expect("epoll");
    let settings = RestartSettings::new(directory.join("control")).drain(DRAIN);
    let restart = Rc::<OnceCell<Restart>>::default();
    let (of_signal, own) = (Rc::clone(&restart), directory.to_owned());
    let hangup = move |reactor: &mut Reactor, _| {
        if let Some(restart) = of_signal.get() {
            restart
                .start_successor(reactor, command(&own))
                .expect("none is under way");
        }
    };
    reactor
        .on_signals(&[Signal::HUP.as_raw()], hangup)
        .expect("a handler");
    let stop = GracefulStop::new().deadline(DRAIN);
    reactor.stop_on_signals_with(stop).expect("a handler");
    let server = Server {
        directory: directory.to_owned(),
        pool: None,
        address: None,
    };
    let begun = Restart::begin(&mut reactor, settings, server).expect("it begins");
    restart.set(begun).expect("it is the first");
    reactor.run().expect("it serves");
}

impl Program for Server {
    fn listen(&mut self, reactor: &mut Reactor, listeners: &mut Listeners<'_>) -> io::Result<()> {
        let accepting = match self.directory.join("by workers").exists() {
            true => Accepting::ByWorkers,
            false => Accepting::ByPool,
        };
        let settings = PoolSettings::default()
            .workers(2)
            .accepting(accepting)
            .drain_timeout(Some(DRAIN));
        let directory = self.directory.clone();
        let worker = move |_: WorkerId| {
            let mut command = command(&directory);
            command.env(WORKER, "1");
            command
        };
        let pool = Pool::start(reactor, settings, spawn_command(worker));
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let listener = listeners.pool(reactor, "web", Tcp::at(any), &pool, 3)?;
        let listening = reactor.get(listener).expect("it listens");
        self.address = listening.address().as_inet();
        self.pool = Some(pool);
        Ok(())
    }

    fn serving(&mut self, _: &mut Reactor, _: Start) {
        let address = self.address.expect("it listens");
        let log = self.directory.join("log");
        let log = OpenOptions::new().append(true).create(true).open(log);
        let line = format!("{} {address}\n", process::id());
        log.and_then(|mut log| log.write_all(line.as_bytes()))
            .expect("ours");
    }

    fn takes(&self, kind: &str) -> bool {
        kind == "count"
    }
}

fn work() {
    let channel = inherited_channel().expect("it was given");
    let mut reactor = Reactor::new().expect("epoll");
    let settings = WorkerSettings::default();
    Worker::start(&mut reactor, channel, settings, Counting).expect("a channel");
    reactor.run().expect("it serves");
}

struct Counting;

impl Service for Counting {
    fn serve(&mut self, reactor: &mut Reactor, connection: PassedConnection, live: Live) {
        // Reset by its client, if not.
        let _ = connection.adopt(reactor, Tcp, Count::new(live, 0, Vec::new()));
    }

    fn takes(&self, kind: &str) -> bool {
        kind == "count"
    }

    fn serve_moved(&mut self, reactor: &mut Reactor, moved: Moved, live: Live) {
        let state = moved.packed.state.try_into().expect("four bytes");
        let count = Count::new(live, u32::from_be_bytes(state), moved.packed.unread);
        let _ = reactor.adopt(Tcp.with_unsent(moved.unsent), moved.fd, count);
    }
}

/// Answers each line with how many there were, and its process. A line "stay" has the
/// connection stay where it is.
struct Count {
    live: Live,
    ticket: Option<MoveTicket>,
    count: u32,
    stays: bool,
    partial: Vec<u8>,
}

impl Count {
    fn new(live: Live, count: u32, partial: Vec<u8>) -> Self {
        Self {
            live,
            ticket: None,
            count,
            stays: false,
            partial,
        }
    }
}

impl Protocol<bowline::TcpStream> for Count {
    fn connection_made(&mut self, cx: &mut Context<'_, bowline::TcpStream>) {
        let ticket = self
            .live
            .movable::<bowline::TcpStream, Self>(cx.transport.handle());
        self.ticket = Some(ticket);
    }

    fn data_received(&mut self, cx: &mut Context<'_, bowline::TcpStream>, data: &[u8]) {
        self.partial.extend_from_slice(data);
        while let Some(end) = self.partial.iter().position(|byte| *byte == b'\n') {
            self.stays |= &self.partial[..end] == b"stay";
            self.partial.drain(..=end);
            self.count += 1;
            let answer = format!("{} {}\n", self.count, process::id());
            cx.transport.write(answer.as_bytes());
        }
    }

    /// One that stays goes on while its client is there.
    fn is_idle(&self) -> bool {
        !self.stays
    }
}

impl Movable for Count {
    const KIND: &'static str = "count";

    fn pack(&mut self) -> Option<Packed> {
        (!self.stays).then(|| Packed {
            state: self.count.to_be_bytes().to_vec(),
            unread: std::mem::take(&mut self.partial),
            descriptors: Vec::new(),
        })
    }

    fn unpack(&mut self, packed: Packed) {
        self.partial = packed.unread;
    }
}

// The test.

/// A program that runs, and where it is.
struct Running {
    directory: tempfile::TempDir,
    /// The processes that have served, in order.
    pids: Vec<u32>,
    address: SocketAddr,
    first: process::Child,
}

impl Running {
    fn start(accepting: Accepting) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        if accepting == Accepting::ByWorkers {
            fs::write(directory.path().join("by workers"), "").expect("ours");
        }
        let first = command(directory.path()).spawn().expect("it starts");
        let nowhere = SocketAddr::from(([127, 0, 0, 1], 0));
        let mut this = Self {
            directory,
            pids: Vec::new(),
            address: nowhere,
            first,
        };
        this.await_server();
        this
    }

    /// Waits for the next process to serve.
    fn await_server(&mut self) {
        let folder = self.directory.path();
        let line = await_in(
            folder,
            PATIENCE,
            || "the next one serves".into(),
            || {
                let text = fs::read_to_string(folder.join("log")).unwrap_or_default();
                // Written in one piece, with its end.
                let line = text.split_inclusive('\n').nth(self.pids.len())?;
                Some(line.strip_suffix('\n')?.to_owned())
            },
        );
        let (pid, address) = line.split_once(' ').expect("both");
        self.pids.push(pid.parse().expect("a number"));
        self.address = address.parse().expect("an address");
    }

    fn pid(&self) -> u32 {
        *self.pids.last().expect("one serves")
    }

    fn restart(&mut self) {
        signal(self.pid(), Signal::HUP);
        self.await_server();
    }

    fn connect(&self) -> Client {
        Client::connect(self.address).expect("somebody listens")
    }

    /// Stops the one that serves, and waits for all to be gone.
    fn end(mut self) {
        if is_running(self.pid()) {
            signal(self.pid(), Signal::TERM);
        }
        let _ = self.first.wait();
        for pid in &self.pids {
            await_end_of(*pid, PATIENCE);
        }
    }
}

fn signal(pid: u32, signal: Signal) {
    let pid = Pid::from_raw(pid.cast_signed()).expect("a process");
    // It may have ended.
    let _ = kill_process(pid, signal);
}

/// A connection, with what it knows.
struct Client {
    stream: BufReader<TcpStream>,
    count: u32,
    /// Who has answered last.
    by: u32,
}

impl Client {
    fn connect(address: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Self {
            stream: BufReader::new(stream),
            count: 0,
            by: 0,
        })
    }

    /// Sends a line; an error says that the answer did not come, or that it is not the next
    /// of this connection.
    fn ask(&mut self, line: &str) -> io::Result<()> {
        self.stream.get_mut().write_all(line.as_bytes())?;
        let mut answer = String::new();
        self.stream.read_line(&mut answer)?;
        let parts = answer.trim_end().split_once(' ');
        let Some((count, by)) = parts else {
            return Err(io::ErrorKind::UnexpectedEof.into());
        };
        self.count += 1;
        self.by = by.parse().map_err(io::Error::other)?;
        if count != self.count.to_string() {
            let text = format!("answer {count}, after {}", self.count - 1);
            return Err(io::Error::other(text));
        }
        Ok(())
    }
}

/// What clients do in threads: ask on and on, on one connection or on a new one each time.
struct Load {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<(usize, Vec<String>)>>,
}

impl Load {
    fn start(address: SocketAddr) -> Self {
        let stop = Arc::<AtomicBool>::default();
        let run = |is_fresh: bool| {
            let stop = Arc::clone(&stop);
            thread::spawn(move || {
                let (mut asked, mut failed) = (0, Vec::new());
                let mut client = Client::connect(address);
                while !stop.load(Ordering::Relaxed) {
                    asked += 1;
                    let answered = client.and_then(|mut client| {
                        client.ask("line\n")?;
                        Ok(client)
                    });
                    client = match answered {
                        Ok(client) if !is_fresh => Ok(client),
                        Ok(_) => Client::connect(address),
                        Err(error) => {
                            failed.push(format!("{is_fresh} {error}"));
                            Client::connect(address)
                        }
                    };
                }
                (asked, failed)
            })
        };
        let threads = vec![run(false), run(false), run(true), run(true)];
        Self { stop, threads }
    }

    /// How many were asked, and what failed.
    fn end(self) -> (usize, Vec<String>) {
        self.stop.store(true, Ordering::Relaxed);
        let mut all = (0, Vec::new());
        for thread in self.threads {
            let (asked, failed) = thread.join().expect("it does not panic");
            all.0 += asked;
            all.1.extend(failed);
        }
        all
    }
}

fn restart_under_load(accepting: Accepting, name: &str) {
    let mut running = Running::start(accepting);
    let mut idle: Vec<Client> = (0..100).map(|_| running.connect()).collect();
    for client in &mut idle {
        client.ask("line\n").expect("somebody serves");
    }
    let load = Load::start(running.address);
    let rounds = scaled(3, 20);
    for _ in 0..rounds {
        let before: Vec<u32> = idle.iter().map(|client| client.by).collect();
        let mut stays = running.connect();
        stays.ask("stay\n").expect("somebody serves");
        let (old, served_by) = (running.pid(), stays.by);
        running.restart();
        for (client, before) in idle.iter_mut().zip(before) {
            let began = Instant::now();
            // It may be before its turn.
            while client.by == before {
                client.ask("line\n").expect("it has moved");
                assert!(began.elapsed() < PATIENCE, "it stays with {before}");
            }
        }
        stays.ask("line\n").expect("it stays where it is");
        assert_eq!(stays.by, served_by, "it has moved");
        assert!(
            is_running(old),
            "the old process is gone, and has a connection"
        );
        drop(stays);
        await_end_of(old, PATIENCE);
    }
    let (asked, failed) = load.end();
    Figures::of("T-29")
        .must(&format!("{name}: requests"), asked, Bound::AtLeast, 100)
        .must(&format!("{name}: failed"), failed.len(), Bound::Exactly, 0)
        .must(
            &format!("{name}: idle connections moved"),
            idle.len() * rounds,
            Bound::AtLeast,
            300,
        );
    assert!(failed.is_empty(), "{failed:?}");
    drop(idle);
    running.end();
}

/// Reliability T-29, T-31: workers that are passed connections.
#[test]
fn connections_of_workers_move_when_the_pool_accepts() {
    restart_under_load(Accepting::ByPool, "workers that are passed connections");
}

/// Reliability T-29, T-31: the same for workers that accept by themselves.
#[test]
fn connections_of_workers_move_when_workers_accept() {
    restart_under_load(Accepting::ByWorkers, "workers that accept");
}

/// Who is killed while connections move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    OldPool,
    OldWorker,
    NewPool,
    NewWorker,
}

/// Those of all its threads.
fn children(pid: u32) -> Vec<u32> {
    let threads = fs::read_dir(format!("/proc/{pid}/task"));
    let threads = threads.into_iter().flatten().flatten();
    let listed = threads.filter_map(|it| fs::read_to_string(it.path().join("children")).ok());
    let listed: Vec<String> = listed.collect();
    let numbers = listed.iter().flat_map(|it| it.split_whitespace());
    numbers.filter_map(|number| number.parse().ok()).collect()
}

/// The process that is killed, if it is there yet.
fn find(victim: Victim, old: u32, old_workers: &[u32]) -> Option<u32> {
    let successor = || {
        children(old)
            .into_iter()
            .find(|pid| !old_workers.contains(pid))
    };
    match victim {
        Victim::OldPool => Some(old),
        Victim::OldWorker => old_workers.first().copied(),
        Victim::NewPool => successor(),
        Victim::NewWorker => children(successor()?).first().copied(),
    }
}

/// How many of so many connections were lost, and how many of them the victim did not
/// have when it all began.
fn kill_while_moving(accepting: Accepting, victim: Victim, after: Duration) -> (usize, usize) {
    let mut running = Running::start(accepting);
    let mut all: Vec<Client> = (0..60).map(|_| running.connect()).collect();
    for client in &mut all {
        client.ask("line\n").expect("somebody serves");
    }
    let old = running.pid();
    let old_workers = children(old);
    signal(old, Signal::HUP);
    let began = Instant::now();
    let mut killed = None;
    while killed.is_none() {
        killed = find(victim, old, &old_workers).filter(|_| began.elapsed() >= after);
        assert!(began.elapsed() < PATIENCE, "{victim:?} never begins");
    }
    let killed = killed.expect("it is there");
    let mut processes = old_workers;
    processes.extend(children(old));
    signal(killed, Signal::KILL);
    let (mut lost, mut of_others) = (0, 0);
    for client in &mut all {
        let before = client.by;
        if let Err(error) = client.ask("line\n") {
            // It has ended; it does not hang, nor does it go on from elsewhere.
            let ends = [
                io::ErrorKind::UnexpectedEof,
                io::ErrorKind::ConnectionReset,
                io::ErrorKind::BrokenPipe,
            ];
            assert!(
                ends.contains(&error.kind()),
                "{victim:?} after {after:?}: {error}"
            );
            lost += 1;
            of_others += usize::from(before != killed);
        }
    }
    drop(all);
    // Whoever is left of all of them.
    let log = fs::read_to_string(running.directory.path().join("log")).unwrap_or_default();
    let served = log
        .lines()
        .filter_map(|line| line.split_once(' ')?.0.parse().ok());
    processes.extend(served.collect::<Vec<u32>>());
    for pid in processes {
        processes_end(pid);
    }
    let _ = running.first.kill();
    let _ = running.first.wait();
    (lost, of_others)
}

fn processes_end(pid: u32) {
    for child in children(pid) {
        signal(child, Signal::KILL);
    }
    signal(pid, Signal::KILL);
    await_end_of(pid, PATIENCE);
}

/// Reliability T-30: whoever is killed while connections of workers move, each goes on
/// where it stopped, in one process, or ends. Of a worker that is killed, only its own do.
#[test]
fn whoever_is_killed_while_connections_of_workers_move_none_hangs_or_is_doubled() {
    let (mut kills, mut lost_with, mut lost_beside) = (0, 0, 0);
    let all: &[u64] = scaled(&[2, 24], &[0, 2, 4, 8, 12, 16, 20, 24, 32, 48, 64]);
    for (round, after) in all.iter().enumerate() {
        let after = Duration::from_millis(*after);
        let accepting = match round % 2 {
            0 => Accepting::ByPool,
            _ => Accepting::ByWorkers,
        };
        let all = [
            Victim::OldPool,
            Victim::OldWorker,
            Victim::NewPool,
            Victim::NewWorker,
        ];
        for victim in all {
            let (lost, of_others) = kill_while_moving(accepting, victim, after);
            kills += 1;
            lost_with += lost;
            if victim == Victim::OldWorker {
                lost_beside += of_others;
            }
        }
    }
    Figures::of("T-30")
        .must(
            "processes with workers killed while they move",
            kills,
            Bound::AtLeast,
            8,
        )
        .must(
            "lost beside those of the worker killed",
            lost_beside,
            Bound::Exactly,
            0,
        )
        .remark(&format!(
            "of {} connections of workers, {lost_with} ended with who was killed",
            60 * kills
        ));
}
