//! The names of sockets, to and from what the kernel reads and writes.
//!
//! Pure: fields are read and written one by one, at the offsets that the C structs
//! give. No type of std is taken for a C struct: their layouts are not promised.

#![forbid(unsafe_code)]

use std::ffi::OsStr;
use std::io;
use std::mem::offset_of;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::cmsg::field;

/// The most bytes in the path of a UNIX socket, and in an abstract name.
///
/// `sun_path` has 108: a path ends with a NUL, an abstract name begins with one.
pub(crate) const MAX_NAME_BYTES: usize = 107;

/// Bytes of the longest name of any family.
const NAME_BUFFER_BYTES: usize = size_of::<libc::sockaddr_storage>();

const INET4_BYTES: usize = size_of::<libc::sockaddr_in>();
const INET6_BYTES: usize = size_of::<libc::sockaddr_in6>();

/// Where the path starts, which is also how long an unnamed name is.
const PATH_AT: usize = offset_of!(libc::sockaddr_un, sun_path);

const _: () = assert!(PATH_AT + 1 + MAX_NAME_BYTES == size_of::<libc::sockaddr_un>());
const _: () = assert!(offset_of!(libc::sockaddr_storage, ss_family) == 0);

/// What a socket is called.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub(crate) enum SocketName {
    /// An IP address and port; with IPv6, flow and scope too, both as the kernel
    /// has them.
    Inet(SocketAddr),
    /// A UNIX socket without a name. Binding to it has the kernel choose an
    /// abstract one.
    UnixUnnamed,
    /// A UNIX socket in the file system.
    UnixPath(PathBuf),
    /// A UNIX socket in the abstract namespace: any bytes, NUL included, without
    /// the NUL that marks it abstract.
    UnixAbstract(Vec<u8>),
    /// Of a family that is not known here, or too short to be what its family
    /// says.
    Other(u16),
}

/// A [`SocketName`] in somebody else's memory: in that of a message that was received, or
/// waits to be sent.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub(crate) enum NameRef<'a> {
    /// As [`SocketName::Inet`].
    Inet(SocketAddr),
    /// As [`SocketName::UnixUnnamed`].
    UnixUnnamed,
    /// As [`SocketName::UnixPath`].
    UnixPath(&'a Path),
    /// As [`SocketName::UnixAbstract`].
    UnixAbstract(&'a [u8]),
    /// As [`SocketName::Other`].
    Other(u16),
}

impl SocketName {
    /// Reads the name that the kernel wrote. Any bytes will do.
    ///
    /// Allocates for a UNIX socket that has a name, and for nothing else.
    #[inline]
    pub(super) fn decode(bytes: &[u8]) -> Self {
        match NameRef::decode(bytes) {
            NameRef::Inet(address) => Self::Inet(address),
            NameRef::UnixUnnamed => Self::UnixUnnamed,
            NameRef::UnixPath(path) => Self::UnixPath(path.to_owned()),
            NameRef::UnixAbstract(name) => Self::UnixAbstract(name.to_owned()),
            NameRef::Other(family) => Self::Other(family),
        }
    }

    /// Writes the name for the kernel to read.
    ///
    /// # Errors
    /// As [`NameRef::encode`].
    pub(super) fn encode(&self) -> io::Result<NameBuffer> {
        self.as_ref().encode()
    }

    /// The same, lent.
    pub(crate) fn as_ref(&self) -> NameRef<'_> {
        match self {
            Self::Inet(address) => NameRef::Inet(*address),
            Self::UnixUnnamed => NameRef::UnixUnnamed,
            Self::UnixPath(path) => NameRef::UnixPath(path),
            Self::UnixAbstract(name) => NameRef::UnixAbstract(name),
            Self::Other(family) => NameRef::Other(*family),
        }
    }
}

impl<'a> NameRef<'a> {
    /// Reads the name that the kernel wrote, or that was [encoded](Self::encode). Any
    /// bytes will do.
    #[inline]
    pub(crate) fn decode(bytes: &'a [u8]) -> Self {
        let Some(family) = bytes.first_chunk() else {
            return Self::UnixUnnamed;
        };
        let family = u16::from_ne_bytes(*family);
        match i32::from(family) {
            libc::AF_INET => {
                if let Some(name) = bytes.first_chunk::<INET4_BYTES>() {
                    return Self::Inet(decode_inet4(name));
                }
            }
            libc::AF_INET6 => {
                if let Some(name) = bytes.first_chunk::<INET6_BYTES>() {
                    return Self::Inet(decode_inet6(name));
                }
            }
            libc::AF_UNIX => return Self::decode_unix(&bytes[PATH_AT..]),
            _ => {}
        }
        Self::Other(family)
    }

    #[inline]
    fn decode_unix(path: &'a [u8]) -> Self {
        match path {
            [] => Self::UnixUnnamed,
            [0, name @ ..] => Self::UnixAbstract(name),
            _ => {
                // The length counts the closing NUL if there is one, which there is
                // not where somebody bound 108 bytes.
                let end = path.iter().position(|&byte| byte == 0);
                let path = &path[..end.unwrap_or(path.len())];
                Self::UnixPath(Path::new(OsStr::from_bytes(path)))
            }
        }
    }

