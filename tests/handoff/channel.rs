//! The channel over socketpairs: its handshake, its deadlines, and messages
//! with exactly their descriptors.

use std::cell::RefCell;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::rc::Rc;
use std::time::Duration;

use bowline::handoff::channel::{Channel, ChannelError, ChannelReceiver, ChannelSettings};
use bowline::handoff::channel::{Peer, Role, Users};
use bowline::handoff::wire::{self, Incoming, Message, PayloadReader, PayloadWriter, WireError};
use bowline::process::effective_user;
use bowline::testing::{ManualClock, Pump, SimulatedKernel};
use bowline::{CloseReason, Context, PassedDescriptor, Reactor, Transports, UnixTransport};
use bowline::{UnixStream, UnixTransportHandle};
use rustix::fs::MemfdFlags;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::support::{
    DescriptorLedger, in_short, open_descriptors, row, run_until, run_until_quiet, socketpair,
};

const LEFT: Role = Role(0x8000);
const RIGHT: Role = Role(0x8001);

/// A number, and filling.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Note {
    number: u32,
    filling: Vec<u8>,
}

impl Message for Note {
    fn kind(&self) -> u16 {
        0x8000
    }

    fn encode(&self, payload: &mut PayloadWriter<'_>) {
        payload.u32(self.number);
        payload.bytes(&self.filling);
    }

    fn decode(kind: u16, _: u16, payload: &mut PayloadReader<'_>) -> Result<Self, WireError> {
        if kind != 0x8000 {
            return Err(WireError::UnknownKind { kind });
        }
        Ok(Self {
            number: payload.u32()?,
            filling: payload.bytes()?.to_vec(),
        })
    }
}

/// A note of this number, in a frame, without filling.
fn frame(number: u32) -> Vec<u8> {
    frame_with(number, 0)
}

/// The same, with so many descriptors.
fn frame_with(number: u32, descriptors: usize) -> Vec<u8> {
    let filling = Vec::new();
    let mut bytes = Vec::new();
    wire::encode_frame(&Note { number, filling }, descriptors, &mut bytes).expect("short");
    bytes
}

/// What one end was told.
#[derive(Default)]
struct Told {
    peer: Option<Peer>,
    /// Number, length of the filling, identities of the descriptors, lost.
    notes: Vec<(u32, usize, Vec<u64>, usize)>,
    handle: Option<UnixTransportHandle>,
    /// How many descriptors have left.
    sent: usize,
    /// Whether to pause after each message.
    pauses: bool,
    lost: Option<(Option<String>, String)>,
}

#[derive(Clone, Default)]
struct End(Rc<RefCell<Told>>);

impl<T: UnixTransport> ChannelReceiver<T> for End {
    type Message = Note;

    fn channel_made(&mut self, _: &mut Context<'_, T>, peer: &Peer) {
        self.0.borrow_mut().peer = Some(peer.clone());
    }

    fn message_received(&mut self, cx: &mut Context<'_, T>, incoming: Incoming<Note>) {
        let Incoming {
            message,
            descriptors,
            lost,
        } = incoming;
        let identities = descriptors.iter().map(identity).collect();
        let length = message.filling.len();
        let note = (message.number, length, identities, lost);
        let mut told = self.0.borrow_mut();
        told.notes.push(note);
        told.handle = Some(cx.transport.unix_handle());
        if told.pauses {
            cx.transport.pause_producing();
        }
    }

    fn descriptors_sent(&mut self, _: &mut Context<'_, T>, count: usize) {
        self.0.borrow_mut().sent += count;
    }

    fn channel_lost(
        &mut self,
        _: &mut Context<'_, T>,
        error: Option<&ChannelError>,
        reason: &CloseReason,
    ) {
        let error = error.map(|error| error.to_string());
        self.0.borrow_mut().lost = Some((error, reason.to_string()));
    }
}

impl End {
    /// What the channel found wrong; fails if it has not ended.
    #[track_caller]
    fn error(&self) -> Option<String> {
        let told = self.0.borrow();
        told.lost.as_ref().expect("it has ended").0.clone()
    }

    fn is_lost(&self) -> bool {
        self.0.borrow().lost.is_some()
    }
}

fn descriptor() -> OwnedFd {
    rustix::fs::memfd_create("one of many", MemfdFlags::CLOEXEC).expect("a memfd")
}

fn identity(fd: impl AsFd) -> u64 {
    rustix::fs::fstat(fd).expect("it is open").st_ino
}

