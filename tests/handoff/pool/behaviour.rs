//! What pools and workers do with connections, in all cases but death.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream as StdTcpStream};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use bowline::Tcp;
use bowline::handoff::channel::Role;
use bowline::handoff::pool::{
    Candidate, FromWorker, LeastLoaded, Live, Offer, Orphans, PassedConnection, Pool, PoolSettings,
    Spawned, ToWorker, Undelivered, Worker, WorkerId, WorkerRefusal, WorkerSettings, WorkerStage,
};
use bowline::policies::Backoff;
use bowline::{AnyConnection as _, Context, Protocol, Reactor, TcpStream, Transport, Transports};
use tempfile::TempDir;

use super::clients::{Clients, listen};
use super::process::{
    Script, end, expect_clean_exits, scripted, served, settings, stop, turn_until,
    turn_until_serving,
};
use super::raw::{Raw, dispatch, refused, tcp_pair, wrong_kinds};
use crate::support::{DescriptorLedger, row, run_until, run_until_quiet, socketpair};

/// Echoes; for workers in the test's own process.
struct Echo {
    _live: Live,
}

impl Protocol<TcpStream> for Echo {
    fn data_received(&mut self, cx: &mut Context<'_, TcpStream>, data: &[u8]) {
        cx.transport.write(data);
    }
}

fn echo(reactor: &mut Reactor, connection: PassedConnection, live: Live) {
    connection
        .adopt(reactor, Tcp, Echo { _live: live })
        .expect("connected");
}

/// A worker in this process, and the other end of its channel.
fn worker(reactor: &mut Reactor, settings: WorkerSettings) -> (Worker, Raw) {
    let (ours, theirs) = socketpair();
    let worker = Worker::start(reactor, ours, settings, echo).expect("a channel");
    (worker, Raw::new(theirs, Role::DISPATCHER))
}

/// What the worker says next.
fn answers(reactor: &mut Reactor, raw: &mut Raw, count: usize) -> Vec<FromWorker> {
    let mut all = Vec::new();
    run_until(reactor, |_| {
        all.extend(raw.receive().unwrap_or_default());
        all.len() >= count
    });
    all
}

fn try_read(client: &StdTcpStream) -> Option<Vec<u8>> {
    client.set_nonblocking(true).expect("a socket");
    let mut bytes = [0; 100];
    match (&*client).read(&mut bytes) {
        Ok(count) => Some(bytes[..count].to_vec()),
        Err(error) if error.kind() == ErrorKind::WouldBlock => None,
        Err(error) => panic!("{error}"),
    }
}

fn expect_echo(reactor: &mut Reactor, client: &StdTcpStream, wanted: &[u8]) {
    let mut got = Vec::new();
    run_until(reactor, |_| {
        got.extend(try_read(client).unwrap_or_default());
        got.len() >= wanted.len()
    });
    assert_eq!(got, wanted);
}

#[test]
fn what_is_no_connection_is_refused_and_the_worker_goes_on() {
    let _ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let (worker, mut raw) = worker(&mut reactor, WorkerSettings::default());
    let mut id = 0;
    for (name, fd) in wrong_kinds() {
        id += 1;
        raw.send(&dispatch(id, b""), &[fd.as_fd()]).unwrap();
        assert_eq!(
            answers(&mut reactor, &mut raw, 1),
            [refused(id, WorkerRefusal::WrongKind, 0)],
            "{name}"
        );
    }
    let (client, accepted) = tcp_pair();
    let two = [accepted.as_fd(), accepted.as_fd()];
    raw.send(&dispatch(100, b""), &two).unwrap();
    raw.send(&dispatch(101, b""), &[]).unwrap();
    raw.send(&dispatch(102, b"first "), &two[..1]).unwrap();
    drop(accepted);
    let said = answers(&mut reactor, &mut raw, 3);
    let wrong = |id| refused(id, WorkerRefusal::WrongKind, 0);
    let taken = FromWorker::Accepted { id: 102, live: 1 };
    assert_eq!(said, [wrong(100), wrong(101), taken]);
    (&client).write_all(b"second").unwrap();
    expect_echo(&mut reactor, &client, b"first second");
    // It says when there is none any more.
    drop(client);
    assert_eq!(
        answers(&mut reactor, &mut raw, 1),
        [FromWorker::Load { live: 0 }]
    );
    assert_eq!(worker.live(), 0);
}

