//! A protocol with a policy around it: the forwarding, written once.

use std::any::{Any, TypeId};
use std::borrow::Cow;
use std::fmt;
use std::io;
use std::os::fd::OwnedFd;

use bowline_reactor::Description;

use crate::context::Context;
use crate::descriptors::ReceivedDescriptors;
use crate::packet::{Packet, PacketProtocol, PacketTransport, UnsentPacket};
use crate::protocol::{AfterReadClosed, AfterTruncation, AtDrain, Protocol};
use crate::reason::{CloseReason, Remains};
use crate::transport::Transport;

/// Acts before and after the callbacks of a protocol, which knows nothing of it. A
/// [`ProtocolWrapper`] puts it there.
///
/// A policy for streams and packets alike is an
/// `impl<T: AnyConnection + ?Sized> Policy<T>`.
///
/// As a policy, `None` does nothing. A pair is one policy inside another: the first is
/// the outer one, so its [`before`](Self::before) comes first and its
/// [`after`](Self::after) last.
///
/// # Examples
///
/// Counts what a connection receives:
///
/// ```
/// use std::{cell::Cell, rc::Rc};
/// use bowline::policies::{Event, Policy};
/// use bowline::{AnyConnection, Context};
///
/// struct Meter(Rc<Cell<usize>>);
///
/// impl<T: AnyConnection + ?Sized> Policy<T> for Meter {
///     fn before(&mut self, _: &mut Context<'_, T>, event: &Event<'_>) {
///         self.0.set(self.0.get() + event.received_bytes());
///     }
/// }
/// ```
pub trait Policy<T: ?Sized>: 'static {
    /// The protocol is about to be told of `event`.
    fn before(&mut self, cx: &mut Context<'_, T>, event: &Event<'_>) {
        let _ = (cx, event);
    }

    /// The protocol has been told of `event`. Not called if it panicked. So a policy that
    /// has something to put in order does it before
    /// [`ConnectionLost`](Event::ConnectionLost), or when it is dropped.
    fn after(&mut self, cx: &mut Context<'_, T>, event: &Event<'_>) {
        let _ = (cx, event);
    }

    /// Adds what the policy says of itself to who looks into the reactor. By default that
    /// is a part without facts, called as its type is.
    fn describe(&self, description: &mut Description) {
        description.section_of::<Self>();
    }
}

/// A callback of a [`Protocol`] or a [`PacketProtocol`](crate::PacketProtocol), as a [`Policy`] sees it.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// [`Protocol::connection_made`].
    ConnectionMade,
    /// [`Protocol::data_received`], with the bytes.
    DataReceived(&'a [u8]),
    /// [`packet_received`](crate::PacketProtocol::packet_received).
    PacketReceived {
        /// How many descriptors came with it.
        descriptors: usize,
        /// Its bytes.
        data: &'a [u8],
    },
    /// [`send_failed`](crate::PacketProtocol::send_failed).
    SendFailed,
    /// [`sending_resumed`](crate::PacketProtocol::sending_resumed).
    SendingResumed,
    /// [`Protocol::file_descriptor_received`], if it is called by itself.
    FileDescriptorReceived,
    /// [`Protocol::descriptors_received`], with both the descriptors and the bytes of one
    /// read.
    DescriptorsReceived {
        /// How many descriptors.
        descriptors: usize,
        /// The bytes.
        data: &'a [u8],
    },
    /// [`Protocol::descriptors_truncated`].
    DescriptorsTruncated {
        /// How many descriptors did arrive.
        received: usize,
    },
    /// [`Protocol::descriptors_sent`].
    DescriptorsSent {
        /// How many descriptors have left.
        count: usize,
    },
    /// [`Protocol::read_connection_lost`].
    ReadConnectionLost,
    /// [`Protocol::write_connection_lost`].
    WriteConnectionLost,
    /// [`Protocol::connection_broken`], with what remains to be read.
    ConnectionBroken(Remains),
    /// [`Protocol::connection_lost`], with its reason.
    ConnectionLost(&'a CloseReason),
    /// [`Protocol::draining`].
    Draining,
    /// [`Protocol::reading_resumed`].
    ReadingResumed,
    /// [`Protocol::connection_reattached`].
    ConnectionReattached,
    /// [`Protocol::connection_secured`].
    ConnectionSecured,
    /// [`Protocol::pause_producing`].
    PauseProducing,
    /// [`Protocol::resume_producing`].
    ResumeProducing,
    /// [`Protocol::stop_producing`].
    StopProducing,
}

impl Event<'_> {
    /// How many bytes have arrived with this event.
    pub fn received_bytes(&self) -> usize {
        match self {
            Self::DataReceived(data)
            | Self::PacketReceived { data, .. }
            | Self::DescriptorsReceived { data, .. } => data.len(),
            _ => 0,
        }
    }
}

