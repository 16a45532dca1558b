//! Bytes and descriptors, with rustix at the other end.

use std::collections::HashSet;
use std::io::{ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketType,
};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::{
    Passed, end, expect_error, in_child, inode, is_close_on_exec, open_descriptors, pair,
    stream_pair,
};
use crate::sys::msg::receive_with_room;
use crate::sys::{
    Ancillary, ControlBuffer, MAX_DESCRIPTORS, ReceivedMessage, disarm_linger, receive, recv, send,
    send_vectored, send_with_descriptors, set_linger, set_pass_credentials, set_pass_pidfd,
    set_pass_rights, set_send_buffer_size,
};

const COUNTS: [usize; 11] = [0, 1, 2, 15, 16, 17, 63, 64, 65, 252, 253];

fn inodes(passed: &[Passed]) -> Vec<u64> {
    passed.iter().map(|passed| passed.inode).collect()
}

fn borrow(passed: &[Passed]) -> Vec<BorrowedFd<'_>> {
    passed.iter().map(Passed::borrow).collect()
}

#[track_caller]
fn send_ours(socket: &OwnedFd, bytes: &[u8], passed: &[Passed]) -> usize {
    send_with_descriptors(
        socket.as_fd(),
        &[IoSlice::new(bytes)],
        &borrow(passed),
        &mut ControlBuffer::new(),
    )
    .unwrap()
}

/// Reads up to `room` bytes by our own call.
#[track_caller]
fn receive_ours(
    socket: &OwnedFd,
    room: usize,
    ancillary: &mut Ancillary,
) -> (Vec<u8>, ReceivedMessage) {
    let mut buf = vec![0; room];
    let mut control = ControlBuffer::new();
    let received = receive(socket.as_fd(), &mut buf, &mut control, ancillary).unwrap();
    buf.truncate(received.bytes);
    (buf, received)
}

/// Reads by rustix: bytes, and descriptors in order.
#[track_caller]
fn receive_theirs(socket: &OwnedFd) -> (Vec<u8>, Vec<OwnedFd>) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut buf = [0; 4096];
    let message = rustix::net::recvmsg(
        socket,
        &mut [IoSliceMut::new(&mut buf)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    )
    .unwrap();
    let mut descriptors = Vec::new();
    for message in control.drain() {
        match message {
            RecvAncillaryMessage::ScmRights(list) => descriptors.extend(list),
            _ => panic!("not descriptors"),
        }
    }
    (buf[..message.bytes].to_vec(), descriptors)
}

#[test]
fn descriptors_we_send_arrive_at_rustix_in_order() {
    for count in COUNTS {
        let (near, far) = stream_pair();
        let passed = Passed::many(count);
        assert_eq!(send_ours(&near, b"bytes", &passed), 5);
        let (bytes, arrived) = receive_theirs(&far);
        assert_eq!(bytes, b"bytes");
        let arrived: Vec<_> = arrived.iter().map(|fd| inode(fd.as_fd())).collect();
        assert_eq!(arrived, inodes(&passed), "{count} descriptors");
    }
}

#[test]
fn descriptors_rustix_sends_arrive_here_in_order() {
    for count in COUNTS {
        let (near, far) = stream_pair();
        let passed = Passed::many(count);
        let list = borrow(&passed);
        let mut space =
            vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&list)));
        rustix::net::sendmsg(
            &far,
            &[IoSlice::new(b"bytes")],
            &mut control,
            SendFlags::empty(),
        )
        .unwrap();

        let mut ancillary = Ancillary::new();
        let (bytes, received) = receive_ours(&near, 64, &mut ancillary);
        assert_eq!(bytes, b"bytes");
        assert!(!received.control_truncated && !received.truncated);
        assert_eq!(received.had_ancillary, count > 0);
        let arrived: Vec<_> = ancillary
            .descriptors
            .iter()
            .map(|fd| inode(fd.as_fd()))
            .collect();
        assert_eq!(arrived, inodes(&passed), "{count} descriptors");
        assert!(
            ancillary
                .descriptors
                .iter()
                .all(|fd| is_close_on_exec(fd.as_fd()))
        );
        assert_eq!(ancillary.credentials, None);
        assert!(ancillary.pidfd.is_none() && ancillary.unknown.is_empty());
    }
}

