//! What moves bytes under a transport: a socket, or a layer on top of another.
//!
//! A [`Stream`](crate::Stream) buffers, closes, and keeps producers in step. What
//! differs between kinds of connection is how bytes move, and that is said here. A
//! layer such as [`SendmsgMixin`](crate::SendmsgMixin) overrides
//! [`write_some_data`](FileDescriptor::write_some_data),
//! [`do_read`](FileDescriptor::do_read) and
//! [`is_send_buffer_full`](FileDescriptor::is_send_buffer_full), and leaves the rest
//! to what is below. (Twisted: `abstract.FileDescriptor`.)

use std::any::Any;
use std::io::{self, IoSlice};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Instant;

use bowline_protocol::{Address, CloseReason, Credentials, Remains};
use bowline_reactor::{Interest, Reactor, Token};

use crate::descriptor_queue::UnsentDescriptors;
use crate::link::Link;
use crate::shared::ReadBuffers;
use crate::sys;

/// Moves the bytes of one connection: the base trait of sockets and of layers.
///
/// A *layer* holds another `FileDescriptor`, names it as [`below`](Self::below), and
/// overrides what it changes. It may change bytes, have bytes of its own, be
/// established later than what is below, and close in steps. The other end of the
/// line is a [`Socket`]. Who calls these methods is the [`Stream`](crate::Stream)
/// and the loop; none of them calls user code.
///
/// Methods come with the [`Link`], by which a layer says what follows.
///
/// # Examples
///
/// A layer that turns every bit over, put on TCP. It neither holds bytes nor has any of
/// its own, so that all but two methods say only what it is on:
///
/// ```
/// use std::io;
/// use bowline_protocol::{Address, Context, Protocol, Transport};
/// use bowline_reactor::Reactor;
/// use bowline_transport::endpoint::Listen as _;
/// use bowline_transport::{
///     FileDescriptor, Link, ReadBuffers, Received, Socket, Tcp, TcpSocket, Transports,
/// };
///
/// struct Inverted<B>(B);
///
/// impl<B: FileDescriptor> FileDescriptor for Inverted<B> {
///     fn write_some_data(&mut self, link: &mut Link, data: &[u8]) -> io::Result<usize> {
///         // A piece at a time, so that this costs no more than that. What is not taken
///         // is offered again, and has changed nothing.
///         let mut piece = [0; 4096];
///         let count = data.len().min(piece.len());
///         for (to, from) in piece.iter_mut().zip(data) {
///             *to = !from;
///         }
///         self.0.write_some_data(link, &piece[..count])
///     }
///
///     fn do_read(
///         &mut self,
///         link: &mut Link,
///         buffers: &mut ReadBuffers,
///         limit: usize,
///     ) -> io::Result<Received> {
///         let received = self.0.do_read(link, buffers, limit)?;
///         for byte in &mut buffers.bytes()[..received.bytes()] {
///             *byte = !*byte;
///         }
///         Ok(received)
///     }
///
///     fn below(&self) -> Option<&dyn FileDescriptor> {
///         Some(&self.0)
///     }
///
///     fn below_mut(&mut self) -> Option<&mut dyn FileDescriptor> {
///         Some(&mut self.0)
///     }
///
///     fn socket(&self) -> &dyn Socket {
///         self.0.socket()
///     }
///
///     fn socket_mut(&mut self) -> &mut dyn Socket {
///         self.0.socket_mut()
///     }
/// }
///
/// struct Echo;
///
/// impl<T: Transport> Protocol<T> for Echo {
///     fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
///         cx.transport.write(data);
///     }
/// }
///
/// let mut reactor = Reactor::new()?;
/// let here = Tcp::at(([127, 0, 0, 1], 0).into());
/// let here = here.layer(|socket: TcpSocket, _| Inverted(socket));
/// reactor.listen(here, |_: &Address| Echo)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// One with a handshake, bytes of its own and a word at its end is
/// `tests/outside/src/scramble.rs` in the repository.
pub trait FileDescriptor: Any {
    /// Offers bytes of the user's, the first of which is the first that was not
    /// taken yet, and answers how many were taken: at least one. Called when the
    /// socket may take some, with no less than what was offered before and not
    /// taken. (Twisted: `writeSomeData`.)
    ///
    /// A layer that changes bytes hands on what became of them. What the socket does
    /// not take of that it may keep, if it is bounded: it then
    /// [has that flushed](Link::flush_soon). These bytes of the user's count as sent.
    ///
    /// # Errors
    ///
    /// The kernel's, and then nothing was taken. `WouldBlock` waits for the socket,
    /// `ENOBUFS` and `ETOOMANYREFS` for a timer, anything else ends the connection once
    /// it was read out.
    fn write_some_data(&mut self, link: &mut Link, data: &[u8]) -> io::Result<usize>;

