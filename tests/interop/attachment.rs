//! Which message does a descriptor belong to? (Twisted issue 9673.)
//!
//! The same messages, some with descriptors, take four ways: they are frames
//! behind their length, and a receiver counts the descriptors that it was given
//! with each.

use std::cell::RefCell;
use std::os::fd::OwnedFd;
use std::rc::Rc;

use bowline::framing::{
    FrameContext, FrameEncoder, FrameReceiver, Framed, LengthPrefixedFramer, Pairing,
};
use bowline::{PassedDescriptor, Reactor, Transports, UnixTransport, UnixTransportHandle};

use crate::Scenario;
use crate::pair::{Direction, Link, Pair, counted, identity, number};
use crate::peer::{Needs, Peers};
use crate::support::{run_until, socketpair};

pub(crate) fn scenarios() -> Vec<Scenario> {
    vec![
        Scenario::new(
            "attachment::is_exact_between_two_bowlines",
            Needs::Nothing,
            |_| drop(between_two_bowlines()),
        ),
        Scenario::new(
            "attachment::is_exact_from_pythons_send_fds",
            Needs::Python,
            |peers| assert_eq!(counts(&from_python(peers)), SENT),
        ),
        Scenario::new(
            "attachment::is_lost_by_twisted_both_ways",
            Needs::Twisted,
            what_twisted_loses,
        ),
    ]
}

/// The messages: how many bytes, and how many descriptors they come with. One
/// is longer than what a read takes.
const MESSAGES: [(usize, usize); 7] = [
    (5, 0),
    (8, 2),
    (300, 0),
    (16, 1),
    (70_000, 3),
    (4, 0),
    (10, 1),
];
const SENT: [usize; MESSAGES.len()] = [0, 2, 0, 1, 3, 0, 1];
const DESCRIPTORS: usize = 7;

/// The files that each message is sent with.
fn files() -> impl Iterator<Item = (usize, std::ops::Range<usize>)> {
    let mut next = 0;
    MESSAGES.into_iter().map(move |(bytes, descriptors)| {
        let files = next..next + descriptors;
        next = files.end;
        (bytes, files)
    })
}

/// A frame that was received: its bytes, and which descriptors it came with.
type Received = (usize, Vec<OwnedFd>);

/// Keeps what it is given.
#[derive(Clone, Default)]
struct Keeper {
    received: Rc<RefCell<Vec<Received>>>,
    link: Link,
}

type Cx<'a, T> = FrameContext<'a, T, LengthPrefixedFramer>;

impl<T: UnixTransport> FrameReceiver<T, LengthPrefixedFramer> for Keeper {
    fn connection_made(&mut self, cx: &mut Cx<'_, T>) {
        self.link.set(Some(cx.transport.unix_handle()));
    }

    fn frame_received(&mut self, cx: &mut Cx<'_, T>, frame: &[u8]) {
        assert!(
            frame == counted(0..frame.len()),
            "other bytes than were sent"
        );
        let kept = cx.framing.descriptors().collect();
        self.received.borrow_mut().push((frame.len(), kept));
    }
}

fn framer() -> LengthPrefixedFramer {
    LengthPrefixedFramer::u32()
}

fn counts(received: &[Received]) -> Vec<usize> {
    received.iter().map(|(_, kept)| kept.len()).collect()
}

/// Sends all messages, each with exactly its descriptors.
fn send_all(transport: &mut dyn UnixTransport, file: impl Fn(usize) -> PassedDescriptor) {
    for (bytes, files) in files() {
        let mut frame = Vec::new();
        framer()
            .encode(&(), &counted(0..bytes), 0, &mut frame)
            .expect("it fits the format");
        transport
            .write_with_descriptors(&frame, files.map(&file).collect())
            .expect("there is room");
    }
}

/// Both ends in one reactor. Each frame has its own descriptors, and no other.
fn between_two_bowlines() -> Vec<Received> {
    let directory = tempfile::tempdir().expect("a directory");
    let file = |index: usize| {
        let path = directory.path().join(index.to_string());
        std::fs::File::options()
            .append(true)
            .create(true)
            .open(path)
            .expect("the directory is ours")
    };
    let mut reactor = Reactor::new().expect("a reactor");
    let (one, other) = socketpair();
    let keeper = Keeper::default();
    let sender: UnixTransportHandle = reactor
        .adopt_unix_stream(one.into(), Framed::new(framer(), Keeper::default()))
        .expect("a connected socket");
    reactor
        .adopt_unix_stream(
            other.into(),
            Framed::new(framer(), keeper.clone()).pairing(Pairing::Exact),
        )
        .expect("a connected socket");
    send_all(reactor.get(sender).expect("it is there"), |index| {
        file(index).into()
    });
    run_until(&mut reactor, |_| {
        keeper.received.borrow().len() == MESSAGES.len()
    });
    let received = keeper.received.take();
    for ((bytes, kept), (sent_bytes, sent)) in received.iter().zip(files()) {
        assert_eq!(*bytes, sent_bytes);
        let sent: Vec<_> = sent.map(|index| identity(&file(index))).collect();
        assert_eq!(kept.iter().map(identity).collect::<Vec<_>>(), sent);
    }
    assert_eq!(counts(&received), SENT);
    received
}

