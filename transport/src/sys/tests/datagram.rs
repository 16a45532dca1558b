//! Several messages by one call, with std and rustix at the other end.

use std::io::{ErrorKind, IoSlice};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixDatagram;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketType};

use super::{Passed, expect_error, in_child, inode, is_close_on_exec, open_descriptors, pair};
use crate::sys::{
    Beside, ControlBuffer, Family, Interface4, MOST_MESSAGES, MessageBatch, NameRef,
    OutgoingMessage, SendBatch, SocketName, bind, broadcast, datagram_socket, dropped,
    has_segmentation, is_datagram, local_name, multicast_hops, multicast_loopback, send_message,
    send_messages, set_broadcast, set_membership4, set_membership6, set_multicast_hops,
    set_multicast_interface4, set_multicast_interface6, set_multicast_loopback,
    set_pass_credentials, set_pass_pidfd, set_receive_offload,
};

const LOOPBACK4: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
const LOOPBACK6: SocketAddr = SocketAddr::new(std::net::IpAddr::V6(Ipv6Addr::LOCALHOST), 0);

fn udp(address: SocketAddr) -> (OwnedFd, SocketAddr) {
    let family = match address {
        SocketAddr::V4(_) => Family::Inet4,
        SocketAddr::V6(_) => Family::Inet6,
    };
    let fd = datagram_socket(family).unwrap();
    bind(fd.as_fd(), &SocketName::Inet(address)).unwrap();
    let SocketName::Inet(address) = local_name(fd.as_fd()).unwrap() else {
        panic!("it was bound");
    };
    (fd, address)
}

/// What a batch holds: bytes, their length, and the name of the sender.
fn received(batch: &mut MessageBatch) -> Vec<(Vec<u8>, usize, String)> {
    (0..batch.len())
        .map(|place| {
            let (message, data, name, _) = batch.parts(place);
            (data.to_vec(), message.length, format!("{name:?}"))
        })
        .collect()
}

fn message<'a>(data: &'a [u8], name: &'a [u8]) -> OutgoingMessage<'a> {
    OutgoingMessage {
        data,
        name,
        segment: None,
    }
}

#[test]
fn datagrams_are_received_with_their_senders_and_lengths() {
    for address in [LOOPBACK4, LOOPBACK6] {
        let (fd, here) = udp(address);
        let one = UdpSocket::bind(address).unwrap();
        let other = UdpSocket::bind(address).unwrap();
        one.send_to(b"first", here).unwrap();
        other.send_to(b"", here).unwrap();
        one.send_to(&[7; 1_000], here).unwrap();
        let mut batch = MessageBatch::new(8, 100);
        assert_eq!(batch.receive(fd.as_fd(), 2, Beside::Segments).unwrap(), 2);
        let from = |socket: &UdpSocket| format!("Inet({:?})", socket.local_addr().unwrap());
        let expected = [
            (b"first".to_vec(), 5, from(&one)),
            (Vec::new(), 0, from(&other)),
        ];
        assert_eq!(received(&mut batch), expected);
        batch.clear();
        assert_eq!(batch.receive(fd.as_fd(), 8, Beside::Segments).unwrap(), 1);
        assert_eq!(
            received(&mut batch),
            [(vec![7; 100], 1_000, from(&one))],
            "truncated, which is told"
        );
        batch.clear();
        let none = batch.receive(fd.as_fd(), 8, Beside::Segments);
        expect_error(none, ErrorKind::WouldBlock);
        assert_eq!(batch.len(), 0);
    }
}

#[test]
fn many_are_received_and_sent_by_one_call() {
    let (fd, here) = udp(LOOPBACK4);
    let name = NameRef::Inet(here).encode().unwrap();
    let sender = datagram_socket(Family::Inet4).unwrap();
    let all: Vec<Vec<u8>> = (0..100_u8).map(|n| vec![n; usize::from(n)]).collect();
    let mut scratch = SendBatch::default();
    let messages = all.iter().map(|data| (message(data, name.as_bytes()), 1));
    let sent = send_messages(sender.as_fd(), messages, &mut scratch).unwrap();
    assert_eq!(sent, MOST_MESSAGES);
    let mut batch = MessageBatch::new(1_000, 100);
    assert_eq!(batch.slots(), MOST_MESSAGES);
    let count = batch.receive(fd.as_fd(), 1_000, Beside::Segments).unwrap();
    assert_eq!(count, MOST_MESSAGES);
    let data: Vec<_> = received(&mut batch).into_iter().map(|it| it.0).collect();
    assert_eq!(data, all[..MOST_MESSAGES]);
}

