//! What the loop measures.

use std::thread;
use std::time::{Duration, Instant};

use bowline::inspect::{Budget, CallbackKind, SlowLimits};
use bowline::{Address, Context, Limits, Protocol, Reactor, Transport, Transports};

use crate::capture;
use crate::support::{DescriptorLedger, run_until};

const SLOW: Duration = Duration::from_millis(20);

struct Sleeper;

impl<T: Transport> Protocol<T> for Sleeper {
    fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
        thread::sleep(SLOW);
        cx.transport.write(data);
    }
}

#[test]
fn a_slow_callback_is_kept_with_its_name_its_kind_and_its_time() {
    let ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let (ours, theirs) = crate::support::socketpair();
    reactor.adopt(bowline::Unix, ours.into(), Sleeper).unwrap();
    for _ in 0..3 {
        reactor.turn(Some(Duration::ZERO));
    }
    std::io::Write::write_all(&mut &theirs, b"x").unwrap();
    let is_kept = |reactor: &mut Reactor| !reactor.measurements().slowest().is_empty();
    run_until(&mut reactor, is_kept);
    let slow = reactor.measurements().slowest()[0].clone();
    assert_eq!(slow.kind, CallbackKind::Ready);
    assert!(slow.name.starts_with("Sleeper,UNIX"), "{}", slow.name);
    assert!(
        slow.took >= SLOW && slow.took < SLOW * 20,
        "{:?}",
        slow.took
    );
    assert!(slow.token.is_some());
    assert!(slow.age.is_some_and(|age| age < Duration::from_secs(60)));
    let longest = reactor.measurements().turns().longest();
    assert!(longest >= SLOW, "the turn took as long: {longest:?}");
    let last: Vec<_> = reactor.measurements().last_turns().collect();
    let is_there = |turn: &&bowline::inspect::TurnRecord| turn.times.ready >= SLOW;
    assert!(last.iter().any(|turn| is_there(&turn)), "{last:?}");
    drop((reactor, theirs));
    ledger.assert_balanced();
}

/// Sleeps as the letter says, and then does what the letter says.
struct Obeys;

impl<T: Transport> Protocol<T> for Obeys {
    fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
        match data {
            b"ends" => {
                thread::sleep(SLOW);
                cx.transport.abort_connection();
            }
            b"panics" => {
                thread::sleep(SLOW);
                std::panic::resume_unwind(Box::new("on purpose"));
            }
            b"sleeps" => thread::sleep(SLOW),
            _ => {}
        }
        cx.transport.write(data);
    }

    fn log_prefix(&self) -> std::borrow::Cow<'_, str> {
        "Obeys".into()
    }
}

/// All of them are ready in one turn, and what was said to each is done in it. The tokens
/// of them, in the order of the words, and how long the turn took.
fn in_one_turn(
    reactor: &mut Reactor,
    words: &[&str],
) -> (Vec<bowline::descriptor::Token>, Duration) {
    let ends: Vec<_> = words.iter().map(|_| crate::support::socketpair()).collect();
    let adopt = |(ours, theirs): (std::os::unix::net::UnixStream, _)| {
        let handle = reactor.adopt(bowline::Unix, ours.into(), Obeys).unwrap();
        (handle.token(), theirs)
    };
    let ends: Vec<_> = ends.into_iter().map(adopt).collect();
    for _ in 0..3 {
        reactor.turn(Some(Duration::ZERO));
    }
    for ((_, theirs), word) in ends.iter().zip(words) {
        std::io::Write::write_all(&mut &*theirs, word.as_bytes()).unwrap();
    }
    // One that panics is not counted among the events.
    let called = |reactor: &Reactor| reactor.statistics().events + reactor.statistics().panics;
    let before = called(reactor);
    let began = Instant::now();
    reactor.turn(Some(Duration::ZERO));
    let took = began.elapsed();
    assert_eq!(called(reactor), before + words.len() as u64);
    (ends.into_iter().map(|(token, _)| token).collect(), took)
}

