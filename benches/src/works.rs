//! The works, what each measures, and the rounds.

use std::io;
use std::process::Command;
use std::time::Duration;

use crate::child::{self, ServerProcess};
use crate::external;
use crate::load::{self, Beside, Echo, Echoing, Outcome};
use crate::messages;
use crate::peers::messages as servers;
use crate::peers::{Family, Job, Peer, Task, passing};
use crate::report::{Measure, Table};
use crate::sys;
use crate::timers::Timed;

const SMALL: usize = 64;
const LARGE: usize = 16 * 1024;
const CHURNING: usize = 16;
/// Connections that exist before idle ones are counted: what a server keeps
/// for all of them is there then.
const BEFORE_IDLE: usize = 64;

/// How long and how often.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Effort {
    pub(crate) rounds: usize,
    pub(crate) warm_up: Duration,
    pub(crate) span: Duration,
    pub(crate) bulk_bytes: usize,
    pub(crate) descriptors: usize,
    pub(crate) timers: usize,
    pub(crate) idle: usize,
    pub(crate) children: usize,
    /// Messages of the run that counts instructions, for each connection.
    pub(crate) counted: usize,
}

impl Effort {
    pub(crate) const FULL: Self = Self {
        rounds: 7,
        warm_up: Duration::from_millis(100),
        span: Duration::from_millis(600),
        bulk_bytes: 1 << 30,
        descriptors: 64 * 1600,
        timers: 100_000,
        idle: 10_000,
        children: 600,
        counted: 200,
    };

    pub(crate) const QUICK: Self = Self {
        rounds: 2,
        warm_up: Duration::from_millis(20),
        span: Duration::from_millis(80),
        bulk_bytes: 1 << 26,
        descriptors: 64 * 100,
        timers: 10_000,
        idle: 1_000,
        children: 60,
        counted: 40,
    };
}

