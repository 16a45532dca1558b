//! The process that serves, and hands over to its successor.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io;
use std::process::ExitStatus;
use std::rc::Rc;
use std::time::Duration;

use bowline_protocol::{
    Address, CloseReason, Context, Factory, NotSent, PassedDescriptor, UnixTransport,
    UnixTransportHandle,
};
use bowline_reactor::{DelayedCall, Description, Reactor};
use bowline_transport::{ChildProcess, ChildWatch};

use super::applying::Applying;
use super::attempt::Attempt;
use super::baton::Baton;
use super::error::RestartError;
use super::handshake::{Do, Heard, Offering, batches};
use super::messages::{FromPredecessor, FromSuccessor, Offered, Refusal};
use super::moving::{Batch, Packet};
use super::server::{Life, Server};
use crate::channel::{Channel, ChannelError, ChannelReceiver, Peer, Role, has_peer_ended};
use crate::log;
use crate::systemd::Notice;
use crate::wire::{self, Incoming, MAX_DESCRIPTORS};

/// How long a farewell may take.
pub(super) const FAREWELL: Duration = Duration::from_secs(1);

/// How often a child is asked whether it has ended, where the kernel does not tell.
const REAP_EVERY: Duration = Duration::from_millis(20);
/// How often once it serves.
const REAP_AT_LEISURE: Duration = Duration::from_secs(1);

/// What of a message is not the connections themselves.
const OVERHEAD_BYTES: usize = 4096;

/// The process that serves, as those see it who want to take over.
pub(crate) struct Predecessor {
    server: Rc<Server>,
    state: RefCell<Applicants>,
    /// How many successors did not make it.
    failed: Cell<u64>,
}

/// Who wants to take over.
struct Applicants {
    applicants: BTreeMap<u64, Applicant>,
    next: u64,
    attempt: Attempt,
}

/// A connection to the control socket.
struct Applicant {
    step: Offering,
    /// None once we have hung up: what it says from then on is not heard.
    channel: Option<UnixTransportHandle>,
    peer: Peer,
    /// Who that is.
    process: Applying,
    deadline: Option<DelayedCall>,
    /// The channel has ended, and there is something left to do.
    has_ended: bool,
    /// It has broken here.
    is_broken: bool,
    /// Who serves where it cannot be said, once it has everything it takes to serve.
    baton: Option<Baton>,
    /// Whether that was ours, once it was asked.
    has_baton: Option<bool>,
    /// What the service manager is told of it, by its number.
    announcement: Option<u64>,
    moving: Moving,
}

/// The connections that move.
#[derive(Default)]
struct Moving {
    /// The last on the list that was looked at.
    seen: Option<u64>,
    /// Behind the last that was on the list when the first of them moved. As long as
    /// this process accepts there is always another one.
    until: Option<u64>,
    next_batch: u32,
    on_its_way: OnItsWay,
}

/// Connections that are neither here nor there.
#[derive(Default)]
enum OnItsWay {
    #[default]
    Nothing,
    /// The successor has not been told to go: they are ours to take back.
    Offered(u32, Batch),
    /// It may serve them already.
    Gone(u32, Batch),
}

impl OnItsWay {
    fn take_offered(&mut self) -> Option<(u32, Batch)> {
        match std::mem::take(self) {
            Self::Offered(number, batch) => Some((number, batch)),
            other => {
                *self = other;
                None
            }
        }
    }

    /// That it is to go has not left.
    fn was_not_told(&mut self) {
        if let Some((number, batch)) = self.take_gone() {
            *self = Self::Offered(number, batch);
        }
    }

    fn take_gone(&mut self) -> Option<(u32, Batch)> {
        match std::mem::take(self) {
            Self::Gone(number, batch) => Some((number, batch)),
            other => {
                *self = other;
                None
            }
        }
    }
}

/// Our copies are closed.
fn leave_to_successor(batch: &Batch) {
    let count = batch.len();
    log::warn!(
        target: log::HANDOFF,
        "{count} connections are left to a successor, of which nobody knows whether it serves them"
    );
}

/// Passes on what arrives, to be dealt with when no callback runs: so there is
/// one way to reach the channel, and one order of what happened.
pub(crate) struct ApplicantEnd {
    predecessor: Rc<Predecessor>,
    applicant: Option<u64>,
}

