//! TLS with programs that nobody here wrote: OpenSSL, curl, Python's ssl, GnuTLS.
//!
//! One that is not installed is said to be missing, and with `CI=true` or
//! `BOWLINE_INTEROP=require` that is a failure.

use std::cell::{Cell, RefCell};
use std::fs;
use std::io::{Read, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use bowline::endpoint::{Adopt as _, Connect as _, Listen as _};
use bowline::framing::{FrameContext, FrameReceiver, Framed, LineFramer};
use bowline::layers::{Stays, Stream, TcpSocket};
use bowline::tls::rustls::server::WebPkiClientVerifier;
use bowline::tls::rustls::{ServerConfig, version};
use bowline::tls::{
    StartTls, TicketKey, Tickets, Tls, TlsClient, TlsServer, TlsTransport, server_config_builder,
};
use bowline::{
    Address, CloseReason, Context, Detached, Protocol, Reactor, Tcp, Transport, TransportHandle,
    Transports, Unsent,
};

use crate::harness::{BOTH, IDENTITY, certified, client_config, provider, roots, server_config};
use crate::support::peers::has_program;

/// How long a program may take.
const DEADLINE: Duration = Duration::from_secs(20);

/// Whether this program is there; see [`has_program`].
#[track_caller]
fn has(program: &str, argument: &str) -> bool {
    let package = match program {
        "gnutls-cli" => "gnutls-bin",
        "stdbuf" => "coreutils",
        other => other,
    };
    has_program(program, argument, package)
}

/// A program at work, and what it has said so far.
struct Program {
    child: Child,
    stdin: Option<ChildStdin>,
    said: Arc<Mutex<Vec<u8>>>,
    listeners: Vec<JoinHandle<()>>,
}

impl Program {
    fn start(command: &mut Command) -> Self {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let said = Arc::default();
        let listeners = vec![
            listen(child.stdout.take().unwrap(), &said),
            listen(child.stderr.take().unwrap(), &said),
        ];
        Self {
            stdin: child.stdin.take(),
            child,
            said,
            listeners,
        }
    }

    fn tell(&mut self, what: &str) {
        let stdin = self.stdin.as_mut().expect("open");
        // It may have ended.
        let _ = stdin.write_all(what.as_bytes());
        let _ = stdin.flush();
    }

    fn said(&self) -> String {
        String::from_utf8_lossy(&self.said.lock().unwrap()).into_owned()
    }

    /// Turns the reactor until the program has said this.
    #[track_caller]
    fn wait_for(&self, reactor: &mut Reactor, what: &str) {
        self.wait_until(reactor, what, |said| said.contains(what));
    }

    #[track_caller]
    fn wait_until(&self, reactor: &mut Reactor, what: &str, is_said: impl Fn(&str) -> bool) {
        let began = Instant::now();
        while !is_said(&self.said()) {
            assert!(
                began.elapsed() < DEADLINE,
                "no {what:?} in:\n{}",
                self.said()
            );
            reactor.turn(Some(Duration::from_millis(5)));
        }
    }

    /// Turns the reactor until the program has ended; whether well, and what it has said.
    #[track_caller]
    fn end(&mut self, reactor: &mut Reactor) -> (bool, String) {
        let began = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                for listener in self.listeners.drain(..) {
                    listener.join().unwrap();
                }
                return (status.success(), self.said());
            }
            assert!(began.elapsed() < DEADLINE, "it goes on:\n{}", self.said());
            reactor.turn(Some(Duration::from_millis(5)));
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn listen(mut stream: impl Read + Send + 'static, said: &Arc<Mutex<Vec<u8>>>) -> JoinHandle<()> {
    let said = Arc::clone(said);
    thread::spawn(move || {
        let mut buffer = [0; 4_096];
        while let Ok(count @ 1..) = stream.read(&mut buffer) {
            said.lock().unwrap().extend_from_slice(&buffer[..count]);
        }
    })
}

/// What the programs are given as files.
struct Files {
    directory: tempfile::TempDir,
}

impl Files {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let authority = IDENTITY.authority.pem();
        fs::write(directory.path().join("ca"), authority).unwrap();
        for name in ["server", "client"] {
            let key = rcgen::KeyPair::generate().unwrap();
            let names = vec!["localhost".into()];
            let parameters = rcgen::CertificateParams::new(names).unwrap();
            let certificate = parameters.signed_by(&key, &IDENTITY.authority).unwrap();
            let path = directory.path();
            fs::write(path.join(format!("{name}.crt")), certificate.pem()).unwrap();
            fs::write(path.join(format!("{name}.key")), key.serialize_pem()).unwrap();
        }
        Self { directory }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }
}

/// What our end has been told.
type Log = Rc<RefCell<Vec<String>>>;

/// Sends back what it gets.
struct Echo(Log);

impl<T: TlsTransport> Protocol<T> for Echo {
    fn connection_made(&mut self, cx: &mut Context<'_, T>) {
        let tls = cx.transport.tls().unwrap();
        self.0.borrow_mut().push(format!(
            "{:?} {:?} certificates {} resumed {}",
            tls.version().unwrap(),
            tls.alpn_protocol().map(String::from_utf8_lossy),
            tls.peer_certificates().len(),
            tls.is_resumed(),
        ));
    }

    fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
        cx.transport.write(data);
    }

    fn connection_lost(&mut self, _: &mut Context<'_, T>, reason: &CloseReason) {
        self.0.borrow_mut().push(reason.to_string());
    }
}

