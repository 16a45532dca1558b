//! Big bodies, and producers with consumers that are slower.

use std::cell::RefCell;
use std::rc::Rc;

use bowline::{Context, Producer, ProducerKind, ProducerRef, Transport, Transports};

use crate::Scenario;
use crate::pair::{Direction, Pair, both_directions, counted};
use crate::peer::Peers;

pub(crate) fn scenarios() -> Vec<Scenario> {
    [
        both_directions("big_body_with_exact_descriptors", big_with_exact),
        both_directions("big_body_with_descriptors_queued_between", big_with_queued),
        both_directions("big_body_from_twisted", big_from_twisted),
        both_directions("our_push_producer_waits_for_twisted", we_push),
        both_directions("twisteds_push_producer_waits_for_us", twisted_pushes),
        both_directions("our_pull_producer_feeds_twisted", we_pull),
        both_directions("twisteds_pull_producer_feeds_us", twisted_pulls),
    ]
    .into_iter()
    .flatten()
    .collect()
}

const MIB: usize = 1 << 20;

/// What a socket and two buffers hold together is far less.
const PRODUCED: usize = 2 * MIB;

/// Parts of an odd length, each with descriptors of its own.
fn big_with_exact(peers: &Peers, direction: Direction) {
    const PART: usize = MIB + 13;
    let mut pair = Pair::with_twisted(peers, direction, "receiver");
    for part in 0..3 {
        pair.write(1000);
        pair.write_with_files(PART, part * 5..(part + 1) * 5);
    }
    let total = 3 * (PART + 1000);
    pair.wait("all is there", |pair| pair.peer_received() == total);
    pair.tell("report");
    pair.wait("the report", |pair| !pair.peer.told("received").is_empty());
    pair.assert_peer_received(total);
    assert_eq!(pair.peer.told("fd"), pair.identities(0..15));
    // Exact: so many bytes had been received before the first descriptor of
    // each part. Twisted is told of them before the bytes of the same read,
    // which can begin with earlier ones: 1000 here, and what was left of the
    // part before.
    let mut received = 0;
    let mut descriptors = 0;
    for event in pair.peer.events() {
        if let Some(count) = event.strip_prefix("data ") {
            received += count.parse::<usize>().expect("a number");
        } else if event.starts_with("fd ") {
            let begins = (descriptors / 5) * (PART + 1000) + 1000;
            assert!(received <= begins, "descriptor {descriptors} came late");
            assert!(
                received + 65_536 > begins,
                "descriptor {descriptors} came early: after {received} bytes, not {begins}"
            );
            descriptors += 1;
        }
    }
}

/// The descriptors may come early; they keep their order, and the bytes theirs.
fn big_with_queued(peers: &Peers, direction: Direction) {
    let mut pair = Pair::with_twisted(peers, direction, "receiver");
    for index in 0..10 {
        pair.write(MIB / 5);
        pair.send_file(index);
    }
    pair.write(1);
    let total = 10 * (MIB / 5) + 1;
    pair.wait("all is there", |pair| pair.peer_received() == total);
    pair.tell("report");
    pair.wait("the report", |pair| !pair.peer.told("received").is_empty());
    pair.assert_peer_received(total);
    assert_eq!(pair.peer.told("fd"), pair.identities(0..10));
}

fn big_from_twisted(peers: &Peers, direction: Direction) {
    let mut pair = Pair::with_twisted(peers, direction, "receiver");
    pair.make_files(3);
    pair.tell("write=1048576 fd=0 write=1048579 fd=1 fd=2 write=1");
    let total = 2 * MIB + 4;
    pair.wait("all is there", |pair| pair.record.data().len() == total);
    pair.assert_received(total);
    assert_eq!(pair.received_identities(), pair.identities(0..3));
}

/// A producer that tells what it is told.
struct Source {
    left: usize,
    is_paused: bool,
    told: Rc<RefCell<Vec<&'static str>>>,
}

const PORTION: usize = 16_384;

impl Source {
    fn new(told: &Rc<RefCell<Vec<&'static str>>>) -> Self {
        Self {
            left: PRODUCED,
            is_paused: false,
            told: Rc::clone(told),
        }
    }

    fn write_portion(&mut self, transport: &mut dyn Transport) {
        let written = PRODUCED - self.left;
        let portion = PORTION.min(self.left);
        self.left -= portion;
        transport.write(&counted(written..written + portion));
        if self.left == 0 {
            self.told.borrow_mut().push("produced");
            transport.unregister_producer();
        }
    }
}

