//! Errors that `std::io::ErrorKind` does not tell apart.

#![forbid(unsafe_code)]

use std::io;

/// Whether a send failed for want of something that comes back by itself,
/// without any event to say so: buffers, or room under the user's limit of
/// descriptors in flight.
pub(crate) fn is_transient(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::ENOBUFS | libc::ENOMEM | libc::ETOOMANYREFS)
    )
}

/// Whether there was no free descriptor number, in this process or at all.
pub(crate) fn is_out_of_descriptors(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE))
}

/// Whether an accept failed for want of memory.
pub(crate) fn is_out_of_memory(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOBUFS | libc::ENOMEM))
}

/// Whether an accept failed on account of the one connection it was to
/// return: gone already, refused by a firewall, or one of the network errors
/// that accept(2) passes on.
pub(crate) fn is_of_one_connection(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(
            libc::ECONNABORTED
                | libc::EPERM
                | libc::EPROTO
                | libc::ENETDOWN
                | libc::ENOPROTOOPT
                | libc::EHOSTDOWN
                | libc::ENONET
                | libc::EHOSTUNREACH
                | libc::EOPNOTSUPP
                | libc::ENETUNREACH
        )
    )
}

/// Whether a descriptor that is open turned out to be no socket. One that only names
/// a file (`O_PATH`) answers as if it were closed, to all that asks a socket.
pub(crate) fn is_not_a_socket(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOTSOCK | libc::EBADF))
}

/// What the simulated kernel answers: the numbers of the real one.
#[cfg(feature = "testing")]
pub(crate) mod simulated {
    use std::io;

    pub(crate) fn would_block() -> io::Error {
        io::Error::from_raw_os_error(libc::EAGAIN)
    }

    pub(crate) fn broken_pipe() -> io::Error {
        io::Error::from_raw_os_error(libc::EPIPE)
    }

    pub(crate) fn connection_reset() -> io::Error {
        io::Error::from_raw_os_error(libc::ECONNRESET)
    }

    pub(crate) fn invalid() -> io::Error {
        io::Error::from_raw_os_error(libc::EINVAL)
    }

    /// What passes by itself: a send is to be made again later.
    pub(crate) const PASSING: [i32; 3] = [libc::ENOBUFS, libc::ENOMEM, libc::ETOOMANYREFS];

    /// What ends a connection, of all kinds of errors. Not those by which UNIX sockets
    /// say that the other end is closed: who hears of that may rely on it.
    pub(crate) const LASTING: [i32; 7] = [
        libc::ETIMEDOUT,
        libc::EHOSTUNREACH,
        libc::ENETDOWN,
        libc::EPERM,
        libc::EINVAL,
        libc::EBADF,
        libc::EIO,
    ];
}
