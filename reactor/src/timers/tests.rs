use std::collections::{BTreeMap, HashSet};
use std::rc::Rc;
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::{FIRST_TIMER, GENERATION, Moment, TimerKey, Timers};

const YEAR: Duration = Duration::from_secs(365 * 24 * 3600);

fn ns(nanos: u64) -> Duration {
    Duration::from_nanos(nanos)
}

fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

fn new<T>() -> (Timers<T>, Instant) {
    let origin = Instant::now();
    (Timers::new(origin), origin)
}

fn pop_all<T>(timers: &mut Timers<T>) -> Vec<T> {
    std::iter::from_fn(|| timers.pop_due().map(|(_, value)| value)).collect()
}

fn fire<T>(timers: &mut Timers<T>, now: Instant) -> Vec<T> {
    timers.expire(timers.moment(now));
    pop_all(timers)
}

/// Follows `next_wakeup` until all timers have fired, and returns the number
/// of calls to `expire`.
#[track_caller]
fn follow_wakeups<T>(timers: &mut Timers<T>, mut now: Instant) -> usize {
    let mut calls = 0;
    while let Some(wakeup) = timers.next_wakeup() {
        assert!(wakeup > now || calls == 0, "a wake-up led nowhere");
        now = now.max(wakeup);
        timers.expire(timers.moment(now));
        pop_all(timers);
        calls += 1;
        assert!(calls < 10_000, "the wake-ups lead nowhere");
    }
    calls
}

#[test]
fn a_new_queue_has_nothing() {
    let (mut timers, t0) = new::<u8>();
    assert!(timers.is_empty());
    assert_eq!(timers.next_wakeup(), None);
    timers.expire(timers.moment(t0 + ms(5)));
    assert!(!timers.has_due());
    assert_eq!(timers.pop_due(), None);
    assert_eq!(timers.keys().count(), 0);
}

#[test]
fn a_cancelled_timer_drops_its_value_at_once() {
    let (mut timers, t0) = new();
    let value = Rc::new(());
    let key = timers.insert(t0 + ms(1), Rc::clone(&value));
    assert_eq!(Rc::strong_count(&value), 2);
    assert!(timers.cancel(key));
    assert_eq!(Rc::strong_count(&value), 1);
}

#[test]
fn a_timer_fires_at_its_deadline_and_not_a_nanosecond_before() {
    for delay in [1, 1023, 1024, 524_287, 524_288, 1 << 28, 1 << 37, 1 << 60] {
        let (mut timers, t0) = new();
        let key = timers.insert(t0 + ns(delay), delay);
        assert_eq!(fire(&mut timers, t0 + ns(delay - 1)), [], "{delay}");
        assert_eq!(timers.next_wakeup(), Some(t0 + ns(delay)));
        timers.expire(timers.moment(t0 + ns(delay)));
        assert!(timers.has_due());
        assert_eq!(timers.pop_due(), Some((key, delay)));
        assert!(!timers.has_due());
        assert!(timers.is_empty());
    }
}

#[test]
fn due_timers_come_in_the_order_of_their_deadlines() {
    let (mut timers, t0) = new();
    let delays = [900, 7_000_000, 20, 3_000_000_000, 21, 1_500, 1_400, 0, 600];
    for delay in delays {
        timers.insert(t0 + ns(delay), delay);
    }
    let mut sorted = delays.to_vec();
    sorted.sort_unstable();
    assert_eq!(fire(&mut timers, t0 + ms(10_000)), sorted);
}

#[test]
fn equal_deadlines_come_in_the_order_of_scheduling() {
    let (mut timers, t0) = new();
    let deadline = t0 + ms(700);
    let mut expected = Vec::new();
    // Scheduled from afar and from near, so that they start on all levels.
    for step in [0, 400, 690, 699] {
        timers.expire(timers.moment(t0 + ms(step)));
        for value in 0..3 {
            timers.insert(deadline, (step, value));
            timers.insert(deadline + ns(1), (step + 1000, value));
            expected.push((step, value));
        }
    }
    assert_eq!(fire(&mut timers, deadline), expected);
}

