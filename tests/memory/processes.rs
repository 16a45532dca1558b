//! Whole runs from a seed of several processes: a pool that hands connections to
//! its workers, workers that die anywhere, hang and are retired, a pool that dies or
//! stops, a kernel that cuts, delays and fails. Pool and workers are those of
//! `bowline::handoff::pool`, as they are. Whoever has not taken over a connection
//! cannot lose it, and nobody serves one
//! that another serves.

use std::cell::RefCell;
use std::fmt::Write as _;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::rc::Rc;
use std::time::Duration;

use bowline::handoff::pool::{
    Live, PassedConnection, Pool, PoolSettings, Service, Spawned, Undelivered, Worker, WorkerId,
    WorkerRefusal, WorkerSettings,
};
use bowline::policies::{Backoff, Jitter};
use bowline::process::ChildProcess;
use bowline::testing::{
    Delivery, KernelSettings, MemorySocket, MemoryStream, Points, ProcessId, Random,
    SimulatedKernel, Simulation,
};
use bowline::{
    AfterReadClosed, AnyConnection as _, CloseReason, Context, Protocol, Reactor, Transport,
};

use crate::seeds::{System, every_seed};
use crate::support::figures::{Bound, Figures, scaled};
use crate::support::{DescriptorLedger, Staged};

/// Where workers die.
const POINTS: [&str; 4] = ["before the answer", "before serving", "serving", "end"];

/// A client's connection, as seen from above.
#[derive(Debug, Default)]
struct Job {
    request: usize,
    /// Workers that said that they take it, or died saying so.
    admitted_by: Vec<WorkerId>,
    /// `None` is the pool's process, which serves what nobody takes.
    served_by: Vec<Option<WorkerId>>,
    /// Whether the client got its whole answer, once it has come to an end.
    outcome: Option<bool>,
}

#[derive(Default)]
struct World {
    jobs: Vec<Job>,
    lives: Vec<Life>,
    is_stopping: bool,
    has_stopped: bool,
    /// Processes that the pool has asked for, and that do not run yet.
    to_start: Vec<(Life, MemorySocket)>,
    wrong: Vec<String>,
}

type Shared = Rc<RefCell<World>>;

/// A worker's process, as the pool and the run see it.
#[derive(Clone)]
struct Life {
    worker: WorkerId,
    state: Rc<RefCell<LifeState>>,
}

#[derive(Default)]
struct LifeState {
    process: Option<ProcessId>,
    is_killed: bool,
    has_exited: bool,
    is_dead: bool,
}

/// The pool's side of it.
struct Child(Life);

impl ChildProcess for Child {
    fn pid(&self) -> u32 {
        u32::MAX
    }

    /// It dies some time later, as processes do.
    fn kill(&mut self) -> io::Result<()> {
        self.0.state.borrow_mut().is_killed = true;
        Ok(())
    }

    fn try_wait(&mut self) -> io::Result<Option<ExitStatus>> {
        let is_dead = self.0.state.borrow().is_dead;
        Ok(is_dead.then(|| ExitStatus::from_raw(9)))
    }
}

/// What a worker does with connections.
struct Echoes {
    life: Life,
    shared: Shared,
    points: Points,
    refuses_percent: u8,
    /// Whether calls on channels fail for good.
    may_break: bool,
    random: Random,
}

impl Service for Echoes {
    fn admit(
        &mut self,
        _: &mut Reactor,
        connection: &PassedConnection,
    ) -> Result<(), WorkerRefusal> {
        if self.random.chance(self.refuses_percent) {
            return Err(WorkerRefusal::Overloaded);
        }
        let job = connection.label as usize;
        self.shared.borrow_mut().jobs[job]
            .admitted_by
            .push(self.life.worker);
        self.points.pass("before the answer");
        Ok(())
    }

