//! Workers that accept by themselves: what waits at a worker that dies, hangs, is full or
//! goes is served by others, and nobody is reset when there are more workers, or fewer.

use std::collections::BTreeSet;
use std::io;
use std::net::SocketAddr;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant};

use std::cell::RefCell;

use bowline::handoff::pool::{
    Accepting, Pool, PoolEvent, PoolSettings, PoolStatistics, WorkerId, WorkerStage,
    WorkerStatistics,
};
use bowline::{ListenerHandle, Reactor, Tcp, Transports, Unix};
use rustix::process::Signal;

use super::clients::Clients;
use super::process::{Script, accounts, end, scripted, settings, signal, stop, turn_until_serving};
use crate::support::figures::{Bound, Figures, scaled};
use crate::support::{DescriptorLedger, run_until_within};

const PATIENCE: Duration = Duration::from_secs(120);

/// A pool whose workers accept, with one listener, and what it needs to be judged.
struct Crowd {
    reactor: Reactor,
    pool: Pool,
    address: SocketAddr,
    listener: ListenerHandle,
    log: PathBuf,
    /// Those that ended by a signal.
    killed: Rc<RefCell<Vec<u32>>>,
    ledger: DescriptorLedger,
    _directory: tempfile::TempDir,
}

impl Crowd {
    fn start(settings: PoolSettings, choose: impl FnMut(WorkerId) -> Script + 'static) -> Self {
        Self::start_by(Accepting::ByWorkers, settings, choose)
    }

    fn start_by(
        accepting: Accepting,
        settings: PoolSettings,
        choose: impl FnMut(WorkerId) -> Script + 'static,
    ) -> Self {
        let ledger = DescriptorLedger::open();
        let directory = tempfile::tempdir().expect("a temporary directory");
        let log = directory.path().join("served");
        let mut reactor = Reactor::new().expect("epoll");
        let settings = settings.accepting(accepting);
        let pool = Pool::start(&mut reactor, settings, scripted(log.clone(), choose));
        let killed = Rc::<RefCell<Vec<u32>>>::default();
        let of_killed = Rc::clone(&killed);
        pool.on_event(move |_, event| match event {
            PoolEvent::Exited { pid, status, .. } => {
                let status = status.expect("a child of ours");
                if status.signal().is_some() {
                    of_killed.borrow_mut().push(pid);
                } else {
                    assert!(status.success(), "worker {pid} has leaked: {status}");
                }
            }
            PoolEvent::NotShared { error, .. } => panic!("{error}"),
            _ => {}
        });
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let listener = reactor.accept(Tcp::at(any), pool.acceptor(7));
        let listener = listener.expect("it listens");
        let listening = reactor.get(listener).expect("it is there");
        let address = listening.address().as_inet().expect("TCP");
        let mut this = Self {
            reactor,
            pool,
            address,
            listener,
            log,
            killed,
            ledger,
            _directory: directory,
        };
        turn_until_serving(&mut this.reactor, &this.pool);
        this
    }

    fn close_listener(&mut self) {
        let listener = self.reactor.get(self.listener).expect("it is there");
        listener.stop_listening_when_drained();
    }

    fn clients(&mut self, total: u32, at_a_time: usize) -> Clients {
        Clients::start(&mut self.reactor, vec![self.address], total, at_a_time)
    }

    /// Turns until all clients are done; `meddle` after each turn.
    fn serve(&mut self, clients: &Clients, mut meddle: impl FnMut(&mut Reactor, &Pool)) {
        let began = Instant::now();
        while !clients.are_done() {
            self.reactor.turn(Some(Duration::from_millis(5)));
            meddle(&mut self.reactor, &self.pool);
            assert!(began.elapsed() < PATIENCE, "{:?}", self.pool.statistics());
        }
    }

    /// Has it all end, and answers how the pool stood then.
    fn end(mut self, clients: Clients) -> PoolStatistics {
        end(&mut self.reactor, &self.pool);
        assert_eq!(self.reactor.descriptor_counts().unclaimed, 0);
        let statistics = self.pool.statistics();
        drop((self.pool, clients, self.reactor));
        self.ledger.assert_balanced();
        statistics
    }
}