impl<T: UnixTransport> ChannelReceiver<T> for ApplicantEnd {
    type Message = FromSuccessor;

    fn channel_made(&mut self, cx: &mut Context<'_, T>, peer: &Peer) {
        let process = match Applying::of(cx.transport, peer) {
            Ok(process) => process,
            Err(error) => {
                log::warn!(
                    target: log::HANDOFF,
                    "not served: nobody can tell who has connected to the control socket: {error}"
                );
                return cx.transport.abort_connection();
            }
        };
        let id = self
            .predecessor
            .add(cx.transport.unix_handle(), peer, process);
        self.applicant = Some(id);
        self.predecessor.set_deadline(cx.reactor, id);
    }

    fn message_received(&mut self, cx: &mut Context<'_, T>, incoming: Incoming<FromSuccessor>) {
        if let Some(id) = self.applicant {
            let predecessor = Rc::clone(&self.predecessor);
            cx.reactor
                .defer(move |reactor| predecessor.receive(reactor, id, incoming.message));
        }
    }

    fn channel_lost(
        &mut self,
        cx: &mut Context<'_, T>,
        error: Option<&ChannelError>,
        reason: &CloseReason,
    ) {
        match error {
            Some(error) => log::warn!(target: log::HANDOFF, "control connection: {error}"),
            None => log::debug!(target: log::HANDOFF, "control connection: {reason}"),
        }
        if let Some(id) = self.applicant.take() {
            let predecessor = Rc::clone(&self.predecessor);
            if matches!(reason, CloseReason::ReactorStopped) {
                // This process ends, and decides nothing any more.
                return predecessor.remove(cx.reactor, id);
            }
            let has_ended = has_peer_ended(error, reason);
            cx.reactor
                .defer(move |reactor| predecessor.channel_ended(reactor, id, has_ended));
        }
    }

    fn describe(&self, description: &mut Description) {
        let Ok(state) = self.predecessor.state.try_borrow() else {
            return;
        };
        let Some(applicant) = self.applicant.and_then(|id| state.applicants.get(&id)) else {
            return;
        };
        let on_its_way = match &applicant.moving.on_its_way {
            OnItsWay::Nothing => 0,
            OnItsWay::Offered(_, batch) | OnItsWay::Gone(_, batch) => batch.len(),
        };
        let server = &self.predecessor.server;
        description
            .section("Successor")
            .set("step", applicant.step.name())
            .set("on_its_way", on_its_way)
            .set("moved", server.moved.get() - server.moved_here.get());
    }
}

impl Predecessor {
    pub(super) fn new(server: Rc<Server>) -> Self {
        Self {
            server,
            state: RefCell::new(Applicants {
                applicants: BTreeMap::new(),
                next: 0,
                attempt: Attempt::Idle,
            }),
            failed: Cell::new(0),
        }
    }

    /// Builds a channel for each connection to the control socket.
    pub(crate) fn factory(
        self: &Rc<Self>,
    ) -> impl Factory<Protocol = Channel<ApplicantEnd>> + use<> {
        let predecessor = Rc::clone(self);
        move |_: &Address| {
            let server = &predecessor.server;
            let settings = server.channel_settings(Role::PREDECESSOR, Role::SUCCESSOR);
            let receiver = ApplicantEnd {
                predecessor: Rc::clone(&predecessor),
                applicant: None,
            };
            Channel::new(settings, receiver)
        }
    }

    /// How many successors did not make it.
    pub(super) fn failed(&self) -> u64 {
        self.failed.get()
    }

    /// Whether a successor is being started or served.
    pub(super) fn is_under_way(&self) -> bool {
        self.state.borrow().attempt.is_under_way()
    }

    fn with<R>(&self, id: u64, call: impl FnOnce(&mut Applicant) -> R) -> Option<R> {
        self.state.borrow_mut().applicants.get_mut(&id).map(call)
    }

    // The child.

