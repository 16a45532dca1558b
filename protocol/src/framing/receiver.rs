//! The receiver of frames, and what it can ask for.

use std::borrow::Cow;
use std::fmt;
use std::os::fd::OwnedFd;

use bowline_reactor::{Description, Reactor};

use crate::connection::ConnectionHandle;
use crate::context::{AnyContext, Context};
use crate::descriptors::PassedDescriptor;
use crate::framing::framed::Mode;
use crate::framing::pairing::Arrivals;
use crate::framing::{
    EncodeError, FrameDescriptors, FrameEncoder, FramingError, Pairing, SendFrameError,
};
use crate::protocol::{AfterReadClosed, AfterTruncation, AtDrain};
use crate::reason::{CloseReason, Remains};
use crate::transport::{Transport, TransportHandle, UnixTransport, WriteStatus};

/// The callbacks of a connection whose bytes come in frames, marked off by a framer of
/// type `F`. [`Framed`](crate::framing::Framed) makes a protocol of it.
///
/// They are the callbacks of [`Protocol`](crate::Protocol), with frames in place of
/// bytes. The same promises hold: none is ever called from inside another. What is not
/// described here is described there.
#[diagnostic::on_unimplemented(
    message = "`{Self}` does not receive the frames of `{F}` over `{T}`",
    note = "a receiver over anything is `impl<T: Transport> FrameReceiver<T, {F}>`, one of \
            descriptors `impl<T: UnixTransport> FrameReceiver<T, {F}>`"
)]
pub trait FrameReceiver<T: Transport + ?Sized, F>: 'static {
    /// The connection is established. Called once, first.
    fn connection_made(&mut self, cx: &mut FrameContext<'_, T, F>) {
        let _ = cx;
    }

    /// A frame has arrived. `frame` is its whole payload. Copy the bytes you want to
    /// keep.
    ///
    /// The frame's descriptors, if it has any, are in
    /// [`cx.framing.descriptors()`](Framing::descriptors). The [`Pairing`] says which
    /// those are. Descriptors that are not taken are closed and counted, and logged once
    /// per connection.
    ///
    /// Not called while reading is paused. Not called once the connection closes or was
    /// aborted, even for frames that were received before.
    fn frame_received(&mut self, cx: &mut FrameContext<'_, T, F>, frame: &[u8]);

    /// A frame has arrived, but some or all of its descriptors were lost on the way to
    /// us. Those that did arrive are closed.
    ///
    /// Only if [`descriptors_truncated`](Self::descriptors_truncated) kept the
    /// connection. The frames that follow have exactly their own descriptors again, as
    /// long as the peer sends the descriptors of each frame by themselves.
    ///
    /// The default drops the frame. So no code meets a frame that lacks the descriptors it
    /// speaks of. A protocol that keeps the connection will probably answer with an error
    /// of its own.
    fn frame_truncated(&mut self, cx: &mut FrameContext<'_, T, F>, frame: &[u8]) {
        let _ = (cx, frame);
    }

    /// A descriptor has arrived that belongs to no frame. With [`Pairing::Loose`] it is
    /// told before the frames that end in the same read. Otherwise it came in
    /// [raw mode](Framing::set_raw_mode), and is told before the bytes it came with.
    ///
    /// # Errors
    ///
    /// A receiver that does not want the descriptor gives it back, as the default does. It
    /// is then closed and counted, and logged once per connection.
    fn file_descriptor_received(
        &mut self,
        cx: &mut FrameContext<'_, T, F>,
        fd: OwnedFd,
    ) -> Result<(), OwnedFd> {
        let _ = cx;
        Err(fd)
    }

    /// Bytes have arrived in [raw mode](Framing::set_raw_mode). The default
    /// drops them.
    fn raw_data_received(&mut self, cx: &mut FrameContext<'_, T, F>, data: &[u8]) {
        let _ = (cx, data);
    }

    /// Everything that one read brought has been delivered: all whole frames, or all raw
    /// data. For receivers that answer once per read.
    ///
    /// Called once for each read, even if it completed no frame. If reading was paused
    /// meanwhile, it is called when the rest has been delivered after the pause. Not
    /// called once the connection closes. [`Framing::rest_len`] says how much of an
    /// unfinished frame has arrived.
    #[inline]
    fn read_delivered(&mut self, cx: &mut FrameContext<'_, T, F>) {
        let _ = cx;
    }

    /// The peer broke the framing. `rest` is everything that was received, from the
    /// beginning of the broken frame on. The descriptors received with it are closed.
    ///
    /// The default [loses the connection](crate::AnyConnection::lose_connection). A receiver can also
    /// go on with [raw mode](Framing::set_raw_mode), or with
    /// [frames](Framing::set_frame_mode) that begin inside `rest`. If it does neither,
    /// everything that follows is dropped.
    fn framing_failed(
        &mut self,
        cx: &mut FrameContext<'_, T, F>,
        error: FramingError,
        rest: &[u8],
    ) {
        let _ = rest;
        log::debug!(
            target: "bowline::transport",
            "{}: {error}; closing the connection",
            cx.transport.peer(),
        );
        cx.transport.lose_connection();
    }

    /// Descriptors were lost on the way to us. If the connection is kept, the frame they
    /// belong to comes as [`frame_truncated`](Self::frame_truncated), and no descriptor
    /// is paired wrongly.
    ///
    /// With [`Pairing::Claimed`] this needs a peer that sends the descriptors of each
    /// frame by themselves, since nobody knows how many were lost.
    fn descriptors_truncated(
        &mut self,
        cx: &mut FrameContext<'_, T, F>,
        received: usize,
    ) -> AfterTruncation {
        let _ = (cx, received);
        AfterTruncation::LoseConnection
    }

    /// Queued descriptors have left: `count` of them since the last call.
    fn descriptors_sent(&mut self, cx: &mut FrameContext<'_, T, F>, count: usize) {
        let _ = (cx, count);
    }

    /// The peer has closed its side, and everything it sent was delivered. If it left a
    /// frame unfinished, [`Framing::take_rest`] has the bytes.
    fn read_connection_lost(&mut self, cx: &mut FrameContext<'_, T, F>) -> AfterReadClosed {
        let _ = cx;
        AfterReadClosed::EndConnection
    }

    /// Everything written was sent, and our side was closed, as asked.
    fn write_connection_lost(&mut self, cx: &mut FrameContext<'_, T, F>) {
        let _ = cx;
    }

    /// Nothing can be sent any more, and the end waits for this receiver, which has paused
    /// reading. The frames kept back are delivered first, and so is what is unread.
    fn connection_broken(&mut self, cx: &mut FrameContext<'_, T, F>, remains: Remains) {
        let _ = (cx, remains);
    }

    /// The connection has ended. Called once, last. An unfinished frame can
    /// still be [taken](Framing::take_rest).
    fn connection_lost(&mut self, cx: &mut FrameContext<'_, T, F>, reason: &CloseReason) {
        let _ = (cx, reason);
    }

    /// The reactor stops gracefully, and the connection is to end once its work is
    /// done. By default it is lost when it is idle. It is not idle inside a frame.
    fn draining(&mut self, cx: &mut FrameContext<'_, T, F>) -> AtDrain {
        let _ = cx;
        AtDrain::LoseWhenIdle
    }

    /// Whether no frame waits for an answer. Not asked inside a frame.
    fn is_idle(&self) -> bool {
        true
    }

    /// Reading goes on after a pause. The frames that were kept back follow, unless this
    /// callback pauses again.
    fn reading_resumed(&mut self, cx: &mut FrameContext<'_, T, F>) {
        let _ = cx;
    }

    /// The connection was taken apart and put together again. Its transport has another
    /// handle.
    fn connection_reattached(&mut self, cx: &mut FrameContext<'_, T, F>) {
        let _ = cx;
    }

    /// A layer that was switched on in the middle of this connection is established.
    /// Whoever switches one on takes what has arrived behind the present frame
    /// ([`Framing::take_rest`]) and hands it to the layer.
    fn connection_secured(&mut self, cx: &mut FrameContext<'_, T, F>) {
        let _ = cx;
    }

    /// For a receiver that is registered as the producer of its own transport: stop
    /// writing.
    fn pause_producing(&mut self, cx: &mut FrameContext<'_, T, F>) {
        let _ = cx;
    }

    /// For a receiver that is registered as the producer of its own transport: go on
    /// writing, or write one portion.
    fn resume_producing(&mut self, cx: &mut FrameContext<'_, T, F>) {
        let _ = cx;
    }

    /// For a receiver that is registered as the producer of its own transport: the
    /// connection is lost.
    fn stop_producing(&mut self, cx: &mut FrameContext<'_, T, F>) {
        let _ = cx;
    }

    /// Adds what the receiver says of itself to who looks into the reactor; see
    /// [`Protocol::describe`](crate::Protocol::describe).
    fn describe(&self, description: &mut Description) {
        description.section(self.log_prefix().into_owned());
    }

    /// The name of the receiver in log lines about this connection. By default it is the
    /// name of its type.
    fn log_prefix(&self) -> Cow<'_, str> {
        Cow::Borrowed(crate::protocol::short_type_name::<Self>())
    }
}

