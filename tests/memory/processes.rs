//! Whole runs from a seed of several processes: one that hands connections to
//! workers, workers that die anywhere, a kernel that cuts, delays and fails.
//! Whoever has not taken over a connection cannot lose it, and nobody serves one
//! that another serves.

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::fmt::Write as _;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Duration;

use bowline::testing::{
    Delivery, KernelSettings, MemoryHandle, MemorySocket, MemoryStream, Points, ProcessId, Random,
    SimulatedKernel, Simulation,
};
use bowline::{
    AfterReadClosed, CloseReason, Context, PassedDescriptor, Protocol, Reactor,
    ReceivedDescriptors, Transport, UnixTransport,
};

use crate::support::DescriptorLedger;
use crate::support::figures::{Bound, Figures, scaled};

/// Where workers die.
const POINTS: [&str; 6] = [
    "received",
    "before the answer",
    "after the answer",
    "before serving",
    "serving",
    "end",
];
/// Replays one seed.
const SEED: &str = "BOWLINE_SEED";

/// The two messages to a worker, and the one from it: a kind and a number.
const JOB: u8 = b'j';
const YOURS: u8 = b'y';
const TAKEN: u8 = b't';

fn message(kind: u8, job: usize) -> [u8; 5] {
    let [a, b, c, d] = (job as u32).to_le_bytes();
    [kind, a, b, c, d]
}

/// Takes the messages out of what has come so far.
fn messages(buffer: &mut Vec<u8>) -> Vec<(u8, usize)> {
    let whole = buffer.len() / 5 * 5;
    let taken: Vec<u8> = buffer.drain(..whole).collect();
    let number = |m: &[u8]| u32::from_le_bytes([m[1], m[2], m[3], m[4]]) as usize;
    taken.chunks(5).map(|m| (m[0], number(m))).collect()
}

/// A client's connection, as seen from above.
#[derive(Debug, Default)]
struct Job {
    request: usize,
    /// Ours until a worker has said that it took it over.
    socket: Option<Rc<OwnedFd>>,
    worker: Option<usize>,
    taken_by: Option<usize>,
    served: usize,
    /// Whether the client got its whole answer, once it has come to an end.
    outcome: Option<bool>,
}

#[derive(Debug, Default)]
struct World {
    jobs: Vec<Job>,
    waiting: VecDeque<usize>,
    /// The dispatcher's ends of the connections to workers.
    channels: BTreeMap<usize, MemoryHandle>,
    next: usize,
    wrong: Vec<String>,
}

type Shared = Rc<RefCell<World>>;

/// Sends what waits to workers, in turn.
fn dispatch(shared: &Shared, reactor: &mut Reactor) {
    let world = &mut *shared.borrow_mut();
    while let Some(&job) = world.waiting.front() {
        let workers: Vec<_> = world.channels.iter().map(|(id, it)| (*id, *it)).collect();
        if workers.is_empty() {
            return;
        }
        world.next += 1;
        let (worker, channel) = workers[world.next % workers.len()];
        let Some(transport) = reactor.get(channel.handle()) else {
            // In its own callback, or gone: the others.
            world.channels.remove(&worker);
            continue;
        };
        let socket = world.jobs[job].socket.as_ref().expect("not taken yet");
        let passed = vec![PassedDescriptor::shared(socket)];
        match transport.write_with_descriptors(&message(JOB, job), passed) {
            Ok(_) => {
                world.jobs[job].worker = Some(worker);
                world.waiting.pop_front();
            }
            Err(_) => drop(world.channels.remove(&worker)),
        }
    }
}

/// The dispatcher's side.
struct ToWorker {
    worker: usize,
    shared: Shared,
    buffer: Vec<u8>,
}

