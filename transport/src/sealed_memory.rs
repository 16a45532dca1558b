//! Bytes behind a descriptor, which nobody can change any more.

use std::ffi::CString;
use std::fmt;
use std::fs::File;
use std::io::{self, Write as _};
use std::ops::Deref;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::sys;

/// Sealed memory behind a descriptor. Nobody who holds the descriptor can change its
/// bytes or their number any more (memfd_create(2), `F_ADD_SEALS`). Use it for data
/// that is too large for a message, or that goes to many receivers.
///
/// The sender makes it of bytes, and passes the descriptor. The receiver makes it of
/// the descriptor, which is checked. Both read the bytes as a slice. The memory is
/// mapped, not copied.
///
/// # Examples
///
/// ```
/// use bowline::descriptor::SealedMemory;
///
/// let picture = vec![7; 100_000];
/// let sent = SealedMemory::new("picture", &picture)?.into_descriptor();
///
/// // In the other process.
/// let received = SealedMemory::from_descriptor(sent, 1 << 20)?;
/// assert_eq!(received.len(), 100_000);
/// assert!(received.iter().all(|byte| *byte == 7));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// Memory that is not sealed could change or be cut off while it is read, so it is
/// refused:
///
/// ```
/// use std::fs::File;
/// use bowline::descriptor::{SealedMemory, SealedMemoryErrorKind};
///
/// let file = File::open("/proc/self/exe")?;
/// let refused = SealedMemory::from_descriptor(file.into(), 1 << 20).unwrap_err();
/// assert!(matches!(refused.kind, SealedMemoryErrorKind::NotSealed));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct SealedMemory {
    mapping: sys::Mapping,
    fd: OwnedFd,
}

impl SealedMemory {
    /// Makes sealed memory with a copy of `bytes`. `name` is shown in /proc, and need
    /// not be unique. It is cut to 249 bytes.
    ///
    /// # Errors
    ///
    /// `InvalidInput` if the name has a null byte. `EMFILE` or `ENFILE` if no
    /// descriptor number is free, `ENOMEM`.
    pub fn new(name: &str, bytes: &[u8]) -> io::Result<Self> {
        let most = name.floor_char_boundary(MOST_NAME_BYTES);
        let name = CString::new(&name[..most]).map_err(|_| io::ErrorKind::InvalidInput)?;
        let mut file = File::from(sys::memory_file(&name)?);
        file.write_all(bytes)?;
        let fd = OwnedFd::from(file);
        sys::seal(fd.as_fd())?;
        let mapping = sys::Mapping::new(fd.as_fd(), bytes.len())?;
        Ok(Self { mapping, fd })
    }

    /// Makes sealed memory of a descriptor that came from elsewhere, if it has at most
    /// `most` bytes.
    ///
    /// # Errors
    ///
    /// [`SealedMemoryError`] gives the descriptor back.
    pub fn from_descriptor(fd: OwnedFd, most: usize) -> Result<Self, SealedMemoryError> {
        match check(fd.as_fd(), most) {
            Ok(mapping) => Ok(Self { mapping, fd }),
            Err(kind) => Err(SealedMemoryError { kind, fd }),
        }
    }

    /// Turns it into its descriptor, to be passed. The bytes are not mapped here any
    /// more.
    pub fn into_descriptor(self) -> OwnedFd {
        self.fd
    }
}

/// The longest name that memfd_create(2) takes.
const MOST_NAME_BYTES: usize = 249;

fn check(fd: BorrowedFd<'_>, most: usize) -> Result<sys::Mapping, SealedMemoryErrorKind> {
    // A descriptor that cannot have seals is not sealed either.
    if !sys::is_sealed(fd).unwrap_or(false) {
        return Err(SealedMemoryErrorKind::NotSealed);
    }
    let copy = fd.try_clone_to_owned().map_err(SealedMemoryErrorKind::Os)?;
    let metadata = File::from(copy).metadata();
    let length = metadata.map_err(SealedMemoryErrorKind::Os)?.len();
    match usize::try_from(length) {
        Ok(bytes) if bytes <= most => {
            sys::Mapping::new(fd, bytes).map_err(SealedMemoryErrorKind::Os)
        }
        _ => Err(SealedMemoryErrorKind::TooLong { length }),
    }
}

impl Deref for SealedMemory {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.mapping.bytes()
    }
}

impl AsRef<[u8]> for SealedMemory {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl AsFd for SealedMemory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl From<SealedMemory> for OwnedFd {
    fn from(memory: SealedMemory) -> Self {
        memory.into_descriptor()
    }
}

/// Shows how many bytes there are, but not the bytes.
impl fmt::Debug for SealedMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SealedMemory")
            .field("fd", &self.fd)
            .field("length", &self.len())
            .finish()
    }
}

/// A descriptor was not taken for sealed memory. Dropping the error closes it.
#[derive(Debug)]
pub struct SealedMemoryError {
    /// The reason.
    pub kind: SealedMemoryErrorKind,
    /// The descriptor.
    pub fd: OwnedFd,
}

/// Why a descriptor was not taken for sealed memory.
#[derive(Debug)]
#[non_exhaustive]
pub enum SealedMemoryErrorKind {
    /// Its bytes or their number can still change, or it is something else.
    NotSealed,
    /// It has more bytes than the limit.
    TooLong {
        /// How many bytes it has.
        length: u64,
    },
    /// The system refused, mostly to map it.
    Os(io::Error),
}

impl fmt::Display for SealedMemoryError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.kind {
            SealedMemoryErrorKind::NotSealed => f.write_str("the descriptor is no sealed memory"),
            SealedMemoryErrorKind::TooLong { length } => {
                write!(f, "sealed memory has {length} bytes, which are too many")
            }
            SealedMemoryErrorKind::Os(error) => write!(f, "cannot read sealed memory: {error}"),
        }
    }
}

impl std::error::Error for SealedMemoryError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match &self.kind {
            SealedMemoryErrorKind::Os(error) => Some(error),
            _ => None,
        }
    }
}

impl From<SealedMemoryError> for io::Error {
    /// Closes the descriptor.
    fn from(error: SealedMemoryError) -> Self {
        match error.kind {
            SealedMemoryErrorKind::Os(error) => error,
            kind => Self::new(
                io::ErrorKind::InvalidData,
                SealedMemoryError { kind, fd: error.fd },
            ),
        }
    }
}
