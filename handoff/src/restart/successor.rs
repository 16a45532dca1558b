//! The side of the process that takes over.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use bowline_protocol::{
    Address, BuildContext, CloseReason, ConnectError, Context, Factory, NotSent, SocketFile,
    UnixTransport, UnixTransportHandle,
};
use bowline_reactor::{DelayedCall, Reactor};
use bowline_transport::UnixStream;

use super::handshake::{Act, Taking, Told};
use super::messages::{FromPredecessor, FromSuccessor, Offered, Refusal};
use super::moving::{self, Moved};
use super::predecessor::settings;
use super::{CONTROL, Restart, RestartError, Start, control};
use crate::channel::{self, Channel, ChannelError, ChannelReceiver, Peer, has_peer_ended};
use crate::inherited::Inherited;
use crate::log;
use crate::wire::{self, Incoming};

const FAREWELL: Duration = Duration::from_secs(1);

/// A take-over under way.
pub(super) struct TakeOver {
    machine: Taking,
    channel: UnixTransportHandle,
    pid: u32,
    /// Whom the service manager was to watch in the first place, or 0.
    watched: u32,
    deadline: Option<DelayedCall>,
    inherited: Inherited,
    files: Vec<(String, SocketFile)>,
    refusal: Option<Refusal>,
    is_lost: bool,
    /// Connections that are here and not served yet.
    prepared: BTreeMap<u32, Vec<Option<Moved>>>,
}

impl TakeOver {
    /// Lets go of the listeners that nobody has claimed.
    pub(super) fn let_go(&mut self) -> Inherited {
        std::mem::take(&mut self.inherited)
    }
}

/// How often a predecessor that goes while we greet it is looked for again, and
/// after which time: it is ending, and then nobody listens there.
pub(super) const LOOK_AGAIN: u32 = 10;
const LOOK_AGAIN_AFTER: Duration = Duration::from_millis(20);

/// Looks for a predecessor.
pub(super) fn connect(reactor: &mut Reactor, restart: &Restart, again: u32) -> io::Result<()> {
    let finder = Finder {
        restart: restart.clone(),
        again,
    };
    control::connect(reactor, restart, finder)
}

/// Is told whether there is a predecessor.
pub(super) struct Finder {
    restart: Restart,
    again: u32,
}

impl Finder {
    /// Our end of a channel with a predecessor.
    pub(super) fn channel(&self) -> Channel<Receiver> {
        let roles = (channel::Role::SUCCESSOR, channel::Role::PREDECESSOR);
        let settings = settings(&self.restart, roles);
        let receiver = Receiver {
            restart: self.restart.clone(),
            is_made: false,
            again: self.again,
        };
        Channel::new(settings, receiver)
    }

    /// Nobody serves.
    pub(super) fn found_nobody(&self, reactor: &mut Reactor) {
        let restart = self.restart.clone();
        reactor.defer(move |reactor| restart.start_cold(reactor));
    }
}

impl Factory<UnixStream> for Finder {
    type Protocol = Channel<Receiver>;

    fn build_protocol(&mut self, _: &mut BuildContext<'_>, _: &Address) -> Option<Self::Protocol> {
        Some(self.channel())
    }

    fn connection_failed(&mut self, cx: &mut BuildContext<'_>, error: &ConnectError) {
        let nobody = match error {
            ConnectError::Refused(_) => true,
            ConnectError::Os(error) => error.kind() == io::ErrorKind::NotFound,
            _ => false,
        };
        let error = match error.as_os() {
            Some(error) => io::Error::new(error.kind(), error.to_string()),
            None => io::ErrorKind::TimedOut.into(),
        };
        if nobody {
            return self.found_nobody(cx.reactor);
        }
        let restart = self.restart.clone();
        cx.reactor
            .defer(move |reactor| restart.not_started(reactor, RestartError::Control(error)));
    }
}

/// Passes on what arrives, to be dealt with when no callback runs.
pub(super) struct Receiver {
    restart: Restart,
    is_made: bool,
    again: u32,
}

impl<T: UnixTransport> ChannelReceiver<T> for Receiver {
    type Message = FromPredecessor;