#[test]
fn more_descriptors_than_a_message_holds_are_refused() {
    let (near, far) = stream_pair();
    let passed = Passed::new();
    let list = vec![passed.borrow(); MAX_DESCRIPTORS + 1];
    let mut control = ControlBuffer::new();
    let data = [IoSlice::new(b"x")];
    expect_error(
        send_with_descriptors(near.as_fd(), &data, &list, &mut control),
        ErrorKind::InvalidInput,
    );
    expect_error(recv(far.as_fd(), &mut [0; 8]), ErrorKind::WouldBlock);
}

#[test]
fn descriptors_without_a_byte_are_refused() {
    let (near, far) = stream_pair();
    let passed = Passed::new();
    let mut control = ControlBuffer::new();
    // The byte at the end is past what one call can see.
    let mut late = vec![IoSlice::new(b""); 1024];
    late.push(IoSlice::new(b"x"));
    for data in [&[][..], &[IoSlice::new(b""), IoSlice::new(b"")], &late] {
        expect_error(
            send_with_descriptors(near.as_fd(), data, &[passed.borrow()], &mut control),
            ErrorKind::InvalidInput,
        );
    }
    expect_error(recv(far.as_fd(), &mut [0; 8]), ErrorKind::WouldBlock);
}

#[test]
fn each_read_appends_its_descriptors() {
    let (near, far) = stream_pair();
    let passed = Passed::many(3);
    send_ours(&near, b"a", &passed[..2]);
    send_ours(&near, b"b", &passed[2..]);
    let mut ancillary = Ancillary::new();
    // Two lists never share one read.
    assert_eq!(receive_ours(&far, 64, &mut ancillary).0, b"a");
    assert_eq!(receive_ours(&far, 64, &mut ancillary).0, b"b");
    let arrived: Vec<_> = ancillary
        .descriptors
        .iter()
        .map(|fd| inode(fd.as_fd()))
        .collect();
    assert_eq!(arrived, inodes(&passed));
}

#[test]
fn descriptors_are_closed_when_nobody_takes_them() {
    let (near, far) = stream_pair();
    let mut passed = Passed::many(3);
    send_ours(&near, b"x", &passed);
    let mut ancillary = Ancillary::new();
    receive_ours(&far, 64, &mut ancillary);
    passed.iter_mut().for_each(Passed::let_go);
    assert!(passed.iter().all(Passed::is_open_somewhere));
    ancillary.clear();
    passed.iter().for_each(Passed::expect_closed_everywhere);
    assert!(ancillary.descriptors.capacity() >= 3);
}

#[test]
fn control_buffer_too_small_loses_the_rest_and_says_so() {
    // Room in bytes, and how many of six descriptors have it.
    for (room, fit) in [
        (0, 0),
        (16, 0),
        (19, 0),
        (20, 1),
        (24, 2),
        (28, 3),
        (32, 4),
        (36, 5),
        (40, 6),
        (44, 6),
    ] {
        let (near, far) = stream_pair();
        let mut passed = Passed::many(6);
        send_ours(&near, b"bytes", &passed);
        passed.iter_mut().for_each(Passed::let_go);

        let mut ancillary = Ancillary::new();
        let mut control = ControlBuffer::new();
        let mut buf = [0; 64];
        let received =
            receive_with_room(far.as_fd(), &mut buf, &mut control, room, &mut ancillary).unwrap();
        assert_eq!(received.bytes, 5);
        assert_eq!(received.control_truncated, fit < 6, "room {room}");
        assert!(received.had_ancillary);
        let arrived: Vec<_> = ancillary
            .descriptors
            .iter()
            .map(|fd| inode(fd.as_fd()))
            .collect();
        assert_eq!(arrived, inodes(&passed[..fit]), "room {room}");
        passed[fit..]
            .iter()
            .for_each(Passed::expect_closed_everywhere);
        drop(ancillary);
        passed.iter().for_each(Passed::expect_closed_everywhere);
    }
}

