//! Frames that are almost right, at both ends.

use std::cell::RefCell;
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::process::ExitStatus;
use std::rc::Rc;
use std::time::Duration;

use bowline::Reactor;
use bowline::handoff::channel::Role;
use bowline::handoff::pool::{
    FromWorker, Live, PassedConnection, Pool, Spawned, ToWorker, Worker, WorkerId, WorkerRefusal,
    WorkerSettings,
};
use bowline::process::ChildProcess;
use bowline::testing::Random;

use super::process::settings;
use super::raw::{Raw, dispatch, frame, hello, send_bytes};
use crate::mutated::{Kinds, mutate};
use crate::support::figures::{Bound, Figures, scaled};
use crate::support::{DescriptorLedger, open_descriptors, run_until, socketpair};

/// How many frames one connection gets at the most: the first that is wrong
/// ends it.
const FRAMES: usize = 6;

/// Reliability T-21: whatever a dispatcher sends, a worker takes it, refuses it
/// or ends the channel; and whatever a worker sends, its pool goes on.
#[test]
fn mutated_messages_do_no_harm_at_either_end() {
    let ledger = DescriptorLedger::open();
    let wanted = scaled(4_000, 1_000_000);
    let seed = std::env::var("BOWLINE_SEED").map_or(1, |seed| seed.parse().expect("a number"));
    println!("BOWLINE_SEED={seed}");
    let mut random = Random::new(seed);
    let worker_end = at_the_worker(&mut random, wanted / 2);
    let pool_end = at_the_pool(&mut random, wanted - wanted / 2);
    Figures::of("T-21")
        .must(
            "mutations",
            worker_end.mutations + pool_end.mutations,
            Bound::AtLeast,
            wanted,
        )
        .must(
            "panics",
            worker_end.panics + pool_end.panics,
            Bound::Exactly,
            0,
        )
        .must(
            "descriptors leaked",
            worker_end.leaked + pool_end.leaked,
            Bound::Exactly,
            0,
        )
        .must(
            "refusals of what is no connection",
            worker_end.refusals,
            Bound::AtLeast,
            wanted / 100,
        );
    ledger.assert_balanced();
}

#[derive(Default)]
struct Seen {
    mutations: usize,
    panics: usize,
    leaked: usize,
    refusals: usize,
}

fn to_worker(random: &mut Random) -> ToWorker {
    if random.chance(85) {
        let read = vec![b'r'; random.below(40)];
        ToWorker::Dispatch(dispatch(random.any() % 100, &read))
    } else {
        ToWorker::Drain {
            within_ms: random.any() as u32 % 1_000,
        }
    }
}

fn from_worker(random: &mut Random) -> FromWorker {
    let (id, live) = (random.any() % 100, random.any() as u32 % 100);
    let reason = WorkerRefusal::Overloaded;
    match random.below(3) {
        0 => FromWorker::Accepted { id, live },
        1 => FromWorker::Refused { id, reason, live },
        _ => FromWorker::Load { live },
    }
}

/// Sends one mutated frame; false when the other end is gone, or full.
fn send_mutated(
    random: &mut Random,
    socket: &StdUnixStream,
    message: Vec<u8>,
    fds: &[BorrowedFd<'_>],
) -> bool {
    let mut bytes = message;
    mutate(random, &mut bytes);
    send_bytes(socket, &bytes, fds).is_ok()
}

fn at_the_worker(random: &mut Random, wanted: usize) -> Seen {
    let mut seen = Seen::default();
    let before = open_descriptors().len();
    let mut reactor = Reactor::new().unwrap();
    let kinds = Kinds::new();
    while seen.mutations < wanted {
        let (ours, theirs) = socketpair();
        let service = |_: &mut Reactor, _: PassedConnection, _: Live| {};
        let settings = WorkerSettings::default();
        Worker::start(&mut reactor, ours, settings, service).unwrap();
        let mut raw = if random.chance(5) {
            let raw = Raw::silent(theirs);
            send_mutated(random, &raw.socket, frame(&hello(Role::DISPATCHER), 0), &[]);
            seen.mutations += 1;
            raw
        } else {
            Raw::new(theirs, Role::DISPATCHER)
        };
        for _ in 0..1 + random.below(FRAMES) {
            let fds = kinds.some(random);
            let message = frame(&to_worker(random), fds.len());
            seen.mutations += 1;
            if !send_mutated(random, &raw.socket, message, &fds) {
                break;
            }
            if random.chance(50) {
                reactor.turn(Some(Duration::ZERO));
            }
        }
        for _ in 0..3 {
            reactor.turn(Some(Duration::ZERO));
        }
        let said = raw.receive().unwrap_or_default();
        let is_refusal = |said: &&FromWorker| {
            matches!(
                said,
                FromWorker::Refused {
                    reason: WorkerRefusal::WrongKind,
                    ..
                }
            )
        };
        seen.refusals += said.iter().filter(is_refusal).count();
        drop(raw);
        run_until(&mut reactor, |reactor| reactor.registered() == 0);
    }
    seen.panics = reactor.statistics().panics as usize;
    drop((reactor, kinds));
    seen.leaked = open_descriptors().len() - before;
    seen
}

/// A worker's process that is none: its channel is the test's.
struct NoProcess;

impl ChildProcess for NoProcess {
    fn pid(&self) -> u32 {
        std::process::id()
    }

    fn kill(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn try_wait(&mut self) -> io::Result<Option<ExitStatus>> {
        Ok(Some(ExitStatus::default()))
    }
}

fn at_the_pool(random: &mut Random, wanted: usize) -> Seen {
    let mut seen = Seen::default();
    let before = open_descriptors().len();
    let mut reactor = Reactor::new().unwrap();
    let kinds = Kinds::new();
    let ends: Rc<RefCell<Vec<StdUnixStream>>> = Rc::default();
    let given = Rc::clone(&ends);
    let spawn = move |_: &mut Reactor, _: WorkerId| {
        let (ours, theirs) = socketpair();
        given.borrow_mut().push(theirs);
        Ok(Spawned {
            channel: ours,
            process: Box::new(NoProcess),
        })
    };
    let mut settings = settings(1);
    settings.queue = 4;
    settings.max_attempts = 3;
    settings.backoff = bowline::policies::Backoff::new().first(Duration::ZERO);
    let pool = Pool::start(&mut reactor, settings, spawn);
    while seen.mutations < wanted {
        run_until(&mut reactor, |_| !ends.borrow().is_empty());
        let end = ends.borrow_mut().pop().expect("there is one");
        let raw = if random.chance(5) {
            let raw = Raw::silent(end);
            send_mutated(random, &raw.socket, frame(&hello(Role::WORKER), 0), &[]);
            seen.mutations += 1;
            raw
        } else {
            Raw::new(end, Role::WORKER)
        };
        // It has something that it can answer for.
        let spare = kinds.connection().try_clone_to_owned();
        pool.dispatch(&mut reactor, PassedConnection::new(spare.expect("a copy")));
        for _ in 0..1 + random.below(FRAMES) {
            let fds = if random.chance(20) {
                kinds.some(random)
            } else {
                Vec::new()
            };
            let message = frame(&from_worker(random), fds.len());
            seen.mutations += 1;
            if !send_mutated(random, &raw.socket, message, &fds) {
                break;
            }
            if random.chance(50) {
                reactor.turn(Some(Duration::ZERO));
            }
        }
        reactor.turn(Some(Duration::ZERO));
    }
    seen.panics = reactor.statistics().panics as usize;
    drop((reactor, pool, kinds, ends));
    seen.leaked = open_descriptors().len() - before;
    seen
}
