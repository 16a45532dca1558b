//! No heap allocation per message in a steady echo, and none per call of the
//! reactor.

#![allow(
    unsafe_code,
    reason = "an allocator that counts cannot be written without"
)]
#![allow(clippy::print_stderr, reason = "a figure is to be seen")]

#[path = "support/mod.rs"]
mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::io::{self, ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::{TcpStream as StdTcpStream, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixDatagram as StdUnixDatagram, UnixStream as StdUnixStream};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bowline::endpoint::Listen as _;
use bowline::inspect::SlowLimits;
use bowline::tls::{Certificates, TlsServer, client_config, rustls};
use bowline::{
    Address, Context, Datagram, DatagramProtocol, DatagramTransport, Packet, PacketProtocol,
    PacketTransport, Protocol, Reactor, Tcp, Transport, Transports, Udp, UnixDatagram,
    UnixSeqpacket, UnixStream, UnixTransport,
};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};

use crate::support::{DescriptorLedger, socketpair};

/// Counts the allocations of each thread, and what it has.
struct Counting;

thread_local! {
    // Without a destructor and made in advance, so that it allocates nothing.
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
    static BYTES: Cell<isize> = const { Cell::new(0) };
}

// SAFETY: every call goes to the system's allocator as it is.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        BYTES.set(BYTES.get() + layout.size().cast_signed());
        // SAFETY: the caller's promises, passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        BYTES.set(BYTES.get() - layout.size().cast_signed());
        // SAFETY: the caller's promises, passed on.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        BYTES.set(BYTES.get() + size.cast_signed() - layout.size().cast_signed());
        // SAFETY: the caller's promises, passed on.
        unsafe { System.realloc(at, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Messages before the count, for what is allocated once.
const WARM_UP: usize = 100;
const MESSAGES: usize = 5_000;
/// Connections that take turns.
const CONNECTIONS: usize = 8;

struct Echo;

impl<T: Transport> Protocol<T> for Echo {
    fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
        cx.transport.write(data);
    }
}

/// Sends back descriptors too.
struct EchoDescriptors;

impl Protocol<UnixStream> for EchoDescriptors {
    fn file_descriptor_received(
        &mut self,
        cx: &mut Context<'_, UnixStream>,
        fd: OwnedFd,
    ) -> Result<(), OwnedFd> {
        cx.transport.send_file_descriptor(fd.into()).expect("room");
        Ok(())
    }

    fn data_received(&mut self, cx: &mut Context<'_, UnixStream>, data: &[u8]) {
        cx.transport.write(data);
    }
}

/// Sends `message` and turns the reactor until all of it is back.
fn exchange(reactor: &mut Reactor, peer: &mut (impl Read + Write), message: &[u8]) {
    let mut room = [0; 4_096];
    peer.write_all(message).expect("there is room");
    let mut missing = message.len();
    while missing > 0 {
        reactor.turn(Some(Duration::from_secs(1)));
        match peer.read(&mut room[..missing]) {
            Ok(count) => missing -= count,
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
    }
}

/// The same with a descriptor beside the message.
fn exchange_descriptor(reactor: &mut Reactor, peer: &StdUnixStream, passed: BorrowedFd<'_>) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let passed = [passed];
    assert!(control.push(SendAncillaryMessage::ScmRights(&passed)));
    let flags = SendFlags::NOSIGNAL;
    rustix::net::sendmsg(peer, &[IoSlice::new(b"message")], &mut control, flags)
        .expect("there is room");
    let mut descriptors = 0;
    while descriptors == 0 {
        reactor.turn(Some(Duration::from_secs(1)));
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut room = [0; 100];
        let parts = &mut [IoSliceMut::new(&mut room)];
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        match rustix::net::recvmsg(peer, parts, &mut control, flags) {
            Ok(received) => assert_eq!(received.bytes, 7),
            Err(error) => assert_eq!(error, rustix::io::Errno::WOULDBLOCK),
        }
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(list) = message {
                descriptors += list.count();
            }
        }
    }
}

/// A reactor that notes no callback as slow: on a machine with other work any is, and a note
/// has a name.
fn reactor() -> Reactor {
    let mut reactor = Reactor::new().unwrap();
    let slow = SlowLimits::default().callback(Duration::from_secs(5));
    reactor.set_slow_limits(slow.turn(Duration::MAX));
    reactor
}

/// How often `exchange` allocates in [`MESSAGES`] calls, once it runs steadily.
fn allocations(mut exchange: impl FnMut(usize)) -> u64 {
    for number in 0..WARM_UP {
        exchange(number);
    }
    let before = ALLOCATIONS.get();
    for number in 0..MESSAGES {
        exchange(number);
    }
    ALLOCATIONS.get() - before
}

#[test]
fn steady_echo_does_not_allocate() {
    let ledger = DescriptorLedger::open();
    let mut counted = Vec::new();
    {
        let mut reactor = reactor();
        let listener = reactor
            .listen_tcp(([127, 0, 0, 1], 0).into(), |_: &Address| Echo)
            .unwrap();
        let address = reactor.get(listener).unwrap().address().as_inet().unwrap();
        let mut tcp: Vec<_> = (0..CONNECTIONS)
            .map(|_| {
                let peer = StdTcpStream::connect(address).unwrap();
                peer.set_nonblocking(true).unwrap();
                peer
            })
            .collect();
        let mut unix = Vec::new();
        let mut passing = Vec::new();
        for _ in 0..CONNECTIONS {
            let (ours, theirs) = socketpair();
            reactor.adopt_unix_stream(ours.into(), Echo).unwrap();
            unix.push(theirs);
            let (ours, theirs) = socketpair();
            reactor
                .adopt_unix_stream(ours.into(), EchoDescriptors)
                .unwrap();
            passing.push(theirs);
        }
        for length in [1, 64, 4_096] {
            let message = vec![7; length];
            let name = format!("TCP, {length} bytes");
            let count = allocations(|number| {
                exchange(&mut reactor, &mut tcp[number % CONNECTIONS], &message);
            });
            counted.push((name, count));
            let name = format!("UNIX, {length} bytes");
            let count = allocations(|number| {
                exchange(&mut reactor, &mut unix[number % CONNECTIONS], &message);
            });
            counted.push((name, count));
        }
        let passed = std::fs::File::open("/dev/null").unwrap();
        let count = allocations(|number| {
            let peer = &passing[number % CONNECTIONS];
            exchange_descriptor(&mut reactor, peer, passed.as_fd());
        });
        counted.push(("UNIX, a descriptor each".into(), count));
    }
    ledger.assert_balanced();
    for (name, count) in &counted {
        eprintln!("{name}: {count} allocations in {MESSAGES} messages");
    }
    assert!(counted.iter().all(|(_, count)| *count == 0), "{counted:?}");
}

/// Sends back what came, from one socket or from many.
impl<T: DatagramTransport> DatagramProtocol<T> for Echo {
    fn datagram_received(&mut self, cx: &mut Context<'_, T>, datagram: &mut Datagram<'_>) {
        cx.transport.send_to(datagram.data, datagram.from);
    }
}

/// None for a datagram, whoever sends it, and however many come at once.
#[test]
fn steady_echo_of_datagrams_does_not_allocate() {
    let ledger = DescriptorLedger::open();
    let mut counted = Vec::new();
    {
        let mut reactor = reactor();
        let here = Udp::at(([127, 0, 0, 1], 0).into());
        let handle = reactor.listen(here, Echo).unwrap();
        let address = reactor.get(handle).unwrap().host().as_inet().unwrap();
        let udp: Vec<_> = (0..CONNECTIONS)
            .map(|_| {
                let peer = UdpSocket::bind("127.0.0.1:0").unwrap();
                peer.connect(address).unwrap();
                peer.set_nonblocking(true).unwrap();
                peer
            })
            .collect();
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("echo");
        reactor
            .listen(UnixDatagram::at(path.clone()), Echo)
            .unwrap();
        let unix: Vec<_> = (0..CONNECTIONS)
            .map(|number| {
                let own = directory.path().join(number.to_string());
                let peer = StdUnixDatagram::bind(own).unwrap();
                peer.connect(&path).unwrap();
                peer.set_nonblocking(true).unwrap();
                peer
            })
            .collect();
        for length in [0, 64, 1_200] {
            let message = vec![7; length];
            let count = allocations(|number| {
                let peer = &udp[number % CONNECTIONS];
                let send = || peer.send(&message);
                exchange_datagrams(&mut reactor, send, |room| peer.recv(room));
            });
            counted.push((format!("UDP, {length} bytes"), count));
            let count = allocations(|number| {
                let peer = &unix[number % CONNECTIONS];
                let send = || peer.send(&message);
                exchange_datagrams(&mut reactor, send, |room| peer.recv(room));
            });
            counted.push((format!("UNIX, {length} bytes"), count));
        }
    }
    ledger.assert_balanced();
    for (name, count) in &counted {
        eprintln!("{name}: {count} allocations in {MESSAGES} exchanges of 5 datagrams");
    }
    assert!(counted.iter().all(|(_, count)| *count == 0), "{counted:?}");
}

/// Sends a burst back for each datagram: as much as the buffer of a socket holds.
struct Burst;

const BURST: usize = 64;

impl<T: DatagramTransport> DatagramProtocol<T> for Burst {
    fn datagram_received(&mut self, cx: &mut Context<'_, T>, datagram: &mut Datagram<'_>) {
        for _ in 0..BURST {
            cx.transport.send_to(&[7; 1_200], datagram.from);
        }
    }
}

/// None for what waits to be sent either, if it is much at once.
#[test]
fn steady_bursts_of_datagrams_do_not_allocate() {
    let ledger = DescriptorLedger::open();
    let mut reactor = reactor();
    let here = Udp::at(([127, 0, 0, 1], 0).into());
    let handle = reactor.listen(here, Burst).unwrap();
    let address = reactor.get(handle).unwrap().host().as_inet().unwrap();
    let peer = UdpSocket::bind("127.0.0.1:0").unwrap();
    peer.connect(address).unwrap();
    peer.set_nonblocking(true).unwrap();
    let count = allocations(|_| {
        peer.send(b"more").unwrap();
        let mut missing = BURST;
        while missing > 0 {
            match peer.recv(&mut [0; 2_048]) {
                Ok(_) => missing -= 1,
                Err(_) => drop(reactor.turn(Some(Duration::from_secs(1)))),
            }
        }
    });
    assert_eq!(count, 0, "allocations in {MESSAGES} bursts");
    drop((reactor, peer));
    ledger.assert_balanced();
}

/// Sends back what came, over a connection.
impl<T: PacketTransport> PacketProtocol<T> for Echo {
    fn packet_received(&mut self, cx: &mut Context<'_, T>, packet: &mut Packet<'_>) {
        cx.transport.send(packet.data);
    }
}

/// None for a packet, over however many connections they come.
#[test]
fn steady_echo_of_packets_does_not_allocate() {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, recv, send, socketpair};
    let ledger = DescriptorLedger::open();
    let mut counted = Vec::new();
    {
        let mut reactor = reactor();
        let peers: Vec<_> = (0..CONNECTIONS)
            .map(|_| {
                let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
                let kind = SocketType::SEQPACKET;
                let (ours, peer) = socketpair(AddressFamily::UNIX, kind, flags, None).unwrap();
                reactor.adopt(UnixSeqpacket, ours, Echo).unwrap();
                peer
            })
            .collect();
        for length in [0, 64, 1_200] {
            let message = vec![7; length];
            let count = allocations(|number| {
                let peer = &peers[number % CONNECTIONS];
                let send = || Ok(send(peer, &message, SendFlags::NOSIGNAL)?);
                let receive = |room: &mut [u8]| Ok(recv(peer, room, RecvFlags::DONTWAIT)?.0);
                exchange_datagrams(&mut reactor, send, receive);
            });
            counted.push((length, count));
        }
    }
    ledger.assert_balanced();
    for (length, count) in &counted {
        eprintln!("{length} bytes: {count} allocations in {MESSAGES} exchanges of 5 packets");
    }
    assert!(counted.iter().all(|(_, count)| *count == 0), "{counted:?}");
}

