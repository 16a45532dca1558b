//! What a pool knows; changed here, and told to nobody from here.

use std::collections::VecDeque;
use std::io;
use std::mem;
use std::os::fd::OwnedFd;
use std::process::ExitStatus;
use std::rc::Rc;
use std::slice;
use std::time::{Duration, Instant};

use bowline_protocol::policies::Backoff;
use bowline_protocol::{ListenerHandle, PassedDescriptor, TransportState, UnixTransportHandle};
use bowline_reactor::{Hold, Reactor};
use bowline_transport::{ChildWatch, close_received};

use super::WorkerId;
use super::closing::ClosingListener;
use super::connection::PassedConnection;
use super::dispatcher::REFUSAL_PAUSE;
use super::heir::Heir;
use super::messages::{
    AcceptStage, DISPATCH_ALL, Dispatch, FromWorker, MovedRecord, ToWorker, WorkerRefusal,
    encode_all,
};
use super::policy::{Candidate, Offer};
use super::settings::{
    PoolEvent, PoolSettings, PoolStatistics, Undelivered, WorkerStage, WorkerStatistics,
};
use super::sharing::SharedListener;
use crate::log;
use crate::wire;

pub(super) type StopCall = Box<dyn FnOnce(&mut Reactor)>;

pub(super) struct PoolState {
    pub(super) settings: PoolSettings,
    /// With a channel; oldest first.
    pub(super) workers: Vec<Member>,
    /// Without a channel any more, and not known to be gone.
    pub(super) leaving: Vec<Leaving>,
    pub(super) waiting: VecDeque<Box<Job>>,
    pub(super) undelivered: VecDeque<(Box<Job>, Undelivered)>,
    /// Listeners that were paused, to be resumed.
    pub(super) paused: Vec<ListenerHandle>,
    /// Listeners on which workers accept by themselves.
    pub(super) shared: Vec<SharedListener>,
    /// Those of them that workers are to close.
    pub(super) closing: Vec<ClosingListener>,
    pub(super) next_shared: u32,
    /// The process that has taken over, as a worker: it is given everything.
    pub(super) heir: Option<Heir>,
    /// What it is called, also when it is gone: nobody is told of it.
    pub(super) heir_id: Option<WorkerId>,
    /// Listeners that are open to workers before they have started.
    pub(super) opened: Vec<ListenerHandle>,
    /// Our end of a channel to whoever takes over.
    pub(super) heir_end: Option<OwnedFd>,
    /// One for each worker that there is to be.
    pub(super) places: Vec<Place>,
    /// Code of the user is starting a worker, or has panicked meanwhile.
    pub(super) is_starting: bool,
    /// How many starts have failed since a worker was ready.
    pub(super) failed_starts: u32,
    pub(super) next_worker: u64,
    pub(super) next_delivery: u64,
    /// When the next tick is to be.
    pub(super) tick: Option<Instant>,
    pub(super) life: PoolLife,
    pub(super) counts: PoolStatistics,
}

/// A place in the pool, with one worker after the other in it.
pub(super) struct Place {
    /// The waits after deaths that follow on each other.
    backoff: Backoff,
    /// How many workers in a row have died young.
    young_deaths: u32,
    /// A start in it is scheduled.
    is_awaited: bool,
}

pub(super) enum PoolLife {
    Running,
    Stopping {
        deadline: Instant,
        /// Until then no worker is told to end while there is something that another worker
        /// may not have taken, and that may have to go to it.
        settled_by: Instant,
        then: Vec<StopCall>,
        _holds: Vec<Hold>,
    },
    Stopped,
}

pub(super) struct Member {
    pub(super) id: WorkerId,
    pub(super) pid: u32,
    pub(super) channel: UnixTransportHandle,
    pub(super) process: ChildWatch,
    /// Which [`Place`] it is in.
    pub(super) place: usize,
    pub(super) stage: WorkerStage,
    /// It has said hello.
    pub(super) was_ready: bool,
    /// Unanswered, oldest first.
    pub(super) in_flight: VecDeque<Box<Job>>,
    /// How many of these, the last ones, are not on its channel yet.
    pub(super) unsent: usize,
    /// Whether it knows messages with several connections.
    pub(super) shares_messages: bool,
    /// How many connections were put on its channel, and of them left: what is kept
    /// here, since somebody of our user has too many descriptors in flight, it cannot
    /// answer.
    pub(super) given: u64,
    pub(super) left: u64,
    pub(super) live: u32,
    pub(super) acknowledged: u64,
    pub(super) refused: u64,
    pub(super) started: Instant,
    /// When it last answered; its start before that.
    pub(super) answered: Instant,
    /// Not given anything before then.
    pub(super) not_before: Option<Instant>,
    /// How many connections it has accepted by itself, and whether it takes no more now.
    pub(super) accepted: u64,
    pub(super) is_full: bool,
    /// Since when it leaves connections in its own queue and says nothing; and whether it
    /// was asked.
    pub(super) silent_since: Option<Instant>,
    pub(super) was_asked: bool,
    /// When a draining one is ended.
    pub(super) drain_deadline: Option<Instant>,
    /// How its process has ended, if that was before its channel did.
    pub(super) ended: Option<io::Result<ExitStatus>>,
}

