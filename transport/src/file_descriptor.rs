//! The part of a transport that moves bytes: a socket, or a layer on top of another.
//!
//! A [`Stream`](crate::Stream) buffers, closes, and keeps producers in step. Kinds of
//! connection differ in how bytes move, which is defined here. A layer such as
//! [`SendmsgMixin`](crate::SendmsgMixin) overrides
//! [`write_some_data`](FileDescriptor::write_some_data),
//! [`do_read`](FileDescriptor::do_read) and
//! [`is_send_buffer_full`](FileDescriptor::is_send_buffer_full), and leaves the rest to
//! the layer below. (Twisted: `abstract.FileDescriptor`.)

use std::any::Any;
use std::io::{self, IoSlice};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Instant;

use bowline_protocol::{Address, CloseReason, Credentials, Remains};
use bowline_reactor::{Description, Interest, Reactor, Token};

use crate::descriptor_queue::UnsentDescriptors;
use crate::layer_state::{LayerState, Stays};
use crate::link::Link;
use crate::shared::ReadBuffers;
use crate::sys;

/// Moves the bytes of one connection: the base trait of sockets and of layers.
///
/// A *layer* holds another `FileDescriptor`, names it as [`below`](Self::below), and
/// overrides the methods that it changes. It may change bytes, send bytes of its own,
/// be established later than the layer below, and close in steps. At the bottom is a
/// [`Socket`]. The [`Stream`](crate::Stream) and the loop call these methods. None of
/// them calls user code.
///
/// The methods take the [`Link`], by which a layer asks for what comes next.
///
/// # Examples
///
/// A layer that turns every bit over, put on TCP. It holds no bytes and has none of its
/// own. So all but two of its methods only name the layer below:
///
/// ```
/// use std::io;
/// use bowline::endpoint::Listen as _;
/// use bowline::layers::{FileDescriptor, Link, ReadBuffers, Received, Socket, TcpSocket};
/// use bowline::{Address, Context, Protocol, Reactor, Tcp, Transport, Transports};
///
/// struct Inverted<B>(B);
///
/// impl<B: FileDescriptor> FileDescriptor for Inverted<B> {
///     fn write_some_data(&mut self, link: &mut Link, data: &[u8]) -> io::Result<usize> {
///         // One piece at a time, so that the cost is bounded. Bytes that are not
///         // taken are offered again, and have changed nothing.
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
/// A layer may also have a handshake, bytes of its own and a close notice: see the methods
/// of [`Link`].
pub trait FileDescriptor: Any {
    /// Offers the user's bytes, from the first that was not taken yet. Returns how many
    /// were taken, at least one. (Twisted: `writeSomeData`.)
    ///
    /// Called when the socket may take some. Bytes that were offered and not taken are
    /// offered again, perhaps with more behind them.
    ///
    /// A layer that changes bytes passes the changed bytes on. If the socket does not
    /// take all of them, the layer may keep the rest, up to a bound. Then it [has the
    /// rest flushed](Link::flush_soon), and the user's bytes count as sent.
    ///
    /// # Errors
    ///
    /// The kernel's. Then nothing was taken. After `WouldBlock` the stream waits for
    /// the socket, after `ENOBUFS` and `ETOOMANYREFS` for a timer. Any other error ends
    /// the connection, once it was read to its end.
    fn write_some_data(&mut self, link: &mut Link, data: &[u8]) -> io::Result<usize>;

    /// As [`write_some_data`](Self::write_some_data), for one or more pieces at once.
    /// The default offers the first piece.
    ///
    /// # Errors
    ///
    /// As [`write_some_data`](Self::write_some_data).
    fn write_some_pieces(&mut self, link: &mut Link, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        self.write_some_data(link, &pieces[0])
    }