impl<T: ?Sized, Y: Policy<T>> Policy<T> for Option<Y> {
    #[inline]
    fn before(&mut self, cx: &mut Context<'_, T>, event: &Event<'_>) {
        if let Some(policy) = self {
            policy.before(cx, event);
        }
    }

    #[inline]
    fn after(&mut self, cx: &mut Context<'_, T>, event: &Event<'_>) {
        if let Some(policy) = self {
            policy.after(cx, event);
        }
    }

    fn describe(&self, description: &mut Description) {
        if let Some(policy) = self {
            policy.describe(description);
        }
    }
}

impl<T: ?Sized, A: Policy<T>, B: Policy<T>> Policy<T> for (A, B) {
    #[inline]
    fn before(&mut self, cx: &mut Context<'_, T>, event: &Event<'_>) {
        self.0.before(cx, event);
        self.1.before(cx, event);
    }

    #[inline]
    fn after(&mut self, cx: &mut Context<'_, T>, event: &Event<'_>) {
        self.1.after(cx, event);
        self.0.after(cx, event);
    }

    fn describe(&self, description: &mut Description) {
        self.0.describe(description);
        self.1.describe(description);
    }
}

/// A protocol with a [`Policy`] around it.
///
/// Every callback of the transport reaches the protocol unchanged, including descriptors,
/// truncation, half-closes and the calls of a producer. The protocol talks to its
/// transport directly, so none of its requests is lost on the way. Log lines name the
/// protocol, not the wrapper.
///
/// The layers of this module build wrappers. Make one yourself to put a policy on a
/// protocol that no factory builds, for an adopted socket for instance. `call_protocol`
/// and `detach` reach the inner protocol by its own type ([`Protocol::part`]).
pub struct ProtocolWrapper<P, Y> {
    protocol: P,
    policy: Y,
}

impl<P, Y> ProtocolWrapper<P, Y> {
    /// Puts `policy` around `protocol`.
    pub fn new(protocol: P, policy: Y) -> Self {
        Self { protocol, policy }
    }

    /// The protocol, mutably.
    pub fn protocol_mut(&mut self) -> &mut P {
        &mut self.protocol
    }

    /// The policy, mutably.
    pub fn policy_mut(&mut self) -> &mut Y {
        &mut self.policy
    }

    /// The protocol.
    pub fn protocol(&self) -> &P {
        &self.protocol
    }

    /// The policy.
    pub fn policy(&self) -> &Y {
        &self.policy
    }

    /// Takes the protocol out and drops the policy. For a connection that was detached.
    pub fn into_protocol(self) -> P {
        self.protocol
    }

    #[inline]
    fn around<T: ?Sized, R>(
        &mut self,
        cx: &mut Context<'_, T>,
        event: &Event<'_>,
        tell: impl FnOnce(&mut P, &mut Context<'_, T>) -> R,
    ) -> R
    where
        Y: Policy<T>,
    {
        self.policy.before(cx, event);
        let answer = tell(&mut self.protocol, cx);
        self.policy.after(cx, event);
        answer
    }
}

/// The callbacks that protocols of streams and of packets have in common.
macro_rules! forward_common_callbacks {
    () => {
        fn connection_made(&mut self, cx: &mut Context<'_, T>) {
            self.around(cx, &Event::ConnectionMade, |protocol, cx| {
                protocol.connection_made(cx);
            });
        }

        fn read_connection_lost(&mut self, cx: &mut Context<'_, T>) -> AfterReadClosed {
            self.around(cx, &Event::ReadConnectionLost, |protocol, cx| {
                protocol.read_connection_lost(cx)
            })
        }

        fn write_connection_lost(&mut self, cx: &mut Context<'_, T>) {
            self.around(cx, &Event::WriteConnectionLost, |protocol, cx| {
                protocol.write_connection_lost(cx);
            });
        }

        fn connection_lost(&mut self, cx: &mut Context<'_, T>, reason: &CloseReason) {
            self.around(cx, &Event::ConnectionLost(reason), |protocol, cx| {
                protocol.connection_lost(cx, reason);
            });
        }

        fn draining(&mut self, cx: &mut Context<'_, T>) -> AtDrain {
            self.around(cx, &Event::Draining, |protocol, cx| protocol.draining(cx))
        }

        fn is_idle(&self) -> bool {
            self.protocol.is_idle()
        }

        fn connection_reattached(&mut self, cx: &mut Context<'_, T>) {
            self.around(cx, &Event::ConnectionReattached, |protocol, cx| {
                protocol.connection_reattached(cx);
            });
        }

        fn part(&mut self, id: TypeId) -> Option<&mut dyn Any> {
            match id == TypeId::of::<Self>() {
                true => Some(self),
                false => self.protocol.part(id),
            }
        }

        fn into_part(self: Box<Self>, id: TypeId) -> Option<Box<dyn Any>> {
            match id == TypeId::of::<Self>() {
                true => Some(self),
                false => Box::new(self.protocol).into_part(id),
            }
        }

        fn describe(&self, description: &mut Description) {
            self.policy.describe(description);
            self.protocol.describe(description);
        }

        fn log_prefix(&self) -> Cow<'_, str> {
            self.protocol.log_prefix()
        }
    };
}

