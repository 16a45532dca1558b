//! One side closed, then the other.

use bowline::{AfterReadClosed, TransportState};

use crate::harness::{End, Kind, Link, Script, over_every_kind};

over_every_kind!(
    our_side_closes_when_everything_was_sent,
    reading_goes_on_after_our_side_closed,
    asking_twice_is_once,
    the_peers_end_is_the_end_by_default,
    the_peers_end_with_lose_connection_sends_everything,
    the_peers_end_with_keep_writing_leaves_our_side,
    ours_then_theirs_is_one_loss,
    theirs_then_ours_is_one_loss,
    both_at_once_is_one_loss,
    closing_inside_write_connection_lost,
    closing_inside_read_connection_lost,
    aborting_inside_read_connection_lost,
    half_closing_inside_read_connection_lost,
    lose_connection_after_our_side_closed,
    half_close_of_a_dead_peer_passes,
    a_close_wins_over_a_half_close_that_waits,
    the_peers_end_is_delivered_after_its_data,
);

/// F-17, F-37.
fn our_side_closes_when_everything_was_sent(kind: Kind) {
    let mut link = Link::new(kind, Script::new());
    let written = link.fill();
    link.transport().lose_write_connection();
    link.settle();
    assert_eq!(link.record.summary(), ["made"]);
    assert_eq!(link.transport().state(), TransportState::Connected);
    let (received, end) = link.peer_receives_all();
    assert_eq!((received.len(), end), (written, End::Clean));
    link.settle();
    assert_eq!(link.record.summary(), ["made", "write closed"]);
    link.finish();
}

/// Contract F-17.
fn reading_goes_on_after_our_side_closed(kind: Kind) {
    let mut link = Link::new(kind, Script::new());
    link.transport().lose_write_connection();
    assert_eq!(link.peer_receives_all(), (Vec::new(), End::Clean));
    link.peer().send(b"still there");
    link.run_until(|record| record.data() == b"still there");
    assert!(link.transport().is_open_for_reading());
    link.transport().pause_producing();
    link.peer().send(b"!");
    link.settle();
    link.transport().resume_producing();
    link.run_until(|record| record.data() == b"still there!");
    link.close_peer();
    link.run_until_lost();
    assert_eq!(
        link.record.summary(),
        [
            "made",
            "write closed",
            "data 11",
            "reading resumed",
            "data 1",
            "read closed",
            "lost closed cleanly"
        ]
    );
    link.finish();
}

fn asking_twice_is_once(kind: Kind) {
    let script = Script::new().write_closed(|cx| cx.transport.lose_write_connection());
    let mut link = Link::new(kind, script);
    link.transport().lose_write_connection();
    link.transport().lose_write_connection();
    link.settle();
    link.transport().lose_write_connection();
    link.settle();
    assert_eq!(link.record.summary(), ["made", "write closed"]);
    link.finish();
}

/// T-10.
fn the_peers_end_is_the_end_by_default(kind: Kind) {
    let mut link = Link::new(kind, Script::new());
    link.peer().send(b"all");
    link.peer().shut_write();
    link.run_until_lost();
    assert_eq!(
        link.record.summary(),
        ["made", "data 3", "read closed", "lost closed cleanly"]
    );
    assert_eq!(link.peer_receives_all(), (Vec::new(), End::Clean));
    link.finish();
}

fn the_peers_end_with_lose_connection_sends_everything(kind: Kind) {
    let script = Script::new().read_closed(|_| AfterReadClosed::LoseConnection);
    let mut link = Link::new(kind, script);
    let written = link.fill();
    link.peer().shut_write();
    link.settle();
    assert_eq!(link.record.summary(), ["made", "read closed"]);
    let (received, end) = link.peer_receives_all();
    assert_eq!((received.len(), end), (written, End::Clean));
    link.run_until_lost();
    assert_eq!(
        link.record.summary(),
        ["made", "read closed", "lost closed cleanly"]
    );
    link.finish();
}

/// T-09, R-32, S-27.
fn the_peers_end_with_keep_writing_leaves_our_side(kind: Kind) {
    let mut link = Link::new(kind, Script::new().keep_writing());
    link.peer().shut_write();
    link.run_until(|record| record.summary() == ["made", "read closed"]);
    assert!(!link.transport().is_open_for_reading());
    assert_eq!(link.transport().state(), TransportState::Connected);
    let _ = link.transport().write(&[b'w'; 100_000]);
    assert_eq!(link.peer_receives(100_000).len(), 100_000);
    link.settle();
    let _ = link.transport().write(b"more");
    link.transport().lose_connection();
    assert_eq!(link.peer_receives_all(), (b"more".to_vec(), End::Clean));
    link.run_until_lost();
    assert_eq!(
        link.record.summary(),
        ["made", "read closed", "lost closed cleanly"]
    );
    link.finish();
}

/// W-24.
fn ours_then_theirs_is_one_loss(kind: Kind) {
    let mut link = Link::new(kind, Script::new().keep_writing());
    link.transport().lose_write_connection();
    link.settle();
    link.peer().shut_write();
    link.run_until_lost();
    assert_eq!(
        link.record.summary(),
        ["made", "write closed", "read closed", "lost closed cleanly"]
    );
    link.finish();
}

