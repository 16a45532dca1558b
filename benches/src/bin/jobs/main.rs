//! What a restart and a dead worker cost, with bowline and with what people run otherwise.
//!
//! ```text
//! cargo run --release -p bowline-bench --features jobs --bin jobs -- all
//!     restarts         20 restarts, with streams, idle and kept connections
//!     killed           a worker killed each second, 10 times
//!     stopped          a worker stopped for 8 s
//!     hung             a worker stopped, and killed after 3 s
//!     new-connections  a request on each: how many a second, and CPU each
//!     keep-alive       requests on 64 connections, likewise
//!     workers          by itself: new connections with 1 to 16 workers
//!     --quick          a short form
//!     --peers A,B      these only, by the words that a wrong one is answered with
//!     --write FILE     the table as Markdown
//!     --svg FILE       a picture of it
//! ```
//!
//! One generator for all, which speaks HTTP/1.1 and says of every request what became of it
//! (`load.rs`). The servers answer with the number of their process, with two workers each
//! (`servers.rs`); those in this program are in `with_bowline.rs`. A server that is not
//! installed is named, and has no column. CPU time is that of all processes of the server.

#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a program that prints"
)]

#[path = "../../sys.rs"]
#[allow(dead_code, unused_imports, reason = "the other programs use the rest")]
mod sys;

mod load;
mod report;
mod servers;
mod with_bowline;

use std::error::Error;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};
use std::{env, fs, io};

use crate::load::{Failure, Load, Plan, Tally};
use crate::report::{Measure, Table};
use crate::servers::{Peer, Server};
use crate::with_bowline::{Options, Style};

type Outcome<T = ()> = Result<T, Box<dyn Error>>;

/// Of every server that has such.
const WORKERS: usize = 2;

/// How many new connections a second come where it is counted what fails.
const ARRIVALS: u32 = 200;

fn main() -> Outcome {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match *arguments {
        ["bowline", port, workers, accepting, moves, directory] => with_bowline::serve(Options {
            port: port.parse()?,
            workers: workers.parse()?,
            style: Style::parse(accepting, moves)?,
            directory: directory.into(),
        }),
        ["bowline-worker", accepting, moves] => with_bowline::work(Style::parse(accepting, moves)?),
        ["naive", port, workers] => with_bowline::supervise(port, workers.parse()?),
        ["naive-worker", port] => with_bowline::work_alone(port.parse()?),
        _ => compare(&Order::parse(&arguments)?),
    }
}

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Job {
    Restarts,
    Killed,
    Stopped,
    Hung,
    NewConnections,
    KeepAlive,
}

impl Job {
    const ALL: [Self; 6] = [
        Self::Restarts,
        Self::Killed,
        Self::Stopped,
        Self::Hung,
        Self::NewConnections,
        Self::KeepAlive,
    ];

    fn word(self) -> &'static str {
        match self {
            Self::Restarts => "restarts",
            Self::Killed => "killed",
            Self::Stopped => "stopped",
            Self::Hung => "hung",
            Self::NewConnections => "new-connections",
            Self::KeepAlive => "keep-alive",
        }
    }

    /// Whether it kills or stops one of several.
    fn is_about_workers(self) -> bool {
        matches!(self, Self::Killed | Self::Stopped | Self::Hung)
    }
}

/// What the command line asks for.
struct Order {
    jobs: Vec<Job>,
    /// By itself: a new connection with more and more workers.
    counts_workers: bool,
    peers: Vec<Peer>,
    effort: Effort,
    write: Option<PathBuf>,
    svg: Option<PathBuf>,
}

