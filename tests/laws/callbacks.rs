//! Callbacks never nest, whatever a callback does.
//!
//! One script leads a reactor through every kind of callback there is. It is
//! played once for each pair of a kind and an action: the first callback of
//! that kind takes the action. Every callback holds a mutable borrow of one
//! `RefCell` from its beginning to its end, and a depth is counted beside it.

use std::cell::{Cell, RefCell, RefMut};
use std::io::{ErrorKind, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream as Peer;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use bowline::lifecycle::{Phase, SystemEvent};
use bowline::resolve::{Answer, Resolver};
use bowline::testing::ManualClock;
use bowline::{
    Address, AfterReadClosed, BuildContext, CloseReason, ConnectError, Context, Factory,
    FileSender, Origin, Producer, ProducerKind, ProducerRef, Protocol, Reactor,
    ReceivedDescriptors, Transport, Transports, Turn, UnixAddress, UnixStream, UnixTransportHandle,
};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use crate::support::{DescriptorLedger, settle, socketpair};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    ConnectionMade,
    DataReceived,
    FileDescriptorReceived,
    DescriptorsReceived,
    DescriptorsSent,
    ReadConnectionLost,
    WriteConnectionLost,
    ConnectionLost,
    ReadingResumed,
    ProtocolPaused,
    ProtocolResumed,
    ProtocolStopped,
    ProducerPaused,
    ProducerResumed,
    ProducerStopped,
    FactoryStarted,
    BuildProtocol,
    FactoryConnectionFailed,
    FactoryConnectionLost,
    FactoryStopped,
    Timer,
    CallSoon,
    CallFromThread,
    Deferred,
    ProtocolCall,
    StartupTrigger,
    ShutdownTrigger,
    PeriodicRun,
    PeriodicEnded,
    ThreadDone,
    ResolverAsked,
    LookupDone,
    FileSent,
    /// What actions schedule; takes none itself.
    Scheduled,
}

const KINDS: [Kind; 33] = [
    Kind::ConnectionMade,
    Kind::DataReceived,
    Kind::FileDescriptorReceived,
    Kind::DescriptorsReceived,
    Kind::DescriptorsSent,
    Kind::ReadConnectionLost,
    Kind::WriteConnectionLost,
    Kind::ConnectionLost,
    Kind::ReadingResumed,
    Kind::ProtocolPaused,
    Kind::ProtocolResumed,
    Kind::ProtocolStopped,
    Kind::ProducerPaused,
    Kind::ProducerResumed,
    Kind::ProducerStopped,
    Kind::FactoryStarted,
    Kind::BuildProtocol,
    Kind::FactoryConnectionFailed,
    Kind::FactoryConnectionLost,
    Kind::FactoryStopped,
    Kind::Timer,
    Kind::CallSoon,
    Kind::CallFromThread,
    Kind::Deferred,
    Kind::ProtocolCall,
    Kind::StartupTrigger,
    Kind::ShutdownTrigger,
    Kind::PeriodicRun,
    Kind::PeriodicEnded,
    Kind::ThreadDone,
    Kind::ResolverAsked,
    Kind::LookupDone,
    Kind::FileSent,
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    Nothing,
    CloseSelf,
    CloseSelfWithin,
    AbortSelf,
    HalfCloseSelf,
    WriteToSelf,
    FloodSelf,
    PauseSelf,
    PauseAndResumeSelf,
    CloseOther,
    AbortOther,
    FloodOther,
    PauseOther,
    SendDescriptorToOther,
    RegisterSelf,
    RegisterPull,
    RegisterTwice,
    RegisterWithOther,
    Unregister,
    Panic,
    Stop,
    Crash,
    Turn,
    Schedule,
    Connect,
    ConnectToNobody,
    Listen,
    ListenAndStop,
    CloseAll,
    DetachSelf,
    CallProtocol,
    Repeat,
    Resolve,
    SendFile,
}

