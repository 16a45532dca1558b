//! Transports: everything a protocol may ask of its connection.

use std::fmt;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::OwnedFd;
use std::time::Duration;

use bowline_reactor::{Handle, Reactor};

use crate::connection::AnyConnection;
use crate::descriptors::PassedDescriptor;
use crate::error::{RegisterProducerError, SendDescriptorError};
use crate::producer::{ProducerKind, ProducerRef};

/// The name of any transport; see [`Context::get`](crate::Context::get).
pub type TransportHandle = Handle<dyn Transport>;

/// The name of a transport that passes descriptors; see
/// [`Reactor::get`](bowline_reactor::Reactor::get).
pub type UnixTransportHandle = Handle<dyn UnixTransport>;

/// The call that [`Transport::when_sent`] makes.
pub type WhenSent = Box<dyn FnOnce(&mut Reactor, Result<(), NotSent>)>;

/// The connection ended before the byte that was waited for had left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotSent {
    /// How many bytes the kernel took in all.
    pub sent: u64,
}

impl fmt::Display for NotSent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the connection ended when {} bytes had left", self.sent)
    }
}

impl std::error::Error for NotSent {}

/// A connection as its protocol sees it: an ordered stream of bytes both ways,
/// with flow control. What it has in common with packets, such as closing and pausing,
/// are the methods of [`AnyConnection`].
///
/// Every method may be called from any callback. It acts on the transport's state at
/// once, and calls no protocol or producer. Callbacks that follow from it are called
/// after the running one has returned.
pub trait Transport: AnyConnection {
    // Writing.

    /// Appends `data` to the bytes to be sent.
    ///
    /// The writes of one callback leave together, when it has returned: ten small writes
    /// are one system call. A large write on an empty buffer may go to the kernel at
    /// once. The order of bytes is always kept. An empty slice does nothing.
    ///
    /// The answer says whether the writer should go on. The bytes are taken all together
    /// or not at all ([`WriteStatus::Refused`]).
    fn write(&mut self, data: &[u8]) -> WriteStatus;

    /// Appends all of `parts`, as one write of their concatenation.
    fn write_sequence(&mut self, parts: &[&[u8]]) -> WriteStatus;

    /// Appends bytes that the caller gives away. A long `Vec` is sent from its own
    /// memory, without a copy.
    fn write_owned(&mut self, data: Vec<u8>) -> WriteStatus;

    /// Calls `then` when the kernel has taken all bytes before `position` of the stream.
    ///
    /// Positions are counted as [`bytes_sent`](AnyConnection::bytes_sent) counts. The bytes
    /// written so far end at `bytes_sent() + unsent_bytes()`. If the connection ends or
    /// is detached first, `then` is told so, with the position that was reached.
    ///
    /// Called once, after the running callback, the lowest position first. Not called
    /// when the reactor is dropped. When the kernel has taken a byte, the peer may not
    /// have it yet, but it does not need this process any more to get there.
    fn when_sent(&mut self, position: u64, then: WhenSent);

    /// The watermarks in force.
    fn watermarks(&self) -> Watermarks;

    /// Sets the watermarks: where producers are paused and resumed, and the limit of
    /// unsent bytes.
    fn set_watermarks(&mut self, watermarks: Watermarks);

    // Producers.

    /// Registers a producer. It is told when this transport's buffer is full and when it
    /// has drained.
    ///
    /// If the buffer is full already, a push producer is told to pause. A pull producer
    /// is asked for its first portion after the running callback. A close waits until
    /// the producer is unregistered.
    ///
    /// # Errors
    ///
    /// [`RegisterProducerError::AlreadyRegistered`]: the present producer stays.
    /// [`RegisterProducerError::NotConnected`]: the new one is told to stop.
    fn register_producer(
        &mut self,
        producer: ProducerRef,
        kind: ProducerKind,
    ) -> Result<(), RegisterProducerError>;

