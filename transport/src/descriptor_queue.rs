//! Descriptors that wait for their bytes. The queue owns them. It is pure.
//!
//! There are two kinds in one queue. A *floating* descriptor travels with the earliest
//! unsent bytes, and claims one of them. An *exact* group is attached to the first byte
//! of its own message. The queue decides how many of the unsent bytes the next
//! `sendmsg` may take, and which descriptors go with it ([`DescriptorQueue::plan`]).

use std::collections::VecDeque;
use std::mem;

use bowline_protocol::PassedDescriptor;

use crate::sys::MAX_DESCRIPTORS;

/// An empty queue keeps its memory up to this length. It is enough for a burst, but not
/// for what a slow peer once left behind.
const MOST_KEPT: usize = 256;

#[derive(Debug, Default)]
pub(crate) struct DescriptorQueue {
    /// All waiting descriptors of both kinds, in order.
    descriptors: VecDeque<PassedDescriptor>,
    /// The messages that some of them belong to, in order.
    groups: VecDeque<Exact>,
    /// How many floating descriptors come behind the last exact group. Invariant:
    /// together with those that the groups count, this is `descriptors.len()`.
    trailing: usize,
    /// Where the last queued exact group ends. Floating descriptors behind it must not
    /// travel within its message.
    exact_end: u64,
    /// Where the last sent exact group ends.
    not_before: u64,
}

/// Descriptors that belong to the bytes from `start` to `end`. These are positions in
/// the whole stream.
#[derive(Debug)]
struct Exact {
    /// How many floating descriptors come between the group before and this one.
    floating: usize,
    start: u64,
    end: u64,
    count: usize,
}

/// How many bytes the next `sendmsg` takes from the front, and how many descriptors on
/// the first of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(crate) bytes: usize,
    pub(crate) descriptors: usize,
}

/// Unsent descriptors, and the bytes that they were queued for.
///
/// [`Unsent`](crate::Unsent) has a list of these. It follows these rules:
///
/// - A message is a range of the unsent bytes. It is not empty, and has at most 253
///   descriptors.
/// - Messages are in order, and do not overlap.
/// - Only the first one may have no descriptors. It begins at 0 then.
/// - Descriptors that may travel with any byte need as many bytes in front of the next
///   message, outside of any message.
///
/// Adopting a connection with another list is refused
/// ([`AdoptErrorKind::UnfitDescriptors`](crate::AdoptErrorKind)).
#[derive(Debug)]
#[non_exhaustive]
pub struct UnsentDescriptors {
    /// The message they belong to exactly, as a range of the unsent bytes. `None` for
    /// descriptors that may travel with any byte.
    pub message: Option<std::ops::Range<usize>>,
    /// The descriptors, in order. There are none if the message has left in part: its
    /// descriptors left too, and no others may travel with the rest.
    pub descriptors: Vec<PassedDescriptor>,
}

impl UnsentDescriptors {
    /// Makes one of descriptors that belong to a range of the unsent bytes, or to none.
    pub fn new(
        message: Option<std::ops::Range<usize>>,
        descriptors: Vec<PassedDescriptor>,
    ) -> Self {
        Self {
            message,
            descriptors,
        }
    }
}

/// Whether a list follows these rules, for so many unsent bytes. Then it could have
/// been [taken](DescriptorQueue::take) from a queue. It may come from another process,
/// and be anything.
pub(crate) fn fit(groups: &[UnsentDescriptors], bytes: usize) -> bool {
    // Where the message before ends, and how many floating descriptors come behind it.
    let (mut from, mut floating) = (0, 0);
    groups.iter().enumerate().all(|(at, group)| {
        let count = group.descriptors.len();
        let Some(range) = &group.message else {
            floating += count;
            return true;
        };
        let is_rest = count == 0 && at == 0 && range.start == 0;
        let is_message = (1..=MAX_DESCRIPTORS).contains(&count)
            && range
                .start
                .checked_sub(from)
                .is_some_and(|room| floating <= room);
        (from, floating) = (range.end, 0);
        (is_rest || is_message) && range.start < range.end && range.end <= bytes
    })
}