    fn channel_made(&mut self, cx: &mut Context<'_, T>, peer: &Peer) {
        self.is_made = true;
        let format = self.restart.shared.settings.format;
        if let Err(error) = wire::send(cx.transport, &FromSuccessor::Take { format }, Vec::new()) {
            log::debug!(target: log::HANDOFF, "not sent: {error}");
        }
        self.restart.shared.state.borrow_mut().take_over = Some(TakeOver {
            machine: Taking::Asking,
            channel: cx.transport.unix_handle(),
            pid: peer.pid,
            watched: 0,
            deadline: None,
            inherited: Inherited::new(),
            files: Vec::new(),
            refusal: None,
            is_lost: false,
            prepared: BTreeMap::new(),
        });
        self.restart.set_taking_deadline(cx.reactor);
    }

    fn message_received(&mut self, cx: &mut Context<'_, T>, incoming: Incoming<FromPredecessor>) {
        let restart = self.restart.clone();
        cx.reactor
            .defer(move |reactor| restart.told(reactor, incoming));
    }

    fn channel_lost(
        &mut self,
        cx: &mut Context<'_, T>,
        error: Option<&ChannelError>,
        reason: &CloseReason,
    ) {
        match error {
            Some(error) => log::warn!(target: log::HANDOFF, "predecessor: {error}"),
            None => log::debug!(target: log::HANDOFF, "predecessor: {reason}"),
        }
        let restart = self.restart.clone();
        if self.is_made {
            let is_alone = has_peer_ended(error, reason);
            cx.reactor.defer(move |reactor| {
                if !is_alone {
                    // The channel broke here: the predecessor lives, and goes on.
                    restart.takes(reactor, Told::Abort);
                }
                restart.predecessor_is_gone(reactor);
            });
        } else if error.is_none() && self.again > 0 {
            let again = self.again - 1;
            cx.reactor.call_later(LOOK_AGAIN_AFTER, move |reactor| {
                if let Err(error) = connect(reactor, &restart, again) {
                    restart.not_started(reactor, RestartError::Control(error));
                }
            });
        } else {
            let why = match error {
                Some(ChannelError::HandshakeTimedOut) => RestartError::TimedOut,
                _ => RestartError::GaveUp,
            };
            cx.reactor
                .defer(move |reactor| restart.not_started(reactor, why));
        }
    }
}

impl Restart {
    fn with_take_over<R>(&self, call: impl FnOnce(&mut TakeOver) -> R) -> Option<R> {
        self.shared.state.borrow_mut().take_over.as_mut().map(call)
    }

    fn told(&self, reactor: &mut Reactor, incoming: Incoming<FromPredecessor>) {
        let Incoming {
            message,
            descriptors,
            lost,
        } = incoming;
        let told = match message {
            FromPredecessor::Refused { refusal } => {
                self.with_take_over(|take_over| take_over.refusal = Some(refusal));
                Told::Refused
            }
            FromPredecessor::Offer { batches, watched } => {
                self.with_take_over(|take_over| take_over.watched = watched);
                Told::Offer(batches)
            }
            FromPredecessor::Listeners { batch, listeners } => {
                if listeners.len() != descriptors.len() {
                    log::warn!(
                        target: log::HANDOFF,
                        "{} descriptors came of {} listeners, {lost} were lost on the way",
                        descriptors.len(),
                        listeners.len()
                    );
                    Told::Abort
                } else {
                    self.keep_listeners(listeners, descriptors);
                    Told::Listeners(batch)
                }
            }
            FromPredecessor::Commit => Told::Commit,
            FromPredecessor::Connections { batch, connections } => {
                let machine = self.with_take_over(|take_over| take_over.machine);
                if machine.is_some_and(Taking::is_receiving) {
                    self.prepare(reactor, batch, connections, descriptors);
                    return self.set_taking_deadline(reactor);
                }
                Told::Abort
            }
            FromPredecessor::Go { batch } => {
                self.go(reactor, batch);
                return self.set_taking_deadline(reactor);
            }
            FromPredecessor::Done => Told::Done,
            FromPredecessor::Abort => Told::Abort,
        };
        self.takes(reactor, told);
    }

    fn keep_listeners(&self, listeners: Vec<Offered>, descriptors: Vec<OwnedFd>) {
        self.with_take_over(|take_over| {
            for (offered, fd) in listeners.into_iter().zip(descriptors) {
                if let Some(file) = offered.file {
                    take_over.files.push((offered.name.clone(), file));
                }
                take_over.inherited.add(offered.name, fd);
            }
        });
    }

