//! Processes that a descriptor names, children or not.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::ExitStatus;
use std::rc::Rc;

use bowline_reactor::signal::SIGKILL;

use super::ChildProcess;
use crate::sys::{self, Recipient};

/// A process that a descriptor (pidfd) names. The descriptor never comes to mean
/// another process. It need not be a child of this program.
///
/// [`ChildWatch`](super::ChildWatch) tells of its exit, once. It also waits for a
/// child, so the exit status is known. The status of another process is known only from
/// Linux 6.15 on, and only if its parent has waited for it already. Otherwise the exit
/// is told with an error (`ECHILD`).
///
/// ```
/// use std::process::Command;
/// use bowline::process::{ChildWatch, Pidfd};
/// use bowline::Reactor;
///
/// let mut reactor = Reactor::new()?;
/// let mut child = Command::new("true").spawn()?;
/// let process = Pidfd::open(child.id())?;
/// ChildWatch::start(&mut reactor, Box::new(process), |reactor, status| {
///     assert!(status.is_ok_and(|status| status.success()));
///     let _ = reactor.stop();
/// });
/// reactor.run()?;
/// // It was waited for.
/// assert!(child.try_wait().is_err());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct Pidfd {
    fd: Rc<OwnedFd>,
    pid: u32,
}

impl Pidfd {
    /// The process that has this number now. That is surely the right one only for a
    /// child that nobody has waited for.
    ///
    /// # Errors
    ///
    /// `ESRCH` if there is none. `ENOSYS` before Linux 5.3. `EMFILE` or `ENFILE` if no
    /// descriptor number is free.
    pub fn open(pid: u32) -> io::Result<Self> {
        let fd = Rc::new(sys::pidfd_open(pid)?);
        Ok(Self { fd, pid })
    }

    /// The process that `fd` names. The descriptor may come from another process, or
    /// from [`peer_pidfd`](bowline_protocol::UnixTransport::peer_pidfd).
    ///
    /// # Errors
    ///
    /// `InvalidInput` if `fd` is something else. `ESRCH` if the process is gone, or is
    /// not visible from here. The descriptor is closed.
    pub fn from_descriptor(fd: OwnedFd) -> io::Result<Self> {
        let pid = sys::pid_of(fd.as_fd())?;
        Ok(Self::of_child(fd, pid))
    }

    /// A child that was started with this descriptor.
    pub(super) fn of_child(fd: OwnedFd, pid: u32) -> Self {
        let fd = Rc::new(fd);
        Self { fd, pid }
    }
}

impl AsFd for Pidfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        (*self.fd).as_fd()
    }
}

impl ChildProcess for Pidfd {
    fn pid(&self) -> u32 {
        self.pid
    }

    fn kill(&mut self) -> io::Result<()> {
        match self.signal(SIGKILL) {
            Err(error) if sys::is_no_process(&error) => Ok(()),
            result => result,
        }
    }

    fn try_wait(&mut self) -> io::Result<Option<ExitStatus>> {
        sys::pidfd_wait(self.as_fd())
    }

    fn exit_descriptor(&mut self) -> io::Result<Option<Rc<OwnedFd>>> {
        Ok(Some(Rc::clone(&self.fd)))
    }

    fn signal(&mut self, signal: i32) -> io::Result<()> {
        sys::pidfd_send_signal(self.as_fd(), signal, Recipient::Process)
    }

    fn signal_group(&mut self, signal: i32) -> io::Result<()> {
        match sys::pidfd_send_signal(self.as_fd(), signal, Recipient::Group) {
            // Before Linux 6.9 only a number can name the group. It belongs to nobody
            // else as long as the process was not waited for.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
                self.signal(0)?;
                sys::send_signal(self.pid, signal, Recipient::Group)
            }
            result => result,
        }
    }
}

/// A child of ours without a descriptor. Nobody else may wait for it: its number is its own
/// until then.
#[derive(Debug)]
pub(super) struct Numbered {
    pid: u32,
    status: Option<ExitStatus>,
}

impl Numbered {
    pub(super) fn new(pid: u32) -> Self {
        Self { pid, status: None }
    }

    fn send(&mut self, signal: i32, recipient: Recipient) -> io::Result<()> {
        match self.try_wait()? {
            None => sys::send_signal(self.pid, signal, recipient),
            Some(_) => Err(io::ErrorKind::NotFound.into()),
        }
    }
}

impl ChildProcess for Numbered {
    fn pid(&self) -> u32 {
        self.pid
    }

    fn kill(&mut self) -> io::Result<()> {
        match self.send(SIGKILL, Recipient::Process) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result,
        }
    }

    fn try_wait(&mut self) -> io::Result<Option<ExitStatus>> {
        if self.status.is_none() {
            self.status = sys::child_wait(self.pid)?;
        }
        Ok(self.status)
    }

    fn signal(&mut self, signal: i32) -> io::Result<()> {
        self.send(signal, Recipient::Process)
    }

    fn signal_group(&mut self, signal: i32) -> io::Result<()> {
        self.send(signal, Recipient::Group)
    }
}
