//! Ports with a connection of packets. This is how such a connection ends, in both
//! directions, and how it is taken apart and put together again.

use std::any::{Any, TypeId};
use std::borrow::Cow;
use std::io;
use std::mem;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;

use bowline_protocol::{
    Address, AfterReadClosed, AnyConnection, AtDrain, CloseReason, ConnectionHandle, Context,
    Credentials, DatagramCounts, DatagramTransport, Linger, Packet, PacketHandle, PacketProtocol,
    PacketTransport, PassedDescriptor, QueueLimits, ReceivedDescriptors, SendDescriptorError,
    SendStatus, TransportState, UnixAddress, UnsentPacket, WriteObserver,
};
use bowline_reactor::{Description, Handle, Next, Reactor, Token};

use super::port::{KeptPort, Port, PortState, ReadEnd, WriteEnd, status};
use super::queue::TakenOut;
use super::served::{self, Arrived, Message, Served};
use super::serving::{Serving, Stage, Visit, install_packets};
use super::socket::{DatagramSocket, PacketSocket};
use crate::descriptor_queue::UnsentDescriptors;
use crate::detach::{DetachRequest, Detached, ReattachError, Unsent};
use crate::endpoint::Carried;
use crate::error::{AdoptErrorKind, DetachError};
use crate::establish::SocketTransport;
use crate::file_descriptor::not_connected;
use crate::log;
use crate::sys::MAX_DESCRIPTORS;

/// How many bytes give the length of an unsent packet.
const LENGTH_BYTES: usize = size_of::<u32>();

/// A protocol of packets. It is `None` once the connection was taken apart. Nothing is
/// called then.
pub(super) struct Packets<P>(pub(super) Option<P>);

impl<S, P> Served<S> for Packets<P>
where
    S: PacketSocket,
    P: PacketProtocol<Port<S>>,
{
    type Message<'a> = Packet<'a>;

    const IS_CONNECTION: bool = true;

    #[inline]
    fn message(arrived: Arrived<'_>) -> Packet<'_> {
        let mut packet = Packet::new(arrived.data, arrived.descriptors);
        packet.length = arrived.length;
        packet.lost_descriptors = arrived.lost;
        packet.credentials = arrived.credentials;
        packet.pidfd = arrived.pidfd;
        packet
    }

    fn began(&mut self, cx: &mut Context<'_, Port<S>>) {
        if let Some(protocol) = &mut self.0 {
            protocol.connection_made(cx);
        }
    }

    #[inline]
    fn received(&mut self, cx: &mut Context<'_, Port<S>>, packet: &mut Packet<'_>) {
        if let Some(protocol) = &mut self.0 {
            protocol.packet_received(cx, packet);
        }
    }

    fn refused(&mut self, _: &mut Context<'_, Port<S>>, _: &io::Error) {}

    fn failed(
        &mut self,
        cx: &mut Context<'_, Port<S>>,
        unsent: served::Unsent<'_>,
        error: &io::Error,
    ) {
        let unsent = UnsentPacket::new(unsent.data, unsent.descriptors);
        if let Some(protocol) = &mut self.0 {
            protocol.send_failed(cx, unsent, error);
        }
    }

    fn resumed(&mut self, cx: &mut Context<'_, Port<S>>) {
        if let Some(protocol) = &mut self.0 {
            protocol.sending_resumed(cx);
        }
    }

    fn draining(&mut self, cx: &mut Context<'_, Port<S>>) -> AtDrain {
        let protocol = self.0.as_mut();
        protocol.map_or(AtDrain::DoNotWait, |protocol| protocol.draining(cx))
    }

    fn is_idle(&self) -> bool {
        self.0
            .as_ref()
            .is_none_or(PacketProtocol::<Port<S>>::is_idle)
    }

    fn ended(&mut self, cx: &mut Context<'_, Port<S>>, reason: &CloseReason) {
        if let Some(protocol) = &mut self.0 {
            protocol.connection_lost(cx, reason);
        }
    }

    fn part(&mut self, id: TypeId) -> Option<&mut dyn Any> {
        self.0.as_mut()?.part(id)
    }

    fn take_part(&mut self, id: TypeId) -> Option<Box<dyn Any>> {
        Box::new(self.0.take()?).into_part(id)
    }

    fn describe(&self, description: &mut Description) {
        if let Some(protocol) = &self.0 {
            protocol.describe(description);
        }
    }

    fn log_prefix(&self) -> Cow<'_, str> {
        let protocol = self.0.as_ref();
        protocol.map_or(Cow::Borrowed("-"), PacketProtocol::<Port<S>>::log_prefix)
    }

    fn is_support(port: &Port<S>) -> bool {
        port.ends.connector.is_some()
    }

    fn connection(socket: &mut S) -> Option<&mut dyn PacketSocket> {
        Some(socket)
    }

    fn reattached(&mut self, cx: &mut Context<'_, Port<S>>) {
        if let Some(protocol) = &mut self.0 {
            protocol.connection_reattached(cx);
        }
    }

    fn read_closed(&mut self, cx: &mut Context<'_, Port<S>>) -> AfterReadClosed {
        let protocol = self.0.as_mut();
        protocol.map_or(AfterReadClosed::EndConnection, |it| {
            it.read_connection_lost(cx)
        })
    }

    fn write_closed(&mut self, cx: &mut Context<'_, Port<S>>) {
        if let Some(protocol) = &mut self.0 {
            protocol.write_connection_lost(cx);
        }
    }

    fn broken(&mut self, cx: &mut Context<'_, Port<S>>) {
        if let Some(protocol) = &mut self.0 {
            protocol.connection_broken(cx);
        }
    }
}

impl Message for Packet<'_> {
    fn descriptors(&mut self) -> &mut dyn ExactSizeIterator<Item = OwnedFd> {
        let descriptors: &mut ReceivedDescriptors<'_> = &mut self.descriptors;
        descriptors
    }
}

