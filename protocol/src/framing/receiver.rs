//! Who receives frames, and what it can ask for.

use std::borrow::Cow;
use std::fmt;
use std::os::fd::OwnedFd;

use bowline_reactor::Reactor;

use crate::context::{AnyContext, Context};
use crate::descriptors::PassedDescriptor;
use crate::framing::framed::Mode;
use crate::framing::pairing::Arrivals;
use crate::framing::{
    EncodeError, FrameDescriptors, FrameEncoder, FramingError, Pairing, SendFrameError,
};
use crate::protocol::{AfterReadClosed, AfterTruncation, AtDrain};
use crate::reason::CloseReason;
use crate::transport::{Transport, TransportHandle, UnixTransport, WriteStatus};

/// The callbacks of a connection whose bytes come in frames marked off by a
/// framer of type `F`; [`Framed`](crate::framing::Framed) makes a protocol of
/// it.
///
/// They are those of [`Protocol`](crate::Protocol), with frames in the place of
/// bytes, and with its promises: none is ever called from inside another. Those
/// not described here are described there.
pub trait FrameReceiver<T: Transport + ?Sized, F>: 'static {
    /// The connection is there. Called once, first.
    fn connection_made(&mut self, cx: &mut FrameContext<'_, T, F>) {
        let _ = cx;
    }

    /// A frame has arrived: its payload, whole. Copy what is to be kept.
    ///
    /// Its descriptors, if it has any, are in
    /// [`cx.framing.descriptors()`](Framing::descriptors); which those are,
    /// [`Pairing`] says. What is not taken is closed and counted, and logged once
    /// per connection.
    ///
    /// Not called while reading is paused, nor any more once the connection
    /// closes or was aborted, for frames that were received already neither.
    fn frame_received(&mut self, cx: &mut FrameContext<'_, T, F>, frame: &[u8]);

    /// A frame has arrived that was sent with descriptors, some or all of which
    /// were lost on the way to us; those that did arrive are closed. Only where
    /// [`descriptors_truncated`](Self::descriptors_truncated) kept the
    /// connection. The frames that follow have exactly theirs again, as long as
    /// the peer sends each frame's by themselves.
    ///
    /// The default drops the frame, so that no code meets one that lacks what
    /// it speaks of. A protocol that keeps the connection answers it with an
    /// error of its own, most likely.
    fn frame_truncated(&mut self, cx: &mut FrameContext<'_, T, F>, frame: &[u8]) {
        let _ = (cx, frame);
    }

    /// A descriptor has arrived that is tied to no frame: with
    /// [`Pairing::Loose`] before the frames that end in the same read, otherwise
    /// before the bytes of [raw mode](Framing::set_raw_mode) that it came with.
    ///
    /// # Errors
    ///
    /// A receiver that does not want the descriptor gives it back: it is closed
    /// and counted, and logged once per connection. That is what the default
    /// does.
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

    /// What one read brought was delivered: all frames that are whole, or what
    /// there was of raw data. For those who answer per read.
    ///
    /// Called once for each read, also where that completed nothing; where
    /// reading was paused on the way, when the rest was delivered after the
    /// pause. Not called once the connection closes. How much of an unfinished
    /// frame there is, [`Framing::rest_len`] says.
    #[inline]
    fn read_delivered(&mut self, cx: &mut FrameContext<'_, T, F>) {
        let _ = cx;
    }

    /// The peer broke the framing. `rest` is everything from the beginning of
    /// the broken frame on that was received; the descriptors received with it
    /// are closed.
    ///
    /// The default [loses the connection](Transport::lose_connection). One that
    /// does not, and leaves framing as it is, has everything dropped that
    /// follows. It can go on with [raw mode](Framing::set_raw_mode) or with
    /// [frames](Framing::set_frame_mode), which can begin inside `rest`.
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

    /// Descriptors were lost on the way to us. Where the connection is kept, the
    /// frame they belong to comes as [`frame_truncated`](Self::frame_truncated),
    /// and none is paired wrongly.
    ///
    /// With [`Pairing::Claimed`] that is so only where the peer sends the
    /// descriptors of each frame by themselves: how many were lost is not known.
    fn descriptors_truncated(
        &mut self,
        cx: &mut FrameContext<'_, T, F>,
        received: usize,
    ) -> AfterTruncation {
        let _ = (cx, received);
        AfterTruncation::LoseConnection
    }

    /// Descriptors that were queued have left: `count` of them since the last
    /// call.
    fn descriptors_sent(&mut self, cx: &mut FrameContext<'_, T, F>, count: usize) {
        let _ = (cx, count);
    }

    /// The peer has closed its side and everything it sent was delivered, except
    /// a frame that it did not finish: [`Framing::take_rest`] has that.
    fn read_connection_lost(&mut self, cx: &mut FrameContext<'_, T, F>) -> AfterReadClosed {
        let _ = cx;
        AfterReadClosed::EndConnection
    }

    /// Our side was closed as asked, and everything written before was sent.
    fn write_connection_lost(&mut self, cx: &mut FrameContext<'_, T, F>) {
        let _ = cx;
    }

    /// The connection has ended. Called once, last. An unfinished frame can
    /// still be [taken](Framing::take_rest).
    fn connection_lost(&mut self, cx: &mut FrameContext<'_, T, F>, reason: &CloseReason) {
        let _ = (cx, reason);
    }

    /// The reactor stops gracefully, and the connection is to end once its work is
    /// done. By the default it is lost when it is idle, which it is not inside of
    /// a frame.
    fn draining(&mut self, cx: &mut FrameContext<'_, T, F>) -> AtDrain {
        let _ = cx;
        AtDrain::LoseWhenIdle
    }

    /// Whether no frame waits for an answer. Not asked inside of a frame.
    fn is_idle(&self) -> bool {
        true
    }

    /// Reading goes on after a pause. The frames kept back follow, unless this
    /// pauses again.
    fn reading_resumed(&mut self, cx: &mut FrameContext<'_, T, F>) {
        let _ = cx;
    }

    /// The connection was taken apart and put together again, and its transport has
    /// another handle.
    fn connection_reattached(&mut self, cx: &mut FrameContext<'_, T, F>) {
        let _ = cx;
    }

    /// For a receiver registered as the producer of its own transport: stop
    /// writing.
    fn pause_producing(&mut self, cx: &mut FrameContext<'_, T, F>) {
        let _ = cx;
    }

    /// For a receiver registered as the producer of its own transport: go on
    /// writing, or write one portion.
    fn resume_producing(&mut self, cx: &mut FrameContext<'_, T, F>) {
        let _ = cx;
    }

    /// For a receiver registered as the producer of its own transport: the
    /// connection is lost.
    fn stop_producing(&mut self, cx: &mut FrameContext<'_, T, F>) {
        let _ = cx;
    }

    /// What log lines about this connection call the receiver; the name of its
    /// type by default.
    fn log_prefix(&self) -> Cow<'_, str> {
        Cow::Borrowed(crate::protocol::short_type_name::<Self>())
    }
}

