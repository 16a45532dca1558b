//! The callbacks of one datagram socket, and what they may ask of it.

use std::any::{Any, TypeId};
use std::borrow::Cow;
use std::cell::RefCell;
use std::error::Error;
use std::fmt;
use std::io;
use std::net::IpAddr;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;

use bowline_reactor::{Description, Handle};

use crate::address::{Address, AddressRef};
use crate::context::Context;
use crate::descriptors::{PassedDescriptor, ReceivedDescriptors};
use crate::error::SendDescriptorError;
use crate::protocol::{AtDrain, Part, short_type_name};
use crate::reason::CloseReason;
use crate::transport::{Credentials, Linger, TransportState};

/// The handle of any datagram socket. See
/// [`Reactor::get`](bowline_reactor::Reactor::get).
pub type DatagramHandle = Handle<dyn DatagramTransport>;

/// The handle of a UDP socket.
pub type UdpHandle = Handle<dyn UdpTransport>;

/// The handle of a UNIX datagram socket.
pub type UnixDatagramHandle = Handle<dyn UnixDatagramTransport>;

/// The callbacks of one datagram socket, over transports of type `T`. (Twisted:
/// `DatagramProtocol`, `ConnectedDatagramProtocol`.)
///
/// There is no connection and no stream. Each datagram arrives as it was sent, or not
/// at all. Each may come from another sender, and may be empty. The reactor owns the
/// protocol, and drops it after [`stopped`](Self::stopped). A protocol that serves
/// several sockets is an `Rc<RefCell<P>>`. It is borrowed only while a callback runs.
///
/// Write
///
/// - `impl<T: DatagramTransport> DatagramProtocol<T>` for a protocol over anything,
/// - `impl<T: UdpTransport> DatagramProtocol<T>` for one that needs UDP's options,
/// - `impl<T: UnixDatagramTransport> DatagramProtocol<T>` for one that passes descriptors.
///
/// As those of a [`Protocol`](crate::Protocol), callbacks never nest.
///
/// # Panics
///
/// If a callback panics, only its datagram is lost, and the panic is logged. The socket
/// serves many peers, and goes on with the next datagram. If [`started`](Self::started)
/// panics, the socket ends with [`CloseReason::Panicked`].
///
/// # Examples
///
/// ```
/// use bowline::{Context, Datagram, DatagramProtocol, DatagramTransport};
///
/// struct Echo;
///
/// impl<T: DatagramTransport> DatagramProtocol<T> for Echo {
///     fn datagram_received(&mut self, cx: &mut Context<'_, T>, datagram: &mut Datagram<'_>) {
///         cx.transport.send_to(datagram.data, datagram.from);
///     }
/// }
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a protocol of datagrams over `{T}`",
    note = "a protocol over any datagram socket is \
            `impl<T: DatagramTransport> DatagramProtocol<T>`"
)]
pub trait DatagramProtocol<T: DatagramTransport + ?Sized>: Part {
    /// The socket is open. Called once, first. (Twisted: `startProtocol`.)
    fn started(&mut self, cx: &mut Context<'_, T>) {
        let _ = cx;
    }

    /// A datagram has arrived. Its bytes belong to the reactor; copy those that you
    /// want to keep. Descriptors that you leave in it are closed and counted. That is
    /// logged once for each socket. (Twisted: `datagramReceived`.)
    ///
    /// Not called after `pause_producing` until `resume_producing`, nor after
    /// `stop_listening` or `abort`.
    fn datagram_received(&mut self, cx: &mut Context<'_, T>, datagram: &mut Datagram<'_>);

