//! The server: each line comes back with the process that answers it.

use std::cell::RefCell;
use std::fs::{self, File};
use std::io::{self, Write};
use std::ops::Range;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::{self, Command};
use std::rc::Rc;
use std::thread;
use std::time::Instant;

use bowline::Transports;
use bowline::endpoint::{Adopt as _, Listen as _};
use bowline::handoff::restart::{Listeners, Movable, MoveTicket, Moved, Packed, Program};
use bowline::handoff::restart::{Restart, RestartError, RestartSettings, Start};
use bowline::handoff::systemd::{self, Notifier, Watchdog};
use bowline::layers::{LayerState, StreamTransport};
use bowline::process::{describe_socket, descriptors_closing};
use bowline::tls::TlsServer;
use bowline::{Address, AfterReadClosed, Context, GracefulStop, Protocol, Reactor};
use bowline::{Tcp, Unix};
use rustix::process::Signal;

use crate::common::{self, Endpoint, Inspect, STOP_DEADLINE};

/// The longest line.
const MAX_LINE: usize = 4096;

pub(crate) struct Options {
    pub(crate) listen: Option<Endpoint>,
    pub(crate) inspect: Option<Inspect>,
    pub(crate) unix: Option<PathBuf>,
    pub(crate) directory: PathBuf,
    pub(crate) moves: bool,
    /// That of all connections, if they are secured.
    pub(crate) tls: Option<TlsServer>,
    /// Where each process says at its end what it left open.
    pub(crate) record: Option<PathBuf>,
}

pub(crate) fn run(options: Options) -> common::Result {
    let record = options.record.clone();
    // What the program was started with is not ours, but for what it was handed.
    let handed = handed_descriptors();
    let mut others = open_descriptors()?;
    others.retain(|it| !handed.contains(&it.0));
    let result = serve(options);
    if let Some(record) = record {
        let is_ours = |it: &Descriptor| !others.contains(it);
        // What other threads close is closed any moment now.
        let ended = Instant::now();
        while descriptors_closing() > 0 && ended.elapsed() < STOP_DEADLINE {
            thread::yield_now();
        }
        let left: Vec<_> = open_descriptors()?.into_iter().filter(is_ours).collect();
        for Descriptor(number, what) in &left {
            log::error!("left open: {number}, {}", what.display());
        }
        let left = left.len();
        let mut record = File::options().append(true).create(true).open(record)?;
        // In one write, whole beside those of others.
        record.write_all(format!("{} {left}\n", process::id()).as_bytes())?;
    }
    result
}

/// An open descriptor: its number, and what it is.
#[derive(PartialEq)]
struct Descriptor(u32, PathBuf);

/// The numbers of the descriptors that a service manager has handed us.
fn handed_descriptors() -> Range<u32> {
    let count = std::env::var("LISTEN_FDS").ok();
    let count = count.and_then(|it| it.parse::<u32>().ok()).unwrap_or(0);
    3..3_u32.saturating_add(count)
}

fn open_descriptors() -> io::Result<Vec<Descriptor>> {
    let listed: Vec<_> = fs::read_dir("/proc/self/fd")?.collect::<io::Result<_>>()?;
    // The listing's own is closed by now.
    Ok(listed
        .into_iter()
        .filter_map(|entry| {
            let number = entry.file_name().to_str()?.parse().ok()?;
            Some(Descriptor(number, fs::read_link(entry.path()).ok()?))
        })
        .collect())
}

fn serve(options: Options) -> common::Result {
    // First of all, while nothing else is open and no thread runs.
    let inherited = systemd::inherited()?;
    let settings = RestartSettings::new(&options.directory)
        .inherited(inherited)
        .drain(STOP_DEADLINE)
        .notifier(Notifier::from_environment()?.map(Rc::new));
    let mut reactor = Reactor::new()?;
    // Where systemd asks for it (`WatchdogSec=`), in whichever process serves.
    let _watchdog = settings
        .notifier
        .clone()
        .and_then(|notifier| Watchdog::from_environment(&mut reactor, notifier));
    let shared = Rc::new(Shared {
        restart: RefCell::new(None),
        moves: options.moves,
    });
    // Before anyone can know that we are there: SIGHUP would end us.
    let restarting = Rc::clone(&shared);
    reactor.on_signals(&[Signal::HUP.as_raw()], move |reactor, _| {
        // By its path: a new version may stand there.
        let mut arguments = std::env::args_os();
        let mut command = Command::new(arguments.next().unwrap_or_default());
        command.args(arguments).stdin(process::Stdio::null());
        if let Some(restart) = restarting.restart.borrow().as_ref()
            && let Err(error) = restart.start_successor(reactor, command)
        {
            log::warn!("no restart now: {error}");
        }
    })?;
    // The notifier says so to the service manager.
    reactor.stop_on_signals_with(GracefulStop::new().deadline(STOP_DEADLINE))?;
    let server = Server {
        shared: Rc::clone(&shared),
        options,
    };
    let restart = Restart::begin(&mut reactor, settings, server)?;
    shared.restart.replace(Some(restart));
    let outcome = reactor.run();
    // It owns the server, which would own it for ever.
    shared.restart.take();
    // That it could not start is an error of the run.
    outcome?;
    Ok(())
}

struct Shared {
    restart: RefCell<Option<Restart>>,
    moves: bool,
}

struct Server {
    shared: Rc<Shared>,
    options: Options,
}

