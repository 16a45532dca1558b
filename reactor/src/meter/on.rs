//! What is measured with the feature `inspect`.
//!
//! Before each callback of a descriptor its slot is given the tick count: two instructions.
//! When all events of a turn are delivered, and that took long, the callbacks in which the
//! time went are found by these. After each callback that is no event's the tick count is
//! compared with what it was at the last look; only after a quarter of what is slow is it
//! looked again. So the callback that has returned then is the one that took long, if one
//! did. In the turns of a sample all of it is looked at, which fills the histograms; the
//! books are kept of these turns and of all long ones.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::mem;
use std::time::{Duration, Instant};

use super::births::Births;
use super::histogram::Histogram;
use super::turns::{KEPT, Ticks, TurnRecord, TurnTimes};
use super::{Budget, CallbackKind, Ran, phase};
use crate::log;
use crate::panic::catch_panic;
use crate::reactor::Reactor;
use crate::slots::Slot;
use crate::sys::ticks;
use crate::token::Token;

/// Of so many turns the callbacks of one are all counted.
const SAMPLED_OF: u32 = 16;
/// Where turns have many callbacks, one is counted of so many at the most.
const SAMPLED_SHARE: u32 = 8;
/// But not fewer than one turn of so many.
const SAMPLED_AT_LEAST: u32 = 1_024;
/// How often it is looked at the most in the time that is slow. The duration of a slow
/// callback is known to that part of it.
const LOOKS: f64 = 4.0;
/// How many slow callbacks are kept, and how many slow turns.
const SLOWEST: usize = 32;
/// How many callbacks are kept of a slow turn.
const OF_SLOW_TURN: usize = 8;
/// For how long they are.
const KEPT_FOR: Duration = Duration::from_secs(600);
/// Of how many kinds the log's last line is remembered.
const WARNED_KINDS: usize = 64;
/// Of so many events of a long turn one is asked at first.
const ONE_OF: usize = 16;
/// How many delayed calls that are late are counted, one by one.
const MOST_LATE: usize = 65_536;
/// How long the rate of the tick count is watched at the least before it is believed.
const CALIBRATION: Duration = Duration::from_millis(2);

/// After a callback of so many ticks the rate is looked at again: some 0.1 ms.
const CALIBRATED_FROM: u64 = 300_000;

/// What counts as slow. See [`Reactor::set_slow_limits`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SlowLimits {
    /// From which duration on a callback is [kept](Measurements::slowest), if it is among
    /// the slowest of the last ten minutes. The default is 1 ms.
    pub callback: Duration,
    /// From which duration on a turn is logged, as a warning, with what ran in it. The
    /// default, [`Duration::MAX`], logs none: what is long depends on the program, and on
    /// how busy its machine is.
    pub turn: Duration,
    /// How often the same callback is logged. The default is 10 s.
    pub warn_every: Duration,
}

crate::setters!(SlowLimits {
    callback: Duration,
    turn: Duration,
    warn_every: Duration,
});

impl Default for SlowLimits {
    fn default() -> Self {
        Self {
            callback: Duration::from_millis(1),
            turn: Duration::MAX,
            warn_every: Duration::from_secs(10),
        }
    }
}

/// A callback that took long.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SlowCallback {
    /// When it returned.
    pub at: Instant,
    /// How long it took.
    pub took: Duration,
    /// Why it was called.
    pub kind: CallbackKind,
    /// What it was: the [name](crate::Descriptor::log_prefix) of a descriptor (of a
    /// connection that is its protocol, its kind and its peer), or the path of the
    /// function in which a closure was written.
    pub name: String,
    /// The descriptor, if it was one's. It may be gone.
    pub token: Option<Token>,
    /// How old the descriptor was.
    pub age: Option<Duration>,
}

/// A turn that took long.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SlowTurn {
    /// When it ended.
    pub at: Instant,
    /// What its phases took.
    pub times: TurnTimes,
    /// How many events were delivered.
    pub events: u32,
    /// How many delayed calls ran.
    pub timers: u32,
    /// The slow callbacks that ran in it, the slowest first, at the most eight. None where
    /// many callbacks made it long together.
    pub ran: Vec<SlowCallback>,
}

