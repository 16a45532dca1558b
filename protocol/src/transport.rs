//! What a protocol may ask of its connection.

use std::fmt;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;

use bowline_reactor::{Handle, Reactor};

use crate::address::Address;
use crate::descriptors::PassedDescriptor;
use crate::error::{RegisterProducerError, SendDescriptorError};
use crate::producer::{ProducerKind, ProducerRef};

/// The name of any transport; see [`Context::get`](crate::Context::get).
pub type TransportHandle = Handle<dyn Transport>;

/// The name of a transport that passes descriptors; see
/// [`Reactor::get`](bowline_reactor::Reactor::get).
pub type UnixTransportHandle = Handle<dyn UnixTransport>;

/// What [`Transport::when_sent`] calls.
pub type WhenSent = Box<dyn FnOnce(&mut Reactor, Result<(), NotSent>)>;

/// The connection has ended before a byte had left that was waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotSent {
    /// How many bytes the kernel has taken in all.
    pub sent: u64,
}

impl fmt::Display for NotSent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the connection ended when {} bytes had left", self.sent)
    }
}

impl std::error::Error for NotSent {}

/// A connection as its protocol sees it: an ordered stream of bytes both ways,
/// with flow control.
///
/// Every method may be called from any callback, and acts on the transport's
/// state at once. None of them calls a protocol or a producer. The callbacks that
/// follow are called after the running one has returned.
pub trait Transport: 'static {
    // Writing.

    /// Appends `data` to what is to be sent.
    ///
    /// What one turn writes leaves together, after the running callback: ten small
    /// writes are one system call. A large write on an empty buffer may go to the
    /// kernel at once. The order of bytes is always kept. An empty slice does nothing.
    ///
    /// The answer says whether the writer should go on. Bytes are taken in
    /// full, or not at all ([`WriteStatus::Refused`]).
    fn write(&mut self, data: &[u8]) -> WriteStatus;

    /// Appends all of `parts`, as one write of their concatenation.
    fn write_sequence(&mut self, parts: &[&[u8]]) -> WriteStatus;

    /// Appends bytes that the caller gives away: a long `Vec` is sent from
    /// where it is, without a copy.
    fn write_owned(&mut self, data: Vec<u8>) -> WriteStatus;

    /// How many bytes are buffered and not yet taken by the kernel. After the
    /// loss: how many never were.
    fn unsent_bytes(&self) -> usize;

    /// How many bytes the kernel has taken since the connection was made.
    fn bytes_sent(&self) -> u64;

    /// Calls `then` when the kernel has taken all bytes before `position` of the stream,
    /// counted as by [`bytes_sent`](Self::bytes_sent); or, with how far it came, when
    /// the connection has ended or was detached before. What was written so far ends
    /// at `bytes_sent() + unsent_bytes()`.
    ///
    /// Called once, after the running callback, the lowest position first; not at all
    /// when the reactor is dropped. That the kernel has taken a byte does not mean that
    /// the peer has it. But it does not need this process any more to get there.
    fn when_sent(&mut self, position: u64, then: WhenSent);

    /// Whether a producer should wait: more unsent bytes than the high
    /// watermark, or more queued descriptors than their limit.
    fn is_send_buffer_full(&self) -> bool;

    /// The watermarks in force.
    fn watermarks(&self) -> Watermarks;

    /// Sets where producers are paused and resumed, and the limit of unsent
    /// bytes.
    fn set_watermarks(&mut self, watermarks: Watermarks);

    // Producers.

    /// Registers the producer that is told when this transport's buffer is
    /// full and when it has drained.
    ///
    /// If the buffer is full, a push producer is told to pause. A pull producer is
    /// asked for its first portion after the running callback. A close waits until the
    /// producer is unregistered.
    ///
    /// # Errors
    ///
    /// [`RegisterProducerError::AlreadyRegistered`], and the present producer
    /// stays; [`RegisterProducerError::NotConnected`], and the new one is told
    /// to stop.
    fn register_producer(
        &mut self,
        producer: ProducerRef,
        kind: ProducerKind,
    ) -> Result<(), RegisterProducerError>;

    /// Forgets the producer and closes, as
    /// [`unregister_producer`](Self::unregister_producer) and then
    /// [`lose_connection`](Self::lose_connection). A producer that is done calls it, and so
    /// does a protocol that is its own producer. (Twisted: `stopConsuming`.)
    fn stop_consuming(&mut self) {
        self.unregister_producer();
        self.lose_connection();
    }

    /// Forgets the producer, without telling it. A close that waited for it
    /// goes on. Nothing happens when none is registered.
    fn unregister_producer(&mut self);

    /// Whether a push producer is registered and paused, or about to be told
    /// so.
    fn is_producer_paused(&self) -> bool;

    // Reading.

    /// Stops reading: no data is delivered until
    /// [`resume_producing`](Self::resume_producing). What the peer sends waits
    /// in the kernel, its end included.
    ///
    /// A write that fails meanwhile ends nothing yet. Later writes are refused. What
    /// had arrived is delivered after the pause, and then the connection ends with the
    /// error. With nothing left to be read it ends at once, paused or not.
    ///
    /// A TCP connection that the peer has reset ends during the pause: nothing can
    /// come or go any more. Bytes that had arrived wait for a quarter of a second, and
    /// as long again each time that some were taken. Then they are dropped. (A UNIX
    /// socket knows no reset. What its peer has sent is complete, and waits.)
    fn pause_producing(&mut self);

    /// Reads again.
    fn resume_producing(&mut self);

    /// Whether reading is paused.
    fn is_reading_paused(&self) -> bool;

    /// Stops reading for a reason that neither the protocol nor a producer
    /// knows of, such as a [throttle](crate::policies::Throttle). Nothing is
    /// read until each hold was [released](Self::release_reading).
    ///
    /// Holds are counted. They are independent of
    /// [`pause_producing`](Self::pause_producing): a connection is read when it
    /// is neither paused nor held. Failed writes and resets are as they are there.
    /// Only the pause shows in
    /// [`is_reading_paused`](Self::is_reading_paused), and only its end is told
    /// with [`reading_resumed`](crate::Protocol::reading_resumed).
    fn hold_reading(&mut self);

    /// Takes one hold back. Nothing happens when there is none.
    fn release_reading(&mut self);

    /// Whether more data may be delivered at all: neither closed, closing nor
    /// at the peer's end. A paused transport may be open for reading.
    fn is_open_for_reading(&self) -> bool;

    /// Sets how many bytes one read may take at the most, until it is set
    /// anew; `None`, the default, is the size of the reactor's buffer.
    ///
    /// Descriptors arrive with the read that takes the first byte of their
    /// message. So a protocol that knows where its messages end, and lets no read go
    /// further, has each message's own descriptors with it.
    fn set_read_limit(&mut self, limit: Option<NonZeroUsize>);

    /// Puts `data` in front of what is to be read next. It is delivered as if it had
    /// just arrived. This is for bytes that were read from this connection before it had
    /// its present protocol, in another process for instance.
    ///
    /// It is delivered after the running callback, in this turn of the loop or the next,
    /// and before anything that the kernel holds. It counts as a read: not while reading
    /// is paused or held, not more at a time than the
    /// [read limit](Self::set_read_limit), and only as often in a turn as the budget of
    /// reads allows, 32 times by default. What was put back before comes after it.
    /// Dropped if nothing can be delivered any more.
    fn push_back(&mut self, data: Vec<u8>);

    // Closing.

    /// Closes in an orderly way: reads no more, sends what is buffered, waits
    /// for a registered producer, then ends with
    /// [`CloseReason::Done`](crate::CloseReason::Done).
    ///
    /// It waits for a protocol that is its own producer too: another connection may have
    /// asked for the close, and what is half sent is to arrive. A protocol that is done
    /// itself calls [`stop_consuming`](Self::stop_consuming).
    ///
    /// Later writes are refused, except those of a producer that is still
    /// registered. Never calls back before it returns. (Twisted:
    /// `loseConnection`.)
    fn lose_connection(&mut self);

    /// As [`lose_connection`](Self::lose_connection), but not for longer than
    /// `deadline`: what is unsent then is dropped, and the reason is
    /// [`CloseReason::CloseTimedOut`](crate::CloseReason::CloseTimedOut).
    fn lose_connection_within(&mut self, deadline: Duration);

    /// Has every orderly close from now on wait for the peer as `lingering` says;
    /// `None`, the default, does not wait.
    ///
    /// TCP answers bytes that nobody has read, or that come after a close, with a reset.
    /// The reset destroys what the peer has not received yet, such as the answer to an
    /// upload that was refused. A lingering close sends everything, and then says that
    /// nothing more comes. It reads and drops what the peer still sends, until the peer
    /// has closed too or a limit is reached. The reason is
    /// [`CloseReason::Done`](crate::CloseReason::Done) in both cases.
    /// [`lose_connection_within`](Self::lose_connection_within) bounds the time until
    /// everything was sent.
    ///
    /// A socket that others may hold closes as without. So does a UNIX one, which has
    /// no resets.
    fn set_lingering_close(&mut self, lingering: Option<LingeringClose>) {
        let _ = lingering;
    }

    /// Ends the connection now: what is buffered is dropped, nothing more is
    /// read, and a TCP peer sees a reset, unless the socket was adopted and may
    /// be another's too. (Twisted: `abortConnection`.)
    fn abort_connection(&mut self);

    /// Closes our side once everything buffered was sent, and goes on reading.
    /// Later writes are refused, except those of a producer that is still
    /// registered. (Twisted: `loseWriteConnection`.)
    fn lose_write_connection(&mut self);

    // What it is.

    /// Where in its life the connection is.
    fn state(&self) -> TransportState;

    /// Our address. Readable after the loss too.
    fn host(&self) -> Address;

    /// The peer's address. Readable after the loss too.
    fn peer(&self) -> Address;

    /// This transport's name, for others to reach it by.
    fn handle(&self) -> TransportHandle;

    /// The transport, with its type forgotten.
    fn as_dyn(&mut self) -> &mut dyn Transport;

    /// The socket itself, for options that have no method here; `None` after
    /// the loss, and for transports in memory. (Twisted: `getHandle`.)
    ///
    /// Reading, writing or closing it behind the transport's back breaks the
    /// transport.
    fn socket_descriptor(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Has `observer` told of everything that is written from now on; `None`, the
    /// default, tells nobody. There is one at a time, and it goes along when the
    /// connection is detached. [`TrafficLog`](crate::policies::TrafficLog) uses it.
    /// Transports that cannot do it, the default, do nothing.
    fn set_write_observer(&mut self, observer: Option<Rc<dyn WriteObserver>>) {
        let _ = observer;
    }

    /// Closes received descriptors that nobody wants, and counts and logs them;
    /// for protocols that wrap others.
    fn close_unclaimed(&mut self, descriptors: Vec<OwnedFd>);
}