    pub(super) fn start_child(
        self: &Rc<Self>,
        reactor: &mut Reactor,
        start: impl FnOnce() -> io::Result<Box<dyn ChildProcess>>,
    ) -> Result<(), RestartError> {
        if self.server.life.get() != Life::Serving || reactor.is_stopping() {
            return Err(RestartError::NotServing);
        }
        if self.is_under_way() {
            return Err(RestartError::Busy);
        }
        let process = match start() {
            Ok(process) => process,
            Err(error) => {
                self.failed.update(|failed| failed + 1);
                log::error!(target: log::HANDOFF, "cannot start the successor: {error}");
                return Err(RestartError::Spawn(error));
            }
        };
        log::debug!(target: log::HANDOFF, "started successor {}", process.pid());
        self.server.tell_manager(&Notice::new().reloading());
        // It is owned by what this belongs to. It may hand over itself and end while we
        // still serve what is left here, and is ours alone to wait for.
        let this = Rc::downgrade(self);
        let child = ChildWatch::start(reactor, process, move |reactor, status| {
            if let Some(this) = this.upgrade() {
                this.child_ended(reactor, status);
            }
        });
        child.look_every(reactor, REAP_EVERY);
        let this = Rc::clone(self);
        let late = reactor.call_later(self.server.settings.start, move |reactor| {
            this.attempt_failed(reactor, RestartError::TimedOut);
        });
        self.state.borrow_mut().attempt = Attempt::Started { child, late };
        Ok(())
    }

    fn child_ended(&self, reactor: &mut Reactor, status: io::Result<ExitStatus>) {
        let error = self.state.borrow_mut().attempt.child_ended(reactor, status);
        if let Some(error) = error {
            self.tell_of_failure(reactor, error);
        }
    }

    /// The successor did not make it: this process goes on. The program is told
    /// when nothing is left of it.
    fn attempt_failed(&self, reactor: &mut Reactor, error: RestartError) {
        let error = self.state.borrow_mut().attempt.fail(reactor, error);
        if let Some(error) = error {
            self.server.withdraw_companions();
            self.tell_of_failure(reactor, error);
        }
    }

    fn tell_of_failure(&self, reactor: &mut Reactor, error: RestartError) {
        log::error!(target: log::HANDOFF, "successor failed, serving on: {error}");
        self.failed.update(|failed| failed + 1);
        self.server.successor.set(0);
        self.server.tell_manager(&Notice::new().ready());
        self.server.call(reactor, move |program, reactor| {
            program.successor_failed(reactor, &error);
        });
    }

    // Candidates.

    fn add(&self, channel: UnixTransportHandle, peer: &Peer, process: Applying) -> u64 {
        let mut state = self.state.borrow_mut();
        let id = state.next;
        state.next += 1;
        let applicant = Applicant {
            step: Offering::Asked,
            channel: Some(channel),
            peer: peer.clone(),
            process,
            deadline: None,
            has_ended: false,
            is_broken: false,
            baton: None,
            has_baton: None,
            announcement: None,
            moving: Moving::default(),
        };
        state.applicants.insert(id, applicant);
        id
    }

    /// Its channel is no more: it has ended at the other end, which was heard to its last
    /// word, or here.
    fn channel_ended(self: &Rc<Self>, reactor: &mut Reactor, id: u64, has_ended: bool) {
        let is_heard = self.with(id, |applicant| {
            applicant.has_ended = true;
            applicant.is_broken = !has_ended;
            has_ended && applicant.channel.is_some()
        });
        // What the successor did not say that it serves, it does not serve. But who did
        // not listen to the end does not know what it said; and one that lives takes us
        // for dead, and everything for its own. A connection that has gone on there must
        // not go on here.
        if is_heard == Some(true)
            && let Some(batch) = self.take_on_its_way(id)
        {
            batch.roll_back(reactor, &self.server.list);
        }
        let heard = match has_ended {
            true => Heard::Lost,
            false => Heard::Broken,
        };
        self.hear(reactor, id, heard);
    }

    fn take_on_its_way(&self, id: u64) -> Option<Batch> {
        let taken = |applicant: &mut Applicant| std::mem::take(&mut applicant.moving.on_its_way);
        match self.with(id, taken)? {
            OnItsWay::Nothing => None,
            OnItsWay::Offered(_, batch) | OnItsWay::Gone(_, batch) => Some(batch),
        }
    }

