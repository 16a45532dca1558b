//! What a connection is made of when it travels, and how it goes on there.

use std::cell::RefCell;
use std::fs::File;
use std::io::{Read, Write};
use std::net::TcpStream as StdTcpStream;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::rc::Rc;

use bowline::handoff::pool::PassedConnection;
use bowline::{
    Detached, ProducerKind, ProducerRef, Reactor, TransportHandle, Transports, UnixTransportHandle,
};
use bowline::{Tcp, Unix};

use super::raw::tcp_pair;
use crate::support::{DescriptorLedger, Record, Recorder, run_until, run_until_quiet, socketpair};

/// More than the kernel takes of a connection whose peer does not read.
const MUCH: usize = 16 << 20;

fn detach(reactor: &mut Reactor, handle: TransportHandle) -> Detached<Recorder> {
    let taken = Rc::new(RefCell::new(None));
    let result = Rc::clone(&taken);
    reactor.detach::<Recorder>(handle, move |_, detached| {
        *result.borrow_mut() = Some(detached);
    });
    run_until(reactor, |_| taken.borrow().is_some());
    taken.take().expect("told").expect("connected")
}

/// Has a connection keep bytes that were read and not delivered, and bytes that
/// the kernel does not take; then takes it apart.
fn detach_with_bytes(reactor: &mut Reactor, handle: TransportHandle) -> Detached<Recorder> {
    let transport = reactor.get(handle).expect("connected");
    transport.pause_producing();
    transport.push_back(b" put back".to_vec());
    transport.write_owned(vec![7; MUCH]);
    run_until_quiet(reactor);
    let detached = detach(reactor, handle);
    assert!(!detached.unsent.is_empty(), "the kernel took everything");
    detached
}

/// The peer reads all that was written before the connection moved, then what
/// was written after.
fn expect_all_then(reactor: &mut Reactor, peer: &mut impl Read, last: &[u8]) {
    let mut got = Vec::new();
    let mut buffer = vec![0; 1 << 16];
    run_until(reactor, |_| {
        while let Ok(count) = peer.read(&mut buffer) {
            assert_ne!(count, 0, "ended for the peer");
            got.extend_from_slice(&buffer[..count]);
        }
        got.len() >= MUCH + last.len()
    });
    assert!(got[..MUCH].iter().all(|byte| *byte == 7));
    assert_eq!(&got[MUCH..], last);
}

#[test]
fn a_connection_travels_with_its_peer_and_the_bytes_on_either_side() {
    let _ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let (mut client, accepted): (StdTcpStream, OwnedFd) = tcp_pair();
    client.set_nonblocking(true).unwrap();
    let address = client.local_addr().unwrap();
    let handle = reactor
        .adopt_tcp_stream(accepted, Recorder::default())
        .unwrap();
    let detached = detach_with_bytes(&mut reactor, handle);
    let unsent = detached.unsent.len();
    let connection = PassedConnection::from_detached(detached, b"read".to_vec());
    let connection = connection.expect("nothing is queued");
    assert_eq!(connection.peer, Some(address));
    assert_eq!(connection.label, 0);
    assert_eq!(connection.read, b"read put back");
    assert_eq!(connection.unsent, vec![7; unsent]);

    // As in another process, which has a reactor of its own.
    let mut other = Reactor::new().unwrap();
    let record = Record::default();
    let handle = connection
        .adopt(&mut other, Tcp, Recorder::new(&record))
        .unwrap();
    client.write_all(b" sent").unwrap();
    run_until(&mut other, |_| record.data() == b"read put back sent");
    other.get(handle).unwrap().write(b"new");
    expect_all_then(&mut other, &mut client, b"new");
}

#[test]
fn a_connection_over_a_unix_socket_travels_with_its_bytes_too() {
    let _ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let (ours, mut theirs) = socketpair();
    let handle = adopt_unix(&mut reactor, ours, &Record::default());
    let handle = reactor.get(handle).unwrap().handle();
    let detached = detach_with_bytes(&mut reactor, handle);
    let unsent = detached.unsent.len();
    let connection = PassedConnection::from_detached(detached, b"read".to_vec());
    let connection = connection.expect("nothing is queued");
    assert_eq!(connection.peer, None);
    assert_eq!(connection.read, b"read put back");
    assert_eq!(connection.unsent, vec![7; unsent]);

    let mut other = Reactor::new().unwrap();
    let record = Record::default();
    let handle = connection
        .adopt(&mut other, Unix, Recorder::new(&record))
        .unwrap();
    theirs.write_all(b" sent").unwrap();
    run_until(&mut other, |_| record.data() == b"read put back sent");
    other.get(handle).unwrap().write(b"new");
    expect_all_then(&mut other, &mut theirs, b"new");
}

fn adopt_unix(
    reactor: &mut Reactor,
    socket: StdUnixStream,
    record: &Record,
) -> UnixTransportHandle {
    reactor
        .adopt_unix_stream(socket.into(), Recorder::new(record))
        .unwrap()
}

/// Each of them alone, so that neither is let pass for the lack of the other.
#[test]
fn a_connection_with_descriptors_or_a_producer_does_not_travel() {
    let _ledger = DescriptorLedger::open();
    let file = || File::open("/proc/self/comm").unwrap();
    let keeps: [fn(&mut Reactor, UnixTransportHandle, File); 3] = [
        |reactor, handle, file| {
            let transport = reactor.get(handle).unwrap();
            transport.send_file_descriptor(file.into()).unwrap();
        },
        // Its descriptor has left, the rest of the message has not: nothing else may
        // travel with that, which nobody else would know.
        |reactor, handle, file| {
            let transport = reactor.get(handle).unwrap();
            let message = vec![7; MUCH];
            transport
                .write_with_descriptors(&message, vec![file.into()])
                .unwrap();
            run_until_quiet(reactor);
            let transport = reactor.get(handle).unwrap();
            assert_eq!(transport.unsent_descriptors(), 0);
            assert!(transport.unsent_bytes() > 0, "the kernel took everything");
        },
        |reactor, handle, _| {
            let transport = reactor.get(handle).unwrap();
            transport
                .register_producer(ProducerRef::Protocol, ProducerKind::Push)
                .unwrap();
        },
    ];
    for keep in keeps {
        let mut reactor = Reactor::new().unwrap();
        let (ours, mut theirs) = socketpair();
        let handle = adopt_unix(&mut reactor, ours, &Record::default());
        keep(&mut reactor, handle, file());
        let handle = reactor.get(handle).unwrap().handle();
        let detached = detach(&mut reactor, handle);
        assert!(PassedConnection::from_detached(detached, Vec::new()).is_none());
        // It is closed: the peer gets to the end.
        theirs.set_nonblocking(false).unwrap();
        theirs.read_to_end(&mut Vec::new()).unwrap();
    }
}
