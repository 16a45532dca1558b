//! Bytes out.

use bowline::{Watermarks, WriteStatus};

use crate::harness::{Buffers, End, Kind, Link, Script, over_every_kind, over_terminals, pattern};

over_every_kind!(
    any_mix_of_writes_arrives_whole_and_in_order,
    ten_small_writes_leave_together,
    empty_writes_do_nothing,
    what_is_written_in_connection_made_is_sent,
    writes_from_outside_are_sent,
    a_write_after_everything_was_sent_needs_no_new_event,
    a_write_after_the_buffer_was_full_needs_no_new_event,
    writes_are_refused_while_closing,
    writes_are_refused_after_half_close,
    writes_are_refused_in_connection_lost,
    a_write_beyond_the_limit_is_refused_whole,
    what_was_never_sent_is_counted,
);

over_terminals!(
    any_mix_of_writes_arrives_whole_and_in_order,
    ten_small_writes_leave_together,
    empty_writes_do_nothing,
    what_is_written_in_connection_made_is_sent,
    writes_from_outside_are_sent,
    a_write_after_everything_was_sent_needs_no_new_event,
    a_write_after_the_buffer_was_full_needs_no_new_event,
    writes_are_refused_in_connection_lost,
    a_write_beyond_the_limit_is_refused_whole,
    what_was_never_sent_is_counted,
);

/// S-41, F-04, F-05, F-08, F-09, with the three ways to write, and sizes around
/// every threshold.
fn any_mix_of_writes_arrives_whole_and_in_order(kind: Kind) {
    const SIZES: [usize; 14] = [
        1, 0, 13, 4_095, 4_096, 5_000, 8_191, 8_192, 9_000, 65_535, 65_536, 65_537, 140_000, 7,
    ];
    let mut link = Link::with_buffers(kind, Buffers::Small, Script::new());
    let all = pattern(1_500_000);
    let mut rest = &all[..];
    let mut random = 0x2545_f491_u32;
    let mut received = Vec::new();
    while !rest.is_empty() {
        random ^= random << 13;
        random ^= random >> 17;
        random ^= random << 5;
        let (piece, behind) = rest.split_at(SIZES[random as usize % SIZES.len()].min(rest.len()));
        rest = behind;
        let transport = link.transport();
        let status = match random >> 8 & 3 {
            0 | 1 => transport.write(piece),
            2 => transport.write_owned(piece.to_vec()),
            _ => {
                let (left, right) = piece.split_at(piece.len() / 3);
                transport.write_sequence(&[left, &[], right])
            }
        };
        assert_ne!(status, WriteStatus::Refused);
        if random >> 12 & 3 == 0 {
            link.turn();
        }
        if random >> 14 & 7 == 0 {
            let sent = all.len() - rest.len() - link.transport().unsent_bytes();
            let some = (sent - received.len()) / 2;
            received.extend(link.peer_receives(some));
        }
    }
    received.extend(link.peer_receives(all.len() - received.len()));
    assert!(received == all, "bytes were changed on the way");
    assert_eq!(link.transport().unsent_bytes(), 0);
    link.finish();
}

/// Contract F-01.
fn ten_small_writes_leave_together(kind: Kind) {
    let script = Script::new().data(|cx, _| {
        for digit in b'0'..=b'9' {
            assert_eq!(cx.transport.write(&[digit; 10]), WriteStatus::Ready);
        }
        assert_eq!(cx.transport.unsent_bytes(), 100, "sent too early");
    });
    let mut link = Link::new(kind, script);
    link.peer().send(b"go");
    link.run_until(|record| record.data() == b"go");
    assert_eq!(link.transport().unsent_bytes(), 0, "not sent in this turn");
    let mut buffer = [0; 200];
    assert_eq!(link.peer().read(&mut buffer).unwrap(), 100);
    assert_eq!(&buffer[..20], b"00000000001111111111");
    link.finish();
}