    /// As [`write_some_data`](Self::write_some_data), for several pieces at once, at
    /// least one. By default the first is offered.
    ///
    /// # Errors
    ///
    /// As [`write_some_data`](Self::write_some_data).
    fn write_some_pieces(&mut self, link: &mut Link, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        self.write_some_data(link, &pieces[0])
    }

    /// Why the connection ends now that [`write_some_data`](Self::write_some_data) or
    /// [`flush`](Self::flush) has failed for good.
    fn reason_of(&mut self, link: &mut Link, error: io::Error) -> CloseReason {
        match self.below_mut() {
            Some(below) => below.reason_of(link, error),
            None => CloseReason::Lost(error),
        }
    }

    /// Reads once, and leaves at most `limit` bytes to be delivered at the start of
    /// `buffers`. (Twisted: `doRead`.)
    ///
    /// A layer may read without having anything to deliver
    /// ([`Received::nothing`]), and deliver what it holds in several calls
    /// ([`Received::and_more`]). What it holds it delivers before it reads on, and it
    /// says so however short the read from below was: no event comes for it.
    ///
    /// # Errors
    ///
    /// The kernel's, or those of the layer: `InvalidData` for what makes no sense,
    /// `UnexpectedEof` for a stream that is cut off.
    /// Anything but `WouldBlock` ends the connection.
    fn do_read(
        &mut self,
        link: &mut Link,
        buffers: &mut ReadBuffers,
        limit: usize,
    ) -> io::Result<Received>;

    /// Whether a producer should wait, with so many bytes unsent. (Twisted:
    /// `_isSendBufferFull`.)
    fn is_send_buffer_full(&self, link: &Link, unsent: usize) -> bool {
        match self.below() {
            Some(below) => below.is_send_buffer_full(link, unsent),
            None => unsent > link.high_watermark,
        }
    }

    // Where it stands.

    /// What this layer is on; `None` for a socket.
    fn below(&self) -> Option<&dyn FileDescriptor> {
        None
    }

    /// What this layer is on.
    fn below_mut(&mut self) -> Option<&mut dyn FileDescriptor> {
        None
    }

    /// The socket at the bottom.
    fn socket(&self) -> &dyn Socket;

    /// The socket at the bottom.
    fn socket_mut(&mut self) -> &mut dyn Socket;

    // Beside the user's bytes.

    /// Called once, when the connection is put into the reactor. A layer with a
    /// handshake [begins](Link::begin_handshake) it here, after what is below.
    fn start(&mut self, link: &mut Link) {
        if let Some(below) = self.below_mut() {
            below.start(link);
        }
    }

    /// Sends bytes that a layer holds, its own and those of the user's that it has
    /// taken. Called as long as there are [some](Self::unflushed) and the socket takes
    /// them, once a layer has [asked for it](Link::flush_soon). A layer has what is below
    /// it flushed first, and sends its own by `write_some_data` of that. Called once
    /// more when the connection ends, unless it is aborted or broken, for last words.
    ///
    /// # Errors
    ///
    /// As [`write_some_data`](Self::write_some_data).
    fn flush(&mut self, link: &mut Link) -> io::Result<()> {
        match self.below_mut() {
            Some(below) => below.flush(link),
            None => Ok(()),
        }
    }

