//! The other end of the server's connections, and what the tests do to the
//! server.

use std::collections::VecDeque;
use std::fs;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::TcpStream;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use rustix::process::{Pid, Signal, kill_process};

use super::server::{self, HEADER, checksum, pattern};
use crate::support::eventually;

/// How long the tests wait for anything: the machine may be busy.
pub(crate) const DEADLINE: Duration = Duration::from_secs(30);

/// A server with its directory, and its successors; killed when the test fails.
pub(crate) struct Server {
    pub(crate) directory: tempfile::TempDir,
    children: Vec<Child>,
}

impl Server {
    pub(crate) fn start() -> Self {
        let mut this = Self {
            directory: tempfile::tempdir().expect("temporary directory"),
            children: Vec::new(),
        };
        this.start_cold();
        this
    }

    /// Starts it under a service manager: what that receives.
    pub(crate) fn start_managed() -> (Self, UnixDatagram) {
        let mut this = Self {
            directory: tempfile::tempdir().expect("temporary directory"),
            children: Vec::new(),
        };
        let manager = UnixDatagram::bind(this.path("manager")).expect("binds");
        manager.set_read_timeout(Some(DEADLINE)).expect("a socket");
        this.start_cold();
        (this, manager)
    }

    /// Starts a process that nobody asked for; its number.
    pub(crate) fn start_stranger(&mut self) -> u32 {
        let child = server::command(self.directory.path()).spawn();
        let child = child.expect("starts");
        let pid = child.id();
        self.children.push(child);
        pid
    }

    #[track_caller]
    pub(crate) fn start_cold(&mut self) -> u32 {
        let pid = self.start_stranger();
        self.wait_for(&format!("{pid} serves"));
        pid
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// What goes wrong with the successors from now on.
    pub(crate) fn set_fault(&self, fault: &str) {
        fs::write(self.path("fault"), fault).expect("ours");
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    /// Waits until the log says it.
    #[track_caller]
    pub(crate) fn until<T>(&self, says: impl Fn(&str) -> Option<T>) -> T {
        let started = Instant::now();
        let changes = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)
            .expect("inotify");
        let events = inotify::WatchFlags::MODIFY | inotify::WatchFlags::CREATE;
        inotify::add_watch(&changes, self.directory.path(), events).expect("inotify");
        loop {
            let log = self.log();
            if let Some(value) = says(&log) {
                return value;
            }
            let left = DEADLINE.checked_sub(started.elapsed());
            let left = left.unwrap_or_else(|| {
                let errors = fs::read_to_string(self.path("errors")).unwrap_or_default();
                panic!("not in time:\n{log}\n{errors}")
            });
            let left = Timespec {
                tv_sec: left.as_secs().cast_signed(),
                tv_nsec: 0,
            };
            poll(&mut [PollFd::new(&changes, PollFlags::IN)], Some(&left)).expect("poll");
            let _ = rustix::io::read(&changes, &mut [0; 4096]);
        }
    }

    /// Waits for a line that begins so.
    #[track_caller]
    pub(crate) fn wait_for(&self, line: &str) -> String {
        self.until(|log| {
            let found = log.lines().find(|each| each.starts_with(line));
            found.map(str::to_owned)
        })
    }

    /// Which process serves, by the log.
    #[track_caller]
    pub(crate) fn pid(&self) -> u32 {
        let log = self.log();
        let serving = |line: &&str| line.ends_with(" serves") || line.contains(" took over");
        let line = log.lines().rfind(serving).expect("somebody serves");
        let pid = line.split(' ').next().expect("a number");
        pid.parse().expect("a number")
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(self.pid().cast_signed()).expect("not 0");
        kill_process(pid, signal).expect("it runs");
    }

    /// Makes the time pass for the one that serves, until its successor has failed.
    pub(crate) fn hurry(&self) {
        self.signal(server::HURRY);
    }

    /// Restarts it, and waits until that is through; what the log says of it.
    #[track_caller]
    pub(crate) fn restart(&self) -> String {
        let before = self.pid();
        self.signal(Signal::HUP);
        let wanted = format!(" took over from {before} ");
        let line = self.until(|log| {
            let found = log.lines().find(|line| line.contains(&wanted));
            found.map(str::to_owned)
        });
        self.wait_for(&format!("{before} handed over"));
        line
    }

    /// The child that the process has, once it has one.
    pub(crate) fn child_of(&self, pid: u32) -> u32 {
        eventually(DEADLINE, || {
            let tasks = fs::read_dir(format!("/proc/{pid}/task")).map_err(|it| it.to_string())?;
            // It belongs to the thread that started it.
            let children = tasks.flatten().filter_map(|task| {
                let children = fs::read_to_string(task.path().join("children")).ok()?;
                children.split_ascii_whitespace().next()?.parse().ok()
            });
            children.max().ok_or_else(|| "no successor".to_owned())
        })
    }

    /// How many descriptors the process that serves has.
    pub(crate) fn descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.pid()))
            .expect("it runs")
            .count()
    }

    #[track_caller]
    pub(crate) fn connect_tcp(&self, name: &str) -> Client {
        let address = fs::read_to_string(self.path(name)).expect("it listens");
        Client::new(Stream::Tcp(
            TcpStream::connect(address).expect("it listens"),
        ))
    }

    #[track_caller]
    pub(crate) fn connect_unix(&self) -> Client {
        let stream = UnixStream::connect(self.path("socket")).expect("it listens");
        Client::new(Stream::Unix(stream))
    }

    /// Has the present process end in an orderly way.
    #[track_caller]
    pub(crate) fn stop(&self) {
        let pid = self.pid();
        self.signal(Signal::TERM);
        self.wait_for(&format!("{pid} stopped"));
        wait_until_gone(pid);
    }

    #[track_caller]
    pub(crate) fn kill(&self) {
        let pid = self.pid();
        self.signal(Signal::KILL);
        wait_until_gone(pid);
    }
}

