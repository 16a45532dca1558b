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
/// `EMFILE` and `ENFILE` if no descriptor number is free. Otherwise the kernel's.
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
/// `ENOTSOCK` if it is not a socket. Otherwise the kernel's.
pub(crate) fn is_packets(fd: BorrowedFd<'_>) -> io::Result<bool> {
    let kind: libc::c_int = option(fd, libc::SOL_SOCKET, libc::SO_TYPE)?;
    Ok(kind == libc::SOCK_SEQPACKET)
}

/// Adds a time stamp to each message from now on, also to those that wait already.
///
/// For an empty message and for the end of the connection, recvmsg(2) returns the same,
/// except that the end has no time stamp. On UNIX sockets a time stamp costs nothing
/// besides its bytes: the kernel takes the time when the message is received.
///
/// # Errors
/// The kernel's.
#[doc(alias = "SO_TIMESTAMP")]
pub(crate) fn set_stamps(fd: BorrowedFd<'_>) -> io::Result<()> {
    set_flag(fd, libc::SOL_SOCKET, libc::SO_TIMESTAMP, true)
}

/// Whether messages have time stamps.
pub(crate) fn has_stamps(fd: BorrowedFd<'_>) -> bool {
    flag(fd, libc::SOL_SOCKET, libc::SO_TIMESTAMP).unwrap_or(false)
}

/// Whether nothing more arrives, except for what has arrived already (`POLLRDHUP`).
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
