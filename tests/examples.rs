//! The examples as their users run them: started, talked to, and stopped with
//! SIGTERM.

#[path = "examples/chat_nats.rs"]
mod chat_nats;
#[path = "examples/http.rs"]
mod http;
#[path = "examples/inspected.rs"]
mod inspected;
#[path = "examples/pubsub.rs"]
mod pubsub;
#[path = "support/mod.rs"]
mod support;
#[path = "examples/tls.rs"]
mod tls;

use std::collections::BTreeSet;
use std::env;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, ChildStderr, ChildStdout, Command, Output, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::net::sockopt;
use rustix::process::{Pid, Signal, kill_process, kill_process_group};

use crate::support::figures::{Bound, Figures, scaled};

/// How long anything here may take.
const DEADLINE: Duration = Duration::from_secs(30);

/// Where the built example is: cargo builds the examples with the tests, and
/// puts them beside each other.
fn path_of(example: &str) -> PathBuf {
    let mut path = env::current_exe().expect("Linux knows");
    path.pop();
    if path.ends_with("deps") {
        path.pop();
    }
    path.push("examples");
    path.push(example);
    assert!(
        path.exists(),
        "{} is missing: cargo build --examples",
        path.display()
    );
    path
}

/// A running example, killed if the test fails.
struct Example {
    child: Child,
    lines: BufReader<ChildStdout>,
    address: String,
}

impl Example {
    /// Starts it and waits until it says where it listens.
    #[track_caller]
    fn start(name: &str, arguments: &[&str]) -> Self {
        Self::begun(Command::new(path_of(name)).args(arguments))
    }

    /// The same, with what it logs at this level, which has to be read.
    #[track_caller]
    fn start_logging(name: &str, arguments: &[&str], level: &str) -> (Self, ChildStderr) {
        let mut command = Command::new(path_of(name));
        command.args(arguments).env("RUST_LOG", level);
        let mut this = Self::begun(command.stderr(Stdio::piped()));
        let log = this.child.stderr.take().expect("piped");
        (this, log)
    }

    #[track_caller]
    fn begun(command: &mut Command) -> Self {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("starts");
        let mut lines = BufReader::new(child.stdout.take().expect("piped"));
        let mut line = String::new();
        lines.read_line(&mut line).expect("says something");
        let address = line.trim_end().strip_prefix("listening on ");
        let address = address.expect("says first where it listens").to_owned();
        Self {
            child,
            lines,
            address,
        }
    }

    fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// Sends SIGTERM, and expects an orderly end. What it printed last.
    #[track_caller]
    fn stop(mut self) -> String {
        let began = Instant::now();
        kill_process(self.pid(), Signal::TERM).expect("it runs");
        let mut rest = String::new();
        self.lines.read_to_string(&mut rest).expect("text");
        let status = self.child.wait().expect("ours");
        assert!(status.success(), "{status}; {rest}");
        // A stop that waits until its deadline, by default 30 s, waits for something that
        // never ends.
        let took = began.elapsed();
        assert!(took < Duration::from_secs(25), "{took:?}; {rest}");
        rest
    }

    #[track_caller]
    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(&self.address).expect("it listens");
        stream.set_read_timeout(Some(DEADLINE)).expect("a socket");
        stream.set_write_timeout(Some(DEADLINE)).expect("a socket");
        stream
    }
}