    fn remove_if_over(&self, reactor: &mut Reactor, id: u64) {
        let is_over = |applicant: &mut Applicant| applicant.has_ended && applicant.step.is_over();
        if self.with(id, is_over) == Some(true) {
            self.remove(reactor, id);
        }
    }

    fn remove(&self, reactor: &mut Reactor, id: u64) {
        if let Some(batch) = self.take_on_its_way(id) {
            leave_to_successor(&batch);
        }
        let applicant = self.state.borrow_mut().applicants.remove(&id);
        if let Some(deadline) = applicant.and_then(|it| it.deadline) {
            // It may have passed.
            let _ = deadline.cancel(reactor);
        }
    }

    fn receive(self: &Rc<Self>, reactor: &mut Reactor, id: u64, message: FromSuccessor) {
        let heard = match message {
            FromSuccessor::Take { format } => Heard::Take(self.admit(reactor, id, format)),
            FromSuccessor::Taken { batch } => Heard::Taken(batch),
            FromSuccessor::Ready => Heard::Ready,
            FromSuccessor::Serving => Heard::Serving,
            FromSuccessor::Prepared { batch, refused } => {
                return self.batch_prepared(reactor, id, batch, &refused);
            }
            FromSuccessor::Live { batch } => return self.batch_lives(reactor, id, batch),
            FromSuccessor::Parted => Heard::Parted,
            FromSuccessor::Abort => {
                // All that it serves it has said before.
                self.take_back(reactor, id, true);
                Heard::Abort
            }
        };
        self.hear(reactor, id, heard);
    }

    /// Whether the successor may take over, and in how many batches.
    fn admit(&self, reactor: &mut Reactor, id: u64, format: u32) -> Result<u32, Refusal> {
        // One that stops has closed its listeners, or is about to.
        if self.server.life.get() != Life::Serving || reactor.is_stopping() {
            return Err(Refusal::NotServing);
        }
        if format != self.server.settings.format {
            return Err(Refusal::Format);
        }
        let state = &mut *self.state.borrow_mut();
        let process = state.applicants.get(&id).map(|it| &it.process);
        if !process.is_some_and(|process| state.attempt.admits(process)) {
            return Err(Refusal::Busy);
        }
        let pid = state.applicants.get(&id).map(|it| it.peer.pid);
        self.server.successor.set(pid.unwrap_or(0));
        state.attempt.serve(reactor, id);
        // Those that the program has stopped are nobody's.
        let mut listeners = self.server.listeners.borrow_mut();
        listeners.retain(|named| reactor.get(named.handle).is_some());
        self.server.prepare_companions();
        let all = listeners.len() + self.server.companions.borrow().len();
        // No more were added than there can be batches of.
        Ok(batches(all).unwrap_or(0))
    }

    /// Takes the steps that follow from what was heard, and tells the program if they end
    /// the attempt.
    fn hear(self: &Rc<Self>, reactor: &mut Reactor, id: u64, heard: Heard) {
        self.take_steps(reactor, id, heard);
        self.set_deadline(reactor, id);
        let failed = {
            let state = self.state.borrow();
            let applicant = state.applicants.get(&id);
            let failed = applicant.filter(|it| it.step == Offering::Failed);
            failed
                .filter(|_| state.attempt.is_of(id))
                .map(|it| it.has_ended)
        };
        if let Some(has_ended) = failed {
            let error = match heard {
                _ if has_ended => RestartError::Lost,
                Heard::TooLate => RestartError::TimedOut,
                _ => RestartError::GaveUp,
            };
            self.attempt_failed(reactor, error);
        }
        self.remove_if_over(reactor, id);
    }

    fn take_steps(self: &Rc<Self>, reactor: &mut Reactor, id: u64, heard: Heard) {
        let actions = self.with(id, |applicant| {
            log::trace!(target: log::HANDOFF, "{:?} hears {heard:?}", applicant.step);
            applicant.step.hear(heard)
        });
        for action in actions.unwrap_or_default() {
            self.carry_out(reactor, id, *action, heard);
        }
    }

