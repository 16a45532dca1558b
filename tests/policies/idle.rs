//! Time limits (H-16, H-17, W-69, R-47).

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use bowline::framing::{FrameContext, FrameReceiver, Framed, LineFramer};
use bowline::policies::{Idle, IdleTimeout, ProtocolWrapper, Timeout};
use bowline::testing::{MemoryPacketPort, MemoryStream, Pump, SimulatedKernel};
use bowline::{
    Address, AnyConnection, CloseReason, Context, Packet, PacketProtocol, PacketTransport,
    Producer, ProducerKind, ProducerRef, Protocol, Reactor, Transport, Transports,
};

use crate::over::{Kind, Stage, over_both};
use crate::support::{DescriptorLedger, Record, Recorder};
use crate::{build, capture, client, seconds};

fn idle(kind: Kind, period: f64) -> (Stage, Record) {
    let record = Record::default();
    let protocol = ProtocolWrapper::new(Recorder::new(&record), Idle::new(seconds(period)));
    (Stage::new(kind, protocol), record)
}

/// R-47, H-17.
#[test]
fn an_idle_connection_is_closed_after_half_an_hour() {
    let _ledger = DescriptorLedger::open();
    capture::start();
    over_both(|kind| {
        let record = Record::default();
        let made = record.clone();
        let mut factory = IdleTimeout::new(move |_: &Address| Recorder::new(&made));
        let mut pump = Pump::with_kernel(SimulatedKernel::new()).unwrap();
        let protocol = build(&mut pump, &mut factory, &client("192.0.2.7:1")).unwrap();
        let mut stage = Stage::within(pump, kind, protocol);
        let before = capture::lines("no traffic").len();
        stage.pump.advance(seconds(1799.999));
        assert_eq!(record.summary(), ["made"]);
        stage.pump.advance(seconds(0.001));
        assert_eq!(record.summary(), ["made", "lost closed cleanly"]);
        assert!(stage.peer.is_at_end());
        assert_eq!(stage.timers(), 0);
        assert_eq!(capture::lines("no traffic").len(), before + 1);
    });
}

/// H-17.
#[test]
fn what_the_peer_sends_puts_the_close_off() {
    let _ledger = DescriptorLedger::open();
    over_both(|kind| {
        let (mut stage, record) = idle(kind, 10.0);
        for _ in 0..5 {
            stage.pump.advance(seconds(9.0));
            stage.peer.send(b"x").unwrap();
            stage.pump.run();
        }
        stage.pump.advance(seconds(9.999));
        assert!(!record.is_lost());
        stage.pump.advance(seconds(0.001));
        assert!(record.is_lost());
    });
}

/// What came meanwhile is read before anything is closed.
#[test]
fn what_came_while_the_loop_was_stopped_puts_the_close_off() {
    let _ledger = DescriptorLedger::open();
    over_both(|kind| {
        let (mut stage, record) = idle(kind, 10.0);
        stage.pump.advance(seconds(4.0));
        stage.peer.send(b"x").unwrap();
        stage.pump.clock().advance(seconds(3600.0));
        stage.pump.run();
        // It counts from when it was read.
        stage.pump.advance(seconds(9.999));
        assert!(!record.is_lost());
        stage.pump.advance(seconds(0.001));
        assert!(record.is_lost());
    });
}

/// H-17.
#[test]
fn what_others_write_puts_the_close_off() {
    let _ledger = DescriptorLedger::open();
    over_both(|kind| {
        let (mut stage, record) = idle(kind, 10.0);
        for _ in 0..5 {
            stage.pump.advance(seconds(9.0));
            stage.write(b"news");
            stage.pump.run();
            assert_eq!(stage.peer.take(), b"news");
        }
        stage.pump.advance(seconds(9.999));
        assert!(!record.is_lost());
        stage.pump.advance(seconds(2.501));
        assert!(record.is_lost());
        assert_eq!(stage.timers(), 0);
    });
}

/// A transfer is no idleness, however slow.
#[test]
fn what_the_peer_takes_puts_the_close_off() {
    let _ledger = DescriptorLedger::open();
    over_both(|kind| {
        let (mut stage, record) = idle(kind, 10.0);
        stage.write(&[0; 3_000_000]);
        let mut taken = 0;
        while taken < 3_000_000 {
            assert!(!record.is_lost());
            stage.pump.advance(seconds(7.0));
            taken += stage.peer.take().len();
            stage.pump.run();
        }
        stage.pump.advance(seconds(12.5));
        assert!(record.is_lost());
    });
}

