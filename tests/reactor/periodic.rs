//! Calls at intervals.

use std::cell::Cell;
use std::io::{Read, Write};
use std::rc::Rc;
use std::time::{Duration, Instant};

use bowline::testing::ManualClock;
use bowline::time::PeriodicEnd;
use bowline::{PeriodicCall, Reactor, Transports};

use crate::support::{DescriptorLedger, Record, Recorder, Staged, run_until, socketpair, staged};
use crate::{Notes, PANIC};

const INTERVAL: Duration = Duration::from_secs(10);

fn seconds(seconds: f64) -> Duration {
    Duration::from_secs_f64(seconds)
}

/// A reactor whose clock is moved by hand, and what ran in it: the seconds
/// since the beginning, and how many runs were skipped.
struct Stage {
    reactor: Reactor,
    clock: ManualClock,
    began: Instant,
    runs: Notes<(f64, u64)>,
    _alone: DescriptorLedger,
}

impl Stage {
    fn new() -> Self {
        let alone = DescriptorLedger::open();
        let clock = ManualClock::new();
        let reactor = Reactor::with_clock(clock.clone()).unwrap();
        Self {
            began: reactor.now(),
            reactor,
            clock,
            runs: Notes::new(),
            _alone: alone,
        }
    }

    fn noting(&self) -> impl FnMut(&mut Reactor, &PeriodicCall) + 'static {
        let (runs, began) = (self.runs.clone(), self.began);
        move |reactor, periodic| {
            runs.push(((reactor.now() - began).as_secs_f64(), periodic.skipped()));
        }
    }

    /// Moves the time at once, by so many seconds.
    fn pass(&mut self, by: f64) {
        self.jump(seconds(by));
    }
}

staged!(Stage);

/// Contract: no drift, and what was missed is skipped and counted.
#[test]
fn runs_come_at_multiples_of_the_interval_however_late_each_is() {
    let mut stage = Stage::new();
    let call = stage.noting();
    let periodic = stage.reactor.call_every(INTERVAL, call);
    stage.pass(10.0);
    // A little late, which the next one is not.
    stage.pass(13.0);
    stage.pass(6.5);
    assert_eq!(stage.runs.all(), [(10.0, 0), (23.0, 0)]);
    stage.pass(0.5);
    // Very late: those at 40 and 50 are left out, that of 60 is made at 65.
    stage.pass(35.0);
    stage.pass(4.0);
    assert_eq!(
        stage.runs.all()[2..],
        [(30.0, 0), (65.0, 2)],
        "one run each"
    );
    stage.pass(1.0);
    assert_eq!(stage.runs.all()[4..], [(70.0, 0)]);
    assert!(periodic.is_active());
    assert_eq!(periodic.interval(), INTERVAL);
}

/// Contract R-46: one that takes longer than its interval has gaps all the same.
#[test]
fn slow_runs_do_not_overlap_and_leave_gaps() {
    let mut stage = Stage::new();
    let clock = stage.clock.clone();
    let mut noting = stage.noting();
    let is_inside = Rc::new(Cell::new(false));
    stage
        .reactor
        .call_every(INTERVAL, move |reactor, periodic| {
            assert!(!is_inside.replace(true), "two at a time");
            noting(reactor, periodic);
            clock.advance(seconds(15.0));
            is_inside.set(false);
        });
    stage.pass(10.0);
    // It is 25 by now, and the one of 20 has passed.
    stage.settle();
    assert_eq!(stage.runs.all(), [(10.0, 0)]);
    stage.pass(5.0);
    assert_eq!(stage.runs.all(), [(10.0, 0), (30.0, 1)]);
}

/// Contract R-46.
#[test]
fn the_first_run_comes_now_or_after_an_interval() {
    let mut stage = Stage::new();
    let (now, later) = (stage.noting(), stage.noting());
    stage.reactor.call_now_and_every(INTERVAL, now);
    assert!(stage.runs.all().is_empty(), "inside the call");
    stage.reactor.turn(Some(Duration::ZERO));
    assert_eq!(stage.runs.all(), [(0.0, 0)]);
    stage.reactor.call_every(INTERVAL, later);
    stage.pass(9.0);
    assert_eq!(stage.runs.all().len(), 1);
    stage.pass(1.0);
    assert_eq!(stage.runs.all()[1..], [(10.0, 0), (10.0, 0)]);
}

