//! What is between the handshake and the end: records, whole and in pieces, right and
//! wrong, and what the two ends say of themselves in between.

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use bowline::tls::TlsError;
use bowline::tls::rustls::{Connection, Error, InvalidMessage, PeerMisbehaved};
use bowline::{AfterReadClosed, TransportBudgets, Transports};

use crate::harness::{End, Kind, Link, Script, over_every_layer, pattern};
use crate::support::{DEADLINE, Event};

over_every_layer!(
    ten_small_writes_are_one_record,
    what_is_large_is_cut_into_records,
    every_record_may_be_cut_at_every_byte,
    what_is_beyond_the_limit_of_a_read_waits,
    a_stream_that_is_cut_off_is_no_end,
    what_was_changed_on_its_way_ends_the_connection,
    what_came_before_a_wrong_record_is_delivered,
    what_is_no_record_ends_the_connection,
    a_record_that_is_too_long_ends_the_connection,
    a_close_is_said_however_small_the_budget,
    what_comes_behind_the_peers_end_is_ignored,
    what_the_layer_holds_moves_with_the_connection,
    a_half_close_is_said_before_the_sockets,
);

/// What the peer has sealed, taken from it before it is sent.
fn sealed(link: &mut Link, data: &[u8]) -> Vec<u8> {
    let tls = link.peer().tls.as_mut().unwrap();
    tls.writer().write_all(data).unwrap();
    taken(tls)
}

fn taken(tls: &mut Connection) -> Vec<u8> {
    let mut bytes = Vec::new();
    while tls.wants_write() {
        tls.write_tls(&mut bytes).unwrap();
    }
    bytes
}

/// Sends bytes as they are.
fn send_raw(link: &mut Link, bytes: &[u8]) {
    link.peer().raw.write_all(bytes).unwrap();
}

/// The records that the peer's socket gets, by kind and length: at least `count`, and
/// all that come with them.
#[track_caller]
fn records(link: &mut Link, count: usize) -> Vec<(u8, usize)> {
    let began = Instant::now();
    let mut bytes = Vec::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        link.settle();
        while let Ok(count @ 1..) = link.peer().raw.read(&mut buffer) {
            bytes.extend_from_slice(&buffer[..count]);
            link.settle();
        }
        let mut records = Vec::new();
        let mut rest = &bytes[..];
        while let Some(&[kind, _, _, high, low]) = rest.first_chunk()
            && let Some(behind) = rest.get(5 + usize::from(u16::from_be_bytes([high, low]))..)
        {
            records.push((kind, rest.len() - behind.len() - 5));
            rest = behind;
        }
        if records.len() >= count && rest.is_empty() {
            return records;
        }
        assert!(began.elapsed() < DEADLINE, "no more than {records:?}");
    }
}

#[track_caller]
fn assert_lost_by(link: &mut Link, wanted: impl Fn(&TlsError) -> bool, reason: &Reason) {
    link.run_until_lost();
    let reason = reason.borrow();
    let error = reason.as_ref().expect("TLS has failed");
    assert!(wanted(error), "{error:?}");
}

type Reason = std::rc::Rc<std::cell::RefCell<Option<TlsError>>>;

/// Notes why it was lost.
fn noting(script: Script) -> (Script, Reason) {
    let reason = Reason::default();
    let told = std::rc::Rc::clone(&reason);
    let script = script.lost(move |_, reason| {
        told.replace(TlsError::of(reason).cloned());
    });
    (script, reason)
}

fn ten_small_writes_are_one_record(kind: Kind) {
    let mut link = Link::new(kind, Script::new());
    link.settle();
    for _ in 0..10 {
        let _ = link.transport().write(b"0123456789");
    }
    let records = records(&mut link, 1);
    assert_eq!(records.len(), 1);
    let (kind, length) = records[0];
    assert!(kind == 23 && (100..140).contains(&length), "{length}");
    link.finish();
}