impl Drop for Example {
    fn drop(&mut self) {
        // Nothing happens when it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs an example to its end, for those that have one.
#[track_caller]
fn run_to_end(name: &str, arguments: &[&str]) -> Output {
    run_to_end_within(DEADLINE, name, arguments)
}

#[track_caller]
fn run_to_end_within(deadline: Duration, name: &str, arguments: &[&str]) -> Output {
    let child = Command::new(path_of(name))
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        // With all that it starts: whoever is left has the pipes open.
        .process_group(0)
        .spawn()
        .expect("starts");
    let pid = Pid::from_child(&child);
    let (done, is_done) = mpsc::channel::<()>();
    let watch = thread::spawn(move || {
        if is_done.recv_timeout(deadline) == Err(mpsc::RecvTimeoutError::Timeout) {
            let _ = kill_process_group(pid, Signal::KILL);
        }
    });
    let output = child.wait_with_output().expect("ours");
    drop(done);
    watch.join().expect("does not panic");
    assert!(
        output.status.success(),
        "{}\n{}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    output
}

#[test]
fn every_example_explains_itself() {
    let examples = [
        "chat",
        "chat_nats",
        "echo",
        "fd_holder",
        "haproxy_takeover",
        "hot_restart",
        "http",
        "node_worker",
        "proxy",
        "pubsub",
        "shell",
        "starttls",
        "supervise",
        "syslog",
        "tmux_command",
        "vhost_user_blk",
        "wayland_shm",
    ];
    for name in examples {
        let output = run_to_end(name, &["--help"]);
        let help = String::from_utf8(output.stdout).expect("text");
        assert!(help.contains(&format!("Usage: {name}")), "{help}");
        let is_server = name != "tmux_command";
        assert_eq!(
            help.contains("--inspect PLACE"),
            is_server,
            "{name}: {help}"
        );
    }
}

#[test]
fn starttls_goes_on_in_private() {
    let directory = tempfile::tempdir().expect("a folder");
    let certified = rcgen::generate_simple_self_signed(vec!["localhost".into()]).expect("made");
    let path = |name: &str| directory.path().join(name).display().to_string();
    let (certificate, key) = (path("certificate"), path("key"));
    std::fs::write(&certificate, certified.cert.pem()).expect("written");
    std::fs::write(&key, certified.signing_key.serialize_pem()).expect("written");
    let here = ["--listen", "127.0.0.1:0", "--certificate", &certificate];
    let server = Example::start("starttls", &[&here[..], &["--key", &key]].concat());
    let there = ["--connect", &server.address, "--name", "localhost"];
    let arguments = [&there[..], &["--roots", &certificate]].concat();
    let output = run_to_end("starttls", &arguments);
    let said = String::from_utf8(output.stdout).expect("text");
    assert_eq!(
        said.lines().collect::<Vec<_>>(),
        [
            "220 bowline ready",
            "250-bowline",
            "250 STARTTLS",
            "220 go on",
            "in private, by TLSv1_3",
            "250 bowline, in private",
            "221 bye",
            "closed cleanly"
        ]
    );
}

#[test]
fn unknown_argument_is_refused() {
    let output = Command::new(path_of("echo")).arg("--nonsense").output();
    let output = output.expect("starts");
    assert!(!output.status.success());
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("--nonsense"), "{text}");
}

#[test]
fn example_that_cannot_listen_says_why_and_ends_with_a_failure() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port is free");
    let address = taken.local_addr().expect("it is bound").to_string();
    let endpoint = format!("tcp:{address}");
    let directory = tempfile::tempdir().expect("a directory");
    let control = directory.path().join("control");
    let control = control.to_str().expect("text");
    let reason = io::Error::from(rustix::io::Errno::ADDRINUSE).to_string();
    for (name, arguments) in [
        ("echo", vec!["--listen", &endpoint]),
        ("chat", vec!["--listen", &endpoint]),
        ("proxy", vec!["--listen", &endpoint, "--to", &endpoint]),
        ("prefork", vec!["--serve", "--listen", &endpoint]),
        (
            "hot_restart",
            vec!["--serve", "--listen", &endpoint, "--directory", control],
        ),
        (
            "http",
            vec!["--root", ".", "--listen", &endpoint, "--state", control],
        ),
    ] {
        let started = Command::new(path_of(name)).args(arguments).output();
        let output = started.expect("it starts");
        assert!(!output.status.success(), "{name}");
        let text = String::from_utf8_lossy(&output.stderr);
        let said = text.lines().last().unwrap_or_default();
        assert!(
            said.contains(&address) && said.contains(&reason),
            "{name}: {text}"
        );
    }
}

#[test]
fn echo_answers_on_tcp_and_stops_when_its_clients_are_done() {
    let echo = Example::start("echo", &["--listen", "tcp:127.0.0.1:0"]);
    let mut client = echo.connect();
    client.write_all(b"before").expect("writes");
    let mut answer = [0; 6];
    client.read_exact(&mut answer).expect("answers");
    assert_eq!(&answer, b"before");

    // A connection that is open is still served after SIGTERM.
    kill_process(echo.pid(), Signal::TERM).expect("it runs");
    wait_until_refused(&echo.address);
    client.write_all(b" after").expect("writes");
    client.shutdown(Shutdown::Write).expect("a socket");
    let mut rest = String::new();
    client.read_to_string(&mut rest).expect("text");
    assert_eq!(rest, " after");
    let mut echo = echo;
    assert!(echo.child.wait().expect("ours").success());
}

/// Returns once nobody listens there any more.
#[track_caller]
fn wait_until_refused(address: &str) {
    let started = Instant::now();
    while TcpStream::connect(address).is_ok() {
        assert!(started.elapsed() < DEADLINE, "it goes on listening");
        thread::yield_now();
    }
}

#[test]
fn second_signal_ends_an_example_at_once() {
    let mut echo = Example::start("echo", &["--listen", "tcp:127.0.0.1:0"]);
    let mut client = echo.connect();
    kill_process(echo.pid(), Signal::TERM).expect("it runs");
    wait_until_refused(&echo.address);
    let started = Instant::now();
    kill_process(echo.pid(), Signal::TERM).expect("it runs");
    echo.child.wait().expect("ours");
    assert!(started.elapsed() < Duration::from_secs(4), "did not wait");
    // Closed or reset, but gone.
    let mut byte = [0];
    assert!(matches!(client.read(&mut byte), Ok(0) | Err(_)));
}

#[test]
fn echo_answers_on_a_unix_socket_and_removes_it() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("socket");
    let endpoint = format!("unix:{}", path.display());
    let echo = Example::start("echo", &["--listen", &endpoint]);
    let sent: Vec<u8> = (0..1_000_000u32).map(|n| n as u8).collect();
    let mut client = UnixStream::connect(&path).expect("it listens");
    let mut reader = client.try_clone().expect("a descriptor");
    let received = thread::spawn(move || {
        let mut received = Vec::new();
        reader.read_to_end(&mut received).map(|_| received)
    });
    client.write_all(&sent).expect("writes");
    client.shutdown(Shutdown::Write).expect("a socket");
    let received = received.join().expect("reads").expect("to the end");
    assert!(received == sent);
    echo.stop();
    assert!(!path.exists());
}

#[test]
fn proxy_keeps_half_closes_and_slows_down_for_a_slow_reader() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("echo");
    let behind = format!("unix:{}", path.display());
    let echo = Example::start("echo", &["--listen", &behind]);
    let proxy = Example::start("proxy", &["--listen", "tcp:127.0.0.1:0", "--to", &behind]);

    let client = proxy.connect();
    let total = 16 * 1024 * 1024;
    let mut writer = client.try_clone().expect("a descriptor");
    let (progress, written) = mpsc::channel();
    let writing = thread::spawn(move || {
        let chunk: Vec<u8> = (0..65_536u32).map(|n| (n % 251) as u8).collect();
        for _ in 0..total / chunk.len() {
            writer.write_all(&chunk)?;
            // Whoever listened has seen enough.
            let _ = progress.send(chunk.len());
        }
        writer.shutdown(Shutdown::Write)
    });
    // Nobody reads, so that everything fills up: the writer must get stuck
    // rather than the proxy grow.
    let mut before = 0;
    while let Ok(bytes) = written.recv_timeout(Duration::from_millis(300)) {
        before += bytes;
    }
    assert!(before < total, "all {before} bytes were taken in");
    let memory = resident_kilobytes(proxy.pid());
    assert!(memory < 64 * 1024, "the proxy holds {memory} KiB");

    let mut received = 0;
    let mut reader = client;
    let mut buffer = vec![0; 65_536];
    loop {
        let count = reader.read(&mut buffer).expect("reads");
        if count == 0 {
            break;
        }
        for (index, &byte) in buffer[..count].iter().enumerate() {
            assert_eq!(byte, ((received + index) % 65_536 % 251) as u8);
        }
        received += count;
    }
    // The end of our sending went through and came back behind the last byte.
    assert_eq!(received, total);
    writing.join().expect("no panic").expect("wrote everything");
    proxy.stop();
    echo.stop();
}

