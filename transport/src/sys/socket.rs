//! Sockets: making, naming, connecting and accepting them, and their options.

#![allow(unsafe_code)]

use std::io;
use std::mem;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::Duration;

use super::address::{NameBuffer, SocketName};
use super::cmsg::Credentials;
use super::retry;

// Numbers of the generic socket ABI; the C library's bindings do not have all of
// them yet.
const SO_PASSPIDFD: libc::c_int = 76;
const SO_COOKIE: libc::c_int = 57;
const SO_PEERPIDFD: libc::c_int = 77;
const SO_PASSRIGHTS: libc::c_int = 83;

/// The socket families that can be made here.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub(crate) enum Family {
    /// IPv4.
    Inet4,
    /// IPv6.
    Inet6,
    /// UNIX, local to this machine.
    Unix,
}

impl Family {
    pub(super) const fn number(self) -> libc::c_int {
        match self {
            Self::Inet4 => libc::AF_INET,
            Self::Inet6 => libc::AF_INET6,
            Self::Unix => libc::AF_UNIX,
        }
    }

    const fn from_number(number: libc::c_int) -> Option<Self> {
        match number {
            libc::AF_INET => Some(Self::Inet4),
            libc::AF_INET6 => Some(Self::Inet6),
            libc::AF_UNIX => Some(Self::Unix),
            _ => None,
        }
    }
}

/// How far a [`connect`] got.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Connecting {
    /// Connected.
    Done,
    /// In progress. When the socket becomes writable, [`take_error`] tells the result.
    InProgress,
    /// The UNIX listener has no room. The kernel does not report when it has room again, so
    /// the only way is to call again later.
    BacklogFull,
}

/// What a socket is, as [`socket_kind`] finds out.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct SocketKind {
    /// Its family. `None` is a family that cannot be made here.
    pub(crate) domain: Option<Family>,
    /// Whether it is a byte stream, rather than datagrams or sequenced packets.
    pub(crate) stream: bool,
    /// Whether it is a socket of sequenced packets.
    pub(crate) packets: bool,
    /// Whether it accepts connections.
    pub(crate) listening: bool,
}

/// Makes a stream socket, non-blocking and close-on-exec.
///
/// # Errors
/// `EMFILE` and `ENFILE` if no descriptor number is free. Otherwise the kernel's.
pub(crate) fn stream_socket(family: Family) -> io::Result<OwnedFd> {
    let kind = libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    let fd = retry(|| {
        // SAFETY: takes integers only.
        unsafe { libc::socket(family.number(), kind, 0) }
    })?;
    // SAFETY: the kernel has just made `fd` for us; nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Binds the socket to a name.
///
/// A path is created in the file system, and stays there until somebody unlinks it.
///
/// # Errors
/// `InvalidInput` if `name` cannot be a name. Otherwise the kernel's.
pub(crate) fn bind(fd: BorrowedFd<'_>, name: &SocketName) -> io::Result<()> {
    let name = name.encode()?;
    let name = name.as_bytes();
    retry(|| {
        // SAFETY: pointer and length are those of `name`, borrowed until the call
        // returns, and the kernel only reads.
        unsafe { libc::bind(fd.as_raw_fd(), name.as_ptr().cast(), name.len() as _) }
    })?;
    Ok(())
}

/// Makes the socket accept connections. `backlog` connections, and one more, can wait for
/// [`accept`].
///
/// # Errors
/// The kernel's.
pub(crate) fn listen(fd: BorrowedFd<'_>, backlog: i32) -> io::Result<()> {
    retry(|| {
        // SAFETY: takes integers only.
        unsafe { libc::listen(fd.as_raw_fd(), backlog) }
    })?;
    Ok(())
}

/// Begins to connect the socket, which must be non-blocking, to `name`.
///
/// # Errors
/// `InvalidInput` if `name` cannot be a name. Otherwise the kernel's.
pub(crate) fn connect(fd: BorrowedFd<'_>, name: &SocketName) -> io::Result<Connecting> {
    let unix = !matches!(name, SocketName::Inet(_));
    let name = name.encode()?;
    let name = name.as_bytes();
    loop {
        // SAFETY: pointer and length are those of `name`, borrowed until the call
        // returns, and the kernel only reads.
        let answer =
            unsafe { libc::connect(fd.as_raw_fd(), name.as_ptr().cast(), name.len() as _) };
        if answer == 0 {
            return Ok(Connecting::Done);
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::EINPROGRESS) => return Ok(Connecting::InProgress),
            // A UNIX connect happens at once or not at all, so an interrupted one
            // is made again; any other goes on in the background.
            Some(libc::EINTR) if unix => {}
            Some(libc::EINTR) => return Ok(Connecting::InProgress),
            // On an IP socket this says that there is no free local port: an error.
            Some(libc::EAGAIN) if unix => return Ok(Connecting::BacklogFull),
            _ => return Err(error),
        }
    }
}