impl Order {
    fn parse(arguments: &[&str]) -> Outcome<Self> {
        let mut order = Self {
            jobs: Vec::new(),
            counts_workers: false,
            peers: Peer::ALL.to_vec(),
            effort: Effort::FULL,
            write: None,
            svg: None,
        };
        let mut arguments = arguments.iter().copied();
        while let Some(argument) = arguments.next() {
            let mut value = || arguments.next().ok_or_else(|| format!("{argument} what?"));
            match argument {
                "all" => order.jobs = Job::ALL.to_vec(),
                "workers" => order.counts_workers = true,
                "--quick" => order.effort = Effort::QUICK,
                "--peers" => order.peers = peers(value()?)?,
                "--write" => order.write = Some(value()?.into()),
                "--svg" => order.svg = Some(value()?.into()),
                word => {
                    let job = Job::ALL.into_iter().find(|job| job.word() == word);
                    order
                        .jobs
                        .push(job.ok_or_else(|| format!("there is no job {word}"))?);
                }
            }
        }
        if order.jobs.is_empty() && !order.counts_workers {
            let words = Job::ALL.map(Job::word).join("|");
            return Err(format!(
                "usage: jobs all|workers|{words} [--quick] [--peers A,B] [--write FILE] [--svg FILE]"
            )
            .into());
        }
        Ok(order)
    }
}

fn peers(words: &str) -> Outcome<Vec<Peer>> {
    let find = |word: &str| {
        let found = Peer::ALL.into_iter().find(|peer| peer.word() == word);
        let all = Peer::ALL.map(Peer::word).join(", ");
        found.ok_or_else(|| format!("there is no {word}, only {all}").into())
    };
    words.split(',').map(find).collect()
}

/// How much is done.
#[derive(Clone, Copy, Debug)]
struct Effort {
    restarts: usize,
    /// Restarts without streams, to see when the old process is gone.
    endings: usize,
    kills: usize,
    stopped: Duration,
    span: Duration,
    rounds: usize,
}

impl Effort {
    const FULL: Self = Self {
        restarts: 20,
        endings: 5,
        kills: 10,
        stopped: Duration::from_secs(8),
        span: Duration::from_secs(3),
        rounds: 3,
    };

    const QUICK: Self = Self {
        restarts: 4,
        endings: 2,
        kills: 4,
        stopped: Duration::from_secs(2),
        span: Duration::from_millis(500),
        rounds: 1,
    };
}

fn compare(order: &Order) -> Outcome {
    sys::raise_descriptor_limit()?;
    if order.counts_workers {
        let load = report::load_average();
        let table = workers(order)?;
        println!("\n{table}");
        if let Some(path) = &order.write {
            fs::write(path, document_of_workers(&table, &load))?;
        }
        return Ok(());
    }
    let mut table = {
        let Effort {
            stopped,
            restarts,
            kills,
            ..
        } = order.effort;
        Table::new(stopped, restarts, kills)
    };
    for &peer in &order.peers {
        match peer.missing() {
            None => table.add_peer(peer),
            Some(why) => eprintln!("MISSING, AND NOT MEASURED: {}: {why}", peer.name()),
        }
    }
    for &job in &order.jobs {
        for peer in table.peers().to_vec() {
            if job.is_about_workers() && !peer.has_workers() {
                continue;
            }
            if let Err(error) = run(job, peer, order.effort, &mut table) {
                eprintln!("FAILED: {} of {}: {error}", job.word(), peer.name());
            }
        }
    }
    println!("\n{}", table.markdown());
    if let Some(path) = &order.write {
        fs::write(
            path,
            table.document(&env::args().skip(1).collect::<Vec<_>>().join(" ")),
        )?;
    }
    if let Some(path) = &order.svg {
        fs::write(path, table.picture())?;
    }
    Ok(())
}

