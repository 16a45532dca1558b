//! How connections end: once, for the right reason, and with nothing left.

use std::time::Duration;

use bowline::TransportState;

use crate::harness::{End, Kind, Link, Script, over_every_kind, over_terminals};
use crate::support::Event;

over_every_kind!(
    lose_connection_sends_everything_first,
    lose_connection_never_calls_back_before_it_returns,
    lose_connection_twice_is_once,
    data_after_lose_connection_is_not_delivered,
    a_close_with_unread_bytes_is_a_reset_over_tcp,
    abort_drops_what_is_unsent,
    abort_is_told_after_the_callback,
    abort_after_lose_connection_aborts,
    lose_connection_after_abort_changes_nothing,
    an_abort_leaves_no_timer,
    nothing_is_delivered_after_an_abort,
    an_abort_in_data_received_sends_nothing_more,
    there_is_one_loss_whatever_is_combined,
    a_close_that_nobody_reads_times_out,
    a_close_in_time_leaves_no_timer,
    a_later_deadline_replaces_the_earlier,
    peer_close_is_done,
    peer_reset_is_lost,
    a_write_to_a_reset_connection_ends_it,
    addresses_are_right_at_both_ends_and_after_the_loss,
    a_panic_in_connection_made_costs_the_connection,
    a_panic_in_data_received_costs_the_connection,
    a_panic_after_an_abort_is_the_reason,
    a_panic_in_connection_lost_is_contained,
    a_panic_in_a_half_close_callback_costs_the_connection,
    the_reactor_stopping_ends_it,
    the_reactor_stopping_ends_a_paused_one,
    what_the_kernel_took_survives_the_reactor,
);

over_terminals!(
    lose_connection_never_calls_back_before_it_returns,
    data_after_lose_connection_is_not_delivered,
    abort_drops_what_is_unsent,
    abort_is_told_after_the_callback,
    abort_after_lose_connection_aborts,
    lose_connection_after_abort_changes_nothing,
    an_abort_leaves_no_timer,
    nothing_is_delivered_after_an_abort,
    an_abort_in_data_received_sends_nothing_more,
    a_close_that_nobody_reads_times_out,
    a_later_deadline_replaces_the_earlier,
    peer_close_is_done,
    peer_reset_is_lost,
    a_write_to_a_reset_connection_ends_it,
    a_panic_in_connection_made_costs_the_connection,
    a_panic_in_data_received_costs_the_connection,
    a_panic_after_an_abort_is_the_reason,
    a_panic_in_connection_lost_is_contained,
    the_reactor_stopping_ends_it,
    the_reactor_stopping_ends_a_paused_one,
);

/// F-13, F-15, F-12, F-37.
fn lose_connection_sends_everything_first(kind: Kind) {
    let script = Script::new().data(|cx, _| {
        let _ = cx.transport.write(b"head ");
        let _ = cx.transport.write_owned(vec![b'b'; 3_000_000]);
        let _ = cx.transport.write(b" tail");
        cx.transport.lose_connection();
        assert_eq!(cx.transport.state(), TransportState::Closing);
        assert!(!cx.transport.is_open_for_reading());
    });
    let mut link = Link::new(kind, script);
    link.peer().send(b"go");
    let (received, end) = link.peer_receives_all();
    assert_eq!((received.len(), end), (3_000_010, End::Clean));
    assert!(received.starts_with(b"head b") && received.ends_with(b"b tail"));
    link.run_until_lost();
    assert_eq!(
        link.record.summary(),
        ["made", "data 2", "lost closed cleanly"]
    );
    link.finish();
}

/// Contract F-15.
fn lose_connection_never_calls_back_before_it_returns(kind: Kind) {
    let mut link = Link::new(kind, Script::new());
    link.transport().lose_connection();
    assert_eq!(link.record.summary(), ["made"]);
    assert_eq!(link.transport().state(), TransportState::Closing);
    link.turn();
    assert_eq!(link.record.summary(), ["made", "lost closed cleanly"]);
    link.run_until_lost();
    link.finish();
}