/// What the loop has measured since the reactor was made. See
/// [`Reactor::measurements`].
#[derive(Debug)]
pub struct Measurements {
    limits: SlowLimits,
    callbacks: [Histogram; CallbackKind::ALL.len()],
    turns: Histogram,
    phases: [u64; phase::COUNT],
    /// What all turns took.
    busy: u64,
    spent: [u64; Budget::ALL.len()],
    slowest: Vec<SlowCallback>,
    slowest_turns: Vec<SlowTurn>,
    last: [Ticks; KEPT],
    /// How many were kept.
    count: u64,
    /// How many turns there had been after the last one of the sample, and how many have
    /// been kept since.
    unseen: (u64, u64),
    births: Births,
    warned: HashMap<String, Warned>,
    /// Those of the present turn that were slow.
    of_turn: Vec<SlowCallback>,
    /// The names of descriptors that left in this turn, after a slow callback.
    left: Vec<(Token, String)>,
    /// The callbacks of the present turn's events, with their ticks.
    of_events: Vec<(Token, u64)>,
    /// The same moment by both clocks.
    origin: (Instant, u64),
    nanoseconds_per_tick: f64,
}

fn is_of_late(at: Instant, now: Instant) -> bool {
    now.saturating_duration_since(at) <= KEPT_FOR
}

#[derive(Debug)]
struct Warned {
    at: Instant,
    unsaid: u64,
}

impl Measurements {
    /// How long callbacks of that kind took, by a sample: those of one turn in sixteen are
    /// counted, all of them. Where turns have many, a smaller share is, down to one of
    /// eight times as many turns as there are callbacks in a turn.
    pub fn callbacks(&self, kind: CallbackKind) -> &Histogram {
        &self.callbacks[kind as usize]
    }

    /// How long turns took, without their waiting. Those with a slow callback, or as long
    /// as one, are counted one by one. A turn of the sample counts for the others before
    /// it.
    pub fn turns(&self) -> &Histogram {
        &self.turns
    }

    /// What all turns took together, without their waiting.
    pub fn busy(&self) -> Duration {
        self.duration(self.busy)
    }

    /// What the phases of all turns took together, by the turns that were counted.
    pub fn times(&self) -> TurnTimes {
        TurnTimes::of(&self.phases, |ticks| self.duration(ticks))
    }

    /// In how many turns that budget ran out.
    pub fn spent(&self, budget: Budget) -> u64 {
        self.spent[budget as usize]
    }

    /// The slowest callbacks of the last ten minutes, at the most 32 of them, the slowest
    /// first. Each is seen that took longer than [`SlowLimits::callback`]. What is told of
    /// others than [`CallbackKind::Ready`] is too long at times, by a quarter of that limit
    /// at the most.
    pub fn slowest(&self) -> &[SlowCallback] {
        &self.slowest
    }

    /// The slowest turns of the last ten minutes, at the most 32 of them, the slowest first,
    /// with what ran in them. Those are there that took longer than
    /// [`SlowLimits::callback`].
    pub fn slowest_turns(&self) -> &[SlowTurn] {
        &self.slowest_turns
    }

