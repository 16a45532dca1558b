//! Descriptors of one's own: an eventfd, a pipe, a file.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;

use bowline::descriptor::{Descriptor, Interest, Next, Panic, Readiness, Token};
use bowline::{DelayedCall, Handle, Reactor};
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::{Errno, read, write};

use crate::support::{DescriptorLedger, run_until};
use crate::{Notes, PANIC};

type Script = Box<dyn FnMut(&mut Counter, &mut Reactor) -> Next>;

/// An eventfd that notes what it is called for, and does what its script says
/// when it is ready.
struct Counter {
    name: u32,
    fd: OwnedFd,
    notes: Notes<String>,
    script: Option<Script>,
}

impl Counter {
    fn note(&self, what: &str) {
        self.notes.push(format!("{} {what}", self.name));
    }

    /// Takes what was counted, so that the next count is a new edge.
    fn take(&self) -> Option<u64> {
        let mut count = [0; 8];
        match read(&self.fd, &mut count) {
            Ok(_) => Some(u64::from_ne_bytes(count)),
            Err(Errno::AGAIN) => None,
            Err(error) => panic!("{error}"),
        }
    }
}

impl Descriptor for Counter {
    fn ready(&mut self, reactor: &mut Reactor, readiness: Readiness) -> Next {
        self.note(if readiness.is_empty() {
            "again"
        } else {
            "ready"
        });
        let Some(mut script) = self.script.take() else {
            self.take();
            return Next::Keep;
        };
        let next = script(self, reactor);
        self.script = Some(script);
        next
    }

    fn attend(&mut self, _: &mut Reactor) -> Next {
        self.note("attend");
        Next::Keep
    }

    fn timer_fired(&mut self, _: &mut Reactor, _: DelayedCall) -> Next {
        self.note("timer");
        Next::Keep
    }

    fn panicked(&mut self, _: &mut Reactor, panic: Panic) -> Next {
        self.note(panic.message());
        Next::Remove
    }

    fn shutdown(&mut self, _: &mut Reactor) {
        self.note("shutdown");
    }

    fn source(&self) -> Option<BorrowedFd<'_>> {
        Some(self.fd.as_fd())
    }

    fn facet(&mut self) -> &mut dyn Any {
        &mut self.name
    }
}

/// A reactor with counters in it, and the other ends of those.
struct Bench {
    reactor: Reactor,
    notes: Notes<String>,
    next_name: u32,
}

/// What the test holds of a counter.
struct End {
    token: Token,
    fd: OwnedFd,
}

impl End {
    fn add(&self, count: u64) {
        write(&self.fd, &count.to_ne_bytes()).unwrap();
    }
}

impl Bench {
    fn new() -> Self {
        Self {
            reactor: Reactor::new().unwrap(),
            notes: Notes::new(),
            next_name: 0,
        }
    }

    fn counter(&mut self) -> (Counter, OwnedFd) {
        let flags = EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC;
        let fd = eventfd(0, flags).unwrap();
        let end = fd.try_clone().unwrap();
        let counter = Counter {
            name: self.next_name,
            fd,
            notes: self.notes.clone(),
            script: None,
        };
        self.next_name += 1;
        (counter, end)
    }

    fn add(&mut self, script: Option<Script>) -> End {
        let (mut counter, fd) = self.counter();
        counter.script = script;
        let token = self
            .reactor
            .register(Interest::Readable, |_| Box::new(counter))
            .unwrap();
        End { token, fd }
    }

    fn turn(&mut self) {
        self.reactor.turn(Some(Duration::ZERO));
    }
}

fn handle(token: Token) -> Handle<u32> {
    Handle::new(token, |facet| facet.downcast_mut())
}

