//! What everything says of itself.

use std::rc::Rc;
use std::time::Duration;

use bowline::descriptor::{Description, Fact};
use bowline::framing::{FrameContext, FrameReceiver, Framed, LineFramer};
use bowline::policies::{IdleTimeout, TrafficLog};
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