/// How many clients failed, and how many of them no dead worker had.
fn failed(clients: &Clients, log: &Path, killed: &[u32]) -> (usize, usize) {
    let accounts = accounts(log);
    let held: BTreeSet<u16> = killed
        .iter()
        .filter_map(|pid| accounts.get(pid))
        .flat_map(|account| account.held.iter().copied())
        .collect();
    let outcome = clients.outcome.borrow();
    let others = outcome.failed.values().filter(|port| !held.contains(port));
    (outcome.failed.len(), others.count())
}

#[test]
fn workers_accept_by_themselves_and_are_counted() {
    let mut crowd = Crowd::start(settings(3), |_| Script::Serve);
    let clients = crowd.clients(600, 32);
    crowd.serve(&clients, |_, _| {});
    assert_eq!(clients.outcome.borrow().failed.len(), 0);
    // The last are told a little later.
    let pool = crowd.pool.clone();
    run_until_within(PATIENCE, &mut crowd.reactor, &pool, |_| {
        pool.statistics().acknowledged == 600
    });
    let statistics = pool.statistics();
    assert_eq!(statistics.sent, 0, "passed, not accepted: {statistics:?}");
    let each = statistics.workers.iter().map(|worker| worker.acknowledged);
    let least = each.min().expect("there are some");
    assert!(least > 100, "one has nearly nothing: {statistics:?}");
    drop(pool);
    crowd.end(clients);
}

/// Reliability T-25: workers that accept by themselves die: with them go the connections
/// that they have accepted, and none that waits in their queue.
#[test]
fn the_queue_of_a_worker_that_dies_is_served_by_the_next_one() {
    let mut crowd = Crowd::start(settings(4), |_| Script::DieAfterAnswering(20));
    let clients = crowd.clients(scaled(600, 6_000), 64);
    crowd.serve(&clients, |_, _| {});
    let deaths = crowd.pool.statistics().deaths;
    let (failed, others) = failed(&clients, &crowd.log, &crowd.killed.borrow());
    Figures::of("T-25")
        .must(
            "accepted by workers: deaths",
            deaths as usize,
            Bound::AtLeast,
            20,
        )
        .must(
            "accepted by workers: lost with a dead one",
            failed,
            Bound::AtLeast,
            20,
        )
        .must(
            "accepted by workers: lost beside those",
            others,
            Bound::Exactly,
            0,
        );
    crowd.end(clients);
}

/// Reliability T-25: a worker is killed from outside every 200 ms, whatever it does at that
/// moment. The settings are the defaults.
fn kill_every_short_while(accepting: Accepting, name: &str) {
    let settings = PoolSettings::default().workers(3);
    let mut crowd = Crowd::start_by(accepting, settings, |_| Script::Serve);
    let clients = crowd.clients(200, 16);
    let (began, mut kills) = (Instant::now(), 0_u32);
    let rounds = scaled(8, 60);
    while kills < rounds {
        if clients.are_done() {
            clients.go_on(&mut crowd.reactor, 16);
        }
        crowd.reactor.turn(Some(Duration::from_millis(5)));
        if began.elapsed() > Duration::from_millis(200) * kills {
            let workers = crowd.pool.statistics().workers;
            let serving = |it: &&WorkerStatistics| it.stage == WorkerStage::Serving;
            if let Some(victim) = workers.iter().find(serving) {
                signal(victim.pid, Signal::KILL);
                kills += 1;
            }
        }
        assert!(began.elapsed() < PATIENCE, "{:?}", crowd.pool.statistics());
    }
    crowd.serve(&clients, |_, _| {});
    // Until it is told of one, it does not know whom that one has cost.
    let (killed, pool) = (Rc::clone(&crowd.killed), crowd.pool.clone());
    run_until_within(PATIENCE, &mut crowd.reactor, &pool, |_| {
        killed.borrow().len() == kills as usize
    });
    drop(pool);
    let log = crowd.log.clone();
    let (_, others) = failed(&clients, &log, &crowd.killed.borrow());
    // Between accept(2) and its note a worker may have one that is not in its account.
    let unnoted = match accepting {
        Accepting::ByWorkers => kills as usize,
        _ => 0,
    };
    Figures::of("T-25")
        .must(
            &format!("{name}: killed, one every 200 ms"),
            kills as usize,
            Bound::AtLeast,
            8,
        )
        .must(
            &format!("{name}: lost beside those that the killed had"),
            others,
            Bound::AtMost,
            unnoted,
        );
    crowd.end(clients);
}

#[test]
fn a_worker_killed_every_short_while_costs_only_its_own() {
    kill_every_short_while(Accepting::ByWorkers, "workers that accept");
}