    /// How many bytes [`flush`](Self::flush) has to send: those of the layer, and of
    /// what is below.
    fn unflushed(&self) -> usize {
        self.below().map_or(0, |below| below.unflushed())
    }

    /// The time has passed after which this layer [wanted to be
    /// called](Link::wake_after).
    fn timer_fired(&mut self, link: &mut Link, now: Instant) {
        let _ = (link, now);
    }

    /// Called when the connection is about to close and everything of the user's was
    /// sent, until it answers true: a layer says goodbye by
    /// [bytes of its own](Link::flush_soon), once, and is done when they have left. Then
    /// it is the turn of what is below. Not called when the connection is aborted or
    /// broken, nor before it is established.
    ///
    /// Where the connection ends at once although nothing is left to be sent (the
    /// peer's end does that by default, and a reactor that stops), it is called once,
    /// and what it wants to say is flushed once.
    fn closing(&mut self, link: &mut Link) -> bool {
        self.below_mut().is_none_or(|below| below.closing(link))
    }

    /// As [`closing`](Self::closing), when only our half is about to be closed. The
    /// socket's is closed when all layers are done.
    fn half_closing(&mut self, link: &mut Link) -> bool {
        self.below_mut()
            .is_none_or(|below| below.half_closing(link))
    }

    /// Whether the peer says that its stream is over by bytes of a layer's own. An end
    /// of the socket that comes without is none then: that is a stream that was cut
    /// off, for which [`do_read`](Self::do_read) has an error.
    fn has_own_end(&self) -> bool {
        self.below().is_some_and(|below| below.has_own_end())
    }

    /// Makes sure that the coming close waits for nothing that the peer sent and
    /// nobody read.
    fn disarm_unread(&mut self, link: &mut Link) {
        if let Some(below) = self.below_mut() {
            below.disarm_unread(link);
        }
    }

    /// As [`disarm_unread`](Self::disarm_unread), of a socket that others may hold
    /// too, and what is unread with it.
    fn leave_unread(&mut self, link: &mut Link) {
        if let Some(below) = self.below_mut() {
            below.leave_unread(link);
        }
    }

    /// Takes the layer off a connection, with everything below, and leaves a closed one
    /// in its place: the connection is being detached, and the layer is put on it again
    /// when it is [put together](crate::Transports::reattach). `None`, by default, says
    /// that this cannot be done: the connection is not detached then, and nothing has
    /// changed.
    fn take(&mut self) -> Option<Self>
    where
        Self: Sized,
    {
        None
    }

    /// Whether the connection can go on in another process by its socket and the
    /// user's unsent bytes alone. A layer that holds more has to stay.
    fn travels(&self) -> bool {
        false
    }

    /// How many bytes a layer has read and not delivered yet. Who waits for them is
    /// whoever pauses the connection.
    fn undelivered(&self) -> usize {
        self.below().map_or(0, |below| below.undelivered())
    }

    // Descriptors that are queued.

    /// How many descriptors are queued.
    fn queued_descriptors(&self) -> usize {
        self.below().map_or(0, |below| below.queued_descriptors())
    }

    /// Closes those that are queued, and answers how many there were.
    fn discard_descriptors(&mut self, link: &mut Link) -> usize {
        self.below_mut()
            .map_or(0, |below| below.discard_descriptors(link))
    }

    /// How many descriptors the peer may send.
    fn received_limits(&self) -> ReceivedLimits {
        self.below()
            .map_or(ReceivedLimits::NONE, |below| below.received_limits())
    }

    /// Takes those that are queued, with the part of the unsent bytes they are for.
    fn take_unsent_descriptors(&mut self, link: &Link) -> Vec<UnsentDescriptors> {
        self.below_mut()
            .map_or_else(Vec::new, |below| below.take_unsent_descriptors(link))
    }

    /// Queues what was taken so elsewhere, for the bytes that are unsent now. What
    /// cannot pass any closes them.
    fn restore_unsent_descriptors(&mut self, link: &Link, descriptors: Vec<UnsentDescriptors>) {
        match self.below_mut() {
            Some(below) => below.restore_unsent_descriptors(link, descriptors),
            None => drop(descriptors),
        }
    }
}