fn run(job: Job, peer: Peer, effort: Effort, table: &mut Table) -> io::Result<()> {
    let mut server = Server::start(peer, WORKERS)?;
    match job {
        Job::Restarts => {
            restarts(&server, effort, table, peer)?;
            endings(&server, effort, table, peer)
        }
        Job::Killed => killed(&server, effort, table, peer),
        Job::Stopped => stopped(&server, effort, table, peer),
        Job::Hung => hung(&server, table, peer),
        Job::NewConnections => {
            let plan = Plan {
                fresh: 64,
                ..Plan::default()
            };
            let measures = [Measure::NewConnections, Measure::NewConnectionCpu];
            rate(&mut server, plan, effort, table, peer, measures)
        }
        Job::KeepAlive => {
            let plan = Plan {
                kept: 64,
                ..Plan::default()
            };
            let measures = [Measure::Requests, Measure::RequestCpu];
            rate(&mut server, plan, effort, table, peer, measures)
        }
    }
}

/// Puts a load on the server while `act` does something to it.
fn under_load<A>(
    port: u16,
    plan: Plan,
    act: impl FnOnce() -> io::Result<A>,
) -> io::Result<(Tally, A)> {
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let load = scope.spawn(|| Load::run(port, plan, &stop));
        let acted = act();
        stop.store(true, Ordering::Relaxed);
        let tally = load
            .join()
            .map_err(|_| io::Error::other("the load panicked"))??;
        Ok((tally, acted?))
    })
}

fn say(job: Job, peer: Peer, text: &str) {
    println!("{:16} {:24} {text}", job.word(), peer.name());
}

/// How long a restart may take until another process is there.
const TAKES_OVER_WITHIN: Duration = Duration::from_secs(20);

/// Restarts it, and waits for the next process; who was there before.
fn restart_once(server: &Server) -> io::Result<Vec<u32>> {
    let before = server.generation();
    server.restart()?;
    let began = Instant::now();
    while !server.has_followed(&before, WORKERS) {
        if began.elapsed() > TAKES_OVER_WITHIN {
            return Err(io::Error::other("nobody has taken over"));
        }
        thread::sleep(Duration::from_millis(1));
    }
    Ok(before)
}

/// What clients notice of restarts, one each second.
fn restarts(server: &Server, effort: Effort, table: &mut Table, peer: Peer) -> io::Result<()> {
    let plan = Plan {
        arrivals: ARRIVALS,
        kept: 64,
        rest: Duration::from_millis(20),
        streams: 10,
        idle: 10,
        ..Plan::default()
    };
    let (tally, ()) = under_load(server.port, plan, || {
        thread::sleep(Duration::from_millis(500));
        for _ in 0..effort.restarts {
            let began = Instant::now();
            restart_once(server)?;
            let rest = Duration::from_secs(1).saturating_sub(began.elapsed());
            thread::sleep(rest);
        }
        Ok(())
    })?;
    let ended = tally.count(Failure::EndedUnderRequest);
    let untold = tally.count(Failure::ClosedUntold);
    let late = tally.count(Failure::TimedOut);
    let (cut, idle) = (
        tally.count(Failure::StreamLost),
        tally.count(Failure::IdleLost),
    );
    let failed = tally.unanswered() - ended - late;
    table.add(Measure::RestartFailed, peer, failed as f64);
    table.add(Measure::RestartLate, peer, late as f64);
    table.add(Measure::EndedUnderRequest, peer, ended as f64);
    table.add(Measure::ClosedUntold, peer, untold as f64);
    table.add(Measure::StreamsCut, peer, cut as f64);
    table.add(Measure::IdleLost, peer, idle as f64);
    let text = format!(
        "{} restarts, {} answers, {} whole streams: {}",
        effort.restarts,
        tally.answers,
        tally.streams,
        tally.describe()
    );
    say(Job::Restarts, peer, &text);
    Ok(())
}

