//! Sockets and their options, with std and rustix at the other end.

use std::io::{ErrorKind, IoSlice};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt;

use super::{expect_error, is_close_on_exec, is_nonblocking, stream_pair};
use crate::sys::*;

/// Waits until `fd` is ready for `wanted`.
#[track_caller]
fn wait(fd: BorrowedFd<'_>, wanted: PollFlags) {
    let mut watched = [PollFd::from_borrowed_fd(fd, wanted)];
    let patience = Timespec {
        tv_sec: 10,
        tv_nsec: 0,
    };
    assert_eq!(poll(&mut watched, Some(&patience)).unwrap(), 1);
}

/// A listener on `name`, and the name that it got.
#[track_caller]
fn listener(family: Family, name: &SocketName) -> (OwnedFd, SocketName) {
    let socket = stream_socket(family).unwrap();
    bind(socket.as_fd(), name).unwrap();
    listen(socket.as_fd(), 16).unwrap();
    let name = local_name(socket.as_fd()).unwrap();
    (socket, name)
}

/// Connects to `name` and answers the two ends, with the name that the
/// listener was told.
#[track_caller]
fn connected(
    family: Family,
    listener: BorrowedFd<'_>,
    name: &SocketName,
) -> (OwnedFd, OwnedFd, SocketName) {
    let client = stream_socket(family).unwrap();
    match connect(client.as_fd(), name).unwrap() {
        Connecting::Done => {}
        Connecting::InProgress => wait(client.as_fd(), PollFlags::OUT),
        Connecting::BacklogFull => panic!("backlog full"),
    }
    assert!(take_error(client.as_fd()).unwrap().is_none());
    wait(listener, PollFlags::IN);
    let (server, told) = accept_from(listener, false).unwrap();
    (client, server, told)
}

#[test]
fn sockets_are_born_nonblocking_and_close_on_exec() {
    for family in [Family::Inet4, Family::Inet6, Family::Unix] {
        let socket = stream_socket(family).unwrap();
        assert!(is_nonblocking(socket.as_fd()) && is_close_on_exec(socket.as_fd()));
        let expected = SocketKind {
            domain: Some(family),
            stream: true,
            packets: false,
            listening: false,
        };
        assert_eq!(socket_kind(socket.as_fd()).unwrap(), expected);
    }
}

/// Contract L-15.
#[test]
fn ip_connections_know_their_names() {
    for (family, any) in [(Family::Inet4, "127.0.0.1:0"), (Family::Inet6, "[::1]:0")] {
        let any = SocketName::Inet(any.parse().unwrap());
        let (listener, name) = listener(family, &any);
        let (client, server, told) = connected(family, listener.as_fd(), &name);
        assert!(is_nonblocking(server.as_fd()) && is_close_on_exec(server.as_fd()));
        assert_eq!(told, local_name(client.as_fd()).unwrap());
        assert_eq!(told, peer_name(server.as_fd()).unwrap());
        assert_eq!(name, peer_name(client.as_fd()).unwrap());
        assert_eq!(name, local_name(server.as_fd()).unwrap());

        let theirs: SocketAddr = TcpStream::from(client).local_addr().unwrap();
        assert_eq!(told, SocketName::Inet(theirs));
    }
}

#[test]
fn std_connects_to_us_and_we_to_std() {
    let (ours, name) = listener(
        Family::Inet4,
        &SocketName::Inet("127.0.0.1:0".parse().unwrap()),
    );
    let SocketName::Inet(address) = name else {
        panic!("{name:?}");
    };
    let client = TcpStream::connect(address).unwrap();
    let (_server, told) = accept_from(ours.as_fd(), false).unwrap();
    assert_eq!(told, SocketName::Inet(client.local_addr().unwrap()));

    let theirs = TcpListener::bind("127.0.0.1:0").unwrap();
    let name = SocketName::Inet(theirs.local_addr().unwrap());
    let (client, ..) = connected(Family::Inet4, theirs.as_fd(), &name);
    assert_eq!(peer_name(client.as_fd()).unwrap(), name);
}

