//! The socket by which notices are sent.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

use bowline_reactor::{Interest, Reactor, Token};
use bowline_transport::{is_passing_shortage, send_datagram};

/// A way to send notices.
pub(crate) trait Way: fmt::Debug + 'static {
    /// Sends one notice, with descriptors.
    fn send(&self, text: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()>;

    /// Makes the reactor report when there is room.
    fn watch(&self, reactor: &mut Reactor, token: Token) -> io::Result<()>;

    fn unwatch(&self, reactor: &mut Reactor);

    /// Returns what [`watch`](Self::watch) watches, if the poller knows it.
    fn source(&self) -> Option<BorrowedFd<'_>>;
}

/// The address of the manager, and a socket of ours.
///
/// sd_notify(3) sends to the address, and so reaches whoever has it at the time. A
/// connected socket would stay with a manager that is gone. But a socket that is not
/// connected is always writable for the kernel, which never reports room. So it is
/// connected again for each notice, and usually to itself.
pub(super) struct ManagerSocket {
    address: SocketAddr,
    socket: UnixDatagram,
}

/// Why a notice cannot be sent now, and can be later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Trouble {
    /// The manager's queue is full, or ours. The socket becomes writable later.
    Full,
    /// Nobody is there, or may not be reached. Nothing reports when that changes.
    Nobody,
    /// The kernel has no memory, or too many descriptors are in flight.
    Short,
}

impl Trouble {
    /// Returns `None` for an error that would come again.
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

impl ManagerSocket {
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
        Ok(Self { address, socket })
    }
}

impl Way for ManagerSocket {
    fn send(&self, text: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        let connected = self.socket.connect_addr(&self.address);
        let sent = send_datagram(self.socket.as_fd(), text, descriptors);
        match (sent, connected) {
            // Connected before this process was confined, say: the path is not to be
            // seen any more, the manager still reads.
            (Ok(()), _) => Ok(()),
            (Err(error), Ok(())) => Err(error),
            (Err(error), Err(_)) if error.kind() == io::ErrorKind::WouldBlock => Err(error),
            (Err(_), Err(error)) => Err(error),
        }
    }

    fn watch(&self, reactor: &mut Reactor, token: Token) -> io::Result<()> {
        reactor.watch(token, self.socket.as_fd(), Interest::Writable)
    }

    fn unwatch(&self, reactor: &mut Reactor) {
        reactor.unwatch(self.socket.as_fd());
    }

    fn source(&self) -> Option<BorrowedFd<'_>> {
        Some(self.socket.as_fd())
    }
}

impl fmt::Debug for ManagerSocket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.address.fmt(f)
    }
}
