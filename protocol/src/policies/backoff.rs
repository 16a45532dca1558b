//! How long to wait before the next try: a value, without a clock.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::Duration;

/// Chooses the waits between tries that keep failing. Each wait has a bound, which grows
/// from try to try up to a cap. The wait is chosen below the bound.
///
/// With the defaults the first wait is up to 1 s, and the bound doubles up to 60 s. Waits
/// are spread evenly between nothing and the bound ([`Jitter::Full`]). So clients that
/// lost their server at the same moment come back spread over the whole interval.
/// Doubling reaches the cap with the seventh try, when half a minute has been waited on
/// average. A larger factor would save a server that is down very few tries, and keep
/// clients away from a server that is back.
///
/// # Examples
///
/// ```
/// use std::time::Duration;
/// use bowline::policies::{Backoff, Jitter};
///
/// let mut backoff = Backoff::new().cap(Duration::from_secs(3)).jitter(Jitter::None);
/// let waits: Vec<u64> = (0..4).map(|_| backoff.next_wait().as_secs()).collect();
/// assert_eq!(waits, [1, 2, 3, 3]);
/// backoff.reset();
/// assert_eq!(backoff.next_wait(), Duration::from_secs(1));
/// ```
#[derive(Clone, Debug)]
pub struct Backoff {
    first: Duration,
    factor: f64,
    cap: Duration,
    jitter: Jitter,
    /// The state of the generator of choices.
    random: u64,
    retries: u32,
}

/// How a wait is chosen below its bound; see [`Backoff`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Jitter {
    /// Evenly between nothing and the bound.
    Full,
    /// The bound itself. For a single client, and for tests.
    None,
}

impl Backoff {
    /// Up to 1 s at first, doubling up to 60 s, with full jitter. The seed differs from
    /// process to process.
    pub fn new() -> Self {
        Self {
            first: Duration::from_secs(1),
            factor: 2.0,
            cap: Duration::from_secs(60),
            jitter: Jitter::Full,
            // Keyed at random by std; nothing needs to be hashed.
            random: RandomState::new().build_hasher().finish(),
            retries: 0,
        }
    }

    /// Sets the bound of the first wait; default 1 s.
    #[must_use]
    pub fn first(mut self, first: Duration) -> Self {
        self.first = first;
        self
    }

    /// Sets the factor by which the bound grows from one wait to the next; default 2. NaN,
    /// and anything below 1, counts as 1: the bound never shrinks.
    #[must_use]
    pub fn factor(mut self, factor: f64) -> Self {
        self.factor = factor.max(1.0);
        self
    }

    /// Sets the longest wait, whatever else was set; default 60 s.
    #[must_use]
    pub fn cap(mut self, cap: Duration) -> Self {
        self.cap = cap;
        self
    }

    /// Sets how a wait is chosen below its bound; default [`Jitter::Full`].
    #[must_use]
    pub fn jitter(mut self, jitter: Jitter) -> Self {
        self.jitter = jitter;
        self
    }

    /// Sets the seed of the choices. The same seed makes the same choices.
    #[must_use]
    pub fn seed(mut self, seed: u64) -> Self {
        self.random = seed;
        self
    }

    /// Chooses the next wait, and counts it.
    pub fn next_wait(&mut self) -> Duration {
        let bound = self.bound();
        self.retries = self.retries.saturating_add(1);
        let wait = match self.jitter {
            Jitter::Full => bound.mul_f64(self.next_fraction()),
            Jitter::None => bound,
        };
        wait.min(self.cap)
    }

    /// The bound of the next wait.
    pub fn bound(&self) -> Duration {
        if self.first.is_zero() {
            // Nothing grows from nothing; infinitely often is no number.
            return Duration::ZERO;
        }
        // 2^31 retries are as good as infinitely many.
        let exponent = i32::try_from(self.retries).unwrap_or(i32::MAX);
        let seconds = self.first.as_secs_f64() * self.factor.powi(exponent);
        Duration::try_from_secs_f64(seconds).map_or(self.cap, |bound| bound.min(self.cap))
    }

    /// How many waits were chosen since this was made or [reset](Self::reset).
    pub fn retries(&self) -> u32 {
        self.retries
    }

    /// Begins again with the first wait and the count at zero.
    pub fn reset(&mut self) {
        self.retries = 0;
    }

    /// A number from 0 up to 1 (the step of splitmix64; nothing secret depends
    /// on it).
    fn next_fraction(&mut self) -> f64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.random;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^= word >> 31;
        // As many bits as the mantissa holds.
        (word >> 11) as f64 / (1_u64 << 53) as f64
    }
}

impl Default for Backoff {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn full_jitter_uses_the_whole_interval() {
        let mut backoff = Backoff::new().factor(1.0).seed(1);
        let waits: Vec<f64> = (0..1000)
            .map(|_| backoff.next_wait().as_secs_f64())
            .collect();
        let mean = waits.iter().sum::<f64>() / 1000.0;
        assert!((0.45..0.55).contains(&mean), "{mean}");
        assert!(waits.iter().any(|wait| *wait < 0.01));
        assert!(waits.iter().any(|wait| *wait > 0.99));
    }

    #[test]
    fn no_wait_stays_none_however_often() {
        let mut backoff = Backoff::new().first(Duration::ZERO);
        assert!((0..3_000).all(|_| backoff.next_wait().is_zero()));
    }

    #[test]
    fn seeds_differ_unless_given() {
        let waits = |mut backoff: Backoff| [(); 4].map(|()| backoff.next_wait());
        assert_eq!(waits(Backoff::new().seed(7)), waits(Backoff::new().seed(7)));
        assert_ne!(waits(Backoff::new()), waits(Backoff::new()));
    }

    proptest! {
        /// Whatever is set, waits stay within the cap, and nothing overflows.
        #[test]
        fn waits_never_pass_the_cap(
            first in 0..u64::MAX,
            factor in any::<f64>(),
            cap in 0..u64::MAX,
            seed: u64,
            retries: u32,
        ) {
            let cap = Duration::from_nanos(cap);
            let first = Duration::from_secs(first);
            let mut backoff = Backoff::new().first(first).factor(factor).cap(cap).seed(seed);
            prop_assert!(backoff.next_wait() <= first.min(cap));
            backoff.retries = retries;
            prop_assert!(backoff.next_wait() <= cap);
            prop_assert!(backoff.next_wait() <= cap);
        }
    }
}