/// Room that was used is as good as new, whatever was there before: more messages, longer
/// names, control messages of another length.
#[test]
fn room_is_used_again() {
    let (fd, here) = udp(LOOPBACK4);
    let (unix, other) = UnixDatagram::pair().unwrap();
    let mut batch = MessageBatch::new(8, 100);
    for count in [8_u8, 1, 3, 8, 2] {
        let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
        let own = sender.local_addr().unwrap();
        for number in 0..count {
            sender.send_to(&[number; 3], here).unwrap();
            other.send(&[number; 200]).unwrap();
        }
        for asked in [usize::from(count), 8] {
            let result = batch.receive(fd.as_fd(), asked, Beside::Segments);
            let Ok(received) = result else {
                expect_error(result, ErrorKind::WouldBlock);
                continue;
            };
            assert_eq!(received, usize::from(count));
            for place in 0..received {
                let (message, data, name, _) = batch.parts(place);
                assert_eq!((message.length, data), (3, &[place as u8; 3][..]));
                assert_eq!(name, NameRef::Inet(own));
            }
            batch.clear();
        }
        let received = batch.receive(unix.as_fd(), 8, Beside::Descriptors).unwrap();
        assert_eq!(received, usize::from(count));
        for place in 0..received {
            let (message, data, name, _) = batch.parts(place);
            assert_eq!((message.length, data.len()), (200, 100), "it is cut");
            assert_eq!(name, NameRef::UnixUnnamed);
        }
        batch.clear();
    }
}

#[test]
fn sending_stops_at_the_first_that_fails() {
    let (fd, here) = udp(LOOPBACK4);
    let name = NameRef::Inet(here).encode().unwrap();
    let sender = datagram_socket(Family::Inet4).unwrap();
    let (good, too_long) = (b"good".as_slice(), vec![0; 70_000]);
    let all = [good, good, &too_long, good];
    let mut scratch = SendBatch::default();
    let mut send = |from: usize| {
        let messages = all[from..]
            .iter()
            .map(|data| (message(data, name.as_bytes()), 1));
        send_messages(sender.as_fd(), messages, &mut scratch)
    };
    assert_eq!(send(0).unwrap(), 2);
    let error = send(2).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EMSGSIZE));
    assert_eq!(send(3).unwrap(), 1);
    let mut batch = MessageBatch::new(8, 100);
    assert_eq!(batch.receive(fd.as_fd(), 8, Beside::Segments).unwrap(), 3);
}

#[test]
fn datagrams_that_are_sent_as_one_arrive_one_by_one_or_as_one() {
    for address in [LOOPBACK4, LOOPBACK6] {
        let (plain, plain_address) = udp(address);
        let (offloaded, offloaded_address) = udp(address);
        let (sender, _) = udp(address);
        if !has_segmentation(sender.as_fd()) || !set_receive_offload(offloaded.as_fd(), true) {
            eprintln!("SKIPPED: this kernel does not treat several datagrams as one");
            return;
        }
        let data: Vec<u8> = (0..=255).cycle().take(3_500).collect();
        let mut scratch = SendBatch::default();
        for to in [plain_address, offloaded_address] {
            let name = NameRef::Inet(to).encode().unwrap();
            let message = OutgoingMessage {
                segment: Some(1_000),
                ..message(&data, name.as_bytes())
            };
            let sent = send_messages(sender.as_fd(), std::iter::once((message, 1)), &mut scratch);
            assert_eq!(sent.unwrap(), 1);
        }
        let mut batch = MessageBatch::new(8, 65_536);
        let mut arrived = |fd: &OwnedFd| {
            batch.clear();
            batch.receive(fd.as_fd(), 8, Beside::Segments).unwrap();
            let segments: Vec<_> = (0..batch.len())
                .map(|it| (batch.message(it).length, batch.message(it).segment))
                .collect();
            let data: Vec<u8> = received(&mut batch)
                .into_iter()
                .flat_map(|it| it.0)
                .collect();
            (segments, data)
        };
        let lengths = [1_000, 1_000, 1_000, 500].map(|length| (length, 0));
        assert_eq!(arrived(&plain), (lengths.to_vec(), data.clone()));
        assert_eq!(arrived(&offloaded), (vec![(3_500, 1_000)], data));
    }
}

