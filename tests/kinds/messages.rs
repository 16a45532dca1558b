//! Messages: each method of their transports, each callback of their protocols.

use std::any::{Any, TypeId};
use std::borrow::Cow;
use std::cell::{Cell as StdCell, RefCell};
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixDatagram as StdUnixDatagram;
use std::rc::Rc;
use std::time::Duration;

use bowline::descriptor::Description;
use bowline::error::DetachError;
use bowline::{
    Address, AfterReadClosed, AtDrain, CloseReason, Context, Datagram, DatagramHandle,
    DatagramProtocol, DatagramTransport, Detached, GracefulStop, Linger, MulticastInterface,
    Packet, PacketHandle, PacketProtocol, PacketTransport, Part, QueueLimits, Reactor, SendStatus,
    TransportState, Transports, Udp, UdpHandle, UdpPort, UdpTransport, UnixAddress, UnixDatagram,
    UnixDatagramHandle, UnixDatagramPort, UnixDatagramTransport, UnixSeqpacket, UnixSeqpacketPort,
    UnsentDatagram, UnsentPacket, WriteObserver,
};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, Shutdown, SocketFlags, SocketType, sockopt,
};
use tempfile::TempDir;

use crate::support::DescriptorLedger;
use crate::{Cell, Table, assert_right, has, methods_of, until};

const DATAGRAM: &str = "protocol/src/datagram.rs";
const CONNECTION: &str = "protocol/src/connection.rs";
const PACKET: &str = "protocol/src/packet.rs";
const METHODS: &str = "What can be asked of a socket of messages";
const CALLBACKS: &str = "What the protocol of messages is told";
/// A group that nobody else uses.
const GROUP: Ipv4Addr = Ipv4Addr::new(239, 255, 71, 14);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Udp,
    UdpTo,
    Unix,
    UnixTo,
    Packets,
}

/// The columns of both tables.
const KINDS: [(&str, Kind); 5] = [
    ("`Udp::at`", Kind::Udp),
    ("`Udp::to`", Kind::UdpTo),
    ("`UnixDatagram::at`", Kind::Unix),
    ("`UnixDatagram::to`", Kind::UnixTo),
    ("`UnixSeqpacket`", Kind::Packets),
];

impl Kind {
    fn is_udp(self) -> bool {
        matches!(self, Self::Udp | Self::UdpTo)
    }

    fn is_connected(self) -> bool {
        matches!(self, Self::UdpTo | Self::UnixTo | Self::Packets)
    }

    /// Which of the traits its transport has: of datagrams, of UDP, of UNIX datagrams,
    /// of packets.
    fn traits(self) -> [bool; 4] {
        macro_rules! of {
            ($port:ty) => {
                [
                    has!($port: DatagramTransport) && !has!($port: PacketTransport),
                    has!($port: UdpTransport),
                    has!($port: UnixDatagramTransport),
                    has!($port: PacketTransport),
                ]
            };
        }
        match self {
            Self::Udp | Self::UdpTo => of!(UdpPort),
            Self::Unix | Self::UnixTo => of!(UnixDatagramPort),
            Self::Packets => of!(UnixSeqpacketPort),
        }
    }
}

/// What the protocol was told.
#[derive(Default)]
struct Notes {
    calls: RefCell<Vec<&'static str>>,
    data: RefCell<Vec<u8>>,
    received: RefCell<Vec<OwnedFd>>,
    datagrams: StdCell<Option<DatagramHandle>>,
    packets: StdCell<Option<PacketHandle>>,
    reason: RefCell<String>,
}

/// Notes its callbacks, and begins paused.
struct Probe(Rc<Notes>);

impl Probe {
    fn note(&self, call: &'static str) {
        self.0.calls.borrow_mut().push(call);
    }

    fn end(&self, call: &'static str, reason: &CloseReason) {
        self.note(call);
        *self.0.reason.borrow_mut() = reason.to_string();
    }
}

impl<T: DatagramTransport> DatagramProtocol<T> for Probe {
    fn started(&mut self, cx: &mut Context<'_, T>) {
        self.note("started");
        self.0.datagrams.set(Some(cx.transport.handle()));
        cx.transport.pause_producing();
    }

    fn datagram_received(&mut self, _: &mut Context<'_, T>, datagram: &mut Datagram<'_>) {
        self.note("datagram_received");
        self.0.data.borrow_mut().extend_from_slice(datagram.data);
        self.0
            .received
            .borrow_mut()
            .extend(&mut datagram.descriptors);
    }

    fn connection_refused(&mut self, _: &mut Context<'_, T>, _: &io::Error) {
        self.note("connection_refused");
    }

    fn send_failed(&mut self, _: &mut Context<'_, T>, _: UnsentDatagram<'_>, _: &io::Error) {
        self.note("send_failed");
    }

