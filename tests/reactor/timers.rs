//! Delayed calls.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bowline::error::DelayedCallError;
use bowline::lifecycle::{Phase, SystemEvent};
use bowline::testing::ManualClock;
use bowline::{Limits, Reactor, Transports};

use crate::support::{DEADLINE, DescriptorLedger, Record, Recorder, run_until, socketpair};
use crate::{Notes, PANIC};

const SECOND: Duration = Duration::from_secs(1);

fn manual() -> (ManualClock, Reactor) {
    let clock = ManualClock::new();
    let reactor = Reactor::with_clock(clock.clone()).unwrap();
    (clock, reactor)
}

fn turn(reactor: &mut Reactor) {
    reactor.turn(Some(Duration::ZERO));
}

/// Contract R-20.
#[test]
fn delayed_call_runs_when_due_and_not_before() {
    let _alone = DescriptorLedger::open();
    let (clock, mut reactor) = manual();
    let notes = Notes::new();
    let call = reactor.call_later(SECOND, notes.noting("called"));
    assert_eq!(call.due(&reactor), Some(reactor.now() + SECOND));
    clock.advance(SECOND - Duration::from_nanos(1));
    turn(&mut reactor);
    assert!(call.is_active(&reactor));
    assert_eq!(notes.len(), 0);
    clock.advance(Duration::from_nanos(1));
    turn(&mut reactor);
    assert!(!call.is_active(&reactor));
    turn(&mut reactor);
    assert_eq!(notes.all(), ["called"]);
}

/// Contract R-23.
#[test]
fn earlier_call_runs_first_and_equal_ones_in_the_order_scheduled() {
    let _alone = DescriptorLedger::open();
    let (clock, mut reactor) = manual();
    let notes = Notes::new();
    for (delay, note) in [(3, 'e'), (1, 'a'), (2, 'c'), (1, 'b'), (2, 'd'), (3, 'f')] {
        reactor.call_later(SECOND * delay, notes.noting(note));
    }
    clock.advance(SECOND * 10);
    turn(&mut reactor);
    assert_eq!(notes.all(), ['a', 'b', 'c', 'd', 'e', 'f']);
}

/// Contract W-36.
#[test]
fn a_thousand_calls_without_delay_run_in_the_order_scheduled() {
    let _alone = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let notes = Notes::new();
    for number in 0..1000 {
        reactor.call_later(Duration::ZERO, notes.noting(number));
    }
    run_until(&mut reactor, |_| notes.len() == 1000);
    assert!(notes.all().is_sorted());
}

/// Contract R-16.
#[test]
fn call_without_delay_made_in_a_callback_waits_for_a_later_turn() {
    let _alone = DescriptorLedger::open();
    let (_clock, mut reactor) = manual();
    let notes = Notes::new();
    let in_timer = notes.clone();
    reactor.call_later(Duration::ZERO, move |reactor| {
        in_timer.push("outer");
        reactor.call_later(Duration::ZERO, in_timer.noting("inner"));
    });
    turn(&mut reactor);
    assert_eq!(notes.all(), ["outer"]);
    assert!(!reactor.is_idle() || reactor.next_deadline() <= Some(reactor.now()));
    turn(&mut reactor);
    assert_eq!(notes.all(), ["outer", "inner"]);
}

/// Contract R-18.
#[test]
fn cancelled_call_does_not_run_and_cannot_be_cancelled_again() {
    let _alone = DescriptorLedger::open();
    let (clock, mut reactor) = manual();
    let notes = Notes::<()>::new();
    let call = reactor.call_later(SECOND, notes.noting(()));
    call.cancel(&mut reactor).unwrap();
    assert_eq!(call.cancel(&mut reactor), Err(DelayedCallError));
    assert_eq!(call.reset(&mut reactor, SECOND), Err(DelayedCallError));
    assert_eq!(call.delay(&mut reactor, SECOND), Err(DelayedCallError));
    assert_eq!(call.hasten(&mut reactor, SECOND), Err(DelayedCallError));
    clock.advance(SECOND * 2);
    turn(&mut reactor);
    assert_eq!(notes.len(), 0);
}

