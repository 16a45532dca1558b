//! Processes that were started here, and notices of their exit.

mod command;
mod error;
mod output;
mod pidfd;
mod process;
mod streams;

use std::any::Any;
use std::borrow::Cow;
use std::cell::{Cell, RefCell};
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::{Child, ExitStatus};
use std::rc::Rc;
use std::time::Duration;

use bowline_reactor::{DelayedCall, Description, Descriptor, Interest, Next, Reactor, Readiness};

use crate::StandIn;
use crate::process::exit_descriptor;
use crate::sys::{self, Recipient};

pub use self::command::ChildCommand;
pub use self::error::{SpawnError, SpawnStep};
pub use self::output::{CollectOutput, ProcessOutput};
pub use self::pidfd::Pidfd;
pub use self::process::{ProcessSettings, RunningChild};
pub(crate) use self::process::{adopt_process, call_process_protocol, spawn_process};

/// A process that can be watched and signalled. Mostly it is std's [`Child`].
pub trait ChildProcess: 'static {
    /// Its process id.
    fn pid(&self) -> u32;

    /// Kills the process at once, as by SIGKILL. Does nothing if it has exited.
    ///
    /// # Errors
    ///
    /// The process cannot be killed.
    fn kill(&mut self) -> io::Result<()>;

    /// The exit status, if the process has exited. Never waits.
    ///
    /// # Errors
    ///
    /// The status cannot be known. The process is forgotten then.
    fn try_wait(&mut self) -> io::Result<Option<ExitStatus>>;

    /// A descriptor that becomes readable when the process exits. `None` if it has
    /// exited already.
    ///
    /// # Errors
    ///
    /// There is no descriptor. [`try_wait`](Self::try_wait) is then asked again and
    /// again, as often as [`ChildWatch::look_every`] says.
    fn exit_descriptor(&mut self) -> io::Result<Option<Rc<OwnedFd>>> {
        Err(io::Error::from(io::ErrorKind::Unsupported))
    }

    /// Sends the process a signal by its number (signal(7)). Not called once its exit
    /// is known.
    ///
    /// # Errors
    ///
    /// The signal was not sent. By default none can be.
    fn signal(&mut self, signal: i32) -> io::Result<()> {
        let _ = signal;
        Err(io::Error::from(io::ErrorKind::Unsupported))
    }

    /// Sends a signal to all processes of the group that this process leads. May be
    /// called after the process itself has exited.
    ///
    /// # Errors
    ///
    /// As [`signal`](Self::signal). `ESRCH` if no process is left.
    fn signal_group(&mut self, signal: i32) -> io::Result<()> {
        let _ = signal;
        Err(io::Error::from(io::ErrorKind::Unsupported))
    }
}

impl ChildProcess for Child {
    fn pid(&self) -> u32 {
        self.id()
    }

    fn kill(&mut self) -> io::Result<()> {
        Self::kill(self)
    }

    fn try_wait(&mut self) -> io::Result<Option<ExitStatus>> {
        Self::try_wait(self)
    }

    fn exit_descriptor(&mut self) -> io::Result<Option<Rc<OwnedFd>>> {
        Ok(exit_descriptor(self)?.map(Rc::new))
    }

    fn signal(&mut self, signal: i32) -> io::Result<()> {
        // If it was waited for, another process may have its number.
        match Self::try_wait(self)? {
            None => sys::send_signal(self.id(), signal, Recipient::Process),
            Some(_) => Err(io::ErrorKind::NotFound.into()),
        }
    }

    fn signal_group(&mut self, signal: i32) -> io::Result<()> {
        match Self::try_wait(self)? {
            None => sys::send_signal(self.id(), signal, Recipient::Group),
            Some(_) => Err(io::ErrorKind::NotFound.into()),
        }
    }
}

/// Watches for the exit of a process, and tells of it once. Clones watch the same
/// process.
///
/// The kernel reports the exit (pidfd_open(2)). If it cannot, the process is asked as
/// often as [`look_every`](Self::look_every) says. It is watched until its exit, even
/// if this value is dropped, as long as the reactor turns. The callback should not own
/// this value, since neither would then be freed before the exit. (Twisted:
/// `ProcessProtocol.processExited`.)
///
/// # Examples
///
/// ```
/// use std::process::Command;
/// use std::time::Duration;
/// use bowline::process::ChildWatch;
/// use bowline::Reactor;
///
/// let mut reactor = Reactor::new()?;
/// let child = Command::new("true").spawn()?;
/// let watch = ChildWatch::start(&mut reactor, Box::new(child), |reactor, status| {
///     assert!(status.is_ok_and(|status| status.success()));
///     let _ = reactor.stop();
/// });
/// watch.look_every(&mut reactor, Duration::from_millis(20));
/// reactor.run()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct ChildWatch {
    shared: Rc<Shared>,
}

struct Shared {
    pid: u32,
    process: RefCell<Box<dyn ChildProcess>>,
    /// The callback, until the process has exited.
    then: RefCell<Option<Then>>,
    /// Whether the kernel reports the exit.
    is_told: Cell<bool>,
    /// Whether the process had exited before it was watched.
    was_gone: Cell<bool>,
    every: Cell<Option<Duration>>,
    look: Cell<Option<DelayedCall>>,
}

type Then = Box<dyn FnOnce(&mut Reactor, io::Result<ExitStatus>)>;

