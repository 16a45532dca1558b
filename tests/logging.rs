//! What is written to the log, and who it says it is about.

#[path = "policies/capture.rs"]
mod capture;
#[path = "support/mod.rs"]
mod support;

use std::io::Write;
use std::num::NonZeroU64;
use std::os::unix::net::UnixStream as Client;
use std::time::Duration;

use bowline::lifecycle::{Phase, SystemEvent};
use bowline::policies::{
    Backoff, IdleTimeout, Jitter, LimitConnections, Rate, Reconnecting, ThrottleReading,
};
use bowline::process::{ChildCommand, ProcessContext, ProcessProtocol, ProcessStatus};
use bowline::testing::{ManualClock, Pump};
use bowline::{
    Address, AfterReadClosed, BuildContext, CloseReason, Context, Datagram, DatagramProtocol,
    DatagramTransport, Factory, ProducerKind, ProducerRef, Protocol, Reactor, Transport,
    Transports, UnixDatagram, UnixTransport,
};

use crate::support::{DescriptorLedger, Record, Recorder, run_until, run_until_quiet, socketpair};

const PANIC: &str = "on purpose, in a test";

/// Contract G-03, G-04, L-29.
#[test]
fn listeners_say_where_they_listen_and_that_they_closed() {
    let ledger = DescriptorLedger::alone();
    capture::start();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let mut reactor = Reactor::new().unwrap();
    let factory = |_: &Address| Recorder::default();
    let any = ([127, 0, 0, 1], 0).into();
    let listeners = [
        reactor.listen_tcp(any, factory).unwrap(),
        reactor.listen_unix(path.clone(), factory).unwrap(),
    ];
    run_until_quiet(&mut reactor);
    let port = reactor.get(listeners[0]).unwrap().address().to_string();
    assert!(!port.ends_with(":0"));
    let path = path.to_str().unwrap();
    let both = [port.as_str(), path];
    for (address, listener) in both.into_iter().zip(listeners) {
        let line = format!("DEBUG: {}: listening on {address}", listener.token());
        assert_eq!(capture::lines(&line).len(), 1, "{line}");
        assert!(capture::lines(&format!("closed {address}")).is_empty());
    }
    for listener in listeners {
        reactor.get(listener).unwrap().stop_listening();
    }
    run_until_quiet(&mut reactor);
    for (address, listener) in both.into_iter().zip(listeners) {
        let line = format!("DEBUG: {}: closed {address}", listener.token());
        assert_eq!(capture::lines(&line).len(), 1, "{line}");
    }
    drop((reactor, directory));
    ledger.assert_balanced();
}

/// Says so in a record when it is over; panics when it receives anything.
struct Fragile(Record);

impl<T: Transport> Protocol<T> for Fragile {
    fn data_received(&mut self, _: &mut Context<'_, T>, _: &[u8]) {
        panic!("{PANIC}");
    }

    fn connection_lost(&mut self, _: &mut Context<'_, T>, reason: &CloseReason) {
        self.0.push(support::Event::Lost(reason.to_string()));
    }
}

/// Contract L-14, T-14, G-10.
#[test]
fn both_ends_of_a_connection_have_their_protocol_and_peer_in_the_log() {
    let ledger = DescriptorLedger::alone();
    capture::start();
    let mut reactor = Reactor::new().unwrap();
    let (server, client) = (Record::default(), Record::default());
    let at_server = Recorder::new(&server);
    let at_client = client.clone();
    let listener = reactor
        .listen_tcp(([127, 0, 0, 1], 0).into(), move |_: &Address| {
            at_server.clone()
        })
        .unwrap();
    let address = reactor.get(listener).unwrap().address().as_inet().unwrap();
    reactor
        .connect_tcp(address, move |_: &Address| Fragile(at_client.clone()))
        .unwrap();
    run_until(&mut reactor, |_| !server.summary().is_empty());
    let accepted = reactor.get(server.handle(0)).unwrap();
    let from = accepted.peer();
    let token = accepted.handle().token();
    accepted.lose_connection();
    run_until(&mut reactor, |_| server.is_lost() && client.is_lost());
    for about in [
        format!("DEBUG: {token} Recorder,TCP,{from}: "),
        format!(" Fragile,TCP,{address}: "),
    ] {
        let mut lines = capture::lines("closed cleanly");
        lines.retain(|line| line.contains(&about));
        assert_eq!(lines.len(), 1, "{about}: {:?}", capture::lines(""));
    }
    drop(reactor);
    ledger.assert_balanced();
}