    fn sending_resumed(&mut self, _: &mut Context<'_, T>) {
        self.note("sending_resumed");
    }

    fn draining(&mut self, _: &mut Context<'_, T>) -> AtDrain {
        self.note("draining");
        AtDrain::LoseWhenIdle
    }

    fn is_idle(&self) -> bool {
        self.note("is_idle");
        true
    }

    fn stopped(&mut self, _: &mut Context<'_, T>, reason: &CloseReason) {
        self.end("stopped", reason);
    }

    fn part(&mut self, id: TypeId) -> Option<&mut dyn Any> {
        self.note("part");
        let this = self.as_any_mut();
        ((*this).type_id() == id).then_some(this)
    }

    fn describe(&self, description: &mut Description) {
        self.note("describe");
        description.section("Probe");
    }

    fn log_prefix(&self) -> Cow<'_, str> {
        self.note("log_prefix");
        "Probe".into()
    }
}

impl<T: PacketTransport> PacketProtocol<T> for Probe {
    fn connection_made(&mut self, cx: &mut Context<'_, T>) {
        self.note("connection_made");
        self.0.packets.set(Some(cx.transport.handle()));
        cx.transport.pause_producing();
    }

    fn packet_received(&mut self, _: &mut Context<'_, T>, packet: &mut Packet<'_>) {
        self.note("packet_received");
        self.0.data.borrow_mut().extend_from_slice(packet.data);
        self.0.received.borrow_mut().extend(&mut packet.descriptors);
    }

    fn send_failed(&mut self, _: &mut Context<'_, T>, _: UnsentPacket<'_>, _: &io::Error) {
        self.note("send_failed");
    }

    fn sending_resumed(&mut self, _: &mut Context<'_, T>) {
        self.note("sending_resumed");
    }

    fn read_connection_lost(&mut self, _: &mut Context<'_, T>) -> AfterReadClosed {
        self.note("read_connection_lost");
        AfterReadClosed::KeepWriting
    }

    fn write_connection_lost(&mut self, _: &mut Context<'_, T>) {
        self.note("write_connection_lost");
    }

    fn connection_broken(&mut self, _: &mut Context<'_, T>) {
        self.note("connection_broken");
    }

    fn connection_lost(&mut self, _: &mut Context<'_, T>, reason: &CloseReason) {
        self.end("connection_lost", reason);
    }

    fn draining(&mut self, _: &mut Context<'_, T>) -> AtDrain {
        self.note("draining");
        AtDrain::LoseWhenIdle
    }

    fn is_idle(&self) -> bool {
        self.note("is_idle");
        true
    }

    fn part(&mut self, id: TypeId) -> Option<&mut dyn Any> {
        self.note("part");
        let this = self.as_any_mut();
        ((*this).type_id() == id).then_some(this)
    }

    fn into_part(self: Box<Self>, id: TypeId) -> Option<Box<dyn Any>> {
        self.note("into_part");
        let this = self.into_any();
        ((*this).type_id() == id).then_some(this)
    }

    fn connection_reattached(&mut self, _: &mut Context<'_, T>) {
        self.note("connection_reattached");
    }

    fn describe(&self, description: &mut Description) {
        self.note("describe");
        description.section("Probe");
    }

    fn log_prefix(&self) -> Cow<'_, str> {
        self.note("log_prefix");
        "Probe".into()
    }
}

/// The other side: a plain socket.
enum Peer {
    Udp(UdpSocket),
    Unix(StdUnixDatagram),
    Packets(OwnedFd),
    Gone,
}

impl Peer {
    fn fd(&self) -> std::os::fd::BorrowedFd<'_> {
        match self {
            Self::Udp(socket) => socket.as_fd(),
            Self::Unix(socket) => socket.as_fd(),
            Self::Packets(socket) => socket.as_fd(),
            Self::Gone => unreachable!("nobody asks any more"),
        }
    }

    fn address(&self) -> Address {
        match self {
            Self::Udp(socket) => socket.local_addr().unwrap().into(),
            Self::Unix(socket) => {
                let path = socket.local_addr().unwrap();
                let path = path.as_pathname().unwrap().to_owned();
                UnixAddress::Path(path).into()
            }
            Self::Packets(_) | Self::Gone => unreachable!("it has none"),
        }
    }

    /// The next message, and its descriptors.
    fn receive(&self) -> Option<(Vec<u8>, usize)> {
        let mut data = [0; 65_536];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(&mut data)];
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        let received = rustix::net::recvmsg(self.fd(), &mut parts, &mut control, flags).ok()?;
        let rights = control.drain().map(|message| match message {
            RecvAncillaryMessage::ScmRights(rights) => rights.count(),
            _ => 0,
        });
        let rights = rights.sum();
        Some((data[..received.bytes].to_vec(), rights))
    }
}

