//! The protocols of ports, for datagrams and for packets, behind one trait.

use std::any::{Any, TypeId};
use std::borrow::Cow;
use std::io;
use std::os::fd::OwnedFd;

use bowline_protocol::{
    AddressRef, AfterReadClosed, AtDrain, CloseReason, Context, Credentials, Datagram,
    DatagramProtocol, PassedDescriptor, ReceivedDescriptors, UnsentDatagram,
};
use bowline_reactor::Description;

use super::port::Port;
use super::socket::{DatagramSocket, PacketSocket};

/// The protocol of a port, for datagrams or for packets.
pub(super) trait Served<S: DatagramSocket>: 'static {
    /// The message that it is given.
    type Message<'a>: Message;

    /// Whether it has a connection, which ends if a callback panics.
    const IS_CONNECTION: bool;

    fn message(arrived: Arrived<'_>) -> Self::Message<'_>;

    fn began(&mut self, cx: &mut Context<'_, Port<S>>);

    fn received(&mut self, cx: &mut Context<'_, Port<S>>, message: &mut Self::Message<'_>);

    fn refused(&mut self, cx: &mut Context<'_, Port<S>>, error: &io::Error);

    fn failed(&mut self, cx: &mut Context<'_, Port<S>>, unsent: Unsent<'_>, error: &io::Error);

    fn resumed(&mut self, cx: &mut Context<'_, Port<S>>);

    fn draining(&mut self, cx: &mut Context<'_, Port<S>>) -> AtDrain;

    fn is_idle(&self) -> bool;

    fn ended(&mut self, cx: &mut Context<'_, Port<S>>, reason: &CloseReason);

    fn part(&mut self, id: TypeId) -> Option<&mut dyn Any>;

    fn describe(&self, description: &mut Description);

    fn log_prefix(&self) -> Cow<'_, str>;

    /// Whether others may need it while they are served, so that it ends after them.
    fn is_support(port: &Port<S>) -> bool;

    // For connections only.

    /// The methods that only a socket with a connection has.
    fn connection(socket: &mut S) -> Option<&mut dyn PacketSocket> {
        let _ = socket;
        None
    }

    fn reattached(&mut self, cx: &mut Context<'_, Port<S>>) {
        let _ = cx;
    }

    /// Gives away its part of the type `id`.
    fn take_part(&mut self, id: TypeId) -> Option<Box<dyn Any>> {
        let _ = id;
        None
    }

    fn read_closed(&mut self, cx: &mut Context<'_, Port<S>>) -> AfterReadClosed {
        let _ = cx;
        AfterReadClosed::EndConnection
    }

    fn write_closed(&mut self, cx: &mut Context<'_, Port<S>>) {
        let _ = cx;
    }

    fn broken(&mut self, cx: &mut Context<'_, Port<S>>) {
        let _ = cx;
    }
}

/// A message whose callback may take descriptors out of it.
pub(super) trait Message {
    fn descriptors(&mut self) -> &mut dyn ExactSizeIterator<Item = OwnedFd>;
}

/// The parts of a received message.
pub(super) struct Arrived<'a> {
    pub(super) data: &'a [u8],
    pub(super) length: usize,
    pub(super) from: AddressRef<'a>,
    pub(super) descriptors: &'a mut Vec<OwnedFd>,
    pub(super) lost: bool,
    pub(super) credentials: Option<Credentials>,
    pub(super) pidfd: Option<OwnedFd>,
}

/// The parts of a message that cannot be sent.
pub(super) struct Unsent<'a> {
    pub(super) data: &'a [u8],
    pub(super) to: Option<AddressRef<'a>>,
    pub(super) descriptors: Vec<PassedDescriptor>,
}

/// A protocol of datagrams.
pub(super) struct Datagrams<P>(pub(super) P);

impl<S, P> Served<S> for Datagrams<P>
where
    S: DatagramSocket,
    P: DatagramProtocol<Port<S>>,
{
    type Message<'a> = Datagram<'a>;

    const IS_CONNECTION: bool = false;

    #[inline]
    fn message(arrived: Arrived<'_>) -> Datagram<'_> {
        let mut datagram = Datagram::new(arrived.data, arrived.from, arrived.descriptors);
        datagram.length = arrived.length;
        datagram.lost_descriptors = arrived.lost;
        datagram.credentials = arrived.credentials;
        datagram.pidfd = arrived.pidfd;
        datagram
    }

    fn began(&mut self, cx: &mut Context<'_, Port<S>>) {
        self.0.started(cx);
    }

    #[inline]
    fn received(&mut self, cx: &mut Context<'_, Port<S>>, datagram: &mut Datagram<'_>) {
        self.0.datagram_received(cx, datagram);
    }

    fn refused(&mut self, cx: &mut Context<'_, Port<S>>, error: &io::Error) {
        self.0.connection_refused(cx, error);
    }

    fn failed(&mut self, cx: &mut Context<'_, Port<S>>, unsent: Unsent<'_>, error: &io::Error) {
        let unsent = UnsentDatagram::new(unsent.data, unsent.to, unsent.descriptors);
        self.0.send_failed(cx, unsent, error);
    }

    fn resumed(&mut self, cx: &mut Context<'_, Port<S>>) {
        self.0.sending_resumed(cx);
    }

    fn draining(&mut self, cx: &mut Context<'_, Port<S>>) -> AtDrain {
        self.0.draining(cx)
    }

    fn is_idle(&self) -> bool {
        self.0.is_idle()
    }

    fn ended(&mut self, cx: &mut Context<'_, Port<S>>, reason: &CloseReason) {
        self.0.stopped(cx, reason);
    }

    fn part(&mut self, id: TypeId) -> Option<&mut dyn Any> {
        self.0.part(id)
    }

    fn describe(&self, description: &mut Description) {
        self.0.describe(description);
    }

    fn log_prefix(&self) -> Cow<'_, str> {
        self.0.log_prefix()
    }

    fn is_support(port: &Port<S>) -> bool {
        port.socket.peer().is_some()
    }
}

impl Message for Datagram<'_> {
    fn descriptors(&mut self) -> &mut dyn ExactSizeIterator<Item = OwnedFd> {
        let descriptors: &mut ReceivedDescriptors<'_> = &mut self.descriptors;
        descriptors
    }
}
