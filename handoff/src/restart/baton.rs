//! Which of two processes serves, where they can no longer tell each other.

use std::fs::File;
use std::io::{self, PipeReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;

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

    /// What the other process says is its hold on one, or `None`: it is no pipe.
    pub(super) fn received(fd: OwnedFd) -> io::Result<Option<Self>> {
        let file = File::from(fd);
        if !file.metadata()?.file_type().is_fifo() {
            return Ok(None);
        }
        // A pipe that has no byte, and somebody who could write one, must not have
        // this process wait for it. std knows the call by the name of a socket, and
        // the kernel of each kind of file.
        let not_waiting = UnixStream::from(OwnedFd::from(file));
        not_waiting.set_nonblocking(true)?;
        Ok(Some(Self(OwnedFd::from(not_waiting).into())))
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

#[cfg(test)]
mod tests {
    use super::*;

    /// What the other process holds of it.
    fn theirs(ours: &Baton) -> Baton {
        let shared = ours.share().expect("a number");
        let theirs = Baton::received(shared).expect("it is open");
        theirs.expect("it is a pipe")
    }

    #[test]
    fn one_of_two_takes_it() {
        let ours = Baton::new().expect("a pipe");
        let (they, next) = (theirs(&ours), theirs(&ours));
        assert!(they.take());
        assert!(!ours.take() && !next.take());
    }

    #[test]
    fn it_outlives_whoever_has_not_taken_it() {
        let ours = Baton::new().expect("a pipe");
        let they = theirs(&ours);
        drop(ours);
        assert!(they.take());
    }

    #[test]
    fn one_without_its_byte_is_not_waited_for() {
        let (reader, writer) = io::pipe().expect("a pipe");
        let empty = Baton::received(reader.into()).expect("it is open");
        assert!(!empty.expect("it is a pipe").take());
        drop(writer);
    }

    #[test]
    fn what_is_no_pipe_is_none() {
        let (socket, _peer) = UnixStream::pair().expect("a pair");
        let file = File::open("/proc/self/comm").expect("it is there");
        for fd in [socket.into(), file.into()] {
            assert!(Baton::received(fd).expect("it is open").is_none());
        }
    }
}
