//! `write_with_descriptors`: descriptors on the first byte of exactly these
//! bytes.

use std::os::fd::OwnedFd;

use bowline::error::{SendDescriptorError, SendDescriptorErrorKind};
use bowline::{
    DescriptorLimits, PassedDescriptor, Reactor, Transports, UnixTransport, Watermarks, WriteStatus,
};

use crate::peer::{
    Message, adopt, files, identities, identity, receive, receive_all, shrink_send_buffer,
    transport,
};
use crate::support::{DescriptorLedger, Recorder, run_until, run_until_quiet, socketpair};

fn passed(descriptors: Vec<OwnedFd>) -> Vec<PassedDescriptor> {
    descriptors
        .into_iter()
        .map(PassedDescriptor::from)
        .collect()
}

#[track_caller]
fn write_exactly(transport: &mut dyn UnixTransport, data: &[u8], descriptors: Vec<OwnedFd>) {
    transport
        .write_with_descriptors(data, passed(descriptors))
        .expect("taken");
}

#[track_caller]
fn assert_received(message: Option<Message>, data: &[u8], expected: &[(u64, u64)]) {
    let message = message.expect("something arrived");
    assert_eq!(message.contents(), (data, expected.to_vec()));
}

/// S-08, W-04, where Twisted lets a descriptor overtake bytes written earlier.
#[test]
fn descriptors_are_attached_to_the_first_byte_of_their_message() {
    let ledger = DescriptorLedger::open();
    {
        let mut reactor = Reactor::new().unwrap();
        let (handle, peer) = adopt(&mut reactor, Recorder::default());
        let (sent, expected) = files(2);
        let it = transport(&mut reactor, handle);
        it.write(b"aaa");
        write_exactly(it, b"BBBB", sent);
        it.write(b"cc");
        run_until_quiet(&mut reactor);
        // Earlier bytes left in a call of their own: with the same call the
        // descriptors would come along with the first of them. Later ones did
        // too: with the same call they would be in the same read.
        assert_received(receive(&peer, 3), b"aaa", &[]);
        assert_received(receive(&peer, 100), b"BBBB", &expected);
        assert_received(receive(&peer, 100), b"cc", &[]);
    }
    ledger.assert_balanced();
}

#[test]
fn messages_do_not_share_descriptors() {
    let ledger = DescriptorLedger::open();
    {
        let mut reactor = Reactor::new().unwrap();
        let (handle, peer) = adopt(&mut reactor, Recorder::default());
        let (mut first, expected) = files(6);
        let mut second = first.split_off(1);
        let third = second.split_off(2);
        let it = transport(&mut reactor, handle);
        write_exactly(it, b"1", first);
        write_exactly(it, b"22", second);
        write_exactly(it, b"333", third);
        run_until_quiet(&mut reactor);
        assert_received(receive(&peer, 100), b"1", &expected[..1]);
        assert_received(receive(&peer, 100), b"22", &expected[1..3]);
        assert_received(receive(&peer, 100), b"333", &expected[3..]);
    }
    ledger.assert_balanced();
}

#[test]
fn floating_descriptor_behind_a_message_stays_out_of_it() {
    let ledger = DescriptorLedger::open();
    {
        let mut reactor = Reactor::new().unwrap();
        let (handle, peer) = adopt(&mut reactor, Recorder::default());
        let (mut sent, expected) = files(3);
        let it = transport(&mut reactor, handle);
        write_exactly(it, b"MMM", vec![sent.remove(0)]);
        for fd in sent {
            it.send_file_descriptor(fd.into()).unwrap();
        }
        run_until_quiet(&mut reactor);
        assert_received(receive(&peer, 100), b"MMM", &expected[..1]);
        assert!(receive(&peer, 100).is_none());
        let it = transport(&mut reactor, handle);
        assert_eq!(it.unsent_descriptors(), 2);
        it.write(b"later");
        run_until_quiet(&mut reactor);
        assert_received(receive(&peer, 100), b"later", &expected[1..]);
    }
    ledger.assert_balanced();
}

#[test]
fn floating_descriptors_that_have_their_bytes_go_before_a_message() {
    let ledger = DescriptorLedger::open();
    {
        let mut reactor = Reactor::new().unwrap();
        let (handle, peer) = adopt(&mut reactor, Recorder::default());
        let (mut sent, expected) = files(3);
        let it = transport(&mut reactor, handle);
        it.send_file_descriptor(sent.remove(0).into()).unwrap();
        it.send_file_descriptor(sent.remove(0).into()).unwrap();
        it.write(b"ab");
        write_exactly(it, b"MMM", sent);
        run_until_quiet(&mut reactor);
        assert_received(receive(&peer, 100), b"ab", &expected[..2]);
        assert_received(receive(&peer, 100), b"MMM", &expected[2..]);
    }
    ledger.assert_balanced();
}

#[test]
fn message_without_descriptors_is_a_plain_write() {
    let ledger = DescriptorLedger::open();
    {
        let mut reactor = Reactor::new().unwrap();
        let (handle, peer) = adopt(&mut reactor, Recorder::default());
        let it = transport(&mut reactor, handle);
        write_exactly(it, b"plain", Vec::new());
        run_until_quiet(&mut reactor);
        assert_received(receive(&peer, 100), b"plain", &[]);
    }
    ledger.assert_balanced();
}