#[test]
fn descriptors_come_with_their_own_message() {
    in_child("datagram::descriptors_come_with_their_own_message", || {
        let before = open_descriptors();
        {
            let (near, far) = pair(SocketType::DGRAM);
            set_pass_credentials(far.as_fd(), true).unwrap();
            set_pass_pidfd(far.as_fd(), true).unwrap();
            let passed = Passed::many(3);
            let inodes: Vec<_> = passed.iter().map(|it| it.inode).collect();
            let mut control = ControlBuffer::new();
            let (one, two) = (
                [passed[0].borrow()],
                [passed[1].borrow(), passed[2].borrow()],
            );
            send_message(near.as_fd(), &[], b"one", &one, &mut control).unwrap();
            send_message(near.as_fd(), &[], b"none", &[], &mut control).unwrap();
            // No bytes are a message, and carry some too.
            send_message(near.as_fd(), &[], b"", &two, &mut control).unwrap();
            let mut batch = MessageBatch::new(8, 100);
            assert_eq!(
                batch.receive(far.as_fd(), 8, Beside::Descriptors).unwrap(),
                3
            );
            let mut all = Vec::new();
            for place in 0..3 {
                let (message, data, _, ancillary) = batch.parts(place);
                assert!(message.has_ancillary && !message.control_truncated);
                assert_eq!(ancillary.credentials.unwrap().pid, Some(std::process::id()));
                assert!(ancillary.pidfd.is_some());
                assert!(
                    ancillary
                        .descriptors
                        .iter()
                        .all(|fd| is_close_on_exec(fd.as_fd()))
                );
                let own = ancillary.descriptors.iter().map(|fd| inode(fd.as_fd()));
                all.push((data.to_vec(), own.collect::<Vec<_>>()));
            }
            let expected = [
                (b"one".to_vec(), vec![inodes[0]]),
                (b"none".to_vec(), vec![]),
                (b"".to_vec(), inodes[1..].to_vec()),
            ];
            assert_eq!(all, expected);
            // What nobody takes is closed with it.
            batch.clear();
            assert!(batch.parts(0).3.descriptors.is_empty());
        }
        assert_eq!(open_descriptors(), before);
    });
}

#[test]
fn messages_of_rustix_are_understood() {
    let (near, far) = pair(SocketType::SEQPACKET);
    let passed = Passed::many(2);
    let borrowed: Vec<_> = passed.iter().map(Passed::borrow).collect();
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(&borrowed)));
    let data = [IoSlice::new(b"two")];
    rustix::net::sendmsg(&near, &data, &mut control, SendFlags::empty()).unwrap();
    let mut batch = MessageBatch::new(2, 100);
    assert_eq!(
        batch.receive(far.as_fd(), 2, Beside::Descriptors).unwrap(),
        1
    );
    let (_, data, name, ancillary) = batch.parts(0);
    assert_eq!((data, name), (&b"two"[..], NameRef::UnixUnnamed));
    let own: Vec<_> = ancillary
        .descriptors
        .iter()
        .map(|fd| inode(fd.as_fd()))
        .collect();
    assert_eq!(own, [passed[0].inode, passed[1].inode]);
}

