//! Faults from outside: the examples as they are built for their users, with
//! calls that strace or a preloaded library has fail.

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use bowline::testing::Random;
use rustix::process::{Pid, Signal, kill_process};

use crate::peers::pattern;
use crate::support::DescriptorLedger;
use crate::support::faults::{Call, Faults};
use crate::support::figures::{Bound, Figures, is_full, scaled};

/// What does not answer within this hangs.
const DEADLINE: Duration = Duration::from_secs(20);
/// What clients send: enough for several reads and writes.
const BYTES: usize = 200_000;

/// What strace has fail: the system call's name, and the errors.
const INJECTED: [(&str, &[&str]); 9] = [
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

/// A server under test, with the tool that disturbs it.
struct Server {
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
    fn start(mut command: Command, unix: Option<PathBuf>, is_traced: bool) -> Option<Self> {
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
        let address = unix.map_or_else(|| Address::Tcp(address), Address::Unix);
        Some(Self {
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
        served += usize::from(server.echo(BYTES));
    }
    assert!(!server.has_crashed(), "it has ended");
    // Whatever happened: it serves.
    let mut tries = 0;
    while !server.echo(100) {
        tries += 1;
        assert!(
            tries < 50,
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

/// Reliability T-35: calls of the examples, built as their users build them,
/// fail from outside; none crashes, hangs or stops to serve.
#[test]
fn examples_survive_faults_from_outside() {
    let ledger = DescriptorLedger::open();
    let folder = tempfile::tempdir().unwrap();
    let wanted = scaled(24, 200);
    let mut random = Random::new(35);
    let (mut traced, mut preloaded, mut refused) = (0, 0, 0);
    let (mut hit_traced, mut hit_preloaded) = (0, 0);
    let mut failures = Vec::new();
    let has_strace = has_strace();
    while traced + preloaded < wanted {
        let name = format!("echo-{}", traced + preloaded);
        let unix = random.chance(50).then(|| folder.path().join(name));
        let arguments: [String; 2] = match &unix {
            Some(path) => ["--unix".into(), path.display().to_string()],
            None => ["--tcp".into(), "127.0.0.1:0".into()],
        };
        if has_strace && traced <= preloaded {
            traced += 1;
            let (call, errors) = INJECTED[random.below(INJECTED.len())];
            let error = errors[random.below(errors.len())];
            let nth = 1 + random.below(8);
            let fault = format!("inject={call}:error={error}:when={nth}");
            let log = folder.path().join("trace");
            let mut command = Command::new("strace");
            command
                .args(["-f", "--seccomp-bpf", "-o"])
                .arg(&log)
                .arg("-e")
                .arg(format!("trace={call}"))
                .arg("-e")
                .arg(&fault)
                .arg(example("echo"))
                .args(&arguments);
            let found = objection(|| match Server::start(command, unix, true) {
                Some(server) => visit(server),
                None => refused += 1,
            });
            failures.extend(found.map(|found| format!("{fault}: {found}")));
            let trace = fs::read(&log).map(|trace| String::from_utf8_lossy(&trace).into_owned());
            let _ = fs::remove_file(&log);
            hit_traced += usize::from(trace.is_ok_and(|trace| trace.contains("(INJECTED)")));
            continue;
        }
        preloaded += 1;
        let faults = Faults::new();
        let mut command = Command::new(example("echo"));
        command.args(&arguments);
        faults.preload_into(&mut command);
        let mut fault = "storm".to_owned();
        let found = objection(|| {
            let server = Server::start(command, unix, false).expect("nothing fails yet");
            let call = Call::ALL[random.below(Call::ALL.len())];
            if random.chance(30) {
                // Nothing of this may be noticed by any client.
                faults.storm(10 + random.below(40) as u32, random.any() as u32);
                faults.arm();
                for _ in 0..3 {
                    assert!(server.echo(BYTES), "bytes are missing");
                }
                assert!(faults.fired() > 0, "nothing was disturbed");
                faults.disarm();
            } else {
                let error = call.errors()[random.below(call.errors().len())];
                let times = [1, 5][random.below(2)];
                let nth = random.below(6) as u32;
                fault = format!("{call:?} number {nth}, {times} times {error}");
                faults.fail(call, nth, times, error);
                faults.arm();
            }
            visit(server);
        });
        failures.extend(found.map(|found| format!("{fault}: {found}")));
        hit_preloaded += usize::from(faults.fired() > 0);
    }
    // Many name a call that the server makes less often, or never.
    let least = wanted / 8;
    let (hit, missed) = (hit_traced + hit_preloaded, failures.len());
    let figures = Figures::of("T-35")
        .must(
            "faults from outside",
            traced + preloaded,
            Bound::AtLeast,
            wanted,
        )
        .must("that hit a call", hit, Bound::AtLeast, 2 * least)
        // The table shows where strace was not there.
        .measured(
            "by strace",
            hit_traced as f64,
            "",
            Bound::AtLeast,
            least as f64,
        )
        .measured("crashes and hangs", missed as f64, "", Bound::Exactly, 0.0);
    if refused > 0 {
        figures.remark(&format!("{refused} kept it from starting, which it said"));
    }
    assert!(
        failures.is_empty(),
        "{missed} of {wanted} faults:\n{}",
        failures.join("\n")
    );
    assert!(
        !has_strace || hit_traced >= least,
        "strace injected into {hit_traced}; may it trace here?"
    );
    ledger.assert_balanced();
}

/// Every kind of delay at once, in both directions of two processes.
#[test]
fn proxy_loses_no_byte_in_a_storm_of_interruptions() {
    let _ledger = DescriptorLedger::open();
    let faults = Faults::new();
    let mut behind = Command::new(example("echo"));
    behind.args(["--tcp", "127.0.0.1:0"]);
    faults.preload_into(&mut behind);
    let behind = Server::start(behind, None, false).expect("it starts");
    let Address::Tcp(address) = &behind.address else {
        panic!("it is TCP");
    };
    let mut front = Command::new(example("proxy"));
    front.args(["--listen", "127.0.0.1:0", "--to", address]);
    faults.preload_into(&mut front);
    let front = Server::start(front, None, false).expect("it starts");
    faults.storm(40, 7);
    faults.arm();
    for _ in 0..3 {
        assert!(front.echo(BYTES));
    }
    assert!(faults.fired() > 100);
    faults.disarm();
    assert!(front.stop().success());
    assert!(behind.stop().success());
}