/// The pool must know before anything happens to a connection: as long as the
/// answer cannot leave, the connection is not touched.
#[test]
fn a_connection_is_not_begun_before_the_answer_has_left() {
    let _ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let (ours, theirs) = socketpair();
    rustix::net::sockopt::set_socket_send_buffer_size(&ours, 1).unwrap();
    let settings = WorkerSettings::default();
    let worker = Worker::start(&mut reactor, ours, settings, echo).unwrap();
    let mut raw = Raw::new(theirs, Role::DISPATCHER);
    // Answers that nobody reads fill its channel.
    for id in 0..200 {
        raw.send(&dispatch(id, b""), &[]).unwrap();
        reactor.turn(Some(Duration::ZERO));
    }
    let (client, accepted) = tcp_pair();
    raw.send(&dispatch(1_000, b"read "), &[accepted.as_fd()])
        .unwrap();
    (&client).write_all(b"sent").unwrap();
    run_until(&mut reactor, |_| worker.live() == 1);
    for _ in 0..50 {
        reactor.turn(Some(Duration::from_millis(1)));
    }
    assert_eq!(try_read(&client), None);
    // Its bytes are where they were.
    let mut bytes = [0; 4];
    let std = StdTcpStream::from(accepted.try_clone().unwrap());
    assert_eq!(std.peek(&mut bytes).unwrap(), 4);

    let said = answers(&mut reactor, &mut raw, 201);
    assert_eq!(said.len(), 201);
    assert!(matches!(said[200], FromWorker::Accepted { id: 1_000, .. }));
    drop((accepted, std));
    expect_echo(&mut reactor, &client, b"read sent");
}

#[test]
fn connections_that_could_not_be_answered_are_served_or_closed_as_asked() {
    let _ledger = DescriptorLedger::open();
    for orphans in [Orphans::Serve, Orphans::Close] {
        let _row = row(orphans);
        let mut reactor = Reactor::new().unwrap();
        let mut settings = WorkerSettings::default();
        settings.orphans = orphans;
        let (_worker, raw) = worker(&mut reactor, settings);
        let (client, accepted) = tcp_pair();
        raw.send(&dispatch(1, b"alone"), &[accepted.as_fd()])
            .unwrap();
        // Gone with everything in its channel.
        drop((raw, accepted));
        match orphans {
            Orphans::Serve => expect_echo(&mut reactor, &client, b"alone"),
            _ => run_until(&mut reactor, |_| try_read(&client) == Some(Vec::new())),
        }
    }
}

#[test]
fn a_draining_worker_serves_what_it_has_refuses_the_rest_and_ends() {
    let _ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let (_worker, mut raw) = worker(&mut reactor, WorkerSettings::default());
    let (client, accepted) = tcp_pair();
    raw.send(&dispatch(1, b""), &[accepted.as_fd()]).unwrap();
    raw.send(&ToWorker::Drain { within_ms: 60_000 }, &[])
        .unwrap();
    let said = answers(&mut reactor, &mut raw, 1);
    assert!(matches!(said[..], [FromWorker::Accepted { id: 1, .. }]));
    run_until_quiet(&mut reactor);
    raw.send(&dispatch(2, b""), &[accepted.as_fd()]).unwrap();
    let said = answers(&mut reactor, &mut raw, 1);
    assert_eq!(said, [refused(2, WorkerRefusal::Draining, 1)]);
    drop(accepted);
    (&client).write_all(b"still").unwrap();
    expect_echo(&mut reactor, &client, b"still");
    drop(client);
    run_until(&mut reactor, |_| raw.receive().is_none());
}

