//! What only UDP has.

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};

use bowline::{Address, MulticastInterface, QueueLimits, Reactor, SendStatus, Transports, Udp};

use crate::harness::{Kind, Script, dead_port, get, of_udp, udp_options};
use crate::support::{DescriptorLedger, run_until, run_until_quiet};

const LOCALHOST: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

/// Contract D-06, D-08, W-56: an error alone, with nothing to be read, is told too.
#[test]
fn a_connected_socket_is_told_that_nobody_is_there_and_stays_open() {
    let _ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let peer = dead_port();
    let script = Script::new();
    let notes = script.notes();
    let handle = reactor.connect(Udp::to(peer), script).unwrap();
    let handle = of_udp(&mut reactor, handle);
    for number in 1..=3 {
        assert_eq!(
            get(&mut reactor, handle).send(b"anybody?"),
            SendStatus::Ready
        );
        run_until(&mut reactor, |_| {
            notes.told(|told| told.refused.len()) == number
        });
    }
    notes.told(|told| {
        assert_eq!(told.refused, [ErrorKind::ConnectionRefused; 3]);
        assert!(told.failed.is_empty() && told.stopped.is_empty());
    });
    // Once somebody is there, all is well.
    let late = UdpSocket::bind(peer).unwrap();
    get(&mut reactor, handle).send(b"now?");
    run_until_quiet(&mut reactor);
    let mut data = [0; 10];
    let (length, from) = late.recv_from(&mut data).unwrap();
    late.send_to(&data[..length], from).unwrap();
    run_until(&mut reactor, |_| notes.data() == [b"now?"]);
}

/// What the kernel says of a datagram that was sent before, at the next one, does not cost
/// that one.
#[test]
fn a_refusal_that_a_send_is_told_costs_no_datagram() {
    let _ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let peer = dead_port();
    let script = Script::new();
    let notes = script.notes();
    let handle = reactor.connect(Udp::to(peer), script).unwrap();
    let handle = of_udp(&mut reactor, handle);
    run_until_quiet(&mut reactor);
    for _ in 0..50 {
        // The error of the first is there by the time of the second, in the same turn.
        let transport = get(&mut reactor, handle);
        transport.send(b"one");
        transport.send(b"two");
        transport.send(b"three");
        run_until_quiet(&mut reactor);
    }
    notes.told(|told| {
        assert!(told.failed.is_empty(), "{:?}", told.failed);
        assert!(told.refused.len() >= 50, "{}", told.refused.len());
    });
    assert_eq!(get(&mut reactor, handle).counts().sent, 150);
}

/// Contract D-06.
#[test]
fn a_socket_with_many_peers_is_not_told_of_one_that_is_gone() {
    let _ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let script = Script::echo();
    let notes = script.notes();
    let handle = reactor.listen(Udp::at(LOCALHOST), script).unwrap();
    let handle = of_udp(&mut reactor, handle);
    let here = get(&mut reactor, handle).host().as_inet().unwrap();
    for _ in 0..10 {
        get(&mut reactor, handle).send_to(b"anybody?", dead_port().into());
        run_until_quiet(&mut reactor);
    }
    let client = UdpSocket::bind(LOCALHOST).unwrap();
    client.send_to(b"here", here).unwrap();
    run_until(&mut reactor, |_| notes.count() == 1);
    notes.told(|told| assert!(told.refused.is_empty() && told.stopped.is_empty()));
}

