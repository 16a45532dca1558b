//! A protocol that notes what it is told, and connections of each origin with a plain
//! socket at the other end.

use std::cell::{Cell, RefCell};
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::rc::Rc;

use bowline::{
    Address, AfterReadClosed, AtDrain, BuildContext, CloseReason, ConnectError, Context,
    Credentials, Factory, Packet, PacketHandle, PacketProtocol, PacketTransport, Reactor,
    Transports, UnixSeqpacket, UnsentPacket,
};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};
use tempfile::TempDir;

use crate::support::{DescriptorLedger, run_until};

/// What one protocol was told.
#[derive(Debug, Default)]
pub(crate) struct Told {
    pub(crate) handle: Option<PacketHandle>,
    pub(crate) received: Vec<Received>,
    pub(crate) failed: Vec<(Vec<u8>, io::Error, usize)>,
    pub(crate) resumed: usize,
    pub(crate) lost: Vec<String>,
    /// Its callbacks but for packets, in order.
    pub(crate) calls: Vec<&'static str>,
}

#[derive(Debug)]
pub(crate) struct Received {
    pub(crate) data: Vec<u8>,
    pub(crate) length: usize,
    pub(crate) descriptors: Vec<OwnedFd>,
    pub(crate) lost_descriptors: bool,
    pub(crate) credentials: Option<Credentials>,
    pub(crate) pidfd: Option<OwnedFd>,
}

/// The notes of a protocol, which outlive it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Notes(Rc<RefCell<Told>>);

impl Notes {
    pub(crate) fn told<R>(&self, look: impl FnOnce(&Told) -> R) -> R {
        look(&self.0.borrow())
    }

    pub(crate) fn change<R>(&self, change: impl FnOnce(&mut Told) -> R) -> R {
        change(&mut self.0.borrow_mut())
    }

    /// The bytes of all packets.
    pub(crate) fn data(&self) -> Vec<Vec<u8>> {
        self.told(|told| told.received.iter().map(|it| it.data.clone()).collect())
    }

    pub(crate) fn count(&self) -> usize {
        self.told(|told| told.received.len())
    }

    pub(crate) fn is_lost(&self) -> bool {
        self.told(|told| !told.lost.is_empty())
    }

    pub(crate) fn calls(&self) -> Vec<&'static str> {
        self.told(|told| told.calls.clone())
    }

    pub(crate) fn lost(&self) -> Vec<String> {
        self.told(|told| told.lost.clone())
    }

    #[track_caller]
    pub(crate) fn handle(&self) -> PacketHandle {
        self.told(|told| told.handle.expect("the connection was made"))
    }

    fn call(&self, name: &'static str) {
        self.change(|told| told.calls.push(name));
    }
}

