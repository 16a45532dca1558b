//! Requests that wait for their answers.

use std::collections::VecDeque;
use std::fmt;
use std::time::{Duration, Instant};

/// Requests that were sent and wait for their answers, each with what is to be done for it
/// then. For protocols that answer in order, or by a number.
///
/// It is a plain value that knows no connection. A protocol [asks](Self::ask) when it
/// sends, and takes the question back when the answer comes:
///
/// - [`take_first`](Self::take_first) if peers answer in order;
/// - [`take`](Self::take) if an answer says the number of its question. The search begins
///   with the oldest, so answers that come about in order are found at once;
/// - [`is_empty`](Self::is_empty) tells a protocol with one question at a time when the next
///   may leave: `Questions::new(1)` refuses it until then.
///
/// [`oldest`](Self::oldest) and [`take_late`](Self::take_late) serve a deadline, and
/// [`take_all`](Self::take_all) the end of the connection.
///
/// # Examples
///
/// ```
/// use std::time::{Duration, Instant};
/// use bowline::framing::Questions;
///
/// let mut now = Instant::now();
/// let mut questions = Questions::new(2);
/// questions.ask(1, "who?", now)?;
/// now += Duration::from_secs(2);
/// questions.ask(2, "where?", now)?;
/// assert_eq!(questions.ask(3, "when?", now), Err("when?"));
///
/// assert_eq!(questions.take(&2), Some("where?"));
/// assert_eq!(questions.take(&2), None);
/// let late = questions.take_late(Duration::from_secs(1), now);
/// assert_eq!(late.collect::<Vec<_>>(), ["who?"]);
/// # Ok::<(), &str>(())
/// ```
pub struct Questions<K, V> {
    /// Invariant: in the order of their times.
    waiting: VecDeque<Question<K, V>>,
    most: usize,
}

struct Question<K, V> {
    number: K,
    asked: Instant,
    value: V,
}

impl<K: PartialEq, V> Questions<K, V> {
    /// None yet, and so many at the most.
    pub fn new(most: usize) -> Self {
        Self {
            waiting: VecDeque::new(),
            most,
        }
    }

    /// A question was asked now. Where nothing has numbers, `K` is `()`.
    ///
    /// # Errors
    ///
    /// As many wait as may. `value` comes back.
    pub fn ask(&mut self, number: K, value: V, now: Instant) -> Result<(), V> {
        if self.is_full() {
            return Err(value);
        }
        self.waiting.push_back(Question {
            number,
            asked: now,
            value,
        });
        Ok(())
    }

    /// The question of this number was answered. `None` if none of this number waits: it was
    /// answered before, or was too late.
    pub fn take(&mut self, number: &K) -> Option<V> {
        let mut waiting = self.waiting.iter();
        let at = waiting.position(|it| it.number == *number)?;
        self.waiting.remove(at).map(|it| it.value)
    }

    /// The oldest question was answered. `None` if none waits.
    pub fn take_first(&mut self) -> Option<V> {
        self.waiting.pop_front().map(|it| it.value)
    }

    /// The oldest question.
    pub fn first(&self) -> Option<&V> {
        self.waiting.front().map(|it| &it.value)
    }

    /// The oldest question.
    pub fn first_mut(&mut self) -> Option<&mut V> {
        self.waiting.front_mut().map(|it| &mut it.value)
    }

    /// When the oldest was asked.
    pub fn oldest(&self) -> Option<Instant> {
        self.waiting.front().map(|it| it.asked)
    }

    /// Takes those that have waited for so long, the oldest first.
    pub fn take_late(
        &mut self,
        limit: Duration,
        now: Instant,
    ) -> impl Iterator<Item = V> + use<K, V> {
        let is_late = |it: &&Question<K, V>| now.saturating_duration_since(it.asked) >= limit;
        let count = self.waiting.iter().take_while(is_late).count();
        let late: Vec<_> = self.waiting.drain(..count).collect();
        late.into_iter().map(|it| it.value)
    }

    /// Takes all, the oldest first. Nobody will answer them any more.
    pub fn take_all(&mut self) -> impl Iterator<Item = V> + use<K, V> {
        let all = std::mem::take(&mut self.waiting);
        all.into_iter().map(|it| it.value)
    }

    /// How many wait.
    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Whether none waits.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Whether as many wait as may.
    pub fn is_full(&self) -> bool {
        self.len() >= self.most
    }
}

impl<K, V> fmt::Debug for Questions<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Questions")
            .field("waiting", &self.waiting.len())
            .field("most", &self.most)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use bowline_reactor::{Clock, SystemClock};

    use super::*;

    #[test]
    fn questions_are_answered_in_order_and_by_number() {
        let now = SystemClock.now();
        let mut questions = Questions::new(3);
        for number in 0..3 {
            assert_eq!(questions.ask(number, number * 10, now), Ok(()));
        }
        assert!(questions.is_full());
        assert_eq!(questions.ask(4, 40, now), Err(40));
        assert_eq!(questions.take(&1), Some(10));
        assert_eq!(questions.take(&1), None);
        assert_eq!(questions.first(), Some(&0));
        assert_eq!(questions.take_first(), Some(0));
        assert_eq!(questions.take_all().collect::<Vec<_>>(), [20]);
        assert!(questions.is_empty() && questions.take_first().is_none());
    }

    #[test]
    fn late_ones_are_those_that_have_waited_for_so_long() {
        let start = SystemClock.now();
        let second = Duration::from_secs(1);
        let mut questions = Questions::new(9);
        for number in 0..4 {
            let asked = start + number * second;
            assert_eq!(questions.ask(number, number, asked), Ok(()));
        }
        let now = start + 3 * second;
        assert_eq!(questions.oldest(), Some(start));
        assert_eq!(
            questions.take_late(2 * second, now).collect::<Vec<_>>(),
            [0, 1]
        );
        assert_eq!(questions.oldest(), Some(start + 2 * second));
        assert_eq!(questions.take_late(2 * second, now).count(), 0);
    }
}
