//! Children by the thousand, of which some are killed before they have begun.

use std::cell::{Cell, RefCell};
use std::collections::HashSet;
use std::fs;
use std::os::fd::AsFd;
use std::process::Command;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use bowline::process::{
    ChildCommand, ProcessContext, ProcessHandle, ProcessProtocol, ProcessSettings, ProcessStatus,
    TerminalSize,
};
use bowline::testing::Random;
use bowline::{CloseReason, Context, Protocol, Reactor, Transports, UnixStream};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitOptions, pidfd_open, pidfd_send_signal, waitpid,
};

use crate::peer::file;
use crate::support::figures::{Bound, Figures, scaled};
use crate::support::own_process::in_own_process;
use crate::support::{DEADLINE, eventually, open_descriptors, run_until_within};

/// How long a round may take on a busy machine.
const LONG: Duration = Duration::from_secs(60);

/// Children of one reactor, and how many of them there are at a time.
const ROUND: usize = 50;
const AT_ONCE: usize = 20;

/// How many are to have died before they ran their program.
const LEAST_UNBEGUN: usize = 3;

/// What was told of all children.
#[derive(Default)]
struct Told {
    exited: Cell<usize>,
    ended: Cell<usize>,
    by_signal: Cell<usize>,
    /// What was told out of order, or twice, or not.
    complaints: RefCell<Vec<String>>,
}

/// What becomes of a child.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// It ends by itself, or because of its settings.
    Own,
    ClosedInput,
    Killed,
    /// Nobody reads what it writes without end.
    KilledWhilePaused,
    /// It is there until the round ends.
    Stays,
}

/// Holds what it is told of one child to the order that is promised.
struct Witness {
    told: Rc<Told>,
    fate: Fate,
    /// Numbers of streams that are not lost yet.
    open: Vec<u32>,
    was_made: bool,
    exits: usize,
    has_ended: bool,
}

impl Witness {
    fn check(&self, is_so: bool, complaint: &str) {
        if !is_so {
            let complaint = format!("{:?}: {complaint}", self.fate);
            self.told.complaints.borrow_mut().push(complaint);
        }
    }
}

fn add(to: &Cell<usize>, count: usize) {
    to.set(to.get() + count);
}

impl ProcessProtocol for Witness {
    fn connection_made(&mut self, cx: &mut ProcessContext<'_>) {
        self.check(!self.was_made, "made twice");
        self.was_made = true;
        match self.fate {
            Fate::ClosedInput => {
                cx.write(b"to be given back");
                self.check(cx.close_stdin(), "has no input");
            }
            Fate::Killed => drop(cx.process.kill()),
            Fate::KilledWhilePaused => {
                cx.pause_producing();
                let _ = cx.process.kill();
                cx.process.give_up_streams();
            }
            Fate::Own | Fate::Stays => {}
        }
    }

    fn child_data_received(&mut self, _: &mut ProcessContext<'_>, number: u32, _: &[u8]) {
        self.check(self.was_made, "data before the beginning");
        self.check(self.open.contains(&number), "data behind the end");
    }

    fn child_connection_lost(&mut self, _: &mut ProcessContext<'_>, number: u32, _: &CloseReason) {
        self.check(self.was_made, "an end before the beginning");
        let before = self.open.len();
        self.open.retain(|it| *it != number);
        self.check(self.open.len() + 1 == before, "a stream lost twice");
    }

    fn process_exited(&mut self, _: &mut ProcessContext<'_>, status: ProcessStatus) {
        self.check(self.was_made, "exited before the beginning");
        self.exits += 1;
        self.check(self.exits == 1, "exited twice");
        add(&self.told.exited, 1);
        add(&self.told.by_signal, usize::from(status.signal().is_some()));
    }

    fn process_ended(&mut self, _: &mut ProcessContext<'_>, status: ProcessStatus) {
        self.check(!self.has_ended, "ended twice");
        self.check(self.exits == 1, "ended before it exited");
        self.check(self.open.is_empty(), "ended before its streams");
        let is_known = matches!(status, ProcessStatus::Exited(_));
        self.check(is_known, "nobody knows how it ended");
        self.has_ended = true;
        add(&self.told.ended, 1);
    }
}

/// Has a descriptor of its own; says nothing.
struct Silent;

impl Protocol<UnixStream> for Silent {
    fn data_received(&mut self, _: &mut Context<'_, UnixStream>, _: &[u8]) {}
}

/// With a fork, or without.
fn command(forks: bool, program: &str, arguments: &[&str]) -> ChildCommand<'static> {
    if !forks {
        return ChildCommand::program(program).args(arguments);
    }
    let mut command = Command::new(program);
    command.args(arguments);
    ChildCommand::new(command)
}

/// How many kinds of children [`child`] knows.
const KINDS: usize = 11;

