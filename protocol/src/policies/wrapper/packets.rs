//! The forwarding of the callbacks of packets.

use std::any::{Any, TypeId};
use std::borrow::Cow;
use std::io;

use bowline_reactor::Description;

use super::{Event, Policy, ProtocolWrapper};
use crate::context::Context;
use crate::packet::{Packet, PacketProtocol, PacketTransport, UnsentPacket};
use crate::protocol::{AfterReadClosed, AtDrain};
use crate::reason::{CloseReason, Remains};

impl<T, P, Y> PacketProtocol<T> for ProtocolWrapper<P, Y>
where
    T: PacketTransport + ?Sized,
    P: PacketProtocol<T>,
    Y: Policy<T>,
{
    fn connection_made(&mut self, cx: &mut Context<'_, T>) {
        self.around(cx, &Event::ConnectionMade, |protocol, cx| {
            protocol.connection_made(cx);
        });
    }

    fn packet_received(&mut self, cx: &mut Context<'_, T>, packet: &mut Packet<'_>) {
        let event = Event::PacketReceived(packet.data);
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

    fn connection_broken(&mut self, cx: &mut Context<'_, T>) {
        let event = Event::ConnectionBroken(Remains::Everything);
        self.around(cx, &event, |protocol, cx| protocol.connection_broken(cx));
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
}
