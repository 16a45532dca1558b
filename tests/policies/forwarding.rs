//! Every callback reaches what is inside (H-21, W-72, S-33).

use std::borrow::Cow;
use std::cell::RefCell;
use std::fs::File;
use std::num::NonZeroU64;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;

use bowline::error::CallError;
use bowline::policies::{
    Event, IdleTimeout, LimitConnections, Policy, ProtocolWrapper, Rate, Reconnecting,
    ThrottleReading, TrafficLog,
};
use bowline::testing::{MemoryStream, Pump, SimulatedKernel};
use bowline::{
    Address, AfterReadClosed, AfterTruncation, AnyConnection as _, AtDrain, BuildContext,
    CloseReason, ConnectError, Context, Factory, Origin, Protocol, ReceivedDescriptors, Remains,
    Transport, TransportState, Transports,
};

use crate::support::DescriptorLedger;
use crate::{Door, build, client, name, seconds, timers};

type Log = Rc<RefCell<Vec<String>>>;

/// Tells of every callback, and answers none as the default would.
struct Told(Log);

impl Told {
    fn note(&self, what: impl Into<String>) {
        self.0.borrow_mut().push(what.into());
    }
}

impl<T: Transport> Protocol<T> for Told {
    fn connection_made(&mut self, _: &mut Context<'_, T>) {
        self.note("connection_made");
    }
    fn data_received(&mut self, _: &mut Context<'_, T>, data: &[u8]) {
        self.note(format!("data_received {}", data.len()));
    }
    fn file_descriptor_received(
        &mut self,
        _: &mut Context<'_, T>,
        _: OwnedFd,
    ) -> Result<(), OwnedFd> {
        self.note("file_descriptor_received");
        Ok(())
    }
    fn descriptors_received(
        &mut self,
        _: &mut Context<'_, T>,
        descriptors: &mut ReceivedDescriptors<'_>,
        data: &[u8],
    ) {
        let taken = descriptors.take(2).count();
        self.note(format!("descriptors_received {taken} {}", data.len()));
    }
    fn descriptors_truncated(
        &mut self,
        _: &mut Context<'_, T>,
        received: usize,
    ) -> AfterTruncation {
        self.note(format!("descriptors_truncated {received}"));
        AfterTruncation::KeepConnection
    }
    fn descriptors_sent(&mut self, _: &mut Context<'_, T>, count: usize) {
        self.note(format!("descriptors_sent {count}"));
    }
    fn read_connection_lost(&mut self, _: &mut Context<'_, T>) -> AfterReadClosed {
        self.note("read_connection_lost");
        AfterReadClosed::KeepWriting
    }
    fn write_connection_lost(&mut self, _: &mut Context<'_, T>) {
        self.note("write_connection_lost");
    }
    fn connection_broken(&mut self, _: &mut Context<'_, T>, remains: Remains) {
        self.note(format!("connection_broken {remains:?}"));
    }
    fn connection_lost(&mut self, _: &mut Context<'_, T>, reason: &CloseReason) {
        self.note(format!("connection_lost {reason}"));
    }
    fn draining(&mut self, _: &mut Context<'_, T>) -> AtDrain {
        self.note("draining");
        AtDrain::DoNotWait
    }
    fn is_idle(&self) -> bool {
        self.note("is_idle");
        false
    }
    fn reading_resumed(&mut self, _: &mut Context<'_, T>) {
        self.note("reading_resumed");
    }
    fn has_undelivered(&mut self) -> bool {
        self.note("has_undelivered");
        true
    }
    fn connection_reattached(&mut self, _: &mut Context<'_, T>) {
        self.note("connection_reattached");
    }
    fn connection_secured(&mut self, _: &mut Context<'_, T>) {
        self.note("connection_secured");
    }
    fn pause_producing(&mut self, _: &mut Context<'_, T>) {
        self.note("pause_producing");
    }
    fn resume_producing(&mut self, _: &mut Context<'_, T>) {
        self.note("resume_producing");
    }
    fn stop_producing(&mut self, _: &mut Context<'_, T>) {
        self.note("stop_producing");
    }
    fn log_prefix(&self) -> Cow<'_, str> {
        Cow::Borrowed("Told, by itself")
    }
}

