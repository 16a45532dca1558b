//! Listeners on which workers accept by themselves, and what the pool does about them.

use std::io;
use std::mem;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Instant;

use bowline_protocol::{ListenerHandle, PassedDescriptor};
use bowline_reactor::{Reactor, ReadableCall};
use bowline_transport::ListenerGroup;

use super::WorkerId;
use super::closing::ClosingListener;
use super::connection::PassedConnection;
use super::dispatcher::PoolShared;
use super::messages::ToWorker;
use super::settings::{Accepting, PoolEvent, WorkerStage};
use super::state::PoolState;
use crate::log;
use crate::wire;

/// How many connections are taken at a look from the queue of a worker that does not
/// take them itself: at 20 ms a look, 12,800 a second.
const RESCUES: usize = 256;

/// A listener that is shared out among workers: its first socket is that of the pool's own
/// listener, which gets nothing from then on; then comes one for each place of the pool.
/// None of them is closed before the listener is: one whose place is gone waits for the
/// pool to grow again, and what still comes there the pool takes itself.
pub(super) struct SharedListener {
    /// What it is called between pool and workers.
    id: u32,
    label: u32,
    listener: ListenerHandle,
    group: ListenerGroup,
    seats: Vec<Seat>,
    /// Workers accept on it.
    is_open: bool,
    /// A process that is to take over may have its sockets.
    is_offered: bool,
}

/// The queue of one place, in one of the listeners.
#[derive(Default)]
struct Seat {
    /// Tells of the first that comes; the look at the queue does the rest.
    watch: Option<ReadableCall<Rc<OwnedFd>>>,
    /// Looked at with each tick.
    is_busy: bool,
    /// Since when at each look somebody waited.
    since: Option<Instant>,
}

/// What a look at the queue of a place says.
enum Look {
    /// Nobody waits, or nobody did.
    Idle,
    /// Those that wait are still for its worker.
    Leave,
    /// They are for others.
    Take,
}

impl SharedListener {
    /// Has the kernel spread connections over the sockets of so many places. The group has
    /// them.
    fn steer(&self, places: usize) {
        if places == 0 {
            return;
        }
        if let Err(error) = self.group.steer(1..places + 1) {
            // Those that come at other sockets the pool takes itself.
            log::warn!(target: log::HANDOFF, "cannot choose who gets connections: {error}");
        }
    }

    /// Makes sure that there is a socket for each of so many places.
    fn grow(&mut self, places: usize) -> io::Result<()> {
        while self.group.members().len() <= places {
            self.group.grow()?;
        }
        self.seats
            .resize_with(self.group.members().len() - 1, Seat::default);
        Ok(())
    }
}

impl PoolState {
    /// Whether workers accept on this listener, if it is shared out among them.
    pub(super) fn is_open_to_workers(&self, listener: ListenerHandle) -> Option<bool> {
        let shared = self.shared.iter().find(|it| it.listener == listener);
        shared.map(|it| it.is_open)
    }
}

impl PoolShared {
    /// Shares a listener out among the workers. `members` are the sockets beside its own,
    /// if a predecessor has done so before.
    pub(super) fn share(
        self: &Rc<Self>,
        reactor: &mut Reactor,
        label: u32,
        listener: ListenerHandle,
        own: io::Result<OwnedFd>,
        members: Vec<OwnedFd>,
    ) {
        let made =
            own.and_then(|own| ListenerGroup::resume([own].into_iter().chain(members).collect()));
        let group = match made {
            Ok(group) => group,
            Err(error) => {
                log::error!(target: log::HANDOFF, "workers cannot accept by themselves: {error}");
                return self.tell(reactor, PoolEvent::NotShared { label, error });
            }
        };
        let mut seats = Vec::new();
        seats.resize_with(group.members().len() - 1, Seat::default);
        let id = self.state.borrow().next_shared;
        let shared = SharedListener {
            id,
            label,
            listener,
            group,
            seats,
            is_open: false,
            is_offered: false,
        };
        let mut state = self.state.borrow_mut();
        state.next_shared += 1;
        state.shared.push(shared);
    }

