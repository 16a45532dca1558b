//! Connections that move: to a successor by hand, and to one beside it.

use super::children::{Sleeper, reap};
use super::wire::{
    Hand, NONSENSE, connections, gives_up, live, nothing, prepared, ready, serving, take, taken,
    takes,
};
use super::{Client, Server, Stage, Staged, ms};
use crate::capture;
use crate::support::row;

/// What of a message is kept for all but the connections.
const OVERHEAD: u32 = 4_096;

/// What a connection counts beside what it holds: its kind is `line`.
const EACH: usize = 64 + 4;

const MIB: usize = 1 << 20;

/// The one that serves, with so many clients.
fn serving_clients(count: usize) -> (Stage, Server, Vec<Client>) {
    let (mut stage, server) = Stage::serving();
    let clients = (0..count).map(|_| stage.client("web")).collect();
    (stage, server, clients)
}

/// A successor that is ready.
fn ready_one(stage: &mut Stage, max_payload: u32) -> Hand {
    let hand = stage.successor_with(1, max_payload);
    make_ready(stage, &hand);
    hand
}

/// The same, that was started here.
fn ready_child(stage: &mut Stage, server: &Server) -> (Sleeper, Hand) {
    let child = Sleeper::start(stage, server);
    let hand = stage.successor(child.pid);
    make_ready(stage, &hand);
    (child, hand)
}

fn make_ready(stage: &mut Stage, hand: &Hand) {
    stage.say(hand, &take(0));
    make_ready_after_take(stage, hand);
}

fn make_ready_after_take(stage: &mut Stage, hand: &Hand) {
    stage.say(hand, &taken(0));
    hand.hears();
    hand.descriptors.borrow_mut().clear();
    stage.say(hand, &ready());
}

/// What has come, and what comes when that is taken.
fn hears(stage: &mut Stage, hand: &Hand) -> Vec<String> {
    let mut all = Vec::new();
    for _ in 0..60 {
        all.extend(hand.hears());
        stage.settle();
    }
    all.extend(hand.hears());
    all
}

/// Takes every batch that comes, until there are no more; what came.
fn take_all(stage: &mut Stage, hand: &Hand) -> Vec<String> {
    let mut all = Vec::new();
    for batch in 1.. {
        let heard = hears(stage, hand);
        let is_over = heard.iter().any(|heard| heard == "commit");
        all.extend(heard);
        if is_over {
            break;
        }
        assert!(batch < 10, "more and more: {all:?}");
        stage.say(hand, &prepared(batch, &[]));
        stage.say(hand, &live(batch));
    }
    all
}

/// What those that were sent hold, by batch: state and descriptors.
fn sizes(heard: &[String]) -> Vec<Vec<(usize, usize)>> {
    heard
        .iter()
        .filter(|heard| heard.starts_with("connections"))
        .map(|heard| {
            let records = heard.split(' ').filter(|word| word.starts_with("line/"));
            records
                .map(|record| {
                    let fields: Vec<_> = record.split('/').collect();
                    let number = |at: usize| fields[at].parse().expect("a number");
                    (number(2 - 1), number(5))
                })
                .collect()
        })
        .collect()
}

/// However many come, those that were there are followed by the end of accepting.
/// Each came with the next message before, and a restart under load had no end.
#[test]
fn connections_that_come_while_others_move_follow_when_nobody_is_accepted() {
    let (mut stage, server, mut clients) = serving_clients(2);
    let hand = ready_one(&mut stage, 1 << 20);
    let sent = ["connections 1: line/0/0/0/[]/0 line/0/0/0/[]/0 [2]"];
    assert_eq!(hand.hears(), sent);
    clients.push(stage.client("web"));
    stage.say(&hand, &prepared(1, &[]));
    clients.push(stage.client("web"));
    assert_eq!(hand.hears(), ["go 1"]);
    stage.say(&hand, &live(1));
    assert_eq!(hand.hears(), ["commit"]);
    stage.say(&hand, &serving());
    let sent = ["connections 2: line/0/0/0/[]/0 line/0/0/0/[]/0 [2]"];
    assert_eq!(hand.hears(), sent);
    stage.say(&hand, &prepared(2, &[]));
    assert_eq!(hand.hears(), ["go 2"]);
    stage.say(&hand, &live(2));
    assert_eq!(hand.hears(), ["done", "lost"]);
    assert_eq!(server.restart.connections_moved(), 4);
    assert!(clients.iter_mut().all(|client| client.hears().is_empty()));
}

