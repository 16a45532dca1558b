//! The errors of transports and connectors.

use std::error::Error;
use std::fmt;
use std::io;
use std::net::SocketAddr;

use crate::datagram::SendRefusal;
use crate::descriptors::PassedDescriptor;
use crate::reason::CloseReason;

/// Why an outgoing connection did not come about.
#[derive(Debug)]
#[non_exhaustive]
pub enum ConnectError {
    /// Nobody listens there (`ECONNREFUSED`).
    ///
    /// Also when the kernel connected a TCP socket to itself. It does so when it happens
    /// to choose, for our end, the very port that was asked for.
    Refused(io::Error),
    /// No way there (`ENETUNREACH`, `EHOSTUNREACH`).
    Unreachable(io::Error),
    /// The attempt took longer than the connector's timeout. If that passed while layers
    /// were establishing the connection, its protocol was told `connection_lost`.
    TimedOut,
    /// The kernel gave up (`ETIMEDOUT`).
    TimedOutByKernel(io::Error),
    /// [`stop_connecting`](crate::Connector::stop_connecting) was called.
    Cancelled,
    /// The local address to connect from could not be bound.
    Bind(io::Error),
    /// The reactor stopped.
    ReactorStopped,
    /// No address was found for the host name.
    Lookup(LookupError),
    /// Every address of the host name was tried in vain. There is at least one attempt;
    /// they are in the order in which they failed.
    AllFailed(Vec<FailedAttempt>),
    /// The connection ended before its layers had established it. The protocol was told
    /// `connection_lost` with this reason, and never `connection_made`.
    Handshake(CloseReason),
    /// Any other error of the system: `ENOENT` for a UNIX path that does not exist,
    /// `EACCES`, `EMFILE`.
    Os(io::Error),
}

impl ConnectError {
    /// Makes one from the error of connect(2) or `SO_ERROR`.
    pub fn from_os(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::ConnectionRefused => Self::Refused(error),
            io::ErrorKind::NetworkUnreachable | io::ErrorKind::HostUnreachable => {
                Self::Unreachable(error)
            }
            io::ErrorKind::TimedOut => Self::TimedOutByKernel(error),
            _ => Self::Os(error),
        }
    }

    /// The error of the system, if there was one. Of several attempts, the error of the
    /// first that failed.
    pub fn as_os(&self) -> Option<&io::Error> {
        match self {
            Self::Refused(error)
            | Self::Unreachable(error)
            | Self::TimedOutByKernel(error)
            | Self::Bind(error)
            | Self::Os(error)
            | Self::Lookup(LookupError::Failed(error))
            | Self::Handshake(CloseReason::Lost(error)) => Some(error),
            Self::AllFailed(attempts) => attempts.first()?.error.as_os(),
            Self::TimedOut
            | Self::Cancelled
            | Self::ReactorStopped
            | Self::Lookup(_)
            | Self::Handshake(_) => None,
        }
    }

    /// The attempts that failed, with their addresses. Empty unless the destination was
    /// a host name.
    pub fn attempts(&self) -> &[FailedAttempt] {
        match self {
            Self::AllFailed(attempts) => attempts,
            _ => &[],
        }
    }
}

/// One of the attempts of a [`ConnectError::AllFailed`].
#[derive(Debug)]
#[non_exhaustive]
pub struct FailedAttempt {
    /// The address that was tried.
    pub address: SocketAddr,
    /// Why it failed.
    pub error: ConnectError,
}

impl FailedAttempt {
    /// Makes one, of an attempt at `address` that ended with `error`.
    pub fn new(address: SocketAddr, error: ConnectError) -> Self {
        Self { address, error }
    }
}

/// Why a host name could not be resolved. (Twisted: `DNSLookupError`.)
#[derive(Debug)]
#[non_exhaustive]
pub enum LookupError {
    /// The resolver failed, or knows that there is no such name.
    Failed(io::Error),
    /// The resolver knows no address, or none that can be reached from the local
    /// address to connect from.
    NoAddress,
    /// The resolver took too long.
    TimedOut,
}

impl fmt::Display for LookupError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Failed(error) => write!(f, "host name cannot be resolved: {error}"),
            Self::NoAddress => f.write_str("host name has no address"),
            Self::TimedOut => f.write_str("host name was not resolved in time"),
        }
    }
}