    /// The reason why the connection ends, after
    /// [`write_some_data`](Self::write_some_data) or [`flush`](Self::flush) has failed
    /// for good.
    fn reason_of(&mut self, link: &mut Link, error: io::Error) -> CloseReason {
        match self.below_mut() {
            Some(below) => below.reason_of(link, error),
            None => CloseReason::Lost(error),
        }
    }

    /// Reads once, and leaves at most `limit` bytes for the protocol at the start of
    /// `buffers`. (Twisted: `doRead`.)
    ///
    /// A layer may read without having anything to deliver ([`Received::nothing`]). It
    /// may deliver the bytes that it holds in several calls ([`Received::and_more`]).
    /// It delivers them before it reads on. It has to say that there are more even if
    /// the read from below was short, since no event comes for them.
    ///
    /// # Errors
    ///
    /// The kernel's or the layer's: `InvalidData` if the bytes make no sense,
    /// `UnexpectedEof` if the stream is cut off. Any error but `WouldBlock` ends the
    /// connection.
    fn do_read(
        &mut self,
        link: &mut Link,
        buffers: &mut ReadBuffers,
        limit: usize,
    ) -> io::Result<Received>;

    /// Whether a producer should wait, with `unsent` bytes in the buffer. (Twisted:
    /// `_isSendBufferFull`.)
    fn is_send_buffer_full(&self, link: &Link, unsent: usize) -> bool {
        match self.below() {
            Some(below) => below.is_send_buffer_full(link, unsent),
            None => unsent > link.high_watermark,
        }
    }

    // Where it stands.

    /// The layer or socket below this layer. `None` for a socket.
    fn below(&self) -> Option<&dyn FileDescriptor> {
        None
    }

    /// As [`below`](Self::below), for changes.
    fn below_mut(&mut self) -> Option<&mut dyn FileDescriptor> {
        None
    }

    /// The socket at the bottom.
    fn socket(&self) -> &dyn Socket;

    /// As [`socket`](Self::socket), for changes.
    fn socket_mut(&mut self) -> &mut dyn Socket;

    /// What a layer says of itself to whoever knows the type of that, whatever the layer
    /// is on: [`Stream::facet`](crate::Stream::facet) finds it at any depth. By default
    /// there is nothing.
    fn facet(&self) -> Option<&dyn Any> {
        None
    }

    /// The same, to be changed.
    fn facet_mut(&mut self) -> Option<&mut dyn Any> {
        None
    }

    /// Adds what a layer says of itself to who looks into the reactor: a part, called as
    /// its type is by default. The connection has a part already, which a socket may add
    /// facts to. What the user or the peer has sent does not belong there.
    fn describe(&self, link: &Link, description: &mut Description) {
        let _ = link;
        if self.below().is_some() {
            description.section_of::<Self>();
        }
    }

    // Beside the user's bytes.

    /// Called once, when the connection is put into the reactor. A layer with a
    /// handshake [begins](Link::begin_handshake) it here, after the layer below.
    fn start(&mut self, link: &mut Link) {
        if let Some(below) = self.below_mut() {
            below.start(link);
        }
    }

    /// Sends the bytes that a layer holds: its own, and those that it has taken from
    /// the user.
    ///
    /// Called once a layer has [asked for it](Link::flush_soon), as long as there are
    /// [some](Self::unflushed) and the socket takes them. A layer first has the layer
    /// below flushed, and then sends its own bytes by `write_some_data` of that layer.
    /// Called once more when the connection ends, for last words, unless it is aborted
    /// or broken.
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

    /// How many bytes [`flush`](Self::flush) has to send, including those of the layers
    /// below.
    fn unflushed(&self) -> usize {
        self.below().map_or(0, |below| below.unflushed())
    }

    /// Whether a write now sends what [`flush`](Self::flush) has to send, before the user's
    /// bytes. Then the two leave together where there are both: a write is asked for
    /// instead of a flush. By default it does not.
    fn flushes_by_writing(&self) -> bool {
        false
    }

