//! What fits, and when a connection is nobody's.

use bowline::handoff::pool::{FromWorker, ToWorker, Undelivered, WorkerRefusal, WorkerStage};

use super::{Stage, Staged, TICK, ms, settings, with};
use crate::support::row;

/// The most bytes that travel with a connection.
const MOST: usize = (1 << 20) - 1024;

#[test]
fn a_worker_is_given_as_many_as_its_window_and_no_more() {
    let mut stage = Stage::serving(with(2, |it| it.window = 3));
    stage.dispatch(0..5);
    assert!(stage.has_room());
    stage.dispatch([5]);
    assert!(!stage.has_room());
    assert_eq!(
        (stage.worker(0).in_flight, stage.worker(1).in_flight),
        (3, 3)
    );
    stage.dispatch([6]);
    let statistics = stage.pool.statistics();
    assert_eq!((statistics.in_flight, statistics.waiting), (6, 1));
    assert!(!statistics.is_paused, "no listener is");
    stage.accept(1, 2, 1);
    assert_eq!(stage.hand(1).labels(), [1, 3, 5, 6]);
    assert!(!stage.has_room());
    stage.accept(1, 4, 1);
    assert!(stage.has_room());
}

#[test]
fn a_window_of_none_is_one_of_one() {
    let mut stage = Stage::serving(with(1, |it| it.window = 0));
    stage.dispatch([1, 2]);
    assert_eq!(stage.hand(0).labels(), [1]);
}

#[test]
fn as_many_wait_as_may_and_the_next_is_told() {
    for queue in [0, 1, 3] {
        let _row = row(queue);
        let mut stage = Stage::starting(with(1, |it| it.queue = queue));
        let queue = queue as u32;
        stage.dispatch(0..queue);
        assert_eq!(stage.undelivered(), []);
        stage.dispatch([queue, queue + 1]);
        let full = Undelivered::QueueFull;
        assert_eq!(stage.undelivered(), [(queue, full), (queue + 1, full)]);
        let statistics = stage.pool.statistics();
        assert_eq!(statistics.waiting, queue as usize);
        assert_eq!(statistics.undelivered, 2);
        stage.greet_all();
        assert_eq!(stage.hand(0).labels(), (0..queue).collect::<Vec<_>>());
    }
}