    /// The peer of a [connected](DatagramTransport::connect) socket is not there, or
    /// cannot be reached. An ICMP message reports this of a datagram that was sent
    /// before; for a UNIX socket that was closed, the kernel does. The kinds of error
    /// are `ConnectionRefused`, `HostUnreachable`, `NetworkUnreachable` and the like.
    /// The socket stays as it is, and the peer may be back for the next datagram.
    /// (Twisted: `connectionRefused`.)
    ///
    /// A socket that is not connected is not told, since it could not tell which peer
    /// is meant.
    fn connection_refused(&mut self, cx: &mut Context<'_, T>, error: &io::Error) {
        let _ = (cx, error);
    }

    /// A datagram that was taken is not going to be sent, since the kernel refused it.
    /// The next one may leave, to another address. The kinds of error are `NotFound`
    /// and `ConnectionRefused` if the UNIX socket is not there, `PermissionDenied`, and
    /// `NetworkUnreachable`. The error is `EMSGSIZE` if the datagram is too long for
    /// this socket or this route.
    ///
    /// Descriptors that you leave in it are closed. The error is logged too, at `warn`,
    /// once for each socket.
    fn send_failed(
        &mut self,
        cx: &mut Context<'_, T>,
        datagram: UnsentDatagram<'_>,
        error: &io::Error,
    ) {
        let _ = (cx, datagram, error);
    }

    /// There is room again, after a send has returned [`Full`](SendStatus::Full) or
    /// [`QueueFull`](SendRefusal::QueueFull). Called once for each such time, when less
    /// than half of [the limits](QueueLimits) waits.
    fn sending_resumed(&mut self, cx: &mut Context<'_, T>) {
        let _ = cx;
    }

    /// The reactor stops gracefully. Called once at the most. A connected socket is
    /// told when the accepted connections have ended. By default the socket is closed
    /// once nothing more waits in it, everything was sent, and the protocol [is
    /// idle](Self::is_idle). So everything that has arrived is answered.
    fn draining(&mut self, cx: &mut Context<'_, T>) -> AtDrain {
        let _ = cx;
        AtDrain::LoseWhenIdle
    }

    /// Whether the socket could be closed now without breaking off any work. Asked
    /// while it [drains](Self::draining), at least every 50 ms. The default is true.
    fn is_idle(&self) -> bool {
        true
    }

    /// The socket was closed. Called once, last. The protocol is dropped afterwards.
    /// (Twisted: `stopProtocol`.) `cx.transport` is closed. Its addresses and counts
    /// can still be read.
    fn stopped(&mut self, cx: &mut Context<'_, T>, reason: &CloseReason) {
        let _ = (cx, reason);
    }

    /// The part of this protocol that is of the type `id`; as
    /// [`Protocol::part`](crate::Protocol::part).
    fn part(&mut self, id: TypeId) -> Option<&mut dyn Any> {
        let this = self.as_any_mut();
        ((*this).type_id() == id).then_some(this)
    }

    /// Adds what the protocol says of itself to who looks into the reactor; see
    /// [`Protocol::describe`](crate::Protocol::describe).
    fn describe(&self, description: &mut Description) {
        description.section(self.log_prefix().into_owned());
    }

    /// The name of this protocol in log lines. By default it is the name of its type.
    fn log_prefix(&self) -> Cow<'_, str> {
        Cow::Borrowed(short_type_name::<Self>())
    }
}

/// A datagram that has arrived.
#[derive(Debug)]
#[non_exhaustive]
pub struct Datagram<'a> {
    /// Its bytes, as far as there was room.
    pub data: &'a [u8],
    /// Its sender, to be answered by [`send_to`](DatagramTransport::send_to). A UNIX
    /// socket without a name cannot be answered.
    pub from: AddressRef<'a>,
    /// How many bytes it had. This is more than `data` has if it was
    /// [truncated](Self::is_truncated).
    pub length: usize,
    /// The descriptors that came with it, in order. Only UNIX sockets pass some.
    pub descriptors: ReceivedDescriptors<'a>,
    /// Whether some of its descriptors were lost on the way to us (`MSG_CTRUNC`).
    /// Either no descriptor number was free outside of the reserve, or a security
    /// module refused. The others are closed.
    pub lost_descriptors: bool,
    /// The process that sent it, if the socket was set to ask for it.
    pub credentials: Option<Credentials>,
    /// A pidfd of that process, if the socket was set to ask for it.
    pub pidfd: Option<OwnedFd>,
}

