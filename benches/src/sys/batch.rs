//! Many messages by one call, as one writes it by hand.

use std::io;
use std::mem;
use std::os::fd::RawFd;
use std::ptr;

use super::{check, check_size, set_option};

/// How many messages one call takes.
pub(crate) const MESSAGES: usize = 64;

const CONTROL_WORDS: usize = 8;

/// Room for messages and what is said of them. Nothing in it moves, so that the headers
/// point to it for good.
pub(crate) struct Batch {
    room: usize,
    data: Box<[u8]>,
    names: Box<[libc::sockaddr_in]>,
    controls: Box<[[u64; CONTROL_WORDS]]>,
    _parts: Box<[libc::iovec]>,
    headers: Box<[libc::mmsghdr]>,
    takes_segments: bool,
}

impl Batch {
    pub(crate) fn new(room: usize, takes_segments: bool) -> Self {
        // SAFETY: all zeroes is a name of no family.
        let name: libc::sockaddr_in = unsafe { mem::zeroed() };
        let mut data = vec![0; room * MESSAGES].into_boxed_slice();
        let mut names = vec![name; MESSAGES].into_boxed_slice();
        let mut controls = vec![[0; CONTROL_WORDS]; MESSAGES].into_boxed_slice();
        let mut parts: Box<[_]> = data
            .chunks_exact_mut(room)
            .map(|place| libc::iovec {
                iov_base: place.as_mut_ptr().cast(),
                iov_len: room,
            })
            .collect();
        let places = parts.iter_mut().zip(&mut names).zip(&mut controls);
        let headers = places
            .map(|((part, name), control)| {
                // SAFETY: all zeroes is a message without anything.
                let mut header: libc::mmsghdr = unsafe { mem::zeroed() };
                header.msg_hdr.msg_name = ptr::from_mut(name).cast();
                header.msg_hdr.msg_iov = part;
                header.msg_hdr.msg_iovlen = 1;
                header.msg_hdr.msg_control = control.as_mut_ptr().cast();
                header
            })
            .collect();
        Self {
            room,
            data,
            names,
            controls,
            _parts: parts,
            headers,
            takes_segments,
        }
    }

    /// Receives what is there, up to [`MESSAGES`].
    #[inline]
    pub(crate) fn receive(&mut self, fd: RawFd) -> io::Result<usize> {
        for header in &mut self.headers {
            header.msg_hdr.msg_namelen = size_of::<libc::sockaddr_in>() as libc::socklen_t;
            header.msg_hdr.msg_controllen = match self.takes_segments {
                true => size_of::<[u64; CONTROL_WORDS]>(),
                false => 0,
            };
        }
        for part in &mut self._parts {
            part.iov_len = self.room;
        }
        let headers = self.headers.as_mut_ptr();
        // SAFETY: there are that many headers, and each points to places of its own.
        let count = check(unsafe {
            libc::recvmmsg(
                fd,
                headers,
                MESSAGES as libc::c_uint,
                libc::MSG_DONTWAIT,
                ptr::null_mut(),
            )
        })?;
        Ok(count as usize)
    }

    /// The bytes of a message that was received.
    #[inline]
    pub(crate) fn data(&self, at: usize) -> &[u8] {
        &self.data[at * self.room..][..self.headers[at].msg_len as usize]
    }

    /// How many datagrams a message is.
    #[inline]
    pub(crate) fn datagrams(&self, at: usize) -> usize {
        let header = &self.headers[at];
        if header.msg_hdr.msg_controllen == 0 {
            return 1;
        }
        // The only control message that was asked for.
        let segment = self.controls[at][2] as u32 as usize;
        (header.msg_len as usize).div_ceil(segment.max(1)).max(1)
    }

    /// Who sent a message.
    #[inline]
    pub(crate) fn name(&self, at: usize) -> &libc::sockaddr_in {
        &self.names[at]
    }

