//! The names of sockets, converted from and to the bytes that the kernel reads and writes.
//!
//! Pure: fields are read and written one by one, at the offsets of the C structs. No type
//! of std is used as a C struct, since their layouts are not promised.

#![forbid(unsafe_code)]

use std::ffi::OsStr;
use std::io;
use std::mem::offset_of;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::cmsg::field;

/// The most bytes in the path of a UNIX socket, or in an abstract name.
///
/// `sun_path` has 108: a path ends with a NUL, and an abstract name begins with one.
pub(crate) const MAX_NAME_BYTES: usize = 107;

/// The size of the longest name of any family, in bytes.
const NAME_BUFFER_BYTES: usize = size_of::<libc::sockaddr_storage>();

pub(crate) const INET4_BYTES: usize = size_of::<libc::sockaddr_in>();
const INET6_BYTES: usize = size_of::<libc::sockaddr_in6>();

/// The offset of the path, which is also the length of an unnamed name.
const PATH_AT: usize = offset_of!(libc::sockaddr_un, sun_path);

const _: () = assert!(PATH_AT + 1 + MAX_NAME_BYTES == size_of::<libc::sockaddr_un>());
const _: () = assert!(offset_of!(libc::sockaddr_storage, ss_family) == 0);

/// The name of a socket.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub(crate) enum SocketName {
    /// An IP address and port. With IPv6, also flow and scope as the kernel has them.
    Inet(SocketAddr),
    /// A UNIX socket without a name. If a socket is bound to it, the kernel chooses an
    /// abstract name.
    UnixUnnamed,
    /// A UNIX socket with a path in the file system.
    UnixPath(PathBuf),
    /// A UNIX socket in the abstract namespace. The name is any bytes, NUL included,
    /// without the NUL that marks it as abstract.
    UnixAbstract(Vec<u8>),
    /// A name of an unknown family, or one that is too short for its family.
    Other(u16),
}

/// A [`SocketName`] in somebody else's memory: in a message that was received, or that
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
    /// Decodes a name that the kernel has written. It accepts any bytes.
    ///
    /// Allocates only for a UNIX socket with a name.
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

    /// Encodes the name for the kernel.
    ///
    /// # Errors
    /// As [`NameRef::encode`].
    pub(super) fn encode(&self) -> io::Result<NameBuffer> {
        self.as_ref().encode()
    }

    /// Returns the same name, borrowed.
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
    /// Decodes a name that the kernel has written, or that was [encoded](Self::encode). It
    /// accepts any bytes.
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

    /// Encodes the name for the kernel.
    ///
    /// # Errors
    /// `InvalidInput` for a path that is empty, longer than [`MAX_NAME_BYTES`] or contains
    /// a NUL; for an abstract name that is longer; and for [`NameRef::Other`].
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

/// An encoded name, or room for one, aligned like the kernel's structs.
///
/// It is zeroed when it is made. That costs a handful of instructions, and nobody has to
/// think about what the kernel has left out.
#[repr(C)]
pub(crate) struct NameBuffer {
    _align: [libc::sockaddr_storage; 0],
    bytes: [u8; NAME_BUFFER_BYTES],
    /// Invariant: at most `NAME_BUFFER_BYTES`.
    length: usize,
}

impl NameBuffer {
    /// How many bytes the kernel may write.
    pub(super) const ROOM: usize = NAME_BUFFER_BYTES;

    #[inline]
    pub(super) const fn new() -> Self {
        Self {
            _align: [],
            bytes: [0; NAME_BUFFER_BYTES],
            length: 0,
        }
    }

    /// Returns all of the room, for the kernel to write to.
    #[inline]
    pub(super) fn bytes_mut(&mut self) -> &mut [u8; NAME_BUFFER_BYTES] {
        &mut self.bytes
    }

    /// Returns the first `length` bytes, as far as they fit. The kernel reports the full
    /// length of a name, which can be more than it could write.
    #[inline]
    pub(super) fn prefix(&self, length: usize) -> &[u8] {
        &self.bytes[..length.min(NAME_BUFFER_BYTES)]
    }

    /// Returns the encoded bytes.
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

/// A name of IPv4 in the kernel's form, by itself: it is what most datagrams go to.
#[inline]
pub(crate) fn inet4_name(address: &SocketAddrV4) -> [u8; INET4_BYTES] {
    const PORT_AT: usize = offset_of!(libc::sockaddr_in, sin_port);
    const ADDRESS_AT: usize = offset_of!(libc::sockaddr_in, sin_addr);
    let mut name = [0; INET4_BYTES];
    name[..2].copy_from_slice(&(libc::AF_INET as libc::sa_family_t).to_ne_bytes());
    name[PORT_AT..PORT_AT + 2].copy_from_slice(&address.port().to_be_bytes());
    name[ADDRESS_AT..ADDRESS_AT + 4].copy_from_slice(&address.ip().octets());
    name
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
    name.put(0, &inet4_name(address));
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
