//! Simulated datagram sockets against the real ones.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};

use bowline_protocol::{Address, UnixAddress};
use bowline_reactor::{Interest, Reactor, Readiness, Token};
use proptest::prelude::*;
use rustix::event::epoll;
use rustix::net::{self, SendFlags, SocketAddrUnix};

use super::super::kernel::{KernelSettings, SimulatedKernel};
use super::super::ports::MemoryDatagramPeer;
use super::{PATTERN, fetch};
use crate::sys::{self, Beside, MessageBatch};

/// How many sockets there are.
const SOCKETS: usize = 3;

#[derive(Clone, Copy, Debug)]
enum Operation {
    /// From a socket, to another one or to its peer, so many bytes and descriptors.
    Send(usize, Option<usize>, usize, usize),
    Receive(usize),
    Connect(usize, usize),
    Watch(usize, Interest),
    Close(usize),
    /// Binds it again, if it is closed.
    Open(usize),
    Poll,
}

#[derive(Debug, PartialEq)]
enum Outcome {
    /// The length, the first byte, the sender, and how many descriptors.
    Datagram(usize, Option<u8>, Option<usize>, usize),
    Failed(i32),
    Events(Vec<(usize, Readiness)>),
    Done,
    NotThere,
}

/// What was received: its bytes, its sender, and how many descriptors.
type Got = (Vec<u8>, Address, usize);

trait World {
    fn open(&mut self, socket: usize);
    fn name(&self, socket: usize) -> Address;
    fn send(
        &mut self,
        socket: usize,
        to: Option<usize>,
        data: &[u8],
        descriptors: &[BorrowedFd<'_>],
    ) -> io::Result<()>;
    fn receive(&mut self, socket: usize) -> io::Result<Got>;
    fn connect(&mut self, socket: usize, to: usize) -> io::Result<()>;
    fn watch(&mut self, socket: usize, interest: Interest);
    fn close(&mut self, socket: usize);
    fn is_open(&self, socket: usize) -> bool;
    fn poll(&mut self) -> Vec<(usize, Readiness)>;
}

fn run(world: &mut impl World, operations: &[Operation]) -> Vec<Outcome> {
    let file = File::open("/dev/null").unwrap();
    let mut sent = 0;
    let mut outcomes = Vec::new();
    for operation in operations {
        let of = |result: io::Result<()>| match result {
            Ok(()) => Outcome::Done,
            Err(error) => Outcome::Failed(error.raw_os_error().unwrap_or_else(|| {
                // The simulation has some that std knows by their kind.
                match error.kind() {
                    io::ErrorKind::NotConnected => rustix::io::Errno::NOTCONN.raw_os_error(),
                    _ => panic!("{error}"),
                }
            })),
        };
        let socket = match *operation {
            Operation::Send(socket, ..)
            | Operation::Receive(socket)
            | Operation::Connect(socket, _)
            | Operation::Watch(socket, _)
            | Operation::Close(socket)
            | Operation::Open(socket) => socket,
            Operation::Poll => {
                let mut events = world.poll();
                events.sort_by_key(|(socket, _)| *socket);
                outcomes.push(Outcome::Events(events));
                continue;
            }
        };
        if world.is_open(socket) == matches!(operation, Operation::Open(_)) {
            outcomes.push(Outcome::NotThere);
            continue;
        }
        outcomes.push(match *operation {
            Operation::Send(socket, to, bytes, descriptors) => {
                sent += 1;
                let data = &PATTERN[sent % 251..][..bytes];
                let fds = vec![file.as_fd(); descriptors];
                of(world.send(socket, to, data, &fds))
            }
            Operation::Receive(socket) => match world.receive(socket) {
                Ok((data, from, descriptors)) => {
                    let from = (0..SOCKETS).find(|it| world.name(*it) == from);
                    Outcome::Datagram(data.len(), data.first().copied(), from, descriptors)
                }
                Err(error) => of(Err(error)),
            },
            Operation::Connect(socket, to) => of(world.connect(socket, to)),
            Operation::Watch(socket, interest) => {
                world.watch(socket, interest);
                Outcome::Done
            }
            Operation::Close(socket) => {
                world.close(socket);
                Outcome::Done
            }
            Operation::Open(socket) => {
                world.open(socket);
                Outcome::Done
            }
            Operation::Poll => unreachable!("done above"),
        });
    }
    outcomes
}

static NAMES: AtomicUsize = AtomicUsize::new(0);

struct Real {
    is_udp: bool,
    poller: OwnedFd,
    sockets: [Option<(OwnedFd, bool)>; SOCKETS],
    names: [Address; SOCKETS],
    batch: MessageBatch,
}

impl Real {
    fn new(is_udp: bool) -> Self {
        let run = NAMES.fetch_add(1, Ordering::Relaxed);
        let name = |number: usize| {
            let name = format!("bowline-ports-{}-{run}-{number}", std::process::id());
            Address::Unix(UnixAddress::Abstract(name.into_bytes()))
        };
        let mut this = Self {
            is_udp,
            poller: epoll::create(epoll::CreateFlags::CLOEXEC).unwrap(),
            sockets: [const { None }; SOCKETS],
            names: [0, 1, 2].map(name),
            batch: MessageBatch::new(1, 100_000),
        };
        for socket in 0..SOCKETS {
            this.open(socket);
        }
        this
    }