/// Which of a connection's bytes a server leaves unread when it closes.
#[derive(Clone, Copy, Debug)]
enum Upload {
    /// The client sends more when the answer is complete.
    Late,
    /// It has sent more than the server reads.
    Early,
}

/// One that answers `answer` bytes and closes, seven bytes into the request.
fn answer_early(mut stream: impl Read + Write, answer: usize) {
    stream.read_exact(&mut [0; 7]).expect("a request");
    stream.write_all(&vec![b'r'; answer]).expect("takes it all");
}

/// What a client that reads slowly gets.
fn read_slowly(client: &mut TcpStream, upload: Upload, answered: &mpsc::Receiver<()>) -> usize {
    let sent: &[u8] = match upload {
        Upload::Late => b"request",
        Upload::Early => b"request and what nobody reads",
    };
    client.write_all(sent).expect("takes it");
    answered.recv_timeout(DEADLINE).expect("answers");
    let (mut received, mut buffer) = (0, vec![0; 20_000]);
    while let Ok(count @ 1..) = client.read(&mut buffer) {
        if received == 0 && matches!(upload, Upload::Late) {
            client.write_all(b"more of it").expect("the proxy takes it");
        }
        received += count;
        // What it has not read yet waits at the proxy's other side meanwhile.
        thread::sleep(Duration::from_millis(2));
    }
    received
}

#[test]
fn proxy_passes_on_all_that_a_server_sent_before_it_closed() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("back");
    let unix = std::os::unix::net::UnixListener::bind(&path).expect("binds");
    let tcp = TcpListener::bind("127.0.0.1:0").expect("binds");
    let to_tcp = format!("tcp:{}", tcp.local_addr().expect("bound"));
    let to_unix = format!("unix:{}", path.display());
    // A TCP server that closes so destroys what is still on its way: as much as
    // surely has arrived by then.
    for (to, answer) in [(to_unix, 1_000_000), (to_tcp, 50_000)] {
        let proxy = Example::start("proxy", &["--listen", "tcp:127.0.0.1:0", "--to", &to]);
        for upload in [Upload::Late, Upload::Early] {
            let (answering, answered) = mpsc::channel();
            let is_unix = to.starts_with("unix");
            let received = thread::scope(|scope| {
                scope.spawn(|| {
                    if is_unix {
                        answer_early(unix.accept().expect("comes").0, answer);
                    } else {
                        answer_early(tcp.accept().expect("comes").0, answer);
                    }
                    answering.send(()).expect("waits");
                });
                read_slowly(&mut proxy.connect(), upload, &answered)
            });
            assert_eq!(received, answer, "{to}, {upload:?}");
        }
        proxy.stop();
    }
}

#[test]
fn proxy_lets_go_of_clients_that_have_vanished() {
    // Accepted by the kernel, and read by nobody.
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("back");
    let unix = std::os::unix::net::UnixListener::bind(&path).expect("binds");
    let tcp = TcpListener::bind("127.0.0.1:0").expect("binds");
    let to_tcp = format!("tcp:{}", tcp.local_addr().expect("bound"));
    for to in [format!("unix:{}", path.display()), to_tcp] {
        let proxy = Example::start("proxy", &["--listen", "tcp:127.0.0.1:0", "--to", &to]);
        let directory = format!("/proc/{}/fd", proxy.pid().as_raw_nonzero());
        let open = || std::fs::read_dir(&directory).expect("it runs").count();
        let before = open();
        for _ in 0..5 {
            let mut client = proxy.connect();
            let wait = Some(Duration::from_millis(200));
            client.set_write_timeout(wait).expect("a socket");
            while client.write(&[0; 65_536]).is_ok() {}
            sockopt::set_socket_linger(&client, Some(Duration::ZERO)).expect("a socket");
        }
        // The lookup's thread may keep some.
        let started = Instant::now();
        while open() > before + 3 {
            assert!(
                started.elapsed() < DEADLINE,
                "{to}: {before} descriptors before, {} after",
                open()
            );
            thread::sleep(Duration::from_millis(10));
        }
        proxy.stop();
    }
    drop((unix, tcp));
}

fn resident_kilobytes(pid: Pid) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", pid.as_raw_nonzero()));
    let status = status.expect("it runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let field = line.and_then(|line| line.split_whitespace().next());
    field.expect("Linux has it").parse().expect("a number")
}

#[test]
fn proxy_ends_a_connection_it_cannot_make() {
    let proxy = Example::start(
        "proxy",
        &[
            "--listen",
            "tcp:127.0.0.1:0",
            "--to",
            "unix:/nonexistent/socket",
        ],
    );
    let mut client = proxy.connect();
    // Closed or reset.
    assert!(matches!(client.read(&mut [0]), Ok(0) | Err(_)));
    proxy.stop();
}

#[test]
fn proxy_connects_to_a_host() {
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = format!("tcp:{}", server.local_addr().unwrap());
    let proxy = Example::start("proxy", &["--listen", "tcp:127.0.0.1:0", "--to", &to]);
    let mut client = proxy.connect();
    client.write_all(b"to the host").unwrap();
    let (mut behind, _) = server.accept().unwrap();
    let mut received = [0; 11];
    behind.read_exact(&mut received).unwrap();
    assert_eq!(&received, b"to the host");
    drop((client, behind));
    proxy.stop();
}