/// Everything a callback of a [`FrameReceiver`] can reach: a [`Context`] with the framing
/// as a third part.
pub struct FrameContext<'a, T: ?Sized, F> {
    /// The connection's own transport.
    pub transport: &'a mut T,
    /// The reactor that drives it.
    pub reactor: &'a mut Reactor,
    /// How the bytes that follow are cut.
    pub framing: Framing<'a, F>,
}

impl<T: Transport + ?Sized, F> FrameContext<'_, T, F> {
    /// Sends a frame with `payload`. It is one write, and the frame is not put together
    /// first. For encoders without a [header](FrameEncoder::Header).
    ///
    /// # Errors
    ///
    /// The payload does not fit the format. Nothing is sent. If the transport does not
    /// take the frame, that is no error; the [`WriteStatus`] says so.
    pub fn send_frame(&mut self, payload: &[u8]) -> Result<WriteStatus, EncodeError>
    where
        F: FrameEncoder<Header = ()>,
    {
        self.send_frame_of(&(), payload)
    }

    /// As [`send_frame`](Self::send_frame), with the values of the frame's header.
    ///
    /// # Errors
    ///
    /// As [`send_frame`](Self::send_frame).
    pub fn send_frame_of(
        &mut self,
        header: &F::Header,
        payload: &[u8],
    ) -> Result<WriteStatus, EncodeError>
    where
        F: FrameEncoder,
    {
        self.framing.framer.send_to(self.transport, header, payload)
    }

    /// Sends a frame with `payload` and these descriptors as one message. The descriptors
    /// are attached to its first byte, so a peer takes them for this frame's, whichever
    /// [`Pairing`] it uses (except loose). For encoders without a
    /// [header](FrameEncoder::Header).
    ///
    /// # Errors
    ///
    /// The payload does not fit the format, there are more descriptors than the
    /// [encoder](FrameEncoder::max_descriptors) allows, or the transport refused; see
    /// [`UnixTransport::write_with_descriptors`]. Nothing is sent, and the descriptors
    /// come back in the error.
    pub fn send_frame_with_descriptors(
        &mut self,
        payload: &[u8],
        descriptors: Vec<PassedDescriptor>,
    ) -> Result<WriteStatus, SendFrameError>
    where
        T: UnixTransport,
        F: FrameEncoder<Header = ()>,
    {
        self.send_frame_of_with_descriptors(&(), payload, descriptors)
    }

    /// As [`send_frame_with_descriptors`](Self::send_frame_with_descriptors),
    /// with the values of the frame's header.
    ///
    /// # Errors
    ///
    /// As [`send_frame_with_descriptors`](Self::send_frame_with_descriptors).
    pub fn send_frame_of_with_descriptors(
        &mut self,
        header: &F::Header,
        payload: &[u8],
        descriptors: Vec<PassedDescriptor>,
    ) -> Result<WriteStatus, SendFrameError>
    where
        T: UnixTransport,
        F: FrameEncoder,
    {
        let framer = &*self.framing.framer;
        framer.send_with_descriptors_to(self.transport, header, payload, descriptors)
    }

    /// Any transport by its handle; see [`Context::get`].
    pub fn get(&mut self, handle: TransportHandle) -> Option<&mut dyn Transport> {
        if self.transport.handle() == handle {
            Some(self.transport.as_dyn())
        } else {
            self.reactor.get(handle)
        }
    }

    /// The same without the framing, for code that wants a [`Context`]. That is mostly
    /// another protocol, to which raw data is passed on.
    pub fn as_context(&mut self) -> Context<'_, T> {
        Context {
            transport: self.transport,
            reactor: self.reactor,
        }
    }
}

