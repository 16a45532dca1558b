//! The processes of workers: how they are started, and how their end is
//! noticed.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::Command;

use bowline_protocol::UnixTransportHandle;
use bowline_reactor::Reactor;
use bowline_transport::{ChildProcess, spawn_with_descriptors, take_granted};

use super::WorkerId;
use super::dispatcher::WorkerEnd;
use crate::channel::{Channel, ChannelSocket};

/// The descriptor number of the worker's end of the channel, in a worker that
/// [`spawn_command`] started.
pub const CHANNEL_NUMBER: u32 = 3;

/// Starts worker processes. It is [`spawn_command`], or any closure of this shape.
pub trait Spawn: 'static {
    /// The socket that a channel runs over. Outside of simulations it is a descriptor
    /// or std's `UnixStream`.
    type Channel: ChannelSocket;

    /// Starts a worker. Called when the pool has too few workers, and never inside of
    /// another callback.
    ///
    /// # Errors
    ///
    /// Whatever went wrong. The error is logged, [told](super::PoolEvent::NotStarted)
    /// and counted. The pool tries again after a wait.
    fn spawn(
        &mut self,
        reactor: &mut Reactor,
        worker: WorkerId,
    ) -> io::Result<Spawned<Self::Channel>>;
}

impl<F, C> Spawn for F
where
    F: FnMut(&mut Reactor, WorkerId) -> io::Result<Spawned<C>> + 'static,
    C: ChannelSocket,
{
    type Channel = C;

    fn spawn(&mut self, reactor: &mut Reactor, worker: WorkerId) -> io::Result<Spawned<C>> {
        self(reactor, worker)
    }
}

/// A worker process that was started.
pub struct Spawned<C = OwnedFd> {
    /// The pool's end of the channel, a connected UNIX stream socket. No process but
    /// the worker may have the other end: with another copy of it, the pool does not
    /// see when the worker ends.
    pub channel: C,
    /// The process.
    pub process: Box<dyn ChildProcess>,
}

impl<C: std::fmt::Debug> std::fmt::Debug for Spawned<C> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Spawned")
            .field("channel", &self.channel)
            .field("pid", &self.process.pid())
            .finish()
    }
}

/// [`Spawn`], whatever its channels run over.
pub(super) trait StartWorker: 'static {
    /// Starts a process and puts the pool's end on the channel with it.
    fn start(
        &mut self,
        reactor: &mut Reactor,
        worker: WorkerId,
        end: Channel<WorkerEnd>,
    ) -> io::Result<StartedWorker>;
}

/// A worker process that was started.
pub(super) struct StartedWorker {
    pub(super) process: Box<dyn ChildProcess>,
    pub(super) channel: io::Result<UnixTransportHandle>,
}

impl<S: Spawn> StartWorker for S {
    fn start(
        &mut self,
        reactor: &mut Reactor,
        worker: WorkerId,
        end: Channel<WorkerEnd>,
    ) -> io::Result<StartedWorker> {
        let Spawned { channel, process } = self.spawn(reactor, worker)?;
        let channel = channel.adopt(reactor, end).map_err(Into::into);
        Ok(StartedWorker { process, channel })
    }
}

/// Starts workers by commands. Each worker has the channel under [`CHANNEL_NUMBER`],
/// where [`inherited_channel`] finds it. Beside that it has its standard streams only.
pub fn spawn_command(
    mut command: impl FnMut(WorkerId) -> Command + 'static,
) -> impl Spawn<Channel = OwnedFd> {
    move |_: &mut Reactor, worker: WorkerId| {
        let (ours, theirs) = UnixStream::pair()?;
        let granted = [(theirs.as_fd(), CHANNEL_NUMBER)];
        let child = spawn_with_descriptors(command(worker), &granted)?;
        Ok(Spawned {
            channel: ours.into(),
            process: Box::new(child),
        })
    }
}

/// Takes the worker's end of the channel, in a process that [`spawn_command`] started.
/// Call it first in `main`.
///
/// # Errors
///
/// `NotFound` if there is none; `AlreadyExists` if it was taken before.
pub fn inherited_channel() -> io::Result<OwnedFd> {
    take_granted(CHANNEL_NUMBER)
}