    /// Forgets the producer and closes: [`unregister_producer`](Self::unregister_producer)
    /// and then [`lose_connection`](AnyConnection::lose_connection). For a producer that is done,
    /// and for a protocol that is its own producer. (Twisted: `stopConsuming`.)
    fn stop_consuming(&mut self) {
        self.unregister_producer();
        self.lose_connection();
    }

    /// Forgets the producer without telling it. A close that waited for it goes on.
    /// Nothing happens if none is registered.
    fn unregister_producer(&mut self);

    /// Whether a push producer is registered and paused, or is about to be paused.
    fn is_producer_paused(&self) -> bool;

    // Reading.

    /// Whether more data may still be delivered: the transport is not closed or closing,
    /// and the peer's end has not been reached. A paused transport may be open for
    /// reading.
    fn is_open_for_reading(&self) -> bool;

    /// Sets how many bytes one read may take at the most, until it is set again. `None`,
    /// the default, is the size of the reactor's buffer.
    ///
    /// Descriptors arrive with the read that takes the first byte of their message. So a
    /// protocol that knows where its messages end can let no read go further, and then
    /// has exactly the descriptors of each message with it.
    fn set_read_limit(&mut self, limit: Option<NonZeroUsize>);

    /// Puts `data` in front of whatever is read next. It is delivered as if it had just
    /// arrived. For bytes that were read from this connection before it had its present
    /// protocol, in another process for instance.
    ///
    /// It is delivered after the running callback, in this turn of the loop or the next,
    /// and before anything that the kernel holds. It counts as a read:
    ///
    /// - nothing is delivered while reading is paused or held,
    /// - one piece is no longer than the [read limit](Self::set_read_limit),
    /// - one turn delivers as many pieces as its budget of reads allows, 32 by default.
    ///
    /// Data that was put back earlier comes after it. It is dropped if nothing can be
    /// delivered any more.
    fn push_back(&mut self, data: Vec<u8>);

    // Closing.

    /// Makes every orderly close from now on wait for the peer, within the limits of
    /// `lingering`. `None`, the default, does not wait.
    ///
    /// TCP answers bytes that nobody has read, or that come after a close, with a reset.
    /// A reset destroys bytes that the peer has not received yet, such as the answer to
    /// an upload that was refused. A lingering close sends everything, and then says that
    /// nothing more comes. It reads and drops whatever the peer still sends, until the
    /// peer has closed too or a limit is reached. The reason is
    /// [`CloseReason::Done`](crate::CloseReason::Done) in both cases.
    /// [`lose_connection_within`](AnyConnection::lose_connection_within) bounds the time until
    /// everything was sent.
    ///
    /// A socket that others may hold closes without waiting. So does a UNIX socket, which
    /// has no resets. For all connections of a listener or connector, this is an option of
    /// its endpoint (`lingering_close`).
    fn set_lingering_close(&mut self, lingering: Option<LingeringClose>) {
        let _ = lingering;
    }

    // What it is.

    /// This transport's name, for others to reach it by.
    fn handle(&self) -> TransportHandle;

    /// The transport, with its type forgotten.
    fn as_dyn(&mut self) -> &mut dyn Transport;

    /// Closes received descriptors that nobody wants, and counts and logs them. For
    /// protocols that wrap others.
    fn close_unclaimed(&mut self, descriptors: Vec<OwnedFd>);
}

