//! The state of a connection as bits in one word, so that most questions about it are
//! one comparison.

use std::ops::BitOr;

/// A set of bits of a [`Link`](super::Link).
///
/// All 32 are taken: by what is latched and set, by notices, by what follows from the
/// state. What is asked less often than for every message belongs into `Cold`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Flags(u32);

impl Flags {
    /// Latched readiness. Set by events, cleared by `WouldBlock` and by short reads.
    /// Interest does not change it.
    pub(crate) const READABLE: Self = Self(1);
    /// Latched like `READABLE`. A new socket counts as writable.
    pub(crate) const WRITABLE: Self = Self(1 << 1);
    /// A short read no longer means that the socket is drained. The peer has said that
    /// nothing more comes, or has sent urgent data once.
    pub(crate) const READ_ON: Self = Self(1 << 2);
    /// Interest: reading is paused.
    pub(crate) const PAUSED: Self = Self(1 << 3);
    /// The peer's end was read.
    pub(crate) const READ_ENDED: Self = Self(1 << 4);
    /// Somebody waits for bytes to leave: a producer, or `Cold::awaited`.
    pub(crate) const FOLLOWED: Self = Self(1 << 5);
    /// The poller reports writability too.
    pub(crate) const WATCHES_WRITING: Self = Self(1 << 6);
    /// The kernel refused to send for now, and no event will come. A timer tries again.
    pub(crate) const WAITS_FOR_TIMER: Self = Self(1 << 7);
    /// Others hold the socket too. No option that would hurt them may be set on the way
    /// out.
    pub(crate) const SHARED: Self = Self(1 << 8);
    /// There may be a step to take, or a timer to set, once nothing else is to be done.
    pub(crate) const UNSETTLED: Self = Self(1 << 9);
    /// Interest: reading is held as often as `Cold::holds` says.
    pub(crate) const HELD: Self = Self(1 << 10);
    /// `Cold::pushed_back` has bytes that are delivered before anything is read.
    pub(crate) const PUSHED_BACK: Self = Self(1 << 11);
    /// The kernel refuses descriptors from the peer. Some that it took before may still
    /// wait to be read.
    pub(crate) const REFUSES_DESCRIPTORS: Self = Self(1 << 12);
    /// Nothing but bytes can come, and nothing else waits to be read. Never without
    /// `REFUSES_DESCRIPTORS`.
    pub(crate) const PLAIN_READS: Self = Self(1 << 13);
    /// The socket is not registered with the poller yet, and counts as readable. It is
    /// registered once a read would block, or before a wait for anything else. So a
    /// peer that sends and closes at once is served without being registered.
    pub(crate) const UNWATCHED: Self = Self(1 << 14);
    /// A layer has bytes of its own to send.
    pub(crate) const UNFLUSHED: Self = Self(1 << 15);
    /// The poller reported an error. A read may return it, or may return nothing.
    pub(crate) const FAILED: Self = Self(1 << 16);
    /// The poller reported the peer's end, and no error with it.
    pub(crate) const END_ARRIVED: Self = Self(1 << 17);

    // Notices for user code, in the order of delivery.

    pub(crate) const CONNECTION_MADE: Self = Self(1 << 18);
    pub(crate) const STOP_REJECTED: Self = Self(1 << 19);
    pub(crate) const PAUSE_PRODUCER: Self = Self(1 << 20);
    pub(crate) const RESUME_PRODUCER: Self = Self(1 << 21);
    /// Descriptors have left, or awaited bytes.
    pub(crate) const LEFT: Self = Self(1 << 22);
    pub(crate) const WRITE_CLOSED: Self = Self(1 << 23);
    pub(crate) const READING_RESUMED: Self = Self(1 << 24);
    pub(crate) const REATTACHED: Self = Self(1 << 25);
    pub(crate) const END: Self = Self(1 << 26);
    pub(crate) const DRAINING: Self = Self(1 << 27);
    /// All notices.
    pub(crate) const PENDING: Self = Self(0x3ff << 18);

    // Bits that follow from the state. Only the link sets them, together with the
    // state, so that each question on the way of every message is one comparison.

    /// Nothing more may be delivered.
    pub(super) const NOT_READING: Self = Self(1 << 28);
    /// Nothing more may be sent: the connection is over.
    pub(super) const NOT_WRITING: Self = Self(1 << 29);
    /// A write has to check more than whether the connection is open.
    pub(super) const WRITES_WITH_CARE: Self = Self(1 << 30);
    /// A layer has yet to say that the connection is made.
    pub(super) const UNESTABLISHED: Self = Self(1 << 31);

    pub(crate) const NONE: Self = Self(0);

    /// Whether the two have a bit in common.
    #[inline(always)]
    pub(crate) const fn intersects(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }

    /// Returns the bits that are in `mask` too, as a number.
    #[inline(always)]
    pub(super) const fn bits(self, mask: Self) -> u32 {
        self.0 & mask.0
    }

    /// The bits that are in `mask` too.
    #[inline(always)]
    pub(crate) const fn of(self, mask: Self) -> Self {
        Self(self.0 & mask.0)
    }

    #[inline(always)]
    pub(crate) const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    #[inline(always)]
    pub(crate) const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// The lowest bit, which is the first notice.
    #[inline]
    pub(crate) const fn first(self) -> Self {
        Self(self.0 & self.0.wrapping_neg())
    }
}

impl BitOr for Flags {
    type Output = Self;

    #[inline(always)]
    fn bitor(self, other: Self) -> Self {
        self.with(other)
    }
}
