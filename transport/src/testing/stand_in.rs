//! Descriptors that stand for an end of a simulated pipe, or for a simulated process, so
//! that the real kinds drive them.

use std::io::{self, IoSlice};
use std::os::fd::BorrowedFd;
use std::path::PathBuf;

use bowline_reactor::{Interest, Reactor, Token};

use super::kernel::{Holder, OpenedFor, PolledPipe, SimulatedKernel, SocketId};
use crate::sys;

/// What a descriptor stands for. It is held by this too, and let go when this is dropped.
#[derive(Debug)]
pub(crate) struct StandIn {
    kernel: SimulatedKernel,
    id: SocketId,
    holder: Holder,
}

impl StandIn {
    /// What `fd` stands for, if that is an end of a pipe.
    pub(crate) fn of_pipe(fd: BorrowedFd<'_>) -> Option<Self> {
        let (kernel, id) = SimulatedKernel::unpark(fd)?;
        kernel.way_of_pipe(id)?;
        Some(Self::new(kernel, id))
    }

    /// What `fd` stands for, if that is a process.
    pub(crate) fn of_process(fd: BorrowedFd<'_>) -> Option<Self> {
        let (kernel, id) = SimulatedKernel::unpark(fd)?;
        kernel.pid_of(id)?;
        Some(Self::new(kernel, id))
    }

    fn new(kernel: SimulatedKernel, id: SocketId) -> Self {
        let holder = kernel.hold(id);
        Self { kernel, id, holder }
    }

    /// What the end is open for, reading and writing.
    pub(crate) fn access(&self) -> (bool, bool) {
        let found = self.kernel.way_of_pipe(self.id);
        found.map_or((false, false), |(OpenedFor { reads, writes }, _)| {
            (reads, writes)
        })
    }

    /// The path, if it is a FIFO.
    pub(crate) fn path(&self) -> Option<PathBuf> {
        let (_, name) = self.kernel.way_of_pipe(self.id)?;
        name.map(PathBuf::from)
    }

    /// As preadv2(2) with `RWF_NOWAIT`, which FIFOs do not have.
    pub(crate) fn read_at_once(&self, data: &mut [u8]) -> io::Result<usize> {
        match self.path() {
            Some(_) => Err(sys::simulated::unsupported()),
            None => self.read(data),
        }
    }

    /// As pwritev2(2) with `RWF_NOWAIT`.
    pub(crate) fn write_at_once(&self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        match self.path() {
            Some(_) => Err(sys::simulated::unsupported()),
            None => self.write(pieces),
        }
    }

    pub(crate) fn read(&self, data: &mut [u8]) -> io::Result<usize> {
        self.kernel.read_pipe(self.id, data)
    }

    pub(crate) fn write(&self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        self.kernel.write_pipe(self.id, pieces)
    }

    fn poll(&self) -> Option<PolledPipe> {
        self.kernel.poll_pipe(self.id).ok()
    }

    pub(crate) fn has_waiting(&self) -> bool {
        self.poll().is_none_or(|it| it.has_bytes)
    }

    pub(crate) fn has_room(&self) -> bool {
        self.poll().is_none_or(|it| it.has_room)
    }

    pub(crate) fn has_no_reader(&self) -> bool {
        self.poll().is_some_and(|it| it.has_no_reader)
    }

    pub(crate) fn is_hung_up(&self) -> bool {
        self.poll().is_some_and(|it| it.is_hung_up)
    }

    pub(crate) fn unread(&self) -> usize {
        self.poll().map_or(0, |it| it.unread)
    }

    pub(crate) fn watch(
        &self,
        reactor: &mut Reactor,
        token: Token,
        interest: Interest,
    ) -> io::Result<()> {
        let place = (self.id, self.holder);
        self.kernel.watch(place, reactor, token, interest)
    }

    pub(crate) fn unwatch(&self) {
        self.kernel.unwatch(self.id, self.holder);
    }
}

impl Drop for StandIn {
    fn drop(&mut self) {
        self.kernel.close(self.id, self.holder);
    }
}