    fn fd(&self, socket: usize) -> &OwnedFd {
        &self.sockets[socket].as_ref().expect("it is open").0
    }

    fn name_of(&self, socket: usize) -> SocketAddrUnix {
        let name = self.names[socket].as_unix().unwrap();
        let UnixAddress::Abstract(name) = name else {
            unreachable!("all are");
        };
        SocketAddrUnix::new_abstract_name(name).unwrap()
    }
}

impl World for Real {
    fn open(&mut self, socket: usize) {
        let family = match self.is_udp {
            true => sys::Family::Inet4,
            false => sys::Family::Unix,
        };
        let fd = sys::datagram_socket(family).unwrap();
        if self.is_udp {
            // The port that it had before.
            let wanted = self.names[socket].as_inet();
            let wanted = wanted.unwrap_or_else(|| ([127, 0, 0, 1], 0).into());
            net::bind(&fd, &wanted).unwrap();
            let name = net::getsockname(&fd).unwrap();
            let name = std::net::SocketAddr::try_from(name).unwrap();
            self.names[socket] = name.into();
        } else {
            net::bind(&fd, &self.name_of(socket)).unwrap();
        }
        self.sockets[socket] = Some((fd, false));
    }

    fn name(&self, socket: usize) -> Address {
        self.names[socket].clone()
    }

    fn send(
        &mut self,
        socket: usize,
        to: Option<usize>,
        data: &[u8],
        descriptors: &[BorrowedFd<'_>],
    ) -> io::Result<()> {
        use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage};
        let fd = self.fd(socket);
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(descriptors));
        }
        let data = [io::IoSlice::new(data)];
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        match to {
            None => net::sendmsg(fd, &data, &mut control, flags)?,
            Some(to) if self.is_udp => {
                let to = self.names[to].as_inet().unwrap();
                net::sendmsg_addr(fd, &to, &data, &mut control, flags)?
            }
            Some(to) => net::sendmsg_addr(fd, &self.name_of(to), &data, &mut control, flags)?,
        };
        Ok(())
    }

    fn receive(&mut self, socket: usize) -> io::Result<Got> {
        let beside = match self.is_udp {
            true => Beside::Segments,
            false => Beside::Descriptors,
        };
        let fd = self.sockets[socket].as_ref().expect("it is open").0.as_fd();
        self.batch.clear();
        self.batch.receive(fd, 1, beside)?;
        let (_, data, name, ancillary) = self.batch.parts(0);
        let from = crate::kinds::address_ref(name).to_address();
        Ok((data.to_vec(), from, ancillary.descriptors.drain(..).count()))
    }

    fn connect(&mut self, socket: usize, to: usize) -> io::Result<()> {
        let fd = self.fd(socket);
        match self.is_udp {
            true => net::connect(fd, &self.names[to].as_inet().unwrap())?,
            false => net::connect(fd, &self.name_of(to))?,
        }
        Ok(())
    }

    fn watch(&mut self, socket: usize, interest: Interest) {
        use epoll::EventFlags as Flags;
        let wanted = match interest {
            Interest::Readable => Flags::IN | Flags::RDHUP,
            Interest::Writable => Flags::OUT,
            Interest::Both => Flags::IN | Flags::RDHUP | Flags::OUT,
        } | Flags::ET;
        let data = epoll::EventData::new_u64(socket as u64);
        let Some((fd, is_watched)) = &mut self.sockets[socket] else {
            return;
        };
        match std::mem::replace(is_watched, true) {
            false => epoll::add(&self.poller, fd, data, wanted).unwrap(),
            true => epoll::modify(&self.poller, fd, data, wanted).unwrap(),
        }
    }

    fn close(&mut self, socket: usize) {
        self.sockets[socket] = None;
    }

    fn is_open(&self, socket: usize) -> bool {
        self.sockets[socket].is_some()
    }

    fn poll(&mut self) -> Vec<(usize, Readiness)> {
        fetch(&self.poller)
    }
}

struct Simulated {
    is_udp: bool,
    kernel: SimulatedKernel,
    sockets: [Option<MemoryDatagramPeer>; SOCKETS],
    names: [Address; SOCKETS],
    tokens: [Token; SOCKETS],
    reactor: Reactor,
}

