//! What is no socket.

use std::io::{ErrorKind, IoSlice};
use std::os::fd::AsFd;

use super::{expect_error, in_child};
use crate::sys::file::{read_at_once, without_signal, write, write_at_once};

/// Contract F-10.
#[test]
fn sigpipe_is_never_raised_by_a_pipe() {
    in_child("file::sigpipe_is_never_raised_by_a_pipe", || {
        // SAFETY: sets a default disposition; no handler is involved.
        unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
        let (reading, writing) = std::io::pipe().unwrap();
        drop(reading);
        let data = [IoSlice::new(b"x")];
        expect_error(write_at_once(writing.as_fd(), &data), ErrorKind::BrokenPipe);
        expect_error(write(writing.as_fd(), &data), ErrorKind::BrokenPipe);
        // As on a kernel that cannot be told.
        let old = || {
            without_signal(|| {
                let sent = rustix::io::write(&writing, b"x");
                sent.map_err(std::io::Error::from)
            })
        };
        expect_error(old(), ErrorKind::BrokenPipe);
        expect_error(old(), ErrorKind::BrokenPipe);
        // It is not held back any more than before.
        // SAFETY: a set is plain bytes, all of which may be zero.
        let mut mask: libc::sigset_t = unsafe { std::mem::zeroed() };
        // SAFETY: changes nothing, and writes to `mask`, which is borrowed for that.
        unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, std::ptr::null(), &raw mut mask) };
        // SAFETY: reads `mask`, which is a set.
        let is_blocked = unsafe { libc::sigismember(&raw const mask, libc::SIGPIPE) };
        assert_eq!(is_blocked, 0);
    });
}

#[test]
fn a_pipe_that_blocks_is_read_and_filled_at_once() {
    let (reading, writing) = std::io::pipe().unwrap();
    let mut room = [0; 65_536];
    expect_error(
        read_at_once(reading.as_fd(), &mut room),
        ErrorKind::WouldBlock,
    );
    let all = vec![7; 1 << 20];
    let sent = write_at_once(writing.as_fd(), &[IoSlice::new(&all)]).unwrap();
    assert_eq!(sent, 65_536);
    expect_error(
        write_at_once(writing.as_fd(), &[IoSlice::new(&all)]),
        ErrorKind::WouldBlock,
    );
    assert_eq!(read_at_once(reading.as_fd(), &mut room).unwrap(), 65_536);
}
