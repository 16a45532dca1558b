//! The accepting side of a pool.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::mem;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bowline_protocol::UnixTransport;
use bowline_protocol::{Acceptor, Address, BuildContext, CloseReason, Context, ListenerHandle};
use bowline_reactor::{Description, Phase, Reactor, SystemEvent};

use super::WorkerId;
use super::connection::PassedConnection;
use super::messages::{FromWorker, ToWorker};
use super::policy::{Candidate, LeastLoaded, PoolPolicy};
use super::process::{Spawn, StartWorker};
use super::settings::{PoolEvent, PoolSettings, PoolStatistics, Undelivered};
use super::state::{Job, Place, PoolLife, PoolState};
use crate::channel::{ChannelError, ChannelReceiver, Peer};
use crate::log;
use crate::wire::Incoming;

/// How long a full worker that has refused a connection is not asked again. It is asked
/// earlier if it says something itself.
pub const REFUSAL_PAUSE: Duration = Duration::from_millis(100);

/// What of a connection's bytes fits into a message beside the rest, given what
/// channels accept by default.
const MAX_TRAVELLING_BYTES: usize = (1 << 20) - 1024;

/// The accepting side of a pool of worker processes; see the [module](super).
///
/// A clone is the same pool. It lives on in its reactor when all are dropped.
#[derive(Clone)]
pub struct Pool {
    pub(crate) shared: Rc<PoolShared>,
}

type EventHandler = Box<dyn FnMut(&mut Reactor, PoolEvent)>;
type UndeliveredHandler = Box<dyn FnMut(&mut Reactor, PassedConnection, Undelivered)>;

pub(crate) struct PoolShared {
    /// Never borrowed while code of the user runs, but that of a `ChildProcess`.
    pub(super) state: RefCell<PoolState>,
    // Each is borrowed only while it runs, and callbacks never nest.
    pub(super) spawn: RefCell<Box<dyn StartWorker>>,
    pub(super) policy: RefCell<Box<dyn PoolPolicy>>,
    pub(super) on_event: RefCell<Option<EventHandler>>,
    pub(super) on_undelivered: RefCell<Option<UndeliveredHandler>>,
    /// Memory that is used again for each choice.
    pub(super) candidates: RefCell<Vec<Candidate>>,
    pub(super) pump_is_due: Cell<bool>,
    /// What workers were given is put on their channels later in this turn.
    pub(super) flush_is_due: Cell<bool>,
    /// Listeners that workers have closed are seen to later in this turn.
    pub(super) close_is_due: Cell<bool>,
    /// What it is called by those who look inside.
    number: u64,
    /// What passes over its channels.
    #[cfg(feature = "inspect")]
    pub(super) tally: bowline_transport::Tally,
}

/// What the next pool of the process is called.
static NEXT_NUMBER: AtomicU64 = AtomicU64::new(1);

impl Pool {
    /// Starts the workers. Who has the fewest connections gets the next ([`LeastLoaded`]).
    /// [`with_policy`] has another policy choose.
    ///
    /// If a worker cannot be started, that is told as [`PoolEvent::NotStarted`]. It is
    /// tried again later, with growing waits, as often as
    /// [allowed](PoolSettings::max_failed_starts).
    ///
    /// [`with_policy`]: Self::with_policy
    pub fn start(reactor: &mut Reactor, settings: PoolSettings, spawn: impl Spawn) -> Self {
        Self::with_policy(reactor, settings, LeastLoaded::new(), spawn)
    }

