//! The process that serves, with successors by hand.

use std::ops::Range;
use std::rc::Rc;

use bowline::Reactor;
use bowline::{Tcp, Unix};

use super::wire::{
    Hand, commit, gives_up, go, live, number, offer, prepared, ready, serving, take, taken, takes,
};
use super::{Line, Server, Stage, Staged, ms};
use crate::support::{Recorder, row};

/// How many steps a successor goes from its hello to everything.
const STEPS: usize = 4;

fn step(hand: &Hand, step: usize) {
    hand.send(&[take(0), taken(0), ready(), serving()][step], &[]);
}

/// Goes those steps, each when everything has come of the one before.
fn go_on(stage: &mut Stage, hand: &Hand, steps: Range<usize>) {
    for at in steps {
        step(hand, at);
        stage.settle();
    }
}

/// The process that serves `web`, and a successor that has said hello.
fn visited() -> (Stage, Server, Hand) {
    let (mut stage, server) = Stage::serving();
    let hand = stage.successor(1);
    (stage, server, hand)
}

#[test]
fn everything_is_handed_over_step_by_step() {
    let mut stage = Stage::new();
    let server = stage.begin("old", &["web", "more"]);
    server.events();
    let hand = stage.successor(1);
    let mut heard = Vec::new();
    for at in 0..STEPS {
        assert!(server.restart.is_serving());
        step(&hand, at);
        stage.settle();
        heard.push(hand.hears());
    }
    assert_eq!(
        heard.concat(),
        [
            "offer 1 [1]",
            "listeners 0: control+ web+ more+ [3]",
            "commit",
            "done",
            "lost"
        ]
    );
    assert_eq!(heard[1], [""; 0], "nothing until it is ready");
    assert_eq!(server.events(), ["handed over"]);
    assert!(server.restart.has_handed_over() && !server.restart.is_serving());
    assert!(!server.restart.is_under_way());
    // The files are the successor's, which has not closed the listeners.
    assert!(stage.is_listening("web") && stage.is_listening("more"));
    hand.descriptors.borrow_mut().clear();
    crate::support::wait_for_closes();
    assert!(!stage.is_listening("web") && stage.path("web").exists());
    assert!(stage.control().exists());
}

#[test]
fn somebody_who_never_greets_has_the_time_of_an_answer() {
    let mut stage = Stage::new();
    let _server = stage.begin("old", &["web"]);
    let socket = std::os::unix::net::UnixStream::connect(stage.control()).expect("it listens");
    let hand = Hand::new(socket);
    stage.settle();
    stage.advance(ms(999));
    assert_eq!(hand.hears(), [""; 0]);
    stage.advance(ms(1));
    assert_eq!(hand.hears(), ["lost"]);
}

#[test]
fn one_that_serves_says_that_a_successor_is_under_way() {
    let (mut stage, server, hand) = visited();
    assert!(!server.restart.is_under_way(), "it has not asked");
    go_on(&mut stage, &hand, 0..1);
    assert!(server.restart.is_under_way());
    let printed = format!("{:?}", server.restart);
    assert_eq!(printed, "Restart { role: Serving, is_under_way: true, .. }");
    stage.hang_up(hand);
    assert!(!server.restart.is_under_way());
}

#[test]
fn each_step_has_its_own_limit() {
    // Those that a successor has gone, and how long the next may take.
    for (steps, limit) in [(0, 1_000), (1, 1_000), (2, 5_000), (3, 1_000)] {
        let _row = row((steps, limit));
        let (mut stage, server, hand) = visited();
        go_on(&mut stage, &hand, 0..steps);
        hand.hears();
        stage.advance(ms(limit - 1));
        assert_eq!(hand.hears(), [""; 0], "{steps}");
        stage.advance(ms(1));
        assert_eq!(hand.hears(), ["takes back", "lost"], "{steps}");
        let told = server.events();
        if steps == 0 {
            assert_eq!(told, [""; 0], "it never asked");
        } else {
            assert_eq!(told, ["goes on: the other process took too long"]);
        }
        assert!(server.restart.is_serving() && !server.restart.is_under_way());
        let mut client = stage.client("web");
        assert_eq!(stage.ask(&mut client, "who"), "old 0", "{steps}");
        // That was all.
        drop(hand);
        stage.advance(ms(60_000));
        assert_eq!(server.events(), [""; 0], "{steps}");
    }
}