    fn serve(&mut self, reactor: &mut Reactor, connection: PassedConnection, live: Live) {
        self.points.pass("before serving");
        let job = connection.label as usize;
        {
            let world = &mut *self.shared.borrow_mut();
            let served = &mut world.jobs[job];
            let worker = self.life.worker;
            // Where a channel broke, nobody knows what its worker had begun; so it
            // must be gone before somebody else begins.
            let is_over = |earlier: &Option<WorkerId>| {
                let mut lives = world.lives.iter();
                lives.any(|life| Some(life.worker) == *earlier && life.state.borrow().is_dead)
            };
            let is_first = served.served_by.is_empty();
            let is_ours = served.admitted_by.contains(&worker)
                && (is_first || self.may_break && served.served_by.iter().all(is_over));
            served.served_by.push(Some(worker));
            if !is_ours {
                let line = format!("{worker} serves what is not its: {served:?}");
                world.wrong.push(line);
            }
        }
        let echo = Echo {
            points: self.points.clone(),
            _live: Some(live),
        };
        echo.begin(reactor, connection);
    }

    /// It exits.
    fn drained(&mut self, _: &mut Reactor) {
        self.life.state.borrow_mut().has_exited = true;
    }
}

/// Serves a client.
struct Echo {
    points: Points,
    _live: Option<Live>,
}

impl Echo {
    fn begin(self, reactor: &mut Reactor, connection: PassedConnection) {
        let socket = MemorySocket::from_descriptor(connection.fd).expect("it stands for one");
        socket.adopt(reactor, self).expect("a slot");
    }
}

impl Protocol<MemoryStream> for Echo {
    fn data_received(&mut self, cx: &mut Context<'_, MemoryStream>, data: &[u8]) {
        self.points.pass("serving");
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
            // Who began before its channel broke has answered in part.
            let world = &mut *self.shared.borrow_mut();
            let is_first = world.jobs[self.job].served_by.len() <= 1;
            if is_first && *byte != (self.received + self.job) as u8 {
                let line = format!("client {} got another's bytes", self.job);
                world.wrong.push(line);
            }
            self.received += 1;
        }
    }

    fn connection_lost(&mut self, _: &mut Context<'_, MemoryStream>, _: &CloseReason) {
        let world = &mut *self.shared.borrow_mut();
        let job = &mut world.jobs[self.job];
        if job.outcome.is_some() {
            world
                .wrong
                .push(format!("client {} was lost twice", self.job));
        }
        job.outcome = Some(self.received == job.request);
    }
}

/// A run and who is in it.
struct Run {
    simulation: Simulation,
    shared: Shared,
    /// Dropped with its process.
    pool: Option<Pool>,
    dispatcher: ProcessId,
    clients: ProcessId,
    workers: Vec<Life>,
    refuses_percent: u8,
    seed: u64,
    random: Random,
}

impl Run {
    fn new(mut simulation: Simulation, seed: u64, random: &mut Random) -> Self {
        let shared = Shared::default();
        let dispatcher = simulation.spawn().unwrap();
        let clients = simulation.spawn().unwrap();
        let mut settings = PoolSettings::default();
        settings.workers = 1 + random.below(3);
        settings.window = [1, 3, 64][random.below(3)];
        settings.max_attempts = u32::MAX;
        settings.queue_timeout = Duration::from_secs(1_000_000);
        settings.backoff = Backoff::new()
            .first(Duration::from_millis(10))
            .cap(Duration::from_millis(100))
            .jitter(Jitter::None);
        let kernel = simulation.kernel().clone();
        let world = Rc::clone(&shared);
        let spawn = move |_: &mut Reactor, worker: WorkerId| {
            let (ours, theirs) = kernel.pair();
            let life = Life {
                worker,
                state: Rc::default(),
            };
            let process = Box::new(Child(life.clone()));
            let world = &mut *world.borrow_mut();
            world.lives.push(life.clone());
            world.to_start.push((life, theirs));
            Ok(Spawned {
                channel: ours,
                process,
            })
        };
        let reactor = simulation.reactor(dispatcher).expect("it lives");
        let pool = Pool::start(reactor, settings, spawn);
        let world = Rc::clone(&shared);
        let points = simulation.points(dispatcher);
        pool.on_undelivered(move |reactor, connection, why| {
            {
                let world = &mut *world.borrow_mut();
                let job = &mut world.jobs[connection.label as usize];
                job.served_by.push(None);
                let is_expected = match why {
                    Undelivered::Refused(_) => true,
                    // Nobody is left to be given it, and nobody is started any more.
                    Undelivered::Stopped => world.is_stopping,
                    _ => false,
                };
                if !is_expected {
                    world.wrong.push(format!("undelivered: {why:?}"));
                }
            }
            let echo = Echo {
                points: points.clone(),
                _live: None,
            };
            echo.begin(reactor, connection);
        });
        Self {
            simulation,
            shared,
            pool: Some(pool),
            dispatcher,
            clients,
            workers: Vec::new(),
            refuses_percent: [0, 0, 30][random.below(3)],
            seed,
            random: Random::new(seed.rotate_left(32)),
        }
    }

