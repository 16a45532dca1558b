//! Bytes in, and not in for a while.

use std::num::NonZeroUsize;

use bowline::WriteStatus;

use crate::harness::{Kind, Link, Script, over_every_kind, over_terminals, pattern};
use crate::support::{Event, Record};

over_every_kind!(
    everything_is_delivered_without_a_new_event,
    data_comes_in_order,
    no_read_goes_beyond_its_limit,
    the_read_limit_can_change_with_each_read,
    paused_in_connection_made_delivers_nothing,
    paused_in_data_received_delivers_no_more,
    what_came_during_the_pause_is_delivered_at_resume,
    paused_data_and_close_come_after_resume,
    pause_and_resume_in_one_callback_delivers,
    resume_without_pause_does_nothing,
    resume_while_closing_does_nothing,
    pausing_in_reading_resumed_holds,
    a_write_to_a_dead_peer_while_paused_ends_it,
    a_hang_up_delivers_the_data_first,
    a_hang_up_while_writing_delivers_the_data_first,
    a_broken_write_delivers_all_that_came_before,
);

over_terminals!(
    data_comes_in_order,
    no_read_goes_beyond_its_limit,
    the_read_limit_can_change_with_each_read,
    paused_in_connection_made_delivers_nothing,
    paused_in_data_received_delivers_no_more,
    what_came_during_the_pause_is_delivered_at_resume,
    paused_data_and_close_come_after_resume,
    pause_and_resume_in_one_callback_delivers,
    resume_without_pause_does_nothing,
    pausing_in_reading_resumed_holds,
    a_hang_up_delivers_the_data_first,
);

/// M-01: one event, more than one turn's worth of bytes.
fn everything_is_delivered_without_a_new_event(kind: Kind) {
    let mut link = Link::new(kind, Script::new());
    link.transport().pause_producing();
    let sent = link.peer().fill();
    assert!(sent > 2 * 65_536);
    link.settle();
    link.transport().resume_producing();
    link.run_until(|record| record.data().len() == sent);
    link.finish();
}

fn data_comes_in_order(kind: Kind) {
    let mut link = Link::new(kind, Script::new());
    let all = pattern(600_000);
    let mut sent = 0;
    while sent < all.len() {
        let end = (sent + 1 + sent % 50_000).min(all.len());
        if let Ok(count) = link.peer().write(&all[sent..end]) {
            sent += count;
        }
        link.turn();
    }
    link.run_until(|record| record.data().len() == all.len());
    assert!(link.record.data() == all);
    link.finish();
}

fn pieces(link: &Link) -> Vec<usize> {
    let lengths = std::cell::RefCell::new(Vec::new());
    link.record.count(|event| {
        if let Event::Data(data) = event {
            lengths.borrow_mut().push(data.len());
        }
        false
    });
    lengths.into_inner()
}

fn no_read_goes_beyond_its_limit(kind: Kind) {
    let script = Script::new().made(|cx| cx.transport.set_read_limit(NonZeroUsize::new(10)));
    let mut link = Link::new(kind, script);
    let all = pattern(1_005);
    link.peer().send(&all);
    link.run_until(|record| record.data().len() == all.len());
    assert!(link.record.data() == all);
    assert!(pieces(&link).iter().all(|&length| length <= 10));
    link.transport().set_read_limit(None);
    link.peer().send(&[0; 1_000]);
    link.run_until(|record| record.data().len() == all.len() + 1_000);
    assert!(pieces(&link).contains(&1_000), "the limit is still there");
    link.finish();
}

fn the_read_limit_can_change_with_each_read(kind: Kind) {
    let mut next = 1;
    let script = Script::new()
        .made(|cx| cx.transport.set_read_limit(NonZeroUsize::new(1)))
        .data(move |cx, data| {
            assert_eq!(data.len(), next);
            next += 1;
            cx.transport.set_read_limit(NonZeroUsize::new(next));
        });
    let mut link = Link::new(kind, script);
    // 1 + 2 + .. + 20
    link.peer().send(&[0; 210]);
    link.run_until(|record| record.data().len() == 210);
    link.finish();
}