    /// Starts the workers. `policy` chooses which of them gets a connection.
    pub fn with_policy(
        reactor: &mut Reactor,
        settings: PoolSettings,
        policy: impl PoolPolicy,
        spawn: impl Spawn,
    ) -> Self {
        let mut settings = settings;
        // None at all could never be given anything.
        settings.window = settings.window.max(1);
        let drain_timeout = settings.drain_timeout;
        let number = NEXT_NUMBER.fetch_add(1, Ordering::Relaxed);
        let pool = Self {
            shared: Rc::new(PoolShared {
                state: RefCell::new(PoolState {
                    places: Place::all(&settings),
                    shared: Vec::new(),
                    closing: Vec::new(),
                    next_shared: 0,
                    heir: None,
                    heir_id: None,
                    opened: Vec::new(),
                    heir_end: None,
                    settings,
                    workers: Vec::new(),
                    leaving: Vec::new(),
                    waiting: VecDeque::new(),
                    undelivered: VecDeque::new(),
                    paused: Vec::new(),
                    is_starting: false,
                    failed_starts: 0,
                    next_worker: 1,
                    next_delivery: 1,
                    tick: None,
                    life: PoolLife::Running,
                    counts: PoolStatistics::default(),
                }),
                spawn: RefCell::new(Box::new(spawn)),
                policy: RefCell::new(Box::new(policy)),
                on_event: RefCell::new(None),
                on_undelivered: RefCell::new(None),
                candidates: RefCell::new(Vec::new()),
                pump_is_due: Cell::new(false),
                flush_is_due: Cell::new(false),
                close_is_due: Cell::new(false),
                number,
                #[cfg(feature = "inspect")]
                tally: bowline_transport::Tally::new("pool", number),
            }),
        };
        if let Some(within) = drain_timeout {
            let stopping = Rc::downgrade(&pool.shared);
            reactor.add_trigger(Phase::Before, SystemEvent::Shutdown, move |reactor| {
                if let Some(shared) = stopping.upgrade() {
                    let left = reactor
                        .stop_deadline()
                        .map(|deadline| deadline.saturating_duration_since(reactor.now()));
                    let within = left.map_or(within, |left| left.min(within));
                    shared.stop(reactor, within, None);
                }
            });
        }
        let stopped = Rc::downgrade(&pool.shared);
        reactor.add_trigger(Phase::After, SystemEvent::Shutdown, move |_| {
            if let Some(shared) = stopped.upgrade() {
                shared.state.borrow_mut().has_been_cut();
            }
        });
        pool.shared.become_part(reactor);
        pool.shared.start_missing_workers(reactor);
        pool
    }

    /// Gives a connection to a worker, now or when one has room.
    ///
    /// It is served once, or [`on_undelivered`](Self::on_undelivered) gets it.
    pub fn dispatch(&self, reactor: &mut Reactor, connection: PassedConnection) {
        self.shared.dispatch(reactor, connection);
    }

    /// Whether a worker would get the next connection at once. If you dispatch
    /// connections by other means than an [`acceptor`](Self::acceptor), wait while this
    /// is false.
    pub fn has_room(&self, reactor: &Reactor) -> bool {
        self.shared.state.borrow().has_room(reactor.now())
    }

    /// Makes the acceptor that a listener is given, by
    /// [`accept`](bowline_transport::Transports::accept). It dispatches every
    /// connection under this label, and pauses the listener while no worker can take
    /// one.
    ///
    /// With [`Accepting::ByWorkers`](super::Accepting::ByWorkers) it shares the listener
    /// out instead: each worker accepts by itself. Only a listener of TCP is accepted then.
    pub fn acceptor(&self, label: u32) -> PoolAcceptor {
        PoolAcceptor {
            pool: self.clone(),
            label,
            own: None,
            listener: None,
            members: Vec::new(),
            is_held: false,
        }
    }

    /// The same, of a program that is about to serve: with the sockets that the process
    /// before this one had made, and not open to workers before
    /// [`PoolShared::begin_accepting`].
    pub(crate) fn successor(&self, label: u32, members: Vec<OwnedFd>) -> PoolAcceptor {
        PoolAcceptor {
            members,
            is_held: true,
            ..self.acceptor(label)
        }
    }

