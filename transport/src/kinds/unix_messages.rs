//! The common part of the UNIX sockets that keep messages apart: datagrams and packets.

use std::cell::Cell;
use std::io;
use std::iter;
use std::os::fd::{AsFd, BorrowedFd};

use super::socket_fd::SocketFd;
use crate::datagram::Outgoing;
use crate::sys::{self, MAX_DESCRIPTORS};

/// How many bytes of a send buffer the kernel needs beside the longest message.
const BESIDE_LONGEST: usize = 32;

/// The most room for a message. The kernel makes none that is longer than what it
/// allocates in one piece and 17 pages: 4,263,616 bytes, with pages of 4 KiB, whatever a
/// send buffer is set to (Linux 6.18).
pub(super) const MOST_ROOM: usize = 8 << 20;

/// The longest message that the send buffer of a socket holds, when it was last asked.
#[derive(Clone, Debug)]
pub(super) struct Longest(Cell<usize>);

impl Longest {
    pub(super) fn of(fd: BorrowedFd<'_>) -> Self {
        Self(Cell::new(longest(fd)))
    }

    /// Whether `length` bytes are more than that.
    #[inline]
    pub(super) fn is_exceeded(&self, length: usize, fd: &SocketFd) -> bool {
        length > self.0.get() && self.is_exceeded_still(length, fd)
    }

    #[cold]
    fn is_exceeded_still(&self, length: usize, fd: &SocketFd) -> bool {
        // Somebody may have changed the buffer.
        if let Some(fd) = fd.get() {
            self.0.set(longest(fd));
        }
        length > self.0.get()
    }
}

fn longest(fd: BorrowedFd<'_>) -> usize {
    let buffer = sys::send_buffer_size(fd).unwrap_or(usize::MAX);
    buffer.saturating_sub(BESIDE_LONGEST)
}

/// Sends the first message in line if it has descriptors. Otherwise sends as many as
/// can go at once. Returns how many were sent.
pub(super) fn send(fd: BorrowedFd<'_>, outgoing: &Outgoing<'_>) -> io::Result<usize> {
    if let Some(only) = outgoing.queue.only() {
        return sys::send_one(fd, only.name, only.data).map(|()| 1);
    }
    if let Some(first) = outgoing.queue.in_line().next()
        && let Some(one) = first.descriptors.first()
    {
        let mut control = outgoing.shared.send_control.borrow_mut();
        let mut descriptors = [one.as_fd(); MAX_DESCRIPTORS];
        for (place, descriptor) in iter::zip(&mut descriptors, first.descriptors) {
            *place = descriptor.as_fd();
        }
        let descriptors = &descriptors[..first.descriptors.len()];
        sys::send_message(fd, first.name, first.data, descriptors, &mut control)?;
        return Ok(1);
    }
    let mut batch = outgoing.shared.send_batch.borrow_mut();
    sys::send_messages(fd, outgoing.queue.runs(1, 0), &mut batch)
}
