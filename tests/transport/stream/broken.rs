//! Connections over which nothing more can be sent: what had arrived is delivered
//! first, as slowly as the reader wants to, and none stays that cannot end any more.

use std::cell::RefCell;
use std::io;
use std::num::NonZeroUsize;
use std::rc::Rc;
use std::time::Duration;

use bowline::{Detached, Reactor, Transport, TransportHandle, Transports, WriteStatus};

use crate::harness::{DynContext, Kind, Link, Script, over_every_kind, over_every_socket, pattern};
use crate::support::{Event, Record, run_until};

over_every_kind!(
    what_arrived_comes_before_the_failed_write_is_told,
    a_failed_write_refuses_what_follows,
    a_failed_write_resumes_the_producer_that_it_had_paused,
    closing_a_broken_one_waits_for_no_reader,
    a_broken_one_is_still_broken_where_it_was_moved,
);

over_every_socket!(
    a_reset_is_told_at_once_when_nothing_is_unread,
    a_reset_is_told_at_once_and_drops_nothing_unread,
    a_reset_waits_for_what_was_put_back,
    who_is_told_of_a_reset_can_end_it,
    a_reader_that_pauses_behind_a_reset_is_told_then,
    a_peer_that_did_not_read_everything_ends_the_same_whoever_finds_out,
    a_second_error_drops_nothing,
    a_reset_behind_the_peers_end_is_told,
);

/// How a connection does not read for a while.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    Paused,
    Held,
    /// Both, undone one after the other.
    PausedAndHeld,
    /// Paused anew in each callback.
    AtEachRead,
    Reads,
}

const WAYS: [Way; 5] = [
    Way::Paused,
    Way::Held,
    Way::PausedAndHeld,
    Way::AtEachRead,
    Way::Reads,
];

impl Way {
    fn begin(self, transport: &mut dyn Transport) {
        if matches!(self, Self::Paused | Self::PausedAndHeld | Self::AtEachRead) {
            transport.pause_producing();
        }
        if matches!(self, Self::Held | Self::PausedAndHeld) {
            transport.hold_reading();
        }
    }

    fn end(self, transport: &mut dyn Transport) {
        transport.resume_producing();
        transport.release_reading();
    }

    fn script(self, limit: Option<usize>) -> Script {
        let script = Script::new().made(move |cx| {
            cx.transport
                .set_read_limit(limit.and_then(NonZeroUsize::new));
            self.begin(cx.transport);
        });
        match self {
            Self::AtEachRead => script.data(|cx, _| pause_for_a_turn(cx)),
            _ => script,
        }
    }
}

fn pause_for_a_turn(cx: &mut DynContext<'_>) {
    cx.transport.pause_producing();
    let me = cx.transport.handle();
    cx.reactor.call_soon(move |reactor| {
        if let Some(it) = reactor.get(me) {
            it.resume_producing();
        }
    });
}

/// Writes until that fails for good. A peer that is gone answers the first bytes
/// over TCP with a reset.
fn write_until_refused(reactor: &mut Reactor, handle: TransportHandle) {
    run_until(reactor, |reactor| match reactor.get(handle) {
        Some(it) => it.write(b"anybody?") == WriteStatus::Refused,
        None => true,
    });
}

/// F-32, W-28.
fn what_arrived_comes_before_the_failed_write_is_told(kind: Kind) {
    for way in WAYS {
        // All in one read, and in many.
        for limit in [None, Some(4_000)] {
            let mut link = Link::new(kind, way.script(limit));
            let sent = pattern(50_000);
            link.peer().send(&sent);
            link.close_peer();
            write_until_refused(&mut link.reactor, link.handle);
            link.settle();
            if !matches!(way, Way::AtEachRead | Way::Reads) {
                let summary = link.record.summary();
                assert_eq!(summary.len(), 2, "{way:?}: {summary:?}");
                assert!(summary[1].starts_with("broken"), "{way:?}: {summary:?}");
                way.end(link.transport());
            } else if let Some(it) = link.reactor.get(link.handle) {
                way.end(it);
            }
            link.run_until_lost();
            assert!(link.record.data() == sent, "{way:?}: not all arrived");
            let summary = link.record.summary();
            let (last, before) = summary.split_last().expect("it was made");
            assert_eq!(before.last().unwrap(), "read closed", "{way:?}");
            // Who reads may see the end before a write fails.
            if !matches!(way, Way::AtEachRead | Way::Reads) {
                assert_eq!(last, "lost connection lost", "{way:?}");
            }
            link.finish();
        }
    }
}

