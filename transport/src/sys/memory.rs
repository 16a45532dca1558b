//! Memory behind a descriptor: sealed files, and counters.

#![allow(unsafe_code)]

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::{self, NonNull};
use std::slice;

use super::retry;

/// The seals that keep the bytes from changing while they are read. The last one keeps
/// seals from being added; none can be removed.
const SEALS: libc::c_int =
    libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_WRITE | libc::F_SEAL_SEAL;

/// Makes the file not executable, and seals that; since Linux 6.3. The C library's bindings
/// may not have it.
const MFD_NOEXEC_SEAL: libc::c_uint = 0x0008;

/// Makes a file in memory that can be sealed.
///
/// # Errors
/// `EMFILE` or `ENFILE` if no descriptor number is free. Otherwise the kernel's.
///
/// References: memfd_create(2).
#[doc(alias = "memfd_create")]
pub(crate) fn memory_file(name: &CStr) -> io::Result<OwnedFd> {
    let make = |more: libc::c_uint| {
        let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING | more;
        // SAFETY: `name` is a C string, borrowed until the call returns.
        retry(|| unsafe { libc::memfd_create(name.as_ptr(), flags) })
    };
    let fd = match make(MFD_NOEXEC_SEAL) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => make(0)?,
        result => result?,
    };
    // SAFETY: the kernel has just made `fd` for us; nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Seals a file, so that neither its size nor its bytes can change any more.
///
/// # Errors
/// `EBUSY` if somebody has mapped it for writing. Otherwise the kernel's.
#[doc(alias = "F_ADD_SEALS")]
pub(crate) fn seal(fd: BorrowedFd<'_>) -> io::Result<()> {
    retry(|| {
        // SAFETY: takes integers only.
        unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_ADD_SEALS, SEALS) }
    })?;
    Ok(())
}

/// Whether neither the size nor the bytes can change any more.
///
/// # Errors
/// `EINVAL` for a file that cannot be sealed.
#[doc(alias = "F_GET_SEALS")]
pub(crate) fn is_sealed(fd: BorrowedFd<'_>) -> io::Result<bool> {
    let seals = retry(|| {
        // SAFETY: takes integers only.
        unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GET_SEALS) }
    })?;
    Ok(seals & SEALS == SEALS)
}

/// The bytes of a sealed file, mapped for reading.
///
/// Invariant: the file was sealed when it was mapped. So its bytes stay the same while this
/// lives, and all of them exist, since it cannot have shrunk.
pub(crate) struct Mapping {
    start: NonNull<u8>,
    length: usize,
}

// SAFETY: bytes that nobody can change may be read in any thread.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps the first `length` bytes of `fd`, which has at least as many.
    ///
    /// # Errors
    /// `InvalidInput` if the file is not sealed. Otherwise the kernel's, such as `ENOMEM`.
    ///
    /// References: mmap(2).
    #[doc(alias = "mmap")]
    pub(crate) fn new(fd: BorrowedFd<'_>, length: usize) -> io::Result<Self> {
        if !is_sealed(fd)? {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        if length == 0 {
            // Nothing can be mapped then, and nothing is read.
            let start = NonNull::dangling();
            return Ok(Self { start, length });
        }
        // SAFETY: a new mapping, where the kernel chooses; it replaces none.
        let start = unsafe {
            libc::mmap(
                ptr::null_mut(),
                length,
                libc::PROT_READ,
                libc::MAP_SHARED,
                fd.as_raw_fd(),
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { start, length })
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: `length` bytes are mapped from `start` on, or it is 0 and `start` aligned;
        // they are initialised, and nobody changes them, since the file was sealed before it
        // was mapped and no seal can be taken off. They stay until this is dropped.
        unsafe { slice::from_raw_parts(self.start.as_ptr(), self.length) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if self.length > 0 {
            // SAFETY: what was mapped by `new`, as it was; no slice of it outlives this.
            let result = unsafe { libc::munmap(self.start.as_ptr().cast(), self.length) };
            debug_assert_eq!(result, 0, "it was mapped");
        }
    }
}

/// Makes an event counter that is 0, non-blocking and close-on-exec.
///
/// # Errors
/// `EMFILE` or `ENFILE` if no descriptor number is free. Otherwise the kernel's.
///
/// References: eventfd(2).
#[doc(alias = "eventfd")]
pub(crate) fn event_counter() -> io::Result<OwnedFd> {
    let flags = libc::EFD_NONBLOCK | libc::EFD_CLOEXEC;
    // SAFETY: takes integers only.
    let fd = retry(|| unsafe { libc::eventfd(0, flags) })?;
    // SAFETY: the kernel has just made `fd` for us; nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
