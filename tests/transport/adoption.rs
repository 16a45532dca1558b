//! Sockets that come from somewhere else, and that go there.

use std::cell::RefCell;
use std::error::Error;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{TcpListener as StdTcpListener, TcpStream as StdTcpStream, UdpSocket};
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{
    UnixDatagram, UnixListener as StdUnixListener, UnixStream as StdUnixStream,
};
use std::rc::Rc;
use std::time::Duration;

use bowline::endpoint::Adopt as _;
use bowline::error::{AdoptError, AdoptErrorKind, DetachError};
use bowline::testing::MemoryStream;
use bowline::{
    Address, Detached, ProducerKind, ProducerRef, Reactor, SocketFile, TcpStream, Transport,
    TransportHandle, Transports, UnixAddress, Unsent, UnsentDescriptors, Watermarks,
};
use bowline::{Tcp, Unix};
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use crate::harness::{Doorman, End, Kind, Link, Log, Script, over_every_socket, pattern, tcp_pair};
use crate::support::faults::{Call, with_faults};
use crate::support::{
    DescriptorLedger, Event, Record, Recorder, run_until, run_until_quiet, socketpair,
};

over_every_socket!(
    a_connection_moves_whole,
    a_connection_moves_with_what_the_kernel_holds,
    a_connection_comes_back_as_if_nothing_had_happened,
    what_was_unsent_elsewhere_leaves_first,
    a_detached_socket_gets_no_events,
    a_detached_protocol_is_told_of_no_end,
    the_producer_comes_out_with_the_rest,
    a_protocol_of_another_type_is_not_detached,
    detaching_what_is_lost_fails,
    detaching_twice_fails_once,
    detaching_inside_a_callback_reads_no_further,
    detaching_from_outside_reads_no_further,
    a_detached_socket_is_fit_for_the_next_loop,
);

fn socket(family: AddressFamily, kind: SocketType) -> OwnedFd {
    rustix::net::socket_with(family, kind, SocketFlags::CLOEXEC, None).unwrap()
}

/// One of the four ways to adopt, all of whose errors are the same.
type Adopt = fn(&mut Reactor, OwnedFd) -> Result<(), AdoptError>;

const TCP_LISTENER: Adopt = |reactor, fd| {
    reactor
        .listen(Tcp::listening(fd), Doorman::new(&Log::default()))
        .map(|_| ())
};
const UNIX_LISTENER: Adopt = |reactor, fd| {
    reactor
        .listen(Unix::listening(fd), Doorman::new(&Log::default()))
        .map(|_| ())
};
const TCP_STREAM: Adopt = |reactor, fd| reactor.adopt_tcp_stream(fd, Script::new()).map(|_| ());
const UNIX_STREAM: Adopt = |reactor, fd| reactor.adopt_unix_stream(fd, Script::new()).map(|_| ());

/// L-27, W-53, W-74, E-11, E-15: each says what is wrong, and gives the
/// descriptor back.
#[test]
fn what_does_not_fit_comes_back() {
    let ledger = DescriptorLedger::open();
    let directory = tempfile::tempdir().unwrap();
    let tcp_listener = || OwnedFd::from(StdTcpListener::bind("127.0.0.1:0").unwrap());
    let unix_listener = || {
        static NEXT: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
        let next = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let path = directory.path().join(next.to_string());
        OwnedFd::from(StdUnixListener::bind(path).unwrap())
    };
    let unix_stream = || OwnedFd::from(StdUnixStream::pair().unwrap().0);
    let mut reactor = Reactor::new().unwrap();
    let mut refuses = |adopt: Adopt, fd: OwnedFd, wanted: fn(&AdoptErrorKind) -> bool| {
        let raw = fd.as_raw_fd();
        let flags = descriptor_flags(raw);
        let error = adopt(&mut reactor, fd).unwrap_err();
        assert!(wanted(&error.kind), "{error:?}");
        assert_eq!(error.fd.as_raw_fd(), raw);
        assert_eq!(descriptor_flags(raw), flags, "it was changed");
        assert_eq!(reactor.registered(), 0);
    };
    for adopt in [TCP_LISTENER, UNIX_LISTENER, TCP_STREAM, UNIX_STREAM] {
        let file = File::open("/dev/null").unwrap();
        refuses(adopt, file.into(), |kind| {
            matches!(kind, AdoptErrorKind::NotASocket)
        });
        // Only names its file: every call of sockets answers EBADF.
        let path = rustix::fs::open(
            "/dev/null",
            rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC,
            rustix::fs::Mode::empty(),
        );
        refuses(adopt, path.unwrap(), |kind| {
            matches!(kind, AdoptErrorKind::NotASocket)
        });
    }
    let is_wrong_family: fn(&AdoptErrorKind) -> bool =
        |kind| matches!(kind, AdoptErrorKind::WrongFamily);
    refuses(TCP_LISTENER, unix_listener(), is_wrong_family);
    refuses(TCP_STREAM, unix_stream(), is_wrong_family);
    refuses(UNIX_LISTENER, tcp_listener(), is_wrong_family);
    refuses(UNIX_STREAM, tcp_pair().0.into(), is_wrong_family);
    for adopt in [TCP_LISTENER, UNIX_LISTENER, TCP_STREAM, UNIX_STREAM] {
        let netlink = socket(AddressFamily::NETLINK, SocketType::RAW);
        refuses(adopt, netlink, is_wrong_family);
    }
    let is_no_stream: fn(&AdoptErrorKind) -> bool =
        |kind| matches!(kind, AdoptErrorKind::NotAStream);
    for adopt in [TCP_LISTENER, TCP_STREAM] {
        refuses(
            adopt,
            UdpSocket::bind("127.0.0.1:0").unwrap().into(),
            is_no_stream,
        );
    }
    for adopt in [UNIX_LISTENER, UNIX_STREAM] {
        let datagram = UnixDatagram::pair().unwrap().0;
        refuses(adopt, datagram.into(), is_no_stream);
        let packets = socket(AddressFamily::UNIX, SocketType::SEQPACKET);
        refuses(adopt, packets, is_no_stream);
    }
    let listens: fn(&AdoptErrorKind) -> bool = |kind| matches!(kind, AdoptErrorKind::Listening);
    refuses(TCP_STREAM, tcp_listener(), listens);
    refuses(UNIX_STREAM, unix_listener(), listens);
    let does_not_listen: fn(&AdoptErrorKind) -> bool =
        |kind| matches!(kind, AdoptErrorKind::NotListening);
    refuses(TCP_LISTENER, tcp_pair().0.into(), does_not_listen);
    refuses(UNIX_LISTENER, unix_stream(), does_not_listen);
    let is_not_connected: fn(&AdoptErrorKind) -> bool =
        |kind| matches!(kind, AdoptErrorKind::NotConnected);
    let fresh = socket(AddressFamily::INET, SocketType::STREAM);
    refuses(TCP_STREAM, fresh, is_not_connected);
    let fresh = socket(AddressFamily::UNIX, SocketType::STREAM);
    refuses(UNIX_STREAM, fresh, is_not_connected);
    drop((reactor, directory));
    ledger.assert_balanced();
}

