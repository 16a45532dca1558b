//! The process that takes over, or starts cold where nobody serves.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Duration;

use bowline_protocol::{
    Address, BuildContext, CloseReason, ConnectError, Context, Factory, NotSent, SocketFile,
    UnixTransport, UnixTransportHandle,
};
use bowline_reactor::{DelayedCall, Reactor};

use super::Restart;
use super::baton::Baton;
use super::control::CONTROL;
use super::error::RestartError;
use super::handshake::{Act, Taking, Told};
use super::messages::{FromPredecessor, FromSuccessor, Offered, Record};
use super::moving::{self, Moved};
use super::predecessor::FAREWELL;
use super::program::Start;
use super::server::Server;
use crate::channel::{Channel, ChannelError, ChannelReceiver, Peer, Role, has_peer_ended};
use crate::inherited::Inherited;
use crate::log;
use crate::wire::{self, Incoming};

/// How often a predecessor that goes while we greet it is looked for again, and
/// after which time: it is ending, and then nobody listens there.
const LOOK_AGAIN: u32 = 10;
const LOOK_AGAIN_AFTER: Duration = Duration::from_millis(20);

/// The process that takes over.
pub(super) struct Successor {
    restart: Restart,
    /// What came with the start of this process, until the program listens.
    inherited: RefCell<Inherited>,
    /// The predecessor, once it was found.
    take_over: RefCell<Option<TakeOver>>,
}

/// A take-over under way.
struct TakeOver {
    step: Taking,
    channel: UnixTransportHandle,
    pid: u32,
    /// Whom the service manager was to watch in the first place, or 0.
    watched: u32,
    deadline: Option<DelayedCall>,
    /// Who serves where the two cannot say.
    baton: Option<Baton>,
    inherited: Inherited,
    files: Vec<(String, SocketFile)>,
    /// Connections that are here and not served yet.
    prepared: BTreeMap<u32, Vec<Option<Moved>>>,
}

/// Is told whether there is a predecessor.
pub(crate) struct Finder {
    successor: Rc<Successor>,
    again: u32,
}

impl Finder {
    /// Our end of a channel with a predecessor.
    pub(crate) fn channel(&self) -> Channel<PredecessorEnd> {
        let server = &self.successor.restart.server;
        let settings = server.channel_settings(Role::SUCCESSOR, Role::PREDECESSOR);
        let receiver = PredecessorEnd {
            successor: Rc::clone(&self.successor),
            is_made: false,
            again: self.again,
        };
        Channel::new(settings, receiver)
    }

    /// Nobody serves.
    pub(crate) fn found_nobody(&self, reactor: &mut Reactor) {
        let successor = Rc::clone(&self.successor);
        reactor.defer(move |reactor| successor.start_cold(reactor));
    }
}

impl<T: UnixTransport> Factory<T> for Finder {
    type Protocol = Channel<PredecessorEnd>;

    fn build_protocol(&mut self, _: &mut BuildContext<'_>, _: &Address) -> Option<Self::Protocol> {
        Some(self.channel())
    }

    fn connection_failed(&mut self, cx: &mut BuildContext<'_>, error: &ConnectError) {
        let nobody = match error {
            ConnectError::Refused(_) => true,
            ConnectError::Os(error) => error.kind() == io::ErrorKind::NotFound,
            _ => false,
        };
        if nobody {
            return self.found_nobody(cx.reactor);
        }
        let error = match error.as_os() {
            Some(error) => io::Error::new(error.kind(), error.to_string()),
            None => io::ErrorKind::TimedOut.into(),
        };
        let successor = Rc::clone(&self.successor);
        cx.reactor
            .defer(move |reactor| successor.not_started(reactor, RestartError::Control(error)));
    }
}

/// Passes on what arrives, to be dealt with when no callback runs.
pub(crate) struct PredecessorEnd {
    successor: Rc<Successor>,
    is_made: bool,
    again: u32,
}