    /// Has the pool have so many workers from now on. New ones are started. Those that
    /// are too many serve their connections to the end, for the
    /// [time of a drain](PoolSettings::drain_timeout). No connection is lost by either.
    /// Without any worker, connections wait.
    pub fn resize(&self, reactor: &mut Reactor, workers: usize) {
        self.shared.resize(reactor, workers);
    }

    /// Sets the handler that gets connections that nobody takes. Without one they are
    /// closed.
    pub fn on_undelivered(
        &self,
        handler: impl FnMut(&mut Reactor, PassedConnection, Undelivered) + 'static,
    ) {
        *self.shared.on_undelivered.borrow_mut() = Some(Box::new(handler));
    }

    /// Sets the handler that is told of events. The first ones are those of the
    /// present callback.
    pub fn on_event(&self, handler: impl FnMut(&mut Reactor, PoolEvent) + 'static) {
        *self.shared.on_event.borrow_mut() = Some(Box::new(handler));
    }

    /// The state of the pool, and its counters.
    pub fn statistics(&self) -> PoolStatistics {
        self.shared.state.borrow().statistics()
    }

    /// Has a worker serve its connections to the end, for at most `within`, and then
    /// end. Starts another worker now. Does nothing if the worker is gone or about to
    /// end.
    pub fn retire(&self, reactor: &mut Reactor, worker: WorkerId, within: Duration) {
        self.shared
            .state
            .borrow_mut()
            .drain_worker(reactor, worker, within);
        self.shared.arm_tick(reactor);
        let shared = Rc::clone(&self.shared);
        reactor.defer(move |reactor| shared.start_missing_workers(reactor));
    }

    /// Ends a worker's process at once. Connections that it has not answered go to
    /// others.
    pub fn kill(&self, worker: WorkerId) {
        let mut state = self.shared.state.borrow_mut();
        if let Some(worker) = state.worker(worker) {
            worker.kill();
        }
    }

    /// Stops the pool. Connections that wait are given to workers, each worker serves
    /// its connections to the end, and `then` is called when all workers are gone. A
    /// worker that takes longer than `within` is killed, and so is each that is left when the
    /// reactor stops before that. Close the listeners first: the pool does not, and what they
    /// accept while it stops is undelivered in the end. (Workers that accept by themselves
    /// close their copies.)
    ///
    /// No worker is told to end while another has a connection that it has not answered,
    /// since that may have to go to it: for twice the
    /// [`ack_timeout`](PoolSettings::ack_timeout), and half of `within`, at the most.
    pub fn stop(
        &self,
        reactor: &mut Reactor,
        within: Duration,
        then: impl FnOnce(&mut Reactor) + 'static,
    ) {
        self.shared.stop(reactor, within, Some(Box::new(then)));
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Pool").field(&self.statistics()).finish()
    }
}

/// Dispatches what a listener accepts; see [`Pool::acceptor`].
#[derive(Debug)]
pub struct PoolAcceptor {
    pool: Pool,
    label: u32,
    /// The listener, once it has started.
    own: Option<ListenerHandle>,
    /// The listener, if it is shared out among workers.
    listener: Option<ListenerHandle>,
    /// The sockets beside its own that a predecessor had made.
    members: Vec<OwnedFd>,
    /// Workers accept nothing yet.
    is_held: bool,
}

impl Acceptor for PoolAcceptor {
    fn suits(&self, address: &Address) -> io::Result<()> {
        if self.pool.shared.state.borrow().shares() && address.as_inet().is_none() {
            let text = "workers can accept by themselves on TCP only";
            return Err(io::Error::new(io::ErrorKind::Unsupported, text));
        }
        Ok(())
    }

    fn started(&mut self, cx: &mut BuildContext<'_>) {
        self.own = cx.listener().map(|listener| listener.handle());
        if self.pool.shared.state.borrow().shares() {
            self.share(cx);
        }
        self.pause_if_full(cx);
    }

    fn stopped(&mut self, cx: &mut BuildContext<'_>) {
        if let Some(listener) = self.listener {
            self.pool.shared.unshare(cx.reactor, listener);
        }
    }

