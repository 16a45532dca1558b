//! What all datagram sockets have in common, over each kind.

use std::cell::{Cell, RefCell};
use std::io::ErrorKind;
use std::rc::Rc;

use bowline::error::{ListenStep, SendRefusal};
use bowline::{Address, DatagramHandle, Reactor, SendStatus, TransportState, Transports};

use crate::harness::{Kind, Place, Script, get, over_all};
use crate::support::{run_until, run_until_quiet};

/// Contract D-02, D-19, D-20. No bytes are a datagram too.
#[test]
fn datagrams_arrive_whole_one_by_one_with_their_senders() {
    over_all(|place| {
        let mut reactor = Reactor::new().unwrap();
        let script = Script::new();
        let notes = script.notes();
        let (_, here) = place.listen(&mut reactor, script);
        let (one, other) = (place.plain(), place.plain());
        let all: [&[u8]; 4] = [b"first", b"", &[7; 9_000], b"last"];
        for (number, data) in all.into_iter().enumerate() {
            let sender = if number % 2 == 0 { &one } else { &other };
            sender.send(data, &here);
        }
        run_until(&mut reactor, |_| notes.count() == 4);
        notes.told(|told| {
            for (number, received) in told.received.iter().enumerate() {
                let sender = if number % 2 == 0 { &one } else { &other };
                assert_eq!(received.data, all[number]);
                assert_eq!(received.length, all[number].len());
                assert_eq!(received.from, sender.address());
            }
        });
    });
}

/// Contract D-02, D-15, D-19.
#[test]
fn what_is_sent_arrives_whole_in_order_and_from_where_the_socket_is_bound() {
    over_all(|place| {
        let mut reactor = Reactor::new().unwrap();
        let (handle, here) = place.listen(&mut reactor, Script::new());
        let peer = place.plain();
        let to = peer.address();
        let transport = get(&mut reactor, handle);
        assert_eq!(transport.send_to(b"one", to.as_ref()), SendStatus::Ready);
        assert_eq!(transport.send_to(b"", to.as_ref()), SendStatus::Ready);
        let parts: [&[u8]; 3] = [b"th", b"", b"ree"];
        let status = transport.send_sequence(&parts, Some(to.as_ref()));
        assert_eq!(status, SendStatus::Ready);
        assert_eq!(
            (transport.unsent_datagrams(), transport.unsent_bytes()),
            (3, 8)
        );
        assert!(
            peer.try_receive().is_none(),
            "nothing leaves inside of a call"
        );
        let mut arrived = Vec::new();
        run_until(&mut reactor, |_| {
            arrived.extend(peer.try_receive());
            arrived.len() == 3
        });
        let expected = ["one", "", "three"].map(|data| (data.into(), here.clone()));
        assert_eq!(arrived, expected);
        let transport = get(&mut reactor, handle);
        assert_eq!(
            (transport.unsent_datagrams(), transport.counts().sent),
            (0, 3)
        );
    });
}

#[test]
fn an_echo_answers_whoever_asks() {
    over_all(|place| {
        let mut reactor = Reactor::new().unwrap();
        let (_, here) = place.listen(&mut reactor, Script::echo());
        let peers: Vec<_> = (0..20).map(|_| place.plain()).collect();
        for round in 0..50_u8 {
            for (number, peer) in peers.iter().enumerate() {
                peer.send(&[round, number as u8], &here);
                reactor.turn(Some(std::time::Duration::ZERO));
            }
            let mut answers = vec![None; peers.len()];
            run_until(&mut reactor, |_| {
                for (answer, peer) in answers.iter_mut().zip(&peers) {
                    *answer = answer.take().or_else(|| peer.try_receive());
                }
                answers.iter().all(Option::is_some)
            });
            for (number, answer) in answers.into_iter().enumerate() {
                let (data, from) = answer.unwrap();
                assert_eq!((data, from), (vec![round, number as u8], here.clone()));
            }
        }
    });
}