/// Is told what is written to a transport: [`Transport::set_write_observer`].
pub trait WriteObserver: fmt::Debug {
    /// `data`, which is not empty, was taken to be sent.
    ///
    /// Called inside [`Transport::write`], so that the order is that of the writes.
    /// There is no way to the transport from here. A panic is one of whoever wrote.
    fn written(&self, data: &[u8]);
}

/// A transport that passes open descriptors beside its bytes.
pub trait UnixTransport: Transport {
    /// Queues a descriptor to travel with the earliest bytes not yet sent.
    ///
    /// Takes ownership: our copy is closed once the kernel has its own, or when the
    /// connection ends first. Descriptors keep their order, and claim one byte each. The
    /// peer may see one before bytes that were written before it. It never sees one
    /// after the byte it claimed. A descriptor with no byte to travel with waits until
    /// something is written. Makes no system call. (Twisted: `sendFileDescriptor`.)
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
    /// # use bowline_protocol::{Context, UnixTransport, SendDescriptorError};
    /// fn hand_over<T: UnixTransport>(cx: &mut Context<'_, T>, file: File) -> Result<(), SendDescriptorError> {
    ///     cx.transport.send_file_descriptor(file.into())?;
    ///     cx.transport.write(b"f");
    ///     Ok(())
    /// }
    /// ```
    fn send_file_descriptor(&mut self, fd: PassedDescriptor) -> Result<(), SendDescriptorError>;

