//! Moves bytes, and descriptors beside them: recv(2), send(2), recvmsg(2), sendmsg(2).

#![allow(unsafe_code)]

use std::io::{self, IoSlice};
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use super::cmsg::walk;
use super::cmsg::{CONTROL_BUFFER_BYTES, ControlBuffer, ControlMessage, Credentials};
use super::retry_count;

/// `IOV_MAX`: the kernel refuses a call with more slices than this.
const MAX_SLICES: usize = 1024;

/// The level and type of the control message that says that there is a message.
pub(super) const STAMP: (i32, i32) = (libc::SOL_SOCKET, libc::SCM_TIMESTAMP);

/// No SIGPIPE, and no blocking, whatever the flag of the socket is.
pub(super) const SEND_FLAGS: libc::c_int = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;

/// Reads bytes into `buf`, and returns how many. Zero is the end of the stream.
///
/// It is for sockets that carry no descriptors: the kernel would close those that came
/// along in the middle of this call. Use [`receive`] on UNIX sockets.
///
/// # Errors
/// `WouldBlock` if there is nothing to read. Otherwise the kernel's.
#[inline(always)]
pub(crate) fn recv(fd: BorrowedFd<'_>, buf: &mut [u8]) -> io::Result<usize> {
    debug_assert!(!buf.is_empty(), "a read into nothing looks like the end");
    retry_count(|| {
        // SAFETY: pointer and length are those of `buf`, which is borrowed for
        // writing until the call returns.
        unsafe {
            libc::recv(
                fd.as_raw_fd(),
                buf.as_mut_ptr().cast(),
                buf.len(),
                libc::MSG_DONTWAIT,
            )
        }
    })
}

/// Sends bytes from the start of `buf`, and returns how many were taken.
///
/// # Errors
/// `WouldBlock` if there is no room. `BrokenPipe` (and no signal) if the other end is gone.
/// Otherwise the kernel's. After an error nothing was taken.
#[inline(always)]
pub(crate) fn send(fd: BorrowedFd<'_>, buf: &[u8]) -> io::Result<usize> {
    retry_count(|| {
        // SAFETY: pointer and length are those of `buf`, which is borrowed until
        // the call returns, and which the kernel only reads.
        unsafe { libc::send(fd.as_raw_fd(), buf.as_ptr().cast(), buf.len(), SEND_FLAGS) }
    })
}

/// Sends the bytes of `data`, one slice after the other, and returns how many were taken in
/// all.
///
/// Slices after the 1024th wait for another call.
///
/// # Errors
/// As [`send`].
#[inline]
pub(crate) fn send_vectored(fd: BorrowedFd<'_>, data: &[IoSlice<'_>]) -> io::Result<usize> {
    sendmsg(fd, &[], data, &[])
}

