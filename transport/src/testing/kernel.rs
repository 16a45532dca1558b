//! The simulated kernel: every queue, every setting and every choice of a
//! simulation in one object.
//!
//! What is modelled, for connected UNIX stream sockets, and where it comes
//! from: the buffers a send is cut into and what each is charged
//! (`unix_stream_sendmsg`, `sock_alloc_send_pskb`), where a read ends
//! (`unix_stream_read_generic`), what closing does to the other end
//! (`unix_release_sock`), and which event each of those raises under an
//! edge-triggered poller (`ep_poll_callback`, `unix_poll`). Datagram sockets, pipes and
//! child processes are in files of their own. The tests of this module run the same
//! lists of operations over the real thing.

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::fs::File;
use std::io::{self, IoSlice, PipeReader, Read as _};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::rc::{Rc, Weak};

use bowline_protocol::Credentials;
use bowline_reactor::testing::ReadinessSource;
use bowline_reactor::{Interest, Reactor, Readiness, Token};

use super::datagrams::{Arrived, MemoryDatagramSender, MemoryDatagrams};
use super::listener::MemoryListener;
use super::packets::MemoryPacketSocket;
use super::random::Random;
use super::socket::MemorySocket;
use crate::sys::{self, MAX_DESCRIPTORS};

mod children;
mod pipes;
mod ports;

use self::children::SimulatedProcess;
use self::pipes::{OpenPipe, PipeId, SimulatedPipe};
pub(super) use self::pipes::{OpenedFor, PolledPipe};
use self::ports::SimulatedPort;
pub(super) use self::ports::{ArrivedDatagram, LONGEST_V4, LONGEST_V6, PortFamily};

/// The memory that Linux lets the unread bytes of one socket take by default
/// (`net.core.wmem_default`).
const SEND_BUFFER: usize = 212_992;
/// How many datagrams wait for a UNIX socket by default (`net.unix.max_dgram_qlen`).
const DATAGRAM_QUEUE: usize = 10;
/// How much a pipe holds by default (pipe(7)).
const PIPE_BYTES: usize = 65_536;
/// The most bytes of one buffer: what fits beside its own header in a page,
/// and eight pages more.
const BUFFER_BYTES: usize = HEAD_BYTES + 32_768;
const HEAD_BYTES: usize = PAGE - SHARED_INFO;
const PAGE: usize = 4_096;
/// How many pages a buffer has beside its first part (`MAX_SKB_FRAGS`).
const MOST_FRAGMENTS: usize = 17;
/// What the kernel keeps behind a buffer's first part, and the buffer's own
/// description, both rounded to cache lines (x86-64).
const SHARED_INFO: usize = 320;
const DESCRIPTION: usize = 256;

/// A kernel that holds connections in memory and reports their readiness to
/// reactors.
///
/// Clones are the same kernel. A reactor belongs to the kernel of the first socket that
/// is put there, and to no other one. Several reactors may share a kernel, as processes
/// do.
///
/// [Settings](KernelSettings) and one generator of choices decide everything that could
/// go one way or the other. So a run can be repeated from its seed.
///
/// # Limits
///
/// A descriptor on its way takes a number of this process. A socket that was
/// [made a descriptor](MemorySocket::into_descriptor) takes two, and so does an end of a
/// pipe. Connections have no names and no options, and one set of credentials for all. A
/// listener's queue has no limit.
///
/// Feature `testing`.
#[derive(Clone)]
pub struct SimulatedKernel {
    state: Rc<RefCell<State>>,
}

/// The settings of a simulated kernel. They count from the next call on.
///
/// Feature `testing`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct KernelSettings {
    /// How much memory unread bytes may take before a send has to wait
    /// (`SO_SNDBUF` as getsockopt(2) reports it). A send is taken while less is used, so
    /// it may go beyond by one buffer. Even one byte costs 768 bytes. The default is
    /// 212,992, the least 4,608.
    pub send_buffer: usize,
    /// The most bytes that one send takes. The default is `usize::MAX`, the least 1.
    pub largest_send: usize,
    /// The most bytes that one read takes. The default is `usize::MAX`, the least 1. A
    /// new event follows a read that was cut by this, as if the rest had arrived just
    /// afterwards. So no read is cut once the other end is closed.
    pub largest_read: usize,
    /// How many of a hundred sends and reads are cut in the same way, at a chosen byte.
    /// The default is 0.
    pub cut_percent: u8,
    /// How events are delivered.
    pub delivery: Delivery,
    /// How many of a hundred accepts, and sends and reads of transports, fail with an
    /// error that passes. That is "would block", which an event follows, and for sends
    /// also `ENOBUFS`, `ENOMEM` or `ETOOMANYREFS`. None fails once the other end is
    /// closed. The default is 0.
    pub passing_errors_percent: u8,
    /// How many of ten thousand sends and reads of transports fail with an error that
    /// ends the connection: `ETIMEDOUT`, `EPERM`, `EIO`. It is never `EPIPE` or
    /// `ECONNRESET`, which a UNIX socket answers when its other end is closed. The
    /// default is 0.
    pub lasting_errors_per_10_000: u16,
    /// How many of a hundred UDP datagrams are lost on their way, without a word to
    /// anybody. The default is 0.
    pub loss_percent: u8,
    /// How many of a hundred UDP datagrams arrive twice. The default is 0.
    pub duplicate_percent: u8,
    /// How many of a hundred UDP datagrams are late, so that others overtake them. A late
    /// one arrives before time passes. The default is 0.
    pub reorder_percent: u8,
    /// How much memory the unread datagrams of one UDP socket may take before more are
    /// lost (`SO_RCVBUF` as getsockopt(2) reports it). Even an empty one costs 832 bytes.
    /// The default is 212,992.
    pub receive_buffer: usize,
    /// How many datagrams wait for one UNIX socket before its senders have to wait
    /// (`net.unix.max_dgram_qlen`). One more than this fits. There is no such limit
    /// between two sockets that are connected with each other. The default is 10.
    pub datagram_queue: usize,
    /// The size of pipes that are made from now on, in bytes, of which each page of 4,096
    /// is filled by one write or several. The default is 65,536, the least 4,096.
    pub pipe_size: usize,
    /// How many of a hundred listeners are bound and do not listen yet, as between
    /// bind(2) and listen(2), until their reactor polls. Such a listener refuses
    /// connections as if it were dead, and its name is taken. The default is 0.
    pub bound_first_percent: u8,
}

bowline_reactor::setters!(KernelSettings {
    send_buffer: usize,
    largest_send: usize,
    largest_read: usize,
    cut_percent: u8,
    delivery: Delivery,
    passing_errors_percent: u8,
    lasting_errors_per_10_000: u16,
    loss_percent: u8,
    duplicate_percent: u8,
    reorder_percent: u8,
    receive_buffer: usize,
    datagram_queue: usize,
    pipe_size: usize,
    bound_first_percent: u8,
});

/// Which of the events that wait a poll fetches.
///
/// Feature `testing`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// All, in the order in which they were raised. This is the default.
    Batch,
    /// The first one, so that every turn serves one socket.
    OneAtATime,
    /// Some, in some order.
    Random,
}

/// The name of one end of a simulated connection, or of a listener; unique in its
/// kernel.
///
/// Feature `testing`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SocketId(u64);

impl Default for KernelSettings {
    fn default() -> Self {
        Self {
            send_buffer: SEND_BUFFER,
            largest_send: usize::MAX,
            largest_read: usize::MAX,
            cut_percent: 0,
            delivery: Delivery::Batch,
            passing_errors_percent: 0,
            lasting_errors_per_10_000: 0,
            loss_percent: 0,
            duplicate_percent: 0,
            reorder_percent: 0,
            receive_buffer: SEND_BUFFER,
            datagram_queue: DATAGRAM_QUEUE,
            pipe_size: PIPE_BYTES,
            bound_first_percent: 0,
        }
    }
}

