//! Children that do not end by themselves: time limits, groups, what they leave behind.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use bowline::process::{
    ChildCommand, ChildProcess as _, ChildWatch, Pidfd, ProcessHandle, ProcessSettings,
};
use bowline::signal::{SIGKILL, SIGSTOP, SIGTERM};
use bowline::testing::ManualClock;
use bowline::{AtDrain, GracefulStop, Reactor};
use rustix::process::{Pid, Signal, kill_process};

use crate::harness::{Record, Script, assert_nothing_left, is_there, sh, shell, spawn, stream};
use crate::support::{DescriptorLedger, run_until, run_until_quiet};

/// Two generations that do not mind a SIGTERM. The child says the number of its own
/// child, which has its output too.
const STUBBORN: &str = "trap '' TERM; (while :; do sleep 1; done) & echo $!; wait; wait";

/// A reactor whose time a test moves.
struct Stage {
    reactor: Reactor,
    clock: ManualClock,
}

impl Stage {
    fn new() -> Self {
        let clock = ManualClock::new();
        let reactor = Reactor::with_clock(clock.clone()).unwrap();
        Self { reactor, clock }
    }

    /// Lets time pass, as far as the reactor sees it.
    fn pass(&mut self, time: Duration) {
        run_until_quiet(&mut self.reactor);
        self.clock.advance(time);
        run_until_quiet(&mut self.reactor);
    }

    #[track_caller]
    fn spawn(&mut self, command: ChildCommand<'_>) -> (ProcessHandle, Record) {
        let script = Script::new();
        let record = script.record();
        (spawn(&mut self.reactor, command, script), record)
    }
}

fn settings() -> ProcessSettings {
    ProcessSettings::default()
}

/// The process that a child has said the number of.
#[track_caller]
fn said(reactor: &mut Reactor, record: &Record) -> u32 {
    run_until(reactor, |_| record.text(1).ends_with('\n'));
    record.text(1).trim().parse().expect("a number")
}

#[track_caller]
fn wait_until_gone(pid: u32) {
    let began = std::time::Instant::now();
    let is_dead = || {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"));
        stat.map_or(true, |stat| stat.contains(") Z "))
    };
    while !is_dead() {
        assert!(began.elapsed() < crate::support::DEADLINE, "{pid} is there");
        std::thread::yield_now();
    }
}

#[test]
fn a_child_that_takes_too_long_is_asked_to_end() {
    let _ledger = DescriptorLedger::open();
    let mut stage = Stage::new();
    let limit = settings().time_limit(Some(Duration::from_secs(60)));
    let child = shell("trap 'echo asked; exit 3' TERM; echo; while :; do sleep 0.01; done");
    let (_, record) = stage.spawn(child.settings(limit));
    run_until(&mut stage.reactor, |_| record.text(1) == "\n");
    stage.pass(Duration::from_millis(59_999));
    assert!(!record.has_exited());
    stage.pass(Duration::from_millis(1));
    run_until(&mut stage.reactor, |_| record.is_over());
    assert_eq!(record.text(1), "\nasked\n");
    assert_eq!(record.statuses()[1].code(), Some(3));
    assert_nothing_left(&stage.reactor);
}

#[test]
fn a_child_that_does_not_obey_is_killed_with_all_that_it_started() {
    let _ledger = DescriptorLedger::open();
    let mut stage = Stage::new();
    let limit = settings()
        .time_limit(Some(Duration::from_secs(60)))
        .grace(Duration::from_secs(10));
    let command = shell(STUBBORN).in_own_group().settings(limit);
    let (_, record) = stage.spawn(command);
    let grandchild = said(&mut stage.reactor, &record);
    stage.pass(Duration::from_secs(60));
    stage.pass(Duration::from_millis(9_999));
    assert!(!record.has_exited() && is_there(grandchild));
    stage.pass(Duration::from_millis(1));
    run_until(&mut stage.reactor, |_| record.is_over());
    assert_eq!(record.statuses()[1].signal(), Some(SIGKILL));
    // It kept the pipe, and the end would not have come.
    wait_until_gone(grandchild);
    assert_nothing_left(&stage.reactor);
}