    /// Has workers accept on a listener that is shared out.
    pub(crate) fn begin_accepting(
        self: &Rc<Self>,
        reactor: &mut Reactor,
        listener: ListenerHandle,
    ) {
        {
            let state = &mut *self.state.borrow_mut();
            if !state.shares() {
                return;
            }
            let at = state.shared.iter().position(|it| it.listener == listener);
            let Some(at) = at else {
                // It starts with the next turn.
                return state.opened.push(listener);
            };
            if mem::replace(&mut state.shared[at].is_open, true) {
                return;
            }
        }
        self.reseat(reactor);
        let state = &mut *self.state.borrow_mut();
        let at = state.shared.iter().position(|it| it.listener == listener);
        let serving = state.workers.iter();
        let serving = serving.filter(|worker| worker.stage == WorkerStage::Serving);
        let serving: Vec<WorkerId> = serving.map(|worker| worker.id).collect();
        for worker in serving {
            if let Some(at) = at {
                state.seat(reactor, worker, at);
            }
        }
    }

    /// The sockets of a listener beside its own, in their order, for another process.
    pub(crate) fn members(&self, listener: ListenerHandle) -> Vec<Rc<OwnedFd>> {
        let mut state = self.state.borrow_mut();
        let mut shared = state.shared.iter_mut();
        let Some(shared) = shared.find(|it| it.listener == listener) else {
            return Vec::new();
        };
        shared.is_offered = true;
        shared.group.members()[1..].to_vec()
    }

    /// Gives a worker that has become ready the queues of its place.
    pub(super) fn seat_worker(&self, reactor: &mut Reactor, worker: WorkerId) {
        let state = &mut *self.state.borrow_mut();
        for shared in 0..state.shared.len() {
            state.seat(reactor, worker, shared);
        }
    }

    /// The pool has another number of places now.
    pub(super) fn reseat(self: &Rc<Self>, reactor: &mut Reactor) {
        let mut failed = Vec::new();
        {
            let state = &mut *self.state.borrow_mut();
            let places = state.places.len();
            for shared in state.shared.iter_mut().filter(|it| it.is_open) {
                if let Err(error) = shared.grow(places) {
                    log::error!(target: log::HANDOFF, "workers cannot accept by themselves: {error}");
                    failed.push((shared.label, error));
                }
                shared.steer(places.min(shared.seats.len()));
            }
        }
        for (label, error) in failed {
            self.tell(reactor, PoolEvent::NotShared { label, error });
        }
        self.watch_seats(reactor);
    }

    /// The listener is closed. Each worker serves its queue to the end and closes it; see
    /// [`ClosingListener`]. Where another process has all of them now, nothing else happens.
    pub(super) fn unshare(self: &Rc<Self>, reactor: &mut Reactor, listener: ListenerHandle) {
        let shared = {
            let state = &mut *self.state.borrow_mut();
            let at = state.shared.iter().position(|it| it.listener == listener);
            let Some(at) = at else { return };
            let shared = state.shared.remove(at);
            state.close_seats(reactor, shared.id);
            shared
        };
        for watch in shared.seats.into_iter().filter_map(|seat| seat.watch) {
            // It may be what has just been called.
            drop(watch.cancel(reactor));
        }
        let (id, label, mut group) = (shared.id, shared.label, shared.group);
        // Where workers have closed theirs, the kernel may choose our own socket again, on
        // which nobody accepts any more: it goes first, unless somebody else has it too.
        let members = group.split_off(1);
        drop(group);
        let state = &mut *self.state.borrow_mut();
        if let Some(members) = members.filter(|_| state.heir_id.is_none()) {
            let now = reactor.now();
            let closing = ClosingListener::new(id, label, members, shared.is_offered, now);
            state.closing.push(closing);
            self.close_later(reactor);
        }
    }

