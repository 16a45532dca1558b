//! The workers of a pool, from their start to the end of their processes.

use std::collections::VecDeque;
use std::fmt;
use std::mem;
use std::os::fd::OwnedFd;
use std::process::ExitStatus;
use std::rc::Rc;
use std::time::Duration;

use bowline_protocol::{CloseReason, NotSent};
use bowline_reactor::{Reactor, SystemEvent};
use bowline_transport::ChildWatch;
#[cfg(feature = "inspect")]
use bowline_transport::Transports;

use super::WorkerId;
use super::connection::PassedConnection;
use super::dispatcher::{PoolShared, WorkerEnd};
use super::messages::{Dispatch, FromWorker, SHARES_MESSAGES, ToWorker, VERSIONS, WorkerRefusal};
use super::process::StartedWorker;
use super::settings::{PoolEvent, WorkerStage};
use super::state::{Answered, Leaving, Member, Place, PoolLife, StopCall, moment_after};
use crate::channel::{Channel, ChannelError, ChannelSettings, Role, has_broken};
use crate::log;
use crate::wire;

/// How often deadlines are looked at while there are any: a fiftieth of the
/// shortest that is of use.
const TICK: Duration = Duration::from_millis(20);

/// A tick that comes so much too late says that this process was stopped, with its
/// virtual machine say, and read nothing meanwhile. Turns that are only long count.
const STALL: Duration = Duration::from_millis(500);

/// How long the channel of a process that has ended may stay open: its end is
/// usually there at the same moment, unless somebody else has it too.
const CHANNEL_GRACE: Duration = Duration::from_secs(1);

impl PoolShared {
    // Workers.

    pub(super) fn start_missing_workers(self: &Rc<Self>, reactor: &mut Reactor) {
        loop {
            let Some(place) = self.state.borrow().free_place() else {
                return;
            };
            let id = {
                let mut state = self.state.borrow_mut();
                state.next_worker += 1;
                state.is_starting = true;
                WorkerId(state.next_worker - 1)
            };
            self.arm_tick(reactor);
            let mut settings = ChannelSettings::new(Role::DISPATCHER, Role::WORKER);
            settings.handshake_timeout = self.state.borrow().settings.start_timeout;
            settings.versions = VERSIONS;
            let link = WorkerEnd {
                shared: Rc::clone(self),
                worker: id,
            };
            let end = Channel::new(settings, link);
            let started = self.spawn.borrow_mut().start(reactor, id, end);
            let installed = started.and_then(|started| self.install(reactor, id, place, started));
            self.state.borrow_mut().is_starting = false;
            if let Err(error) = installed {
                self.not_started(reactor, id, place, error);
            }
        }
    }

    fn not_started(
        self: &Rc<Self>,
        reactor: &mut Reactor,
        id: WorkerId,
        place: usize,
        error: std::io::Error,
    ) {
        log::error!(target: log::HANDOFF, "cannot start {id}: {error}");
        let mut state = self.state.borrow_mut();
        state.counts.not_started += 1;
        state.start_has_failed(place);
        let failures = state.failed_starts.saturating_add(1);
        drop(state);
        self.tell(
            reactor,
            PoolEvent::NotStarted {
                worker: id,
                error,
                failures,
            },
        );
        self.start_failed(reactor);
        self.replace_later(reactor, place);
    }

    /// A start has brought nothing, which may be the last that is allowed.
    fn start_failed(self: &Rc<Self>, reactor: &mut Reactor) {
        let mut state = self.state.borrow_mut();
        let had_given_up = state.has_given_up();
        state.failed_starts = state.failed_starts.saturating_add(1);
        let failures = state.failed_starts;
        let gives_up = state.has_given_up() && !had_given_up;
        drop(state);
        if gives_up {
            log::error!(
                target: log::HANDOFF,
                "{failures} workers in a row could not be started: no more are tried"
            );
            self.tell(reactor, PoolEvent::GaveUp { failures });
        }
    }

    /// Takes in a process that was just started.
    pub(super) fn install(
        self: &Rc<Self>,
        reactor: &mut Reactor,
        id: WorkerId,
        place: usize,
        started: StartedWorker,
    ) -> std::io::Result<()> {
        let StartedWorker { channel, process } = started;
        let pid = process.pid();
        // It is on the list that this belongs to.
        let shared = Rc::downgrade(self);
        let process = ChildWatch::start(reactor, process, move |reactor, status| {
            if let Some(shared) = shared.upgrade() {
                shared.ended(reactor, id, status);
            }
        });
        let channel = match channel {
            Ok(channel) => channel,
            Err(error) => {
                if let Err(error) = process.kill() {
                    log::warn!(target: log::HANDOFF, "cannot kill process {pid}: {error}");
                }
                let leaving = Leaving {
                    id,
                    pid,
                    process,
                    held: VecDeque::new(),
                    kill_at: None,
                    ended: None,
                };
                self.leave(reactor, leaving);
                return Err(error);
            }
        };
        #[cfg(feature = "inspect")]
        reactor.tally(channel.into(), &self.tally);
        let mut state = self.state.borrow_mut();
        state.counts.started += 1;
        let now = reactor.now();
        let member = Member::starting(id, place, (pid, process), channel, now);
        state.workers.push(member);
        Ok(())
    }

