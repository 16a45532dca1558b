//! What a notifier has registered in its reactor.

use std::borrow::Cow;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::{Rc, Weak};
use std::time::Duration;

use bowline_reactor::{DelayedCall, Description, Descriptor, Next, Reactor, Readiness, Token};

use super::notify::{BUDGET, Inner, Pumped, WhenLeft};
use super::way::Trouble;
use crate::log;

/// How soon to try again to reach the manager: at first, and at most. Nothing reports when
/// it is back.
const AGAIN_FIRST: Duration = Duration::from_millis(20);
const AGAIN_MOST: Duration = Duration::from_secs(2);

/// How often to look up the address again while the manager has no room. Another manager
/// may have it by now, and the one that we wait for may never read again.
const LOOK_ANEW: Duration = Duration::from_secs(1);

/// The reactor's side: it sends what waits.
pub(super) struct Sender {
    inner: Rc<Inner>,
    token: Token,
    /// Whether the reactor reports room.
    is_watched: bool,
    retry: Option<DelayedCall>,
    /// How long to wait before the manager is looked for again.
    wait: Duration,
}

impl Sender {
    pub(super) fn new(inner: Rc<Inner>, token: Token) -> Self {
        Self {
            inner,
            token,
            is_watched: false,
            retry: None,
            wait: AGAIN_FIRST,
        }
    }

    fn work(&mut self, reactor: &mut Reactor) -> Next {
        let pumped = self.inner.pump(BUDGET, Some(reactor.now()));
        self.inner.settle(reactor);
        match pumped {
            Pumped::Enough => Next::Again,
            Pumped::Blocked(trouble) => {
                self.wait_for(reactor, trouble);
                Next::Keep
            }
            Pumped::Everything => {
                self.wait = AGAIN_FIRST;
                self.rest(reactor);
                self.inner.state.borrow_mut().hold = None;
                // Nobody has anything more to say.
                if Rc::strong_count(&self.inner) == 1 {
                    Next::Remove
                } else {
                    Next::Keep
                }
            }
        }
    }

    fn wait_for(&mut self, reactor: &mut Reactor, trouble: Trouble) {
        let wait = if trouble == Trouble::Full {
            if !self.is_watched {
                match self.inner.way.watch(reactor, self.token) {
                    Ok(()) => self.is_watched = true,
                    // The timer looks.
                    Err(error) => {
                        log::debug!(target: log::HANDOFF, "no readiness of the manager: {error}");
                    }
                }
            }
            if self.is_watched {
                LOOK_ANEW
            } else {
                AGAIN_FIRST
            }
        } else {
            self.inner.state.borrow_mut().hold = None;
            let longer = (self.wait * 2).min(AGAIN_MOST);
            std::mem::replace(&mut self.wait, longer)
        };
        if self.retry.is_none() {
            self.retry = Some(reactor.notify_later(wait, self.token));
        }
    }

    fn rest(&mut self, reactor: &mut Reactor) {
        if std::mem::take(&mut self.is_watched) {
            self.inner.way.unwatch(reactor);
        }
        if let Some(retry) = self.retry.take() {
            // It may be what runs.
            let _ = retry.cancel(reactor);
        }
    }
}

impl Descriptor for Sender {
    fn ready(&mut self, reactor: &mut Reactor, _: Readiness) -> Next {
        self.work(reactor)
    }

    fn attend(&mut self, reactor: &mut Reactor) -> Next {
        self.work(reactor)
    }

    fn timer_fired(&mut self, reactor: &mut Reactor, _: DelayedCall) -> Next {
        self.retry = None;
        self.work(reactor)
    }

    fn shutdown(&mut self, reactor: &mut Reactor) {
        let _ = self.work(reactor);
        self.rest(reactor);
        let mut left = std::mem::take(&mut self.inner.state.borrow_mut().watchers);
        for watcher in &mut left {
            watcher.error = Some(io::Error::other("the reactor stops"));
        }
        Inner::tell_all(reactor, left);
    }

    fn source(&self) -> Option<BorrowedFd<'_>> {
        self.is_watched.then(|| self.inner.way.source()).flatten()
    }

    fn facet(&mut self) -> &mut dyn std::any::Any {
        &mut self.is_watched
    }

    fn describe(&self, description: &mut Description) {
        description
            .section("notices to the service manager")
            .set("queued", self.inner.state.borrow().queue.len());
    }

    fn log_prefix(&self) -> Cow<'_, str> {
        Cow::Borrowed("notices to the service manager")
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        // Dropped last, when nothing is borrowed.
        let mut forgotten = Vec::new();
        self.inner.pump(usize::MAX, None);
        let state = &mut *self.inner.state.borrow_mut();
        if state
            .runs_on
            .as_ref()
            .is_some_and(|it| it.token != self.token)
        {
            // A forked child has attached it to another reactor meanwhile.
            return;
        }
        state.runs_on = None;
        state.hold = None;
        // They may own what owns this.
        forgotten.append(&mut state.watchers);
        if !state.queue.is_empty() {
            log::warn!(
                target: log::HANDOFF,
                "the reactor ends, and {} notices to the service manager have not left",
                state.queue.len()
            );
        }
    }
}

/// Waits until the manager has closed the other end of a pipe.
pub(super) struct Barrier {
    inner: Weak<Inner>,
    number: u64,
    read: OwnedFd,
    then: Option<WhenLeft>,
}

impl Barrier {
    pub(super) fn new(inner: &Rc<Inner>, number: u64, read: OwnedFd, then: WhenLeft) -> Self {
        Self {
            inner: Rc::downgrade(inner),
            number,
            read,
            then: Some(then),
        }
    }

    fn finish(&mut self, reactor: &mut Reactor, result: io::Result<()>) -> Next {
        if let Some(then) = self.then.take() {
            then(reactor, result);
        }
        Next::Remove
    }

    /// Whether it will never be sent.
    fn is_lost(&self) -> bool {
        let inner = self.inner.upgrade();
        inner.is_some_and(|inner| inner.state.borrow_mut().lost.remove(&self.number))
    }
}

impl Descriptor for Barrier {
    fn ready(&mut self, reactor: &mut Reactor, readiness: Readiness) -> Next {
        if !readiness.intersects(Readiness::READ_CLOSED | Readiness::ERROR) {
            return Next::Keep;
        }
        // Closed by the manager, or by us with a notice that could not be sent.
        let result = if self.is_lost() {
            Err(io::ErrorKind::NotConnected.into())
        } else {
            Ok(())
        };
        self.finish(reactor, result)
    }

    fn timer_fired(&mut self, reactor: &mut Reactor, _: DelayedCall) -> Next {
        if let Some(inner) = self.inner.upgrade() {
            // Nobody waits for it any more.
            inner.state.borrow_mut().queue.cancel(self.number);
        }
        self.finish(reactor, Err(io::ErrorKind::TimedOut.into()))
    }

    fn source(&self) -> Option<BorrowedFd<'_>> {
        Some(self.read.as_fd())
    }

    fn facet(&mut self) -> &mut dyn std::any::Any {
        &mut self.read
    }

    fn describe(&self, description: &mut Description) {
        description
            .section("barrier of the service manager")
            .set("number", self.number);
    }

    fn log_prefix(&self) -> Cow<'_, str> {
        Cow::Borrowed("barrier of the service manager")
    }
}