fn a_failed_write_refuses_what_follows(kind: Kind) {
    let mut link = Link::new(kind, Way::Paused.script(None));
    link.peer().send(b"before");
    link.close_peer();
    write_until_refused(&mut link.reactor, link.handle);
    let transport = link.transport();
    assert_eq!(transport.write(b"more"), WriteStatus::Refused);
    assert_eq!(
        transport.write_owned(b"more".to_vec()),
        WriteStatus::Refused
    );
    // Reading is not over.
    assert!(transport.is_open_for_reading());
    transport.resume_producing();
    link.run_until_lost();
    assert_eq!(link.record.data(), b"before");
    link.finish();
}

/// One that pauses its own reading while its buffer is full would wait for ever.
fn a_failed_write_resumes_the_producer_that_it_had_paused(kind: Kind) {
    let mut link = Link::new(kind, Script::new());
    let me = link.handle;
    link.transport()
        .register_producer(me.into(), bowline::ProducerKind::Push)
        .unwrap();
    link.peer().send(b"before");
    let _ = link.fill();
    assert!(link.transport().is_reading_paused());
    link.close_peer();
    link.run_until_lost();
    assert_eq!(link.record.data(), b"before");
    link.finish();
}

fn closing_a_broken_one_waits_for_no_reader(kind: Kind) {
    let ends: [fn(&mut dyn Transport); 2] = [|it| it.lose_connection(), |it| it.abort_connection()];
    for end in ends {
        let mut link = Link::new(kind, Way::Held.script(None));
        link.peer().send(b"unwanted");
        link.close_peer();
        write_until_refused(&mut link.reactor, link.handle);
        end(link.transport());
        link.run_until_lost();
        assert_eq!(link.record.data(), b"");
        link.finish();
    }
}

fn a_broken_one_is_still_broken_where_it_was_moved(kind: Kind) {
    let mut link = Link::new(kind, Way::Paused.script(Some(10)));
    link.peer().send(&pattern(1_000));
    link.close_peer();
    write_until_refused(&mut link.reactor, link.handle);
    let detached: Rc<RefCell<Option<Detached<Script>>>> = Rc::default();
    let result = Rc::clone(&detached);
    link.reactor.detach(link.handle, move |_, it| {
        *result.borrow_mut() = it.ok();
    });
    link.settle();
    let detached = detached.take().expect("it is open");
    link.handle = kind.reattach(&mut link.reactor, detached).unwrap();
    link.settle();
    let transport = link.transport();
    assert_eq!(transport.write(b"more"), WriteStatus::Refused);
    transport.resume_producing();
    link.run_until_lost();
    assert_eq!(link.record.data(), pattern(1_000));
    assert_eq!(
        link.record.summary().last().unwrap(),
        "lost connection lost"
    );
    link.finish();
}

/// W-27. An accepted connection that never reads is one that the poller need not
/// know otherwise.
fn a_reset_is_told_at_once_when_nothing_is_unread(kind: Kind) {
    for way in [Way::Paused, Way::Held, Way::PausedAndHeld] {
        let mut link = Link::new(kind, way.script(None));
        let _ = link.transport().write(b"never read");
        link.settle();
        link.reset_by_peer();
        link.run_until_lost();
        let summary = link.record.summary();
        assert_eq!(summary.last().unwrap(), "lost connection lost");
        link.finish();
    }
}

