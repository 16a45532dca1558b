//! The transport of byte streams: its buffer, and the layers that move its bytes.
//!
//! The template methods are here. They call the methods that a [`FileDescriptor`]
//! overrides. None of them calls user code.

use std::any::{Any, TypeId};
use std::io;
use std::time::Instant;

use bowline_protocol::{
    CloseReason, LingeringClose, ProducerKind, ProducerRef, RegisterProducerError, Remains,
    Transport, TransportHandle, TransportState, WriteStatus,
};
use bowline_reactor::{Handle, Reactor, Token};

use crate::detach::Unsent;
use crate::establish::SocketTransport;
use crate::file_descriptor::FileDescriptor;
use crate::link::{Broken, Flags, Link};
use crate::write_buffer::WriteBuffer;

/// A write of at least this size on an empty buffer goes straight to the kernel. Above
/// it, saving the copy is worth more than the system call that a second write in the
/// same turn would cost.
const MIN_DIRECT_BYTES: usize = 8_192;

/// A transport of bytes over `L`: a socket, or layers on one.
///
/// It implements [`Transport`]. The kinds of connection that come with bowline have types
/// of their own, such as [`TcpStream`](crate::TcpStream). A connection with a layer or a
/// socket of yours is a `Stream` of it.
#[derive(Debug)]
pub struct Stream<L> {
    pub(crate) link: Link,
    pub(crate) buffer: WriteBuffer,
    pub(crate) layer: L,
}

/// A transport that can be put on a connected socket: a [`Stream`], or a type around
/// one.
pub trait StreamTransport: Transport + SocketTransport<Layer: FileDescriptor> {
    /// The stream inside it.
    fn stream(&self) -> &Stream<Self::Layer>;

    /// The stream inside it, mutably.
    fn stream_mut(&mut self) -> &mut Stream<Self::Layer>;

    /// Makes a transport of a stream.
    fn from_stream(stream: Stream<Self::Layer>) -> Self;

    /// Makes a plain transport handle for the descriptor `token`.
    fn transport_named(token: Token) -> TransportHandle {
        Handle::new(token, |facet| {
            facet.downcast_mut::<Self>().map(|transport| transport as _)
        })
    }
}

impl<L: FileDescriptor> SocketTransport for Stream<L> {
    type Layer = L;
    type Handle = TransportHandle;

    fn named(token: Token) -> TransportHandle {
        Self::transport_named(token)
    }

    fn unsent_while_open(&self) -> Option<usize> {
        let is_open = self.link.transport_state() == TransportState::Connected;
        is_open.then(|| self.unsent())
    }
}

impl<L: FileDescriptor> StreamTransport for Stream<L> {
    #[inline(always)]
    fn stream(&self) -> &Self {
        self
    }

    #[inline(always)]
    fn stream_mut(&mut self) -> &mut Self {
        self
    }

    fn from_stream(stream: Self) -> Self {
        stream
    }
}

impl_transport!(impl<L: FileDescriptor> for Stream<L>);

