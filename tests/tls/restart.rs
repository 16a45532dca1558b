//! Live TLS connections through restarts of real processes, one of which is killed now and
//! then: no byte is lost or doubled, and no record is sealed twice.
//!
//! The server is this test binary again, whose cryptography notes what it seals in a file
//! that all processes append to. Each client is of rustls as it comes, in one suite.

use std::cell::{Cell, OnceCell};
use std::fs::{self, OpenOptions};
use std::io::{self, ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream as StdTcpStream};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::process::{self, Child, Command, Stdio};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bowline::endpoint::{Adopt as _, Listen as _};
use bowline::handoff::restart::{
    Listeners, Movable, MoveTicket, Moved, Packed, Program, Restart, RestartError, RestartSettings,
    Start,
};
use bowline::layers::{LayerState, StreamTransport};
use bowline::tls::rustls::pki_types::pem::PemObject as _;
use bowline::tls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use bowline::tls::rustls::{ClientConfig, Connection, ServerConfig};
use bowline::tls::{TicketKey, Tickets, TlsServer};
use bowline::{Address, AfterReadClosed, Context, Protocol, Reactor, Tcp, Transports};
use rustix::process::{Pid, Signal, getpid, getppid, kill_process};

use crate::harness::{IDENTITY, connecting, provider, providers, roots};
use crate::recorder::{Note, doubled, recording};
use crate::support::figures::{Bound, Figures, is_full, scaled};
use crate::support::waiting::await_in;
use crate::support::{DEADLINE, DescriptorLedger};

/// Says to the test that it is to be the server, and where its files are.
const DIRECTORY: &str = "BOWLINE_TLS_TEST_SERVER";

/// How many connections, and how many restarts: what every run does, and what
/// `tests/reliability/run --full --release T-46` does, which takes some minutes.
const SHORT: (usize, usize) = (80, 3);
const FULL: (usize, usize) = (1_000, 20);

/// How many connections there are, in the short form, when one of the processes is killed.
const SHORT_KILLS: usize = BATCH + 8;

/// How long a step may take.
fn patience() -> Duration {
    scaled(DEADLINE, 12 * DEADLINE)
}

/// As many as a batch of a restart has.
const BATCH: usize = 64;

// The server.

#[test]
fn server_process() {
    if let Some(directory) = std::env::var_os(DIRECTORY) {
        serve(&PathBuf::from(directory));
    }
}

/// Of all processes of a server; so a session goes on at whichever comes.
const TICKETS: [u8; 48] = [5; 48];

/// Two providers take turns, where there are two.
pub(crate) fn server_config(directory: &Path) -> ServerConfig {
    let sealed = OpenOptions::new()
        .append(true)
        .create(true)
        .open(directory.join("sealed"))
        .unwrap();
    let note: Note = Arc::new(move |record| {
        // At once, and whole beside those of others.
        (&sealed).write_all(record.to_line().as_bytes()).unwrap();
    });
    let all = providers();
    let base = &all[process::id() as usize % all.len()];
    recording(base, &note).install_default().unwrap();
    let chain = CertificateDer::from_pem_file(directory.join("cert")).unwrap();
    let key = PrivateKeyDer::from_pem_file(directory.join("key")).unwrap();
    let mut config = bowline::tls::server_config_builder()
        .with_no_client_auth()
        .with_single_cert(vec![chain], key)
        .unwrap();
    config.ticketer = Tickets::new(TicketKey::from_bytes(&TICKETS)).ticketer();
    config
}

