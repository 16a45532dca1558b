//! Between processes, without a reactor: descriptors that a child is started
//! with, those that this process was started with, and single datagrams with
//! descriptors.

use std::io;
use std::io::IoSlice;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::process::{Child, Command};

use bowline_protocol::Address;

use crate::kinds::address_of;
use crate::sys::{self, Announcement, ControlBuffer, Family, SocketName};

/// Starts `command` with descriptors under agreed numbers in the child: for
/// programs that expect their sockets by number, bowline's or not.
///
/// The descriptors are borrowed and stay open here. Beside its standard
/// streams the child has exactly these, whatever else is open here and not
/// close-on-exec (before Linux 5.11: that too). Numbers may overlap with those that the descriptors have
/// here, or be swapped. A child that is a program of bowline's takes them with
/// [`take_granted`]; for it the variable `BOWLINE_DESCRIPTORS` is set.
///
/// # Errors
///
/// `InvalidInput` for a number below 3 and for one that is given twice; `WouldBlock`
/// where other threads went on closing and opening descriptors at these numbers
/// through 64 attempts; otherwise those of [`Command::spawn`].
///
/// # Examples
///
/// ```
/// use std::fs::File;
/// use std::os::fd::AsFd;
/// use std::process::{Command, Stdio};
/// use bowline_transport::spawn_with_descriptors;
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

/// Starts `command` with descriptors as systemd does: for programs that take them by
/// `LISTEN_FDS` (sd_listen_fds(3)), each with its name, numbered from 3 on.
///
/// As [`spawn_with_descriptors`]; and the child finds `LISTEN_FDS`, `LISTEN_FDNAMES` and,
/// as its own number, `LISTEN_PID`, with the inode of its pidfd as `LISTEN_PIDFDID` where
/// the kernel has one (Linux 6.9). What `command` says of these variables is replaced.
/// `argv[0]` is the name of the program:
/// [`arg0`](std::os::unix::process::CommandExt::arg0) has no effect.
///
/// # Errors
///
/// As [`spawn_with_descriptors`]; `InvalidInput` for a name that is longer than 255 bytes
/// or has something else in it than printable ASCII without colons.
///
/// # Examples
///
/// ```
/// use std::net::TcpListener;
/// use std::os::fd::AsFd;
/// use std::process::{Command, Stdio};
/// use bowline_transport::spawn_with_listen_fds;
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
        announce_listen_fds(command, &names).map(Some)
    })
}

/// The names of descriptors, if they can be names.
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

/// What says to a child that it has descriptors of these names from 3 on.
pub(crate) fn announce_listen_fds(
    command: &mut Command,
    names: &[String],
) -> io::Result<Announcement> {
    let variables = [
        ("LISTEN_FDS", names.len().to_string()),
        ("LISTEN_FDNAMES", names.join(":")),
    ];
    Announcement::of(command, &variables, ("LISTEN_PID", "LISTEN_PIDFDID"))
}

/// What no other process has, before the next start of the machine: the inode of this
/// one's pidfd, as `LISTEN_PIDFDID` says it. `None` before Linux 6.9.
pub fn own_pidfd_inode() -> Option<u64> {
    sys::own_pidfd_inode()
}

/// A descriptor that becomes readable when `child` exits (pidfd_open(2)), to be
/// [registered](bowline_reactor::Reactor::register): the way to learn of an end
/// without signals and without asking again and again. The child is yet to be
/// waited for, with [`Child::try_wait`] then. `None` if it has exited already.
///
/// # Errors
///
/// `ENOSYS` before Linux 5.3; no free descriptor number.
pub fn exit_descriptor(child: &mut Child) -> io::Result<Option<OwnedFd>> {
    sys::exit_descriptor(child)
}

/// Takes ownership of a descriptor that this process was started with, under the number
/// that was agreed on, and makes it close-on-exec: of one that
/// [`spawn_with_descriptors`] has given it, or systemd.
///
/// The environment that the program was started with has to name it: in
/// `BOWLINE_DESCRIPTORS`, which `spawn_with_descriptors` sets and which says also which
/// file it is; or by `LISTEN_FDS`, with the `LISTEN_PID` of this process. What the program
/// has put into its environment since does not count (without /proc it cannot be
/// told, and does). Each number is given out once. To be called first in `main`.
///
/// For descriptors that were given in another way there is [`take_inherited`](crate::take_inherited).
///
/// # Errors
///
/// `InvalidInput` for the standard streams; `NotFound` where nothing is open
/// under the number, or the environment does not name it; `AlreadyExists` where it was
/// taken before, or was made by this process.
///
/// # Examples
///
/// ```
/// use std::fs::File;
/// use std::io;
/// use std::os::fd::AsFd;
/// use std::process::Command;
/// use bowline_transport::{spawn_with_descriptors, take_granted};
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

/// Removes variables from the environment, so that no child inherits them:
/// what std can only offer as `unsafe`. To be called first in `main`.
///
/// # Errors
///
/// `Unsupported`, with nothing removed, where other threads run already: they
/// may be reading the environment. (Asked of /proc, and where there is none of
/// unshare(2), which a sandbox may deny: then too.) Leave them out of each child's instead
/// ([`Command::env_remove`]).
///
/// # Examples
///
/// ```standalone_crate
/// bowline_transport::remove_environment(&["PATH"])?;
/// assert!(std::env::var_os("PATH").is_none());
/// # Ok::<(), std::io::Error>(())
/// ```
pub fn remove_environment(names: &[&str]) -> io::Result<()> {
    sys::remove_environment(names)
}

/// Sends one datagram, with descriptors, on a connected datagram socket;
/// never blocks.
///
/// # Errors
///
/// `InvalidInput` for more than 253 descriptors, or for descriptors without a
/// byte; `WouldBlock` where the receiver's queue is full; otherwise those of
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

/// Whether a send failed for want of something that comes back by itself, and that
/// nothing announces: memory of the kernel, or room under the user's limit of
/// descriptors on their way (`ENOBUFS`, `ENOMEM`, `ETOOMANYREFS`). To be made again
/// after a while.
pub fn is_passing_shortage(error: &io::Error) -> bool {
    sys::is_transient(error)
}

/// What a descriptor from elsewhere is, as far as sockets go.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SocketDescription {
    /// Its own address; `None` for families other than IP and UNIX.
    pub address: Option<Address>,
    /// Whether it is a byte stream, rather than datagrams or sequenced packets.
    pub is_stream: bool,
    /// Whether it accepts connections.
    pub is_listening: bool,
}

/// Asks the kernel what `fd` is.
///
/// # Errors
///
/// `ENOTSOCK` where it is no socket.
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
        is_listening: kind.listening,
    })
}

/// The kernel's monotonic clock, in microseconds since some fixed point: what
/// systemd compares times by (`CLOCK_MONOTONIC`).
pub fn monotonic_microseconds() -> u64 {
    sys::monotonic_microseconds()
}

/// The user whose rights this process has (geteuid(2)), to be compared with
/// those of a peer.
pub fn effective_user() -> u32 {
    sys::effective_user()
}