#[test]
fn chat_tells_the_others_and_shows_out_the_silent() {
    let chat = Example::start("chat", &["--listen", "tcp:127.0.0.1:0", "--idle", "1"]);
    let mut ann = Guest::join(&chat, "ann");
    assert_eq!(ann.hear(), "* welcome, ann; here: []");
    let mut bob = Guest::join(&chat, "bob");
    assert_eq!(bob.hear(), "* welcome, bob; here: [ann]");
    assert_eq!(ann.hear(), "* bob has joined");
    let mut cid = Guest::join(&chat, "bob");
    assert_eq!(cid.hear(), "* another name, please");
    cid.say("cid");
    assert_eq!(cid.hear(), "* welcome, cid; here: [ann, bob]");
    assert_eq!(ann.hear(), "* cid has joined");
    assert_eq!(bob.hear(), "* cid has joined");

    ann.say("hello");
    assert_eq!(bob.hear(), "ann: hello");
    assert_eq!(cid.hear(), "ann: hello");
    drop(bob);
    assert_eq!(ann.hear(), "* bob has left");
    assert_eq!(cid.hear(), "* bob has left");

    // Ann stays by talking; Cid is silent, and is shown out.
    loop {
        ann.say("still here");
        match cid.hear().as_str() {
            "ann: still here" => thread::park_timeout(Duration::from_millis(50)),
            "* you have been quiet for long: bye" => break,
            other => panic!("heard {other}"),
        }
    }
    assert_eq!(cid.hear(), "");
    assert_eq!(ann.hear(), "* cid has left");

    // A connection that is closed with unread input is reset, and what was
    // written last may be lost: be sure that Ann was heard.
    let mut dan = Guest::join(&chat, "dan");
    assert_eq!(dan.hear(), "* welcome, dan; here: [ann]");
    assert_eq!(ann.hear(), "* dan has joined");
    ann.say("good night");
    let heard = (0..1000)
        .map(|_| dan.hear())
        .find(|line| line != "ann: still here");
    assert_eq!(heard.as_deref(), Some("ann: good night"));
    chat.stop();
    assert_eq!(ann.hear(), "* the room closes");
    assert_eq!(ann.hear(), "");
}

struct Guest {
    stream: TcpStream,
    lines: BufReader<TcpStream>,
}

impl Guest {
    #[track_caller]
    fn join(chat: &Example, name: &str) -> Self {
        let stream = chat.connect();
        let lines = BufReader::new(stream.try_clone().expect("a descriptor"));
        let mut guest = Self { stream, lines };
        assert_eq!(guest.hear(), "* who are you?");
        guest.say(name);
        guest
    }

    #[track_caller]
    fn say(&mut self, text: &str) {
        writeln!(self.stream, "{text}").expect("writes");
    }

    /// The next line; empty at the end.
    #[track_caller]
    fn hear(&mut self) -> String {
        let mut line = String::new();
        self.lines.read_line(&mut line).expect("text");
        line.trim_end().to_owned()
    }
}

#[test]
fn fd_passing_proves_all_four() {
    let output = run_to_end("fd_passing", &[]);
    let text = String::from_utf8(output.stdout).expect("text");
    assert!(text.starts_with("listening on 127.0.0.1:"), "{text}");
    let proofs = [
        ("open file", "read \"read there\""),
        ("end of a pipe", "read \"written before\""),
        ("listening socket", "heard \"process"),
        ("connected socket", "heard \"process"),
    ];
    for (what, proof) in proofs {
        let row = text.lines().find(|line| line.starts_with(what));
        assert!(row.is_some_and(|row| row.contains(proof)), "{text}");
    }
}

#[test]
fn producer_consumer_stays_below_its_watermark_and_plots_it() {
    let directory = tempfile::tempdir().expect("a directory");
    let plot = directory.path().join("plot.svg");
    let path = plot.to_str().expect("text");
    let sizes = ["--bytes", "6MiB", "--rate", "40MiB/s", "--plot", path];
    let output = run_to_end("producer_consumer", &sizes);
    let text = String::from_utf8(output.stdout).expect("text");
    assert!(text.starts_with("listening on "), "{text}");
    for kind in ["push", "pull"] {
        let row = text.lines().find(|line| line.starts_with(kind));
        let row = row.expect("a row for each");
        assert!(row.contains("6.00 MiB"), "{row}");
    }
    let plot = std::fs::read_to_string(plot).expect("written");
    assert!(plot.contains("push producer") && plot.contains("pull producer"));
    assert!(plot.trim_end().ends_with("</svg>"));
}

#[test]
fn producer_consumer_can_be_interrupted() {
    let example = Example::start("producer_consumer", &["--bytes", "64MiB"]);
    let rest = example.stop();
    assert!(rest.contains("interrupted"), "{rest}");
}

#[test]
fn fd_holder_keeps_a_listener_between_the_lives_of_its_program() {
    let output = run_to_end("fd_holder", &[]);
    let said = String::from_utf8(output.stdout).expect("text");
    assert!(said.contains("its first life: process "), "{said}");
    assert!(said.contains("[(\"web\", 1)]"), "{said}");
    assert!(said.contains("its second life: process "), "{said}");
}

#[test]
fn fd_holder_keeps_each_name_once_and_no_more_than_its_limit() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = directory.path().join("holder").display().to_string();
    let _holder = Example::start("fd_holder", &["--serve", "--path", &path, "--limit", "2"]);
    let ask = |argument: &str, name: &str| {
        let mut command = Command::new(path_of("fd_holder"));
        command.args(["--path", &path, argument]);
        if !name.is_empty() {
            command.arg(name);
        }
        let input = std::fs::File::open("/proc/sys/kernel/ostype").expect("Linux has it");
        let output = command.stdin(input).output().expect("starts");
        let said = [output.stdout, output.stderr].concat();
        (
            output.status.success(),
            String::from_utf8(said).expect("text"),
        )
    };
    assert_eq!(ask("--store", "one"), (true, String::new()));
    let (is_kept, said) = ask("--store", "one");
    assert!(
        !is_kept && said.contains("something of that name"),
        "{said}"
    );
    assert_eq!(ask("--store", "two"), (true, String::new()));
    let (is_kept, said) = ask("--store", "three");
    assert!(!is_kept && said.contains("no room"), "{said}");
    assert_eq!(ask("--list", ""), (true, "one 1\ntwo 1\n".into()));
    assert_eq!(ask("--retrieve", "one"), (true, "Linux\n".into()));
    let (is_there, said) = ask("--retrieve", "one");
    assert!(!is_there && said.contains("nothing of that name"), "{said}");
    assert_eq!(ask("--remove", "two"), (true, String::new()));
    assert_eq!(ask("--list", ""), (true, String::new()));
}