    /// Whether this process is the one that serves, where the two cannot say.
    fn decide(&self, id: u64) -> bool {
        let is_ours = self.with(id, |applicant| {
            let baton = applicant.baton.take();
            *applicant
                .has_baton
                .get_or_insert_with(|| baton.is_none_or(Baton::take))
        });
        is_ours == Some(true)
    }

    fn carry_out(self: &Rc<Self>, reactor: &mut Reactor, id: u64, action: Do, heard: Heard) {
        match action {
            Do::Refuse(refusal) => self.refuse(reactor, id, refusal),
            Do::Offer => self.offer(reactor, id),
            Do::Send(batch) => self.send_listeners(reactor, id, batch),
            Do::Commit => {
                self.server.withdraw(reactor);
                self.say(reactor, id, &FromPredecessor::Commit);
            }
            Do::Move => self.move_next(reactor, id),
            Do::Announce => self.announce(reactor, id),
            Do::Finish => self.finish(reactor, id),
            Do::Leave => {
                if heard == Heard::TooLate {
                    log::warn!(
                        target: log::HANDOFF,
                        "the successor serves, and does not say whether the service manager knows"
                    );
                }
                self.hang_up(reactor, id);
                self.leave(reactor);
            }
            Do::Decide => {
                let is_ours = self.decide(id);
                if !is_ours {
                    log::warn!(target: log::HANDOFF, "the successor serves, and could not say so");
                }
                self.take_steps(reactor, id, Heard::Decided(is_ours));
            }
            Do::Yield => {
                self.server.withdraw(reactor);
                self.server.life.set(Life::HandedOver);
                let is_broken = self.with(id, |applicant| applicant.is_broken);
                if is_broken == Some(true)
                    && let Some(batch) = self.take_on_its_way(id)
                {
                    leave_to_successor(&batch);
                }
            }
            Do::Resume => {
                self.take_announcement_back(id);
                self.server.accept(reactor);
            }
            Do::HangUp => {
                let refusal = Refusal::NotServing;
                let message = match reactor.is_stopping() {
                    // It may look whether somebody else serves.
                    true => FromPredecessor::Refused { refusal },
                    false => FromPredecessor::Abort,
                };
                self.say(reactor, id, &message);
                self.take_back(reactor, id, false);
                self.hang_up(reactor, id);
            }
        }
    }

    /// One that was refused is a failed attempt where we have started it.
    fn refuse(&self, reactor: &mut Reactor, id: u64, refusal: Refusal) {
        self.say(reactor, id, &FromPredecessor::Refused { refusal });
        self.hang_up(reactor, id);
        let is_our_child = {
            let state = self.state.borrow();
            let process = state.applicants.get(&id).map(|it| &it.process);
            process.is_some_and(|process| state.attempt.has_started(process))
        };
        if is_our_child {
            self.attempt_failed(reactor, RestartError::Refused(refusal));
        }
    }

    fn set_deadline(self: &Rc<Self>, reactor: &mut Reactor, id: u64) {
        let patience = self.server.settings.patience();
        let this = Rc::clone(self);
        self.with(id, |applicant| {
            if let Some(deadline) = applicant.deadline.take() {
                // It may be what runs.
                let _ = deadline.cancel(reactor);
            }
            let limit = match applicant.moving.on_its_way {
                OnItsWay::Nothing => applicant.step.patience(patience),
                _ if applicant.step.is_moving() => Some(patience.answer),
                _ => applicant.step.patience(patience),
            };
            if let Some(limit) = limit {
                let late = move |reactor: &mut Reactor| this.is_late(reactor, id);
                applicant.deadline = Some(reactor.call_later(limit, late));
            }
        });
    }

    fn is_late(self: &Rc<Self>, reactor: &mut Reactor, id: u64) {
        let has_gone = |applicant: &mut Applicant| {
            let has_gone = matches!(applicant.moving.on_its_way, OnItsWay::Gone(..));
            has_gone && !applicant.has_ended
        };
        // It may serve them already, and does not say so: taking them back is safe only
        // once it is dead, of which its channel tells. One that is not ours to kill keeps
        // them, for better or worse.
        if self.with(id, has_gone) == Some(true)
            && self.decide(id)
            && self.state.borrow().attempt.kill_served()
        {
            return;
        }
        self.hear(reactor, id, Heard::TooLate);
    }