struct Rig {
    kind: Kind,
    expected: Cell,
    reactor: Reactor,
    notes: Rc<Notes>,
    peer: Peer,
    ours: Address,
    udp: Option<UdpHandle>,
    unix: Option<UnixDatagramHandle>,
    directory: TempDir,
}

impl Rig {
    fn new(kind: Kind, expected: Cell) -> Self {
        let mut reactor = Reactor::new().unwrap();
        reactor.start().unwrap();
        let notes = Rc::new(Notes::default());
        let probe = Probe(Rc::clone(&notes));
        let directory = tempfile::tempdir().unwrap();
        let (our_path, path) = (
            directory.path().join("ours"),
            directory.path().join("theirs"),
        );
        let (mut udp, mut unix) = (None, None);
        let ours: Address;
        let peer = match kind {
            Kind::Udp | Kind::UdpTo => {
                let peer = UdpSocket::bind("127.0.0.1:0").unwrap();
                let anywhere = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
                let handle = match kind {
                    Kind::Udp => reactor.listen(Udp::at(anywhere), probe).unwrap(),
                    _ => {
                        let to = Udp::to(peer.local_addr().unwrap());
                        reactor.connect(to, probe).unwrap()
                    }
                };
                let port = reactor
                    .get(handle)
                    .unwrap()
                    .host()
                    .as_inet()
                    .unwrap()
                    .port();
                ours = SocketAddr::from((Ipv4Addr::LOCALHOST, port)).into();
                udp = Some(handle);
                Peer::Udp(peer)
            }
            Kind::Unix | Kind::UnixTo => {
                let peer = StdUnixDatagram::bind(&path).unwrap();
                let handle = match kind {
                    Kind::Unix => reactor.listen(UnixDatagram::at(our_path.clone()), probe),
                    _ => {
                        let to = UnixDatagram::to(path).bind_address(our_path.clone());
                        reactor.connect(to, probe)
                    }
                };
                ours = UnixAddress::Path(our_path).into();
                unix = Some(handle.unwrap());
                Peer::Unix(peer)
            }
            Kind::Packets => {
                let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
                let kind = SocketType::SEQPACKET;
                let pair = rustix::net::socketpair(AddressFamily::UNIX, kind, flags, None);
                let (one, other) = pair.unwrap();
                reactor.adopt(UnixSeqpacket, one, probe).unwrap();
                ours = UnixAddress::Unnamed.into();
                Peer::Packets(other)
            }
        };
        assert!(until(&mut reactor, Cell::Yes, |_| !notes
            .calls
            .borrow()
            .is_empty()
            && (notes.datagrams.get().is_some()
                || notes.packets.get().is_some())));
        Self {
            kind,
            expected,
            reactor,
            notes,
            peer,
            ours,
            udp,
            unix,
            directory,
        }
    }

    fn datagrams(&mut self) -> &mut dyn DatagramTransport {
        let handle = self.notes.datagrams.get().expect("it has datagrams");
        self.reactor.get(handle).expect("it is there")
    }

    fn packets(&mut self) -> &mut dyn PacketTransport {
        let handle = self.notes.packets.get().expect("it has packets");
        self.reactor.get(handle).expect("it is there")
    }

    fn udp(&mut self) -> &mut dyn UdpTransport {
        let handle = self.udp.expect("it is of UDP");
        self.reactor.get(handle).expect("it is there")
    }

    fn unix(&mut self) -> &mut dyn UnixDatagramTransport {
        let handle = self.unix.expect("it is of UNIX");
        self.reactor.get(handle).expect("it is there")
    }

    /// Sends to the peer, by an address if it has to.
    fn post(&mut self, data: &[u8]) -> SendStatus {
        match self.kind {
            Kind::Packets => self.packets().send(data),
            Kind::Udp | Kind::Unix => {
                let to = self.peer.address();
                self.datagrams().send_to(data, to.as_ref())
            }
            Kind::UdpTo | Kind::UnixTo => self.datagrams().send(data),
        }
    }

    fn resume(&mut self) {
        match self.kind {
            Kind::Packets => self.packets().resume_producing(),
            _ => self.datagrams().resume_producing(),
        }
    }

    fn set_limits(&mut self, limits: QueueLimits) {
        match self.kind {
            Kind::Packets => self.packets().set_queue_limits(limits),
            _ => self.datagrams().set_queue_limits(limits),
        }
    }

    fn socket(&mut self) -> OwnedFd {
        match self.kind {
            Kind::Packets => self.packets().duplicate().unwrap(),
            _ => self.datagrams().duplicate().unwrap(),
        }
    }