/// A pool over worker processes, two listeners, and clients that are all done.
fn serve(
    log: &Path,
    settings: PoolSettings,
    choose: impl FnMut(u64) -> Script + 'static,
    clients: u32,
) -> (Reactor, Pool, Clients) {
    let mut choose = choose;
    let mut started = 0;
    let choose = move |_| {
        started += 1;
        choose(started)
    };
    let mut reactor = Reactor::new().unwrap();
    let pool = Pool::start(&mut reactor, settings, scripted(PathBuf::from(log), choose));
    let addresses = listen(&mut reactor, &pool);
    let clients = Clients::start(&mut reactor, addresses, clients, 16);
    turn_until(&mut reactor, &pool, |_| clients.are_done());
    (reactor, pool, clients)
}

/// Where what was served is noted.
fn log() -> (DescriptorLedger, TempDir, PathBuf) {
    let ledger = DescriptorLedger::open();
    let directory = tempfile::tempdir().unwrap();
    let log = directory.path().join("served");
    (ledger, directory, log)
}

/// No worker ever comes.
fn nobody(_: &mut Reactor, _: WorkerId) -> io::Result<Spawned> {
    Err(ErrorKind::NotFound.into())
}

/// Gives the pool a connection under this label; its client.
fn give(reactor: &mut Reactor, pool: &Pool, label: u32) -> StdTcpStream {
    let (client, accepted) = tcp_pair();
    let mut connection = PassedConnection::new(accepted);
    connection.label = label;
    pool.dispatch(reactor, connection);
    client
}

/// What nobody took, by its label, and why.
fn undelivered(pool: &Pool) -> Rc<RefCell<Vec<(u32, Undelivered)>>> {
    let told = Rc::default();
    let seen: Rc<RefCell<Vec<_>>> = Rc::clone(&told);
    pool.on_undelivered(move |_, connection, why| seen.borrow_mut().push((connection.label, why)));
    told
}

#[test]
fn connections_go_round_and_workers_end_with_what_they_began_with() {
    let (_ledger, _directory, log) = log();
    let (mut reactor, pool, clients) = serve(&log, settings(3), |_| Script::Serve, 90);
    let unclean = expect_clean_exits(&pool, |_, _| {});
    let mut each = BTreeMap::new();
    for by in clients.outcome.borrow().answered.values() {
        *each.entry(*by).or_insert(0) += 1;
    }
    assert_eq!(each.values().sum::<u32>(), 90);
    assert_eq!(served(&log).len(), 90);
    let statistics = pool.statistics();
    assert_eq!(statistics.acknowledged, 90);
    assert_eq!((statistics.waiting, statistics.in_flight), (0, 0));
    end(&mut reactor, &pool);
    assert_eq!(unclean.get(), 0);
    assert_eq!(pool.statistics().workers, []);
}

#[test]
fn what_one_worker_refuses_another_gets() {
    let (_ledger, _directory, log) = log();
    let mut refusing = Some(Script::Refuse);
    let choose = move |_| refusing.take().unwrap_or(Script::Serve);
    let mut reactor = Reactor::new().unwrap();
    let pool = Pool::start(&mut reactor, settings(2), scripted(log, choose));
    turn_until_serving(&mut reactor, &pool);
    let addresses = listen(&mut reactor, &pool);
    let clients = Clients::start(&mut reactor, addresses, 40, 16);
    turn_until(&mut reactor, &pool, |_| clients.are_done());
    assert_eq!(clients.outcome.borrow().answered.len(), 40);
    let statistics = pool.statistics();
    assert!(statistics.refused > 0, "{statistics:?}");
    assert_eq!(statistics.sent, statistics.refused + 40);
    assert_eq!(statistics.undelivered, 0);
    end(&mut reactor, &pool);
}

