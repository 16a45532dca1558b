//! Two protocols, or one and its test, joined by a pump.

use std::cell::RefCell;
use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::fd::AsFd;
use std::rc::Rc;
use std::time::Duration;

use bowline::testing::{
    Delivery, MemoryPackets, MemoryPeer, MemorySocket, MemoryStream, Pump, SimulatedKernel,
};
use bowline::{
    AfterReadClosed, AnyConnection, ConnectionHandle, Context, DescriptorLimits, GracefulStop,
    PassedDescriptor, Producer, ProducerKind, ProducerRef, Protocol, Reactor, TcpTransport,
    Transport, TransportState, Transports, UnixTransport, WriteStatus,
};

use crate::support::{DescriptorLedger, Event, Record, Recorder};

/// Sends everything back.
struct Echo;

impl<T: Transport> Protocol<T> for Echo {
    fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
        let _ = cx.transport.write(data);
    }
}

fn recorded() -> (Record, Recorder) {
    let record = Record::default();
    let recorder = Recorder::new(&record);
    (record, recorder)
}

fn null() -> PassedDescriptor {
    File::open("/dev/null").unwrap().into()
}

#[test]
fn nothing_is_called_before_the_pump_runs() {
    let _ledger = DescriptorLedger::open();
    let (record, recorder) = recorded();
    let mut pump = Pump::new(recorder, Echo).unwrap();
    assert!(record.summary().is_empty());
    pump.run();
    assert_eq!(record.summary(), ["made"]);
    assert!(!pump.turn(), "at rest");
}

#[test]
fn a_megabyte_through_an_echo_comes_back_whole() {
    let ledger = DescriptorLedger::open();
    let (record, recorder) = recorded();
    let mut pump = Pump::new(recorder, Echo).unwrap();
    let sent: Vec<u8> = (0..1_000_000u32).map(|n| (n ^ (n >> 8)) as u8).collect();
    pump.run();
    assert_eq!(pump.first().unwrap().write(&sent), WriteStatus::Full);
    pump.run();
    assert!(record.data() == sent);
    let kernel = pump.kernel().clone();
    drop(pump);
    assert_eq!(kernel.open_sockets(), 0);
    ledger.assert_balanced();
}

/// Contract H-23.
#[test]
fn delivery_is_never_nested_in_the_write() {
    let _ledger = DescriptorLedger::open();
    /// Counts down with its like; checks that it is not inside of itself.
    struct CountDown(bool);

    impl<T: Transport> Protocol<T> for CountDown {
        fn connection_made(&mut self, cx: &mut Context<'_, T>) {
            let _ = cx.transport.write(&[200]);
        }

        fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
            assert!(!std::mem::replace(&mut self.0, true), "nested");
            for byte in data {
                match byte.checked_sub(1) {
                    Some(next) => {
                        let _ = cx.transport.write(&[next]);
                    }
                    None => cx.transport.lose_connection(),
                }
            }
            self.0 = false;
        }
    }

    let mut pump = Pump::new(CountDown(false), CountDown(false)).unwrap();
    pump.run();
    assert!(pump.is_lost());
    assert_eq!(pump.reactor().statistics().panics, 0);
}

/// Contract H-23.
#[test]
fn orderly_close_delivers_everything_and_is_told_to_both() {
    let _ledger = DescriptorLedger::open();
    let ((one, first), (other, second)) = (recorded(), recorded());
    let mut pump = Pump::new(first, second).unwrap();
    pump.run();
    let transport = pump.first().unwrap();
    let _ = transport.write_owned(vec![1; 500_000]);
    transport.lose_connection();
    assert_eq!(transport.state(), TransportState::Closing);
    pump.run();
    assert_eq!(one.summary(), ["made", "lost closed cleanly"]);
    assert_eq!(
        other.summary(),
        ["made", "data 500000", "lost closed cleanly"]
    );
    assert!(pump.is_lost() && pump.first().is_none() && pump.second().is_none());
}

