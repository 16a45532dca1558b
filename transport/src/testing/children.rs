//! Child processes in memory: what the reactor has of them, and what a test does as them.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::rc::Rc;

use bowline_reactor::signal::SIGKILL;

use super::kernel::{Holder, SimulatedKernel, SocketId};
use super::pipes::MemoryPipe;
use crate::child::{ChildProcess, RunningChild};
use crate::kinds::Pipe;
use crate::sys;

/// A process of a [`SimulatedKernel`], in the hands of a test: what it reads and writes,
/// and how it ends. [`start_child`](SimulatedKernel::start_child) makes it.
///
/// It dies of a signal, unless it [traps](Self::trap) it. It goes on if this value is
/// dropped, and keeps its pipes open.
///
/// # Examples
///
/// A child exits, and leaves another process behind that keeps its standard output open:
///
/// ```
/// use bowline::process::{ProcessContext, ProcessProtocol, ProcessStatus};
/// use bowline::testing::{ChildPipe, Simulation};
/// use bowline::Transports;
///
/// struct Prints;
///
/// impl ProcessProtocol for Prints {
///     fn child_data_received(&mut self, _: &mut ProcessContext<'_>, number: u32, data: &[u8]) {
///         assert_eq!((number, data), (1, &b"late"[..]));
///     }
///
///     fn process_exited(&mut self, _: &mut ProcessContext<'_>, status: ProcessStatus) {
///         assert!(status.is_success());
///     }
/// }
///
/// let mut simulation = Simulation::new(7);
/// let process = simulation.spawn()?;
/// let kernel = simulation.kernel().clone();
/// let (running, child) = kernel.start_child(&[(1, ChildPipe::Writes)])?;
/// let reactor = simulation.reactor(process).expect("it lives");
/// let handle = reactor.adopt_process(running, Prints)?;
///
/// let left_behind = child.fork()?;
/// child.exit(0);
/// simulation.run();
/// left_behind.write(1, b"late")?;
/// simulation.run();
/// assert!(simulation.reactor(process).unwrap().get(handle).is_some());
/// left_behind.exit(0);
/// simulation.run();
/// assert!(simulation.reactor(process).unwrap().get(handle).is_none());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// Feature `testing`.
#[derive(Debug)]
pub struct MemoryProcess {
    kernel: SimulatedKernel,
    id: SocketId,
    holder: Holder,
    pid: u32,
}

/// What a child does with the end of a pipe that it is given under a number. Ours is the
/// other end.
///
/// Feature `testing`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChildPipe {
    /// It reads, as standard input.
    Reads,
    /// It writes, as standard output.
    Writes,
}

impl SimulatedKernel {
    /// Starts a child that has pipes under these numbers, and leads a process group. The
    /// first of the two goes to [`adopt_process`](crate::Transports::adopt_process), and
    /// the second says what the child does.
    ///
    /// # Errors
    ///
    /// `EMFILE`, since each pipe takes two descriptors.
    pub fn start_child(
        &self,
        pipes: &[(u32, ChildPipe)],
    ) -> io::Result<(RunningChild, MemoryProcess)> {
        let mut theirs = Vec::new();
        let mut ours = Vec::new();
        for (number, way) in pipes {
            let (reading, writing) = self.pipe();
            match way {
                ChildPipe::Reads => {
                    ours.push((*number, Pipe::writing(), writing.into_descriptor()?));
                    theirs.push((*number, reading));
                }
                ChildPipe::Writes => {
                    ours.push((*number, Pipe::reading(), reading.into_descriptor()?));
                    theirs.push((*number, writing));
                }
            }
        }
        let given: Vec<_> = theirs
            .iter()
            .map(|(number, it)| (*number, it.id()))
            .collect();
        let id = self.start_process(&given);
        let child = MemoryProcess::new(self.clone(), id);
        // They are the child's alone.
        drop(theirs);
        let started = StartedChild(MemoryProcess::new(self.clone(), id));
        let mut running = RunningChild::new(started).leads_group();
        for (number, way, fd) in ours {
            running = running.stream(number, way, fd);
        }
        Ok((running, child))
    }
}

