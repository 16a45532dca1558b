//! A handle whose descriptor is gone answers `None`, for ever.

use std::cell::Cell;
use std::collections::HashSet;
use std::rc::Rc;
use std::time::Duration;

use bowline::{
    Address, Context, DelayedCallError, DetachError, ProducerKind, ProducerRef, Protocol, Reactor,
    SendDescriptorErrorKind, Transport, TransportHandle, Transports, UnixAddress, UnixStream,
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
