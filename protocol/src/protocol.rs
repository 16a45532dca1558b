//! The callbacks of one connection.

use std::any::{Any, TypeId};
use std::borrow::Cow;
use std::os::fd::OwnedFd;

use bowline_reactor::Description;

use crate::context::Context;
use crate::descriptors::ReceivedDescriptors;
use crate::reason::{CloseReason, Remains};
use crate::transport::Transport;

/// The callbacks of one connection, over transports of type `T`.
///
/// A [`Factory`](crate::Factory) builds one for each connection; the connection
/// owns it and drops it after [`connection_lost`](Self::connection_lost).
///
/// Write
///
/// - `impl<T: Transport> Protocol<T>` for a protocol that works over anything,
/// - `impl<T: UnixTransport> Protocol<T>` for one that passes descriptors,
/// - `impl<T: TcpTransport> Protocol<T>` for one that needs TCP's options.
///
/// A call that the transport cannot do does not compile. "No method named
/// `send_file_descriptor`" means that the bound, or the type in its place, is not that
/// of a UNIX connection.
///
/// # Callbacks never nest
///
/// No callback is ever called from inside another. A callback may ask things of this
/// connection or of others. Their state changes at once. The callbacks that follow from
/// it are called after the running one has returned. So state in an `Rc<RefCell<_>>`
/// that is borrowed only inside callbacks is never borrowed twice.
///
/// # Panics
///
/// A callback that panics costs its own connection, and nothing else:
/// [`connection_lost`](Self::connection_lost) follows with
/// [`CloseReason::Panicked`].
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a protocol over `{T}`",
    note = "a protocol over anything is `impl<T: Transport> Protocol<T>`, one that passes \
            descriptors `impl<T: UnixTransport> Protocol<T>`",
    note = "a receiver of frames becomes one with `Framed::new(framer, receiver)`"
)]
pub trait Protocol<T: Transport + ?Sized>: Part {
    /// The connection is established. Called once, first.
    fn connection_made(&mut self, cx: &mut Context<'_, T>) {
        let _ = cx;
    }

