//! Sources of bytes that can be paused.

use std::fmt;

use crate::context::Context;
use crate::transport::{Transport, TransportHandle};

/// A source of bytes for a transport, told by it when to go on and when to
/// wait.
///
/// `cx.transport` is the transport it is registered with, the consumer. All
/// three are called by the consumer's connection, never from inside another
/// callback. (Twisted: `IPushProducer`, `IPullProducer`.)
pub trait Producer: 'static {
    /// Go on. For a push producer: the buffer has drained to the low watermark
    /// after a [`pause_producing`](Self::pause_producing); called once for
    /// each of those. For a pull producer: write one portion now; called when
    /// registered and each time everything was sent. One that had nothing to
    /// write is asked again after some milliseconds.
    fn resume_producing(&mut self, cx: &mut Context<'_, dyn Transport>);

    /// Wait: the buffer is above the high watermark. Never called for a pull
    /// producer.
    fn pause_producing(&mut self, cx: &mut Context<'_, dyn Transport>) {
        let _ = cx;
    }

    /// The consumer is gone; nothing more will be asked. Called once at the
    /// most, and not after `unregister_producer`.
    fn stop_producing(&mut self, cx: &mut Context<'_, dyn Transport>) {
        let _ = cx;
    }
}

/// How a producer works.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProducerKind {
    /// Writes by itself until it is paused. (Twisted: streaming.)
    Push,
    /// Writes one portion each time it is asked.
    Pull,
}

/// Who produces for a transport.
pub enum ProducerRef {
    /// The protocol of the same connection: its
    /// [`pause_producing`](crate::Protocol::pause_producing),
    /// [`resume_producing`](crate::Protocol::resume_producing) and
    /// [`stop_producing`](crate::Protocol::stop_producing) are called.
    Protocol,
    /// A transport, whose reading is paused and resumed: what a proxy registers
    /// its peer as. It is asked to
    /// [close](Transport::lose_connection) when the consumer is lost. May be the
    /// consumer itself, so that a connection reads no faster than it writes.
    Transport(TransportHandle),
    /// Any other object.
    Boxed(Box<dyn Producer>),
}

impl ProducerRef {
    /// A boxed producer.
    pub fn boxed(producer: impl Producer) -> Self {
        Self::Boxed(Box::new(producer))
    }
}

impl From<TransportHandle> for ProducerRef {
    fn from(handle: TransportHandle) -> Self {
        Self::Transport(handle)
    }
}

impl fmt::Debug for ProducerRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Protocol => f.write_str("Protocol"),
            Self::Transport(handle) => f.debug_tuple("Transport").field(handle).finish(),
            Self::Boxed(_) => f.write_str("Boxed"),
        }
    }
}