impl SimulatedKernel {
    /// Makes a kernel with the default settings, which make no choices.
    #[expect(
        clippy::new_without_default,
        reason = "two of them are different kernels"
    )]
    pub fn new() -> Self {
        Self::with_seed(0)
    }

    /// Makes a kernel whose choices come from `seed`.
    pub fn with_seed(seed: u64) -> Self {
        let state = Rc::new(RefCell::new(State {
            settings: KernelSettings::default(),
            random: Random::new(seed),
            ends: BTreeMap::new(),
            listeners: BTreeMap::new(),
            made: Vec::new(),
            arrived: BTreeMap::new(),
            senders: BTreeMap::new(),
            ports: BTreeMap::new(),
            pipes: BTreeMap::new(),
            open_pipes: BTreeMap::new(),
            children: BTreeMap::new(),
            next_port: ports::FIRST_PORT,
            parked: Vec::new(),
            credentials: Some(sys::simulated::own_credentials().into()),
            next_id: 0,
            next_holder: 0,
            ready: Vec::new(),
            fingerprint: 0,
        }));
        KERNELS.with_borrow_mut(|kernels| {
            kernels.retain(|kernel| kernel.strong_count() > 0);
            kernels.push(Rc::downgrade(&state));
        });
        Self { state }
    }

    /// The settings in force.
    pub fn settings(&self) -> KernelSettings {
        self.state.borrow().settings
    }

    /// Changes the settings. Whatever is on its way stays on its way.
    pub fn set_settings(&self, settings: KernelSettings) {
        self.state.borrow_mut().settings = KernelSettings {
            send_buffer: settings.send_buffer.max(4_608),
            largest_send: settings.largest_send.max(1),
            largest_read: settings.largest_read.max(1),
            pipe_size: settings.pipe_size.max(PAGE),
            ..settings
        };
    }

    /// Sets the
    /// [`peer_credentials`](bowline_protocol::UnixTransport::peer_credentials) of every
    /// socket. With `None` they fail with `NotConnected`. By default they are those of
    /// this process.
    pub fn set_peer_credentials(&self, credentials: Option<Credentials>) {
        self.state.borrow_mut().credentials = credentials;
    }

    pub(super) fn peer_credentials(&self) -> io::Result<Credentials> {
        let credentials = self.state.borrow().credentials;
        credentials.ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected))
    }

    /// Makes two connected sockets that keep the boundaries of packets.
    pub fn pair_of_packets(&self) -> (MemoryPacketSocket, MemoryPacketSocket) {
        let (one, other) = self.state.borrow_mut().add_pair(Shape::Packets);
        (
            MemoryPacketSocket::new(self.clone(), one),
            MemoryPacketSocket::new(self.clone(), other),
        )
    }

    /// Makes two connected sockets.
    pub fn pair(&self) -> (MemorySocket, MemorySocket) {
        let (one, other) = self.state.borrow_mut().add_pair(Shape::Stream);
        (
            MemorySocket::new(self.clone(), one),
            MemorySocket::new(self.clone(), other),
        )
    }

    /// Listens under a name.
    ///
    /// # Errors
    ///
    /// `AddrInUse` while there is another listener of that name, even if it does not
    /// listen yet ([`KernelSettings::bound_first_percent`]).
    pub fn listen(&self, name: &str) -> io::Result<MemoryListener> {
        let id = self.listen_for(name, Shape::Stream)?;
        Ok(MemoryListener::new(self.clone(), id))
    }

    /// Listens for connections of a shape; who connects for another is refused.
    pub(super) fn listen_for(&self, name: &str, shape: Shape) -> io::Result<SocketId> {
        let mut state = self.state.borrow_mut();
        if state.listener_called(name).is_some() {
            return Err(io::Error::from(io::ErrorKind::AddrInUse));
        }
        let id = state.new_id();
        let percent = state.settings.bound_first_percent;
        let is_bound_only = percent > 0 && state.random.chance(percent);
        let listener = Listening {
            name: name.to_owned(),
            shape,
            is_bound_only,
            holders: 0,
            waiting: VecDeque::new(),
            watches: Vec::new(),
        };
        state.listeners.insert(id, listener);
        state.note::<()>(7, id, &Ok(0));
        Ok(id)
    }

    /// Connects to the listener of that name. It may accept now or later.
    ///
    /// # Errors
    ///
    /// `ConnectionRefused` if there is none, or if it does not listen yet.
    pub fn connect(&self, name: &str) -> io::Result<MemorySocket> {
        let id = self.connect_for(name, Shape::Stream)?;
        Ok(MemorySocket::new(self.clone(), id))
    }

    /// Connects to the listener of that name, which has to be of the same shape.
    pub(super) fn connect_for(&self, name: &str, shape: Shape) -> io::Result<SocketId> {
        let mut state = self.state.borrow_mut();
        let listener = match state.listener_called(name) {
            Some(listener) if !state.is_bound_only(listener) => listener,
            _ => return Err(io::Error::from(io::ErrorKind::ConnectionRefused)),
        };
        if state
            .listeners
            .get(&listener)
            .is_none_or(|it| it.shape != shape)
        {
            // A UNIX socket of another type.
            return Err(sys::simulated::wrong_type());
        }
        let (ours, theirs) = state.add_pair(shape);
        // It is the queue's.
        state.end(theirs)?.holders += 1;
        if let Some(listening) = state.listeners.get_mut(&listener) {
            listening.waiting.push_back(theirs);
        }
        state.made.push((name.to_owned(), ours, theirs));
        state.raise_listener(listener);
        state.note::<()>(8, listener, &Ok(theirs.0 as usize));
        Ok(ours)
    }

    /// Receives datagrams under a name. At most `most` wait to be read.
    ///
    /// # Errors
    ///
    /// `AddrInUse` while somebody else receives under that name.
    pub fn datagrams(&self, name: &str, most: usize) -> io::Result<MemoryDatagrams> {
        let mut state = self.state.borrow_mut();
        if state.receiver_called(name).is_some() {
            return Err(io::Error::from(io::ErrorKind::AddrInUse));
        }
        let id = state.new_id();
        let arrived = Arrived {
            name: name.to_owned(),
            most,
            waiting: VecDeque::new(),
        };
        state.arrived.insert(id, arrived);
        drop(state);
        Ok(MemoryDatagrams::new(self.clone(), id))
    }

    /// Makes a socket that sends datagrams to whoever receives under a name at the time.
    pub fn datagram_sender(&self, name: &str) -> MemoryDatagramSender {
        let mut state = self.state.borrow_mut();
        let id = state.new_id();
        state.senders.insert(id, Sending::default());
        drop(state);
        MemoryDatagramSender::new(self.clone(), id, name.to_owned())
    }

    pub(super) fn send_datagram(
        &self,
        sender: SocketId,
        name: &str,
        data: &[u8],
        descriptors: &[BorrowedFd<'_>],
    ) -> io::Result<()> {
        let mut state = self.state.borrow_mut();
        let result = state.send_datagram(sender, name, data, descriptors);
        state.note(10, sender, &result.as_ref().map(|()| data.len()));
        result
    }

    pub(super) fn receive_datagram(&self, id: SocketId) -> Option<(Vec<u8>, Vec<OwnedFd>)> {
        let mut state = self.state.borrow_mut();
        let received = state.arrived.get_mut(&id)?.waiting.pop_front()?;
        state.note::<()>(11, id, &Ok(received.0.len()));
        state.raise_senders(id);
        Some(received)
    }

    pub(super) fn waiting_datagrams(&self, id: SocketId) -> usize {
        let state = self.state.borrow();
        let arrived = state.arrived.get(&id);
        arrived.map_or(0, |arrived| arrived.waiting.len())
    }

    pub(super) fn close_datagrams(&self, id: SocketId) {
        let mut state = self.state.borrow_mut();
        let closed = state.arrived.remove(&id);
        state.note::<()>(12, id, &Ok(0));
        state.raise_senders(id);
        drop(state);
        drop(closed);
    }

    pub(super) fn watch_sender(
        &self,
        id: SocketId,
        reactor: &mut Reactor,
        token: Token,
    ) -> io::Result<()> {
        let poller = self.poller_of(reactor)?;
        let mut state = self.state.borrow_mut();
        state.unwatch_sender(id);
        if let Some(sending) = state.senders.get_mut(&id) {
            sending.watch = Some((poller, token, true));
            state.ready[poller].push_back(id);
        }
        Ok(())
    }

    pub(super) fn unwatch_sender(&self, id: SocketId) {
        self.state.borrow_mut().unwatch_sender(id);
    }

    pub(super) fn close_sender(&self, id: SocketId) {
        let mut state = self.state.borrow_mut();
        state.unwatch_sender(id);
        state.senders.remove(&id);
    }

    /// How many listeners are open.
    pub fn open_listeners(&self) -> usize {
        let mut state = self.state.borrow_mut();
        state.reap();
        state.listeners.len()
    }

    /// How many connections wait to be accepted on the listener of that name. `None` if
    /// there is no such listener.
    pub fn waiting(&self, name: &str) -> Option<usize> {
        let mut state = self.state.borrow_mut();
        let listener = state.listener_called(name)?;
        let listening = state.listeners.get(&listener)?;
        Some(listening.waiting.len())
    }

    /// Whether the listener of that name listens already. `None` if there is no such
    /// listener.
    pub fn is_listening(&self, name: &str) -> Option<bool> {
        let mut state = self.state.borrow_mut();
        let listener = state.listener_called(name)?;
        Some(!state.is_bound_only(listener))
    }

    /// The ends of the connections that were made to listeners of that name, in the order
    /// in which they were: whose end connected, and whose accepted, or will. Those of
    /// which an end is closed are left out.
    pub fn connected(&self, name: &str) -> Vec<(SocketId, SocketId)> {
        let state = self.state.borrow();
        let is_open = |id: &SocketId| state.ends.contains_key(id);
        let made = state.made.iter().filter(|(to, ..)| to == name);
        made.map(|(_, one, other)| (*one, *other))
            .filter(|(one, other)| is_open(one) && is_open(other))
            .collect()
    }

    /// Takes the first connection that waits.
    pub(super) fn accept(&self, listener: SocketId, holder: Holder) -> io::Result<MemorySocket> {
        self.accept_as(listener, holder, MemorySocket::new)
    }

    /// The same, as a socket of the listener's shape.
    pub(super) fn accept_as<S>(
        &self,
        listener: SocketId,
        holder: Holder,
        socket_of: impl FnOnce(Self, SocketId) -> S,
    ) -> io::Result<S> {
        let mut state = self.state.borrow_mut();
        let accepted = state.accept(listener, holder);
        let noted = accepted.as_ref().map(|socket| socket.0 as usize);
        state.note(9, listener, &noted);
        drop(state);
        let socket = accepted?;
        let accepted = socket_of(self.clone(), socket);
        self.state.borrow_mut().let_go(socket);
        Ok(accepted)
    }

    /// The name under which a listener listens; `None` for the end of a connection.
    pub(super) fn name_of(&self, listener: SocketId) -> Option<String> {
        let state = self.state.borrow();
        let listening = state.listeners.get(&listener)?;
        Some(listening.name.clone())
    }

    /// What shape the connections of a listener have, or a connection has itself.
    pub(super) fn shape_of(&self, socket: SocketId) -> Option<Shape> {
        let state = self.state.borrow();
        let listening = state.listeners.get(&socket).map(|it| it.shape);
        listening.or_else(|| state.ends.get(&socket).map(|end| end.shape))
    }

    /// Sends one packet.
    pub(super) fn send_packet(
        &self,
        socket: SocketId,
        data: &[u8],
        descriptors: &[BorrowedFd<'_>],
    ) -> io::Result<()> {
        let mut state = self.state.borrow_mut();
        let result = state.send_packet(socket, data, descriptors);
        state.note(13, socket, &result.as_ref().map(|()| data.len()));
        result
    }

    /// Takes the first packet that has arrived; `None` for the end.
    pub(super) fn read_packet(&self, socket: SocketId) -> io::Result<Option<ArrivedPacket>> {
        let mut state = self.state.borrow_mut();
        let result = state.read_packet(socket);
        let noted = result.as_ref().map(|packet| {
            let packet = packet.as_ref();
            packet.map_or(0, |it| (it.bytes.len() + 1) << 8 | it.descriptors.len())
        });
        state.note(14, socket, &noted);
        result
    }

    /// Has the `nth` send of a socket from now on fail with `error`. 0 is the next one.
    /// The send takes no byte and no descriptor.
    ///
    /// Any error may be given. An event follows `WouldBlock`, as it follows the real
    /// one. `Interrupted` is not seen, since the transport repeats such a call. To have
    /// the error of a real kernel, use [`io::Error::from_raw_os_error`]: an error
    /// without a number is never taken for `ENOBUFS`, for example.
    pub fn fail_send(&self, socket: SocketId, nth: usize, error: io::Error) {
        if let Some(failing) = self.state.borrow_mut().failing_of(socket) {
            failing.sends.push((nth, error));
        }
    }

    /// Has the `nth` read of a socket from now on fail with `error`, as
    /// [`fail_send`](Self::fail_send) does for sends.
    pub fn fail_read(&self, socket: SocketId, nth: usize, error: io::Error) {
        if let Some(failing) = self.state.borrow_mut().failing_of(socket) {
            failing.reads.push((nth, error));
        }
    }

    /// Cuts the next read of a socket that brings descriptors down to the first `kept`
    /// of them, as if descriptor numbers had run out (`MSG_CTRUNC`).
    pub fn truncate_descriptors(&self, socket: SocketId, kept: usize) {
        let mut state = self.state.borrow_mut();
        match state.ends.get_mut(&socket) {
            Some(end) => end.truncated_to = Some(kept),
            None => state.truncate_at_port(socket, kept),
        }
    }

    /// How many ends of connections are open.
    pub fn open_sockets(&self) -> usize {
        let mut state = self.state.borrow_mut();
        state.reap();
        state.ends.len()
    }

    /// How many bytes and descriptors wait to be read from a socket.
    pub fn unread(&self, socket: SocketId) -> (usize, usize) {
        let state = self.state.borrow();
        let inbox = state.ends.get(&socket).map(|end| &end.inbox);
        inbox.into_iter().flatten().fold((0, 0), |sum, buffer| {
            (
                sum.0 + buffer.bytes.len() - buffer.start,
                sum.1 + buffer.descriptors.len(),
            )
        })
    }

    /// A number that is made of everything that has happened so far: the kind, socket
    /// and outcome of each call, and each event. Two runs that differ anywhere differ
    /// here.
    pub fn fingerprint(&self) -> u64 {
        self.state.borrow().fingerprint
    }

    /// Makes a choice with the kernel's own generator, for tests whose other choices
    /// should come from the same seed.
    pub fn choose<T>(&self, choice: impl FnOnce(&mut Random) -> T) -> T {
        choice(&mut self.state.borrow_mut().random)
    }

    pub(super) fn send(
        &self,
        socket: SocketId,
        data: &[IoSlice<'_>],
        descriptors: &[BorrowedFd<'_>],
    ) -> io::Result<usize> {
        let mut state = self.state.borrow_mut();
        let result = state.send(socket, data, descriptors);
        state.note(1, socket, &result);
        result
    }

    /// Reads into `buf`, and appends descriptors to `descriptors`.
    pub(super) fn read(
        &self,
        socket: SocketId,
        buf: &mut [u8],
        descriptors: &mut Vec<OwnedFd>,
    ) -> io::Result<Read> {
        let mut state = self.state.borrow_mut();
        let before = descriptors.len();
        let result = state.read(socket, buf, descriptors);
        let count = descriptors.len() - before;
        let noted = result.as_ref().map(|read| read.bytes << 8 | count);
        state.note(2, socket, &noted);
        result
    }

    pub(super) fn shutdown_write(&self, socket: SocketId) -> io::Result<()> {
        let mut state = self.state.borrow_mut();
        let result = state.shutdown_write(socket);
        let noted = result.as_ref().map(|()| 0);
        state.note(3, socket, &noted);
        result
    }

    pub(super) fn shutdown_read(&self, socket: SocketId) -> io::Result<()> {
        let mut state = self.state.borrow_mut();
        let result = state.shutdown_read(socket);
        let noted = result.as_ref().map(|()| 0);
        state.note(3, socket, &noted);
        result
    }

    /// One more who holds the socket.
    pub(super) fn hold(&self, socket: SocketId) -> Holder {
        let mut state = self.state.borrow_mut();
        let holder = Holder(state.next_holder);
        state.next_holder += 1;
        if let Some(holders) = state.holders_of(socket) {
            *holders += 1;
        }
        holder
    }

    /// Somebody closes his descriptor of it; the last one closes the socket.
    pub(super) fn close(&self, socket: SocketId, holder: Holder) {
        let mut state = self.state.borrow_mut();
        state.unwatch(socket, holder);
        state.let_go(socket);
        state.note::<()>(4, socket, &Ok(0));
    }

    /// A real descriptor that stands for the socket: as long as a copy of it is
    /// open anywhere, so is the socket.
    pub(super) fn park(&self, socket: SocketId) -> io::Result<OwnedFd> {
        // A pipe, and no socket, whose close could take place in another thread.
        let (guard, given) = io::pipe()?;
        sys::set_nonblocking(guard.as_fd())?;
        let given = OwnedFd::from(given);
        let inode = inode(given.as_fd())?;
        let mut state = self.state.borrow_mut();
        let holders = state.holders_of(socket);
        *holders.ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected))? += 1;
        state.parked.push(Parked {
            inode,
            guard,
            socket,
        });
        Ok(given)
    }

    /// The socket that a descriptor stands for, and its kernel.
    pub(super) fn unpark(fd: BorrowedFd<'_>) -> Option<(Self, SocketId)> {
        let inode = inode(fd).ok()?;
        let kernels: Vec<_> =
            KERNELS.with_borrow(|kernels| kernels.iter().filter_map(Weak::upgrade).collect());
        kernels.into_iter().find_map(|state| {
            let socket = {
                let mut state = state.borrow_mut();
                // The number of a file that is gone may be another's by now.
                state.reap();
                let parked = state.parked.iter().find(|parked| parked.inode == inode);
                parked?.socket
            };
            Some((Self { state }, socket))
        })
    }

    /// Mixes a choice of the simulation into the fingerprint.
    pub(super) fn note_choice(&self, choice: usize) {
        let mut state = self.state.borrow_mut();
        state.note::<()>(6, SocketId(0), &Ok(choice));
    }

    pub(super) fn watch(
        &self,
        (socket, holder): (SocketId, Holder),
        reactor: &mut Reactor,
        token: Token,
        interest: Interest,
    ) -> io::Result<()> {
        let poller = self.poller_of(reactor)?;
        let mut state = self.state.borrow_mut();
        if state.listeners.contains_key(&socket) {
            state.unwatch(socket, holder);
            state.watch_listener(
                socket,
                Watch {
                    holder,
                    poller,
                    token,
                    interest,
                    is_raised: false,
                },
            );
            return Ok(());
        }
        // One that is watched already keeps its place in the queue.
        let place = state
            .watch_of(socket)
            .ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected))?;
        let watched = place.as_ref();
        let is_raised = watched.is_some_and(|watch| watch.is_raised && watch.holder == holder);
        let earlier = place.replace(Watch {
            holder,
            poller,
            token,
            interest,
            is_raised,
        });
        if let Some(watch) = earlier.filter(|watch| watch.holder != holder)
            && watch.is_raised
        {
            // It goes on with whoever watches last.
            state.ready[watch.poller].retain(|&ready| ready != socket);
        }
        if state.readiness_of(socket).is_some_and(|it| !it.is_empty()) {
            state.raise(socket, Cause::Any);
        }
        Ok(())
    }

    pub(super) fn unwatch(&self, socket: SocketId, holder: Holder) {
        self.state.borrow_mut().unwatch(socket, holder);
    }

    /// Takes the error that the poller reports, as `SO_ERROR` does.
    pub(super) fn take_error(&self, socket: SocketId) -> Option<io::Error> {
        let mut state = self.state.borrow_mut();
        let end = state.ends.get_mut(&socket)?;
        std::mem::take(&mut end.is_reset).then(sys::simulated::connection_reset)
    }

    /// Whether both directions have ended.
    pub(super) fn is_hung_up(&self, socket: SocketId) -> bool {
        let state = self.state.borrow();
        let end = state.ends.get(&socket);
        end.is_some_and(|end| end.is_read_shut && end.is_write_shut)
    }

    /// Whether the other end has said that nothing more comes, and all of it
    /// was read.
    pub(super) fn is_at_end(&self, socket: SocketId) -> bool {
        let mut state = self.state.borrow_mut();
        state.reap();
        let end = state.ends.get(&socket);
        end.is_none_or(|end| end.inbox.is_empty() && end.is_read_shut)
    }

    /// What this reactor's next turn would be told.
    #[cfg(test)]
    pub(super) fn poll(&self, reactor: &mut Reactor) -> Vec<(Token, Readiness)> {
        let mut events = Vec::new();
        let poller = self.poller_of(reactor).expect("it is of this kernel");
        self.state.borrow_mut().poll(poller, &mut events);
        events
    }

    /// The queue of events for this reactor, made when it is first asked for.
    fn poller_of(&self, reactor: &mut Reactor) -> io::Result<usize> {
        let mut is_new = false;
        let attached = reactor.extension(|| {
            is_new = true;
            let ready = &mut self.state.borrow_mut().ready;
            ready.push(VecDeque::new());
            Attached {
                kernel: self.clone(),
                poller: ready.len() - 1,
            }
        });
        if is_new {
            reactor.set_readiness_source(Poller {
                kernel: self.clone(),
                index: attached.poller,
            });
        } else if !Rc::ptr_eq(&attached.kernel.state, &self.state) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the reactor belongs to another simulated kernel",
            ));
        }
        Ok(attached.poller)
    }
}

