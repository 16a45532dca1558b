//! The tests that every framing has to pass that ties descriptors to messages, over a real
//! socket with a peer that calls sendmsg(2) by itself: each message cut at every byte; all
//! descriptors early; late; in two sets; one too few, one too many; a limit, and one more;
//! a stray on a plain message; descriptors in the phase of lines; the last words of a peer
//! that is gone.
//!
//! A framing is a [`Sample`], and [`suite!`] makes the tests of it. Where messages are
//! datagrams, or there is only one, some of the [questions](Question) have no meaning: the
//! sample says which and why ([`Sample::unasked`]), and the table of all of them shows it.

use std::cell::{Cell, RefCell};
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;

use bowline::{Reactor, UnixTransport, UnixTransportHandle};
use rustix::fs::MemfdFlags;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, Shutdown};

use crate::support::{DescriptorLedger, row, settle, socketpair};

/// A framing under test: how to serve it, what a peer sends, and what has to come of it.
pub(crate) trait Sample {
    /// The rule by which it pairs. The outcomes follow from it, but for what
    /// [`outcome`](Self::outcome) says otherwise.
    fn rule(&self) -> Rule;

    /// Serves a peer with the protocol under test, which tells `heard` of each message and
    /// of the end of its framing.
    fn serve(&self, reactor: &mut Reactor, heard: &Heard) -> Served;

    /// What a peer sends, each whole, in an order that the protocol allows: at least a plain
    /// one first, then one with a descriptor, one with several where there are such, and one
    /// with a descriptor last.
    fn messages(&self) -> Vec<Message>;

    /// What comes before the messages, in pieces that a peer sends one after the other: a
    /// handshake. `heard` is told nothing of it.
    fn prelude(&self) -> Vec<Vec<u8>> {
        Vec::new()
    }

    /// A descriptor of the kind that messages carry. Each has to be another file
    /// ([`identity`]), so that a mistaken one is noticed.
    fn descriptor(&self) -> OwnedFd {
        rustix::fs::memfd_create("passed", MemfdFlags::CLOEXEC).expect("a number is free")
    }

    /// What comes of what is done to a peer's messages.
    fn outcome(&self, trial: Trial) -> Outcome {
        self.rule().outcome(trial)
    }

    /// The limits of its messages: of descriptors, of bytes, of whatever else.
    fn limits(&self) -> Vec<Limit> {
        Vec::new()
    }

    /// What is not asked, each with the reason. The rest has to be.
    fn unasked(&self) -> Vec<(Question, &'static str)> {
        match self.prelude().is_empty() {
            true => vec![(Question::Lines, "no lines")],
            false => Vec::new(),
        }
    }
}

/// A peer that is served.
pub(crate) struct Served {
    /// What it sends on, until it has gone.
    pub(crate) peer: Option<OwnedFd>,
    pub(crate) end: End,
    /// Where the socket is, if it is in a folder.
    pub(crate) folder: Option<tempfile::TempDir>,
}

/// How the end of what serves a peer is known.
pub(crate) enum End {
    Connection(UnixTransportHandle),
    /// It is made by a listener, and has ended when this says so.
    Told(Rc<Cell<bool>>),
    /// Nothing that a peer does ends it.
    Never,
}

impl Served {
    /// By one end of a pair.
    pub(crate) fn by(adopt: impl FnOnce(OwnedFd) -> UnixTransportHandle) -> Self {
        let (ours, peer) = socketpair();
        Self {
            peer: Some(peer.into()),
            end: End::Connection(adopt(ours.into())),
            folder: None,
        }
    }
}

/// What is asked of every framing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Question {
    Cut,
    Early,
    Late,
    TwoSets,
    TooFew,
    TooMany,
    Limit,
    Stray,
    Lines,
    LastWords,
}

impl Question {
    pub(crate) const ALL: [Self; 10] = [
        Self::Cut,
        Self::Early,
        Self::Late,
        Self::TwoSets,
        Self::TooFew,
        Self::TooMany,
        Self::Stray,
        Self::Limit,
        Self::Lines,
        Self::LastWords,
    ];

