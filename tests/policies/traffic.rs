//! What connections receive and are written, in the log (H-22).

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;

use bowline::policies::TrafficLog;
use bowline::testing::{MemoryPacketPeer, MemoryPackets, Pump, SimulatedKernel};
use bowline::{
    Address, AfterReadClosed, CloseReason, Context, Packet, PacketProtocol, PacketTransport,
    Protocol, Reactor, Transports, UnixTransport,
};

use crate::capture;
use crate::support::{DescriptorLedger, Record, Recorder, run_until, run_until_quiet, socketpair};

/// The lines of the connection with this number.
fn lines(number: u64) -> Vec<String> {
    let prefix = format!("DEBUG: {number}: ");
    let lines = capture::lines(&prefix).into_iter();
    lines.map(|line| line[prefix.len()..].to_owned()).collect()
}

/// Answers in every way that there is to write.
struct Writes;

impl<T: UnixTransport> Protocol<T> for Writes {
    fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
        cx.transport.write(data);
        cx.transport.write_sequence(&[b"in ", b"", b"parts"]);
        cx.transport.write_owned(vec![b'o'; 100]);
        let file = File::open("/dev/null").unwrap();
        cx.transport
            .write_with_descriptors(b"with one", vec![file.into()])
            .unwrap();
        // More than is copied: it may go to the kernel at once.
        cx.transport.write(&[0; 20_000]);
        cx.transport.write(b"");
    }

    fn read_connection_lost(&mut self, _: &mut Context<'_, T>) -> AfterReadClosed {
        AfterReadClosed::LoseConnection
    }

    fn connection_lost(&mut self, cx: &mut Context<'_, T>, _: &CloseReason) {
        cx.transport.write(b"too late, and refused");
    }
}

