//! The system calls that the loop itself needs and mio does not offer; and
//! closures without a box: the only place of this crate where `unsafe` stands.

#![allow(unsafe_code)]

mod call;
mod fork;
pub mod signal;
mod thread;
#[cfg(feature = "inspect")]
mod ticks;
mod timerfd;

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

pub(crate) use self::call::Call;
pub(crate) use self::fork::{generation, known_generation};
pub use self::thread::{Thread, start_thread};
#[cfg(feature = "inspect")]
pub(crate) use self::ticks::ticks;
pub(crate) use self::timerfd::TimerFd;

/// Whether reading would not block: there is something, or the end, or an error. What cannot
/// be asked is not readable.
///
/// References: poll(2).
pub(crate) fn is_readable(fd: BorrowedFd<'_>) -> bool {
    let mut watched = libc::pollfd {
        fd: fd.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    loop {
        // SAFETY: one element, borrowed for writing until the call returns.
        match unsafe { libc::poll(&raw mut watched, 1, 0) } {
            -1 if io::Error::last_os_error().kind() == io::ErrorKind::Interrupted => {}
            count => return count > 0,
        }
    }
}

/// The poller's own descriptor, for embedding the loop in another one.
pub(crate) fn poll_descriptor(poll: &mio::Poll) -> BorrowedFd<'_> {
    // SAFETY: `poll` owns the descriptor and keeps it open for as long as it
    // lives, which the lifetime of the result does not exceed.
    unsafe { BorrowedFd::borrow_raw(poll.as_raw_fd()) }
}
