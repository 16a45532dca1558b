//! A timer that epoll can wait for.
//!
//! epoll_wait(2) takes its timeout in whole milliseconds, and mio rounds up:
//! half a millisecond late on average. A timer descriptor has the clock's own
//! resolution and no timer slack.
//!
//! References: timerfd_create(2).

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr;
use std::time::Duration;

/// A one-shot timer on the monotonic clock.
#[derive(Debug)]
pub(crate) struct TimerFd {
    fd: OwnedFd,
}

impl TimerFd {
    pub(crate) fn new() -> io::Result<Self> {
        // SAFETY: the call takes no pointers.
        let fd = unsafe {
            libc::timerfd_create(
                libc::CLOCK_MONOTONIC,
                libc::TFD_NONBLOCK | libc::TFD_CLOEXEC,
            )
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just given us this descriptor, and nobody
        // else knows its number.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Self { fd })
    }

    /// Expires once, `after` from now; replaces what was set before.
    ///
    /// It never has to be read: setting it anew clears the count of
    /// expirations, and the next one is a new edge.
    pub(crate) fn set(&self, after: Duration) -> io::Result<()> {
        let zero = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // A value of zero would disarm the timer.
        let after = after.max(Duration::from_nanos(1));
        let value = libc::itimerspec {
            it_interval: zero,
            it_value: libc::timespec {
                tv_sec: libc::time_t::try_from(after.as_secs()).unwrap_or(libc::time_t::MAX),
                tv_nsec: libc::c_long::from(after.subsec_nanos() as i32),
            },
        };
        // SAFETY: `value` outlives the call, the kernel copies it, and a null
        // old value is allowed.
        let result =
            unsafe { libc::timerfd_settime(self.fd.as_raw_fd(), 0, &value, ptr::null_mut()) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

impl AsFd for TimerFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_duration_is_accepted() {
        let timer = TimerFd::new().unwrap();
        for after in [Duration::ZERO, Duration::from_micros(50), Duration::MAX] {
            timer.set(after).unwrap();
        }
    }
}