/// Accepts the first connection that waits at a listener. It is non-blocking and
/// close-on-exec.
///
/// The returned name is the peer's at the time of its arrival. Nothing is allocated for it,
/// unless the peer is a UNIX socket with a name.
///
/// # Errors
/// `WouldBlock` if none waits. `EMFILE` and `ENFILE` if no descriptor number is free, even
/// if no connection waits; a connection stays in the queue. `ECONNABORTED` and similar
/// errors concern one connection that went away, and there may be others: go on.
#[inline]
pub(crate) fn accept(fd: BorrowedFd<'_>) -> io::Result<(OwnedFd, SocketName)> {
    let mut name = NameBuffer::new();
    let room = name.bytes_mut();
    let mut length = room.len() as libc::socklen_t;
    let accepted = retry(|| {
        // SAFETY: pointer and length are those of `room`; it and `length` are
        // borrowed for writing until the call returns. An interrupted call has
        // not changed `length`.
        unsafe {
            libc::accept4(
                fd.as_raw_fd(),
                room.as_mut_ptr().cast(),
                &raw mut length,
                libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC,
            )
        }
    })?;
    // SAFETY: the kernel has just made `accepted` for us; nothing else owns it.
    let accepted = unsafe { OwnedFd::from_raw_fd(accepted) };
    Ok((accepted, SocketName::decode(name.prefix(length as usize))))
}

/// As [`accept`], for a listener that others hold too. They may have made it blocking, and
/// unlike the calls that move bytes, accept4(2) has no flag against that. So it is called
/// only if a connection waits.
///
/// One case is left: another holder makes it blocking *and* takes the connection between
/// the two calls.
///
/// # Errors
/// As [`accept`].
pub(crate) fn accept_shared(fd: BorrowedFd<'_>) -> io::Result<(OwnedFd, SocketName)> {
    if !has_waiting(fd)? {
        return Err(io::Error::from(io::ErrorKind::WouldBlock));
    }
    accept(fd)
}

/// Accepts a connection, from a [shared](accept_shared) listener or not.
#[inline]
pub(crate) fn accept_from(
    fd: BorrowedFd<'_>,
    may_block: bool,
) -> io::Result<(OwnedFd, SocketName)> {
    match may_block {
        true => accept_shared(fd),
        false => accept(fd),
    }
}