impl<'a> Datagram<'a> {
    /// Makes a datagram of these bytes, for transports and for tests of protocols.
    /// `descriptors` is empty afterwards.
    pub fn new(
        data: &'a [u8],
        from: impl Into<AddressRef<'a>>,
        descriptors: &'a mut Vec<OwnedFd>,
    ) -> Self {
        Self {
            data,
            from: from.into(),
            length: data.len(),
            descriptors: ReceivedDescriptors::new(descriptors),
            lost_descriptors: false,
            credentials: None,
            pidfd: None,
        }
    }

    /// Whether it had more bytes than there was room for. The rest is lost.
    pub fn is_truncated(&self) -> bool {
        self.length > self.data.len()
    }
}

/// A datagram that was taken and not sent.
#[derive(Debug)]
#[non_exhaustive]
pub struct UnsentDatagram<'a> {
    /// Its bytes.
    pub data: &'a [u8],
    /// Where it was to go. `None` means the peer of a connected socket.
    pub to: Option<AddressRef<'a>>,
    /// The descriptors that were to go with it, in order. The callback owns them.
    pub descriptors: Vec<PassedDescriptor>,
}

impl<'a> UnsentDatagram<'a> {
    /// Makes one of these parts, for transports and for tests of protocols.
    pub fn new(
        data: &'a [u8],
        to: Option<AddressRef<'a>>,
        descriptors: Vec<PassedDescriptor>,
    ) -> Self {
        Self {
            data,
            to,
            descriptors,
        }
    }
}