    /// Sends the first `count` messages back to where they came from.
    #[inline]
    pub(crate) fn send_back(&mut self, fd: RawFd, count: usize) -> io::Result<()> {
        for at in 0..count {
            self._parts[at].iov_len = self.headers[at].msg_len as usize;
            self.headers[at].msg_hdr.msg_controllen = 0;
        }
        let mut sent = 0;
        while sent < count {
            let headers = self.headers[sent..].as_mut_ptr();
            let left = (count - sent) as libc::c_uint;
            // SAFETY: there are that many headers, which point to what was received.
            sent += check(unsafe { libc::sendmmsg(fd, headers, left, 0) })? as usize;
        }
        Ok(())
    }
}

/// Sends `data` as datagrams of `size` bytes, which the kernel cuts (`UDP_SEGMENT`).
#[inline]
pub(crate) fn send_segments(
    fd: RawFd,
    to: Option<&libc::sockaddr_in>,
    data: &[u8],
    size: u16,
) -> io::Result<()> {
    let mut part = libc::iovec {
        iov_base: data.as_ptr().cast_mut().cast(),
        iov_len: data.len(),
    };
    // The header of a control message, then its number.
    let mut control = [
        size_of::<libc::cmsghdr>() as u64 + 2,
        libc::SOL_UDP as u64 | (libc::UDP_SEGMENT as u64) << 32,
        u64::from(size),
    ];
    // SAFETY: all zeroes is a message without anything.
    let mut header: libc::msghdr = unsafe { mem::zeroed() };
    if let Some(to) = to {
        header.msg_name = ptr::from_ref(to).cast_mut().cast();
        header.msg_namelen = size_of_val(to) as libc::socklen_t;
    }
    header.msg_iov = &mut part;
    header.msg_iovlen = 1;
    header.msg_control = control.as_mut_ptr().cast();
    header.msg_controllen = size_of_val(&control);
    // SAFETY: the header points to what is borrowed or ours, and says how large it is.
    check_size(unsafe { libc::sendmsg(fd, &header, 0) })?;
    Ok(())
}

/// Sends one datagram.
#[inline]
pub(crate) fn send_to(fd: RawFd, data: &[u8], to: &libc::sockaddr_in) -> io::Result<()> {
    let length = size_of_val(to) as libc::socklen_t;
    // SAFETY: data and name are as long as is said.
    check_size(unsafe {
        libc::sendto(
            fd,
            data.as_ptr().cast(),
            data.len(),
            0,
            ptr::from_ref(to).cast(),
            length,
        )
    })?;
    Ok(())
}

/// Sends `data` as so many datagrams of one length, by one call, on a connected socket.
pub(crate) fn send_many(fd: RawFd, data: &[u8], size: usize) -> io::Result<()> {
    let mut parts: Vec<_> = data
        .chunks_exact(size)
        .map(|piece| libc::iovec {
            iov_base: piece.as_ptr().cast_mut().cast(),
            iov_len: size,
        })
        .collect();
    let mut headers: Vec<_> = parts
        .iter_mut()
        .map(|part| {
            // SAFETY: all zeroes is a message without anything.
            let mut header: libc::mmsghdr = unsafe { mem::zeroed() };
            header.msg_hdr.msg_iov = part;
            header.msg_hdr.msg_iovlen = 1;
            header
        })
        .collect();
    let count = headers.len() as libc::c_uint;
    // SAFETY: there are that many headers, which point to what is borrowed.
    let sent = check(unsafe { libc::sendmmsg(fd, headers.as_mut_ptr(), count, 0) })?;
    assert_eq!(sent as usize, headers.len(), "the buffer has room for them");
    Ok(())
}

/// Has the kernel merge datagrams that come in a row (`UDP_GRO`).
pub(crate) fn receive_segments(fd: RawFd) -> io::Result<()> {
    set_option(fd, libc::SOL_UDP, libc::UDP_GRO, 1)
}

// Packets, pipes and children.

