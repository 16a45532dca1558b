//! Children from a seed: whatever a process does with its pipes, its signals and its own
//! children, its protocol is told of the beginning first, of each stream's end once, of the
//! exit once and truly, and of the end last; and a real child is told of in the same way.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::process::Command;
use std::rc::Rc;
use std::time::Duration;

use bowline::process::{
    ChildCommand, ProcessContext, ProcessHandle, ProcessProtocol, ProcessSettings, ProcessStatus,
};
use bowline::testing::{ChildPipe, Delivery, KernelSettings, MemoryProcess, Random, Simulation};
use bowline::{CloseReason, Reactor, Transports};

use crate::seeds::{every_seed, tell};
use crate::support::{DescriptorLedger, run_until};

const SIGTERM: i32 = 15;
const SIGKILL: i32 = 9;
const SIGSTOP: i32 = 19;

/// What a process protocol was told.
#[derive(Clone, Debug, Default, PartialEq)]
struct Told {
    calls: Vec<String>,
    data: BTreeMap<u32, Vec<u8>>,
}

impl Told {
    fn count(&self, call: &str) -> usize {
        self.calls.iter().filter(|it| it.starts_with(call)).count()
    }
}

#[derive(Clone, Default)]
struct Notes(Rc<RefCell<Told>>);

impl Notes {
    fn note(&self, call: String) {
        self.0.borrow_mut().calls.push(call);
    }
}

impl ProcessProtocol for Notes {
    fn connection_made(&mut self, _: &mut ProcessContext<'_>) {
        self.note("made".into());
    }

    fn child_data_received(&mut self, _: &mut ProcessContext<'_>, number: u32, data: &[u8]) {
        let mut told = self.0.borrow_mut();
        assert_eq!(
            told.count(&format!("lost {number}")),
            0,
            "data behind its end"
        );
        told.data.entry(number).or_default().extend(data);
    }

    fn child_connection_lost(
        &mut self,
        _: &mut ProcessContext<'_>,
        number: u32,
        reason: &CloseReason,
    ) {
        self.note(format!("lost {number} {reason}"));
    }

    fn process_exited(&mut self, _: &mut ProcessContext<'_>, status: ProcessStatus) {
        self.note(format!("exited {status}"));
    }

    fn process_ended(&mut self, _: &mut ProcessContext<'_>, status: ProcessStatus) {
        self.note(format!("ended {status}"));
    }
}

/// Runs until nothing is left to do, whatever time it takes.
fn run(simulation: &mut Simulation) {
    simulation.run();
    while let Some(deadline) = simulation.next_deadline() {
        let now = bowline::time::Clock::now(simulation.clock());
        let wait = deadline.saturating_duration_since(now);
        simulation.clock().advance(wait);
        simulation.run();
    }
}

#[derive(Debug, PartialEq)]
struct Run {
    fingerprint: u64,
    told: Told,
    wrote: BTreeMap<u32, Vec<u8>>,
    has_given_up: bool,
    left_behind: usize,
}

/// One thing that one of the processes does.
fn act(
    choices: &mut Random,
    family: &mut Vec<MemoryProcess>,
    wrote: &mut BTreeMap<u32, Vec<u8>>,
    handed: &mut Vec<u8>,
) {
    let which = choices.below(family.len());
    let number = 1 + choices.below(2) as u32;
    let process = &family[which];
    match choices.below(100) {
        0..55 => {
            let data = vec![choices.below(251) as u8; 1 + choices.below(5_000)];
            if let Ok(count) = process.write(number, &data) {
                wrote.entry(number).or_default().extend(&data[..count]);
            }
        }
        55..75 => {
            if let Ok(data) = process.read(0, 1 + choices.below(10_000)) {
                handed.extend(data);
            }
        }
        75..80 => drop(process.close(choices.below(3) as u32)),
        80..86 => {
            if family.len() < 4
                && let Ok(child) = process.fork()
            {
                family.push(child);
            }
        }
        86..90 => process.trap(SIGTERM),
        90..93 => drop(process.kill(SIGSTOP)),
        93..96 => drop(process.kill([SIGTERM, SIGKILL][choices.below(2)])),
        _ => process.exit(choices.below(4) as i32),
    }
}

