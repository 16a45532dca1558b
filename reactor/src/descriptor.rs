//! What the loop drives.

use std::any::Any;
use std::borrow::Cow;
use std::fmt;
use std::ops::{BitOr, BitOrAssign};
use std::os::fd::BorrowedFd;

use crate::delayed_call::DelayedCall;
use crate::panic::Panic;
use crate::reactor::{DrainRound, Reactor};

/// Something the reactor watches and calls: a socket with its protocol, a
/// listener, an `eventfd`, a pipe.
///
/// The reactor owns it from [`Vacancy::install`](crate::Vacancy::install) on and takes it out of its
/// slot while one of its methods runs, so a method can do anything to the
/// reactor; only its own handle answers `None` meanwhile. Every method returns
/// what it wants next.
///
/// Readiness is edge-triggered: an event is reported once. A descriptor
/// remembers it (a latch) until a call answered `WouldBlock`, whatever it is
/// interested in at the time. One that stops early to let others have their
/// turn returns [`Next::Again`].
///
/// # Panics
///
/// A panic in any method costs only this descriptor: see
/// [`panicked`](Self::panicked).
pub trait Descriptor: 'static {
    /// The kernel reported readiness, or the descriptor asked for another turn
    /// with [`Next::Again`] (then `readiness` may be empty). Called at most once
    /// per turn.
    fn ready(&mut self, reactor: &mut Reactor, readiness: Readiness) -> Next;

    /// Somebody had access to this descriptor through a [`Handle`] or asked for
    /// its attention ([`Reactor::notify`]); called later in the same turn, once
    /// however often that was.
    ///
    /// [`Handle`]: crate::Handle
    fn attend(&mut self, reactor: &mut Reactor) -> Next {
        let _ = reactor;
        Next::Keep
    }

    /// A delayed call made with [`Reactor::notify_later`] is due.
    fn timer_fired(&mut self, reactor: &mut Reactor, call: DelayedCall) -> Next {
        let _ = (reactor, call);
        Next::Keep
    }

    /// Serves a request whose type the descriptor and its sender agree on; see
    /// [`Reactor::enter`]. Unknown types are left alone.
    fn request(&mut self, reactor: &mut Reactor, request: &mut dyn Any) -> Next {
        let _ = (reactor, request);
        Next::Keep
    }

    /// One of this descriptor's methods panicked, this one included: it is called
    /// again then, a few times, before the descriptor is dropped without. By
    /// default the descriptor is removed; the panic has been logged.
    fn panicked(&mut self, reactor: &mut Reactor, panic: Panic) -> Next {
        let _ = (reactor, panic);
        Next::Remove
    }

    /// The reactor [stops gracefully](Reactor::stop_gracefully), and has come to
    /// this round: what the descriptor has in work is to be finished now, if that
    /// is its round or was an earlier one.
    ///
    /// Called once in each round; for a descriptor that is installed meanwhile in
    /// the present and later ones only. The round, and with it the stop, waits for
    /// those that ask for it ([`Reactor::await_end`]), until they are removed. By
    /// default nothing happens, and nothing is waited for.
    fn drain(&mut self, reactor: &mut Reactor, round: DrainRound) -> Next {
        let _ = (reactor, round);
        Next::Keep
    }

    /// The reactor stops, or somebody has the descriptor
    /// [removed](Reactor::remove). Called once; it is removed afterwards.
    fn shutdown(&mut self, reactor: &mut Reactor) {
        let _ = reactor;
    }

    /// This process was forked, and goes on with the descriptor
    /// ([`Reactor::after_fork`]): another process has its file too. What
    /// [`source`](Self::source) answers is watched again afterwards, and then there is an
    /// [`attend`](Self::attend); further sources are to be watched anew by that.
    fn forked(&mut self) {}

    /// What the poller watches, while there is something to watch: without it
    /// there is nothing to [register](Reactor::register).
    ///
    /// The reactor asks when the descriptor is removed, to deregister it: one
    /// that closes its file earlier calls [`Reactor::unwatch`] before and
    /// answers `None` from then on. Closing without deregistering would leave
    /// the registration alive for as long as any process holds the open file
    /// (epoll(7), question 6).
    fn source(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// The part that handles give access to; see [`Handle`](crate::Handle).
    fn facet(&mut self) -> &mut dyn Any;

    /// What log lines about this descriptor start with.
    fn log_prefix(&self) -> Cow<'_, str> {
        Cow::Borrowed("descriptor")
    }
}

