//! Connections that were taken apart and put together again, as after a restart that did
//! not take them: what limited them goes on to, under their new name.

use std::cell::RefCell;
use std::os::fd::AsFd;
use std::rc::Rc;

use bowline::framing::{FrameContext, FrameReceiver, Framed, LengthPrefixedFramer, Pairing};
use bowline::policies::{
    Handshake, Idle, LimitHandshakes, ProtocolWrapper, Rate, Throttle, Timeout, Traffic,
};
use bowline::testing::{MemoryPacketPort, MemoryStream, Pump, SimulatedKernel};
use bowline::{
    Address, AnyConnection as _, CloseReason, Context, Packet, PacketProtocol, PacketTransport,
    Protocol, Transport, Transports,
};

use crate::over::{Kind, Stage, over_both};
use crate::support::{DescriptorLedger, Record, Recorder};
use crate::{build, capture, client, seconds};

/// Takes the one connection apart, lets `between` pass, and puts it together again.
#[track_caller]
fn take_apart<P: Protocol<MemoryStream>>(pump: &mut Pump, between: impl FnOnce(&mut Pump)) {
    let detached = Rc::new(RefCell::new(None));
    let taken = Rc::clone(&detached);
    let handle = pump.first().expect("it is open").handle();
    pump.reactor().detach::<P>(handle, move |_, result| {
        *taken.borrow_mut() = result.ok();
    });
    pump.run();
    between(pump);
    let detached = detached.take().expect("it was open");
    let again = pump.reactor().reattach::<MemoryStream, P>(detached);
    again.expect("it is whole");
    pump.run();
}

fn with<Y>(kind: Kind, policy: Y) -> (Stage, Record)
where
    Y: bowline::policies::Policy<MemoryStream> + bowline::policies::Policy<MemoryPacketPort>,
{
    let record = Record::default();
    let protocol = ProtocolWrapper::new(Recorder::new(&record), policy);
    (Stage::new(kind, protocol), record)
}

type Wrapped<Y> = ProtocolWrapper<Recorder, Y>;

/// H-17, E-15.
#[test]
fn idle_connection_is_closed_all_the_same() {
    over_both(|kind| {
        // The timer looks while it is apart, or does not.
        for apart in [0.0, 3.0, 11.0] {
            let _ledger = DescriptorLedger::open();
            let (mut stage, record) = with(kind, Idle::new(seconds(10.0)));
            stage.pump.advance(seconds(5.0));
            stage.take_apart::<Wrapped<Idle>>(|pump| pump.advance(seconds(apart)));
            stage.pump.advance(seconds(4.999 - apart.min(4.999)));
            assert_eq!(record.is_lost(), apart > 5.0, "{apart}");
            stage.pump.advance(seconds(0.002));
            assert!(record.is_lost(), "{apart}");
            assert_eq!(stage.timers(), 0);
        }
    });
}

/// H-18, E-15.
#[test]
fn throttled_connection_is_read_again() {
    over_both(|kind| {
        let one = Rate::per_second(std::num::NonZeroU64::new(1000).unwrap()).burst(0);
        for apart in [0.0, 0.5, 5.0] {
            let _ledger = DescriptorLedger::open();
            let throttle = Throttle::new(one);
            let (mut stage, record) = with(kind, throttle.throttled());
            stage.peer.send(&[0; 1000]).unwrap();
            stage.pump.run();
            stage.peer.send(b"waits").unwrap();
            stage.pump.run();
            assert_eq!(record.data().len(), 1000);
            stage.take_apart::<Wrapped<bowline::policies::Throttled>>(|pump| {
                pump.advance(seconds(apart));
            });
            assert_eq!(record.data().len() == 1000, apart < 1.0, "{apart}");
            stage.pump.advance(seconds(1.0));
            assert_eq!(record.data().len(), 1005, "{apart}");
            stage.pump.advance(seconds(1.0));
            assert_eq!((throttle.held(), stage.timers()), (0, 0));
            // And held again when it has to be.
            stage.peer.send(&[0; 2000]).unwrap();
            stage.pump.run();
            stage.peer.send(b"waits").unwrap();
            stage.pump.run();
            assert_eq!(throttle.held(), 1);
            stage.pump.advance(seconds(2.0));
            assert_eq!(record.data().len(), 3010, "{apart}");
        }
    });
}