/// A datagram socket as its protocol sees it.
///
/// Every method may be called from any callback, and acts on the socket's state at once.
/// None of them calls a protocol. The callbacks that follow are called after the running
/// one has returned.
pub trait DatagramTransport: 'static {
    // Sending.

    /// Sends one datagram to the peer of a [connected](Self::connect) socket.
    ///
    /// All datagrams of one turn leave together, after the running callback, by as few
    /// system calls as possible. Until then, and while the kernel has no room, a
    /// datagram waits in a bounded [queue](QueueLimits), in order. A datagram that was
    /// taken is sent, or comes back in [`send_failed`](DatagramProtocol::send_failed).
    /// A UDP datagram that was sent may still not arrive. A datagram may be empty.
    fn send(&mut self, data: &[u8]) -> SendStatus;

    /// Sends one datagram to `to`. If the socket is connected to another peer, the
    /// kernel decides what happens.
    ///
    /// If the owner of a UNIX socket does not read, datagrams to it wait, in order.
    /// They take at most an eighth of the queue for one address, and no other address
    /// waits for it.
    fn send_to(&mut self, data: &[u8], to: AddressRef<'_>) -> SendStatus;

    /// Sends `parts`, one after the other, as one datagram, to `to` or to the peer of a
    /// connected socket. (Twisted: `writeSequence`.)
    fn send_sequence(&mut self, parts: &[&[u8]], to: Option<AddressRef<'_>>) -> SendStatus;

    /// How many datagrams wait to be sent. After the end, how many were never sent.
    fn unsent_datagrams(&self) -> usize;

    /// How many bytes these datagrams have.
    fn unsent_bytes(&self) -> usize;

    /// Whether the sender should wait for
    /// [`sending_resumed`](DatagramProtocol::sending_resumed).
    fn is_send_buffer_full(&self) -> bool;

    /// The limits of the queue.
    fn queue_limits(&self) -> QueueLimits;

    /// Sets the limits of the queue. Datagrams that wait already stay.
    fn set_queue_limits(&mut self, limits: QueueLimits);

    // Receiving.

    /// Delivers nothing until [`resume_producing`](Self::resume_producing). Datagrams
    /// that arrive wait in the kernel. When it is full, UDP loses datagrams, and a
    /// sender over a UNIX socket waits.
    fn pause_producing(&mut self);

    /// Delivers again.
    fn resume_producing(&mut self);

    /// Whether delivering is paused.
    fn is_reading_paused(&self) -> bool;

    // The end.

    /// Delivers no more, sends everything that waits, and closes with
    /// [`CloseReason::Done`]. No callback runs before this returns. (Twisted:
    /// `stopListening`.)
    fn stop_listening(&mut self);

    /// As [`stop_listening`](Self::stop_listening), but for at most `deadline`. Then
    /// unsent datagrams are dropped, and the reason is [`CloseReason::CloseTimedOut`].
    fn stop_listening_within(&mut self, deadline: Duration);

    /// Closes now, with [`CloseReason::Aborted`]. Datagrams that wait are dropped.
    fn abort(&mut self);

    // What it is.

    /// How far the socket is in its life.
    fn state(&self) -> TransportState;

    /// Our address. It is known after the end too.
    fn host(&self) -> Address;

    /// The peer's address, if the socket is connected. It is known after the end too.
    fn peer(&self) -> Option<Address>;

    /// Connects the socket. From now on only datagrams from `peer` are received, and
    /// [`send`](Self::send) sends to it. The socket can be connected again, to another
    /// peer. Datagrams that were received before are delivered.
    ///
    /// # Errors
    ///
    /// `InvalidInput` for an address of another family. `NotConnected` after the end.
    /// Otherwise those of connect(2).
    fn connect(&mut self, peer: AddressRef<'_>) -> io::Result<()>;

    /// Counters of the datagrams so far.
    fn counts(&self) -> DatagramCounts;

    /// Returns how many datagrams the kernel has dropped so far, because earlier ones were
    /// not read (`SO_MEMINFO`). On UNIX sockets it drops none, since senders wait.
    ///
    /// # Errors
    ///
    /// `NotConnected` after the end. Otherwise those of getsockopt(2).
    fn dropped_by_kernel(&self) -> io::Result<u32>;

    /// Makes another descriptor of the socket, for somebody who goes on with it, such as
    /// another process. Each datagram goes to the one that reads it first.
    ///
    /// # Errors
    ///
    /// `NotConnected` after the end. `EMFILE` if no descriptor number is free.
    fn duplicate(&self) -> io::Result<OwnedFd>;

    /// Returns the socket, for options that have no method here. `None` after the end.
    /// (Twisted: `getHandle`.)
    fn socket_descriptor(&self) -> Option<BorrowedFd<'_>>;

    /// The handle of this socket, by which others reach it.
    fn handle(&self) -> DatagramHandle;

    /// The transport, with its type forgotten.
    fn as_dyn(&mut self) -> &mut dyn DatagramTransport;
}

/// A UDP socket, over IPv4 or IPv6. (Twisted: `IUDPTransport`, `IMulticastTransport`.)
///
/// After the end, the methods that return an `io::Result` fail with `NotConnected`.
/// Otherwise they fail as their system calls do.
pub trait UdpTransport: DatagramTransport {
    /// Whether datagrams may be sent to a broadcast address (`SO_BROADCAST`). The default
    /// is false; then such a datagram [fails](DatagramProtocol::send_failed).
    ///
    /// # Errors
    ///
    /// Those of getsockopt(2).
    fn broadcast(&self) -> io::Result<bool>;

    /// Sets whether datagrams may be sent to a broadcast address. (Twisted:
    /// `setBroadcastAllowed`.)
    ///
    /// # Errors
    ///
    /// Those of setsockopt(2).
    fn set_broadcast(&mut self, allowed: bool) -> io::Result<()>;

    /// Joins a multicast group on one interface: datagrams to the group are received from
    /// now on. Datagrams to groups that other programs of this machine have joined are not
    /// received. (Twisted: `joinGroup`.)
    ///
    /// # Errors
    ///
    /// `InvalidInput` if the address is not a multicast address, or is of another family.
    /// `AddrInUse` if the group was joined already. Otherwise those of setsockopt(2).
    fn join_multicast(&mut self, group: IpAddr, interface: MulticastInterface) -> io::Result<()>;

    /// Leaves a multicast group that was joined on the same interface. (Twisted:
    /// `leaveGroup`.)
    ///
    /// # Errors
    ///
    /// `AddrNotAvailable` if the group was not joined. Otherwise as
    /// [`join_multicast`](Self::join_multicast).
    fn leave_multicast(&mut self, group: IpAddr, interface: MulticastInterface) -> io::Result<()>;

    /// Sets the interface by which multicast datagrams are sent. (Twisted:
    /// `setOutgoingInterface`.)
    ///
    /// # Errors
    ///
    /// `InvalidInput` if an IPv6 socket is given an address instead of an index. Otherwise
    /// those of setsockopt(2).
    fn set_multicast_interface(&mut self, interface: MulticastInterface) -> io::Result<()>;

    /// Returns the time to live of multicast datagrams, in hops. The default is 1, the
    /// local network. (Twisted: `getTTL`.)
    ///
    /// # Errors
    ///
    /// Those of getsockopt(2).
    fn multicast_ttl(&self) -> io::Result<u32>;

    /// Sets the time to live of multicast datagrams, in hops, at most 255. (Twisted:
    /// `setTTL`.)
    ///
    /// # Errors
    ///
    /// `InvalidInput` above 255. Otherwise those of setsockopt(2).
    fn set_multicast_ttl(&mut self, hops: u32) -> io::Result<()>;

    /// Whether multicast datagrams that we send are also received on this machine, by those
    /// who have joined the group. The default is true. (Twisted: `getLoopbackMode`.)
    ///
    /// # Errors
    ///
    /// Those of getsockopt(2).
    fn multicast_loopback(&self) -> io::Result<bool>;

    /// Sets whether multicast datagrams that we send are also received on this machine.
    /// (Twisted: `setLoopbackMode`.)
    ///
    /// # Errors
    ///
    /// Those of setsockopt(2).
    fn set_multicast_loopback(&mut self, on: bool) -> io::Result<()>;

    /// Returns which offloads the kernel uses for this socket.
    fn offload(&self) -> Offload;

    /// The handle of this socket as a UDP socket, by which others reach it.
    fn udp_handle(&self) -> UdpHandle;
}

/// A UNIX datagram socket, which passes descriptors beside its bytes.
///
/// It is reliable: nothing is lost, since a sender waits for its receiver.
pub trait UnixDatagramTransport: DatagramTransport {
    /// Sends one datagram with descriptors, to `to` or to the peer of a connected socket.
    /// They are sent with exactly this datagram, which may be empty. Our copies are closed
    /// then.
    ///
    /// # Errors
    ///
    /// The descriptors come back if the datagram is refused, or if there are more than 253.
    fn send_with_descriptors(
        &mut self,
        data: &[u8],
        to: Option<AddressRef<'_>>,
        descriptors: Vec<PassedDescriptor>,
    ) -> Result<SendStatus, SendDescriptorError>;

    /// How many descriptors wait to be sent. After the end, how many were never sent.
    fn unsent_descriptors(&self) -> usize;

    /// Sets what happens to the linger setting of received sockets. See [`Linger`].
    fn set_received_linger(&mut self, linger: Linger);

    /// Sets whether the kernel accepts descriptors for us (`SO_PASSRIGHTS`). The default is
    /// true. With false, the sender gets `EPERM`. Descriptors that were sent before are
    /// still delivered.
    ///
    /// # Errors
    ///
    /// `ENOPROTOOPT` before Linux 6.16. `NotConnected` after the end.
    fn set_descriptors_accepted(&mut self, accepted: bool) -> io::Result<()>;

    /// The handle of this socket as a UNIX datagram socket, by which others reach it.
    fn unix_datagram_handle(&self) -> UnixDatagramHandle;
}

/// The answer of a send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SendStatus {
    /// Taken. Go on.
    Ready,
    /// Taken, and the queue is now full. Wait for
    /// [`sending_resumed`](DatagramProtocol::sending_resumed) before you send more.
    Full,
    /// Not taken.
    Refused(SendRefusal),
}

impl SendStatus {
    /// Whether the sender should go on.
    pub fn is_ready(self) -> bool {
        self == Self::Ready
    }

    /// Whether the datagram was taken.
    pub fn is_taken(self) -> bool {
        !matches!(self, Self::Refused(_))
    }
}

/// Why a datagram was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SendRefusal {
    /// The queue is at its [limit](QueueLimits), or an eighth of it waits for a UNIX socket
    /// that does not read.
    QueueFull,
    /// The datagram is longer than possible: 65,507 bytes over IPv4, 65,527 over IPv6. On a
    /// UNIX socket the limit is the size of the send buffer.
    TooLong,
    /// The address is not of the socket's family.
    WrongFamily,
    /// Nothing can be sent to the address: it is an unnamed UNIX socket, or its path is too
    /// long.
    BadAddress,
    /// No address was given, and the socket is not connected.
    NotConnected,
    /// The socket is closed, or is closing.
    Closed,
}

