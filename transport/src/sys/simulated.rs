//! The errors of the simulated kernel, with the numbers of the real one.

#![allow(unsafe_code)]

use std::io;

use super::Credentials;
use super::process::effective_user;

pub(crate) fn would_block() -> io::Error {
    io::Error::from_raw_os_error(libc::EAGAIN)
}

pub(crate) fn broken_pipe() -> io::Error {
    io::Error::from_raw_os_error(libc::EPIPE)
}

pub(crate) fn connection_reset() -> io::Error {
    io::Error::from_raw_os_error(libc::ECONNRESET)
}

pub(crate) fn too_long() -> io::Error {
    io::Error::from_raw_os_error(libc::EMSGSIZE)
}

pub(crate) fn wrong_type() -> io::Error {
    io::Error::from_raw_os_error(libc::EPROTOTYPE)
}

pub(crate) fn refused() -> io::Error {
    io::Error::from_raw_os_error(libc::ECONNREFUSED)
}

pub(crate) fn no_file() -> io::Error {
    io::Error::from_raw_os_error(libc::ENOENT)
}

pub(crate) fn not_permitted() -> io::Error {
    io::Error::from_raw_os_error(libc::EPERM)
}

pub(crate) fn no_destination() -> io::Error {
    io::Error::from_raw_os_error(libc::EDESTADDRREQ)
}

pub(crate) fn no_process() -> io::Error {
    io::Error::from_raw_os_error(libc::ESRCH)
}

pub(crate) fn not_open_for_that() -> io::Error {
    io::Error::from_raw_os_error(libc::EBADF)
}

pub(crate) fn unsupported() -> io::Error {
    io::Error::from_raw_os_error(libc::EOPNOTSUPP)
}

pub(crate) fn nobody_reads() -> io::Error {
    io::Error::from_raw_os_error(libc::ENXIO)
}

pub(crate) fn invalid() -> io::Error {
    io::Error::from_raw_os_error(libc::EINVAL)
}

/// Errors that pass by themselves: the send is made again later.
pub(crate) const PASSING: [i32; 3] = [libc::ENOBUFS, libc::ENOMEM, libc::ETOOMANYREFS];

/// Errors that end a connection, of all kinds. Those with which UNIX sockets report that
/// the other end is closed are not among them, since whoever gets those may rely on them.
pub(crate) const LASTING: [i32; 7] = [
    libc::ETIMEDOUT,
    libc::EHOSTUNREACH,
    libc::ENETDOWN,
    libc::EPERM,
    libc::EINVAL,
    libc::EBADF,
    libc::EIO,
];

/// Returns the credentials of this process, as a peer would see them.
pub(crate) fn own_credentials() -> Credentials {
    let pid = std::process::id().cast_signed();
    // SAFETY: takes nothing, cannot fail.
    let gid = unsafe { libc::getegid() };
    Credentials::new(pid, effective_user(), gid)
}