impl Protocol<MemoryStream> for ToWorker {
    fn data_received(&mut self, cx: &mut Context<'_, MemoryStream>, data: &[u8]) {
        self.buffer.extend_from_slice(data);
        for (kind, job) in messages(&mut self.buffer) {
            assert_eq!(kind, TAKEN);
            let world = &mut *self.shared.borrow_mut();
            let taken = &mut world.jobs[job];
            assert_eq!(taken.worker, Some(self.worker));
            taken.taken_by = taken.worker.take();
            taken.socket = None;
            cx.transport.write(&message(YOURS, job));
        }
    }

    fn connection_lost(&mut self, cx: &mut Context<'_, MemoryStream>, _: &CloseReason) {
        {
            let world = &mut *self.shared.borrow_mut();
            world.channels.remove(&self.worker);
            for (number, job) in world.jobs.iter_mut().enumerate() {
                if job.worker == Some(self.worker) {
                    job.worker = None;
                    world.waiting.push_back(number);
                }
            }
        }
        dispatch(&self.shared, cx.reactor);
    }
}

/// A worker's side.
struct ToDispatcher {
    worker: usize,
    shared: Shared,
    points: Points,
    buffer: Vec<u8>,
    descriptors: VecDeque<OwnedFd>,
    held: BTreeMap<usize, OwnedFd>,
}

impl Protocol<MemoryStream> for ToDispatcher {
    fn descriptors_received(
        &mut self,
        cx: &mut Context<'_, MemoryStream>,
        descriptors: &mut ReceivedDescriptors<'_>,
        data: &[u8],
    ) {
        self.descriptors.extend(descriptors);
        self.points.pass("received");
        self.data_received(cx, data);
    }

    fn data_received(&mut self, cx: &mut Context<'_, MemoryStream>, data: &[u8]) {
        self.buffer.extend_from_slice(data);
        for (kind, job) in messages(&mut self.buffer) {
            if kind == JOB {
                let socket = self.descriptors.pop_front().expect("it came first");
                self.held.insert(job, socket);
                self.points.pass("before the answer");
                cx.transport.write(&message(TAKEN, job));
                self.points.pass("after the answer");
                continue;
            }
            assert_eq!(kind, YOURS);
            let socket = self.held.remove(&job).expect("it is here");
            self.points.pass("before serving");
            let socket = MemorySocket::from_descriptor(socket).expect("it stands for one");
            let server = Server {
                job,
                worker: self.worker,
                shared: Rc::clone(&self.shared),
                points: self.points.clone(),
                received: 0,
            };
            socket.adopt(cx.reactor, server).expect("a slot");
        }
    }
}

/// Serves a client, in a worker.
struct Server {
    job: usize,
    worker: usize,
    shared: Shared,
    points: Points,
    received: usize,
}

impl Protocol<MemoryStream> for Server {
    fn connection_made(&mut self, _: &mut Context<'_, MemoryStream>) {
        let world = &mut *self.shared.borrow_mut();
        let job = &mut world.jobs[self.job];
        job.served += 1;
        if job.taken_by != Some(self.worker) {
            let line = format!("{} serves what {:?} took", self.worker, job.taken_by);
            world.wrong.push(line);
        }
    }

    fn data_received(&mut self, cx: &mut Context<'_, MemoryStream>, data: &[u8]) {
        self.points.pass("serving");
        self.received += data.len();
        cx.transport.write(data);
    }

    fn read_connection_lost(&mut self, _: &mut Context<'_, MemoryStream>) -> AfterReadClosed {
        self.points.pass("end");
        AfterReadClosed::LoseConnection
    }
}

/// Sends a request, and expects it back.
struct Client {
    job: usize,
    shared: Shared,
    received: usize,
}

impl Protocol<MemoryStream> for Client {
    fn connection_made(&mut self, cx: &mut Context<'_, MemoryStream>) {
        let length = self.shared.borrow().jobs[self.job].request;
        let request: Vec<u8> = (0..length).map(|n| (n + self.job) as u8).collect();
        cx.transport.write(&request);
        cx.transport.lose_write_connection();
    }