/// Contract L-15.
#[test]
fn unix_connections_know_their_names() {
    let folder = tempfile::tempdir().unwrap();
    let path = SocketName::UnixPath(folder.path().join("listener"));
    let unique = format!("bowline-{}-\0-name", std::process::id()).into_bytes();
    for name in [
        path,
        SocketName::UnixAbstract(unique),
        SocketName::UnixUnnamed,
    ] {
        let (listener, got) = listener(Family::Unix, &name);
        if name == SocketName::UnixUnnamed {
            // The kernel chose one: five hexadecimal digits.
            assert!(matches!(&got, SocketName::UnixAbstract(name) if name.len() == 5));
        } else {
            assert_eq!(got, name);
        }
        let (client, server, told) = connected(Family::Unix, listener.as_fd(), &got);
        assert_eq!(told, SocketName::UnixUnnamed);
        assert_eq!(local_name(client.as_fd()).unwrap(), SocketName::UnixUnnamed);
        assert_eq!(peer_name(client.as_fd()).unwrap(), got);
        assert_eq!(local_name(server.as_fd()).unwrap(), got);
        assert!(is_nonblocking(server.as_fd()) && is_close_on_exec(server.as_fd()));
    }
}

#[test]
fn longest_path_works_and_std_agrees() {
    let folder = tempfile::tempdir_in("/tmp").unwrap();
    let room = MAX_NAME_BYTES - folder.path().as_os_str().len() - 1;
    let path = folder.path().join("p".repeat(room));
    let name = SocketName::UnixPath(path.clone());
    let (listener, got) = listener(Family::Unix, &name);
    assert_eq!(got, name);
    let theirs = UnixListener::from(listener);
    assert_eq!(theirs.local_addr().unwrap().as_pathname(), Some(&*path));
    let client = UnixStream::connect(&path).unwrap();
    assert_eq!(peer_name(client.as_fd()).unwrap(), name);
}

#[test]
fn longest_abstract_name_works_and_rustix_agrees() {
    let mut bytes = format!("bowline-{}-", std::process::id()).into_bytes();
    bytes.resize(MAX_NAME_BYTES, 0);
    let name = SocketName::UnixAbstract(bytes.clone());
    let (listener, got) = listener(Family::Unix, &name);
    assert_eq!(got, name);
    let theirs = rustix::net::SocketAddrUnix::new_abstract_name(&bytes).unwrap();
    let client = stream_socket(Family::Unix).unwrap();
    rustix::net::connect(&client, &theirs).unwrap();
    accept_from(listener.as_fd(), false).unwrap();
}

#[test]
fn path_of_108_bytes_that_another_program_bound_is_read_whole() {
    let folder = tempfile::tempdir_in("/tmp").unwrap();
    let room = 108 - folder.path().as_os_str().len() - 1;
    let path = folder.path().join("p".repeat(room));
    let socket = stream_socket(Family::Unix).unwrap();
    let mut raw = (libc::AF_UNIX as u16).to_ne_bytes().to_vec();
    raw.extend(path.as_os_str().as_encoded_bytes());
    // SAFETY: pointer and length are those of `raw`.
    let bound = unsafe {
        use std::os::fd::AsRawFd;
        libc::bind(socket.as_raw_fd(), raw.as_ptr().cast(), raw.len() as _)
    };
    assert_eq!(bound, 0);
    // The kernel answers a length of 111 here, more than `sockaddr_un` has.
    assert_eq!(
        local_name(socket.as_fd()).unwrap(),
        SocketName::UnixPath(path)
    );
}

#[test]
fn nobody_waiting_would_block() {
    let (listener, _) = listener(Family::Unix, &SocketName::UnixUnnamed);
    expect_error(accept_from(listener.as_fd(), false), ErrorKind::WouldBlock);
    assert!(socket_kind(listener.as_fd()).unwrap().listening);
}

#[test]
fn connecting_to_nobody_is_refused() {
    let (gone, name) = listener(Family::Unix, &SocketName::UnixUnnamed);
    drop(gone);
    let client = stream_socket(Family::Unix).unwrap();
    expect_error(connect(client.as_fd(), &name), ErrorKind::ConnectionRefused);
    let client = stream_socket(Family::Unix).unwrap();
    let nowhere = SocketName::UnixPath("/nonexistent/socket".into());
    expect_error(connect(client.as_fd(), &nowhere), ErrorKind::NotFound);

    let any = SocketName::Inet("127.0.0.1:0".parse().unwrap());
    let (gone, name) = listener(Family::Inet4, &any);
    drop(gone);
    let client = stream_socket(Family::Inet4).unwrap();
    match connect(client.as_fd(), &name) {
        Ok(Connecting::InProgress) => {
            wait(client.as_fd(), PollFlags::OUT);
            let error = take_error(client.as_fd()).unwrap().unwrap();
            assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
            // Taken, so it is gone.
            assert!(take_error(client.as_fd()).unwrap().is_none());
        }
        other => expect_error(other, ErrorKind::ConnectionRefused),
    }
    expect_error(peer_name(client.as_fd()), ErrorKind::NotConnected);
}