/// Contract R-18.
#[test]
fn call_cannot_be_cancelled_while_or_after_it_runs() {
    let _alone = DescriptorLedger::open();
    let (_clock, mut reactor) = manual();
    let result = Rc::new(Cell::new(None));
    let own = Rc::new(Cell::new(None));
    let (seen, itself) = (Rc::clone(&result), Rc::clone(&own));
    let call = reactor.call_later(Duration::ZERO, move |reactor| {
        let call: bowline::DelayedCall = itself.get().expect("set before the turn");
        assert!(!call.is_active(reactor));
        seen.set(Some(call.cancel(reactor)));
    });
    own.set(Some(call));
    turn(&mut reactor);
    assert_eq!(result.get(), Some(Err(DelayedCallError)));
    assert_eq!(call.cancel(&mut reactor), Err(DelayedCallError));
}

#[test]
fn stale_call_does_not_reach_one_that_took_its_place() {
    let _alone = DescriptorLedger::open();
    let (clock, mut reactor) = manual();
    let notes = Notes::new();
    let old = reactor.call_later(SECOND, notes.noting("old"));
    old.cancel(&mut reactor).unwrap();
    reactor.call_later(SECOND, notes.noting("new"));
    assert_eq!(old.cancel(&mut reactor), Err(DelayedCallError));
    clock.advance(SECOND);
    turn(&mut reactor);
    assert_eq!(notes.all(), ["new"]);
}

#[test]
fn due_call_cancelled_by_another_of_the_same_turn_does_not_run() {
    let _alone = DescriptorLedger::open();
    let (_clock, mut reactor) = manual();
    let notes = Notes::new();
    let second = Rc::new(Cell::new(None::<bowline::DelayedCall>));
    let (victim, in_first) = (Rc::clone(&second), notes.clone());
    reactor.call_later(Duration::ZERO, move |reactor| {
        in_first.push("first");
        victim.get().expect("scheduled").cancel(reactor).unwrap();
    });
    second.set(Some(
        reactor.call_later(Duration::ZERO, notes.noting("second")),
    ));
    turn(&mut reactor);
    turn(&mut reactor);
    assert_eq!(notes.all(), ["first"]);
}

/// Contract R-19.
#[test]
fn reset_counts_from_now_and_delay_from_the_due_time() {
    let _alone = DescriptorLedger::open();
    let (clock, mut reactor) = manual();
    let start = reactor.now();
    let notes = Notes::new();
    let noting = |what: &'static str| {
        let notes = notes.clone();
        move |reactor: &mut Reactor| notes.push(((reactor.now() - start).as_secs(), what))
    };
    let sooner = reactor.call_later(SECOND * 10, noting("sooner"));
    let later = reactor.call_later(SECOND * 10, noting("later"));
    let delayed = reactor.call_later(SECOND * 10, noting("delayed"));
    let hastened = reactor.call_later(SECOND * 10, noting("hastened"));
    clock.advance(SECOND);
    turn(&mut reactor);
    sooner.reset(&mut reactor, SECOND * 4).unwrap();
    later.reset(&mut reactor, SECOND * 14).unwrap();
    delayed.delay(&mut reactor, SECOND * 2).unwrap();
    hastened.hasten(&mut reactor, SECOND * 7).unwrap();
    assert_eq!(sooner.due(&reactor), Some(start + SECOND * 5));
    assert_eq!(later.due(&reactor), Some(start + SECOND * 15));
    assert_eq!(delayed.due(&reactor), Some(start + SECOND * 12));
    assert_eq!(hastened.due(&reactor), Some(start + SECOND * 3));
    for _ in 0..20 {
        clock.advance(SECOND);
        turn(&mut reactor);
    }
    assert_eq!(
        notes.all(),
        [
            (3, "hastened"),
            (5, "sooner"),
            (12, "delayed"),
            (15, "later")
        ]
    );
}

#[test]
fn call_hastened_into_the_past_runs_in_the_next_turn() {
    let _alone = DescriptorLedger::open();
    let (_clock, mut reactor) = manual();
    let notes = Notes::new();
    let call = reactor.call_later(SECOND, notes.noting("called"));
    call.hasten(&mut reactor, Duration::MAX).unwrap();
    turn(&mut reactor);
    assert_eq!(notes.all(), ["called"]);
}