/// What passes descriptors beside bytes, so that
/// [`SendmsgMixin`](crate::SendmsgMixin) can be put on it: a UNIX socket, and a
/// layer that says what becomes of descriptors.
pub trait PassDescriptors: FileDescriptor {
    /// As [`write_some_data`](FileDescriptor::write_some_data), with descriptors on
    /// the first byte, at most 253. After `Ok` all of them have left; after an error
    /// none has.
    ///
    /// A layer that changes bytes answers for what the first of them became part
    /// of: as long as nothing of that has left, nothing was taken.
    ///
    /// # Errors
    ///
    /// As [`write_some_data`](FileDescriptor::write_some_data).
    fn send_with_descriptors(
        &mut self,
        link: &mut Link,
        data: &[u8],
        descriptors: &[BorrowedFd<'_>],
    ) -> io::Result<usize>;

    /// As [`do_read`](FileDescriptor::do_read), and what came beside the bytes.
    ///
    /// # Errors
    ///
    /// As [`do_read`](FileDescriptor::do_read).
    fn receive(
        &mut self,
        link: &mut Link,
        buffers: &mut ReadBuffers,
        limit: usize,
    ) -> io::Result<Received>;

    /// The socket at the bottom.
    fn descriptor_socket(&self) -> &dyn DescriptorSocket;
}

/// A socket: a connected stream at the bottom of a connection. The calls are
/// non-blocking.
pub trait Socket {
    /// What log lines call connections of this kind.
    fn kind(&self) -> &'static str;

    /// Our address. It can be asked for after the close too.
    fn host(&self) -> Address;

    /// The peer's address. It can be asked for after the close too.
    fn peer(&self) -> Address;

    /// What the poller watches for bytes to be read; `None` once closed or
    /// detached, or if the poller knows nothing of it.
    fn reading(&self) -> Option<BorrowedFd<'_>>;

    /// What the poller watches for room; by default the same descriptor.
    fn writing(&self) -> Option<BorrowedFd<'_>> {
        self.reading()
    }

    /// Whether it was neither closed nor detached.
    #[inline]
    fn is_open(&self) -> bool {
        self.reading().is_some()
    }

    /// Whether it can always be read and written, so that the poller knows nothing of
    /// it: a regular file, say, which epoll refuses with `EPERM`. It is read in each
    /// turn then, within the budget of a turn, until its end or a pause. Asked once
    /// [`watch`](Self::watch) has succeeded.
    fn is_always_ready(&self) -> bool {
        false
    }

    /// Has readability, and the peer's end, reported under `token`.
    ///
    /// # Errors
    ///
    /// Those of epoll_ctl(2).
    #[inline]
    fn watch(&self, reactor: &mut Reactor, token: Token) -> io::Result<()> {
        match self.reading() {
            Some(source) => reactor.watch(token, source, Interest::Readable),
            None => Err(not_connected()),
        }
    }

    /// Has writability reported too.
    ///
    /// # Errors
    ///
    /// Those of epoll_ctl(2).
    fn watch_writing(&self, reactor: &mut Reactor, token: Token) -> io::Result<()> {
        match (self.reading(), self.writing()) {
            (Some(reading), Some(writing)) if !is_same(reading, writing) => {
                reactor.watch(token, writing, Interest::Writable)
            }
            (_, Some(source)) => reactor.rewatch(token, source, Interest::Both),
            (_, None) => Err(not_connected()),
        }
    }

    /// Has nothing reported any more; `writing` says whether
    /// [`watch_writing`](Self::watch_writing) was called.
    #[inline]
    fn unwatch(&self, reactor: &mut Reactor, writing: bool) {
        if let Some(source) = self.reading() {
            reactor.unwatch(source);
            if writing
                && let Some(other) = self.writing()
                && !is_same(source, other)
            {
                reactor.unwatch(other);
            }
        }
    }