/// Sends five datagrams and turns the reactor until all are back.
fn exchange_datagrams(
    reactor: &mut Reactor,
    send: impl Fn() -> io::Result<usize>,
    receive: impl Fn(&mut [u8]) -> io::Result<usize>,
) {
    let mut room = [0; 4_096];
    for _ in 0..5 {
        send().expect("there is room");
    }
    let mut missing = 5;
    while missing > 0 {
        match receive(&mut room) {
            Ok(_) => missing -= 1,
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::WouldBlock);
                reactor.turn(Some(Duration::from_secs(1)));
            }
        }
    }
}

thread_local! {
    static CALLED: Cell<usize> = const { Cell::new(0) };
}

/// The ways to have something called.
#[derive(Clone, Copy, Debug)]
enum Ask {
    Later,
    LaterThenCancelled,
    LaterThenMoved,
    Soon,
    Deferred,
}

/// Asks for a call that captures so many words.
fn ask_only<const WORDS: usize>(reactor: &mut Reactor, ask: Ask) {
    let words = [1; WORDS];
    let call = move |_: &mut Reactor| CALLED.set(CALLED.get() + words.iter().sum::<usize>());
    match ask {
        Ask::Later => drop(reactor.call_later(Duration::ZERO, call)),
        Ask::LaterThenCancelled => {
            let call = reactor.call_later(Duration::ZERO, call);
            call.cancel(reactor).expect("not called yet");
        }
        Ask::LaterThenMoved => {
            let call = reactor.call_later(Duration::from_secs(60), call);
            call.reset(reactor, Duration::ZERO).expect("not called yet");
        }
        Ask::Soon => reactor.call_soon(call),
        Ask::Deferred => reactor.defer(call),
    }
}