#[test]
fn what_everybody_refuses_goes_to_nobody_twice_and_may_be_served_here() {
    let (_ledger, _directory, log) = log();
    let mut reactor = Reactor::new().unwrap();
    let pool = Pool::start(&mut reactor, settings(2), scripted(log, |_| Script::Refuse));
    let reasons = Rc::new(RefCell::new(Vec::new()));
    let seen = Rc::clone(&reasons);
    pool.on_undelivered(move |reactor, connection, why| {
        seen.borrow_mut().push(why);
        connection.adopt(reactor, Tcp, Here).expect("connected");
    });
    let addresses = listen(&mut reactor, &pool);
    // The second listener's come with what was read of them.
    let clients = Clients::start(&mut reactor, addresses, 10, 10);
    turn_until(&mut reactor, &pool, |_| clients.are_done());
    assert_eq!(clients.outcome.borrow().answered.len(), 10);
    assert_eq!(
        *reasons.borrow(),
        [Undelivered::Refused(WorkerRefusal::Unwanted); 10]
    );
    assert_eq!(pool.statistics().refused, 20);
    end(&mut reactor, &pool);
}

/// Answers as workers do, with process 0.
struct Here;

impl Protocol<TcpStream> for Here {
    fn data_received(&mut self, cx: &mut Context<'_, TcpStream>, data: &[u8]) {
        let mut answer = data.trim_ascii_end().to_vec();
        answer.extend_from_slice(b" 0\n");
        cx.transport.write(&answer);
        cx.transport.lose_connection();
    }
}

#[test]
fn full_workers_pause_the_listener_and_nobody_is_dropped() {
    let (_ledger, _directory, log) = log();
    let mut reactor = Reactor::new().unwrap();
    let mut settings = settings(1);
    settings.window = 2;
    let spawn = scripted(PathBuf::from(&log), |_| Script::Serve);
    let pool = Pool::start(&mut reactor, settings, spawn);
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    let listener = reactor.accept(Tcp::at(any), pool.acceptor(0)).unwrap();
    let address = reactor.get(listener).unwrap().address().as_inet().unwrap();
    let clients = Clients::start(&mut reactor, vec![address], 100, 100);
    // Nobody is ready yet: they wait in the kernel.
    run_until(&mut reactor, |_| pool.statistics().is_paused);
    assert_eq!(pool.statistics().waiting, 0);
    let mut most = 0;
    turn_until(&mut reactor, &pool, |_| {
        let statistics = pool.statistics();
        most = most.max(statistics.in_flight + statistics.waiting);
        clients.are_done()
    });
    assert_eq!(clients.outcome.borrow().answered.len(), 100);
    // The window, and one that was on its way when it filled.
    assert!(most <= 3, "{most}");
    end(&mut reactor, &pool);
}

#[test]
fn what_finds_no_room_or_waits_too_long_is_undelivered() {
    let _ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let mut settings = settings(1);
    settings.queue = 2;
    settings.queue_timeout = Duration::from_millis(50);
    settings.backoff = Backoff::new()
        .first(Duration::from_secs(3_600))
        .jitter(bowline::policies::Jitter::None);
    let pool = Pool::start(&mut reactor, settings, nobody);
    assert!(!pool.has_room(&reactor));
    let reasons = undelivered(&pool);
    let clients = [0, 1, 2].map(|label| give(&mut reactor, &pool, label));
    let (_client, accepted) = tcp_pair();
    let mut connection = PassedConnection::new(accepted);
    connection.label = 3;
    connection.read = vec![0; 2 << 20];
    pool.dispatch(&mut reactor, connection);
    run_until(&mut reactor, |_| reasons.borrow().len() == 4);
    assert_eq!(
        *reasons.borrow(),
        [
            (2, Undelivered::QueueFull),
            (3, Undelivered::TooLong),
            (0, Undelivered::WaitedTooLong),
            (1, Undelivered::WaitedTooLong),
        ]
    );
    // Dropped by the handler, and so closed.
    run_until(&mut reactor, |_| {
        clients.iter().all(|client| try_read(client).is_some())
    });
}