/// Python's own sockets say what systemd would hear: names, one descriptor twice, a pipe
/// whose other end closes, one that is not to be looked at, and a barrier.
#[test]
fn fd_holder_keeps_what_programs_give_to_a_service_manager() {
    const PROGRAM: &str = r#"
import array, os, socket, sys
there, = sys.argv[1:]
notices = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
notices.connect(there)
def say(text, *descriptors):
    socket.send_fds(notices, [text.encode()], descriptors)
null = os.open("/dev/null", os.O_RDONLY)
say("FDSTORE=1\nFDNAME=null", null, os.dup(null))
say("FDSTORE=1\nFDNAME=again", null)
one, other = os.pipe()
say("FDSTORE=1\nFDNAME=gone", other)
unseen, last = os.pipe()
say("FDSTORE=1\nFDNAME=unseen\nFDPOLL=0", last)
say("FDSTORE=1\nFDNAME=removed", os.pipe()[1])
say("FDSTOREREMOVE=1\nFDNAME=removed")
os.close(one)
os.close(unseen)
# What it has not answered yet, it has not heard.
mine, its = os.pipe()
say("BARRIER=1", its)
os.close(its)
assert os.read(mine, 1) == b""
print("through")
"#;
    let directory = tempfile::tempdir().expect("temporary directory");
    let place = |name: &str| directory.path().join(name).display().to_string();
    let (path, notices) = (place("holder"), place("notices"));
    let arguments = ["--serve", "--path", &path, "--notices", &notices];
    let _holder = Example::start("fd_holder", &arguments);
    let python = Command::new("python3")
        .args(["-c", PROGRAM, &notices])
        .output();
    let python = python.expect("python3 is there");
    let said = String::from_utf8_lossy(&python.stderr);
    assert!(
        python.status.success() && python.stdout == b"through\n",
        "{said}"
    );
    let list = || {
        let mut command = Command::new(path_of("fd_holder"));
        let output = command.args(["--path", &path, "--list"]).output();
        String::from_utf8(output.expect("starts").stdout).expect("text")
    };
    // It looks once a second.
    let began = Instant::now();
    loop {
        let list = list();
        if list == "null 1\nunseen 1\n" {
            break;
        }
        assert!(list.contains("gone 1"), "{list}");
        assert!(began.elapsed() < Duration::from_secs(20), "{list}");
    }
}

/// What a row of the table that `hot_restart` prints says.
fn row_of(said: &str, name: &str) -> f64 {
    let line = said.lines().find(|line| line.starts_with(name));
    let value = line.and_then(|line| line[name.len()..].split_ascii_whitespace().next());
    let value = value.and_then(|value| value.parse().ok());
    value.unwrap_or_else(|| panic!("no {name} in {said}"))
}

/// Reliability T-29: restarts under load, and nothing of it fails.
#[test]
fn hot_restart_loses_nothing_of_its_own_load() {
    let restarts = scaled(3, 180);
    let connections = scaled(1_000, 1_000_000);
    let numbers = [restarts.to_string(), connections.to_string()];
    let clients = scaled("16", "64");
    let size = ["--restarts", &numbers[0], "--connections", &numbers[1]];
    let arguments = [&size[..], &["--clients", clients]].concat();
    let deadline = scaled(DEADLINE, Duration::from_secs(1_800));
    let output = run_to_end_within(deadline, "hot_restart", &arguments);
    let said = String::from_utf8(output.stdout).expect("text");
    let count = |name: &str| row_of(&said, name) as usize;
    assert_eq!(count("connections moved"), 0, "{said}");
    let during = row_of(&said, "latency during restarts, p99 ");
    let steady = row_of(&said, "latency steady, p99 ");
    Figures::of("T-29")
        .must("failed", count("failures"), Bound::Exactly, 0)
        .must("restarts", count("restarts"), Bound::Exactly, restarts)
        .must(
            "connections",
            count("connections "),
            Bound::AtLeast,
            connections,
        )
        .must("requests", count("requests "), Bound::AtLeast, connections)
        .measured(
            "requests a second",
            row_of(&said, "requests per second"),
            "",
            Bound::AtLeast,
            scaled(100.0, 8_000.0),
        )
        .measured(
            "p99 during restarts, of that between them",
            during / steady,
            "times",
            Bound::Below,
            5.0,
        )
        .remark(&format!(
            "longest gap between answers {} ms",
            row_of(&said, "longest gap between answers")
        ));
}

#[test]
fn hot_restart_moves_the_connections_of_its_own_load() {
    let size = ["--restarts", "3", "--connections", "1000", "--move"];
    let output = run_to_end("hot_restart", &size);
    let said = String::from_utf8(output.stdout).expect("text");
    let count = |name: &str| row_of(&said, name) as usize;
    assert_eq!(count("failures"), 0, "{said}");
    assert_eq!(count("restarts"), 3, "{said}");
    assert!(count("connections ") >= 1000, "{said}");
    assert!(count("connections moved") > 0, "{said}");
}

