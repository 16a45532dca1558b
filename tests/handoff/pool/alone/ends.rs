//! How workers end, and how others take their place.

use std::cell::{Cell, RefCell};
use std::fs::File;
use std::io::{self, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::rc::Rc;
use std::time::Duration;

use bowline::Reactor;
use bowline::handoff::pool::{
    Candidate, Offer, PassedConnection, Pool, RoundRobin, Spawned, Undelivered, WorkerId,
    WorkerRefusal, WorkerStage,
};
use bowline::process::ChildProcess;
use bowline::testing::ManualClock;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::super::raw::send_bytes;
use super::{Hand, Process, Stage, Staged, TICK, ms, settings, with};
use crate::support::{DescriptorLedger, settle, socketpair};

#[test]
fn what_a_dead_worker_had_not_answered_goes_to_others_in_order() {
    let mut settings = settings(2);
    settings.window = 4;
    settings.queue = 4;
    let mut stage = Stage::serving(settings);
    stage.dispatch(0..8);
    stage.dispatch([8, 9]);
    stage.accept(0, 3, 1);
    assert_eq!(stage.hand(0).labels(), [0, 2, 4, 6, 8]);
    assert_eq!(stage.hand(1).labels(), [1, 3, 5, 7]);
    stage.events();
    stage.end(0);
    assert_eq!(
        stage.events(),
        [
            "worker 1 lost, 101: took 1, not 4",
            "worker 1 exited, 101: Some(Some(0))"
        ]
    );
    let statistics = stage.pool.statistics();
    assert_eq!((statistics.deaths, statistics.resent), (1, 4));
    // More may wait than could come.
    assert_eq!(statistics.waiting, 5);
    // The one that died has its successor, which has not said hello.
    let stages: Vec<_> = statistics.workers.iter().map(|it| it.stage).collect();
    assert_eq!(stages, [WorkerStage::Serving, WorkerStage::Starting]);
    for id in [2, 4, 6, 8] {
        stage.accept(1, id, 1);
    }
    assert_eq!(stage.hand(1).labels(), [0, 4, 6, 8]);
}

#[test]
fn first_death_is_replaced_at_once_and_more_after_waits_until_one_was_good() {
    let mut stage = Stage::serving(with(1, |it| it.stable_after = ms(5_000)));
    let mut started = 1;
    for (lives, wait) in [
        (0, 0),
        (4_999, 100),
        (0, 200),
        (0, 400),
        (5_000, 0),
        (0, 0),
        (0, 100),
        (5_001, 0),
        (5_001, 0),
    ] {
        stage.jump(ms(lives));
        stage.end(started - 1);
        if wait > 0 {
            stage.jump(ms(wait) - Duration::from_nanos(1));
            assert_eq!(stage.started(), started, "after {lives} ms");
            stage.jump(Duration::from_nanos(1));
        }
        started += 1;
        assert_eq!(stage.started(), started, "after {lives} ms");
        stage.greet_all();
    }
    assert_eq!(stage.pool.statistics().deaths, 9);
    assert_eq!(stage.pool.statistics().started, 10);
    assert_eq!(stage.hand(9).id.to_string(), "worker 10");
}

#[test]
fn each_of_several_that_die_is_replaced_once() {
    let mut stage = Stage::serving(settings(3));
    for (died, started) in [(0, 4), (1, 5), (2, 6)] {
        stage.end(died);
        assert_eq!(stage.started(), started);
        stage.pass(ms(1_000));
        assert_eq!(stage.started(), started);
    }
    assert_eq!(stage.pool.statistics().workers.len(), 3);
}

/// One place in which workers die one after the other costs the others nothing.
#[test]
fn each_place_has_waits_of_its_own() {
    let mut stage = Stage::serving(settings(2));
    let mut newest = 0;
    for started in [3, 4] {
        stage.end(newest);
        stage.pass(ms(400));
        assert_eq!(stage.started(), started);
        newest = started - 1;
        stage.greet_all();
    }
    // Waits now, and the other place does not.
    stage.end(newest);
    assert_eq!(stage.started(), 4);
    stage.end(1);
    assert_eq!(stage.started(), 5);
    stage.pass(ms(400));
    assert_eq!(stage.started(), 6);
    assert_eq!(stage.pool.statistics().workers.len(), 2);
}

/// It takes nothing any more: the pool is not to be one short for as long as it goes on
/// to serve what it has.
#[test]
fn a_worker_that_drains_by_itself_is_replaced_when_it_says_so() {
    let mut stage = Stage::serving(settings(1));
    stage.dispatch([1, 2]);
    stage.accept(0, 1, 1);
    stage.refuse(0, 2, WorkerRefusal::Draining);
    assert_eq!(stage.stage_of(0), WorkerStage::Draining);
    assert_eq!(stage.undelivered(), []);
    assert!(!stage.has_room());
    stage.pass(ms(100));
    assert_eq!(stage.started(), 2);
    stage.greet_all();
    assert_eq!(stage.hand(1).labels(), [2]);
    // Once, however often it says so.
    stage.refuse(0, 2, WorkerRefusal::Draining);
    stage.pass(ms(5_000));
    stage.end(0);
    assert_eq!(stage.pool.statistics().deaths, 1);
    stage.pass(ms(5_000));
    assert_eq!(stage.started(), 2);
    assert_eq!(stage.pool.statistics().workers.len(), 1);
}

#[test]
fn one_that_says_no_hello_is_killed_and_replaced() {
    let mut stage = Stage::starting(with(1, |it| it.start_timeout = ms(700)));
    stage.jump(ms(700) - Duration::from_nanos(1));
    assert_eq!(stage.stage_of(0), WorkerStage::Starting);
    stage.jump(Duration::from_nanos(1));
    assert_eq!(stage.events(), ["worker 1 lost, 101: took 0, not 0"]);
    assert_eq!(stage.hand(0).kills.get(), 1);
    stage.jump(ms(100));
    assert_eq!(stage.started(), 2);
    // One that has said hello may be silent.
    stage.hand(1).greet();
    stage.pass(ms(2_000));
    assert_eq!(stage.stage_of(1), WorkerStage::Serving);
    assert_eq!(stage.hand(1).kills.get(), 0);
}

#[test]
fn a_process_without_a_channel_is_asked_until_it_has_ended() {
    let mut stage = Stage::serving(settings(1));
    stage.events();
    stage.hang_up(0);
    assert_eq!(stage.events(), ["worker 1 lost, 101: took 0, not 0"]);
    stage.pass(ms(1_000));
    assert!(stage.hand(0).asked.get() > 10);
    assert_eq!(stage.events(), [""; 0]);
    stage.hand(0).exit(7);
    stage.pass(TICK);
    assert_eq!(stage.events(), ["worker 1 exited, 101: Some(Some(7))"]);
    let asked = stage.hand(0).asked.get();
    stage.pass(ms(1_000));
    assert_eq!(stage.hand(0).asked.get(), asked);
    assert_eq!(stage.hand(0).kills.get(), 0);
}

/// Contract X-12.
#[test]
fn a_process_that_cannot_be_asked_is_forgotten() {
    let mut stage = Stage::serving(settings(1));
    stage.events();
    *stage.hand(0).exit.borrow_mut() = Box::new(|| Err(io::ErrorKind::NotFound.into()));
    stage.hang_up(0);
    assert_eq!(
        stage.events(),
        [
            "worker 1 lost, 101: took 0, not 0",
            "worker 1 exited, 101: None"
        ]
    );
    stage.pass(ms(10_000));
    assert_eq!(stage.hand(0).asked.get(), 1);
}

#[test]
fn a_process_that_does_not_exit_in_time_is_killed_once() {
    let mut stage = Stage::serving(with(1, |it| it.exit_timeout = ms(600)));
    stage.hang_up(0);
    stage.pass(ms(600) - TICK);
    assert_eq!(stage.hand(0).kills.get(), 0);
    stage.pass(TICK);
    assert_eq!(stage.hand(0).kills.get(), 1);
    stage.pass(ms(2_000));
    assert_eq!(stage.hand(0).kills.get(), 1);
}

#[test]
fn a_worker_that_breaks_the_protocol_is_killed_at_once_and_once() {
    let mut stage = Stage::serving(with(1, |it| it.exit_timeout = ms(600)));
    stage.dispatch([1]);
    stage.hand(0).say_bytes(b"no frame at all", &[]);
    stage.settle();
    assert_eq!(stage.hand(0).kills.get(), 1);
    stage.pass(ms(2_000));
    assert_eq!(stage.hand(0).kills.get(), 1);
    assert_eq!(stage.started(), 2);
    // Whether it has begun is not known before it is gone.
    stage.greet_all();
    let statistics = stage.pool.statistics();
    assert_eq!((statistics.in_flight, statistics.resent), (1, 0));
    stage.hand(0).exit(0);
    stage.pass(TICK);
    assert_eq!(stage.pool.statistics().resent, 1);
    assert_eq!(stage.hand(1).labels(), [1]);
}

fn with_process(kind: fn() -> Process, workers: usize) -> Stage {
    let hire = move |id| Hand::new(id, kind());
    let mut stage = Stage::with_hands(settings(workers), RoundRobin::new(), hire);
    stage.greet_all();
    stage.events();
    stage
}

#[test]
fn a_watched_process_is_not_asked_before_it_has_ended() {
    let mut stage = with_process(|| Process::Watched, 1);
    stage.hang_up(0);
    // It may have ended before the channel was seen to.
    assert_eq!(stage.hand(0).asked.get(), 1);
    stage.pass(ms(1_000));
    assert_eq!(stage.hand(0).asked.get(), 1);
    stage.events();
    stage.hand(0).exit(3);
    stage.settle();
    assert_eq!(stage.events(), ["worker 1 exited, 101: Some(Some(3))"]);
}

#[test]
fn a_watched_process_that_does_not_exit_in_time_is_killed_too() {
    let mut stage = with_process(|| Process::Watched, 1);
    stage.hang_up(0);
    stage.pass(ms(4_980));
    assert_eq!(stage.hand(0).kills.get(), 0);
    stage.pass(TICK);
    assert_eq!(stage.hand(0).kills.get(), 1);
}

#[test]
fn one_that_ended_before_it_was_looked_at_is_asked_when_its_channel_ends() {
    let mut stage = with_process(|| Process::Gone, 1);
    stage.pass(ms(5_000));
    assert_eq!(stage.hand(0).asked.get(), 0);
    stage.end(0);
    assert_eq!(
        stage.events(),
        [
            "worker 1 lost, 101: took 0, not 0",
            "worker 1 exited, 101: Some(Some(0))"
        ]
    );
}

/// Contract W-63: a child of its own may have inherited the channel.
#[test]
fn a_channel_that_outlives_its_process_is_ended() {
    let mut stage = with_process(|| Process::Watched, 1);
    stage.dispatch([1]);
    stage.hand(0).exit(0);
    stage.settle();
    stage.jump(ms(1_000) - Duration::from_nanos(1));
    assert_eq!(stage.events(), [""; 0]);
    assert_eq!(stage.stage_of(0), WorkerStage::Serving);
    stage.jump(Duration::from_nanos(1));
    assert_eq!(
        stage.events(),
        [
            "worker 1 lost, 101: took 0, not 1",
            "worker 1 exited, 101: Some(Some(0))"
        ]
    );
    assert_eq!(stage.pool.statistics().resent, 1);
}

/// There is a moment in which a channel has ended and its worker is not known to be
/// lost.
#[test]
fn a_worker_whose_channel_takes_nothing_is_passed_over() {
    let first = |_: &Offer<'_>, _: &[Candidate]| Some(0);
    let hire = |id| Hand::new(id, Process::Watched);
    let mut stage = Stage::with_hands(settings(2), first, hire);
    stage.greet_all();
    stage.hand(0).exit(0);
    stage.settle();
    // After the pool has ended the channel, in the same turn.
    let (pool, connection) = (stage.pool.clone(), stage.connection(5));
    let during = Rc::new(Cell::new(None));
    let seen = Rc::clone(&during);
    stage.reactor.call_later(ms(1_000), move |reactor| {
        pool.dispatch(reactor, connection);
        seen.set(Some((
            pool.statistics().sent,
            pool.statistics().workers.len(),
        )));
    });
    stage.jump(ms(1_000));
    assert_eq!(during.get(), Some((1, 2)), "one was lost before that");
    assert_eq!(stage.hand(1).given(), [(1, 5)]);
    assert_eq!(stage.pool.statistics().resent, 0);
}

#[test]
fn workers_that_cannot_be_started_are_tried_again_with_growing_waits() {
    let _ledger = DescriptorLedger::open();
    let clock = ManualClock::new();
    let mut reactor = Reactor::with_clock(clock.clone()).unwrap();
    let tries = Rc::new(Cell::new(0));
    let counted = Rc::clone(&tries);
    let pool = Pool::start(&mut reactor, settings(2), move |_: &mut Reactor, _| {
        counted.set(counted.get() + 1);
        Err::<Spawned, _>(io::ErrorKind::NotFound.into())
    });
    let events = Rc::new(RefCell::new(Vec::new()));
    let told = Rc::clone(&events);
    pool.on_event(move |_, event| told.borrow_mut().push(super::in_short(&event)));
    assert_eq!(tries.get(), 2);
    settle(&mut reactor);
    // Those of the start itself too.
    let why = "entity not found";
    assert_eq!(
        events.take(),
        [
            format!("worker 1 not started, 1: {why}"),
            format!("worker 2 not started, 2: {why}"),
        ]
    );
    // In each place the next one waits for longer.
    for (wait, tried) in [(99, 2), (1, 4), (199, 4), (1, 6)] {
        clock.advance(ms(wait));
        settle(&mut reactor);
        assert_eq!(tries.get(), tried, "after {wait} ms more");
    }
    let statistics = pool.statistics();
    assert_eq!((statistics.started, statistics.deaths), (0, 0));
    assert_eq!(statistics.not_started, 6);
    assert_eq!(
        events.take().last().expect("four more"),
        &format!("worker 6 not started, 6: {why}")
    );
}

/// It could not be started, or ended before it was ready; in between, one that is
/// ready has the count begin anew.
#[test]
fn starts_that_fail_in_a_row_are_bounded_if_asked_for() {
    let mut few = settings(2);
    few.max_failed_starts = Some(3);
    let broken = Rc::new(Cell::new(false));
    let is_broken = Rc::clone(&broken);
    let hire = move |id| {
        let (hand, channel) = Hand::new(id, Process::Watched);
        match is_broken.get() {
            // No channel can be put on it.
            true => (hand, File::open("/proc/self/comm").expect("a file").into()),
            false => (hand, channel),
        }
    };
    let mut stage = Stage::with_hands(few, RoundRobin::new(), hire);
    // Twice, before one is ready.
    for hand in [0, 1] {
        stage.end(hand);
    }
    stage.jump(ms(300));
    assert_eq!(stage.started(), 4);
    for hand in [2, 3] {
        stage.hand(hand).greet();
    }
    stage.settle();
    stage.events.take();
    // After that, the death of one that was ready does not count, and starts that fail do.
    broken.set(true);
    stage.end(2);
    for _ in 0..5 {
        stage.jump(ms(10_000));
    }
    let events = stage.events.take();
    let failed: Vec<_> = events
        .iter()
        .filter(|event| event.contains("not started") || event.contains("gave up"))
        .collect();
    assert_eq!(failed.len(), 4, "{events:?}");
    for (event, start) in failed
        .iter()
        .zip(["worker 5", "worker 6", "worker 7", "gave up"])
    {
        assert!(event.starts_with(start), "{events:?}");
    }
    assert_eq!(failed[3], "gave up after 3");
    assert_eq!(stage.pool.statistics().not_started, 3);
    // The one that is left serves, and no other is tried, were it the last.
    assert!(stage.has_room());
    broken.set(false);
    let started = stage.started();
    stage.end(3);
    for _ in 0..5 {
        stage.jump(ms(10_000));
    }
    assert_eq!(stage.started(), started);
    assert!(!stage.has_room());
}

#[test]
fn a_start_that_panics_is_tried_again_after_a_wait() {
    let hire = |id: WorkerId| {
        assert_ne!(id.to_string(), "worker 2", "a panic that is meant");
        Hand::new(id, Process::Asked)
    };
    let mut stage = Stage::with_hands(settings(1), RoundRobin::new(), hire);
    stage.greet_all();
    stage.end(0);
    assert_eq!(stage.reactor.statistics().panics, 1);
    assert_eq!(stage.started(), 1);
    stage.events.take();
    stage.jump(TICK);
    assert_eq!(
        stage.events.take(),
        ["worker 2 not started, 1: it panicked"]
    );
    assert_eq!(stage.pool.statistics().not_started, 1);
    stage.jump(ms(99));
    assert_eq!(stage.started(), 1);
    stage.jump(ms(1));
    assert_eq!(stage.hand(1).id.to_string(), "worker 3");
    stage.greet_all();
    assert!(stage.has_room());
}

#[test]
fn one_whose_channel_is_none_is_killed_and_tried_again() {
    let _ledger = DescriptorLedger::open();
    let clock = ManualClock::new();
    let mut reactor = Reactor::with_clock(clock.clone()).unwrap();
    let hands = Rc::new(RefCell::new(Vec::new()));
    let hired = Rc::clone(&hands);
    let pool = Pool::start(&mut reactor, settings(1), move |_: &mut Reactor, id| {
        let hand = Rc::new(Hand::new(id, Process::Asked).0);
        hired.borrow_mut().push(Rc::clone(&hand));
        let channel = OwnedFd::from(File::open("/proc/self/comm")?);
        let process = hand.process();
        Ok(Spawned { channel, process })
    });
    let events = Rc::new(RefCell::new(Vec::new()));
    let told = Rc::clone(&events);
    pool.on_event(move |_, event| told.borrow_mut().push(super::in_short(&event)));
    settle(&mut reactor);
    let first = Rc::clone(&hands.borrow()[0]);
    assert_eq!((first.kills.get(), first.asked.get()), (1, 1));
    first.exit(9);
    clock.advance(TICK);
    settle(&mut reactor);
    assert_eq!(
        events.take(),
        [
            "worker 1 not started, 1: cannot adopt the descriptor: it is no socket",
            "worker 1 exited, 101: Some(Some(9))"
        ]
    );
    assert_eq!(hands.borrow().len(), 1);
    clock.advance(ms(80));
    settle(&mut reactor);
    assert_eq!(hands.borrow().len(), 2);
    assert_eq!(pool.statistics().started, 0);
    assert_eq!(pool.statistics().workers, []);
}

#[test]
fn a_process_of_ones_own_needs_no_descriptor_and_is_printed_by_its_number() {
    let stage = Stage::starting(settings(1));
    let mut process = stage.hand(0).process();
    let watch = process.exit_descriptor().expect_err("there is none");
    assert_eq!(watch.kind(), io::ErrorKind::Unsupported);
    let channel = socketpair().0;
    let printed = format!("{:?}", Spawned { channel, process });
    assert!(printed.starts_with("Spawned { channel: "), "{printed}");
    assert!(printed.ends_with(", pid: 101 }"), "{printed}");
}

#[test]
fn a_child_can_be_a_workers_process() {
    let _ledger = DescriptorLedger::open();
    let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
    let number = child.id();
    let process: &mut dyn ChildProcess = &mut child;
    assert_eq!(process.pid(), number);
    assert_eq!(process.try_wait().unwrap(), None);
    let end = process.exit_descriptor().unwrap().expect("it runs");
    process.kill().unwrap();
    let mut ends = [PollFd::new(&end, PollFlags::IN)];
    assert_eq!(
        poll(
            &mut ends,
            Some(&Timespec {
                tv_sec: 10,
                tv_nsec: 0
            })
        )
        .unwrap(),
        1
    );
    let status = process.try_wait().unwrap().expect("it has ended");
    assert_eq!(status.signal(), Some(9));
    assert!(process.exit_descriptor().unwrap().is_none());
    assert_eq!(process.try_wait().unwrap(), Some(status));
    process.kill().expect("nothing happens");
}

/// The last copy of a connection over a UNIX socket may be the pool's, and closing it
/// may take as long as its client likes: the loop does not wait for that.
#[test]
fn closing_what_a_worker_has_taken_and_ended_stalls_nobody() {
    let mut stage = Stage::serving(settings(1));
    let (client, accepted) = socketpair();
    let (lingering, unread) = lingering_socket();
    send_bytes(&client, b"x", &[lingering.as_fd()]).unwrap();
    drop(lingering);
    stage
        .pool
        .dispatch(&mut stage.reactor, PassedConnection::new(accepted.into()));
    stage.settle();
    drop(stage.hand(0).heard());
    assert_eq!(bowline::process::descriptors_closing(), 0);
    stage.accept(0, 1, 0);
    assert_eq!(bowline::process::descriptors_closing(), 1);
    // Nobody is to have its bytes any more: the close is over.
    drop(unread);
    crate::support::wait_for_closes();
}

/// A TCP socket whose last close waits for its peer, for some seconds at the most.
fn lingering_socket() -> (OwnedFd, TcpStream) {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let unread = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (socket, _) = listener.accept().unwrap();
    let linger = Some(Duration::from_secs(5));
    rustix::net::sockopt::set_socket_linger(&socket, linger).unwrap();
    socket.set_nonblocking(true).unwrap();
    while (&socket).write(&[0; 1 << 16]).is_ok() {}
    socket.set_nonblocking(false).unwrap();
    (socket.into(), unread)
}

#[test]
fn what_waits_when_the_pool_has_nobody_left_is_told_at_its_time() {
    let mut stage = Stage::serving(settings(1));
    stage.dispatch([1]);
    stage.end(0);
    stage.pass(ms(60));
    assert_eq!(stage.pool.statistics().waiting, 1);
    stage.pass(ms(40));
    // The one that comes does not say hello for as long as a connection may wait.
    stage.pass(ms(9_900));
    assert_eq!(stage.undelivered(), []);
    stage.pass(TICK);
    assert_eq!(stage.undelivered(), [(1, Undelivered::WaitedTooLong)]);
}
