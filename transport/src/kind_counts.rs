//! What connections of each kind have done, with the feature `inspect`.

use std::cell::RefCell;

use crate::link::Link;

/// What the connections of one kind have done. See
/// [`Transports::kind_counts`](crate::Transports::kind_counts).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct KindCounts {
    /// The kind: `tcp`, `unix`, `pipe`, or what a kind of a program's own calls itself.
    pub kind: &'static str,
    /// Connections that were made, adopted or put together again.
    pub made: u64,
    /// Those of them that have ended or were taken apart.
    pub ended: u64,
    /// Bytes that the ended ones had sent. Add, with [`u64::wrapping_add`], what those that
    /// are open say of themselves, to have the bytes of all. (What a connection sent before
    /// it came here is taken off beforehand.)
    pub sent_bytes: u64,
    /// Bytes that were delivered to the protocols of the ended ones, as `sent_bytes`.
    pub received_bytes: u64,
}

impl KindCounts {
    /// How many there are now.
    pub fn open(&self) -> u64 {
        self.made - self.ended
    }
}

#[derive(Debug, Default)]
pub(crate) struct Kinds(RefCell<Vec<KindCounts>>);

impl Kinds {
    /// Of one that was elsewhere before, what it did there does not count.
    pub(crate) fn made(&self, kind: &'static str, link: &Link) {
        self.change(kind, |counts| {
            counts.made += 1;
            counts.sent_bytes = counts.sent_bytes.wrapping_sub(link.sent);
            counts.received_bytes = counts.received_bytes.wrapping_sub(link.received_bytes());
        });
    }

    pub(crate) fn ended(&self, kind: &'static str, link: &Link) {
        self.change(kind, |counts| {
            counts.ended += 1;
            counts.sent_bytes = counts.sent_bytes.wrapping_add(link.sent);
            counts.received_bytes = counts.received_bytes.wrapping_add(link.received_bytes());
        });
    }

    fn change(&self, kind: &'static str, change: impl FnOnce(&mut KindCounts)) {
        let mut all = self.0.borrow_mut();
        if let Some(counts) = all.iter_mut().find(|it| it.kind == kind) {
            return change(counts);
        }
        let mut counts = KindCounts {
            kind,
            made: 0,
            ended: 0,
            sent_bytes: 0,
            received_bytes: 0,
        };
        change(&mut counts);
        all.push(counts);
    }

    pub(crate) fn all(&self) -> Vec<KindCounts> {
        self.0.borrow().clone()
    }
}
