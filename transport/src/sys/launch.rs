//! Children that are not forked: until its program begins, the child lives in the memory of
//! this process, whose thread waits for it meanwhile. No page tables are copied, and so it
//! costs the same however much memory there is. It is what posix_spawn(3) does, with what
//! that cannot do: sessions with a terminal, a directory, all signals, any map of numbers.
//!
//! Such a child must not touch what the threads of its parent, which go on, do not expect to
//! change: it writes to its own stack, to [`Launch`] and to `errno`, and has no user of its
//! own (a process of that user could reach our memory by it, and setuid(2) of the C library
//! would be carried out by the threads of the parent).
//!
//! References: clone(2), vfork(2), execve(2), rt_sigprocmask(2), close_range(2).

#![allow(unsafe_code)]

use std::cell::Cell;
use std::ffi::{CString, c_int, c_void};
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::process::Command;
use std::ptr::NonNull;

use super::image::Image;
use super::process::{FIRST, GRANTED, announcement, arrange};
use super::retry;
use super::start::{Reached, reset_dispositions};

/// More than enough for the calls of [`begin`] without optimization, and what the kernel puts
/// on a stack for a signal, of which there is none.
const STACK_BYTES: usize = 64 << 10;

/// What is below the stack and cannot be touched. A multiple of every size that pages have.
const GUARD_BYTES: usize = 64 << 10;

/// What a child exits with that could not become its program. Nobody sees it.
const FAILED: c_int = 127;

/// Every signal. As the kernel has it, since the C library keeps two for itself.
const ALL_SIGNALS: u64 = u64::MAX;

/// What a child begins with.
#[derive(Debug)]
pub(crate) struct Launch<'a> {
    image: Image,
    files: Vec<CString>,
    directory: Option<CString>,
    group: Option<Group>,
    /// From where to where.
    moves: Vec<(RawFd, RawFd)>,
    top: RawFd,
    /// How far the child came, and what it met there. Written by the child.
    failure: Option<(Reached, io::Error)>,
    /// The sources, which stay open.
    grants: PhantomData<BorrowedFd<'a>>,
}

/// What a child leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Group {
    /// A process group of its own.
    Own,
    /// A session of its own, controlled by the terminal that it has under this number.
    Session(u32),
}

/// A child that was started: its number, and its pidfd if there is one.
#[derive(Debug)]
pub(crate) struct Launched {
    pub(crate) pid: u32,
    pub(crate) pidfd: Option<OwnedFd>,
}

impl<'a> Launch<'a> {
    /// Of the program, arguments, environment and directory of `command`, which has nothing
    /// beside these. The environment has `variables` too, and, with `own`, the child's own
    /// number and the inode of its pidfd under these names.
    ///
    /// The child has `grants` under their numbers and otherwise, if they are not among
    /// these, 0, 1 and 2 as they are here.
    ///
    /// # Errors
    /// `InvalidInput` for a number that no descriptor can have, and for a NUL.
    pub(crate) fn new(
        mut command: Command,
        grants: &[(BorrowedFd<'a>, u32)],
        variables: &[(&str, String)],
        own: Option<(&str, &str)>,
        group: Option<Group>,
    ) -> io::Result<Self> {
        let mut moves = Vec::with_capacity(grants.len());
        for (fd, number) in grants {
            let number = RawFd::try_from(*number).ok().filter(|it| *it < RawFd::MAX);
            let number = number.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
            moves.push((fd.as_raw_fd(), number));
        }
        let is_told = |it: &&(RawFd, RawFd)| it.1 >= FIRST;
        let told: Vec<_> = moves.iter().filter(is_told).copied().collect();
        let mut variables = variables.to_vec();
        command.env_remove(GRANTED);
        if !told.is_empty() {
            variables.push((GRANTED, announcement(&told)?));
        }
        let directory = command.get_current_dir();
        let directory = directory.map(|it| CString::new(it.as_os_str().as_bytes()));
        let directory = directory.transpose()?;
        let image = Image::of(&mut command, &variables, own)?;
        let numbers = moves.iter().map(|(_, number)| number + 1);
        Ok(Self {
            files: image.files()?,
            image,
            directory,
            group,
            top: numbers.max().unwrap_or(FIRST).max(FIRST),
            moves,
            failure: None,
            grants: PhantomData,
        })
    }

    /// Starts the child. Returns once it runs its program.
    ///
    /// # Errors
    /// With the step that failed; no process is left then.
    pub(crate) fn start(mut self) -> Result<Launched, (Reached, io::Error)> {
        let stack = Stack::take().map_err(|error| (Reached::Fork, error))?;
        let blocked = AllBlocked::new();
        let cloned = clone(&stack, &mut self);
        drop(blocked);
        stack.put_back();
        let launched = cloned.map_err(|error| (Reached::Fork, error))?;
        match self.failure.take() {
            None => Ok(launched),
            Some(failure) => {
                launched.reap();
                Err(failure)
            }
        }
    }

    /// In the child.
    fn become_program(&mut self) -> (Reached, io::Error) {
        reset_dispositions();
        if let Err(failure) = self.arrange() {
            return failure;
        }
        // What was sent meanwhile takes effect, and by default: no handler is left.
        set_mask(0);
        (Reached::Program, self.image.exec_any(&self.files))
    }

    fn arrange(&mut self) -> Result<(), (Reached, io::Error)> {
        if let Some(directory) = &self.directory {
            // SAFETY: the path ends with a NUL.
            retry(|| unsafe { libc::chdir(directory.as_ptr()) })
                .map_err(|error| (Reached::Directory, error))?;
        }
        match self.group {
            None => {}
            Some(Group::Own) => {
                // SAFETY: takes integers only.
                retry(|| unsafe { libc::setpgid(0, 0) })
                    .map_err(|error| (Reached::Group, error))?;
            }
            Some(Group::Session(_)) => {
                // SAFETY: takes nothing.
                retry(|| unsafe { libc::setsid() }).map_err(|error| (Reached::Session, error))?;
            }
        }
        arrange(&mut self.moves, self.top).map_err(|error| (Reached::Descriptors, error))?;
        if let Some(Group::Session(terminal)) = self.group {
            // SAFETY: takes integers only. The session has no terminal yet, so nobody is
            // robbed of it.
            retry(|| unsafe { libc::ioctl(terminal as RawFd, libc::TIOCSCTTY, 0) })
                .map_err(|error| (Reached::Session, error))?;
        }
        Ok(())
    }
}

impl Launched {
    /// Waits for a child that could not begin, which is about to exit.
    fn reap(&self) {
        let (kind, id) = match &self.pidfd {
            Some(fd) => (libc::P_PIDFD, fd.as_raw_fd().cast_unsigned()),
            None => (libc::P_PID, self.pid),
        };
        let nowhere = std::ptr::null_mut();
        // Where nobody is to be waited for (SIGCHLD is ignored), it fails, and that is fine.
        // SAFETY: takes integers, and a null pointer where one may stand.
        let _ = retry(|| unsafe { libc::waitid(kind, id, nowhere, libc::WEXITED) });
    }
}

/// Makes a child in this memory, on `stack`, and waits until it has its program or has
/// exited. All signals have to be blocked.
fn clone(stack: &Stack, launch: &mut Launch<'_>) -> io::Result<Launched> {
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
    let mut pidfd: c_int = -1;
    let mut run = |flags| {
        let argument = std::ptr::from_mut(&mut *launch).cast::<c_void>();
        retry(|| {
            // SAFETY: `begin` runs on memory that nobody else uses, with room for it, and
            // does what a child may do that shares memory with threads that go on: see
            // above. This thread waits for it, so `argument` and `pidfd` outlive it and are
            // borrowed by it alone. It does not return to anything of ours.
            unsafe { libc::clone(begin, stack.top(), flags, argument, &raw mut pidfd) }
        })
    };
    let pid = match run(flags | libc::CLONE_PIDFD) {
        // No number is free for it, or the kernel does not know it. The child can do without.
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::EMFILE | libc::ENFILE | libc::EINVAL)
            ) =>
        {
            run(flags)
        }
        other => other,
    }?;
    // Before Linux 5.2 the flag is ignored, and nothing is there.
    // SAFETY: the kernel has just made it for us; nothing else owns it.
    let pidfd = (pidfd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(pidfd) });
    Ok(Launched {
        pid: pid.cast_unsigned(),
        pidfd,
    })
}

