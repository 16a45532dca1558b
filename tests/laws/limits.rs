//! Every value of what limits a kind, a framing, a child or a stop is taken, as those of
//! reactors and connections are.

use std::cell::{Cell, RefCell};
use std::fs::File;
use std::rc::Rc;
use std::time::Duration;

use bowline::framing::{
    FrameContext, FrameEncoder, FrameReceiver, Framed, Framer, FramingError, LengthPrefixedFramer,
    LineFramer, NetstringFramer, Pairing, Unclaimed,
};
use bowline::process::{ChildCommand, CollectOutput, ProcessSettings};
use bowline::{
    Address, CloseReason, Context, Datagram, DatagramProtocol, DatagramTransport, GracefulStop,
    LingeringClose, Packet, PacketProtocol, PacketTransport, Protocol, QueueLimits, Reactor, Tcp,
    Transport, Transports, Udp, UnixDatagram, UnixSeqpacket, UnixStream,
};

use crate::settings::{Talks, Value, talks};
use crate::support::{DescriptorLedger, Record, Recorder, run_until, run_until_quiet, socketpair};

/// TCP has some of its own, and so does a name that is looked up.
#[test]
fn any_value_of_a_setting_of_tcp_is_taken() {
    let ledger = DescriptorLedger::open();
    for value in [Value::Zero, Value::Largest] {
        for to_host in [false, true] {
            let mut reactor = Reactor::new().unwrap();
            reactor.start().unwrap();
            let record = Record::default();
            let recorder = Recorder::new(&record);
            let endpoint = Tcp::at(([127, 0, 0, 1], 0).into()).backlog(value.number());
            let served = move |_: &Address| Lingers(value, recorder.clone());
            let listener = reactor.listen(endpoint, served).unwrap();
            let address = reactor.get(listener).unwrap().address();
            let address = address.as_inet().unwrap();
            let to = match to_host {
                false => Tcp::to(address),
                true => Tcp::to_host("127.0.0.1", address.port()),
            };
            let to = to.timeout(value.time()).attempt_delay(value.time());
            reactor.connect(to, talks).unwrap();
            if value == Value::Largest {
                run_until(&mut reactor, |_| record.data() == b"hello\r\n");
            }
            stop_with(&mut reactor, value);
        }
    }
    ledger.assert_balanced();
}

/// Waits for its peer when it closes.
struct Lingers(Value, Recorder);

impl<T: Transport> Protocol<T> for Lingers
where
    Recorder: Protocol<T>,
{
    fn connection_made(&mut self, cx: &mut Context<'_, T>) {
        let limits = LingeringClose::default()
            .time(self.0.time())
            .bytes(self.0.size());
        cx.transport.set_lingering_close(Some(limits));
        Protocol::connection_made(&mut self.1, cx);
    }
    fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
        self.1.data_received(cx, data);
        cx.transport.lose_connection();
    }
    fn connection_lost(&mut self, cx: &mut Context<'_, T>, reason: &CloseReason) {
        Protocol::connection_lost(&mut self.1, cx, reason);
    }
}

/// Stops, with limits of this value, what has nothing to wait for.
fn stop_with(reactor: &mut Reactor, value: Value) {
    let how = GracefulStop::new()
        .deadline(value.time())
        .grace(value.of(Duration::ZERO, Duration::from_millis(1)));
    reactor.stop_gracefully(how).unwrap();
    run_until(reactor, |reactor| !reactor.is_running());
    assert_eq!(reactor.statistics().panics, 0);
}

/// A grace for ever is one up to the deadline.
#[test]
fn any_value_of_a_setting_of_a_graceful_stop_is_taken() {
    let ledger = DescriptorLedger::open();
    for (deadline, grace) in [
        (Duration::ZERO, Duration::MAX),
        (Duration::from_millis(5), Duration::MAX),
        (Duration::MAX, Duration::ZERO),
        (Duration::ZERO, Duration::ZERO),
    ] {
        let mut reactor = Reactor::new().unwrap();
        reactor.start().unwrap();
        let (ours, peer) = socketpair();
        reactor.adopt_unix_stream(ours.into(), Talks).unwrap();
        reactor.turn(Some(Duration::ZERO));
        let how = GracefulStop::new().deadline(deadline).grace(grace);
        reactor.stop_gracefully(how).unwrap();
        run_until(&mut reactor, |reactor| !reactor.is_running());
        assert_eq!(reactor.statistics().panics, 0);
        drop(peer);
    }
    ledger.assert_balanced();
}

/// Notes what it is sent, and sends it back.
#[derive(Clone, Default)]
struct Frames(Rc<RefCell<Vec<String>>>);