#[test]
fn unix_senders_have_the_names_they_are_bound_to() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("here");
    let fd = datagram_socket(Family::Unix).unwrap();
    assert!(is_datagram(fd.as_fd()).unwrap());
    bind(fd.as_fd(), &SocketName::UnixPath(path.clone())).unwrap();
    let theirs = directory.path().join("theirs");
    let sender = UnixDatagram::bind(&theirs).unwrap();
    sender.send_to(b"a", &path).unwrap();
    let unbound = UnixDatagram::unbound().unwrap();
    unbound.send_to(b"b", &path).unwrap();
    let mut batch = MessageBatch::new(8, 100);
    batch.receive(fd.as_fd(), 8, Beside::Descriptors).unwrap();
    assert_eq!(batch.parts(0).2, NameRef::UnixPath(&theirs));
    assert_eq!(batch.parts(1).2, NameRef::UnixUnnamed);
    // Back again, by the name as it came.
    let name = batch.parts(0).2.encode().unwrap();
    let mut control = ControlBuffer::new();
    send_message(fd.as_fd(), name.as_bytes(), b"back", &[], &mut control).unwrap();
    let mut back = [0; 8];
    assert_eq!(sender.recv(&mut back).unwrap(), 4);
}

#[test]
fn batch_that_is_filled_by_hand_is_like_one_that_was_received() {
    let mut batch = MessageBatch::new(2, 4);
    let from = NameRef::Inet(LOOPBACK4);
    assert!(batch.push(b"abcdef", from, Vec::new(), false));
    let (passed, kept) = (Passed::new(), Passed::new());
    let fd = passed.borrow().try_clone_to_owned().unwrap();
    assert!(batch.push(b"", NameRef::UnixUnnamed, vec![fd], true));
    let kept = kept.borrow().try_clone_to_owned().unwrap();
    assert!(!batch.push(b"", from, vec![kept], false), "no room");
    assert_eq!(batch.len(), 2);
    let (message, data, name, _) = batch.parts(0);
    assert_eq!((message.length, data, name), (6, &b"abcd"[..], from));
    let (message, data, name, ancillary) = batch.parts(1);
    assert!(message.has_ancillary && message.control_truncated && data.is_empty());
    assert_eq!(name, NameRef::UnixUnnamed);
    assert_eq!(ancillary.descriptors.len(), 1);
}

#[test]
fn options_of_udp_are_those_that_were_set() {
    for family in [Family::Inet4, Family::Inet6] {
        let fd = datagram_socket(family).unwrap();
        let fd = fd.as_fd();
        assert!(!broadcast(fd).unwrap());
        set_broadcast(fd, true).unwrap();
        assert!(broadcast(fd).unwrap());
        assert_eq!(multicast_hops(fd, family).unwrap(), 1);
        set_multicast_hops(fd, family, 33).unwrap();
        assert_eq!(multicast_hops(fd, family).unwrap(), 33);
        expect_error(set_multicast_hops(fd, family, 256), ErrorKind::InvalidInput);
        assert!(multicast_loopback(fd, family).unwrap());
        set_multicast_loopback(fd, family, false).unwrap();
        assert!(!multicast_loopback(fd, family).unwrap());
        assert_eq!(dropped(fd).unwrap(), 0);
    }
}

#[test]
fn groups_are_joined_once_and_left_once() {
    let fd = datagram_socket(Family::Inet4).unwrap();
    let group = Ipv4Addr::new(224, 0, 0, 251);
    let loopback = Interface4 {
        address: Ipv4Addr::LOCALHOST,
        index: 0,
    };
    set_multicast_interface4(fd.as_fd(), loopback).unwrap();
    set_membership4(fd.as_fd(), group, loopback, true).unwrap();
    let again = set_membership4(fd.as_fd(), group, loopback, true);
    expect_error(again, ErrorKind::AddrInUse);
    set_membership4(fd.as_fd(), group, loopback, false).unwrap();
    let again = set_membership4(fd.as_fd(), group, loopback, false);
    expect_error(again, ErrorKind::AddrNotAvailable);

    let fd = datagram_socket(Family::Inet6).unwrap();
    let group = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 0xfb);
    // The loopback interface is the first there is.
    set_multicast_interface6(fd.as_fd(), 1).unwrap();
    set_membership6(fd.as_fd(), group, 1, true).unwrap();
    set_membership6(fd.as_fd(), group, 1, false).unwrap();
    let again = set_membership6(fd.as_fd(), group, 1, false);
    expect_error(again, ErrorKind::AddrNotAvailable);
    let none = set_multicast_interface6(fd.as_fd(), u32::MAX);
    expect_error(none, ErrorKind::InvalidInput);
}
