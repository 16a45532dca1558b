//! Reads and writes files that are not sockets: pipes, terminals, regular files.
//!
//! `O_NONBLOCK` decides whether such a call blocks. It belongs to the open file
//! description, and so to everyone who holds it. A terminal, or a pipe that was inherited,
//! is shared with a shell that does not expect its reads to fail. Nothing here sets the
//! flag on a file that others may hold. There are other ways not to block, and none of them
//! works for all files:
//! - [`read_at_once`] and [`write_at_once`], for what pipe(2) makes;
//! - [`has_waiting`](super::has_waiting) and [`has_room`], called before [`read`] and
//!   [`write`];
//! - [`reopen`], which makes an open file description of our own.

#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::OnceLock;

use super::{retry, retry_count};

/// Not in the C library's bindings yet; Linux knows it since 6.18.
const RWF_NOSIGNAL: libc::c_int = 0x100;

/// The most pieces in one call (`IOV_MAX`).
const MOST_PIECES: usize = 1024;

/// The kind of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FileKind {
    /// A pipe or a FIFO.
    Pipe,
    /// A socket.
    Socket,
    /// A regular file, or a disk.
    Regular,
    /// A directory.
    Directory,
    /// The master side of a pseudo-terminal.
    TerminalMaster,
    /// A terminal, or the slave side of a pseudo-terminal.
    Terminal,
    /// Another device, or a file of the kernel's own.
    Other,
}

/// Returns the kind of a file.
///
/// # Errors
/// The kernel's.
pub(crate) fn file_kind(fd: BorrowedFd<'_>) -> io::Result<FileKind> {
    use std::io::IsTerminal;
    let stat = status(fd)?;
    Ok(match stat.st_mode & libc::S_IFMT {
        libc::S_IFIFO => FileKind::Pipe,
        libc::S_IFSOCK => FileKind::Socket,
        libc::S_IFREG | libc::S_IFBLK => FileKind::Regular,
        libc::S_IFDIR => FileKind::Directory,
        libc::S_IFCHR if is_master(fd) => FileKind::TerminalMaster,
        libc::S_IFCHR if fd.is_terminal() => FileKind::Terminal,
        _ => FileKind::Other,
    })
}

/// Returns the length of a regular file, in bytes. `None` for other files.
///
/// # Errors
/// The kernel's.
pub(crate) fn regular_length(fd: BorrowedFd<'_>) -> io::Result<Option<u64>> {
    let stat = status(fd)?;
    let is_regular = stat.st_mode & libc::S_IFMT == libc::S_IFREG;
    Ok(is_regular.then(|| u64::try_from(stat.st_size).unwrap_or(0)))
}

fn status(fd: BorrowedFd<'_>) -> io::Result<libc::stat> {
    let mut stat = MaybeUninit::<libc::stat>::uninit();
    retry(|| {
        // SAFETY: `stat` is what the call writes, and outlives it.
        unsafe { libc::fstat(fd.as_raw_fd(), stat.as_mut_ptr()) }
    })?;
    // SAFETY: the call has succeeded, and so has filled it.
    Ok(unsafe { stat.assume_init() })
}

fn is_master(fd: BorrowedFd<'_>) -> bool {
    let mut number: libc::c_uint = 0;
    // SAFETY: this request writes one `unsigned int`, and `number` is one, borrowed
    // for writing until the call returns.
    retry(|| unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCGPTN, &raw mut number) }).is_ok()
}

/// Returns whether a descriptor is open for reading, and whether for writing.
///
/// # Errors
/// The kernel's.
pub(crate) fn access(fd: BorrowedFd<'_>) -> io::Result<(bool, bool)> {
    let flags = status_flags(fd)?;
    if flags & libc::O_PATH != 0 {
        return Ok((false, false));
    }
    Ok(match flags & libc::O_ACCMODE {
        libc::O_RDONLY => (true, false),
        libc::O_WRONLY => (false, true),
        _ => (true, true),
    })
}

