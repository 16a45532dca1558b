//! Which of two processes serves, where they can no longer tell each other.

use std::io::{self, PipeReader, Read, Write};
use std::os::fd::OwnedFd;

use crate::log;

/// One byte in a pipe that nobody writes to any more, and that both processes hold:
/// whoever reads it serves.
///
/// A channel that breaks leaves two processes that both live, and none of which knows
/// what the other has heard: whatever rule each of them follows by itself, there is a
/// place to cut at which both serve, or neither does. The kernel gives the byte to one
/// of them. It is gone with the process that has read it, and stays where a process
/// dies that has not.
#[derive(Debug)]
pub(super) struct Baton(PipeReader);

impl Baton {
    /// One that nobody has taken.
    pub(super) fn new() -> io::Result<Self> {
        let (reader, mut writer) = io::pipe()?;
        writer.write_all(b"!")?;
        Ok(Self(reader))
    }

    /// Another hold on the same one, for the other process.
    pub(super) fn share(&self) -> io::Result<OwnedFd> {
        Ok(self.0.try_clone()?.into())
    }

    /// Takes it; false where the other process has. Never waits: it is there, or the
    /// pipe is at its end.
    pub(super) fn take(mut self) -> bool {
        match self.0.read(&mut [0]) {
            Ok(count) => count == 1,
            Err(error) => {
                log::error!(target: log::HANDOFF, "cannot read who is to serve: {error}");
                false
            }
        }
    }
}

impl From<OwnedFd> for Baton {
    fn from(fd: OwnedFd) -> Self {
        Self(fd.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_of_two_takes_it() {
        let ours = Baton::new().expect("a pipe");
        let theirs = Baton::from(ours.share().expect("a number"));
        let next = Baton::from(ours.share().expect("a number"));
        assert!(theirs.take());
        assert!(!ours.take() && !next.take());
    }

    #[test]
    fn it_outlives_whoever_has_not_taken_it() {
        let ours = Baton::new().expect("a pipe");
        let theirs = Baton::from(ours.share().expect("a number"));
        drop(ours);
        assert!(theirs.take());
    }
}