#[test]
fn full_descriptor_table_is_reported_and_leaks_nothing() {
    in_child(
        "msg::full_descriptor_table_is_reported_and_leaks_nothing",
        || {
            let (near, far) = stream_pair();
            let mut passed = Passed::many(5);
            send_ours(&near, b"bytes", &passed);
            passed.iter_mut().for_each(Passed::let_go);

            // What has been let go left holes, and the limit is on the number: so
            // fill them, and put the limit where two more fit.
            let mut fill = Vec::new();
            let before = open_descriptors();
            let limits = getrlimit(Resource::Nofile);
            let highest = std::fs::read_dir("/proc/self/fd")
                .unwrap()
                .map(|entry| entry.unwrap().file_name().to_string_lossy().parse::<u64>())
                .map(Result::unwrap)
                .max()
                .unwrap();
            let limit = Rlimit {
                current: Some(highest + 8),
                ..limits
            };
            setrlimit(Resource::Nofile, limit).unwrap();
            while let Ok(filler) = std::fs::File::open("/dev/null") {
                fill.push(filler);
            }
            fill.truncate(fill.len() - 2);

            let mut ancillary = Ancillary::new();
            let (bytes, received) = receive_ours(&far, 64, &mut ancillary);
            assert_eq!(bytes, b"bytes");
            assert!(received.control_truncated);
            assert_eq!(ancillary.descriptors.len(), 2);
            assert_eq!(inode(ancillary.descriptors[0].as_fd()), passed[0].inode);
            assert_eq!(inode(ancillary.descriptors[1].as_fd()), passed[1].inode);
            drop(ancillary);
            passed.iter().for_each(Passed::expect_closed_everywhere);
            drop(fill);
            setrlimit(Resource::Nofile, limits).unwrap();
            assert_eq!(open_descriptors(), before);
        },
    );
}

#[test]
fn nothing_leaks_over_many_messages() {
    in_child("msg::nothing_leaks_over_many_messages", || {
        let (near, far) = stream_pair();
        set_pass_credentials(far.as_fd(), true).unwrap();
        set_pass_pidfd(far.as_fd(), true).unwrap();
        let mut ancillary = Ancillary::new();
        let mut control = ControlBuffer::new();
        let before = open_descriptors();
        for round in 0..500 {
            let passed = Passed::many(round % 7);
            send_ours(&near, b"x", &passed);
            drop(passed);
            // Every so often with too little room, down to none.
            let room = if round % 3 == 0 { round % 130 } else { 1536 };
            let mut buf = [0; 8];
            receive_with_room(far.as_fd(), &mut buf, &mut control, room, &mut ancillary).unwrap();
            if round % 5 == 0 {
                ancillary.clear();
            }
        }
        drop(ancillary);
        assert_eq!(open_descriptors(), before);
    });
}

/// Contract F-10.
#[test]
fn sigpipe_is_never_raised() {
    in_child("msg::sigpipe_is_never_raised", || {
        // SAFETY: sets a default disposition; no handler is involved.
        unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
        let (near, far) = stream_pair();
        drop(far);
        let data = [IoSlice::new(b"x")];
        let passed = Passed::new();
        let mut control = ControlBuffer::new();
        expect_error(send(near.as_fd(), b"x"), ErrorKind::BrokenPipe);
        expect_error(send_vectored(near.as_fd(), &data), ErrorKind::BrokenPipe);
        expect_error(
            send_with_descriptors(near.as_fd(), &data, &[passed.borrow()], &mut control),
            ErrorKind::BrokenPipe,
        );
    });
}

