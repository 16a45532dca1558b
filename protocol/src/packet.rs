//! The callbacks of one connection of packets, and what they may ask of it.

use std::any::{Any, TypeId};
use std::borrow::Cow;
use std::cell::RefCell;
use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;

use bowline_reactor::{Description, Handle};

use crate::connection::AnyConnection;
use crate::context::Context;
use crate::datagram::{DatagramCounts, QueueLimits, SendStatus};
use crate::descriptors::{PassedDescriptor, ReceivedDescriptors};
use crate::error::SendDescriptorError;
use crate::protocol::{AfterReadClosed, AtDrain, Part, forward_boxed_callbacks, short_type_name};
use crate::reason::CloseReason;
use crate::transport::{Credentials, Linger};

/// The handle of a connection of packets. See
/// [`Reactor::get`](bowline_reactor::Reactor::get).
pub type PacketHandle = Handle<dyn PacketTransport>;

/// The callbacks of one connection of packets, over transports of type `T`.
///
/// It has a connection, like a [`Protocol`](crate::Protocol), and messages, like a
/// [`DatagramProtocol`](crate::DatagramProtocol). Each packet arrives whole, once and
/// in order, with exactly the descriptors that were sent with it. It may be empty.
/// (Linux: `SOCK_SEQPACKET`. Twisted has no counterpart.)
///
/// A [`Factory`](crate::Factory) builds one for each connection. The connection owns it, and
/// drops it after [`connection_lost`](Self::connection_lost). Write
/// `impl<T: PacketTransport> PacketProtocol<T>`. Then it runs over real sockets, and in
/// memory.
///
/// As with a [`Protocol`](crate::Protocol), callbacks never nest.
///
/// # Panics
///
/// A callback that panics ends its own connection, and nothing else.
/// [`connection_lost`](Self::connection_lost) follows with [`CloseReason::Panicked`].
///
/// # Examples
///
/// ```
/// use bowline::{Context, Packet, PacketProtocol, PacketTransport};
///
/// struct Echo;
///
/// impl<T: PacketTransport> PacketProtocol<T> for Echo {
///     fn packet_received(&mut self, cx: &mut Context<'_, T>, packet: &mut Packet<'_>) {
///         cx.transport.send(packet.data);
///     }
/// }
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a protocol of packets over `{T}`",
    note = "a protocol of packets is `impl<T: PacketTransport> PacketProtocol<T>`"
)]
pub trait PacketProtocol<T: PacketTransport + ?Sized>: Part {
    /// The connection was made. Called once, first.
    fn connection_made(&mut self, cx: &mut Context<'_, T>) {
        let _ = cx;
    }

    /// A packet has arrived. Its bytes belong to the reactor; copy those that you want
    /// to keep. Descriptors that you leave in it are closed and counted. That is logged
    /// once for each connection.
    ///
    /// Not called after `pause_producing` until `resume_producing`, nor after
    /// `lose_connection` or `abort_connection`.
    fn packet_received(&mut self, cx: &mut Context<'_, T>, packet: &mut Packet<'_>);

    /// A packet that was taken is not going to be sent. The kernel refused it, and
    /// takes others. The error is `EMSGSIZE` if it is longer than the send buffer, and
    /// `PermissionDenied` if the peer [refuses
    /// descriptors](PacketTransport::set_descriptors_accepted).
    ///
    /// Descriptors that you leave in it are closed. The error is logged too, at `warn`,
    /// once for each connection.
    fn send_failed(
        &mut self,
        cx: &mut Context<'_, T>,
        packet: UnsentPacket<'_>,
        error: &io::Error,
    ) {
        let _ = (cx, packet, error);
    }

    /// There is room again, after a send has returned [`Full`](SendStatus::Full) or
    /// [`QueueFull`](crate::SendRefusal::QueueFull). Called once for each such time,
    /// when less than half of [the limits](QueueLimits) waits.
    fn sending_resumed(&mut self, cx: &mut Context<'_, T>) {
        let _ = cx;
    }