/// F-31.
fn paused_in_connection_made_delivers_nothing(kind: Kind) {
    let script = Script::new().made(|cx| {
        cx.transport.pause_producing();
        assert!(cx.transport.is_reading_paused());
    });
    let mut link = Link::new(kind, script);
    link.peer().send(b"early");
    link.settle();
    assert_eq!(link.record.summary(), ["made"]);
    link.transport().resume_producing();
    link.run_until(|record| record.data() == b"early");
    assert_eq!(link.record.summary(), ["made", "reading resumed", "data 5"]);
    link.finish();
}

/// F-31.
fn paused_in_data_received_delivers_no_more(kind: Kind) {
    let script = Script::new().data(|cx, _| cx.transport.pause_producing());
    let mut link = Link::new(kind, script);
    let sent = link.peer().fill();
    // What is written to a terminal arrives when a thread of the kernel gets to it.
    link.run_until(|record| !record.data().is_empty());
    let mut delivered = 0;
    loop {
        assert_eq!(pieces(&link).len(), delivered + 1);
        delivered += 1;
        if link.record.data().len() == sent {
            break;
        }
        link.settle();
        assert_eq!(pieces(&link).len(), delivered, "delivered during the pause");
        link.transport().resume_producing();
        let wanted = delivered + 1;
        link.run_until(|record| record.count(|event| matches!(event, Event::Data(_))) >= wanted);
    }
    link.finish();
}

/// M-03.
fn what_came_during_the_pause_is_delivered_at_resume(kind: Kind) {
    let mut link = Link::new(kind, Script::new());
    link.peer().send(b"before");
    link.run_until(|record| record.data() == b"before");
    for _ in 0..3 {
        link.transport().pause_producing();
        link.peer().send(b" during");
        link.settle();
        let so_far = link.record.data().len();
        link.settle();
        assert_eq!(link.record.data().len(), so_far);
        link.transport().resume_producing();
        link.run_until(|record| record.data().len() == so_far + 7);
    }
    link.finish();
}

/// F-32, W-27.
fn paused_data_and_close_come_after_resume(kind: Kind) {
    let script = Script::new().made(|cx| cx.transport.pause_producing());
    let mut link = Link::new(kind, script);
    let sent = link.peer().fill();
    link.close_peer();
    link.settle();
    assert_eq!(link.record.summary(), ["made"]);
    link.transport().resume_producing();
    link.run_until_lost();
    assert_eq!(
        link.record.summary(),
        [
            "made".into(),
            "reading resumed".into(),
            format!("data {sent}"),
            "read closed".into(),
            "lost closed cleanly".into()
        ]
    );
    link.finish();
}

fn pause_and_resume_in_one_callback_delivers(kind: Kind) {
    let script = Script::new().made(|cx| {
        cx.transport.pause_producing();
        cx.transport.resume_producing();
        assert!(!cx.transport.is_reading_paused());
    });
    let mut link = Link::new(kind, script);
    link.peer().send(b"data");
    link.run_until(|record| record.data() == b"data");
    link.finish();
}

/// Contract R-33.
fn resume_without_pause_does_nothing(kind: Kind) {
    let mut link = Link::new(kind, Script::new());
    link.transport().resume_producing();
    link.settle();
    assert_eq!(link.record.summary(), ["made"]);
    link.transport().pause_producing();
    link.transport().pause_producing();
    link.transport().resume_producing();
    link.transport().resume_producing();
    link.settle();
    assert_eq!(link.record.summary(), ["made", "reading resumed"]);
    link.finish();
}

