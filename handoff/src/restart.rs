//! A new process of a program takes over from the old one, and nobody outside
//! notices.
//!
//! The old process, the *predecessor*, goes on serving until its *successor*
//! has everything and says so; then the listeners change hands, the
//! connections that can [move](Movable) do, and the predecessor ends when the
//! others have. If anything goes wrong with the successor before, the
//! predecessor goes on as if nothing had happened.
//!
//! A program says what it listens on and how it goes on, as a [`Program`];
//! [`Restart::begin`] finds out whether there is a predecessor. The same code
//! serves a cold start, a start by systemd with sockets
//! ([`RestartSettings::inherited`]), and a take-over.
//!
//! # How it goes
//!
//! ```text
//! predecessor                            successor
//!  serves                                 starts, connects to the control socket
//!  checks who it is          <- take      or starts cold, where nobody listens
//!  offer, listeners          ->           keeps them, by name
//!                            <- taken     (253 listeners at a time)
//!                                         Program::listen: adopts, then binds
//!  serves                    <- ready     has turned its loop once
//!  detaches, connections     ->           keeps them           (64 at a time)
//!  go                        <- prepared  says which it refuses
//!  forgets its copies        <- live      puts protocols on them
//!  stops accepting, commit   ->           accepts; owns the socket files
//!                            <- serving
//!  (connections that came meanwhile, as before)
//!  done                      ->           Program::serving
//!  closes its listeners
//!                            <- parted    the service manager knows that it serves
//!  Program::handed_over
//! ```
//!
//! Where there is a service manager ([`RestartSettings::notifier`]), `done` is said when
//! it has been told who is the main process, and `parted` when it has been told that the
//! service is ready. Both wait for room in its queue, for
//! [`RestartSettings::manager`] at the longest.
//!
//! Every step has a deadline ([`RestartSettings`]), and every failure an end:
//! until `done` the predecessor can go on, and has back whatever was not
//! `live`. A successor whose predecessor dies once it is ready serves. Where a
//! channel breaks, and both live, what was on its way is left to the successor: it
//! may have gone on already, and a connection must not go on twice. (A successor that
//! was started here is killed then, and those connections end with it.)
//!
//! What waits in the queues of the listeners is nobody's until it is accepted:
//! the two share them, and closing one's own copy loses nothing.
//!
//! One successor at a time: another is refused ([`Refusal::Busy`]).
//!
//! # The control socket
//!
//! It stands in a directory that only its owner may enter, which is made with
//! mode 0700 and checked; who connects has to be of the same user. It is itself
//! handed over, so its path never changes.

mod control;
mod handshake;
mod messages;
mod moving;
mod predecessor;
mod successor;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::error::Error;
use std::fmt;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::rc::Rc;
use std::time::Duration;

use bowline_protocol::{Acceptor, Factory, ListenerHandle, SocketFile, TransportHandle};
use bowline_reactor::{GracefulStop, Reactor};
use bowline_transport::endpoint::{ListenAt, ListenTransport};
#[cfg(feature = "testing")]
use bowline_transport::testing::SimulatedKernel;
use bowline_transport::{ChildProcess, ChildWatch, StreamTransport, Transports, effective_user};

use self::handshake::Patience;
pub use self::messages::Refusal;
use self::moving::List;
pub use self::moving::{Movable, MoveTicket, Moved, Packed};
use self::predecessor::Offer;
use self::successor::TakeOver;
use crate::inherited::Inherited;
use crate::log;
use crate::systemd::{Notice, Notifier, prepare_successor};

/// The name of the control socket, as a file and among the listeners.
const CONTROL: &str = "control";

/// How often a child is asked whether it has ended, where the kernel does not tell.
const REAP_EVERY: Duration = Duration::from_millis(20);
/// How often once it serves.
const REAP_AT_LEISURE: Duration = Duration::from_secs(1);

