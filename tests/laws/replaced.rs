//! A callback that puts another reactor in the place of its own costs its connection,
//! which is told, and nobody else anything.

use std::cell::RefCell;
use std::io::{Read, Write};
use std::mem;
use std::os::unix::net::UnixStream as Client;
use std::rc::Rc;
use std::time::Duration;

use bowline::error::RunError;
use bowline::{CloseReason, Context, Pipe, Protocol, Reactor, Transport, Transports, Turn};

use crate::support::{DescriptorLedger, Record, Recorder, run_until, socketpair};

/// What stands elsewhere, to be swapped with what is here.
type Other = Rc<RefCell<Option<Reactor>>>;

struct Swaps {
    other: Other,
    record: Record,
    then_panics: bool,
}

fn swap(here: &mut Reactor, other: &Other) {
    if let Some(other) = &mut *other.borrow_mut() {
        mem::swap(here, other);
    }
}

impl<T: Transport> Protocol<T> for Swaps {
    fn data_received(&mut self, cx: &mut Context<'_, T>, _: &[u8]) {
        swap(cx.reactor, &self.other);
        assert!(!self.then_panics, "on purpose, in a test");
    }

    fn connection_lost(&mut self, _: &mut Context<'_, T>, reason: &CloseReason) {
        assert!(matches!(reason, CloseReason::Panicked(_)), "{reason}");
        self.record
            .push(crate::support::Event::Lost(reason.to_string()));
    }
}

/// A connection that says nothing, and its peer.
fn bystander(reactor: &mut Reactor) -> (Record, Client) {
    let (ours, theirs) = socketpair();
    let record = Record::default();
    reactor
        .adopt_unix_stream(ours.into(), Recorder::new(&record))
        .unwrap();
    (record, theirs)
}

fn hears(reactor: &mut Reactor, bystander: &mut (Record, Client)) {
    let before = bystander.0.data().len();
    bystander.1.write_all(b"!").unwrap();
    run_until(reactor, |_| bystander.0.data().len() > before);
    assert!(!bystander.0.is_lost());
}

#[test]
fn a_callback_that_replaces_the_reactor_costs_its_own_connection_only() {
    for then_panics in [false, true] {
        let ledger = DescriptorLedger::open();
        let (mut reactor, mut second) = (Reactor::new().unwrap(), Reactor::new().unwrap());
        let other = Other::default();
        let record = Record::default();
        // Some before and some after the one that swaps, all ready in one turn with it.
        let mut firsts: Vec<_> = (0..3).map(|_| bystander(&mut reactor)).collect();
        let (ours, mut theirs) = socketpair();
        let protocol = Swaps {
            other: Rc::clone(&other),
            record: record.clone(),
            then_panics,
        };
        reactor.adopt_unix_stream(ours.into(), protocol).unwrap();
        firsts.extend((0..3).map(|_| bystander(&mut reactor)));
        let mut seconds: Vec<_> = (0..3).map(|_| bystander(&mut second)).collect();
        for (reactor, bystanders) in [(&mut reactor, &mut firsts), (&mut second, &mut seconds)] {
            reactor.start().unwrap();
            for bystander in bystanders {
                hears(reactor, bystander);
            }
        }
        *other.borrow_mut() = Some(second);
        theirs.write_all(b"x").unwrap();
        for (_, peer) in &mut firsts {
            peer.write_all(b"?").unwrap();
        }
        assert_eq!(reactor.turn(Some(Duration::ZERO)), Turn::Continue);
        assert_eq!(record.summary().len(), 1, "told once");
        assert_eq!(reactor.registered(), 3, "the other one's");
        for bystander in &mut seconds {
            hears(&mut reactor, bystander);
        }
        // What was fetched for the first and not delivered is not lost.
        let mut first = other.borrow_mut().take().unwrap();
        run_until(&mut first, |_| {
            firsts.iter().all(|(record, _)| record.data().len() == 2)
        });
        assert_eq!(first.registered(), 6, "and no slot without anything in it");
        for bystander in &mut firsts {
            hears(&mut first, bystander);
        }
        assert_eq!(theirs.read(&mut [0]).unwrap_or(0), 0, "closed");
        assert_eq!(record.summary().len(), 1, "once");
        drop((reactor, first, firsts, seconds, theirs));
        ledger.assert_balanced();
    }
}

