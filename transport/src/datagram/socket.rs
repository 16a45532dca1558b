//! The trait of datagram sockets, in which their kinds differ.

use std::any::Any;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use bowline_protocol::{Address, AddressRef, Credentials, PassedDescriptor, SendRefusal};
use bowline_reactor::{Interest, Reactor, Token};

use super::queue::SendQueue;
use crate::endpoint::ConnectionSocket;
use crate::file_descriptor::not_connected;
use crate::kinds::address_ref;
use crate::sys::{MessageBatch, NameRef};

/// A datagram socket under a [`Port`](crate::Port). It may be of a kind that comes with
/// bowline, or of yours. Its calls do not block.
pub trait DatagramSocket: 'static {
    /// The name of this kind of socket in log lines.
    fn kind(&self) -> &'static str;

    /// Our address. It is known after the close too.
    fn host(&self) -> Address;

    /// The peer's address, if the socket is connected. It is known after the close too.
    fn peer(&self) -> Option<Address>;

    /// The descriptor that the poller watches. `None` once closed, or if the poller
    /// does not watch this socket.
    fn source(&self) -> Option<BorrowedFd<'_>>;

    /// Whether it was not closed.
    #[inline]
    fn is_open(&self) -> bool {
        self.source().is_some()
    }

    /// Has the poller report readability under `token`. With `writes` it reports room
    /// for more too. That is asked for later, and at most once.
    ///
    /// # Errors
    ///
    /// Those of epoll_ctl(2).
    fn watch(&self, reactor: &mut Reactor, token: Token, writes: bool) -> io::Result<()> {
        match (self.source(), writes) {
            (Some(source), false) => reactor.watch(token, source, Interest::Readable),
            (Some(source), true) => reactor.rewatch(token, source, Interest::Both),
            (None, _) => Err(not_connected()),
        }
    }

    /// Has the poller report nothing any more.
    fn unwatch(&self, reactor: &mut Reactor) {
        if let Some(source) = self.source() {
            reactor.unwatch(source);
        }
    }

    /// The room for a datagram, in bytes. The rest of a longer one is lost.
    fn room(&self) -> usize;

    /// Receives up to `count` datagrams, and returns how many. Fewer mean that no more
    /// wait.
    ///
    /// # Errors
    ///
    /// `WouldBlock` if none waits. Three kinds of errors do not end anything:
    /// `WouldBlock`, a [refusal](Self::is_refusal) of a datagram that was sent before,
    /// and an error that [passes](crate::is_passing_shortage). Any other error closes
    /// the socket.
    fn receive(&mut self, arrivals: &mut Arrivals, count: usize) -> io::Result<usize>;

    /// Sends some of the waiting datagrams. Returns how many were taken from the front,
    /// at least one.
    ///
    /// # Errors
    ///
    /// The reason why the first one was not taken. [`after`](Self::after) decides what
    /// happens to it.
    fn send(&mut self, outgoing: &Outgoing<'_>) -> io::Result<usize>;

    /// Takes the error that waits for the next call (`SO_ERROR`), such as what an ICMP
    /// message has reported. Asked while nothing is received. The default has none.
    fn take_error(&mut self) -> Option<io::Error> {
        None
    }

    /// Decides what follows an error of [`send`](Self::send). Its first datagram was to
    /// go to `to`, or to the peer.
    fn after(&self, error: &io::Error, to: Option<AddressRef<'_>>) -> AfterSendError;

    /// Whether an error means that the peer is not there, or cannot be reached.
    fn is_refusal(&self, error: &io::Error) -> bool {
        matches!(
            error.kind(),
            io::ErrorKind::ConnectionRefused
                | io::ErrorKind::ConnectionReset
                | io::ErrorKind::HostUnreachable
                | io::ErrorKind::NetworkUnreachable
                | io::ErrorKind::NotConnected
                | io::ErrorKind::NetworkDown
        )
    }

    /// The reason why a datagram of this length cannot be sent, if that is known
    /// without trying.
    fn refuses(&self, length: usize, to: Option<AddressRef<'_>>) -> Option<SendRefusal>;

    /// Connects, or connects to another peer.
    ///
    /// # Errors
    ///
    /// `InvalidInput` if the address is of another family. Otherwise those of
    /// connect(2).
    fn connect(&mut self, peer: AddressRef<'_>) -> io::Result<()>;

    /// How many datagrams were lost since earlier ones were not read.
    ///
    /// # Errors
    ///
    /// The kernel's.
    fn dropped(&self) -> io::Result<u32>;

    /// Makes another descriptor of the same socket.
    ///
    /// # Errors
    ///
    /// The kernel's.
    fn duplicate(&self) -> io::Result<OwnedFd>;

    /// Closes.
    fn close(&mut self);
}

/// What follows a send that failed. See [`DatagramSocket::after`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum AfterSendError {
    /// Wait until the poller reports room.
    WaitForRoom,
    /// The address of the first datagram has no room, and no event reports it. It is
    /// tried again after a while. Others pass it meanwhile.
    WaitForPeer,
    /// No event reports when this passes. All datagrams are tried again after a while.
    WaitForTime,
    /// The error concerns a datagram that was sent before. This one is tried again at
    /// once.
    TryAgain,
    /// The first datagram cannot be sent.
    Fail,
    /// For connections: nothing more can be sent.
    Broken,
}

/// A socket whose packets have a connection. Its [`Port`](crate::Port) is a
/// [`PacketTransport`](bowline_protocol::PacketTransport).
///
/// Some methods of [`DatagramSocket`] are simpler here. [`peer`](DatagramSocket::peer)
/// is always `Some`. No address to send to is ever given.
/// [`connect`](DatagramSocket::connect) is not called. If
/// [`receive`](DatagramSocket::receive) returns a reset, it is told after the packets
/// that have arrived.
pub trait PacketSocket: DatagramSocket + ConnectionSocket {
    /// Whether the last [`receive`](DatagramSocket::receive) has reached the end.
    /// Nothing comes behind the packets that it brought.
    fn has_ended(&self) -> bool;

    /// Tells the peer that nothing more comes.
    ///
    /// # Errors
    ///
    /// The kernel's.
    fn shutdown_write(&mut self) -> io::Result<()>;

    /// The process that made the connection with us.
    ///
    /// # Errors
    ///
    /// The kernel's.
    fn peer_credentials(&self) -> io::Result<Credentials>;

    /// The same process, as a pidfd.
    ///
    /// # Errors
    ///
    /// The kernel's.
    fn peer_pidfd(&self) -> io::Result<OwnedFd>;

    /// Sets whether the peer may send descriptors.
    ///
    /// # Errors
    ///
    /// The kernel's.
    fn set_passes_rights(&self, on: bool) -> io::Result<()>;

    /// Gives away its descriptor, and itself without it, as a `Box<Self>`. Nothing is
    /// left to close. `None` once it has no descriptor.
    fn detach(&mut self) -> Option<(OwnedFd, Box<dyn Any>)>;

    /// Goes on with a descriptor, after [`detach`](Self::detach).
    ///
    /// # Errors
    ///
    /// Gives the descriptor back if it is not of this kind.
    fn attach(&mut self, fd: OwnedFd) -> Result<(), OwnedFd>;
}

/// The datagrams of one receive, and room for them.
///
/// The sockets of a reactor share it. All of its datagrams are delivered before
/// anything else is received.
#[derive(Debug)]
pub struct Arrivals {
    pub(crate) batch: MessageBatch,
    /// The first message that is not delivered yet, and where in it the next datagram
    /// begins.
    pub(super) next: usize,
    pub(super) offset: usize,
}

impl Arrivals {
    pub(super) fn new(slots: usize, room: usize) -> Box<Self> {
        Box::new(Self {
            batch: MessageBatch::new(slots, room),
            next: 0,
            offset: 0,
        })
    }

    /// Puts a datagram at the end, and returns whether there was room. It may be empty.
    /// If there is no room, `descriptors` are closed.
    pub fn push(
        &mut self,
        data: &[u8],
        from: AddressRef<'_>,
        descriptors: Vec<OwnedFd>,
        lost_descriptors: bool,
    ) -> bool {
        let from = name_ref(from);
        self.batch.push(data, from, descriptors, lost_descriptors)
    }
}

/// The datagrams that wait to be sent.
#[derive(Debug)]
pub struct Outgoing<'a> {
    pub(crate) queue: &'a SendQueue,
    pub(crate) shared: &'a crate::shared::Shared,
}

impl Outgoing<'_> {
    /// Each of them, in order. There is at least one.
    pub fn datagrams(&self) -> impl Iterator<Item = OutgoingDatagram<'_>> {
        self.queue.in_line().map(|queued| OutgoingDatagram {
            data: queued.data,
            to: match queued.name {
                [] => None,
                name => Some(address_ref(NameRef::decode(name))),
            },
            descriptors: queued.descriptors,
        })
    }
}

/// A datagram that waits to be sent.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct OutgoingDatagram<'a> {
    /// Its bytes.
    pub data: &'a [u8],
    /// Where it goes. `None` means the peer of a connected socket.
    pub to: Option<AddressRef<'a>>,
    /// The descriptors that go with it.
    pub descriptors: &'a [PassedDescriptor],
}

/// The address as the system calls take it.
pub(crate) fn name_ref(address: AddressRef<'_>) -> NameRef<'_> {
    use bowline_protocol::UnixAddressRef;
    match address {
        AddressRef::Inet(address) => NameRef::Inet(address),
        AddressRef::Unix(UnixAddressRef::Unnamed) => NameRef::UnixUnnamed,
        AddressRef::Unix(UnixAddressRef::Path(path)) => NameRef::UnixPath(path),
        AddressRef::Unix(UnixAddressRef::Abstract(name)) => NameRef::UnixAbstract(name),
        // No such family exists, so nothing is sent there.
        _ => NameRef::Other(0),
    }
}