    fn accepted(&mut self, cx: &mut BuildContext<'_>, socket: OwnedFd, peer: &Address) {
        let connection = PassedConnection {
            peer: peer.as_inet(),
            label: self.label,
            ..PassedConnection::new(socket)
        };
        self.pool.dispatch(cx.reactor, connection);
        self.pause_if_full(cx);
    }

    fn describe(&self, description: &mut Description) {
        let Ok(state) = self.pool.shared.state.try_borrow() else {
            return;
        };
        let is_open = self.own.and_then(|own| state.is_open_to_workers(own));
        let accepting = match is_open {
            Some(true) => "by workers",
            // They begin once the program serves.
            Some(false) => "held",
            None => "by the pool",
        };
        let is_paused = self.own.is_some_and(|own| state.paused.contains(&own));
        description
            .section_of::<Self>()
            .set("pool", self.pool.shared.number)
            .set("label", self.label)
            .set("accepting", accepting)
            // Until a worker has room.
            .set("paused", is_paused);
    }
}

impl PoolAcceptor {
    fn share(&mut self, cx: &mut BuildContext<'_>) {
        let Some(listener) = cx.listener() else {
            return;
        };
        let (handle, own) = (listener.handle(), listener.duplicate());
        // Who else has it now is us, and workers never accept on it.
        listener.assume_sole_holder();
        self.listener = Some(handle);
        let members = mem::take(&mut self.members);
        let shared = &self.pool.shared;
        shared.share(cx.reactor, self.label, handle, own, members);
        let opened = {
            let opened = &mut shared.state.borrow_mut().opened;
            let at = opened.iter().position(|it| *it == handle);
            at.map(|at| opened.remove(at)).is_some()
        };
        if opened || !self.is_held {
            shared.begin_accepting(cx.reactor, handle);
        }
    }

    fn pause_if_full(&self, cx: &mut BuildContext<'_>) {
        if self.pool.has_room(cx.reactor) {
            return;
        }
        if let Some(listener) = cx.listener() {
            listener.hold_accepting();
            let mut state = self.pool.shared.state.borrow_mut();
            state.paused.push(listener.handle());
        }
        // Room may come with time alone.
        self.pool.shared.arm_tick(cx.reactor);
    }
}

impl PoolShared {
    /// Whether workers accept by themselves.
    pub(crate) fn shares(&self) -> bool {
        self.state.borrow().shares()
    }

    pub(super) fn dispatch(self: &Rc<Self>, reactor: &mut Reactor, connection: PassedConnection) {
        let job = Box::new(Job::new(connection, reactor.now()));
        self.dispatch_job(reactor, job);
    }

    pub(super) fn dispatch_job(self: &Rc<Self>, reactor: &mut Reactor, job: Box<Job>) {
        if job.dispatch.read.len() + job.dispatch.unsent.len() > MAX_TRAVELLING_BYTES {
            return self.undelivered(reactor, job, Undelivered::TooLong);
        }
        if matches!(self.state.borrow().life, PoolLife::Stopped) {
            return self.undelivered(reactor, job, Undelivered::Stopped);
        }
        let is_first = self.state.borrow().is_next_first();
        let job = if is_first {
            match self.give(reactor, job) {
                Ok(()) => return,
                Err(job) => job,
            }
        } else {
            job
        };
        let mut state = self.state.borrow_mut();
        if state.waiting.len() >= state.settings.queue {
            drop(state);
            return self.undelivered(reactor, job, Undelivered::QueueFull);
        }
        state.waiting.push_back(job);
        drop(state);
        self.arm_tick(reactor);
    }

    /// Gives a connection to the worker that the policy chooses, or back.
    pub(super) fn give(
        self: &Rc<Self>,
        reactor: &mut Reactor,
        job: Box<Job>,
    ) -> Result<(), Box<Job>> {
        let mut candidates = self.candidates.take();
        let given = self.give_to_one_of(reactor, job, &mut candidates);
        *self.candidates.borrow_mut() = candidates;
        given
    }

