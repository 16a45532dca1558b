//! The serving side of a pool.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::io;
use std::mem;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;

use bowline_protocol::{
    Acceptor, Address, AfterReadClosed, AtDrain, BuildContext, CloseReason, Context, Linger,
    ListenerHandle, NotSent, UnixTransport, UnixTransportHandle,
};
use bowline_reactor::{DelayedCall, Description, GracefulStop, Hold, Reactor, SystemEvent, Token};
use bowline_transport::endpoint::{JustAccepted, TransportFor};
use bowline_transport::{LayerState, Tcp, Transports, is_stream_connection};

use super::connection::PassedConnection;
use super::messages::{
    AcceptStage, Dispatch, FromWorker, MovedRecord, SHARES_MESSAGES, ToWorker, VERSIONS,
    WorkerRefusal,
};
use crate::channel::{
    Channel, ChannelError, ChannelReceiver, ChannelSettings, ChannelSocket, Peer, Role,
    has_peer_ended,
};
use crate::log;
use crate::restart::moving::{Batch, MoveList, Packet, unpack};
use crate::restart::{Movable, MoveTicket, Moved};
use crate::wire::{self, Incoming};

/// How soon the pool learns that connections have ended by themselves; without
/// a change the next look comes twice as late, up to [`LONGEST_REPORT`].
const FIRST_REPORT: Duration = Duration::from_millis(50);

/// The same for what it has accepted by itself: well before the pool takes its silence for
/// a sign (`slow_after`, 50 ms).
const ACCEPT_REPORT: Duration = Duration::from_millis(20);

/// How late at the most.
const LONGEST_REPORT: Duration = Duration::from_secs(1);

/// How many bytes a connection that moves may need: a message of the channel, less what
/// stands around it.
const MAX_MOVING_BYTES: usize = (1 << 20) - 1024;

/// How often a draining worker looks whether its connections have ended.
const DRAIN_LOOK: Duration = Duration::from_millis(10);

/// Serves the connections of a worker. Any closure of the shape of
/// [`serve`](Self::serve) is a service.
///
/// Its callbacks are never made inside of another callback.
pub trait Service: 'static {
    /// Says whether the connection is wanted. Called before the pool is answered: the
    /// connection is not this worker's yet. Look at it, and do not touch it.
    ///
    /// # Errors
    ///
    /// The reason for a refusal. The pool gives the connection to another worker.
    ///
    /// # Panics
    ///
    /// A panic ends the channel. This worker then serves its connections and drains,
    /// and the pool starts another.
    fn admit(
        &mut self,
        reactor: &mut Reactor,
        connection: &PassedConnection,
    ) -> Result<(), WorkerRefusal> {
        let _ = (reactor, connection);
        Ok(())
    }

    /// Serves a connection. It is this worker's, the pool knows, and nobody else is
    /// going to serve it. `live` counts the connection until it is dropped, so keep it
    /// in the connection's protocol.
    fn serve(&mut self, reactor: &mut Reactor, connection: PassedConnection, live: Live);

    /// Whether this worker can go on with connections of a
    /// [kind](crate::restart::Movable::KIND) that are in the middle of their life. By
    /// default it cannot.
    ///
    /// They come when the program is restarted
    /// ([`Listeners::pool`](crate::restart::Listeners::pool)), from the workers of the
    /// process before.
    fn takes(&self, kind: &str) -> bool {
        let _ = kind;
        false
    }

    /// Whether this worker can go on with a connection of a kind that it takes, with what
    /// its layers say; by default with one whose layers say nothing. Nothing is taken yet:
    /// a layer only looks (`TlsServer::can_resume`).
    ///
    /// The program was asked before
    /// ([`Program::takes_layers`](crate::restart::Program::takes_layers)), and has to
    /// answer as its workers would. What it does not take stays in its old worker. What it
    /// takes, and none of its workers does, is closed, with a line in the log.
    fn takes_layers(&self, kind: &str, layers: &[LayerState]) -> bool {
        let _ = kind;
        layers.is_empty()
    }

    /// Goes on with a connection that a worker of the process before has given up
    /// ([`Live::movable`]). It is of a kind that this one [takes](Self::takes), with
    /// [layers](Moved::layers) that it [takes](Self::takes_layers).
    fn serve_moved(&mut self, reactor: &mut Reactor, moved: Moved, live: Live) {
        let _ = (reactor, moved, live);
    }

    /// The worker drains. No more connections come, and all have begun. The pool has
    /// asked for the end within this time, or it is gone, or the reactor stops.
    ///
    /// By default this [stops](Reactor::stop_gracefully) the reactor gracefully within
    /// this time. Each connection is told to
    /// [drain](bowline_protocol::Protocol::draining).
    fn draining(&mut self, reactor: &mut Reactor, within: Duration) {
        // An error says that it was never run.
        let _ = reactor.stop_gracefully(GracefulStop::new().deadline(within));
    }

    /// All connections have ended, or the time for it has passed. By default this
    /// stops the reactor.
    fn drained(&mut self, reactor: &mut Reactor) {
        // An error says that it is stopping already, or was never run.
        let _ = reactor.stop();
    }
}

