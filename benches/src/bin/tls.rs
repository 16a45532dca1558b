//! TLS: bowline beside a hand-written epoll loop on rustls, and tokio-rustls, in one run.
//!
//! ```text
//! cargo run --release -p bowline-bench --features tls --bin tls
//!     --quick          a short form
//!     --rounds N       how often each is measured
//! ```
//!
//! Each server is a process of its own, of which the CPU time is measured; the cryptography
//! is ring's for all, the suite TLS_AES_128_GCM_SHA256, the version 1.3. The generator is of
//! rustls as it comes. Rounds go by turns, and what is shown is the median of them.

#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a program that prints"
)]

#[path = "../sys.rs"]
#[allow(dead_code, reason = "the other program uses the rest")]
mod sys;

use std::collections::BTreeMap;
use std::error::Error;
use std::io::{self, BufRead as _, BufReader, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use bowline::endpoint::{Listen as _, ListenAt as _};
use bowline::tls::TlsServer;
use bowline::{
    Address, AfterReadClosed, Context, ProducerKind, ProducerRef, Protocol, Reactor, Tcp,
    Transport, Transports,
};
use rustls::client::Resumption;
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

#[global_allocator]
static ALLOCATOR: sys::Counting = sys::Counting;

type Outcome<T = ()> = Result<T, Box<dyn Error>>;

const PEERS: [&str; 3] = ["by hand", "tokio-rustls", "bowline"];

/// What is sent at once, where much is.
const CHUNK: usize = 16_384;
const BUFFER: usize = 65_536;

fn main() -> Outcome {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match *arguments {
        ["serve", peer, task, directory] => serve(peer, task, Path::new(directory)),
        [] => compare(15),
        ["--quick"] => compare(3),
        ["--rounds", rounds] => compare(rounds.parse()?),
        _ => Err("usage: tls [--quick | --rounds N]".into()),
    }
}

// The servers.

fn provider() -> CryptoProvider {
    let mut provider = ring::default_provider();
    provider
        .cipher_suites
        .retain(|suite| *suite == ring::cipher_suite::TLS13_AES_128_GCM_SHA256);
    provider
}

fn server_config(directory: &Path) -> Outcome<ServerConfig> {
    let chain = CertificateDer::from_pem_file(directory.join("cert"))?;
    let key = PrivateKeyDer::from_pem_file(directory.join("key"))?;
    let mut config = ServerConfig::builder_with_provider(Arc::new(provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_single_cert(vec![chain], key)?;
    config.ticketer = ring::Ticketer::new()?;
    Ok(config)
}

fn serve(peer: &str, task: &str, directory: &Path) -> Outcome {
    sys::report_memory_on_signal()?;
    let config = server_config(directory)?;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    listener.set_nonblocking(true)?;
    println!("{}", listener.local_addr()?);
    match peer {
        "by hand" => by_hand(config, &listener, task),
        "tokio-rustls" => with_tokio(config, listener, task),
        _ => with_bowline(config, listener.into(), task),
    }
}

struct Connection {
    socket: TcpStream,
    tls: ServerConnection,
    is_source: bool,
    waits: bool,
}

fn by_hand(config: ServerConfig, listener: &TcpListener, task: &str) -> Outcome {
    const LISTENER: u64 = u64::MAX;
    let config = Arc::new(config);
    let epoll = sys::Epoll::new()?;
    epoll.add(listener.as_raw_fd(), sys::READ, LISTENER)?;
    let mut connections: Vec<Option<Connection>> = Vec::new();
    let mut free = Vec::new();
    let mut events = Vec::with_capacity(1_024);
    let mut buffers = (vec![0; BUFFER], vec![0; BUFFER]);
    loop {
        epoll.wait(&mut events, -1);
        for event in &events {
            let (token, flags) = (event.u64, event.events);
            if token == LISTENER {
                while let Ok((socket, _)) = listener.accept() {
                    socket.set_nonblocking(true)?;
                    let index = free.pop().unwrap_or_else(|| {
                        connections.push(None);
                        connections.len() - 1
                    });
                    epoll.add(socket.as_raw_fd(), sys::READ, index as u64)?;
                    connections[index] = Some(Connection {
                        socket,
                        tls: ServerConnection::new(Arc::clone(&config))?,
                        is_source: false,
                        waits: false,
                    });
                }
                continue;
            }
            let slot = &mut connections[token as usize];
            let Some(connection) = slot else { continue };
            let is_readable = flags & libc::EPOLLIN as u32 != 0;
            if connection.ready(is_readable, task, &mut buffers).is_err() {
                *slot = None;
                free.push(token as usize);
            } else if connection.waits {
                let fd = connection.socket.as_raw_fd();
                epoll.modify(fd, sys::READ_AND_WRITE, token)?;
            }
        }
    }
}

impl Connection {
    /// Reads as much as there is, does its work, and sends what the socket takes.
    fn ready(
        &mut self,
        is_readable: bool,
        task: &str,
        (raw, plain): &mut (Vec<u8>, Vec<u8>),
    ) -> io::Result<()> {
        let mut has_ended = false;
        loop {
            if !is_readable {
                break;
            }
            let count = match self.socket.read(raw) {
                Ok(0) => {
                    has_ended = true;
                    break;
                }
                Ok(count) => count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            };
            let mut rest = &raw[..count];
            while !rest.is_empty() {
                self.tls.read_tls(&mut rest)?;
                let state = self.tls.process_new_packets();
                let state = state.map_err(io::Error::other)?;
                let mut left = state.plaintext_bytes_to_read();
                while left > 0 {
                    let count = self.tls.reader().read(plain)?;
                    left -= count;
                    match task {
                        "echo" => self.tls.writer().write_all(&plain[..count])?,
                        "source" => self.is_source = true,
                        _ => {}
                    }
                }
                has_ended |= state.peer_has_closed();
            }
            if count < raw.len() {
                break;
            }
        }
        if has_ended {
            self.tls.send_close_notify();
        }
        self.send(plain)?;
        match has_ended {
            true => Err(ErrorKind::UnexpectedEof.into()),
            false => Ok(()),
        }
    }

    fn send(&mut self, chunk: &[u8]) -> io::Result<()> {
        loop {
            while self.tls.wants_write() {
                match self.tls.write_tls(&mut self.socket) {
                    Ok(_) => {}
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {
                        self.waits = true;
                        return Ok(());
                    }
                    Err(error) => return Err(error),
                }
            }
            if !self.is_source {
                return Ok(());
            }
            self.tls.writer().write_all(&chunk[..CHUNK])?;
        }
    }
}

fn with_tokio(config: ServerConfig, listener: TcpListener, task: &str) -> Outcome {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let task: &'static str = Box::leak(task.to_owned().into_boxed_str());
    let local = tokio::task::LocalSet::new();
    local.block_on(&runtime, async move {
        let listener = tokio::net::TcpListener::from_std(listener)?;
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
        loop {
            let (socket, _) = listener.accept().await?;
            let acceptor = acceptor.clone();
            tokio::task::spawn_local(async move {
                let mut stream = acceptor.accept(socket).await?;
                let mut buffer = vec![0; if task == "echo" { 4_096 } else { CHUNK }];
                loop {
                    let count = stream.read(&mut buffer).await?;
                    if count == 0 {
                        stream.shutdown().await?;
                        return Ok::<_, io::Error>(());
                    }
                    if task == "echo" {
                        stream.write_all(&buffer[..count]).await?;
                        stream.flush().await?;
                    }
                    if task == "source" {
                        loop {
                            stream.write_all(&buffer).await?;
                        }
                    }
                }
            });
        }
    })
}

struct Echo;

impl<T: Transport> Protocol<T> for Echo {
    fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
        cx.transport.write(data);
    }

    fn read_connection_lost(&mut self, _: &mut Context<'_, T>) -> AfterReadClosed {
        AfterReadClosed::LoseConnection
    }
}

struct Sink;

impl<T: Transport> Protocol<T> for Sink {
    fn data_received(&mut self, _: &mut Context<'_, T>, _: &[u8]) {}

    fn read_connection_lost(&mut self, _: &mut Context<'_, T>) -> AfterReadClosed {
        AfterReadClosed::LoseConnection
    }
}

struct Source(Box<[u8]>);

impl<T: Transport> Protocol<T> for Source {
    fn data_received(&mut self, cx: &mut Context<'_, T>, _: &[u8]) {
        cx.transport
            .register_producer(ProducerRef::Protocol, ProducerKind::Push)
            .expect("one byte is sent");
        <Self as Protocol<T>>::resume_producing(self, cx);
    }

    fn resume_producing(&mut self, cx: &mut Context<'_, T>) {
        while cx.transport.write(&self.0).is_ready() {}
    }
}

fn with_bowline(config: ServerConfig, listener: OwnedFd, task: &str) -> Outcome {
    let mut reactor = Reactor::new()?;
    let tls = TlsServer::new(config);
    let here = Tcp::at(SocketAddr::from(([127, 0, 0, 1], 0)));
    let here = here.layer(tls).on(listener);
    let listened = match task {
        "echo" => reactor.listen(here, |_: &Address| Echo),
        "source" => reactor.listen(here, |_: &Address| Source(vec![0; CHUNK].into())),
        _ => reactor.listen(here, |_: &Address| Sink),
    };
    let listener = listened.map_err(io::Error::from)?;
    if let Some(listener) = reactor.get(listener) {
        listener.assume_sole_holder();
    }
    reactor.run()?;
    Ok(())
}

// The generator.

struct Server {
    child: Child,
    said: BufReader<ChildStdout>,
    address: SocketAddr,
}

impl Server {
    fn start(peer: &str, task: &str, directory: &Path) -> Outcome<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["serve", peer, task]).arg(directory);
        sys::pin_child(&mut command, 0);
        let mut child = command.stdout(Stdio::piped()).spawn()?;
        let mut said = BufReader::new(child.stdout.take().ok_or("no output")?);
        let mut line = String::new();
        said.read_line(&mut line)?;
        Ok(Self {
            child,
            said,
            address: line.trim_end().parse()?,
        })
    }

    fn cpu_time(&self) -> Outcome<Duration> {
        Ok(sys::cpu_time(self.child.id())?)
    }

    /// How many bytes it has allocated.
    fn memory(&mut self) -> Outcome<u64> {
        sys::signal_report(self.child.id())?;
        let mut bytes = [0; 8];
        self.said.read_exact(&mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

struct Client {
    socket: TcpStream,
    tls: ClientConnection,
}

impl Client {
    fn connect(address: SocketAddr, config: &Arc<ClientConfig>) -> Outcome<Self> {
        let mut socket = TcpStream::connect(address)?;
        socket.set_nodelay(true)?;
        let name = ServerName::try_from("localhost")?;
        let mut tls = ClientConnection::new(Arc::clone(config), name)?;
        while tls.is_handshaking() {
            tls.complete_io(&mut socket)?;
        }
        Ok(Self { socket, tls })
    }

    fn send(&mut self, data: &[u8]) -> Outcome {
        self.tls.writer().write_all(data)?;
        while self.tls.wants_write() {
            self.tls.write_tls(&mut self.socket)?;
        }
        Ok(())
    }

    fn receive(&mut self, mut count: usize, buffer: &mut [u8]) -> Outcome {
        while count > 0 {
            if self.tls.read_tls(&mut self.socket)? == 0 {
                return Err("the server has ended".into());
            }
            let state = self.tls.process_new_packets()?;
            let mut left = state.plaintext_bytes_to_read();
            while left > 0 {
                let read = self.tls.reader().read(buffer)?;
                left -= read;
                count = count.saturating_sub(read);
            }
        }
        Ok(())
    }
}

#[derive(Clone, Copy)]
struct Work {
    name: &'static str,
    unit: &'static str,
    task: &'static str,
    run: fn(&Server, &Setting) -> Outcome<f64>,
    key: &'static str,
}

struct Setting {
    roots: RootCertStore,
}

impl Setting {
    fn config(&self, resumes: bool) -> Outcome<Arc<ClientConfig>> {
        let mut config = ClientConfig::builder_with_provider(Arc::new(provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_root_certificates(self.roots.clone())
            .with_no_client_auth();
        if !resumes {
            config.resumption = Resumption::disabled();
        }
        Ok(Arc::new(config))
    }
}

const HANDSHAKES: usize = 200;
const CONNECTIONS: usize = 64;
const ECHOES: usize = 150;
const BULK: usize = 64 << 20;
const IDLE: usize = 300;

fn full(server: &Server, setting: &Setting) -> Outcome<f64> {
    handshakes(server, &setting.config(false)?)
}

fn resumed(server: &Server, setting: &Setting) -> Outcome<f64> {
    handshakes(server, &setting.config(true)?)
}

/// Each with one byte there and back, behind which the tickets have come.
fn handshakes(server: &Server, config: &Arc<ClientConfig>) -> Outcome<f64> {
    let one = || {
        let mut client = Client::connect(server.address, config)?;
        client.send(b"x")?;
        client.receive(1, &mut [0; 16])
    };
    one()?;
    let before = server.cpu_time()?;
    for _ in 0..HANDSHAKES {
        one()?;
    }
    let took = server.cpu_time()? - before;
    Ok(took.as_nanos() as f64 / HANDSHAKES as f64)
}

fn echoes(server: &Server, setting: &Setting) -> Outcome<f64> {
    let config = setting.config(false)?;
    let clients = (0..CONNECTIONS).map(|_| Client::connect(server.address, &config));
    let mut clients = clients.collect::<Outcome<Vec<_>>>()?;
    let (message, mut buffer) = ([7; 64], [0; 1_024]);
    let mut round = |clients: &mut Vec<Client>| -> Outcome {
        for client in &mut *clients {
            client.send(&message)?;
        }
        for client in clients {
            client.receive(message.len(), &mut buffer)?;
        }
        Ok(())
    };
    round(&mut clients)?;
    let before = server.cpu_time()?;
    for _ in 0..ECHOES {
        round(&mut clients)?;
    }
    let took = server.cpu_time()? - before;
    Ok(took.as_nanos() as f64 / (ECHOES * CONNECTIONS) as f64)
}

fn up(server: &Server, setting: &Setting) -> Outcome<f64> {
    let mut client = Client::connect(server.address, &setting.config(false)?)?;
    let chunk = vec![7; CHUNK];
    client.send(&chunk)?;
    let before = server.cpu_time()?;
    for _ in 0..BULK / CHUNK {
        client.send(&chunk)?;
    }
    client.tls.send_close_notify();
    client.send(b"")?;
    // Until all of it has been read.
    let _ = client
        .socket
        .set_read_timeout(Some(Duration::from_secs(10)));
    while let Ok(1..) = client.socket.read(&mut [0; 1_024]) {}
    let took = server.cpu_time()? - before;
    Ok(took.as_nanos() as f64 / (BULK / CHUNK) as f64)
}

fn down(server: &Server, setting: &Setting) -> Outcome<f64> {
    let mut client = Client::connect(server.address, &setting.config(false)?)?;
    let mut buffer = vec![0; BUFFER];
    client.send(b"x")?;
    client.receive(CHUNK, &mut buffer)?;
    let before = server.cpu_time()?;
    client.receive(BULK, &mut buffer)?;
    let took = server.cpu_time()? - before;
    Ok(took.as_nanos() as f64 / (BULK / CHUNK) as f64)
}

/// What an established connection that has echoed once keeps allocated.
fn idle(peer: &str, setting: &Setting, directory: &Path) -> Outcome<f64> {
    let mut server = Server::start(peer, "echo", directory)?;
    let config = setting.config(false)?;
    let mut buffer = [0; 64];
    let address = server.address;
    let mut connect = |count: usize| {
        let mut all = Vec::new();
        for _ in 0..count {
            let mut client = Client::connect(address, &config)?;
            client.send(b"x")?;
            client.receive(1, &mut buffer)?;
            all.push(client);
        }
        Ok::<_, Box<dyn Error>>(all)
    };
    // What a server has once is there then.
    let first = connect(20)?;
    let before = server.memory()?;
    let all = connect(IDLE)?;
    let after = server.memory()?;
    drop((first, all));
    Ok((after as f64 - before as f64) / IDLE as f64)
}

fn certify(directory: &Path, key: &str) -> Outcome<Setting> {
    // Keys for RSA are made by OpenSSL: the generator's cryptography has none.
    let path = |name: &str| directory.join(name);
    let kind: &[&str] = match key {
        "RSA-2048" => &["rsa:2048"],
        _ => &["ec", "-pkeyopt", "ec_paramgen_curve:P-256"],
    };
    let made = Command::new("openssl")
        .args([
            "req",
            "-x509",
            "-nodes",
            "-days",
            "2",
            "-subj",
            "/CN=localhost",
        ])
        .args(["-addext", "subjectAltName=DNS:localhost"])
        .args(["-addext", "basicConstraints=critical,CA:FALSE", "-newkey"])
        .args(kind)
        .arg("-keyout")
        .arg(path("key"))
        .arg("-out")
        .arg(path("cert"))
        .stderr(Stdio::null())
        .status()?;
    if !made.success() {
        return Err("openssl made no certificate".into());
    }
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(path("cert"))?)?;
    Ok(Setting { roots })
}

fn compare(rounds: usize) -> Outcome {
    sys::raise_descriptor_limit()?;
    sys::pin(1)?;
    let works = [
        work("handshake, full, P-256", "ns", "echo", full, "P-256"),
        work("handshake, full, RSA-2048", "ns", "echo", full, "RSA-2048"),
        work("handshake, resumed, P-256", "ns", "echo", resumed, "P-256"),
        work(
            "echo of 64 B on 64 connections",
            "ns",
            "echo",
            echoes,
            "P-256",
        ),
        work("16 KiB received", "ns", "sink", up, "P-256"),
        work("16 KiB sent", "ns", "source", down, "P-256"),
    ];
    println!(
        "| CPU time of the server for one | {} | by hand / bowline | tokio-rustls / bowline |",
        PEERS.join(" | ")
    );
    println!("|---|---|---|---|---|---|");
    let scratch = tempfile::tempdir()?;
    for work in works {
        let setting = certify(scratch.path(), work.key)?;
        let mut times: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
        let servers = PEERS.map(|peer| Server::start(peer, work.task, scratch.path()));
        let servers = servers.into_iter().collect::<Outcome<Vec<_>>>()?;
        for _ in 0..rounds {
            for (peer, server) in PEERS.iter().zip(&servers) {
                let took = (work.run)(server, &setting)?;
                times.entry(peer).or_default().push(took);
            }
        }
        row(work.name, work.unit, &times);
    }
    let setting = certify(scratch.path(), "P-256")?;
    let mut bytes: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    for peer in PEERS {
        let idle = idle(peer, &setting, scratch.path())?;
        bytes.insert(peer, vec![idle]);
    }
    row("memory of an idle connection", "B", &bytes);
    Ok(())
}

fn work(
    name: &'static str,
    unit: &'static str,
    task: &'static str,
    run: fn(&Server, &Setting) -> Outcome<f64>,
    key: &'static str,
) -> Work {
    Work {
        name,
        unit,
        task,
        run,
        key,
    }
}

fn row(name: &str, unit: &str, times: &BTreeMap<&str, Vec<f64>>) {
    let median = |peer: &str| {
        let mut times = times[peer].clone();
        times.sort_unstable_by(f64::total_cmp);
        times[times.len() / 2]
    };
    let [hand, tokio, ours] = PEERS.map(median);
    println!(
        "| {name} | {hand:.0} {unit} | {tokio:.0} {unit} | {ours:.0} {unit} | {:.2} | {:.2} |",
        hand / ours,
        tokio / ours
    );
}