#[test]
fn a_reset_timer_comes_last_among_equal_deadlines() {
    let (mut timers, t0) = new();
    let first = timers.insert(t0 + ms(1), 'a');
    timers.insert(t0 + ms(1), 'b');
    assert!(timers.reset(first, t0 + ms(1)));
    assert_eq!(fire(&mut timers, t0 + ms(1)), ['b', 'a']);
}

#[test]
fn reset_moves_a_timer_both_ways() {
    let (mut timers, t0) = new();
    let later = timers.insert(t0 + ms(1), 'a');
    let earlier = timers.insert(t0 + ms(1_000), 'b');
    assert!(timers.reset(later, t0 + ms(2_000)));
    assert!(timers.reset(earlier, t0 + ms(2)));
    assert_eq!(timers.deadline(later), Some(t0 + ms(2_000)));
    assert_eq!(fire(&mut timers, t0 + ms(1_999)), ['b']);
    assert_eq!(fire(&mut timers, t0 + ms(2_000)), ['a']);
}

#[test]
fn a_cancelled_timer_does_not_fire() {
    let (mut timers, t0) = new();
    let key = timers.insert(t0 + ms(1), 'a');
    timers.insert(t0 + ms(1), 'b');
    assert!(timers.cancel(key));
    assert!(!timers.cancel(key));
    assert_eq!(timers.len(), 1);
    assert_eq!(fire(&mut timers, t0 + ms(1)), ['b']);
}

#[test]
fn a_stale_key_never_reaches_a_newer_timer() {
    let (mut timers, t0) = new();
    let cancelled = timers.insert(t0 + ms(1), 'a');
    timers.cancel(cancelled);
    let fired = timers.insert(t0 + ms(1), 'b');
    fire(&mut timers, t0 + ms(1));
    let newer = timers.insert(t0 + ms(2), 'c');
    for stale in [cancelled, fired] {
        assert!(!timers.contains(stale));
        assert_eq!(timers.deadline(stale), None);
        assert!(!timers.reset(stale, t0));
        assert!(!timers.cancel(stale));
    }
    assert!(timers.contains(newer));
    assert_eq!(timers.deadline(newer), Some(t0 + ms(2)));
}

#[test]
fn a_place_that_has_used_up_its_generations_is_retired() {
    let (mut timers, t0) = new();
    let first = timers.insert(t0, 'a');
    timers.cancel(first);
    let place = &mut timers.places[(first.node() - FIRST_TIMER) as usize];
    // One was used, and there is none of zero.
    let generations = u64::MAX / GENERATION;
    place.stamp = place.stamp.saturating_add((generations - 2) * GENERATION);
    let last = timers.insert(t0, 'b');
    assert_eq!(last.node(), first.node());
    assert_eq!(last.stamp() / GENERATION, generations);
    assert!(timers.cancel(last));
    let elsewhere = timers.insert(t0, 'c');
    assert_ne!(elsewhere.node(), first.node());
    assert!(!timers.cancel(last));
    assert_eq!(timers.keys().collect::<Vec<_>>(), [elsewhere]);
    assert!(timers.cancel(elsewhere));
}

#[test]
fn a_due_timer_can_be_cancelled_before_it_is_popped() {
    let (mut timers, t0) = new();
    let keys = ['a', 'b', 'c'].map(|value| timers.insert(t0 + ms(1), value));
    timers.expire(timers.moment(t0 + ms(1)));
    assert!(timers.cancel(keys[1]));
    assert_eq!(pop_all(&mut timers), ['a', 'c']);
}