impl<F: FnMut(&mut Reactor, PassedConnection, Live) + 'static> Service for F {
    fn serve(&mut self, reactor: &mut Reactor, connection: PassedConnection, live: Live) {
        self(reactor, connection, live);
    }
}

/// Counts a connection among the [live](Worker::live) ones while it exists.
pub struct Live {
    /// All that exist. Not the worker, which holds some itself.
    count: Rc<Cell<u32>>,
    list: Rc<RefCell<MoveList>>,
}

impl Live {
    fn new(shared: &WorkerShared) -> Self {
        let count = &shared.live;
        count.set(count.get() + 1);
        Self {
            count: Rc::clone(count),
            list: Rc::clone(&shared.list),
        }
    }

    /// Has the connection move to a worker of the next process when the program is
    /// restarted ([`Listeners::pool`](crate::restart::Listeners::pool)), as
    /// [`Restart::movable`](crate::restart::Restart::movable) does in a program without
    /// workers. To be called when the connection is made; the ticket is to be kept in its
    /// protocol.
    ///
    /// The connection stands still until a worker there has taken it. If none does, it
    /// goes on here, and drains like those that cannot move.
    pub fn movable<T: TransportFor<P>, P: Movable>(&self, handle: impl Into<Token>) -> MoveTicket {
        MoveList::add::<T, P>(&self.list, handle.into())
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        self.count.set(self.count.get() - 1);
    }
}

impl fmt::Debug for Live {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Live({})", self.count.get())
    }
}

/// The settings of a worker.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct WorkerSettings {
    /// The most connections that it has at a time. It refuses others. The default is
    /// `None`, no limit.
    pub max_live: Option<u32>,
    /// What becomes of connections that the pool has sent, if the pool's process is
    /// gone before the worker could answer.
    pub orphans: Orphans,
    /// How long it serves its connections if the pool is gone without having asked it
    /// to drain. The default is 30 s.
    pub orphaned_timeout: Duration,
    /// How long the pool may take to say hello. The default is 10 s.
    pub start_timeout: Duration,
}

bowline_reactor::setters!(WorkerSettings {
    max_live: Option<u32>,
    orphans: Orphans,
    orphaned_timeout: Duration,
    start_timeout: Duration,
});

impl Default for WorkerSettings {
    fn default() -> Self {
        Self {
            max_live: None,
            orphans: Orphans::Serve,
            orphaned_timeout: Duration::from_secs(30),
            start_timeout: Duration::from_secs(10),
        }
    }
}

/// What a worker does with a connection if the pool is gone before it could be
/// answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Orphans {
    /// Serves it. Nobody else has it: a [`Pool`](super::Pool) ends a channel only with
    /// its process, with its reactor, or after it has killed the worker. If the worker
    /// itself has lost the channel, for lack of memory say, the connection is closed
    /// and the pool gives it to another worker. This is the default.
    Serve,
    /// Closes it. Meant for pools that are not this crate's.
    Close,
}

/// The serving side of a pool, in a process of its own. See the [module](super).
#[derive(Clone)]
pub struct Worker {
    shared: Rc<WorkerShared>,
}

struct WorkerShared {
    settings: WorkerSettings,
    service: RefCell<Box<dyn Service>>,
    channel: Cell<Option<UnixTransportHandle>>,
    /// Promised to the pool, in order, and not begun.
    promised: RefCell<VecDeque<Promised>>,
    live: Rc<Cell<u32>>,
    /// The connections that can move.
    list: Rc<RefCell<MoveList>>,
    /// Those that are on their way, by the numbers that the pool knows.
    moving: RefCell<BTreeMap<u64, Batch>>,
    next_moving: Cell<u64>,
    /// Where the next look at the list begins, while connections are to move.
    moves_from: Cell<Option<u64>>,
    reported: Cell<u32>,
    report: Cell<Option<DelayedCall>>,
    report_after: Cell<Duration>,
    stage: Cell<Stage>,
    /// The service is to be told to drain within this time.
    untold: Cell<Option<Duration>>,
    /// Has a stop wait for what is promised and served; there while it drains.
    hold: Cell<Option<Hold>>,
    /// The pool lives, and gives to others what it has no answer for.
    is_recalled: Cell<bool>,
    /// Whether the pool is told of listeners that are closed.
    says_closed: Cell<bool>,
    /// On which it accepts by itself, by the pool's numbers.
    listeners: RefCell<Vec<(u32, ListenerHandle)>>,
    /// How many connections it has accepted by itself, and how many of them the pool knows.
    accepted: Cell<u64>,
    accepted_reported: Cell<u64>,
    /// Its listeners are held, since it has as many connections as it may.
    is_full: Cell<bool>,
    /// Whether the next report comes within [`ACCEPT_REPORT`].
    is_report_soon: Cell<bool>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Serving,
    Draining,
    Drained,
}