    /// The last turns that were counted, those of the sample and all long ones: at the most
    /// 128, the oldest first.
    pub fn last_turns(&self) -> impl Iterator<Item = TurnRecord> + '_ {
        let now = ticks();
        let kept = self.count.min(KEPT as u64);
        (self.count - kept..self.count).map(move |number| {
            let turn = &self.last[number as usize % KEPT];
            TurnRecord {
                ago: self.duration(now.saturating_sub(turn.began)),
                times: TurnTimes::of(&turn.phases, |ticks| self.duration(ticks)),
                events: turn.events,
                timers: turn.timers,
            }
        })
    }

    /// What counts as slow.
    pub fn slow_limits(&self) -> SlowLimits {
        self.limits
    }

    fn duration(&self, ticks: u64) -> Duration {
        Duration::from_nanos((ticks as f64 * self.nanoseconds_per_tick) as u64)
    }

    /// Compares the two clocks again.
    fn calibrate(&mut self, ticks: u64) {
        let (origin, first) = self.origin;
        let passed = origin.elapsed();
        if passed >= CALIBRATION && ticks > first {
            self.nanoseconds_per_tick = passed.as_nanos() as f64 / (ticks - first) as f64;
        }
    }

    fn keep(&mut self, slow: SlowCallback) {
        self.slowest.retain(|it| is_of_late(it.at, slow.at));
        let place = self.slowest.partition_point(|it| it.took >= slow.took);
        if place < SLOWEST {
            self.slowest.truncate(SLOWEST - 1);
            self.slowest.insert(place, slow);
        }
    }

    /// As [`keep`](Self::keep), of the turn that has ended just now.
    fn keep_turn(&mut self, kept: &Ticks) {
        let at = Instant::now();
        self.slowest_turns.retain(|it| is_of_late(it.at, at));
        let times = TurnTimes::of(&kept.phases, |ticks| self.duration(ticks));
        let took = times.total();
        let place = self
            .slowest_turns
            .partition_point(|it| it.times.total() >= took);
        if place < SLOWEST {
            let turn = SlowTurn {
                at,
                times,
                events: kept.events,
                timers: kept.timers,
                ran: self.of_turn.iter().take(OF_SLOW_TURN).cloned().collect(),
            };
            self.slowest_turns.truncate(SLOWEST - 1);
            self.slowest_turns.insert(place, turn);
        }
    }

    /// Whether the log is to have a line for `name` now, and how many it did not have
    /// since the last.
    fn may_warn(&mut self, name: &str, now: Instant) -> Option<u64> {
        let every = self.limits.warn_every;
        if let Some(warned) = self.warned.get_mut(name) {
            if now.saturating_duration_since(warned.at) < every {
                warned.unsaid += 1;
                return None;
            }
            warned.at = now;
            return Some(mem::take(&mut warned.unsaid));
        }
        if self.warned.len() >= WARNED_KINDS {
            self.warned
                .retain(|_, it| now.saturating_duration_since(it.at) < every);
        }
        if self.warned.len() < WARNED_KINDS {
            let warned = Warned { at: now, unsaid: 0 };
            self.warned.insert(name.to_owned(), warned);
        }
        Some(0)
    }
}

/// The measuring of one reactor. What is asked after each callback stands in front.
pub(crate) struct Meter {
    /// The lower half of the tick count at the last look: the end of each callback is
    /// compared with it.
    looked: u32,
    /// After how many ticks it is looked again. Zero: after each callback.
    look_after: u32,
    /// After how many ticks of a turn it is looked which of its events took long. Zero: in
    /// any case.
    find_from: u64,
    /// From how many ticks on a callback is slow.
    slow_from: u32,
    /// From how many ticks on a turn is put into the books. Zero: each is.
    kept_from: u32,
    until_sample: u32,
    /// The lower halves of the tick count at the ends of the present turn's phases.
    ends: [u32; phase::COUNT - 1],
    /// The tick count when the present turn began. Zero between turns.
    began: u64,
    /// The whole tick count at the last look. It may have been before this turn.
    look: u64,
    /// The counts of the reactor when the turn began.
    delivered: u64,
    timers: u64,
    is_sampled: bool,
    /// How many callbacks of the sampled turn there were.
    sampled: u32,
    books: Box<Measurements>,
}

impl Default for Meter {
    fn default() -> Self {
        let origin = (Instant::now(), ticks());
        let books = Measurements {
            limits: SlowLimits::default(),
            callbacks: Default::default(),
            turns: Histogram::default(),
            phases: [0; phase::COUNT],
            busy: 0,
            spent: [0; Budget::ALL.len()],
            slowest: Vec::new(),
            slowest_turns: Vec::new(),
            last: [Ticks::default(); KEPT],
            count: 0,
            unseen: (0, 0),
            births: Births::default(),
            warned: HashMap::new(),
            of_turn: Vec::new(),
            left: Vec::new(),
            of_events: Vec::new(),
            origin,
            // Until it is known better: a count of some 3 GHz.
            nanoseconds_per_tick: 1.0 / 3.0,
        };
        let mut meter = Self {
            looked: 0,
            look_after: 0,
            find_from: 0,
            slow_from: 0,
            kept_from: 0,
            until_sample: 1,
            ends: [0; phase::COUNT - 1],
            began: 0,
            look: 0,
            delivered: 0,
            timers: 0,
            is_sampled: false,
            sampled: 0,
            books: Box::new(books),
        };
        meter.set_limits();
        meter
    }
}

impl Meter {
    /// Takes note of when a descriptor was registered.
    #[inline]
    pub(crate) fn registered(&mut self, now: impl FnOnce() -> Instant, token: Token) {
        self.books.births.note(token.generation(), now());
    }