/// A program that can be restarted while it serves.
///
/// As with all callbacks, none of these is called from inside another.
pub trait Program: 'static {
    /// Listens on everything that the program serves, through `listeners`:
    /// what a predecessor or systemd had is adopted, by name, the rest bound.
    /// Nothing is accepted before it returned `Ok` and, after a predecessor,
    /// before that has stopped accepting.
    ///
    /// Called once.
    ///
    /// # Errors
    ///
    /// Those of listening; the program [is not started](Self::not_started)
    /// then, and a predecessor goes on.
    fn listen(&mut self, reactor: &mut Reactor, listeners: &mut Listeners<'_>) -> io::Result<()>;

    /// The program serves, and alone: it was started cold, or its predecessor
    /// has handed over everything. Called once.
    fn serving(&mut self, reactor: &mut Reactor, start: Start) {
        let _ = (reactor, start);
    }

    /// The program is not going to serve, since it could not listen or take
    /// over. Called once, instead of [`serving`](Self::serving), after the error
    /// was logged. By default the reactor [fails](Reactor::fail): it stops, and
    /// [`run`](Reactor::run) answers the error.
    fn not_started(&mut self, reactor: &mut Reactor, error: &RestartError) {
        reactor.fail(error.to_io());
    }

    /// A successor did not make it, and this process serves as before. Called
    /// once for each that was started or had asked, after the error was logged,
    /// and [counted](Restart::successors_failed).
    fn successor_failed(&mut self, reactor: &mut Reactor, error: &RestartError) {
        let _ = (reactor, error);
    }

    /// The service manager did not take a notice within
    /// [`RestartSettings::manager`], which it has to know of a restart; the restart goes
    /// on without. It is still sent, if there is room while this process lives. Logged
    /// at `error`. By default nothing happens.
    fn manager_not_told(&mut self, reactor: &mut Reactor, error: &RestartError) {
        let _ = (reactor, error);
    }

    /// Everything was handed over: no connection comes any more, and those that
    /// are left here are to be served to their end, within
    /// [`RestartSettings::drain`]. Called once. By default the reactor
    /// [stops gracefully](Reactor::stop_gracefully): each connection is told to
    /// [drain](bowline_protocol::Protocol::draining). When `within` has passed the
    /// reactor [stops](Reactor::stop_now) in any case.
    fn handed_over(&mut self, reactor: &mut Reactor, within: Duration) {
        // An error says that it has stopped already.
        let _ = reactor.stop_gracefully(GracefulStop::new().deadline(within));
    }

    /// Whether connections of a [kind](Movable::KIND) can be taken over; by
    /// default none can.
    fn takes(&self, kind: &str) -> bool {
        let _ = kind;
        false
    }

    /// A connection has moved here, of a kind that it [takes](Self::takes): to
    /// be adopted, with its state.
    fn connection_moved(&mut self, reactor: &mut Reactor, moved: Moved) {
        let _ = (reactor, moved);
    }
}

/// How a program came to serve.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Start {
    /// Nobody served before, or nobody who handed over.
    Cold,
    /// It took over from the process of this number.
    TookOver {
        /// The predecessor, as it said.
        pid: u32,
        /// How many live connections moved here.
        connections: usize,
    },
}

/// How a program is restarted.
#[derive(Debug)]
#[non_exhaustive]
pub struct RestartSettings {
    /// The directory of the control socket, for this program alone: made if it
    /// is not there.
    pub directory: PathBuf,
    /// What the states of moved connections look like, in numbers of the
    /// program's own: a predecessor of another format refuses. Default 0.
    pub format: u32,
    /// How long one answer of the other process may take, its greeting included;
    /// default 10 s.
    pub answer: Duration,
    /// How long a successor that was started may take until it asks to take
    /// over; default 30 s.
    pub start: Duration,
    /// How long a successor may take until it is ready; default 60 s.
    pub ready: Duration,
    /// How long the connections that stay with the predecessor have until they
    /// are cut; default 30 s.
    pub drain: Duration,
    /// How long the service manager may take until it has room for a notice that a
    /// restart waits for: a predecessor does not end before its manager knows who is the
    /// main process, and that it is ready. Default 30 s;
    /// [told](Program::manager_not_told) when it has passed.
    pub manager: Duration,
    /// Descriptors from elsewhere, systemd above all, that
    /// [`Program::listen`] may claim too.
    pub inherited: Inherited,
    /// Feature `testing`: the processes find each other on this simulated kernel,
    /// under the name of the directory, which is not made. What the program listens
    /// on is there too.
    #[cfg(feature = "testing")]
    pub kernel: Option<SimulatedKernel>,
    /// The service manager, to be told of restarts: `RELOADING` when a
    /// successor is started, `READY` when one of the two serves, `MAINPID`
    /// when it is the new one.
    pub notifier: Option<Rc<Notifier>>,
}