const ACTIONS: [Action; 34] = [
    Action::Nothing,
    Action::CloseSelf,
    Action::CloseSelfWithin,
    Action::AbortSelf,
    Action::HalfCloseSelf,
    Action::WriteToSelf,
    Action::FloodSelf,
    Action::PauseSelf,
    Action::PauseAndResumeSelf,
    Action::CloseOther,
    Action::AbortOther,
    Action::FloodOther,
    Action::PauseOther,
    Action::SendDescriptorToOther,
    Action::RegisterSelf,
    Action::RegisterPull,
    Action::RegisterTwice,
    Action::RegisterWithOther,
    Action::Unregister,
    Action::Panic,
    Action::Stop,
    Action::Crash,
    Action::Turn,
    Action::Schedule,
    Action::Connect,
    Action::ConnectToNobody,
    Action::Listen,
    Action::ListenAndStop,
    Action::CloseAll,
    Action::DetachSelf,
    Action::CallProtocol,
    Action::Repeat,
    Action::Resolve,
    Action::SendFile,
];

/// What one play of the script knows.
struct World {
    kind: Kind,
    action: Action,
    is_armed: Cell<bool>,
    depth: Cell<u32>,
    violations: RefCell<Vec<String>>,
    /// Borrowed for the time of each callback.
    state: RefCell<State>,
    next_id: Cell<u32>,
    subject: Cell<Option<UnixTransportHandle>>,
    other: Cell<Option<UnixTransportHandle>>,
    path: PathBuf,
}

#[derive(Default)]
struct State {
    log: Vec<(u32, Kind)>,
    /// Protocols that were taken apart or removed, and so are told of no end.
    taken: Vec<u32>,
}

thread_local! {
    /// For calls that have to be `Send` and are not sent anywhere.
    static WORLD: RefCell<Option<Rc<World>>> = const { RefCell::new(None) };
}

fn this_world() -> Rc<World> {
    WORLD.with_borrow(|world| Rc::clone(world.as_ref().expect("set by `play`")))
}

/// Whose callback it is.
enum Own<'a, 'o> {
    Nobody,
    Transport(&'a mut dyn Transport),
    Origin(&'a mut Origin<'o>),
}

/// One running callback.
struct Running {
    world: Rc<World>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.world.depth.set(self.world.depth.get() - 1);
    }
}

impl World {
    fn violation(&self, what: String) {
        self.violations.borrow_mut().push(what);
    }

    fn new_id(&self) -> u32 {
        self.next_id.set(self.next_id.get() + 1);
        self.next_id.get()
    }

    fn borrow_state(&self, what: Kind) -> Option<RefMut<'_, State>> {
        let state = self.state.try_borrow_mut().ok();
        if state.is_none() {
            self.violation(format!("{what:?}: state borrowed twice"));
        }
        state
    }
}

/// The body of every callback.
fn callback(id: u32, kind: Kind, own: Own<'_, '_>, reactor: &mut Reactor) {
    let world = this_world();
    world.depth.set(world.depth.get() + 1);
    let running = Running { world };
    let world = &running.world;
    if world.depth.get() > 1 {
        world.violation(format!("{kind:?} inside another callback"));
    }
    let Some(mut state) = world.borrow_state(kind) else {
        return;
    };
    state.log.push((id, kind));
    if kind == world.kind && world.is_armed.replace(false) {
        act(world, own, reactor);
    }
}