/// The next step of ending a connection.
#[derive(Clone, Copy)]
enum EndStep {
    /// Nobody waits for anything more in either direction.
    Finish,
    /// A paused protocol is told that nothing more can be sent.
    TellBroken,
    CloseWriting,
    TellReadEnd,
}

impl<S: DatagramSocket> Port<S> {
    #[inline]
    fn end_step(&self, has_undelivered: bool) -> Option<EndStep> {
        let ends = &self.ends;
        let is_whole = ends.read == ReadEnd::Open && ends.write == WriteEnd::Open;
        match is_whole && ends.broken.is_none() {
            // There is none.
            true => None,
            false => self.next_end_step(has_undelivered),
        }
    }

    #[cold]
    fn next_end_step(&self, has_undelivered: bool) -> Option<EndStep> {
        let ends = &self.ends;
        let is_broken = ends.broken.is_some();
        match self.state {
            PortState::Ending | PortState::Closed => None,
            PortState::Stopping => is_broken.then_some(EndStep::Finish),
            PortState::Open if is_broken && !self.is_receiving() && !ends.was_told_broken => {
                Some(EndStep::TellBroken)
            }
            PortState::Open if ends.write == WriteEnd::Closing && !self.has_unsent() => {
                Some(EndStep::CloseWriting)
            }
            PortState::Open if ends.read == ReadEnd::Arrived => {
                let may_tell = !has_undelivered && self.is_receiving();
                may_tell.then_some(EndStep::TellReadEnd)
            }
            PortState::Open => {
                let is_over = is_broken || ends.write == WriteEnd::Closed;
                (ends.read == ReadEnd::Told && is_over).then_some(EndStep::Finish)
            }
        }
    }
}

