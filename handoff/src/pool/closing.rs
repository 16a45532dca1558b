//! Listeners on which workers have accepted by themselves, and that are closed.

use std::rc::Rc;
use std::time::{Duration, Instant};

use bowline_reactor::Reactor;
use bowline_transport::ListenerGroup;

use super::WorkerId;
use super::connection::PassedConnection;
use super::dispatcher::PoolShared;
use super::settings::WorkerStage;
use super::sharing::accept;
use super::state::PoolState;
use crate::log;

/// A listener that was shared out, until each of its sockets is closed for good.
///
/// A worker takes what waits in its queue, closes its copy, and says so. One that says
/// nothing may hang: then the pool takes what waits there, and shuts the socket down. Else
/// the worker's copy would go on to listen for as long as it hangs: clients would connect,
/// nobody would serve them, and nobody else could have the address.
pub(super) struct ClosingListener {
    /// What it was called between pool and workers.
    id: u32,
    label: u32,
    /// The socket of each place.
    sockets: ListenerGroup,
    /// The places whose sockets are open.
    open: Vec<usize>,
    /// A process that takes over has the sockets too: nobody may shut them down.
    is_offered: bool,
    /// Workers that have closed their copies.
    closed_by: Vec<WorkerId>,
    /// When workers were told.
    pub(super) since: Instant,
}

impl ClosingListener {
    pub(super) fn new(
        id: u32,
        label: u32,
        sockets: ListenerGroup,
        is_offered: bool,
        now: Instant,
    ) -> Self {
        let open = (0..sockets.members().len()).collect();
        Self {
            id,
            label,
            sockets,
            open,
            is_offered,
            closed_by: Vec::new(),
            since: now,
        }
    }

    /// Closes the socket of a place. What still waits in its queue is reset.
    fn end(&self, place: usize) {
        if self.is_offered {
            return;
        }
        if let Err(error) = self.sockets.shut_down(place) {
            log::warn!(target: log::HANDOFF, "cannot close the listener of a worker: {error}");
        }
    }
}

impl PoolShared {
    /// A worker has closed its copy of a listener.
    pub(super) fn unlistened(self: &Rc<Self>, reactor: &mut Reactor, worker: WorkerId, id: u32) {
        let mut state = self.state.borrow_mut();
        if let Some(closing) = state.closing.iter_mut().find(|it| it.id == id) {
            closing.closed_by.push(worker);
            self.close_later(reactor);
        }
    }

    /// Has listeners be looked at later in this turn: a channel cannot be reached from its
    /// own callback.
    pub(super) fn close_later(self: &Rc<Self>, reactor: &mut Reactor) {
        if !self.close_is_due.replace(true) {
            let shared = Rc::clone(self);
            reactor.defer(move |reactor| {
                shared.close_is_due.set(false);
                shared.end_closing(reactor);
                shared.pump(reactor);
                shared.arm_tick(reactor);
            });
        }
    }

    /// Closes the sockets that no worker is about to close, once what waits in their queues
    /// is with others.
    pub(super) fn end_closing(self: &Rc<Self>, reactor: &mut Reactor) {
        let now = reactor.now();
        let left = {
            let mut state = self.state.borrow_mut();
            state.note_silence(now);
            state.left_places(now)
        };
        for (id, place) in left {
            let is_empty = loop {
                let taken = self.state.borrow_mut().take_left(id, place, now);
                match taken {
                    Taken::One(connection) => self.dispatch(reactor, *connection),
                    Taken::Later => break false,
                    Taken::All => break true,
                }
            };
            if is_empty {
                self.state.borrow_mut().end_place(id, place);
            }
        }
    }
}

/// What was taken from a queue.
enum Taken {
    One(Box<PassedConnection>),
    /// There is more than the pool has room for.
    Later,
    All,
}

impl PoolState {
    /// The places whose sockets no worker is about to close, by listener.
    fn left_places(&self, now: Instant) -> Vec<(u32, usize)> {
        let of = |closing: &ClosingListener| {
            let open = closing.open.iter().copied();
            let left = open.filter(|place| self.is_left(closing, *place, now));
            let id = closing.id;
            left.map(|place| (id, place)).collect::<Vec<_>>()
        };
        self.closing.iter().flat_map(of).collect()
    }

    /// Takes note of workers that owe a word about a listener: they get nothing more, and
    /// hang in the end.
    fn note_silence(&mut self, now: Instant) {
        for closing in &self.closing {
            for worker in self.workers.iter_mut() {
                let quiet_since = worker.answered.max(closing.since);
                let is_slow = now.saturating_duration_since(quiet_since) > self.settings.slow_after;
                let says_so = worker.shares_messages && worker.stage == WorkerStage::Serving;
                let is_open = closing.open.contains(&worker.place);
                if is_slow && says_so && is_open && !closing.closed_by.contains(&worker.id) {
                    worker.silent_since.get_or_insert(quiet_since);
                }
            }
        }
    }

    /// Whether nobody at this place is about to accept what waits there.
    fn is_left(&self, closing: &ClosingListener, place: usize, now: Instant) -> bool {
        let mut there = self.workers.iter().filter(|it| it.place == place);
        !there.any(|worker| {
            let goes_on = matches!(worker.stage, WorkerStage::Serving | WorkerStage::Draining);
            // A busy worker says what it has accepted.
            let quiet = now.saturating_duration_since(worker.answered.max(closing.since));
            let is_silent = quiet > self.settings.slow_after;
            goes_on && !is_silent && !closing.closed_by.contains(&worker.id)
        })
    }

    /// The next that waits at a place that nobody serves.
    fn take_left(&mut self, id: u32, place: usize, now: Instant) -> Taken {
        let Some(closing) = self.closing.iter().find(|it| it.id == id) else {
            return Taken::All;
        };
        // Whoever comes late comes too late, as at any listener that is closed.
        let patience: Duration = self.settings.ack_timeout * 2;
        if now.saturating_duration_since(closing.since) > patience {
            return Taken::All;
        }
        if self.waiting.len() >= self.settings.queue {
            return Taken::Later;
        }
        match accept(&closing.sockets, place, closing.label) {
            Some(connection) => {
                self.counts.rescued += 1;
                Taken::One(Box::new(connection))
            }
            None => Taken::All,
        }
    }

    fn end_place(&mut self, id: u32, place: usize) {
        self.closing.retain_mut(|closing| {
            if closing.id == id {
                closing.end(place);
                closing.open.retain(|it| *it != place);
            }
            !closing.open.is_empty()
        });
    }
}
