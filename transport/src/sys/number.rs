//! Descriptor numbers: how many a process may use, and whether one is high.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};

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

/// Closes descriptors, those whose numbers follow each other by one call. Nothing is
/// allocated.
#[doc(alias = "close_range")]
pub(crate) fn close_all(descriptors: impl IntoIterator<Item = OwnedFd>) {
    let mut run = Run { first: 0, end: 0 };
    for fd in descriptors {
        run.add(fd);
    }
}

/// Numbers to be closed, from the first on and below the end. Dropping it closes them.
///
/// Invariant: all of them are ours, and nobody else's.
struct Run {
    first: RawFd,
    end: RawFd,
}

impl Run {
    #[inline]
    fn add(&mut self, fd: OwnedFd) {
        let number = fd.into_raw_fd();
        if number != self.end {
            self.close();
            self.first = number;
        }
        self.end = number + 1;
    }

    fn close(&mut self) {
        let numbers = self.first..self.end;
        self.first = self.end;
        if numbers.len() > 1 {
            // SAFETY: takes integers only. Each of these is ours to close.
            let result =
                unsafe { libc::syscall(libc::SYS_close_range, numbers.start, numbers.end - 1, 0) };
            if result == 0 {
                return;
            }
            // Not before Linux 5.9, and not everywhere. Then none was closed.
        }
        for number in numbers {
            // SAFETY: it was an `OwnedFd` until `add` took it, and nobody else has it.
            drop(unsafe { OwnedFd::from_raw_fd(number) });
        }
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        self.close();
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;
    use crate::sys::tests::have_own_descriptors;

    /// Whether each of these numbers is open.
    fn are_open(numbers: &[RawFd]) -> Vec<bool> {
        let is_open = |number: &RawFd| {
            // SAFETY: takes integers only.
            unsafe { libc::fcntl(*number, libc::F_GETFD) != -1 }
        };
        numbers.iter().map(is_open).collect()
    }

    #[test]
    fn exactly_what_was_given_is_closed() {
        have_own_descriptors();
        for order in [
            &[][..],
            &[0],
            &[0, 1, 2, 3, 4, 5],
            &[5, 4, 3, 2, 1, 0],
            &[0, 1, 3, 4],
            &[1, 2, 0, 5],
            &[5, 0],
        ] {
            let mut all: Vec<Option<OwnedFd>> = (0..6)
                .map(|_| Some(File::open("/dev/null").expect("Linux has it").into()))
                .collect();
            let numbers: Vec<RawFd> = all.iter().flatten().map(AsRawFd::as_raw_fd).collect();
            let given: Vec<_> = order.iter().filter_map(|it| all[*it].take()).collect();
            close_all(given);
            let kept: Vec<bool> = all.iter().map(Option::is_some).collect();
            assert_eq!(are_open(&numbers), kept, "{order:?}");
        }
    }

    #[test]
    fn what_was_given_is_closed_although_the_giver_panics() {
        have_own_descriptors();
        let mut given = vec![
            OwnedFd::from(File::open("/dev/null").expect("Linux has it")),
            OwnedFd::from(File::open("/dev/null").expect("Linux has it")),
        ];
        let numbers: Vec<RawFd> = given.iter().map(AsRawFd::as_raw_fd).collect();
        let giver = std::iter::from_fn(move || Some(given.pop().expect("no more")));
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| close_all(giver)));
        assert!(result.is_err());
        assert_eq!(are_open(&numbers), [false, false]);
    }
}