/// Takes the action, with what the callback is given.
fn act(world: &World, mut own: Own<'_, '_>, reactor: &mut Reactor) {
    let on_self = |own: &mut Own<'_, '_>,
                   reactor: &mut Reactor,
                   what: &dyn Fn(&mut dyn Transport)| match own {
        Own::Transport(transport) => what(&mut **transport),
        Own::Nobody | Own::Origin(_) => {
            if let Some(transport) = world.subject.get().and_then(|it| reactor.get(it)) {
                what(transport.as_dyn());
            }
        }
    };
    let on_other = |reactor: &mut Reactor, what: &dyn Fn(&mut dyn Transport)| {
        if let Some(transport) = world.other.get().and_then(|it| reactor.get(it)) {
            what(transport.as_dyn());
        }
    };
    match world.action {
        Action::Nothing => {}
        Action::CloseSelf => match &mut own {
            Own::Origin(Origin::Listener(listener)) => listener.stop_listening(),
            Own::Origin(Origin::Connector(connector)) => connector.stop_connecting(),
            own => on_self(own, reactor, &|it| it.lose_connection()),
        },
        Action::CloseSelfWithin => {
            on_self(&mut own, reactor, &|it| {
                it.lose_connection_within(Duration::from_secs(1))
            });
        }
        Action::AbortSelf => match &mut own {
            Own::Origin(Origin::Connector(connector)) => connector.connect(),
            own => on_self(own, reactor, &|it| {
                it.abort_connection();
                it.lose_connection();
                it.abort_connection();
            }),
        },
        Action::HalfCloseSelf => on_self(&mut own, reactor, &|it| it.lose_write_connection()),
        Action::WriteToSelf => on_self(&mut own, reactor, &|it| {
            it.write(b"written in a callback");
        }),
        Action::FloodSelf => on_self(&mut own, reactor, &|it| {
            it.write(&vec![1; 500_000]);
        }),
        Action::PauseSelf => match &mut own {
            Own::Origin(Origin::Listener(listener)) => listener.pause_accepting(),
            own => on_self(own, reactor, &|it| it.pause_producing()),
        },
        Action::PauseAndResumeSelf => match &mut own {
            Own::Origin(Origin::Listener(listener)) => {
                listener.pause_accepting();
                listener.resume_accepting();
            }
            own => on_self(own, reactor, &|it| {
                it.pause_producing();
                it.resume_producing();
            }),
        },
        Action::CloseOther => on_other(reactor, &|it| it.lose_connection()),
        Action::AbortOther => on_other(reactor, &|it| it.abort_connection()),
        Action::FloodOther => on_other(reactor, &|it| {
            it.write(&vec![2; 500_000]);
        }),
        Action::PauseOther => on_other(reactor, &|it| {
            it.pause_producing();
            it.resume_producing();
            it.pause_producing();
        }),
        Action::SendDescriptorToOther => {
            if let Some(other) = world.other.get().and_then(|it| reactor.get(it)) {
                let _ = other.send_file_descriptor(null().into());
                other.write(b"d");
                let _ = other.write_with_descriptors(b"e", vec![null().into(), null().into()]);
            }
        }
        Action::RegisterSelf => on_self(&mut own, reactor, &|it| {
            let _ = it.register_producer(ProducerRef::Protocol, ProducerKind::Push);
        }),
        Action::RegisterPull => on_self(&mut own, reactor, &|it| {
            it.unregister_producer();
            let _ = it.register_producer(boxed(), ProducerKind::Pull);
        }),
        Action::RegisterTwice => on_self(&mut own, reactor, &|it| {
            let _ = it.register_producer(boxed(), ProducerKind::Pull);
            let _ = it.register_producer(boxed(), ProducerKind::Push);
            it.unregister_producer();
            let _ = it.register_producer(boxed(), ProducerKind::Push);
        }),
        Action::RegisterWithOther => {
            let producer = match own {
                Own::Transport(transport) => Some(transport.handle()),
                Own::Nobody | Own::Origin(_) => None,
            };
            if let Some(producer) = producer {
                on_other(reactor, &|it| {
                    let _ = it.register_producer(producer.into(), ProducerKind::Push);
                    it.write(&vec![3; 500_000]);
                });
            }
        }
        Action::Unregister => on_self(&mut own, reactor, &|it| it.unregister_producer()),
        Action::Panic => panic!("on purpose, in a test"),
        Action::Stop => {
            let _ = reactor.stop();
        }
        Action::Crash => {
            let _ = reactor.crash();
        }
        Action::Turn => {
            reactor.turn(Some(Duration::ZERO));
            assert!(reactor.run().is_err());
        }
        Action::Schedule => {
            let call = |reactor: &mut Reactor| callback(0, Kind::Scheduled, Own::Nobody, reactor);
            reactor.call_soon(call);
            reactor.defer(call);
            reactor.call_when_running(call);
            let cancelled = reactor.call_later(Duration::ZERO, call);
            reactor.call_later(Duration::ZERO, call);
            cancelled.cancel(reactor).expect("not called inside");
            reactor.remote().call_from_thread(call).expect("it lives");
            for phase in [Phase::Before, Phase::During, Phase::After] {
                reactor.add_trigger(phase, SystemEvent::Shutdown, call);
            }
        }
        Action::Connect => {
            let address = UnixAddress::Path(world.path.clone());
            reactor
                .connect_unix(address, Builder::new())
                .expect("slots are left");
        }
        Action::ConnectToNobody => {
            let address = UnixAddress::Path(world.path.with_extension("nobody"));
            reactor
                .connect_unix(address, Builder::new())
                .expect("slots are left");
        }
        Action::Listen | Action::ListenAndStop => {
            let path = world.path.with_extension("more");
            let listener = reactor
                .listen_unix(UnixAddress::Path(path), Builder::new())
                .expect("nobody listens there");
            if world.action == Action::ListenAndStop
                && let Some(listener) = reactor.get(listener)
            {
                listener.stop_listening();
            }
        }
        Action::CloseAll => {
            on_self(&mut own, reactor, &|it| it.lose_connection());
            for handle in [world.subject.get(), world.other.get()]
                .into_iter()
                .flatten()
            {
                if let Some(transport) = reactor.get(handle) {
                    transport.abort_connection();
                }
            }
        }
        Action::DetachSelf => {
            if let Own::Transport(transport) = own {
                reactor.detach::<Subject>(transport.handle(), |reactor, result| {
                    callback(0, Kind::Scheduled, Own::Nobody, reactor);
                    if let Ok(detached) = result {
                        this_world()
                            .state
                            .borrow_mut()
                            .taken
                            .push(detached.protocol.id);
                    }
                });
            }
        }
        Action::CallProtocol => {
            let handle = match own {
                Own::Transport(transport) => Some(transport.handle()),
                _ => None,
            };
            if let Some(handle) = handle {
                reactor.call_protocol::<UnixStream, Subject>(handle, |subject, cx| {
                    callback(
                        subject.id,
                        Kind::Scheduled,
                        Own::Transport(cx.transport),
                        cx.reactor,
                    );
                });
            }
        }
        Action::Repeat => {
            let periodic = reactor.call_now_and_every(Duration::ZERO, |reactor, periodic| {
                periodic.stop(reactor);
                callback(0, Kind::Scheduled, Own::Nobody, reactor);
            });
            periodic.on_end(reactor, |reactor, _| {
                callback(0, Kind::Scheduled, Own::Nobody, reactor);
            });
        }
        Action::Resolve => {
            for host in ["", "127.0.0.1", "a.test"] {
                reactor.resolve(host, 1, |reactor, _| {
                    callback(0, Kind::Scheduled, Own::Nobody, reactor);
                });
            }
        }
        Action::SendFile => on_self(&mut own, reactor, &|it| {
            let _ = FileSender::new(&b"a file"[..]).send(it, |cx, _| {
                callback(0, Kind::Scheduled, Own::Transport(cx.transport), cx.reactor);
            });
        }),
    }
}

