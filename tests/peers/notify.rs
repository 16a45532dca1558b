//! The notify socket, asked what the suite asks of every framing. A message is a datagram
//! there, so it has what came with it, and shares nothing with those around it.

use std::cell::RefCell;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::rc::Rc;

use bowline::{Credentials, Reactor, Transports as _};
use bowline_peers::notify::{DescriptorStore, Dropped, Notice, NoticeHandler, NoticeSocket};
use rustix::fs::MemfdFlags;

use crate::suite::{Identity, identity, send_sets};
use crate::support::{DescriptorLedger, row, run_until};

/// A notice that has its descriptors kept, and one that has nothing to do with any.
const KEEP: &[u8] = b"FDSTORE=1\nFDNAME=web\n";
const PLAIN: &[u8] = b"READY=1\n";

/// What a manager keeps, and what it has dropped.
struct Heard {
    count: usize,
    dropped: Vec<Dropped>,
    store: DescriptorStore,
}

#[derive(Clone)]
struct Manager(Rc<RefCell<Heard>>);

impl NoticeHandler for Manager {
    fn admits(&mut self, sender: &Credentials) -> bool {
        sender.pid == Some(std::process::id())
    }

    fn notice_received(
        &mut self,
        _: &mut Reactor,
        _: &Credentials,
        notice: &Notice,
        descriptors: Vec<OwnedFd>,
    ) {
        let mut heard = self.0.borrow_mut();
        heard.count += 1;
        heard.store.apply(notice, descriptors);
    }

    fn notice_dropped(&mut self, _: &mut Reactor, _: Option<&Credentials>, why: Dropped) {
        let mut heard = self.0.borrow_mut();
        heard.count += 1;
        heard.dropped.push(why);
    }
}

/// A manager, and the socket of a service that it hears.
struct Stage {
    reactor: Reactor,
    manager: Manager,
    service: Option<UnixDatagram>,
    sent: usize,
    // Last: what is above is closed by then.
    _folder: tempfile::TempDir,
    _ledger: DescriptorLedger,
}

impl Stage {
    /// With a store of so many.
    fn new(most: usize) -> Self {
        let ledger = DescriptorLedger::open();
        let folder = tempfile::tempdir().expect("a folder");
        let path: PathBuf = folder.path().join("notify");
        let mut reactor = Reactor::new().expect("a reactor");
        let manager = Manager(Rc::new(RefCell::new(Heard {
            count: 0,
            dropped: Vec::new(),
            store: DescriptorStore::new(most),
        })));
        reactor
            .listen(NoticeSocket::at(path.as_path()), manager.clone())
            .expect("a free path");
        let service = UnixDatagram::unbound().expect("a socket");
        service.connect(path).expect("it listens");
        Self {
            reactor,
            manager,
            service: Some(service),
            sent: 0,
            _folder: folder,
            _ledger: ledger,
        }
    }

