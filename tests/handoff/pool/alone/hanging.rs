//! Workers that do not answer.

use bowline::handoff::pool::{FromWorker, ToWorker, WorkerRefusal, WorkerStage};
use rustix::io::Errno;

use super::{Stage, Staged, TICK, ms, settings, with};
use crate::support::row;

#[test]
fn a_worker_counts_as_hung_when_it_has_said_nothing_for_too_long() {
    let mut stage = Stage::serving(settings(2));
    stage.events();
    stage.dispatch([1]);
    // Exactly the limit.
    stage.pass(ms(1_000));
    assert_eq!(stage.stage_of(0), WorkerStage::Serving);
    stage.pass(TICK);
    assert_eq!(stage.stage_of(0), WorkerStage::Hung);
    assert_eq!(stage.events(), ["worker 1 hung, 101"]);
    // One that has nothing to answer may be silent.
    assert_eq!(stage.stage_of(1), WorkerStage::Serving);
    stage.pass(ms(2_000));
    assert_eq!(stage.events(), [""; 0], "told once");
    assert_eq!(stage.pool.statistics().hangs, 1);
    // It gets nothing, although its window is not full.
    stage.dispatch([2, 3]);
    assert_eq!(stage.hand(0).labels(), [1]);
    assert_eq!(stage.hand(1).labels(), [2, 3]);
}

/// Nothing is looked at again and again while nothing is to come.
#[test]
fn a_pool_that_waits_for_nothing_sleeps() {
    let mut stage = Stage::serving(settings(2));
    stage.pass(TICK);
    assert_eq!(stage.reactor.next_deadline(), None);
    stage.dispatch(0..5);
    assert_eq!(stage.reactor.delayed_calls().count(), 1);
    for (place, id) in [(0, 1), (1, 2), (0, 3), (1, 4), (0, 5)] {
        stage.accept(place, id, 1);
    }
    stage.pass(TICK);
    assert_eq!(stage.reactor.next_deadline(), None);
}

#[test]
fn a_hung_worker_recovers_with_whatever_it_says() {
    let mut stage = Stage::serving(settings(1));
    for (id, answer) in [
        (1, FromWorker::Accepted { id: 1, live: 0 }),
        (2, FromWorker::Load { live: 0 }),
    ] {
        let _row = row(&answer);
        stage.dispatch([id as u32]);
        stage.pass(ms(1_000) + TICK);
        assert_eq!(stage.stage_of(0), WorkerStage::Hung);
        assert!(!stage.has_room());
        stage.events();
        stage.say(0, answer);
        assert_eq!(stage.stage_of(0), WorkerStage::Serving);
        assert_eq!(stage.events(), ["worker 1 recovered, 101"]);
        assert!(stage.has_room());
    }
    assert_eq!(stage.pool.statistics().hangs, 2);
    // What it had, it still has.
    assert_eq!(stage.worker(0).in_flight, 1);
    // An answer of one that does not hang is no recovery.
    stage.accept(0, 2, 0);
    assert_eq!(stage.events(), [""; 0]);
}

#[test]
fn a_worker_that_goes_on_answering_does_not_hang() {
    let mut stage = Stage::serving(settings(1));
    stage.dispatch(0..20);
    for id in 2..12 {
        stage.pass(ms(900));
        stage.accept(0, id, 0);
    }
    // The oldest is nine seconds old, the last word none.
    assert_eq!(stage.stage_of(0), WorkerStage::Serving);
    assert_eq!(stage.pool.statistics().hangs, 0);
    stage.pass(ms(1_000));
    assert_eq!(stage.stage_of(0), WorkerStage::Serving);
    stage.pass(TICK);
    assert_eq!(stage.hand(0).kills.get(), 1, "for the age of the oldest");
}

#[test]
fn one_that_does_not_answer_in_time_is_killed_once() {
    let mut stage = Stage::serving(with(2, |it| it.kill_timeout = Some(ms(3_000))));
    stage.dispatch([1, 2]);
    stage.accept(1, 2, 0);
    stage.pass(ms(3_000));
    assert_eq!(stage.hand(0).kills.get(), 0);
    stage.pass(TICK);
    assert_eq!(stage.hand(0).kills.get(), 1);
    assert_eq!(stage.stage_of(0), WorkerStage::Killed);
    stage.pass(ms(1_000));
    assert_eq!(
        (stage.hand(0).kills.get(), stage.hand(1).kills.get()),
        (1, 0)
    );
    // What it has begun to do is known when its channel ends.
    assert_eq!(stage.worker(0).in_flight, 1);
    assert_eq!(stage.hand(1).labels(), [2]);
    stage.end(0);
    assert_eq!(stage.hand(1).labels(), [1]);
}

