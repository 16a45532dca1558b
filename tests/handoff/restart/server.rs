//! The program under test: this test binary, run as a server that is restarted
//! by SIGHUP. It speaks frames whose checksums show every byte that is lost,
//! doubled or out of place, and does what the file `fault` says.

use std::cell::{Cell, OnceCell};
use std::collections::VecDeque;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{self, Command};
use std::rc::Rc;
use std::time::{Duration, Instant};

use bowline::endpoint::Adopt as _;
use bowline::handoff::restart::{
    Listeners, Movable, MoveTicket, Moved, Packed, Program, Restart, RestartError, RestartSettings,
    Start,
};
use bowline::handoff::systemd::Notifier;
use bowline::lifecycle::{Hold, Phase, SystemEvent};
use bowline::process::describe_socket;
use bowline::time::{Clock, Sleep};
use bowline::{
    Address, Context, Protocol, Reactor, TcpStream, Transport, Transports, UnixStream,
    UnixTransport,
};
use bowline::{Tcp, Unix};
use rustix::process::{Signal, getpid, kill_process};

use super::hung;
use crate::support::own_process::{end_with_owner, owned};

/// Says to the test that it is to be the server, and where its files are.
pub(crate) const DIRECTORY: &str = "BOWLINE_TEST_SERVER";

/// How the test asks cargo's harness for exactly it.
pub(crate) const TEST: &str = "restart::server_process";

/// How long a step may take, in the server's time: longer than one takes on any machine.
/// For what hangs the tests make that time pass ([`Hurried`]).
pub(crate) const LIMIT: Duration = Duration::from_secs(60);

/// How many times faster that time goes then.
const HASTE: u32 = 60;

/// The signal that says so, until a successor has failed.
pub(crate) const HURRY: Signal = Signal::USR1;

/// Real time, but for a while faster.
#[derive(Clone, Default)]
struct Hurried {
    state: Rc<Cell<(Duration, Option<Instant>)>>,
}

impl Hurried {
    /// By how much it is ahead.
    fn ahead(&self) -> Duration {
        let (so_far, since) = self.state.get();
        so_far + since.map_or(Duration::ZERO, |since| since.elapsed() * (HASTE - 1))
    }

    fn begin(&self) {
        self.state.set((self.ahead(), Some(Instant::now())));
    }

    fn end(&self) {
        self.state.set((self.ahead(), None));
    }
}

impl Clock for Hurried {
    fn now(&self) -> Instant {
        Instant::now() + self.ahead()
    }

    fn before_sleep(&self, _: Option<Instant>) -> Sleep {
        match self.state.get() {
            (_, Some(_)) => Sleep::Skip,
            (_, None) => Sleep::Wait,
        }
    }
}

/// What goes wrong with a successor.
fn fault(directory: &Path) -> String {
    fs::read_to_string(directory.join("fault")).unwrap_or_default()
}

/// The program as a command.
pub(crate) fn command(directory: &Path) -> Command {
    let program = fs::read_to_string(directory.join("program"));
    let program = match program {
        Ok(path) => PathBuf::from(path),
        Err(_) => std::env::current_exe().expect("Linux knows"),
    };
    let mut command = Command::new(program);
    owned(&mut command)
        .args(["--exact", "--nocapture", TEST])
        .env(DIRECTORY, directory)
        .env_remove("NOTIFY_SOCKET")
        .stdin(process::Stdio::null())
        .stdout(process::Stdio::null());
    let manager = directory.join("manager");
    if manager.exists() {
        command.env("NOTIFY_SOCKET", manager);
    }
    let errors = OpenOptions::new()
        .append(true)
        .create(true)
        .open(directory.join("errors"));
    command.stderr(errors.expect("ours"));
    command
}