    /// The peer sends no more, and everything that it sent was delivered. It may still
    /// receive. Called once at the most.
    ///
    /// Also called if a send has failed before. Then the answer has no effect, since
    /// the connection ends with that error.
    ///
    /// The default ends the connection at once with [`CloseReason::Done`]. Unsent packets
    /// are dropped.
    fn read_connection_lost(&mut self, cx: &mut Context<'_, T>) -> AfterReadClosed {
        let _ = cx;
        AfterReadClosed::EndConnection
    }

    /// Everything was sent, and our side was closed, as
    /// [`lose_write_connection`](AnyConnection::lose_write_connection) asked. Called once
    /// at the most.
    fn write_connection_lost(&mut self, cx: &mut Context<'_, T>) {
        let _ = cx;
    }

    /// Nothing more can be sent, and reading is paused, so the end waits for this
    /// protocol to read. Called once at the most.
    ///
    /// If it reads on, it gets everything that the peer had sent, at any pace, and then
    /// [`connection_lost`](Self::connection_lost) with the error. If its pause may last
    /// for ever, it decides here: [`lose_connection`](AnyConnection::lose_connection)
    /// ends the connection at once with that error, and drops unread packets.
    fn connection_broken(&mut self, cx: &mut Context<'_, T>) {
        let _ = cx;
    }

    /// The connection has ended. Called once, last. The protocol is dropped afterwards.
    /// `cx.transport` is closed. Its addresses and counts can still be read, and
    /// [`unsent_packets`](PacketTransport::unsent_packets) is how many packets were
    /// never sent.
    fn connection_lost(&mut self, cx: &mut Context<'_, T>, reason: &CloseReason) {
        let _ = (cx, reason);
    }

    /// The reactor stops gracefully. Called once at the most. A connection that we made
    /// is told when the accepted ones have ended. By default the connection is lost
    /// once nothing more waits in it, everything was sent, and the protocol [is
    /// idle](Self::is_idle).
    fn draining(&mut self, cx: &mut Context<'_, T>) -> AtDrain {
        let _ = cx;
        AtDrain::LoseWhenIdle
    }

    /// Whether the connection could end now without breaking off any work. Asked while
    /// it [drains](Self::draining), at least every 50 ms. The default is true.
    fn is_idle(&self) -> bool {
        true
    }

    /// The part of this protocol that is of the type `id`; as
    /// [`Protocol::part`](crate::Protocol::part).
    fn part(&mut self, id: TypeId) -> Option<&mut dyn Any> {
        let this = self.as_any_mut();
        ((*this).type_id() == id).then_some(this)
    }

    /// As [`part`](Self::part), for a protocol that is given away. Everything around the
    /// part is dropped. Asked only after `part` has found one.
    fn into_part(self: Box<Self>, id: TypeId) -> Option<Box<dyn Any>> {
        let this = self.into_any();
        ((*this).type_id() == id).then_some(this)
    }