fn serve(directory: &Path) {
    let _ = env_logger::try_init();
    let fault = fs::read_to_string(directory.join("fault")).unwrap_or_default();
    let tls = TlsServer::new(server_config(directory)).may_move(true);
    let mut reactor = Reactor::new().unwrap();
    let shared = Rc::new(Shared {
        restart: OnceCell::new(),
        directory: directory.to_owned(),
        fault,
        packed: Cell::new(0),
    });
    let restarting = Rc::clone(&shared);
    reactor
        .on_signals(&[Signal::HUP.as_raw()], move |reactor, _| {
            let command = command(&restarting.directory);
            if let Some(restart) = restarting.restart.get()
                && let Err(error) = restart.start_successor(reactor, command)
            {
                restarting.log(&format!("no restart: {error}"));
            }
        })
        .unwrap();
    reactor.stop_on_signals().unwrap();
    let settings = RestartSettings::new(directory.join("control"));
    let server = Server {
        shared: Rc::clone(&shared),
        tls,
        moved: 0,
        looked_at: Cell::new(0),
    };
    let restart = Restart::begin(&mut reactor, settings, server).unwrap();
    let _ = shared.restart.set(restart);
    reactor.run().unwrap();
}

fn command(directory: &Path) -> Command {
    command_of("restart::server_process", DIRECTORY, directory)
}

/// Has this test binary do what one of its tests does when it is told its folder.
pub(crate) fn command_of(test: &str, variable: &str, directory: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    let errors = OpenOptions::new()
        .append(true)
        .create(true)
        .open(directory.join("errors"));
    command
        .args(["--exact", "--nocapture", test])
        .env(variable, directory)
        .env("RUST_LOG", "warn")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(errors.unwrap());
    command
}

/// Notes a line, with the process that says it.
pub(crate) fn log(directory: &Path, line: &str) {
    let file = OpenOptions::new()
        .append(true)
        .create(true)
        .open(directory.join("log"));
    let line = format!("{} {line}\n", process::id());
    file.and_then(|mut file| file.write_all(line.as_bytes()))
        .unwrap();
}

struct Shared {
    restart: OnceCell<Restart>,
    directory: PathBuf,
    /// Which of the two processes is killed, and when: `successor moved 3`.
    fault: String,
    /// How many connections were given away.
    packed: Cell<usize>,
}

impl Shared {
    fn log(&self, line: &str) {
        log(&self.directory, line);
    }

    /// A predecessor gives the next connection away.
    fn packs(&self) {
        let number = self.packed.replace(self.packed.get() + 1);
        let fault = fs::read_to_string(self.directory.join("fault")).unwrap_or_default();
        if fault == format!("predecessor packs {number}") {
            let _ = kill_process(getpid(), Signal::KILL);
        }
    }

    /// A successor is at this step.
    fn is_at(&self, step: &str) {
        match self.fault.split_once(' ') {
            Some(("successor", at)) if at == step => {
                let _ = kill_process(getpid(), Signal::KILL);
            }
            Some(("predecessor", at)) if at == step => {
                if let Some(parent) = getppid() {
                    let _ = kill_process(parent, Signal::KILL);
                }
            }
            _ => {}
        }
    }
}

struct Server {
    shared: Rc<Shared>,
    tls: TlsServer,
    moved: usize,
    looked_at: Cell<usize>,
}

impl Server {
    fn echo(&self) -> impl FnMut(&Address) -> Echo + use<> {
        let shared = Rc::clone(&self.shared);
        move |_| Echo::new(&shared)
    }
}

impl Program for Server {
    fn listen(&mut self, reactor: &mut Reactor, listeners: &mut Listeners<'_>) -> io::Result<()> {
        self.shared.is_at("listen");
        let here = Tcp::at(([127, 0, 0, 1], 0).into()).layer(self.tls.clone());
        let handle = listeners.listen(reactor, "web", here, self.echo())?;
        if let Some(listener) = reactor.get(handle) {
            let path = self.shared.directory.join("address");
            fs::write(path.with_extension("new"), listener.address().to_string())?;
            fs::rename(path.with_extension("new"), path)?;
        }
        Ok(())
    }

