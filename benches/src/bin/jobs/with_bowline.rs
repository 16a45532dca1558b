//! The servers in this program: bowline's pool of workers, and what is commonly written
//! instead: processes that each listen for themselves (`SO_REUSEPORT`) under a supervisor
//! that starts those anew that end.

use std::cell::RefCell;
use std::error::Error;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{self, Child, Command, Stdio};
use std::rc::Rc;
use std::time::Duration;
use std::{env, fs};

use bowline::endpoint::Adopt as _;
use bowline::handoff::pool::{
    Accepting, Live, PassedConnection, Pool, PoolSettings, Service, Worker, WorkerId,
    WorkerSettings, inherited_channel, spawn_command,
};
use bowline::handoff::restart::{
    Listeners, Movable, MoveTicket, Moved, Packed, Program, Restart, RestartError, RestartSettings,
    Start,
};
use bowline::{
    Address, AfterReadClosed, AnyConnection as _, CloseReason, Context, DelayedCall, GracefulStop,
    Protocol, Reactor, Tcp, TcpStream, Transport, Transports,
};

use crate::load::{TICK, TICK_EVERY, TICKS};
use crate::sys;

type Outcome<T = ()> = Result<T, Box<dyn Error>>;

const BACKLOG: u32 = 4_096;
/// How long connections have to end that stay with the old process.
const DRAIN: Duration = Duration::from_secs(30);
const MAX_HEAD: usize = 8_192;
/// Where each process writes its number when it serves.
pub(crate) const SERVING: &str = "serving";

/// What an old process of a naive supervisor has before it is told to end.
const HEAD_START: Duration = Duration::from_millis(200);

/// How the pool is run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Style {
    pub(crate) accepting: Accepting,
    /// Whether connections move to the next process.
    pub(crate) moves: bool,
}

impl Style {
    pub(crate) fn parse(accepting: &str, moves: &str) -> Outcome<Self> {
        Ok(Self {
            accepting: match accepting {
                "passing" => Accepting::ByPool,
                "accepting" => Accepting::ByWorkers,
                other => return Err(format!("who accepts by {other}?").into()),
            },
            moves: moves == "moves",
        })
    }

    pub(crate) fn words(self) -> [&'static str; 2] {
        let accepting = match self.accepting {
            Accepting::ByWorkers => "accepting",
            _ => "passing",
        };
        [accepting, if self.moves { "moves" } else { "stays" }]
    }
}

/// What the server is told: where, how, and by how many.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    pub(crate) port: u16,
    pub(crate) workers: usize,
    pub(crate) style: Style,
    pub(crate) directory: PathBuf,
}

impl Options {
    /// The command of a server, or of the next one.
    pub(crate) fn command(&self) -> io::Result<Command> {
        let mut command = Command::new(env::current_exe()?);
        command
            .args(["bowline", &self.port.to_string(), &self.workers.to_string()])
            .args(self.style.words())
            .arg(&self.directory)
            .stdin(Stdio::null());
        Ok(command)
    }

    fn address(&self) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], self.port))
    }
}

/// Accepts, or has workers accept.
pub(crate) fn serve(options: Options) -> Outcome {
    let mut reactor = Reactor::new()?;
    let settings = RestartSettings::new(options.directory.join("control")).drain(DRAIN);
    let restart = Rc::new(RefCell::new(None::<Restart>));
    let (of_signal, successor) = (Rc::clone(&restart), options.clone());
    reactor.on_signals(&[sys::HUP], move |reactor, _| {
        let started = successor.command().map_err(|error| error.to_string());
        let started = started.and_then(|command| match of_signal.borrow().as_ref() {
            Some(restart) => {
                (restart.start_successor(reactor, command)).map_err(|error| error.to_string())
            }
            None => Err("it has not begun".into()),
        });
        if let Err(error) = started {
            eprintln!("bowline: no restart: {error}");
        }
    })?;
    reactor.stop_on_signals_with(GracefulStop::new().deadline(DRAIN))?;
    let begun = Restart::begin(&mut reactor, settings, Server(options))?;
    restart.replace(Some(begun));
    reactor.run()?;
    Ok(())
}

struct Server(Options);

impl Program for Server {
    fn listen(&mut self, reactor: &mut Reactor, listeners: &mut Listeners<'_>) -> io::Result<()> {
        let options = &self.0;
        let settings = PoolSettings::default()
            .workers(options.workers)
            .accepting(options.style.accepting)
            .drain_timeout(Some(DRAIN));
        let words = options.style.words();
        let program = env::current_exe()?;
        let worker = move |_: WorkerId| {
            let mut command = Command::new(&program);
            command.arg("bowline-worker").args(words);
            command
        };
        let pool = Pool::start(reactor, settings, spawn_command(worker));
        let endpoint = Tcp::at(options.address()).backlog(BACKLOG).no_delay(true);
        listeners.pool(reactor, "web", endpoint, &pool, 0)?;
        Ok(())
    }

