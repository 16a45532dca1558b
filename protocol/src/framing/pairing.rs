//! Which descriptors belong to which frame.

use std::collections::VecDeque;
use std::fmt;
use std::os::fd::OwnedFd;
use std::time::Instant;

/// The rule that says which received descriptors belong to which frame; see
/// [the table](crate::framing#which-descriptors-belong-to-a-frame).
///
/// It is a setting of [`Framed`](crate::framing::Framed::pairing). Any callback can
/// change it ([`Framing::set_pairing`](crate::framing::Framing::set_pairing)). The new
/// rule holds from the next frame on, also for bytes that have arrived already.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Pairing {
    /// They belong to no frame. The receiver is told of each as it arrives, before the
    /// frames that end in the same read.
    ///
    /// A change from this rule to another comes too late for descriptors of the present
    /// read. A protocol that uses another rule later should begin with that rule, even
    /// if no descriptors come at first.
    #[default]
    Loose,
    /// A frame has those that the peer sent with the frame's own bytes. They may be
    /// attached to any of them.
    ///
    /// No read goes further than the framer knows that the present frame goes. For that
    /// it takes over [`Transport::set_read_limit`](crate::Transport::set_read_limit).
    /// Each frame costs two reads or more: a length-prefixed one takes two, a netstring
    /// about as many as its length has digits, a line about half as many as it has bytes.
    /// For lines take another rule.
    Exact,
    /// A frame says how many it takes of those that have arrived. The oldest are taken
    /// first.
    ///
    /// Either the framer reads the number from the frame
    /// ([`Framer::claims`](crate::framing::Framer::claims)), or the receiver takes
    /// descriptors while it looks at the frame
    /// ([`Framing::descriptors`](crate::framing::Framing::descriptors)). Reads are not
    /// limited.
    Claimed(Unclaimed),
    /// A frame has those that came with a read whose last byte is one of the frame's.
    ///
    /// The kernel ends a read behind the message that brought descriptors. So they belong
    /// to the frame in which the read ends, whatever was glued in front. Reads are not
    /// limited. If the peer sends several frames in one call, the last of them gets all.
    ByLastByte,
}

impl Pairing {
    /// One word for it, in lower case.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Loose => "loose",
            Self::Exact => "exact",
            Self::Claimed(_) => "claimed",
            Self::ByLastByte => "by_last_byte",
        }
    }
}

/// What happens to descriptors that the frames of their read have not claimed; see
/// [`Pairing::Claimed`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Unclaimed {
    /// They wait for a later frame, within bounds of
    /// [number](crate::framing::Framed::max_waiting) and
    /// [age](crate::framing::Framed::descriptor_deadline). For peers that send them
    /// ahead.
    Wait,
    /// They are closed and counted, and logged once per connection. One too many does not
    /// shift the ones that follow.
    Close,
    /// This counts as broken framing.
    Fail,
}

/// The descriptors of the frame that is being delivered, in the order they were
/// sent: an iterator of [`OwnedFd`].
///
/// A descriptor that is taken belongs to the taker. It is close-on-exec. Descriptors that
/// are left when the callback returns are closed, logged and counted. But if it is the
/// receiver that says what a frame [claims](Pairing::Claimed), they stay for the next
/// frame.
pub struct FrameDescriptors<'a>(pub(super) &'a mut Arrivals);

impl FrameDescriptors<'_> {
    /// Whether the next descriptor, or one that came with it, was lost on the way to us.
    /// Then there is none to take.
    pub fn is_truncated(&self) -> bool {
        self.0.offered > 0 && matches!(self.0.queue.front(), Some(Arrival { fd: None, .. }))
    }
}

impl Iterator for FrameDescriptors<'_> {
    type Item = OwnedFd;

    fn next(&mut self) -> Option<OwnedFd> {
        let arrivals = &mut *self.0;
        if arrivals.offered == 0 {
            return None;
        }
        let fd = arrivals.queue.front_mut()?.fd.take()?;
        arrivals.queue.pop_front();
        if arrivals.offered as usize != Arrivals::ANY {
            arrivals.offered -= 1;
        }
        Some(fd)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let count = self.0.available(self.0.offered as usize);
        (count, Some(count))
    }
}

impl ExactSizeIterator for FrameDescriptors<'_> {}

impl fmt::Debug for FrameDescriptors<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let offered = self.0.queue.iter().take(self.len());
        f.debug_list().entries(offered.map(|it| &it.fd)).finish()
    }
}

/// What has arrived beside the bytes and belongs to no frame that was delivered,
/// in order; pure.
///
/// Positions are counted in bytes from the beginning of the stream.
#[derive(Debug, Default)]
pub(super) struct Arrivals {
    pub(super) pairing: Pairing,
    /// The transport's read limit is ours.
    pub(super) limits_reads: bool,
    queue: VecDeque<Arrival>,
    /// How many bytes were received in all.
    received: u64,
    /// How many at the front are the present frame's; 0 outside of its callback.
    offered: u32,
}

