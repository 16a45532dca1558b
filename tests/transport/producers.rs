//! Producers of every kind over every kind of transport: paused and resumed in
//! strict turns, asked again, and waited for.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use bowline::error::RegisterProducerError;
use bowline::{
    AfterReadClosed, Context, Producer, ProducerKind, ProducerRef, Reactor, Transport,
    TransportHandle, TransportState, Transports, Watermarks, WriteStatus,
};

use crate::harness::{
    Buffers, DynContext, End, Kind, Link, Peer, Script, over_every_kind, over_terminals, pattern,
};
use crate::support::{DescriptorLedger, Event, Record, run_until, run_until_quiet, socketpair};

over_every_kind!(
    registering_a_push_producer_calls_nothing,
    a_second_producer_is_refused,
    a_push_producer_is_paused_above_the_high_watermark,
    a_full_period_has_one_pause_and_one_resume,
    a_producer_that_was_not_paused_is_not_resumed,
    a_resume_that_fills_the_buffer_pauses_again,
    a_producer_registered_while_full_is_paused,
    watermarks_are_settable,
    lowering_the_high_watermark_pauses,
    a_pull_producer_is_asked_after_the_callback_and_after_each_drain,
    a_pull_producer_is_never_paused,
    a_pull_producer_that_had_nothing_is_asked_again,
    large_portions_are_asked_for_one_by_one,
    a_pull_producer_registered_while_bytes_wait_is_asked_when_they_left,
    a_producer_that_comes_too_late_is_stopped,
    the_loss_stops_the_producer_first,
    an_unregistered_producer_is_not_stopped,
    the_next_producer_starts_unpaused,
    the_next_producer_is_not_asked_for_the_last_one,
    unregistering_none_does_nothing,
    closing_waits_for_a_running_push_producer,
    closing_waits_for_a_paused_push_producer,
    closing_waits_for_a_pull_producer,
    a_producer_that_is_done_closes_with_one_call,
    half_close_waits_for_a_producer,
    unregistering_inside_the_pause,
    unregistering_inside_the_resume,
    aborting_inside_the_pause,
    aborting_inside_the_resume,
    a_panic_in_the_resume_costs_the_connection,
    a_transport_that_produces_for_itself_reads_no_faster_than_it_writes,
);

over_terminals!(
    a_second_producer_is_refused,
    a_push_producer_is_paused_above_the_high_watermark,
    a_full_period_has_one_pause_and_one_resume,
    a_producer_that_was_not_paused_is_not_resumed,
    a_resume_that_fills_the_buffer_pauses_again,
    a_producer_registered_while_full_is_paused,
    lowering_the_high_watermark_pauses,
    a_pull_producer_is_asked_after_the_callback_and_after_each_drain,
    a_pull_producer_is_never_paused,
    a_pull_producer_that_had_nothing_is_asked_again,
    a_pull_producer_registered_while_bytes_wait_is_asked_when_they_left,
    a_producer_that_comes_too_late_is_stopped,
    an_unregistered_producer_is_not_stopped,
    the_next_producer_starts_unpaused,
    the_next_producer_is_not_asked_for_the_last_one,
    unregistering_none_does_nothing,
    closing_waits_for_a_pull_producer,
    aborting_inside_the_pause,
    aborting_inside_the_resume,
    a_panic_in_the_resume_costs_the_connection,
);