/// Builds [`Told`], or declines, and tells of its own events.
struct Maker {
    log: Log,
    declines: bool,
}

impl Factory for Maker {
    type Protocol = Told;

    fn build_protocol(&mut self, _: &mut BuildContext<'_>, _: &Address) -> Option<Told> {
        self.log.borrow_mut().push("build".into());
        (!self.declines).then(|| Told(Rc::clone(&self.log)))
    }
    fn started(&mut self, _: &mut BuildContext<'_>) {
        self.log.borrow_mut().push("started".into());
    }
    fn stopped(&mut self, _: &mut BuildContext<'_>) {
        self.log.borrow_mut().push("stopped".into());
    }
    fn connection_failed(&mut self, _: &mut BuildContext<'_>, error: &ConnectError) {
        self.log.borrow_mut().push(format!("failed {error}"));
    }
    fn connection_lost(&mut self, _: &mut BuildContext<'_>, reason: &CloseReason) {
        self.log.borrow_mut().push(format!("lost {reason}"));
    }
}

fn in_all_layers(maker: Maker) -> impl Factory<Protocol: Protocol<MemoryStream>> {
    let rate = Rate::per_second(NonZeroU64::new(1_000_000).unwrap());
    let throttled = ThrottleReading::new(Reconnecting::new(maker))
        .total(Some(rate))
        .per_connection(Some(rate));
    let logged = TrafficLog::new(throttled);
    IdleTimeout::new(LimitConnections::new(logged).total(Some(1)))
}

fn pump() -> Pump {
    Pump::with_kernel(SimulatedKernel::new()).unwrap()
}

/// Every callback but the first and last, which the connection makes.
const ALL: [&str; 18] = [
    "data_received 3",
    "file_descriptor_received",
    "descriptors_received 1 2",
    "descriptors_truncated 7",
    "descriptors_sent 5",
    "read_connection_lost",
    "write_connection_lost",
    "connection_broken Pieces",
    "draining",
    "is_idle",
    "reading_resumed",
    "has_undelivered",
    "connection_reattached",
    "connection_secured",
    "pause_producing",
    "resume_producing",
    "stop_producing",
    "log_prefix",
];

fn call_everything<P: Protocol<MemoryStream>>(
    protocol: &mut P,
    cx: &mut Context<'_, MemoryStream>,
    log: &Log,
) {
    let null = || OwnedFd::from(File::open("/dev/null").unwrap());
    protocol.data_received(cx, b"abc");
    assert!(protocol.file_descriptor_received(cx, null()).is_ok());
    let mut arrived = vec![null()];
    let mut offered = ReceivedDescriptors::new(&mut arrived);
    protocol.descriptors_received(cx, &mut offered, b"de");
    assert_eq!(offered.len(), 0, "taken inside");
    drop(offered);
    let after = protocol.descriptors_truncated(cx, 7);
    assert_eq!(after, AfterTruncation::KeepConnection);
    protocol.descriptors_sent(cx, 5);
    let after = protocol.read_connection_lost(cx);
    assert_eq!(after, AfterReadClosed::KeepWriting);
    protocol.write_connection_lost(cx);
    protocol.connection_broken(cx, Remains::Pieces);
    assert_eq!(protocol.draining(cx), AtDrain::DoNotWait);
    assert!(!protocol.is_idle());
    protocol.reading_resumed(cx);
    assert!(protocol.has_undelivered());
    protocol.connection_reattached(cx);
    protocol.connection_secured(cx);
    protocol.pause_producing(cx);
    protocol.resume_producing(cx);
    protocol.stop_producing(cx);
    assert_eq!(protocol.log_prefix(), "Told, by itself");
    log.borrow_mut().push("log_prefix".into());
}

