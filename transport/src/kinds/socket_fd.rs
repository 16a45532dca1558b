//! The descriptor of a socket, for all kinds of socket.

use std::io::{self, IoSlice};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::file_descriptor::{Received, not_connected};
use crate::shared::ReadBuffers;
use crate::sys::{self, SocketName};

/// The descriptor of a socket, until it is closed or detached. Calls that need it
/// afterwards return [`not_connected`].
#[derive(Debug, Default)]
pub(super) struct SocketFd(Option<OwnedFd>);

impl SocketFd {
    pub(super) fn new(fd: OwnedFd) -> Self {
        Self(Some(fd))
    }

    /// Takes the descriptor out. The caller closes it.
    pub(super) fn take(&mut self) -> Option<OwnedFd> {
        self.0.take()
    }

    pub(super) fn put(&mut self, fd: OwnedFd) {
        self.0 = Some(fd);
    }

    pub(super) fn close(&mut self) {
        self.0 = None;
    }

    #[inline(always)]
    pub(super) fn get(&self) -> Option<BorrowedFd<'_>> {
        self.0.as_ref().map(AsFd::as_fd)
    }

    #[inline(always)]
    pub(super) fn open(&self) -> io::Result<BorrowedFd<'_>> {
        self.get().ok_or_else(not_connected)
    }

    /// The name of the socket.
    pub(super) fn name(&self) -> io::Result<SocketName> {
        sys::local_name(self.open()?)
    }

    #[inline(always)]
    pub(super) fn send(&self, data: &[u8]) -> io::Result<usize> {
        sys::send(self.open()?, data)
    }

    pub(super) fn send_pieces(&self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        sys::send_vectored(self.open()?, pieces)
    }

    /// A plain read of a stream. Descriptors that come with the bytes are lost.
    #[inline(always)]
    pub(super) fn read(&self, buffers: &mut ReadBuffers, limit: usize) -> io::Result<Received> {
        let bytes = sys::recv(self.open()?, buffers.data.get_mut(limit))?;
        Ok(Received::new(bytes, limit))
    }

    pub(super) fn shutdown_write(&self) -> io::Result<()> {
        sys::shutdown(self.open()?, Shutdown::Write)
    }

    /// Ends the connection for all who hold the socket. It fails only if there is none.
    pub(super) fn shut_down(&self) {
        if let Some(fd) = self.get() {
            let _ = sys::shutdown(fd, Shutdown::Both);
        }
    }

    pub(super) fn shutdown_read(&self) -> io::Result<()> {
        sys::shutdown(self.open()?, Shutdown::Read)
    }

    pub(super) fn duplicate(&self) -> io::Result<OwnedFd> {
        self.open()?.try_clone_to_owned()
    }
}