/// W-27. It can be decided at once what is to become of it; and where nothing is, all
/// that had arrived is delivered, however long the pause is.
fn a_reset_is_told_at_once_and_drops_nothing_unread(kind: Kind) {
    if !kind.is_tcp() {
        return;
    }
    for way in [Way::Paused, Way::Held, Way::PausedAndHeld] {
        for unread in [1, 100_000] {
            let mut link = Link::new(kind, way.script(Some(20_000)));
            let sent = pattern(unread);
            link.peer().send(&sent);
            link.settle();
            link.reset_by_peer();
            link.settle();
            let told = ["made", "broken pieces"];
            assert_eq!(link.record.summary(), told, "{way:?}, {unread}");
            link.clock.advance(Duration::from_secs(86_400));
            link.settle();
            assert_eq!(link.record.summary(), told, "{way:?}, {unread}: later");
            way.end(link.transport());
            link.run_until_lost();
            assert!(link.record.data() == sent, "{way:?}: not all of {unread}");
            let summary = link.record.summary();
            assert_eq!(summary.last().unwrap(), "lost connection lost");
            let told = summary.iter().filter(|it| it.starts_with("broken"));
            assert_eq!(told.count(), 1, "{summary:?}");
            link.finish();
        }
    }
}

/// Bytes that the reactor has, and the kernel does not, count as unread.
fn a_reset_waits_for_what_was_put_back(kind: Kind) {
    if !kind.is_tcp() {
        return;
    }
    let script = Script::new().data(|cx, data| {
        // All of it, once.
        if data.len() == 100 {
            cx.transport.push_back(data[1..].to_vec());
            cx.transport.pause_producing();
        }
    });
    let mut link = Link::new(kind, script);
    link.peer().send(&pattern(100));
    link.settle();
    link.reset_by_peer();
    link.settle();
    let told = ["made", "data 100", "broken pieces"];
    assert_eq!(link.record.summary(), told);
    link.transport().resume_producing();
    link.run_until_lost();
    let summary = link.record.summary();
    assert_eq!(
        summary[3..],
        ["reading resumed", "data 99", "lost connection lost"]
    );
    link.finish();
}

fn who_is_told_of_a_reset_can_end_it(kind: Kind) {
    if !kind.is_tcp() {
        return;
    }
    let ends: [fn(&mut dyn Transport); 2] = [|it| it.lose_connection(), |it| it.abort_connection()];
    for (end, reason) in ends.into_iter().zip(["connection lost", "aborted by us"]) {
        let script = Way::Paused.script(None).broken(move |cx| end(cx.transport));
        let mut link = Link::new(kind, script);
        link.peer().send(b"never read");
        link.settle();
        link.reset_by_peer();
        link.run_until_lost();
        let lost = format!("lost {reason}");
        assert_eq!(link.record.summary(), ["made", "broken pieces", &lost]);
        link.finish();
    }
}

/// It is paused only when something is read and not passed on, as a proxy is.
fn a_reader_that_pauses_behind_a_reset_is_told_then(kind: Kind) {
    if !kind.is_tcp() {
        return;
    }
    let script = Way::Paused.script(Some(1_000));
    let mut link = Link::new(kind, script.data(|cx, _| cx.transport.pause_producing()));
    link.peer().send(&pattern(5_000));
    link.settle();
    link.transport().resume_producing();
    link.settle();
    let told = ["made", "reading resumed", "data 1000"];
    assert_eq!(link.record.summary(), told);
    link.transport().resume_producing();
    link.reset_by_peer();
    link.settle();
    let summary = link.record.summary();
    assert_eq!(summary.last().unwrap(), "broken pieces", "{summary:?}");
    for _ in 0..3 {
        link.transport().resume_producing();
        link.settle();
    }
    link.run_until_lost();
    assert_eq!(link.record.data(), pattern(5_000));
    let summary = link.record.summary();
    let told = summary.iter().filter(|it| it.starts_with("broken"));
    assert_eq!(told.count(), 1, "{summary:?}");
    link.finish();
}

