//! Packets over a connection, whoever has made it.

use std::cell::Cell;
use std::rc::Rc;

use bowline::error::{CallError, SendRefusal};
use bowline::{
    Context, Packet, PacketProtocol, PacketTransport, QueueLimits, Reactor, SendStatus,
    TransportState, Transports, UnixSeqpacket, UnixSeqpacketPort,
};

use crate::harness::{Origin, Plain, Script, get, over_all};
use crate::support::{run_until, run_until_quiet};

/// Contract W-16. No bytes are a packet too.
#[test]
fn packets_arrive_whole_one_by_one_and_in_order() {
    over_all(|place| {
        let mut reactor = Reactor::new().unwrap();
        let (peer, notes) = place.connection(&mut reactor, Script::new());
        let all: [&[u8]; 5] = [b"first", b"", &[7; 60_000], b"", b"last"];
        for data in all {
            peer.send(data);
        }
        run_until(&mut reactor, |_| notes.count() == all.len());
        assert_eq!(notes.data(), all);
        notes.told(|told| {
            let lengths: Vec<_> = told.received.iter().map(|it| it.length).collect();
            assert_eq!(lengths, [5, 0, 60_000, 0, 4]);
        });
        assert_eq!(notes.calls(), ["made"]);
        assert_eq!(get(&mut reactor, notes.handle()).counts().received, 5);
    });
}

/// Contract W-16.
#[test]
fn what_is_sent_arrives_whole_and_in_order() {
    over_all(|place| {
        let mut reactor = Reactor::new().unwrap();
        let (peer, notes) = place.connection(&mut reactor, Script::new());
        let transport = get(&mut reactor, notes.handle());
        assert_eq!(transport.send(b"one"), SendStatus::Ready);
        assert_eq!(transport.send(b""), SendStatus::Ready);
        let parts: [&[u8]; 3] = [b"th", b"", b"ree"];
        assert_eq!(transport.send_sequence(&parts), SendStatus::Ready);
        assert_eq!(
            (transport.unsent_packets(), transport.unsent_bytes()),
            (3, 8)
        );
        assert!(peer.receive().is_err(), "nothing leaves inside of a call");
        let mut arrived = Vec::new();
        run_until(&mut reactor, |_| {
            arrived.extend(peer.receive().ok().map(|it| it.0));
            arrived.len() == 3
        });
        assert_eq!(arrived, [&b"one"[..], b"", b"three"]);
        let transport = get(&mut reactor, notes.handle());
        assert_eq!(
            (transport.unsent_packets(), transport.counts().sent),
            (0, 3)
        );
    });
}

#[test]
fn an_echo_answers_each_packet() {
    over_all(|place| {
        let mut reactor = Reactor::new().unwrap();
        let (peer, notes) = place.connection(&mut reactor, Script::echo());
        for round in 0..200_usize {
            let data = vec![round as u8; round * 7];
            peer.send(&data);
            let mut answer = None;
            run_until(&mut reactor, |_| {
                answer = answer.take().or_else(|| peer.receive().ok());
                answer.is_some()
            });
            assert_eq!(answer.unwrap().0, data);
        }
        assert_eq!(notes.count(), 200);
    });
}

/// What waits beyond the budget of a turn is delivered without another event.
#[test]
fn a_flood_takes_turns() {
    over_all(|place| {
        let mut reactor = Reactor::new().unwrap();
        let budgets = reactor.transport_budgets();
        reactor.set_transport_budgets(budgets.read_bytes(4_096));
        let (peer, notes) = place.connection(&mut reactor, Script::new());
        run_until_quiet(&mut reactor);
        for number in 0..100_u8 {
            peer.send(&[number]);
        }
        let before = reactor.statistics();
        while notes.count() < 100 {
            let delivered = notes.count();
            reactor.turn(Some(std::time::Duration::ZERO));
            let now = notes.count() - delivered;
            assert!(
                (1..=4).contains(&now),
                "{now} in one turn, of a budget for 4"
            );
        }
        let events = reactor.statistics().events - before.events;
        assert!(events <= 2, "{events} events for 100 packets");
    });
}

#[test]
fn a_pause_holds_in_the_middle_of_what_was_received_at_once() {
    over_all(|place| {
        let mut reactor = Reactor::new().unwrap();
        let script = Script::new().on_packet(|transport, _, packet| {
            if packet.data == b"pause" {
                transport.pause_producing();
            }
        });
        let (peer, notes) = place.connection(&mut reactor, script);
        for data in [&b"one"[..], b"pause", b"two", b"pause", b"three"] {
            peer.send(data);
        }
        for expected in [2, 4] {
            run_until(&mut reactor, |_| notes.count() == expected);
            run_until_quiet(&mut reactor);
            assert_eq!(notes.count(), expected);
            let transport = get(&mut reactor, notes.handle());
            assert!(transport.is_reading_paused());
            transport.resume_producing();
        }
        run_until(&mut reactor, |_| notes.count() == 5);
        assert_eq!(notes.data()[4], b"three");
    });
}

