//! Programs that nobody here wrote, at the other end.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use bowline::Reactor;
use bowline::process::spawn_with_descriptors;
use rustix::fs::MemfdFlags;
use rustix::process::{Pid, Signal, kill_process};

/// How long a program may take for a step.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// Whether a program of this Debian package is there. If not, that is said, and under `CI`
/// or `BOWLINE_INTEROP=require` it is a failure.
#[track_caller]
pub(crate) fn has(program: &str, package: &str) -> bool {
    let paths = std::env::var_os("PATH").unwrap_or_default();
    let mut folders: Vec<_> = std::env::split_paths(&paths).collect();
    folders.extend(["/usr/sbin", "/sbin", "/usr/lib/systemd"].map(Into::into));
    if folders.iter().any(|folder| folder.join(program).is_file()) {
        return true;
    }
    say_missing(program, &format!("apt-get install {package}"));
    false
}

/// Where the built example is: cargo builds the examples with the tests, and puts them
/// beside each other.
#[track_caller]
pub(crate) fn example(name: &str) -> PathBuf {
    let mut path = std::env::current_exe().expect("Linux knows");
    path.pop();
    path.pop();
    path.extend(["examples", name]);
    let missing = path.display();
    assert!(
        path.exists(),
        "{missing} is missing: cargo build --examples"
    );
    path
}

/// Says that a test does not run for want of this, and fails where it has to.
#[track_caller]
pub(crate) fn say_missing(what: &str, remedy: &str) {
    let is_required = std::env::var_os("CI").is_some()
        || std::env::var("BOWLINE_INTEROP").is_ok_and(|it| it == "require");
    assert!(!is_required, "CANNOT RUN without {what}: {remedy}");
    // Not by a macro, whose output is kept back of a test that passes.
    let said = format!("NOT RUN: {what} is missing ({remedy})\n");
    let _ = io::stderr().write_all(said.as_bytes());
}

/// A file of memory with this in it, to be passed.
pub(crate) fn memory(text: &str) -> File {
    let fd = rustix::fs::memfd_create("given", MemfdFlags::CLOEXEC).expect("a number is free");
    let mut file = File::from(fd);
    file.write_all(text.as_bytes()).expect("there is room");
    file
}

/// What is in a file that was passed, from its beginning.
pub(crate) fn content(fd: OwnedFd) -> String {
    let mut bytes = [0; 100];
    let read = File::from(fd).read_at(&mut bytes, 0);
    String::from_utf8_lossy(&bytes[..read.expect("a file")]).into_owned()
}

/// A program at work, and what it has said so far.
pub(crate) struct Program {
    child: Child,
    stdin: Option<ChildStdin>,
    said: Arc<Mutex<Vec<u8>>>,
    listeners: Vec<JoinHandle<()>>,
}

impl Program {
    pub(crate) fn start(command: &mut Command) -> Self {
        let started = piped(command).spawn();
        Self::of(started.unwrap_or_else(|error| panic!("{command:?}: {error}")))
    }

    /// Starts it with these descriptors under these numbers.
    #[track_caller]
    pub(crate) fn start_with(mut command: Command, descriptors: &[(BorrowedFd<'_>, u32)]) -> Self {
        piped(&mut command);
        Self::of(spawn_with_descriptors(command, descriptors).expect("it starts"))
    }

    fn of(mut child: Child) -> Self {
        let said = Arc::default();
        let listeners = vec![
            listen(child.stdout.take().expect("piped"), &said),
            listen(child.stderr.take().expect("piped"), &said),
        ];
        Self {
            stdin: child.stdin.take(),
            child,
            said,
            listeners,
        }
    }

    /// Writes to its standard input.
    pub(crate) fn tell(&mut self, what: &str) {
        let stdin = self.stdin.as_mut().expect("open");
        // It may have ended.
        let _ = stdin.write_all(what.as_bytes());
        let _ = stdin.flush();
    }

    pub(crate) fn close_stdin(&mut self) {
        self.stdin = None;
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// All that it has written, to either stream.
    pub(crate) fn said(&self) -> String {
        String::from_utf8_lossy(&self.said.lock().unwrap()).into_owned()
    }

    /// How many descriptors it has open.
    #[track_caller]
    pub(crate) fn open_descriptors(&self) -> usize {
        let listing = format!("/proc/{}/fd", self.pid());
        fs::read_dir(listing).expect("it runs").count()
    }

    /// Turns the reactor until it has so many descriptors open.
    #[track_caller]
    pub(crate) fn wait_for_descriptors(&self, reactor: &mut Reactor, count: usize) {
        self.wait(reactor, &format!("{count} open descriptors"), |program| {
            program.open_descriptors() == count
        });
    }

    /// Turns the reactor until it has no more descriptors open than that: what it had at a
    /// moment when something could have been on its way out.
    #[track_caller]
    pub(crate) fn wait_for_descriptors_at_most(&self, reactor: &mut Reactor, count: usize) {
        self.wait(
            reactor,
            &format!("at most {count} descriptors"),
            |program| program.open_descriptors() <= count,
        );
    }

    /// Turns the reactor until the program has said this.
    #[track_caller]
    pub(crate) fn wait_for(&self, reactor: &mut Reactor, what: &str) {
        self.wait(reactor, what, |program| program.said().contains(what));
    }

    /// Turns the reactor until somebody listens on this path.
    #[track_caller]
    pub(crate) fn wait_for_listener(&mut self, reactor: &mut Reactor, path: &Path) {
        let began = Instant::now();
        while UnixStream::connect(path).is_err() {
            let status = self.child.try_wait().expect("it is ours");
            assert!(status.is_none(), "it has ended:\n{}", self.said());
            assert!(began.elapsed() < PATIENCE, "no listener:\n{}", self.said());
            reactor.turn(Some(Duration::from_millis(2)));
        }
    }

    /// Turns the reactor until there is such a file, which the program makes.
    #[track_caller]
    pub(crate) fn wait_for_file(&self, reactor: &mut Reactor, path: &Path) {
        self.wait(reactor, &path.to_string_lossy(), |_| path.exists());
    }

    #[track_caller]
    pub(crate) fn wait(&self, reactor: &mut Reactor, what: &str, is_done: impl Fn(&Self) -> bool) {
        let began = Instant::now();
        while !is_done(self) {
            assert!(
                began.elapsed() < PATIENCE,
                "no {what:?} of {} descriptors:\n{}",
                self.open_descriptors(),
                self.said()
            );
            reactor.turn(Some(Duration::from_millis(2)));
        }
    }

    /// Asks it to stop, by SIGTERM, and waits for its end.
    #[track_caller]
    pub(crate) fn stop(&mut self, reactor: &mut Reactor) -> (bool, String) {
        let pid = i32::try_from(self.pid()).ok().and_then(Pid::from_raw);
        kill_process(pid.expect("it runs"), Signal::TERM).expect("it is ours");
        self.end(reactor)
    }

    /// Turns the reactor until the program has ended; whether well, and what it has said.
    #[track_caller]
    pub(crate) fn end(&mut self, reactor: &mut Reactor) -> (bool, String) {
        let began = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("it is ours") {
                for listener in self.listeners.drain(..) {
                    listener.join().expect("it only reads");
                }
                return (status.success(), self.said());
            }
            assert!(began.elapsed() < PATIENCE, "it goes on:\n{}", self.said());
            reactor.turn(Some(Duration::from_millis(2)));
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        for listener in self.listeners.drain(..) {
            let _ = listener.join();
        }
    }
}

fn piped(command: &mut Command) -> &mut Command {
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
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
