//! What the layer says of its own, and what that is not mistaken for.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use bowline::{AfterReadClosed, Detached, TransportBudgets, Transports};

use crate::harness::{End, Kind, Link, Script, over_every_layer, pattern};
use crate::support::DEADLINE;

over_every_layer!(
    who_is_idle_says_that_it_is_there,
    what_is_written_puts_that_off,
    the_peers_keep_alives_are_no_data,
    a_stream_that_is_cut_off_is_no_end,
    a_close_is_said_however_small_the_budget,
    what_the_layer_holds_moves_with_the_connection,
    a_half_close_is_said_before_the_sockets,
);

const IDLE: Duration = Duration::from_secs(10);

/// That the peer is told so often, and gets nothing of the user's.
#[track_caller]
fn assert_keep_alives(link: &mut Link, wanted: usize) {
    let began = Instant::now();
    loop {
        link.settle();
        let nothing = link.peer().read(&mut [0]).unwrap_err();
        assert_eq!(nothing.kind(), std::io::ErrorKind::WouldBlock);
        // What is sent over TCP takes a moment.
        if link.peer().keep_alives >= wanted || began.elapsed() > DEADLINE {
            return assert_eq!(link.peer().keep_alives, wanted);
        }
    }
}

fn who_is_idle_says_that_it_is_there(kind: Kind) {
    let mut link = Link::new(kind, Script::new());
    link.settle();
    link.clock.advance(IDLE - Duration::from_millis(1));
    assert_keep_alives(&mut link, 0);
    link.clock.advance(Duration::from_millis(1));
    assert_keep_alives(&mut link, 1);
    link.clock.advance(IDLE);
    assert_keep_alives(&mut link, 2);
    assert_eq!(link.transport().bytes_sent(), 0, "counted as the user's");
    // Paused or not.
    link.transport().pause_producing();
    link.clock.advance(IDLE);
    assert_keep_alives(&mut link, 3);
    link.finish();
}

fn what_is_written_puts_that_off(kind: Kind) {
    let mut link = Link::new(kind, Script::new());
    link.settle();
    link.clock.advance(IDLE / 2);
    let _ = link.transport().write(b"here");
    assert_eq!(link.peer_receives(4), b"here");
    link.settle();
    link.clock.advance(IDLE - Duration::from_millis(1));
    assert_keep_alives(&mut link, 0);
    link.clock.advance(Duration::from_millis(1));
    assert_keep_alives(&mut link, 1);
    link.finish();
}

fn the_peers_keep_alives_are_no_data(kind: Kind) {
    let mut link = Link::new(kind, Script::new());
    link.peer().say(bowline_outside::FrameKind::KeepAlive, &[]);
    link.settle();
    link.peer().send(b"data");
    link.peer().say(bowline_outside::FrameKind::KeepAlive, &[]);
    link.run_until(|record| record.data() == b"data");
    link.settle();
    assert_eq!(link.record.summary(), ["made", "data 4"]);
    link.finish();
}

/// Between two frames, in the middle of one, with a reader and without.
fn a_stream_that_is_cut_off_is_no_end(kind: Kind) {
    for rest in [&b""[..], &b"\0"[..], &b"\0\x01\0 half a frame"[..]] {
        for is_paused in [false, true] {
            let script = Script::new().read_closed(|_| AfterReadClosed::KeepWriting);
            let mut link = Link::new(kind, script);
            if is_paused {
                link.transport().pause_producing();
            }
            link.peer().send(b"all there is");
            // Not a frame: the header is scrambled like all the rest.
            let _ = link.peer().raw.write(&rest[..rest.len().min(2)]);
            drop(link.peer.take());
            link.settle();
            if is_paused {
                link.transport().resume_producing();
            }
            link.run_until_lost();
            let mut summary = link.record.summary();
            summary.retain(|it| it != "reading resumed");
            assert_eq!(summary, ["made", "data 12", "lost connection lost"]);
            link.finish();
        }
    }
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

fn what_the_layer_holds_moves_with_the_connection(kind: Kind) {
    let script = Script::new().made(|cx| {
        cx.transport.set_read_limit(std::num::NonZeroUsize::new(10));
    });
    let mut link = Link::new(kind, script.data(|cx, _| cx.transport.pause_producing()));
    let sent = pattern(1_000);
    link.peer().send(&sent);
    link.run_until(|record| record.data().len() == 10);
    // A frame that the kernel took a part of.
    let written = link.fill();
    let detached: Rc<RefCell<Option<Detached<Script>>>> = Rc::default();
    let result = Rc::clone(&detached);
    link.reactor.detach(link.handle, move |_, it| {
        *result.borrow_mut() = Some(it.unwrap());
    });
    link.settle();
    let detached = detached.take().expect("it is open");
    assert!(!detached.travels(), "it would lose what the layer holds");
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
    // Its timer went along.
    link.clock.advance(IDLE);
    assert_keep_alives(&mut link, 1);
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
    // Nothing is said after the end.
    link.clock.advance(IDLE);
    link.settle();
    link.close_peer();
    link.run_until_lost();
    link.finish();
}