/// The flags of an open descriptor, close-on-exec included.
fn descriptor_flags(raw: i32) -> u32 {
    let info = std::fs::read_to_string(format!("/proc/thread-self/fdinfo/{raw}")).unwrap();
    let line = info
        .lines()
        .find(|line| line.starts_with("flags:"))
        .unwrap();
    let digits = line["flags:".len()..].trim();
    u32::from_str_radix(digits, 8).unwrap()
}

const NONBLOCK: u32 = 0o4_000;
const CLOEXEC: u32 = 0o2_000_000;

/// L-15, L-27, E-11.
#[test]
fn what_is_adopted_is_made_nonblocking_and_close_on_exec() {
    let ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let (tcp, _tcp_peer) = tcp_pair();
    let (unix, _unix_peer) = StdUnixStream::pair().unwrap();
    let tcp_listener = StdTcpListener::bind("127.0.0.1:0").unwrap();
    let directory = tempfile::tempdir().unwrap();
    let unix_listener = StdUnixListener::bind(directory.path().join("s")).unwrap();
    let mut cases: Vec<(OwnedFd, Adopt)> = vec![
        (tcp.into(), TCP_STREAM),
        (unix.into(), UNIX_STREAM),
        (tcp_listener.into(), TCP_LISTENER),
        (unix_listener.into(), UNIX_LISTENER),
    ];
    // Where this machine has it.
    if let Ok(v6) = StdTcpListener::bind("[::1]:0") {
        cases.push((v6.into(), TCP_LISTENER));
    }
    for (fd, adopt) in cases {
        let raw = fd.as_raw_fd();
        rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::empty()).unwrap();
        assert_eq!(descriptor_flags(raw) & (NONBLOCK | CLOEXEC), 0);
        adopt(&mut reactor, fd).unwrap();
        assert_eq!(
            descriptor_flags(raw) & (NONBLOCK | CLOEXEC),
            NONBLOCK | CLOEXEC
        );
    }
    drop((reactor, _tcp_peer, _unix_peer, directory));
    ledger.assert_balanced();
}

/// E-17, W-25, F-38: the other holder goes on as if nothing had been.
#[test]
fn ending_an_adopted_connection_leaves_the_other_holders() {
    let ends: [fn(&mut dyn Transport); 3] = [
        |transport| transport.lose_connection(),
        |transport| transport.abort_connection(),
        |transport| {
            let _ = transport.write(b"from us ");
            transport.lose_connection();
        },
    ];
    for end in ends {
        for is_tcp in [true, false] {
            let ledger = DescriptorLedger::open();
            let record = Record::default();
            let mut reactor = Reactor::new().unwrap();
            let (kept, peer): (OwnedFd, OwnedFd) = if is_tcp {
                let (ours, theirs) = tcp_pair();
                let kept = ours.try_clone().unwrap().into();
                let adopted = reactor.adopt_tcp_stream(ours.into(), Recorder::new(&record));
                adopted.unwrap();
                (kept, theirs.into())
            } else {
                let (ours, theirs) = StdUnixStream::pair().unwrap();
                let kept = ours.try_clone().unwrap().into();
                let adopted = reactor.adopt_unix_stream(ours.into(), Recorder::new(&record));
                adopted.unwrap();
                (kept, theirs.into())
            };
            run_until(&mut reactor, |_| !record.summary().is_empty());
            end(reactor.get(record.handle(0)).unwrap());
            run_until(&mut reactor, |_| record.is_lost());
            rustix::io::write(&kept, b"still here").unwrap();
            let mut buffer = [0; 100];
            let mut received = Vec::new();
            while !received.ends_with(b"still here") {
                let count = rustix::io::read(&peer, &mut buffer).unwrap();
                assert_ne!(count, 0, "ended for the peer");
                received.extend_from_slice(&buffer[..count]);
            }
            rustix::io::write(&peer, b"good").unwrap();
            rustix::io::ioctl_fionbio(&kept, false).unwrap();
            assert_eq!(rustix::io::read(&kept, &mut buffer).unwrap(), 4);
            drop((reactor, kept, peer));
            ledger.assert_balanced();
        }
    }
}

