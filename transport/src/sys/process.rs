//! What a process passes to another over fork and exec: descriptors with agreed numbers,
//! and the environment.

#![allow(unsafe_code)]

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, PoisonError};

use super::image::Image;
use super::pidfd::pidfd_open;
use super::retry;
use super::start::{Blocked, CleanStart};

/// The first number that is not a standard stream.
pub(super) const FIRST: RawFd = 3;

/// The variable that tells a child what [`spawn`] gives it: number, device and inode of
/// each descriptor, `3:9:4711,7:9:4712`.
pub(super) const GRANTED: &str = "BOWLINE_DESCRIPTORS";

/// How often [`spawn`] starts again if other threads close the descriptors it needs.
const SPAWN_ATTEMPTS: u32 = 64;

/// Starts `command` with `grants` under their numbers in the child.
///
/// The descriptors are borrowed and stay open here. Besides its standard streams, the child
/// has exactly these. All others are made close-on-exec there, in case they were not.
///
/// # Errors
/// `InvalidInput` if a number is below 3 or is given twice. `WouldBlock` if other threads
/// closed and opened descriptors at these numbers in each of 64 attempts. Otherwise those
/// of fork and exec.
pub(crate) fn spawn(command: Command, grants: &[(BorrowedFd<'_>, u32)]) -> io::Result<Child> {
    spawn_announced(command, grants, None, |_| Ok(None))
}

/// As [`spawn`], with an environment of which a part is known only in the child. `announce`
/// makes it when everything else of `command` is settled. `start` says how the child
/// begins.
///
/// # Errors
/// As [`spawn`], and those of `announce`.
pub(crate) fn spawn_announced(
    mut command: Command,
    grants: &[(BorrowedFd<'_>, u32)],
    start: Option<&CleanStart>,
    announce: impl FnOnce(&mut Command) -> io::Result<Option<Image>>,
) -> io::Result<Child> {
    let mut copies = Vec::new();
    let mut moves = moves_of(grants, &mut copies)?;
    let numbers: BTreeSet<_> = moves.iter().map(|(_, number)| *number).collect();
    grant_by_environment(&mut command, &moves)?;
    let mut image = announce(&mut command)?;
    let top = numbers.last().map_or(FIRST, |last| last + 1);
    let places: Arc<[Place]> = numbers.into_iter().map(Place::new).collect();
    let (seen, begins) = (Arc::clone(&places), start.cloned());
    let arrange = move || {
        if seen.iter().any(Place::has_changed) {
            return Err(io::Error::from_raw_os_error(PLACE_CHANGED));
        }
        if let Some(start) = &begins {
            start.begin()?;
        }
        arrange(&mut moves, top)?;
        if let Some(start) = &begins {
            start.finish()?;
        }
        match &mut image {
            Some(image) => Err(image.exec()),
            None => Ok(()),
        }
    };
    // SAFETY: between fork and exec only async-signal-safe calls may be made and no
    // memory allocated: `arrange` calls fstat, fcntl, dup2 and close_range on numbers,
    // reads atomics, and writes to a vector that was made before; `start` calls sigaction,
    // pthread_sigmask, setsid and ioctl, and writes to an atomic; so does `exec`, which
    // std would call next anyhow, the closures of the caller's having run. The numbers are open
    // in the child: `grants` borrows their owners until the spawns below are over, as
    // `copies` has its own, and `command` is not used again.
    unsafe { command.pre_exec(arrange) };
    let mut placeholders = Vec::new();
    for _ in 0..SPAWN_ATTEMPTS {
        if let Some((source, _)) = grants.first() {
            for place in &*places {
                placeholders.extend(place.occupy(source)?);
            }
        }
        let spawned = match start {
            Some(start) => {
                start.forget();
                let _blocked = Blocked::all()?;
                command.spawn()
            }
            None => command.spawn(),
        };
        match spawned {
            Err(error) if error.raw_os_error() == Some(PLACE_CHANGED) => {}
            spawned => return spawned,
        }
    }
    Err(io::Error::from(io::ErrorKind::WouldBlock))
}

/// Sets the variable of the child that tells it what it is given.
fn grant_by_environment(command: &mut Command, moves: &[(RawFd, RawFd)]) -> io::Result<()> {
    match announcement(moves)? {
        text if text.is_empty() => command.env_remove(GRANTED),
        text => command.env(GRANTED, text),
    };
    Ok(())
}

/// Returns from where to where the descriptors of a child are moved. Those that std would
/// replace are copied first.
fn moves_of(
    grants: &[(BorrowedFd<'_>, u32)],
    copies: &mut Vec<OwnedFd>,
) -> io::Result<Vec<(RawFd, RawFd)>> {
    let mut moves = Vec::with_capacity(grants.len());
    let mut numbers = BTreeSet::new();
    for (fd, number) in grants {
        let number = RawFd::try_from(*number).unwrap_or(-1);
        if number < FIRST || !numbers.insert(number) {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        let mut source = fd.as_raw_fd();
        if source < FIRST {
            // In the child std has put its standard streams there by then.
            let copy = duplicate_at_least(source, FIRST)?;
            source = copy.as_raw_fd();
            copies.push(copy);
        }
        moves.push((source, number));
    }
    Ok(moves)
}

/// What the child reports if it cannot take its descriptors: an error that neither these
/// calls nor exec can return.
const PLACE_CHANGED: libc::c_int = libc::EIDRM;

/// A descriptor number that the child is to have.
///
/// std reports a failed exec through a pipe of its own, and takes the lowest free number
/// for it. If that were the number of a grant, the child would close the pipe and write the
/// error to the granted file. The parent would then think that the program was started. So
/// each number is kept in use meanwhile. If another thread uses it, it may close it at any
/// moment; so the child checks that it is still what it was.
#[derive(Debug)]
struct Place {
    number: RawFd,
    device: AtomicU64,
    inode: AtomicU64,
}

impl Place {
    fn new(number: RawFd) -> Self {
        Self {
            number,
            device: AtomicU64::new(0),
            inode: AtomicU64::new(0),
        }
    }

    /// Makes sure that something is open under the number, and notes what. If nothing else
    /// was, returns a copy of `source` under the number, to be kept meanwhile.
    fn occupy(&self, source: &impl AsRawFd) -> io::Result<Option<OwnedFd>> {
        loop {
            let placeholder = duplicate_at_least(source.as_raw_fd(), self.number)?;
            let is_ours = placeholder.as_raw_fd() == self.number;
            // If not, its owner may have closed it by now.
            if let Some((device, inode)) = self.identity() {
                self.device.store(device, Relaxed);
                self.inode.store(inode, Relaxed);
                return Ok(is_ours.then_some(placeholder));
            }
        }
    }

    /// Whether something else is open under the number than was noted, maybe std's pipe.
    /// Called in the child, where no other thread runs.
    fn has_changed(&self) -> bool {
        let noted = (self.device.load(Relaxed), self.inode.load(Relaxed));
        self.identity().is_some_and(|identity| identity != noted)
    }

    fn identity(&self) -> Option<(u64, u64)> {
        identity(self.number).ok()
    }
}

/// Returns device and inode of what is open under the number.
fn identity(number: RawFd) -> io::Result<(u64, u64)> {
    let mut stat = MaybeUninit::<libc::stat>::uninit();
    // SAFETY: the pointer is that of `stat`, borrowed for writing until the call
    // returns; of the number the kernel says whether it is open.
    retry(|| unsafe { libc::fstat(number, stat.as_mut_ptr()) })?;
    // SAFETY: the call succeeded, and so filled it in.
    let stat = unsafe { stat.assume_init() };
    Ok((stat.st_dev, stat.st_ino))
}

/// Returns the value of [`GRANTED`] for these pairs of a source and its number in the
/// child.
pub(super) fn announcement(moves: &[(RawFd, RawFd)]) -> io::Result<String> {
    let mut text = String::new();
    for &(source, number) in moves {
        let (device, inode) = identity(source)?;
        let comma = if text.is_empty() { "" } else { "," };
        // To a `String` this cannot fail.
        let _ = write!(text, "{comma}{number}:{device}:{inode}");
    }
    Ok(text)
}

/// Puts every source under its number, in the child.
///
/// Sources whose number another one needs are first moved out of the way, above `top`. So
/// numbers may overlap or be swapped.
pub(super) fn arrange(moves: &mut [(RawFd, RawFd)], top: RawFd) -> io::Result<()> {
    // Something that was inherited here and that nobody claimed, or was opened by a
    // library that does not know better. Not before Linux 5.11; then it stays.
    // SAFETY: takes integers only.
    unsafe {
        libc::syscall(
            libc::SYS_close_range,
            FIRST,
            libc::c_uint::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    };
    for (source, _) in &mut *moves {
        if *source < top {
            *source = retry(|| {
                // SAFETY: takes integers only.
                unsafe { libc::fcntl(*source, libc::F_DUPFD_CLOEXEC, top) }
            })?;
        }
    }
    for &mut (source, number) in moves {
        // The numbers differ, and so the new one is not close-on-exec.
        retry(|| {
            // SAFETY: takes integers only. What stood at `number` is closed: in the
            // child nobody uses it any more.
            unsafe { libc::dup2(source, number) }
        })?;
    }
    Ok(())
}

fn duplicate_at_least(source: RawFd, number: RawFd) -> io::Result<OwnedFd> {
    let fd = retry(|| {
        // SAFETY: takes integers only.
        unsafe { libc::fcntl(source, libc::F_DUPFD_CLOEXEC, number) }
    })?;
    // SAFETY: the kernel has just made `fd` for us; nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The numbers that [`take_inherited`] has given out. Each is given out once.
static TAKEN: Mutex<BTreeSet<RawFd>> = Mutex::new(BTreeSet::new());

/// Takes ownership of a descriptor that this process was started with, and makes it
/// close-on-exec. Its number may have been agreed on in any way. For descriptors from
/// [`spawn_with_descriptors`](crate::spawn_with_descriptors) or systemd,
/// [`take_granted`](crate::take_granted) does the same safely.
///
/// Each number is given out once.
///
/// # Errors
///
/// `InvalidInput` for the standard streams. `NotFound` if nothing is open under the number.
/// `AlreadyExists` if it was taken before, or if it is close-on-exec: then it was not
/// inherited, but made by this process.
///
/// # Safety
///
/// This process was started with the descriptor of this number, and nothing in it owns the
/// descriptor. That cannot be checked: a descriptor that was opened here and is not
/// close-on-exec looks the same. (See `std::os::fd`, "I/O safety".) If this is called first
/// in `main`, it is enough that whoever started this process has opened the descriptor.
///
/// # Examples
///
/// ```
/// use std::process::{Command, Stdio};
///
/// if std::env::args().nth(1).is_some() {
///     // SAFETY: the shell below has opened it for us, and nobody has touched it yet.
///     let file = unsafe { bowline::process::take_inherited(3) }?;
///     assert!(!std::io::read_to_string(std::fs::File::from(file))?.is_empty());
///     return Ok(());
/// }
/// let status = Command::new("sh")
///     .args(["-c", "exec \"$0\" child 3</proc/self/comm"])
///     .arg(std::env::current_exe()?)
///     .status()?;
/// assert!(status.success());
/// # Ok::<(), std::io::Error>(())
/// ```
pub unsafe fn take_inherited(number: u32) -> io::Result<OwnedFd> {
    take(number, |_| true)
}

/// As [`take_inherited`], for a number that is named in the environment with which this
/// process was started.
///
/// # Errors
/// As [`take_inherited`]. `NotFound` also if the number is not named.
pub(crate) fn take_granted(number: u32) -> io::Result<OwnedFd> {
    take(number, is_granted)
}

fn take(number: u32, is_ours: impl FnOnce(RawFd) -> bool) -> io::Result<OwnedFd> {
    let number = RawFd::try_from(number).unwrap_or(-1);
    if number < FIRST {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    // Held to the end: of two threads one is refused.
    let mut taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
    if taken.contains(&number) {
        return Err(io::Error::from(io::ErrorKind::AlreadyExists));
    }
    let flags = retry(|| {
        // SAFETY: takes integers only.
        unsafe { libc::fcntl(number, libc::F_GETFD) }
    });
    let flags = match flags {
        Err(error) if error.raw_os_error() == Some(libc::EBADF) => {
            return Err(io::Error::from(io::ErrorKind::NotFound));
        }
        flags => flags?,
    };
    if flags & libc::FD_CLOEXEC != 0 {
        return Err(io::Error::from(io::ErrorKind::AlreadyExists));
    }
    if !is_ours(number) {
        let text = "the environment names no descriptor of this number";
        return Err(io::Error::new(io::ErrorKind::NotFound, text));
    }
    retry(|| {
        // SAFETY: takes integers only.
        unsafe { libc::fcntl(number, libc::F_SETFD, flags | libc::FD_CLOEXEC) }
    })?;
    taken.insert(number);
    // SAFETY: `number` is open, and is given out here once. That nothing else owns it the
    // caller of `take_inherited` promises. Of `take_granted`, whoever started this
    // program has said with the environment that it was open then; so no call in this
    // process was given the number since, unless somebody has closed it that did not own
    // it. It is not close-on-exec, as everything is that std and this crate make, and is
    // the very file that was named where that was said as well.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Whether the environment with which this process was started names a number.
fn is_granted(number: RawFd) -> bool {
    let by_us = || {
        let found = identity(number).ok()?;
        let text = initial_variable(GRANTED)?;
        let is_it = |entry: &str| parse_granted(entry) == Some((number, found));
        Some(text.split(',').any(is_it))
    };
    let by_systemd = || {
        let integer = |name| initial_variable(name)?.parse::<u32>().ok();
        let count = RawFd::try_from(integer("LISTEN_FDS")?).ok()?;
        let is_for_us = integer("LISTEN_PID")? == std::process::id();
        Some(is_for_us && number - FIRST < count)
    };
    let by_others = |name: &str| initial_variable(name)?.parse::<RawFd>().ok();
    let is_named = |name: &&str| by_others(name) == Some(number);
    by_us() == Some(true) || by_systemd() == Some(true) || NAMING.iter().any(is_named)
}

/// Variables with the number of a descriptor that was opened for the program: by a Wayland
/// compositor for its client, and by Node for its child.
const NAMING: [&str; 2] = ["WAYLAND_SOCKET", "NODE_CHANNEL_FD"];

fn parse_granted(entry: &str) -> Option<(RawFd, (u64, u64))> {
    let (number, rest) = entry.split_once(':')?;
    let (device, inode) = rest.split_once(':')?;
    let identity = (device.parse().ok()?, inode.parse().ok()?);
    Some((number.parse().ok()?, identity))
}

/// Returns a variable as it was when this program was started. What the program has set
/// since proves nothing. Without /proc, returns the variable as it is now.
fn initial_variable(name: &str) -> Option<String> {
    let Ok(environment) = std::fs::read("/proc/self/environ") else {
        return std::env::var(name).ok();
    };
    let mut entries = environment.split(|byte| *byte == 0);
    let value = entries.find_map(|entry| {
        let value = entry.strip_prefix(name.as_bytes())?;
        value.strip_prefix(b"=")
    })?;
    String::from_utf8(value.to_vec()).ok()
}

/// Returns a descriptor that becomes readable when `child` exits: a pidfd, close-on-exec.
/// `None` if it has exited.
///
/// # Errors
/// `ENOSYS` before Linux 5.3. Otherwise those of pidfd_open(2) and wait4(2).
#[doc(alias = "pidfd_open")]
pub(crate) fn exit_descriptor(child: &mut Child) -> io::Result<Option<OwnedFd>> {
    // One that was waited for has no number any more: it may be another's.
    if child.try_wait()?.is_some() {
        return Ok(None);
    }
    pidfd_open(child.id()).map(Some)
}

/// Removes variables from the environment of this process.
///
/// # Errors
/// `Unsupported`, with nothing removed, if other threads run, since they may be reading the
/// environment; or if that cannot be found out.
pub(crate) fn remove_environment(names: &[&str]) -> io::Result<()> {
    if !is_single_threaded() {
        return Err(io::Error::from(io::ErrorKind::Unsupported));
    }
    for name in names {
        // SAFETY: the environment may not be read or written by another thread
        // meanwhile: there is none, as the kernel has just said, and only this one
        // could start one.
        unsafe { std::env::remove_var(name) };
    }
    Ok(())
}

/// Whether no other thread runs, as far as that can be found out.
fn is_single_threaded() -> bool {
    if let Ok(tasks) = std::fs::read_dir("/proc/self/task") {
        return tasks.count() == 1;
    }
    // Without /proc: this changes nothing, and is refused to a process of several
    // threads (unshare(2)).
    // SAFETY: takes integers only.
    retry(|| unsafe { libc::unshare(libc::CLONE_THREAD) }).is_ok()
}

/// Returns the time of `CLOCK_MONOTONIC`, in microseconds. systemd compares times by it.
pub(crate) fn monotonic_microseconds() -> u64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the pointer is that of `time`, borrowed for writing until the call
    // returns. It cannot fail: the clock exists on every Linux.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    seconds * 1_000_000 + u64::try_from(time.tv_nsec / 1_000).unwrap_or(0)
}

/// Returns the effective user ID of this process.
pub(crate) fn effective_user() -> u32 {
    // SAFETY: takes nothing, cannot fail.
    unsafe { libc::geteuid() }
}