bowline_reactor::setters!(RestartSettings {
    directory: PathBuf,
    format: u32,
    answer: Duration,
    start: Duration,
    ready: Duration,
    drain: Duration,
    manager: Duration,
    inherited: Inherited,
    notifier: Option<Rc<Notifier>>,
});

#[cfg(feature = "testing")]
bowline_reactor::setters!(RestartSettings { kernel: Option<SimulatedKernel> });

impl RestartSettings {
    /// The defaults, with the control socket in `directory`.
    pub fn new(directory: impl Into<PathBuf>) -> Self {
        Self {
            directory: directory.into(),
            format: 0,
            answer: Duration::from_secs(10),
            start: Duration::from_secs(30),
            ready: Duration::from_secs(60),
            drain: Duration::from_secs(30),
            manager: Duration::from_secs(30),
            inherited: Inherited::new(),
            #[cfg(feature = "testing")]
            kernel: None,
            notifier: None,
        }
    }

    fn patience(&self) -> Patience {
        Patience {
            answer: self.answer,
            ready: self.ready,
            manager: self.manager,
        }
    }
}

/// Why a take-over did not happen.
#[derive(Debug)]
#[non_exhaustive]
pub enum RestartError {
    /// Another successor is being served.
    Busy,
    /// This process does not serve: it starts, or has handed over.
    NotServing,
    /// The successor could not be started.
    Spawn(io::Error),
    /// The successor has ended, with or without success, before it took over.
    Exited(ExitStatus),
    /// The other process did not take the next step in time.
    TimedOut,
    /// The other process is gone.
    Lost,
    /// The other process gave up.
    GaveUp,
    /// The predecessor does not want this successor.
    Refused(Refusal),
    /// The program could not listen.
    Listen(io::Error),
    /// The control socket could not be had.
    Control(io::Error),
    /// The service manager did not take a notice.
    Manager(io::Error),
}

impl RestartError {
    /// The same as an error of the system's kind, with all that this one says.
    fn to_io(&self) -> io::Error {
        let kind = match self {
            Self::Spawn(error)
            | Self::Listen(error)
            | Self::Control(error)
            | Self::Manager(error) => error.kind(),
            Self::TimedOut => io::ErrorKind::TimedOut,
            _ => io::ErrorKind::Other,
        };
        io::Error::new(kind, self.to_string())
    }
}

impl fmt::Display for RestartError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Busy => f.write_str("another successor is being served"),
            Self::NotServing => f.write_str("this process does not serve"),
            Self::Spawn(error) => write!(f, "cannot start the successor: {error}"),
            Self::Exited(status) => write!(f, "successor ended before it took over: {status}"),
            Self::TimedOut => f.write_str("the other process took too long"),
            Self::Lost => f.write_str("the other process is gone"),
            Self::GaveUp => f.write_str("the other process gave up"),
            Self::Refused(Refusal::Busy) => f.write_str("predecessor serves another successor"),
            Self::Refused(Refusal::Format) => f.write_str("predecessor is of another format"),
            Self::Refused(Refusal::NotServing) => f.write_str("predecessor does not serve"),
            Self::Listen(error) => write!(f, "cannot listen: {error}"),
            Self::Control(error) => write!(f, "cannot have the control socket: {error}"),
            Self::Manager(error) => write!(f, "cannot tell the service manager: {error}"),
        }
    }
}

impl Error for RestartError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::Spawn(error)
            | Self::Listen(error)
            | Self::Control(error)
            | Self::Manager(error) => Some(error),
            _ => None,
        }
    }
}