#[test]
fn a_due_timer_that_is_reset_waits_again() {
    let (mut timers, t0) = new();
    let [_, moved, past] = ['a', 'b', 'c'].map(|value| timers.insert(t0 + ms(1), value));
    timers.expire(timers.moment(t0 + ms(1)));
    assert!(timers.reset(moved, t0 + ms(3)));
    assert!(timers.reset(past, t0));
    assert_eq!(pop_all(&mut timers), ['a']);
    assert_eq!(timers.next_wakeup(), Some(t0));
    assert_eq!(fire(&mut timers, t0 + ms(2)), ['c']);
    assert_eq!(fire(&mut timers, t0 + ms(3)), ['b']);
}

#[test]
fn a_timer_scheduled_for_the_past_waits_for_the_next_expire() {
    let (mut timers, t0) = new();
    timers.expire(timers.moment(t0 + ms(9)));
    for delay in [0, 9, 5] {
        timers.insert(t0 + ms(delay), delay);
    }
    assert!(!timers.has_due());
    assert_eq!(timers.pop_due(), None);
    assert_eq!(timers.next_wakeup(), Some(t0));
    assert_eq!(fire(&mut timers, t0 + ms(9)), [0, 5, 9]);
}

#[test]
fn timers_left_over_by_a_budget_keep_their_place() {
    let (mut timers, t0) = new();
    for delay in [1, 2, 3, 4] {
        timers.insert(t0 + ms(delay), (delay, "first"));
    }
    timers.expire(timers.moment(t0 + ms(4)));
    assert_eq!(timers.pop_due().map(|(_, value)| value), Some((1, "first")));
    for delay in [0, 3, 4, 5] {
        timers.insert(t0 + ms(delay), (delay, "second"));
    }
    assert_eq!(timers.next_wakeup(), Some(t0));
    assert_eq!(
        fire(&mut timers, t0 + ms(5)),
        [
            (0, "second"),
            (2, "first"),
            (3, "first"),
            (3, "second"),
            (4, "first"),
            (4, "second"),
            (5, "second"),
        ]
    );
}

#[test]
fn the_next_wakeup_reflects_cancel_and_reset() {
    let (mut timers, t0) = new();
    let near = timers.insert(t0 + ns(5_000), 'a');
    let nearer = timers.insert(t0 + ns(4_000), 'b');
    assert_eq!(timers.next_wakeup(), Some(t0 + ns(4_000)));
    timers.cancel(nearer);
    assert_eq!(timers.next_wakeup(), Some(t0 + ns(5_000)));
    timers.reset(near, t0 + ns(3_000));
    assert_eq!(timers.next_wakeup(), Some(t0 + ns(3_000)));
    timers.reset(near, t0 + ms(60_000));
    let wakeup = timers.next_wakeup().expect("one is pending");
    assert!(wakeup > t0 + ms(59_000) && wakeup <= t0 + ms(60_000));
    timers.cancel(near);
    assert_eq!(timers.next_wakeup(), None);
}

#[test]
fn long_waits_take_few_wakeups() {
    let (mut timers, t0) = new();
    for delay in [ms(1), ms(200), ms(30_000), ms(3_600_000), YEAR, 200 * YEAR] {
        timers.insert(t0 + delay, ());
    }
    let calls = follow_wakeups(&mut timers, t0);
    assert!(calls <= 6 * 6, "{calls} calls");
}

#[test]
fn a_jump_of_years_fires_everything_in_order() {
    let (mut timers, t0) = new();
    let mut delays: Vec<_> = (0..55).map(|bit| 3 << bit).collect();
    for &delay in delays.iter().rev() {
        timers.insert(t0 + ns(delay), delay);
    }
    delays.sort_unstable();
    assert_eq!(fire(&mut timers, t0 + 250 * YEAR), delays);
}

#[test]
fn a_clock_that_goes_back_fires_nothing_early() {
    let (mut timers, t0) = new();
    timers.expire(timers.moment(t0 + ms(10)));
    timers.insert(t0 + ms(8), 'a');
    timers.insert(t0 + ms(12), 'b');
    assert_eq!(fire(&mut timers, t0 + ms(7)), []);
    assert_eq!(fire(&mut timers, t0 + ms(8)), ['a']);
    assert_eq!(fire(&mut timers, t0 + ms(12)), ['b']);
}

