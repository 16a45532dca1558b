//! Any list of operations, over a real socket: each descriptor arrives once,
//! in order, not after its byte, and with exactly its message if it has one.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::rc::Rc;

use bowline::error::SendDescriptorErrorKind;
use bowline::{DescriptorLimits, PassedDescriptor, Reactor, Transports, UnixTransportHandle};
use proptest::prelude::*;

use crate::peer::{Identity, files, identity, receive, shrink_send_buffer, transport};
use crate::support::{DescriptorLedger, Recorder, run_until, socketpair};

#[derive(Clone, Debug)]
enum Operation {
    Write(usize),
    WriteOwned(usize),
    Send(usize),
    WriteExactly { bytes: usize, descriptors: usize },
    Turn,
    Read(usize),
}

fn operation() -> impl Strategy<Value = Operation> {
    let bytes = prop_oneof![4 => 1..20usize, 2 => 1_000..10_000usize, 1 => 1..100_000usize];
    let limit = prop_oneof![1..20usize, 1..70_000usize];
    prop_oneof![
        3 => bytes.clone().prop_map(Operation::Write),
        1 => bytes.clone().prop_map(Operation::WriteOwned),
        3 => (1..8usize).prop_map(Operation::Send),
        2 => (bytes, 1..5usize)
            .prop_map(|(bytes, descriptors)| Operation::WriteExactly { bytes, descriptors }),
        2 => Just(Operation::Turn),
        3 => limit.prop_map(Operation::Read),
    ]
}

#[derive(Clone, Copy, Debug)]
enum Place {
    /// Not later than this byte.
    Floating(usize),
    /// With this byte.
    Exact(usize),
}

struct Run<'a> {
    reactor: Reactor,
    handle: UnixTransportHandle,
    peer: StdUnixStream,
    /// What is passed, over and over.
    files: &'a [(Rc<OwnedFd>, Identity)],
    written: usize,
    /// Where the last message with its own descriptors ends.
    exact_end: usize,
    /// How many descriptors were queued up to there.
    exact_count: usize,
    queued: Vec<(Identity, Place)>,
    bytes_received: usize,
    descriptors_received: usize,
}