/// A transport that passes open descriptors beside its bytes.
#[diagnostic::on_unimplemented(
    message = "`{Self}` does not pass descriptors",
    note = "only UNIX connections do: listen, connect or adopt with `Unix`, or `listen_unix` and its like",
    note = "a protocol that passes none is `impl<T: Transport> Protocol<T>`, and works over anything"
)]
pub trait UnixTransport: Transport {
    /// Queues a descriptor to travel with the earliest bytes not yet sent.
    ///
    /// Takes ownership: our copy is closed when the kernel has its own, or earlier if the
    /// connection ends first. Descriptors keep their order, and each claims one byte. The
    /// peer may see a descriptor before bytes that were written earlier, but never after
    /// the byte that it claimed. A descriptor with no byte to travel with waits until
    /// something is written. Makes no system call. (Twisted: `sendFileDescriptor`.)
    ///
    /// Where too many are on their way to receivers who do not read (`ETOOMANYREFS`, a
    /// limit of the user, in all processes together), they wait in the queue and are tried
    /// again, at most every 50 ms. If that lasts for a second it is logged, once for each
    /// connection.
    ///
    /// # Errors
    ///
    /// The descriptor comes back in the error when the connection is lost,
    /// closing or half-closed, or the queue is at its limit.
    ///
    /// # Examples
    ///
    /// ```
    /// # use std::fs::File;
    /// # use bowline::error::SendDescriptorError;
    /// # use bowline::{Context, UnixTransport};
    /// fn hand_over<T: UnixTransport>(cx: &mut Context<'_, T>, file: File) -> Result<(), SendDescriptorError> {
    ///     cx.transport.send_file_descriptor(file.into())?;
    ///     cx.transport.write(b"f");
    ///     Ok(())
    /// }
    /// ```
    fn send_file_descriptor(&mut self, fd: PassedDescriptor) -> Result<(), SendDescriptorError>;

    /// Writes one message: `data`, with all of `descriptors` attached to its first byte.
    ///
    /// One system call begins with that byte and carries the descriptors. Earlier bytes
    /// leave in a call of their own, and nothing overtakes them. A receiver that limits
    /// its reads to messages gets exactly these descriptors with exactly these bytes.
    /// Without descriptors this is [`write`](Transport::write).
    ///
    /// # Errors
    ///
    /// Nothing is queued, and the descriptors come back, when
    ///
    /// - there are more than 253, or more than the
    ///   [limit](DescriptorLimits::per_exact_message),
    /// - `data` is empty,
    /// - descriptors of [`send_file_descriptor`](Self::send_file_descriptor) still wait
    ///   for a byte,
    /// - or the connection or another limit does not allow it.
    fn write_with_descriptors(
        &mut self,
        data: &[u8],
        descriptors: Vec<PassedDescriptor>,
    ) -> Result<WriteStatus, SendDescriptorError>;

    /// How many descriptors are queued and have not left. After the loss: how many never
    /// left.
    fn unsent_descriptors(&self) -> usize;

    /// Takes back the descriptors that were queued and never left, in order. They can be
    /// sent to somebody else.
    ///
    /// Only inside [`connection_lost`](crate::Protocol::connection_lost); at any other
    /// time it answers none. Descriptors that are not taken back are closed afterwards.
    fn reclaim_descriptors(&mut self) -> Vec<PassedDescriptor> {
        Vec::new()
    }

    /// How many descriptors have left since the connection was made.
    fn descriptors_sent(&self) -> u64;

    /// The limits in force.
    fn descriptor_limits(&self) -> DescriptorLimits;

    /// Sets the limits on descriptors, both ways.
    fn set_descriptor_limits(&mut self, limits: DescriptorLimits);

    /// Sets what happens to the linger setting of received sockets; see
    /// [`Linger`].
    fn set_received_linger(&mut self, linger: Linger);

    /// Whether the kernel accepts descriptors that are sent to us (`SO_PASSRIGHTS`). With
    /// `false` it refuses them, and the sender gets `EPERM`. The default is `true`.
    ///
    /// Descriptors that were sent before are still delivered. Refusing also makes reading
    /// as cheap as over TCP: when no descriptor can wait, there is nothing to look for
    /// beside the bytes. If another process shares the socket, it must not set the option
    /// back behind our back: descriptors would be lost.
    ///
    /// # Errors
    ///
    /// `ENOPROTOOPT` before Linux 6.16.
    fn set_descriptors_accepted(&mut self, accepted: bool) -> io::Result<()>;

    /// Takes nothing more from the peer (shutdown(2), `SHUT_RD`). What has arrived is still
    /// delivered, and then the [end of its stream](crate::Protocol::read_connection_lost).
    ///
    /// From the moment of the call, each write of the peer fails with `EPIPE`. The kernel
    /// puts one order on both: whatever the peer could write, we read. So an answer that
    /// was not read by the end was never given. What we write still arrives.
    ///
    /// # Errors
    ///
    /// `NotConnected` after the loss.
    fn refuse_input(&mut self) -> io::Result<()>;