#[test]
fn a_peer_that_takes_nothing_is_not_waited_for() {
    let _ledger = DescriptorLedger::open();
    over_both(|kind| {
        let (mut stage, record) = idle(kind, 10.0);
        stage.write(&[0; 3_000_000]);
        stage.pump.advance(seconds(12.5));
        assert!(!record.is_lost(), "it may still take it");
        stage.pump.advance(seconds(10.0));
        assert!(record.is_lost());
        assert!(record.summary()[1].contains("deadline"));
        assert_eq!(stage.timers(), 0);
    });
}

/// W-69: upstream fails with "already called".
#[test]
fn traffic_after_the_time_is_over_does_nothing() {
    let _ledger = DescriptorLedger::open();
    over_both(|kind| {
        let (mut stage, record) = idle(kind, 10.0);
        // What is unsent keeps it open for a moment.
        stage.write(&[0; 1_000_000]);
        stage.pump.advance(seconds(12.5));
        stage.peer.send(b"late").unwrap();
        stage.pump.run();
        assert!(!record.is_lost());
        while !record.is_lost() {
            assert!(!stage.peer.take().is_empty());
            stage.pump.run();
        }
        assert_eq!(record.summary(), ["made", "lost closed cleanly"]);
        assert_eq!(stage.timers(), 0);
        assert_eq!(stage.pump.reactor().statistics().panics, 0);
    });
}

#[test]
fn a_lost_connection_leaves_no_timer() {
    let _ledger = DescriptorLedger::open();
    over_both(|kind| {
        let (mut stage, _) = idle(kind, 10.0);
        assert_eq!(stage.timers(), 1);
        stage.peer.close();
        stage.pump.run();
        assert!(stage.is_lost());
        assert_eq!(stage.timers(), 0);
    });
}

/// A protocol with a limit of its own.
struct Limited {
    limit: Timeout,
    answers: Rc<RefCell<Vec<Option<Duration>>>>,
}

impl Limited {
    /// A digit sets so many seconds; other bytes reset, cancel and ask.
    fn hear<T: AnyConnection>(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
        for &byte in data {
            let answer = match byte {
                b'0'..=b'9' => {
                    let period = Duration::from_secs(u64::from(byte - b'0'));
                    self.limit.set(cx, Some(period))
                }
                b'r' => {
                    self.limit.reset(cx.reactor);
                    continue;
                }
                b'c' => self.limit.cancel(cx.reactor),
                b'n' => self.limit.set(cx, None),
                _ => self.limit.period(),
            };
            self.answers.borrow_mut().push(answer);
        }
    }
}

impl<T: Transport> Protocol<T> for Limited {
    fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
        self.hear(cx, data);
    }

    fn connection_lost(&mut self, cx: &mut Context<'_, T>, _: &CloseReason) {
        self.limit.cancel(cx.reactor);
    }
}

impl<T: PacketTransport> PacketProtocol<T> for Limited {
    fn packet_received(&mut self, cx: &mut Context<'_, T>, packet: &mut Packet<'_>) {
        self.hear(cx, packet.data);
    }

    fn connection_lost(&mut self, cx: &mut Context<'_, T>, _: &CloseReason) {
        self.limit.cancel(cx.reactor);
    }
}

/// A connection whose protocol is [`Limited`].
struct Asked {
    stage: Stage,
    answers: Rc<RefCell<Vec<Option<Duration>>>>,
}

impl Asked {
    fn new(kind: Kind, limit: Timeout) -> Self {
        let answers = Rc::default();
        let protocol = Limited {
            limit,
            answers: Rc::clone(&answers),
        };
        Self {
            stage: Stage::new(kind, protocol),
            answers,
        }
    }

    fn tell(&mut self, what: &str) -> Vec<Option<u64>> {
        self.peer.send(what.as_bytes()).unwrap();
        self.pump.run();
        let answers = self.answers.take();
        let answers = answers.into_iter();
        answers
            .map(|answer| answer.map(|period| period.as_secs()))
            .collect()
    }
}

impl std::ops::Deref for Asked {
    type Target = Stage;

    fn deref(&self) -> &Stage {
        &self.stage
    }
}

impl std::ops::DerefMut for Asked {
    fn deref_mut(&mut self) -> &mut Stage {
        &mut self.stage
    }
}

