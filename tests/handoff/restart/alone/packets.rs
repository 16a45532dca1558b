//! Connections of packets that move, with their listener.

use std::cell::{Cell, RefCell};
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::rc::Rc;

use bowline::endpoint::Adopt as _;
use bowline::handoff::restart::{
    Listeners, Movable, MoveTicket, Moved, Packed, Program, Restart, RestartError, Start,
};
use bowline::{
    Address, BuildContext, Context, Factory, Packet, PacketProtocol, PacketTransport, Reactor,
    Transports, UnixSeqpacket, UnixSeqpacketPort,
};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};

use super::{Stage, Staged, file};

/// What a program shares with the test.
#[derive(Default)]
struct Scene {
    events: RefCell<Vec<String>>,
    restart: RefCell<Option<Restart>>,
    /// Whether the successor refuses connections.
    refuses: Cell<bool>,
    packs: Cell<bool>,
}

impl Scene {
    fn note(&self, event: impl Into<String>) {
        self.events.borrow_mut().push(event.into());
    }

    fn events(&self) -> Vec<String> {
        self.events.take()
    }
}

struct Play(Rc<Scene>, std::path::PathBuf);

impl Program for Play {
    fn listen(&mut self, reactor: &mut Reactor, listeners: &mut Listeners<'_>) -> io::Result<()> {
        *self.0.restart.borrow_mut() = Some(listeners.restart().clone());
        let here = UnixSeqpacket::at(self.1.clone());
        listeners.listen(reactor, "packets", here, Counters(Rc::clone(&self.0)))?;
        Ok(())
    }

    fn serving(&mut self, _: &mut Reactor, start: Start) {
        self.0.note(match start {
            Start::TookOver { connections, .. } => format!("took over {connections}"),
            _ => "serves".into(),
        });
    }

    fn not_started(&mut self, _: &mut Reactor, error: &RestartError) {
        self.0.note(format!("not started: {error}"));
    }

    fn takes(&self, kind: &str) -> bool {
        kind == "counter" && !self.0.refuses.get()
    }

    fn connection_moved(&mut self, reactor: &mut Reactor, moved: Moved) {
        let mut counter = Counter::new(&self.0);
        counter.count = u32::from(moved.packed.state[0]);
        counter.held = moved.packed.descriptors;
        let kind = UnixSeqpacket.with_unsent(moved.unsent);
        reactor
            .adopt(kind, moved.fd, counter)
            .expect("a connection");
    }
}

struct Counters(Rc<Scene>);

impl Factory for Counters {
    type Protocol = Counter;

    fn build_protocol(&mut self, _: &mut BuildContext<'_>, _: &Address) -> Option<Counter> {
        Some(Counter::new(&self.0))
    }
}

/// Answers each packet with how many there were; keeps the descriptors of `keep`, and
/// answers `many` with more than the kernel holds.
struct Counter {
    scene: Rc<Scene>,
    count: u32,
    held: Vec<OwnedFd>,
    ticket: Option<MoveTicket>,
}

impl Counter {
    fn new(scene: &Rc<Scene>) -> Self {
        Self {
            scene: Rc::clone(scene),
            count: 0,
            held: Vec::new(),
            ticket: None,
        }
    }
}

impl PacketProtocol<UnixSeqpacketPort> for Counter {
    fn connection_made(&mut self, cx: &mut Context<'_, UnixSeqpacketPort>) {
        let restart = self.scene.restart.borrow();
        let restart = restart.as_ref().expect("it has begun");
        let handle = PacketTransport::handle(cx.transport);
        self.ticket = Some(restart.movable::<UnixSeqpacketPort, Self>(handle));
    }

    fn packet_received(
        &mut self,
        cx: &mut Context<'_, UnixSeqpacketPort>,
        packet: &mut Packet<'_>,
    ) {
        self.count += 1;
        self.held.extend(packet.descriptors.by_ref());
        let transport: &mut dyn PacketTransport = cx.transport.as_dyn();
        if packet.data == b"many" {
            for number in 0..200_u32 {
                let mut data = number.to_ne_bytes().to_vec();
                data.resize(4_000, 0);
                let descriptors = (0..number % 3).map(|_| file().into()).collect();
                let sent = transport.send_with_descriptors(&data, descriptors);
                assert!(sent.expect("there is room").is_taken());
            }
            return;
        }
        let answer = format!("{} {}", self.count, self.held.len());
        transport.send(answer.as_bytes());
    }

    fn connection_reattached(&mut self, _: &mut Context<'_, UnixSeqpacketPort>) {
        self.scene.note("reattached");
    }
}

impl Movable for Counter {
    const KIND: &'static str = "counter";

    fn pack(&mut self) -> Option<Packed> {
        self.scene.packs.get().then(|| Packed {
            state: vec![self.count as u8],
            descriptors: std::mem::take(&mut self.held),
            ..Packed::default()
        })
    }

