//! A bowline end and a peer's end of one connection.

use std::cell::Cell;
use std::fs::{self, File};
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::time::{Duration, Instant};

use bowline::{
    Address, AfterReadClosed, CloseReason, Context, Protocol, Reactor, ReceivedDescriptors,
    Transports, UnixAddress, UnixStream, UnixTransport, UnixTransportHandle,
};
use tempfile::TempDir;

use crate::Scenario;
use crate::peer::{GONE, Needs, Peer, Peers};
use crate::support::{DEADLINE, Event, Record, Recorder};

/// Who listens and who connects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    WeConnect,
    PeerConnects,
}

/// One scenario with Twisted as a server and as a client.
pub(crate) fn both_directions(name: &str, run: fn(&Peers, Direction)) -> [Scenario; 2] {
    [
        Scenario::new(format!("twisted_listens::{name}"), Needs::Twisted, {
            move |peers| run(peers, Direction::WeConnect)
        }),
        Scenario::new(format!("twisted_connects::{name}"), Needs::Twisted, {
            move |peers| run(peers, Direction::PeerConnects)
        }),
    ]
}

/// How our end differs from one that keeps descriptors and half-closes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wants {
    pub(crate) descriptors: bool,
    pub(crate) after_read_closed: AfterReadClosed,
}

impl Default for Wants {
    fn default() -> Self {
        Self {
            descriptors: true,
            after_read_closed: AfterReadClosed::EndConnection,
        }
    }
}

/// Where our protocol leaves the name of its transport.
pub(crate) type Link = Rc<Cell<Option<UnixTransportHandle>>>;

/// A reactor with one connection to a peer, and what both ends saw.
pub(crate) struct Pair {
    pub(crate) reactor: Reactor,
    pub(crate) peer: Peer,
    /// What our protocol was told.
    pub(crate) record: Record,
    link: Link,
    directory: TempDir,
    /// How much of the counted stream we wrote so far.
    written: usize,
}

impl Pair {
    /// A connection with Twisted, which uses the protocol of this name; see
    /// `peers/twisted_peer.py`.
    pub(crate) fn with_twisted(peers: &Peers, direction: Direction, protocol: &str) -> Self {
        Self::with_wants(peers, direction, protocol, Wants::default())
    }

    /// The same, with our end as described.
    pub(crate) fn with_wants(
        peers: &Peers,
        direction: Direction,
        protocol: &str,
        wants: Wants,
    ) -> Self {
        Self::with_protocol(peers, direction, protocol, move |record, link| End {
            recorder: Recorder::new(record),
            wants,
            link: Rc::clone(link),
        })
    }

    /// The same, with any protocol at our end; it has to leave the name of its
    /// transport in the link.
    pub(crate) fn with_protocol<P: Protocol<UnixStream>>(
        peers: &Peers,
        direction: Direction,
        protocol: &str,
        build: impl FnMut(&Record, &Link) -> P + 'static,
    ) -> Self {
        let kind = (Needs::Twisted, "twisted_peer.py");
        Self::start(peers, direction, kind, &[protocol], build)
    }

    /// A connection with Python's sockets.
    pub(crate) fn with_socket(peers: &Peers, direction: Direction) -> Self {
        Self::with_socket_and_protocol(peers, direction, |record, link| End {
            recorder: Recorder::new(record),
            wants: Wants::default(),
            link: Rc::clone(link),
        })
    }

    /// The same, with any protocol at our end.
    pub(crate) fn with_socket_and_protocol<P: Protocol<UnixStream>>(
        peers: &Peers,
        direction: Direction,
        build: impl FnMut(&Record, &Link) -> P + 'static,
    ) -> Self {
        let kind = (Needs::Python, "socket_peer.py");
        Self::start(peers, direction, kind, &[], build)
    }

    fn start<P: Protocol<UnixStream>>(
        peers: &Peers,
        direction: Direction,
        (needs, script): (Needs, &str),
        protocol: &[&str],
        mut build: impl FnMut(&Record, &Link) -> P + 'static,
    ) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        // Twisted's are paths and those of plain sockets are abstract names, as
        // unique as the directory.
        let path = directory.path().join("socket");
        let path = path.to_str().expect("a plain path");
        let (address, argument) = match needs {
            Needs::Twisted => (UnixAddress::Path(path.into()), path.to_owned()),
            _ => (UnixAddress::Abstract(path.into()), format!("@{path}")),
        };
        let (record, link) = (Record::default(), Link::default());
        let factory = {
            let (record, link) = (record.clone(), Rc::clone(&link));
            move |_: &Address| build(&record, &link)
        };
        let how = match direction {
            Direction::WeConnect => "listen",
            Direction::PeerConnects => "connect",
        };
        let mut arguments = vec![how, &argument];
        arguments.extend(protocol);
        arguments.push(directory.path().to_str().expect("a plain path"));

