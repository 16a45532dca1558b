//! Who wants to take over, by the kernel's word: what a restart gives away, the keys of
//! connections above all, is for one process.

use std::io;

use bowline_protocol::UnixTransport;
use bowline_transport::{ChildProcess, Pidfd};

use crate::channel::Peer;

/// The process that has made a connection to the control socket.
#[derive(Debug)]
pub(super) struct Applying {
    pid: u32,
    /// None where the kernel has none to give: before Linux 6.5, or of a process that
    /// cannot be seen from here.
    process: Option<Pidfd>,
}

impl Applying {
    /// Asks the kernel who is there. Its user was looked at before.
    ///
    /// # Errors
    ///
    /// `NotFound`: whoever made the connection is gone, and somebody else has it. `EMFILE`
    /// or `ENFILE`.
    pub(super) fn of<T: UnixTransport + ?Sized>(transport: &T, peer: &Peer) -> io::Result<Self> {
        let Some(pid) = peer.credentials.and_then(|credentials| credentials.pid) else {
            // One of another namespace, whose numbers are not ours.
            return Ok(Self {
                pid: peer.pid,
                process: None,
            });
        };
        let process = match transport.peer_pidfd() {
            Ok(fd) => Some(Pidfd::from_descriptor(fd).map_err(gone)?),
            Err(error) if is_no_process(&error) => return Err(gone(error)),
            Err(error) if is_short(&error) => return Err(error),
            Err(_) => None,
        };
        // The number may be another's by now; the descriptor is not.
        match process.as_ref().map(ChildProcess::pid) {
            Some(number) if number != pid => Err(io::ErrorKind::NotFound.into()),
            _ => Ok(Self { pid, process }),
        }
    }

    /// Its number, which is nobody else's while [it is there](Self::is_there).
    pub(super) fn pid(&self) -> u32 {
        self.pid
    }

    /// Whether it was not waited for yet, for all that is known: so what is written to its
    /// connection is for nobody else.
    pub(super) fn is_there(&self) -> bool {
        let asked = self.process.clone().map(|mut process| process.signal(0));
        !matches!(asked, Some(Err(error)) if is_no_process(&error))
    }
}

// Of Linux, which std has no names for.
const ESRCH: i32 = 3;
const ENFILE: i32 = 23;
const EMFILE: i32 = 24;

fn is_no_process(error: &io::Error) -> bool {
    error.raw_os_error() == Some(ESRCH)
}

fn is_short(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(ENFILE | EMFILE))
}

fn gone(error: io::Error) -> io::Error {
    match is_no_process(&error) {
        true => io::ErrorKind::NotFound.into(),
        false => error,
    }
}