#[test]
fn a_full_queue_is_told_and_room_is_told_again() {
    over_all(|place| {
        let mut reactor = Reactor::new().unwrap();
        let left = Rc::new(Cell::new(2_000_u32));
        let sending = Rc::clone(&left);
        let send = move |transport: &mut dyn PacketTransport| {
            while sending.get() > 0 {
                let status = transport.send(&sending.get().to_ne_bytes());
                assert!(status.is_taken(), "{status:?}");
                sending.set(sending.get() - 1);
                if status == SendStatus::Full {
                    assert!(transport.is_send_buffer_full());
                    break;
                }
            }
        };
        let again = send.clone();
        let limits = QueueLimits::default().full(4).most(6);
        let script = Script::new()
            .on_made(move |transport, _| {
                transport.set_queue_limits(limits);
                assert_eq!(transport.queue_limits(), limits);
                send(transport);
            })
            .on_room(move |transport, _| again(transport));
        let (peer, notes) = place.connection(&mut reactor, script);
        // The kernel has no room by then.
        run_until_quiet(&mut reactor);
        assert!(left.get() > 0 && reactor.next_deadline().is_none());
        let mut arrived = Vec::new();
        run_until(&mut reactor, |_| {
            arrived.extend(peer.receive_all());
            arrived.len() == 2_000
        });
        let expected: Vec<_> = (1..=2_000_u32)
            .rev()
            .map(|it| it.to_ne_bytes().to_vec())
            .collect();
        assert_eq!(arrived, expected, "each once, in order");
        assert!(notes.told(|told| told.resumed) >= 100);
    });
}

#[test]
fn a_queue_takes_no_more_than_its_limit() {
    over_all(|place| {
        let mut reactor = Reactor::new().unwrap();
        let (peer, notes) = place.connection(&mut reactor, Script::new());
        let transport = get(&mut reactor, notes.handle());
        transport.set_queue_limits(QueueLimits::default().full(2).most(4).most_bytes(100));
        let refused = SendStatus::Refused(SendRefusal::QueueFull);
        let answers: Vec<_> = (0..5).map(|_| transport.send(&[1; 20])).collect();
        let expected = [
            SendStatus::Ready,
            SendStatus::Full,
            SendStatus::Full,
            SendStatus::Full,
            refused,
        ];
        assert_eq!(answers, expected);
        run_until(&mut reactor, |_| notes.told(|told| told.resumed) == 1);
        let transport = get(&mut reactor, notes.handle());
        assert_eq!(transport.send(&[1; 80]), SendStatus::Ready);
        assert_eq!(transport.send(&[1; 21]), refused);
        assert_eq!(transport.counts().refused, 2);
        run_until(&mut reactor, |_| peer.receive_all().len() > 1);
    });
}

#[test]
fn a_packet_that_no_buffer_holds_is_refused_and_others_go_on() {
    over_all(|place| {
        let mut reactor = Reactor::new().unwrap();
        let (peer, notes) = place.connection(&mut reactor, Script::new());
        let transport = get(&mut reactor, notes.handle());
        let too_long = SendStatus::Refused(SendRefusal::TooLong);
        assert_eq!(transport.send(&vec![0; 10_000_000]), too_long);
        // Somebody makes the buffer smaller behind our back.
        let socket = transport.socket_descriptor().unwrap();
        rustix::net::sockopt::set_socket_send_buffer_size(socket, 4_096).unwrap();
        assert_eq!(transport.send(&[1; 60_000]), SendStatus::Ready);
        assert_eq!(transport.send(b"short"), SendStatus::Ready);
        run_until(&mut reactor, |_| notes.told(|told| told.failed.len()) == 1);
        notes.told(|told| {
            let (data, error, _) = &told.failed[0];
            assert_eq!(data.len(), 60_000);
            let expected = Some(rustix::io::Errno::MSGSIZE.raw_os_error());
            assert_eq!(error.raw_os_error(), expected);
        });
        run_until(&mut reactor, |_| {
            peer.receive().is_ok_and(|it| it.0 == b"short")
        });
        let counts = get(&mut reactor, notes.handle()).counts();
        assert_eq!((counts.sent, counts.failed, counts.refused), (1, 1, 1));
    });
}

