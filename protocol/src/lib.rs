//! The contracts that users of [bowline] implement and use: [`Protocol`],
//! [`Factory`], [`Transport`], [`Producer`], [framing] and [policies]. There are no
//! sockets in this crate.
//!
//! Most programs depend on the facade crate `bowline` and never name this one.
//!
//! [bowline]: https://docs.rs/bowline

#![forbid(unsafe_code)]
#![cfg_attr(not(test), warn(clippy::unwrap_used))]

mod address;
mod connection;
mod context;
mod datagram;
mod descriptors;
mod error;
mod factory;
mod file_sender;
pub mod framing;
mod log;
mod once;
mod packet;
pub mod policies;
mod process;
mod producer;
mod protocol;
mod reason;
mod transport;

pub use crate::address::{
    Address, AddressRef, Destination, FileAddress, UnixAddress, UnixAddressRef,
};
pub use crate::connection::{AnyConnection, ConnectionHandle, WriteObserver};
pub use crate::context::{AnyContext, Context};
pub use crate::datagram::{
    Datagram, DatagramCounts, DatagramHandle, DatagramProtocol, DatagramTransport,
    MulticastInterface, Offload, QueueLimits, SendRefusal, SendStatus, UdpHandle, UdpTransport,
    UnixDatagramHandle, UnixDatagramTransport, UnsentDatagram,
};
pub use crate::descriptors::{PassedDescriptor, ReceivedDescriptors};
pub use crate::error::{
    ConnectError, FailedAttempt, LookupError, RegisterProducerError, SendDescriptorError,
    SendDescriptorErrorKind,
};
pub use crate::factory::{
    Acceptor, BuildContext, Connector, ConnectorHandle, ConnectorState, Factory, Listener,
    ListenerHandle, Origin, SocketFile,
};
pub use crate::file_sender::{FileSendError, FileSendErrorKind, FileSender, FileSent};
pub use crate::once::Once;
pub use crate::packet::{Packet, PacketHandle, PacketProtocol, PacketTransport, UnsentPacket};
pub use crate::process::{
    ProcessContext, ProcessHandle, ProcessProtocol, ProcessStatus, ProcessTransport, SignalError,
    TerminalSize,
};
pub use crate::producer::{Producer, ProducerKind, ProducerRef};
pub use crate::protocol::{AfterReadClosed, AfterTruncation, AtDrain, Part, Protocol};
pub use crate::reason::{CloseReason, Remains};
pub use crate::transport::{
    Credentials, DescriptorLimits, Linger, LingeringClose, NotSent, TcpTransport, Transport,
    TransportHandle, TransportState, UnixTransport, UnixTransportHandle, Watermarks, WhenSent,
    WriteStatus,
};