/// How long the old process is there, where no answer is under way that takes long.
fn endings(server: &Server, effort: Effort, table: &mut Table, peer: Peer) -> io::Result<()> {
    let plan = Plan {
        arrivals: ARRIVALS,
        kept: 64,
        rest: Duration::from_millis(20),
        idle: 10,
        ..Plan::default()
    };
    let (_, mut times) = under_load(server.port, plan, || {
        let mut times = Vec::new();
        for _ in 0..effort.endings {
            thread::sleep(Duration::from_millis(500));
            let before = restart_once(server)?;
            let began = Instant::now();
            while !Server::are_gone(&before) && began.elapsed() < TAKES_OVER_WITHIN {
                thread::sleep(Duration::from_millis(1));
            }
            times.push(began.elapsed().as_secs_f64() * 1e3);
        }
        Ok(times)
    })?;
    let middle = median(&mut times);
    table.add(Measure::GoneAfter, peer, middle);
    say(
        Job::Restarts,
        peer,
        &format!("old process gone after {middle:.0} ms"),
    );
    Ok(())
}

/// A worker killed each second.
fn killed(server: &Server, effort: Effort, table: &mut Table, peer: Peer) -> io::Result<()> {
    let plan = Plan {
        arrivals: ARRIVALS,
        kept: 32,
        rest: Duration::from_millis(20),
        ..Plan::default()
    };
    let (tally, victims) = under_load(server.port, plan, || {
        let mut victims = Vec::new();
        for round in 0..effort.kills {
            thread::sleep(Duration::from_secs(1));
            // How long they take to start, where all wait for the processor, is not what
            // is asked.
            server.settle(WORKERS);
            let workers = server.workers();
            let Some(&victim) = workers.get(round % workers.len().max(1)) else {
                continue;
            };
            sys::signal(victim.cast_signed(), sys::KILL)?;
            victims.push(victim);
        }
        thread::sleep(Duration::from_secs(1));
        Ok(victims)
    })?;
    let (mut own, mut reset, mut beyond, mut late) = (0, 0, 0, 0);
    for failed in &tally.failed {
        match (failed.by, failed.what) {
            (_, Failure::TimedOut) => late += 1,
            (Some(by), _) if victims.contains(&by) => own += 1,
            // It may have been in its hands, or in its queue: nobody can tell from outside.
            (None, Failure::ResetBefore | Failure::ResetAfter) => reset += 1,
            _ => beyond += 1,
        }
    }
    table.add(Measure::Gap, peer, tally.gap.as_secs_f64() * 1e3);
    table.add(Measure::KilledReset, peer, f64::from(reset));
    table.add(Measure::KilledBeyond, peer, f64::from(beyond));
    table.add(Measure::KilledLate, peer, f64::from(late));
    let text = format!(
        "{} killed, {} answers: gap {:.0} ms, {own} of its own, {reset} new ones reset, \
         {beyond} beyond ({})",
        victims.len(),
        tally.answers,
        tally.gap.as_secs_f64() * 1e3,
        tally.describe()
    );
    say(Job::Killed, peer, &text);
    Ok(())
}

/// A worker that stands still, and then goes on.
fn stopped(server: &Server, effort: Effort, table: &mut Table, peer: Peer) -> io::Result<()> {
    let most = u64::from(ARRIVALS) * effort.stopped.as_secs();
    let tally = disturb(server, most, effort.stopped, sys::CONTINUE)?;
    table.add(Measure::StoppedFailed, peer, tally.unanswered() as f64);
    let text = format!(
        "{most} connections, {} late: {}",
        tally.late,
        tally.describe()
    );
    say(Job::Stopped, peer, &text);
    Ok(())
}

/// How many new connections come while a worker hangs, and how long it does.
const WHILE_HUNG: u64 = 800;
const HUNG: Duration = Duration::from_secs(3);

/// A worker that stands still, until it is killed.
fn hung(server: &Server, table: &mut Table, peer: Peer) -> io::Result<()> {
    let tally = disturb(server, WHILE_HUNG, HUNG, sys::KILL)?;
    table.add(Measure::HungFailed, peer, tally.unanswered() as f64);
    let text = format!(
        "{WHILE_HUNG} connections, {} late: {}",
        tally.late,
        tally.describe()
    );
    say(Job::Hung, peer, &text);
    Ok(())
}