fn null() -> OwnedFd {
    std::fs::File::open("/dev/null")
        .expect("Linux has it")
        .into()
}

/// The protocol under test: every callback there is.
struct Subject {
    id: u32,
    /// Whether it takes descriptors in groups or one by one.
    takes_groups: bool,
}

impl Subject {
    fn new(takes_groups: bool) -> Self {
        let id = this_world().new_id();
        Self { id, takes_groups }
    }

    fn called(&self, kind: Kind, cx: &mut Context<'_, UnixStream>) {
        callback(self.id, kind, Own::Transport(cx.transport), cx.reactor);
    }
}

impl Protocol<UnixStream> for Subject {
    fn connection_made(&mut self, cx: &mut Context<'_, UnixStream>) {
        self.called(Kind::ConnectionMade, cx);
    }

    fn data_received(&mut self, cx: &mut Context<'_, UnixStream>, data: &[u8]) {
        assert!(!data.is_empty());
        self.called(Kind::DataReceived, cx);
    }

    fn file_descriptor_received(
        &mut self,
        cx: &mut Context<'_, UnixStream>,
        fd: OwnedFd,
    ) -> Result<(), OwnedFd> {
        self.called(Kind::FileDescriptorReceived, cx);
        Err(fd)
    }

    fn descriptors_received(
        &mut self,
        cx: &mut Context<'_, UnixStream>,
        descriptors: &mut ReceivedDescriptors<'_>,
        data: &[u8],
    ) {
        if self.takes_groups {
            let taken = descriptors.next();
            self.called(Kind::DescriptorsReceived, cx);
            drop(taken);
            return;
        }
        // As the default does.
        let mut refused = Vec::new();
        while cx.transport.is_open_for_reading()
            && let Some(fd) = descriptors.next()
        {
            if let Err(fd) = self.file_descriptor_received(cx, fd) {
                refused.push(fd);
            }
        }
        cx.transport.close_unclaimed(refused);
        if cx.transport.is_open_for_reading() {
            self.data_received(cx, data);
        }
    }

    fn descriptors_sent(&mut self, cx: &mut Context<'_, UnixStream>, count: usize) {
        assert!(count > 0);
        self.called(Kind::DescriptorsSent, cx);
    }

