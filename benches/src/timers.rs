//! What is asked of timers. Each peer does it in its own process and measures
//! its own CPU time.

use std::time::Duration;

use crate::sys::own_cpu_time;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Timed {
    /// Schedules timers over [`SPAN`], in no order, and lets all of them fire.
    Fire,
    /// Schedules timers and cancels them.
    Cancel,
    /// Schedules and cancels [`BESIDE_PENDING`] timers, one by one, while others
    /// wait.
    Pending,
    /// Moves scheduled timers.
    Reset,
    /// How late they fire.
    Lateness,
}

impl Timed {
    pub(crate) const ALL: [Self; 5] = [
        Self::Fire,
        Self::Cancel,
        Self::Pending,
        Self::Reset,
        Self::Lateness,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Fire => "fire",
            Self::Cancel => "cancel",
            Self::Pending => "pending",
            Self::Reset => "reset",
            Self::Lateness => "lateness",
        }
    }
}

/// Over what time they are due.
pub(crate) const SPAN: Duration = Duration::from_millis(100);
/// How many come and go while others wait.
pub(crate) const BESIDE_PENDING: usize = 100_000;
/// When those are due that are cancelled or moved before.
const FAR: Duration = Duration::from_secs(30);

/// Delays in [`SPAN`], scattered, the same in every run.
pub(crate) fn delays(count: usize) -> impl Iterator<Item = Duration> {
    let span = SPAN.as_nanos() as u64;
    scattered(count).map(move |number| Duration::from_nanos(number % span))
}

/// Delays far ahead: around half a minute, as time limits of connections are.
pub(crate) fn far_delays(count: usize) -> impl Iterator<Item = Duration> {
    let span = FAR.as_nanos() as u64;
    scattered(count).map(move |number| FAR + Duration::from_nanos(number % span))
}

/// Where timers of [`far_delays`] are moved to: elsewhere, as far ahead.
pub(crate) fn moved_delays(count: usize) -> impl Iterator<Item = Duration> {
    far_delays(count + 1).skip(1)
}

fn scattered(count: usize) -> impl Iterator<Item = u64> {
    // Knuth's multiplicative hash: evenly spread, without a generator.
    (1..=count as u64).map(|number| number.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 8)
}

/// CPU nanoseconds per operation since `before`.
pub(crate) fn per_operation(before: Duration, count: usize) -> Vec<f64> {
    vec![(own_cpu_time() - before).as_nanos() as f64 / count as f64]
}

/// The mean and the 99th percentile, in milliseconds.
pub(crate) fn lateness(mut late: Vec<Duration>) -> Vec<f64> {
    late.sort();
    let sum: Duration = late.iter().sum();
    let p99 = late[late.len() * 99 / 100];
    vec![
        sum.as_secs_f64() * 1e3 / late.len() as f64,
        p99.as_secs_f64() * 1e3,
    ]
}
