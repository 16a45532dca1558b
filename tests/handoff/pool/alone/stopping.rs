//! The end of a pool, and of workers that it asks to end.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use bowline::handoff::pool::{Undelivered, WorkerRefusal, WorkerStage};

use super::{Stage, Staged, TICK, ms, settings, with};
use crate::support::row;

impl Stage {
    /// Stops the pool; counts how often it says that it is over.
    fn stop(&mut self, within: Duration) -> Rc<Cell<u32>> {
        let over = Rc::new(Cell::new(0));
        let told = Rc::clone(&over);
        let then = move |_: &mut _| told.set(told.get() + 1);
        self.pool.stop(&mut self.reactor, within, then);
        self.settle();
        over
    }

    fn retire(&mut self, place: usize, within: Duration) {
        let id = self.hand(place).id;
        self.pool.retire(&mut self.reactor, id, within);
        self.settle();
    }
}

#[test]
fn a_stop_is_over_when_every_process_has_ended() {
    let mut stage = Stage::serving(settings(2));
    stage.dispatch([1]);
    stage.accept(0, 1, 1);
    drop(stage.hand(0).heard());
    let over = stage.stop(ms(2_500));
    for place in [0, 1] {
        assert_eq!(stage.hand(place).told_to_drain(), 2_500);
        assert_eq!(stage.stage_of(place), WorkerStage::Draining);
    }
    assert!(!stage.has_room());
    stage.end(1);
    stage.hang_up(0);
    stage.pass(ms(1_000));
    assert_eq!(stage.pool.statistics().workers, []);
    assert_eq!(over.get(), 0, "a process is there");
    stage.hand(0).exit(0);
    stage.pass(TICK);
    assert_eq!(over.get(), 1);
    // Asked to, and not replaced.
    stage.pass(ms(1_000));
    assert_eq!(stage.started(), 2);
    assert_eq!(stage.pool.statistics().deaths, 0);
    assert_eq!(stage.hand(0).kills.get() + stage.hand(1).kills.get(), 0);
}

#[test]
fn a_pool_without_workers_has_stopped_at_once() {
    let mut stage = Stage::serving(settings(1));
    // The second death in a row has the next one wait.
    stage.end(0);
    stage.greet_all();
    stage.end(1);
    let over = stage.stop(ms(1_000));
    assert_eq!(over.get(), 1);
    // The one that was to come does not.
    stage.pass(ms(1_000));
    assert_eq!(stage.started(), 2);
    // And what comes now is nobody's.
    stage.dispatch([5]);
    assert_eq!(stage.undelivered(), [(5, Undelivered::Stopped)]);
    assert_eq!(stage.pool.statistics().waiting, 0);
    // Stopped again, it says so again.
    assert_eq!(stage.stop(ms(1_000)).get(), 1);
}

#[test]
fn what_waits_is_given_out_before_workers_are_to_end() {
    let mut stage = Stage::serving(with(2, |it| it.window = 1));
    stage.dispatch([1, 2, 3]);
    let over = stage.stop(ms(1_000));
    assert_eq!(stage.hand(0).labels(), [1]);
    assert_eq!(stage.hand(1).labels(), [2]);
    assert_eq!(stage.stage_of(1), WorkerStage::Serving);
    stage.pass(ms(400));
    stage.accept(0, 1, 1);
    assert_eq!(stage.hand(0).labels(), [3]);
    stage.accept(0, 3, 2);
    // The second may have to go to the first, but not for ever.
    stage.pass(ms(80));
    assert_eq!(stage.stage_of(0), WorkerStage::Serving);
    stage.pass(ms(20));
    for place in [0, 1] {
        assert_eq!(stage.hand(place).told_to_drain(), 500);
    }
    stage.end(0);
    stage.end(1);
    assert_eq!(over.get(), 1);
    // It had not answered.
    assert_eq!(stage.undelivered(), [(2, Undelivered::Stopped)]);
}