#[test]
fn event_is_reported_once_and_every_new_one_again() {
    let ledger = DescriptorLedger::open();
    let mut bench = Bench::new();
    let end = bench.add(None);
    bench.turn();
    assert_eq!(bench.notes.len(), 0);
    for round in 1..=3 {
        end.add(1);
        bench.turn();
        bench.turn();
        assert_eq!(bench.notes.len(), round);
    }
    assert_eq!(bench.reactor.registered(), 1);
    drop((bench, end));
    ledger.assert_balanced();
}

#[test]
fn what_is_ready_when_registered_is_reported() {
    let ledger = DescriptorLedger::open();
    let mut bench = Bench::new();
    let (counter, fd) = bench.counter();
    let end = fd;
    write(&end, &1u64.to_ne_bytes()).unwrap();
    bench
        .reactor
        .register(Interest::Readable, |_| Box::new(counter))
        .unwrap();
    bench.turn();
    assert_eq!(bench.notes.all(), ["0 ready"]);
    drop((bench, end));
    ledger.assert_balanced();
}

#[test]
fn asking_again_is_one_call_in_the_next_turn_which_does_not_wait() {
    let _alone = DescriptorLedger::open();
    let mut bench = Bench::new();
    let mut left = 3;
    let end = bench.add(Some(Box::new(move |_, _| {
        left -= 1;
        if left > 0 { Next::Again } else { Next::Keep }
    })));
    end.add(1);
    for turn in 1..=3 {
        bench.reactor.turn(None);
        assert_eq!(bench.notes.len(), turn);
    }
    assert_eq!(bench.notes.all(), ["0 ready", "0 again", "0 again"]);
    assert!(bench.reactor.is_idle());
}

/// Each turn with a new event used to add another call to those already asked
/// for, so that the share of a greedy one grew without bound.
#[test]
fn one_that_asks_again_and_has_events_too_is_called_once_per_turn() {
    let _alone = DescriptorLedger::open();
    let mut bench = Bench::new();
    let end = bench.add(Some(Box::new(|counter, _| {
        counter.take();
        Next::Again
    })));
    for turn in 1..=20 {
        end.add(1);
        bench.turn();
        assert_eq!(bench.notes.len(), turn);
    }
    // The event reaches it although the call was asked for.
    assert!(bench.notes.all().iter().all(|note| note == "0 ready"));
    bench.turn();
    assert_eq!(bench.notes.all().last().unwrap(), "0 again");
}

#[test]
fn removed_descriptor_is_deregistered_and_dropped() {
    let ledger = DescriptorLedger::open();
    let mut bench = Bench::new();
    let end = bench.add(Some(Box::new(|_, _| Next::Remove)));
    end.add(1);
    bench.turn();
    assert!(!bench.reactor.is_registered(end.token));
    // `end` holds the same open file: were it still watched, this would be an
    // event for somebody who is gone.
    end.add(1);
    bench.turn();
    assert_eq!(bench.notes.all(), ["0 ready"]);
    assert_eq!(bench.reactor.statistics().stale_events, 0);
    drop((bench, end));
    ledger.assert_balanced();
}

/// Contract R-35, W-40.
#[test]
fn regular_file_cannot_be_watched_and_leaves_nothing_behind() {
    let ledger = DescriptorLedger::open();
    let mut bench = Bench::new();
    let (mut counter, end) = bench.counter();
    counter.fd = tempfile::tempfile().unwrap().into();
    let error = bench
        .reactor
        .register(Interest::Readable, |_| Box::new(counter))
        .unwrap_err();
    assert_eq!(error.raw_os_error(), Some(Errno::PERM.raw_os_error()));
    assert_eq!(bench.reactor.registered(), 0);
    // Without a source it can be driven all the same, by asking again.
    struct Pages(File, Notes<usize>);
    impl Descriptor for Pages {
        fn ready(&mut self, _: &mut Reactor, _: Readiness) -> Next {
            let mut page = [0; 4096];
            let count = std::io::Read::read(&mut self.0, &mut page).unwrap();
            self.1.push(count);
            if count == 0 {
                Next::Remove
            } else {
                Next::Again
            }
        }
        fn attend(&mut self, _: &mut Reactor) -> Next {
            Next::Again
        }
        fn facet(&mut self) -> &mut dyn Any {
            &mut self.1
        }
    }
    let mut file = tempfile::tempfile().unwrap();
    std::io::Write::write_all(&mut file, &[1; 10_000]).unwrap();
    std::io::Seek::rewind(&mut file).unwrap();
    let read = Notes::new();
    let pages = Pages(file, read.clone());
    let token = bench.reactor.vacancy().unwrap().install(Box::new(pages));
    bench.reactor.notify(token);
    run_until(&mut bench.reactor, |reactor| reactor.registered() == 0);
    assert_eq!(read.all(), [4096, 4096, 1808, 0]);
    drop((bench, end));
    ledger.assert_balanced();
}