#[test]
fn connections_move_with_what_they_hold() {
    let (mut stage, server, mut clients) = serving_clients(2);
    stage.ask(&mut clients[0], "keep 10");
    stage.ask(&mut clients[0], "unread 3");
    stage.ask(&mut clients[1], "hold 2");
    let hand = ready_one(&mut stage, 1 << 20);
    let sent = ["connections 1: line/10/3/0/[]/0 line/0/0/0/[]/2 [4]"];
    assert_eq!(hand.hears(), sent);
    assert_eq!(server.events(), ["packs 0", "packs 1"]);
    stage.say(&hand, &prepared(1, &[]));
    assert_eq!(hand.hears(), ["go 1"]);
    assert_eq!(server.restart.connections_moved(), 0);
    stage.say(&hand, &live(1));
    assert_eq!(hand.hears(), ["commit"]);
    assert_eq!(server.restart.connections_moved(), 2);
    stage.say(&hand, &serving());
    assert_eq!(hand.hears(), ["done", "lost"]);
    // Not lost: they go on elsewhere.
    assert_eq!(server.events(), ["handed over"]);
    assert_eq!([clients[0].hears(), clients[1].hears()], ["", ""]);
    // Only there.
    hand.descriptors.borrow_mut().clear();
    assert_eq!([clients[0].hears(), clients[1].hears()], ["lost", "lost"]);
}

#[test]
fn bytes_and_descriptors_that_had_not_left_move_along() {
    let (mut stage, server, mut clients) = serving_clients(1);
    for question in ["write 400000", "fill 300000", "pass 2", "pass 1"] {
        stage.tell(&mut clients[0], question);
    }
    let hand = ready_one(&mut stage, 1 << 20);
    assert_eq!(
        hears(&mut stage, &hand),
        ["connections 1: line/0/0/300008/[(300000, 300004, 2), (300004, 300008, 1)]/0 [4]"]
    );
    stage.hang_up(hand);
    server.events();
    let new = stage.begin("new", &["web"]);
    let moved = "moved line 0 unread 0 unsent 300008 \
                 [(Some(300000..300004), 2), (Some(300004..300008), 1)] held 0";
    assert!(new.events().contains(&moved.to_owned()));
    // Every byte, once.
    let mut count = 0;
    for _ in 0..20 {
        count += clients[0].count();
        stage.settle();
    }
    assert!(count >= 300_008, "{count}");
    assert_eq!(stage.ask(&mut clients[0], "who"), "new 0");
}

#[test]
fn connections_that_are_refused_stay() {
    let (mut stage, server, mut clients) = serving_clients(3);
    stage.ask(&mut clients[0], "keep 5");
    let hand = ready_one(&mut stage, 1 << 20);
    stage.say(&hand, &prepared(1, &[0, 2]));
    assert_eq!(server.events()[3..], ["0 reattached", "2 reattached"]);
    assert_eq!(stage.ask(&mut clients[0], "who"), "old 0");
    assert_eq!(stage.ask(&mut clients[2], "who"), "old 2");
    stage.say(&hand, &live(1));
    assert_eq!(server.restart.connections_moved(), 1);
    stage.say(&hand, &serving());
    assert!(server.restart.has_handed_over());
    assert_eq!(stage.ask(&mut clients[0], "who"), "old 0");
    // Nobody has read it here.
    assert_eq!(stage.ask(&mut clients[1], "who"), "");
}