/// Stops a worker, and sends it another signal after some time.
fn disturb(server: &Server, most: u64, time: Duration, then: i32) -> io::Result<Tally> {
    let workers = server.workers();
    let victim = workers.first().ok_or(io::ErrorKind::NotFound)?;
    let victim = victim.cast_signed();
    sys::signal(victim, sys::STOP)?;
    let plan = Plan {
        arrivals: ARRIVALS,
        most,
        ..Plan::default()
    };
    let never = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(move || {
            thread::sleep(time);
            // Whoever starts it may have done the same before.
            let _ = sys::signal(victim, then);
        });
        Load::run(server.port, plan, &never)
    })
}

fn rate(
    server: &mut Server,
    plan: Plan,
    effort: Effort,
    table: &mut Table,
    peer: Peer,
    [rate, cpu]: [Measure; 2],
) -> io::Result<()> {
    let (middle, cost) = measured(server, plan, effort)?;
    table.add(rate, peer, middle);
    table.add(cpu, peer, cost);
    println!(
        "{:16} {:24} {middle:.0}/s, {cost:.1} us each",
        rate.name(),
        peer.name()
    );
    Ok(())
}

/// How many answers a second, and microseconds of CPU time for each.
fn measured(server: &mut Server, plan: Plan, effort: Effort) -> io::Result<(f64, f64)> {
    let (mut rates, mut costs) = (Vec::new(), Vec::new());
    for _ in 0..effort.rounds {
        let before = server.cpu_time();
        let span = || {
            thread::sleep(effort.span);
            Ok(())
        };
        let (tally, ()) = under_load(server.port, plan, span)?;
        let used = server.cpu_time() - before;
        if !tally.failed.is_empty() {
            return Err(io::Error::other(tally.describe()));
        }
        rates.push(tally.answers as f64 / tally.took.as_secs_f64());
        costs.push(used.as_secs_f64() * 1e6 / tally.answers as f64);
    }
    Ok((median(&mut rates), median(&mut costs)))
}

/// How many workers there are, one time after the other.
const MORE_AND_MORE: [usize; 5] = [1, 2, 4, 8, 16];

/// What a new connection costs with more and more workers, as a table.
fn workers(order: &Order) -> Outcome<String> {
    let peers = order.peers.iter().copied();
    let can = |peer: &Peer| peer.has_workers() && peer.missing().is_none();
    let peers: Vec<Peer> = peers.filter(can).collect();
    let plan = Plan {
        fresh: 64,
        ..Plan::default()
    };
    let mut text = String::from("| workers |");
    for peer in &peers {
        text += &format!(" {} |", peer.name());
    }
    text += &format!("\n|---|{}\n", "---|".repeat(peers.len()));
    for count in MORE_AND_MORE {
        text += &format!("| {count} |");
        for &peer in &peers {
            let mut server = Server::start(peer, count)?;
            let (rate, cost) = measured(&mut server, plan, order.effort)?;
            println!(
                "{count:2} workers {:24} {rate:.0}/s, {cost:.1} us each",
                peer.name()
            );
            text += &format!(" {:.1} k/s, {cost:.1} us |", rate / 1e3);
        }
        text.push('\n');
    }
    Ok(text)
}

/// The file that keeps it.
fn document_of_workers(table: &str, load: &str) -> String {
    let command = env::args().skip(1).collect::<Vec<_>>().join(" ");
    format!(
        "# What a new connection costs with more and more workers\n\n{}\n\nMade by `cargo run --release -p \
         bowline-bench --features jobs --bin jobs -- {command}`. 64 clients at a time, on the same {} \
         CPUs as the\nservers: a new connection with one request each; how many a second, and the CPU \
         time of all processes of the server for each.\n\n{table}",
        report::machine(load),
        thread::available_parallelism().map_or(1, usize::from),
    )
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
