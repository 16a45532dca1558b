//! Tests of the system calls; the other side is rustix wherever there is one.

#![allow(unsafe_code)]

mod address;
mod cmsg;
mod datagram;
mod file;
mod launch;
mod msg;
mod packet;
mod process;
mod socket;
mod sweep;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::Command;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, SocketFlags, SocketType};

/// Says to a child process which test it is to be.
const CHILD: &str = "BOWLINE_SYS_TEST_CHILD";

/// A pair of connected, non-blocking UNIX sockets.
#[track_caller]
fn pair(kind: SocketType) -> (OwnedFd, OwnedFd) {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socketpair(AddressFamily::UNIX, kind, flags, None).unwrap()
}

#[track_caller]
fn stream_pair() -> (OwnedFd, OwnedFd) {
    pair(SocketType::STREAM)
}

/// A pipe whose write end is going to be passed: the read end knows when the last
/// copy is closed.
struct Passed {
    read: OwnedFd,
    write: Option<OwnedFd>,
    inode: u64,
}

impl Passed {
    #[track_caller]
    fn new() -> Self {
        let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        let inode = inode(write.as_fd());
        Self {
            read,
            write: Some(write),
            inode,
        }
    }

    fn many(count: usize) -> Vec<Self> {
        (0..count).map(|_| Self::new()).collect()
    }

    /// The end that is passed.
    #[track_caller]
    fn borrow(&self) -> BorrowedFd<'_> {
        self.write.as_ref().expect("still ours").as_fd()
    }

    /// Closes our copy.
    fn let_go(&mut self) {
        self.write = None;
    }

    fn is_open_somewhere(&self) -> bool {
        !hangs_up(
            self.read.as_fd(),
            Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            },
        )
    }

    /// Fails unless every copy gets closed. Waits, because a test in another thread
    /// that starts a process has copies until that process is up.
    #[track_caller]
    fn expect_closed_everywhere(&self) {
        let patience = Timespec {
            tv_sec: 10,
            tv_nsec: 0,
        };
        assert!(
            hangs_up(self.read.as_fd(), patience),
            "a copy of the descriptor is still open"
        );
    }
}

fn hangs_up(fd: BorrowedFd<'_>, patience: Timespec) -> bool {
    let mut watched = [PollFd::from_borrowed_fd(fd, PollFlags::empty())];
    poll(&mut watched, Some(&patience)).unwrap();
    watched[0].revents().contains(PollFlags::HUP)
}

#[track_caller]
fn inode(fd: BorrowedFd<'_>) -> u64 {
    rustix::fs::fstat(fd).unwrap().st_ino
}

#[track_caller]
fn is_close_on_exec(fd: BorrowedFd<'_>) -> bool {
    let flags = rustix::io::fcntl_getfd(fd).unwrap();
    flags.contains(rustix::io::FdFlags::CLOEXEC)
}

#[track_caller]
fn is_nonblocking(fd: BorrowedFd<'_>) -> bool {
    let flags = rustix::fs::fcntl_getfl(fd).unwrap();
    flags.contains(rustix::fs::OFlags::NONBLOCK)
}

#[track_caller]
fn expect_error<T: std::fmt::Debug>(result: io::Result<T>, kind: io::ErrorKind) {
    match result {
        Err(error) if error.kind() == kind => {}
        other => panic!("expected {kind:?}, got {other:?}"),
    }
}

/// Ends a connection. The other end sees it at once, also while a test beside this one
/// starts a process, which has copies of all descriptors for a moment.
fn end(near: impl AsFd) {
    rustix::net::shutdown(near, rustix::net::Shutdown::Both).unwrap();
}

/// Runs `body` in a process of its own that runs nothing else, because it changes or
/// counts what belongs to a whole process. `test` is the calling test's name
/// below this module.
#[track_caller]
fn in_child(test: &str, body: impl FnOnce()) {
    if std::env::var(CHILD).is_ok_and(|name| name == test) {
        body();
        return;
    }
    // The first part of the path is the crate, which test names leave out.
    let (_, here) = module_path!().split_once("::").expect("not the crate root");
    let output = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            &format!("{here}::{test}"),
            "--test-threads=1",
            "--nocapture",
        ])
        .env(CHILD, test)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    print_figures(&said);
    assert!(
        output.status.success() && said.contains("1 passed"),
        "{}\n{said}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Prints the lines of a child that are figures of the table of reliability.
#[allow(clippy::print_stdout, reason = "figures are printed to be read")]
fn print_figures(said: &str) {
    for line in said.lines().filter(|line| line.starts_with("T-")) {
        println!("\n{line}");
    }
}

/// Gives this thread a table of descriptors of its own, as tests/support/table.rs does:
/// children of other tests hold nothing of it open. Call it before anything is opened.
pub(crate) fn have_own_descriptors() {
    thread_local! {
        static HAS_OWN: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
    }
    if !HAS_OWN.replace(true) {
        let flags = libc::CLOSE_RANGE_UNSHARE as libc::c_int;
        // SAFETY: takes integers only. The thread has opened nothing yet; what others own
        // is untouched in their table.
        let result = unsafe { libc::close_range(3, libc::c_uint::MAX, flags) };
        assert_eq!(result, 0, "{}", io::Error::last_os_error());
    }
}

/// How many descriptors this process has open. Of use in a child only.
fn open_descriptors() -> usize {
    // The directory that is being read is one of them, each time.
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Answers a closure that fails with `EINTR` a few times and then succeeds.
fn interrupted<N: From<i8>>(mut times: u32) -> impl FnMut() -> N {
    move || {
        if times == 0 {
            return N::from(7);
        }
        times -= 1;
        // SAFETY: takes nothing.
        let errno = unsafe { libc::__errno_location() };
        // SAFETY: the C library answers where this thread's own errno is.
        unsafe { *errno = libc::EINTR };
        N::from(-1)
    }
}

/// Contract S-17.
#[test]
fn interrupted_calls_are_made_again() {
    assert_eq!(super::retry(interrupted(3)).unwrap(), 7);
    assert_eq!(super::retry_count(interrupted(3)).unwrap(), 7);
}
