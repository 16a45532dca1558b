//! Listening and connecting, by paths and names.

use std::cell::RefCell;
use std::fs;
use std::io::ErrorKind;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::rc::Rc;
use std::time::Duration;

use bowline::endpoint::{Listen as _, ListenAt as _};
use bowline::error::{AdoptErrorKind, ListenStep};
use bowline::{
    Address, BuildContext, Credentials, Reactor, StaleSocket, Transports, Unix, UnixAddress,
    UnixSeqpacket,
};

use crate::harness::{Origin, Plain, Script, Scripts};
use crate::support::{run_until, run_until_quiet};

#[test]
fn a_listener_serves_whoever_connects_and_removes_its_file() {
    let place = Origin::Accepted.place();
    let mut reactor = Reactor::new().unwrap();
    let path = place.path();
    let scripts: Vec<_> = (0..20).map(|_| Script::echo()).collect();
    let notes: Vec<_> = scripts.iter().map(Script::notes).collect();
    let factory = Scripts {
        waiting: scripts,
        ..Scripts::default()
    };
    let calls = Rc::clone(&factory.calls);
    let here = UnixSeqpacket::at(path.clone()).mode(0o600);
    let listener = reactor.listen(here, factory).unwrap();
    let metadata = fs::metadata(&path).unwrap();
    assert!(metadata.file_type().is_socket());
    assert_eq!(metadata.permissions().mode() & 0o777, 0o600);
    let peers: Vec<_> = (0..20).map(|_| Plain::connected(&path).unwrap()).collect();
    for (number, peer) in peers.iter().enumerate() {
        // Before it is accepted.
        peer.send(&[number as u8]);
        peer.send(b"");
    }
    run_until(&mut reactor, |_| {
        notes.iter().all(|notes| notes.count() == 2)
    });
    run_until_quiet(&mut reactor);
    for (number, peer) in peers.iter().enumerate() {
        assert_eq!(peer.receive().unwrap().0, [number as u8]);
        assert_eq!(peer.receive().unwrap().0, b"");
    }
    // One more than there are protocols for.
    let declined = Plain::connected(&path).unwrap();
    run_until(&mut reactor, |_| declined.is_at_end());
    reactor.get(listener).unwrap().stop_listening();
    run_until(&mut reactor, |_| {
        calls.borrow().contains(&"stopped".to_owned())
    });
    assert!(!path.exists());
    assert_eq!(notes[0].calls(), ["made"], "connections go on");
    let calls = calls.borrow();
    assert_eq!(calls[0], "started");
    assert_eq!(calls.iter().filter(|call| *call == "declined").count(), 1);
}

#[test]
fn names_without_a_file_and_names_that_the_kernel_chooses() {
    let _place = Origin::Accepted.place();
    let mut reactor = Reactor::new().unwrap();
    let name = format!("@bowline-packets-{}", std::process::id());
    for address in [UnixAddress::from(name.as_str()), UnixAddress::Unnamed] {
        let script = Script::echo();
        let notes = script.notes();
        let here = UnixSeqpacket::at(address.clone());
        let listener = reactor.listen(here, Scripts::of(script)).unwrap();
        let found = reactor.get(listener).unwrap().address();
        let found = found.as_unix().unwrap().clone();
        assert!(matches!(found, UnixAddress::Abstract(_)), "{found}");
        if address != UnixAddress::Unnamed {
            assert_eq!(found, address);
        }
        let client = Script::new().on_made(|transport, _| {
            transport.send(b"hello");
        });
        let client_notes = client.notes();
        reactor
            .connect(UnixSeqpacket::to(found.clone()), Scripts::of(client))
            .unwrap();
        run_until(&mut reactor, |_| client_notes.count() == 1);
        assert_eq!(notes.data(), [b"hello"]);
        let transport = reactor.get(client_notes.handle()).unwrap();
        assert_eq!(transport.peer(), Address::Unix(found.clone()));
        assert_eq!(transport.host(), Address::Unix(UnixAddress::Unnamed));
        transport.lose_connection();
        run_until(&mut reactor, |_| notes.is_lost() && client_notes.is_lost());
        reactor.get(listener).unwrap().stop_listening();
        run_until(&mut reactor, |reactor| reactor.get(listener).is_none());
    }
}

#[test]
fn a_dead_sockets_path_is_taken_and_a_living_ones_is_not() {
    let place = Origin::Accepted.place();
    let mut reactor = Reactor::new().unwrap();
    let path = place.path();
    let living = Plain::listening(&path);
    let refused = reactor
        .listen(UnixSeqpacket::at(path.clone()), Scripts::default())
        .unwrap_err();
    assert_eq!(refused.step, ListenStep::Bind);
    assert_eq!(refused.error.kind(), ErrorKind::AddrInUse);
    drop(living);
    let refuse = UnixSeqpacket::at(path.clone()).stale(StaleSocket::Refuse);
    let refused = reactor.listen(refuse, Scripts::default()).unwrap_err();
    assert_eq!(refused.error.kind(), ErrorKind::AddrInUse);
    reactor
        .listen(UnixSeqpacket::at(path.clone()), Scripts::default())
        .unwrap();
    drop(reactor);
    assert!(!path.exists());
}