fn what_is_large_is_cut_into_records(kind: Kind) {
    let mut link = Link::new(kind, Script::new());
    let _ = link.transport().write(&[7; 40_000]);
    let _ = link.transport().write_owned(vec![7; 10_000]);
    let received = link.peer_receives(50_000);
    assert!(received.iter().all(|byte| *byte == 7));
    let _ = link.transport().write(&[7; 40_000]);
    let records = records(&mut link, 3);
    assert!(
        records
            .iter()
            .all(|(kind, length)| *kind == 23 && *length <= 16_384 + 256)
    );
    assert_eq!(records.len(), 3, "{records:?}");
    link.finish();
}

fn every_record_may_be_cut_at_every_byte(kind: Kind) {
    let mut link = Link::new(kind, Script::new());
    let mut wanted = Vec::new();
    for length in [1, 20, 300] {
        let data = pattern(length);
        let record = sealed(&mut link, &data);
        for cut in 0..record.len() {
            let (first, second) = record.split_at(cut);
            if cut == 0 {
                // Byte for byte.
                for byte in &record {
                    send_raw(&mut link, &[*byte]);
                    link.turn();
                }
            } else {
                let record = sealed(&mut link, &data);
                assert_eq!(record.len(), first.len() + second.len());
                send_raw(&mut link, &record[..cut]);
                link.turn();
                link.turn();
                send_raw(&mut link, &record[cut..]);
            }
            wanted.extend_from_slice(&data);
            link.run_until(|record| record.data().len() == wanted.len());
        }
    }
    assert!(link.record.data() == wanted);
    link.finish();
}

/// Whatever the limit, and however the records lie in it.
fn what_is_beyond_the_limit_of_a_read_waits(kind: Kind) {
    for limit in [1, 7, 100, 16_384, 20_000] {
        let script = Script::new().made(move |cx| {
            cx.transport
                .set_read_limit(std::num::NonZeroUsize::new(limit));
        });
        let mut link = Link::new(kind, script);
        let length = (limit * 40).min(50_000);
        let sent = pattern(length);
        for piece in sent.chunks(333) {
            link.peer().send(piece);
        }
        link.run_until(|record| record.data().len() == length);
        assert!(link.record.data() == sent);
        assert!(link.record.pieces().iter().all(|piece| *piece <= limit));
        link.close_peer();
        link.run_until_lost();
        link.finish();
    }
}

/// Between two records, in the middle of one, with a reader and without.
fn a_stream_that_is_cut_off_is_no_end(kind: Kind) {
    for rest in [0, 1, 5, 12] {
        for is_paused in [false, true] {
            let script = Script::new().read_closed(|_| AfterReadClosed::KeepWriting);
            let (script, reason) = noting(script);
            let mut link = Link::new(kind, script);
            if is_paused {
                link.transport().pause_producing();
            }
            link.peer().send(b"all there is");
            let part = sealed(&mut link, b"never whole");
            send_raw(&mut link, &part[..rest]);
            drop(link.peer.take());
            link.settle();
            if is_paused {
                link.transport().resume_producing();
            }
            assert_lost_by(&mut link, |it| matches!(it, TlsError::CutOff), &reason);
            let mut summary = link.record.summary();
            summary.retain(|it| it != "reading resumed");
            assert_eq!(summary, ["made", "data 12", "lost connection lost"]);
            link.finish();
        }
    }
}

fn what_was_changed_on_its_way_ends_the_connection(kind: Kind) {
    for place in [5, 6, 20] {
        let (script, reason) = noting(Script::new());
        let mut link = Link::new(kind, script);
        let mut record = sealed(&mut link, b"something secret");
        record[place] ^= 1;
        send_raw(&mut link, &record);
        let wanted = |it: &TlsError| matches!(it, TlsError::Peer(Error::DecryptError));
        assert_lost_by(&mut link, wanted, &reason);
        assert_eq!(link.record.data(), b"");
        // The peer is told before the end.
        let error = link.peer().read(&mut [0]).unwrap_err();
        assert!(error.to_string().contains("BadRecordMac"), "{error}");
        link.finish();
    }
}

fn what_came_before_a_wrong_record_is_delivered(kind: Kind) {
    let (script, reason) = noting(Script::new());
    let mut link = Link::new(kind, script);
    let mut records = sealed(&mut link, b"right");
    let mut wrong = sealed(&mut link, b"wrong");
    *wrong.last_mut().unwrap() ^= 1;
    records.extend(wrong);
    records.extend(sealed(&mut link, b"late"));
    send_raw(&mut link, &records);
    let wanted = |it: &TlsError| matches!(it, TlsError::Peer(Error::DecryptError));
    assert_lost_by(&mut link, wanted, &reason);
    assert_eq!(link.record.data(), b"right");
    link.finish();
}

