//! Faults from outside: the examples as they are built for their users, with
//! calls that strace or a preloaded library has fail.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use bowline::testing::Random;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::peers::pattern;
use crate::support::DescriptorLedger;
use crate::support::faults::{Call, Faults};
use crate::support::figures::{Bound, Figures, is_full, scaled};

/// What does not answer within this hangs, on a busy machine too.
const DEADLINE: Duration = Duration::from_secs(60);
/// What clients send: enough for several reads and writes.
const BYTES: usize = 200_000;

/// What strace has fail: the system call's name, and the errors.
const INJECTED: [(&str, &[&str]); 15] = [
    ("socket", &["EMFILE", "ENFILE", "ENOBUFS", "EACCES"]),
    ("bind", &["EADDRINUSE", "EACCES", "ENOMEM"]),
    ("listen", &["EADDRINUSE", "EINVAL"]),
    (
        "connect",
        &["ECONNREFUSED", "ETIMEDOUT", "ENETUNREACH", "EADDRNOTAVAIL"],
    ),
    ("setsockopt", &["ENOPROTOOPT", "EINVAL", "ENOBUFS"]),
    ("timerfd_settime", &["EINVAL"]),
    (
        "accept4",
        &[
            "ECONNABORTED",
            "EMFILE",
            "ENFILE",
            "ENOBUFS",
            "ENOMEM",
            "EPERM",
            "EINTR",
        ],
    ),
    (
        "recvfrom",
        &["ECONNRESET", "ETIMEDOUT", "EINTR", "ENOMEM", "EBADF"],
    ),
    ("recvmsg", &["ECONNRESET", "EINTR", "ENOBUFS", "EINVAL"]),
    (
        "sendto",
        &["EPIPE", "ECONNRESET", "EINTR", "ENOBUFS", "ENOMEM", "EPERM"],
    ),
    ("sendmsg", &["EPIPE", "EINTR", "ENOBUFS", "ETOOMANYREFS"]),
    ("epoll_wait", &["EINTR", "EINVAL"]),
    ("epoll_ctl", &["ENOMEM", "ENOSPC", "EPERM"]),
    ("close", &["EINTR", "EIO"]),
    ("getsockname", &["ENOBUFS", "EINVAL"]),
];

/// What is disturbed: the servers among the examples.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Echo,
    EchoOnUnix,
    /// In front of an echo that nothing disturbs.
    Proxy,
    Chat,
    Prefork,
    HotRestart,
}

impl Kind {
    const ALL: [Self; 6] = [
        Self::Echo,
        Self::EchoOnUnix,
        Self::Proxy,
        Self::Chat,
        Self::Prefork,
        Self::HotRestart,
    ];

    fn program(self) -> PathBuf {
        example(match self {
            Self::Echo | Self::EchoOnUnix => "echo",
            Self::Proxy => "proxy",
            Self::Chat => "chat",
            Self::Prefork => "prefork",
            Self::HotRestart => "hot_restart",
        })
    }

    /// With files under `place`, which is its own.
    fn arguments(self, place: &Path, behind: &str) -> Vec<String> {
        let place = place.display().to_string();
        let any = "tcp:127.0.0.1:0";
        let unix = format!("unix:{place}");
        let arguments: &[&str] = match self {
            Self::Echo | Self::Chat => &["--listen", any],
            Self::EchoOnUnix => &["--listen", &unix],
            Self::Proxy => &["--listen", any, "--to", behind],
            Self::Prefork => &["--serve", "--listen", any],
            Self::HotRestart => &["--serve", "--listen", any, "--directory", &place],
        };
        arguments.iter().map(ToString::to_string).collect()
    }

    /// Where std talks to the child that it starts, and panics when it cannot.
    fn is_of_std(self, call: &str, nth: usize) -> bool {
        self == Self::Prefork && matches!(call, "recvfrom" | "Recv" | "Send") && nth < 4
    }
}

/// A server under test, with the tool that disturbs it.
struct Server {
    kind: Kind,
    child: Child,
    /// The example itself, where the child is strace.
    pid: Pid,
    address: Address,
    /// Kept, so that it can say more.
    _output: BufReader<ChildStdout>,
}