impl<T: UnixTransport> ChannelReceiver<T> for PredecessorEnd {
    type Message = FromPredecessor;

    fn channel_made(&mut self, cx: &mut Context<'_, T>, peer: &Peer) {
        self.is_made = true;
        let format = self.successor.restart.server.settings.format;
        if let Err(error) = wire::send(cx.transport, &FromSuccessor::Take { format }, Vec::new()) {
            log::debug!(target: log::HANDOFF, "not sent: {error}");
        }
        self.successor.take_over.replace(Some(TakeOver {
            step: Taking::Asking,
            channel: cx.transport.unix_handle(),
            pid: peer.pid,
            watched: 0,
            deadline: None,
            baton: None,
            inherited: Inherited::new(),
            files: Vec::new(),
            prepared: BTreeMap::new(),
        }));
        self.successor.set_deadline(cx.reactor);
    }

    fn message_received(&mut self, cx: &mut Context<'_, T>, incoming: Incoming<FromPredecessor>) {
        let successor = Rc::clone(&self.successor);
        cx.reactor
            .defer(move |reactor| successor.receive(reactor, incoming));
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
        let successor = Rc::clone(&self.successor);
        if self.is_made {
            let told = match reason {
                _ if has_peer_ended(error, reason) => Told::Lost,
                // This process ends, and decides nothing any more.
                CloseReason::ReactorStopped => Told::Abort,
                _ => Told::Broken,
            };
            cx.reactor
                .defer(move |reactor| successor.channel_ended(reactor, told));
        } else if error.is_none() && self.again > 0 {
            let again = self.again - 1;
            cx.reactor.call_later(LOOK_AGAIN_AFTER, move |reactor| {
                if let Err(error) = successor.look(reactor, again) {
                    successor.not_started(reactor, RestartError::Control(error));
                }
            });
        } else {
            let why = match error {
                Some(ChannelError::HandshakeTimedOut) => RestartError::TimedOut,
                _ => RestartError::GaveUp,
            };
            cx.reactor
                .defer(move |reactor| successor.not_started(reactor, why));
        }
    }
}

impl Successor {
    /// Looks for a predecessor, and takes over from it or starts cold.
    pub(super) fn begin(
        reactor: &mut Reactor,
        restart: Restart,
        inherited: Inherited,
    ) -> io::Result<()> {
        let this = Rc::new(Self {
            restart,
            inherited: RefCell::new(inherited),
            take_over: RefCell::default(),
        });
        this.look(reactor, LOOK_AGAIN)
    }

    fn look(self: &Rc<Self>, reactor: &mut Reactor, again: u32) -> io::Result<()> {
        let finder = Finder {
            successor: Rc::clone(self),
            again,
        };
        let settings = &self.restart.server.settings;
        settings.control.connect(reactor, settings, finder)
    }

    fn with<R>(&self, call: impl FnOnce(&mut TakeOver) -> R) -> Option<R> {
        self.take_over.borrow_mut().as_mut().map(call)
    }

    // Starting.

    /// Nobody serves.
    fn start_cold(self: &Rc<Self>, reactor: &mut Reactor) {
        let Restart {
            server,
            predecessor,
        } = &self.restart;
        // First of all: of two that start cold, one has to give way.
        let settings = &server.settings;
        match settings.control.listen(reactor, settings, predecessor) {
            Ok(handle) => server.add_listener(reactor, CONTROL, handle, None),
            Err(error) => return self.not_started(reactor, RestartError::Control(error)),
        }
        match self.listen(reactor, self.inherited.take(), Vec::new()) {
            Ok(()) => self.serve(reactor, Start::Cold),
            Err(error) => self.listen_failed(reactor, error),
        }
    }

    fn listen(
        self: &Rc<Self>,
        reactor: &mut Reactor,
        inherited: Inherited,
        files: Vec<(String, SocketFile)>,
    ) -> io::Result<()> {
        let this = Rc::clone(self);
        let panicked = move |reactor: &mut Reactor, error| this.listen_failed(reactor, error);
        Server::listen(&self.restart, reactor, inherited, files, panicked)
    }