#[test]
fn without_a_limit_nobody_is_killed() {
    let mut stage = Stage::serving(with(1, |it| it.kill_timeout = None));
    stage.dispatch([1]);
    stage.pass(ms(1_000));
    stage.jump(ms(3_600_000));
    stage.pass(ms(100));
    assert_eq!(stage.stage_of(0), WorkerStage::Hung);
    assert_eq!(stage.hand(0).kills.get(), 0);
}

#[test]
fn one_that_drains_is_not_hung_but_killed_when_it_does_not_answer() {
    let mut stage = Stage::serving(with(1, |it| it.kill_timeout = Some(ms(3_000))));
    stage.dispatch([1, 2]);
    stage.refuse(0, 1, WorkerRefusal::Draining);
    stage.pass(ms(2_000));
    assert_eq!(stage.stage_of(0), WorkerStage::Draining);
    assert_eq!(stage.pool.statistics().hangs, 0);
    stage.pass(ms(1_000) + TICK);
    assert_eq!(stage.stage_of(0), WorkerStage::Killed);
}

#[test]
fn a_kill_that_fails_is_tried_again() {
    let mut stage = Stage::serving(with(1, |it| it.kill_timeout = Some(ms(3_000))));
    stage.hand(0).can_be_killed.set(false);
    stage.dispatch([1]);
    stage.pass(ms(3_000) + 2 * TICK);
    assert_eq!(stage.hand(0).kills.get(), 2);
    assert_eq!(stage.stage_of(0), WorkerStage::Hung);
    stage.hand(0).can_be_killed.set(true);
    stage.pass(2 * TICK);
    assert_eq!(stage.hand(0).kills.get(), 3);
    assert_eq!(stage.stage_of(0), WorkerStage::Killed);
}

#[test]
fn answers_of_a_killed_worker_still_count() {
    let mut stage = Stage::serving(settings(2));
    stage.dispatch([1, 2, 3, 4, 5]);
    let id = stage.hand(0).id;
    stage.pool.kill(id);
    assert_eq!(stage.stage_of(0), WorkerStage::Killed);
    assert_eq!(
        (stage.hand(0).kills.get(), stage.hand(1).kills.get()),
        (1, 0)
    );
    stage.events();
    // It had taken this one before it died, and not that one.
    stage.accept(0, 1, 1);
    stage.refuse(0, 3, WorkerRefusal::Draining);
    assert_eq!(stage.stage_of(0), WorkerStage::Killed);
    stage.end(0);
    assert_eq!(
        stage.events(),
        [
            "worker 1 lost, 101: took 1, not 1",
            "worker 1 exited, 101: Some(Some(0))"
        ]
    );
    assert_eq!(stage.hand(1).labels(), [2, 4, 3, 5]);
    let statistics = stage.pool.statistics();
    assert_eq!((statistics.acknowledged, statistics.resent), (1, 1));
    // Nobody is there any more.
    stage.pool.kill(id);
    assert_eq!(stage.hand(0).kills.get(), 1);
}

#[test]
fn a_worker_that_is_killed_before_it_is_ready_is_not_said_to_be() {
    let mut stage = Stage::starting(settings(1));
    stage.pool.kill(stage.hand(0).id);
    stage.greet_all();
    assert_eq!(stage.stage_of(0), WorkerStage::Killed);
    assert_eq!(stage.events(), [""; 0]);
    assert!(!stage.has_room());
}

/// With its virtual machine, say: what workers said meanwhile is heard first, and
/// they were stopped too.
#[test]
fn nobody_is_killed_because_the_pool_was_stopped() {
    let mut settings = settings(2);
    settings.kill_timeout = Some(ms(3_000));
    settings.queue_timeout = ms(3_000);
    let mut stage = Stage::serving(settings);
    stage.events();
    stage.dispatch([1, 2]);
    stage.pass(ms(500));
    stage.clock.advance(ms(60_000));
    stage.accept(0, 1, 0);
    assert_eq!(stage.events(), [""; 0]);
    // What was left of its time it still has.
    stage.pass(ms(460));
    assert_eq!(stage.stage_of(1), WorkerStage::Serving);
    stage.pass(ms(60) + TICK);
    assert_eq!(stage.events(), ["worker 2 hung, 102"]);
    stage.pass(ms(1_900));
    assert_eq!(stage.hand(1).kills.get(), 0);
    stage.pass(ms(100) + TICK);
    let kills = [0, 1].map(|place| stage.hand(place).kills.get());
    assert_eq!(kills, [0, 1]);
}