/// Contract R-33.
#[test]
fn same_file_watched_twice_is_refused_and_the_first_goes_on() {
    let ledger = DescriptorLedger::open();
    let mut bench = Bench::new();
    let end = bench.add(None);
    let mut vacancy = bench.reactor.vacancy().unwrap();
    vacancy.watch(end.fd.as_fd(), Interest::Readable).unwrap();
    let error = vacancy
        .watch(end.fd.as_fd(), Interest::Readable)
        .unwrap_err();
    assert_eq!(error.raw_os_error(), Some(Errno::EXIST.raw_os_error()));
    drop(vacancy);
    bench.reactor.unwatch(end.fd.as_fd());
    end.add(1);
    bench.turn();
    assert_eq!(bench.notes.all(), ["0 ready"]);
    drop((bench, end));
    ledger.assert_balanced();
}

/// It was taken, and waited for ever.
#[test]
fn descriptor_without_a_source_is_refused_and_leaves_nothing_behind() {
    struct Forgetful;
    impl Descriptor for Forgetful {
        fn ready(&mut self, _: &mut Reactor, _: Readiness) -> Next {
            Next::Keep
        }
        fn facet(&mut self) -> &mut dyn Any {
            self
        }
    }
    let _alone = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    for interest in [Interest::Readable, Interest::Writable, Interest::Both] {
        let error = reactor
            .register(interest, |_| Box::new(Forgetful))
            .unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::InvalidInput);
        assert_eq!(error.to_string(), "descriptor has no source to be watched");
    }
    assert_eq!(reactor.registered(), 0);
    // Where nothing is to be watched, one says so.
    let vacancy = reactor.vacancy().unwrap();
    let token = vacancy.token();
    vacancy.install(Box::new(Forgetful));
    assert!(reactor.is_registered(token));
}

#[test]
fn vacancy_that_is_not_filled_gives_its_slot_up() {
    let _alone = DescriptorLedger::open();
    let mut bench = Bench::new();
    let vacancy = bench.reactor.vacancy().unwrap();
    let token = vacancy.token();
    drop(vacancy);
    assert!(!bench.reactor.is_registered(token));
    assert_eq!(bench.reactor.registered(), 0);
    bench.turn();
    let heir = bench.add(None);
    assert_ne!(heir.token, token);
    assert!(!bench.reactor.is_registered(token));
}

/// The removal was left for the end of the turn, and the event delivered.
/// Contract M-09, R-36.
#[test]
fn removed_descriptor_gets_no_event_from_same_batch() {
    let ledger = DescriptorLedger::open();
    let mut bench = Bench::new();
    let tokens = Rc::new(RefCell::new(Vec::<Token>::new()));
    let mut ends = Vec::new();
    for number in 0..2usize {
        // Whichever is called first removes the other.
        let others = Rc::clone(&tokens);
        let end = bench.add(Some(Box::new(move |_, reactor| {
            let other = others.borrow()[1 - number];
            reactor.remove(other);
            assert!(!reactor.is_registered(other));
            assert!(reactor.get(handle(other)).is_none());
            Next::Keep
        })));
        tokens.borrow_mut().push(end.token);
        ends.push(end);
    }
    for end in &ends {
        end.add(1);
    }
    bench.turn();
    let first = bench.notes.all()[0].clone();
    let other = if first == "0 ready" { "1" } else { "0" };
    assert_eq!(bench.notes.all(), [first, format!("{other} shutdown")]);
    assert_eq!(bench.reactor.registered(), 1);
    assert_eq!(bench.reactor.statistics().stale_events, 1);
    assert_eq!(bench.reactor.statistics().panics, 0);
    drop((bench, ends));
    ledger.assert_balanced();
}