/// What a running program does about its own restart; copies are of the same
/// one.
///
/// # Examples
///
/// An echo server that is replaced by a new process on SIGHUP:
///
/// ```no_run
/// use std::io;
/// use std::process::Command;
///
/// use bowline_handoff::restart::{Listeners, Program, Restart, RestartSettings};
/// use bowline_protocol::{Address, Context, Protocol, Transport};
/// use bowline_reactor::Reactor;
/// use bowline_transport::Tcp;
///
/// struct Echo;
///
/// impl<T: Transport> Protocol<T> for Echo {
///     fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
///         cx.transport.write(data);
///     }
/// }
///
/// struct Server;
///
/// impl Program for Server {
///     fn listen(&mut self, reactor: &mut Reactor, listeners: &mut Listeners<'_>) -> io::Result<()> {
///         let address = ([127, 0, 0, 1], 7007).into();
///         listeners.listen(reactor, "echo", Tcp::at(address), |_: &Address| Echo)?;
///         Ok(())
///     }
/// }
///
/// let mut reactor = Reactor::new()?;
/// let settings = RestartSettings::new("/run/echo");
/// let restart = Restart::begin(&mut reactor, settings, Server)?;
/// # #[cfg(any())]
/// reactor.on_signals(&[bowline_reactor::signal::SIGHUP], move |reactor, _| {
///     let program = Command::new("/proc/self/exe");
///     if let Err(error) = restart.start_successor(reactor, program) {
///         eprintln!("{error}");
///     }
/// })?;
/// reactor.run()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct Restart {
    shared: Rc<Shared>,
}

struct Shared {
    settings: RestartSettings,
    program: RefCell<Box<dyn Program>>,
    state: RefCell<State>,
    list: Rc<RefCell<List>>,
}

struct State {
    role: Role,
    listeners: Vec<Named>,
    /// Connections to the control socket.
    offers: BTreeMap<u64, Offer>,
    next_offer: u64,
    /// The one of them that is served.
    attempt: Option<u64>,
    /// The successor that was started here, until it has ended.
    child: Option<Started>,
    take_over: Option<TakeOver>,
    inherited: Inherited,
    /// How many connections have moved, from here or to here.
    moved: usize,
    /// How many successors did not make it.
    failed: u64,
    /// The program listens.
    is_listening: bool,
}

/// What this process is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Starting,
    Serving,
    HandedOver,
}

/// A listener by its name.
struct Named {
    name: String,
    handle: ListenerHandle,
    /// The file that it owned, or is going to own.
    file: Option<SocketFile>,
    /// Whether we keep it from accepting.
    is_held: bool,
}

struct Started {
    process: ChildWatch,
    /// Whether it has asked to take over.
    has_asked: bool,
    /// Why it failed; told when it has ended, so that the next may be started.
    failure: Option<RestartError>,
    serial: u64,
}

impl Restart {
    /// Begins: takes over from the process that serves, if there is one, or
    /// starts cold. Calls nothing of `program` before it returns.
    ///
    /// It owns `program`: one that keeps a `Restart` of its own, to be asked in
    /// its callbacks, has to let go of it in the end, or neither is ever freed.
    ///
    /// # Errors
    ///
    /// Those of making the directory; `PermissionDenied` where it is another
    /// user's, or others may enter it.
    pub fn begin(
        reactor: &mut Reactor,
        mut settings: RestartSettings,
        program: impl Program,
    ) -> io::Result<Self> {
        control::prepare(&settings)?;
        if let Some(notifier) = &settings.notifier {
            notifier.attach(reactor)?;
            notifier.is_not_main();
        }
        let inherited = std::mem::take(&mut settings.inherited);
        let this = Self {
            shared: Rc::new(Shared {
                settings,
                program: RefCell::new(Box::new(program)),
                state: RefCell::new(State {
                    role: Role::Starting,
                    listeners: Vec::new(),
                    offers: BTreeMap::new(),
                    next_offer: 0,
                    attempt: None,
                    child: None,
                    take_over: None,
                    inherited,
                    moved: 0,
                    failed: 0,
                    is_listening: false,
                }),
                list: Rc::default(),
            }),
        };
        successor::connect(reactor, &this, successor::LOOK_AGAIN)?;
        Ok(this)
    }

    /// Starts `command` as the successor: this program, as a rule, in its
    /// present version. What becomes of it is told to [`Program`].
    ///
    /// Variables that are for this process are left out of its environment, unless
    /// `command` sets them: `LISTEN_FDS` and its companions, and a `WATCHDOG_PID` that
    /// names this one, or one that it has taken over from.
    ///
    /// # Errors
    ///
    /// [`RestartError::Busy`] while another one is being served or was started
    /// and has not ended; [`RestartError::NotServing`]; [`RestartError::Spawn`].
    pub fn start_successor(
        &self,
        reactor: &mut Reactor,
        mut command: Command,
    ) -> Result<(), RestartError> {
        let notifier = self.shared.settings.notifier.as_ref();
        prepare_successor(&mut command, notifier.and_then(|it| it.watched()));
        self.start_successor_with(reactor, || Ok(Box::new(command.spawn()?)))
    }