    /// Starts the next worker in this place: now, or after a wait that grows.
    pub(super) fn replace_later(self: &Rc<Self>, reactor: &mut Reactor, place: usize) {
        let wait = self.state.borrow_mut().await_replacement(place);
        let shared = Rc::clone(self);
        reactor.call_later(wait, move |reactor| {
            shared.state.borrow_mut().replacement_is_due(place);
            shared.start_missing_workers(reactor);
        });
    }

    /// Cuts a hung worker off. It is told, so that it knows that we live; then nothing that
    /// it says can reach us any more. What it has said by then is read to the end, and the
    /// rest it has not begun, nor ever can: that goes to others (see
    /// [`lost`](Self::lost)).
    fn recall(self: &Rc<Self>, reactor: &mut Reactor, id: WorkerId) {
        let now = reactor.now();
        let mut state = self.state.borrow_mut();
        let within = state.settings.drain_timeout;
        let within = within.unwrap_or(state.settings.exit_timeout);
        state.put_on_channel(reactor, id, now);
        let Some(worker) = state.worker(id) else {
            return;
        };
        let (handle, pid) = (worker.channel, worker.pid);
        let Some(channel) = reactor.get(handle) else {
            return;
        };
        if let Err(error) = wire::send(channel, &ToWorker::Recall, Vec::new()) {
            // The channel has ended, which is going to be told.
            log::debug!(target: log::HANDOFF, "{id}: {error}");
            return;
        }
        worker.stage = WorkerStage::Recalled;
        worker.drain_deadline = Some(moment_after(now, within));
        state.counts.recalls += 1;
        drop(state);
        let all = channel.bytes_sent() + channel.unsent_bytes() as u64;
        let refuse = move |reactor: &mut Reactor, sent: Result<(), NotSent>| {
            if sent.is_ok()
                && let Some(channel) = reactor.get(handle)
                && let Err(error) = channel.refuse_input()
            {
                log::warn!(target: log::HANDOFF, "{id} cannot be recalled: {error}");
            }
        };
        channel.when_sent(all, Box::new(refuse));
        self.tell(reactor, PoolEvent::Recalled { worker: id, pid });
        self.start_missing_workers(reactor);
    }

    pub(super) fn ready(self: &Rc<Self>, reactor: &mut Reactor, id: WorkerId, version: u16) {
        let mut state = self.state.borrow_mut();
        let Some(worker) = state.worker(id) else {
            return;
        };
        if worker.stage != WorkerStage::Starting {
            // It was killed meanwhile.
            return;
        }
        worker.stage = WorkerStage::Serving;
        worker.was_ready = true;
        worker.shares_messages = version >= SHARES_MESSAGES;
        let pid = worker.pid;
        if !state.has_given_up() {
            state.failed_starts = 0;
        }
        drop(state);
        // A channel cannot be reached from its own callback.
        let shared = Rc::clone(self);
        reactor.defer(move |reactor| shared.seat_worker(reactor, id));
        self.tell(reactor, PoolEvent::Ready { worker: id, pid });
        self.pump_later(reactor);
    }

    pub(super) fn answered(
        self: &Rc<Self>,
        reactor: &mut Reactor,
        id: WorkerId,
        answer: &FromWorker,
    ) {
        let answered = self.state.borrow_mut().answered(id, answer, reactor.now());
        let Some(Answered {
            event,
            drains,
            has_use,
            moved,
        }) = answered
        else {
            return;
        };
        if let Some(origin) = moved {
            self.settle(reactor, origin, ToWorker::HasMoved { id: origin.1 });
        }
        if let Some(event) = event {
            self.tell(reactor, event);
        }
        if let Some(place) = drains {
            self.replace_later(reactor, place);
        }
        if has_use {
            self.pump_later(reactor);
        }
    }

    /// A worker does not want a connection that it has accepted.
    pub(super) fn declined(
        self: &Rc<Self>,
        reactor: &mut Reactor,
        id: WorkerId,
        dispatch: Dispatch,
        reason: WorkerRefusal,
        mut descriptors: Vec<OwnedFd>,
    ) {
        let Some(socket) = descriptors.pop() else {
            log::error!(target: log::HANDOFF, "{id}: a connection that it does not want was lost");
            return;
        };
        let connection = PassedConnection {
            peer: dispatch.peer,
            label: dispatch.label,
            ..PassedConnection::new(socket)
        };
        let now = reactor.now();
        self.state
            .borrow_mut()
            .declined(id, connection, reason, now);
        self.pump_later(reactor);
        self.arm_tick(reactor);
    }