impl ChildWatch {
    /// Watches a process. `then` is called once, with the exit status, when the process
    /// has exited and was waited for. It is not called before this returns, nor inside
    /// another callback.
    pub fn start(
        reactor: &mut Reactor,
        mut process: Box<dyn ChildProcess>,
        then: impl FnOnce(&mut Reactor, io::Result<ExitStatus>) + 'static,
    ) -> Self {
        let exit = process.exit_descriptor();
        let this = Self {
            shared: Rc::new(Shared {
                pid: process.pid(),
                process: RefCell::new(process),
                then: RefCell::new(Some(Box::new(then))),
                is_told: Cell::new(false),
                was_gone: Cell::new(matches!(exit, Ok(None))),
                every: Cell::new(None),
                look: Cell::new(None),
            }),
        };
        if let Ok(Some(fd)) = exit {
            let watch = this.clone();
            let stand_in = StandIn::of_process((*fd).as_fd());
            let registered = ExitDescriptor {
                fd,
                watch,
                stand_in,
            }
            .register(reactor);
            this.shared.is_told.set(registered.is_ok());
        }
        this
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.shared.pid
    }

    /// Whether the exit is known. The callback was called, or is about to be.
    pub fn has_ended(&self) -> bool {
        self.shared.then.borrow().is_none()
    }

    /// Kills the process at once, as by SIGKILL. Does nothing if it has exited.
    ///
    /// # Errors
    ///
    /// The process cannot be killed.
    pub fn kill(&self) -> io::Result<()> {
        match self.has_ended() {
            false => self.shared.process.borrow_mut().kill(),
            true => Ok(()),
        }
    }

    /// Sends the process a signal by its number (signal(7)).
    ///
    /// # Errors
    ///
    /// `NotFound` if the process has exited. Otherwise the system's.
    pub fn signal(&self, signal: i32) -> io::Result<()> {
        match self.has_ended() {
            false => self.shared.process.borrow_mut().signal(signal),
            true => Err(io::ErrorKind::NotFound.into()),
        }
    }

    /// Sends a signal to all processes of the group that this process leads. The caller
    /// has to know that it leads one.
    ///
    /// # Errors
    ///
    /// The signal was not sent. If the process has exited, the
    /// [process](ChildProcess::signal_group) decides whether one can still be sent.
    pub fn signal_group(&self, signal: i32) -> io::Result<()> {
        self.shared.process.borrow_mut().signal_group(signal)
    }

    /// Asks after the running callback whether the process has exited. Use this if
    /// something else suggests that it has.
    pub fn look(&self, reactor: &mut Reactor) {
        let this = self.clone();
        reactor.defer(move |reactor| this.ask(reactor));
    }

    /// Sets how often the process is asked whether it has exited, if the kernel does
    /// not report that. It is not asked before the first call. A process that had
    /// exited before it was watched is asked at once.
    pub fn look_every(&self, reactor: &mut Reactor, interval: Duration) {
        self.shared.every.set(Some(interval));
        match self.shared.was_gone.take() {
            true => self.look(reactor),
            false => self.look_later(reactor),
        }
    }

    fn look_later(&self, reactor: &mut Reactor) {
        if let Some(look) = self.shared.look.take() {
            // This timer may have fired.
            let _ = look.cancel(reactor);
        }
        let is_wanted = !self.shared.is_told.get() && !self.has_ended();
        if let Some(interval) = self.shared.every.get().filter(|_| is_wanted) {
            let this = self.clone();
            let look = reactor.call_later(interval, move |reactor| this.ask(reactor));
            self.shared.look.set(Some(look));
        }
    }

    fn ask(&self, reactor: &mut Reactor) {
        if self.has_ended() {
            return;
        }
        let status = self.shared.process.borrow_mut().try_wait();
        let Some(status) = status.transpose() else {
            return self.look_later(reactor);
        };
        let then = self.shared.then.take();
        if let Some(look) = self.shared.look.take() {
            // This timer may be the one that has just fired.
            let _ = look.cancel(reactor);
        }
        if let Some(then) = then {
            then(reactor, status);
        }
    }
}

impl fmt::Debug for ChildWatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChildWatch")
            .field("pid", &self.shared.pid)
            .field("has_ended", &self.has_ended())
            .finish()
    }
}

struct ExitDescriptor {
    fd: Rc<OwnedFd>,
    watch: ChildWatch,
    /// What it stands for, in tests on a simulated kernel.
    stand_in: Option<StandIn>,
}

impl ExitDescriptor {
    fn register(self, reactor: &mut Reactor) -> io::Result<()> {
        let mut vacancy = reactor.vacancy()?;
        let token = vacancy.token();
        match &self.stand_in {
            None => vacancy.watch((*self.fd).as_fd(), Interest::Readable)?,
            Some(it) => it.watch(vacancy.reactor(), token, Interest::Readable)?,
        }
        vacancy.install(Box::new(self));
        Ok(())
    }
}

impl Descriptor for ExitDescriptor {
    fn ready(&mut self, reactor: &mut Reactor, _: Readiness) -> Next {
        // The kernel reports only once. If the process is not waited for now, it is
        // asked from here on.
        self.watch.shared.is_told.set(false);
        self.watch.look(reactor);
        Next::Remove
    }

    fn source(&self) -> Option<BorrowedFd<'_>> {
        match &self.stand_in {
            None => Some((*self.fd).as_fd()),
            Some(_) => None,
        }
    }

    fn facet(&mut self) -> &mut dyn Any {
        self
    }

    fn describe(&self, description: &mut Description) {
        description
            .section("end of process")
            .set("role", "child")
            .set("pid", self.watch.shared.pid);
    }

    fn log_prefix(&self) -> Cow<'_, str> {
        Cow::Owned(format!("end of process {}", self.watch.shared.pid))
    }
}