/// Where the child begins. It must not unwind, and cannot.
extern "C" fn begin(launch: *mut c_void) -> c_int {
    // SAFETY: it is the argument of `clone`, whose thread waits, and nobody else has it.
    let launch = unsafe { &mut *launch.cast::<Launch<'_>>() };
    launch.failure = Some(launch.become_program());
    // SAFETY: ends the child without what is the parent's to be done.
    unsafe { libc::_exit(FAILED) }
}

/// Memory for the stack of a child, with something below it that cannot be touched.
#[derive(Debug)]
struct Stack {
    base: NonNull<c_void>,
}

thread_local! {
    /// The stack of this thread's next child: one at a time has it, and making it takes as
    /// long as all else that is done here for a child.
    static SPARE: Cell<Option<Stack>> = const { Cell::new(None) };
}

impl Stack {
    /// That of the last child, or a new one.
    fn take() -> io::Result<Self> {
        match SPARE.try_with(Cell::take) {
            Ok(Some(stack)) => Ok(stack),
            _ => Self::new(),
        }
    }

    /// Keeps it for the next child.
    fn put_back(self) {
        // A thread that ends has no next one.
        let _ = SPARE.try_with(|spare| spare.set(Some(self)));
    }

    fn new() -> io::Result<Self> {
        // SAFETY: asks for new memory, wherever there is some.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                GUARD_BYTES + STACK_BYTES,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_STACK,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base).ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))?;
        let this = Self { base };
        let usable = base.as_ptr().wrapping_byte_add(GUARD_BYTES);
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: this is within what was just mapped, which nobody uses yet.
        retry(|| unsafe { libc::mprotect(usable, STACK_BYTES, access) })?;
        Ok(this)
    }

    /// Where it begins: it grows downwards.
    fn top(&self) -> *mut c_void {
        let length = GUARD_BYTES + STACK_BYTES;
        self.base.as_ptr().wrapping_byte_add(length)
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        // SAFETY: the memory was mapped by `new`, and the child that used it has its program
        // by now, or has exited.
        unsafe { libc::munmap(self.base.as_ptr(), GUARD_BYTES + STACK_BYTES) };
    }
}

/// All signals are held back in this thread for as long as this is there: a child that is
/// made meanwhile runs no handler of ours, which would work in our memory.
struct AllBlocked {
    before: u64,
}

impl AllBlocked {
    fn new() -> Self {
        Self {
            before: set_mask(ALL_SIGNALS),
        }
    }
}

impl Drop for AllBlocked {
    fn drop(&mut self) {
        set_mask(self.before);
    }
}

/// Sets which signals are blocked, and returns which were. It cannot fail.
fn set_mask(mask: u64) -> u64 {
    let mut before = 0_u64;
    // SAFETY: reads and writes as many bytes as it is told, which are those of the two.
    unsafe {
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            libc::SIG_SETMASK,
            &raw const mask,
            &raw mut before,
            size_of::<u64>(),
        )
    };
    before
}
