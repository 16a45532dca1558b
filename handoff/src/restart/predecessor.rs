//! The side of the process that serves.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use bowline_protocol::{
    Address, CloseReason, Context, Factory, PassedDescriptor, UnixTransport, UnixTransportHandle,
};
use bowline_reactor::{DelayedCall, Reactor};

use super::handshake::{Do, Heard, Offering, batches};
use super::messages::{FromPredecessor, FromSuccessor, Offered, Refusal};
use super::moving::{Batch, Packet};
use super::{Restart, RestartError, Role};
use crate::channel::{
    self, Channel, ChannelError, ChannelReceiver, ChannelSettings, Peer, has_peer_ended,
};
use crate::log;
use crate::systemd::Notice;
use crate::wire::{self, Incoming, MAX_DESCRIPTORS, MAX_PAYLOAD};

/// How long a farewell may take.
const FAREWELL: Duration = Duration::from_secs(1);

/// What of a message is not the connections themselves.
const OVERHEAD_BYTES: usize = 4096;

/// A connection to the control socket.
pub(super) struct Offer {
    machine: Offering,
    channel: UnixTransportHandle,
    peer: Option<Peer>,
    deadline: Option<DelayedCall>,
    /// Its process is the child of this one, or was.
    was_started_here: bool,
    /// What the service manager is told of it, by its number.
    announcement: Option<u64>,
    /// What it says from now on is not heard.
    has_hung_up: bool,
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
    on_its_way: Option<OnItsWay>,
}

struct OnItsWay {
    number: u32,
    batch: Batch,
    /// The successor was told to go: it may serve them already.
    has_gone: bool,
}

/// How a channel of these roles behaves, ours and the other's.
pub(super) fn settings(
    restart: &Restart,
    (ours, theirs): (channel::Role, channel::Role),
) -> ChannelSettings {
    let mut settings = ChannelSettings::new(ours, theirs);
    settings.max_payload = MAX_PAYLOAD;
    settings.handshake_timeout = restart.shared.settings.answer;
    settings
}

/// Builds a channel for each connection to the control socket.
pub(super) fn factory<T: UnixTransport>(restart: &Restart) -> impl Factory<T> + use<T> {
    let restart = restart.clone();
    move |_: &Address| {
        let roles = (channel::Role::PREDECESSOR, channel::Role::SUCCESSOR);
        let settings = settings(&restart, roles);
        let receiver = Receiver {
            restart: restart.clone(),
            offer: None,
        };
        Channel::new(settings, receiver)
    }
}

/// Passes on what arrives, to be dealt with when no callback runs: so there is
/// one way to reach the channel, and one order of what happened.
struct Receiver {
    restart: Restart,
    offer: Option<u64>,
}

impl<T: UnixTransport> ChannelReceiver<T> for Receiver {
    type Message = FromSuccessor;

    fn channel_made(&mut self, cx: &mut Context<'_, T>, peer: &Peer) {
        let offer = self.restart.new_offer(cx.transport.unix_handle(), peer);
        self.offer = Some(offer);
        self.restart.set_offer_deadline(cx.reactor, offer);
    }

