//! Every call that the loop makes fails once, with every error that the kernel
//! may answer.

#![allow(
    clippy::print_stderr,
    reason = "what was tried is shown beside the figures"
)]

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use bowline::process::spawn_with_descriptors;
use bowline::testing::Random;
use bowline::{Context, Protocol, Transport, Transports};
use rustix::io::Errno;

use crate::journal;
use crate::scenarios::{self, Run, Scenario};
use crate::support::faults::{Call, Faults, with_faults};
use crate::support::figures::{Bound, Figures, is_full, scaled};
use crate::support::open_descriptors;

/// How many of the points the short form tries.
const SAMPLED: usize = 600;
/// After how many failures no more are looked for.
const MOST_FAILURES: usize = 5;
/// Replays one: `servers/Recv/3/1/104`, as a failure says.
const REPLAY: &str = "BOWLINE_FAULT";

/// A call that is to fail.
#[derive(Clone, Copy)]
struct Point {
    name: &'static str,
    scenario: Scenario,
    call: Call,
    nth: u32,
    times: u32,
    error: Errno,
}

impl Point {
    fn path(&self) -> String {
        let Self {
            name,
            call,
            nth,
            times,
            error,
            ..
        } = self;
        format!("{name}/{call:?}/{nth}/{times}/{}", error.raw_os_error())
    }
}

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord, Clone, Copy)]
enum Outcome {
    /// As if nothing had happened.
    Recovered,
    /// Something is over, and the program was told.
    CleanError,
    /// The call was not made this time.
    NotReached,
    Violated,
}

/// Reliability T-34: whichever call fails, with whatever error, the loop
/// recovers or says what is over; nothing leaks, spins or hangs.
#[test]
fn whatever_call_fails_the_loop_recovers_or_ends_cleanly() {
    with_faults(
        module_path!(),
        "whatever_call_fails_the_loop_recovers_or_ends_cleanly",
        |faults| {
            let folder = tempfile::tempdir().expect("a folder");
            watch_over_hangs();
            let points = points(faults, folder.path());
            let all = points.len();
            let chosen = choose(points);
            let mut outcomes = BTreeMap::new();
            let mut failures = Vec::new();
            let mut by_call = BTreeMap::<Call, [usize; 2]>::new();
            for point in &chosen {
                let (outcome, said) = run(faults, folder.path(), point);
                *outcomes.entry(outcome).or_insert(0_usize) += 1;
                match outcome {
                    Outcome::Recovered => by_call.entry(point.call).or_default()[0] += 1,
                    Outcome::CleanError => by_call.entry(point.call).or_default()[1] += 1,
                    Outcome::Violated => failures.push(format!("{}: {said}", point.path())),
                    Outcome::NotReached => {}
                }
                // Each may be a hang, seen at its deadline.
                if failures.len() == MOST_FAILURES {
                    break;
                }
            }
            for (call, [recovered, ended]) in by_call {
                eprintln!("{call:?}: {recovered} recovered, {ended} ended cleanly");
            }
            let of = |outcome| outcomes.get(&outcome).copied().unwrap_or(0);
            assert!(
                failures.is_empty(),
                "{} of {} points, each replayed with {REPLAY}=...:\n{}",
                failures.len(),
                chosen.len(),
                failures.join("\n")
            );
            if std::env::var_os(REPLAY).is_some() {
                Figures::of("T-34").remark(&format!("replayed: {outcomes:?}"));
                return;
            }
            let injected = of(Outcome::Recovered) + of(Outcome::CleanError);
            let least = scaled(500, 5_000);
            // About a third ends something. A loop that hides errors, or gives up
            // at any, is far from that.
            let tenth = injected / 10;
            Figures::of("T-34")
                .must("places and errors there are", all, Bound::AtLeast, 5_000)
                .must("faults injected", injected, Bound::AtLeast, least)
                .must("recovered", of(Outcome::Recovered), Bound::AtLeast, tenth)
                .must(
                    "ended cleanly",
                    of(Outcome::CleanError),
                    Bound::AtLeast,
                    tenth,
                )
                .must(
                    "crashes, leaks, spins and hangs",
                    failures.len(),
                    Bound::Exactly,
                    0,
                );
        },
    );
}

