//! Whoever dies, at whatever step: nothing is lost that was not taken, and
//! nothing is served twice.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant};

use bowline::handoff::pool::{Pool, PoolEvent, PoolStatistics, WorkerId, WorkerStage};
use bowline::{Reactor, Transports};

use super::clients::{Clients, listen};
use super::process::{Script, accounts, end, scripted, served, settings, stop};
use crate::support::DescriptorLedger;
use crate::support::figures::{Bound, Figures, scaled};

/// How long all of one test may take.
const PATIENCE: Duration = Duration::from_secs(600);

/// How many workers there are: as many as can die at a time.
const WORKERS: usize = 4;

#[derive(Debug, Default)]
struct Seen {
    connections: usize,
    answered: usize,
    failed: usize,
    /// Of them, those whom no worker had that died.
    failed_without_a_death: usize,
    /// And how many more there are than dead ones had answered for, and not finished.
    failed_unanswered: usize,
    /// More than once from the first byte on.
    served_twice: usize,
    statistics: PoolStatistics,
}

/// Lets `connections` clients come, and more until `deaths` workers have died as
/// their scripts, and `meddle`, say; then has everything end.
fn run(
    connections: u32,
    deaths: u64,
    choose: impl FnMut(u64) -> Script + 'static,
    meddle: impl FnMut(&mut Reactor, &Pool, usize),
) -> Seen {
    run_with(connections, deaths, choose, |_, _| {}, meddle)
}

/// As [`run`]; `ready` is told of every worker before it gets anything.
fn run_with(
    connections: u32,
    deaths: u64,
    choose: impl FnMut(u64) -> Script + 'static,
    ready: impl FnMut(WorkerId, u32) + 'static,
    mut meddle: impl FnMut(&mut Reactor, &Pool, usize),
) -> Seen {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let log = directory.path().join("served");
    let mut reactor = Reactor::new().unwrap();
    let mut choose = choose;
    let mut started = 0;
    let choose = move |_| {
        started += 1;
        choose(started)
    };
    let spawn = scripted(PathBuf::from(&log), choose);
    let pool = Pool::start(&mut reactor, settings(WORKERS), spawn);
    let (unclean, answered_for, killed) = watch(&pool, ready);
    let addresses = listen(&mut reactor, &pool);
    let clients = Clients::start(&mut reactor, addresses, connections, 32);
    let began = Instant::now();
    while !clients.are_done() || pool.statistics().deaths < deaths {
        if clients.are_done() {
            clients.go_on(&mut reactor, 32);
        }
        reactor.turn(Some(Duration::from_millis(20)));
        meddle(&mut reactor, &pool, clients.outcome.borrow().done());
        assert!(began.elapsed() < PATIENCE, "{:?}", pool.statistics());
    }
    end(&mut reactor, &pool);
    assert_eq!(reactor.descriptor_counts().unclaimed, 0);
    assert_eq!(unclean.get(), 0, "workers that leaked, or failed");
    let outcome = clients.outcome.borrow();
    let mut seen = Seen {
        connections: clients.total() as usize,
        answered: outcome.answered.len(),
        failed: outcome.failed.len(),
        served_twice: twice(&log),
        failed_without_a_death: 0,
        failed_unanswered: 0,
        statistics: pool.statistics(),
    };
    // Whoever was answered was answered by the one that has noted it.
    let served: BTreeMap<u32, u32> = served(&log).into_iter().collect();
    for (number, process) in &outcome.answered {
        assert_eq!(served.get(number), Some(process));
    }
    // Whoever failed was a dead one's, and was lost with it.
    let (accounts, killed) = (accounts(&log), killed.borrow());
    let dead = || killed.iter().filter_map(|process| accounts.get(process));
    for port in outcome.failed.values() {
        let is_of_dead = dead().any(|account| account.held.contains(port));
        seen.failed_without_a_death += usize::from(!is_of_dead);
    }
    let answered_for = answered_for.borrow();
    let taken: u64 = killed.iter().filter_map(|it| answered_for.get(it)).sum();
    let live = taken - dead().map(|account| account.over).sum::<u64>();
    seen.failed_unanswered = seen.failed.saturating_sub(live as usize);
    seen
}