/// How long a successor was given, by the server's time, as the log says it.
#[track_caller]
pub(crate) fn took(told: &str) -> Duration {
    let milliseconds = told
        .rsplit_once(", after ")
        .and_then(|(_, took)| took.trim_end().strip_suffix(" ms"))
        .expect("it says how long");
    Duration::from_millis(milliseconds.parse().expect("a number"))
}

/// It may stay a zombie, if whoever adopts orphans here does not wait for them.
#[track_caller]
fn wait_until_gone(pid: u32) {
    eventually(DEADLINE, || {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let state = stat
            .rsplit(") ")
            .next()
            .and_then(|rest| rest.chars().next());
        match state {
            None | Some('Z' | 'X') => Ok(()),
            Some(_) => Err(format!("{pid} is there: {stat}")),
        }
    });
}

impl Drop for Server {
    fn drop(&mut self) {
        // All that ever served: by their log, and only those that still run our
        // program in our directory.
        let log = self.log();
        let mut pids: Vec<i32> = log
            .lines()
            .filter_map(|line| line.split(' ').next()?.parse().ok())
            .collect();
        pids.sort_unstable();
        pids.dedup();
        for pid in pids {
            if is_ours(pid, self.directory.path())
                && let Some(pid) = Pid::from_raw(pid)
            {
                let _ = kill_process(pid, Signal::KILL);
            }
        }
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn is_ours(pid: i32, directory: &Path) -> bool {
    let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
    let wanted = format!("{}={}", server::DIRECTORY, directory.display());
    environment
        .split(|byte| *byte == 0)
        .any(|variable| variable == wanted.as_bytes())
}

enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

/// One connection, which checks every answer.
pub(crate) struct Client {
    stream: Stream,
    received: Vec<u8>,
    descriptors: VecDeque<OwnedFd>,
    /// Of everything sent, frame by frame: what the server is going to say.
    sums: VecDeque<(u8, u64)>,
    sum: u64,
    /// Of the frame that was begun and not sent whole.
    rest: Vec<u8>,
}

impl Client {
    fn new(stream: Stream) -> Self {
        match &stream {
            Stream::Tcp(stream) => stream.set_read_timeout(Some(DEADLINE)),
            Stream::Unix(stream) => stream.set_read_timeout(Some(DEADLINE)),
        }
        .expect("a socket");
        Self {
            stream,
            received: Vec::new(),
            descriptors: VecDeque::new(),
            sums: VecDeque::new(),
            sum: 0,
            rest: Vec::new(),
        }
    }

    fn frame(&mut self, asked: u8, body: &[u8]) -> Vec<u8> {
        let mut frame = (body.len() as u32).to_be_bytes().to_vec();
        frame.push(asked);
        frame.extend_from_slice(body);
        self.sum = checksum(self.sum, &frame);
        self.sums.push_back((asked.to_ascii_uppercase(), self.sum));
        frame
    }

    pub(crate) fn send(&mut self, asked: u8, body: &[u8]) -> io::Result<()> {
        let frame = self.frame(asked, body);
        self.send_bytes(&frame, None)
    }

    /// Sends a frame but for its end, with a descriptor if it keeps one.
    pub(crate) fn begin(&mut self, asked: u8, body: &[u8], fd: Option<&OwnedFd>) {
        let mut frame = self.frame(asked, body);
        self.rest = frame.split_off(frame.len() / 2);
        self.send_bytes(&frame, fd).expect("connected");
    }

    pub(crate) fn end(&mut self) {
        self.try_end().expect("connected");
    }

    /// As [`end`](Self::end), where the other side may be gone.
    pub(crate) fn try_end(&mut self) -> io::Result<()> {
        let rest = std::mem::take(&mut self.rest);
        self.send_bytes(&rest, None)
    }

    fn send_bytes(&self, mut bytes: &[u8], fd: Option<&OwnedFd>) -> io::Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let borrowed = fd.map(|fd| [fd.as_fd()]);
        if let Some(fd) = &borrowed {
            ancillary.push(SendAncillaryMessage::ScmRights(fd));
        }
        while !bytes.is_empty() {
            let parts = [IoSlice::new(bytes)];
            let flags = SendFlags::NOSIGNAL;
            let sent = match &self.stream {
                Stream::Tcp(stream) => rustix::net::send(stream, bytes, flags),
                Stream::Unix(stream) => sendmsg(stream, &parts, &mut ancillary, flags),
            }?;
            ancillary.clear();
            bytes = &bytes[sent..];
        }
        Ok(())
    }

    fn read(&mut self) -> io::Result<()> {
        let mut bytes = [0; 65_536];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let flags = RecvFlags::CMSG_CLOEXEC;
        let count = match &self.stream {
            Stream::Tcp(stream) => recvmsg(stream, &mut parts, &mut ancillary, flags)?.bytes,
            Stream::Unix(stream) => recvmsg(stream, &mut parts, &mut ancillary, flags)?.bytes,
        };
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                self.descriptors.extend(descriptors);
            }
        }
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.received.extend_from_slice(&bytes[..count]);
        Ok(())
    }

    /// The next answer, checked; what it says, with the descriptors that the asked
    /// for kind comes with.
    pub(crate) fn receive(&mut self) -> io::Result<Vec<u8>> {
        let (kind, sum) = self.sums.pop_front().expect("something was asked");
        loop {
            if let Some(length) = self.received.first_chunk() {
                let whole = HEADER + u32::from_be_bytes(*length) as usize;
                if self.received.len() >= whole {
                    let frame: Vec<u8> = self.received.drain(..whole).collect();
                    let (body, theirs) = frame[HEADER..].split_last_chunk().expect("a sum");
                    assert_eq!(char::from(frame[4]), char::from(kind), "answers in order");
                    assert_eq!(u64::from_be_bytes(*theirs), sum, "lost or doubled bytes");
                    return Ok(body.to_vec());
                }
            }
            self.read()?;
        }
    }

    #[track_caller]
    pub(crate) fn echo(&mut self, body: &[u8]) {
        self.send(b'e', body).expect("connected");
        assert_eq!(self.receive().expect("an answer"), body);
    }

    /// Which process answers.
    pub(crate) fn ask_pid(&mut self) -> io::Result<u32> {
        self.send(b'p', b"")?;
        let answer = self.receive()?;
        Ok(String::from_utf8_lossy(&answer).parse().expect("a number"))
    }

    /// Takes the answer to `b`.
    #[track_caller]
    pub(crate) fn receive_pattern(&mut self, length: usize) {
        let sum = self.sums.front().expect("asked").1;
        let body = self.receive().expect("an answer");
        assert!(body == pattern(sum, length), "bytes were changed");
    }

    /// Takes the answer to `d`, with its descriptors.
    #[track_caller]
    pub(crate) fn receive_numbered(&mut self, count: u32) {
        let sum = self.sums.front().expect("asked").1;
        self.receive().expect("an answer");
        for index in 0..count {
            let fd = self.descriptors.pop_front();
            let fd = fd.unwrap_or_else(|| panic!("descriptor {index} of {count} is missing"));
            let mut text = [0; 8];
            rustix::io::pread(&fd, &mut text, 0).expect("readable");
            let number = u64::from_be_bytes(text);
            assert_eq!(
                number,
                sum ^ u64::from(index),
                "descriptor {index} of {count}"
            );
        }
    }

    /// Nothing may be left of what came.
    #[track_caller]
    pub(crate) fn assert_settled(&self) {
        assert!(self.descriptors.is_empty(), "too many descriptors");
        assert!(self.received.is_empty(), "too many bytes");
    }

    /// Takes the answer to `g`: the descriptors that the server has kept.
    #[track_caller]
    pub(crate) fn receive_kept(&mut self) -> Vec<OwnedFd> {
        self.receive().expect("an answer");
        self.descriptors.drain(..).collect()
    }
}