pub(super) struct Leaving {
    pub(super) id: WorkerId,
    pub(super) pid: u32,
    pub(super) process: ChildWatch,
    /// What it had not answered when its channel broke: it may have begun, or be about
    /// to, so that others get it when it is gone.
    pub(super) held: VecDeque<Box<Job>>,
    pub(super) kill_at: Option<Instant>,
    pub(super) ended: Option<io::Result<ExitStatus>>,
}

/// What follows from what a worker said.
pub(super) struct Answered {
    pub(super) event: Option<PoolEvent>,
    /// It takes no more: another is to be started in its place.
    pub(super) drains: Option<usize>,
    /// Whether there is something that can be given out now.
    pub(super) has_use: bool,
    /// A connection has moved from this worker, where it had this number.
    pub(super) moved: Option<(WorkerId, u64)>,
}

/// A connection that nobody has taken yet.
pub(super) struct Job {
    /// Ours, until somebody has taken it.
    socket: KeptSocket,
    /// What else moves with it.
    more: Vec<Rc<OwnedFd>>,
    /// The worker that it moves from, and its number there: it has it back, if nobody else
    /// takes it.
    pub(super) origin: Option<(WorkerId, u64)>,
    pub(super) dispatch: Dispatch,
    pub(super) attempts: u32,
    pub(super) refused_by: Vec<(WorkerId, WorkerRefusal)>,
    /// Since when it waits here, or is with a worker.
    pub(super) since: Instant,
    /// Its place among those that its worker was given, from 1 on; or [`NOT_LEFT`].
    place: u64,
}

/// The socket of a connection, shared with the channel's queue.
///
/// Of a UNIX socket it may be the last copy that is closed here, when its worker is
/// done with it already: then what its client sent and nobody read goes with it, which
/// can make the close wait.
struct KeptSocket {
    /// There until it is taken.
    fd: Option<Rc<OwnedFd>>,
    is_tcp: bool,
}

impl Drop for KeptSocket {
    fn drop(&mut self) {
        if let Some(fd) = self.fd.take().and_then(Rc::into_inner)
            && !self.is_tcp
        {
            close_received(fd);
        }
    }
}

/// The place of a connection that is not on its worker's channel yet.
const NOT_LEFT: u64 = u64::MAX;

/// How many connections share a message at the most, and how many bytes of theirs. So much
/// the kernel passes in one piece.
const SHARE_A_MESSAGE: usize = 64;
const SHARED_BYTES: usize = 16_384;

/// As long as nobody waits: 136 years.
const FOREVER: Duration = Duration::from_secs(1 << 32);

/// When so much time has passed, be it more than a clock can tell.
pub(super) fn moment_after(now: Instant, time: Duration) -> Instant {
    now + time.min(FOREVER)
}

impl PoolState {
    pub(super) fn worker(&mut self, id: WorkerId) -> Option<&mut Member> {
        self.workers.iter_mut().find(|worker| worker.id == id)
    }

    /// A place that a worker is to be started in.
    pub(super) fn free_place(&self) -> Option<usize> {
        (0..self.places.len()).find(|place| self.is_free(*place))
    }

    /// Whether nobody is in this place, nor awaited in it, and somebody is to be.
    pub(super) fn is_free(&self, place: usize) -> bool {
        let mut staying = self.workers.iter().filter(|worker| worker.is_staying());
        let is_awaited = self.places.get(place).is_none_or(|place| place.is_awaited);
        !is_awaited && !staying.any(|worker| worker.place == place) && self.missing_workers() > 0
    }

    /// Those that hang, where those are recalled.
    pub(super) fn to_be_recalled(&self) -> Vec<WorkerId> {
        let hung = |worker: &&Member| worker.stage == WorkerStage::Hung;
        let hung = self.workers.iter().filter(hung);
        let hung = hung.filter(|_| self.settings.recalls);
        hung.map(|worker| worker.id).collect()
    }

    pub(super) fn missing_workers(&self) -> usize {
        let staying = self.workers.iter().filter(|worker| worker.is_staying());
        match self.life {
            PoolLife::Running if !self.has_given_up() => {
                self.settings.workers.saturating_sub(staying.count())
            }
            PoolLife::Running | PoolLife::Stopping { .. } | PoolLife::Stopped => 0,
        }
    }

    /// Whether no worker is started any more, since so many could not be.
    pub(super) fn has_given_up(&self) -> bool {
        let limit = self.settings.max_failed_starts;
        limit.is_some_and(|limit| self.failed_starts >= limit.max(1))
    }