#[test]
fn of_many_callbacks_in_a_turn_the_slow_ones_are_found_whatever_became_of_them() {
    let ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let words = [
        "quick", "sleeps", "quick", "ends", "quick", "panics", "sleeps", "quick",
    ];
    let (tokens, turn) = in_one_turn(&mut reactor, &words);
    let measured = reactor.measurements();
    let expected = words.iter().zip(&tokens);
    let expected: Vec<_> = expected.filter(|(word, _)| **word != "quick").collect();
    // What the others slept is not its own, however busy the machine is. The ticks are
    // known to be as long as they are to some hundredths.
    let most = turn - SLOW * (expected.len() as u32 - 1) + SLOW / 2;
    for (word, token) in &expected {
        let is_it = |it: &&bowline::inspect::SlowCallback| it.token == Some(**token);
        let found: Vec<_> = measured.slowest().iter().filter(is_it).collect();
        assert_eq!(found.len(), 1, "{word}: {:?}", measured.slowest());
        assert!(found[0].name.starts_with("Obeys,UNIX"), "{word}: {found:?}");
        assert_eq!(found[0].kind, CallbackKind::Ready);
        let took = found[0].took;
        assert!(took >= SLOW && took < most, "{word}: {took:?} of {turn:?}");
    }
    // No time is told of twice. (A quick one is slow too where the processor was taken from it.)
    let told: Duration = measured.slowest().iter().map(|it| it.took).sum();
    assert!(
        told <= turn + SLOW / 2,
        "{told:?} of {turn:?}: {measured:?}"
    );
    // What returned first is the longest ago.
    let sleeps = |token| measured.slowest().iter().find(|it| it.token == Some(token));
    let (first, last) = (sleeps(tokens[1]), sleeps(tokens[6]));
    let between = last.unwrap().at - first.unwrap().at;
    assert!(between >= SLOW * 5 / 2, "{between:?}");
    drop(reactor);
    ledger.assert_balanced();
}

#[test]
fn a_slow_turn_is_kept_with_what_ran_in_it() {
    let mut reactor = Reactor::new().unwrap();
    let (tokens, _) = in_one_turn(&mut reactor, &["sleeps", "quick", "sleeps"]);
    // Where nothing was slow by itself, all was.
    reactor.set_slow_limits(SlowLimits::default().callback(SLOW * 10));
    reactor.turn(Some(Duration::ZERO));
    for _ in 0..100 {
        reactor.call_soon(|_| thread::sleep(SLOW / 5));
    }
    run_until(&mut reactor, |reactor| reactor.is_idle());
    let turns = reactor.measurements().slowest_turns();
    let of_two = |it: &&bowline::inspect::SlowTurn| it.events == 3;
    let turn = turns.iter().find(of_two).expect("it is kept");
    let ran: Vec<_> = turn.ran.iter().map(|it| it.token.unwrap()).collect();
    assert!(
        ran.contains(&tokens[0]) && ran.contains(&tokens[2]),
        "{turn:?}"
    );
    let told: Duration = turn.ran.iter().map(|it| it.took).sum();
    assert!(told <= turn.times.ready, "{turn:?}");
    assert!(turn.times.ready >= SLOW * 2, "{turn:?}");
    let many = turns.iter().find(|it| it.ran.is_empty());
    let calls = many.expect("it is kept too").times.calls;
    assert!(calls >= SLOW * 20, "{turns:?}");
    assert!(turns.is_sorted_by(|a, b| a.times.total() >= b.times.total()));
}

#[test]
fn delayed_calls_that_wait_and_those_that_are_late_are_counted() {
    let clock = bowline::testing::ManualClock::new();
    let mut reactor = Reactor::with_clock(clock.clone()).unwrap();
    reactor.set_limits(Limits::default().timers(2));
    for number in 0..10 {
        reactor.call_later(Duration::from_millis(number), |_| {});
    }
    reactor.call_later(Duration::from_secs(60), |_| {});
    assert_eq!(reactor.delayed_call_counts(), (11, 0));
    clock.advance(Duration::from_millis(20));
    reactor.turn(Some(Duration::ZERO));
    assert_eq!(reactor.delayed_call_counts(), (9, 8), "two a turn");
    run_until(&mut reactor, |reactor| reactor.is_idle());
    assert_eq!(reactor.delayed_call_counts(), (1, 0));
}

