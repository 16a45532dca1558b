//! Processes that are measured.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use rustix::thread::{CpuSet, sched_setaffinity};

use crate::Outcome;
use crate::dbus::Bus;

const SERVER: usize = 0;
const GENERATOR: usize = 1;

/// Who takes part.
pub(crate) struct Peer {
    pub(crate) name: &'static str,
    /// In C: the source, the package of Debian, and the name that pkg-config knows.
    pub(crate) source: Option<(&'static str, &'static str, &'static str)>,
}

impl Peer {
    pub(crate) const fn rust(name: &'static str) -> Self {
        let source = None;
        Self { name, source }
    }

    /// Compiles it, if it has to be.
    pub(crate) fn is_there(&self) -> bool {
        let Some((source, package, library)) = self.source else {
            return true;
        };
        let built = compile(source, library, &program(source));
        if !built {
            eprintln!(
                "{} takes no part: apt-get install gcc pkg-config {package}",
                self.name
            );
        }
        built
    }
}

fn program(source: &str) -> PathBuf {
    let own = std::env::current_exe().expect("Linux knows");
    own.with_file_name(source.trim_end_matches(".c"))
}

fn compile(source: &str, library: &str, program: &Path) -> bool {
    let flags = Command::new("pkg-config")
        .args(["--cflags", "--libs", library])
        .output();
    let Some(flags) = flags.ok().filter(|it| it.status.success()) else {
        return false;
    };
    let flags = String::from_utf8_lossy(&flags.stdout).into_owned();
    let source = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("peers")
        .join(source);
    let mut cc = Command::new("cc");
    cc.args(["-O2", "-Wall", "-o"]).arg(program).arg(source);
    let status = cc.args(flags.split_whitespace()).status();
    status.is_ok_and(|it| it.success())
}

/// What a peer is run under, to count what it does.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tool {
    /// Its system calls.
    Strace,
    /// Its instructions in user space.
    Callgrind,
}

pub(crate) struct Process {
    child: Child,
    /// The tool, and where it writes.
    trace: Option<(Tool, PathBuf)>,
    /// Where it listens, or the bus that it is on.
    pub(crate) socket: PathBuf,
    /// Its name on the bus.
    pub(crate) name: String,
}

impl Process {
    pub(crate) fn start(
        peer: &Peer,
        kind: &str,
        scratch: &Path,
        bus: Option<&Bus>,
        tool: Option<Tool>,
    ) -> Outcome<Self> {
        // Each has a place and a name of its own.
        static STARTED: AtomicU32 = AtomicU32::new(0);
        let name = format!("com.example.P{}", STARTED.fetch_add(1, Ordering::Relaxed));
        let place = scratch.join(&name);
        let socket = bus.map_or_else(|| place.clone(), |bus| bus.socket.clone());
        let own = match peer.source {
            Some((source, ..)) => program(source),
            None => std::env::current_exe()?,
        };
        let trace = tool.map(|tool| (tool, place.with_extension("trace")));
        let mut command = match &trace {
            Some((Tool::Strace, trace)) => {
                let mut strace = Command::new("strace");
                strace.arg("-fqo").arg(trace).arg(own);
                strace
            }
            Some((Tool::Callgrind, trace)) => {
                let mut valgrind = Command::new("valgrind");
                let out = format!("--callgrind-out-file={}", trace.display());
                valgrind
                    .args(["--tool=callgrind", "--quiet"])
                    .arg(out)
                    .arg(own);
                valgrind
            }
            None => Command::new(own),
        };
        command
            .args(["serve", peer.name, kind])
            .arg(&socket)
            .arg(&name);
        pin(SERVER)?;
        if tool == Some(Tool::Callgrind) {
            // It warns of system calls that it does not know.
            command.stderr(Stdio::null());
        }
        let child = command.stdin(Stdio::null()).spawn();
        pin(GENERATOR)?;
        Ok(Self {
            child: child?,
            trace,
            socket,
            name,
        })
    }

    /// All of it, of all threads. It is exact for one that waits.
    pub(crate) fn cpu_time(&self) -> Outcome<Duration> {
        let mut nanoseconds = 0;
        for task in fs::read_dir(format!("/proc/{}/task", self.child.id()))? {
            let told = fs::read_to_string(task?.path().join("schedstat"))?;
            let first = told.split_whitespace().next().ok_or("no schedstat")?;
            nanoseconds += first.parse::<u64>()?;
        }
        Ok(Duration::from_nanos(nanoseconds))
    }

    /// Ends one under a tool: how many receives there were, and how many system calls; or
    /// how many instructions, twice.
    pub(crate) fn end_and_count(mut self) -> Outcome<(usize, usize)> {
        let (tool, trace) = self.trace.take().ok_or("it is not traced")?;
        let pid = self.child.id();
        let traced = match tool {
            Tool::Callgrind => pid.try_into()?,
            Tool::Strace => {
                let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
                children.trim().parse()?
            }
        };
        let traced = Pid::from_raw(traced).ok_or("no process")?;
        kill_process(traced, Signal::TERM)?;
        self.child.wait()?;
        let told = fs::read_to_string(trace)?;
        match tool {
            Tool::Strace => Ok(count_calls(&told)),
            Tool::Callgrind => {
                let total = told.lines().find_map(|line| line.strip_prefix("totals: "));
                let total = total.ok_or("callgrind says no total")?.trim().parse()?;
                Ok((total, total))
            }
        }
    }
}

/// How many receives, and how many system calls, strace(1) tells of.
fn count_calls(told: &str) -> (usize, usize) {
    // A call that another thread interrupts is told twice.
    let calls = told
        .lines()
        .filter(|line| line.contains('(') && !line.contains(" resumed>") && !line.contains("+++"));
    let name = |line: &str| {
        let line = line.trim_start_matches(|it: char| it.is_ascii_digit() || it == ' ');
        line.split('(').next().unwrap_or_default().to_owned()
    };
    let is_receive = |line: &&str| {
        matches!(
            &*name(line),
            "recvmsg" | "recvfrom" | "recvmmsg" | "read" | "readv"
        )
    };
    (calls.clone().filter(is_receive).count(), calls.count())
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn pin(cpu: usize) -> Outcome {
    let mut set = CpuSet::new();
    set.set(cpu);
    sched_setaffinity(None, &set)?;
    Ok(())
}

/// Tries until it is so.
pub(crate) fn wait_for<A>(mut attempt: impl FnMut() -> Option<A>) -> Outcome<A> {
    let began = Instant::now();
    loop {
        if let Some(done) = attempt() {
            return Ok(done);
        }
        if began.elapsed() > Duration::from_secs(20) {
            return Err("a peer does not begin".into());
        }
        thread::sleep(Duration::from_millis(5));
    }
}