#[test]
fn deadlines_outside_of_our_time_are_held_exactly() {
    let (mut timers, t0) = new();
    let millennia = t0 + 10_000 * YEAR;
    let far = timers.insert(millennia, 'a');
    let farther = timers.insert(millennia + ns(1), 'b');
    assert_eq!(timers.deadline(far), Some(millennia));
    assert_eq!(timers.deadline(farther), Some(millennia + ns(1)));
    assert!(
        timers
            .next_wakeup()
            .is_some_and(|wakeup| wakeup <= millennia)
    );
    assert_eq!(fire(&mut timers, t0 + 300 * YEAR), []);
    assert!(
        timers
            .next_wakeup()
            .is_some_and(|wakeup| wakeup <= millennia)
    );
    assert!(timers.cancel(far));
    assert!(timers.reset(farther, t0 + 2 * YEAR));
    assert_eq!(timers.deadline(farther), Some(t0 + 2 * YEAR));
    assert!(timers.distant.is_empty());
    assert_eq!(fire(&mut timers, t0 + 301 * YEAR), ['b']);
}

#[test]
fn deadlines_before_the_origin_are_exact_and_in_order() {
    let (mut timers, _) = new::<u64>();
    let origin = timers.origin;
    let before = |nanos| origin.checked_sub(ns(nanos)).unwrap_or(origin);
    let keys = [3, 9, 1].map(|nanos| timers.insert(before(nanos), nanos));
    assert_eq!(timers.deadline(keys[1]), Some(before(9)));
    assert_eq!(timers.next_wakeup(), Some(before(9)));
    assert_eq!(fire(&mut timers, origin), [9, 3, 1]);
}

#[test]
fn a_moment_outside_of_our_time_is_none() {
    let after = |nanos, delay| Moment { nanos }.after(delay).map(|it| it.nanos);
    let most = Duration::from_nanos(i64::MAX as u64 - 1_000_000_000);
    assert_eq!(after(999_999_999, most), Some(i64::MAX - 1));
    assert_eq!(after(1_000_000_000, most), None);
    assert_eq!(after(i64::MAX, most), None);
    assert_eq!(after(i64::MAX, Duration::ZERO), None);
    assert_eq!(after(0, Duration::MAX), None);
    // Instants say what lies before the origin.
    assert_eq!(after(-5, ns(4)), None);
    assert_eq!(after(-5, ns(5)), Some(0));
}

#[test]
fn what_was_due_before_the_origin_is_overdue() {
    let (mut timers, t0) = new();
    timers.insert(t0.checked_sub(ms(40)).unwrap_or(t0), 'a');
    let now = timers.moment(t0);
    timers.expire(now);
    assert!(timers.is_overdue(now, ms(40)));
    assert!(!timers.is_overdue(now, ms(41)));
    timers.pop_due();
    assert!(!timers.is_overdue(now, Duration::ZERO), "nothing is due");
}

#[test]
fn keys_are_those_pending_or_due() {
    let (mut timers, t0) = new();
    let keys: Vec<_> = (0..4).map(|n| timers.insert(t0 + ms(n), n)).collect();
    timers.expire(timers.moment(t0 + ms(1)));
    timers.pop_due();
    timers.cancel(keys[2]);
    assert_eq!(timers.keys().collect::<Vec<_>>(), [keys[1], keys[3]]);
    assert_eq!(timers.len(), 2);
}

/// Contract R-24, W-37.
#[test]
fn memory_is_reused() {
    let (mut timers, t0) = new();
    let mut now = t0;
    for _ in 0..50 {
        let keys: Vec<_> = (0..100)
            .map(|n| timers.insert(now + ns(n * 77_777), n))
            .collect();
        for key in keys.iter().step_by(3) {
            timers.cancel(*key);
        }
        now += ms(20);
        fire(&mut timers, now);
    }
    assert_eq!(timers.places.len(), 100);
}

