//! Putting a transport and a protocol on a connected socket.

use std::fmt;
use std::io;

use bowline_protocol::{PacketProtocol, Protocol, TransportHandle};
use bowline_reactor::{Reactor, Token};

use crate::connection::Connection;
use crate::datagram::{self, PacketSocket, Port};
use crate::detach::{self, Detached, ReattachError};
use crate::endpoint::{Carried, ConnectionSocket, Side};
use crate::file_descriptor::FileDescriptor;
use crate::link::{Flags, Link};
use crate::listener::Farewell;
use crate::shared::{Ledger, Shared};
use crate::stream::{Stream, StreamTransport};

/// A transport over a connected socket: of a stream, or of packets. Each
/// [`StreamTransport`] is one, and each [`Port`] with a connection.
pub trait SocketTransport: Sized + 'static {
    /// The socket, or the layers on it.
    type Layer: 'static;

    /// The type of its handle. For a transport that passes descriptors, this is a handle
    /// that reaches them.
    type Handle: Copy + Into<Token> + fmt::Debug;

    /// Makes that handle for the descriptor `token`.
    fn named(token: Token) -> Self::Handle;

    /// How many bytes it has not sent. `None` if it is closing or has ended.
    fn unsent_while_open(&self) -> Option<usize>;
}

/// A transport that serves protocols of the type `P`. A stream serves each [`Protocol`]
/// over it, and a connection of packets each [`PacketProtocol`].
///
/// This is what `listen`, `connect` and `adopt` ask of the protocols of a factory.
/// Nobody has to implement it.
pub trait TransportFor<P>: Establish<P> + Establish<Farewell> {}

impl<T: Establish<P> + Establish<Farewell>, P> TransportFor<P> for T {}

/// What a connection is told of before its protocol sees it.
#[allow(
    unnameable_types,
    missing_debug_implementations,
    reason = "nobody outside of this crate has one"
)]
pub struct Beginning<'a> {
    pub(crate) side: Side,
    /// The connector that made it.
    pub(crate) connector: Option<Token>,
    /// Whether others may hold the socket.
    pub(crate) is_shared: bool,
    /// Whether it was accepted a moment ago: it is read before it is watched.
    pub(crate) is_fresh: bool,
    pub(crate) carried: Carried,
    /// What the listener knows of its connections.
    #[cfg(feature = "inspect")]
    pub(crate) tally: Option<&'a crate::Tally>,
    /// The settings of its endpoint, if it is a stream.
    pub(crate) prepare: &'a dyn Fn(&mut Link),
}

impl Beginning<'_> {
    /// The beginning of a connection that brings nothing along.
    #[inline]
    pub(crate) fn of(side: Side) -> Self {
        Self {
            side,
            connector: None,
            is_shared: false,
            is_fresh: side == Side::Accepted,
            carried: Carried::default(),
            #[cfg(feature = "inspect")]
            tally: None,
            prepare: &|_| {},
        }
    }
}

/// A connection that was put into the reactor.
#[allow(unnameable_types, reason = "nobody outside of this crate has one")]
#[derive(Debug)]
pub struct Made {
    pub(crate) token: Token,
    /// The connection, if its layers are not established yet.
    pub(crate) handshake: Option<TransportHandle>,
}

/// How a transport comes about. The two sorts of transport implement it.
#[diagnostic::on_unimplemented(
    message = "`{P}` is not a protocol over `{Self}`",
    note = "a protocol of a stream is `impl<T: Transport> Protocol<T>`",
    note = "a protocol of packets is `impl<T: PacketTransport> PacketProtocol<T>`",
    note = "a receiver of frames becomes a protocol with `Framed::new(framer, receiver)`"
)]
#[allow(
    unnameable_types,
    reason = "nobody outside of this crate implements or calls it"
)]
pub trait Establish<P>: SocketTransport {
    /// Puts a transport and a protocol on a connected socket. The reactor watches the
    /// socket from now on, or, if it was accepted, once it waits for its peer.
    /// `connection_made` follows after the running callback.
    ///
    /// On failure the parts come back.
    fn establish<S: ConnectionSocket>(
        reactor: &mut Reactor,
        socket: S,
        wrap: impl FnOnce(S) -> Self::Layer,
        protocol: P,
        beginning: Beginning<'_>,
    ) -> Result<Made, (io::Error, S, P)>;

    /// See [`Transports::reattach`](crate::Transports::reattach).
    fn reattach(reactor: &mut Reactor, detached: Detached<P>) -> Result<Token, ReattachError<P>>;
}