    /// Closes what workers accept on, since the pool stops, or another process has it.
    pub(super) fn unshare_all(self: &Rc<Self>, reactor: &mut Reactor) {
        let listeners: Vec<_> = {
            let state = self.state.borrow();
            state.shared.iter().map(|it| it.listener).collect()
        };
        for listener in listeners {
            self.unshare(reactor, listener);
        }
    }

    /// No process takes over the sockets that it was [given](Self::members).
    pub(crate) fn withdraw_offer(&self) {
        let mut state = self.state.borrow_mut();
        state.heir_end = None;
        state.shared.iter_mut().for_each(|it| it.is_offered = false);
    }

    /// Has the first that comes in each quiet queue be told.
    fn watch_seats(self: &Rc<Self>, reactor: &mut Reactor) {
        let quiet: Vec<(u32, usize, Rc<OwnedFd>)> = {
            let state = self.state.borrow();
            let of = |shared: &SharedListener| {
                let seats = shared.seats.iter().enumerate();
                let quiet = seats.filter(|(_, seat)| seat.watch.is_none() && !seat.is_busy);
                let places = quiet.map(|(place, _)| place);
                let of = |place| {
                    (
                        shared.id,
                        place,
                        Rc::clone(&shared.group.members()[place + 1]),
                    )
                };
                places.map(of).collect::<Vec<_>>()
            };
            let open = state.shared.iter().filter(|it| it.is_open);
            open.flat_map(of).collect()
        };
        for (id, place, socket) in quiet {
            let this = Rc::clone(self);
            let somebody = move |reactor: &mut Reactor, _| {
                if let Some(seat) = this.state.borrow_mut().seat_of(id, place) {
                    seat.watch = None;
                    seat.is_busy = true;
                }
                this.arm_tick(reactor);
            };
            let watch = reactor.call_when_readable(socket, somebody);
            let mut state = self.state.borrow_mut();
            if let Some(seat) = state.seat_of(id, place) {
                match watch {
                    Ok(watch) => seat.watch = Some(watch),
                    Err(error) => {
                        log::warn!(target: log::HANDOFF, "looks at a queue all the time: {error}");
                        seat.is_busy = true;
                    }
                }
            }
        }
    }

    /// Looks at the queues of which somebody was told, and takes what their workers leave
    /// there.
    pub(super) fn look_at_queues(self: &Rc<Self>, reactor: &mut Reactor) {
        let mut taken = Vec::new();
        {
            let state = &mut *self.state.borrow_mut();
            let now = reactor.now();
            for shared in 0..state.shared.len() {
                for place in 0..state.shared[shared].seats.len() {
                    if matches!(state.look(reactor, shared, place, now), Look::Take) {
                        taken.push((state.shared[shared].id, place));
                    }
                }
            }
        }
        for (id, place) in taken {
            self.take_over(reactor, id, place);
        }
        self.watch_seats(reactor);
    }

    /// Gives what waits at a place to others, as long as they have room.
    fn take_over(self: &Rc<Self>, reactor: &mut Reactor, id: u32, place: usize) {
        for _ in 0..RESCUES {
            let connection = {
                let mut state = self.state.borrow_mut();
                let has_room = state.has_room(reactor.now());
                has_room.then(|| state.accept(id, place)).flatten()
            };
            match connection {
                Some(connection) => self.dispatch(reactor, connection),
                None => break,
            }
        }
    }
}

/// The next that waits in a queue.
pub(super) fn accept(group: &ListenerGroup, member: usize, label: u32) -> Option<PassedConnection> {
    match group.accept(member) {
        Ok((socket, peer)) => Some(PassedConnection {
            peer: Some(peer),
            label,
            ..PassedConnection::new(socket)
        }),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
        Err(error) => {
            log::debug!(target: log::HANDOFF, "accept: {error}");
            None
        }
    }
}

