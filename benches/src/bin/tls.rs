//! TLS: bowline beside a hand-written epoll loop on rustls, tokio-rustls, hyper, nginx and
//! HAProxy, in one run.
//!
//! ```text
//! cargo run --release -p bowline-bench --features tls --bin tls
//!     --quick          a short form
//!     --rounds N       how often each is measured
//!     --only WORD      what has this in its name: "resumed", "request", "idle"
//!     --instructions   counted by valgrind, of which a busy machine changes nothing
//! ```
//!
//! Each server is a process of its own, of which the CPU time is measured. The version is
//! 1.3 and the suite TLS_AES_128_GCM_SHA256 for all; the cryptography is ring's, but for
//! nginx and HAProxy, which have OpenSSL's. The generator is of rustls as it comes. Rounds go
//! by turns. What is shown is the median of them, the least, and ratios of one round, of
//! which the median and the middle half are shown.
//!
//! nginx and HAProxy take part where they are installed.

#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a program that prints"
)]

#[path = "../sys.rs"]
#[allow(dead_code, unused_imports, reason = "the other programs use the rest")]
mod sys;

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::error::Error;
use std::io::{self, BufRead as _, BufReader, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

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
use rustls::{
    ClientConfig, ClientConnection, HandshakeKind, RootCertStore, ServerConfig, ServerConnection,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

#[global_allocator]
static ALLOCATOR: sys::Counting = sys::Counting;

type Outcome<T = ()> = Result<T, Box<dyn Error>>;

/// Whose records are ours to compare.
const PEERS: [&str; 3] = ["by hand", "tokio-rustls", "bowline"];

/// Who can answer a request of HTTP.
const SERVERS: [&str; 5] = ["by hand", "hyper", "nginx", "haproxy", "bowline"];

/// What is sent at once, where much is.
const CHUNK: usize = 16_384;
const BUFFER: usize = 65_536;

const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n";
const ANSWER: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";

fn main() -> Outcome {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match *arguments {
        ["serve", peer, task, directory] => serve(peer, task, Path::new(directory)),
        [] => compare(15, ""),
        ["--quick"] => compare(3, ""),
        ["--rounds", rounds] => compare(rounds.parse()?, ""),
        ["--rounds", rounds, "--only", word] => compare(rounds.parse()?, word),
        ["--instructions"] => count(),
        _ => Err("usage: tls [--quick | --rounds N [--only WORD] | --instructions]".into()),
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
        "hyper" => with_hyper(config, listener),
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
                        "answer" => self.tls.writer().write_all(ANSWER)?,
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
                    if task == "answer" {
                        stream.write_all(ANSWER).await?;
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

fn with_hyper(config: ServerConfig, listener: TcpListener) -> Outcome {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let local = tokio::task::LocalSet::new();
    local.block_on(&runtime, async move {
        let listener = tokio::net::TcpListener::from_std(listener)?;
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
        loop {
            let (socket, _) = listener.accept().await?;
            let acceptor = acceptor.clone();
            tokio::task::spawn_local(async move {
                let stream = acceptor.accept(socket).await?;
                let service = hyper::service::service_fn(|_| async {
                    Ok::<_, Infallible>(hyper::Response::new("ok".to_owned()))
                });
                let served = hyper::server::conn::http1::Builder::new()
                    .serve_connection(hyper_util::rt::TokioIo::new(stream), service);
                served.await.map_err(io::Error::other)
            });
        }
    })
}

/// One request of HTTP that fits a read, and its answer.
struct Answers;

impl<T: Transport> Protocol<T> for Answers {
    fn data_received(&mut self, cx: &mut Context<'_, T>, _: &[u8]) {
        cx.transport.write(ANSWER);
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
        "answer" => reactor.listen(here, |_: &Address| Answers),
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
    said: Option<BufReader<ChildStdout>>,
    address: SocketAddr,
}

impl Server {
    fn start(peer: &str, task: &str, directory: &Path) -> Outcome<Self> {
        match peer {
            "nginx" | "haproxy" => Self::start_program(peer, directory),
            _ => Self::start_own(
                Command::new(std::env::current_exe()?),
                peer,
                task,
                directory,
            ),
        }
    }

    fn start_own(mut command: Command, peer: &str, task: &str, directory: &Path) -> Outcome<Self> {
        command.args(["serve", peer, task]).arg(directory);
        sys::pin_child(&mut command, 0);
        let mut child = command.stdout(Stdio::piped()).spawn()?;
        let mut said = BufReader::new(child.stdout.take().ok_or("no output")?);
        let mut line = String::new();
        said.read_line(&mut line)?;
        Ok(Self {
            child,
            said: Some(said),
            address: line.trim_end().parse()?,
        })
    }

    /// One process, which answers by its configuration.
    fn start_program(peer: &str, directory: &Path) -> Outcome<Self> {
        let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let file = directory.join(peer);
        let folder = directory.display();
        let mut command = Command::new(peer);
        if peer == "nginx" {
            let text = format!(
                "daemon off; master_process off; worker_processes 1; error_log stderr crit;\n\
                 pid {folder}/nginx.pid; events {{ worker_connections 4096; }}\n\
                 http {{ access_log off; keepalive_requests 100000000;\n\
                 client_body_temp_path {folder}/t1; proxy_temp_path {folder}/t2;\n\
                 fastcgi_temp_path {folder}/t3; uwsgi_temp_path {folder}/t4;\n\
                 scgi_temp_path {folder}/t5; server {{ listen {address} ssl;\n\
                 ssl_certificate {folder}/cert; ssl_certificate_key {folder}/key;\n\
                 ssl_protocols TLSv1.3; ssl_session_timeout 1h;\n\
                 location / {{ return 200 ok; }} }} }}\n"
            );
            std::fs::write(&file, text)?;
            command.arg("-c").arg(file);
        } else {
            // One file has both.
            let both = directory.join("both");
            let mut pem = std::fs::read(directory.join("cert"))?;
            pem.extend(std::fs::read(directory.join("key"))?);
            std::fs::write(&both, pem)?;
            let text = format!(
                "global\n nbthread 1\n maxconn 4096\ndefaults\n mode http\n timeout client 1h\n \
                 timeout connect 1h\n timeout server 1h\nfrontend all\n bind {address} ssl crt {} \
                 ssl-min-ver TLSv1.3\n http-request return status 200 content-type text/plain \
                 string ok\n",
                both.display()
            );
            std::fs::write(&file, text)?;
            command.args(["-db", "-f"]).arg(file);
        }
        sys::pin_child(&mut command, 0);
        let child = command
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let server = Self {
            child,
            said: None,
            address,
        };
        let began = Instant::now();
        while TcpStream::connect(address).is_err() {
            if began.elapsed() > Duration::from_secs(10) {
                return Err(format!("{peer} does not listen").into());
            }
            thread::sleep(Duration::from_millis(10));
        }
        Ok(server)
    }

    fn cpu_time(&self) -> Outcome<Duration> {
        Ok(sys::cpu_time(self.child.id())?)
    }

    /// How many bytes it has allocated; of a program, how many of its pages are its own.
    fn memory(&mut self) -> Outcome<u64> {
        let Some(said) = &mut self.said else {
            let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
            let line = status
                .lines()
                .find_map(|line| line.strip_prefix("RssAnon:"));
            let kib = line.and_then(|line| line.trim().strip_suffix(" kB"));
            return Ok(kib.ok_or("no RssAnon")?.parse::<u64>()? * 1_024);
        };
        sys::signal_report(self.child.id())?;
        let mut bytes = [0; 8];
        said.read_exact(&mut bytes)?;
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

    /// A request, and its answer.
    fn ask(&mut self) -> Outcome {
        self.send(REQUEST)?;
        self.receive_answer()
    }

    /// Ours and those of the others end so.
    fn receive_answer(&mut self) -> Outcome {
        let mut answer = Vec::new();
        while !answer.ends_with(b"\r\n\r\nok") {
            if self.tls.read_tls(&mut self.socket)? == 0 {
                return Err("the server has ended".into());
            }
            let state = self.tls.process_new_packets()?;
            let start = answer.len();
            answer.resize(start + state.plaintext_bytes_to_read(), 0);
            self.tls.reader().read_exact(&mut answer[start..])?;
        }
        match answer.starts_with(b"HTTP/1.1 200 ") {
            true => Ok(()),
            false => Err("it was not found".into()),
        }
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
    task: &'static str,
    key: &'static str,
    /// Does so much; answers what the server has used for one.
    run: fn(&Server, &Setting, usize) -> Outcome<f64>,
    /// How much is measured, and how much is counted, less the first.
    much: usize,
    counted: [usize; 2],
}

const WORKS: [Work; 6] = [
    Work {
        name: "handshake, full, P-256",
        task: "echo",
        key: "P-256",
        run: full,
        much: 200,
        counted: [10, 40],
    },
    Work {
        name: "handshake, full, RSA-2048",
        key: "RSA-2048",
        ..HANDSHAKE
    },
    Work {
        name: "handshake, resumed, P-256",
        run: resumed,
        ..HANDSHAKE
    },
    Work {
        name: "echo of 64 B on 64 connections",
        run: echoes,
        much: 150,
        counted: [10, 60],
        ..HANDSHAKE
    },
    Work {
        name: "16 KiB received",
        task: "sink",
        run: up,
        much: BULK / CHUNK,
        counted: [200, 1_200],
        ..HANDSHAKE
    },
    Work {
        name: "16 KiB sent",
        task: "source",
        run: down,
        much: BULK / CHUNK,
        counted: [1_000, 5_000],
        ..HANDSHAKE
    },
];

const HANDSHAKE: Work = Work {
    name: "handshake",
    task: "echo",
    key: "P-256",
    run: full,
    much: 200,
    counted: [10, 40],
};

/// With one request of HTTP and its answer each.
const REQUESTS: [Work; 4] = [
    Work {
        name: "full handshake, P-256, and a request",
        task: "answer",
        run: full_request,
        ..HANDSHAKE
    },
    Work {
        name: "full handshake, RSA-2048, and a request",
        task: "answer",
        key: "RSA-2048",
        run: full_request,
        ..HANDSHAKE
    },
    Work {
        name: "resumed handshake, P-256, and a request",
        task: "answer",
        run: resumed_request,
        ..HANDSHAKE
    },
    Work {
        name: "request on one of 64 connections",
        task: "answer",
        run: requests,
        much: 150,
        counted: [10, 60],
        ..HANDSHAKE
    },
];

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

const CONNECTIONS: usize = 64;
const BULK: usize = 64 << 20;
const IDLE: usize = 300;

fn full(server: &Server, setting: &Setting, count: usize) -> Outcome<f64> {
    handshakes(server, setting, false, count, echo_one)
}

fn resumed(server: &Server, setting: &Setting, count: usize) -> Outcome<f64> {
    handshakes(server, setting, true, count, echo_one)
}

fn full_request(server: &Server, setting: &Setting, count: usize) -> Outcome<f64> {
    handshakes(server, setting, false, count, Client::ask)
}

fn resumed_request(server: &Server, setting: &Setting, count: usize) -> Outcome<f64> {
    handshakes(server, setting, true, count, Client::ask)
}

fn echo_one(client: &mut Client) -> Outcome {
    client.send(b"x")?;
    client.receive(1, &mut [0; 16])
}

/// Each with something there and back, behind which the tickets have come.
fn handshakes(
    server: &Server,
    setting: &Setting,
    resumes: bool,
    count: usize,
    then: fn(&mut Client) -> Outcome,
) -> Outcome<f64> {
    let config = setting.config(resumes)?;
    let one = || {
        let mut client = Client::connect(server.address, &config)?;
        then(&mut client)?;
        Ok::<_, Box<dyn Error>>(client.tls.handshake_kind())
    };
    one()?;
    let before = server.cpu_time()?;
    let mut resumed = 0;
    for _ in 0..count {
        resumed += usize::from(one()? == Some(HandshakeKind::Resumed));
    }
    let took = server.cpu_time()? - before;
    let wanted = if resumes { count } else { 0 };
    if resumed != wanted {
        return Err(format!("{resumed} of {count} handshakes were resumed").into());
    }
    Ok(took.as_nanos() as f64 / count as f64)
}

fn echoes(server: &Server, setting: &Setting, count: usize) -> Outcome<f64> {
    rounds(server, setting, count, |clients, buffer| {
        for client in &mut *clients {
            client.send(&[7; 64])?;
        }
        for client in clients {
            client.receive(64, buffer)?;
        }
        Ok(())
    })
}

fn requests(server: &Server, setting: &Setting, count: usize) -> Outcome<f64> {
    rounds(server, setting, count, |clients, _| {
        for client in &mut *clients {
            client.send(REQUEST)?;
        }
        for client in clients {
            client.receive_answer()?;
        }
        Ok(())
    })
}

fn rounds(
    server: &Server,
    setting: &Setting,
    count: usize,
    round: fn(&mut [Client], &mut [u8]) -> Outcome,
) -> Outcome<f64> {
    let config = setting.config(false)?;
    let clients = (0..CONNECTIONS).map(|_| Client::connect(server.address, &config));
    let mut clients = clients.collect::<Outcome<Vec<_>>>()?;
    let mut buffer = [0; 1_024];
    round(&mut clients, &mut buffer)?;
    let before = server.cpu_time()?;
    for _ in 0..count {
        round(&mut clients, &mut buffer)?;
    }
    let took = server.cpu_time()? - before;
    Ok(took.as_nanos() as f64 / (count * CONNECTIONS) as f64)
}

fn up(server: &Server, setting: &Setting, count: usize) -> Outcome<f64> {
    let mut client = Client::connect(server.address, &setting.config(false)?)?;
    let chunk = vec![7; CHUNK];
    client.send(&chunk)?;
    let before = server.cpu_time()?;
    for _ in 0..count {
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
    Ok(took.as_nanos() as f64 / count as f64)
}

fn down(server: &Server, setting: &Setting, count: usize) -> Outcome<f64> {
    let mut client = Client::connect(server.address, &setting.config(false)?)?;
    let mut buffer = vec![0; BUFFER];
    client.send(b"x")?;
    client.receive(CHUNK, &mut buffer)?;
    let before = server.cpu_time()?;
    client.receive(count * CHUNK, &mut buffer)?;
    let took = server.cpu_time()? - before;
    Ok(took.as_nanos() as f64 / count as f64)
}

/// What an established connection that has echoed once keeps allocated.
fn idle(peer: &str, setting: &Setting, directory: &Path) -> Outcome<f64> {
    let task = if SERVERS[1..4].contains(&peer) {
        "answer"
    } else {
        "echo"
    };
    let mut server = Server::start(peer, task, directory)?;
    let config = setting.config(false)?;
    let address = server.address;
    let connect = |count: usize| {
        let mut all = Vec::new();
        for _ in 0..count {
            let mut client = Client::connect(address, &config)?;
            match task {
                "answer" => client.ask()?,
                _ => echo_one(&mut client)?,
            }
            all.push(client);
        }
        Ok::<_, Box<dyn Error>>(all)
    };
    // What a server has once is there then.
    let first = connect(100)?;
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

/// Which of these can be started.
fn there(peers: &[&'static str]) -> Vec<&'static str> {
    let is_there = |peer: &str| match peer {
        "nginx" | "haproxy" => {
            let mut run = Command::new(peer);
            let run = run.arg("-v").stdout(Stdio::null()).stderr(Stdio::null());
            let run = run.status();
            let is_there = run.is_ok_and(|status| status.success());
            if !is_there {
                eprintln!("NOT RUN: {peer} is not installed");
            }
            is_there
        }
        _ => true,
    };
    peers
        .iter()
        .copied()
        .filter(|peer| is_there(peer))
        .collect()
}

fn compare(rounds: usize, only: &str) -> Outcome {
    sys::raise_descriptor_limit()?;
    sys::pin(1)?;
    println!(
        "CPU time of the server for one, in ns: the median of {rounds} rounds (and the least)."
    );
    let scratch = tempfile::tempdir()?;
    table(&WORKS, &PEERS, rounds, (only, scratch.path()))?;
    table(&REQUESTS, &there(&SERVERS), rounds, (only, scratch.path()))?;
    const IDLE_CONNECTION: &str = "an idle connection";
    if !IDLE_CONNECTION.contains(only) {
        return Ok(());
    }
    let setting = certify(scratch.path(), "P-256")?;
    println!("\n| {IDLE_CONNECTION}, after an echo or an answer | bytes |");
    println!("|---|---|");
    for peer in there(&[
        "by hand",
        "tokio-rustls",
        "hyper",
        "nginx",
        "haproxy",
        "bowline",
    ]) {
        let idle = idle(peer, &setting, scratch.path())?;
        let of = match peer {
            "nginx" | "haproxy" => ", of pages",
            _ => "",
        };
        println!("| {peer}{of} | {idle:.0} |");
    }
    Ok(())
}

/// What each peer took in each round, and how that stands to what bowline did in the same.
fn table(
    works: &[Work],
    peers: &[&'static str],
    rounds: usize,
    (only, directory): (&str, &Path),
) -> Outcome {
    let works: Vec<&Work> = works.iter().filter(|it| it.name.contains(only)).collect();
    if works.is_empty() {
        return Ok(());
    }
    let others = peers.iter().filter(|peer| **peer != "bowline");
    let others: Vec<&str> = others.copied().collect();
    let titles: Vec<String> = others
        .iter()
        .map(|peer| format!("{peer} / bowline"))
        .collect();
    println!(
        "\n| for one | {} | {} |",
        peers.join(" | "),
        titles.join(" | ")
    );
    println!("|---|{}", "---|".repeat(peers.len() + others.len()));
    for work in works {
        let setting = certify(directory, work.key)?;
        let servers = peers
            .iter()
            .map(|peer| Server::start(peer, work.task, directory));
        let servers = servers.collect::<Outcome<Vec<_>>>()?;
        let mut times: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
        for round in 0..rounds {
            // None is always behind the same one.
            for at in 0..peers.len() {
                let at = (at + round) % peers.len();
                let took = (work.run)(&servers[at], &setting, work.much)?;
                times.entry(peers[at]).or_default().push(took);
            }
        }
        let mut line = format!("| {} ", work.name);
        for peer in peers {
            let sorted = sorted(times[peer].iter().copied());
            line += &format!("| {:.0} ({:.0}) ", sorted[rounds / 2], sorted[0]);
        }
        for peer in &others {
            let pairs = times[peer].iter().zip(&times["bowline"]);
            let ratios = sorted(pairs.map(|(other, ours)| other / ours));
            let quarter = |of: usize| ratios[(rounds * of / 4).min(rounds - 1)];
            let (low, middle, high) = (quarter(1), quarter(2), quarter(3));
            line += &format!("| {middle:.2} ({low:.2}-{high:.2}) ");
        }
        println!("{line}|");
    }
    Ok(())
}

fn sorted(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_unstable_by(f64::total_cmp);
    values
}

/// The instructions of each peer in user space.
fn count() -> Outcome {
    let scratch = tempfile::tempdir()?;
    println!(
        "| instructions for one | {} | by hand / bowline | tokio-rustls / bowline |",
        PEERS.join(" | ")
    );
    println!("|---|---|---|---|---|---|");
    for work in &WORKS {
        let setting = certify(scratch.path(), work.key)?;
        let mut each = Vec::new();
        for peer in PEERS {
            let [few, many] = work.counted;
            let counted = |much| instructions(peer, work, &setting, much, scratch.path());
            let all = counted(many)? as f64 - counted(few)? as f64;
            let per = if work.name.starts_with("echo") {
                CONNECTIONS
            } else {
                1
            };
            each.push(all / ((many - few) * per) as f64);
        }
        let [hand, tokio, ours] = each[..] else {
            unreachable!("one each")
        };
        println!(
            "| {} | {hand:.0} | {tokio:.0} | {ours:.0} | {:.2} | {:.2} |",
            work.name,
            hand / ours,
            tokio / ours
        );
    }
    Ok(())
}

fn instructions(
    peer: &str,
    work: &Work,
    setting: &Setting,
    much: usize,
    directory: &Path,
) -> Outcome<u64> {
    let mut command = Command::new("valgrind");
    command.args(["--tool=callgrind", "--callgrind-out-file=/dev/null"]);
    command.arg(std::env::current_exe()?).stderr(Stdio::piped());
    let mut server = Server::start_own(command, peer, work.task, directory)?;
    (work.run)(&server, setting, much)?;
    sys::terminate(server.child.id())?;
    let mut text = String::new();
    let mut said = server.child.stderr.take().ok_or("no output")?;
    said.read_to_string(&mut text)?;
    let counted = text.lines().find_map(|line| line.split_once("Collected :"));
    let (_, counted) = counted.ok_or("valgrind has counted nothing")?;
    Ok(counted.trim().parse()?)
}
