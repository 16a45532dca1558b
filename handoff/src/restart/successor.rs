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
use bowline_reactor::{DelayedCall, Description, Reactor};

use super::Restart;
use super::baton::Baton;
use super::control::CONTROL;
use super::error::RestartError;
use super::handshake::{Act, Taking, Told};
use super::messages::{FromPredecessor, FromSuccessor, Offered, Record};
use super::moving::{self, Moved};
use super::predecessor::FAREWELL;
use super::program::Start;
use super::search::Search;
use super::server::Server;
use crate::channel::{Channel, ChannelError, ChannelReceiver, Peer, Role, has_peer_ended};
use crate::inherited::Inherited;
use crate::log;
use crate::wire::{self, Incoming};

/// The process that takes over.
pub(super) struct Successor {
    restart: Restart,
    /// What came with the start of this process, until the program listens.
    inherited: RefCell<Inherited>,
    take_over: RefCell<TakeOver>,
}

/// How far it is.
struct TakeOver {
    step: Taking,
    search: Search,
    /// Why it came no further, the last time.
    why: Option<RestartError>,
    deadline: Option<DelayedCall>,
    found: Found,
}

/// The predecessor, once it was found, and what it has given.
#[derive(Default)]
struct Found {
    channel: Option<UnixTransportHandle>,
    pid: u32,
    /// Whom the service manager was to watch in the first place, or 0.
    watched: u32,
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
    /// The number of this look: what earlier ones find does not count any more.
    look: u32,
}

impl Finder {
    /// Our end of a channel with a predecessor.
    pub(crate) fn channel(&self) -> Channel<PredecessorEnd> {
        let server = &self.successor.restart.server;
        let settings = server.channel_settings(Role::SUCCESSOR, Role::PREDECESSOR);
        let receiver = PredecessorEnd {
            successor: Rc::clone(&self.successor),
            is_made: false,
            look: self.look,
        };
        Channel::new(settings, receiver)
    }

    /// Nobody serves.
    pub(crate) fn found_nobody(&self, reactor: &mut Reactor) {
        self.successor.tell(reactor, self.look, Told::Nobody, None);
    }
}

impl Factory for Finder {
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
        let why = Some(RestartError::Control(error));
        let successor = &self.successor;
        successor.tell(cx.reactor, self.look, Told::Cannot, why);
    }
}

/// Passes on what arrives, to be dealt with when no callback runs.
pub(crate) struct PredecessorEnd {
    successor: Rc<Successor>,
    is_made: bool,
    look: u32,
}

impl<T: UnixTransport> ChannelReceiver<T> for PredecessorEnd {
    type Message = FromPredecessor;

    fn channel_made(&mut self, cx: &mut Context<'_, T>, peer: &Peer) {
        self.is_made = true;
        self.successor.with(|take_over| {
            take_over.found = Found {
                channel: Some(cx.transport.unix_handle()),
                pid: peer.pid,
                ..Found::default()
            };
        });
        self.successor
            .tell(cx.reactor, self.look, Told::Found, None);
    }

    fn message_received(&mut self, cx: &mut Context<'_, T>, incoming: Incoming<FromPredecessor>) {
        let successor = Rc::clone(&self.successor);
        let look = self.look;
        cx.reactor.defer(move |reactor| {
            if successor.is_at(look) {
                successor.receive(reactor, incoming);
            }
        });
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
        let (successor, look) = (&self.successor, self.look);
        let told = match reason {
            // This process ends, and decides nothing any more.
            CloseReason::ReactorStopped if self.is_made => Told::Abort,
            CloseReason::ReactorStopped => return,
            _ if has_peer_ended(error, reason) => Told::Lost,
            _ => Told::Broken,
        };
        if self.is_made {
            let successor = Rc::clone(successor);
            cx.reactor.defer(move |reactor| {
                if successor.is_at(look) {
                    successor.channel_ended(reactor, told);
                }
            });
        } else if error.is_none() || told == Told::Lost {
            // It is ending, or whoever was about to serve did not make it.
            successor.tell(cx.reactor, look, Told::Lost, None);
        } else {
            let why = match error {
                Some(ChannelError::HandshakeTimedOut) => RestartError::TimedOut,
                _ => RestartError::GaveUp,
            };
            successor.tell(cx.reactor, look, Told::Cannot, Some(why));
        }
    }