    fn add_client(&mut self, request: usize) {
        let (accepted, theirs) = self.simulation.kernel().pair();
        let job = {
            let world = &mut *self.shared.borrow_mut();
            world.jobs.push(Job {
                request,
                ..Job::default()
            });
            world.jobs.len() - 1
        };
        let client = Client {
            job,
            shared: Rc::clone(&self.shared),
            received: 0,
        };
        let reactor = self.simulation.reactor(self.clients).expect("never dies");
        theirs.adopt(reactor, client).expect("a slot");
        // Closed with the pool's process, as what nobody accepts.
        if let Some(reactor) = self.simulation.reactor(self.dispatcher)
            && let Some(pool) = &self.pool
        {
            let mut connection =
                PassedConnection::new(accepted.into_descriptor().expect("descriptors"));
            connection.label = job as u32;
            pool.dispatch(reactor, connection);
        }
    }

    /// Has a worker leave: in its own time, or at once.
    fn retire(&mut self, worker: WorkerId, in_time: bool) {
        let reactor = self.simulation.reactor(self.dispatcher);
        if let (Some(reactor), Some(pool)) = (reactor, &self.pool) {
            if in_time {
                pool.retire(reactor, worker, Duration::from_secs(1));
            } else {
                pool.kill(worker);
            }
        }
    }

    /// The pool stops: who waits is served, and everybody leaves.
    fn stop(&mut self) {
        let reactor = self.simulation.reactor(self.dispatcher);
        if let (Some(reactor), Some(pool)) = (reactor, &self.pool) {
            self.shared.borrow_mut().is_stopping = true;
            let world = Rc::clone(&self.shared);
            pool.stop(reactor, Duration::from_secs(100), move |_| {
                world.borrow_mut().has_stopped = true;
            });
            for _ in 0..101 {
                self.advance(Duration::from_secs(1));
            }
            let has_stopped = self.shared.borrow().has_stopped;
            let has_pool = self.simulation.is_alive(self.dispatcher);
            assert!(has_stopped || !has_pool, "{:?}", self.pool);
            let mut lives = self.workers.iter().map(|life| life.state.borrow());
            assert!(!has_pool || lives.all(|state| state.is_dead));
        }
    }

    fn is_over(&self) -> bool {
        let world = self.shared.borrow();
        world.jobs.iter().all(|job| job.outcome.is_some())
    }

    /// Whether it was not ended by force: who exits has served what it took.
    fn is_alive(&self, worker: WorkerId) -> bool {
        let mut lives = self.workers.iter().filter(|life| life.worker == worker);
        lives.any(|life| {
            let state = life.state.borrow();
            !state.is_dead || state.has_exited
        })
    }
}

impl System for Run {
    fn simulation(&mut self) -> &mut Simulation {
        &mut self.simulation
    }

    fn act(&mut self) {
        let to_start = std::mem::take(&mut self.shared.borrow_mut().to_start);
        for (life, channel) in to_start {
            let process = self.simulation.spawn().expect("descriptors");
            life.state.borrow_mut().process = Some(process);
            let service = Echoes {
                life: life.clone(),
                shared: Rc::clone(&self.shared),
                points: self.simulation.points(process),
                refuses_percent: self.refuses_percent,
                may_break: self
                    .simulation
                    .kernel()
                    .settings()
                    .lasting_errors_per_10_000
                    > 0,
                random: Random::new(self.seed ^ self.workers.len() as u64),
            };
            let reactor = self.simulation.reactor(process).expect("it lives");
            // The kernel may have failed it: then it exits, as real ones do.
            if Worker::start(reactor, channel, WorkerSettings::default(), service).is_err() {
                self.simulation.kill(process);
            }
            self.workers.push(life);
        }
        if !self.simulation.is_alive(self.dispatcher) {
            self.pool = None;
        }
        for life in &self.workers {
            let state = &mut *life.state.borrow_mut();
            let process = state.process.expect("it was started");
            // A signal takes its time.
            if state.has_exited || state.is_killed && self.random.chance(30) {
                self.simulation.kill(process);
            }
            state.is_dead = !self.simulation.is_alive(process);
        }
    }

