//! IPv6 addresses that name the interface they are on.

use std::cell::RefCell;
use std::io::{Read, Write};
use std::net::{
    Ipv6Addr, SocketAddr, SocketAddrV6, TcpListener as StdTcpListener, TcpStream as StdTcpStream,
};
use std::process::{Command, Stdio};
use std::rc::Rc;
use std::time::Duration;

use bowline::{Address, Reactor, Transports};

use crate::support::{DescriptorLedger, Record, Recorder, run_until};

/// Set in the process that has a network of its own.
const IS_ALONE: &str = "BOWLINE_TEST_NETWORK";

/// A link-local address of this machine, with the number of its interface. What is sent
/// to it stays on this machine.
fn link_local() -> Option<(Ipv6Addr, u32)> {
    const TENTATIVE: u8 = 0x40;
    let listed = std::fs::read_to_string("/proc/net/if_inet6").ok()?;
    listed.lines().find_map(|line| {
        let mut words = line.split_ascii_whitespace();
        let address = u128::from_str_radix(words.next()?, 16).ok()?;
        let interface = u32::from_str_radix(words.next()?, 16).ok()?;
        let flags = u8::from_str_radix(words.nth(2)?, 16).ok()?;
        let address = Ipv6Addr::from(address);
        let is_usable = address.is_unicast_link_local() && flags & TENTATIVE == 0;
        is_usable.then_some((address, interface))
    })
}

/// Runs the test with such an address on the loopback of a network of its own, where
/// this machine has none; whether that can be.
fn in_own_network(test: &str) -> bool {
    let script = "ip link set lo up && ip address add fe80::1/64 dev lo nodad && exec \"$@\"";
    let output = Command::new("unshare")
        .args(["--user", "--map-root-user", "--net"])
        .args(["sh", "-c", script, "sh"])
        .arg(std::env::current_exe().expect("Linux knows"))
        .args(["--exact", "--nocapture", test])
        .env(IS_ALONE, "1")
        .stdin(Stdio::null())
        .output();
    let Ok(output) = output else {
        return false;
    };
    let said = String::from_utf8_lossy(&output.stdout);
    if !said.contains("running 1 test") {
        return false;
    }
    assert!(output.status.success(), "{said}");
    true
}

/// Contract T-04, L-01, L-13, C-13: the scope is in every address that one is told: of
/// the listener, of whom a protocol is built for, of both ends of both connections.
#[test]
fn scope_of_an_address_is_kept_at_both_ends() {
    let _ledger = DescriptorLedger::open();
    let Some((address, scope)) = link_local() else {
        let is_alone = std::env::var_os(IS_ALONE).is_some();
        assert!(!is_alone, "the address that was added is not there");
        let test = "scoped::scope_of_an_address_is_kept_at_both_ends";
        let was_run = in_own_network(test);
        assert!(
            was_run || std::env::var_os("CI").is_none(),
            "no link-local address, and none can be had: install iproute2 and util-linux"
        );
        if !was_run {
            let text = b"NOT RUN: scope of IPv6 addresses, for want of such an address\n";
            let _ = std::io::stderr().write_all(text);
        }
        return;
    };
    assert_ne!(scope, 0);
    let at = |port| SocketAddr::V6(SocketAddrV6::new(address, port, 0, scope));
    accepted(at(0));
    connected(at(0));
}

/// As a server.
fn accepted(at: SocketAddr) {
    let record = Record::default();
    let built_for = Rc::new(RefCell::new(Vec::new()));
    let mut reactor = Reactor::new().expect("epoll");
    let (recorded, told) = (record.clone(), Rc::clone(&built_for));
    let factory = move |peer: &Address| {
        told.borrow_mut().push(peer.clone());
        Recorder::new(&recorded)
    };
    let listener = reactor.listen_tcp(at, factory).expect("its own address");
    let listens = reactor.get(listener).expect("it is there").address();
    let listens = listens.as_inet().expect("TCP");
    assert_scoped(listens, at);
    assert_ne!(listens.port(), 0);
    let client = StdTcpStream::connect(listens).expect("it listens");
    run_until(&mut reactor, |_| !record.summary().is_empty());
    let it = reactor.get(record.handle(0)).expect("it is open");
    let theirs = client.local_addr().expect("connected");
    assert_scoped(theirs, at);
    assert_eq!(it.host(), Address::Inet(listens));
    assert_eq!(it.peer(), Address::Inet(theirs));
    assert_eq!(*built_for.borrow(), [Address::Inet(theirs)]);
}

/// As a client, by the address and by the same in writing.
fn connected(at: SocketAddr) {
    let server = StdTcpListener::bind(at).expect("its own address");
    let address = server.local_addr().expect("bound");
    assert_scoped(address, at);
    for by_host in [false, true] {
        let mut reactor = Reactor::new().expect("epoll");
        let record = Record::default();
        let recorded = record.clone();
        let factory = move |_: &Address| Recorder::new(&recorded);
        if by_host {
            let SocketAddr::V6(v6) = address else {
                panic!("{address}");
            };
            let host = format!("{}%{}", v6.ip(), v6.scope_id());
            reactor
                .connect_host(&host, address.port(), factory)
                .expect("it begins");
        } else {
            reactor.connect_tcp(address, factory).expect("it begins");
        }
        run_until(&mut reactor, |_| !record.summary().is_empty());
        let (mut accepted, theirs) = server.accept().expect("it is connected");
        let it = reactor.get(record.handle(0)).expect("it is open");
        assert_eq!(it.peer(), Address::Inet(address));
        assert_eq!(it.host(), Address::Inet(theirs));
        assert_scoped(theirs, at);
        let _ = it.write(b"x");
        reactor.turn(Some(Duration::ZERO));
        accepted.read_exact(&mut [0]).expect("it was written");
    }
}

#[track_caller]
fn assert_scoped(found: SocketAddr, wanted: SocketAddr) {
    let scope = |address| match address {
        SocketAddr::V6(address) => (*address.ip(), address.scope_id()),
        address => panic!("{address}"),
    };
    assert_eq!(scope(found), scope(wanted));
}