#[test]
fn a_worker_that_is_passed_connections_and_killed_costs_only_its_own() {
    kill_every_short_while(Accepting::ByPool, "workers that are passed connections");
}

/// What becomes of a stopped worker in the end.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Then {
    GoesOn,
    IsKilled,
}

/// Reliability T-27: a worker is stopped. What waits for it, in its queue or in its
/// channel, is given to others, and another takes its place. The settings are the
/// defaults.
fn stop_one(accepting: Accepting, then: Then, name: &str) {
    let settings = PoolSettings::default().workers(3);
    let mut crowd = Crowd::start_by(accepting, settings, |_| Script::Serve);
    let victim = crowd.pool.statistics().workers[0].pid;
    stop(victim);
    let clients = crowd.clients(scaled(300, 1_600), 8);
    crowd.serve(&clients, |_, _| {});
    let pool = crowd.pool.clone();
    run_until_within(PATIENCE, &mut crowd.reactor, &pool, |_| {
        pool.statistics().recalls == 1
    });
    let statistics = pool.statistics();
    if accepting == Accepting::ByWorkers {
        assert!(statistics.rescued > 0, "nobody came to it: {statistics:?}");
    }
    signal(
        victim,
        match then {
            Then::GoesOn => Signal::CONT,
            Then::IsKilled => Signal::KILL,
        },
    );
    clients.go_on(&mut crowd.reactor, 100);
    crowd.serve(&clients, |_, _| {});
    let log = crowd.log.clone();
    let (failed, _) = failed(&clients, &log, &[]);
    Figures::of("T-27").must(
        &format!("{name}: clients failed"),
        failed,
        Bound::Exactly,
        0,
    );
    drop(pool);
    crowd.end(clients);
}

#[test]
fn the_queue_of_a_stopped_worker_is_served_by_others() {
    stop_one(
        Accepting::ByWorkers,
        Then::GoesOn,
        "a worker that accepts is stopped",
    );
}

#[test]
fn the_queue_of_a_worker_that_hangs_and_is_killed_is_served_by_others() {
    stop_one(
        Accepting::ByWorkers,
        Then::IsKilled,
        "it is stopped, then killed",
    );
}

#[test]
fn what_a_stopped_worker_was_passed_is_served_by_others() {
    stop_one(
        Accepting::ByPool,
        Then::GoesOn,
        "a worker that is passed connections is stopped",
    );
}

#[test]
fn what_a_worker_was_passed_that_hangs_and_is_killed_is_served_by_others() {
    stop_one(
        Accepting::ByPool,
        Then::IsKilled,
        "that one is stopped, then killed",
    );
}

/// It is stopped, goes on, and has not been replaced meanwhile: it serves as before.
#[test]
fn a_worker_that_was_stopped_for_a_moment_goes_on() {
    let mut settings = PoolSettings::default().workers(2);
    settings.ack_timeout = Duration::from_secs(60);
    let mut crowd = Crowd::start(settings, |_| Script::Serve);
    let victim = crowd.pool.statistics().workers[0].pid;
    stop(victim);
    let clients = crowd.clients(60, 8);
    crowd.serve(&clients, |_, _| {});
    signal(victim, Signal::CONT);
    let by_it = || {
        let outcome = clients.outcome.borrow();
        outcome
            .answered
            .values()
            .filter(|by| **by == victim)
            .count()
    };
    let began = Instant::now();
    while by_it() == 0 {
        clients.go_on(&mut crowd.reactor, 8);
        crowd.serve(&clients, |_, _| {});
        assert!(began.elapsed() < PATIENCE, "{:?}", crowd.pool.statistics());
    }
    assert_eq!(clients.outcome.borrow().failed.len(), 0);
    assert_eq!(crowd.pool.statistics().hangs, 0);
    crowd.end(clients);
}

