//! What travels with a message.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileTypeExt as _;

use bowline::PassedDescriptor;
use bowline::process::describe_socket;

/// What Node makes of a descriptor that comes with a message. The peer says it, and nobody
/// has checked it: what is received can be anything.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum NodeHandleKind {
    /// A connection, TCP or UNIX: `net.Socket`.
    Socket,
    /// A listening socket: `net.Server`.
    Server,
    /// Either, or a pipe, without an object of JavaScript around it: `net.Native`.
    Native,
    /// A UDP socket: `dgram.Socket`.
    Datagrams {
        /// Whether it is of IPv6 (`udp6`).
        is_ipv6: bool,
    },
    /// A UDP socket without an object around it: `dgram.Native`.
    NativeDatagrams,
    /// One that this version does not know.
    Other(String),
}

impl NodeHandleKind {
    pub(super) fn of(kind: &str, datagrams: Option<&str>) -> Self {
        match kind {
            "net.Socket" => Self::Socket,
            "net.Server" => Self::Server,
            "net.Native" => Self::Native,
            "dgram.Socket" => Self::Datagrams {
                is_ipv6: datagrams == Some("udp6"),
            },
            "dgram.Native" => Self::NativeDatagrams,
            other => Self::Other(other.to_owned()),
        }
    }

    /// As Node calls it.
    pub fn name(&self) -> &str {
        match self {
            Self::Socket => "net.Socket",
            Self::Server => "net.Server",
            Self::Native => "net.Native",
            Self::Datagrams { .. } => "dgram.Socket",
            Self::NativeDatagrams => "dgram.Native",
            Self::Other(name) => name,
        }
    }
}

/// A handle that was received.
#[derive(Debug)]
pub struct NodeHandle {
    /// What the peer says it is.
    pub kind: NodeHandleKind,
    /// The descriptor.
    pub fd: OwnedFd,
    /// The sender counts connections by this key, until it is told that they are
    /// [closed](super::NodeContext::socket_closed): its `server.close()` waits for that.
    pub key: Option<String>,
}

/// A handle that is to be sent.
#[derive(Debug)]
pub struct OutgoingHandle {
    /// What Node is to make of it.
    pub kind: NodeHandleKind,
    /// The descriptor: a socket or a pipe.
    pub fd: PassedDescriptor,
}

impl OutgoingHandle {
    /// A handle of this kind.
    pub fn new(kind: NodeHandleKind, fd: impl Into<PassedDescriptor>) -> Self {
        let fd = fd.into();
        Self { kind, fd }
    }

    /// Whether libuv survives it.
    pub(super) fn is_passable(&self) -> bool {
        let fd = self.fd.as_fd();
        describe_socket(fd).is_ok() || is_pipe(fd).unwrap_or(false)
    }
}

fn is_pipe(fd: BorrowedFd<'_>) -> io::Result<bool> {
    let file = File::from(fd.try_clone_to_owned()?);
    Ok(file.metadata()?.file_type().is_fifo())
}
