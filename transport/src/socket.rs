//! The seam to the kernel: what a transport needs of its socket.
//!
//! TCP and UNIX sockets implement it with the calls of `sys`; the simulated
//! kernel of feature `testing` implements it in memory, under the same
//! transports.

use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;

use bowline_protocol::{Address, Credentials, UnixAddress};
use bowline_reactor::{Interest, Reactor, Token};

use crate::shared::{ReadBuffers, SendControl};
use crate::sys::{self, SocketName};

/// A connected, non-blocking stream socket. Sealed: implemented by the sockets
/// of this crate.
///
/// Errors are the kernel's; `WouldBlock` means later.
pub trait Socket: Sealed + 'static {}

#[allow(
    unnameable_types,
    reason = "sealed: only the sockets of this crate implement it"
)]
pub(crate) mod private {
    use super::*;

    /// What one read brought.
    #[derive(Clone, Copy, Debug)]
    pub struct Taken {
        /// Bytes at the start of the buffer; zero is the end of the stream.
        pub bytes: usize,
        /// Whether the read may have stopped for another reason than that
        /// nothing was left.
        pub had_ancillary: bool,
        /// Whether descriptors were lost.
        pub is_truncated: bool,
    }

    /// What is left of a connection over which nothing more can be sent.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub enum Remains {
        /// What has arrived, and no end: the peer has reset it, or is out of reach.
        Pieces,
        /// All that the peer sent, its end too.
        Everything,
        /// The direction towards us, where more may come.
        Reading,
    }

    pub trait Sealed {
        /// What log lines call this kind of transport.
        const KIND: &'static str;

        /// Whether a connection can end in the middle of what its peer sends.
        const CAN_BE_RESET: bool;

        fn send(&self, data: &[u8]) -> io::Result<usize>;

        fn send_pieces(&self, pieces: &[IoSlice<'_>]) -> io::Result<usize>;

        fn send_with_descriptors(
            &self,
            data: &[u8],
            descriptors: &[BorrowedFd<'_>],
            control: &mut SendControl,
        ) -> io::Result<usize>;

        /// Reads up to `limit` bytes; descriptors would be lost.
        fn recv(&self, buffers: &mut ReadBuffers, limit: usize) -> io::Result<Taken>;

        /// Reads up to `limit` bytes and what is beside them.
        fn receive(&self, buffers: &mut ReadBuffers, limit: usize) -> io::Result<Taken>;

        fn shutdown_write(&self) -> io::Result<()>;

        /// Makes the coming close a reset, where the protocol knows one.
        fn prepare_abort(&self);

        /// Closes; addresses stay readable.
        fn close(&mut self);

        fn host(&self) -> Address;
        fn peer(&self) -> Address;

        /// The process at the other end.
        fn peer_credentials(&self) -> io::Result<Credentials> {
            match self.source() {
                Some(source) => sys::peer_credentials(source).map(Credentials::from),
                None => Err(not_connected()),
            }
        }

        /// What the poller watches; `None` once closed, or if simulated.
        fn source(&self) -> Option<BorrowedFd<'_>>;

        /// The error that the poller reported and no call has told of yet
        /// (`SO_ERROR`).
        fn take_error(&self) -> Option<io::Error> {
            sys::take_error(self.source()?).unwrap_or_else(Some)
        }

        /// How many bytes wait to be read; some, where nobody knows.
        fn unread(&self) -> usize {
            let asked = |source| sys::bytes_unread(source).unwrap_or(1);
            self.source().map_or(0, asked)
        }

        /// Whether nothing can come or go any more, but for what has arrived.
        fn is_hung_up(&self) -> bool {
            self.source().is_some_and(sys::is_hung_up)
        }

        /// What is left when a send failed with `error`, or the poller reported it.
        fn remains(&self, error: &io::Error) -> Remains {
            if !self.is_hung_up() {
                Remains::Reading
            } else if Self::CAN_BE_RESET && error.kind() != io::ErrorKind::BrokenPipe {
                Remains::Pieces
            } else {
                // On TCP this is the error of a reset that came behind the peer's
                // end (`tcp_reset` in Linux). All that a UNIX peer sent is here.
                Remains::Everything
            }
        }

        /// Whether it was neither closed nor detached.
        #[inline]
        fn is_open(&self) -> bool {
            self.source().is_some()
        }

        /// Has readability, and the peer's end, reported under `token`.
        #[inline]
        fn watch(&self, reactor: &mut Reactor, token: Token) -> io::Result<()> {
            match self.source() {
                Some(source) => reactor.watch(token, source, Interest::Readable),
                None => Err(not_connected()),
            }
        }

        /// Has writability reported too.
        fn watch_writing(&self, reactor: &mut Reactor, token: Token) -> io::Result<()> {
            match self.source() {
                Some(source) => reactor.rewatch(token, source, Interest::Both),
                None => Err(not_connected()),
            }
        }

        /// Has nothing reported any more.
        #[inline]
        fn unwatch(&self, reactor: &mut Reactor) {
            if let Some(source) = self.source() {
                reactor.unwatch(source);
            }
        }

        /// Takes the descriptor out, to be used elsewhere.
        fn detach(&mut self) -> Option<OwnedFd>;
    }
}

pub(crate) use private::Remains;
use private::{Sealed, Taken};

impl From<sys::Credentials> for Credentials {
    fn from(credentials: sys::Credentials) -> Self {
        Self {
            pid: credentials.pid,
            uid: credentials.uid,
            gid: credentials.gid,
        }
    }
}

#[cold]
fn not_connected() -> io::Error {
    io::Error::from(io::ErrorKind::NotConnected)
}

/// The calls on a real socket, shared by both kinds.
mod kernel {
    use super::*;

    #[inline(always)]
    pub(super) fn send(fd: Option<&OwnedFd>, data: &[u8]) -> io::Result<usize> {
        match fd {
            Some(fd) => sys::send(fd.as_fd(), data),
            None => Err(not_connected()),
        }
    }

    pub(super) fn send_pieces(fd: Option<&OwnedFd>, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        match fd {
            Some(fd) => sys::send_vectored(fd.as_fd(), pieces),
            None => Err(not_connected()),
        }
    }

    #[inline(always)]
    pub(super) fn recv(
        fd: Option<&OwnedFd>,
        buffers: &mut ReadBuffers,
        limit: usize,
    ) -> io::Result<Taken> {
        let Some(fd) = fd else {
            return Err(not_connected());
        };
        let bytes = sys::recv(fd.as_fd(), buffers.data.get_mut(limit))?;
        Ok(Taken {
            bytes,
            had_ancillary: false,
            is_truncated: false,
        })
    }

    #[inline(always)]
    pub(super) fn receive(
        fd: Option<&OwnedFd>,
        buffers: &mut ReadBuffers,
        limit: usize,
    ) -> io::Result<Taken> {
        let Some(fd) = fd else {
            return Err(not_connected());
        };
        let received = sys::receive(
            fd.as_fd(),
            buffers.data.get_mut(limit),
            &mut buffers.control,
            &mut buffers.ancillary,
        )?;
        Ok(Taken {
            bytes: received.bytes,
            had_ancillary: received.had_ancillary,
            is_truncated: received.control_truncated,
        })
    }
}

/// A TCP socket.
#[derive(Debug)]
pub struct TcpSocket {
    fd: Option<OwnedFd>,
    peer: SocketAddr,
    /// Asked of the kernel when somebody wants to know, at the latest before
    /// the close.
    host: Option<SocketAddr>,
}

impl TcpSocket {
    pub(crate) fn new(fd: OwnedFd, peer: SocketAddr, host: Option<SocketAddr>) -> Self {
        Self {
            fd: Some(fd),
            peer,
            host,
        }
    }

    pub(crate) fn fd(&self) -> io::Result<BorrowedFd<'_>> {
        self.fd.as_ref().map(AsFd::as_fd).ok_or_else(not_connected)
    }

    fn find_host(&self) -> SocketAddr {
        let asked = || match sys::local_name(self.fd.as_ref()?.as_fd()) {
            Ok(SocketName::Inet(address)) => Some(address),
            _ => None,
        };
        self.host
            .or_else(asked)
            .unwrap_or_else(|| unspecified(self.peer))
    }
}

/// The address that says nothing, of the same family.
pub(crate) fn unspecified(like: SocketAddr) -> SocketAddr {
    match like {
        SocketAddr::V4(_) => SocketAddr::from(([0; 4], 0)),
        SocketAddr::V6(_) => SocketAddr::from(([0; 16], 0)),
    }
}

impl Socket for TcpSocket {}

impl Sealed for TcpSocket {
    const KIND: &'static str = "TCP";
    const CAN_BE_RESET: bool = true;

    #[inline(always)]
    fn send(&self, data: &[u8]) -> io::Result<usize> {
        kernel::send(self.fd.as_ref(), data)
    }

    fn send_pieces(&self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        kernel::send_pieces(self.fd.as_ref(), pieces)
    }

    fn send_with_descriptors(
        &self,
        _: &[u8],
        _: &[BorrowedFd<'_>],
        _: &mut SendControl,
    ) -> io::Result<usize> {
        // The kernel would report success and drop them (kernel 6.18).
        Err(io::Error::from(io::ErrorKind::Unsupported))
    }

    #[inline(always)]
    fn recv(&self, buffers: &mut ReadBuffers, limit: usize) -> io::Result<Taken> {
        kernel::recv(self.fd.as_ref(), buffers, limit)
    }

    fn receive(&self, buffers: &mut ReadBuffers, limit: usize) -> io::Result<Taken> {
        self.recv(buffers, limit)
    }

    fn shutdown_write(&self) -> io::Result<()> {
        sys::shutdown(self.fd()?, std::net::Shutdown::Write)
    }

    fn prepare_abort(&self) {
        if let Ok(fd) = self.fd() {
            // A linger time of zero turns close(2) into a reset; it fails only
            // for what is no socket.
            let _ = sys::set_linger(fd, Some(std::time::Duration::ZERO));
        }
    }

    fn close(&mut self) {
        if self.host.is_none() && self.fd.is_some() {
            self.host = Some(self.find_host());
        }
        self.fd = None;
    }

    fn host(&self) -> Address {
        Address::Inet(self.find_host())
    }

    fn peer(&self) -> Address {
        Address::Inet(self.peer)
    }

    #[inline]
    fn source(&self) -> Option<BorrowedFd<'_>> {
        self.fd.as_ref().map(AsFd::as_fd)
    }

    fn detach(&mut self) -> Option<OwnedFd> {
        self.host = Some(self.find_host());
        self.fd.take()
    }
}

/// A UNIX stream socket.
#[derive(Debug)]
pub struct UnixSocket {
    fd: Option<OwnedFd>,
    host: UnixName,
    peer: UnixName,
}

/// The address of one end. All connections of a listener share that of theirs;
/// an end without a name, as that of most clients, costs nothing.
#[derive(Clone, Debug)]
pub(crate) struct UnixName(Option<Rc<UnixAddress>>);

impl From<UnixAddress> for UnixName {
    fn from(address: UnixAddress) -> Self {
        Self(match address {
            UnixAddress::Unnamed => None,
            named => Some(Rc::new(named)),
        })
    }
}

impl UnixName {
    fn address(&self) -> Address {
        let name = self.0.as_deref();
        Address::Unix(name.map_or(UnixAddress::Unnamed, UnixAddress::clone))
    }
}

impl UnixSocket {
    pub(crate) fn new(fd: OwnedFd, host: UnixName, peer: UnixName) -> Self {
        Self {
            fd: Some(fd),
            host,
            peer,
        }
    }

    pub(crate) fn fd(&self) -> io::Result<BorrowedFd<'_>> {
        self.fd.as_ref().map(AsFd::as_fd).ok_or_else(not_connected)
    }
}

