//! What execve(2) is given: arguments and environment as the kernel wants them, made
//! before there is a child. The environment can say the child's own number, which nobody
//! knows before.

#![allow(unsafe_code)]

use std::ffi::{CString, OsStr, OsString, c_char};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::process::Command;

use super::process::GRANTED;
use super::retry;

/// The file system of pidfds, where each process has its own inode (Linux 6.9).
const PID_FS: u64 = 0x5049_4446;

/// Room for the digits of any number, and a NUL.
const DIGITS: usize = 21;

/// The shell that runs a file which the kernel takes for no program, as execvp(3) does.
const SHELL: &std::ffi::CStr = c"/bin/sh";

/// Where programs are looked for without a `PATH`, as execvp(3) does.
const DEFAULT_PATH: &[u8] = b"/bin:/usr/bin";

/// What to start, with everything that takes memory done before the child is there.
#[derive(Debug)]
pub(crate) struct Image {
    arguments: Vec<CString>,
    environment: Vec<CString>,
    own: Option<OwnNumbers>,
    /// Places for the pointers to all of those, which are made in the child. There is one
    /// more in front of the arguments, for the shell that runs a script.
    argv: Vec<usize>,
    envp: Vec<usize>,
}

/// Variables that are known in the child only.
#[derive(Debug)]
struct OwnNumbers {
    /// `NAME=` with room for a number behind it.
    pid: Vec<u8>,
    pidfd: Vec<u8>,
}

impl Image {
    /// Makes one for the program of `command`, with its changes of the environment and
    /// `variables`. [`GRANTED`] is either among those or not in the environment. `own` names
    /// the variables with the child's process ID and with the inode of its pidfd. The latter
    /// is set only if the pidfd has an inode.
    ///
    /// # Errors
    /// `InvalidInput` if something contains a NUL.
    pub(crate) fn of(
        command: &mut Command,
        variables: &[(&str, String)],
        own: Option<(&str, &str)>,
    ) -> io::Result<Self> {
        let program = std::iter::once(command.get_program());
        let arguments = program.chain(command.get_args());
        let arguments = arguments.map(|it| Ok(CString::new(it.as_bytes())?));
        let arguments = arguments.collect::<io::Result<Vec<_>>>()?;
        let probe = own.map_or(GRANTED, |(pid, _)| pid);
        let mut all = environment_of(command, probe);
        let own_names = own.map(|(pid, pidfd)| [pid, pidfd]);
        let names = variables.iter().map(|(name, _)| *name);
        for name in names.chain(own_names.into_iter().flatten()) {
            all.retain(|(found, _)| found != name);
        }
        let mut environment = Vec::with_capacity(all.len() + variables.len());
        for (name, value) in all {
            let mut entry = name.into_vec();
            entry.reserve_exact(value.len() + 2);
            entry.push(b'=');
            entry.extend_from_slice(value.as_bytes());
            environment.push(CString::new(entry)?);
        }
        for (name, value) in variables {
            environment.push(CString::new(format!("{name}={value}"))?);
        }
        let with_room = |name: &str| {
            let mut entry = format!("{name}=").into_bytes();
            entry.resize(entry.len() + DIGITS, 0);
            entry
        };
        Ok(Self {
            argv: vec![0; arguments.len() + 2],
            // The two numbers, and the end.
            envp: vec![0; environment.len() + 3],
            arguments,
            environment,
            own: own.map(|(pid, pidfd)| OwnNumbers {
                pid: with_room(pid),
                pidfd: with_room(pidfd),
            }),
        })
    }

    /// The files that may be the program, in the order in which they are tried: those of
    /// `PATH` as the child has it, where the name has no slash.
    ///
    /// # Errors
    /// There are none: nothing has a NUL in it.
    pub(super) fn files(&self) -> io::Result<Vec<CString>> {
        let Some(name) = self.arguments.first().map(|it| it.as_bytes()) else {
            return Ok(Vec::new());
        };
        if name.contains(&b'/') || name.is_empty() {
            return Ok(vec![CString::new(name)?]);
        }
        let path = |entry: &CString| entry.as_bytes().strip_prefix(b"PATH=").map(<[u8]>::to_vec);
        let path = self.environment.iter().find_map(path);
        let path = path.unwrap_or_else(|| DEFAULT_PATH.to_vec());
        // execvp(3) passes over what is longer than any path.
        let folders = path.split(|byte| *byte == b':');
        let folders = folders.filter(|folder| folder.len() < libc::PATH_MAX as usize);
        let files = folders.map(|folder| {
            let separator: &[u8] = if folder.is_empty() { b"" } else { b"/" };
            Ok(CString::new([folder, separator, name].concat())?)
        });
        files.collect()
    }

