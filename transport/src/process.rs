//! Passing descriptors between processes without a reactor: to a child at its start,
//! from the parent of this process, and beside single datagrams.

use std::io;
use std::io::IoSlice;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::process::{Child, Command};

use bowline_protocol::Address;

use crate::kinds::address_of;
use crate::sys::{self, ControlBuffer, Family, Image, SocketName};

/// Starts `command` with descriptors under agreed numbers, for programs that expect
/// their sockets by number. They need not be programs of bowline's.
///
/// The descriptors are borrowed and stay open here. The child has its standard streams
/// and exactly these descriptors, even if others are open here without close-on-exec.
/// (Before Linux 5.11 it has those too.) The numbers may be in use here, or be those of
/// other descriptors in the list. A child that uses bowline takes them with
/// [`take_granted`], for which the variable `BOWLINE_DESCRIPTORS` is set.
///
/// # Errors
///
/// `InvalidInput` if a number is below 3 or is given twice. `WouldBlock` if other
/// threads closed and opened descriptors at these numbers in each of 64 attempts.
/// Otherwise those of [`Command::spawn`].
///
/// # Examples
///
/// ```
/// use std::fs::File;
/// use std::os::fd::AsFd;
/// use std::process::{Command, Stdio};
/// use bowline::process::spawn_with_descriptors;
///
/// let file = File::open("/proc/self/comm")?;
/// let mut command = Command::new("sh");
/// command.args(["-c", "cat <&7"]).stdout(Stdio::piped());
/// let child = spawn_with_descriptors(command, &[(file.as_fd(), 7)])?;
/// assert!(!child.wait_with_output()?.stdout.is_empty());
/// # Ok::<(), std::io::Error>(())
/// ```
pub fn spawn_with_descriptors(
    command: Command,
    descriptors: &[(BorrowedFd<'_>, u32)],
) -> io::Result<Child> {
    sys::spawn(command, descriptors)
}

/// Starts `command` with named descriptors from number 3 on, as systemd does. This is
/// for programs that take them by `LISTEN_FDS` (sd_listen_fds(3)).
///
/// As [`spawn_with_descriptors`], and the child finds `LISTEN_FDS`, `LISTEN_FDNAMES`,
/// and `LISTEN_PID`, which is its own number. `LISTEN_PIDFDID` is the inode of its
/// pidfd, if the kernel has one (Linux 6.9). These replace any such variables of
/// `command`. `argv[0]` is the name of the program:
/// [`arg0`](std::os::unix::process::CommandExt::arg0) has no effect.
///
/// # Errors
///
/// As [`spawn_with_descriptors`]. `InvalidInput` if a name is longer than 255 bytes, or
/// has anything but printable ASCII without colons in it.
///
/// # Examples
///
/// ```
/// use std::net::TcpListener;
/// use std::os::fd::AsFd;
/// use std::process::{Command, Stdio};
/// use bowline::process::spawn_with_listen_fds;
///
/// let listener = TcpListener::bind("127.0.0.1:0")?;
/// let mut command = Command::new("sh");
/// command.args(["-c", "[ $LISTEN_PID = $$ ] && echo $LISTEN_FDS $LISTEN_FDNAMES"]);
/// command.stdout(Stdio::piped());
/// let child = spawn_with_listen_fds(command, &[(listener.as_fd(), "web")])?;
/// assert_eq!(child.wait_with_output()?.stdout, b"1 web\n");
/// # Ok::<(), std::io::Error>(())
/// ```
pub fn spawn_with_listen_fds(
    command: Command,
    descriptors: &[(BorrowedFd<'_>, &str)],
) -> io::Result<Child> {
    let names = names_of(descriptors)?;
    let grants: Vec<_> = descriptors
        .iter()
        .zip(3..)
        .map(|((fd, _), number)| (*fd, number))
        .collect();
    sys::spawn_announced(command, &grants, None, |command| {
        let variables = listen_variables(&names);
        Image::of(command, &variables, Some(LISTEN_NUMBERS)).map(Some)
    })
}

/// Checks the names of descriptors and copies them.
pub(crate) fn names_of(descriptors: &[(BorrowedFd<'_>, &str)]) -> io::Result<Vec<String>> {
    let is_fine = |byte: u8| (b' '..=b'~').contains(&byte) && byte != b':';
    let names = descriptors.iter().map(|(_, name)| {
        if name.len() > 255 || !name.bytes().all(is_fine) {
            let text = "this cannot be the name of a descriptor";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        Ok((*name).to_owned())
    });
    names.collect()
}

/// The variables that announce descriptors of these names, from number 3 on, to a
/// child. Two others have numbers of its own.
pub(crate) fn listen_variables(names: &[String]) -> [(&'static str, String); 2] {
    [
        ("LISTEN_FDS", names.len().to_string()),
        ("LISTEN_FDNAMES", names.join(":")),
    ]
}

/// The variables for the number of the child and the inode of its pidfd.
pub(crate) const LISTEN_NUMBERS: (&str, &str) = ("LISTEN_PID", "LISTEN_PIDFDID");

/// The inode of the pidfd of this process, as `LISTEN_PIDFDID` gives it. No other
/// process has the same one until the machine starts again. `None` before Linux 6.9.
pub fn own_pidfd_inode() -> Option<u64> {
    sys::own_pidfd_inode()
}

/// Makes a descriptor that becomes readable when `child` exits (pidfd_open(2)). It can
/// be [registered](bowline_reactor::Reactor::register), to learn of the exit without
/// signals and without polling. Then collect the exit status with [`Child::try_wait`].
/// `None` if the child has exited already.
///
/// # Errors
///
/// `ENOSYS` before Linux 5.3. `EMFILE` or `ENFILE` if no descriptor number is free.
pub fn exit_descriptor(child: &mut Child) -> io::Result<Option<OwnedFd>> {
    sys::exit_descriptor(child)
}

/// Takes ownership of a descriptor that this process was started with, by
/// [`spawn_with_descriptors`], systemd, Node or a Wayland compositor, and makes it
/// close-on-exec. Call this first in `main`.
///
/// The environment that the program was started with has to name its number. Either
/// `BOWLINE_DESCRIPTORS` does, which `spawn_with_descriptors` sets and which also
/// identifies the file. Or `LISTEN_FDS` does, together with the `LISTEN_PID` of this
/// process. Or it is the value of `NODE_CHANNEL_FD` or `WAYLAND_SOCKET`. Variables that
/// the program has set since do not count. (Without /proc they cannot be told apart, and
/// do count.) Each number is given out once.
///
/// For descriptors that were given in another way, see
/// [`take_inherited`](crate::take_inherited).
///
/// # Errors
///
/// `InvalidInput` for the standard streams. `NotFound` if nothing is open under the
/// number, or the environment does not name it. `AlreadyExists` if it was taken before,
/// or if this process made it.
///
/// # Examples
///
/// ```
/// use std::fs::File;
/// use std::io;
/// use std::os::fd::AsFd;
/// use std::process::Command;
/// use bowline::process::{spawn_with_descriptors, take_granted};
///
/// if std::env::args().nth(1).is_some() {
///     let file = File::from(take_granted(7)?);
///     assert!(!io::read_to_string(file)?.is_empty());
///     return Ok(());
/// }
/// let file = File::open("/proc/self/comm")?;
/// let mut command = Command::new(std::env::current_exe()?);
/// command.arg("child");
/// let mut child = spawn_with_descriptors(command, &[(file.as_fd(), 7)])?;
/// assert!(child.wait()?.success());
/// # Ok::<(), io::Error>(())
/// ```
pub fn take_granted(number: u32) -> io::Result<OwnedFd> {
    sys::take_granted(number)
}

/// Removes variables from the environment, so that no child inherits them. (The
/// functions of std for this are `unsafe`.) Call this first in `main`.
///
/// # Errors
///
/// `Unsupported`, with nothing removed, if other threads run already, since they may be
/// reading the environment. Then leave the variables out of each child's instead
/// ([`Command::env_remove`]). Threads are looked up in /proc. Without /proc unshare(2)
/// is asked, and if a sandbox denies that, the answer is `Unsupported` too.
///
/// # Examples
///
/// ```standalone_crate
/// bowline::process::remove_environment(&["PATH"])?;
/// assert!(std::env::var_os("PATH").is_none());
/// # Ok::<(), std::io::Error>(())
/// ```
pub fn remove_environment(names: &[&str]) -> io::Result<()> {
    sys::remove_environment(names)
}

/// Sends one datagram, with descriptors, on a connected datagram socket. Never blocks.
///
/// # Errors
///
/// `InvalidInput` if there are more than 253 descriptors, or descriptors without a
/// byte. `WouldBlock` if the queue of the receiver is full. Otherwise those of
/// sendmsg(2).
pub fn send_datagram(
    socket: BorrowedFd<'_>,
    data: &[u8],
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<()> {
    if descriptors.is_empty() {
        sys::send(socket, data)?;
    } else {
        let mut control = ControlBuffer::new();
        sys::send_with_descriptors(socket, &[IoSlice::new(data)], descriptors, &mut control)?;
    }
    Ok(())
}

/// Whether a send failed for lack of something that comes back without an event. It is
/// memory of the kernel, or room under the user's limit of descriptors in flight
/// (`ENOBUFS`, `ENOMEM`, `ETOOMANYREFS`). Send again after a while.
pub fn is_passing_shortage(error: &io::Error) -> bool {
    sys::is_transient(error)
}

/// The kind and address of a socket that came from elsewhere.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SocketDescription {
    /// Its own address. `None` for families other than IP and UNIX.
    pub address: Option<Address>,
    /// Whether it is a byte stream, rather than datagrams or sequenced packets.
    pub is_stream: bool,
    /// Whether it is of sequenced packets (`SOCK_SEQPACKET`).
    pub is_packets: bool,
    /// Whether it accepts connections.
    pub is_listening: bool,
}

/// Asks the kernel what kind of socket `fd` is.
///
/// # Errors
///
/// `ENOTSOCK` if it is no socket.
pub fn describe_socket(fd: BorrowedFd<'_>) -> io::Result<SocketDescription> {
    #[cfg(feature = "testing")]
    if let Some(description) = crate::testing::describe(fd) {
        return Ok(description);
    }
    let kind = sys::socket_kind(fd)?;
    let address = match sys::local_name(fd)? {
        SocketName::Inet(address) => Some(Address::Inet(address)),
        name if kind.domain == Some(Family::Unix) => Some(Address::Unix(address_of(name))),
        _ => None,
    };
    Ok(SocketDescription {
        address,
        is_stream: kind.stream,
        is_packets: kind.packets,
        is_listening: kind.listening,
    })
}

/// Whether a socket is a stream that does not listen, as a connection is. This asks two
/// questions, where [`describe_socket`] asks four.
///
/// # Errors
///
/// `ENOTSOCK` if it is no socket.
pub fn is_stream_connection(fd: BorrowedFd<'_>) -> io::Result<bool> {
    #[cfg(feature = "testing")]
    if let Some(description) = crate::testing::describe(fd) {
        return Ok(description.is_stream && !description.is_listening);
    }
    Ok(sys::is_stream(fd)? && !sys::is_listening(fd)?)
}

/// The kernel's monotonic clock (`CLOCK_MONOTONIC`), in microseconds since some fixed
/// point. systemd compares times by it.
pub fn monotonic_microseconds() -> u64 {
    sys::monotonic_microseconds()
}

/// The effective user of this process (geteuid(2)), to be compared with the user of a
/// peer.
pub fn effective_user() -> u32 {
    sys::effective_user()
}
