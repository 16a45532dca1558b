//! Listening and connecting for packets. These call factories of packet protocols.

use std::borrow::Cow;
use std::io;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use bowline_protocol::{
    Address, BuildContext, CloseReason, ConnectError, Destination, PacketFactory, TransportHandle,
    UnixAddress,
};
use bowline_reactor::{Reactor, Token};

use super::port::Port;
use super::serving::install_packets;
use super::socket::{DatagramSocket as _, PacketSocket};
use crate::connector::Outgoing;
use crate::endpoint::{AcceptedSocket, Dial, HostToTry, ListeningSocket};
use crate::kinds::outcome;
use crate::listener::{ListenerControl, OnAccept};
use crate::log;

/// Makes packet connections of accepted sockets, with the protocols of a factory.
pub(crate) struct ServePackets<F>(pub(crate) F);

impl<L, F> OnAccept<L> for ServePackets<F>
where
    L: ListeningSocket<Accepted: PacketSocket>,
    F: PacketFactory<Port<L::Accepted>>,
{
    fn started(&mut self, cx: &mut BuildContext<'_>) {
        self.0.started(cx);
    }

    fn accept(
        &mut self,
        control: &mut ListenerControl<L>,
        reactor: &mut Reactor,
    ) -> io::Result<()> {
        let (socket, is_shared) = control.open()?;
        let (accepted, peer) = socket.accept(is_shared)?;
        control.accepted(accepted.descriptor());
        control.accepted = Some(accepted);
        let protocol = self.0.build_protocol(&mut control.context(reactor), &peer);
        let Some(mut accepted) = control.accepted.take() else {
            return Ok(());
        };
        let Some(protocol) = protocol else {
            log::debug!(target: log::TRANSPORT, "{}: declined {peer}", control.token);
            accepted.decline();
            return Ok(());
        };
        if let Err((error, ..)) = install_packets(reactor, accepted, protocol, |_| {}) {
            log::error!(target: log::TRANSPORT, "{}: cannot serve {peer}: {error}", control.token);
        }
        Ok(())
    }

    fn stopped(&mut self, cx: &mut BuildContext<'_>) {
        self.0.stopped(cx);
    }

    fn name(&self) -> Cow<'_, str> {
        self.0.log_prefix()
    }
}

/// An endpoint for packets that connects.
pub(crate) trait DialPackets: 'static {
    type Socket: PacketSocket;

    fn destination(&self) -> UnixAddress;

    fn timeout(&self) -> Option<Duration>;

    fn dial(&mut self, address: &UnixAddress) -> Result<Dial<Self::Socket>, ConnectError>;
}

/// An endpoint for packets, with a factory of their protocols.
pub(crate) struct ConnectPackets<C, F> {
    pub(crate) endpoint: C,
    pub(crate) factory: F,
}

impl<C, F> Outgoing for ConnectPackets<C, F>
where
    C: DialPackets,
    F: PacketFactory<Port<C::Socket>>,
{
    type Socket = C::Socket;
    type Protocol = F::Protocol;

    fn destination(&self) -> Destination {
        self.endpoint.destination().into()
    }

    fn timeout(&self) -> Option<Duration> {
        self.endpoint.timeout()
    }

    fn host(&self) -> Option<HostToTry> {
        None
    }

    fn dial(&mut self, address: &Address) -> Result<Dial<C::Socket>, ConnectError> {
        match address.as_unix() {
            Some(address) => self.endpoint.dial(address),
            None => Err(ConnectError::Os(io::ErrorKind::InvalidInput.into())),
        }
    }

    fn outcome(&mut self, socket: &mut C::Socket) -> Option<Result<(), ConnectError>> {
        outcome(socket.source()?)
    }

    fn source(socket: &C::Socket) -> Option<BorrowedFd<'_>> {
        socket.source()
    }

    fn started(&mut self, cx: &mut BuildContext<'_>) {
        self.factory.started(cx);
    }

    fn stopped(&mut self, cx: &mut BuildContext<'_>) {
        self.factory.stopped(cx);
    }

    fn connection_failed(&mut self, cx: &mut BuildContext<'_>, error: &ConnectError) {
        self.factory.connection_failed(cx, error);
    }

    fn connection_lost(&mut self, cx: &mut BuildContext<'_>, reason: &CloseReason) {
        self.factory.connection_lost(cx, reason);
    }

    fn build_protocol(&mut self, cx: &mut BuildContext<'_>, peer: &Address) -> Option<F::Protocol> {
        self.factory.build_protocol(cx, peer)
    }

    fn establish(
        &mut self,
        reactor: &mut Reactor,
        socket: C::Socket,
        protocol: F::Protocol,
        token: Token,
    ) -> io::Result<Option<TransportHandle>> {
        let prepare = |port: &mut Port<C::Socket>| port.made_by(token);
        install_packets(reactor, socket, protocol, prepare)
            .map(|_| None)
            .map_err(|(error, ..)| error)
    }

    fn log_prefix(&self) -> Cow<'_, str> {
        self.factory.log_prefix()
    }
}
