//! Channels that break while pool and worker live, in memory.

use std::cell::RefCell;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::rc::Rc;
use std::time::Duration;

use bowline::handoff::pool::{
    Live, PassedConnection, Pool, PoolSettings, Service, Spawned, Undelivered, Worker, WorkerId,
    WorkerSettings,
};
use bowline::process::ChildProcess;
use bowline::testing::{MemoryPeer, MemorySocket, Pump, SimulatedKernel, SocketId};
use bowline::{Context, Protocol, Reactor, Transport};

use crate::support::DescriptorLedger;

/// What the system knows of a worker's process.
#[derive(Debug)]
struct Process {
    worker: WorkerId,
    /// The pool's end of its channel, and the worker's.
    channel: [SocketId; 2],
    kills: usize,
    has_ended: bool,
}

#[derive(Default)]
struct World {
    processes: Vec<Process>,
    /// Who served which connection.
    served: Vec<(WorkerId, u32)>,
    undelivered: Vec<(u32, Undelivered)>,
}

type Shared = Rc<RefCell<World>>;

struct Child {
    place: usize,
    world: Shared,
}

impl ChildProcess for Child {
    fn pid(&self) -> u32 {
        7
    }

    fn kill(&mut self) -> io::Result<()> {
        self.world.borrow_mut().processes[self.place].kills += 1;
        Ok(())
    }

    fn try_wait(&mut self) -> io::Result<Option<ExitStatus>> {
        let has_ended = self.world.borrow().processes[self.place].has_ended;
        Ok(has_ended.then(|| ExitStatus::from_raw(9)))
    }
}

struct Echo {
    _live: Live,
}

impl<T: Transport> Protocol<T> for Echo {
    fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
        cx.transport.write(data);
    }
}

/// Serves for one of the workers, whose end is not that of the reactor.
struct Serves {
    worker: WorkerId,
    world: Shared,
}

impl Service for Serves {
    fn serve(&mut self, reactor: &mut Reactor, connection: PassedConnection, live: Live) {
        let served = (self.worker, connection.label);
        self.world.borrow_mut().served.push(served);
        let socket = MemorySocket::from_descriptor(connection.fd).unwrap();
        socket.adopt(reactor, Echo { _live: live }).unwrap();
    }

    fn draining(&mut self, _: &mut Reactor, _: Duration) {}

    fn drained(&mut self, _: &mut Reactor) {}
}

/// A pool of two workers, all in one reactor whose clock stands still.
struct Run {
    pump: Pump,
    kernel: SimulatedKernel,
    pool: Pool,
    world: Shared,
}

impl Run {
    fn new(settings: impl FnOnce(&mut PoolSettings)) -> Self {
        let kernel = SimulatedKernel::new();
        let mut pump = Pump::with_kernel(kernel.clone()).unwrap();
        let world = Shared::default();
        let mut pool_settings = PoolSettings::default();
        pool_settings.workers = 2;
        settings(&mut pool_settings);
        let (shared, sockets) = (Rc::clone(&world), kernel.clone());
        let spawn = move |reactor: &mut Reactor, worker: WorkerId| {
            let (ours, theirs) = sockets.pair();
            let place = shared.borrow().processes.len();
            shared.borrow_mut().processes.push(Process {
                worker,
                channel: [ours.id(), theirs.id()],
                kills: 0,
                has_ended: false,
            });
            let world = Rc::clone(&shared);
            let serves = Serves { worker, world };
            Worker::start(reactor, theirs, WorkerSettings::default(), serves)?;
            let process = Box::new(Child {
                place,
                world: Rc::clone(&shared),
            });
            Ok(Spawned {
                channel: ours,
                process,
            })
        };
        let pool = Pool::start(pump.reactor(), pool_settings, spawn);
        let shared = Rc::clone(&world);
        pool.on_undelivered(move |_, connection, why| {
            shared
                .borrow_mut()
                .undelivered
                .push((connection.label, why));
        });
        let mut run = Self {
            pump,
            kernel,
            pool,
            world,
        };
        run.pump.run();
        run
    }