type OnPacket = Box<dyn FnMut(&mut dyn PacketTransport, &mut Reactor, &mut Packet<'_>)>;
type OnCall = Box<dyn FnMut(&mut dyn PacketTransport, &mut Reactor)>;

/// Notes what it is told, and does what a test wants in its callbacks.
pub(crate) struct Script {
    notes: Notes,
    on_packet: Option<OnPacket>,
    on_made: Option<OnCall>,
    on_room: Option<OnCall>,
    on_end: Option<OnCall>,
    on_broken: Option<OnCall>,
    after_end: AfterReadClosed,
    leaves_descriptors: bool,
    pub(crate) is_busy: Rc<Cell<bool>>,
    at_drain: AtDrain,
}

impl Script {
    pub(crate) fn new() -> Self {
        Self {
            notes: Notes::default(),
            on_packet: None,
            on_made: None,
            on_room: None,
            on_end: None,
            on_broken: None,
            after_end: AfterReadClosed::EndConnection,
            leaves_descriptors: false,
            is_busy: Rc::default(),
            at_drain: AtDrain::LoseWhenIdle,
        }
    }

    /// Answers each packet with itself.
    pub(crate) fn echo() -> Self {
        Self::new().on_packet(|transport, _, packet| {
            transport.send(packet.data);
        })
    }

    pub(crate) fn notes(&self) -> Notes {
        self.notes.clone()
    }

    pub(crate) fn on_packet(
        mut self,
        call: impl FnMut(&mut dyn PacketTransport, &mut Reactor, &mut Packet<'_>) + 'static,
    ) -> Self {
        self.on_packet = Some(Box::new(call));
        self
    }

    pub(crate) fn on_made(
        mut self,
        call: impl FnMut(&mut dyn PacketTransport, &mut Reactor) + 'static,
    ) -> Self {
        self.on_made = Some(Box::new(call));
        self
    }

    pub(crate) fn on_room(
        mut self,
        call: impl FnMut(&mut dyn PacketTransport, &mut Reactor) + 'static,
    ) -> Self {
        self.on_room = Some(Box::new(call));
        self
    }

    /// The end of what the peer sends, and what follows.
    pub(crate) fn on_end(
        mut self,
        after: AfterReadClosed,
        call: impl FnMut(&mut dyn PacketTransport, &mut Reactor) + 'static,
    ) -> Self {
        self.after_end = after;
        self.on_end = Some(Box::new(call));
        self
    }

    pub(crate) fn on_broken(
        mut self,
        call: impl FnMut(&mut dyn PacketTransport, &mut Reactor) + 'static,
    ) -> Self {
        self.on_broken = Some(Box::new(call));
        self
    }

    pub(crate) fn leave_descriptors(mut self) -> Self {
        self.leaves_descriptors = true;
        self
    }

    pub(crate) fn at_drain(mut self, answer: AtDrain) -> Self {
        self.at_drain = answer;
        self
    }
}

impl<T: PacketTransport> PacketProtocol<T> for Script {
    fn connection_made(&mut self, cx: &mut Context<'_, T>) {
        self.notes.call("made");
        self.notes
            .change(|told| told.handle = Some(cx.transport.handle()));
        if let Some(call) = &mut self.on_made {
            call(cx.transport.as_dyn(), cx.reactor);
        }
    }

    fn packet_received(&mut self, cx: &mut Context<'_, T>, packet: &mut Packet<'_>) {
        let descriptors = match self.leaves_descriptors {
            true => Vec::new(),
            false => packet.descriptors.by_ref().collect(),
        };
        let received = Received {
            data: packet.data.to_vec(),
            length: packet.length,
            descriptors,
            lost_descriptors: packet.lost_descriptors,
            credentials: packet.credentials,
            pidfd: packet.pidfd.take(),
        };
        assert_eq!(packet.is_truncated(), received.length > received.data.len());
        self.notes.change(|told| told.received.push(received));
        if let Some(call) = &mut self.on_packet {
            call(cx.transport.as_dyn(), cx.reactor, packet);
        }
    }

    fn send_failed(&mut self, _: &mut Context<'_, T>, packet: UnsentPacket<'_>, error: &io::Error) {
        self.notes.call("failed");
        let error = match error.raw_os_error() {
            Some(number) => io::Error::from_raw_os_error(number),
            None => error.kind().into(),
        };
        let failed = (packet.data.to_vec(), error, packet.descriptors.len());
        self.notes.change(|told| told.failed.push(failed));
    }

    fn sending_resumed(&mut self, cx: &mut Context<'_, T>) {
        self.notes.change(|told| told.resumed += 1);
        if let Some(call) = &mut self.on_room {
            call(cx.transport.as_dyn(), cx.reactor);
        }
    }

    fn read_connection_lost(&mut self, cx: &mut Context<'_, T>) -> AfterReadClosed {
        self.notes.call("read lost");
        if let Some(call) = &mut self.on_end {
            call(cx.transport.as_dyn(), cx.reactor);
        }
        self.after_end
    }

    fn write_connection_lost(&mut self, _: &mut Context<'_, T>) {
        self.notes.call("write lost");
    }

    fn connection_broken(&mut self, cx: &mut Context<'_, T>) {
        self.notes.call("broken");
        if let Some(call) = &mut self.on_broken {
            call(cx.transport.as_dyn(), cx.reactor);
        }
    }

    fn connection_lost(&mut self, cx: &mut Context<'_, T>, reason: &CloseReason) {
        self.notes.call("lost");
        assert!(cx.transport.socket_descriptor().is_none());
        self.notes.change(|told| told.lost.push(reason.to_string()));
    }

    fn draining(&mut self, _: &mut Context<'_, T>) -> AtDrain {
        self.notes.call("draining");
        self.at_drain
    }

    fn is_idle(&self) -> bool {
        !self.is_busy.get()
    }

    fn connection_reattached(&mut self, cx: &mut Context<'_, T>) {
        self.notes.call("reattached");
        self.notes
            .change(|told| told.handle = Some(cx.transport.handle()));
    }
}

/// Builds the protocols that it is given, and notes what becomes of listener or connector.
#[derive(Default)]
pub(crate) struct Scripts {
    pub(crate) waiting: Vec<Script>,
    pub(crate) calls: Rc<RefCell<Vec<String>>>,
    /// After a failure or an end, how often it connects again.
    pub(crate) again: usize,
}

impl Scripts {
    pub(crate) fn of(script: Script) -> Self {
        Self {
            waiting: vec![script],
            ..Self::default()
        }
    }

    fn note(&self, call: impl Into<String>) {
        self.calls.borrow_mut().push(call.into());
    }

    fn connect_again(&mut self, cx: &mut BuildContext<'_>) {
        if self.again > 0
            && let Some(connector) = cx.connector()
        {
            self.again -= 1;
            connector.connect();
        }
    }
}

impl Factory for Scripts {
    type Protocol = Script;

    fn build_protocol(&mut self, _: &mut BuildContext<'_>, _: &Address) -> Option<Script> {
        let script = (!self.waiting.is_empty()).then(|| self.waiting.remove(0));
        self.note(if script.is_some() {
            "built"
        } else {
            "declined"
        });
        script
    }

    fn started(&mut self, _: &mut BuildContext<'_>) {
        self.note("started");
    }

    fn stopped(&mut self, _: &mut BuildContext<'_>) {
        self.note("stopped");
    }

    fn connection_failed(&mut self, cx: &mut BuildContext<'_>, error: &ConnectError) {
        self.note(format!("failed: {error}"));
        self.connect_again(cx);
    }

    fn connection_lost(&mut self, cx: &mut BuildContext<'_>, reason: &CloseReason) {
        self.note(format!("lost: {reason}"));
        self.connect_again(cx);
    }
}

/// A plain socket, under the control of a test.
#[derive(Debug)]
pub(crate) struct Plain(pub(crate) OwnedFd);

/// What a plain socket has received: a packet, or the end.
pub(crate) type PlainPacket = (Vec<u8>, Vec<OwnedFd>);

fn packet_socket() -> OwnedFd {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap()
}

impl Plain {
    pub(crate) fn pair() -> (Self, OwnedFd) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let kind = SocketType::SEQPACKET;
        let (one, other) = rustix::net::socketpair(AddressFamily::UNIX, kind, flags, None).unwrap();
        (Self(one), other)
    }

    pub(crate) fn listening(path: &std::path::Path) -> Self {
        let fd = packet_socket();
        rustix::net::bind(&fd, &SocketAddrUnix::new(path).unwrap()).unwrap();
        rustix::net::listen(&fd, 4).unwrap();
        Self(fd)
    }

    pub(crate) fn connected(path: &std::path::Path) -> io::Result<Self> {
        let fd = packet_socket();
        rustix::net::connect(&fd, &SocketAddrUnix::new(path)?)?;
        Ok(Self(fd))
    }

    pub(crate) fn accept(&self) -> Option<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        rustix::net::accept_with(&self.0, flags).ok().map(Self)
    }

    #[track_caller]
    pub(crate) fn send(&self, data: &[u8]) {
        self.try_send(data, &[]).unwrap();
    }

    pub(crate) fn try_send(&self, data: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(descriptors)));
        }
        let data = [IoSlice::new(data)];
        rustix::net::sendmsg(&self.0, &data, &mut control, SendFlags::NOSIGNAL)?;
        Ok(())
    }

    /// The next packet, or the end, which is one of no bytes too.
    pub(crate) fn receive(&self) -> io::Result<PlainPacket> {
        let mut data = vec![0; 300_000];
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(&mut data)];
        let flags = RecvFlags::CMSG_CLOEXEC;
        let received = rustix::net::recvmsg(&self.0, &mut parts, &mut control, flags)?;
        let mut descriptors = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                descriptors.extend(rights);
            }
        }
        data.truncate(received.bytes);
        Ok((data, descriptors))
    }

    /// All packets that are there, up to the end.
    pub(crate) fn receive_all(&self) -> Vec<Vec<u8>> {
        let next = || self.receive().ok().filter(|it| !it.0.is_empty());
        std::iter::from_fn(next).map(|it| it.0).collect()
    }

    /// Whether the end is what comes next.
    pub(crate) fn is_at_end(&self) -> bool {
        self.receive()
            .is_ok_and(|it| it.0.is_empty() && it.1.is_empty())
    }

    pub(crate) fn shutdown_write(&self) {
        rustix::net::shutdown(&self.0, rustix::net::Shutdown::Write).unwrap();
    }
}

