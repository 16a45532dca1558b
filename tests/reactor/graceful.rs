//! Graceful stops: who is told, who is waited for, and until when.

use std::any::Any;
use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use bowline::descriptor::{Descriptor, Next, Readiness, Token};
use bowline::error::ReactorError;
use bowline::lifecycle::{DrainRound, Phase, SystemEvent};
use bowline::testing::ManualClock;
use bowline::{GracefulStop, Limits, Reactor, Turn};

use crate::support::DescriptorLedger;
use crate::{Notes, PANIC};

type Script = Box<dyn FnMut(&mut Reactor, Token, DrainRound) -> Next>;

/// Does what its script says when it is told to drain.
struct Drains {
    name: &'static str,
    token: Token,
    notes: Notes<String>,
    script: Script,
}

impl Descriptor for Drains {
    fn ready(&mut self, _: &mut Reactor, _: Readiness) -> Next {
        Next::Keep
    }

    fn drain(&mut self, reactor: &mut Reactor, round: DrainRound) -> Next {
        self.notes.push(format!("{} {round:?}", self.name));
        (self.script)(reactor, self.token, round)
    }

    fn shutdown(&mut self, _: &mut Reactor) {
        self.notes.push(format!("{} shutdown", self.name));
    }

    fn facet(&mut self) -> &mut dyn Any {
        &mut self.name
    }
}

struct World {
    reactor: Reactor,
    clock: ManualClock,
    notes: Notes<String>,
    _ledger: DescriptorLedger,
}

impl World {
    fn new() -> Self {
        let ledger = DescriptorLedger::open();
        let clock = ManualClock::new();
        let mut reactor = Reactor::with_clock(clock.clone()).unwrap();
        reactor.start().unwrap();
        Self {
            reactor,
            clock,
            notes: Notes::new(),
            _ledger: ledger,
        }
    }

    fn add(
        &mut self,
        name: &'static str,
        script: impl FnMut(&mut Reactor, Token, DrainRound) -> Next + 'static,
    ) -> Token {
        add(&mut self.reactor, &self.notes, name, script)
    }

    fn turn(&mut self) -> Turn {
        self.reactor.turn(Some(Duration::ZERO))
    }

    fn stop_within(&mut self, seconds: u64) {
        let how = GracefulStop::new().deadline(Duration::from_secs(seconds));
        self.reactor.stop_gracefully(how).unwrap();
    }
}

fn add(
    reactor: &mut Reactor,
    notes: &Notes<String>,
    name: &'static str,
    script: impl FnMut(&mut Reactor, Token, DrainRound) -> Next + 'static,
) -> Token {
    let vacancy = reactor.vacancy().unwrap();
    let token = vacancy.token();
    let drains = Drains {
        name,
        token,
        notes: notes.clone(),
        script: Box::new(script),
    };
    vacancy.install(Box::new(drains))
}

/// Is waited for from the first round on.
fn awaited(reactor: &mut Reactor, token: Token, round: DrainRound) -> Next {
    if round == DrainRound::Intake {
        reactor.await_end(token);
    }
    Next::Keep
}

#[test]
fn defaults_are_those_of_the_documentation() {
    let how = GracefulStop::new();
    assert_eq!(how, GracefulStop::default());
    assert_eq!(
        how,
        how.deadline(Duration::from_secs(30))
            .grace(Duration::from_millis(500))
    );
    let mut world = World::new();
    let began = world.reactor.now();
    assert_eq!(world.reactor.stop_deadline(), None);
    world.reactor.stop_gracefully(how).unwrap();
    let deadline = world.reactor.stop_deadline();
    assert_eq!(deadline, Some(began + Duration::from_secs(30)));
    assert_eq!(world.reactor.stop_grace(), Duration::from_millis(500));
}