/// It has another handle after it came back, and what it packed.
#[test]
fn connection_that_came_back_moves_with_the_next_successor() {
    let (mut stage, server, mut clients) = serving_clients(2);
    stage.ask(&mut clients[0], "keep 9");
    stage.ask(&mut clients[1], "hold 3");
    let hand = ready_one(&mut stage, 1 << 20);
    stage.hang_up(hand);
    let gone = "goes on: the other process is gone";
    let wanted = ["packs 0", "packs 1", "0 reattached", "1 reattached", gone];
    assert_eq!(server.events(), wanted);
    let new = stage.begin("new", &["web"]);
    let events = new.events();
    assert!(
        events[0] == "listens" && events[3].starts_with("took over "),
        "{events:?}"
    );
    let moved = |state, held| format!("moved line {state} unread 0 unsent 0 [] held {held}");
    assert_eq!(events[1..3], [moved(9, 0), moved(0, 3)]);
    assert!(events[3].ends_with(" 2"), "{events:?}");
    assert_eq!(new.restart.connections_moved(), 2);
    assert_eq!(stage.ask(&mut clients[1], "who"), "new 1");
}

#[test]
fn connections_come_back_if_the_successor_fails_before_they_are_its_own() {
    for is_told in [false, true] {
        for (fails, how) in ["drop", "gives up", "nonsense", "wrong batch"]
            .iter()
            .enumerate()
        {
            let _row = row((is_told, how));
            let (mut stage, server, mut clients) = serving_clients(2);
            let hand = ready_one(&mut stage, 1 << 20);
            if is_told {
                stage.say(&hand, &prepared(1, &[]));
                assert_eq!(hand.hears().last().expect("a word"), "go 1");
            }
            hand.descriptors.borrow_mut().clear();
            match fails {
                0 => {}
                1 => hand.send(&gives_up(), &[]),
                // Live before it was told to go, and prepared again.
                2 if is_told => hand.send(&prepared(1, &[]), &[]),
                2 => hand.send(&live(1), &[]),
                _ if is_told => hand.send(&live(2), &[]),
                _ => hand.send(&prepared(2, &[]), &[]),
            }
            stage.settle();
            if fails != 0 {
                let heard = hand.hears();
                assert!(
                    heard.ends_with(&["takes back".into(), "lost".into()]),
                    "{how}"
                );
            }
            stage.hang_up(hand);
            // It was hung up on, and what it may have said was not heard.
            let is_known = !is_told || fails < 2;
            for (at, client) in clients.iter_mut().enumerate() {
                if is_known {
                    let answer = stage.ask(client, "who");
                    assert_eq!(answer, format!("old {at}"), "{is_told} {how}");
                } else {
                    assert_eq!(client.hears(), "lost", "{is_told} {how}");
                }
            }
            let events = server.events();
            let is_back = events.contains(&"1 reattached".into());
            assert_eq!(is_back, is_known, "{events:?}");
            assert_eq!(server.restart.connections_moved(), 0);
        }
    }
}

/// It is gone by the time that they are taken apart.
#[test]
fn connections_stay_here_if_the_successor_dies_as_soon_as_it_is_ready() {
    let (mut stage, server, mut clients) = serving_clients(1);
    let hand = stage.successor(1);
    stage.say_all(&hand, [take(0), taken(0)]);
    hand.send(&ready(), &[]);
    stage.hang_up(hand);
    let events = server.events();
    let gone = "goes on: the other process is gone";
    assert!(events.contains(&gone.to_owned()), "{events:?}");
    assert_eq!(stage.ask(&mut clients[0], "who"), "old 0");
    assert_eq!(server.restart.connections_moved(), 0);
}

