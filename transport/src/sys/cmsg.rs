//! Control messages: encodes and decodes the bytes of ancillary data.
//!
//! Pure: no system call, no ownership, and no `unsafe`. Descriptors appear here only as
//! numbers. `msg` makes owners of them, and only from bytes that the kernel has written.

#![forbid(unsafe_code)]

use std::fmt;
use std::iter::{Copied, FusedIterator};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::slice;

/// The most descriptors in one message, over all of its control messages: the kernel's
/// `SCM_MAX_FD`.
pub(crate) const MAX_DESCRIPTORS: usize = 253;

/// The size of a [`ControlBuffer`], in bytes.
///
/// On a 64-bit machine, 253 descriptors take 1032 bytes, credentials 32, a pidfd 24, the
/// count of unread bytes (`SCM_INQ`) 24, and a time stamp 32: together 1144. Everything
/// that is switched on shares the buffer, and what finds no room is lost. So the rest is a
/// reserve for kinds that a later kernel may add.
pub(crate) const CONTROL_BUFFER_BYTES: usize = 1536;

/// `cmsghdr` as the kernel lays it out: length (a word), level, kind.
const HEADER_BYTES: usize = size_of::<usize>() + 2 * NUMBER_BYTES;
const LEVEL_AT: usize = size_of::<usize>();
const KIND_AT: usize = LEVEL_AT + NUMBER_BYTES;

/// One descriptor number in a payload.
const NUMBER_BYTES: usize = size_of::<i32>();

const SCM_PIDFD: i32 = 4;

// The C library's struct must agree with the kernel's in size, or headers and
// payloads would not be where either side looks for them.
const _: () = assert!(size_of::<libc::cmsghdr>() == HEADER_BYTES);
const _: () = assert!(align(HEADER_BYTES) == HEADER_BYTES);
const _: () =
    assert!(CONTROL_BUFFER_BYTES >= HEADER_BYTES + align(MAX_DESCRIPTORS * NUMBER_BYTES) + 80);

/// Room for the ancillary data of one message. It is made once and used again.
///
/// It is aligned like the kernel's headers. It is zeroed when it is made, and never again:
/// after a call, only what that call has written is read.
#[repr(C)]
pub(crate) struct ControlBuffer {
    _align: [libc::cmsghdr; 0],
    bytes: [u8; CONTROL_BUFFER_BYTES],
}

impl ControlBuffer {
    /// Makes an empty buffer.
    pub(crate) const fn new() -> Self {
        Self {
            _align: [],
            bytes: [0; CONTROL_BUFFER_BYTES],
        }
    }

    /// Encodes one control message with `descriptors`, in order. Returns its bytes,
    /// including the padding.
    ///
    /// Returns `None` above [`MAX_DESCRIPTORS`], and no bytes if there are no descriptors.
    #[inline]
    pub(super) fn encode_descriptors(&mut self, descriptors: &[BorrowedFd<'_>]) -> Option<&[u8]> {
        if descriptors.is_empty() {
            return Some(&[]);
        }
        if descriptors.len() > MAX_DESCRIPTORS {
            return None;
        }
        let payload = descriptors.len() * NUMBER_BYTES;
        let message = &mut self.bytes[..HEADER_BYTES + align(payload)];
        let (header, numbers) = message.split_at_mut(HEADER_BYTES);
        header[..LEVEL_AT].copy_from_slice(&(HEADER_BYTES + payload).to_ne_bytes());
        header[LEVEL_AT..KIND_AT].copy_from_slice(&libc::SOL_SOCKET.to_ne_bytes());
        header[KIND_AT..].copy_from_slice(&libc::SCM_RIGHTS.to_ne_bytes());
        let (numbers, _) = numbers.as_chunks_mut::<NUMBER_BYTES>();
        // Padding, where there is any, keeps what it held: the kernel goes by the
        // length in the header.
        for (number, descriptor) in numbers.iter_mut().zip(descriptors) {
            *number = descriptor.as_raw_fd().to_ne_bytes();
        }
        Some(message)
    }

    /// Returns all of the buffer, for the kernel to write to.
    #[inline]
    pub(super) fn bytes_mut(&mut self) -> &mut [u8; CONTROL_BUFFER_BYTES] {
        &mut self.bytes
    }
}

impl Default for ControlBuffer {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for ControlBuffer {
    // The bytes hold numbers of descriptors that may be long gone; nobody wants
    // them in a log.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ControlBuffer").finish_non_exhaustive()
    }
}

/// Decodes the control messages in `bytes`.
///
/// It accepts any bytes, at any alignment. It reads nothing outside of them, and trusts
/// nothing in them.
#[inline]
pub(crate) const fn walk(bytes: &[u8]) -> ControlMessages<'_> {
    ControlMessages { rest: bytes }
}

