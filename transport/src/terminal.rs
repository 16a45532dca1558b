//! The sizes of terminals.

use std::io;
use std::os::fd::BorrowedFd;

use bowline_protocol::TerminalSize;

use crate::sys;

/// The size of a terminal. `fd` may be either side of it. For example, our own standard
/// input gives the size for the terminal of a child.
///
/// # Errors
///
/// `ENOTTY` if it is no terminal.
pub fn terminal_size(fd: BorrowedFd<'_>) -> io::Result<TerminalSize> {
    let [rows, columns, width, height] = sys::window_size(fd)?;
    Ok(TerminalSize::default()
        .rows(rows)
        .columns(columns)
        .width(width)
        .height(height))
}

/// Sets the size of a terminal. `fd` may be either side of it. The processes in its
/// foreground get SIGWINCH.
///
/// # Errors
///
/// `ENOTTY` if it is no terminal.
pub fn set_terminal_size(fd: BorrowedFd<'_>, size: TerminalSize) -> io::Result<()> {
    let TerminalSize {
        rows,
        columns,
        width,
        height,
        ..
    } = size;
    sys::set_window_size(fd, [rows, columns, width, height])
}
