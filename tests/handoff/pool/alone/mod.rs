//! A pool, or a worker, alone in the reactor of the test: its clock is moved by
//! hand, and its other side is made of plain calls. So every limit is met exactly.

mod desk;

mod dispatching;
mod draining;
mod ends;
mod hanging;
mod limits;
mod serving;
mod stopping;
mod together;

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::rc::Rc;
use std::time::Duration;

use bowline::error::AdoptError;
use bowline::handoff::channel::{ChannelSocket, Role};
use bowline::handoff::pool::{
    FromWorker, PassedConnection, Pool, PoolEvent, PoolPolicy, PoolSettings, RoundRobin, Spawned,
    ToWorker, Undelivered, WorkerId, WorkerRefusal, WorkerStage, WorkerStatistics,
};
use bowline::handoff::wire::{Message, decode_payload};
use bowline::policies::{Backoff, Jitter};
use bowline::process::ChildProcess;
use bowline::testing::ManualClock;
use bowline::{Protocol, Reactor, Transports, UnixStream, UnixTransportHandle};
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, recvmsg};

use super::raw::{frame, hello, hello_of_today, refused, send_bytes};
use crate::frames::Frames;
use crate::support::{DescriptorLedger, Staged, socketpair, staged};

/// How often a pool looks at its deadlines.
const TICK: Duration = Duration::from_millis(20);

/// The kind of a hello.
const HELLO: u16 = 1;

const fn ms(milliseconds: u64) -> Duration {
    Duration::from_millis(milliseconds)
}

/// The defaults, but for what would make tests depend on the machine.
fn settings(workers: usize) -> PoolSettings {
    let mut settings = PoolSettings::default();
    settings.workers = workers;
    settings.drain_timeout = None;
    settings.slow_after = Duration::from_secs(3_600);
    settings.ack_timeout = Duration::from_secs(1);
    settings.recalls = false;
    settings.backoff = Backoff::new()
        .first(ms(100))
        .factor(2.0)
        .cap(ms(10_000))
        .jitter(Jitter::None);
    settings
}

/// [`settings`] but for one.
fn with(workers: usize, set: impl FnOnce(&mut PoolSettings)) -> PoolSettings {
    let mut settings = settings(workers);
    set(&mut settings);
    settings
}

/// A pool, whose workers are [`Hand`]s, and what it has said.
struct Stage {
    reactor: Reactor,
    clock: ManualClock,
    pool: Pool,
    hands: Rc<RefCell<Vec<Rc<Hand>>>>,
    events: Rc<RefCell<Vec<String>>>,
    undelivered: Rc<RefCell<Vec<(u32, Undelivered)>>>,
    clients: Vec<StdUnixStream>,
    /// The pool's ends of the channels, by the numbers of workers.
    lines: Rc<RefCell<Vec<UnixTransportHandle>>>,
    _ledger: DescriptorLedger,
}

staged!(Stage);

impl Stage {
    /// Workers that have not said hello.
    fn starting(settings: PoolSettings) -> Self {
        Self::with_policy(settings, RoundRobin::new())
    }

    /// So many workers that are ready.
    fn serving(settings: PoolSettings) -> Self {
        let mut stage = Self::starting(settings);
        stage.greet_all();
        stage
    }

    fn with_policy(settings: PoolSettings, policy: impl PoolPolicy) -> Self {
        Self::with_hands(settings, policy, |id| Hand::new(id, Process::Asked))
    }

