//! The socket that notices leave by.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

use bowline_reactor::{Interest, Reactor, Token};
#[cfg(feature = "testing")]
use bowline_transport::testing::MemoryDatagramSender;
use bowline_transport::{is_passing_shortage, send_datagram};

/// Where the manager is, and a socket of ours.
///
/// sd_notify(3) sends to the address, and so reaches whoever has it by then. A socket
/// that was connected once stays with a manager that is gone; but of one that is not
/// connected the kernel never says when there is room, it always calls it writable. So
/// it is connected anew for each notice: to itself, as a rule.
pub(super) enum Way {
    /// A real one.
    Socket {
        address: SocketAddr,
        socket: UnixDatagram,
    },
    /// On a simulated kernel.
    #[cfg(feature = "testing")]
    Simulated(MemoryDatagramSender),
}

/// Why a notice cannot leave now, and may later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Trouble {
    /// The manager's queue is full, or ours: the socket becomes writable.
    Full,
    /// Nobody is there, or it may not be reached; nothing tells when that changes.
    Nobody,
    /// The kernel has no memory, or too many descriptors are on their way.
    Short,
}

impl Trouble {
    /// `None` for an error that another attempt would bring again.
    pub(super) fn of(error: &io::Error) -> Option<Self> {
        use io::ErrorKind as Kind;
        match error.kind() {
            Kind::WouldBlock => Some(Self::Full),
            Kind::ConnectionRefused
            | Kind::NotConnected
            | Kind::ConnectionReset
            | Kind::BrokenPipe
            | Kind::NotFound
            | Kind::NotADirectory
            | Kind::PermissionDenied => Some(Self::Nobody),
            _ => is_passing_shortage(error).then_some(Self::Short),
        }
    }
}

impl Way {
    pub(super) fn to(address: &str) -> io::Result<Self> {
        let address = if let Some(name) = address.strip_prefix('@') {
            SocketAddr::from_abstract_name(name)?
        } else if address.starts_with('/') {
            SocketAddr::from_pathname(address)?
        } else {
            // vsock:... for virtual machines, above all.
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        };
        let socket = UnixDatagram::unbound()?;
        socket.set_nonblocking(true)?;
        Ok(Self::Socket { address, socket })
    }

    pub(super) fn send(&self, text: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        let (address, socket) = match self {
            Self::Socket { address, socket } => (address, socket),
            #[cfg(feature = "testing")]
            Self::Simulated(sender) => return sender.send(text, descriptors),
        };
        let connected = socket.connect_addr(address);
        let sent = send_datagram(socket.as_fd(), text, descriptors);
        match (sent, connected) {
            // Connected before this process was confined, say: the path is not to be
            // seen any more, the manager still reads.
            (Ok(()), _) => Ok(()),
            (Err(error), Ok(())) => Err(error),
            (Err(error), Err(_)) if error.kind() == io::ErrorKind::WouldBlock => Err(error),
            (Err(_), Err(error)) => Err(error),
        }
    }

    /// Has the reactor report when there is room.
    pub(super) fn watch(&self, reactor: &mut Reactor, token: Token) -> io::Result<()> {
        match self {
            Self::Socket { socket, .. } => reactor.watch(token, socket.as_fd(), Interest::Writable),
            #[cfg(feature = "testing")]
            Self::Simulated(sender) => sender.watch(reactor, token),
        }
    }

    pub(super) fn unwatch(&self, reactor: &mut Reactor) {
        match self {
            Self::Socket { socket, .. } => reactor.unwatch(socket.as_fd()),
            #[cfg(feature = "testing")]
            Self::Simulated(sender) => sender.unwatch(),
        }
    }

    /// What [`watch`](Self::watch) watches.
    pub(super) fn source(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Socket { socket, .. } => Some(socket.as_fd()),
            #[cfg(feature = "testing")]
            Self::Simulated(_) => None,
        }
    }
}

impl fmt::Debug for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Socket { address, .. } => address.fmt(f),
            #[cfg(feature = "testing")]
            Self::Simulated(sender) => sender.fmt(f),
        }
    }
}