/// Also of those that are shorter than the time before them in which the other is
/// looked at once more.
#[test]
fn shortest_limit_is_kept() {
    let mut stage = Stage::new();
    let mut settings = stage.settings();
    settings.answer = ms(10);
    let _server = stage.begin_with(settings, "old", &["web"]);
    let hand = stage.successor(1);
    go_on(&mut stage, &hand, 0..1);
    hand.hears();
    stage.advance(ms(9));
    assert_eq!(hand.hears(), [""; 0]);
    stage.advance(ms(1));
    assert_eq!(hand.hears(), ["takes back", "lost"]);
}

/// A limit begins anew with each step.
#[test]
fn successor_that_is_just_in_time_at_each_step_takes_over() {
    let (mut stage, server, hand) = visited();
    for (at, limit) in [1_000, 1_000, 5_000, 1_000].into_iter().enumerate() {
        stage.advance(ms(limit - 1));
        step(&hand, at);
        stage.settle();
    }
    assert!(server.restart.has_handed_over());
}

#[test]
fn successor_that_ends_at_any_step_leaves_the_old_one_serving() {
    for steps in 0..STEPS {
        for gives in [false, true] {
            let _row = row((steps, gives));
            let (mut stage, server, hand) = visited();
            go_on(&mut stage, &hand, 0..steps);
            // Nobody is lost who comes meanwhile.
            let mut waiting = stage.client("web");
            hand.hears();
            if gives {
                stage.say(&hand, &gives_up());
                assert_eq!(hand.hears(), ["takes back", "lost"]);
            }
            stage.hang_up(hand);
            let wanted = match (steps, gives) {
                (0, _) => vec![],
                (_, true) => vec!["goes on: the other process gave up"],
                (_, false) => vec!["goes on: the other process is gone"],
            };
            assert_eq!(server.events(), wanted, "{steps} {gives}");
            assert_eq!(stage.ask(&mut waiting, "who"), "old 0", "{steps} {gives}");
            drop(waiting);
            stage.settle();
            server.events();
            // The next is served, from the beginning.
            let hand = stage.successor(2);
            go_on(&mut stage, &hand, 0..STEPS);
            assert_eq!(server.events(), ["handed over"]);
        }
    }
}

/// Its channel has ended there, and it serves without it: with everything that it had by
/// then.
#[test]
fn one_that_serves_without_its_channel_is_left_to_it() {
    // It has said that it has the listeners, is ready, serves.
    for steps in 2..STEPS {
        for is_late in [false, true] {
            let _row = row((steps, is_late));
            let mut stage = Stage::new();
            let server = stage.begin("old", &["web"]);
            let mut client = stage.client("web");
            stage.ask(&mut client, "stay");
            server.events();
            let hand = stage.successor(1);
            go_on(&mut stage, &hand, 0..1);
            let baton = hand.baton();
            go_on(&mut stage, &hand, 1..steps);
            assert!(takes(baton));
            if is_late {
                // What comes of it is only that its end is waited for.
                stage.say(&hand, &gives_up());
                stage.advance(ms(999));
                assert!(server.restart.is_under_way(), "{steps}");
                assert!(!server.restart.has_handed_over(), "{steps}");
            }
            hand.hears();
            stage.hang_up(hand);
            assert_eq!(
                server.events().last().expect("told"),
                "handed over",
                "{steps}"
            );
            assert!(!server.restart.is_under_way() && server.restart.has_handed_over());
            assert_eq!(server.restart.successors_failed(), 0);
            assert_eq!(stage.ask(&mut client, "who"), "old 0");
            // The files are its own to remove.
            assert!(stage.path("web").exists() && stage.control().exists());
        }
    }
}

/// As if it were the last that is heard of it.
#[test]
fn one_that_serves_without_its_channel_is_not_waited_for_without_end() {
    let (mut stage, server, hand) = visited();
    go_on(&mut stage, &hand, 0..1);
    assert!(takes(hand.baton()));
    go_on(&mut stage, &hand, 1..2);
    stage.advance(ms(5_999));
    assert!(server.restart.is_under_way());
    stage.advance(ms(1));
    assert!(server.restart.has_handed_over());
}

