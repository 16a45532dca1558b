//! The error of starting a child.

use std::error::Error;
use std::ffi::OsString;
use std::fmt;
use std::io;

use crate::sys::{self, Reached};

/// A child was not started. Nothing is left of it.
#[derive(Debug)]
#[non_exhaustive]
pub struct SpawnError {
    /// The program that was to run.
    pub program: OsString,
    /// The step that failed.
    pub step: SpawnStep,
    /// The system's answer.
    pub error: io::Error,
}

/// A step on the way to a running child, as far as it is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SpawnStep {
    /// Making its pipes, sockets and terminal. `InvalidInput` if its settings are not
    /// possible.
    Prepare,
    /// The new process: fork(2) or clone(2), and the descriptors that std needs for it.
    Fork,
    /// Its user, groups or process group: setuid(2) and the like.
    User,
    /// Its directory: chdir(2).
    Directory,
    /// Default signal dispositions, and an empty mask.
    Signals,
    /// A session of its own, and its controlling terminal.
    Session,
    /// Putting the descriptors under their numbers.
    Descriptors,
    /// execve(2): `NotFound` if there is no such program, `PermissionDenied` if it may not
    /// be executed.
    Program,
    /// Watching it and its streams. It was started, and killed.
    Watch,
}

impl SpawnStep {
    /// The step that a child did not come beyond.
    pub(super) fn of(reached: Reached, error: &io::Error, has_directory: bool) -> Self {
        match reached {
            Reached::Std => Self::of_std(error, has_directory),
            Reached::Fork => Self::Fork,
            Reached::Group => Self::User,
            Reached::Directory => Self::Directory,
            Reached::Signals => Self::Signals,
            Reached::Session => Self::Session,
            Reached::Descriptors => Self::Descriptors,
            Reached::Program => Self::Program,
        }
    }

    /// The step at which std failed. std does not say so, but each step has errors that
    /// the others do not have.
    fn of_std(error: &io::Error, has_directory: bool) -> Self {
        if has_directory && sys::is_of_a_path(error) {
            Self::Directory
        } else if sys::is_of_an_identity(error) {
            Self::User
        } else if error.raw_os_error().is_none() {
            // The settings are possible for no process.
            Self::Prepare
        } else {
            Self::Fork
        }
    }
}

impl fmt::Display for SpawnStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Prepare => "its settings",
            Self::Fork => "the new process",
            Self::User => "its user and groups",
            Self::Directory => "its directory",
            Self::Signals => "its signals",
            Self::Session => "its session and terminal",
            Self::Descriptors => "its descriptors",
            Self::Program => "the program",
            Self::Watch => "watching it",
        })
    }
}

impl fmt::Display for SpawnError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            program,
            step,
            error,
        } = self;
        write!(f, "cannot start {}: {step}: {error}", program.display())
    }
}

impl Error for SpawnError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        Some(&self.error)
    }
}

impl From<SpawnError> for io::Error {
    fn from(error: SpawnError) -> Self {
        Self::new(error.error.kind(), error)
    }
}