    /// A worker could not be started in this place: there is nothing to be lost by a wait.
    pub(super) fn start_has_failed(&mut self, place: usize) {
        if let Some(place) = self.places.get_mut(place) {
            place.young_deaths = place.young_deaths.saturating_add(2);
        }
    }

    /// A worker in this place has died, or goes.
    pub(super) fn judge_life(&mut self, place: usize, lived: Duration) {
        let is_old = lived >= self.settings.stable_after;
        let Some(place) = self.places.get_mut(place) else {
            return;
        };
        if is_old {
            place.young_deaths = 0;
            place.backoff.reset();
        } else {
            place.young_deaths = place.young_deaths.saturating_add(1);
        }
    }

    /// Has the next worker of this place be awaited, for the time that is answered.
    pub(super) fn await_replacement(&mut self, place: usize) -> Duration {
        let Some(place) = self.places.get_mut(place) else {
            return Duration::ZERO;
        };
        place.is_awaited = true;
        if place.young_deaths > 1 {
            place.backoff.next_wait()
        } else {
            Duration::ZERO
        }
    }

    pub(super) fn replacement_is_due(&mut self, place: usize) {
        if let Some(place) = self.places.get_mut(place) {
            place.is_awaited = false;
        }
    }

    pub(super) fn anybody_has_room(&self, now: Instant) -> bool {
        self.workers
            .iter()
            .any(|worker| worker.has_room(&self.settings, now))
    }

    /// Whether the next one would be given out at once.
    pub(super) fn has_room(&self, now: Instant) -> bool {
        self.is_next_first() && self.anybody_has_room(now)
    }

    /// Whether one that comes goes before those that wait: they wait for somebody who
    /// has not refused them, which is not to hold up everybody else.
    pub(super) fn is_next_first(&self) -> bool {
        self.waiting.is_empty()
            || self.waiting.len() < self.settings.queue
                && self.waiting.iter().all(|job| job.was_refused())
    }

    /// Has one that was refused wait, after those that were refused before it, and
    /// before all others.
    pub(super) fn wait_for_another(&mut self, job: Box<Job>) {
        let refused = self.waiting.iter().take_while(|job| job.was_refused());
        let place = refused.count();
        self.waiting.insert(place, job);
    }

    /// Whether connections go to this one: all go to whoever has taken over.
    fn is_asked(&self, worker: WorkerId) -> bool {
        self.heir.as_ref().is_none_or(|heir| heir.id == worker)
    }

    /// Fills the list with the workers that can take this one.
    pub(super) fn candidates(&self, now: Instant, job: &Job, candidates: &mut Vec<Candidate>) {
        candidates.clear();
        candidates.extend(
            self.workers
                .iter()
                .filter(|worker| {
                    self.is_asked(worker.id)
                        && worker.has_room(&self.settings, now)
                        && !job.was_refused_by(worker.id)
                })
                .map(|worker| Candidate {
                    worker: worker.id,
                    live: worker.live,
                    in_flight: worker.in_flight.len(),
                    window: self.settings.window,
                }),
        );
    }

    /// Why there is nobody left to give this one to, if so.
    pub(super) fn is_hopeless(&self, job: &Job) -> Option<Undelivered> {
        if job.attempts >= self.settings.max_attempts {
            return Some(Undelivered::TooManyAttempts);
        }
        if job.origin.is_some() && self.heir.is_none() {
            // It goes on where it is.
            return Some(Undelivered::Stopped);
        }
        let is_stopping = !matches!(self.life, PoolLife::Running);
        if is_stopping && !self.workers.iter().any(Member::is_staying) {
            // Those that end take nothing, and none is started any more.
            return Some(Undelivered::Stopped);
        }
        let &(_, reason) = job.refused_by.last()?;
        let asked = self.workers.iter().filter(|it| self.is_asked(it.id));
        let mut staying = asked.filter(|worker| worker.is_staying());
        // One that hangs may recover, and one that is missing is replaced.
        let is_hopeless = match reason {
            // No other will find that it is one.
            WorkerRefusal::WrongKind => true,
            _ => staying.all(|worker| job.was_refused_by(worker.id)) && self.missing_workers() == 0,
        };
        is_hopeless.then_some(Undelivered::Refused(reason))
    }

    /// Gives a connection to a worker. It leaves with those that follow in this turn, by
    /// [`put_on_channels`](Self::put_on_channels).
    pub(super) fn assign(
        &mut self,
        reactor: &mut Reactor,
        id: WorkerId,
        mut job: Box<Job>,
        now: Instant,
    ) -> Result<(), Box<Job>> {
        let delivery = self.next_delivery;
        let Some(worker) = self.worker(id) else {
            return Err(job);
        };
        let channel = reactor.get(worker.channel);
        if channel.is_none_or(|channel| channel.state() != TransportState::Connected) {
            log::debug!(target: log::HANDOFF, "{id}: its channel has ended");
            worker.not_before = Some(now + REFUSAL_PAUSE);
            return Err(job);
        }
        job.dispatch.id = delivery;
        job.attempts += 1;
        job.since = now;
        job.place = NOT_LEFT;
        worker.in_flight.push_back(job);
        worker.unsent += 1;
        self.next_delivery += 1;
        self.counts.sent += 1;
        Ok(())
    }

