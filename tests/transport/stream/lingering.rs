//! Closes that wait for the peer, so that no reset destroys what it was sent last.

use std::time::Duration;

use bowline::LingeringClose;

use crate::harness::{End, Kind, Link, Script, over_every_kind, pattern};

over_every_kind!(
    an_answer_survives_the_upload_that_it_refuses,
    a_lingering_close_ends_with_the_peers_end,
    a_lingering_close_ends_in_time,
    a_lingering_close_ends_with_its_bytes,
    a_lingering_close_is_told_of_a_reset,
    a_lingering_close_can_be_taken_back,
);

/// Whether this one waits: it has resets, and nobody else may hold it.
fn lingers(kind: Kind) -> bool {
    kind.lingers()
}

fn lingering(script: Script, lingering: LingeringClose) -> Script {
    script.made(move |cx| {
        cx.transport.pause_producing();
        cx.transport.set_lingering_close(Some(lingering));
    })
}

/// Sends more than is read, and more when the answer is there.
fn an_answer_survives_the_upload_that_it_refuses(kind: Kind) {
    if kind.closes_with_reset() {
        return;
    }
    let mut link = Link::new(kind, lingering(Script::new(), LingeringClose::default()));
    link.peer().send(&[0; 20_000]);
    link.settle();
    let answer = pattern(300_000);
    let _ = link.transport().write(&answer);
    link.transport().lose_connection();
    link.settle();
    let mut received = Vec::new();
    while received.len() < answer.len() {
        // The rest of a long upload.
        let _ = link.peer().write(&[0; 1_000]);
        let room = (answer.len() - received.len()).min(50_000);
        received.extend(link.peer_receives(room));
    }
    assert!(received == answer);
    let (rest, end) = link.peer_receives_all();
    assert!(rest.is_empty());
    if lingers(kind) {
        // Elsewhere a reset destroys nothing.
        assert_eq!(end, End::Clean);
    }
    link.close_peer();
    link.run_until_lost();
    assert_eq!(link.record.summary(), ["made", "lost closed cleanly"]);
    link.finish();
}

fn a_lingering_close_ends_with_the_peers_end(kind: Kind) {
    let mut link = Link::new(kind, lingering(Script::new(), LingeringClose::default()));
    // Those of layers.
    let before = link.reactor.delayed_calls().count();
    link.transport().lose_connection();
    link.settle();
    if lingers(kind) {
        // Our end is told meanwhile.
        assert_eq!(link.record.summary(), ["made"]);
        let mut byte = [0];
        assert_eq!(link.peer().read(&mut byte).unwrap(), 0);
        assert_eq!(link.reactor.delayed_calls().count(), before + 1);
    }
    link.close_peer();
    link.run_until_lost();
    assert_eq!(link.record.summary(), ["made", "lost closed cleanly"]);
    assert_eq!(link.reactor.delayed_calls().count(), 0);
    link.finish();
}

fn a_lingering_close_ends_in_time(kind: Kind) {
    let time = Duration::from_secs(3);
    let limits = LingeringClose::default().time(time);
    let mut link = Link::new(kind, lingering(Script::new(), limits));
    // This one is for what has to be sent.
    link.transport()
        .lose_connection_within(Duration::from_secs(1));
    link.settle();
    link.clock.advance(time - Duration::from_millis(1));
    link.settle();
    assert_eq!(link.record.is_lost(), !lingers(kind));
    link.clock.advance(Duration::from_millis(1));
    link.run_until_lost();
    assert_eq!(link.record.summary(), ["made", "lost closed cleanly"]);
    link.finish();
}

fn a_lingering_close_ends_with_its_bytes(kind: Kind) {
    let limits = LingeringClose::default().bytes(10_000);
    let mut link = Link::new(kind, lingering(Script::new(), limits));
    link.transport().lose_connection();
    link.settle();
    if lingers(kind) {
        link.peer().send(&[0; 9_900]);
        link.settle();
        assert_eq!(link.record.summary(), ["made"]);
        link.peer().send(&[0; 100]);
    }
    link.run_until_lost();
    assert_eq!(link.record.summary(), ["made", "lost closed cleanly"]);
    link.finish();
}

fn a_lingering_close_is_told_of_a_reset(kind: Kind) {
    if !lingers(kind) {
        return;
    }
    let mut link = Link::new(kind, lingering(Script::new(), LingeringClose::default()));
    link.transport().lose_connection();
    link.settle();
    link.reset_by_peer();
    link.run_until_lost();
    assert_eq!(link.record.summary(), ["made", "lost connection lost"]);
    link.finish();
}

fn a_lingering_close_can_be_taken_back(kind: Kind) {
    let mut link = Link::new(kind, lingering(Script::new(), LingeringClose::default()));
    link.transport().set_lingering_close(None);
    link.transport().lose_connection();
    link.run_until_lost();
    link.finish();
}