/// Only the child itself is killed that leads no group, and the end does not wait for
/// what it has left behind.
#[test]
fn the_streams_of_a_killed_child_are_given_up() {
    let _ledger = DescriptorLedger::open();
    let mut stage = Stage::new();
    let (process, record) = stage.spawn(shell(STUBBORN));
    let grandchild = said(&mut stage.reactor, &record);
    stage
        .reactor
        .get(process)
        .unwrap()
        .terminate_within(Duration::from_secs(5));
    // The earlier one counts.
    stage
        .reactor
        .get(process)
        .unwrap()
        .terminate_within(Duration::from_secs(50));
    stage.pass(Duration::from_secs(5));
    run_until(&mut stage.reactor, |_| record.has_exited());
    stage.pass(Duration::from_millis(999));
    assert!(!record.is_over());
    stage.pass(Duration::from_millis(1));
    run_until(&mut stage.reactor, |_| record.is_over());
    assert_eq!(
        record.count("lost 1, aborted by us"),
        1,
        "{:?}",
        record.events()
    );
    assert!(is_there(grandchild));
    kill_process(
        Pid::from_raw(grandchild.cast_signed()).unwrap(),
        Signal::KILL,
    )
    .unwrap();
    assert_nothing_left(&stage.reactor);
}

/// A stopped process cannot obey: it is continued.
#[test]
fn a_stopped_child_ends_when_it_is_asked_to() {
    let _ledger = DescriptorLedger::open();
    let mut stage = Stage::new();
    let (process, record) = stage.spawn(shell("echo; exec cat").in_own_group());
    run_until(&mut stage.reactor, |_| record.text(1) == "\n");
    let transport = stage.reactor.get(process).unwrap();
    transport.signal_process(SIGSTOP).unwrap();
    transport.terminate_within(Duration::from_secs(1));
    run_until(&mut stage.reactor, |_| record.is_over());
    assert_eq!(record.statuses()[1].signal(), Some(SIGTERM));
    assert_nothing_left(&stage.reactor);
}

/// W-63: a child that daemonizes and leaves its pipes to what goes on; and with a group,
/// that is reached still.
#[test]
fn what_a_child_leaves_on_its_pipes_is_waited_for_as_long_as_was_said() {
    let _ledger = DescriptorLedger::open();
    let mut stage = Stage::new();
    let after = settings().streams_after_exit(Some(Duration::from_secs(30)));
    let child = shell("sleep 1000 & echo $!; exit 0");
    let (process, record) = stage.spawn(child.in_own_group().settings(after));
    let grandchild = said(&mut stage.reactor, &record);
    run_until(&mut stage.reactor, |_| record.has_exited());
    stage.pass(Duration::from_millis(29_999));
    assert!(!record.is_over());
    // Somebody has it wait: what is in the pipe is wanted.
    let stdout = stage.reactor.get(process).unwrap().stream(1).unwrap();
    stage.reactor.get(stdout).unwrap().pause_producing();
    stage.pass(Duration::from_secs(100));
    assert_eq!(record.count("lost 2"), 1, "the others are given up");
    assert!(!record.is_over());
    stage.reactor.get(stdout).unwrap().resume_producing();
    stage.pass(Duration::from_secs(30));
    run_until(&mut stage.reactor, |_| record.is_over());
    assert!(is_there(grandchild), "it was not asked to end");
    assert_nothing_left(&stage.reactor);
    kill_process(
        Pid::from_raw(grandchild.cast_signed()).unwrap(),
        Signal::KILL,
    )
    .unwrap();
}

/// W-63: the same, by hand; and the group of a child that has exited.
#[test]
fn streams_are_given_up_by_who_does_not_want_to_wait() {
    let _ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let script = Script::new().exited(|cx| {
        cx.process.give_up_streams();
        cx.process.signal_group(SIGTERM).unwrap();
    });
    let record = script.record();
    let command = shell("sleep 1000 & echo $!; exit 0").in_own_group();
    spawn(&mut reactor, command, script);
    let grandchild = said(&mut reactor, &record);
    run_until(&mut reactor, |_| record.is_over());
    wait_until_gone(grandchild);
    assert_nothing_left(&reactor);
}

