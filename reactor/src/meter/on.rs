//! What is measured with the feature `inspect`.
//!
//! After each callback the tick count is read, and compared with what it was after the
//! callback before. That is all in most turns. Where the difference is large, the callback
//! is noted. In every sixteenth turn each one is, which fills the histograms.

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
/// How many slow callbacks are kept.
const SLOWEST: usize = 32;
/// For how long they are.
const KEPT_FOR: Duration = Duration::from_secs(600);
/// Of how many kinds the log's last line is remembered.
const WARNED_KINDS: usize = 64;
/// How long the rate of the tick count is watched at the least before it is believed.
const CALIBRATION: Duration = Duration::from_millis(2);

/// After a callback of so many ticks the rate is looked at again: some 0.1 ms.
const CALIBRATED_FROM: u32 = 300_000;

/// What counts as slow. See [`Reactor::set_slow_limits`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SlowLimits {
    /// From which duration on a callback is [kept](Measurements::slowest), if it is among
    /// the slowest of the last ten minutes. The default is 1 ms; at the most some seconds
    /// can be told apart.
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

/// What the loop has measured since the reactor was made. See
/// [`Reactor::measurements`].
#[derive(Debug)]
pub struct Measurements {
    limits: SlowLimits,
    callbacks: [Histogram; CallbackKind::ALL.len()],
    turns: Histogram,
    phases: [u64; phase::COUNT],
    spent: [u64; Budget::ALL.len()],
    slowest: Vec<SlowCallback>,
    last: [Ticks; KEPT],
    /// How many turns there were.
    count: u64,
    births: Births,
    warned: HashMap<String, Warned>,
    /// Those of the present turn that were slow.
    of_turn: Vec<SlowCallback>,
    /// The same moment by both clocks.
    origin: (Instant, u64),
    nanoseconds_per_tick: f64,
}

#[derive(Debug)]
struct Warned {
    at: Instant,
    unsaid: u64,
}

impl Measurements {
    /// How long callbacks of that kind took. Those of one turn in sixteen are counted, all
    /// of them.
    pub fn callbacks(&self, kind: CallbackKind) -> &Histogram {
        &self.callbacks[kind as usize]
    }

    /// How long turns took, without their waiting. All are counted.
    pub fn turns(&self) -> &Histogram {
        &self.turns
    }

    /// What the phases of all turns took together.
    pub fn times(&self) -> TurnTimes {
        TurnTimes::of(&self.phases, |ticks| self.duration(ticks))
    }

    /// In how many turns that budget ran out.
    pub fn spent(&self, budget: Budget) -> u64 {
        self.spent[budget as usize]
    }

    /// The slowest callbacks of the last ten minutes, at the most 32 of them, the slowest
    /// first. Each is seen that took longer than [`SlowLimits::callback`], but the tick count
    /// is compared by its lower half, which comes round after a second or two: of those that
    /// took longer than that, the time may be told too short, and a few are missed.
    pub fn slowest(&self) -> &[SlowCallback] {
        &self.slowest
    }

    /// The last turns that have ended, at the most 128, the oldest first.
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

    /// From how many ticks on a callback is noted.
    fn noted_from(&self) -> u32 {
        let ticks = self.limits.callback.as_nanos() as f64 / self.nanoseconds_per_tick;
        // The count is compared by its lower half, which comes round.
        (ticks as u64).clamp(1, u64::from(u32::MAX / 2)) as u32
    }

    fn keep(&mut self, slow: SlowCallback) {
        let is_old = |it: &SlowCallback| slow.at.saturating_duration_since(it.at) > KEPT_FOR;
        self.slowest.retain(|it| !is_old(it));
        let place = self.slowest.partition_point(|it| it.took >= slow.took);
        if place < SLOWEST {
            self.slowest.truncate(SLOWEST - 1);
            self.slowest.insert(place, slow);
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
    /// The lower half of the tick count when the last callback returned.
    last: u32,
    /// From which difference on a callback is noted. Zero notes all.
    noted_from: u32,
    /// The tick count when the present phase began. Zero between turns.
    phase_began: u64,
    is_sampled: bool,
    until_sample: u32,
    turn: Ticks,
    /// The counts of the reactor when the turn began.
    events: u64,
    timers: u64,
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
            spent: [0; Budget::ALL.len()],
            slowest: Vec::new(),
            last: [Ticks::default(); KEPT],
            count: 0,
            births: Births::default(),
            warned: HashMap::new(),
            of_turn: Vec::new(),
            origin,
            // Until it is known better: a count of some 3 GHz.
            nanoseconds_per_tick: 1.0 / 3.0,
        };
        Self {
            last: 0,
            noted_from: u32::MAX,
            phase_began: 0,
            is_sampled: false,
            until_sample: 1,
            turn: Ticks::default(),
            events: 0,
            timers: 0,
            books: Box::new(books),
        }
    }
}