    fn read_connection_lost(&mut self, cx: &mut Context<'_, UnixStream>) -> AfterReadClosed {
        self.called(Kind::ReadConnectionLost, cx);
        AfterReadClosed::KeepWriting
    }

    fn write_connection_lost(&mut self, cx: &mut Context<'_, UnixStream>) {
        self.called(Kind::WriteConnectionLost, cx);
    }

    fn connection_lost(&mut self, cx: &mut Context<'_, UnixStream>, _: &CloseReason) {
        self.called(Kind::ConnectionLost, cx);
    }

    fn reading_resumed(&mut self, cx: &mut Context<'_, UnixStream>) {
        self.called(Kind::ReadingResumed, cx);
    }

    fn pause_producing(&mut self, cx: &mut Context<'_, UnixStream>) {
        self.called(Kind::ProtocolPaused, cx);
    }

    fn resume_producing(&mut self, cx: &mut Context<'_, UnixStream>) {
        self.called(Kind::ProtocolResumed, cx);
    }

    fn stop_producing(&mut self, cx: &mut Context<'_, UnixStream>) {
        self.called(Kind::ProtocolStopped, cx);
    }
}

struct BoxedProducer;

fn boxed() -> ProducerRef {
    ProducerRef::boxed(BoxedProducer)
}

impl Producer for BoxedProducer {
    fn resume_producing(&mut self, cx: &mut Context<'_, dyn Transport>) {
        callback(
            0,
            Kind::ProducerResumed,
            Own::Transport(cx.transport),
            cx.reactor,
        );
    }

    fn pause_producing(&mut self, cx: &mut Context<'_, dyn Transport>) {
        callback(
            0,
            Kind::ProducerPaused,
            Own::Transport(cx.transport),
            cx.reactor,
        );
    }

    fn stop_producing(&mut self, cx: &mut Context<'_, dyn Transport>) {
        callback(
            0,
            Kind::ProducerStopped,
            Own::Transport(cx.transport),
            cx.reactor,
        );
    }
}

/// Knows no host.
struct Ignorant;

impl Resolver for Ignorant {
    fn resolve(&mut self, reactor: &mut Reactor, _: &str, _: u16, answer: Answer) {
        callback(0, Kind::ResolverAsked, Own::Nobody, reactor);
        answer.give(reactor, Ok(Vec::new()));
    }
}

struct Builder {
    id: u32,
}

impl Builder {
    fn new() -> Self {
        Self {
            id: this_world().new_id(),
        }
    }

    fn called(&self, kind: Kind, cx: &mut BuildContext<'_>) {
        callback(self.id, kind, Own::Origin(&mut cx.origin), cx.reactor);
    }
}

impl Factory for Builder {
    type Protocol = Subject;

    fn build_protocol(&mut self, cx: &mut BuildContext<'_>, _: &Address) -> Option<Subject> {
        self.called(Kind::BuildProtocol, cx);
        Some(Subject::new(false))
    }

    fn started(&mut self, cx: &mut BuildContext<'_>) {
        self.called(Kind::FactoryStarted, cx);
    }

    fn stopped(&mut self, cx: &mut BuildContext<'_>) {
        self.called(Kind::FactoryStopped, cx);
    }

    fn connection_failed(&mut self, cx: &mut BuildContext<'_>, _: &ConnectError) {
        self.called(Kind::FactoryConnectionFailed, cx);
    }

    fn connection_lost(&mut self, cx: &mut BuildContext<'_>, _: &CloseReason) {
        self.called(Kind::FactoryConnectionLost, cx);
    }
}

/// The one that nothing is done to.
struct Bystander {
    lost: Rc<RefCell<Vec<String>>>,
}

impl Protocol<UnixStream> for Bystander {
    fn data_received(&mut self, cx: &mut Context<'_, UnixStream>, data: &[u8]) {
        cx.transport.write(data);
    }

    fn connection_lost(&mut self, _: &mut Context<'_, UnixStream>, reason: &CloseReason) {
        self.lost.borrow_mut().push(reason.to_string());
    }
}

/// Reads what has arrived, and answers how much.
fn drain(mut peer: &Peer) -> usize {
    let mut buffer = [0; 65_536];
    let mut all = 0;
    loop {
        match peer.read(&mut buffer) {
            Ok(0) => return all,
            Ok(count) => all += count,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return all,
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return all,
            Err(error) => panic!("{error}"),
        }
    }
}