    /// Sets what is compared, from the limits and the rate of the tick count.
    fn set_limits(&mut self) {
        let books = &self.books;
        let ticks = |limit: Duration| limit.as_nanos() as f64 / books.nanoseconds_per_tick;
        // Halves are compared, and a difference of more than that is looked at in any case.
        // (It saturates.)
        let half = |ticks: f64| (ticks as u32).clamp(1, u32::MAX / 2);
        let slow = ticks(books.limits.callback);
        self.look_after = half(slow / LOOKS);
        self.find_from = slow as u64;
        self.slow_from = half(slow);
        self.kept_from = half(ticks(books.limits.callback.min(books.limits.turn)));
    }

    #[cold]
    fn begin_sample(&mut self, now: u64) {
        self.books.calibrate(now);
        self.is_sampled = true;
        self.sampled = 0;
        self.look_after = 0;
        self.find_from = 0;
        self.kept_from = 0;
    }

    /// It was looked, and found that nothing else needs to be.
    #[inline(always)]
    fn looked_at(&mut self, now: u64) {
        self.look = now;
        self.looked = now as u32;
    }

    /// What the phases of the present turn took, which took so long together.
    fn phases(&self, now: u64, total: u64) -> [u64; phase::COUNT] {
        let mut phases = [0; phase::COUNT];
        let mut from = self.began as u32;
        let ends = self.ends.iter().copied().chain([now as u32]);
        for (phase, end) in phases.iter_mut().zip(ends) {
            *phase = u64::from(end.wrapping_sub(from));
            from = end;
        }
        // How often the halves came round is that of the slowest callback.
        let slowest = self.books.of_turn.iter().max_by_key(|it| it.took);
        let long = match slowest.map(|it| it.kind) {
            Some(CallbackKind::Soon | CallbackKind::Remote) => phase::CALLS,
            Some(CallbackKind::Notified | CallbackKind::Deferred) => phase::NOTIFICATIONS,
            Some(CallbackKind::Timer) => phase::TIMERS,
            Some(CallbackKind::Ready) | None => phase::READY,
        };
        let sum: u64 = phases.iter().sum();
        phases[long] += total.saturating_sub(sum) >> 32 << 32;
        phases
    }
}

impl Reactor {
    /// What the loop has measured. (Feature `inspect`.)
    pub fn measurements(&self) -> &Measurements {
        &self.meter.books
    }

    /// Sets from when on a callback or a turn is slow. (Feature `inspect`.)
    pub fn set_slow_limits(&mut self, limits: SlowLimits) {
        self.meter.books.limits = limits;
        if !self.meter.is_sampled {
            self.meter.set_limits();
        }
    }

    /// How long ago the descriptor was registered; at times somewhat longer. `None` if it
    /// is gone. (Feature `inspect`.)
    pub fn age(&self, token: Token) -> Option<Duration> {
        self.slots.get(token)?;
        let born = self.meter.books.births.of(token.generation())?;
        Some(self.now().saturating_duration_since(born))
    }

    /// How many [delayed calls](Self::delayed_calls) there are; and how many of them are due
    /// and have not run, of which 65,536 are counted at the most. (Feature `inspect`.)
    pub fn delayed_call_counts(&self) -> (usize, usize) {
        let late = self.timers.due().take(MOST_LATE).count();
        (self.timers.len(), late)
    }

    /// The turn begins: something was waited for until now.
    #[inline(always)]
    pub(crate) fn meter_turn(&mut self) {
        let now = ticks();
        let meter = &mut self.meter;
        meter.delivered = self.statistics.events + self.statistics.stale_events;
        meter.timers = self.statistics.timers;
        meter.began = now;
        meter.looked = now as u32;
        // A sample that no turn has ended, since its reactor was replaced, is made again.
        if meter.until_sample <= 1 {
            meter.begin_sample(now);
        } else {
            meter.until_sample -= 1;
        }
    }

    /// A phase of the turn has ended.
    #[inline(always)]
    pub(crate) fn meter_phase(&mut self, phase: usize) {
        self.meter.ends[phase] = ticks() as u32;
    }

    /// How many events there were in this turn, the reactor's own excepted.
    #[inline(always)]
    pub(crate) fn meter_delivered(&self) -> usize {
        let all = self.statistics.events + self.statistics.stale_events;
        (all - self.meter.delivered) as usize
    }

    /// The last phase of the turn has ended.
    #[inline(always)]
    pub(crate) fn meter_turned(&mut self) {
        let meter = &mut self.meter;
        let took = (ticks() as u32).wrapping_sub(meter.began as u32);
        meter.books.busy += u64::from(took);
        if took >= meter.kept_from {
            return self.meter_keep(took);
        }
        meter.began = 0;
    }