    fn is_acting(&self) -> bool {
        let world = self.shared.borrow();
        let is_dying = |life: &Life| {
            let state = life.state.borrow();
            (state.is_killed || state.has_exited) && !state.is_dead
        };
        !world.to_start.is_empty() || world.lives.iter().any(is_dying)
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
    let lasting = [0, 0, 100][random.below(3)];
    kernel.set_settings(
        KernelSettings::default()
            .send_buffer([4_608, 20_000, 212_992][random.below(3)])
            .cut_percent([0, 20, 60][random.below(3)])
            .delivery([Delivery::Batch, Delivery::OneAtATime, Delivery::Random][random.below(3)])
            .passing_errors_percent([0, 5, 30][random.below(3)])
            .lasting_errors_per_10_000(lasting),
    );
    let simulation = Simulation::with_kernel(kernel.clone());
    let mut run = Run::new(simulation, seed, &mut random);
    run.act();
    for _ in 0..20 + random.below(60) {
        let worker = run.workers[random.below(run.workers.len())].clone();
        let process = worker.state.borrow().process.expect("it was started");
        match random.below(12) {
            0..4 => run.add_client(1 + random.below(3_000)),
            4..9 => {
                for _ in 0..random.below(20) {
                    run.turn();
                }
            }
            9 => {
                let point = POINTS[random.below(POINTS.len())];
                run.simulation.kill_at(process, point, random.below(3));
            }
            10 if random.chance(30) => run.simulation.kill(process),
            // Stopped for a while, which may be longer than the pool bears.
            10 if random.chance(30) => run.simulation.suspend(process),
            10 if random.chance(30) => run.simulation.resume(process),
            // The pool itself is stopped, which is no reason to end anybody.
            10 if random.chance(10) => run.simulation.suspend(run.dispatcher),
            10 if random.chance(20) => run.simulation.resume(run.dispatcher),
            10 if random.chance(30) => run.retire(worker.worker, random.chance(50)),
            10 => run.advance(Duration::from_millis(random.below(50) as u64)),
            _ if random.chance(5) => run.simulation.kill(run.dispatcher),
            // Over whatever was to happen on the way.
            _ => run
                .simulation
                .clock()
                .advance(Duration::from_millis(random.below(50) as u64)),
        }
    }
    // From here on nobody is told to die, but those that were told may.
    for process in run.simulation.processes() {
        run.simulation.resume(process);
    }
    if random.chance(30) {
        run.stop();
    }
    for _ in 0..200 {
        run.advance(Duration::from_secs(1));
        if run.is_over() {
            break;
        }
    }

    let world = run.shared.borrow();
    assert!(world.wrong.is_empty(), "{:?}", world.wrong);
    let has_pool = run.simulation.is_alive(run.dispatcher);
    let mut outcomes = String::new();
    let mut answered = 0;
    for (number, job) in world.jobs.iter().enumerate() {
        assert!(job.outcome.is_some(), "client {number} waits: {job:?}");
        let is_answered = job.outcome == Some(true);
        answered += usize::from(is_answered);
        let owner = match job.served_by.last() {
            Some(owner) => *owner,
            None => job.admitted_by.last().copied(),
        };
        let is_owner_alive = owner.map_or(has_pool, |owner| run.is_alive(owner));
        assert!(
            is_answered || !is_owner_alive || lasting > 0,
            "client {number} is lost although nobody died who had it: {job:?}"
        );
        write!(outcomes, "{:?}{:?} ", job.outcome, job.served_by).expect("a string");
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

/// Reliability T-37: a pool and its workers hand over connections and die at any
/// point; each client is served once, or lost with the worker that took it over;
/// a seed does the same when run again. `BOWLINE_SEED=7 cargo test --test memory
/// processes` replays one.
#[test]
fn every_seed_of_processes_keeps_the_promises_and_repeats() {
    let ledger = DescriptorLedger::open();
    let (mut deaths, mut answered) = (0, 0);
    let counted = every_seed((500, 2_000), simulate, |trace: Trace| {
        deaths += trace.deaths;
        answered += trace.answered;
    });
    let Some((seeds, equal)) = counted else {
        return;
    };
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
