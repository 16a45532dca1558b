//! The simulated sockets against the real ones: one list of operations, run
//! over both, has to bring the same from every call and every poll.

use std::fs::File;
use std::io::{self, ErrorKind, IoSlice};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::LazyLock;

use bowline_reactor::{Interest, Reactor, Readiness, Token};
use proptest::prelude::*;
use rustix::event::epoll;

use super::kernel::{KernelSettings, SimulatedKernel};
use super::socket::MemorySocket;
use crate::sys::{self, Ancillary, ControlBuffer};

mod pipes;
mod ports;

/// One operation on one of the two ends, 0 or 1.
#[derive(Clone, Copy, Debug)]
enum Operation {
    Send {
        end: usize,
        bytes: usize,
        descriptors: usize,
    },
    Read {
        end: usize,
        limit: usize,
    },
    ShutdownWrite {
        end: usize,
    },
    ShutdownRead {
        end: usize,
    },
    WatchWriting {
        end: usize,
    },
    Close {
        end: usize,
    },
    Poll,
}

/// What an operation brought.
#[derive(Debug, PartialEq)]
enum Outcome {
    Sent(usize),
    Read {
        bytes: Vec<u8>,
        descriptors: usize,
        had_ancillary: bool,
    },
    Failed(ErrorKind),
    Done,
    Events(Vec<(usize, Readiness)>),
    /// The end was closed before.
    Gone,
}

/// Every place can be told from its neighbours, wherever a send begins.
static PATTERN: LazyLock<Vec<u8>> =
    LazyLock::new(|| (0..400_000).map(|n| (n % 251) as u8).collect());

/// Two connected sockets and something that polls them.
trait Sockets {
    fn send(
        &mut self,
        end: usize,
        data: &[u8],
        descriptors: &[BorrowedFd<'_>],
    ) -> io::Result<usize>;
    fn read(
        &mut self,
        end: usize,
        buf: &mut [u8],
        into: &mut Vec<OwnedFd>,
    ) -> io::Result<(usize, bool)>;
    fn shutdown_write(&mut self, end: usize) -> io::Result<()>;
    fn shutdown_read(&mut self, end: usize) -> io::Result<()>;
    fn watch_writing(&mut self, end: usize);
    fn close(&mut self, end: usize);
    fn is_open(&self, end: usize) -> bool;
    fn poll(&mut self) -> Vec<(usize, Readiness)>;
}

fn run(sockets: &mut impl Sockets, operations: &[Operation]) -> Vec<Outcome> {
    let file = File::open("/dev/null").unwrap();
    let mut position = 0;
    let mut outcomes = Vec::new();
    for operation in operations {
        let outcome = match *operation {
            Operation::Poll => Outcome::Events(sockets.poll()),
            Operation::Send { end, .. }
            | Operation::Read { end, .. }
            | Operation::ShutdownWrite { end }
            | Operation::ShutdownRead { end }
            | Operation::WatchWriting { end }
            | Operation::Close { end }
                if !sockets.is_open(end) =>
            {
                Outcome::Gone
            }
            Operation::Send {
                end,
                bytes,
                descriptors,
            } => {
                let data = &PATTERN[position % 251..][..bytes];
                let descriptors = vec![file.as_fd(); descriptors];
                match sockets.send(end, data, &descriptors) {
                    Ok(count) => {
                        position += count;
                        Outcome::Sent(count)
                    }
                    Err(error) => Outcome::Failed(error.kind()),
                }
            }
            Operation::Read { end, limit } => {
                let mut bytes = vec![0; limit];
                let mut descriptors = Vec::new();
                match sockets.read(end, &mut bytes, &mut descriptors) {
                    Ok((count, had_ancillary)) => {
                        bytes.truncate(count);
                        Outcome::Read {
                            bytes,
                            descriptors: descriptors.len(),
                            had_ancillary,
                        }
                    }
                    Err(error) => Outcome::Failed(error.kind()),
                }
            }
            Operation::ShutdownWrite { end } => match sockets.shutdown_write(end) {
                Ok(()) => Outcome::Done,
                Err(error) => Outcome::Failed(error.kind()),
            },
            Operation::ShutdownRead { end } => match sockets.shutdown_read(end) {
                Ok(()) => Outcome::Done,
                Err(error) => Outcome::Failed(error.kind()),
            },
            Operation::WatchWriting { end } => {
                sockets.watch_writing(end);
                Outcome::Done
            }
            Operation::Close { end } => {
                sockets.close(end);
                Outcome::Done
            }
        };
        outcomes.push(outcome);
    }
    outcomes
}

struct Real {
    ends: [Option<OwnedFd>; 2],
    poller: OwnedFd,
    control: ControlBuffer,
}

impl Real {
    fn new(send_buffer: Option<usize>) -> Self {
        let (one, other) = UnixStream::pair().unwrap();
        let ends = [OwnedFd::from(one), OwnedFd::from(other)];
        let poller = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
        for (index, end) in ends.iter().enumerate() {
            if let Some(bytes) = send_buffer {
                sys::set_send_buffer_size(end.as_fd(), bytes).unwrap();
            }
            let data = epoll::EventData::new_u64(index as u64);
            epoll::add(&poller, end, data, Self::READING).unwrap();
        }
        Self {
            ends: ends.map(Some),
            poller,
            control: ControlBuffer::new(),
        }
    }

