//! Processes by their descriptors (pidfd), which never come to mean another process.
//!
//! References: pidfd_open(2), pidfd_send_signal(2), waitid(2), kill(2). For
//! `PIDFD_GET_INFO`, linux/pidfd.h.

#![allow(unsafe_code)]

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

use super::{has_waiting, retry};

/// The recipient of a signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Recipient {
    /// The process.
    Process,
    /// Every process in the group with its number (Linux 6.9).
    Group,
}

/// `PIDFD_SIGNAL_PROCESS_GROUP`: not in the C library's bindings yet.
const SIGNAL_PROCESS_GROUP: libc::c_uint = 1 << 2;

/// `PIDFD_GET_INFO`, with the fields of Linux 6.13.
const GET_INFO: libc::Ioctl = 0xC040_FF0B_u32 as libc::Ioctl;

/// `PIDFD_INFO_EXIT`: how the process ended, if it was waited for (Linux 6.15).
const INFO_EXIT: u64 = 1 << 3;

/// `struct pidfd_info`.
#[repr(C)]
#[derive(Default)]
struct Info {
    mask: u64,
    control_group: u64,
    ids: [u32; 11],
    exit_code: i32,
}

/// Opens a pidfd of the process with this number, close-on-exec. It becomes readable when
/// the process exits.
///
/// Only for a child that nobody has waited for, the number certainly means that process.
///
/// # Errors
/// `ENOSYS` before Linux 5.3. `ESRCH` if there is no such process. `EMFILE` or `ENFILE` if
/// no descriptor number is free.
pub(crate) fn pidfd_open(pid: u32) -> io::Result<OwnedFd> {
    let pid = libc::pid_t::try_from(pid).map_err(|_| no_process())?;
    // SAFETY: takes integers only.
    let fd = retry(|| unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) as libc::c_int })?;
    // SAFETY: the kernel has just made `fd` for us; nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Returns the process ID, as it is seen from here.
///
/// # Errors
/// `InvalidInput` if the descriptor is something else. `ESRCH` if the process was waited
/// for, or is not visible from here. `NotFound` without /proc.
pub(crate) fn pid_of(fd: BorrowedFd<'_>) -> io::Result<u32> {
    let path = format!("/proc/thread-self/fdinfo/{}", fd.as_raw_fd());
    let text = std::fs::read_to_string(path)?;
    let number = text.lines().find_map(|line| line.strip_prefix("Pid:"));
    let number = number.and_then(|number| number.trim().parse::<i64>().ok());
    match number {
        None => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "this is no descriptor of a process",
        )),
        Some(number) => u32::try_from(number)
            .ok()
            .filter(|number| *number > 0)
            .ok_or_else(no_process),
    }
}

fn no_process() -> io::Error {
    io::Error::from_raw_os_error(libc::ESRCH)
}

/// Whether the error says that there is no such process, or no longer.
pub(crate) fn is_no_process(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::ESRCH)
}

/// Sends a signal. 0 only checks whether one could be sent.
///
/// # Errors
/// `ESRCH` if nobody is left. `EINVAL` for a group before Linux 6.9. Otherwise those of
/// kill(2).
pub(crate) fn pidfd_send_signal(
    fd: BorrowedFd<'_>,
    signal: i32,
    recipient: Recipient,
) -> io::Result<()> {
    let flags = match recipient {
        Recipient::Process => 0,
        Recipient::Group => SIGNAL_PROCESS_GROUP,
    };
    let nothing = std::ptr::null::<libc::siginfo_t>();
    retry(|| {
        // SAFETY: takes integers, and a null pointer where one may stand.
        unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                fd.as_raw_fd(),
                signal,
                nothing,
                flags,
            ) as libc::c_int
        }
    })?;
    Ok(())
}

/// Sends a signal to the child with this number, which was not waited for, or to the
/// process group with this number, which the child leads.
///
/// # Errors
/// Those of kill(2).
pub(crate) fn send_signal(pid: u32, signal: i32, recipient: Recipient) -> io::Result<()> {
    // 0 and 1 would mean others, negated.
    let pid = libc::pid_t::try_from(pid).ok().filter(|pid| *pid > 1);
    let pid = pid.ok_or_else(no_process)?;
    let target = match recipient {
        Recipient::Process => pid,
        Recipient::Group => -pid,
    };
    // SAFETY: takes integers only.
    retry(|| unsafe { libc::kill(target, signal) })?;
    Ok(())
}

/// Returns how the process ended, if it has. This waits for a child. It never blocks.
///
/// # Errors
/// `ECHILD` if the process has ended, and either is not a child of this process or somebody
/// else has waited for it. Then nobody can tell how it ended; only Linux 6.15 and later
/// can.
pub(crate) fn pidfd_wait(fd: BorrowedFd<'_>) -> io::Result<Option<ExitStatus>> {
    let number = libc::id_t::try_from(fd.as_raw_fd()).unwrap_or(libc::id_t::MAX);
    match wait(libc::P_PIDFD, number) {
        Err(error) if error.raw_os_error() == Some(libc::ECHILD) => {
            if !has_waiting(fd)? {
                return Ok(None);
            }
            told_status(fd).map(Some).ok_or(error)
        }
        Err(error) => told_status(fd).map(Some).ok_or(error),
        result => result,
    }
}

/// How the child of this number ended, if it has, and waits for it by that. Never waits.
///
/// # Errors
/// `ECHILD` where it was waited for by somebody else.
pub(crate) fn child_wait(pid: u32) -> io::Result<Option<ExitStatus>> {
    wait(libc::P_PID, pid)
}

fn wait(kind: libc::idtype_t, number: libc::id_t) -> io::Result<Option<ExitStatus>> {
    let mut info = MaybeUninit::<libc::siginfo_t>::zeroed();
    retry(|| {
        // SAFETY: the pointer is that of `info`, borrowed for writing until the call
        // returns.
        unsafe {
            libc::waitid(
                kind,
                number,
                info.as_mut_ptr(),
                libc::WEXITED | libc::WNOHANG,
            )
        }
    })?;
    // SAFETY: zeroed, which is a value of this type, and then filled by the call, unless
    // it has found nothing.
    let info = unsafe { info.assume_init() };
    // SAFETY: what the call tells of is a child, and of one this field is filled; with
    // nothing to tell it is zero.
    if unsafe { info.si_pid() } == 0 {
        return Ok(None);
    }
    // SAFETY: as before.
    let status = unsafe { info.si_status() };
    Ok(Some(ExitStatus::from_raw(match info.si_code {
        libc::CLD_EXITED => (status & 0xff) << 8,
        libc::CLD_DUMPED => status | 0x80,
        _ => status,
    })))
}

/// Returns how a process ended that was waited for, if the kernel remembers it.
fn told_status(fd: BorrowedFd<'_>) -> Option<ExitStatus> {
    let mut info = Info {
        mask: INFO_EXIT,
        ..Info::default()
    };
    retry(|| {
        // SAFETY: the request reads and writes as many bytes as it says, which are those
        // of `info`, borrowed for that until the call returns.
        unsafe { libc::ioctl(fd.as_raw_fd(), GET_INFO, &raw mut info) }
    })
    .ok()?;
    (info.mask & INFO_EXIT != 0).then(|| ExitStatus::from_raw(info.exit_code))
}
