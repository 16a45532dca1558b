//! How a channel comes about.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::process::{Child, Command};

use bowline::process::{remove_environment, spawn_with_descriptors, take_granted};

/// Names the descriptor of a child's end.
const DESCRIPTOR: &str = "NODE_CHANNEL_FD";

/// Names the form of messages.
const MODE: &str = "NODE_CHANNEL_SERIALIZATION_MODE";

/// The number of a child's end, the first that is not its standard input or output. Node
/// takes any.
const NUMBER: u32 = 3;

/// Takes the channel to the parent of this process, if it has one: it was started by Node
/// with `stdio: [..., 'ipc']`, `fork` or `cluster.fork`. To be called at the beginning,
/// before there are other threads. The variables that name it are removed, so that children
/// of ours do not take it for theirs.
///
/// # Errors
///
/// The parent speaks another form of messages (`serialization: 'advanced'`,
/// [`Unsupported`](io::ErrorKind::Unsupported)), there are other threads already (the same
/// kind), or what is named is no descriptor that this process was given.
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

/// Starts `command`, a Node, with a channel to this process. Returns our end, to be adopted
/// with a [`channel`](super::channel).
///
/// The child finds it by itself: `process.send` and `process.on('message')` are there. It
/// goes on running as long as it listens to messages, and the channel is open.
///
/// # Errors
///
/// Those of [`spawn_with_descriptors`].
pub fn spawn_node(mut command: Command) -> io::Result<(Child, OwnedFd)> {
    let (ours, theirs) = StdUnixStream::pair()?;
    command
        .env(DESCRIPTOR, NUMBER.to_string())
        .env(MODE, "json");
    let child = spawn_with_descriptors(command, &[(theirs.as_fd(), NUMBER)])?;
    Ok((child, ours.into()))
}
