//! The figures: 253 descriptors in a message, 10,000 in a row, 300,000 bytes
//! with descriptors at known positions, and floods both ways. Each descriptor
//! arrives once, in order, and never after its bytes.

use std::cell::{Cell, RefCell};
use std::os::fd::OwnedFd;
use std::rc::Rc;

use bowline::{
    Context, DescriptorLimits, PassedDescriptor, Protocol, Reactor, ReceivedDescriptors, Transport,
    Transports, UnixStream, UnixTransport,
};

use crate::peer::{
    Identity, MOST, adopt, file, files, identities, identity, raise_descriptor_limit, receive,
    send_message, shrink_send_buffer, transport,
};
use crate::support::{DescriptorLedger, Record, Recorder, run_until, run_until_quiet, socketpair};

/// S-26, W-05.
#[test]
fn one_message_carries_253_descriptors_from_us_and_to_us() {
    let ledger = DescriptorLedger::open();
    {
        let record = Record::default();
        let mut reactor = Reactor::new().unwrap();
        let (handle, peer) = adopt(&mut reactor, Recorder::new(&record));
        let (sent, expected) = files(MOST);
        let passed = sent.into_iter().map(PassedDescriptor::from).collect();
        transport(&mut reactor, handle)
            .write_with_descriptors(b"all of them", passed)
            .unwrap();
        run_until_quiet(&mut reactor);
        let message = receive(&peer, 100).unwrap();
        assert_eq!(message.contents(), (&b"all of them"[..], expected.clone()));
        // And back.
        send_message(&peer, b"returned", &message.descriptors);
        drop(message);
        run_until_quiet(&mut reactor);
        assert_eq!(identities(&record.take_descriptors()), expected);
        assert_eq!(record.data(), b"returned");
    }
    ledger.assert_balanced();
}

/// What one end has received, and closed at once.
#[derive(Default)]
struct Arrived {
    bytes: Vec<u8>,
    /// Each descriptor, with where in the stream the read began and ended that
    /// brought it.
    descriptors: Vec<(Identity, usize, usize)>,
}

struct Counting(Rc<RefCell<Arrived>>);

impl<T: UnixTransport> Protocol<T> for Counting {
    fn data_received(&mut self, _: &mut Context<'_, T>, data: &[u8]) {
        self.0.borrow_mut().bytes.extend_from_slice(data);
    }

    fn descriptors_received(
        &mut self,
        _: &mut Context<'_, T>,
        descriptors: &mut ReceivedDescriptors<'_>,
        data: &[u8],
    ) {
        let mut arrived = self.0.borrow_mut();
        let start = arrived.bytes.len();
        arrived.bytes.extend_from_slice(data);
        let end = arrived.bytes.len();
        for fd in descriptors {
            arrived.descriptors.push((identity(fd), start, end));
        }
    }
}

#[test]
fn ten_thousand_descriptors_in_a_row_arrive_once_and_in_order() {
    const COUNT: usize = 10_000;
    let ledger = DescriptorLedger::open();
    raise_descriptor_limit();
    {
        let arrived = Rc::new(RefCell::new(Arrived::default()));
        let mut reactor = Reactor::new().unwrap();
        let (ours, theirs) = socketpair();
        let sender = reactor
            .adopt_unix_stream(ours.into(), Recorder::default())
            .unwrap();
        reactor
            .adopt_unix_stream(theirs.into(), Counting(Rc::clone(&arrived)))
            .unwrap();
        let mut expected = Vec::new();
        let it = transport(&mut reactor, sender);
        for _ in 0..COUNT {
            let fd = file();
            expected.push(identity(&fd));
            it.send_file_descriptor(fd.into()).unwrap();
        }
        let data: Vec<u8> = (0..COUNT as u32).map(|n| (n % 251) as u8).collect();
        it.write(&data);
        run_until(&mut reactor, |_| arrived.borrow().bytes.len() == COUNT);
        let arrived = arrived.borrow();
        assert!(arrived.bytes == data);
        let received: Vec<_> = arrived.descriptors.iter().map(|it| it.0).collect();
        assert_eq!(received.len(), COUNT);
        assert!(received == expected, "each once and in order");
        // The n-th claimed the n-th byte.
        for (claimed, (_, start, _)) in arrived.descriptors.iter().enumerate() {
            assert!(*start <= claimed, "{claimed} arrived at {start}");
        }
        let counts = reactor.descriptor_counts();
        let all = COUNT as u64;
        assert_eq!(
            (counts.passed, counts.received, counts.unsent),
            (all, all, 0)
        );
    }
    ledger.assert_balanced();
}

