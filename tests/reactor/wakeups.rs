//! Calls from other threads and `call_soon`.

use std::rc::Rc;
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use bowline::error::RemoteError;
use bowline::{Limits, Reactor};

use crate::support::{DEADLINE, DescriptorLedger, run_until};
use crate::{Notes, PANIC};

fn turn(reactor: &mut Reactor) {
    reactor.turn(Some(Duration::ZERO));
}

/// Notes that can be taken from calls that other threads make.
#[derive(Clone, Default)]
struct Shared(Arc<Mutex<Vec<u32>>>);

impl Shared {
    fn push(&self, note: u32) {
        self.0.lock().unwrap().push(note);
    }

    fn all(&self) -> Vec<u32> {
        self.0.lock().unwrap().clone()
    }
}

/// Contract R-25.
#[test]
fn calls_from_a_thread_run_in_the_reactors_thread_in_order() {
    let _alone = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let remote = reactor.remote();
    let notes = Shared::default();
    let here = thread::current().id();
    let of_thread = notes.clone();
    let caller = thread::spawn(move || {
        for number in 0..1_000 {
            let notes = of_thread.clone();
            remote
                .call_from_thread(move |_| {
                    assert_eq!(thread::current().id(), here);
                    notes.push(number);
                })
                .unwrap();
        }
    });
    run_until(&mut reactor, |_| notes.all().len() == 1_000);
    caller.join().unwrap();
    assert!(notes.all().is_sorted());
}

/// Contract R-25.
#[test]
fn call_from_a_thread_wakes_a_poll_that_waits_without_end() {
    let _alone = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let remote = reactor.remote();
    let (entered, wait_until_entered) = mpsc::channel();
    let caller = thread::spawn(move || {
        wait_until_entered.recv_timeout(DEADLINE).unwrap();
        remote
            .call_from_thread(|reactor| reactor.stop().unwrap())
            .unwrap();
    });
    reactor.call_when_running(move |_| entered.send(()).unwrap());
    reactor.run().unwrap();
    caller.join().unwrap();
}

#[test]
fn wake_ends_the_turn_early() {
    let _alone = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let remote = reactor.remote();
    let began = Instant::now();
    let waker = thread::spawn(move || remote.wake());
    reactor.turn(Some(DEADLINE * 2));
    assert!(began.elapsed() < DEADLINE);
    waker.join().unwrap();
}

/// Contract R-25.
#[test]
fn call_made_inside_the_loop_runs_in_the_next_turn_without_waiting() {
    let _alone = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let notes = Shared::default();
    let outer = notes.clone();
    reactor.call_soon(move |reactor| {
        let inner = outer;
        reactor
            .remote()
            .call_from_thread(move |reactor| {
                inner.push(1);
                let innermost = inner;
                let added = move |_: &mut Reactor| innermost.push(2);
                reactor.remote().call_from_thread(added).unwrap();
            })
            .unwrap();
    });
    turn(&mut reactor);
    assert_eq!(notes.all(), [0_u32; 0]);
    // Neither of the two waits for anything.
    reactor.turn(None);
    assert_eq!(notes.all(), [1]);
    reactor.turn(None);
    assert_eq!(notes.all(), [1, 2]);
}

/// Contract R-26.
#[test]
fn calls_made_before_the_run_are_kept_until_it_has_started() {
    let _alone = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let notes = Shared::default();
    let called = notes.clone();
    reactor
        .remote()
        .call_from_thread(move |reactor| {
            assert!(reactor.is_running());
            called.push(1);
            reactor.stop().unwrap();
        })
        .unwrap();
    assert_eq!(notes.all(), [0_u32; 0]);
    reactor.run().unwrap();
    assert_eq!(notes.all(), [1]);
    assert_eq!(reactor.statistics().panics, 0);
}

#[test]
fn call_after_the_drop_is_an_error_and_what_waited_is_dropped() {
    let ledger = DescriptorLedger::open();
    let reactor = Reactor::new().unwrap();
    let remote = reactor.remote();
    let kept = Arc::new(());
    for _ in 0..3 {
        let kept = Arc::clone(&kept);
        remote.call_from_thread(move |_| drop(kept)).unwrap();
    }
    assert_eq!(Arc::strong_count(&kept), 4);
    drop(reactor);
    assert_eq!(Arc::strong_count(&kept), 1);
    let refused = Arc::clone(&kept);
    assert_eq!(
        remote.call_from_thread(move |_| drop(refused)),
        Err(RemoteError)
    );
    assert_eq!(Arc::strong_count(&kept), 1);
    remote.wake();
    drop(remote);
    ledger.assert_balanced();
}

#[test]
fn call_that_is_dropped_with_the_reactor_may_call_it() {
    let _alone = DescriptorLedger::open();
    struct Calls(
        bowline::RemoteHandle,
        Arc<Mutex<Vec<Result<(), RemoteError>>>>,
    );
    impl Drop for Calls {
        fn drop(&mut self) {
            let result = self.0.call_from_thread(|_| {});
            self.1.lock().unwrap().push(result);
        }
    }
    let reactor = Reactor::new().unwrap();
    let results = Arc::default();
    let calls = Calls(reactor.remote(), Arc::clone(&results));
    reactor
        .remote()
        .call_from_thread(move |_| drop(calls))
        .unwrap();
    drop(reactor);
    assert_eq!(*results.lock().unwrap(), [Err(RemoteError)]);
}

