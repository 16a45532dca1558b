//! How many descriptors wait for their frame, and how long.

use std::cell::Cell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use bowline_reactor::Reactor;

use crate::context::Context;
use crate::log;
use crate::policies::Timeout;
use crate::transport::Transport;

pub(super) const PER_FRAME: usize = 16;
/// As many as the daemon of D-Bus lets wait.
pub(super) const WAITING: usize = 64;
pub(super) const DEADLINE: Duration = Duration::from_secs(30);

/// What is allowed of descriptors. Ends the connection when the oldest has waited
/// for too long.
#[derive(Debug)]
pub(super) struct Bounds {
    pub(super) per_frame: usize,
    pub(super) waiting: usize,
    pub(super) deadline: Option<Duration>,
    /// When that arrived whose time is running.
    since: Option<Instant>,
    /// There from the first time on that one waits.
    timeout: Option<Timeout>,
    /// Made with it.
    has_expired: Option<Rc<Cell<bool>>>,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            per_frame: PER_FRAME,
            waiting: WAITING,
            deadline: Some(DEADLINE),
            since: None,
            timeout: None,
            has_expired: None,
        }
    }
}

impl Bounds {
    /// The oldest arrived then, or none waits any more.
    pub(super) fn follow<T: Transport + ?Sized>(
        &mut self,
        cx: &mut Context<'_, T>,
        since: Option<Instant>,
    ) {
        self.since = since;
        if let (Some(since), Some(deadline)) = (since, self.deadline) {
            let passed = cx.reactor.now().saturating_duration_since(since);
            let timeout = self.timeout.get_or_insert_with(|| {
                let has_expired = self.has_expired.insert(Rc::default());
                limit(deadline, Rc::clone(has_expired))
            });
            timeout.set(cx, Some(deadline.saturating_sub(passed)));
        } else if let Some(timeout) = &self.timeout {
            timeout.suspend();
        }
    }

    pub(super) fn reattached<T: Transport + ?Sized>(&self, cx: &mut Context<'_, T>) {
        if let Some(timeout) = &self.timeout {
            timeout.reattached(cx);
        }
    }

    pub(super) fn cancel(&mut self, reactor: &mut Reactor) {
        if let Some(timeout) = &mut self.timeout {
            timeout.cancel(reactor);
        }
    }

    #[inline]
    pub(super) fn since(&self) -> Option<Instant> {
        self.since
    }

    /// The time has passed, and the connection was aborted for it.
    pub(super) fn has_expired(&self) -> bool {
        self.has_expired.as_ref().is_some_and(|it| it.get())
    }
}

fn limit(deadline: Duration, has_expired: Rc<Cell<bool>>) -> Timeout {
    Timeout::with_action(move |reactor, handle| {
        // While we do not read the peer cannot finish it.
        if let Some(transport) = reactor.get(handle)
            && !transport.is_reading_paused()
        {
            log::warn!(
                target: log::DESCRIPTORS,
                "{}: descriptors from {} waited {deadline:?} for their frame: closing",
                handle.token(),
                transport.peer(),
            );
            has_expired.set(true);
            transport.abort_connection();
        }
    })
}