impl Server {
    fn lines(&self) -> impl FnMut(&Address) -> Lines + use<> {
        let shared = Rc::clone(&self.shared);
        move |_| Lines::new(&shared, Vec::new())
    }
}

impl Program for Server {
    fn listen(&mut self, reactor: &mut Reactor, listeners: &mut Listeners<'_>) -> io::Result<()> {
        let lines = self.lines();
        // Called once, and the endpoint may have a socket.
        let listen = self
            .options
            .listen
            .take()
            .ok_or(io::ErrorKind::InvalidInput)?;
        let web = listen.listen_among(listeners, reactor, "web", lines)?;
        if let Some(path) = self.options.unix.clone() {
            let local = Unix::at(path).backlog(4096);
            match self.options.tls.clone() {
                Some(tls) => listeners.listen(reactor, "local", local.layer(tls), self.lines())?,
                None => listeners.listen(reactor, "local", local, self.lines())?,
            };
        }
        Inspect::show_among(self.options.inspect.as_ref(), listeners, reactor)?;
        if let Some(listener) = reactor.get(web) {
            // A successor has inherited standard output, whose reader may be gone.
            let _ = writeln!(io::stdout(), "listening on {}", listener.address());
        }
        Ok(())
    }

    fn serving(&mut self, _: &mut Reactor, start: Start) {
        log::info!("process {}: {start:?}", process::id());
    }

    fn successor_failed(&mut self, _: &mut Reactor, error: &RestartError) {
        log::error!("process {}: serving on: {error}", process::id());
    }

    fn takes(&self, kind: &str) -> bool {
        kind == LINES
    }

    /// With TLS, those whose version and suite we have.
    fn takes_layers(&self, _: &str, layers: &[LayerState]) -> bool {
        match (&self.options.tls, layers) {
            (None, []) => true,
            (Some(tls), [state]) => tls.can_resume(state),
            _ => false,
        }
    }

    fn connection_moved(&mut self, reactor: &mut Reactor, moved: Moved) {
        let lines = Lines::new(&self.shared, moved.packed.unread);
        let is_tcp = describe_socket(moved.fd.as_fd())
            .is_ok_and(|socket| matches!(socket.address, Some(Address::Inet(_))));
        let Moved { fd, unsent, .. } = moved;
        let tls = self
            .options
            .tls
            .as_ref()
            .zip(moved.layers.into_iter().next());
        let tls = match tls.map(|(tls, state)| tls.resume(state)).transpose() {
            Ok(tls) => tls,
            Err(error) => return log::warn!("a connection ended on its way: {error}"),
        };
        let error = match (is_tcp, tls) {
            (true, None) => reactor.adopt(Tcp.with_unsent(unsent), fd, lines).err(),
            (false, None) => reactor.adopt(Unix.with_unsent(unsent), fd, lines).err(),
            (true, Some(tls)) => {
                let kind = Tcp.layer(tls).with_unsent(unsent);
                reactor.adopt(kind, fd, lines).err()
            }
            (false, Some(tls)) => {
                let kind = Unix.layer(tls).with_unsent(unsent);
                reactor.adopt(kind, fd, lines).err()
            }
        };
        if let Some(error) = error {
            log::warn!("a connection ended on its way: {error}");
        }
    }
}

const LINES: &str = "lines";

/// One connection.
struct Lines {
    shared: Rc<Shared>,
    /// The beginning of a line that has not arrived whole.
    partial: Vec<u8>,
    ticket: Option<MoveTicket>,
    is_half_closed: bool,
}

impl Lines {
    fn new(shared: &Rc<Shared>, partial: Vec<u8>) -> Self {
        Self {
            shared: Rc::clone(shared),
            partial,
            ticket: None,
            is_half_closed: false,
        }
    }
}

impl<T: StreamTransport> Protocol<T> for Lines {
    fn connection_made(&mut self, cx: &mut Context<'_, T>) {
        if self.shared.moves
            && let Some(restart) = self.shared.restart.borrow().as_ref()
        {
            self.ticket = Some(restart.movable::<T, Self>(cx.transport.handle()));
        }
    }

    fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
        self.partial.extend_from_slice(data);
        let Some(end) = self.partial.iter().rposition(|&byte| byte == b'\n') else {
            if self.partial.len() > MAX_LINE {
                cx.transport.abort_connection();
            }
            return;
        };
        let is_last = cx.reactor.is_stopping();
        let lines: Vec<u8> = self.partial.drain(..=end).collect();
        for line in lines.split_inclusive(|&byte| byte == b'\n') {
            let line = line.strip_suffix(b"\n").unwrap_or(line);
            let by = format!(" {}{}\n", process::id(), if is_last { " bye" } else { "" });
            cx.transport.as_dyn().write_sequence(&[line, by.as_bytes()]);
        }
        if is_last {
            // Whoever reads `bye` says nothing more here.
            cx.transport.lose_connection();
        }
    }

    /// The rest of a line is waited for.
    fn is_idle(&self) -> bool {
        self.partial.is_empty()
    }

    fn read_connection_lost(&mut self, _: &mut Context<'_, T>) -> AfterReadClosed {
        self.is_half_closed = true;
        AfterReadClosed::LoseConnection
    }
}

impl Movable for Lines {
    const KIND: &'static str = LINES;

    fn pack(&mut self) -> Option<Packed> {
        (!self.is_half_closed).then(|| Packed {
            unread: self.partial.clone(),
            ..Packed::default()
        })
    }

    fn unpack(&mut self, _: Packed) {}
}