/// F-14.
fn lose_connection_twice_is_once(kind: Kind) {
    let script = Script::new().made(|cx| {
        let _ = cx.transport.write(b"bye");
        cx.transport.lose_connection();
        cx.transport.lose_connection();
    });
    let mut link = Link::new(kind, script);
    assert_eq!(link.peer_receives_all(), (b"bye".to_vec(), End::Clean));
    link.run_until_lost();
    link.finish();
}

/// Contract F-13.
fn data_after_lose_connection_is_not_delivered(kind: Kind) {
    let mut link = Link::new(kind, Script::new());
    let written = link.fill();
    link.transport().lose_connection();
    link.peer().send(b"too late");
    link.settle();
    link.transport().resume_producing();
    link.settle();
    assert_eq!(link.record.summary(), ["made"]);
    let (received, _) = link.peer_receives_all();
    // A close with unread bytes is a reset: it may cost the last ones.
    assert!(received.len() <= written);
    link.run_until_lost();
    assert_eq!(link.record.summary(), ["made", "lost closed cleanly"]);
    link.finish();
}

/// T-08, at either end: who closes with something unread destroys what is on its way to
/// the other. (`set_lingering_close` is against that.)
fn a_close_with_unread_bytes_is_a_reset_over_tcp(kind: Kind) {
    let mut link = Link::new(
        kind,
        Script::new().made(|cx| cx.transport.pause_producing()),
    );
    link.peer().send(b"unread");
    link.settle();
    link.transport().lose_connection();
    link.run_until_lost();
    assert_eq!(link.record.summary(), ["made", "lost closed cleanly"]);
    let (received, end) = link.peer_receives_all();
    assert!(received.is_empty());
    // A layer may have read it, and keeps it.
    if !kind.is_tcp() || kind.has_own_end() {
        return link.finish();
    }
    assert_eq!(end, End::Reset);
    link.finish();

    let mut link = Link::new(kind, Script::new());
    let _ = link.transport().write(b"unread");
    link.settle();
    link.close_peer();
    link.run_until_lost();
    assert_eq!(link.record.summary(), ["made", "lost connection lost"]);
    link.finish();
}

/// F-23, T-07, F-38.
fn abort_drops_what_is_unsent(kind: Kind) {
    let mut link = Link::new(kind, Script::new());
    let written = link.fill();
    link.transport().abort_connection();
    link.run_until_lost();
    assert_eq!(link.record.summary(), ["made", "lost aborted by us"]);
    let (received, end) = link.peer_receives_all();
    assert!(received.len() < written);
    assert_eq!(end, kind.end_of_abort());
    link.finish();
}

/// F-23, F-37.
fn abort_is_told_after_the_callback(kind: Kind) {
    let script = Script::new();
    let record = script.record();
    let script = script.data(move |cx, _| {
        cx.transport.abort_connection();
        assert_eq!(cx.transport.state(), TransportState::Lost);
        assert!(!record.is_lost(), "told inside the call");
    });
    let mut link = Link::new(kind, script);
    link.peer().send(b"go");
    link.run_until_lost();
    assert_eq!(
        link.record.summary(),
        ["made", "data 2", "lost aborted by us"]
    );
    link.finish();
}

fn abort_after_lose_connection_aborts(kind: Kind) {
    let mut link = Link::new(kind, Script::new());
    let _ = link.fill();
    link.transport().lose_connection();
    link.settle();
    link.transport().abort_connection();
    link.run_until_lost();
    assert_eq!(link.record.summary(), ["made", "lost aborted by us"]);
    link.finish();
}

/// F-24, F-14.
fn lose_connection_after_abort_changes_nothing(kind: Kind) {
    let mut link = Link::new(kind, Script::new());
    let transport = link.transport();
    transport.abort_connection();
    transport.lose_connection();
    transport.abort_connection();
    transport.lose_connection_within(Duration::from_secs(1));
    transport.lose_write_connection();
    assert_eq!(transport.state(), TransportState::Lost);
    link.run_until_lost();
    assert_eq!(link.record.summary(), ["made", "lost aborted by us"]);
    assert_eq!(link.reactor.delayed_calls().count(), 0);
    link.finish();
}