#[test]
fn what_was_read_and_what_is_unsent_travels_up_to_the_limit() {
    let mut stage = Stage::serving(settings(1));
    for (label, read, unsent) in [
        (0, MOST, 0),
        (1, 0, MOST),
        (2, MOST - 10, 10),
        (10, MOST + 1, 0),
        (11, 0, MOST + 1),
        (12, MOST - 10, 11),
    ] {
        let mut connection = stage.connection(label);
        connection.read = vec![1; read];
        connection.unsent = vec![2; unsent];
        stage.pool.dispatch(&mut stage.reactor, connection);
    }
    let mut heard = Vec::new();
    for _ in 0..200 {
        stage.settle();
        heard.extend(stage.hand(0).heard());
    }
    let lengths: Vec<_> = heard
        .iter()
        .map(|(message, _)| match message {
            ToWorker::Dispatch(dispatch) => (dispatch.read.len(), dispatch.unsent.len()),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(lengths, [(MOST, 0), (0, MOST), (MOST - 10, 10)]);
    let long = Undelivered::TooLong;
    assert_eq!(stage.undelivered(), [(10, long), (11, long), (12, long)]);
    // Its end of the channel is as it was.
    assert_eq!(stage.stage_of(0), WorkerStage::Serving);
}

#[test]
fn one_waits_as_long_as_it_may() {
    let mut stage = Stage::starting(with(1, |it| it.queue_timeout = ms(400)));
    stage.dispatch([1]);
    stage.pass(ms(100));
    stage.dispatch([2]);
    stage.pass(ms(300));
    assert_eq!(stage.undelivered(), []);
    stage.pass(TICK);
    let long = Undelivered::WaitedTooLong;
    assert_eq!(stage.undelivered(), [(1, long)]);
    assert_eq!(stage.pool.statistics().waiting, 1);
    stage.pass(ms(80));
    assert_eq!(stage.undelivered(), []);
    stage.pass(TICK);
    assert_eq!(stage.undelivered(), [(2, long)]);
    assert_eq!(stage.pool.statistics().undelivered, 2);
}

/// The time with a worker is not counted.
#[test]
fn one_that_comes_back_waits_anew() {
    let mut settings = settings(1);
    settings.queue_timeout = ms(400);
    settings.ack_timeout = ms(60_000);
    let mut stage = Stage::serving(settings);
    stage.dispatch([1, 2]);
    stage.pass(ms(1_000));
    // It drains by itself, and another one takes its time to start.
    stage.refuse(0, 1, WorkerRefusal::Draining);
    stage.pass(ms(400));
    assert_eq!(stage.undelivered(), []);
    stage.pass(TICK);
    assert_eq!(stage.undelivered(), [(1, Undelivered::WaitedTooLong)]);
    stage.end(0);
    stage.pass(ms(400));
    assert_eq!(stage.undelivered(), []);
    stage.pass(TICK);
    assert_eq!(stage.undelivered(), [(2, Undelivered::WaitedTooLong)]);
}

#[test]
fn a_full_worker_is_left_alone_for_a_moment_or_until_it_speaks() {
    for reason in [WorkerRefusal::Overloaded, WorkerRefusal::DescriptorLost] {
        let _row = row(reason);
        let mut stage = Stage::serving(settings(1));
        stage.dispatch([1]);
        stage.refuse(0, 1, reason);
        assert_eq!(stage.undelivered(), [(1, Undelivered::Refused(reason))]);
        assert!(!stage.has_room());
        stage.jump(ms(100) - std::time::Duration::from_nanos(1));
        assert!(!stage.has_room());
        stage.jump(std::time::Duration::from_nanos(1));
        assert!(stage.has_room());

        stage.dispatch([2]);
        stage.refuse(0, 2, reason);
        stage.dispatch([3]);
        assert_eq!(stage.hand(0).labels(), [1, 2]);
        stage.say(0, FromWorker::Load { live: 3 });
        assert_eq!(stage.hand(0).labels(), [3]);
        // With time alone, too.
        stage.refuse(0, 3, reason);
        stage.dispatch([4]);
        stage.pass(ms(100) + TICK);
        assert_eq!(stage.hand(0).labels(), [4]);
    }
}

#[test]
fn one_that_did_not_want_it_is_asked_for_the_next() {
    let mut stage = Stage::serving(settings(1));
    stage.dispatch([1]);
    stage.refuse(0, 1, WorkerRefusal::Unwanted);
    let refused = Undelivered::Refused(WorkerRefusal::Unwanted);
    assert_eq!(stage.undelivered(), [(1, refused)]);
    assert!(stage.has_room());
    assert_eq!(stage.stage_of(0), WorkerStage::Serving);
}

#[test]
fn what_is_no_connection_is_offered_to_nobody_else() {
    let mut stage = Stage::serving(settings(2));
    stage.dispatch([1]);
    stage.refuse(0, 1, WorkerRefusal::WrongKind);
    let refused = Undelivered::Refused(WorkerRefusal::WrongKind);
    assert_eq!(stage.undelivered(), [(1, refused)]);
    assert_eq!(stage.hand(1).labels(), [0_u32; 0]);
}

#[test]
fn what_one_refuses_goes_to_another_before_those_that_wait() {
    let mut stage = Stage::serving(with(2, |it| it.window = 1));
    stage.dispatch([1, 2, 3]);
    stage.refuse(0, 1, WorkerRefusal::Unwanted);
    // It may not have it again, and takes the next.
    assert_eq!(stage.hand(0).labels(), [1, 3]);
    assert_eq!(stage.pool.statistics().waiting, 1);
    stage.dispatch([4]);
    stage.accept(1, 2, 1);
    assert_eq!(stage.hand(1).labels(), [2, 1]);
    // Each has refused it now: the last one's reason is said.
    stage.refuse(1, 4, WorkerRefusal::Overloaded);
    let refused = Undelivered::Refused(WorkerRefusal::Overloaded);
    assert_eq!(stage.undelivered(), [(1, refused)]);
    assert_eq!(stage.pool.statistics().refused, 2);
}

#[test]
fn what_was_refused_waits_for_one_that_hangs_or_is_to_come() {
    let mut stage = Stage::serving(settings(2));
    stage.dispatch([1, 2]);
    // The second does not answer.
    stage.pass(ms(900));
    stage.refuse(0, 1, WorkerRefusal::Unwanted);
    assert_eq!(stage.hand(1).labels(), [2, 1]);
    stage.dispatch([3]);
    stage.pass(ms(1_000) + TICK);
    assert_eq!(stage.stage_of(1), WorkerStage::Hung);
    stage.refuse(0, 4, WorkerRefusal::Unwanted);
    assert_eq!(stage.undelivered(), []);
    assert_eq!(stage.pool.statistics().waiting, 1);
    // It dies: its place is to be filled, which is waited for as well.
    stage.end(1);
    assert_eq!(stage.undelivered(), []);
    assert_eq!(stage.pool.statistics().resent, 2);
    assert_eq!(
        stage.pool.statistics().waiting,
        2,
        "both refused by the first"
    );
    stage.pass(ms(200));
    stage.greet_all();
    assert_eq!(stage.hand(2).labels(), [1, 3]);
}

/// It would wait for as long as the one that is to come takes to start, and everybody
/// with it.
#[test]
fn what_was_refused_holds_nobody_up() {
    let mut stage = Stage::serving(with(2, |it| it.queue = 3));
    stage.end(1);
    stage.dispatch([1]);
    stage.refuse(0, 1, WorkerRefusal::Unwanted);
    assert_eq!(stage.pool.statistics().waiting, 1);
    assert!(stage.has_room());
    stage.dispatch([2]);
    assert_eq!(stage.hand(0).labels(), [1, 2]);
    // As many as may wait; the others come behind them.
    stage.refuse(0, 2, WorkerRefusal::Unwanted);
    assert!(stage.has_room());
    stage.dispatch([3]);
    stage.refuse(0, 3, WorkerRefusal::Unwanted);
    assert!(!stage.has_room());
    stage.dispatch([4]);
    assert_eq!(stage.undelivered(), [(4, Undelivered::QueueFull)]);
    stage.pass(ms(100));
    stage.greet_all();
    assert_eq!(stage.hand(2).labels(), [1, 2, 3]);
}

#[test]
fn one_is_given_out_as_often_as_it_may() {
    let mut stage = Stage::serving(with(4, |it| it.max_attempts = 3));
    stage.dispatch([1]);
    stage.refuse(0, 1, WorkerRefusal::Unwanted);
    // A death counts as well.
    stage.end(1);
    assert_eq!(stage.undelivered(), []);
    assert_eq!(stage.hand(2).labels(), [1]);
    stage.refuse(2, 3, WorkerRefusal::Unwanted);
    assert_eq!(stage.undelivered(), [(1, Undelivered::TooManyAttempts)]);
    assert_eq!(stage.hand(3).labels(), [0_u32; 0]);
}