/// Has it made too, if it was left to.
fn ask<const WORDS: usize>(reactor: &mut Reactor, ask: Ask) {
    ask_only::<WORDS>(reactor, ask);
    reactor.turn(Some(Duration::ZERO));
}

fn run_all(reactor: &mut Reactor) {
    while reactor.delayed_calls().count() > 0 || !reactor.is_idle() {
        reactor.turn(Some(Duration::ZERO));
    }
}

/// Three words: a counted reference and a handle, say. More need a box, of which this
/// test has to know.
#[test]
fn calls_of_the_reactor_do_not_allocate() {
    let ledger = DescriptorLedger::open();
    let mut reactor = reactor();
    for way in [
        Ask::Later,
        Ask::LaterThenCancelled,
        Ask::LaterThenMoved,
        Ask::Soon,
        Ask::Deferred,
    ] {
        // As many as may wait at a time. A call is made when the slack of a timer has
        // passed, which is 100 us; a turn takes some hundred nanoseconds at the least.
        for _ in 0..1_024 {
            ask_only::<3>(&mut reactor, way);
        }
        run_all(&mut reactor);
        CALLED.set(0);
        // What is kept grows when more timers come due at once than ever before, which
        // is when the machine stalls. It does not in each of four rounds.
        let mut rounds = 0;
        let least = loop {
            rounds += 1;
            let count = allocations(|_| ask::<3>(&mut reactor, way));
            if count == 0 || rounds == 4 {
                break count;
            }
        };
        assert_eq!(least, 0, "{way:?}");
        run_all(&mut reactor);
        let made = match way {
            Ask::LaterThenCancelled => 0,
            _ => 3 * (WARM_UP + MESSAGES) * rounds,
        };
        assert_eq!(CALLED.get(), made, "{way:?}");
        let count = allocations(|_| ask::<4>(&mut reactor, way));
        assert_eq!(count, MESSAGES as u64, "{way:?}");
    }
    drop(reactor);
    ledger.assert_balanced();
}

