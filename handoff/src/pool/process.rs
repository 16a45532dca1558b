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

/// The number under which a worker that was started by [`spawn_command`] has
/// its end of the channel.
pub const CHANNEL_NUMBER: u32 = 3;

/// Starts worker processes: any closure of this shape, or [`spawn_command`].
pub trait Spawn: 'static {
    /// What the channels with workers run over: a descriptor or std's `UnixStream`,
    /// outside of simulations.
    type Channel: ChannelSocket;

    /// Starts one. Called whenever the pool has too few of them, outside of any
    /// other callback.
    ///
    /// # Errors
    ///
    /// Whatever went wrong: it is logged, [told](super::PoolEvent::NotStarted)
    /// and counted, and tried again after a wait.
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
    /// Our end of the channel: a connected UNIX stream socket, whose other end
    /// no process has but the worker. (Somebody else who has it keeps the pool
    /// from seeing the worker's end.)
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

/// Workers that are started by commands: each has the channel under
/// [`CHANNEL_NUMBER`], where [`inherited_channel`] finds it, and no other
/// descriptor beside its standard streams.
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

/// The worker's end of the channel, in a process that was started by
/// [`spawn_command`]. To be called first in `main`.
///
/// # Errors
///
/// `NotFound` where there is none; `AlreadyExists` where it was taken before.
pub fn inherited_channel() -> io::Result<OwnedFd> {
    take_granted(CHANNEL_NUMBER)
}