/// A connection that may be begun when the kernel has our answer.
struct Promised {
    /// How many bytes the channel has sent by then.
    answer_ends: u64,
    connection: Given,
    live: Live,
}

/// What a pool gives.
enum Given {
    Fresh(PassedConnection),
    Moved(Moved),
}

impl Worker {
    /// Serves the connections that come through `channel`.
    ///
    /// # Errors
    ///
    /// [`AdoptError`](bowline_transport::AdoptError) if the descriptor is no connected
    /// UNIX stream socket.
    pub fn start<C: ChannelSocket>(
        reactor: &mut Reactor,
        channel: C,
        settings: WorkerSettings,
        service: impl Service,
    ) -> Result<Self, C::Error> {
        let mut channel_settings = ChannelSettings::new(Role::WORKER, Role::DISPATCHER);
        channel_settings.handshake_timeout = settings.start_timeout;
        channel_settings.versions = VERSIONS;
        let shared = Rc::new(WorkerShared {
            settings,
            service: RefCell::new(Box::new(service)),
            channel: Cell::new(None),
            promised: RefCell::default(),
            live: Rc::default(),
            list: Rc::default(),
            moving: RefCell::default(),
            next_moving: Cell::new(0),
            moves_from: Cell::new(None),
            reported: Cell::new(0),
            report: Cell::new(None),
            report_after: Cell::new(FIRST_REPORT),
            stage: Cell::new(Stage::Serving),
            untold: Cell::new(None),
            hold: Cell::new(None),
            is_recalled: Cell::new(false),
            says_closed: Cell::new(false),
            listeners: RefCell::default(),
            accepted: Cell::new(0),
            accepted_reported: Cell::new(0),
            is_full: Cell::new(false),
            is_report_soon: Cell::new(false),
        });
        let inlet = Inlet {
            shared: Rc::clone(&shared),
        };
        let channel = channel.adopt(reactor, Channel::new(channel_settings, inlet))?;
        shared.channel.set(Some(channel));
        if let Some(channel) = reactor.get(channel) {
            // Who starts workers does not block them.
            channel.set_received_linger(Linger::Keep);
        }
        Ok(Self { shared })
    }

    /// How many connections the worker has.
    pub fn live(&self) -> u32 {
        self.shared.live.get()
    }

    /// Drains, as when the pool asks for it: the worker refuses connections from now
    /// on, serves those that it has, and ends. The pool starts another worker when this
    /// one refuses a connection or has ended.
    pub fn drain(&self, reactor: &mut Reactor, within: Duration) {
        let shared = Rc::clone(&self.shared);
        reactor.defer(move |reactor| shared.drain(reactor, within));
    }
}

impl fmt::Debug for Worker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Worker")
            .field("live", &self.shared.live.get())
            .field("promised", &self.shared.promised.borrow().len())
            .finish_non_exhaustive()
    }
}