    /// The peer sends to us, with a descriptor or without.
    fn send(&self, data: &[u8], fd: Option<&dyn AsFd>) -> io::Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds: Vec<_> = fd.iter().map(|fd| fd.as_fd()).collect();
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        }
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        let data = [IoSlice::new(data)];
        match (&self.ours, self.kind) {
            (Address::Inet(to), _) => {
                rustix::net::sendmsg_addr(self.peer.fd(), to, &data, &mut control, flags)?
            }
            (Address::Unix(UnixAddress::Path(path)), _) => {
                let to = rustix::net::SocketAddrUnix::new(path).unwrap();
                rustix::net::sendmsg_addr(self.peer.fd(), &to, &data, &mut control, flags)?
            }
            _ => rustix::net::sendmsg(self.peer.fd(), &data, &mut control, flags)?,
        };
        Ok(())
    }

    fn arrives(&mut self, data: &[u8]) -> bool {
        let notes = Rc::clone(&self.notes);
        until(&mut self.reactor, self.expected, |_| {
            *notes.data.borrow() == data
        })
    }

    fn stays_quiet(&mut self) -> bool {
        let notes = Rc::clone(&self.notes);
        !until(&mut self.reactor, Cell::Nothing, |_| {
            !notes.data.borrow().is_empty()
        })
    }

    /// Whether the peer receives this, with so many descriptors.
    fn leaves(&mut self, data: &[u8], descriptors: usize) -> bool {
        let peer = &self.peer;
        let mut seen = None;
        until(&mut self.reactor, self.expected, |_| {
            seen = seen.take().or_else(|| peer.receive());
            seen.is_some()
        }) && seen == Some((data.to_vec(), descriptors))
    }

    fn sent(&mut self, status: SendStatus) -> Cell {
        match status {
            SendStatus::Refused(_) => Cell::Refused,
            _ => Cell::yes_if(self.leaves(b"hello", 0)),
        }
    }

    fn is_called(&mut self, call: &str) -> Cell {
        let notes = Rc::clone(&self.notes);
        Cell::called_if(until(&mut self.reactor, self.expected, |_| {
            notes.calls.borrow().contains(&call)
        }))
    }

    fn is_over(&mut self) -> bool {
        let call = match self.kind {
            Kind::Packets => "connection_lost",
            _ => "stopped",
        };
        self.is_called(call) == Cell::Yes
    }

    fn reason(&self) -> String {
        self.notes.reason.borrow().clone()
    }

    /// Sends until some wait, if they ever do.
    fn fill(&mut self) -> bool {
        let count = |rig: &mut Self| match rig.kind {
            Kind::Packets => rig.packets().unsent_packets(),
            _ => rig.datagrams().unsent_datagrams(),
        };
        for _ in 0..1_024 {
            self.post(&[7; 1_000]);
            self.reactor.turn(Some(Duration::ZERO));
            if count(self) > 8 {
                return true;
            }
        }
        false
    }

    fn reattach(&mut self) {
        let handle = self.notes.packets.get().unwrap();
        let again = |reactor: &mut Reactor, detached: Result<Detached<Probe>, DetachError>| {
            let detached = detached.expect("it can be detached");
            assert!(reactor.reattach::<UnixSeqpacketPort, _>(detached).is_ok());
        };
        self.reactor.detach(handle, again);
    }
}

/// What both traits of transports have, by the same names.
macro_rules! of_both {
    ($rig:ident, $row:ident, $get:ident) => {
        Some(match $row {
            "send" => {
                let status = $rig.$get().send(b"hello");
                $rig.sent(status)
            }
            "unsent_bytes" => {
                $rig.post(b"hello");
                Cell::yes_if($rig.$get().unsent_bytes() == 5)
            }
            "is_send_buffer_full" => {
                $rig.set_limits(QueueLimits::default().full(1));
                $rig.post(b"hello");
                Cell::yes_if($rig.$get().is_send_buffer_full())
            }
            "queue_limits" => Cell::yes_if($rig.$get().queue_limits() == QueueLimits::default()),
            "set_queue_limits" => {
                $rig.$get().set_queue_limits(QueueLimits::default().most(1));
                let both = ($rig.post(b"one").is_taken(), $rig.post(b"two").is_taken());
                Cell::yes_if(both == (true, false))
            }
            // It was paused at its beginning.
            "pause_producing" | "resume_producing" => {
                $rig.send(b"abc", None).unwrap();
                let is_quiet = $rig.stays_quiet();
                $rig.$get().resume_producing();
                Cell::yes_if(is_quiet && $rig.arrives(b"abc"))
            }
            "is_reading_paused" => {
                let before = $rig.$get().is_reading_paused();
                $rig.$get().resume_producing();
                Cell::yes_if(before && !$rig.$get().is_reading_paused())
            }
            "state" => Cell::yes_if($rig.$get().state() == TransportState::Connected),
            "host" => Cell::yes_if(match $rig.$get().host() {
                Address::Inet(address) => $rig.kind.is_udp() && address.port() > 0,
                Address::Unix(address) => match $rig.kind {
                    Kind::Packets => address == UnixAddress::Unnamed,
                    _ => Address::Unix(address) == $rig.ours,
                },
                _ => false,
            }),
            "counts" => {
                $rig.post(b"hello");
                let left = $rig.leaves(b"hello", 0);
                Cell::yes_if(left && $rig.$get().counts().sent == 1)
            }
            "duplicate" => {
                let same = $rig.$get().duplicate().unwrap();
                $rig.send(b"hello", None).unwrap();
                // It is paused, so the other descriptor has it.
                let taken = Peer::Packets(same).receive();
                Cell::yes_if(taken == Some((b"hello".to_vec(), 0)))
            }
            "socket_descriptor" => Cell::yes_if($rig.$get().socket_descriptor().is_some()),
            "handle" => {
                let handle = $rig.$get().handle();
                Cell::yes_if($rig.reactor.get(handle).is_some())
            }
            "as_dyn" => {
                let handle = $rig.$get().handle();
                Cell::yes_if($rig.$get().as_dyn().handle() == handle)
            }
            _ => return None,
        })
    };
}