    /// Called once the time has passed after which this layer [wanted to be
    /// called](Link::wake_after).
    fn timer_fired(&mut self, link: &mut Link, now: Instant) {
        let _ = (link, now);
    }

    /// Says goodbye. Called when the connection is about to close and all of the user's
    /// bytes were sent, until it returns true.
    ///
    /// A layer that says goodbye has [bytes of its own](Link::flush_soon) sent, once.
    /// It returns true when they have left. The layer below is next. Not called if the
    /// connection is aborted or broken, nor before it is established.
    ///
    /// The connection may also end at once with nothing left to be sent. By default it
    /// does so at the peer's end, and when the reactor stops. Then this is called once,
    /// and the layer's bytes are flushed once.
    fn closing(&mut self, link: &mut Link) -> bool {
        self.below_mut().is_none_or(|below| below.closing(link))
    }

    /// As [`closing`](Self::closing), when only our half is about to be closed. The
    /// socket's half is closed once all layers are done.
    fn half_closing(&mut self, link: &mut Link) -> bool {
        self.below_mut()
            .is_none_or(|below| below.half_closing(link))
    }

    /// Whether the peer marks the end of its stream by bytes of this layer. If so, an
    /// end of the socket without them means that the stream was cut off. Then
    /// [`do_read`](Self::do_read) returns an error.
    fn has_own_end(&self) -> bool {
        self.below().is_some_and(|below| below.has_own_end())
    }

    /// Makes sure that the close that follows does not wait for bytes that the peer
    /// sent and nobody read.
    fn disarm_unread(&mut self, link: &mut Link) {
        if let Some(below) = self.below_mut() {
            below.disarm_unread(link);
        }
    }

    /// As [`disarm_unread`](Self::disarm_unread), for a socket that others may hold
    /// too. The unread bytes stay theirs.
    fn leave_unread(&mut self, link: &mut Link) {
        if let Some(below) = self.below_mut() {
            below.leave_unread(link);
        }
    }

    /// Takes this layer and everything below off a connection, which is being detached.
    /// A closed one is left in its place. [`reattach`](crate::Transports::reattach)
    /// puts the layer back.
    ///
    /// `None`, the default, means that this layer cannot be taken off. Then the
    /// connection is not detached, and nothing has changed.
    fn take(&mut self) -> Option<Self>
    where
        Self: Sized,
    {
        None
    }

    /// Whether the connection can go on in another process with only its socket and the
    /// user's unsent bytes. A layer that holds more has to stay, or to say by
    /// [`pack`](Self::pack) what that is.
    fn travels(&self) -> bool {
        false
    }

    /// Says what of this layer, and of those below it, another process needs beside the
    /// socket and the user's unsent bytes: the topmost layer first, and nothing for one
    /// that needs nothing. Called on layers that were [taken](Self::take) off.
    ///
    /// Afterwards this layer is not used any more, unless it [comes
    /// back](Self::come_back). A layer of which two processes must not hold the same state,
    /// such as a cipher, lets go of it here.
    ///
    /// By default it is nothing for a layer that [travels](Self::travels).
    ///
    /// # Errors
    ///
    /// The reason why the connection stays. The layer is as it was.
    fn pack(&mut self) -> Result<Vec<LayerState>, Stays> {
        match self.travels() {
            true => Ok(Vec::new()),
            false => Err(Stays::Layer),
        }
    }

    /// Goes on after it was [packed](Self::pack), since the other process did not take
    /// over. Called before the connection is [put together
    /// again](crate::Transports::reattach), whether it was packed or not.
    ///
    /// # Errors
    ///
    /// Another process has the state. The connection cannot go on here.
    fn come_back(&mut self) -> io::Result<()> {
        match self.below_mut() {
            Some(below) => below.come_back(),
            None => Ok(()),
        }
    }

    /// How many bytes a layer has read and not delivered yet. Whoever pauses the
    /// connection waits for them.
    fn undelivered(&self) -> usize {
        self.below().map_or(0, |below| below.undelivered())
    }