    /// Puts what workers were given on their channels. Returns whether there is something
    /// to be given to others, since a channel did not take it.
    pub(super) fn put_on_channels(&mut self, reactor: &mut Reactor, now: Instant) -> bool {
        let with_some = self.workers.iter().filter(|worker| worker.unsent > 0);
        let ids: Vec<WorkerId> = with_some.map(|worker| worker.id).collect();
        let mut has_back = false;
        for id in ids {
            has_back |= self.put_on_channel(reactor, id, now);
        }
        has_back
    }

    /// The same of one worker, before it is told something else.
    pub(super) fn put_on_channel(
        &mut self,
        reactor: &mut Reactor,
        id: WorkerId,
        now: Instant,
    ) -> bool {
        let Some(worker) = self.worker(id) else {
            return false;
        };
        while worker.unsent > 0 {
            if let Err(error) = worker.put_next_message(reactor) {
                log::debug!(target: log::HANDOFF, "{id}: its channel takes nothing: {error}");
                worker.not_before = Some(now + REFUSAL_PAUSE);
                let mut back = worker.in_flight.split_off(worker.first_unsent());
                worker.unsent = 0;
                self.counts.sent -= back.len() as u64;
                back.iter_mut().for_each(|job| job.attempts -= 1);
                back.append(&mut self.waiting);
                self.waiting = back;
                return true;
            }
        }
        false
    }

    /// Takes note that so many of the connections that a worker was given have left.
    pub(super) fn have_left(&mut self, id: WorkerId, count: usize, now: Instant) {
        let Some(worker) = self.worker(id) else {
            return;
        };
        let before = worker.left;
        worker.left += count as u64;
        let left = before + 1..=worker.left;
        for job in &mut worker.in_flight {
            if left.contains(&job.place) {
                job.since = now;
            }
        }
    }

    /// Has what a worker did not answer wait for another: oldest first, before what came
    /// later.
    pub(super) fn take_back(&mut self, unanswered: &mut VecDeque<Box<Job>>) {
        self.counts.resent += unanswered.len() as u64;
        unanswered.append(&mut self.waiting);
        mem::swap(unanswered, &mut self.waiting);
    }

    pub(super) fn drain_worker(&mut self, reactor: &mut Reactor, id: WorkerId, within: Duration) {
        let now = reactor.now();
        let deadline = moment_after(now, within);
        // These go before the word that no more come.
        self.put_on_channel(reactor, id, now);
        let Some(worker) = self.worker(id) else {
            return;
        };
        match worker.stage {
            // It has nothing.
            WorkerStage::Starting => {
                worker.drain_deadline = Some(deadline);
                return worker.kill();
            }
            WorkerStage::Serving | WorkerStage::Hung => {}
            WorkerStage::Draining if worker.drain_deadline.is_none() => {}
            WorkerStage::Draining | WorkerStage::Recalled | WorkerStage::Killed => return,
        }
        if let Some(channel) = reactor.get(worker.channel) {
            let within_ms = u32::try_from(within.as_millis()).unwrap_or(u32::MAX);
            if let Err(error) = wire::send(channel, &ToWorker::Drain { within_ms }, Vec::new()) {
                // The channel has ended, which is going to be told.
                log::debug!(target: log::HANDOFF, "{id}: {error}");
            }
        }
        worker.stage = WorkerStage::Draining;
        worker.drain_deadline = Some(deadline);
    }

    pub(super) fn needs_tick(&self) -> bool {
        self.is_starting
            || self.are_queues_busy()
            || !self.closing.is_empty()
            || !self.waiting.is_empty()
            || !self.paused.is_empty()
            || !self.leaving.is_empty()
            || matches!(self.life, PoolLife::Stopping { .. })
            || self.workers.iter().any(|worker| {
                // One that was asked is to answer, also when others have served what
                // waited for it.
                !worker.in_flight.is_empty() || worker.was_asked || worker.drain_deadline.is_some()
            })
    }

    /// Leaves out a time in which this process was stopped: what workers said then is
    /// still to be heard, and they may have been stopped with it.
    pub(super) fn leave_out(&mut self, time: Duration) {
        let later = |instant: &mut Instant| *instant += time;
        for worker in &mut self.workers {
            later(&mut worker.answered);
            worker.silent_since.iter_mut().for_each(later);
            worker.drain_deadline.iter_mut().for_each(later);
            worker
                .in_flight
                .iter_mut()
                .for_each(|job| later(&mut job.since));
        }
        for leaving in &mut self.leaving {
            leaving.kill_at.iter_mut().for_each(later);
            leaving
                .held
                .iter_mut()
                .for_each(|job| later(&mut job.since));
        }
        self.waiting
            .iter_mut()
            .for_each(|job| later(&mut job.since));
        self.closing.iter_mut().for_each(|it| later(&mut it.since));
        if let PoolLife::Stopping {
            deadline,
            settled_by,
            ..
        } = &mut self.life
        {
            later(deadline);
            later(settled_by);
        }
    }

