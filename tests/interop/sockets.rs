//! Python's own `socket.send_fds` and `socket.recv_fds`.

use std::fs::File;
use std::io::Read;

use bowline::Transports;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::Scenario;
use crate::pair::{Direction, Pair, adler32, canary, counted};
use crate::peer::{Needs, Peers};
use crate::support::open_descriptors;

pub(crate) fn scenarios() -> Vec<Scenario> {
    let scenario = |name: &str, run: fn(&Peers)| {
        Scenario::new(format!("python_sockets::{name}"), Needs::Python, run)
    };
    vec![
        scenario("receives_one_message", receives_message),
        scenario("receives_a_batch", receives_batch),
        scenario("has_too_little_room", too_little_room),
        scenario("takes_no_descriptors", takes_none),
        scenario("sends", sends),
        scenario("sends_253_in_one_message", sends_253),
        scenario("sends_and_closes", sends_and_closes),
        scenario("sends_more_than_we_have_room_for", we_have_too_little_room),
    ]
}

/// What the peer tells of a receive of the first bytes.
fn report(bytes: usize, truncated: &str) -> String {
    format!("{bytes} {} {truncated}", adler32(&counted(0..bytes)))
}

/// One call receives one message: its descriptors, no byte behind it.
fn receives_message(peers: &Peers) {
    let mut pair = Pair::with_socket(peers, Direction::WeConnect);
    pair.write_with_files(11, 0..3);
    pair.write(20);
    pair.wait("it has left", |pair| {
        pair.record.summary() == ["made", "sent 3"]
    });
    pair.tell("receive=100=10");
    pair.wait("it is there", |pair| pair.peer.told("received").len() == 1);
    assert_eq!(pair.peer.told("received"), [report(11, "complete")]);
    assert_eq!(pair.peer.told("fd"), pair.identities(0..3));
}

fn receives_batch(peers: &Peers) {
    let mut pair = Pair::with_socket(peers, Direction::PeerConnects);
    for index in 0..64 {
        pair.send_file(index);
    }
    pair.write(100);
    pair.wait("it has left", |pair| {
        pair.record.summary() == ["made", "sent 64"]
    });
    pair.tell("receive=1000=64");
    pair.wait("it is there", |pair| pair.peer.told("received").len() == 1);
    assert_eq!(pair.peer.told("received"), [report(100, "complete")]);
    assert_eq!(pair.peer.told("fd"), pair.identities(0..64));
}

/// `MSG_CTRUNC`: the peer learns that descriptors were lost, and the kernel
/// closes them; we sent all.
fn too_little_room(peers: &Peers) {
    let mut pair = Pair::with_socket(peers, Direction::WeConnect);
    let (lost, mut canary) = canary();
    let descriptors = vec![pair.file(0).into(), lost.into()];
    pair.transport()
        .write_with_descriptors(&counted(0..8), descriptors)
        .expect("there is room");
    pair.tell("receive=100=1");
    pair.wait("it is there", |pair| pair.peer.told("received").len() == 1);
    assert_eq!(pair.peer.told("received"), [report(8, "truncated")]);
    assert_eq!(pair.peer.told("fd"), pair.identities(0..1));
    assert_eq!(canary.read(&mut [0]).expect("all copies are closed"), 0);
    assert_eq!(pair.record.summary(), ["made", "sent 2"]);
}

/// The same without any room: the bytes arrive.
fn takes_none(peers: &Peers) {
    let mut pair = Pair::with_socket(peers, Direction::WeConnect);
    let (lost, mut canary) = canary();
    pair.transport()
        .write_with_descriptors(&counted(0..8), vec![lost.into()])
        .expect("there is room");
    pair.tell("receive=100=0");
    pair.wait("it is there", |pair| pair.peer.told("received").len() == 1);
    assert_eq!(pair.peer.told("received"), [report(8, "truncated")]);
    assert_eq!(canary.read(&mut [0]).expect("all copies are closed"), 0);
}

/// Several messages at once: each read of ours stops behind the descriptors of
/// one.
fn sends(peers: &Peers) {
    let mut pair = Pair::with_socket(peers, Direction::PeerConnects);
    pair.make_files(6);
    pair.transport().pause_producing();
    pair.tell("send=4=0,1 send=2=2 send=3= send=5=3,4,5 send=1= done");
    pair.wait_for("done");
    pair.transport().resume_producing();
    pair.wait("all is there", |pair| pair.record.data().len() == 15);
    // What is without descriptors is glued in front of what has some.
    assert_eq!(
        pair.record.summary(),
        [
            "made",
            "descriptor",
            "descriptor",
            "data 4",
            "descriptor",
            "data 2",
            "descriptor",
            "descriptor",
            "descriptor",
            "data 9",
        ]
    );
    assert_eq!(pair.received_identities(), pair.identities(0..6));
}

fn sends_253(peers: &Peers) {
    let mut pair = Pair::with_socket(peers, Direction::WeConnect);
    pair.make_files(253);
    let all: Vec<_> = (0..253).map(|index| index.to_string()).collect();
    pair.tell(&format!("send=7={}", all.join(",")));
    pair.wait("all is there", |pair| pair.record.data().len() == 7);
    pair.assert_received(7);
    assert_eq!(pair.received_identities(), pair.identities(0..253));
    assert_eq!(pair.reactor.descriptor_counts().truncations, 0);
}

/// What was sent before the end arrives before the end.
fn sends_and_closes(peers: &Peers) {
    let mut pair = Pair::with_socket(peers, Direction::WeConnect);
    pair.make_files(2);
    pair.transport().pause_producing();
    pair.tell("send=4=0,1 close done");
    pair.wait_for("done");
    pair.transport().resume_producing();
    pair.wait_for_our_loss();
    assert_eq!(
        pair.record.summary(),
        [
            "made",
            "descriptor",
            "descriptor",
            "data 4",
            "read closed",
            "lost closed cleanly",
        ]
    );
    assert_eq!(pair.received_identities(), pair.identities(0..2));
}

/// `MSG_CTRUNC` at our end: no number is free for all but one of them.
fn we_have_too_little_room(peers: &Peers) {
    let mut pair = Pair::with_socket(peers, Direction::WeConnect);
    pair.make_files(3);
    pair.transport().pause_producing();
    pair.tell("send=4=0,1,2 done");
    pair.wait_for("done");
    let full = FullTable::leaving(1);
    pair.transport().resume_producing();
    pair.wait_for_our_loss();
    drop(full);
    assert_eq!(
        pair.record.summary(),
        ["made", "lost received descriptors were truncated to 1"]
    );
    assert_eq!(pair.reactor.descriptor_counts().truncations, 1);
}

/// Takes all descriptor numbers of this process until it is dropped.
struct FullTable {
    limit: Rlimit,
    _taken: Vec<File>,
}

impl FullTable {
    fn leaving(free: usize) -> Self {
        let limit = getrlimit(Resource::Nofile);
        let highest = open_descriptors().last().copied().unwrap_or(0);
        let lowered = Rlimit {
            current: Some(highest as u64 + 8),
            ..limit
        };
        setrlimit(Resource::Nofile, lowered).expect("lower than before");
        let null = || File::open("/dev/null").ok();
        let mut taken: Vec<_> = std::iter::from_fn(null).collect();
        taken.truncate(taken.len() - free);
        Self {
            limit,
            _taken: taken,
        }
    }
}

impl Drop for FullTable {
    fn drop(&mut self) {
        setrlimit(Resource::Nofile, self.limit).expect("as it was before");
    }
}