impl fmt::Display for SendRefusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::QueueFull => "queue of datagrams is full",
            Self::TooLong => "longer than a datagram can be",
            Self::WrongFamily => "address is of another family than the socket",
            Self::BadAddress => "nothing can be sent to this address",
            Self::NotConnected => "socket is not connected, and there is no address",
            Self::Closed => "socket is closed or closing",
        })
    }
}

impl Error for SendRefusal {}

/// Limits on the datagrams of one socket that wait to be sent. A value of zero counts as
/// one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct QueueLimits {
    /// With this many datagrams, the queue counts as full. The default is 256.
    pub full: usize,
    /// With this many bytes, the queue also counts as full. The default is 262,144.
    pub full_bytes: usize,
    /// More datagrams than this are refused. The default is 1,024.
    pub most: usize,
    /// A datagram is refused if more bytes than this would wait, unless it is the only one.
    /// The default is 1 MiB.
    pub most_bytes: usize,
}

bowline_reactor::setters!(QueueLimits {
    full: usize,
    full_bytes: usize,
    most: usize,
    most_bytes: usize,
});

impl Default for QueueLimits {
    fn default() -> Self {
        Self {
            full: 256,
            full_bytes: 262_144,
            most: 1_024,
            most_bytes: 1_048_576,
        }
    }
}