/// What most connections never need is left out again.
#[test]
fn connection_put_together_again_takes_as_little_as_before() {
    let ledger = DescriptorLedger::open();
    let mut reactor = reactor();
    let connect = |reactor: &mut Reactor| {
        let (ours, theirs) = socketpair();
        let handle = reactor.adopt_unix_stream(ours.into(), Echo).unwrap();
        reactor.turn(Some(Duration::ZERO));
        (reactor.get(handle).unwrap().handle(), theirs)
    };
    let put_together_again = |reactor: &mut Reactor, handle| {
        reactor.detach::<Echo>(handle, |reactor, detached| {
            let again = reactor.reattach::<UnixStream, _>(detached.expect("an echo"));
            again.expect("it is as it was");
        });
        for _ in 0..3 {
            reactor.turn(Some(Duration::ZERO));
        }
    };
    // What the first brings for all of them.
    let (first, others) = connect(&mut reactor);
    put_together_again(&mut reactor, first);
    let before = BYTES.get();
    let (handle, theirs) = connect(&mut reactor);
    let fresh = BYTES.get() - before;
    put_together_again(&mut reactor, handle);
    let again = BYTES.get() - before;
    assert!(again <= fresh, "{again} bytes, {fresh} before");
    assert_eq!(reactor.registered(), 2);
    drop((reactor, others, theirs));
    ledger.assert_balanced();
}