#[test]
fn full_backlog_is_told_from_progress() {
    let socket = stream_socket(Family::Unix).unwrap();
    bind(socket.as_fd(), &SocketName::UnixUnnamed).unwrap();
    listen(socket.as_fd(), 1).unwrap();
    let name = local_name(socket.as_fd()).unwrap();
    let clients: Vec<_> = (0..3)
        .map(|_| stream_socket(Family::Unix).unwrap())
        .collect();
    let answers: Vec<_> = clients
        .iter()
        .map(|client| connect(client.as_fd(), &name).unwrap())
        .collect();
    // One more than the backlog is let in.
    let expected = [Connecting::Done, Connecting::Done, Connecting::BacklogFull];
    assert_eq!(answers, expected);
    accept_from(socket.as_fd(), false).unwrap();
    let again = connect(clients[2].as_fd(), &name).unwrap();
    assert_eq!(again, Connecting::Done);
}

#[test]
fn shut_direction_ends_the_stream() {
    let (near, far) = stream_pair();
    shutdown(near.as_fd(), Shutdown::Write).unwrap();
    assert_eq!(recv(far.as_fd(), &mut [0; 8]).unwrap(), 0);
    expect_error(send(near.as_fd(), b"x"), ErrorKind::BrokenPipe);
    send(far.as_fd(), b"x").unwrap();
    shutdown(far.as_fd(), Shutdown::Both).unwrap();
    assert_eq!(recv(near.as_fd(), &mut [0; 8]).unwrap(), 1);
    assert_eq!(recv(near.as_fd(), &mut [0; 8]).unwrap(), 0);
}

#[test]
fn options_are_set_as_rustix_reads_them() {
    let socket = stream_socket(Family::Inet6).unwrap();
    let fd = socket.as_fd();
    for on in [true, false] {
        set_no_delay(fd, on).unwrap();
        assert_eq!(no_delay(fd).unwrap(), on);
        assert_eq!(sockopt::tcp_nodelay(fd).unwrap(), on);
        set_keep_alive(fd, on).unwrap();
        assert_eq!(keep_alive(fd).unwrap(), on);
        assert_eq!(sockopt::socket_keepalive(fd).unwrap(), on);
        set_reuse_address(fd, on).unwrap();
        assert_eq!(sockopt::socket_reuseaddr(fd).unwrap(), on);
        set_reuse_port(fd, on).unwrap();
        assert_eq!(sockopt::socket_reuseport(fd).unwrap(), on);
        set_v6_only(fd, on).unwrap();
        assert_eq!(sockopt::ipv6_v6only(fd).unwrap(), on);
    }
    set_send_buffer_size(fd, 20_000).unwrap();
    assert_eq!(send_buffer_size(fd).unwrap(), 40_000);
    assert_eq!(sockopt::socket_send_buffer_size(fd).unwrap(), 40_000);
    set_receive_buffer_size(fd, 30_000).unwrap();
    assert_eq!(receive_buffer_size(fd).unwrap(), 60_000);
    assert_eq!(sockopt::socket_recv_buffer_size(fd).unwrap(), 60_000);
    // As much as the kernel allows.
    for most in [libc::c_int::MAX as usize, usize::MAX] {
        set_send_buffer_size(fd, most).unwrap();
        assert!(send_buffer_size(fd).unwrap() > 40_000);
        set_receive_buffer_size(fd, most).unwrap();
        assert!(receive_buffer_size(fd).unwrap() > 60_000);
    }
}

#[test]
fn linger_is_whole_seconds_rounded_up() {
    let socket = stream_socket(Family::Inet4).unwrap();
    let fd = socket.as_fd();
    assert_eq!(linger(fd).unwrap(), None);
    for (asked, got) in [(0, 0), (1, 1), (999, 1), (1000, 1), (1001, 2), (30_000, 30)] {
        set_linger(fd, Some(Duration::from_millis(asked))).unwrap();
        let got = Some(Duration::from_secs(got));
        assert_eq!(linger(fd).unwrap(), got);
        assert_eq!(sockopt::socket_linger(fd).unwrap(), got);
    }
    for long in [Duration::MAX, Duration::from_secs(1 << 31)] {
        expect_error(set_linger(fd, Some(long)), ErrorKind::InvalidInput);
    }
    disarm_linger(fd);
    assert_eq!(linger(fd).unwrap(), None);
    // Neither a socket nor an error.
    disarm_linger(std::fs::File::open("/dev/null").unwrap().as_fd());
}

