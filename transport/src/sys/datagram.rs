//! Several messages in one call, recvmmsg(2) and sendmmsg(2), and the sockets for them.

#![allow(unsafe_code)]

use std::io;
use std::iter;
use std::net::Ipv4Addr;
use std::net::Ipv6Addr;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr;

use super::address::{NameBuffer, NameRef};
use super::cmsg::{CONTROL_BUFFER_BYTES, ControlMessage, walk};
use super::msg::{Ancillary, SEND_FLAGS, STAMP, message_header};
use super::retry;
use super::socket::{Family, flag, option, set_flag, set_option};

// The C library's bindings do not have these.
const SO_MEMINFO: libc::c_int = 55;
/// How many numbers this option returns, and which of them counts dropped messages.
const MEMINFO_NUMBERS: usize = 9;
const MEMINFO_DROPS: usize = 8;
const IPV6_MULTICAST_ALL: libc::c_int = 29;

/// The most messages in one call. The kernel would take 1,024, but most of the gain comes
/// from the first tens.
pub(crate) const MOST_MESSAGES: usize = 64;

/// Bytes of control messages beside a UDP datagram: one number.
const SEGMENT_CONTROL_BYTES: usize = 64;

/// How many bytes the places of two messages are apart, besides their room. With a power of
/// two, all of them would compete for the same cache lines.
const STAGGER: usize = 192;

/// What may be received beside a message.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Beside {
    /// The length of the segments (`UDP_GRO`).
    Segments,
    /// Descriptors, and credentials.
    Descriptors,
    /// The same, and a time stamp with each message, if the socket [is
    /// set](super::set_stamps) to have one.
    Stamps,
}

/// The messages of one receive. The room is made once and used again.
pub(crate) struct MessageBatch {
    room: usize,
    data: Vec<u8>,
    /// Stored as words, for the alignment of control messages.
    control: Vec<u64>,
    names: Vec<NameBuffer>,
    headers: Vec<libc::mmsghdr>,
    parts: Vec<libc::iovec>,
    messages: Vec<Message>,
    ancillary: Vec<Ancillary>,
    received: usize,
    /// How many bytes of control messages the headers are made for; 0 before they are made.
    control_bytes: usize,
    /// How many headers may have lengths that the kernel has changed.
    changed: usize,
    /// Whether something was received beside one of the messages.
    has_ancillary: bool,
}

/// The facts about one message of a batch.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Message {
    /// How many bytes it had. Fewer may be stored here.
    pub(crate) length: usize,
    /// The length of each of its datagrams, if it is several; otherwise 0.
    pub(crate) segment: usize,
    /// Whether there may be something beside it.
    pub(crate) has_ancillary: bool,
    /// Ancillary data was lost.
    pub(crate) control_truncated: bool,
    /// Whether it had a time stamp. Then it is a message, and not the end.
    is_stamped: bool,
    name_length: u32,
}

const CONTROL_WORDS: usize = CONTROL_BUFFER_BYTES / size_of::<u64>();

impl MessageBatch {
    /// Makes room for `slots` messages of `room` bytes each. The memory is not touched
    /// before it is needed.
    pub(crate) fn new(slots: usize, room: usize) -> Self {
        let slots = slots.clamp(1, MOST_MESSAGES);
        let room = room.max(1);
        Self {
            room,
            data: vec![0; slots.saturating_mul(room.saturating_add(STAGGER))],
            control: vec![0; slots * CONTROL_WORDS],
            names: iter::repeat_with(NameBuffer::new).take(slots).collect(),
            headers: Vec::with_capacity(slots),
            parts: Vec::with_capacity(slots),
            messages: vec![Message::default(); slots],
            ancillary: iter::repeat_with(Ancillary::new).take(slots).collect(),
            received: 0,
            control_bytes: 0,
            changed: 0,
            has_ancillary: false,
        }
    }

    /// Returns how many messages there is room for.
    pub(crate) fn slots(&self) -> usize {
        self.messages.len()
    }

    /// Returns how many bytes of each message there is room for.
    pub(crate) fn room(&self) -> usize {
        self.room
    }

    /// Returns how many messages were received last.
    #[inline]
    pub(crate) fn len(&self) -> usize {
        self.received
    }