    /// As [`start_successor`](Self::start_successor), for a process that is started
    /// in another way: in a container, by a helper, in a simulation. `start` is
    /// called if there may be a successor now.
    ///
    /// # Errors
    ///
    /// As [`start_successor`](Self::start_successor); [`RestartError::Spawn`] is the
    /// error of `start`.
    pub fn start_successor_with(
        &self,
        reactor: &mut Reactor,
        start: impl FnOnce() -> io::Result<Box<dyn ChildProcess>>,
    ) -> Result<(), RestartError> {
        {
            let state = self.shared.state.borrow();
            if state.role != Role::Serving {
                return Err(RestartError::NotServing);
            }
            if state.attempt.is_some() || state.child.is_some() {
                return Err(RestartError::Busy);
            }
        }
        let process = match start() {
            Ok(process) => process,
            Err(error) => {
                self.shared.state.borrow_mut().failed += 1;
                log::error!(target: log::HANDOFF, "cannot start the successor: {error}");
                return Err(RestartError::Spawn(error));
            }
        };
        log::debug!(target: log::HANDOFF, "started successor {}", process.pid());
        self.tell_manager(&Notice::new().reloading());
        // It is owned by what this belongs to.
        let shared = Rc::downgrade(&self.shared);
        let process = ChildWatch::start(reactor, process, move |reactor, status| {
            if let Some(shared) = shared.upgrade() {
                Self { shared }.child_ended(reactor, status);
            }
        });
        process.look_every(reactor, REAP_EVERY);
        let serial = {
            let mut state = self.shared.state.borrow_mut();
            let serial = state.next_offer;
            state.next_offer += 1;
            state.child = Some(Started {
                process,
                has_asked: false,
                failure: None,
                serial,
            });
            serial
        };
        let this = self.clone();
        reactor.call_later(self.shared.settings.start, move |reactor| {
            this.start_timed_out(reactor, serial);
        });
        Ok(())
    }

    /// Puts a connection on the list of those that move to a successor; the
    /// ticket is to be kept in its protocol. To be called when it is made.
    pub fn movable<T: StreamTransport, P: Movable<T>>(
        &self,
        handle: TransportHandle,
    ) -> MoveTicket {
        List::add::<T, P>(&self.shared.list, handle)
    }

    /// Whether this process serves: started, and has not handed over.
    pub fn is_serving(&self) -> bool {
        self.shared.state.borrow().role == Role::Serving
    }

    /// Whether everything was handed over to a successor.
    pub fn has_handed_over(&self) -> bool {
        self.shared.state.borrow().role == Role::HandedOver
    }

    /// Whether a successor is being started or served.
    pub fn is_under_way(&self) -> bool {
        let state = self.shared.state.borrow();
        state.attempt.is_some() || state.child.is_some()
    }

    /// How many successors did not make it: could not be started, ended, hung,
    /// gave up or were refused.
    pub fn successors_failed(&self) -> u64 {
        self.shared.state.borrow().failed
    }

    /// How many live connections have moved, to this process or from it.
    pub fn connections_moved(&self) -> usize {
        self.shared.state.borrow().moved
    }

    fn control_path(&self) -> PathBuf {
        self.shared.settings.directory.join(CONTROL)
    }

    fn tell_manager(&self, notice: &Notice) {
        if let Some(notifier) = &self.shared.settings.notifier
            && let Err(error) = notifier.tell(notice)
        {
            log::warn!(target: log::HANDOFF, "the service manager was not told: {error}");
        }
    }

