//! Tests that need a process of their own: for limits, users, and what cannot
//! be taken back.

#![allow(clippy::print_stdout, reason = "figures are printed to be read")]

use std::process::Command;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{
    Pid, PidfdFlags, Resource, Rlimit, Signal, getpid, getrlimit, kill_process, pidfd_open,
    setrlimit,
};

use super::{DescriptorLedger, open_descriptors, table};

/// Says to a process, and to all that it starts, which test they belong to: by the number
/// of its process.
const OWNER: &str = "BOWLINE_TEST_OWNER";

/// Has what is started know which test it belongs to: this process, or whoever this one
/// belongs to.
pub(crate) fn owned(command: &mut Command) -> &mut Command {
    match std::env::var_os(OWNER) {
        Some(_) => command,
        None => command.env(OWNER, std::process::id().to_string()),
    }
}

/// Ends this process when the test that it belongs to has: however that ends, and
/// whoever has started this one. (A signal at the death of a parent is no help, since the
/// parent of a successor ends first.)
pub(crate) fn end_with_owner() {
    let owner = std::env::var(OWNER).expect("it was started by a test");
    let owner = owner.parse().ok().and_then(Pid::from_raw);
    let kill = || kill_process(getpid(), Signal::KILL).expect("ourselves");
    let Ok(owner) = pidfd_open(owner.expect("a number"), PidfdFlags::empty()) else {
        return kill();
    };
    std::thread::spawn(move || {
        let mut watched = [PollFd::new(&owner, PollFlags::IN)];
        while poll(&mut watched, None).is_err() {}
        kill();
    });
}

/// Set in the process that runs only one test.
const IS_CHILD: &str = "BOWLINE_TEST_CHILD";

/// Runs `test` in a process of its own, which is the test binary told to run
/// only the test `name` of the module `module` (`module_path!()`).
#[track_caller]
pub(crate) fn in_own_process(module: &str, name: &str, test: impl FnOnce()) {
    in_own_process_with(module, name, |_| (), test);
}

/// As [`in_own_process`]; `prepare` adds to the command that starts it, and
/// answers what is to be kept until it has ended.
#[track_caller]
pub(crate) fn in_own_process_with<K>(
    module: &str,
    name: &str,
    prepare: impl FnOnce(&mut Command) -> K,
    test: impl FnOnce(),
) {
    if std::env::var_os(IS_CHILD).is_some() {
        table::keep_that_of_the_process();
        return test();
    }
    let ledger = DescriptorLedger::open();
    let module = module.split_once("::").expect("a module").1;
    let mut command = Command::new(std::env::current_exe().expect("it runs"));
    command
        .args(["--exact", &format!("{module}::{name}"), "--nocapture"])
        .arg("--test-threads=1")
        .env(IS_CHILD, "1");
    let kept = prepare(&mut command);
    let output = command.output().expect("it starts");
    drop(kept);
    let (out, err) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    // Its figures are ours.
    for line in out.lines().filter(|line| line.starts_with("T-")) {
        println!("\n{line}");
    }
    assert!(output.status.success(), "{out}{err}");
    assert!(out.contains("1 passed"), "it ran: {out}{err}");
    ledger.assert_balanced();
}

/// Sets the limit of descriptors, of this process and, for those in flight, of
/// its user.
pub(crate) fn limit_descriptors(current: u64) {
    let limit = getrlimit(Resource::Nofile);
    let lowered = Rlimit {
        current: Some(current),
        ..limit
    };
    setrlimit(Resource::Nofile, lowered).expect("below the maximum");
}

/// The limit that leaves `free` descriptors.
pub(crate) fn leave_free(free: usize) {
    let taken = open_descriptors();
    // Numbers below the limit that are taken stay so; count upwards.
    let mut limit = 0;
    let mut left = free;
    while left > 0 || taken.contains(&limit) {
        if !taken.contains(&limit) {
            left -= 1;
        }
        limit += 1;
    }
    limit_descriptors(limit as u64);
}

/// Sets the limit of descriptors in flight, which holds for all processes of a
/// user together: `user` is to be one that no other test has. The superuser,
/// who has no such limit, becomes that user; anybody else stays who they are.
pub(crate) fn limit_in_flight(user: u32, limit: u64) {
    limit_descriptors(limit);
    if rustix::process::geteuid().is_root() {
        // The kernel goes by this thread.
        let user = rustix::process::Uid::from_raw(user);
        rustix::thread::set_thread_res_uid(user, user, user).expect("as root");
    }
}

/// How long this thread has been on a processor, in nanoseconds.
pub(crate) fn thread_time() -> u64 {
    let times = std::fs::read_to_string("/proc/thread-self/schedstat").expect("Linux has it");
    let first = times.split(' ').next().expect("three numbers");
    first.parse().expect("a number")
}

/// What of this process is in memory, in bytes.
pub(crate) fn resident_bytes() -> u64 {
    let sizes = std::fs::read_to_string("/proc/self/statm").expect("Linux has it");
    let pages: u64 = sizes
        .split(' ')
        .nth(1)
        .expect("seven")
        .parse()
        .expect("a number");
    pages * 4096
}