/// Contract D-03, M-05, W-57.
#[test]
fn what_waits_beyond_a_turn_is_delivered_without_another_event() {
    over_all(|place| {
        let mut reactor = Reactor::new().unwrap();
        // A few datagrams a turn.
        let budgets = reactor.transport_budgets();
        reactor.set_transport_budgets(budgets.read_bytes(4_096));
        let script = Script::new();
        let notes = script.notes();
        let (_, here) = place.listen(&mut reactor, script);
        run_until_quiet(&mut reactor);
        let peer = place.plain();
        // As many as a UNIX socket holds by default, and some without a byte.
        let count = if place.kind.is_udp() { 100 } else { 10 };
        for number in 0..count {
            let data = if number % 2 == 0 {
                vec![]
            } else {
                vec![1; 1_000]
            };
            peer.send(&data, &here);
        }
        let before = reactor.statistics();
        let mut turns = 0;
        while notes.count() < count {
            let delivered = notes.count();
            reactor.turn(Some(std::time::Duration::ZERO));
            let now = notes.count() - delivered;
            assert!(now <= 4, "{now} in one turn, of a budget for 4");
            turns += 1;
            assert!(turns < 1_000, "{delivered} of {count} came");
        }
        let events = reactor.statistics().events - before.events;
        assert!(events <= 2, "{events} events for {count} datagrams");
        assert_eq!(notes.count(), count);
    });
}

/// Contract D-04, D-16, W-58.
#[test]
fn stopping_inside_of_a_callback_delivers_nothing_more_and_is_told_after_it() {
    over_all(|place| {
        let mut reactor = Reactor::new().unwrap();
        let is_inside = Rc::new(Cell::new(false));
        let inside = Rc::clone(&is_inside);
        let stopped_inside = Rc::clone(&is_inside);
        let script = Script::new()
            .on_datagram(move |transport, _, _| {
                inside.set(true);
                transport.stop_listening();
                transport.stop_listening();
                assert_eq!(transport.state(), TransportState::Closing);
                assert_eq!(
                    transport.send(b"late"),
                    SendStatus::Refused(SendRefusal::Closed)
                );
                inside.set(false);
            })
            .on_stop(move |transport, _| {
                assert!(!stopped_inside.get(), "told inside of another callback");
                assert_eq!(transport.state(), TransportState::Lost);
            });
        let notes = script.notes();
        let (handle, here) = place.listen(&mut reactor, script);
        let peer = place.plain();
        for _ in 0..5 {
            peer.send(b"datagram", &here);
        }
        run_until(&mut reactor, |_| notes.is_stopped());
        assert_eq!(notes.count(), 1, "the others of the batch were delivered");
        notes.told(|told| assert_eq!(told.calls, ["started", "datagram", "stopped"]));
        assert!(reactor.get(handle).is_none());
        // A socket in its place is not deaf.
        let script = Script::new();
        let notes = script.notes();
        if !place.kind.is_udp() {
            place.listen_at(&mut reactor, &here, script).unwrap();
            peer.send(b"again", &here);
            run_until(&mut reactor, |_| notes.data() == [b"again"]);
        }
    });
}

#[test]
fn an_abort_drops_what_waits_and_is_told_so() {
    over_all(|place| {
        let mut reactor = Reactor::new().unwrap();
        let unsent = Rc::new(Cell::new((0, 0)));
        let seen = Rc::clone(&unsent);
        let script = Script::new().on_stop(move |transport, _| {
            seen.set((transport.unsent_datagrams(), transport.unsent_bytes()));
        });
        let notes = script.notes();
        let (handle, here) = place.listen(&mut reactor, script);
        let peer = place.plain();
        let transport = get(&mut reactor, handle);
        transport.send_to(b"dropped", peer.address().as_ref());
        transport.abort();
        run_until(&mut reactor, |_| notes.is_stopped());
        notes.told(|told| assert_eq!(told.stopped, ["aborted by us"]));
        assert_eq!(unsent.get(), (1, 7));
        assert!(peer.try_receive().is_none());
        // Its address is free.
        place.listen_at(&mut reactor, &here, Script::new()).unwrap();
    });
}

#[test]
fn stopping_sends_first_what_was_taken() {
    over_all(|place| {
        let mut reactor = Reactor::new().unwrap();
        let script = Script::new();
        let notes = script.notes();
        let (handle, _) = place.listen(&mut reactor, script);
        let peer = place.plain();
        let transport = get(&mut reactor, handle);
        for number in 0..8 {
            transport.send_to(&[number], peer.address().as_ref());
        }
        transport.stop_listening();
        run_until(&mut reactor, |_| notes.is_stopped());
        let expected: Vec<_> = (0..8).map(|number| vec![number]).collect();
        assert_eq!(peer.receive_all(), expected);
        notes.told(|told| assert_eq!(told.stopped, ["closed cleanly"]));
    });
}