/// How the following bytes are cut, as a callback sees and changes it. All changes take
/// effect when the callback has returned. They also apply to bytes that were received
/// already.
pub struct Framing<'a, F> {
    pub(super) framer: &'a mut F,
    pub(super) mode: &'a mut Mode,
    /// What follows the piece that is being delivered.
    pub(super) rest: [&'a [u8]; 2],
    pub(super) arrivals: &'a mut Arrivals,
    pub(super) changes: Changes,
}

/// What the callback did.
#[derive(Debug, Default)]
pub(super) struct Changes {
    /// The framer has to look anew at what is left.
    pub(super) framing_changed: bool,
    pub(super) rest_taken: bool,
    /// How much of its data the callback used.
    pub(super) used: Option<usize>,
}

impl<F> Framing<'_, F> {
    /// Delivers the following bytes as they come, to
    /// [`raw_data_received`](FrameReceiver::raw_data_received), until
    /// [`set_frame_mode`](Self::set_frame_mode).
    ///
    /// Meanwhile descriptors are told one by one, whatever the [`Pairing`], and reads are
    /// not limited. So descriptors of a frame that arrives together with raw data are no
    /// longer tied to that frame. If you know how many bytes are raw, prefer
    /// [`set_raw_mode_for`](Self::set_raw_mode_for).
    pub fn set_raw_mode(&mut self) {
        self.set_mode(Mode::Raw { left: u64::MAX });
    }

    /// Delivers the next `count` bytes as they come, in as many pieces as they arrive in.
    /// After them come frames.
    ///
    /// Descriptors that came with these bytes are told one by one, before the bytes. With
    /// [`Pairing::Claimed`] they stay to be claimed.
    pub fn set_raw_mode_for(&mut self, count: u64) {
        self.set_mode(match count {
            0 => Mode::Frames,
            left => Mode::Raw { left },
        });
    }

    /// Goes back to frames.
    ///
    /// In [`raw_data_received`](FrameReceiver::raw_data_received), `used` says how many
    /// bytes of the data were raw. The first frame begins behind them. In
    /// [`framing_failed`](FrameReceiver::framing_failed) it says how many bytes of the
    /// rest to skip, at least 1. A number that is too large means all bytes. In other
    /// callbacks it has no meaning.
    pub fn set_frame_mode(&mut self, used: usize) {
        self.set_mode(Mode::Frames);
        self.changes.used = Some(used);
    }

    /// Whether the following bytes are delivered as they come. It is already false in the
    /// last [`raw_data_received`](FrameReceiver::raw_data_received) of
    /// [`set_raw_mode_for`](Self::set_raw_mode_for).
    pub fn is_raw_mode(&self) -> bool {
        matches!(self.mode, Mode::Raw { .. })
    }

    /// Takes all bytes that were received behind those being delivered. They will not be
    /// decoded. A second call in the same callback finds nothing.
    ///
    /// It clears the buffer, or hands the stream over to another protocol. Descriptors of
    /// an unfinished frame are closed, unless they are
    /// [taken](Self::take_descriptors) in the same callback.
    pub fn take_rest(&mut self) -> Vec<u8> {
        self.changes.rest_taken = true;
        self.changes.framing_changed = true;
        std::mem::take(&mut self.rest).concat()
    }

    /// The descriptors of the frame that is being delivered. None in other callbacks.
    ///
    /// With [`Pairing::Claimed`], and a framer that does not say how many a frame
    /// [claims](crate::framing::Framer::claims), these are all that have arrived. Take
    /// those that the frame speaks of, and leave the others.
    pub fn descriptors(&mut self) -> FrameDescriptors<'_> {
        FrameDescriptors(self.arrivals)
    }

    /// Takes the received descriptors that do not belong to the frame that is being
    /// delivered.
    pub fn take_descriptors(&mut self) -> Vec<OwnedFd> {
        self.arrivals.take_others()
    }

    /// The rule that says which descriptors belong to which frame.
    pub fn pairing(&self) -> Pairing {
        self.arrivals.pairing
    }

    /// Sets the rule that says which descriptors belong to which frame. It holds for
    /// everything behind the bytes that are being delivered.
    pub fn set_pairing(&mut self, pairing: Pairing) {
        self.arrivals.pairing = pairing;
        self.changes.framing_changed = true;
    }

    /// How many bytes were received behind those that are being delivered.
    pub fn rest_len(&self) -> usize {
        self.rest.iter().map(|part| part.len()).sum()
    }

    /// The framer, to adjust or replace it. The remaining bytes are shown to it again.
    pub fn framer_mut(&mut self) -> &mut F {
        self.changes.framing_changed = true;
        self.framer
    }

    /// The framer.
    pub fn framer(&self) -> &F {
        self.framer
    }

    fn set_mode(&mut self, mode: Mode) {
        *self.mode = mode;
        self.changes.framing_changed = true;
        self.changes.used = None;
    }
}

impl<T: Transport + ?Sized, F> AnyContext for FrameContext<'_, T, F> {
    fn own_handle(&self) -> ConnectionHandle {
        self.transport.connection_handle()
    }

    fn reactor(&mut self) -> &mut Reactor {
        self.reactor
    }
}

impl<T: Transport + ?Sized, F: fmt::Debug> fmt::Debug for FrameContext<'_, T, F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FrameContext")
            .field("transport", &self.transport.handle())
            .field("framing", &self.framing)
            .finish_non_exhaustive()
    }
}

impl<F: fmt::Debug> fmt::Debug for Framing<'_, F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Framing")
            .field("framer", &self.framer)
            .field("mode", &self.mode)
            .field("pairing", &self.arrivals.pairing)
            .field("rest", &self.rest_len())
            .finish_non_exhaustive()
    }
}