    const READING: epoll::EventFlags = epoll::EventFlags::IN
        .union(epoll::EventFlags::RDHUP)
        .union(epoll::EventFlags::ET);

    /// As getsockopt(2) has it.
    fn send_buffer(&self) -> usize {
        sys::send_buffer_size(self.end(0)).unwrap()
    }

    fn end(&self, end: usize) -> BorrowedFd<'_> {
        self.ends[end].as_ref().expect("it is open").as_fd()
    }
}

impl Sockets for Real {
    fn send(
        &mut self,
        end: usize,
        data: &[u8],
        descriptors: &[BorrowedFd<'_>],
    ) -> io::Result<usize> {
        let fd = self.ends[end].as_ref().expect("it is open").as_fd();
        if descriptors.is_empty() {
            sys::send(fd, data)
        } else {
            let data = [IoSlice::new(data)];
            sys::send_with_descriptors(fd, &data, descriptors, &mut self.control)
        }
    }

    fn read(
        &mut self,
        end: usize,
        buf: &mut [u8],
        into: &mut Vec<OwnedFd>,
    ) -> io::Result<(usize, bool)> {
        let fd = self.ends[end].as_ref().expect("it is open").as_fd();
        let mut ancillary = Ancillary::new();
        let received = sys::receive(fd, buf, &mut self.control, &mut ancillary)?;
        into.append(&mut ancillary.descriptors);
        Ok((received.bytes, received.had_ancillary))
    }

    fn shutdown_write(&mut self, end: usize) -> io::Result<()> {
        sys::shutdown(self.end(end), std::net::Shutdown::Write)
    }

    fn shutdown_read(&mut self, end: usize) -> io::Result<()> {
        sys::shutdown(self.end(end), std::net::Shutdown::Read)
    }

    fn watch_writing(&mut self, end: usize) {
        let data = epoll::EventData::new_u64(end as u64);
        let flags = Self::READING | epoll::EventFlags::OUT;
        epoll::modify(&self.poller, self.end(end), data, flags).unwrap();
    }

    fn close(&mut self, end: usize) {
        self.ends[end] = None;
    }

    fn is_open(&self, end: usize) -> bool {
        self.ends[end].is_some()
    }

    fn poll(&mut self) -> Vec<(usize, Readiness)> {
        fetch(&self.poller)
    }
}

/// The events of a real poller, as mio sorts their flags.
fn fetch(poller: &OwnedFd) -> Vec<(usize, Readiness)> {
    use epoll::EventFlags as Flags;
    let mut events = Vec::with_capacity(8);
    let timeout = rustix::event::Timespec::default();
    let buffer = rustix::buffer::spare_capacity(&mut events);
    epoll::wait(poller, buffer, Some(&timeout)).unwrap();
    let readiness = |flags: Flags| {
        let read_closed =
            flags.contains(Flags::HUP) || flags.contains(Flags::IN) && flags.contains(Flags::RDHUP);
        let write_closed = flags.contains(Flags::HUP)
            || flags.contains(Flags::OUT) && flags.contains(Flags::ERR)
            || flags == Flags::ERR;
        let mut readiness = Readiness::EMPTY;
        for (is_set, flag) in [
            (flags.contains(Flags::IN), Readiness::READABLE),
            (flags.contains(Flags::OUT), Readiness::WRITABLE),
            (read_closed, Readiness::READ_CLOSED),
            (write_closed, Readiness::WRITE_CLOSED),
            (flags.contains(Flags::ERR), Readiness::ERROR),
        ] {
            if is_set {
                readiness |= flag;
            }
        }
        readiness
    };
    let of = |event: &epoll::Event| (event.data.u64() as usize, readiness(event.flags));
    events.iter().map(of).collect()
}

struct Simulated {
    kernel: SimulatedKernel,
    ends: [Option<MemorySocket>; 2],
    tokens: [Token; 2],
    reactor: Reactor,
}

impl Simulated {
    fn new(send_buffer: usize) -> Self {
        let kernel = SimulatedKernel::new();
        kernel.set_settings(KernelSettings {
            send_buffer,
            ..KernelSettings::default()
        });
        let (one, other) = kernel.pair();
        let mut reactor = Reactor::new().unwrap();
        let tokens = [(); 2].map(|()| reactor.vacancy().unwrap().token());
        for (socket, token) in [&one, &other].into_iter().zip(tokens) {
            kernel
                .watch(
                    (socket.id(), socket.holder()),
                    &mut reactor,
                    token,
                    Interest::Readable,
                )
                .unwrap();
        }
        Self {
            kernel,
            ends: [Some(one), Some(other)],
            tokens,
            reactor,
        }
    }

