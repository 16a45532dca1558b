//! A handle whose descriptor is gone answers `None`, for ever.

use std::cell::Cell;
use std::collections::HashSet;
use std::rc::Rc;
use std::time::Duration;

use bowline::error::{DelayedCallError, DetachError, SendDescriptorErrorKind};
use bowline::lifecycle::{Phase, SystemEvent};
use bowline::{
    Address, Context, ProducerKind, ProducerRef, Protocol, Reactor, Transport, TransportHandle,
    Transports, UnixAddress, UnixStream,
};

use crate::support::{DescriptorLedger, Record, Recorder, run_until, run_until_quiet, socketpair};

/// Contract R-39, W-33.
#[test]
fn stale_handle_never_reaches_who_took_the_slot() {
    let ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let mut stale = HashSet::new();
    let mut peers = Vec::new();
    for round in 0..50 {
        let (ours, theirs) = socketpair();
        let record = Record::default();
        let handle = reactor
            .adopt_unix_stream(ours.into(), Recorder::new(&record))
            .unwrap();
        assert!(stale.insert(handle), "the name was given before");
        reactor.get(handle).unwrap().abort_connection();
        run_until(&mut reactor, |_| record.is_lost());
        // Another takes the slot; of none of those before it is reached.
        let (ours, kept) = socketpair();
        let heir = Record::default();
        let living = reactor
            .adopt_unix_stream(ours.into(), Recorder::new(&heir))
            .unwrap();
        for old in &stale {
            assert!(reactor.get(*old).is_none(), "round {round}");
            assert!(!reactor.is_registered(old.token()));
        }
        assert!(reactor.get(living).is_some());
        reactor.get(living).unwrap().abort_connection();
        run_until(&mut reactor, |_| heir.is_lost());
        stale.insert(living);
        peers.push((theirs, kept));
    }
    assert_eq!(reactor.registered(), 0);
    drop((reactor, peers));
    ledger.assert_balanced();
}

/// Contract F-25.
#[test]
fn what_is_asked_of_the_lost_is_refused_and_comes_back() {
    let ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let (ours, theirs) = socketpair();
    let record = Record::default();
    let handle = reactor
        .adopt_unix_stream(ours.into(), Recorder::new(&record))
        .unwrap();
    let transport = reactor.get(handle).unwrap();
    transport.abort_connection();
    // Aborted, and not yet told so.
    let null = std::fs::File::open("/dev/null").unwrap();
    let error = transport.send_file_descriptor(null.into()).unwrap_err();
    assert_eq!(error.kind, SendDescriptorErrorKind::NotConnected);
    assert_eq!(error.descriptors.len(), 1);
    assert_eq!(transport.write(b"x"), bowline::WriteStatus::Refused);
    assert!(
        transport
            .register_producer(ProducerRef::Protocol, ProducerKind::Push)
            .is_err()
    );
    let dynamic = transport.handle();
    run_until(&mut reactor, |_| record.is_lost());
    assert_eq!(record.summary(), ["made", "stopped", "lost aborted by us"]);
    let answers = Rc::new(std::cell::RefCell::new(Vec::new()));
    let seen = Rc::clone(&answers);
    reactor.detach::<Recorder>(dynamic, move |_, result| {
        seen.borrow_mut().push(result.err())
    });
    reactor.call_protocol::<UnixStream, Recorder>(dynamic, |_, _| panic!("it is gone"));
    reactor.notify(dynamic.token());
    reactor.remove(dynamic.token());
    let timer = reactor.notify_later(Duration::ZERO, dynamic.token());
    run_until(&mut reactor, |reactor| !timer.is_active(reactor));
    assert_eq!(timer.cancel(&mut reactor), Err(DelayedCallError));
    assert!(matches!(answers.borrow()[..], [Some(DetachError::Lost)]));
    assert_eq!(reactor.statistics().panics, 0);
    drop((reactor, theirs, error));
    ledger.assert_balanced();
}

#[test]
fn handles_of_listeners_and_connectors_go_stale_too() {
    let ledger = DescriptorLedger::open();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let mut reactor = Reactor::new().unwrap();
    let record = Record::default();
    let recorder = Recorder::new(&record);
    let factory = move |_: &Address| recorder.clone();
    let listener = reactor
        .listen_unix(UnixAddress::Path(path.clone()), factory.clone())
        .unwrap();
    let connector = reactor
        .connect_unix(UnixAddress::Path(path), factory)
        .unwrap();
    run_until(&mut reactor, |_| record.summary().len() == 2);
    reactor.get(listener).unwrap().stop_listening();
    let client = record.handle(0);
    reactor.get(client).unwrap().abort_connection();
    run_until(&mut reactor, |reactor| reactor.registered() == 0);
    assert!(reactor.get(listener).is_none());
    assert!(reactor.get(connector).is_none());
    drop((reactor, directory));
    ledger.assert_balanced();
}