/// Whether a connection waits at a listener, or whether another socket has something to
/// read.
///
/// # Errors
/// The kernel's.
pub(crate) fn has_waiting(fd: BorrowedFd<'_>) -> io::Result<bool> {
    let mut watched = libc::pollfd {
        fd: fd.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    let count = retry(|| {
        // SAFETY: one element, borrowed for writing until the call returns.
        unsafe { libc::poll(&raw mut watched, 1, 0) }
    })?;
    Ok(count > 0)
}

/// Whether nothing can be received or sent any more, except for what has arrived
/// (`POLLHUP`).
pub(crate) fn is_hung_up(fd: BorrowedFd<'_>) -> bool {
    let mut watched = libc::pollfd {
        fd: fd.as_raw_fd(),
        events: 0,
        revents: 0,
    };
    let count = retry(|| {
        // SAFETY: one element, borrowed for writing until the call returns.
        unsafe { libc::poll(&raw mut watched, 1, 0) }
    });
    count.is_ok() && watched.revents & libc::POLLHUP != 0
}

/// Returns how many bytes wait to be read. On a stream, descriptors never wait without
/// bytes.
///
/// # Errors
/// The kernel's.
#[doc(alias = "SIOCINQ")]
pub(crate) fn bytes_unread(fd: BorrowedFd<'_>) -> io::Result<usize> {
    let mut bytes: libc::c_int = 0;
    retry(|| {
        // SAFETY: this request writes one `int`, and `bytes` is one, borrowed for
        // writing until the call returns. (SIOCINQ is the same number.)
        unsafe { libc::ioctl(fd.as_raw_fd(), libc::FIONREAD, &raw mut bytes) }
    })?;
    Ok(usize::try_from(bytes).unwrap_or(0))
}

/// Returns the socket's own name.
///
/// # Errors
/// The kernel's.
#[doc(alias = "getsockname")]
pub(crate) fn local_name(fd: BorrowedFd<'_>) -> io::Result<SocketName> {
    name_by(libc::getsockname, fd)
}

/// Returns the name of the socket at the other end.
///
/// # Errors
/// `NotConnected` if there is no other end, or no longer. Even a connection that was just
/// accepted may have been reset.
#[doc(alias = "getpeername")]
pub(crate) fn peer_name(fd: BorrowedFd<'_>) -> io::Result<SocketName> {
    name_by(libc::getpeername, fd)
}

/// The signature of getsockname(2) and getpeername(2).
type NameCall =
    unsafe extern "C" fn(libc::c_int, *mut libc::sockaddr, *mut libc::socklen_t) -> libc::c_int;

fn name_by(call: NameCall, fd: BorrowedFd<'_>) -> io::Result<SocketName> {
    let mut name = NameBuffer::new();
    let room = name.bytes_mut();
    let mut length = room.len() as libc::socklen_t;
    retry(|| {
        // SAFETY: `call` is one of the two above. Pointer and length are those of
        // `room`; it and `length` are borrowed for writing until the call returns.
        unsafe { call(fd.as_raw_fd(), room.as_mut_ptr().cast(), &raw mut length) }
    })?;
    Ok(SocketName::decode(name.prefix(length as usize)))
}

/// Shuts down one direction of the connection, or both, for everyone who holds the socket.
///
/// # Errors
/// `NotConnected` if the peer has reset the connection. Otherwise the kernel's.
pub(crate) fn shutdown(fd: BorrowedFd<'_>, how: Shutdown) -> io::Result<()> {
    let how = match how {
        Shutdown::Read => libc::SHUT_RD,
        Shutdown::Write => libc::SHUT_WR,
        Shutdown::Both => libc::SHUT_RDWR,
    };
    retry(|| {
        // SAFETY: takes integers only.
        unsafe { libc::shutdown(fd.as_raw_fd(), how) }
    })?;
    Ok(())
}

/// Takes the pending error of the socket, if there is one: the result of a [`connect`], or
/// the reason why the connection broke.
///
/// # Errors
/// The kernel's, if the error could not be read.
#[doc(alias = "SO_ERROR")]
pub(crate) fn take_error(fd: BorrowedFd<'_>) -> io::Result<Option<io::Error>> {
    let error: libc::c_int = option(fd, libc::SOL_SOCKET, libc::SO_ERROR)?;
    Ok((error != 0).then(|| io::Error::from_raw_os_error(error)))
}

/// Finds out what a descriptor from elsewhere is.
///
/// # Errors
/// `ENOTSOCK` if it is not a socket. Otherwise the kernel's.
pub(crate) fn socket_kind(fd: BorrowedFd<'_>) -> io::Result<SocketKind> {
    let kind: libc::c_int = option(fd, libc::SOL_SOCKET, libc::SO_TYPE)?;
    let domain: libc::c_int = option(fd, libc::SOL_SOCKET, libc::SO_DOMAIN)?;
    Ok(SocketKind {
        domain: Family::from_number(domain),
        stream: kind == libc::SOCK_STREAM,
        packets: kind == libc::SOCK_SEQPACKET,
        listening: is_listening(fd)?,
    })
}

/// Whether the socket accepts connections.
///
/// # Errors
/// As [`socket_kind`].
#[doc(alias = "SO_ACCEPTCONN")]
pub(crate) fn is_listening(fd: BorrowedFd<'_>) -> io::Result<bool> {
    flag(fd, libc::SOL_SOCKET, libc::SO_ACCEPTCONN)
}

/// Whether the socket is of type `SOCK_STREAM`.
///
/// # Errors
/// As [`socket_kind`].
pub(crate) fn is_stream(fd: BorrowedFd<'_>) -> io::Result<bool> {
    let kind: libc::c_int = option(fd, libc::SOL_SOCKET, libc::SO_TYPE)?;
    Ok(kind == libc::SOCK_STREAM)
}

/// Makes `close` wait up to `time` for unsent bytes, or not at all.
///
/// The time is rounded up to whole seconds. Zero discards the bytes and resets the
/// connection. Beware: a non-blocking socket waits too, and blocks its whole thread.
///
/// # Errors
/// `InvalidInput` above 2^31 - 1 seconds. Otherwise the kernel's.
#[doc(alias = "SO_LINGER")]
pub(crate) fn set_linger(fd: BorrowedFd<'_>, time: Option<Duration>) -> io::Result<()> {
    let linger = libc::linger {
        l_onoff: libc::c_int::from(time.is_some()),
        l_linger: time.map_or(Ok(0), whole_seconds)?,
    };
    set_option(fd, libc::SOL_SOCKET, libc::SO_LINGER, linger)
}

#[cfg(test)]
/// Returns what [`set_linger`] has set. The default is `None`.
///
/// # Errors
/// The kernel's.
pub(crate) fn linger(fd: BorrowedFd<'_>) -> io::Result<Option<Duration>> {
    let linger: libc::linger = option(fd, libc::SOL_SOCKET, libc::SO_LINGER)?;
    let seconds = u64::try_from(linger.l_linger).unwrap_or(0);
    Ok((linger.l_onoff != 0).then(|| Duration::from_secs(seconds)))
}

/// Makes sure that closing `fd`, which came from somebody else, does not block.
///
/// The sender of a socket can set it to linger. Then whoever closes it last sleeps, for up
/// to 2^31 - 1 seconds. A descriptor that is not a socket is left alone. The setting
/// belongs to the socket: the sender loses it too, if it still has a copy.
///
/// Returns whether `fd` is a socket.
#[inline]
pub(crate) fn disarm_linger(fd: BorrowedFd<'_>) -> bool {
    // Fails where `fd` is no socket, which is the common case; and on a socket
    // turning it off cannot fail.
    set_linger(fd, None).is_ok()
}

/// Whether `fd` is a UNIX socket, of any type. Such a socket can hold descriptors.
#[inline]
pub(crate) fn is_unix(fd: BorrowedFd<'_>) -> bool {
    option::<libc::c_int>(fd, libc::SOL_SOCKET, libc::SO_DOMAIN)
        .is_ok_and(|domain| domain == libc::AF_UNIX)
}

/// Returns the number that the kernel has given only to this socket. All descriptors of the
/// socket have the same.
///
/// # Errors
/// The kernel's, for example if `fd` is not a socket.
#[doc(alias = "SO_COOKIE")]
pub(crate) fn cookie(fd: BorrowedFd<'_>) -> io::Result<u64> {
    option(fd, libc::SOL_SOCKET, SO_COOKIE)
}

/// Whether small writes are sent at once.
///
/// # Errors
/// The kernel's, for example if the socket is not TCP.
#[doc(alias = "TCP_NODELAY")]
pub(crate) fn no_delay(fd: BorrowedFd<'_>) -> io::Result<bool> {
    flag(fd, libc::IPPROTO_TCP, libc::TCP_NODELAY)
}

/// Sets whether small writes are sent at once. By default they wait until earlier ones were
/// acknowledged.
///
/// # Errors
/// As [`no_delay`].
#[doc(alias = "TCP_NODELAY")]
pub(crate) fn set_no_delay(fd: BorrowedFd<'_>, on: bool) -> io::Result<()> {
    set_flag(fd, libc::IPPROTO_TCP, libc::TCP_NODELAY, on)
}

/// Whether the kernel probes a peer that has been silent.
///
/// # Errors
/// The kernel's.
#[doc(alias = "SO_KEEPALIVE")]
pub(crate) fn keep_alive(fd: BorrowedFd<'_>) -> io::Result<bool> {
    flag(fd, libc::SOL_SOCKET, libc::SO_KEEPALIVE)
}

/// Sets whether the kernel probes a peer that has been silent (by default for two hours),
/// and gives the connection up if no answer comes.
///
/// # Errors
/// The kernel's.
#[doc(alias = "SO_KEEPALIVE")]
pub(crate) fn set_keep_alive(fd: BorrowedFd<'_>, on: bool) -> io::Result<()> {
    set_flag(fd, libc::SOL_SOCKET, libc::SO_KEEPALIVE, on)
}

/// Sets when probing starts, the time between two probes, and how many may go unanswered.
/// It does not switch probing on; [`set_keep_alive`] does.
///
/// Times are rounded up to whole seconds. The kernel accepts 1 to 32767 seconds and 1 to
/// 127 probes. Its defaults are 7200 s, 75 s and 9.
///
/// # Errors
/// The kernel's; `InvalidInput` outside of those limits. Values that were set before the
/// one that failed stay set.
pub(crate) fn set_keep_alive_times(
    fd: BorrowedFd<'_>,
    idle: Duration,
    interval: Duration,
    count: u32,
) -> io::Result<()> {
    let count = libc::c_int::try_from(count).map_err(|_| io::ErrorKind::InvalidInput)?;
    let (idle, interval) = (whole_seconds(idle)?, whole_seconds(interval)?);
    set_option(fd, libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, idle)?;
    set_option(fd, libc::IPPROTO_TCP, libc::TCP_KEEPINTVL, interval)?;
    set_option(fd, libc::IPPROTO_TCP, libc::TCP_KEEPCNT, count)
}

/// Sets whether the socket may bind to an address that connections of an earlier listener
/// still use.
///
/// # Errors
/// The kernel's.
#[doc(alias = "SO_REUSEADDR")]
pub(crate) fn set_reuse_address(fd: BorrowedFd<'_>, on: bool) -> io::Result<()> {
    set_flag(fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, on)
}

/// Sets whether several sockets of one user may listen at one address. Each has a queue of
/// its own. The connections in it are reset when that socket closes.
///
/// # Errors
/// The kernel's.
#[doc(alias = "SO_REUSEPORT")]
pub(crate) fn set_reuse_port(fd: BorrowedFd<'_>, on: bool) -> io::Result<()> {
    set_flag(fd, libc::SOL_SOCKET, libc::SO_REUSEPORT, on)
}

/// The state of an accept queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct AcceptQueue {
    /// Connections that wait to be accepted.
    pub(crate) waiting: u32,
    /// How many may wait: the backlog of listen(2), as the kernel has limited it.
    pub(crate) limit: u32,
}

