//! Datagrams that wait to be sent. The queue owns their descriptors. It is pure.
//!
//! Their bytes are behind each other in one piece of memory. So datagrams of one length
//! to one address can be one message that the kernel cuts (UDP GSO). If an address has
//! no room, its datagrams keep their order, and others pass them.

use std::collections::VecDeque;

use bowline_protocol::PassedDescriptor;

use crate::sys::{INET4_BYTES, OutgoingMessage};

/// An empty queue keeps its memory up to this size.
const MOST_KEPT: usize = 65_536;

/// One queue of each reactor keeps its memory up to this size: as much as the kernel's
/// buffers take of one socket by default, so that a source of datagrams that fills them
/// makes memory once.
const MOST_KEPT_ONCE: usize = 262_144;

/// How many bytes one message has at the most that the kernel cuts. It is less than the
/// largest datagram of either family of addresses.
const MOST_IN_RUN: usize = 65_000;

/// Datagrams that wait to be sent, in order.
#[derive(Debug, Default)]
pub(crate) struct SendQueue {
    bytes: Vec<u8>,
    /// Encoded addresses. Equal ones in succession are stored once.
    names: Vec<u8>,
    /// Invariant: neither the first nor the last is `Gone`.
    waiting: VecDeque<Waiting>,
    len: usize,
    unsent_bytes: usize,
    descriptors: usize,
    /// How many are held back.
    held: usize,
}

#[derive(Debug)]
struct Waiting {
    /// Where its bytes are.
    start: usize,
    length: usize,
    /// Where its address is. It has no bytes for the peer of a connected socket.
    name_start: usize,
    name_length: usize,
    descriptors: Vec<PassedDescriptor>,
    place: Place,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    InLine,
    /// Its address had no room.
    Held,
    /// It has left, but some before it have not.
    Gone,
}

/// A datagram in the queue.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Queued<'a> {
    pub(crate) data: &'a [u8],
    /// Its encoded address. Empty for the peer of a connected socket.
    pub(crate) name: &'a [u8],
    pub(crate) descriptors: &'a [PassedDescriptor],
}

/// A datagram taken out of the queue.
#[derive(Debug)]
pub(crate) struct TakenOut {
    pub(crate) data: Vec<u8>,
    pub(crate) name: Vec<u8>,
    pub(crate) descriptors: Vec<PassedDescriptor>,
}

impl SendQueue {
    /// How many datagrams wait.
    #[inline]
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// How many bytes they have.
    #[inline]
    pub(crate) fn unsent_bytes(&self) -> usize {
        self.unsent_bytes
    }

    /// How many descriptors they have.
    #[inline]
    pub(crate) fn descriptors(&self) -> usize {
        self.descriptors
    }

    /// Whether a datagram could be sent now.
    #[inline]
    pub(crate) fn has_any_in_line(&self) -> bool {
        self.len > self.held
    }

    /// Whether some are held back.
    #[inline]
    pub(crate) fn has_held(&self) -> bool {
        self.held > 0
    }

    /// How many datagrams to `name` are held back.
    #[inline]
    pub(crate) fn held_for(&self, name: &[u8]) -> usize {
        match self.held {
            0 => 0,
            _ => self.count_held_for(name),
        }
    }

    #[cold]
    fn count_held_for(&self, name: &[u8]) -> usize {
        let is_it = |it: &&Waiting| it.place == Place::Held && self.name_of(it) == name;
        self.waiting.iter().filter(is_it).count()
    }

    /// Whether it is worth keeping once it is empty.
    pub(crate) fn is_small(&self) -> bool {
        self.bytes.capacity() <= MOST_KEPT && self.names.capacity() <= MOST_KEPT
    }

    /// Whether it is worth keeping once.
    #[cold]
    pub(crate) fn is_kept_once(&self) -> bool {
        self.bytes.capacity() <= MOST_KEPT_ONCE && self.names.capacity() <= MOST_KEPT
    }