impl Simulated {
    fn new(is_udp: bool) -> Self {
        let kernel = SimulatedKernel::new();
        kernel.set_settings(KernelSettings::default());
        let mut reactor = Reactor::new().unwrap();
        let name = |number: usize| match is_udp {
            true => Address::Inet(([127, 0, 0, 1], 1_000 + number as u16).into()),
            false => Address::Unix(UnixAddress::Abstract(vec![b'a' + number as u8])),
        };
        let mut this = Self {
            is_udp,
            tokens: [(); SOCKETS].map(|()| reactor.vacancy().unwrap().token()),
            sockets: [const { None }; SOCKETS],
            names: [0, 1, 2].map(name),
            kernel,
            reactor,
        };
        for socket in 0..SOCKETS {
            this.open(socket);
        }
        this
    }

    fn peer(&self, socket: usize) -> &MemoryDatagramPeer {
        self.sockets[socket].as_ref().expect("it is open")
    }
}

impl World for Simulated {
    fn open(&mut self, socket: usize) {
        let kernel = &self.kernel;
        let peer = match &self.names[socket] {
            Address::Inet(address) if self.is_udp => MemoryDatagramPeer::udp(kernel, *address),
            Address::Unix(name) => MemoryDatagramPeer::unix(kernel, name.clone()),
            _ => unreachable!("there are no others"),
        };
        self.sockets[socket] = Some(peer.unwrap());
    }

    fn name(&self, socket: usize) -> Address {
        self.names[socket].clone()
    }