#[test]
fn a_packet_longer_than_its_room_is_told_with_its_length() {
    for origin in [Origin::Accepted, Origin::Connected] {
        let place = origin.place();
        let mut reactor = Reactor::new().unwrap();
        let (peer, notes) = place.connection_with(
            &mut reactor,
            Script::new(),
            |endpoint| endpoint.max_packet(10),
            |endpoint| endpoint.max_packet(10),
        );
        for length in [9, 10, 11, 1_000] {
            peer.send(&vec![b'x'; length]);
        }
        run_until(&mut reactor, |_| notes.count() == 4);
        notes.told(|told| {
            let all: Vec<_> = told
                .received
                .iter()
                .map(|it| (it.data.len(), it.length))
                .collect();
            assert_eq!(all, [(9, 9), (10, 10), (10, 11), (10, 1_000)]);
        });
        assert_eq!(get(&mut reactor, notes.handle()).counts().truncated, 2);
    }
    // More than the usual room.
    let place = Origin::Accepted.place();
    let mut reactor = Reactor::new().unwrap();
    let (peer, notes) = place.connection_with(
        &mut reactor,
        Script::echo(),
        |endpoint| endpoint.max_packet(200_000).send_buffer(300_000),
        |endpoint| endpoint,
    );
    peer.send(&[9; 150_000]);
    run_until(&mut reactor, |_| {
        peer.receive().is_ok_and(|it| it.0.len() == 150_000)
    });
    assert_eq!(notes.data()[0].len(), 150_000);
}

#[test]
fn a_callback_that_panics_costs_its_own_connection() {
    over_all(|place| {
        let mut reactor = Reactor::new().unwrap();
        let script = Script::new().on_packet(|_, _, packet| {
            assert_ne!(packet.data, b"panic", "as the test wants it");
        });
        let (peer, notes) = place.connection(&mut reactor, script);
        let (other, other_notes) = place.connection(&mut reactor, Script::echo());
        peer.send(b"fine");
        peer.send(b"panic");
        peer.send(b"never");
        run_until(&mut reactor, |_| notes.is_lost());
        assert_eq!(notes.data(), [&b"fine"[..], b"panic"]);
        let lost = notes.lost();
        assert!(lost[0].contains("panicked"), "{lost:?}");
        other.send(b"still there");
        run_until(&mut reactor, |_| other_notes.count() == 1);
        run_until(&mut reactor, |_| {
            peer.is_at_end() || peer.receive().is_err()
        });
    });
}

#[test]
fn a_protocol_is_called_by_its_type_and_by_that_of_a_part() {
    struct Inner(u32);

    impl<T: PacketTransport> PacketProtocol<T> for Inner {
        fn packet_received(&mut self, _: &mut Context<'_, T>, _: &mut Packet<'_>) {}
    }

    let _place = Origin::Adopted.place();
    let mut reactor = Reactor::new().unwrap();
    let (peer, fd) = Plain::pair();
    let handle = reactor
        .adopt(UnixSeqpacket, fd, Box::new(Inner(7)))
        .unwrap();
    let found = Rc::new(Cell::new(0));
    let noted = Rc::clone(&found);
    reactor.call_protocol(
        handle,
        move |inner: &mut Inner, cx: &mut Context<'_, UnixSeqpacketPort>| {
            noted.set(inner.0);
            PacketTransport::send(cx.transport, b"from a call");
        },
    );
    run_until(&mut reactor, |_| {
        peer.receive().is_ok_and(|it| it.0 == b"from a call")
    });
    assert_eq!(found.get(), 7);
    let error = Rc::new(Cell::new(None));
    let noted = Rc::clone(&error);
    reactor.call_protocol_or(
        handle,
        |_: &mut Script, _: &mut Context<'_, UnixSeqpacketPort>| unreachable!("it is another"),
        move |_, error| noted.set(Some(error)),
    );
    run_until(&mut reactor, |_| error.get().is_some());
    assert_eq!(error.get(), Some(CallError::WrongProtocol));
}

#[test]
fn a_handle_reaches_the_connection_and_none_that_came_later() {
    over_all(|place| {
        let mut reactor = Reactor::new().unwrap();
        let (peer, notes) = place.connection(&mut reactor, Script::new());
        let handle = notes.handle();
        assert_eq!(get(&mut reactor, handle).state(), TransportState::Connected);
        get(&mut reactor, handle).abort_connection();
        run_until(&mut reactor, |_| notes.is_lost());
        let (_other, other_notes) = place.connection(&mut reactor, Script::new());
        assert!(reactor.get(handle).is_none());
        assert_ne!(other_notes.handle(), handle);
        assert!(peer.is_at_end());
    });
}