impl MemoryProcess {
    fn new(kernel: SimulatedKernel, id: SocketId) -> Self {
        let holder = kernel.hold(id);
        let pid = kernel.pid_of(id).unwrap_or(0);
        Self {
            kernel,
            id,
            holder,
            pid,
        }
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Writes to the pipe that it has under `number`.
    ///
    /// # Errors
    ///
    /// As [`MemoryPipe::write`]. `EBADF` if it has none; `ESRCH` if it has exited;
    /// `WouldBlock` while it is stopped.
    pub fn write(&self, number: u32, data: &[u8]) -> io::Result<usize> {
        self.pipe(number)?.write(data)
    }

    /// Reads from the pipe that it has under `number`.
    ///
    /// # Errors
    ///
    /// As [`MemoryPipe::read`], and [`write`](Self::write).
    pub fn read(&self, number: u32, limit: usize) -> io::Result<Vec<u8>> {
        self.pipe(number)?.read(limit)
    }

    /// Closes its pipe under `number`. Processes that it has started keep theirs.
    ///
    /// # Errors
    ///
    /// `EBADF` if it has none; `ESRCH` if it has exited.
    pub fn close(&self, number: u32) -> io::Result<()> {
        self.kernel.close_in_process(self.id, number)
    }

    /// Starts another process, which has the same pipes, and is of the same group. Nobody
    /// waits for it. A child daemonizes by this and by its exit.
    ///
    /// # Errors
    ///
    /// `ESRCH` if it has exited.
    pub fn fork(&self) -> io::Result<Self> {
        let id = self.kernel.fork_process(self.id)?;
        Ok(Self::new(self.kernel.clone(), id))
    }

    /// Exits with a code, of which the lowest 8 bits count. Its pipes are closed. Does
    /// nothing if it has exited.
    pub fn exit(&self, code: i32) {
        self.kernel.end_process(self.id, (code & 0xff) << 8);
    }

    /// Handles a signal by itself from now on, so that it does not die of it. SIGKILL and
    /// SIGSTOP cannot be handled.
    pub fn trap(&self, signal: i32) {
        self.kernel.trap_in(self.id, signal);
    }

    /// The signals that have come since the last call, of those that it
    /// [traps](Self::trap).
    pub fn signals(&self) -> Vec<i32> {
        self.kernel.signals_in(self.id)
    }

    /// Sends it a signal, as kill(2) does.
    ///
    /// # Errors
    ///
    /// `ESRCH` if it has exited and was waited for.
    pub fn kill(&self, signal: i32) -> io::Result<()> {
        self.kernel.send_signal(self.id, signal, false)
    }

    /// Whether it has exited.
    pub fn has_exited(&self) -> bool {
        self.kernel.has_exited(self.id)
    }

    /// Whether it has neither exited nor been stopped.
    pub fn is_running(&self) -> bool {
        self.kernel.is_running(self.id)
    }

    fn pipe(&self, number: u32) -> io::Result<MemoryPipe> {
        let id = self.kernel.pipe_of_process(self.id, number)?;
        Ok(MemoryPipe::new(self.kernel.clone(), id))
    }
}

impl Drop for MemoryProcess {
    fn drop(&mut self) {
        self.kernel.close(self.id, self.holder);
    }
}

/// A child as the reactor has it.
#[derive(Debug)]
struct StartedChild(MemoryProcess);

impl ChildProcess for StartedChild {
    fn pid(&self) -> u32 {
        self.0.pid
    }

    fn kill(&mut self) -> io::Result<()> {
        match self.signal(SIGKILL) {
            Err(error) if sys::is_no_process(&error) => Ok(()),
            result => result,
        }
    }

    fn try_wait(&mut self) -> io::Result<Option<ExitStatus>> {
        let status = self.0.kernel.wait_for(self.0.id)?;
        Ok(status.map(ExitStatus::from_raw))
    }

    fn exit_descriptor(&mut self) -> io::Result<Option<Rc<OwnedFd>>> {
        let fd = self.0.kernel.park(self.0.id)?;
        Ok(Some(Rc::new(fd)))
    }

    fn signal(&mut self, signal: i32) -> io::Result<()> {
        self.0.kill(signal)
    }

    fn signal_group(&mut self, signal: i32) -> io::Result<()> {
        self.0.kernel.send_signal(self.0.id, signal, true)
    }
}