    /// The error that the poller reported and no call has told of yet
    /// (`SO_ERROR`).
    fn take_error(&self) -> Option<io::Error> {
        sys::take_error(self.reading()?).unwrap_or_else(Some)
    }

    /// How many bytes wait to be read; some, where nobody knows.
    fn unread(&self) -> usize {
        let asked = |source| sys::bytes_unread(source).unwrap_or(1);
        self.reading().map_or(0, asked)
    }

    /// Whether nothing can come or go any more, but for what has arrived.
    fn is_hung_up(&self) -> bool {
        self.reading().is_some_and(sys::is_hung_up)
    }

    /// Whether a connection can end in the middle of what its peer sends.
    fn can_be_reset(&self) -> bool {
        false
    }

    /// What is left when a send failed with `error`, or the poller reported it.
    fn remains(&self, error: &io::Error) -> Remains {
        let _ = error;
        match self.is_hung_up() {
            true => Remains::Everything,
            false => Remains::Reading,
        }
    }

    /// Closes our half. What closes a descriptor for that does so when it is
    /// [released](Self::release_writing).
    ///
    /// # Errors
    ///
    /// Those of shutdown(2); the half counts as closed.
    fn shutdown_write(&mut self) -> io::Result<()>;

    /// Our half was closed: what served nothing else is closed too, once nothing is
    /// [reported](Self::unwatch) of it any more.
    fn release_writing(&mut self, reactor: &mut Reactor) {
        let _ = reactor;
    }

    /// Makes the coming close a reset, where there is such a thing.
    fn prepare_abort(&mut self) {}

    /// Closes.
    fn close(&mut self);

    /// Closes a socket that was accepted and that nobody has read, while its peer may
    /// be sending.
    fn decline(&mut self) {
        self.close();
    }

    /// Takes the descriptor out, to be used elsewhere; `None` if there is none. Of two,
    /// that which is read.
    fn detach(&mut self) -> Option<OwnedFd>;

    /// Takes the descriptor out that is written to, where that is another one.
    fn detach_writing(&mut self) -> Option<OwnedFd> {
        None
    }

    /// Takes the descriptor back that was [taken out](Self::detach).
    ///
    /// # Errors
    ///
    /// Gives back what is none of this kind.
    fn attach(&mut self, fd: OwnedFd) -> Result<(), OwnedFd>;

    /// Takes the other one back, after the [first](Self::attach).
    ///
    /// # Errors
    ///
    /// Gives it back where there is no place for it.
    fn attach_writing(&mut self, fd: OwnedFd) -> Result<(), OwnedFd> {
        Err(fd)
    }
}

/// A socket that passes descriptors: what is asked of it beside that.
pub trait DescriptorSocket: Socket {
    /// The process at the other end, when the connection was made.
    ///
    /// # Errors
    ///
    /// `NotConnected` once closed.
    fn peer_credentials(&self) -> io::Result<Credentials>;

    /// That process, as a pidfd.
    ///
    /// # Errors
    ///
    /// `NotConnected` once closed; the kernel's, which knows it since Linux 6.5.
    fn peer_pidfd(&self) -> io::Result<OwnedFd>;

    /// Sets whether the kernel lets the peer send descriptors (`SO_PASSRIGHTS`).
    ///
    /// # Errors
    ///
    /// `NotConnected` once closed; the kernel's, which knows it since Linux 6.16.
    fn set_passes_rights(&self, on: bool) -> io::Result<()>;

    /// Whether there is something unread.
    fn has_unread(&self) -> bool;

    /// Which socket the kernel says this is (`SO_COOKIE`), to be told from others;
    /// `None` once closed, or if nobody can send it.
    fn cookie(&self) -> Option<u64>;
}

#[cold]
pub(crate) fn not_connected() -> io::Error {
    io::Error::from(io::ErrorKind::NotConnected)
}

fn is_same(one: BorrowedFd<'_>, other: BorrowedFd<'_>) -> bool {
    use std::os::fd::AsRawFd;
    one.as_raw_fd() == other.as_raw_fd()
}