#[test]
fn descriptor_may_remove_itself_by_its_name() {
    let ledger = DescriptorLedger::open();
    let mut bench = Bench::new();
    let name = Rc::new(Cell::new(None));
    let own = Rc::clone(&name);
    let end = bench.add(Some(Box::new(move |_, reactor| {
        reactor.remove(own.get().expect("set before the turn"));
        Next::Again
    })));
    name.set(Some(end.token));
    end.add(1);
    bench.turn();
    assert_eq!(bench.reactor.registered(), 0);
    bench.turn();
    assert_eq!(bench.notes.all(), ["0 ready", "0 shutdown"]);
    drop((bench, end));
    ledger.assert_balanced();
}

/// A turn's events are fetched at once. One of them frees a slot by removing
/// itself, and registers another descriptor: what the batch still holds for the
/// slot's old owner must not reach the new one.
/// Contract W-33.
#[test]
fn token_of_a_removed_descriptor_reaches_nobody_when_the_slot_is_reused() {
    let ledger = DescriptorLedger::open();
    let mut bench = Bench::new();
    let mut stale = Vec::new();
    for _ in 0..20 {
        let end = bench.add(Some(Box::new(|_, _| Next::Remove)));
        end.add(1);
        bench.turn();
        assert!(!bench.reactor.is_registered(end.token));
        stale.push(end);
        let heir = bench.add(None);
        bench.turn();
        let before = bench.notes.len();
        for old in &stale {
            assert_ne!(old.token, heir.token);
            assert!(bench.reactor.get(handle(old.token)).is_none());
            bench.reactor.notify(old.token);
            bench.reactor.notify_later(Duration::ZERO, old.token);
            bench.reactor.remove(old.token);
        }
        bench.turn();
        bench.turn();
        assert_eq!(bench.notes.len(), before);
        assert!(bench.reactor.is_registered(heir.token));
        bench.reactor.remove(heir.token);
        bench.turn();
        stale.push(heir);
    }
    drop((bench, stale));
    ledger.assert_balanced();
}

/// Contract M-09.
#[test]
fn slot_freed_in_a_batch_is_not_reused_within_it() {
    let ledger = DescriptorLedger::open();
    let mut bench = Bench::new();
    let notes = bench.notes.clone();
    let fresh = Rc::new(Cell::new(None));
    let made = Rc::clone(&fresh);
    let (counter, heir_end) = bench.counter();
    let mut heir = Some(counter);
    // It goes, and in the same batch its successor comes.
    let first = bench.add(Some(Box::new(move |_, reactor| {
        if let Some(heir) = heir.take() {
            let made = Rc::clone(&made);
            reactor.defer(move |reactor| {
                let token = reactor
                    .register(Interest::Readable, |_| Box::new(heir))
                    .unwrap();
                made.set(Some(token));
            });
        }
        Next::Remove
    })));
    first.add(1);
    bench.turn();
    let heir = fresh.get().expect("registered");
    assert_ne!(
        heir.to_bits() & 0xFF_FFFF,
        first.token.to_bits() & 0xFF_FFFF
    );
    bench.turn();
    assert_eq!(notes.all(), ["1 ready"]);
    drop((bench, first, heir_end));
    ledger.assert_balanced();
}