enum Address {
    Tcp(String),
    Unix(PathBuf),
}

/// A stream to either.
trait Stream: Read + Write {}
impl Stream for TcpStream {}
impl Stream for UnixStream {}

fn example(name: &str) -> PathBuf {
    let mut path = std::env::current_exe().expect("Linux knows");
    path.pop();
    path.pop();
    // Those of the release build where it is there: what users run.
    let release = path.with_file_name("release").join("examples").join(name);
    if release.exists() {
        return release;
    }
    assert!(
        !is_full(),
        "{} is missing: cargo build --release --examples",
        release.display()
    );
    path.push("examples");
    path.push(name);
    path
}

impl Server {
    /// Starts an example. `None` if the fault kept it from starting, which it
    /// has said then, and ended.
    fn start(kind: Kind, mut command: Command, place: &Path, is_traced: bool) -> Option<Self> {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("it is there");
        let mut lines = BufReader::new(child.stdout.take().expect("piped"));
        let (say, hear) = mpsc::channel();
        thread::spawn(move || {
            let mut line = String::new();
            lines.read_line(&mut line).expect("text");
            // Nobody hears it who has waited for too long.
            let _ = say.send((line, lines));
        });
        let Ok((line, lines)) = hear.recv_timeout(DEADLINE) else {
            kill(&mut child);
            panic!("it neither starts nor ends");
        };
        let address = line.trim_end().strip_prefix("listening on ");
        let Some(address) = address.map(str::to_owned) else {
            // 1 is an error that main answers, 127 one of the dynamic loader, before
            // main; a panic has another status, a crash none.
            let status = wait(&mut child);
            let is_said = matches!(status.code(), Some(1 | 127));
            assert!(is_said, "at the start: {status}");
            return None;
        };
        let mut pid = Pid::from_child(&child);
        if is_traced {
            pid = first_child(pid).expect("strace runs it");
        }
        let address = match kind {
            Kind::EchoOnUnix => Address::Unix(place.to_owned()),
            _ => Address::Tcp(address),
        };
        Some(Self {
            kind,
            child,
            pid,
            address,
            _output: lines,
        })
    }

    fn connect(&self) -> io::Result<Box<dyn Stream>> {
        Ok(match &self.address {
            Address::Tcp(address) => {
                let stream = TcpStream::connect(address)?;
                stream.set_read_timeout(Some(DEADLINE))?;
                stream.set_write_timeout(Some(DEADLINE))?;
                Box::new(stream)
            }
            Address::Unix(path) => {
                let stream = UnixStream::connect(path)?;
                stream.set_read_timeout(Some(DEADLINE))?;
                stream.set_write_timeout(Some(DEADLINE))?;
                Box::new(stream)
            }
        })
    }

    /// Has bytes echoed; whether all came back. What comes back wrong, or not at
    /// all, is a failure of the test.
    fn echo(&self, bytes: usize) -> bool {
        let sent = pattern(bytes);
        let Ok(mut stream) = self.connect() else {
            return false;
        };
        let mut received = Vec::new();
        for piece in sent.chunks(40_000) {
            if stream.write_all(piece).is_err() {
                break;
            }
            let mut back = vec![0; piece.len()];
            let mut got = 0;
            while got < back.len() {
                match stream.read(&mut back[got..]) {
                    Ok(0) => break,
                    Ok(count) => got += count,
                    Err(error) if is_timeout(&error) => panic!("no answer and no end"),
                    Err(_) => break,
                }
            }
            received.extend_from_slice(&back[..got]);
            if got < back.len() {
                break;
            }
        }
        assert_eq!(received, sent[..received.len()], "other bytes came back");
        received.len() == bytes
    }

    /// Has a client do what this server is for; whether it got all of it. What is
    /// answered wrongly, or not at all, is a failure of the test.
    fn exchange(&self, bytes: usize) -> bool {
        match self.kind {
            Kind::Echo | Kind::EchoOnUnix | Kind::Proxy => self.echo(bytes),
            Kind::Chat => self.chat().is_some(),
            Kind::Prefork => self.requests().is_some(),
            Kind::HotRestart => self.lines().is_some(),
        }
    }