/// H-16.
#[test]
fn a_limit_is_set_changed_reset_and_cancelled() {
    let _ledger = DescriptorLedger::open();
    over_both(|kind| {
        let mut stage = Asked::new(kind, Timeout::new());
        assert_eq!(stage.tell("?5?"), [None, None, Some(5)]);
        stage.pump.advance(seconds(4.0));
        assert_eq!(stage.tell("r"), []);
        stage.pump.advance(seconds(4.0));
        // Longer, then shorter: each counts from when it was set.
        assert_eq!(stage.tell("9"), [Some(5)]);
        stage.pump.advance(seconds(8.0));
        assert_eq!(stage.tell("2"), [Some(9)]);
        stage.pump.advance(seconds(1.9));
        assert!(!stage.is_lost());
        assert_eq!(stage.tell("c?c"), [Some(2), None, None]);
        assert_eq!(stage.timers(), 0);
        stage.pump.advance(seconds(100.0));
        assert_eq!(stage.tell("3n?"), [None, Some(3), None]);
        stage.pump.advance(seconds(100.0));
        assert!(!stage.is_lost());
        assert_eq!(stage.tell("3"), [None]);
        stage.pump.advance(seconds(2.999));
        assert!(!stage.is_lost());
        stage.pump.advance(seconds(0.001));
        assert!(stage.is_lost());
        assert_eq!(stage.timers(), 0);
    });
}

/// A loop that was stopped reads first.
#[test]
fn what_came_while_the_loop_was_stopped_is_read_before_the_limit_ends_it() {
    let _ledger = DescriptorLedger::open();
    over_both(|kind| {
        let mut stage = Asked::new(kind, Timeout::new());
        stage.tell("5");
        stage.peer.send(b"r").unwrap();
        stage.pump.clock().advance(seconds(3600.0));
        stage.pump.run();
        stage.pump.advance(seconds(4.999));
        assert!(!stage.is_lost());
        stage.pump.advance(seconds(0.001));
        assert!(stage.is_lost());

        // Who has said nothing has had its time.
        let mut stage = Asked::new(kind, Timeout::new());
        stage.tell("5");
        stage.pump.clock().advance(seconds(3600.0));
        stage.pump.run();
        assert!(stage.is_lost());
    });
}

/// H-16: a reset costs nothing, so it moves no timer.
#[test]
fn a_reset_leaves_the_timer_where_it_is() {
    let _ledger = DescriptorLedger::open();
    over_both(|kind| {
        let mut stage = Asked::new(kind, Timeout::new());
        stage.tell("5");
        let before: Vec<_> = stage.pump.reactor().delayed_calls().collect();
        stage.pump.advance(seconds(3.0));
        stage.tell("rrrr");
        let after: Vec<_> = stage.pump.reactor().delayed_calls().collect();
        assert_eq!(before, after);
        stage.pump.advance(seconds(4.999));
        assert!(!stage.is_lost());
        stage.pump.advance(seconds(0.001));
        assert!(stage.is_lost());
    });
}

/// H-16.
#[test]
fn an_action_replaces_the_close_and_reset_after_it_does_nothing() {
    let _ledger = DescriptorLedger::open();
    over_both(|kind| {
        let ended = Rc::new(RefCell::new(Vec::new()));
        let noted = Rc::clone(&ended);
        let limit = Timeout::with_action(move |reactor: &mut Reactor, transport| {
            noted.borrow_mut().push(transport);
            match kind {
                Kind::Stream => reactor.call_protocol(transport, |_: &mut Limited, cx| {
                    let stream: &mut MemoryStream = cx.transport;
                    stream.write(b"too slow");
                }),
                Kind::Packets => reactor.call_protocol(transport, |_: &mut Limited, cx| {
                    let packets: &mut MemoryPacketPort = cx.transport;
                    packets.send(b"too slow");
                }),
            }
        });
        let mut stage = Asked::new(kind, limit);
        stage.tell("5");
        stage.pump.advance(seconds(5.0));
        assert_eq!(ended.borrow().len(), 1);
        assert_eq!(stage.peer.take(), b"too slow");
        assert_eq!(stage.tell("r?"), [None]);
        stage.pump.advance(seconds(100.0));
        assert_eq!(ended.borrow().len(), 1);
        assert_eq!(stage.tell("1"), [None]);
        stage.pump.advance(seconds(1.0));
        assert_eq!(ended.borrow().len(), 2);
        assert!(!stage.is_lost());
    });
}

/// Always has more.
struct Endless;

impl Producer for Endless {
    fn resume_producing(&mut self, cx: &mut Context<'_, dyn Transport>) {
        cx.transport.write(&[0; 100_000]);
    }
}

/// What else keeps a connection from ending, beside unsent bytes.
#[derive(Clone, Copy, Debug)]
enum Ready {
    Nothing,
    Produces(ProducerKind),
    Paused,
    Held,
    HalfClosed,
    Closing,
}