    fn send(
        &mut self,
        socket: usize,
        to: Option<usize>,
        data: &[u8],
        descriptors: &[BorrowedFd<'_>],
    ) -> io::Result<()> {
        let to = to.map(|to| &self.names[to]);
        self.peer(socket)
            .send_with_descriptors(data, to, descriptors)
    }

    fn receive(&mut self, socket: usize) -> io::Result<Got> {
        let datagram = self.peer(socket).receive()?;
        Ok((datagram.bytes, datagram.from, datagram.descriptors.len()))
    }

    fn connect(&mut self, socket: usize, to: usize) -> io::Result<()> {
        self.peer(socket).connect(&self.names[to])
    }

    fn watch(&mut self, socket: usize, interest: Interest) {
        let peer = self.sockets[socket].as_ref().expect("it is open");
        let place = (peer.id(), peer.holder());
        self.kernel
            .watch(place, &mut self.reactor, self.tokens[socket], interest)
            .unwrap();
    }

    fn close(&mut self, socket: usize) {
        self.sockets[socket] = None;
    }

    fn is_open(&self, socket: usize) -> bool {
        self.sockets[socket].is_some()
    }

    fn poll(&mut self) -> Vec<(usize, Readiness)> {
        let events = self.kernel.poll(&mut self.reactor).into_iter();
        let place = |token| self.tokens.iter().position(|it| *it == token).unwrap();
        events.map(|(token, it)| (place(token), it)).collect()
    }
}

#[track_caller]
fn expect_same(is_udp: bool, operations: &[Operation]) {
    sys::tests::have_own_descriptors();
    let expected = run(&mut Real::new(is_udp), operations);
    let outcomes = run(&mut Simulated::new(is_udp), operations);
    for (index, operation) in operations.iter().enumerate() {
        let (got, wanted) = (&outcomes[index], &expected[index]);
        assert!(
            got == wanted,
            "operation {index}, {operation:?}, UDP {is_udp}: the kernel {wanted:?}, the \
             simulation {got:?}"
        );
    }
}

/// Ten and one wait for a socket, and whoever is connected to it hears of room.
#[test]
fn a_full_queue_has_its_senders_wait_as_in_the_kernel() {
    use Operation::{Close, Connect, Poll, Receive, Send, Watch};
    let mut operations = vec![
        Connect(1, 0),
        Watch(0, Interest::Readable),
        Watch(1, Interest::Both),
        Watch(2, Interest::Both),
        Poll,
    ];
    operations.extend([Send(1, None, 3, 0); 12]);
    operations.extend([Poll, Send(2, Some(0), 3, 0), Poll, Receive(0), Poll]);
    operations.extend([Send(2, Some(0), 0, 2), Send(1, None, 3, 0), Poll]);
    operations.extend([Receive(0); 12]);
    operations.extend([Poll, Send(1, None, 1, 0), Close(0), Poll]);
    operations.extend([Send(1, None, 1, 0), Send(1, None, 1, 0), Poll]);
    expect_same(false, &operations);
}

/// Two that are connected with each other have no such limit, and lose what is unread
/// when one leaves the other.
#[test]
fn a_peer_that_goes_elsewhere_resets_the_one_that_it_leaves() {
    use Operation::{Connect, Poll, Receive, Send, Watch};
    let mut operations = vec![
        Connect(0, 1),
        Connect(1, 0),
        Watch(0, Interest::Both),
        Watch(1, Interest::Both),
        Poll,
    ];
    operations.extend([Send(1, None, 3, 0); 20]);
    operations.extend([Send(2, Some(0), 1, 0), Poll, Connect(0, 2), Poll]);
    operations.extend([
        Receive(0),
        Receive(1),
        Send(1, None, 1, 0),
        Receive(1),
        Poll,
    ]);
    operations.extend([Send(0, None, 1, 0), Receive(2), Poll]);
    expect_same(false, &operations);
}

/// A refusal is told once, and by any call.
#[test]
fn a_refusal_is_told_once_as_in_the_kernel() {
    use Operation::{Close, Connect, Open, Poll, Receive, Send, Watch};
    expect_same(
        true,
        &[
            Connect(0, 1),
            Watch(0, Interest::Readable),
            Send(0, None, 3, 0),
            Receive(1),
            Send(2, Some(0), 1, 0),
            Send(1, Some(0), 0, 0),
            Poll,
            Receive(0),
            Receive(0),
            Close(1),
            Send(0, None, 3, 0),
            Poll,
            Receive(0),
            Receive(0),
            Send(0, None, 3, 0),
            Send(0, None, 3, 0),
            Send(2, Some(1), 3, 0),
            Receive(2),
            Poll,
            Open(1),
            Send(0, Some(1), 3, 0),
            Send(0, Some(2), 3, 0),
            Receive(1),
            Receive(2),
            Poll,
        ],
    );
}

fn operation(is_udp: bool) -> impl Strategy<Value = Operation> {
    let socket = || prop_oneof![3 => Just(0usize), 3 => Just(1usize), 1 => Just(2usize)];
    let to = prop_oneof![2 => Just(None), 2 => socket().prop_map(Some)];
    let length = match is_udp {
        // Never so many that some are lost: how the kernel counts them differs.
        true => prop_oneof![4 => 0..20usize, 1 => 1_000..2_000usize],
        false => prop_oneof![4 => 0..20usize, 2 => 10_000..90_000usize],
    };
    let descriptors = match is_udp {
        true => Just(0usize).boxed(),
        false => prop_oneof![4 => Just(0usize), 1 => 1..3usize].boxed(),
    };
    let interest = prop_oneof![Just(Interest::Readable), Just(Interest::Both)];
    prop_oneof![
        40 => (socket(), to, length, descriptors)
            .prop_map(|(socket, to, bytes, fds)| Operation::Send(socket, to, bytes, fds)),
        40 => socket().prop_map(Operation::Receive),
        5 => (socket(), socket()).prop_map(|(socket, to)| Operation::Connect(socket, to)),
        3 => (socket(), interest).prop_map(|(socket, it)| Operation::Watch(socket, it)),
        2 => socket().prop_map(Operation::Close),
        3 => socket().prop_map(Operation::Open),
        20 => Just(Operation::Poll),
    ]
}

fn watched(operations: Vec<Operation>) -> Vec<Operation> {
    let mut all: Vec<_> = (0..SOCKETS)
        .map(|socket| Operation::Watch(socket, Interest::Readable))
        .collect();
    all.extend(operations);
    all
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_list_of_operations_brings_what_unix_datagrams_bring(
        operations in prop::collection::vec(operation(false), 1..150),
    ) {
        expect_same(false, &watched(operations));
    }

    #[test]
    fn every_list_of_operations_brings_what_udp_brings(
        operations in prop::collection::vec(operation(true), 1..100),
    ) {
        expect_same(true, &watched(operations));
    }
}

/// How many datagrams of one size fit into a socket that nobody reads.
fn fitting(is_udp: bool, length: usize) -> [usize; 2] {
    fn count(world: &mut impl World, length: usize) -> usize {
        let data = vec![0; length];
        for _ in 0..2_000 {
            let _ = world.send(1, Some(0), &data, &[]);
        }
        let mut count = 0;
        while world.receive(0).is_ok() {
            count += 1;
        }
        count
    }
    [
        count(&mut Real::new(is_udp), length),
        count(&mut Simulated::new(is_udp), length),
    ]
}

/// The memory of a datagram that waits is what it is in the kernel, so that a flood is cut
/// off at the same place.
#[test]
fn a_flood_is_lost_from_where_the_kernel_loses_it() {
    for length in [0, 1, 64, 200, 600, 1_200, 3_000, 9_000] {
        let [real, simulated] = fitting(true, length);
        let difference = real.abs_diff(simulated);
        assert!(
            difference * 20 <= real + 20,
            "of {length} bytes {real} fit, and {simulated} in the simulation"
        );
    }
}
