//! `send_file_descriptor`: descriptors that ride with the earliest bytes.

use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;

use bowline::error::SendDescriptorErrorKind;
use bowline::{
    Address, Context, DescriptorLimits, PassedDescriptor, ProducerKind, ProducerRef, Protocol,
    Reactor, Transport, Transports, UnixTransport, WriteStatus,
};
use rustix::io::Errno;

use crate::peer::{
    OneByOne, Seen, adopt, file, files, identities, identity, receive, receive_all, send_message,
    shrink_send_buffer, transport,
};
use crate::support::faults::{Call, with_faults};
use crate::support::{
    DEADLINE, DescriptorLedger, Event, Record, Recorder, open_descriptors, run_until,
    run_until_quiet,
};

/// Queues all of them.
#[track_caller]
fn queue(transport: &mut dyn UnixTransport, descriptors: Vec<OwnedFd>) {
    for fd in descriptors {
        transport.send_file_descriptor(fd.into()).expect("queued");
    }
}

/// S-01.
#[test]
fn descriptors_arrive_in_order_over_any_number_of_flushes() {
    let ledger = DescriptorLedger::open();
    {
        let mut reactor = Reactor::new().unwrap();
        let (handle, peer) = adopt(&mut reactor, Recorder::default());
        let (sent, expected) = files(9);
        let mut received = Vec::new();
        for fd in sent {
            queue(transport(&mut reactor, handle), vec![fd]);
            transport(&mut reactor, handle).write(b"x");
            run_until_quiet(&mut reactor);
            received.extend(receive_all(&peer));
        }
        let descriptors: Vec<OwnedFd> =
            received.into_iter().flat_map(|it| it.descriptors).collect();
        assert_eq!(identities(&descriptors), expected);
    }
    ledger.assert_balanced();
}

/// S-02, S-40, E-16.
#[test]
fn peer_has_the_same_open_file() {
    let ledger = DescriptorLedger::open();
    {
        let mut reactor = Reactor::new().unwrap();
        let (handle, peer) = adopt(&mut reactor, Recorder::default());
        let ours = file();
        rustix::io::write(&ours, b"shared offset").unwrap();
        let copy = ours.try_clone().unwrap();
        queue(transport(&mut reactor, handle), vec![copy]);
        transport(&mut reactor, handle).write(b"x");
        run_until_quiet(&mut reactor);
        let message = receive(&peer, 10).unwrap();
        let theirs = &message.descriptors[0];
        assert_eq!(identity(theirs), identity(&ours));
        assert_eq!(rustix::fs::tell(theirs).unwrap(), 13);
    }
    ledger.assert_balanced();
}

/// S-03: none at all, be it to send, to copy what is queued, or to ask for an event.
#[test]
fn queueing_makes_no_system_call() {
    with_faults(module_path!(), "queueing_makes_no_system_call", |faults| {
        let mut reactor = Reactor::new().unwrap();
        let (handle, peer) = adopt(&mut reactor, Recorder::default());
        run_until_quiet(&mut reactor);
        let (sent, expected) = files(2);
        faults.during(|| {
            queue(transport(&mut reactor, handle), sent);
            // A long write alone would go to the kernel at once.
            transport(&mut reactor, handle).write(&[7; 20_000]);
        });
        for call in Call::ALL {
            assert_eq!(faults.count(call), 0, "{call:?}");
        }
        assert!(receive(&peer, 1).is_none());
        // The next turn asks for nothing: the socket is known to have room.
        faults.during(|| reactor.turn(Some(Duration::ZERO)));
        assert_eq!(
            (faults.count(Call::EpollCtl), faults.count(Call::SendMsg)),
            (0, 1)
        );
        let message = receive(&peer, 65_536).unwrap();
        assert_eq!(message.data, vec![7; 20_000]);
        assert_eq!(identities(&message.descriptors), expected);
    });
}

/// Sends everything back, the descriptors too.
struct Echo;

impl<T: Transport> Protocol<T> for Echo {
    fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
        cx.transport.write(data);
    }
}