/// Asks for all of a list by their handles, its own among them.
struct Announces(Record);

impl<T: Transport> Protocol<T> for Announces {
    fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
        for handle in [self.0.handle(0), cx.transport.handle()] {
            if let Some(transport) = cx.reactor.get(handle) {
                transport.write(data);
            }
        }
    }
}

/// A message to everybody that is sent through the reactor does not reach its sender,
/// since the reactor does not have it at that moment.
#[test]
fn who_misses_its_own_connection_is_told_once() {
    let ledger = DescriptorLedger::alone();
    capture::start();
    let mut reactor = Reactor::new().unwrap();
    let other = Record::default();
    let (ours, mut others_peer) = socketpair();
    reactor
        .adopt_unix_stream(ours.into(), Recorder::new(&other))
        .unwrap();
    run_until_quiet(&mut reactor);
    let (ours, mut peer) = socketpair();
    let handle = reactor
        .adopt_unix_stream(ours.into(), Announces(other))
        .unwrap();
    let warning = format!("{}: asked for by its handle", handle.token());
    assert!(capture::lines(&warning).is_empty());
    for _ in 0..3 {
        peer.write_all(b"?").unwrap();
        run_until_quiet(&mut reactor);
        std::io::Read::read_exact(&mut others_peer, &mut [0]).unwrap();
    }
    assert_eq!(capture::lines(&warning).len(), 1);
    drop((reactor, peer, others_peer));
    ledger.assert_balanced();
}

/// Contract G-09, G-10.
#[test]
fn each_panic_is_logged_once_and_says_whose_it_is() {
    let ledger = DescriptorLedger::alone();
    capture::start();
    let message = format!("a callback panicked: {PANIC}");
    let mut reactor = Reactor::new().unwrap();
    let record = Record::default();
    let (ours, mut theirs) = socketpair();
    reactor
        .adopt_unix_stream(ours.into(), Fragile(record.clone()))
        .unwrap();
    theirs.write_all(b"x").unwrap();
    run_until(&mut reactor, |_| record.is_lost());
    // The end of the connection names it too, as its reason.
    let mut lines = capture::lines(&message);
    lines.retain(|line| line.starts_with("ERROR: "));
    assert_eq!(lines.len(), 1);
    assert!(lines[0].contains(" Fragile,UNIX,unnamed: "), "{lines:?}");

    // Those that are nobody's, each with its own text.
    reactor.call_later(Duration::ZERO, |_| panic!("timer"));
    let remote = reactor.remote();
    remote.call_from_thread(|_| panic!("call")).unwrap();
    reactor.add_trigger(Phase::Before, SystemEvent::Shutdown, |_| panic!("trigger"));
    reactor.call_later(Duration::from_millis(1), |reactor| reactor.stop().unwrap());
    reactor.run().unwrap();
    for text in ["timer", "call", "trigger"] {
        let message = format!("a callback panicked: {text}");
        assert_eq!(capture::lines(&message).len(), 1, "{text}");
    }
    drop((reactor, remote, theirs));
    ledger.assert_balanced();
}

