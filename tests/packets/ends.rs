//! How connections of packets end, in each direction.

use std::time::Duration;

use bowline::error::SendRefusal;
use bowline::testing::ManualClock;
use bowline::{AfterReadClosed, QueueLimits, Reactor, SendStatus, TransportState};

use crate::harness::{Origin, Script, get, over_all};
use crate::support::{Moved, run_until, run_until_quiet};

const CLOSED: SendStatus = SendStatus::Refused(SendRefusal::Closed);

/// Reliability T-15: what has no bytes is never taken for the end, nor the end for it.
#[test]
fn packets_of_no_bytes_are_told_from_the_end() {
    for origin in [Origin::Accepted, Origin::Connected] {
        // Around the sizes of what one call asks for.
        for count in [0, 1, 2, 7, 8, 9, 16, 63, 64, 65, 200] {
            let place = origin.place();
            let mut reactor = Reactor::new().unwrap();
            let (peer, notes) = place.connection(&mut reactor, Script::new());
            for _ in 0..count {
                peer.send(b"");
            }
            drop(peer);
            run_until(&mut reactor, |_| notes.is_lost());
            assert_eq!(notes.data(), vec![Vec::<u8>::new(); count], "{origin:?}");
            assert_eq!(notes.calls(), ["made", "read lost", "lost"]);
            assert_eq!(notes.lost(), ["closed cleanly"]);
        }
    }
}

/// Of a socket that others may hold nothing is changed; what they could not tell from the
/// end, nobody can.
#[test]
fn of_an_adopted_socket_packets_of_no_bytes_are_told_but_in_front_of_the_end() {
    for count in [1, 7, 8, 9, 64, 65] {
        let place = Origin::Adopted.place();
        let mut reactor = Reactor::new().unwrap();
        let (peer, notes) = place.connection(&mut reactor, Script::new());
        for _ in 0..count {
            peer.send(b"");
        }
        peer.send(b"not the end");
        run_until(&mut reactor, |_| notes.count() == count + 1);
        // While nothing says that it is over they are packets, too.
        for _ in 0..count {
            peer.send(b"");
        }
        run_until(&mut reactor, |_| notes.count() == 2 * count + 1);
        let (reading, _writing) = crate::harness::pipe();
        peer.try_send(b"", &[reading.as_fd()]).unwrap();
        drop(peer);
        run_until(&mut reactor, |_| notes.is_lost());
        assert_eq!(
            notes.count(),
            2 * count + 2,
            "one with a descriptor is none"
        );
        assert_eq!(notes.lost(), ["closed cleanly"]);
        notes.change(|told| told.received.clear());
    }
}

#[test]
fn the_end_comes_behind_everything() {
    over_all(|place| {
        let mut reactor = Reactor::new().unwrap();
        let script = Script::new().on_packet(|transport, _, packet| {
            if packet.data == [5] {
                transport.pause_producing();
            }
        });
        let (peer, notes) = place.connection(&mut reactor, script);
        for number in 0..100 {
            peer.send(&[number]);
        }
        drop(peer);
        run_until_quiet(&mut reactor);
        assert_eq!(notes.count(), 6);
        assert_eq!(notes.calls(), ["made"], "the end waits for the reader");
        get(&mut reactor, notes.handle()).resume_producing();
        run_until(&mut reactor, |_| notes.is_lost());
        assert_eq!(notes.count(), 100);
        assert_eq!(notes.calls(), ["made", "read lost", "lost"]);
    });
}

#[test]
fn a_peer_that_has_closed_its_side_is_sent_what_there_is() {
    over_all(|place| {
        for after in [
            AfterReadClosed::LoseConnection,
            AfterReadClosed::KeepWriting,
        ] {
            let mut reactor = Reactor::new().unwrap();
            let script = Script::new().on_end(after, |transport, _| {
                assert_eq!(transport.send(b"the answer"), SendStatus::Ready);
            });
            let (peer, notes) = place.connection(&mut reactor, script);
            peer.send(b"question");
            peer.shutdown_write();
            let mut answer = None;
            run_until(&mut reactor, |_| {
                answer = answer.take().or_else(|| peer.receive().ok());
                answer.is_some()
            });
            assert_eq!(answer.unwrap().0, b"the answer");
            if after == AfterReadClosed::KeepWriting {
                run_until_quiet(&mut reactor);
                let transport = get(&mut reactor, notes.handle());
                assert_eq!(transport.state(), TransportState::Connected);
                assert_eq!(transport.send(b"and more"), SendStatus::Ready);
                transport.lose_write_connection();
                run_until(&mut reactor, |_| notes.is_lost());
                assert_eq!(peer.receive().unwrap().0, b"and more");
            }
            run_until(&mut reactor, |_| notes.is_lost());
            assert_eq!(notes.lost(), ["closed cleanly"]);
            let end = peer.receive();
            assert!(
                end.as_ref().is_ok_and(|it| it.0.is_empty()),
                "{end:?} {after:?} {:?}",
                place.origin
            );
        }
    });
}