#[test]
fn the_process_that_connects_is_known_before_it_is_served() {
    let place = Origin::Accepted.place();
    let mut reactor = Reactor::new().unwrap();
    let path = place.path();
    let seen: Rc<RefCell<Vec<Credentials>>> = Rc::default();

    struct Guarded(Rc<RefCell<Vec<Credentials>>>);

    impl bowline::Factory for Guarded {
        type Protocol = Script;

        fn build_protocol(&mut self, cx: &mut BuildContext<'_>, _: &Address) -> Option<Script> {
            let credentials = cx.listener()?.peer_credentials().unwrap();
            self.0.borrow_mut().push(credentials);
            Some(Script::new().on_made(|transport, _| {
                let credentials = transport.peer_credentials().unwrap();
                assert_eq!(credentials.pid, Some(std::process::id()));
                assert!(transport.peer_pidfd().is_ok());
                transport.send(b"welcome");
            }))
        }
    }

    reactor
        .listen(UnixSeqpacket::at(path.clone()), Guarded(Rc::clone(&seen)))
        .unwrap();
    let peer = Plain::connected(&path).unwrap();
    run_until(&mut reactor, |_| {
        peer.receive().is_ok_and(|it| it.0 == b"welcome")
    });
    let seen = seen.borrow();
    assert_eq!(seen[0].pid, Some(std::process::id()));
    assert_eq!(seen[0].uid, rustix::process::geteuid().as_raw());
}

#[test]
fn a_factory_hears_of_an_attempt_that_fails_and_connects_again() {
    let place = Origin::Connected.place();
    let mut reactor = Reactor::new().unwrap();
    let path = place.path();
    let factory = Scripts {
        again: 1,
        ..Scripts::default()
    };
    let calls = Rc::clone(&factory.calls);
    reactor.connect(UnixSeqpacket::to(path), factory).unwrap();
    run_until(&mut reactor, |_| {
        calls.borrow().contains(&"stopped".to_owned())
    });
    let calls = calls.borrow();
    assert_eq!(calls.len(), 5, "{calls:?}");
    assert_eq!(
        [&calls[0], &calls[2], &calls[4]],
        ["started", "started", "stopped"]
    );
    assert!(
        calls[1].starts_with("failed: ") && calls[3] == calls[1],
        "{calls:?}"
    );
}

#[test]
fn a_factory_hears_of_the_end_of_its_connection_and_connects_again() {
    let place = Origin::Connected.place();
    let mut reactor = Reactor::new().unwrap();
    let path = place.path();
    let listener = Plain::listening(&path);
    let scripts = vec![Script::new(), Script::new()];
    let notes: Vec<_> = scripts.iter().map(Script::notes).collect();
    let factory = Scripts {
        waiting: scripts,
        again: 1,
        ..Scripts::default()
    };
    let calls = Rc::clone(&factory.calls);
    reactor.connect(UnixSeqpacket::to(path), factory).unwrap();
    for notes in &notes {
        let mut peer = None;
        run_until(&mut reactor, |_| {
            peer = peer.take().or_else(|| listener.accept());
            peer.is_some() && !notes.calls().is_empty()
        });
        drop(peer);
        run_until(&mut reactor, |_| notes.is_lost());
    }
    run_until(&mut reactor, |_| {
        calls.borrow().contains(&"stopped".to_owned())
    });
    let lost = "lost: closed cleanly";
    let expected = [
        "started", "built", lost, "started", "built", lost, "stopped",
    ];
    assert_eq!(*calls.borrow(), expected);
}

#[test]
fn a_full_queue_of_a_listener_is_waited_for() {
    let place = Origin::Connected.place();
    let mut reactor = Reactor::new().unwrap();
    let path = place.path();
    let listener = Plain::listening(&path);
    let mut fillers = Vec::new();
    while let Ok(filler) = Plain::connected(&path) {
        fillers.push(filler);
        assert!(fillers.len() < 100, "the queue has no end");
    }
    let script = Script::new();
    let notes = script.notes();
    let there = UnixSeqpacket::to(path.clone());
    reactor.connect(there, Scripts::of(script)).unwrap();
    let impatient = Scripts::default();
    let calls = Rc::clone(&impatient.calls);
    let there = UnixSeqpacket::to(path).timeout(Duration::from_millis(20));
    reactor.connect(there, impatient).unwrap();
    run_until(&mut reactor, |_| {
        calls.borrow().contains(&"stopped".to_owned())
    });
    let failed = calls.borrow()[1].clone();
    assert!(
        failed.contains("timed out") || failed.contains("time"),
        "{failed}"
    );
    assert!(notes.calls().is_empty());
    let mut accepted = Vec::new();
    run_until(&mut reactor, |_| {
        accepted.extend(listener.accept());
        notes.calls() == ["made"]
    });
}