fn echo(server: TlsServer) -> (Reactor, SocketAddr, Log) {
    let mut reactor = Reactor::new().unwrap();
    let log = Log::default();
    let told = Rc::clone(&log);
    let here = Tcp::at(([127, 0, 0, 1], 0).into()).layer(server);
    let factory = move |_: &Address| Echo(Rc::clone(&told));
    let listener = reactor.listen(here, factory).unwrap();
    let address = reactor.get(listener).unwrap().address().as_inet().unwrap();
    (reactor, address, log)
}

#[track_caller]
fn run_until_logged(reactor: &mut Reactor, log: &Log, count: usize) {
    let began = Instant::now();
    while log.borrow().len() < count {
        assert!(
            began.elapsed() < DEADLINE,
            "no more than {:?}",
            log.borrow()
        );
        reactor.turn(Some(Duration::from_millis(5)));
    }
}

fn s_client(address: SocketAddr, files: &Files, arguments: &[&str]) -> Program {
    let mut command = Command::new("openssl");
    command
        .args([
            "s_client",
            "-servername",
            "localhost",
            "-verify_return_error",
        ])
        .args(["-verify_hostname", "localhost", "-connect"])
        .arg(address.to_string())
        .arg("-CAfile")
        .arg(files.path("ca"))
        .args(arguments);
    Program::start(&mut command)
}

fn with_alpn(mut config: ServerConfig) -> ServerConfig {
    config.alpn_protocols = vec![b"echo".to_vec()];
    config
}

#[test]
fn openssl_talks_to_us_in_both_versions() {
    if !has("openssl", "version") {
        return;
    }
    let files = Files::new();
    for version in ["1_3", "1_2"] {
        let (mut reactor, address, log) = echo(TlsServer::new(with_alpn(server_config(BOTH))));
        let version_argument = format!("-tls{version}");
        let arguments = [version_argument.as_str(), "-alpn", "other,echo"];
        let mut client = s_client(address, &files, &arguments);
        run_until_logged(&mut reactor, &log, 1);
        client.tell("hello there\n");
        // It may be seen in what it says of the session.
        client.wait_for(&mut reactor, "\nhello there\n");
        if version == "1_3" {
            // New keys of theirs, and of ours too, several times.
            for round in 0..5 {
                for (number, command) in ["k\n", "K\n"].into_iter().enumerate() {
                    // What it reads with a command is not looked at.
                    client.tell(command);
                    let wanted = 2 * round + number + 1;
                    client.wait_until(&mut reactor, "KEYUPDATE", |said| {
                        said.matches("KEYUPDATE").count() == wanted
                    });
                }
                client.tell(&format!("round {round}\n"));
                client.wait_for(&mut reactor, &format!("\nround {round}\n"));
            }
        }
        client.tell("Q\n");
        let (_, said) = client.end(&mut reactor);
        assert!(said.contains("Verification: OK"), "{said}");
        assert!(said.contains("ALPN protocol: echo"), "{said}");
        run_until_logged(&mut reactor, &log, 2);
        let made = format!("TLSv{version} Some(\"echo\") certificates 0 resumed false");
        assert_eq!(*log.borrow(), [made, "closed cleanly".into()]);
    }
}