    /// The credentials of the process at the other end, which connected or listens
    /// (`SO_PEERCRED`). They are those of the time when the connection was made; another
    /// process may hold it now.
    ///
    /// # Errors
    ///
    /// `NotConnected` after the loss; those of getsockopt(2).
    fn peer_credentials(&self) -> io::Result<Credentials>;

    /// A descriptor of the process at the other end (`SO_PEERPIDFD`). Unlike a number, it
    /// never comes to mean another process.
    ///
    /// # Errors
    ///
    /// `ENOPROTOOPT` or `EINVAL` before Linux 6.5; `NotConnected` after the
    /// loss.
    fn peer_pidfd(&self) -> io::Result<OwnedFd>;

    /// This transport's name, for others to pass descriptors through it.
    fn unix_handle(&self) -> UnixTransportHandle;
}

/// A transport over TCP.
#[diagnostic::on_unimplemented(
    message = "`{Self}` has no options of TCP",
    note = "a protocol that needs none is `impl<T: Transport> Protocol<T>`, and works over anything"
)]
pub trait TcpTransport: Transport {
    /// Whether small segments are sent at once (`TCP_NODELAY`). Off, unless the listener
    /// or connector was told otherwise.
    ///
    /// # Errors
    ///
    /// `NotConnected` after the loss; those of getsockopt(2).
    fn no_delay(&self) -> io::Result<bool>;

    /// Sets `TCP_NODELAY`.
    ///
    /// # Errors
    ///
    /// As [`no_delay`](Self::no_delay).
    fn set_no_delay(&mut self, on: bool) -> io::Result<()>;

    /// Whether an idle peer is probed (`SO_KEEPALIVE`).
    ///
    /// # Errors
    ///
    /// As [`no_delay`](Self::no_delay).
    fn keep_alive(&self) -> io::Result<bool>;

    /// Sets `SO_KEEPALIVE`.
    ///
    /// # Errors
    ///
    /// As [`no_delay`](Self::no_delay).
    fn set_keep_alive(&mut self, on: bool) -> io::Result<()>;

    /// Sets how an idle peer is probed: the time until the first probe, the time between
    /// probes, and the number of unanswered probes after which the peer counts as lost
    /// (`TCP_KEEPIDLE`, `TCP_KEEPINTVL`, `TCP_KEEPCNT`). Times are in whole seconds, at
    /// least one each.
    ///
    /// # Errors
    ///
    /// As [`no_delay`](Self::no_delay); `InvalidInput` for values that the kernel does
    /// not accept.
    fn set_keep_alive_times(
        &mut self,
        idle: Duration,
        interval: Duration,
        probes: u32,
    ) -> io::Result<()>;
}

/// The answer of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteStatus {
    /// The bytes were taken; go on.
    Ready,
    /// The bytes were taken, and the buffer is full now. Better wait until it has
    /// drained.
    Full,
    /// The bytes were not taken. The connection is lost, closing or half-closed, or the
    /// limit of unsent bytes would be passed.
    Refused,
}

impl WriteStatus {
    /// Whether the writer should go on.
    pub fn is_ready(self) -> bool {
        self == Self::Ready
    }
}

/// Where in its life a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum TransportState {
    /// Open, perhaps with one side closed.
    Connected,
    /// Asked to close, and not closed yet.
    Closing,
    /// Ended.
    Lost,
}

/// How long an orderly close waits for the peer; see
/// [`Transport::set_lingering_close`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct LingeringClose {
    /// The longest wait; default 5 s.
    pub time: Duration,
    /// How many bytes are read and dropped at the most; default 16 MiB, which is more
    /// than can be on its way.
    pub bytes: usize,
}

bowline_reactor::setters!(LingeringClose {
    time: Duration,
    bytes: usize,
});

impl Default for LingeringClose {
    fn default() -> Self {
        Self {
            time: Duration::from_secs(5),
            bytes: 16 << 20,
        }
    }
}