pub(crate) fn run(directory: &Path) {
    end_with_owner();
    let _ = env_logger::try_init();
    let fault = fault(directory);
    let clock = Hurried::default();
    let shared = Rc::new(Shared {
        restart: OnceCell::new(),
        directory: directory.to_owned(),
        clock: clock.clone(),
        started: Cell::new(clock.now()),
    });
    match fault.as_str() {
        "crashes at once" => process::abort(),
        "exits early" => process::exit(0),
        "never asks" => shared.hang(),
        hung::HAS_ALL | hung::TOLD_TO_GO | hung::LIVE => {
            hung::run(directory, &fault, || shared.hang())
        }
        _ => {}
    }
    let mut settings = RestartSettings::new(directory.join("control"));
    settings.answer = LIMIT;
    settings.start = LIMIT;
    settings.ready = LIMIT;
    settings.drain = LIMIT;
    let notifier = Notifier::from_environment().expect("the manager is there");
    settings.notifier = notifier.map(Rc::new);
    if fault == LOOKS_ONCE {
        settings.search = Duration::ZERO;
    }
    if fault == "is of another format" {
        settings.format = 1;
    }
    let mut reactor = Reactor::with_clock(clock.clone()).expect("epoll");
    reactor
        .on_signals(&[HURRY.as_raw()], move |_, _| clock.begin())
        .expect("handlers");
    let restarting = Rc::clone(&shared);
    reactor
        .on_signals(&[Signal::HUP.as_raw()], move |reactor, _| {
            let Some(restart) = restarting.restart.get() else {
                return;
            };
            let command = command(&restarting.directory);
            restarting.started.set(restarting.clock.now());
            if let Err(error) = restart.start_successor(reactor, command) {
                restarting.log(&format!("no restart: {error}"));
            }
        })
        .expect("handlers");
    reactor
        .on_signals(&[Signal::TERM.as_raw()], |reactor, _| {
            let _ = reactor.stop();
            reactor.call_later(LIMIT, |reactor| {
                let _ = reactor.crash();
            });
        })
        .expect("handlers");
    let server = Server {
        shared: Rc::clone(&shared),
        fault,
        moved: 0,
    };
    let restart = Restart::begin(&mut reactor, settings, server).expect("a directory of ours");
    let _ = shared.restart.set(restart);
    let stopped = Rc::clone(&shared);
    reactor.add_trigger(Phase::After, SystemEvent::Shutdown, move |_| {
        stopped.log("stopped");
    });
    reactor.run().expect("it does not run yet");
}

struct Shared {
    restart: OnceCell<Restart>,
    directory: PathBuf,
    clock: Hurried,
    /// When the last successor was.
    started: Cell<Instant>,
}

impl Shared {
    /// Does nothing any more, and says so before.
    fn hang(&self) -> ! {
        self.log("hangs");
        loop {
            std::thread::park();
        }
    }

    /// One line, by which the test learns what happened.
    fn log(&self, line: &str) {
        let file = OpenOptions::new()
            .append(true)
            .create(true)
            .open(self.directory.join("log"));
        let line = format!("{} {line}\n", process::id());
        file.and_then(|mut file| file.write_all(line.as_bytes()))
            .expect("the log can be written");
    }
}

/// Begins what is wrong with one that is killed when so many connections are its own.
pub(crate) const KILLED_WITH: &str = "is killed with ";

/// What is wrong with one that gives up when it is refused.
pub(crate) const LOOKS_ONCE: &str = "looks once";

struct Server {
    shared: Rc<Shared>,
    fault: String,
    /// How many connections have come to it.
    moved: usize,
}

impl Server {
    fn frames(&self) -> impl FnMut(&Address) -> Frames + use<> {
        let shared = Rc::clone(&self.shared);
        move |_| Frames::new(&shared)
    }
}

impl Program for Server {
    fn listen(&mut self, reactor: &mut Reactor, listeners: &mut Listeners<'_>) -> io::Result<()> {
        match self.fault.as_str() {
            "crashes while it listens" => process::abort(),
            "cannot listen" => return Err(io::ErrorKind::AddrInUse.into()),
            "is never ready" => self.shared.hang(),
            _ => {}
        }
        let any = ([127, 0, 0, 1], 0).into();
        for name in ["one", "two"] {
            let handle = listeners.listen(reactor, name, Tcp::at(any), self.frames())?;
            if let Some(listener) = reactor.get(handle) {
                let address = listener.address().to_string();
                // Whole at once, for who reads it.
                let path = self.shared.directory.join(name);
                fs::write(path.with_extension("new"), address)?;
                fs::rename(path.with_extension("new"), path)?;
            }
        }
        let path = self.shared.directory.join("socket");
        listeners.listen(reactor, "local", Unix::at(path), self.frames())?;
        Ok(())
    }