#[test]
fn abort_with_bytes_unread_is_a_reset_for_the_other() {
    let _ledger = DescriptorLedger::open();
    let ((one, first), (other, second)) = (recorded(), recorded());
    let mut pump = Pump::new(first, second).unwrap();
    pump.run();
    pump.first().unwrap().pause_producing();
    let _ = pump.second().unwrap().write(b"never read");
    pump.run();
    pump.first().unwrap().abort_connection();
    pump.run();
    assert_eq!(one.summary(), ["made", "lost aborted by us"]);
    assert_eq!(other.summary(), ["made", "lost connection lost"]);
}

#[test]
fn half_close_lets_the_other_side_finish() {
    let _ledger = DescriptorLedger::open();
    /// Answers when the question is complete.
    #[derive(Default)]
    struct Answer(usize);

    impl<T: Transport> Protocol<T> for Answer {
        fn data_received(&mut self, _: &mut Context<'_, T>, data: &[u8]) {
            self.0 += data.len();
        }

        fn read_connection_lost(&mut self, cx: &mut Context<'_, T>) -> AfterReadClosed {
            let _ = cx.transport.write(self.0.to_string().as_bytes());
            AfterReadClosed::LoseConnection
        }
    }

    let (record, recorder) = recorded();
    let mut pump = Pump::new(recorder, Answer::default()).unwrap();
    pump.run();
    let transport = pump.first().unwrap();
    let _ = transport.write(&[0; 300_000]);
    transport.lose_write_connection();
    pump.run();
    assert_eq!(record.data(), b"300000");
    assert_eq!(
        record.summary(),
        ["made", "write closed", "data 6", "lost closed cleanly"]
    );
}

/// Contract H-23.
#[test]
fn push_producer_is_paused_and_resumed_as_the_peer_reads() {
    let _ledger = DescriptorLedger::open();
    let (record, recorder) = recorded();
    let (mut pump, peer) = Pump::with_peer(recorder).unwrap();
    pump.run();
    let transport = pump.first().unwrap();
    transport
        .register_producer(ProducerRef::Protocol, ProducerKind::Push)
        .unwrap();
    // What the socket holds, and more than the high watermark behind it.
    let _ = transport.write(&[1; 219_264 + 65_536]);
    assert!(!transport.is_producer_paused());
    assert_eq!(transport.write(&[1]), WriteStatus::Full);
    pump.run();
    assert_eq!(record.summary(), ["made", "paused"]);
    assert_eq!(pump.first().unwrap().unsent_bytes(), 65_537);

    // Three quarters are not enough for the socket to say that it has room.
    assert_eq!(peer.receive(4 * 36_544).unwrap().bytes.len(), 4 * 36_544);
    pump.run();
    assert_eq!(record.summary(), ["made", "paused"]);
    assert_eq!(peer.take().bytes.len(), 2 * 36_544);
    pump.run();
    assert_eq!(record.summary(), ["made", "paused", "resumed"]);
    assert_eq!(peer.take().bytes.len(), 65_537);
}

#[test]
fn pull_producer_is_asked_as_fast_as_the_peer_reads() {
    let _ledger = DescriptorLedger::open();
    /// A portion at a time.
    struct Portions(u32);

    impl Producer for Portions {
        fn resume_producing(&mut self, cx: &mut Context<'_, dyn Transport>) {
            if self.0 == 0 {
                cx.transport.unregister_producer();
                cx.transport.lose_connection();
            } else {
                self.0 -= 1;
                let _ = cx.transport.write(&[7; 10_000]);
            }
        }
    }

    let (record, recorder) = recorded();
    let (mut pump, peer) = Pump::with_peer(recorder).unwrap();
    pump.run();
    pump.first()
        .unwrap()
        .register_producer(ProducerRef::boxed(Portions(100)), ProducerKind::Pull)
        .unwrap();
    pump.run();
    let first = peer.take().bytes.len();
    assert!(first < 300_000, "{first} bytes without anybody reading");
    let rest = pump.exchange(&peer, b"").bytes.len();
    assert_eq!(first + rest, 1_000_000);
    assert!(peer.is_at_end());
    assert_eq!(record.summary(), ["made", "lost closed cleanly"]);
}