impl Run<'_> {
    fn data(&mut self, length: usize) -> Vec<u8> {
        let start = self.written;
        self.written += length;
        (start..self.written).map(byte_at).collect()
    }

    /// The byte that the next floating descriptor claims.
    fn next_claim(&mut self) -> usize {
        let it = transport(&mut self.reactor, self.handle);
        let sent = self.written - it.unsent_bytes();
        let left = it.descriptors_sent() as usize;
        sent.max(self.exact_end) + (self.queued.len() - left.max(self.exact_count))
    }

    fn next_file(&mut self, place: Place) -> PassedDescriptor {
        let (fd, identity) = &self.files[self.queued.len() % self.files.len()];
        self.queued.push((*identity, place));
        PassedDescriptor::shared(fd)
    }

    fn perform(&mut self, operation: Operation) {
        match operation {
            Operation::Write(length) => {
                let data = self.data(length);
                transport(&mut self.reactor, self.handle).write(&data);
            }
            Operation::WriteOwned(length) => {
                let data = self.data(length);
                transport(&mut self.reactor, self.handle).write_owned(data);
            }
            Operation::Send(count) => {
                for _ in 0..count {
                    let claim = self.next_claim();
                    let fd = self.next_file(Place::Floating(claim));
                    transport(&mut self.reactor, self.handle)
                        .send_file_descriptor(fd)
                        .expect("there is room");
                }
            }
            Operation::WriteExactly { bytes, descriptors } => {
                let left = transport(&mut self.reactor, self.handle).descriptors_sent() as usize;
                let is_waiting = self.queued.len() > left.max(self.exact_count);
                let is_settled = !is_waiting || self.next_claim() <= self.written;
                let start = self.written;
                let before = self.queued.len();
                let data = self.data(bytes);
                let passed = (0..descriptors)
                    .map(|_| self.next_file(Place::Exact(start)))
                    .collect();
                let it = transport(&mut self.reactor, self.handle);
                match it.write_with_descriptors(&data, passed) {
                    Ok(_) => {
                        assert!(is_settled, "descriptors were waiting");
                        self.exact_end = self.written;
                        self.exact_count = self.queued.len();
                    }
                    Err(error) => {
                        assert_eq!(error.kind, SendDescriptorErrorKind::DescriptorsWaiting);
                        assert!(!is_settled, "nothing was waiting");
                        assert_eq!(error.descriptors.len(), descriptors);
                        self.written = start;
                        self.queued.truncate(before);
                    }
                }
            }
            Operation::Turn => {
                self.reactor.turn(Some(std::time::Duration::ZERO));
            }
            Operation::Read(limit) => {
                self.read(limit);
            }
        }
    }

    /// Whether anything was there.
    fn read(&mut self, limit: usize) -> bool {
        let Some(message) = receive(&self.peer, limit) else {
            return false;
        };
        let start = self.bytes_received;
        for (at, byte) in message.data.iter().enumerate() {
            assert_eq!(*byte, byte_at(start + at), "byte {}", start + at);
        }
        self.bytes_received += message.data.len();
        for fd in &message.descriptors {
            let (expected, place) = self.queued[self.descriptors_received];
            assert_eq!(identity(fd), expected, "out of order");
            self.descriptors_received += 1;
            match place {
                Place::Floating(claim) => {
                    assert!(start <= claim, "that of {claim} came at {start}");
                }
                Place::Exact(position) => assert!(
                    (start..self.bytes_received).contains(&position),
                    "that of {position} came with {start}..{}",
                    self.bytes_received
                ),
            }
        }
        true
    }

    fn finish(mut self) {
        // A byte for each that waits.
        let waiting = transport(&mut self.reactor, self.handle).unsent_descriptors();
        self.perform(Operation::Write(waiting + 1));
        let mut reactor = std::mem::replace(&mut self.reactor, Reactor::new().unwrap());
        run_until(&mut reactor, |_| {
            while self.read(65_536) {}
            self.bytes_received == self.written
        });
        assert_eq!(self.descriptors_received, self.queued.len());
        assert_eq!(reactor.descriptor_counts().passed, self.queued.len() as u64);
    }
}

fn byte_at(position: usize) -> u8 {
    (position % 251) as u8
}

#[test]
fn descriptors_keep_to_their_bytes_over_a_real_socket() {
    let ledger = DescriptorLedger::open();
    {
        let (all, identities) = files(64);
        let all: Vec<_> = all.into_iter().map(Rc::new).zip(identities).collect();
        let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
            failure_persistence: None,
            cases: 150,
            ..ProptestConfig::default()
        });
        let per_message = prop_oneof![Just(1usize), Just(3), Just(64)];
        let operations = prop::collection::vec(operation(), 1..80);
        let cases = (any::<bool>(), per_message, operations);
        runner
            .run(&cases, |(is_small, per_message, operations)| {
                let mut reactor = Reactor::new().unwrap();
                let (ours, peer) = socketpair();
                if is_small {
                    shrink_send_buffer(&ours);
                }
                let handle = reactor
                    .adopt_unix_stream(ours.into(), Recorder::default())
                    .unwrap();
                transport(&mut reactor, handle)
                    .set_descriptor_limits(DescriptorLimits::default().per_message(per_message));
                let mut run = Run {
                    reactor,
                    handle,
                    peer,
                    files: &all,
                    written: 0,
                    exact_end: 0,
                    exact_count: 0,
                    queued: Vec::new(),
                    bytes_received: 0,
                    descriptors_received: 0,
                };
                for operation in operations {
                    run.perform(operation);
                }
                run.finish();
                assert!(all.iter().all(|(fd, _)| Rc::strong_count(fd) == 1));
                Ok(())
            })
            .unwrap();
    }
    ledger.assert_balanced();
}