/// L-28, W-43.
#[test]
fn stopping_an_adopted_listener_leaves_the_other_holders() {
    let ledger = DescriptorLedger::open();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let log = Log::default();
    let mut reactor = Reactor::new().unwrap();
    let tcp = StdTcpListener::bind("127.0.0.1:0").unwrap();
    let unix = StdUnixListener::bind(&path).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
    let address = tcp.local_addr().unwrap();
    let adopted = [
        reactor
            .listen(
                Tcp::listening(tcp.try_clone().unwrap().into()),
                Doorman::new(&log),
            )
            .unwrap(),
        reactor
            .listen(
                Unix::listening(unix.try_clone().unwrap().into()),
                Doorman::new(&log),
            )
            .unwrap(),
    ];
    assert_eq!(
        reactor.get(adopted[0]).unwrap().address(),
        Address::Inet(address)
    );
    assert_eq!(
        reactor.get(adopted[1]).unwrap().address(),
        Address::Unix(UnixAddress::Path(path.clone()))
    );
    let clients = (
        StdTcpStream::connect(address).unwrap(),
        StdUnixStream::connect(&path).unwrap(),
    );
    let made = |log: &Log| log.borrow().iter().filter(|line| *line == "made").count();
    run_until(&mut reactor, |_| made(&log) == 2);
    for listener in adopted {
        reactor.get(listener).unwrap().stop_listening();
    }
    run_until_quiet(&mut reactor);
    let mode = path.metadata().unwrap().permissions().mode() & 0o777;
    assert_eq!(mode, 0o600, "the mode was changed");
    // By connecting: accept alone says would-block to a socket shut down.
    let more = (
        StdTcpStream::connect(address).unwrap(),
        StdUnixStream::connect(&path).unwrap(),
    );
    assert!(tcp.accept().is_ok() && unix.accept().is_ok());
    drop((reactor, clients, more, tcp, unix, directory));
    ledger.assert_balanced();
}

/// Contract W-43: it is watched, and nothing is done to it, or to its file: neither when
/// it is adopted nor when it is stopped.
#[test]
fn an_adopted_listener_is_left_as_it_is() {
    let name = "an_adopted_listener_is_left_as_it_is";
    with_faults(module_path!(), name, |faults| {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let mut reactor = Reactor::new().unwrap();
        let log = Log::default();
        let unix = StdUnixListener::bind(&path).unwrap();
        let fd = unix.try_clone().unwrap().into();
        faults.during(|| {
            let listening = Unix::listening(fd);
            let listener = reactor.listen(listening, Doorman::new(&log)).unwrap();
            let client = StdUnixStream::connect(&path).unwrap();
            run_until(&mut reactor, |_| log.borrow().contains(&"made".into()));
            drop(client);
            run_until(&mut reactor, |reactor| reactor.registered() == 1);
            reactor.get(listener).unwrap().stop_listening();
            run_until_quiet(&mut reactor);
        });
        for call in [
            Call::Bind,
            Call::Listen,
            Call::Fchmod,
            Call::Unlink,
            Call::Shutdown,
        ] {
            assert_eq!(faults.count(call), 0, "{call:?}");
        }
        assert!(faults.count(Call::Accept) > 0, "nothing was counted");
    });
}

type Taken = Rc<RefCell<Option<Result<Detached<Script>, DetachError>>>>;

fn take(reactor: &mut Reactor, handle: TransportHandle) -> Taken {
    let taken = Taken::default();
    let result = Rc::clone(&taken);
    reactor.detach::<Script>(handle, move |_, detached| {
        *result.borrow_mut() = Some(detached);
    });
    taken
}

/// Takes a connection apart, from outside of any callback.
#[track_caller]
fn detach(link: &mut Link) -> Detached<Script> {
    let taken = take(&mut link.reactor, link.handle);
    link.turn();
    taken.take().expect("in this turn").expect("connected")
}

/// Puts the parts together again, the unsent bytes first.
fn adopt(link: &mut Link, kind: Kind, detached: Detached<Script>) {
    let handle = if kind.is_tcp() {
        link.reactor
            .adopt_tcp_stream(detached.fd, detached.protocol)
            .unwrap()
    } else {
        let handle = link
            .reactor
            .adopt_unix_stream(detached.fd, detached.protocol)
            .unwrap();
        link.reactor.get(handle).unwrap().handle()
    };
    let _ = link
        .reactor
        .get(handle)
        .unwrap()
        .write_owned(detached.unsent);
    link.handle = handle;
}