    /// Bytes have arrived: a piece of the stream, cut anywhere, at most 64 KiB
    /// by default. The slice belongs to the reactor; copy the bytes you want to keep.
    ///
    /// Not called after `pause_producing` until `resume_producing`, after
    /// `lose_connection` or `abort_connection`, or after the peer's end.
    fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]);

    /// A descriptor has arrived. Only on transports that pass descriptors.
    ///
    /// Called once for each descriptor, in the order they were sent, before the
    /// [`data_received`](Self::data_received) of the same read. If the connection
    /// closes meanwhile, the remaining ones are closed and not delivered. A pause holds
    /// from the next read on: everything that came with this one is delivered.
    /// (Twisted: `fileDescriptorReceived`.)
    ///
    /// # Errors
    ///
    /// A protocol that does not want the descriptor gives it back, as the default does.
    /// It is then closed and counted, and logged once per connection.
    fn file_descriptor_received(
        &mut self,
        cx: &mut Context<'_, T>,
        fd: OwnedFd,
    ) -> Result<(), OwnedFd> {
        let _ = cx;
        Err(fd)
    }

    /// A read brought descriptors. This has all of them, with all bytes of the read.
    ///
    /// Overriding this replaces
    /// [`file_descriptor_received`](Self::file_descriptor_received) *and* the
    /// [`data_received`](Self::data_received) of this read. The default calls those
    /// two, and stops as soon as the connection does not read any more. Descriptors that
    /// are left in `descriptors` are closed and counted, and logged once per connection.
    ///
    /// `data` can begin with bytes that were sent before the descriptors. It never holds
    /// bytes that were sent after the message they came with. To receive exactly one
    /// message, limit how far a read goes
    /// ([`set_read_limit`](Transport::set_read_limit)), as the
    /// [framing](crate::framing) helpers do.
    fn descriptors_received(
        &mut self,
        cx: &mut Context<'_, T>,
        descriptors: &mut ReceivedDescriptors<'_>,
        data: &[u8],
    ) {
        let mut refused = Vec::new();
        while cx.transport.is_open_for_reading()
            && let Some(fd) = descriptors.next()
        {
            if let Err(fd) = self.file_descriptor_received(cx, fd) {
                refused.push(fd);
            }
        }
        cx.transport.close_unclaimed(refused);
        if cx.transport.is_open_for_reading() {
            self.data_received(cx, data);
        }
    }

    /// Descriptors were lost on the way to us (`MSG_CTRUNC`). There was no free
    /// descriptor number outside of the reserve, or a security module refused them.
    ///
    /// `received` others of that read did arrive; they have been closed. If the
    /// connection goes on, the bytes of the read are delivered afterwards.
    fn descriptors_truncated(
        &mut self,
        cx: &mut Context<'_, T>,
        received: usize,
    ) -> AfterTruncation {
        let _ = (cx, received);
        AfterTruncation::LoseConnection
    }

    /// Queued descriptors have left: `count` of them since the last call. Our copies are
    /// closed. The peer has not necessarily read them yet.
    fn descriptors_sent(&mut self, cx: &mut Context<'_, T>, count: usize) {
        let _ = (cx, count);
    }

    /// The peer has closed its side, and everything it sent was delivered. It may still
    /// read. Called once at the most.
    ///
    /// Also called if a write has failed before. The answer does not matter then: the
    /// connection ends with that error.
    ///
    /// The default ends the connection at once with [`CloseReason::Done`]. Unsent bytes
    /// are dropped. (Twisted: `IHalfCloseableProtocol`.)
    fn read_connection_lost(&mut self, cx: &mut Context<'_, T>) -> AfterReadClosed {
        let _ = cx;
        AfterReadClosed::EndConnection
    }

    /// Everything written was sent, and our side was closed, as
    /// [`lose_write_connection`](crate::AnyConnection::lose_write_connection) asked. Called once at
    /// the most.
    fn write_connection_lost(&mut self, cx: &mut Context<'_, T>) {
        let _ = cx;
    }

    /// Nothing can be sent any more, and something that the peer had sent is not
    /// delivered yet, because reading is paused or held. So the end waits for this
    /// reader.
    ///
    /// The peer has reset the connection, or a write has failed. Called as soon as that is
    /// known, at most once. `remains` says what is left to be read.
    ///
    /// A reader that goes on gets all of it, at any pace. Then
    /// [`connection_lost`](Self::connection_lost) follows with the error. A reader that
    /// does not go on keeps the connection and its descriptor: nothing else ends it. So
    /// one whose pause may last for ever decides here. A proxy in front of a server that
    /// does not read is an example. [`lose_connection`](crate::AnyConnection::lose_connection) ends
    /// the connection at once with that error, and drops what is unread.
    ///
    /// Not called if nothing is unread or reading goes on: the end comes by itself then.
    /// Nor if the peer has only closed, which is told behind what it sent
    /// ([`read_connection_lost`](Self::read_connection_lost)). The default does nothing.
    fn connection_broken(&mut self, cx: &mut Context<'_, T>, remains: Remains) {
        let _ = (cx, remains);
    }

    /// The connection has ended. Called once, last; the protocol is dropped
    /// afterwards. If the handshake of a layer failed, nothing was called before, not
    /// even [`connection_made`](Self::connection_made).
    ///
    /// `cx.transport` is closed. Its addresses can still be read, and
    /// [`unsent_bytes`](crate::AnyConnection::unsent_bytes) says how much was never sent. Writes
    /// are refused.
    fn connection_lost(&mut self, cx: &mut Context<'_, T>, reason: &CloseReason) {
        let _ = (cx, reason);
    }

    /// The reactor stops gracefully
    /// ([`Reactor::stop_gracefully`](bowline_reactor::Reactor::stop_gracefully)). No new
    /// connection is accepted, and this one is to end once its work is done.
    ///
    /// Called once at the most, and not if the connection is already closing. An
    /// outgoing connection is told when the accepted ones have ended.
    ///
    /// Everything goes on as before: bytes are received and sent, pauses hold. By
    /// default the connection is [lost](crate::AnyConnection::lose_connection) when it is idle:
    ///
    /// - this protocol says so ([`is_idle`](Self::is_idle)),
    /// - everything was sent,
    /// - no producer is registered, other than the connection itself,
    /// - reading is not paused,
    /// - nothing came or went for the [grace](bowline_reactor::GracefulStop::grace),
    /// - and a last look finds nothing to read.
    ///
    /// So everything that has arrived is answered, and everything that was written is
    /// sent.
    ///
    /// Some protocols can say "this was the last answer". They say it from now on, and
    /// then lose the connection; the peer is not surprised by the end.
    /// ([`Reactor::is_stopping`](bowline_reactor::Reactor::is_stopping) tells later
    /// callbacks that it is time for it.) A protocol that only has to say good-bye does
    /// so here, and loses the connection.
    fn draining(&mut self, cx: &mut Context<'_, T>) -> AtDrain {
        let _ = cx;
        AtDrain::LoseWhenIdle
    }

    /// Whether the connection could end now without breaking off any work: no
    /// request has arrived in part, and none waits for its answer.
    ///
    /// Asked any number of times while the connection [drains](Self::draining). The
    /// answer matters only when nothing is unsent. Default: true.
    fn is_idle(&self) -> bool {
        true
    }

    /// Reading goes on after a pause. Called before anything more is read. A protocol
    /// that kept received bytes back can deliver them first.
    fn reading_resumed(&mut self, cx: &mut Context<'_, T>) {
        let _ = cx;
    }

    /// Whether this protocol keeps back something that had arrived, to deliver it in
    /// [`reading_resumed`](Self::reading_resumed). Default: false.
    ///
    /// Asked while reading is paused, if the connection is
    /// [broken](Self::connection_broken) and would end because nothing else is unread.
    /// It does not end then until it is resumed or closed.
    fn has_undelivered(&mut self) -> bool {
        false
    }

    /// The connection was taken apart and put together again, for instance after a
    /// restart that failed. Called before anything more is read.
    ///
    /// The connection is as it was, except that its transport has another
    /// [handle](Transport::handle). The old one reaches nothing any more. A protocol that
    /// has given its handle to a timer or to another connection gives out the new one
    /// here. A [`Timeout`](crate::policies::Timeout) has a
    /// [method](crate::policies::Timeout::reattached) for it.
    fn connection_reattached(&mut self, cx: &mut Context<'_, T>) {
        let _ = cx;
    }

    /// A layer that was switched on in the middle of this connection is established:
    /// encryption that the protocol asked for (STARTTLS). Called once each time, before
    /// anything that came through the layer. (Twisted:
    /// `IHandshakeListener.handshakeCompleted`.)
    ///
    /// From the request until this call nothing is read for the protocol, and what it
    /// writes waits. If the layer cannot be established, the connection is
    /// [lost](Self::connection_lost) instead. A layer that is there from the beginning is
    /// established before [`connection_made`](Self::connection_made), and is not told of
    /// here.
    fn connection_secured(&mut self, cx: &mut Context<'_, T>) {
        let _ = cx;
    }

    /// For a protocol that is registered as the producer of its own transport
    /// ([`ProducerRef::Protocol`](crate::ProducerRef::Protocol)): stop writing. The
    /// buffer is above the high watermark.
    fn pause_producing(&mut self, cx: &mut Context<'_, T>) {
        let _ = cx;
    }

    /// For a protocol that is registered as the producer of its own transport: go on
    /// writing, or write one portion; see
    /// [`Producer::resume_producing`](crate::Producer::resume_producing).
    fn resume_producing(&mut self, cx: &mut Context<'_, T>) {
        let _ = cx;
    }

    /// For a protocol that is registered as the producer of its own transport: the
    /// connection is lost. Called before
    /// [`connection_lost`](Self::connection_lost).
    fn stop_producing(&mut self, cx: &mut Context<'_, T>) {
        let _ = cx;
    }

    /// The part of this protocol that has the type `id`: the protocol itself, or the one
    /// inside it. `Transports::call_protocol` and `detach` use this to find the type that
    /// they are asked for.
    ///
    /// A protocol around another one asks that one too, as the policies and framings of
    /// bowline do:
    ///
    /// ```
    /// # use std::any::{Any, TypeId};
    /// # use bowline::{Context, Part, Protocol, Transport};
    /// struct Around<P>(P);
    ///
    /// impl<T: Transport, P: Protocol<T>> Protocol<T> for Around<P> {
    ///     fn part(&mut self, id: TypeId) -> Option<&mut dyn Any> {
    ///         match id == TypeId::of::<Self>() {
    ///             true => Some(self),
    ///             false => self.0.part(id),
    ///         }
    ///     }
    ///
    ///     fn into_part(self: Box<Self>, id: TypeId) -> Option<Box<dyn Any>> {
    ///         match id == TypeId::of::<Self>() {
    ///             true => Some(self),
    ///             false => Box::new(self.0).into_part(id),
    ///         }
    ///     }
    /// #   fn data_received(&mut self, _: &mut Context<'_, T>, _: &[u8]) {}
    /// }
    /// ```
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

    /// Adds what the protocol says of itself to who looks into the reactor: a part, with
    /// facts such as a state, a name, a count. By default it has none. What the peer has
    /// sent does not belong there. A protocol around another one adds its own part first.
    fn describe(&self, description: &mut Description) {
        description.section(self.log_prefix().into_owned());
    }

    /// The name of the protocol in log lines about this connection. By default it is the
    /// name of its type.
    fn log_prefix(&self) -> Cow<'_, str> {
        Cow::Borrowed(short_type_name::<Self>())
    }
}