    fn unpack(&mut self, packed: Packed) {
        self.held = packed.descriptors;
    }
}

/// A client, in the hands of the test.
struct Client(OwnedFd);

impl Client {
    fn new(path: &Path) -> Self {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let kind = SocketType::SEQPACKET;
        let fd = rustix::net::socket_with(AddressFamily::UNIX, kind, flags, None).expect("socket");
        let address = SocketAddrUnix::new(path).expect("a short path");
        rustix::net::connect(&fd, &address).expect("it listens");
        Self(fd)
    }

    fn send(&self, data: &[u8], descriptors: usize) {
        let files: Vec<_> = (0..descriptors).map(|_| file()).collect();
        let borrowed: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if descriptors > 0 {
            let message = rustix::net::SendAncillaryMessage::ScmRights(&borrowed);
            assert!(control.push(message));
        }
        let data = [IoSlice::new(data)];
        rustix::net::sendmsg(&self.0, &data, &mut control, SendFlags::empty()).expect("sent");
    }

    /// The next packet, with how many descriptors came with it.
    fn receive(&self) -> Option<(Vec<u8>, usize)> {
        let mut data = vec![0; 10_000];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [io::IoSliceMut::new(&mut data)];
        let flags = RecvFlags::CMSG_CLOEXEC;
        let received = rustix::net::recvmsg(&self.0, &mut parts, &mut control, flags).ok()?;
        let count = control.drain().map(|message| match message {
            RecvAncillaryMessage::ScmRights(all) => all.count(),
            _ => 0,
        });
        let count = count.sum();
        data.truncate(received.bytes);
        Some((data, count))
    }

    fn ask(&self, stage: &mut Stage, data: &[u8], descriptors: usize) -> String {
        self.send(data, descriptors);
        stage.settle();
        let answer = self.receive().expect("an answer");
        String::from_utf8(answer.0).expect("a text")
    }
}

fn begin(stage: &mut Stage) -> Rc<Scene> {
    let scene = Rc::new(Scene::default());
    scene.packs.set(true);
    let program = Play(Rc::clone(&scene), stage.path("packets"));
    let settings = stage.settings();
    Restart::begin(&mut stage.reactor, settings, program).expect("ours");
    stage.settle();
    scene
}

#[test]
fn a_listener_and_its_connections_of_packets_move_to_a_successor() {
    let mut stage = Stage::new();
    let old = begin(&mut stage);
    assert_eq!(old.events(), ["serves"]);
    let path = stage.path("packets");
    let (one, other) = (Client::new(&path), Client::new(&path));
    assert_eq!(one.ask(&mut stage, b"", 0), "1 0");
    assert_eq!(one.ask(&mut stage, b"keep", 2), "2 2");
    assert_eq!(other.ask(&mut stage, b"x", 0), "1 0");
    // More than the kernel takes: the rest of it moves, with its descriptors.
    other.send(b"many", 0);
    stage.settle();
    let new = begin(&mut stage);
    for _ in 0..20 {
        stage.settle();
    }
    assert_eq!(new.events(), ["took over 2"]);
    assert_eq!(one.ask(&mut stage, b"", 1), "3 3");
    for number in 0..200_u32 {
        stage.settle();
        let (data, count) = other.receive().expect("each of them");
        assert_eq!(data.len(), 4_000);
        assert_eq!(data[..4], number.to_ne_bytes());
        assert_eq!(count, (number % 3) as usize);
    }
    assert_eq!(other.ask(&mut stage, b"x", 0), "3 0");
    // The path is the successor's.
    let late = Client::new(&path);
    assert_eq!(late.ask(&mut stage, b"x", 0), "1 0");
    assert!(path.exists());
}

#[test]
fn a_connection_that_is_refused_or_does_not_want_to_move_goes_on_here() {
    for refuses in [true, false] {
        let mut stage = Stage::new();
        let old = begin(&mut stage);
        let path = stage.path("packets");
        let client = Client::new(&path);
        assert_eq!(client.ask(&mut stage, b"keep", 1), "1 1");
        old.packs.set(refuses);
        let new = Rc::new(Scene::default());
        new.refuses.set(refuses);
        let program = Play(Rc::clone(&new), path.clone());
        let settings = stage.settings();
        Restart::begin(&mut stage.reactor, settings, program).expect("ours");
        for _ in 0..20 {
            stage.settle();
        }
        assert_eq!(new.events(), ["took over 0"]);
        assert_eq!(client.ask(&mut stage, b"", 0), "2 1");
        let back = old.events().iter().filter(|it| *it == "reattached").count();
        assert_eq!(back, 1, "its handle is another one");
        let late = Client::new(&path);
        assert_eq!(late.ask(&mut stage, b"x", 0), "1 0");
    }
}