#[test]
fn workers_that_never_become_ready_are_started_again_with_growing_waits() {
    let (_ledger, _directory, log) = log();
    // The first five end before they say hello.
    let choose = |worker| {
        if worker <= 5 {
            Script::NeverReady
        } else {
            Script::Serve
        }
    };
    let (mut reactor, pool, clients) = serve(&log, settings(1), choose, 10);
    assert_eq!(clients.outcome.borrow().answered.len(), 10);
    let statistics = pool.statistics();
    assert_eq!((statistics.started, statistics.deaths), (6, 5));
    end(&mut reactor, &pool);
}

#[test]
fn a_retired_worker_is_replaced_and_costs_no_connection() {
    let (_ledger, _directory, log) = log();
    let mut reactor = Reactor::new().unwrap();
    let spawn = scripted(PathBuf::from(&log), |_| Script::Serve);
    let pool = Pool::start(&mut reactor, settings(2), spawn);
    let unclean = expect_clean_exits(&pool, |_, _| {});
    let addresses = listen(&mut reactor, &pool);
    let clients = Clients::start(&mut reactor, addresses, 400, 16);
    let mut retired = 0;
    turn_until(&mut reactor, &pool, |reactor| {
        let done = clients.outcome.borrow().done();
        if retired < 3
            && done >= (retired + 1) * 100
            && let Some(oldest) = pool
                .statistics()
                .workers
                .iter()
                .find(|worker| worker.stage == WorkerStage::Serving)
        {
            pool.retire(reactor, oldest.id, Duration::from_secs(30));
            retired += 1;
        }
        clients.are_done()
    });
    assert_eq!(clients.outcome.borrow().answered.len(), 400);
    let statistics = pool.statistics();
    assert_eq!(statistics.deaths, 0, "{statistics:?}");
    assert_eq!(statistics.started as usize, 2 + retired);
    end(&mut reactor, &pool);
    assert_eq!(unclean.get(), 0);
}

#[test]
fn a_limited_worker_gets_more_once_it_has_fewer() {
    let (_ledger, _directory, log) = log();
    let choose = |worker| {
        if worker == 1 {
            Script::Limited(2)
        } else {
            Script::Serve
        }
    };
    let (mut reactor, pool, clients) = serve(&log, settings(2), choose, 100);
    assert_eq!(clients.outcome.borrow().answered.len(), 100);
    assert_eq!(pool.statistics().undelivered, 0);
    end(&mut reactor, &pool);
}

/// What the policy says goes, and what it sees is what was said of the
/// connection.
#[test]
fn a_policy_of_ones_own_sees_the_connection_and_chooses() {
    let (_ledger, _directory, log) = log();
    let mut reactor = Reactor::new().unwrap();
    let read = Rc::new(Cell::new(0));
    let seen = Rc::clone(&read);
    // Odd numbers to the first, even ones to the last: by what was read.
    let policy = move |offer: &Offer<'_>, candidates: &[Candidate]| {
        let text = std::str::from_utf8(offer.read).ok()?.trim_end();
        let number: usize = text.parse().ok()?;
        seen.set(seen.get() + 1);
        if candidates.len() < 2 {
            return None; // not before both are there
        }
        Some((number / 2) % 2)
    };
    let spawn = scripted(PathBuf::from(&log), |_| Script::Serve);
    let pool = Pool::with_policy(&mut reactor, settings(2), policy, spawn);
    let addresses = listen(&mut reactor, &pool);
    // Only the listener that reads, so that there is something to see.
    let clients = Clients::start(&mut reactor, vec![addresses[1]], 40, 8);
    turn_until(&mut reactor, &pool, |_| clients.are_done());
    let outcome = clients.outcome.borrow();
    let by: Vec<Vec<u32>> = (0..2)
        .map(|half| {
            let of_half = outcome
                .answered
                .iter()
                .filter(|(number, _)| (*number / 2) % 2 == half);
            let mut by: Vec<u32> = of_half.map(|(_, by)| *by).collect();
            by.dedup();
            by
        })
        .collect();
    assert_eq!((by[0].len(), by[1].len()), (1, 1), "{by:?}");
    assert_ne!(by[0], by[1]);
    assert!(read.get() >= 40);
    drop(outcome);
    end(&mut reactor, &pool);
}