    /// Becomes the program, which is looked for as execvp(3) does. To be called in the
    /// child, by the last closure before std would do it. Allocates nothing, and returns
    /// only if it fails.
    pub(crate) fn exec(&mut self) -> io::Error {
        self.point();
        let place = &raw mut environ;
        // SAFETY: the C library's own variable. This is the only thread of the child, and
        // nothing else of it reads the environment any more. The pointers end with a null
        // one, and what they point to is kept by `self`, which this function does not
        // leave but to fail, and then the child exits.
        unsafe { place.write(self.envp.as_ptr().cast()) };
        let argv = self.argv.as_ptr().wrapping_add(1);
        // SAFETY: the pointers are to strings that end with a NUL, the last is null, and
        // all are kept by `self`. The program is looked for as std does.
        unsafe { libc::execvp(self.arguments[0].as_ptr(), argv.cast()) };
        io::Error::last_os_error()
    }

    /// Becomes the first of `files` that can be executed. What fails says so as execvp(3)
    /// does: that something may not be executed comes before that others are not there.
    ///
    /// To be called in the child, whose memory may be the parent's: it allocates nothing,
    /// writes to nothing but `self`, and returns only if it fails.
    pub(super) fn exec_any(&mut self, files: &[CString]) -> io::Error {
        self.point();
        let mut denied = None;
        let mut last = io::Error::from_raw_os_error(libc::ENOENT);
        for file in files {
            let error = self.exec_file(file);
            match error.raw_os_error() {
                Some(libc::EACCES) => denied = Some(error),
                Some(
                    libc::ENOENT | libc::ESTALE | libc::ENOTDIR | libc::ENODEV | libc::ETIMEDOUT,
                ) => last = error,
                _ => return error,
            }
        }
        denied.unwrap_or(last)
    }

    fn exec_file(&mut self, file: &CString) -> io::Error {
        let envp = self.envp.as_ptr();
        // Read anew by the kernel each time: what is in front is the shell's.
        let argv = self.argv.as_ptr().wrapping_add(1);
        // SAFETY: the pointers are to strings that end with a NUL, the last of either list
        // is null, and all are kept by `self`.
        unsafe { libc::execve(file.as_ptr(), argv.cast(), envp.cast()) };
        let error = io::Error::last_os_error();
        if error.raw_os_error() != Some(libc::ENOEXEC) {
            return error;
        }
        // A script without a first line that says what runs it: its name goes where its
        // own was, and that of the shell before it.
        let shell = SHELL.as_ptr().expose_provenance();
        for (place, word) in self
            .argv
            .iter_mut()
            .zip([shell, file.as_ptr().expose_provenance()])
        {
            *place = word;
        }
        let argv = self.argv.as_ptr();
        // SAFETY: as before, and the shell's name is a constant.
        unsafe { libc::execve(SHELL.as_ptr(), argv.cast(), envp.cast()) };
        let error = io::Error::last_os_error();
        self.point();
        error
    }

    /// Makes all pointers, and the variables that only the child knows. Allocates nothing.
    fn point(&mut self) {
        for (place, argument) in self.argv.iter_mut().skip(1).zip(&self.arguments) {
            *place = argument.as_ptr().expose_provenance();
        }
        let mut places = self.envp.iter_mut();
        for (entry, place) in self.environment.iter().zip(places.by_ref()) {
            *place = entry.as_ptr().expose_provenance();
        }
        let Some(own) = &mut self.own else {
            return;
        };
        // In this order, so that the second can be left out.
        let numbers = [Some(u64::from(std::process::id())), own_pidfd_inode()];
        let entries = [&mut own.pid, &mut own.pidfd];
        for ((entry, number), place) in entries.into_iter().zip(numbers).zip(places) {
            if let Some(number) = number {
                write_number(entry, number);
                *place = entry.as_ptr().expose_provenance();
            }
        }
    }
}

unsafe extern "C" {
    /// The environment that execvp(3) gives the program, and in which it looks for `PATH`.
    static mut environ: *const *const c_char;
}

