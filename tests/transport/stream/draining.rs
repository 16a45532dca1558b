//! What connections do while the reactor stops gracefully.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use bowline::time::Clock as _;
use bowline::{
    AtDrain, Context, GracefulStop, Producer, ProducerKind, ProducerRef, Transport, Turn,
};

use crate::harness::{End, Kind, Link, Script, over_every_kind, over_terminals};
use crate::support::Event;

over_every_kind!(
    what_is_unsent_is_sent,
    what_waits_in_the_socket_is_answered,
    what_comes_at_the_last_moment_is_answered,
    what_comes_meanwhile_is_answered_and_waited_for_anew,
    an_idle_one_ends_after_the_grace_and_not_before,
    without_grace_an_idle_one_ends_at_once,
    without_grace_one_with_work_is_not_waited_for_in_turns,
    one_with_work_is_waited_for,
    one_with_work_is_cut_at_the_deadline,
    one_whose_peer_does_not_read_is_cut_at_the_deadline,
    a_paused_one_is_waited_for,
    one_that_waits_for_its_producer_is_waited_for,
    one_that_produces_for_itself_ends,
    one_that_writes_on_after_the_peers_end_is_waited_for,
    one_that_says_good_bye_ends_at_once,
    one_that_goes_on_is_waited_for_however_quiet,
    one_that_nobody_waits_for_goes_on_until_the_end,
    one_that_closes_already_is_not_told,
    it_is_told_once,
    a_panic_when_told_costs_the_connection,
    a_stop_at_once_cuts_it,
);

over_terminals!(
    what_is_unsent_is_sent,
    what_waits_in_the_socket_is_answered,
    what_comes_at_the_last_moment_is_answered,
    what_comes_meanwhile_is_answered_and_waited_for_anew,
    an_idle_one_ends_after_the_grace_and_not_before,
    without_grace_an_idle_one_ends_at_once,
    one_with_work_is_waited_for,
    one_with_work_is_cut_at_the_deadline,
    one_whose_peer_does_not_read_is_cut_at_the_deadline,
    a_paused_one_is_waited_for,
    one_that_waits_for_its_producer_is_waited_for,
    one_that_produces_for_itself_ends,
    one_that_goes_on_is_waited_for_however_quiet,
    one_that_nobody_waits_for_goes_on_until_the_end,
    it_is_told_once,
    a_panic_when_told_costs_the_connection,
    a_stop_at_once_cuts_it,
);

const GRACE: Duration = Duration::from_millis(100);
const DEADLINE: Duration = Duration::from_secs(20);

fn echo() -> Script {
    Script::new().data(|cx, data| {
        let _ = cx.transport.write(data);
    })
}

/// Asks for the stop, and lets everybody be told.
fn stop(link: &mut Link) {
    stop_with(link, GRACE);
    link.settle();
}

fn stop_with(link: &mut Link, grace: Duration) {
    link.reactor.start().unwrap();
    let how = GracefulStop::new().deadline(DEADLINE).grace(grace);
    link.reactor.stop_gracefully(how).unwrap();
}

#[track_caller]
fn assert_waits(link: &mut Link) {
    for _ in 0..3 {
        link.clock.advance(GRACE);
        link.settle();
    }
    assert!(link.reactor.is_stopping(), "does not wait");
    assert!(!link.record.is_lost(), "is lost already");
}

/// The reactor stops, once the connection has ended in an orderly way.
#[track_caller]
fn assert_ends(mut link: Link) {
    link.clock.advance(GRACE);
    assert_ended(&mut link);
    assert_eq!(link.reactor.statistics().cut, 0);
    link.finish();
}

#[track_caller]
fn assert_ended(link: &mut Link) {
    link.run_until_lost();
    let summary = link.record.summary();
    assert_eq!(summary.last().unwrap(), "lost closed cleanly");
    assert_eq!(link.reactor.turn(Some(Duration::ZERO)), Turn::Stopped);
    assert_eq!(link.reactor.registered(), 0);
}

fn what_is_unsent_is_sent(kind: Kind) {
    let mut link = Link::new(kind, Script::new());
    let written = link.fill();
    stop(&mut link);
    assert_waits(&mut link);
    link.peer_receives(written);
    link.settle();
    assert_ends(link);
}

fn what_waits_in_the_socket_is_answered(kind: Kind) {
    let mut link = Link::new(kind, echo());
    link.settle();
    link.peer().send(b"asked before");
    stop(&mut link);
    assert_eq!(link.peer_receives(12), b"asked before");
    assert_ends(link);
}

/// It comes with the event of the very turn in which the grace is over, and time
/// is looked at before sockets.
fn what_comes_at_the_last_moment_is_answered(kind: Kind) {
    let mut link = Link::new(kind, echo());
    stop(&mut link);
    for _ in 0..3 {
        link.peer().send(b"at last");
        link.clock.advance(GRACE);
        assert_eq!(link.peer_receives(7), b"at last");
        link.settle();
        assert!(!link.record.is_lost());
    }
    assert_ends(link);
}