    fn serving(&mut self, _: &mut Reactor, _: Start) {
        // Whole, for whoever reads it.
        let (new, path) = (self.0.directory.join("new"), self.0.directory.join(SERVING));
        let written = fs::write(&new, process::id().to_string());
        if let Err(error) = written.and_then(|()| fs::rename(&new, path)) {
            eprintln!("bowline: nobody will know who serves: {error}");
        }
    }

    fn successor_failed(&mut self, _: &mut Reactor, error: &RestartError) {
        eprintln!("bowline: serving on: {error}");
    }

    fn takes(&self, kind: &str) -> bool {
        self.0.style.moves && kind == Http::KIND
    }
}

/// A worker of it.
pub(crate) fn work(style: Style) -> Outcome {
    let channel = inherited_channel()?;
    let mut reactor = Reactor::new()?;
    let service = Workers { moves: style.moves };
    Worker::start(&mut reactor, channel, WorkerSettings::default(), service)?;
    // The accepting process is told, and decides.
    reactor.on_signals(&[sys::HUP, sys::TERM], |_, _| {})?;
    reactor.run()?;
    Ok(())
}

struct Workers {
    moves: bool,
}

impl Service for Workers {
    fn serve(&mut self, reactor: &mut Reactor, connection: PassedConnection, live: Live) {
        // It was reset by its client, if not.
        let _ = connection.adopt(reactor, Tcp, Http::new(Some(live), self.moves));
    }

    fn takes(&self, kind: &str) -> bool {
        self.moves && kind == Http::KIND
    }

    fn serve_moved(&mut self, reactor: &mut Reactor, moved: Moved, live: Live) {
        let ticks: Option<[u8; 4]> = moved.packed.state.try_into().ok();
        let http = Http {
            partial: moved.packed.unread,
            ticks: ticks.map_or(0, u32::from_be_bytes),
            ..Http::new(Some(live), true)
        };
        let _ = reactor.adopt(Tcp.with_unsent(moved.unsent), moved.fd, http);
    }
}

/// One connection: answers with the process, or with a stream of ticks.
struct Http {
    live: Option<Live>,
    moves: bool,
    _ticket: Option<MoveTicket>,
    partial: Vec<u8>,
    /// How many are still to come.
    ticks: u32,
    timer: Option<DelayedCall>,
}

impl Http {
    fn new(live: Option<Live>, moves: bool) -> Self {
        Self {
            live,
            moves,
            _ticket: None,
            partial: Vec::new(),
            ticks: 0,
            timer: None,
        }
    }

    fn answer(&mut self, cx: &mut Context<'_, TcpStream>, head: &[u8]) {
        let has = |text: &[u8]| head.windows(text.len()).any(|it| it == text);
        if head.starts_with(b"GET /stream ") {
            let head = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
            cx.transport.write(head.as_bytes());
            self.ticks = TICKS;
            return self.tick(cx);
        }
        // Whoever reads it asks elsewhere: the process that has taken over.
        let is_last = has(b"\r\nConnection: close\r\n") || cx.reactor.is_stopping();
        let body = format!("{}\n", process::id());
        let close = if is_last { "Connection: close\r\n" } else { "" };
        let head = format!(
            "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: {}\r\n{close}\r\n",
            body.len()
        );
        cx.transport
            .write_sequence(&[head.as_bytes(), body.as_bytes()]);
        if is_last {
            cx.transport.lose_connection();
        }
    }

    /// One more, and the next in a while.
    fn tick(&mut self, cx: &mut Context<'_, TcpStream>) {
        self.timer = None;
        cx.transport
            .write(format!("{:x}\r\n{TICK}\r\n", TICK.len()).as_bytes());
        self.ticks -= 1;
        if self.ticks == 0 {
            cx.transport.write(b"0\r\n\r\n");
            return;
        }
        self.wait(cx);
    }

    fn wait(&mut self, cx: &mut Context<'_, TcpStream>) {
        let me = cx.transport.handle();
        self.timer = Some(cx.reactor.call_later(TICK_EVERY, move |reactor| {
            let tick = |http: &mut Self, cx: &mut Context<'_, TcpStream>| http.tick(cx);
            // It has moved, if it is not there.
            reactor.call_protocol_or::<TcpStream, Self>(me, tick, |_, _| {});
        }));
    }
}