    pub(super) fn give_to_one_of(
        self: &Rc<Self>,
        reactor: &mut Reactor,
        mut job: Box<Job>,
        candidates: &mut Vec<Candidate>,
    ) -> Result<(), Box<Job>> {
        loop {
            let now = reactor.now();
            self.state.borrow().candidates(now, &job, candidates);
            if candidates.is_empty() {
                return Err(job);
            }
            let chosen = self
                .policy
                .borrow_mut()
                .choose(&job.offer(), candidates)
                .and_then(|place| candidates.get(place));
            let Some(chosen) = chosen else {
                return Err(job);
            };
            // A worker whose channel refused is no candidate in the next round.
            match self
                .state
                .borrow_mut()
                .assign(reactor, chosen.worker, job, now)
            {
                Ok(()) => break,
                Err(back) => job = back,
            }
        }
        self.flush_later(reactor);
        self.arm_tick(reactor);
        Ok(())
    }

    /// Has what is given out in this turn leave at its end: to each worker in as few
    /// messages as may be.
    fn flush_later(self: &Rc<Self>, reactor: &mut Reactor) {
        if !self.flush_is_due.replace(true) {
            let shared = Rc::clone(self);
            reactor.defer(move |reactor| {
                shared.flush_is_due.set(false);
                let now = reactor.now();
                if shared.state.borrow_mut().put_on_channels(reactor, now) {
                    shared.pump_later(reactor);
                }
            });
        }
    }

    /// Sees later in this turn what can be given out now: a channel cannot be
    /// reached from its own callback.
    pub(super) fn pump_later(self: &Rc<Self>, reactor: &mut Reactor) {
        if !self.pump_is_due.replace(true) {
            let shared = Rc::clone(self);
            reactor.defer(move |reactor| {
                shared.pump_is_due.set(false);
                shared.pump(reactor);
            });
        }
    }

    pub(super) fn pump(self: &Rc<Self>, reactor: &mut Reactor) {
        // Each once; those that stay keep their order by going round. None is out
        // of the queue for longer than a policy looks at it, which may panic.
        let count = self.state.borrow().waiting.len();
        for _ in 0..count {
            let Some(job) = self.state.borrow_mut().waiting.pop_front() else {
                break;
            };
            let why = self.state.borrow().is_hopeless(&job);
            if let Some(why) = why {
                self.undelivered(reactor, job, why);
            } else if let Err(job) = self.give(reactor, job) {
                self.state.borrow_mut().waiting.push_back(job);
            }
        }
        let mut state = self.state.borrow_mut();
        if state.has_room(reactor.now()) {
            for listener in mem::take(&mut state.paused) {
                if let Some(listener) = reactor.get(listener) {
                    listener.release_accepting();
                }
            }
        }
        drop(state);
        self.advance_stop(reactor);
    }

    /// Has the user's handler see a connection that nobody took, or closes it.
    pub(super) fn undelivered(
        self: &Rc<Self>,
        reactor: &mut Reactor,
        job: Box<Job>,
        why: Undelivered,
    ) {
        if let Some(origin) = job.origin {
            // It goes on where it was.
            return self.settle(reactor, origin, ToWorker::HasNotMoved { id: origin.1 });
        }
        let mut state = self.state.borrow_mut();
        state.counts.undelivered += 1;
        let is_due = state.undelivered.is_empty();
        state.undelivered.push_back((job, why));
        drop(state);
        if is_due {
            let shared = Rc::clone(self);
            reactor.defer(move |reactor| shared.deliver_undelivered(reactor));
        }
    }