/// The stop waits for them, in whatever way it comes.
#[test]
fn children_end_with_the_reactor_where_that_was_said() {
    let _ledger = DescriptorLedger::open();
    for is_graceful in [false, true] {
        let mut reactor = Reactor::new().unwrap();
        let stop = settings().stop_within(Some(Duration::from_millis(200)));
        let is_late = Rc::new(Cell::new(false));
        let mut all = Vec::new();
        for child in [
            "trap 'exit 4' TERM; echo; while :; do sleep 0.01; done",
            STUBBORN,
        ] {
            let script = Script::new();
            let record = script.record();
            let command = shell(child).in_own_group().settings(stop);
            let process = spawn(&mut reactor, command, script);
            // If the reactor does not end it, this test does, and says so.
            let is_late = Rc::clone(&is_late);
            reactor.call_later(crate::support::DEADLINE, move |reactor| {
                is_late.set(true);
                if let Some(process) = reactor.get(process) {
                    let _ = process.signal_process(SIGKILL);
                }
            });
            all.push(record);
        }
        // One that is left alone does not keep the stop waiting.
        let script = Script::new();
        let alone = script.record();
        spawn(&mut reactor, shell("cat"), script);
        let started = all.clone();
        reactor.call_every(Duration::from_millis(5), move |reactor, _| {
            if started.iter().all(|record| !record.text(1).is_empty()) {
                match is_graceful {
                    true => reactor.stop_gracefully(GracefulStop::new()).unwrap(),
                    false => reactor.stop().unwrap(),
                }
            }
        });
        reactor.run().unwrap();
        assert!(!is_late.get(), "a child outlived the stop");
        assert_eq!(all[0].statuses()[1].code(), Some(4), "{is_graceful}");
        assert_eq!(
            all[1].statuses()[1].signal(),
            Some(SIGKILL),
            "{is_graceful}"
        );
        assert_eq!(alone.count("exited"), 0);
        assert_eq!(alone.count("draining"), usize::from(is_graceful));
        assert_eq!(reactor.statistics().cut, 0);
        assert_eq!(reactor.registered(), 0);
    }
}

/// A child that is at work is waited for, and told by the end of its input.
#[test]
fn a_graceful_stop_waits_for_a_child_that_says_so() {
    let _ledger = DescriptorLedger::open();
    for (answer, child) in [
        (AtDrain::GoOn, "sleep 0.2; exit 8"),
        (AtDrain::LoseWhenIdle, "cat; exit 8"),
    ] {
        let mut reactor = Reactor::new().unwrap();
        let script = Script::new().draining(answer);
        let record = script.record();
        spawn(&mut reactor, shell(child), script);
        reactor.call_later(Duration::from_millis(10), |reactor| {
            reactor.stop_gracefully(GracefulStop::new()).unwrap();
        });
        reactor.run().unwrap();
        assert_eq!(record.statuses()[1].code(), Some(8), "{answer:?}");
        assert_eq!(record.count("draining"), 1);
        assert_eq!(reactor.statistics().cut, 0);
    }
}

type Ends = Rc<RefCell<Vec<std::io::Result<std::process::ExitStatus>>>>;

fn watch(reactor: &mut Reactor, process: Pidfd) -> Ends {
    let ends = Ends::default();
    let told = Rc::clone(&ends);
    ChildWatch::start(reactor, Box::new(process), move |_, status| {
        told.borrow_mut().push(status);
    });
    ends
}

/// A process that is no child of ours, and one by the descriptor that the kernel gave for
/// a peer.
#[test]
fn the_exit_of_any_process_is_told() {
    let _ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let script = Script::new();
    let record = script.record();
    let command = shell("sleep 1000 & echo $!; cat; wait").null(2);
    let process = spawn(&mut reactor, command, script);
    let number = said(&mut reactor, &record);
    let mut grandchild = Pidfd::open(number).unwrap();
    assert_eq!(grandchild.pid(), number);
    assert!(grandchild.try_wait().unwrap().is_none());
    let ends = watch(&mut reactor, grandchild.clone());
    run_until_quiet(&mut reactor);
    assert!(ends.borrow().is_empty());
    grandchild.signal(SIGTERM).unwrap();
    run_until(&mut reactor, |_| !ends.borrow().is_empty());
    // How it ended is for its parent to know.
    assert!(!record.has_exited());
    stream(&mut reactor, process, 0).lose_connection();
    run_until(&mut reactor, |_| record.is_over());

    let mut child = sh("exec cat")
        .stdin(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let fd = rustix::process::pidfd_open(
        Pid::from_child(&child),
        rustix::process::PidfdFlags::empty(),
    );
    let received = Pidfd::from_descriptor(fd.unwrap()).unwrap();
    assert_eq!(received.pid(), child.id());
    let ends = watch(&mut reactor, received);
    drop(child.stdin.take());
    run_until(&mut reactor, |_| !ends.borrow().is_empty());
    assert!(ends.take().pop().unwrap().unwrap().success());
    assert!(child.wait().is_err(), "it was waited for by that");
    let other = tempfile::tempfile().unwrap().into();
    let error = Pidfd::from_descriptor(other).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::InvalidInput);
    assert_nothing_left(&reactor);
}