    /// Writes one message: `data`, with `descriptors` attached to its first
    /// byte, all in one system call that begins there.
    ///
    /// Earlier bytes leave in a call of their own, and nothing overtakes them. A receiver
    /// that limits its reads to messages gets exactly these descriptors with exactly
    /// these bytes. Without descriptors this is [`write`](Transport::write).
    ///
    /// # Errors
    ///
    /// Nothing is queued and the descriptors come back when there are more than
    /// 253, or than [set](DescriptorLimits::per_exact_message), when `data` is empty, when descriptors of
    /// [`send_file_descriptor`](Self::send_file_descriptor) still wait for a
    /// byte, or when the connection or a limit does not allow it.
    fn write_with_descriptors(
        &mut self,
        data: &[u8],
        descriptors: Vec<PassedDescriptor>,
    ) -> Result<WriteStatus, SendDescriptorError>;

    /// How many descriptors are queued and have not left. After the loss: how
    /// many never did.
    fn unsent_descriptors(&self) -> usize;

    /// Takes back the descriptors that were queued and never left, in order:
    /// from inside [`connection_lost`](crate::Protocol::connection_lost), to
    /// send them to somebody else. What is left there is closed afterwards.
    /// None at any other time.
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

    /// Lets the kernel refuse (`false`) or accept (`true`, the default)
    /// descriptors sent to us: the sender gets `EPERM` instead
    /// (`SO_PASSRIGHTS`).
    ///
    /// Those sent before are still delivered. Refusing also makes reading as
    /// cheap as over TCP: once none can wait, there is nothing to look for
    /// beside the bytes. A process with which the socket is shared must not set
    /// the option back behind our back: descriptors would be lost then.
    ///
    /// # Errors
    ///
    /// `ENOPROTOOPT` before Linux 6.16.
    fn set_descriptors_accepted(&mut self, accepted: bool) -> io::Result<()>;