#[test]
fn a_million_timers_fire_in_order() {
    let (mut timers, t0) = new();
    let mut state = 1_u64;
    let delays: Vec<u64> = (0..1_000_000)
        .map(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            // Whole microseconds, so that there are ties.
            (state >> 33) % 600_000 * 1_000
        })
        .collect();
    let keys: Vec<_> = (0..)
        .zip(&delays)
        .map(|(n, &delay)| timers.insert(t0 + ns(delay), (delay, n)))
        .collect();
    for &key in keys.iter().skip(7).step_by(10) {
        assert!(timers.cancel(key));
    }
    assert_eq!(timers.len(), 900_000);
    let mut fired = Vec::new();
    let mut now = t0;
    while !timers.is_empty() {
        now += ns(654_321);
        fired.extend(fire(&mut timers, now));
    }
    assert_eq!(fired.len(), 900_000);
    assert!(fired.is_sorted());
}

#[test]
fn a_million_timers_at_one_instant_fire_as_scheduled() {
    let (mut timers, t0) = new();
    for n in 0..1_000_000 {
        timers.insert(t0 + ms(30_000), n);
    }
    assert!(fire(&mut timers, t0 + ms(29_999)).is_empty());
    assert!(
        fire(&mut timers, t0 + ms(30_000))
            .into_iter()
            .eq(0..1_000_000)
    );
}

/// One step of a random history. Timers are chosen by a number, modulo those
/// ever made, so that stale keys are used as well.
#[derive(Clone, Debug)]
enum Step {
    Insert(i64),
    Cancel(usize),
    Reset(usize, i64),
    Advance(u64),
    AdvanceToWakeup,
    Pop(usize),
}

/// Nanoseconds of all magnitudes up to days, often round ones, so that ties
/// and the edges of slots are common.
fn span() -> impl Strategy<Value = u64> {
    prop_oneof![
        0..5_u64,
        0..3_000_u64,
        (0..50_u64).prop_map(|n| n * 1_024),
        (0..48_u32, 0..3_u64).prop_map(|(bit, add)| (1 << bit) - 1 + add),
        (0..40_u32, 0..9_u64).prop_map(|(bit, n)| n << bit),
    ]
}

fn delay() -> impl Strategy<Value = i64> {
    prop_oneof![
        6 => span().prop_map(u64::cast_signed),
        1 => span().prop_map(|nanos| -nanos.cast_signed()),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => delay().prop_map(Step::Insert),
        2 => any::<usize>().prop_map(Step::Cancel),
        3 => (any::<usize>(), delay()).prop_map(|(n, delay)| Step::Reset(n, delay)),
        3 => span().prop_map(Step::Advance),
        2 => Just(Step::AdvanceToWakeup),
        3 => (0..6_usize).prop_map(Step::Pop),
        1 => Just(Step::Pop(usize::MAX)),
    ]
}

/// The naive queue: what waits and what is due, each sorted by deadline and
/// by a sequence number.
struct Model {
    origin: Instant,
    timers: Timers<usize>,
    now: Instant,
    sequence: u64,
    keys: Vec<TimerKey>,
    /// Where each timer stands, by its number.
    waiting: BTreeMap<(Instant, u64), usize>,
    due: BTreeMap<(Instant, u64), usize>,
}

impl Model {
    fn new() -> Self {
        // Well after the beginning of the platform's clock, for deadlines
        // before the origin.
        let origin = Instant::now() + YEAR;
        Self {
            origin,
            timers: Timers::new(origin),
            now: origin,
            sequence: 0,
            keys: Vec::new(),
            waiting: BTreeMap::new(),
            due: BTreeMap::new(),
        }
    }

    fn after(&mut self, delay: i64) -> (Instant, u64) {
        self.sequence += 1;
        let by = ns(delay.unsigned_abs());
        let deadline = match delay {
            0.. => self.now + by,
            _ => self.now - by,
        };
        (deadline, self.sequence)
    }