fn assert_forwards<P: Protocol<MemoryStream>>(pump: &mut Pump, protocol: P, log: &Log) {
    log.borrow_mut().clear();
    let (transport, _peer) = pump.connect(protocol).unwrap();
    pump.run();
    assert_eq!(log.take(), ["connection_made"]);
    let handle = name(pump, transport);
    let noted = Rc::clone(log);
    pump.reactor()
        .call_protocol::<MemoryStream, P>(handle, move |protocol, cx| {
            call_everything(protocol, cx, &noted);
        });
    pump.run();
    assert_eq!(log.take(), ALL);
    pump.get(transport).unwrap().abort_connection();
    pump.run();
    assert_eq!(log.take(), ["connection_lost aborted by us"]);
    assert_eq!(timers(pump), 0);
    assert_eq!(Rc::strong_count(log), 1, "the protocol was kept");
}

/// E-04, H-21, W-72.
#[test]
fn all_layers_together_hand_on_every_callback() {
    let ledger = DescriptorLedger::open();
    let log = Log::default();
    let mut pump = pump();
    let maker = Maker {
        log: Rc::clone(&log),
        declines: false,
    };
    let protocol = build(
        &mut pump,
        &mut in_all_layers(maker),
        &client("192.0.2.7:1000"),
    );
    assert_forwards(&mut pump, protocol.unwrap(), &log);
    drop(pump);
    ledger.assert_balanced();
}

/// W-72: whoever knows the protocol's type, and not what is around it, reaches it, is
/// told that no other type is there, and takes it out.
#[test]
fn the_protocol_inside_of_all_layers_is_known_by_its_own_type() {
    let ledger = DescriptorLedger::open();
    let log = Log::default();
    let mut pump = pump();
    let maker = Maker {
        log: Rc::clone(&log),
        declines: false,
    };
    let address = client("192.0.2.7:1000");
    let protocol = build(&mut pump, &mut in_all_layers(maker), &address).unwrap();
    let boxed: Box<dyn Protocol<MemoryStream>> = Box::new(protocol);
    let (transport, _peer) = pump.connect(boxed).unwrap();
    pump.run();
    let handle = name(&mut pump, transport);
    log.borrow_mut().clear();
    let reactor = pump.reactor();
    reactor.call_protocol::<MemoryStream, Told>(handle, |told, cx| {
        Protocol::<MemoryStream>::data_received(told, cx, b"four");
    });
    let wrong = Rc::clone(&log);
    reactor.call_protocol_or::<MemoryStream, Maker>(
        handle,
        |_, _| panic!("nobody is of this type"),
        move |_, error| wrong.borrow_mut().push(error.to_string()),
    );
    pump.run();
    let expected = [
        "data_received 4".to_owned(),
        CallError::WrongProtocol.to_string(),
    ];
    assert_eq!(log.take(), expected);
    pump.reactor().detach::<Told>(handle, |_, detached| {
        detached.expect("it is open").protocol.note("taken out");
    });
    pump.run();
    assert_eq!(log.take(), ["taken out"]);
    // What the layers had in hand comes to nothing.
    pump.advance(seconds(86_400.0));
    assert_eq!(timers(&mut pump), 0);
    drop(pump);
    ledger.assert_balanced();
}

