//! Making listening sockets, and the files of those that have one.

use std::fs::{File, TryLockError};
use std::io;
use std::mem::ManuallyDrop;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bowline_protocol::UnixAddress;

use crate::error::{ListenError, ListenStep};
use crate::log;
use crate::options::{StaleSocket, TcpListenOptions, UnixListenOptions};
use crate::sys::{self, Connecting, Family, FileIdentity, SocketName};

/// How long others may take to remove dead sockets from the same directory: each
/// needs a fraction of a millisecond, so that this is for hundreds of them on a busy
/// machine.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);

/// How often it is asked whether they have.
const LOCK_POLL: Duration = Duration::from_millis(1);

/// The file of a UNIX socket that we bound.
///
/// Invariant: whoever has it has the socket too, and closes it later. While a socket is
/// open its file's number is given to no other, so that finding it at the path is
/// proof; and a program that takes over the paths of dead sockets only leaves it alone.
#[derive(Debug)]
pub(crate) struct SocketFile {
    path: PathBuf,
    pub(super) identity: FileIdentity,
    /// The process that removes it: one that was forked from it has a copy of all
    /// this, and the file is not its own.
    owner: u32,
}

impl SocketFile {
    /// The socket file at `path`, whose socket this process has.
    pub(super) fn at(path: &Path) -> io::Result<Self> {
        let path = std::path::absolute(path)?;
        Ok(Self {
            identity: sys::socket_file(&path)?,
            path,
            owner: std::process::id(),
        })
    }

    /// The path goes on to belong to whoever holds the listener.
    pub(crate) fn leave(self) {
        let mut file = ManuallyDrop::new(self);
        drop(std::mem::take(&mut file.path));
    }
}

impl Drop for SocketFile {
    /// Removes the file, unless another one has taken its place, or it is the
    /// file of the process that we were forked from.
    fn drop(&mut self) {
        let path = self.path.display();
        if self.owner != std::process::id() {
            return log::debug!(target: log::TRANSPORT, "{path} is left to process {}", self.owner);
        }
        match sys::socket_file(&self.path) {
            Ok(identity) if identity == self.identity => {
                if let Err(error) = std::fs::remove_file(&self.path) {
                    log::warn!(target: log::TRANSPORT, "cannot remove {path}: {error}");
                }
            }
            Ok(_) => log::debug!(target: log::TRANSPORT, "{path} is another's by now"),
            Err(_) => log::debug!(target: log::TRANSPORT, "{path} is gone already"),
        }
    }
}

/// Makes a TCP socket that listens, to be given away: to a worker with its start, through
/// a UNIX connection, to another reactor. Whoever gets it accepts, with
/// [`adopt_tcp_listener`](crate::Transports::adopt_tcp_listener) say. Non-blocking and
/// close-on-exec; connections queue up in it meanwhile.
///
/// # Errors
///
/// [`ListenError`], with the step that failed.
pub fn bind_tcp_listener(
    address: SocketAddr,
    options: &TcpListenOptions,
) -> Result<OwnedFd, ListenError> {
    bind_tcp(address, options)
}

/// As [`bind_tcp_listener`], a UNIX socket. Nobody removes its file, unless whoever gets
/// it [owns](bowline_protocol::Listener::own_socket_file) it.
///
/// # Errors
///
/// As [`Transports::listen_unix`](crate::Transports::listen_unix).
pub fn bind_unix_listener(
    address: impl Into<UnixAddress>,
    options: &UnixListenOptions,
) -> Result<OwnedFd, ListenError> {
    let (fd, file) = bind_unix(&address.into(), options)?;
    if let Some(file) = file {
        file.leave();
    }
    Ok(fd)
}