    /// The test that asks it.
    pub(crate) fn test(self) -> &'static str {
        match self {
            Self::Cut => "message_cut_at_any_byte_has_its_descriptors",
            Self::Early => "descriptors_of_all_messages_come_early",
            Self::Late => "descriptors_come_late",
            Self::TwoSets => "descriptors_come_in_two_sets",
            Self::TooFew => "one_descriptor_too_few",
            Self::TooMany => "one_descriptor_too_many",
            Self::Limit => "message_of_a_limit_comes_and_one_beyond_is_refused",
            Self::Stray => "stray_descriptor_on_a_plain_message",
            Self::Lines => "descriptor_in_the_line_phase_is_refused",
            Self::LastWords => "last_words_of_a_peer_that_is_gone_are_heard",
        }
    }
}

/// How a framing pairs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rule {
    /// A message says how many it has; what is left over breaks the framing.
    Claimed,
    /// As that, and what is left over waits.
    ClaimedOrWaits,
    /// What was sent with its own bytes.
    Exact,
    /// What came with the read that ends in it.
    ByLastByte,
    /// What came with its datagram.
    Datagram,
    /// What came with the first read, which is the only message.
    FirstRead,
}

/// What is done to the messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Trial {
    /// They come with the first part of their message, which is cut.
    Cut,
    /// All descriptors of all messages on the first byte of one call.
    Lumped,
    /// They come with a later part of their message.
    Late,
    /// Half of them come with each half of their message; of messages with several. A
    /// datagram, which has no halves, has two control messages.
    TwoSets,
    /// A message of one has it with its first half, and another with its second.
    SecondSet,
    TooFew,
    TooMany,
    /// The message is beyond a limit.
    Beyond,
    /// One comes with a message that has none.
    Stray,
}

/// What has to come of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Each message comes with exactly its own.
    Paired,
    /// The message comes with so many more than it should have, or fewer; what follows has
    /// its own.
    Differs(isize),
    /// All come, the first with so many, the second, and so on.
    Dealt(Vec<usize>),
    /// The message comes with its own, and the next has the one that is left over in front.
    Shifted,
    /// The message is not delivered, what follows has its own.
    Dropped,
    /// The message is not delivered, nor what follows; the connection has ended.
    Refused,
    /// The message is delivered with its own, and nothing that follows; the connection has
    /// ended.
    RefusedBehind,
}

impl Rule {
    pub(crate) fn outcome(self, trial: Trial) -> Outcome {
        use Outcome::{Differs, Dropped, Paired, Refused, RefusedBehind, Shifted};
        match (self, trial) {
            (Self::FirstRead, Trial::Cut | Trial::TwoSets | Trial::SecondSet) => RefusedBehind,
            (Self::FirstRead, _) => Refused,
            (Self::Datagram, Trial::Beyond) => Dropped,
            (_, Trial::Beyond) => Refused,
            (_, Trial::Cut | Trial::Late | Trial::TwoSets) => Paired,
            (Self::Claimed | Self::ClaimedOrWaits, Trial::Lumped) => Paired,
            (Self::Claimed | Self::ClaimedOrWaits, Trial::TooFew) => Refused,
            (Self::Claimed, Trial::SecondSet | Trial::TooMany | Trial::Stray) => RefusedBehind,
            (Self::ClaimedOrWaits, _) => Shifted,
            (Self::Exact | Self::ByLastByte | Self::Datagram, Trial::TooFew) => Differs(-1),
            (Self::Exact | Self::ByLastByte | Self::Datagram, Trial::Lumped) => {
                panic!("it is for the sample to say: `Outcome::Dealt`")
            }
            (Self::Exact | Self::ByLastByte | Self::Datagram, _) => Differs(1),
        }
    }
}

/// A message as it is on the wire.
#[derive(Clone, Debug)]
pub(crate) struct Message {
    pub(crate) bytes: Vec<u8>,
    pub(crate) descriptors: usize,
    /// How [`Heard`] is told of it.
    pub(crate) heard: String,
}

impl Message {
    pub(crate) fn new(
        bytes: impl Into<Vec<u8>>,
        descriptors: usize,
        heard: impl Into<String>,
    ) -> Self {
        Self {
            bytes: bytes.into(),
            descriptors,
            heard: heard.into(),
        }
    }
}

