//! What a transport or connector can refuse.

use std::error::Error;
use std::fmt;
use std::io;

use crate::descriptors::PassedDescriptor;

/// Why an outgoing connection did not come about.
#[derive(Debug)]
#[non_exhaustive]
pub enum ConnectError {
    /// Nobody listens there (`ECONNREFUSED`).
    Refused(io::Error),
    /// No way there (`ENETUNREACH`, `EHOSTUNREACH`).
    Unreachable(io::Error),
    /// The attempt took longer than the connector's timeout.
    TimedOut,
    /// The kernel gave up (`ETIMEDOUT`).
    TimedOutByKernel(io::Error),
    /// [`stop_connecting`](crate::Connector::stop_connecting) was called.
    Cancelled,
    /// The local address to connect from could not be bound.
    Bind(io::Error),
    /// The reactor stopped.
    ReactorStopped,
    /// Anything else the system answered: `ENOENT` for a UNIX path that is not
    /// there, `EACCES`, `EMFILE`.
    Os(io::Error),
}

impl ConnectError {
    /// Sorts what connect(2) or `SO_ERROR` answered.
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

    /// The error of the system, where there was one.
    pub fn as_os(&self) -> Option<&io::Error> {
        match self {
            Self::Refused(error)
            | Self::Unreachable(error)
            | Self::TimedOutByKernel(error)
            | Self::Bind(error)
            | Self::Os(error) => Some(error),
            Self::TimedOut | Self::Cancelled | Self::ReactorStopped => None,
        }
    }
}

impl fmt::Display for ConnectError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Refused(_) => "connection refused",
            Self::Unreachable(_) => "destination unreachable",
            Self::TimedOut => "connecting took longer than its timeout",
            Self::TimedOutByKernel(_) => "connecting timed out",
            Self::Cancelled => "connecting was cancelled",
            Self::Bind(_) => "cannot bind the local address to connect from",
            Self::ReactorStopped => "reactor stopped while connecting",
            Self::Os(_) => "cannot connect",
        })
    }
}

impl Error for ConnectError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.as_os().map(|error| error as _)
    }
}

/// Why a producer was not registered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RegisterProducerError {
    /// Another producer is registered, and stays so.
    AlreadyRegistered,
    /// The connection is lost. The producer is told to stop, after the running
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

/// A descriptor that was not queued, and why.
///
/// It carries what it was given, so that nothing is lost or closed by
/// accident; dropping the error closes it.
#[derive(Debug)]
pub struct SendDescriptorError {
    /// Why.
    pub kind: SendDescriptorErrorKind,
    /// What was to be sent, in order.
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
    /// The queue is full; the limit is settable
    /// ([`DescriptorLimits::queued`](crate::DescriptorLimits)).
    QueueFull,
    /// More than the 253 descriptors that one message can hold.
    TooManyForOneMessage,
    /// A message without bytes: a descriptor needs a byte to travel with.
    NoBytes,
    /// Descriptors queued before still wait for a byte, so that this message
    /// could not begin exactly where it should.
    DescriptorsWaiting,
    /// The bytes would pass the transport's limit of unsent bytes.
    BufferFull,
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
        })
    }
}

impl Error for SendDescriptorError {}
impl Error for SendDescriptorErrorKind {}