#[test]
fn paused_reader_holds_the_writer_back() {
    let _ledger = DescriptorLedger::open();
    let ((one, first), (other, second)) = (recorded(), recorded());
    let mut pump = Pump::new(first, second).unwrap();
    pump.run();
    pump.second().unwrap().pause_producing();
    let _ = pump.first().unwrap().write_owned(vec![1; 1_000_000]);
    pump.run();
    assert_eq!(other.data().len(), 0);
    assert_eq!(pump.first().unwrap().unsent_bytes(), 1_000_000 - 219_264);
    pump.second().unwrap().resume_producing();
    pump.run();
    assert_eq!(other.data().len(), 1_000_000);
    assert_eq!(one.summary(), ["made"]);
}

#[test]
fn descriptors_arrive_with_their_bytes_and_are_closed_by_nobody_else() {
    let ledger = DescriptorLedger::open();
    let ((one, first), (other, second)) = (recorded(), recorded());
    let mut pump = Pump::new(first, second).unwrap();
    pump.run();
    let transport = pump.first().unwrap();
    for _ in 0..70 {
        transport.send_file_descriptor(null()).unwrap();
    }
    let _ = transport.write(&[1; 100]);
    transport
        .write_with_descriptors(b"exact", vec![null(), null()])
        .unwrap();
    pump.run();
    assert_eq!(other.take_descriptors().len(), 72);
    assert_eq!(other.data().len(), 105);
    // 64 travel in one message, at most.
    assert_eq!(one.summary(), ["made", "sent 64", "sent 6", "sent 2"]);
    drop(pump);
    ledger.assert_balanced();
}

#[test]
fn descriptors_on_their_way_are_closed_with_the_socket() {
    let ledger = DescriptorLedger::open();
    let (record, recorder) = recorded();
    let (mut pump, peer) = Pump::with_peer(recorder).unwrap();
    pump.run();
    let transport = pump.first().unwrap();
    transport.send_file_descriptor(null()).unwrap();
    let _ = transport.write(b"x");
    pump.run();
    assert_eq!(peer.kernel().unread(peer.id()), (1, 1));
    peer.close();
    pump.run();
    assert_eq!(record.summary(), ["made", "sent 1", "lost connection lost"]);
    drop(pump);
    ledger.assert_balanced();
}

#[test]
fn descriptors_that_nobody_takes_are_closed_and_counted() {
    let ledger = DescriptorLedger::open();
    let (mut pump, peer) = Pump::with_peer(Echo).unwrap();
    let file = File::open("/dev/null").unwrap();
    peer.send_with_descriptors(b"two", &[file.as_fd(), file.as_fd()])
        .unwrap();
    pump.run();
    assert_eq!(peer.take().bytes, b"two");
    assert_eq!(pump.reactor().descriptor_counts().unclaimed, 2);
    drop((pump, file));
    ledger.assert_balanced();
}

#[test]
fn truncated_descriptors_end_the_connection() {
    let _ledger = DescriptorLedger::open();
    let (record, recorder) = recorded();
    let (mut pump, peer) = Pump::with_peer(recorder).unwrap();
    let socket = pump.transports()[0].socket();
    pump.kernel().truncate_descriptors(socket, 1);
    let file = File::open("/dev/null").unwrap();
    peer.send_with_descriptors(b"x", &[file.as_fd(), file.as_fd()])
        .unwrap();
    pump.run();
    assert_eq!(
        record.summary(),
        ["made", "lost received descriptors were truncated to 1"]
    );
}