impl<S, P> Serving<S, P>
where
    S: DatagramSocket,
    P: Served<S>,
{
    /// Records the peer's end if it was received, and returns whether it was.
    #[inline]
    pub(super) fn notes_end(port: &mut Port<S>) -> bool {
        let connection = P::connection(&mut port.socket);
        let has_ended = connection.is_some_and(|connection| connection.has_ended());
        if has_ended {
            port.is_readable = false;
            port.ends.read = ReadEnd::Arrived;
        }
        has_ended
    }

    /// Handles an error that waits in the socket. A port that receives finds it by
    /// itself. For one that does not, it is taken here. Otherwise a connection would be
    /// kept that can no longer end.
    #[cold]
    pub(super) fn note_error(&mut self) {
        if self.port.is_receiving() || self.port.ends.read != ReadEnd::Open {
            return;
        }
        if let Some(error) = self.port.socket.take_error() {
            self.port.break_off(error);
        }
    }

    pub(super) fn has_end_step(&self) -> bool {
        self.port.end_step(self.arrivals.is_some()).is_some()
    }

    /// Takes one step of ending the connection. Returns whether there was one to take.
    #[inline]
    pub(super) fn take_end_step(&mut self, reactor: &mut Reactor) -> bool {
        let Some(step) = self.port.end_step(self.arrivals.is_some()) else {
            return false;
        };
        self.take_step(reactor, step);
        true
    }

    #[cold]
    fn take_step(&mut self, reactor: &mut Reactor, step: EndStep) {
        let port = &mut self.port;
        match step {
            EndStep::Finish => {
                let reason = port.ends.broken.take();
                port.end(reason.unwrap_or(CloseReason::Done));
            }
            EndStep::TellBroken => {
                port.ends.was_told_broken = true;
                self.protocol.broken(&mut Context {
                    transport: port,
                    reactor,
                });
            }
            EndStep::CloseWriting => self.close_writing(reactor),
            EndStep::TellReadEnd => self.tell_read_end(reactor),
        }
    }

    fn close_writing(&mut self, reactor: &mut Reactor) {
        let port = &mut self.port;
        port.ends.write = WriteEnd::Closed;
        if port.ends.broken.is_some() {
            // Not everything was sent.
            return;
        }
        let connection = P::connection(&mut port.socket);
        if let Some(Err(error)) = connection.map(|connection| connection.shutdown_write()) {
            log::debug!(target: log::TRANSPORT, "{}: shutdown: {error}", port.token);
        }
        self.protocol.write_closed(&mut Context {
            transport: port,
            reactor,
        });
    }

    fn tell_read_end(&mut self, reactor: &mut Reactor) {
        let port = &mut self.port;
        port.ends.read = ReadEnd::Told;
        let answer = self.protocol.read_closed(&mut Context {
            transport: port,
            reactor,
        });
        if port.state != PortState::Open || port.ends.broken.is_some() {
            return;
        }
        match answer {
            AfterReadClosed::EndConnection => port.end(CloseReason::Done),
            AfterReadClosed::LoseConnection => port.stop_listening(),
            AfterReadClosed::KeepWriting => {}
        }
    }

    /// Takes itself apart, with the part of its protocol that is wanted.
    pub(super) fn detach(&mut self, reactor: &mut Reactor, request: &mut DetachRequest) -> Next {
        if P::IS_CONNECTION && self.stage == Stage::Started {
            // Received packets cannot be put back.
            self.deliver(reactor, usize::MAX);
        }
        let is_over = matches!(self.port.state, PortState::Ending | PortState::Closed);
        let result = if is_over {
            Err(DetachError::Lost)
        } else if !P::IS_CONNECTION || self.arrivals.is_some() {
            Err(DetachError::NotDetachable)
        } else if self.protocol.part(request.part).is_none() {
            Err(DetachError::WrongProtocol)
        } else {
            self.apart(reactor, request.part)
        };
        let is_apart = result.is_ok();
        request.result = Some(result);
        match is_apart {
            true => Next::Remove,
            false => self.work(reactor, Visit::Extra),
        }
    }

    fn apart(
        &mut self,
        reactor: &mut Reactor,
        part: TypeId,
    ) -> Result<Detached<Box<dyn Any>>, DetachError> {
        let port = &mut self.port;
        let (host, peer) = (port.socket.host(), port.socket.peer());
        port.socket.unwatch(reactor);
        let connection = P::connection(&mut port.socket);
        let detached = connection.and_then(|connection| connection.detach());
        let (Some((fd, socket)), Some(peer)) = (detached, peer) else {
            port.end(CloseReason::Lost(not_connected()));
            return Err(DetachError::Lost);
        };
        let kept = port.keep();
        let (unsent, descriptors) = pack(port.take_unsent());
        port.is_closed_now();
        port.state = PortState::Closed;
        self.stage = Stage::Stopped;
        self.cancel_calls(reactor);
        self.tell_connector(reactor, CloseReason::Done);
        // Elsewhere, half a connection would hear of its end again, or be written to.
        let travels = kept.is_whole();
        Ok(Detached {
            fd,
            writing: None,
            protocol: self
                .protocol
                .take_part(part)
                .ok_or(DetachError::WrongProtocol)?,
            unsent,
            unread: Vec::new(),
            descriptors,
            producer: None,
            host,
            peer,
            kept: None,
            layer: Box::new(KeptPackets { socket, kept }),
            travels,
            pack: None,
        })
    }
}

