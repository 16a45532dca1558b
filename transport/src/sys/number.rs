//! Descriptor numbers, of which a process has so many: how many there are, and
//! whether one is high.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use super::retry;

/// How many descriptor numbers this process may use, the numbers below this one;
/// another process can change it at any time.
///
/// # Errors
/// The kernel's.
#[doc(alias = "RLIMIT_NOFILE")]
pub(crate) fn descriptor_limit() -> io::Result<u64> {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    retry(|| {
        // SAFETY: `limit` is what the call writes, and outlives it.
        unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) }
    })?;
    Ok(limit.rlim_cur)
}

/// Whether `fd` has this number or a higher one. The kernel gives out the lowest
/// that is free, so all below were taken when it was made.
#[inline]
pub(crate) fn reaches(fd: BorrowedFd<'_>, number: i32) -> bool {
    fd.as_raw_fd() >= number
}

/// The lowest number that is free; looked for with a copy of `fd`, which is
/// closed again.
///
/// # Errors
/// The kernel's; `EMFILE` where none is.
pub(crate) fn lowest_free(fd: BorrowedFd<'_>) -> io::Result<i32> {
    let number = retry(|| {
        // SAFETY: takes integers only.
        unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 0) }
    })?;
    // SAFETY: the call has just made this descriptor for us; nothing else owns
    // it. A copy: dropping it closes nothing but the number.
    drop(unsafe { OwnedFd::from_raw_fd(number) });
    Ok(number)
}