fn settings(role: Role, peer_role: Role) -> ChannelSettings {
    ChannelSettings::new(role, peer_role)
}

/// Two ends in one reactor, with these settings.
fn joined(
    reactor: &mut Reactor,
    left: ChannelSettings,
    right: ChannelSettings,
) -> [(End, UnixTransportHandle); 2] {
    let (ours, theirs) = socketpair();
    [(ours, left), (theirs, right)].map(|(socket, settings)| {
        let end = End::default();
        let channel = Channel::new(settings, end.clone());
        let handle = reactor.adopt_unix_stream(socket.into(), channel);
        (end, handle.expect("adopted"))
    })
}

/// Two ends that have agreed.
fn agreed() -> (Reactor, [(End, UnixTransportHandle); 2]) {
    let mut reactor = Reactor::new().expect("a reactor");
    let ends = joined(&mut reactor, settings(LEFT, RIGHT), settings(RIGHT, LEFT));
    let has_peer = |(end, _): &(End, _)| end.0.borrow().peer.is_some();
    run_until(&mut reactor, |_| ends.iter().all(has_peer));
    (reactor, ends)
}

/// One end in a reactor, and the bare socket of the other.
fn half(reactor: &mut Reactor, settings: ChannelSettings) -> (End, StdUnixStream) {
    let (ours, theirs) = socketpair();
    let end = End::default();
    let channel = Channel::new(settings, end.clone());
    reactor
        .adopt_unix_stream(ours.into(), channel)
        .expect("adopted");
    (end, theirs)
}

/// The hello that an end with these settings says.
fn hello_of(settings: ChannelSettings) -> Vec<u8> {
    let mut reactor = Reactor::new().expect("a reactor");
    let (_, mut peer) = half(&mut reactor, settings);
    let mut hello = Vec::new();
    run_until(&mut reactor, |_| {
        let mut part = [0; 100];
        if let Ok(count) = peer.read(&mut part) {
            hello.extend_from_slice(&part[..count]);
        }
        !hello.is_empty()
    });
    hello
}

#[test]
fn two_ends_agree_and_exchange_messages_with_exactly_their_descriptors() {
    let ledger = DescriptorLedger::open();
    let (mut reactor, [(left, handle), (right, _)]) = agreed();
    let peer = right.0.borrow().peer.clone().unwrap();
    assert_eq!((peer.version, peer.pid), (1, std::process::id()));
    assert_eq!(peer.credentials.map(|who| who.uid), Some(effective_user()));

    let mut wanted = Vec::new();
    for number in 0..200 {
        // Some bigger than what the kernel takes at once.
        let length = if number % 40 == 7 {
            300_000
        } else {
            number as usize
        };
        let descriptors: Vec<_> = (0..number % 4).map(|_| descriptor()).collect();
        let identities: Vec<_> = descriptors.iter().map(identity).collect();
        let note = Note {
            number,
            filling: vec![0; length],
        };
        let descriptors = descriptors.into_iter().map(Into::into).collect();
        let transport = reactor.get(handle).unwrap();
        wire::send(transport, &note, descriptors).unwrap();
        wanted.push((number, length, identities, 0));
    }
    run_until(&mut reactor, |_| {
        right.0.borrow().notes.len() >= wanted.len()
    });
    assert_eq!(right.0.borrow().notes, wanted);
    assert!(left.0.borrow().peer.is_some());
    let sent: usize = wanted.iter().map(|(_, _, all, _)| all.len()).sum();
    assert_eq!(left.0.borrow().sent, sent);
    assert_eq!(reactor.descriptor_counts().unclaimed, 0);
    drop(reactor);
    ledger.assert_balanced();
}

#[test]
fn frames_glued_together_cost_one_read() {
    let _ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let (end, mut peer) = half(&mut reactor, settings(LEFT, RIGHT));
    let mut bytes = hello_of(settings(RIGHT, LEFT));
    bytes.extend((0..100).flat_map(frame));
    peer.write_all(&bytes).unwrap();
    // The registration, and the one event for all that was written.
    reactor.turn(Some(Duration::from_secs(5)));
    assert_eq!(end.0.borrow().notes.len(), 100);
}