#[derive(Debug)]
struct Arrival {
    /// Nothing where all that came with a read was lost.
    fd: Option<OwnedFd>,
    /// Where the read ended that brought it.
    ///
    /// Invariant: never less than that of who came before.
    upto: u64,
    since: Instant,
}

impl Arrivals {
    /// As [offered](Self::offer): as many as the receiver wants.
    pub(super) const ANY: usize = u32::MAX as usize;

    /// Descriptors have arrived, with the bytes that are noted next.
    pub(super) fn push_all(&mut self, fds: impl IntoIterator<Item = OwnedFd>, since: Instant) {
        let (upto, fds) = (u64::MAX, fds.into_iter());
        // As many as the memory is needed for, which is given back when none waits.
        self.queue.reserve(fds.size_hint().0);
        let arrived = |fd| Arrival {
            fd: Some(fd),
            upto,
            since,
        };
        self.queue.extend(fds.map(arrived));
    }

    /// As [`push_all`](Self::push_all), and they were lost: all of a read.
    pub(super) fn push_lost(&mut self, since: Instant) {
        let (fd, upto) = (None, u64::MAX);
        self.queue.push_back(Arrival { fd, upto, since });
    }

    /// So many bytes were received, those that belong to what was pushed before.
    #[inline]
    pub(super) fn note_received(&mut self, bytes: usize) {
        self.received += bytes as u64;
        if !self.queue.is_empty() {
            let unmarked = self.queue.iter_mut().rev();
            unmarked
                .take_while(|it| it.upto == u64::MAX)
                .for_each(|it| it.upto = self.received);
        }
    }

    /// So many bytes are going to be received anew.
    pub(super) fn unreceive(&mut self, bytes: usize) {
        self.received -= bytes as u64;
    }

    /// The position before the last `left` bytes.
    pub(super) fn position(&self, left: usize) -> u64 {
        self.received - left as u64
    }

    /// How many came with reads that ended at `position` at the latest.
    pub(super) fn due(&self, position: u64) -> usize {
        match self.queue.back() {
            Some(last) if last.upto <= position => self.queue.len(),
            _ => {
                let is_due = |it: &&Arrival| it.upto <= position;
                self.queue.iter().take_while(is_due).count()
            }
        }
    }

    /// Drops at the front what was lost by reads that ended at `position` at the
    /// latest.
    pub(super) fn drop_lost(&mut self, position: u64) {
        let is_over = |it: &mut Arrival| it.fd.is_none() && it.upto <= position;
        while self.queue.pop_front_if(is_over).is_some() {}
    }

    /// How many of the first `count` are there to be taken.
    pub(super) fn available(&self, count: usize) -> usize {
        let first = self.queue.iter().take(count);
        first.take_while(|it| it.fd.is_some()).count()
    }

    /// Lets the receiver take the first `count`.
    pub(super) fn offer(&mut self, count: usize) {
        self.offered = u32::try_from(count).unwrap_or(u32::MAX);
    }

    /// Takes back what the receiver has left of what it was offered; nothing
    /// where it was offered [any](Self::ANY).
    pub(super) fn withdraw(&mut self) -> Vec<OwnedFd> {
        match std::mem::take(&mut self.offered) as usize {
            0 | Self::ANY => Vec::new(),
            left => self.take_first(left),
        }
    }

    /// Takes the first `count`, those that were lost left out.
    pub(super) fn take_first(&mut self, count: usize) -> Vec<OwnedFd> {
        let count = count.min(self.queue.len());
        self.queue.drain(..count).filter_map(|it| it.fd).collect()
    }

    /// Takes all but the present frame's.
    pub(super) fn take_others(&mut self) -> Vec<OwnedFd> {
        let own = match self.offered as usize {
            Self::ANY => 0,
            own => own,
        };
        let others = self.queue.split_off(own.min(self.queue.len()));
        others.into_iter().filter_map(|it| it.fd).collect()
    }

    /// Takes all.
    pub(super) fn take_all(&mut self) -> Vec<OwnedFd> {
        self.offered = 0;
        self.take_first(usize::MAX)
    }

    /// Gives the memory back when nothing waits.
    pub(super) fn shrink(&mut self) {
        if self.queue.is_empty() && self.queue.capacity() > 0 {
            self.queue = VecDeque::new();
        }
    }

    /// Whether a frame can own any, or say that it does.
    #[inline]
    pub(super) fn may_own(&self) -> bool {
        !self.queue.is_empty() || matches!(self.pairing, Pairing::Claimed(_))
    }

    #[inline]
    pub(super) fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    pub(super) fn len(&self) -> usize {
        self.queue.len()
    }

    /// When the oldest arrived.
    pub(super) fn since(&self) -> Option<Instant> {
        self.queue.front().map(|it| it.since)
    }

    /// All count as if they had arrived now.
    pub(super) fn restart(&mut self, now: Instant) {
        self.queue.iter_mut().for_each(|it| it.since = now);
    }
}
