//! Sockets that came from somewhere else, and that are given away.

use std::fs::File;
use std::net::{TcpListener, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixDatagram as StdUnixDatagram, UnixStream as StdUnixStream};

use bowline::error::{AdoptError, AdoptErrorKind};
use bowline::{Reactor, Transports, Udp, UnixDatagram};

use crate::harness::{Plain, Script, get, of_udp, of_unix, over_all};
use crate::support::{DescriptorLedger, run_until, run_until_quiet};

/// Contract D-17: its own copy of a socket is what is closed, of UNIX sockets too.
#[test]
fn an_adopted_socket_works_and_closing_it_leaves_others_theirs() {
    over_all(|place| {
        let mut reactor = Reactor::new().unwrap();
        let original = place.plain();
        let here = original.address();
        let script = Script::echo();
        let notes = script.notes();
        let handle = match &original {
            Plain::Udp(socket) => {
                let copy = OwnedFd::from(socket.try_clone().unwrap());
                let handle = reactor.adopt(Udp, copy, script).unwrap();
                of_udp(&mut reactor, handle)
            }
            Plain::Unix(socket) => {
                let copy = OwnedFd::from(socket.try_clone().unwrap());
                let handle = reactor.adopt(UnixDatagram, copy, script).unwrap();
                of_unix(&mut reactor, handle)
            }
        };
        assert_eq!(get(&mut reactor, handle).host(), here);
        let peer = place.plain();
        peer.send(b"question", &here);
        run_until(&mut reactor, |_| {
            peer.try_receive().is_some_and(|it| it.0 == b"question")
        });
        get(&mut reactor, handle).stop_listening();
        run_until(&mut reactor, |_| notes.is_stopped());
        // It is still there, and so is its file.
        peer.send(b"to the others", &here);
        assert_eq!(original.receive_all(), [b"to the others"]);
        if let Some(path) = here.as_unix().and_then(|it| it.as_path()) {
            assert!(path.exists());
        }
    });
}

#[test]
fn a_connected_pair_is_adopted_as_connected() {
    let _ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let (ours, theirs) = StdUnixDatagram::pair().unwrap();
    let script = Script::new();
    let notes = script.notes();
    let handle = reactor.adopt(UnixDatagram, ours.into(), script).unwrap();
    let handle = of_unix(&mut reactor, handle);
    assert!(get(&mut reactor, handle).peer().is_some());
    assert!(get(&mut reactor, handle).send(b"across").is_ready());
    run_until_quiet(&mut reactor);
    let mut data = [0; 10];
    assert_eq!(theirs.recv(&mut data).unwrap(), 6);
    theirs.send(b"and back").unwrap();
    run_until(&mut reactor, |_| notes.data() == [b"and back"]);
    drop(theirs);
    get(&mut reactor, handle).send(b"to nobody");
    run_until(&mut reactor, |_| notes.told(|told| told.refused.len()) == 1);
}

/// Contract D-17.
#[test]
fn what_is_no_datagram_socket_comes_back_with_the_reason() {
    let _ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let udp = || OwnedFd::from(UdpSocket::bind("127.0.0.1:0").unwrap());
    let unix = || OwnedFd::from(StdUnixDatagram::unbound().unwrap());
    let stream = || OwnedFd::from(StdUnixStream::pair().unwrap().0);
    let tcp = || OwnedFd::from(TcpListener::bind("127.0.0.1:0").unwrap());
    let file = || OwnedFd::from(File::open("/dev/null").unwrap());
    let as_udp = |reactor: &mut Reactor, fd: OwnedFd| {
        let number = fd.as_raw_fd();
        let error: AdoptError = reactor.adopt(Udp, fd, Script::new()).unwrap_err();
        assert_eq!(error.fd.as_raw_fd(), number, "it comes back");
        error.kind
    };
    let as_unix = |reactor: &mut Reactor, fd: OwnedFd| {
        reactor
            .adopt(UnixDatagram, fd, Script::new())
            .unwrap_err()
            .kind
    };
    assert!(matches!(
        as_udp(&mut reactor, unix()),
        AdoptErrorKind::WrongFamily
    ));
    assert!(matches!(
        as_unix(&mut reactor, udp()),
        AdoptErrorKind::WrongFamily
    ));
    assert!(matches!(
        as_udp(&mut reactor, tcp()),
        AdoptErrorKind::NotADatagramSocket
    ));
    assert!(matches!(
        as_unix(&mut reactor, stream()),
        AdoptErrorKind::NotADatagramSocket
    ));
    assert!(matches!(
        as_udp(&mut reactor, file()),
        AdoptErrorKind::NotASocket
    ));
    assert!(matches!(
        as_unix(&mut reactor, file()),
        AdoptErrorKind::NotASocket
    ));
    assert_eq!(reactor.registered(), 0);
}

#[test]
fn a_duplicate_goes_on_where_the_socket_has_stopped() {
    over_all(|place| {
        let mut reactor = Reactor::new().unwrap();
        let script = Script::new();
        let notes = script.notes();
        let (handle, here) = place.listen(&mut reactor, script);
        let copy = get(&mut reactor, handle).duplicate().unwrap();
        let peer = place.plain();
        // What nobody has received is not lost with one of those who have the socket.
        get(&mut reactor, handle).pause_producing();
        run_until_quiet(&mut reactor);
        peer.send(b"in the kernel", &here);
        get(&mut reactor, handle).abort();
        run_until(&mut reactor, |_| notes.is_stopped());
        let script = Script::new();
        let notes = script.notes();
        match place.kind.is_udp() {
            true => drop(reactor.adopt(Udp, copy, script).unwrap()),
            false => drop(reactor.adopt(UnixDatagram, copy, script).unwrap()),
        }
        run_until(&mut reactor, |_| notes.data() == [b"in the kernel"]);
    });
}