/// The control messages of one read, in the order of the bytes.
///
/// It ends at the first header that is truncated, or whose length is shorter than a header.
/// A payload whose length goes past the end is cut at the end. The numbers before the cut
/// are descriptors that somebody must own.
#[derive(Clone, Debug)]
pub(crate) struct ControlMessages<'a> {
    rest: &'a [u8],
}

impl<'a> Iterator for ControlMessages<'a> {
    type Item = ControlMessage<'a>;

    #[inline]
    fn next(&mut self) -> Option<ControlMessage<'a>> {
        let (header, after) = self.rest.split_first_chunk::<HEADER_BYTES>()?;
        let length = usize::from_ne_bytes(field(header, 0));
        let level = i32::from_ne_bytes(field(header, LEVEL_AT));
        let kind = i32::from_ne_bytes(field(header, KIND_AT));

        let Some(claimed) = length.checked_sub(HEADER_BYTES) else {
            self.rest = &[];
            return None;
        };
        // A claim beyond the end must not be rounded up first: that can overflow.
        let payload = claimed.min(after.len());
        self.rest = &after[align(payload).min(after.len())..];
        Some(ControlMessage::read(level, kind, &after[..payload]))
    }
}

impl FusedIterator for ControlMessages<'_> {}

/// One control message.
#[derive(Clone, Debug)]
pub(crate) enum ControlMessage<'a> {
    /// `SCM_RIGHTS`: the numbers of the descriptors that were installed here.
    Descriptors(DescriptorNumbers<'a>),
    /// `SCM_CREDENTIALS`: the sender of the message.
    Credentials(Credentials),
    /// `SCM_PIDFD`: the number of a pidfd of the sender. Negative if the kernel could not
    /// make one.
    PidFd(i32),
    /// `UDP_GRO`: the length of each of the datagrams that were received as one. The last
    /// may be shorter.
    Segments(usize),
    /// `SCM_TIMESTAMP`: there is a message. The time itself is not used.
    Stamp,
    /// A kind that is not known here, or one that is too short for its kind.
    Unknown {
        /// The protocol that defines `kind`, such as `SOL_SOCKET`.
        level: i32,
        /// The type within `level`.
        kind: i32,
    },
}

impl<'a> ControlMessage<'a> {
    #[inline]
    fn read(level: i32, kind: i32, payload: &'a [u8]) -> Self {
        if level == libc::SOL_SOCKET {
            match kind {
                libc::SCM_RIGHTS => {
                    // Fewer than four bytes at the end are no number.
                    let (numbers, _) = payload.as_chunks::<NUMBER_BYTES>();
                    return Self::Descriptors(DescriptorNumbers(numbers.iter().copied()));
                }
                libc::SCM_CREDENTIALS => {
                    if let Some(ucred) = payload.first_chunk::<{ size_of::<libc::ucred>() }>() {
                        return Self::Credentials(Credentials::from_ucred(ucred));
                    }
                }
                SCM_PIDFD => {
                    if let Some(number) = payload.first_chunk::<NUMBER_BYTES>() {
                        return Self::PidFd(i32::from_ne_bytes(*number));
                    }
                }
                libc::SCM_TIMESTAMP => return Self::Stamp,
                _ => {}
            }
        }
        if (level, kind) == (libc::SOL_UDP, libc::UDP_GRO)
            && let Some(size) = payload.first_chunk::<NUMBER_BYTES>()
            && let Ok(size) = usize::try_from(i32::from_ne_bytes(*size))
        {
            return Self::Segments(size);
        }
        Self::Unknown { level, kind }
    }
}

