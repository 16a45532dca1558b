//! Pseudo-terminals, and the sizes of terminals.
//!
//! References: pty(7), ioctl_tty(2), TIOCGPTPEER(2const), TIOCSWINSZ(2const).

#![allow(unsafe_code)]

use std::fs::OpenOptions;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use super::retry;

/// Rows, columns, and width and height in pixels.
type WindowSize = [u16; 4];

/// Opens a new pseudo-terminal. Returns its master side, which is non-blocking, and its
/// slave side. Neither becomes the controlling terminal of this process. Both are
/// close-on-exec.
///
/// # Errors
/// Those of open(2): `NotFound` if /dev/ptmx is missing, `ENOSPC` if there are
/// `kernel.pty.max` already.
pub(crate) fn open_terminal() -> io::Result<(OwnedFd, OwnedFd)> {
    let master = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NOCTTY | libc::O_NONBLOCK)
        .open("/dev/ptmx")?;
    let unlocked: libc::c_int = 0;
    retry(|| {
        // SAFETY: this request reads one `int`, and `unlocked` is one, borrowed until the
        // call returns.
        unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &raw const unlocked) }
    })?;
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // Not by its path, which may be another's in a container.
    // SAFETY: takes integers only.
    let slave = retry(|| unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, flags) })?;
    // SAFETY: the kernel has just made `slave` for us; nothing else owns it.
    let slave = unsafe { OwnedFd::from_raw_fd(slave) };
    Ok((master.into(), slave))
}

/// Returns the size of a terminal, from either side.
///
/// # Errors
/// `ENOTTY` if it is not a terminal.
pub(crate) fn window_size(fd: BorrowedFd<'_>) -> io::Result<WindowSize> {
    let mut size = MaybeUninit::<libc::winsize>::zeroed();
    retry(|| {
        // SAFETY: this request writes one `winsize`, and `size` is one, borrowed for that
        // until the call returns.
        unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCGWINSZ, size.as_mut_ptr()) }
    })?;
    // SAFETY: zeroed, which is a value of this type, and filled by the call.
    let size = unsafe { size.assume_init() };
    Ok([size.ws_row, size.ws_col, size.ws_xpixel, size.ws_ypixel])
}

/// Sets the size of a terminal, from either side.
///
/// # Errors
/// `ENOTTY` if it is not a terminal.
pub(crate) fn set_window_size(fd: BorrowedFd<'_>, size: WindowSize) -> io::Result<()> {
    let [ws_row, ws_col, ws_xpixel, ws_ypixel] = size;
    let size = libc::winsize {
        ws_row,
        ws_col,
        ws_xpixel,
        ws_ypixel,
    };
    retry(|| {
        // SAFETY: this request reads one `winsize`, and `size` is one, borrowed until the
        // call returns.
        unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) }
    })?;
    Ok(())
}