    fn serving(&mut self, _: &mut Reactor, start: Start) {
        self.shared.is_at("serving");
        match start {
            Start::TookOver { pid, connections } => {
                let line = format!("took over from {pid} with {connections}");
                self.shared.log(&line);
            }
            _ => self.shared.log("serves"),
        }
    }

    fn not_started(&mut self, reactor: &mut Reactor, error: &RestartError) {
        self.shared.log(&format!("not started: {error}"));
        let _ = reactor.stop();
    }

    fn successor_failed(&mut self, _: &mut Reactor, error: &RestartError) {
        self.shared.log(&format!("goes on: {error}"));
    }

    fn handed_over(&mut self, reactor: &mut Reactor, _: Duration) {
        let stayed = self.shared.restart.get().map(Restart::connections_stayed);
        self.shared.log(&format!("handed over, {stayed:?} stay"));
        let _ = reactor.stop_gracefully(bowline::GracefulStop::new());
    }

    fn takes(&self, kind: &str) -> bool {
        kind == ECHO
    }

    fn takes_layers(&self, _: &str, layers: &[LayerState]) -> bool {
        self.shared
            .is_at(&format!("takes {}", self.looked_at.get()));
        self.looked_at.set(self.looked_at.get() + 1);
        matches!(layers, [state] if self.tls.can_resume(state))
    }

    fn connection_moved(&mut self, reactor: &mut Reactor, mut moved: Moved) {
        self.shared.is_at(&format!("moved {}", self.moved));
        self.moved += 1;
        let state = moved.layers.pop().unwrap();
        let echo = Echo::new(&self.shared);
        let adopted = self.tls.resume(state).map(|tls| {
            let kind = Tcp.layer(tls).with_unsent(moved.unsent);
            reactor.adopt(kind, moved.fd, echo)
        });
        match adopted {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => self.shared.log(&format!("cannot adopt: {error}")),
            Err(error) => self.shared.log(&format!("cannot adopt: {error}")),
        }
    }
}

const ECHO: &str = "echo";

struct Echo {
    shared: Rc<Shared>,
    ticket: Option<MoveTicket>,
}

impl Echo {
    fn new(shared: &Rc<Shared>) -> Self {
        Self {
            shared: Rc::clone(shared),
            ticket: None,
        }
    }
}

impl<T: StreamTransport> Protocol<T> for Echo {
    fn connection_made(&mut self, cx: &mut Context<'_, T>) {
        if let Some(restart) = self.shared.restart.get() {
            self.ticket = Some(restart.movable::<T, Self>(cx.transport.handle()));
        }
    }

    fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
        cx.transport.as_dyn().write(data);
    }

    fn read_connection_lost(&mut self, _: &mut Context<'_, T>) -> AfterReadClosed {
        AfterReadClosed::LoseConnection
    }
}

impl Movable for Echo {
    const KIND: &'static str = ECHO;

    fn pack(&mut self) -> Option<Packed> {
        self.shared.packs();
        Some(Packed::default())
    }

    fn unpack(&mut self, _: Packed) {}
}

// What the tests do to it.

pub(crate) struct Processes {
    pub(crate) directory: tempfile::TempDir,
    pub(crate) first: Child,
}

impl Processes {
    fn start() -> Self {
        Self::start_as(tempfile::tempdir().unwrap(), command)
    }

    /// Starts what this command says of its folder, and waits until it serves.
    pub(crate) fn start_as(
        directory: tempfile::TempDir,
        command: impl FnOnce(&Path) -> Command,
    ) -> Self {
        let path = |name: &str| directory.path().join(name);
        let pem = |label: &str, der: &[u8]| pem(label, der);
        fs::write(path("cert"), pem("CERTIFICATE", &IDENTITY.chain[0])).unwrap();
        fs::write(path("key"), pem("PRIVATE KEY", IDENTITY.key.secret_der())).unwrap();
        let first = command(directory.path()).spawn().unwrap();
        let this = Self { directory, first };
        this.wait_for(" serves");
        this
    }

