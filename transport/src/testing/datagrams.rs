//! A queue of datagrams with a name, and those who send to it.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use bowline_reactor::{Reactor, Token};

use super::kernel::{SimulatedKernel, SocketId};

/// The receiving end of datagrams on a [`SimulatedKernel`], made by
/// [`datagrams`](SimulatedKernel::datagrams): a service manager, say. Dropping it closes
/// it, with what was not read.
#[derive(Debug)]
pub struct MemoryDatagrams {
    kernel: SimulatedKernel,
    id: SocketId,
}

/// A socket that sends datagrams to whoever receives under a name, made by
/// [`datagram_sender`](SimulatedKernel::datagram_sender): connected anew for each, as a
/// real one would have to be that looks for its peer and hears of room there.
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

    /// How many wait to be read.
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
    /// `WouldBlock` where the queue is full; `ConnectionRefused` where nobody receives;
    /// by the kernel's settings others that pass.
    pub fn send(&self, data: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.kernel
            .send_datagram(self.id, &self.name, data, descriptors)
    }

    /// Reports from now on when there is room, as for a socket that is connected to
    /// where it has sent last.
    ///
    /// # Errors
    ///
    /// As [`MemorySocket::adopt`](super::MemorySocket::adopt).
    pub fn watch(&self, reactor: &mut Reactor, token: Token) -> io::Result<()> {
        self.kernel.watch_sender(self.id, reactor, token)
    }

    /// Ends that.
    pub fn unwatch(&self) {
        self.kernel.unwatch_sender(self.id);
    }
}

impl Drop for MemoryDatagramSender {
    fn drop(&mut self) {
        self.kernel.close_sender(self.id);
    }
}
