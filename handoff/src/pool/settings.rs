//! The settings, statistics and events of a pool.

use std::io;
use std::process::ExitStatus;
use std::time::Duration;

use bowline_protocol::policies::Backoff;

use super::{WorkerId, WorkerRefusal};

/// The settings of a pool. Start with [`PoolSettings::default`] and change it by its
/// methods.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct PoolSettings {
    /// The number of workers. By default it is the number of threads that the machine
    /// runs at a time.
    pub workers: usize,
    /// Who accepts. The default is [`Accepting::ByPool`].
    pub accepting: Accepting,
    /// The most connections that a worker may have without having answered. The
    /// default is 64.
    pub window: usize,
    /// How long a worker may leave a connection unanswered before it gets no more, until it
    /// answers. The default is 50 ms. A connection counts once it has left this process.
    /// What the kernel keeps back, since the user has as many descriptors in flight as may
    /// be, is not held against the worker.
    pub slow_after: Duration,
    /// How long a worker that has connections to answer may say nothing. After that it
    /// counts as hung. The default is 500 ms.
    pub ack_timeout: Duration,
    /// Whether a hung worker is recalled: what it has not answered goes to others at once,
    /// and another worker takes its place. It serves what it had taken, for the
    /// [time of a drain](Self::drain_timeout), and ends. The default is `true`. With
    /// `false` its connections wait with it, until it answers or is killed.
    pub recalls: bool,
    /// How long a worker may leave a connection unanswered before it is killed: one that
    /// is not recalled, or whose channel is full. The default is 10 s; `None` means for
    /// ever.
    pub kill_timeout: Option<Duration>,
    /// How often a connection is given out at the most. Refusals and deaths of workers
    /// count. The default is 10.
    pub max_attempts: u32,
    /// The most connections that may wait in the pool when no worker can take them.
    /// The default is 1,024.
    pub queue: usize,
    /// How long a connection may wait in the pool. The default is 10 s.
    pub queue_timeout: Duration,
    /// How long a worker may take from its start to its hello. The default is 10 s.
    pub start_timeout: Duration,
    /// How long a worker may take to exit once its channel has ended. It is killed
    /// after that. The default is 5 s.
    pub exit_timeout: Duration,
    /// How long the reactor's stop waits for workers to serve their connections. The
    /// default is 30 s. `None` has the stop wait for none, and the channels are closed.
    pub drain_timeout: Option<Duration>,
    /// The waits before a worker is replaced that died young, and whose predecessor in its
    /// place died young too. Every other death is replaced at once. By default the first
    /// wait is up to 10 ms, and they double up to 10 s. Each place in the pool has waits
    /// of its own.
    pub backoff: Backoff,
    /// How long a worker has to live not to have died young. The default is 500 ms.
    pub stable_after: Duration,
    /// How many starts in a row may fail before the pool gives up. A start has failed
    /// if the worker could not be started, or ended before it was
    /// [ready](PoolEvent::Ready). A pool that has given up starts no more workers and
    /// tells [`PoolEvent::GaveUp`]; its other workers go on. The default is `None`: the
    /// pool tries for ever.
    pub max_failed_starts: Option<u32>,
}

bowline_reactor::setters!(PoolSettings {
    workers: usize,
    accepting: Accepting,
    window: usize,
    slow_after: Duration,
    ack_timeout: Duration,
    recalls: bool,
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
            accepting: Accepting::ByPool,
            window: 64,
            slow_after: Duration::from_millis(50),
            ack_timeout: Duration::from_millis(500),
            recalls: true,
            kill_timeout: Some(Duration::from_secs(10)),
            max_attempts: 10,
            queue: 1_024,
            queue_timeout: Duration::from_secs(10),
            start_timeout: Duration::from_secs(10),
            exit_timeout: Duration::from_secs(5),
            drain_timeout: Some(Duration::from_secs(30)),
            backoff: Backoff::new()
                .first(Duration::from_millis(10))
                .cap(Duration::from_secs(10)),
            stable_after: Duration::from_millis(500),
            max_failed_starts: None,
        }
    }
}

/// Who accepts the connections of a pool's listeners.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Accepting {
    /// The pool accepts, a [policy](super::PoolPolicy) chooses a worker, and the
    /// connection is passed to it. For every kind of listener.
    #[default]
    ByPool,
    /// Each worker accepts by itself, and no connection is passed. TCP only: any other
    /// listener is refused with `Unsupported`. See
    /// [the module](super#workers-that-accept-by-themselves).
    ByWorkers,
}

/// The state of a pool at one moment, and its counters.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PoolStatistics {
    /// Connections that wait in the pool for a worker with room.
    pub waiting: usize,
    /// Connections that workers were given and have not answered. If the channel of a
    /// worker breaks, its connections count until it is gone.
    pub in_flight: usize,
    /// Deliveries so far. A connection that is given out again counts again.
    pub sent: u64,
    /// Connections that workers have taken. Those that they have accepted by themselves
    /// are counted as they say so, 20 ms later at the most.
    pub acknowledged: u64,
    /// Connections that the pool has accepted from the queue of a worker, since it was
    /// slow, full or gone.
    pub rescued: u64,
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
    /// How often a worker has begun to count as hung.
    pub hangs: u64,
    /// How many workers were recalled.
    pub recalls: u64,
    /// Whether the pool's listeners are paused.
    pub is_paused: bool,
    /// Each worker, oldest first.
    pub workers: Vec<WorkerStatistics>,
}

