//! Restarts: a new process of a program takes over from the old one, and nobody outside
//! notices.
//!
//! The old process, the *predecessor*, serves until its *successor* has everything and says
//! so. Then the listeners change hands, and so do the connections that can [move](Movable).
//! The predecessor ends when its other connections have ended. If anything goes wrong with
//! the successor before, the predecessor goes on as if nothing had happened.
//!
//! A [`Program`] says what it listens on and how it goes on. [`Restart::begin`] finds out
//! whether there is a predecessor. The same code serves a cold start, a start by systemd
//! with sockets ([`RestartSettings::inherited`]), and a take-over.
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
//! If there is a service manager ([`RestartSettings::notifier`]), `done` is sent when it
//! has been told which process is the main one, and `parted` when it has been told that the
//! service is ready. Both wait for room in its queue, for [`RestartSettings::manager`] at
//! the longest.
//!
//! Every step has a deadline ([`RestartSettings`]), and every failure has a defined end.
//! Until `done`, the predecessor can go on, and gets back whatever was not `live`. If the
//! predecessor dies once the successor is ready, the successor serves.
//!
//! If the connection between them breaks and both live, exactly one of them serves,
//! whatever the other has heard. For that, a pipe with one byte in it is sent with the
//! offer, and whoever reads the byte serves. Usually that is a successor that has
//! everything. The predecessor is then told [`handed_over`](Program::handed_over), and
//! serves what has not moved to its end. No connection is served by both.
//!
//! Connections in the queue of a listener belong to nobody until they are accepted. The two
//! processes share the queues, so closing one copy of a listener loses nothing.
//!
//! The connections of a worker pool ([`Listeners::pool`]) move after `done`, from worker to
//! worker; see [there](crate::pool#restarts).
//!
//! There is one successor at a time. Another one is refused ([`Refusal::Busy`]), and looks
//! again.
//!
//! # Processes that start at the same moment
//!
//! If several processes find that nobody serves, one of them gets the control socket and
//! starts cold. The others look again, and take over from it as if they had come later. A
//! process also looks again if
//!
//! - it is refused because another successor is being served,
//! - the process that it has found does not serve yet, or no longer,
//! - it loses that process before it has everything.
//!
//! In the end one process serves, whichever of them fails. The search has a time limit
//! ([`RestartSettings::search`]). A process that has found nobody in that time [says
//! why](RestartError::LookedInVain).
//!
//! # The control socket
//!
//! It is in a directory that only its owner may enter. The directory is made with mode
//! 0700, and is checked. A process that connects has to be of the same user. The control
//! socket is itself handed over, so its path never changes.
//!
//! A process is identified by what the kernel says of the one that connected
//! (`SO_PEERCRED`, and since Linux 6.5 `SO_PEERPIDFD`), and not by its own word. After
//! [`start_successor`](Restart::start_successor), only that child is served until it has
//! taken over or failed. If the process that connected is gone, so that another one has its
//! connection, that one is not served. This is checked again before connections are sent,
//! since some have keys with them.

mod applying;
mod attempt;
mod baton;
pub(crate) mod control;
mod error;
mod handshake;
mod listeners;
pub(crate) mod messages;
pub(crate) mod moving;
pub(crate) mod predecessor;
mod program;
mod search;
mod server;
mod settings;
pub(crate) mod successor;

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::process::Command;
use std::rc::Rc;

use bowline_reactor::{Reactor, Token};
use bowline_transport::endpoint::TransportFor;
use bowline_transport::{ChildProcess, Stays};

pub use self::error::RestartError;
pub use self::listeners::Listeners;
pub use self::messages::Refusal;
use self::moving::MoveList;
pub use self::moving::{Movable, MoveTicket, Moved, Packed};
use self::predecessor::Predecessor;
pub use self::program::{Program, Start};
use self::server::{Life, Server};
pub use self::settings::RestartSettings;
use self::successor::Successor;
use crate::systemd::prepare_successor;

/// A handle of a program's restarts. Clones refer to the same restart.
///
/// # Examples
///
/// An echo server that is replaced by a new process on SIGHUP:
///
/// ```no_run
/// use std::io;
/// use std::process::Command;
///
/// use bowline::handoff::restart::{Listeners, Program, Restart, RestartSettings};
/// use bowline::{Address, Context, Protocol, Reactor, Tcp, Transport};
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
/// reactor.on_signals(&[bowline::signal::SIGHUP], move |reactor, _| {
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
    server: Rc<Server>,
    predecessor: Rc<Predecessor>,
}