/// What a reactor keeps of its kernel.
struct Attached {
    kernel: SimulatedKernel,
    poller: usize,
}

/// The events for one reactor.
struct Poller {
    kernel: SimulatedKernel,
    index: usize,
}

impl ReadinessSource for Poller {
    fn poll(&mut self, events: &mut Vec<(Token, Readiness)>) {
        self.kernel.state.borrow_mut().poll(self.index, events);
    }

    fn has_events(&self) -> bool {
        let mut state = self.kernel.state.borrow_mut();
        state.reap();
        !state.ready[self.index].is_empty()
            || state.has_bound_only(self.index)
            || state.has_late(self.index)
    }
}

/// What connections carry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shape {
    Stream,
    Packets,
}

/// A packet that has arrived.
#[derive(Debug)]
pub(super) struct ArrivedPacket {
    pub(super) bytes: Vec<u8>,
    pub(super) descriptors: Vec<OwnedFd>,
    pub(super) is_truncated: bool,
}

/// What one read brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Read {
    pub(super) bytes: usize,
    pub(super) had_descriptors: bool,
    pub(super) is_truncated: bool,
}

struct State {
    settings: KernelSettings,
    random: Random,
    /// Ordered, so that nothing depends on how names are hashed.
    ends: BTreeMap<SocketId, SimulatedEnd>,
    listeners: BTreeMap<SocketId, Listening>,
    /// Which connections were made, and to listeners of which name.
    made: Vec<(String, SocketId, SocketId)>,
    /// Datagrams that wait, and who sends them.
    arrived: BTreeMap<SocketId, Arrived>,
    senders: BTreeMap<SocketId, Sending>,
    /// Datagram sockets, UDP and UNIX.
    ports: BTreeMap<SocketId, SimulatedPort>,
    pipes: BTreeMap<PipeId, SimulatedPipe>,
    /// The ends of pipes, each of which is an open file.
    open_pipes: BTreeMap<SocketId, OpenPipe>,
    children: BTreeMap<SocketId, SimulatedProcess>,
    /// The port that a UDP socket gets which asks for none.
    next_port: u16,
    /// Sockets that real descriptors stand for.
    parked: Vec<Parked>,
    /// Of whoever is at the other end of a socket.
    credentials: Option<Credentials>,
    next_id: u64,
    next_holder: u64,
    /// For each reactor the sockets that something happened to.
    ready: Vec<VecDeque<SocketId>>,
    fingerprint: u64,
}