/// W-28. Of a UNIX peer that has closed without reading everything, both directions know
/// something: whether a write or the poller comes first must not matter.
fn a_peer_that_did_not_read_everything_ends_the_same_whoever_finds_out(kind: Kind) {
    if !kind.is_unix_socket() {
        return;
    }
    for way in [Way::Paused, Way::Held, Way::Reads] {
        for writes_first in [false, true] {
            let mut link = Link::new(kind, way.script(None));
            let _ = link.transport().write(b"never read");
            link.settle();
            link.peer().send(b"last words");
            if way == Way::Reads {
                link.run_until(|record| record.data() == b"last words");
            }
            link.reset_by_peer();
            if writes_first {
                // So long that it goes straight to the kernel.
                assert_eq!(link.transport().write(&[0; 10_000]), WriteStatus::Refused);
            }
            link.settle();
            if let Some(it) = link.reactor.get(link.handle) {
                way.end(it);
            }
            link.run_until_lost();
            let case = format!("{way:?}, writes first: {writes_first}");
            assert_eq!(link.record.data(), b"last words", "{case}");
            let summary = link.record.summary();
            let summary: Vec<&str> = summary.iter().map(String::as_str).collect();
            let end: &[&str] = match kind.has_own_end() {
                true => &["lost connection lost"],
                false => &["read closed", "lost connection lost"],
            };
            assert!(summary.ends_with(end), "{case}: {summary:?}");
            let reset = io::Error::from(rustix::io::Errno::CONNRESET).to_string();
            let is_reset =
                |event: &Event| matches!(event, Event::Lost(why) if why.contains(&reset));
            assert_eq!(link.record.count(is_reset), 1, "{case}: why");
            link.finish();
        }
    }
}

/// L17. It first does not read any more, and then closes: two errors, and one reader that is
/// owed what was sent before them.
fn a_second_error_drops_nothing(kind: Kind) {
    if !kind.is_unix_socket() {
        return;
    }
    for way in [Way::Paused, Way::Held] {
        let mut link = Link::new(kind, way.script(None));
        let _ = link.transport().write(b"never read");
        link.settle();
        link.peer().send(b"last words");
        link.peer().shut_read();
        assert_eq!(link.transport().write(&[0; 10_000]), WriteStatus::Refused);
        link.settle();
        assert_eq!(link.record.summary(), ["made", "broken reading"]);
        link.reset_by_peer();
        link.settle();
        assert_eq!(link.record.summary(), ["made", "broken reading"]);
        way.end(link.transport());
        link.run_until_lost();
        assert_eq!(link.record.data(), b"last words", "{way:?}");
        let summary = link.record.summary();
        let is_told = summary.iter().any(|it| it == "read closed");
        assert_eq!(is_told, !kind.has_own_end(), "{way:?}: {summary:?}");
        let broken_pipe = io::Error::from(rustix::io::Errno::PIPE).to_string();
        let is_first =
            |event: &Event| matches!(event, Event::Lost(why) if why.contains(&broken_pipe));
        assert_eq!(link.record.count(is_first), 1, "{way:?}: the first is why");
        link.finish();
    }
}

/// With nothing to write, nothing else would ever find out.
fn a_reset_behind_the_peers_end_is_told(kind: Kind) {
    let mut link = Link::new(kind, Script::new().keep_writing());
    let _ = link.transport().write(b"never read");
    link.settle();
    link.peer().shut_write();
    link.run_until(|record| record.summary() == ["made", "read closed"]);
    link.settle();
    link.reset_by_peer();
    link.run_until(Record::is_lost);
    link.run_until_lost();
    assert_eq!(
        link.record.summary(),
        ["made", "read closed", "lost connection lost"]
    );
    link.finish();
}