/// Contract S-26.
#[test]
fn credentials_and_pidfd_arrive_beside_a_full_message() {
    let (near, far) = stream_pair();
    set_pass_credentials(far.as_fd(), true).unwrap();
    set_pass_pidfd(far.as_fd(), true).unwrap();
    let mut passed = Passed::new();
    let list = vec![passed.borrow(); MAX_DESCRIPTORS];
    let mut control = ControlBuffer::new();
    send_with_descriptors(near.as_fd(), &[IoSlice::new(b"x")], &list, &mut control).unwrap();

    let mut ancillary = Ancillary::new();
    let (_, received) = receive_ours(&far, 64, &mut ancillary);
    assert!(!received.control_truncated && received.had_ancillary);
    assert_eq!(ancillary.descriptors.len(), MAX_DESCRIPTORS);
    let credentials = ancillary.credentials.unwrap();
    assert_eq!(credentials.pid, Some(std::process::id()));
    assert_eq!(credentials.uid, rustix::process::getuid().as_raw());
    assert_eq!(credentials.gid, rustix::process::getgid().as_raw());
    assert!(is_close_on_exec(ancillary.pidfd.as_ref().unwrap().as_fd()));
    assert_eq!(ancillary.unknown, []);

    ancillary.clear();
    assert!(ancillary.credentials.is_none() && ancillary.pidfd.is_none());
    passed.let_go();
    passed.expect_closed_everywhere();
}

/// Contract S-32.
#[test]
fn unknown_control_messages_are_named() {
    let near = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let far = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    near.connect(far.local_addr().unwrap()).unwrap();
    let on: libc::c_int = 1;
    // SAFETY: pointer and length are those of `on`.
    let set = unsafe {
        libc::setsockopt(
            far.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_TIMESTAMP,
            (&raw const on).cast(),
            size_of_val(&on) as _,
        )
    };
    assert_eq!(set, 0);
    near.send(b"x").unwrap();
    let mut ancillary = Ancillary::new();
    let (bytes, received) = receive_ours(&OwnedFd::from(far), 64, &mut ancillary);
    assert_eq!(bytes, b"x");
    assert!(received.had_ancillary && !received.control_truncated);
    assert_eq!(ancillary.unknown, [(libc::SOL_SOCKET, libc::SCM_TIMESTAMP)]);
    ancillary.clear();
    assert_eq!(ancillary.unknown, []);
}

#[test]
fn plain_bytes_have_no_ancillary_data() {
    let (near, far) = stream_pair();
    send(near.as_fd(), b"plain").unwrap();
    let mut ancillary = Ancillary::new();
    let (bytes, received) = receive_ours(&far, 64, &mut ancillary);
    assert_eq!(bytes, b"plain");
    let expected = ReceivedMessage {
        bytes: 5,
        control_truncated: false,
        truncated: false,
        had_ancillary: false,
    };
    assert_eq!(received, expected);
    assert_eq!(ancillary.descriptors.capacity(), 0);
}

#[test]
fn end_of_stream_is_zero_bytes() {
    let (near, far) = stream_pair();
    send(near.as_fd(), b"last").unwrap();
    end(near);
    let mut buf = [0; 64];
    assert_eq!(recv(far.as_fd(), &mut buf).unwrap(), 4);
    assert_eq!(recv(far.as_fd(), &mut buf).unwrap(), 0);
    let (bytes, received) = receive_ours(&far, 64, &mut Ancillary::new());
    assert_eq!(bytes, b"");
    assert!(!received.had_ancillary);
}