/// F-36: whatever ran when it came: the deadline of a close, and what asks a pull producer
/// again.
fn an_abort_leaves_no_timer(kind: Kind) {
    let mut link = Link::new(kind, Script::new());
    // Those of layers.
    let before = link.reactor.delayed_calls().count();
    let producer = bowline::ProducerRef::Protocol;
    let transport = link.transport();
    let registered = transport.register_producer(producer, bowline::ProducerKind::Pull);
    registered.unwrap();
    link.settle();
    link.transport()
        .lose_connection_within(Duration::from_secs(5));
    link.settle();
    assert_eq!(link.reactor.delayed_calls().count(), before + 2);
    link.transport().abort_connection();
    link.run_until_lost();
    assert_eq!(link.reactor.delayed_calls().count(), 0);
    assert_eq!(link.reactor.registered(), 0);
    link.finish();
}

/// F-25.
fn nothing_is_delivered_after_an_abort(kind: Kind) {
    let script = Script::new().data(|cx, _| cx.transport.abort_connection());
    let mut link = Link::new(kind, script);
    let sent = link.peer().fill();
    link.run_until_lost();
    assert_eq!(
        link.record.count(|event| matches!(event, Event::Data(_))),
        1
    );
    assert!(link.record.data().len() < sent);
    link.finish();
}

/// the event that brought the data says that there is room, too, and the data comes
/// first.
fn an_abort_in_data_received_sends_nothing_more(kind: Kind) {
    let unsent = std::rc::Rc::new(std::cell::Cell::new((0, 0)));
    let (at_data, at_end) = (unsent.clone(), unsent.clone());
    let script = Script::new()
        .data(move |cx, _| {
            at_data.set((cx.transport.unsent_bytes(), 0));
            cx.transport.abort_connection();
        })
        .lost(move |cx, _| at_end.set((at_end.get().0, cx.transport.unsent_bytes())));
    let mut link = Link::new(kind, script);
    let written = link.fill();
    let before = link.transport().unsent_bytes();
    assert!(before > 0 && before < written);
    // What the sockets hold, so that there is room, and no turn in between.
    let mut buffer = [0; 65_536];
    while link.peer().read(&mut buffer).is_ok() {}
    link.peer().send(b"go");
    link.run_until_lost();
    let (at_data, at_end) = unsent.get();
    if kind.has_one_event() {
        assert_eq!(at_data, before, "sent before the data was read");
    } else {
        assert!(at_data > 0, "nothing was left to send");
    }
    assert_eq!(at_data, at_end, "sent after the abort");
    link.finish();
}

/// F-21, in every order of two things that end a connection.
fn there_is_one_loss_whatever_is_combined(kind: Kind) {
    type Step = fn(&mut Link);
    const STEPS: [Step; 6] = [
        |link| {
            if let Some(transport) = link.reactor.get(link.handle) {
                transport.lose_connection();
            }
        },
        |link| {
            if let Some(transport) = link.reactor.get(link.handle) {
                transport.abort_connection();
            }
        },
        |link| {
            if let Some(transport) = link.reactor.get(link.handle) {
                transport.lose_write_connection();
            }
        },
        |link| {
            if let Some(peer) = &mut link.peer {
                peer.shut_write();
            }
        },
        |link| link.close_peer(),
        |link| {
            if let Some(transport) = link.reactor.get(link.handle) {
                let _ = transport.write(&[0; 300_000]);
            }
        },
    ];
    for first in STEPS {
        for second in STEPS {
            for is_same_turn in [true, false] {
                let mut link = Link::new(kind, Script::new().keep_writing());
                first(&mut link);
                if !is_same_turn {
                    link.settle();
                }
                second(&mut link);
                link.settle();
                link.close_peer();
                if let Some(transport) = link.reactor.get(link.handle) {
                    transport.lose_connection();
                }
                link.run_until_lost();
                link.finish();
            }
        }
    }
}

