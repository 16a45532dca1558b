//! Calls when a descriptor is readable, and counters.

use std::cell::Cell;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::time::Duration;

use bowline::Reactor;
use bowline::descriptor::{EventCounter, Next};

use crate::support::{DescriptorLedger, run_until, run_until_quiet};
use crate::{Notes, PANIC};

#[test]
fn a_call_is_made_once_and_given_its_source() {
    let _ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let (mut near, far) = UnixStream::pair().unwrap();
    let notes: Notes<Vec<u8>> = Notes::new();
    let noted = notes.clone();
    let call = reactor
        .call_when_readable(far, move |_, mut far| {
            let mut word = [0; 3];
            far.read_exact(&mut word).unwrap();
            noted.push(word.to_vec());
        })
        .unwrap();
    run_until_quiet(&mut reactor);
    assert!(call.is_waiting(&mut reactor) && notes.len() == 0);
    near.write_all(b"oneand more").unwrap();
    run_until(&mut reactor, |_| notes.len() == 1);
    run_until_quiet(&mut reactor);
    assert_eq!(notes.all(), [b"one"]);
    assert!(!call.is_waiting(&mut reactor));
    assert!(call.cancel(&mut reactor).is_none());
    assert_eq!(reactor.registered(), 0);
}

#[test]
fn what_is_readable_already_is_told_and_so_is_the_end() {
    let _ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let called = Rc::new(Cell::new(0));
    let (mut near, far) = UnixStream::pair().unwrap();
    near.write_all(b"x").unwrap();
    let (gone, end) = UnixStream::pair().unwrap();
    drop(gone);
    for source in [far, end] {
        let count = Rc::clone(&called);
        let call = move |_: &mut Reactor, _: UnixStream| count.set(count.get() + 1);
        reactor.call_when_readable(source, call).unwrap();
    }
    // What epoll does not know is readable, too.
    let count = Rc::clone(&called);
    let file = File::open("/proc/self/exe").unwrap();
    let call = move |_: &mut Reactor, mut file: File| {
        let mut magic = [0; 4];
        file.read_exact(&mut magic).unwrap();
        assert_eq!(&magic, b"\x7fELF");
        count.set(count.get() + 1);
    };
    reactor.call_when_readable(file, call).unwrap();
    run_until(&mut reactor, |_| called.get() == 3);
}

#[test]
fn a_call_that_is_cancelled_is_not_made_and_gives_its_source_back() {
    let _ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let (mut near, far) = UnixStream::pair().unwrap();
    let call = reactor
        .call_when_readable(far, |_, _| unreachable!("it was cancelled"))
        .unwrap();
    near.write_all(b"x").unwrap();
    let far = call.clone().cancel(&mut reactor).unwrap();
    run_until_quiet(&mut reactor);
    assert!(call.cancel(&mut reactor).is_none());
    // It can be watched again, as it is not watched any more.
    let called = Rc::new(Cell::new(false));
    let noted = Rc::clone(&called);
    reactor
        .call_when_readable(far, move |_, _| noted.set(true))
        .unwrap();
    run_until(&mut reactor, |_| called.get());
    // Each time, too.
    let (near, far) = UnixStream::pair().unwrap();
    let call = reactor
        .call_each_time_readable(far, |_, _| unreachable!("it was cancelled"))
        .unwrap();
    drop(near);
    assert!(call.cancel(&mut reactor).is_some());
    run_until_quiet(&mut reactor);
    assert_eq!(reactor.registered(), 0);
}

#[test]
fn a_call_is_made_each_time_until_nothing_is_left() {
    let _ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let (mut near, far) = UnixStream::pair().unwrap();
    let notes: Notes<u8> = Notes::new();
    let noted = notes.clone();
    // One byte of what is there, so that no event says that there is more.
    let call = reactor
        .call_each_time_readable(far, move |_, far| {
            let mut byte = [0];
            match far.read(&mut byte).unwrap() {
                0 => Next::Remove,
                _ => {
                    noted.push(byte[0]);
                    Next::Keep
                }
            }
        })
        .unwrap();
    for round in 1..=3 {
        near.write_all(b"abc").unwrap();
        run_until(&mut reactor, |_| notes.len() == 3 * round);
        let turns = reactor.statistics().turns;
        run_until_quiet(&mut reactor);
        assert!(reactor.statistics().turns - turns < 10, "the loop sleeps");
    }
    assert_eq!(notes.all(), b"abcabcabc");
    drop(near);
    run_until(&mut reactor, |reactor| !call.is_waiting(reactor));
    assert_eq!(reactor.registered(), 0);
}