    fn id(&self, end: usize) -> super::SocketId {
        self.ends[end].as_ref().expect("it is open").id()
    }
}

impl Sockets for Simulated {
    fn send(
        &mut self,
        end: usize,
        data: &[u8],
        descriptors: &[BorrowedFd<'_>],
    ) -> io::Result<usize> {
        let data = [IoSlice::new(data)];
        self.kernel.send(self.id(end), &data, descriptors)
    }

    fn read(
        &mut self,
        end: usize,
        buf: &mut [u8],
        into: &mut Vec<OwnedFd>,
    ) -> io::Result<(usize, bool)> {
        let read = self.kernel.read(self.id(end), buf, into)?;
        Ok((read.bytes, read.had_descriptors))
    }

    fn shutdown_write(&mut self, end: usize) -> io::Result<()> {
        self.kernel.shutdown_write(self.id(end))
    }

    fn shutdown_read(&mut self, end: usize) -> io::Result<()> {
        self.kernel.shutdown_read(self.id(end))
    }

    fn watch_writing(&mut self, end: usize) {
        let token = self.tokens[end];
        let socket = self.ends[end].as_ref().unwrap();
        let name = (socket.id(), socket.holder());
        self.kernel
            .watch(name, &mut self.reactor, token, Interest::Both)
            .unwrap();
    }

    fn close(&mut self, end: usize) {
        self.ends[end] = None;
    }

    fn is_open(&self, end: usize) -> bool {
        self.ends[end].is_some()
    }

    fn poll(&mut self) -> Vec<(usize, Readiness)> {
        let events = self.kernel.poll(&mut self.reactor);
        let end = |token| usize::from(token == self.tokens[1]);
        events
            .into_iter()
            .map(|(token, readiness)| (end(token), readiness))
            .collect()
    }
}

#[track_caller]
fn expect_same(send_buffer: Option<usize>, operations: &[Operation]) -> Vec<Outcome> {
    // A child of another test would keep what is closed here open for a moment.
    sys::tests::have_own_descriptors();
    let mut real = Real::new(send_buffer);
    let mut simulated = Simulated::new(real.send_buffer());
    let expected = run(&mut real, operations);
    let outcomes = run(&mut simulated, operations);
    for (index, (operation, (got, wanted))) in operations
        .iter()
        .zip(outcomes.iter().zip(&expected))
        .enumerate()
    {
        assert!(
            got == wanted,
            "operation {index}, {operation:?}: the kernel {}, the simulation {}",
            shortened(wanted),
            shortened(got)
        );
    }
    outcomes
}

fn shortened(outcome: &Outcome) -> String {
    match outcome {
        Outcome::Read {
            bytes,
            descriptors,
            had_ancillary,
        } => format!(
            "read {} bytes, {descriptors} descriptors, ancillary {had_ancillary}",
            bytes.len()
        ),
        other => format!("{other:?}"),
    }
}

fn send(bytes: usize, descriptors: usize) -> Operation {
    Operation::Send {
        end: 0,
        bytes,
        descriptors,
    }
}

fn read(limit: usize) -> Operation {
    Operation::Read { end: 1, limit }
}

/// The lengths and descriptor counts of the reads.
fn reads(outcomes: &[Outcome]) -> Vec<(usize, usize)> {
    let read = |outcome: &Outcome| match outcome {
        Outcome::Read {
            bytes, descriptors, ..
        } => Some((bytes.len(), *descriptors)),
        _ => None,
    };
    outcomes.iter().filter_map(read).collect()
}

#[test]
fn earlier_bytes_are_glued_in_front_and_the_read_ends_behind_descriptors() {
    let operations = [
        send(3, 0),
        send(3, 1),
        send(3, 0),
        send(3, 2),
        send(3, 3),
        send(3, 0),
        Operation::Poll,
        read(100),
        read(100),
        read(100),
        read(100),
        read(100),
        Operation::Poll,
    ];
    let outcomes = expect_same(None, &operations);
    assert_eq!(reads(&outcomes), [(6, 1), (6, 2), (3, 3), (3, 0)]);
}

#[test]
fn descriptors_come_with_the_first_byte_of_their_buffer() {
    let operations = [
        send(3, 0),
        send(3, 1),
        send(3, 0),
        send(3, 2),
        read(4),
        read(100),
        read(100),
    ];
    let outcomes = expect_same(None, &operations);
    assert_eq!(reads(&outcomes), [(4, 1), (8, 2)]);
}

#[test]
fn long_send_is_cut_into_buffers_of_which_the_first_has_the_descriptors() {
    let operations = [send(200_000, 1), read(300_000), read(300_000), read(1)];
    let outcomes = expect_same(None, &operations);
    assert_eq!(reads(&outcomes), [(36_544, 1), (163_456, 0)]);
}

#[test]
fn full_socket_takes_a_part_then_none_and_is_writable_again_at_a_quarter() {
    let mut operations = vec![
        Operation::WatchWriting { end: 0 },
        Operation::Poll,
        send(300_000, 2),
        send(1, 0),
        Operation::Poll,
    ];
    for _ in 0..7 {
        operations.extend([read(36_543), Operation::Poll, send(1, 1)]);
        operations.extend([read(1), Operation::Poll]);
    }
    let outcomes = expect_same(None, &operations);
    assert_eq!(outcomes[2], Outcome::Sent(219_264));
    assert_eq!(outcomes[3], Outcome::Failed(ErrorKind::WouldBlock));
}

#[test]
fn a_byte_costs_as_much_as_in_the_kernel() {
    for bytes in [
        1, 63, 64, 65, 192, 193, 448, 704, 1_728, 3_776, 3_777, 4_095, 4_096, 7_873, 36_545,
    ] {
        let count = (250_000 / bytes).clamp(8, 300);
        let mut operations = vec![send(bytes, 0); count];
        operations.extend([Operation::WatchWriting { end: 0 }, Operation::Poll]);
        for _ in 0..count {
            operations.extend([read(bytes), Operation::Poll]);
        }
        expect_same(None, &operations);
        expect_same(Some(3_000), &operations);
    }
}

#[test]
fn close_with_nothing_unread_is_the_end_after_the_data() {
    let operations = [
        send(10, 1),
        Operation::Close { end: 0 },
        Operation::Poll,
        Operation::Send {
            end: 1,
            bytes: 1,
            descriptors: 1,
        },
        read(4),
        read(100),
        read(100),
        read(100),
        Operation::Poll,
    ];
    let outcomes = expect_same(None, &operations);
    assert_eq!(outcomes[3], Outcome::Failed(ErrorKind::BrokenPipe));
    assert_eq!(reads(&outcomes), [(4, 1), (6, 0), (0, 0), (0, 0)]);
}

#[test]
fn close_with_bytes_unread_is_a_reset_after_the_data() {
    let operations = [
        send(10, 0),
        Operation::Send {
            end: 1,
            bytes: 5,
            descriptors: 0,
        },
        Operation::Poll,
        Operation::Close { end: 0 },
        Operation::Poll,
        read(100),
        read(100),
        read(100),
        Operation::WatchWriting { end: 1 },
        Operation::Poll,
    ];
    let outcomes = expect_same(None, &operations);
    assert_eq!(outcomes[6], Outcome::Failed(ErrorKind::ConnectionReset));
    assert_eq!(reads(&outcomes), [(10, 0), (0, 0)]);
}

#[test]
fn shut_write_side_is_the_end_for_the_peer_and_leaves_the_way_back() {
    let operations = [
        send(10, 0),
        Operation::ShutdownWrite { end: 0 },
        Operation::Poll,
        send(1, 0),
        read(100),
        read(100),
        Operation::Send {
            end: 1,
            bytes: 5,
            descriptors: 1,
        },
        Operation::Poll,
        Operation::Read { end: 0, limit: 9 },
        Operation::ShutdownWrite { end: 1 },
        Operation::Poll,
        Operation::Read { end: 0, limit: 9 },
    ];
    expect_same(None, &operations);
}

/// What was sent before is read, and the end; what comes later is refused.
#[test]
fn refused_input_ends_behind_what_has_arrived() {
    let operations = [
        send(10, 1),
        send(20, 0),
        Operation::Poll,
        Operation::ShutdownRead { end: 1 },
        Operation::Poll,
        send(5, 0),
        read(100),
        read(100),
        read(100),
        read(100),
        // The other way is open.
        Operation::Send {
            end: 1,
            bytes: 7,
            descriptors: 0,
        },
        Operation::Poll,
        Operation::Read { end: 0, limit: 9 },
        Operation::ShutdownRead { end: 0 },
        Operation::Poll,
        Operation::Read { end: 0, limit: 9 },
    ];
    expect_same(None, &operations);
}

#[test]
fn too_many_descriptors_or_no_byte_for_them_is_refused() {
    expect_same(
        None,
        &[send(1, 254), send(0, 1), send(1, 253), send(0, 0), read(9)],
    );
}

fn operation() -> impl Strategy<Value = Operation> {
    let length = prop_oneof![
        4 => 0..20usize,
        2 => 500..5_000usize,
        2 => 30_000..120_000usize,
    ];
    let limit = prop_oneof![4 => 1..40usize, 3 => 1_000..70_000usize];
    let end = || prop_oneof![4 => Just(0usize), 1 => Just(1usize)];
    let other = || prop_oneof![1 => Just(0usize), 4 => Just(1usize)];
    prop_oneof![
        30 => (end(), length, prop_oneof![3 => Just(0usize), 2 => 1..4usize])
            .prop_map(|(end, bytes, descriptors)| Operation::Send { end, bytes, descriptors }),
        40 => (other(), limit).prop_map(|(end, limit)| Operation::Read { end, limit }),
        20 => Just(Operation::Poll),
        2 => end().prop_map(|end| Operation::WatchWriting { end }),
        1 => end().prop_map(|end| Operation::ShutdownWrite { end }),
        1 => end().prop_map(|end| Operation::ShutdownRead { end }),
        1 => end().prop_map(|end| Operation::Close { end }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_list_of_operations_brings_what_the_kernel_brings(
        operations in prop::collection::vec(operation(), 1..120),
        send_buffer in prop_oneof![Just(None), (0..60_000usize).prop_map(Some)],
    ) {
        expect_same(send_buffer, &operations);
    }
}