struct Guarded {
    _handshake: Handshake,
    record: Record,
}

impl<T: Transport> Protocol<T> for Guarded {
    fn data_received(&mut self, _: &mut Context<'_, T>, _: &[u8]) {}

    fn connection_lost(&mut self, _: &mut Context<'_, T>, reason: &CloseReason) {
        self.record
            .push(crate::support::Event::Lost(reason.to_string()));
    }
}

impl<T: PacketTransport> PacketProtocol<T> for Guarded {
    fn packet_received(&mut self, _: &mut Context<'_, T>, _: &mut Packet<'_>) {}

    fn connection_lost(&mut self, _: &mut Context<'_, T>, reason: &CloseReason) {
        self.record
            .push(crate::support::Event::Lost(reason.to_string()));
    }
}

/// E-15.
#[test]
fn handshake_has_its_deadline_all_the_same() {
    over_both(|kind| {
        for apart in [0.0, 20.0] {
            let _ledger = DescriptorLedger::open();
            let record = Record::default();
            let of_guarded = record.clone();
            let mut factory = LimitHandshakes::new(move |_: &Address, handshake| Guarded {
                _handshake: handshake,
                record: of_guarded.clone(),
            })
            .deadline(seconds(10.0));
            let count = factory.count();
            let mut pump = Pump::with_kernel(SimulatedKernel::new()).unwrap();
            let protocol = build(&mut pump, &mut factory, &client("192.0.2.7:1")).unwrap();
            let mut stage = Stage::within(pump, kind, protocol);
            type Protocol = ProtocolWrapper<Guarded, bowline::policies::Handshaking>;
            stage.take_apart::<Protocol>(|pump| pump.advance(seconds(apart)));
            stage.pump.advance(seconds(10.0));
            assert!(record.is_lost() && stage.peer.is_at_end(), "{apart}");
            assert_eq!((count.open(), count.timed_out()), (0, 1));
            assert_eq!(stage.timers(), 0);
        }
    });
}

/// A protocol of one's own, with a limit.
struct Patient {
    limit: Timeout,
    record: Record,
}

/// The same over streams and over packets.
macro_rules! patient_callbacks {
    () => {
        fn connection_made(&mut self, cx: &mut Context<'_, T>) {
            self.limit.set(cx, Some(seconds(10.0)));
        }

        fn connection_reattached(&mut self, cx: &mut Context<'_, T>) {
            self.limit.reattached(cx);
        }

        fn connection_lost(&mut self, cx: &mut Context<'_, T>, reason: &CloseReason) {
            self.limit.cancel(cx.reactor);
            self.record
                .push(crate::support::Event::Lost(reason.to_string()));
        }
    };
}

impl<T: Transport> Protocol<T> for Patient {
    patient_callbacks!();

    fn data_received(&mut self, cx: &mut Context<'_, T>, _: &[u8]) {
        self.limit.reset(cx.reactor);
    }
}

impl<T: PacketTransport> PacketProtocol<T> for Patient {
    patient_callbacks!();

