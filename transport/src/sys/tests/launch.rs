//! Children that share our memory until their program begins.

use std::ffi::c_int;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32};
use std::thread;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use super::CHILD;
use crate::sys::{
    Group, Launch, Launched, Reached, child_wait, has_waiting, open_terminal, pid_of, pidfd_wait,
};

fn launch(
    command: Command,
    grants: &[(BorrowedFd<'_>, u32)],
    group: Option<Group>,
) -> Result<Launched, (Reached, io::Error)> {
    Launch::new(command, grants, &[], None, group)
        .expect("no NUL")
        .start()
}

#[track_caller]
fn status(launched: &Launched) -> ExitStatus {
    let fd = launched.pidfd.as_ref().expect("Linux 5.2");
    let mut watched = [PollFd::new(fd, PollFlags::IN)];
    while let Err(error) = poll(&mut watched, None) {
        // A handler has run; it is not called again for that.
        assert_eq!(error, Errno::INTR);
    }
    pidfd_wait(fd.as_fd()).unwrap().expect("it has exited")
}

fn command(words: &[&str]) -> Command {
    let mut command = Command::new(words[0]);
    command.args(&words[1..]);
    command
}

#[test]
fn a_launched_child_has_its_pidfd_and_its_number() {
    let (mut ours, theirs) = io::pipe().unwrap();
    let command = command(&["sh", "-c", "echo $$"]);
    let launched = launch(command, &[(theirs.as_fd(), 1)], None).unwrap();
    drop(theirs);
    let fd = launched.pidfd.as_ref().unwrap();
    assert!(super::is_close_on_exec(fd.as_fd()));
    assert_eq!(pid_of(fd.as_fd()).unwrap(), launched.pid);
    let mut said = String::new();
    ours.read_to_string(&mut said).unwrap();
    assert_eq!(said.trim(), launched.pid.to_string());
    assert!(status(&launched).success());
    // It was waited for.
    assert!(child_wait(launched.pid).is_err());
}

/// with the step and the reason, and nobody is left to be waited for.
#[test]
fn a_launched_child_that_does_not_come_to_its_program_says_how_far_it_came() {
    let null = File::open("/dev/null").unwrap();
    let failed = |command: Command, grants: &[(BorrowedFd<'_>, u32)], group| {
        let (reached, error) = launch(command, grants, group).unwrap_err();
        (reached, error.raw_os_error().unwrap_or(0))
    };
    let there = || Command::new("true");
    let missing = failed(Command::new("/nonexistent/program"), &[], None);
    assert_eq!(missing, (Reached::Program, libc::ENOENT));
    let mut elsewhere = there();
    elsewhere.current_dir("/nonexistent");
    let moved = failed(elsewhere, &[], None);
    assert_eq!(moved, (Reached::Directory, libc::ENOENT));
    let beyond = failed(there(), &[(null.as_fd(), 0x7fff_0000)], None);
    assert_eq!(beyond.0, Reached::Descriptors);
    let no_terminal = failed(there(), &[(null.as_fd(), 0)], Some(Group::Session(0)));
    assert_eq!(no_terminal, (Reached::Session, libc::ENOTTY));
    let error = Launch::new(there(), &[(null.as_fd(), u32::MAX)], &[], None, None).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
}

/// X-22, and a group without a terminal: the number of either is the child's own.
#[test]
fn a_launched_child_leads_what_it_is_to_lead() {
    let ids = "read -r line < /proc/self/stat; set -- $line; echo $$ $5 $6 $7";
    let ask = |group, input: Option<BorrowedFd<'_>>| {
        let (mut ours, theirs) = io::pipe().unwrap();
        let mut grants = vec![(theirs.as_fd(), 1)];
        grants.extend(input.map(|fd| (fd, 0)));
        let launched = launch(command(&["sh", "-c", ids]), &grants, group).unwrap();
        drop(theirs);
        let mut said = String::new();
        ours.read_to_string(&mut said).unwrap();
        assert!(status(&launched).success());
        let numbers = said.split_whitespace().map(|it| it.parse().unwrap());
        <[i32; 4]>::try_from(numbers.collect::<Vec<_>>()).unwrap()
    };
    // SAFETY: takes nothing.
    let group = unsafe { libc::getpgrp() };
    let [pid, its_group, _, _] = ask(None, None);
    assert_eq!(its_group, group);
    assert_ne!(pid, group);
    let [pid, its_group, session, _] = ask(Some(Group::Own), None);
    assert!(its_group == pid && session != pid);
    let (_holding, theirs) = open_terminal().unwrap();
    let [pid, its_group, session, terminal] = ask(Some(Group::Session(0)), Some(theirs.as_fd()));
    assert!(its_group == pid && session == pid && terminal > 0);
}

/// The handlers that have run in a process that is not the one that set them.
static STRANGE: AtomicU32 = AtomicU32::new(0);
static RUN: AtomicU32 = AtomicU32::new(0);
static OWN: AtomicI32 = AtomicI32::new(0);

extern "C" fn handle(_: c_int) {
    // SAFETY: takes nothing, and may be called in a handler.
    if unsafe { libc::getpid() } == OWN.load(Relaxed) {
        RUN.fetch_add(1, Relaxed);
    } else {
        STRANGE.fetch_add(1, Relaxed);
    }
}

/// signals to the whole group, of which such a child is, reach it by their default effect
/// or not at all: a handler would run in the memory of both.
#[test]
fn no_handler_of_ours_runs_in_a_launched_child() {
    if std::env::var_os(CHILD).is_some() {
        return under_a_flood_of_signals();
    }
    let name = "sys::tests::launch::no_handler_of_ours_runs_in_a_launched_child";
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", name, "--test-threads=1", "--nocapture"]);
    command
        .env(CHILD, "1")
        .process_group(0)
        .stdin(Stdio::null());
    let output = command.output().unwrap();
    assert!(output.status.success(), "{output:?}");
}

/// Sets it when this is dropped.
struct Sets<'a>(&'a AtomicBool);

impl Drop for Sets<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

fn under_a_flood_of_signals() {
    // SAFETY: takes nothing.
    OWN.store(unsafe { libc::getpid() }, Relaxed);
    let handler = handle as extern "C" fn(c_int) as libc::sighandler_t;
    // SAFETY: the handler calls what a handler may call.
    let before = unsafe { libc::signal(libc::SIGUSR1, handler) };
    assert_ne!(before, libc::SIG_ERR);
    let is_done = AtomicBool::new(false);
    let mut killed = 0;
    thread::scope(|scope| {
        scope.spawn(|| {
            while !is_done.load(Relaxed) {
                // SAFETY: takes integers only. The group is this process and its children.
                unsafe { libc::kill(0, libc::SIGUSR1) };
            }
        });
        // Also where something below fails.
        let _ends = Sets(&is_done);
        for _ in 0..300 {
            let launched = launch(command(&["/bin/true"]), &[], None).unwrap();
            let status = status(&launched);
            assert!(
                status.success() || status.signal() == Some(libc::SIGUSR1),
                "{status}"
            );
            killed += u32::from(!status.success());
        }
    });
    // The premise.
    assert!(RUN.load(Relaxed) > 0 && killed > 0, "{killed} were killed");
    assert_eq!(STRANGE.load(Relaxed), 0);
}

/// of this thread, whatever it had blocked.
#[test]
fn the_mask_of_who_launches_is_as_before() {
    let blocked = || {
        let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
        let line = status.lines().find(|line| line.starts_with("SigBlk:"));
        line.unwrap().to_owned()
    };
    let before = blocked();
    let launched = launch(
        command(&["grep", "-q", "SigBlk:.0*$", "/proc/self/status"]),
        &[],
        None,
    );
    assert_eq!(blocked(), before);
    assert!(status(&launched.unwrap()).success());
    launch(command(&["/nonexistent/program"]), &[], None).unwrap_err();
    assert_eq!(blocked(), before);
}

/// without a free number for its pidfd a child starts all the same.
#[test]
fn a_child_without_a_pidfd_is_waited_for_by_its_number() {
    if std::env::var_os(CHILD).is_none() {
        let name = "sys::tests::launch::a_child_without_a_pidfd_is_waited_for_by_its_number";
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", name, "--test-threads=1"]);
        command.env(CHILD, "1").stdin(Stdio::null());
        let output = command.output().unwrap();
        assert!(output.status.success(), "{output:?}");
        return;
    }
    let lowered = libc::rlimit {
        rlim_cur: 64,
        rlim_max: 1_024,
    };
    // SAFETY: reads the limit that it is given.
    let limited = unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const lowered) };
    assert_eq!(limited, 0);
    // The child has all of these free again.
    let open = || File::open("/dev/null").ok();
    let all: Vec<File> = std::iter::from_fn(open).collect();
    assert!(!all.is_empty());
    let launched = launch(command(&["/bin/sh", "-c", "exit 3"]), &[], None);
    let launched = launched.unwrap();
    assert!(launched.pidfd.is_none());
    let status = loop {
        if let Some(status) = child_wait(launched.pid).unwrap() {
            break status;
        }
        thread::yield_now();
    };
    assert_eq!(status.code(), Some(3));
    let (reached, error) = launch(command(&["/nonexistent"]), &[], None).unwrap_err();
    assert_eq!(
        (reached, error.raw_os_error()),
        (Reached::Program, Some(libc::ENOENT))
    );
    // SAFETY: takes integers, and a null pointer where one may stand.
    let left = unsafe { libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG) };
    assert_eq!(left, -1, "a child was left");
}

/// A failure is told where exits are not.
#[test]
fn a_failure_is_told_though_children_are_not_to_be_waited_for() {
    if std::env::var_os(CHILD).is_none() {
        let name = "sys::tests::launch::a_failure_is_told_though_children_are_not_to_be_waited_for";
        let mut command = Command::new("env");
        command.arg("--ignore-signal=CHLD");
        command.arg(std::env::current_exe().unwrap());
        command.args(["--exact", name, "--test-threads=1"]);
        command.env(CHILD, "1").stdin(Stdio::null());
        let output = command.output().unwrap();
        assert!(output.status.success(), "{output:?}");
        return;
    }
    let (reached, error) = launch(command(&["/nonexistent"]), &[], None).unwrap_err();
    assert_eq!(
        (reached, error.raw_os_error()),
        (Reached::Program, Some(libc::ENOENT))
    );
    let launched = launch(command(&["/bin/true"]), &[], None).unwrap();
    let fd = launched.pidfd.as_ref().unwrap();
    let mut watched = [PollFd::new(fd, PollFlags::IN)];
    poll(&mut watched, None).unwrap();
    assert!(has_waiting(fd.as_fd()).unwrap());
}
