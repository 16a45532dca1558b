//! When it is looked again for a predecessor, as a pure value.

use std::time::Duration;

/// After which time the first time: those who start at the same moment are through by
/// then, as a rule.
const FIRST_PAUSE: Duration = Duration::from_millis(1);

/// The longest, for who waits until another restart is through.
const LONGEST_PAUSE: Duration = Duration::from_millis(500);

/// How often it was looked, and how long it is rested until the next time.
///
/// What is limited is the rest: one that was stopped for a while, or had to wait for an
/// answer, has not looked less often for it.
#[derive(Debug)]
pub(super) struct Search {
    looks: u32,
    next: Duration,
    left: Duration,
}

impl Search {
    /// One that rests for so long in all.
    pub(super) fn new(limit: Duration) -> Self {
        Self {
            looks: 0,
            next: FIRST_PAUSE,
            left: limit,
        }
    }

    /// It is looked once more; which time that is.
    pub(super) fn look(&mut self) -> u32 {
        self.looks = self.looks.saturating_add(1);
        self.looks
    }

    /// How many times it was looked.
    pub(super) fn looks(&self) -> u32 {
        self.looks
    }

    /// How long until the next time; none if there is no next time.
    pub(super) fn pause(&mut self) -> Option<Duration> {
        let pause = self.next.min(self.left);
        if pause.is_zero() {
            return None;
        }
        self.left -= pause;
        self.next = (self.next * 2).min(LONGEST_PAUSE);
        Some(pause)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Looks until it was often enough: how often, and after which pauses.
    fn search(limit: Duration) -> (u32, Vec<Duration>) {
        let mut search = Search::new(limit);
        let mut pauses = Vec::new();
        search.look();
        while let Some(pause) = search.pause() {
            pauses.push(pause);
            search.look();
        }
        assert_eq!(search.pause(), None);
        (search.looks(), pauses)
    }

    #[test]
    fn pauses_get_longer_and_have_a_limit_together() {
        let ms = Duration::from_millis;
        let (looks, pauses) = search(ms(10_000));
        assert_eq!(pauses[..4], [1, 2, 4, 8].map(ms));
        assert_eq!(pauses[8..11], [256, 500, 500].map(ms));
        assert_eq!(pauses.iter().sum::<Duration>(), ms(10_000));
        assert_eq!(looks, 29, "as the documentation says");
        assert_eq!(search(ms(5)), (4, [1, 2, 2].map(ms).to_vec()));
        assert_eq!(search(Duration::ZERO), (1, vec![]));
    }

    #[test]
    fn no_limit_is_none() {
        let mut search = Search::new(Duration::MAX);
        for _ in 0..10_000 {
            assert!(search.pause().is_some());
        }
        search.looks = u32::MAX;
        assert_eq!(search.look(), u32::MAX);
    }
}
