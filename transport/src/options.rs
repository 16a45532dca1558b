//! How to listen and connect.

use std::net::SocketAddr;
use std::time::Duration;

use bowline_protocol::UnixAddress;

/// How long the kernel's queue of connections not accepted yet is by default;
/// the kernel cuts it to `net.core.somaxconn`.
const BACKLOG: u32 = 1024;

/// How long an attempt to connect may take by default. (Twisted: 30 s.)
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);

/// How to listen on TCP.
#[derive(Clone, Debug)]
pub struct TcpListenOptions {
    /// The length of the queue of connections not accepted yet; default 1,024,
    /// cut by the kernel to `net.core.somaxconn`.
    pub backlog: u32,
    /// `SO_REUSEADDR`: bind although connections of an earlier listener linger;
    /// default true.
    pub reuse_address: bool,
    /// `SO_REUSEPORT`: several listeners on one address, between which the
    /// kernel distributes connections; default false. Closing one of them
    /// resets what waits in its queue: to restart, pass the listener on.
    pub reuse_port: bool,
    /// Whether an IPv6 listener leaves IPv4 alone; default true.
    pub v6_only: bool,
    /// `TCP_NODELAY` on accepted connections, which inherit it without a system
    /// call; default false.
    pub no_delay: bool,
    /// `SO_KEEPALIVE` on accepted connections, inherited likewise; default
    /// false.
    pub keep_alive: bool,
}

impl Default for TcpListenOptions {
    fn default() -> Self {
        Self {
            backlog: BACKLOG,
            reuse_address: true,
            reuse_port: false,
            v6_only: true,
            no_delay: false,
            keep_alive: false,
        }
    }
}

/// How to listen on a UNIX socket.
#[derive(Clone, Debug)]
pub struct UnixListenOptions {
    /// The length of the queue of connections not accepted yet; default 1,024.
    pub backlog: u32,
    /// The permissions of the socket file, in force before the first client can
    /// connect; default `0o666`. Who may connect needs write permission, and
    /// search permission on the directories above.
    pub mode: u32,
    /// What to do about the file of a dead socket at the path; default
    /// [`StaleSocket::Remove`]. Whatever else is there, a live socket or a file of
    /// another kind, is `AddrInUse`.
    pub stale: StaleSocket,
    /// Whether clients may send descriptors before and after they are accepted
    /// (`SO_PASSRIGHTS`, Linux 6.16, inherited by accepted sockets); default
    /// true. Where the kernel does not know the option, refusing fails. Reading
    /// costs less where none can come.
    pub accepts_descriptors: bool,
}

impl Default for UnixListenOptions {
    fn default() -> Self {
        Self {
            backlog: BACKLOG,
            mode: 0o666,
            stale: StaleSocket::Remove,
            accepts_descriptors: true,
        }
    }
}

/// What to do about the file of a dead socket: one that no process on this machine has
/// any more. A program that is killed, or ends without its reactor being dropped,
/// leaves such a file.
///
/// A socket is alive while any process has it, whether it listens, is bound and does
/// not listen yet, or waits in a queue of descriptors. On a file system that several
/// machines share, a socket of another machine looks dead, as it does to clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StaleSocket {
    /// Fail with `AddrInUse`.
    Refuse,
    /// Remove it and take its place. Of several that do so at once, in whatever
    /// processes and threads, one listens, and the others fail with `AddrInUse`.
    ///
    /// Who removes one holds the lock of the directory meanwhile (flock(2)), for less
    /// than a millisecond; it has to be readable. Where somebody else holds it for more
    /// than five seconds, listening fails with `TimedOut`; where the directory does not
    /// let us remove the file, with `PermissionDenied`. A program of another kind that
    /// removes the file without looking, alive or not, is not kept from it.
    Remove,
}

/// How to connect over TCP.
#[derive(Clone, Debug)]
pub struct TcpConnectOptions {
    /// How long the attempt may take; default 30 seconds, `None` for as long as
    /// the kernel tries.
    pub timeout: Option<Duration>,
    /// The address to connect from; default `None`, the kernel's choice.
    pub bind_address: Option<SocketAddr>,
    /// `TCP_NODELAY`; default false.
    pub no_delay: bool,
    /// `SO_KEEPALIVE`; default false.
    pub keep_alive: bool,
}

impl Default for TcpConnectOptions {
    fn default() -> Self {
        Self {
            timeout: Some(CONNECT_TIMEOUT),
            bind_address: None,
            no_delay: false,
            keep_alive: false,
        }
    }
}

/// How to connect to a UNIX socket.
#[derive(Clone, Debug)]
pub struct UnixConnectOptions {
    /// How long the attempt may take, waiting for room in the listener's queue
    /// included; default 30 seconds, `None` for ever.
    pub timeout: Option<Duration>,
    /// The address to connect from; default `None`, unnamed.
    pub bind_address: Option<UnixAddress>,
    /// Whether the peer may send descriptors (`SO_PASSRIGHTS`, Linux 6.16), set
    /// before it can send anything; default true. Where the kernel does not know
    /// the option, refusing fails.
    pub accepts_descriptors: bool,
}

impl Default for UnixConnectOptions {
    fn default() -> Self {
        Self {
            timeout: Some(CONNECT_TIMEOUT),
            bind_address: None,
            accepts_descriptors: true,
        }
    }
}

/// How long an attempt has before the next address is tried beside it, and the
/// least that may be set (RFC 8305, section 8).
const ATTEMPT_DELAY: Duration = Duration::from_millis(250);
pub(crate) const LEAST_ATTEMPT_DELAY: Duration = Duration::from_millis(10);

/// How to connect to a host by its name.
#[derive(Clone, Debug)]
pub struct HostConnectOptions {
    /// How each address is connected to. The timeout is for everything together,
    /// looking up included. With an address to connect from, addresses of the
    /// other family are left out; with a port of it too, they are tried one after
    /// the other, since two sockets cannot have the same one.
    pub tcp: TcpConnectOptions,
    /// How long an attempt has before the next address is tried beside it;
    /// default 250 ms, as RFC 8305 recommends. Less than 10 ms counts as 10 ms.
    pub attempt_delay: Duration,
}

impl Default for HostConnectOptions {
    fn default() -> Self {
        Self {
            tcp: TcpConnectOptions::default(),
            attempt_delay: ATTEMPT_DELAY,
        }
    }
}