/// S-17: of both directions, whether descriptors are on their way or not. Nobody notices,
/// and no time passes.
#[test]
fn interrupted_calls_are_made_again_at_once() {
    let name = "interrupted_calls_are_made_again_at_once";
    with_faults(module_path!(), name, |faults| {
        for call in [Call::RecvMsg, Call::SendMsg] {
            let seen = Seen::default();
            let mut reactor = Reactor::new().unwrap();
            let protocol = OneByOne::new(&seen, |cx, fd| {
                cx.transport.send_file_descriptor(fd.into()).unwrap();
                cx.transport.write(b"back");
                Ok(())
            });
            let (_, peer) = adopt(&mut reactor, protocol);
            run_until_quiet(&mut reactor);
            let (sent, expected) = files(1);
            send_message(&peer, b"there", &sent);
            faults.reset();
            faults.fail(call, 0, 3, Errno::INTR);
            faults.during(|| reactor.turn(Some(Duration::ZERO)));
            assert_eq!(faults.fired(), 3, "{call:?}");
            let answer = receive(&peer, 10).expect("in this turn");
            assert_eq!(answer.contents(), (&b"back"[..], expected), "{call:?}");
            assert_eq!(seen.all(), ["descriptor", "data there", "sent 1"]);
        }
        for call in [Call::Recv, Call::Send] {
            let mut reactor = Reactor::new().unwrap();
            let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            let mut peer = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (ours, _) = listener.accept().unwrap();
            let handle = reactor.adopt_tcp_stream(ours.into(), Echo).unwrap();
            run_until_quiet(&mut reactor);
            peer.write_all(b"there and back").unwrap();
            faults.reset();
            faults.fail(call, 0, 3, Errno::INTR);
            faults.during(|| reactor.turn(Some(DEADLINE)));
            assert_eq!(faults.fired(), 3, "{call:?}");
            let transport = reactor.get(handle).expect("it goes on");
            assert_eq!((transport.bytes_sent(), transport.unsent_bytes()), (14, 0));
            peer.read_exact(&mut [0; 14]).unwrap();
        }
    });
}

/// S-11.
#[test]
fn descriptor_and_byte_may_be_queued_in_either_order() {
    let ledger = DescriptorLedger::open();
    for is_descriptor_first in [false, true] {
        let mut reactor = Reactor::new().unwrap();
        let (handle, peer) = adopt(&mut reactor, Recorder::default());
        run_until_quiet(&mut reactor);
        if is_descriptor_first {
            queue(transport(&mut reactor, handle), vec![file()]);
        }
        transport(&mut reactor, handle).write(b"ab");
        if !is_descriptor_first {
            queue(transport(&mut reactor, handle), vec![file()]);
        }
        run_until_quiet(&mut reactor);
        let message = receive(&peer, 10).unwrap();
        assert_eq!(
            (message.data.as_slice(), message.descriptors.len()),
            (&b"ab"[..], 1)
        );
    }
    ledger.assert_balanced();
}

/// S-10, S-12, S-42, W-06, where Twisted ends the connection.
#[test]
fn descriptor_without_a_byte_is_held_until_something_is_written() {
    let ledger = DescriptorLedger::open();
    {
        let record = Record::default();
        let mut reactor = Reactor::new().unwrap();
        let (handle, peer) = adopt(&mut reactor, Recorder::new(&record));
        let (sent, expected) = files(3);
        queue(transport(&mut reactor, handle), sent);
        for (round, expected) in expected.into_iter().enumerate() {
            run_until_quiet(&mut reactor);
            assert_eq!(
                transport(&mut reactor, handle).unsent_descriptors(),
                3 - round
            );
            assert!(receive(&peer, 10).is_none());
            // One byte takes one of them.
            transport(&mut reactor, handle).write(b"x");
            run_until_quiet(&mut reactor);
            let message = receive(&peer, 10).unwrap();
            assert_eq!(message.contents(), (&b"x"[..], vec![expected]));
        }
        assert_eq!(record.summary(), ["made", "sent 1", "sent 1", "sent 1"]);
        assert_eq!(transport(&mut reactor, handle).descriptors_sent(), 3);
    }
    ledger.assert_balanced();
}