/// Contract D-05.
#[test]
fn a_panic_costs_its_datagram_and_the_next_is_delivered() {
    over_all(|place| {
        let mut reactor = Reactor::new().unwrap();
        let script = Script::echo().on_datagram(|transport, _, datagram| {
            assert_ne!(datagram.data, b"bad", "as it should");
            transport.send_to(datagram.data, datagram.from);
        });
        let notes = script.notes();
        let (handle, here) = place.listen(&mut reactor, script);
        let peer = place.plain();
        for data in [&b"one"[..], b"bad", b"two", b"bad", b"three"] {
            peer.send(data, &here);
        }
        let mut answers = Vec::new();
        run_until(&mut reactor, |_| {
            answers.extend(peer.try_receive().map(|it| it.0));
            answers.len() == 3
        });
        assert_eq!(answers, [&b"one"[..], b"two", b"three"]);
        assert_eq!(notes.count(), 5);
        assert!(!notes.is_stopped());
        assert_eq!(get(&mut reactor, handle).counts().received, 5);
    });
}

#[test]
fn a_panic_at_the_start_is_the_end() {
    over_all(|place| {
        let mut reactor = Reactor::new().unwrap();
        let script = Script::new().on_start(|_, _| panic!("as it should"));
        let notes = script.notes();
        let (handle, _) = place.listen(&mut reactor, script);
        run_until(&mut reactor, |_| notes.is_stopped());
        notes.told(|told| {
            assert_eq!(told.calls, ["started", "stopped"]);
            assert!(
                told.stopped[0].contains("as it should"),
                "{:?}",
                told.stopped
            );
        });
        assert!(reactor.get(handle).is_none());
    });
}

#[test]
fn a_panic_at_the_end_is_the_end_as_well() {
    over_all(|place| {
        let mut reactor = Reactor::new().unwrap();
        let script = Script::new().on_stop(|_, _| panic!("as it should"));
        let notes = script.notes();
        let (handle, here) = place.listen(&mut reactor, script);
        run_until_quiet(&mut reactor);
        get(&mut reactor, handle).stop_listening();
        run_until(&mut reactor, |reactor| reactor.get(handle).is_none());
        notes.told(|told| assert_eq!(told.stopped.len(), 1));
        place.listen_at(&mut reactor, &here, Script::new()).unwrap();
    });
}

#[test]
fn a_pause_holds_back_what_was_received_already() {
    over_all(|place| {
        let mut reactor = Reactor::new().unwrap();
        let script = Script::new().on_datagram(|transport, _, _| transport.pause_producing());
        let notes = script.notes();
        let (handle, here) = place.listen(&mut reactor, script);
        let peer = place.plain();
        for number in 0..4 {
            peer.send(&[number], &here);
        }
        for number in 1..=4 {
            run_until(&mut reactor, |_| notes.count() == number);
            run_until_quiet(&mut reactor);
            assert_eq!(notes.count(), number, "delivered during the pause");
            let transport = get(&mut reactor, handle);
            assert!(transport.is_reading_paused());
            transport.resume_producing();
        }
        let expected: Vec<_> = (0..4).map(|number| vec![number]).collect();
        assert_eq!(notes.data(), expected);
        // What comes during a pause waits in the kernel.
        get(&mut reactor, handle).pause_producing();
        peer.send(b"later", &here);
        run_until_quiet(&mut reactor);
        assert_eq!(notes.count(), 4);
        get(&mut reactor, handle).resume_producing();
        run_until(&mut reactor, |_| notes.count() == 5);
    });
}

/// Contract D-11, D-19.
#[test]
fn a_connected_socket_talks_with_its_peer_alone() {
    over_all(|place| {
        let mut reactor = Reactor::new().unwrap();
        let (peer, stranger) = (place.plain(), place.plain());
        let script = Script::new();
        let notes = script.notes();
        let handle = place
            .connect(&mut reactor, &peer.address(), script)
            .unwrap();
        let transport = get(&mut reactor, handle);
        assert_eq!(transport.peer(), Some(peer.address()));
        assert_eq!(transport.send(b"hello"), SendStatus::Ready);
        let mut arrived = None;
        run_until(&mut reactor, |_| {
            arrived = peer.try_receive();
            arrived.is_some()
        });
        let (data, from) = arrived.unwrap();
        assert_eq!(data, b"hello");
        assert_eq!(from, get(&mut reactor, handle).host());
        peer.send(b"answer", &from);
        if place.kind.is_udp() {
            // A UNIX socket answers such a one with an error.
            stranger.send(b"not for you", &from);
        }
        run_until(&mut reactor, |_| notes.count() == 1);
        run_until_quiet(&mut reactor);
        assert_eq!(notes.data(), [b"answer"]);
        // It may be connected to another, and then talks with that one.
        let other = stranger.address();
        get(&mut reactor, handle).connect(other.as_ref()).unwrap();
        assert_eq!(get(&mut reactor, handle).peer(), Some(other));
        get(&mut reactor, handle).send(b"now you");
        run_until(&mut reactor, |_| {
            stranger.try_receive().is_some_and(|it| it.0 == b"now you")
        });
        assert!(peer.try_receive().is_none());
    });
}