impl AsFd for Plain {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// How a connection of ours came about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    Adopted,
    Accepted,
    Connected,
}

pub(crate) const ORIGINS: [Origin; 3] = [Origin::Adopted, Origin::Accepted, Origin::Connected];

/// Where sockets are.
pub(crate) struct Place {
    pub(crate) origin: Origin,
    directory: TempDir,
    used: Cell<usize>,
    /// Last: what a test makes is gone before it.
    _ledger: Option<DescriptorLedger>,
}

impl Origin {
    /// For one test, which leaves as many descriptors open as there were before.
    pub(crate) fn place(self) -> Place {
        let ledger = DescriptorLedger::open();
        Place {
            origin: self,
            directory: tempfile::tempdir().unwrap(),
            used: Cell::new(0),
            _ledger: Some(ledger),
        }
    }
}

impl Place {
    /// A path where nothing is.
    pub(crate) fn path(&self) -> PathBuf {
        self.used.set(self.used.get() + 1);
        self.directory.path().join(self.used.get().to_string())
    }

    /// A connection with a protocol, and the plain socket at its other end. It is made when
    /// this returns.
    pub(crate) fn connection(&self, reactor: &mut Reactor, script: Script) -> (Plain, Notes) {
        self.connection_with(reactor, script, |endpoint| endpoint, |endpoint| endpoint)
    }