    /// Takes back connections that the successor was not told to serve, or, with
    /// those that have gone, does not serve either.
    fn take_back(&self, reactor: &mut Reactor, id: u64, with_gone: bool) {
        let taken = self.with(id, |applicant| {
            let on_its_way = &mut applicant.moving.on_its_way;
            let offered = on_its_way.take_offered();
            match with_gone {
                true => offered.or_else(|| on_its_way.take_gone()),
                false => offered,
            }
        });
        if let Some((_, batch)) = taken.flatten() {
            batch.roll_back(reactor, &self.server.list);
        }
    }

    fn say(&self, reactor: &mut Reactor, id: u64, message: &FromPredecessor) -> bool {
        self.say_with(reactor, id, message, Vec::new())
    }

    /// Whether the message was taken.
    fn say_with(
        &self,
        reactor: &mut Reactor,
        id: u64,
        message: &FromPredecessor,
        descriptors: Vec<PassedDescriptor>,
    ) -> bool {
        let channel = self.with(id, |applicant| applicant.channel).flatten();
        let Some(channel) = channel.and_then(|channel| reactor.get(channel)) else {
            return false;
        };
        match wire::send(channel, message, descriptors) {
            Ok(_) => true,
            Err(error) => {
                // Its end is going to be heard.
                log::debug!(target: log::HANDOFF, "not sent: {error}");
                false
            }
        }
    }

    /// Calls `then` if the channel ends before what was said last has left.
    fn unless_sent(
        self: &Rc<Self>,
        reactor: &mut Reactor,
        id: u64,
        then: impl FnOnce(&Self, &mut Reactor) + 'static,
    ) {
        let channel = self.with(id, |applicant| applicant.channel).flatten();
        if let Some(channel) = channel.and_then(|channel| reactor.get(channel)) {
            let position = channel.bytes_sent() + channel.unsent_bytes() as u64;
            let this = Rc::clone(self);
            let told = move |reactor: &mut Reactor, sent: Result<(), NotSent>| {
                if sent.is_err() {
                    then(&this, reactor);
                }
            };
            channel.when_sent(position, Box::new(told));
        }
    }

    fn hang_up(&self, reactor: &mut Reactor, id: u64) {
        let channel = self.with(id, |applicant| applicant.channel.take());
        if let Some(channel) = channel.flatten().and_then(|channel| reactor.get(channel)) {
            channel.lose_connection_within(FAREWELL);
        }
    }

    fn offer(self: &Rc<Self>, reactor: &mut Reactor, id: u64) {
        let count = self.server.listeners.borrow().len() + self.server.companions.borrow().len();
        let batches = batches(count).unwrap_or(0);
        let notifier = self.server.settings.notifier.as_ref();
        let watched = notifier.and_then(|it| it.watched()).unwrap_or(0);
        let message = FromPredecessor::Offer { batches, watched };
        let made = Baton::new().and_then(|baton| {
            let theirs = baton.share()?;
            Ok((baton, theirs))
        });
        let is_said = match made {
            Ok((baton, theirs)) => {
                self.with(id, |applicant| applicant.baton = Some(baton));
                self.say_with(reactor, id, &message, vec![theirs.into()])
            }
            Err(error) => {
                log::warn!(target: log::HANDOFF, "cannot offer what is listened on: {error}");
                false
            }
        };
        if !is_said {
            self.give_up(reactor, id);
        }
    }

    /// Later, from inside of what the machine asked for.
    fn give_up(self: &Rc<Self>, reactor: &mut Reactor, id: u64) {
        let this = Rc::clone(self);
        reactor.defer(move |reactor| this.hear(reactor, id, Heard::Abort));
    }