/// Wherever a callback is given the reactor.
#[test]
fn a_reactor_that_was_replaced_can_be_turned_where_it_is() {
    type Way = fn(&mut Reactor, Other);
    let ways: [(&str, Way); 3] = [
        ("a timer", |reactor, other| {
            reactor.call_later(Duration::ZERO, move |reactor| swap(reactor, &other));
        }),
        ("a call", |reactor, other| {
            reactor.call_soon(move |reactor| swap(reactor, &other));
        }),
        ("a deferred call", |reactor, other| {
            reactor.defer(move |reactor| swap(reactor, &other));
        }),
    ];
    for (what, way) in ways {
        let _alone = DescriptorLedger::open();
        let (mut reactor, mut second) = (Reactor::new().unwrap(), Reactor::new().unwrap());
        let mut first = bystander(&mut reactor);
        let mut others = bystander(&mut second);
        reactor.start().unwrap();
        hears(&mut reactor, &mut first);
        let other = Other::default();
        *other.borrow_mut() = Some(second);
        way(&mut reactor, Rc::clone(&other));
        first.1.write_all(b"?").unwrap();
        // Looks at the clock, for the timer.
        reactor.turn(Some(Duration::ZERO));
        reactor.turn(Some(Duration::ZERO));
        let mut here = other.borrow_mut().take().unwrap();
        // Back where it was, too.
        mem::swap(&mut reactor, &mut here);
        run_until(&mut reactor, |_| first.0.data() == b"!?");
        hears(&mut reactor, &mut first);
        here.start().unwrap();
        hears(&mut here, &mut others);
        // And it still does not turn inside of its own callback.
        reactor.call_soon(|reactor| {
            reactor.call_soon(|_| panic!("nested"));
            assert_eq!(reactor.turn(Some(Duration::ZERO)), Turn::Continue);
            reactor.crash().unwrap();
        });
        reactor.turn(Some(Duration::ZERO));
        assert_eq!(reactor.statistics().panics, 0, "{what}");
    }
}

#[test]
fn a_run_says_that_its_reactor_was_replaced() {
    let _alone = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let other = Other::default();
    *other.borrow_mut() = Some(Reactor::new().unwrap());
    let swapped = Rc::clone(&other);
    reactor.call_soon(move |reactor| swap(reactor, &swapped));
    assert!(matches!(reactor.run(), Err(RunError::Replaced)));
    // It runs where it is, once it is told to begin anew.
    let mut first = other.borrow_mut().take().unwrap();
    first.crash().unwrap();
    first.call_soon(|reactor| reactor.stop().unwrap());
    first.run().unwrap();
}

/// That it could be written was fetched for what was replaced, and has to be told again.
#[test]
fn a_connection_over_two_pipes_goes_on_after_the_reactor_was_replaced() {
    const LARGE: usize = 1 << 20;
    let ledger = DescriptorLedger::open();
    let (mut reactor, second) = (Reactor::new().unwrap(), Reactor::new().unwrap());
    let other = Other::default();
    let (ours, mut theirs) = socketpair();
    let protocol = Swaps {
        other: Rc::clone(&other),
        record: Record::default(),
        then_panics: false,
    };
    reactor.adopt_unix_stream(ours.into(), protocol).unwrap();
    let (reading, mut writer) = std::io::pipe().unwrap();
    let (mut reader, writing) = std::io::pipe().unwrap();
    let record = Record::default();
    let ends = (reading.into(), writing.into());
    reactor
        .adopt(Pipe::pair(), ends, Recorder::new(&record))
        .unwrap();
    reactor.start().unwrap();
    reactor.turn(Some(Duration::ZERO));
    let handle = record.handle(0);
    reactor.get(handle).unwrap().write(&vec![b'x'; LARGE]);
    for _ in 0..3 {
        reactor.turn(Some(Duration::ZERO));
    }
    // In one turn: the swap, and that there is room, and something to read.
    *other.borrow_mut() = Some(second);
    theirs.write_all(b"x").unwrap();
    writer.write_all(b"?").unwrap();
    let mut left = LARGE - reader.read(&mut vec![0; LARGE]).unwrap();
    assert!(left > 0, "all of it fits into a pipe");
    reactor.turn(Some(Duration::ZERO));
    let mut first = other.borrow_mut().take().unwrap();
    run_until(&mut first, |_| record.data() == b"?");
    while left > 0 {
        run_until(&mut first, |_| {
            rustix::io::ioctl_fionread(&reader).unwrap() > 0
        });
        left -= reader.read(&mut vec![0; LARGE]).unwrap();
    }
    drop((reactor, first, theirs, writer, reader));
    ledger.assert_balanced();
}