/// Adding too much to the due time left the call where it was.
/// Contract R-22: the poll waits until the call that was moved, however far away
/// the others are, and does not wake for one that was put off.
#[test]
fn poll_waits_for_the_time_to_which_a_call_was_moved() {
    let _alone = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let notes = Notes::new();
    // Has the poller set to some time, and then to a far one.
    reactor.call_later(Duration::from_millis(1), notes.noting("first"));
    let put_off = reactor.call_later(SECOND * 5, notes.noting("put off"));
    run_until(&mut reactor, |_| notes.len() == 1);
    put_off.reset(&mut reactor, SECOND * 3600).unwrap();
    let moved = reactor.call_later(SECOND * 1800, notes.noting("moved"));
    reactor.turn(Some(Duration::from_millis(20)));
    assert_eq!(notes.len(), 1);
    moved.reset(&mut reactor, Duration::from_millis(5)).unwrap();
    let began = Instant::now();
    let before = reactor.statistics().turns;
    while notes.len() == 1 {
        reactor.turn(Some(DEADLINE));
    }
    assert_eq!(notes.all(), ["first", "moved"]);
    assert!(began.elapsed() < DEADLINE / 2, "it was not moved");
    assert!(reactor.statistics().turns - before < 10);
}

/// Contract R-22.
#[test]
fn delay_beyond_what_the_clock_can_hold_never_ends() {
    let _alone = DescriptorLedger::open();
    let (clock, mut reactor) = manual();
    let notes = Notes::new();
    reactor.call_later(Duration::MAX, notes.noting("far"));
    let delayed = reactor.call_later(SECOND, notes.noting("delayed"));
    delayed.delay(&mut reactor, Duration::MAX).unwrap();
    clock.advance(SECOND * 3600 * 24 * 365);
    turn(&mut reactor);
    assert_eq!(notes.len(), 0);
    assert!(delayed.is_active(&reactor));
}

/// Contract R-20.
#[test]
fn listing_has_what_waits_and_nothing_else() {
    let _alone = DescriptorLedger::open();
    let (clock, mut reactor) = manual();
    let calls: Vec<_> = (1..=5)
        .map(|n| reactor.call_later(SECOND * n, |_| {}))
        .collect();
    calls[2].cancel(&mut reactor).unwrap();
    clock.advance(SECOND);
    turn(&mut reactor);
    let mut waiting: Vec<_> = reactor.delayed_calls().collect();
    waiting.sort_by_key(|call| call.due(&reactor));
    assert_eq!(waiting, [calls[1], calls[3], calls[4]]);
    assert!(reactor.next_deadline().unwrap() <= calls[1].due(&reactor).unwrap());
}

/// Contract R-21.
#[test]
fn failing_call_is_counted_and_others_of_the_turn_still_run() {
    let _alone = DescriptorLedger::open();
    let (_clock, mut reactor) = manual();
    let notes = Notes::new();
    reactor.call_later(Duration::ZERO, notes.noting(1));
    reactor.call_later(Duration::ZERO, |_| panic!("{PANIC}"));
    reactor.call_later(Duration::ZERO, |_| panic!("{PANIC}"));
    reactor.call_later(Duration::ZERO, notes.noting(2));
    turn(&mut reactor);
    assert_eq!(notes.all(), [1, 2]);
    assert_eq!(reactor.statistics().panics, 2);
}

/// Each panic used to begin the phase anew, with a full budget and with what
/// had just been scheduled: this turn never ended.
#[test]
fn failing_call_that_schedules_itself_anew_does_not_keep_the_turn() {
    let _alone = DescriptorLedger::open();
    fn tick(reactor: &mut Reactor) {
        reactor.call_later(Duration::ZERO, tick);
        reactor.call_soon(tock);
        panic!("{PANIC}");
    }
    fn tock(_: &mut Reactor) {
        panic!("{PANIC}");
    }
    let (_clock, mut reactor) = manual();
    reactor.call_later(Duration::ZERO, tick);
    for _ in 0..10 {
        turn(&mut reactor);
    }
    assert_eq!(reactor.statistics().timers, 10);
}

#[test]
fn time_stands_still_within_a_turn() {
    let _alone = DescriptorLedger::open();
    let (clock, mut reactor) = manual();
    let seen = Notes::new();
    for _ in 0..2 {
        let (seen, clock) = (seen.clone(), clock.clone());
        reactor.call_later(Duration::ZERO, move |reactor| {
            seen.push(reactor.now());
            clock.advance(SECOND);
        });
    }
    turn(&mut reactor);
    let seen = seen.all();
    assert_eq!(seen[0], seen[1]);
}

/// Between turns the time of the last one used to count: with a foreign loop
/// that waits long, a delay could be over before it began.
#[test]
fn delay_asked_for_between_turns_counts_from_then() {
    let _alone = DescriptorLedger::open();
    let (clock, mut reactor) = manual();
    turn(&mut reactor);
    assert_eq!(reactor.delayed_calls().count(), 0);
    let _ = reactor.now();
    clock.advance(SECOND * 10);
    let notes = Notes::new();
    reactor.call_later(SECOND, notes.noting("called"));
    turn(&mut reactor);
    assert_eq!(notes.len(), 0);
    clock.advance(SECOND);
    turn(&mut reactor);
    assert_eq!(notes.all(), ["called"]);
}