    /// Has the pool have so many workers.
    pub(super) fn resize(self: &Rc<Self>, reactor: &mut Reactor, workers: usize) {
        let surplus: Vec<WorkerId> = {
            let state = &mut *self.state.borrow_mut();
            state.settings.workers = workers;
            let settings = &state.settings;
            state.places.resize_with(workers, || Place::new(settings));
            let all = state.workers.iter();
            let surplus = all.filter(|it| it.place >= workers && it.is_staying());
            surplus.map(|it| it.id).collect()
        };
        // New ones go to the others before these stop to accept.
        self.reseat(reactor);
        let mut state = self.state.borrow_mut();
        let within = state.settings.drain_timeout;
        let within = within.unwrap_or(state.settings.exit_timeout);
        for worker in surplus {
            state.drain_worker(reactor, worker, within);
        }
        drop(state);
        let shared = Rc::clone(self);
        reactor.defer(move |reactor| shared.start_missing_workers(reactor));
        self.arm_tick(reactor);
    }

    /// The channel has ended: with it, everything that the worker had not answered
    /// is ours again; where it broke, once the worker is gone.
    pub(super) fn lost(
        self: &Rc<Self>,
        reactor: &mut Reactor,
        id: WorkerId,
        error: Option<&ChannelError>,
        reason: &CloseReason,
    ) {
        let mut state = self.state.borrow_mut();
        let Some(place) = state.workers.iter().position(|worker| worker.id == id) else {
            return;
        };
        if matches!(reason, CloseReason::ReactorStopped) {
            state.has_been_cut();
        }
        let mut worker = state.workers.remove(place);
        let now = reactor.now();
        let heir = state.heir.take_if(|heir| heir.id == id);
        let is_heir = heir.is_some();
        if let Some(heir) = heir {
            heir.end();
        }
        let was_asked = worker.drain_deadline.is_some() || is_heir;
        let event = worker.lost(now);
        if has_broken(error, reason) {
            let why: &dyn fmt::Display = error.map_or(reason, |error| error);
            log::warn!(target: log::HANDOFF, "{id}, process {}: {why}", worker.pid);
            worker.kill();
        } else {
            state.take_back(&mut worker.in_flight);
        }
        let is_death = matches!(state.life, PoolLife::Running) && !was_asked;
        let is_failed_start = is_death && !worker.was_ready;
        if is_death {
            state.counts.deaths += 1;
            state.judge_life(worker.place, now.saturating_duration_since(worker.started));
        }
        let place = worker.place;
        let kill_at = worker.kill_at(moment_after(now, state.settings.exit_timeout));
        let mut leaving = worker.leave(kill_at);
        if is_heir {
            // Its end is the end of its channel.
            leaving.kill_at = None;
        }
        // One that had said that it drains has its replacement.
        let needs_replacement = is_death && state.is_free(place);
        drop(state);
        self.leave(reactor, leaving);
        self.tell(reactor, event);
        if is_failed_start {
            self.start_failed(reactor);
        }
        if needs_replacement {
            self.replace_later(reactor, place);
        } else {
            let shared = Rc::clone(self);
            reactor.defer(move |reactor| shared.start_missing_workers(reactor));
        }
        self.pump_later(reactor);
        self.arm_tick(reactor);
    }

    /// Waits for a process without a channel to end.
    pub(super) fn leave(self: &Rc<Self>, reactor: &mut Reactor, mut leaving: Leaving) {
        let id = leaving.id;
        let process = leaving.process.clone();
        let ended = leaving.ended.take();
        self.state.borrow_mut().leaving.push(leaving);
        if let Some(status) = ended {
            let shared = Rc::clone(self);
            reactor.defer(move |reactor| shared.ended(reactor, id, status));
        } else {
            // It may have ended before its channel was seen to.
            process.look(reactor);
            process.look_every(reactor, TICK);
        }
        self.arm_tick(reactor);
    }

    /// A process has ended.
    fn ended(
        self: &Rc<Self>,
        reactor: &mut Reactor,
        id: WorkerId,
        status: std::io::Result<ExitStatus>,
    ) {
        let mut state = self.state.borrow_mut();
        if let Some(worker) = state.worker(id) {
            // Its channel is going to say so too, once it is read out.
            worker.ended = Some(status);
            let channel = worker.channel;
            reactor.call_later(CHANNEL_GRACE, move |reactor| {
                if let Some(channel) = reactor.get(channel) {
                    log::warn!(target: log::HANDOFF, "{id} is gone, and somebody else has its channel");
                    channel.abort_connection();
                }
            });
            return;
        }
        let Some(place) = state.leaving.iter().position(|leaving| leaving.id == id) else {
            return;
        };
        let mut leaving = state.leaving.remove(place);
        let pid = leaving.pid;
        if let Err(error) = &status {
            log::warn!(target: log::HANDOFF, "{id}, process {pid}: cannot tell how it ended: {error}");
        }
        if !leaving.held.is_empty() {
            state.take_back(&mut leaving.held);
            self.pump_later(reactor);
        }
        drop(state);
        let status = status.ok();
        let worker = id;
        self.tell(
            reactor,
            PoolEvent::Exited {
                worker,
                pid,
                status,
            },
        );
        self.advance_stop(reactor);
    }

