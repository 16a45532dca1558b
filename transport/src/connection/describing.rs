//! What a connection says of itself.

use bowline_protocol::Protocol;
use bowline_reactor::{Description, Section};

use super::Connection;
use crate::file_descriptor::FileDescriptor;
use crate::link::{Flags, Link, State};
use crate::stream::StreamTransport;

impl<T: StreamTransport, P: Protocol<T>> Connection<T, P> {
    pub(super) fn tell_all(&self, description: &mut Description) {
        let stream = self.transport.stream();
        let (link, socket) = (&stream.link, stream.layer.socket());
        let section = description.section(socket.kind());
        section
            .set("role", "connection")
            .set("protocol", self.protocol_name().into_owned())
            .set("state", state(link))
            .set("local", socket.host().to_string())
            .set("peer", socket.peer().to_string())
            .set("sent_bytes", link.sent)
            .set("buffered_bytes", stream.buffer.len());
        #[cfg(feature = "inspect")]
        {
            section.set("received_bytes", link.received_bytes());
            link.shared.kinds.tell_origin(link.token, section);
        }
        tell_reading(link, section);
        tell_rare(link, stream.layer.queued_descriptors(), section);
        tell_layers(&stream.layer, link, description);
        if let Some(protocol) = &self.protocol {
            protocol.describe(description);
        }
    }
}

fn state(link: &Link) -> &'static str {
    match link.state() {
        _ if !link.is_established() => "handshake",
        _ if link.is_broken() => "broken",
        State::Open if link.has(Flags::READ_ENDED) => "peer closed",
        State::Open => "open",
        State::WriteClosing | State::WriteClosed => "half closed",
        State::Closing => "closing",
        State::Lingering => "lingering",
        State::Ending | State::Lost => "ending",
    }
}

fn tell_reading(link: &Link, section: &mut Section) {
    let reading = if link.has(Flags::READ_ENDED) || !link.is_open_for_reading() {
        "ended"
    } else if link.has(Flags::PAUSED) {
        "paused"
    } else if link.has(Flags::HELD) {
        // By a policy, or by what waits for something.
        "held"
    } else {
        "on"
    };
    section.set("reading", reading);
    if link.has(Flags::WAITS_FOR_TIMER) {
        section.set("sending", "refused for now");
    }
}

fn tell_rare(link: &Link, queued: usize, section: &mut Section) {
    if queued > 0 {
        section.set("queued_descriptors", queued);
    }
    if link.has(Flags::SHARED) {
        section.set("shared", true);
    }
    let Some(cold) = link.cold_ref() else { return };
    if let Some(registration) = &cold.registration {
        let producer = match (registration.kind, registration.is_paused) {
            (bowline_protocol::ProducerKind::Push, false) => "push",
            (bowline_protocol::ProducerKind::Push, true) => "push, paused",
            (bowline_protocol::ProducerKind::Pull, _) => "pull",
        };
        section.set("producer", producer);
    }
    if cold.received > 0 {
        section.set("received_descriptors", cold.received);
    }
    if cold.unclaimed > 0 {
        section.set("unclaimed_descriptors", cold.unclaimed);
    }
    if cold.was_told_to_drain {
        section.set("draining", true);
    }
}

/// The outermost first. The socket adds to what stands there already: it is last.
fn tell_layers(layer: &dyn FileDescriptor, link: &Link, description: &mut Description) {
    if let Some(below) = layer.below() {
        layer.describe(link, description);
        tell_layers(below, link, description);
    }
}