/// F-02.
fn empty_writes_do_nothing(kind: Kind) {
    let mut link = Link::new(kind, Script::new());
    let transport = link.transport();
    assert_eq!(transport.write(&[]), WriteStatus::Ready);
    assert_eq!(transport.write_sequence(&[&[], &[]]), WriteStatus::Ready);
    assert_eq!(transport.write_sequence(&[]), WriteStatus::Ready);
    assert_eq!(transport.write_owned(Vec::new()), WriteStatus::Ready);
    assert_eq!(transport.unsent_bytes(), 0);
    link.settle();
    let error = link.peer().read(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
    let _ = link.transport().write(b"x");
    assert_eq!(link.peer_receives(1), b"x");
    link.finish();
}

fn what_is_written_in_connection_made_is_sent(kind: Kind) {
    let script = Script::new().made(|cx| {
        let _ = cx.transport.write(b"hello");
        let _ = cx.transport.write_owned(vec![b'!'; 100_000]);
    });
    let mut link = Link::new(kind, script);
    let received = link.peer_receives(100_005);
    assert!(received.starts_with(b"hello!"));
    link.finish();
}

fn writes_from_outside_are_sent(kind: Kind) {
    let mut link = Link::new(kind, Script::new());
    let handle = link.handle;
    link.reactor.call_soon(move |reactor| {
        let _ = reactor.get(handle).unwrap().write(b"from a call");
    });
    link.turn();
    assert_eq!(link.peer_receives(11), b"from a call");
    link.finish();
}

/// M-02: no new edge comes for a socket that is writable already.
fn a_write_after_everything_was_sent_needs_no_new_event(kind: Kind) {
    let mut link = Link::new(kind, Script::new());
    for n in 0..5u8 {
        let _ = link.transport().write(&[n]);
        link.settle();
        assert_eq!(link.peer_receives(1), [n]);
    }
    link.finish();
}

/// M-02, after the socket was watched for writing.
fn a_write_after_the_buffer_was_full_needs_no_new_event(kind: Kind) {
    let mut link = Link::new(kind, Script::new());
    let written = link.fill();
    assert!(link.peer_receives(written).iter().all(|&byte| byte == b'f'));
    link.settle();
    for n in 0..5u8 {
        let _ = link.transport().write(&[n]);
        link.settle();
        assert_eq!(link.peer_receives(1), [n]);
    }
    link.finish();
}

/// W-23, F-16, whatever is unsent.
fn writes_are_refused_while_closing(kind: Kind) {
    let mut link = Link::new(kind, Script::new());
    let transport = link.transport();
    transport.lose_connection();
    assert_eq!(transport.write(b"late"), WriteStatus::Refused);
    assert_eq!(link.peer_receives_all(), (Vec::new(), End::Clean));
    link.finish();

    let mut link = Link::new(kind, Script::new());
    let written = link.fill();
    let transport = link.transport();
    transport.lose_connection();
    assert_eq!(transport.write(b"late"), WriteStatus::Refused);
    assert_eq!(transport.write(&[0; 20_000]), WriteStatus::Refused);
    assert_eq!(transport.write_sequence(&[b"late"]), WriteStatus::Refused);
    assert_eq!(transport.write_owned(vec![0; 20_000]), WriteStatus::Refused);
    let (received, end) = link.peer_receives_all();
    assert_eq!((received.len(), end), (written, End::Clean));
    link.finish();
}

/// Contract F-03, F-18.
fn writes_are_refused_after_half_close(kind: Kind) {
    let mut link = Link::new(
        kind,
        Script::new().write_closed(|cx| {
            assert_eq!(cx.transport.write(b"late"), WriteStatus::Refused);
        }),
    );
    let transport = link.transport();
    let _ = transport.write(b"all");
    transport.lose_write_connection();
    assert_eq!(transport.write(b"late"), WriteStatus::Refused);
    let (received, end) = link.peer_receives_all();
    assert_eq!((&received[..], end), (&b"all"[..], End::Clean));
    assert_eq!(link.record.summary(), ["made", "write closed"]);
    let transport = link.transport();
    assert_eq!(transport.write(b"later"), WriteStatus::Refused);
    assert_eq!(transport.write_owned(vec![0; 9_000]), WriteStatus::Refused);
    assert_eq!(transport.write_sequence(&[b"later"]), WriteStatus::Refused);
    assert_eq!(transport.unsent_bytes(), 0, "dropped, and not kept");
    // The other direction is what it was.
    link.peer().send(b"more");
    link.run_until(|record| record.data() == b"more");
    link.finish();
}

/// F-03, F-30.
fn writes_are_refused_in_connection_lost(kind: Kind) {
    let script = Script::new().lost(|cx, _| {
        assert_eq!(cx.transport.write(b"late"), WriteStatus::Refused);
        assert_eq!(
            cx.transport.write_owned(vec![0; 9_000]),
            WriteStatus::Refused
        );
        assert_eq!(cx.transport.write_sequence(&[b"a"]), WriteStatus::Refused);
        cx.transport.lose_connection();
        cx.transport.lose_write_connection();
        cx.transport.abort_connection();
        cx.transport.pause_producing();
        cx.transport.resume_producing();
        let own = cx.transport.handle();
        assert!(cx.get(own).is_some());
    });
    let mut link = Link::new(kind, script);
    link.close_peer();
    link.run_until_lost();
    // Afterwards there is no transport to write to, as before `connection_made`.
    assert!(link.reactor.get(link.handle).is_none());
    link.finish();
}

/// W-31.
fn a_write_beyond_the_limit_is_refused_whole(kind: Kind) {
    let mut link = Link::new(kind, Script::new());
    link.transport()
        .set_watermarks(Watermarks::default().limit(10));
    assert_eq!(link.transport().watermarks().limit, 10);
    let transport = link.transport();
    assert_eq!(transport.write(b"0123456"), WriteStatus::Ready);
    assert_eq!(transport.write(b"abcd"), WriteStatus::Refused);
    assert_eq!(
        transport.write_sequence(&[b"ab", b"cd"]),
        WriteStatus::Refused
    );
    assert_eq!(transport.write_owned(vec![b'a'; 4]), WriteStatus::Refused);
    assert_eq!(transport.write(b"789"), WriteStatus::Ready);
    assert_eq!(link.peer_receives(10), b"0123456789");
    link.transport().lose_connection();
    assert_eq!(link.peer_receives_all(), (Vec::new(), End::Clean));
    link.finish();
}

fn what_was_never_sent_is_counted(kind: Kind) {
    let script = Script::new().lost(|cx, _| {
        let unsent = cx.transport.unsent_bytes();
        assert!(unsent >= 1 << 20, "{unsent} only");
    });
    let mut link = Link::new(kind, script);
    let _ = link.fill();
    link.transport().abort_connection();
    link.run_until_lost();
    link.finish();
}