/// Panics in the callback of this name, and sees to it that all of them come.
struct PanicsIn(&'static str);

impl PanicsIn {
    fn reach(&self, name: &str) {
        assert!(self.0 != name, "{PANIC}: {name}");
    }
}

impl<T: UnixTransport> Protocol<T> for PanicsIn {
    fn connection_made(&mut self, cx: &mut Context<'_, T>) {
        self.reach("connection_made");
        let transport = &mut *cx.transport;
        let registered = transport.register_producer(ProducerRef::Protocol, ProducerKind::Push);
        registered.unwrap();
        let null = std::fs::File::open("/dev/null").unwrap();
        transport.send_file_descriptor(null.into()).unwrap();
        transport.write(&[0; 100_000]);
    }

    fn pause_producing(&mut self, _: &mut Context<'_, T>) {
        self.reach("pause_producing");
    }

    fn resume_producing(&mut self, _: &mut Context<'_, T>) {
        self.reach("resume_producing");
    }

    fn stop_producing(&mut self, _: &mut Context<'_, T>) {
        self.reach("stop_producing");
    }

    fn descriptors_sent(&mut self, _: &mut Context<'_, T>, _: usize) {
        self.reach("descriptors_sent");
    }

    fn file_descriptor_received(
        &mut self,
        _: &mut Context<'_, T>,
        fd: std::os::fd::OwnedFd,
    ) -> Result<(), std::os::fd::OwnedFd> {
        self.reach("file_descriptor_received");
        drop(fd);
        Ok(())
    }

    fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
        self.reach("data_received");
        if self.0 == "data_received after an abort" {
            cx.transport.abort_connection();
            self.reach("data_received after an abort");
        }
        if self.0 == "write_connection_lost" {
            cx.transport.unregister_producer();
            cx.transport.lose_write_connection();
        }
        if data.contains(&b'p') {
            cx.transport.pause_producing();
            cx.transport.resume_producing();
        }
    }

    fn reading_resumed(&mut self, _: &mut Context<'_, T>) {
        self.reach("reading_resumed");
    }

    fn write_connection_lost(&mut self, _: &mut Context<'_, T>) {
        self.reach("write_connection_lost");
    }

    fn read_connection_lost(&mut self, _: &mut Context<'_, T>) -> AfterReadClosed {
        self.reach("read_connection_lost");
        AfterReadClosed::EndConnection
    }

    fn connection_lost(&mut self, _: &mut Context<'_, T>, _: &CloseReason) {
        self.reach("connection_lost");
    }
}

/// Contract G-09, F-26, F-27, F-28, P-20: whichever callback of a connection it is.
#[test]
fn a_panic_in_any_callback_of_a_connection_is_logged_once() {
    for name in [
        "connection_made",
        "pause_producing",
        "resume_producing",
        "stop_producing",
        "descriptors_sent",
        "file_descriptor_received",
        "data_received",
        "data_received after an abort",
        "reading_resumed",
        "write_connection_lost",
        "read_connection_lost",
        "connection_lost",
    ] {
        let ledger = DescriptorLedger::open();
        capture::start();
        let mut reactor = Reactor::new().unwrap();
        let (ours, mut theirs) = socketpair();
        reactor
            .adopt_unix_stream(ours.into(), PanicsIn(name))
            .unwrap();
        let file = std::fs::File::open("/dev/null").unwrap();
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = rustix::net::SendAncillaryBuffer::new(&mut space);
        let descriptors = [std::os::fd::AsFd::as_fd(&file)];
        assert!(control.push(rustix::net::SendAncillaryMessage::ScmRights(&descriptors)));
        let data = [std::io::IoSlice::new(b"p")];
        let none = rustix::net::SendFlags::NOSIGNAL;
        rustix::net::sendmsg(&theirs, &data, &mut control, none).unwrap();
        run_until_quiet(&mut reactor);
        theirs.set_nonblocking(true).unwrap();
        while std::io::Read::read(&mut theirs, &mut [0; 65_536]).is_ok_and(|count| count > 0) {
            run_until_quiet(&mut reactor);
        }
        drop(theirs);
        run_until(&mut reactor, |reactor| reactor.registered() == 0);
        let text = format!("a callback panicked: {PANIC}: {name}");
        let lines = capture::lines("ERROR: ");
        assert_eq!(lines.len(), 1, "{name}: {lines:?}");
        assert!(lines[0].ends_with(&text), "{lines:?}");
        assert!(lines[0].contains(" PanicsIn,UNIX,unnamed: "), "{lines:?}");
        assert_eq!(reactor.statistics().panics, 1);
        drop((reactor, file));
        ledger.assert_balanced();
    }
}