impl<T: StreamTransport, P: Protocol<T>> Establish<P> for T {
    #[inline]
    fn establish<S: ConnectionSocket>(
        reactor: &mut Reactor,
        socket: S,
        wrap: impl FnOnce(S) -> T::Layer,
        protocol: P,
        beginning: Beginning<'_>,
    ) -> Result<Made, (io::Error, S, P)> {
        let is_fresh = beginning.is_fresh;
        let mut is_established = true;
        let prepare = |stream: &mut Stream<T::Layer>| {
            stream.begin(beginning);
            is_established = stream.link.is_established();
        };
        let token = put_stream::<T, P, S>(reactor, socket, wrap, protocol, is_fresh, prepare)?;
        let handshake = (!is_established).then(|| T::transport_named(token));
        Ok(Made { token, handshake })
    }

    fn reattach(reactor: &mut Reactor, detached: Detached<P>) -> Result<Token, ReattachError<P>> {
        detach::reattach::<T, P>(reactor, detached)
    }
}

impl<S: PacketSocket, P: PacketProtocol<Self>> Establish<P> for Port<S> {
    fn establish<C: ConnectionSocket>(
        reactor: &mut Reactor,
        socket: C,
        wrap: impl FnOnce(C) -> S,
        protocol: P,
        beginning: Beginning<'_>,
    ) -> Result<Made, (io::Error, C, P)> {
        let prepare = |port: &mut Self| {
            port.made_by(beginning.connector);
            #[cfg(feature = "inspect")]
            if let Some(tally) = beginning.tally {
                port.came_from(tally);
            }
            port.restore_unsent(beginning.carried.unsent);
        };
        let token = datagram::install_packets(reactor, socket, wrap, protocol, prepare)?;
        let handshake = None;
        Ok(Made { token, handshake })
    }

    fn reattach(reactor: &mut Reactor, detached: Detached<P>) -> Result<Token, ReattachError<P>> {
        datagram::reattach_packets::<S, P>(reactor, detached)
    }
}

impl<L: FileDescriptor> Stream<L> {
    fn begin(&mut self, beginning: Beginning<'_>) {
        let link = &mut self.link;
        if let Some(connector) = beginning.connector {
            link.cold().connector = Some(connector);
        }
        if beginning.is_shared {
            link.set(Flags::SHARED);
        }
        #[cfg(feature = "inspect")]
        if let Some(tally) = beginning.tally {
            link.shared.kinds.came(link.token, tally);
        }
        (beginning.prepare)(link);
        if beginning.side == Side::Adopted {
            self.restore_unsent(beginning.carried.unsent);
            self.link.push_back(beginning.carried.unread);
        }
        self.start();
    }
}

/// Puts a stream and its protocol into the reactor. If it is fresh, its peer may have sent
/// something already, and it is read before it is watched. `prepare` is called before the
/// protocol sees the transport.
pub(crate) fn put_stream<T, P, S>(
    reactor: &mut Reactor,
    socket: S,
    wrap: impl FnOnce(S) -> T::Layer,
    protocol: P,
    is_fresh: bool,
    prepare: impl FnOnce(&mut Stream<T::Layer>),
) -> Result<Token, (io::Error, S, P)>
where
    T: StreamTransport,
    P: Protocol<T>,
    S: ConnectionSocket,
{
    let shared = Shared::of(reactor);
    let mut vacancy = match reactor.vacancy() {
        Ok(vacancy) => vacancy,
        Err(error) => return Err((error, socket, protocol)),
    };
    let token = vacancy.token();
    if !is_fresh && let Err(error) = socket.watch(vacancy.reactor(), token) {
        return Err((error, socket, protocol));
    }
    Ledger::add(&shared.ledger.opened, 1);
    let mut link = Link::new(shared, token);
    if is_fresh {
        link.set(Flags::UNWATCHED | Flags::READABLE);
    } else if socket.is_always_ready() {
        link.set(Flags::READABLE);
    }
    let mut stream = Stream::new(link, wrap(socket));
    prepare(&mut stream);
    #[cfg(feature = "inspect")]
    {
        let kind = stream.layer.socket().kind();
        let kinds = &stream.link.shared.kinds;
        kinds.made(kind, &stream.link, &stream.layer);
    }
    let connection = Connection {
        transport: T::from_stream(stream),
        protocol: Some(protocol),
    };
    vacancy.install(Box::new(connection));
    reactor.notify(token);
    Ok(token)
}