/// F-30.
fn resume_while_closing_does_nothing(kind: Kind) {
    let script = Script::new().made(|cx| cx.transport.pause_producing());
    let mut link = Link::new(kind, script);
    let written = link.fill();
    link.peer().send(b"unread");
    link.settle();
    link.transport().lose_connection();
    link.transport().resume_producing();
    link.settle();
    assert_eq!(link.record.summary(), ["made"]);
    let (received, _) = link.peer_receives_all();
    // A close with unread bytes is a reset: it may cost the last ones.
    assert!(received.len() <= written);
    link.run_until_lost();
    assert_eq!(link.record.summary(), ["made", "lost closed cleanly"]);
    link.finish();
}

fn pausing_in_reading_resumed_holds(kind: Kind) {
    let mut times = 0;
    let script = Script::new()
        .made(|cx| cx.transport.pause_producing())
        .reading_resumed(move |cx| {
            times += 1;
            if times == 1 {
                cx.transport.pause_producing();
            }
        });
    let mut link = Link::new(kind, script);
    link.peer().send(b"data");
    link.transport().resume_producing();
    link.settle();
    assert_eq!(link.record.summary(), ["made", "reading resumed"]);
    link.transport().resume_producing();
    link.run_until(|record| record.data() == b"data");
    link.finish();
}

/// F-33: nothing is left to wait for but the end, which is told.
fn a_write_to_a_dead_peer_while_paused_ends_it(kind: Kind) {
    let script = Script::new().made(|cx| cx.transport.pause_producing());
    let mut link = Link::new(kind, script);
    link.close_peer();
    link.settle();
    let handle = link.handle;
    crate::support::run_until(&mut link.reactor, move |reactor| {
        match reactor.get(handle) {
            Some(transport) => {
                let status = transport.write(b"anybody?");
                // What says the end is unread, where it takes bytes.
                status == WriteStatus::Refused && kind.has_own_end()
            }
            None => true,
        }
    });
    if kind.has_own_end() {
        link.transport().resume_producing();
        link.run_until_lost();
        let summary = link.record.summary();
        assert!(summary[1].starts_with("broken"), "{summary:?}");
        assert_eq!(
            summary[2..],
            ["reading resumed", "read closed", "lost connection lost"]
        );
        return link.finish();
    }
    link.run_until_lost();
    assert_eq!(
        link.record.summary(),
        ["made", "read closed", "lost connection lost"]
    );
    link.finish();
}

/// M-08, R-28, R-29.
fn a_hang_up_delivers_the_data_first(kind: Kind) {
    let mut link = Link::new(kind, Script::new());
    let sent = link.peer().fill();
    link.close_peer();
    link.run_until_lost();
    assert_eq!(
        link.record.summary(),
        [
            "made".into(),
            format!("data {sent}"),
            "read closed".into(),
            "lost closed cleanly".into()
        ]
    );
    link.finish();
}

/// W-28, R-29, R-28.
fn a_hang_up_while_writing_delivers_the_data_first(kind: Kind) {
    let mut link = Link::new(kind, Script::new());
    let _ = link.fill();
    // Read out, or the close would be a reset that may overtake on TCP.
    let sent = 10_000;
    link.peer().send(&vec![7; sent]);
    link.peer().shut_write();
    link.run_until(Record::is_lost);
    assert_eq!(link.record.data().len(), sent);
    link.run_until_lost();
    link.finish();
}

/// A write that fails does not cost what the peer had sent before, though it
/// takes more than one turn to read that.
fn a_broken_write_delivers_all_that_came_before(kind: Kind) {
    let script = Script::new().made(|cx| {
        cx.transport.pause_producing();
        cx.transport.set_read_limit(NonZeroUsize::new(1_000));
    });
    let mut link = Link::new(kind, script);
    link.peer().send(&[7; 50_000]);
    link.close_peer();
    link.settle();
    if kind.is_tcp() {
        // Answered with the reset; a UNIX socket says so at once.
        let _ = link.transport().write(&[0; 20_000]);
    }
    let transport = link.transport();
    transport.resume_producing();
    let _ = transport.write(&[0; 20_000]);
    link.run_until(Record::is_lost);
    assert_eq!(
        link.record.data().len(),
        50_000,
        "{:?}",
        link.record.summary()
    );
    link.run_until_lost();
    link.finish();
}
