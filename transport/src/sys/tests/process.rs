//! What children are given, and what they take.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::thread;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{FdFlags, fcntl_setfd};

use super::CHILD;
use crate::sys::{
    CleanStart, Reached, Recipient, exit_descriptor, is_no_process, open_terminal, pid_of,
    pidfd_open, pidfd_send_signal, pidfd_wait, remove_environment, send_signal, set_window_size,
    spawn, spawn_announced, take_granted, take_inherited, window_size,
};

/// Prints the numbers of all descriptors that it has, each with its file.
///
/// One of those that it finds is the shell's own, and closed by the time of the
/// test.
const LIST: &str =
    "for fd in /proc/$$/fd/*; do [ -L $fd ] && echo ${fd##*/} $(readlink $fd); done; true";

/// A file of its own, that says `name`.
fn file(name: &str) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(name.as_bytes()).unwrap();
    file
}

fn shell(script: &str) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", script]);
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    command
}

#[track_caller]
fn output(command: Command, grants: &[(&File, u32)]) -> String {
    let grants: Vec<_> = grants
        .iter()
        .map(|(file, number)| (file.as_fd(), *number))
        .collect();
    let child = spawn(command, &grants).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", output.status);
    String::from_utf8(output.stdout).unwrap()
}

/// The numbers above the standard streams in what [`LIST`] printed.
fn numbers(listing: &str) -> Vec<u32> {
    let numbers = listing.lines().filter_map(|line| line.split(' ').next());
    let mut numbers: Vec<u32> = numbers
        .map(|number| number.parse().unwrap())
        .filter(|number| *number > 2)
        .collect();
    numbers.sort_unstable();
    numbers
}

/// W-64: also what this process holds without close-on-exec, inherited
/// by its parent's mistake, say, stays here.
#[test]
fn child_has_exactly_the_granted_descriptors() {
    let (one, other) = (file("one"), file("other"));
    let careless = file("careless");
    fcntl_setfd(&careless, FdFlags::empty()).unwrap();
    let listing = output(shell(LIST), &[(&one, 3), (&other, 42)]);
    assert_eq!(numbers(&listing), [3, 42], "{listing}");
    let listing = output(shell(LIST), &[]);
    assert_eq!(numbers(&listing), [0; 0], "{listing}");
}

///
#[test]
fn numbers_may_overlap_and_be_swapped() {
    let files: Vec<_> = ["a", "b", "c"].map(file).into_iter().collect();
    let at = |index: usize| u32::try_from(files[index].as_raw_fd()).unwrap();
    // The first two swapped; the last stays where it is, which dup2(2) would
    // leave close-on-exec.
    let grants = [(&files[0], at(1)), (&files[1], at(0)), (&files[2], at(2))];
    let listing = output(shell(LIST), &grants);
    let link = |file: &File| {
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        std::fs::read_link(path).unwrap().display().to_string()
    };
    for (file, number) in grants {
        let line = format!("{number} {}", link(file));
        assert!(
            listing.lines().any(|each| each == line),
            "{line}\n{listing}"
        );
    }
}

/// X-21, W-62: said by the call itself, and nowhere else. The socket on which std learns
/// of it has a number too.
#[test]
fn failed_exec_is_reported_and_not_written_to_what_was_granted() {
    let file = file("");
    let grants: Vec<_> = (3..64).map(|number| (file.as_fd(), number)).collect();
    let error = spawn(Command::new("/nonexistent/program"), &grants).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::NotFound);
    assert_eq!(file.metadata().unwrap().len(), 0);
}

/// Numbers that another thread has may become free, and std's, at any moment.
#[test]
fn failed_exec_is_reported_while_other_threads_open_and_close() {
    let file = file("");
    let is_over = AtomicBool::new(false);
    let errors: Vec<_> = thread::scope(|scope| {
        scope.spawn(|| {
            while !is_over.load(Relaxed) {
                let held = [(); 8].map(|()| file.try_clone().unwrap());
                thread::yield_now();
                drop(held);
            }
        });
        let grants: Vec<_> = (3..64).map(|number| (file.as_fd(), number)).collect();
        let spawn = |_| spawn(Command::new("/nonexistent/program"), &grants);
        let errors = (0..200).map(spawn).map(|spawned| spawned.map(drop));
        let errors = errors.collect();
        is_over.store(true, Relaxed);
        errors
    });
    for error in errors {
        assert_eq!(error.unwrap_err().kind(), io::ErrorKind::NotFound);
    }
    assert_eq!(file.metadata().unwrap().len(), 0);
}

#[test]
fn standard_streams_and_numbers_given_twice_are_refused() {
    let file = file("");
    for grants in [
        [(file.as_fd(), 2), (file.as_fd(), 5)],
        [(file.as_fd(), 5); 2],
    ] {
        let error = spawn(Command::new("true"), &grants).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }
}

