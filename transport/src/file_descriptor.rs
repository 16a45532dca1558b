//! The base trait of transports, with its template methods, and the state they
//! share.
//!
//! [`FileDescriptor`] provides buffering, producers, closing and half-closing.
//! What differs between kinds of transport are a few overridable methods, so a
//! layer such as [`SendmsgMixin`](crate::SendmsgMixin) changes those and
//! delegates the rest. (Twisted: `abstract.FileDescriptor`.)
//!
//! Nothing here calls user code. What user code has to be told is recorded in
//! [`Core::flags`] and delivered by the connection when no callback runs.

mod state;

use std::any::Any;
use std::io::{self, IoSlice};

use bowline_protocol::{
    CloseReason, ProducerKind, ProducerRef, RegisterProducerError, WriteStatus,
};

use crate::descriptor_queue::UnsentDescriptors;
use crate::shared::ReadBuffers;
use crate::socket::Socket;
use crate::socket::private::{Sealed, Taken};

pub use self::state::Core;
pub(crate) use self::state::{Kept, Registration, State, flag, pending};

/// From how many bytes on a write on an empty buffer goes straight to the
/// kernel: there the copy saved is worth more than the system call that a
/// second write in the same turn would cost.
const MIN_DIRECT_BYTES: usize = 8_192;