/// Contract D-14.
#[test]
fn broadcast_has_to_be_allowed() {
    let _ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let script = Script::new();
    let notes = script.notes();
    let handle = reactor.listen(Udp::at(LOCALHOST), script).unwrap();
    assert!(!udp_options(&mut reactor, handle).broadcast().unwrap());
    let everybody = SocketAddr::from((Ipv4Addr::BROADCAST, 9));
    udp_options(&mut reactor, handle).send_to(b"all", everybody.into());
    run_until(&mut reactor, |_| notes.told(|told| told.failed.len()) == 1);
    notes.told(|told| assert_eq!(told.failed[0].2.kind(), ErrorKind::PermissionDenied));
    udp_options(&mut reactor, handle)
        .set_broadcast(true)
        .unwrap();
    assert!(udp_options(&mut reactor, handle).broadcast().unwrap());
    let endpoint = Udp::at(LOCALHOST).broadcast(true);
    let other = reactor.listen(endpoint, Script::new()).unwrap();
    assert!(udp_options(&mut reactor, other).broadcast().unwrap());
    // That of the loopback network is the only one that leads to somebody here.
    let receiver = Udp::at(([127, 255, 255, 255], 0).into());
    let script = Script::new();
    let notes = script.notes();
    let receiver = reactor.listen(receiver, script).unwrap();
    let there = udp_options(&mut reactor, receiver).host();
    udp_options(&mut reactor, other).send_to(b"all", there.as_ref());
    run_until(&mut reactor, |_| notes.data() == [b"all"]);
}

/// Contract D-13.
#[test]
fn a_socket_of_both_families_is_reached_by_both_unless_asked_not_to() {
    let _ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    for is_only in [false, true] {
        let script = Script::new();
        let notes = script.notes();
        let everywhere = "[::]:0".parse().unwrap();
        let endpoint = Udp::at(everywhere).only_v6(is_only);
        let handle = reactor.listen(endpoint, script).unwrap();
        let here = udp_options(&mut reactor, handle).host().as_inet().unwrap();
        let client = UdpSocket::bind("[::1]:0").unwrap();
        client.send_to(b"six", ("::1", here.port())).unwrap();
        run_until(&mut reactor, |_| notes.data() == [b"six"]);
        let client = UdpSocket::bind(LOCALHOST).unwrap();
        client.send_to(b"four", ("127.0.0.1", here.port())).unwrap();
        if is_only {
            run_until_quiet(&mut reactor);
            assert_eq!(notes.count(), 1);
        } else {
            run_until(&mut reactor, |_| notes.count() == 2);
            let from = notes.told(|told| told.received[1].from.clone());
            let from = from.as_inet().unwrap().ip();
            assert_eq!(from, IpAddr::V6(Ipv4Addr::LOCALHOST.to_ipv6_mapped()));
        }
    }
}

/// One that is not the loopback, which has no groups of IPv6.
fn interface_of_v6() -> Option<u32> {
    let all = std::fs::read_to_string("/proc/net/if_inet6").ok()?;
    let of_link = all.lines().find(|line| line.starts_with("fe80"))?;
    u32::from_str_radix(of_link.split_whitespace().nth(1)?, 16).ok()
}