    /// Sends a message with these sets of descriptors, each a control message of its own.
    fn send(&mut self, bytes: &[u8], sets: &[&[OwnedFd]]) {
        let sets: Vec<Vec<BorrowedFd<'_>>> = sets
            .iter()
            .map(|set| set.iter().map(|fd| fd.as_fd()).collect())
            .collect();
        let sets: Vec<&[BorrowedFd<'_>]> = sets.iter().map(Vec::as_slice).collect();
        send_sets(self.service.as_ref().expect("it is there"), bytes, &sets);
        self.sent += 1;
    }

    /// Waits until all that was sent was heard; what is kept then, by name, and what was
    /// dropped.
    #[track_caller]
    fn heard(&mut self) -> (Vec<(String, Identity)>, Vec<Dropped>) {
        let (manager, sent) = (self.manager.clone(), self.sent);
        run_until(&mut self.reactor, |_| manager.0.borrow().count >= sent);
        let mut heard = self.manager.0.borrow_mut();
        assert_eq!(heard.count, sent);
        let kept = heard.store.take_all();
        let kept = kept.into_iter().map(|(name, fd)| (name, identity(fd)));
        (kept.collect(), std::mem::take(&mut heard.dropped))
    }

    /// That exactly these are kept under this name, nothing else, and that so much was
    /// dropped.
    #[track_caller]
    fn assert_keeps(&mut self, descriptors: &[OwnedFd], dropped: &[Dropped]) {
        let own = |fd: &OwnedFd| ("web".to_owned(), identity(fd));
        let expected: Vec<_> = descriptors.iter().map(own).collect();
        assert_eq!(self.heard(), (expected, dropped.to_vec()));
    }
}

/// Other files each, so that a mistaken one is noticed.
fn descriptors(count: usize) -> Vec<OwnedFd> {
    let new = |_| rustix::fs::memfd_create("given", MemfdFlags::CLOEXEC).expect("made");
    (0..count).map(new).collect()
}

/// What is cut off is a message of its own, and says what it says.
#[test]
fn message_cut_at_any_byte_has_its_descriptors() {
    for at in 1..=KEEP.len() {
        let _row = row(at);
        let mut stage = Stage::new(8);
        let (own, next) = (descriptors(1), descriptors(1));
        stage.send(&KEEP[..at], &[&own]);
        stage.send(b"FDSTORE=1\nFDNAME=next\n", &[&next]);
        let (name, dropped) = match at {
            // No field at all.
            ..=7 => (None, &[Dropped::Malformed][..]),
            // It does not say that they are to be kept.
            8 => (None, &[][..]),
            9..=16 => (Some("stored"), &[][..]),
            // The name of none.
            17 => (None, &[][..]),
            18 => (Some("w"), &[][..]),
            19 => (Some("we"), &[][..]),
            _ => (Some("web"), &[][..]),
        };
        let mut expected: Vec<_> = name
            .map(|name| (name.to_owned(), identity(&own[0])))
            .into_iter()
            .collect();
        expected.push(("next".to_owned(), identity(&next[0])));
        assert_eq!(stage.heard(), (expected, dropped.to_vec()));
    }
}

/// They came with a message that says nothing of them, and those that do came with none.
#[test]
fn descriptors_of_all_messages_come_early() {
    let mut stage = Stage::new(8);
    stage.send(PLAIN, &[&descriptors(2)]);
    stage.send(KEEP, &[]);
    stage.send(KEEP, &[]);
    stage.assert_keeps(&[], &[]);
}

#[test]
fn descriptors_come_late() {
    let mut stage = Stage::new(8);
    stage.send(KEEP, &[]);
    stage.send(PLAIN, &[&descriptors(1)]);
    stage.assert_keeps(&[], &[]);
}

/// The kernel makes one of them.
#[test]
fn descriptors_come_in_two_sets() {
    let mut stage = Stage::new(8);
    let all = descriptors(3);
    stage.send(KEEP, &[&all[..1], &all[1..]]);
    stage.assert_keeps(&all, &[]);
}

#[test]
fn one_descriptor_too_few() {
    let mut stage = Stage::new(8);
    let own = descriptors(1);
    stage.send(KEEP, &[]);
    stage.send(b"BARRIER=1\n", &[]);
    stage.send(KEEP, &[&own]);
    stage.assert_keeps(&own, &[Dropped::Barrier]);
}

#[test]
fn one_descriptor_too_many() {
    let mut stage = Stage::new(2);
    let all = descriptors(3);
    stage.send(b"BARRIER=1\n", &[&all[..2]]);
    stage.send(KEEP, &[&all]);
    // The store is full of the first.
    stage.assert_keeps(&all[..2], &[Dropped::Barrier]);
}

#[test]
fn message_of_a_limit_comes_and_one_beyond_is_refused() {
    // As many as the kernel passes at once, beside a name of the longest.
    let mut stage = Stage::new(300);
    let all = descriptors(253);
    let name = "x".repeat(255);
    stage.send(format!("FDSTORE=1\nFDNAME={name}").as_bytes(), &[&all]);
    let expected = all.iter().map(|fd| (name.clone(), identity(fd)));
    assert_eq!(stage.heard(), (expected.collect(), vec![]));
    stage.send(format!("FDSTORE=1\nFDNAME={name}x").as_bytes(), &[&all]);
    stage.assert_keeps(&[], &[]);

    let of = |length: usize| {
        let mut text = KEEP.to_vec();
        text.extend(b"STATUS=");
        text.resize(length, b'x');
        text
    };
    let own = descriptors(1);
    stage.send(&of(4_096), &[&own]);
    stage.assert_keeps(&own, &[]);
    stage.send(&of(4_097), &[&own]);
    stage.assert_keeps(&[], &[Dropped::TooLong]);
}

#[test]
fn stray_descriptor_on_a_plain_message() {
    let mut stage = Stage::new(8);
    let own = descriptors(1);
    stage.send(PLAIN, &[&descriptors(1)]);
    stage.send(KEEP, &[&own]);
    stage.assert_keeps(&own, &[]);
}

#[test]
fn last_words_of_a_peer_that_is_gone_are_heard() {
    let mut stage = Stage::new(8);
    let all = descriptors(2);
    stage.send(KEEP, &[&all[..1]]);
    stage.send(b"STOPPING=1\n", &[]);
    stage.send(KEEP, &[&all[1..]]);
    stage.service = None;
    stage.assert_keeps(&all, &[]);
}