/// The descriptor numbers in one control message, as they are in the bytes. They own
/// nothing, and may be negative.
#[derive(Clone, Debug)]
pub(crate) struct DescriptorNumbers<'a>(Copied<slice::Iter<'a, [u8; NUMBER_BYTES]>>);

impl Iterator for DescriptorNumbers<'_> {
    type Item = i32;

    #[inline]
    fn next(&mut self) -> Option<i32> {
        self.0.next().map(i32::from_ne_bytes)
    }

    #[inline]
    fn size_hint(&self) -> (usize, Option<usize>) {
        self.0.size_hint()
    }
}

impl ExactSizeIterator for DescriptorNumbers<'_> {}

impl FusedIterator for DescriptorNumbers<'_> {}

/// The identity of a process at the other end, which the kernel vouches for.
///
/// Those of a connection are the credentials at the time of `connect`, `listen` or
/// `socketpair`. Those beside a message are its sender's at the time of sending. Neither
/// says who holds the descriptor now. All numbers are translated to the namespaces of the
/// receiver.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[doc(alias = "ucred")]
pub(crate) struct Credentials {
    /// The process ID, or `None` if the process has none here. Either it is outside of the
    /// receiver's PID namespace, or the message was queued before the receiver asked for
    /// credentials.
    ///
    /// The number can be given to another process once this one has ended.
    pub(crate) pid: Option<u32>,
    /// The effective user ID. It is 65534 (by default) if the user has none here.
    pub(crate) uid: u32,
    /// The effective group ID. It is 65534 (by default) if the group has none here.
    pub(crate) gid: u32,
}

impl Credentials {
    /// Decodes `struct ucred`: three words, in this order.
    #[inline]
    fn from_ucred(bytes: &[u8; size_of::<libc::ucred>()]) -> Self {
        use std::mem::offset_of;
        Self::new(
            i32::from_ne_bytes(field(bytes, offset_of!(libc::ucred, pid))),
            u32::from_ne_bytes(field(bytes, offset_of!(libc::ucred, uid))),
            u32::from_ne_bytes(field(bytes, offset_of!(libc::ucred, gid))),
        )
    }

    /// Makes one. `pid` is 0 if there is no process, as the kernel has it.
    #[inline]
    pub(super) fn new(pid: i32, uid: u32, gid: u32) -> Self {
        Self {
            pid: u32::try_from(pid).ok().filter(|&pid| pid != 0),
            uid,
            gid,
        }
    }
}

/// Rounds up to where the next header may begin.
#[inline]
const fn align(length: usize) -> usize {
    (length + size_of::<usize>() - 1) & !(size_of::<usize>() - 1)
}

/// Returns the `N` bytes of `bytes` from `at` on, which must be inside.
#[inline]
pub(super) fn field<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut field = [0; N];
    field.copy_from_slice(&bytes[at..at + N]);
    field
}

/// Decodes any bytes, for the fuzzer. Everything that is found is inside of them.
#[cfg(fuzzing)]
pub(crate) fn fuzz(bytes: &[u8]) {
    let mut taken = 0;
    for message in walk(bytes) {
        let payload = match message {
            ControlMessage::Descriptors(numbers) => {
                let expected = numbers.len();
                let count = numbers.map(std::hint::black_box).count();
                assert_eq!(count, expected);
                count * NUMBER_BYTES
            }
            ControlMessage::Credentials(_) => size_of::<libc::ucred>(),
            ControlMessage::PidFd(_) | ControlMessage::Segments(_) => NUMBER_BYTES,
            ControlMessage::Stamp | ControlMessage::Unknown { .. } => 0,
        };
        taken += HEADER_BYTES + payload;
        assert!(taken <= bytes.len(), "more than there is");
    }
}