fn simulate(seed: u64) -> Run {
    let _ledger = DescriptorLedger::open();
    let mut choices = Random::new(seed);
    let mut simulation = Simulation::new(seed);
    let kernel = simulation.kernel().clone();
    let delivery = [Delivery::Batch, Delivery::OneAtATime, Delivery::Random];
    kernel.set_settings(
        KernelSettings::default()
            .pipe_size(4_096 << choices.below(4))
            .cut_percent(choices.below(40) as u8)
            .passing_errors_percent(choices.below(30) as u8)
            .delivery(delivery[choices.below(3)]),
    );
    let process = simulation.spawn().unwrap();
    let pipes = [
        (0, ChildPipe::Reads),
        (1, ChildPipe::Writes),
        (2, ChildPipe::Writes),
    ];
    let (running, child) = kernel.start_child(&pipes).unwrap();
    let mut limits = ProcessSettings::default().grace(Duration::from_millis(20));
    let is_limited = choices.chance(50);
    if is_limited {
        limits = limits.time_limit(Some(Duration::from_millis(50)));
    }
    let gives_up = choices.chance(40);
    if gives_up {
        limits = limits.streams_after_exit(Some(Duration::from_millis(10)));
    }
    let notes = Notes::default();
    let reactor = simulation.reactor(process).unwrap();
    let handle = reactor
        .adopt_process(running.settings(limits), notes.clone())
        .unwrap();
    let mut family = vec![child];
    let (mut wrote, mut handed, mut given) = (BTreeMap::new(), Vec::new(), Vec::new());
    for _ in 0..120 {
        act(&mut choices, &mut family, &mut wrote, &mut handed);
        if choices.chance(20) {
            feed(&mut simulation, process, handle, &mut choices, &mut given);
        }
        for _ in 0..choices.below(4) {
            simulation.turn();
        }
        if choices.chance(10) {
            simulation.advance(Duration::from_millis(choices.below(20) as u64));
        }
    }
    let left_behind = family[1..].iter().filter(|it| !it.has_exited()).count();
    for member in &family {
        drop(member.kill(SIGKILL));
    }
    run(&mut simulation);
    assert!(
        given.starts_with(&handed),
        "the child has read what nobody wrote"
    );
    let told = notes.0.borrow().clone();
    check(&told, &wrote, gives_up || is_limited);
    drop(family);
    assert_eq!((kernel.processes_left(), kernel.open_pipes()), (0, 0));
    Run {
        fingerprint: kernel.fingerprint(),
        has_given_up: told.calls.iter().any(|it| it.contains("aborted")),
        told,
        wrote,
        left_behind,
    }
}

/// Writes to the child's input.
fn feed(
    simulation: &mut Simulation,
    process: bowline::testing::ProcessId,
    handle: ProcessHandle,
    choices: &mut Random,
    given: &mut Vec<u8>,
) {
    let Some(reactor) = simulation.reactor(process) else {
        return;
    };
    let stdin = reactor.get(handle).and_then(|it| it.stream(0));
    if let Some(stdin) = stdin.and_then(|it| reactor.get(it)) {
        let data = vec![choices.below(251) as u8; 1 + choices.below(3_000)];
        if stdin.write(&data) != bowline::WriteStatus::Refused {
            given.extend(data);
        }
    }
}

/// Contract: what is told, how often, and in which order.
fn check(told: &Told, wrote: &BTreeMap<u32, Vec<u8>>, may_give_up: bool) {
    assert_eq!(
        told.calls.first().map(String::as_str),
        Some("made"),
        "{told:?}"
    );
    let last = told.calls.last().expect("there are some");
    assert!(last.starts_with("ended"), "{:?}", told.calls);
    for call in ["made", "lost 0", "lost 1", "lost 2", "exited", "ended"] {
        assert_eq!(told.count(call), 1, "{call} in {:?}", told.calls);
    }
    let exited = told.calls.iter().find_map(|it| it.strip_prefix("exited "));
    assert_eq!(last.strip_prefix("ended "), exited, "one status");
    for (number, data) in wrote {
        let got = told.data.get(number).map_or(&[][..], |it| it);
        assert!(data.starts_with(got), "other bytes under {number}");
        assert!(
            may_give_up || got.len() == data.len(),
            "{} of {} bytes under {number}",
            got.len(),
            data.len()
        );
    }
}

#[test]
fn every_child_is_told_of_in_order_and_leaves_nothing() {
    let mut statuses: BTreeMap<String, usize> = BTreeMap::new();
    let (mut given_up, mut left_behind) = (0, 0);
    let counted = every_seed((60, 10_000), simulate, |run| {
        let ended = run.told.calls.last().cloned().unwrap_or_default();
        *statuses.entry(ended).or_default() += 1;
        given_up += usize::from(run.has_given_up);
        left_behind += run.left_behind;
    });
    assert!(counted.is_none_or(|(seeds, equal)| seeds == equal));
    assert!(
        counted.is_none() || statuses.len() >= 4 && given_up > 0 && left_behind > 0,
        "{statuses:?}, {given_up}, {left_behind}"
    );
    if let Some((seeds, _)) = counted {
        tell(format_args!(
            "children: {seeds} seeds twice, equal; {statuses:?}, {given_up} given up, \
             {left_behind} left behind"
        ));
    }
}

// The same small suite over the simulated and the real kind.

/// A story: what the child does, as a script of the shell and as calls, with limits.
struct Story {
    name: &'static str,
    script: &'static str,
    plays: fn(&MemoryProcess, &mut Simulation) -> Vec<MemoryProcess>,
    limits: ProcessSettings,
}