#[test]
fn batch_on_its_way_has_its_limit() {
    let (mut stage, server, mut clients) = serving_clients(1);
    let hand = ready_one(&mut stage, 1 << 20);
    stage.advance(ms(999));
    assert_eq!(hand.hears().len(), 1);
    stage.advance(ms(1));
    assert_eq!(hand.hears(), ["takes back", "lost"]);
    let late = "goes on: the other process took too long";
    assert_eq!(server.events().last().expect("told"), late);
    assert_eq!(stage.ask(&mut clients[0], "who"), "old 0");
    drop(hand);
    // Just in time, at both steps, and the one after that.
    let hand = ready_one(&mut stage, 1 << 20);
    for message in [prepared(1, &[]), live(1), serving()] {
        stage.advance(ms(999));
        stage.say(&hand, &message);
    }
    assert!(server.restart.has_handed_over());
}

/// A stranger may serve them by then: they are left to it.
#[test]
fn connections_of_a_stranger_that_hangs_when_told_to_go_are_not_taken_back() {
    let (mut stage, server, mut clients) = serving_clients(1);
    let hand = ready_one(&mut stage, 1 << 20);
    stage.say(&hand, &prepared(1, &[]));
    hand.hears();
    stage.advance(ms(999));
    assert_eq!(hand.hears(), [""; 0]);
    capture::start();
    stage.advance(ms(1));
    assert_eq!(capture::lines("1 connections are left to").len(), 1);
    assert_eq!(hand.hears(), ["takes back", "lost"]);
    let late = ["packs 0", "goes on: the other process took too long"];
    assert_eq!(server.events(), late);
    assert_eq!(stage.ask(&mut clients[0], "who"), "");
    hand.descriptors.borrow_mut().clear();
    assert_eq!(clients[0].hears(), "lost");
}

/// A child is killed, and dead it serves nobody.
#[test]
fn connections_of_a_child_that_hangs_when_told_to_go_come_back_when_it_is_dead() {
    let (mut stage, server, mut clients) = serving_clients(1);
    let (child, hand) = ready_child(&mut stage, &server);
    stage.say(&hand, &prepared(1, &[]));
    hand.hears();
    stage.advance(ms(1_000));
    assert_eq!(hand.hears(), [""; 0], "it is not asked any more");
    reap(&mut stage, child.pid);
    assert_eq!(server.events(), ["packs 0"]);
    // What the kernel does when the process ends.
    stage.hang_up(hand);
    let events = ["0 reattached", "goes on: the other process is gone"];
    assert_eq!(server.events(), events);
    assert_eq!(stage.ask(&mut clients[0], "who"), "old 0");
}

/// Its end of the channel ends with it, and not before.
#[test]
fn connections_of_a_child_that_dies_when_told_to_go_come_back_at_once() {
    let (mut stage, server, mut clients) = serving_clients(1);
    let (child, hand) = ready_child(&mut stage, &server);
    stage.say(&hand, &prepared(1, &[]));
    stage.hang_up(hand);
    let mut events = server.events();
    assert_eq!(events[..2], ["packs 0", "0 reattached"]);
    assert_eq!(stage.ask(&mut clients[0], "who"), "old 0");
    reap(&mut stage, child.pid);
    // When it has ended, which may have been before already.
    events.extend(server.events());
    assert_eq!(events[2..], ["goes on: the other process is gone"]);
}

/// A child that does nothing about it in its time is killed. Told to go, it may have begun
/// to serve them, and what it said of that is not heard any more: nobody could go on where
/// it was.
#[test]
fn connections_of_a_child_whose_channel_breaks_end_with_it() {
    for has_gone in [false, true] {
        let _row = row(has_gone);
        let (mut stage, server, mut clients) = serving_clients(1);
        let (mut child, hand) = ready_child(&mut stage, &server);
        if has_gone {
            stage.say(&hand, &prepared(1, &[]));
        }
        stage.say(&hand, &nothing(NONSENSE));
        assert_eq!(clients[0].hears(), "", "it may serve");
        stage.advance(ms(999));
        assert!(child.lives() && server.restart.is_under_way());
        let mut next = stage.client("web");
        assert_eq!(stage.ask(&mut next, "who"), "old 1", "it serves meanwhile");
        stage.tell(&mut next, "stay");
        stage.advance(ms(1));
        // It was killed for that, and may have ended before already.
        reap(&mut stage, child.pid);
        let gone = "goes on: the other process is gone";
        let back = "0 reattached";
        let wanted = match has_gone {
            true => vec!["packs 0", gone],
            false => vec!["packs 0", back, gone],
        };
        assert_eq!(server.events(), wanted);
        // What the kernel does when the process ends.
        drop(hand);
        if has_gone {
            assert_eq!(clients[0].hears(), "lost");
        } else {
            assert_eq!(stage.ask(&mut clients[0], "who"), "old 0");
        }
    }
}