    // Descriptors that are queued.

    /// How many descriptors are queued.
    fn queued_descriptors(&self) -> usize {
        self.below().map_or(0, |below| below.queued_descriptors())
    }

    /// How many descriptors have left.
    fn sent_descriptors(&self) -> u64 {
        self.below().map_or(0, |below| below.sent_descriptors())
    }

    /// Closes the queued descriptors, and returns how many there were.
    fn discard_descriptors(&mut self, link: &mut Link) -> usize {
        self.below_mut()
            .map_or(0, |below| below.discard_descriptors(link))
    }

    /// How many descriptors the peer may send.
    fn received_limits(&self) -> ReceivedLimits {
        self.below()
            .map_or(ReceivedLimits::NONE, |below| below.received_limits())
    }

    /// Takes the queued descriptors, with the part of the unsent bytes that they belong
    /// to.
    fn take_unsent_descriptors(&mut self, link: &Link) -> Vec<UnsentDescriptors> {
        self.below_mut()
            .map_or_else(Vec::new, |below| below.take_unsent_descriptors(link))
    }

    /// Queues descriptors that were [taken](Self::take_unsent_descriptors) elsewhere,
    /// for the bytes that are unsent now. A connection that cannot pass descriptors
    /// closes them.
    fn restore_unsent_descriptors(&mut self, link: &Link, descriptors: Vec<UnsentDescriptors>) {
        match self.below_mut() {
            Some(below) => below.restore_unsent_descriptors(link, descriptors),
            None => drop(descriptors),
        }
    }
}

/// A socket or layer that passes descriptors beside bytes, so that
/// [`SendmsgMixin`](crate::SendmsgMixin) can be put on it. A UNIX socket does. So may a
/// layer that defines how descriptors travel.
pub trait PassDescriptors: FileDescriptor {
    /// As [`write_some_data`](FileDescriptor::write_some_data), with at most 253
    /// descriptors on the first byte. After `Ok` all of them have left; after an error
    /// none has.
    ///
    /// A layer that changes bytes has to watch the bytes that the first byte became
    /// part of. As long as none of those has left, it has taken nothing.
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

    /// As [`do_read`](FileDescriptor::do_read), with the descriptors that came beside
    /// the bytes.
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

/// A socket: a connected stream at the bottom of a connection. Its calls do not block.
pub trait Socket {
    /// The name of this kind of connection in log lines.
    fn kind(&self) -> &'static str;

    /// Our address. It is known after the close too.
    fn host(&self) -> Address;

    /// The peer's address. It is known after the close too.
    fn peer(&self) -> Address;

    /// The descriptor that the poller watches for bytes to read. `None` once closed or
    /// detached, or if the poller does not watch this socket.
    fn reading(&self) -> Option<BorrowedFd<'_>>;

    /// The descriptor that the poller watches for room to write. The default is the
    /// same one.
    fn writing(&self) -> Option<BorrowedFd<'_>> {
        self.reading()
    }

    /// Whether it is neither closed nor detached.
    #[inline]
    fn is_open(&self) -> bool {
        self.reading().is_some()
    }

    /// Whether it is always readable and writable, so that the poller does not watch
    /// it. An example is a regular file, which epoll refuses with `EPERM`.
    ///
    /// It is then read in each turn, within the budget of a turn, until its end or a
    /// pause. Asked once [`watch`](Self::watch) has succeeded.
    fn is_always_ready(&self) -> bool {
        false
    }

    /// Has the poller report readability and the peer's end under `token`.
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

    /// Has the poller report writability too.
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

    /// Whether [`watch`](Self::watch) has had a second descriptor watched too, the one that
    /// is [written to](Self::writing), so that it has to be watched anew with the first. By
    /// default it is watched where [`watch_writing`](Self::watch_writing) asks for that.
    fn watches_both(&self) -> bool {
        false
    }