/// Unsent bytes go first, and the stream has no seam.
/// Contract E-15.
fn a_connection_moves_whole(kind: Kind) {
    let mut link = Link::new(kind, Script::new());
    let all = pattern(10 << 20);
    let (first, second) = all.split_at(9 << 20);
    let _ = link.transport().write(&first[..1_000]);
    let _ = link.transport().write_owned(first[1_000..].to_vec());
    link.settle();
    let unsent = link.transport().unsent_bytes();
    assert!(unsent > 0, "the kernel took everything");
    let (host, peer) = (link.transport().host(), link.transport().peer());
    let old = link.handle;
    let detached = detach(&mut link);
    assert_eq!(detached.unsent.len(), unsent);
    assert!(all[..9 << 20].ends_with(&detached.unsent));
    assert_eq!((&detached.host, &detached.peer), (&host, &peer));
    assert!(link.reactor.get(old).is_none());
    adopt(&mut link, kind, detached);
    assert_ne!(link.handle, old);
    let _ = link.transport().write(second);
    assert_eq!(
        (link.transport().host(), link.transport().peer()),
        (host, peer)
    );
    assert!(link.peer_receives(all.len()) == all);
    link.peer().send(b"and back");
    link.run_until(|record| record.data() == b"and back");
    link.transport().lose_connection();
    assert_eq!(link.peer_receives_all(), (Vec::new(), End::Clean));
    link.run_until_lost();
    link.finish();
}

/// Half-sent bytes, a pause, watermarks and the producer: all as it was, and the
/// protocol was told of nothing.
fn a_connection_comes_back_as_if_nothing_had_happened(kind: Kind) {
    let mut link = Link::new(kind, Script::new());
    let all = pattern(9 << 20);
    let _ = link.transport().write(&all);
    link.settle();
    let watermarks = Watermarks::default()
        .low(10)
        .high(1 << 30)
        .limit(usize::MAX);
    link.transport().set_watermarks(watermarks);
    link.transport().pause_producing();
    link.transport().set_read_limit(NonZeroUsize::new(5));
    link.peer().send(b"while it is apart");
    let old = link.handle;
    let detached = detach(&mut link);
    link.handle = kind.reattach(&mut link.reactor, detached).unwrap();
    assert_ne!(link.handle, old);
    link.settle();
    let sent = link.transport().bytes_sent();
    assert_eq!(sent + link.transport().unsent_bytes() as u64, 9 << 20);
    assert_eq!(link.transport().watermarks(), watermarks);
    assert!(link.transport().is_reading_paused());
    assert_eq!(link.record.summary(), ["made"]);
    link.transport().resume_producing();
    link.run_until(|record| record.data() == b"while it is apart");
    // In pieces, as it is told: the limit holds.
    assert!(link.record.count(|event| matches!(event, Event::Data(_))) >= 4);
    assert!(link.peer_receives(all.len()) == all);
    link.transport().lose_connection();
    assert_eq!(link.peer_receives_all(), (Vec::new(), End::Clean));
    link.run_until_lost();
    link.finish();
}

/// Before anything that the new protocol writes when it is made.
fn what_was_unsent_elsewhere_leaves_first(kind: Kind) {
    let mut link = Link::new(kind, Script::new());
    let detached = detach(&mut link);
    let greeting = Script::new().made(|cx| {
        cx.transport.write(b" made");
    });
    let unsent = Unsent {
        bytes: b"unsent".to_vec(),
        descriptors: Vec::new(),
    };
    if kind.is_tcp() {
        link.reactor
            .adopt(Tcp.with_unsent(unsent), detached.fd, greeting)
            .unwrap();
    } else {
        link.reactor
            .adopt(Unix.with_unsent(unsent), detached.fd, greeting)
            .unwrap();
    }
    assert_eq!(link.peer_receives(11), b"unsent made");
    drop(detached.protocol);
    link.finish();
}

/// What came before and was not read is there for the next.
fn a_connection_moves_with_what_the_kernel_holds(kind: Kind) {
    let script = Script::new().made(|cx| cx.transport.pause_producing());
    let mut link = Link::new(kind, script);
    link.peer().send(b"unread");
    link.peer().shut_write();
    link.settle();
    let mut detached = detach(&mut link);
    detached.protocol = detached.protocol.made(|_| {});
    adopt(&mut link, kind, detached);
    link.run_until_lost();
    assert_eq!(
        link.record.summary(),
        [
            "made",
            "made",
            "data 6",
            "read closed",
            "lost closed cleanly"
        ]
    );
    link.finish();
}

/// Kernel fact 3: a registration outlives a close for as long as anybody holds
/// the socket.
fn a_detached_socket_gets_no_events(kind: Kind) {
    let mut link = Link::new(kind, Script::new());
    // Watched for writing too.
    let _ = link.fill();
    let detached = detach(&mut link);
    let held = detached.fd.try_clone().unwrap();
    link.settle();
    let before = link.reactor.statistics();
    link.peer().send(b"for the next");
    drop(detached);
    link.settle();
    link.peer().shut_write();
    link.settle();
    let after = link.reactor.statistics();
    assert_eq!(
        (after.events, after.stale_events),
        (before.events, before.stale_events)
    );
    let mut buffer = [0; 100];
    assert_eq!(rustix::io::read(&held, &mut buffer).unwrap(), 12);
    drop(held);
    link.finish();
}