    fn serving(&mut self, _: &mut Reactor, start: Start) {
        match start {
            Start::TookOver { pid, connections } => {
                self.shared
                    .log(&format!("took over from {pid} with {connections}"));
            }
            _ => self.shared.log("serves"),
        }
    }

    fn not_started(&mut self, reactor: &mut Reactor, error: &RestartError) {
        self.shared.log(&format!("not started: {error}"));
        let _ = reactor.stop();
    }

    fn successor_failed(&mut self, _: &mut Reactor, error: &RestartError) {
        // One that somebody else has started began at another time.
        let took = self.shared.clock.now() - self.shared.started.get();
        self.shared.clock.end();
        let took = took.as_millis();
        self.shared
            .log(&format!("goes on: {error}, after {took} ms"));
    }

    fn handed_over(&mut self, reactor: &mut Reactor, _: Duration) {
        self.shared.log("handed over");
        let _ = reactor.stop();
    }

    fn takes(&self, kind: &str) -> bool {
        match self.fault.as_str() {
            "crashes while connections move" => process::abort(),
            "hangs while connections move" => self.shared.hang(),
            "takes no connections" => false,
            _ => kind == Frames::KIND_OF_BOTH,
        }
    }

    fn connection_moved(&mut self, reactor: &mut Reactor, moved: Moved) {
        if self.fault == format!("{KILLED_WITH}{}", self.moved) {
            let _ = kill_process(getpid(), Signal::KILL);
        }
        self.moved += 1;
        let frames = Frames::unpacked(&self.shared, moved.packed);
        let socket = describe_socket(moved.fd.as_fd()).expect("a socket");
        let adopted = match socket.address {
            Some(Address::Inet(_)) => reactor
                .adopt(Tcp.with_unsent(moved.unsent), moved.fd, frames)
                .map(|_| ()),
            _ => reactor
                .adopt(Unix.with_unsent(moved.unsent), moved.fd, frames)
                .map(|_| ()),
        };
        if let Err(error) = adopted {
            self.shared.log(&format!("cannot adopt: {error}"));
        }
    }
}

/// A frame is its length in four bytes, what it asks, and more.
pub(crate) const HEADER: usize = 5;

/// The checksum goes on over all that was received, so it is right only if each
/// byte came once and in order.
pub(crate) fn checksum(mut sum: u64, bytes: &[u8]) -> u64 {
    for byte in bytes {
        sum = (sum ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
    }
    sum
}

/// `length` bytes that only this sum gives.
pub(crate) fn pattern(sum: u64, length: usize) -> Vec<u8> {
    let mut state = sum | 1;
    (0..length)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        })
        .collect()
}

/// One connection.
struct Frames {
    shared: Rc<Shared>,
    received: Vec<u8>,
    /// Of everything before.
    sum: u64,
    /// Have arrived, and their frame has not.
    arrived: VecDeque<OwnedFd>,
    /// Kept for the client.
    kept: Vec<OwnedFd>,
    /// For the transport, from the process before.
    unread: Vec<u8>,
    ticket: Option<MoveTicket>,
    open: Option<Hold>,
}

/// What differs between the two kinds of transport.
trait Passes: Transport {
    fn pass(&mut self, frame: &[u8], descriptors: Vec<OwnedFd>);
}

impl Passes for TcpStream {
    fn pass(&mut self, frame: &[u8], descriptors: Vec<OwnedFd>) {
        assert!(descriptors.is_empty(), "nobody asks for it");
        Transport::write(self, frame);
    }
}

impl Passes for UnixStream {
    fn pass(&mut self, frame: &[u8], descriptors: Vec<OwnedFd>) {
        let descriptors = descriptors.into_iter().map(Into::into).collect();
        self.write_with_descriptors(frame, descriptors)
            .expect("there is room");
    }
}

impl Frames {
    const KIND_OF_BOTH: &'static str = "frames";

    fn new(shared: &Rc<Shared>) -> Self {
        Self {
            shared: Rc::clone(shared),
            received: Vec::new(),
            sum: 0,
            arrived: VecDeque::new(),
            kept: Vec::new(),
            unread: Vec::new(),
            ticket: None,
            open: None,
        }
    }

    fn unpacked(shared: &Rc<Shared>, packed: Packed) -> Self {
        let mut this = Self::new(shared);
        this.restore(packed);
        this
    }