        let mut reactor = Reactor::new().expect("a reactor");
        let mut factory = Some(factory);
        if direction == Direction::PeerConnects
            && let Some(factory) = factory.take()
        {
            reactor
                .listen_unix(address.clone(), factory)
                .expect("listens");
        }
        let peer = Peer::start(&mut reactor, peers, needs, script, &arguments);
        let mut pair = Self {
            reactor,
            peer,
            record,
            link,
            directory,
            written: 0,
        };
        if let Some(factory) = factory {
            pair.wait_for("listening");
            pair.reactor
                .connect_unix(address, factory)
                .expect("there is room");
        }
        pair.wait("both ends are made", |pair| {
            pair.peer.count("made") == 1 && pair.link.get().is_some()
        });
        pair
    }

    // Our end.

    /// Our transport.
    #[track_caller]
    pub(crate) fn transport(&mut self) -> &mut dyn UnixTransport {
        let handle = self.link.get().expect("the connection was made");
        self.reactor.get(handle).expect("the connection is there")
    }

    /// Writes the next bytes of the counted stream.
    #[track_caller]
    pub(crate) fn write(&mut self, count: usize) {
        let data = counted(self.written..self.written + count);
        self.written += count;
        self.transport().write(&data);
    }

    /// How much of the counted stream we wrote so far.
    pub(crate) fn written(&self) -> usize {
        self.written
    }

    /// Writes the next bytes of the counted stream with these files.
    #[track_caller]
    pub(crate) fn write_with_files(&mut self, count: usize, files: Range<usize>) {
        let data = counted(self.written..self.written + count);
        self.written += count;
        let descriptors = files.map(|index| self.file(index).into()).collect();
        self.transport()
            .write_with_descriptors(&data, descriptors)
            .expect("there is room");
    }

    #[track_caller]
    pub(crate) fn send_file(&mut self, index: usize) {
        let file = self.file(index);
        self.transport()
            .send_file_descriptor(file.into())
            .expect("there is room");
    }

    /// Fails unless we received exactly this much of the counted stream.
    #[track_caller]
    pub(crate) fn assert_received(&self, count: usize) {
        let data = self.record.data();
        assert_eq!(data.len(), count, "bytes received");
        assert!(data == counted(0..count), "other bytes than were sent");
    }

    /// The identities of what our protocol received and kept, in order.
    pub(crate) fn received_identities(&self) -> Vec<String> {
        let descriptors = self.record.take_descriptors();
        descriptors.iter().map(identity).collect()
    }

    /// How many descriptors have left, as our protocol was told.
    pub(crate) fn descriptors_left(&self) -> usize {
        let told = self.record.summary();
        let counts = told.iter().filter_map(|event| event.strip_prefix("sent "));
        counts.map(number).sum()
    }

    // The peer's end.

    pub(crate) fn tell(&mut self, commands: &str) {
        self.peer.tell(&mut self.reactor, commands);
    }

    /// How many bytes the peer was given so far.
    pub(crate) fn peer_received(&self) -> usize {
        let counts = self.peer.told("data");
        counts.iter().map(|count| number(count)).sum()
    }

    /// Fails unless the peer was given exactly as much of the counted stream as
    /// it has reported last.
    #[track_caller]
    pub(crate) fn assert_peer_received(&self, count: usize) {
        let report = self.peer.told("received").pop();
        let expected = format!("{count} {}", adler32(&counted(0..count)));
        assert_eq!(report, Some(expected), "length and checksum of the bytes");
    }

    // Files to send.

    /// Sees to it that the peer can send the files up to `count`.
    pub(crate) fn make_files(&self, count: usize) {
        for index in 0..count {
            drop(self.file(index));
        }
    }

    /// One of the files to send, open for reading.
    pub(crate) fn file(&self, index: usize) -> File {
        let path = self.directory.path().join(index.to_string());
        if !path.exists() {
            fs::write(&path, format!("file {index}")).expect("the directory is ours");
        }
        File::open(path).expect("it was just written")
    }

    pub(crate) fn identities(&self, files: Range<usize>) -> Vec<String> {
        files.map(|index| identity(&self.file(index))).collect()
    }

    // Waiting.

    /// Turns the reactor until the peer has told this.
    #[track_caller]
    pub(crate) fn wait_for(&mut self, event: &str) {
        self.wait(event, |pair| pair.peer.count(event) > 0);
    }

    /// Turns the reactor until our protocol was told that the connection is
    /// lost.
    #[track_caller]
    pub(crate) fn wait_for_our_loss(&mut self) {
        self.wait("our end is lost", |pair| pair.record.is_lost());
    }

    /// Turns the reactor until the peer's protocol was told the same.
    #[track_caller]
    pub(crate) fn wait_for_peers_loss(&mut self) {
        self.wait("the peer's end is lost", |pair| {
            !pair.peer.told("lost").is_empty()
        });
    }

    /// Turns the reactor until `is_done`. Fails at the deadline, when the peer
    /// ends before, and when it tells of an error.
    #[track_caller]
    pub(crate) fn wait(&mut self, what: &str, is_done: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + DEADLINE;
        while !is_done(self) {
            let has_failed = self.peer.count(GONE) > 0 || !self.peer.told("error").is_empty();
            assert!(
                !has_failed && Instant::now() < deadline,
                "waited in vain until {what}.\nwe saw {:?}\nthe peer told {:?}",
                abridged(self.record.summary()),
                abridged(self.peer.events()),
            );
            self.reactor.turn(Some(Duration::from_millis(50)));
        }
    }
}

