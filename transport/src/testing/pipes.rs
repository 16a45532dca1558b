//! Pipes and FIFOs in memory, for the kinds [`Pipe`](crate::Pipe) and those around it.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, OwnedFd};

use super::kernel::{Holder, OpenedFor, SimulatedKernel, SocketId};

/// An end of a pipe of a [`SimulatedKernel`]. Dropping it closes it, unless others hold
/// it too.
///
/// It answers as a real one does that does not block. The test that holds it reads and
/// writes. Or the end is [made a descriptor](Self::into_descriptor), which is adopted by
/// the real kinds: [`Pipe`](crate::Pipe), [`Pipe::reading`](crate::Pipe::reading),
/// [`Pipe::writing`](crate::Pipe::writing) and [`Pipe::pair`](crate::Pipe::pair).
///
/// # Examples
///
/// ```
/// use bowline::testing::Simulation;
/// use bowline::{Context, Pipe, Protocol, Transport, Transports};
///
/// struct Counts(usize);
///
/// impl<T: Transport> Protocol<T> for Counts {
///     fn data_received(&mut self, _: &mut Context<'_, T>, data: &[u8]) {
///         self.0 += data.len();
///         assert!(self.0 <= 5);
///     }
/// }
///
/// let mut simulation = Simulation::new(7);
/// let process = simulation.spawn()?;
/// let (reading, writing) = simulation.kernel().pipe();
/// let reactor = simulation.reactor(process).expect("it lives");
/// reactor.adopt(Pipe, reading.into_descriptor()?, Counts(0))?;
///
/// writing.write(b"hello")?;
/// simulation.run();
/// assert_eq!(writing.unread(), 0);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// Feature `testing`.
#[derive(Debug)]
pub struct MemoryPipe {
    kernel: SimulatedKernel,
    id: SocketId,
    holder: Holder,
}

/// What a FIFO is opened for.
///
/// Feature `testing`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FifoMode {
    /// `O_RDONLY`.
    Reading,
    /// `O_WRONLY`.
    Writing,
    /// `O_RDWR`: it never ends, since this end writes too.
    Both,
}

impl SimulatedKernel {
    /// Makes a pipe. The first of the two is its end for reading, the second that for
    /// writing.
    pub fn pipe(&self) -> (MemoryPipe, MemoryPipe) {
        let (reading, writing) = self.make_pipe();
        (
            MemoryPipe::new(self.clone(), reading),
            MemoryPipe::new(self.clone(), writing),
        )
    }

    /// Opens a FIFO that was [made](Self::make_fifo) before, without waiting for anybody
    /// (`O_NONBLOCK`).
    ///
    /// # Errors
    ///
    /// `NotFound` if there is none; `ENXIO` if it is opened for writing and nobody reads.
    pub fn open_fifo(&self, name: &str, mode: FifoMode) -> io::Result<MemoryPipe> {
        let id = self.open_fifo_for(
            name,
            OpenedFor {
                reads: mode != FifoMode::Writing,
                writes: mode != FifoMode::Reading,
            },
        )?;
        Ok(MemoryPipe::new(self.clone(), id))
    }
}

impl MemoryPipe {
    pub(super) fn new(kernel: SimulatedKernel, id: SocketId) -> Self {
        let holder = kernel.hold(id);
        Self { kernel, id, holder }
    }

    /// Makes it a descriptor, to be adopted, or passed to others. It is a real one that
    /// only stands for the end: nothing can be read or written through it. The end is
    /// open as long as a copy of the descriptor is.
    ///
    /// # Errors
    ///
    /// `EMFILE`, since this takes two descriptors. The end is closed then.
    pub fn into_descriptor(self) -> io::Result<OwnedFd> {
        self.kernel.park(self.id)
    }

    /// Makes an end of a descriptor that stands for it, or of a copy.
    ///
    /// # Errors
    ///
    /// Gives the descriptor back if it stands for no end of a pipe of this thread.
    pub fn from_descriptor(fd: OwnedFd) -> Result<Self, OwnedFd> {
        match SimulatedKernel::unpark(fd.as_fd()) {
            Some((kernel, id)) if kernel.way_of_pipe(id).is_some() => Ok(Self::new(kernel, id)),
            _ => Err(fd),
        }
    }

    /// The same end, held once more.
    #[must_use]
    pub fn duplicate(&self) -> Self {
        Self::new(self.kernel.clone(), self.id)
    }

    /// Reads once, up to `limit` bytes. No bytes are the end: nobody has it open for
    /// writing.
    ///
    /// # Errors
    ///
    /// `WouldBlock` if nothing is there; `EBADF` if it is not open for reading.
    pub fn read(&self, limit: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; limit];
        let read = self.kernel.read_pipe(self.id, &mut bytes)?;
        bytes.truncate(read);
        Ok(bytes)
    }

    /// Reads everything that is there.
    pub fn take(&self) -> Vec<u8> {
        let mut all = Vec::new();
        while let Ok(bytes) = self.read(READ_BYTES)
            && !bytes.is_empty()
        {
            all.extend(bytes);
        }
        all
    }

    /// Writes once, and answers how many bytes were taken. Up to 4,096 are taken as one,
    /// or not at all.
    ///
    /// # Errors
    ///
    /// `WouldBlock` if it is full; `BrokenPipe` if nobody has it open for reading;
    /// `EBADF` if it is not open for writing.
    pub fn write(&self, data: &[u8]) -> io::Result<usize> {
        self.kernel.write_pipe(self.id, &[IoSlice::new(data)])
    }

    /// How many bytes are in the pipe.
    pub fn unread(&self) -> usize {
        self.kernel.poll_pipe(self.id).map_or(0, |it| it.unread)
    }

    /// Its name in its kernel.
    pub fn id(&self) -> SocketId {
        self.id
    }

    #[cfg(test)]
    pub(super) fn holder(&self) -> Holder {
        self.holder
    }
}

/// How much [`MemoryPipe::take`] reads at a time.
const READ_BYTES: usize = 65_536;

impl Drop for MemoryPipe {
    fn drop(&mut self) {
        self.kernel.close(self.id, self.holder);
    }
}