/// The state of one worker of a pool, and its counters.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct WorkerStatistics {
    /// The worker.
    pub id: WorkerId,
    /// Its process.
    pub pid: u32,
    /// The stage of its life.
    pub stage: WorkerStage,
    /// Connections that it was given and has not answered.
    pub in_flight: usize,
    /// How many connections it last said that it has.
    pub live: u32,
    /// Connections that it has taken so far.
    pub acknowledged: u64,
    /// Deliveries that it has refused so far.
    pub refused: u64,
}

/// The stage of a worker's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum WorkerStage {
    /// It was started, and has not said hello.
    Starting,
    /// It takes connections.
    Serving,
    /// It gets no connections until it answers.
    Hung,
    /// It was recalled, and its last answers are being read.
    Recalled,
    /// It serves the connections that it has, and ends.
    Draining,
    /// It was killed. The end of its channel tells what it has taken.
    Killed,
}

impl WorkerStage {
    /// One word.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Serving => "serving",
            Self::Hung => "hung",
            Self::Recalled => "recalled",
            Self::Draining => "draining",
            Self::Killed => "killed",
        }
    }
}

/// Something that happened to a worker, for logs and displays; see
/// [`Pool::on_event`](super::Pool::on_event).
#[derive(Debug)]
#[non_exhaustive]
pub enum PoolEvent {
    /// A worker could not be started. The pool tries again after a wait, under another
    /// number. A failure in [`Pool::start`](super::Pool::start) itself is told too, to
    /// a handler that is set before the reactor turns again.
    NotStarted {
        /// The worker.
        worker: WorkerId,
        /// The error of [`Spawn`](super::Spawn), or of watching the channel.
        error: io::Error,
        /// How many starts have failed in a row, this one included.
        failures: u32,
    },
    /// As many starts have failed as
    /// [may](PoolSettings::max_failed_starts). No worker is started any more. A
    /// program that needs its workers can [fail](bowline_reactor::Reactor::fail).
    GaveUp {
        /// How many starts have failed in a row.
        failures: u32,
    },
    /// A listener cannot be shared out among the workers
    /// ([`Accepting::ByWorkers`]), or not among all. The pool accepts instead, and passes
    /// connections.
    NotShared {
        /// The label of the [acceptor](super::Pool::acceptor).
        label: u32,
        /// What the kernel has refused.
        error: io::Error,
    },
    /// A worker is there and takes connections.
    Ready {
        /// The worker.
        worker: WorkerId,
        /// Its process.
        pid: u32,
    },
    /// A worker does not answer.
    Hung {
        /// The worker.
        worker: WorkerId,
        /// Its process.
        pid: u32,
    },
    /// A hung worker answers again.
    Recovered {
        /// The worker.
        worker: WorkerId,
        /// Its process.
        pid: u32,
    },
    /// A hung worker was recalled. Its channel ends now, which is told as
    /// [`Lost`](Self::Lost).
    Recalled {
        /// The worker.
        worker: WorkerId,
        /// Its process.
        pid: u32,
    },
    /// The channel of a worker has ended.
    Lost {
        /// The worker.
        worker: WorkerId,
        /// Its process.
        pid: u32,
        /// How many connections it had taken, as far as it has said. One that accepts by
        /// itself says so every 20 ms: it may have taken more.
        acknowledged: u64,
        /// How many connections it had not answered. They go to others.
        unanswered: usize,
    },
    /// The process of a worker has ended.
    Exited {
        /// The worker.
        worker: WorkerId,
        /// Its process.
        pid: u32,
        /// How it ended, if the system told.
        status: Option<ExitStatus>,
    },
}

impl PoolEvent {
    /// The worker that it is about.
    pub(super) fn worker(&self) -> Option<WorkerId> {
        match self {
            Self::GaveUp { .. } | Self::NotShared { .. } => None,
            Self::NotStarted { worker, .. }
            | Self::Ready { worker, .. }
            | Self::Hung { worker, .. }
            | Self::Recovered { worker, .. }
            | Self::Recalled { worker, .. }
            | Self::Lost { worker, .. }
            | Self::Exited { worker, .. } => Some(*worker),
        }
    }
}

/// Why nobody took a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Undelivered {
    /// The pool's queue was full.
    QueueFull,
    /// It has waited for as long as it may.
    WaitedTooLong,
    /// Every worker has refused it. The last one gave this reason.
    Refused(WorkerRefusal),
    /// It was given out as often as it may be.
    TooManyAttempts,
    /// It does not fit into a message, since too much was read of it.
    TooLong,
    /// The pool has stopped.
    Stopped,
}