/// A stream transport: something with an outgoing buffer, a producer that
/// fills it, and a socket underneath.
///
/// The *overridable* methods say how bytes move and when the buffer is full;
/// the *template* methods are written in terms of them and are not meant to be
/// overridden. Implement it for a layer by delegating what the layer leaves
/// alone to the transport below.
pub trait FileDescriptor: Sized + 'static {
    /// The socket at the bottom.
    type Socket: Socket;

    /// The state shared by all layers.
    fn core(&self) -> &Core<Self::Socket>;

    /// The state shared by all layers.
    fn core_mut(&mut self) -> &mut Core<Self::Socket>;

    // Overridable.

    /// Offers bytes to the kernel, the first of which is the first that is
    /// unsent, and answers how many it took. (Twisted: `writeSomeData`.)
    ///
    /// # Errors
    ///
    /// The kernel's. `WouldBlock` waits for the socket, `ENOBUFS` and
    /// `ETOOMANYREFS` for a timer, anything else ends the connection.
    fn write_some_data(&self, data: &[u8]) -> io::Result<Sent>;

    /// Offers several pieces at once, at least one. The default offers the
    /// first.
    ///
    /// # Errors
    ///
    /// As [`write_some_data`](Self::write_some_data).
    fn write_some_pieces(&self, pieces: &[IoSlice<'_>]) -> io::Result<Sent> {
        self.write_some_data(&pieces[0])
    }

    /// Takes note of what [`write_some_data`](Self::write_some_data) reported.
    fn data_sent(&mut self, sent: Sent) {
        let _ = sent;
    }

    /// Why the connection ends now that [`write_some_data`](Self::write_some_data) has
    /// failed for good.
    fn reason_of(&mut self, error: io::Error) -> CloseReason {
        CloseReason::Lost(error)
    }

    /// Reads once into `buffers`. (Twisted: `doRead`.)
    ///
    /// # Errors
    ///
    /// The kernel's. Anything but `WouldBlock` ends the connection.
    fn do_read(&mut self, buffers: &mut ReadBuffers) -> io::Result<Received>;

    /// Whether a producer should wait. (Twisted: `_isSendBufferFull`.)
    fn is_send_buffer_full(&self) -> bool {
        let core = self.core();
        core.buffer.len() > core.high_watermark
    }

    /// How many things beside bytes are queued, such as descriptors.
    fn queued_descriptors(&self) -> usize {
        0
    }

    /// Closes what is queued beside bytes, and answers how many there were.
    fn discard_descriptors(&mut self) -> usize {
        0
    }

    /// Makes sure that the coming close waits for nothing that the peer sent and
    /// nobody read.
    fn disarm_unread(&mut self) {}

    /// As [`disarm_unread`](Self::disarm_unread), of a socket that others may hold
    /// too, and what is unread with it.
    fn leave_unread(&mut self) {}

    /// How many descriptors the peer may send.
    fn received_limits(&self) -> ReceivedLimits {
        ReceivedLimits::NONE
    }

    /// Takes what is queued beside bytes.
    fn take_unsent_descriptors(&mut self) -> Vec<UnsentDescriptors> {
        Vec::new()
    }

    /// Queues what was taken so elsewhere, for the bytes that are unsent now.
    /// Layers that cannot pass any close them.
    fn restore_unsent_descriptors(&mut self, descriptors: Vec<UnsentDescriptors>) {
        drop(descriptors);
    }

    /// What this layer was set to, for a connection that is taken apart and may
    /// come back.
    fn take_settings(&mut self) -> Option<Box<dyn Any>> {
        None
    }

    /// Sets it again.
    fn restore_settings(&mut self, settings: Box<dyn Any>) {
        drop(settings);
    }

    // Template.

    /// Queues bytes; see [`Transport::write`](bowline_protocol::Transport::write).
    #[inline(always)]
    fn write(&mut self, data: &[u8]) -> WriteStatus {
        if self.core_mut().append(data) {
            return self.bytes_queued();
        }
        self.write_with_care(data)
    }

    /// What [`write`](Self::write) does with bytes that do not simply fit into
    /// the memory at hand.
    #[inline(never)]
    fn write_with_care(&mut self, data: &[u8]) -> WriteStatus {
        if !self.core().takes_bytes(data.len()) {
            return WriteStatus::Refused;
        }
        self.core().note_written(data);
        if data.len() < MIN_DIRECT_BYTES {
            self.core_mut().buffer_bytes(data);
        } else {
            let taken = self.write_directly(data);
            if !self.core().takes_bytes(data.len() - taken) {
                // That send found out that the connection is broken.
                return WriteStatus::Refused;
            }
            self.core_mut().buffer_bytes(&data[taken..]);
        }
        self.bytes_queued()
    }

    /// Queues the concatenation of `parts`.
    fn write_sequence(&mut self, parts: &[&[u8]]) -> WriteStatus {
        let length = parts.iter().map(|part| part.len()).sum();
        if !self.core().takes_bytes(length) {
            return WriteStatus::Refused;
        }
        let core = self.core_mut();
        for part in parts {
            core.note_written(part);
            core.buffer_bytes(part);
        }
        self.bytes_queued()
    }

    /// Queues bytes that are given away.
    fn write_owned(&mut self, data: Vec<u8>) -> WriteStatus {
        if !self.core().takes_bytes(data.len()) {
            return WriteStatus::Refused;
        }
        self.core().note_written(&data);
        self.core_mut().buffer.push_owned(data);
        self.bytes_queued()
    }

    /// Sends as much as one system call takes, and takes note of what follows
    /// when the buffer has drained. (Twisted: `doWrite`.)
    #[inline(always)]
    fn do_write(&mut self) {
        let (front, is_all) = self.core().buffer.front();
        let result = if is_all {
            self.write_some_data(front)
        } else {
            self.write_many_pieces()
        };
        match result {
            Ok(sent) => {
                let core = self.core_mut();
                core.sent += sent.bytes as u64;
                if let Some(storage) = core.buffer.consume(sent.bytes) {
                    core.shared.return_storage(storage);
                }
                if sent.descriptors > 0 {
                    self.data_sent(sent);
                }
                if self.core().has_producer() {
                    self.resume_producer_if_drained();
                }
            }
            Err(error) => self.write_failed(error),
        }
    }

    /// Takes note of a send that failed.
    #[cold]
    #[inline(never)]
    fn write_failed(&mut self, error: io::Error) {
        if let Some(error) = self.core_mut().lasting_error(error) {
            let remains = self.core().socket.remains(&error);
            let reason = self.reason_of(error);
            self.core_mut().break_off(reason, remains);
        }
    }

    /// Offers as many pieces as one system call takes.
    #[inline(never)]
    fn write_many_pieces(&self) -> io::Result<Sent> {
        let (slices, count) = self.core().buffer.slices();
        self.write_some_pieces(&slices[..count])
    }

    /// Registers a producer; see
    /// [`Transport::register_producer`](bowline_protocol::Transport::register_producer).
    fn register_producer(
        &mut self,
        producer: ProducerRef,
        kind: ProducerKind,
    ) -> Result<(), RegisterProducerError> {
        let is_full = self.is_send_buffer_full();
        let is_drained = self.core().buffer.is_empty();
        let core = self.core_mut();
        if core.is_ended() {
            core.cold().rejected.push(producer);
            core.flags |= pending::STOP_REJECTED;
            return Err(RegisterProducerError::NotConnected);
        }
        if core.has_producer() {
            return Err(RegisterProducerError::AlreadyRegistered);
        }
        let serial = core.cold().next_serial;
        core.cold().next_serial += 1;
        core.cold().registration = Some(Registration {
            producer: Some(producer),
            kind,
            is_paused: false,
            serial,
        });
        core.flags |= flag::HAS_PRODUCER;
        match kind {
            ProducerKind::Push if is_full => core.pause_producer(),
            ProducerKind::Pull if is_drained => {
                core.flags |= pending::RESUME_PRODUCER;
            }
            ProducerKind::Push | ProducerKind::Pull => {}
        }
        Ok(())
    }

    /// What follows after bytes or descriptors were queued: a push producer is
    /// paused when that made the buffer full.
    #[inline(always)]
    fn bytes_queued(&mut self) -> WriteStatus {
        if !self.is_send_buffer_full() {
            return WriteStatus::Ready;
        }
        self.core_mut().pause_push_producer();
        WriteStatus::Full
    }

    /// What follows after a limit was changed: a push producer is paused, or
    /// resumed if nothing else would ever say that it may go on.
    fn limits_changed(&mut self) {
        let is_full = self.is_send_buffer_full();
        let core = self.core_mut();
        if is_full {
            core.pause_push_producer();
        } else if core.is_producer_paused() {
            core.resume_producer_if_drained(is_full);
        }
    }

    /// Resumes the producer if the buffer has drained far enough.
    #[inline(never)]
    fn resume_producer_if_drained(&mut self) {
        let is_full = self.is_send_buffer_full();
        self.core_mut().resume_producer_if_drained(is_full);
    }

    /// Tries to send a long write from where it is; answers how much went.
    fn write_directly(&mut self, data: &[u8]) -> usize {
        let core = self.core();
        if !core.buffer.is_empty() || !core.may_write() || self.queued_descriptors() > 0 {
            return 0;
        }
        match self.write_some_data(data) {
            Ok(sent) => {
                self.core_mut().sent += sent.bytes as u64;
                sent.bytes
            }
            Err(error) => {
                self.write_failed(error);
                0
            }
        }
    }
}

/// What one call took.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sent {
    /// How many bytes.
    pub bytes: usize,
    /// How many descriptors, all of those that the call offered.
    pub descriptors: usize,
}

/// What one read brought; the bytes and descriptors are in the buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Received {
    /// How many bytes; zero is the end of the stream.
    pub bytes: usize,
    /// Whether the read may have ended for another reason than that nothing was
    /// left.
    pub had_ancillary: bool,
    /// Whether descriptors were lost (`MSG_CTRUNC`).
    pub is_truncated: bool,
}

impl From<Taken> for Received {
    fn from(taken: Taken) -> Self {
        Self {
            bytes: taken.bytes,
            had_ancillary: taken.had_ancillary,
            is_truncated: taken.is_truncated,
        }
    }
}

/// How many descriptors a peer may send.
#[allow(unnameable_types, reason = "named only by a sealed trait")]
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