/// Whoever dies after that has died in the middle of serving.
#[test]
fn one_that_has_left_takes_nothing_back() {
    let (mut stage, server, hand) = visited();
    go_on(&mut stage, &hand, 0..1);
    let baton = hand.baton();
    go_on(&mut stage, &hand, 1..STEPS);
    stage.hang_up(hand);
    assert!(server.restart.has_handed_over());
    assert!(takes(baton), "it is the successor's to take");
}

#[test]
fn nothing_is_accepted_between_commit_and_the_end() {
    let (mut stage, server, hand) = visited();
    go_on(&mut stage, &hand, 0..2);
    let mut before = stage.client("web");
    assert_eq!(stage.ask(&mut before, "who"), "old 0");
    before
        .socket
        .shutdown(std::net::Shutdown::Both)
        .expect("open");
    stage.settle();
    go_on(&mut stage, &hand, 2..3);
    assert_eq!(hand.hears().last().expect("a word"), "commit");
    let mut client = stage.client("web");
    assert_eq!(stage.ask(&mut client, "who"), "");
    stage.hang_up(hand);
    assert_eq!(client.hears(), "old 1");
    assert!(server.restart.is_serving());
    // And the files are its own again.
    drop(server);
    drop(stage.reactor);
    assert!(!stage.directory.path().join("web").exists());
    assert!(!stage.directory.path().join("control/control").exists());
}

#[test]
fn one_of_another_format_is_refused() {
    let mut stage = Stage::new();
    let mut settings = stage.settings();
    settings.format = 7;
    let server = stage.begin_with(settings, "old", &["web"]);
    server.events();
    for format in [0, 6, 8] {
        let _row = row(format);
        let hand = stage.successor(1);
        stage.say(&hand, &take(format));
        assert_eq!(hand.hears(), ["refused 2", "lost"]);
        assert!(!server.restart.is_under_way());
    }
    // Nobody here has started them.
    assert_eq!(server.events(), [""; 0]);
    let hand = stage.successor(1);
    stage.say(&hand, &take(7));
    assert_eq!(hand.hears()[0], "offer 1 [1]");
}

#[test]
fn second_successor_is_refused_while_the_first_is_served() {
    let (mut stage, server) = Stage::serving();
    let (first, second) = (stage.successor(1), stage.successor(2));
    go_on(&mut stage, &first, 0..1);
    go_on(&mut stage, &second, 0..1);
    assert_eq!(second.hears(), ["refused 1", "lost"]);
    stage.hang_up(second);
    assert_eq!(server.events(), [""; 0]);
    assert!(server.restart.is_under_way());
    first.hears();
    go_on(&mut stage, &first, 1..STEPS);
    assert_eq!(first.hears(), ["commit", "done", "lost"]);
    assert_eq!(server.events(), ["handed over"]);
}

#[test]
fn successor_that_asks_when_all_is_handed_over_is_refused() {
    let mut stage = Stage::new();
    let server = stage.begin("old", &["web"]);
    let (first, second) = (stage.successor(1), stage.successor(2));
    go_on(&mut stage, &first, 0..STEPS);
    assert!(server.restart.has_handed_over());
    go_on(&mut stage, &second, 0..1);
    assert_eq!(second.hears(), ["refused 3", "lost"]);
    assert_eq!(server.events().last().expect("told"), "handed over");
    let command = std::process::Command::new("true");
    let again = server.restart.start_successor(&mut stage.reactor, command);
    let error = again.expect_err("it has handed over");
    assert_eq!(error.to_string(), "this process does not serve");
}

/// It offered what it still had: nothing, of which nobody can serve. Now it says so, and
/// whoever was refused looks again.
#[test]
fn successor_that_asks_one_that_stops_is_refused() {
    let mut stage = Stage::new();
    stage.reactor.start().expect("it does not run");
    let server = stage.begin("old", &["web"]);
    let hands = [stage.successor(1), stage.successor(2)];
    let half = &hands[1];
    go_on(&mut stage, half, 0..1);
    assert_eq!(half.hears()[0], "offer 1 [1]");
    let hold = stage
        .reactor
        .hold(bowline::lifecycle::SystemEvent::Shutdown);
    let how = bowline::GracefulStop::new();
    stage.reactor.stop_gracefully(how).expect("it runs");
    stage.settle();
    step(&hands[0], 0);
    // Nor does it start one.
    let command = std::process::Command::new("true");
    let started = server.restart.start_successor(&mut stage.reactor, command);
    let error = started.expect_err("it stops");
    assert_eq!(error.to_string(), "this process does not serve");
    // One that it serves is told the same when it does not get on.
    stage.say(half, &taken(9));
    for hand in &hands {
        assert_eq!(hand.hears(), ["refused 3", "lost"]);
    }
    drop((hands, hold, server));
}