/// H-22: direction, number, and what is shown of the bytes.
#[test]
fn each_event_has_a_line_with_its_direction_number_and_bytes() {
    let ledger = DescriptorLedger::open();
    capture::start();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let mut reactor = Reactor::new().unwrap();
    let factory = TrafficLog::new(|_: &Address| Writes);
    reactor.listen_unix(path.clone(), factory).unwrap();
    let mut clients = Vec::new();
    for number in 1..=2 {
        clients.push(std::os::unix::net::UnixStream::connect(&path).unwrap());
        run_until(&mut reactor, |_| lines(number).len() == 1);
    }
    let second = &mut clients[1];
    second.write_all(b"\0text \"quoted\"\n").unwrap();
    run_until(&mut reactor, |_| lines(2).len() >= 9);
    second.shutdown(std::net::Shutdown::Write).unwrap();
    let mut received = Vec::new();
    std::thread::scope(|scope| {
        scope.spawn(|| second.read_to_end(&mut received).unwrap());
        run_until(&mut reactor, |_| {
            lines(2).last().unwrap().starts_with("lost")
        });
    });
    assert_eq!(
        lines(2),
        [
            "made with unnamed".to_owned(),
            r#"received 15 bytes "\x00text \"quoted\"\n""#.to_owned(),
            r#"written 15 bytes "\x00text \"quoted\"\n""#.to_owned(),
            r#"written 3 bytes "in ""#.to_owned(),
            r#"written 5 bytes "parts""#.to_owned(),
            format!(r#"written 100 bytes "{}"..."#, "o".repeat(64)),
            r#"written 8 bytes "with one""#.to_owned(),
            format!(r#"written 20000 bytes "{}"..."#, r"\x00".repeat(64)),
            "sent 1 descriptors".to_owned(),
            "the peer writes no more".to_owned(),
            "lost: closed cleanly".to_owned(),
        ]
    );
    // Every byte that was said to be written has arrived.
    assert_eq!(received.len(), 15 + 8 + 100 + 8 + 20_000);
    assert_eq!(lines(1), ["made with unnamed"]);
    drop((reactor, clients, directory));
    ledger.assert_balanced();
}

/// H-22, H-21: what others write, what is received with descriptors, and as much
/// as one wants to see.
#[test]
fn writes_of_others_are_there_and_content_only_if_wanted() {
    let ledger = DescriptorLedger::open();
    capture::start();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let mut reactor = Reactor::new().unwrap();
    let record = Record::default();
    let recorder = Recorder::new(&record);
    let factory = TrafficLog::new(move |_: &Address| recorder.clone()).shown_bytes(0);
    reactor.listen_unix(path.clone(), factory).unwrap();
    let (ours, sender) = socketpair();
    let client = std::os::unix::net::UnixStream::connect(&path).unwrap();
    run_until(&mut reactor, |_| !record.summary().is_empty());
    reactor.get(record.handle(0)).unwrap().write(b"secret");
    reactor
        .adopt_unix_stream(client.into(), Passes(Some(sender.into())))
        .unwrap();
    run_until(&mut reactor, |_| record.data() == b"secret too");
    run_until_quiet(&mut reactor);
    assert_eq!(record.take_descriptors().len(), 1);
    assert_eq!(
        lines(1),
        [
            "made with unnamed",
            "written 6 bytes",
            "received 1 descriptors and 10 bytes",
        ]
    );
    assert!(capture::lines("secret").is_empty());
    drop((reactor, ours, directory));
    ledger.assert_balanced();
}

/// Passes its descriptor on.
struct Passes(Option<std::os::fd::OwnedFd>);

impl<T: UnixTransport> Protocol<T> for Passes {
    fn connection_made(&mut self, cx: &mut Context<'_, T>) {
        let fd = self.0.take().expect("made once");
        cx.transport
            .write_with_descriptors(b"secret too", vec![fd.into()])
            .unwrap();
    }

    fn data_received(&mut self, _: &mut Context<'_, T>, _: &[u8]) {}
}

/// Answers a packet in every way that there is to send.
struct SendsPackets;

impl<T: PacketTransport> PacketProtocol<T> for SendsPackets {
    fn packet_received(&mut self, cx: &mut Context<'_, T>, packet: &mut Packet<'_>) {
        cx.transport.send(packet.data);
        cx.transport.send_sequence(&[b"in ", b"", b"parts"]);
        let file = File::open("/dev/null").unwrap();
        cx.transport
            .send_with_descriptors(b"", vec![file.into()])
            .unwrap();
    }

    fn connection_lost(&mut self, cx: &mut Context<'_, T>, _: &CloseReason) {
        cx.transport.send(b"too late, and refused");
    }
}

/// H-22: the same over packets, each of which is a line.
#[test]
fn each_packet_has_a_line_with_its_direction_number_and_bytes() {
    let ledger = DescriptorLedger::open();
    capture::start();
    let mut pump = Pump::with_kernel(SimulatedKernel::new()).unwrap();
    let kernel = pump.kernel().clone();
    let factory = TrafficLog::new(|_: &Address| SendsPackets).shown_bytes(4);
    pump.reactor()
        .listen(MemoryPackets::at(&kernel, "packets"), factory)
        .unwrap();
    let peer = MemoryPacketPeer::connect(&kernel, "packets").unwrap();
    let file = File::open("/dev/null").unwrap();
    peer.send(b"hello").unwrap();
    peer.send_with_descriptors(b"", &[file.as_fd()]).unwrap();
    pump.run();
    let mut received = 0;
    while peer.receive().is_ok_and(|it| it.is_some()) {
        received += 1;
    }
    assert_eq!(received, 6);
    drop(peer);
    pump.run();
    let answer = |of: &str| {
        [
            of.to_owned(),
            r#"written 8 bytes "in p"..."#.into(),
            "written 0 bytes".into(),
        ]
    };
    let mut expected = vec!["made with unnamed".to_owned()];
    expected.push(r#"received a packet of 5 bytes "hell"..."#.into());
    expected.extend(answer(r#"written 5 bytes "hell"..."#));
    expected.push("received 1 descriptors with a packet of 0 bytes".into());
    expected.extend(answer("written 0 bytes"));
    expected.push("the peer writes no more".into());
    expected.push("lost: closed cleanly".into());
    assert_eq!(lines(1), expected);
    drop((pump, kernel, file));
    ledger.assert_balanced();
}