/// The numbers of unsent bytes at which producers are paused and resumed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Watermarks {
    /// Producers are resumed at this many or fewer; default 0, Twisted's rule.
    pub low: usize,
    /// Producers are paused above this many; default 65,536.
    pub high: usize,
    /// A write that would leave more than this many unsent is refused; default
    /// `usize::MAX`, no limit.
    pub limit: usize,
}

bowline_reactor::setters!(Watermarks {
    low: usize,
    high: usize,
    limit: usize,
});

impl Default for Watermarks {
    fn default() -> Self {
        Self {
            low: 0,
            high: 65_536,
            limit: usize::MAX,
        }
    }
}

/// The limits on descriptors of one transport.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DescriptorLimits {
    /// The buffer counts as full when more than this many are queued; default 64.
    pub high: usize,
    /// At most this many are queued, more are refused; default 65,536.
    pub queued: usize,
    /// How many descriptors of
    /// [`send_file_descriptor`](UnixTransport::send_file_descriptor) one message carries
    /// at the most; default 64, at most 253.
    ///
    /// Peers differ in how many they take from one message, so set this to the number of
    /// yours. A program on libuv takes 60 and gets no sign of the rest. A Wayland library
    /// takes 28 and ends the connection if there are more.
    pub per_message: usize,
    /// How many descriptors one message of
    /// [`write_with_descriptors`](UnixTransport::write_with_descriptors) may have, more
    /// are refused; default 253, as many as the kernel takes. Set this to the number
    /// that the peer takes, too.
    pub per_exact_message: usize,
    /// How many descriptors the peer may send in one read; default 253, as many as fit.
    pub received_per_read: usize,
    /// How many descriptors the peer may send during the life of the connection; default
    /// `usize::MAX`, no limit.
    pub received_in_all: usize,
    /// How many descriptors the peer may send, during the life of the connection, that
    /// the protocol does not take; default 64. Each is closed at once. A peer that sends
    /// more is mistaken, or means to keep us busy.
    pub unclaimed: usize,
}

bowline_reactor::setters!(DescriptorLimits {
    high: usize,
    queued: usize,
    per_message: usize,
    per_exact_message: usize,
    received_per_read: usize,
    received_in_all: usize,
    unclaimed: usize,
});

impl Default for DescriptorLimits {
    fn default() -> Self {
        Self {
            high: 64,
            queued: 65_536,
            per_message: 64,
            per_exact_message: 253,
            received_per_read: 253,
            received_in_all: usize::MAX,
            unclaimed: 64,
        }
    }
}

/// What happens to the linger setting of received sockets.
///
/// A peer can send a TCP socket that lingers and has unsent data. Closing it blocks the
/// whole loop for as long as the peer chose, although the socket is non-blocking (up to
/// 2^31 seconds on kernel 6.18).
///
/// A UNIX socket can have such a socket in its own queue, where no setting reaches it.
/// bowline closes sockets of that kind in another thread. A protocol that has taken one
/// should do the same (`close_received`).
///
/// One case is left. If there is no free descriptor number here, the kernel closes the
/// descriptor before we have it, and that can block too. If a peer is not trusted and
/// has no descriptors to send, better refuse all of them
/// ([`set_descriptors_accepted`](UnixTransport::set_descriptors_accepted)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Linger {
    /// Received sockets lose their linger setting before anything else. That is one
    /// system call for each descriptor. The setting is shared with the sender. The
    /// default.
    Clear,
    /// Received sockets keep it. For peers that are trusted.
    Keep,
}

/// Who is at the other end of a UNIX connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Credentials {
    /// The process, if it is visible from our namespace.
    pub pid: Option<u32>,
    /// The effective user.
    pub uid: u32,
    /// The effective group.
    pub gid: u32,
}

impl fmt::Debug for dyn Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Transport")
            .field("handle", &self.handle())
            .field("state", &self.state())
            .field("peer", &self.peer())
            .finish_non_exhaustive()
    }
}