/// Returns the state of the queue of a listening TCP socket.
///
/// # Errors
/// The kernel's.
#[doc(alias = "TCP_INFO")]
pub(crate) fn accept_queue(fd: BorrowedFd<'_>) -> io::Result<AcceptQueue> {
    // The first 32 bytes of `tcp_info`. Of a listener, `tcpi_unacked` and `tcpi_sacked`,
    // the last two words, are its queue and its backlog (tcp_get_info in the kernel).
    let info: [u32; 8] = option(fd, libc::IPPROTO_TCP, libc::TCP_INFO)?;
    Ok(AcceptQueue {
        waiting: info[6],
        limit: info[7],
    })
}

/// Copies the options that connections inherit from a listener, to a socket that is not
/// bound yet.
///
/// # Errors
/// The kernel's.
pub(crate) fn copy_listener_options(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> io::Result<()> {
    let mut all = vec![
        (libc::IPPROTO_TCP, libc::TCP_NODELAY),
        (libc::SOL_SOCKET, libc::SO_KEEPALIVE),
    ];
    if socket_kind(from)?.domain == Some(Family::Inet6) {
        all.push((libc::IPPROTO_IPV6, libc::IPV6_V6ONLY));
    }
    for (level, name) in all {
        set_flag(to, level, name, flag(from, level, name)?)?;
    }
    Ok(())
}

/// Sends new connections at the address of a `SO_REUSEPORT` group to `count` of its
/// sockets, at random, from number `base` on. They are numbered in the order in which they
/// began to listen.
///
/// # Errors
/// The kernel's.
#[doc(alias = "SO_ATTACH_REUSEPORT_CBPF")]
pub(crate) fn steer_group(fd: BorrowedFd<'_>, base: u32, count: u32) -> io::Result<()> {
    /// `SKF_AD_OFF + SKF_AD_RANDOM`: a random word.
    const RANDOM: u32 = (-0x1000_i32 + 56).cast_unsigned();
    let step = |code: u32, k: u32| libc::sock_filter {
        code: code as u16,
        jt: 0,
        jf: 0,
        k,
    };
    let mut steps = [
        step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, RANDOM),
        step(libc::BPF_ALU | libc::BPF_MOD | libc::BPF_K, count),
        step(libc::BPF_ALU | libc::BPF_ADD | libc::BPF_K, base),
        step(libc::BPF_RET | libc::BPF_A, 0),
    ];
    let program = libc::sock_fprog {
        len: steps.len() as u16,
        filter: steps.as_mut_ptr(),
    };
    retry(|| {
        // SAFETY: the length is that of `program`, which with the steps that it points to
        // lives until the call returns, and is only read.
        unsafe {
            libc::setsockopt(
                fd.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_ATTACH_REUSEPORT_CBPF,
                (&raw const program).cast(),
                size_of::<libc::sock_fprog>() as libc::socklen_t,
            )
        }
    })?;
    Ok(())
}

