//! What a connection receives and is written, in the log.

use std::fmt;
use std::rc::Rc;

use super::wrapper::{Event, Policy, ProtocolWrapper};
use bowline_reactor::Description;

use crate::address::Address;
use crate::connection::{AnyConnection, WriteObserver};
use crate::context::Context;
use crate::factory::{BuildContext, Factory};
use crate::log;

/// How much of what was received or written a line shows by default: a line on
/// a screen.
const SHOWN_BYTES: usize = 64;

/// Logs everything that its connections receive and write. It is a layer around a factory,
/// for finding out what two programs say to each other.
///
/// Connections are numbered from 1. Each event is a line at level `debug` under the
/// target `bowline::traffic`:
///
/// ```text
/// 1: made with 192.0.2.1:50342
/// 1: received 12 bytes "hello, world"
/// 1: written 12 bytes "hello, world"
/// 1: lost: closed cleanly
/// ```
///
/// Bytes that others write through the transport's handle are logged too; refused writes
/// are not. Nothing else in bowline logs the content of connections, since it may be
/// secret. [`shown_bytes(0)`](Self::shown_bytes) shows none of it here either. (Twisted:
/// `policies.TrafficLoggingFactory`.)
///
/// # Examples
///
/// ```
/// use bowline::policies::TrafficLog;
/// use bowline::{Address, Context, Protocol, Transport};
///
/// struct Echo;
///
/// impl<T: Transport> Protocol<T> for Echo {
///     fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
///         cx.transport.write(data);
///     }
/// }
///
/// let factory = TrafficLog::new(|_: &Address| Echo).shown_bytes(16);
/// // reactor.listen_tcp(address, factory)?;
/// # let _ = factory;
/// ```
pub struct TrafficLog<F> {
    factory: F,
    shown_bytes: usize,
    connections: u64,
}

impl<F> TrafficLog<F> {
    /// Shows the first 64 bytes of everything.
    pub fn new(factory: F) -> Self {
        Self {
            factory,
            shown_bytes: SHOWN_BYTES,
            connections: 0,
        }
    }

    /// Sets how many bytes of one read or write a line shows; default 64.
    #[must_use]
    pub fn shown_bytes(mut self, bytes: usize) -> Self {
        self.shown_bytes = bytes;
        self
    }
}

impl<F: Factory> Factory for TrafficLog<F> {
    type Protocol = ProtocolWrapper<F::Protocol, Traffic>;

    fn build_protocol(
        &mut self,
        cx: &mut BuildContext<'_>,
        peer: &Address,
    ) -> Option<Self::Protocol> {
        let protocol = self.factory.build_protocol(cx, peer)?;
        self.connections += 1;
        let traffic = Traffic::new(self.connections).shown_bytes(self.shown_bytes);
        Some(ProtocolWrapper::new(protocol, traffic))
    }

    fn describe(&self, description: &mut Description) {
        description
            .section_of::<Self>()
            .set("connections", self.connections)
            .set("shown_bytes", self.shown_bytes);
        self.factory.describe(description);
    }

    forward_factory_events!();
}

/// The policy of [`TrafficLog`], for one connection.
#[derive(Debug)]
pub struct Traffic {
    number: u64,
    shown_bytes: usize,
}

impl Traffic {
    /// Logs a connection under this number.
    pub fn new(number: u64) -> Self {
        Self {
            number,
            shown_bytes: SHOWN_BYTES,
        }
    }

    /// As [`TrafficLog::shown_bytes`].
    #[must_use]
    pub fn shown_bytes(mut self, bytes: usize) -> Self {
        self.shown_bytes = bytes;
        self
    }
}

impl<T: AnyConnection + ?Sized> Policy<T> for Traffic {
    fn describe(&self, description: &mut Description) {
        description.section_of::<Self>().set("number", self.number);
    }

    fn before(&mut self, cx: &mut Context<'_, T>, event: &Event<'_>) {
        let (number, shown) = (self.number, self.shown_bytes);
        match event {
            Event::ConnectionMade => {
                let written = Written { number, shown };
                cx.transport.set_write_observer(Some(Rc::new(written)));
                log::debug!(target: log::TRAFFIC, "{number}: made with {}", cx.transport.peer());
            }
            Event::SendingResumed
            | Event::ReadingResumed
            | Event::ConnectionReattached
            | Event::ConnectionSecured
            | Event::PauseProducing
            | Event::ResumeProducing
            | Event::StopProducing => {}
            event => log::debug!(target: log::TRAFFIC, "{number}: {}", Line { event, shown }),
        }
    }
}

/// An event as its line says it.
struct Line<'a> {
    event: &'a Event<'a>,
    shown: usize,
}

impl fmt::Display for Line<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = self.shown;
        match self.event {
            Event::DataReceived(data) => write!(f, "received {}", Cut { data, shown }),
            Event::FileDescriptorReceived => f.write_str("received a descriptor"),
            Event::PacketReceived {
                descriptors: 0,
                data,
            } => write!(f, "received a packet of {}", Cut { data, shown }),
            Event::PacketReceived { descriptors, data } => {
                let packet = Cut { data, shown };
                write!(
                    f,
                    "received {descriptors} descriptors with a packet of {packet}"
                )
            }
            Event::DescriptorsReceived { descriptors, data } => {
                let bytes = Cut { data, shown };
                write!(f, "received {descriptors} descriptors and {bytes}")
            }
            Event::DescriptorsTruncated { received } => {
                write!(f, "received {received} descriptors and lost others")
            }
            Event::DescriptorsSent { count } => write!(f, "sent {count} descriptors"),
            Event::SendFailed => f.write_str("a packet was not sent"),
            Event::ReadConnectionLost => f.write_str("the peer writes no more"),
            Event::WriteConnectionLost => f.write_str("nothing more is written"),
            Event::ConnectionBroken(_) => f.write_str("broken, with something unread"),
            Event::ConnectionLost(reason) => write!(f, "lost: {reason}"),
            Event::Draining => f.write_str("drains"),
            // Those have no line.
            other => write!(f, "{other:?}"),
        }
    }
}

/// Logs what is written.
#[derive(Debug)]
struct Written {
    number: u64,
    shown: usize,
}

impl WriteObserver for Written {
    fn written(&self, data: &[u8]) {
        let shown = self.shown;
        log::debug!(target: log::TRAFFIC, "{}: written {}", self.number, Cut { data, shown });
    }
}

/// Bytes as a line shows them.
struct Cut<'a> {
    data: &'a [u8],
    shown: usize,
}

impl fmt::Display for Cut<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.data.len())?;
        let shown = &self.data[..self.data.len().min(self.shown)];
        if !shown.is_empty() {
            write!(f, " \"{}\"", shown.escape_ascii())?;
        }
        if shown.len() < self.data.len() && self.shown > 0 {
            f.write_str("...")?;
        }
        Ok(())
    }
}

impl<F> fmt::Debug for TrafficLog<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TrafficLog")
            .field("shown_bytes", &self.shown_bytes)
            .field("connections", &self.connections)
            .finish_non_exhaustive()
    }
}
