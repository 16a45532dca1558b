//! Sources of bytes that can be paused.

use std::fmt;

use crate::context::Context;
use crate::transport::{Transport, TransportHandle};

/// A source of bytes for a transport. The transport tells it when to go on and when to
/// wait.
///
/// In the three methods, `cx.transport` is the transport that the producer is
/// registered with, the consumer. The consumer's connection calls them, never from
/// inside another callback. (Twisted: `IPushProducer`, `IPullProducer`.)
pub trait Producer: 'static {
    /// Go on.
    ///
    /// For a push producer: the buffer has drained to the low watermark. Called once
    /// after each [`pause_producing`](Self::pause_producing).
    ///
    /// For a pull producer: write one portion now. Called when it is registered, and
    /// each time everything was sent. If it has nothing to write, it is asked again
    /// after some milliseconds.
    fn resume_producing(&mut self, cx: &mut Context<'_, dyn Transport>);

    /// Wait: the buffer is above the high watermark. Never called for a pull
    /// producer.
    fn pause_producing(&mut self, cx: &mut Context<'_, dyn Transport>) {
        let _ = cx;
    }

    /// The consumer is gone. Nothing more is called after this. Called once at the
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

/// The producer of a transport.
pub enum ProducerRef {
    /// The protocol of the same connection. Its
    /// [`pause_producing`](crate::Protocol::pause_producing),
    /// [`resume_producing`](crate::Protocol::resume_producing) and
    /// [`stop_producing`](crate::Protocol::stop_producing) are called.
    Protocol,
    /// Another transport: its reading is paused and resumed. A proxy registers its peer
    /// in this way. When the consumer is lost, the transport is asked to
    /// [close](crate::AnyConnection::lose_connection). It may be the consumer itself, so that a
    /// connection reads no faster than it writes.
    Transport(TransportHandle),
    /// Any other object.
    Boxed(Box<dyn Producer>),
}

impl ProducerRef {
    /// Boxes a producer.
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