    /// The connection was taken apart and put together again, such as after a restart
    /// that failed. Called before anything more is received. Everything is as it was,
    /// except that its transport has another [handle](PacketTransport::handle).
    fn connection_reattached(&mut self, cx: &mut Context<'_, T>) {
        let _ = cx;
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

/// A packet that has arrived.
#[derive(Debug)]
#[non_exhaustive]
pub struct Packet<'a> {
    /// Its bytes, as far as there was room.
    pub data: &'a [u8],
    /// How many bytes it had. This is more than `data` has if it was
    /// [truncated](Self::is_truncated).
    pub length: usize,
    /// The descriptors that were sent with exactly this packet, in order.
    pub descriptors: ReceivedDescriptors<'a>,
    /// Whether some of its descriptors were lost on the way to us (`MSG_CTRUNC`).
    /// Either no descriptor number was free outside of the reserve, or a security
    /// module refused. The others are closed.
    pub lost_descriptors: bool,
    /// The process that sent it, if the socket was set to ask for it. It may not be the
    /// process that connected.
    pub credentials: Option<Credentials>,
    /// A pidfd of that process, if the socket was set to ask for it.
    pub pidfd: Option<OwnedFd>,
}

impl<'a> Packet<'a> {
    /// Makes a packet of these bytes, for transports and for tests of protocols.
    /// `descriptors` is empty afterwards.
    pub fn new(data: &'a [u8], descriptors: &'a mut Vec<OwnedFd>) -> Self {
        Self {
            data,
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

/// A packet that was taken and not sent.
#[derive(Debug)]
#[non_exhaustive]
pub struct UnsentPacket<'a> {
    /// Its bytes.
    pub data: &'a [u8],
    /// The descriptors that were to go with it, in order. The callback owns them.
    pub descriptors: Vec<PassedDescriptor>,
}

impl<'a> UnsentPacket<'a> {
    /// Makes one of these parts, for transports and for tests of protocols.
    pub fn new(data: &'a [u8], descriptors: Vec<PassedDescriptor>) -> Self {
        Self { data, descriptors }
    }
}

/// A connection of packets as its protocol sees it. What it has in common with a stream,
/// such as closing and pausing, are the methods of [`AnyConnection`].
///
/// Every method may be called from any callback, and acts on the connection's state at once.
/// None of them calls a protocol. The callbacks that follow are called after the running
/// one has returned.
pub trait PacketTransport: AnyConnection {
    // Sending.

    /// Sends one packet.
    ///
    /// All packets of one turn leave together, after the running callback, by as few
    /// system calls as possible. Until then, and while the kernel has no room, a packet
    /// waits in a bounded [queue](QueueLimits), in order. A packet that was taken is
    /// sent, or comes back in [`send_failed`](PacketProtocol::send_failed), or counts
    /// as [unsent](Self::unsent_packets) when the connection ends. A packet may be
    /// empty.
    ///
    /// Most programs take an empty packet for the end, since recv(2) returns 0 for
    /// both.
    fn send(&mut self, data: &[u8]) -> SendStatus;

    /// Sends `parts`, one after the other, as one packet.
    fn send_sequence(&mut self, parts: &[&[u8]]) -> SendStatus;

    /// Sends one packet with descriptors. They leave and arrive with exactly this
    /// packet, which may be empty. Our copies are closed then.
    ///
    /// # Errors
    ///
    /// The descriptors come back if the packet is refused, or if there are more
    /// than 253.
    fn send_with_descriptors(
        &mut self,
        data: &[u8],
        descriptors: Vec<PassedDescriptor>,
    ) -> Result<SendStatus, SendDescriptorError>;

    /// How many packets wait to be sent. After the end, how many were never sent.
    fn unsent_packets(&self) -> usize;

    /// How many descriptors these packets have.
    fn unsent_descriptors(&self) -> usize;

    /// The limits of the queue.
    fn queue_limits(&self) -> QueueLimits;

    /// Sets the limits of the queue. Packets that wait already stay.
    fn set_queue_limits(&mut self, limits: QueueLimits);

    // What it is.

    /// The process that had the other end when the connection was made by connect(2),
    /// listen(2) or socketpair(2). The kernel vouches for it. Costs one system call.
    ///
    /// # Errors
    ///
    /// `NotConnected` after the end. Otherwise those of getsockopt(2).
    fn peer_credentials(&self) -> io::Result<Credentials>;

    /// A pidfd of the same process (`SO_PEERPIDFD`, Linux 6.5).
    ///
    /// # Errors
    ///
    /// `NotConnected` after the end. Otherwise those of getsockopt(2).
    fn peer_pidfd(&self) -> io::Result<OwnedFd>;

    /// Sets what happens to the linger setting of received sockets. See [`Linger`].
    fn set_received_linger(&mut self, linger: Linger);

    /// Sets whether the kernel accepts descriptors for us (`SO_PASSRIGHTS`). The
    /// default is true. With false, the sender gets `EPERM`. Descriptors that were sent
    /// before are still delivered.
    ///
    /// # Errors
    ///
    /// `ENOPROTOOPT` before Linux 6.16. `NotConnected` after the end.
    fn set_descriptors_accepted(&mut self, accepted: bool) -> io::Result<()>;

    /// Counters of the packets so far.
    fn counts(&self) -> DatagramCounts;

    /// Makes another descriptor of the socket, for somebody who goes on with it, such
    /// as another process. Each packet goes to the one that reads it first.
    ///
    /// # Errors
    ///
    /// `NotConnected` after the end. `EMFILE` if no descriptor number is free.
    fn duplicate(&self) -> io::Result<OwnedFd>;

    /// The handle of this connection, by which others reach it.
    fn handle(&self) -> PacketHandle;

    /// The transport, with its type forgotten.
    fn as_dyn(&mut self) -> &mut dyn PacketTransport;
}

impl fmt::Debug for dyn PacketTransport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PacketTransport")
            .field("handle", &self.handle())
            .field("state", &self.state())
            .field("peer", &self.peer())
            .finish_non_exhaustive()
    }
}

/// Forwards every callback to a protocol that several connections share. It is borrowed
/// only while a callback runs.
impl<T, P> PacketProtocol<T> for Rc<RefCell<P>>
where
    T: PacketTransport + ?Sized,
    P: PacketProtocol<T>,
{
    fn connection_made(&mut self, cx: &mut Context<'_, T>) {
        self.borrow_mut().connection_made(cx);
    }

    fn packet_received(&mut self, cx: &mut Context<'_, T>, packet: &mut Packet<'_>) {
        self.borrow_mut().packet_received(cx, packet);
    }

    fn send_failed(
        &mut self,
        cx: &mut Context<'_, T>,
        packet: UnsentPacket<'_>,
        error: &io::Error,
    ) {
        self.borrow_mut().send_failed(cx, packet, error);
    }

    fn sending_resumed(&mut self, cx: &mut Context<'_, T>) {
        self.borrow_mut().sending_resumed(cx);
    }

    fn read_connection_lost(&mut self, cx: &mut Context<'_, T>) -> AfterReadClosed {
        self.borrow_mut().read_connection_lost(cx)
    }

    fn write_connection_lost(&mut self, cx: &mut Context<'_, T>) {
        self.borrow_mut().write_connection_lost(cx);
    }

    fn connection_broken(&mut self, cx: &mut Context<'_, T>) {
        self.borrow_mut().connection_broken(cx);
    }

    fn connection_lost(&mut self, cx: &mut Context<'_, T>, reason: &CloseReason) {
        self.borrow_mut().connection_lost(cx, reason);
    }

    fn draining(&mut self, cx: &mut Context<'_, T>) -> AtDrain {
        self.borrow_mut().draining(cx)
    }

    fn is_idle(&self) -> bool {
        self.borrow().is_idle()
    }

    fn connection_reattached(&mut self, cx: &mut Context<'_, T>) {
        self.borrow_mut().connection_reattached(cx);
    }

    fn describe(&self, description: &mut Description) {
        self.borrow().describe(description);
    }

    fn log_prefix(&self) -> Cow<'_, str> {
        Cow::Owned(self.borrow().log_prefix().into_owned())
    }
}

/// Forwards every callback to the protocol in the box.
impl<T, P> PacketProtocol<T> for Box<P>
where
    T: PacketTransport + ?Sized,
    P: PacketProtocol<T> + ?Sized,
{
    forward_boxed_callbacks!();

    fn packet_received(&mut self, cx: &mut Context<'_, T>, packet: &mut Packet<'_>) {
        (**self).packet_received(cx, packet);
    }

    fn send_failed(
        &mut self,
        cx: &mut Context<'_, T>,
        packet: UnsentPacket<'_>,
        error: &io::Error,
    ) {
        (**self).send_failed(cx, packet, error);
    }

    fn sending_resumed(&mut self, cx: &mut Context<'_, T>) {
        (**self).sending_resumed(cx);
    }

    fn connection_broken(&mut self, cx: &mut Context<'_, T>) {
        (**self).connection_broken(cx);
    }
}