#[test]
fn keep_alive_times_are_whole_seconds_rounded_up() {
    let socket = stream_socket(Family::Inet4).unwrap();
    let fd = socket.as_fd();
    let (idle, interval) = (Duration::from_millis(59_001), Duration::from_millis(1));
    set_keep_alive_times(fd, idle, interval, 4).unwrap();
    assert_eq!(sockopt::tcp_keepidle(fd).unwrap(), Duration::from_secs(60));
    assert_eq!(sockopt::tcp_keepintvl(fd).unwrap(), Duration::from_secs(1));
    assert_eq!(sockopt::tcp_keepcnt(fd).unwrap(), 4);
    let zero = set_keep_alive_times(fd, Duration::ZERO, interval, 4);
    expect_error(zero, ErrorKind::InvalidInput);
    let many = set_keep_alive_times(fd, idle, interval, u32::MAX);
    expect_error(many, ErrorKind::InvalidInput);
}

#[test]
fn kinds_are_told_apart() {
    let datagram = std::os::unix::net::UnixDatagram::unbound().unwrap();
    let kind = socket_kind(datagram.as_fd()).unwrap();
    assert!(!kind.stream && !kind.listening);
    assert_eq!(kind.domain, Some(Family::Unix));
    let file = std::fs::File::open("/dev/null").unwrap();
    let error = socket_kind(file.as_fd()).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ENOTSOCK));
}

#[test]
fn peer_is_this_very_process() {
    let (near, _far) = stream_pair();
    let peer = peer_credentials(near.as_fd()).unwrap();
    assert_eq!(peer.pid, Some(std::process::id()));
    assert_eq!(peer.uid, rustix::process::getuid().as_raw());
    assert_eq!(peer.gid, rustix::process::getgid().as_raw());
    let theirs = sockopt::socket_peercred(&near).unwrap();
    assert_eq!(theirs.pid, rustix::process::getpid());

    match peer_pidfd(near.as_fd()) {
        Ok(pidfd) => assert!(is_close_on_exec(pidfd.as_fd())),
        // Before Linux 6.5.
        Err(error) => assert!(matches!(
            error.raw_os_error(),
            Some(libc::ENOPROTOOPT | libc::EINVAL)
        )),
    }
}

#[test]
fn nobody_is_not_a_peer() {
    for family in [Family::Unix, Family::Inet4] {
        let socket = stream_socket(family).unwrap();
        expect_error(peer_credentials(socket.as_fd()), ErrorKind::NotConnected);
    }
}

#[test]
fn descriptors_from_elsewhere_get_their_flags() {
    let (read, _write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    // As one that comes from a program which does not care.
    rustix::io::fcntl_setfd(&read, rustix::io::FdFlags::empty()).unwrap();
    assert!(!is_nonblocking(read.as_fd()) && !is_close_on_exec(read.as_fd()));
    // Twice: the second call finds nothing to do.
    for _ in 0..2 {
        set_nonblocking(read.as_fd()).unwrap();
        set_close_on_exec(read.as_fd()).unwrap();
        assert!(is_nonblocking(read.as_fd()) && is_close_on_exec(read.as_fd()));
    }
}

#[test]
fn unsent_bytes_are_counted_until_they_are_read() {
    let (near, far) = stream_pair();
    assert_eq!(bytes_unsent(near.as_fd()).unwrap(), 0);
    send_vectored(near.as_fd(), &[IoSlice::new(b"12345")]).unwrap();
    assert!(bytes_unsent(near.as_fd()).unwrap() >= 5);
    recv(far.as_fd(), &mut [0; 8]).unwrap();
    assert_eq!(bytes_unsent(near.as_fd()).unwrap(), 0);
}

#[test]
fn mode_set_before_binding_is_that_of_the_path() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let socket = stream_socket(Family::Unix).unwrap();
    set_mode(socket.as_fd(), 0o600).unwrap();
    bind(socket.as_fd(), &SocketName::UnixPath(path.clone())).unwrap();
    let mode = std::fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}