/// Contract D-18.
#[test]
fn what_is_sent_to_a_group_reaches_those_that_have_joined_it() {
    let _ledger = DescriptorLedger::open();
    let loopback = MulticastInterface::Address(Ipv4Addr::LOCALHOST);
    let mut cases: Vec<(SocketAddr, &str, MulticastInterface)> =
        vec![(LOCALHOST, "239.192.17.4", loopback)];
    match interface_of_v6() {
        Some(index) => {
            let index = MulticastInterface::Index(index);
            cases.push(("[::]:0".parse().unwrap(), "ff12::17:4", index));
        }
        None => eprintln!("SKIPPED: there is no interface for groups of IPv6"),
    }
    for (own, group, interface) in cases {
        let group: IpAddr = group.parse().unwrap();
        let mut reactor = Reactor::new().unwrap();
        let everywhere = match own {
            SocketAddr::V4(_) => SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)),
            SocketAddr::V6(_) => "[::]:0".parse().unwrap(),
        };
        let (member, stranger) = (Script::new(), Script::new());
        let (of_member, of_stranger) = (member.notes(), stranger.notes());
        let first = Udp::at(everywhere).reuse_address(true);
        let member = reactor.listen(first, member).unwrap();
        let port = udp_options(&mut reactor, member)
            .host()
            .as_inet()
            .unwrap()
            .port();
        let there = SocketAddr::new(everywhere.ip(), port);
        // Several listen on one port.
        let second = Udp::at(there).reuse_address(true);
        let stranger = reactor.listen(second, stranger).unwrap();
        let options = udp_options(&mut reactor, member);
        options.join_multicast(group, interface).unwrap();
        let again = options.join_multicast(group, interface).unwrap_err();
        assert_eq!(again.kind(), ErrorKind::AddrInUse);
        let no_group = IpAddr::V4(Ipv4Addr::LOCALHOST);
        assert!(options.join_multicast(no_group, interface).is_err());
        // It has joined another, so that it is asked for its groups alone.
        let other_group = match group {
            IpAddr::V4(_) => "239.192.17.5".parse().unwrap(),
            IpAddr::V6(_) => "ff12::17:5".parse().unwrap(),
        };
        udp_options(&mut reactor, stranger)
            .join_multicast(other_group, interface)
            .unwrap();

        let sender = reactor.listen(Udp::at(own), Script::new()).unwrap();
        let options = udp_options(&mut reactor, sender);
        options.set_multicast_interface(interface).unwrap();
        assert_eq!(options.multicast_ttl().unwrap(), 1);
        options.set_multicast_ttl(7).unwrap();
        assert_eq!(options.multicast_ttl().unwrap(), 7);
        assert!(options.set_multicast_ttl(256).is_err());
        let to = SocketAddr::new(group, port);
        options.send_to(b"to the group", to.into());
        run_until(&mut reactor, |_| of_member.count() == 1);
        assert_eq!(of_member.data(), [b"to the group"]);

        // Not to this machine, if asked not to; on the loopback network itself that has
        // no effect.
        let options = udp_options(&mut reactor, sender);
        assert!(options.multicast_loopback().unwrap());
        options.set_multicast_loopback(false).unwrap();
        assert!(!options.multicast_loopback().unwrap());
        if own.is_ipv6() {
            options.send_to(b"to others", to.into());
            run_until_quiet(&mut reactor);
            assert_eq!(of_member.count(), 1);
        }
        let options = udp_options(&mut reactor, sender);
        options.set_multicast_loopback(true).unwrap();
        // Not once it has left.
        let options = udp_options(&mut reactor, member);
        options.leave_multicast(group, interface).unwrap();
        let again = options.leave_multicast(group, interface).unwrap_err();
        assert_eq!(again.kind(), ErrorKind::AddrNotAvailable);
        udp_options(&mut reactor, sender).send_to(b"too late", to.into());
        run_until_quiet(&mut reactor);
        assert_eq!(of_member.count(), 1);
        assert_eq!(of_stranger.count(), 0, "it has joined another group");
    }
}

/// Whether the kernel is of a version that cuts and merges datagrams (Linux 5.0).
fn is_offloading_kernel() -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let major = release.split('.').next().unwrap();
    major.parse::<u32>().unwrap() >= 5
}