/// A child of some kind, what becomes of it, and the numbers of its streams.
fn child<'a>(
    kind: usize,
    random: &mut Random,
    given: &'a impl AsFd,
) -> (ChildCommand<'a>, Fate, Vec<u32>) {
    let settings = ProcessSettings::default().stop_within(Some(Duration::from_millis(200)));
    let limited = settings
        .time_limit(Some(Duration::from_millis(random.below(20) as u64)))
        .grace(Duration::from_millis(random.below(10) as u64));
    let size = TerminalSize::default();
    let all = vec![0, 1, 2];
    let forks = random.chance(50);
    let command = |program: &str, arguments: &[&str]| command(forks, program, arguments);
    let (command, fate, streams) = match kind {
        0 => (command("true", &[]), Fate::Own, all),
        1 => (command("cat", &[]), Fate::ClosedInput, all),
        2 => (command("cat", &[]), Fate::Killed, all),
        3 => (command("cat", &[]).terminal(size), Fate::Own, vec![1]),
        4 => {
            let command = command("sh", &["-c", "exec cat <&3 >&3"]);
            let command = command.null(0).null(1).null(2).socket_with(3, Silent);
            // Its protocol is told, not that of the process.
            (command, Fate::Own, vec![])
        }
        5 => {
            let command = command("cat", &[]).descriptor(0, given.as_fd()).null(1);
            (command, Fate::Own, vec![2])
        }
        6 => (command("cat", &["/dev/zero"]), Fate::KilledWhilePaused, all),
        7 => (command("/not/there", &[]), Fate::Own, all),
        8 => {
            // It does not mind to be asked.
            let script = "trap '' TERM; read -r line";
            (command("sh", &["-c", script]), Fate::Own, all)
        }
        9 => (command("cat", &[]), Fate::Stays, all),
        // One that holds its output goes on when it has exited.
        _ => (command("sh", &["-c", "sleep 0.02 &"]), Fate::Own, all),
    };
    let settings = match kind {
        // It ends long before.
        0 => settings.time_limit(Some(LONG)),
        3 | 4 | 8 => limited,
        _ => settings,
    };
    (command.settings(settings), fate, streams)
}

/// What the killer has done.
#[derive(Default)]
struct Killer {
    is_done: AtomicBool,
    killed: AtomicUsize,
    /// Of those: who did not run a program yet, as far as it could be seen.
    unbegun: AtomicUsize,
}

impl Killer {
    /// Kills one of three children of `thread` as soon as it is there, until it is done.
    fn run(&self, thread: Pid) {
        let task = format!("/proc/self/task/{}", thread.as_raw_nonzero());
        let children = || fs::read_to_string(format!("{task}/children")).unwrap_or_default();
        let forked_by = fs::read_to_string(format!("{task}/comm")).expect("it has a name");
        let mut random = Random::new(42);
        let mut seen = HashSet::new();
        while !self.is_done.load(Relaxed) {
            for word in children().split_whitespace() {
                let pid = word.parse().expect("a number");
                let pid = Pid::from_raw(pid).expect("not zero");
                if !seen.insert(pid) || !random.chance(33) {
                    continue;
                }
                let Ok(process) = pidfd_open(pid, PidfdFlags::empty()) else {
                    continue;
                };
                // What is a child still was one when it was opened.
                if !children().split_whitespace().any(|it| it == word)
                    || pidfd_send_signal(&process, Signal::KILL).is_err()
                {
                    continue;
                }
                self.killed.fetch_add(1, Relaxed);
                let mut watched = [PollFd::new(&process, PollFlags::IN)];
                let limit = Timespec {
                    tv_sec: 1,
                    tv_nsec: 0,
                };
                let _ = poll(&mut watched, Some(&limit));
                // A zombie keeps its name, until somebody waits for it.
                let name = fs::read_to_string(format!("/proc/{word}/comm"));
                let is_unbegun = name.is_ok_and(|name| name == forked_by);
                self.unbegun.fetch_add(usize::from(is_unbegun), Relaxed);
            }
        }
    }
}

/// Says so when it is dropped: who waits for that goes on whatever fails.
struct Done<'a>(&'a AtomicBool);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

fn threads() -> usize {
    fs::read_dir("/proc/self/task").expect("Linux").count()
}

/// One reactor with its children.
struct Round {
    reactor: Reactor,
    told: Rc<Told>,
    /// How many were started before it.
    started_before: usize,
    /// Those that stay.
    stay: Vec<ProcessHandle>,
    started: usize,
    refused: usize,
}

impl Round {
    fn new(told: &Rc<Told>) -> Self {
        Self {
            reactor: Reactor::new().unwrap(),
            told: Rc::clone(told),
            started_before: told.ended.get(),
            stay: Vec::new(),
            started: 0,
            refused: 0,
        }
    }

    fn alive(&self) -> usize {
        self.started_before + self.started - self.told.ended.get()
    }