    fn dispatch(&mut self, label: u32) -> MemoryPeer {
        let (accepted, client) = self.kernel.pair();
        let mut connection = PassedConnection::new(accepted.into_descriptor().unwrap());
        connection.label = label;
        self.pool.dispatch(self.pump.reactor(), connection);
        MemoryPeer::new(client)
    }

    fn end_process(&self, place: usize) {
        self.world.borrow_mut().processes[place].has_ended = true;
    }
}

fn broken() -> io::Error {
    io::Error::from_raw_os_error(rustix::io::Errno::IO.raw_os_error())
}

/// It may have begun, or may yet: nobody else begins before it is gone.
#[test]
fn what_a_worker_had_when_its_channel_broke_waits_for_its_death() {
    let ledger = DescriptorLedger::open();
    let mut run = Run::new(|_| ());
    let channel = run.world.borrow().processes[0].channel;
    run.kernel.fail_read(channel[0], 0, broken());
    let client = run.dispatch(1);
    run.pump.run();
    assert_eq!(run.world.borrow().processes[0].kills, 1);
    let statistics = run.pool.statistics();
    assert_eq!((statistics.in_flight, statistics.waiting), (1, 0));
    assert_eq!((statistics.resent, statistics.deaths), (0, 1));
    // It had begun when the pool lost the channel: an answer was on its way.
    let first = run.world.borrow().processes[0].worker;
    assert_eq!(run.world.borrow().served, [(first, 1)]);

    run.end_process(0);
    run.pump.advance(Duration::from_millis(20));
    let statistics = run.pool.statistics();
    assert_eq!((statistics.in_flight, statistics.resent), (0, 1));
    let second = run.world.borrow().processes[1].worker;
    assert_eq!(run.world.borrow().served, [(first, 1), (second, 1)]);
    drop((run, client));
    ledger.assert_balanced();
}

#[test]
fn what_waits_for_a_death_waits_no_longer_than_in_the_queue() {
    let ledger = DescriptorLedger::open();
    let mut run = Run::new(|settings| settings.queue_timeout = Duration::from_secs(3));
    let channel = run.world.borrow().processes[0].channel;
    run.kernel.fail_read(channel[0], 0, broken());
    let client = run.dispatch(1);
    run.pump.advance(Duration::from_millis(2_900));
    assert_eq!(run.pool.statistics().in_flight, 1);
    run.pump.advance(Duration::from_millis(200));
    assert_eq!(run.pool.statistics().in_flight, 0);
    let undelivered = [(1, Undelivered::WaitedTooLong)];
    assert_eq!(run.world.borrow().undelivered, undelivered);
    drop((run, client));
    ledger.assert_balanced();
}

/// The pool lives, and gives to others what it has no answer for.
#[test]
fn worker_that_lost_its_channel_serves_nothing_unanswered() {
    let ledger = DescriptorLedger::open();
    let mut run = Run::new(|_| ());
    let channel = run.world.borrow().processes[0].channel;
    run.kernel.fail_send(channel[1], 0, broken());
    let client = run.dispatch(1);
    run.pump.run();
    let second = run.world.borrow().processes[1].worker;
    assert_eq!(run.world.borrow().served, [(second, 1)]);
    assert_eq!(run.pool.statistics().resent, 1);
    drop((run, client));
    ledger.assert_balanced();
}

/// The count of its connections does not keep a worker, and what it promised to
/// serve, after its reactor.
#[test]
fn worker_dropped_with_its_reactor_closes_what_it_promised() {
    let ledger = DescriptorLedger::open();
    let mut run = Run::new(|_| ());
    let channel = run.world.borrow().processes[0].channel;
    let full = io::Error::from(io::ErrorKind::WouldBlock);
    run.kernel.fail_send(channel[1], 0, full);
    let client = run.dispatch(1);
    let kernel = run.kernel.clone();
    let has_unread = |_: &mut Pump| kernel.unread(channel[1]).1 > 0;
    assert!(run.pump.run_until(has_unread));
    assert!(run.pump.run_until(|pump| !has_unread(pump)));
    assert!(run.world.borrow().served.is_empty());
    let Run { pump, pool, .. } = run;
    drop((pump, pool));
    assert!(client.is_at_end());
    drop(client);
    assert_eq!(kernel.open_sockets(), 0);
    drop(kernel);
    ledger.assert_balanced();
}