fn stories() -> Vec<Story> {
    let none = ProcessSettings::default;
    vec![
        Story {
            name: "exits",
            script: "printf out; printf err >&2; exit 3",
            plays: |child, _| {
                child.write(1, b"out").unwrap();
                child.write(2, b"err").unwrap();
                child.exit(3);
                Vec::new()
            },
            limits: none(),
        },
        Story {
            name: "dies by a signal",
            script: "printf out; kill -9 $$",
            plays: |child, _| {
                child.write(1, b"out").unwrap();
                child.kill(SIGKILL).unwrap();
                Vec::new()
            },
            limits: none(),
        },
        Story {
            name: "closes everything long before it exits",
            script: "exec </dev/null >/dev/null 2>/dev/null; sleep 0.1; exit 1",
            plays: |child, simulation| {
                for number in 0..3 {
                    child.close(number).unwrap();
                }
                simulation.run();
                child.exit(1);
                Vec::new()
            },
            limits: none(),
        },
        Story {
            name: "hangs, and ignores SIGTERM",
            script: "trap '' TERM; printf out; while :; do sleep 1000 & wait; done",
            plays: |child, _| {
                child.trap(SIGTERM);
                child.write(1, b"out").unwrap();
                Vec::new()
            },
            limits: none()
                .time_limit(Some(Duration::from_millis(300)))
                .grace(Duration::from_millis(50)),
        },
        Story {
            name: "hangs, and dies of SIGTERM",
            script: "printf out; exec sleep 1000",
            plays: |child, _| {
                child.write(1, b"out").unwrap();
                Vec::new()
            },
            limits: none().time_limit(Some(Duration::from_millis(300))),
        },
        Story {
            name: "leaves its pipes to one that goes on",
            script: "(sleep 0.2; printf late) & printf out; exit 0",
            plays: |child, simulation| {
                let other = child.fork().unwrap();
                child.write(1, b"out").unwrap();
                child.exit(0);
                simulation.run();
                other.write(1, b"late").unwrap();
                other.exit(0);
                Vec::new()
            },
            limits: none(),
        },
        Story {
            name: "daemonizes, and is given up",
            script: "(trap '' TERM; sleep 5) & printf out; exit 0",
            plays: |child, _| {
                let daemon = child.fork().unwrap();
                // As shells have it for what runs in the background.
                daemon.close(0).unwrap();
                child.write(1, b"out").unwrap();
                child.exit(0);
                vec![daemon]
            },
            limits: none().streams_after_exit(Some(Duration::from_millis(50))),
        },
    ]
}

fn simulated(story: &Story) -> Told {
    let mut simulation = Simulation::new(5);
    let kernel = simulation.kernel().clone();
    let process = simulation.spawn().unwrap();
    let pipes = [
        (0, ChildPipe::Reads),
        (1, ChildPipe::Writes),
        (2, ChildPipe::Writes),
    ];
    let (running, child) = kernel.start_child(&pipes).unwrap();
    let notes = Notes::default();
    let reactor = simulation.reactor(process).unwrap();
    reactor
        .adopt_process(running.settings(story.limits), notes.clone())
        .unwrap();
    simulation.run();
    let left = (story.plays)(&child, &mut simulation);
    run(&mut simulation);
    drop(left);
    notes.0.borrow().clone()
}

fn real(story: &Story) -> Told {
    let mut shell = Command::new("sh");
    shell.args(["-c", story.script]);
    let command = ChildCommand::new(shell)
        .write_to(0)
        .read_from(1)
        .read_from(2)
        .in_own_group()
        .settings(story.limits);
    let notes = Notes::default();
    let mut reactor = Reactor::new().unwrap();
    reactor.spawn_process(command, notes.clone()).unwrap();
    run_until(&mut reactor, |_| notes.0.borrow().count("ended") > 0);
    notes.0.borrow().clone()
}

/// What is told, without the order in which streams end: a real child closes them one by
/// one, at its own pace.
fn in_short(told: &Told) -> (Vec<String>, BTreeMap<u32, Vec<u8>>) {
    let (mut streams, mut others) = (Vec::new(), Vec::new());
    for call in &told.calls {
        match call.starts_with("lost") {
            true => streams.push(call.clone()),
            false => others.push(call.clone()),
        }
    }
    streams.sort();
    others.extend(streams);
    (others, told.data.clone())
}

/// The simulated kind agrees with the real one.
#[test]
fn a_simulated_child_is_told_of_as_a_real_one() {
    for story in stories() {
        let _ledger = DescriptorLedger::open();
        let (wanted, got) = (real(&story), simulated(&story));
        assert_eq!(
            in_short(&got),
            in_short(&wanted),
            "of a child that {}",
            story.name
        );
    }
}