    /// Puts a datagram at the end. Its bytes are `parts`, one after the other.
    #[inline]
    pub(crate) fn push(
        &mut self,
        parts: &[&[u8]],
        name: &[u8],
        descriptors: Vec<PassedDescriptor>,
    ) {
        self.make_room();
        let start = self.bytes.len();
        for part in parts {
            self.bytes.extend_from_slice(part);
        }
        let length = self.bytes.len() - start;
        let name_start = match self.waiting.back() {
            Some(last) if is_same(self.name_of(last), name) => last.name_start,
            _ => {
                match <&[u8; INET4_BYTES]>::try_from(name) {
                    // Its length is known to the compiler.
                    Ok(name) => self.names.extend_from_slice(name),
                    Err(_) => self.names.extend_from_slice(name),
                }
                self.names.len() - name.len()
            }
        };
        let place = match self.held_for(name) {
            0 => Place::InLine,
            _ => {
                self.held += 1;
                Place::Held
            }
        };
        self.len += 1;
        self.unsent_bytes += length;
        self.descriptors += descriptors.len();
        self.waiting.push_back(Waiting {
            start,
            length,
            name_start,
            name_length: name.len(),
            descriptors,
            place,
        });
    }

    #[inline]
    fn name_of(&self, waiting: &Waiting) -> &[u8] {
        &self.names[waiting.name_start..][..waiting.name_length]
    }

    /// Moves the waiting bytes to the front, if most of the memory before them is
    /// spent.
    #[inline]
    fn make_room(&mut self) {
        let Some(first) = self.waiting.front() else {
            self.bytes.clear();
            self.names.clear();
            return;
        };
        if first.start > MOST_KEPT && first.start > self.bytes.len() / 2 {
            self.compact();
        }
    }

    #[cold]
    fn compact(&mut self) {
        let Some(first) = self.waiting.front() else {
            return;
        };
        let (bytes, names) = (first.start, first.name_start);
        self.bytes.drain(..bytes);
        self.names.drain(..names);
        for waiting in &mut self.waiting {
            waiting.start -= bytes;
            waiting.name_start -= names;
        }
    }

    /// The datagrams that could be sent now, in order.
    pub(crate) fn in_line(&self) -> impl Iterator<Item = Queued<'_>> {
        let in_line = self.waiting.iter().filter(|it| it.place == Place::InLine);
        in_line.map(|it| Queued {
            data: &self.bytes[it.start..][..it.length],
            name: self.name_of(it),
            descriptors: &it.descriptors,
        })
    }

    /// The datagram that waits, if it is the only one, could be sent now, and has no
    /// descriptors.
    #[inline]
    pub(crate) fn only(&self) -> Option<Queued<'_>> {
        match self.waiting.front() {
            Some(first) if self.waiting.len() == 1 => {
                let is_plain = first.place == Place::InLine && first.descriptors.is_empty();
                is_plain.then(|| Queued {
                    data: &self.bytes[first.start..][..first.length],
                    name: self.name_of(first),
                    descriptors: &[],
                })
            }
            _ => None,
        }
    }

    /// The datagrams that could be sent now, up to the first with descriptors, as
    /// messages with their counts. A message has at most `most` datagrams. If it has
    /// more than one, each is at most `longest` bytes long.
    pub(crate) fn runs(&self, most: usize, longest: usize) -> Runs<'_> {
        Runs {
            queue: self,
            next: 0,
            most,
            longest,
        }
    }

    /// Removes the first `count` datagrams in line, which have left.
    #[inline]
    pub(crate) fn sent(&mut self, count: usize) {
        if count >= self.len {
            // Mostly.
            self.len = 0;
            self.held = 0;
            self.unsent_bytes = 0;
            self.descriptors = 0;
            self.waiting.clear();
            return;
        }
        // Otherwise some of them have left already, or are held back.
        if self.held == 0 && self.waiting.len() == self.len {
            for _ in 0..count {
                let Some(waiting) = self.waiting.pop_front() else {
                    return;
                };
                self.len -= 1;
                self.unsent_bytes -= waiting.length;
                self.descriptors -= waiting.descriptors.len();
            }
            return;
        }
        for _ in 0..count {
            drop(self.take_first());
        }
    }

    /// Takes out the first datagram in line.
    pub(crate) fn take_out(&mut self) -> Option<TakenOut> {
        let first = self.in_line().next()?;
        let (data, name) = (first.data.to_vec(), first.name.to_vec());
        let descriptors = self.take_first();
        Some(TakenOut {
            data,
            name,
            descriptors,
        })
    }

    /// Removes the first datagram in line, and returns its descriptors.
    fn take_first(&mut self) -> Vec<PassedDescriptor> {
        let mut in_line = self.waiting.iter_mut();
        let Some(first) = in_line.find(|it| it.place == Place::InLine) else {
            return Vec::new();
        };
        first.place = Place::Gone;
        let descriptors = std::mem::take(&mut first.descriptors);
        self.len -= 1;
        self.unsent_bytes -= first.length;
        self.descriptors -= descriptors.len();
        while self.waiting.front().is_some_and(Waiting::is_gone) {
            self.waiting.pop_front();
        }
        while self.waiting.back().is_some_and(Waiting::is_gone) {
            self.waiting.pop_back();
        }
        descriptors
    }

    /// Holds back the first datagram in line, and all others to the same address.
    pub(crate) fn hold_first(&mut self) {
        let in_line = |it: &Waiting| it.place == Place::InLine;
        let Some(first) = self.waiting.iter().find(|it| in_line(it)) else {
            return;
        };
        let name = first.name_start..first.name_start + first.name_length;
        for waiting in self.waiting.iter_mut().filter(|it| in_line(it)) {
            let own = waiting.name_start..waiting.name_start + waiting.name_length;
            if self.names[own] == self.names[name.clone()] {
                waiting.place = Place::Held;
                self.held += 1;
            }
        }
    }

    /// Puts all held-back datagrams in line again.
    pub(crate) fn release(&mut self) {
        self.held = 0;
        for waiting in &mut self.waiting {
            if waiting.place == Place::Held {
                waiting.place = Place::InLine;
            }
        }
    }

    /// Drops all datagrams, and returns the descriptors, to be closed.
    pub(crate) fn take_all(&mut self) -> Vec<PassedDescriptor> {
        let waiting = std::mem::take(&mut self.waiting);
        *self = Self::default();
        waiting.into_iter().flat_map(|it| it.descriptors).collect()
    }
}