/// Sets whether an IPv6 socket excludes IPv4. Call it before the socket is bound.
///
/// # Errors
/// The kernel's.
#[doc(alias = "IPV6_V6ONLY")]
pub(crate) fn set_v6_only(fd: BorrowedFd<'_>, on: bool) -> io::Result<()> {
    set_flag(fd, libc::IPPROTO_IPV6, libc::IPV6_V6ONLY, on)
}

/// Returns how many bytes the kernel may hold for sending, including its own overhead.
///
/// # Errors
/// The kernel's.
#[doc(alias = "SO_SNDBUF")]
pub(crate) fn send_buffer_size(fd: BorrowedFd<'_>) -> io::Result<usize> {
    size(fd, libc::SO_SNDBUF)
}

/// Asks for a send buffer of `bytes`. The kernel doubles that, for its overhead, within its
/// limits.
///
/// # Errors
/// The kernel's.
#[doc(alias = "SO_SNDBUF")]
pub(crate) fn set_send_buffer_size(fd: BorrowedFd<'_>, bytes: usize) -> io::Result<()> {
    set_size(fd, libc::SO_SNDBUF, bytes)
}

#[cfg(test)]
/// Returns how many bytes the kernel may hold until we read them, including its own
/// overhead.
///
/// # Errors
/// The kernel's.
#[doc(alias = "SO_RCVBUF")]
pub(crate) fn receive_buffer_size(fd: BorrowedFd<'_>) -> io::Result<usize> {
    size(fd, libc::SO_RCVBUF)
}