fn what_comes_meanwhile_is_answered_and_waited_for_anew(kind: Kind) {
    let mut link = Link::new(kind, echo());
    stop(&mut link);
    for _ in 0..5 {
        link.clock.advance(GRACE * 3 / 4);
        link.settle();
        link.peer().send(b"again");
        assert_eq!(link.peer_receives(5), b"again");
    }
    link.settle();
    assert!(!link.record.is_lost());
    assert_ends(link);
}

fn an_idle_one_ends_after_the_grace_and_not_before(kind: Kind) {
    let mut link = Link::new(kind, Script::new());
    stop(&mut link);
    assert!(link.reactor.is_stopping());
    link.clock.advance(GRACE - Duration::from_millis(1));
    link.settle();
    assert_eq!(link.record.summary(), ["made", "draining"]);
    link.clock.advance(Duration::from_millis(1));
    let (rest, end) = link.peer_receives_all();
    assert_eq!((rest.len(), end), (0, End::Clean));
    assert_ended(&mut link);
    link.finish();
}

fn without_grace_an_idle_one_ends_at_once(kind: Kind) {
    let mut link = Link::new(kind, echo());
    link.settle();
    link.peer().send(b"heard");
    stop_with(&mut link, Duration::ZERO);
    let (answer, end) = link.peer_receives_all();
    assert_eq!((&answer[..], end), (&b"heard"[..], End::Clean));
    assert_ended(&mut link);
    link.finish();
}

/// It was looked at in each turn, without end, for as long as its work took.
fn without_grace_one_with_work_is_not_waited_for_in_turns(kind: Kind) {
    for says_when_it_is_done in [true, false] {
        let is_busy = Rc::new(Cell::new(true));
        let mut link = Link::new(kind, Script::new().busy(&is_busy));
        link.settle();
        stop_with(&mut link, Duration::ZERO);
        link.settle();
        let wait = link.reactor.next_deadline().unwrap() - link.clock.now();
        assert!(wait > Duration::ZERO, "it looks again at once");
        assert!(link.reactor.is_idle());
        assert_waits(&mut link);
        is_busy.set(false);
        if says_when_it_is_done {
            // And no later than that.
            let _ = link.transport().write(b"done");
            assert_eq!(link.peer_receives(4), b"done");
        } else {
            link.clock.advance(Duration::from_millis(10));
        }
        assert_ended(&mut link);
        assert_eq!(link.reactor.statistics().cut, 0);
        link.finish();
    }
}

fn one_with_work_is_waited_for(kind: Kind) {
    let is_busy = Rc::new(Cell::new(true));
    let mut link = Link::new(kind, Script::new().busy(&is_busy));
    stop(&mut link);
    assert_waits(&mut link);
    is_busy.set(false);
    let _ = link.transport().write(b"done");
    assert_eq!(link.peer_receives(4), b"done");
    link.settle();
    assert_ends(link);
}

fn one_with_work_is_cut_at_the_deadline(kind: Kind) {
    let is_busy = Rc::new(Cell::new(true));
    let mut link = Link::new(kind, Script::new().busy(&is_busy));
    stop(&mut link);
    link.clock.advance(DEADLINE - Duration::from_millis(1));
    link.settle();
    assert!(!link.record.is_lost());
    link.clock.advance(Duration::from_millis(1));
    link.run_until_lost();
    assert_eq!(
        link.record.summary(),
        ["made", "draining", "lost reactor stopped"]
    );
    assert_eq!(link.reactor.statistics().cut, 1);
    assert_eq!(link.reactor.turn(Some(Duration::ZERO)), Turn::Stopped);
    link.finish();
}

fn one_whose_peer_does_not_read_is_cut_at_the_deadline(kind: Kind) {
    let mut link = Link::new(kind, Script::new());
    link.fill();
    stop(&mut link);
    assert_waits(&mut link);
    link.clock.advance(DEADLINE);
    link.run_until_lost();
    let summary = link.record.summary();
    assert_eq!(summary.last().unwrap(), "lost reactor stopped");
    assert_eq!(link.reactor.statistics().cut, 1);
    link.finish();
}

fn a_paused_one_is_waited_for(kind: Kind) {
    let mut link = Link::new(kind, echo());
    link.transport().pause_producing();
    link.settle();
    link.peer().send(b"kept");
    stop(&mut link);
    assert_waits(&mut link);
    link.transport().resume_producing();
    assert_eq!(link.peer_receives(4), b"kept");
    link.settle();
    assert_ends(link);
}

/// Produces nothing, for as long as it is there.
struct Silent;