/// Answers, and is given away between two answers.
struct Passed<P> {
    answers: P,
    handle: Rc<Cell<Option<TransportHandle>>>,
}

impl<T: Transport, P: Protocol<T>> Protocol<T> for Passed<P> {
    fn connection_made(&mut self, cx: &mut Context<'_, T>) {
        self.handle.set(Some(cx.transport.handle()));
    }

    fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
        self.answers.data_received(cx, data);
    }
}

/// A server of one connection, which goes from hand to hand.
struct Hands<P> {
    reactor: Reactor,
    address: SocketAddr,
    tls: TlsServer,
    handle: Rc<Cell<Option<TransportHandle>>>,
    protocol: std::marker::PhantomData<P>,
}

impl<P: Protocol<Stream<Tls<TcpSocket>>>> Hands<P> {
    fn new(config: ServerConfig, make: fn() -> P) -> Self {
        let tls = TlsServer::new(config).may_move(true);
        let mut reactor = Reactor::new().unwrap();
        let handle: Rc<Cell<_>> = Rc::default();
        let given = Rc::clone(&handle);
        let here = Tcp::at(([127, 0, 0, 1], 0).into()).layer(tls.clone());
        let factory = move |_: &Address| Passed {
            answers: make(),
            handle: Rc::clone(&given),
        };
        let listener = reactor.listen(here, factory).unwrap();
        let address = reactor.get(listener).unwrap().address().as_inet().unwrap();
        Self {
            reactor,
            address,
            tls,
            handle,
            protocol: std::marker::PhantomData,
        }
    }

    /// Gives the connection away, and takes it.
    fn pass_on(&mut self) {
        let Some(handle) = self.handle.take() else {
            return;
        };
        let tls = self.tls.clone();
        self.reactor.detach(handle, move |reactor, detached| {
            // It may be over.
            let Ok(mut detached): Result<Detached<Passed<P>>, _> = detached else {
                return;
            };
            let state = match detached.pack() {
                Ok(mut layers) => layers.pop().expect("one of TLS"),
                Err(Stays::Closing) => return,
                Err(stays) => panic!("{stays}"),
            };
            let unsent = Unsent {
                bytes: detached.unsent,
                descriptors: Vec::new(),
            };
            let kind = Tcp.layer(tls.resume(state).unwrap()).with_unsent(unsent);
            reactor.adopt(kind, detached.fd, detached.protocol).unwrap();
        });
        self.reactor.turn(Some(Duration::ZERO));
    }
}

/// Sends back what it gets.
struct Back;

impl<T: Transport> Protocol<T> for Back {
    fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
        cx.transport.write(data);
    }
}

#[test]
fn openssl_goes_on_while_its_connection_goes_from_hand_to_hand() {
    if !has("openssl", "version") {
        return;
    }
    let files = Files::new();
    for arguments in [
        ["-tls1_3", "-ciphersuites", "TLS_AES_128_GCM_SHA256"],
        ["-tls1_3", "-ciphersuites", "TLS_AES_256_GCM_SHA384"],
        ["-tls1_3", "-ciphersuites", "TLS_CHACHA20_POLY1305_SHA256"],
        ["-tls1_2", "-cipher", "ECDHE-ECDSA-AES128-GCM-SHA256"],
        ["-tls1_2", "-cipher", "ECDHE-ECDSA-CHACHA20-POLY1305"],
    ] {
        let mut hands = Hands::new(server_config(BOTH), || Back);
        let mut client = s_client(hands.address, &files, &arguments);
        client.wait_for(&mut hands.reactor, "Verification: OK");
        for round in 0..12 {
            let line = format!("line {round} of {arguments:?}\n");
            client.tell(&line);
            client.wait_for(&mut hands.reactor, &format!("\n{line}"));
            hands.pass_on();
            if arguments[0] == "-tls1_3" {
                let command = ["k\n", "K\n"][round % 2];
                client.tell(command);
                client.wait_until(&mut hands.reactor, "KEYUPDATE", |said| {
                    said.matches("KEYUPDATE").count() > round
                });
                hands.pass_on();
            }
        }
        client.tell("Q\n");
        client.end(&mut hands.reactor);
    }
}