/// Inside its own callback a transport is at hand through the context.
struct LooksForItself {
    record: Record,
}

impl<T: Transport> Protocol<T> for LooksForItself {
    fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
        let handle = cx.transport.handle();
        assert!(cx.reactor.get(handle).is_none());
        assert!(cx.reactor.is_registered(handle.token()));
        let found = cx.get(handle).expect("its own");
        found.write(data);
        self.record.push(crate::support::Event::Data(data.to_vec()));
    }
}

#[test]
fn own_handle_is_found_through_the_context_only() {
    let _alone = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let (ours, mut theirs) = socketpair();
    let record = Record::default();
    let protocol = LooksForItself {
        record: record.clone(),
    };
    reactor.adopt_unix_stream(ours.into(), protocol).unwrap();
    std::io::Write::write_all(&mut theirs, b"echo").unwrap();
    run_until(&mut reactor, |_| !record.data().is_empty());
    let mut echo = [0; 4];
    std::io::Read::read_exact(&mut theirs, &mut echo).unwrap();
    assert_eq!(&echo, b"echo");
    assert_eq!(reactor.statistics().panics, 0);
}

/// Pauses the other connection as soon as it receives anything.
struct PausesTheOther {
    other: Rc<Cell<Option<TransportHandle>>>,
    record: Record,
}

impl<T: Transport> Protocol<T> for PausesTheOther {
    fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
        self.record.push(crate::support::Event::Data(data.to_vec()));
        let other = self.other.get().expect("set before the turn");
        cx.get(other).expect("it is there").pause_producing();
    }
}

/// Contract R-37, W-34: both have data, and both are watched for writing too.
#[test]
fn paused_by_another_of_the_same_batch_receives_nothing() {
    let ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let record = Record::default();
    let names = [Rc::new(Cell::new(None)), Rc::new(Cell::new(None))];
    let mut peers = Vec::new();
    for number in 0..2 {
        let (ours, theirs) = socketpair();
        let protocol = PausesTheOther {
            other: Rc::clone(&names[1 - number]),
            record: record.clone(),
        };
        let handle = reactor.adopt_unix_stream(ours.into(), protocol).unwrap();
        names[number].set(Some(reactor.get(handle).unwrap().handle()));
        peers.push(theirs);
    }
    run_until_quiet(&mut reactor);
    for (peer, name) in peers.iter_mut().zip(&names) {
        std::io::Write::write_all(peer, b"go").unwrap();
        let transport = reactor.get(name.get().unwrap()).unwrap();
        let _ = transport.write(&[0; 1_000_000]);
    }
    run_until_quiet(&mut reactor);
    assert_eq!(record.summary(), ["data 2"], "the other was paused");
    drop((reactor, peers));
    ledger.assert_balanced();
}

/// Two reactors of one program, as alike as they can be: what one of them gave a
/// name to has no equal in the other.
#[test]
fn names_of_one_reactor_find_nothing_in_another() {
    let ledger = DescriptorLedger::open();
    let mut one = Reactor::new().unwrap();
    let mut other = Reactor::new().unwrap();
    let records = [Record::default(), Record::default()];
    let mut peers = Vec::new();
    let mut names = Vec::new();
    for (reactor, record) in [&mut one, &mut other].into_iter().zip(&records) {
        let (ours, theirs) = socketpair();
        peers.push(theirs);
        let transport = reactor
            .adopt_unix_stream(ours.into(), Recorder::new(record))
            .unwrap();
        let local = ([127, 0, 0, 1], 0).into();
        let listener = reactor.listen_tcp(local, |_: &Address| Recorder::default());
        let directory = tempfile::tempdir().unwrap();
        let nowhere = UnixAddress::Path(directory.path().join("nowhere"));
        let connector = reactor.connect_unix(nowhere, |_: &Address| Recorder::default());
        names.push((transport, listener.unwrap(), connector.unwrap()));
        reactor.start().unwrap();
        reactor.turn(Some(Duration::ZERO));
    }
    let (transport, listener, connector) = names[0];
    assert!(other.get(transport).is_none());
    assert!(other.get(listener).is_none());
    assert!(other.get(connector).is_none());
    for token in [transport.token(), listener.token(), connector.token()] {
        assert!(!other.is_registered(token));
        other.notify(token);
        other.remove(token);
        other.notify_later(Duration::ZERO, token);
    }
    let of_any_kind = one.get(transport).unwrap().handle();
    other.call_protocol::<UnixStream, Recorder>(of_any_kind, |_, _| panic!("a stranger's"));
    let answer = Rc::new(Cell::new(None));
    let told = Rc::clone(&answer);
    other.detach::<Recorder>(of_any_kind, move |_, result| told.set(result.err()));
    other.detach_listener(listener, |_, result| assert!(result.is_err()));
    run_until_quiet(&mut other);
    assert!(matches!(answer.take(), Some(DetachError::Lost)));
    assert_eq!(records[1].summary(), ["made"]);
    assert!(other.get(names[1].0).is_some());
    assert!(other.get(names[1].1).is_some());
    assert_eq!(other.statistics().panics, 0);
    drop((one, other, peers));
    ledger.assert_balanced();
}