/// Datagrams that the kernel treats as one are sent and delivered one by one.
#[test]
fn a_stream_of_datagrams_is_offloaded_and_arrives_one_by_one() {
    for kind in [Kind::UdpV4, Kind::UdpV6] {
        for (sends, receives) in [(true, true), (true, false), (false, true)] {
            let place = kind.place();
            let mut reactor = Reactor::new().unwrap();
            let script = Script::new();
            let notes = script.notes();
            let own = place.address().as_inet().unwrap();
            let endpoint = Udp::at(own).offload(receives);
            let handle = reactor.listen(endpoint, script).unwrap();
            let here = udp_options(&mut reactor, handle).host().as_inet().unwrap();
            let receive = udp_options(&mut reactor, handle).offload().receive;
            let sender = Udp::to(here).offload(sends);
            let sender = reactor.connect(sender, Script::new()).unwrap();
            let segments = udp_options(&mut reactor, sender).offload().send_segments;
            if is_offloading_kernel() {
                assert_eq!((receive, segments > 1), (receives, sends));
            } else if receives != receive || sends != (segments > 1) {
                assert!(receives || !receive, "not asked for");
                eprintln!("SKIPPED: this kernel does not treat several datagrams as one");
                return;
            }
            // Of several lengths, so that runs begin and end.
            let lengths = (0..120).map(|number| match number % 40 {
                0..30 => 1_200,
                30 => 500,
                31 => 0,
                32..36 => 100,
                _ => 1_300,
            });
            let lengths: Vec<usize> = lengths.collect();
            udp_options(&mut reactor, sender).set_queue_limits(QueueLimits::default());
            for chunk in lengths.chunks(30) {
                for (number, length) in chunk.iter().enumerate() {
                    let data = vec![number as u8; *length];
                    assert!(udp_options(&mut reactor, sender).send(&data).is_taken());
                }
                let wanted = notes.count() + chunk.len();
                run_until(&mut reactor, |_| notes.count() == wanted);
            }
            let arrived = notes.data();
            let got: Vec<_> = arrived.iter().map(Vec::len).collect();
            assert_eq!(got, lengths, "{kind:?}, sends {sends}, receives {receives}");
            for (number, data) in arrived.iter().enumerate() {
                let expected = (number % 30) as u8;
                assert!(data.iter().all(|byte| *byte == expected));
            }
            let from = udp_options(&mut reactor, sender).host();
            notes.told(|told| assert!(told.received.iter().all(|it| it.from == from)));
        }
    }
}

/// What is offloaded and too long for the way is sent one by one.
#[test]
fn datagrams_too_long_to_be_cut_on_their_way_are_sent_all_the_same() {
    let _ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let script = Script::new();
    let notes = script.notes();
    let handle = reactor.listen(Udp::at(LOCALHOST), script).unwrap();
    let here = udp_options(&mut reactor, handle).host().as_inet().unwrap();
    let sender = reactor.connect(Udp::to(here), Script::new()).unwrap();
    // Two fit into one message of the kernel; cut, they would not fit the loopback's.
    for length in [32_000, 33_000, 65_507, 100] {
        let options = udp_options(&mut reactor, sender);
        for _ in 0..3 {
            assert!(options.send(&vec![1; length]).is_taken());
        }
        let wanted = notes.count() + 3;
        run_until(&mut reactor, |_| notes.count() == wanted);
    }
}

#[test]
fn what_the_kernel_drops_is_counted() {
    let _ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let endpoint = Udp::at(LOCALHOST).receive_buffer(4_096);
    let handle = reactor.listen(endpoint, Script::new()).unwrap();
    run_until_quiet(&mut reactor);
    let here = udp_options(&mut reactor, handle).host().as_inet().unwrap();
    assert_eq!(
        udp_options(&mut reactor, handle)
            .dropped_by_kernel()
            .unwrap(),
        0
    );
    udp_options(&mut reactor, handle).pause_producing();
    let client = UdpSocket::bind(LOCALHOST).unwrap();
    for _ in 0..100 {
        client.send_to(&[1; 1_000], here).unwrap();
    }
    udp_options(&mut reactor, handle).resume_producing();
    run_until_quiet(&mut reactor);
    let options = udp_options(&mut reactor, handle);
    let dropped = u64::from(options.dropped_by_kernel().unwrap());
    assert!(dropped > 0);
    assert_eq!(options.counts().received + dropped, 100);
}

#[test]
fn a_client_may_choose_the_address_that_it_sends_from() {
    let _ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let server = UdpSocket::bind(LOCALHOST).unwrap();
    let own = dead_port();
    let endpoint = Udp::to(server.local_addr().unwrap()).bind_address(own);
    let handle = reactor.connect(endpoint, Script::new()).unwrap();
    udp_options(&mut reactor, handle).send(b"from there");
    run_until_quiet(&mut reactor);
    let (_, from) = server.recv_from(&mut [0; 10]).unwrap();
    assert_eq!(from, own);
    assert_eq!(udp_options(&mut reactor, handle).host(), Address::Inet(own));
}