#[test]
fn openssl_may_not_renegotiate() {
    if !has("openssl", "version") {
        return;
    }
    let files = Files::new();
    let (mut reactor, address, log) = echo(TlsServer::new(server_config(BOTH)));
    let mut client = s_client(address, &files, &["-tls1_2"]);
    run_until_logged(&mut reactor, &log, 1);
    client.tell("before\n");
    client.wait_for(&mut reactor, "\nbefore\n");
    client.tell("R\n");
    client.wait_for(&mut reactor, "no renegotiation");
}

#[test]
fn openssl_goes_on_with_its_session_at_another_worker() {
    if !has("openssl", "version") {
        return;
    }
    let files = Files::new();
    for version in ["-tls1_3", "-tls1_2"] {
        let key = TicketKey::generate().unwrap();
        let session = files.path(&format!("session{version}"));
        let session = session.to_str().unwrap();
        for (round, way) in ["-sess_out", "-sess_in"].into_iter().enumerate() {
            let mut config = server_config(BOTH);
            config.send_tls13_tickets = 2;
            config.ticketer = Tickets::new(key.clone()).ticketer();
            let (mut reactor, address, log) = echo(TlsServer::new(config));
            let mut client = s_client(address, &files, &[version, way, session]);
            run_until_logged(&mut reactor, &log, 1);
            client.tell("hello\n");
            client.wait_for(&mut reactor, "\nhello\n");
            client.tell("Q\n");
            client.end(&mut reactor);
            let wanted = format!("resumed {}", round == 1);
            assert!(log.borrow()[0].ends_with(&wanted), "{:?}", log.borrow());
        }
    }
}

#[test]
fn openssl_shows_its_certificate() {
    if !has("openssl", "version") {
        return;
    }
    let files = Files::new();
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots()), provider());
    let config = server_config_builder()
        .with_client_cert_verifier(verifier.build().unwrap())
        .with_single_cert(IDENTITY.chain.clone(), IDENTITY.key.clone_key())
        .unwrap();
    let server = TlsServer::new(config);
    for version in ["-tls1_3", "-tls1_2"] {
        let (mut reactor, address, log) = echo(server.clone());
        let certificate = files.path("client.crt");
        let key = files.path("client.key");
        let shown = ["-cert", certificate.to_str().unwrap()];
        let with = ["-key", key.to_str().unwrap(), version];
        let mut client = s_client(address, &files, &[shown.as_slice(), &with].concat());
        run_until_logged(&mut reactor, &log, 1);
        let made = log.borrow()[0].clone();
        // It may show who has certified it, too.
        assert!(!made.contains("certificates 0"), "{made}");
        client.tell("hello\n");
        client.wait_for(&mut reactor, "\nhello\n");
        drop(client);
        // Without one it is refused, and says so.
        let mut client = s_client(address, &files, &[version]);
        let (_, said) = client.end(&mut reactor);
        assert!(
            said.contains("certificate required") || said.contains("handshake failure"),
            "{said}"
        );
    }
}

/// As much of SMTP as agreeing on TLS takes.
struct Smtp {
    server: TlsServer,
    is_secured: bool,
}

impl<T: TlsTransport> FrameReceiver<T, LineFramer> for Smtp {
    fn connection_made(&mut self, cx: &mut FrameContext<'_, T, LineFramer>) {
        cx.transport.write(b"220 localhost ready\r\n");
    }

    fn frame_received(&mut self, cx: &mut FrameContext<'_, T, LineFramer>, line: &[u8]) {
        let line = line.to_ascii_uppercase();
        if line.starts_with(b"EHLO") {
            let answer: &[u8] = match self.is_secured {
                true => b"250 localhost, in private\r\n",
                false => b"250-localhost\r\n250 STARTTLS\r\n",
            };
            cx.transport.write(answer);
        } else if line == b"STARTTLS" {
            cx.transport.write(b"220 go on\r\n");
            let rest = cx.framing.take_rest();
            cx.transport.start_tls(&self.server, &rest).unwrap();
        } else if line == b"QUIT" {
            cx.transport.write(b"221 bye\r\n");
            cx.transport.lose_connection();
        } else {
            cx.transport.write(b"500 what?\r\n");
        }
    }

    fn connection_secured(&mut self, _: &mut FrameContext<'_, T, LineFramer>) {
        self.is_secured = true;
    }
}