#[test]
fn ends_that_do_not_agree_part_and_both_know_why() {
    let _ledger = DescriptorLedger::open();
    let mut newer = settings(RIGHT, LEFT);
    newer.versions = 2..=3;
    let mut foreign = settings(RIGHT, LEFT);
    foreign.users = Users::OneOf(vec![effective_user() + 1]);
    let foreigner = format!("peer belongs to user {}", effective_user());
    for (right, errors) in [
        (
            newer,
            [
                Some("no version in common: 1 to 1 here, 2 to 3 there".to_owned()),
                Some("no version in common: 2 to 3 here, 1 to 1 there".to_owned()),
            ],
        ),
        (
            settings(LEFT, LEFT),
            [Some("peer has the unexpected role 32768".to_owned()), None],
        ),
        (foreign, [None, Some(foreigner)]),
    ] {
        let _row = row(&errors);
        let mut reactor = Reactor::new().unwrap();
        let ends = joined(&mut reactor, settings(LEFT, RIGHT), right);
        run_until(&mut reactor, |_| ends.iter().all(|(end, _)| end.is_lost()));
        // Whoever is told first has ended before it could read the other's.
        for ((end, _), wanted) in ends.iter().zip(errors) {
            let error = end.error();
            assert!(
                error == wanted || error.is_none(),
                "{error:?}, not {wanted:?}"
            );
        }
        assert!(ends.iter().any(|(end, _)| end.error().is_some()));
    }
}

#[test]
fn peer_that_the_kernel_does_not_know_is_let_in_only_where_anyone_is() {
    let _ledger = DescriptorLedger::open();
    for (users, error) in [
        (Users::Any, None),
        (Users::Same, Some("cannot tell whose the peer is")),
        (
            Users::OneOf(vec![effective_user()]),
            Some("cannot tell whose the peer is"),
        ),
    ] {
        let _row = row(&users);
        let ends = [(LEFT, RIGHT), (RIGHT, LEFT)].map(|(role, peer_role)| {
            let mut settings = settings(role, peer_role);
            settings.users = users.clone();
            let end = End::default();
            (end.clone(), Channel::new(settings, end))
        });
        let [(left, first), (right, second)] = ends;
        let kernel = SimulatedKernel::new();
        kernel.set_peer_credentials(None);
        let mut pump = Pump::with_kernel(kernel).unwrap();
        pump.join(first, second).unwrap();
        pump.run();
        match error {
            None => {
                for end in [&left, &right] {
                    let peer = end.0.borrow().peer.clone().expect("they agree");
                    assert_eq!(peer.credentials, None);
                }
            }
            Some(error) => {
                assert_eq!(left.error().map(in_short).as_deref(), Some(error));
                assert!(left.0.borrow().peer.is_none() && right.0.borrow().peer.is_none());
            }
        }
    }
}

#[test]
fn silence_and_half_frames_end_at_their_deadline() {
    let _ledger = DescriptorLedger::open();
    let mut impatient = settings(LEFT, RIGHT);
    impatient.handshake_timeout = Duration::from_millis(20);
    impatient.frame_timeout = Duration::from_millis(20);
    let hello = hello_of(settings(RIGHT, LEFT));
    for (said, error) in [
        (&hello[..0], "no hello in time"),
        (&hello[..5], "no hello in time"),
        (
            &[&hello[..], &[0, 0, 0, 9, 0x80]].concat(),
            "frame did not become whole in time",
        ),
    ] {
        let _row = row(said);
        let mut reactor = Reactor::new().unwrap();
        let (end, mut peer) = half(&mut reactor, impatient.clone());
        peer.write_all(said).unwrap();
        run_until(&mut reactor, |_| end.is_lost());
        assert_eq!(end.error().as_deref(), Some(error), "{said:?}");
    }
}

/// Each frame has its time, however many there are: a peer that always is in the middle
/// of the next when we have read what there is, is as good as any.
#[test]
fn frames_that_never_pause_do_not_share_a_deadline() {
    let _ledger = DescriptorLedger::open();
    let mut settings = settings(LEFT, RIGHT);
    settings.users = Users::Any;
    let end = End::default();
    let (mut pump, peer) = Pump::with_peer(Channel::new(settings, end.clone())).unwrap();
    let mut bytes = hello_of(ChannelSettings::new(RIGHT, LEFT));
    let second = Duration::from_secs(1);
    for number in 0..25 {
        let note = Note {
            number,
            filling: vec![7; 100],
        };
        let mut frame = Vec::new();
        wire::encode_frame(&note, 0, &mut frame).expect("short");
        // The rest of the one before, and half of this one.
        bytes.extend_from_slice(&frame[..50]);
        assert_eq!(peer.send(&bytes).expect("room"), bytes.len());
        bytes = frame[50..].to_vec();
        pump.advance(second);
        assert!(!end.is_lost(), "{number}: {:?}", end.error());
    }
    assert_eq!(end.0.borrow().notes.len(), 24);
    // The last began nine seconds before, and then ten.
    pump.advance(second * 8);
    assert!(!end.is_lost());
    pump.advance(second);
    let error = Some("frame did not become whole in time");
    assert_eq!(end.error().as_deref(), error);
}

