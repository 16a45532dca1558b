//! Where a transport stands, and with whom it talks.

use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::rc::Rc;

/// The address of one end of a connection, or of a listener.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Address {
    /// TCP over IPv4 or IPv6.
    Inet(SocketAddr),
    /// A UNIX socket.
    Unix(UnixAddress),
}

/// Where a connector connects to, as it was asked.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Destination {
    /// One address.
    Address(Address),
    /// A host, whose addresses are looked up for each attempt.
    Host {
        /// Its name, or an IP address in writing.
        name: Rc<str>,
        /// The TCP port.
        port: u16,
    },
}

/// The address of a UNIX socket; see unix(7).
///
/// Compared by bytes: two paths that lead to one file are two addresses.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum UnixAddress {
    /// Not bound: a client that did not ask for an address, or either end of a
    /// socketpair.
    Unnamed,
    /// A file; at most 107 bytes.
    Path(PathBuf),
    /// A name in the abstract namespace of Linux, without the leading NUL; at
    /// most 107 bytes. Anyone in the network namespace may connect to it:
    /// there are no permissions.
    Abstract(Vec<u8>),
}

impl Address {
    /// The IP address and port, for TCP.
    pub fn as_inet(&self) -> Option<SocketAddr> {
        match self {
            Self::Inet(address) => Some(*address),
            Self::Unix(_) => None,
        }
    }

    /// The UNIX address, for a UNIX socket.
    pub fn as_unix(&self) -> Option<&UnixAddress> {
        match self {
            Self::Inet(_) => None,
            Self::Unix(address) => Some(address),
        }
    }
}

impl UnixAddress {
    /// The file, if it is one.
    pub fn as_path(&self) -> Option<&Path> {
        match self {
            Self::Path(path) => Some(path),
            Self::Unnamed | Self::Abstract(_) => None,
        }
    }
}

impl Destination {
    /// The address, where it is one.
    pub fn as_address(&self) -> Option<&Address> {
        match self {
            Self::Address(address) => Some(address),
            Self::Host { .. } => None,
        }
    }
}

impl<A: Into<Address>> From<A> for Destination {
    fn from(address: A) -> Self {
        Self::Address(address.into())
    }
}

/// `example.org:80`, or the address.
impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            // An IPv6 address in writing.
            Self::Host { name, port } if name.contains(':') => write!(f, "[{name}]:{port}"),
            Self::Host { name, port } => write!(f, "{name}:{port}"),
        }
    }
}

impl From<SocketAddr> for Address {
    fn from(address: SocketAddr) -> Self {
        Self::Inet(address)
    }
}

impl From<UnixAddress> for Address {
    fn from(address: UnixAddress) -> Self {
        Self::Unix(address)
    }
}

/// A path. For a name in the abstract namespace use
/// [`UnixAddress::Abstract`].
impl<P: Into<PathBuf>> From<P> for UnixAddress {
    fn from(path: P) -> Self {
        Self::Path(path.into())
    }
}

/// `192.0.2.1:80`, `[2001:db8::1]:80`, or the UNIX address.
impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Inet(address) => address.fmt(f),
            Self::Unix(address) => address.fmt(f),
        }
    }
}

/// The path, `@name` for the abstract namespace, or `unnamed`.
impl fmt::Display for UnixAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unnamed => f.write_str("unnamed"),
            Self::Path(path) => path.display().fmt(f),
            Self::Abstract(name) => write!(f, "@{}", name.escape_ascii()),
        }
    }
}