/// Counters of the datagrams of one socket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct DatagramCounts {
    /// Datagrams that were delivered.
    pub received: u64,
    /// Received datagrams that had more bytes than there was room for.
    pub truncated: u64,
    /// Datagrams that the kernel has accepted.
    pub sent: u64,
    /// Datagrams that were taken and that the kernel refused.
    pub failed: u64,
    /// Datagrams that were not taken.
    pub refused: u64,
}

/// An interface of this machine, for multicast.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum MulticastInterface {
    /// The interface that the kernel's routes choose.
    #[default]
    Any,
    /// The interface with this index (if_nametoindex(3)).
    Index(u32),
    /// The interface with this address. Only for IPv4.
    Address(std::net::Ipv4Addr),
}

/// What the kernel does with several datagrams of the same length at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Offload {
    /// How many datagrams to one address are sent as one, which the network card or the
    /// kernel splits (`UDP_SEGMENT`, GSO). 1 if this is off or not known.
    pub send_segments: usize,
    /// Whether several datagrams in a row from one address are received as one (`UDP_GRO`).
    /// They are delivered one by one.
    pub receive: bool,
}

impl Offload {
    /// Makes one of these values, for transports.
    pub fn new(send_segments: usize, receive: bool) -> Self {
        Self {
            send_segments,
            receive,
        }
    }
}