#[test]
fn two_of_ours_talk_with_each_other() {
    over_all(|place| {
        let mut reactor = Reactor::new().unwrap();
        let (_, here) = place.listen(&mut reactor, Script::echo());
        let left = Rc::new(Cell::new(100_u8));
        let counter = Rc::clone(&left);
        let script = Script::new()
            .on_start(|transport, _| {
                assert_eq!(transport.send(&[0]), SendStatus::Ready);
            })
            .on_datagram(move |transport, _, datagram| {
                counter.set(counter.get() - 1);
                if counter.get() > 0 {
                    transport.send(&[datagram.data[0] + 1]);
                }
            });
        let notes = script.notes();
        place.connect(&mut reactor, &here, script).unwrap();
        run_until(&mut reactor, |_| left.get() == 0);
        let expected: Vec<_> = (0..100).map(|number| vec![number]).collect();
        assert_eq!(notes.data(), expected);
    });
}

/// Contract D-13, D-21.
#[test]
fn an_address_that_is_taken_is_refused() {
    over_all(|place| {
        let mut reactor = Reactor::new().unwrap();
        let (_, here) = place.listen(&mut reactor, Script::new());
        let error = place
            .listen_at(&mut reactor, &here, Script::new())
            .unwrap_err();
        assert_eq!(error.error.kind(), ErrorKind::AddrInUse);
        assert_eq!((error.step, &error.address), (ListenStep::Bind, &here));
        assert_eq!(reactor.registered(), 1);
    });
}

/// Contract D-09, D-12.
#[test]
fn what_cannot_be_sent_is_refused_with_the_reason() {
    over_all(|place| {
        let mut reactor = Reactor::new().unwrap();
        let (handle, _) = place.listen(&mut reactor, Script::new());
        let peer = place.plain();
        let to = peer.address();
        let other = match place.kind {
            Kind::UdpV4 => Kind::UdpV6,
            Kind::UdpV6 => Kind::UnixPath,
            Kind::UnixPath | Kind::UnixAbstract => Kind::UdpV4,
        };
        let other = other.place_beside().plain().address();
        let longest = match place.kind {
            Kind::UdpV4 => 65_507,
            Kind::UdpV6 => 65_527,
            Kind::UnixPath | Kind::UnixAbstract => 212_960,
        };
        let too_long = vec![0; longest + 1];
        let transport = get(&mut reactor, handle);
        let refused = |why| SendStatus::Refused(why);
        assert_eq!(
            transport.send_to(b"a", other.as_ref()),
            refused(SendRefusal::WrongFamily)
        );
        assert_eq!(transport.send(b"a"), refused(SendRefusal::NotConnected));
        assert_eq!(
            transport.send_to(&too_long, to.as_ref()),
            refused(SendRefusal::TooLong)
        );
        assert_eq!(transport.counts().refused, 3);
        assert_eq!(transport.unsent_datagrams(), 0);
        assert!(transport.connect(other.as_ref()).is_err());
        assert_eq!(transport.peer(), None);
        if place.kind.is_udp() {
            // The longest that there is does leave.
            let status = transport.send_to(&too_long[..longest], to.as_ref());
            assert_eq!(status, SendStatus::Ready);
            run_until(&mut reactor, |_| {
                peer.try_receive().is_some_and(|it| it.0.len() == longest)
            });
        }
    });
}