/// S-07, S-09, where Twisted sends each with a byte of its own. What is behind the last
/// of them leaves in the same turn.
#[test]
fn consecutive_descriptors_travel_in_batches_with_the_real_bytes() {
    let ledger = DescriptorLedger::open();
    for (per_message, counts) in [
        (64, vec![64, 64, 64, 8]),
        (253, vec![200]),
        // Out of range: cut to what one message can hold.
        (10_000, vec![200]),
        (0, vec![1; 200]),
        (100, vec![100, 100]),
    ] {
        let mut reactor = Reactor::new().unwrap();
        let (handle, peer) = adopt(&mut reactor, Recorder::default());
        transport(&mut reactor, handle)
            .set_descriptor_limits(DescriptorLimits::default().per_message(per_message));
        let budgets = reactor.transport_budgets();
        reactor.set_transport_budgets(budgets.writes(201).notices(201));
        run_until_quiet(&mut reactor);
        let (sent, expected) = files(200);
        queue(transport(&mut reactor, handle), sent);
        let data: Vec<u8> = (0..1_000u32).map(|n| n as u8).collect();
        transport(&mut reactor, handle).write(&data);
        reactor.turn(Some(Duration::ZERO));
        let it = transport(&mut reactor, handle);
        assert_eq!((it.unsent_descriptors(), it.unsent_bytes()), (0, 0));
        let messages = receive_all(&peer);
        // The bytes behind those of descriptors may come in a message of their own.
        let seen = messages.iter().map(|it| it.descriptors.len());
        let seen: Vec<usize> = seen.filter(|count| *count > 0).collect();
        assert_eq!(seen, counts, "per message {per_message}");
        let all: Vec<u8> = messages.iter().flat_map(|it| it.data.clone()).collect();
        assert!(all == data);
        for message in &messages {
            assert!(message.descriptors.len() <= message.data.len());
        }
        let descriptors = messages.into_iter().flat_map(|it| it.descriptors);
        assert_eq!(identities(&descriptors.collect::<Vec<_>>()), expected);
    }
    ledger.assert_balanced();
}

/// S-10, S-42.
#[test]
fn never_more_descriptors_than_bytes() {
    let ledger = DescriptorLedger::open();
    {
        let mut reactor = Reactor::new().unwrap();
        let (handle, peer) = adopt(&mut reactor, Recorder::default());
        let (sent, expected) = files(10);
        queue(transport(&mut reactor, handle), sent);
        transport(&mut reactor, handle).write(b"abc");
        run_until_quiet(&mut reactor);
        let message = receive(&peer, 10).unwrap();
        assert_eq!(message.contents(), (&b"abc"[..], expected[..3].to_vec()));
        assert_eq!(transport(&mut reactor, handle).unsent_descriptors(), 7);
        assert!(receive(&peer, 10).is_none());
    }
    ledger.assert_balanced();
}

/// S-21, S-22, S-23.
#[test]
fn sixty_fifth_descriptor_pauses_a_push_producer_and_a_byte_for_each_resumes_it() {
    let ledger = DescriptorLedger::open();
    {
        let record = Record::default();
        let mut reactor = Reactor::new().unwrap();
        let (handle, peer) = adopt(&mut reactor, Recorder::new(&record));
        run_until_quiet(&mut reactor);
        let it = transport(&mut reactor, handle);
        it.register_producer(ProducerRef::Protocol, ProducerKind::Push)
            .unwrap();
        queue(it, files(64).0);
        assert!(!it.is_send_buffer_full() && !it.is_producer_paused());
        queue(it, files(1).0);
        assert!(it.is_send_buffer_full() && it.is_producer_paused());
        queue(it, files(5).0);
        assert_eq!(it.write(b"x"), WriteStatus::Full);
        run_until_quiet(&mut reactor);
        let told = |what: fn(&Event) -> bool| record.count(what);
        let seen = || {
            let paused = told(|event| matches!(event, Event::Paused));
            (paused, told(|event| matches!(event, Event::Resumed)))
        };
        assert_eq!(seen(), (1, 0));
        // 69 wait, then 65: too many still, though no byte is unsent.
        transport(&mut reactor, handle).write(&[0; 4]);
        run_until_quiet(&mut reactor);
        let it = transport(&mut reactor, handle);
        assert_eq!((it.unsent_descriptors(), it.unsent_bytes()), (65, 0));
        assert!(it.is_producer_paused());
        assert_eq!(seen(), (1, 0), "resumed while the buffer counts as full");
        // Down to 64, which may wait for bytes of the producer's.
        transport(&mut reactor, handle).write(b"x");
        run_until_quiet(&mut reactor);
        assert_eq!(seen(), (1, 1));
        let it = transport(&mut reactor, handle);
        assert_eq!(it.unsent_descriptors(), 64);
        assert!(!it.is_producer_paused());
        it.write(&[0; 100]);
        run_until_quiet(&mut reactor);
        assert_eq!(seen(), (1, 1));
        let all = receive_all(&peer);
        assert_eq!(all.iter().map(|it| it.descriptors.len()).sum::<usize>(), 70);
    }
    ledger.assert_balanced();
}