    fn packet_received(&mut self, cx: &mut Context<'_, T>, _: &mut Packet<'_>) {
        self.limit.reset(cx.reactor);
    }
}

/// E-15: in a box, and twice, and with bytes that put it off.
#[test]
fn limit_of_ones_own_follows_its_connection() {
    over_both(|kind| {
        let _ledger = DescriptorLedger::open();
        let record = Record::default();
        let patient = Box::new(Patient {
            limit: Timeout::new(),
            record: record.clone(),
        });
        let mut stage = Stage::new(kind, patient);
        for _ in 0..2 {
            stage.take_apart::<Box<Patient>>(|pump| pump.advance(seconds(4.0)));
        }
        stage.peer.send(b"x").unwrap();
        stage.pump.run();
        stage.pump.advance(seconds(9.999));
        assert!(!record.is_lost());
        stage.pump.advance(seconds(0.001));
        assert!(record.is_lost());
        assert_eq!(stage.timers(), 0);
    });
}

/// Says what it is told.
#[derive(Default)]
struct Frames(Rc<RefCell<Vec<&'static str>>>);

impl FrameReceiver<MemoryStream, LengthPrefixedFramer> for Frames {
    fn frame_received(
        &mut self,
        _: &mut FrameContext<'_, MemoryStream, LengthPrefixedFramer>,
        _: &[u8],
    ) {
        self.0.borrow_mut().push("frame");
    }

    fn connection_reattached(
        &mut self,
        _: &mut FrameContext<'_, MemoryStream, LengthPrefixedFramer>,
    ) {
        self.0.borrow_mut().push("reattached");
    }

    fn connection_lost(
        &mut self,
        _: &mut FrameContext<'_, MemoryStream, LengthPrefixedFramer>,
        _: &CloseReason,
    ) {
        self.0.borrow_mut().push("lost");
    }
}

/// T-11's deadline, E-15: descriptors of a frame that is not finished.
#[test]
fn descriptors_of_an_unfinished_frame_wait_no_longer() {
    for apart in [0.0, 20.0] {
        let _ledger = DescriptorLedger::open();
        let told = Rc::new(RefCell::new(Vec::new()));
        let framed = Framed::new(LengthPrefixedFramer::u16(), Frames(Rc::clone(&told)))
            .pairing(Pairing::Exact)
            .descriptor_deadline(Some(seconds(10.0)));
        let (mut pump, peer) = Pump::with_peer(framed).unwrap();
        pump.run();
        let file = std::fs::File::open("/dev/null").unwrap();
        peer.send_with_descriptors(b"\0\x05he", &[file.as_fd()])
            .unwrap();
        pump.run();
        pump.advance(seconds(5.0));
        take_apart::<Framed<LengthPrefixedFramer, Frames>>(&mut pump, |pump| {
            pump.advance(seconds(apart));
        });
        pump.advance(seconds(5.0));
        assert_eq!(told.borrow().last(), Some(&"lost"), "{apart}");
        assert!(told.borrow().contains(&"reattached") || apart > 0.0);
    }
}

/// H-22, E-15.
#[test]
fn what_is_written_is_logged_on() {
    let _ledger = DescriptorLedger::open();
    capture::start();
    over_both(|kind| {
        let number = 77 + kind as u64;
        let (mut stage, _) = with(kind, Traffic::new(number));
        stage.take_apart::<Wrapped<Traffic>>(|_| {});
        stage.write(b"on");
        stage.pump.run();
        let line = format!("{number}: written 2 bytes \"on\"");
        assert_eq!(capture::lines(&line).len(), 1);
    });
}

/// E-15: what a peer may have closed here is counted over the whole of the connection.
#[test]
fn descriptors_that_nobody_took_still_count() {
    let _ledger = DescriptorLedger::open();
    let record = Record::default();
    let patient = Patient {
        limit: Timeout::new(),
        record: record.clone(),
    };
    let (mut pump, peer) = Pump::with_peer(patient).unwrap();
    pump.run();
    let file = std::fs::File::open("/dev/null").unwrap();
    for round in 0..2 {
        assert!(!record.is_lost(), "{round}");
        peer.send_with_descriptors(b"x", &[file.as_fd(); 40])
            .unwrap();
        pump.run();
        if round == 0 {
            take_apart::<Patient>(&mut pump, |_| {});
        }
    }
    assert!(record.is_lost(), "after eighty");
}

/// E-15: the time for closing goes on, with what was left of it.
#[test]
fn close_takes_no_longer() {
    let _ledger = DescriptorLedger::open();
    let record = Record::default();
    let (mut pump, _peer) = Pump::with_peer(Recorder::new(&record)).unwrap();
    pump.run();
    let transport = pump.first().expect("it is open");
    transport.write(&[0; 10_000_000]);
    transport.lose_connection_within(seconds(10.0));
    pump.run();
    pump.advance(seconds(6.0));
    take_apart::<Recorder>(&mut pump, |_| {});
    pump.advance(seconds(3.999));
    assert!(!record.is_lost());
    pump.advance(seconds(0.002));
    assert!(record.is_lost());
}