/// Where in 300,000 bytes descriptors stand: on either side of the sizes at
/// which sends and reads are cut, close together, and at both ends.
fn positions() -> Vec<usize> {
    let mut all: Vec<usize> = (0..300_000).step_by(997).collect();
    for cut in [2_304, 4_608, 36_544, 65_536, 131_072, 219_264, 299_990] {
        all.extend(cut - 3..cut + 4);
    }
    all.push(299_999);
    all.sort_unstable();
    all.dedup();
    all
}

const BYTES: usize = 300_000;

/// Writes the stream as `write` wants it, through the smallest send buffer, and
/// answers what arrived.
fn stream_of_300_000(
    write: impl FnOnce(&mut dyn UnixTransport, &[u8], &[usize], Vec<OwnedFd>),
) -> (Vec<usize>, Arrived) {
    raise_descriptor_limit();
    let positions = positions();
    let (sent, expected) = files(positions.len());
    let data: Vec<u8> = (0..BYTES as u32).map(|n| (n % 241) as u8).collect();
    let arrived = Rc::new(RefCell::new(Arrived::default()));
    let mut reactor = Reactor::new().unwrap();
    let (ours, theirs) = socketpair();
    shrink_send_buffer(&ours);
    let sender = reactor
        .adopt_unix_stream(ours.into(), Recorder::default())
        .unwrap();
    reactor
        .adopt_unix_stream(theirs.into(), Counting(Rc::clone(&arrived)))
        .unwrap();
    write(transport(&mut reactor, sender), &data, &positions, sent);
    run_until(&mut reactor, |_| arrived.borrow().bytes.len() == BYTES);
    assert_eq!(transport(&mut reactor, sender).unsent_descriptors(), 0);
    drop(reactor);
    let arrived = Rc::into_inner(arrived).expect("the protocol is gone");
    let arrived = arrived.into_inner();
    assert!(arrived.bytes == data, "every byte once and in order");
    let received: Vec<_> = arrived.descriptors.iter().map(|it| it.0).collect();
    assert_eq!(received.len(), expected.len());
    assert!(received == expected, "each once and in order");
    (positions, arrived)
}

/// S-08, S-15.
#[test]
fn descriptors_never_arrive_after_their_bytes_in_300_000() {
    let ledger = DescriptorLedger::open();
    let (positions, arrived) = stream_of_300_000(|transport, data, positions, descriptors| {
        let mut written = 0;
        for (position, fd) in positions.iter().zip(descriptors) {
            transport.write(&data[written..*position]);
            written = *position;
            transport.send_file_descriptor(fd.into()).unwrap();
        }
        transport.write(&data[written..]);
    });
    for (position, (_, start, _)) in positions.iter().zip(&arrived.descriptors) {
        assert!(start <= position, "that of {position} came at {start}");
    }
    ledger.assert_balanced();
}

#[test]
fn exact_descriptors_arrive_with_their_first_byte_in_300_000() {
    let ledger = DescriptorLedger::open();
    let (positions, arrived) = stream_of_300_000(|transport, data, positions, descriptors| {
        transport.write(&data[..positions[0]]);
        let ends = positions[1..].iter().copied().chain([BYTES]);
        for ((start, end), fd) in positions.iter().zip(ends).zip(descriptors) {
            transport
                .write_with_descriptors(&data[*start..end], vec![fd.into()])
                .unwrap();
        }
    });
    for (position, (_, start, end)) in positions.iter().zip(&arrived.descriptors) {
        assert!(
            (*start..*end).contains(position),
            "that of {position} came with {start}..{end}"
        );
    }
    ledger.assert_balanced();
}

/// M-01.
#[test]
fn all_messages_that_wait_are_seen_without_a_further_event() {
    let ledger = DescriptorLedger::open();
    {
        let arrived = Rc::new(RefCell::new(Arrived::default()));
        let mut reactor = Reactor::new().unwrap();
        let (_, peer) = adopt(&mut reactor, Counting(Rc::clone(&arrived)));
        // Room for 500 messages of a byte: some 770 bytes each in the kernel.
        rustix::net::sockopt::set_socket_send_buffer_size(&peer, 212_992).unwrap();
        let passed = [file()];
        let mut total = 0;
        for messages in 1..=500 {
            for _ in 0..messages {
                send_message(&peer, b"m", &passed);
            }
            total += messages;
            run_until(&mut reactor, |_| {
                arrived.borrow().descriptors.len() == total
            });
            assert_eq!(arrived.borrow().bytes.len(), total);
        }
    }
    ledger.assert_balanced();
}