fn a_detached_protocol_is_told_of_no_end(kind: Kind) {
    let mut link = Link::new(kind, Script::new());
    let detached = detach(&mut link);
    link.settle();
    assert_eq!(link.record.summary(), ["made"]);
    assert_eq!(link.reactor.registered(), 0);
    let counts = link.reactor.descriptor_counts();
    assert_eq!(counts.opened, counts.closed);
    // The peer notices nothing.
    let error = link.peer().read(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    drop(detached);
    assert_eq!(link.peer_receives_all(), (Vec::new(), End::Clean));
    link.finish();
}

fn the_producer_comes_out_with_the_rest(kind: Kind) {
    let mut link = Link::new(kind, Script::new());
    let _ = link.fill();
    link.transport()
        .register_producer(ProducerRef::Protocol, ProducerKind::Push)
        .unwrap();
    link.settle();
    let detached = detach(&mut link);
    assert!(matches!(
        detached.producer,
        Some((ProducerRef::Protocol, ProducerKind::Push))
    ));
    link.settle();
    assert_eq!(link.record.summary(), ["made", "paused"]);
    drop(detached);
    link.finish();
}

fn a_protocol_of_another_type_is_not_detached(kind: Kind) {
    let mut link = Link::new(kind, Script::new());
    let refused = Rc::new(RefCell::new(None));
    let result = Rc::clone(&refused);
    let handle = link.handle;
    link.reactor.detach::<Recorder>(handle, move |_, detached| {
        *result.borrow_mut() = detached.err();
    });
    link.peer().send(b"unharmed");
    link.run_until(|record| record.data() == b"unharmed");
    assert_eq!(refused.take(), Some(DetachError::WrongProtocol));
    let _ = link.transport().write(b"too");
    assert_eq!(link.peer_receives(3), b"too");
    link.finish();
}

fn detaching_what_is_lost_fails(kind: Kind) {
    // Gone.
    let mut link = Link::new(kind, Script::new());
    link.close_peer();
    link.run_until_lost();
    let taken = take(&mut link.reactor, link.handle);
    link.turn();
    assert!(matches!(taken.take(), Some(Err(DetachError::Lost))));
    link.finish();

    // Ending.
    let mut link = Link::new(kind, Script::new());
    link.transport().abort_connection();
    let taken = take(&mut link.reactor, link.handle);
    link.run_until_lost();
    assert!(matches!(taken.take(), Some(Err(DetachError::Lost))));
    assert_eq!(link.record.summary(), ["made", "lost aborted by us"]);
    link.finish();
}

fn detaching_twice_fails_once(kind: Kind) {
    let mut link = Link::new(kind, Script::new());
    let first = take(&mut link.reactor, link.handle);
    let second = take(&mut link.reactor, link.handle);
    link.turn();
    assert!(matches!(first.take(), Some(Ok(_))));
    assert!(matches!(second.take(), Some(Err(DetachError::Lost))));
    link.finish();
}

/// Nothing happens to the connection between the callback that asks and the
/// hand-over: what was not delivered is still in the socket.
fn detaching_inside_a_callback_reads_no_further(kind: Kind) {
    let taken = Taken::default();
    let result = Rc::clone(&taken);
    let script = Script::new()
        .made(|cx| cx.transport.set_read_limit(NonZeroUsize::new(5)))
        .data(move |cx, data| {
            assert_eq!(data, b"first");
            let result = Rc::clone(&result);
            cx.reactor
                .detach::<Script>(cx.transport.handle(), move |_, detached| {
                    *result.borrow_mut() = Some(detached);
                });
        });
    let mut link = Link::new(kind, script);
    link.peer().send(b"firstsecond");
    run_until(&mut link.reactor, |_| taken.borrow().is_some());
    let detached = taken.take().unwrap().unwrap();
    assert_eq!(link.record.data(), b"first");
    let mut buffer = [0; 100];
    let count = rustix::io::read(&detached.fd, &mut buffer).unwrap();
    assert_eq!(&buffer[..count], b"second");
    drop(detached);
    link.finish();
}

fn detaching_from_outside_reads_no_further(kind: Kind) {
    let mut link = Link::new(kind, Script::new());
    link.peer().send(b"unread");
    let handle = link.handle;
    // Touched before, so that it has something to attend to.
    let _ = link.transport().write(b"out");
    let taken = take(&mut link.reactor, handle);
    link.turn();
    let detached = taken.take().unwrap().unwrap();
    assert_eq!(link.record.summary(), ["made"]);
    assert_eq!(detached.unsent, b"out");
    let mut buffer = [0; 100];
    assert_eq!(rustix::io::read(&detached.fd, &mut buffer).unwrap(), 6);
    drop(detached);
    link.finish();
}

fn a_detached_socket_is_fit_for_the_next_loop(kind: Kind) {
    let mut link = Link::new(kind, Script::new());
    let detached = detach(&mut link);
    let flags = descriptor_flags(detached.fd.as_raw_fd());
    assert_eq!(flags & (NONBLOCK | CLOEXEC), NONBLOCK | CLOEXEC);
    // Into another reactor, which the first one does not disturb.
    let record = Record::default();
    let mut other = Reactor::new().unwrap();
    if kind.is_tcp() {
        let adopted = other.adopt_tcp_stream(detached.fd, Recorder::new(&record));
        adopted.unwrap();
    } else {
        let adopted = other.adopt_unix_stream(detached.fd, Recorder::new(&record));
        adopted.unwrap();
    }
    drop(detached.protocol);
    link.settle();
    link.peer().send(b"to the other");
    run_until(&mut other, |_| record.data() == b"to the other");
    drop(other);
    link.finish();
}

/// Clients that wait are served by whoever has the listener next; its file
/// stays, and so does its right to it.
#[test]
fn a_listener_that_drains_serves_what_waits_and_closes() {
    let _ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let log = Log::default();
    let listener = reactor
        .listen_tcp(([127, 0, 0, 1], 0).into(), Doorman::new(&log))
        .unwrap();
    reactor.turn(Some(Duration::ZERO));
    let address = reactor.get(listener).unwrap().address().as_inet().unwrap();
    reactor.get(listener).unwrap().pause_accepting();
    let clients: Vec<_> = (0..100)
        .map(|_| StdTcpStream::connect(address).unwrap())
        .collect();
    run_until_quiet(&mut reactor);
    assert_eq!(reactor.registered(), 1, "it is paused");
    reactor.get(listener).unwrap().stop_listening_when_drained();
    run_until(&mut reactor, |reactor| reactor.get(listener).is_none());
    assert_eq!(reactor.registered(), 100);
    let refused = StdTcpStream::connect(address).unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
    drop(clients);
    run_until(&mut reactor, |reactor| reactor.registered() == 0);
}

/// the file goes with its owner of record, whoever else holds the socket.
#[test]
fn the_file_of_a_listener_is_removed_by_its_owner_alone() {
    let _ledger = DescriptorLedger::open();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let mut reactor = Reactor::new().unwrap();
    let log = Log::default();
    let first = reactor.listen_unix(&path, Doorman::new(&log)).unwrap();
    let copy = reactor.get(first).unwrap().duplicate().unwrap();
    let file = reactor.get(first).unwrap().socket_file().unwrap();
    let second = reactor
        .listen(Unix::listening(copy), Doorman::new(&log))
        .unwrap();
    let listener = reactor.get(second).unwrap();
    assert_eq!(listener.socket_file(), None);
    let other = SocketFile {
        inode: file.inode + 1,
        ..file
    };
    let refused = listener.own_socket_file(other).unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::AlreadyExists);
    listener.own_socket_file(file).unwrap();
    assert_eq!(listener.socket_file(), Some(file));
    let first_listener = reactor.get(first).unwrap();
    first_listener.disown_socket_file();
    first_listener.stop_listening();
    run_until(&mut reactor, |reactor| reactor.get(first).is_none());
    assert!(path.exists(), "its owner is the other one");
    reactor.get(second).unwrap().stop_listening();
    run_until(&mut reactor, |reactor| reactor.get(second).is_none());
    assert!(!path.exists());
}