/// What a policy sees comes before and after what the protocol does.
#[test]
fn a_policy_sees_each_event_on_both_sides() {
    let _ledger = DescriptorLedger::open();
    struct Sees(Log);
    impl<T: Transport> Policy<T> for Sees {
        fn before(&mut self, _: &mut Context<'_, T>, event: &Event<'_>) {
            self.0.borrow_mut().push(format!("before {event:?}"));
        }
        fn after(&mut self, _: &mut Context<'_, T>, event: &Event<'_>) {
            self.0.borrow_mut().push(format!("after {event:?}"));
        }
    }
    let log = Log::default();
    let told = Told(Rc::clone(&log));
    let sees = (Some(Sees(Rc::clone(&log))), None::<Sees>);
    let (mut pump, peer) = Pump::with_peer(ProtocolWrapper::new(told, sees)).unwrap();
    pump.run();
    let null = File::open("/dev/null").unwrap();
    peer.send_with_descriptors(b"x", &[null.as_fd()]).unwrap();
    pump.run();
    assert_eq!(
        log.take(),
        [
            "before ConnectionMade",
            "connection_made",
            "after ConnectionMade",
            "before DescriptorsReceived { descriptors: 1, data: [120] }",
            "descriptors_received 1 1",
            "after DescriptorsReceived { descriptors: 1, data: [120] }",
        ]
    );
}

/// E-04, W-72, S-33: not only when called by hand.
#[test]
fn descriptors_and_the_end_of_a_peer_arrive_through_all_layers() {
    let ledger = DescriptorLedger::open();
    let log = Log::default();
    let mut pump = pump();
    let maker = Maker {
        log: Rc::clone(&log),
        declines: false,
    };
    let mut factory = in_all_layers(maker);
    let protocol = build(&mut pump, &mut factory, &client("192.0.2.7:1000")).unwrap();
    let (transport, peer) = pump.connect(protocol).unwrap();
    pump.run();
    log.take();
    let null = File::open("/dev/null").unwrap();
    peer.send_with_descriptors(b"fd", &[null.as_fd(), null.as_fd()])
        .unwrap();
    peer.shutdown_write();
    pump.run();
    assert_eq!(
        log.take(),
        ["descriptors_received 2 2", "read_connection_lost"]
    );
    let transport = pump.get(transport).unwrap();
    assert_eq!(transport.state(), TransportState::Connected);
    assert_eq!(pump.reactor().descriptor_counts().unclaimed, 0);
    drop((null, peer, pump));
    ledger.assert_balanced();
}

/// W-70, W-72.
#[test]
fn no_protocol_stays_none_and_counts_nowhere() {
    let _ledger = DescriptorLedger::open();
    let mut pump = pump();
    let log = Log::default();
    let maker = |declines| Maker {
        log: Rc::clone(&log),
        declines,
    };
    let mut declining = in_all_layers(maker(true));
    let peer = client("192.0.2.7:1000");
    for _ in 0..3 {
        assert!(build(&mut pump, &mut declining, &peer).is_none());
    }
    // The limit of one does not come in the way: each was asked.
    assert_eq!(log.take(), ["build"; 3]);
    assert_eq!(timers(&mut pump), 0);
    let mut limited = in_all_layers(maker(false));
    let first = build(&mut pump, &mut limited, &peer);
    assert!(first.is_some() && build(&mut pump, &mut limited, &peer).is_none());
}

/// E-04, H-21.
#[test]
fn the_events_of_a_factory_are_handed_on() {
    let _ledger = DescriptorLedger::open();
    let mut pump = pump();
    let log = Log::default();
    let mut factory = in_all_layers(Maker {
        log: Rc::clone(&log),
        declines: false,
    });
    let mut door = Door;
    let mut cx = BuildContext {
        origin: Origin::Listener(&mut door),
        reactor: pump.reactor(),
    };
    factory.started(&mut cx);
    factory.connection_failed(&mut cx, &ConnectError::TimedOut);
    factory.connection_lost(&mut cx, &CloseReason::Done);
    factory.stopped(&mut cx);
    let prefix = factory.log_prefix();
    assert_eq!(prefix, "Maker");
    assert_eq!(
        log.take(),
        [
            "started".to_owned(),
            format!("failed {}", ConnectError::TimedOut),
            format!("lost {}", CloseReason::Done),
            "stopped".to_owned(),
        ]
    );
    pump.advance(Duration::from_secs(1));
}