/// Contract G-09, R-09, R-21, R-31, D-05, X-13: those of nobody's connection, each with its own text.
#[test]
fn a_panic_of_whatever_the_reactor_calls_is_logged_once() {
    let ledger = DescriptorLedger::open();
    capture::start();
    let mut reactor = Reactor::new().unwrap();
    reactor.call_soon(|_| panic!("call soon"));
    reactor.call_when_running(|_| panic!("when running"));
    reactor.call_every(Duration::ZERO, |_, _| panic!("periodic"));
    reactor.defer(|_| panic!("deferred"));
    reactor.call_in_thread(|| (), |_, _| panic!("result of a thread"));
    let phases = [Phase::Before, Phase::During, Phase::After];
    let texts = ["before", "during", "after"];
    for event in [SystemEvent::Startup, SystemEvent::Shutdown] {
        for (phase, text) in phases.into_iter().zip(texts) {
            reactor.add_trigger(phase, event, move |_| panic!("{text} the {event:?}"));
        }
    }
    struct Fails(std::os::fd::OwnedFd);
    impl bowline::descriptor::Descriptor for Fails {
        fn ready(
            &mut self,
            _: &mut Reactor,
            _: bowline::descriptor::Readiness,
        ) -> bowline::descriptor::Next {
            panic!("descriptor")
        }
        fn source(&self) -> Option<std::os::fd::BorrowedFd<'_>> {
            Some(std::os::fd::AsFd::as_fd(&self.0))
        }
        fn facet(&mut self) -> &mut dyn std::any::Any {
            self
        }
    }
    let (ours, mut theirs) = socketpair();
    theirs.write_all(b"x").unwrap();
    let interest = bowline::descriptor::Interest::Readable;
    let token = reactor
        .register(interest, |_| Box::new(Fails(ours.into())))
        .unwrap();
    let (ours, mut others) = socketpair();
    let datagrams = std::os::unix::net::UnixDatagram::pair().unwrap();
    reactor
        .adopt(UnixDatagram, datagrams.0.into(), FailsAtDatagrams)
        .unwrap();
    datagrams.1.send(b"x").unwrap();
    reactor
        .spawn_process(
            ChildCommand::new(std::process::Command::new("true")),
            FailsAtTheEnd,
        )
        .unwrap();
    let recorder = Record::default();
    reactor
        .adopt_unix_stream(ours.into(), Recorder::new(&recorder))
        .unwrap();
    others.write_all(b"the others go on").unwrap();
    let all = [
        "call soon",
        "when running",
        "periodic",
        "deferred",
        "result of a thread",
        "before the Startup",
        "during the Startup",
        "after the Startup",
        "descriptor",
        "datagram",
        "exited",
        "ended",
    ];
    let said = |text: &str| capture::lines(&format!("a callback panicked: {text}"));
    reactor.start().unwrap();
    run_until(&mut reactor, |_| {
        all.iter().all(|text| !said(text).is_empty())
    });
    run_until(&mut reactor, |_| recorder.data().len() == 16);
    reactor.stop().unwrap();
    run_until(&mut reactor, |reactor| !reactor.is_running());
    let at_the_end = ["before", "during", "after"].map(|it| format!("{it} the Shutdown"));
    let mut expected: Vec<&str> = all.to_vec();
    expected.extend(at_the_end.iter().map(String::as_str));
    for text in &expected {
        let lines = said(text);
        assert_eq!(lines.len(), 1, "{text}: {lines:?}");
        assert!(lines[0].starts_with("ERROR: "), "{lines:?}");
    }
    let errors = capture::lines("ERROR: ");
    assert_eq!(errors.len(), expected.len(), "{errors:?}");
    assert!(said("descriptor")[0].contains(&token.to_string()));
    drop((reactor, theirs, others, datagrams.1));
    ledger.assert_balanced();
}

struct FailsAtDatagrams;

impl<T: DatagramTransport> DatagramProtocol<T> for FailsAtDatagrams {
    fn datagram_received(&mut self, _: &mut Context<'_, T>, _: &mut Datagram<'_>) {
        panic!("datagram");
    }
}

struct FailsAtTheEnd;