/// Reliability T-13: whatever error accepting meets, those who wait are answered
/// or closed, without anybody new who would wake the loop.
#[test]
fn clients_that_wait_are_served_after_any_error_of_accepting() {
    with_faults(
        module_path!(),
        "clients_that_wait_are_served_after_any_error_of_accepting",
        |faults| {
            const CLIENTS: usize = 20;
            let folder = tempfile::tempdir().expect("a folder");
            watch_over_hangs();
            let before = open_descriptors();
            let times = scaled(4, 2 * CLIENTS as u32);
            let errors = Call::Accept.errors();
            let (mut ends, mut closed, mut most_turns) = (0, 0, 0);
            for error in errors {
                RUNS.fetch_add(1, Ordering::Relaxed);
                let path = folder.path().join(error.raw_os_error().to_string());
                let mut reactor = bowline::Reactor::new().expect("a reactor");
                reactor
                    .listen_unix(path.clone(), |_: &bowline::Address| Greeter)
                    .expect("a new path");
                let clients: Vec<_> = (0..CLIENTS)
                    .map(|_| UnixStream::connect(&path).expect("it listens"))
                    .collect();
                faults.reset();
                // In full more often than there are clients: a whole batch meets nothing else.
                faults.fail(Call::Accept, 0, times, *error);
                faults.arm();
                let ended = clients.iter().map(|mut client| {
                    client.set_nonblocking(true).expect("a socket");
                    loop {
                        match client.read(&mut [0]) {
                            Ok(count) => break count,
                            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                            // Closed before what it sent was read.
                            Err(_) => break 0,
                        }
                        reactor.turn(Some(Duration::from_millis(100)));
                    }
                });
                let greeted: usize = ended.sum();
                faults.disarm();
                assert_eq!(faults.fired(), times, "{error}");
                ends += CLIENTS;
                closed += CLIENTS - greeted;
                most_turns = most_turns.max(reactor.statistics().turns as usize);
            }
            assert_eq!(open_descriptors(), before);
            Figures::of("T-13")
                .must(
                    "errors of accept injected",
                    errors.len(),
                    Bound::AtLeast,
                    11,
                )
                .must(
                    "then answered or closed",
                    ends,
                    Bound::Exactly,
                    CLIENTS * errors.len(),
                )
                .must("closed of them", closed, Bound::AtMost, 4 * CLIENTS)
                .must("turns for one error", most_turns, Bound::AtMost, 500);
        },
    );
}

/// Contract X-20: what was made for a child that could not be started is closed, what
/// the caller granted to it is the caller's still.
#[test]
fn child_that_cannot_be_started_leaves_open_what_it_was_granted_and_nothing_else() {
    with_faults(
        module_path!(),
        "child_that_cannot_be_started_leaves_open_what_it_was_granted_and_nothing_else",
        |faults| {
            let (mut one, mut other) = crate::support::socketpair();
            let before = open_descriptors();
            for call in [Call::Pipe, Call::Fork] {
                for error in call.errors() {
                    let mut command = Command::new("true");
                    // Each has a pipe of its own, made before the process.
                    command
                        .stdin(Stdio::piped())
                        .stdout(Stdio::piped())
                        .stderr(Stdio::piped())
                        .env_remove("LD_PRELOAD");
                    faults.reset();
                    // The last of the three: two are there by then.
                    let nth = if call == Call::Pipe { 2 } else { 0 };
                    faults.fail(call, nth, 1, *error);
                    let granted = [(one.as_fd(), 3), (other.as_fd(), 9)];
                    let spawned = faults.during(|| spawn_with_descriptors(command, &granted));
                    assert_eq!(faults.fired(), 1, "{call:?}: {error}");
                    let failed = spawned.expect_err("it cannot").raw_os_error();
                    assert_eq!(failed, Some(error.raw_os_error()), "{call:?}");
                    assert_eq!(open_descriptors(), before, "{call:?}: {error}");
                    one.write_all(b"x").expect("open");
                    other.read_exact(&mut [0]).expect("open");
                }
            }
        },
    );
}

/// Says something to everybody.
struct Greeter;

impl Protocol<bowline::UnixStream> for Greeter {
    fn connection_made(&mut self, cx: &mut Context<'_, bowline::UnixStream>) {
        cx.transport.write(b"!");
    }