/// The group grows and shrinks while clients come: none is reset.
#[test]
fn a_pool_grows_and_shrinks_without_a_reset() {
    let mut crowd = Crowd::start(settings(2).drain_timeout(Some(PATIENCE)), |_| Script::Serve);
    let total = scaled(1_600, 20_000);
    let clients = crowd.clients(total, 48);
    let sizes = [5, 1, 3, 6, 2];
    let mut changes = 0;
    let outcome = Rc::clone(&clients.outcome);
    crowd.serve(&clients, |reactor, pool| {
        if outcome.borrow().done() > 100 * (changes + 1) && 100 * changes < total as usize - 300 {
            pool.resize(reactor, sizes[changes % sizes.len()]);
            changes += 1;
        }
    });
    assert!(changes > 2 * sizes.len(), "only {changes} changes");
    assert_eq!(clients.outcome.borrow().failed.len(), 0, "reset");
    crowd.pool.resize(&mut crowd.reactor, 2);
    let pool = crowd.pool.clone();
    run_until_within(PATIENCE, &mut crowd.reactor, &pool, |_| {
        let workers = pool.statistics().workers;
        workers.len() == 2 && workers.iter().all(|it| it.stage == WorkerStage::Serving)
    });
    drop(pool);
    let statistics = crowd.end(clients);
    assert_eq!(statistics.deaths, 0, "{statistics:?}");
}

/// A worker at its limit accepts no more; what waits there goes to others.
#[test]
fn the_queue_of_a_full_worker_is_served_by_others() {
    let mut first = true;
    let choose = move |_| match std::mem::replace(&mut first, false) {
        true => Script::Limited(1),
        false => Script::Serve,
    };
    let mut crowd = Crowd::start(settings(2), choose);
    let clients = crowd.clients(400, 32);
    crowd.serve(&clients, |_, _| {});
    assert_eq!(clients.outcome.borrow().failed.len(), 0);
    let statistics = crowd.end(clients);
    assert_eq!(statistics.hangs, 0, "{statistics:?}");
}

/// A service that does not want a connection gives it to others.
#[test]
fn a_connection_that_a_worker_does_not_want_is_served_by_another() {
    let mut first = true;
    let choose = move |_| match std::mem::replace(&mut first, false) {
        true => Script::Refuse,
        false => Script::Serve,
    };
    let mut crowd = Crowd::start(settings(2), choose);
    let clients = crowd.clients(100, 8);
    crowd.serve(&clients, |_, _| {});
    assert_eq!(clients.outcome.borrow().failed.len(), 0);
    let statistics = crowd.end(clients);
    assert!(statistics.refused > 10, "{statistics:?}");
    assert!(statistics.sent >= statistics.refused, "{statistics:?}");
}

/// The listener is closed, then the pool stops: whoever had connected is served.
#[test]
fn whoever_waits_when_a_pool_stops_is_served() {
    let mut crowd = Crowd::start(settings(2), |_| Script::Serve);
    for worker in crowd.pool.statistics().workers {
        stop(worker.pid);
    }
    let clients = crowd.clients(40, 40);
    let connected = |crowd: &mut Crowd| {
        for _ in 0..5 {
            crowd.reactor.turn(Some(Duration::from_millis(5)));
        }
    };
    connected(&mut crowd);
    for worker in crowd.pool.statistics().workers {
        signal(worker.pid, Signal::CONT);
    }
    let pool = crowd.pool.clone();
    let stopped = Rc::new(std::cell::Cell::new(false));
    let told = Rc::clone(&stopped);
    crowd.close_listener();
    pool.stop(&mut crowd.reactor, PATIENCE, move |_| told.set(true));
    run_until_within(PATIENCE, &mut crowd.reactor, &pool, |_| stopped.get());
    crowd.serve(&clients, |_, _| {});
    assert_eq!(clients.outcome.borrow().failed.len(), 0, "{pool:?}");
    drop(pool);
    crowd.end(clients);
}

#[test]
fn a_listener_without_a_group_is_refused_and_says_so() {
    let ledger = DescriptorLedger::open();
    let directory = tempfile::tempdir().expect("a temporary directory");
    let mut reactor = Reactor::new().expect("epoll");
    let settings = settings(1).accepting(Accepting::ByWorkers);
    let log = PathBuf::from("/dev/null");
    let pool = Pool::start(&mut reactor, settings, scripted(log, |_| Script::Serve));
    let path = directory.path().join("socket");
    let refused = reactor.accept(Unix::at(&path), pool.acceptor(0));
    let error = io::Error::from(refused.expect_err("it has no group"));
    assert_eq!(error.kind(), io::ErrorKind::Unsupported);
    let said = error.to_string();
    assert!(said.ends_with("on TCP only"), "{said}");
    turn_until_serving(&mut reactor, &pool);
    end(&mut reactor, &pool);
    drop((pool, reactor));
    ledger.assert_balanced();
}