    /// Returns the facts about the message at `place`.
    #[inline]
    pub(crate) fn message(&self, place: usize) -> &Message {
        &self.messages[place]
    }

    /// Returns the parts of the message at `place`: the facts, the stored bytes, the name
    /// of its sender, and what was received beside it.
    #[inline]
    pub(crate) fn parts(&mut self, place: usize) -> (&Message, &[u8], NameRef<'_>, &mut Ancillary) {
        let message = &self.messages[place];
        let start = place * (self.room + STAGGER);
        let data = &self.data[start..][..message.length.min(self.room)];
        let name = self.names[place].prefix(message.name_length as usize);
        (
            message,
            data,
            NameRef::decode(name),
            &mut self.ancillary[place],
        )
    }

    /// Returns the place of the end of a connection, if the end was received. It is the
    /// first place without a message. All places after it are empty too, since the kernel
    /// reports the end as often as it is asked.
    ///
    /// `is_stamped` says that messages have time stamps. Without them, an empty message may
    /// be the end if the kernel was asked for `count` messages and returned as many, and if
    /// `is_over` says that nothing more comes.
    pub(crate) fn end(
        &self,
        count: usize,
        is_stamped: bool,
        is_over: impl FnOnce() -> bool,
    ) -> Option<usize> {
        let messages = &self.messages[..self.received];
        let is_end = |it: &Message| it.length == 0 && !it.has_ancillary && !it.is_stamped;
        if self.received < count || !messages.last().is_some_and(is_end) {
            return None;
        }
        let first = match is_stamped {
            true => messages.iter().position(is_end),
            false => messages
                .iter()
                .rposition(|it| !is_end(it))
                .map_or(Some(0), |it| Some(it + 1)),
        };
        first.filter(|_| is_stamped || is_over())
    }

    /// Forgets the places from `place` on, which have no messages.
    pub(crate) fn truncate(&mut self, place: usize) {
        self.received = self.received.min(place);
    }

    /// Adds a message at the end, as if it had been received. Returns whether there was
    /// room. For kinds that receive in another way.
    pub(crate) fn push(
        &mut self,
        data: &[u8],
        from: NameRef<'_>,
        descriptors: Vec<OwnedFd>,
        control_truncated: bool,
    ) -> bool {
        let place = self.received;
        if place == self.slots() {
            return false;
        }
        self.received += 1;
        let start = place * (self.room + STAGGER);
        let copied = data.len().min(self.room);
        self.data[start..][..copied].copy_from_slice(&data[..copied]);
        self.names[place] = from.encode().unwrap_or(NameBuffer::new());
        let name_length = self.names[place].as_bytes().len();
        self.messages[place] = Message {
            length: data.len(),
            segment: 0,
            has_ancillary: !descriptors.is_empty() || control_truncated,
            control_truncated,
            is_stamped: true,
            name_length: name_length as u32,
        };
        self.has_ancillary |= self.messages[place].has_ancillary;
        self.ancillary[place].descriptors.extend(descriptors);
        true
    }

    /// Sets the sender of the message at `place`, which was [added](Self::push).
    #[cfg(feature = "testing")]
    pub(crate) fn set_credentials(
        &mut self,
        place: usize,
        credentials: Option<super::Credentials>,
    ) {
        self.messages[place].has_ancillary |= credentials.is_some();
        self.has_ancillary |= credentials.is_some();
        self.ancillary[place].credentials = credentials;
    }

    /// Forgets what was received, and closes the descriptors that nobody took.
    #[inline]
    pub(crate) fn clear(&mut self) {
        if self.has_ancillary {
            self.clear_ancillary();
        }
        self.received = 0;
    }

    #[cold]
    fn clear_ancillary(&mut self) {
        self.has_ancillary = false;
        let messages = &self.messages[..self.received];
        for (message, ancillary) in messages.iter().zip(&mut self.ancillary) {
            if message.has_ancillary {
                ancillary.clear();
            }
        }
    }