/// Asks for a receive buffer of `bytes`. The kernel doubles that, for its overhead, within
/// its limits. On a UNIX socket the sender's buffer counts, and not this one.
///
/// # Errors
/// The kernel's.
#[doc(alias = "SO_RCVBUF")]
pub(crate) fn set_receive_buffer_size(fd: BorrowedFd<'_>, bytes: usize) -> io::Result<()> {
    set_size(fd, libc::SO_RCVBUF, bytes)
}

/// Returns who was at the other end of a UNIX connection when it was made.
///
/// # Errors
/// `NotConnected` if the kernel knows nobody: the socket is not connected yet, or is not a
/// UNIX socket. Otherwise the kernel's.
#[doc(alias = "SO_PEERCRED")]
pub(crate) fn peer_credentials(fd: BorrowedFd<'_>) -> io::Result<Credentials> {
    let peer: libc::ucred = option(fd, libc::SOL_SOCKET, libc::SO_PEERCRED)?;
    // Reported as success, with a user that cannot exist. Taken for a user it might be
    // compared with another nobody, and match.
    if peer.uid == libc::uid_t::MAX {
        return Err(io::Error::from_raw_os_error(libc::ENOTCONN));
    }
    Ok(Credentials::new(peer.pid, peer.uid, peer.gid))
}