#[test]
fn clock_that_advances_by_itself_runs_years_at_once() {
    let _alone = DescriptorLedger::open();
    let (clock, mut reactor) = manual();
    clock.auto_advance(true);
    let start = reactor.now();
    let seen = Notes::new();
    fn each_hour(reactor: &mut Reactor, left: u32, seen: Notes<Instant>) {
        seen.push(reactor.now());
        if left == 0 {
            reactor.stop().unwrap();
            return;
        }
        reactor.call_later(SECOND * 3600, move |reactor| {
            each_hour(reactor, left - 1, seen);
        });
    }
    let first = seen.clone();
    reactor.call_later(SECOND * 3600, move |reactor| {
        each_hour(reactor, 9_000, first)
    });
    let began = Instant::now();
    reactor.run().unwrap();
    assert!(began.elapsed() < SECOND * 10);
    let seen = seen.all();
    assert_eq!(seen.len(), 9_001);
    for (hour, at) in (1u32..).zip(&seen) {
        assert_eq!(*at, start + SECOND * 3600 * hour);
    }
}

/// Contract W-37.
#[test]
fn million_calls_wait_and_run_in_order_of_their_time() {
    let _alone = DescriptorLedger::open();
    const CALLS: u32 = 1_000_000;
    let (clock, mut reactor) = manual();
    let ran = Rc::new(Cell::new(0u32));
    let last = Rc::new(Cell::new(reactor.now()));
    let mut calls = Vec::new();
    // Spread over about a thousand seconds, in no order.
    let mut place = 1u32;
    for _ in 0..CALLS {
        place = place.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let delay = Duration::from_micros(u64::from(place >> 2));
        let (ran, last) = (Rc::clone(&ran), Rc::clone(&last));
        let due = reactor.now() + delay;
        calls.push(reactor.call_later(delay, move |_| {
            assert!(last.get() <= due, "a later one ran before");
            last.set(due);
            ran.set(ran.get() + 1);
        }));
    }
    for call in calls.iter().skip(1).step_by(2) {
        call.cancel(&mut reactor).unwrap();
    }
    for _ in 0..20 {
        clock.advance(Duration::from_secs(60));
        loop {
            turn(&mut reactor);
            if reactor.is_idle() {
                break;
            }
        }
    }
    assert_eq!(ran.get(), CALLS / 2);
    assert_eq!(reactor.statistics().panics, 0);
    assert_eq!(reactor.delayed_calls().count(), 0);
}

/// Contract R-16, W-42.
#[test]
fn storm_of_due_calls_leaves_sockets_their_turn() {
    let _alone = DescriptorLedger::open();
    let (_clock, mut reactor) = manual();
    let limit = 100;
    reactor.set_limits(Limits::default().timers(limit));
    let (ours, theirs) = socketpair();
    let record = Record::default();
    reactor
        .adopt_unix_stream(ours.into(), Recorder::new(&record))
        .unwrap();
    let ran = Rc::new(Cell::new(0));
    for _ in 0..1_000 {
        let ran = Rc::clone(&ran);
        reactor.call_later(Duration::ZERO, move |_| ran.set(ran.get() + 1));
    }
    std::io::Write::write_all(&mut &theirs, b"hello").unwrap();
    turn(&mut reactor);
    assert_eq!(ran.get(), limit);
    assert_eq!(record.data(), b"hello");
    // Nothing more arrives, and yet the rest must not wait.
    let mut turns = 1;
    while ran.get() < 1_000 {
        reactor.turn(None);
        turns += 1;
        assert!(turns <= 10);
    }
}

/// How late a hundred calls are on average; none may be early.
fn mean_lateness() -> Duration {
    let mut reactor = Reactor::new().unwrap();
    let lateness = Rc::new(RefCell::new(Vec::new()));
    for number in 0..100u32 {
        let delay = Duration::from_micros(1_000 + 1_370 * u64::from(number));
        let due = Instant::now() + delay;
        let lateness = Rc::clone(&lateness);
        reactor.call_later(delay, move |_| {
            let now = Instant::now();
            assert!(now >= due, "{:?} early", due - now);
            lateness.borrow_mut().push(now - due);
        });
    }
    run_until(&mut reactor, |reactor| reactor.delayed_calls().count() == 0);
    assert_eq!(reactor.statistics().panics, 0);
    lateness.borrow().iter().sum::<Duration>() / 100
}