    fn data_received(&mut self, _: &mut Context<'_, bowline::UnixStream>, _: &[u8]) {}
}

/// A poller that is broken for good, by a program that closed a descriptor that
/// it did not own, say.
#[test]
fn loop_that_cannot_poll_runs_its_timers_and_does_not_spin() {
    with_faults(
        module_path!(),
        "loop_that_cannot_poll_runs_its_timers_and_does_not_spin",
        |faults| {
            let mut reactor = bowline::Reactor::new().unwrap();
            let due = std::rc::Rc::new(std::cell::Cell::new(false));
            let called = std::rc::Rc::clone(&due);
            reactor.call_later(Duration::from_millis(500), move |_| called.set(true));
            faults.fail(Call::EpollWait, 0, u32::MAX, Errno::BADF);
            faults.arm();
            while !due.get() {
                reactor.turn(None);
            }
            faults.disarm();
            assert!(faults.fired() > 0);
            let turns = reactor.statistics().turns;
            assert!(turns <= 500, "{turns} turns in half a second");
        },
    );
}

/// The pipe only wakes the loop: what signal it was is known without.
#[test]
fn signal_is_handled_although_its_pipe_cannot_be_read() {
    with_faults(
        module_path!(),
        "signal_is_handled_although_its_pipe_cannot_be_read",
        |faults| {
            let mut reactor = bowline::Reactor::new().unwrap();
            reactor.stop_on_signals().unwrap();
            faults.fail(Call::Recv, 0, 1, Errno::TIMEDOUT);
            reactor.call_soon(|_| {
                let me = rustix::process::getpid();
                rustix::process::kill_process(me, rustix::process::Signal::TERM).unwrap();
            });
            watch_over_hangs();
            faults.during(|| reactor.run()).unwrap();
            assert_eq!(faults.fired(), 1);
        },
    );
}

/// All points: what each scenario calls when nothing fails, times the errors.
fn points(faults: &Faults, folder: &std::path::Path) -> Vec<Point> {
    let mut points = Vec::new();
    for (name, scenario) in scenarios::ALL {
        // The first run sets up what stays, a logger say.
        for _ in 0..2 {
            faults.reset();
            journal::start();
            let run = scenario(faults, folder);
            assert!(
                run.is_complete && run.violations.is_empty(),
                "{name} without a fault: {run:?}, {:?}",
                journal::lines()
            );
        }
        for call in Call::ALL {
            // std talks to itself there, and panics when it cannot.
            if matches!(name, "children" | "workers") && matches!(call, Call::Recv | Call::Send) {
                continue;
            }
            for nth in 0..faults.count(call) {
                for &error in call.errors() {
                    for times in [1, 4] {
                        points.push(Point {
                            name,
                            scenario,
                            call,
                            nth,
                            times,
                            error,
                        });
                    }
                }
            }
        }
    }
    points
}

fn choose(mut points: Vec<Point>) -> Vec<Point> {
    if let Ok(path) = std::env::var(REPLAY) {
        points.retain(|point| point.path() == path);
        assert!(!points.is_empty(), "no such point");
        return points;
    }
    if is_full() {
        return points;
    }
    let mut random = Random::new(34);
    // Each call with each error at least once, then any.
    let mut chosen = Vec::new();
    let mut seen = std::collections::BTreeSet::new();
    for index in (1..points.len()).rev() {
        points.swap(index, random.below(index + 1));
    }
    points.retain(|point| {
        let is_new = seen.insert((point.name, point.call, point.error.raw_os_error()));
        if is_new && chosen.len() < SAMPLED {
            chosen.push(*point);
        }
        !is_new
    });
    let left = SAMPLED.saturating_sub(chosen.len());
    chosen.extend(points.into_iter().take(left));
    chosen
}

/// Counts runs, so that a hang inside of one is noticed.
static RUNS: AtomicU64 = AtomicU64::new(0);

/// Ends the process when a run does not come back at all.
fn watch_over_hangs() {
    thread::spawn(|| {
        let mut before = u64::MAX;
        loop {
            thread::sleep(Duration::from_secs(60));
            let now = RUNS.load(Ordering::Relaxed);
            if now == before {
                eprintln!("a call does not return");
                std::process::abort();
            }
            before = now;
        }
    });
}

fn run(faults: &Faults, folder: &std::path::Path, point: &Point) -> (Outcome, String) {
    RUNS.fetch_add(1, Ordering::Relaxed);
    let before = open_descriptors();
    journal::start();
    faults.reset();
    faults.fail(point.call, point.nth, point.times, point.error);
    let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        (point.scenario)(faults, folder)
    }));
    faults.disarm();
    let fired = faults.fired();
    let Run {
        is_complete,
        mut violations,
    } = caught.unwrap_or_else(|_| Run {
        is_complete: false,
        violations: vec!["a panic".into()],
    });
    let after = open_descriptors();
    if after != before {
        violations.push(format!("leaked {:?}", after.difference(&before)));
    }
    let said = journal::lines();
    if !is_complete && said.is_empty() {
        violations.push("nothing was said".into());
    }
    if violations.is_empty() {
        let outcome = match (fired, is_complete) {
            (0, _) => Outcome::NotReached,
            (_, true) => Outcome::Recovered,
            (_, false) => Outcome::CleanError,
        };
        (outcome, String::new())
    } else {
        (
            Outcome::Violated,
            format!("{}; said {said:?}", violations.join("; ")),
        )
    }
}