/// What a callback of a [`FrameReceiver`] can reach: a
/// [`Context`] with the framing as a third part.
pub struct FrameContext<'a, T: ?Sized, F> {
    /// The connection's own transport.
    pub transport: &'a mut T,
    /// The reactor that drives it.
    pub reactor: &'a mut Reactor,
    /// How the bytes that follow are cut.
    pub framing: Framing<'a, F>,
}

impl<T: Transport + ?Sized, F> FrameContext<'_, T, F> {
    /// Sends a frame with `payload`, as one write and without putting it
    /// together first. For encoders without a [header](FrameEncoder::Header).
    ///
    /// # Errors
    ///
    /// The payload does not fit the format, and nothing is sent. That the
    /// transport does not take it is no error but a [`WriteStatus`].
    pub fn send_frame(&mut self, payload: &[u8]) -> Result<WriteStatus, EncodeError>
    where
        F: FrameEncoder<Header = ()>,
    {
        self.send_frame_of(&(), payload)
    }

    /// As [`send_frame`](Self::send_frame), with the values of its header.
    ///
    /// # Errors
    ///
    /// As there.
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

    /// Sends a frame with `payload` and these descriptors as one message, the
    /// descriptors attached to its first byte: what a peer of any
    /// [`Pairing`] but the loose takes for this frame's. For encoders without a
    /// [header](FrameEncoder::Header).
    ///
    /// # Errors
    ///
    /// The payload does not fit the format, there are more descriptors than the
    /// [protocol](FrameEncoder::max_descriptors) allows, or the transport
    /// refused; see [`UnixTransport::write_with_descriptors`]. Nothing is sent,
    /// and the descriptors come back in the error.
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
    /// with the values of its header.
    ///
    /// # Errors
    ///
    /// As there.
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

    /// The same without the framing, for what wants a [`Context`]: another
    /// protocol above all, to which raw data is passed on.
    pub fn as_context(&mut self) -> Context<'_, T> {
        Context {
            transport: self.transport,
            reactor: self.reactor,
        }
    }
}