/// A socket of packets that listens at a path.
pub(crate) fn listen_for_packets(path: &std::path::Path) -> io::Result<std::os::fd::OwnedFd> {
    let socket = packet_socket()?;
    let (name, size) = super::unix_name(path);
    let fd = std::os::fd::AsRawFd::as_raw_fd(&socket);
    // SAFETY: the name is ours and as large as is said.
    check(unsafe { libc::bind(fd, (&raw const name).cast(), size) })?;
    super::set_backlog(fd, 4_096)?;
    Ok(socket)
}

/// Connects to such a socket.
pub(crate) fn connect_for_packets(path: &std::path::Path) -> io::Result<std::os::fd::OwnedFd> {
    let socket = packet_socket()?;
    let (name, size) = super::unix_name(path);
    let fd = std::os::fd::AsRawFd::as_raw_fd(&socket);
    // SAFETY: the name is ours and as large as is said.
    check(unsafe { libc::connect(fd, (&raw const name).cast(), size) })?;
    Ok(socket)
}

/// Two sockets of packets that are connected.
pub(crate) fn packet_pair() -> io::Result<(std::os::fd::OwnedFd, std::os::fd::OwnedFd)> {
    let mut both = [0; 2];
    let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC;
    // SAFETY: the array is ours and has room for two.
    check(unsafe { libc::socketpair(libc::AF_UNIX, kind, 0, both.as_mut_ptr()) })?;
    Ok((super::own(both[0]), super::own(both[1])))
}

fn packet_socket() -> io::Result<std::os::fd::OwnedFd> {
    let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC;
    // SAFETY: no pointer is involved.
    let fd = check(unsafe { libc::socket(libc::AF_UNIX, kind, 0) })?;
    Ok(super::own(fd))
}

#[inline]
pub(crate) fn read(fd: RawFd, buffer: &mut [u8]) -> io::Result<usize> {
    // SAFETY: the buffer is ours and as long as is said.
    check_size(unsafe { libc::read(fd, buffer.as_mut_ptr().cast(), buffer.len()) })
}

#[inline]
pub(crate) fn write(fd: RawFd, data: &[u8]) -> io::Result<usize> {
    // SAFETY: the data are as long as is said.
    check_size(unsafe { libc::write(fd, data.as_ptr().cast(), data.len()) })
}

/// A descriptor of a process.
pub(crate) fn open_pidfd(pid: i32) -> io::Result<std::os::fd::OwnedFd> {
    // SAFETY: no pointer is involved.
    let fd = check_size(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) } as isize)?;
    Ok(super::own(fd as RawFd))
}

/// Starts a program with nothing but its name, and this process' own streams.
pub(crate) fn spawn(program: &std::ffi::CStr) -> io::Result<i32> {
    let mut pid = 0;
    let arguments = [program.as_ptr().cast_mut(), ptr::null_mut()];
    let environment = [ptr::null_mut()];
    // SAFETY: the lists end with null, and what they point to is borrowed.
    let error = unsafe {
        libc::posix_spawn(
            &mut pid,
            program.as_ptr(),
            ptr::null(),
            ptr::null(),
            arguments.as_ptr(),
            environment.as_ptr(),
        )
    };
    match error {
        0 => Ok(pid),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

/// Reaps a child that has exited; its status.
pub(crate) fn reap(pid: i32) -> io::Result<i32> {
    let mut status = 0;
    // SAFETY: the variable is ours.
    check(unsafe { libc::waitpid(pid, &mut status, 0) })?;
    Ok(status)
}

/// A descriptor that tokio waits for.
pub(crate) fn async_fd(
    fd: std::os::fd::OwnedFd,
    interest: tokio::io::Interest,
) -> io::Result<tokio::io::unix::AsyncFd<std::os::fd::OwnedFd>> {
    // SAFETY: an owned descriptor is open, and stays the same, for as long as it is there.
    let registered = unsafe { tokio::io::unix::AsyncFd::register_with_interest(fd, interest) };
    registered.map_err(Into::into)
}