#[test]
fn a_worker_that_starts_takes_what_waits_when_the_pool_stops() {
    let mut stage = Stage::starting(settings(2));
    stage.dispatch([1]);
    stage.stop(ms(1_000));
    assert_eq!(stage.stage_of(0), WorkerStage::Starting);
    stage.hand(1).greet();
    stage.settle();
    let heard = stage.hand(1).heard();
    assert_eq!(heard.len(), 2, "{heard:?}");
    // The other has nothing to end.
    assert_eq!(stage.stage_of(0), WorkerStage::Killed);
    assert_eq!(
        (stage.hand(0).kills.get(), stage.hand(1).kills.get()),
        (1, 0)
    );
}

#[test]
fn whoever_is_not_done_at_the_deadline_is_killed() {
    let mut settings = settings(3);
    settings.window = 1;
    settings.ack_timeout = ms(60_000);
    settings.kill_timeout = None;
    let mut stage = Stage::serving(settings);
    stage.dispatch([1, 2, 3, 4]);
    stage.pool.kill(stage.hand(2).id);
    let over = stage.stop(ms(1_000));
    stage.pass(ms(980));
    assert_eq!(stage.undelivered(), []);
    assert_eq!(stage.stage_of(0), WorkerStage::Serving);
    stage.pass(ms(20));
    assert_eq!(stage.undelivered(), [(4, Undelivered::Stopped)]);
    for place in 0..3 {
        assert_eq!(stage.stage_of(place), WorkerStage::Killed);
        assert_eq!(stage.hand(place).kills.get(), 1);
    }
    stage.pass(ms(1_000));
    assert_eq!(over.get(), 0);
    for place in 0..3 {
        assert_eq!(stage.hand(place).kills.get(), 1);
        stage.end(place);
    }
    assert_eq!(over.get(), 1);
    let stopped = Undelivered::Stopped;
    let mut undelivered = stage.undelivered();
    undelivered.sort_by_key(|(label, _)| *label);
    assert_eq!(undelivered, [(1, stopped), (2, stopped), (3, stopped)]);
}

/// However long it might take to exit otherwise.
#[test]
fn a_process_that_does_not_exit_is_killed_at_the_deadline_of_a_stop() {
    let mut stage = Stage::serving(with(1, |it| it.exit_timeout = ms(5_000)));
    let over = stage.stop(ms(1_000));
    stage.hang_up(0);
    stage.pass(ms(1_000) - TICK);
    assert_eq!(stage.hand(0).kills.get(), 0);
    stage.pass(TICK);
    assert_eq!((stage.hand(0).kills.get(), over.get()), (1, 0));
    stage.end(0);
    stage.pass(TICK);
    assert_eq!(over.get(), 1);
}

#[test]
fn of_two_stops_the_earlier_deadline_holds_and_both_are_told() {
    for (first, second) in [(2_000, 1_000), (1_000, 5_000)] {
        let _row = row((first, second));
        let mut settings = settings(1);
        settings.window = 1;
        settings.ack_timeout = ms(60_000);
        let mut stage = Stage::serving(settings);
        stage.dispatch([1, 2]);
        let overs = [stage.stop(ms(first)), stage.stop(ms(second))];
        stage.pass(ms(980));
        assert_eq!(stage.stage_of(0), WorkerStage::Serving);
        stage.pass(ms(20));
        assert_eq!(stage.stage_of(0), WorkerStage::Killed);
        stage.end(0);
        assert!(overs.iter().all(|over| over.get() == 1));
    }
}

#[test]
fn a_stop_without_an_end_waits_for_one() {
    let mut stage = Stage::serving(settings(2));
    stage.retire(0, Duration::MAX);
    let over = stage.stop(Duration::MAX);
    for place in [0, 1] {
        assert_eq!(stage.hand(place).told_to_drain(), u32::MAX);
    }
    stage.jump(ms(1_000_000_000));
    assert_eq!(stage.stage_of(0), WorkerStage::Draining);
    for place in 0..stage.started() {
        stage.end(place);
    }
    stage.pass(TICK);
    assert_eq!(over.get(), 1);
}

#[test]
fn calls_after_a_stop_are_made_in_order() {
    let mut stage = Stage::serving(settings(1));
    let made = Rc::new(RefCell::new(Vec::new()));
    for number in 0..3 {
        let told = Rc::clone(&made);
        let then = move |_: &mut _| told.borrow_mut().push(number);
        stage.pool.stop(&mut stage.reactor, ms(1_000), then);
    }
    stage.settle();
    stage.end(0);
    assert_eq!(made.take(), [0, 1, 2]);
}