impl<T: Transport + ?Sized, P: Protocol<T>, Y: Policy<T>> Protocol<T> for ProtocolWrapper<P, Y> {
    forward_common_callbacks!();

    #[inline]
    fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
        self.around(cx, &Event::DataReceived(data), |protocol, cx| {
            protocol.data_received(cx, data);
        });
    }

    fn file_descriptor_received(
        &mut self,
        cx: &mut Context<'_, T>,
        fd: OwnedFd,
    ) -> Result<(), OwnedFd> {
        self.around(cx, &Event::FileDescriptorReceived, |protocol, cx| {
            protocol.file_descriptor_received(cx, fd)
        })
    }

    fn descriptors_received(
        &mut self,
        cx: &mut Context<'_, T>,
        descriptors: &mut ReceivedDescriptors<'_>,
        data: &[u8],
    ) {
        let event = Event::DescriptorsReceived {
            descriptors: descriptors.len(),
            data,
        };
        self.around(cx, &event, |protocol, cx| {
            protocol.descriptors_received(cx, descriptors, data);
        });
    }

    fn descriptors_truncated(
        &mut self,
        cx: &mut Context<'_, T>,
        received: usize,
    ) -> AfterTruncation {
        let event = Event::DescriptorsTruncated { received };
        self.around(cx, &event, |protocol, cx| {
            protocol.descriptors_truncated(cx, received)
        })
    }

    fn descriptors_sent(&mut self, cx: &mut Context<'_, T>, count: usize) {
        self.around(cx, &Event::DescriptorsSent { count }, |protocol, cx| {
            protocol.descriptors_sent(cx, count);
        });
    }

    fn connection_broken(&mut self, cx: &mut Context<'_, T>, remains: Remains) {
        self.around(cx, &Event::ConnectionBroken(remains), |protocol, cx| {
            protocol.connection_broken(cx, remains);
        });
    }

    fn reading_resumed(&mut self, cx: &mut Context<'_, T>) {
        self.around(cx, &Event::ReadingResumed, |protocol, cx| {
            protocol.reading_resumed(cx);
        });
    }

    fn has_undelivered(&mut self) -> bool {
        self.protocol.has_undelivered()
    }

    fn connection_secured(&mut self, cx: &mut Context<'_, T>) {
        self.around(cx, &Event::ConnectionSecured, |protocol, cx| {
            protocol.connection_secured(cx);
        });
    }

    fn pause_producing(&mut self, cx: &mut Context<'_, T>) {
        self.around(cx, &Event::PauseProducing, |protocol, cx| {
            protocol.pause_producing(cx);
        });
    }

    fn resume_producing(&mut self, cx: &mut Context<'_, T>) {
        self.around(cx, &Event::ResumeProducing, |protocol, cx| {
            protocol.resume_producing(cx);
        });
    }

    fn stop_producing(&mut self, cx: &mut Context<'_, T>) {
        self.around(cx, &Event::StopProducing, |protocol, cx| {
            protocol.stop_producing(cx);
        });
    }
}

impl<T, P, Y> PacketProtocol<T> for ProtocolWrapper<P, Y>
where
    T: PacketTransport + ?Sized,
    P: PacketProtocol<T>,
    Y: Policy<T>,
{
    forward_common_callbacks!();

    fn packet_received(&mut self, cx: &mut Context<'_, T>, packet: &mut Packet<'_>) {
        let event = Event::PacketReceived {
            descriptors: packet.descriptors.len(),
            data: packet.data,
        };
        self.around(cx, &event, |protocol, cx| {
            protocol.packet_received(cx, packet);
        });
    }

    fn send_failed(
        &mut self,
        cx: &mut Context<'_, T>,
        packet: UnsentPacket<'_>,
        error: &io::Error,
    ) {
        self.around(cx, &Event::SendFailed, |protocol, cx| {
            protocol.send_failed(cx, packet, error);
        });
    }

    fn sending_resumed(&mut self, cx: &mut Context<'_, T>) {
        self.around(cx, &Event::SendingResumed, |protocol, cx| {
            protocol.sending_resumed(cx);
        });
    }

    fn connection_broken(&mut self, cx: &mut Context<'_, T>) {
        let event = Event::ConnectionBroken(Remains::Everything);
        self.around(cx, &event, |protocol, cx| protocol.connection_broken(cx));
    }
}

impl<P, Y: fmt::Debug> fmt::Debug for ProtocolWrapper<P, Y> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ProtocolWrapper")
            .field("policy", &self.policy)
            .finish_non_exhaustive()
    }
}