#[test]
fn a_source_that_never_blocks_takes_turns_with_others() {
    let _ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let count = Rc::new(Cell::new(0));
    let counted = Rc::clone(&count);
    let zeros = File::open("/dev/zero").unwrap();
    reactor
        .call_each_time_readable(zeros, move |_, zeros| {
            zeros.read_exact(&mut [0; 16]).unwrap();
            counted.set(counted.get() + 1);
            Next::Keep
        })
        .unwrap();
    for _ in 0..10 {
        let before = count.get();
        reactor.turn(Some(Duration::ZERO));
        assert!(count.get() - before <= 1, "at most once in a turn");
    }
    assert!(count.get() >= 8);
}

#[test]
fn a_call_that_panics_is_the_last_and_costs_nothing_else() {
    let _ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let (mut near, far) = UnixStream::pair().unwrap();
    near.write_all(b"x").unwrap();
    let call = reactor
        .call_each_time_readable(far, |_, _| panic!("{PANIC}"))
        .unwrap();
    let (mut other, far) = UnixStream::pair().unwrap();
    other.write_all(b"x").unwrap();
    let once = reactor
        .call_when_readable(far, |_, _| panic!("{PANIC}"))
        .unwrap();
    run_until(&mut reactor, |reactor| {
        !call.is_waiting(reactor) && !once.is_waiting(reactor)
    });
    assert_eq!(reactor.statistics().panics, 2);
    assert_eq!(reactor.registered(), 0);
}

#[test]
fn a_descriptor_that_is_watched_already_is_refused() {
    let _ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let (_near, far) = UnixStream::pair().unwrap();
    let far = Rc::new(OwnedFd::from(far));
    reactor
        .call_when_readable(Rc::clone(&far), |_, _| {})
        .unwrap();
    let error = reactor
        .call_when_readable(Rc::clone(&far), |_, _| {})
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AlreadyExists);
    let copy = far.try_clone().unwrap();
    reactor.call_when_readable(copy, |_, _| {}).unwrap();
    assert_eq!(reactor.registered(), 2);
}

#[test]
fn what_waits_is_dropped_with_the_reactor_uncalled() {
    let _ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let (near, far) = UnixStream::pair().unwrap();
    reactor
        .call_when_readable(far, |_, _| unreachable!("nothing came"))
        .unwrap();
    reactor.call_soon(|reactor| reactor.stop().unwrap());
    reactor.run().unwrap();
    drop(reactor);
    let mut near = near;
    assert_eq!(near.read(&mut [0]).unwrap(), 0, "its other end is closed");
}

#[test]
fn a_counter_counts_and_is_readable_while_it_is_not_zero() {
    let _ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let counter = EventCounter::new().unwrap();
    assert_eq!(counter.take().unwrap(), 0);
    counter.add(2).unwrap();
    counter.add(3).unwrap();
    assert_eq!((counter.take().unwrap(), counter.take().unwrap()), (5, 0));
    let theirs = counter.try_clone().unwrap();
    let sum = Rc::new(Cell::new(0));
    let summed = Rc::clone(&sum);
    reactor
        .call_each_time_readable(counter, move |_, counter| {
            let count = counter.take().unwrap();
            assert!(count > 0, "called for nothing");
            summed.set(summed.get() + count);
            Next::Keep
        })
        .unwrap();
    let thread = std::thread::spawn(move || {
        for _ in 0..1_000 {
            theirs.add(1).unwrap();
        }
    });
    run_until(&mut reactor, |_| sum.get() == 1_000);
    thread.join().unwrap();
}

#[test]
fn a_counter_from_elsewhere_is_known_by_what_it_is() {
    let _ledger = DescriptorLedger::open();
    let counter = EventCounter::new().unwrap();
    counter.add(u64::MAX - 1).unwrap();
    assert_eq!(counter.add(1).unwrap_err().kind(), ErrorKind::WouldBlock);
    let invalid = counter.add(u64::MAX).unwrap_err();
    assert_eq!(invalid.kind(), ErrorKind::InvalidInput);
    let copy = counter.as_fd().try_clone_to_owned().unwrap();
    let received = EventCounter::from_descriptor(copy).unwrap();
    assert_eq!(received.take().unwrap(), u64::MAX - 1);
    let (pipe, _writing) = std::io::pipe().unwrap();
    assert!(EventCounter::from_descriptor(pipe.into()).is_err());
    // One that blocks could hold up the loop.
    let flags = rustix::event::EventfdFlags::CLOEXEC;
    let blocking = rustix::event::eventfd(7, flags).unwrap();
    let back = EventCounter::from_descriptor(blocking).unwrap_err();
    let mut count = [0; 8];
    rustix::io::read(&back, &mut count).unwrap();
    assert_eq!(u64::from_ne_bytes(count), 7);
    // Other implementations count in the same way.
    let flags = flags | rustix::event::EventfdFlags::NONBLOCK;
    let theirs = rustix::event::eventfd(0, flags).unwrap();
    let ours = EventCounter::from_descriptor(theirs.try_clone().unwrap()).unwrap();
    rustix::io::write(&theirs, &9_u64.to_ne_bytes()).unwrap();
    assert_eq!(ours.take().unwrap(), 9);
}