    fn restore(&mut self, packed: Packed) {
        let (sum, kept) = packed.state.split_first_chunk().expect("16 bytes");
        self.sum = u64::from_be_bytes(*sum);
        let kept = u64::from_be_bytes(kept.try_into().expect("16 bytes"));
        let mut descriptors = packed.descriptors;
        self.arrived = descriptors.split_off(kept as usize).into();
        self.kept = descriptors;
        self.unread = packed.unread;
    }

    fn made<T: Passes>(&mut self, cx: &mut Context<'_, T>) {
        self.open = Some(cx.reactor.hold(SystemEvent::Shutdown));
        if !self.unread.is_empty() {
            cx.transport.push_back(std::mem::take(&mut self.unread));
        }
    }

    fn data<T: Passes>(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
        self.received.extend_from_slice(data);
        while let Some(length) = self.received.first_chunk() {
            let whole = HEADER + u32::from_be_bytes(*length) as usize;
            if self.received.len() < whole {
                break;
            }
            let frame: Vec<u8> = self.received.drain(..whole).collect();
            self.sum = checksum(self.sum, &frame);
            self.serve(cx, frame[4], &frame[HEADER..]);
        }
    }

    fn serve<T: Passes>(&mut self, cx: &mut Context<'_, T>, asked: u8, body: &[u8]) {
        let mut answer = Vec::new();
        let mut descriptors = Vec::new();
        match asked {
            b'e' => answer.extend_from_slice(body),
            b'p' => answer.extend_from_slice(process::id().to_string().as_bytes()),
            // So many bytes.
            b'b' => {
                let count = u32::from_be_bytes(body.try_into().expect("a number"));
                answer = pattern(self.sum, count as usize);
            }
            // So many descriptors, whose files say which they are.
            b'd' => {
                let count = u32::from_be_bytes(body.try_into().expect("a number"));
                for index in 0..count {
                    let flags = rustix::fs::MemfdFlags::CLOEXEC;
                    let file = rustix::fs::memfd_create(c"test", flags).expect("memory");
                    let text = (self.sum ^ u64::from(index)).to_be_bytes();
                    rustix::io::pwrite(&file, &text, 0).expect("memory");
                    descriptors.push(file);
                }
            }
            // Keeps one, and gives all back.
            b'k' => self.kept.extend(self.arrived.pop_front()),
            b'g' => descriptors.append(&mut self.kept),
            other => self.shared.log(&format!("nonsense: {other}")),
        }
        let mut frame = ((answer.len() + 8) as u32).to_be_bytes().to_vec();
        frame.push(asked.to_ascii_uppercase());
        frame.extend_from_slice(&answer);
        frame.extend_from_slice(&self.sum.to_be_bytes());
        cx.transport.pass(&frame, descriptors);
    }

    fn packed(&mut self) -> Packed {
        let kept = self.kept.len() as u64;
        let mut descriptors = std::mem::take(&mut self.kept);
        descriptors.extend(self.arrived.drain(..));
        Packed {
            state: [self.sum.to_be_bytes(), kept.to_be_bytes()].concat(),
            unread: self.received.clone(),
            descriptors,
        }
    }

    fn unpack(&mut self, packed: Packed) {
        self.restore(packed);
        // It has them already.
        self.unread = Vec::new();
    }
}

macro_rules! frames_over {
    ($transport:ty) => {
        impl Protocol<$transport> for Frames {
            fn connection_made(&mut self, cx: &mut Context<'_, $transport>) {
                self.made(cx);
                let handle = cx.transport.handle();
                if let Some(restart) = self.shared.restart.get() {
                    self.ticket = Some(restart.movable::<$transport, Self>(handle));
                }
            }

            fn file_descriptor_received(
                &mut self,
                _: &mut Context<'_, $transport>,
                fd: OwnedFd,
            ) -> Result<(), OwnedFd> {
                self.arrived.push_back(fd);
                Ok(())
            }

            fn data_received(&mut self, cx: &mut Context<'_, $transport>, data: &[u8]) {
                self.data(cx, data);
            }
        }
    };
}

frames_over!(TcpStream);
frames_over!(UnixStream);

impl Movable for Frames {
    const KIND: &'static str = Self::KIND_OF_BOTH;

    fn pack(&mut self) -> Option<Packed> {
        Some(self.packed())
    }

    fn unpack(&mut self, packed: Packed) {
        Self::unpack(self, packed);
    }
}