#[test]
fn a_reactor_that_does_not_run_cannot_be_stopped_in_any_way() {
    let _alone = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let refused = Err(ReactorError::NotRunning);
    assert_eq!(reactor.stop_gracefully(GracefulStop::new()), refused);
    assert_eq!(reactor.stop_now(), refused);
    reactor.call_soon(|reactor| reactor.stop_gracefully(GracefulStop::new()).unwrap());
    reactor.run().unwrap();
    assert_eq!(reactor.stop_gracefully(GracefulStop::new()), refused);
    assert_eq!(reactor.stop_deadline(), None);
}

/// With nothing to wait for it is over in the turn that asked, and leaves no timer.
#[test]
fn nothing_to_wait_for_is_not_waited_for() {
    let mut world = World::new();
    world.add("idle", |_, _, _| Next::Keep);
    world.stop_within(9);
    assert!(world.reactor.is_stopping() && !world.reactor.is_idle());
    assert_eq!(world.turn(), Turn::Stopped);
    assert_eq!(
        world.notes.all(),
        ["idle Intake", "idle Work", "idle Support", "idle shutdown"]
    );
    assert_eq!(world.reactor.delayed_calls().count(), 0);
    assert_eq!(world.reactor.statistics().cut, 0);
}

/// Nothing new comes any more when the program's own triggers run.
#[test]
fn triggers_come_when_the_intake_is_closed() {
    let mut world = World::new();
    let intake = world.add("it", |reactor, token, round| {
        if round == DrainRound::Intake {
            reactor.await_end(token);
        }
        Next::Keep
    });
    for (phase, name) in [
        (Phase::After, "after"),
        (Phase::During, "during"),
        (Phase::Before, "before"),
    ] {
        let note = world.notes.noting(name.to_owned());
        world
            .reactor
            .add_trigger(phase, SystemEvent::Shutdown, note);
    }
    // It may be of one who waits for connections, which have to be told then.
    let hold = world.reactor.hold(SystemEvent::Shutdown);
    world.stop_within(9);
    world.turn();
    assert_eq!(world.notes.all(), ["it Intake"]);
    world.reactor.await_no_more(intake);
    world.turn();
    assert_eq!(world.notes.all(), ["it Intake", "before", "it Work"]);
    drop(hold);
    assert_eq!(world.turn(), Turn::Stopped);
    assert_eq!(
        world.notes.all()[3..],
        ["it Support", "it shutdown", "during", "after"]
    );
}

#[test]
fn it_waits_for_whoever_asks_until_that_is_removed() {
    let mut world = World::new();
    let ends = world.add("ends", awaited);
    let gives_up = world.add("gives up", awaited);
    world.stop_within(9);
    for _ in 0..3 {
        assert_eq!(world.turn(), Turn::Continue);
        assert!(world.reactor.is_idle(), "it waits, and does not spin");
    }
    world.reactor.remove(ends);
    assert_eq!(world.turn(), Turn::Continue);
    world.reactor.await_no_more(gives_up);
    assert_eq!(world.turn(), Turn::Stopped);
    assert_eq!(world.reactor.statistics().cut, 0);
    let told = world.notes.all();
    assert_eq!(told.last().unwrap(), "gives up shutdown");
}

#[test]
fn what_is_removed_when_told_is_not_waited_for() {
    let mut world = World::new();
    world.add("goes", |reactor, token, _| {
        reactor.await_end(token);
        Next::Remove
    });
    world.stop_within(9);
    assert_eq!(world.turn(), Turn::Stopped);
    assert_eq!(world.notes.all(), ["goes Intake"]);
}