/// Contract W-17.
#[test]
fn limit_that_pauses_is_settable_and_raising_it_resumes() {
    let ledger = DescriptorLedger::open();
    {
        let record = Record::default();
        let mut reactor = Reactor::new().unwrap();
        let (handle, _peer) = adopt(&mut reactor, Recorder::new(&record));
        let it = transport(&mut reactor, handle);
        let limits = DescriptorLimits::default().high(2);
        it.set_descriptor_limits(limits);
        it.register_producer(ProducerRef::Protocol, ProducerKind::Push)
            .unwrap();
        queue(it, files(2).0);
        assert!(!it.is_producer_paused());
        queue(it, files(1).0);
        assert!(it.is_producer_paused());
        run_until_quiet(&mut reactor);
        transport(&mut reactor, handle).set_descriptor_limits(DescriptorLimits::default());
        run_until_quiet(&mut reactor);
        assert_eq!(record.summary(), ["made", "paused", "resumed"]);
    }
    ledger.assert_balanced();
}

/// S-22.
#[test]
fn pull_producer_is_never_paused_by_descriptors() {
    let ledger = DescriptorLedger::open();
    {
        let record = Record::default();
        let mut reactor = Reactor::new().unwrap();
        let (handle, _peer) = adopt(&mut reactor, Recorder::new(&record));
        let it = transport(&mut reactor, handle);
        it.register_producer(ProducerRef::Protocol, ProducerKind::Pull)
            .unwrap();
        queue(it, files(70).0);
        run_until_quiet(&mut reactor);
        assert_eq!(record.count(|event| matches!(event, Event::Paused)), 0);
    }
    ledger.assert_balanced();
}

/// S-04, S-05, S-06, W-01, W-02: the queue owns what it holds.
#[test]
fn our_copy_is_closed_when_the_descriptor_has_left() {
    let ledger = DescriptorLedger::open();
    {
        let seen = Seen::default();
        let mut reactor = Reactor::new().unwrap();
        let (handle, peer) = adopt(&mut reactor, OneByOne::new(&seen, |_, _| Ok(())));
        let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        let ours = writer.as_raw_fd();
        queue(transport(&mut reactor, handle), vec![writer]);
        assert!(open_descriptors().contains(&ours), "it is the queue's");
        transport(&mut reactor, handle).write(b"x");
        run_until_quiet(&mut reactor);
        assert_eq!(seen.all(), ["sent 1"]);
        // Closed now, and not with the connection.
        assert!(!open_descriptors().contains(&ours), "our copy was kept");
        // The peer has not read it, and it lives, though we are gone.
        drop(reactor);
        let theirs = receive(&peer, 10).unwrap().descriptors;
        rustix::io::write(&theirs[0], b"y").unwrap();
        drop(theirs);
        let mut buffer = [0; 4];
        assert_eq!(rustix::io::read(&reader, &mut buffer).unwrap(), 1);
        assert_eq!(rustix::io::read(&reader, &mut buffer).unwrap(), 0);
    }
    ledger.assert_balanced();
}

