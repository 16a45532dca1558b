//! The addresses of both ends of a transport.

use std::fmt;
use std::net::SocketAddr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;

/// The address of one end of a connection, or of a listener.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Address {
    /// TCP or UDP, over IPv4 or IPv6.
    Inet(SocketAddr),
    /// A UNIX socket.
    Unix(UnixAddress),
    /// Something that is no socket: a pipe, a terminal, a file.
    File(FileAddress),
}

/// The place that a connector was asked to connect to.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Destination {
    /// One address.
    Address(Address),
    /// A host. Its addresses are looked up for each attempt.
    Host {
        /// Its name, or an IP address as text.
        name: Rc<str>,
        /// The TCP port.
        port: u16,
    },
}

/// The address of a UNIX socket; see unix(7).
///
/// Addresses are compared by their bytes: two paths that lead to the same file are two
/// addresses.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum UnixAddress {
    /// Not bound: a client that did not ask for an address, or either end of a
    /// socketpair. To bind or listen with it means that the kernel chooses a free
    /// abstract name of five hexadecimal digits (unix(7), "Autobind").
    Unnamed,
    /// The path of a file; at most 107 bytes.
    Path(PathBuf),
    /// A name in the abstract namespace of Linux, without the leading NUL; at
    /// most 107 bytes. It has no permissions: anyone in the network namespace may
    /// connect to it.
    Abstract(Vec<u8>),
}

/// The address of a connection that has no socket: the file that its descriptor is.
///
/// Such a connection has no name for its peer, so both of its ends have this address.
/// (Twisted: `PipeAddress`.)
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum FileAddress {
    /// It is nowhere in the file system: a pipe, or a file that was deleted.
    Unnamed,
    /// A file of any kind: a FIFO, a terminal (`/dev/pts/3`), a device. This is the
    /// path that the kernel knew it by when the connection began.
    Path(PathBuf),
}

/// An [`Address`] that somebody else has: what a datagram says of its sender, without an
/// allocation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum AddressRef<'a> {
    /// IPv4 or IPv6, with its port.
    Inet(SocketAddr),
    /// A UNIX socket.
    Unix(UnixAddressRef<'a>),
    /// What is no socket.
    File(&'a FileAddress),
}

/// A [`UnixAddress`] that somebody else has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum UnixAddressRef<'a> {
    /// As [`UnixAddress::Unnamed`].
    Unnamed,
    /// As [`UnixAddress::Path`].
    Path(&'a Path),
    /// As [`UnixAddress::Abstract`].
    Abstract(&'a [u8]),
}

impl AddressRef<'_> {
    /// The address, to be kept.
    pub fn to_address(self) -> Address {
        match self {
            Self::Inet(address) => Address::Inet(address),
            Self::Unix(address) => Address::Unix(address.to_address()),
            Self::File(address) => Address::File(address.clone()),
        }
    }

    /// The IP address and port, if it is one.
    pub fn as_inet(self) -> Option<SocketAddr> {
        match self {
            Self::Inet(address) => Some(address),
            Self::Unix(_) | Self::File(_) => None,
        }
    }
}

impl UnixAddressRef<'_> {
    /// The address, to be kept.
    pub fn to_address(self) -> UnixAddress {
        match self {
            Self::Unnamed => UnixAddress::Unnamed,
            Self::Path(path) => UnixAddress::Path(path.to_owned()),
            Self::Abstract(name) => UnixAddress::Abstract(name.to_owned()),
        }
    }
}

impl Address {
    /// The same, lent.
    pub fn as_ref(&self) -> AddressRef<'_> {
        match self {
            Self::Inet(address) => AddressRef::Inet(*address),
            Self::Unix(address) => AddressRef::Unix(address.as_ref()),
            Self::File(address) => AddressRef::File(address),
        }
    }

    /// The IP address and port, for TCP and UDP.
    pub fn as_inet(&self) -> Option<SocketAddr> {
        match self {
            Self::Inet(address) => Some(*address),
            Self::Unix(_) | Self::File(_) => None,
        }
    }

    /// The UNIX address, for a UNIX socket.
    pub fn as_unix(&self) -> Option<&UnixAddress> {
        match self {
            Self::Unix(address) => Some(address),
            Self::Inet(_) | Self::File(_) => None,
        }
    }

    /// The file, for a connection that has no socket.
    pub fn as_file(&self) -> Option<&FileAddress> {
        match self {
            Self::File(address) => Some(address),
            Self::Inet(_) | Self::Unix(_) => None,
        }
    }
}

impl FileAddress {
    /// The path, if it has one.
    pub fn as_path(&self) -> Option<&Path> {
        match self {
            Self::Path(path) => Some(path),
            Self::Unnamed => None,
        }
    }
}

impl UnixAddress {
    /// The same, lent.
    pub fn as_ref(&self) -> UnixAddressRef<'_> {
        match self {
            Self::Unnamed => UnixAddressRef::Unnamed,
            Self::Path(path) => UnixAddressRef::Path(path),
            Self::Abstract(name) => UnixAddressRef::Abstract(name),
        }
    }

    /// The path, if the address is one.
    pub fn as_path(&self) -> Option<&Path> {
        match self {
            Self::Path(path) => Some(path),
            Self::Unnamed | Self::Abstract(_) => None,
        }
    }
}

