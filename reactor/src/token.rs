//! Names of registered descriptors: slot and generation in one word.

use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

/// How many bits of a token name the slot. 2^24 slots are sixteen times what
/// Linux lets one process open by default (`fs.nr_open` is 2^20).
const INDEX_BITS: u32 = 24;
const INDEX_MASK: u64 = (1 << INDEX_BITS) - 1;
const GENERATION_MASK: u64 = u64::MAX >> INDEX_BITS;

/// The name of a registered descriptor.
///
/// A token is `Copy`, costs nothing to keep, and may outlive its descriptor. It
/// holds the slot's index and a generation that no other registration of the
/// process ever has (it would take 2^40 of them to come round). So a token whose
/// descriptor is gone never reaches a newer descriptor in the same slot. Given to
/// another reactor, it names nothing.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Token(u64);

// mio's token is a `usize`, and both halves have to fit it.
const _: () = assert!(usize::BITS == 64, "bowline needs a 64-bit platform");

impl Token {
    /// The most slots that tokens can tell apart.
    pub(crate) const MAX_SLOTS: usize = 1 << INDEX_BITS;

    /// Two names that no descriptor ever has: generations start at one, and
    /// the index of these is beyond [`Token::MAX_SLOTS`] in practice.
    pub(crate) const WAKER: Self = Self(u64::MAX);
    pub(crate) const TIMER: Self = Self(u64::MAX - 1);

    pub(crate) fn new(index: usize, generation: u64) -> Self {
        debug_assert!(index < Self::MAX_SLOTS);
        Self(generation << INDEX_BITS | index as u64)
    }

    pub(crate) fn index(self) -> usize {
        (self.0 & INDEX_MASK) as usize
    }

    /// Larger for what was registered later.
    pub(crate) fn generation(self) -> u64 {
        self.0 >> INDEX_BITS
    }

    pub(crate) fn to_mio(self) -> mio::Token {
        mio::Token(self.0 as usize)
    }

    pub(crate) fn from_mio(token: mio::Token) -> Self {
        Self(token.0 as u64)
    }

    /// The place in the order of registrations of the whole process: larger for what was
    /// registered later.
    pub fn registration(self) -> u64 {
        self.generation()
    }

    /// The slot that its descriptor is in, which is below 2^24. Slots are taken again, the
    /// lowest free one not always first. So a table beside the reactor's own, with one entry
    /// for each descriptor, can be a vector.
    pub fn slot(self) -> usize {
        self.index()
    }

    /// The token that has this number, which [`to_bits`](Self::to_bits) gave. Any other
    /// number names nothing, or something of another kind.
    pub fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// The token as a number. It is unique in the process, and fit for log lines and
    /// map keys.
    pub fn to_bits(self) -> u64 {
        self.0
    }
}

/// Generations that nobody else in the process has, in ascending order.
///
/// They are drawn from one count in blocks: a registration then costs no atomic
/// operation, and nothing is locked, which a forked child could find locked for
/// ever.
pub(crate) struct Generations {
    block: Range<u64>,
}

/// How many generations a reactor draws at once. What one that is dropped leaves
/// unused is lost.
const BLOCK: u64 = 1024;

static NEXT_BLOCK: AtomicU64 = AtomicU64::new(0);

impl Generations {
    pub(crate) const fn new() -> Self {
        Self { block: 0..0 }
    }

    #[inline]
    pub(crate) fn next(&mut self) -> u64 {
        match self.block.next() {
            Some(generation) => generation,
            None => self.draw(),
        }
    }

    #[cold]
    fn draw(&mut self) -> u64 {
        let first = NEXT_BLOCK.fetch_add(BLOCK, Ordering::Relaxed) & GENERATION_MASK;
        self.block = first..first + BLOCK;
        if first == 0 {
            // No token has it.
            self.block.start = 1;
        }
        let generation = self.block.start;
        self.block.start += 1;
        generation
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// `slot.generation`, as it stands in log lines.
impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.index(), self.generation())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn index_and_generation_survive_the_trip_through_mio() {
        for (index, generation) in [(0, 1), (7, 3), (Token::MAX_SLOTS - 1, (1 << 40) - 2)] {
            let token = Token::from_mio(Token::new(index, generation).to_mio());
            assert_eq!(token, Token::new(index, generation));
            assert_eq!(token.index(), index);
            assert_ne!(token, Token::WAKER);
        }
    }

    #[test]
    fn no_generation_is_given_out_twice() {
        let mut several = [Generations::new(), Generations::new(), Generations::new()];
        let mut last = [0; 3];
        let mut seen = std::collections::HashSet::new();
        for number in 0..10 * BLOCK as usize {
            let which = number % 7 % 3;
            let generation = several[which].next();
            assert!(generation > last[which], "ascending, and never zero");
            assert!(seen.insert(generation), "{generation} twice");
            last[which] = generation;
        }
    }
}