fn status_flags(fd: BorrowedFd<'_>) -> io::Result<libc::c_int> {
    retry(|| {
        // SAFETY: takes integers only.
        unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) }
    })
}

/// Sets whether an open file that nobody else holds blocks.
///
/// # Errors
/// The kernel's.
pub(crate) fn set_blocking(fd: BorrowedFd<'_>, blocking: bool) -> io::Result<()> {
    let flags = status_flags(fd)?;
    let flags = match blocking {
        true => flags & !libc::O_NONBLOCK,
        false => flags | libc::O_NONBLOCK,
    };
    retry(|| {
        // SAFETY: takes integers only.
        unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags) }
    })?;
    Ok(())
}

/// Opens the same file again, with the same access: non-blocking, close-on-exec, and with
/// an open file description of our own. A terminal does not become the controlling
/// terminal.
///
/// # Errors
/// Those of open(2): `PermissionDenied` for a terminal of another user, `NotFound` without
/// /proc.
pub(crate) fn reopen(fd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let (reads, writes) = access(fd)?;
    let file = OpenOptions::new()
        .read(reads)
        .write(writes)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(proc_path(fd))?;
    Ok(file.into())
}

/// Returns the path of the file, if it has one.
pub(crate) fn file_path(fd: BorrowedFd<'_>) -> Option<PathBuf> {
    let path = std::fs::read_link(proc_path(fd)).ok()?;
    let text = path.to_string_lossy();
    (path.is_absolute() && !text.ends_with(" (deleted)")).then_some(path)
}

/// Whether the descriptor is an event counter (eventfd(2)).
pub(crate) fn is_event_counter(fd: BorrowedFd<'_>) -> bool {
    let path = std::fs::read_link(proc_path(fd));
    path.is_ok_and(|path| path.as_os_str() == "anon_inode:[eventfd]")
}

/// Whether reads and writes do not block, for everyone who holds the open file.
pub(crate) fn is_nonblocking(fd: BorrowedFd<'_>) -> bool {
    status_flags(fd).is_ok_and(|flags| flags & libc::O_NONBLOCK != 0)
}

fn proc_path(fd: BorrowedFd<'_>) -> PathBuf {
    format!("/proc/thread-self/fd/{}", fd.as_raw_fd()).into()
}

/// Whether writing some bytes would not block. A broken file has room. A terminal that was
/// hung up may have no room, and then a write blocks.
///
/// # Errors
/// The kernel's.
pub(crate) fn has_room(fd: BorrowedFd<'_>) -> io::Result<bool> {
    let asked = libc::POLLOUT;
    Ok(poll(fd, asked)? & (asked | libc::POLLERR) != 0)
}

/// Whether nobody can read any more what is written to a pipe.
pub(crate) fn has_no_reader(fd: BorrowedFd<'_>) -> bool {
    poll(fd, 0).is_ok_and(|events| events & libc::POLLERR != 0)
}

/// Whether the other end is gone, or there is an error: what poll(2) reports even if it is
/// asked for no events.
pub(crate) fn is_broken(fd: BorrowedFd<'_>) -> bool {
    poll(fd, 0).is_ok_and(|events| events & (libc::POLLHUP | libc::POLLERR) != 0)
}

/// Whether two descriptors refer to one open file. Uses `F_DUPFD_QUERY` (Linux 6.10), or
/// else kcmp(2). A sandbox may forbid the latter; then the result is false.
#[doc(alias = "kcmp")]
pub(crate) fn is_same_file(one: BorrowedFd<'_>, other: BorrowedFd<'_>) -> bool {
    // The C library's bindings do not have these.
    const F_DUPFD_QUERY: libc::c_int = 1024 + 3;
    const KCMP_FILE: libc::c_int = 0;
    let (one, other) = (one.as_raw_fd(), other.as_raw_fd());
    // SAFETY: takes integers only.
    match unsafe { libc::fcntl(one, F_DUPFD_QUERY, other) } {
        0 => return false,
        1 => return true,
        _ => {}
    }
    // SAFETY: takes nothing.
    let own = unsafe { libc::getpid() };
    // SAFETY: takes integers only.
    unsafe { libc::syscall(libc::SYS_kcmp, own, own, KCMP_FILE, one, other) == 0 }
}