/// With connections that stay, the one with the fewest gets the next, and what
/// ends is known.
#[test]
fn the_least_loaded_gets_the_next() {
    let (_ledger, _directory, log) = log();
    let mut reactor = Reactor::new().unwrap();
    let spawn = scripted(PathBuf::from(&log), |_| Script::Serve);
    let pool = Pool::with_policy(&mut reactor, settings(2), LeastLoaded::new(), spawn);
    turn_until_serving(&mut reactor, &pool);
    let mut clients = Vec::new();
    let live = |pool: &Pool| -> Vec<u32> {
        let workers = pool.statistics().workers;
        workers.iter().map(|worker| worker.live).collect()
    };
    for count in 1..=6 {
        clients.push(give(&mut reactor, &pool, 0));
        turn_until(&mut reactor, &pool, |_| {
            live(&pool).iter().sum::<u32>() == count
        });
    }
    assert_eq!(live(&pool), [3, 3]);
    // The first worker's go: it was given every other one.
    let mut left = clients.drain(..).enumerate();
    let kept: Vec<_> = left.by_ref().filter(|(place, _)| place % 2 == 1).collect();
    drop(left);
    turn_until(&mut reactor, &pool, |_| {
        live(&pool).iter().sum::<u32>() == 3
    });
    let idle = live(&pool).iter().position(|live| *live == 0);
    let idle = idle.expect("one has none");
    let more = [(); 3].map(|()| give(&mut reactor, &pool, 0));
    turn_until(&mut reactor, &pool, |_| live(&pool)[idle] == 3);
    drop((kept, more));
    end(&mut reactor, &pool);
}

/// What a worker had not taken when it died is nobody's any more once the pool
/// is stopping: it is told at once, and the stop does not wait for its deadline.
#[test]
fn a_stopping_pool_does_not_wait_for_what_nobody_can_take() {
    let (_ledger, _directory, log) = log();
    let mut reactor = Reactor::new().unwrap();
    let pool = Pool::start(&mut reactor, settings(1), scripted(log, |_| Script::Serve));
    let told = undelivered(&pool);
    turn_until(&mut reactor, &pool, |reactor| pool.has_room(reactor));
    let worker = pool.statistics().workers[0].clone();
    stop(worker.pid);
    let _client = give(&mut reactor, &pool, 7);
    let stopped = Rc::new(Cell::new(false));
    let done = Rc::clone(&stopped);
    pool.stop(&mut reactor, Duration::from_secs(3_600), move |_| {
        done.set(true)
    });
    turn_until(&mut reactor, &pool, |_| {
        pool.statistics().workers[0].stage == WorkerStage::Draining
    });
    pool.kill(worker.id);
    turn_until(&mut reactor, &pool, |_| stopped.get());
    assert_eq!(*told.borrow(), [(7, Undelivered::Stopped)]);
}