    /// Whether anything waits for a worker to have room.
    fn waits_for_room(&self) -> bool {
        !self.waiting.is_empty()
            || !self.paused.is_empty()
            || matches!(self.life, PoolLife::Stopping { .. })
    }

    /// Takes note of what a worker says, if it is one that there is.
    pub(super) fn answered(
        &mut self,
        id: WorkerId,
        answer: &FromWorker,
        now: Instant,
    ) -> Option<Answered> {
        let (deliveries, live, refusal) = parts_of(answer)?;
        let worker = self.worker(id)?;
        let event = worker.answers(live, now);
        let mut drains = false;
        let mut more = 0;
        if let FromWorker::Accepts {
            accepted, stage, ..
        } = answer
        {
            (more, drains) = worker.accepts(*accepted, *stage);
        }
        let (place, lived) = (worker.place, now.saturating_duration_since(worker.started));
        let (mut refused, mut moved) = (None, None);
        for &delivery in deliveries {
            match (worker.take(delivery), refusal) {
                (Some(job), Some(reason)) => {
                    drains = worker.refuse(reason, now);
                    refused = Some((job, reason));
                }
                (Some(taken), None) => {
                    // Our copy is closed: the worker has its own.
                    moved = taken.origin;
                    worker.acknowledged += 1;
                    more += 1;
                }
                (None, _) => {
                    log::warn!(target: log::HANDOFF, "{id}: answers {delivery}, which it was not given");
                }
            }
        }
        self.counts.refused += u64::from(refused.is_some());
        self.counts.acknowledged += more;
        let has_use = refused.is_some() || self.waits_for_room();
        if let Some((mut job, reason)) = refused {
            job.refused_by.push((id, reason));
            job.since = now;
            self.wait_for_another(job);
        }
        if drains {
            self.judge_life(place, lived);
        }
        Some(Answered {
            event,
            drains: drains.then_some(place),
            has_use,
            moved,
        })
    }

    /// A worker has given us a connection that it has accepted and does not want.
    pub(super) fn declined(
        &mut self,
        id: WorkerId,
        connection: PassedConnection,
        reason: WorkerRefusal,
        now: Instant,
    ) {
        let mut job = Box::new(Job::new(connection, now));
        job.refused_by.push((id, reason));
        self.counts.refused += 1;
        if let Some(worker) = self.worker(id) {
            worker.refused += 1;
        }
        self.wait_for_another(job);
    }

    /// Whether no worker has something that may have to go to another one, which can take it:
    /// a connection that it has not answered, or a listener that it has not closed.
    pub(super) fn is_settled(&self) -> bool {
        let heir = self.heir.as_ref().map(|heir| heir.id);
        let serves = |it: &&Member| it.stage == WorkerStage::Serving && Some(it.id) != heir;
        let serving = self.workers.iter().filter(serves).count();
        let may_give_back = |worker: &Member| {
            // Whoever has taken over takes everything.
            let others = serving - usize::from(serves(&worker)) + usize::from(heir.is_some());
            let is_given_up = worker.stage == WorkerStage::Hung && !self.settings.recalls;
            others > 0 && !is_given_up && Some(worker.id) != heir
        };
        let mut workers = self.workers.iter().filter(|it| may_give_back(it));
        let mut leaving = self.leaving.iter();
        self.closing.is_empty()
            && workers.all(|worker| worker.in_flight.is_empty())
            && (serving == 0 && heir.is_none() || leaving.all(|leaving| leaving.held.is_empty()))
    }

    // Time.

    /// Whether the time for stopping has passed.
    fn is_over(&self, now: Instant) -> bool {
        matches!(&self.life, PoolLife::Stopping { deadline, .. } if now >= *deadline)
    }

    /// Finds those that hang, and kills those that do so for too long.
    pub(super) fn look_at_workers(&mut self, now: Instant) -> Vec<PoolEvent> {
        let is_over = self.is_over(now);
        let mut events = Vec::new();
        for worker in &mut self.workers {
            let oldest = worker.waits_since().unwrap_or(now);
            let age = now.saturating_duration_since(oldest);
            // One that goes on has much to answer that is old by then.
            let silence = now.saturating_duration_since(oldest.max(worker.answered));
            if worker.stage == WorkerStage::Serving && silence > self.settings.ack_timeout {
                worker.stage = WorkerStage::Hung;
                self.counts.hangs += 1;
                let (worker, pid) = (worker.id, worker.pid);
                events.push(PoolEvent::Hung { worker, pid });
            }
            let is_too_late = is_over
                || self.settings.kill_timeout.is_some_and(|limit| age > limit)
                || worker.drain_deadline.is_some_and(|limit| now >= limit);
            if is_too_late && worker.stage != WorkerStage::Killed {
                worker.kill();
            }
        }
        events
    }

