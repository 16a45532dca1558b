//! What a listener accepts from: a socket of the kernel, or of a simulated one.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use bowline_reactor::{Interest, Reactor, Token};

use super::close_unserved;
use crate::shared::Numbers;
use crate::sys::{self, SocketName};
#[cfg(feature = "testing")]
use crate::testing::MemoryListener;

/// A listening socket.
pub(crate) enum ListeningSocket {
    Real(OwnedFd),
    #[cfg(feature = "testing")]
    Simulated(MemoryListener),
}

impl ListeningSocket {
    pub(super) fn name(&self) -> io::Result<SocketName> {
        match self {
            Self::Real(fd) => sys::local_name(fd.as_fd()),
            #[cfg(feature = "testing")]
            Self::Simulated(listener) => Ok(SocketName::UnixAbstract(listener.name().into_bytes())),
        }
    }

    /// Whether descriptors may come from those who connect.
    pub(super) fn passes_rights(&self) -> bool {
        match self {
            Self::Real(fd) => sys::passes_rights(fd.as_fd()),
            #[cfg(feature = "testing")]
            Self::Simulated(_) => true,
        }
    }

    /// Keeps it from blocking, whatever others who hold it have done.
    pub(super) fn set_nonblocking(&self) -> io::Result<()> {
        match self {
            Self::Real(fd) => sys::set_nonblocking(fd.as_fd()),
            #[cfg(feature = "testing")]
            Self::Simulated(_) => Ok(()),
        }
    }

    /// Whether there is a number for another connection.
    pub(super) fn has_room(&self, numbers: &Numbers) -> bool {
        match self {
            Self::Real(fd) => numbers.has_room(fd.as_fd()),
            #[cfg(feature = "testing")]
            Self::Simulated(_) => true,
        }
    }

    /// Takes the first connection that waits. One that is shared may block, and is
    /// asked first.
    #[inline]
    pub(super) fn accept(&self, is_shared: bool) -> io::Result<(OwnedFd, SocketName)> {
        match self {
            Self::Real(fd) if is_shared => sys::accept_shared(fd.as_fd()),
            Self::Real(fd) => sys::accept(fd.as_fd()),
            #[cfg(feature = "testing")]
            Self::Simulated(listener) => Ok((listener.accept()?, SocketName::UnixUnnamed)),
        }
    }

    pub(super) fn watch(&self, reactor: &mut Reactor, token: Token) -> io::Result<()> {
        match self {
            Self::Real(fd) => reactor.watch(token, fd.as_fd(), Interest::Readable),
            #[cfg(feature = "testing")]
            Self::Simulated(listener) => listener.watch(reactor, token),
        }
    }

    pub(super) fn unwatch(&self, reactor: &mut Reactor) {
        match self {
            Self::Real(fd) => reactor.unwatch(fd.as_fd()),
            #[cfg(feature = "testing")]
            Self::Simulated(listener) => listener.unwatch(),
        }
    }

    /// What the reactor watches.
    pub(super) fn source(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Real(fd) => Some(fd.as_fd()),
            #[cfg(feature = "testing")]
            Self::Simulated(_) => None,
        }
    }

    pub(super) fn duplicate(&self) -> io::Result<OwnedFd> {
        match self {
            Self::Real(fd) => fd.try_clone(),
            #[cfg(feature = "testing")]
            Self::Simulated(listener) => listener.duplicate(),
        }
    }

    /// The descriptor itself, to be used elsewhere.
    pub(super) fn into_descriptor(self) -> OwnedFd {
        match self {
            Self::Real(fd) => fd,
            #[cfg(feature = "testing")]
            Self::Simulated(listener) => listener
                .into_descriptor()
                .expect("two descriptors are left for a listener that is detached"),
        }
    }

    /// Closes it, and with it whoever waits to be accepted.
    pub(super) fn close(self) {
        match self {
            Self::Real(fd) => {
                let has_clients = sys::has_waiting(fd.as_fd()).unwrap_or(true);
                close_unserved(fd, has_clients);
            }
            #[cfg(feature = "testing")]
            Self::Simulated(listener) => drop(listener),
        }
    }
}