    pub(crate) fn read(&self, name: &str) -> String {
        fs::read_to_string(self.directory.path().join(name)).unwrap_or_default()
    }

    fn set_fault(&self, fault: &str) {
        fs::write(self.directory.path().join("fault"), fault).unwrap();
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.read("address").parse().unwrap()
    }

    /// Waits for a line of the log with this in it that was not there before.
    #[track_caller]
    fn wait_for_new(&self, before: usize, wanted: &[&str]) -> String {
        let errors = || self.read("errors");
        let what = || format!("{wanted:?} in:\n{}\n{}", self.read("log"), errors());
        await_in(self.directory.path(), patience(), what, || {
            let log = self.read("log");
            let mut new = log.lines().skip(before);
            let found = new.find(|line| wanted.iter().any(|it| line.contains(it)));
            found.map(str::to_owned)
        })
    }

    #[track_caller]
    pub(crate) fn wait_for(&self, wanted: &str) -> String {
        self.wait_for_new(0, &[wanted])
    }

    pub(crate) fn lines(&self) -> usize {
        self.read("log").lines().count()
    }

    /// Which process serves, by the log.
    pub(crate) fn pid(&self) -> Option<Pid> {
        let log = self.read("log");
        let serving = |line: &&str| line.ends_with(" serves") || line.contains(" took over");
        let line = log.lines().rfind(serving)?;
        Pid::from_raw(line.split(' ').next()?.parse().ok()?)
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let _ = kill_process(self.pid().unwrap(), signal);
    }

    /// How many records were sealed by all processes; none twice, and nothing has gone
    /// wrong that a process says so of.
    #[track_caller]
    pub(crate) fn assert_sealed_once(&self) -> usize {
        let (count, twice) = doubled(&self.read("sealed"));
        assert!(twice.is_empty(), "sealed twice: {twice:?}");
        count
    }
}

impl Drop for Processes {
    fn drop(&mut self) {
        if let Some(pid) = self.pid() {
            let _ = kill_process(pid, Signal::KILL);
        }
        let _ = self.first.kill();
        let _ = self.first.wait();
    }
}

fn pem(label: &str, der: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = format!("-----BEGIN {label}-----\n");
    for line in der.chunks(48) {
        for three in line.chunks(3) {
            let mut bits = [0; 4];
            bits[1..=three.len()].copy_from_slice(three);
            let bits = u32::from_be_bytes(bits);
            for place in 0..4 {
                let sextet = (bits >> (18 - 6 * place)) & 63;
                match place <= three.len() {
                    true => text.push(ALPHABET[sextet as usize].into()),
                    false => text.push('='),
                }
            }
        }
        text.push('\n');
    }
    text + &format!("-----END {label}-----\n")
}

/// One client: what it gets back has to be what it has sent, byte for byte.
pub(crate) struct Client {
    number: usize,
    stream: StdTcpStream,
    pub(crate) tls: Connection,
    sent: u64,
    received: u64,
    unsent: Vec<u8>,
    random: u64,
    end: Option<End>,
}

/// How it has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// Its server has died.
    CutOff,
    /// As it should.
    Clean,
}

/// What the byte at a place of a client's stream is.
fn byte_at(number: usize, place: u64) -> u8 {
    let mixed = (place ^ (place >> 7)).wrapping_mul(0x9e37_79b9) ^ number as u64;
    (mixed >> 8) as u8
}

/// How much a client has under way at the most. Some do not read for a while.
const UNDER_WAY: u64 = 200_000;