    fn start(&mut self, kind: usize, random: &mut Random, given: &impl AsFd) {
        let (command, fate, open) = child(kind, random, given);
        let witness = Witness {
            told: Rc::clone(&self.told),
            fate,
            open,
            was_made: false,
            exits: 0,
            has_ended: false,
        };
        match self.reactor.spawn_process(command, witness) {
            Ok(process) => {
                self.started += 1;
                if fate == Fate::Stays {
                    self.stay.push(process);
                }
            }
            Err(error) => {
                assert_eq!(error.error.kind(), std::io::ErrorKind::NotFound, "{error}");
                self.refused += 1;
            }
        }
    }

    fn turn_until(&mut self, is_done: impl Fn(&Self) -> bool) {
        let began = Instant::now();
        while !is_done(self) {
            assert!(began.elapsed() < LONG, "{} are alive", self.alive());
            self.reactor.turn(Some(Duration::from_millis(10)));
        }
    }

    /// Has those that stay end, by their input or with the reactor.
    fn end(mut self, by_stop: bool) -> (usize, usize) {
        if by_stop {
            self.reactor
                .call_later(Duration::ZERO, |reactor| reactor.stop().unwrap());
            self.reactor.run().unwrap();
        } else {
            for process in std::mem::take(&mut self.stay) {
                let stream = self.reactor.get(process).and_then(|it| it.stream(0));
                if let Some(stream) = stream.and_then(|it| self.reactor.get(it)) {
                    stream.lose_connection();
                }
            }
            self.turn_until(|it| it.alive() == 0);
            // What was told last is on its way out.
            let reactor = &mut self.reactor;
            run_until_within(LONG, reactor, &"registered", |it| it.registered() == 0);
            assert_eq!(reactor.delayed_calls().count(), 0, "timers are left");
        }
        assert_eq!(self.alive(), 0, "not told of the end of all");
        (self.started, self.refused)
    }
}

/// Reliability T-42: children of every kind start, some of them are killed at once, by
/// their protocol, by a time limit, with the reactor; and some by somebody else at any
/// moment, before they run their program too.
#[test]
fn children_that_are_killed_at_any_moment_leave_nothing() {
    let name = "children_that_are_killed_at_any_moment_leave_nothing";
    in_own_process(module_path!(), name, || {
        let rounds = scaled(4, 223);
        let told: Rc<Told> = Rc::default();
        let given = file();
        let mut random = Random::new(42);
        // A first one makes what the process keeps for itself.
        Round::new(&told).end(false);
        let (descriptors, threads_before) = (open_descriptors(), threads());
        let killer = Killer::default();
        let thread = rustix::thread::gettid();
        let (mut started, mut refused, mut round) = (0, 0, 0);
        std::thread::scope(|scope| {
            scope.spawn(|| killer.run(thread));
            let _at_the_end = Done(&killer.is_done);
            let began = Instant::now();
            // On a slow machine longer: there is to be something of everything.
            while round < rounds || killer.unbegun.load(Relaxed) < LEAST_UNBEGUN {
                assert!(
                    round < rounds || began.elapsed() < 2 * LONG,
                    "the killer is always late: {} killed",
                    killer.killed.load(Relaxed)
                );
                let mut children = Round::new(&told);
                for number in 0..ROUND {
                    children.start(number % KINDS, &mut random, &given);
                    children.turn_until(|it| it.alive() < AT_ONCE);
                }
                let ended = children.end(round % 2 == 1);
                started += ended.0;
                refused += ended.1;
                round += 1;
            }
        });
        let left = waitpid(None, WaitOptions::NOHANG);
        let zombies = usize::from(left.err() != Some(rustix::io::Errno::CHILD));
        // A thread that has ended may be listed for a moment.
        eventually(DEADLINE, || match threads() <= threads_before {
            true => Ok(()),
            false => Err("a thread is left"),
        });
        let open = open_descriptors().difference(&descriptors).count();
        let complaints = told.complaints.take();
        assert!(complaints.is_empty(), "{complaints:?}");
        Figures::of("T-42")
            .must("children", started, Bound::AtLeast, scaled(180, 10_000))
            .must("that could not begin", refused, Bound::AtLeast, 1)
            .must(
                "told of their exit",
                told.exited.get(),
                Bound::Exactly,
                started,
            )
            .must(
                "told of their end",
                told.ended.get(),
                Bound::Exactly,
                started,
            )
            .must(
                "ended by a signal",
                told.by_signal.get(),
                Bound::AtLeast,
                started / 5,
            )
            .must(
                "killed by somebody else",
                killer.killed.load(Relaxed),
                Bound::AtLeast,
                LEAST_UNBEGUN,
            )
            .must(
                "of them before they ran their program",
                killer.unbegun.load(Relaxed),
                Bound::AtLeast,
                LEAST_UNBEGUN,
            )
            .must("told out of order", complaints.len(), Bound::Exactly, 0)
            .must("zombies left", zombies, Bound::Exactly, 0)
            .must("descriptors left", open, Bound::Exactly, 0)
            .must(
                "threads left",
                threads().saturating_sub(threads_before),
                Bound::Exactly,
                0,
            );
    });
}