impl DescriptorQueue {
    /// How many descriptors wait.
    #[inline]
    pub(crate) fn len(&self) -> usize {
        self.descriptors.len()
    }

    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        self.descriptors.is_empty()
    }

    /// Queues a descriptor for any byte.
    #[inline]
    pub(crate) fn push(&mut self, descriptor: PassedDescriptor) {
        self.descriptors.push_back(descriptor);
        self.trailing += 1;
    }

    /// Whether an exact group may begin behind `written` bytes, of which `sent` have
    /// left. Each floating descriptor must have a byte before it.
    pub(crate) fn is_settled(&self, sent: u64, written: u64) -> bool {
        let from = sent.max(self.exact_end).max(self.not_before);
        self.trailing as u64 <= written.saturating_sub(from)
    }

    /// Queues a group for the bytes from `start` to `end`, which are written together
    /// with it.
    pub(crate) fn push_exact(&mut self, start: u64, end: u64, descriptors: Vec<PassedDescriptor>) {
        debug_assert!(start < end && !descriptors.is_empty());
        self.groups.push_back(Exact {
            floating: mem::take(&mut self.trailing),
            start,
            end,
            count: descriptors.len(),
        });
        self.exact_end = end;
        self.descriptors.extend(descriptors);
    }

    /// Plans the next call, which takes some of the `unsent` bytes (at least one) from
    /// position `sent` on, with at most `per_message` floating descriptors.
    pub(crate) fn plan(&self, sent: u64, unsent: usize, per_message: usize) -> Plan {
        let until = |position: u64| {
            let bytes = position.saturating_sub(sent);
            unsent.min(usize::try_from(bytes).unwrap_or(usize::MAX))
        };
        if self.is_empty() {
            return Plan {
                bytes: unsent,
                descriptors: 0,
            };
        }
        let (floating, boundary) = match self.groups.front() {
            Some(exact) if exact.floating > 0 => (exact.floating, exact.start),
            Some(exact) if sent < exact.start => {
                return Plan {
                    bytes: until(exact.start),
                    descriptors: 0,
                };
            }
            // The call ends with the message. Then the receiver's kernel ends a read
            // there.
            Some(exact) => {
                return Plan {
                    bytes: until(exact.end),
                    descriptors: exact.count,
                };
            }
            None => (self.trailing, u64::MAX),
        };
        if sent < self.not_before {
            return Plan {
                bytes: until(self.not_before),
                descriptors: 0,
            };
        }
        let available = until(boundary);
        let descriptors = floating.min(per_message).min(available);
        Plan {
            // Each descriptor that stays keeps its byte.
            bytes: if floating > descriptors {
                descriptors
            } else {
                available
            },
            descriptors,
        }
    }

    /// The first `count` descriptors, as [`plan`](Self::plan) counted them, in two
    /// slices. Walking each slice takes a fraction of the time that walking both as one
    /// takes.
    #[inline]
    pub(crate) fn first(&self, count: usize) -> (&[PassedDescriptor], &[PassedDescriptor]) {
        let (front, back) = self.descriptors.as_slices();
        match count.checked_sub(front.len()) {
            Some(more) => (front, &back[..more]),
            None => (&front[..count], &[]),
        }
    }

    /// Closes the first `count` descriptors, which have left.
    pub(crate) fn sent(&mut self, count: usize) {
        let mut left = count;
        while left > 0 {
            let Some(exact) = self.groups.front_mut() else {
                debug_assert!(left <= self.trailing);
                self.trailing -= left;
                break;
            };
            if exact.floating > 0 {
                let floating = left.min(exact.floating);
                exact.floating -= floating;
                left -= floating;
            } else {
                debug_assert!(exact.count <= left, "a group leaves as a whole");
                left -= exact.count;
                self.not_before = exact.end;
                self.groups.pop_front();
            }
        }
        self.descriptors.drain(..count);
        if self.is_empty() && self.descriptors.capacity() > 2 * MOST_KEPT {
            self.descriptors = VecDeque::new();
            self.groups = VecDeque::new();
        }
    }

    /// Takes everything, to be closed.
    pub(crate) fn take_all(&mut self) -> VecDeque<PassedDescriptor> {
        self.groups.clear();
        self.trailing = 0;
        mem::take(&mut self.descriptors)
    }

    /// Takes everything. Positions become offsets into the bytes behind `sent`.
    pub(crate) fn take(&mut self, sent: u64) -> Vec<UnsentDescriptors> {
        let offset = |position: u64| usize::try_from(position - sent).unwrap_or(usize::MAX);
        let mut descriptors = self.descriptors.drain(..);
        let mut all = Vec::new();
        if self.not_before > sent {
            let message = Some(0..offset(self.not_before));
            all.push(UnsentDescriptors::new(message, Vec::new()));
        }
        let mut add = |message, count| {
            if count > 0 {
                all.push(UnsentDescriptors {
                    message,
                    descriptors: descriptors.by_ref().take(count).collect(),
                });
            }
        };
        for exact in self.groups.drain(..) {
            add(None, exact.floating);
            add(Some(offset(exact.start)..offset(exact.end)), exact.count);
        }
        add(None, mem::take(&mut self.trailing));
        drop(descriptors);
        all
    }

    /// Queues groups that [`take`](Self::take) took, for the bytes behind `sent`.
    pub(crate) fn restore(&mut self, sent: u64, groups: Vec<UnsentDescriptors>) {
        for UnsentDescriptors {
            message,
            descriptors,
        } in groups
        {
            match message {
                None => descriptors.into_iter().for_each(|each| self.push(each)),
                Some(range) if descriptors.is_empty() => {
                    self.not_before = self.not_before.max(sent + range.end as u64);
                }
                Some(range) => {
                    self.push_exact(
                        sent + range.start as u64,
                        sent + range.end as u64,
                        descriptors,
                    );
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