#[test]
fn lose_connection_within_runs_on_the_manual_clock() {
    let _ledger = DescriptorLedger::open();
    let (record, recorder) = recorded();
    let (mut pump, peer) = Pump::with_peer(recorder).unwrap();
    pump.run();
    let transport = pump.first().unwrap();
    let _ = transport.write_owned(vec![1; 1_000_000]);
    transport.lose_connection_within(Duration::from_secs(30));
    pump.advance(Duration::from_millis(29_999));
    assert!(!record.is_lost());
    pump.advance(Duration::from_millis(1));
    assert_eq!(
        record.summary(),
        [
            "made",
            "lost not everything could be sent before the deadline"
        ]
    );
    assert_eq!(peer.take().bytes.len(), 219_264);
}

#[test]
fn delayed_calls_run_in_order_at_their_own_times() {
    let _ledger = DescriptorLedger::open();
    let mut pump = Pump::with_kernel(SimulatedKernel::new()).unwrap();
    let record = Record::default();
    let start = pump.reactor().now();
    for seconds in [3, 1, 2] {
        let record = record.clone();
        pump.reactor()
            .call_later(Duration::from_secs(seconds), move |reactor| {
                let late = reactor.now() - start;
                record.push(Event::Data(vec![late.as_secs() as u8]));
                reactor.call_later(Duration::ZERO, move |_| record.push(Event::Data(vec![0])));
            });
    }
    pump.advance(Duration::from_secs(10));
    assert_eq!(record.data(), [1, 0, 2, 0, 3, 0]);
    assert_eq!(pump.reactor().now() - start, Duration::from_secs(10));
}

/// Contract S-17, S-28, F-10, M-07.
#[test]
fn failures_on_command_reach_the_transport() {
    let _ledger = DescriptorLedger::open();
    // Later, by a timer: ENOBUFS and ETOOMANYREFS.
    for errno in [105, 109] {
        let (record, recorder) = recorded();
        let (mut pump, peer) = Pump::with_peer(recorder).unwrap();
        let socket = pump.transports()[0].socket();
        let error = io::Error::from_raw_os_error(errno);
        pump.kernel().fail_send(socket, 0, error);
        pump.run();
        let _ = pump.first().unwrap().write(b"late");
        pump.run();
        assert_eq!(peer.take().bytes, b"");
        pump.advance(Duration::from_secs(1));
        assert_eq!(peer.take().bytes, b"late");
        assert!(!record.is_lost());
    }
    // The end: whatever else.
    for kind in [ErrorKind::PermissionDenied, ErrorKind::BrokenPipe] {
        let (record, recorder) = recorded();
        let (mut pump, peer) = Pump::with_peer(recorder).unwrap();
        let socket = pump.transports()[0].socket();
        pump.kernel().fail_read(socket, 1, kind.into());
        peer.send(b"one").unwrap();
        pump.run();
        peer.send(b"two").unwrap();
        pump.run();
        assert_eq!(record.summary(), ["made", "data 3", "lost connection lost"]);

        let (record, recorder) = recorded();
        let (mut pump, peer) = Pump::with_peer(recorder).unwrap();
        let socket = pump.transports()[0].socket();
        pump.kernel().fail_send(socket, 0, kind.into());
        pump.run();
        let _ = pump.first().unwrap().write(b"never sent");
        pump.run();
        assert_eq!(record.summary(), ["made", "lost connection lost"]);
        assert_eq!(peer.take().bytes, b"");
    }
    // Nothing at all: what the transport repeats, and what an event follows.
    for kind in [ErrorKind::Interrupted, ErrorKind::WouldBlock] {
        let (mut pump, peer) = Pump::with_peer(Echo).unwrap();
        let socket = pump.transports()[0].socket();
        pump.kernel().fail_read(socket, 0, kind.into());
        pump.kernel().fail_send(socket, 0, kind.into());
        assert_eq!(pump.exchange(&peer, b"on").bytes, b"on");
    }
}