/// A successor whose channel has broken serves without it, if it has everything. What it
/// has not said to serve it does not: that stays here, to its end.
#[test]
fn connections_that_are_on_their_way_to_one_that_serves_without_its_channel_stay() {
    for has_gone in [false, true] {
        for is_late in [false, true] {
            let _row = row((has_gone, is_late));
            let (mut stage, server, mut clients) = serving_clients(1);
            let mut child = Sleeper::start(&mut stage, &server);
            let hand = stage.successor(child.pid);
            stage.say(&hand, &take(0));
            let baton = hand.baton();
            make_ready_after_take(&mut stage, &hand);
            if has_gone {
                stage.say(&hand, &prepared(1, &[]));
            }
            assert!(takes(baton));
            if is_late {
                // Its end is heard of some time later.
                stage.advance(ms(1_000));
                assert_eq!(server.events(), ["packs 0"]);
            }
            assert!(child.lives(), "it serves");
            stage.hang_up(hand);
            let wanted = match is_late {
                true => vec!["0 reattached", "handed over"],
                false => vec!["packs 0", "0 reattached", "handed over"],
            };
            let mut events = server.events();
            events.sort_by_key(|event| event == "handed over");
            assert_eq!(events, wanted, "{has_gone} {is_late}");
            assert!(child.lives(), "it serves");
            assert_eq!(stage.ask(&mut clients[0], "who"), "old 0");
            assert!(!stage.is_listening("web"), "nobody is accepted here");
        }
    }
}

/// It could not begin to serve them.
#[test]
fn connections_that_were_not_told_to_go_come_back_when_the_channel_breaks() {
    for is_prepared in [false, true] {
        let _row = row(is_prepared);
        let (mut stage, server, mut clients) = serving_clients(1);
        stage.ask(&mut clients[0], "keep 900000");
        let hand = ready_one(&mut stage, 1 << 20);
        // It has not read them, and so not either that it is to go.
        if is_prepared {
            stage.say(&hand, &prepared(1, &[]));
        }
        stage.say(&hand, &nothing(NONSENSE));
        assert!(server.restart.is_under_way());
        stage.advance(ms(1_000));
        let gone = "goes on: the other process is gone";
        assert_eq!(server.events(), ["packs 0", "0 reattached", gone]);
        assert_eq!(stage.ask(&mut clients[0], "who"), "old 0");
        drop(hand);
    }
}

/// Its channel has broken here, and it has taken what says who serves: it takes this
/// process for dead, and everything for its own.
#[test]
fn connections_are_left_to_one_that_serves_when_the_channel_has_broken_here() {
    for has_gone in [false, true] {
        let _row = row(has_gone);
        let (mut stage, server, mut clients) = serving_clients(1);
        let mut child = Sleeper::start(&mut stage, &server);
        let hand = stage.successor(child.pid);
        stage.say(&hand, &take(0));
        let baton = hand.baton();
        make_ready_after_take(&mut stage, &hand);
        if has_gone {
            stage.say(&hand, &prepared(1, &[]));
        }
        hand.hears();
        stage.say(&hand, &nothing(NONSENSE));
        assert!(takes(baton));
        capture::start();
        stage.advance(ms(1_000));
        assert_eq!(capture::lines("1 connections are left to").len(), 1);
        assert_eq!(server.events(), ["packs 0", "handed over"]);
        assert!(server.restart.has_handed_over() && child.lives());
        assert_eq!(clients[0].hears(), "", "it serves");
        drop(hand);
        assert_eq!(clients[0].hears(), "lost");
    }
}

