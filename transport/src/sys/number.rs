//! Descriptor numbers: how many a process may use, and whether one is high.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use super::retry;

/// Returns how many descriptor numbers this process may use: those below the returned one.
/// Another process can change the limit at any time.
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

/// Whether `fd` has this number or a higher one. The kernel gives out the lowest free
/// number, so all below were taken when `fd` was made.
#[inline]
pub(crate) fn reaches(fd: BorrowedFd<'_>, number: i32) -> bool {
    fd.as_raw_fd() >= number
}

/// Returns the lowest free number. It is found with a copy of `fd`, which is closed again.
///
/// # Errors
/// `EMFILE` if no number is free. Otherwise the kernel's.
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