/// What happens when the peer has closed its side; see
/// [`Protocol::read_connection_lost`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AfterReadClosed {
    /// The connection ends at once. Unsent bytes are dropped.
    EndConnection,
    /// The buffered bytes are sent, then the connection ends.
    LoseConnection,
    /// We go on writing, and close when we are done.
    KeepWriting,
}

/// What happens when received descriptors were truncated; see
/// [`Protocol::descriptors_truncated`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AfterTruncation {
    /// The connection ends with
    /// [`CloseReason::DescriptorsTruncated`].
    LoseConnection,
    /// The connection goes on. For protocols whose messages say how many descriptors
    /// they own, so that they notice what is missing.
    KeepConnection,
}

/// What happens to a connection while the reactor stops gracefully; see
/// [`Protocol::draining`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AtDrain {
    /// It is lost when it is idle. The stop waits for that.
    LoseWhenIdle,
    /// It ends by itself. The stop waits for that.
    GoOn,
    /// The stop does not wait for it. If nothing else ends it, it ends with the reactor:
    /// [`CloseReason::ReactorStopped`].
    DoNotWait,
}

/// A value whose type can be asked for, as [`Protocol::part`] needs it. Every `'static`
/// type implements this already.
pub trait Part: Any {
    /// Itself, as a value of some type.
    fn as_any_mut(&mut self) -> &mut dyn Any;