/// Returns everything that a child would find in its environment: the variables of this
/// process, unless `command` clears them, with the changes of `command`.
fn environment_of(command: &mut Command, probe: &str) -> Vec<(OsString, OsString)> {
    // std does not say whether it clears the environment. Then there is nothing to be
    // removed, and so no removal is noted; `probe` is going to be set anyhow.
    command.env_remove(probe);
    let is_kept = command.get_envs().any(|(name, _)| name == probe);
    let mut all: Vec<_> = if is_kept {
        std::env::vars_os().collect()
    } else {
        Vec::new()
    };
    let changes: Vec<(&OsStr, Option<&OsStr>)> = command.get_envs().collect();
    all.retain(|(name, _)| changes.iter().all(|(changed, _)| *changed != name));
    for (name, value) in changes {
        if let Some(value) = value {
            all.push((name.to_owned(), value.to_owned()));
        }
    }
    all
}

/// Writes a number after the `=`, and a NUL after it. The digits are made at the end of the
/// room first.
fn write_number(entry: &mut [u8], mut number: u64) {
    let start = entry.len() - DIGITS;
    let room = &mut entry[start..];
    let mut first = DIGITS;
    loop {
        first -= 1;
        room[first] = b'0' + (number % 10) as u8;
        number /= 10;
        if number == 0 || first == 0 {
            break;
        }
    }
    let length = DIGITS - first;
    room.copy_within(first.., 0);
    if let Some(end) = room.get_mut(length) {
        *end = 0;
    }
}

/// Returns the inode of the pidfd of this process. No other process has the same one until
/// the machine starts again. `None` before Linux 6.9. Allocates nothing.
pub(crate) fn own_pidfd_inode() -> Option<u64> {
    let pid = std::process::id().cast_signed();
    // SAFETY: takes integers only.
    let fd =
        retry(|| unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) as libc::c_int }).ok()?;
    // SAFETY: the kernel has just made `fd` for us; nothing else owns it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    let mut system = MaybeUninit::<libc::statfs>::uninit();
    // SAFETY: the pointer is that of `system`, borrowed for writing until the call returns.
    retry(|| unsafe { libc::fstatfs(fd.as_raw_fd(), system.as_mut_ptr()) }).ok()?;
    // SAFETY: the call succeeded, and so filled it in.
    let system = unsafe { system.assume_init() };
    // Before, all of them were one inode.
    if system.f_type as u64 != PID_FS {
        return None;
    }
    let mut stat = MaybeUninit::<libc::stat>::uninit();
    // SAFETY: the pointer is that of `stat`, borrowed for writing until the call returns.
    retry(|| unsafe { libc::fstat(fd.as_raw_fd(), stat.as_mut_ptr()) }).ok()?;
    // SAFETY: the call succeeded, and so filled it in.
    Some(unsafe { stat.assume_init() }.st_ino)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn number_of_any_length_ends_with_a_nul() {
        for number in [0, 7, 10, 4_194_304, u64::MAX] {
            let mut entry = b"LISTEN_PID=".to_vec();
            entry.resize(entry.len() + DIGITS, b'x');
            write_number(&mut entry, number);
            let end = entry.iter().position(|byte| *byte == 0).expect("a NUL");
            assert_eq!(entry[..end], *format!("LISTEN_PID={number}").as_bytes());
        }
    }

    /// What std does not say is found out by what it notes: this would fail with one that
    /// notes something else.
    #[test]
    fn environment_is_that_of_the_command() {
        let find = |command: &mut Command, name: &str| {
            let all = environment_of(command, "PROBE");
            let mut found = all.into_iter().filter(|(found, _)| found == name);
            let value = found.next().map(|(_, value)| value);
            assert!(found.next().is_none(), "once");
            value
        };
        let path = std::env::var_os("PATH");
        assert!(path.is_some());
        let mut command = Command::new("true");
        assert_eq!(find(&mut command, "PATH"), path);
        command.env("PATH", "/").env("A", "1");
        assert_eq!(find(&mut command, "PATH"), Some("/".into()));
        assert_eq!(find(&mut command, "A"), Some("1".into()));
        command.env_remove("PATH");
        assert_eq!(find(&mut command, "PATH"), None);
        command.env_clear().env("A", "2");
        assert_eq!(find(&mut command, "PATH"), None);
        assert_eq!(find(&mut command, "A"), Some("2".into()));
        assert_eq!(environment_of(&mut command, "PROBE").len(), 1);
    }
}