    /// The same, with settings where there is an endpoint that has some.
    pub(crate) fn connection_with(
        &self,
        reactor: &mut Reactor,
        script: Script,
        listen: impl FnOnce(
            bowline::endpoint::UnixSeqpacketListen,
        ) -> bowline::endpoint::UnixSeqpacketListen,
        connect: impl FnOnce(
            bowline::endpoint::UnixSeqpacketConnect,
        ) -> bowline::endpoint::UnixSeqpacketConnect,
    ) -> (Plain, Notes) {
        let notes = script.notes();
        let peer = match self.origin {
            Origin::Adopted => {
                let (peer, fd) = Plain::pair();
                reactor.adopt(UnixSeqpacket, fd, script).unwrap();
                peer
            }
            Origin::Accepted => {
                let path = self.path();
                let here = listen(UnixSeqpacket::at(path.clone()));
                let listener = reactor.listen(here, Scripts::of(script)).unwrap();
                let peer = Plain::connected(&path).unwrap();
                run_until(reactor, |_| !notes.calls().is_empty());
                reactor.get(listener).unwrap().stop_listening();
                peer
            }
            Origin::Connected => {
                let path = self.path();
                let listener = Plain::listening(&path);
                let there = connect(UnixSeqpacket::to(path));
                reactor.connect(there, Scripts::of(script)).unwrap();
                let mut peer = None;
                run_until(reactor, |_| {
                    peer = peer.take().or_else(|| listener.accept());
                    peer.is_some()
                });
                peer.unwrap()
            }
        };
        run_until(reactor, |_| !notes.calls().is_empty());
        (peer, notes)
    }
}

/// Calls a test for connections of each origin.
pub(crate) fn over_all(test: impl Fn(&Place)) {
    for origin in ORIGINS {
        test(&origin.place());
    }
}

/// The transport of a connection.
#[track_caller]
pub(crate) fn get(reactor: &mut Reactor, handle: PacketHandle) -> &mut dyn PacketTransport {
    reactor.get(handle).expect("the connection is open")
}

/// The ends of a pipe, the one for reading first.
pub(crate) fn pipe() -> (OwnedFd, OwnedFd) {
    rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap()
}

/// Whether nobody has the other end of a pipe any more.
pub(crate) fn is_closed(reading: &OwnedFd) -> bool {
    let mut watched = [rustix::event::PollFd::new(
        reading,
        rustix::event::PollFlags::IN,
    )];
    rustix::event::poll(&mut watched, Some(&rustix::event::Timespec::default())).unwrap();
    watched[0].revents().contains(rustix::event::PollFlags::HUP)
}