    /// Tells the service manager and does what comes after that: when the notice has
    /// left, or cannot be waited for any longer. Answers its number, if there is one.
    fn tell_manager_then(
        &self,
        reactor: &mut Reactor,
        notice: &Notice,
        then: impl FnOnce(&Self, &mut Reactor) + 'static,
    ) -> Option<u64> {
        let Some(notifier) = &self.shared.settings.notifier else {
            then(self, reactor);
            return None;
        };
        let number = match notifier.tell(notice) {
            Ok(number) => number,
            Err(error) => {
                self.manager_not_told(reactor, error);
                then(self, reactor);
                return None;
            }
        };
        let this = self.clone();
        let limit = self.shared.settings.manager;
        notifier.when_left(reactor, number, limit, move |reactor, result| {
            if let Err(error) = result {
                this.manager_not_told(reactor, error);
            }
            then(&this, reactor);
        });
        Some(number)
    }

    fn manager_not_told(&self, reactor: &mut Reactor, error: io::Error) {
        log::error!(target: log::HANDOFF, "the service manager does not know of the restart: {error}");
        let error = RestartError::Manager(error);
        self.call_program(reactor, move |program, reactor| {
            program.manager_not_told(reactor, &error);
        });
    }

    /// Calls the program when no callback runs.
    fn call_program(
        &self,
        reactor: &mut Reactor,
        call: impl FnOnce(&mut dyn Program, &mut Reactor) + 'static,
    ) {
        let shared = Rc::clone(&self.shared);
        reactor.defer(move |reactor| call(&mut **shared.program.borrow_mut(), reactor));
    }

    // Starting.

    /// Nobody serves.
    fn start_cold(&self, reactor: &mut Reactor) {
        // First of all: of two that start cold, one has to give way.
        match control::listen(reactor, self) {
            Ok(handle) => self.add_listener(reactor, CONTROL, handle),
            Err(error) => {
                return self.not_started(reactor, RestartError::Control(error));
            }
        }
        let inherited = std::mem::take(&mut self.shared.state.borrow_mut().inherited);
        match self.listen(reactor, inherited, Vec::new()) {
            Ok(()) => self.serve(reactor, Start::Cold),
            Err(error) => self.listen_failed(reactor, error),
        }
    }

    /// Has the program listen, on what was inherited where it can. Nothing is
    /// accepted before [`accept`](Self::accept).
    fn listen(
        &self,
        reactor: &mut Reactor,
        inherited: Inherited,
        files: Vec<(String, SocketFile)>,
    ) -> io::Result<()> {
        let mut listeners = Listeners {
            restart: self,
            inherited,
            files,
        };
        // The next thing that happens, if the program panics.
        self.shared.state.borrow_mut().is_listening = true;
        let this = self.clone();
        reactor.defer(move |reactor| {
            if std::mem::take(&mut this.shared.state.borrow_mut().is_listening) {
                this.listen_failed(reactor, io::Error::other("it panicked"));
            }
        });
        let result = self
            .shared
            .program
            .borrow_mut()
            .listen(reactor, &mut listeners);
        self.shared.state.borrow_mut().is_listening = false;
        // What is not claimed is reported now.
        drop(listeners);
        result
    }

    fn listen_failed(&self, reactor: &mut Reactor, error: io::Error) {
        self.tell_predecessor_of_failure(reactor);
        self.not_started(reactor, RestartError::Listen(error));
    }

    fn add_listener(&self, reactor: &mut Reactor, name: &str, handle: ListenerHandle) {
        let file = reactor.get(handle).and_then(|listener| {
            listener.hold_accepting();
            listener.socket_file()
        });
        self.shared.state.borrow_mut().listeners.push(Named {
            name: name.to_owned(),
            handle,
            file,
            is_held: true,
        });
    }

    /// Accepts on all listeners, and owns their files.
    fn accept(&self, reactor: &mut Reactor) {
        for named in &mut self.shared.state.borrow_mut().listeners {
            let Some(listener) = reactor.get(named.handle) else {
                continue;
            };
            if std::mem::take(&mut named.is_held) {
                listener.release_accepting();
            }
            if let Some(file) = named.file
                && listener.socket_file().is_none()
                && let Err(error) = listener.own_socket_file(file)
            {
                log::warn!(
                    target: log::HANDOFF,
                    "{}: the file of {:?} is another's by now: {error}",
                    listener.address(),
                    named.name
                );
            }
        }
    }

    /// Accepts on none, and leaves the files to whoever has the listeners now.
    fn withdraw(&self, reactor: &mut Reactor) {
        for named in &mut self.shared.state.borrow_mut().listeners {
            if let Some(listener) = reactor.get(named.handle) {
                if !std::mem::replace(&mut named.is_held, true) {
                    listener.hold_accepting();
                }
                if let Some(file) = listener.socket_file() {
                    named.file = Some(file);
                    listener.disown_socket_file();
                }
            }
        }
    }

