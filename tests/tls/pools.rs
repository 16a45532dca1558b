//! Pools whose workers speak TLS: they shake hands with who is passed to them, or whom they
//! accept, go on with each other's sessions, and give live connections to the workers of the
//! next process.
//!
//! The program and its workers are this test binary; what they seal is noted as in
//! `restart.rs`, whose clients these are.

use std::cell::OnceCell;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::rc::Rc;
use std::time::{Duration, Instant};

use bowline::endpoint::Adopt as _;
use bowline::handoff::pool::{
    Accepting, Live, PassedConnection, Pool, PoolSettings, Service, Worker, WorkerId,
    WorkerSettings, inherited_channel, spawn_command,
};
use bowline::handoff::restart::{
    Listeners, Movable, MoveTicket, Moved, Packed, Program, Restart, RestartSettings, Start,
};
use bowline::layers::{LayerState, StreamTransport};
use bowline::tls::TlsServer;
use bowline::tls::rustls::HandshakeKind;
use bowline::{AfterReadClosed, Context, GracefulStop, Protocol, Reactor, Tcp, Transports};
use rustix::process::Signal;

use crate::restart::{Client, Clients, Processes, command_of, go_on_until, log, server_config};
use crate::support::figures::{Bound, Figures};
use crate::support::waiting::await_exit;
use crate::support::{DEADLINE, DescriptorLedger};

/// Says to the test that it is to be the program, and where its files are.
const DIRECTORY: &str = "BOWLINE_TLS_TEST_POOL";

/// Says that it is to be a worker of it.
const WORKER: &str = "BOWLINE_TLS_TEST_WORKER";

/// How long connections have that do not move.
const DRAIN: Duration = Duration::from_secs(60);

#[test]
fn pool_process() {
    let Some(directory) = std::env::var_os(DIRECTORY).map(PathBuf::from) else {
        return;
    };
    let _ = env_logger::try_init();
    match std::env::var_os(WORKER) {
        Some(_) => work(directory),
        None => serve(&directory),
    }
}

fn command(directory: &Path) -> Command {
    let mut command = command_of("pools::pool_process", DIRECTORY, directory);
    command.env_remove(WORKER);
    command
}

fn serve(directory: &Path) {
    let mut reactor = Reactor::new().unwrap();
    let restart = Rc::<OnceCell<Restart>>::default();
    let (of_signal, own) = (Rc::clone(&restart), directory.to_owned());
    let hangup = move |reactor: &mut Reactor, _| {
        if let Some(restart) = of_signal.get() {
            restart.start_successor(reactor, command(&own)).unwrap();
        }
    };
    reactor.on_signals(&[Signal::HUP.as_raw()], hangup).unwrap();
    let stop = GracefulStop::new().deadline(DRAIN);
    reactor.stop_on_signals_with(stop).unwrap();
    let server = Server {
        directory: directory.to_owned(),
        // To look at what comes, for workers.
        tls: TlsServer::new(server_config(directory)),
        pool: None,
    };
    let settings = RestartSettings::new(directory.join("control")).drain(DRAIN);
    let begun = Restart::begin(&mut reactor, settings, server).unwrap();
    restart.set(begun).unwrap();
    reactor.run().unwrap();
    log(directory, "ended");
}

struct Server {
    directory: PathBuf,
    tls: TlsServer,
    pool: Option<Pool>,
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
        let listener = listeners.pool(reactor, "web", Tcp::at(any), &pool, 0)?;
        let address = reactor.get(listener).unwrap().address().to_string();
        std::fs::write(self.directory.join("address"), address)?;
        self.pool = Some(pool);
        Ok(())
    }

    fn serving(&mut self, _: &mut Reactor, start: Start) {
        match start {
            Start::TookOver { pid, .. } => log(&self.directory, &format!("took over from {pid}")),
            _ => log(&self.directory, "serves"),
        }
    }

    fn takes(&self, kind: &str) -> bool {
        kind == Echo::KIND
    }

    fn takes_layers(&self, _: &str, layers: &[LayerState]) -> bool {
        let is_fit = matches!(layers, [state] if self.tls.can_resume(state));
        is_fit && !self.directory.join("refuses").exists()
    }
}

fn work(directory: PathBuf) {
    let channel = inherited_channel().unwrap();
    let mut reactor = Reactor::new().unwrap();
    let service = Secured {
        tls: TlsServer::new(server_config(&directory)).may_move(true),
        directory,
    };
    Worker::start(&mut reactor, channel, WorkerSettings::default(), service).unwrap();
    reactor.run().unwrap();
}

struct Secured {
    tls: TlsServer,
    directory: PathBuf,
}

impl Service for Secured {
    fn serve(&mut self, reactor: &mut Reactor, connection: PassedConnection, live: Live) {
        log(&self.directory, "accepted");
        let kind = Tcp.layer(self.tls.clone());
        let adopted = connection.adopt(reactor, kind, Echo::new(live));
        if let Err(error) = adopted {
            log(&self.directory, &format!("cannot adopt: {error}"));
        }
    }

    fn takes(&self, kind: &str) -> bool {
        kind == Echo::KIND
    }

    fn takes_layers(&self, _: &str, layers: &[LayerState]) -> bool {
        matches!(layers, [state] if self.tls.can_resume(state))
    }