    /// Receives up to `count` messages, and returns how many. The batch must have been
    /// [cleared](Self::clear). If they are fewer than asked for, there were no more at the
    /// time.
    ///
    /// Every descriptor that arrived is owned when this returns.
    ///
    /// # Errors
    /// `WouldBlock` if there is none. Otherwise the kernel's, which may be about a message
    /// that was sent before.
    ///
    /// References: recvmmsg(2), udp(7), unix(7).
    #[doc(alias = "recvmmsg")]
    pub(crate) fn receive(
        &mut self,
        fd: BorrowedFd<'_>,
        count: usize,
        beside: Beside,
    ) -> io::Result<usize> {
        debug_assert_eq!(self.received, 0, "cleared before");
        let count = count.clamp(1, self.slots());
        let control_bytes = match beside {
            Beside::Segments => SEGMENT_CONTROL_BYTES,
            Beside::Descriptors | Beside::Stamps => CONTROL_BUFFER_BYTES,
        };
        self.prepare_headers(control_bytes);
        // Where the call fails it may have begun with the first.
        self.changed = 1;
        let received = retry(|| {
            // SAFETY: `headers` has as many elements as there are slots, at least `count`.
            // Each has pointers and lengths of a piece of `data`, of `control`, of `names`
            // and of `parts`, which no other has. None of these has moved since
            // `point_headers`, and all are borrowed for writing through `self`. An
            // interrupted call has received nothing, and changed no length.
            unsafe {
                libc::recvmmsg(
                    fd.as_raw_fd(),
                    self.headers.as_mut_ptr(),
                    count as libc::c_uint,
                    libc::MSG_CMSG_CLOEXEC | libc::MSG_DONTWAIT | libc::MSG_TRUNC,
                    ptr::null_mut(),
                )
            }
        })?;
        // Not negative, and no more than was asked for.
        self.received = (received as usize).min(count);
        // The one beyond the last may have been begun.
        self.changed = (self.received + 1).min(self.slots());
        for place in 0..self.received {
            // SAFETY: recvmmsg has just succeeded, and filled this place.
            let message = unsafe { self.message_at(place, beside, control_bytes) };
            self.has_ancillary |= message.has_ancillary;
            self.messages[place] = message;
        }
        Ok(self.received)
    }

    /// Returns the message that was received in a place. Called once for each receive.
    ///
    /// # Safety
    ///
    /// The kernel has filled the place's header and control bytes, and nobody has read them
    /// yet: the descriptors that they name become owned here.
    unsafe fn message_at(&mut self, place: usize, beside: Beside, control_bytes: usize) -> Message {
        let header = &self.headers[place];
        let flags = header.msg_hdr.msg_flags;
        #[allow(
            clippy::unnecessary_cast,
            reason = "the type differs between C libraries"
        )]
        let written = (header.msg_hdr.msg_controllen as usize).min(control_bytes);
        let control_truncated = flags & libc::MSG_CTRUNC != 0;
        let mut message = Message {
            length: header.msg_len as usize,
            segment: 0,
            has_ancillary: false,
            control_truncated,
            is_stamped: false,
            name_length: header.msg_hdr.msg_namelen,
        };
        if written > 0 || control_truncated {
            let control = &self.control[place * CONTROL_WORDS..][..CONTROL_WORDS];
            let control = &bytes_of(control)[..written];
            match beside {
                Beside::Segments => message.segment = segment_in(control),
                Beside::Descriptors | Beside::Stamps => {
                    // SAFETY: the kernel wrote these bytes for this message, and no one
                    // has seen them, as the caller promises; this is the only call with
                    // them.
                    let is_complete = unsafe { self.ancillary[place].collect(control) };
                    message.control_truncated |= !is_complete;
                    let unknown = &mut self.ancillary[place].unknown;
                    let stamp = unknown.iter().position(|it| *it == STAMP);
                    if beside == Beside::Stamps
                        && let Some(stamp) = stamp
                    {
                        unknown.swap_remove(stamp);
                        message.is_stamped = true;
                    }
                    message.has_ancillary =
                        message.control_truncated || !self.ancillary[place].is_empty();
                }
            }
        }
        message
    }

    /// Resets all headers to their state before a call. Their pointers stay the same, so
    /// only what the kernel has written is written again.
    #[inline]
    fn prepare_headers(&mut self, control_bytes: usize) {
        if self.control_bytes != control_bytes {
            return self.point_headers(control_bytes);
        }
        for header in &mut self.headers[..self.changed] {
            header.msg_hdr.msg_namelen = NameBuffer::ROOM as _;
            header.msg_hdr.msg_controllen = control_bytes as _;
            header.msg_hdr.msg_flags = 0;
        }
    }

    /// Makes the headers point to their places. The pointers are to the whole of each piece
    /// of memory, so that reading it in between does not invalidate them.
    #[cold]
    fn point_headers(&mut self, control_bytes: usize) {
        self.control_bytes = control_bytes;
        let stride = self.room + STAGGER;
        let (data, control) = (self.data.as_mut_ptr(), self.control.as_mut_ptr());
        let names = self.names.as_mut_ptr();
        let part = |place: usize| libc::iovec {
            iov_base: data.wrapping_add(place * stride).cast(),
            iov_len: self.room,
        };
        let slots = self.messages.len();
        self.parts.clear();
        self.parts.extend((0..slots).map(part));
        let parts = self.parts.as_mut_ptr();
        let header = |place: usize| {
            let mut header = message_header();
            header.msg_name = names.wrapping_add(place).cast();
            header.msg_namelen = NameBuffer::ROOM as _;
            header.msg_iov = parts.wrapping_add(place);
            header.msg_iovlen = 1;
            header.msg_control = control.wrapping_add(place * CONTROL_WORDS).cast();
            header.msg_controllen = control_bytes as _;
            libc::mmsghdr {
                msg_hdr: header,
                msg_len: 0,
            }
        };
        self.headers.clear();
        self.headers.extend((0..slots).map(header));
    }
}