    fn with_hands(
        settings: PoolSettings,
        policy: impl PoolPolicy,
        mut hire: impl FnMut(WorkerId) -> (Hand, OwnedFd) + 'static,
    ) -> Self {
        let ledger = DescriptorLedger::open();
        let clock = ManualClock::new();
        let mut reactor = Reactor::with_clock(clock.clone()).unwrap();
        let hands = Rc::new(RefCell::new(Vec::new()));
        let hired = Rc::clone(&hands);
        let lines = Rc::<RefCell<Vec<_>>>::default();
        let noted = Rc::clone(&lines);
        let spawn = move |_: &mut Reactor, id: WorkerId| {
            let (hand, channel) = hire(id);
            let channel = Noted(channel, Rc::clone(&noted));
            let hand = Rc::new(hand);
            hired.borrow_mut().push(Rc::clone(&hand));
            let process = hand.process();
            Ok(Spawned { channel, process })
        };
        let pool = Pool::with_policy(&mut reactor, settings, policy, spawn);
        let mut stage = Self {
            reactor,
            clock,
            pool,
            hands,
            events: Rc::default(),
            undelivered: Rc::default(),
            clients: Vec::new(),
            lines,
            _ledger: ledger,
        };
        let told = Rc::clone(&stage.events);
        let handler = move |_: &mut _, event| told.borrow_mut().push(in_short(&event));
        stage.pool.on_event(handler);
        let told = Rc::clone(&stage.undelivered);
        stage.pool.on_undelivered(move |_, connection, why| {
            told.borrow_mut().push((connection.label, why));
        });
        stage.settle();
        stage
    }

    /// Moves the time in steps that miss no tick.
    fn pass(&mut self, time: Duration) {
        let mut left = time;
        while !left.is_zero() {
            let step = left.min(TICK / 4);
            self.jump(step);
            left -= step;
        }
    }

    /// The worker that was started as number `place`, from 0.
    fn hand(&self, place: usize) -> Rc<Hand> {
        Rc::clone(&self.hands.borrow()[place])
    }

    fn started(&self) -> usize {
        self.hands.borrow().len()
    }

    /// Has every worker that has not done so say hello.
    fn greet_all(&mut self) {
        for hand in self.hands.borrow().iter() {
            hand.greet();
        }
        self.settle();
    }

    /// A connection under this label.
    fn connection(&mut self, label: u32) -> PassedConnection {
        let (client, accepted) = socketpair();
        self.clients.push(client);
        let mut connection = PassedConnection::new(accepted.into());
        connection.label = label;
        connection
    }

    /// Gives the pool connections under these labels.
    fn dispatch(&mut self, labels: impl IntoIterator<Item = u32>) {
        for label in labels {
            let connection = self.connection(label);
            self.pool.dispatch(&mut self.reactor, connection);
        }
        self.settle();
    }

    /// Has a worker say something.
    fn say(&mut self, place: usize, message: FromWorker) {
        self.hand(place).say(&message);
        self.settle();
    }

    fn accept(&mut self, place: usize, id: u64, live: u32) {
        self.say(place, FromWorker::Accepted { id, live });
    }

    fn refuse(&mut self, place: usize, id: u64, reason: WorkerRefusal) {
        let live = 0;
        self.say(place, refused(id, reason, live));
    }

    /// The channel of a worker ends, and its process with it.
    fn end(&mut self, place: usize) {
        self.hand(place).exit(0);
        self.hang_up(place);
    }

    /// The channel of a worker ends.
    fn hang_up(&mut self, place: usize) {
        self.hand(place).hang_up();
        self.settle();
    }

    /// How many descriptors may wait to leave for a worker.
    fn let_wait(&mut self, place: usize, queued: usize) {
        let line = self.lines.borrow()[place];
        let line = self.reactor.get(line).expect("it is open");
        let limits = line.descriptor_limits().queued(queued);
        line.set_descriptor_limits(limits);
    }

    fn has_room(&self) -> bool {
        self.pool.has_room(&self.reactor)
    }

    /// What the pool says of the worker with this number of its own.
    #[track_caller]
    fn worker(&self, place: usize) -> WorkerStatistics {
        let id = self.hand(place).id;
        let workers = self.pool.statistics().workers;
        let found = workers.into_iter().find(|worker| worker.id == id);
        found.expect("the pool has it")
    }

    fn stage_of(&self, place: usize) -> WorkerStage {
        self.worker(place).stage
    }

    fn events(&self) -> Vec<String> {
        self.events.take()
    }

    fn undelivered(&self) -> Vec<(u32, Undelivered)> {
        self.undelivered.take()
    }
}

/// The pool's end of a channel, which is noted.
struct Noted(OwnedFd, Rc<RefCell<Vec<UnixTransportHandle>>>);

impl ChannelSocket for Noted {
    type Transport = UnixStream;
    type Error = AdoptError;

