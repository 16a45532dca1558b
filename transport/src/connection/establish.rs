//! Putting a transport and a protocol on a connected socket.

use std::io;

use bowline_protocol::Protocol;
use bowline_reactor::{Reactor, Token};

use super::Connection;
use crate::endpoint::{LayerOf, Side};
use crate::file_descriptor::FileDescriptor;
use crate::link::{Flags, Link};
use crate::shared::{Ledger, Shared};
use crate::stream::{Stream, StreamTransport};

/// Puts a transport and a protocol on a connected socket. The reactor watches the
/// socket from now on, or, if it was accepted, once it waits for its peer.
/// `connection_made` follows after the running callback.
///
/// `prepare` is called before the protocol sees the transport. For example, it has the
/// layers start. On failure the parts come back.
pub(crate) fn establish<T, P, S>(
    reactor: &mut Reactor,
    socket: S,
    wrap: impl FnOnce(S) -> LayerOf<T>,
    protocol: P,
    side: Side,
    prepare: impl FnOnce(&mut Stream<T::Layer>),
) -> Result<Token, (io::Error, S, P)>
where
    T: StreamTransport,
    P: Protocol<T>,
    S: FileDescriptor,
{
    let shared = Shared::of(reactor);
    let mut vacancy = match reactor.vacancy() {
        Ok(vacancy) => vacancy,
        Err(error) => return Err((error, socket, protocol)),
    };
    let token = vacancy.token();
    if side != Side::Accepted
        && let Err(error) = socket.socket().watch(vacancy.reactor(), token)
    {
        return Err((error, socket, protocol));
    }
    Ledger::add(&shared.ledger.opened, 1);
    let mut link = Link::new(shared, token);
    if side == Side::Accepted {
        link.set(Flags::UNWATCHED | Flags::READABLE);
    } else if socket.socket().is_always_ready() {
        link.set(Flags::READABLE);
    }
    let mut stream = Stream::new(link, wrap(socket));
    prepare(&mut stream);
    #[cfg(feature = "inspect")]
    {
        let kind = stream.layer.socket().kind();
        stream.link.shared.kinds.made(kind, &stream.link);
    }
    let connection = Connection {
        transport: T::from_stream(stream),
        protocol: Some(protocol),
    };
    vacancy.install(Box::new(connection));
    reactor.notify(token);
    Ok(token)
}
