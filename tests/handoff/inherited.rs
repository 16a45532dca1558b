//! Descriptors with names, from whoever had them.

use std::net::{TcpListener, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};

use bowline::handoff::Inherited;
use bowline::{Address, UnixAddress};

use crate::capture;
use crate::support::DescriptorLedger;

fn file() -> OwnedFd {
    std::fs::File::open("/dev/null")
        .expect("Linux has it")
        .into()
}

/// Which descriptor it is, whatever its number.
fn identity(fd: impl AsFd) -> u64 {
    rustix::fs::fstat(fd).expect("it is open").st_ino
}

fn memory() -> OwnedFd {
    rustix::fs::memfd_create("one of many", rustix::fs::MemfdFlags::CLOEXEC).expect("a memfd")
}

fn local(port: u16) -> Address {
    Address::Inet(([127, 0, 0, 1], port).into())
}

#[test]
fn each_is_claimed_once_by_its_name() {
    let _ledger = DescriptorLedger::open();
    let mut all = Inherited::new();
    assert!(all.is_empty());
    assert_eq!(all.len(), 0);
    let [first, second, other] = [memory(), memory(), memory()];
    let identities = [&first, &second, &other].map(identity);
    all.add("web", first);
    all.add("other", other);
    all.add(String::from("web"), second);
    assert_eq!(all.names().collect::<Vec<_>>(), ["web", "other", "web"]);
    assert_eq!(all.len(), 3);
    assert!(!all.is_empty());
    assert!(all.claim("we").is_none());
    // In the order in which they were added.
    for wanted in &identities[..2] {
        let claimed = all.claim("web").expect("added");
        assert_eq!(identity(&claimed), *wanted);
    }
    assert!(all.claim("web").is_none());
    assert_eq!(all.names().collect::<Vec<_>>(), ["other"]);
    let claimed = all.claim("other").expect("added");
    assert_eq!(identity(&claimed), identities[2]);
    assert!(all.is_empty());
}

#[test]
fn what_nobody_claims_is_closed_and_reported() {
    let ledger = DescriptorLedger::open();
    let mut all = Inherited::new();
    let listener = TcpListener::bind(("127.0.0.1", 0)).expect("loopback");
    let address = listener.local_addr().expect("an address");
    let (stream, other) = UnixStream::pair().expect("a pair");
    let datagram = UdpSocket::bind(("127.0.0.1", 0)).expect("loopback");
    let receives = datagram.local_addr().expect("an address");
    all.add("file", file());
    all.add("web", listener.into());
    all.add("stream", stream.into());
    all.add("datagram", datagram.into());
    let printed = format!("{all:?}");
    assert!(printed.starts_with("{\"file\": OwnedFd"), "{printed}");
    capture::start();
    drop(all);
    let reported = capture::lines("inherited");
    let wanted = [
        ("file", "no socket".to_owned()),
        ("web", format!("listener at {address}")),
        ("stream", "stream at unnamed".to_owned()),
        ("datagram", format!("socket at {receives}")),
    ]
    .map(|(name, what)| {
        format!("WARN: inherited descriptor {name:?} ({what}) was not claimed: closed")
    });
    assert_eq!(reported, wanted);
    drop(other);
    ledger.assert_balanced();
}

#[test]
fn others_are_moved_behind_those_that_are_here() {
    let _ledger = DescriptorLedger::open();
    let (mut one, mut other) = (Inherited::new(), Inherited::new());
    let [first, second] = [memory(), memory()];
    let identities = [&first, &second].map(identity);
    one.add("web", first);
    other.add("web", second);
    other.add("more", file());
    one.append(other);
    assert_eq!(one.names().collect::<Vec<_>>(), ["web", "web", "more"]);
    let claimed = one.claim("web").expect("added");
    assert_eq!(identity(&claimed), identities[0]);
}

#[test]
fn listener_is_claimed_by_name_and_address() {
    let _ledger = DescriptorLedger::open();
    let listener = TcpListener::bind(("127.0.0.1", 0)).expect("loopback");
    let port = listener.local_addr().expect("an address").port();
    let identity_of = identity(&listener);
    let mut all = Inherited::new();
    all.add("file", file());
    all.add("web", listener.into());
    for (name, address) in [
        ("other", local(port)),
        ("file", local(port)),
        ("web", local(port ^ 1)),
        ("web", Address::Inet(([127, 0, 0, 2], port).into())),
        ("web", Address::Inet(([127, 0, 0, 2], 0).into())),
        ("web", Address::Unix(UnixAddress::Unnamed)),
    ] {
        assert!(all.claim_listener(name, &address).is_none(), "{address}");
    }
    assert_eq!(all.len(), 2, "it stays where it is");
    let claimed = all.claim_listener("web", &local(port)).expect("it fits");
    assert_eq!(identity(&claimed), identity_of);
    // Port 0 fits every port.
    all.add("web", claimed);
    assert!(all.claim_listener("web", &local(0)).is_some());
}

#[test]
fn unix_listener_is_claimed_by_name_and_path() {
    let _ledger = DescriptorLedger::open();
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = |name: &str| directory.path().join(name);
    let at = |name| Address::Unix(UnixAddress::Path(path(name)));
    let listener = UnixListener::bind(path("web")).expect("bound");
    let mut all = Inherited::new();
    all.add("web", listener.into());
    assert!(all.claim_listener("web", &at("other")).is_none());
    assert!(all.claim_listener("web", &local(0)).is_none());
    let claimed = all.claim_listener("web", &at("web")).expect("it fits");
    // No name fits every path.
    all.add("web", claimed);
    let anywhere = Address::Unix(UnixAddress::Unnamed);
    assert!(all.claim_listener("web", &anywhere).is_some());
}

#[test]
fn sockets_that_do_not_listen_are_no_listeners() {
    let _ledger = DescriptorLedger::open();
    let directory = tempfile::tempdir().expect("temporary directory");
    let (stream, _other) = UnixStream::pair().expect("a pair");
    let datagram = UnixDatagram::bind(directory.path().join("datagram")).expect("bound");
    // As a stream, but of messages: it can listen.
    let flags = rustix::net::SocketFlags::CLOEXEC;
    let sequence = rustix::net::socket_with(
        rustix::net::AddressFamily::UNIX,
        rustix::net::SocketType::SEQPACKET,
        flags,
        None,
    )
    .expect("a socket");
    let path = directory.path().join("sequence");
    let address = rustix::net::SocketAddrUnix::new(&path).expect("short");
    rustix::net::bind(&sequence, &address).expect("bound");
    rustix::net::listen(&sequence, 1).expect("it can");
    let all: [OwnedFd; 3] = [stream.into(), datagram.into(), sequence];
    for fd in all {
        let mut inherited = Inherited::new();
        inherited.add("web", fd);
        let anywhere = Address::Unix(UnixAddress::Unnamed);
        assert!(inherited.claim_listener("web", &anywhere).is_none());
        assert!(inherited.claim("web").is_some(), "but it is there");
    }
}
