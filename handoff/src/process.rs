//! Processes that were started to take over something.

use std::any::Any;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::{Child, ExitStatus};

use bowline_reactor::{Descriptor, Interest, Next, Reactor, Readiness, Token};
use bowline_transport::exit_descriptor;

/// What has to be known of, and done to, the process of a worker or a successor;
/// std's [`Child`] as a rule.
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
    /// There is none: [`try_wait`](Self::try_wait) is then asked again and
    /// again, from when the channel has ended.
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

/// Calls `then` when the process of this [exit descriptor](ChildProcess::exit_descriptor)
/// ends, once.
pub(crate) fn watch_exit(
    reactor: &mut Reactor,
    fd: OwnedFd,
    then: impl FnOnce(&mut Reactor) + 'static,
) -> io::Result<Token> {
    reactor.register(Interest::Readable, move |_| {
        Box::new(ExitWatch {
            fd,
            then: Some(Box::new(then)),
        })
    })
}

type Then = Box<dyn FnOnce(&mut Reactor)>;

struct ExitWatch {
    fd: OwnedFd,
    then: Option<Then>,
}

impl Descriptor for ExitWatch {
    fn ready(&mut self, reactor: &mut Reactor, _: Readiness) -> Next {
        if let Some(then) = self.then.take() {
            reactor.defer(then);
        }
        Next::Remove
    }

    fn source(&self) -> Option<BorrowedFd<'_>> {
        Some(self.fd.as_fd())
    }

    fn facet(&mut self) -> &mut dyn Any {
        self
    }
}
