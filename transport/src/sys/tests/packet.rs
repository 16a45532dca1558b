//! Packets, and the end that looks like one.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, OwnedFd};

use rustix::net::{RecvAncillaryBuffer, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendFlags};
use rustix::net::{SocketType, recvmsg, sendmsg};

use super::{end, pair};
use crate::sys::{
    Beside, ControlBuffer, Family, MessageBatch, SocketName, bind, has_stamps, is_packets,
    is_read_closed, packet_socket, send_message, set_stamps, stream_socket,
};

fn send(fd: &OwnedFd, data: &[u8]) {
    let mut control = SendAncillaryBuffer::default();
    sendmsg(fd, &[IoSlice::new(data)], &mut control, SendFlags::empty()).unwrap();
}

#[test]
fn sockets_are_made_and_known_by_their_type() {
    let fd = packet_socket().unwrap();
    assert!(is_packets(fd.as_fd()).unwrap());
    let flags = rustix::io::fcntl_getfd(&fd).unwrap();
    assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
    let flags = rustix::fs::fcntl_getfl(&fd).unwrap();
    assert!(flags.contains(rustix::fs::OFlags::NONBLOCK));
    bind(fd.as_fd(), &SocketName::UnixUnnamed).unwrap();
    let stream = stream_socket(Family::Unix).unwrap();
    assert!(!is_packets(stream.as_fd()).unwrap());
}

/// What the kernel answers to a read of the end is a message of no bytes but for the stamp,
/// and it is answered as often as it is asked.
#[test]
fn the_end_is_where_no_stamp_is() {
    for (empty, count) in [(0, 8), (1, 8), (7, 8), (8, 8), (3, 64), (9, 16)] {
        let (near, far) = pair(SocketType::SEQPACKET);
        send(&near, b"before it was told");
        set_stamps(far.as_fd()).unwrap();
        assert!(has_stamps(far.as_fd()) && !has_stamps(near.as_fd()));
        for _ in 0..empty {
            send(&near, b"");
        }
        let mut batch = MessageBatch::new(64, 100);
        // All are packets yet.
        let received = batch.receive(far.as_fd(), count, Beside::Stamps).unwrap();
        assert_eq!(received, count.min(empty + 1));
        assert_eq!(
            batch.end(count, true, || unreachable!("they are stamped")),
            None
        );
        assert_eq!(batch.parts(0).1, b"before it was told");
        assert!(!batch.message(0).has_ancillary, "a stamp is of no interest");
        batch.clear();
        let left = empty + 1 - received;
        end(near);
        let received = batch.receive(far.as_fd(), count, Beside::Stamps).unwrap();
        assert_eq!(received, count, "the end fills what was asked for");
        assert_eq!(batch.end(count, true, || true), Some(left));
        batch.truncate(left);
        assert_eq!(batch.len(), left);
        batch.clear();
    }
}

#[test]
fn without_stamps_the_end_is_behind_the_last_that_is_a_message_for_sure() {
    let (near, far) = pair(SocketType::SEQPACKET);
    let passed = std::fs::File::open("/dev/null").unwrap();
    let mut control = ControlBuffer::new();
    send(&near, b"");
    send(&near, b"one");
    send(&near, b"");
    send_message(near.as_fd(), &[], b"", &[passed.as_fd()], &mut control).unwrap();
    send(&near, b"");
    let mut batch = MessageBatch::new(8, 100);
    assert_eq!(batch.receive(far.as_fd(), 5, Beside::Stamps).unwrap(), 5);
    assert!(!is_read_closed(far.as_fd()));
    let is_over = || is_read_closed(far.as_fd());
    assert_eq!(batch.end(5, false, is_over), None, "more may come");
    assert_eq!(
        batch.end(6, false, || true),
        None,
        "the end would have filled it"
    );
    assert_eq!(batch.end(5, false, || true), Some(4));
    batch.clear();
    end(near);
    assert_eq!(batch.receive(far.as_fd(), 3, Beside::Stamps).unwrap(), 3);
    assert!(is_read_closed(far.as_fd()));
    assert_eq!(batch.end(3, false, is_over), Some(0));
}

#[test]
fn rustix_receives_what_is_sent_with_its_boundaries() {
    let (near, far) = pair(SocketType::SEQPACKET);
    let mut control = ControlBuffer::new();
    for data in [&b"first"[..], b"", b"second"] {
        send_message(near.as_fd(), &[], data, &[], &mut control).unwrap();
    }
    for data in [&b"fi"[..], b"", b"se"] {
        let mut room = [0; 2];
        let mut parts = [IoSliceMut::new(&mut room)];
        let mut beside = RecvAncillaryBuffer::default();
        let received = recvmsg(&far, &mut parts, &mut beside, RecvFlags::empty()).unwrap();
        assert_eq!(&room[..received.bytes], data);
        let is_cut = received.flags.contains(ReturnFlags::TRUNC);
        assert_eq!(is_cut, !data.is_empty());
    }
}