fn smtp() -> (Reactor, SocketAddr) {
    let mut reactor = Reactor::new().unwrap();
    let server = TlsServer::new(server_config(BOTH));
    let here = Tcp::at(([127, 0, 0, 1], 0).into()).layer(StartTls);
    let factory = move |_: &Address| {
        let smtp = Smtp {
            server: server.clone(),
            is_secured: false,
        };
        Framed::new(LineFramer::new(), smtp)
    };
    let listener = reactor.listen(here, factory).unwrap();
    let address = reactor.get(listener).unwrap().address().as_inet().unwrap();
    (reactor, address)
}

#[test]
fn openssl_starts_tls_as_a_mail_client_does() {
    if !has("openssl", "version") {
        return;
    }
    let files = Files::new();
    for version in ["-tls1_3", "-tls1_2"] {
        let (mut reactor, address) = smtp();
        let mut client = s_client(address, &files, &["-starttls", "smtp", "-crlf", version]);
        client.wait_for(&mut reactor, "Verification: OK");
        client.tell("EHLO us\n");
        client.wait_for(&mut reactor, "250 localhost, in private");
        client.tell("noop\n");
        client.wait_for(&mut reactor, "500 what?");
        // A Q alone would be one of its own commands.
        client.tell("quit\n");
        client.wait_for(&mut reactor, "221 bye");
        client.end(&mut reactor);
    }
}

/// Says a line, and notes the answer.
struct Asks(Log);

impl<T: TlsTransport> Protocol<T> for Asks {
    fn connection_made(&mut self, cx: &mut Context<'_, T>) {
        let is_resumed = cx.transport.tls().is_some_and(|tls| tls.is_resumed());
        self.0.borrow_mut().push(format!("resumed {is_resumed}"));
        cx.transport.write(b"olleh\n");
    }

    fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
        let answer = String::from_utf8_lossy(data).into_owned();
        self.0.borrow_mut().push(answer);
        cx.transport.lose_connection();
    }

    fn connection_lost(&mut self, _: &mut Context<'_, T>, reason: &CloseReason) {
        self.0.borrow_mut().push(reason.to_string());
    }
}

#[test]
fn we_talk_to_openssl_in_both_versions() {
    if !has("openssl", "version") {
        return;
    }
    let files = Files::new();
    for (argument, version) in [("-tls1_3", &version::TLS13), ("-tls1_2", &version::TLS12)] {
        let mut reactor = Reactor::new().unwrap();
        let mut command = Command::new("openssl");
        command.args(["s_server", "-accept", "127.0.0.1:0", "-rev", argument]);
        command.args(["-Verify", "1", "-verify_return_error", "-CAfile"]);
        command.arg(files.path("ca"));
        command.arg("-cert").arg(files.path("server.crt"));
        command.arg("-key").arg(files.path("server.key"));
        let server = Program::start(&mut command);
        server.wait_for(&mut reactor, "ACCEPT 127.0.0.1:");
        server.wait_for(&mut reactor, "\n");
        let said = server.said();
        let address = said.split("ACCEPT ").nth(1).unwrap();
        let address: SocketAddr = address.lines().next().unwrap().parse().unwrap();
        let (chain, key) = certified(&IDENTITY.authority, &["us"]);
        let with_certificate = |chain: Vec<_>, key| {
            bowline::tls::rustls::ClientConfig::builder_with_provider(provider())
                .with_protocol_versions(&[version])
                .unwrap()
                .with_root_certificates(roots())
                .with_client_auth_cert(chain, key)
                .unwrap()
        };
        let client = TlsClient::new(with_certificate(chain, key), "localhost").unwrap();
        // The second goes on with the session of the first.
        for round in 0..2 {
            let log = Log::default();
            let told = Rc::clone(&log);
            let factory = move |_: &Address| Asks(Rc::clone(&told));
            let there = Tcp::to(address).layer(client.clone());
            reactor.connect(there, factory).unwrap();
            run_until_logged(&mut reactor, &log, 3);
            let made = format!("resumed {}", round > 0);
            assert_eq!(
                *log.borrow(),
                [made.as_str(), "hello\n", "closed cleanly"],
                "{argument}"
            );
        }
    }
}