/// Makes and binds a TCP listener.
pub(crate) fn bind_tcp(
    address: SocketAddr,
    options: &TcpListenOptions,
) -> Result<OwnedFd, ListenError> {
    let failed = |step| {
        move |error| ListenError {
            address: address.into(),
            step,
            error,
        }
    };
    let (fd, name) = (|| {
        let family = if address.is_ipv4() {
            Family::Inet4
        } else {
            Family::Inet6
        };
        let fd = sys::stream_socket(family)?;
        sys::set_reuse_address(fd.as_fd(), options.reuse_address)?;
        if options.reuse_port {
            sys::set_reuse_port(fd.as_fd(), true)?;
        }
        if address.is_ipv6() {
            sys::set_v6_only(fd.as_fd(), options.v6_only)?;
        }
        if options.no_delay {
            sys::set_no_delay(fd.as_fd(), true)?;
        }
        if options.keep_alive {
            sys::set_keep_alive(fd.as_fd(), true)?;
        }
        Ok((fd, SocketName::Inet(address)))
    })()
    .map_err(failed(ListenStep::Socket))?;
    sys::bind(fd.as_fd(), &name).map_err(failed(ListenStep::Bind))?;
    sys::listen(fd.as_fd(), backlog(options.backlog)).map_err(failed(ListenStep::Listen))?;
    Ok(fd)
}

/// Makes and binds a UNIX listener; with the file, if it has one, which is to be
/// dropped before the socket.
pub(crate) fn bind_unix(
    address: &UnixAddress,
    options: &UnixListenOptions,
) -> Result<(OwnedFd, Option<SocketFile>), ListenError> {
    let failed = |step| {
        move |error| ListenError {
            address: address.clone().into(),
            step,
            error,
        }
    };
    let name = socket_name(address);
    let fd = sys::stream_socket(Family::Unix).map_err(failed(ListenStep::Socket))?;
    if !options.accepts_descriptors {
        // On the listener, so that nothing slips in before the accept.
        sys::set_pass_rights(fd.as_fd(), false).map_err(failed(ListenStep::Socket))?;
    }
    let file = match address.as_path() {
        None => {
            sys::bind(fd.as_fd(), &name).map_err(failed(ListenStep::Bind))?;
            None
        }
        Some(path) => {
            // Linux gives the file the mode of the unbound socket, less the umask:
            // it is never more open than asked.
            sys::set_mode(fd.as_fd(), options.mode).map_err(failed(ListenStep::Mode))?;
            bind_path(&fd, path, &name, options.stale)
                .map_err(|(step, error)| failed(step)(error))?;
            // From here on it is removed if anything fails, before the socket is closed.
            let file = SocketFile::at(path).map_err(failed(ListenStep::Mode))?;
            // What the umask took away. Clients are refused until `listen`.
            sys::set_file_mode(&file.path, file.identity, options.mode)
                .map_err(failed(ListenStep::Mode))?;
            Some(file)
        }
    };
    sys::listen(fd.as_fd(), backlog(options.backlog)).map_err(failed(ListenStep::Listen))?;
    Ok((fd, file))
}

fn backlog(asked: u32) -> i32 {
    i32::try_from(asked).unwrap_or(i32::MAX)
}

/// Binds to `path`, after removing a dead socket from it where that is wanted.
///
/// Of several that do so at once one succeeds. Where nothing is at the path the kernel
/// sees to that: bind(2) makes the file or fails. Where a dead socket is, only who
/// holds the lock of the directory removes it, and only after having seen, with the
/// lock, that it is dead; what is dead stays so, and nobody else replaces it
/// meanwhile. A crash leaves nothing: the lock goes with the process, and the file of a
/// socket that never listened is dead like any other.
///
/// The lock is flock(2) on the directory itself: it needs no file of its own, is seen
/// through every mount and in every namespace, and is one between threads as well.
/// (Binding under another name and renaming would need no lock, but sockets,
/// clients and successors would be told that name for ever.)
fn bind_path(
    fd: &OwnedFd,
    path: &Path,
    name: &SocketName,
    stale: StaleSocket,
) -> Result<(), (ListenStep, io::Error)> {
    let is_taken = |error: &io::Error| error.kind() == io::ErrorKind::AddrInUse;
    let bind = || sys::bind(fd.as_fd(), name).map_err(|error| (ListenStep::Bind, error));
    let taken = match bind() {
        Err(error) if stale == StaleSocket::Remove && is_taken(&error.1) => error,
        bound => return bound,
    };
    // A file that is no socket is none of ours. Not a reason to lock anything.
    if !may_be_dead(path, name) {
        return Err(taken);
    }
    let cannot = |error| (ListenStep::RemoveStale, error);
    let _lock = lock_directory_of(path, LOCK_PATIENCE).map_err(cannot)?;
    // Held, so that no other file is given its number while it is looked at.
    let held = match sys::hold_socket_file(path) {
        Ok(held) => held,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return bind(),
        Err(_) => return Err(taken),
    };
    // The kernel makes the file a moment before it is a socket's, during which it looks
    // dead; but with the directory locked, its own way, which this waits for.
    match bind() {
        Err(error) if is_taken(&error.1) => {}
        bound => return bound,
    }
    let is_same = || sys::socket_file(path).is_ok_and(|now| now == held.identity());
    if !(is_dead(name).map_err(cannot)? && is_same()) {
        return Err(taken);
    }
    std::fs::remove_file(path).map_err(cannot)?;
    log::debug!(target: log::TRANSPORT, "removed the dead socket {}", path.display());
    bind()
}