#[test]
fn real_clock_is_never_early_and_hardly_late() {
    let _alone = DescriptorLedger::open();
    // A busy machine delays many of the attempts; a loop that is late delays all.
    let mut attempts = (0..100).map(|_| mean_lateness());
    assert!(attempts.any(|late| late < Duration::from_millis(2)));
}

fn with_slack(slack: Duration) -> Reactor {
    let mut reactor = Reactor::new().unwrap();
    reactor.set_limits(Limits::default().timer_slack(slack));
    reactor
}

#[test]
fn dense_calls_share_wakeups_and_none_runs_early() {
    let _alone = DescriptorLedger::open();
    let mut reactor = with_slack(Duration::from_millis(20));
    let left = Rc::new(Cell::new(500));
    for number in 0..500 {
        let delay = Duration::from_micros(number * 100);
        let due = Instant::now() + delay;
        let left = Rc::clone(&left);
        reactor.call_later(delay, move |_| {
            assert!(Instant::now() >= due, "early");
            left.set(left.get() - 1);
        });
    }
    run_until(&mut reactor, |_| left.get() == 0);
    // 50 ms, 20 at a time, and a turn in between that sets the alarm.
    let turns = reactor.statistics().turns;
    assert!(turns < 12, "{turns} turns");
}

#[test]
fn slack_does_not_delay_what_stands_alone_or_is_wanted_at_once() {
    let _alone = DescriptorLedger::open();
    let mut reactor = with_slack(Duration::from_secs(3600));
    let notes = Notes::new();
    let alone = notes.noting("alone");
    reactor.call_later(Duration::from_millis(1), move |reactor| {
        alone(reactor);
        chain(reactor, 1_000);
    });
    run_until(&mut reactor, |reactor| reactor.statistics().timers == 1_001);
    assert_eq!(notes.all(), ["alone"]);
}

/// So many calls without delay, each from the one before.
fn chain(reactor: &mut Reactor, left: u32) {
    if left > 0 {
        reactor.call_later(Duration::ZERO, move |reactor| chain(reactor, left - 1));
    }
}

/// Contract R-22.
#[test]
fn poll_waits_for_the_call_that_is_left_after_a_cancellation() {
    let _alone = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let notes = Notes::new();
    // So long that even a machine that stalls has not come to it before.
    let soon = reactor.call_later(Duration::from_millis(500), notes.noting("soon"));
    reactor.call_later(Duration::from_millis(520), notes.noting("later"));
    reactor.turn(Some(Duration::ZERO));
    soon.cancel(&mut reactor).unwrap();
    let before = reactor.statistics().turns;
    while notes.len() == 0 {
        reactor.turn(Some(DEADLINE));
    }
    assert_eq!(notes.all(), ["later"]);
    assert!(reactor.statistics().turns - before < 10);
}