/// E-13: a program that takes its sockets first removes the variables that announced
/// them, so that nobody whom it starts takes them for its own.
#[test]
fn hot_restart_keeps_the_variables_of_systemd_from_its_successors() {
    let folder = tempfile::tempdir().expect("temporary directory");
    let listener = TcpListener::bind("127.0.0.1:0").expect("loopback");
    let address = listener.local_addr().expect("an address").to_string();
    let mut command = Command::new("sh");
    command
        // The number of the process that is to take them.
        .args(["-c", "export LISTEN_PID=$$; exec \"$@\"", "sh"])
        .arg(path_of("hot_restart"))
        .args([
            "--serve",
            "--listen",
            &format!("tcp:{address}"),
            "--directory",
        ])
        .arg(folder.path().join("control"))
        .env("LISTEN_FDS", "1")
        .env("LISTEN_FDNAMES", "web")
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    let child = bowline::process::spawn_with_descriptors(command, &[(listener.as_fd(), 3)]);
    let mut first = Killed(child.expect("starts"));
    drop(listener);
    let variables = |process: u32| {
        let environment = std::fs::read_to_string(format!("/proc/{process}/environ"));
        let environment = environment.expect("it runs");
        let variables = environment.split('\0').map(str::to_owned);
        variables
            .filter(|variable| variable.starts_with("LISTEN_"))
            .collect::<Vec<_>>()
    };
    let old = first.0.id();
    wait_until("it serves what it was given", || {
        ask_line(&address) == Some(old)
    });
    // That is what it was started with, whatever it did since.
    assert_eq!(variables(old).len(), 3);
    kill_process(Pid::from_child(&first.0), Signal::HUP).expect("it runs");
    let mut successor = old;
    wait_until("a successor serves", || {
        successor = ask_line(&address).unwrap_or(old);
        successor != old
    });
    let found = variables(successor);
    // Until the old one has gone, it serves on where the new one ends.
    let mut ended = None;
    wait_until("the old process ends", || {
        ended = first.0.try_wait().expect("ours");
        ended.is_some()
    });
    assert!(ended.expect("it has ended").success());
    let pid = i32::try_from(successor).ok().and_then(Pid::from_raw);
    kill_process(pid.expect("a process"), Signal::TERM).expect("it runs");
    wait_until("the successor ends", || !is_running(successor));
    assert_eq!(found, [""; 0], "announced to the successor too");
}

/// Ended with the test.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// One line on a connection of its own: the process that answered.
fn ask_line(address: &str) -> Option<u32> {
    let mut stream = TcpStream::connect(address).ok()?;
    stream.set_read_timeout(Some(DEADLINE)).ok()?;
    stream.write_all(b"who\n").ok()?;
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer).ok()?;
    answer.split_whitespace().find_map(|word| word.parse().ok())
}

#[test]
fn prefork_passes_its_own_load() {
    let output = run_to_end("prefork", &["--workers", "3"]);
    let text = String::from_utf8(output.stdout).expect("text");
    assert!(text.starts_with("listening on 127.0.0.1:"), "{text}");
    assert!(
        text.contains("4000 descriptors passed, 0 failures"),
        "{text}"
    );
    // Three workers and the one that replaced the one that was killed.
    let rows = text.lines().filter(|line| {
        let mut fields = line.split_whitespace();
        fields.next().is_some_and(|pid| pid.parse::<u32>().is_ok()) && fields.count() == 2
    });
    assert_eq!(rows.count(), 4, "{text}");
}

/// One request on a connection of its own: the process that answered.
fn ask(address: &str) -> Option<u32> {
    let mut stream = TcpStream::connect(address).ok()?;
    stream.set_read_timeout(Some(DEADLINE)).ok()?;
    let request = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
    stream.write_all(request).ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    let (_, process) = answer.split_once("\r\n\r\nprocess ")?;
    process.trim_end().parse().ok()
}

fn is_running(process: u32) -> bool {
    // A zombie has ended.
    std::fs::read_to_string(format!("/proc/{process}/stat"))
        .is_ok_and(|stat| !stat.contains(") Z "))
}

#[track_caller]
fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let started = Instant::now();
    while !is_so() {
        assert!(started.elapsed() < DEADLINE, "{what}");
        thread::yield_now();
    }
}

#[test]
fn prefork_goes_on_when_a_worker_is_killed_under_load() {
    let prefork = Example::start("prefork", &["--serve", "--workers", "2"]);
    let address = prefork.address.clone();
    let (answers, answered) = mpsc::channel();
    let clients: Vec<_> = (0..4)
        .map(|_| {
            let (address, answers) = (address.clone(), answers.clone());
            // Ends when nobody listens to the answers any more.
            thread::spawn(move || while answers.send(ask(&address)).is_ok() {})
        })
        .collect();
    let next = || answered.recv_timeout(DEADLINE).expect("it answers");
    let mut before = BTreeSet::new();
    while before.len() < 2 {
        before.insert(next().expect("nobody was killed yet"));
    }

    let victim = *before.first().expect("two");
    let pid = i32::try_from(victim).ok().and_then(Pid::from_raw);
    kill_process(pid.expect("a process"), Signal::KILL).expect("it runs");
    // What had been passed to it is lost with it: a handful, since each of the
    // four clients has one connection.
    let mut failures = 0;
    let started = Instant::now();
    loop {
        assert!(started.elapsed() < DEADLINE, "it was not replaced");
        match next() {
            Some(process) if !before.contains(&process) => break,
            Some(_) => {}
            None => failures += 1,
        }
        assert!(failures <= 8, "{failures} connections were lost");
    }
    // Its successor serves, and nothing is lost any more.
    for _ in 0..500 {
        assert_ne!(next().expect("answered"), victim);
    }
    drop(answered);
    for client in clients {
        client.join().expect("no panic");
    }
    wait_until("the dead worker was reaped", || !is_running(victim));
    prefork.stop();
    wait_until("workers end", || !before.iter().any(|pid| is_running(*pid)));
}

#[test]
fn prefork_answers_what_it_accepted_before_it_stops() {
    let prefork = Example::start("prefork", &["--serve"]);
    let mut clients: Vec<_> = (0..20).map(|_| prefork.connect()).collect();
    // In the middle of a request.
    for client in &mut clients {
        client.write_all(b"GET / HTTP/1.1\r\n").expect("writes");
    }
    // By now the others have been accepted, since the queue is in order.
    assert!(ask(&prefork.address).is_some());
    kill_process(prefork.pid(), Signal::TERM).expect("it runs");
    wait_until_refused(&prefork.address);
    for client in &mut clients {
        client.write_all(b"Host: x\r\n\r\n").expect("writes");
        let mut answer = String::new();
        client.read_to_string(&mut answer).expect("text");
        assert!(answer.starts_with("HTTP/1.1 200 OK"), "{answer}");
    }
    let mut prefork = prefork;
    assert!(prefork.child.wait().expect("ours").success());
}