    fn data_received(&mut self, _: &mut Context<'_, MemoryStream>, data: &[u8]) {
        for byte in data {
            if *byte != (self.received + self.job) as u8 {
                let line = format!("client {} got another's bytes", self.job);
                self.shared.borrow_mut().wrong.push(line);
            }
            self.received += 1;
        }
    }

    fn connection_lost(&mut self, _: &mut Context<'_, MemoryStream>, _: &CloseReason) {
        let job = &mut self.shared.borrow_mut().jobs[self.job];
        if job.outcome.is_some() {
            job.served = usize::MAX;
        }
        job.outcome = Some(self.received == job.request);
    }
}

/// A run and who is in it.
struct Run {
    simulation: Simulation,
    shared: Shared,
    dispatcher: ProcessId,
    clients: ProcessId,
    workers: Vec<ProcessId>,
}

impl Run {
    fn add_worker(&mut self) {
        let process = self.simulation.spawn().expect("descriptors");
        let worker = self.workers.len();
        self.workers.push(process);
        let ours = ToWorker {
            worker,
            shared: Rc::clone(&self.shared),
            buffer: Vec::new(),
        };
        let theirs = ToDispatcher {
            worker,
            shared: Rc::clone(&self.shared),
            points: self.simulation.points(process),
            buffer: Vec::new(),
            descriptors: VecDeque::new(),
            held: BTreeMap::new(),
        };
        let joined = self
            .simulation
            .join((self.dispatcher, ours), (process, theirs));
        let (channel, _) = joined.expect("both are alive");
        self.shared.borrow_mut().channels.insert(worker, channel);
        self.dispatch();
    }

    fn add_client(&mut self, request: usize) {
        let (accepted, theirs) = self.simulation.kernel().pair();
        let job = {
            let world = &mut *self.shared.borrow_mut();
            let socket = accepted.into_descriptor().expect("descriptors");
            world.jobs.push(Job {
                request,
                socket: Some(Rc::new(socket)),
                ..Job::default()
            });
            world.waiting.push_back(world.jobs.len() - 1);
            world.jobs.len() - 1
        };
        let client = Client {
            job,
            shared: Rc::clone(&self.shared),
            received: 0,
        };
        let reactor = self.simulation.reactor(self.clients).expect("never dies");
        theirs.adopt(reactor, client).expect("a slot");
        self.dispatch();
    }

    fn dispatch(&mut self) {
        let reactor = self.simulation.reactor(self.dispatcher);
        dispatch(&self.shared, reactor.expect("never dies"));
    }

    fn has_workers(&self) -> bool {
        let mut workers = self.workers.iter();
        workers.any(|worker| self.simulation.is_alive(*worker))
            && !self.shared.borrow().channels.is_empty()
    }
}

/// What a run leaves to be compared, and how many of its processes died.
#[derive(Debug, PartialEq, Eq)]
struct Trace {
    fingerprint: u64,
    outcomes: String,
    deaths: usize,
    answered: usize,
}