/// W-30.
fn a_close_that_nobody_reads_times_out(kind: Kind) {
    let mut link = Link::new(kind, Script::new());
    let _ = link.fill();
    link.transport()
        .lose_connection_within(Duration::from_secs(5));
    link.settle();
    link.clock.advance(Duration::from_millis(4_999));
    link.settle();
    assert_eq!(link.record.summary(), ["made"]);
    link.clock.advance(Duration::from_millis(1));
    link.run_until_lost();
    assert_eq!(
        link.record.summary(),
        [
            "made",
            "lost not everything could be sent before the deadline"
        ]
    );
    assert_eq!(link.reactor.delayed_calls().count(), 0);
    link.finish();
}

fn a_close_in_time_leaves_no_timer(kind: Kind) {
    let mut link = Link::new(kind, Script::new());
    let written = link.fill();
    link.transport()
        .lose_connection_within(Duration::from_secs(5));
    let (received, end) = link.peer_receives_all();
    assert_eq!((received.len(), end), (written, End::Clean));
    link.run_until_lost();
    assert_eq!(link.record.summary(), ["made", "lost closed cleanly"]);
    assert_eq!(link.reactor.delayed_calls().count(), 0);
    link.finish();
}

fn a_later_deadline_replaces_the_earlier(kind: Kind) {
    let mut link = Link::new(kind, Script::new());
    // Those of layers.
    let before = link.reactor.delayed_calls().count();
    let _ = link.fill();
    link.transport().lose_connection();
    link.settle();
    link.transport()
        .lose_connection_within(Duration::from_secs(50));
    link.settle();
    link.transport()
        .lose_connection_within(Duration::from_secs(5));
    link.settle();
    assert_eq!(link.reactor.delayed_calls().count(), before + 1);
    link.clock.advance(Duration::from_secs(5));
    link.run_until_lost();
    link.finish();
}

/// Contract S-27, F-35.
fn peer_close_is_done(kind: Kind) {
    let mut link = Link::new(kind, Script::new());
    link.close_peer();
    link.run_until_lost();
    assert_eq!(
        link.record.summary(),
        ["made", "read closed", "lost closed cleanly"]
    );
    link.finish();
}

/// S-28, R-32: the bytes that came before the reset are delivered. Of a UNIX
/// peer the end too: all that it sent is there.
fn peer_reset_is_lost(kind: Kind) {
    if !kind.is_socket() {
        return;
    }
    let mut link = Link::new(kind, Script::new());
    let _ = link.transport().write(b"never read");
    link.settle();
    if !kind.is_tcp() {
        link.peer().send(b"last words");
    }
    link.reset_by_peer();
    link.run_until_lost();
    if kind.is_tcp() {
        assert_eq!(link.record.summary(), ["made", "lost connection lost"]);
    } else if kind.has_own_end() {
        // It did not come: the stream may have been cut off.
        assert_eq!(
            link.record.summary(),
            ["made", "data 10", "lost connection lost"]
        );
    } else {
        assert_eq!(
            link.record.summary(),
            ["made", "data 10", "read closed", "lost connection lost"]
        );
    }
    link.finish();
}

/// Contract F-10.
fn a_write_to_a_reset_connection_ends_it(kind: Kind) {
    if !kind.is_socket() {
        return;
    }
    let mut link = Link::new(kind, Script::new().keep_writing());
    link.close_peer();
    link.run_until(|record| record.summary() == ["made", "read closed"]);
    let handle = link.handle;
    // The first one may be answered with the reset only.
    crate::support::run_until(&mut link.reactor, move |reactor| {
        match reactor.get(handle) {
            Some(transport) => {
                let _ = transport.write(b"anybody?");
                false
            }
            None => true,
        }
    });
    link.run_until_lost();
    assert_eq!(
        link.record.summary(),
        ["made", "read closed", "lost connection lost"]
    );
    link.finish();
}

/// T-04, T-05, T-06, C-15, W-26, E-16, W-50.
fn addresses_are_right_at_both_ends_and_after_the_loss(kind: Kind) {
    let seen = std::rc::Rc::new(std::cell::RefCell::new(None));
    let at_end = seen.clone();
    let script = Script::new().lost(move |cx, _| {
        *at_end.borrow_mut() = Some((cx.transport.host(), cx.transport.peer()));
    });
    let mut link = Link::new(kind, script);
    let (ours, theirs) = link.peer().addresses();
    assert_eq!(link.transport().host(), ours);
    // A UNIX listener's address is what was asked for, a client has none.
    assert_eq!(link.transport().peer(), theirs);
    link.close_peer();
    link.run_until_lost();
    assert_eq!(seen.take(), Some((ours, theirs)));
    link.finish();
}