    /// The same, given away.
    fn into_any(self: Box<Self>) -> Box<dyn Any>;
}

impl<P: Any> Part for P {
    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

/// The last part of a type's path, without its parameters.
pub(crate) fn short_type_name<P: ?Sized>() -> &'static str {
    let name = std::any::type_name::<P>();
    let name = name.split('<').next().unwrap_or(name);
    name.rsplit("::").next().unwrap_or(name)
}

/// The callbacks that protocols of streams and of packets have in common, for the protocol
/// inside a box.
macro_rules! forward_boxed_callbacks {
    () => {
        fn connection_made(&mut self, cx: &mut Context<'_, T>) {
            (**self).connection_made(cx);
        }

        fn read_connection_lost(&mut self, cx: &mut Context<'_, T>) -> AfterReadClosed {
            (**self).read_connection_lost(cx)
        }

        fn write_connection_lost(&mut self, cx: &mut Context<'_, T>) {
            (**self).write_connection_lost(cx);
        }

        fn connection_lost(&mut self, cx: &mut Context<'_, T>, reason: &CloseReason) {
            (**self).connection_lost(cx, reason);
        }

        fn draining(&mut self, cx: &mut Context<'_, T>) -> AtDrain {
            (**self).draining(cx)
        }

        fn is_idle(&self) -> bool {
            (**self).is_idle()
        }

        fn connection_reattached(&mut self, cx: &mut Context<'_, T>) {
            (**self).connection_reattached(cx);
        }

        fn part(&mut self, id: TypeId) -> Option<&mut dyn Any> {
            match id == TypeId::of::<Self>() {
                true => Some(self),
                false => (**self).part(id),
            }
        }

        fn into_part(self: Box<Self>, id: TypeId) -> Option<Box<dyn Any>> {
            match id == TypeId::of::<Self>() {
                true => Some(self),
                false => (*self).into_part(id),
            }
        }

        fn describe(&self, description: &mut Description) {
            (**self).describe(description);
        }

        fn log_prefix(&self) -> Cow<'_, str> {
            (**self).log_prefix()
        }
    };
}

pub(crate) use forward_boxed_callbacks;

/// Forwards every callback to the protocol inside the box.
impl<T: Transport + ?Sized, P: Protocol<T> + ?Sized> Protocol<T> for Box<P> {
    forward_boxed_callbacks!();

    fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
        (**self).data_received(cx, data);
    }

    fn file_descriptor_received(
        &mut self,
        cx: &mut Context<'_, T>,
        fd: OwnedFd,
    ) -> Result<(), OwnedFd> {
        (**self).file_descriptor_received(cx, fd)
    }

    fn descriptors_received(
        &mut self,
        cx: &mut Context<'_, T>,
        descriptors: &mut ReceivedDescriptors<'_>,
        data: &[u8],
    ) {
        (**self).descriptors_received(cx, descriptors, data);
    }

    fn descriptors_truncated(
        &mut self,
        cx: &mut Context<'_, T>,
        received: usize,
    ) -> AfterTruncation {
        (**self).descriptors_truncated(cx, received)
    }

    fn descriptors_sent(&mut self, cx: &mut Context<'_, T>, count: usize) {
        (**self).descriptors_sent(cx, count);
    }

    fn connection_broken(&mut self, cx: &mut Context<'_, T>, remains: Remains) {
        (**self).connection_broken(cx, remains);
    }

    fn reading_resumed(&mut self, cx: &mut Context<'_, T>) {
        (**self).reading_resumed(cx);
    }

    fn has_undelivered(&mut self) -> bool {
        (**self).has_undelivered()
    }

    fn connection_secured(&mut self, cx: &mut Context<'_, T>) {
        (**self).connection_secured(cx);
    }

    fn pause_producing(&mut self, cx: &mut Context<'_, T>) {
        (**self).pause_producing(cx);
    }

    fn resume_producing(&mut self, cx: &mut Context<'_, T>) {
        (**self).resume_producing(cx);
    }

    fn stop_producing(&mut self, cx: &mut Context<'_, T>) {
        (**self).stop_producing(cx);
    }
}