    fn takes(&self, reactor: &mut Reactor, told: Told) {
        let acts = self.with_take_over(|take_over| {
            log::trace!(target: log::HANDOFF, "{:?} is told {told:?}", take_over.machine);
            take_over.machine.hear(told)
        });
        for act in acts.unwrap_or_default() {
            match act {
                Act::Acknowledge(batch) => self.answer(reactor, &FromSuccessor::Taken { batch }),
                Act::Adopt => self.adopt(reactor),
                Act::SayReady => self.answer(reactor, &FromSuccessor::Ready),
                Act::SaySo => self.answer(reactor, &FromSuccessor::Serving),
                Act::Serve => self.accept(reactor),
                Act::Finish => self.taken_over(reactor),
                Act::Withdraw => self.withdraw(reactor),
                Act::HangUp => {
                    self.answer(reactor, &FromSuccessor::Abort);
                    self.hang_up_on_predecessor(reactor);
                }
                Act::Fail => self.take_over_failed(reactor, told),
            }
        }
        self.set_taking_deadline(reactor);
    }

    fn set_taking_deadline(&self, reactor: &mut Reactor) {
        let patience = self.shared.settings.patience();
        let this = self.clone();
        self.with_take_over(|take_over| {
            if let Some(deadline) = take_over.deadline.take() {
                // It may be what runs.
                let _ = deadline.cancel(reactor);
            }
            if let Some(limit) = take_over.machine.patience(patience) {
                let late = move |reactor: &mut Reactor| this.takes(reactor, Told::TooLate);
                take_over.deadline = Some(reactor.call_later(limit, late));
            }
        });
    }

    fn answer(&self, reactor: &mut Reactor, message: &FromSuccessor) {
        let channel = self.with_take_over(|take_over| take_over.channel);
        if let Some(channel) = channel.and_then(|channel| reactor.get(channel))
            && let Err(error) = wire::send(channel, message, Vec::new())
        {
            // Its end is going to be told.
            log::debug!(target: log::HANDOFF, "not sent: {error}");
        }
    }

    fn hang_up_on_predecessor(&self, reactor: &mut Reactor) {
        let channel = self.with_take_over(|take_over| take_over.channel);
        if let Some(channel) = channel.and_then(|channel| reactor.get(channel)) {
            channel.lose_connection_within(FAREWELL);
        }
    }

    /// Everything is here: the control socket is adopted, and the program adopts
    /// and binds.
    fn adopt(&self, reactor: &mut Reactor) {
        let taken = {
            let mut state = self.shared.state.borrow_mut();
            let more = std::mem::take(&mut state.inherited);
            state.take_over.as_mut().map(|take_over| {
                let mut inherited = std::mem::take(&mut take_over.inherited);
                inherited.append(more);
                (inherited, std::mem::take(&mut take_over.files))
            })
        };
        let Some((mut inherited, files)) = taken else {
            return;
        };
        let control = match inherited.claim(CONTROL) {
            Some(fd) => control::adopt(reactor, self, fd),
            None => Err(io::ErrorKind::NotFound.into()),
        };
        let result = control.and_then(|control| {
            self.add_listener(reactor, CONTROL, control);
            let mut state = self.shared.state.borrow_mut();
            if let Some(named) = state.listeners.last_mut() {
                let file = files.iter().find(|(name, _)| name == CONTROL);
                named.file = file.map(|(_, file)| *file);
            }
            drop(state);
            self.listen(reactor, inherited, files)
        });
        let this = self.clone();
        match result {
            // In a later turn, which has polled.
            Ok(()) => {
                reactor.call_later(Duration::ZERO, move |reactor| {
                    this.takes(reactor, Told::Adopted);
                    if this.with_take_over(|take_over| take_over.is_lost) == Some(true) {
                        this.takes(reactor, Told::Lost);
                    }
                });
            }
            Err(error) => self.listen_failed(reactor, error),
        }
    }

    /// The predecessor may go, if there is one.
    pub(super) fn part(&self, reactor: &mut Reactor) {
        self.answer(reactor, &FromSuccessor::Parted);
    }