impl Meter {
    /// Takes note of when a descriptor was registered.
    #[inline]
    pub(crate) fn registered(&mut self, now: impl FnOnce() -> Instant, token: Token) {
        self.books.births.note(token.generation(), now());
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
            self.meter.noted_from = self.meter.books.noted_from();
        }
    }

    /// How long ago the descriptor was registered; at times somewhat longer. `None` if it
    /// is gone. (Feature `inspect`.)
    pub fn age(&self, token: Token) -> Option<Duration> {
        self.slots.get(token)?;
        let born = self.meter.books.births.of(token.generation())?;
        Some(self.now().saturating_duration_since(born))
    }

    /// The turn begins: something was waited for until now.
    pub(crate) fn meter_turn(&mut self) {
        let now = ticks();
        let meter = &mut self.meter;
        meter.until_sample -= 1;
        if meter.until_sample == 0 {
            meter.until_sample = SAMPLED_OF;
            meter.is_sampled = true;
            meter.noted_from = 0;
            meter.books.calibrate(now);
        }
        meter.events = self.statistics.events;
        meter.timers = self.statistics.timers;
        meter.turn.began = now;
        meter.turn.phases = [0; phase::COUNT];
        meter.phase_began = now;
        meter.last = now as u32;
    }

    /// A phase of the turn has ended.
    #[inline]
    pub(crate) fn meter_phase(&mut self, phase: usize) {
        let now = ticks();
        let meter = &mut self.meter;
        // A reactor that was put here in a callback has begun no turn.
        if meter.phase_began > 0 {
            meter.turn.phases[phase] = now.saturating_sub(meter.phase_began);
        }
        meter.phase_began = now;
        meter.last = now as u32;
    }

    /// The last phase of the turn has ended.
    pub(crate) fn meter_turned(&mut self) {
        self.meter_phase(phase::REST);
        let meter = &mut self.meter;
        meter.phase_began = 0;
        let books = &mut meter.books;
        meter.turn.events = (self.statistics.events - meter.events) as u32;
        meter.turn.timers = (self.statistics.timers - meter.timers) as u32;
        for (total, ticks) in books.phases.iter_mut().zip(meter.turn.phases) {
            *total += ticks;
        }
        books.last[books.count as usize % KEPT] = meter.turn;
        books.count += 1;
        let took = books.duration(meter.turn.total());
        books.turns.record(took);
        if meter.is_sampled {
            meter.is_sampled = false;
            meter.noted_from = books.noted_from();
        }
        if took >= books.limits.turn {
            self.meter_warn(took);
        } else if !books.of_turn.is_empty() {
            books.of_turn.clear();
        }
    }

    /// A callback has returned.
    #[inline(always)]
    pub(crate) fn meter_ran(&mut self, ran: Ran) {
        let now = ticks() as u32;
        let took = now.wrapping_sub(self.meter.last);
        self.meter.last = now;
        if took >= self.meter.noted_from {
            self.meter_note(ran, took);
        }
    }

    /// A budget was spent, and something waits.
    #[cold]
    pub(crate) fn meter_spent(&mut self, budget: Budget) {
        self.meter.books.spent[budget as usize] += 1;
    }

    #[cold]
    #[inline(never)]
    fn meter_note(&mut self, ran: Ran, ticked: u32) {
        let books = &mut self.meter.books;
        if ticked >= CALIBRATED_FROM {
            books.calibrate(ticks());
        }
        let took = books.duration(ticked.into());
        if self.meter.is_sampled {
            books.callbacks[ran.kind as usize].record(took);
        }
        if took >= books.limits.callback {
            let token = Some(self.current).filter(|it| *it != Token::WAKER);
            let slow = SlowCallback {
                at: Instant::now(),
                took,
                kind: ran.kind,
                name: self.name_of(ran, token),
                token,
                age: token.and_then(|token| self.age(token)),
            };
            let books = &mut self.meter.books;
            books.of_turn.push(slow.clone());
            books.keep(slow);
        }
        // What this took is nobody's.
        self.meter.last = ticks() as u32;
    }

    /// The name of a descriptor is user code's.
    fn name_of(&mut self, ran: Ran, token: Option<Token>) -> String {
        let entry = token.and_then(|token| self.slots.get_mut(token));
        match (entry.and_then(Slot::entry_mut), ran.name, token) {
            (Some(entry), ..) => catch_panic(|| entry.log_prefix().into_owned())
                .unwrap_or_else(|_| "(whose log_prefix panics)".into()),
            (None, _, Some(token)) => format!("{token}, which is gone"),
            (None, Some(name), None) => written(name()).to_owned(),
            (None, None, None) => "a call".to_owned(),
        }
    }

    /// Logs a slow turn, with the slowest that ran in it.
    #[cold]
    fn meter_warn(&mut self, took: Duration) {
        let books = &mut self.meter.books;
        let mut slow = mem::take(&mut books.of_turn);
        slow.sort_by_key(|it| std::cmp::Reverse(it.took));
        let turn = self.meter.turn;
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
        let generic = "web::list<alloc::string::String>::{{closure}}";
        assert_eq!(written(generic), generic);
        assert_eq!(kind_of("Echo,TCP,127.0.0.1:7"), "Echo,TCP");
        assert_eq!(kind_of("signals"), "signals");
    }
}