    // Time.

    pub(super) fn arm_tick(self: &Rc<Self>, reactor: &mut Reactor) {
        let mut state = self.state.borrow_mut();
        if state.tick.is_none() && state.needs_tick() {
            let shared = Rc::clone(self);
            state.tick = Some(reactor.now() + TICK);
            reactor.call_later(TICK, move |reactor| shared.tick(reactor));
        }
    }

    pub(super) fn tick(self: &Rc<Self>, reactor: &mut Reactor) {
        self.look_at_queues(reactor);
        self.end_closing(reactor);
        let (events, late, has_panicked, recalled) = {
            let state = &mut *self.state.borrow_mut();
            let now = reactor.now();
            let due = state.tick.take().unwrap_or(now);
            let too_late = now.saturating_duration_since(due);
            if too_late > STALL {
                state.leave_out(too_late);
            }
            let events = state.look_at_workers(now);
            state.kill_late_leavers(now);
            (
                events,
                state.take_late(now),
                mem::take(&mut state.is_starting),
                state.to_be_recalled(),
            )
        };
        for (job, why) in late {
            self.undelivered(reactor, job, why);
        }
        for event in events {
            self.tell(reactor, event);
        }
        if has_panicked {
            let id = WorkerId(self.state.borrow().next_worker - 1);
            let place = self.state.borrow().free_place().unwrap_or(usize::MAX);
            let error = std::io::Error::other("it panicked");
            self.not_started(reactor, id, place, error);
        }
        for id in recalled {
            self.recall(reactor, id);
        }
        self.pump(reactor);
        self.arm_tick(reactor);
    }

    // Stopping.

    pub(super) fn stop(
        self: &Rc<Self>,
        reactor: &mut Reactor,
        within: Duration,
        then: Option<StopCall>,
    ) {
        let mut state = self.state.borrow_mut();
        let hold = reactor.hold(SystemEvent::Shutdown);
        let until = moment_after(reactor.now(), within);
        // Who hangs is known then, and what it had is with others.
        let settling = (state.settings.ack_timeout * 2).min(within / 2);
        match &mut state.life {
            PoolLife::Running => {
                state.life = PoolLife::Stopping {
                    deadline: until,
                    settled_by: moment_after(reactor.now(), settling),
                    then: then.into_iter().collect(),
                    _holds: vec![hold],
                };
            }
            PoolLife::Stopping {
                deadline,
                then: calls,
                ..
            } => {
                *deadline = until.min(*deadline);
                calls.extend(then);
            }
            PoolLife::Stopped => {
                if let Some(then) = then {
                    reactor.defer(then);
                }
            }
        }
        drop(state);
        self.unshare_all(reactor);
        self.pump_later(reactor);
        self.arm_tick(reactor);
    }

    /// Takes the next step of stopping, if there is one to take.
    pub(super) fn advance_stop(self: &Rc<Self>, reactor: &mut Reactor) {
        let mut state = self.state.borrow_mut();
        let PoolLife::Stopping {
            deadline,
            settled_by,
            ..
        } = state.life
        else {
            return;
        };
        let settles = reactor.now() < settled_by && !state.is_settled();
        if settles || !state.waiting.is_empty() {
            return;
        }
        let within = deadline.saturating_duration_since(reactor.now());
        let heir = state.heir.as_ref().map(|heir| heir.id);
        let all = state.workers.iter().map(|worker| worker.id);
        let mut serving: Vec<WorkerId> = all.filter(|id| Some(*id) != heir).collect();
        let is_alone = serving.is_empty() && state.leaving.is_empty();
        let has_given = |it: &Member| it.in_flight.is_empty();
        if is_alone && state.workers.iter().all(has_given) {
            // Nobody has anything more for it.
            serving.extend(heir);
        }
        for id in serving {
            state.drain_worker(reactor, id, within);
        }
        if !state.workers.is_empty() || !state.leaving.is_empty() {
            return;
        }
        let PoolLife::Stopping { then, .. } = mem::replace(&mut state.life, PoolLife::Stopped)
        else {
            return;
        };
        drop(state);
        for call in then {
            reactor.defer(call);
        }
    }
}