/// Not where nothing has begun, and not while nobody reads.
#[test]
fn frame_has_its_time_only_while_it_is_awaited() {
    let ledger = DescriptorLedger::open();
    let hello = hello_of(settings(RIGHT, LEFT));
    let clock = ManualClock::new();
    let mut reactor = Reactor::with_clock(clock.clone()).unwrap();
    let (end, mut peer) = half(&mut reactor, settings(LEFT, RIGHT));
    let received = || end.0.borrow().notes.len();
    let pass = |reactor: &mut Reactor, seconds| {
        clock.advance(Duration::from_secs(seconds));
        run_until_quiet(reactor);
    };
    let resume = |reactor: &mut Reactor| {
        let handle = end.0.borrow().handle.unwrap();
        reactor.get(handle).unwrap().resume_producing();
        run_until_quiet(reactor);
    };
    peer.write_all(&[hello, frame(0)].concat()).unwrap();
    run_until(&mut reactor, |_| received() == 1);
    pass(&mut reactor, 3600);
    assert!(!end.is_lost(), "idle");

    end.0.borrow_mut().pauses = true;
    let (begun, rest) = (&frame(2)[..9], &frame(2)[9..]);
    peer.write_all(&[&frame(1), begun].concat()).unwrap();
    run_until(&mut reactor, |_| received() == 2);
    pass(&mut reactor, 3600);
    assert!(!end.is_lost(), "paused");
    resume(&mut reactor);
    pass(&mut reactor, 9);
    assert!(!end.is_lost(), "its time begins when reading goes on");
    peer.write_all(rest).unwrap();
    run_until(&mut reactor, |_| received() == 3);
    resume(&mut reactor);

    peer.write_all(begun).unwrap();
    run_until_quiet(&mut reactor);
    pass(&mut reactor, 9);
    assert!(!end.is_lost(), "it has another second");
    // Byte by byte it gets no more.
    peer.write_all(&rest[..1]).unwrap();
    run_until_quiet(&mut reactor);
    pass(&mut reactor, 1);
    run_until(&mut reactor, |_| end.is_lost());
    let error = end.error();
    assert_eq!(error.as_deref(), Some("frame did not become whole in time"));
    drop((reactor, peer));
    ledger.assert_balanced();
}

#[test]
fn frame_has_no_more_time_where_its_channel_was_taken_apart() {
    let ledger = DescriptorLedger::open();
    let bytes = [hello_of(settings(RIGHT, LEFT)), frame(0), frame(1)].concat();
    let clock = ManualClock::new();
    let mut reactor = Reactor::with_clock(clock.clone()).unwrap();
    let (end, mut peer) = half(&mut reactor, settings(LEFT, RIGHT));
    peer.write_all(&bytes[..bytes.len() - 1]).unwrap();
    run_until(&mut reactor, |_| end.0.borrow().notes.len() == 1);
    let handle = end.0.borrow().handle.unwrap();
    let handle = reactor.get(handle).unwrap().handle();
    reactor.detach::<Channel<End>>(handle, |reactor, detached| {
        let again = reactor.reattach::<UnixStream, _>(detached.expect("connected"));
        again.expect("it was one");
    });
    run_until_quiet(&mut reactor);
    assert!(reactor.get(handle).is_none() && !end.is_lost());
    clock.advance(Duration::from_secs(10));
    run_until(&mut reactor, |_| end.is_lost());
    let error = end.error();
    assert_eq!(error.as_deref(), Some("frame did not become whole in time"));
    drop((reactor, peer));
    ledger.assert_balanced();
}