    fn describe(&self, description: &mut Description) {
        let Ok(take_over) = self.successor.take_over.try_borrow() else {
            return;
        };
        let prepared = take_over.found.prepared.values().map(Vec::len);
        description
            .section("Predecessor")
            .set("step", take_over.step.name())
            .set("prepared", prepared.sum::<usize>())
            .set("moved", self.successor.restart.server.moved_here.get());
    }
}

impl Successor {
    /// Looks for a predecessor, and takes over from it or starts cold.
    pub(super) fn begin(
        reactor: &mut Reactor,
        restart: Restart,
        inherited: Inherited,
    ) -> io::Result<()> {
        let limit = restart.server.settings.search;
        let this = Rc::new(Self {
            restart,
            inherited: RefCell::new(inherited),
            take_over: RefCell::new(TakeOver {
                step: Taking::Looking,
                search: Search::new(limit),
                why: None,
                deadline: None,
                found: Found::default(),
            }),
        });
        this.look(reactor)
    }

    fn with<R>(&self, call: impl FnOnce(&mut TakeOver) -> R) -> R {
        call(&mut self.take_over.borrow_mut())
    }

    /// Whether what is found by the look of this number counts.
    fn is_at(&self, look: u32) -> bool {
        self.with(|take_over| take_over.search.looks() == look)
    }

    // Looking.

    fn look(self: &Rc<Self>, reactor: &mut Reactor) -> io::Result<()> {
        let look = self.with(|take_over| take_over.search.look());
        let Restart { server, .. } = &self.restart;
        server.looks.set(look);
        let finder = Finder {
            successor: Rc::clone(self),
            look,
        };
        let settings = &server.settings;
        settings.control.connect(reactor, settings, finder)
    }

    /// What a look has found, and why it comes no further then; to be dealt with when no
    /// callback runs.
    fn tell(
        self: &Rc<Self>,
        reactor: &mut Reactor,
        look: u32,
        told: Told,
        why: Option<RestartError>,
    ) {
        let this = Rc::clone(self);
        reactor.defer(move |reactor| {
            if this.is_at(look) {
                this.hear_why(reactor, told, why);
            }
        });
    }

    fn hear_why(self: &Rc<Self>, reactor: &mut Reactor, told: Told, why: Option<RestartError>) {
        if why.is_some() {
            self.with(|take_over| take_over.why = why);
        }
        self.hear(reactor, told);
    }

    fn look_again(self: &Rc<Self>, reactor: &mut Reactor) {
        if let Err(error) = self.look(reactor) {
            self.hear_why(reactor, Told::Cannot, Some(RestartError::Control(error)));
        }
    }

    /// Nobody serves. Of several that find that out at once one has the place.
    fn settle(self: &Rc<Self>, reactor: &mut Reactor) {
        let Restart {
            server,
            predecessor,
        } = &self.restart;
        let settings = &server.settings;
        match settings.control.listen(reactor, settings, predecessor) {
            Ok(handle) => {
                server.add_listener(reactor, CONTROL, handle, None);
                self.hear(reactor, Told::Settled(true));
            }
            Err(error) => {
                let told = match error.kind() {
                    io::ErrorKind::AddrInUse => Told::Settled(false),
                    _ => Told::Cannot,
                };
                self.hear_why(reactor, told, Some(RestartError::Control(error)));
            }
        }
    }

    /// Lets go of what came, and looks again later.
    fn rest(self: &Rc<Self>, reactor: &mut Reactor) {
        // It has refused us, or is gone.
        self.hang_up(reactor);
        let (found, pause) = self.with(|take_over| {
            let found = std::mem::take(&mut take_over.found);
            (found, take_over.search.pause())
        });
        drop(found);
        let Some(pause) = pause else {
            return self.hear(reactor, Told::Rested(false));
        };
        if let Some(why) = self.with(|take_over| take_over.why.as_ref().map(|why| why.to_string()))
        {
            log::debug!(target: log::HANDOFF, "{why}: looking again in {pause:?}");
        }
        let this = Rc::clone(self);
        reactor.call_later(pause, move |reactor| {
            this.hear(reactor, Told::Rested(true));
        });
    }