    /// The program serves, alone.
    fn serve(&self, reactor: &mut Reactor, start: Start) {
        self.shared.state.borrow_mut().role = Role::Serving;
        self.accept(reactor);
        self.tell_manager_then(reactor, &Notice::new().ready(), Self::part);
        if let Some(notifier) = &self.shared.settings.notifier {
            notifier.becomes_main(reactor, &self.heir_of());
        }
        self.call_program(reactor, move |program, reactor| {
            program.serving(reactor, start);
        });
    }

    fn not_started(&self, reactor: &mut Reactor, error: RestartError) {
        log::error!(target: log::HANDOFF, "not started: {error}");
        let (listeners, inherited) = {
            let mut state = self.shared.state.borrow_mut();
            let received = state.take_over.as_mut().map(TakeOver::let_go);
            let elsewhere = std::mem::take(&mut state.inherited);
            let listeners = std::mem::take(&mut state.listeners);
            (listeners, (received, elsewhere))
        };
        // Nobody is going to claim them.
        drop(inherited);
        for named in listeners {
            if let Some(listener) = reactor.get(named.handle) {
                listener.stop_listening();
            }
        }
        self.call_program(reactor, move |program, reactor| {
            program.not_started(reactor, &error);
        });
    }

    // Handing over.

    /// The listeners are the successor's, and what waits in their queues with them.
    fn close_listeners(&self, reactor: &mut Reactor) {
        let listeners = {
            let mut state = self.shared.state.borrow_mut();
            state.role = Role::HandedOver;
            if let Some(child) = &state.child {
                // It is on its own now, and may live for long.
                child.process.look_every(reactor, REAP_AT_LEISURE);
            }
            std::mem::take(&mut state.listeners)
        };
        for named in listeners {
            if let Some(listener) = reactor.get(named.handle) {
                listener.stop_listening();
            }
        }
    }

    /// Nothing is left to be done but to serve what stays.
    fn leave(&self, reactor: &mut Reactor) {
        let within = self.shared.settings.drain;
        self.call_program(reactor, move |program, reactor| {
            program.handed_over(reactor, within);
        });
        reactor.call_later(within, |reactor| {
            // An error says that it has stopped by itself.
            let _ = reactor.stop_now();
        });
    }

    // The child.

    fn start_timed_out(&self, reactor: &mut Reactor, serial: u64) {
        let is_late = {
            let state = self.shared.state.borrow();
            let child = state.child.as_ref();
            child.is_some_and(|child| child.serial == serial && !child.has_asked)
        };
        if is_late {
            self.attempt_failed(reactor, RestartError::TimedOut);
        }
    }

    /// The successor did not make it: this process goes on. The program is told
    /// when nothing is left of it.
    fn attempt_failed(&self, reactor: &mut Reactor, error: RestartError) {
        {
            let mut state = self.shared.state.borrow_mut();
            state.attempt = None;
            if let Some(child) = &mut state.child {
                // Whatever state it is in.
                let _ = child.process.kill();
                child.failure.get_or_insert(error);
                return;
            }
        }
        self.tell_of_failure(reactor, error);
    }

    fn tell_of_failure(&self, reactor: &mut Reactor, error: RestartError) {
        log::error!(target: log::HANDOFF, "successor failed, serving on: {error}");
        self.shared.state.borrow_mut().failed += 1;
        self.tell_manager(&Notice::new().ready());
        self.call_program(reactor, move |program, reactor| {
            program.successor_failed(reactor, &error);
        });
    }

    /// The child is reaped, be it after we have handed over: it may hand over itself and
    /// end while we still serve what is left here, and is ours alone to wait for.
    fn child_ended(&self, reactor: &mut Reactor, status: io::Result<ExitStatus>) {
        let child = self.shared.state.borrow_mut().child.take();
        let Some(child) = child else { return };
        match (child.failure, status) {
            (Some(error), _) => self.tell_of_failure(reactor, error),
            // Its channel tells what it was for.
            _ if child.has_asked => {}
            (None, Ok(status)) => {
                self.tell_of_failure(reactor, RestartError::Exited(status));
            }
            (None, Err(error)) => {
                // Somebody else has waited for it, or children are not waited for.
                log::warn!(target: log::HANDOFF, "how the successor ended: {error}");
                self.tell_of_failure(reactor, RestartError::Lost);
            }
        }
    }
}