#[test]
fn access_through_a_handle_is_followed_by_one_attend() {
    let _alone = DescriptorLedger::open();
    let mut bench = Bench::new();
    let end = bench.add(None);
    for _ in 0..3 {
        assert_eq!(bench.reactor.get(handle(end.token)), Some(&mut 0));
        bench.reactor.notify(end.token);
    }
    bench.turn();
    assert_eq!(bench.notes.all(), ["0 attend"]);
    // A view of another type reaches nothing.
    let wrong: Handle<String> = Handle::new(end.token, |facet| facet.downcast_mut());
    assert!(bench.reactor.get(wrong).is_none());
}

#[test]
fn timer_of_a_descriptor_reaches_it_and_is_harmless_afterwards() {
    let _alone = DescriptorLedger::open();
    let mut bench = Bench::new();
    let end = bench.add(None);
    bench.reactor.notify_later(Duration::ZERO, end.token);
    bench.turn();
    assert_eq!(bench.notes.all(), ["0 timer"]);
    let late = bench
        .reactor
        .notify_later(Duration::from_millis(1), end.token);
    bench.reactor.remove(end.token);
    run_until(&mut bench.reactor, |reactor| !late.is_active(reactor));
    assert_eq!(bench.notes.all(), ["0 timer", "0 shutdown"]);
}

/// Contract R-31.
#[test]
fn failing_descriptor_is_told_and_the_rest_of_the_batch_goes_on() {
    let ledger = DescriptorLedger::open();
    let mut bench = Bench::new();
    let mut ends = Vec::new();
    for number in 0..6 {
        let end = bench.add((number % 2 == 0).then(|| -> Script {
            Box::new(|_: &mut Counter, _: &mut Reactor| -> Next { panic!("{PANIC}") })
        }));
        end.add(1);
        ends.push(end);
    }
    bench.turn();
    let notes = bench.notes.all();
    for number in 0..6 {
        assert!(notes.contains(&format!("{number} ready")));
        assert_eq!(
            notes.contains(&format!("{number} {PANIC}")),
            number % 2 == 0
        );
    }
    assert_eq!(bench.reactor.registered(), 3);
    assert_eq!(bench.reactor.statistics().panics, 3);
    drop((bench, ends));
    ledger.assert_balanced();
}

#[test]
fn descriptors_are_told_of_the_shutdown_youngest_first() {
    let ledger = DescriptorLedger::open();
    let mut bench = Bench::new();
    let ends: Vec<End> = (0..4).map(|_| bench.add(None)).collect();
    bench.reactor.call_soon(|reactor| reactor.stop().unwrap());
    bench.reactor.run().unwrap();
    assert_eq!(
        bench.notes.all(),
        ["3 shutdown", "2 shutdown", "1 shutdown", "0 shutdown"]
    );
    drop((bench, ends));
    ledger.assert_balanced();
}

#[test]
fn hang_up_of_a_pipe_is_reported() {
    let ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    struct Pipe(OwnedFd, Notes<(bool, usize)>);
    impl Descriptor for Pipe {
        fn ready(&mut self, _: &mut Reactor, readiness: Readiness) -> Next {
            let mut bytes = [0; 64];
            let count = read(&self.0, &mut bytes).unwrap_or(usize::MAX);
            self.1
                .push((readiness.intersects(Readiness::READ_CLOSED), count));
            if count == 0 { Next::Remove } else { Next::Keep }
        }
        fn source(&self) -> Option<BorrowedFd<'_>> {
            Some(self.0.as_fd())
        }
        fn facet(&mut self) -> &mut dyn Any {
            &mut self.1
        }
    }
    let (reads, writes) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    let notes = Notes::new();
    let pipe = Pipe(reads, notes.clone());
    reactor
        .register(Interest::Readable, |_| Box::new(pipe))
        .unwrap();
    write(&writes, b"abc").unwrap();
    reactor.turn(Some(Duration::ZERO));
    drop(writes);
    run_until(&mut reactor, |reactor| reactor.registered() == 0);
    assert_eq!(notes.all(), [(false, 3), (true, 0)]);
    drop(reactor);
    ledger.assert_balanced();
}