    fn remove(&mut self, number: usize) -> Option<usize> {
        for map in [&mut self.waiting, &mut self.due] {
            let at = map.iter().find(|(_, n)| **n == number).map(|(at, _)| *at);
            if let Some(at) = at {
                return map.remove(&at);
            }
        }
        None
    }

    fn expire(&mut self, now: Instant) {
        self.now = now;
        self.timers.expire(self.timers.moment(now));
        let later = self.waiting.split_off(&(now, u64::MAX));
        self.due
            .append(&mut std::mem::replace(&mut self.waiting, later));
    }

    fn apply(&mut self, step: Step) {
        match step {
            Step::Insert(delay) => {
                let at = self.after(delay);
                let number = self.keys.len();
                self.keys.push(self.timers.insert(at.0, number));
                self.waiting.insert(at, number);
            }
            Step::Cancel(n) if !self.keys.is_empty() => {
                let number = n % self.keys.len();
                let expected = self.remove(number);
                let waited = self.timers.cancel(self.keys[number]);
                assert_eq!(waited, expected.is_some());
            }
            Step::Reset(n, delay) if !self.keys.is_empty() => {
                let number = n % self.keys.len();
                let at = self.after(delay);
                let expected = self.remove(number);
                if expected.is_some() {
                    self.waiting.insert(at, number);
                }
                let key = self.keys[number];
                assert_eq!(self.timers.reset(key, at.0), expected.is_some());
                let deadline = expected.map(|_| at.0);
                assert_eq!(self.timers.deadline(key), deadline);
            }
            Step::Cancel(_) | Step::Reset(..) => {}
            Step::Advance(nanos) => self.expire(self.now + ns(nanos)),
            Step::AdvanceToWakeup => {
                if let Some(wakeup) = self.timers.next_wakeup() {
                    self.expire(self.now.max(wakeup));
                }
            }
            Step::Pop(most) => {
                for _ in 0..most {
                    let expected = self.due.pop_first().map(|(_, number)| number);
                    let popped = self.timers.pop_due();
                    let expected = expected.map(|number| (self.keys[number], number));
                    assert_eq!(popped, expected);
                    if popped.is_none() {
                        break;
                    }
                }
            }
        }
        self.check();
    }

    fn check(&self) {
        assert_eq!(self.timers.has_due(), !self.due.is_empty());
        assert_eq!(self.timers.len(), self.waiting.len() + self.due.len());
        let all = || self.due.iter().chain(&self.waiting);
        let earliest = all().map(|((deadline, _), _)| *deadline).min();
        let wakeup = self.timers.next_wakeup();
        assert_eq!(wakeup.is_some(), earliest.is_some());
        assert!(wakeup <= earliest, "{wakeup:?} is later than {earliest:?}");
        if let Some(earliest) = earliest {
            let block = |at: Instant| at.saturating_duration_since(self.origin).as_nanos() >> 19;
            if earliest <= self.now || block(earliest) == block(self.now) {
                assert_eq!(wakeup, Some(earliest), "must be exact");
            }
        }
        let keys: HashSet<_> = self.timers.keys().collect();
        let expected: HashSet<_> = all().map(|(_, number)| self.keys[*number]).collect();
        assert_eq!(keys, expected);
        for ((deadline, _), number) in all() {
            assert_eq!(self.timers.deadline(self.keys[*number]), Some(*deadline));
        }
        self.timers.wheel.check_bits();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_history_agrees_with_the_naive_queue(
        steps in prop::collection::vec(step(), 1..200),
    ) {
        let mut model = Model::new();
        for step in steps {
            model.apply(step);
        }
        // Following the wake-ups alone reaches what is left.
        let most = model.timers.len() * 7 + 1;
        for _ in 0..most {
            model.apply(Step::Pop(usize::MAX));
            let before = model.now;
            model.apply(Step::AdvanceToWakeup);
            prop_assert!(model.now > before || model.timers.has_due() || model.timers.is_empty());
        }
        prop_assert!(model.timers.is_empty());
    }
}