impl WorkerShared {
    /// Judges a connection that the pool offers.
    fn judge(
        &self,
        reactor: &mut Reactor,
        dispatch: Dispatch,
        mut descriptors: Vec<OwnedFd>,
        lost: usize,
    ) -> Result<Given, WorkerRefusal> {
        if self.stage.get() != Stage::Serving {
            return Err(WorkerRefusal::Draining);
        }
        if lost > 0 {
            return Err(WorkerRefusal::DescriptorLost);
        }
        let limit = self.settings.max_live.unwrap_or(u32::MAX);
        if self.live.get() >= limit {
            return Err(WorkerRefusal::Overloaded);
        }
        if let Some(MovedRecord(record)) = dispatch.moved {
            let service = self.service.borrow();
            let mut moved = unpack(vec![*record], descriptors, |moved| {
                service.takes(&moved.kind) && service.takes_layers(&moved.kind, &moved.layers)
            });
            let moved = moved.pop().flatten();
            return moved.map(Given::Moved).ok_or(WorkerRefusal::Unwanted);
        }
        let (1, Some(fd)) = (descriptors.len(), descriptors.pop()) else {
            return Err(WorkerRefusal::WrongKind);
        };
        if !is_stream_connection(fd.as_fd()).unwrap_or(false) {
            return Err(WorkerRefusal::WrongKind);
        }
        let peer = dispatch.peer.map(Address::Inet);
        let connection = PassedConnection {
            peer: dispatch.peer,
            label: dispatch.label,
            read: dispatch.read,
            unsent: dispatch.unsent,
            is_recalled: dispatch.is_recalled,
            accepted: Some(JustAccepted::from(peer).is_shared(true)),
            ..PassedConnection::new(fd)
        };
        self.service.borrow_mut().admit(reactor, &connection)?;
        Ok(Given::Fresh(connection))
    }

    /// Begins to serve the first that was promised: the kernel has our answer.
    fn begin(self: &Rc<Self>, reactor: &mut Reactor) {
        let first = self.promised.borrow_mut().pop_front();
        // Where there is none, the end of the channel has settled what becomes of it.
        let Some(first) = first else { return };
        let next_ends = self.promised.borrow().front().map(|it| it.answer_ends);
        let shared = Rc::clone(self);
        // If this one panics, these go on all the same.
        match next_ends {
            None => reactor.defer(move |reactor| shared.tell_draining(reactor)),
            // They have one answer.
            Some(ends) if ends == first.answer_ends => {
                reactor.defer(move |reactor| shared.begin(reactor));
            }
            Some(_) => {}
        }
        self.serve(reactor, first);
    }

    fn serve(self: &Rc<Self>, reactor: &mut Reactor, promised: Promised) {
        let Promised {
            connection, live, ..
        } = promised;
        let mut service = self.service.borrow_mut();
        match connection {
            Given::Fresh(connection) => service.serve(reactor, connection, live),
            Given::Moved(moved) => service.serve_moved(reactor, moved, live),
        }
    }

    // Moving.

    /// Gives up the next connections that can move. When there are none, the rest drains.
    fn move_next(self: &Rc<Self>, reactor: &mut Reactor) {
        let Some(from) = self.moves_from.get() else {
            return;
        };
        if !self.moving.borrow().is_empty() {
            return;
        }
        let end = self.list.borrow().end();
        let this = Rc::clone(self);
        let given_up = move |reactor: &mut Reactor, batch| match batch {
            Some((batch, packet, seen)) => this.give_up(reactor, batch, packet, seen),
            None => {
                this.moves_from.set(None);
                this.tell_draining(reactor);
            }
        };
        Batch::collect(reactor, &self.list, from..end, MAX_MOVING_BYTES, given_up);
    }

    fn give_up(self: &Rc<Self>, reactor: &mut Reactor, batch: Batch, packet: Packet, seen: u64) {
        self.moves_from.set(Some(seen + 1));
        let mut descriptors = packet.descriptors.into_iter();
        for (one, record) in batch.split().zip(packet.records) {
            let own = descriptors.by_ref().take(record.descriptors()).collect();
            let id = self.next_moving.replace(self.next_moving.get() + 1);
            let moved = MovedRecord(Box::new(record));
            let message = FromWorker::Moving { id, moved };
            let channel = self.channel.get().and_then(|channel| reactor.get(channel));
            let sent = channel.map(|channel| wire::send(channel, &message, own));
            if matches!(sent, Some(Ok(_))) {
                self.moving.borrow_mut().insert(id, one);
            } else {
                one.roll_back(reactor, &self.list);
            }
        }
        // None of them may have wanted to.
        self.move_next(reactor);
    }

    /// A connection has moved, or goes on here.
    fn settle(self: &Rc<Self>, reactor: &mut Reactor, id: u64, has_moved: bool) {
        let one = self.moving.borrow_mut().remove(&id);
        match one {
            Some(one) if !has_moved => one.roll_back(reactor, &self.list),
            one => drop(one),
        }
        self.move_next(reactor);
    }

    // Accepting by itself.

