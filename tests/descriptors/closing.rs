//! What becomes of queued descriptors when the connection ends.

use std::cell::RefCell;
use std::rc::Rc;

use bowline::error::SendDescriptorErrorKind;
use bowline::{
    CloseReason, Context, PassedDescriptor, Producer, ProducerKind, ProducerRef, Protocol, Reactor,
    Transport, Transports, UnixStream, UnixTransport,
};

use crate::peer::{
    OneByOne, Seen, adopt, capture_log, file, files, identities, identity, logged, receive,
    receive_all, send_message, transport,
};
use crate::support::{DescriptorLedger, Record, Recorder, run_until, run_until_quiet};

/// S-36.
#[test]
fn descriptor_write_and_close_in_one_turn_are_all_sent() {
    let ledger = DescriptorLedger::open();
    {
        let seen = Seen::default();
        let mut reactor = Reactor::new().unwrap();
        let (handle, peer) = adopt(&mut reactor, OneByOne::new(&seen, |_, _| Ok(())));
        let (mut sent, expected) = files(1);
        let it = transport(&mut reactor, handle);
        it.send_file_descriptor(sent.remove(0).into()).unwrap();
        it.write(b"last words");
        it.lose_connection();
        run_until(&mut reactor, |_| seen.has("lost"));
        assert_eq!(seen.all(), ["sent 1", "lost closed cleanly; 0 unsent"]);
        let message = receive(&peer, 100).unwrap();
        assert_eq!(message.contents(), (&b"last words"[..], expected));
        assert!(receive(&peer, 100).unwrap().data.is_empty());
    }
    ledger.assert_balanced();
}

/// S-10, W-06, at the close and not before.
#[test]
fn close_with_descriptors_that_have_no_byte_is_an_overrun() {
    for half_close in [false, true] {
        let ledger = DescriptorLedger::open();
        {
            let seen = Seen::default();
            let mut reactor = Reactor::new().unwrap();
            let (handle, peer) = adopt(&mut reactor, OneByOne::new(&seen, |_, _| Ok(())));
            let (sent, expected) = files(5);
            let it = transport(&mut reactor, handle);
            for fd in sent {
                it.send_file_descriptor(fd.into()).unwrap();
            }
            it.write(b"ab");
            if half_close {
                it.lose_write_connection();
            } else {
                it.lose_connection();
            }
            run_until(&mut reactor, |_| seen.has("lost"));
            // What had a byte left; the rest is counted and closed.
            let reason = "closed with 3 descriptors that had no byte to travel with";
            assert_eq!(
                seen.all(),
                ["sent 2".into(), format!("lost {reason}; 3 unsent")]
            );
            assert_eq!(reactor.descriptor_counts().unsent, 3);
            let message = receive(&peer, 100).unwrap();
            assert_eq!(message.contents(), (&b"ab"[..], expected[..2].to_vec()));
            assert!(receive(&peer, 100).unwrap().data.is_empty());
        }
        ledger.assert_balanced();
    }
}

/// Keeps the reason itself.
struct Keeper(Rc<RefCell<Option<(usize, usize)>>>);