/// Contract R-46: from outside, from inside, before the first run, and again.
#[test]
fn stopping_ends_it_and_is_told() {
    let mut stage = Stage::new();
    let ends = Notes::new();
    let owned = Rc::new(());
    let periodic = stage.reactor.call_every(INTERVAL, {
        let (mut call, owned) = (stage.noting(), Rc::clone(&owned));
        move |reactor, periodic| {
            let _ = &owned;
            call(reactor, periodic);
        }
    });
    let (seen, inside) = (ends.clone(), ends.clone());
    periodic.on_end(&mut stage.reactor, move |_, end| seen.push(end));
    stage.pass(10.0);
    periodic.stop(&mut stage.reactor);
    periodic.stop(&mut stage.reactor);
    assert!(ends.all().is_empty(), "inside the call");
    assert!(!periodic.is_active());
    assert_eq!(stage.reactor.delayed_calls().count(), 0);
    assert_eq!(Rc::strong_count(&owned), 1);
    stage.settle();
    assert_eq!(ends.all(), [PeriodicEnd::Stopped]);
    // Who comes late is told as well.
    let seen = ends.clone();
    periodic.on_end(&mut stage.reactor, move |_, end| seen.push(end));
    periodic.reset(&mut stage.reactor);
    stage.pass(20.0);
    assert_eq!(ends.all().len(), 2);
    assert_eq!(stage.runs.all().len(), 1);

    let periodic = stage.reactor.call_every(INTERVAL, {
        let mut call = stage.noting();
        move |reactor, periodic| {
            call(reactor, periodic);
            periodic.stop(reactor);
        }
    });
    periodic.on_end(&mut stage.reactor, move |_, end| inside.push(end));
    let never = stage.reactor.call_now_and_every(INTERVAL, |_, _| {
        panic!("stopped before the first run");
    });
    never.stop(&mut stage.reactor);
    stage.pass(30.0);
    stage.pass(30.0);
    assert_eq!(stage.runs.all().len(), 2);
    assert_eq!(ends.all().len(), 3);
    assert_eq!(stage.reactor.delayed_calls().count(), 0);
    assert_eq!(stage.reactor.statistics().panics, 0);
}

/// Contract R-46.
#[test]
fn a_panic_ends_it_and_is_told() {
    let mut stage = Stage::new();
    let ends = Notes::new();
    let owned = Rc::new(());
    let periodic = stage.reactor.call_every(INTERVAL, {
        let owned = Rc::clone(&owned);
        move |_, _| {
            let _ = &owned;
            panic!("{PANIC}");
        }
    });
    let seen = ends.clone();
    periodic.on_end(&mut stage.reactor, move |_, end| seen.push(end));
    stage.pass(10.0);
    assert_eq!(ends.all(), [PeriodicEnd::Panicked]);
    assert_eq!(stage.reactor.statistics().panics, 1);
    assert_eq!(Rc::strong_count(&owned), 1);
    stage.pass(10.0);
    assert_eq!(stage.reactor.statistics().panics, 1);
    assert_eq!(stage.reactor.delayed_calls().count(), 0);
}

/// Contract R-46 (Twisted: `LoopingCall.reset`).
#[test]
fn reset_counts_from_now() {
    let mut stage = Stage::new();
    let call = stage.noting();
    let periodic = stage.reactor.call_every(INTERVAL, call);
    stage.pass(4.0);
    periodic.reset(&mut stage.reactor);
    stage.pass(9.0);
    assert!(stage.runs.all().is_empty());
    stage.pass(1.0);
    stage.pass(10.0);
    assert_eq!(stage.runs.all(), [(14.0, 0), (24.0, 0)]);
    periodic.set_interval(&mut stage.reactor, seconds(1.0));
    stage.pass(1.0);
    stage.pass(1.0);
    assert_eq!(stage.runs.all()[2..], [(25.0, 0), (26.0, 0)]);
    periodic.stop(&mut stage.reactor);

    // And from inside.
    let mut call = stage.noting();
    stage
        .reactor
        .call_every(INTERVAL, move |reactor, periodic| {
            call(reactor, periodic);
            periodic.reset(reactor);
        });
    stage.pass(14.0);
    stage.pass(10.0);
    assert_eq!(stage.runs.all()[4..], [(40.0, 0), (50.0, 0)]);
}

/// Contract R-46.
#[test]
fn interval_of_zero_leaves_descriptors_their_turn() {
    let mut stage = Stage::new();
    let turns = Rc::new(Cell::new(0_u64));
    let seen = Rc::clone(&turns);
    stage
        .reactor
        .call_every(Duration::ZERO, move |_, periodic| {
            assert_eq!(periodic.skipped(), 0);
            seen.set(seen.get() + 1);
        });
    let record = Record::default();
    let (ours, mut theirs) = socketpair();
    stage
        .reactor
        .adopt_unix_stream(ours.into(), Recorder::new(&record))
        .unwrap();
    theirs.write_all(b"still there").unwrap();
    run_until(&mut stage.reactor, |_| record.data() == b"still there");
    // Once in a turn.
    let before = (stage.reactor.statistics().turns, turns.get());
    for _ in 0..100 {
        stage.reactor.turn(Some(Duration::ZERO));
    }
    let after = (stage.reactor.statistics().turns, turns.get());
    assert_eq!(after.1 - before.1, after.0 - before.0);
    drop(stage.reactor);
    assert!(matches!(theirs.read(&mut [0]), Ok(0)));
}

/// What it owns goes with the reactor, although the call knows its own name.
#[test]
fn nothing_is_left_of_it_when_the_reactor_is_dropped() {
    let mut stage = Stage::new();
    let owned = Rc::new(());
    let name: Rc<Cell<Option<PeriodicCall>>> = Rc::default();
    let periodic = stage.reactor.call_every(INTERVAL, {
        let (owned, name) = (Rc::clone(&owned), Rc::clone(&name));
        move |_, _| {
            let _ = (&owned, &name);
        }
    });
    name.set(Some(periodic));
    stage.pass(10.0);
    drop(stage.reactor);
    assert_eq!(Rc::strong_count(&owned), 1);
}