/// How the bytes that follow are cut, as a callback sees and changes it. All
/// changes take effect when the callback has returned, on the rest of what was
/// received too.
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
    /// Delivers what follows as it comes, to
    /// [`raw_data_received`](FrameReceiver::raw_data_received), until
    /// [`set_frame_mode`](Self::set_frame_mode).
    ///
    /// Descriptors are told one by one then, whatever the [`Pairing`], and reads
    /// are not limited: those of a frame that arrives together with raw data are
    /// no longer tied to it. Where it is known how many bytes are raw, prefer
    /// [`set_raw_mode_for`](Self::set_raw_mode_for).
    pub fn set_raw_mode(&mut self) {
        self.set_mode(Mode::Raw { left: u64::MAX });
    }

    /// Delivers the next `count` bytes as they come, in as many pieces as they
    /// arrive in, and frames afterwards.
    ///
    /// Descriptors that came with them are told one by one, before them; with
    /// [`Pairing::Claimed`] they stay to be claimed.
    pub fn set_raw_mode_for(&mut self, count: u64) {
        self.set_mode(match count {
            0 => Mode::Frames,
            left => Mode::Raw { left },
        });
    }

    /// Goes back to frames.
    ///
    /// From [`raw_data_received`](FrameReceiver::raw_data_received), `used` says
    /// how many bytes of its data were raw, the first frame begins behind them;
    /// from [`framing_failed`](FrameReceiver::framing_failed), how many bytes of
    /// its rest to skip, at least 1. More than there are means all. In other
    /// callbacks it means nothing.
    pub fn set_frame_mode(&mut self, used: usize) {
        self.set_mode(Mode::Frames);
        self.changes.used = Some(used);
    }

    /// Whether what follows is delivered as it comes. In the last
    /// [`raw_data_received`](FrameReceiver::raw_data_received) of
    /// [`set_raw_mode_for`](Self::set_raw_mode_for) it is not any more.
    pub fn is_raw_mode(&self) -> bool {
        matches!(self.mode, Mode::Raw { .. })
    }

    /// Takes everything received behind what is being delivered: it will not be
    /// decoded. Empty the second time.
    ///
    /// For clearing the buffer, and for handing the stream over to another
    /// protocol. Descriptors of an unfinished frame are closed unless they are
    /// [taken](Self::take_descriptors) in the same callback.
    pub fn take_rest(&mut self) -> Vec<u8> {
        self.changes.rest_taken = true;
        self.changes.framing_changed = true;
        std::mem::take(&mut self.rest).concat()
    }

    /// The descriptors of the frame that is being delivered; none in other
    /// callbacks.
    ///
    /// With [`Pairing::Claimed`] and a framer that does not say how many a frame
    /// [claims](crate::framing::Framer::claims): all that have arrived. A frame
    /// takes what it speaks of, and leaves the others.
    pub fn descriptors(&mut self) -> FrameDescriptors<'_> {
        FrameDescriptors(self.arrivals)
    }

    /// Takes the descriptors that were received and are not those of the frame
    /// that is being delivered.
    pub fn take_descriptors(&mut self) -> Vec<OwnedFd> {
        self.arrivals.take_others()
    }

    /// By which rule frames are given their descriptors.
    pub fn pairing(&self) -> Pairing {
        self.arrivals.pairing
    }

    /// Sets by which rule frames are given their descriptors, from the next on:
    /// from the byte on that follows what is being delivered.
    pub fn set_pairing(&mut self, pairing: Pairing) {
        self.arrivals.pairing = pairing;
        self.changes.framing_changed = true;
    }

    /// How many bytes were received behind what is being delivered.
    pub fn rest_len(&self) -> usize {
        self.rest.iter().map(|part| part.len()).sum()
    }

    /// The framer, to be adjusted or replaced; it looks anew at what is left.
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
    fn own_handle(&self) -> TransportHandle {
        self.transport.handle()
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