impl Destination {
    /// The address, unless it is a host name.
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

impl From<SocketAddr> for AddressRef<'_> {
    fn from(address: SocketAddr) -> Self {
        Self::Inet(address)
    }
}

impl<'a> From<UnixAddressRef<'a>> for AddressRef<'a> {
    fn from(address: UnixAddressRef<'a>) -> Self {
        Self::Unix(address)
    }
}

impl<'a> From<&'a UnixAddress> for AddressRef<'a> {
    fn from(address: &'a UnixAddress) -> Self {
        Self::Unix(address.as_ref())
    }
}

impl<'a> From<&'a Address> for AddressRef<'a> {
    fn from(address: &'a Address) -> Self {
        address.as_ref()
    }
}

impl From<FileAddress> for Address {
    fn from(address: FileAddress) -> Self {
        Self::File(address)
    }
}

/// A path. If it begins with `@`, the rest is a name in the abstract namespace, as
/// systemd, Go and ss(8) write it.
///
/// For a file whose name begins with `@`, write `./@name`, or [`UnixAddress::Path`]. An
/// abstract name has no permissions, so if an address comes from a configuration, check
/// which of the two it has become.
///
/// # Examples
///
/// ```
/// use bowline::UnixAddress;
///
/// assert_eq!(UnixAddress::from("@bus"), UnixAddress::Abstract(b"bus".to_vec()));
/// assert_eq!(UnixAddress::from("/run/bus"), UnixAddress::Path("/run/bus".into()));
/// ```
impl<P: Into<PathBuf>> From<P> for UnixAddress {
    fn from(path: P) -> Self {
        let path = path.into();
        match path.as_os_str().as_bytes() {
            [b'@', name @ ..] => Self::Abstract(name.to_vec()),
            _ => Self::Path(path),
        }
    }
}

/// `192.0.2.1:80`, `[2001:db8::1]:80`, the UNIX address, or the file.
impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.as_ref().fmt(f)
    }
}

/// As [`Address`].
impl fmt::Display for AddressRef<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Inet(address) => address.fmt(f),
            Self::Unix(address) => address.fmt(f),
            Self::File(address) => address.fmt(f),
        }
    }
}

/// The path. Without one `a pipe`, which it is most often then.
impl fmt::Display for FileAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unnamed => f.write_str("a pipe"),
            Self::Path(path) => path.display().fmt(f),
        }
    }
}

/// The path, `@name` for the abstract namespace, or `unnamed`.
impl fmt::Display for UnixAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.as_ref().fmt(f)
    }
}

/// As [`UnixAddress`].
impl fmt::Display for UnixAddressRef<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unnamed => f.write_str("unnamed"),
            Self::Path(path) => path.display().fmt(f),
            Self::Abstract(name) => write!(f, "@{}", name.escape_ascii()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    /// Contract E-19.
    #[test]
    fn unix_addresses_are_compared_by_their_bytes() {
        let names = [
            UnixAddress::Unnamed,
            UnixAddress::from("/run/a"),
            UnixAddress::from("/run/../run/a"),
            UnixAddress::Abstract(b"/run/a".to_vec()),
            UnixAddress::Abstract(b"/run/a\0".to_vec()),
        ];
        let different: HashSet<_> = names.iter().cloned().collect();
        assert_eq!(different.len(), names.len());
        assert_eq!(names[1], UnixAddress::from("/run/a".to_owned()));
        assert!(different.contains(&UnixAddress::Abstract(b"/run/a".to_vec())));
    }

    #[test]
    fn a_name_that_begins_with_an_at_sign_is_abstract() {
        for name in ["@bus", "@"] {
            let address = UnixAddress::from(name);
            assert_eq!(address, UnixAddress::Abstract(name.as_bytes()[1..].into()));
            assert_eq!(address.to_string(), name);
        }
        for path in ["./@bus", "/run/@bus", "bus@"] {
            assert_eq!(UnixAddress::from(path), UnixAddress::Path(path.into()));
        }
    }

    #[test]
    fn what_is_no_socket_is_called_by_its_path() {
        let terminal = Address::from(FileAddress::Path("/dev/pts/3".into()));
        assert_eq!(terminal.to_string(), "/dev/pts/3");
        let pipe = Address::from(FileAddress::Unnamed);
        assert_eq!(pipe.to_string(), "a pipe");
        assert_eq!(pipe.as_file(), Some(&FileAddress::Unnamed));
        assert_eq!((pipe.as_inet(), pipe.as_unix()), (None, None));
        assert_eq!(Address::from(UnixAddress::Unnamed).as_file(), None);
    }

    #[test]
    fn destinations_are_written_as_one_would_type_them() {
        let host = |name: &str| Destination::Host {
            name: name.into(),
            port: 80,
        };
        assert_eq!(host("example.org").to_string(), "example.org:80");
        assert_eq!(host("::1").to_string(), "[::1]:80");
        let address: SocketAddr = "[::1]:80".parse().unwrap();
        assert_eq!(Destination::from(address).to_string(), "[::1]:80");
        assert_eq!(host("::1").as_address(), None);
    }
}