/// Sends to a transport that has been made to refuse, and checks that all
/// descriptors come back.
#[track_caller]
fn assert_refused(
    kind: SendDescriptorErrorKind,
    data: &[u8],
    count: usize,
    prepare: impl FnOnce(&mut dyn UnixTransport),
) {
    let ledger = DescriptorLedger::open();
    {
        let mut reactor = Reactor::new().unwrap();
        let (handle, peer) = adopt(&mut reactor, Recorder::default());
        run_until_quiet(&mut reactor);
        let (sent, expected) = files(count);
        let it = transport(&mut reactor, handle);
        prepare(it);
        let before = (it.unsent_bytes(), it.unsent_descriptors());
        let SendDescriptorError {
            kind: actual,
            descriptors,
            ..
        } = it
            .write_with_descriptors(data, passed(sent))
            .expect_err("it has a reason");
        assert_eq!(actual, kind);
        let back: Vec<_> = descriptors.iter().map(identity).collect();
        assert_eq!(back, expected, "all come back, in order");
        assert_eq!((it.unsent_bytes(), it.unsent_descriptors()), before);
        run_until_quiet(&mut reactor);
        for message in receive_all(&peer) {
            assert!(
                message.data.iter().all(|byte| *byte == b'e'),
                "only earlier ones"
            );
        }
    }
    ledger.assert_balanced();
}

#[test]
fn more_than_one_message_can_hold_are_refused() {
    use SendDescriptorErrorKind::TooManyForOneMessage;
    assert_refused(TooManyForOneMessage, b"x", 254, |_| {});
}

#[test]
fn message_without_bytes_is_refused() {
    assert_refused(SendDescriptorErrorKind::NoBytes, b"", 2, |_| {});
}

#[test]
fn message_behind_waiting_descriptors_is_refused() {
    use SendDescriptorErrorKind::DescriptorsWaiting;
    assert_refused(DescriptorsWaiting, b"x", 2, |transport| {
        for fd in files(3).0 {
            transport.send_file_descriptor(fd.into()).unwrap();
        }
        // Bytes for all but one.
        transport.write(b"ee");
    });
}

#[test]
fn message_above_the_limit_of_bytes_is_refused() {
    assert_refused(
        SendDescriptorErrorKind::BufferFull,
        b"xxx",
        2,
        |transport| {
            transport.set_watermarks(Watermarks::default().limit(4));
            transport.write(b"ee");
        },
    );
}

#[test]
fn message_above_the_limit_of_descriptors_is_refused() {
    assert_refused(SendDescriptorErrorKind::QueueFull, b"x", 3, |transport| {
        transport.set_descriptor_limits(DescriptorLimits::default().queued(2));
    });
}

/// What the peer takes by one message can be said, and holds before the kernel is
/// asked.
#[test]
fn message_above_what_the_peer_takes_is_refused() {
    assert_refused(
        SendDescriptorErrorKind::TooManyForOneMessage,
        b"x",
        29,
        |transport| {
            transport.set_descriptor_limits(DescriptorLimits::default().per_exact_message(28));
        },
    );
}

#[test]
fn message_after_close_is_refused() {
    let kind = SendDescriptorErrorKind::NotConnected;
    assert_refused(kind, b"x", 2, |transport| transport.lose_connection());
    assert_refused(kind, b"x", 2, |transport| transport.abort_connection());
}

#[test]
fn message_after_half_close_is_refused() {
    let kind = SendDescriptorErrorKind::WriteClosed;
    assert_refused(kind, b"x", 2, |transport| transport.lose_write_connection());
}

/// S-13, S-30, S-20.
#[test]
fn message_larger_than_the_send_buffer_has_its_descriptors_once_at_its_first_byte() {
    let ledger = DescriptorLedger::open();
    {
        let (ours, peer) = socketpair();
        shrink_send_buffer(&ours);
        let mut reactor = Reactor::new().unwrap();
        let handle = reactor
            .adopt_unix_stream(ours.into(), Recorder::default())
            .unwrap();
        let (sent, expected) = files(5);
        let message: Vec<u8> = (0..1_000_000u32).map(|n| n as u8).collect();
        let it = transport(&mut reactor, handle);
        it.write(b"before");
        let status = it.write_with_descriptors(&message, passed(sent)).unwrap();
        assert_eq!(status, WriteStatus::Full);
        it.write(b"after");
        run_until_quiet(&mut reactor);
        assert_received(receive(&peer, 6), b"before", &[]);
        let first = receive(&peer, 65_536).expect("it began");
        assert_eq!(identities(&first.descriptors), expected);
        let mut bytes = first.data;
        run_until(&mut reactor, |_| {
            for message in receive_all(&peer) {
                assert!(message.descriptors.is_empty());
                bytes.extend(message.data);
            }
            bytes.len() >= message.len() + 5
        });
        assert!(bytes == [message.as_slice(), b"after"].concat());
    }
    ledger.assert_balanced();
}
