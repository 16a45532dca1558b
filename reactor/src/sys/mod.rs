//! The system calls that the loop itself needs and mio does not offer; and
//! closures without a box: the only place of this crate where `unsafe` stands.

#![allow(unsafe_code)]

mod call;
mod fork;
pub mod signal;
mod timerfd;

use std::os::fd::{AsRawFd, BorrowedFd};

pub(crate) use self::call::Call;
pub(crate) use self::fork::{generation, known_generation};
pub(crate) use self::timerfd::TimerFd;

/// The poller's own descriptor, for embedding the loop in another one.
pub(crate) fn poll_descriptor(poll: &mio::Poll) -> BorrowedFd<'_> {
    // SAFETY: `poll` owns the descriptor and keeps it open for as long as it
    // lives, which the lifetime of the result does not exceed.
    unsafe { BorrowedFd::borrow_raw(poll.as_raw_fd()) }
}
