//! How a pool behaves, and what it says of itself.

use std::io;
use std::process::ExitStatus;
use std::time::Duration;

use bowline_protocol::policies::Backoff;

use super::{WorkerId, WorkerRefusal};

/// How a pool behaves. Made with [`PoolSettings::default`], and its methods.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct PoolSettings {
    /// How many workers there are; default as many as the machine runs threads
    /// at a time.
    pub workers: usize,
    /// How many connections a worker may have been given without having
    /// answered; default 64.
    pub window: usize,
    /// How long a worker that has connections to answer may say nothing before
    /// it counts as hung and gets no more; default 1 s.
    pub ack_timeout: Duration,
    /// How old it may get before its worker is killed; default 10 s, `None`
    /// for never.
    pub kill_timeout: Option<Duration>,
    /// How often one connection is given out at the most, counting those that
    /// were refused and those whose worker died; default 10.
    pub max_attempts: u32,
    /// How many connections may wait here, when no worker can take one;
    /// default 1,024.
    pub queue: usize,
    /// How long one may wait here; default 10 s.
    pub queue_timeout: Duration,
    /// How long a worker may take to say hello after its start; default 10 s.
    pub start_timeout: Duration,
    /// How long a worker may take to exit once its channel has ended; default
    /// 5 s, then it is killed.
    pub exit_timeout: Duration,
    /// How long the stop of the reactor waits for workers to serve what they
    /// have; default 30 s. `None` leaves the pool as it is when the reactor
    /// stops: its channels are closed then.
    pub drain_timeout: Option<Duration>,
    /// The waits before dead workers are replaced; default up to 100 ms at
    /// first, doubling up to 10 s.
    pub backoff: Backoff,
    /// A worker that lived this long was a good one: the waits begin anew;
    /// default 10 s.
    pub stable_after: Duration,
    /// How many starts in a row may fail until the pool gives up: no more
    /// workers are started then, those that there are go on, and
    /// [`PoolEvent::GaveUp`] says so. One has failed where the worker could not
    /// be started or ended before it was [ready](PoolEvent::Ready). Default
    /// `None`: it tries for ever.
    pub max_failed_starts: Option<u32>,
}

bowline_reactor::setters!(PoolSettings {
    workers: usize,
    window: usize,
    ack_timeout: Duration,
    kill_timeout: Option<Duration>,
    max_attempts: u32,
    queue: usize,
    queue_timeout: Duration,
    start_timeout: Duration,
    exit_timeout: Duration,
    drain_timeout: Option<Duration>,
    backoff: Backoff,
    stable_after: Duration,
    max_failed_starts: Option<u32>,
});

impl Default for PoolSettings {
    fn default() -> Self {
        Self {
            workers: std::thread::available_parallelism().map_or(1, usize::from),
            window: 64,
            ack_timeout: Duration::from_secs(1),
            kill_timeout: Some(Duration::from_secs(10)),
            max_attempts: 10,
            queue: 1_024,
            queue_timeout: Duration::from_secs(10),
            start_timeout: Duration::from_secs(10),
            exit_timeout: Duration::from_secs(5),
            drain_timeout: Some(Duration::from_secs(30)),
            backoff: Backoff::new()
                .first(Duration::from_millis(100))
                .cap(Duration::from_secs(10)),
            stable_after: Duration::from_secs(10),
            max_failed_starts: None,
        }
    }
}

/// What a pool says of itself at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PoolStatistics {
    /// Connections that wait here for a worker with room.
    pub waiting: usize,
    /// Connections that were given to workers and not answered; also by one whose
    /// channel broke, until it is gone.
    pub in_flight: usize,
    /// Deliveries so far: connections, and those that were given out again.
    pub sent: u64,
    /// Connections that workers have taken.
    pub acknowledged: u64,
    /// Deliveries that workers have refused.
    pub refused: u64,
    /// Connections that came back from dead workers, to be given to others.
    pub resent: u64,
    /// Connections that nobody took.
    pub undelivered: u64,
    /// Workers that were started.
    pub started: u64,
    /// Workers that could not be started.
    pub not_started: u64,
    /// Workers that ended without having been asked to.
    pub deaths: u64,
    /// Times that a worker counted as hung.
    pub hangs: u64,
    /// Whether the pool's listeners are paused.
    pub is_paused: bool,
    /// Each worker, oldest first.
    pub workers: Vec<WorkerStatistics>,
}

/// What a pool says of one worker.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct WorkerStatistics {
    /// Which one.
    pub id: WorkerId,
    /// Its process.
    pub pid: u32,
    /// What it is about.
    pub stage: WorkerStage,
    /// Connections that it was given and has not answered.
    pub in_flight: usize,
    /// Connections that it had when it last said so.
    pub live: u32,
    /// Connections that it has taken so far.
    pub acknowledged: u64,
    /// Deliveries that it has refused so far.
    pub refused: u64,
}

/// What a worker is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum WorkerStage {
    /// It was started, and has not said hello.
    Starting,
    /// It takes connections.
    Serving,
    /// It takes none until it answers.
    Hung,
    /// It serves what it has, and ends.
    Draining,
    /// It was killed; what it was given is known when its channel ends.
    Killed,
}

/// What happens to workers, for logs and displays; see
/// [`Pool::on_event`](super::Pool::on_event).
#[derive(Debug)]
#[non_exhaustive]
pub enum PoolEvent {
    /// A worker could not be started; it is tried again after a wait. Those of
    /// [`Pool::start`](super::Pool::start) itself are told too, to a handler
    /// that is set before the reactor turns again.
    NotStarted {
        /// Which one: another number is tried next.
        worker: WorkerId,
        /// Why: the error of [`Spawn`](super::Spawn), or of watching the channel.
        error: io::Error,
        /// How many starts have failed in a row, this one included.
        failures: u32,
    },
    /// As many starts have failed as
    /// [may](PoolSettings::max_failed_starts): no worker is started any more. A
    /// program that is of no use without can [fail](bowline_reactor::Reactor::fail).
    GaveUp {
        /// How many have failed in a row.
        failures: u32,
    },
    /// A worker is there and takes connections.
    Ready {
        /// Which one.
        worker: WorkerId,
        /// Its process.
        pid: u32,
    },
    /// A worker does not answer.
    Hung {
        /// Which one.
        worker: WorkerId,
        /// Its process.
        pid: u32,
    },
    /// A hung worker answers again.
    Recovered {
        /// Which one.
        worker: WorkerId,
        /// Its process.
        pid: u32,
    },
    /// The channel of a worker has ended.
    Lost {
        /// Which one.
        worker: WorkerId,
        /// Its process.
        pid: u32,
        /// How many connections it had taken.
        acknowledged: u64,
        /// How many it had not answered, which go to others.
        unanswered: usize,
    },
    /// The process of a worker has ended.
    Exited {
        /// Which one.
        worker: WorkerId,
        /// Its process.
        pid: u32,
        /// How, if that could be told.
        status: Option<ExitStatus>,
    },
}

/// Why nobody took a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Undelivered {
    /// As many wait already as may.
    QueueFull,
    /// It has waited as long as it may.
    WaitedTooLong,
    /// Every worker has refused it; the last one for this reason.
    Refused(WorkerRefusal),
    /// It was given out as often as it may be.
    TooManyAttempts,
    /// It does not fit into a message: too much was read of it.
    TooLong,
    /// The pool has stopped.
    Stopped,
}