    /// Accepts on a listener that the pool gives.
    fn listen(
        self: &Rc<Self>,
        reactor: &mut Reactor,
        (id, label): (u32, u32),
        socket: Option<OwnedFd>,
    ) -> io::Result<()> {
        let socket = socket.ok_or(io::ErrorKind::NotFound)?;
        let acceptor = Inbound {
            shared: Rc::clone(self),
            id,
            label,
            host: None,
        };
        let listener = reactor.accept(Tcp::listening(socket), acceptor);
        let listener = listener.map_err(io::Error::from)?;
        if let Some(listening) = reactor.get(listener) {
            // Beside us only the pool accepts on it, which is of the same mind about its
            // flags.
            listening.assume_sole_holder();
            if self.is_full.get() {
                listening.hold_accepting();
            }
        }
        self.listeners.borrow_mut().push((id, listener));
        Ok(())
    }

    /// Accepts what waits at these listeners, and closes them. Answers whether there is one.
    fn unlisten(&self, reactor: &mut Reactor, which: impl Fn(u32) -> bool) -> bool {
        let mut is_any = false;
        self.listeners.borrow_mut().retain(|&(id, listener)| {
            let is_one = which(id);
            if is_one && let Some(listener) = reactor.get(listener) {
                listener.stop_listening_when_drained();
                is_any = true;
            }
            !is_one
        });
        is_any
    }

    /// Accepts no more for as long as there are as many connections as may be.
    fn fill(self: &Rc<Self>, reactor: &mut Reactor) {
        let limit = self.settings.max_live.unwrap_or(u32::MAX);
        let is_full = self.live.get() >= limit;
        if self.listeners.borrow().is_empty() || self.is_full.replace(is_full) == is_full {
            return;
        }
        for &(_, listener) in &*self.listeners.borrow() {
            if let Some(listener) = reactor.get(listener) {
                match is_full {
                    true => listener.hold_accepting(),
                    false => listener.release_accepting(),
                }
            }
        }
        self.say_accepted(reactor);
    }

    /// Says what it has accepted, and whether it goes on.
    fn say_accepted(&self, reactor: &mut Reactor) {
        if let Some(channel) = self.channel.get()
            && let Some(channel) = reactor.get(channel)
        {
            self.say(channel, &self.accepts());
        }
    }

    /// Says that a listener is closed.
    fn say_closed(self: &Rc<Self>, reactor: &mut Reactor, listener: u32) {
        if !self.says_closed.get() {
            return;
        }
        let shared = Rc::clone(self);
        // The channel cannot be reached from its own callback.
        reactor.defer(move |reactor| {
            let live = shared.live.get();
            let channel = shared.channel.get();
            if let Some(channel) = channel.and_then(|channel| reactor.get(channel)) {
                shared.say(channel, &FromWorker::Unlistened { listener, live });
            }
        });
    }

    fn accepts(&self) -> FromWorker {
        let accepted = self.accepted.get();
        self.accepted_reported.set(accepted);
        FromWorker::Accepts {
            accepted,
            live: self.live.get(),
            stage: match self.stage.get() {
                Stage::Serving if self.is_full.get() => AcceptStage::Full,
                Stage::Serving => AcceptStage::Accepting,
                Stage::Draining | Stage::Drained => AcceptStage::Draining,
            },
        }
    }

    /// Serves a connection that was accepted here, or gives it to the pool.
    fn accepted(self: &Rc<Self>, reactor: &mut Reactor, connection: PassedConnection) {
        let admitted = self.service.borrow_mut().admit(reactor, &connection);
        if let Err(reason) = admitted {
            return self.decline(reactor, connection, reason);
        }
        let live = Live::new(self);
        self.accepted.set(self.accepted.get() + 1);
        self.report_soon(reactor);
        if self.settings.max_live.is_some() {
            // Its own listener is what runs.
            let shared = Rc::clone(self);
            reactor.defer(move |reactor| shared.fill(reactor));
        }
        self.service.borrow_mut().serve(reactor, connection, live);
    }

    fn decline(&self, reactor: &mut Reactor, connection: PassedConnection, reason: WorkerRefusal) {
        log::debug!(target: log::HANDOFF, "does not want a connection: {reason}");
        let dispatch = Dispatch {
            id: 0,
            label: connection.label,
            peer: connection.peer,
            read: Vec::new(),
            unsent: Vec::new(),
            is_recalled: false,
            moved: None,
        };
        let message = FromWorker::Declined { dispatch, reason };
        let channel = self.channel.get().and_then(|channel| reactor.get(channel));
        let sent = channel.map(|channel| wire::send(channel, &message, vec![connection.fd.into()]));
        if !matches!(sent, Some(Ok(_))) {
            log::warn!(target: log::HANDOFF, "closed a connection that nobody wants: {reason}");
        }
    }

    // Reports.

