//! The notify socket: the suite over datagrams, and what is dropped and told. A message has
//! what came with its datagram, and shares nothing with those around it.

use std::cell::RefCell;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::rc::Rc;

use bowline::{Credentials, Reactor, Transports as _};
use bowline_peers::notify::{DescriptorStore, Dropped, Notice, NoticeHandler, NoticeSocket};
use rustix::fs::MemfdFlags;

use crate::suite::{
    End, Heard as Told, Identity, Limit, Message, Outcome, Question, Rule, Sample, Served, Trial,
    identity, send,
};
use crate::support::{DescriptorLedger, row, run_until};

/// A manager of the suite. A notice has those that are kept of what came.
struct Keeper(Told);

impl NoticeHandler for Keeper {
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
        let mut store = DescriptorStore::new(8);
        store.apply(notice, descriptors);
        let kept = store.take_all().into_iter().map(|(_, fd)| fd);
        self.0.message(told(notice), kept);
    }
}

struct Notices;

fn told(notice: &Notice) -> String {
    let text = notice.as_str();
    format!("{} of {}", &text[..text.len().min(24)], text.len())
}

fn notice(text: &str, descriptors: usize) -> Message {
    let heard = told(&Notice::parse(text.as_bytes()).expect("text"));
    Message::new(text, descriptors, heard)
}

impl Sample for Notices {
    fn rule(&self) -> Rule {
        Rule::Datagram
    }

    fn serve(&self, reactor: &mut Reactor, heard: &Told) -> Served {
        let folder = tempfile::tempdir().expect("a folder");
        let path: PathBuf = folder.path().join("notify");
        reactor
            .listen(NoticeSocket::at(path.as_path()), Keeper(heard.clone()))
            .expect("a free path");
        let service = UnixDatagram::unbound().expect("a socket");
        service.connect(path).expect("it listens");
        Served {
            peer: Some(service.into()),
            end: End::Never,
            folder: Some(folder),
        }
    }

    fn messages(&self) -> Vec<Message> {
        vec![
            notice("READY=1", 0),
            notice("FDSTORE=1\nFDNAME=web", 1),
            notice("FDSTORE=1\nFDNAME=three", 3),
            notice("STATUS=none", 0),
            notice("FDSTORE=1\n", 1),
        ]
    }

    fn outcome(&self, trial: Trial) -> Outcome {
        match trial {
            // The first is not to be kept with any.
            Trial::Lumped => Outcome::Dealt(vec![0; 5]),
            // It is closed.
            Trial::Stray => Outcome::Paired,
            // The kernel makes one of them.
            Trial::SecondSet => Outcome::Differs(1),
            _ => self.rule().outcome(trial),
        }
    }

    fn limits(&self) -> Vec<Limit> {
        let of = |length| {
            let mut text = "FDSTORE=1\nSTATUS=".to_owned();
            text.extend(std::iter::repeat_n('x', length - text.len()));
            notice(&text, 1)
        };
        vec![Limit {
            of: "bytes",
            within: of(4_096),
            beyond: of(4_097),
        }]
    }

    fn unasked(&self) -> Vec<(Question, &'static str)> {
        vec![
            (Question::Cut, "a datagram is whole"),
            (Question::Late, "a datagram is whole"),
            (Question::Lines, "no lines"),
        ]
    }
}

suite!(notices, Notices, asks early sets few many limit stray last);

/// A notice that has its descriptors kept.
const KEEP: &[u8] = b"FDSTORE=1\nFDNAME=web\n";

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
    service: UnixDatagram,
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
            service,
            sent: 0,
            _folder: folder,
            _ledger: ledger,
        }
    }

    fn send(&mut self, bytes: &[u8], descriptors: &[OwnedFd]) {
        let descriptors: Vec<_> = descriptors.iter().map(|fd| fd.as_fd()).collect();
        send(&self.service, bytes, &descriptors);
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
fn notice_cut_at_any_byte_says_what_is_left_of_it() {
    for at in 1..=KEEP.len() {
        let _row = row(at);
        let mut stage = Stage::new(8);
        let (own, next) = (descriptors(1), descriptors(1));
        stage.send(&KEEP[..at], &own);
        stage.send(b"FDSTORE=1\nFDNAME=next\n", &next);
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

/// A barrier has exactly one, and what is too long is nothing at all.
#[test]
fn what_is_dropped_is_told_with_its_reason() {
    let mut stage = Stage::new(8);
    let (own, last) = (descriptors(2), descriptors(1));
    stage.send(b"BARRIER=1\n", &[]);
    stage.send(b"BARRIER=1\n", &own);
    stage.send(&[KEEP, &[b'x'; 4_096]].concat(), &own);
    stage.send(KEEP, &last);
    stage.assert_keeps(
        &last,
        &[Dropped::Barrier, Dropped::Barrier, Dropped::TooLong],
    );
}

#[test]
fn store_keeps_as_many_as_it_may() {
    let mut stage = Stage::new(2);
    let all = descriptors(3);
    stage.send(KEEP, &all);
    // It is full of the first.
    stage.assert_keeps(&all[..2], &[]);
}

/// As many as the kernel passes at once, beside a name of the longest, and one too long.
#[test]
fn name_of_the_longest_is_kept_and_one_of_one_byte_more_is_not() {
    let mut stage = Stage::new(300);
    let all = descriptors(253);
    let name = "x".repeat(255);
    stage.send(format!("FDSTORE=1\nFDNAME={name}").as_bytes(), &all);
    let expected = all.iter().map(|fd| (name.clone(), identity(fd)));
    assert_eq!(stage.heard(), (expected.collect(), vec![]));
    stage.send(format!("FDSTORE=1\nFDNAME={name}x").as_bytes(), &all);
    stage.assert_keeps(&[], &[]);
}