#[test]
fn each_round_comes_when_the_one_before_is_through_and_nothing_is_held() {
    let mut world = World::new();
    world.add("back", |reactor, token, round| {
        if round == DrainRound::Support {
            reactor.await_end(token);
        }
        Next::Keep
    });
    let front = world.add("front", |reactor, token, round| {
        if round == DrainRound::Work {
            reactor.await_end(token);
        }
        Next::Keep
    });
    let hold = world.reactor.hold(SystemEvent::Shutdown);
    world.stop_within(9);
    world.turn();
    world.reactor.remove(front);
    world.turn();
    let intake_and_work = ["back Intake", "front Intake", "back Work", "front Work"];
    assert_eq!(world.notes.all()[..4], intake_and_work);
    assert_eq!(world.notes.all()[4..], ["front shutdown"]);
    drop(hold);
    assert_eq!(world.turn(), Turn::Continue);
    assert_eq!(world.notes.all()[5..], ["back Support"]);
    // Held again, by who was told.
    let hold = world.reactor.hold(SystemEvent::Shutdown);
    assert_eq!(world.turn(), Turn::Continue);
    drop(hold);
    world.clock.advance(Duration::from_secs(9));
    assert_eq!(world.turn(), Turn::Stopped);
    assert_eq!(world.reactor.statistics().cut, 1);
}

#[test]
fn latecomers_are_told_too() {
    let mut world = World::new();
    let notes = world.notes.clone();
    let first = world.add("first", move |reactor, token, _| {
        add(reactor, &notes, "made by it", awaited);
        reactor.await_end(token);
        Next::Keep
    });
    world.stop_within(9);
    world.turn();
    let third = world.add("third", awaited);
    world.turn();
    assert_eq!(
        world.notes.all(),
        ["first Intake", "made by it Intake", "third Intake"]
    );
    world.reactor.remove(first);
    world.reactor.remove(third);
    // One of the three is left.
    assert_eq!(world.turn(), Turn::Continue);
    world.reactor.stop_now().unwrap();
    assert_eq!(world.turn(), Turn::Stopped);
}

#[test]
fn a_turn_tells_no_more_than_its_budget() {
    let mut world = World::new();
    world
        .reactor
        .set_limits(Limits::default().notifications(10));
    for _ in 0..35 {
        world.add("one", |_, _, _| Next::Keep);
    }
    world.stop_within(9);
    // The last turn of a round begins the next one.
    for told in [10, 20, 30, 45, 55, 65, 80, 90, 100] {
        assert_eq!(world.turn(), Turn::Continue);
        assert_eq!(world.notes.len(), told);
        assert!(!world.reactor.is_idle(), "there is more to tell");
    }
    assert_eq!(world.turn(), Turn::Stopped);
    assert_eq!(world.notes.len(), 3 * 35 + 35);
}

#[test]
fn the_deadline_cuts_what_is_waited_for_and_what_is_held() {
    for is_held in [false, true] {
        let mut world = World::new();
        world.add("one", awaited);
        world.add("two", awaited);
        world.add("not waited for", |_, _, _| Next::Keep);
        let hold = is_held.then(|| world.reactor.hold(SystemEvent::Shutdown));
        world.stop_within(9);
        world.turn();
        world.clock.advance(Duration::from_millis(8_999));
        assert_eq!(world.turn(), Turn::Continue);
        world.clock.advance(Duration::from_millis(1));
        assert_eq!(world.turn(), Turn::Stopped);
        assert_eq!(world.reactor.statistics().cut, 2);
        // They were never through with the first round.
        assert_eq!(world.notes.len(), 6);
        drop(hold);
    }
}

#[test]
fn of_two_deadlines_the_shorter_counts() {
    for (first, second) in [(9, 5), (5, 9)] {
        let mut world = World::new();
        world.add("it", awaited);
        world.stop_within(first);
        world.turn();
        world.stop_within(second);
        world.clock.advance(Duration::from_millis(4_999));
        assert_eq!(world.turn(), Turn::Continue);
        world.clock.advance(Duration::from_millis(1));
        assert_eq!(world.turn(), Turn::Stopped);
        assert_eq!(world.notes.all(), ["it Intake", "it shutdown"]);
    }
}