/// Contract S-13, S-14, S-15, S-18: whatever the kernel puts a send off with, and however
/// many were taken before it, those have left, once; the rest waits in order, with its
/// bytes, and so does the producer.
#[test]
fn send_that_is_put_off_after_others_keeps_the_rest_in_order() {
    let ledger = DescriptorLedger::open();
    let put_off = [
        io::Error::from_raw_os_error(105), // ENOBUFS
        io::Error::from_raw_os_error(109), // ETOOMANYREFS
        ErrorKind::WouldBlock.into(),
    ];
    for error in put_off {
        for taken in 0..5 {
            let is_later = error.raw_os_error().is_some();
            let (record, recorder) = recorded();
            let (mut pump, peer) = Pump::with_peer(recorder).unwrap();
            pump.run();
            let socket = pump.transports()[0].socket();
            let error = match error.raw_os_error() {
                Some(number) => io::Error::from_raw_os_error(number),
                None => error.kind().into(),
            };
            pump.kernel().fail_send(socket, taken, error);
            let transport = pump.first().unwrap();
            transport.set_descriptor_limits(DescriptorLimits::default().per_message(1));
            let files: Vec<_> = (0..5).map(|_| tempfile::tempfile().unwrap()).collect();
            for file in &files {
                let copy = file.try_clone().unwrap();
                transport.send_file_descriptor(copy.into()).unwrap();
            }
            let _ = transport.write(b"abcdefgh");
            pump.turn();
            let sent = taken as u64;
            let transport = pump.first().unwrap();
            assert_eq!(transport.descriptors_sent(), sent);
            assert_eq!(transport.unsent_descriptors(), 5 - taken);
            assert_eq!(transport.unsent_bytes(), 8 - taken);
            // "Would block" is followed by an event, the others by a timer of ours.
            pump.run();
            let waits = pump.first().unwrap().unsent_descriptors();
            assert_eq!(waits, if is_later { 5 - taken } else { 0 });
            pump.advance(Duration::from_secs(1));
            let arrived = peer.take();
            assert_eq!(arrived.bytes, b"abcdefgh");
            let inode = |it: &dyn AsFd| rustix::fs::fstat(it.as_fd()).unwrap().st_ino;
            let received: Vec<_> = arrived.descriptors.iter().map(|it| inode(it)).collect();
            let expected: Vec<_> = files.iter().map(|it| inode(it)).collect();
            assert_eq!(received, expected, "{taken} were taken before");
            assert!(!record.is_lost());
            assert_eq!(pump.first().unwrap().descriptors_sent(), 5);
            assert_eq!(pump.reactor().descriptor_counts().unsent, 0);
        }
    }
    ledger.assert_balanced();
}

/// Contract F-08: a send that the kernel has cut is followed by the next in the same turn,
/// since no event comes for a socket that still has room; and at the end of the turn's
/// budget by the next turn, for the same reason.
#[test]
fn flush_goes_on_until_all_was_taken() {
    let _ledger = DescriptorLedger::open();
    let kernel = SimulatedKernel::new();
    kernel.set_settings(kernel.settings().largest_send(1_000));
    let mut pump = Pump::with_kernel(kernel).unwrap();
    let (record, recorder) = recorded();
    let (transport, peer) = pump.connect(recorder).unwrap();
    pump.run();
    let _ = pump.get(transport).unwrap().write(&[1; 5_000]);
    pump.turn();
    assert_eq!(peer.take().bytes.len(), 5_000);
    // Eight sends in a turn.
    let _ = pump.get(transport).unwrap().write(&[2; 7_000]);
    let _ = pump.get(transport).unwrap().write(&[2; 7_000]);
    for expected in [8_000, 6_000] {
        pump.turn();
        assert_eq!(peer.take().bytes.len(), expected);
    }
    assert_eq!(record.summary(), ["made"]);
}