    /// Requests over one connection, answered by some process.
    fn requests(&self) -> Option<()> {
        let mut talk = Talk::with(self)?;
        for _ in 0..20 {
            talk.say("GET / HTTP/1.1\r\nHost: here\r\n\r\n")?;
            let answer = talk.hear(|text| {
                let (header, _) = text.split_once("\r\n\r\n")?;
                let (_, length) = header.split_once("Content-Length: ")?;
                let length: usize = length.lines().next()?.parse().ok()?;
                Some(header.len() + 4 + length)
            })?;
            let is_right = answer.starts_with("HTTP/1.1 200 OK\r\n")
                && answer.contains("\r\n\r\nprocess ")
                && answer.ends_with('\n');
            assert!(is_right, "another answer: {answer:?}");
        }
        Some(())
    }

    /// Lines that come back with the number of the process.
    fn lines(&self) -> Option<()> {
        let mut talk = Talk::with(self)?;
        for number in 0..20 {
            talk.say(&format!("line {number}\n"))?;
            let answer = talk.line()?;
            let by = answer.strip_prefix(&format!("line {number} "));
            let is_right = by.is_some_and(|by| by.trim_end().parse::<u32>().is_ok());
            assert!(is_right, "another answer: {answer:?}");
        }
        Some(())
    }

    /// Two members, of whom one hears what the other says.
    fn chat(&self) -> Option<()> {
        // Who was cut off may still be there.
        static NAMES: AtomicUsize = AtomicUsize::new(0);
        let join = || {
            let name = format!("member{}", NAMES.fetch_add(1, Ordering::Relaxed));
            let mut talk = Talk::with(self)?;
            assert_eq!(talk.line()?, "* who are you?\n");
            talk.say(&format!("{name}\n"))?;
            let answer = talk.line()?;
            let welcome = format!("* welcome, {name}; here: [");
            assert!(answer.starts_with(&welcome), "another answer: {answer:?}");
            Some((talk, name))
        };
        let (mut one, name) = join()?;
        let (mut other, _) = join()?;
        for number in 0..20 {
            one.say(&format!("line {number}\n"))?;
            let heard = loop {
                let line = other.line()?;
                if line == format!("* {name} has left\n") {
                    return None;
                }
                // Of those who come and go.
                if !line.starts_with("* ") {
                    break line;
                }
            };
            assert_eq!(heard, format!("{name}: line {number}\n"));
        }
        Some(())
    }

    fn has_crashed(&mut self) -> bool {
        self.child.try_wait().expect("ours").is_some()
    }