    /// Writes the name for the kernel to read.
    ///
    /// # Errors
    /// `InvalidInput` for a path that is empty, longer than [`MAX_NAME_BYTES`]
    /// or has a NUL in it, for an abstract name longer than that, and for
    /// [`NameRef::Other`].
    pub(crate) fn encode(self) -> io::Result<NameBuffer> {
        let mut name = NameBuffer::new();
        match self {
            Self::Inet(SocketAddr::V4(address)) => encode_inet4(&address, &mut name),
            Self::Inet(SocketAddr::V6(address)) => encode_inet6(&address, &mut name),
            Self::UnixUnnamed => {
                name.put_family(libc::AF_UNIX);
                name.length = PATH_AT;
            }
            Self::UnixPath(path) => encode_path(path, &mut name)?,
            Self::UnixAbstract(bytes) => {
                if bytes.len() > MAX_NAME_BYTES {
                    return Err(invalid("abstract name is longer than 107 bytes"));
                }
                name.put_family(libc::AF_UNIX);
                // The NUL in front is there already.
                name.put(PATH_AT + 1, bytes);
                name.length = PATH_AT + 1 + bytes.len();
            }
            Self::Other(_) => return Err(invalid("address family cannot be used here")),
        }
        Ok(name)
    }
}

/// A name in the kernel's form, or room for one; aligned as the kernel's
/// structs are.
///
/// Zeroed when made, which is a handful of instructions and saves thinking of what the
/// kernel left out.
#[repr(C)]
pub(crate) struct NameBuffer {
    _align: [libc::sockaddr_storage; 0],
    bytes: [u8; NAME_BUFFER_BYTES],
    /// Invariant: at most `NAME_BUFFER_BYTES`.
    length: usize,
}

impl NameBuffer {
    /// For how many bytes there is room, at the beginning of one.
    pub(super) const ROOM: usize = NAME_BUFFER_BYTES;

    #[inline]
    pub(super) const fn new() -> Self {
        Self {
            _align: [],
            bytes: [0; NAME_BUFFER_BYTES],
            length: 0,
        }
    }

    /// All of the room, for the kernel to write to.
    #[inline]
    pub(super) fn bytes_mut(&mut self) -> &mut [u8; NAME_BUFFER_BYTES] {
        &mut self.bytes
    }

    /// The first `length` bytes, as far as they fit: the kernel answers the length
    /// that a name has, which can be more than it could write.
    #[inline]
    pub(super) fn prefix(&self, length: usize) -> &[u8] {
        &self.bytes[..length.min(NAME_BUFFER_BYTES)]
    }

    /// The bytes that were encoded.
    #[inline]
    pub(crate) fn as_bytes(&self) -> &[u8] {
        self.prefix(self.length)
    }

    fn put_family(&mut self, family: libc::c_int) {
        let family = libc::sa_family_t::try_from(family).expect("families are small numbers");
        self.put(0, &family.to_ne_bytes());
    }

    fn put(&mut self, at: usize, field: &[u8]) {
        self.bytes[at..at + field.len()].copy_from_slice(field);
    }
}

#[inline]
fn decode_inet4(name: &[u8; INET4_BYTES]) -> SocketAddr {
    let octets: [u8; 4] = field(name, offset_of!(libc::sockaddr_in, sin_addr));
    let port = field(name, offset_of!(libc::sockaddr_in, sin_port));
    SocketAddrV4::new(Ipv4Addr::from(octets), u16::from_be_bytes(port)).into()
}

#[inline]
fn decode_inet6(name: &[u8; INET6_BYTES]) -> SocketAddr {
    let octets: [u8; 16] = field(name, offset_of!(libc::sockaddr_in6, sin6_addr));
    let port = field(name, offset_of!(libc::sockaddr_in6, sin6_port));
    let flow = field(name, offset_of!(libc::sockaddr_in6, sin6_flowinfo));
    let scope = field(name, offset_of!(libc::sockaddr_in6, sin6_scope_id));
    SocketAddrV6::new(
        Ipv6Addr::from(octets),
        u16::from_be_bytes(port),
        // Not turned round: std has it as the kernel does, and names must come
        // out equal to those that std makes.
        u32::from_ne_bytes(flow),
        u32::from_ne_bytes(scope),
    )
    .into()
}

fn encode_inet4(address: &SocketAddrV4, name: &mut NameBuffer) {
    name.put_family(libc::AF_INET);
    name.put(
        offset_of!(libc::sockaddr_in, sin_port),
        &address.port().to_be_bytes(),
    );
    name.put(
        offset_of!(libc::sockaddr_in, sin_addr),
        &address.ip().octets(),
    );
    name.length = INET4_BYTES;
}

fn encode_inet6(address: &SocketAddrV6, name: &mut NameBuffer) {
    name.put_family(libc::AF_INET6);
    name.put(
        offset_of!(libc::sockaddr_in6, sin6_port),
        &address.port().to_be_bytes(),
    );
    name.put(
        offset_of!(libc::sockaddr_in6, sin6_flowinfo),
        &address.flowinfo().to_ne_bytes(),
    );
    name.put(
        offset_of!(libc::sockaddr_in6, sin6_addr),
        &address.ip().octets(),
    );
    name.put(
        offset_of!(libc::sockaddr_in6, sin6_scope_id),
        &address.scope_id().to_ne_bytes(),
    );
    name.length = INET6_BYTES;
}

fn encode_path(path: &Path, name: &mut NameBuffer) -> io::Result<()> {
    let path = path.as_os_str().as_bytes();
    if path.is_empty() {
        // Would bind to an abstract name of the kernel's choice.
        return Err(invalid("socket path is empty"));
    }
    if path.contains(&0) {
        // Would bind to another file, or to an abstract name.
        return Err(invalid("socket path has a NUL in it"));
    }
    if path.len() > MAX_NAME_BYTES {
        return Err(invalid("socket path is longer than 107 bytes"));
    }
    name.put_family(libc::AF_UNIX);
    name.put(PATH_AT, path);
    // The NUL behind it is there already and counted.
    name.length = PATH_AT + path.len() + 1;
    Ok(())
}

#[cold]
fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, what)
}