/// E-13: also by those who name it without having been given it.
#[test]
fn granted_descriptor_is_taken_once_and_not_inherited_further() {
    const NUMBER: u32 = 93;
    if std::env::var_os(CHILD).is_some() {
        let ours = file("made here");
        let made_here = u32::try_from(ours.as_raw_fd()).unwrap();
        let kind = |number| take_granted(number).unwrap_err().kind();
        assert_eq!(kind(2), io::ErrorKind::InvalidInput);
        assert_eq!(kind(NUMBER + 1), io::ErrorKind::NotFound);
        assert_eq!(kind(made_here), io::ErrorKind::AlreadyExists);
        // Looks like one that was inherited.
        fcntl_setfd(&ours, FdFlags::empty()).unwrap();
        assert_eq!(kind(made_here), io::ErrorKind::NotFound);
        let taken: OwnedFd = take_granted(NUMBER).unwrap();
        assert!(
            rustix::io::fcntl_getfd(&taken)
                .unwrap()
                .contains(FdFlags::CLOEXEC)
        );
        assert_eq!(kind(NUMBER), io::ErrorKind::AlreadyExists);
        drop(taken);
        // Even when something else has the number by now.
        assert_eq!(kind(NUMBER), io::ErrorKind::AlreadyExists);
        println!("taken once");
        return;
    }
    let said = output(
        this_test("granted_descriptor_is_taken_once_and_not_inherited_further"),
        &[(&file("given"), NUMBER)],
    );
    assert!(said.contains("taken once"), "{said}");
}

/// This binary as a child that runs one test, in which [`CHILD`] is set.
fn this_test(name: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", "--nocapture", "--test-threads=1"])
        .arg(format!("sys::tests::process::{name}"))
        .env(CHILD, name)
        .stdout(Stdio::piped());
    command
}

/// Names alone are no grant: the file has to be the one that was given, and variables of
/// another process are left over where a child of a child has them.
#[test]
fn what_is_named_and_was_not_given_is_not_taken() {
    // As high as a shell takes them.
    const NUMBER: u32 = 9;
    if std::env::var_os(CHILD).is_some() {
        // Inherited, by way of a shell, and not what the variable says.
        assert_eq!(
            take_granted(NUMBER).unwrap_err().kind(),
            io::ErrorKind::NotFound
        );
        // SAFETY: the shell has opened it for this test alone.
        let taken = unsafe { take_inherited(NUMBER) }.unwrap();
        assert_eq!(
            // SAFETY: refused, as it was taken.
            unsafe { take_inherited(NUMBER) }.unwrap_err().kind(),
            io::ErrorKind::AlreadyExists
        );
        drop(taken);
        println!("not taken");
        return;
    }
    let name = "what_is_named_and_was_not_given_is_not_taken";
    for variables in [
        "BOWLINE_DESCRIPTORS=9:1:1",
        "BOWLINE_DESCRIPTORS=9",
        "BOWLINE_DESCRIPTORS=,:,::,9::",
        "LISTEN_FDS=200 LISTEN_PID=1",
        "LISTEN_FDS=2 LISTEN_PID=$$",
        "LISTEN_FDS=200",
    ] {
        let mut command = shell(&format!(
            "export {variables}; exec \"$0\" \"$@\" {NUMBER}</dev/null"
        ));
        let test = this_test(name);
        command.arg(test.get_program()).args(test.get_args());
        command.env(CHILD, name);
        let said = output(command, &[]);
        assert!(said.contains("not taken"), "{variables}: {said}");
    }
}

/// E-13: the test harness itself runs threads, so this is where it is refused;
/// that it works is seen of a program without them, in `tests/examples.rs`.
#[test]
fn environment_is_left_alone_once_threads_run() {
    let running = thread::spawn(|| {
        let error = remove_environment(&["PATH"]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::Unsupported);
    });
    running.join().unwrap();
    assert!(std::env::var_os("PATH").is_some());
}

/// It says when, and is close-on-exec.
#[test]
fn exit_of_a_child_makes_a_descriptor_readable() {
    let is_readable = |fd: &OwnedFd, seconds| {
        let patience = Timespec {
            tv_sec: seconds,
            tv_nsec: 0,
        };
        let mut watched = [PollFd::new(fd, PollFlags::IN)];
        poll(&mut watched, Some(&patience)).unwrap() == 1
    };
    let mut command = shell("read line");
    let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
    let fd = exit_descriptor(&mut child).unwrap().unwrap();
    assert!(super::is_close_on_exec(fd.as_fd()));
    assert!(!is_readable(&fd, 0));
    drop(child.stdin.take());
    assert!(is_readable(&fd, 10));
    child.wait().unwrap();
    assert!(exit_descriptor(&mut child).unwrap().is_none());
}

fn ends_with(script: &str) -> (OwnedFd, Child) {
    let mut child = shell(script).stdin(Stdio::piped()).spawn().unwrap();
    let fd = pidfd_open(child.id()).unwrap();
    assert!(super::is_close_on_exec(fd.as_fd()));
    assert_eq!(pidfd_wait(fd.as_fd()).unwrap(), None);
    drop(child.stdin.take());
    (fd, child)
}

fn wait_until_readable(fd: &OwnedFd) {
    let patience = Timespec {
        tv_sec: 10,
        tv_nsec: 0,
    };
    let mut watched = [PollFd::new(fd, PollFlags::IN)];
    assert_eq!(poll(&mut watched, Some(&patience)).unwrap(), 1);
}