/// It asks us for new keys, and to renegotiate.
#[test]
fn openssl_as_a_server_updates_keys_and_may_not_renegotiate() {
    if !has("openssl", "version") || !has("stdbuf", "--version") {
        return;
    }
    let files = Files::new();
    for (argument, version) in [("-tls1_3", &version::TLS13), ("-tls1_2", &version::TLS12)] {
        let mut reactor = Reactor::new().unwrap();
        // What it says of new keys it would keep in a buffer.
        let mut command = Command::new("stdbuf");
        command.args([
            "-oL",
            "openssl",
            "s_server",
            "-accept",
            "127.0.0.1:0",
            argument,
        ]);
        command.arg("-cert").arg(files.path("server.crt"));
        command.arg("-key").arg(files.path("server.key"));
        let mut server = Program::start(&mut command);
        server.wait_for(&mut reactor, "ACCEPT 127.0.0.1:");
        server.wait_for(&mut reactor, "\n");
        let said = server.said();
        let address = said.split("ACCEPT ").nth(1).unwrap();
        let address: SocketAddr = address.lines().next().unwrap().parse().unwrap();
        let client = TlsClient::new(client_config(&[version]), "localhost").unwrap();
        let log = Log::default();
        let told = Rc::clone(&log);
        let factory = move |_: &Address| Echo(Rc::clone(&told));
        reactor
            .connect(Tcp::to(address).layer(client), factory)
            .unwrap();
        run_until_logged(&mut reactor, &log, 1);
        server.tell("before\n");
        server.wait_for(&mut reactor, "\nbefore\n");
        if argument == "-tls1_3" {
            for round in 0..6 {
                // What it reads with a command is not looked at.
                server.tell(["k\n", "K\n"][round % 2]);
                server.wait_until(&mut reactor, "word of new keys", |said| {
                    said.matches("SSL_do_handshake -> 1").count() == round + 1
                });
                server.tell(&format!("round {round}\n"));
                server.wait_for(&mut reactor, &format!("\nround {round}\n"));
            }
            server.tell("Q\n");
            server.end(&mut reactor);
        } else {
            server.tell("r\n");
            server.wait_for(&mut reactor, "no renegotiation");
        }
    }
}

/// One answer to each request.
struct Http;

impl<T: Transport> Protocol<T> for Http {
    fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
        if data.ends_with(b"\r\n\r\n") {
            cx.transport
                .write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n");
            cx.transport.write_owned(vec![b'x'; 100_000]);
        }
    }
}

#[test]
fn curl_fetches_from_us_and_keeps_its_connection() {
    if !has("curl", "--version") {
        return;
    }
    let files = Files::new();
    for version in ["1.3", "1.2"] {
        let mut reactor = Reactor::new().unwrap();
        let server = TlsServer::new(server_config(BOTH));
        let here = Tcp::at(([127, 0, 0, 1], 0).into()).layer(server);
        let listener = reactor.listen(here, |_: &Address| Http).unwrap();
        let address = reactor.get(listener).unwrap().address().as_inet().unwrap();
        let mut command = Command::new("curl");
        let url = format!("https://localhost:{}/", address.port());
        command.args(["--silent", "--show-error", "--http1.1", "--noproxy", "*"]);
        command.args(["--tls-max", version, "--output", "/dev/null"]);
        command.args([
            "--write-out",
            "%{http_code} %{size_download} %{num_connects}\n",
        ]);
        command.args([
            "--resolve",
            &format!("localhost:{}:127.0.0.1", address.port()),
        ]);
        command.arg("--cacert").arg(files.path("ca"));
        command.args([&url, "--output", "/dev/null", &url]);
        let mut client = Program::start(&mut command);
        let (is_well, said) = client.end(&mut reactor);
        assert!(is_well, "{said}");
        assert_eq!(said, "200 100000 1\n200 100000 0\n", "TLS {version}");
    }
}

#[test]
fn curl_keeps_its_connection_while_it_goes_from_hand_to_hand() {
    if !has("curl", "--version") {
        return;
    }
    let files = Files::new();
    for version in ["1.3", "1.2"] {
        let mut hands = Hands::new(server_config(BOTH), || Http);
        let mut command = Command::new("curl");
        let port = hands.address.port();
        command.args(["--silent", "--show-error", "--http1.1", "--noproxy", "*"]);
        command.args(["--tls-max", version, "--limit-rate", "2M"]);
        let written = "%{http_code} %{size_download} %{num_connects}\n";
        command.args(["--write-out", written]);
        command.args(["--resolve", &format!("localhost:{port}:127.0.0.1")]);
        command.arg("--cacert").arg(files.path("ca"));
        for _ in 0..8 {
            command.args(["--output", "/dev/null"]);
            command.arg(format!("https://localhost:{port}/"));
        }
        let mut client = Program::start(&mut command);
        let began = Instant::now();
        let mut passed = 0;
        while client.child.try_wait().unwrap().is_none() {
            assert!(began.elapsed() < DEADLINE, "it goes on:\n{}", client.said());
            hands.reactor.turn(Some(Duration::from_millis(5)));
            passed += usize::from(hands.handle.get().is_some());
            hands.pass_on();
        }
        let (is_well, said) = client.end(&mut hands.reactor);
        assert!(is_well, "{said}");
        let later = "200 100000 0\n".repeat(7);
        assert_eq!(said, format!("200 100000 1\n{later}"), "TLS {version}");
        assert!(passed > 8, "{passed}");
    }
}