#[derive(Debug)]
struct Observer(Rc<StdCell<usize>>);

impl WriteObserver for Observer {
    fn written(&self, data: &[u8]) {
        self.0.set(self.0.get() + data.len());
    }
}

fn datagram_and_common(rig: &mut Rig, row: &str) -> Option<Cell> {
    of_both!(rig, row, datagrams)
}

fn packet_and_common(rig: &mut Rig, row: &str) -> Option<Cell> {
    of_both!(rig, row, packets)
}

/// What has descriptors, in both traits by the same names.
macro_rules! with_descriptors {
    ($rig:ident, $row:ident, $get:ident, $send:expr) => {
        Some(match $row {
            "send_with_descriptors" => {
                let sent = $send($rig);
                Cell::yes_if(sent && $rig.leaves(b"f", 1))
            }
            "unsent_descriptors" => {
                let sent = $send($rig);
                Cell::yes_if(sent && $rig.$get().unsent_descriptors() == 1)
            }
            "set_received_linger" => {
                $rig.$get().set_received_linger(Linger::Keep);
                let listener = TcpListener::bind("127.0.0.1:0").unwrap();
                let socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
                let time = Some(Duration::from_secs(1));
                sockopt::set_socket_linger(&socket, time).unwrap();
                $rig.send(b"d", Some(&socket)).unwrap();
                $rig.resume();
                let arrived = $rig.arrives(b"d");
                let received = $rig.notes.received.borrow();
                let kept = received
                    .first()
                    .map(|it| sockopt::socket_linger(it).unwrap());
                sockopt::set_socket_linger(&socket, None).unwrap();
                Cell::yes_if(arrived && kept == Some(time))
            }
            "set_descriptors_accepted" => {
                $rig.$get().set_descriptors_accepted(false).unwrap();
                let file = File::open("/dev/null").unwrap();
                let refused = $rig.send(b"d", Some(&file)).unwrap_err();
                Cell::yes_if(refused.kind() == io::ErrorKind::PermissionDenied)
            }
            _ => return None,
        })
    };
}

fn file() -> OwnedFd {
    File::open("/dev/null").unwrap().into()
}

fn datagram_method(rig: &mut Rig, row: &str) -> Option<Cell> {
    Some(match row {
        "send_to" => {
            let to = rig.peer.address();
            let status = rig.datagrams().send_to(b"hello", to.as_ref());
            rig.sent(status)
        }
        "send_sequence" => {
            let to = rig.peer.address();
            let to = (!rig.kind.is_connected()).then_some(to);
            let to = to.as_ref().map(Address::as_ref);
            let status = rig.datagrams().send_sequence(&[b"he", b"", b"llo"], to);
            rig.sent(status)
        }
        "unsent_datagrams" => {
            rig.post(b"hello");
            Cell::yes_if(rig.datagrams().unsent_datagrams() == 1)
        }
        "stop_listening" => {
            rig.post(b"hello");
            rig.datagrams().stop_listening();
            let is_over = rig.is_over() && rig.reason() == "closed cleanly";
            Cell::yes_if(is_over && rig.leaves(b"hello", 0))
        }
        "stop_listening_within" => {
            let is_full = rig.fill();
            rig.datagrams()
                .stop_listening_within(Duration::from_millis(3));
            let is_over = rig.is_over();
            assert_eq!(
                is_full,
                rig.reason().contains("deadline"),
                "{}",
                rig.reason()
            );
            Cell::yes_if(is_over)
        }
        "abort" => {
            rig.datagrams().abort();
            Cell::yes_if(rig.is_over() && rig.reason() == "aborted by us")
        }
        "peer" => Cell::yes_if(rig.datagrams().peer().is_some()),
        "connect" => {
            let other = match rig.kind.is_udp() {
                true => Peer::Udp(UdpSocket::bind("127.0.0.1:0").unwrap()),
                false => {
                    let path = rig.directory.path().join("other");
                    Peer::Unix(StdUnixDatagram::bind(path).unwrap())
                }
            };
            let address = other.address();
            rig.datagrams().connect(address.as_ref()).unwrap();
            rig.peer = other;
            let status = rig.datagrams().send(b"hello");
            rig.sent(status)
        }
        "dropped_by_kernel" => {
            sockopt::set_socket_recv_buffer_size(rig.socket(), 4_096).unwrap();
            for _ in 0..64 {
                // The sender of a UNIX datagram is told that there is no room.
                let _ = rig.send(&[7; 1_000], None);
            }
            Cell::yes_if(rig.datagrams().dropped_by_kernel().unwrap() > 0)
        }
        _ => return datagram_and_common(rig, row),
    })
}