    /// The program could not listen, of which a predecessor is told.
    fn listen_failed(self: &Rc<Self>, reactor: &mut Reactor, error: io::Error) {
        self.with(|take_over| take_over.step.hear(Told::NotAdopted));
        self.answer(reactor, &FromSuccessor::Abort);
        self.hang_up(reactor);
        self.not_started(reactor, RestartError::Listen(error));
    }

    fn not_started(&self, reactor: &mut Reactor, error: RestartError) {
        // Nobody is going to claim what was inherited.
        let received = self.with(|take_over| {
            take_over.baton = None;
            std::mem::take(&mut take_over.inherited)
        });
        drop((received, self.inherited.take()));
        self.restart.server.not_started(reactor, error);
    }

    /// This process serves, alone. Once the service manager knows, the predecessor may
    /// go, if there is one.
    fn serve(self: &Rc<Self>, reactor: &mut Reactor, start: Start) {
        // The processes in whose place this one serves.
        let heir_of = self.with(|take_over| {
            take_over.baton = None;
            [take_over.pid, take_over.watched]
        });
        // Where it is of nobody, that is no process either.
        let heir_of = heir_of.into_iter().flatten();
        let heir_of: Vec<_> = heir_of.filter(|pid| *pid != 0).collect();
        let this = Rc::clone(self);
        let server = &self.restart.server;
        server.serve(reactor, start, &heir_of, move |reactor| {
            this.answer(reactor, &FromSuccessor::Parted);
        });
    }

    // Taking over.

    fn receive(self: &Rc<Self>, reactor: &mut Reactor, incoming: Incoming<FromPredecessor>) {
        let Incoming {
            message,
            descriptors,
            lost,
        } = incoming;
        let told = match message {
            FromPredecessor::Refused { refusal } => Told::Refused(refusal),
            FromPredecessor::Offer { batches, watched } => match descriptors.into_iter().next() {
                Some(baton) => {
                    self.with(|take_over| {
                        take_over.watched = watched;
                        take_over.baton = Some(baton.into());
                    });
                    Told::Offer(batches)
                }
                None => {
                    log::warn!(target: log::HANDOFF, "an offer came without its descriptor");
                    Told::Abort
                }
            },
            FromPredecessor::Listeners { batch, listeners } => {
                if listeners.len() == descriptors.len() {
                    self.keep_listeners(listeners, descriptors);
                    Told::Listeners(batch)
                } else {
                    log::warn!(
                        target: log::HANDOFF,
                        "{} descriptors came of {} listeners, {lost} were lost on the way",
                        descriptors.len(),
                        listeners.len()
                    );
                    Told::Abort
                }
            }
            FromPredecessor::Commit => Told::Commit,
            FromPredecessor::Connections { batch, connections } => {
                if self.with(|take_over| take_over.step.is_receiving()) == Some(true) {
                    self.prepare(reactor, batch, connections, descriptors);
                    return self.set_deadline(reactor);
                }
                Told::Abort
            }
            FromPredecessor::Go { batch } => {
                self.go(reactor, batch);
                return self.set_deadline(reactor);
            }
            FromPredecessor::Done => Told::Done,
            FromPredecessor::Abort => Told::Abort,
        };
        self.hear(reactor, told);
    }

    fn keep_listeners(&self, listeners: Vec<Offered>, descriptors: Vec<OwnedFd>) {
        self.with(|take_over| {
            for (offered, fd) in listeners.into_iter().zip(descriptors) {
                if let Some(file) = offered.file {
                    take_over.files.push((offered.name.clone(), file));
                }
                take_over.inherited.add(offered.name, fd);
            }
        });
    }