#[test]
fn one_descriptor_is_shared_by_many_peers() {
    let ledger = DescriptorLedger::open();
    {
        let mut reactor = Reactor::new().unwrap();
        let shared = Rc::new(file());
        let mut peers = Vec::new();
        for _ in 0..20 {
            let (handle, peer) = adopt(&mut reactor, Recorder::default());
            let it = transport(&mut reactor, handle);
            it.send_file_descriptor(PassedDescriptor::shared(&shared))
                .unwrap();
            it.write(b"x");
            peers.push(peer);
        }
        assert_eq!(Rc::strong_count(&shared), 21);
        run_until_quiet(&mut reactor);
        assert_eq!(Rc::strong_count(&shared), 1);
        for peer in &peers {
            let message = receive(peer, 10).unwrap();
            assert_eq!(message.contents(), (&b"x"[..], vec![identity(&*shared)]));
        }
    }
    ledger.assert_balanced();
}

/// S-13, S-14, S-15, S-18, S-20.
#[test]
fn descriptors_wait_in_order_while_the_peer_does_not_read() {
    let ledger = DescriptorLedger::open();
    {
        let mut reactor = Reactor::new().unwrap();
        let (ours, peer) = crate::support::socketpair();
        shrink_send_buffer(&ours);
        let handle = reactor
            .adopt_unix_stream(ours.into(), Recorder::default())
            .unwrap();
        let it = transport(&mut reactor, handle);
        it.set_descriptor_limits(DescriptorLimits::default().per_message(1));
        let (sent, expected) = files(60);
        let data: Vec<u8> = (0..5_000u32).map(|n| n as u8).collect();
        queue(it, sent);
        it.write(&data);
        run_until_quiet(&mut reactor);
        let waiting = transport(&mut reactor, handle).unsent_descriptors();
        assert!(waiting > 0 && waiting < 60, "{waiting} wait");
        // No plain bytes went past those that wait.
        let unsent = transport(&mut reactor, handle).unsent_bytes();
        assert_eq!(data.len() - unsent, 60 - waiting);
        let (mut bytes, mut descriptors) = (Vec::new(), Vec::new());
        run_until(&mut reactor, |_| {
            for message in receive_all(&peer) {
                bytes.extend(message.data);
                descriptors.extend(message.descriptors);
            }
            bytes.len() == data.len()
        });
        assert!(bytes == data);
        assert_eq!(identities(&descriptors), expected);
    }
    ledger.assert_balanced();
}

/// S-40.
#[test]
fn accepted_and_connected_transports_pass_descriptors_both_ways() {
    let ledger = DescriptorLedger::open();
    {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let (server, client) = (Record::default(), Record::default());
        let mut reactor = Reactor::new().unwrap();
        let recorder = Recorder::new(&server);
        reactor
            .listen_unix(path.as_path(), move |_: &Address| recorder.clone())
            .unwrap();
        let recorder = Recorder::new(&client);
        reactor
            .connect_unix(path.as_path(), move |_: &Address| recorder.clone())
            .unwrap();
        run_until(&mut reactor, |_| {
            !server.summary().is_empty() && !client.summary().is_empty()
        });
        for (from, to) in [(&client, &server), (&server, &client)] {
            let (sent, expected) = files(2);
            let token = from.handle(0);
            // Any transport can be reached by a handle that sees what it can.
            let handle = bowline::Handle::new(token.token(), |facet| {
                facet
                    .downcast_mut::<bowline::UnixStream>()
                    .map(|transport| transport as &mut dyn UnixTransport)
            });
            queue(transport(&mut reactor, handle), sent);
            transport(&mut reactor, handle).write(b"hello");
            run_until(&mut reactor, |_| to.data() == b"hello");
            assert_eq!(identities(&to.take_descriptors()), expected);
        }
    }
    ledger.assert_balanced();
}

#[test]
fn descriptor_comes_back_when_the_queue_is_full() {
    let ledger = DescriptorLedger::open();
    {
        let mut reactor = Reactor::new().unwrap();
        let (handle, _peer) = adopt(&mut reactor, Recorder::default());
        let it = transport(&mut reactor, handle);
        it.set_descriptor_limits(DescriptorLimits::default().queued(2));
        queue(it, files(2).0);
        let (mut third, expected) = files(1);
        let error = it.send_file_descriptor(third.remove(0).into()).unwrap_err();
        assert_eq!(error.kind, SendDescriptorErrorKind::QueueFull);
        assert_eq!(error.descriptors.len(), 1);
        assert_eq!(identity(&error.descriptors[0]), expected[0]);
        assert_eq!(it.unsent_descriptors(), 2);
    }
    ledger.assert_balanced();
}