/// The parts of a detached connection beside its protocol.
struct KeptPackets {
    /// The socket, without its descriptor.
    socket: Box<dyn Any>,
    kept: KeptPort,
}

impl KeptPackets {
    /// The socket and the rest, if it is what a connection over `S` has kept.
    fn into_parts<S: PacketSocket>(layer: Box<dyn Any>) -> Result<(S, KeptPort), Box<dyn Any>> {
        let Self { socket, kept } = *layer.downcast::<Self>()?;
        match socket.downcast::<S>() {
            Ok(socket) => Ok((*socket, kept)),
            Err(socket) => Err(Box::new(Self { socket, kept })),
        }
    }
}

/// Puts packets into the form in which they travel. Each is behind its length. The
/// descriptors of a packet belong to that range of bytes.
fn pack(packets: Vec<TakenOut>) -> (Vec<u8>, Vec<UnsentDescriptors>) {
    let mut bytes = Vec::new();
    let mut groups = Vec::new();
    for packet in packets {
        let start = bytes.len();
        // A send buffer holds less than 2 GiB.
        let length = u32::try_from(packet.data.len()).unwrap_or(u32::MAX);
        bytes.extend_from_slice(&length.to_le_bytes());
        bytes.extend_from_slice(&packet.data);
        if !packet.descriptors.is_empty() {
            let range = start..bytes.len();
            groups.push(UnsentDescriptors::new(Some(range), packet.descriptors));
        }
    }
    (bytes, groups)
}

/// Checks whether [`restore_unsent`](Port::restore_unsent) can make packets of what a
/// connection brings along.
pub(crate) fn check_packed(carried: &Carried) -> Result<(), AdoptErrorKind> {
    match carried.unread.is_empty() && is_packed(&carried.unsent) {
        true => Ok(()),
        false => Err(AdoptErrorKind::UnfitDescriptors),
    }
}

fn is_packed(unsent: &Unsent) -> bool {
    let mut starts = Vec::new();
    let mut rest = unsent.bytes.as_slice();
    while !rest.is_empty() {
        starts.push(unsent.bytes.len() - rest.len());
        let Some((_, after)) = next_packet(rest) else {
            return false;
        };
        rest = after;
    }
    starts.push(unsent.bytes.len());
    let mut from = 0;
    unsent.descriptors.iter().all(|group| {
        let count = group.descriptors.len();
        let Some(range) = &group.message else {
            return false;
        };
        // Each group belongs to exactly one packet, in order.
        let place = starts[from..].binary_search(&range.start);
        let place = place.map(|place| from + place);
        let fits = place.is_ok_and(|place| starts.get(place + 1) == Some(&range.end));
        from = place.map_or(from, |place| place + 1);
        fits && (1..=MAX_DESCRIPTORS).contains(&count)
    })
}

