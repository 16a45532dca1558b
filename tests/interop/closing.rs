//! The ends of connections: half, whole, sudden.

use std::io::Read;

use bowline::{AfterReadClosed, Transports};

use crate::Scenario;
use crate::pair::{Direction, Pair, Wants, both_directions, canary};
use crate::peer::Peers;
use crate::support::Event;

pub(crate) fn scenarios() -> Vec<Scenario> {
    [
        both_directions("we_half_close_first", we_half_close_first),
        both_directions("twisted_half_closes_first", twisted_half_closes_first),
        both_directions("half_close_without_the_interface", half_close_unheard),
        both_directions("we_lose_after_a_big_body", we_lose),
        both_directions("twisted_loses_after_a_big_body", twisted_loses),
        both_directions("we_abort", we_abort),
        both_directions("we_abort_with_bytes_unread", we_abort_unread),
        both_directions("twisted_aborts_with_descriptors_unread", twisted_aborts),
        both_directions("peer_is_killed_while_it_receives", killed_receiving),
        both_directions("peer_is_killed_while_it_sends", killed_sending),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// More than sockets and buffers hold.
const BIG: usize = 1 << 20;

const KEEPS_WRITING: Wants = Wants {
    descriptors: true,
    after_read_closed: AfterReadClosed::KeepWriting,
};

fn we_half_close_first(peers: &Peers, direction: Direction) {
    let mut pair = Pair::with_wants(peers, direction, "half-closer", KEEPS_WRITING);
    pair.write(BIG);
    pair.transport().lose_write_connection();
    pair.wait_for("read-lost");
    assert_eq!(pair.peer_received(), BIG, "all came before the end");
    assert_eq!(pair.record.summary(), ["made", "write closed"]);

    pair.tell(&format!("write={BIG} lose_write"));
    pair.wait_for("write-lost");
    pair.wait_for_our_loss();
    // With both sides closed our connection has ended; Twisted's is the
    // protocol's to end.
    pair.tell("lose");
    pair.wait_for_peers_loss();
    pair.assert_received(BIG);
    pair.assert_peer_received(BIG);
    assert_eq!(
        pair.record.summary(),
        [
            "made",
            "write closed",
            &format!("data {BIG}"),
            "read closed",
            "lost closed cleanly"
        ]
    );
    assert_eq!(pair.peer.told("lost"), ["ConnectionDone"]);
}

fn twisted_half_closes_first(peers: &Peers, direction: Direction) {
    let mut pair = Pair::with_wants(peers, direction, "half-closer", KEEPS_WRITING);
    pair.make_files(1);
    pair.tell("fd=0 write=10 lose_write");
    pair.wait_for("write-lost");
    pair.wait("we are told", |pair| {
        pair.record
            .count(|event| matches!(event, Event::ReadClosed))
            == 1
    });
    pair.assert_received(10);
    // Descriptors pass over what is half open, too.
    pair.send_file(0);
    pair.write(BIG);
    pair.transport().lose_connection();
    pair.wait_for_our_loss();
    pair.wait_for("read-lost");
    pair.tell("lose");
    pair.wait_for_peers_loss();
    pair.assert_peer_received(BIG);
    assert_eq!(pair.peer.told("fd"), pair.identities(0..1));
    assert_eq!(pair.received_identities(), pair.identities(0..1));
    assert_eq!(pair.peer.told("lost"), ["ConnectionDone"]);
    assert_eq!(
        pair.record.summary(),
        [
            "made",
            "descriptor",
            "data 10",
            "read closed",
            "sent 1",
            "lost closed cleanly"
        ]
    );
}

/// A protocol that did not ask for half-closes has its connection ended by one,
/// at both ends.
fn half_close_unheard(peers: &Peers, direction: Direction) {
    let mut pair = Pair::with_twisted(peers, direction, "receiver");
    pair.write(10);
    pair.transport().lose_write_connection();
    pair.wait_for_peers_loss();
    pair.wait_for_our_loss();
    assert_eq!(pair.peer.told("lost"), ["ConnectionDone"]);
    pair.assert_peer_received(10);

    let mut pair = Pair::with_twisted(peers, direction, "half-closer");
    pair.tell("write=10 lose_write");
    pair.wait_for_our_loss();
    pair.assert_received(10);
    assert_eq!(
        pair.record.summary(),
        ["made", "data 10", "read closed", "lost closed cleanly"]
    );
}

fn we_lose(peers: &Peers, direction: Direction) {
    let mut pair = Pair::with_twisted(peers, direction, "receiver");
    pair.write_with_files(BIG, 0..2);
    pair.transport().lose_connection();
    pair.wait_for_peers_loss();
    pair.assert_peer_received(BIG);
    assert_eq!(pair.peer.told("fd"), pair.identities(0..2));
    assert_eq!(pair.peer.told("lost"), ["ConnectionDone"]);
    pair.wait_for_our_loss();
    assert_eq!(
        pair.record.summary(),
        ["made", "sent 2", "lost closed cleanly"]
    );
}

fn twisted_loses(peers: &Peers, direction: Direction) {
    let mut pair = Pair::with_twisted(peers, direction, "receiver");
    pair.make_files(1);
    pair.tell(&format!("fd=0 write={BIG} lose"));
    pair.wait_for_our_loss();
    pair.assert_received(BIG);
    assert_eq!(
        pair.record.summary(),
        [
            "made",
            "descriptor",
            &format!("data {BIG}"),
            "read closed",
            "lost closed cleanly"
        ]
    );
    pair.wait_for_peers_loss();
    assert_eq!(pair.peer.told("lost"), ["ConnectionDone"]);
}

/// S-37: what was queued is dropped and closed; the peer sees an end.
fn we_abort(peers: &Peers, direction: Direction) {
    let mut pair = Pair::with_twisted(peers, direction, "receiver");
    pair.tell("pause report");
    pair.wait("it is paused", |pair| {
        !pair.peer.told("received").is_empty()
    });
    let (passed, mut canary) = canary();
    pair.write(BIG);
    pair.transport()
        .write_with_descriptors(b"behind it", vec![passed.into()])
        .expect("there is room");
    pair.transport().abort_connection();
    pair.wait_for_our_loss();
    assert_eq!(pair.record.summary(), ["made", "lost aborted by us"]);
    assert_eq!(canary.read(&mut [0]).expect("all copies are closed"), 0);
    let counts = pair.reactor.descriptor_counts();
    assert_eq!((counts.passed, counts.unsent), (0, 1));

    pair.tell("resume");
    pair.wait_for_peers_loss();
    assert_eq!(pair.peer.told("lost"), ["ConnectionDone"]);
    assert!(pair.peer_received() < BIG, "the rest was dropped");
    assert!(pair.peer.told("fd").is_empty());
}

/// What is unread is read out before we close, for the sake of descriptors in
/// it. So the end looks orderly to the sender, unless it sent more meanwhile:
/// that goes unread, and the kernel tells of a reset.
fn we_abort_unread(peers: &Peers, direction: Direction) {
    let mut pair = Pair::with_twisted(peers, direction, "receiver");
    pair.transport().pause_producing();
    pair.make_files(1);
    pair.tell(&format!("watch fd=0 write={BIG}"));
    pair.wait_for("paused");
    pair.transport().abort_connection();
    pair.wait_for_our_loss();
    pair.wait_for_peers_loss();
    let lost = pair.peer.told("lost");
    assert!(
        lost == ["ConnectionDone"] || lost == ["ConnectionLost"],
        "{lost:?}"
    );
    assert_eq!(pair.peer.count("stopped"), 1);
    assert_eq!(pair.record.summary(), ["made", "lost aborted by us"]);
}

/// A peer that closes with something unread has said all that it had to say: its end is
/// told, and then what became of ours. Twisted tells the loss alone; what it had not
/// received by then is lost with that. The error is the same whoever finds out first, the
/// write that waits or the poller.
fn assert_ended_with_our_bytes_unread(pair: &Pair) {
    assert_eq!(
        pair.record.summary(),
        ["made", "sent 1", "read closed", "lost connection lost"]
    );
    let reset = std::io::Error::from(rustix::io::Errno::CONNRESET).to_string();
    let is_reset = |event: &Event| matches!(event, Event::Lost(why) if why.contains(&reset));
    assert_eq!(pair.record.count(is_reset), 1, "why it was lost");
}

/// Descriptors that were in flight are closed by the kernel, those that were
/// queued by us.
fn twisted_aborts(peers: &Peers, direction: Direction) {
    let mut pair = Pair::with_twisted(peers, direction, "receiver");
    pair.tell("pause report");
    pair.wait("it is paused", |pair| {
        !pair.peer.told("received").is_empty()
    });
    let (in_flight, mut canary_in_flight) = canary();
    let (queued, mut canary_queued) = canary();
    pair.transport()
        .send_file_descriptor(in_flight.into())
        .expect("there is room");
    pair.write(BIG);
    pair.wait("the first has left", |pair| {
        pair.record
            .count(|event| matches!(event, Event::DescriptorsSent(1)))
            == 1
    });
    pair.transport()
        .write_with_descriptors(b"behind it", vec![queued.into()])
        .expect("there is room");
    pair.tell("abort");
    pair.wait_for_peers_loss();
    assert_eq!(pair.peer.told("lost"), ["ConnectionAborted"]);
    pair.wait_for_our_loss();
    assert_ended_with_our_bytes_unread(&pair);
    for canary in [&mut canary_in_flight, &mut canary_queued] {
        assert_eq!(canary.read(&mut [0]).expect("all copies are closed"), 0);
    }
    let counts = pair.reactor.descriptor_counts();
    assert_eq!((counts.passed, counts.unsent), (1, 1));
}

fn killed_receiving(peers: &Peers, direction: Direction) {
    let mut pair = Pair::with_twisted(peers, direction, "receiver");
    pair.tell("pause report");
    pair.wait("it is paused", |pair| {
        !pair.peer.told("received").is_empty()
    });
    let (in_flight, mut canary_in_flight) = canary();
    let (queued, mut canary_queued) = canary();
    pair.transport()
        .send_file_descriptor(in_flight.into())
        .expect("there is room");
    pair.write(BIG);
    pair.wait("the first has left", |pair| {
        pair.record
            .count(|event| matches!(event, Event::DescriptorsSent(1)))
            == 1
    });
    pair.transport()
        .write_with_descriptors(b"behind it", vec![queued.into()])
        .expect("there is room");
    pair.peer.kill();
    pair.wait_for_our_loss();
    assert_ended_with_our_bytes_unread(&pair);
    for canary in [&mut canary_in_flight, &mut canary_queued] {
        assert_eq!(canary.read(&mut [0]).expect("all copies are closed"), 0);
    }
}

/// What it had sent is delivered, then the end.
fn killed_sending(peers: &Peers, direction: Direction) {
    let mut pair = Pair::with_twisted(peers, direction, "receiver");
    pair.transport().pause_producing();
    pair.make_files(1);
    pair.tell(&format!("watch fd=0 write={BIG}"));
    pair.wait_for("paused");
    // Until the kernel has no room left for it.
    pair.tell("report");
    pair.wait("a turn has passed", |pair| {
        !pair.peer.told("received").is_empty()
    });
    pair.peer.kill();
    pair.transport().resume_producing();
    pair.wait_for_our_loss();
    let received = pair.record.data().len();
    assert!(received > 0 && received < BIG, "{received}");
    pair.assert_received(received);
    assert_eq!(pair.received_identities(), pair.identities(0..1));
    assert_eq!(
        pair.record.summary(),
        [
            "made",
            "descriptor",
            &format!("data {received}"),
            "read closed",
            "lost closed cleanly"
        ]
    );
}