/// Contract S-18, S-19: what a send before it took is gone, the rest is counted.
#[test]
fn send_that_fails_after_others_keeps_count_of_what_left() {
    let ledger = DescriptorLedger::open();
    let ((one, first), (other, second)) = (recorded(), recorded());
    let mut pump = Pump::new(first, second).unwrap();
    pump.run();
    let socket = pump.transports()[0].socket();
    pump.kernel()
        .fail_send(socket, 2, ErrorKind::BrokenPipe.into());
    let transport = pump.first().unwrap();
    transport.set_descriptor_limits(DescriptorLimits::default().per_message(1));
    for _ in 0..5 {
        transport.send_file_descriptor(null()).unwrap();
    }
    let _ = transport.write(b"abcdefgh");
    pump.run();
    assert_eq!(
        one.summary(),
        ["made", "sent 1", "sent 1", "lost connection lost"]
    );
    assert_eq!(pump.reactor().descriptor_counts().unsent, 3);
    assert_eq!(other.take_descriptors().len(), 2);
    assert_eq!(other.data(), b"ab");
    drop(pump);
    ledger.assert_balanced();
}

#[test]
fn killed_side_is_told_nothing_and_its_peer_everything() {
    let _ledger = DescriptorLedger::open();
    let ((one, first), (other, second)) = (recorded(), recorded());
    let mut pump = Pump::new(first, second).unwrap();
    pump.run();
    let _ = pump.first().unwrap().write(b"last words");
    pump.run();
    let victim = pump.transports()[0];
    pump.kill(victim);
    pump.run();
    assert_eq!(one.summary(), ["made"]);
    assert_eq!(other.summary(), ["made", "data 10", "lost closed cleanly"]);
}

#[test]
fn panic_costs_its_own_side() {
    let _ledger = DescriptorLedger::open();
    struct Faulty;

    impl<T: Transport> Protocol<T> for Faulty {
        fn data_received(&mut self, _: &mut Context<'_, T>, _: &[u8]) {
            panic!("on purpose");
        }
    }

    let (record, recorder) = recorded();
    let mut pump = Pump::new(recorder, Faulty).unwrap();
    pump.run();
    let _ = pump.first().unwrap().write(b"x");
    pump.run();
    assert_eq!(pump.reactor().statistics().panics, 1);
    assert_eq!(record.summary(), ["made", "lost closed cleanly"]);
}

#[test]
fn reactor_that_stops_ends_everything() {
    let _ledger = DescriptorLedger::open();
    let ((one, first), (other, second)) = (recorded(), recorded());
    let mut pump = Pump::new(first, second).unwrap();
    pump.run();
    pump.reactor().stop().unwrap();
    pump.run();
    assert!(one.is_lost() && other.is_lost() && pump.is_lost());
}

#[test]
fn short_reads_and_sends_lose_nothing() {
    let _ledger = DescriptorLedger::open();
    for delivery in [Delivery::Batch, Delivery::OneAtATime, Delivery::Random] {
        let kernel = SimulatedKernel::with_seed(1);
        kernel.set_settings(
            kernel
                .settings()
                .largest_read(7)
                .largest_send(11)
                .cut_percent(50)
                .delivery(delivery),
        );
        let mut pump = Pump::with_kernel(kernel).unwrap();
        let (record, recorder) = recorded();
        pump.join(recorder, Echo).unwrap();
        pump.run();
        let sent: Vec<u8> = (0..2_000u32).map(|n| n as u8).collect();
        let _ = pump.first().unwrap().write(&sent);
        pump.run();
        assert!(record.data() == sent);
    }
}

#[test]
fn protocols_are_reached_through_the_reactor() {
    let _ledger = DescriptorLedger::open();
    let (record, recorder) = recorded();
    let (mut pump, _peer) = Pump::with_peer(recorder).unwrap();
    pump.run();
    let handle = pump.transports()[0].transport();
    pump.reactor()
        .call_protocol::<MemoryStream, Recorder>(handle, |recorder, cx| {
            recorder.record.push(Event::ReadClosed);
            cx.transport.abort_connection();
        });
    pump.run();
    assert_eq!(
        record.summary(),
        ["made", "read closed", "lost aborted by us"]
    );
}