fn what_is_no_record_ends_the_connection(kind: Kind) {
    let no_record: [(&[u8], InvalidMessage); 4] = [
        (b"GET /", InvalidMessage::InvalidContentType),
        (&[24], InvalidMessage::InvalidContentType),
        (&[23, 2], InvalidMessage::UnknownProtocolVersion),
        (&[21, 3, 3, 0, 0], InvalidMessage::InvalidEmptyPayload),
    ];
    for (bytes, error) in no_record {
        let (script, reason) = noting(Script::new());
        let mut link = Link::new(kind, script);
        send_raw(&mut link, bytes);
        let wanted = |it: &TlsError| match it {
            TlsError::Peer(Error::InvalidMessage(it)) => *it == error,
            _ => false,
        };
        assert_lost_by(&mut link, wanted, &reason);
        link.finish();
    }
}

/// It is not waited for.
fn a_record_that_is_too_long_ends_the_connection(kind: Kind) {
    let (script, reason) = noting(Script::new());
    let mut link = Link::new(kind, script);
    let length = (16_384 + 2_048 + 1u16).to_be_bytes();
    send_raw(&mut link, &[23, 3, 3, length[0], length[1]]);
    let wanted = |it: &TlsError| {
        let error = Error::InvalidMessage(InvalidMessage::MessageTooLarge);
        matches!(it, TlsError::Peer(it) if *it == error)
    };
    assert_lost_by(&mut link, wanted, &reason);
    link.finish();
}

fn a_close_is_said_however_small_the_budget(kind: Kind) {
    for writes in [1, 2, 3] {
        let mut link = Link::new(kind, Script::new());
        let mut budgets = TransportBudgets::default();
        budgets.writes = writes;
        link.reactor.set_transport_budgets(budgets);
        for _ in 0..writes {
            let _ = link.transport().write(&[7; 16_384]);
        }
        link.transport().lose_connection();
        let (received, end) = link.peer_receives_all();
        assert_eq!(
            (received.len(), end),
            (writes as usize * 16_384, End::Clean)
        );
        link.run_until_lost();
        link.finish();
    }
}

fn what_comes_behind_the_peers_end_is_ignored(kind: Kind) {
    let mut link = Link::new(kind, Script::new().keep_writing());
    let tls = link.peer().tls.as_mut().unwrap();
    tls.send_close_notify();
    let mut bytes = taken(tls);
    bytes.extend_from_slice(b"no record at all");
    send_raw(&mut link, &bytes);
    link.settle();
    assert_eq!(link.record.summary(), ["made", "read closed"]);
    let _ = link.transport().write(b"still here");
    assert_eq!(link.peer_receives(10), b"still here");
    link.finish();
}

fn what_the_layer_holds_moves_with_the_connection(kind: Kind) {
    use std::cell::RefCell;
    use std::rc::Rc;

    use bowline::Detached;

    let script = Script::new().made(|cx| {
        cx.transport.set_read_limit(std::num::NonZeroUsize::new(10));
    });
    let mut link = Link::new(kind, script.data(|cx, _| cx.transport.pause_producing()));
    let sent = pattern(1_000);
    link.peer().send(&sent[..100]);
    link.peer().send(&sent[100..]);
    link.run_until(|record| record.data().len() == 10);
    // Records that the kernel took a part of.
    let written = link.fill();
    let detached: Rc<RefCell<Option<Detached<Script>>>> = Rc::default();
    let result = Rc::clone(&detached);
    link.reactor.detach(link.handle, move |_, it| {
        *result.borrow_mut() = Some(it.unwrap());
    });
    link.settle();
    let detached = detached.take().expect("it is open");
    assert!(!detached.travels(), "it would lose its keys");
    link.handle = kind.reattach(&mut link.reactor, detached).unwrap();
    link.settle();
    assert_eq!(link.record.data().len(), 10);
    let received = link.peer_receives(written);
    assert!(received.iter().all(|byte| *byte == b'f'));
    while link.record.data().len() < sent.len() {
        link.transport().resume_producing();
        link.settle();
    }
    assert!(link.record.data() == sent);
    link.finish();
}

