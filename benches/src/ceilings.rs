//! The user-space instructions that bowline takes, its system calls and its allocations,
//! held against a file: a regression then fails by a number that no machine's mood changes.

use std::cell::Cell;
use std::fs;
use std::io;
use std::rc::Rc;
use std::time::{Duration, Instant};

#[cfg(feature = "inspect")]
use ::bowline::inspect::SlowLimits;
use ::bowline::time::{Clock, Sleep};
use ::bowline::{DelayedCall, Reactor};

use crate::drive::{Cost, collected, count_cost, count_instructions};
#[cfg(feature = "inspect")]
use crate::peers::SLOW;
use crate::peers::{Family, Job, Peer, Task};
use crate::timers::{self, Timed};

const ROUNDS: usize = 100;
const TIMERS: usize = 20_000;
/// Between two turns while timers fire: a busy loop.
const STEP: Duration = Duration::from_micros(100);

/// Counts what each line of the file names; whether all stay below, or at the most so
/// many percent above. What was counted is written to another such file, if that is wanted.
///
/// A line is a number and a name; what follows a `#` is not read.
pub(crate) fn check(path: &str, more: f64, counts: Option<&str>) -> io::Result<bool> {
    let mut is_kept = true;
    let mut all = String::new();
    println!(
        "{:>9} {:>9}  instructions per, or what else is named",
        "counted", "ceiling"
    );
    for line in fs::read_to_string(path)?.lines() {
        let line = line.split('#').next().unwrap_or_default().trim();
        let Some((ceiling, name)) = line.split_once(' ') else {
            continue;
        };
        let ceiling: f64 = ceiling.parse().map_err(io::Error::other)?;
        let ceiling = ceiling * (1.0 + more / 100.0);
        let counted = count(name.trim())?;
        let verdict = if counted > ceiling { "  TOO MANY" } else { "" };
        println!("{counted:9.2} {ceiling:9.2}  {}{verdict}", name.trim());
        is_kept &= counted <= ceiling;
        all += &format!("{counted:.6} {}\n", name.trim());
    }
    if let Some(counts) = counts {
        fs::write(counts, all)?;
    }
    Ok(is_kept)
}

fn count(name: &str) -> io::Result<f64> {
    let echo = |task, family| {
        let job = Job {
            task,
            family,
            message: 64,
        };
        let counted = count_instructions(Peer::Bowline, job, ROUNDS)?;
        io::Result::Ok(counted.first().map(|(_, count)| *count))
    };
    let cost = |family, cost| {
        let job = Job {
            task: Task::Echo,
            family,
            message: 64,
        };
        count_cost(Peer::Bowline, job, ROUNDS, cost)
    };
    let counted = match name {
        "echo, TCP" => echo(Task::Echo, Family::Tcp)?,
        "echo, UNIX" => echo(Task::Echo, Family::Unix)?,
        "echo, UDP" => echo(Task::Echo, Family::Udp)?,
        "echo, packets" => echo(Task::Echo, Family::Packets)?,
        "echo, UNIX with the mixin" => echo(Task::EchoMixin, Family::Unix)?,
        "allocations, echo, UDP" => cost(Family::Udp, Cost::Allocations)?,
        "allocations, echo, packets" => cost(Family::Packets, Cost::Allocations)?,
        "system calls, echo, UDP" => cost(Family::Udp, Cost::SystemCalls)?,
        "system calls, echo, packets" => cost(Family::Packets, Cost::SystemCalls)?,
        "timer scheduled and fired" => steady(Timed::Fire)?,
        "timer scheduled and cancelled" => steady(Timed::Cancel)?,
        "timer reset" => steady(Timed::Reset)?,
        _ => {
            let text = format!("nobody can count {name}");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
    };
    counted.ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::NotFound,
            "valgrind or strace is not installed",
        )
    })
}

fn steady(timed: Timed) -> io::Result<Option<f64>> {
    let arguments = ["steady", timed.name()].map(String::from);
    let all = collected(Peer::Bowline, "*ceilings::counted*", &arguments)?;
    Ok(all.map(|all| all as f64 / TIMERS as f64))
}

/// The process that is counted: timers on a clock that is moved by hand, once
/// for memory to be there, and once more to be counted.
pub(crate) fn drive(timed: Timed) -> io::Result<()> {
    let clock = Stepped(Rc::new(Cell::new(Instant::now())));
    let mut reactor = Reactor::with_clock(clock.clone())?;
    #[cfg(feature = "inspect")]
    reactor.set_slow_limits(SlowLimits::default().callback(SLOW));
    reactor.start().map_err(io::Error::other)?;
    let fired = Rc::new(Cell::new(0));
    work(&mut reactor, timed, &clock, &fired);
    fired.set(0);
    if timed == Timed::Reset {
        let calls = in_a_turn(&mut reactor, |reactor| schedule(reactor, &Rc::default()));
        counted(|| in_a_turn(&mut reactor, move |reactor| move_all(reactor, &calls)));
    } else {
        counted(|| work(&mut reactor, timed, &clock, &fired));
    }
    if timed == Timed::Fire {
        assert_eq!(fired.get(), TIMERS, "calls that ran");
    }
    Ok(())
}

/// callgrind knows it by its name.
#[inline(never)]
fn counted(work: impl FnOnce()) {
    work();
}

/// As a program's timers are used: from inside callbacks, where the clock is not
/// read again.
fn in_a_turn<R: 'static>(
    reactor: &mut Reactor,
    work: impl FnOnce(&mut Reactor) -> R + 'static,
) -> R {
    let result = Rc::new(Cell::new(None));
    let answer = Rc::clone(&result);
    reactor.call_soon(move |reactor| answer.set(Some(work(reactor))));
    reactor.turn(Some(Duration::ZERO));
    result.take().expect("it has run")
}

fn work(reactor: &mut Reactor, timed: Timed, clock: &Stepped, fired: &Rc<Cell<usize>>) {
    let count = Rc::clone(fired);
    if timed == Timed::Fire {
        in_a_turn(reactor, move |reactor| drop(schedule(reactor, &count)));
        while fired.get() < TIMERS {
            clock.0.set(clock.0.get() + STEP);
            reactor.turn(Some(Duration::ZERO));
        }
    } else {
        in_a_turn(reactor, move |reactor| {
            for call in schedule(reactor, &count) {
                call.cancel(reactor).expect("it waits");
            }
        });
    }
}

fn schedule(reactor: &mut Reactor, fired: &Rc<Cell<usize>>) -> Vec<DelayedCall> {
    timers::delays(TIMERS)
        .map(|delay| {
            let fired = Rc::clone(fired);
            reactor.call_later(delay, move |_| fired.set(fired.get() + 1))
        })
        .collect()
}

fn move_all(reactor: &mut Reactor, calls: &[DelayedCall]) {
    for (call, delay) in calls.iter().zip(timers::moved_delays(TIMERS)) {
        call.reset(reactor, delay).expect("it waits");
    }
}

/// A clock that is moved by hand, and never waited for.
#[derive(Clone)]
struct Stepped(Rc<Cell<Instant>>);

impl Clock for Stepped {
    fn now(&self) -> Instant {
        self.0.get()
    }

    fn before_sleep(&self, _: Option<Instant>) -> Sleep {
        Sleep::Skip
    }
}