    /// Who connected, or listens: the process at the other end when the
    /// connection was made (`SO_PEERCRED`), not necessarily the one that holds
    /// it now.
    ///
    /// # Errors
    ///
    /// `NotConnected` after the loss; those of getsockopt(2).
    fn peer_credentials(&self) -> io::Result<Credentials>;

    /// A descriptor of the process at the other end (`SO_PEERPIDFD`): unlike a
    /// number it never comes to mean another process.
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
pub trait TcpTransport: Transport {
    /// Whether small segments are sent at once (`TCP_NODELAY`). Off by default
    /// unless the listener or connector was told otherwise.
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

    /// Sets when an idle peer is first probed, how often then, and after how
    /// many probes without an answer it counts as lost (`TCP_KEEPIDLE`,
    /// `TCP_KEEPINTVL`, `TCP_KEEPCNT`); in whole seconds, at least one each.
    ///
    /// # Errors
    ///
    /// As [`no_delay`](Self::no_delay); `InvalidInput` beyond what the kernel
    /// takes.
    fn set_keep_alive_times(
        &mut self,
        idle: Duration,
        interval: Duration,
        probes: u32,
    ) -> io::Result<()>;
}

/// What a write says to the writer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteStatus {
    /// Taken; go on.
    Ready,
    /// Taken, and the buffer is full now: better wait until it has drained.
    Full,
    /// Not taken: the connection is lost, closing or half-closed, or the limit
    /// of unsent bytes would be passed.
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
    /// Asked to close, and not done yet.
    Closing,
    /// Ended.
    Lost,
}

/// How long an orderly close waits for the peer; see
/// [`Transport::set_lingering_close`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct LingeringClose {
    /// For how long at the most; default 5 s.
    pub time: Duration,
    /// How many bytes are read and dropped at the most; default 16 MiB, more than can
    /// be on its way.
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

/// Where producers are paused and resumed: unsent bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Watermarks {
    /// Resume at this many or fewer; default 0, Twisted's rule.
    pub low: usize,
    /// Pause above this many; default 65,536.
    pub high: usize,
    /// Refuse a write that would leave more than this unsent; default
    /// `usize::MAX`, none.
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
    /// The buffer counts as full above this many queued; default 64.
    pub high: usize,
    /// Queueing is refused at this many; default 65,536.
    pub queued: usize,
    /// One message carries at most this many of those queued with
    /// [`send_file_descriptor`](UnixTransport::send_file_descriptor); default
    /// 64; at most 253.
    ///
    /// What a peer takes by one message is its own: of more a program on libuv
    /// gets 60 and no sign of the rest, and a Wayland library 28 before it ends
    /// the connection. Set this to what the peer takes.
    pub per_message: usize,
    /// One message of
    /// [`write_with_descriptors`](UnixTransport::write_with_descriptors) may
    /// come with at most this many, more are refused; default 253, all that the
    /// kernel takes. Set this to what the peer takes, too.
    pub per_exact_message: usize,
    /// The peer may send at most this many in what is received by one read;
    /// default 253, all that fit.
    pub received_per_read: usize,
    /// The peer may send at most this many during the life of the connection;
    /// default `usize::MAX`, none.
    pub received_in_all: usize,
    /// The peer may send at most this many that the protocol does not take,
    /// during the life of the connection; default 64. Each is closed at once;
    /// this ends what can only be a mistake or meant to keep us busy.
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
/// A peer can send a TCP socket that lingers, with unsent data: closing it
/// then blocks the whole loop for as long as the peer chose (kernel 6.18: up
/// to 2^31 seconds), although the socket is non-blocking.
///
/// A UNIX socket can have such a socket in its own queue, where no setting reaches it:
/// what bowline closes of that kind it closes in another thread, and a protocol that
/// has taken one does well to do the same (`close_received`).
///
/// What is closed by the kernel before we ever have it can block all the same:
/// descriptors that find no free number here. A peer that is not trusted, and has no
/// descriptors to send, is better refused them altogether
/// ([`set_descriptors_accepted`](UnixTransport::set_descriptors_accepted)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Linger {
    /// Received sockets lose their linger setting before anything else; one
    /// system call for each descriptor. The setting is shared with the sender.
    /// The default.
    Clear,
    /// They keep it: for peers that are trusted.
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