fn write(mut peer: &Peer, data: &[u8]) {
    // The other end may be closed by what is being tried.
    let _ = peer.write(data);
}

fn send_descriptor(peer: &Peer) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fd = null();
    let fds = [fd.as_fd(), fd.as_fd()];
    assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    let data = [IoSlice::new(b"with descriptors")];
    let _ = sendmsg(peer, &data, &mut control, SendFlags::NOSIGNAL);
}

/// The sockets of one play, and what the bystander was told.
struct Stage {
    reactor: Reactor,
    peer: Peer,
    other_peer: Peer,
    bystander_peer: Peer,
    bystander_lost: Rc<RefCell<Vec<String>>>,
}

impl Stage {
    fn set(world: &World) -> Self {
        let mut reactor = Reactor::with_clock(ManualClock::new()).unwrap();
        let (ours, bystander_peer) = socketpair();
        let bystander_lost = Rc::default();
        let bystander = Bystander {
            lost: Rc::clone(&bystander_lost),
        };
        reactor.adopt_unix_stream(ours.into(), bystander).unwrap();
        let (ours, other_peer) = socketpair();
        let other = reactor
            .adopt_unix_stream(ours.into(), Subject::new(false))
            .unwrap();
        world.other.set(Some(other));
        reactor.set_resolver(Ignorant);
        let (_, peer) = socketpair();
        Self {
            reactor,
            peer,
            other_peer,
            bystander_peer,
            bystander_lost,
        }
    }

    /// Does one step and all that follows; false when the reactor has stopped.
    fn step(&mut self, step: impl FnOnce(&mut Self)) -> bool {
        if !self.reactor.is_running() {
            return false;
        }
        step(self);
        settle(&mut self.reactor);
        if !self.reactor.is_running() {
            return false;
        }
        self.check_bystander();
        self.reactor.is_running()
    }

    fn new_subject(&mut self, world: &World) {
        let (ours, peer) = socketpair();
        self.peer = peer;
        let subject = Subject::new(world.kind == Kind::DescriptorsReceived);
        let handle = self
            .reactor
            .adopt_unix_stream(ours.into(), subject)
            .unwrap();
        world.subject.set(Some(handle));
    }

    fn with_subject(&mut self, world: &World, what: impl FnOnce(&mut dyn bowline::UnixTransport)) {
        if let Some(transport) = world.subject.get().and_then(|it| self.reactor.get(it)) {
            what(transport);
        }
    }

    fn check_bystander(&mut self) {
        write(&self.bystander_peer, b"still there?");
        settle(&mut self.reactor);
        assert_eq!(
            drain(&self.bystander_peer),
            12,
            "the bystander was affected"
        );
    }