/// One of those who hold a socket, as processes hold copies of a descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Holder(u64);

/// A socket that a real descriptor stands for.
struct Parked {
    /// The descriptor's.
    inode: u64,
    /// The other end of what was given out: it ends when no copy is left.
    guard: PipeReader,
    socket: SocketId,
}

thread_local! {
    /// All kernels of this thread, to find the one whose socket a descriptor
    /// stands for.
    static KERNELS: RefCell<Vec<Weak<RefCell<State>>>> = const { RefCell::new(Vec::new()) };
}

fn inode(fd: BorrowedFd<'_>) -> io::Result<u64> {
    Ok(File::from(fd.try_clone_to_owned()?).metadata()?.ino())
}

/// A listener, which several may hold and watch.
struct Listening {
    name: String,
    shape: Shape,
    /// Until a poller that watches it is polled.
    is_bound_only: bool,
    holders: usize,
    /// Nobody has accepted them yet.
    waiting: VecDeque<SocketId>,
    watches: Vec<Watch>,
}

/// A socket that sends datagrams.
#[derive(Default)]
struct Sending {
    /// Where the last one went, or was to go.
    to: Option<SocketId>,
    /// The poller, the token, and whether it stands in the poller's queue.
    watch: Option<(usize, Token, bool)>,
}