    /// One at a time: if the handler panics, that costs the one it was called for.
    pub(super) fn deliver_undelivered(self: &Rc<Self>, reactor: &mut Reactor) {
        let (next, has_more) = {
            let mut state = self.state.borrow_mut();
            (state.undelivered.pop_front(), !state.undelivered.is_empty())
        };
        let Some((job, why)) = next else { return };
        if has_more {
            let shared = Rc::clone(self);
            reactor.defer(move |reactor| shared.deliver_undelivered(reactor));
        }
        let peer = job.dispatch.peer;
        if job.dispatch.moved.is_some() {
            // Only a worker knows what to do with it.
            log::warn!(target: log::HANDOFF, "closed a connection that has moved here: {why:?}");
            return;
        }
        let Some(mut handler) = Out::of(&self.on_undelivered) else {
            log::warn!(target: log::HANDOFF, "closed a connection from {peer:?}: {why:?}");
            return;
        };
        match job.into_connection() {
            Ok(connection) => handler.get()(reactor, connection, why),
            Err(error) => {
                log::warn!(target: log::HANDOFF, "closed a connection from {peer:?}: {error}");
            }
        }
    }

    pub(super) fn tell(self: &Rc<Self>, reactor: &mut Reactor, event: PoolEvent) {
        log::debug!(target: log::HANDOFF, "{event:?}");
        if event.worker().is_some() && event.worker() == self.state.borrow().heir_id {
            return;
        }
        // Also without a handler: what happens while the pool starts is told to the
        // one that is set after it.
        let shared = Rc::clone(self);
        reactor.defer(move |reactor| {
            if let Some(mut handler) = Out::of(&shared.on_event) {
                handler.get()(reactor, event);
            }
        });
    }
}

/// A handler that is out while it runs, since it may set another one; if it does not,
/// it goes back, when it panics too.
struct Out<'a, H> {
    place: &'a RefCell<Option<H>>,
    handler: Option<H>,
}

impl<'a, H> Out<'a, H> {
    fn of(place: &'a RefCell<Option<H>>) -> Option<Self> {
        let handler = Some(place.take()?);
        Some(Self { place, handler })
    }

    fn get(&mut self) -> &mut H {
        self.handler.as_mut().expect("it goes back at the end")
    }
}

impl<H> Drop for Out<'_, H> {
    fn drop(&mut self) {
        if let Some(handler) = self.handler.take() {
            self.place.borrow_mut().get_or_insert(handler);
        }
    }
}

/// The pool's end of the channel with one worker.
pub(super) struct WorkerEnd {
    pub(super) shared: Rc<PoolShared>,
    pub(super) worker: WorkerId,
}

impl<T: UnixTransport + ?Sized> ChannelReceiver<T> for WorkerEnd {
    type Message = FromWorker;

    fn channel_made(&mut self, cx: &mut Context<'_, T>, peer: &Peer) {
        self.shared.ready(cx.reactor, self.worker, peer.version);
    }

    fn message_received(&mut self, cx: &mut Context<'_, T>, incoming: Incoming<FromWorker>) {
        let Incoming {
            message,
            descriptors,
            ..
        } = incoming;
        let (shared, worker) = (&self.shared, self.worker);
        match message {
            FromWorker::Declined { dispatch, reason } => {
                return shared.declined(cx.reactor, worker, dispatch, reason, descriptors);
            }
            FromWorker::Moving { id, moved } => {
                let shared = Rc::clone(shared);
                cx.reactor.defer(move |reactor| {
                    shared.moving(reactor, worker, id, moved, descriptors);
                });
                return;
            }
            FromWorker::Unlistened { listener, .. } => {
                shared.unlistened(cx.reactor, worker, listener)
            }
            _ => {}
        }
        if !descriptors.is_empty() {
            // A worker has nothing else to give.
            cx.transport.close_unclaimed(descriptors);
        }
        self.shared.answered(cx.reactor, self.worker, &message);
    }

    /// Each connection is one descriptor, and so is each listener.
    fn descriptors_sent(&mut self, cx: &mut Context<'_, T>, count: usize) {
        let now = cx.reactor.now();
        let mut state = self.shared.state.borrow_mut();
        state.have_left(self.worker, count, now);
    }