fn a_half_close_is_said_before_the_sockets(kind: Kind) {
    let mut link = Link::new(kind, Script::new());
    let written = link.fill();
    link.transport().lose_write_connection();
    link.settle();
    assert_eq!(link.record.summary(), ["made"]);
    let (received, end) = link.peer_receives_all();
    assert_eq!((received.len(), end), (written, End::Clean));
    link.settle();
    // The socket's follows.
    assert_eq!(link.peer().raw.read(&mut [0]).unwrap(), 0);
    link.peer().send(b"still there");
    link.run_until(|record| record.data() == b"still there");
    link.close_peer();
    link.run_until_lost();
    link.finish();
}

const OF_13: [Kind; 4] = [
    Kind::AcceptedTcp,
    Kind::ConnectingUnix,
    Kind::AdoptedPassing,
    Kind::Memory,
];

/// The peer asks for new keys of ours with each: that is one answer at a time.
#[test]
fn keys_are_updated_as_often_as_the_peer_wants() {
    for kind in OF_13 {
        let mut link = Link::new(kind, Script::new());
        for round in 0..100 {
            link.peer()
                .tls
                .as_mut()
                .unwrap()
                .refresh_traffic_keys()
                .unwrap();
            link.peer().send(b"under new keys");
            link.run_until(|record| record.data().len() == 14 * (round + 1));
            let _ = link.transport().write(b"and so are these");
            assert_eq!(link.peer_receives(16), b"and so are these");
        }
        link.finish();
    }
}

#[test]
fn a_flood_of_new_keys_ends_the_connection() {
    for kind in OF_13 {
        for (count, is_flood) in [(32, false), (33, true)] {
            let (script, reason) = noting(Script::new());
            let mut link = Link::new(kind, script);
            let mut flood = Vec::new();
            for _ in 0..count {
                let tls = link.peer().tls.as_mut().unwrap();
                tls.refresh_traffic_keys().unwrap();
                flood.extend(taken(tls));
            }
            send_raw(&mut link, &flood);
            link.settle();
            assert_eq!(link.record.is_lost(), is_flood, "{count}");
            if is_flood {
                let wanted = |it: &TlsError| {
                    let error = PeerMisbehaved::TooManyKeyUpdateRequests;
                    matches!(it, TlsError::Peer(Error::PeerMisbehaved(it)) if *it == error)
                };
                assert_lost_by(&mut link, wanted, &reason);
            }
            link.finish();
        }
    }
}

/// What nobody reads does not pile up: with data between them they are no flood.
#[test]
fn answers_that_nobody_reads_do_not_pile_up() {
    for kind in OF_13 {
        let mut link = Link::new(kind, Script::new());
        let written = link.fill();
        for round in 1..=200 {
            link.peer()
                .tls
                .as_mut()
                .unwrap()
                .refresh_traffic_keys()
                .unwrap();
            link.peer().send(b"x");
            link.run_until(|record| record.data().len() == round);
        }
        let received = link.peer_receives(written);
        assert!(received.iter().all(|byte| *byte == b'f'));
        let _ = link.transport().write(b"behind them");
        assert_eq!(link.peer_receives(11), b"behind them");
        link.finish();
    }
}

/// Records without a byte cost us something and bring nothing.
#[test]
fn a_wrong_end_is_told_once() {
    let (script, reason) = noting(Script::new());
    let mut link = Link::new(Kind::AcceptedTcp, script);
    // A change_cipher_spec, which has its place in the handshake only.
    send_raw(&mut link, &[20, 3, 3, 0, 1, 1]);
    let wanted = |it: &TlsError| matches!(it, TlsError::Peer(Error::InappropriateMessage { .. }));
    assert_lost_by(&mut link, wanted, &reason);
    let lost = link.record.count(|event| matches!(event, Event::Lost(_)));
    assert_eq!(lost, 1);
    link.clock.advance(Duration::from_secs(60));
    link.finish();
}
