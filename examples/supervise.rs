//! Several copies of a program, started again when they end: their output by lines, a
//! listening socket that all of them have, an ordered stop, and a control socket.
//!
//! ```text
//! cargo run --example supervise -- --children 3 --listen tcp:127.0.0.1:8080 \
//!     --control /tmp/supervise -- sh -c 'echo started; sleep 5'
//! socat - UNIX-CONNECT:/tmp/supervise,type=5
//! status
//! ```
//!
//! A copy finds the listening socket as descriptor 3, as under systemd (`LISTEN_FDS`). One
//! that ends is started again, after a wait that grows while it keeps ending soon. At
//! SIGTERM they are stopped one after the other, the last first; one that does not end in
//! time is killed, with all that it has started.
//!
//! The control socket is one of packets: each request and each answer is one, so that
//! neither has to be framed. It is only for who runs this (mode 0600).

#![allow(clippy::print_stdout)]

mod common;

use std::cell::RefCell;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;

use bowline::endpoint::Listen as _;
use bowline::framing::{FrameContext, FrameReceiver, Framed, LineFramer};
use bowline::policies::Backoff;
use bowline::process::{
    ChildCommand, ProcessContext, ProcessHandle, ProcessProtocol, ProcessStatus, describe_socket,
};
use bowline::{
    Address, Context, Packet, PacketProtocol, PacketTransport, Reactor, Tcp, Transport, Transports,
    UnixSeqpacket, signal,
};

use common::{Arguments, Inspect, STOP_DEADLINE};

const HELP: &str = "
Runs several copies of a program, and starts those again that end.

Usage: supervise [OPTIONS] -- PROGRAM [ARGUMENT...]

  --children N        how many copies [default: 2]
  --listen ADDRESS    a TCP socket that all of them have as descriptor 3
  --control PATH      takes requests: status, restart N, stop
  --inspect PLACE     show what is inside: on a UNIX socket (a path),
                      or to browsers (an address)
  --help              prints this
";

/// One that has run for so long starts again at once.
const STEADY: Duration = Duration::from_secs(10);

/// The longest line. One that writes a longer one loses the stream.
const LONGEST_LINE: usize = 1 << 20;

type Shared = Rc<RefCell<Supervisor>>;

struct Supervisor {
    program: Vec<String>,
    listener: Option<OwnedFd>,
    children: Vec<Child>,
    is_stopping: bool,
}

/// One of the copies.
struct Child {
    process: Option<ProcessHandle>,
    pid: u32,
    starts: u32,
    /// What became of the one before.
    last: String,
    backoff: Backoff,
}

/// Shows what a copy writes, line by line.
struct Lines {
    child: usize,
    stream: &'static str,
}

impl<T: Transport> FrameReceiver<T, LineFramer> for Lines {
    fn frame_received(&mut self, _: &mut FrameContext<'_, T, LineFramer>, line: &[u8]) {
        let Self { child, stream } = self;
        println!("{child} {stream}: {}", String::from_utf8_lossy(line));
    }
}

/// Told of the life of one copy.
struct Copy {
    child: usize,
    shared: Shared,
}