/// The first packet, and the bytes behind it.
fn next_packet(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = bytes.split_first_chunk::<LENGTH_BYTES>()?;
    rest.split_at_checked(usize::try_from(u32::from_le_bytes(*length)).ok()?)
}

impl<S: PacketSocket> Port<S> {
    /// Queues packets that were unsent elsewhere. [`is_packed`] has checked them.
    pub(crate) fn restore_unsent(&mut self, unsent: Unsent) {
        let mut groups = unsent.descriptors.into_iter().peekable();
        let mut rest = unsent.bytes.as_slice();
        while let Some((data, after)) = next_packet(rest) {
            let start = unsent.bytes.len() - rest.len();
            let is_its = |group: &UnsentDescriptors| {
                group
                    .message
                    .as_ref()
                    .is_some_and(|range| range.start == start)
            };
            let descriptors = groups.next_if(is_its).map(|group| group.descriptors);
            self.requeue(data, descriptors.unwrap_or_default());
            rest = after;
        }
    }
}

/// See [`Transports::reattach`](crate::Transports::reattach).
pub(crate) fn reattach<S: PacketSocket, P: PacketProtocol<Port<S>>>(
    reactor: &mut Reactor,
    mut detached: Detached<P>,
) -> Result<Token, ReattachError<P>> {
    let failed = |kind, detached| Err(ReattachError::new(kind, detached));
    let unsent = Unsent {
        bytes: mem::take(&mut detached.unsent),
        descriptors: mem::take(&mut detached.descriptors),
    };
    if !is_packed(&unsent) {
        (detached.unsent, detached.descriptors) = (unsent.bytes, unsent.descriptors);
        return failed(AdoptErrorKind::UnfitDescriptors, detached);
    }
    let (mut socket, kept) = match KeptPackets::into_parts::<S>(detached.layer) {
        Ok(parts) => parts,
        Err(layer) => {
            return failed(AdoptErrorKind::WrongFamily, Detached { layer, ..detached });
        }
    };
    if let Err(fd) = socket.attach(detached.fd) {
        let socket = Box::new(socket);
        let layer = Box::new(KeptPackets { socket, kept });
        let detached = Detached {
            fd,
            layer,
            ..detached
        };
        return failed(AdoptErrorKind::WrongFamily, detached);
    }
    let mut held = Some((kept, unsent));
    // Called only once nothing can fail any more.
    let prepare = |port: &mut Port<S>| {
        if let Some((kept, unsent)) = held.take() {
            port.restore(kept);
            port.restore_unsent(unsent);
        }
    };
    match install_packets(reactor, socket, |socket| socket, detached.protocol, prepare) {
        Ok(token) => Ok(token),
        Err((error, mut socket, protocol)) => {
            let (fd, socket) = socket.detach().expect("it was just put there");
            let (kept, unsent) = held.take().expect("nothing was prepared");
            let layer = Box::new(KeptPackets { socket, kept });
            let detached = Detached {
                fd,
                protocol,
                layer,
                unsent: unsent.bytes,
                descriptors: unsent.descriptors,
                ..detached
            };
            failed(AdoptErrorKind::Os(error), detached)
        }
    }
}

impl<S: PacketSocket> SocketTransport for Port<S> {
    type Layer = S;
    type Handle = PacketHandle;

    fn named(token: Token) -> PacketHandle {
        Handle::new(token, |facet| {
            facet.downcast_mut::<Self>().map(|port| port as _)
        })
    }

