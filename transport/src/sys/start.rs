//! Starts a child as if nobody had been there before it, and tells how far it came if it
//! fails.
//!
//! References: fork(2), execve(2), signal(7), setsid(2), TIOCSCTTY(2const).

#![allow(unsafe_code)]

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::RawFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::Relaxed;

use super::retry;

/// How far a child came on the way to its program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reached {
    /// Not to our code. It failed in fork(2), or in what std does in the child before:
    /// standard streams, user and groups, directory, process group.
    Std,
    /// Its signals.
    Signals,
    /// Its session, and its controlling terminal.
    Session,
    /// Its descriptors.
    Descriptors,
    /// execve(2).
    Program,
    /// Not to a child: clone(2). Of those that are launched, as the following are.
    Fork,
    /// Its directory.
    Directory,
    /// A process group of its own.
    Group,
}

/// Those of a child that is forked, in the order of their numbers.
const STEPS: [Reached; 5] = [
    Reached::Std,
    Reached::Signals,
    Reached::Session,
    Reached::Descriptors,
    Reached::Program,
];

/// What a child does between fork and exec besides taking its descriptors. It begins with
/// default signal dispositions and an empty mask. If it has a terminal, it begins in a
/// session of its own.
#[derive(Clone, Debug)]
pub(crate) struct CleanStart {
    progress: Arc<Progress>,
    /// The number of its controlling terminal.
    terminal: Option<RawFd>,
}

impl CleanStart {
    /// Makes one. `terminal` is the number of the controlling terminal in the child, if it
    /// is to have one.
    ///
    /// # Errors
    /// There is no memory.
    pub(crate) fn new(terminal: Option<u32>) -> io::Result<Self> {
        let terminal = terminal.map(RawFd::try_from).transpose();
        Ok(Self {
            progress: Arc::new(Progress::new()?),
            terminal: terminal.map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?,
        })
    }

    /// Returns how far the last child came.
    pub(crate) fn reached(&self) -> Reached {
        let step = self.progress.step().load(Relaxed);
        STEPS[(step as usize).min(STEPS.len() - 1)]
    }

    pub(super) fn forget(&self) {
        self.reach(Reached::Std);
    }

    fn reach(&self, step: Reached) {
        self.progress.step().store(step as u32, Relaxed);
    }

    /// Runs in the child, before its descriptors are arranged. Allocates nothing.
    pub(super) fn begin(&self) -> io::Result<()> {
        self.reach(Reached::Signals);
        reset_dispositions();
        if self.terminal.is_some() {
            self.reach(Reached::Session);
            // SAFETY: takes nothing.
            retry(|| unsafe { libc::setsid() })?;
        }
        self.reach(Reached::Descriptors);
        Ok(())
    }

    /// Runs in the child, once its descriptors are arranged. Allocates nothing.
    pub(super) fn finish(&self) -> io::Result<()> {
        if let Some(terminal) = self.terminal {
            self.reach(Reached::Session);
            // SAFETY: takes integers only. The session has no terminal yet, so nobody is
            // robbed of it.
            retry(|| unsafe { libc::ioctl(terminal, libc::TIOCSCTTY, 0) })?;
        }
        self.reach(Reached::Signals);
        // What was sent meanwhile takes effect, and by default.
        set_mask(&empty_set(), None)?;
        self.reach(Reached::Program);
        Ok(())
    }
}

/// A number in memory that parent and child share.
#[derive(Debug)]
struct Progress {
    place: NonNull<AtomicU32>,
}

// SAFETY: the memory is the process's, not a thread's, and holds nothing but an atomic.
unsafe impl Send for Progress {}
// SAFETY: as above.
unsafe impl Sync for Progress {}

impl Progress {
    fn new() -> io::Result<Self> {
        // SAFETY: asks for new memory, wherever there is some.
        let place = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size_of::<AtomicU32>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if place == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        NonNull::new(place.cast())
            .map(|place| Self { place })
            .ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))
    }

    fn step(&self) -> &AtomicU32 {
        // SAFETY: the memory is there for as long as `self`, aligned to a page, zeroed by
        // the kernel, and only ever used as this.
        unsafe { self.place.as_ref() }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        // SAFETY: the memory was mapped by `new`, and nobody has a reference to it.
        unsafe { libc::munmap(self.place.as_ptr().cast(), size_of::<AtomicU32>()) };
    }
}

/// Blocks all signals in this thread while it exists. So a child that is forked meanwhile
/// runs no handler of ours; its effect would be ours too.
#[derive(Debug)]
pub(super) struct Blocked {
    before: libc::sigset_t,
}

impl Blocked {
    /// Blocks all signals.
    ///
    /// # Errors
    /// The kernel's; none is expected.
    pub(super) fn all() -> io::Result<Self> {
        let mut all = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: writes to `all`, which is borrowed for that.
        unsafe { libc::sigfillset(all.as_mut_ptr()) };
        // SAFETY: the call before has made it a set.
        let all = unsafe { all.assume_init() };
        let mut before = empty_set();
        set_mask(&all, Some(&mut before))?;
        Ok(Self { before })
    }
}

impl Drop for Blocked {
    fn drop(&mut self) {
        // The mask was in force before: it cannot be wrong.
        let _ = set_mask(&self.before, None);
    }
}

fn empty_set() -> libc::sigset_t {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: writes to `set`, which is borrowed for that.
    unsafe { libc::sigemptyset(set.as_mut_ptr()) };
    // SAFETY: the call before has made it a set.
    unsafe { set.assume_init() }
}

fn set_mask(mask: &libc::sigset_t, before: Option<&mut libc::sigset_t>) -> io::Result<()> {
    let before = before.map_or(std::ptr::null_mut(), std::ptr::from_mut);
    // SAFETY: reads `mask`, and writes to `before` if that is somewhere.
    let error = unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, mask, before) };
    match error {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

/// Gives every signal its default effect. exec does so for those that are handled, but not
/// for those that are ignored. It makes the system call itself: the C library refuses two
/// signals of its own, which a parent may have ignored.
pub(super) fn reset_dispositions() {
    // The kernel's `struct sigaction`, and room: `SIG_DFL`, no flags, an empty mask.
    let action = [0_u64; 4];
    // As many bytes as a mask has there.
    let mask = size_of::<u64>();
    for signal in 1..=libc::SIGRTMAX() {
        // Refused for SIGKILL and SIGSTOP.
        // SAFETY: reads `action`, which is larger than what is read; nothing is to be
        // written.
        unsafe {
            libc::syscall(
                libc::SYS_rt_sigaction,
                signal,
                action.as_ptr(),
                std::ptr::null_mut::<u64>(),
                mask,
            )
        };
    }
}