fn simulate(seed: u64) -> Trace {
    let mut random = Random::new(!seed);
    let kernel = SimulatedKernel::with_seed(seed);
    let lasting = [0, 0, 20][random.below(3)];
    kernel.set_settings(KernelSettings {
        send_buffer: [4_608, 20_000, 212_992][random.below(3)],
        cut_percent: [0, 20, 60][random.below(3)],
        delivery: [Delivery::Batch, Delivery::OneAtATime, Delivery::Random][random.below(3)],
        passing_errors_percent: [0, 5, 30][random.below(3)],
        lasting_errors_per_10_000: lasting,
        ..KernelSettings::default()
    });
    let mut simulation = Simulation::with_kernel(kernel.clone());
    let mut run = Run {
        dispatcher: simulation.spawn().unwrap(),
        clients: simulation.spawn().unwrap(),
        simulation,
        shared: Rc::default(),
        workers: Vec::new(),
    };
    for _ in 0..1 + random.below(3) {
        run.add_worker();
    }
    for _ in 0..20 + random.below(60) {
        let worker = run.workers[random.below(run.workers.len())];
        match random.below(12) {
            0..4 => run.add_client(1 + random.below(3_000)),
            4..9 => {
                for _ in 0..random.below(20) {
                    run.simulation.turn();
                }
            }
            9 => {
                let point = POINTS[random.below(POINTS.len())];
                run.simulation.kill_at(worker, point, random.below(3));
            }
            10 if random.chance(30) => run.simulation.kill(worker),
            10 => run
                .simulation
                .advance(Duration::from_millis(random.below(50) as u64)),
            _ if random.chance(50) => run.add_worker(),
            // Over whatever was to happen on the way.
            _ => run
                .simulation
                .clock()
                .advance(Duration::from_millis(random.below(50) as u64)),
        }
    }
    // From here on nobody is told to die, but those that were told may.
    for _ in 0..200 {
        run.simulation.advance(Duration::from_secs(1));
        if run
            .shared
            .borrow()
            .jobs
            .iter()
            .all(|job| job.outcome.is_some())
        {
            break;
        }
        if !run.has_workers() {
            run.add_worker();
        }
        run.dispatch();
    }

    let world = run.shared.borrow();
    assert!(world.wrong.is_empty(), "{:?}", world.wrong);
    let mut outcomes = String::new();
    let mut answered = 0;
    for (number, job) in world.jobs.iter().enumerate() {
        assert!(job.outcome.is_some(), "client {number} waits: {job:?}");
        assert!(job.served <= 1, "client {number} was served twice: {job:?}");
        let is_answered = job.outcome == Some(true);
        answered += usize::from(is_answered);
        let has_died = job
            .taken_by
            .is_some_and(|worker| !run.simulation.is_alive(run.workers[worker]));
        assert!(
            is_answered || has_died || lasting > 0,
            "client {number} is lost although nobody died who had it: {job:?}"
        );
        write!(outcomes, "{:?}{:?} ", job.outcome, job.taken_by).expect("a string");
    }
    drop(world);
    let mut deaths = 0;
    for process in run.simulation.processes() {
        match run.simulation.reactor(process) {
            Some(reactor) => assert_eq!(reactor.statistics().panics, 0),
            None => deaths += 1,
        }
    }
    drop(run);
    assert_eq!(kernel.open_sockets(), 0);
    Trace {
        fingerprint: kernel.fingerprint(),
        outcomes,
        deaths,
        answered,
    }
}

/// Reliability T-37: processes hand connections to each other and die at any
/// point; each client is served once, or lost with the worker that took it over;
/// a seed does the same when run again. `BOWLINE_SEED=7 cargo test --test memory
/// processes` replays one.
#[test]
fn every_seed_of_processes_keeps_the_promises_and_repeats() {
    let ledger = DescriptorLedger::open();
    if let Ok(seed) = std::env::var(SEED) {
        let seed = seed.parse().expect("a number");
        assert_eq!(simulate(seed), simulate(seed));
        return;
    }
    let seeds = std::env::var("BOWLINE_SEEDS").ok();
    let seeds = seeds.map_or_else(
        || scaled(500, 2_000),
        |seeds| seeds.parse().expect("a number"),
    );
    let (mut deaths, mut answered, mut equal) = (0, 0, 0);
    for seed in 0..seeds as u64 {
        let outcome = std::panic::catch_unwind(|| (simulate(seed), simulate(seed)));
        let Ok((first, second)) = outcome else {
            panic!("{SEED}={seed} replays this");
        };
        deaths += first.deaths;
        answered += first.answered;
        equal += usize::from(first == second);
    }
    Figures::of("T-37")
        .must(
            "seeds of several processes",
            seeds,
            Bound::AtLeast,
            scaled(500, 2_000),
        )
        .must("that did the same again", equal, Bound::Exactly, seeds)
        .must("deaths of processes", deaths, Bound::AtLeast, seeds / 2)
        .must("clients answered", answered, Bound::AtLeast, seeds);
    ledger.assert_balanced();
}