    // Starting.

    /// Nobody serves, and the place is ours.
    fn start_cold(self: &Rc<Self>, reactor: &mut Reactor) {
        match self.listen(reactor, self.inherited.take(), Vec::new()) {
            Ok(()) => {
                self.hear(reactor, Told::Adopted);
                self.serve(reactor, Start::Cold);
            }
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
            take_over.found.baton = None;
            std::mem::take(&mut take_over.found.inherited)
        });
        drop((received, self.inherited.take()));
        self.restart.server.not_started(reactor, error);
    }

    /// This process serves, alone. Once the service manager knows, the predecessor may
    /// go, if there is one.
    fn serve(self: &Rc<Self>, reactor: &mut Reactor, start: Start) {
        // The processes in whose place this one serves.
        let heir_of = self.with(|take_over| {
            take_over.found.baton = None;
            [take_over.found.pid, take_over.found.watched]
        });
        // Where it is of nobody, that is no process either.
        let heir_of: Vec<_> = heir_of.into_iter().filter(|pid| *pid != 0).collect();
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
            FromPredecessor::Offer { batches, watched } => match received_baton(descriptors) {
                Some(baton) => {
                    self.with(|take_over| {
                        take_over.found.watched = watched;
                        take_over.found.baton = Some(baton);
                    });
                    Told::Offer(batches)
                }
                None => Told::Abort,
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
                if self.with(|take_over| take_over.step.is_receiving()) {
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
        self.with(|TakeOver { found, .. }| {
            for (offered, fd) in listeners.into_iter().zip(descriptors) {
                if let Some(file) = offered.file {
                    found.files.push((offered.name.clone(), file));
                }
                found.inherited.add(offered.name, fd);
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
        for act in acts {
            match act {
                Act::Look => self.look_again(reactor),
                Act::Settle => self.settle(reactor),
                Act::Rest => {
                    self.note_why(told);
                    self.rest(reactor);
                }
                Act::StartCold => self.start_cold(reactor),
                Act::Ask => {
                    let format = server.settings.format;
                    self.answer(reactor, &FromSuccessor::Take { format });
                }
                Act::Acknowledge(batch) => self.answer(reactor, &FromSuccessor::Taken { batch }),
                Act::Adopt => self.adopt(reactor),
                Act::SayReady => self.answer(reactor, &FromSuccessor::Ready),
                Act::SaySo => self.answer(reactor, &FromSuccessor::Serving),
                Act::Serve => server.accept(reactor),
                Act::Decide => self.decide(reactor),
                Act::Finish => {
                    let pid = self.with(|take_over| take_over.found.pid);
                    server.predecessor.set(pid);
                    let connections = server.moved.get();
                    self.serve(reactor, Start::TookOver { pid, connections });
                }
                Act::Withdraw => server.withdraw(reactor),
                Act::HangUp => {
                    self.answer(reactor, &FromSuccessor::Abort);
                    self.hang_up(reactor);
                }
                Act::Fail => {
                    self.note_why(told);
                    self.fail(reactor, told);
                }
            }
        }
        self.set_deadline(reactor);
    }

    /// Why it comes no further, as far as that follows from what was told.
    fn note_why(&self, told: Told) {
        let why = match told {
            Told::Settled(_) | Told::Rested(_) | Told::Cannot => return,
            Told::Refused(refusal) => RestartError::Refused(refusal),
            Told::Lost => RestartError::Lost,
            Told::TooLate => RestartError::TimedOut,
            _ => RestartError::GaveUp,
        };
        self.with(|take_over| take_over.why = Some(why));
    }

    fn fail(&self, reactor: &mut Reactor, told: Told) {
        let (why, looks) = self.with(|take_over| (take_over.why.take(), take_over.search.looks()));
        let why = why.unwrap_or(RestartError::GaveUp);
        let error = match told {
            Told::Rested(_) => RestartError::LookedInVain {
                looks,
                last: Box::new(why),
            },
            _ => why,
        };
        self.not_started(reactor, error);
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
        let channel = self.with(|take_over| take_over.found.channel);
        if let Some(channel) = channel.and_then(|channel| reactor.get(channel))
            && let Err(error) = wire::send(channel, message, Vec::new())
        {
            // Its end is going to be told.
            log::debug!(target: log::HANDOFF, "not sent: {error}");
        }
    }

    fn hang_up(&self, reactor: &mut Reactor) {
        let channel = self.with(|take_over| take_over.found.channel);
        if let Some(channel) = channel.and_then(|channel| reactor.get(channel)) {
            channel.lose_connection_within(FAREWELL);
        }
    }

    /// Everything is here: the control socket is adopted, and the program adopts
    /// and binds.
    fn adopt(self: &Rc<Self>, reactor: &mut Reactor) {
        let (mut inherited, files) = self.with(|TakeOver { found, .. }| {
            let inherited = std::mem::take(&mut found.inherited);
            (inherited, std::mem::take(&mut found.files))
        });
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
        let connections = moving::unpack(records, descriptors, |moved| {
            server.takes(&moved.kind, &moved.layers)
        });
        let refused = connections
            .iter()
            .zip(0..)
            .filter(|(connection, _)| connection.is_none())
            .map(|(_, at)| at)
            .collect();
        self.with(|take_over| take_over.found.prepared.insert(batch, connections));
        self.answer(reactor, &FromSuccessor::Prepared { batch, refused });
    }

    /// Says of a batch that it lives, and serves it when that has left: were it served
    /// before, and we died, the predecessor would take back connections that have gone
    /// on here.
    fn go(self: &Rc<Self>, reactor: &mut Reactor, batch: u32) {
        let channel = self.with(|take_over| {
            // It may have given up meanwhile, or they were taken back.
            let is_ours = take_over.step.is_receiving();
            let is_there = is_ours && take_over.found.prepared.contains_key(&batch);
            is_there.then_some(take_over.found.channel).flatten()
        });
        let Some(channel) = channel else {
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
        let prepared = self.with(|take_over| take_over.found.prepared.remove(&batch));
        let server = &self.restart.server;
        for moved in prepared.into_iter().flatten().flatten() {
            server.moved.update(|count| count + 1);
            server.moved_here.update(|count| count + 1);
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
            Taking::Failed => self.drop_prepared(),
            _ => self.serve_prepared(reactor),
        }
    }

    /// The channel is gone: takes the baton, if the predecessor has not.
    fn decide(self: &Rc<Self>, reactor: &mut Reactor) {
        let baton = self.with(|take_over| take_over.found.baton.take());
        let is_ours = baton.is_none_or(Baton::take);
        if is_ours {
            // Nobody else has them.
            self.serve_prepared(reactor);
        }
        self.hear(reactor, Told::Decided(is_ours));
    }

    /// Those of which we have said that they live are served. One that took the others
    /// back has said so, or has the baton.
    fn serve_prepared(&self, reactor: &mut Reactor) {
        let batches: Vec<_> =
            self.with(|take_over| take_over.found.prepared.keys().copied().collect());
        for batch in batches {
            self.serve_batch(reactor, batch);
        }
    }

    fn drop_prepared(&self) {
        drop(self.with(|take_over| std::mem::take(&mut take_over.found.prepared)));
    }
}

/// The baton that an offer brings.
fn received_baton(descriptors: Vec<OwnedFd>) -> Option<Baton> {
    let baton = descriptors.into_iter().next().map(Baton::received);
    match baton.transpose() {
        Ok(Some(Some(baton))) => return Some(baton),
        Ok(Some(None)) => {
            log::warn!(target: log::HANDOFF, "the descriptor of an offer is no pipe");
        }
        Ok(None) => {
            log::warn!(target: log::HANDOFF, "an offer came without its descriptor");
        }
        Err(error) => {
            log::warn!(target: log::HANDOFF, "cannot hold the descriptor of an offer: {error}");
        }
    }
    None
}