#[test]
fn by_default_the_end_of_the_peer_ends_the_connection_and_drops_what_is_unsent() {
    over_all(|place| {
        let mut reactor = Reactor::new().unwrap();
        let (peer, notes) = place.connection(&mut reactor, Script::new());
        while get(&mut reactor, notes.handle())
            .send(&[0; 10_000])
            .is_ready()
        {
            reactor.turn(Some(Duration::ZERO));
        }
        peer.shutdown_write();
        run_until(&mut reactor, |_| notes.is_lost());
        assert_eq!(notes.lost(), ["closed cleanly"]);
    });
}

#[test]
fn closing_our_side_sends_everything_and_goes_on_receiving() {
    over_all(|place| {
        let mut reactor = Reactor::new().unwrap();
        let (peer, notes) = place.connection(&mut reactor, Script::new());
        let transport = get(&mut reactor, notes.handle());
        for number in 0..100 {
            assert!(transport.send(&[number]).is_taken());
        }
        transport.lose_write_connection();
        assert_eq!(transport.send(b"too late"), CLOSED);
        let error = transport
            .send_with_descriptors(b"", Vec::new())
            .unwrap_err();
        assert!(error.descriptors.is_empty());
        let mut arrived = Vec::new();
        run_until(&mut reactor, |_| {
            arrived.extend(peer.receive_all());
            notes.calls().contains(&"write lost")
        });
        arrived.extend(peer.receive_all());
        assert_eq!(arrived.len(), 100);
        assert!(peer.is_at_end());
        peer.send(b"still heard");
        run_until(&mut reactor, |_| notes.count() == 1);
        drop(peer);
        run_until(&mut reactor, |_| notes.is_lost());
        assert_eq!(notes.calls(), ["made", "write lost", "read lost", "lost"]);
    });
}

#[test]
fn lose_connection_sends_everything_and_delivers_nothing_more() {
    over_all(|place| {
        let mut reactor = Reactor::new().unwrap();
        let (peer, notes) = place.connection(&mut reactor, Script::new());
        let transport = get(&mut reactor, notes.handle());
        for number in 0..100_u8 {
            assert!(transport.send(&[number; 10]).is_taken());
        }
        transport.lose_connection();
        assert_eq!(transport.state(), TransportState::Closing);
        assert_eq!(transport.send(b"too late"), CLOSED);
        peer.send(b"not heard");
        let mut arrived = Vec::new();
        run_until(&mut reactor, |_| {
            // The kernel tells once that something was left unread.
            arrived.extend(peer.receive_all());
            notes.is_lost()
        });
        arrived.extend(peer.receive_all());
        arrived.extend(peer.receive_all());
        assert_eq!(arrived.len(), 100);
        assert_eq!(notes.count(), 0);
        assert_eq!(notes.lost(), ["closed cleanly"]);
    });
}

#[test]
fn a_close_with_a_deadline_does_not_wait_for_a_peer_that_does_not_read() {
    over_all(|place| {
        let clock = ManualClock::new();
        let mut reactor = Reactor::with_clock(Moved(clock.clone())).unwrap();
        let (peer, notes) = place.connection(&mut reactor, Script::new());
        while get(&mut reactor, notes.handle())
            .send(&[0; 10_000])
            .is_ready()
        {
            reactor.turn(Some(Duration::ZERO));
        }
        get(&mut reactor, notes.handle()).lose_connection_within(Duration::from_secs(5));
        run_until_quiet(&mut reactor);
        clock.advance(Duration::from_secs(4));
        run_until_quiet(&mut reactor);
        assert!(!notes.is_lost());
        clock.advance(Duration::from_secs(1));
        run_until(&mut reactor, |_| notes.is_lost());
        assert_eq!(
            notes.lost(),
            ["not everything could be sent before the deadline"]
        );
        assert!(!peer.receive_all().is_empty(), "what had left arrives");
    });
}