fn poll(fd: BorrowedFd<'_>, events: libc::c_short) -> io::Result<libc::c_short> {
    let mut watched = libc::pollfd {
        fd: fd.as_raw_fd(),
        events,
        revents: 0,
    };
    retry(|| {
        // SAFETY: one element, borrowed for writing until the call returns.
        unsafe { libc::poll(&raw mut watched, 1, 0) }
    })?;
    Ok(watched.revents)
}

/// Whether the error says that a file does not support calls that do not block. Such a call
/// has done nothing.
pub(crate) fn is_unsupported(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EOPNOTSUPP)
}

/// Whether the error of a terminal says that it was hung up, that its other side is gone,
/// or that we may not use it now.
pub(crate) fn is_of_terminal(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EIO)
}

/// The error of writing when nobody reads.
pub(crate) fn no_reader() -> io::Error {
    io::Error::from_raw_os_error(libc::EPIPE)
}

/// Reads without blocking, however the file was opened.
///
/// # Errors
/// `WouldBlock` if there is nothing to read. [Unsupported](is_unsupported) by a FIFO, a
/// terminal and most files that are not pipes. Otherwise the kernel's.
pub(crate) fn read_at_once(fd: BorrowedFd<'_>, data: &mut [u8]) -> io::Result<usize> {
    let piece = libc::iovec {
        iov_base: data.as_mut_ptr().cast(),
        iov_len: data.len(),
    };
    retry_count(|| {
        // SAFETY: one piece, whose pointer and length are those of `data`, borrowed
        // for writing until the call returns. -1 is the place where the file stands.
        unsafe { libc::preadv2(fd.as_raw_fd(), &raw const piece, 1, -1, libc::RWF_NOWAIT) }
    })
}

/// Writes without blocking, however the file was opened, and without SIGPIPE.
///
/// # Errors
/// As [`read_at_once`]. `BrokenPipe` if nobody reads.
pub(crate) fn write_at_once(fd: BorrowedFd<'_>, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
    write_with(fd, pieces, libc::RWF_NOWAIT)
}

/// Reads. It blocks if the file does.
///
/// # Errors
/// The kernel's.
pub(crate) fn read(fd: BorrowedFd<'_>, data: &mut [u8]) -> io::Result<usize> {
    retry_count(|| {
        // SAFETY: pointer and length are those of `data`, borrowed for writing until
        // the call returns.
        unsafe { libc::read(fd.as_raw_fd(), data.as_mut_ptr().cast(), data.len()) }
    })
}

/// Writes, without SIGPIPE. It blocks if the file does.
///
/// # Errors
/// `BrokenPipe` if nobody reads. Otherwise the kernel's.
pub(crate) fn write(fd: BorrowedFd<'_>, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
    write_with(fd, pieces, 0)
}

fn write_with(fd: BorrowedFd<'_>, pieces: &[IoSlice<'_>], flags: libc::c_int) -> io::Result<usize> {
    if knows_no_signal() {
        match write_pieces(fd, pieces, flags | RWF_NOSIGNAL) {
            // Files that know no flags at all are no pipes, which alone raise it.
            Err(error) if flags == 0 && is_unsupported(&error) => {}
            result => return result,
        }
    }
    without_signal(|| write_pieces(fd, pieces, flags))
}

