//! A slot that is named and not filled yet.

use std::fmt;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::BorrowedFd;

use super::{Reactor, State};
use crate::descriptor::{Descriptor, Interest};
use crate::token::Token;

/// A slot of the reactor for a descriptor that is being built;
/// [`Reactor::vacancy`] gives it out.
///
/// [`install`](Self::install) fills it. Dropping it gives the slot up, so a caller that
/// has to back out just returns. A source that was [watched](Self::watch) by then is
/// still the caller's to [unwatch](Reactor::unwatch).
pub struct Vacancy<'a> {
    pub(super) reactor: &'a mut Reactor,
    pub(super) token: Token,
}

impl Vacancy<'_> {
    /// The name that the descriptor is going to have.
    pub fn token(&self) -> Token {
        self.token
    }

    /// The reactor that the slot belongs to.
    pub fn reactor(&mut self) -> &mut Reactor {
        self.reactor
    }

    /// Reports readiness of `source` to the descriptor from now on, as
    /// [`Reactor::watch`]. A descriptor may have several sources, or none.
    ///
    /// # Errors
    ///
    /// Those of epoll_ctl(2).
    pub fn watch(&mut self, source: BorrowedFd<'_>, interest: Interest) -> io::Result<()> {
        self.reactor.watch(self.token, source, interest)
    }

    /// Fills the slot.
    pub fn install(self, entry: Box<dyn Descriptor>) -> Token {
        // What is filled is not given up.
        let mut this = ManuallyDrop::new(self);
        let token = this.token;
        if let Some(stray) = this.reactor.slots.put(token, entry) {
            this.reactor.adopt_stray(stray);
        }
        if this.reactor.state == State::Stopping {
            this.reactor.drain_latecomer(token);
        }
        token
    }
}

impl Drop for Vacancy<'_> {
    fn drop(&mut self) {
        let entry = self.reactor.slots.release(self.token);
        debug_assert!(entry.is_none(), "nobody else fills it");
    }
}

impl fmt::Debug for Vacancy<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Vacancy").field(&self.token).finish()
    }
}