    /// The reactor stops. Whoever of a pool that was stopping has not ended is killed: nobody
    /// is there to do so later.
    pub(super) fn has_been_cut(&mut self) {
        let life = mem::replace(&mut self.life, PoolLife::Stopped);
        if !matches!(life, PoolLife::Stopping { .. }) {
            return;
        }
        let heir = self.heir_id;
        let workers = self.workers.iter_mut();
        for worker in workers.filter(|it| Some(it.id) != heir && it.stage != WorkerStage::Killed) {
            log::warn!(target: log::HANDOFF, "{}, process {}, has not ended with the stop: killed", worker.id, worker.pid);
            worker.kill();
        }
        self.kill_late_leavers_by(|_| true);
    }

    /// Kills those that should have exited by now.
    pub(super) fn kill_late_leavers(&mut self, now: Instant) {
        let is_over = self.is_over(now);
        self.kill_late_leavers_by(|deadline| is_over || now >= deadline);
    }

    fn kill_late_leavers_by(&mut self, is_late: impl Fn(Instant) -> bool) {
        for leaving in &mut self.leaving {
            let kill_at = &mut leaving.kill_at;
            if kill_at.take_if(|deadline| is_late(*deadline)).is_some() {
                log::warn!(target: log::HANDOFF, "{}, process {}, does not exit: killed", leaving.id, leaving.pid);
                if let Err(error) = leaving.process.kill() {
                    log::warn!(target: log::HANDOFF, "cannot kill process {}: {error}", leaving.pid);
                }
            }
        }
    }

    /// Takes the connections that have waited for as long as they may.
    pub(super) fn take_late(&mut self, now: Instant) -> Vec<(Box<Job>, Undelivered)> {
        let is_over = self.is_over(now);
        let limit = self.settings.queue_timeout;
        let mut late = Vec::new();
        let held = self.leaving.iter_mut().map(|leaving| &mut leaving.held);
        for queue in held.chain([&mut self.waiting]) {
            let mut staying = VecDeque::with_capacity(queue.len());
            for job in queue.drain(..) {
                if is_over {
                    late.push((job, Undelivered::Stopped));
                } else if now.saturating_duration_since(job.since) > limit {
                    late.push((job, Undelivered::WaitedTooLong));
                } else {
                    staying.push_back(job);
                }
            }
            *queue = staying;
        }
        late
    }

    pub(super) fn statistics(&self) -> PoolStatistics {
        let workers = self.workers.iter().map(|worker| WorkerStatistics {
            id: worker.id,
            pid: worker.pid,
            stage: worker.stage,
            in_flight: worker.in_flight.len(),
            live: worker.live,
            acknowledged: worker.acknowledged,
            refused: worker.refused,
        });
        let given = self.workers.iter().map(|worker| worker.in_flight.len());
        let held = self.leaving.iter().map(|leaving| leaving.held.len());
        PoolStatistics {
            waiting: self.waiting.len(),
            in_flight: given.chain(held).sum(),
            is_paused: !self.paused.is_empty(),
            workers: workers.collect(),
            ..self.counts.clone()
        }
    }
}

impl Place {
    pub(super) fn all(settings: &PoolSettings) -> Vec<Self> {
        let place = |_| Self::new(settings);
        (0..settings.workers).map(place).collect()
    }

    pub(super) fn new(settings: &PoolSettings) -> Self {
        Self {
            backoff: settings.backoff.clone(),
            young_deaths: 0,
            is_awaited: false,
        }
    }
}

/// Which deliveries an answer is of, how many connections the worker has, and why it
/// refuses.
fn parts_of(answer: &FromWorker) -> Option<(&[u64], u32, Option<WorkerRefusal>)> {
    Some(match answer {
        FromWorker::Accepted { id, live } => (slice::from_ref(id), *live, None),
        FromWorker::AcceptedAll { ids, live } => (ids, *live, None),
        FromWorker::Refused { id, reason, live } => (slice::from_ref(id), *live, Some(*reason)),
        FromWorker::Load { live }
        | FromWorker::Accepts { live, .. }
        | FromWorker::Unlistened { live, .. } => (&[], *live, None),
        // See `declined` and `moving`.
        FromWorker::Declined { .. } | FromWorker::Moving { .. } => return None,
    })
}

