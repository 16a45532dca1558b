//! How fast peers are read (H-18, W-70).

use std::io::Write;
use std::num::NonZeroU64;
use std::time::Duration;

use bowline::policies::{ProtocolWrapper, Rate, Throttle, ThrottleReading};
use bowline::testing::{ManualClock, Pump, SimulatedKernel};
use bowline::{Address, Reactor, Transports};

use crate::over::{Kind, Stage, another, over_both};
use crate::support::{DescriptorLedger, Record, Recorder, run_until, run_until_quiet, socketpair};
use crate::{build, client, seconds};

fn rate(bytes_per_second: u64) -> Rate {
    Rate::per_second(NonZeroU64::new(bytes_per_second).unwrap())
}

fn throttled(kind: Kind, rate: Rate) -> (Stage, Record) {
    let record = Record::default();
    let policy = Throttle::new(rate).throttled();
    let protocol = ProtocolWrapper::new(Recorder::new(&record), policy);
    (Stage::new(kind, protocol), record)
}

/// R-47, H-18.
#[test]
fn what_was_saved_up_is_read_at_once_and_the_rest_in_time() {
    let _ledger = DescriptorLedger::open();
    over_both(|kind| {
        let (mut stage, record) = throttled(kind, rate(1000).burst(2000));
        for expected in [1000, 2000, 3000] {
            stage.peer.send(&[0; 1000]).unwrap();
            stage.pump.run();
            assert_eq!(record.data().len(), expected);
        }
        // A thousand too many: a second to wait.
        stage.peer.send(b"later").unwrap();
        stage.pump.advance(seconds(0.999));
        assert_eq!(record.data().len(), 3000);
        stage.pump.advance(seconds(0.001));
        assert_eq!(record.data().len(), 3005);
        // Five more are made up for, then all is quiet.
        stage.pump.advance(seconds(0.005));
        assert_eq!(stage.timers(), 0);
        assert_eq!(record.summary(), ["made", "data 3005"]);
    });
}

/// H-18, W-70: over any time, no more than the rate, what was saved up, and a
/// read.
#[test]
fn the_average_holds() {
    let _ledger = DescriptorLedger::open();
    over_both(|kind| {
        let (mut stage, record) = throttled(kind, rate(100_000).burst(10_000));
        let mut sent = 0;
        for step in 1..=500_u64 {
            while let Ok(count) = stage.peer.send(&[0; 30_000]) {
                sent += count;
            }
            stage.pump.advance(Duration::from_millis(20));
            let most = 100_000 * step / 50 + 10_000 + 65_536;
            assert!(record.data().len() as u64 <= most, "step {step}");
        }
        // Nor much less, since there was always something to read.
        assert!(record.data().len() >= 1_000_000 - 65_536 && sent >= 1_000_000);
    });
}

/// The protocol's pause and the hold know nothing of each other.
#[test]
fn a_pause_of_the_protocol_outlasts_the_hold_and_the_reverse() {
    let _ledger = DescriptorLedger::open();
    over_both(|kind| {
        let (mut stage, record) = throttled(kind, rate(1000).burst(0));
        stage.peer.send(&[0; 1000]).unwrap();
        stage.pump.run();
        let transport = stage.connection();
        assert!(!transport.is_reading_paused());
        transport.pause_producing();
        stage.peer.send(b"x").unwrap();
        stage.pump.advance(seconds(5.0));
        assert_eq!(record.summary(), ["made", "data 1000"]);
        stage.connection().resume_producing();
        stage.pump.run();
        let mut resumed = vec!["made", "data 1000", "reading resumed", "data 1"];
        if kind == Kind::Packets {
            // Its end is not told.
            resumed = vec!["made", "data 1001"];
        }
        assert_eq!(record.summary(), resumed);

        // The reverse: resumed while held.
        stage.pump.advance(seconds(0.001));
        stage.peer.send(&[0; 1000]).unwrap();
        stage.pump.run();
        stage.peer.send(b"y").unwrap();
        let transport = stage.connection();
        transport.pause_producing();
        stage.pump.run();
        stage.connection().resume_producing();
        stage.pump.advance(seconds(0.999));
        assert_eq!(record.data().len(), 2001);
        stage.pump.advance(seconds(0.001));
        assert_eq!(record.data().len(), 2002);
    });
}