/// L-12, W-29.
fn a_panic_in_connection_made_costs_the_connection(kind: Kind) {
    let script = Script::new().made(|_| panic!("on purpose"));
    let mut link = Link::new(kind, script);
    link.run_until_lost();
    assert_eq!(link.record.summary(), ["made", "lost a callback panicked"]);
    link.peer_receives_all();
    link.finish_after_panic();
}

/// F-27.
fn a_panic_in_data_received_costs_the_connection(kind: Kind) {
    let script = Script::new().data(|cx, _| {
        let _ = cx.transport.write(b"half an answer");
        panic!("on purpose")
    });
    let mut link = Link::new(kind, script);
    link.peer().send(b"go");
    link.run_until_lost();
    assert_eq!(
        link.record.summary(),
        ["made", "data 2", "lost a callback panicked"]
    );
    assert_eq!(link.reactor.statistics().panics, 1);
    link.peer_receives_all();
    link.finish_after_panic();
}

/// F-26.
fn a_panic_after_an_abort_is_the_reason(kind: Kind) {
    let script = Script::new().data(|cx, _| {
        cx.transport.abort_connection();
        panic!("on purpose")
    });
    let mut link = Link::new(kind, script);
    link.peer().send(b"go");
    link.run_until_lost();
    assert_eq!(
        link.record.summary(),
        ["made", "data 2", "lost a callback panicked"]
    );
    link.finish_after_panic();
}

fn a_panic_in_connection_lost_is_contained(kind: Kind) {
    let script = Script::new().lost(|_, _| panic!("on purpose"));
    let mut link = Link::new(kind, script);
    link.close_peer();
    link.run_until_lost();
    assert_eq!(link.reactor.statistics().panics, 1);
    assert_eq!(link.reactor.registered(), 0);
    link.finish_after_panic();
}

/// F-28.
fn a_panic_in_a_half_close_callback_costs_the_connection(kind: Kind) {
    let script = Script::new().write_closed(|_| panic!("on purpose"));
    let mut link = Link::new(kind, script);
    link.transport().lose_write_connection();
    link.run_until_lost();
    assert_eq!(
        link.record.summary(),
        ["made", "write closed", "lost a callback panicked"]
    );
    link.finish_after_panic();

    let script = Script::new().read_closed(|_| panic!("on purpose"));
    let mut link = Link::new(kind, script);
    link.peer().shut_write();
    link.run_until_lost();
    assert_eq!(
        link.record.summary(),
        ["made", "read closed", "lost a callback panicked"]
    );
    link.finish_after_panic();
}

fn stop(link: &mut Link) {
    link.reactor.start().unwrap();
    link.turn();
    link.reactor.stop().unwrap();
    link.turn();
}

fn the_reactor_stopping_ends_it(kind: Kind) {
    let mut link = Link::new(kind, Script::new());
    stop(&mut link);
    link.run_until_lost();
    assert_eq!(link.record.summary(), ["made", "lost reactor stopped"]);
    assert_eq!(link.reactor.registered(), 0);
    link.finish();
}

/// R-13, W-27.
fn the_reactor_stopping_ends_a_paused_one(kind: Kind) {
    let script = Script::new().made(|cx| cx.transport.pause_producing());
    let mut link = Link::new(kind, script);
    link.peer().send(b"unread");
    link.settle();
    stop(&mut link);
    link.run_until_lost();
    assert_eq!(link.record.summary(), ["made", "lost reactor stopped"]);
    link.finish();
}

/// What was written before the stop and left for the kernel arrives: the end
/// is no reset.
fn what_the_kernel_took_survives_the_reactor(kind: Kind) {
    let mut link = Link::new(kind, Script::new());
    let _ = link.transport().write(b"last words");
    link.settle();
    stop(&mut link);
    link.run_until_lost();
    assert_eq!(
        link.peer_receives_all(),
        (b"last words".to_vec(), End::Clean)
    );
    link.finish();
}