impl<F: Framer> FrameReceiver<UnixStream, F> for Frames
where
    F: FrameEncoder<Header = ()>,
{
    fn frame_received(&mut self, cx: &mut FrameContext<'_, UnixStream, F>, frame: &[u8]) {
        let frame = String::from_utf8_lossy(frame).into_owned();
        let _ = cx.send_frame(frame.as_bytes());
        self.0.borrow_mut().push(frame);
    }

    fn framing_failed(
        &mut self,
        _: &mut FrameContext<'_, UnixStream, F>,
        error: FramingError,
        _: &[u8],
    ) {
        self.0.borrow_mut().push(format!("failed: {error}"));
    }
}

/// Has the peer send `sent`, in two pieces, with a descriptor.
fn receives<F>(framer: F, sent: &[u8], value: Value, pairing: Pairing) -> Vec<String>
where
    F: Framer + FrameEncoder<Header = ()> + 'static,
{
    let mut reactor = Reactor::new().unwrap();
    reactor.start().unwrap();
    let frames = Frames::default();
    let framed = Framed::new(framer, frames.clone())
        .pairing(pairing)
        .max_descriptors(value.size())
        .max_waiting(value.size())
        .descriptor_deadline(Some(value.time()));
    let (ours, theirs) = socketpair();
    reactor.adopt_unix_stream(ours.into(), framed).unwrap();
    let peer = reactor
        .adopt_unix_stream(theirs.into(), Recorder::default())
        .unwrap();
    let (first, rest) = sent.split_at(1);
    let null = File::open("/dev/null").unwrap().into();
    let it = reactor.get(peer).unwrap();
    it.write_with_descriptors(first, vec![null]).unwrap();
    run_until_quiet(&mut reactor);
    if let Some(it) = reactor.get(peer) {
        it.write(rest);
    }
    run_until_quiet(&mut reactor);
    assert_eq!(reactor.statistics().panics, 0, "{value:?}");
    frames.0.take()
}

#[test]
fn any_value_of_a_setting_of_a_framing_is_taken() {
    let ledger = DescriptorLedger::open();
    let pairings = [
        Pairing::Loose,
        Pairing::Exact,
        Pairing::Claimed(Unclaimed::Wait),
    ];
    for value in [Value::Zero, Value::Largest] {
        for pairing in pairings {
            let longest = value.size();
            let all = [
                receives(
                    LineFramer::new().with_max_length(longest),
                    b"hello\r\nagain\r\n",
                    value,
                    pairing,
                ),
                receives(
                    NetstringFramer::new().with_max_length(longest),
                    b"5:hello,5:again,",
                    value,
                    pairing,
                ),
                receives(
                    LengthPrefixedFramer::u32().with_max_length(longest),
                    b"\0\0\0\x05hello\0\0\0\x05again",
                    value,
                    pairing,
                ),
                // The largest that they can say.
                receives(
                    LengthPrefixedFramer::u32().with_max_length(longest),
                    &[0xff; 20],
                    value,
                    pairing,
                ),
                receives(
                    NetstringFramer::new().with_max_length(longest),
                    b"18446744073709551615:hello,",
                    value,
                    pairing,
                ),
            ];
            if value == Value::Largest && !matches!(pairing, Pairing::Exact) {
                for told in &all[..3] {
                    assert_eq!(told, &["hello", "again"], "{pairing:?}");
                }
            }
        }
    }
    ledger.assert_balanced();
}

/// Sends back what it gets, and counts it.
#[derive(Clone, Default)]
struct Returns(Rc<Cell<usize>>);

impl<T: DatagramTransport> DatagramProtocol<T> for Returns {
    fn datagram_received(&mut self, cx: &mut Context<'_, T>, datagram: &mut Datagram<'_>) {
        self.0.set(self.0.get() + 1);
        cx.transport.send_to(datagram.data, datagram.from);
    }
}

/// Asks once.
struct Asks(Value, Returns);

impl<T: DatagramTransport> DatagramProtocol<T> for Asks {
    fn started(&mut self, cx: &mut Context<'_, T>) {
        cx.transport.set_queue_limits(queue(self.0));
        cx.transport.send(b"hello");
    }
    fn datagram_received(&mut self, _: &mut Context<'_, T>, _: &mut Datagram<'_>) {
        self.1.0.set(self.1.0.get() + 1);
    }
}

fn queue(value: Value) -> QueueLimits {
    QueueLimits::default()
        .full(value.size())
        .full_bytes(value.size())
        .most(value.size())
        .most_bytes(value.size())
}

