//! Errors that `std::io::ErrorKind` does not distinguish.

#![forbid(unsafe_code)]

use std::io;

/// Whether a send failed for lack of something that comes back without an event: buffers,
/// or room under the user's limit of descriptors in flight.
pub(crate) fn is_transient(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::ENOBUFS | libc::ENOMEM | libc::ETOOMANYREFS)
    )
}

/// Whether datagrams that were sent as one may have been refused for that. The network card
/// cannot do it (`EIO`), or they do not fit on the route (`EINVAL`, `EMSGSIZE`).
pub(crate) fn is_of_segmentation(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EIO | libc::EINVAL | libc::EMSGSIZE)
    )
}

/// Whether no descriptor number was free, in this process or in the system.
pub(crate) fn is_out_of_descriptors(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE))
}

/// Whether an accept failed for lack of memory.
pub(crate) fn is_out_of_memory(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOBUFS | libc::ENOMEM))
}

/// Whether an accept failed only because of the connection that it was to return. It is
/// gone already, a firewall has refused it, or it has one of the network errors that
/// accept(2) passes on.
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

/// Whether an accept failed because the socket does not listen any more: somebody who has it
/// too has shut it down.
pub(crate) fn is_not_listening(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EINVAL)
}

/// Whether an open descriptor turned out not to be a socket. For a descriptor that only
/// names a file (`O_PATH`), all calls for sockets fail as if it were closed.
pub(crate) fn is_not_a_socket(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOTSOCK | libc::EBADF))
}

/// Whether a directory cannot be entered: an error of chdir(2).
pub(crate) fn is_of_a_path(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::ENOENT | libc::ENOTDIR | libc::EACCES | libc::ELOOP | libc::ENAMETOOLONG)
    )
}

/// Whether a user, a group or a process group cannot be taken: an error of setuid(2),
/// setgid(2), setgroups(2) or setpgid(2).
pub(crate) fn is_of_an_identity(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EPERM | libc::EINVAL | libc::ESRCH)
    )
}