#[test]
fn memory_transport_is_detached_and_put_together_again_elsewhere() {
    let _ledger = DescriptorLedger::open();
    let (record, recorder) = recorded();
    let (mut pump, peer) = Pump::with_peer(recorder).unwrap();
    let mut elsewhere = Pump::with_kernel(pump.kernel().clone()).unwrap();
    pump.run();
    peer.send(b"before").unwrap();
    pump.run();
    let handle = pump.transports()[0].transport();
    let detached = Rc::new(RefCell::new(None));
    let taken = Rc::clone(&detached);
    pump.reactor().detach::<Recorder>(handle, move |_, result| {
        *taken.borrow_mut() = result.ok();
    });
    pump.run();
    assert!(pump.is_lost());
    peer.send(b" between").unwrap();
    let detached = detached.take().expect("it was open");
    let again = elsewhere
        .reactor()
        .reattach::<MemoryStream, _>(detached)
        .unwrap();
    elsewhere.run();
    peer.send(b" after").unwrap();
    elsewhere.run();
    assert_eq!(record.data(), b"before between after");
    assert!(!record.is_lost());
    elsewhere
        .reactor()
        .get(again)
        .expect("it is there")
        .lose_connection();
    elsewhere.run();
    assert!(peer.is_at_end());
}

#[test]
fn simulated_socket_is_open_while_a_descriptor_stands_for_it() {
    let _ledger = DescriptorLedger::open();
    let kernel = SimulatedKernel::new();
    let (one, other) = kernel.pair();
    let peer = MemoryPeer::new(other);
    let fd = one.into_descriptor().unwrap();
    let copy = fd.try_clone().unwrap();
    peer.send(b"kept").unwrap();
    drop(fd);
    assert_eq!(kernel.open_sockets(), 2);
    let back = MemoryPeer::new(MemorySocket::from_descriptor(copy).unwrap());
    assert_eq!(back.take().bytes, b"kept");
    drop(back);
    assert_eq!(kernel.open_sockets(), 1);
    assert!(peer.is_at_end());

    let other_file = File::open("/dev/null").unwrap();
    assert!(MemorySocket::from_descriptor(other_file.into()).is_err());
}

#[test]
fn several_reactors_share_a_kernel_and_a_reactor_has_one() {
    let _ledger = DescriptorLedger::open();
    let kernel = SimulatedKernel::new();
    let (here, there) = kernel.pair();
    let (record, recorder) = recorded();
    let mut pump = Pump::with_kernel(kernel).unwrap();
    let mut reactor = Reactor::new().unwrap();
    here.adopt(pump.reactor(), Echo).unwrap();
    there.adopt(&mut reactor, recorder).unwrap();
    reactor.turn(Some(Duration::ZERO));
    let _ = reactor.get(record.handle(0)).unwrap().write(b"across");
    reactor.turn(Some(Duration::ZERO));
    pump.run();
    reactor.turn(Some(Duration::ZERO));
    assert_eq!(record.data(), b"across");

    let (foreign, _peer) = SimulatedKernel::new().pair();
    let error = foreign.adopt(&mut reactor, Echo).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    assert_eq!(reactor.registered(), 1);
}

#[test]
#[should_panic(expected = "the protocol does not read")]
fn exchange_says_when_a_protocol_does_not_read() {
    let _ledger = DescriptorLedger::open();
    let (_, recorder) = recorded();
    let (mut pump, peer) = Pump::with_peer(recorder).unwrap();
    pump.run();
    pump.first().unwrap().pause_producing();
    pump.exchange(&peer, &[0; 1_000_000]);
}

/// Answers each byte with two.
struct Twice;

impl<T: Transport> Protocol<T> for Twice {
    fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
        for byte in data {
            cx.transport.write(&[*byte, *byte]);
        }
    }
}