impl Member {
    pub(super) fn starting(
        id: WorkerId,
        place: usize,
        (pid, process): (u32, ChildWatch),
        channel: UnixTransportHandle,
        now: Instant,
    ) -> Self {
        Self {
            id,
            pid,
            channel,
            process,
            place,
            stage: WorkerStage::Starting,
            was_ready: false,
            in_flight: VecDeque::new(),
            unsent: 0,
            shares_messages: false,
            given: 0,
            left: 0,
            live: 0,
            acknowledged: 0,
            refused: 0,
            started: now,
            answered: now,
            not_before: None,
            accepted: 0,
            is_full: false,
            silent_since: None,
            was_asked: false,
            drain_deadline: None,
            ended: None,
        }
    }

    /// Where those begin that are not on its channel yet.
    fn first_unsent(&self) -> usize {
        self.in_flight.len() - self.unsent
    }

    /// How many of those that are not on its channel yet make up the next message.
    fn next_message(&self) -> usize {
        let unsent = self.in_flight.range(self.first_unsent()..);
        let mut bytes = 0;
        let shares = unsent.take(SHARE_A_MESSAGE).take_while(|job| {
            bytes += job.dispatch.read.len() + job.dispatch.unsent.len();
            self.shares_messages && job.dispatch.moved.is_none() && bytes <= SHARED_BYTES
        });
        shares.count().max(1)
    }

    fn put_next_message(&mut self, reactor: &mut Reactor) -> io::Result<()> {
        let (from, count) = (self.first_unsent(), self.next_message());
        let jobs = self.in_flight.range(from..from + count);
        let descriptors: Vec<_> = jobs.clone().flat_map(|job| job.descriptors()).collect();
        let channel = reactor.get(self.channel);
        let channel = channel.ok_or(io::ErrorKind::NotConnected)?;
        let sent = match count {
            1 => wire::send(channel, &self.in_flight[from].dispatch, descriptors),
            _ => wire::send_of(channel, DISPATCH_ALL, descriptors, |payload| {
                encode_all(jobs.map(|job| &job.dispatch), payload);
            }),
        };
        sent.map_err(|error| io::Error::other(error.to_string()))?;
        for job in self.in_flight.range_mut(from..from + count) {
            self.given += 1 + job.more.len() as u64;
            job.place = self.given;
        }
        self.unsent -= count;
        Ok(())
    }

    /// Its channel has ended. What it has not answered is to go to others.
    pub(super) fn lost(&mut self, now: Instant) -> PoolEvent {
        let is_recalled = self.stage == WorkerStage::Recalled;
        for job in &mut self.in_flight {
            job.since = now;
            // Its copy lies unread in the channel, for as long as it hangs.
            job.dispatch.is_recalled |= is_recalled;
        }
        PoolEvent::Lost {
            worker: self.id,
            pid: self.pid,
            acknowledged: self.acknowledged,
            unanswered: self.in_flight.len(),
        }
    }

    /// When it is killed, if it has not ended by then.
    pub(super) fn kill_at(&self, at_the_latest: Instant) -> Instant {
        match (self.stage, self.drain_deadline) {
            // It serves what it had taken.
            (WorkerStage::Recalled, Some(deadline)) => deadline,
            _ => at_the_latest,
        }
    }

    /// It has said something. Answers an event where it was thought to hang.
    fn answers(&mut self, live: u32, now: Instant) -> Option<PoolEvent> {
        self.live = live;
        self.answered = now;
        self.not_before = None;
        self.silent_since = None;
        self.was_asked = false;
        if self.stage != WorkerStage::Hung {
            return None;
        }
        self.stage = WorkerStage::Serving;
        let (worker, pid) = (self.id, self.pid);
        Some(PoolEvent::Recovered { worker, pid })
    }

    pub(super) fn has_room(&self, settings: &PoolSettings, now: Instant) -> bool {
        let is_slow = |since| now.saturating_duration_since(since) > settings.slow_after;
        self.stage == WorkerStage::Serving
            && self.in_flight.len() < settings.window
            && !self.is_full
            && self.not_before.is_none_or(|time| now >= time)
            && !self.waits_since().is_some_and(is_slow)
    }

    /// Since when the oldest connection is with it that it has not answered, or waits for
    /// it to accept while it says nothing.
    fn waits_since(&self) -> Option<Instant> {
        // They leave in order.
        let oldest = self.in_flight.front();
        let oldest = oldest.filter(|job| job.place <= self.left);
        let oldest = oldest.map(|job| job.since);
        oldest.into_iter().chain(self.silent_since).min()
    }

    /// Takes note of how many connections it has accepted by itself. Answers how many that
    /// is more, and whether it drains from now on.
    fn accepts(&mut self, accepted: u64, stage: AcceptStage) -> (u64, bool) {
        let more = accepted.saturating_sub(self.accepted);
        self.accepted += more;
        self.acknowledged += more;
        self.is_full = stage == AcceptStage::Full;
        let drains = stage == AcceptStage::Draining
            && matches!(self.stage, WorkerStage::Serving | WorkerStage::Hung);
        if drains {
            self.stage = WorkerStage::Draining;
        }
        (more, drains)
    }