/// Defines a kind's own type around a [`Stream`], so that signatures and errors name
/// the kind.
macro_rules! stream_type {
    ($(#[$doc:meta])* $name:ident over $layer:ty, known by $handle:ty) => {
        $(#[$doc])*
        #[derive(Debug)]
        pub struct $name($crate::stream::Stream<$layer>);

        impl $crate::establish::SocketTransport for $name {
            type Layer = $layer;
            type Handle = $handle;

            fn named(token: bowline_reactor::Token) -> $handle {
                bowline_reactor::Handle::new(token, |facet| {
                    facet.downcast_mut::<Self>().map(|transport| transport as _)
                })
            }

            fn unsent_while_open(&self) -> Option<usize> {
                self.0.unsent_while_open()
            }
        }

        impl $crate::stream::StreamTransport for $name {
            #[inline(always)]
            fn stream(&self) -> &$crate::stream::Stream<$layer> {
                &self.0
            }

            #[inline(always)]
            fn stream_mut(&mut self) -> &mut $crate::stream::Stream<$layer> {
                &mut self.0
            }

            fn from_stream(stream: $crate::stream::Stream<$layer>) -> Self {
                Self(stream)
            }
        }

        impl_transport!(impl for $name);
    };
}

impl<L: FileDescriptor> Stream<L> {
    pub(crate) fn new(link: Link, layer: L) -> Self {
        Self {
            link,
            buffer: WriteBuffer::default(),
            layer,
        }
    }

    /// The layer that has the type `P`, at any depth. For example the TLS layer of a
    /// connection, to ask it about the peer.
    pub fn layer<P: FileDescriptor>(&self) -> Option<&P> {
        let mut place: &dyn FileDescriptor = &self.layer;
        loop {
            let any: &dyn Any = place;
            if let Some(found) = any.downcast_ref() {
                return Some(found);
            }
            place = place.below()?;
        }
    }

    /// As [`layer`](Self::layer), mutably, together with the link that the layer may need.
    pub fn layer_mut<P: FileDescriptor>(&mut self) -> Option<(&mut P, &mut Link)> {
        // The search returns a depth, since a borrow that was searched with cannot be
        // kept.
        let depth = self.depth_of::<P>()?;
        let mut place: &mut dyn FileDescriptor = &mut self.layer;
        for _ in 0..depth {
            place = place.below_mut()?;
        }
        let any: &mut dyn Any = place;
        Some((any.downcast_mut()?, &mut self.link))
    }

    /// What a layer says of itself that has the type `P`, at any depth and whatever that
    /// layer is on: its [facet](FileDescriptor::facet).
    pub fn facet<P: Any>(&self) -> Option<&P> {
        let mut place: &dyn FileDescriptor = &self.layer;
        loop {
            if let Some(found) = place.facet().and_then(<dyn Any>::downcast_ref) {
                return Some(found);
            }
            place = place.below()?;
        }
    }

    /// What a layer says of itself, mutably, together with the link that the layer may
    /// need.
    pub fn facet_mut<P: Any>(&mut self) -> Option<(&mut P, &mut Link)> {
        let mut place: &mut dyn FileDescriptor = &mut self.layer;
        while !place.facet().is_some_and(<dyn Any>::is::<P>) {
            place = place.below_mut()?;
        }
        Some((place.facet_mut()?.downcast_mut()?, &mut self.link))
    }

    fn depth_of<P: FileDescriptor>(&self) -> Option<usize> {
        let mut place: &dyn FileDescriptor = &self.layer;
        let mut depth = 0;
        loop {
            let any: &dyn Any = place;
            if any.is::<P>() {
                return Some(depth);
            }
            place = place.below()?;
            depth += 1;
        }
    }

    /// How many bytes layers hold that have not left. These are bytes of their own, and
    /// bytes of the user that they have taken. The latter no longer count as
    /// [unsent](bowline_protocol::AnyConnection::unsent_bytes).
    pub fn unflushed(&self) -> usize {
        self.layer.unflushed()
    }

    /// Calls the layer of the type `layer`, if there is one.
    pub(crate) fn wake_layer(&mut self, layer: TypeId, now: Instant) {
        let mut place: &mut dyn FileDescriptor = &mut self.layer;
        loop {
            if (*place).type_id() == layer {
                return place.timer_fired(&mut self.link, now);
            }
            match place.below_mut() {
                Some(below) => place = below,
                None => return,
            }
        }
    }

    /// Has its layers start.
    pub(crate) fn start(&mut self) {
        self.layer.start(&mut self.link);
    }

    /// Queues bytes and descriptors that were unsent elsewhere.
    pub(crate) fn restore_unsent(&mut self, unsent: Unsent) {
        self.layer
            .restore_unsent_descriptors(&self.link, unsent.descriptors);
        self.buffer_bytes(&unsent.bytes);
    }

    // Writing.

    /// Queues bytes. See [`Transport::write`].
    #[inline(always)]
    pub(crate) fn write_bytes(&mut self, data: &[u8]) -> WriteStatus {
        if self.append(data) {
            return self.bytes_queued();
        }
        self.write_with_care(data)
    }

    /// Appends bytes if they are few, wanted, and fit into the memory at hand.
    /// Otherwise does nothing.
    #[inline(always)]
    fn append(&mut self, data: &[u8]) -> bool {
        // One test in the place of two, of which the compiler makes more at times.
        let is_large = data.len() / MIN_DIRECT_BYTES;
        if data.is_empty() || is_large | self.link.careful_bits() != 0 {
            return false;
        }
        if self.buffer.needs_storage() {
            let Some(storage) = self.link.shared.take_last_storage() else {
                return false;
            };
            self.buffer.lend_storage(storage);
        }
        self.buffer.append(data)
    }

    /// Queues bytes that [`append`](Self::append) did not take.
    #[inline(never)]
    fn write_with_care(&mut self, data: &[u8]) -> WriteStatus {
        if !self.takes_bytes(data.len()) {
            return WriteStatus::Refused;
        }
        self.link.note_written(data);
        if data.len() < MIN_DIRECT_BYTES {
            self.buffer_bytes(data);
        } else {
            let taken = self.write_directly(data);
            if !self.takes_bytes(data.len() - taken) {
                // The send found that the connection is broken.
                return WriteStatus::Refused;
            }
            self.buffer_bytes(&data[taken..]);
        }
        self.bytes_queued()
    }

    /// Queues `parts`, one after the other.
    pub(crate) fn write_parts(&mut self, parts: &[&[u8]]) -> WriteStatus {
        let length = parts.iter().map(|part| part.len()).sum();
        if !self.takes_bytes(length) {
            return WriteStatus::Refused;
        }
        for part in parts {
            self.link.note_written(part);
            self.buffer_bytes(part);
        }
        self.bytes_queued()
    }

    /// Queues bytes without copying them.
    pub(crate) fn write_vec(&mut self, data: Vec<u8>) -> WriteStatus {
        if !self.takes_bytes(data.len()) {
            return WriteStatus::Refused;
        }
        self.link.note_written(&data);
        self.buffer.push_owned(data);
        self.bytes_queued()
    }

    pub(crate) fn takes_bytes(&self, length: usize) -> bool {
        self.link.takes_bytes(self.buffer.len(), length)
    }

    pub(crate) fn buffer_bytes(&mut self, data: &[u8]) {
        if data.is_empty() {
            return;
        }
        if self.buffer.needs_storage() {
            self.buffer.lend_storage(self.link.shared.take_storage());
        }
        self.buffer.push(data);
    }

    /// Sends as much as one system call takes, and resumes the producer if the buffer
    /// has drained. (Twisted: `doWrite`.)
    #[inline(always)]
    pub(crate) fn do_write(&mut self) {
        let (front, is_all) = self.buffer.front();
        let result = if is_all {
            self.layer.write_some_data(&mut self.link, front)
        } else {
            self.write_many_pieces()
        };
        match result {
            Ok(bytes) => {
                self.link.sent += bytes as u64;
                if let Some(storage) = self.buffer.consume(bytes) {
                    self.link.shared.return_storage(storage);
                }
                if self.link.is_followed() {
                    self.bytes_left();
                }
            }
            Err(error) => self.write_failed(error),
        }
    }

    /// Offers as many pieces as one system call takes.
    #[inline(never)]
    fn write_many_pieces(&mut self) -> io::Result<usize> {
        let (slices, count) = self.buffer.slices();
        self.layer
            .write_some_pieces(&mut self.link, &slices[..count])
    }

    /// Tries to send a long write without copying it. Returns how many bytes left.
    fn write_directly(&mut self, data: &[u8]) -> usize {
        let is_first = self.buffer.is_empty() && !self.link.has(Flags::UNFLUSHED);
        if !is_first || !self.link.may_write() || self.layer.queued_descriptors() > 0 {
            return 0;
        }
        match self.layer.write_some_data(&mut self.link, data) {
            Ok(bytes) => {
                self.link.sent += bytes as u64;
                if self.link.is_followed() {
                    self.link.note_sent();
                }
                bytes
            }
            Err(error) => {
                self.write_failed(error);
                0
            }
        }
    }

    /// Sends the bytes of layers.
    #[cold]
    pub(crate) fn flush(&mut self) {
        let has_both = !self.buffer.is_empty() && self.link.may_write();
        if has_both && self.layer.flushes_by_writing() {
            self.do_write();
        } else if let Err(error) = self.layer.flush(&mut self.link) {
            self.write_failed(error);
        }
        if self.layer.unflushed() == 0 {
            self.link.clear(Flags::UNFLUSHED);
        }
    }

    /// Sends the last bytes of layers, as far as the socket takes them now. Called when
    /// the connection ends, unless it is aborted.
    #[inline]
    pub(crate) fn say_last_words(&mut self) {
        if self.layer.below().is_some() {
            self.flush_last_words();
        }
    }

    #[cold]
    #[inline(never)]
    fn flush_last_words(&mut self) {
        let link = &mut self.link;
        let reason = link.cold_ref().and_then(|cold| cold.reason.as_ref());
        let is_orderly = matches!(reason, None | Some(CloseReason::ReactorStopped));
        if link.is_broken() || !link.has(Flags::WRITABLE) {
            return;
        }
        // A layer says goodbye only if all written bytes have left with it.
        if is_orderly && link.is_established() && self.unsent() == 0 {
            self.layer.closing(&mut self.link);
        }
        if self.link.has(Flags::UNFLUSHED) {
            // Nobody waits for bytes that would not leave now.
            let _ = self.layer.flush(&mut self.link);
        }
    }

    /// Handles a send that failed.
    #[cold]
    fn write_failed(&mut self, error: io::Error) {
        if let Some(mut error) = self.link.lasting_error(error) {
            // When the peer of a UNIX socket closes without having read everything,
            // readers get `ECONNRESET` and writers get `EPIPE`. Here both are a reset,
            // whoever is first.
            if error.kind() == io::ErrorKind::BrokenPipe
                && let Some(cause) = self.layer.socket().take_error()
            {
                error = cause;
            }
            let remains = self.layer.socket().remains(&error);
            let reason = self.layer.reason_of(&mut self.link, error);
            self.break_off(reason, remains);
        }
    }

    /// Records that nothing more can be sent. Bytes that the peer sent before are read
    /// first, as slowly as the reader wants, since the kernel keeps them.
    #[cold]
    pub(crate) fn break_off(&mut self, reason: CloseReason, remains: Remains) {
        let link = &mut self.link;
        if !link.is_open_for_reading() {
            link.end(reason);
            return;
        }
        let remains = match remains {
            Remains::Pieces if link.has(Flags::END_ARRIVED) => Remains::Everything,
            remains => remains,
        };
        if let Some(broken) = link.broken_mut() {
            // The first error stays the reason. The unread bytes are delivered all the
            // same.
            broken.remains = remains;
            return;
        }
        let dropped = self.buffer.take().len();
        link.cold().unsent.0 += dropped;
        link.set_broken(Broken {
            reason,
            remains,
            was_told: false,
        });
        if link.has_producer() {
            // This may be what keeps the reader from reading. Nothing is unsent any
            // more.
            link.resume_producer_if_drained(0, false);
        }
    }

    pub(crate) fn set_lingering_close(&mut self, lingering: Option<LingeringClose>) {
        // Else there is nothing to wait for.
        if self.layer.socket().can_be_reset()
            && (lingering.is_some() || self.link.cold_ref().is_some())
        {
            self.link.cold().lingering = lingering;
        }
    }

    /// How many bytes have arrived and were not delivered.
    pub(crate) fn undelivered(&self) -> usize {
        self.link.pushed_back() + self.layer.undelivered() + self.layer.socket().unread()
    }

    /// Has the poller watch a socket that is not registered yet, unless it is about to
    /// be read. Even a connection that does not read waits for a reset.
    pub(crate) fn watch_if_waiting(&mut self, reactor: &mut Reactor) {
        let link = &mut self.link;
        let waits_to_write = !self.buffer.is_empty() && !link.has(Flags::WRITABLE);
        if !self.layer.socket().is_open() || link.may_read() && !waits_to_write {
            return;
        }
        match self.layer.socket().watch(reactor, link.token) {
            // The poller reports everything that has happened meanwhile.
            Ok(()) => link.clear(Flags::UNWATCHED),
            Err(error) => link.end(CloseReason::Lost(error)),
        }
    }

    /// Has the poller report nothing of the socket any more.
    pub(crate) fn unwatch(&self, reactor: &mut Reactor) {
        if !self.link.has(Flags::UNWATCHED) {
            let writing = self.link.has(Flags::WATCHES_WRITING);
            self.layer.socket().unwatch(reactor, writing);
        }
    }

    /// Called after bytes or descriptors were queued. Pauses a push producer if that
    /// made the buffer full.
    #[inline(always)]
    pub(crate) fn bytes_queued(&mut self) -> WriteStatus {
        if !self.is_full() {
            return WriteStatus::Ready;
        }
        self.link.pause_push_producer();
        WriteStatus::Full
    }

    #[inline(always)]
    pub(crate) fn is_full(&self) -> bool {
        self.layer
            .is_send_buffer_full(&self.link, self.buffer.len())
    }

    pub(crate) fn unsent(&self) -> usize {
        let dropped = self.link.cold_ref().map_or(0, |cold| cold.unsent.0);
        self.buffer.len() + dropped
    }

    // Producers.

    /// Registers a producer. See [`Transport::register_producer`].
    pub(crate) fn add_producer(
        &mut self,
        producer: ProducerRef,
        kind: ProducerKind,
    ) -> Result<(), RegisterProducerError> {
        let is_full = self.is_full();
        let link = &mut self.link;
        if link.is_ended() {
            link.cold().rejected.push(producer);
            link.set(Flags::STOP_REJECTED);
            return Err(RegisterProducerError::NotConnected);
        }
        if link.has_producer() {
            return Err(RegisterProducerError::AlreadyRegistered);
        }
        link.put_producer(producer, kind, false);
        match kind {
            ProducerKind::Push if is_full => link.pause_producer(),
            ProducerKind::Pull if self.buffer.is_empty() => link.set(Flags::RESUME_PRODUCER),
            ProducerKind::Push | ProducerKind::Pull => {}
        }
        Ok(())
    }

    /// Registers a producer again after a detach, paused or not as it was.
    pub(crate) fn restore_producer(
        &mut self,
        producer: ProducerRef,
        kind: ProducerKind,
        is_paused: bool,
    ) {
        self.link.put_producer(producer, kind, is_paused);
        if self.buffer.is_empty() && kind == ProducerKind::Pull {
            // No bytes are going to leave that would resume it.
            self.link.set(Flags::RESUME_PRODUCER);
        }
    }

    /// Called after a limit was changed. Pauses a push producer, or resumes it if
    /// nothing else would.
    pub(crate) fn limits_changed(&mut self) {
        if self.is_full() {
            self.link.pause_push_producer();
        } else if self.link.is_producer_paused() {
            self.resume_producer_if_drained();
        }
    }

    /// Called when bytes have left. Tells the producer and those who await bytes.
    #[inline(never)]
    fn bytes_left(&mut self) {
        self.link.note_sent();
        if self.link.has_producer() {
            self.resume_producer_if_drained();
        }
    }

    /// Resumes the producer if the buffer has drained far enough.
    fn resume_producer_if_drained(&mut self) {
        let is_full = self.is_full();
        self.link
            .resume_producer_if_drained(self.buffer.len(), is_full);
    }
}