/// One end of a connection.
struct SimulatedEnd {
    /// May be gone.
    peer: SocketId,
    shape: Shape,
    holders: usize,
    inbox: VecDeque<Buffer>,
    /// What the buffers that were sent from here and not read are charged.
    charged: usize,
    is_read_shut: bool,
    is_write_shut: bool,
    /// The other end was closed with bytes of ours unread, which the next read
    /// is told.
    is_reset: bool,
    watch: Option<Watch>,
    failing: Failing,
    truncated_to: Option<usize>,
}

/// The calls that a test has fail.
#[derive(Debug, Default)]
struct Failing {
    /// How many succeed before it, and the error.
    sends: Vec<(usize, io::Error)>,
    reads: Vec<(usize, io::Error)>,
}

impl Failing {
    /// The error that this send was told to fail with.
    fn send(&mut self) -> Option<io::Error> {
        Self::next(&mut self.sends)
    }

    fn read(&mut self) -> Option<io::Error> {
        Self::next(&mut self.reads)
    }

    fn next(list: &mut Vec<(usize, io::Error)>) -> Option<io::Error> {
        let due = list.iter().position(|(nth, _)| *nth == 0);
        for (nth, _) in list.iter_mut() {
            *nth = nth.saturating_sub(1);
        }
        let (_, error) = list.remove(due?);
        (error.kind() != io::ErrorKind::Interrupted).then_some(error)
    }
}

/// A part of one send, with its descriptors if it is the first.
struct Buffer {
    bytes: Vec<u8>,
    /// How far it was read.
    start: usize,
    descriptors: Vec<OwnedFd>,
    charge: usize,
}

/// How a socket is watched: what an edge-triggered poller keeps of it.
#[derive(Debug)]
struct Watch {
    holder: Holder,
    poller: usize,
    token: Token,
    interest: Interest,
    /// It stands in the poller's queue.
    is_raised: bool,
}

/// What has happened to a socket: a watch for reading is not woken by room to
/// write.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Cause {
    Any,
    Arrival,
    Room,
}

impl State {
    fn add_pair(&mut self, shape: Shape) -> (SocketId, SocketId) {
        let (one, other) = (SocketId(self.next_id), SocketId(self.next_id + 1));
        self.next_id += 2;
        self.ends.insert(one, SimulatedEnd::new(other, shape));
        self.ends.insert(other, SimulatedEnd::new(one, shape));
        (one, other)
    }

    fn new_id(&mut self) -> SocketId {
        self.next_id += 1;
        SocketId(self.next_id - 1)
    }

    fn receiver_called(&self, name: &str) -> Option<SocketId> {
        let mut all = self.arrived.iter();
        let (id, _) = all.find(|(_, arrived)| arrived.name == name)?;
        Some(*id)
    }