    fn stop(mut self) -> ExitStatus {
        let _ = kill_process(self.pid, Signal::TERM);
        wait(&mut self.child)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = kill_process(self.pid, Signal::KILL);
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// One connection on which text is exchanged.
struct Talk {
    stream: Box<dyn Stream>,
    received: String,
}

impl Talk {
    fn with(server: &Server) -> Option<Self> {
        Some(Self {
            stream: server.connect().ok()?,
            received: String::new(),
        })
    }

    fn say(&mut self, text: &str) -> Option<()> {
        self.stream.write_all(text.as_bytes()).ok()
    }

    fn line(&mut self) -> Option<String> {
        self.hear(|text| Some(text.find('\n')? + 1))
    }

    /// What comes, once `length` says how much it is; `None` if it ends before.
    fn hear(&mut self, length: impl Fn(&str) -> Option<usize>) -> Option<String> {
        loop {
            if let Some(length) = length(&self.received)
                && length <= self.received.len()
            {
                return Some(self.received.drain(..length).collect());
            }
            let mut bytes = [0; 4096];
            match self.stream.read(&mut bytes) {
                Ok(0) => return None,
                Ok(count) => {
                    let text = std::str::from_utf8(&bytes[..count]);
                    self.received.push_str(text.expect("it is ASCII"));
                }
                Err(error) if is_timeout(&error) => panic!("no answer and no end"),
                Err(_) => return None,
            }
        }
    }
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
    )
}

fn first_child(parent: Pid) -> Option<Pid> {
    let parent = parent.as_raw_nonzero();
    let children = format!("/proc/{parent}/task/{parent}/children");
    let children = fs::read_to_string(children).ok()?;
    Pid::from_raw(children.split_whitespace().next()?.parse().ok()?)
}

/// Ends a process, and before it the one that it traces.
fn kill(child: &mut Child) {
    if let Some(traced) = first_child(Pid::from_child(child)) {
        let _ = kill_process(traced, Signal::KILL);
    }
    let _ = child.kill();
    let _ = child.wait();
}

#[track_caller]
fn wait(child: &mut Child) -> ExitStatus {
    let started = Instant::now();
    loop {
        if let Some(status) = child.try_wait().expect("ours") {
            return status;
        }
        if started.elapsed() > DEADLINE {
            kill(child);
            panic!("it does not stop");
        }
        thread::yield_now();
    }
}

/// Serves clients until the fault has hit, and looks whether all is well then.
fn visit(mut server: Server) {
    let mut served = 0;
    for _ in 0..4 {
        served += usize::from(server.exchange(BYTES));
    }
    assert!(!server.has_crashed(), "it has ended");
    // Whatever happened: it serves, if not at once: a worker that was lost is replaced.
    let began = Instant::now();
    while !server.exchange(100) {
        assert!(
            began.elapsed() < DEADLINE,
            "it does not serve any more, after {served} clients"
        );
    }
    let status = server.stop();
    assert!(status.success(), "at the end: {status}");
}

/// What a check of a server found wrong, where it did.
fn objection(check: impl FnOnce()) -> Option<String> {
    let said = catch_unwind(AssertUnwindSafe(check)).err()?;
    let text = said.downcast::<String>().map_or_else(
        |said| said.downcast::<&str>().map(|text| text.to_string()),
        |text| Ok(*text),
    );
    Some(text.unwrap_or_else(|_| "a panic".into()))
}

/// Whether strace is there; says so loudly where it is not, and fails where it
/// has to be.
fn has_strace() -> bool {
    let version = Command::new("strace")
        .arg("--version")
        .stdout(Stdio::null())
        .status();
    if version.is_ok_and(|status| status.success()) {
        return true;
    }
    let is = |name: &str, value: &str| std::env::var(name).is_ok_and(|found| found == value);
    assert!(
        !is("CI", "true") && !is("BOWLINE_INTEROP", "require"),
        "CANNOT RUN strace, which this test needs: install the package `strace`"
    );
    // Straight to the terminal: the harness keeps what tests that pass print.
    let _ = io::stderr().write_all(b"NOT RUN: faults by strace, which is missing\n");
    false
}

/// The examples, and what disturbs them.
struct Field {
    folder: TempDir,
    random: Random,
    /// What the proxy is in front of.
    behind: String,
    started: usize,
    /// Faults that kept a server from starting, which said so.
    refused: usize,
}

impl Field {
    fn place(&mut self) -> PathBuf {
        self.started += 1;
        self.folder.path().join(format!("server-{}", self.started))
    }

    /// The calls of a server that nothing disturbs, as strace counts those it is told
    /// to disturb: of each the most that one thread makes.
    fn traced_calls(&mut self, kind: Kind) -> Vec<(usize, usize)> {
        let (log, found) = self.trace(kind, &[]);
        assert_eq!(found, None, "{kind:?} that nothing disturbs");
        let mut most = Vec::new();
        for (index, (call, _)) in INJECTED.iter().enumerate() {
            let begins = format!("{call}(");
            let mut by_thread = BTreeMap::<&str, usize>::new();
            for line in log.lines() {
                let (thread, rest) = line.split_once(' ').unwrap_or_default();
                let is_one = rest.trim_start().starts_with(&begins);
                *by_thread.entry(thread).or_default() += usize::from(is_one);
            }
            let count = by_thread.into_values().max().unwrap_or(0);
            most.extend((count > 0).then_some((index, count)));
        }
        most
    }