/// The same for what is scheduled and waits.
#[test]
fn calls_of_one_reactor_cannot_be_reached_through_another() {
    let ledger = DescriptorLedger::open();
    let mut one = Reactor::new().unwrap();
    let mut other = Reactor::new().unwrap();
    let second = Duration::from_secs(1);
    let count = Rc::new(Cell::new(0));
    let counting = |count: &Rc<Cell<u32>>| {
        let count = Rc::clone(count);
        move |_: &mut Reactor| count.set(count.get() + 1)
    };
    let theirs = one.call_later(second, |_| {});
    let ours = other.call_later(Duration::ZERO, counting(&count));
    assert!(!theirs.is_active(&other) && theirs.due(&other).is_none());
    assert_eq!(theirs.reset(&mut other, second), Err(DelayedCallError));
    assert_eq!(theirs.delay(&mut other, second), Err(DelayedCallError));
    assert_eq!(theirs.hasten(&mut other, second), Err(DelayedCallError));
    assert_eq!(theirs.cancel(&mut other), Err(DelayedCallError));
    assert!(theirs.is_active(&one) && ours.is_active(&other));

    let theirs = one.add_trigger(Phase::After, SystemEvent::Startup, |_| {});
    other.add_trigger(Phase::After, SystemEvent::Startup, counting(&count));
    assert!(other.remove_trigger(theirs).is_err());
    assert!(one.remove_trigger(theirs).is_ok());

    let theirs = one.call_in_thread(|| (), |_, _| {});
    let told = counting(&count);
    other.call_in_thread(|| (), move |reactor, _| told(reactor));
    assert!(!theirs.cancel(&mut other));

    let runs = Rc::new(Cell::new(0));
    let ran = counting(&runs);
    let periodic = one.call_now_and_every(second, move |reactor, _| ran(reactor));
    periodic.stop(&mut other);
    periodic.set_interval(&mut other, second * 2);
    periodic.reset(&mut other);
    assert!(periodic.is_active() && periodic.interval() == second);

    let pool = bowline::threads::ThreadPool::new(bowline::threads::ThreadPoolSettings::default());
    pool.call_in_thread(&mut one, || (), |_, _| {});
    let refused = counting(&count);
    pool.call_in_thread(
        &mut other,
        || (),
        move |reactor, result| {
            assert!(matches!(
                result,
                Err(bowline::error::ThreadCallError::OtherReactor)
            ));
            refused(reactor);
        },
    );
    other.start().unwrap();
    run_until(&mut other, |_| count.get() == 4);
    assert_eq!(runs.get(), 0);
    one.start().unwrap();
    run_until(&mut one, |_| runs.get() == 1);
    periodic.stop(&mut one);
    assert!(!periodic.is_active());
    for reactor in [&mut one, &mut other] {
        reactor.stop().unwrap();
        run_until_stopped(reactor);
    }
    drop((one, other));
    ledger.assert_balanced();
}

fn run_until_stopped(reactor: &mut Reactor) {
    while reactor.turn(Some(crate::support::DEADLINE)) != bowline::Turn::Stopped {}
}

/// A connection was dropped without a word, its end in no count.
#[test]
fn who_is_removed_by_name_is_told_of_the_end() {
    let ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let (ours, theirs) = socketpair();
    let record = Record::default();
    let handle = reactor
        .adopt_unix_stream(ours.into(), Recorder::new(&record))
        .unwrap();
    let local = ([127, 0, 0, 1], 0).into();
    let listener = reactor
        .listen_tcp(local, |_: &Address| Recorder::default())
        .unwrap();
    reactor.remove(handle.token());
    reactor.remove(listener.token());
    assert!(reactor.get(handle).is_none());
    run_until_quiet(&mut reactor);
    assert_eq!(record.summary(), ["made", "lost reactor stopped"]);
    assert_eq!(reactor.registered(), 0);
    let counts = reactor.descriptor_counts();
    assert_eq!(counts.opened, counts.closed);
    drop((reactor, theirs));
    ledger.assert_balanced();
}