/// Returns the bytes of words.
fn bytes_of(words: &[u64]) -> &[u8] {
    // SAFETY: the same memory, borrowed as long; bytes are aligned anywhere, and each of
    // their patterns is a value.
    unsafe { std::slice::from_raw_parts(words.as_ptr().cast(), size_of_val(words)) }
}

/// Returns the length of segments in these control messages; 0 if there is none.
fn segment_in(control: &[u8]) -> usize {
    walk(control)
        .find_map(|message| match message {
            ControlMessage::Segments(size) => Some(size),
            _ => None,
        })
        .unwrap_or(0)
}

impl std::fmt::Debug for MessageBatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MessageBatch")
            .field("received", &self.received)
            .finish_non_exhaustive()
    }
}

/// One message to send, of one datagram or several.
#[derive(Clone, Copy, Debug)]
pub(crate) struct OutgoingMessage<'a> {
    pub(crate) data: &'a [u8],
    /// The encoded address; empty for the peer of the socket.
    pub(crate) name: &'a [u8],
    /// The length of each datagram in `data`, if there are several.
    pub(crate) segment: Option<u16>,
}

/// Room for the headers of one send. It is made once and used again.
#[derive(Default)]
pub(crate) struct SendBatch {
    headers: Vec<libc::mmsghdr>,
    parts: Vec<libc::iovec>,
    controls: Vec<SegmentControl>,
    /// How many datagrams each message has.
    counts: Vec<usize>,
}

impl SendBatch {
    /// Makes room for [`MOST_MESSAGES`].
    #[cold]
    fn make_room(&mut self) {
        let part = libc::iovec {
            iov_base: ptr::null_mut(),
            iov_len: 0,
        };
        self.parts = vec![part; MOST_MESSAGES];
        self.controls = vec![SegmentControl::new(0); MOST_MESSAGES];
        self.counts = vec![0; MOST_MESSAGES];
        let header = || {
            let mut header = message_header();
            header.msg_iovlen = 1;
            libc::mmsghdr {
                msg_hdr: header,
                msg_len: 0,
            }
        };
        self.headers = iter::repeat_with(header).take(MOST_MESSAGES).collect();
    }
}

/// The control message with the length of segments, in the kernel's layout.
#[derive(Clone, Copy)]
#[repr(C)]
struct SegmentControl {
    length: usize,
    level: libc::c_int,
    kind: libc::c_int,
    size: u16,
    _padding: [u8; 6],
}

impl SegmentControl {
    fn new(size: u16) -> Self {
        Self {
            // Without the padding behind it.
            length: size_of::<libc::cmsghdr>() + size_of::<u16>(),
            level: libc::SOL_UDP,
            kind: libc::UDP_SEGMENT,
            size,
            _padding: [0; 6],
        }
    }
}