#[test]
fn an_acceptor_is_given_sockets_as_they_are() {
    let place = Origin::Accepted.place();
    let mut reactor = Reactor::new().unwrap();
    let path = place.path();
    let accepted: Rc<RefCell<Vec<OwnedFd>>> = Rc::default();
    let taken = Rc::clone(&accepted);
    let acceptor = move |_: &mut BuildContext<'_>, socket: OwnedFd, _: &Address| {
        taken.borrow_mut().push(socket);
    };
    reactor
        .accept(UnixSeqpacket::at(path.clone()), acceptor)
        .unwrap();
    let peer = Plain::connected(&path).unwrap();
    peer.send(b"for whoever serves it");
    run_until(&mut reactor, |_| accepted.borrow().len() == 1);
    let script = Script::echo();
    let notes = script.notes();
    let socket = accepted.borrow_mut().pop().unwrap();
    reactor.adopt(UnixSeqpacket, socket, script).unwrap();
    run_until(&mut reactor, |_| peer.receive().is_ok());
    assert_eq!(notes.data(), [b"for whoever serves it"]);
}

#[test]
fn a_socket_that_listens_already_goes_on() {
    let place = Origin::Accepted.place();
    let mut reactor = Reactor::new().unwrap();
    let path = place.path();
    let bound = UnixSeqpacket::at(path.clone()).bind().unwrap();
    let early = Plain::connected(&path).unwrap();
    early.send(b"");
    early.send(b"early");
    let script = Script::new();
    let notes = script.notes();
    let listener = reactor
        .listen(UnixSeqpacket::listening(bound), Scripts::of(script))
        .unwrap();
    run_until(&mut reactor, |_| notes.count() == 2);
    let found = reactor.get(listener).unwrap();
    assert_eq!(
        found.address(),
        Address::Unix(UnixAddress::Path(path.clone()))
    );
    assert_eq!(found.socket_file(), None);
    let again = found.duplicate().unwrap();
    drop(reactor);
    assert!(path.exists(), "it is not ours");
    drop(again);
}

#[test]
fn what_is_no_such_socket_is_handed_back() {
    let place = Origin::Adopted.place();
    let mut reactor = Reactor::new().unwrap();
    let (one, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    let refused = reactor
        .adopt(UnixSeqpacket, one.into(), Script::new())
        .unwrap_err();
    assert!(
        matches!(refused.kind, AdoptErrorKind::NotPackets),
        "{refused}"
    );
    let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let refused = reactor
        .adopt(UnixSeqpacket, tcp.into(), Script::new())
        .unwrap_err();
    assert!(
        matches!(refused.kind, AdoptErrorKind::WrongFamily),
        "{refused}"
    );
    let listening = UnixSeqpacket::at(place.path()).bind().unwrap();
    let refused = reactor
        .adopt(UnixSeqpacket, listening, Script::new())
        .unwrap_err();
    assert!(
        matches!(refused.kind, AdoptErrorKind::Listening),
        "{refused}"
    );
    // Of the others each is refused too.
    let refused = Unix::listening(refused.fd);
    let error = reactor.listen(refused, |_: &Address| Nothing).unwrap_err();
    assert!(matches!(error.kind, AdoptErrorKind::NotAStream), "{error}");
    let (peer, fd) = Plain::pair();
    let refused = reactor
        .listen(UnixSeqpacket::at("@unused").on(fd), Scripts::default())
        .unwrap_err();
    assert!(
        matches!(refused.kind, AdoptErrorKind::NotListening),
        "{refused}"
    );
    drop(peer);
    let unconnected = rustix::net::socket_with(
        rustix::net::AddressFamily::UNIX,
        rustix::net::SocketType::SEQPACKET,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )
    .unwrap();
    let refused = reactor
        .adopt(UnixSeqpacket, unconnected, Script::new())
        .unwrap_err();
    assert!(
        matches!(refused.kind, AdoptErrorKind::NotConnected),
        "{refused}"
    );
    assert!(refused.fd.as_fd().try_clone_to_owned().is_ok());
}

struct Nothing;

impl<T: bowline::Transport> bowline::Protocol<T> for Nothing {
    fn data_received(&mut self, _: &mut bowline::Context<'_, T>, _: &[u8]) {}
}

#[test]
fn exactly_one_is_accepted_and_connected_with_one_protocol() {
    let place = Origin::Accepted.place();
    let mut reactor = Reactor::new().unwrap();
    let path = place.path();
    let (server, client) = (
        Script::echo(),
        Script::new().on_made(|transport, _| {
            transport.send(b"once");
        }),
    );
    let (at_server, at_client) = (server.notes(), client.notes());
    let here = UnixSeqpacket::at(path.clone());
    let listener = reactor.listen(here, bowline::Once::new(server)).unwrap();
    let there = UnixSeqpacket::to(path.clone());
    reactor.connect(there, bowline::Once::new(client)).unwrap();
    run_until(&mut reactor, |_| at_client.count() == 1);
    assert_eq!(at_server.data(), [b"once"]);
    assert!(reactor.get(listener).is_none() && !path.exists());
}
