//! Work in threads beside the reactor's.

use std::collections::HashSet;
use std::rc::Rc;
use std::sync::{Arc, Condvar, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use bowline::Reactor;
use bowline::error::ThreadCallError;
use bowline::lifecycle::{Phase, SystemEvent};
use bowline::threads::{AtShutdown, ThreadPool, ThreadPoolSettings};

use crate::support::{DEADLINE, DescriptorLedger, assert_no_pool_threads, pool_threads, run_until};
use crate::{Notes, PANIC};

/// Keeps work from ending until it is opened.
#[derive(Clone, Default)]
struct Gate {
    state: Arc<(Mutex<Inside>, Condvar)>,
}

#[derive(Default)]
struct Inside {
    waiting: usize,
    is_open: bool,
}

impl Gate {
    fn wait(&self) {
        let (state, opened) = &*self.state;
        let mut inside = state.lock().unwrap();
        inside.waiting += 1;
        while !inside.is_open {
            inside = opened.wait(inside).unwrap();
        }
    }

    fn open(&self) {
        self.state.0.lock().unwrap().is_open = true;
        self.state.1.notify_all();
    }

    /// Waits until so many wait at it.
    #[track_caller]
    fn await_waiting(&self, wanted: usize) {
        let began = Instant::now();
        while self.state.0.lock().unwrap().waiting < wanted {
            assert!(began.elapsed() < DEADLINE, "fewer than {wanted} have begun");
            thread::yield_now();
        }
    }
}

fn described<R: std::fmt::Debug>(result: Result<R, ThreadCallError>) -> String {
    match result {
        Ok(value) => format!("{value:?}"),
        Err(error) => error.to_string(),
    }
}

const STOPPED: &str = "reactor stopped before the call in a thread was done";

fn with_one_thread() -> ThreadPool {
    ThreadPool::new(ThreadPoolSettings::default().max_threads(1))
}

/// Contract R-27: lazily, also during the run, and all gone before it returns.
#[test]
fn threads_come_with_work_and_are_gone_before_run_returns() {
    let _alone = DescriptorLedger::alone();
    let mut reactor = Reactor::new().unwrap();
    let pool = reactor.thread_pool();
    assert_eq!((pool.counts().threads, pool_threads()), (0, 0));
    let notes = Notes::new();
    let here = thread::current().id();
    // Before the run, and what is told need not be able to leave the thread.
    let seen = Rc::new(notes.clone());
    reactor.call_in_thread(
        || thread::current().id(),
        move |reactor, worker| {
            assert_ne!(worker.unwrap(), here);
            assert_eq!(thread::current().id(), here);
            assert!(reactor.is_running(), "told before the start");
            seen.push("first".to_owned());
            let seen = Rc::clone(&seen);
            reactor.call_in_thread(
                || 7,
                move |reactor, result| {
                    assert!((1..=2).contains(&pool_threads()));
                    seen.push(described(result));
                    reactor.stop().unwrap();
                },
            );
        },
    );
    // Its result has no way to come before the run.
    pool_is_quiet(&pool);
    assert!(notes.all().is_empty());
    reactor.run().unwrap();
    assert_eq!(notes.all(), ["first", "7"]);
    assert_eq!(pool.counts().threads, 0);
    assert_no_pool_threads();

    // And again, with the same one.
    let seen = notes.clone();
    reactor.call_in_thread(
        || 8,
        move |reactor, result| {
            seen.push(described(result));
            reactor.stop().unwrap();
        },
    );
    reactor.run().unwrap();
    assert_eq!(notes.all(), ["first", "7", "8"]);
    assert_no_pool_threads();
}

fn pool_is_quiet(pool: &ThreadPool) {
    let began = Instant::now();
    while pool.counts().idle < pool.counts().threads || pool.counts().queued > 0 {
        assert!(began.elapsed() < DEADLINE);
        thread::yield_now();
    }
}

/// Contract R-27 (Twisted: `suggestThreadPoolSize`).
#[test]
fn there_are_ten_threads_at_the_most_or_as_many_as_set() {
    let _alone = DescriptorLedger::alone();
    let mut reactor = Reactor::new().unwrap();
    let pool = reactor.thread_pool();
    let gate = Gate::default();
    let notes = Notes::new();
    let submit = |reactor: &mut Reactor| {
        let (gate, notes) = (gate.clone(), notes.clone());
        reactor.call_in_thread(
            move || {
                gate.wait();
                thread::current().id()
            },
            move |_, worker| notes.push(worker.unwrap()),
        );
    };
    for _ in 0..30 {
        submit(&mut reactor);
    }
    gate.await_waiting(10);
    assert_eq!((pool_threads(), pool.counts().queued), (10, 20));
    let settings = pool.settings().max_threads(12);
    pool.set_settings(settings.clone());
    submit(&mut reactor);
    submit(&mut reactor);
    gate.await_waiting(12);
    assert_eq!((pool_threads(), pool.counts().queued), (12, 20));
    gate.open();
    run_until(&mut reactor, |_| notes.all().len() == 32);
    let distinct: HashSet<_> = notes.all().into_iter().collect();
    assert!(distinct.len() <= 12);
    pool.set_settings(settings.max_threads(0));
    // One is left, which works.
    run_until(&mut reactor, |_| pool_threads() == 1);
    submit(&mut reactor);
    run_until(&mut reactor, |_| notes.all().len() == 33);
    finish(reactor);
}

/// Stops it, so that no thread is left.
fn finish(mut reactor: Reactor) {
    reactor.call_soon(|reactor| reactor.stop().unwrap());
    reactor.run().unwrap();
    assert_no_pool_threads();
}

/// Contract R-27: from ten down to none.
#[test]
fn threads_without_work_end() {
    let _alone = DescriptorLedger::alone();
    let mut reactor = Reactor::new().unwrap();
    let pool =
        ThreadPool::new(ThreadPoolSettings::default().idle_timeout(Duration::from_millis(1)));
    let notes = Notes::new();
    let seen = notes.clone();
    pool.call_in_thread(&mut reactor, || (), move |_, _| seen.push(()));
    run_until(&mut reactor, |_| {
        !notes.all().is_empty() && pool_threads() == 0
    });
    assert_eq!(pool.counts().threads, 0);
    finish(reactor);
}

/// Contract R-27: what was given is finished, with the loop turning.
#[test]
fn stopping_waits_for_all_work_and_tells_its_results() {
    let _alone = DescriptorLedger::alone();
    let mut reactor = Reactor::new().unwrap();
    let pool = with_one_thread();
    let notes = Notes::new();
    let remote = reactor.remote();
    for number in 0..3 {
        let (remote, seen) = (remote.clone(), notes.clone());
        pool.call_in_thread(
            &mut reactor,
            move || {
                // It needs the loop to get on: the loop must not just wait for it.
                let (answer, answered) = mpsc::channel();
                let ask = remote.call_from_thread(move |_| answer.send(()).unwrap());
                ask.unwrap();
                answered.recv_timeout(DEADLINE).map(|()| number)
            },
            move |reactor, result| {
                assert!(reactor.is_stopping());
                seen.push(described(result));
            },
        );
    }
    reactor.call_soon(|reactor| reactor.stop().unwrap());
    let during = notes.clone();
    reactor.add_trigger(Phase::During, SystemEvent::Shutdown, move |_| {
        during.push("during".to_owned());
    });
    reactor.run().unwrap();
    assert_eq!(notes.all(), ["Ok(0)", "Ok(1)", "Ok(2)", "during"]);
    assert_no_pool_threads();
}

/// Contract R-27: work that connections ask for while they are lost.
#[test]
fn work_asked_for_during_the_shutdown_is_finished_or_refused() {
    let _alone = DescriptorLedger::alone();
    let mut reactor = Reactor::new().unwrap();
    let notes = Notes::new();
    // While the connections are lost, before the pool is stopped.
    let seen = notes.clone();
    let (ours, theirs) = crate::support::socketpair();
    struct AtTheEnd(Notes<String>);
    impl<T: bowline::Transport> bowline::Protocol<T> for AtTheEnd {
        fn data_received(&mut self, _: &mut bowline::Context<'_, T>, _: &[u8]) {}
        fn connection_lost(&mut self, cx: &mut bowline::Context<'_, T>, _: &bowline::CloseReason) {
            let seen = self.0.clone();
            cx.reactor
                .call_in_thread(|| 1, move |_, result| seen.push(described(result)));
        }
    }
    use bowline::Transports;
    reactor
        .adopt_unix_stream(ours.into(), AtTheEnd(seen))
        .unwrap();
    // After it was stopped.
    let seen = notes.clone();
    reactor.add_trigger(Phase::After, SystemEvent::Shutdown, move |reactor| {
        let told = seen.clone();
        reactor.call_in_thread(
            || unreachable!("it is too late"),
            move |_, result: Result<(), _>| told.push(described(result)),
        );
        seen.push("not inside the call".to_owned());
    });
    reactor.call_soon(|reactor| reactor.stop().unwrap());
    reactor.run().unwrap();
    assert_eq!(notes.all(), ["1", "not inside the call", STOPPED]);
    assert_no_pool_threads();
    drop(theirs);
}

#[test]
fn abandoned_work_does_not_hold_the_shutdown() {
    let _alone = DescriptorLedger::alone();
    let mut reactor = Reactor::new().unwrap();
    let pool = ThreadPool::new(
        ThreadPoolSettings::default()
            .max_threads(1)
            .at_shutdown(AtShutdown::Abandon),
    );
    let gate = Gate::default();
    let notes = Notes::new();
    for _ in 0..2 {
        let (gate, notes) = (gate.clone(), notes.clone());
        pool.call_in_thread(
            &mut reactor,
            move || gate.wait(),
            move |_, result| notes.push(described(result)),
        );
    }
    gate.await_waiting(1);
    reactor.call_soon(|reactor| reactor.stop().unwrap());
    reactor.run().unwrap();
    assert_eq!(notes.all(), [STOPPED, STOPPED]);
    // What comes of it later interests nobody, and what had not begun never does.
    gate.open();
    assert_no_pool_threads();
    assert_eq!(gate.state.0.lock().unwrap().waiting, 1);
    assert_eq!(notes.all().len(), 2);
}

/// Contract R-27: the rest goes on.
#[test]
fn work_that_panics_is_told_and_costs_nothing_else() {
    let _alone = DescriptorLedger::alone();
    let mut reactor = Reactor::new().unwrap();
    let notes = Notes::new();
    let seen = notes.clone();
    reactor.call_in_thread(
        || panic!("{PANIC}"),
        move |_, result: Result<(), _>| {
            seen.push(described(result));
            panic!("{PANIC}");
        },
    );
    run_until(&mut reactor, |_| notes.all().len() == 1);
    let seen = notes.clone();
    reactor.call_in_thread(|| 2, move |_, result| seen.push(described(result)));
    run_until(&mut reactor, |_| notes.all().len() == 2);
    let panicked = format!("call in a thread panicked: {PANIC}");
    assert_eq!(notes.all(), [panicked.as_str(), "2"]);
    assert_eq!(reactor.statistics().panics, 1);
    // No thread was lost over it.
    let pool = reactor.thread_pool();
    run_until(&mut reactor, |_| pool.counts().threads == pool_threads());
    finish(reactor);
}

#[test]
fn work_beyond_the_queue_is_refused_after_the_call() {
    let _alone = DescriptorLedger::alone();
    let mut reactor = Reactor::new().unwrap();
    let pool = ThreadPool::new(ThreadPoolSettings::default().max_threads(1).max_queued(2));
    let gate = Gate::default();
    let notes = Notes::new();
    for number in 0..4 {
        let (gate, seen) = (gate.clone(), notes.clone());
        pool.call_in_thread(
            &mut reactor,
            {
                let gate = gate.clone();
                move || {
                    gate.wait();
                    number
                }
            },
            move |_, result| seen.push(described(result)),
        );
        gate.await_waiting(1);
    }
    assert!(notes.all().is_empty());
    reactor.turn(Some(Duration::ZERO));
    assert_eq!(notes.all(), ["too many calls wait for a thread"]);
    gate.open();
    run_until(&mut reactor, |_| notes.all().len() == 4);
    assert_eq!(notes.all()[1..], ["0", "1", "2"]);
    finish(reactor);
}

/// Work that a thread takes at once waits for none: as much as there may be threads.
#[test]
fn pool_without_a_queue_takes_what_its_threads_can_do() {
    let _alone = DescriptorLedger::alone();
    let mut reactor = Reactor::new().unwrap();
    let pool = ThreadPool::new(ThreadPoolSettings::default().max_threads(2).max_queued(0));
    let gate = Gate::default();
    let notes = Notes::new();
    let submit = |reactor: &mut Reactor, number: i32| {
        let (gate, seen) = (gate.clone(), notes.clone());
        let work = move || {
            gate.wait();
            number
        };
        pool.call_in_thread(reactor, work, move |_, result| seen.push(described(result)));
    };
    for number in 0..3 {
        submit(&mut reactor, number);
    }
    reactor.turn(Some(Duration::ZERO));
    assert_eq!(notes.all(), ["too many calls wait for a thread"]);
    gate.open();
    run_until(&mut reactor, |_| notes.all().len() == 3);
    submit(&mut reactor, 3);
    run_until(&mut reactor, |_| notes.all().len() == 4);
    assert_eq!(notes.all()[3], "3");
    finish(reactor);
}

#[test]
fn cancelled_work_is_not_told_and_not_begun() {
    let _alone = DescriptorLedger::alone();
    let mut reactor = Reactor::new().unwrap();
    let pool = with_one_thread();
    let gate = Gate::default();
    let owned = Arc::new(());
    let submit = |reactor: &mut Reactor| {
        let (gate, owned) = (gate.clone(), Arc::clone(&owned));
        pool.call_in_thread(
            reactor,
            move || {
                gate.wait();
                owned
            },
            |_, _| panic!("it was cancelled"),
        )
    };
    let running = submit(&mut reactor);
    gate.await_waiting(1);
    let waiting = submit(&mut reactor);
    assert!(waiting.cancel(&mut reactor));
    assert_eq!((pool.counts().queued, Arc::strong_count(&owned)), (0, 2));
    assert!(running.cancel(&mut reactor));
    assert!(!running.cancel(&mut reactor), "it was cancelled already");
    gate.open();
    // What it brought is dropped.
    run_until(&mut reactor, |_| Arc::strong_count(&owned) == 1);
    finish(reactor);
    assert_eq!(gate.state.0.lock().unwrap().waiting, 1);
}

#[test]
fn reactor_dropped_without_a_stop_drops_what_waits() {
    let _alone = DescriptorLedger::alone();
    let mut reactor = Reactor::new().unwrap();
    let pool = with_one_thread();
    let gate = Gate::default();
    let owned = Arc::new(());
    for _ in 0..2 {
        let (gate, owned) = (gate.clone(), Arc::clone(&owned));
        let told = Arc::clone(&owned);
        pool.call_in_thread(
            &mut reactor,
            move || {
                gate.wait();
                drop(owned);
            },
            move |_, _| drop(told),
        );
    }
    drop(pool);
    gate.await_waiting(1);
    drop(reactor);
    // Of the one that runs, its own.
    assert_eq!(Arc::strong_count(&owned), 2);
    gate.open();
    assert_no_pool_threads();
    assert_eq!(Arc::strong_count(&owned), 1);
    assert_eq!(gate.state.0.lock().unwrap().waiting, 1);
}