/// While there is nobody to serve them, clients wait, even if somebody who knows nothing
/// of the pool resumes its listener: a restart that takes over, or the program.
#[test]
fn a_listener_that_is_resumed_waits_for_room_all_the_same() {
    let _ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let mut settings = PoolSettings::default();
    settings.queue = 0;
    let pool = Pool::start(&mut reactor, settings, nobody);
    let any = ([127, 0, 0, 1], 0).into();
    let listener = reactor
        .accept(Tcp::at(any), pool.acceptor(0))
        .expect("listens");
    run_until_quiet(&mut reactor);
    let it = reactor.get(listener).expect("it listens");
    let address = it.address().as_inet().expect("TCP");
    it.pause_accepting();
    it.resume_accepting();
    let clients: Vec<_> = (0..5)
        .map(|_| StdTcpStream::connect(address).expect("it listens"))
        .collect();
    run_until_quiet(&mut reactor);
    assert_eq!(pool.statistics().undelivered, 0, "none was accepted");
    drop(clients);
}

/// The handler of what nobody took panics: those that wait behind are handled by it all
/// the same.
#[test]
fn a_handler_that_panics_costs_one_connection() {
    let _ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let mut settings = PoolSettings::default();
    settings.workers = 1;
    settings.queue = 0;
    let pool = Pool::start(&mut reactor, settings, nobody);
    let told = Rc::new(RefCell::new(Vec::new()));
    let seen = Rc::clone(&told);
    pool.on_undelivered(move |_, connection, _| {
        seen.borrow_mut().push(connection.label);
        assert!(connection.label % 2 == 1, "a panic that is meant");
    });
    let mut clients = [0, 1, 2, 3].map(|label| give(&mut reactor, &pool, label));
    run_until(&mut reactor, |_| told.borrow().len() == 4);
    assert_eq!(*told.borrow(), [0, 1, 2, 3]);
    for client in &mut clients {
        assert_eq!(client.read(&mut [0; 1]).expect("an end"), 0);
    }
}

/// A policy that panics costs the connection that it looked at, and no other.
#[test]
fn a_policy_that_panics_costs_one_connection() {
    let (_ledger, _directory, log) = log();
    let mut reactor = Reactor::new().unwrap();
    let policy = |offer: &Offer<'_>, _: &[Candidate]| {
        assert_ne!(offer.label, 1, "as the test wants it");
        Some(0)
    };
    let spawn = scripted(log, |_| Script::Serve);
    let pool = Pool::with_policy(&mut reactor, settings(1), policy, spawn);
    // All of them wait for the worker.
    let clients = [0, 1, 2, 3].map(|label| give(&mut reactor, &pool, label));
    turn_until(&mut reactor, &pool, |_| pool.statistics().acknowledged == 3);
    run_until(&mut reactor, |_| try_read(&clients[1]) == Some(Vec::new()));
    assert_eq!(reactor.statistics().panics, 1);
    assert_eq!(pool.statistics().waiting, 0);
    drop(clients);
    end(&mut reactor, &pool);
}

/// When the reactor stops, connections are served to their end first.
#[test]
fn stopping_the_reactor_drains_the_pool() {
    let (_ledger, _directory, log) = log();
    let mut reactor = Reactor::new().unwrap();
    let mut settings = settings(2);
    settings.drain_timeout = Some(Duration::from_secs(60));
    let spawn = scripted(PathBuf::from(&log), |_| Script::Serve);
    let pool = Pool::start(&mut reactor, settings, spawn);
    let addresses = listen(&mut reactor, &pool);
    let clients = Clients::start(&mut reactor, addresses, 64, 64);
    let (watched, watching) = (pool.clone(), clients.clone());
    stop_when_taken(&mut reactor, watched);
    reactor.run().unwrap();
    assert_eq!(watching.outcome.borrow().failed.len(), 0);
    assert_eq!(clients.outcome.borrow().answered.len(), 64);
    assert_eq!(pool.statistics().workers, []);
}

/// Stops once every connection was accepted, answered or not.
fn stop_when_taken(reactor: &mut Reactor, pool: Pool) {
    let statistics = pool.statistics();
    if statistics.acknowledged as usize + statistics.in_flight + statistics.waiting >= 64 {
        reactor.stop().expect("it runs");
    } else {
        reactor.call_later(Duration::from_millis(1), move |reactor| {
            stop_when_taken(reactor, pool)
        });
    }
}
