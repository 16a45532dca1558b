//! Waiting for other processes, by what the kernel announces of them.

use std::fs;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::process::{Child, ExitStatus};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::inotify;
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// Whether a process runs. One that nobody has waited for yet does not.
pub(crate) fn is_running(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"));
    stat.is_ok_and(|stat| !stat.contains(") Z "))
}

/// Waits for something to read, or the end of the time; whether there is something.
#[track_caller]
fn is_readable_by(fd: BorrowedFd<'_>, deadline: Instant) -> bool {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = left.try_into().expect("less than a lifetime");
        match poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&left)) {
            Ok(count) => return count > 0,
            Err(Errno::INTR) => {}
            Err(error) => panic!("poll: {error}"),
        }
    }
}

/// Whether a process ends within that time, whoever's child it is.
fn ends_within(pid: u32, limit: Duration) -> bool {
    let deadline = Instant::now() + limit;
    let named = Pid::from_raw(pid.cast_signed()).expect("a process");
    match pidfd_open(named, PidfdFlags::empty()) {
        Ok(watched) => is_readable_by(watched.as_fd(), deadline),
        Err(Errno::SRCH) => true,
        Err(error) => panic!("cannot watch the process {pid}: {error}"),
    }
}

/// Waits until a process has ended, whoever's child it is.
#[track_caller]
pub(crate) fn await_end_of(pid: u32, limit: Duration) {
    let has_ended = ends_within(pid, limit);
    assert!(has_ended, "the process {pid} does not end within {limit:?}");
}

/// Waits until a child has ended; kills it if it does not.
#[track_caller]
pub(crate) fn await_exit(child: &mut Child, limit: Duration) -> ExitStatus {
    let has_ended = ends_within(child.id(), limit);
    if !has_ended {
        child.kill().expect("it is ours");
    }
    let status = child.wait().expect("it is ours");
    assert!(has_ended, "it does not end within {limit:?}: {status}");
    status
}

/// Asks again whenever a file of the folder is made or written to, until there is an answer.
/// If there is none in time, says `what` there should be.
#[track_caller]
pub(crate) fn await_in<T>(
    folder: &Path,
    limit: Duration,
    what: impl Fn() -> String,
    mut ask: impl FnMut() -> Option<T>,
) -> T {
    let deadline = Instant::now() + limit;
    let flags = inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK;
    let watch = inotify::init(flags).expect("inotify");
    let changes =
        inotify::WatchFlags::CREATE | inotify::WatchFlags::MODIFY | inotify::WatchFlags::MOVED_TO;
    inotify::add_watch(&watch, folder, changes).expect("the folder is there");
    let mut buffer = [MaybeUninit::uninit(); 4096];
    // Watched first: no change is missed in between.
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        let is_changed = is_readable_by(watch.as_fd(), deadline);
        assert!(is_changed, "not within {limit:?}: {}", what());
        let mut reader = inotify::Reader::new(&watch, &mut buffer);
        while reader.next().is_ok() {}
    }
}