impl Restart {
    /// Begins: takes over from the process that serves, or starts cold if there is none. It
    /// calls nothing of `program` before it returns.
    ///
    /// It owns `program`. If `program` keeps a `Restart`, for use in its callbacks, it has
    /// to drop that in the end, or neither is ever freed.
    ///
    /// # Errors
    ///
    /// Those of making the directory. `PermissionDenied` if the directory belongs to
    /// another user, or if others may enter it.
    pub fn begin(
        reactor: &mut Reactor,
        mut settings: RestartSettings,
        program: impl Program,
    ) -> io::Result<Self> {
        settings.control.prepare(&settings)?;
        if let Some(notifier) = &settings.notifier {
            notifier.attach(reactor)?;
            notifier.is_not_main();
        }
        let inherited = std::mem::take(&mut settings.inherited);
        let server = Rc::new(Server::new(settings, program));
        let this = Self {
            predecessor: Rc::new(Predecessor::new(Rc::clone(&server))),
            server,
        };
        Successor::begin(reactor, this.clone(), inherited)?;
        let seen = Rc::downgrade(&this.server);
        reactor.add_part(move |description| {
            seen.upgrade()?.describe(description);
            Some(())
        });
        Ok(this)
    }

    /// Starts `command` as the successor. Usually it is this program in its present
    /// version. The outcome is told to [`Program`].
    ///
    /// Variables that are meant for this process are removed from its environment, unless
    /// `command` sets them. They are `LISTEN_FDS` and its companions, and a `WATCHDOG_PID`
    /// that names this process, or one that it has taken over from.
    ///
    /// # Errors
    ///
    /// [`RestartError::Busy`] while another successor is being served, or was started and
    /// has not ended. [`RestartError::NotServing`]. [`RestartError::Spawn`].
    pub fn start_successor(
        &self,
        reactor: &mut Reactor,
        mut command: Command,
    ) -> Result<(), RestartError> {
        let notifier = self.server.settings.notifier.as_ref();
        prepare_successor(&mut command, notifier.and_then(|it| it.watched()));
        self.start_successor_with(reactor, || Ok(Box::new(command.spawn()?)))
    }

    /// As [`start_successor`](Self::start_successor), for a process that is started in
    /// another way: in a container, by a helper, in a simulation. `start` is called if
    /// there may be a successor now.
    ///
    /// # Errors
    ///
    /// As [`start_successor`](Self::start_successor). [`RestartError::Spawn`] has the error
    /// of `start`.
    pub fn start_successor_with(
        &self,
        reactor: &mut Reactor,
        start: impl FnOnce() -> io::Result<Box<dyn ChildProcess>>,
    ) -> Result<(), RestartError> {
        self.predecessor.start_child(reactor, start)
    }

    /// Puts a connection on the list of those that move to a successor. Call this when the
    /// connection is made, and keep the ticket in its protocol. `T` is the type of its
    /// transport, and `P` that of its protocol.
    pub fn movable<T: TransportFor<P>, P: Movable>(&self, handle: impl Into<Token>) -> MoveTicket {
        MoveList::add::<T, P>(&self.server.list, handle.into())
    }

    /// Whether this process serves: it was started, and has not handed over.
    pub fn is_serving(&self) -> bool {
        self.server.life.get() == Life::Serving
    }

    /// Whether everything was handed over to a successor.
    pub fn has_handed_over(&self) -> bool {
        self.server.life.get() == Life::HandedOver
    }

    /// Whether a successor is being started or served.
    pub fn is_under_way(&self) -> bool {
        self.predecessor.is_under_way()
    }

    /// Returns how many successors have failed: they could not be started, ended, hung,
    /// gave up or were refused.
    pub fn successors_failed(&self) -> u64 {
        self.predecessor.failed()
    }

    /// Returns how often this process has looked for a predecessor. Usually it looks once.
    pub fn looks(&self) -> u32 {
        self.server.looks.get()
    }

    /// Returns how many connections were to move from here and stayed, by reason. They are
    /// served to their end. A connection that is looked at again, for another successor,
    /// counts again.
    pub fn connections_stayed(&self) -> BTreeMap<Stays, usize> {
        self.server.list.borrow().stayed()
    }

    /// Returns how many live connections have moved, to this process or from it.
    pub fn connections_moved(&self) -> usize {
        self.server.moved.get()
    }
}

impl fmt::Debug for Restart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Restart")
            .field("role", &self.server.life.get())
            .field("is_under_way", &self.is_under_way())
            .finish_non_exhaustive()
    }
}
