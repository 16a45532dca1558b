//! When registered descriptors were registered, without a word in each.

use std::time::{Duration, Instant};

/// How close two marks may be.
const APART: Duration = Duration::from_millis(100);
/// How many are kept. When there are more, the older ones get farther apart.
const MARKS: usize = 512;

/// Marks in the order of generations: this one was not given out before that time.
#[derive(Debug, Default)]
pub(super) struct Births(Vec<(u64, Instant)>);

impl Births {
    pub(super) fn note(&mut self, generation: u64, now: Instant) {
        if let Some((_, last)) = self.0.last()
            && now.saturating_duration_since(*last) < APART
        {
            return;
        }
        if self.0.len() >= MARKS {
            self.thin_out(now);
        }
        self.0.push((generation, now));
    }

    /// Drops the mark that is missed least: the gap that it leaves is the smallest for its
    /// age.
    fn thin_out(&mut self, now: Instant) {
        let missed = |index: usize| {
            let (before, after) = (self.0[index - 1].1, self.0[index + 1].1);
            let age = now.saturating_duration_since(before).as_secs_f64();
            after.saturating_duration_since(before).as_secs_f64() / age
        };
        let all = (1..self.0.len() - 1).map(|index| (missed(index), index));
        if let Some((_, least)) = all.min_by(|(a, _), (b, _)| a.total_cmp(b)) {
            self.0.remove(least);
        }
    }

    /// When that generation was given out, or some time before.
    pub(super) fn of(&self, generation: u64) -> Option<Instant> {
        let later = self.0.partition_point(|(first, _)| *first <= generation);
        self.0.get(later.checked_sub(1)?).map(|(_, born)| *born)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_registered_is_never_younger_than_told_and_hardly_older() {
        let start = Instant::now();
        let at = |generation: u64| start + Duration::from_millis(generation * 10);
        let mut births = Births::default();
        for generation in 5..100_000 {
            births.note(generation, at(generation));
        }
        assert_eq!(births.of(4), None);
        assert!(births.0.len() <= MARKS);
        let told = |generation| births.of(generation).unwrap();
        for generation in 5..100_000 {
            assert!(told(generation) <= at(generation));
        }
        assert!(at(99_999) - told(99_999) <= APART);
        let (age, error) = (at(99_999) - at(50_000), at(50_000) - told(50_000));
        assert!(error < age / 8, "{error:?} of {age:?}");
    }
}