#[test]
fn connections_are_not_taken_back_from_one_that_is_not_heard_to_the_end() {
    let (mut stage, server, mut clients) = serving_clients(1);
    let hand = ready_one(&mut stage, 1 << 20);
    stage.say(&hand, &prepared(1, &[]));
    hand.hears();
    server.events();
    // It is hung up on for this, and may be about to say `Live`.
    stage.say(&hand, &prepared(1, &[]));
    assert_eq!(hand.hears(), ["takes back", "lost"]);
    assert_eq!(server.events(), ["goes on: the other process gave up"]);
    assert_eq!(clients[0].hears(), "");
    hand.descriptors.borrow_mut().clear();
    assert_eq!(clients[0].hears(), "lost");
}

/// However long its last words take: the farewell has a limit of its own.
#[test]
fn failed_successor_that_does_not_read_is_not_waited_for() {
    let mut stage = Stage::new();
    let mut settings = stage.settings();
    settings.answer = ms(500);
    let server = stage.begin_with(settings, "old", &["web"]);
    let mut client = stage.client("web");
    stage.ask(&mut client, "keep 900000");
    let hand = ready_one(&mut stage, 1 << 20);
    capture::start();
    stage.say_all(&hand, [prepared(1, &[]), prepared(1, &[])]);
    let is_over = || !capture::lines("1 connections are left to").is_empty();
    stage.advance(ms(999));
    assert!(!is_over());
    stage.advance(ms(1));
    assert!(is_over());
    assert!(server.restart.is_serving() && !server.restart.is_under_way());
}

/// All that it serves it has said before.
#[test]
fn connections_come_back_from_one_that_gives_up_when_told_to_go() {
    let (mut stage, server, mut clients) = serving_clients(1);
    let hand = ready_one(&mut stage, 1 << 20);
    stage.say(&hand, &prepared(1, &[]));
    stage.say(&hand, &gives_up());
    let mut events = server.events();
    events.sort();
    let back = [
        "0 reattached",
        "goes on: the other process gave up",
        "packs 0",
    ];
    assert_eq!(events, back);
    assert_eq!(stage.ask(&mut clients[0], "who"), "old 0");
}

/// It is heard to the end before it is said to be late.
#[test]
fn successor_is_not_late_because_its_predecessor_was_stopped() {
    let (mut stage, server, _clients) = serving_clients(1);
    let hand = ready_one(&mut stage, 1 << 20);
    for message in [prepared(1, &[]), live(1), serving()] {
        hand.send(&message, &[]);
        stage.jump(ms(60_000));
    }
    assert!(server.restart.has_handed_over());
    assert_eq!(server.restart.connections_moved(), 1);
}

/// Its end is there to be read, and its process was waited for already.
#[test]
fn connections_of_a_child_that_died_while_its_predecessor_was_stopped_come_back() {
    let (mut stage, server, mut clients) = serving_clients(1);
    let child = Sleeper::start(&mut stage, &server);
    let pid = child.pid;
    let hand = stage.successor(pid);
    make_ready(&mut stage, &hand);
    stage.say(&hand, &prepared(1, &[]));
    // It ends when nobody holds it.
    drop(child);
    reap(&mut stage, pid);
    stage.advance(ms(2_000));
    assert_eq!(server.events(), ["packs 0"]);
    stage.hang_up(hand);
    let mut events = server.events();
    events.sort();
    let back = ["0 reattached", "goes on: the other process is gone"];
    assert_eq!(events, back);
    assert_eq!(stage.ask(&mut clients[0], "who"), "old 0");
}