    /// Takes the steps that follow from what was told.
    fn hear(self: &Rc<Self>, reactor: &mut Reactor, told: Told) {
        let acts = self.with(|take_over| {
            log::trace!(target: log::HANDOFF, "{:?} is told {told:?}", take_over.step);
            take_over.step.hear(told)
        });
        let server = &self.restart.server;
        for act in acts.unwrap_or_default() {
            match act {
                Act::Acknowledge(batch) => self.answer(reactor, &FromSuccessor::Taken { batch }),
                Act::Adopt => self.adopt(reactor),
                Act::SayReady => self.answer(reactor, &FromSuccessor::Ready),
                Act::SaySo => self.answer(reactor, &FromSuccessor::Serving),
                Act::Serve => server.accept(reactor),
                Act::Decide => self.decide(reactor),
                Act::Finish => {
                    let pid = self.with(|take_over| take_over.pid).unwrap_or(0);
                    let connections = server.moved.get();
                    self.serve(reactor, Start::TookOver { pid, connections });
                }
                Act::Withdraw => server.withdraw(reactor),
                Act::HangUp => {
                    self.answer(reactor, &FromSuccessor::Abort);
                    self.hang_up(reactor);
                }
                Act::Fail => {
                    let error = match told {
                        Told::Refused(refusal) => RestartError::Refused(refusal),
                        Told::Lost => RestartError::Lost,
                        Told::TooLate => RestartError::TimedOut,
                        _ => RestartError::GaveUp,
                    };
                    self.not_started(reactor, error);
                }
            }
        }
        self.set_deadline(reactor);
    }

    fn set_deadline(self: &Rc<Self>, reactor: &mut Reactor) {
        let patience = self.restart.server.settings.patience();
        let this = Rc::clone(self);
        self.with(|take_over| {
            if let Some(deadline) = take_over.deadline.take() {
                // It may be what runs.
                let _ = deadline.cancel(reactor);
            }
            if let Some(limit) = take_over.step.patience(patience) {
                let late = move |reactor: &mut Reactor| this.hear(reactor, Told::TooLate);
                take_over.deadline = Some(reactor.call_later(limit, late));
            }
        });
    }

    fn answer(&self, reactor: &mut Reactor, message: &FromSuccessor) {
        let channel = self.with(|take_over| take_over.channel);
        if let Some(channel) = channel.and_then(|channel| reactor.get(channel))
            && let Err(error) = wire::send(channel, message, Vec::new())
        {
            // Its end is going to be told.
            log::debug!(target: log::HANDOFF, "not sent: {error}");
        }
    }

    fn hang_up(&self, reactor: &mut Reactor) {
        let channel = self.with(|take_over| take_over.channel);
        if let Some(channel) = channel.and_then(|channel| reactor.get(channel)) {
            channel.lose_connection_within(FAREWELL);
        }
    }

    /// Everything is here: the control socket is adopted, and the program adopts
    /// and binds.
    fn adopt(self: &Rc<Self>, reactor: &mut Reactor) {
        let taken = self.with(|take_over| {
            let inherited = std::mem::take(&mut take_over.inherited);
            (inherited, std::mem::take(&mut take_over.files))
        });
        let Some((mut inherited, files)) = taken else {
            return;
        };
        inherited.append(self.inherited.take());
        let adopted = self.adopt_control(reactor, &mut inherited, &files);
        match adopted.and_then(|()| self.listen(reactor, inherited, files)) {
            // In a later turn, which has polled.
            Ok(()) => {
                let this = Rc::clone(self);
                reactor.call_later(Duration::ZERO, move |reactor| {
                    this.hear(reactor, Told::Adopted);
                });
            }
            Err(error) => self.listen_failed(reactor, error),
        }
    }