/// Sends the bytes of `data` with `descriptors` attached to the first of them. Returns how
/// many bytes were taken.
///
/// If it returns a positive number, *all* descriptors were sent. The rest of the bytes must
/// then be sent without them. After an error none was sent. `control` is only scratch
/// space. Neither list is kept or changed.
///
/// # Errors
/// `InvalidInput`, without a system call, for more than
/// [`MAX_DESCRIPTORS`](super::MAX_DESCRIPTORS), or if `data` has no bytes: on a stream the
/// kernel would take the descriptors, report success and close them. `ETOOMANYREFS` and
/// `ENOBUFS` are the kernel's way to say: later. Otherwise as [`send`].
///
/// References: sendmsg(2), unix(7).
#[doc(alias = "SCM_RIGHTS")]
#[inline]
pub(crate) fn send_with_descriptors(
    fd: BorrowedFd<'_>,
    data: &[IoSlice<'_>],
    descriptors: &[BorrowedFd<'_>],
    control: &mut ControlBuffer,
) -> io::Result<usize> {
    let Some(control) = control.encode_descriptors(descriptors) else {
        return Err(invalid("more descriptors than one message can hold"));
    };
    // Only the slices that the call is going to see count.
    if data.iter().take(MAX_SLICES).all(|slice| slice.is_empty()) {
        return Err(invalid("descriptors need at least one byte to travel with"));
    }
    sendmsg(fd, &[], data, control)
}

/// Sends one message with `descriptors`, on a socket that keeps messages apart. `name` is
/// an encoded address; the message goes to the peer if it is empty. The message may be
/// empty.
///
/// # Errors
/// As [`send_with_descriptors`].
pub(crate) fn send_message(
    fd: BorrowedFd<'_>,
    name: &[u8],
    data: &[u8],
    descriptors: &[BorrowedFd<'_>],
    control: &mut ControlBuffer,
) -> io::Result<()> {
    let Some(control) = control.encode_descriptors(descriptors) else {
        return Err(invalid("more descriptors than one message can hold"));
    };
    sendmsg(fd, name, &[IoSlice::new(data)], control).map(|_| ())
}

/// The result of one [`receive`], besides what it put into [`Ancillary`].
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct ReceivedMessage {
    /// How many bytes were written to the buffer. Zero is the end of a stream. On sockets
    /// that keep messages apart, it may be an empty message.
    pub(crate) bytes: usize,
    /// Ancillary data was lost. If descriptors were among it, the kernel has closed them:
    /// this process had no free descriptor number, or a security module refused.
    pub(crate) control_truncated: bool,
    /// The message had more bytes than the buffer. Never on a stream.
    pub(crate) truncated: bool,
    /// Ancillary data came along, lost or not. The kernel ends a read after the bytes with
    /// ancillary data. So a short read does not mean that nothing more is there.
    pub(crate) had_ancillary: bool,
}

/// What was received beside the bytes. It is made once and used for every read, so that the
/// lists keep their capacity.
#[derive(Debug, Default)]
pub(crate) struct Ancillary {
    /// The descriptors, in the order in which they were sent, close-on-exec. Each read
    /// appends.
    pub(crate) descriptors: Vec<OwnedFd>,
    /// The sender of the bytes, if `set_pass_credentials` asked for it.
    pub(crate) credentials: Option<Credentials>,
    /// A pidfd of the sender of the bytes, if `set_pass_pidfd` asked for it.
    pub(crate) pidfd: Option<OwnedFd>,
    /// Level and type of the control messages that this module does not know.
    pub(crate) unknown: Vec<(i32, i32)>,
}

impl Ancillary {
    /// Makes an empty one. Allocates nothing.
    pub(crate) const fn new() -> Self {
        Self {
            descriptors: Vec::new(),
            credentials: None,
            pidfd: None,
            unknown: Vec::new(),
        }
    }

    /// Whether nothing was received.
    #[inline]
    pub(super) fn is_empty(&self) -> bool {
        self.descriptors.is_empty()
            && self.credentials.is_none()
            && self.pidfd.is_none()
            && self.unknown.is_empty()
    }

    /// Closes what is left, and forgets the rest. The capacity is kept.
    #[inline]
    pub(crate) fn clear(&mut self) {
        self.descriptors.clear();
        self.credentials = None;
        self.pidfd = None;
        self.unknown.clear();
    }

    /// Owns the descriptors that the kernel has put into `control`. Returns whether all of
    /// them were there to be owned.
    ///
    /// # Safety
    /// `control` must be what a successful recvmsg(2) has written. It must be given to this
    /// function only once: each number in it becomes an owner.
    pub(super) unsafe fn collect(&mut self, control: &[u8]) -> bool {
        let mut complete = true;
        for message in walk(control) {
            match message {
                ControlMessage::Descriptors(numbers) => {
                    self.descriptors.reserve(numbers.len());
                    for number in numbers {
                        // SAFETY: this function's own contract: the kernel
                        // installed `number` for this process in the read that
                        // wrote it, nothing has owned it since, and each is
                        // met once.
                        match unsafe { own(number) } {
                            Some(descriptor) => self.descriptors.push(descriptor),
                            None => complete = false,
                        }
                    }
                }
                ControlMessage::Credentials(credentials) => self.credentials = Some(credentials),
                ControlMessage::PidFd(number) => {
                    // SAFETY: as above; the kernel makes a pidfd for each message
                    // that carries one.
                    self.pidfd = unsafe { own(number) };
                    complete &= self.pidfd.is_some();
                }
                // Not of a socket that can pass descriptors.
                ControlMessage::Segments(_) => {}
                // By those who have asked for it, taken out again.
                ControlMessage::Stamp => self.unknown.push(STAMP),
                ControlMessage::Unknown { level, kind } => self.unknown.push((level, kind)),
            }
        }
        complete
    }
}

/// Reads bytes into `buf`, and appends what came beside them to `ancillary`.
///
/// Every descriptor that arrived is owned when this returns, whatever the flags say.
/// Descriptors of bytes after the end of `buf` stay with the socket. `control` is only
/// scratch space.
///
/// # Errors
/// As [`recv`]. Nothing was taken then.
///
/// References: recvmsg(2), unix(7).
#[doc(alias = "recvmsg")]
#[inline(always)]
pub(crate) fn receive(
    fd: BorrowedFd<'_>,
    buf: &mut [u8],
    control: &mut ControlBuffer,
    ancillary: &mut Ancillary,
) -> io::Result<ReceivedMessage> {
    receive_with_room(fd, buf, control, CONTROL_BUFFER_BYTES, ancillary)
}

/// As [`receive`], with only `room` bytes of `control`. It lets tests run out of room.
#[inline(always)]
pub(super) fn receive_with_room(
    fd: BorrowedFd<'_>,
    buf: &mut [u8],
    control: &mut ControlBuffer,
    room: usize,
    ancillary: &mut Ancillary,
) -> io::Result<ReceivedMessage> {
    debug_assert!(!buf.is_empty(), "a read into nothing looks like the end");
    let control = &mut control.bytes_mut()[..room];
    let mut part = libc::iovec {
        iov_base: buf.as_mut_ptr().cast(),
        iov_len: buf.len(),
    };
    let mut header = message_header();
    header.msg_iov = &raw mut part;
    header.msg_iovlen = 1;
    header.msg_control = control.as_mut_ptr().cast();
    header.msg_controllen = control.len() as _;

    let bytes = retry_count(|| {
        // SAFETY: `header` points to one part, which has pointer and length of
        // `buf`, and to pointer and length of `control`; both are borrowed for
        // writing, and all of them outlive the call. An interrupted call has
        // not changed `header`.
        unsafe {
            libc::recvmsg(
                fd.as_raw_fd(),
                &raw mut header,
                libc::MSG_CMSG_CLOEXEC | libc::MSG_DONTWAIT,
            )
        }
    })?;

    if header.msg_controllen == 0 && header.msg_flags & (libc::MSG_CTRUNC | libc::MSG_TRUNC) == 0 {
        return Ok(ReceivedMessage {
            bytes,
            control_truncated: false,
            truncated: false,
            had_ancillary: false,
        });
    }
    #[allow(
        clippy::unnecessary_cast,
        reason = "the type differs between C libraries"
    )]
    let written = (header.msg_controllen as usize).min(room);
    // SAFETY: recvmsg succeeded and wrote these bytes just now; no one else has
    // seen them, and this is the only call with them.
    Ok(unsafe { take_ancillary(bytes, header.msg_flags, &control[..written], ancillary) })
}

/// Ends a read that brought more than plain bytes. It is separate so that the common read
/// stays short.
///
/// # Safety
/// As [`Ancillary::collect`].
#[inline(never)]
unsafe fn take_ancillary(
    bytes: usize,
    flags: libc::c_int,
    control: &[u8],
    ancillary: &mut Ancillary,
) -> ReceivedMessage {
    // Owning comes first: nothing may stand between the kernel's numbers and
    // their owners, least of all a look at the flags.
    // SAFETY: this function's own contract, and the only use of `control`.
    let complete = unsafe { ancillary.collect(control) };
    let control_truncated = flags & libc::MSG_CTRUNC != 0 || !complete;
    ReceivedMessage {
        bytes,
        control_truncated,
        truncated: flags & libc::MSG_TRUNC != 0,
        had_ancillary: !control.is_empty() || control_truncated,
    }
}

/// Sends `data` to `name`, with the encoded control messages `control` beside it. If `name`
/// is empty, no address is given.
#[inline]
fn sendmsg(
    fd: BorrowedFd<'_>,
    name: &[u8],
    data: &[IoSlice<'_>],
    control: &[u8],
) -> io::Result<usize> {
    let mut header = message_header();
    if !name.is_empty() {
        header.msg_name = name.as_ptr().cast::<libc::c_void>().cast_mut();
        header.msg_namelen = name.len() as _;
    }
    // `IoSlice` is documented to have the layout of `iovec`, so the list is
    // handed over as it is.
    header.msg_iov = data.as_ptr().cast::<libc::iovec>().cast_mut();
    header.msg_iovlen = data.len().min(MAX_SLICES) as _;
    if !control.is_empty() {
        header.msg_control = control.as_ptr().cast::<libc::c_void>().cast_mut();
        header.msg_controllen = control.len() as _;
    }
    retry_count(|| {
        // SAFETY: `header` has pointer and length of `data`, whose slices have
        // theirs, and those of `name` and of `control`, or none; all are borrowed
        // until the call returns, and the kernel only reads.
        unsafe { libc::sendmsg(fd.as_raw_fd(), &raw const header, SEND_FLAGS) }
    })
}

/// Makes a header without pointers.
#[inline]
pub(super) fn message_header() -> libc::msghdr {
    // SAFETY: `msghdr` is pointers, integers and, in some C libraries, padding; all
    // bits zero is a value of each. (A literal would not compile where there is
    // padding, which has private names.)
    unsafe { mem::zeroed() }
}

/// Makes an owner of a number. Returns `None` for a negative number, which the kernel
/// writes if it could not install a descriptor.
///
/// # Safety
/// A `number` that is not negative must be an open descriptor of this process that nothing
/// owns.
#[inline]
unsafe fn own(number: i32) -> Option<OwnedFd> {
    if number < 0 {
        return None;
    }
    // SAFETY: not -1, which `OwnedFd` cannot hold; open and without an owner by
    // this function's own contract.
    Some(unsafe { OwnedFd::from_raw_fd(number) })
}

#[cold]
fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, what)
}