/// Returns a pidfd of the process of [`peer_credentials`]. Unlike its number, it never
/// comes to mean another process. It is close-on-exec.
///
/// # Errors
/// `ENOPROTOOPT` or `EINVAL` before Linux 6.5. Otherwise the kernel's.
#[doc(alias = "SO_PEERPIDFD")]
pub(crate) fn peer_pidfd(fd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let number: libc::c_int = option(fd, libc::SOL_SOCKET, SO_PEERPIDFD)?;
    // SAFETY: the call succeeded, so the kernel has just made a descriptor of this
    // number for us; nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Sets whether a UNIX socket accepts descriptors (the default). If not, the sender of one
/// gets `EPERM`.
///
/// If it is set on a listener, it holds for connections from before they are accepted. If
/// it is set later, descriptors may have been sent already.
///
/// # Errors
/// `ENOPROTOOPT` before Linux 6.16, `EOPNOTSUPP` on other families. Otherwise the kernel's.
#[doc(alias = "SO_PASSRIGHTS")]
pub(crate) fn set_pass_rights(fd: BorrowedFd<'_>, on: bool) -> io::Result<()> {
    set_flag(fd, libc::SOL_SOCKET, SO_PASSRIGHTS, on)
}

/// Whether the kernel accepts descriptors that are sent to this socket. True if it cannot
/// be asked.
#[doc(alias = "SO_PASSRIGHTS")]
pub(crate) fn passes_rights(fd: BorrowedFd<'_>) -> bool {
    flag(fd, libc::SOL_SOCKET, SO_PASSRIGHTS).unwrap_or(true)
}

/// Sets whether every read from a UNIX socket says who wrote the bytes. Bytes that were
/// queued before come without a process, from user 65534.
///
/// # Errors
/// The kernel's.
#[doc(alias = "SO_PASSCRED")]
pub(crate) fn set_pass_credentials(fd: BorrowedFd<'_>, on: bool) -> io::Result<()> {
    set_flag(fd, libc::SOL_SOCKET, libc::SO_PASSCRED, on)
}

/// Sets whether every read from a UNIX socket brings a pidfd of who wrote the bytes.
///
/// # Errors
/// `ENOPROTOOPT` before Linux 6.5. Otherwise the kernel's.
#[doc(alias = "SO_PASSPIDFD")]
pub(crate) fn set_pass_pidfd(fd: BorrowedFd<'_>, on: bool) -> io::Result<()> {
    set_flag(fd, libc::SOL_SOCKET, SO_PASSPIDFD, on)
}

/// Makes a descriptor from elsewhere non-blocking, for everyone who holds the same open
/// file.
///
/// # Errors
/// The kernel's.
#[doc(alias = "O_NONBLOCK")]
pub(crate) fn set_nonblocking(fd: BorrowedFd<'_>) -> io::Result<()> {
    let flags = retry(|| {
        // SAFETY: takes integers only.
        unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) }
    })?;
    if flags & libc::O_NONBLOCK == 0 {
        retry(|| {
            // SAFETY: takes integers only.
            unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) }
        })?;
    }
    Ok(())
}

/// Makes a descriptor from elsewhere close-on-exec, so that programs started later do not
/// have it.
///
/// # Errors
/// The kernel's.
#[doc(alias = "FD_CLOEXEC")]
pub(crate) fn set_close_on_exec(fd: BorrowedFd<'_>) -> io::Result<()> {
    let flags = retry(|| {
        // SAFETY: takes integers only.
        unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFD) }
    })?;
    if flags & libc::FD_CLOEXEC == 0 {
        retry(|| {
            // SAFETY: takes integers only.
            unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, flags | libc::FD_CLOEXEC) }
        })?;
    }
    Ok(())
}

#[cfg(test)]
/// Returns how much was sent and has not arrived. On TCP, it is the bytes that were not
/// acknowledged. On a UNIX socket, it is the memory of what the peer has not read,
/// including overhead.
///
/// # Errors
/// The kernel's.
#[doc(alias = "SIOCOUTQ")]
pub(crate) fn bytes_unsent(fd: BorrowedFd<'_>) -> io::Result<usize> {
    let mut bytes: libc::c_int = 0;
    retry(|| {
        // SAFETY: this request writes one `int`, and `bytes` is one, borrowed for
        // writing until the call returns. (SIOCOUTQ is the same number.)
        unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) }
    })?;
    Ok(usize::try_from(bytes).unwrap_or(0))
}