    /// Has the poller report nothing any more. `writing` says whether
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

    /// The error that the poller reported and that no call has returned yet
    /// (`SO_ERROR`).
    fn take_error(&self) -> Option<io::Error> {
        sys::take_error(self.reading()?).unwrap_or_else(Some)
    }

    /// How many bytes wait to be read. At least one if that is not known.
    fn unread(&self) -> usize {
        let asked = |source| sys::bytes_unread(source).unwrap_or(1);
        self.reading().map_or(0, asked)
    }

    /// Whether nothing can come or leave any more, except for bytes that have arrived.
    fn is_hung_up(&self) -> bool {
        self.reading().is_some_and(sys::is_hung_up)
    }

    /// Whether a connection can end in the middle of what its peer sends.
    fn can_be_reset(&self) -> bool {
        false
    }

    /// How much of the peer's stream can still be read, after a send failed with
    /// `error`, or the poller reported it.
    fn remains(&self, error: &io::Error) -> Remains {
        let _ = error;
        match self.is_hung_up() {
            true => Remains::Everything,
            false => Remains::Reading,
        }
    }

    /// Closes our half. A kind that closes a descriptor for this does so in
    /// [`release_writing`](Self::release_writing).
    ///
    /// # Errors
    ///
    /// Those of shutdown(2). The half counts as closed even then.
    fn shutdown_write(&mut self) -> io::Result<()>;

    /// Closes a descriptor that served only our half. Called after the half was closed,
    /// once the poller [reports](Self::unwatch) nothing of it any more.
    fn release_writing(&mut self, reactor: &mut Reactor) {
        let _ = reactor;
    }

    /// Makes the close that follows a reset, if the kind has resets.
    fn prepare_abort(&mut self) {}

    /// Has the [close](Self::close) end the connection, whoever else holds the socket.
    /// Without this it lives on with them.
    fn end_for_all(&mut self) {}

    /// Closes.
    fn close(&mut self);

    /// Closes an accepted socket that nobody has read, while its peer may be sending.
    fn decline(&mut self) {
        self.close();
    }

    /// Takes the descriptor out, to be used elsewhere. `None` if there is none. If
    /// there are two, this is the one for reading.
    fn detach(&mut self) -> Option<OwnedFd>;

    /// Takes out the descriptor for writing, if that is another one.
    fn detach_writing(&mut self) -> Option<OwnedFd> {
        None
    }

    /// Puts back the descriptor that was [taken out](Self::detach).
    ///
    /// # Errors
    ///
    /// Gives the descriptor back if it is not of this kind.
    fn attach(&mut self, fd: OwnedFd) -> Result<(), OwnedFd>;

    /// Puts back the descriptor for writing, after the [first](Self::attach).
    ///
    /// # Errors
    ///
    /// Gives the descriptor back if there is no place for it.
    fn attach_writing(&mut self, fd: OwnedFd) -> Result<(), OwnedFd> {
        Err(fd)
    }
}

/// A socket that passes descriptors, with what the kernel knows of its peer.
pub trait DescriptorSocket: Socket {
    /// The process at the other end, as it was when the connection was made.
    ///
    /// # Errors
    ///
    /// `NotConnected` once closed.
    fn peer_credentials(&self) -> io::Result<Credentials>;

    /// The same process, as a pidfd.
    ///
    /// # Errors
    ///
    /// `NotConnected` once closed. Otherwise the kernel's, which can do so since Linux
    /// 6.5.
    fn peer_pidfd(&self) -> io::Result<OwnedFd>;

    /// Sets whether the kernel lets the peer send descriptors (`SO_PASSRIGHTS`).
    ///
    /// # Errors
    ///
    /// `NotConnected` once closed. Otherwise the kernel's, which can do so since Linux
    /// 6.16.
    fn set_passes_rights(&self, on: bool) -> io::Result<()>;