#[test]
fn what_breaks_the_rules_ends_the_channel() {
    let _ledger = DescriptorLedger::open();
    let hello = hello_of(settings(RIGHT, LEFT));
    let note = |kind_byte: u8, extra: &[u8]| {
        let mut bytes = hello.clone();
        bytes.extend_from_slice(&[0, 0, 0, 8 + extra.len() as u8, kind_byte, 0, 1, 0]);
        bytes.extend_from_slice(&[0, 0, 0, 1, 0, 0, 0, 0]);
        bytes.extend_from_slice(extra);
        bytes
    };
    for (said, error) in [
        (note(0x80, b""), None),
        (note(0x81, b""), Some("peer broke the framing")),
        (note(0x80, b"x"), Some("peer broke the framing")),
        (
            note(0x80, b"")[hello.len()..].to_vec(),
            Some("peer did not begin with a hello"),
        ),
        (
            note(0x80, b"")[..hello.len() + 9].to_vec(),
            Some("connection ended inside of a frame"),
        ),
        (
            b"GET / HTTP/1.1\r\n\r\n".to_vec(),
            Some("peer broke the framing"),
        ),
    ] {
        let _row = row(&said);
        let mut reactor = Reactor::new().unwrap();
        let (end, mut peer) = half(&mut reactor, settings(LEFT, RIGHT));
        peer.write_all(&said).unwrap();
        drop(peer);
        run_until(&mut reactor, |_| end.is_lost());
        assert_eq!(end.error().map(in_short).as_deref(), error, "{said:?}");
    }
}

#[test]
fn descriptors_of_a_frame_that_never_ends_are_unclaimed() {
    let ledger = DescriptorLedger::open();
    let (mut reactor, [(_, handle), (right, _)]) = agreed();
    let bytes = frame_with(1, 2);
    let transport = reactor.get(handle).unwrap();
    let descriptors = vec![descriptor().into(), descriptor().into()];
    transport
        .write_with_descriptors(&bytes[..9], descriptors)
        .unwrap();
    transport.lose_connection();
    run_until(&mut reactor, |_| right.is_lost());
    let error = right.error();
    assert_eq!(error.as_deref(), Some("connection ended inside of a frame"));
    assert_eq!(reactor.descriptor_counts().unclaimed, 2);
    drop(reactor);
    ledger.assert_balanced();
}

#[test]
fn a_paused_channel_keeps_messages_for_later() {
    let _ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let (end, mut peer) = half(&mut reactor, settings(LEFT, RIGHT));
    end.0.borrow_mut().pauses = true;
    let mut bytes = hello_of(settings(RIGHT, LEFT));
    bytes.extend((0..3).flat_map(frame));
    peer.write_all(&bytes).unwrap();
    for delivered in 1..=3 {
        run_until(&mut reactor, |_| end.0.borrow().notes.len() >= delivered);
        run_until_quiet(&mut reactor);
        assert_eq!(end.0.borrow().notes.len(), delivered);
        let handle = end.0.borrow().handle.unwrap();
        reactor.get(handle).unwrap().resume_producing();
    }
}

#[test]
fn descriptors_that_find_no_number_cost_their_own_message_only() {
    let _ledger = DescriptorLedger::alone();
    let (mut reactor, [(_, handle), (right, _)]) = agreed();
    // Shared, so that sending frees no number.
    let sent: Vec<_> = (0..3).map(|_| Rc::new(descriptor())).collect();
    let last = identity(&*sent[2]);
    let mut copies = sent.iter().map(PassedDescriptor::shared);
    let mut send = |reactor: &mut Reactor, number, count| {
        let filling = Vec::new();
        let descriptors = copies.by_ref().take(count).collect();
        let transport = reactor.get(handle).unwrap();
        wire::send(transport, &Note { number, filling }, descriptors).unwrap();
    };
    send(&mut reactor, 1, 0);
    send(&mut reactor, 2, 2);
    let highest = *open_descriptors().last().unwrap();
    without_free_numbers(highest, || {
        run_until(&mut reactor, |_| right.0.borrow().notes.len() == 2);
    });
    send(&mut reactor, 3, 1);
    run_until(&mut reactor, |_| right.0.borrow().notes.len() == 3);
    assert_eq!(
        right.0.borrow().notes,
        [(1, 0, vec![], 0), (2, 0, vec![], 2), (3, 0, vec![last], 0)]
    );
}

/// Runs `body` while this process can open no further descriptor: for tests that have it
/// [alone](DescriptorLedger::alone).
fn without_free_numbers(highest: i32, body: impl FnOnce()) {
    // Numbers below the highest may be free, and are taken first.
    let mut fillers = Vec::new();
    loop {
        let filler = descriptor();
        let number = filler.as_fd().as_raw_fd();
        if number > highest {
            break;
        }
        fillers.push(filler);
    }
    let before = getrlimit(Resource::Nofile);
    let lowered = Rlimit {
        current: Some(highest as u64 + 1),
        maximum: before.maximum,
    };
    setrlimit(Resource::Nofile, lowered).expect("lowering is allowed");
    body();
    setrlimit(Resource::Nofile, before).expect("as it was");
}
