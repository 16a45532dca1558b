//! The files of UNIX sockets: their owners, and taking the place of a dead socket.

use std::fs::{File, TryLockError};
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bowline_protocol::SocketFile;

use crate::error::ListenStep;
use crate::log;
use crate::sys::{self, Connecting, Family, FileIdentity, SocketName};

/// How long others may take to remove dead sockets from the same directory. Each needs
/// a fraction of a millisecond, so this is enough for hundreds of them on a busy
/// machine.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);

/// How often the lock is tried meanwhile.
const LOCK_POLL: Duration = Duration::from_millis(1);

/// What to do about the file of a dead socket. A socket is dead when no process on this
/// machine has it any more. A program leaves such a file if it is killed, or if it ends
/// without dropping its reactor.
///
/// A socket is alive while any process has it. It may listen, be bound and not listen
/// yet, or wait in a queue of descriptors. On a file system that several machines share,
/// a socket of another machine looks dead, as it does to clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StaleSocket {
    /// Fails with `AddrInUse`.
    Refuse,
    /// Removes the file and takes its place. If several processes or threads do so at
    /// once, one of them listens and the others fail with `AddrInUse`.
    ///
    /// Meanwhile the directory is locked (flock(2)), for less than a millisecond. So it
    /// has to be readable. If somebody else holds the lock for more than five seconds,
    /// listening fails with `TimedOut`. If the directory does not let us remove the
    /// file, it fails with `PermissionDenied`. The lock does not keep other programs
    /// from removing the file of a living socket.
    Remove,
}

/// The settings of all endpoints that make such a file.
macro_rules! socket_file_settings {
    () => {
        /// Sets the permissions of the socket file; default `0o666`. They are in force
        /// before anybody can connect or send. A client needs write permission, and
        /// search permission on the directories above.
        pub fn mode(mut self, mode: u32) -> Self {
            self.mode = mode;
            self
        }

        /// Sets what to do about the file of a dead socket at the path; default
        /// [`StaleSocket::Remove`]. If a live socket or another kind of file is there,
        /// binding fails with `AddrInUse`.
        pub fn stale(mut self, stale: StaleSocket) -> Self {
            self.stale = stale;
            self
        }
    };
}
pub(super) use socket_file_settings;

/// The file of a UNIX socket that we bound.
///
/// Invariant: its owner has the socket too, and closes it later. While a socket is
/// open, no other file gets its inode. So a file with that inode at the path is ours. A
/// program that takes over only the paths of dead sockets leaves it alone.
#[derive(Debug)]
pub(crate) struct OwnedFile {
    path: PathBuf,
    pub(super) identity: FileIdentity,
    /// The process that removes it. A process that was forked from it has a copy of
    /// this value, but does not own the file.
    owner: u32,
}

impl OwnedFile {
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The socket file at `path`. This process has its socket.
    pub(super) fn at(path: &Path) -> io::Result<Self> {
        let path = std::path::absolute(path)?;
        Ok(Self {
            identity: sys::socket_file(&path)?,
            path,
            owner: std::process::id(),
        })
    }

    /// The socket file `file`, at the path of a listener of this process. If another
    /// file is there, or none, it is not owned.
    pub(super) fn of_listener(listener: BorrowedFd<'_>, file: SocketFile) -> io::Result<Self> {
        let SocketName::UnixPath(path) = sys::local_name(listener)? else {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        };
        let found = Self::at(&path)?;
        if found.socket_file() != file {
            found.leave();
            return Err(io::Error::from(io::ErrorKind::AlreadyExists));
        }
        Ok(found)
    }

    /// The identity of the file.
    pub(super) fn socket_file(&self) -> SocketFile {
        SocketFile {
            device: self.identity.device,
            inode: self.identity.inode,
        }
    }

    /// Leaves the path to the other holders of the listener.
    pub(crate) fn leave(self) {
        let mut file = ManuallyDrop::new(self);
        drop(std::mem::take(&mut file.path));
    }
}

impl Drop for OwnedFile {
    /// Removes the file, unless another one has taken its place, or it belongs to the
    /// process that we were forked from.
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

/// Binds to `path`, after removing a dead socket from it if that is wanted.
///
/// If several do so at once, one succeeds. If nothing is at the path, the kernel sees
/// to that: bind(2) makes the file or fails. If a dead socket is there, only the holder
/// of the directory's lock removes it, once it has seen under the lock that the socket
/// is dead. A dead socket stays dead, and nobody else replaces it meanwhile. A crash
/// leaves nothing behind. The lock goes with the process, and the file of a socket that
/// never listened is dead like any other.
///
/// The lock is flock(2) on the directory itself. It needs no file of its own, is seen
/// through every mount and in every namespace, and works between threads too. (Binding
/// under another name and renaming would need no lock. But sockets, clients and
/// successors would see that name for ever.)
pub(super) fn bind_path(
    fd: BorrowedFd<'_>,
    path: &Path,
    name: &SocketName,
    stale: StaleSocket,
) -> Result<(), (ListenStep, io::Error)> {
    let is_taken = |error: &io::Error| error.kind() == io::ErrorKind::AddrInUse;
    let bind = || sys::bind(fd, name).map_err(|error| (ListenStep::Bind, error));
    let taken = match bind() {
        Err(error) if stale == StaleSocket::Remove && is_taken(&error.1) => error,
        bound => return bound,
    };
    // A file that is no socket is not ours to remove. So no lock is needed.
    if !may_be_dead(path, name) {
        return Err(taken);
    }
    let cannot = |error| (ListenStep::RemoveStale, error);
    let _lock = lock_directory_of(path, LOCK_PATIENCE).map_err(cannot)?;
    // Held open, so that no other file gets its inode while it is checked.
    let held = match sys::hold_socket_file(path) {
        Ok(held) => held,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return bind(),
        Err(_) => return Err(taken),
    };
    // The kernel makes the file a moment before it is a socket's. During that moment it
    // looks dead. But the kernel itself locks the directory for it, and this call waits
    // for that.
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
/// Connects with a socket of another type to find out. A dead socket refuses that, as
/// there is no socket. A live one, listening or only bound, fails it as the wrong type,
/// and its listener sees no connection. Any other error, such as for lack of
/// permission, does not count as dead.
fn is_dead(name: &SocketName) -> io::Result<bool> {
    let is_refused = |probe: OwnedFd| match sys::connect(probe.as_fd(), name) {
        Ok(Connecting::Done | Connecting::InProgress | Connecting::BacklogFull) => false,
        Err(error) => error.kind() == io::ErrorKind::ConnectionRefused,
    };
    // Also connects as clients do, since a system that stands in for Linux may not know
    // the difference.
    Ok(is_refused(sys::datagram_socket(Family::Unix)?)
        && is_refused(sys::stream_socket(Family::Unix)?))
}

/// The lock under which dead sockets are removed from a directory. It is held until it
/// is dropped.
#[derive(Debug)]
struct DirectoryLock(File);

impl Drop for DirectoryLock {
    fn drop(&mut self) {
        // Closing is not enough, since a process that was forked meanwhile has it too.
        // Unlocking cannot fail.
        let _ = self.0.unlock();
    }
}

/// # Errors
/// `TimedOut` if others held it all the time. Otherwise those of opening a directory,
/// which we may not be allowed to read.
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
        let mut file = OwnedFile::at(&path).unwrap();
        // As in a process that was forked from it.
        file.owner += 1;
        drop(file);
        assert!(path.exists());
        drop(OwnedFile::at(&path).unwrap());
        assert!(!path.exists());
    }
}