fn unix_method(rig: &mut Rig, row: &str) -> Option<Cell> {
    if row == "unix_datagram_handle" {
        return Some(Cell::yes_if(
            Some(rig.unix().unix_datagram_handle()) == rig.unix,
        ));
    }
    let send = |rig: &mut Rig| {
        let to = rig.peer.address();
        let to = (!rig.kind.is_connected()).then_some(to);
        let to = to.as_ref().map(Address::as_ref);
        rig.unix()
            .send_with_descriptors(b"f", to, vec![file().into()])
            .is_ok()
    };
    with_descriptors!(rig, row, unix, send)
}

fn packet_method(rig: &mut Rig, row: &str) -> Option<Cell> {
    Some(match row {
        "send_sequence" => {
            let status = rig.packets().send_sequence(&[b"he", b"", b"llo"]);
            rig.sent(status)
        }
        "bytes_sent" => {
            rig.post(b"hello");
            let left = rig.leaves(b"hello", 0);
            Cell::yes_if(left && rig.packets().bytes_sent() == 5)
        }
        "hold_reading" | "release_reading" => {
            rig.packets().hold_reading();
            rig.resume();
            rig.send(b"abc", None).unwrap();
            let is_quiet = rig.stays_quiet();
            rig.packets().release_reading();
            Cell::yes_if(is_quiet && rig.arrives(b"abc"))
        }
        "set_write_observer" => {
            let seen = Rc::new(StdCell::new(0));
            let observer = Rc::new(Observer(Rc::clone(&seen)));
            rig.packets().set_write_observer(Some(observer));
            rig.post(b"hello");
            Cell::yes_if(seen.get() == 5)
        }
        "connection_handle" => {
            let handle = rig.packets().connection_handle();
            Cell::yes_if(rig.reactor.get(handle).is_some())
        }
        "unsent_packets" => {
            rig.post(b"hello");
            Cell::yes_if(rig.packets().unsent_packets() == 1)
        }
        "lose_connection" => {
            rig.post(b"hello");
            rig.packets().lose_connection();
            let is_over = rig.is_over() && rig.reason() == "closed cleanly";
            Cell::yes_if(is_over && rig.leaves(b"hello", 0))
        }
        "lose_connection_within" => {
            assert!(rig.fill());
            rig.packets()
                .lose_connection_within(Duration::from_millis(3));
            Cell::yes_if(rig.is_over() && rig.reason().contains("deadline"))
        }
        "lose_write_connection" => {
            rig.post(b"hello");
            rig.packets().lose_write_connection();
            let is_sent = rig.leaves(b"hello", 0);
            // Then the end, which is a packet of no bytes.
            Cell::yes_if(is_sent && rig.leaves(b"", 0))
        }
        "abort_connection" => {
            rig.packets().abort_connection();
            Cell::yes_if(rig.is_over() && rig.reason() == "aborted by us")
        }
        "peer" => Cell::yes_if(rig.packets().peer() == UnixAddress::Unnamed.into()),
        "peer_credentials" => {
            let credentials = rig.packets().peer_credentials().unwrap();
            Cell::yes_if(credentials.pid == Some(std::process::id()))
        }
        "peer_pidfd" => Cell::yes_if(rig.packets().peer_pidfd().is_ok()),
        _ => {
            let send = |rig: &mut Rig| {
                let transport = rig.packets();
                transport
                    .send_with_descriptors(b"f", vec![file().into()])
                    .is_ok()
            };
            let with = |rig: &mut Rig| with_descriptors!(rig, row, packets, send);
            return with(rig).or_else(|| packet_and_common(rig, row));
        }
    })
}