fn may_be_dead(path: &Path, name: &SocketName) -> bool {
    match sys::socket_file(path) {
        Ok(_) => is_dead(name).unwrap_or(true),
        Err(error) => error.kind() == io::ErrorKind::NotFound,
    }
}

/// Whether no process has the socket of the file at a path any more.
///
/// Told by connecting with a socket of another type: that is refused for want of any
/// socket, or as the wrong type, whether it listens already or is bound only. And
/// it is no connection that the listener would see. Any other answer, lacking
/// permission say, is not taken for death.
fn is_dead(name: &SocketName) -> io::Result<bool> {
    let is_refused = |probe: OwnedFd| match sys::connect(probe.as_fd(), name) {
        Ok(Connecting::Done | Connecting::InProgress | Connecting::BacklogFull) => false,
        Err(error) => error.kind() == io::ErrorKind::ConnectionRefused,
    };
    // And by connecting as clients do: something that stands in for Linux may not know
    // the difference.
    Ok(is_refused(sys::datagram_socket()?) && is_refused(sys::stream_socket(Family::Unix)?))
}

/// The lock under which dead sockets are removed from a directory, held until it is
/// dropped.
#[derive(Debug)]
struct DirectoryLock(File);

impl Drop for DirectoryLock {
    fn drop(&mut self) {
        // Closing would not do: a process that was forked meanwhile has it too.
        // It cannot fail.
        let _ = self.0.unlock();
    }
}

/// # Errors
/// `TimedOut` where others held it all the time; those of opening a directory, of which
/// we may not read everyone.
#[doc(alias = "flock")]
fn lock_directory_of(path: &Path, patience: Duration) -> io::Result<DirectoryLock> {
    let path = std::path::absolute(path)?;
    let directory = File::open(path.parent().unwrap_or(&path))?;
    let began = Instant::now();
    loop {
        match directory.try_lock() {
            Ok(()) => return Ok(DirectoryLock(directory)),
            Err(TryLockError::Error(error)) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(TryLockError::Error(error)) => return Err(error),
            Err(TryLockError::WouldBlock) if began.elapsed() < patience => {
                std::thread::sleep(LOCK_POLL);
            }
            Err(TryLockError::WouldBlock) => {
                let text = "somebody else holds the lock (flock) of its directory";
                return Err(io::Error::new(io::ErrorKind::TimedOut, text));
            }
        }
    }
}

pub(crate) fn socket_name(address: &UnixAddress) -> SocketName {
    match address {
        UnixAddress::Unnamed => SocketName::UnixUnnamed,
        UnixAddress::Path(path) => SocketName::UnixPath(path.clone()),
        UnixAddress::Abstract(name) => SocketName::UnixAbstract(name.clone()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn one_has_the_lock_of_a_directory_and_nobody_waits_for_ever() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let lock = lock_directory_of(&path, Duration::ZERO).unwrap();
        let error = lock_directory_of(&path, Duration::from_millis(3)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        // What a process that was forked meanwhile has keeps nothing.
        let copy = lock.0.try_clone().unwrap();
        drop(lock);
        assert!(lock_directory_of(&path, Duration::ZERO).is_ok());
        drop(copy);
    }

    /// Contract L-22, W-45.
    #[test]
    fn file_of_another_process_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let _socket = UnixListener::bind(&path).unwrap();
        let mut file = SocketFile::at(&path).unwrap();
        // As in a process that was forked from it.
        file.owner += 1;
        drop(file);
        assert!(path.exists());
        drop(SocketFile::at(&path).unwrap());
        assert!(!path.exists());
    }
}