/// A limit: a message that is within, and one that is beyond by one.
#[derive(Clone, Debug)]
pub(crate) struct Limit {
    pub(crate) of: &'static str,
    pub(crate) within: Message,
    pub(crate) beyond: Message,
}

/// What a protocol under test was told.
#[derive(Clone, Default)]
pub(crate) struct Heard(Rc<RefCell<Vec<Arrived>>>);

/// A message in words, and its descriptors.
type Arrived = (String, Vec<OwnedFd>);

impl Heard {
    /// A message, and the descriptors that it has.
    pub(crate) fn message(
        &self,
        message: impl Into<String>,
        descriptors: impl IntoIterator<Item = OwnedFd>,
    ) {
        let descriptors = descriptors.into_iter().collect();
        self.0.borrow_mut().push((message.into(), descriptors));
    }

    /// The messages that were heard, without their descriptors.
    pub(crate) fn texts(&self) -> Vec<String> {
        self.take().into_iter().map(|(text, _)| text).collect()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.borrow().is_empty()
    }

    /// The messages that were heard, and what descriptors they had.
    pub(crate) fn take(&self) -> Vec<(String, Vec<Identity>)> {
        let heard = self.0.take();
        heard
            .into_iter()
            .map(|(text, fds)| (text, fds.iter().map(identity).collect()))
            .collect()
    }
}

/// What a descriptor refers to: device and inode.
pub(crate) type Identity = (u64, u64);

#[track_caller]
pub(crate) fn identity(fd: impl AsFd) -> Identity {
    let status = rustix::fs::fstat(fd).expect("it is open");
    (status.st_dev, status.st_ino)
}

/// Sends once, all of it.
#[track_caller]
pub(crate) fn send(peer: impl AsFd, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) {
    send_sets(peer, bytes, &[descriptors]);
}