    /// Has the pool know before it takes us for hung.
    fn report_soon(self: &Rc<Self>, reactor: &mut Reactor) {
        self.report_after.set(ACCEPT_REPORT);
        if let Some(report) = self.report.get() {
            if self.is_report_soon.get() {
                return;
            }
            // It may have run.
            let _ = report.cancel(reactor);
            self.report.set(None);
        }
        self.report_later(reactor);
    }

    fn report_later(self: &Rc<Self>, reactor: &mut Reactor) {
        if self.report.get().is_none() {
            let after = if self.stage.get() == Stage::Draining || self.is_full.get() {
                DRAIN_LOOK
            } else {
                self.report_after.get()
            };
            self.is_report_soon.set(after <= ACCEPT_REPORT);
            let shared = Rc::clone(self);
            let call = reactor.call_later(after, move |reactor| {
                shared.report.set(None);
                shared.report(reactor);
            });
            self.report.set(Some(call));
        }
    }

    fn report(self: &Rc<Self>, reactor: &mut Reactor) {
        self.fill(reactor);
        let live = self.live.get();
        if self.accepted_reported.get() != self.accepted.get() {
            self.say_accepted(reactor);
            self.report_after.set(ACCEPT_REPORT);
        } else if live == self.reported.get() {
            let longer = self.report_after.get() * 2;
            self.report_after.set(longer.min(LONGEST_REPORT));
        } else {
            self.report_after.set(FIRST_REPORT);
            if let Some(channel) = self.channel.get()
                && let Some(channel) = reactor.get(channel)
            {
                self.say(channel, &FromWorker::Load { live });
            }
        }
        if self.stage.get() == Stage::Draining && live == 0 {
            self.drained(reactor);
        } else if live > 0 {
            self.report_later(reactor);
        }
    }

    fn say<T: UnixTransport + ?Sized>(&self, channel: &mut T, message: &FromWorker) {
        self.reported.set(self.live.get());
        if let Err(error) = wire::send(channel, message, Vec::new()) {
            // The channel has ended, which is going to be told.
            log::debug!(target: log::HANDOFF, "cannot answer the pool: {error}");
        }
    }

    // Ending.

    fn drain(self: &Rc<Self>, reactor: &mut Reactor, within: Duration) {
        if self.stage.get() != Stage::Serving {
            return self.tell_draining(reactor);
        }
        self.stage.set(Stage::Draining);
        self.hold.set(Some(reactor.hold(SystemEvent::Shutdown)));
        let late = Rc::clone(self);
        reactor.call_later(within, move |reactor| late.drained(reactor));
        if let Some(report) = self.report.take() {
            // It may have run.
            let _ = report.cancel(reactor);
        }
        self.report_later(reactor);
        self.untold.set(Some(within));
        if !self.listeners.borrow().is_empty() {
            self.unlisten(reactor, |_| true);
            self.say_accepted(reactor);
        }
        // Last, since it may panic.
        self.tell_draining(reactor);
    }

    /// Tells the service, once it has begun all that was promised.
    fn tell_draining(&self, reactor: &mut Reactor) {
        if self.promised.borrow().is_empty()
            && self.moves_from.get().is_none()
            && let Some(within) = self.untold.take()
        {
            self.service.borrow_mut().draining(reactor, within);
        }
    }

    fn drained(self: &Rc<Self>, reactor: &mut Reactor) {
        if self.stage.replace(Stage::Drained) == Stage::Drained {
            return;
        }
        if let Some(channel) = self.channel.get()
            && let Some(channel) = reactor.get(channel)
        {
            channel.lose_connection();
        }
        let shared = Rc::clone(self);
        self.hold.take();
        reactor.defer(move |reactor| shared.service.borrow_mut().drained(reactor));
    }
}

/// Accepts on one of the worker's own listeners.
struct Inbound {
    shared: Rc<WorkerShared>,
    /// What the pool calls the listener.
    id: u32,
    label: u32,
    /// Our address in all connections, if it is the same in all.
    host: Option<Address>,
}

impl Acceptor for Inbound {
    fn started(&mut self, cx: &mut BuildContext<'_>) {
        let address = cx.listener().map(|listener| listener.address());
        let is_one = |it: &Address| it.as_inet().is_some_and(|it| !it.ip().is_unspecified());
        self.host = address.filter(is_one);
    }

    fn stopped(&mut self, cx: &mut BuildContext<'_>) {
        self.shared.say_closed(cx.reactor, self.id);
    }

    fn accepted(&mut self, cx: &mut BuildContext<'_>, socket: OwnedFd, peer: &Address) {
        let known = JustAccepted::from(peer.clone()).host(self.host.clone());
        let connection = PassedConnection {
            peer: peer.as_inet(),
            label: self.label,
            accepted: Some(known),
            ..PassedConnection::new(socket)
        };
        self.shared.accepted(cx.reactor, connection);
    }