/// What one read brought; the bytes, and what came beside them, are in the buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Received {
    pub(crate) bytes: usize,
    /// Bits of the constants below; none for most reads.
    notes: u8,
}

impl Received {
    /// There may be more to be had at once.
    const MORE: u8 = 1;
    /// No bytes are not the end.
    const GOES_ON: u8 = 1 << 1;
    /// There may be something beside the bytes.
    const ANCILLARY: u8 = 1 << 2;
    /// Descriptors were lost (`MSG_CTRUNC`).
    const TRUNCATED: u8 = 1 << 3;

    /// A read that had room for `limit` bytes and brought `bytes` of them: none are
    /// the end of the stream, and fewer than there was room for all that there is.
    #[inline(always)]
    pub fn new(bytes: usize, limit: usize) -> Self {
        Self {
            bytes,
            notes: u8::from(bytes >= limit) * Self::MORE,
        }
    }

    /// The same, with something beside the bytes, of which some may have been lost. Such
    /// a read may have stopped for another reason than that nothing was left.
    #[inline(always)]
    pub(crate) fn with_ancillary(self, had_ancillary: bool, is_truncated: bool) -> Self {
        let beside = u8::from(had_ancillary) * Self::ANCILLARY;
        let lost = u8::from(is_truncated) * Self::TRUNCATED;
        Self {
            notes: self.notes | beside | lost,
            ..self
        }
    }

    /// What a layer delivers: `bytes` of them, be it none, of a read from below that
    /// brought `of`. The descriptors of that read are delivered with them, unless
    /// [told otherwise](Self::without_descriptors).
    pub fn delivering(bytes: usize, of: Self) -> Self {
        Self {
            bytes,
            notes: of.notes | Self::GOES_ON,
        }
    }

    /// Nothing to be delivered, and nothing more to be had before the poller says so.
    pub fn nothing() -> Self {
        Self {
            bytes: 0,
            notes: Self::GOES_ON,
        }
    }

    /// The end of the stream.
    pub fn end() -> Self {
        Self { bytes: 0, notes: 0 }
    }

    /// The same, and there is more to be had at once: [`FileDescriptor::do_read`] is
    /// called again without an event.
    #[must_use]
    pub fn and_more(self) -> Self {
        Self {
            notes: self.notes | Self::MORE,
            ..self
        }
    }

    /// The same, with none: a layer has taken them out of the buffers, and delivers them
    /// later.
    #[must_use]
    pub fn without_descriptors(self) -> Self {
        let more = u8::from(!self.is_drained()) * Self::MORE;
        Self {
            notes: self.notes & !(Self::ANCILLARY | Self::TRUNCATED) | more,
            ..self
        }
    }

    /// Whether something may have come beside the bytes.
    pub fn had_descriptors(&self) -> bool {
        self.had_ancillary()
    }

    /// How many bytes there are at the start of the buffers.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether nothing more comes.
    pub fn is_end(&self) -> bool {
        self.bytes == 0 && self.notes & Self::GOES_ON == 0
    }

    /// Whether there is nothing more to be had before the poller says so.
    #[inline(always)]
    pub fn is_drained(&self) -> bool {
        self.notes & (Self::MORE | Self::ANCILLARY) == 0
    }

    #[inline(always)]
    pub(crate) fn had_ancillary(&self) -> bool {
        self.notes & Self::ANCILLARY != 0
    }

    /// Whether the kernel lost descriptors of this read (`MSG_CTRUNC`). A layer that
    /// delivers later what came with it says so then, by
    /// [`delivering`](Self::delivering) of it.
    pub fn is_truncated(&self) -> bool {
        self.notes & Self::TRUNCATED != 0
    }
}

/// How many descriptors a peer may send.
#[derive(Clone, Copy, Debug)]
pub struct ReceivedLimits {
    pub(crate) per_read: usize,
    pub(crate) in_all: usize,
    pub(crate) unclaimed: usize,
}

impl ReceivedLimits {
    pub(crate) const NONE: Self = Self {
        per_read: usize::MAX,
        in_all: usize::MAX,
        unclaimed: usize::MAX,
    };
}
