//! The errors of listening, adopting and detaching.

use std::error::Error;
use std::fmt;
use std::io;
use std::os::fd::OwnedFd;

use bowline_protocol::Address;

/// A listener was not made. (Twisted: `CannotListenError`.)
#[derive(Debug)]
#[non_exhaustive]
pub struct ListenError {
    /// Where the listener was to be.
    pub address: Address,
    /// The step that failed.
    pub step: ListenStep,
    /// The system's answer, such as `AddrInUse`, `PermissionDenied`, or `NotFound` for a
    /// missing directory.
    pub error: io::Error,
}

/// A step on the way to listening.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ListenStep {
    /// socket(2) or an option.
    Socket,
    /// bind(2).
    Bind,
    /// Removing the file of a dead socket from the path
    /// ([`StaleSocket::Remove`](crate::StaleSocket::Remove)).
    RemoveStale,
    /// Giving the socket file its mode.
    Mode,
    /// listen(2).
    Listen,
    /// connect(2) of a datagram socket. The address is the peer's.
    Connect,
    /// Registering with the poller; or an acceptor
    /// [does not want](bowline_protocol::Acceptor::suits) such a listener.
    Watch,
}

impl ListenError {
    /// What becomes of an error in a step, at an address.
    pub(crate) fn of<A: Clone + Into<Address>>(
        address: &A,
        step: ListenStep,
    ) -> impl FnOnce(io::Error) -> Self + use<'_, A> {
        move |error| Self {
            address: address.clone().into(),
            step,
            error,
        }
    }
}

impl fmt::Display for ListenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let step = match self.step {
            ListenStep::Socket => "make a socket for",
            ListenStep::Bind => "bind",
            ListenStep::RemoveStale => "remove the dead socket at",
            ListenStep::Mode => "set the mode of",
            ListenStep::Listen => "listen on",
            ListenStep::Connect => "connect to",
            ListenStep::Watch => "watch the listener on",
        };
        write!(f, "cannot {step} {}: {}", self.address, self.error)
    }
}

impl Error for ListenError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        Some(&self.error)
    }
}

impl From<ListenError> for io::Error {
    fn from(error: ListenError) -> Self {
        Self::new(error.error.kind(), error)
    }
}

/// A connection or listener was not adopted. The error gives back what it was to be
/// adopted from, mostly a descriptor. Dropping the error closes it.
#[derive(Debug)]
pub struct AdoptError<F = OwnedFd> {
    /// The reason.
    pub kind: AdoptErrorKind,
    /// The descriptor, or whatever else was to be adopted, unchanged.
    pub fd: F,
}

impl<F> AdoptError<F> {
    /// The system refused.
    pub fn os(error: io::Error, fd: F) -> Self {
        Self {
            kind: AdoptErrorKind::Os(error),
            fd,
        }
    }
}

/// Why a descriptor was not adopted.
#[derive(Debug)]
#[non_exhaustive]
pub enum AdoptErrorKind {
    /// It is no socket, but a file, a pipe, or a descriptor that only names something
    /// (`O_PATH`).
    NotASocket,
    /// It is a socket of another family.
    WrongFamily,
    /// It is no stream socket.
    NotAStream,
    /// It is no datagram socket.
    NotADatagramSocket,
    /// It is no socket of sequenced packets.
    NotPackets,
    /// It listens. A connection was asked for.
    Listening,
    /// It does not listen.
    NotListening,
    /// It is not connected.
    NotConnected,
    /// It is not open for reading.
    NotReadable,
    /// It is not open for writing.
    NotWritable,
    /// The unsent descriptors do not fit the unsent bytes, so they could never leave.
    /// See [`UnsentDescriptors`](crate::UnsentDescriptors).
    UnfitDescriptors,
    /// The system refused.
    Os(io::Error),
}

impl<F> fmt::Display for AdoptError<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot adopt the descriptor: {}", self.kind)
    }
}

impl fmt::Display for AdoptErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotASocket => "it is no socket",
            Self::WrongFamily => "it is a socket of another family",
            Self::NotAStream => "it is no stream socket",
            Self::NotADatagramSocket => "it is no datagram socket",
            Self::NotPackets => "it is no socket of sequenced packets",
            Self::Listening => "it listens",
            Self::NotListening => "it does not listen",
            Self::NotConnected => "it is not connected",
            Self::NotReadable => "it is not open for reading",
            Self::NotWritable => "it is not open for writing",
            Self::UnfitDescriptors => "its unsent descriptors do not fit its unsent bytes",
            Self::Os(error) => return error.fmt(f),
        })
    }
}

impl<F: fmt::Debug> Error for AdoptError<F> {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match &self.kind {
            AdoptErrorKind::Os(error) => Some(error),
            _ => None,
        }
    }
}

impl<F> From<AdoptError<F>> for io::Error {
    /// Closes the descriptor.
    fn from(error: AdoptError<F>) -> Self {
        match error.kind {
            AdoptErrorKind::Os(error) => error,
            kind => Self::new(io::ErrorKind::InvalidInput, AdoptError { kind, fd: () }),
        }
    }
}

/// Why a connection or listener was not detached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DetachError {
    /// The connection or listener is gone, or ending.
    Lost,
    /// Its protocol is of another type, and has no part of that type either.
    WrongProtocol,
    /// It has a layer that cannot be taken off.
    NotDetachable,
}

impl fmt::Display for DetachError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Lost => "there is nothing to detach any more",
            Self::WrongProtocol => "the connection has a protocol of another type",
            Self::NotDetachable => "the connection has a layer that cannot be taken off",
        })
    }
}

impl Error for DetachError {}

/// Why a protocol was not called. See
/// [`Transports::call_protocol`](crate::Transports::call_protocol).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum CallError {
    /// The connection is gone, or ending.
    Lost,
    /// It has a transport of another type.
    WrongTransport,
    /// Its protocol is of another type, and has no part of that type either.
    WrongProtocol,
}

impl fmt::Display for CallError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Lost => "the connection is gone",
            Self::WrongTransport => "the connection has a transport of another type",
            Self::WrongProtocol => "the connection has a protocol of another type",
        })
    }
}

impl Error for CallError {}