fn udp_method(rig: &mut Rig, row: &str) -> Option<Cell> {
    let here = MulticastInterface::Address(Ipv4Addr::LOCALHOST);
    let group = IpAddr::V4(GROUP);
    Some(match row {
        "broadcast" | "set_broadcast" => {
            let before = rig.udp().broadcast().unwrap();
            rig.udp().set_broadcast(true).unwrap();
            Cell::yes_if(!before && rig.udp().broadcast().unwrap())
        }
        "join_multicast" => {
            rig.udp().join_multicast(group, here).unwrap();
            rig.resume();
            send_to_group(rig);
            Cell::yes_if(rig.arrives(b"group"))
        }
        "leave_multicast" => {
            rig.udp().join_multicast(group, here).unwrap();
            let left = rig.udp().leave_multicast(group, here).is_ok();
            rig.resume();
            send_to_group(rig);
            let is_quiet = rig.stays_quiet();
            Cell::yes_if(left && is_quiet && rig.udp().leave_multicast(group, here).is_err())
        }
        "set_multicast_interface" => {
            let other = UdpSocket::bind("0.0.0.0:0").unwrap();
            other
                .join_multicast_v4(&GROUP, &Ipv4Addr::LOCALHOST)
                .unwrap();
            let to = SocketAddr::from((GROUP, other.local_addr().unwrap().port()));
            rig.udp().set_multicast_interface(here).unwrap();
            rig.udp().send_to(b"hello", to.into());
            rig.peer = Peer::Udp(other);
            Cell::yes_if(rig.leaves(b"hello", 0))
        }
        "multicast_ttl" | "set_multicast_ttl" => {
            let before = rig.udp().multicast_ttl().unwrap();
            rig.udp().set_multicast_ttl(7).unwrap();
            Cell::yes_if((before, rig.udp().multicast_ttl().unwrap()) == (1, 7))
        }
        "multicast_loopback" | "set_multicast_loopback" => {
            let before = rig.udp().multicast_loopback().unwrap();
            rig.udp().set_multicast_loopback(false).unwrap();
            Cell::yes_if(before && !rig.udp().multicast_loopback().unwrap())
        }
        "offload" => {
            let offload = rig.udp().offload();
            Cell::yes_if(offload.send_segments > 1 && offload.receive)
        }
        "udp_handle" => Cell::yes_if(Some(rig.udp().udp_handle()) == rig.udp),
        _ => return None,
    })
}

/// The peer sends to the group, over the loopback.
fn send_to_group(rig: &Rig) {
    let Peer::Udp(peer) = &rig.peer else {
        unreachable!("it is of UDP");
    };
    sockopt::set_ip_multicast_if(peer, &Ipv4Addr::LOCALHOST).unwrap();
    let port = rig.ours.as_inet().unwrap().port();
    peer.send_to(b"group", (GROUP, port)).unwrap();
}

/// Whether a callback comes, of either protocol.
fn callback(rig: &mut Rig, row: &str) -> Option<Cell> {
    match row {
        "started" | "connection_made" => {}
        "datagram_received" | "packet_received" => {
            rig.send(b"abc", None).unwrap();
            rig.resume();
        }
        "connection_refused" => {
            let to = (!rig.kind.is_connected()).then(|| rig.peer.address());
            rig.peer = Peer::Gone;
            match &to {
                Some(to) => rig.datagrams().send_to(b"hello", to.as_ref()),
                None => rig.datagrams().send(b"hello"),
            };
        }
        "send_failed" => fail_a_send(rig),
        "sending_resumed" => {
            rig.set_limits(QueueLimits::default().full(1));
            assert_eq!(rig.post(b"hello"), SendStatus::Full);
        }
        "read_connection_lost" => {
            rustix::net::shutdown(rig.peer.fd(), Shutdown::Write).unwrap();
            rig.resume();
        }
        "write_connection_lost" => rig.packets().lose_write_connection(),
        "connection_broken" => {
            // The peer goes with something unread, while we have not read either.
            rig.post(b"hello");
            rig.reactor.turn(Some(Duration::ZERO));
            rig.send(b"abc", None).unwrap();
            rig.peer = Peer::Gone;
        }
        "connection_lost" => rig.packets().abort_connection(),
        "stopped" => rig.datagrams().abort(),
        "draining" | "is_idle" => {
            rig.resume();
            let how = GracefulStop::new()
                .grace(Duration::ZERO)
                .deadline(Duration::from_secs(20));
            rig.reactor.stop_gracefully(how).unwrap();
        }
        "part" => {
            let token = match rig.kind {
                Kind::Packets => rig.notes.packets.get().unwrap().into(),
                _ => rig.notes.datagrams.get().unwrap().into(),
            };
            call_part(&mut rig.reactor, token, rig.kind);
        }
        "connection_reattached" | "into_part" => rig.reattach(),
        "describe" | "log_prefix" => {
            for descriptor in rig.reactor.descriptors() {
                let _ = descriptor.describe();
            }
        }
        _ => return None,
    }
    Some(rig.is_called(row))
}