    fn adopt(
        self,
        reactor: &mut Reactor,
        protocol: impl Protocol<UnixStream>,
    ) -> Result<UnixTransportHandle, AdoptError> {
        let line = reactor.adopt_unix_stream(self.0, protocol)?;
        self.1.borrow_mut().push(line);
        Ok(line)
    }
}

fn in_short(event: &PoolEvent) -> String {
    match event {
        PoolEvent::Ready { worker, pid } => format!("{worker} ready, {pid}"),
        PoolEvent::Hung { worker, pid } => format!("{worker} hung, {pid}"),
        PoolEvent::Recovered { worker, pid } => format!("{worker} recovered, {pid}"),
        PoolEvent::Lost {
            worker,
            pid,
            acknowledged,
            unanswered,
        } => format!("{worker} lost, {pid}: took {acknowledged}, not {unanswered}"),
        PoolEvent::Exited {
            worker,
            pid,
            status,
        } => {
            let code = status.map(|status| status.code());
            format!("{worker} exited, {pid}: {code:?}")
        }
        PoolEvent::NotStarted {
            worker,
            error,
            failures,
        } => format!("{worker} not started, {failures}: {error}"),
        PoolEvent::Recalled { worker, pid } => format!("{worker} recalled, {pid}"),
        PoolEvent::GaveUp { failures } => format!("gave up after {failures}"),
        event => panic!("unknown: {event:?}"),
    }
}

/// How the end of a process can be told.
enum Process {
    /// By asking.
    Asked,
    /// By a descriptor, and by asking then.
    Watched,
    /// It had ended before the pool could look.
    Gone,
}

/// A worker by hand: its end of the channel, and what stands for its process.
struct Hand {
    id: WorkerId,
    socket: RefCell<Option<StdUnixStream>>,
    frames: RefCell<Frames>,
    has_greeted: Cell<bool>,
    kind: Process,
    /// Given to the pool, and what ends it.
    exit_watch: RefCell<Option<(StdUnixStream, OwnedFd)>>,
    kills: Cell<u32>,
    can_be_killed: Cell<bool>,
    asked: Cell<u32>,
    exit: RefCell<Box<dyn Fn() -> io::Result<Option<ExitStatus>>>>,
}

impl Hand {
    /// The worker, and the pool's end of its channel.
    fn new(id: WorkerId, kind: Process) -> (Self, OwnedFd) {
        let (ours, theirs) = socketpair();
        let watch = matches!(kind, Process::Watched).then(|| {
            let (end, watched) = socketpair();
            (end, watched.into())
        });
        let hand = Self {
            id,
            socket: RefCell::new(Some(ours)),
            frames: RefCell::default(),
            has_greeted: Cell::new(false),
            kind,
            exit_watch: RefCell::new(watch),
            kills: Cell::new(0),
            can_be_killed: Cell::new(true),
            asked: Cell::new(0),
            exit: RefCell::new(Box::new(|| Ok(None))),
        };
        (hand, theirs.into())
    }

    fn process(self: &Rc<Self>) -> Box<dyn ChildProcess> {
        let hand = Rc::clone(self);
        match self.kind {
            Process::Asked => Box::new(Sham(hand)),
            Process::Watched | Process::Gone => Box::new(Watched(Sham(hand))),
        }
    }

    /// 100 and its number.
    fn pid(&self) -> u32 {
        let number = self.id.to_string();
        let number = number.strip_prefix("worker ").expect("its name");
        100 + number.parse::<u32>().expect("a number")
    }

    fn greet(&self) {
        if !self.has_greeted.replace(true) {
            self.say(&hello(Role::WORKER));
        }
    }

    /// As one that knows messages with several connections.
    fn greet_anew(&self) {
        assert!(!self.has_greeted.replace(true), "it has said hello");
        self.say(&hello_of_today(Role::WORKER));
    }

    #[track_caller]
    fn say<M: Message>(&self, message: &M) {
        self.say_with(message, &[]);
    }

