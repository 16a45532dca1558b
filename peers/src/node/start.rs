//! How a channel is created, and found.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::process::{Child, Command};

use bowline::process::{remove_environment, spawn_with_descriptors, take_granted};

/// The variable with the descriptor number of a child's end.
const DESCRIPTOR: &str = "NODE_CHANNEL_FD";

/// The variable with the format of messages.
const MODE: &str = "NODE_CHANNEL_SERIALIZATION_MODE";

/// The descriptor number of a child's end: the first after standard error. Node accepts
/// any.
const NUMBER: u32 = 3;

/// Takes the channel to the parent of this process, if it has one. It has one if Node
/// started it with `stdio: [..., 'ipc']`, `fork` or `cluster.fork`. Call this at the
/// beginning, before there are other threads. It removes the variables that describe the
/// channel, so that our own children do not use it.
///
/// # Errors
///
/// - The parent uses the other format of messages (`serialization: 'advanced'`), or there
///   are other threads already: [`Unsupported`](io::ErrorKind::Unsupported).
/// - The variable does not name a descriptor that this process was given.
pub fn take_channel() -> io::Result<Option<OwnedFd>> {
    let Some(number) = std::env::var_os(DESCRIPTOR) else {
        return Ok(None);
    };
    let mode = std::env::var_os(MODE);
    if mode.is_some_and(|mode| mode != "json") {
        let what = "the parent's serialization is not 'json'";
        return Err(io::Error::new(io::ErrorKind::Unsupported, what));
    }
    let number = number.to_str().and_then(|number| number.parse().ok());
    let number = number.ok_or(io::ErrorKind::InvalidInput)?;
    remove_environment(&[DESCRIPTOR, MODE])?;
    take_granted(number).map(Some)
}

/// Starts `command`, which runs Node, with a channel to this process. Returns our end, to
/// be adopted with a [`channel`](super::channel).
///
/// In the child, `process.send` and `process.on('message')` work without further setup. The
/// child runs for as long as it listens for messages and the channel is open.
///
/// # Errors
///
/// As [`spawn_with_descriptors`].
pub fn spawn_node(mut command: Command) -> io::Result<(Child, OwnedFd)> {
    let (ours, theirs) = StdUnixStream::pair()?;
    command
        .env(DESCRIPTOR, NUMBER.to_string())
        .env(MODE, "json");
    let child = spawn_with_descriptors(command, &[(theirs.as_fd(), NUMBER)])?;
    Ok((child, ours.into()))
}
