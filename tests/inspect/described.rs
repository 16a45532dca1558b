//! What everything says of itself.

use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Duration;

use bowline::descriptor::{Description, Fact};
use bowline::framing::{FrameContext, FrameReceiver, Framed, LineFramer};
use bowline::policies::{
    Idle, IdleTimeout, LimitConnections, LimitHandshakes, ProtocolWrapper, Rate, Reconnecting,
    Throttle, ThrottleReading, TrafficLog,
};
use bowline::{Address, Context, Protocol, Reactor, Transport, Transports, Udp, Unix};

use crate::Echo;
use crate::support::{DescriptorLedger, run_until, socketpair};

fn all(reactor: &Reactor) -> Vec<Description> {
    let all = reactor.descriptors().map(|it| it.describe());
    all.map(|it| it.expect("no callback runs")).collect()
}

fn one_of(reactor: &Reactor, kind: &str) -> Description {
    let all = all(reactor);
    let found: Vec<_> = all.iter().filter(|it| it.kind() == kind).collect();
    assert_eq!(found.len(), 1, "of {kind}, in {all:#?}");
    found[0].clone()
}

#[track_caller]
fn assert_fact(description: &Description, name: &str, fact: impl Into<Fact>) {
    assert_eq!(
        description.get(name),
        Some(&fact.into()),
        "{name} of {description:#?}"
    );
}

struct Room;

impl<T: Transport> FrameReceiver<T, LineFramer> for Room {
    fn frame_received(&mut self, cx: &mut FrameContext<'_, T, LineFramer>, line: &[u8]) {
        cx.transport.write(line);
    }

    fn describe(&self, description: &mut Description) {
        description.section("Room").set("topic", "boats");
    }
}

#[test]
fn a_connection_tells_its_bytes_and_its_parts_from_the_outside_in() {
    let ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let path = tempfile::tempdir().unwrap();
    let path = path.path().join("room");
    let factory = |_: &Address| Framed::new(LineFramer::new(), Room);
    let factory = IdleTimeout::new(TrafficLog::new(factory));
    reactor.listen_unix(path.as_path(), factory).unwrap();
    let mut client = std::os::unix::net::UnixStream::connect(&path).unwrap();
    std::io::Write::write_all(&mut client, b"hello\r\nbe").unwrap();
    run_until(&mut reactor, |reactor| {
        let all = all(reactor);
        let received = all.iter().filter_map(|it| it.get("received_bytes"));
        received.into_iter().any(|it| *it == Fact::Count(9))
    });
    let it = one_of(&reactor, "UNIX");
    assert_fact(&it, "role", "connection");
    assert_fact(&it, "protocol", "Room");
    assert_fact(&it, "state", "open");
    assert_fact(&it, "reading", "on");
    assert_fact(&it, "sent_bytes", 5_u64);
    assert_fact(&it, "buffered_bytes", 0_u64);
    assert_fact(&it, "undelivered_bytes", 2_u64);
    assert_fact(&it, "pairing", "loose");
    assert_fact(&it, "topic", "boats");
    let names: Vec<_> = it.sections().iter().map(|it| it.name()).collect();
    assert_eq!(
        names,
        [
            "UNIX",
            "SendmsgMixin",
            "Idle",
            "Traffic",
            "LineFramer",
            "Room"
        ]
    );
    let listener = one_of(&reactor, "listener");
    assert_fact(&listener, "accepted", 1_u64);
    assert_fact(&listener, "state", "listening");
    let text = format!("{:?}", all(&reactor));
    assert!(!text.contains("hello"), "what was sent is shown: {text}");
    drop((client, reactor));
    ledger.assert_balanced();
}

