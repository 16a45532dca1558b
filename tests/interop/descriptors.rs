//! Descriptors to and from Twisted.

use std::io::{Read, Seek};

use bowline::error::SendDescriptorErrorKind;
use bowline::{DescriptorLimits, ProducerKind, ProducerRef, Transports};

use crate::Scenario;
use crate::pair::{Direction, Pair, Wants, both_directions, canary};
use crate::peer::Peers;
use crate::support::Event;

pub(crate) fn scenarios() -> Vec<Scenario> {
    [
        both_directions("one_descriptor_each_way", one_each_way),
        both_directions("many_descriptors_among_bytes", many_among_bytes),
        both_directions("twisted_receives_64_in_one_message", batch_of_64),
        both_directions("twisted_receives_253_in_one_message", message_with_253),
        both_directions("queue_of_65_pauses_both_sides", queue_of_65_pauses),
        both_directions("twisted_does_not_want_them", twisted_does_not_want_them),
        both_directions("we_do_not_want_them", we_do_not_want_them),
        both_directions("descriptor_without_a_byte", without_a_byte),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// S-02, S-05, S-06: the same open file arrives, offset and all, and the
/// sender's copy may be gone.
fn one_each_way(peers: &Peers, direction: Direction) {
    let mut pair = Pair::with_twisted(peers, direction, "receiver");
    let mut kept = pair.file(0);
    let passed = kept.try_clone().expect("there is room");
    pair.transport()
        .send_file_descriptor(passed.into())
        .expect("there is room");
    pair.write(1);
    pair.wait("the byte is there", |pair| pair.peer_received() == 1);
    assert_eq!(pair.peer.told("fd"), pair.identities(0..1));
    pair.tell("seek=5 fd=0 write=1");
    pair.wait("the answer is there", |pair| pair.record.data().len() == 1);
    assert_eq!(kept.stream_position().expect("a file"), 5, "shared offset");
    assert_eq!(
        pair.record.summary(),
        ["made", "sent 1", "descriptor", "data 1"]
    );
    assert_eq!(pair.received_identities(), pair.identities(0..1));
}

/// S-01, S-07, S-25: in order, with no byte lost or sent twice.
fn many_among_bytes(peers: &Peers, direction: Direction) {
    const DESCRIPTORS: usize = 100;
    const BYTES_EACH: usize = 37;
    let mut pair = Pair::with_twisted(peers, direction, "receiver");
    pair.make_files(DESCRIPTORS);
    let total = DESCRIPTORS * BYTES_EACH;
    for index in 0..DESCRIPTORS {
        pair.send_file(index);
        pair.write(BYTES_EACH);
    }
    let commands: Vec<_> = (0..DESCRIPTORS)
        .map(|index| format!("fd={index} write={BYTES_EACH}"))
        .collect();
    pair.tell(&commands.join(" "));
    pair.wait("all bytes are at both ends", |pair| {
        pair.peer_received() == total && pair.record.data().len() == total
    });
    pair.tell("report");
    pair.wait("the report", |pair| !pair.peer.told("received").is_empty());

    pair.assert_peer_received(total);
    pair.assert_received(total);
    let sent = pair.identities(0..DESCRIPTORS);
    assert_eq!(pair.peer.told("fd"), sent);
    assert_eq!(pair.received_identities(), sent);
}

/// W-05: descriptors queued one by one leave as one message.
fn batch_of_64(peers: &Peers, direction: Direction) {
    let mut pair = Pair::with_twisted(peers, direction, "receiver");
    for index in 0..64 {
        pair.send_file(index);
    }
    pair.write(64);
    pair.wait("the bytes are there", |pair| pair.peer_received() == 64);
    assert_eq!(pair.peer.told("fd"), pair.identities(0..64));
    assert_told_at_once(&pair, 64, 64);
}

/// The most that one message can hold, and one more.
fn message_with_253(peers: &Peers, direction: Direction) {
    let mut pair = Pair::with_twisted(peers, direction, "receiver");
    let too_many = (0..254).map(|index| pair.file(index).into()).collect();
    let refused = pair
        .transport()
        .write_with_descriptors(b"refused", too_many)
        .expect_err("one message cannot hold them");
    assert_eq!(refused.kind, SendDescriptorErrorKind::TooManyForOneMessage);
    assert_eq!(refused.descriptors.len(), 254);
    drop(refused);

    pair.write_with_files(10, 0..253);
    pair.wait("the bytes are there", |pair| pair.peer_received() == 10);
    assert_eq!(pair.peer.told("fd"), pair.identities(0..253));
    assert_told_at_once(&pair, 253, 10);
}

/// Fails unless the peer received so many descriptors and then so many bytes by
/// one read: it tells of each descriptor, then of the bytes.
#[track_caller]
fn assert_told_at_once(pair: &Pair, descriptors: usize, bytes: usize) {
    let events = pair.peer.events();
    let of_the_connection: Vec<_> = events
        .iter()
        .skip_while(|event| *event != "made")
        .skip(1)
        .collect();
    assert_eq!(of_the_connection.len(), descriptors + 1);
    assert_eq!(*of_the_connection[descriptors], format!("data {bytes}"));
}

/// S-21, S-22, S-23: the 65th pauses a push producer, at both ends; with the
/// bytes gone it is resumed.
fn queue_of_65_pauses(peers: &Peers, direction: Direction) {
    let mut pair = Pair::with_twisted(peers, direction, "receiver");
    pair.make_files(65);
    pair.transport()
        .register_producer(ProducerRef::Protocol, ProducerKind::Push)
        .expect("the first");
    for index in 0..65 {
        assert!(!pair.transport().is_producer_paused(), "paused at {index}");
        pair.send_file(index);
    }
    assert!(pair.transport().is_producer_paused());
    pair.write(65);
    pair.wait("our producer goes on", |pair| {
        pair.record.count(|event| matches!(event, Event::Resumed)) == 1
    });
    assert_eq!(
        pair.record.count(|event| matches!(event, Event::Paused)),
        1,
        "{:?}",
        pair.record.summary()
    );
    pair.transport().unregister_producer();

    let first: Vec<_> = (0..64).map(|index| format!("fd={index}")).collect();
    pair.tell(&format!(
        "watch {} report fd=64 report write=65",
        first.join(" ")
    ));
    pair.wait_for("resumed");
    let events = pair.peer.events();
    let reports = events
        .iter()
        .filter(|event| ["paused", "received", "resumed"].contains(&word(event)));
    // The write finds the queue still full, and Twisted pauses again.
    assert_eq!(
        reports.map(|event| word(event)).collect::<Vec<_>>(),
        ["received", "paused", "received", "paused", "resumed"]
    );
    pair.wait("all is at both ends", |pair| {
        pair.peer_received() == 65 && pair.record.data().len() == 65
    });
    assert_eq!(pair.peer.told("fd"), pair.identities(0..65));
    assert_eq!(pair.received_identities(), pair.identities(0..65));
}

fn word(event: &str) -> &str {
    event.split(' ').next().unwrap_or(event)
}

/// S-31: Twisted closes them and says so; the bytes arrive.
fn twisted_does_not_want_them(peers: &Peers, direction: Direction) {
    let mut pair = Pair::with_twisted(peers, direction, "plain");
    let (passed, mut canary) = canary();
    pair.transport()
        .send_file_descriptor(passed.into())
        .expect("there is room");
    pair.write(3);
    pair.wait("the bytes are there", |pair| pair.peer_received() == 3);
    assert_eq!(canary.read(&mut [0]).expect("all copies are closed"), 0);
    assert!(
        pair.peer
            .told("log")
            .iter()
            .any(|line| line.contains("does not provide IFileDescriptorReceiver")),
        "Twisted logged {:?}",
        pair.peer.told("log")
    );
}

/// The same at our end: closed, counted, the bytes delivered.
fn we_do_not_want_them(peers: &Peers, direction: Direction) {
    let wants = Wants {
        descriptors: false,
        ..Wants::default()
    };
    let mut pair = Pair::with_wants(peers, direction, "receiver", wants);
    pair.make_files(3);
    pair.tell("fd=0 fd=1 fd=2 write=10");
    pair.wait("the bytes are there", |pair| pair.record.data().len() == 10);
    pair.assert_received(10);
    let counts = pair.reactor.descriptor_counts();
    assert_eq!((counts.received, counts.unclaimed), (3, 3));
}

/// W-06: we hold it until there is a byte; it costs Twisted the connection.
fn without_a_byte(peers: &Peers, direction: Direction) {
    let mut pair = Pair::with_twisted(peers, direction, "receiver");
    pair.make_files(1);
    pair.transport()
        .set_descriptor_limits(DescriptorLimits::default().per_message(1));
    pair.send_file(0);
    // A round trip: several turns of our reactor.
    pair.tell("write=1");
    pair.wait("the byte is there", |pair| pair.record.data().len() == 1);
    assert_eq!(pair.transport().unsent_descriptors(), 1);
    pair.write(1);
    pair.wait("our byte is there", |pair| pair.peer_received() == 1);
    assert_eq!(pair.peer.told("fd"), pair.identities(0..1));

    pair.tell("fd=0");
    pair.wait_for_peers_loss();
    assert_eq!(pair.peer.told("lost"), ["FileDescriptorOverrun"]);
    pair.wait_for_our_loss();
    assert!(pair.received_identities().is_empty(), "it never left");
}