fn call_part(reactor: &mut Reactor, token: bowline::descriptor::Token, kind: Kind) {
    fn nothing<T>(_: &mut Probe, _: &mut Context<'_, T>) {}
    match kind {
        Kind::Udp | Kind::UdpTo => reactor.call_protocol(token, nothing::<UdpPort>),
        Kind::Unix | Kind::UnixTo => reactor.call_protocol(token, nothing::<UnixDatagramPort>),
        Kind::Packets => reactor.call_protocol(token, nothing::<UnixSeqpacketPort>),
    }
}

/// Sends what is taken, and what the kernel then refuses.
fn fail_a_send(rig: &mut Rig) {
    match rig.kind {
        Kind::Udp | Kind::UdpTo => {
            // Nobody has allowed it.
            let to = Address::Inet(SocketAddr::from((Ipv4Addr::BROADCAST, 9)));
            rig.datagrams().send_to(b"hello", to.as_ref());
        }
        Kind::Unix | Kind::UnixTo => {
            let to = Address::Unix(UnixAddress::Path(rig.directory.path().join("nobody")));
            rig.datagrams().send_to(b"hello", to.as_ref());
        }
        Kind::Packets => {
            let long = vec![7; 100_000];
            assert!(rig.packets().send(&long).is_taken());
            // Before it leaves.
            sockopt::set_socket_send_buffer_size(rig.socket(), 4_096).unwrap();
        }
    }
}

#[test]
fn tables_of_messages_have_every_method_and_callback() {
    let mut methods = methods_of(DATAGRAM, "DatagramTransport");
    methods.extend(methods_of(DATAGRAM, "UdpTransport"));
    methods.extend(methods_of(DATAGRAM, "UnixDatagramTransport"));
    methods.extend(methods_of(CONNECTION, "AnyConnection"));
    methods.extend(methods_of(PACKET, "PacketTransport"));
    assert!(methods.len() > 50, "the sources were read");
    Table::under(METHODS).assert_rows(methods);
    let mut callbacks = methods_of(DATAGRAM, "DatagramProtocol");
    callbacks.extend(methods_of(PACKET, "PacketProtocol"));
    Table::under(CALLBACKS).assert_rows(callbacks);
}

/// D-18: what is sent to a group leaves by the interface that was set, too.
#[test]
fn every_method_of_messages_does_what_its_table_says() {
    let _ledger = DescriptorLedger::open();
    let names = [
        methods_of(DATAGRAM, "DatagramTransport"),
        methods_of(DATAGRAM, "UdpTransport"),
        methods_of(DATAGRAM, "UnixDatagramTransport"),
        [
            methods_of(CONNECTION, "AnyConnection"),
            methods_of(PACKET, "PacketTransport"),
        ]
        .concat(),
    ];
    let tried = [datagram_method, udp_method, unix_method, packet_method];
    let table = Table::under(METHODS);
    assert_eq!(table.columns, KINDS.map(|(column, _)| column));
    let mut wrong = Vec::new();
    for (column, kind) in KINDS {
        wrong.extend(table.check(column, |row, expected| {
            let has = kind.traits();
            let mut its = (0..names.len()).filter(|&at| has[at]);
            let its = its.find(|&at| names[at].iter().any(|it| it == row));
            let Some(at) = its else {
                return Cell::Missing;
            };
            let seen = tried[at](&mut Rig::new(kind, expected), row);
            seen.unwrap_or_else(|| panic!("nobody tries {row}"))
        }));
    }
    assert_right(&wrong);
}

#[test]
fn every_callback_of_messages_comes_as_its_table_says() {
    let _ledger = DescriptorLedger::open();
    let datagrams = methods_of(DATAGRAM, "DatagramProtocol");
    let packets = methods_of(PACKET, "PacketProtocol");
    let table = Table::under(CALLBACKS);
    assert_eq!(table.columns, KINDS.map(|(column, _)| column));
    let mut wrong = Vec::new();
    for (column, kind) in KINDS {
        wrong.extend(table.check(column, |row, expected| {
            let its = match kind {
                Kind::Packets => &packets,
                _ => &datagrams,
            };
            if !its.iter().any(|it| it == row) {
                return Cell::Missing;
            }
            let seen = callback(&mut Rig::new(kind, expected), row);
            seen.unwrap_or_else(|| panic!("nobody tries {row}"))
        }));
    }
    assert_right(&wrong);
}

#[test]
fn each_kind_of_messages_has_its_own_traits() {
    let expected = [
        [true, true, false, false],
        [true, true, false, false],
        [true, false, true, false],
        [true, false, true, false],
        [false, false, false, true],
    ];
    assert_eq!(KINDS.map(|(_, kind)| kind.traits()), expected);
}
