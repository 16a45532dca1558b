//! Faults from outside: the examples as they are built for their users, with
//! calls that strace or a preloaded library has fail.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use bowline::testing::Random;
use rustix::process::{Pid, Signal, kill_process};

use crate::peers::pattern;
use crate::support::DescriptorLedger;
use crate::support::faults::{Call, Faults};
use crate::support::figures::{Bound, Figures, scaled};

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
        let mut line = String::new();
        let mut lines = BufReader::new(child.stdout.take().expect("piped"));
        lines.read_line(&mut line).expect("text");
        let address = line.trim_end().strip_prefix("listening on ");
        let Some(address) = address.map(str::to_owned) else {
            let status = wait(&mut child, "at the start");
            assert!(status.code().is_some(), "{status}");
            return None;
        };
        let mut pid = Pid::from_child(&child);
        if is_traced {
            let tracer = pid.as_raw_nonzero();
            let children = format!("/proc/{tracer}/task/{tracer}/children");
            let first = std::fs::read_to_string(children).expect("Linux has it");
            let first = first.split_whitespace().next().map(str::parse);
            pid = first
                .and_then(Result::ok)
                .and_then(Pid::from_raw)
                .expect("strace runs it");
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

    fn stop(mut self, fault: &str) -> ExitStatus {
        let _ = kill_process(self.pid, Signal::TERM);
        wait(&mut self.child, fault)
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

#[track_caller]
fn wait(child: &mut Child, fault: &str) -> ExitStatus {
    let started = Instant::now();
    loop {
        if let Some(status) = child.try_wait().expect("ours") {
            return status;
        }
        assert!(started.elapsed() < DEADLINE, "{fault}: it does not stop");
        thread::yield_now();
    }
}

/// Serves clients until the fault has hit, and looks whether all is well then.
fn visit(mut server: Server, fault: &str) {
    let mut served = 0;
    for _ in 0..4 {
        served += usize::from(server.echo(BYTES));
    }
    assert!(!server.has_crashed(), "{fault}: it has ended");
    // Whatever happened: it serves.
    let mut tries = 0;
    while !server.echo(100) {
        tries += 1;
        assert!(
            tries < 50,
            "{fault}: it does not serve any more, after {served} clients"
        );
    }
    let status = server.stop(fault);
    assert!(status.success(), "{fault}: {status}");
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
    let has_strace = Command::new("strace")
        .arg("--version")
        .stdout(Stdio::null())
        .status()
        .is_ok();
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
            let mut command = Command::new("strace");
            command
                .args(["-f", "--seccomp-bpf", "-o", "/dev/null", "-e"])
                .arg(format!("trace={call}"))
                .arg("-e")
                .arg(&fault)
                .arg(example("echo"))
                .args(&arguments);
            match Server::start(command, unix, true) {
                Some(server) => visit(server, &fault),
                None => refused += 1,
            }
            continue;
        }
        preloaded += 1;
        let faults = Faults::new();
        let mut command = Command::new(example("echo"));
        command.args(&arguments);
        faults.preload_into(&mut command);
        let server = Server::start(command, unix, false).expect("nothing fails yet");
        let call = Call::ALL[random.below(Call::ALL.len())];
        let mut fault = "storm".to_owned();
        if random.chance(30) {
            // Nothing of this may be noticed by any client.
            faults.storm(10 + random.below(40) as u32, random.any() as u32);
            faults.arm();
            for _ in 0..3 {
                assert!(server.echo(BYTES), "bytes are missing");
            }
            assert!(faults.fired() > 0);
            faults.disarm();
        } else {
            let error = call.errors()[random.below(call.errors().len())];
            let times = [1, 5][random.below(2)];
            let nth = random.below(6) as u32;
            fault = format!("{call:?} number {nth}, {times} times {error}");
            faults.fail(call, nth, times, error);
            faults.arm();
        }
        visit(server, &fault);
    }
    Figures::of("T-35")
        .must(
            "faults from outside",
            traced + preloaded,
            Bound::AtLeast,
            wanted,
        )
        .must("of them by strace", traced, Bound::AtLeast, 0)
        .must("kept it from starting", refused, Bound::AtMost, wanted)
        .must("crashes and hangs", 0, Bound::Exactly, 0);
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
    assert!(front.stop("storm").success());
    assert!(behind.stop("storm").success());
}