/// W-24.
fn theirs_then_ours_is_one_loss(kind: Kind) {
    let mut link = Link::new(kind, Script::new().keep_writing());
    link.peer().shut_write();
    link.run_until(|record| record.summary() == ["made", "read closed"]);
    let _ = link.transport().write(b"bye");
    link.transport().lose_write_connection();
    assert_eq!(link.peer_receives_all(), (b"bye".to_vec(), End::Clean));
    link.run_until_lost();
    assert_eq!(
        link.record.summary(),
        ["made", "read closed", "write closed", "lost closed cleanly"]
    );
    link.finish();
}

fn both_at_once_is_one_loss(kind: Kind) {
    let mut link = Link::new(kind, Script::new().keep_writing());
    link.peer().shut_write();
    link.transport().lose_write_connection();
    link.run_until_lost();
    let summary = link.record.summary();
    assert_eq!(summary.len(), 4, "{summary:?}");
    assert_eq!(summary[3], "lost closed cleanly");
    link.finish();
}

/// F-19: the loss comes from the loop.
fn closing_inside_write_connection_lost(kind: Kind) {
    let script = Script::new();
    let record = script.record();
    let script = script.write_closed(move |cx| {
        cx.transport.lose_connection();
        assert!(!record.is_lost());
    });
    let mut link = Link::new(kind, script);
    link.transport().lose_write_connection();
    link.run_until_lost();
    assert_eq!(
        link.record.summary(),
        ["made", "write closed", "lost closed cleanly"]
    );
    link.finish();
}

fn closing_inside_read_connection_lost(kind: Kind) {
    let script = Script::new();
    let record = script.record();
    let script = script.read_closed(move |cx| {
        let _ = cx.transport.write(b"so long");
        cx.transport.lose_connection();
        assert!(!record.is_lost());
        AfterReadClosed::KeepWriting
    });
    let mut link = Link::new(kind, script);
    link.peer().shut_write();
    assert_eq!(link.peer_receives_all(), (b"so long".to_vec(), End::Clean));
    link.run_until_lost();
    assert_eq!(
        link.record.summary(),
        ["made", "read closed", "lost closed cleanly"]
    );
    link.finish();
}

fn aborting_inside_read_connection_lost(kind: Kind) {
    for after in [
        AfterReadClosed::KeepWriting,
        AfterReadClosed::LoseConnection,
        AfterReadClosed::EndConnection,
    ] {
        let script = Script::new().read_closed(move |cx| {
            cx.transport.abort_connection();
            after
        });
        let mut link = Link::new(kind, script);
        link.peer().shut_write();
        link.run_until_lost();
        assert_eq!(
            link.record.summary(),
            ["made", "read closed", "lost aborted by us"]
        );
        link.finish();
    }
}

fn half_closing_inside_read_connection_lost(kind: Kind) {
    let script = Script::new().read_closed(|cx| {
        let _ = cx.transport.write(b"so long");
        cx.transport.lose_write_connection();
        AfterReadClosed::KeepWriting
    });
    let mut link = Link::new(kind, script);
    link.peer().shut_write();
    assert_eq!(link.peer_receives_all(), (b"so long".to_vec(), End::Clean));
    link.run_until_lost();
    assert_eq!(
        link.record.summary(),
        ["made", "read closed", "write closed", "lost closed cleanly"]
    );
    link.finish();
}

/// F-19, W-24.
fn lose_connection_after_our_side_closed(kind: Kind) {
    let mut link = Link::new(kind, Script::new());
    link.transport().lose_write_connection();
    link.settle();
    link.transport().lose_connection();
    assert!(!link.record.is_lost(), "told inside the call");
    link.run_until_lost();
    assert_eq!(
        link.record.summary(),
        ["made", "write closed", "lost closed cleanly"]
    );
    link.finish();
}

/// F-11: one thing is done when all has left, and the close is before the half-close.
fn a_close_wins_over_a_half_close_that_waits(kind: Kind) {
    let mut link = Link::new(kind, Script::new());
    let written = link.fill();
    link.transport().lose_write_connection();
    link.settle();
    link.transport().lose_connection();
    let (received, end) = link.peer_receives_all();
    assert_eq!((received.len(), end), (written, End::Clean));
    link.run_until_lost();
    assert_eq!(link.record.summary(), ["made", "lost closed cleanly"]);
    link.finish();
}

/// F-17: nobody is there any more to be told of it.
fn half_close_of_a_dead_peer_passes(kind: Kind) {
    let script = Script::new().keep_writing();
    let mut link = Link::new(kind, script);
    link.transport().pause_producing();
    link.close_peer();
    link.settle();
    link.transport().lose_write_connection();
    link.settle();
    if !kind.has_own_end() {
        assert_eq!(link.record.summary(), ["made", "write closed"]);
    }
    link.transport().resume_producing();
    link.run_until_lost();
    link.finish();
}

fn the_peers_end_is_delivered_after_its_data(kind: Kind) {
    let mut link = Link::new(kind, Script::new().keep_writing());
    let sent = link.peer().fill();
    link.peer().shut_write();
    link.run_until(|record| {
        record
            .summary()
            .last()
            .is_some_and(|last| last == "read closed")
    });
    assert_eq!(link.record.data().len(), sent);
    link.finish();
}