/// Contract D-01: once for each socket, which has its protocol to itself or shares it.
#[test]
fn a_protocol_that_is_shared_is_told_of_each_socket() {
    over_all(|place| {
        let mut reactor = Reactor::new().unwrap();
        let script = Script::echo();
        let notes = script.notes();
        let shared = Rc::new(RefCell::new(script));
        let mut addresses = Vec::new();
        for _ in 0..2 {
            addresses.push(listen_shared(&place, &mut reactor, &shared));
        }
        let peer = place.plain();
        for (number, (_, here)) in addresses.iter().enumerate() {
            peer.send(&[number as u8], here);
            run_until(&mut reactor, |_| notes.count() == number + 1);
        }
        for (handle, _) in &addresses {
            get(&mut reactor, *handle).stop_listening();
        }
        run_until(&mut reactor, |_| notes.told(|told| told.stopped.len()) == 2);
        notes.told(|told| assert_eq!(told.started, 2));
        // And again.
        let (handle, _) = listen_shared(&place, &mut reactor, &shared);
        run_until(&mut reactor, |_| notes.told(|told| told.started) == 3);
        get(&mut reactor, handle).stop_listening();
        run_until(&mut reactor, |_| notes.told(|told| told.stopped.len()) == 3);
    });
}

fn listen_shared(
    place: &Place,
    reactor: &mut Reactor,
    shared: &Rc<RefCell<Script>>,
) -> (DatagramHandle, Address) {
    let protocol = Rc::clone(shared);
    let handle = match place.address() {
        Address::Inet(address) => {
            let handle = reactor.listen(bowline::Udp::at(address), protocol).unwrap();
            crate::harness::of_udp(reactor, handle)
        }
        Address::Unix(address) => {
            let endpoint = bowline::UnixDatagram::at(address);
            let handle = reactor.listen(endpoint, protocol).unwrap();
            crate::harness::of_unix(reactor, handle)
        }
        _ => unreachable!("there are no others"),
    };
    let address = get(reactor, handle).host();
    (handle, address)
}

/// Contract W-60.
#[test]
fn a_datagram_longer_than_wanted_is_cut_and_that_is_told() {
    over_all(|place| {
        let mut reactor = Reactor::new().unwrap();
        let script = Script::new();
        let notes = script.notes();
        let handle = match place.address() {
            Address::Inet(address) => {
                let endpoint = bowline::Udp::at(address).max_datagram(100);
                let handle = reactor.listen(endpoint, script).unwrap();
                crate::harness::of_udp(&mut reactor, handle)
            }
            Address::Unix(address) => {
                let endpoint = bowline::UnixDatagram::at(address).max_datagram(100);
                let handle = reactor.listen(endpoint, script).unwrap();
                crate::harness::of_unix(&mut reactor, handle)
            }
            _ => unreachable!("there are no others"),
        };
        let here = get(&mut reactor, handle).host();
        let peer = place.plain();
        peer.send(&[1; 100], &here);
        peer.send(&[2; 101], &here);
        run_until(&mut reactor, |_| notes.count() == 2);
        notes.told(|told| {
            let lengths = told.received.iter().map(|it| (it.data.len(), it.length));
            assert_eq!(lengths.collect::<Vec<_>>(), [(100, 100), (100, 101)]);
        });
        let counts = get(&mut reactor, handle).counts();
        assert_eq!((counts.received, counts.truncated), (2, 1));
    });
}

#[test]
fn a_protocol_is_reached_by_a_timer() {
    over_all(|place| {
        let mut reactor = Reactor::new().unwrap();
        let script = Script::new();
        let notes = script.notes();
        let (handle, here) = place.listen(&mut reactor, script);
        let peer = place.plain();
        let to = peer.address();
        if place.kind.is_udp() {
            reactor.call_protocol::<bowline::UdpPort, Script>(handle, move |script, cx| {
                use bowline::DatagramTransport as _;
                script.notes.change(|told| told.calls.push("timer"));
                cx.transport.send_to(b"by a timer", to.as_ref());
            });
        } else {
            reactor.call_protocol::<bowline::UnixDatagramPort, Script>(
                handle,
                move |script, cx| {
                    use bowline::DatagramTransport as _;
                    script.notes.change(|told| told.calls.push("timer"));
                    cx.transport.send_to(b"by a timer", to.as_ref());
                },
            );
        }
        let mut arrived = None;
        run_until(&mut reactor, |_| {
            arrived = arrived.take().or_else(|| peer.try_receive());
            arrived.is_some()
        });
        assert_eq!(arrived.unwrap(), (b"by a timer".to_vec(), here));
        notes.told(|told| assert!(told.calls.contains(&"timer")));
    });
}
