//! The same small servers, each the way its own community would write it.
//!
//! They are given a listener whose sockets inherit `TCP_NODELAY` from it.

mod anchovy;
mod bowline;
mod calloop;
mod hand;
mod limit;
pub(crate) mod messages;
mod mio;
pub(crate) mod passing;
mod tokio;

use std::io;
use std::os::fd::OwnedFd;

#[cfg(feature = "inspect")]
pub(crate) use self::bowline::SLOW;
use crate::timers::Timed;

/// Who serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Peer {
    /// The hand-written edge-triggered loop on libc: what the kernel allows.
    Limit,
    Mio,
    Bowline,
    Tokio,
    /// tokio with `anchovy`, which passes descriptors only.
    Anchovy,
    Calloop,
    /// In C, a program of its own.
    Libuv,
    /// In Python.
    Twisted,
    /// tokio with `quinn-udp`, for datagrams only.
    Quinn,
}

impl Peer {
    pub(crate) const ALL: [Self; 9] = [
        Self::Limit,
        Self::Mio,
        Self::Bowline,
        Self::Tokio,
        Self::Anchovy,
        Self::Calloop,
        Self::Libuv,
        Self::Twisted,
        Self::Quinn,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Limit => "limit",
            Self::Mio => "mio",
            Self::Bowline => "bowline",
            Self::Tokio => "tokio",
            Self::Anchovy => "anchovy",
            Self::Calloop => "calloop",
            Self::Libuv => "libuv",
            Self::Twisted => "Twisted",
            Self::Quinn => "quinn-udp",
        }
    }
}

/// What a server does with its connections. The number is the parameter that
/// the hand-written servers are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Task {
    /// Sends back what it receives.
    Echo = ECHO,
    /// The same, ready for descriptors that never come.
    EchoMixin = ECHO_MIXIN,
    /// Writes what it receives ten times, in ten writes.
    Ten = TEN,
    /// Receives until the end, then sends how many bytes there were.
    Sink = SINK,
    /// Receives a number and sends as many bytes.
    Source = SOURCE,
    /// Receives descriptors until the end, then sends how many there were.
    ReceiveDescriptors = RECEIVE,
    /// The same from a peer that is trusted; differs for bowline only, which
    /// otherwise clears the linger setting of each descriptor.
    ReceiveTrusted = RECEIVE_TRUSTED,
    /// Receives a number and sends as many descriptors, each with a byte.
    SendDescriptors = SEND,
    /// Passes the connections that it accepts to a worker, which sends back
    /// what it receives; see `passing`.
    Pass = PASS,
    /// Counts, as `Sink` does, datagrams that the kernel has merged.
    SinkMerged = SINK_MERGED,
}

const ECHO: u8 = 0;
const ECHO_MIXIN: u8 = 1;
const TEN: u8 = 2;
const SINK: u8 = 3;
const SOURCE: u8 = 4;
const RECEIVE: u8 = 5;
const RECEIVE_TRUSTED: u8 = 6;
const SEND: u8 = 7;
const PASS: u8 = 8;
const SINK_MERGED: u8 = 9;

impl Task {
    pub(crate) const ALL: [Self; 10] = [
        Self::Echo,
        Self::EchoMixin,
        Self::Ten,
        Self::Sink,
        Self::Source,
        Self::ReceiveDescriptors,
        Self::ReceiveTrusted,
        Self::SendDescriptors,
        Self::Pass,
        Self::SinkMerged,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Echo => "echo",
            Self::EchoMixin => "echo-mixin",
            Self::Ten => "ten",
            Self::Sink => "sink",
            Self::Source => "source",
            Self::ReceiveDescriptors => "receive-descriptors",
            Self::ReceiveTrusted => "receive-trusted",
            Self::SendDescriptors => "send-descriptors",
            Self::Pass => "pass",
            Self::SinkMerged => "sink-merged",
        }
    }
}

/// What a server listens on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Family {
    Tcp,
    Unix,
    /// One socket.
    Udp,
    /// UNIX seqpacket.
    Packets,
    /// One end.
    Pipe,
}

impl Family {
    pub(crate) const ALL: [Self; 5] = [Self::Tcp, Self::Unix, Self::Udp, Self::Packets, Self::Pipe];

    /// Whether it is of byte streams over sockets, and not of `messages`.
    pub(crate) fn is_stream(self) -> bool {
        matches!(self, Self::Tcp | Self::Unix)
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Unix => "unix",
            Self::Udp => "udp",
            Self::Packets => "packets",
            Self::Pipe => "pipe",
        }
    }
}

/// What a server is to be.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Job {
    pub(crate) task: Task,
    pub(crate) family: Family,
    /// How long the messages are at the most: those that keep a buffer for
    /// each connection choose its size by this.
    pub(crate) message: usize,
}

/// A server that is turned by its owner.
pub(crate) trait Server {
    /// Serves a connected non-blocking socket.
    fn adopt(&mut self, socket: OwnedFd) -> io::Result<()>;

    /// Serves one more non-blocking TCP listener, if it can.
    fn listen(&mut self, listener: OwnedFd) -> io::Result<()> {
        drop(listener);
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Waits for something to do, or not, and does it.
    fn turn(&mut self, wait: Wait) -> io::Result<()>;
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wait {
    No,
    Forever,
}

/// Makes a server on a listener, or one that is given its connections.
pub(crate) fn build(
    peer: Peer,
    job: Job,
    listener: Option<OwnedFd>,
) -> io::Result<Box<dyn Server>> {
    if !job.family.is_stream() {
        return messages::build(peer, job, listener);
    }
    match peer {
        Peer::Limit => limit::build(job, listener),
        Peer::Mio => mio::build(job, listener),
        Peer::Bowline => bowline::build(job, listener),
        Peer::Tokio => tokio::build(job, listener),
        Peer::Anchovy => anchovy::build(job, listener),
        Peer::Calloop => calloop::build(job, listener),
        Peer::Libuv | Peer::Twisted | Peer::Quinn => Err(elsewhere()),
    }
}

/// Runs one of the timer works; how long each operation took, and how late
/// timers were.
pub(crate) fn time(peer: Peer, timed: Timed, count: usize) -> io::Result<Vec<f64>> {
    match peer {
        Peer::Limit => limit::time(timed, count),
        // mio has no timers; what one would write is the limit.
        Peer::Mio | Peer::Anchovy | Peer::Quinn => Ok(Vec::new()),
        Peer::Bowline => bowline::time(timed, count),
        Peer::Tokio => tokio::time(timed, count),
        Peer::Calloop => calloop::time(timed, count),
        Peer::Libuv | Peer::Twisted => Err(elsewhere()),
    }
}

fn elsewhere() -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, "it is a program of its own")
}

/// Calls `build` of a hand-written server, compiled for the task.
macro_rules! for_each_task {
    ($task:expr, $build:ident($($argument:expr),*)) => {
        match $task {
            Task::Echo | Task::Pass | Task::SinkMerged => $build::<{ super::ECHO }>($($argument),*),
            Task::EchoMixin => $build::<{ super::ECHO_MIXIN }>($($argument),*),
            Task::Ten => $build::<{ super::TEN }>($($argument),*),
            Task::Sink => $build::<{ super::SINK }>($($argument),*),
            Task::Source => $build::<{ super::SOURCE }>($($argument),*),
            Task::ReceiveDescriptors | Task::ReceiveTrusted => {
                $build::<{ super::RECEIVE }>($($argument),*)
            }
            Task::SendDescriptors => $build::<{ super::SEND }>($($argument),*),
        }
    };
}
use for_each_task;