impl fmt::Debug for Restart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.shared.state.borrow();
        f.debug_struct("Restart")
            .field("role", &state.role)
            .field("is_under_way", &state.attempt.is_some())
            .finish_non_exhaustive()
    }
}

/// Makes the directory with mode 0700, or checks that it is one like that.
fn private_directory(path: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        result => result?,
    }
    let found = fs::symlink_metadata(path)?;
    if !found.is_dir() || found.uid() != effective_user() || found.mode() & 0o077 != 0 {
        return Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            "the directory of the control socket has to be ours and ours alone",
        ));
    }
    Ok(())
}

/// What a program listens on: adopted by name, or bound.
///
/// Each listener has a name of its own, by which a successor finds it; a
/// listener of that name at another address is not adopted, and is reported.
pub struct Listeners<'a> {
    restart: &'a Restart,
    inherited: Inherited,
    files: Vec<(String, SocketFile)>,
}

impl Listeners<'_> {
    /// The restart that this is part of, for [`Restart::movable`].
    pub fn restart(&self) -> &Restart {
        self.restart
    }

    /// What was inherited and not claimed yet.
    pub fn inherited(&mut self) -> &mut Inherited {
        &mut self.inherited
    }

    /// Listens at an endpoint, [`Tcp::at`](bowline_transport::Tcp::at) say, and serves
    /// whoever connects with the protocols of a factory.
    ///
    /// Port 0 adopts whatever port the listener of that name had. The file of a UNIX
    /// socket passes from one process to the next with the listener, and is removed by
    /// whoever serves last. On a simulated kernel, the address is `name`.
    ///
    /// # Errors
    ///
    /// Those of listening and adopting; `AlreadyExists` for a name that is
    /// taken, `InvalidInput` beyond 16,191 of them.
    pub fn listen<E: ListenAt>(
        &mut self,
        reactor: &mut Reactor,
        name: &str,
        endpoint: E,
        factory: impl Factory<ListenTransport<E>>,
    ) -> io::Result<ListenerHandle> {
        self.check_name(name)?;
        let handle = match self.inherited.claim_listener(name, &endpoint.address()) {
            Some(fd) => reactor.listen(endpoint.on(fd), factory)?,
            None => reactor.listen(endpoint, factory)?,
        };
        Ok(self.add(reactor, name, handle))
    }

    /// Listens for an acceptor, a worker pool say; see
    /// [`Transports::accept`].
    ///
    /// # Errors
    ///
    /// As [`listen`](Self::listen).
    pub fn accept(
        &mut self,
        reactor: &mut Reactor,
        name: &str,
        endpoint: impl ListenAt,
        acceptor: impl Acceptor,
    ) -> io::Result<ListenerHandle> {
        self.check_name(name)?;
        let handle = match self.inherited.claim_listener(name, &endpoint.address()) {
            Some(fd) => reactor.accept(endpoint.on(fd), acceptor)?,
            None => reactor.accept(endpoint, acceptor)?,
        };
        Ok(self.add(reactor, name, handle))
    }

    fn check_name(&self, name: &str) -> io::Result<()> {
        let state = self.restart.shared.state.borrow();
        if name == CONTROL || state.listeners.iter().any(|named| named.name == name) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        if handshake::batches(state.listeners.len() + 1).is_none() {
            let text = "more listeners than can be handed over";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        Ok(())
    }

    fn add(&self, reactor: &mut Reactor, name: &str, handle: ListenerHandle) -> ListenerHandle {
        self.restart.add_listener(reactor, name, handle);
        if let Some((_, file)) = self.files.iter().find(|(of, _)| of == name)
            && let Some(named) = self.restart.shared.state.borrow_mut().listeners.last_mut()
            && named.file.is_none()
        {
            // To be owned when the predecessor has let go of it.
            named.file = Some(*file);
        }
        handle
    }
}

impl fmt::Debug for Listeners<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Listeners")
            .field("inherited", &self.inherited)
            .finish_non_exhaustive()
    }
}