    #[track_caller]
    fn say_with<M: Message>(&self, message: &M, fds: &[BorrowedFd<'_>]) {
        self.say_bytes(&frame(message, fds.len()), fds);
    }

    #[track_caller]
    fn say_bytes(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        let socket = self.socket.borrow();
        let socket = socket.as_ref().expect("its channel is there");
        send_bytes(socket, bytes, fds).expect("room");
    }

    /// Why it cannot say anything, if so.
    fn refusal(&self) -> Option<Errno> {
        let socket = self.socket.borrow();
        let socket = socket.as_ref().expect("its channel is there");
        rustix::net::send(socket, b"?", SendFlags::NOSIGNAL).err()
    }

    fn hang_up(&self) {
        self.socket.borrow_mut().take();
    }

    /// The process ends: what is answered to who asks, from now on.
    fn exit(&self, code: i32) {
        *self.exit.borrow_mut() = Box::new(move || Ok(Some(ExitStatus::from_raw(code << 8))));
        self.exit_watch.borrow_mut().take();
    }

    /// What was sent to it since the last time, each with its descriptors.
    fn heard(&self) -> Vec<(ToWorker, Vec<OwnedFd>)> {
        let socket = self.socket.borrow();
        let mut frames = self.frames.borrow_mut();
        let socket = socket.as_ref().expect("its channel is there");
        while let Some((bytes, fds)) = receive(socket) {
            frames.descriptors(fds);
            frames.feed(&bytes);
        }
        let mut messages = Vec::new();
        while let Some(next) = frames.next() {
            if next.kind == HELLO {
                continue;
            }
            let message = decode_payload(next.kind, 1, &next.payload).expect("well formed");
            messages.push((message, next.descriptors));
        }
        messages
    }

    /// The numbers of the deliveries that it was sent, and their labels.
    #[track_caller]
    fn given(&self) -> Vec<(u64, u32)> {
        let given = self.heard().into_iter().map(|(message, fds)| {
            assert_eq!(fds.len(), 1, "{message:?}");
            match message {
                ToWorker::Dispatch(dispatch) => (dispatch.id, dispatch.label),
                other => panic!("{other:?}"),
            }
        });
        given.collect()
    }

    /// The labels of what it was sent.
    #[track_caller]
    fn labels(&self) -> Vec<u32> {
        self.given().into_iter().map(|(_, label)| label).collect()
    }

    /// The one message that it was sent: how long it may go on.
    #[track_caller]
    fn told_to_drain(&self) -> u32 {
        match &self.heard()[..] {
            [(ToWorker::Drain { within_ms }, _)] => *within_ms,
            heard => panic!("{heard:?}"),
        }
    }
}

/// One read, with what came beside it; nothing if there is nothing.
fn receive(socket: &StdUnixStream) -> Option<(Vec<u8>, VecDeque<OwnedFd>)> {
    let mut bytes = vec![0; 1 << 16];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut buffers = [IoSliceMut::new(&mut bytes)];
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let received = match recvmsg(socket, &mut buffers, &mut control, flags) {
        Ok(received) => received,
        Err(Errno::AGAIN) => return None,
        Err(error) => panic!("{error}"),
    };
    let mut fds = VecDeque::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    bytes.truncate(received.bytes);
    (received.bytes > 0).then_some((bytes, fds))
}

struct Sham(Rc<Hand>);

impl ChildProcess for Sham {
    fn pid(&self) -> u32 {
        self.0.pid()
    }

    fn kill(&mut self) -> io::Result<()> {
        self.0.kills.set(self.0.kills.get() + 1);
        if self.0.can_be_killed.get() {
            Ok(())
        } else {
            Err(io::ErrorKind::PermissionDenied.into())
        }
    }

    fn try_wait(&mut self) -> io::Result<Option<ExitStatus>> {
        self.0.asked.set(self.0.asked.get() + 1);
        (self.0.exit.borrow())()
    }
}

struct Watched(Sham);

impl ChildProcess for Watched {
    fn pid(&self) -> u32 {
        self.0.pid()
    }

    fn kill(&mut self) -> io::Result<()> {
        self.0.kill()
    }

    fn try_wait(&mut self) -> io::Result<Option<ExitStatus>> {
        self.0.try_wait()
    }

    fn exit_descriptor(&mut self) -> io::Result<Option<Rc<OwnedFd>>> {
        let watch = self.0.0.exit_watch.borrow();
        let copy = watch.as_ref().map(|(_, fd)| fd.try_clone().map(Rc::new));
        copy.transpose()
    }
}