/// The ends of a long list.
fn abridged(mut all: Vec<String>) -> Vec<String> {
    const AT_EACH_END: usize = 20;
    if all.len() > 2 * AT_EACH_END {
        let left_out = all.len() - 2 * AT_EACH_END;
        let dots = format!("... and {left_out} more ...");
        all.splice(AT_EACH_END..all.len() - AT_EACH_END, [dots]);
    }
    all
}

/// A part of the stream of bytes that both sides know: the numbers from 0 on,
/// as four bytes each.
pub(crate) fn counted(part: Range<usize>) -> Vec<u8> {
    let words = part.start / 4..part.end.div_ceil(4);
    let bytes = words.flat_map(|word| (word as u32).to_be_bytes());
    bytes.skip(part.start % 4).take(part.len()).collect()
}

/// The checksum of RFC 1950, which Python has too.
pub(crate) fn adler32(data: &[u8]) -> u32 {
    let (mut low, mut high) = (1_u32, 0_u32);
    for byte in data {
        low = (low + u32::from(*byte)) % 65_521;
        high = (high + low) % 65_521;
    }
    high << 16 | low
}

/// Which open file a descriptor means, whatever its number.
pub(crate) fn identity(fd: &impl AsFd) -> String {
    let status = rustix::fs::fstat(fd).expect("it is open");
    format!("{}:{}", status.st_dev, status.st_ino)
}

#[track_caller]
pub(crate) fn number(text: &str) -> usize {
    text.parse().expect("the peer tells a number")
}

/// Our usual protocol: it records what it is told.
struct End {
    recorder: Recorder,
    wants: Wants,
    link: Link,
}

impl<T: UnixTransport> Protocol<T> for End {
    fn connection_made(&mut self, cx: &mut Context<'_, T>) {
        self.link.set(Some(cx.transport.unix_handle()));
        self.recorder.connection_made(cx);
    }

    fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
        self.recorder.data_received(cx, data);
    }

    fn descriptors_received(
        &mut self,
        cx: &mut Context<'_, T>,
        descriptors: &mut ReceivedDescriptors<'_>,
        data: &[u8],
    ) {
        if self.wants.descriptors {
            self.recorder.descriptors_received(cx, descriptors, data);
        } else {
            // What is left in there is closed.
            self.recorder.data_received(cx, data);
        }
    }

    fn descriptors_sent(&mut self, cx: &mut Context<'_, T>, count: usize) {
        self.recorder.descriptors_sent(cx, count);
    }

    fn read_connection_lost(&mut self, _: &mut Context<'_, T>) -> AfterReadClosed {
        self.recorder.record.push(Event::ReadClosed);
        self.wants.after_read_closed
    }

    fn write_connection_lost(&mut self, cx: &mut Context<'_, T>) {
        self.recorder.write_connection_lost(cx);
    }

    fn connection_lost(&mut self, cx: &mut Context<'_, T>, reason: &CloseReason) {
        self.recorder.connection_lost(cx, reason);
    }

    fn pause_producing(&mut self, cx: &mut Context<'_, T>) {
        self.recorder.pause_producing(cx);
    }

    fn resume_producing(&mut self, cx: &mut Context<'_, T>) {
        self.recorder.resume_producing(cx);
    }

    fn stop_producing(&mut self, cx: &mut Context<'_, T>) {
        self.recorder.stop_producing(cx);
    }
}

/// A connected pair of sockets: passing one end away and dropping it shows at
/// the other whether all copies are closed.
pub(crate) fn canary() -> (OwnedFd, std::os::unix::net::UnixStream) {
    let (passed, kept) = std::os::unix::net::UnixStream::pair().expect("socketpair");
    kept.set_read_timeout(Some(DEADLINE)).expect("a socket");
    (passed.into(), kept)
}