/// What the reactor allocates, and keeps, while it turns; not what the peer does.
#[derive(Default)]
struct OfTurns {
    allocations: u64,
    bytes: isize,
}

impl OfTurns {
    fn turn(&mut self, reactor: &mut Reactor) {
        let before = (ALLOCATIONS.get(), BYTES.get());
        reactor.turn(Some(Duration::from_millis(1)));
        self.allocations += ALLOCATIONS.get() - before.0;
        self.bytes += BYTES.get() - before.1;
    }
}

/// A client of TLS over a socket, by rustls as it comes.
struct TlsPeer {
    socket: StdTcpStream,
    tls: rustls::ClientConnection,
}

impl TlsPeer {
    fn connect(
        reactor: &mut Reactor,
        turns: &mut OfTurns,
        address: std::net::SocketAddr,
        config: &Arc<rustls::ClientConfig>,
    ) -> Self {
        let socket = StdTcpStream::connect(address).unwrap();
        socket.set_nonblocking(true).unwrap();
        let name = "localhost".try_into().unwrap();
        let tls = rustls::ClientConnection::new(Arc::clone(config), name).unwrap();
        let mut peer = Self { socket, tls };
        while peer.tls.is_handshaking() || peer.tls.wants_write() {
            peer.step();
            turns.turn(reactor);
        }
        // What comes behind the handshake.
        peer.exchange(reactor, turns, b"hello");
        peer
    }

    fn step(&mut self) {
        while self.tls.wants_write() && self.tls.write_tls(&mut self.socket).is_ok() {}
        if let Ok(1..) = self.tls.read_tls(&mut self.socket) {
            self.tls.process_new_packets().unwrap();
        }
    }

    fn exchange(&mut self, reactor: &mut Reactor, turns: &mut OfTurns, message: &[u8]) {
        let mut room = [0; 4_096];
        self.tls.writer().write_all(message).unwrap();
        let mut missing = message.len();
        while missing > 0 {
            self.step();
            turns.turn(reactor);
            if let Ok(count) = self.tls.reader().read(&mut room[..missing]) {
                missing -= count;
            }
        }
    }
}

/// Takes, and says nothing.
struct Takes(Rc<Cell<usize>>);

impl<T: Transport> Protocol<T> for Takes {
    fn data_received(&mut self, _: &mut Context<'_, T>, data: &[u8]) {
        self.0.set(self.0.get() + data.len());
    }
}