    /// Puts a turn into the books: one of the sample, or a long one.
    #[cold]
    #[inline(never)]
    fn meter_keep(&mut self, counted: u32) {
        let now = ticks();
        let delivered = self.meter_delivered();
        let turns = self.statistics.turns;
        let meter = &mut self.meter;
        if meter.began == 0 {
            // A reactor that was put here in a callback has begun no turn.
            meter.books.busy -= u64::from(counted);
            return;
        }
        let total = now.saturating_sub(meter.began);
        let kept = Ticks {
            began: meter.began,
            phases: meter.phases(now, total),
            events: u32::try_from(delivered).unwrap_or(u32::MAX),
            timers: (self.statistics.timers - meter.timers) as u32,
        };
        let books = &mut meter.books;
        // By its lower half it is there.
        books.busy += total >> 32 << 32;
        // One of the sample stands for the short ones before it too.
        let mut stands_for = 1;
        if meter.is_sampled {
            let (turns_then, kept_since) = mem::replace(&mut books.unseen, (turns, 0));
            stands_for = (turns - turns_then).saturating_sub(kept_since).max(1);
        } else {
            books.unseen.1 += 1;
        }
        for (sum, ticks) in books.phases.iter_mut().zip(kept.phases) {
            *sum += ticks * stands_for;
        }
        books.last[books.count as usize % KEPT] = kept;
        books.count += 1;
        let took = books.duration(total);
        books.turns.record_many(took, stands_for);
        books.of_turn.sort_by_key(|it| Reverse(it.took));
        if took >= books.limits.callback {
            books.keep_turn(&kept);
        }
        let is_slow = took >= books.limits.turn;
        if mem::take(&mut meter.is_sampled) {
            meter.until_sample =
                (SAMPLED_SHARE * meter.sampled).clamp(SAMPLED_OF, SAMPLED_AT_LEAST);
        }
        meter.began = 0;
        meter.set_limits();
        self.meter.books.left.clear();
        if is_slow {
            self.meter_warn(took, &kept);
        } else {
            self.meter.books.of_turn.clear();
        }
    }

    /// A callback has returned.
    #[inline(always)]
    pub(crate) fn meter_ran(&mut self, ran: Ran) {
        let passed = (ticks() as u32).wrapping_sub(self.meter.looked);
        if passed >= self.meter.look_after {
            self.meter_look(ran);
        }
    }

    /// A budget was spent, and something waits.
    #[cold]
    pub(crate) fn meter_spent(&mut self, budget: Budget) {
        self.meter.books.spent[budget as usize] += 1;
    }

    /// Looks whether the callback that has returned was a slow one. Whatever ran before it
    /// since the last look took less than it takes to look again.
    #[cold]
    #[inline(never)]
    fn meter_look(&mut self, ran: Ran) {
        let now = ticks();
        let meter = &mut self.meter;
        // Below zero is nothing: processors may be some ticks apart.
        let ticked = now.saturating_sub(meter.look.max(meter.began));
        meter.looked_at(now);
        if meter.began == 0 {
            // In no turn: when the loop starts or stops. It may have waited before.
            return;
        }
        let books = &mut meter.books;
        if ticked >= CALIBRATED_FROM {
            books.calibrate(now);
        }
        let took = books.duration(ticked);
        if meter.is_sampled {
            meter.sampled += 1;
            books.callbacks[ran.kind as usize].record(took);
        }
        if took >= books.limits.callback {
            let token = Some(self.current).filter(|it| *it != Token::WAKER);
            self.meter_note(ran, token, took, Duration::ZERO);
        }
    }

    /// The events of the turn were delivered.
    #[inline(always)]
    pub(crate) fn meter_events(&mut self, events: &mio::Events) {
        let now = ticks();
        if now.wrapping_sub(self.meter.began) >= self.meter.find_from {
            return self.meter_find(events);
        }
        self.meter.looked_at(now);
    }