    /// Has a server visited under strace: what that wrote, and what was wrong.
    fn trace(&mut self, kind: Kind, options: &[&str]) -> (String, Option<String>) {
        let place = self.place();
        let log = self.folder.path().join("trace");
        let names: Vec<_> = INJECTED.iter().map(|(call, _)| *call).collect();
        let mut command = Command::new("strace");
        command
            .args(["-f", "--seccomp-bpf", "-o"])
            .arg(&log)
            .args(["-e", &format!("trace={}", names.join(","))])
            .args(options)
            .arg(kind.program())
            .args(kind.arguments(&place, &self.behind));
        let found = objection(|| match Server::start(kind, command, &place, true) {
            Some(server) => visit(server),
            None => self.refused += 1,
        });
        let trace = fs::read(&log).unwrap_or_default();
        let _ = fs::remove_file(&log);
        (String::from_utf8_lossy(&trace).into_owned(), found)
    }

    /// Lets strace have one call fail, of those that a server makes: whether it did,
    /// and what was wrong then.
    fn inject(&mut self, kind: Kind, (index, count): (usize, usize)) -> (bool, Option<String>) {
        let (call, errors) = INJECTED[index];
        let error = errors[self.random.below(errors.len())];
        let nth = 1 + self.random.below(likely(count));
        if kind.is_of_std(call, nth) {
            return (false, None);
        }
        let fault = format!("inject={call}:error={error}:when={nth}");
        let (log, found) = self.trace(kind, &["-e", &fault]);
        let found = found.map(|found| format!("{kind:?}, {fault}: {found}"));
        (log.contains("(INJECTED)"), found)
    }

    /// A server with the library, and what its calls are told by.
    fn preloaded(&mut self, kind: Kind) -> (Server, Faults) {
        let place = self.place();
        let faults = Faults::new();
        let mut command = Command::new(kind.program());
        command.args(kind.arguments(&place, &self.behind));
        faults.preload_into(&mut command);
        let server = Server::start(kind, command, &place, false).expect("nothing fails yet");
        (server, faults)
    }

    /// The calls of a server that nothing disturbs, from its start to its end.
    fn preloaded_calls(&mut self, kind: Kind) -> Vec<(Call, usize)> {
        let (server, faults) = self.preloaded(kind);
        faults.arm();
        visit(server);
        let count = |call| (call, faults.count(call) as usize);
        let calls = Call::ALL.into_iter().map(count);
        calls.filter(|(_, count)| *count > 0).collect()
    }