#[test]
fn any_value_of_a_setting_of_datagrams_is_taken() {
    let ledger = DescriptorLedger::open();
    for value in [Value::Zero, Value::Largest] {
        let directory = tempfile::tempdir().unwrap();
        let mut reactor = Reactor::new().unwrap();
        reactor.start().unwrap();
        let (size, answers) = (value.size(), Returns::default());
        let asks = || Asks(value, answers.clone());
        let at = Udp::at(([127, 0, 0, 1], 0).into());
        let at = at.max_datagram(size).send_buffer(size).receive_buffer(size);
        let here = reactor.listen(at, Returns::default()).unwrap();
        let address = reactor.get(here).unwrap().host();
        let to = Udp::to(address.as_inet().unwrap());
        let to = to.max_datagram(size).send_buffer(size).receive_buffer(size);
        reactor.connect(to, asks()).unwrap();
        let path = directory.path().join("socket");
        let at = UnixDatagram::at(&*path).max_datagram(size);
        let at = at.send_buffer(size).mode(0o600);
        reactor.listen(at, Returns::default()).unwrap();
        let to = UnixDatagram::to(&*path)
            .bind_address(bowline::UnixAddress::Unnamed)
            .max_datagram(size)
            .send_buffer(size);
        reactor.connect(to, asks()).unwrap();
        match value {
            Value::Largest => run_until(&mut reactor, |_| answers.0.get() == 2),
            Value::Zero => run_until_quiet(&mut reactor),
        }
        assert_eq!(reactor.statistics().panics, 0, "{value:?}");
        drop((reactor, directory));
    }
    ledger.assert_balanced();
}

/// Sends, and returns what comes.
#[derive(Clone)]
struct Packets(Value, Returns);

impl<T: PacketTransport> PacketProtocol<T> for Packets {
    fn connection_made(&mut self, cx: &mut Context<'_, T>) {
        cx.transport.set_queue_limits(queue(self.0));
        cx.transport.send(b"hello");
    }
    fn packet_received(&mut self, _: &mut Context<'_, T>, _: &mut Packet<'_>) {
        self.1.0.set(self.1.0.get() + 1);
    }
}

#[test]
fn any_value_of_a_setting_of_packets_is_taken() {
    let ledger = DescriptorLedger::open();
    for value in [Value::Zero, Value::Largest] {
        let directory = tempfile::tempdir().unwrap();
        let mut reactor = Reactor::new().unwrap();
        reactor.start().unwrap();
        let (size, answers) = (value.size(), Returns::default());
        let packets = Packets(value, answers.clone());
        let served = packets.clone();
        let path = directory.path().join("socket");
        let at = UnixSeqpacket::at(&*path).max_packet(size).send_buffer(size);
        let at = at.backlog(value.number()).mode(0o600);
        reactor
            .listen(at, move |_: &Address| served.clone())
            .unwrap();
        let to = UnixSeqpacket::to(&*path).max_packet(size).send_buffer(size);
        let to = to.timeout(value.time());
        reactor
            .connect(to, move |_: &Address| packets.clone())
            .unwrap();
        match value {
            Value::Largest => run_until(&mut reactor, |_| answers.0.get() == 2),
            Value::Zero => run_until_quiet(&mut reactor),
        }
        assert_eq!(reactor.statistics().panics, 0, "{value:?}");
        drop((reactor, directory));
    }
    ledger.assert_balanced();
}

/// A child that says a word and ends.
#[test]
fn any_value_of_a_setting_of_a_child_is_taken() {
    let ledger = DescriptorLedger::open();
    for value in [Value::Zero, Value::Largest] {
        let mut reactor = Reactor::new().unwrap();
        reactor.start().unwrap();
        let time = value.time();
        let settings = ProcessSettings::default()
            .time_limit(Some(time))
            .grace(time)
            .streams_after_exit(Some(time))
            .stop_within(Some(time));
        let mut command = std::process::Command::new("echo");
        command.arg("hello");
        let child = ChildCommand::new(command).settings(settings);
        let ended = Rc::new(RefCell::new(None));
        let told = Rc::clone(&ended);
        let collect = CollectOutput::new(move |_, output| *told.borrow_mut() = Some(output));
        reactor
            .spawn_process(child, collect.limit(value.size()))
            .unwrap();
        run_until(&mut reactor, |_| ended.borrow().is_some());
        let output = ended.take().unwrap();
        if value == Value::Largest {
            assert_eq!(output.stdout, b"hello\n");
        }
        assert_eq!(reactor.statistics().panics, 0, "{value:?}");
        reactor.stop().unwrap();
        run_until(&mut reactor, |reactor| !reactor.is_running());
    }
    ledger.assert_balanced();
}