/// Contract: what is ready is fetched first; then come what was asked for
/// elsewhere, what is ready, what is due, and the end; and what a callback asks
/// for waits for the next turn.
#[test]
fn phases_of_a_turn_come_in_their_order() {
    let ledger = DescriptorLedger::open();
    let (clock, mut reactor) = manual();
    let notes = Notes::new();
    let (ours, theirs) = socketpair();
    struct Noting(Notes<&'static str>);
    impl<T: bowline::Transport> bowline::Protocol<T> for Noting {
        fn data_received(&mut self, cx: &mut bowline::Context<'_, T>, _: &[u8]) {
            self.0.push("data");
            cx.reactor
                .call_later(Duration::ZERO, self.0.noting("later"));
            cx.reactor.defer(self.0.noting("deferred"));
        }
    }
    reactor
        .adopt_unix_stream(ours.into(), Noting(notes.clone()))
        .unwrap();
    turn(&mut reactor);
    // The end waits for a hold, so that there is a turn after this one.
    let hold = reactor.hold(SystemEvent::Shutdown);
    let end = notes.noting("end");
    reactor.add_trigger(Phase::Before, SystemEvent::Shutdown, end);
    reactor.start().unwrap();
    std::io::Write::write_all(&mut &theirs, b"x").unwrap();
    reactor.call_later(SECOND, notes.noting("timer"));
    clock.advance(SECOND);
    let from_thread = Arc::new(AtomicBool::new(false));
    let (call, was_called) = (notes.noting("call"), Arc::clone(&from_thread));
    reactor.call_soon(move |reactor| {
        assert!(was_called.load(Ordering::Relaxed), "those of threads first");
        reactor.stop().unwrap();
        call(reactor);
    });
    let calling = move |_: &mut Reactor| from_thread.store(true, Ordering::Relaxed);
    reactor.remote().call_from_thread(calling).unwrap();
    turn(&mut reactor);
    assert_eq!(notes.all(), ["call", "data", "deferred", "timer", "end"]);
    turn(&mut reactor);
    assert_eq!(notes.all().last(), Some(&"later"));
    drop(hold);
    turn(&mut reactor);
    assert!(!reactor.is_running());
    drop((reactor, theirs));
    ledger.assert_balanced();
}

/// A process that was stopped has both to do, what is ready and what is due, and more
/// of the first than a turn's budgets allow: nobody whose bytes are there runs into a
/// time limit. Timers ran before.
#[test]
fn late_loop_reads_all_that_is_ready_before_what_is_due() {
    let ledger = DescriptorLedger::open();
    const CONNECTIONS: usize = 40;
    const SENT: usize = 3 * 65_536;
    let (clock, mut reactor) = manual();
    // A few events and one read for each at a time.
    reactor.set_limits(Limits::default().events(4));
    let budgets = reactor.transport_budgets();
    reactor.set_transport_budgets(budgets.read_bytes(1));
    let mut peers = Vec::new();
    let unread = Rc::new(Cell::new(CONNECTIONS * SENT));
    let found = Notes::new();
    struct Counts(Rc<Cell<usize>>);
    impl<T: bowline::Transport> bowline::Protocol<T> for Counts {
        fn data_received(&mut self, _: &mut bowline::Context<'_, T>, data: &[u8]) {
            self.0.set(self.0.get() - data.len());
        }
    }
    for _ in 0..CONNECTIONS {
        let (ours, theirs) = socketpair();
        let counts = Counts(Rc::clone(&unread));
        reactor.adopt_unix_stream(ours.into(), counts).unwrap();
        let (unread, found) = (Rc::clone(&unread), found.clone());
        reactor.call_later(SECOND, move |_| found.push(unread.get()));
        peers.push(theirs);
    }
    reactor.start().unwrap();
    turn(&mut reactor);
    for peer in &mut peers {
        std::io::Write::write_all(peer, &[0; SENT]).unwrap();
    }
    clock.advance(SECOND * 5);
    let mut turns = 0;
    while found.len() < CONNECTIONS {
        assert!(turns == 0 || !reactor.is_idle(), "it goes on at once");
        reactor.turn(None);
        turns += 1;
        assert!(turns < 200, "{} read on", unread.get());
    }
    assert_eq!(found.all(), [0; CONNECTIONS]);
    drop((reactor, peers));
    ledger.assert_balanced();
}

/// Work without an end does not keep what is due from running for ever, nor once the
/// loop is known to be behind.
#[test]
fn late_calls_wait_for_endless_work_for_some_turns_only() {
    let _alone = DescriptorLedger::open();
    let (clock, mut reactor) = manual();
    struct Endless;
    impl bowline::descriptor::Descriptor for Endless {
        fn ready(
            &mut self,
            _: &mut Reactor,
            _: bowline::descriptor::Readiness,
        ) -> bowline::descriptor::Next {
            bowline::descriptor::Next::Again
        }
        fn attend(&mut self, _: &mut Reactor) -> bowline::descriptor::Next {
            bowline::descriptor::Next::Again
        }
        fn facet(&mut self) -> &mut dyn std::any::Any {
            self
        }
    }
    let token = reactor.vacancy().unwrap().install(Box::new(Endless));
    reactor.notify(token);
    let notes = Notes::new();
    reactor.call_later(SECOND, notes.noting("late"));
    // In time it does not wait at all.
    clock.advance(SECOND);
    turn(&mut reactor);
    assert_eq!(notes.len(), 1);
    for late in [true, false] {
        reactor.call_later(SECOND, notes.noting("late"));
        clock.advance(SECOND * 2);
        let before = notes.len();
        let mut turns = 0;
        while notes.len() == before {
            turn(&mut reactor);
            turns += 1;
            assert!(turns <= 100, "it waits for ever");
        }
        assert_eq!(turns > 1, late, "{turns} turns");
        // It stays behind.
        reactor.call_later(Duration::ZERO, notes.noting("next"));
        clock.advance(SECOND);
    }
}