    /// Has a call of libc fail, or many disturbed.
    fn disturb(&mut self, kind: Kind, (call, count): (Call, usize)) -> (bool, Option<String>) {
        let error = call.errors()[self.random.below(call.errors().len())];
        let (times, nth) = (
            [1, 5][self.random.below(2)],
            self.random.below(likely(count)),
        );
        let (is_storm, percent) = (self.random.chance(30), 10 + self.random.below(40));
        let seed = self.random.any() as u32;
        if !is_storm && kind.is_of_std(&format!("{call:?}"), nth) {
            return (false, None);
        }
        let mut fault = format!("{kind:?}, a storm of {percent} percent");
        let mut fired = 0;
        let found = objection(|| {
            let (server, faults) = self.preloaded(kind);
            if is_storm {
                // Nothing of this may be noticed by any client.
                faults.storm(percent as u32, seed);
                faults.arm();
                for _ in 0..3 {
                    assert!(server.exchange(BYTES), "bytes are missing");
                }
                fired = faults.fired();
                assert!(fired > 0, "nothing was disturbed");
                faults.disarm();
            } else {
                fault = format!("{kind:?}, {call:?} number {nth}, {times} times {error}");
                faults.fail(call, nth as u32, times, error);
                faults.arm();
            }
            visit(server);
            fired = fired.max(faults.fired());
        });
        (fired > 0, found.map(|found| format!("{fault}: {found}")))
    }
}

fn in_turn<C: Copy>(calls: &[C], round: usize) -> C {
    calls[calls.len() - 1 - round % calls.len()]
}

/// Of so many calls, those that are made another time too.
fn likely(count: usize) -> usize {
    (count * 3 / 4).max(1)
}

/// Reliability T-35: calls of the examples that serve, built as their users build
/// them, fail from outside; none crashes, hangs or stops to serve.
#[test]
fn examples_survive_faults_from_outside() {
    let ledger = DescriptorLedger::open();
    let has_strace = has_strace();
    let wanted = scaled(24, 200);
    let mut behind = Command::new(example("echo"));
    behind.args(["--listen", "tcp:127.0.0.1:0"]);
    let behind = Server::start(Kind::Echo, behind, Path::new(""), false).expect("it starts");
    let Address::Tcp(address) = &behind.address else {
        panic!("it is TCP");
    };
    let mut field = Field {
        folder: tempfile::tempdir().unwrap(),
        random: Random::new(35),
        behind: format!("tcp:{address}"),
        started: 0,
        refused: 0,
    };
    let traced = Kind::ALL.map(|kind| match has_strace {
        true => field.traced_calls(kind),
        false => Vec::new(),
    });
    let preloaded = Kind::ALL.map(|kind| field.preloaded_calls(kind));
    let mut failures = Vec::new();
    let (mut tried, mut by_strace, mut hit) = (0, 0, [0; Kind::ALL.len()]);
    // What hit nothing counts for nothing.
    while hit.iter().sum::<usize>() < wanted && tried < 2 * wanted {
        let at = tried % Kind::ALL.len();
        let round = tried / Kind::ALL.len();
        let is_traced = has_strace && round.is_multiple_of(2);
        tried += 1;
        // Of each server one call after the other, beginning with the last.
        let (has_hit, found) = match is_traced {
            true => field.inject(Kind::ALL[at], in_turn(&traced[at], round / 2)),
            false => field.disturb(Kind::ALL[at], in_turn(&preloaded[at], round / 2)),
        };
        hit[at] += usize::from(has_hit);
        by_strace += usize::from(has_hit && is_traced);
        failures.extend(found);
    }
    assert!(behind.stop().success());
    let missed = failures.len();
    let mut figures = Figures::of("T-35").must(
        "faults from outside that hit a call",
        hit.iter().sum::<usize>(),
        Bound::AtLeast,
        wanted,
    );
    for (kind, hit) in Kind::ALL.into_iter().zip(hit) {
        let what = format!("of them in {kind:?}");
        figures = figures.must(&what, hit, Bound::AtLeast, wanted / 12);
    }
    // The table shows where strace was not there.
    let least = (wanted / 3) as f64;
    let figures = figures
        .measured("by strace", by_strace as f64, "", Bound::AtLeast, least)
        .measured("crashes and hangs", missed as f64, "", Bound::Exactly, 0.0);
    if field.refused > 0 {
        let refused = field.refused;
        figures.remark(&format!("{refused} kept it from starting, which it said"));
    }
    assert!(
        failures.is_empty(),
        "{missed} of {tried} faults:\n{}",
        failures.join("\n")
    );
    assert!(
        !has_strace || by_strace >= wanted / 3,
        "strace injected into {by_strace}; may it trace here?"
    );
    drop(field);
    ledger.assert_balanced();
}

/// Every kind of delay at once, in both directions of two processes.
#[test]
fn proxy_loses_no_byte_in_a_storm_of_interruptions() {
    let _ledger = DescriptorLedger::open();
    let faults = Faults::new();
    let mut behind = Command::new(example("echo"));
    behind.args(["--listen", "tcp:127.0.0.1:0"]);
    faults.preload_into(&mut behind);
    let behind = Server::start(Kind::Echo, behind, Path::new(""), false).expect("it starts");
    let Address::Tcp(address) = &behind.address else {
        panic!("it is TCP");
    };
    let mut front = Command::new(example("proxy"));
    front.args([
        "--listen",
        "tcp:127.0.0.1:0",
        "--to",
        &format!("tcp:{address}"),
    ]);
    faults.preload_into(&mut front);
    let front = Server::start(Kind::Proxy, front, Path::new(""), false).expect("it starts");
    faults.storm(40, 7);
    faults.arm();
    // A proxy that is kept from running has fewer calls to be interrupted in.
    let mut rounds = 0;
    while rounds < 3 || faults.fired() <= 100 {
        assert!(front.echo(BYTES));
        rounds += 1;
        assert!(rounds < 100, "{} interruptions", faults.fired());
    }
    faults.disarm();
    assert!(front.stop().success());
    assert!(behind.stop().success());
}