impl ProcessProtocol for Copy {
    // Each stream has a protocol of its own.
    fn child_data_received(&mut self, _: &mut ProcessContext<'_>, _: u32, _: &[u8]) {}

    fn process_ended(&mut self, cx: &mut ProcessContext<'_>, status: ProcessStatus) {
        println!("{} {status}", self.child);
        let mut supervisor = self.shared.borrow_mut();
        let child = &mut supervisor.children[self.child];
        child.process = None;
        child.last = status.to_string();
        let wait = child.backoff.next_wait();
        let is_stopping = supervisor.is_stopping;
        drop(supervisor);
        match is_stopping {
            true => stop_next(cx.reactor, &self.shared),
            false => start_after(cx.reactor, &self.shared, self.child, wait),
        }
    }
}

fn start_after(reactor: &mut Reactor, shared: &Shared, child: usize, wait: Duration) {
    let shared = Rc::clone(shared);
    reactor.call_later(wait, move |reactor| {
        if !shared.borrow().is_stopping {
            start(reactor, &shared, child);
        }
    });
}

fn start(reactor: &mut Reactor, shared: &Shared, index: usize) {
    let supervisor = shared.borrow();
    let lines = |stream| {
        let framer = LineFramer::with_delimiter(b"\n".as_slice()).with_max_length(LONGEST_LINE);
        Framed::new(
            framer,
            Lines {
                child: index,
                stream,
            },
        )
    };
    let mut command = ChildCommand::program(&supervisor.program[0])
        .args(&supervisor.program[1..])
        .null(0)
        .read_from_with(1, lines("out"))
        .read_from_with(2, lines("err"))
        .in_own_group();
    if let Some(listener) = &supervisor.listener {
        command = command.listen_fds(&[(listener.as_fd(), "listener")]);
    }
    let copy = Copy {
        child: index,
        shared: Rc::clone(shared),
    };
    let started = reactor.spawn_process(command, copy);
    drop(supervisor);
    let mut supervisor = shared.borrow_mut();
    let child = &mut supervisor.children[index];
    match started {
        Ok(process) => {
            child.process = Some(process);
            child.starts += 1;
            child.pid = reactor.get(process).map_or(0, |process| process.pid());
            println!("{index} started as process {}", child.pid);
            drop(supervisor);
            let shared = Rc::clone(shared);
            reactor.call_later(STEADY, move |_| {
                let child = &mut shared.borrow_mut().children[index];
                if child.process == Some(process) {
                    child.backoff.reset();
                }
            });
        }
        Err(error) => {
            println!("{index} {error}");
            child.last = error.to_string();
            let wait = child.backoff.next_wait();
            drop(supervisor);
            start_after(reactor, shared, index, wait);
        }
    }
}

/// Stops the last copy that runs; when none does, the loop.
fn stop_next(reactor: &mut Reactor, shared: &Shared) {
    let supervisor = shared.borrow();
    let running = supervisor
        .children
        .iter()
        .rev()
        .find_map(|child| child.process);
    match running.and_then(|process| reactor.get(process)) {
        Some(process) => process.terminate_within(STOP_DEADLINE),
        // It may have been stopped already.
        None => drop(reactor.stop()),
    }
}

fn stop(reactor: &mut Reactor, shared: &Shared) {
    if !std::mem::replace(&mut shared.borrow_mut().is_stopping, true) {
        println!("stopping");
        stop_next(reactor, shared);
    }
}

/// One who asks over the control socket.
struct Control(Shared);

impl Control {
    fn answer(&self, reactor: &mut Reactor, request: &str) -> String {
        let mut words = request.split_whitespace();
        match (words.next(), words.next().map(str::parse::<usize>)) {
            (Some("status"), None) => self.status(),
            (Some("stop"), None) => {
                stop(reactor, &self.0);
                "stopping\n".into()
            }
            (Some("restart"), Some(Ok(child))) => {
                let supervisor = self.0.borrow();
                let child = supervisor.children.get(child);
                match child.and_then(|child| reactor.get(child.process?)) {
                    Some(process) => {
                        process.terminate_within(STOP_DEADLINE);
                        "restarting\n".into()
                    }
                    None => "it does not run\n".into(),
                }
            }
            _ => "status, restart N or stop, please\n".into(),
        }
    }

    fn status(&self) -> String {
        let supervisor = self.0.borrow();
        let line = |(index, child): (usize, &Child)| match child.process {
            Some(_) => format!("{index} runs as {}, start {}\n", child.pid, child.starts),
            None => format!("{index} waits, start {}: {}\n", child.starts, child.last),
        };
        supervisor.children.iter().enumerate().map(line).collect()
    }
}

impl<T: PacketTransport> PacketProtocol<T> for Control {
    fn packet_received(&mut self, cx: &mut Context<'_, T>, packet: &mut Packet<'_>) {
        let request = String::from_utf8_lossy(packet.data);
        let answer = self.answer(cx.reactor, &request);
        // Of who asks and does not read, no more is read either, once the queue is full.
        if !cx.transport.send(answer.as_bytes()).is_taken() {
            cx.transport.abort_connection();
        }
    }
}

fn main() -> common::Result {
    env_logger::init();
    let mut arguments = Arguments::parse(HELP);
    let inspect = Inspect::take(&mut arguments)?;
    let program = arguments.rest();
    let count = arguments.option("--children")?.unwrap_or(2);
    let listen = arguments.option::<std::net::SocketAddr>("--listen")?;
    let control = arguments.option::<String>("--control")?;
    arguments.finish()?;
    if program.is_empty() {
        return Err("-- PROGRAM, please; try --help".into());
    }

    let mut reactor = Reactor::new()?;
    Inspect::show(inspect.as_ref(), &mut reactor)?;
    let listener = listen.map(|address| Tcp::at(address).bind()).transpose()?;
    if let Some(listener) = &listener
        && let Some(address) = describe_socket(listener.as_fd())?.address
    {
        println!("children listen on {address}");
    }
    let child = |_| Child {
        process: None,
        pid: 0,
        starts: 0,
        last: String::new(),
        backoff: Backoff::new().first(Duration::from_millis(100)),
    };
    let shared = Rc::new(RefCell::new(Supervisor {
        program,
        listener,
        children: (0..count).map(child).collect(),
        is_stopping: false,
    }));
    if let Some(path) = control {
        let shared = Rc::clone(&shared);
        let here = UnixSeqpacket::at(path.as_str()).mode(0o600);
        reactor.listen(here, move |_: &Address| Control(Rc::clone(&shared)))?;
    }
    let stopped = Rc::clone(&shared);
    reactor.on_signals(&[signal::SIGTERM, signal::SIGINT], move |reactor, _| {
        stop(reactor, &stopped);
    })?;
    for child in 0..count {
        start(&mut reactor, &shared, child);
    }
    reactor.run()?;
    Ok(())
}
