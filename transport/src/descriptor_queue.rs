//! Descriptors waiting for their bytes; pure, and their owner.
//!
//! Two kinds stand in one queue. A *floating* descriptor rides with the
//! earliest bytes not yet sent and claims one of them. An *exact* group is
//! attached to the first byte of its own message. The queue answers how much of
//! the unsent bytes the next `sendmsg` may take, and which descriptors go with
//! it ([`DescriptorQueue::plan`]).

use std::collections::VecDeque;

use bowline_protocol::PassedDescriptor;

/// How long a queue may be whose memory is kept when it is empty: what comes
/// in one go, and not what a peer that was slow for once left behind.
const MOST_KEPT: usize = 256;

#[derive(Debug, Default)]
pub(crate) struct DescriptorQueue {
    items: VecDeque<Item>,
    /// How many descriptors there are.
    count: usize,
    /// How many floating ones stand behind the last exact group.
    trailing: usize,
    /// Where the last exact group that was queued ends. Floating ones behind
    /// it have no business within its message.
    exact_end: u64,
    /// Where the last exact group that was sent ends.
    not_before: u64,
}

#[derive(Debug)]
enum Item {
    Floating(PassedDescriptor),
    Exact(Exact),
}

/// Descriptors that belong to the bytes from `start` to `end`, positions in the
/// whole stream.
#[derive(Debug)]
struct Exact {
    start: u64,
    end: u64,
    descriptors: Vec<PassedDescriptor>,
}

/// What the next `sendmsg` takes from the front: so many bytes, with so many
/// descriptors on the first of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(crate) bytes: usize,
    pub(crate) descriptors: usize,
}

/// Descriptors that did not leave, with what they were queued for.
#[derive(Debug)]
#[non_exhaustive]
pub struct UnsentDescriptors {
    /// The message they belong to exactly, as a range of the unsent bytes;
    /// `None` for those that were to travel with any byte.
    pub message: Option<std::ops::Range<usize>>,
    /// The descriptors, in order. None for a message that has left in part,
    /// and its descriptors with it: no other may travel with what remains.
    pub descriptors: Vec<PassedDescriptor>,
}