/// Sends and receives a megabyte, and closes in both directions.
const PYTHON: &str = r#"
import socket, ssl, sys
port, ca, version = int(sys.argv[1]), sys.argv[2], getattr(ssl.TLSVersion, sys.argv[3])
context = ssl.create_default_context(cafile=ca)
context.minimum_version = context.maximum_version = version
context.set_alpn_protocols(["echo"])
data = bytes(range(256)) * 4096
with socket.create_connection(("127.0.0.1", port)) as plain:
    with context.wrap_socket(plain, server_hostname="localhost") as tls:
        print(tls.version(), tls.selected_alpn_protocol())
        received = b""
        for start in range(0, len(data), 65536):
            piece = data[start:start + 65536]
            tls.sendall(piece)
            while len(received) < start + len(piece):
                received += tls.recv(65536)
        print(received == data)
        tls.unwrap()
print("closed by both")
"#;

#[test]
fn python_talks_to_us_in_both_versions() {
    if !has("python3", "--version") {
        return;
    }
    let files = Files::new();
    for version in ["TLSv1_3", "TLSv1_2"] {
        let (mut reactor, address, log) = echo(TlsServer::new(with_alpn(server_config(BOTH))));
        let mut command = Command::new("python3");
        command.args(["-c", PYTHON, &address.port().to_string()]);
        command.arg(files.path("ca")).arg(version);
        let mut client = Program::start(&mut command);
        let (is_well, said) = client.end(&mut reactor);
        assert!(is_well, "{said}");
        let named = version.replace('_', ".");
        assert_eq!(said, format!("{named} echo\nTrue\nclosed by both\n"));
        run_until_logged(&mut reactor, &log, 2);
        assert_eq!(log.borrow()[1], "closed cleanly");
    }
}

fn gnutls(address: SocketAddr, ca: &Path, arguments: &[&str]) -> Program {
    let mut command = Command::new("gnutls-cli");
    command.arg("--x509cafile").arg(ca).args(arguments);
    command.args(["--port", &address.port().to_string(), "localhost"]);
    Program::start(&mut command)
}

#[test]
fn gnutls_talks_to_us_in_both_versions() {
    if !has("gnutls-cli", "--version") {
        return;
    }
    let files = Files::new();
    for version in ["1.3", "1.2"] {
        let (mut reactor, address, log) = echo(TlsServer::new(with_alpn(server_config(BOTH))));
        let priority = format!("NORMAL:-VERS-ALL:+VERS-TLS{version}");
        let arguments = ["--alpn", "echo", "--priority", &priority];
        let mut client = gnutls(address, &files.path("ca"), &arguments);
        run_until_logged(&mut reactor, &log, 1);
        client.tell("hello there\n");
        client.wait_for(&mut reactor, "\nhello there\n");
        // The end of its input ends it.
        client.stdin = None;
        let (is_well, said) = client.end(&mut reactor);
        assert!(
            is_well && said.contains("The certificate is trusted"),
            "{said}"
        );
        run_until_logged(&mut reactor, &log, 2);
        assert_eq!(log.borrow()[1], "closed cleanly");
    }
}

#[test]
fn gnutls_starts_tls_as_a_mail_client_does() {
    if !has("gnutls-cli", "--version") {
        return;
    }
    let files = Files::new();
    let (mut reactor, address) = smtp();
    let arguments = ["--starttls-proto=smtp", "--crlf"];
    let mut client = gnutls(address, &files.path("ca"), &arguments);
    client.wait_for(&mut reactor, "The certificate is trusted");
    client.tell("EHLO us\n");
    client.wait_for(&mut reactor, "250 localhost, in private");
    client.tell("QUIT\n");
    client.wait_for(&mut reactor, "221 bye");
}