/// Calls pwritev2(2). (std promises that `IoSlice` has the layout of `iovec`.)
fn write_pieces(
    fd: BorrowedFd<'_>,
    pieces: &[IoSlice<'_>],
    flags: libc::c_int,
) -> io::Result<usize> {
    let count = pieces.len().min(MOST_PIECES) as libc::c_int;
    retry_count(|| {
        // SAFETY: pointer and count are those of `pieces`, whose memory is borrowed
        // until the call returns, and the kernel only reads. -1 is the place where
        // the file stands.
        unsafe { libc::pwritev2(fd.as_raw_fd(), pieces.as_ptr().cast(), count, -1, flags) }
    })
}

/// Whether the kernel has a flag not to raise SIGPIPE in a call. Asked once.
fn knows_no_signal() -> bool {
    static KNOWS: OnceLock<bool> = OnceLock::new();
    *KNOWS.get_or_init(|| {
        let Ok((_reading, writing)) = io::pipe() else {
            return false;
        };
        write_pieces(writing.as_fd(), &[IoSlice::new(b"?")], RWF_NOSIGNAL).is_ok()
    })
}

/// Makes a call that may raise SIGPIPE, and keeps the signal from the program: it is
/// blocked in this thread, and taken if the call has raised it. If the program ignores the
/// signal, as it does by default with std, this takes one more system call; otherwise three
/// or four.
pub(crate) fn without_signal(call: impl FnOnce() -> io::Result<usize>) -> io::Result<usize> {
    if is_ignored() {
        return call();
    }
    let mut signals = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: writes to `signals`, which is borrowed for that.
    unsafe { libc::sigemptyset(signals.as_mut_ptr()) };
    // SAFETY: the call before has made it a set.
    let mut signals = unsafe { signals.assume_init() };
    // SAFETY: changes `signals`, which is borrowed for that.
    unsafe { libc::sigaddset(&raw mut signals, libc::SIGPIPE) };
    // One that waits already is somebody else's.
    let mut before = signals;
    // SAFETY: writes to `before`, which is borrowed for that.
    unsafe { libc::sigpending(&raw mut before) };
    // SAFETY: reads `before`, which is a set.
    let was_pending = unsafe { libc::sigismember(&raw const before, libc::SIGPIPE) } == 1;
    let mut mask = signals;
    // SAFETY: reads `signals` and writes to `mask`, both sets.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const signals, &raw mut mask) };
    let result = call();
    let was_raised = result
        .as_ref()
        .is_err_and(|error| error.kind() == io::ErrorKind::BrokenPipe);
    if was_raised && !was_pending {
        let at_once = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // SAFETY: reads `signals` and `at_once`; nothing is to be written.
        unsafe { libc::sigtimedwait(&raw const signals, std::ptr::null_mut(), &raw const at_once) };
    }
    // SAFETY: reads `mask`, which the call above has filled.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const mask, std::ptr::null_mut()) };
    result
}

fn is_ignored() -> bool {
    let mut action = MaybeUninit::<libc::sigaction>::uninit();
    let asked = retry(|| {
        // SAFETY: sets nothing, and writes to `action`, which is borrowed for that.
        unsafe { libc::sigaction(libc::SIGPIPE, std::ptr::null(), action.as_mut_ptr()) }
    });
    // SAFETY: read only where the call has succeeded, and so has filled it.
    asked.is_ok() && unsafe { action.assume_init() }.sa_sigaction == libc::SIG_IGN
}

/// Redirects the standard output of this process to nowhere, so that whoever reads the
/// other end sees the end.
///
/// # Errors
/// The kernel's.
pub(crate) fn close_standard_output() -> io::Result<()> {
    let nowhere = OwnedFd::from(File::options().write(true).open("/dev/null")?);
    retry(|| {
        // SAFETY: takes integers only. What stands at 1 is replaced in one step; who
        // names it goes on to name an open file.
        unsafe { libc::dup2(nowhere.as_raw_fd(), libc::STDOUT_FILENO) }
    })?;
    Ok(())
}