#[test]
fn nothing_to_read_and_no_room_to_write_would_block() {
    let (near, far) = stream_pair();
    let mut buf = [0; 65536];
    expect_error(recv(far.as_fd(), &mut buf), ErrorKind::WouldBlock);
    let mut control = ControlBuffer::new();
    let mut ancillary = Ancillary::new();
    expect_error(
        receive(far.as_fd(), &mut buf, &mut control, &mut ancillary),
        ErrorKind::WouldBlock,
    );
    while send(near.as_fd(), &buf).is_ok() {}
    expect_error(send(near.as_fd(), &buf), ErrorKind::WouldBlock);

    // Refused as well, and still with the sender: it leaves once there is room.
    let mut passed = Passed::new();
    let data = [IoSlice::new(b"x")];
    expect_error(
        send_with_descriptors(near.as_fd(), &data, &[passed.borrow()], &mut control),
        ErrorKind::WouldBlock,
    );
    while recv(far.as_fd(), &mut buf).is_ok() {}
    send_ours(&near, b"x", std::slice::from_ref(&passed));
    passed.let_go();
    receive_ours(&far, 64, &mut ancillary);
    assert_eq!(ancillary.descriptors.len(), 1);
    drop(ancillary);
    passed.expect_closed_everywhere();
}

#[test]
fn blocking_sockets_do_not_block() {
    let (near, far) = std::os::unix::net::UnixStream::pair().unwrap();
    let mut buf = [0; 65536];
    expect_error(recv(far.as_fd(), &mut buf), ErrorKind::WouldBlock);
    expect_error(
        receive(
            far.as_fd(),
            &mut buf,
            &mut ControlBuffer::new(),
            &mut Ancillary::new(),
        ),
        ErrorKind::WouldBlock,
    );
    while send(near.as_fd(), &buf).is_ok() {}
    let data = [IoSlice::new(&buf)];
    expect_error(send_vectored(near.as_fd(), &data), ErrorKind::WouldBlock);
}

#[test]
fn partial_send_answers_what_was_taken_and_its_descriptors_leave_once() {
    let (near, far) = stream_pair();
    set_send_buffer_size(near.as_fd(), 16384).unwrap();
    let bytes: Vec<u8> = (0..1_000_000_u32).map(|n| (n % 251) as u8).collect();
    let passed = Passed::many(2);
    let mut sent = send_ours(&near, &bytes, &passed);
    assert!(sent > 0 && sent < bytes.len());

    let mut ancillary = Ancillary::new();
    let mut arrived: Vec<u8> = Vec::new();
    let mut buf = vec![0; 50_000];
    let mut control = ControlBuffer::new();
    loop {
        match receive(far.as_fd(), &mut buf, &mut control, &mut ancillary) {
            Ok(received) => arrived.extend(&buf[..received.bytes]),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::WouldBlock);
                assert_eq!(arrived.len(), sent);
                if sent == bytes.len() {
                    break;
                }
                // Slices of odd sizes, so that a call ends inside of one.
                let parts: Vec<_> = bytes[sent..].chunks(3001).map(IoSlice::new).collect();
                sent += send_vectored(near.as_fd(), &parts).unwrap();
            }
        }
    }
    assert!(arrived == bytes);
    assert_eq!(ancillary.descriptors.len(), 2);
}

#[test]
fn slices_after_the_1024th_wait() {
    let (near, far) = stream_pair();
    let data = vec![IoSlice::new(b"x"); 1500];
    assert_eq!(send_vectored(near.as_fd(), &data).unwrap(), 1024);
    assert_eq!(recv(far.as_fd(), &mut [0; 4096]).unwrap(), 1024);
    assert_eq!(send_vectored(near.as_fd(), &[]).unwrap(), 0);
}

#[test]
fn packet_longer_than_the_buffer_is_reported() {
    let (near, far) = pair(SocketType::SEQPACKET);
    send(near.as_fd(), b"longer").unwrap();
    let mut ancillary = Ancillary::new();
    let (bytes, received) = receive_ours(&far, 4, &mut ancillary);
    assert_eq!(bytes, b"long");
    assert!(received.truncated && !received.control_truncated);
}