    fn send_datagram(
        &mut self,
        sender: SocketId,
        name: &str,
        data: &[u8],
        descriptors: &[BorrowedFd<'_>],
    ) -> io::Result<()> {
        let Some(receiver) = self.receiver_called(name) else {
            return Err(io::Error::from(io::ErrorKind::ConnectionRefused));
        };
        if let Some(sending) = self.senders.get_mut(&sender) {
            sending.to = Some(receiver);
        }
        let percent = self.settings.passing_errors_percent;
        if percent > 0 && self.random.chance(percent) {
            let all = sys::simulated::PASSING;
            let error = all[self.random.below(all.len())];
            return Err(io::Error::from_raw_os_error(error));
        }
        let copies = descriptors.iter().map(BorrowedFd::try_clone_to_owned);
        let copies = copies.collect::<io::Result<Vec<_>>>()?;
        match self.arrived.get_mut(&receiver) {
            Some(arrived) if arrived.waiting.len() < arrived.most => {
                arrived.waiting.push_back((data.to_vec(), copies));
                Ok(())
            }
            _ => Err(sys::simulated::would_block()),
        }
    }

    /// There may be room for whoever sends there.
    fn raise_senders(&mut self, receiver: SocketId) {
        for (id, sending) in &mut self.senders {
            if sending.to == Some(receiver)
                && let Some((poller, _, is_raised)) = &mut sending.watch
                && !std::mem::replace(is_raised, true)
            {
                self.ready[*poller].push_back(*id);
            }
        }
    }

    fn unwatch_sender(&mut self, id: SocketId) {
        let watch = self.senders.get_mut(&id).and_then(|it| it.watch.take());
        if let Some((poller, _, true)) = watch {
            self.ready[poller].retain(|&ready| ready != id);
        }
    }

    /// The event of a sender, if it is one and there is room.
    fn poll_sender(&mut self, id: SocketId) -> Option<(Token, Readiness)> {
        let sending = self.senders.get_mut(&id)?;
        let (_, token, is_raised) = sending.watch.as_mut()?;
        *is_raised = false;
        let arrived = sending.to.and_then(|to| self.arrived.get(&to));
        let is_full = arrived.is_some_and(|arrived| arrived.waiting.len() >= arrived.most);
        (!is_full).then_some((*token, Readiness::WRITABLE))
    }

    /// The open listener of that name.
    fn listener_called(&mut self, name: &str) -> Option<SocketId> {
        self.reap();
        let mut listeners = self.listeners.iter();
        let (id, _) = listeners.find(|(_, listening)| listening.name == name)?;
        Some(*id)
    }

    fn is_bound_only(&self, listener: SocketId) -> bool {
        let listening = self.listeners.get(&listener);
        listening.is_some_and(|listening| listening.is_bound_only)
    }

    /// Whether a listener of this poller is about to listen: time does not pass before.
    fn has_bound_only(&self, poller: usize) -> bool {
        let is_here = |it: &Listening| it.watches.iter().any(|watch| watch.poller == poller);
        let mut listeners = self.listeners.values();
        listeners.any(|listening| listening.is_bound_only && is_here(listening))
    }

    fn holders_of(&mut self, socket: SocketId) -> Option<&mut usize> {
        if self.ends.contains_key(&socket) {
            return self.ends.get_mut(&socket).map(|it| &mut it.holders);
        }
        if self.listeners.contains_key(&socket) {
            return self.listeners.get_mut(&socket).map(|it| &mut it.holders);
        }
        if self.ports.contains_key(&socket) {
            return self.ports.get_mut(&socket).map(|it| &mut it.holders);
        }
        if self.open_pipes.contains_key(&socket) {
            return self.open_pipes.get_mut(&socket).map(|it| &mut it.holders);
        }
        self.children.get_mut(&socket).map(|it| &mut it.holders)
    }

    /// How it is watched, for everything that one watches at a time.
    fn watch_of(&mut self, id: SocketId) -> Option<&mut Option<Watch>> {
        if self.ends.contains_key(&id) {
            return self.ends.get_mut(&id).map(|it| &mut it.watch);
        }
        if self.ports.contains_key(&id) {
            return self.ports.get_mut(&id).map(|it| &mut it.watch);
        }
        if self.open_pipes.contains_key(&id) {
            return self.open_pipes.get_mut(&id).map(|it| &mut it.watch);
        }
        self.children.get_mut(&id).map(|it| &mut it.watch)
    }

    fn failing_of(&mut self, id: SocketId) -> Option<&mut Failing> {
        if self.ends.contains_key(&id) {
            return self.ends.get_mut(&id).map(|it| &mut it.failing);
        }
        if self.ports.contains_key(&id) {
            return self.ports.get_mut(&id).map(|it| &mut it.failing);
        }
        self.open_pipes.get_mut(&id).map(|it| &mut it.failing)
    }

    /// What a poller reports of it, of what it was asked to.
    fn readiness_of(&mut self, id: SocketId) -> Option<Readiness> {
        if let Some(end) = self.ends.get(&id) {
            return Some(end.readiness(self.settings.send_buffer));
        }
        if self.ports.contains_key(&id) {
            return Some(self.port_readiness(id));
        }
        if self.open_pipes.contains_key(&id) {
            return Some(self.pipe_readiness(id));
        }
        self.children.get(&id).map(SimulatedProcess::readiness)
    }

    /// Whether a choice falls so, of a hundred.
    fn happens(&mut self, percent: u8) -> bool {
        percent > 0 && self.random.chance(percent)
    }

    fn accept(&mut self, listener: SocketId, holder: Holder) -> io::Result<SocketId> {
        let percent = self.settings.passing_errors_percent;
        let fails = percent > 0 && self.random.chance(percent);
        let Some(listening) = self.listeners.get_mut(&listener) else {
            return Err(io::Error::from(io::ErrorKind::NotConnected));
        };
        if fails {
            // As if it came only now.
            let watches = &mut listening.watches;
            if let Some(watch) = watches.iter_mut().find(|watch| watch.holder == holder)
                && !std::mem::replace(&mut watch.is_raised, true)
            {
                self.ready[watch.poller].push_back(listener);
            }
            return Err(sys::simulated::would_block());
        }
        let waiting = listening.waiting.pop_front();
        waiting.ok_or_else(sys::simulated::would_block)
    }

    fn watch_listener(&mut self, listener: SocketId, watch: Watch) {
        if let Some(listening) = self.listeners.get_mut(&listener) {
            listening.watches.push(watch);
            if !listening.waiting.is_empty() {
                self.raise_listener(listener);
            }
        }
    }

    /// Queues a listener for everybody who watches it.
    fn raise_listener(&mut self, listener: SocketId) {
        if let Some(listening) = self.listeners.get_mut(&listener) {
            for watch in &mut listening.watches {
                if !std::mem::replace(&mut watch.is_raised, true) {
                    self.ready[watch.poller].push_back(listener);
                }
            }
        }
    }

    fn close_listener(&mut self, listener: SocketId) {
        if let Some(listening) = self.listeners.remove(&listener) {
            for watch in listening.watches {
                self.ready[watch.poller].retain(|&ready| ready != listener);
            }
            for socket in listening.waiting {
                self.let_go(socket);
            }
        }
    }

    fn end(&mut self, socket: SocketId) -> io::Result<&mut SimulatedEnd> {
        self.ends
            .get_mut(&socket)
            .ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected))
    }

    fn send(
        &mut self,
        socket: SocketId,
        data: &[IoSlice<'_>],
        descriptors: &[BorrowedFd<'_>],
    ) -> io::Result<usize> {
        let asked = data.iter().map(|slice| slice.len()).sum();
        let peer = self.check_send(socket, asked, descriptors.len())?;
        // Before anything is taken, and all or none.
        let copies = descriptors.iter().map(BorrowedFd::try_clone_to_owned);
        let mut copies = copies.collect::<io::Result<Vec<_>>>()?;

        let length = self.cut(asked, self.settings.largest_send);
        let limit = self.settings.send_buffer;
        let largest = (limit / 2 - 64).min(BUFFER_BYTES);
        let mut slices = data.iter().map(|slice| &**slice);
        let mut rest: &[u8] = &[];
        let mut sent = 0;
        while sent < length {
            let end = self.end(socket)?;
            if end.charged >= limit {
                break;
            }
            let size = (length - sent).min(largest);
            let charge = charge(size);
            end.charged += charge;
            let mut bytes = Vec::with_capacity(size);
            while bytes.len() < size {
                if rest.is_empty() {
                    rest = slices.next().unwrap_or_default();
                    continue;
                }
                let (fits, left) = rest.split_at(rest.len().min(size - bytes.len()));
                bytes.extend_from_slice(fits);
                rest = left;
            }
            self.end(peer)?.inbox.push_back(Buffer {
                bytes,
                start: 0,
                descriptors: std::mem::take(&mut copies),
                charge,
            });
            self.raise(peer, Cause::Arrival);
            sent += size;
        }
        if sent == 0 && asked > 0 {
            return Err(sys::simulated::would_block());
        }
        Ok(sent)
    }

    /// The peer of a socket that may send so much, or why it may not.
    fn check_send(
        &mut self,
        socket: SocketId,
        bytes: usize,
        descriptors: usize,
    ) -> io::Result<SocketId> {
        let end = self.end(socket)?;
        if let Some(error) = end.failing.send() {
            if error.kind() == io::ErrorKind::WouldBlock {
                self.raise(socket, Cause::Room);
            }
            return Err(error);
        }
        let (peer, is_shut) = (end.peer, end.is_write_shut);
        if let Some(error) = self.error_by_chance(socket, Cause::Room) {
            return Err(error);
        }
        if descriptors > MAX_DESCRIPTORS || (bytes == 0 && descriptors > 0) {
            return Err(sys::simulated::invalid());
        }
        if is_shut {
            return Err(sys::simulated::broken_pipe());
        }
        Ok(peer)
    }

    fn read(
        &mut self,
        socket: SocketId,
        buf: &mut [u8],
        descriptors: &mut Vec<OwnedFd>,
    ) -> io::Result<Read> {
        let end = self.end(socket)?;
        if let Some(error) = end.failing.read() {
            if error.kind() == io::ErrorKind::WouldBlock {
                self.raise(socket, Cause::Arrival);
            }
            return Err(error);
        }
        if let Some(error) = self.error_by_chance(socket, Cause::Arrival) {
            return Err(error);
        }
        let end = self.end(socket)?;
        if end.inbox.is_empty() {
            if std::mem::take(&mut end.is_reset) {
                return Err(sys::simulated::connection_reset());
            }
            if !end.is_read_shut {
                return Err(sys::simulated::would_block());
            }
        }
        let length = if end.is_read_shut {
            buf.len()
        } else {
            self.cut(buf.len(), self.settings.largest_read)
        };
        let end = self.end(socket)?;
        let peer = end.peer;
        let (read, freed) = end.take(&mut buf[..length], descriptors);
        let is_cut = read.bytes == length && length < buf.len() && !end.inbox.is_empty();
        for charge in freed {
            self.release(peer, charge);
        }
        if is_cut {
            self.raise(socket, Cause::Arrival);
        }
        Ok(read)
    }

    /// As `unix_dgram_sendmsg` does it: all of a packet, or nothing. (A peer that does not
    /// read would hold up more than the buffer does, by `net.unix.max_dgram_qlen`; that is
    /// not modelled.)
    fn send_packet(
        &mut self,
        socket: SocketId,
        data: &[u8],
        descriptors: &[BorrowedFd<'_>],
    ) -> io::Result<()> {
        // Its one byte is there: packets have none to travel with.
        let peer = self.check_send(socket, data.len().max(1), descriptors.len())?;
        let limit = self.settings.send_buffer;
        if data.len() > limit - 32 {
            return Err(sys::simulated::too_long());
        }
        let end = self.end(socket)?;
        if end.charged >= limit {
            return Err(sys::simulated::would_block());
        }
        let copies = descriptors.iter().map(BorrowedFd::try_clone_to_owned);
        let descriptors = copies.collect::<io::Result<Vec<_>>>()?;
        let charge = packet_charge(data.len());
        self.end(socket)?.charged += charge;
        self.end(peer)?.inbox.push_back(Buffer {
            bytes: data.to_vec(),
            start: 0,
            descriptors,
            charge,
        });
        self.raise(peer, Cause::Arrival);
        Ok(())
    }

    /// As `unix_dgram_recvmsg` does it: an error that waits comes first.
    fn read_packet(&mut self, socket: SocketId) -> io::Result<Option<ArrivedPacket>> {
        let end = self.end(socket)?;
        if let Some(error) = end.failing.read() {
            if error.kind() == io::ErrorKind::WouldBlock {
                self.raise(socket, Cause::Arrival);
            }
            return Err(error);
        }
        if let Some(error) = self.error_by_chance(socket, Cause::Arrival) {
            return Err(error);
        }
        let end = self.end(socket)?;
        if std::mem::take(&mut end.is_reset) {
            return Err(sys::simulated::connection_reset());
        }
        let Some(mut buffer) = end.inbox.pop_front() else {
            return match end.is_read_shut {
                true => Ok(None),
                false => Err(sys::simulated::would_block()),
            };
        };
        let peer = end.peer;
        let mut is_truncated = false;
        if !buffer.descriptors.is_empty()
            && let Some(kept) = end.truncated_to.take()
        {
            is_truncated = kept < buffer.descriptors.len();
            buffer.descriptors.truncate(kept);
        }
        self.release(peer, buffer.charge);
        Ok(Some(ArrivedPacket {
            bytes: buffer.bytes,
            descriptors: buffer.descriptors,
            is_truncated,
        }))
    }

    /// The error that this call fails with by the settings: of transports only,
    /// not of those who play their peers.
    fn error_by_chance(&mut self, socket: SocketId, cause: Cause) -> Option<io::Error> {
        let KernelSettings {
            passing_errors_percent: passing,
            lasting_errors_per_10_000: lasting,
            ..
        } = self.settings;
        if passing == 0 && lasting == 0 {
            return None;
        }
        self.watch_of(socket)?.as_ref()?;
        // Neither blocks any more once the other end is closed.
        let is_over = match self.ends.get(&socket) {
            Some(end) => end.is_read_shut,
            None => self.is_pipe_over(socket),
        };
        if self.random.below(10_000) < usize::from(lasting) {
            let all = sys::simulated::LASTING;
            let error = all[self.random.below(all.len())];
            return Some(io::Error::from_raw_os_error(error));
        }
        if is_over || !self.random.chance(passing) {
            return None;
        }
        if cause == Cause::Room && self.random.chance(50) {
            let all = sys::simulated::PASSING;
            let error = all[self.random.below(all.len())];
            return Some(io::Error::from_raw_os_error(error));
        }
        self.raise(socket, cause);
        Some(sys::simulated::would_block())
    }

    /// How much of a call of `asked` bytes is done.
    fn cut(&mut self, asked: usize, largest: usize) -> usize {
        let length = asked.min(largest);
        let percent = self.settings.cut_percent;
        if percent > 0 && length > 1 && self.random.chance(percent) {
            1 + self.random.below(length - 1)
        } else {
            length
        }
    }

    /// Takes note that a buffer sent by `socket` is gone.
    fn release(&mut self, socket: SocketId, charge: usize) {
        let limit = self.settings.send_buffer;
        if let Some(end) = self.ends.get_mut(&socket) {
            end.charged -= charge;
            // The kernel counts one byte for the socket, and has kept one of
            // the buffer's when it asks.
            if (end.charged + 2) * 4 <= limit {
                self.raise(socket, Cause::Room);
            }
        }
    }

    fn shutdown_write(&mut self, socket: SocketId) -> io::Result<()> {
        let end = self.end(socket)?;
        end.is_write_shut = true;
        let peer = end.peer;
        self.raise(socket, Cause::Any);
        if let Some(peer_end) = self.ends.get_mut(&peer) {
            peer_end.is_read_shut = true;
            self.raise(peer, Cause::Any);
        }
        Ok(())
    }

    /// What has arrived stays to be read, before the end.
    fn shutdown_read(&mut self, socket: SocketId) -> io::Result<()> {
        let end = self.end(socket)?;
        end.is_read_shut = true;
        let peer = end.peer;
        self.raise(socket, Cause::Any);
        if let Some(peer_end) = self.ends.get_mut(&peer) {
            peer_end.is_write_shut = true;
            self.raise(peer, Cause::Any);
        }
        Ok(())
    }

    /// Notices which of the real descriptors that stand for sockets are gone.
    fn reap(&mut self) {
        let mut gone = Vec::new();
        self.parked.retain(|parked| {
            // Nobody writes to it: it has nothing to say but its end.
            let is_gone = matches!((&parked.guard).read(&mut [0]), Ok(0));
            if is_gone {
                gone.push(parked.socket);
            }
            !is_gone
        });
        for socket in gone {
            self.let_go(socket);
        }
    }

    /// One holder less.
    fn let_go(&mut self, socket: SocketId) {
        let Some(holders) = self.holders_of(socket) else {
            return;
        };
        *holders -= 1;
        if *holders > 0 {
            return;
        }
        if self.listeners.contains_key(&socket) {
            self.close_listener(socket);
        } else if self.ports.contains_key(&socket) {
            self.close_port(socket);
        } else if self.open_pipes.contains_key(&socket) {
            self.close_pipe(socket);
        } else if self.children.contains_key(&socket) {
            self.forget_child(socket);
        } else {
            self.close(socket);
        }
    }

    fn close(&mut self, socket: SocketId) {
        let Some(end) = self.ends.remove(&socket) else {
            return;
        };
        if let Some(watch) = &end.watch {
            self.forget_event(socket, watch);
        }
        if let Some(peer) = self.ends.get_mut(&end.peer) {
            peer.is_read_shut = true;
            peer.is_write_shut = true;
            peer.is_reset |= !end.inbox.is_empty();
            self.raise(end.peer, Cause::Any);
        }
        for buffer in end.inbox {
            self.release(end.peer, buffer.charge);
            // The descriptors in it are closed here.
        }
    }

    fn unwatch(&mut self, socket: SocketId, holder: Holder) {
        if let Some(listening) = self.listeners.get_mut(&socket) {
            let watches = &mut listening.watches;
            if let Some(place) = watches.iter().position(|watch| watch.holder == holder) {
                let watch = watches.swap_remove(place);
                self.ready[watch.poller].retain(|&ready| ready != socket);
            }
            return;
        }
        let watch = self.watch_of(socket);
        if let Some(watch) = watch.and_then(|it| it.take_if(|watch| watch.holder == holder)) {
            self.forget_event(socket, &watch);
        }
    }

    /// Takes out of the queue what is not watched any more.
    fn forget_event(&mut self, socket: SocketId, watch: &Watch) {
        if watch.is_raised {
            self.ready[watch.poller].retain(|&ready| ready != socket);
        }
    }

    /// Queues a socket for its poller. What it is ready for is looked at when
    /// it is polled, so several causes make one event.
    fn raise(&mut self, socket: SocketId, cause: Cause) {
        let Some(watch) = self.watch_of(socket).and_then(Option::as_mut) else {
            return;
        };
        let is_wanted = match (cause, watch.interest) {
            (Cause::Any, _) | (_, Interest::Both) => true,
            (Cause::Arrival, interest) => interest == Interest::Readable,
            (Cause::Room, interest) => interest == Interest::Writable,
        };
        if is_wanted && !watch.is_raised {
            watch.is_raised = true;
            let poller = watch.poller;
            self.ready[poller].push_back(socket);
        }
    }

    fn poll(&mut self, poller: usize, events: &mut Vec<(Token, Readiness)>) {
        self.reap();
        for listening in self.listeners.values_mut() {
            let is_here = listening.watches.iter().any(|it| it.poller == poller);
            listening.is_bound_only &= !is_here;
        }
        self.bring_late(poller);
        let waiting = self.ready[poller].len();
        let count = match self.settings.delivery {
            Delivery::Batch => waiting,
            Delivery::OneAtATime => waiting.min(1),
            Delivery::Random if waiting > 1 => 1 + self.random.below(waiting),
            Delivery::Random => waiting,
        };
        for _ in 0..count {
            let queue = &mut self.ready[poller];
            let next = match self.settings.delivery {
                Delivery::Random if queue.len() > 1 => {
                    let index = self.random.below(queue.len());
                    queue.remove(index)
                }
                _ => queue.pop_front(),
            };
            if let Some(event) = next.and_then(|sender| self.poll_sender(sender)) {
                events.push(event);
            } else if let Some(listener) = next
                && let Some(listening) = self.listeners.get_mut(&listener)
            {
                let mut watches = listening.watches.iter_mut();
                let is_here = |watch: &&mut Watch| watch.poller == poller && watch.is_raised;
                if let Some(watch) = watches.find(is_here) {
                    watch.is_raised = false;
                    // Somebody else may have been quicker.
                    if !listening.waiting.is_empty() {
                        let token = watch.token;
                        events.push((token, Readiness::READABLE));
                        // Not the token: no two runs in a process have the same.
                        self.note::<()>(5, listener, &Ok(poller));
                    }
                }
            } else if let Some(socket) = next
                && let Some(readiness) = self.readiness_of(socket)
                && let Some(watch) = self.watch_of(socket).and_then(Option::as_mut)
            {
                watch.is_raised = false;
                let token = watch.token;
                if !readiness.is_empty() {
                    events.push((token, readiness));
                    self.note::<()>(5, socket, &Ok(poller));
                }
            }
        }
    }

    /// Mixes one thing that happened into the fingerprint.
    fn note<E>(&mut self, kind: u64, socket: SocketId, result: &Result<usize, E>) {
        let outcome = result.as_ref().map_or(u64::MAX, |count| *count as u64);
        for word in [kind, socket.0, outcome] {
            let mixed = (self.fingerprint ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            self.fingerprint = mixed ^ (mixed >> 29);
        }
    }
}

impl SimulatedEnd {
    fn new(peer: SocketId, shape: Shape) -> Self {
        Self {
            peer,
            shape,
            holders: 0,
            inbox: VecDeque::new(),
            charged: 0,
            is_read_shut: false,
            is_write_shut: false,
            is_reset: false,
            watch: None,
            failing: Failing::default(),
            truncated_to: None,
        }
    }

    /// Moves what has arrived into `room`, up to the first descriptors. Also returns which
    /// buffers of the sender this has emptied.
    fn take(&mut self, room: &mut [u8], descriptors: &mut Vec<OwnedFd>) -> (Read, Vec<usize>) {
        let mut read = Read {
            bytes: 0,
            had_descriptors: false,
            is_truncated: false,
        };
        let mut freed = Vec::new();
        while read.bytes < room.len()
            && let Some(buffer) = self.inbox.front_mut()
        {
            let unread = &buffer.bytes[buffer.start..];
            let count = unread.len().min(room.len() - read.bytes);
            room[read.bytes..read.bytes + count].copy_from_slice(&unread[..count]);
            read.bytes += count;
            buffer.start += count;
            // They come with the first byte of their buffer.
            if !buffer.descriptors.is_empty() {
                read.had_descriptors = true;
                if let Some(kept) = self.truncated_to.take() {
                    read.is_truncated = kept < buffer.descriptors.len();
                    buffer.descriptors.truncate(kept);
                }
                descriptors.append(&mut buffer.descriptors);
            }
            if buffer.start < buffer.bytes.len() {
                break;
            }
            // Room is made by whole buffers only.
            freed.push(buffer.charge);
            self.inbox.pop_front();
            if read.had_descriptors {
                break;
            }
        }
        (read, freed)
    }

    /// What a poller reports, of what it was asked to.
    fn readiness(&self, send_buffer: usize) -> Readiness {
        let interest = self.watch.as_ref().map(|watch| watch.interest);
        let wants_reading = matches!(interest, Some(Interest::Readable | Interest::Both));
        let wants_writing = matches!(interest, Some(Interest::Writable | Interest::Both));
        let is_hung_up = self.is_read_shut && self.is_write_shut;
        let is_writable = wants_writing && (self.charged + 1) * 4 <= send_buffer;
        let mut readiness = Readiness::EMPTY;
        if wants_reading && (self.is_read_shut || !self.inbox.is_empty()) {
            readiness |= Readiness::READABLE;
        }
        if is_writable {
            readiness |= Readiness::WRITABLE;
        }
        if is_hung_up || (wants_reading && self.is_read_shut) {
            readiness |= Readiness::READ_CLOSED;
        }
        if is_hung_up || (is_writable && self.is_reset) {
            readiness |= Readiness::WRITE_CLOSED;
        }
        if self.is_reset {
            readiness |= Readiness::ERROR;
        }
        readiness
    }
}

/// What a buffer of `size` bytes of a stream is charged.
fn charge(size: usize) -> usize {
    charge_beyond(size, HEAD_BYTES)
}

/// What a datagram or packet of `size` bytes is charged (`unix_dgram_sendmsg`): more of it
/// is in one piece.
fn packet_charge(size: usize) -> usize {
    charge_beyond(size, 4 * PAGE - SHARED_INFO)
}

/// What a buffer is charged of which everything beyond `largest_head` is in pages.
fn charge_beyond(size: usize, largest_head: usize) -> usize {
    let in_pages = size.saturating_sub(largest_head).min(MOST_FRAGMENTS * PAGE);
    let in_pages = in_pages.next_multiple_of(PAGE).min(size);
    let head = (size - in_pages).next_multiple_of(64) + SHARED_INFO;
    head.next_power_of_two() + DESCRIPTION + in_pages.next_multiple_of(PAGE)
}

impl fmt::Debug for SimulatedKernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.state.borrow();
        f.debug_struct("SimulatedKernel")
            .field("settings", &state.settings)
            .field("open_sockets", &state.ends.len())
            .finish_non_exhaustive()
    }
}

/// The socket's name in its kernel, as log lines have it.
impl fmt::Display for SocketId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "memory {}", self.0)
    }
}