/// Whether two names are the same. Those of IPv4, which most are, are compared as one number.
#[inline]
fn is_same(one: &[u8], other: &[u8]) -> bool {
    let number = |name: &[u8]| {
        Some(u128::from_ne_bytes(
            <[u8; INET4_BYTES]>::try_from(name).ok()?,
        ))
    };
    match (number(one), number(other)) {
        (Some(one), Some(other)) => one == other,
        _ => one == other,
    }
}

impl Waiting {
    fn is_gone(&self) -> bool {
        self.place == Place::Gone
    }
}

/// The datagrams of a queue as messages to the kernel. [`SendQueue::runs`] makes it.
#[derive(Debug)]
pub(crate) struct Runs<'a> {
    queue: &'a SendQueue,
    next: usize,
    most: usize,
    longest: usize,
}

impl<'a> Iterator for Runs<'a> {
    type Item = (OutgoingMessage<'a>, usize);

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        let SendQueue { waiting, bytes, .. } = self.queue;
        let mut first = waiting.get(self.next)?;
        while first.place != Place::InLine {
            self.next += 1;
            first = waiting.get(self.next)?;
        }
        if !first.descriptors.is_empty() {
            return None;
        }
        self.next += 1;
        let mut count = 1;
        let mut end = first.start + first.length;
        if first.length > 0 && first.length <= self.longest {
            while count < self.most
                && let Some(next) = waiting.get(self.next)
                // What differs most often.
                && (next.name_start == first.name_start && next.name_length == first.name_length)
                && next.place == Place::InLine
                && next.start == end
                && (1..=first.length).contains(&next.length)
                && end + next.length - first.start <= MOST_IN_RUN
                && next.descriptors.is_empty()
            {
                self.next += 1;
                count += 1;
                end += next.length;
                if next.length < first.length {
                    // Only the last one may be shorter.
                    break;
                }
            }
        }
        let message = OutgoingMessage {
            data: &bytes[first.start..end],
            name: self.queue.name_of(first),
            segment: match count {
                1 => None,
                _ => u16::try_from(first.length).ok(),
            },
        };
        Some((message, count))
    }
}

#[cfg(test)]
mod tests;