#[test]
fn an_abort_drops_what_waits() {
    over_all(|place| {
        let mut reactor = Reactor::new().unwrap();
        let script = Script::new().on_packet(|transport, _, _| {
            transport.send(b"never");
            transport.abort_connection();
            assert_eq!(transport.send(b"neither"), CLOSED);
        });
        let (peer, notes) = place.connection(&mut reactor, script);
        peer.send(b"one");
        peer.send(b"two");
        run_until(&mut reactor, |_| notes.is_lost());
        assert_eq!(notes.count(), 1);
        assert_eq!(notes.calls(), ["made", "lost"]);
        assert_eq!(notes.lost(), ["aborted by us"]);
        assert!(peer.receive_all().is_empty());
    });
}

/// Law 17: what the peer had sent outlives its reset.
#[test]
fn a_reset_comes_behind_what_the_peer_had_sent() {
    over_all(|place| {
        let mut reactor = Reactor::new().unwrap();
        let (peer, notes) = place.connection(&mut reactor, Script::new());
        get(&mut reactor, notes.handle()).send(b"not read by the peer");
        run_until_quiet(&mut reactor);
        for number in 0..100 {
            peer.send(&[number]);
        }
        drop(peer);
        run_until(&mut reactor, |_| notes.is_lost());
        assert_eq!(notes.count(), 100);
        assert_eq!(notes.calls(), ["made", "read lost", "lost"]);
        let lost = notes.lost();
        assert!(lost[0].contains("reset"), "{lost:?}");
    });
}

#[test]
fn a_send_that_breaks_loses_nothing_that_the_peer_had_sent() {
    over_all(|place| {
        let mut reactor = Reactor::new().unwrap();
        let script = Script::new()
            .on_packet(|transport, _, _| {
                transport.send(b"nobody is there");
                transport.send(b"nor for this");
            })
            .on_end(AfterReadClosed::KeepWriting, |_, _| {});
        let (peer, notes) = place.connection(&mut reactor, script);
        for number in 0..50 {
            peer.send(&[number]);
        }
        drop(peer);
        run_until(&mut reactor, |_| notes.is_lost());
        assert_eq!(notes.count(), 50);
        let lost = notes.lost();
        assert!(lost[0].to_lowercase().contains("broken pipe"), "{lost:?}");
    });
}

#[test]
fn a_reader_that_has_paused_is_told_of_a_break_and_decides() {
    for goes_on in [false, true] {
        over_all(|place| {
            let mut reactor = Reactor::new().unwrap();
            let script = Script::new()
                .on_packet(|transport, _, _| transport.pause_producing())
                .on_broken(move |transport, _| match goes_on {
                    true => transport.resume_producing(),
                    false => transport.lose_connection(),
                });
            let (peer, notes) = place.connection(&mut reactor, script);
            peer.send(b"one");
            peer.send(b"two");
            run_until(&mut reactor, |_| notes.count() == 1);
            get(&mut reactor, notes.handle()).send(b"not read by the peer");
            run_until_quiet(&mut reactor);
            drop(peer);
            run_until(&mut reactor, |_| notes.calls().contains(&"broken"));
            if goes_on {
                run_until(&mut reactor, |_| notes.count() == 2);
                get(&mut reactor, notes.handle()).resume_producing();
            }
            run_until(&mut reactor, |_| notes.is_lost());
            let lost = notes.lost();
            assert!(lost[0].contains("reset"), "{lost:?}");
            assert_eq!(notes.count(), if goes_on { 2 } else { 1 });
        });
    }
}

#[test]
fn a_lost_connection_says_what_was_never_sent() {
    over_all(|place| {
        let mut reactor = Reactor::new().unwrap();
        let (peer, notes) = place.connection(&mut reactor, Script::new());
        let transport = get(&mut reactor, notes.handle());
        transport.set_queue_limits(QueueLimits::default().full(10_000).most(10_000));
        for _ in 0..5_000 {
            transport.send(&[0; 100]);
        }
        run_until_quiet(&mut reactor);
        let unsent = get(&mut reactor, notes.handle()).unsent_packets();
        let sent = get(&mut reactor, notes.handle()).counts().sent as usize;
        assert!(unsent > 0);
        assert_eq!(sent + unsent, 5_000);
        assert_eq!(
            get(&mut reactor, notes.handle()).unsent_bytes(),
            unsent * 100
        );
        drop(peer);
        run_until(&mut reactor, |_| notes.is_lost());
    });
}

use std::os::fd::AsFd as _;