    /// Whether it counts as one of those that the pool is to have.
    pub(super) fn is_staying(&self) -> bool {
        match self.stage {
            // A killed one is replaced when its end is known.
            WorkerStage::Starting
            | WorkerStage::Serving
            | WorkerStage::Hung
            | WorkerStage::Killed => true,
            WorkerStage::Draining | WorkerStage::Recalled => false,
        }
    }

    pub(super) fn take(&mut self, delivery: u64) -> Option<Box<Job>> {
        // Answers come in order, mostly: the first place usually.
        let place = self
            .in_flight
            .range(..self.first_unsent())
            .position(|job| job.dispatch.id == delivery)?;
        self.in_flight.remove(place)
    }

    /// Takes note that it has refused a connection. Answers whether it drains.
    fn refuse(&mut self, reason: WorkerRefusal, now: Instant) -> bool {
        self.refused += 1;
        match reason {
            WorkerRefusal::Draining if self.stage == WorkerStage::Serving => {
                self.stage = WorkerStage::Draining;
                return true;
            }
            WorkerRefusal::Overloaded | WorkerRefusal::DescriptorLost => {
                self.not_before = Some(now + REFUSAL_PAUSE);
            }
            _ => {}
        }
        false
    }

    /// What is left of it without its channel, to be killed then at the latest.
    pub(super) fn leave(self, kill_at: Instant) -> Leaving {
        Leaving {
            id: self.id,
            pid: self.pid,
            process: self.process,
            held: self.in_flight,
            kill_at: (self.stage != WorkerStage::Killed).then_some(kill_at),
            ended: self.ended,
        }
    }

    pub(super) fn kill(&mut self) {
        match self.process.kill() {
            Ok(()) => self.stage = WorkerStage::Killed,
            Err(error) => {
                log::warn!(target: log::HANDOFF, "cannot kill process {}: {error}", self.pid);
            }
        }
    }
}

impl Job {
    pub(super) fn new(connection: PassedConnection, now: Instant) -> Self {
        let PassedConnection {
            fd,
            peer,
            label,
            read,
            unsent,
            is_recalled,
            accepted: _,
        } = connection;
        Self {
            socket: KeptSocket {
                fd: Some(Rc::new(fd)),
                is_tcp: peer.is_some(),
            },
            more: Vec::new(),
            origin: None,
            dispatch: Dispatch {
                id: 0,
                label,
                peer,
                read,
                unsent,
                is_recalled,
                moved: None,
            },
            attempts: 0,
            refused_by: Vec::new(),
            since: now,
            place: 0,
        }
    }

    /// One that moves; see [`origin`](Self::origin).
    pub(super) fn moving(
        record: MovedRecord,
        mut descriptors: Vec<PassedDescriptor>,
        origin: Option<(WorkerId, u64)>,
        now: Instant,
    ) -> Option<Self> {
        if descriptors.is_empty() {
            return None;
        }
        let share = |descriptor| match descriptor {
            PassedDescriptor::Owned(fd) => Rc::new(fd),
            PassedDescriptor::Shared(fd) => fd,
        };
        let fd = share(descriptors.remove(0));
        Some(Self {
            socket: KeptSocket {
                fd: Some(fd),
                is_tcp: false,
            },
            more: descriptors.into_iter().map(share).collect(),
            origin,
            dispatch: Dispatch {
                id: 0,
                label: 0,
                peer: None,
                read: Vec::new(),
                unsent: Vec::new(),
                is_recalled: false,
                moved: Some(record),
            },
            attempts: 0,
            refused_by: Vec::new(),
            since: now,
            place: 0,
        })
    }

    /// Its descriptors, shared with the channel that they are to leave by.
    fn descriptors(&self) -> impl Iterator<Item = PassedDescriptor> {
        let own = self.socket.fd.iter().chain(&self.more);
        own.map(PassedDescriptor::shared)
    }

    pub(super) fn offer(&self) -> Offer<'_> {
        Offer {
            peer: self.dispatch.peer,
            label: self.dispatch.label,
            read: &self.dispatch.read,
        }
    }

    fn was_refused(&self) -> bool {
        !self.refused_by.is_empty()
    }

    pub(super) fn was_refused_by(&self, id: WorkerId) -> bool {
        self.refused_by.iter().any(|(by, _)| *by == id)
    }

    pub(super) fn into_connection(mut self) -> io::Result<PassedConnection> {
        let fd = self.socket.fd.take().ok_or(io::ErrorKind::NotFound)?;
        let fd = match Rc::try_unwrap(fd) {
            Ok(fd) => fd,
            // A channel that is about to end has it queued.
            Err(shared) => shared.try_clone()?,
        };
        Ok(PassedConnection {
            peer: self.dispatch.peer,
            label: self.dispatch.label,
            read: self.dispatch.read,
            unsent: self.dispatch.unsent,
            is_recalled: self.dispatch.is_recalled,
            ..PassedConnection::new(fd)
        })
    }
}