impl fmt::Debug for dyn DatagramTransport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DatagramTransport")
            .field("handle", &self.handle())
            .field("state", &self.state())
            .field("host", &self.host())
            .finish_non_exhaustive()
    }
}

/// Forwards every callback to a protocol that several sockets share. It is borrowed only
/// while a callback runs.
impl<T, P> DatagramProtocol<T> for Rc<RefCell<P>>
where
    T: DatagramTransport + ?Sized,
    P: DatagramProtocol<T>,
{
    fn started(&mut self, cx: &mut Context<'_, T>) {
        self.borrow_mut().started(cx);
    }

    fn datagram_received(&mut self, cx: &mut Context<'_, T>, datagram: &mut Datagram<'_>) {
        self.borrow_mut().datagram_received(cx, datagram);
    }

    fn connection_refused(&mut self, cx: &mut Context<'_, T>, error: &io::Error) {
        self.borrow_mut().connection_refused(cx, error);
    }

    fn send_failed(
        &mut self,
        cx: &mut Context<'_, T>,
        datagram: UnsentDatagram<'_>,
        error: &io::Error,
    ) {
        self.borrow_mut().send_failed(cx, datagram, error);
    }

    fn sending_resumed(&mut self, cx: &mut Context<'_, T>) {
        self.borrow_mut().sending_resumed(cx);
    }

    fn draining(&mut self, cx: &mut Context<'_, T>) -> AtDrain {
        self.borrow_mut().draining(cx)
    }

    fn is_idle(&self) -> bool {
        self.borrow().is_idle()
    }

    fn stopped(&mut self, cx: &mut Context<'_, T>, reason: &CloseReason) {
        self.borrow_mut().stopped(cx, reason);
    }

    fn describe(&self, description: &mut Description) {
        self.borrow().describe(description);
    }

    fn log_prefix(&self) -> Cow<'_, str> {
        Cow::Owned(self.borrow().log_prefix().into_owned())
    }
}

/// Forwards every callback to the protocol in the box.
impl<T, P> DatagramProtocol<T> for Box<P>
where
    T: DatagramTransport + ?Sized,
    P: DatagramProtocol<T> + ?Sized,
{
    fn started(&mut self, cx: &mut Context<'_, T>) {
        (**self).started(cx);
    }

    fn datagram_received(&mut self, cx: &mut Context<'_, T>, datagram: &mut Datagram<'_>) {
        (**self).datagram_received(cx, datagram);
    }

    fn connection_refused(&mut self, cx: &mut Context<'_, T>, error: &io::Error) {
        (**self).connection_refused(cx, error);
    }

    fn send_failed(
        &mut self,
        cx: &mut Context<'_, T>,
        datagram: UnsentDatagram<'_>,
        error: &io::Error,
    ) {
        (**self).send_failed(cx, datagram, error);
    }

    fn sending_resumed(&mut self, cx: &mut Context<'_, T>) {
        (**self).sending_resumed(cx);
    }

    fn draining(&mut self, cx: &mut Context<'_, T>) -> AtDrain {
        (**self).draining(cx)
    }

    fn is_idle(&self) -> bool {
        (**self).is_idle()
    }

    fn stopped(&mut self, cx: &mut Context<'_, T>, reason: &CloseReason) {
        (**self).stopped(cx, reason);
    }

    fn part(&mut self, id: TypeId) -> Option<&mut dyn Any> {
        match id == TypeId::of::<Self>() {
            true => Some(self),
            false => (**self).part(id),
        }
    }

    fn describe(&self, description: &mut Description) {
        (**self).describe(description);
    }

    fn log_prefix(&self) -> Cow<'_, str> {
        (**self).log_prefix()
    }
}