#[test]
fn what_cannot_be_put_together_again_comes_back_whole() {
    let mut link = Link::new(Kind::AdoptedSocketpair, Script::new());
    let all = pattern(4 << 20);
    let _ = link.transport().write(&all);
    link.settle();
    let unsent = link.transport().unsent_bytes();
    assert!(unsent > 0, "the kernel took everything");
    let detached = detach(&mut link);
    let parts = format!("{detached:?}");
    assert!(parts.starts_with("Detached { fd: "), "{parts}");
    assert!(parts.contains(&format!("unsent: {unsent}, ")), "{parts}");

    let refused = link.reactor.reattach::<TcpStream, _>(detached);
    let error = refused.expect_err("it is no TCP connection");
    assert!(matches!(error.kind, AdoptErrorKind::WrongFamily));
    let refused = link.reactor.reattach::<MemoryStream, _>(*error.detached);
    let mut error = refused.expect_err("it is none of the simulated kernel");
    assert!(matches!(error.kind, AdoptErrorKind::WrongFamily));
    assert_eq!(
        error.to_string(),
        "cannot put the connection together again: it is a socket of another family"
    );
    assert!(error.source().is_none());
    assert_eq!(
        format!("{error:?}"),
        format!("ReattachError {{ kind: WrongFamily, detached: {parts} }}")
    );
    error.kind = AdoptErrorKind::Os(io::ErrorKind::OutOfMemory.into());
    let source = error.source().expect("what the system said");
    assert_eq!(
        source.to_string(),
        io::Error::from(io::ErrorKind::OutOfMemory).to_string()
    );

    link.handle = Kind::AdoptedSocketpair
        .reattach(&mut link.reactor, *error.detached)
        .unwrap();
    assert!(link.peer_receives(all.len()) == all);
    link.transport().lose_connection();
    assert_eq!(link.peer_receives_all(), (Vec::new(), End::Clean));
    link.run_until_lost();
    link.finish();
}