/// A worker that takes its time gets no more, although others take none at all: those that
/// come wait where they can be given to anybody.
#[test]
fn a_slow_worker_gets_nothing_until_it_answers() {
    let mut stage = Stage::serving(with(2, |it| it.slow_after = ms(50)));
    stage.dispatch([1]);
    // Exactly the limit.
    stage.pass(ms(50));
    stage.dispatch([2, 3]);
    assert_eq!(stage.hand(0).labels(), [1, 3]);
    stage.pass(ms(1));
    stage.dispatch([4, 5]);
    assert_eq!(stage.hand(0).labels(), [0; 0]);
    assert_eq!(stage.hand(1).labels(), [2, 4, 5]);
    assert_eq!(stage.stage_of(0), WorkerStage::Serving);
    // Its answer counts, and so does the age of what it still has.
    stage.accept(0, 1, 1);
    stage.dispatch([6]);
    assert_eq!(stage.hand(0).labels(), [6]);
    // Both are slow: who comes waits here, until one has answered.
    stage.pass(ms(60));
    assert!(!stage.has_room());
    stage.dispatch([7]);
    assert_eq!(stage.pool.statistics().waiting, 1);
    stage.accept(1, 2, 1);
    assert_eq!(stage.pool.statistics().waiting, 1, "the next is as old");
    stage.accept(1, 4, 2);
    stage.accept(1, 5, 3);
    assert_eq!(stage.hand(1).labels(), [7]);
}

/// From the moment of the recall the worker can answer nothing any more; what it had
/// answered before is its own.
#[test]
fn a_hung_worker_is_recalled_and_what_it_has_not_answered_goes_to_others() {
    let mut settings = settings(2);
    settings.recalls = true;
    settings.drain_timeout = Some(ms(7_000));
    let mut stage = Stage::serving(settings);
    stage.events();
    stage.dispatch([1, 2, 3, 4, 5]);
    for (place, id) in [(0, 1), (1, 2), (1, 4)] {
        stage.accept(place, id, 1);
    }
    stage.pass(ms(1_000));
    assert_eq!(stage.stage_of(0), WorkerStage::Serving);
    stage.pass(TICK);
    assert_eq!(
        stage.events(),
        [
            "worker 1 hung, 101",
            "worker 1 recalled, 101",
            "worker 1 lost, 101: took 1, not 2",
        ]
    );
    let statistics = stage.pool.statistics();
    assert_eq!(
        (statistics.recalls, statistics.resent, statistics.deaths),
        (1, 2, 0)
    );
    assert_eq!(stage.hand(1).labels(), [2, 4, 3, 5]);
    stage.accept(1, 6, 3);
    stage.accept(1, 7, 4);
    // It has a successor at once.
    assert_eq!(stage.started(), 3);
    // It was told, after what it has, and what it says reaches nobody.
    let heard = stage.hand(0).heard();
    let heard: Vec<_> = heard.into_iter().map(|(message, _)| message).collect();
    assert!(matches!(heard[..], [.., ToWorker::Recall]), "{heard:?}");
    assert_eq!(heard.len(), 4);
    assert_eq!(stage.hand(0).refusal(), Some(Errno::PIPE));
    // It has the time of a drain for what it took.
    stage.pass(ms(6_980));
    assert_eq!(stage.hand(0).kills.get(), 0);
    stage.pass(ms(60));
    assert_eq!(stage.hand(0).kills.get(), 1);
    stage.hand(0).exit(0);
    stage.pass(TICK);
    assert_eq!(stage.events(), ["worker 1 exited, 101: Some(Some(0))"]);
}

/// What it says before it is told counts, in whatever order it is read.
#[test]
fn an_answer_that_was_on_its_way_counts() {
    let mut stage = Stage::serving(with(2, |it| it.recalls = true));
    stage.dispatch([1, 2, 3]);
    stage.accept(1, 2, 1);
    stage.pass(ms(1_000));
    stage.clock.advance(TICK);
    // Now it speaks, and the recall goes out in the same turn.
    let answer = FromWorker::Accepted { id: 3, live: 1 };
    stage.hand(0).say(&answer);
    stage.settle();
    let taken = stage.hand(1).labels();
    let statistics = stage.pool.statistics();
    let is_recalled = statistics.recalls == 1;
    // Whichever was first, 3 is with the first worker and 1 with one of them.
    assert_eq!(taken, if is_recalled { vec![2, 1] } else { vec![2] });
    assert_eq!(statistics.acknowledged, 2);
}

/// Its channel is full, so that it cannot be told: it is killed in its time, as one that
/// is not recalled.
#[test]
fn a_worker_that_cannot_be_told_is_killed_in_its_time() {
    let mut settings = settings(1);
    settings.recalls = true;
    settings.drain_timeout = Some(ms(60_000));
    settings.window = 100_000;
    settings.queue = 100_000;
    let mut stage = Stage::serving(settings);
    let mut label = 0;
    // Until nothing more leaves.
    while stage.pool.statistics().in_flight == label as usize && label < 4_000 {
        stage.dispatch([label]);
        stage.clients.clear();
        label += 1;
    }
    stage.pass(ms(1_000) + TICK);
    assert_eq!(stage.stage_of(0), WorkerStage::Recalled);
    let kills = |stage: &Stage| stage.hand(0).kills.get();
    stage.pass(ms(8_000));
    assert_eq!((kills(&stage), stage.pool.statistics().resent), (0, 0));
    stage.pass(ms(1_500));
    assert_eq!(kills(&stage), 1);
}