impl UnsentDescriptors {
    /// Descriptors that belong to a range of the unsent bytes, or to none.
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

impl DescriptorQueue {
    /// How many descriptors wait.
    pub(crate) fn len(&self) -> usize {
        self.count
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Queues a descriptor for any byte.
    pub(crate) fn push(&mut self, descriptor: PassedDescriptor) {
        self.items.push_back(Item::Floating(descriptor));
        self.count += 1;
        self.trailing += 1;
    }

    /// Whether an exact group may begin behind `written` bytes of which `sent`
    /// have left: every floating descriptor must have a byte before it.
    pub(crate) fn is_settled(&self, sent: u64, written: u64) -> bool {
        let from = sent.max(self.exact_end).max(self.not_before);
        self.trailing as u64 <= written.saturating_sub(from)
    }

    /// Queues a group for the bytes from `start` to `end`, which are written
    /// with it.
    pub(crate) fn push_exact(&mut self, start: u64, end: u64, descriptors: Vec<PassedDescriptor>) {
        debug_assert!(start < end && !descriptors.is_empty());
        self.count += descriptors.len();
        self.trailing = 0;
        self.exact_end = end;
        self.items.push_back(Item::Exact(Exact {
            start,
            end,
            descriptors,
        }));
    }

    /// What the next call takes of the `unsent` bytes (at least one) behind
    /// position `sent`, with at most `per_message` floating descriptors.
    pub(crate) fn plan(&self, sent: u64, unsent: usize, per_message: usize) -> Plan {
        let until = |position: u64| {
            let bytes = position.saturating_sub(sent);
            unsent.min(usize::try_from(bytes).unwrap_or(usize::MAX))
        };
        match self.items.front() {
            None => Plan {
                bytes: unsent,
                descriptors: 0,
            },
            Some(Item::Exact(exact)) if sent < exact.start => Plan {
                bytes: until(exact.start),
                descriptors: 0,
            },
            // To the end of the message and no further: the receiver's kernel
            // then ends a read there.
            Some(Item::Exact(exact)) => Plan {
                bytes: until(exact.end),
                descriptors: exact.descriptors.len(),
            },
            Some(Item::Floating(_)) if sent < self.not_before => Plan {
                bytes: until(self.not_before),
                descriptors: 0,
            },
            Some(Item::Floating(_)) => {
                let mut run = 0;
                let mut boundary = u64::MAX;
                for item in &self.items {
                    match item {
                        // One more than fits tells that there are more. An
                        // exact group behind those need not be looked for:
                        // it was queued behind a byte for each of them.
                        Item::Floating(_) if run <= per_message => run += 1,
                        Item::Floating(_) => break,
                        Item::Exact(exact) => {
                            boundary = exact.start;
                            break;
                        }
                    }
                }
                let available = until(boundary);
                let descriptors = run.min(per_message).min(available);
                Plan {
                    // Each of those left behind keeps its byte.
                    bytes: if run > descriptors {
                        descriptors
                    } else {
                        available
                    },
                    descriptors,
                }
            }
        }
    }

    /// The first `count` descriptors, as [`plan`](Self::plan) counted them.
    pub(crate) fn first(&self, count: usize) -> impl Iterator<Item = &PassedDescriptor> {
        self.items
            .iter()
            .flat_map(|item| match item {
                Item::Floating(descriptor) => std::slice::from_ref(descriptor),
                Item::Exact(exact) => exact.descriptors.as_slice(),
            })
            .take(count)
    }

    /// Closes the first `count` descriptors, which have left.
    pub(crate) fn sent(&mut self, count: usize) {
        let mut left = count;
        while left > 0 {
            match self.items.pop_front() {
                Some(Item::Floating(_)) => {
                    left -= 1;
                    // Those behind an exact group are the only ones left once
                    // no group is.
                    self.trailing = self.trailing.min(self.items.len());
                }
                Some(Item::Exact(exact)) => {
                    debug_assert!(exact.descriptors.len() <= left, "a group leaves as a whole");
                    left = left.saturating_sub(exact.descriptors.len());
                    self.not_before = exact.end;
                }
                None => break,
            }
        }
        self.count -= count - left;
        if self.items.is_empty() && self.items.capacity() > 2 * MOST_KEPT {
            self.items = VecDeque::new();
        }
    }

    /// Closes everything and answers how many there were.
    pub(crate) fn clear(&mut self) -> usize {
        self.items.clear();
        self.trailing = 0;
        std::mem::take(&mut self.count)
    }

    /// Takes everything; positions become offsets into the bytes behind `sent`.
    pub(crate) fn take(&mut self, sent: u64) -> Vec<UnsentDescriptors> {
        let mut all: Vec<UnsentDescriptors> = Vec::new();
        let offset = |position: u64| usize::try_from(position - sent).unwrap_or(usize::MAX);
        if self.not_before > sent {
            all.push(UnsentDescriptors::new(
                Some(0..offset(self.not_before)),
                Vec::new(),
            ));
        }
        for item in self.items.drain(..) {
            match item {
                Item::Floating(descriptor) => match all.last_mut() {
                    Some(last) if last.message.is_none() => last.descriptors.push(descriptor),
                    _ => all.push(UnsentDescriptors {
                        message: None,
                        descriptors: vec![descriptor],
                    }),
                },
                Item::Exact(exact) => all.push(UnsentDescriptors {
                    message: Some(offset(exact.start)..offset(exact.end)),
                    descriptors: exact.descriptors,
                }),
            }
        }
        self.clear();
        all
    }

    /// Queues what [`take`](Self::take) took, for the bytes behind `sent`.
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