#[test]
fn a_slow_closure_is_named_by_the_function_that_it_stands_in() {
    fn begins_long_work(reactor: &mut Reactor) {
        reactor.call_later(Duration::ZERO, |_| thread::sleep(SLOW));
        reactor.call_soon(|_| thread::sleep(SLOW));
        reactor.defer(|_| thread::sleep(SLOW));
    }
    let mut reactor = Reactor::new().unwrap();
    begins_long_work(&mut reactor);
    run_until(&mut reactor, |reactor| {
        reactor.measurements().slowest().len() == 3
    });
    let slowest = reactor.measurements().slowest();
    for kind in [
        CallbackKind::Timer,
        CallbackKind::Soon,
        CallbackKind::Deferred,
    ] {
        let slow = slowest.iter().find(|it| it.kind == kind);
        let name = &slow
            .unwrap_or_else(|| panic!("no {kind:?}: {slowest:?}"))
            .name;
        assert!(name.ends_with("begins_long_work::{{closure}}"), "{name}");
        assert!(!name.starts_with("bowline"), "{name}");
    }
}

#[test]
fn of_many_slow_callbacks_the_slowest_are_kept_in_order() {
    let mut reactor = Reactor::new().unwrap();
    reactor.set_slow_limits(SlowLimits::default().callback(Duration::from_micros(200)));
    for round in 0..50_u64 {
        reactor.call_soon(move |_| {
            // In no order.
            thread::sleep(Duration::from_micros(300 + 100 * (round * 7 % 50)));
        });
    }
    run_until(&mut reactor, |reactor| reactor.is_idle());
    let slowest = reactor.measurements().slowest();
    assert_eq!(slowest.len(), 32);
    assert!(slowest.is_sorted_by(|a, b| a.took >= b.took), "{slowest:?}");
    assert!(slowest[0].took >= Duration::from_micros(5_100));
}

#[test]
fn each_kind_of_callback_is_counted_in_one_turn_of_sixteen() {
    let mut reactor = Reactor::new().unwrap();
    for _ in 0..160 {
        reactor.call_soon(|_| {});
        reactor.call_later(Duration::ZERO, |reactor| reactor.defer(|_| {}));
        reactor.turn(Some(Duration::ZERO));
        reactor.turn(Some(Duration::ZERO));
    }
    let measured = reactor.measurements();
    for kind in [
        CallbackKind::Timer,
        CallbackKind::Soon,
        CallbackKind::Deferred,
    ] {
        let count = measured.callbacks(kind).count();
        assert!((5..=40).contains(&count), "{kind:?}: {count} of 160");
    }
    assert_eq!(measured.callbacks(CallbackKind::Remote).count(), 0);
    // Of 320 the first, and after it one in 16 or 24, which stands for those before it.
    let counted = measured.turns().count();
    assert!((296..=320).contains(&counted), "{counted}");
    let kept = measured.last_turns().count();
    assert!((13..=128).contains(&kept), "{kept}");
    assert!(measured.times().total() > Duration::ZERO);
    assert!(measured.busy() > Duration::ZERO);
}

#[test]
fn a_budget_that_runs_out_is_counted() {
    let mut reactor = Reactor::new().unwrap();
    reactor.set_limits(Limits::default().calls(2).timers(2).notifications(2));
    for _ in 0..10 {
        reactor.call_soon(|_| {});
        reactor.defer(|_| {});
        reactor.call_later(Duration::ZERO, |_| {});
    }
    run_until(&mut reactor, |reactor| {
        reactor.is_idle() && reactor.delayed_calls().next().is_none()
    });
    let measured = reactor.measurements();
    for budget in [Budget::Calls, Budget::Notifications, Budget::Timers] {
        let spent = measured.spent(budget);
        assert!((3..=5).contains(&spent), "{budget:?}: {spent} times");
    }
    assert_eq!(measured.spent(Budget::Events), 0);
}

#[test]
fn an_age_is_that_since_the_registration_and_there_is_none_of_what_is_gone() {
    let mut reactor = Reactor::new().unwrap();
    let listener = reactor
        .listen_tcp(([127, 0, 0, 1], 0).into(), |_: &Address| Sleeper)
        .unwrap();
    thread::sleep(Duration::from_millis(50));
    let token = listener.token();
    let age = reactor.age(token).expect("it is registered");
    assert!(
        age >= Duration::from_millis(50) && age < Duration::from_secs(30),
        "{age:?}"
    );
    reactor.remove(token);
    assert_eq!(reactor.age(token), None);
}