impl Protocol<UnixStream> for Keeper {
    fn data_received(&mut self, _: &mut Context<'_, UnixStream>, _: &[u8]) {}

    fn connection_lost(&mut self, cx: &mut Context<'_, UnixStream>, reason: &CloseReason) {
        if let CloseReason::FileDescriptorOverrun { descriptors } = reason {
            let unsent = cx.transport.unsent_descriptors();
            *self.0.borrow_mut() = Some((*descriptors, unsent));
        }
    }
}

#[test]
fn overrun_says_how_many() {
    let ledger = DescriptorLedger::open();
    {
        let seen = Rc::new(RefCell::new(None));
        let mut reactor = Reactor::new().unwrap();
        let (handle, _peer) = adopt(&mut reactor, Keeper(Rc::clone(&seen)));
        let it = transport(&mut reactor, handle);
        for fd in files(7).0 {
            it.send_file_descriptor(fd.into()).unwrap();
        }
        it.lose_connection();
        run_until(&mut reactor, |_| seen.borrow().is_some());
        assert_eq!(*seen.borrow(), Some((7, 7)));
    }
    ledger.assert_balanced();
}

/// S-37, W-03.
#[test]
fn abort_closes_the_queue_and_says_how_many() {
    let ledger = DescriptorLedger::open();
    {
        capture_log();
        let seen = Seen::default();
        let mut reactor = Reactor::new().unwrap();
        let (handle, peer) = adopt(&mut reactor, OneByOne::new(&seen, |_, _| Ok(())));
        let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        let it = transport(&mut reactor, handle);
        for fd in files(3).0 {
            it.send_file_descriptor(fd.into()).unwrap();
        }
        it.send_file_descriptor(writer.into()).unwrap();
        it.write(b"never sent");
        it.abort_connection();
        assert_eq!(it.unsent_descriptors(), 4);
        run_until(&mut reactor, |_| seen.has("lost"));
        assert_eq!(seen.all(), ["lost aborted by us; 4 unsent"]);
        assert_eq!(rustix::io::read(&reader, &mut [0; 4]).unwrap(), 0);
        assert_eq!(reactor.descriptor_counts().unsent, 4);
        let lines = logged(log::Level::Debug, "10 bytes and 4 descriptors unsent");
        assert_eq!(lines.len(), 1);
        assert!(receive(&peer, 10).unwrap().data.is_empty());
    }
    ledger.assert_balanced();
}

/// S-43, W-03.
#[test]
fn loss_closes_the_queue_and_says_how_many() {
    let ledger = DescriptorLedger::open();
    {
        let seen = Seen::default();
        let mut reactor = Reactor::new().unwrap();
        let (handle, peer) = adopt(&mut reactor, OneByOne::new(&seen, |_, _| Ok(())));
        run_until_quiet(&mut reactor);
        let it = transport(&mut reactor, handle);
        for fd in files(2).0 {
            it.send_file_descriptor(fd.into()).unwrap();
        }
        let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        it.send_file_descriptor(writer.into()).unwrap();
        drop(peer);
        run_until(&mut reactor, |_| seen.has("lost"));
        assert_eq!(seen.all(), ["lost closed cleanly; 3 unsent"]);
        // With the connection, and not with the reactor.
        assert_eq!(rustix::io::read(&reader, &mut [0; 4]).unwrap(), 0);
        assert_eq!(reactor.descriptor_counts().unsent, 3);
    }
    ledger.assert_balanced();
}

/// S-16, S-18, S-19.
#[test]
fn write_to_a_dead_peer_keeps_none_of_its_descriptors() {
    let ledger = DescriptorLedger::open();
    {
        let seen = Seen::default();
        let mut reactor = Reactor::new().unwrap();
        let (handle, peer) = adopt(&mut reactor, OneByOne::new(&seen, |_, _| Ok(())));
        drop(peer);
        let it = transport(&mut reactor, handle);
        for fd in files(2).0 {
            it.send_file_descriptor(fd.into()).unwrap();
        }
        let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        it.send_file_descriptor(writer.into()).unwrap();
        it.write(b"xyz");
        it.pause_producing();
        run_until(&mut reactor, |_| seen.has("lost"));
        assert_eq!(seen.all(), ["lost connection lost; 3 unsent"]);
        assert_eq!(rustix::io::read(&reader, &mut [0; 4]).unwrap(), 0);
        assert_eq!(reactor.descriptor_counts().unsent, 3);
    }
    ledger.assert_balanced();
}

/// S-43.
#[test]
fn dropping_the_reactor_closes_what_is_queued() {
    let ledger = DescriptorLedger::open();
    {
        let mut reactor = Reactor::new().unwrap();
        let (handle, _peer) = adopt(&mut reactor, Recorder::default());
        for fd in files(3).0 {
            transport(&mut reactor, handle)
                .send_file_descriptor(fd.into())
                .unwrap();
        }
    }
    ledger.assert_balanced();
}

/// S-39, W-07.
#[test]
fn descriptor_sent_after_half_close_comes_back_and_reading_goes_on() {
    let ledger = DescriptorLedger::open();
    {
        let record = Record::default();
        let mut reactor = Reactor::new().unwrap();
        let (handle, peer) = adopt(&mut reactor, Recorder::new(&record));
        transport(&mut reactor, handle).write(b"bye");
        transport(&mut reactor, handle).lose_write_connection();
        for turn in 0..2 {
            let (mut sent, expected) = files(1);
            let it = transport(&mut reactor, handle);
            let error = it
                .send_file_descriptor(sent.remove(0).into())
                .expect_err("half-closed");
            assert_eq!(error.kind, SendDescriptorErrorKind::WriteClosed, "{turn}");
            assert_eq!(identity(&error.descriptors[0]), expected[0]);
            run_until_quiet(&mut reactor);
        }
        let (sent, expected) = files(2);
        send_message(&peer, b"still here", &sent);
        run_until(&mut reactor, |_| record.data() == b"still here");
        assert_eq!(identities(&record.take_descriptors()), expected);
        assert!(!record.is_lost());
        assert_eq!(receive_all(&peer).len(), 1);
    }
    ledger.assert_balanced();
}

/// Tries to send when everything is over.
struct TooLate(Rc<RefCell<Vec<SendDescriptorErrorKind>>>);

impl Protocol<UnixStream> for TooLate {
    fn data_received(&mut self, _: &mut Context<'_, UnixStream>, _: &[u8]) {}

    fn connection_lost(&mut self, cx: &mut Context<'_, UnixStream>, _: &CloseReason) {
        let error = cx.transport.send_file_descriptor(file().into());
        self.0.borrow_mut().push(error.unwrap_err().kind);
        let descriptors = vec![PassedDescriptor::from(file())];
        let error = cx.transport.write_with_descriptors(b"x", descriptors);
        self.0.borrow_mut().push(error.unwrap_err().kind);
    }
}

/// S-38, W-07.
#[test]
fn descriptor_sent_after_the_loss_comes_back() {
    let ledger = DescriptorLedger::open();
    {
        let kinds = Rc::new(RefCell::new(Vec::new()));
        let mut reactor = Reactor::new().unwrap();
        let (handle, peer) = adopt(&mut reactor, TooLate(Rc::clone(&kinds)));
        drop(peer);
        run_until(&mut reactor, |_| !kinds.borrow().is_empty());
        let expected = [SendDescriptorErrorKind::NotConnected; 2];
        assert_eq!(*kinds.borrow(), expected);
        assert!(reactor.get(handle).is_none());
    }
    ledger.assert_balanced();
}

#[test]
fn detached_connection_takes_its_queue_along() {
    let ledger = DescriptorLedger::open();
    {
        let mut reactor = Reactor::new().unwrap();
        let (handle, peer) = adopt(&mut reactor, Recorder::default());
        run_until_quiet(&mut reactor);
        let (mut sent, expected) = files(3);
        let exact = sent.split_off(2);
        let it = transport(&mut reactor, handle);
        for fd in sent {
            it.send_file_descriptor(fd.into()).unwrap();
        }
        it.write(b"abc");
        let exact = exact.into_iter().map(PassedDescriptor::from).collect();
        it.write_with_descriptors(b"message", exact).unwrap();
        let name = it.handle();
        let detached = Rc::new(RefCell::new(None));
        let slot = Rc::clone(&detached);
        reactor.detach::<Recorder>(name, move |_, result| {
            *slot.borrow_mut() = Some(result);
        });
        // What was queued before leaves first; whatever did not is in it.
        run_until(&mut reactor, |_| detached.borrow().is_some());
        let detached = detached.borrow_mut().take().unwrap().unwrap();
        let mut arrived = Vec::new();
        for message in receive_all(&peer) {
            arrived.extend(message.descriptors);
        }
        let arrived = identities(&arrived);
        let kept: Vec<_> = detached
            .descriptors
            .iter()
            .flat_map(|unsent| unsent.descriptors.iter().map(identity))
            .collect();
        assert_eq!([arrived, kept].concat(), expected);
    }
    ledger.assert_balanced();
}

/// Goes on producing while its transport closes: a descriptor and a byte each
/// time it is asked.
struct LastOnes {
    left: usize,
    seen: Seen,
}

impl Producer for LastOnes {
    fn resume_producing(&mut self, cx: &mut Context<'_, dyn Transport>) {
        if self.left == 0 {
            cx.transport.unregister_producer();
            return;
        }
        self.left -= 1;
        cx.transport.write(b"x");
        self.seen.push("produced");
    }
}

#[test]
fn close_waits_for_a_producer_which_may_pass_descriptors_meanwhile() {
    let ledger = DescriptorLedger::open();
    {
        let seen = Seen::default();
        let mut reactor = Reactor::new().unwrap();
        let (handle, peer) = adopt(&mut reactor, OneByOne::new(&seen, |_, _| Ok(())));
        let it = transport(&mut reactor, handle);
        let producer = LastOnes {
            left: 2,
            seen: seen.clone(),
        };
        it.register_producer(ProducerRef::boxed(producer), ProducerKind::Pull)
            .unwrap();
        it.lose_connection();
        it.send_file_descriptor(file().into())
            .expect("its producer is there");
        run_until(&mut reactor, |_| seen.has("lost"));
        let expected = [
            "produced",
            "sent 1",
            "produced",
            "lost closed cleanly; 0 unsent",
        ];
        let mut all = seen.all();
        // Which of the two comes first in their turn is not promised.
        all[..3].sort_unstable();
        let mut sorted = expected;
        sorted[..3].sort_unstable();
        assert_eq!(all, sorted);
        let arrived: usize = receive_all(&peer)
            .iter()
            .map(|it| it.descriptors.len())
            .sum();
        assert_eq!(arrived, 1);
    }
    ledger.assert_balanced();
}
