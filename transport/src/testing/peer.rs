//! The other end, in the hands of a test.

use std::io::{self, IoSlice};
use std::os::fd::{BorrowedFd, OwnedFd};

use super::kernel::{SimulatedKernel, SocketId};
use super::socket::MemorySocket;

/// How much [`MemoryPeer::take`] reads at a time.
const READ_BYTES: usize = 65_536;

/// The end of a connection that a test holds itself: it puts bytes and
/// descriptors in, and looks at what comes out.
///
/// It answers as a non-blocking socket does, and does nothing by itself: what
/// it does not read stays unread, and fills the buffer of the other end.
/// Dropping it closes it.
#[derive(Debug)]
pub struct MemoryPeer {
    socket: MemorySocket,
}

/// What a read of a [`MemoryPeer`] brought.
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
    /// `WouldBlock` when the connection is full, `BrokenPipe` when the other
    /// end is closed.
    pub fn send(&self, data: &[u8]) -> io::Result<usize> {
        self.send_with_descriptors(data, &[])
    }

    /// Sends bytes with copies of `descriptors` attached to the first of them.
    /// An answer above zero means that all descriptors have left.
    ///
    /// # Errors
    ///
    /// As [`send`](Self::send); `InvalidInput` above 253 descriptors, or
    /// with no byte for them to travel with.
    pub fn send_with_descriptors(
        &self,
        data: &[u8],
        descriptors: &[BorrowedFd<'_>],
    ) -> io::Result<usize> {
        let (kernel, id) = (self.socket.kernel(), self.socket.id());
        kernel.send(id, &[IoSlice::new(data)], descriptors)
    }

    /// Reads once, up to `limit` bytes (at least one). No bytes: the other end
    /// has closed its side, and everything was read.
    ///
    /// # Errors
    ///
    /// `WouldBlock` when nothing is there; `ConnectionReset`, once, when the
    /// other end was closed with bytes of ours unread.
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

    /// Says that nothing more will be sent; reading goes on.
    pub fn shutdown_write(&self) {
        // Fails only for a socket that is closed.
        let _ = self.socket.kernel().shutdown_write(self.socket.id());
    }

    /// Closes. The other end sees a reset if something it sent is unread, as
    /// after the death of a process; otherwise, what was sent and then the end.
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

    /// The kernel it is of.
    pub fn kernel(&self) -> &SimulatedKernel {
        self.socket.kernel()
    }
}