    /// The processes in whose place this one serves.
    pub(super) fn heir_of(&self) -> Vec<u32> {
        let heir_of = self.with_take_over(|take_over| [take_over.pid, take_over.watched]);
        // Where it is of nobody, that is no process either.
        let heir_of = heir_of.into_iter().flatten();
        heir_of.filter(|pid| *pid != 0).collect()
    }

    /// That the program could not listen, if there is a predecessor.
    pub(super) fn tell_predecessor_of_failure(&self, reactor: &mut Reactor) {
        self.with_take_over(|take_over| take_over.machine.hear(Told::NotAdopted));
        self.answer(reactor, &FromSuccessor::Abort);
        self.hang_up_on_predecessor(reactor);
    }

    fn take_over_failed(&self, reactor: &mut Reactor, told: Told) {
        let refusal = self.with_take_over(|take_over| take_over.refusal).flatten();
        let error = match (told, refusal) {
            (Told::Refused, Some(refusal)) => RestartError::Refused(refusal),
            (Told::Lost, _) => RestartError::Lost,
            (Told::TooLate, _) => RestartError::TimedOut,
            _ => RestartError::GaveUp,
        };
        self.not_started(reactor, error);
    }

    fn taken_over(&self, reactor: &mut Reactor) {
        let (pid, connections) = {
            let state = self.shared.state.borrow();
            (
                state
                    .take_over
                    .as_ref()
                    .map_or(0, |take_over| take_over.pid),
                state.moved,
            )
        };
        self.serve(reactor, Start::TookOver { pid, connections });
    }

    // Connections.

    fn prepare(
        &self,
        reactor: &mut Reactor,
        batch: u32,
        records: Vec<super::messages::Record>,
        descriptors: Vec<OwnedFd>,
    ) {
        let connections = {
            let program = self.shared.program.borrow();
            moving::unpack(records, descriptors, |kind| program.takes(kind))
        };
        let refused = connections
            .iter()
            .zip(0..)
            .filter(|(connection, _)| connection.is_none())
            .map(|(_, at)| at)
            .collect();
        self.with_take_over(|take_over| {
            take_over.prepared.insert(batch, connections);
        });
        self.answer(reactor, &FromSuccessor::Prepared { batch, refused });
    }

    fn go(&self, reactor: &mut Reactor, batch: u32) {
        let channel = self.with_take_over(|take_over| {
            // It may have given up meanwhile, or they were taken back.
            let is_ours = take_over.machine.is_receiving();
            let is_there = is_ours && take_over.prepared.contains_key(&batch);
            is_there.then_some(take_over.channel)
        });
        let Some(channel) = channel.flatten() else {
            return self.takes(reactor, Told::Abort);
        };
        self.answer(reactor, &FromSuccessor::Live { batch });
        if let Some(channel) = reactor.get(channel) {
            let position = channel.bytes_sent() + channel.unsent_bytes() as u64;
            let this = self.clone();
            // Were they served before, and we died, the predecessor would take back
            // connections that have gone on here.
            let serve = move |reactor: &mut Reactor, said: Result<(), NotSent>| {
                if said.is_ok() {
                    this.serve_batch(reactor, batch);
                }
            };
            channel.when_sent(position, Box::new(serve));
        }
    }

    fn serve_batch(&self, reactor: &mut Reactor, batch: u32) {
        let prepared = self.with_take_over(|take_over| take_over.prepared.remove(&batch));
        let Some(prepared) = prepared.flatten() else {
            return;
        };
        for moved in prepared.into_iter().flatten() {
            self.shared.state.borrow_mut().moved += 1;
            self.call_program(reactor, |program, reactor| {
                program.connection_moved(reactor, moved);
            });
        }
    }

    fn predecessor_is_gone(&self, reactor: &mut Reactor) {
        let found = self.with_take_over(|take_over| {
            take_over.is_lost = true;
            let batches: Vec<_> = take_over.prepared.keys().copied().collect();
            (take_over.machine, batches)
        });
        let Some((machine, batches)) = found else {
            return;
        };
        // Those of which we have said that they live are served. One that took the
        // others back has said so. One that has died has not, and then nobody else has
        // them.
        for batch in batches {
            if machine == Taking::Failed {
                self.with_take_over(|take_over| take_over.prepared.remove(&batch));
            } else {
                self.serve_batch(reactor, batch);
            }
        }
        self.takes(reactor, Told::Lost);
    }
}