#[test]
fn connections_that_do_not_want_to_move_stay() {
    let (mut stage, server, mut clients) = serving_clients(4);
    // Says so, is not on the list, is about to close.
    stage.ask(&mut clients[0], "stay");
    stage.ask(&mut clients[1], "leave");
    clients[3]
        .socket
        .shutdown(std::net::Shutdown::Both)
        .expect("open");
    stage.settle();
    let hand = ready_one(&mut stage, 1 << 20);
    let heard = take_all(&mut stage, &hand);
    assert_eq!(sizes(&heard), [[(0, 0)]]);
    let events = ["3 lost", "packs 0", "packs 2", "0 reattached"];
    assert_eq!(server.events(), events);
    stage.say(&hand, &serving());
    assert!(server.restart.has_handed_over());
    assert_eq!(stage.ask(&mut clients[0], "who"), "old 0");
    assert_eq!(stage.ask(&mut clients[1], "who"), "old 1");
}

#[test]
fn connection_that_was_listed_as_something_else_stays_and_is_reported() {
    let (mut stage, _server, mut clients) = serving_clients(1);
    stage.ask(&mut clients[0], "pretend");
    capture::start();
    let hand = ready_one(&mut stage, 1 << 20);
    assert_eq!(hand.hears(), ["commit"]);
    assert_eq!(
        capture::lines("listed"),
        ["ERROR: a connection was listed with another type than it has"]
    );
    assert_eq!(stage.ask(&mut clients[0], "who"), "old 0");
}

#[test]
fn connection_that_stays_is_asked_once_before_and_once_after_the_listeners_go() {
    let (mut stage, server, mut clients) = serving_clients(1);
    stage.ask(&mut clients[0], "stay");
    let hand = ready_one(&mut stage, 1 << 20);
    assert_eq!(hand.hears(), ["commit"]);
    assert_eq!(server.events(), ["packs 0", "0 reattached"]);
    stage.say(&hand, &serving());
    assert_eq!(hand.hears(), ["done", "lost"]);
    assert_eq!(server.events(), ["handed over"]);
}

#[test]
fn connections_move_in_batches_of_so_many() {
    let (mut stage, server, _clients) = serving_clients(130);
    let hand = ready_one(&mut stage, 1 << 20);
    let heard = take_all(&mut stage, &hand);
    let counts: Vec<_> = sizes(&heard).iter().map(Vec::len).collect();
    assert_eq!(counts, [64, 64, 2]);
    assert_eq!(server.restart.connections_moved(), 130);
    assert_eq!(server.events().len(), 130, "each was asked once");
}

/// States of so many bytes, with so many descriptors each, to a successor that takes
/// messages of so many bytes: what moves, batch by batch.
fn batches(max_payload: u32, states: &[(usize, usize)]) -> Vec<Vec<(usize, usize)>> {
    let (mut stage, server, mut clients) = serving_clients(states.len());
    for (client, (state, held)) in clients.iter_mut().zip(states) {
        stage.ask(client, &format!("keep {state}"));
        stage.ask(client, &format!("hold {held}"));
    }
    let hand = ready_one(&mut stage, max_payload);
    let sizes = sizes(&take_all(&mut stage, &hand));
    let moved: usize = sizes.iter().map(Vec::len).sum();
    assert_eq!(server.restart.connections_moved(), moved);
    // Those that did not are served.
    let served = clients
        .iter_mut()
        .filter_map(|client| (stage.ask(client, "who").starts_with("old")).then_some(()))
        .count();
    assert_eq!(served, states.len() - moved);
    sizes
}

#[test]
fn connection_moves_if_the_successor_takes_messages_of_its_size() {
    let max_payload = OVERHEAD + (EACH + 100) as u32;
    assert_eq!(batches(max_payload, &[(100, 0)]), [[(100, 0)]]);
    assert_eq!(batches(max_payload, &[(101, 0)]), [[]; 0]);
    let others = batches(max_payload, &[(50, 0), (101, 0), (51, 0)]);
    assert_eq!(others, [[(50, 0)], [(51, 0)]]);
    assert_eq!(batches(1, &[(0, 0)]), [[]; 0]);
}