impl PoolState {
    fn seat_of(&mut self, id: u32, place: usize) -> Option<&mut Seat> {
        let shared = self.shared.iter_mut().find(|it| it.id == id)?;
        shared.seats.get_mut(place)
    }

    /// The next that waits at a place, which is the pool's then.
    fn accept(&mut self, id: u32, place: usize) -> Option<PassedConnection> {
        let shared = self.shared.iter().find(|it| it.id == id)?;
        let connection = accept(&shared.group, place + 1, shared.label)?;
        self.counts.rescued += 1;
        Some(connection)
    }

    fn seat(&mut self, reactor: &mut Reactor, worker: WorkerId, shared: usize) {
        let Some(at) = self.workers.iter().position(|it| it.id == worker) else {
            return;
        };
        let shared = &self.shared[shared];
        if !shared.is_open {
            return;
        }
        let worker = &mut self.workers[at];
        let Some(socket) = shared.group.members().get(worker.place.saturating_add(1)) else {
            return;
        };
        let socket = vec![PassedDescriptor::shared(socket)];
        let message = ToWorker::Listen {
            listener: shared.id,
            label: shared.label,
        };
        let sent = reactor
            .get(worker.channel)
            .map(|channel| wire::send(channel, &message, socket));
        match sent {
            // It has its number among those that have left.
            Some(Ok(_)) => worker.given += 1,
            // Its channel has ended, which is going to be told.
            sent => log::debug!(target: log::HANDOFF, "{}: {sent:?}", worker.id),
        }
    }

    fn close_seats(&self, reactor: &mut Reactor, id: u32) {
        for worker in &self.workers {
            if let Some(channel) = reactor.get(worker.channel)
                && let Err(error) =
                    wire::send(channel, &ToWorker::Unlisten { listener: id }, Vec::new())
            {
                log::debug!(target: log::HANDOFF, "{}: {error}", worker.id);
            }
        }
    }

    /// Looks at one queue, and judges who is to serve it.
    fn look(&mut self, reactor: &mut Reactor, shared: usize, place: usize, now: Instant) -> Look {
        let slow_after = self.settings.slow_after;
        let is_gone = place >= self.places.len();
        let shared = &mut self.shared[shared];
        let Some(seat) = shared.seats.get_mut(place).filter(|seat| seat.is_busy) else {
            return Look::Idle;
        };
        let waiting = shared.group.waiting(place + 1).unwrap_or(0);
        if waiting == 0 {
            *seat = Seat::default();
            return Look::Idle;
        }
        let since = *seat.since.get_or_insert(now);
        let mut workers = self.workers.iter_mut();
        let worker = workers.find(|it| {
            let serves = matches!(it.stage, WorkerStage::Serving | WorkerStage::Hung);
            it.place == place && serves
        });
        let Some(worker) = worker else {
            // Another one may come at once.
            let is_late = now.saturating_duration_since(since) > slow_after;
            return if is_gone || is_late {
                Look::Take
            } else {
                Look::Leave
            };
        };
        if worker.is_full {
            return Look::Take;
        }
        // A busy worker says what it has accepted.
        let quiet = *worker
            .silent_since
            .get_or_insert_with(|| since.max(worker.answered));
        if now.saturating_duration_since(quiet) <= slow_after {
            return Look::Leave;
        }
        if !mem::replace(&mut worker.was_asked, true)
            && let Some(channel) = reactor.get(worker.channel)
            && let Err(error) = wire::send(channel, &ToWorker::Ask, Vec::new())
        {
            log::debug!(target: log::HANDOFF, "{}: {error}", worker.id);
        }
        Look::Take
    }

    pub(super) fn are_queues_busy(&self) -> bool {
        let mut seats = self.shared.iter().flat_map(|shared| &shared.seats);
        seats.any(|seat| seat.is_busy)
    }

    pub(super) fn shares(&self) -> bool {
        self.settings.accepting == Accepting::ByWorkers
    }
}
