//! Processes that were started here, and the news of their end.

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
    fn exit_descriptor(&mut self) -> io::Result<Option<OwnedFd>> {
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

    fn exit_descriptor(&mut self) -> io::Result<Option<OwnedFd>> {
        exit_descriptor(self)
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
    /// There until it has ended.
    running: RefCell<Option<Running>>,
    /// Whether the kernel tells of the end.
    is_told: Cell<bool>,
    /// Whether it had ended before it was watched.
    was_gone: Cell<bool>,
    every: Cell<Option<Duration>>,
    look: Cell<Option<DelayedCall>>,
}

type Then = Box<dyn FnOnce(&mut Reactor, io::Result<ExitStatus>)>;

struct Running {
    process: Box<dyn ChildProcess>,
    then: Then,
}

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
                running: RefCell::new(Some(Running {
                    process,
                    then: Box::new(then),
                })),
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
        self.shared.running.borrow().is_none()
    }

    /// Ends it at once, as by SIGKILL. Nothing happens if it has ended.
    ///
    /// # Errors
    ///
    /// It could not be.
    pub fn kill(&self) -> io::Result<()> {
        match &mut *self.shared.running.borrow_mut() {
            Some(running) => running.process.kill(),
            None => Ok(()),
        }
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
        let ended = {
            let mut running = self.shared.running.borrow_mut();
            let status = running.as_mut().map(|it| it.process.try_wait());
            match status.map(io::Result::transpose) {
                Some(Some(status)) => running.take().map(|running| (running, status)),
                _ => None,
            }
        };
        match ended {
            Some((running, status)) => (running.then)(reactor, status),
            None => self.look_later(reactor),
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
    fd: OwnedFd,
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
        Some(self.fd.as_fd())
    }

    fn facet(&mut self) -> &mut dyn Any {
        self
    }
}
