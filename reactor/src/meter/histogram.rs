//! Durations, counted in buckets.

use std::fmt;
use std::time::Duration;

/// How many buckets one doubling of the duration has, as a power of two.
const FINE_BITS: u32 = 2;
const FINE: usize = 1 << FINE_BITS;
/// The smallest duration that is told from zero, in nanoseconds, as a power of two.
const LOWEST_BIT: u32 = 6;
/// Doublings above it: up to some 73 minutes.
const DOUBLINGS: usize = 36;
const BUCKETS: usize = 1 + DOUBLINGS * FINE;

/// How often which durations were seen, in fixed memory.
///
/// Each doubling of the duration has four buckets, from 64 ns up to some 73 minutes, so
/// that a value is known to a quarter of itself. (The scheme is HdrHistogram's, with two
/// bits.)
#[derive(Clone, PartialEq, Eq)]
pub struct Histogram {
    buckets: [u64; BUCKETS],
    count: u64,
    nanoseconds: u64,
    longest: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self {
            buckets: [0; BUCKETS],
            count: 0,
            nanoseconds: 0,
            longest: 0,
        }
    }
}

impl Histogram {
    /// Counts one.
    pub fn record(&mut self, duration: Duration) {
        self.record_many(duration, 1);
    }

    /// Counts so many of the same duration.
    pub fn record_many(&mut self, duration: Duration, count: u64) {
        let nanoseconds = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        self.buckets[bucket(nanoseconds)] += count;
        self.count += count;
        let all = nanoseconds.saturating_mul(count);
        self.nanoseconds = self.nanoseconds.saturating_add(all);
        self.longest = self.longest.max(nanoseconds);
    }

    /// How many were counted.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// All of them together.
    pub fn total(&self) -> Duration {
        Duration::from_nanos(self.nanoseconds)
    }

    /// The longest of all, exactly.
    pub fn longest(&self) -> Duration {
        Duration::from_nanos(self.longest)
    }

    /// A duration that `share` of all (0 to 1) do not exceed: the upper bound of its
    /// bucket. Zero where nothing was counted.
    pub fn quantile(&self, share: f64) -> Duration {
        let wanted = (share.clamp(0.0, 1.0) * self.count as f64).ceil() as u64;
        let mut seen = 0;
        for (bound, count) in self.buckets() {
            seen += count;
            if seen >= wanted.max(1) {
                return bound.min(self.longest());
            }
        }
        self.longest()
    }

    /// The buckets, shortest first: the bound that its durations are below, and how many
    /// there were. All buckets are there, the empty ones too.
    pub fn buckets(&self) -> impl Iterator<Item = (Duration, u64)> + '_ {
        let counts = self.buckets.iter().enumerate();
        counts.map(|(index, count)| (Duration::from_nanos(bound(index)), *count))
    }
}

fn bucket(nanoseconds: u64) -> usize {
    let Some(doubling) = nanoseconds
        .checked_ilog2()
        .and_then(|log| log.checked_sub(LOWEST_BIT))
    else {
        return 0;
    };
    let fine = (nanoseconds >> (doubling + LOWEST_BIT - FINE_BITS)) as usize & (FINE - 1);
    (1 + doubling as usize * FINE + fine).min(BUCKETS - 1)
}

fn bound(index: usize) -> u64 {
    let doubling = (index.saturating_sub(1) / FINE) as u32;
    match index {
        0 => 1 << LOWEST_BIT,
        _ => ((index - 1) % FINE + FINE + 1) as u64 * (1 << (doubling + LOWEST_BIT - FINE_BITS)),
    }
}

impl fmt::Debug for Histogram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Histogram")
            .field("count", &self.count)
            .field("median", &self.quantile(0.5))
            .field("p99", &self.quantile(0.99))
            .field("longest", &self.longest())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn every_bucket_begins_where_the_one_before_ends() {
        for index in 0..BUCKETS - 1 {
            assert_eq!(bucket(bound(index) - 1), index);
            assert_eq!(bucket(bound(index)), index + 1);
        }
        assert_eq!(bucket(0), 0);
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn nothing_counted_has_no_durations() {
        let empty = Histogram::default();
        assert_eq!((empty.count(), empty.longest()), (0, Duration::ZERO));
        assert_eq!(empty.quantile(0.99), Duration::ZERO);
    }

    proptest! {
        #[test]
        fn a_quantile_is_the_sorted_lists_to_a_quarter(
            mut all in prop::collection::vec(0_u64..10_000_000_000, 1..200),
            share in 0.0_f64..=1.0,
        ) {
            let mut histogram = Histogram::default();
            for nanoseconds in &all {
                histogram.record(Duration::from_nanos(*nanoseconds));
            }
            all.sort_unstable();
            let rank = ((share * all.len() as f64).ceil() as usize).max(1) - 1;
            let exact = all[rank];
            let told = histogram.quantile(share).as_nanos() as u64;
            prop_assert!(told >= exact, "{told} is below {exact}");
            prop_assert!(told <= exact + exact / 4 + 64, "{told} is far above {exact}");
            prop_assert_eq!(histogram.count(), all.len() as u64);
            prop_assert_eq!(histogram.total().as_nanos() as u64, all.iter().sum::<u64>());
        }
    }
}