/// X-09, as waitid(2) says it.
#[test]
fn how_a_process_ended_is_told_by_its_descriptor() {
    for (script, code, signal) in [
        ("read line; exit 0", Some(0), None),
        ("read line; exit 200", Some(200), None),
        ("read line; kill -KILL $$", None, Some(9)),
        ("read line; kill -TERM $$", None, Some(15)),
    ] {
        let (fd, child) = ends_with(script);
        wait_until_readable(&fd);
        let status = pidfd_wait(fd.as_fd()).unwrap().expect("it has ended");
        assert_eq!((status.code(), status.signal()), (code, signal), "{script}");
        // It was waited for by that.
        let is_there = std::path::Path::new(&format!("/proc/{}", child.id())).exists();
        assert!(!is_there, "{script}");
        // Asked again it is known since Linux 6.15, or an error, and never another's.
        match pidfd_wait(fd.as_fd()) {
            Ok(again) => assert_eq!(again, Some(status)),
            Err(error) => assert_eq!(error.raw_os_error(), Some(libc::ECHILD)),
        }
        let error = pidfd_send_signal(fd.as_fd(), 0, Recipient::Process).unwrap_err();
        assert!(is_no_process(&error));
        assert!(is_no_process(&pid_of(fd.as_fd()).unwrap_err()));
    }
}

#[test]
fn a_process_that_is_no_child_has_not_ended_while_it_runs() {
    let own = pidfd_open(std::process::id()).unwrap();
    assert_eq!(pid_of(own.as_fd()).unwrap(), std::process::id());
    assert_eq!(pidfd_wait(own.as_fd()).unwrap(), None);
    pidfd_send_signal(own.as_fd(), 0, Recipient::Process).unwrap();
    assert!(is_no_process(&pidfd_open(u32::MAX).unwrap_err()));
    let file = file("no process");
    assert_eq!(
        pid_of(file.as_fd()).unwrap_err().kind(),
        io::ErrorKind::InvalidInput
    );
}

/// W-65: never to a number that could mean everybody.
#[test]
fn signals_reach_the_group_of_a_process_and_nobody_without_a_number() {
    let mut command = shell("cat | cat");
    let mut child = command
        .stdin(Stdio::piped())
        .process_group(0)
        .spawn()
        .unwrap();
    let fd = pidfd_open(child.id()).unwrap();
    match pidfd_send_signal(fd.as_fd(), libc::SIGTERM, Recipient::Group) {
        Ok(()) => {}
        // Before Linux 6.9.
        Err(_) => send_signal(child.id(), libc::SIGTERM, Recipient::Group).unwrap(),
    }
    assert_eq!(child.wait().unwrap().signal(), Some(libc::SIGTERM));
    for number in [0, 1, u32::MAX] {
        let error = send_signal(number, 0, Recipient::Group).unwrap_err();
        assert!(is_no_process(&error), "{number}");
    }
}

/// how far a child came says the step.
#[test]
fn a_child_that_does_not_come_to_its_program_says_how_far_it_came() {
    let started = |command: Command, start: &CleanStart| {
        let nothing = |_: &mut Command| Ok(None);
        spawn_announced(command, &[], Some(start), nothing)
    };
    let start = CleanStart::new(None).unwrap();
    let error = started(Command::new("/nonexistent/program"), &start).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::NotFound);
    assert_eq!(start.reached(), Reached::Program);
    let mut command = Command::new("true");
    command.current_dir("/nonexistent");
    started(command, &start).unwrap_err();
    assert_eq!(start.reached(), Reached::Std);
    // Its standard input is no terminal.
    let mut command = Command::new("true");
    command.stdin(Stdio::null());
    let controlled = CleanStart::new(Some(0)).unwrap();
    started(command, &controlled).unwrap_err();
    assert_eq!(controlled.reached(), Reached::Session);
    let mut child = started(Command::new("true"), &start).unwrap();
    assert!(child.wait().unwrap().success());
    assert_eq!(start.reached(), Reached::Program);
}

///
#[test]
fn a_terminal_has_two_sides_and_a_size() {
    let (holding, other) = open_terminal().unwrap();
    assert!(super::is_close_on_exec(holding.as_fd()));
    assert!(super::is_close_on_exec(other.as_fd()));
    set_window_size(holding.as_fd(), [1, 2, 3, 4]).unwrap();
    assert_eq!(window_size(other.as_fd()).unwrap(), [1, 2, 3, 4]);
    let mut holding = File::from(holding);
    let nothing = io::Read::read(&mut holding, &mut [0; 8]).unwrap_err();
    assert_eq!(nothing.kind(), io::ErrorKind::WouldBlock);
    holding.write_all(b"line\n").unwrap();
    let mut line = [0; 8];
    let count = io::Read::read(&mut File::from(other), &mut line).unwrap();
    assert_eq!(&line[..count], b"line\n");
    let file = file("no terminal");
    assert!(window_size(file.as_fd()).is_err());
    assert!(set_window_size(file.as_fd(), [1, 1, 0, 0]).is_err());
}
