//! How a connection comes about: what is put on a connected socket.

use std::os::fd::OwnedFd;

use bowline_protocol::{Address, Factory, Protocol, Transport, TransportHandle, UnixAddress};
use bowline_reactor::{Reactor, Token};

use super::Connection;
use crate::file_descriptor::{Core, FileDescriptor, flag};
use crate::shared::{Ledger, Shared};
use crate::socket::UnixName;
use crate::socket::private::Sealed;
use crate::sys::{self, SocketName};

/// A transport that can be put on a connected socket.
pub trait StreamTransport: FileDescriptor + Transport + private::Build {}

/// A transport whose socket is a descriptor, so that it can be accepted,
/// connected and adopted.
pub(crate) trait DescriptorTransport: StreamTransport {
    /// The socket, with what is known of its addresses.
    fn socket(fd: OwnedFd, names: Names) -> Self::Socket;
}

/// What is known of a socket: its addresses, and whether descriptors can come.
#[derive(Debug)]
pub(crate) struct Names {
    pub(crate) host: HostName,
    pub(crate) peer: SocketName,
    /// Whether the kernel refuses descriptors from the peer.
    pub(crate) refuses_descriptors: bool,
}

/// Where a connected socket comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// A listener: the peer may have sent already, and may be gone again soon.
    Accepted,
    /// A connector, which wants to be told of the loss.
    Connected(Token),
    /// Somebody else, who may hold it too.
    Adopted,
    /// A simulated kernel.
    #[cfg(feature = "testing")]
    Simulated,
}

#[derive(Clone, Debug)]
pub(crate) enum HostName {
    /// Has to be asked of the socket when it is needed.
    Unknown,
    Inet(std::net::SocketAddr),
    Unix(UnixName),
}

#[allow(
    unnameable_types,
    reason = "sealed: only the transports of this crate implement it"
)]
pub(crate) mod private {
    use super::*;

    pub trait Build: FileDescriptor {
        /// The transport on top of a core.
        fn build(core: Core<Self::Socket>) -> Self;

        /// A socket that was detached; handed back where it is none of this
        /// family.
        fn socket_again(
            fd: OwnedFd,
            host: &Address,
            peer: &Address,
        ) -> Result<Self::Socket, OwnedFd>;
    }
}

/// Puts a transport and a protocol on a connected socket. The reactor watches
/// it: from now on, or once it waits for a peer that was accepted.
/// `connection_made` follows after the running callback.
///
/// `prepare` does something to the transport before its protocol sees it. On failure
/// the parts come back.
pub(crate) fn establish_with<T, P>(
    reactor: &mut Reactor,
    socket: T::Socket,
    protocol: P,
    source: Source,
    prepare: impl FnOnce(&mut T),
) -> Result<TransportHandle, (std::io::Error, T::Socket, P)>
where
    T: StreamTransport,
    P: Protocol<T>,
{
    let shared = Shared::of(reactor);
    let mut vacancy = match reactor.vacancy() {
        Ok(vacancy) => vacancy,
        Err(error) => return Err((error, socket, protocol)),
    };
    let token = vacancy.token();
    if source != Source::Accepted
        && let Err(error) = socket.watch(vacancy.reactor(), token)
    {
        return Err((error, socket, protocol));
    }
    Ledger::add(&shared.ledger.opened, 1);
    let mut core = Core::new(socket, shared, token);
    match source {
        Source::Accepted => core.flags |= flag::UNWATCHED | flag::READABLE,
        Source::Connected(connector) => core.cold().connector = Some(connector),
        Source::Adopted => core.flags |= flag::SHARED,
        #[cfg(feature = "testing")]
        Source::Simulated => {}
    }
    let mut transport = T::build(core);
    prepare(&mut transport);
    let handle = transport.handle();
    let connection = Connection {
        transport,
        protocol: Some(protocol),
    };
    vacancy.install(Box::new(connection));
    reactor.notify(token);
    Ok(handle)
}

/// Builds the protocol and the connection of a socket that was accepted or
/// connected. False when the factory declined.
pub(crate) fn connect_protocol<T, F>(
    reactor: &mut Reactor,
    protocol: F::Protocol,
    fd: OwnedFd,
    names: Names,
    source: Source,
) -> std::io::Result<()>
where
    T: DescriptorTransport,
    F: Factory<T>,
{
    let refuses_descriptors = names.refuses_descriptors;
    let socket = T::socket(fd, names);
    let prepare = |transport: &mut T| {
        if refuses_descriptors {
            transport.core_mut().flags |= flag::REFUSES_DESCRIPTORS;
        }
    };
    match establish_with(reactor, socket, protocol, source, prepare) {
        Ok(_) => Ok(()),
        Err((error, _, _)) => Err(error),
    }
}

/// The name of a UNIX socket, in the words of the protocols.
pub(crate) fn unix_address(name: SocketName) -> UnixAddress {
    match name {
        SocketName::UnixPath(path) => UnixAddress::Path(path),
        SocketName::UnixAbstract(name) => UnixAddress::Abstract(name),
        SocketName::UnixUnnamed | SocketName::Inet(_) | SocketName::Other(_) => {
            UnixAddress::Unnamed
        }
    }
}

impl private::Build for crate::TcpStream {
    fn build(core: Core<crate::socket::TcpSocket>) -> Self {
        Self::new(core)
    }

    fn socket_again(fd: OwnedFd, host: &Address, peer: &Address) -> Result<Self::Socket, OwnedFd> {
        match peer.as_inet() {
            Some(peer) => Ok(crate::socket::TcpSocket::new(fd, peer, host.as_inet())),
            None => Err(fd),
        }
    }
}

impl StreamTransport for crate::TcpStream {}

impl DescriptorTransport for crate::TcpStream {
    fn socket(fd: OwnedFd, names: Names) -> crate::socket::TcpSocket {
        let host = match names.host {
            HostName::Inet(address) => Some(address),
            _ => None,
        };
        let peer = match names.peer {
            SocketName::Inet(address) => address,
            // accept(2) can return a connection that was reset already.
            _ => std::net::SocketAddr::from(([0; 4], 0)),
        };
        crate::socket::TcpSocket::new(fd, peer, host)
    }
}

impl private::Build for crate::UnixStream {
    fn build(core: Core<crate::socket::UnixSocket>) -> Self {
        Self::new(crate::Stream::new(core))
    }

    fn socket_again(fd: OwnedFd, host: &Address, peer: &Address) -> Result<Self::Socket, OwnedFd> {
        match (host.as_unix().cloned(), peer.as_unix().cloned()) {
            (Some(host), Some(peer)) => {
                Ok(crate::socket::UnixSocket::new(fd, host.into(), peer.into()))
            }
            _ => Err(fd),
        }
    }
}

impl StreamTransport for crate::UnixStream {}

impl DescriptorTransport for crate::UnixStream {
    fn socket(fd: OwnedFd, names: Names) -> crate::socket::UnixSocket {
        let host = match names.host {
            HostName::Unix(address) => address,
            _ => {
                let name = sys::local_name(std::os::fd::AsFd::as_fd(&fd));
                unix_address(name.unwrap_or(SocketName::UnixUnnamed)).into()
            }
        };
        crate::socket::UnixSocket::new(fd, host, unix_address(names.peer).into())
    }
}