#[test]
fn workers_of_a_prefork_server_end_when_it_is_killed() {
    let mut prefork = Example::start("prefork", &["--serve", "--workers", "1"]);
    let worker = ask(&prefork.address).expect("answers");
    assert!(is_running(worker));
    prefork.child.kill().expect("it runs");
    wait_until("the worker ends", || !is_running(worker));
}

#[test]
fn prefork_takes_a_burst_with_one_worker() {
    let prefork = Example::start("prefork", &["--serve", "--workers", "1"]);
    // More wait than one turn accepts, and far more than its channel takes
    // before it counts as full.
    kill_process(prefork.pid(), Signal::STOP).expect("it runs");
    let mut clients: Vec<_> = (0..300).map(|_| prefork.connect()).collect();
    for client in &mut clients {
        let request = b"GET / HTTP/1.1\r\nHost: x\r\n\r\nGET / HTTP/1.0\r\n\r\n";
        client.write_all(request).expect("writes");
    }
    kill_process(prefork.pid(), Signal::CONT).expect("it is there");
    for client in &mut clients {
        let mut answer = String::new();
        client.read_to_string(&mut answer).expect("text");
        // One on a connection that is kept, one on the same that is not.
        assert_eq!(answer.matches("HTTP/1.1 200 OK").count(), 2, "{answer}");
    }
    prefork.stop();
}

#[test]
fn prefork_refuses_what_it_does_not_speak() {
    let prefork = Example::start("prefork", &["--serve", "--workers", "1"]);
    for (request, status) in [
        ("POST / HTTP/1.1\r\n\r\n", "405"),
        ("what?\r\n\r\n", "400"),
        (&*format!("GET /{} HTTP/1.1\r\n", "x".repeat(20_000)), "431"),
    ] {
        let mut client = prefork.connect();
        client.write_all(request.as_bytes()).expect("writes");
        let mut answer = String::new();
        client.read_to_string(&mut answer).expect("text");
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status}")),
            "{answer}"
        );
    }
    prefork.stop();
}

/// The lines of a running example, as they come.
struct Said(mpsc::Receiver<String>);

impl Said {
    fn of(output: ChildStdout) -> Self {
        let (sender, receiver) = mpsc::channel();
        thread::spawn(move || {
            let lines = BufReader::new(output).lines();
            let _ = lines.map_while(|line| sender.send(line.ok()?).ok()).count();
        });
        Self(receiver)
    }

    /// The first line from here on that says so.
    #[track_caller]
    fn wait_for(&self, word: &str) -> String {
        let mut before = Vec::new();
        loop {
            match self.0.recv_timeout(DEADLINE) {
                Ok(line) if line.contains(word) => return line,
                Ok(line) => before.push(line),
                Err(error) => panic!("no {word:?} ({error}) in {before:#?}"),
            }
        }
    }
}

/// Asks over a socket of packets.
fn ask_packet(socket: &impl AsFd, request: &str) -> String {
    let sent = rustix::net::send(socket, request.as_bytes(), rustix::net::SendFlags::empty());
    assert_eq!(sent.expect("it is connected"), request.len());
    let mut answer = [0; 4_096];
    let received = rustix::net::recv(socket, &mut answer, rustix::net::RecvFlags::empty());
    let (length, _) = received.expect("an answer");
    String::from_utf8_lossy(&answer[..length]).into_owned()
}

#[test]
fn supervise_starts_again_what_ends_and_stops_the_last_first() {
    let directory = tempfile::tempdir().expect("a directory");
    let control = directory.path().join("control");
    // It has the socket, and no other descriptor of ours.
    let program =
        "echo has $LISTEN_FDS; echo trouble >&2; test -S /proc/self/fd/3 && exec sleep 1000";
    let child = Command::new(path_of("supervise"))
        .args(["--children", "2", "--listen", "127.0.0.1:0", "--control"])
        .arg(&control)
        .args(["--", "sh", "-c", program])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .expect("starts");
    let mut child = Killed(child);
    let said = Said::of(child.0.stdout.take().expect("piped"));
    let address = said.wait_for("children listen on ");
    let address = address.trim_start_matches("children listen on ").to_owned();
    said.wait_for("0 started as process");
    let second = said.wait_for("1 started as process");
    let second: i32 = second
        .rsplit(' ')
        .next()
        .expect("a word")
        .parse()
        .expect("a number");
    // Copies share the queue of one listener.
    TcpStream::connect(&address).expect("it listens");

    let family = rustix::net::AddressFamily::UNIX;
    let kind = rustix::net::SocketType::SEQPACKET;
    let socket = rustix::net::socket_with(family, kind, rustix::net::SocketFlags::CLOEXEC, None)
        .expect("a socket");
    let there = rustix::net::SocketAddrUnix::new(&control).expect("a short path");
    rustix::net::connect(&socket, &there).expect("it listens");
    wait_until("it is served", || {
        ask_packet(&socket, "status").contains("1 runs")
    });
    let status = ask_packet(&socket, "status");
    assert!(
        status.starts_with("0 runs as ") && status.lines().count() == 2,
        "{status}"
    );
    assert!(ask_packet(&socket, "restart 7").contains("does not run"));
    assert!(ask_packet(&socket, "nonsense").contains("please"));

    // One that is killed, and one that is restarted.
    let killed = Pid::from_raw(second).expect("a process");
    kill_process(killed, Signal::KILL).expect("it runs");
    said.wait_for("1 killed by signal 9");
    said.wait_for("1 started as process");
    said.wait_for("1 out: has 1");
    assert_eq!(ask_packet(&socket, "restart 0"), "restarting\n");
    said.wait_for("0 killed by signal 15");
    said.wait_for("0 started as process");
    said.wait_for("0 err: trouble");
    let status = ask_packet(&socket, "status");
    assert_eq!(status.matches("start 2").count(), 2, "{status}");

    kill_process(Pid::from_child(&child.0), Signal::TERM).expect("it runs");
    said.wait_for("stopping");
    said.wait_for("1 killed by signal 15");
    said.wait_for("0 killed by signal 15");
    let status = child.0.wait().expect("ours");
    assert!(status.success(), "{status}");
    assert!(!control.exists());
    assert!(
        TcpStream::connect(&address).is_err(),
        "nobody has it any more"
    );
}