impl ProcessProtocol for FailsAtTheEnd {
    fn child_data_received(&mut self, _: &mut ProcessContext<'_>, _: u32, _: &[u8]) {}

    fn process_exited(&mut self, _: &mut ProcessContext<'_>, _: ProcessStatus) {
        panic!("exited");
    }

    fn process_ended(&mut self, _: &mut ProcessContext<'_>, _: ProcessStatus) {
        panic!("ended");
    }
}

/// Contract G-05, T-14: whose name is the factory's own, or the protocol's that a
/// closure builds.
#[test]
fn factories_are_said_to_start_and_to_stop() {
    struct Doors;
    impl Factory for Doors {
        type Protocol = Recorder;

        fn build_protocol(&mut self, _: &mut BuildContext<'_>, _: &Address) -> Option<Recorder> {
            None
        }
    }
    let ledger = DescriptorLedger::alone();
    capture::start();
    let mut reactor = Reactor::new().unwrap();
    let any = ([127, 0, 0, 1], 0).into();
    let listeners = [
        reactor.listen_tcp(any, Doors).unwrap(),
        reactor
            .listen_tcp(any, |_: &Address| Fragile(Record::default()))
            .unwrap(),
        reactor.listen_tcp(any, IdleTimeout::new(Doors)).unwrap(),
    ];
    run_until_quiet(&mut reactor);
    let count = |what: &str| capture::lines(&format!("{what} factory ")).len();
    assert_eq!((count("starting"), count("stopping")), (3, 0));
    assert_eq!(capture::lines("starting factory Doors").len(), 2);
    assert_eq!(capture::lines("starting factory Fragile").len(), 1);
    for listener in listeners {
        reactor.get(listener).unwrap().stop_listening();
    }
    run_until_quiet(&mut reactor);
    assert_eq!((count("starting"), count("stopping")), (3, 3));

    // A connector starts it once, however many attempts there are.
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = nobody.local_addr().unwrap();
    drop(nobody);
    let backoff = Backoff::new().first(Duration::ZERO).jitter(Jitter::None);
    let factory = Reconnecting::new(Doors)
        .backoff(backoff)
        .max_retries(Some(1));
    reactor.connect_tcp(address, factory).unwrap();
    run_until(&mut reactor, |reactor| reactor.registered() == 0);
    assert_eq!((count("starting"), count("stopping")), (4, 4));
    assert_eq!(capture::lines(&format!("connecting to {address}")).len(), 2);
    drop(reactor);
    ledger.assert_balanced();
}

/// Contract G-12.
#[test]
fn signals_and_the_end_of_the_loop_are_logged() {
    let ledger = DescriptorLedger::alone();
    capture::start();
    let signal = rustix::process::Signal::USR2;
    let mut reactor = Reactor::new().unwrap();
    reactor
        .on_signals(&[signal.as_raw()], |reactor, _| reactor.stop().unwrap())
        .unwrap();
    reactor.call_soon(move |_| {
        assert!(capture::lines("the loop has ended").is_empty());
        // To this thread: the pipe that wakes the loop is in its table of descriptors.
        signal_hook::low_level::raise(signal.as_raw()).unwrap();
    });
    reactor.run().unwrap();
    let received = format!("received signal {}", signal.as_raw());
    assert_eq!(capture::lines(&received).len(), 1);
    assert_eq!(capture::lines("the loop has ended").len(), 1);

    reactor.call_soon(|reactor| reactor.crash().unwrap());
    reactor.run().unwrap();
    assert_eq!(capture::lines("the loop begins").len(), 2);
    assert_eq!(
        capture::lines("the loop ends, and leaves everything").len(),
        1
    );
    assert_eq!(capture::lines("the loop has ended").len(), 1);
    drop(reactor);
    ledger.assert_balanced();
}

/// Contract G-12.
#[test]
fn limits_and_throttling_are_logged() {
    let ledger = DescriptorLedger::alone();
    capture::start();
    let clock = ManualClock::new();
    let mut reactor = Reactor::with_clock(clock.clone()).unwrap();
    let record = Record::default();
    let recorder = Recorder::new(&record);
    let rate = Rate::per_second(NonZeroU64::new(10).unwrap());
    let throttled =
        ThrottleReading::new(move |_: &Address| recorder.clone()).per_connection(Some(rate));
    let limited = LimitConnections::new(throttled).total(Some(1));
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    reactor.listen_unix(path.clone(), limited).unwrap();
    let mut first = Client::connect(&path).unwrap();
    run_until(&mut reactor, |_| !record.summary().is_empty());
    assert!(capture::lines("declined").is_empty());
    let second = Client::connect(&path).unwrap();
    run_until(&mut reactor, |_| {
        !capture::lines("declined a connection with unnamed: 1 are open").is_empty()
    });

    assert!(capture::lines("throttling").is_empty());
    first.write_all(&[0; 30]).unwrap();
    run_until(&mut reactor, |_| record.data().len() == 30);
    let held = capture::lines("throttling: unnamed is not read for 2.000 seconds");
    assert_eq!(held.len(), 1, "{:?}", capture::lines("throttling"));
    assert!(capture::lines("throttling ends").is_empty());
    clock.advance(Duration::from_secs(2));
    run_until_quiet(&mut reactor);
    assert_eq!(
        capture::lines("throttling ends: 1 connections are read again").len(),
        1
    );
    drop((reactor, first, second, directory));
    ledger.assert_balanced();
}

/// Contract W-08: with whose connection it is, why, and how much waits.
#[test]
fn what_the_kernel_keeps_refusing_is_said_once() {
    let ledger = DescriptorLedger::alone();
    capture::start();
    let (mut pump, peer) = Pump::with_peer(Recorder::default()).unwrap();
    pump.run();
    let socket = pump.transports()[0].socket();
    let refuse = |pump: &Pump, times: usize| {
        for nth in 0..times {
            // ETOOMANYREFS.
            let error = std::io::Error::from_raw_os_error(109);
            pump.kernel().fail_send(socket, nth, error);
        }
    };
    let warnings = || capture::lines("refused to send for a second");
    // For less than a second, twice.
    for _ in 0..2 {
        refuse(&pump, 20);
        let _ = pump.first().unwrap().write(b"late");
        pump.advance(Duration::from_millis(900));
        assert_eq!(peer.take().bytes, b"late");
    }
    assert!(warnings().is_empty(), "{:?}", warnings());
    // For longer, twice.
    for round in 0..2 {
        refuse(&pump, 40);
        let file = std::fs::File::open("/dev/null").unwrap();
        let transport = pump.first().unwrap();
        transport.send_file_descriptor(file.into()).unwrap();
        let _ = transport.write(b"later");
        pump.advance(Duration::from_millis(900));
        assert_eq!(warnings().len(), round);
        pump.advance(Duration::from_millis(200));
        assert_eq!(warnings().len(), 1, "{:?}", warnings());
        pump.advance(Duration::from_secs(3));
        assert_eq!(peer.take().bytes, b"later");
    }
    let line = &warnings()[0];
    assert!(line.starts_with("WARN: "), "{line}");
    assert!(line.contains(" Recorder,"), "{line}");
    assert!(line.contains("Too many references"), "{line}");
    assert!(line.ends_with("5 bytes and 1 descriptors wait"), "{line}");
    drop(pump);
    ledger.assert_balanced();
}

/// Contract S-32, G-02: what the kernel is asked to add is of no kind that we
/// know (`SO_INQ`, Linux 6.17).
#[test]
fn ancillary_data_of_an_unknown_kind_is_logged_once_and_does_no_harm() {
    let ledger = DescriptorLedger::alone();
    capture::start();
    let (ours, mut theirs) = socketpair();
    let set = "import socket; socket.socket(fileno=0).setsockopt(socket.SOL_SOCKET, 84, 1)";
    let python = std::process::Command::new("python3")
        .args(["-c", set])
        .stdin(std::os::fd::OwnedFd::from(ours.try_clone().unwrap()))
        .stderr(std::process::Stdio::null())
        .status();
    if !python.is_ok_and(|status| status.success()) {
        #[allow(clippy::print_stderr, reason = "a skipped test has to be seen")]
        {
            eprintln!("SKIPPED: no python3, or no SO_INQ before Linux 6.17");
        }
        return;
    }
    let mut reactor = Reactor::new().unwrap();
    let record = Record::default();
    reactor
        .adopt_unix_stream(ours.into(), Recorder::new(&record))
        .unwrap();
    // With a descriptor beside it, and again.
    let file = std::fs::File::open("/dev/null").unwrap();
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = rustix::net::SendAncillaryBuffer::new(&mut space);
    let descriptors = [std::os::fd::AsFd::as_fd(&file)];
    assert!(control.push(rustix::net::SendAncillaryMessage::ScmRights(&descriptors)));
    let data = [std::io::IoSlice::new(b"one, ")];
    rustix::net::sendmsg(
        &theirs,
        &data,
        &mut control,
        rustix::net::SendFlags::empty(),
    )
    .unwrap();
    run_until(&mut reactor, |_| record.data() == b"one, ");
    theirs.write_all(b"two").unwrap();
    run_until(&mut reactor, |_| record.data() == b"one, two");
    assert_eq!(record.take_descriptors().len(), 1);
    let lines = capture::lines("unsupported ancillary data: level 1, type 84");
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert!(lines[0].starts_with("WARN: "), "{lines:?}");
    assert!(lines[0].contains("received by Recorder at unnamed from unnamed"));
    assert_eq!(capture::lines("ancillary").len(), 1);
    drop(theirs);
    run_until(&mut reactor, |_| record.is_lost());
    assert_eq!(record.summary().last().unwrap(), "lost closed cleanly");
    drop((reactor, file));
    ledger.assert_balanced();
}