impl Client {
    pub(crate) fn connect(address: SocketAddr, config: &Arc<ClientConfig>, number: usize) -> Self {
        let mut stream = StdTcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(patience())).unwrap();
        stream.set_nodelay(true).unwrap();
        let mut tls = connecting((**config).clone());
        while tls.is_handshaking() {
            tls.complete_io(&mut stream).unwrap();
        }
        stream.set_nonblocking(true).unwrap();
        Self {
            number,
            stream,
            tls,
            sent: 0,
            received: 0,
            unsent: Vec::new(),
            random: number as u64 + 1,
            end: None,
        }
    }

    fn draw(&mut self, below: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random % below
    }

    /// Sends some, unless it is to finish, and takes what has come.
    fn go_on(&mut self, is_finishing: bool) {
        if self.end.is_some() {
            return;
        }
        if !is_finishing && self.sent - self.received < UNDER_WAY && self.draw(3) == 0 {
            let count = match self.draw(20) {
                0 => 40_000,
                _ => 1 + self.draw(700),
            };
            let data: Vec<u8> = (self.sent..self.sent + count)
                .map(|place| byte_at(self.number, place))
                .collect();
            self.tls.writer().write_all(&data).unwrap();
            self.sent += count;
            if self.draw(50) == 0
                && self
                    .tls
                    .protocol_version()
                    .is_some_and(|it| it == bowline::tls::rustls::ProtocolVersion::TLSv1_3)
            {
                self.tls.refresh_traffic_keys().unwrap();
            }
        }
        self.send();
        if is_finishing || self.draw(4) > 0 {
            self.receive();
        }
    }

    fn send(&mut self) {
        while self.tls.wants_write() {
            self.tls.write_tls(&mut self.unsent).unwrap();
        }
        match self.stream.write(&self.unsent) {
            Ok(count) => {
                self.unsent.drain(..count);
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(_) => self.end = Some(End::CutOff),
        }
    }

    fn receive(&mut self) {
        let mut buffer = [0; 20_000];
        let count = match self.stream.read(&mut buffer) {
            Ok(0) => {
                self.end = Some(End::CutOff);
                return;
            }
            Ok(count) => count,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return,
            Err(_) => {
                self.end = Some(End::CutOff);
                return;
            }
        };
        let mut rest = &buffer[..count];
        while !rest.is_empty() {
            self.tls.read_tls(&mut rest).unwrap();
            let state = self.tls.process_new_packets();
            let state = state.unwrap_or_else(|error| {
                panic!("client {} at {}: {error}", self.number, self.received)
            });
            let mut plain = vec![0; state.plaintext_bytes_to_read()];
            self.tls.reader().read_exact(&mut plain).unwrap();
            for byte in plain {
                let wanted = byte_at(self.number, self.received);
                assert_eq!(byte, wanted, "client {} at {}", self.number, self.received);
                self.received += 1;
            }
            if state.peer_has_closed() {
                self.end = Some(End::Clean);
                return;
            }
        }
    }
}

pub(crate) struct Clients {
    pub(crate) all: Vec<Client>,
    pub(crate) configs: Vec<Arc<ClientConfig>>,
}

impl Clients {
    pub(crate) fn connect(address: SocketAddr, count: usize) -> Self {
        let provider = provider();
        let suites = provider.cipher_suites.iter();
        let suites = suites.filter(|suite| !format!("{suite:?}").contains("ECDHE_RSA"));
        let configs: Vec<_> = suites
            .map(|suite| {
                let provider = bowline::tls::rustls::crypto::CryptoProvider {
                    cipher_suites: vec![*suite],
                    ..(*provider).clone()
                };
                let config = ClientConfig::builder_with_provider(Arc::new(provider))
                    .with_protocol_versions(&[suite.version()])
                    .unwrap()
                    .with_root_certificates(roots())
                    .with_no_client_auth();
                Arc::new(config)
            })
            .collect();
        assert!(configs.len() >= 6, "three suites of each version");
        let all = (0..count)
            .map(|number| Client::connect(address, &configs[number % configs.len()], number));
        Self {
            all: all.collect(),
            configs,
        }
    }

    pub(crate) fn go_on(&mut self) {
        for client in &mut self.all {
            client.go_on(false);
        }
    }

