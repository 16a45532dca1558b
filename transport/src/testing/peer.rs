//! The other end, in the hands of a test.

use std::io::{self, IoSlice};
use std::os::fd::{BorrowedFd, OwnedFd};

use super::kernel::{SimulatedKernel, SocketId};
use super::socket::MemorySocket;

/// How much [`MemoryPeer::take`] reads at a time.
const READ_BYTES: usize = 65_536;

/// The end of a connection that a test holds itself. The test puts bytes and descriptors
/// in, and looks at those that come out.
///
/// It answers as a non-blocking socket does, and does nothing by itself. Bytes that it
/// does not read stay unread, and fill the buffer of the other end. Dropping it closes
/// it.
///
/// Feature `testing`.
#[derive(Debug)]
pub struct MemoryPeer {
    socket: MemorySocket,
}

/// The result of a read of a [`MemoryPeer`].
///
/// Feature `testing`.
#[derive(Debug, Default)]
pub struct PeerRead {
    /// The bytes.
    pub bytes: Vec<u8>,
    /// The descriptors that came with them, in order.
    pub descriptors: Vec<OwnedFd>,
}

impl MemoryPeer {
    /// A peer that holds this socket.
    pub fn new(socket: MemorySocket) -> Self {
        Self { socket }
    }

    /// Sends bytes, and answers how many of them were taken.
    ///
    /// # Errors
    ///
    /// `WouldBlock` if the connection is full, `BrokenPipe` if the other end is closed.
    pub fn send(&self, data: &[u8]) -> io::Result<usize> {
        self.send_with_descriptors(data, &[])
    }

    /// Sends bytes with copies of `descriptors` attached to the first of them.
    /// An answer above zero means that all descriptors have left.
    ///
    /// # Errors
    ///
    /// As [`send`](Self::send). `InvalidInput` if there are more than 253 descriptors,
    /// or no byte for them to travel with.
    pub fn send_with_descriptors(
        &self,
        data: &[u8],
        descriptors: &[BorrowedFd<'_>],
    ) -> io::Result<usize> {
        let (kernel, id) = (self.socket.kernel(), self.socket.id());
        kernel.send(id, &[IoSlice::new(data)], descriptors)
    }

    /// Reads once, up to `limit` bytes (at least one). If there are no bytes, the other
    /// end has closed its side and everything was read.
    ///
    /// # Errors
    ///
    /// `WouldBlock` if nothing is there. `ConnectionReset`, once, if the other end was
    /// closed with bytes of ours unread.
    pub fn receive(&self, limit: usize) -> io::Result<PeerRead> {
        let mut bytes = vec![0; limit.max(1)];
        let mut descriptors = Vec::new();
        let (kernel, id) = (self.socket.kernel(), self.socket.id());
        let read = kernel.read(id, &mut bytes, &mut descriptors)?;
        bytes.truncate(read.bytes);
        Ok(PeerRead { bytes, descriptors })
    }

    /// Reads everything that is there, to the first error or the end.
    pub fn take(&self) -> PeerRead {
        let mut all = PeerRead::default();
        while let Ok(read) = self.receive(READ_BYTES)
            && !read.bytes.is_empty()
        {
            all.bytes.extend(read.bytes);
            all.descriptors.extend(read.descriptors);
        }
        all
    }

    /// Says that nothing more will be sent. Reading goes on.
    pub fn shutdown_write(&self) {
        // Fails only for a socket that is closed.
        let _ = self.socket.kernel().shutdown_write(self.socket.id());
    }

    /// Closes this end, as the death of a process does. If something that the other end
    /// sent is unread, the other end sees a reset. Otherwise it sees everything that was
    /// sent, and then the end.
    pub fn close(self) {
        drop(self);
    }

    /// Whether the other end has closed its side, and everything it sent was
    /// read.
    pub fn is_at_end(&self) -> bool {
        self.socket.kernel().is_at_end(self.socket.id())
    }

    /// The name of this end in its kernel.
    pub fn id(&self) -> SocketId {
        self.socket.id()
    }

    /// Its kernel.
    pub fn kernel(&self) -> &SimulatedKernel {
        self.socket.kernel()
    }
}