    /// Leads through every kind of callback.
    fn play(&mut self, world: &World) -> Option<()> {
        let listening = UnixAddress::Path(world.path.clone());
        let nobody = UnixAddress::Path(world.path.with_extension("missing"));
        let call = |kind| move |reactor: &mut Reactor| callback(0, kind, Own::Nobody, reactor);
        for phase in [Phase::Before, Phase::During, Phase::After] {
            self.reactor
                .add_trigger(phase, SystemEvent::Startup, call(Kind::StartupTrigger));
            self.reactor
                .add_trigger(phase, SystemEvent::Shutdown, call(Kind::ShutdownTrigger));
        }
        self.reactor.start().unwrap();
        let done = |goes_on: bool| goes_on.then_some(());
        done(self.step(|it| it.new_subject(world)))?;
        done(self.step(|it| it.reactor.call_soon(call(Kind::CallSoon))))?;
        done(self.step(|it| it.reactor.defer(call(Kind::Deferred))))?;
        done(self.step(|it| {
            it.reactor.call_later(Duration::ZERO, call(Kind::Timer));
        }))?;
        done(self.step(|it| {
            it.reactor
                .remote()
                .call_from_thread(call(Kind::CallFromThread))
                .unwrap();
        }))?;
        done(self.step(|it| {
            let handle = world.subject.get().unwrap();
            let token = handle.token();
            let handle = it.reactor.get(handle).map(|transport| transport.handle());
            if let Some(handle) = handle {
                assert_eq!(handle.token(), token);
                it.reactor
                    .call_protocol::<UnixStream, Subject>(handle, |subject, cx| {
                        subject.called(Kind::ProtocolCall, cx);
                    });
            }
        }))?;
        done(self.step(|it| {
            let run = call(Kind::PeriodicRun);
            let periodic =
                it.reactor
                    .call_now_and_every(Duration::ZERO, move |reactor, periodic| {
                        periodic.stop(reactor);
                        run(reactor);
                    });
            let ended = call(Kind::PeriodicEnded);
            periodic.on_end(&mut it.reactor, move |reactor, _| ended(reactor));
        }))?;
        done(self.step(|it| {
            let told = call(Kind::ThreadDone);
            it.reactor
                .call_in_thread(|| (), move |reactor, _| told(reactor));
            // It has come back when the thread has nothing to do any more.
            let pool = it.reactor.thread_pool();
            while pool.counts().idle != 1 {
                std::thread::yield_now();
            }
        }))?;
        done(self.step(|it| {
            let told = call(Kind::LookupDone);
            it.reactor
                .resolve("host.test", 1, move |reactor, _| told(reactor));
        }))?;
        done(self.step(|it| {
            it.with_subject(world, |subject| {
                let _ = FileSender::new(&b"file"[..]).send(subject, |cx, _| {
                    callback(0, Kind::FileSent, Own::Transport(cx.transport), cx.reactor);
                });
            });
        }))?;
        done(self.step(|it| write(&it.peer, b"data")))?;
        done(self.step(|it| send_descriptor(&it.peer)))?;
        done(self.step(|it| {
            it.with_subject(world, |subject| {
                let _ = subject.send_file_descriptor(null().into());
                subject.write(b"a descriptor");
            });
        }))?;
        done(self.step(|it| it.with_subject(world, |subject| subject.pause_producing())))?;
        done(self.step(|it| {
            write(&it.peer, b"while paused");
            it.with_subject(world, |subject| subject.resume_producing());
        }))?;
        // Producers: registered, paused, resumed.
        let is_boxed = matches!(
            world.kind,
            Kind::ProducerPaused | Kind::ProducerResumed | Kind::ProducerStopped
        );
        let producer = || {
            if is_boxed {
                boxed()
            } else {
                ProducerRef::Protocol
            }
        };
        done(self.step(|it| {
            it.with_subject(world, |subject| {
                let _ = subject.register_producer(producer(), ProducerKind::Push);
                subject.write(&vec![0; 1_000_000]);
            });
        }))?;
        for _ in 0..20 {
            done(self.step(|it| {
                drain(&it.peer);
                drain(&it.other_peer);
            }))?;
        }
        // Both sides half-close.
        done(self.step(|it| {
            it.with_subject(world, |subject| {
                subject.unregister_producer();
                subject.lose_write_connection();
            });
        }))?;
        done(self.step(|it| {
            let _ = it.peer.shutdown(Shutdown::Write);
        }))?;
        // Another one, aborted while it has a producer.
        done(self.step(|it| it.new_subject(world)))?;
        done(self.step(|it| {
            it.with_subject(world, |subject| {
                let _ = subject.register_producer(producer(), ProducerKind::Push);
            });
        }))?;
        done(self.step(|it| it.with_subject(world, |subject| subject.abort_connection())))?;
        // Listeners and connectors.
        let mut listener = None;
        done(self.step(|it| {
            listener = Some(
                it.reactor
                    .listen_unix(listening.clone(), Builder::new())
                    .unwrap(),
            );
        }))?;
        done(self.step(|it| {
            it.reactor
                .connect_unix(listening.clone(), Builder::new())
                .unwrap();
        }))?;
        done(self.step(|it| {
            it.reactor
                .connect_unix(nobody.clone(), Builder::new())
                .unwrap();
        }))?;
        done(self.step(|it| {
            if let Some(listener) = listener.and_then(|handle| it.reactor.get(handle)) {
                listener.resume_accepting();
            }
        }))?;
        done(self.step(|_| {
            // One that connects and goes.
            if let Ok(client) = Peer::connect(&world.path) {
                write(&client, b"hello");
            }
        }))?;
        done(self.step(|it| {
            it.new_subject(world);
            if let Some(listener) = listener.and_then(|handle| it.reactor.get(handle)) {
                listener.stop_listening();
            }
        }))?;
        Some(())
    }