    /// Has everything come back that was sent; how many have lived, how many bytes.
    #[track_caller]
    pub(crate) fn finish(&mut self) -> (usize, u64) {
        let began = Instant::now();
        loop {
            let mut waits = 0;
            for client in &mut self.all {
                client.go_on(true);
                if client.end.is_none() && client.received < client.sent {
                    waits += 1;
                }
            }
            if waits == 0 {
                break;
            }
            assert!(began.elapsed() < patience(), "{waits} wait for their bytes");
        }
        let mut lived = 0;
        for client in &mut self.all {
            if client.end.is_none() {
                client.tls.send_close_notify();
            }
            while client.end.is_none() {
                assert!(began.elapsed() < 2 * patience(), "no end");
                client.go_on(true);
            }
            // Of one that was cut off nothing may have come to say so before.
            lived += usize::from(client.end == Some(End::Clean));
        }
        (lived, self.all.iter().map(|client| client.received).sum())
    }
}

/// Goes on with the clients until the log says this.
#[track_caller]
pub(crate) fn go_on_until(
    processes: &Processes,
    clients: &mut Clients,
    before: usize,
    wanted: &[&str],
) -> String {
    let began = Instant::now();
    loop {
        clients.go_on();
        let log = processes.read("log");
        let mut new = log.lines().skip(before);
        if let Some(line) = new.find(|line| wanted.iter().any(|it| line.contains(it))) {
            return line.to_owned();
        }
        assert!(
            began.elapsed() < patience(),
            "no {wanted:?} in:\n{log}\n{}",
            processes.read("errors")
        );
    }
}

/// Reliability T-46: restarts with nobody killed.
#[test]
fn live_connections_go_on_over_restarts() {
    let _ledger = DescriptorLedger::open();
    let (count, restarts) = scaled(SHORT, FULL);
    let processes = Processes::start();
    let mut clients = Clients::connect(processes.address(), count);
    let began = Instant::now();
    for restart in 0..restarts {
        for _ in 0..20 {
            clients.go_on();
        }
        let before = processes.lines();
        processes.signal(Signal::HUP);
        let line = go_on_until(&processes, &mut clients, before, &[" took over from"]);
        let moved = line.rsplit(' ').next().unwrap();
        assert_eq!(moved, count.to_string(), "restart {restart}");
    }
    for _ in 0..20 {
        clients.go_on();
    }
    // Sessions go on at a process that has never met the client.
    let config = &clients.configs[0];
    let again = Client::connect(processes.address(), config, count);
    assert_eq!(
        again.tls.handshake_kind(),
        Some(bowline::tls::rustls::HandshakeKind::Resumed)
    );
    drop(again);
    let (lived, bytes) = clients.finish();
    let (sealed, twice) = doubled(&processes.read("sealed"));
    assert_eq!(processes.read("errors"), "", "nothing has gone wrong");
    Figures::of("T-46")
        .must("connections", count, Bound::AtLeast, scaled(80, 1_000))
        .must("restarts", restarts, Bound::AtLeast, scaled(3, 20))
        .must("connections lost", count - lived, Bound::Exactly, 0)
        .must("records sealed twice", twice.len(), Bound::Exactly, 0)
        .must("records sealed", sealed, Bound::AtLeast, count * restarts)
        .must(
            "bytes back, each as it was sent",
            bytes as usize,
            Bound::AtLeast,
            1,
        )
        .remark(&format!(
            "{} moves in {:.0?}",
            count * restarts,
            began.elapsed()
        ));
}

/// Whatever else goes wrong: it is looked at after each record, and nothing else is.
#[test]
fn no_record_is_sealed_twice() {
    let _ledger = DescriptorLedger::open();
    let processes = Processes::start();
    let mut clients = Clients::connect(processes.address(), 12);
    for _ in 0..5 {
        clients.go_on();
    }
    let before = processes.lines();
    processes.signal(Signal::HUP);
    processes.wait_for_new(before, &[" took over from"]);
    let began = Instant::now();
    let mut sealed = processes.assert_sealed_once();
    for round in 0..20 {
        for client in &mut clients.all {
            client.tls.writer().write_all(&[7; 100]).unwrap();
            client.send();
        }
        let wanted = sealed + clients.all.len();
        while sealed < wanted {
            assert!(began.elapsed() < patience(), "no answer in round {round}");
            sealed = processes.assert_sealed_once();
        }
    }
}

