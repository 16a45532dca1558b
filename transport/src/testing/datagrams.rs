//! A queue of datagrams with a name, and those who send to it.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use bowline_reactor::{Reactor, Token};

use super::kernel::{SimulatedKernel, SocketId};

/// The receiving end of datagrams on a [`SimulatedKernel`], such as a service manager
/// has. [`datagrams`](SimulatedKernel::datagrams) makes it. Dropping it closes it, and
/// drops unread datagrams.
///
/// Feature `testing`.
#[derive(Debug)]
pub struct MemoryDatagrams {
    kernel: SimulatedKernel,
    id: SocketId,
}

/// A socket that sends datagrams to whoever receives under a name.
/// [`datagram_sender`](SimulatedKernel::datagram_sender) makes it. It is connected anew
/// for each datagram. So would a real one have to be, to find its peer and to hear of
/// room there.
///
/// Feature `testing`.
#[derive(Debug)]
pub struct MemoryDatagramSender {
    kernel: SimulatedKernel,
    id: SocketId,
    name: String,
}

/// What has arrived and was not read.
#[derive(Debug)]
pub(super) struct Arrived {
    pub(super) name: String,
    pub(super) most: usize,
    pub(super) waiting: VecDeque<(Vec<u8>, Vec<OwnedFd>)>,
}

impl MemoryDatagrams {
    pub(super) fn new(kernel: SimulatedKernel, id: SocketId) -> Self {
        Self { kernel, id }
    }

    /// How many datagrams wait to be read.
    pub fn waiting(&self) -> usize {
        self.kernel.waiting_datagrams(self.id)
    }

    /// Takes the first datagram that has arrived, with its descriptors.
    pub fn receive(&self) -> Option<(Vec<u8>, Vec<OwnedFd>)> {
        self.kernel.receive_datagram(self.id)
    }
}

impl Drop for MemoryDatagrams {
    fn drop(&mut self) {
        self.kernel.close_datagrams(self.id);
    }
}

impl MemoryDatagramSender {
    pub(super) fn new(kernel: SimulatedKernel, id: SocketId, name: String) -> Self {
        Self { kernel, id, name }
    }

    /// Sends one datagram with descriptors.
    ///
    /// # Errors
    ///
    /// `WouldBlock` if the queue is full; `ConnectionRefused` if nobody receives; others
    /// that pass, by the kernel's settings.
    pub fn send(&self, data: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.kernel
            .send_datagram(self.id, &self.name, data, descriptors)
    }

    /// Reports room from now on. The socket counts as connected to the receiver of the
    /// last datagram.
    ///
    /// # Errors
    ///
    /// As [`MemorySocket::adopt`](super::MemorySocket::adopt).
    pub fn watch(&self, reactor: &mut Reactor, token: Token) -> io::Result<()> {
        self.kernel.watch_sender(self.id, reactor, token)
    }

    /// Ends the reports of room.
    pub fn unwatch(&self) {
        self.kernel.unwatch_sender(self.id);
    }
}

impl Drop for MemoryDatagramSender {
    fn drop(&mut self) {
        self.kernel.close_sender(self.id);
    }
}