/// Each with the bytes it belonged to, and none with what remains of a message
/// whose descriptors have left.
#[test]
fn unsent_descriptors_are_restored_with_their_bytes() {
    let _ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let (ours, theirs) = StdUnixStream::pair().unwrap();
    let file = || File::open("/proc/self/comm").unwrap().into();
    let unsent = Unsent {
        bytes: b"rest,exact,float".to_vec(),
        descriptors: vec![
            UnsentDescriptors::new(Some(0..5), Vec::new()),
            UnsentDescriptors::new(Some(5..11), vec![file(), file()]),
            UnsentDescriptors::new(None, vec![file()]),
        ],
    };
    let record = Record::default();
    reactor
        .adopt(Unix.with_unsent(unsent), ours.into(), Recorder::default())
        .unwrap();
    let peer = reactor
        .adopt_unix_stream(theirs.into(), Recorder::new(&record))
        .unwrap();
    run_until(&mut reactor, |_| record.data().len() == 16);
    // Joined in one read, whose descriptors come first, or as they were sent:
    // either way nothing is before its own bytes.
    let events = record.summary();
    assert_eq!(record.take_descriptors().len(), 3, "{events:?}");
    assert_eq!(record.data(), b"rest,exact,float");
    reactor.get(peer).unwrap().lose_connection();
    run_until(&mut reactor, |reactor| reactor.registered() == 0);
}

/// They come from another process, and an own one can change them too.
#[test]
fn unsent_descriptors_that_do_not_fit_their_bytes_are_refused() {
    type Group = (Option<std::ops::Range<usize>>, usize);
    #[expect(clippy::reversed_empty_ranges, reason = "is to be refused")]
    let refused: [&[Group]; 11] = [
        &[(Some(3..3), 1)],
        &[(Some(5..3), 1)],
        &[(Some(8..11), 1)],
        &[(Some(1..usize::MAX), 1)],
        &[(Some(0..5), 1), (Some(3..8), 1)],
        &[(Some(5..8), 1), (Some(0..3), 1)],
        // Of a message that has left in part there is one, which is the first.
        &[(Some(0..3), 1), (Some(3..5), 0)],
        &[(Some(1..3), 0)],
        // No message has more.
        &[(Some(0..10), 254)],
        // Each for any byte has one in front of the next message.
        &[(None, 1), (Some(0..3), 1)],
        &[(Some(0..3), 1), (None, 2), (Some(4..6), 1)],
    ];
    let taken: [&[Group]; 5] = [
        &[(Some(0..10), 253)],
        &[(Some(0..4), 1), (Some(4..10), 1)],
        &[(Some(0..3), 0), (None, 2), (Some(5..10), 1), (None, 30)],
        &[(None, 100)],
        &[(Some(9..10), 1)],
    ];
    let ledger = DescriptorLedger::open();
    let each = refused.into_iter().map(|it| (it, false));
    for (groups, is_right) in each.chain(taken.into_iter().map(|it| (it, true))) {
        let mut reactor = Reactor::new().unwrap();
        let (ours, theirs) = StdUnixStream::pair().unwrap();
        let number = ours.as_raw_fd();
        let file = Rc::new(OwnedFd::from(File::open("/dev/null").unwrap()));
        let descriptors = groups.iter().map(|(message, count)| {
            let all = (0..*count).map(|_| bowline::PassedDescriptor::Shared(Rc::clone(&file)));
            UnsentDescriptors::new(message.clone(), all.collect())
        });
        let unsent = Unsent {
            bytes: vec![0; 10],
            descriptors: descriptors.collect(),
        };
        let adopted = reactor.adopt(Unix.with_unsent(unsent), ours.into(), Recorder::default());
        match adopted {
            Ok(_) => assert!(is_right, "{groups:?}"),
            Err(error) => {
                assert!(!is_right, "{groups:?}");
                assert!(matches!(error.kind, AdoptErrorKind::UnfitDescriptors));
                assert_eq!(error.fd.as_raw_fd(), number);
            }
        }
        drop((reactor, theirs));
    }
    ledger.assert_balanced();
}

#[test]
fn a_listener_moves_with_its_queue() {
    let ledger = DescriptorLedger::open();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let log = Log::default();
    let mut reactor = Reactor::new().unwrap();
    let listener = reactor
        .listen_unix(path.clone(), Doorman::new(&log))
        .unwrap();
    run_until_quiet(&mut reactor);
    reactor.get(listener).unwrap().pause_accepting();
    let client = StdUnixStream::connect(&path).unwrap();
    let taken = Rc::new(RefCell::new(None));
    let result = Rc::clone(&taken);
    reactor.detach_listener(listener, move |_, fd| *result.borrow_mut() = Some(fd));
    let again = Rc::new(RefCell::new(None));
    let result = Rc::clone(&again);
    reactor.detach_listener(listener, move |_, fd| *result.borrow_mut() = Some(fd));
    reactor.turn(Some(Duration::ZERO));
    assert!(matches!(again.take(), Some(Err(DetachError::Lost))));
    let fd: OwnedFd = taken.take().unwrap().unwrap();
    assert_eq!(*log.borrow(), ["started", "stopped"]);
    assert!(reactor.get(listener).is_none());
    assert!(path.exists());
    assert_eq!(
        descriptor_flags(fd.as_raw_fd()) & (NONBLOCK | CLOEXEC),
        NONBLOCK | CLOEXEC
    );
    let more = StdUnixStream::connect(&path).unwrap();
    run_until_quiet(&mut reactor);
    assert_eq!(reactor.registered(), 0);
    let listener = reactor
        .listen(Unix::listening(fd), Doorman::new(&log))
        .unwrap();
    let made = |log: &Log| log.borrow().iter().filter(|line| *line == "made").count();
    run_until(&mut reactor, |_| made(&log) == 2);
    reactor.get(listener).unwrap().stop_listening();
    run_until_quiet(&mut reactor);
    assert!(path.exists(), "an adopted listener's file is not ours");
    drop((reactor, client, more, directory));
    ledger.assert_balanced();
}