    fn describe(&self, description: &mut Description) {
        description.section_of::<Self>().set("label", self.label);
    }
}

/// The worker's end of its channel.
struct Inlet {
    shared: Rc<WorkerShared>,
}

impl Inlet {
    /// Accepts by itself on one more socket, which is the pool's too.
    fn listen<T: UnixTransport + ?Sized>(
        &self,
        cx: &mut Context<'_, T>,
        id: (u32, u32),
        socket: Option<OwnedFd>,
    ) {
        let shared = Rc::clone(&self.shared);
        if shared.stage.get() != Stage::Serving {
            // The pool has been told, or is about to be.
            return;
        }
        if let Err(error) = shared.listen(cx.reactor, id, socket) {
            log::error!(target: log::HANDOFF, "cannot accept by itself: {error}");
            // The pool takes what comes there.
            shared.is_full.set(true);
            let answer = shared.accepts();
            shared.say(cx.transport, &answer);
        }
    }

    /// Judges what the pool offers in one message.
    fn offered<T: UnixTransport + ?Sized>(
        &self,
        cx: &mut Context<'_, T>,
        all: Vec<Dispatch>,
        descriptors: Vec<OwnedFd>,
        lost: usize,
    ) {
        let shared = &self.shared;
        let mut descriptors = descriptors.into_iter();
        let (mut ids, mut taken) = (Vec::new(), Vec::new());
        for dispatch in all {
            let id = dispatch.id;
            let own = descriptors.by_ref().take(1).collect();
            match shared.judge(cx.reactor, dispatch, own, lost) {
                Ok(connection) => {
                    ids.push(id);
                    taken.push((connection, Live::new(shared)));
                }
                Err(reason) => self.refuse(cx, id, reason),
            }
        }
        if !ids.is_empty() {
            let live = shared.live.get();
            self.promise(cx, &FromWorker::AcceptedAll { ids, live }, taken);
        }
    }

    fn refuse<T: UnixTransport + ?Sized>(
        &self,
        cx: &mut Context<'_, T>,
        id: u64,
        reason: WorkerRefusal,
    ) {
        log::debug!(target: log::HANDOFF, "refused delivery {id}: {reason}");
        let live = self.shared.live.get();
        let answer = FromWorker::Refused { id, reason, live };
        self.shared.say(cx.transport, &answer);
    }

    /// Answers that connections are taken. They are served once the answer has left.
    fn promise<T: UnixTransport + ?Sized>(
        &self,
        cx: &mut Context<'_, T>,
        answer: &FromWorker,
        connections: impl IntoIterator<Item = (Given, Live)>,
    ) {
        let shared = &self.shared;
        shared.say(cx.transport, answer);
        let unsent = cx.transport.unsent_bytes() as u64;
        let answer_ends = cx.transport.bytes_sent() + unsent;
        let promised = connections.into_iter().map(|(connection, live)| Promised {
            answer_ends,
            connection,
            live,
        });
        shared.promised.borrow_mut().extend(promised);
        let worker = Rc::clone(shared);
        let begin = move |reactor: &mut Reactor, sent: Result<(), NotSent>| {
            if sent.is_ok() {
                worker.begin(reactor);
            }
        };
        cx.transport.when_sent(answer_ends, Box::new(begin));
        shared.report_after.set(FIRST_REPORT);
        shared.report_later(cx.reactor);
    }
}

impl<T: UnixTransport + ?Sized> ChannelReceiver<T> for Inlet {
    type Message = ToWorker;

    fn channel_made(&mut self, _: &mut Context<'_, T>, peer: &Peer) {
        self.shared.says_closed.set(peer.version >= SHARES_MESSAGES);
    }