    /// Finds the callbacks of events that were slow; in a turn of the sample all of them are
    /// counted.
    #[cold]
    #[inline(never)]
    fn meter_find(&mut self, events: &mio::Events) {
        let now = ticks();
        if self.meter.began == 0 {
            return self.meter.looked_at(now);
        }
        if !self.meter.is_sampled && !self.may_be_slow(events, now) {
            return self.meter.looked_at(now);
        }
        let mut found = self.of_events(events, now);
        let books = &mut self.meter.books;
        if now.saturating_sub(self.meter.began) >= CALIBRATED_FROM {
            books.calibrate(now);
        }
        let ran = Ran::of(CallbackKind::Ready);
        let mut ago = 0;
        for (token, ticked) in found.drain(..).rev() {
            let books = &mut self.meter.books;
            let took = books.duration(ticked);
            if self.meter.is_sampled {
                self.meter.sampled += 1;
                books.callbacks[ran.kind as usize].record(took);
            }
            if took >= books.limits.callback {
                let ago = books.duration(ago);
                self.meter_note(ran, Some(token), took, ago);
            }
            ago += ticked;
        }
        self.meter.books.of_events = found;
        // What this took is nobody's.
        self.meter.looked_at(ticks());
    }

    /// Whether the callback of one of these events may have been slow. One of a few is asked
    /// when it began: a busy turn is long by many events, none of which is slow.
    fn may_be_slow(&self, events: &mio::Events, now: u64) -> bool {
        let from = self.meter.look.max(self.meter.began);
        let Ok(total) = u32::try_from(now.saturating_sub(from)) else {
            return true;
        };
        let mut last = 0;
        for event in events.iter().step_by(ONE_OF) {
            let began = self.slots.began(Token::from_mio(event.token()));
            let began = began.map(|began| began.wrapping_sub(from as u32));
            // It may have had no callback now, but some time before.
            let Some(began) = began.filter(|began| (last..=total).contains(began)) else {
                continue;
            };
            if began - last >= self.meter.slow_from {
                return true;
            }
            last = began;
        }
        total - last >= self.meter.slow_from
    }

    /// How long each callback of these events took, in their order: until the next one
    /// began. Of two for one descriptor, which has two sources, the first is its
    /// predecessor's.
    fn of_events(&mut self, events: &mio::Events, now: u64) -> Vec<(Token, u64)> {
        let mut found = mem::take(&mut self.meter.books.of_events);
        let from = self.meter.look.max(self.meter.began);
        let total = now.saturating_sub(from);
        // Where the halves have come round nobody knows their order.
        let is_exact = total <= u64::from(u32::MAX);
        let (mut last, mut told) = (0, 0);
        for event in events {
            let token = Token::from_mio(event.token());
            let Some(began) = self.slots.began(token) else {
                continue;
            };
            let began = began.wrapping_sub(from as u32);
            // It may have had no callback now, but some time before.
            if is_exact && (began < last || u64::from(began) > total) {
                continue;
            }
            let passed = u64::from(began.wrapping_sub(last));
            told += passed;
            if let Some((_, ticked)) = found.last_mut() {
                *ticked = passed;
            }
            last = began;
            found.push((token, 0));
        }
        if let Some((_, ticked)) = found.last_mut() {
            *ticked = u64::from((total as u32).wrapping_sub(last));
            told += *ticked;
        }
        // How often the halves came round is that of the slowest.
        if let Some((_, ticked)) = found.iter_mut().max_by_key(|(_, ticked)| *ticked) {
            *ticked += total.saturating_sub(told) >> 32 << 32;
        }
        found
    }

    /// The descriptor is about to leave, after a callback. If that was slow, it is told of
    /// by its name.
    #[inline(always)]
    pub(crate) fn meter_leaves(&mut self, token: Token) {
        let now = ticks() as u32;
        let began = self.slots.began(token).unwrap_or(now);
        if now.wrapping_sub(began) >= self.meter.slow_from {
            self.meter_keep_name(token);
        }
    }

    /// A callback of the descriptor has panicked; when it began. The descriptor is told,
    /// which is no callback of its own.
    #[cold]
    pub(crate) fn meter_panicked(&mut self, token: Token) -> Option<u32> {
        self.meter_leaves(token);
        self.slots.began(token)
    }

    /// The descriptor was told.
    #[cold]
    pub(crate) fn meter_told(&mut self, token: Token, began: Option<u32>) {
        if let Some(began) = began {
            self.slots.set_began(token, began);
        }
    }

    #[cold]
    #[inline(never)]
    fn meter_keep_name(&mut self, token: Token) {
        if self.meter.began != 0 {
            let name = self.name_of(Ran::of(CallbackKind::Ready), Some(token));
            self.meter.books.left.push((token, name));
        }
    }

