//! The notices that wait for the manager to have room; pure.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;

use super::notice::Notice;

/// How many notices of the program may wait, and how many descriptors.
pub(super) const MOST: usize = 1024;

/// Notices that were not sent yet, in order. Each has a number, one more than that of the
/// notice before.
#[derive(Debug)]
pub(super) struct Queue {
    waiting: VecDeque<Waiting>,
    next: u64,
    most: usize,
}

#[derive(Debug)]
pub(super) struct Waiting {
    pub(super) number: u64,
    pub(super) notice: Notice,
    pub(super) descriptors: Vec<OwnedFd>,
    pub(super) purpose: Purpose,
}

/// What a notice is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// A notice of the program. It is accepted as long as there is room.
    Program,
    /// A notice of the watchdog. One is enough, however long it waits.
    Watchdog,
    /// A part of a restart or of an end, or a barrier. Each waits for a limited time, and
    /// the program's notices do not keep it out.
    Limited,
}

impl Queue {
    pub(super) fn new(most: usize) -> Self {
        Self {
            waiting: VecDeque::new(),
            next: 0,
            most,
        }
    }

    pub(super) fn set_most(&mut self, most: usize) {
        self.most = most;
    }

    /// Returns the number of a notice that does not have to wait.
    pub(super) fn pass(&mut self) -> u64 {
        debug_assert!(self.waiting.is_empty(), "overtakes what waits");
        self.next += 1;
        self.next - 1
    }

    /// Whether a notice with this many descriptors may wait.
    pub(super) fn has_room(&self, purpose: Purpose, descriptors: usize) -> bool {
        if purpose != Purpose::Program {
            return true;
        }
        let of_program = self.waiting.iter();
        let of_program = of_program.filter(|waiting| waiting.purpose == Purpose::Program);
        let (notices, held) = of_program.fold((0, 0), |(notices, held), waiting| {
            (notices + 1, held + waiting.descriptors.len())
        });
        // One alone may have as many as a message holds, whatever the limit.
        notices < self.most && (held == 0 || held + descriptors <= self.most)
    }

    /// Returns the number of a waiting notice for the same purpose that is enough.
    pub(super) fn stands_for(&self, purpose: Purpose) -> Option<u64> {
        let mut waiting = self.waiting.iter();
        let same = waiting.find(|waiting| waiting.purpose == purpose)?;
        (purpose == Purpose::Watchdog).then_some(same.number)
    }

    pub(super) fn push(
        &mut self,
        notice: Notice,
        descriptors: Vec<OwnedFd>,
        purpose: Purpose,
    ) -> u64 {
        let number = self.next;
        self.next += 1;
        self.waiting.push_back(Waiting {
            number,
            notice,
            descriptors,
            purpose,
        });
        number
    }

    /// Drops everything that waits. Returns how many notices that was. They count as gone.
    pub(super) fn clear(&mut self) -> usize {
        let count = self.waiting.len();
        self.waiting.clear();
        count
    }

    pub(super) fn first(&self) -> Option<&Waiting> {
        self.waiting.front()
    }

    pub(super) fn pop(&mut self) -> Option<Waiting> {
        self.waiting.pop_front()
    }

    /// Takes back a notice that waits. Returns whether it waited.
    pub(super) fn cancel(&mut self, number: u64) -> bool {
        let before = self.waiting.len();
        self.waiting.retain(|waiting| waiting.number != number);
        self.waiting.len() < before
    }

    /// Whether this notice, and all before it, no longer wait.
    pub(super) fn is_behind(&self, number: u64) -> bool {
        self.first().is_none_or(|first| first.number > number)
    }

    pub(super) fn len(&self) -> usize {
        self.waiting.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Returns the number of the next notice.
    pub(super) fn next(&self) -> u64 {
        self.next
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(count: usize) -> Queue {
        let mut queue = Queue::new(3);
        for _ in 0..count {
            queue.push(Notice::new().ready(), Vec::new(), Purpose::Program);
        }
        queue
    }

    #[test]
    fn order_is_kept_and_each_is_behind_when_it_is_gone() {
        let mut queue = filled(0);
        assert_eq!(queue.pass(), 0);
        let one = queue.push(Notice::new().status("one"), Vec::new(), Purpose::Program);
        let two = queue.push(Notice::new().status("two"), Vec::new(), Purpose::Limited);
        assert_eq!((one, two, queue.next()), (1, 2, 3));
        assert!(queue.is_behind(0) && !queue.is_behind(1));
        assert_eq!(queue.pop().unwrap().notice, Notice::new().status("one"));
        assert!(queue.is_behind(1) && !queue.is_behind(2));
        assert!(queue.cancel(2) && !queue.cancel(2));
        assert!(queue.is_behind(2) && queue.is_empty());
    }

    #[test]
    fn program_has_so_much_room_and_others_always() {
        let queue = filled(2);
        assert!(queue.has_room(Purpose::Program, 0));
        let queue = filled(3);
        assert!(!queue.has_room(Purpose::Program, 0));
        assert!(queue.has_room(Purpose::Limited, 0) && queue.has_room(Purpose::Watchdog, 0));
        let mut queue = filled(0);
        // Whatever one message holds can wait, alone.
        assert!(queue.has_room(Purpose::Program, 253));
        let pipe = || OwnedFd::from(std::io::pipe().unwrap().0);
        queue.push(Notice::new(), vec![pipe(), pipe()], Purpose::Program);
        assert!(queue.has_room(Purpose::Program, 1));
        assert!(!queue.has_room(Purpose::Program, 2));
    }

    /// A manager that is away for an hour needs to be told once.
    #[test]
    fn one_sign_of_life_stands_for_all() {
        let mut queue = filled(1);
        assert_eq!(queue.stands_for(Purpose::Watchdog), None);
        let number = queue.push(Notice::new().watchdog(), Vec::new(), Purpose::Watchdog);
        assert_eq!(queue.stands_for(Purpose::Watchdog), Some(number));
        assert_eq!(queue.stands_for(Purpose::Program), None);
    }
}