/// `logger` is what others use. Its messages are in the file, and after SIGHUP in a new one.
#[test]
fn syslog_writes_what_logger_says_and_opens_its_file_anew() {
    let directory = tempfile::tempdir().expect("a directory");
    let place = |name: &str| {
        directory
            .path()
            .join(name)
            .to_str()
            .expect("text")
            .to_owned()
    };
    let (file, socket, old) = (place("messages"), place("log"), place("messages.1"));
    let syslog = Command::new(path_of("syslog"))
        .args(["--file", &file, "--socket", &socket, "--udp", "127.0.0.1:0"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .expect("starts");
    let mut syslog = Killed(syslog);
    let said = Said::of(syslog.0.stdout.take().expect("piped"));
    said.wait_for("listening on /");
    let address = said.wait_for("listening on 127.0.0.1:");
    let (_, port) = address.rsplit_once(':').expect("it has a port");
    let written = |file: &str| std::fs::read_to_string(file).unwrap_or_default();

    // Whatever a message has in it, it is one line.
    let raw = std::os::unix::net::UnixDatagram::unbound().expect("a socket");
    raw.send_to(b"<13>two\nlines\0", &socket)
        .expect("it is read");
    let own = format!("pid {} <13>two lines\n", std::process::id());
    wait_until("it is written", || written(&file) == own);

    let logger = |arguments: &[&str]| {
        let ended = Command::new("logger").args(arguments).status();
        ended.is_ok_and(|status| status.success())
    };
    if logger(&["--socket", &socket, "over a UNIX socket"]) {
        wait_until("it is written", || {
            written(&file).contains("over a UNIX socket\n")
        });
        let server = ["--server", "127.0.0.1", "--port", port, "--udp", "over UDP"];
        assert!(logger(&server));
        wait_until("it is written", || written(&file).contains("over UDP\n"));
        assert!(written(&file).contains("\n127.0.0.1:"));
    } else {
        #[allow(clippy::print_stderr, reason = "a skipped test has to be seen")]
        {
            eprintln!("SKIPPED: there is no logger");
        }
    }

    std::fs::rename(&file, &old).expect("it is ours");
    raw.send_to(b"into the old one", &socket)
        .expect("it is read");
    wait_until("it is written", || {
        written(&old).ends_with("into the old one\n")
    });
    let pid = Pid::from_child(&syslog.0);
    kill_process(pid, Signal::HUP).expect("it runs");
    wait_until("it is opened anew", || std::path::Path::new(&file).exists());
    // What has arrived when it stops is written.
    for number in 0..5 {
        let message = format!("message {number}");
        raw.send_to(message.as_bytes(), &socket)
            .expect("it is read");
    }
    kill_process(pid, Signal::TERM).expect("it runs");
    said.wait_for("0 lost, 0 not written");
    assert!(syslog.0.wait().expect("ours").success());
    assert_eq!(written(&file).lines().count(), 5);
    assert!(!std::path::Path::new(&socket).exists());
}

/// What the screen has shown from here on, until it says so, or the end.
fn read_screen(socket: &impl AsFd, word: &str) -> String {
    let mut screen = String::new();
    while !screen.contains(word) {
        let mut packet = [0; 65_536];
        let received = rustix::net::recv(socket, &mut packet, rustix::net::RecvFlags::empty());
        let (length, _) = received.expect("a packet");
        assert!(length > 0, "the end, and no {word:?} in {screen:?}");
        screen.push_str(&String::from_utf8_lossy(&packet[..length]));
    }
    screen
}

#[test]
fn shell_serves_a_terminal_with_the_size_of_a_window() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("shell");
    let path = path.to_str().expect("text");
    let shell = Example::start("shell", &["--socket", path, "--", "sh"]);
    let connect = || {
        let family = rustix::net::AddressFamily::UNIX;
        let kind = rustix::net::SocketType::SEQPACKET;
        let socket =
            rustix::net::socket_with(family, kind, rustix::net::SocketFlags::CLOEXEC, None)
                .expect("a socket");
        let there = rustix::net::SocketAddrUnix::new(path).expect("a short path");
        rustix::net::connect(&socket, &there).expect("it listens");
        sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(DEADLINE))
            .expect("a socket");
        socket
    };
    let send = |socket: &std::os::fd::OwnedFd, data: &str| {
        let sent = rustix::net::send(socket, data.as_bytes(), rustix::net::SendFlags::empty());
        assert_eq!(sent.expect("it is connected"), data.len());
    };
    let (one, other) = (connect(), connect());
    send(&one, "s 40 120");
    send(&other, "s 25 80");
    send(&one, "dstty size\n");
    send(&other, "dstty size; tty\n");
    assert!(read_screen(&one, "40 120").contains('d'));
    assert!(read_screen(&other, "/dev/pts/").contains("25 80"));
    send(&one, "s 41 121");
    send(&one, "dstty size\n");
    read_screen(&one, "41 121");
    // More than the kernel holds, both ways at once.
    send(
        &one,
        "dhead -c 1000000 /dev/zero | tr '\\0' x; echo; echo do''ne\n",
    );
    read_screen(&one, "done");
    send(&one, "dexit 3\n");
    let end = read_screen(&one, "exited with code 3");
    assert!(end.contains("eexited"), "{end}");
    // One that goes takes its program with it.
    send(&other, "decho it is $$ he''re\n");
    let screen = read_screen(&other, " here");
    let process = screen.split("it is ").last().expect("a text");
    let process: u32 = process
        .split(' ')
        .next()
        .expect("a word")
        .parse()
        .expect("a number");
    assert!(is_running(process));
    drop(other);
    wait_until("the program has ended", || !is_running(process));
    shell.stop();
    assert!(!std::path::Path::new(path).exists());
}