impl Producer for Source {
    fn resume_producing(&mut self, cx: &mut Context<'_, dyn Transport>) {
        self.told.borrow_mut().push("resumed");
        self.is_paused = false;
        while self.left > 0 && !cx.transport.is_send_buffer_full() {
            self.write_portion(cx.transport);
        }
    }

    fn pause_producing(&mut self, _: &mut Context<'_, dyn Transport>) {
        assert!(!self.is_paused, "pauses are paired with resumes");
        self.is_paused = true;
        self.told.borrow_mut().push("paused");
    }
}

/// As [`Source`], asked for each portion.
struct PullSource(Source);

impl Producer for PullSource {
    fn resume_producing(&mut self, cx: &mut Context<'_, dyn Transport>) {
        self.0.told.borrow_mut().push("asked");
        self.0.write_portion(cx.transport);
    }
}

fn we_push(peers: &Peers, direction: Direction) {
    let mut pair = Pair::with_twisted(peers, direction, "receiver");
    pair.tell("pause report");
    pair.wait("it is paused", |pair| {
        !pair.peer.told("received").is_empty()
    });

    let told = Rc::default();
    let mut source = Source::new(&told);
    let transport = pair.transport();
    while source.left > 0 && !transport.is_send_buffer_full() {
        source.write_portion(transport.as_dyn());
    }
    transport
        .register_producer(ProducerRef::boxed(source), ProducerKind::Push)
        .expect("the first");
    // The kernel takes what it can, and then nobody goes on.
    let mut seen = 0;
    loop {
        crate::support::run_until_quiet(&mut pair.reactor);
        if std::mem::replace(&mut seen, told.borrow().len()) == told.borrow().len() {
            break;
        }
    }
    assert_eq!(told.borrow().last(), Some(&"paused"));
    assert!(!told.borrow().contains(&"produced"));
    assert!(pair.transport().is_producer_paused());
    let unsent = pair.transport().unsent_bytes();
    assert!(
        unsent > 65_536 - PORTION && unsent <= 65_536 + PORTION,
        "{unsent}"
    );

    pair.tell("resume");
    pair.wait("all is there", |pair| pair.peer_received() == PRODUCED);
    pair.tell("report");
    pair.wait("the report", |pair| pair.peer.told("received").len() == 2);
    pair.assert_peer_received(PRODUCED);
    assert_eq!(told.borrow().last(), Some(&"produced"));
    assert!(told.borrow().contains(&"resumed"));
}

fn twisted_pushes(peers: &Peers, direction: Direction) {
    let mut pair = Pair::with_twisted(peers, direction, "receiver");
    pair.transport().pause_producing();
    pair.tell(&format!("push={PRODUCED}"));
    pair.wait_for("paused");
    assert!(pair.record.data().is_empty(), "we were paused");
    assert_eq!(pair.peer.count("produced"), 0);

    pair.transport().resume_producing();
    pair.wait("all is there", |pair| pair.record.data().len() == PRODUCED);
    pair.assert_received(PRODUCED);
    pair.wait_for("produced");
    assert!(pair.peer.count("resumed") > 0);
}

fn we_pull(peers: &Peers, direction: Direction) {
    let mut pair = Pair::with_twisted(peers, direction, "receiver");
    let told = Rc::default();
    let source = PullSource(Source::new(&told));
    pair.transport()
        .register_producer(ProducerRef::boxed(source), ProducerKind::Pull)
        .expect("the first");
    // Closing waits for the producer.
    pair.transport().lose_connection();
    pair.wait_for_peers_loss();
    pair.assert_peer_received(PRODUCED);
    let portions = PRODUCED / PORTION;
    assert_eq!(told.borrow().len(), portions + 1);
    assert!(
        told.borrow()[..portions]
            .iter()
            .all(|told| *told == "asked" || *told == "produced")
    );
}

fn twisted_pulls(peers: &Peers, direction: Direction) {
    let mut pair = Pair::with_twisted(peers, direction, "receiver");
    pair.tell(&format!("pull={PRODUCED} lose"));
    pair.wait_for_our_loss();
    pair.assert_received(PRODUCED);
    pair.wait_for("produced");
    assert_eq!(pair.peer.count("asked"), PRODUCED / PORTION);
    let counts = pair.reactor.descriptor_counts();
    assert_eq!((counts.received, counts.truncations), (0, 0));
}