    fn serve_moved(&mut self, reactor: &mut Reactor, mut moved: Moved, live: Live) {
        let state = moved.layers.pop().unwrap();
        let adopted = self.tls.resume(state).map(|tls| {
            let kind = Tcp.layer(tls).with_unsent(moved.unsent);
            reactor.adopt(kind, moved.fd, Echo::new(live))
        });
        match adopted {
            Ok(Ok(_)) => log(&self.directory, "moved"),
            other => log(&self.directory, &format!("cannot go on: {other:?}")),
        }
    }
}

struct Echo {
    live: Live,
    ticket: Option<MoveTicket>,
}

impl Echo {
    fn new(live: Live) -> Self {
        Self { live, ticket: None }
    }
}

impl<T: StreamTransport> Protocol<T> for Echo {
    fn connection_made(&mut self, cx: &mut Context<'_, T>) {
        self.ticket = Some(self.live.movable::<T, Self>(cx.transport.handle()));
    }

    fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
        cx.transport.as_dyn().write(data);
    }

    fn read_connection_lost(&mut self, _: &mut Context<'_, T>) -> AfterReadClosed {
        AfterReadClosed::LoseConnection
    }

    /// It goes on as long as its client does.
    fn is_idle(&self) -> bool {
        false
    }
}

impl Movable for Echo {
    const KIND: &'static str = "echo";

    fn pack(&mut self) -> Option<Packed> {
        Some(Packed::default())
    }

    fn unpack(&mut self, _: Packed) {}
}

// The tests.

fn start(accepting: Accepting) -> Processes {
    let directory = tempfile::tempdir().unwrap();
    if accepting == Accepting::ByWorkers {
        std::fs::write(directory.path().join("by workers"), "").unwrap();
    }
    Processes::start_as(directory, command)
}

/// Goes on with the clients until the log has said this so often since then.
#[track_caller]
fn go_on_until_said(
    processes: &Processes,
    clients: &mut Clients,
    before: usize,
    (count, wanted): (usize, &str),
) {
    let began = Instant::now();
    loop {
        clients.go_on();
        let said = processes.read("log");
        let new = said.lines().skip(before);
        if new.filter(|line| line.ends_with(wanted)).count() == count {
            return;
        }
        assert!(
            began.elapsed() < 2 * DEADLINE,
            "not {count} times {wanted:?} in:\n{said}\n{}",
            processes.read("errors")
        );
    }
}

/// Has all processes end, and says what they have sealed.
#[track_caller]
fn finish(mut processes: Processes, mut clients: Clients) -> usize {
    let count = clients.all.len();
    let (lived, _) = clients.finish();
    assert_eq!(lived, count, "{}", processes.read("errors"));
    let before = processes.lines();
    processes.signal(Signal::TERM);
    go_on_until_said(&processes, &mut clients, before, (1, "ended"));
    // The first has all the others for children, down to the last.
    await_exit(&mut processes.first, DEADLINE);
    let sealed = processes.assert_sealed_once();
    assert_eq!(processes.read("errors"), "", "nothing has gone wrong");
    sealed
}

fn move_all(accepting: Accepting) {
    let _ledger = DescriptorLedger::open();
    let processes = start(accepting);
    let (count, restarts) = (48, 3);
    let mut clients = Clients::connect(processes.address(), count);
    for _ in 0..restarts {
        for _ in 0..5 {
            clients.go_on();
        }
        let before = processes.lines();
        processes.signal(Signal::HUP);
        go_on_until(&processes, &mut clients, before, &[" took over from"]);
        go_on_until_said(&processes, &mut clients, before, (count, "moved"));
        // Nothing stays, so it can end.
        go_on_until_said(&processes, &mut clients, before, (1, "ended"));
    }
    // Whichever worker it comes to, it has not met the client.
    for _ in 0..4 {
        let again = Client::connect(processes.address(), &clients.configs[0], count);
        let kind = again.tls.handshake_kind();
        assert_eq!(kind, Some(HandshakeKind::Resumed));
    }
    let sealed = finish(processes, clients);
    Figures::of("T-31")
        .must(
            "moves of connections with TLS between workers",
            count * restarts,
            Bound::AtLeast,
            144,
        )
        .must(
            "records that these sealed, none twice",
            sealed,
            Bound::AtLeast,
            count,
        );
}

/// Reliability T-31: workers that are passed connections, with TLS.
#[test]
fn workers_that_are_passed_connections_secure_them_and_give_them_to_the_next() {
    move_all(Accepting::ByPool);
}

/// Reliability T-31: workers that accept, with TLS.
#[test]
fn workers_that_accept_secure_connections_and_give_them_to_the_next() {
    move_all(Accepting::ByWorkers);
}

/// It was given up, and comes back from the next process: its key was not taken.
#[test]
fn what_the_next_program_cannot_go_on_with_stays_with_its_worker() {
    let _ledger = DescriptorLedger::open();
    let processes = start(Accepting::ByPool);
    let mut clients = Clients::connect(processes.address(), 12);
    clients.go_on();
    std::fs::write(processes.directory.path().join("refuses"), "").unwrap();
    let before = processes.lines();
    processes.signal(Signal::HUP);
    go_on_until(&processes, &mut clients, before, &[" took over from"]);
    for _ in 0..40 {
        clients.go_on();
    }
    let (lived, _) = clients.finish();
    let (said, errors) = (processes.read("log"), processes.read("errors"));
    assert_eq!(lived, 12, "{said}\n{errors}");
    // The one before has nobody left to serve.
    go_on_until_said(&processes, &mut clients, before, (1, "ended"));
    let said = processes.read("log");
    assert!(
        !said.contains("moved") && !said.contains("cannot"),
        "{said}"
    );
    let sealed = finish(processes, clients);
    assert!(sealed > 12, "{sealed}");
}