/// Ends that are not as they should be; how many connections each worker had answered for
/// when its channel ended; who was killed. By process.
#[expect(clippy::type_complexity, reason = "named where it is taken apart")]
fn watch(
    pool: &Pool,
    mut ready: impl FnMut(WorkerId, u32) + 'static,
) -> (
    Rc<Cell<usize>>,
    Rc<RefCell<BTreeMap<u32, u64>>>,
    Rc<RefCell<Vec<u32>>>,
) {
    let unclean = Rc::new(Cell::new(0));
    let answered_for = Rc::<RefCell<BTreeMap<_, _>>>::default();
    let killed = Rc::<RefCell<Vec<_>>>::default();
    let (seen, of_lost, of_killed) = (unclean.clone(), answered_for.clone(), killed.clone());
    pool.on_event(move |_, event| match event {
        PoolEvent::Ready { worker, pid } => ready(worker, pid),
        PoolEvent::Lost {
            pid, acknowledged, ..
        } => {
            of_lost.borrow_mut().insert(pid, acknowledged);
        }
        PoolEvent::Exited { pid, status, .. } => match status {
            Some(status) if status.signal().is_some() => of_killed.borrow_mut().push(pid),
            status => {
                let is_clean = status.is_none_or(|status| status.success());
                seen.set(seen.get() + usize::from(!is_clean));
            }
        },
        _ => {}
    });
    (unclean, answered_for, killed)
}

fn twice(log: &Path) -> usize {
    let mut times = BTreeMap::new();
    for (number, _) in served(log) {
        *times.entry(number).or_insert(0_usize) += 1;
    }
    times.values().filter(|times| **times > 1).count()
}

impl Seen {
    /// Everybody was answered, once, although so many workers died.
    fn expect_nothing_lost(&self, figures: Figures, step: &str) {
        figures
            .must(
                &format!("lost, killed {step}"),
                self.failed,
                Bound::Exactly,
                0,
            )
            .must(
                &format!("served twice, killed {step}"),
                self.served_twice,
                Bound::Exactly,
                0,
            );
        self.expect_one_answer_each();
    }

    /// Each connection was taken by exactly one worker, and ended with it, if it was not
    /// answered; nobody else died.
    fn expect_one_answer_each(&self) {
        assert_eq!(self.failed_without_a_death, 0, "others' too: {self:?}");
        assert_eq!(self.failed_unanswered, 0, "not answered for: {self:?}");
        let statistics = &self.statistics;
        assert_eq!(statistics.acknowledged, self.connections as u64, "{self:?}");
        assert_eq!(
            statistics.sent,
            statistics.acknowledged + statistics.resent,
            "{self:?}"
        );
        assert_eq!(statistics.undelivered, 0, "{self:?}");
        assert_eq!(self.answered + self.failed, self.connections);
    }
}