fn keep(
    peers: &Peers,
    start: impl FnOnce(&Peers, Keeper) -> Pair,
    commands: &str,
) -> Vec<Received> {
    let keeper = Keeper::default();
    let mut pair = start(peers, keeper.clone());
    pair.make_files(DESCRIPTORS);
    pair.tell(commands);
    pair.wait("all messages are there", |_| {
        keeper.received.borrow().len() == MESSAGES.len()
    });
    let received = keeper.received.take();
    let kept: Vec<_> = received.iter().flat_map(|(_, kept)| kept).collect();
    let identities: Vec<_> = kept.into_iter().map(identity).collect();
    assert_eq!(identities, pair.identities(0..DESCRIPTORS));
    received
}

/// A sender that is not ours and does it right: one `sendmsg` a message.
fn from_python(peers: &Peers) -> Vec<Received> {
    let commands: Vec<_> = files()
        .map(|(bytes, files)| {
            let files: Vec<_> = files.map(|index| index.to_string()).collect();
            format!("frame={bytes}={}", files.join(","))
        })
        .collect();
    let start = |peers: &Peers, keeper: Keeper| {
        Pair::with_socket_and_protocol(peers, Direction::PeerConnects, move |_, link| {
            let link = Rc::clone(link);
            let keeper = Keeper {
                link,
                ..keeper.clone()
            };
            Framed::new(framer(), keeper).pairing(Pairing::Exact)
        })
    };
    keep(peers, start, &commands.join(" "))
}

/// Twisted sends: each message as it would, its descriptors and its bytes.
fn from_twisted(peers: &Peers) -> Vec<Received> {
    let commands: Vec<_> = files()
        .flat_map(|(bytes, files)| {
            let descriptors = files.map(|index| format!("fd={index}"));
            descriptors.chain([format!("string={bytes}")])
        })
        .collect();
    let start = |peers: &Peers, keeper: Keeper| {
        Pair::with_protocol(peers, Direction::PeerConnects, "int32", move |_, link| {
            let link = Rc::clone(link);
            let keeper = Keeper {
                link,
                ..keeper.clone()
            };
            Framed::new(framer(), keeper).pairing(Pairing::Exact)
        })
    };
    keep(peers, start, &commands.join(" "))
}

/// Twisted receives what we send exactly, and what has piled up meanwhile.
fn to_twisted(peers: &Peers) -> Vec<usize> {
    let mut pair = Pair::with_twisted(peers, Direction::PeerConnects, "int32");
    pair.make_files(DESCRIPTORS);
    pair.tell("pause report");
    pair.wait("it is paused", |pair| {
        !pair.peer.told("received").is_empty()
    });
    let mut prepared: Vec<_> = (0..DESCRIPTORS)
        .map(|index| Some(pair.file(index)))
        .collect();
    let prepared = RefCell::new(&mut prepared);
    send_all(pair.transport(), |index| {
        let file = prepared.borrow_mut()[index].take();
        file.expect("each is sent once").into()
    });
    pair.wait("all has left", |pair| {
        pair.descriptors_left() == DESCRIPTORS
    });
    pair.tell("resume");
    pair.wait("all messages are there", |pair| {
        pair.peer.told("string").len() == MESSAGES.len()
    });
    assert_eq!(pair.peer.told("fd"), pair.identities(0..DESCRIPTORS));
    let frames = pair.peer.told("string");
    let came_with = frames.iter().filter_map(|frame| frame.rsplit(' ').next());
    came_with.map(number).collect()
}

/// Between two of us every message has its own; Twisted, at either end, gives
/// them to messages that came before.
fn what_twisted_loses(peers: &Peers) {
    let ours = counts(&between_two_bowlines());
    let sent_by_twisted = counts(&from_twisted(peers));
    let received_by_twisted = to_twisted(peers);

    println!("\n  descriptors that arrive with each message");
    println!("  message  bytes  sent | us to us  Twisted to us  us to Twisted");
    for (index, (bytes, sent)) in MESSAGES.into_iter().enumerate() {
        println!(
            "  {index:7}  {bytes:5}  {sent:4} | {:8}  {:13}  {:13}",
            ours[index], sent_by_twisted[index], received_by_twisted[index]
        );
    }
    assert_eq!(ours, SENT, "exact between us");
    for (how, arrived) in [
        ("sent", &sent_by_twisted),
        ("received", &received_by_twisted),
    ] {
        assert_ne!(arrived[..], SENT, "{how} by Twisted");
        assert_eq!(arrived.iter().sum::<usize>(), DESCRIPTORS, "none is lost");
        // Early, never late.
        for messages in 1..=MESSAGES.len() {
            let arrived: usize = arrived[..messages].iter().sum();
            let sent: usize = SENT[..messages].iter().sum();
            assert!(arrived >= sent, "{how} by Twisted, by message {messages}");
        }
    }
    assert_eq!(sent_by_twisted[0], DESCRIPTORS, "all with the first bytes");
}