impl Effort {
    /// As much as a peer can do in a reasonable time; what is measured is per
    /// operation.
    fn of(self, peer: Peer) -> Self {
        match peer {
            Peer::Twisted => Self {
                bulk_bytes: self.bulk_bytes / 4,
                descriptors: self.descriptors / 4,
                timers: self.timers / 10,
                children: self.children / 4,
                ..self
            },
            _ => self,
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Echo(Echo),
    Churn,
    Idle,
    BulkIn,
    BulkOut,
    DescriptorsIn(usize),
    DescriptorsOut,
    /// From one process of a peer to another.
    BothSides,
    /// Accepted here, answered there, one after the other.
    Pass,
    Fair(Beside),
    Timed(Timed),
    /// Datagrams to the server, one by one or many as one that the kernel cuts.
    DatagramsIn {
        cut: bool,
    },
    DatagramsOut,
    PipeIn,
    PipeOut,
    /// Children, started and reaped.
    Spawn,
    /// The time to schedule and cancel with so many waiting.
    Pending(usize),
    Instructions,
}

/// One row or more of the table.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Work {
    pub(crate) name: &'static str,
    kind: Kind,
    job: Job,
}

const fn echo(connections: usize, message: usize) -> Kind {
    Kind::Echo(Echo {
        connections,
        message,
        times: 1,
        beside: Beside::Nobody,
    })
}

const TEN_WRITES: Kind = Kind::Echo(Echo {
    connections: 64,
    message: SMALL,
    times: 10,
    beside: Beside::Nobody,
});

const fn work(name: &'static str, kind: Kind, task: Task, family: Family, message: usize) -> Work {
    let job = Job {
        task,
        family,
        message,
    };
    Work { name, kind, job }
}

/// All works, in the order of the table.
pub(crate) fn all() -> Vec<Work> {
    use Family::{Packets, Pipe, Tcp, Udp, Unix};
    vec![
        work(
            "instructions per echo, TCP",
            Kind::Instructions,
            Task::Echo,
            Tcp,
            SMALL,
        ),
        work(
            "instructions per echo, UNIX",
            Kind::Instructions,
            Task::Echo,
            Unix,
            SMALL,
        ),
        work(
            "instructions per echo, UNIX with the mixin",
            Kind::Instructions,
            Task::EchoMixin,
            Unix,
            SMALL,
        ),
        work("echo 64 B x 1, TCP", echo(1, SMALL), Task::Echo, Tcp, SMALL),
        work(
            "echo 64 B x 64, TCP",
            echo(64, SMALL),
            Task::Echo,
            Tcp,
            SMALL,
        ),
        work(
            "echo 64 B x 1,000, TCP",
            echo(1_000, SMALL),
            Task::Echo,
            Tcp,
            SMALL,
        ),
        work(
            "echo 64 B x 10,000, TCP",
            echo(10_000, SMALL),
            Task::Echo,
            Tcp,
            SMALL,
        ),
        work(
            "echo 64 B x 64, UNIX",
            echo(64, SMALL),
            Task::Echo,
            Unix,
            SMALL,
        ),
        work(
            "echo 64 B x 64, UNIX with the mixin",
            echo(64, SMALL),
            Task::EchoMixin,
            Unix,
            SMALL,
        ),
        work(
            "echo 16 KiB x 64, TCP",
            echo(64, LARGE),
            Task::Echo,
            Tcp,
            LARGE,
        ),
        work(
            "echo 16 KiB x 64, UNIX",
            echo(64, LARGE),
            Task::Echo,
            Unix,
            LARGE,
        ),
        work(
            "ten small writes x 64, TCP",
            TEN_WRITES,
            Task::Ten,
            Tcp,
            SMALL,
        ),
        work(
            "ten small writes x 64, UNIX",
            TEN_WRITES,
            Task::Ten,
            Unix,
            SMALL,
        ),
        work("churn, TCP", Kind::Churn, Task::Echo, Tcp, SMALL),
        work("churn, UNIX", Kind::Churn, Task::Echo, Unix, SMALL),
        work("idle connection, TCP", Kind::Idle, Task::Echo, Tcp, SMALL),
        work("idle connection, UNIX", Kind::Idle, Task::Echo, Unix, SMALL),
        work("bulk in, TCP", Kind::BulkIn, Task::Sink, Tcp, LARGE),
        work("bulk in, UNIX", Kind::BulkIn, Task::Sink, Unix, LARGE),
        work("bulk out, TCP", Kind::BulkOut, Task::Source, Tcp, LARGE),
        work("bulk out, UNIX", Kind::BulkOut, Task::Source, Unix, LARGE),
        work(
            "descriptors in, 1 per message",
            Kind::DescriptorsIn(1),
            Task::ReceiveDescriptors,
            Unix,
            SMALL,
        ),
        work(
            "descriptors in, 64 per message",
            Kind::DescriptorsIn(64),
            Task::ReceiveDescriptors,
            Unix,
            SMALL,
        ),
        work(
            "descriptors in, 1, trusted peer",
            Kind::DescriptorsIn(1),
            Task::ReceiveTrusted,
            Unix,
            SMALL,
        ),
        work(
            "descriptors in, 64, trusted peer",
            Kind::DescriptorsIn(64),
            Task::ReceiveTrusted,
            Unix,
            SMALL,
        ),
        work(
            "descriptors out",
            Kind::DescriptorsOut,
            Task::SendDescriptors,
            Unix,
            SMALL,
        ),
        work(
            "descriptors, both sides the peer's",
            Kind::BothSides,
            Task::SendDescriptors,
            Unix,
            SMALL,
        ),
        work(
            "accept, pass, answer, serial",
            Kind::Pass,
            Task::Pass,
            Tcp,
            SMALL,
        ),
        work(
            "instructions per echo, UDP",
            Kind::Instructions,
            Task::Echo,
            Udp,
            SMALL,
        ),
        work(
            "instructions per echo, seqpacket",
            Kind::Instructions,
            Task::Echo,
            Packets,
            SMALL,
        ),
        work(
            "echo 64 B x 64, UDP",
            echo(64, SMALL),
            Task::Echo,
            Udp,
            SMALL,
        ),
        work(
            "UDP in, 1,200 B",
            Kind::DatagramsIn { cut: false },
            Task::Sink,
            Udp,
            servers::DATAGRAM,
        ),
        work(
            "UDP in, 1,200 B, sent as one",
            Kind::DatagramsIn { cut: true },
            Task::SinkMerged,
            Udp,
            servers::DATAGRAM,
        ),
        work(
            "UDP out, 1,200 B",
            Kind::DatagramsOut,
            Task::Source,
            Udp,
            servers::DATAGRAM,
        ),
        work(
            "echo 64 B x 64, seqpacket",
            echo(64, SMALL),
            Task::Echo,
            Packets,
            SMALL,
        ),
        work("pipe in", Kind::PipeIn, Task::Sink, Pipe, LARGE),
        work("pipe out", Kind::PipeOut, Task::Source, Pipe, LARGE),
        work("spawn and reap /bin/true", Kind::Spawn, Task::Echo, Pipe, 0),
        work(
            "timers: schedule and fire",
            Kind::Timed(Timed::Fire),
            Task::Echo,
            Unix,
            0,
        ),
        work(
            "timers: schedule and cancel",
            Kind::Timed(Timed::Cancel),
            Task::Echo,
            Unix,
            0,
        ),
        work(
            "timers: reset",
            Kind::Timed(Timed::Reset),
            Task::Echo,
            Unix,
            0,
        ),
        work(
            "timers: lateness of 1,000",
            Kind::Timed(Timed::Lateness),
            Task::Echo,
            Unix,
            0,
        ),
        work(
            "timers: one more, 1,000 pending",
            Kind::Pending(1_000),
            Task::Echo,
            Unix,
            0,
        ),
        work(
            "timers: one more, 1,000,000 pending",
            Kind::Pending(1_000_000),
            Task::Echo,
            Unix,
            0,
        ),
        work(
            "63 honest connections alone",
            Kind::Fair(Beside::Nobody),
            Task::Echo,
            Unix,
            SMALL,
        ),
        work(
            "63 honest beside a greedy peer",
            Kind::Fair(Beside::Greedy),
            Task::Echo,
            Unix,
            SMALL,
        ),
        work(
            "63 honest beside an accept flood",
            Kind::Fair(Beside::AcceptFlood),
            Task::Echo,
            Unix,
            SMALL,
        ),
    ]
}

/// Runs one work for all peers, round by round, into the table. What fails is
/// said and leaves a gap there.
pub(crate) fn run(work: &Work, peers: &[Peer], effort: Effort, table: &mut Table) {
    let rounds = match work.kind {
        // The same in every run.
        Kind::Instructions | Kind::Idle => 1,
        _ => effort.rounds,
    };
    for _ in 0..rounds {
        for &peer in peers {
            if !takes_part(peer, work) {
                continue;
            }
            match once(work, peer, effort.of(peer)) {
                Ok(values) => {
                    for (measure, value) in values {
                        table.add(work.name, measure, peer, value);
                    }
                }
                Err(error) => eprintln!("{}, {}: {error}", work.name, peer.name()),
            }
        }
    }
}

/// Whether a peer can do a work at all.
fn takes_part(peer: Peer, work: &Work) -> bool {
    let is_elsewhere = matches!(peer, Peer::Libuv | Peer::Twisted);
    if !work.job.family.is_stream() {
        let is_counted = matches!(work.kind, Kind::Instructions);
        return servers::can(peer, work.job.family) && !(is_counted && is_elsewhere);
    }
    if matches!(work.kind, Kind::BothSides | Kind::Pass) {
        return passing::can(peer);
    }
    let passes = matches!(work.kind, Kind::DescriptorsIn(_) | Kind::DescriptorsOut);
    match peer {
        Peer::Anchovy => passes,
        Peer::Quinn => false,
        // It passes sockets, and drops what is anything else.
        Peer::Libuv => !passes,
        // The interpreter's instructions and memory are another matter.
        Peer::Twisted => !matches!(work.kind, Kind::Instructions | Kind::Idle),
        _ => true,
    }
}

fn once(work: &Work, peer: Peer, effort: Effort) -> io::Result<Vec<(Measure, f64)>> {
    match work.kind {
        Kind::Instructions => {
            return crate::drive::count_instructions(peer, work.job, effort.counted);
        }
        Kind::Timed(timed) => return time(peer, timed, effort.timers),
        Kind::Pending(count) => return time(peer, Timed::Pending, count),
        Kind::Spawn => return spawn(peer, effort.children),
        _ => {}
    }
    let mut server = ServerProcess::start(peer, work.job)?;
    let outcome = match work.kind {
        Kind::Echo(echo) => {
            let outcome =
                Echoing::connect(&server, echo)?.run(&server, effort.warm_up, effort.span)?;
            return Ok(with_latency(&outcome));
        }
        Kind::Fair(beside) => {
            let echo = Echo {
                connections: 63,
                message: SMALL,
                times: 1,
                beside,
            };
            let outcome =
                Echoing::connect(&server, echo)?.run(&server, effort.warm_up, effort.span)?;
            return Ok(vec![
                (Measure::P99, outcome.percentile(99.0) / 1e3),
                (Measure::P999, outcome.percentile(99.9) / 1e3),
            ]);
        }
        Kind::Idle => return idle(&mut server, effort.idle),
        Kind::BothSides => return both_sides(peer, &server, effort.descriptors),
        Kind::Pass => {
            // What is at work is two processes: only the time tells.
            let outcome = load::churn(&server, 1, effort.span)?;
            return Ok(vec![(Measure::Rate, outcome.rate())]);
        }
        Kind::Churn => load::churn(&server, CHURNING, effort.span)?,
        Kind::BulkIn => load::bulk_in(&server, effort.bulk_bytes)?,
        Kind::BulkOut => load::bulk_out(&server, effort.bulk_bytes)?,
        Kind::DescriptorsIn(count) => load::descriptors_in(&server, effort.descriptors, count)?,
        Kind::DescriptorsOut => load::descriptors_out(&server, effort.descriptors)?,
        Kind::DatagramsIn { cut } => messages::datagrams_in(&server, effort, cut)?,
        Kind::DatagramsOut => messages::datagrams_out(&server, effort)?,
        Kind::PipeIn => messages::pipe_in(&mut server, effort.bulk_bytes)?,
        Kind::PipeOut => messages::pipe_out(&server, effort.bulk_bytes)?,
        Kind::Instructions | Kind::Timed(_) | Kind::Pending(_) | Kind::Spawn => Outcome::default(),
    };
    Ok(vec![
        (Measure::Rate, outcome.rate()),
        (Measure::Cpu, outcome.cpu_per_operation()),
    ])
}

fn with_latency(outcome: &Outcome) -> Vec<(Measure, f64)> {
    vec![
        (Measure::Rate, outcome.rate()),
        (Measure::Cpu, outcome.cpu_per_operation()),
        (Measure::P999, outcome.percentile(99.9) / 1e3),
    ]
}

/// In a process of its own, on one CPU with its children.
fn spawn(peer: Peer, count: usize) -> io::Result<Vec<(Measure, f64)>> {
    let mut command = external::program(peer)?;
    sys::pin_child(&mut command, child::SERVER_CPU);
    command.args(["spawn", peer.name(), &count.to_string()]);
    let values = numbers(command)?;
    Ok([Measure::Rate, Measure::Cpu]
        .into_iter()
        .zip(values)
        .collect())
}

fn idle(server: &mut ServerProcess, count: usize) -> io::Result<Vec<(Measure, f64)>> {
    let some = |connections| Echo {
        connections,
        message: SMALL,
        times: 1,
        beside: Beside::Nobody,
    };
    let mut before = Echoing::connect(server, some(BEFORE_IDLE))?;
    before.once()?;
    let empty = server.allocated()?;
    let mut idle = Echoing::connect(server, some(count))?;
    // When the last one answers, all have been accepted.
    idle.one(count - 1)?;
    let fresh = server.allocated()?;
    idle.once()?;
    let used = server.allocated()?;
    let each = |now: u64| (now as f64 - empty as f64) / count as f64;
    Ok(vec![
        (Measure::Fresh, each(fresh)),
        (Measure::Used, each(used)),
    ])
}

fn both_sides(peer: Peer, server: &ServerProcess, count: usize) -> io::Result<Vec<(Measure, f64)>> {
    let path = server.path().ok_or(io::ErrorKind::InvalidInput)?;
    let mut command = external::program(peer)?;
    command.args(["fetch", peer.name()]).arg(path);
    command.arg(count.to_string());
    // Beside the server, where the generator is otherwise.
    sys::pin_child(&mut command, child::GENERATOR_CPU);
    let [arrived, seconds] = numbers(command)?[..] else {
        return Err(io::ErrorKind::InvalidData.into());
    };
    assert_eq!(arrived as usize, count, "descriptors received");
    let cpu = server.cpu_time()?.as_nanos() as f64 / count as f64;
    Ok(vec![
        (Measure::Rate, count as f64 / seconds),
        (Measure::Cpu, cpu),
    ])
}

/// The numbers that a command prints.
fn numbers(mut command: Command) -> io::Result<Vec<f64>> {
    let output = command.output()?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        return Err(io::Error::other(text.into_owned()));
    }
    let text = String::from_utf8_lossy(&output.stdout);
    let numbers = text.split_whitespace().map(|number| {
        let number: Result<f64, _> = number.parse();
        number.map_err(io::Error::other)
    });
    numbers.collect()
}

/// calloop's timers take a time that grows with how many there are.
const CALLOOP_TIMERS: usize = 10_000;

fn time(peer: Peer, timed: Timed, count: usize) -> io::Result<Vec<(Measure, f64)>> {
    let count = match (peer, timed) {
        (_, Timed::Lateness) => 1_000,
        (Peer::Calloop, _) if count > 100_000 => return Ok(Vec::new()),
        (Peer::Calloop, _) => count.min(CALLOOP_TIMERS),
        _ => count,
    };
    let mut command = external::program(peer)?;
    sys::pin_child(&mut command, child::SERVER_CPU);
    command.args(["time", peer.name(), timed.name(), &count.to_string()]);
    let values = numbers(command)?;
    let measures = match timed {
        Timed::Lateness => [Measure::MeanLate, Measure::P99Late],
        _ => [Measure::Cpu, Measure::Cpu],
    };
    Ok(measures.into_iter().zip(values).collect())
}