fn tls_configs() -> (TlsServer, Arc<rustls::ClientConfig>) {
    let certified = rcgen::generate_simple_self_signed(vec!["localhost".into()]).unwrap();
    let key = rustls::pki_types::PrivateKeyDer::try_from(certified.signing_key.serialize_der());
    let chain = vec![certified.cert.der().clone()];
    let mut roots = rustls::RootCertStore::empty();
    roots.add(chain[0].clone()).unwrap();
    let certificates = Certificates::new(chain, key.unwrap()).unwrap();
    let server = TlsServer::with_certificates(&certificates);
    (server, Arc::new(client_config(roots)))
}

/// Opened where it lies. The provider makes a vector of each record that it seals, and is
/// given no place for it (rustls 0.23: `MessageEncrypter::encrypt`).
#[test]
fn record_of_tls_takes_one_allocation_to_send_and_none_to_receive() {
    let _ledger = DescriptorLedger::open();
    let (server, config) = tls_configs();
    let mut reactor = reactor();
    let any = || Tcp::at(([127, 0, 0, 1], 0).into()).layer(server.clone());
    let echo = reactor.listen(any(), |_: &Address| Echo).unwrap();
    let address = reactor.get(echo).unwrap().address().as_inet().unwrap();
    let mut turns = OfTurns::default();
    let mut peer = TlsPeer::connect(&mut reactor, &mut turns, address, &config);
    for _ in 0..WARM_UP {
        peer.exchange(&mut reactor, &mut turns, &[7; 64]);
    }
    turns = OfTurns::default();
    for _ in 0..MESSAGES {
        peer.exchange(&mut reactor, &mut turns, &[7; 64]);
    }
    assert_eq!(turns.allocations, MESSAGES as u64);
    assert_eq!(turns.bytes, 0);

    // In records that do not end where a read does.
    let taken = Rc::new(Cell::new(0));
    let told = Rc::clone(&taken);
    let takes = move |_: &Address| Takes(Rc::clone(&told));
    let listener = reactor.listen(any(), takes).unwrap();
    let address = reactor.get(listener).unwrap().address().as_inet().unwrap();
    let socket = StdTcpStream::connect(address).unwrap();
    socket.set_nonblocking(true).unwrap();
    let name = "localhost".try_into().unwrap();
    let tls = rustls::ClientConnection::new(config, name).unwrap();
    let mut peer = TlsPeer { socket, tls };
    while peer.tls.is_handshaking() {
        peer.step();
        turns.turn(&mut reactor);
    }
    for round in 0..200 {
        if round == 20 {
            turns = OfTurns::default();
        }
        taken.set(0);
        peer.tls.writer().write_all(&[7; 60_000]).unwrap();
        while taken.get() < 60_000 {
            peer.step();
            turns.turn(&mut reactor);
        }
    }
    assert_eq!(turns.allocations, 0, "to receive");
}

/// With the cryptography of ring, whose keys are 1,120 bytes of it.
const MOST_IDLE_TLS: isize = 2_560;

#[test]
fn idle_connection_with_tls_costs_little() {
    let _ledger = DescriptorLedger::open();
    let (server, config) = tls_configs();
    let mut reactor = reactor();
    let here = Tcp::at(([127, 0, 0, 1], 0).into()).layer(server);
    let listener = reactor.listen(here, |_: &Address| Echo).unwrap();
    let address = reactor.get(listener).unwrap().address().as_inet().unwrap();
    let mut turns = OfTurns::default();
    // What the first bring for all of them: slots are made for so many at once.
    let mut peers: Vec<_> = (0..64)
        .map(|_| TlsPeer::connect(&mut reactor, &mut turns, address, &config))
        .collect();
    peers.clear();
    while reactor.registered() > 1 {
        turns.turn(&mut reactor);
    }
    turns = OfTurns::default();
    let peers: Vec<_> = (0..64)
        .map(|_| TlsPeer::connect(&mut reactor, &mut turns, address, &config))
        .collect();
    let each = turns.bytes / peers.len() as isize;
    eprintln!("TLS, after an echo: {each} bytes asked for");
    assert!(each <= MOST_IDLE_TLS, "{each} bytes");
    let seen = format!("{reactor:?}");
    assert!(
        seen.contains("delayed_calls: 0"),
        "time for a handshake that is done: {seen}"
    );
    drop(reactor);
}