    fn channel_lost(
        &mut self,
        cx: &mut Context<'_, T>,
        error: Option<&ChannelError>,
        reason: &CloseReason,
    ) {
        // Of what never left, we have our own copies.
        drop(cx.transport.reclaim_descriptors());
        self.shared.lost(cx.reactor, self.worker, error, reason);
    }

    fn describe(&self, description: &mut Description) {
        let Ok(state) = self.shared.state.try_borrow() else {
            return;
        };
        let is_heir = state.heir_id == Some(self.worker);
        let Some(worker) = state.workers.iter().find(|it| it.id == self.worker) else {
            return;
        };
        let name = match is_heir {
            // The pool of the process that has taken over.
            true => "Next pool",
            false => "Worker",
        };
        description
            .section(name)
            .set("worker", self.worker.to_string())
            .set("stage", worker.stage.name())
            .set("live", worker.live)
            .set("in_flight", worker.in_flight.len())
            .set("acknowledged", worker.acknowledged)
            .set("refused", worker.refused);
    }
}

impl PoolShared {
    fn become_part(self: &Rc<Self>, reactor: &mut Reactor) {
        let seen = Rc::downgrade(self);
        reactor.add_part(move |description| {
            seen.upgrade()?.describe(description);
            Some(())
        });
    }

    fn describe(&self, description: &mut Description) {
        let Ok(state) = self.state.try_borrow() else {
            return;
        };
        let pool = state.statistics();
        let life = match state.life {
            PoolLife::Running if state.heir_id.is_some() => "handed over",
            PoolLife::Running => "running",
            PoolLife::Stopping { .. } => "stopping",
            PoolLife::Stopped => "stopped",
        };
        description
            .section("Pool")
            .set("state", life)
            .set("pool", self.number)
            .set("workers", pool.workers.len())
            .set("live", state.workers.iter().map(|it| it.live).sum::<u32>())
            .set("waiting", pool.waiting)
            .set("in_flight", pool.in_flight)
            .set("sent", pool.sent)
            .set("acknowledged", pool.acknowledged)
            .set("refused", pool.refused)
            .set("resent", pool.resent)
            .set("rescued", pool.rescued)
            .set("undelivered", pool.undelivered)
            .set("started", pool.started)
            .set("not_started", pool.not_started)
            .set("deaths", pool.deaths)
            .set("hangs", pool.hangs)
            .set("recalls", pool.recalls)
            .set("paused", pool.is_paused);
        #[cfg(feature = "inspect")]
        self.tally.describe(description.section("Pool channels"));
    }
}

#[cfg(test)]
mod tests {
    use bowline_transport::{Tcp, Transports};

    use super::super::process::Spawned;
    use super::super::settings::Accepting;
    use super::*;

    #[test]
    fn a_listener_is_described_as_held_until_workers_may_accept_on_it() {
        let mut reactor = Reactor::new().expect("epoll");
        let settings = PoolSettings::default()
            .workers(0)
            .accepting(Accepting::ByWorkers);
        let none = |_: &mut Reactor, _: WorkerId| -> io::Result<Spawned<OwnedFd>> {
            unreachable!("there are to be no workers")
        };
        let pool = Pool::start(&mut reactor, settings, none);
        let any = Tcp::at(([127, 0, 0, 1], 0).into());
        let acceptor = pool.successor(1, Vec::new());
        let listener = reactor.accept(any, acceptor).expect("it listens");
        while !reactor.is_idle() {
            reactor.turn(Some(Duration::ZERO));
        }
        let accepting = |reactor: &Reactor| {
            let all = reactor.descriptors().filter_map(|it| it.describe());
            let found = all.filter_map(|it| it.get("accepting").cloned());
            found.collect::<Vec<_>>()
        };
        assert_eq!(accepting(&reactor), ["held".into()]);
        pool.shared.begin_accepting(&mut reactor, listener);
        assert_eq!(accepting(&reactor), ["by workers".into()]);
    }
}