#[test]
fn connection_moves_if_one_message_carries_its_descriptors() {
    assert_eq!(batches(1 << 20, &[(0, 252)]), [[(0, 252)]]);
    assert_eq!(batches(1 << 20, &[(0, 253), (1, 0)]), [[(1, 0)]]);
}

#[test]
fn batch_is_as_big_as_one_message_of_the_successor() {
    let max_payload = OVERHEAD + 1_000;
    let of = |size: usize| (size - EACH, 0);
    assert_eq!(
        batches(max_payload, &[of(500), of(500), of(68)]),
        [vec![of(500), of(500)], vec![of(68)]]
    );
    assert_eq!(
        batches(max_payload, &[of(300), of(200), of(501)]),
        [vec![of(300), of(200)], vec![of(501)]]
    );
    // Whoever does not fit goes next, with whom there is room for.
    assert_eq!(
        batches(max_payload, &[of(900), of(101), of(899), of(100)]),
        [vec![of(900)], vec![of(101), of(899)], vec![of(100)]]
    );
}

#[test]
fn batch_has_as_many_descriptors_as_one_message_carries() {
    assert_eq!(
        batches(1 << 20, &[(0, 126), (0, 125)]),
        [[(0, 126), (0, 125)]]
    );
    assert_eq!(
        batches(1 << 20, &[(0, 126), (0, 126)]),
        [[(0, 126)], [(0, 126)]]
    );
}

#[test]
fn batch_of_several_has_a_size_of_its_own() {
    let of = |size: usize| (size - EACH, 0);
    let half = MIB / 2;
    assert_eq!(
        batches(8 << 20, &[of(half), of(half)]),
        [[of(half), of(half)]]
    );
    assert_eq!(
        batches(8 << 20, &[of(half), of(half + 1)]),
        [[of(half)], [of(half + 1)]]
    );
    // One that is bigger goes alone.
    assert_eq!(
        batches(8 << 20, &[of(2 * MIB), of(68), of(69)]),
        [vec![of(2 * MIB)], vec![of(68), of(69)]]
    );
}

/// What waits to be sent is known before a connection is taken apart.
#[test]
fn connection_with_too_much_to_send_for_this_batch_is_left_alone() {
    for (first, second, is_asked) in [
        (MIB / 2, MIB / 2, true),
        (MIB / 2, MIB / 2 + 1, false),
        (MIB + 5, 400_000, false),
    ] {
        let _row = row((first, second));
        let (mut stage, server, mut clients) = serving_clients(3);
        for (client, count) in clients.iter_mut().zip([first, second]) {
            stage.tell(client, "write 400000");
            stage.tell(client, &format!("fill {count}"));
        }
        let hand = ready_one(&mut stage, 8 << 20);
        let events = server.events();
        // The exact size is known later: then it comes back, for the next batch.
        let wanted: &[&str] = if is_asked {
            &["packs 0", "packs 1", "1 reattached", "2 reattached"]
        } else {
            &["packs 0"]
        };
        assert_eq!(events, wanted, "{first} {second}");
        let heard = take_all(&mut stage, &hand);
        let counts: Vec<_> = sizes(&heard).iter().map(Vec::len).collect();
        assert_eq!(counts, [1, 2], "{first} {second}");
        assert_eq!(server.restart.connections_moved(), 3);
    }
}

/// A predecessor by hand sends what a real one would not.
#[test]
fn connection_without_its_descriptors_is_refused() {
    let mut stage = Stage::new();
    let listener = stage.predecessor();
    let new = stage.begin("new", &["web"]);
    let hand = stage.found(&listener);
    super::successor::make_ready(&mut stage, &hand, &listener);
    let (_ours, theirs) = crate::support::socketpair();
    let fds = [std::os::fd::AsFd::as_fd(&theirs)];
    // The second says that it holds one.
    hand.send(&connections(1, &[("line", 0), ("line", 1)]), &fds);
    stage.settle();
    assert_eq!(hand.hears(), ["prepared 1 but 1"]);
    drop(new);
}