const _: () = assert!(size_of::<SegmentControl>() == size_of::<libc::cmsghdr>() + 8);

/// Sends messages, at most [`MOST_MESSAGES`], each with the number of its datagrams.
/// Returns how many datagrams were taken from the front.
///
/// # Errors
/// The reason why the first was not taken. The reason for later ones is found out by
/// another call. `WouldBlock` if there is no room. Otherwise the kernel's, which may be
/// about a message that was sent before.
///
/// References: sendmmsg(2), udp(7).
#[doc(alias = "sendmmsg")]
pub(crate) fn send_messages<'a>(
    fd: BorrowedFd<'_>,
    messages: impl Iterator<Item = (OutgoingMessage<'a>, usize)>,
    batch: &mut SendBatch,
) -> io::Result<usize> {
    if batch.headers.is_empty() {
        batch.make_room();
    }
    let mut count = 0;
    let mut controls = batch.controls.iter_mut();
    let places = batch.headers.iter_mut().zip(&mut batch.parts);
    for ((header, part), (message, datagrams)) in places.zip(messages) {
        *part = libc::iovec {
            iov_base: message.data.as_ptr().cast::<libc::c_void>().cast_mut(),
            iov_len: message.data.len(),
        };
        let header = &mut header.msg_hdr;
        header.msg_name = message.name.as_ptr().cast::<libc::c_void>().cast_mut();
        header.msg_namelen = message.name.len() as _;
        // Nothing that was taken a pointer to moves before the call, or is written to.
        header.msg_iov = part;
        header.msg_control = ptr::null_mut();
        header.msg_controllen = 0;
        if let Some(size) = message.segment
            && let Some(control) = controls.next()
        {
            *control = SegmentControl::new(size);
            header.msg_control = ptr::from_mut(control).cast();
            header.msg_controllen = size_of::<SegmentControl>() as _;
        }
        batch.counts[count] = datagrams;
        count += 1;
    }
    if count == 0 {
        return Ok(0);
    }
    let headers = &mut batch.headers[..count];
    let sent = retry(|| {
        // SAFETY: each of the headers has pointer and length of a name and of data that are
        // borrowed for `'a`, through an element of `parts`, and of a control message or none;
        // none of these moves before the call returns. The kernel reads them, and writes the
        // lengths in `headers`, which are borrowed for writing.
        unsafe {
            libc::sendmmsg(
                fd.as_raw_fd(),
                headers.as_mut_ptr(),
                count as libc::c_uint,
                SEND_FLAGS,
            )
        }
    })?;
    Ok(batch.counts.iter().take(sent as usize).sum())
}

/// Sends one message, to the peer of the socket if `name` is empty. It is cheaper than
/// [`send_messages`] with one message.
///
/// # Errors
/// As [`send_messages`].
///
/// References: send(2), udp(7).
#[inline]
pub(crate) fn send_one(fd: BorrowedFd<'_>, name: &[u8], data: &[u8]) -> io::Result<()> {
    let name_at = match name {
        [] => ptr::null(),
        name => name.as_ptr().cast(),
    };
    super::retry_count(|| {
        // SAFETY: data and name are borrowed until the call returns, and as long as is
        // said. A name is encoded as the kernel's, which checks it.
        unsafe {
            libc::sendto(
                fd.as_raw_fd(),
                data.as_ptr().cast(),
                data.len(),
                SEND_FLAGS,
                name_at,
                name.len() as libc::socklen_t,
            )
        }
    })?;
    Ok(())
}