#[test]
fn what_comes_while_the_pool_stops_is_nobodys() {
    let mut stage = Stage::serving(settings(1));
    stage.stop(ms(10_000));
    stage.dispatch([1]);
    stage.pass(TICK);
    assert_eq!(stage.undelivered(), [(1, Undelivered::Stopped)]);
}

#[test]
fn a_retired_worker_ends_and_another_one_is_there_at_once() {
    let mut stage = Stage::serving(settings(2));
    stage.dispatch([1]);
    stage.accept(0, 1, 1);
    drop(stage.hand(0).heard());
    stage.retire(0, ms(700));
    assert_eq!(stage.hand(0).told_to_drain(), 700);
    assert_eq!(stage.started(), 3);
    assert_eq!(stage.stage_of(0), WorkerStage::Draining);
    // Again: nothing more, however short.
    stage.retire(0, ms(10));
    assert_eq!(stage.hand(0).heard().len(), 0);
    stage.greet_all();
    stage.dispatch(2..6);
    assert_eq!(stage.hand(0).labels(), [0_u32; 0]);
    assert_eq!(
        stage.hand(1).labels().len() + stage.hand(2).labels().len(),
        4
    );
    stage.pass(ms(680));
    assert_eq!(stage.hand(0).kills.get(), 0);
    stage.pass(TICK);
    assert_eq!(stage.hand(0).kills.get(), 1);
    assert_eq!(stage.stage_of(0), WorkerStage::Killed);
    stage.end(0);
    let statistics = stage.pool.statistics();
    assert_eq!((statistics.deaths, statistics.started), (0, 3));
    // It is gone.
    stage.retire(0, ms(700));
    stage.pass(ms(1_000));
    assert_eq!(stage.started(), 3);
    assert_ne!(stage.stage_of(1), WorkerStage::Draining);
}

#[test]
fn a_hung_worker_can_be_retired() {
    let mut stage = Stage::serving(settings(1));
    stage.dispatch([1]);
    stage.pass(ms(1_000) + TICK);
    assert_eq!(stage.stage_of(0), WorkerStage::Hung);
    stage.retire(0, ms(700));
    assert_eq!(stage.hand(0).heard().len(), 2);
    assert_eq!(stage.started(), 2);
    stage.accept(0, 1, 1);
    assert_eq!(stage.stage_of(0), WorkerStage::Draining);
    assert_eq!(stage.pool.statistics().acknowledged, 1);
}

#[test]
fn a_worker_that_drains_by_itself_gets_a_deadline_when_it_is_retired() {
    let mut stage = Stage::serving(settings(1));
    stage.dispatch([1]);
    stage.refuse(0, 1, WorkerRefusal::Draining);
    drop(stage.hand(0).heard());
    stage.retire(0, ms(700));
    assert_eq!(stage.hand(0).told_to_drain(), 700);
    stage.pass(ms(700));
    assert_eq!(stage.stage_of(0), WorkerStage::Killed);
    stage.end(0);
    assert_eq!(stage.started(), 2, "in its place, once");
    assert_eq!(stage.pool.statistics().deaths, 0);
}

/// It has nothing, and has been asked to end: it is no death.
#[test]
fn a_worker_that_starts_is_retired_at_once() {
    let mut stage = Stage::starting(settings(1));
    stage.retire(0, ms(700));
    assert_eq!(stage.stage_of(0), WorkerStage::Killed);
    stage.end(0);
    assert_eq!(stage.started(), 2);
    assert_eq!(stage.pool.statistics().deaths, 0);
}

#[test]
fn a_killed_worker_is_not_retired() {
    let mut stage = Stage::serving(settings(1));
    stage.pool.kill(stage.hand(0).id);
    stage.retire(0, ms(700));
    assert_eq!(stage.hand(0).heard().len(), 0);
    assert_eq!(stage.hand(0).kills.get(), 1);
    stage.end(0);
    assert_eq!(stage.pool.statistics().deaths, 1);
}

#[test]
fn a_pool_is_printed_as_its_statistics() {
    let stage = Stage::starting(settings(1));
    let statistics = stage.pool.statistics();
    assert_eq!(format!("{:?}", stage.pool), format!("Pool({statistics:?})"));
}