/// A send that is tried again later is no rest.
#[test]
fn exchange_answers_everything_although_calls_fail_in_passing() {
    let _ledger = DescriptorLedger::open();
    for percent in [5, 20, 50, 90] {
        for seed in 0..100 {
            let kernel = SimulatedKernel::with_seed(seed);
            let mut settings = kernel.settings();
            settings.passing_errors_percent = percent;
            kernel.set_settings(settings);
            let mut pump = Pump::with_kernel(kernel).unwrap();
            let (_, peer) = pump.connect(Twice).unwrap();
            for _ in 0..3 {
                let answer = pump.exchange(&peer, b"hello").bytes;
                assert_eq!(answer, b"hheelllloo", "{percent} %, seed {seed}");
            }
        }
    }
}

/// Sets what only TCP has, and says who is there.
struct OverTcp;

impl<T: TcpTransport> Protocol<T> for OverTcp {
    fn connection_made(&mut self, cx: &mut Context<'_, T>) {
        assert!(!cx.transport.no_delay().unwrap() && !cx.transport.keep_alive().unwrap());
        cx.transport.set_no_delay(true).unwrap();
        cx.transport.set_keep_alive(true).unwrap();
        let minute = Duration::from_secs(60);
        cx.transport
            .set_keep_alive_times(minute, minute, 3)
            .unwrap();
        assert!(cx.transport.no_delay().unwrap() && cx.transport.keep_alive().unwrap());
        let who = format!("{} to {}", cx.transport.peer(), cx.transport.host());
        cx.transport.write(who.as_bytes());
    }

    fn data_received(&mut self, cx: &mut Context<'_, T>, _: &[u8]) {
        cx.transport.abort_connection();
        let lost = cx.transport.no_delay().map_err(|error| error.kind());
        assert_eq!(lost, Err(ErrorKind::NotConnected));
    }
}

#[test]
fn protocols_of_tcp_run_in_memory_and_are_shown_addresses() {
    let _ledger = DescriptorLedger::open();
    let mut pump = Pump::with_kernel(SimulatedKernel::new()).unwrap();
    let host = ([192, 0, 2, 1], 80).into();
    for port in [4321, 4322] {
        let peer = ([192, 0, 2, 7], port).into();
        let (_, client) = pump.connect_tcp(OverTcp, host, peer).unwrap();
        pump.run();
        let said = String::from_utf8(client.take().bytes).unwrap();
        assert_eq!(said, format!("192.0.2.7:{port} to 192.0.2.1:80"));
        client.send(b"x").unwrap();
        pump.run();
        assert!(client.is_at_end());
    }
}

/// Nothing looks at a connection that drains while only an event of its own can bring its
/// end nearer: no timer is set, and the quiet time counts from that event.
#[test]
fn a_paused_connection_that_drains_is_not_looked_at() {
    let _ledger = DescriptorLedger::open();
    let (record, recorder) = recorded();
    let (mut pump, _peer) = Pump::with_peer(recorder.clone()).unwrap();
    let (ours, _theirs) = pump.kernel().pair_of_packets();
    let packets = pump.reactor().adopt(MemoryPackets, ours, recorder).unwrap();
    pump.run();
    let stream = pump.first().unwrap().connection_handle();
    let packets = pump.reactor().get(packets).unwrap().connection_handle();
    let lost = |record: &Record| record.count(|event| matches!(event, Event::Lost(_)));
    for each in [stream, packets] {
        get(&mut pump, each).pause_producing();
    }
    let stop = GracefulStop::new();
    pump.reactor().stop_gracefully(stop).unwrap();
    pump.run();
    // That of the stop itself.
    assert_eq!(pump.reactor().delayed_calls().count(), 1);
    pump.advance(Duration::from_secs(5));
    assert_eq!(lost(&record), 0);
    for each in [stream, packets] {
        get(&mut pump, each).resume_producing();
    }
    pump.advance(Duration::from_millis(499));
    assert_eq!(lost(&record), 0);
    pump.advance(Duration::from_millis(1));
    assert_eq!(lost(&record), 2);
}

fn get(pump: &mut Pump, connection: ConnectionHandle) -> &mut dyn AnyConnection {
    pump.reactor().get(connection).expect("it is open")
}