/// Makes a datagram socket, non-blocking and close-on-exec.
///
/// # Errors
/// `EMFILE` and `ENFILE` if no descriptor number is free. Otherwise the kernel's.
pub(crate) fn datagram_socket(family: Family) -> io::Result<OwnedFd> {
    let kind = libc::SOCK_DGRAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    let fd = retry(|| {
        // SAFETY: takes integers only.
        unsafe { libc::socket(family.number(), kind, 0) }
    })?;
    // SAFETY: the kernel has just made `fd` for us; nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Whether the socket is of type `SOCK_DGRAM`.
///
/// # Errors
/// `ENOTSOCK` if it is not a socket. Otherwise the kernel's.
pub(crate) fn is_datagram(fd: BorrowedFd<'_>) -> io::Result<bool> {
    let kind: libc::c_int = option(fd, libc::SOL_SOCKET, libc::SO_TYPE)?;
    Ok(kind == libc::SOCK_DGRAM)
}

/// Whether several datagrams to one address can be sent as one.
#[doc(alias = "UDP_SEGMENT")]
pub(crate) fn has_segmentation(fd: BorrowedFd<'_>) -> bool {
    // Known since Linux 4.18. What is set here is the default of each message, none.
    set_option::<libc::c_int>(fd, libc::SOL_UDP, libc::UDP_SEGMENT, 0).is_ok()
}

/// Sets whether several datagrams in a row are received as one. Returns whether the kernel
/// can do that (since Linux 5.0).
#[doc(alias = "UDP_GRO")]
pub(crate) fn set_receive_offload(fd: BorrowedFd<'_>, on: bool) -> bool {
    set_flag(fd, libc::SOL_UDP, libc::UDP_GRO, on).is_ok()
}

/// Whether datagrams may be sent to a broadcast address.
///
/// # Errors
/// The kernel's.
pub(crate) fn broadcast(fd: BorrowedFd<'_>) -> io::Result<bool> {
    flag(fd, libc::SOL_SOCKET, libc::SO_BROADCAST)
}

/// Sets whether datagrams may be sent to a broadcast address.
///
/// # Errors
/// The kernel's.
#[doc(alias = "SO_BROADCAST")]
pub(crate) fn set_broadcast(fd: BorrowedFd<'_>, on: bool) -> io::Result<()> {
    set_flag(fd, libc::SOL_SOCKET, libc::SO_BROADCAST, on)
}

/// Returns how many messages the kernel has dropped since the socket had no room.
///
/// # Errors
/// The kernel's.
#[doc(alias = "SO_MEMINFO")]
pub(crate) fn dropped(fd: BorrowedFd<'_>) -> io::Result<u32> {
    let numbers: [u32; MEMINFO_NUMBERS] = option(fd, libc::SOL_SOCKET, SO_MEMINFO)?;
    Ok(numbers[MEMINFO_DROPS])
}

/// An interface, in the form of the IPv4 options.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Interface4 {
    pub(crate) address: Ipv4Addr,
    /// 0 for none in particular.
    pub(crate) index: u32,
}

fn membership4(group: Ipv4Addr, interface: Interface4) -> io::Result<libc::ip_mreqn> {
    let to_number = |address: Ipv4Addr| libc::in_addr {
        s_addr: u32::from_ne_bytes(address.octets()),
    };
    Ok(libc::ip_mreqn {
        imr_multiaddr: to_number(group),
        imr_address: to_number(interface.address),
        imr_ifindex: index(interface.index)?,
    })
}

fn index(index: u32) -> io::Result<libc::c_int> {
    libc::c_int::try_from(index).map_err(|_| io::ErrorKind::InvalidInput.into())
}

/// Joins an IPv4 multicast group, or leaves it. Datagrams to groups that others on this
/// machine have joined are not received then.
///
/// # Errors
/// The kernel's.
#[doc(alias = "IP_ADD_MEMBERSHIP")]
#[doc(alias = "IP_DROP_MEMBERSHIP")]
pub(crate) fn set_membership4(
    fd: BorrowedFd<'_>,
    group: Ipv4Addr,
    interface: Interface4,
    joins: bool,
) -> io::Result<()> {
    let membership = membership4(group, interface)?;
    let name = match joins {
        true => libc::IP_ADD_MEMBERSHIP,
        false => libc::IP_DROP_MEMBERSHIP,
    };
    set_flag(fd, libc::IPPROTO_IP, libc::IP_MULTICAST_ALL, false)?;
    set_option(fd, libc::IPPROTO_IP, name, membership)
}

