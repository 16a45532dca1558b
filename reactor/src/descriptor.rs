//! What the loop drives.

use std::any::Any;
use std::borrow::Cow;
use std::fmt;
use std::ops::{BitOr, BitOrAssign};
use std::os::fd::BorrowedFd;

use crate::delayed_call::DelayedCall;
use crate::description::Description;
use crate::panic::Panic;
use crate::reactor::{DrainRound, Reactor};

/// Something the reactor watches and calls: a socket with its protocol, a
/// listener, an `eventfd`, a pipe.
///
/// The reactor owns it from [`Vacancy::install`](crate::Vacancy::install) on. While
/// one of its methods runs, the descriptor is out of its slot. So a method can do
/// anything to the reactor; only the descriptor's own handle answers `None`
/// meanwhile. Every method returns what it wants next.
///
/// Readiness is edge-triggered: an event is reported once. A descriptor has to
/// remember it (a latch) until a call answers `WouldBlock`, whatever it is
/// interested in at the time. One that stops early to let others have their
/// turn returns [`Next::Again`].
///
/// # Panics
///
/// A panic in any method costs only this descriptor: see
/// [`panicked`](Self::panicked).
pub trait Descriptor: 'static {
    /// The kernel reported readiness, or the descriptor asked for another turn
    /// with [`Next::Again`]; `readiness` may be empty then. Called at most once
    /// per turn.
    fn ready(&mut self, reactor: &mut Reactor, readiness: Readiness) -> Next;

    /// Somebody reached this descriptor through a [`Handle`], or asked for its
    /// attention ([`Reactor::notify`]). Called later in the same turn, and once
    /// however often that happened.
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

    /// Serves a request. The descriptor and the sender agree on its type; see
    /// [`Reactor::enter`]. A request of an unknown type is left alone.
    fn request(&mut self, reactor: &mut Reactor, request: &mut dyn Any) -> Next {
        let _ = (reactor, request);
        Next::Keep
    }

    /// One of this descriptor's methods panicked. The panic has been logged. By
    /// default the descriptor is removed.
    ///
    /// If this method panics too, it is called again with the new panic. After a
    /// few times the descriptor is dropped without being told.
    fn panicked(&mut self, reactor: &mut Reactor, panic: Panic) -> Next {
        let _ = (reactor, panic);
        Next::Remove
    }

    /// The reactor [stops gracefully](Reactor::stop_gracefully), and has come to
    /// this round. A descriptor whose round this is, or was before, finishes its
    /// work now.
    ///
    /// Called once in each round. A descriptor that is installed meanwhile is told
    /// of the present round and of the later ones. A descriptor that needs time asks
    /// for it ([`Reactor::await_end`]): the round, and with it the stop, then waits
    /// until it is removed. By default nothing happens, and nothing is waited for.
    fn drain(&mut self, reactor: &mut Reactor, round: DrainRound) -> Next {
        let _ = (reactor, round);
        Next::Keep
    }

    /// The reactor stops, or somebody [removes](Reactor::remove) the descriptor.
    /// Called once; the descriptor is removed afterwards.
    fn shutdown(&mut self, reactor: &mut Reactor) {
        let _ = reactor;
    }

    /// This process was forked, and goes on with the descriptor
    /// ([`Reactor::after_fork`]). From now on another process has its file too.
    ///
    /// Afterwards the reactor watches [`source`](Self::source) and
    /// [`writing_source`](Self::writing_source) again and calls
    /// [`attend`](Self::attend). A descriptor with more sources watches those again there.
    fn forked(&mut self) {}

    /// What the poller watches. [`Reactor::register`] needs it.
    ///
    /// The reactor asks for it when the descriptor is removed, to deregister it. A
    /// descriptor that closes its file earlier calls [`Reactor::unwatch`] first, and
    /// answers `None` from then on. A file that is closed without that stays
    /// registered for as long as any process has it open (epoll(7), question 6).
    fn source(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// What the poller watches for writing only, beside [`source`](Self::source), which it
    /// watches for reading then. Asked where the reactor has to watch anew what it has
    /// watched: after a fork, and when it had been replaced in a callback. By default there
    /// is none.
    fn writing_source(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// The part that handles reach; see [`Handle`](crate::Handle).
    fn facet(&mut self) -> &mut dyn Any;

    /// What this descriptor says of itself to who [looks into](Reactor::descriptors) the
    /// reactor: one part for it, and one for each that stands around or inside of it. By
    /// default that is a part without facts, by the name of the log's lines.
    fn describe(&self, description: &mut Description) {
        description.section(self.log_prefix().into_owned());
    }

    /// What log lines about this descriptor start with.
    fn log_prefix(&self) -> Cow<'_, str> {
        Cow::Borrowed("descriptor")
    }
}

/// What the reactor does with a descriptor after its callback.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Next {
    /// Keep it registered. It waits for the next event.
    Keep,
    /// Keep it registered and call it again in the next turn. It has work left
    /// that no event will announce.
    Again,
    /// Deregister and drop it.
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
    /// With urgent data: reads stop where it was sent. A descriptor that takes a
    /// short read for the last one has to know.
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
    /// Nothing. The descriptor asked for the call itself.
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