/// What becomes of a descriptor after its callback.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Next {
    /// Stay registered and wait for the next event.
    Keep,
    /// Stay registered and be called again in the next turn: there is work
    /// left that no event will announce.
    Again,
    /// Be deregistered and dropped.
    Remove,
}

/// What the poller is asked to report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interest {
    /// Reading, urgent data, and the peer's closing.
    Readable,
    /// Writing only.
    Writable,
    /// Both.
    Both,
}

impl Interest {
    /// With urgent data: a read stops where it was sent, so that a descriptor
    /// that takes a short read for the last has to know.
    const READABLE: mio::Interest = mio::Interest::READABLE.add(mio::Interest::PRIORITY);

    pub(crate) fn and(self, other: Self) -> Self {
        if self == other { self } else { Self::Both }
    }

    pub(crate) fn to_mio(self) -> mio::Interest {
        match self {
            Self::Readable => Self::READABLE,
            Self::Writable => mio::Interest::WRITABLE,
            Self::Both => Self::READABLE.add(mio::Interest::WRITABLE),
        }
    }
}

/// What the kernel reported: a set of flags.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct Readiness(u8);

impl Readiness {
    /// Nothing: the descriptor asked for the call itself.
    pub const EMPTY: Self = Self(0);
    /// A read may succeed.
    pub const READABLE: Self = Self(1);
    /// A write may succeed.
    pub const WRITABLE: Self = Self(1 << 1);
    /// The peer will send nothing more (`EPOLLRDHUP`, or `EPOLLHUP`). Bytes
    /// sent before may still wait to be read.
    pub const READ_CLOSED: Self = Self(1 << 2);
    /// Nothing more can be written (`EPOLLHUP`, or `EPOLLOUT | EPOLLERR`).
    pub const WRITE_CLOSED: Self = Self(1 << 3);
    /// An error waits to be fetched (`EPOLLERR`).
    pub const ERROR: Self = Self(1 << 4);
    /// The peer sent urgent data (`EPOLLPRI`), where reads stop however much
    /// there is behind it.
    pub const PRIORITY: Self = Self(1 << 5);

    /// Whether any of the flags of `other` is set.
    pub fn intersects(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }

    /// Whether no flag is set.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    #[inline(always)]
    pub(crate) fn from_mio(event: &mio::event::Event) -> Self {
        // What most events say, with fewer questions.
        let is_more = event.is_writable()
            || event.is_read_closed()
            || event.is_write_closed()
            || event.is_error()
            || event.is_priority();
        if !is_more && event.is_readable() {
            return Self::READABLE;
        }
        Self::all_from_mio(event)
    }

    #[inline(never)]
    fn all_from_mio(event: &mio::event::Event) -> Self {
        let flag = |is_set: bool, flag: Self| if is_set { flag } else { Self::EMPTY };
        flag(event.is_readable(), Self::READABLE)
            | flag(event.is_writable(), Self::WRITABLE)
            | flag(event.is_read_closed(), Self::READ_CLOSED)
            | flag(event.is_write_closed(), Self::WRITE_CLOSED)
            | flag(event.is_error(), Self::ERROR)
            | flag(event.is_priority(), Self::PRIORITY)
    }
}

impl BitOr for Readiness {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl BitOrAssign for Readiness {
    fn bitor_assign(&mut self, other: Self) {
        self.0 |= other.0;
    }
}

impl fmt::Debug for Readiness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = [
            (Self::READABLE, "readable"),
            (Self::WRITABLE, "writable"),
            (Self::READ_CLOSED, "read closed"),
            (Self::WRITE_CLOSED, "write closed"),
            (Self::ERROR, "error"),
            (Self::PRIORITY, "priority"),
        ];
        f.debug_set()
            .entries(
                names
                    .iter()
                    .filter(|(flag, _)| self.intersects(*flag))
                    .map(|(_, name)| name),
            )
            .finish()
    }
}