impl Error for LookupError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::Failed(error) => Some(error),
            Self::NoAddress | Self::TimedOut => None,
        }
    }
}

impl fmt::Display for ConnectError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AllFailed(attempts) => {
                write!(f, "cannot connect to any address, of {}", attempts.len())?;
                match attempts.first() {
                    Some(FailedAttempt { address, error }) => write!(f, "; {address}: {error}"),
                    None => Ok(()),
                }
            }
            Self::Lookup(error) => write!(f, "cannot find the address to connect to: {error}"),
            Self::Refused(error)
            | Self::Unreachable(error)
            | Self::TimedOutByKernel(error)
            | Self::Os(error) => write!(f, "cannot connect: {error}"),
            Self::TimedOut => f.write_str("connecting took longer than its timeout"),
            Self::Cancelled => f.write_str("connecting was cancelled"),
            Self::Bind(error) => {
                write!(f, "cannot bind the local address to connect from: {error}")
            }
            Self::ReactorStopped => f.write_str("reactor stopped while connecting"),
            Self::Handshake(reason) => write!(f, "connected, and not established: {reason}"),
        }
    }
}

impl Error for ConnectError {
    /// Of several attempts, the error of the first that failed.
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::Lookup(error) => Some(error),
            Self::Handshake(reason) => Some(reason),
            Self::AllFailed(attempts) => attempts.first().map(|attempt| &attempt.error as _),
            _ => self.as_os().map(|error| error as _),
        }
    }
}

/// Why a producer was not registered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RegisterProducerError {
    /// Another producer is registered, and stays registered.
    AlreadyRegistered,
    /// The connection is lost. The new producer is told to stop, after the running
    /// callback.
    NotConnected,
}

impl fmt::Display for RegisterProducerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::AlreadyRegistered => "another producer is registered",
            Self::NotConnected => "connection is lost",
        })
    }
}

impl Error for RegisterProducerError {}

/// Descriptors were not queued. The error says why, and hands them back.
///
/// So nothing is lost or closed by accident. Dropping the error closes them.
#[derive(Debug)]
pub struct SendDescriptorError {
    /// Why.
    pub kind: SendDescriptorErrorKind,
    /// The descriptors that were to be sent, in order.
    pub descriptors: Vec<PassedDescriptor>,
}

/// Why a descriptor was not queued.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SendDescriptorErrorKind {
    /// The connection is lost, or closing.
    NotConnected,
    /// Our side of the connection was half-closed.
    WriteClosed,
    /// The queue is full. The limit can be set
    /// ([`DescriptorLimits::queued`](crate::DescriptorLimits)).
    QueueFull,
    /// More than the 253 descriptors that one message can hold, or more than the
    /// [limit](crate::DescriptorLimits::per_exact_message) set for the peer.
    TooManyForOneMessage,
    /// The message has no bytes. A descriptor needs a byte to travel with.
    NoBytes,
    /// Descriptors queued earlier still wait for a byte. This message could not begin
    /// exactly where it should.
    DescriptorsWaiting,
    /// The bytes would pass the transport's limit of unsent bytes.
    BufferFull,
    /// The descriptor is the transport's own socket. Queued in itself, nobody could
    /// close it any more. This is checked for sockets that a transport has
    /// [lent out](crate::AnyConnection::socket_descriptor).
    OwnSocket,
    /// The datagram that it was to travel with is refused.
    Datagram(SendRefusal),
}

impl fmt::Display for SendDescriptorError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.kind, f)
    }
}

impl fmt::Display for SendDescriptorErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotConnected => "connection is lost or closing",
            Self::WriteClosed => "write side of the connection is closed",
            Self::QueueFull => "queue of descriptors is full",
            Self::TooManyForOneMessage => "more descriptors than one message can hold",
            Self::NoBytes => "descriptors need a byte to travel with",
            Self::DescriptorsWaiting => "descriptors queued before still wait for a byte",
            Self::BufferFull => "limit of unsent bytes reached",
            Self::OwnSocket => "a socket cannot be sent through itself",
            Self::Datagram(refusal) => return refusal.fmt(f),
        })
    }
}

impl Error for SendDescriptorError {}
impl Error for SendDescriptorErrorKind {}
