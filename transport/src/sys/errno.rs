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

/// Whether datagrams that were sent as one could be refused for that: the network card
/// cannot do it (`EIO`), or they do not fit on the way (`EINVAL`, `EMSGSIZE`).
pub(crate) fn is_of_segmentation(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EIO | libc::EINVAL | libc::EMSGSIZE)
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

/// Whether a path cannot be gone to: what chdir(2) says.
pub(crate) fn is_of_a_path(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::ENOENT | libc::ENOTDIR | libc::EACCES | libc::ELOOP | libc::ENAMETOOLONG)
    )
}

/// Whether a user, a group or a process group cannot be taken: what setuid(2), setgid(2),
/// setgroups(2) and setpgid(2) say.
pub(crate) fn is_of_an_identity(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EPERM | libc::EINVAL | libc::ESRCH)
    )
}