/// Makes a descriptor that the kernel passes to nobody, if it can: an io_uring.
#[cfg(test)]
pub(crate) fn unpassable() -> Option<OwnedFd> {
    // struct io_uring_params: zeros ask for nothing.
    let mut parameters = [0_u8; 256];
    // SAFETY: reads and writes the parameters, 120 bytes, until it returns.
    let fd = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, parameters.as_mut_ptr()) };
    let fd = libc::c_int::try_from(fd).ok().filter(|fd| *fd >= 0)?;
    // SAFETY: the kernel has just made it, and nobody else knows of it.
    Some(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Sets the permission bits that the path of a UNIX socket gets when it is bound, without
/// those in the umask of the process.
///
/// Since it is set before binding, there is no moment at which the path has wider
/// permissions.
///
/// # Errors
/// The kernel's.
#[doc(alias = "fchmod")]
pub(crate) fn set_mode(fd: BorrowedFd<'_>, mode: u32) -> io::Result<()> {
    retry(|| {
        // SAFETY: takes integers only.
        unsafe { libc::fchmod(fd.as_raw_fd(), mode as libc::mode_t) }
    })?;
    Ok(())
}

/// Sets the permission bits of a file that is held by an `O_PATH` descriptor, whatever is
/// at its path by now.
///
/// # Errors
/// `ENOSYS` before Linux 6.6. Otherwise the kernel's.
#[doc(alias = "fchmodat2")]
pub(super) fn set_mode_of_held(file: BorrowedFd<'_>, mode: u32) -> io::Result<()> {
    let (fd, flags) = (file.as_raw_fd(), libc::AT_EMPTY_PATH);
    retry(|| {
        // SAFETY: the path is an empty string that ends with a NUL and lives as long as
        // the program; the rest are integers.
        let answer = unsafe { libc::syscall(libc::SYS_fchmodat2, fd, c"".as_ptr(), mode, flags) };
        answer as libc::c_int
    })?;
    Ok(())
}

/// A type for the value of a socket option.
///
/// # Safety
/// Every bit pattern, including all zeros, must be a value, and there must be no padding:
/// the kernel reads and writes all bytes.
pub(super) unsafe trait OptionValue: Copy {}

// SAFETY: an integer.
unsafe impl OptionValue for libc::c_int {}
// SAFETY: an integer.
unsafe impl OptionValue for u64 {}
// SAFETY: two `int`s, nothing between them.
unsafe impl OptionValue for libc::linger {}
// SAFETY: three 32-bit integers, nothing between them.
unsafe impl OptionValue for libc::ucred {}
// SAFETY: three 32-bit integers, nothing between them.
unsafe impl OptionValue for libc::ip_mreqn {}
// SAFETY: 16 bytes and a 32-bit integer, nothing between them.
unsafe impl OptionValue for libc::ipv6_mreq {}
// SAFETY: integers.
unsafe impl<const N: usize> OptionValue for [u32; N] {}

#[inline]
pub(super) fn option<T: OptionValue>(
    fd: BorrowedFd<'_>,
    level: libc::c_int,
    name: libc::c_int,
) -> io::Result<T> {
    // SAFETY: all zeros is a value, by the trait's contract.
    let mut value: T = unsafe { mem::zeroed() };
    let mut length = size_of::<T>() as libc::socklen_t;
    retry(|| {
        // SAFETY: `length` is that of `value`; both are borrowed for writing until
        // the call returns, and whatever is written makes a `T`, by the
        // trait's contract.
        unsafe {
            libc::getsockopt(
                fd.as_raw_fd(),
                level,
                name,
                (&raw mut value).cast(),
                &raw mut length,
            )
        }
    })?;
    Ok(value)
}

#[inline]
pub(super) fn set_option<T: OptionValue>(
    fd: BorrowedFd<'_>,
    level: libc::c_int,
    name: libc::c_int,
    value: T,
) -> io::Result<()> {
    retry(|| {
        // SAFETY: the length is that of `value`, which has no padding by the trait's
        // contract, lives until the call returns, and is only read.
        unsafe {
            libc::setsockopt(
                fd.as_raw_fd(),
                level,
                name,
                (&raw const value).cast(),
                size_of::<T>() as libc::socklen_t,
            )
        }
    })?;
    Ok(())
}

pub(super) fn flag(fd: BorrowedFd<'_>, level: libc::c_int, name: libc::c_int) -> io::Result<bool> {
    option::<libc::c_int>(fd, level, name).map(|value| value != 0)
}

pub(super) fn set_flag(
    fd: BorrowedFd<'_>,
    level: libc::c_int,
    name: libc::c_int,
    on: bool,
) -> io::Result<()> {
    set_option(fd, level, name, libc::c_int::from(on))
}

fn size(fd: BorrowedFd<'_>, name: libc::c_int) -> io::Result<usize> {
    let bytes: libc::c_int = option(fd, libc::SOL_SOCKET, name)?;
    Ok(usize::try_from(bytes).unwrap_or(0))
}

fn set_size(fd: BorrowedFd<'_>, name: libc::c_int, bytes: usize) -> io::Result<()> {
    // The kernel gives as much as it allows, whatever more is asked for.
    let bytes = libc::c_int::try_from(bytes).unwrap_or(libc::c_int::MAX);
    set_option(fd, libc::SOL_SOCKET, name, bytes)
}

/// Rounds up to whole seconds, so that a short time does not become zero, which means
/// something else.
fn whole_seconds(time: Duration) -> io::Result<libc::c_int> {
    let up = u64::from(time.subsec_nanos() != 0);
    time.as_secs()
        .checked_add(up)
        .and_then(|seconds| libc::c_int::try_from(seconds).ok())
        .ok_or_else(|| io::ErrorKind::InvalidInput.into())
}
