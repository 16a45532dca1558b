//! The processes of workers as children of ours: how their end is learned, and by whom.

use std::cell::RefCell;
use std::process::{Command, ExitStatus, Stdio};
use std::rc::Rc;
use std::time::{Duration, Instant};

use bowline::Reactor;
use bowline::handoff::pool::{Pool, PoolEvent};
use bowline::testing::ManualClock;
use rustix::process::{Pid, Signal, WaitOptions, waitpid};

use super::process::{Script, end, scripted, settings, signal};
use crate::capture;
use crate::support::{DEADLINE, DescriptorLedger, Moved, run_until};

type Told = Rc<RefCell<Vec<(u32, Option<ExitStatus>)>>>;

/// A pool over a worker process, and what it says of the ends of workers.
fn pool(reactor: &mut Reactor, script: Script) -> (Pool, Told, Rc<RefCell<Vec<u32>>>) {
    let log = std::path::PathBuf::from("/dev/null");
    let pool = Pool::start(reactor, settings(1), scripted(log, move |_| script));
    let (ended, ready) = (Told::default(), Rc::<RefCell<Vec<u32>>>::default());
    let (of_ended, of_ready) = (Rc::clone(&ended), Rc::clone(&ready));
    pool.on_event(move |_, event| match event {
        PoolEvent::Ready { pid, .. } => of_ready.borrow_mut().push(pid),
        PoolEvent::Exited { pid, status, .. } => of_ended.borrow_mut().push((pid, status)),
        _ => {}
    });
    (pool, ended, ready)
}

/// Signals for which this process has a handler, and those that it has blocked: a bit
/// for each.
fn handled() -> Vec<String> {
    let status = std::fs::read_to_string("/proc/thread-self/status").expect("Linux has it");
    let lines = status.lines().filter(|line| {
        let name = line.split(':').next().expect("a name");
        ["SigBlk", "SigIgn", "SigCgt"].contains(&name)
    });
    lines.map(str::to_owned).collect()
}

fn is_there(pid: u32) -> bool {
    std::path::Path::new(&format!("/proc/{pid}")).exists()
}

/// Contract R-43, W-65, X-11: no handler of SIGCHLD is needed. A child's descriptor says
/// that it has ended; that child is waited for, at once, and no other, which may be
/// somebody else's to wait for. Time stands meanwhile: nobody asks every so often.
#[test]
fn ends_of_workers_are_learned_without_a_signal_and_without_waiting_for_others() {
    let _ledger = DescriptorLedger::open();
    let mut others = Command::new("sh")
        .args(["-c", "exit 7"])
        .stdin(Stdio::null())
        .spawn()
        .expect("it starts");
    let before = handled();
    let clock = ManualClock::new();
    let mut reactor = Reactor::with_clock(Moved(clock.clone())).expect("epoll");
    let (pool, ended, ready) = pool(&mut reactor, Script::Serve);
    for round in 1..=3 {
        run_until(&mut reactor, |_| ready.borrow().len() == round);
        assert_eq!(handled(), before, "a handler, or a mask, of signals");
        let pid = ready.borrow()[round - 1];
        signal(pid, Signal::KILL);
        run_until(&mut reactor, |_| ended.borrow().len() == round);
        let (told, status) = ended.borrow()[round - 1];
        assert_eq!(told, pid);
        let status = status.expect("it was ours to wait for").to_string();
        assert_eq!(status, "signal: 9 (SIGKILL)");
        assert!(!is_there(pid), "a zombie is left");
        // The next one is started after a while.
        clock.advance(Duration::from_secs(1));
    }
    run_until(&mut reactor, |_| ready.borrow().len() == 4);
    end(&mut reactor, &pool);
    assert_eq!(handled(), before);
    let status = others.wait().expect("nobody has waited for it");
    assert_eq!(status.code(), Some(7));
}

/// Contract X-12: a program that waits for all of its children waits for workers too.
/// How one ended cannot be told then, which is logged; the pool goes on.
#[test]
fn a_worker_that_somebody_else_has_waited_for_has_ended_and_is_replaced() {
    let _ledger = DescriptorLedger::open();
    capture::start();
    let mut reactor = Reactor::new().expect("epoll");
    let (pool, ended, ready) = pool(&mut reactor, Script::Serve);
    run_until(&mut reactor, |_| ready.borrow().len() == 1);
    let pid = ready.borrow()[0];
    signal(pid, Signal::KILL);
    waitpid(Pid::from_raw(pid.cast_signed()), WaitOptions::empty()).expect("a child");
    run_until(&mut reactor, |_| ready.borrow().len() == 2);
    run_until(&mut reactor, |_| !ended.borrow().is_empty());
    assert_eq!(*ended.borrow(), [(pid, None)]);
    let said = capture::lines("cannot tell how it ended");
    assert_eq!(said.len(), 1, "{said:?}");
    assert!(said[0].contains(&format!("process {pid}")), "{said:?}");
    end(&mut reactor, &pool);
}

/// Contract X-10: one that ends before the loop runs for the first time.
#[test]
fn a_worker_that_ends_before_the_loop_runs_is_waited_for_when_it_does() {
    let _ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().expect("epoll");
    let (pool, ended, _) = pool(&mut reactor, Script::NeverReady);
    let workers = pool.statistics().workers;
    let pid = workers.first().expect("it was started").pid;
    let started = Instant::now();
    let is_dead = || {
        // One that had ended when its end was to be watched was waited for then.
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"));
        stat.map_or(true, |stat| stat.contains(") Z "))
    };
    while !is_dead() {
        assert!(started.elapsed() < DEADLINE, "it does not end");
        std::thread::yield_now();
    }
    run_until(&mut reactor, |_| !ended.borrow().is_empty());
    let (told, status) = ended.borrow()[0];
    assert_eq!((told, status.and_then(|it| it.code())), (pid, Some(0)));
    assert!(!is_there(pid), "a zombie is left");
    end(&mut reactor, &pool);
}