    #[cold]
    #[inline(never)]
    fn meter_note(&mut self, ran: Ran, token: Option<Token>, took: Duration, ago: Duration) {
        let now = Instant::now();
        let slow = SlowCallback {
            at: now.checked_sub(ago).unwrap_or(now),
            took,
            kind: ran.kind,
            name: self.name_of(ran, token),
            token,
            age: token.and_then(|token| self.age(token)),
        };
        let meter = &mut self.meter;
        meter.books.of_turn.push(slow.clone());
        meter.books.keep(slow);
        // What this took is nobody's, and the turn is of interest.
        meter.looked_at(ticks());
        meter.kept_from = 0;
    }

    /// The name of a descriptor is user code's.
    fn name_of(&mut self, ran: Ran, token: Option<Token>) -> String {
        let entry = token.and_then(|token| self.slots.get_mut(token));
        let left = &self.meter.books.left;
        match (entry.and_then(Slot::entry_mut), ran.name, token) {
            (Some(entry), ..) => catch_panic(|| entry.log_prefix().into_owned())
                .unwrap_or_else(|_| "(whose log_prefix panics)".into()),
            (None, _, Some(token)) => match left.iter().find(|(left, _)| *left == token) {
                Some((_, name)) => name.clone(),
                None => format!("{token}, which is gone"),
            },
            (None, Some(name), None) => written(name()).to_owned(),
            (None, None, None) => "a call".to_owned(),
        }
    }

    /// Logs a slow turn, with the slowest that ran in it.
    #[cold]
    fn meter_warn(&mut self, took: Duration, turn: &Ticks) {
        let books = &mut self.meter.books;
        let slow = mem::take(&mut books.of_turn);
        let worst = slow
            .first()
            .map(|it| format!("{} {}", it.kind.name(), kind_of(&it.name)));
        let worst = worst.unwrap_or_else(|| "many callbacks, none of them slow".to_owned());
        let Some(unsaid) = books.may_warn(&worst, Instant::now()) else {
            return;
        };
        let mut line = format!("a turn took {took:.1?}");
        for it in slow.iter().take(3) {
            line += &format!("; {} of {}: {:.1?}", it.kind.name(), it.name, it.took);
        }
        if slow.is_empty() {
            line += &format!(
                "; {} events, {} timers, none of them slow",
                turn.events, turn.timers
            );
        }
        if unsaid > 0 {
            line += &format!("; {unsaid} more like it since the last line");
        }
        let _ = catch_panic(|| log::warn!(target: log::REACTOR, "{line}"));
    }
}

/// The name of a closure as it was written, out of that of ours around it.
fn written(name: &str) -> &str {
    // However many there are around that one.
    if let Some((ours, rest)) = name.split_once("bowline_reactor::reactor::plain<")
        && (ours.is_empty() || ours.starts_with("bowline_reactor::"))
    {
        let mut open = 1;
        let end = rest.find(|it| {
            open += i32::from(it == '<') - i32::from(it == '>');
            open == 0
        });
        return end.map_or(rest, |end| &rest[..end]);
    }
    name.strip_prefix("bowline_reactor::")
        .and_then(|name| name.strip_suffix(">::{{closure}}"))
        .and_then(|name| name.split_once('<'))
        .map_or(name, |(_, written)| written)
}

/// The name without what differs between connections of one kind.
fn kind_of(name: &str) -> &str {
    match name.match_indices(',').nth(1) {
        Some((end, _)) => &name[..end],
        None => name,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_named_and_not_what_we_put_around_it() {
        let ours = "bowline_reactor::reactor::plain<web::main::{{closure}}>::{{closure}}";
        assert_eq!(written(ours), "web::main::{{closure}}");
        let boxed = "bowline_reactor::sys::call::Call<bowline_reactor::Reactor, ()>::new<\
                     bowline_reactor::reactor::plain<web::list<web::Row>::{{closure}}>\
                     ::{{closure}}>::{{closure}}";
        assert_eq!(written(boxed), "web::list<web::Row>::{{closure}}");
        let generic = "web::list<alloc::string::String>::{{closure}}";
        assert_eq!(written(generic), generic);
        assert_eq!(kind_of("Echo,TCP,127.0.0.1:7"), "Echo,TCP");
        assert_eq!(kind_of("signals"), "signals");
    }
}