/// A number that differs from worker to worker, from 1 to `most`.
fn spread(worker: u64, most: u32) -> u32 {
    1 + (worker.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as u32 % most
}

/// Reliability T-25: of connections that a worker had not answered for, none is
/// lost by its death, and none is served twice.
#[test]
fn workers_killed_before_they_answer_cost_no_connection() {
    let ledger = DescriptorLedger::open();
    let figures = Figures::of("T-25");
    let connections = scaled(150, 2_500);
    let wanted = scaled(10, 300);

    let enough = |deaths: u64, script: Script| {
        move |worker: u64| {
            // The last ones see it to its end.
            if worker <= deaths {
                script
            } else {
                Script::Serve
            }
        }
    };
    // Received, and not registered.
    let seen = run(
        connections,
        wanted,
        move |worker| {
            let script = Script::DieBeforeRegistering(spread(worker, 9));
            enough(wanted, script)(worker)
        },
        |_, _, _| {},
    );
    seen.expect_nothing_lost(figures, "before it registers");
    let mut kills = seen.statistics.deaths;
    assert_eq!(kills, wanted, "only those that were to die");

    // Stopped when it begins, so that what it is given stays in its socket; then
    // killed. Clients come until that has happened to all that were stopped.
    let left = Cell::new(wanted);
    let stopped = Rc::new(RefCell::new(Vec::new()));
    let to_kill = Rc::clone(&stopped);
    let seen = run_with(
        connections,
        wanted,
        |_| Script::Serve,
        move |worker, pid| {
            if left.get() > 0 {
                left.set(left.get() - 1);
                stop(pid);
                to_kill.borrow_mut().push(worker);
            }
        },
        move |_, pool, _| {
            let workers = pool.statistics().workers;
            stopped.borrow_mut().retain(|id| {
                let worker = workers.iter().find(|worker| worker.id == *id);
                let has_some = worker.is_some_and(|worker| worker.in_flight > 0);
                if has_some {
                    pool.kill(*id);
                }
                !has_some
            });
        },
    );
    seen.expect_nothing_lost(figures, "before it receives");
    assert_eq!(
        seen.statistics.deaths, wanted,
        "only those that were to die"
    );
    kills += seen.statistics.deaths;
    figures
        .must(
            "connections",
            2 * connections as usize,
            Bound::AtLeast,
            scaled(300, 5_000),
        )
        .must(
            "workers killed before they answered",
            kills as usize,
            Bound::AtLeast,
            scaled(20, 600),
        );
    ledger.assert_balanced();
}

/// Reliability T-25: a worker that has answered takes its own connections with
/// it, and no others.
#[test]
fn workers_killed_after_they_answered_cost_their_own_connections_only() {
    let ledger = DescriptorLedger::open();
    let figures = Figures::of("T-25");
    let connections = scaled(150, 1_250);
    let wanted = scaled(10, 125);
    type Make = fn(u32) -> Script;
    let steps: [(&str, Make); 2] = [
        ("after it answered", Script::DieAfterAnswering),
        ("inside of a request", Script::DieInsideRequest),
    ];
    for (step, make) in steps {
        let seen = run(
            connections,
            wanted,
            move |worker| {
                if worker <= wanted {
                    make(spread(worker, 9))
                } else {
                    Script::Serve
                }
            },
            |_, _, _| {},
        );
        let deaths = seen.statistics.deaths as usize;
        // The one that it died of, at least.
        figures
            .must(
                &format!("workers killed {step}"),
                deaths,
                Bound::Exactly,
                wanted as usize,
            )
            .must(
                &format!("lost, killed {step}, of those that died"),
                seen.failed,
                Bound::AtLeast,
                deaths,
            )
            .must(
                &format!("lost, killed {step}, of others"),
                seen.failed_without_a_death,
                Bound::Exactly,
                0,
            )
            .must(
                &format!("lost, killed {step}, and not answered for"),
                seen.failed_unanswered,
                Bound::Exactly,
                0,
            )
            .must(
                &format!("served twice, killed {step}"),
                seen.served_twice,
                Bound::Exactly,
                0,
            );
        seen.expect_one_answer_each();
    }
    ledger.assert_balanced();
}

/// Reliability T-25: at any moment.
#[test]
fn workers_killed_at_random_times_cost_nothing_that_was_not_theirs() {
    let ledger = DescriptorLedger::open();
    let connections = scaled(300, 2_500);
    let every = 10;
    let killed = Rc::new(Cell::new(0));
    let kills = Rc::clone(&killed);
    let deaths = scaled(20, 150);
    let seen = run(
        connections,
        deaths,
        |_| Script::Serve,
        |_, pool, done| {
            let killed = kills.get();
            if done / every > killed {
                let workers = pool.statistics().workers;
                let serving: Vec<_> = workers
                    .iter()
                    .filter(|worker| worker.stage == WorkerStage::Serving)
                    .collect();
                if serving.len() > 1 {
                    kills.set(killed + 1);
                    pool.kill(serving[(killed + 1) % serving.len()].id);
                }
            }
        },
    );
    Figures::of("T-25")
        .must(
            "workers killed at random times",
            seen.statistics.deaths as usize,
            Bound::AtLeast,
            deaths as usize,
        )
        .must(
            "of them not by the test",
            (seen.statistics.deaths as usize).saturating_sub(killed.get()),
            Bound::Exactly,
            0,
        )
        .must(
            "lost, killed at random times, of others",
            seen.failed_without_a_death,
            Bound::Exactly,
            0,
        )
        .must(
            "lost, killed at random times, and not answered for",
            seen.failed_unanswered,
            Bound::Exactly,
            0,
        )
        .must(
            "served twice, killed at random times",
            seen.served_twice,
            Bound::Exactly,
            0,
        );
    // Each is somebody's, exactly once; what failed was a dead one's.
    seen.expect_one_answer_each();
    ledger.assert_balanced();
}