const READY: [Ready; 7] = [
    Ready::Nothing,
    Ready::Produces(ProducerKind::Push),
    Ready::Produces(ProducerKind::Pull),
    Ready::Paused,
    Ready::Held,
    Ready::HalfClosed,
    Ready::Closing,
];

impl Ready {
    fn make(self, stage: &mut Stage) {
        match self {
            Self::Nothing => {}
            Self::Produces(kind) => {
                let producer = ProducerRef::boxed(Endless);
                let stream = stage.pump.first().unwrap();
                stream.register_producer(producer, kind).unwrap();
            }
            Self::Paused => stage.connection().pause_producing(),
            Self::Held => stage.connection().hold_reading(),
            Self::HalfClosed => stage.connection().lose_write_connection(),
            Self::Closing => stage.connection().lose_connection(),
        }
    }
}

/// W-30: it used to wait for what never leaves, and for whoever produces.
#[test]
fn a_limit_ends_a_connection_whose_peer_does_not_read() {
    let _ledger = DescriptorLedger::open();
    over_both(|kind| {
        for ready in READY {
            if kind == Kind::Packets && matches!(ready, Ready::Produces(_)) {
                continue;
            }
            // The limit; how long the close may take; when the connection is over.
            for (limit, within, over) in [
                ("5", None, 10.0),
                ("1", None, 2.0),
                ("5", Some(seconds(0.5)), 5.5),
                ("5", Some(Duration::ZERO), 5.0),
            ] {
                let mut timeout = Timeout::new();
                if let Some(within) = within {
                    timeout = timeout.close_within(within);
                }
                let mut stage = Asked::new(kind, timeout);
                stage.tell(limit);
                stage.write(&vec![0; 1_000_000]);
                stage.pump.run();
                ready.make(&mut stage);
                stage.pump.advance(seconds(over - 0.001));
                assert!(!stage.is_lost(), "{ready:?}, {limit}, {within:?}");
                stage.pump.advance(seconds(0.001));
                assert!(stage.is_lost(), "{ready:?}, {limit}, {within:?}");
                assert_eq!(stage.timers(), 0);
            }
        }
    });
}

/// A peer that reads has what was written, with nothing cut off.
#[test]
fn what_was_written_leaves_before_a_limit_closes() {
    let _ledger = DescriptorLedger::open();
    over_both(|kind| {
        let mut stage = Asked::new(kind, Timeout::new());
        stage.tell("5");
        stage.write(&vec![7; 1_000_000]);
        stage.pump.advance(seconds(9.9));
        assert!(!stage.is_lost());
        let mut taken = 0;
        while taken < 1_000_000 {
            let more = stage.peer.take().len();
            assert_ne!(more, 0, "{taken} were taken");
            taken += more;
            stage.pump.run();
        }
        assert!(stage.is_lost() && stage.peer.is_at_end());
    });
}

/// Each line has a second for the next.
struct Patient(Timeout);

impl<T: Transport> FrameReceiver<T, LineFramer> for Patient {
    fn frame_received(&mut self, cx: &mut FrameContext<'_, T, LineFramer>, _: &[u8]) {
        self.0.set(cx, Some(seconds(1.0)));
    }
}

/// With the context of its own callbacks.
#[test]
fn a_receiver_of_frames_sets_a_limit() {
    let _ledger = DescriptorLedger::open();
    let framed = Framed::new(LineFramer::new(), Patient(Timeout::new()));
    let (mut pump, peer) = Pump::with_peer(framed).unwrap();
    for _ in 0..3 {
        pump.advance(seconds(0.9));
        peer.send(b"line\r\n").unwrap();
        pump.run();
    }
    pump.advance(seconds(0.9));
    assert!(!pump.is_lost());
    pump.advance(seconds(0.1));
    assert!(pump.is_lost());
}

/// It was gone after that, and the next limit closed the connection.
#[test]
fn an_action_that_panicked_is_called_the_next_time() {
    let _ledger = DescriptorLedger::open();
    over_both(|kind| {
        let calls = Rc::new(Cell::new(0));
        let counted = Rc::clone(&calls);
        let limit = Timeout::with_action(move |_, _| {
            counted.set(counted.get() + 1);
            assert_ne!(counted.get(), 1, "on purpose");
        });
        let mut stage = Asked::new(kind, limit);
        for called in 1..=3 {
            stage.tell("1");
            stage.pump.advance(seconds(1.0));
            assert_eq!(calls.get(), called);
            assert!(!stage.is_lost());
        }
        assert_eq!(stage.pump.reactor().statistics().panics, 1);
    });
}