#[test]
fn what_has_no_business_at_a_step_ends_the_attempt() {
    let all = || {
        [
            take(0),
            taken(0),
            ready(),
            serving(),
            prepared(1, &[]),
            live(1),
        ]
    };
    for steps in 1..STEPS {
        for (at, message) in all().into_iter().enumerate() {
            if at == steps {
                continue;
            }
            let (mut stage, server, hand) = visited();
            go_on(&mut stage, &hand, 0..steps);
            hand.hears();
            stage.say(&hand, &message);
            assert_eq!(hand.hears(), ["takes back", "lost"], "{steps} {at}");
            let gave_up = ["goes on: the other process gave up"];
            assert_eq!(server.events(), gave_up, "{steps} {at}");
        }
    }
    // What a predecessor says, and what nobody does.
    for message in [offer(1), commit(), go(1), number(0x0299, 1)] {
        let (mut stage, server, hand) = visited();
        go_on(&mut stage, &hand, 0..1);
        hand.hears();
        stage.say(&hand, &message);
        assert_eq!(hand.hears(), ["lost"]);
        assert_eq!(server.events(), ["goes on: the other process is gone"]);
    }
}

#[test]
fn more_listeners_than_one_message_holds_go_in_several() {
    let mut stage = Stage::new();
    let settings = stage.settings();
    let server = stage.begin_as(settings, "old", |_, reactor, listeners| {
        for at in 0..2 * 253_usize {
            let any = ([127, 0, 0, 1], 0).into();
            let recorder = |_: &bowline::Address| Recorder::default();
            listeners.listen(reactor, &at.to_string(), Tcp::at(any), recorder)?;
        }
        Ok(())
    });
    stage.settle();
    let hand = stage.successor(1);
    go_on(&mut stage, &hand, 0..1);
    let mut heard = Vec::new();
    for batch in 0..3 {
        heard.extend(hand.hears());
        stage.say(&hand, &taken(batch));
    }
    let names = |range: Range<usize>| {
        let names = range.map(|at| format!(" {at}"));
        names.collect::<String>()
    };
    assert_eq!(
        heard,
        [
            "offer 3 [1]".to_owned(),
            format!("listeners 0: control+{} [253]", names(0..252)),
            format!("listeners 1:{} [253]", names(252..505)),
            "listeners 2: 505 [1]".to_owned(),
        ]
    );
    stage.say_all(&hand, [ready(), serving()]);
    assert!(server.restart.has_handed_over());
}

#[test]
fn batch_acknowledged_out_of_turn_ends_the_attempt() {
    let (mut stage, server, hand) = visited();
    go_on(&mut stage, &hand, 0..1);
    hand.hears();
    stage.say(&hand, &taken(1));
    assert_eq!(hand.hears(), ["takes back", "lost"]);
    assert!(!server.restart.is_under_way());
}

/// It was stopped by the program: it is nobody's to pass on, and no reason not to be
/// replaced.
#[test]
fn listener_that_the_program_has_stopped_is_not_passed_on() {
    let mut stage = Stage::new();
    let handles = Rc::new(std::cell::RefCell::new(Vec::new()));
    let kept = Rc::clone(&handles);
    let directory = stage.directory.path().to_owned();
    let settings = stage.settings();
    let server = stage.begin_as(settings, "old", move |scene, reactor, listeners| {
        for name in ["web", "more"] {
            let lines = Line::factory(scene, listeners.restart());
            let path = directory.join(name);
            let handle = listeners.listen(reactor, name, Unix::at(path), lines)?;
            kept.borrow_mut().push(handle);
        }
        Ok(())
    });
    stage.settle();
    let stop = |reactor: &mut Reactor| {
        let listener = reactor.get(handles.borrow()[0]);
        listener.expect("it listens").stop_listening();
    };
    stop(&mut stage.reactor);
    stage.settle();
    let hand = stage.successor(1);
    go_on(&mut stage, &hand, 0..1);
    assert_eq!(
        hand.hears(),
        ["offer 1 [1]", "listeners 0: control+ more+ [2]"]
    );
    go_on(&mut stage, &hand, 1..STEPS);
    assert!(server.restart.has_handed_over());
}