    fn send_listeners(self: &Rc<Self>, reactor: &mut Reactor, id: u64, batch: u32) {
        let mut offered = Vec::new();
        let mut descriptors = Vec::new();
        let from = batch as usize * MAX_DESCRIPTORS;
        let mut failed = false;
        let listeners = self.server.listeners.borrow();
        let companions = self.server.companions.borrow();
        let rest = from.saturating_sub(listeners.len());
        let room = MAX_DESCRIPTORS - listeners.len().saturating_sub(from).min(MAX_DESCRIPTORS);
        for named in listeners.iter().skip(from).take(MAX_DESCRIPTORS) {
            let copy = match reactor.get(named.handle) {
                Some(listener) => listener.duplicate(),
                None => Err(io::ErrorKind::NotConnected.into()),
            };
            match copy {
                Ok(fd) => {
                    descriptors.push(fd.into());
                    offered.push(Offered {
                        name: named.name.clone(),
                        file: named.file,
                    });
                }
                Err(error) => {
                    log::warn!(target: log::HANDOFF, "cannot pass on {:?}: {error}", named.name);
                    failed = true;
                }
            }
        }
        for (name, fd) in companions.iter().skip(rest).take(room) {
            descriptors.push(PassedDescriptor::shared(fd));
            offered.push(Offered {
                name: name.clone(),
                file: None,
            });
        }
        drop((listeners, companions));
        let message = FromPredecessor::Listeners {
            batch,
            listeners: offered,
        };
        if failed || !self.say_with(reactor, id, &message, descriptors) {
            self.give_up(reactor, id);
        }
    }

    // Moving connections.

    fn move_next(self: &Rc<Self>, reactor: &mut Reactor, id: u64) {
        // Connections have secrets, which are for the process that was let in.
        if self.with(id, |applicant| applicant.process.is_there()) == Some(false) {
            log::warn!(target: log::HANDOFF, "nothing moves: the successor is gone, and somebody has its connection");
            return self.hear(reactor, id, Heard::Abort);
        }
        let now = self.server.list.borrow().end();
        let bounds = self.with(id, |applicant| {
            let accepted = applicant.peer.max_payload;
            let until = match applicant.step {
                // Those that come meanwhile follow when it accepts nobody any more.
                Offering::Moving => *applicant.moving.until.get_or_insert(now),
                _ => now,
            };
            let from = applicant.moving.seen.map_or(0, |seen| seen + 1);
            (from..until, accepted.saturating_sub(OVERHEAD_BYTES))
        });
        let Some((range, max_bytes)) = bounds else {
            return;
        };
        let this = Rc::clone(self);
        let list = &self.server.list;
        Batch::collect(
            reactor,
            list,
            range,
            max_bytes,
            move |reactor, collected| match collected {
                Some((batch, packet, seen)) => this.send_batch(reactor, id, batch, packet, seen),
                None => this.hear(reactor, id, Heard::Moved),
            },
        );
    }

    fn send_batch(
        self: &Rc<Self>,
        reactor: &mut Reactor,
        id: u64,
        batch: Batch,
        packet: Packet,
        seen: u64,
    ) {
        let number = self.with(id, |applicant| {
            applicant.step.is_moving().then(|| {
                applicant.moving.seen = Some(seen);
                applicant.moving.next_batch += 1;
                applicant.moving.next_batch
            })
        });
        let Some(number) = number.flatten() else {
            // It has failed meanwhile.
            return batch.roll_back(reactor, &self.server.list);
        };
        if batch.len() == 0 {
            return self.move_next(reactor, id);
        }
        let message = FromPredecessor::Connections {
            batch: number,
            connections: packet.records,
        };
        if !self.say_with(reactor, id, &message, packet.descriptors) {
            batch.roll_back(reactor, &self.server.list);
            return self.hear(reactor, id, Heard::Abort);
        }
        self.set_on_its_way(reactor, id, OnItsWay::Offered(number, batch));
        // Then it is not on its way.
        self.unless_sent(reactor, id, move |this, reactor| {
            this.take_back(reactor, id, false);
        });
    }

    fn set_on_its_way(self: &Rc<Self>, reactor: &mut Reactor, id: u64, on_its_way: OnItsWay) {
        self.with(id, |applicant| applicant.moving.on_its_way = on_its_way);
        self.set_deadline(reactor, id);
    }