impl Producer for Silent {
    fn pause_producing(&mut self, _: &mut Context<'_, dyn Transport>) {}
    fn resume_producing(&mut self, _: &mut Context<'_, dyn Transport>) {}
    fn stop_producing(&mut self, _: &mut Context<'_, dyn Transport>) {}
}

fn one_that_waits_for_its_producer_is_waited_for(kind: Kind) {
    let mut link = Link::new(kind, Script::new());
    let silent = ProducerRef::Boxed(Box::new(Silent));
    let transport = link.transport();
    transport
        .register_producer(silent, ProducerKind::Push)
        .unwrap();
    stop(&mut link);
    assert_waits(&mut link);
    link.transport().unregister_producer();
    link.settle();
    assert_ends(link);
}

fn one_that_produces_for_itself_ends(kind: Kind) {
    let script = echo().made(|cx| {
        let me = cx.transport.handle();
        let registered = cx
            .transport
            .register_producer(me.into(), ProducerKind::Push);
        registered.unwrap();
    });
    let mut link = Link::new(kind, script);
    link.settle();
    link.peer().send(b"mine");
    stop(&mut link);
    assert_eq!(link.peer_receives(4), b"mine");
    link.settle();
    assert_ends(link);
}

/// It says itself when it is done.
fn one_that_writes_on_after_the_peers_end_is_waited_for(kind: Kind) {
    let mut link = Link::new(kind, Script::new().keep_writing());
    link.peer().shut_write();
    link.settle();
    stop(&mut link);
    assert_waits(&mut link);
    let _ = link.transport().write(b"the sum");
    link.transport().lose_connection();
    let (answer, end) = link.peer_receives_all();
    assert_eq!((&answer[..], end), (&b"the sum"[..], End::Clean));
    assert_ends(link);
}

fn one_that_says_good_bye_ends_at_once(kind: Kind) {
    let script = Script::new().drain(|cx| {
        assert!(cx.reactor.is_stopping());
        let _ = cx.transport.write(b"bye");
        cx.transport.lose_connection();
        AtDrain::LoseWhenIdle
    });
    let mut link = Link::new(kind, script);
    stop_with(&mut link, GRACE);
    let (answer, end) = link.peer_receives_all();
    assert_eq!((&answer[..], end), (&b"bye"[..], End::Clean));
    assert_ended(&mut link);
    link.finish();
}

fn one_that_goes_on_is_waited_for_however_quiet(kind: Kind) {
    let mut link = Link::new(kind, echo().drain(|_| AtDrain::GoOn));
    stop(&mut link);
    assert_waits(&mut link);
    link.peer().send(b"still there");
    assert_eq!(link.peer_receives(11), b"still there");
    link.transport().lose_connection();
    assert_ends(link);
}

fn one_that_nobody_waits_for_goes_on_until_the_end(kind: Kind) {
    let mut link = Link::new(kind, echo().drain(|_| AtDrain::DoNotWait));
    link.reactor.start().unwrap();
    let hold = link.reactor.hold(bowline::lifecycle::SystemEvent::Shutdown);
    let how = GracefulStop::new().deadline(DEADLINE).grace(GRACE);
    link.reactor.stop_gracefully(how).unwrap();
    assert_waits(&mut link);
    link.peer().send(b"still there");
    assert_eq!(link.peer_receives(11), b"still there");
    drop(hold);
    link.run_until_lost();
    let summary = link.record.summary();
    assert_eq!(summary.last().unwrap(), "lost reactor stopped");
    assert_eq!(link.reactor.statistics().cut, 0);
    link.finish();
}

fn one_that_closes_already_is_not_told(kind: Kind) {
    let mut link = Link::new(kind, Script::new());
    let written = link.fill();
    link.transport().lose_connection();
    stop(&mut link);
    assert_waits(&mut link);
    let (data, end) = link.peer_receives_all();
    assert_eq!((data.len(), end), (written, End::Clean));
    link.run_until_lost();
    assert_eq!(link.record.summary(), ["made", "lost closed cleanly"]);
    assert_eq!(link.reactor.turn(Some(Duration::ZERO)), Turn::Stopped);
    link.finish();
}

fn it_is_told_once(kind: Kind) {
    let mut link = Link::new(kind, Script::new());
    stop(&mut link);
    let how = GracefulStop::new().deadline(DEADLINE * 2);
    link.reactor.stop_gracefully(how).unwrap();
    link.settle();
    assert_eq!(link.record.count(|it| matches!(it, Event::Draining)), 1);
    assert_ends(link);
}

fn a_panic_when_told_costs_the_connection(kind: Kind) {
    let script = Script::new().drain(|_| panic!("on purpose, in a test"));
    let mut link = Link::new(kind, script);
    stop_with(&mut link, GRACE);
    link.run_until_lost();
    assert_eq!(
        link.record.summary(),
        ["made", "draining", "lost a callback panicked"]
    );
    assert_eq!(link.reactor.turn(Some(Duration::ZERO)), Turn::Stopped);
    link.finish_after_panic();
}

fn a_stop_at_once_cuts_it(kind: Kind) {
    let is_busy = Rc::new(Cell::new(true));
    let mut link = Link::new(kind, Script::new().busy(&is_busy));
    stop(&mut link);
    let _hold = link.reactor.hold(bowline::lifecycle::SystemEvent::Shutdown);
    link.reactor.stop_now().unwrap();
    link.run_until_lost();
    let summary = link.record.summary();
    assert_eq!(summary.last().unwrap(), "lost reactor stopped");
    assert_eq!(link.reactor.statistics().cut, 1);
    link.finish();
}