#[test]
fn plain_messages_behind_descriptors_are_seen_without_a_further_event() {
    let ledger = DescriptorLedger::open();
    {
        let arrived = Rc::new(RefCell::new(Arrived::default()));
        let mut reactor = Reactor::new().unwrap();
        let (_, peer) = adopt(&mut reactor, Counting(Rc::clone(&arrived)));
        let passed = [file()];
        for round in 1..=50 {
            send_message(&peer, b"front", &[]);
            send_message(&peer, b"m", &passed);
            send_message(&peer, b"behind", &[]);
            run_until(&mut reactor, |_| arrived.borrow().bytes.len() == round * 12);
        }
    }
    ledger.assert_balanced();
}

/// Sends bytes and descriptors for as long as there are any, and counts what
/// comes back.
struct Flood {
    passed: Rc<OwnedFd>,
    left: usize,
    received: Rc<Cell<(usize, usize)>>,
}

/// How many messages each side of the flood sends, and how long they are.
const FLOOD_MESSAGES: usize = 1_000;
const FLOOD_BYTES: usize = 4_096;

impl Flood {
    fn send(&mut self, transport: &mut impl UnixTransport) {
        while self.left > 0 && !transport.is_send_buffer_full() {
            self.left -= 1;
            let fd = PassedDescriptor::shared(&self.passed);
            if self.left.is_multiple_of(2) {
                transport.send_file_descriptor(fd).expect("queued");
                transport.write(&[self.left as u8; FLOOD_BYTES]);
            } else {
                transport
                    .write_with_descriptors(&[self.left as u8; FLOOD_BYTES], vec![fd])
                    .expect("every other one has its bytes");
            }
        }
    }

    fn count(&self, bytes: usize, descriptors: usize) {
        let (all_bytes, all_descriptors) = self.received.get();
        self.received
            .set((all_bytes + bytes, all_descriptors + descriptors));
    }
}

impl Protocol<UnixStream> for Flood {
    fn connection_made(&mut self, cx: &mut Context<'_, UnixStream>) {
        cx.transport
            .set_descriptor_limits(DescriptorLimits::default().high(8));
        cx.transport
            .register_producer(bowline::ProducerRef::Protocol, bowline::ProducerKind::Push)
            .expect("the first");
        self.send(cx.transport);
    }

    fn resume_producing(&mut self, cx: &mut Context<'_, UnixStream>) {
        self.send(cx.transport);
    }

    fn data_received(&mut self, _: &mut Context<'_, UnixStream>, data: &[u8]) {
        self.count(data.len(), 0);
    }

    fn descriptors_received(
        &mut self,
        _: &mut Context<'_, UnixStream>,
        descriptors: &mut ReceivedDescriptors<'_>,
        data: &[u8],
    ) {
        self.count(data.len(), descriptors.count());
    }
}

#[test]
fn floods_both_ways_through_the_smallest_buffers_do_not_deadlock() {
    let ledger = DescriptorLedger::open();
    {
        let passed = Rc::new(file());
        let mut reactor = Reactor::new().unwrap();
        let (ours, theirs) = socketpair();
        let received: Vec<_> = [ours, theirs]
            .into_iter()
            .map(|socket| {
                shrink_send_buffer(&socket);
                let received = Rc::new(Cell::new((0, 0)));
                let flood = Flood {
                    passed: Rc::clone(&passed),
                    left: FLOOD_MESSAGES,
                    received: Rc::clone(&received),
                };
                reactor.adopt_unix_stream(socket.into(), flood).unwrap();
                received
            })
            .collect();
        let all = (FLOOD_MESSAGES * FLOOD_BYTES, FLOOD_MESSAGES);
        run_until(&mut reactor, |_| received.iter().all(|it| it.get() == all));
        run_until_quiet(&mut reactor);
        assert!(received.iter().all(|it| it.get() == all));
        assert_eq!(Rc::strong_count(&passed), 3, "ours, and the protocols'");
    }
    ledger.assert_balanced();
}