#[test]
fn stop_now_waits_for_nobody_in_whatever_state() {
    for state in ["running", "asked", "held", "draining"] {
        let mut world = World::new();
        world.add("it", awaited);
        let note = world.notes.noting("before".to_owned());
        world
            .reactor
            .add_trigger(Phase::Before, SystemEvent::Shutdown, note);
        let _hold = world.reactor.hold(SystemEvent::Shutdown);
        match state {
            "running" => {}
            "asked" => world.stop_within(9),
            "held" => {
                world.reactor.stop().unwrap();
                assert_eq!(world.turn(), Turn::Continue);
            }
            _ => {
                world.stop_within(9);
                assert_eq!(world.turn(), Turn::Continue);
            }
        }
        world.reactor.stop_now().unwrap();
        assert!(world.reactor.is_stopping() && !world.reactor.is_idle());
        assert_eq!(world.turn(), Turn::Stopped, "{state}");
        let told = world.notes.all();
        assert!(told.contains(&"before".to_owned()), "{state}");
        assert_eq!(told.last().unwrap(), "it shutdown", "{state}");
    }
}

/// A stop that somebody holds becomes a graceful one.
#[test]
fn a_stop_that_is_held_can_be_made_graceful() {
    let mut world = World::new();
    let it = world.add("it", awaited);
    let hold = world.reactor.hold(SystemEvent::Shutdown);
    world.reactor.stop().unwrap();
    world.turn();
    assert_eq!(world.notes.len(), 0);
    world.stop_within(9);
    drop(hold);
    assert_eq!(world.turn(), Turn::Continue);
    assert_eq!(world.notes.all(), ["it Intake"]);
    world.reactor.remove(it);
    assert_eq!(world.turn(), Turn::Stopped);
}

#[test]
fn a_panic_when_told_costs_that_one_and_nobody_waits_for_it() {
    let mut world = World::new();
    world.add("panics", |reactor, token, _| {
        reactor.await_end(token);
        panic!("{PANIC}");
    });
    world.add("other", |_, _, _| Next::Keep);
    world.stop_within(9);
    assert_eq!(world.turn(), Turn::Stopped);
    assert_eq!(
        world.notes.all(),
        [
            "panics Intake",
            "other Intake",
            "other Work",
            "other Support",
            "other shutdown"
        ]
    );
}

/// What a crash leaves of a stop is nothing to the next run.
#[test]
fn a_crash_ends_it_and_the_next_run_begins_anew() {
    let mut world = World::new();
    let it = world.add("it", awaited);
    world.stop_within(9);
    world.turn();
    world.reactor.crash().unwrap();
    assert_eq!(world.turn(), Turn::Stopped);
    world.reactor.start().unwrap();
    assert_eq!(world.reactor.stop_deadline(), None);
    world.clock.advance(Duration::from_secs(10));
    assert_eq!(world.turn(), Turn::Continue);
    assert!(!world.reactor.is_stopping());
    world.stop_within(9);
    world.turn();
    assert_eq!(world.notes.all(), ["it Intake", "it Intake"]);
    world.reactor.remove(it);
    assert_eq!(world.turn(), Turn::Stopped);
}

/// What callbacks of the very end ask for changes nothing, then or later.
#[test]
fn asked_for_by_the_last_callbacks_it_is_in_vain() {
    let mut world = World::new();
    let asked = Rc::new(Cell::new(0));
    for phase in [Phase::During, Phase::After] {
        let asked = Rc::clone(&asked);
        world
            .reactor
            .add_trigger(phase, SystemEvent::Shutdown, move |reactor| {
                reactor.stop_gracefully(GracefulStop::new()).unwrap();
                reactor.stop_now().unwrap();
                asked.set(asked.get() + 1);
            });
    }
    world.stop_within(9);
    assert_eq!(world.turn(), Turn::Stopped);
    assert_eq!(asked.get(), 2);
    assert_eq!(world.reactor.delayed_calls().count(), 0);
    world.reactor.start().unwrap();
    assert_eq!(world.turn(), Turn::Continue);
    assert!(!world.reactor.is_stopping());
}