/// As [`send`], with each set of descriptors in a control message of its own.
#[track_caller]
pub(crate) fn send_sets(peer: impl AsFd, bytes: &[u8], sets: &[&[BorrowedFd<'_>]]) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253), ScmRights(253))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    for descriptors in sets.iter().filter(|set| !set.is_empty()) {
        assert!(control.push(SendAncillaryMessage::ScmRights(descriptors)));
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    let sent = rustix::net::sendmsg(peer, &[IoSlice::new(bytes)], &mut control, flags);
    assert_eq!(sent, Ok(bytes.len()), "room");
}

/// A connection that a sample serves, and its peer.
struct Trialled<'a> {
    sample: &'a dyn Sample,
    reactor: &'a mut Reactor,
    served: Served,
    heard: Heard,
    /// All that should have been heard by now.
    expected: Vec<(String, Vec<Identity>)>,
}

impl<'a> Trialled<'a> {
    /// With the handshake behind it.
    fn new(sample: &'a dyn Sample, reactor: &'a mut Reactor) -> Self {
        let mut trialled = Self::begin(sample, reactor);
        for piece in sample.prelude() {
            trialled.send(&piece, &[]);
        }
        trialled
    }

    fn begin(sample: &'a dyn Sample, reactor: &'a mut Reactor) -> Self {
        let heard = Heard::default();
        let served = sample.serve(reactor, &heard);
        if let End::Connection(_) = served.end {
            settle(reactor);
        }
        Self {
            sample,
            reactor,
            served,
            heard,
            expected: Vec::new(),
        }
    }

    /// Sends once, lets it arrive, and reads what is answered. A peer whose connection was
    /// ended cannot send: what it would have is not heard either.
    fn send(&mut self, bytes: &[u8], descriptors: &[OwnedFd]) {
        self.send_sets(bytes, &[descriptors]);
    }

    /// As [`send`](Self::send), each set in a control message of its own.
    fn send_sets(&mut self, bytes: &[u8], sets: &[&[OwnedFd]]) {
        if self.is_over() {
            return;
        }
        self.send_unheard(bytes, sets);
        self.settle();
    }

    fn send_unheard(&self, bytes: &[u8], sets: &[&[OwnedFd]]) {
        let sets: Vec<Vec<_>> = sets
            .iter()
            .map(|set| set.iter().map(AsFd::as_fd).collect())
            .collect();
        let sets: Vec<&[_]> = sets.iter().map(Vec::as_slice).collect();
        let peer = self.served.peer.as_ref().expect("it is there");
        send_sets(peer, bytes, &sets);
    }

    fn settle(&mut self) {
        let mut answers = [0; 65_536];
        settle(self.reactor);
        let Some(peer) = &self.served.peer else {
            return;
        };
        let flags = RecvFlags::DONTWAIT;
        while let Ok((1.., _)) = rustix::net::recv(peer, &mut answers, flags) {
            settle(self.reactor);
        }
    }

    fn descriptors(&self, count: usize) -> Vec<OwnedFd> {
        (0..count).map(|_| self.sample.descriptor()).collect()
    }

    fn expect(&mut self, message: &Message, descriptors: &[OwnedFd]) {
        let identities = descriptors.iter().map(identity).collect();
        self.expected.push((message.heard.clone(), identities));
    }

    /// Sends a message as it should be.
    fn send_well(&mut self, message: &Message) {
        let descriptors = self.descriptors(message.descriptors);
        self.send(&message.bytes, &descriptors);
        self.expect(message, &descriptors);
    }

    fn is_over(&mut self) -> bool {
        match &self.served.end {
            End::Connection(handle) => self.reactor.get(*handle).is_none(),
            End::Told(is_over) => is_over.get(),
            End::Never => false,
        }
    }

    /// Our end, if it is in reach.
    fn transport(&mut self) -> Option<&mut dyn UnixTransport> {
        match self.served.end {
            End::Connection(handle) => Some(self.reactor.get(handle).expect("it is there")),
            End::Told(_) | End::Never => None,
        }
    }

    /// That all that was expected was heard, and nothing else.
    #[track_caller]
    fn assert_heard(&self) {
        let heard = self.heard.take();
        for (number, expected) in self.expected.iter().enumerate() {
            let came = heard.get(number);
            assert_eq!(came, Some(expected), "message {number} of {heard:?}");
        }
        let more = &heard[self.expected.len()..];
        assert!(more.is_empty(), "heard too much: {more:?}");
    }

    /// That all is as `outcome` says once `message` was sent, with `descriptors`, and is
    /// followed by good ones.
    #[track_caller]
    fn assert_comes_out(mut self, outcome: &Outcome, message: &Message, descriptors: &[OwnedFd]) {
        let messages = self.sample.messages();
        let good = messages.last().expect("there are some");
        let right = descriptors.get(..message.descriptors);
        match outcome {
            Outcome::Paired => {
                self.expect(message, right.expect("it has all"));
                self.send_well(good);
            }
            Outcome::Differs(by) => {
                let count = message.descriptors.strict_add_signed(*by);
                self.expect(message, &descriptors[..count]);
                self.send_well(good);
            }
            Outcome::Shifted => {
                let (own, others) = descriptors.split_at(message.descriptors);
                self.expect(message, own);
                assert_eq!(others.len(), 1);
                let its = self.descriptors(good.descriptors);
                self.send(&good.bytes, &its);
                let mut shifted = vec![identity(&others[0])];
                shifted.extend(its.iter().map(identity));
                shifted.truncate(good.descriptors);
                self.expected.push((good.heard.clone(), shifted));
            }
            Outcome::Dropped => self.send_well(good),
            Outcome::Refused | Outcome::RefusedBehind => {
                if *outcome == Outcome::RefusedBehind {
                    self.expect(message, right.expect("it has all"));
                }
                let its = self.descriptors(good.descriptors);
                self.send(&good.bytes, &its);
                assert!(self.is_over(), "it was not refused: {message:?}");
            }
            Outcome::Dealt(_) => panic!("of all messages, not of one"),
        }
        self.assert_heard();
        self.end();
    }

    /// The peer goes, and so does our end.
    #[track_caller]
    fn end(mut self) {
        self.hang_up();
        self.settle();
        self.assert_over();
    }

    fn hang_up(&mut self) {
        if let End::Never = self.served.end {
            self.served.peer = None;
        } else if let Some(peer) = &self.served.peer {
            rustix::net::shutdown(peer, Shutdown::Both).expect("a socket");
        }
    }

    #[track_caller]
    fn assert_over(&mut self) {
        let is_over = self.is_over() || matches!(self.served.end, End::Never);
        assert!(is_over, "it does not end with its peer");
    }
}

/// Gives `trial` each message in turn, with those before it sent well.
fn with_each(
    sample: &dyn Sample,
    matches: impl Fn(&Message) -> bool,
    trial: impl Fn(Trialled<'_>, &Message),
) {
    let ledger = DescriptorLedger::open();
    {
        let mut reactor = Reactor::new().unwrap();
        let messages = sample.messages();
        assert!(messages.iter().any(&matches), "nothing is asked");
        for (number, message) in messages.iter().enumerate() {
            if matches(message) {
                let _row = row(&message.heard);
                let mut trialled = Trialled::new(sample, &mut reactor);
                for before in &messages[..number] {
                    trialled.send_well(before);
                }
                trial(trialled, message);
            }
        }
    }
    ledger.assert_balanced();
}

/// Each message is cut at every byte, its descriptors on the first.
pub(crate) fn cut_at_every_byte(sample: &dyn Sample) {
    let longest = sample.messages().iter().map(|it| it.bytes.len()).max();
    for at in 1..longest.expect("there are some") {
        let _row = row(at);
        let is_cut = |message: &Message| at < message.bytes.len();
        with_each(sample, is_cut, |mut trialled, message| {
            let descriptors = trialled.descriptors(message.descriptors);
            let (first, second) = message.bytes.split_at(at);
            trialled.send(first, &descriptors);
            trialled.send(second, &[]);
            let outcome = trialled.sample.outcome(Trial::Cut);
            trialled.assert_comes_out(&outcome, message, &descriptors);
        });
    }
}

/// All messages leave in one call, whose first byte has the descriptors of all; datagrams
/// in a call each, the first with all.
pub(crate) fn lumped_early(sample: &dyn Sample) {
    let ledger = DescriptorLedger::open();
    {
        let mut reactor = Reactor::new().unwrap();
        let mut trialled = Trialled::new(sample, &mut reactor);
        let messages = sample.messages();
        let mut calls: Vec<_> = messages.iter().map(|it| it.bytes.clone()).collect();
        if sample.rule() != Rule::Datagram {
            calls = vec![calls.concat()];
        }
        let count = messages.iter().map(|it| it.descriptors).sum();
        let descriptors = trialled.descriptors(count);
        for (number, bytes) in calls.iter().enumerate() {
            let its = if number == 0 { &descriptors[..] } else { &[] };
            trialled.send(bytes, its);
        }
        let dealt = match sample.outcome(Trial::Lumped) {
            Outcome::Paired => messages.iter().map(|it| it.descriptors).collect(),
            Outcome::Dealt(dealt) => dealt,
            Outcome::Refused => {
                assert!(trialled.is_over(), "it was not refused");
                Vec::new()
            }
            other => panic!("{other:?} is no outcome of all messages at once"),
        };
        let mut left = &descriptors[..];
        for (message, count) in messages.iter().zip(dealt) {
            let (its, others) = left.split_at(count);
            left = others;
            trialled.expect(message, its);
        }
        trialled.assert_heard();
        trialled.end();
    }
    ledger.assert_balanced();
}

/// The descriptors of a message come with its second byte, its last, and one in the middle.
pub(crate) fn late(sample: &dyn Sample) {
    for place in [1, 2, 3] {
        let has_some = |message: &Message| message.descriptors > 0;
        with_each(sample, has_some, |mut trialled, message| {
            let length = message.bytes.len();
            let at = [1, length / 2, length - 1][place - 1];
            let descriptors = trialled.descriptors(message.descriptors);
            let (first, second) = message.bytes.split_at(at);
            trialled.send(first, &[]);
            trialled.send(second, &descriptors);
            let outcome = trialled.sample.outcome(Trial::Late);
            trialled.assert_comes_out(&outcome, message, &descriptors);
        });
    }
}

/// The descriptors of a message come in two calls; those that have but one get a second.
pub(crate) fn two_sets(sample: &dyn Sample) {
    let has_some = |message: &Message| message.descriptors > 0;
    with_each(sample, has_some, |mut trialled, message| {
        let (trial, count) = match message.descriptors {
            1 => (Trial::SecondSet, 2),
            several => (Trial::TwoSets, several),
        };
        let descriptors = trialled.descriptors(count);
        let (first, second) = message.bytes.split_at(message.bytes.len() / 2);
        let (early, late) = descriptors.split_at(count / 2);
        if sample.rule() == Rule::Datagram {
            trialled.send_sets(&message.bytes, &[early, late]);
        } else {
            trialled.send(first, early);
            trialled.send(second, late);
        }
        let outcome = trialled.sample.outcome(trial);
        trialled.assert_comes_out(&outcome, message, &descriptors);
    });
}

pub(crate) fn one_too_few(sample: &dyn Sample) {
    let has_some = |message: &Message| message.descriptors > 0;
    with_each(sample, has_some, |mut trialled, message| {
        let descriptors = trialled.descriptors(message.descriptors - 1);
        trialled.send(&message.bytes, &descriptors);
        let outcome = trialled.sample.outcome(Trial::TooFew);
        trialled.assert_comes_out(&outcome, message, &descriptors);
    });
}

pub(crate) fn one_too_many(sample: &dyn Sample) {
    let has_some = |message: &Message| message.descriptors > 0;
    with_each(sample, has_some, |mut trialled, message| {
        let descriptors = trialled.descriptors(message.descriptors + 1);
        trialled.send(&message.bytes, &descriptors);
        let outcome = trialled.sample.outcome(Trial::TooMany);
        trialled.assert_comes_out(&outcome, message, &descriptors);
    });
}

/// A message of each limit comes, one beyond it does not.
pub(crate) fn limit_and_one_more(sample: &dyn Sample) {
    let ledger = DescriptorLedger::open();
    {
        let mut reactor = Reactor::new().unwrap();
        let limits = sample.limits();
        assert!(!limits.is_empty(), "nothing is asked");
        for limit in limits {
            let _row = row(limit.of);
            let mut trialled = Trialled::new(sample, &mut reactor);
            trialled.send_in_pieces(&limit.within);
            trialled.expect_last(&limit.within);
            trialled.assert_heard();
            trialled.end();

            let mut trialled = Trialled::new(sample, &mut reactor);
            trialled.send_in_pieces(&limit.beyond);
            trialled.expected.clear();
            let outcome = sample.outcome(Trial::Beyond);
            trialled.assert_comes_out(&outcome, &limit.beyond, &[]);
        }
    }
    ledger.assert_balanced();
}

impl Trialled<'_> {
    /// As a peer with a small buffer sends a long message: the descriptors with the first.
    fn send_in_pieces(&mut self, message: &Message) {
        let descriptors = self.descriptors(message.descriptors);
        let pieces = message.bytes.chunks(32_768);
        for (number, piece) in pieces.enumerate() {
            let its = if number == 0 { &descriptors[..] } else { &[] };
            self.send(piece, its);
        }
        self.expect(message, &descriptors);
    }

    fn expect_last(&mut self, message: &Message) {
        let last = self.expected.last_mut().expect("it was sent");
        assert_eq!(last.0, message.heard);
    }
}

/// A descriptor comes with a message that has none, and a good message follows.
pub(crate) fn stray(sample: &dyn Sample) {
    let has_none = |message: &Message| message.descriptors == 0;
    with_each(sample, has_none, |mut trialled, message| {
        let descriptors = trialled.descriptors(1);
        trialled.send(&message.bytes, &descriptors);
        let outcome = trialled.sample.outcome(Trial::Stray);
        trialled.assert_comes_out(&outcome, message, &descriptors);
    });
}

/// A descriptor comes with each piece of the handshake in turn.
pub(crate) fn in_the_line_phase(sample: &dyn Sample) {
    let ledger = DescriptorLedger::open();
    {
        let mut reactor = Reactor::new().unwrap();
        let prelude = sample.prelude();
        assert!(!prelude.is_empty(), "it has no such phase");
        for with_descriptor in 0..prelude.len() {
            let _row = row(prelude[with_descriptor].escape_ascii().to_string());
            let mut trialled = Trialled::begin(sample, &mut reactor);
            for (number, piece) in prelude.iter().enumerate() {
                let count = usize::from(number == with_descriptor);
                let descriptors = trialled.descriptors(count);
                trialled.send(piece, &descriptors);
            }
            trialled.send(&sample.messages()[0].bytes, &[]);
            assert!(trialled.is_over(), "it was not refused");
            trialled.assert_heard();
        }
    }
    ledger.assert_balanced();
}

/// The peer sends its messages and goes; that we cannot write any more loses none, not even
/// to a reader that has paused.
pub(crate) fn last_words(sample: &dyn Sample) {
    let ledger = DescriptorLedger::open();
    {
        let mut reactor = Reactor::new().unwrap();
        for is_paused in [false, true] {
            let _row = row(is_paused);
            let mut trialled = Trialled::new(sample, &mut reactor);
            if is_paused {
                let Some(transport) = trialled.transport() else {
                    continue;
                };
                transport.pause_producing();
            }
            for message in sample.messages() {
                let descriptors = trialled.descriptors(message.descriptors);
                trialled.send_unheard(&message.bytes, &[&descriptors]);
                trialled.expect(&message, &descriptors);
            }
            trialled.hang_up();
            if let Some(transport) = trialled.transport() {
                transport.write(b"too late");
            }
            settle(trialled.reactor);
            if is_paused {
                assert!(trialled.heard.is_empty(), "it was to pause");
                let transport = trialled.transport().expect("it was there");
                transport.resume_producing();
                settle(trialled.reactor);
            }
            trialled.assert_heard();
            trialled.assert_over();
        }
    }
    ledger.assert_balanced();
}

/// The tests of a [`Sample`], in a module of this name: all but that of the lines, which
/// those have that say `lines`, or those that it `asks`.
macro_rules! suite {
    (@cut $sample:expr) => {
        #[test]
        fn message_cut_at_any_byte_has_its_descriptors() {
            suite::cut_at_every_byte(&$sample);
        }
    };
    (@early $sample:expr) => {
        #[test]
        fn descriptors_of_all_messages_come_early() {
            suite::lumped_early(&$sample);
        }
    };
    (@late $sample:expr) => {
        #[test]
        fn descriptors_come_late() {
            suite::late(&$sample);
        }
    };
    (@sets $sample:expr) => {
        #[test]
        fn descriptors_come_in_two_sets() {
            suite::two_sets(&$sample);
        }
    };
    (@few $sample:expr) => {
        #[test]
        fn one_descriptor_too_few() {
            suite::one_too_few(&$sample);
        }
    };
    (@many $sample:expr) => {
        #[test]
        fn one_descriptor_too_many() {
            suite::one_too_many(&$sample);
        }
    };
    (@limit $sample:expr) => {
        #[test]
        fn message_of_a_limit_comes_and_one_beyond_is_refused() {
            suite::limit_and_one_more(&$sample);
        }
    };
    (@stray $sample:expr) => {
        #[test]
        fn stray_descriptor_on_a_plain_message() {
            suite::stray(&$sample);
        }
    };
    (@lines $sample:expr) => {
        #[test]
        fn descriptor_in_the_line_phase_is_refused() {
            suite::in_the_line_phase(&$sample);
        }
    };
    (@last $sample:expr) => {
        #[test]
        fn last_words_of_a_peer_that_is_gone_are_heard() {
            suite::last_words(&$sample);
        }
    };
    ($name:ident, $sample:expr) => {
        $crate::suite::suite!(
            $name, $sample, asks cut early late sets few many limit stray last
        );
    };
    ($name:ident, $sample:expr, lines) => {
        $crate::suite::suite!(
            $name, $sample, asks cut early late sets few many limit stray lines last
        );
    };
    ($name:ident, $sample:expr, asks $($question:ident)+) => {
        pub(crate) mod $name {
            use super::*;
            use $crate::suite;

            pub(crate) fn sample() -> Box<dyn suite::Sample> {
                Box::new($sample)
            }

            $($crate::suite::suite!(@$question $sample);)+
        }
    };
}
pub(crate) use suite;
