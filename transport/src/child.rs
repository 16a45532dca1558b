//! Processes that were started here, and the news of their end.

mod command;
mod error;
mod output;
mod pidfd;
mod process;
mod streams;

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::{Child, ExitStatus};
use std::rc::Rc;
use std::time::Duration;

use bowline_reactor::{DelayedCall, Descriptor, Interest, Next, Reactor, Readiness};

use crate::process::exit_descriptor;
use crate::sys::{self, Recipient};

pub use self::command::ChildCommand;
pub use self::error::{SpawnError, SpawnStep};
pub use self::output::{CollectOutput, ProcessOutput};
pub use self::pidfd::Pidfd;
pub use self::process::{ProcessSettings, RunningChild};
pub(crate) use self::process::{adopt_process, call_process_protocol, spawn_process};

/// What has to be known of a process that was started here, and done to it; std's
/// [`Child`] as a rule.
pub trait ChildProcess: 'static {
    /// Its process id.
    fn pid(&self) -> u32;

    /// Ends it at once, as by SIGKILL. Nothing happens if it has ended.
    ///
    /// # Errors
    ///
    /// It could not be.
    fn kill(&mut self) -> io::Result<()>;

    /// How it has ended, if it has; never waits for that.
    ///
    /// # Errors
    ///
    /// It cannot be told; the process is forgotten then.
    fn try_wait(&mut self) -> io::Result<Option<ExitStatus>>;

    /// A descriptor that becomes readable when it ends, or `None` if it has
    /// ended.
    ///
    /// # Errors
    ///
    /// There is none: [`try_wait`](Self::try_wait) is then asked again and again, as
    /// [`ChildWatch::look_every`] says.
    fn exit_descriptor(&mut self) -> io::Result<Option<Rc<OwnedFd>>> {
        Err(io::Error::from(io::ErrorKind::Unsupported))
    }

    /// Sends it a signal, by its number (signal(7)). Not called once it is known to have
    /// ended.
    ///
    /// # Errors
    ///
    /// It was not sent: by default none can be.
    fn signal(&mut self, signal: i32) -> io::Result<()> {
        let _ = signal;
        Err(io::Error::from(io::ErrorKind::Unsupported))
    }

    /// Sends a signal to all processes of the group that it leads. May be called when it
    /// has ended itself.
    ///
    /// # Errors
    ///
    /// As [`signal`](Self::signal); `ESRCH` where nobody is left.
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
        // One that was waited for has no number any more: it may be another's.
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

/// A process whose end is told, once; copies are of the same one.
///
/// The kernel tells of the end (pidfd_open(2)). Where it does not,
/// [`look_every`](Self::look_every) says how often the process is asked. The process is
/// watched to its end, whatever becomes of this, for as long as the reactor turns. What
/// is called then had better not own this: neither would be freed before the end.
/// (Twisted: `ProcessProtocol.processExited`.)
///
/// # Examples
///
/// ```
/// use std::process::Command;
/// use std::time::Duration;
/// use bowline_reactor::Reactor;
/// use bowline_transport::ChildWatch;
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
    /// There until it has ended.
    then: RefCell<Option<Then>>,
    /// Whether the kernel tells of the end.
    is_told: Cell<bool>,
    /// Whether it had ended before it was watched.
    was_gone: Cell<bool>,
    every: Cell<Option<Duration>>,
    look: Cell<Option<DelayedCall>>,
}

type Then = Box<dyn FnOnce(&mut Reactor, io::Result<ExitStatus>)>;

impl ChildWatch {
    /// Watches a process. `then` is called once, when it has ended and was waited for,
    /// with how it ended. It is not called before this returns, nor inside of another
    /// callback.
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
            let build = |_| Box::new(ExitDescriptor { fd, watch }) as _;
            let registered = reactor.register(Interest::Readable, build);
            this.shared.is_told.set(registered.is_ok());
        }
        this
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.shared.pid
    }

    /// Whether its end was found out, and is told or about to be.
    pub fn has_ended(&self) -> bool {
        self.shared.then.borrow().is_none()
    }

    /// Ends it at once, as by SIGKILL. Nothing happens if it has ended.
    ///
    /// # Errors
    ///
    /// It could not be.
    pub fn kill(&self) -> io::Result<()> {
        match self.has_ended() {
            false => self.shared.process.borrow_mut().kill(),
            true => Ok(()),
        }
    }

    /// Sends it a signal, by its number (signal(7)).
    ///
    /// # Errors
    ///
    /// `NotFound` if it has ended; it was not sent.
    pub fn signal(&self, signal: i32) -> io::Result<()> {
        match self.has_ended() {
            false => self.shared.process.borrow_mut().signal(signal),
            true => Err(io::ErrorKind::NotFound.into()),
        }
    }

    /// Sends a signal to all processes of the group that it leads. Whether it leads one
    /// is for who has started it to know.
    ///
    /// # Errors
    ///
    /// It was not sent; where it has ended, it depends on the
    /// [process](ChildProcess::signal_group) whether one can be.
    pub fn signal_group(&self, signal: i32) -> io::Result<()> {
        self.shared.process.borrow_mut().signal_group(signal)
    }

    /// Asks whether it has ended, after the running callback: for who has another sign
    /// of that.
    pub fn look(&self, reactor: &mut Reactor) {
        let this = self.clone();
        reactor.defer(move |reactor| this.ask(reactor));
    }

    /// How often it is asked from now on whether it has ended, if the kernel does not
    /// tell; one that had ended before it was watched at once. Before the first call it
    /// is not asked.
    pub fn look_every(&self, reactor: &mut Reactor, interval: Duration) {
        self.shared.every.set(Some(interval));
        match self.shared.was_gone.take() {
            true => self.look(reactor),
            false => self.look_later(reactor),
        }
    }

    fn look_later(&self, reactor: &mut Reactor) {
        if let Some(look) = self.shared.look.take() {
            // It may have run.
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
            // It may be what runs.
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
}

impl Descriptor for ExitDescriptor {
    fn ready(&mut self, reactor: &mut Reactor, _: Readiness) -> Next {
        // It is told no more than once, so that one who says that it goes on is asked.
        self.watch.shared.is_told.set(false);
        self.watch.look(reactor);
        Next::Remove
    }

    fn source(&self) -> Option<BorrowedFd<'_>> {
        Some((*self.fd).as_fd())
    }

    fn facet(&mut self) -> &mut dyn Any {
        self
    }
}