/// Two holds are two: what releases one leaves the other.
#[test]
fn holds_are_counted() {
    let _ledger = DescriptorLedger::open();
    over_both(|kind| {
        let (mut stage, record) = throttled(kind, rate(1_000_000));
        let transport = stage.connection();
        transport.hold_reading();
        transport.hold_reading();
        transport.release_reading();
        stage.peer.send(b"x").unwrap();
        stage.pump.run();
        assert_eq!(record.summary(), ["made"]);
        let transport = stage.connection();
        transport.release_reading();
        transport.release_reading();
        stage.pump.run();
        assert_eq!(record.summary(), ["made", "data 1"]);
    });
}

/// H-18, W-70: one bucket for all, and each its own.
#[test]
fn the_total_is_shared_and_timers_end_with_the_last() {
    let _ledger = DescriptorLedger::open();
    over_both(|kind| {
        let record = Record::default();
        let made = record.clone();
        let mut factory = ThrottleReading::new(move |_: &Address| Recorder::new(&made))
            .total(Some(rate(1000).burst(0)))
            .per_connection(Some(rate(10_000)));
        let mut pump = Pump::with_kernel(SimulatedKernel::new()).unwrap();
        let mut next = |pump: &mut Pump| build(pump, &mut factory, &client("192.0.2.7:1")).unwrap();
        let protocol = next(&mut pump);
        let mut stage = Stage::within(pump, kind, protocol);
        let protocol = next(&mut stage.pump);
        let (second, other) = another(&mut stage, kind, protocol);
        stage.peer.send(&[0; 2000]).unwrap();
        stage.pump.run();
        assert_eq!(record.data().len(), 2000);
        // One that comes now waits from the beginning.
        let protocol = next(&mut stage.pump);
        let (third, late) = another(&mut stage, kind, protocol);
        stage.peer.send(b"a").unwrap();
        late.send(b"b").unwrap();
        stage.pump.advance(seconds(1.999));
        assert_eq!(record.data().len(), 2000);
        stage.pump.advance(seconds(0.001));
        assert_eq!(record.data().len(), 2002);

        // One that is lost while it is held takes nothing from the others.
        other.send(&[0; 5000]).unwrap();
        stage.pump.run();
        stage.peer.send(b"c").unwrap();
        late.send(b"d").unwrap();
        stage.connection().abort_connection();
        stage.pump.run();
        assert_eq!(stage.timers(), 1);
        stage.pump.advance(seconds(20.0));
        assert_eq!(record.data().len(), 7003);
        assert_eq!(stage.timers(), 0);

        other.send(&[0; 5000]).unwrap();
        stage.pump.run();
        assert_eq!(stage.timers(), 1);
        for handle in [second, third] {
            let reactor = stage.pump.reactor();
            reactor.get(handle).unwrap().abort_connection();
        }
        stage.pump.run();
        assert_eq!(stage.pump.reactor().registered(), 0);
        assert_eq!(stage.timers(), 0);
    });
}

/// On a socketpair: what is held stays in the kernel, the end included.
#[test]
fn a_real_connection_is_held_until_its_time_has_come() {
    let ledger = DescriptorLedger::open();
    let clock = ManualClock::new();
    let mut reactor = Reactor::with_clock(clock.clone()).unwrap();
    let record = Record::default();
    let policy = Throttle::new(rate(1000).burst(0)).throttled();
    let protocol = ProtocolWrapper::new(Recorder::new(&record), policy);
    let (ours, mut theirs) = socketpair();
    reactor.adopt_unix_stream(ours.into(), protocol).unwrap();
    theirs.write_all(&[0; 1000]).unwrap();
    run_until(&mut reactor, |_| record.data().len() == 1000);
    theirs.write_all(b"the last").unwrap();
    drop(theirs);
    clock.advance(Duration::from_millis(999));
    run_until_quiet(&mut reactor);
    assert_eq!(record.summary(), ["made", "data 1000"]);
    clock.advance(Duration::from_millis(1));
    run_until(&mut reactor, |_| record.data().len() == 1008);
    clock.advance(Duration::from_millis(8));
    run_until(&mut reactor, |_| record.is_lost());
    let all = ["made", "data 1008", "lost closed cleanly"];
    assert_eq!(record.summary(), all);
    assert_eq!(reactor.delayed_calls().count(), 0);
    drop(reactor);
    ledger.assert_balanced();
}