#[test]
fn a_pause_a_producer_and_a_half_close_are_told() {
    struct Idle;
    impl bowline::Producer for Idle {
        fn resume_producing(&mut self, _: &mut Context<'_, dyn Transport>) {}
    }
    let mut reactor = Reactor::new().unwrap();
    let (ours, _theirs) = socketpair();
    let handle = reactor.adopt(Unix, ours.into(), Echo).unwrap();
    run_until(&mut reactor, |reactor| reactor.is_idle());
    let transport = reactor.get(handle).unwrap();
    transport.pause_producing();
    let producer = bowline::ProducerRef::boxed(Idle);
    let push = bowline::ProducerKind::Push;
    transport.register_producer(producer, push).unwrap();
    let it = one_of(&reactor, "UNIX");
    assert_fact(&it, "reading", "paused");
    assert_fact(&it, "producer", "push");
    let transport = reactor.get(handle).unwrap();
    transport.unregister_producer();
    transport.lose_write_connection();
    assert_fact(&one_of(&reactor, "UNIX"), "state", "half closed");
}

#[test]
fn listeners_connectors_ports_and_children_tell_what_they_are() {
    struct Nothing;
    impl<T: bowline::DatagramTransport + ?Sized> bowline::DatagramProtocol<T> for Nothing {
        fn datagram_received(&mut self, _: &mut Context<'_, T>, _: &mut bowline::Datagram<'_>) {}
    }
    let mut reactor = Reactor::new().unwrap();
    let any = ([127, 0, 0, 1], 0).into();
    reactor.listen_tcp(any, |_: &Address| Echo).unwrap();
    reactor
        .connect_tcp(([127, 0, 0, 1], 9).into(), |_: &Address| Echo)
        .unwrap();
    reactor.listen(Udp::at(any), Nothing).unwrap();
    let mut command = std::process::Command::new("sleep");
    command.arg("60");
    let command = bowline::process::ChildCommand::new(command);
    let output = bowline::process::CollectOutput::new(|_, _| {});
    reactor.spawn_process(command, output).unwrap();
    assert_fact(&one_of(&reactor, "listener"), "factory", "Echo");
    assert_fact(&one_of(&reactor, "connector"), "peer", "127.0.0.1:9");
    assert_fact(&one_of(&reactor, "UDP"), "received_messages", 0_u64);
    assert_fact(&one_of(&reactor, "process"), "state", "running");
}

#[test]
fn who_panics_while_it_describes_itself_costs_nobody_anything() {
    struct Shy;
    impl<T: Transport> Protocol<T> for Shy {
        fn data_received(&mut self, _: &mut Context<'_, T>, _: &[u8]) {}
        fn describe(&self, _: &mut Description) {
            std::panic::resume_unwind(Box::new("on purpose"));
        }
    }
    let mut reactor = Reactor::new().unwrap();
    let (ours, _theirs) = socketpair();
    let handle = reactor.adopt(Unix, ours.into(), Shy).unwrap();
    run_until(&mut reactor, |reactor| reactor.is_idle());
    let it = one_of(&reactor, "UNIX");
    let last = it.sections().last().unwrap();
    assert!(last.name().contains("panicked"), "{it:#?}");
    assert!(reactor.get(handle).is_some(), "the connection goes on");
}

#[test]
fn the_one_whose_callback_runs_is_there_and_says_nothing() {
    struct Looks(Rc<std::cell::RefCell<Vec<bool>>>);
    impl<T: Transport> Protocol<T> for Looks {
        fn data_received(&mut self, cx: &mut Context<'_, T>, _: &[u8]) {
            let all = cx.reactor.descriptors();
            self.0
                .borrow_mut()
                .extend(all.map(|it| it.describe().is_some()));
        }
    }
    let mut reactor = Reactor::new().unwrap();
    let seen = Rc::default();
    let (ours, theirs) = socketpair();
    reactor
        .adopt(Unix, ours.into(), Looks(Rc::clone(&seen)))
        .unwrap();
    std::io::Write::write_all(&mut &theirs, b"x").unwrap();
    run_until(&mut reactor, |_| !seen.borrow().is_empty());
    assert_eq!(*seen.borrow(), [false]);
}

#[test]
fn bytes_of_those_that_ended_stay_counted_by_kind() {
    let mut reactor = Reactor::new().unwrap();
    let (ours, theirs) = socketpair();
    reactor.adopt(Unix, ours.into(), Echo).unwrap();
    std::io::Write::write_all(&mut &theirs, b"0123456789").unwrap();
    let mut answer = [0; 10];
    theirs.set_nonblocking(true).unwrap();
    run_until(&mut reactor, |_| {
        std::io::Read::read(&mut &theirs, &mut answer).is_ok()
    });
    drop(theirs);
    run_until(&mut reactor, |reactor| {
        reactor
            .kind_counts()
            .iter()
            .any(|it| it.kind == "UNIX" && it.ended == 1)
    });
    let counts = reactor.kind_counts();
    let unix = counts.iter().find(|it| it.kind == "UNIX").unwrap();
    assert_eq!((unix.made, unix.open()), (1, 0));
    assert_eq!((unix.sent_bytes, unix.received_bytes), (10, 10));
    reactor.turn(Some(Duration::ZERO));
}

/// Each layer around a factory, with a fact that it tells at its listener or connector.
#[test]
fn every_layer_around_a_factory_tells_what_it_is_at_its_listener_or_connector() {
    let rate = Rate::per_second(std::num::NonZeroU64::new(1_000).unwrap());
    let any = ([127, 0, 0, 1], 0).into();
    let mut reactor = Reactor::new().unwrap();
    let echo = |_: &Address| Echo;
    let shared = Rc::new(std::cell::RefCell::new(
        LimitConnections::new(echo).total(Some(7)),
    ));
    reactor.listen_tcp(any, Rc::clone(&shared)).unwrap();
    reactor
        .listen_tcp(any, LimitHandshakes::new(|_: &Address, _| Echo).most(5))
        .unwrap();
    let period = Duration::from_secs(9);
    reactor
        .listen_tcp(
            any,
            IdleTimeout::new(TrafficLog::new(echo).shown_bytes(3)).period(period),
        )
        .unwrap();
    let throttled = ThrottleReading::new(echo).total(Some(rate));
    reactor
        .listen_tcp(any, throttled.per_connection(Some(rate)))
        .unwrap();
    let nobody = ([127, 0, 0, 1], 9).into();
    reactor
        .connect_tcp(nobody, Reconnecting::new(echo).max_retries(Some(4)))
        .unwrap();
    let all = all(&reactor);
    let expected: [(&str, &str, Fact); 9] = [
        ("LimitConnections", "total", 7_u64.into()),
        ("LimitConnections", "declined", 0_u64.into()),
        ("LimitHandshakes", "most", 5_u64.into()),
        ("IdleTimeout", "period", period.into()),
        ("TrafficLog", "shown_bytes", 3_u64.into()),
        (
            "ThrottleReading",
            "total_bytes_per_second",
            1_000_u64.into(),
        ),
        ("ThrottleReading", "bytes_per_second_each", 1_000_u64.into()),
        ("Reconnecting", "stage", "trying".into()),
        ("Reconnecting", "max_retries", 4_u64.into()),
    ];
    for (layer, name, fact) in &expected {
        let sections = all.iter().flat_map(Description::sections);
        let mut found = sections.filter(|it| it.name() == *layer);
        let section = found.next().unwrap_or_else(|| panic!("{layer}: {all:#?}"));
        assert_eq!(section.get(name), Some(fact), "{layer}: {section:#?}");
        assert!(found.next().is_none(), "{layer} is there twice");
    }
    let listener = all.iter().find(|it| it.get("period").is_some()).unwrap();
    let names: Vec<_> = listener.sections().iter().map(|it| it.name()).collect();
    assert_eq!(names, ["listener", "IdleTimeout", "TrafficLog"]);
    // One whose callback looks says nothing, and nothing breaks.
    let _busy = shared.borrow_mut();
    assert!(
        self::all(&reactor)
            .iter()
            .all(|it| it.get("total").is_none())
    );
}

#[test]
fn a_listener_whose_connections_a_pool_gets_tells_which_and_who_accepts() {
    use bowline::handoff::pool::{Accepting, Pool, PoolSettings, Spawned, WorkerId};
    let ledger = DescriptorLedger::open();
    let any = ([127, 0, 0, 1], 0).into();
    for (accepting, who) in [
        (Accepting::ByPool, "by the pool"),
        (Accepting::ByWorkers, "by workers"),
    ] {
        let mut reactor = Reactor::new().unwrap();
        let settings = PoolSettings::default().workers(0).accepting(accepting);
        let none = |_: &mut Reactor, _: WorkerId| -> std::io::Result<Spawned<OwnedFd>> {
            unreachable!("there are to be no workers")
        };
        let pool = Pool::start(&mut reactor, settings, none);
        reactor
            .accept(bowline::Tcp::at(any), pool.acceptor(7))
            .unwrap();
        run_until(&mut reactor, |reactor| reactor.is_idle());
        let it = one_of(&reactor, "listener");
        let acceptor = it.sections().iter().find(|it| it.name() == "PoolAcceptor");
        let acceptor = acceptor.unwrap_or_else(|| panic!("{it:#?}"));
        assert_eq!(acceptor.get("label"), Some(&7_u64.into()));
        assert_eq!(acceptor.get("accepting"), Some(&who.into()));
        // Nobody has room, as there is nobody.
        assert_eq!(acceptor.get("paused"), Some(&true.into()));
        assert_fact(&it, "state", "held");
        let parts = reactor.parts();
        let of_pool = parts.sections().iter().find(|it| it.name() == "Pool");
        assert_eq!(of_pool.unwrap().get("pool"), acceptor.get("pool"));
        assert!(acceptor.get("pool").is_some());
    }
    ledger.assert_balanced();
}

/// Each policy, around one connection.
#[test]
fn every_policy_tells_what_it_is_at_its_connection() {
    let rate = Rate::per_second(std::num::NonZeroU64::new(1_000).unwrap());
    let count = LimitConnections::new(|_: &Address| Echo).count();
    let peer = Address::Unix(bowline::UnixAddress::Unnamed);
    let idle = Idle::new(Duration::from_secs(9));
    let policies = (
        count.counted(&peer),
        (idle, (Throttle::new(rate).throttled(), None::<Idle>)),
    );
    let mut reactor = Reactor::new().unwrap();
    let (ours, _theirs) = socketpair();
    let protocol = ProtocolWrapper::new(Echo, policies);
    reactor.adopt(Unix, ours.into(), protocol).unwrap();
    run_until(&mut reactor, |reactor| reactor.is_idle());
    let it = one_of(&reactor, "UNIX");
    let sections = it.sections().iter().map(|it| it.name());
    let names: Vec<_> = sections.collect();
    assert_eq!(
        names,
        [
            "UNIX",
            "SendmsgMixin",
            "Counted",
            "Idle",
            "Throttled",
            "Echo"
        ]
    );
    assert_fact(&it, "open_in_all", 1_u64);
    assert_fact(&it, "period", Duration::from_secs(9));
    assert_fact(&it, "bytes_per_second", 1_000_u64);
}

/// Who implements one of the traits that have the method and does not say why it has none
/// of its own.
#[test]
fn whoever_is_registered_or_stands_around_something_describes_itself() {
    const TRAITS: [&str; 6] = [
        "Policy<T>",
        "Factory",
        "Acceptor",
        "Descriptor",
        "FileDescriptor",
        "ChannelReceiver<T>",
    ];
    // These say nothing, and why.
    let silent = [
        // Sockets are told of by their connection.
        "PipeEnds",
        "TcpSocket",
        "UnixSocket",
        "MemorySocket",
        // Without a setting or a state.
        "Operators",
        "Browsers",
        "Finder",
        "Once<P>",
        "F",
        "A",
    ];
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let (mut missing, mut found) = (Vec::new(), 0);
    for part in [
        "reactor",
        "protocol",
        "transport",
        "handoff",
        "tls",
        "inspect",
    ] {
        let mut folders = vec![root.join(part).join("src")];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    folders.push(path);
                } else if path.extension().is_some_and(|it| it == "rs") {
                    let text = std::fs::read_to_string(&path).unwrap();
                    // Blocks of tests are indented.
                    for block in text.split("\nimpl").skip(1) {
                        let (head, rest) = block.split_once('{').unwrap_or((block, ""));
                        let head = head.split_whitespace().collect::<Vec<_>>().join(" ");
                        let Some((of, who)) = head.split_once(" for ") else {
                            continue;
                        };
                        let of = of.rsplit("> ").next().unwrap().trim();
                        let who = who.split(" where").next().unwrap().trim();
                        if !TRAITS.contains(&of) {
                            continue;
                        }
                        found += 1;
                        let body = rest.split("\n}\n").next().unwrap();
                        if !body.contains("fn describe(") && !silent.contains(&who) {
                            missing.push(format!("{of} for {who} in {}", path.display()));
                        }
                    }
                }
            }
        }
    }
    assert!(found > 35, "only {found} were found");
    assert!(missing.is_empty(), "{missing:#?}");
}
