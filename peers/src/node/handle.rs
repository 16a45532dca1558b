//! The handles that are passed with messages.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileTypeExt as _;

use bowline::PassedDescriptor;
use bowline::process::describe_socket;

/// What Node makes of a descriptor that is passed with a message. The sender says it, and
/// nobody checks: a received descriptor can be anything.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum NodeHandleKind {
    /// A TCP or UNIX connection: `net.Socket`.
    Socket,
    /// A listening socket: `net.Server`.
    Server,
    /// A connection, a listening socket or a pipe, without a JavaScript object around it:
    /// `net.Native`.
    Native,
    /// A UDP socket: `dgram.Socket`.
    Datagrams {
        /// Whether it is an IPv6 socket (`udp6`).
        is_ipv6: bool,
    },
    /// A UDP socket without a JavaScript object around it: `dgram.Native`.
    NativeDatagrams,
    /// A kind that this version does not know.
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

    /// Returns Node's name for it.
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

/// A received handle.
#[derive(Debug)]
pub struct NodeHandle {
    /// What it is, as the peer says.
    pub kind: NodeHandleKind,
    /// The descriptor.
    pub fd: OwnedFd,
    /// The key by which the sender counts connections, until it is told that they are
    /// [closed](super::NodeContext::socket_closed). Its `server.close()` waits for that.
    pub key: Option<String>,
}

/// A handle to be sent.
#[derive(Debug)]
pub struct OutgoingHandle {
    /// What Node is to make of it.
    pub kind: NodeHandleKind,
    /// The descriptor: a socket or a pipe.
    pub fd: PassedDescriptor,
}

impl OutgoingHandle {
    /// Makes a handle of this kind.
    pub fn new(kind: NodeHandleKind, fd: impl Into<PassedDescriptor>) -> Self {
        let fd = fd.into();
        Self { kind, fd }
    }

    /// Whether libuv can handle the descriptor.
    pub(super) fn is_passable(&self) -> bool {
        let fd = self.fd.as_fd();
        describe_socket(fd).is_ok() || is_pipe(fd).unwrap_or(false)
    }
}

fn is_pipe(fd: BorrowedFd<'_>) -> io::Result<bool> {
    let file = File::from(fd.try_clone_to_owned()?);
    Ok(file.metadata()?.file_type().is_fifo())
}