/// The connector is told, so that it can connect again.
#[test]
fn a_connector_learns_that_its_connection_was_detached() {
    let ledger = DescriptorLedger::open();
    let log = Log::default();
    let record = Rc::new(RefCell::new(Record::default()));
    let (scripts, records) = (Rc::clone(&log), Rc::clone(&record));
    let factory = Doorman::new(&log).build(move |_| {
        let script = crate::harness::logging_script(&scripts);
        *records.borrow_mut() = script.record();
        Some(script)
    });
    let server = StdTcpListener::bind("127.0.0.1:0").unwrap();
    let mut reactor = Reactor::new().unwrap();
    let address = server.local_addr().unwrap();
    reactor.connect_tcp(address, factory).unwrap();
    run_until(&mut reactor, |_| log.borrow().len() == 3);
    let handle = record.borrow().handle(0);
    let taken = take(&mut reactor, handle);
    run_until_quiet(&mut reactor);
    assert_eq!(
        *log.borrow(),
        [
            "started",
            "build",
            "made",
            "lost: closed cleanly",
            "stopped"
        ]
    );
    assert_eq!(reactor.registered(), 0);
    let detached = taken.take().unwrap().unwrap();
    let (mut peer, _) = server.accept().unwrap();
    let mut ours = StdTcpStream::from(detached.fd);
    ours.write_all(b"alive").unwrap();
    let mut buffer = [0; 5];
    peer.read_exact(&mut buffer).unwrap();
    assert_eq!(&buffer, b"alive");
    assert_eq!(ours.as_fd().as_raw_fd(), ours.as_raw_fd());
    drop((detached.protocol, reactor, server, ours, peer));
    ledger.assert_balanced();
}

/// What was read elsewhere is delivered first, under the rules of any read, and
/// comes out again undelivered when the connection moves on.
#[test]
fn what_is_put_back_is_delivered_before_what_the_kernel_holds() {
    let _ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let (ours, mut theirs) = socketpair();
    theirs.write_all(b" kernel").unwrap();
    let record = Record::default();
    let handle = reactor
        .adopt_unix_stream(ours.into(), Recorder::new(&record))
        .unwrap();
    let transport = reactor.get(handle).unwrap();
    transport.push_back(b"second".to_vec());
    transport.push_back(b"first ".to_vec());
    transport.set_read_limit(NonZeroUsize::new(4));
    transport.hold_reading();
    run_until_quiet(&mut reactor);
    assert_eq!(record.data(), b"");
    reactor.get(handle).unwrap().release_reading();
    run_until(&mut reactor, |_| record.data().len() >= 19);
    assert_eq!(record.data(), b"first second kernel");
    // No read went further than it may, and none mixed the two.
    let pieces = record.pieces();
    assert!(
        pieces.iter().all(|piece| (1..=4).contains(piece)),
        "{pieces:?}"
    );
    assert_eq!(pieces[..3], [4, 4, 4]);

    let transport = reactor.get(handle).unwrap();
    transport.pause_producing();
    transport.push_back(b"unread".to_vec());
    let token = reactor.get(handle).unwrap().handle();
    let unread = Rc::new(RefCell::new(None));
    let result = Rc::clone(&unread);
    reactor.detach::<Recorder>(token, move |_, detached| {
        *result.borrow_mut() = detached.ok().map(|detached| detached.unread);
    });
    run_until(&mut reactor, |_| unread.borrow().is_some());
    assert_eq!(unread.borrow().as_deref(), Some(&b"unread"[..]));
}

/// Without a byte in the kernel, nor an event, what was put back is delivered;
/// and not any more once the peer's end was.
#[test]
fn what_is_put_back_needs_no_event() {
    let _ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let (ours, theirs) = socketpair();
    let record = Record::default();
    let handle = reactor
        .adopt_unix_stream(ours.into(), Recorder::new(&record))
        .unwrap();
    run_until_quiet(&mut reactor);
    reactor.get(handle).unwrap().push_back(b"late".to_vec());
    run_until(&mut reactor, |_| record.data() == b"late");
    reactor.get(handle).unwrap().push_back(b"last".to_vec());
    drop(theirs);
    run_until(&mut reactor, |_| record.is_lost());
    assert_eq!(record.summary(), ["made", "data 8", "lost closed cleanly"]);
}