/// Who dies at which step, and how many of `count` connections live then.
fn steps(count: usize) -> Vec<(String, RangeInclusive<usize>)> {
    let batches = count.div_ceil(BATCH);
    let until = |batch: usize| count.min(batch * BATCH);
    let mut steps = vec![
        // The successor has nothing yet.
        ("successor listen".to_owned(), count..=count),
        ("predecessor listen".into(), 0..=0),
        // It has everything.
        ("successor serving".into(), 0..=0),
        ("predecessor serving".into(), count..=count),
    ];
    // The state between two batches is the same wherever they are: where there are many,
    // these stand for all.
    let mut looked_at = vec![0, 1, batches / 2, batches - 1];
    looked_at.dedup();
    for batch in looked_at {
        let (first, last) = (until(batch), until(batch + 1) - 1);
        // The last of the others would take the short form as long again.
        let places = match is_full() || batch == 0 {
            true => vec![first, last],
            false => vec![first],
        };
        for place in places {
            // The batches before live at the successor.
            let lives = count - until(batch);
            steps.push((format!("successor takes {place}"), lives..=lives));
            // It has said that this one does.
            let lives = count - until(batch + 1);
            steps.push((format!("successor moved {place}"), lives..=lives));
            // Nothing of this one has left.
            let lives = until(batch);
            steps.push((format!("predecessor packs {place}"), lives..=lives));
            // The successor has this one, and serves it.
            let lives = until(batch + 1);
            steps.push((format!("predecessor takes {place}"), lives..=lives));
            // The next one may have come behind it.
            let most = until(batch + 2);
            steps.push((format!("predecessor moved {place}"), lives..=most));
        }
    }
    steps
}

/// Reliability T-46: one of the two dies at each step. Connections are lost with the
/// process that has them, and no others.
#[test]
fn a_process_that_is_killed_loses_its_own_connections_only() {
    let _ledger = DescriptorLedger::open();
    let count = scaled(SHORT_KILLS, FULL.0);
    let (mut kills, mut with_it, mut beside) = (0, 0, 0);
    for (fault, lives) in steps(count) {
        let processes = Processes::start();
        let mut clients = Clients::connect(processes.address(), count);
        for _ in 0..5 {
            clients.go_on();
        }
        processes.set_fault(&fault);
        let before = processes.lines();
        processes.signal(Signal::HUP);
        let wanted: &[&str] = match fault.split_once(' ') {
            Some(("successor", "serving")) => &[" handed over"],
            Some(("successor", _)) => &[" goes on: "],
            _ => &[" took over from", " serves"],
        };
        go_on_until(&processes, &mut clients, before, wanted);
        processes.set_fault("");
        for _ in 0..5 {
            clients.go_on();
        }
        let (lived, _) = clients.finish();
        beside += lives.start().saturating_sub(lived);
        assert!(
            lives.contains(&lived),
            "{fault}: {lived}, not {lives:?}\n{}",
            processes.read("log")
        );
        assert!(processes.assert_sealed_once() > count, "{fault}");
        kills += 1;
        with_it += count - lived;
    }
    Figures::of("T-46")
        .must(
            "processes killed, each at another step",
            kills,
            Bound::AtLeast,
            scaled(19, 44),
        )
        .must(
            "connections lost that were not its own",
            beside,
            Bound::Exactly,
            0,
        )
        .remark(&format!(
            "{count} connections each time, of {} in all {with_it} ended with their process",
            count * kills
        ));
}