    fn message_received(&mut self, cx: &mut Context<'_, T>, incoming: Incoming<ToWorker>) {
        let shared = &self.shared;
        let dispatch = match incoming.message {
            ToWorker::Drain { within_ms } => {
                let shared = Rc::clone(shared);
                let within = Duration::from_millis(within_ms.into());
                cx.reactor
                    .defer(move |reactor| shared.drain(reactor, within));
                return;
            }
            ToWorker::Listen { listener, label } => {
                let socket = incoming.descriptors.into_iter().next();
                return self.listen(cx, (listener, label), socket);
            }
            ToWorker::Unlisten { listener } => {
                if !shared.unlisten(cx.reactor, |id| id == listener) {
                    // It is closed already, or was never open.
                    shared.say_closed(cx.reactor, listener);
                }
                return;
            }
            ToWorker::Ask => {
                let answer = shared.accepts();
                shared.say(cx.transport, &answer);
                return;
            }
            ToWorker::Move => {
                shared.moves_from.set(Some(0));
                let shared = Rc::clone(shared);
                cx.reactor.defer(move |reactor| shared.move_next(reactor));
                return;
            }
            ToWorker::HasMoved { id } | ToWorker::HasNotMoved { id } => {
                let has_moved = matches!(incoming.message, ToWorker::HasMoved { .. });
                let shared = Rc::clone(shared);
                cx.reactor
                    .defer(move |reactor| shared.settle(reactor, id, has_moved));
                return;
            }
            ToWorker::Recall => {
                log::warn!(target: log::HANDOFF, "recalled by the pool: it has waited for answers");
                // The channel ends, and with it the worker drains.
                shared.is_recalled.set(true);
                return;
            }
            ToWorker::DispatchAll(all) => {
                return self.offered(cx, all, incoming.descriptors, incoming.lost);
            }
            ToWorker::Dispatch(dispatch) => dispatch,
        };
        let id = dispatch.id;
        let judged = shared.judge(cx.reactor, dispatch, incoming.descriptors, incoming.lost);
        match judged {
            Ok(connection) => {
                let own = Live::new(shared);
                let live = shared.live.get();
                let answer = FromWorker::Accepted { id, live };
                self.promise(cx, &answer, [(connection, own)]);
            }
            Err(reason) => self.refuse(cx, id, reason),
        }
    }

    fn read_channel_lost(&mut self, _: &mut Context<'_, T>) -> AfterReadClosed {
        AfterReadClosed::EndConnection
    }

    fn draining(&mut self, cx: &mut Context<'_, T>) -> AtDrain {
        let shared = Rc::clone(&self.shared);
        let left = cx
            .reactor
            .stop_deadline()
            .map(|deadline| deadline.saturating_duration_since(cx.reactor.now()));
        let within = left.unwrap_or(shared.settings.orphaned_timeout);
        // The stop waits for what was promised before.
        let hold = cx.reactor.hold(SystemEvent::Shutdown);
        cx.reactor.defer(move |reactor| {
            shared.drain(reactor, within);
            drop(hold);
        });
        AtDrain::DoNotWait
    }

    fn channel_lost(
        &mut self,
        cx: &mut Context<'_, T>,
        error: Option<&ChannelError>,
        reason: &CloseReason,
    ) {
        let shared = &self.shared;
        shared.channel.set(None);
        if let Some(error) = error {
            log::warn!(target: log::HANDOFF, "channel of the pool: {error}");
        }
        if matches!(reason, CloseReason::ReactorStopped) {
            shared.promised.borrow_mut().clear();
            shared.hold.take();
            return;
        }
        // Who took them serves them, and nobody else may.
        let moving = mem::take(&mut *shared.moving.borrow_mut());
        if !moving.is_empty() {
            log::warn!(target: log::HANDOFF, "{} connections were moving when the pool ended", moving.len());
        }
        shared.moves_from.set(None);
        cx.reactor.defer(move |_| drop(moving));
        let sent = cx.transport.bytes_sent();
        let promised = mem::take(&mut *shared.promised.borrow_mut());
        // If the channel broke here, the pool lives, and gives to others what it has no
        // answer for.
        let is_alone = has_peer_ended(error, reason) && !shared.is_recalled.get();
        let serves_orphans = is_alone && shared.settings.orphans == Orphans::Serve;
        let is_ours = |promised: &Promised| promised.answer_ends <= sent || serves_orphans;
        for promised in promised.into_iter().filter(is_ours) {
            let shared = Rc::clone(shared);
            cx.reactor
                .defer(move |reactor| shared.serve(reactor, promised));
        }
        let shared = Rc::clone(shared);
        cx.reactor
            .defer(move |reactor| shared.drain(reactor, shared.settings.orphaned_timeout));
    }

    fn describe(&self, description: &mut Description) {
        let shared = &self.shared;
        let stage = match shared.stage.get() {
            Stage::Serving => "serving",
            Stage::Draining => "draining",
            Stage::Drained => "drained",
        };
        let promised = shared.promised.try_borrow();
        let moving = shared.moving.try_borrow();
        description
            .section("Pool")
            .set("stage", stage)
            .set("live", shared.live.get())
            .set("accepted", shared.accepted.get())
            .set_some("promised", promised.ok().map(|it| it.len()))
            .set_some("moving", moving.ok().map(|it| it.len()))
            .set("recalled", shared.is_recalled.get());
    }
}