    fn unsent_while_open(&self) -> Option<usize> {
        let is_open = self.state == PortState::Open;
        is_open.then(|| DatagramTransport::unsent_bytes(self))
    }
}

impl<S: PacketSocket> AnyConnection for Port<S> {
    fn unsent_bytes(&self) -> usize {
        DatagramTransport::unsent_bytes(self)
    }

    fn bytes_sent(&self) -> u64 {
        self.bytes_sent
    }

    fn is_send_buffer_full(&self) -> bool {
        self.is_full()
    }

    fn pause_producing(&mut self) {
        DatagramTransport::pause_producing(self);
    }

    fn resume_producing(&mut self) {
        DatagramTransport::resume_producing(self);
    }

    fn is_reading_paused(&self) -> bool {
        self.is_paused()
    }

    fn hold_reading(&mut self) {
        self.holds += 1;
    }

    fn release_reading(&mut self) {
        self.holds = self.holds.saturating_sub(1);
    }

    fn lose_connection(&mut self) {
        self.stop_listening();
    }

    fn lose_connection_within(&mut self, deadline: Duration) {
        self.stop_listening_within(deadline);
    }

    fn lose_write_connection(&mut self) {
        self.close_writing();
    }

    fn abort_connection(&mut self) {
        self.abort();
    }

    fn state(&self) -> TransportState {
        DatagramTransport::state(self)
    }

    fn host(&self) -> Address {
        self.socket.host()
    }

    fn peer(&self) -> Address {
        let peer = self.socket.peer();
        peer.unwrap_or(Address::Unix(UnixAddress::Unnamed))
    }

    fn connection_handle(&self) -> ConnectionHandle {
        self.named(|facet| facet.downcast_mut::<Self>().map(|port| port as _))
    }

    fn socket_descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.socket.source()
    }

    fn set_write_observer(&mut self, observer: Option<Rc<dyn WriteObserver>>) {
        self.observer = observer;
    }
}

impl<S: PacketSocket> PacketTransport for Port<S> {
    #[inline]
    fn send(&mut self, data: &[u8]) -> SendStatus {
        status(self.queue_datagram(&[data], None, Vec::new()))
    }

    fn send_sequence(&mut self, parts: &[&[u8]]) -> SendStatus {
        status(self.queue_datagram(parts, None, Vec::new()))
    }

    fn send_with_descriptors(
        &mut self,
        data: &[u8],
        descriptors: Vec<PassedDescriptor>,
    ) -> Result<SendStatus, SendDescriptorError> {
        self.queue_with_descriptors(data, None, descriptors)
    }

    fn unsent_packets(&self) -> usize {
        self.unsent_datagrams()
    }

    fn unsent_descriptors(&self) -> usize {
        self.unsent_descriptor_count()
    }

    fn queue_limits(&self) -> QueueLimits {
        DatagramTransport::queue_limits(self)
    }

    fn set_queue_limits(&mut self, limits: QueueLimits) {
        DatagramTransport::set_queue_limits(self, limits);
    }

    fn peer_credentials(&self) -> io::Result<Credentials> {
        self.socket.peer_credentials()
    }

    fn peer_pidfd(&self) -> io::Result<OwnedFd> {
        self.socket.peer_pidfd()
    }

    fn set_received_linger(&mut self, linger: Linger) {
        self.set_linger(linger);
    }

    fn set_descriptors_accepted(&mut self, accepted: bool) -> io::Result<()> {
        self.socket.set_passes_rights(accepted)
    }

    fn counts(&self) -> DatagramCounts {
        DatagramTransport::counts(self)
    }

    fn duplicate(&self) -> io::Result<OwnedFd> {
        self.socket.duplicate()
    }

    fn handle(&self) -> PacketHandle {
        <Self as SocketTransport>::named(self.token)
    }

    fn as_dyn(&mut self) -> &mut dyn PacketTransport {
        self
    }
}