#[test]
fn a_callback_of_a_connection_that_takes_seconds_is_told_in_full() {
    struct Sleeps(Duration);
    impl<T: Transport> Protocol<T> for Sleeps {
        fn data_received(&mut self, _: &mut Context<'_, T>, _: &[u8]) {
            thread::sleep(self.0);
        }
    }
    let long = Duration::from_millis(2_200);
    let mut reactor = Reactor::new().unwrap();
    let (ours, theirs) = crate::support::socketpair();
    reactor
        .adopt(bowline::Unix, ours.into(), Sleeps(long))
        .unwrap();
    std::io::Write::write_all(&mut &theirs, b"x").unwrap();
    run_until(&mut reactor, |reactor| {
        !reactor.measurements().slowest().is_empty()
    });
    let measured = reactor.measurements();
    let slowest = &measured.slowest()[0];
    assert!(slowest.name.starts_with("Sleeps,"), "{slowest:?}");
    let within = long..long + Duration::from_secs(1);
    assert!(within.contains(&slowest.took), "{slowest:?}");
    let turn = measured.last_turns().map(|it| it.times.ready).max();
    assert!(turn >= Some(long), "the turn took {turn:?}");
}

/// A callback that is as long as the halves of the tick count that are compared is told
/// whole: the lower half comes round after a second or two.
#[test]
fn a_callback_of_seconds_is_told_in_full() {
    // Once round at 2 GHz and above.
    let long = Duration::from_millis(2_200);
    let mut reactor = Reactor::new().unwrap();
    reactor.call_later(Duration::ZERO, move |_| thread::sleep(long));
    run_until(&mut reactor, |reactor| {
        reactor.is_idle() && reactor.delayed_calls().next().is_none()
    });
    let measured = reactor.measurements();
    let told = measured.slowest().first().map(|it| it.took);
    let within = long..long + Duration::from_secs(1);
    assert!(told.is_some_and(|told| within.contains(&told)), "{told:?}");
    let turn = measured.last_turns().map(|it| it.times.timers).max();
    assert!(turn >= Some(long), "the turn took {turn:?}");
    assert!(measured.turns().longest() >= long);
    assert!(measured.busy() >= long);
}

#[test]
fn slow_turns_are_logged_once_per_kind_and_interval_with_what_ran() {
    let lines = || capture::lines("a turn took");
    capture::start();
    let mut reactor = Reactor::new().unwrap();
    let slow = |reactor: &mut Reactor, limits| {
        reactor.set_slow_limits(limits);
        let (ours, theirs) = crate::support::socketpair();
        reactor.adopt(bowline::Unix, ours.into(), Sleeper).unwrap();
        std::io::Write::write_all(&mut &theirs, b"x").unwrap();
        theirs.set_nonblocking(true).unwrap();
        run_until(reactor, |_| {
            std::io::Read::read(&mut &theirs, &mut [0]).is_ok()
        });
        // The turn that has ended just now is told behind it.
        reactor.turn(Some(Duration::ZERO));
    };
    slow(&mut reactor, SlowLimits::default());
    assert_eq!(lines(), [""; 0], "nobody has said what is slow");
    let limits = SlowLimits::default().turn(SLOW / 2);
    for _ in 0..3 {
        slow(&mut reactor, limits);
    }
    let of_connection = lines();
    assert_eq!(of_connection.len(), 1, "{of_connection:?}");
    assert!(
        of_connection[0].contains("; ready of Sleeper,UNIX"),
        "{of_connection:?}"
    );
    // Of another kind, it is told at once.
    reactor.call_soon(|_| thread::sleep(SLOW));
    run_until(&mut reactor, |reactor| reactor.is_idle());
    let of_closure = lines().pop().unwrap();
    assert_eq!(lines().len(), 2, "{:?}", lines());
    assert!(
        of_closure.contains("; soon of inspect::measures::slow_turns"),
        "{of_closure}"
    );
    // When the interval has passed, with how many were not told.
    slow(&mut reactor, limits.warn_every(Duration::ZERO));
    assert_eq!(lines().len(), 3, "{:?}", lines());
    let last = lines().pop().unwrap();
    assert!(
        last.contains("Sleeper") && last.ends_with("; 2 more like it since the last line"),
        "{last}"
    );
}