    fn message_received(&mut self, cx: &mut Context<'_, T>, incoming: Incoming<FromSuccessor>) {
        if let Some(offer) = self.offer {
            let restart = self.restart.clone();
            cx.reactor
                .defer(move |reactor| restart.heard(reactor, offer, incoming.message));
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
        if let Some(offer) = self.offer.take() {
            let restart = self.restart.clone();
            let has_ended = has_peer_ended(error, reason);
            cx.reactor.defer(move |reactor| {
                restart.offer_hears(reactor, offer, Heard::Lost);
                restart.offer_is_gone(reactor, offer, has_ended);
            });
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

impl Restart {
    fn new_offer(&self, channel: UnixTransportHandle, peer: &Peer) -> u64 {
        let mut state = self.shared.state.borrow_mut();
        let id = state.next_offer;
        state.next_offer += 1;
        state.offers.insert(
            id,
            Offer {
                machine: Offering::Asked,
                channel,
                peer: Some(peer.clone()),
                deadline: None,
                was_started_here: false,
                announcement: None,
                has_hung_up: false,
                moving: Moving::default(),
            },
        );
        id
    }

    /// The channel of an offer is no more: it has ended at the other end, which was
    /// heard to its last word, or here.
    fn offer_is_gone(&self, reactor: &mut Reactor, id: u64, has_ended: bool) {
        let offer = self.shared.state.borrow_mut().offers.remove(&id);
        let Some(offer) = offer else { return };
        if let Some(deadline) = offer.deadline {
            // It may have passed.
            let _ = deadline.cancel(reactor);
        }
        let Some(on_its_way) = offer.moving.on_its_way else {
            return;
        };
        // What the successor did not say that it serves, it does not serve. But who did
        // not listen to the end does not know what it said; and one that lives takes
        // us for dead, and everything for its own. A connection that has gone on there
        // must not go on here.
        if has_ended && !offer.has_hung_up {
            on_its_way.batch.roll_back(reactor, &self.shared.list);
        } else {
            leave_to_successor(&on_its_way.batch);
        }
    }

    fn heard(&self, reactor: &mut Reactor, id: u64, message: FromSuccessor) {
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
                self.roll_back(reactor, id, true);
                Heard::Abort
            }
        };
        self.offer_hears(reactor, id, heard);
    }

    /// Whether the successor may take over, and in how many batches.
    fn admit(&self, reactor: &mut Reactor, id: u64, format: u32) -> Result<u32, Refusal> {
        let mut state = self.shared.state.borrow_mut();
        if state.role != Role::Serving {
            return Err(Refusal::NotServing);
        }
        if format != self.shared.settings.format {
            return Err(Refusal::Format);
        }
        let pid = state
            .offers
            .get(&id)
            .and_then(|offer| offer.peer.as_ref())
            .map(|peer| peer.pid);
        let is_expected = state
            .child
            .as_ref()
            .is_none_or(|child| Some(child.process.pid()) == pid);
        if state.attempt.is_some() || !is_expected {
            return Err(Refusal::Busy);
        }
        state.attempt = Some(id);
        if let Some(child) = &mut state.child {
            child.has_asked = true;
            if let Some(offer) = state.offers.get_mut(&id) {
                offer.was_started_here = true;
            }
        }
        // Those that the program has stopped are nobody's.
        state
            .listeners
            .retain(|named| reactor.get(named.handle).is_some());
        // No more were added than there can be batches of.
        Ok(batches(state.listeners.len()).unwrap_or(0))
    }

    fn offer_hears(&self, reactor: &mut Reactor, id: u64, heard: Heard) {
        let actions = {
            let mut state = self.shared.state.borrow_mut();
            let Some(offer) = state.offers.get_mut(&id) else {
                return;
            };
            log::trace!(target: log::HANDOFF, "{:?} hears {heard:?}", offer.machine);
            offer.machine.hear(heard)
        };
        let mut is_refused = None;
        for action in actions {
            match *action {
                Do::Refuse(refusal) => {
                    is_refused = Some(refusal);
                    self.say(
                        reactor,
                        id,
                        &FromPredecessor::Refused { refusal },
                        Vec::new(),
                    );
                    self.hang_up(reactor, id);
                }
                Do::Offer => {
                    let count = self.shared.state.borrow().listeners.len();
                    let batches = batches(count).unwrap_or(0);
                    let notifier = self.shared.settings.notifier.as_ref();
                    let watched = notifier.and_then(|it| it.watched()).unwrap_or(0);
                    let offer = FromPredecessor::Offer { batches, watched };
                    self.say(reactor, id, &offer, Vec::new());
                }
                Do::Send(batch) => self.send_listeners(reactor, id, batch),
                Do::Commit => {
                    self.withdraw(reactor);
                    self.say(reactor, id, &FromPredecessor::Commit, Vec::new());
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
                Do::Resume => {
                    self.take_announcement_back(id);
                    self.accept(reactor);
                }
                Do::HangUp => {
                    self.say(reactor, id, &FromPredecessor::Abort, Vec::new());
                    self.roll_back(reactor, id, false);
                    self.hang_up(reactor, id);
                }
            }
        }
        self.set_offer_deadline(reactor, id);
        let has_failed = {
            let state = self.shared.state.borrow();
            let machine = state.offers.get(&id).map(|offer| offer.machine);
            state.attempt == Some(id) && machine == Some(Offering::Failed)
        };
        if let Some(refusal) = is_refused {
            self.refused(reactor, id, refusal);
        } else if has_failed {
            let error = match heard {
                Heard::Lost => RestartError::Lost,
                Heard::TooLate => RestartError::TimedOut,
                _ => RestartError::GaveUp,
            };
            self.attempt_failed(reactor, error);
        }
    }

    /// One that was refused is a failed attempt where we have started it.
    fn refused(&self, reactor: &mut Reactor, id: u64, refusal: Refusal) {
        let is_our_child = {
            let state = self.shared.state.borrow();
            let offer = state.offers.get(&id).and_then(|offer| offer.peer.as_ref());
            let child = state.child.as_ref().map(|child| child.process.pid());
            child.is_some() && offer.map(|peer| peer.pid) == child && state.attempt.is_none()
        };
        if is_our_child {
            self.attempt_failed(reactor, RestartError::Refused(refusal));
        }
    }

    fn set_offer_deadline(&self, reactor: &mut Reactor, id: u64) {
        let patience = self.shared.settings.patience();
        let mut state = self.shared.state.borrow_mut();
        let Some(offer) = state.offers.get_mut(&id) else {
            return;
        };
        if let Some(deadline) = offer.deadline.take() {
            // It may be what runs.
            let _ = deadline.cancel(reactor);
        }
        let limit = match &offer.moving.on_its_way {
            Some(_) if offer.machine.is_moving() => Some(patience.answer),
            _ => offer.machine.patience(patience),
        };
        if let Some(limit) = limit {
            let this = self.clone();
            let late = move |reactor: &mut Reactor| this.offer_is_late(reactor, id);
            offer.deadline = Some(reactor.call_later(limit, late));
        }
    }

    fn offer_is_late(&self, reactor: &mut Reactor, id: u64) {
        let has_gone = {
            let mut state = self.shared.state.borrow_mut();
            let Some(offer) = state.offers.get_mut(&id) else {
                return;
            };
            let was_started_here = offer.was_started_here;
            let has_gone = offer.moving.on_its_way.take_if(|it| it.has_gone);
            if has_gone.is_some() && was_started_here {
                // It may serve them already, and does not say so: taking them back
                // is safe only once it is dead, of which its channel tells.
                offer.moving.on_its_way = has_gone;
                if let Some(child) = &mut state.child {
                    log::warn!(target: log::HANDOFF, "killing the successor, which hangs");
                    let _ = child.process.kill();
                }
                return;
            }
            has_gone
        };
        if let Some(on_its_way) = has_gone {
            // Not ours to kill: they are its own, for better or worse.
            leave_to_successor(&on_its_way.batch);
        }
        self.offer_hears(reactor, id, Heard::TooLate);
    }

    /// Takes back connections that the successor was not told to serve, or, with
    /// those that have gone, does not serve either.
    fn roll_back(&self, reactor: &mut Reactor, id: u64, with_gone: bool) {
        let on_its_way = {
            let mut state = self.shared.state.borrow_mut();
            let offer = state.offers.get_mut(&id);
            offer.and_then(|offer| {
                let on_its_way = &mut offer.moving.on_its_way;
                on_its_way.take_if(|on_its_way| with_gone || !on_its_way.has_gone)
            })
        };
        if let Some(on_its_way) = on_its_way {
            on_its_way.batch.roll_back(reactor, &self.shared.list);
        }
    }

    fn channel_of(&self, id: u64) -> Option<UnixTransportHandle> {
        let state = self.shared.state.borrow();
        state.offers.get(&id).map(|offer| offer.channel)
    }

    /// Whether the message was taken.
    fn say(
        &self,
        reactor: &mut Reactor,
        id: u64,
        message: &FromPredecessor,
        descriptors: Vec<PassedDescriptor>,
    ) -> bool {
        let Some(channel) = self.channel_of(id).and_then(|handle| reactor.get(handle)) else {
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

    fn hang_up(&self, reactor: &mut Reactor, id: u64) {
        if let Some(offer) = self.shared.state.borrow_mut().offers.get_mut(&id) {
            offer.has_hung_up = true;
        }
        if let Some(channel) = self.channel_of(id).and_then(|handle| reactor.get(handle)) {
            channel.lose_connection_within(FAREWELL);
        }
    }

    fn send_listeners(&self, reactor: &mut Reactor, id: u64, batch: u32) {
        let mut listeners = Vec::new();
        let mut descriptors = Vec::new();
        let from = batch as usize * MAX_DESCRIPTORS;
        let mut failed = false;
        for named in self
            .shared
            .state
            .borrow()
            .listeners
            .iter()
            .skip(from)
            .take(MAX_DESCRIPTORS)
        {
            let copy = match reactor.get(named.handle) {
                Some(listener) => listener.duplicate(),
                None => Err(std::io::ErrorKind::NotConnected.into()),
            };
            match copy {
                Ok(fd) => {
                    descriptors.push(fd.into());
                    listeners.push(Offered {
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
        if failed
            || !self.say(
                reactor,
                id,
                &FromPredecessor::Listeners { batch, listeners },
                descriptors,
            )
        {
            // Later: this is inside of what the machine asked for.
            let this = self.clone();
            reactor.defer(move |reactor| this.offer_hears(reactor, id, Heard::Abort));
        }
    }

    // Moving connections.

    fn move_next(&self, reactor: &mut Reactor, id: u64) {
        let (range, max_bytes) = {
            let mut state = self.shared.state.borrow_mut();
            let Some(offer) = state.offers.get_mut(&id) else {
                return;
            };
            let accepted = offer.peer.as_ref().map_or(0, |peer| peer.max_payload);
            let now = self.shared.list.borrow().end();
            let until = match offer.machine {
                // Those that come meanwhile follow when it accepts nobody any more.
                Offering::Moving => *offer.moving.until.get_or_insert(now),
                _ => now,
            };
            let from = offer.moving.seen.map_or(0, |seen| seen + 1);
            (from..until, accepted.saturating_sub(OVERHEAD_BYTES))
        };
        let this = self.clone();
        Batch::collect(
            reactor,
            &self.shared.list,
            range,
            max_bytes,
            move |reactor, collected| match collected {
                Some((batch, packet, seen)) => {
                    this.send_batch(reactor, id, batch, packet, seen);
                }
                None => this.offer_hears(reactor, id, Heard::Moved),
            },
        );
    }

    fn send_batch(&self, reactor: &mut Reactor, id: u64, batch: Batch, packet: Packet, seen: u64) {
        let number = {
            let mut state = self.shared.state.borrow_mut();
            let offer = state.offers.get_mut(&id);
            offer
                .filter(|offer| offer.machine.is_moving())
                .map(|offer| {
                    offer.moving.seen = Some(seen);
                    offer.moving.next_batch += 1;
                    offer.moving.next_batch
                })
        };
        let Some(number) = number else {
            // It has failed meanwhile.
            return batch.roll_back(reactor, &self.shared.list);
        };
        if batch.len() == 0 {
            return self.move_next(reactor, id);
        }
        let message = FromPredecessor::Connections {
            batch: number,
            connections: packet.records,
        };
        if !self.say(reactor, id, &message, packet.descriptors) {
            batch.roll_back(reactor, &self.shared.list);
            return self.offer_hears(reactor, id, Heard::Abort);
        }
        let mut state = self.shared.state.borrow_mut();
        if let Some(offer) = state.offers.get_mut(&id) {
            offer.moving.on_its_way = Some(OnItsWay {
                number,
                batch,
                has_gone: false,
            });
        }
        drop(state);
        self.set_offer_deadline(reactor, id);
    }

    /// Takes what is on its way, if it is this batch and as far as it should be.
    fn take_batch(&self, id: u64, number: u32, has_gone: bool) -> Option<Batch> {
        let mut state = self.shared.state.borrow_mut();
        let offer = state.offers.get_mut(&id)?;
        let on_its_way = &mut offer.moving.on_its_way;
        let taken = on_its_way.take_if(|it| it.number == number && it.has_gone == has_gone)?;
        Some(taken.batch)
    }

    fn batch_prepared(&self, reactor: &mut Reactor, id: u64, number: u32, refused: &[u32]) {
        let Some(mut batch) = self.take_batch(id, number, false) else {
            return self.offer_hears(reactor, id, Heard::Abort);
        };
        batch.return_refused(reactor, &self.shared.list, refused);
        if let Some(offer) = self.shared.state.borrow_mut().offers.get_mut(&id) {
            offer.moving.on_its_way = Some(OnItsWay {
                number,
                batch,
                has_gone: true,
            });
        }
        self.say(
            reactor,
            id,
            &FromPredecessor::Go { batch: number },
            Vec::new(),
        );
        self.set_offer_deadline(reactor, id);
    }

    fn batch_lives(&self, reactor: &mut Reactor, id: u64, number: u32) {
        let Some(batch) = self.take_batch(id, number, true) else {
            return self.offer_hears(reactor, id, Heard::Abort);
        };
        self.shared.state.borrow_mut().moved += batch.len();
        // Our copies, and the protocols with them.
        drop(batch);
        self.set_offer_deadline(reactor, id);
        self.move_next(reactor, id);
    }

    /// The service manager is told first, since it listens to the main process only.
    /// Were this process to end before it knows, it would take the service for ended.
    fn announce(&self, reactor: &mut Reactor, id: u64) {
        let pid = {
            let state = self.shared.state.borrow();
            let offer = state.offers.get(&id);
            offer.and_then(|offer| offer.peer.as_ref().map(|peer| peer.pid))
        };
        let has_manager = self.shared.settings.notifier.is_some();
        let Some(pid) = pid.filter(|_| has_manager) else {
            return self.offer_hears(reactor, id, Heard::Announced(has_manager));
        };
        let waits = Rc::new(Cell::new(false));
        let has_waited = Rc::clone(&waits);
        let number = self.tell_manager_then(
            reactor,
            &Notice::new().main_pid(pid),
            move |this, reactor| {
                if !has_waited.get() {
                    return this.offer_hears(reactor, id, Heard::Announced(true));
                }
                // In a later turn, which has heard of a successor that has died
                // meanwhile: then it is not to have everything.
                let this = this.clone();
                reactor.call_later(Duration::ZERO, move |reactor| {
                    this.offer_hears(reactor, id, Heard::Announced(true));
                });
            },
        );
        waits.set(true);
        if let Some(offer) = self.shared.state.borrow_mut().offers.get_mut(&id) {
            offer.announcement = number;
        }
    }

    /// The successor came no further.
    fn take_announcement_back(&self, id: u64) {
        let number = {
            let mut state = self.shared.state.borrow_mut();
            let offer = state.offers.get_mut(&id);
            offer.and_then(|offer| offer.announcement.take())
        };
        if let (Some(number), Some(notifier)) = (number, &self.shared.settings.notifier)
            && !notifier.take_back(number)
        {
            // A manager that listens to all our processes hears it.
            self.tell_manager(&Notice::new().main_pid(std::process::id()));
        }
    }

    /// Everything is said.
    fn finish(&self, reactor: &mut Reactor, id: u64) {
        self.shared.state.borrow_mut().attempt = None;
        if let Some(notifier) = &self.shared.settings.notifier {
            notifier.is_not_main();
        }
        self.say(reactor, id, &FromPredecessor::Done, Vec::new());
        self.close_listeners(reactor);
    }
}