    fn batch_prepared(
        self: &Rc<Self>,
        reactor: &mut Reactor,
        id: u64,
        number: u32,
        refused: &[u32],
    ) {
        let offered = self.with(id, |applicant| applicant.moving.on_its_way.take_offered());
        let mut batch = match offered.flatten() {
            Some((offered, batch)) if offered == number => batch,
            other => {
                return self.not_on_its_way(
                    reactor,
                    id,
                    other.map(|(n, b)| OnItsWay::Offered(n, b)),
                );
            }
        };
        batch.return_refused(reactor, &self.server.list, refused);
        self.say(reactor, id, &FromPredecessor::Go { batch: number });
        self.set_on_its_way(reactor, id, OnItsWay::Gone(number, batch));
        self.unless_sent(reactor, id, move |this, _| {
            this.with(id, |applicant| applicant.moving.on_its_way.was_not_told());
        });
    }

    fn batch_lives(self: &Rc<Self>, reactor: &mut Reactor, id: u64, number: u32) {
        let gone = self.with(id, |applicant| applicant.moving.on_its_way.take_gone());
        let batch = match gone.flatten() {
            Some((gone, batch)) if gone == number => batch,
            other => {
                return self.not_on_its_way(reactor, id, other.map(|(n, b)| OnItsWay::Gone(n, b)));
            }
        };
        self.server.moved.update(|moved| moved + batch.len());
        // Our copies, and the protocols with them.
        drop(batch);
        self.set_deadline(reactor, id);
        self.move_next(reactor, id);
    }

    /// It speaks of another batch than of the one that is on its way.
    fn not_on_its_way(self: &Rc<Self>, reactor: &mut Reactor, id: u64, stays: Option<OnItsWay>) {
        if let Some(stays) = stays {
            self.with(id, |applicant| applicant.moving.on_its_way = stays);
        }
        self.hear(reactor, id, Heard::Abort);
    }

    // The end.

    /// The service manager is told first, since it listens to the main process only.
    /// Were this process to end before it knows, it would take the service for ended.
    fn announce(self: &Rc<Self>, reactor: &mut Reactor, id: u64) {
        let pid = self.with(id, |applicant| applicant.peer.pid);
        let has_manager = self.server.settings.notifier.is_some();
        let Some(pid) = pid.filter(|_| has_manager) else {
            return self.hear(reactor, id, Heard::Announced(has_manager));
        };
        let waits = Rc::new(Cell::new(false));
        let has_waited = Rc::clone(&waits);
        let this = Rc::clone(self);
        let notice = Notice::new().main_pid(pid);
        let number = self
            .server
            .tell_manager_then(reactor, &notice, move |reactor| {
                if !has_waited.get() {
                    return this.hear(reactor, id, Heard::Announced(true));
                }
                // In a later turn, which has heard of a successor that has died
                // meanwhile: then it is not to have everything.
                reactor.call_later(Duration::ZERO, move |reactor| {
                    this.hear(reactor, id, Heard::Announced(true));
                });
            });
        waits.set(true);
        self.with(id, |applicant| applicant.announcement = number);
    }

    /// The successor came no further.
    fn take_announcement_back(&self, id: u64) {
        let number = self.with(id, |applicant| applicant.announcement.take());
        if let (Some(number), Some(notifier)) = (number.flatten(), &self.server.settings.notifier)
            && !notifier.take_back(number)
        {
            // A manager that listens to all our processes hears it.
            self.server
                .tell_manager(&Notice::new().main_pid(std::process::id()));
        }
    }

    /// Everything is said. The listeners are the successor's, and what waits in their
    /// queues with them.
    fn finish(&self, reactor: &mut Reactor, id: u64) {
        let child = self.state.borrow_mut().attempt.finish();
        if let Some(child) = child {
            // It may live for long.
            child.look_every(reactor, REAP_AT_LEISURE);
        }
        if let Some(notifier) = &self.server.settings.notifier {
            notifier.is_not_main();
        }
        self.say(reactor, id, &FromPredecessor::Done);
        self.server.life.set(Life::HandedOver);
        self.server.hand_pools_over(reactor);
        self.server.stop_listening(reactor);
    }

    /// Nothing is left to be done but to serve what stays.
    fn leave(&self, reactor: &mut Reactor) {
        self.server.hand_pools_over(reactor);
        let within = self.server.settings.drain;
        self.server.call(reactor, move |program, reactor| {
            program.handed_over(reactor, within);
        });
        reactor.call_later(within, |reactor| {
            // An error says that it has stopped by itself.
            let _ = reactor.stop_now();
        });
    }
}