    /// Stops, however far it came, and once more if that crashed it.
    fn finish(&mut self) {
        for _ in 0..3 {
            if self.reactor.registered() > 0 {
                // Refused unless it crashed.
                let _ = self.reactor.start();
            }
            let _ = self.reactor.stop();
            let mut turns = 0;
            while self.reactor.turn(Some(Duration::ZERO)) == Turn::Continue {
                turns += 1;
                assert!(turns < 100, "does not stop: {:?}", self.reactor);
            }
        }
    }
}

/// Plays the script with `action` taken in the first callback of `kind`.
fn play(kind: Kind, action: Action) {
    let ledger = DescriptorLedger::open();
    let directory = tempfile::tempdir().unwrap();
    let world = Rc::new(World {
        kind,
        action,
        is_armed: Cell::new(true),
        depth: Cell::new(0),
        violations: RefCell::default(),
        state: RefCell::default(),
        next_id: Cell::new(0),
        subject: Cell::new(None),
        other: Cell::new(None),
        path: directory.path().join("socket"),
    });
    WORLD.set(Some(Rc::clone(&world)));
    let mut stage = Stage::set(&world);
    stage.play(&world);
    stage.finish();

    assert!(!world.is_armed.get(), "the callback never came");
    let violations = world.violations.borrow();
    assert!(violations.is_empty(), "{violations:?}");
    let state = world.state.borrow();
    for id in 1..=world.next_id.get() {
        check_life(&state, id, kind, action);
    }
    assert_eq!(*stage.bystander_lost.borrow(), ["reactor stopped"]);
    let panics = u64::from(action == Action::Panic);
    assert_eq!(stage.reactor.statistics().panics, panics);
    assert_eq!(stage.reactor.registered(), 0);
    drop(state);
    drop(stage);
    WORLD.set(None);
    drop(directory);
    ledger.assert_balanced();
}

/// One protocol or factory: begins once, first, and ends once, last.
fn check_life(state: &State, id: u32, kind: Kind, action: Action) {
    let life: Vec<Kind> = state
        .log
        .iter()
        .filter(|(whose, _)| *whose == id)
        .map(|(_, kind)| *kind)
        .collect();
    let is_factory = life.first() == Some(&Kind::FactoryStarted);
    let (begin, end) = if is_factory {
        (Kind::FactoryStarted, Kind::FactoryStopped)
    } else {
        (Kind::ConnectionMade, Kind::ConnectionLost)
    };
    if life.is_empty() {
        // Built, and dropped because its connection could not be.
        return;
    }
    let count = |wanted| life.iter().filter(|it| **it == wanted).count();
    assert_eq!(life[0], begin, "{id}: {life:?}");
    let restarts = action == Action::AbortSelf && is_factory;
    assert!(count(begin) == 1 || restarts, "{id}: {life:?}");
    let is_cut_short = state.taken.contains(&id)
        // A connector whose factory fails is given up.
        || (is_factory && action == Action::Panic && life.contains(&kind));
    if !is_cut_short {
        assert_eq!(count(end), 1, "{id}: {life:?}");
        assert_eq!(life.last(), Some(&end), "{id}: {life:?}");
    }
}

/// All failures of one kind at once: what a change broke is then seen whole.
#[track_caller]
fn play_all(kinds: &[Kind]) {
    let mut failed = Vec::new();
    for &kind in kinds {
        for action in ACTIONS {
            let result = std::panic::catch_unwind(|| play(kind, action));
            if let Err(payload) = result {
                let message = payload
                    .downcast_ref::<String>()
                    .map(String::as_str)
                    .or_else(|| payload.downcast_ref::<&str>().copied())
                    .unwrap_or("?");
                failed.push(format!("{action:?} in {kind:?}: {message}"));
                WORLD.set(None);
            }
        }
    }
    assert!(
        failed.is_empty(),
        "{} failed:\n{}",
        failed.len(),
        failed.join("\n")
    );
}

#[test]
fn nothing_nests_in_callbacks_of_connections() {
    play_all(&KINDS[..9]);
}

#[test]
fn nothing_nests_in_callbacks_of_producers() {
    play_all(&KINDS[9..15]);
}

#[test]
fn nothing_nests_in_callbacks_of_factories() {
    play_all(&KINDS[15..20]);
}

#[test]
fn nothing_nests_in_calls_and_triggers() {
    play_all(&KINDS[20..27]);
}

#[test]
fn nothing_nests_in_what_comes_back() {
    play_all(&KINDS[27..]);
}