#[test]
fn packet_of_no_bytes_can_bring_a_descriptor() {
    let (near, far) = pair(SocketType::SEQPACKET);
    let passed = Passed::new();
    let list = [passed.borrow()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(&list)));
    rustix::net::sendmsg(&near, &[], &mut control, SendFlags::empty()).unwrap();
    let mut ancillary = Ancillary::new();
    let (_, received) = receive_ours(&far, 4, &mut ancillary);
    assert_eq!(received.bytes, 0);
    assert!(received.had_ancillary);
    assert_eq!(ancillary.descriptors.len(), 1);
}

#[test]
fn sender_learns_that_descriptors_are_refused() {
    let (near, far) = stream_pair();
    match set_pass_rights(far.as_fd(), false) {
        // Before Linux 6.16 there is nothing to test.
        Err(error) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => return,
        other => other.unwrap(),
    }
    let passed = Passed::new();
    let data = [IoSlice::new(b"x")];
    expect_error(
        send_with_descriptors(
            near.as_fd(),
            &data,
            &[passed.borrow()],
            &mut ControlBuffer::new(),
        ),
        ErrorKind::PermissionDenied,
    );
    send(near.as_fd(), b"plain").unwrap();
    set_pass_rights(far.as_fd(), true).unwrap();
    send_ours(&near, b"x", &[passed]);
}

#[test]
fn received_socket_that_lingers_is_disarmed() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    set_linger(client.as_fd(), Some(Duration::from_secs(60))).unwrap();
    client.set_nonblocking(true).unwrap();
    // Nobody reads, so bytes stay unsent and closing would wait for them.
    while send(client.as_fd(), &[0; 65536]).is_ok() {}
    let (near, far) = stream_pair();
    let data = [IoSlice::new(b"x")];
    let mut control = ControlBuffer::new();
    send_with_descriptors(near.as_fd(), &data, &[client.as_fd()], &mut control).unwrap();
    drop(client);
    let mut ancillary = Ancillary::new();
    receive_ours(&far, 64, &mut ancillary);
    disarm_linger(ancillary.descriptors[0].as_fd());
    let started = Instant::now();
    drop(ancillary);
    assert!(started.elapsed() < Duration::from_secs(20));
}

#[test]
fn descriptor_that_the_kernel_could_not_install_counts_as_lost() {
    for kind in [libc::SCM_RIGHTS, 4] {
        let mut bytes = (size_of::<usize>() + 12).to_ne_bytes().to_vec();
        for word in [libc::SOL_SOCKET, kind, -libc::EPERM] {
            bytes.extend(word.to_ne_bytes());
        }
        let mut ancillary = Ancillary::new();
        // SAFETY: the only number is negative, and becomes no owner.
        let complete = unsafe { ancillary.collect(&bytes) };
        assert!(!complete);
        assert!(ancillary.descriptors.is_empty() && ancillary.pidfd.is_none());
    }
}

#[test]
fn received_descriptor_works() {
    let (near, far) = stream_pair();
    let mut passed = Passed::new();
    send_ours(&near, b"x", std::slice::from_ref(&passed));
    passed.let_go();
    let mut ancillary = Ancillary::new();
    receive_ours(&far, 64, &mut ancillary);
    let mut file = std::fs::File::from(ancillary.descriptors.pop().unwrap());
    file.write_all(b"through the passed end").unwrap();
    drop(file);
    let mut text = String::new();
    std::fs::File::from(passed.read)
        .read_to_string(&mut text)
        .unwrap();
    assert_eq!(text, "through the passed end");
}

#[test]
fn pipes_of_the_tests_are_told_apart() {
    // The tests of order stand on this.
    let passed = Passed::many(MAX_DESCRIPTORS);
    let distinct: HashSet<_> = inodes(&passed).into_iter().collect();
    assert_eq!(distinct.len(), MAX_DESCRIPTORS);
}