impl Socket for UnixSocket {}

impl Sealed for UnixSocket {
    const KIND: &'static str = "UNIX";
    const CAN_BE_RESET: bool = false;

    #[inline(always)]
    fn send(&self, data: &[u8]) -> io::Result<usize> {
        kernel::send(self.fd.as_ref(), data)
    }

    fn send_pieces(&self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        kernel::send_pieces(self.fd.as_ref(), pieces)
    }

    #[inline]
    fn send_with_descriptors(
        &self,
        data: &[u8],
        descriptors: &[BorrowedFd<'_>],
        control: &mut SendControl,
    ) -> io::Result<usize> {
        let data = [IoSlice::new(data)];
        sys::send_with_descriptors(self.fd()?, &data, descriptors, &mut control.0)
    }

    #[inline(always)]
    fn recv(&self, buffers: &mut ReadBuffers, limit: usize) -> io::Result<Taken> {
        kernel::recv(self.fd.as_ref(), buffers, limit)
    }

    #[inline(always)]
    fn receive(&self, buffers: &mut ReadBuffers, limit: usize) -> io::Result<Taken> {
        kernel::receive(self.fd.as_ref(), buffers, limit)
    }

    fn shutdown_write(&self) -> io::Result<()> {
        sys::shutdown(self.fd()?, std::net::Shutdown::Write)
    }

    fn prepare_abort(&self) {
        // A UNIX socket knows no reset: the peer sees the end either way.
    }

    fn close(&mut self) {
        self.fd = None;
    }

    fn host(&self) -> Address {
        self.host.address()
    }

    fn peer(&self) -> Address {
        self.peer.address()
    }

    #[inline]
    fn source(&self) -> Option<BorrowedFd<'_>> {
        self.fd.as_ref().map(AsFd::as_fd)
    }

    fn detach(&mut self) -> Option<OwnedFd> {
        self.fd.take()
    }
}