/// Contract R-26.
#[test]
fn flood_of_calls_costs_few_turns_and_keeps_its_order() {
    let _alone = DescriptorLedger::open();
    const CALLS: u32 = 100_000;
    let mut reactor = Reactor::new().unwrap();
    let notes = Shared::default();
    let (remote, of_thread) = (reactor.remote(), notes.clone());
    // The loop is busy while they are made: had each of them left a wake-up
    // behind, each would cost a turn afterwards.
    reactor.call_soon(move |_| {
        let caller = thread::spawn(move || {
            for number in 0..CALLS {
                let notes = of_thread.clone();
                remote
                    .call_from_thread(move |_| notes.push(number))
                    .unwrap();
            }
        });
        caller.join().unwrap();
    });
    turn(&mut reactor);
    let before = reactor.statistics().turns;
    run_until(&mut reactor, |_| {
        notes.0.lock().unwrap().len() == CALLS as usize
    });
    assert!(notes.all().is_sorted());
    let needed = u64::from(CALLS).div_ceil(reactor.limits().calls as u64);
    let turns = reactor.statistics().turns - before;
    assert!(turns <= needed + 2, "{turns} turns");
    // Nothing is left of the flood.
    let before = Instant::now();
    reactor.turn(Some(Duration::from_millis(20)));
    assert!(before.elapsed() >= Duration::from_millis(20));
}

#[test]
fn no_call_of_many_threads_is_lost() {
    let _alone = DescriptorLedger::open();
    const THREADS: u32 = 4;
    const CALLS: u32 = 5_000;
    let mut reactor = Reactor::new().unwrap();
    let notes = Shared::default();
    let callers: Vec<_> = (0..THREADS)
        .map(|thread| {
            let (remote, notes) = (reactor.remote(), notes.clone());
            thread::spawn(move || {
                for number in 0..CALLS {
                    let notes = notes.clone();
                    let call = move |_: &mut Reactor| notes.push(thread * CALLS + number);
                    remote.call_from_thread(call).unwrap();
                }
            })
        })
        .collect();
    let wanted = (THREADS * CALLS) as usize;
    run_until(&mut reactor, |_| notes.0.lock().unwrap().len() == wanted);
    for caller in callers {
        caller.join().unwrap();
    }
    for thread in 0..THREADS {
        let of_thread = notes
            .all()
            .into_iter()
            .filter(|note| note / CALLS == thread);
        assert!(of_thread.is_sorted());
    }
}

/// Contract R-26.
#[test]
fn failing_call_does_not_stop_the_others() {
    let _alone = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let notes = Shared::default();
    let remote = reactor.remote();
    remote.call_from_thread(|_| panic!("{PANIC}")).unwrap();
    let after = notes.clone();
    remote.call_from_thread(move |_| after.push(1)).unwrap();
    reactor.call_soon(|_| panic!("{PANIC}"));
    let after = notes.clone();
    reactor.call_soon(move |_| after.push(2));
    turn(&mut reactor);
    assert_eq!(notes.all(), [1, 2]);
    assert_eq!(reactor.statistics().panics, 2);
}

#[test]
fn call_soon_runs_in_order_in_the_next_turn() {
    let _alone = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let notes = Notes::new();
    let (in_first, in_deferred) = (notes.clone(), notes.clone());
    reactor.call_soon(move |reactor| {
        in_first.push("first");
        reactor.call_soon(in_first.noting("next turn"));
        // Deferred calls belong to this turn.
        reactor.defer(in_deferred.noting("deferred"));
    });
    reactor.call_soon(notes.noting("second"));
    turn(&mut reactor);
    assert_eq!(notes.all(), ["first", "second", "deferred"]);
    reactor.turn(None);
    assert_eq!(notes.all().last(), Some(&"next turn"));
}

#[test]
fn calls_that_call_themselves_leave_the_turn_to_others() {
    let _alone = DescriptorLedger::open();
    fn again(reactor: &mut Reactor) {
        reactor.call_soon(again);
    }
    fn defer_again(reactor: &mut Reactor) {
        reactor.defer(defer_again);
    }
    let mut reactor = Reactor::new().unwrap();
    let limit = 50;
    reactor.set_limits(Limits::default().notifications(limit));
    reactor.call_soon(again);
    reactor.defer(defer_again);
    let notes = Notes::new();
    reactor.call_later(Duration::from_millis(1), notes.noting("timer"));
    run_until(&mut reactor, |_| notes.len() == 1);
}

#[test]
fn calls_are_dropped_with_the_reactor() {
    let _alone = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let kept = Rc::new(());
    let holder = || {
        let kept = Rc::clone(&kept);
        move |_: &mut Reactor| drop(kept)
    };
    reactor.call_soon(holder());
    reactor.defer(holder());
    reactor.call_later(Duration::from_secs(1), holder());
    reactor.call_when_running(holder());
    assert_eq!(Rc::strong_count(&kept), 5);
    drop(reactor);
    assert_eq!(Rc::strong_count(&kept), 1);
}
