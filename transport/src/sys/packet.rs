//! UNIX sockets that keep the boundaries of messages over a connection
//! (`SOCK_SEQPACKET`).

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use super::retry;
use super::socket::{flag, option, set_flag};

/// Makes a UNIX socket of sequenced packets, non-blocking and close-on-exec.
///
/// # Errors
/// The kernel's; `EMFILE` and `ENFILE` where no descriptor is free.
pub(crate) fn packet_socket() -> io::Result<OwnedFd> {
    let kind = libc::SOCK_SEQPACKET | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    let fd = retry(|| {
        // SAFETY: takes integers only.
        unsafe { libc::socket(libc::AF_UNIX, kind, 0) }
    })?;
    // SAFETY: the kernel has just made `fd` for us; nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Whether the socket is of type `SOCK_SEQPACKET`.
///
/// # Errors
/// `ENOTSOCK` where it is not a socket; otherwise the kernel's.
pub(crate) fn is_packets(fd: BorrowedFd<'_>) -> io::Result<bool> {
    let kind: libc::c_int = option(fd, libc::SOL_SOCKET, libc::SO_TYPE)?;
    Ok(kind == libc::SOCK_SEQPACKET)
}

/// Has each message come with a stamp from now on, those that wait already too.
///
/// A message of no bytes and the end of the connection are the same answer of recvmsg(2),
/// but that the end has no stamp. On UNIX sockets it costs nothing beside its bytes: the
/// kernel takes the time when it is received.
///
/// # Errors
/// The kernel's.
#[doc(alias = "SO_TIMESTAMP")]
pub(crate) fn set_stamps(fd: BorrowedFd<'_>) -> io::Result<()> {
    set_flag(fd, libc::SOL_SOCKET, libc::SO_TIMESTAMP, true)
}

/// Whether messages come with a stamp.
pub(crate) fn has_stamps(fd: BorrowedFd<'_>) -> bool {
    flag(fd, libc::SOL_SOCKET, libc::SO_TIMESTAMP).unwrap_or(false)
}

/// Whether nothing comes any more but for what has arrived (`POLLRDHUP`).
pub(crate) fn is_read_closed(fd: BorrowedFd<'_>) -> bool {
    let mut watched = libc::pollfd {
        fd: fd.as_raw_fd(),
        events: libc::POLLRDHUP,
        revents: 0,
    };
    let count = retry(|| {
        // SAFETY: one element, borrowed for writing until the call returns.
        unsafe { libc::poll(&raw mut watched, 1, 0) }
    });
    count.is_ok() && watched.revents & libc::POLLRDHUP != 0
}