type Hook = Box<dyn FnMut(&mut DynContext<'_>)>;

/// What a producer does when it is called.
struct Hooks {
    pause: Hook,
    resume: Hook,
}

impl Hooks {
    fn none() -> Self {
        Self::resume(|_| {})
    }

    fn resume(resume: impl FnMut(&mut DynContext<'_>) + 'static) -> Self {
        Self {
            pause: Box::new(|_| {}),
            resume: Box::new(resume),
        }
    }

    fn pause(pause: impl FnMut(&mut DynContext<'_>) + 'static) -> Self {
        Self {
            pause: Box::new(pause),
            resume: Box::new(|_| {}),
        }
    }
}

/// A producer that is an object of its own.
struct Source {
    record: Record,
    hooks: Hooks,
}

impl Producer for Source {
    fn resume_producing(&mut self, cx: &mut Context<'_, dyn Transport>) {
        self.record.push(Event::Resumed);
        (self.hooks.resume)(cx);
    }

    fn pause_producing(&mut self, cx: &mut Context<'_, dyn Transport>) {
        self.record.push(Event::Paused);
        (self.hooks.pause)(cx);
    }

    fn stop_producing(&mut self, _: &mut Context<'_, dyn Transport>) {
        self.record.push(Event::Stopped);
    }
}

/// Who produces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Who {
    Protocol,
    Boxed,
}

const EVERYBODY: [Who; 2] = [Who::Protocol, Who::Boxed];

/// A connection with a producer at hand.
struct Produced {
    link: Link,
    producer: Option<ProducerRef>,
}

impl Produced {
    fn new(kind: Kind, who: Who, hooks: Hooks) -> Self {
        Self::with_buffers(kind, Buffers::Default, who, hooks)
    }

    fn with_buffers(kind: Kind, buffers: Buffers, who: Who, hooks: Hooks) -> Self {
        let script = Script::new();
        match who {
            Who::Protocol => Self {
                link: Link::with_buffers(
                    kind,
                    buffers,
                    script.pause(hooks.pause).resume(hooks.resume),
                ),
                producer: Some(ProducerRef::Protocol),
            },
            Who::Boxed => {
                let record = script.record();
                Self {
                    link: Link::with_buffers(kind, buffers, script),
                    producer: Some(ProducerRef::boxed(Source { record, hooks })),
                }
            }
        }
    }

    #[track_caller]
    fn register(&mut self, kind: ProducerKind) {
        let producer = self.producer.take().expect("once");
        self.link
            .transport()
            .register_producer(producer, kind)
            .unwrap();
    }
}

/// Writes `count` bytes in pieces that are buffered, never sent at once.
fn write_buffered(transport: &mut dyn Transport, mut count: usize) -> WriteStatus {
    let mut status = WriteStatus::Ready;
    while count > 0 {
        let piece = count.min(4_096);
        status = transport.write(&vec![b'p'; piece]);
        assert_ne!(status, WriteStatus::Refused);
        count -= piece;
    }
    status
}

/// P-03.
fn registering_a_push_producer_calls_nothing(kind: Kind) {
    for who in EVERYBODY {
        let mut it = Produced::new(kind, who, Hooks::none());
        it.register(ProducerKind::Push);
        it.link.settle();
        assert_eq!(it.link.record.summary(), ["made"]);
        assert!(!it.link.transport().is_producer_paused());
        it.link.finish();
    }
}

/// P-01.
fn a_second_producer_is_refused(kind: Kind) {
    let mut it = Produced::new(kind, Who::Protocol, Hooks::none());
    it.register(ProducerKind::Push);
    let second = Record::default();
    let refused = it.link.transport().register_producer(
        ProducerRef::boxed(Source {
            record: second.clone(),
            hooks: Hooks::none(),
        }),
        ProducerKind::Pull,
    );
    assert_eq!(refused, Err(RegisterProducerError::AlreadyRegistered));
    write_buffered(it.link.transport(), 100_000);
    assert_eq!(it.link.peer_receives(100_000).len(), 100_000);
    it.link.settle();
    assert_eq!(it.link.record.summary(), ["made", "paused", "resumed"]);
    assert_eq!(
        second.summary(),
        [""; 0],
        "the refused one was told something"
    );
    it.link.finish();
}

/// P-05, F-22: strictly more than 65,536.
fn a_push_producer_is_paused_above_the_high_watermark(kind: Kind) {
    for who in EVERYBODY {
        let mut it = Produced::new(kind, who, Hooks::none());
        it.register(ProducerKind::Push);
        let transport = it.link.transport();
        assert_eq!(write_buffered(transport, 65_536), WriteStatus::Ready);
        assert!(!transport.is_producer_paused() && !transport.is_send_buffer_full());
        assert_eq!(transport.write(b"!"), WriteStatus::Full);
        // At once, though it is told later.
        assert!(transport.is_producer_paused() && transport.is_send_buffer_full());
        assert_eq!(it.link.record.summary(), ["made"]);
        it.link.peer_receives(65_537);
        it.link.settle();
        assert_eq!(it.link.record.summary(), ["made", "paused", "resumed"]);
        assert!(!it.link.transport().is_producer_paused());
        it.link.finish();
    }
}

/// P-07, P-08, W-20: resumed when all has left, and no sooner.
fn a_full_period_has_one_pause_and_one_resume(kind: Kind) {
    for who in EVERYBODY {
        let hooks = Hooks::resume(|cx| assert_eq!(cx.transport.unsent_bytes(), 0));
        // What is unsent leaves by small steps.
        let mut it = Produced::with_buffers(kind, Buffers::Small, who, hooks);
        let before = it.link.fill();
        it.register(ProducerKind::Push);
        let mut written = before;
        for _ in 0..5 {
            write_buffered(it.link.transport(), 70_000);
            written += 70_000;
            it.link.settle();
        }
        assert_eq!(it.link.record.summary(), ["made", "paused"]);
        it.link.peer_receives(written);
        it.link.settle();
        assert_eq!(it.link.record.summary(), ["made", "paused", "resumed"]);
        it.link.finish();
    }
}

/// P-09.
fn a_producer_that_was_not_paused_is_not_resumed(kind: Kind) {
    for who in EVERYBODY {
        let mut it = Produced::new(kind, who, Hooks::none());
        it.register(ProducerKind::Push);
        for _ in 0..3 {
            write_buffered(it.link.transport(), 60_000);
            it.link.peer_receives(60_000);
            it.link.settle();
        }
        assert_eq!(it.link.record.summary(), ["made"]);
        it.link.finish();
    }
}

/// P-10.
fn a_resume_that_fills_the_buffer_pauses_again(kind: Kind) {
    for who in EVERYBODY {
        let mut left = 5;
        let hooks = Hooks::resume(move |cx| {
            if left == 0 {
                return;
            }
            left -= 1;
            write_buffered(cx.transport, 200_000);
            assert!(cx.transport.is_producer_paused());
        });
        let mut it = Produced::new(kind, who, hooks);
        it.register(ProducerKind::Push);
        write_buffered(it.link.transport(), 200_000);
        it.link.peer_receives(6 * 200_000);
        it.link.settle();
        let mut expected = vec!["made"];
        expected.extend(["paused", "resumed"].repeat(6));
        assert_eq!(it.link.record.summary(), expected);
        it.link.finish();
    }
}

fn a_producer_registered_while_full_is_paused(kind: Kind) {
    for who in EVERYBODY {
        let mut it = Produced::new(kind, who, Hooks::none());
        let written = it.link.fill();
        it.register(ProducerKind::Push);
        assert!(it.link.transport().is_producer_paused());
        it.link.settle();
        assert_eq!(it.link.record.summary(), ["made", "paused"]);
        it.link.peer_receives(written);
        it.link.settle();
        assert_eq!(it.link.record.summary(), ["made", "paused", "resumed"]);
        it.link.finish();
    }
}

/// P-23, W-17, W-22: unsent bytes count, and the low watermark is one's own.
fn watermarks_are_settable(kind: Kind) {
    const LOW: usize = 300_000;
    for who in EVERYBODY {
        let seen = Rc::new(Cell::new(None));
        let at_resume = seen.clone();
        let hooks = Hooks::resume(move |cx| at_resume.set(Some(cx.transport.unsent_bytes())));
        let mut it = Produced::new(kind, who, hooks);
        let mut written = it.link.fill();
        let unsent = it.link.transport().unsent_bytes();
        it.link.transport().set_watermarks(
            Watermarks::default()
                .low(LOW)
                .high(unsent + 1_000)
                .limit(usize::MAX),
        );
        it.register(ProducerKind::Push);
        assert!(!it.link.transport().is_producer_paused());
        assert_eq!(
            write_buffered(it.link.transport(), 1_000),
            WriteStatus::Ready
        );
        assert!(!it.link.transport().is_producer_paused());
        assert_eq!(write_buffered(it.link.transport(), 1), WriteStatus::Full);
        written += 1_001;
        it.link.settle();
        assert_eq!(it.link.record.summary(), ["made", "paused"]);
        let mut received = 0;
        while seen.get().is_none() {
            assert!(received < written, "never resumed");
            received += it.link.peer_receives(1_000.min(written - received)).len();
            it.link.turn();
        }
        assert!(seen.get().unwrap() <= LOW);
        it.link.peer_receives(written - received);
        it.link.settle();
        assert_eq!(it.link.record.summary(), ["made", "paused", "resumed"]);
        it.link.finish();
    }
}

/// W-22: the number for what is unsent is not that of what is read at a time.
fn lowering_the_high_watermark_pauses(kind: Kind) {
    let mut it = Produced::new(kind, Who::Boxed, Hooks::none());
    it.register(ProducerKind::Push);
    let transport = it.link.transport();
    write_buffered(transport, 600);
    transport.set_watermarks(transport.watermarks().high(500));
    assert!(transport.is_producer_paused());
    it.link.peer_receives(600);
    it.link.settle();
    assert_eq!(it.link.record.summary(), ["made", "paused", "resumed"]);
    it.link.peer().send(&[1; 2_000]);
    it.link.run_until(|record| record.data().len() == 2_000);
    assert_eq!(it.link.record.pieces(), [2_000]);
    it.link.finish();
}

/// P-02, P-11.
fn a_pull_producer_is_asked_after_the_callback_and_after_each_drain(kind: Kind) {
    for who in EVERYBODY {
        let portions = Rc::new(Cell::new(0u8));
        let asked = portions.clone();
        let hooks = Hooks::resume(move |cx| {
            let portion = asked.get();
            asked.set(portion + 1);
            let _ = cx.transport.write(&[portion; 100]);
            if portion == 9 {
                cx.transport.unregister_producer();
            }
        });
        let mut it = Produced::new(kind, who, hooks);
        it.register(ProducerKind::Pull);
        assert_eq!(portions.get(), 0, "asked inside the call");
        let received = it.link.peer_receives(1_000);
        assert!(
            received
                .iter()
                .enumerate()
                .all(|(at, &portion)| usize::from(portion) == at / 100)
        );
        it.link.settle();
        assert_eq!(portions.get(), 10);
        it.link.finish();
    }
}

/// P-06.
fn a_pull_producer_is_never_paused(kind: Kind) {
    for who in EVERYBODY {
        let mut it = Produced::new(kind, who, Hooks::none());
        let written = it.link.fill();
        it.register(ProducerKind::Pull);
        write_buffered(it.link.transport(), 200_000);
        assert!(!it.link.transport().is_producer_paused());
        it.link.settle();
        assert_eq!(it.link.record.summary(), ["made"]);
        it.link.peer_receives(written + 200_000);
        it.link.settle();
        assert_eq!(it.link.record.summary(), ["made", "resumed"]);
        it.link.finish();
    }
}

/// W-21; and no timer is left at the end.
fn a_pull_producer_that_had_nothing_is_asked_again(kind: Kind) {
    for who in EVERYBODY {
        let has_data = Rc::new(Cell::new(false));
        let ready = has_data.clone();
        let hooks = Hooks::resume(move |cx| {
            if ready.get() {
                let _ = cx.transport.write(b"at last");
                cx.transport.unregister_producer();
            }
        });
        let mut it = Produced::new(kind, who, hooks);
        it.register(ProducerKind::Pull);
        it.link.settle();
        assert_eq!(it.link.record.summary(), ["made", "resumed"]);
        // Others may write meanwhile; it is asked then too.
        let _ = it.link.transport().write(b"other");
        it.link.peer_receives(5);
        it.link.settle();
        assert_eq!(it.link.record.summary(), ["made", "resumed", "resumed"]);
        assert_eq!(it.link.reactor.delayed_calls().count(), 1);
        it.link.clock.advance(Duration::from_millis(10));
        it.link.settle();
        assert_eq!(it.link.record.summary().len(), 4);
        has_data.set(true);
        it.link.clock.advance(Duration::from_millis(10));
        assert_eq!(it.link.peer_receives(7), b"at last");
        it.link.close_peer();
        it.link.run_until_lost();
        assert_eq!(it.link.reactor.delayed_calls().count(), 0);
        it.link.finish();
    }
}

/// Portions that go straight to the kernel, and that are longer than it takes.
fn large_portions_are_asked_for_one_by_one(kind: Kind) {
    for who in EVERYBODY {
        for size in [8_192, 20_000, 1 << 20] {
            const PORTIONS: usize = 5;
            let all = Rc::new(pattern(PORTIONS * size));
            let source = all.clone();
            let mut portion = 0;
            let hooks = Hooks::resume(move |cx| {
                let _ = cx.transport.write(&source[portion * size..][..size]);
                portion += 1;
                if portion == PORTIONS {
                    cx.transport.unregister_producer();
                    cx.transport.lose_connection();
                }
            });
            let mut it = Produced::new(kind, who, hooks);
            it.register(ProducerKind::Pull);
            let (received, end) = it.link.peer_receives_all();
            assert!(received == **all, "{} of {}", received.len(), all.len());
            assert_eq!(end, End::Clean);
            it.link.run_until_lost();
            let asked = it
                .link
                .record
                .count(|event| matches!(event, Event::Resumed));
            assert_eq!(asked, PORTIONS);
            it.link.finish();
        }
    }
}

fn a_pull_producer_registered_while_bytes_wait_is_asked_when_they_left(kind: Kind) {
    let hooks = Hooks::resume(|cx| {
        assert_eq!(cx.transport.unsent_bytes(), 0);
        cx.transport.unregister_producer();
    });
    let mut it = Produced::new(kind, Who::Boxed, hooks);
    let written = it.link.fill();
    it.register(ProducerKind::Pull);
    it.link.settle();
    assert_eq!(it.link.record.summary(), ["made"]);
    it.link.peer_receives(written);
    it.link.settle();
    assert_eq!(it.link.record.summary(), ["made", "resumed"]);
    it.link.finish();
}

/// P-04.
fn a_producer_that_comes_too_late_is_stopped(kind: Kind) {
    for is_lost in [true, false] {
        let late = Record::default();
        let source = late.clone();
        let register = move |cx: &mut DynContext<'_>| {
            let producer = ProducerRef::boxed(Source {
                record: source.clone(),
                hooks: Hooks::none(),
            });
            let refused = cx.transport.register_producer(producer, ProducerKind::Pull);
            assert_eq!(refused, Err(RegisterProducerError::NotConnected));
            assert!(source.summary().is_empty(), "told inside the call");
        };
        let script = if is_lost {
            Script::new().lost(move |cx, _| register(cx))
        } else {
            Script::new().data(move |cx, _| {
                cx.transport.abort_connection();
                register(cx);
            })
        };
        let mut link = Link::new(kind, script);
        link.peer().send(b"go");
        link.settle();
        link.close_peer();
        link.run_until_lost();
        assert_eq!(late.summary(), ["stopped"]);
        link.finish();
    }
}

/// P-16, F-20.
fn the_loss_stops_the_producer_first(kind: Kind) {
    for who in EVERYBODY {
        for producer_kind in [ProducerKind::Push, ProducerKind::Pull] {
            let mut it = Produced::new(kind, who, Hooks::none());
            let _ = it.link.fill();
            it.register(producer_kind);
            it.link.settle();
            it.link.transport().abort_connection();
            it.link.run_until_lost();
            let summary = it.link.record.summary();
            assert_eq!(
                summary[summary.len() - 2..],
                ["stopped", "lost aborted by us"]
            );
            assert_eq!(
                it.link
                    .record
                    .count(|event| matches!(event, Event::Stopped)),
                1
            );
            it.link.finish();
        }
    }
}

fn an_unregistered_producer_is_not_stopped(kind: Kind) {
    for who in EVERYBODY {
        let mut it = Produced::new(kind, who, Hooks::none());
        it.register(ProducerKind::Push);
        it.link.settle();
        it.link.transport().unregister_producer();
        it.link.transport().abort_connection();
        it.link.run_until_lost();
        assert_eq!(it.link.record.summary(), ["made", "lost aborted by us"]);
        it.link.finish();
    }
}

/// P-19, W-20.
fn the_next_producer_starts_unpaused(kind: Kind) {
    for who in EVERYBODY {
        let mut it = Produced::new(kind, who, Hooks::none());
        let written = it.link.fill();
        it.register(ProducerKind::Push);
        it.link.settle();
        assert_eq!(it.link.record.summary(), ["made", "paused"]);
        it.link.transport().unregister_producer();
        assert!(!it.link.transport().is_producer_paused());
        it.link.peer_receives(written);
        let next = Record::default();
        let producer = ProducerRef::boxed(Source {
            record: next.clone(),
            hooks: Hooks::none(),
        });
        it.link
            .transport()
            .register_producer(producer, ProducerKind::Push)
            .unwrap();
        assert!(!it.link.transport().is_producer_paused());
        write_buffered(it.link.transport(), 1_000);
        it.link.peer_receives(1_000);
        it.link.settle();
        assert_eq!(it.link.record.summary(), ["made", "paused"]);
        assert_eq!(next.summary(), [""; 0]);
        it.link.finish();
    }
}

/// The timer that was to ask a pull producer again is not for its successor.
fn the_next_producer_is_not_asked_for_the_last_one(kind: Kind) {
    let mut it = Produced::new(kind, Who::Boxed, Hooks::none());
    it.register(ProducerKind::Pull);
    it.link.settle();
    it.link.transport().unregister_producer();
    let next = Record::default();
    let producer = ProducerRef::boxed(Source {
        record: next.clone(),
        hooks: Hooks::none(),
    });
    it.link
        .transport()
        .register_producer(producer, ProducerKind::Push)
        .unwrap();
    it.link.settle();
    it.link.clock.advance(Duration::from_secs(1));
    it.link.settle();
    assert_eq!(next.summary(), [""; 0], "resumed and never paused");
    it.link.finish();
}

/// P-14, P-15.
fn unregistering_none_does_nothing(kind: Kind) {
    let script = Script::new().lost(|cx, _| cx.transport.unregister_producer());
    let mut link = Link::new(kind, script);
    link.transport().unregister_producer();
    link.settle();
    link.transport().unregister_producer();
    link.close_peer();
    link.run_until_lost();
    link.finish();
}

fn assert_close_waits(it: &mut Produced, expected: usize) {
    it.link.transport().lose_connection();
    it.link.settle();
    it.link.clock.advance(Duration::from_secs(60));
    it.link.settle();
    assert!(!it.link.record.is_lost(), "did not wait");
    assert_eq!(it.link.transport().state(), TransportState::Closing);
    // The producer may go on.
    assert_ne!(it.link.transport().write(b"the end"), WriteStatus::Refused);
    it.link.settle();
    assert!(!it.link.record.is_lost(), "did not wait");
    it.link.transport().unregister_producer();
    assert_eq!(it.link.transport().write(b"late"), WriteStatus::Refused);
    let (received, end) = it.link.peer_receives_all();
    assert!(received.ends_with(b"the end"));
    assert_eq!((received.len(), end), (expected + 7, End::Clean));
    it.link.run_until_lost();
    let summary = it.link.record.summary();
    assert_eq!(summary.last().unwrap(), "lost closed cleanly");
    assert!(!summary.contains(&"stopped".into()));
}

/// P-18, W-19.
fn closing_waits_for_a_running_push_producer(kind: Kind) {
    for who in EVERYBODY {
        let mut it = Produced::new(kind, who, Hooks::none());
        it.register(ProducerKind::Push);
        assert_close_waits(&mut it, 0);
        it.link.finish();
    }
}

/// F-34: whoever produces, and before all is sent or after. It is done, and not told to
/// stop.
fn a_producer_that_is_done_closes_with_one_call(kind: Kind) {
    for who in EVERYBODY {
        for producer in [ProducerKind::Push, ProducerKind::Pull] {
            for after in [false, true] {
                let mut it = Produced::new(kind, who, Hooks::none());
                it.register(producer);
                let _ = it.link.transport().write(b"the last");
                if after {
                    it.link.settle();
                }
                it.link.transport().stop_consuming();
                let received = it.link.peer_receives_all();
                assert_eq!(received, (b"the last".to_vec(), End::Clean));
                it.link.run_until_lost();
                let told = it.link.record.summary();
                assert_eq!(told.last().unwrap(), "lost closed cleanly");
                assert!(!told.contains(&"stopped".into()), "{told:?}");
                it.link.finish();
            }
        }
    }
}

/// P-17, F-11.
fn closing_waits_for_a_paused_push_producer(kind: Kind) {
    for who in EVERYBODY {
        let mut it = Produced::new(kind, who, Hooks::none());
        let written = it.link.fill();
        it.register(ProducerKind::Push);
        it.link.settle();
        assert_close_waits(&mut it, written);
        it.link.finish();
    }
}

/// P-13, P-17, F-11.
fn closing_waits_for_a_pull_producer(kind: Kind) {
    for who in EVERYBODY {
        let mut it = Produced::new(kind, who, Hooks::none());
        it.register(ProducerKind::Pull);
        assert_close_waits(&mut it, 0);
        it.link.finish();
    }
}

/// P-24, F-11.
fn half_close_waits_for_a_producer(kind: Kind) {
    for who in EVERYBODY {
        for producer_kind in [ProducerKind::Push, ProducerKind::Pull] {
            let mut it = Produced::new(kind, who, Hooks::none());
            it.register(producer_kind);
            it.link.transport().lose_write_connection();
            it.link.settle();
            let has_closed =
                |record: &Record| record.count(|event| matches!(event, Event::WriteClosed)) == 1;
            assert!(!has_closed(&it.link.record), "did not wait");
            let _ = it.link.transport().write(b"the end");
            it.link.settle();
            assert!(!has_closed(&it.link.record), "did not wait");
            it.link.transport().unregister_producer();
            let (received, end) = it.link.peer_receives_all();
            assert_eq!((&received[..], end), (&b"the end"[..], End::Clean));
            it.link.run_until(has_closed);
            it.link.finish();
        }
    }
}

fn unregistering_inside_the_pause(kind: Kind) {
    for who in EVERYBODY {
        let hooks = Hooks::pause(|cx| {
            cx.transport.unregister_producer();
            cx.transport.lose_connection();
        });
        let mut it = Produced::new(kind, who, hooks);
        it.register(ProducerKind::Push);
        write_buffered(it.link.transport(), 100_000);
        let (received, end) = it.link.peer_receives_all();
        assert_eq!((received.len(), end), (100_000, End::Clean));
        it.link.run_until_lost();
        assert_eq!(
            it.link.record.summary(),
            ["made", "paused", "lost closed cleanly"]
        );
        it.link.finish();
    }
}

fn unregistering_inside_the_resume(kind: Kind) {
    for who in EVERYBODY {
        for producer_kind in [ProducerKind::Push, ProducerKind::Pull] {
            let next = Record::default();
            let record = next.clone();
            let hooks = Hooks::resume(move |cx| {
                cx.transport.unregister_producer();
                // Another takes its place at once.
                let producer = ProducerRef::boxed(Source {
                    record: record.clone(),
                    hooks: Hooks::resume(|cx| cx.transport.unregister_producer()),
                });
                cx.transport
                    .register_producer(producer, ProducerKind::Pull)
                    .unwrap();
            });
            let mut it = Produced::new(kind, who, hooks);
            it.register(producer_kind);
            write_buffered(it.link.transport(), 100_000);
            it.link.peer_receives(100_000);
            it.link.settle();
            assert_eq!(
                it.link
                    .record
                    .count(|event| matches!(event, Event::Resumed)),
                1
            );
            assert_eq!(next.summary(), ["resumed"]);
            it.link.transport().lose_connection();
            it.link.run_until_lost();
            it.link.finish();
        }
    }
}

fn aborting_inside_the_pause(kind: Kind) {
    for who in EVERYBODY {
        let mut it = Produced::new(
            kind,
            who,
            Hooks::pause(|cx| cx.transport.abort_connection()),
        );
        it.register(ProducerKind::Push);
        write_buffered(it.link.transport(), 100_000);
        it.link.run_until_lost();
        assert_eq!(
            it.link.record.summary(),
            ["made", "paused", "stopped", "lost aborted by us"]
        );
        it.link.finish();
    }
}

fn aborting_inside_the_resume(kind: Kind) {
    for who in EVERYBODY {
        let hooks = Hooks::resume(|cx| {
            let _ = cx.transport.write(b"half");
            cx.transport.unregister_producer();
            cx.transport.abort_connection();
        });
        let mut it = Produced::new(kind, who, hooks);
        it.register(ProducerKind::Pull);
        it.link.run_until_lost();
        assert_eq!(
            it.link.record.summary(),
            ["made", "resumed", "lost aborted by us"]
        );
        it.link.finish();
    }
}

/// P-20.
fn a_panic_in_the_resume_costs_the_connection(kind: Kind) {
    for who in EVERYBODY {
        let mut it = Produced::new(kind, who, Hooks::resume(|_| panic!("on purpose")));
        it.register(ProducerKind::Pull);
        it.link.run_until_lost();
        let summary = it.link.record.summary();
        assert_eq!(summary[..2], ["made", "resumed"]);
        assert_eq!(summary.last().unwrap(), "lost a callback panicked");
        it.link.finish_after_panic();
    }
}

/// An echo that is its own producer: what it may not write it does not read.
/// It closes as soon as nothing more can come.
fn a_transport_that_produces_for_itself_reads_no_faster_than_it_writes(kind: Kind) {
    let script = Script::new()
        .made(|cx| {
            let own = cx.transport.handle();
            cx.transport
                .register_producer(own.into(), ProducerKind::Push)
                .unwrap();
        })
        .data(|cx, data| {
            let _ = cx.transport.write(data);
        })
        .read_closed(|_| AfterReadClosed::LoseConnection);
    let mut link = Link::new(kind, script);
    let mut sent = 0;
    while !link.transport().is_reading_paused() {
        sent += link.peer().fill();
        link.settle();
        assert!(sent < 64 << 20, "reads for ever");
    }
    assert!(link.transport().unsent_bytes() < 65_536 + 65_536 + 1);
    assert_eq!(link.peer_receives(sent).len(), sent);
    link.settle();
    assert!(!link.transport().is_reading_paused());
    link.peer().send(b"bye");
    link.peer().shut_write();
    assert_eq!(link.peer_receives_all(), (b"bye".to_vec(), End::Clean));
    link.run_until_lost();
    link.finish();
}

/// Two connections of one reactor, each the producer of the other.
struct Proxy {
    reactor: Reactor,
    front: Peer,
    back: Peer,
    handles: [TransportHandle; 2],
    records: [Record; 2],
    ledger: DescriptorLedger,
}

impl Proxy {
    fn new(close: impl Fn(&mut dyn Transport) + Copy + 'static) -> Self {
        let ledger = DescriptorLedger::open();
        let mut reactor = Reactor::new().unwrap();
        let (ours_front, front) = socketpair();
        let (ours_back, back) = socketpair();
        let others = [Rc::new(Cell::new(None)), Rc::new(Cell::new(None))];
        let mut handles = Vec::new();
        let mut records = Vec::new();
        for (ours, other) in [(ours_front, &others[1]), (ours_back, &others[0])] {
            let to: Rc<Cell<Option<TransportHandle>>> = Rc::clone(other);
            let at_end = Rc::clone(other);
            let script = Script::new()
                .data(move |cx, data| {
                    let other = cx.get(to.get().unwrap()).expect("there");
                    let _ = other.write(data);
                })
                .lost(move |cx, _| {
                    if let Some(other) = cx.get(at_end.get().unwrap()) {
                        close(other);
                    }
                });
            records.push(script.record());
            let handle = reactor.adopt_unix_stream(ours.into(), script).unwrap();
            handles.push(reactor.get(handle).unwrap().handle());
        }
        let handles = [handles[0], handles[1]];
        others[0].set(Some(handles[0]));
        others[1].set(Some(handles[1]));
        for (consumer, producer) in [(0, 1), (1, 0)] {
            let consumer = reactor.get(handles[consumer]).unwrap();
            consumer
                .register_producer(handles[producer].into(), ProducerKind::Push)
                .unwrap();
        }
        run_until_quiet(&mut reactor);
        Self {
            reactor,
            front: Peer::Unix(front),
            back: Peer::Unix(back),
            handles,
            records: [records[0].clone(), records[1].clone()],
            ledger,
        }
    }

    fn finish(self) {
        drop((self.reactor, self.front, self.back));
        self.ledger.assert_balanced();
    }
}

/// P-22.
#[test]
fn a_slow_consumer_pauses_the_transport_that_produces_for_it() {
    let mut proxy = Proxy::new(|other| other.lose_connection());
    let [front, back] = proxy.handles;
    let mut sent = 0;
    while !proxy.reactor.get(front).unwrap().is_reading_paused() {
        sent += proxy.front.fill();
        run_until_quiet(&mut proxy.reactor);
        assert!(sent < 16 << 20, "reads for ever");
    }
    let unsent = proxy.reactor.get(back).unwrap().unsent_bytes();
    // The pause comes after the reads of one turn, four of 64 KiB by default.
    assert!((65_537..=5 * 65_536).contains(&unsent), "{unsent}");
    // The other direction goes on.
    proxy.back.send(b"up");
    run_until(&mut proxy.reactor, |_| proxy.records[1].data() == b"up");
    let mut received = 0;
    let mut buffer = [0; 65_536];
    run_until(&mut proxy.reactor, |_| {
        while let Ok(count) = proxy.back.read(&mut buffer) {
            received += count;
        }
        received == sent
    });
    assert!(!proxy.reactor.get(front).unwrap().is_reading_paused());
    assert!(
        proxy.records[0]
            .summary()
            .contains(&"reading resumed".into())
    );
    proxy.finish();
}

/// A close does not wait for a producer that is gone.
#[test]
fn a_transport_closes_when_the_one_that_produced_for_it_is_lost() {
    let mut proxy = Proxy::new(|other| other.lose_connection());
    proxy.front.send(b"last words");
    drop(std::mem::replace(
        &mut proxy.front,
        Peer::Unix(socketpair().0),
    ));
    run_until(&mut proxy.reactor, |_| proxy.records[1].is_lost());
    assert_eq!(proxy.records[1].summary(), ["made", "lost closed cleanly"]);
    let mut buffer = [0; 100];
    assert_eq!(proxy.back.read(&mut buffer).unwrap(), 10);
    assert_eq!(proxy.back.read(&mut buffer).unwrap(), 0);
    assert_eq!(proxy.reactor.registered(), 0);
    proxy.finish();
}

/// P-16 for a transport: it is asked to close.
/// Contract F-34.
#[test]
fn a_transport_is_closed_when_its_consumer_is_lost() {
    let mut proxy = Proxy::new(|_| {});
    // Only the front is a producer: of the back.
    let front = proxy.handles[0];
    proxy.reactor.get(front).unwrap().unregister_producer();
    drop(std::mem::replace(
        &mut proxy.back,
        Peer::Unix(socketpair().0),
    ));
    run_until(&mut proxy.reactor, |_| proxy.records[0].is_lost());
    assert_eq!(proxy.records[0].summary(), ["made", "lost closed cleanly"]);
    proxy.finish();
}

/// L1: nothing that a producer does is called from inside what it does it in.
/// Contract P-12, F-01.
#[test]
fn producer_callbacks_never_nest() {
    let depth = Rc::new(RefCell::new(()));
    let inside = depth.clone();
    let hooks = Hooks {
        pause: Box::new({
            let inside = inside.clone();
            move |cx| {
                let _alone = inside.borrow_mut();
                let _ = cx.transport.write(&[0; 100_000]);
            }
        }),
        resume: Box::new({
            let mut left = 3;
            move |cx| {
                let _alone = inside.borrow_mut();
                if left > 0 {
                    left -= 1;
                    let _ = cx.transport.write(&[0; 400_000]);
                }
            }
        }),
    };
    let mut it = Produced::new(Kind::AdoptedSocketpair, Who::Boxed, hooks);
    it.register(ProducerKind::Push);
    {
        let _alone = depth.borrow_mut();
        let _ = it.link.transport().write(&[0; 400_000]);
    }
    it.link.peer_receives(4 * 400_000 + 100_000);
    it.link.finish();
}