impl Protocol<TcpStream> for Http {
    fn connection_made(&mut self, cx: &mut Context<'_, TcpStream>) {
        if self.moves
            && let Some(live) = &self.live
        {
            self._ticket = Some(live.movable::<TcpStream, Self>(cx.transport.handle()));
        }
        if self.ticks > 0 {
            self.wait(cx);
        }
        if !self.partial.is_empty() {
            self.data_received(cx, &[]);
        }
    }

    fn data_received(&mut self, cx: &mut Context<'_, TcpStream>, data: &[u8]) {
        self.partial.extend_from_slice(data);
        while self.ticks == 0
            && let Some(end) = self.partial.windows(4).position(|it| it == b"\r\n\r\n")
        {
            let head: Vec<u8> = self.partial.drain(..end + 4).collect();
            self.answer(cx, &head);
        }
        if self.partial.len() > MAX_HEAD {
            cx.transport.abort_connection();
        }
    }

    fn read_connection_lost(&mut self, _: &mut Context<'_, TcpStream>) -> AfterReadClosed {
        AfterReadClosed::LoseConnection
    }

    fn connection_lost(&mut self, cx: &mut Context<'_, TcpStream>, _: &CloseReason) {
        if let Some(timer) = self.timer.take() {
            let _ = timer.cancel(cx.reactor);
        }
    }

    fn connection_reattached(&mut self, cx: &mut Context<'_, TcpStream>) {
        if self.ticks > 0 {
            self.wait(cx);
        }
    }

    fn is_idle(&self) -> bool {
        self.partial.is_empty() && self.ticks == 0
    }
}

impl Movable for Http {
    const KIND: &'static str = "http";

    fn pack(&mut self) -> Option<Packed> {
        Some(Packed {
            state: self.ticks.to_be_bytes().to_vec(),
            unread: self.partial.clone(),
            ..Packed::default()
        })
    }

    fn unpack(&mut self, _: Packed) {}
}

/// Starts processes that listen for themselves, and starts them anew when they end. A
/// restart starts the next ones and tells the ones before to end in an orderly way.
pub(crate) fn supervise(port: &str, workers: usize) -> Outcome {
    let mut reactor = Reactor::new()?;
    let start = {
        let port = port.to_owned();
        move || {
            let mut command = Command::new(env::current_exe()?);
            command.args(["naive-worker", &port]);
            command.spawn()
        }
    };
    let children = Rc::new(RefCell::new(Vec::<Child>::new()));
    let leaving = Rc::new(RefCell::new(Vec::<Child>::new()));
    for _ in 0..workers {
        children.borrow_mut().push(start()?);
    }
    let (current, old, next) = (Rc::clone(&children), Rc::clone(&leaving), start.clone());
    reactor.on_signals(&[sys::HUP], move |reactor, _| {
        let started: io::Result<Vec<Child>> = (0..workers).map(|_| next()).collect();
        let Ok(started) = started else { return };
        let before = current.replace(started);
        let pids: Vec<u32> = before.iter().map(Child::id).collect();
        old.borrow_mut().extend(before);
        reactor.call_later(HEAD_START, move |_| {
            for pid in pids {
                let _ = sys::signal(pid.cast_signed(), sys::TERM);
            }
        });
    })?;
    let all = Rc::clone(&children);
    reactor.on_signals(&[sys::TERM], move |reactor, _| {
        for child in all.borrow().iter() {
            let _ = sys::signal(child.id().cast_signed(), sys::TERM);
        }
        let _ = reactor.stop();
    })?;
    reactor.call_every(Duration::from_millis(5), move |_, _| {
        for child in children.borrow_mut().iter_mut() {
            if let Ok(Some(_)) = child.try_wait()
                && let Ok(new) = start()
            {
                *child = new;
            }
        }
        (leaving.borrow_mut()).retain_mut(|child| matches!(child.try_wait(), Ok(None)));
    });
    reactor.run()?;
    Ok(())
}

/// One of these.
pub(crate) fn work_alone(port: u16) -> Outcome {
    let mut reactor = Reactor::new()?;
    let here = SocketAddr::from(([127, 0, 0, 1], port));
    let endpoint = Tcp::at(here)
        .reuse_port(true)
        .backlog(BACKLOG)
        .no_delay(true);
    reactor.listen(endpoint, |_: &Address| Http::new(None, false))?;
    reactor.stop_on_signals_with(GracefulStop::new().deadline(DRAIN))?;
    reactor.on_signals(&[sys::HUP], |_, _| {})?;
    reactor.run()?;
    Ok(())
}

/// Who accepts at present, as it has said itself.
pub(crate) fn serving(directory: &Path) -> Option<u32> {
    fs::read_to_string(directory.join(SERVING))
        .ok()?
        .parse()
        .ok()
}
