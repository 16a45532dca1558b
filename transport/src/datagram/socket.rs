//! What differs between kinds of datagram sockets.

use std::any::Any;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use bowline_protocol::{Address, AddressRef, Credentials, PassedDescriptor, SendRefusal};
use bowline_reactor::{Interest, Reactor, Token};

use super::queue::SendQueue;
use crate::file_descriptor::not_connected;
use crate::kinds::address_ref;
use crate::sys::{MessageBatch, NameRef};

/// A datagram socket, under a [`Port`](crate::Port): one of a kind that comes with bowline,
/// or of yours. The calls are non-blocking.
pub trait DatagramSocket: 'static {
    /// What log lines call sockets of this kind.
    fn kind(&self) -> &'static str;

    /// Our address. It can be asked for after the close too.
    fn host(&self) -> Address;

    /// The peer's, if the socket is connected. It can be asked for after the close too.
    fn peer(&self) -> Option<Address>;

    /// What the poller watches; `None` once closed, or if the poller knows nothing of it.
    fn source(&self) -> Option<BorrowedFd<'_>>;

    /// Whether it was not closed.
    #[inline]
    fn is_open(&self) -> bool {
        self.source().is_some()
    }

    /// Has readability reported under `token`, or with `writes` room for more too: that is
    /// asked for later, and at most once.
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

    /// Has nothing reported any more.
    fn unwatch(&self, reactor: &mut Reactor) {
        if let Some(source) = self.source() {
            reactor.unwatch(source);
        }
    }

    /// How many bytes of a datagram there is to be room for.
    fn room(&self) -> usize;

    /// Receives up to `count` datagrams, and answers how many. Fewer are all that there
    /// were.
    ///
    /// # Errors
    ///
    /// `WouldBlock` where there is none. What the kernel was told of a datagram that was
    /// sent before is [refused](Self::is_refusal), and ends nothing; nor does what
    /// [passes](crate::is_passing_shortage). All else closes the socket.
    fn receive(&mut self, arrivals: &mut Arrivals, count: usize) -> io::Result<usize>;

    /// Sends some of the datagrams that wait, and answers how many were taken from the
    /// front: at least one.
    ///
    /// # Errors
    ///
    /// Why the first was not taken; what becomes of it is said by
    /// [`after`](Self::after).
    fn send(&mut self, outgoing: &Outgoing<'_>) -> io::Result<usize>;

    /// What follows on an error of [`send`](Self::send), whose first datagram was to go to
    /// `to`, or to the peer.
    fn after(&self, error: &io::Error, to: Option<AddressRef<'_>>) -> AfterSendError;

    /// Whether an error says that the peer is not there, or cannot be reached.
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

    /// Why a datagram of so many bytes cannot be sent, if that is known without asking.
    fn refuses(&self, length: usize, to: Option<AddressRef<'_>>) -> Option<SendRefusal>;

    /// Connects, or connects to another peer.
    ///
    /// # Errors
    ///
    /// `InvalidInput` for an address of another family; otherwise those of connect(2).
    fn connect(&mut self, peer: AddressRef<'_>) -> io::Result<()>;

    /// How many datagrams were lost because nobody read those before.
    ///
    /// # Errors
    ///
    /// The kernel's.
    fn dropped(&self) -> io::Result<u32>;

    /// Another descriptor of it.
    ///
    /// # Errors
    ///
    /// The kernel's.
    fn duplicate(&self) -> io::Result<OwnedFd>;

    /// Closes.
    fn close(&mut self);
}

/// What follows on a send that failed; see [`DatagramSocket::after`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum AfterSendError {
    /// The poller says when there is room.
    WaitForRoom,
    /// There is none where the first datagram goes to, which nobody says: it is tried
    /// again in a while, and others pass it meanwhile.
    WaitForPeer,
    /// Nobody says when it passes: all are tried again in a while.
    WaitForTime,
    /// It is of a datagram that was sent before. This one is tried again at once.
    TryAgain,
    /// The first datagram cannot be sent.
    Fail,
    /// Of a connection: nothing can be sent any more.
    Broken,
}

/// What a socket has beside that whose packets have a connection, under a
/// [`Port`](crate::Port) that is a [`PacketTransport`](bowline_protocol::PacketTransport).
///
/// Of the methods below [`DatagramSocket`] some say less here:
/// [`peer`](DatagramSocket::peer) is always there, an address is never given to be sent to,
/// [`connect`](DatagramSocket::connect) is not called. A reset that
/// [`receive`](DatagramSocket::receive) answers is told after what has arrived.
pub trait PacketSocket: DatagramSocket {
    /// Whether the last [`receive`](DatagramSocket::receive) has come to the end: behind
    /// what it brought, nothing more comes.
    fn has_ended(&self) -> bool;

    /// Tells the peer that nothing more comes.
    ///
    /// # Errors
    ///
    /// The kernel's.
    fn shutdown_write(&mut self) -> io::Result<()>;

    /// Takes the error that waits for the next call (`SO_ERROR`).
    fn take_error(&mut self) -> Option<io::Error>;

    /// The process that made the connection with us.
    ///
    /// # Errors
    ///
    /// The kernel's.
    fn peer_credentials(&self) -> io::Result<Credentials>;

    /// A pidfd of it.
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

    /// Gives away its descriptor, and itself without that, a `Box<Self>`; nothing is left to
    /// be closed. `None` once it is.
    fn detach(&mut self) -> Option<(OwnedFd, Box<dyn Any>)>;

    /// Goes on with it, after [`detach`](Self::detach).
    ///
    /// # Errors
    ///
    /// Gives back what is none.
    fn attach(&mut self, fd: OwnedFd) -> Result<(), OwnedFd>;
}

/// Datagrams that were received by one call, and room for them.
///
/// The sockets of a reactor share it: it is delivered before anything else is received.
#[derive(Debug)]
pub struct Arrivals {
    pub(crate) batch: MessageBatch,
    /// The first message that was not delivered, and where in it the next datagram
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

    /// Puts a datagram at the end; whether there was room. One of no bytes is one too.
    /// `descriptors` are closed where there was none.
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
    /// Each of them, in order; never none.
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
    /// Where it goes; `None` for the peer of a connected socket.
    pub to: Option<AddressRef<'a>>,
    /// The descriptors that go with it.
    pub descriptors: &'a [PassedDescriptor],
}

/// An address in the words of the system.
pub(crate) fn name_ref(address: AddressRef<'_>) -> NameRef<'_> {
    use bowline_protocol::UnixAddressRef;
    match address {
        AddressRef::Inet(address) => NameRef::Inet(address),
        AddressRef::Unix(UnixAddressRef::Unnamed) => NameRef::UnixUnnamed,
        AddressRef::Unix(UnixAddressRef::Path(path)) => NameRef::UnixPath(path),
        AddressRef::Unix(UnixAddressRef::Abstract(name)) => NameRef::UnixAbstract(name),
        // There is no such family, so that nothing is sent there.
        _ => NameRef::Other(0),
    }
}