/// As [`set_membership4`], for IPv6.
///
/// # Errors
/// The kernel's.
#[doc(alias = "IPV6_ADD_MEMBERSHIP")]
#[doc(alias = "IPV6_DROP_MEMBERSHIP")]
pub(crate) fn set_membership6(
    fd: BorrowedFd<'_>,
    group: Ipv6Addr,
    interface: u32,
    joins: bool,
) -> io::Result<()> {
    let membership = libc::ipv6_mreq {
        ipv6mr_multiaddr: libc::in6_addr {
            s6_addr: group.octets(),
        },
        ipv6mr_interface: interface,
    };
    let name = match joins {
        true => libc::IPV6_ADD_MEMBERSHIP,
        false => libc::IPV6_DROP_MEMBERSHIP,
    };
    // Known since Linux 4.20, and without it the group is received all the same.
    let _ = set_flag(fd, libc::IPPROTO_IPV6, IPV6_MULTICAST_ALL, false);
    set_option(fd, libc::IPPROTO_IPV6, name, membership)
}

/// Sets the interface by which IPv4 multicast datagrams are sent.
///
/// # Errors
/// The kernel's.
#[doc(alias = "IP_MULTICAST_IF")]
pub(crate) fn set_multicast_interface4(
    fd: BorrowedFd<'_>,
    interface: Interface4,
) -> io::Result<()> {
    let choice = membership4(Ipv4Addr::UNSPECIFIED, interface)?;
    set_option(fd, libc::IPPROTO_IP, libc::IP_MULTICAST_IF, choice)
}

/// As [`set_multicast_interface4`], for IPv6.
///
/// # Errors
/// The kernel's.
#[doc(alias = "IPV6_MULTICAST_IF")]
pub(crate) fn set_multicast_interface6(fd: BorrowedFd<'_>, interface: u32) -> io::Result<()> {
    let interface = index(interface)?;
    set_option(fd, libc::IPPROTO_IPV6, libc::IPV6_MULTICAST_IF, interface)
}

/// Returns the time to live of multicast datagrams, in hops.
///
/// # Errors
/// The kernel's.
pub(crate) fn multicast_hops(fd: BorrowedFd<'_>, family: Family) -> io::Result<u32> {
    let hops: libc::c_int = match family {
        Family::Inet6 => option(fd, libc::IPPROTO_IPV6, libc::IPV6_MULTICAST_HOPS)?,
        Family::Inet4 | Family::Unix => option(fd, libc::IPPROTO_IP, libc::IP_MULTICAST_TTL)?,
    };
    Ok(u32::try_from(hops).unwrap_or(0))
}

/// Sets the time to live of multicast datagrams, in hops.
///
/// # Errors
/// `InvalidInput` above 255. Otherwise the kernel's.
#[doc(alias = "IP_MULTICAST_TTL")]
#[doc(alias = "IPV6_MULTICAST_HOPS")]
pub(crate) fn set_multicast_hops(fd: BorrowedFd<'_>, family: Family, hops: u32) -> io::Result<()> {
    // The kernel takes -1 for its default.
    let hops = u8::try_from(hops).map_err(|_| io::ErrorKind::InvalidInput)?;
    let (level, name) = match family {
        Family::Inet6 => (libc::IPPROTO_IPV6, libc::IPV6_MULTICAST_HOPS),
        Family::Inet4 | Family::Unix => (libc::IPPROTO_IP, libc::IP_MULTICAST_TTL),
    };
    set_option(fd, level, name, libc::c_int::from(hops))
}

const fn loopback_option(family: Family) -> (libc::c_int, libc::c_int) {
    match family {
        Family::Inet6 => (libc::IPPROTO_IPV6, libc::IPV6_MULTICAST_LOOP),
        Family::Inet4 | Family::Unix => (libc::IPPROTO_IP, libc::IP_MULTICAST_LOOP),
    }
}

/// Whether multicast datagrams that are sent here are also received on this machine.
///
/// # Errors
/// The kernel's.
pub(crate) fn multicast_loopback(fd: BorrowedFd<'_>, family: Family) -> io::Result<bool> {
    let (level, name) = loopback_option(family);
    flag(fd, level, name)
}

/// Sets whether multicast datagrams that are sent here are also received on this machine.
///
/// # Errors
/// The kernel's.
#[doc(alias = "IP_MULTICAST_LOOP")]
#[doc(alias = "IPV6_MULTICAST_LOOP")]
pub(crate) fn set_multicast_loopback(
    fd: BorrowedFd<'_>,
    family: Family,
    on: bool,
) -> io::Result<()> {
    let (level, name) = loopback_option(family);
    set_flag(fd, level, name, on)
}