    fn adopt_control(
        &self,
        reactor: &mut Reactor,
        inherited: &mut Inherited,
        files: &[(String, SocketFile)],
    ) -> io::Result<()> {
        let Restart {
            server,
            predecessor,
        } = &self.restart;
        let fd = inherited.claim(CONTROL).ok_or(io::ErrorKind::NotFound)?;
        let settings = &server.settings;
        let handle = settings.control.adopt(reactor, settings, predecessor, fd)?;
        let file = files.iter().find(|(name, _)| name == CONTROL);
        server.add_listener(reactor, CONTROL, handle, file.map(|(_, file)| *file));
        Ok(())
    }

    // Connections.

    fn prepare(
        &self,
        reactor: &mut Reactor,
        batch: u32,
        records: Vec<Record>,
        descriptors: Vec<OwnedFd>,
    ) {
        let server = &self.restart.server;
        let connections = moving::unpack(records, descriptors, |kind| server.takes(kind));
        let refused = connections
            .iter()
            .zip(0..)
            .filter(|(connection, _)| connection.is_none())
            .map(|(_, at)| at)
            .collect();
        self.with(|take_over| take_over.prepared.insert(batch, connections));
        self.answer(reactor, &FromSuccessor::Prepared { batch, refused });
    }

    /// Says of a batch that it lives, and serves it when that has left: were it served
    /// before, and we died, the predecessor would take back connections that have gone
    /// on here.
    fn go(self: &Rc<Self>, reactor: &mut Reactor, batch: u32) {
        let channel = self.with(|take_over| {
            // It may have given up meanwhile, or they were taken back.
            let is_ours = take_over.step.is_receiving();
            let is_there = is_ours && take_over.prepared.contains_key(&batch);
            is_there.then_some(take_over.channel)
        });
        let Some(channel) = channel.flatten() else {
            return self.hear(reactor, Told::Abort);
        };
        self.answer(reactor, &FromSuccessor::Live { batch });
        if let Some(channel) = reactor.get(channel) {
            let position = channel.bytes_sent() + channel.unsent_bytes() as u64;
            let this = Rc::clone(self);
            let serve = move |reactor: &mut Reactor, said: Result<(), NotSent>| {
                if said.is_ok() {
                    this.serve_batch(reactor, batch);
                }
            };
            channel.when_sent(position, Box::new(serve));
        }
    }

    fn serve_batch(&self, reactor: &mut Reactor, batch: u32) {
        let prepared = self.with(|take_over| take_over.prepared.remove(&batch));
        let server = &self.restart.server;
        for moved in prepared.flatten().into_iter().flatten().flatten() {
            server.moved.update(|count| count + 1);
            server.call(reactor, |program, reactor| {
                program.connection_moved(reactor, moved);
            });
        }
    }

    // The end.

    fn channel_ended(self: &Rc<Self>, reactor: &mut Reactor, told: Told) {
        if told != Told::Lost {
            // The predecessor has heard all that we said, and takes back what we did not
            // say that we serve.
            self.drop_prepared();
        }
        self.hear(reactor, told);
        match self.with(|take_over| take_over.step) {
            Some(Taking::Failed) => self.drop_prepared(),
            _ => self.serve_prepared(reactor),
        }
    }

    /// The channel is gone: takes the baton, if the predecessor has not.
    fn decide(self: &Rc<Self>, reactor: &mut Reactor) {
        let baton = self.with(|take_over| take_over.baton.take());
        let is_ours = baton.flatten().is_none_or(Baton::take);
        if is_ours {
            // Nobody else has them.
            self.serve_prepared(reactor);
        }
        self.hear(reactor, Told::Decided(is_ours));
    }

    /// Those of which we have said that they live are served. One that took the others
    /// back has said so, or has the baton.
    fn serve_prepared(&self, reactor: &mut Reactor) {
        let batches = self.with(|take_over| take_over.prepared.keys().copied().collect());
        let batches: Vec<_> = batches.unwrap_or_default();
        for batch in batches {
            self.serve_batch(reactor, batch);
        }
    }

    fn drop_prepared(&self) {
        drop(self.with(|take_over| std::mem::take(&mut take_over.prepared)));
    }
}