    /// Closes the half that is read. What has arrived can still be read, and the peer's
    /// further writes fail with `EPIPE`.
    ///
    /// # Errors
    ///
    /// `NotConnected` once closed. Otherwise those of shutdown(2).
    fn shutdown_read(&self) -> io::Result<()>;

    /// Whether anything is unread.
    fn has_unread(&self) -> bool;

    /// The kernel's number of this socket (`SO_COOKIE`), which tells it from others.
    /// `None` once closed, or if nobody can send it.
    fn cookie(&self) -> Option<u64>;
}

#[cold]
pub(crate) fn not_connected() -> io::Error {
    io::Error::from(io::ErrorKind::NotConnected)
}

pub(crate) fn is_same(one: BorrowedFd<'_>, other: BorrowedFd<'_>) -> bool {
    use std::os::fd::AsRawFd;
    one.as_raw_fd() == other.as_raw_fd()
}

/// The result of one read. Its bytes and descriptors are in the buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Received {
    pub(crate) bytes: usize,
    /// Bits of the constants below. Most reads have none.
    notes: u8,
}

impl Received {
    /// Another read may bring more at once.
    const MORE: u8 = 1;
    /// A read of no bytes is not the end.
    const GOES_ON: u8 = 1 << 1;
    /// There may be something beside the bytes.
    const ANCILLARY: u8 = 1 << 2;
    /// Descriptors were lost (`MSG_CTRUNC`).
    const TRUNCATED: u8 = 1 << 3;

    /// The result of a read with room for `limit` bytes that brought `bytes`. No bytes
    /// are the end of the stream. Fewer than `limit` mean that nothing is left to read
    /// for now.
    #[inline(always)]
    pub fn new(bytes: usize, limit: usize) -> Self {
        Self {
            bytes,
            notes: u8::from(bytes >= limit) * Self::MORE,
        }
    }

    /// Adds that something came beside the bytes, and that some of it may have been
    /// lost. Such a read may have stopped although more is left.
    #[inline(always)]
    pub(crate) fn with_ancillary(self, had_ancillary: bool, is_truncated: bool) -> Self {
        let beside = u8::from(had_ancillary) * Self::ANCILLARY;
        let lost = u8::from(is_truncated) * Self::TRUNCATED;
        Self {
            notes: self.notes | beside | lost,
            ..self
        }
    }

    /// The result of a layer that delivers `bytes`, perhaps none, after a read from
    /// below that brought `of`. The descriptors of that read are delivered with them,
    /// unless the layer [keeps them back](Self::without_descriptors).
    pub fn delivering(bytes: usize, of: Self) -> Self {
        Self {
            bytes,
            notes: of.notes | Self::GOES_ON,
        }
    }

    /// A layer has nothing to deliver, and nothing more to read before the poller
    /// reports more.
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

    /// Adds that more can be delivered at once. [`FileDescriptor::do_read`] is then
    /// called again without an event.
    #[must_use]
    pub fn and_more(self) -> Self {
        Self {
            notes: self.notes | Self::MORE,
            ..self
        }
    }

    /// Delivers no descriptors. A layer calls it that has taken them out of the
    /// buffers, to deliver them later.
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

    /// How many bytes are at the start of the buffers.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether it is the end of the stream.
    pub fn is_end(&self) -> bool {
        self.bytes == 0 && self.notes & Self::GOES_ON == 0
    }

    /// Whether nothing more can be read before the poller reports more.
    #[inline(always)]
    pub fn is_drained(&self) -> bool {
        self.notes & (Self::MORE | Self::ANCILLARY) == 0
    }

    #[inline(always)]
    pub(crate) fn had_ancillary(&self) -> bool {
        self.notes & Self::ANCILLARY != 0
    }

    /// Whether the kernel lost descriptors of this read (`MSG_CTRUNC`). A layer that
    /// delivers its descriptors later reports the loss with them, by
    /// [`delivering`](Self::delivering) of this read.
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
