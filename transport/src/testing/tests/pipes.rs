//! Simulated pipes and FIFOs against the real ones.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use bowline_reactor::{Interest, Reactor, Readiness, Token};
use proptest::prelude::*;
use rustix::event::epoll;
use rustix::fs::{Mode, OFlags};

use super::super::kernel::{KernelSettings, OpenedFor, SimulatedKernel};
use super::super::pipes::{FifoMode, MemoryPipe};
use super::{PATTERN, fetch};
use crate::sys;
use crate::sys::file;

/// How many ends may be open at a time.
const SLOTS: usize = 4;

#[derive(Clone, Copy, Debug)]
enum Operation {
    /// Opens the FIFO in a slot, unless something is there.
    Open(usize, FifoMode),
    Write(usize, usize),
    Read(usize, usize),
    /// Has the poller report an end, or report it anew.
    Watch(usize, Interest),
    Ask(usize),
    Close(usize),
    Poll,
}

#[derive(Debug, PartialEq)]
enum Outcome {
    Bytes(Vec<u8>),
    Count(usize),
    Failed(i32),
    /// What poll(2) says: something to read, room, hung up, no reader.
    State([bool; 4]),
    Events(Vec<(usize, Readiness)>),
    Done,
    /// There is none in this slot, or there is one already.
    NotThere,
}

trait World {
    fn open(&mut self, mode: FifoMode, slot: usize) -> io::Result<()>;
    fn write(&self, slot: usize, data: &[u8]) -> io::Result<usize>;
    fn read(&self, slot: usize, limit: usize) -> io::Result<Vec<u8>>;
    fn watch(&mut self, slot: usize, interest: Interest);
    fn ask(&self, slot: usize) -> [bool; 4];
    fn close(&mut self, slot: usize);
    fn is_open(&self, slot: usize) -> bool;
    fn can(&self, slot: usize) -> (bool, bool);
    fn poll(&mut self) -> Vec<(usize, Readiness)>;
}

fn run(world: &mut impl World, operations: &[Operation]) -> Vec<Outcome> {
    let mut written = 0;
    let act = |operation: &Operation| {
        let of_error = |error: io::Error| match error.raw_os_error() {
            Some(number) => Outcome::Failed(number),
            None => panic!("{error}"),
        };
        let (Operation::Open(slot, _)
        | Operation::Write(slot, _)
        | Operation::Read(slot, _)
        | Operation::Watch(slot, _)
        | Operation::Ask(slot)
        | Operation::Close(slot)) = *operation
        else {
            let mut events = world.poll();
            // In which order several are told is nobody's business.
            events.sort_by_key(|(slot, _)| *slot);
            return Outcome::Events(events);
        };
        if world.is_open(slot) == matches!(operation, Operation::Open(..)) {
            return Outcome::NotThere;
        }
        match *operation {
            Operation::Open(slot, mode) => match world.open(mode, slot) {
                Ok(()) => Outcome::Done,
                Err(error) => of_error(error),
            },
            Operation::Write(slot, bytes) => {
                let start = written % 251;
                match world.write(slot, &PATTERN[start..start + bytes]) {
                    Ok(count) => {
                        written += count;
                        Outcome::Count(count)
                    }
                    Err(error) => of_error(error),
                }
            }
            Operation::Read(slot, limit) => match world.read(slot, limit) {
                Ok(bytes) => Outcome::Bytes(bytes),
                Err(error) => of_error(error),
            },
            Operation::Watch(slot, interest) => {
                world.watch(slot, interest);
                Outcome::Done
            }
            Operation::Ask(slot) => Outcome::State(world.ask(slot)),
            Operation::Close(slot) => {
                world.close(slot);
                Outcome::Done
            }
            Operation::Poll => unreachable!("done above"),
        }
    };
    operations.iter().map(act).collect()
}

struct Real {
    poller: OwnedFd,
    slots: [Option<(OwnedFd, FifoMode, bool)>; SLOTS],
    path: PathBuf,
    _directory: tempfile::TempDir,
}

impl Real {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("fifo");
        rustix::fs::mkfifoat(rustix::fs::CWD, &path, Mode::RWXU).unwrap();
        Self {
            poller: epoll::create(epoll::CreateFlags::CLOEXEC).unwrap(),
            slots: [const { None }; SLOTS],
            path,
            _directory: directory,
        }
    }

    fn fd(&self, slot: usize) -> &OwnedFd {
        &self.slots[slot].as_ref().expect("it is open").0
    }
}

impl World for Real {
    fn open(&mut self, mode: FifoMode, slot: usize) -> io::Result<()> {
        let way = match mode {
            FifoMode::Reading => OFlags::RDONLY,
            FifoMode::Writing => OFlags::WRONLY,
            FifoMode::Both => OFlags::RDWR,
        };
        let flags = way | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let fd = rustix::fs::open(&self.path, flags, Mode::empty())?;
        self.slots[slot] = Some((fd, mode, false));
        Ok(())
    }

    fn write(&self, slot: usize, data: &[u8]) -> io::Result<usize> {
        file::write(self.fd(slot).as_fd(), &[IoSlice::new(data)])
    }

    fn read(&self, slot: usize, limit: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; limit];
        let count = file::read(self.fd(slot).as_fd(), &mut bytes)?;
        bytes.truncate(count);
        Ok(bytes)
    }

    fn watch(&mut self, slot: usize, interest: Interest) {
        use epoll::EventFlags as Flags;
        let wanted = match interest {
            Interest::Readable => Flags::IN | Flags::RDHUP,
            Interest::Writable => Flags::OUT,
            Interest::Both => Flags::IN | Flags::RDHUP | Flags::OUT,
        } | Flags::ET;
        let data = epoll::EventData::new_u64(slot as u64);
        let Some((fd, _, is_watched)) = &mut self.slots[slot] else {
            return;
        };
        match std::mem::replace(is_watched, true) {
            false => epoll::add(&self.poller, fd, data, wanted).unwrap(),
            true => epoll::modify(&self.poller, fd, data, wanted).unwrap(),
        }
    }

    fn ask(&self, slot: usize) -> [bool; 4] {
        let (reads, writes) = self.can(slot);
        let fd = self.fd(slot).as_fd();
        [
            reads && sys::has_waiting(fd).unwrap(),
            writes && file::has_room(fd).unwrap(),
            reads && sys::is_hung_up(fd),
            writes && file::has_no_reader(fd),
        ]
    }

    fn close(&mut self, slot: usize) {
        self.slots[slot] = None;
    }

    fn is_open(&self, slot: usize) -> bool {
        self.slots[slot].is_some()
    }

    fn can(&self, slot: usize) -> (bool, bool) {
        let mode = self.slots[slot].as_ref().expect("it is open").1;
        (mode != FifoMode::Writing, mode != FifoMode::Reading)
    }

    fn poll(&mut self) -> Vec<(usize, Readiness)> {
        fetch(&self.poller)
    }
}

struct Simulated {
    kernel: SimulatedKernel,
    slots: [Option<MemoryPipe>; SLOTS],
    tokens: [Token; SLOTS],
    reactor: Reactor,
}

impl Simulated {
    fn new() -> Self {
        let kernel = SimulatedKernel::new();
        kernel.set_settings(KernelSettings::default());
        kernel.make_fifo("fifo").unwrap();
        let mut reactor = Reactor::new().unwrap();
        Self {
            tokens: [(); SLOTS].map(|()| reactor.vacancy().unwrap().token()),
            slots: [const { None }; SLOTS],
            kernel,
            reactor,
        }
    }

    fn end(&self, slot: usize) -> &MemoryPipe {
        self.slots[slot].as_ref().expect("it is open")
    }
}

impl World for Simulated {
    fn open(&mut self, mode: FifoMode, slot: usize) -> io::Result<()> {
        self.slots[slot] = Some(self.kernel.open_fifo("fifo", mode)?);
        Ok(())
    }

    fn write(&self, slot: usize, data: &[u8]) -> io::Result<usize> {
        self.end(slot).write(data)
    }

    fn read(&self, slot: usize, limit: usize) -> io::Result<Vec<u8>> {
        self.end(slot).read(limit)
    }

    fn watch(&mut self, slot: usize, interest: Interest) {
        let end = self.slots[slot].as_ref().expect("it is open");
        let place = (end.id(), end.holder());
        self.kernel
            .watch(place, &mut self.reactor, self.tokens[slot], interest)
            .unwrap();
    }

    fn ask(&self, slot: usize) -> [bool; 4] {
        let it = self.kernel.poll_pipe(self.end(slot).id()).unwrap();
        [it.has_bytes, it.has_room, it.is_hung_up, it.has_no_reader]
    }

    fn close(&mut self, slot: usize) {
        self.slots[slot] = None;
    }

    fn is_open(&self, slot: usize) -> bool {
        self.slots[slot].is_some()
    }

    fn can(&self, slot: usize) -> (bool, bool) {
        let (OpenedFor { reads, writes }, _) =
            self.kernel.way_of_pipe(self.end(slot).id()).unwrap();
        (reads, writes)
    }

    fn poll(&mut self) -> Vec<(usize, Readiness)> {
        let events = self.kernel.poll(&mut self.reactor).into_iter();
        let slot = |token| self.tokens.iter().position(|it| *it == token).unwrap();
        events.map(|(token, it)| (slot(token), it)).collect()
    }
}

#[track_caller]
fn expect_same(operations: &[Operation]) {
    sys::tests::have_own_descriptors();
    let expected = run(&mut Real::new(), operations);
    let outcomes = run(&mut Simulated::new(), operations);
    for (index, operation) in operations.iter().enumerate() {
        let (got, wanted) = (&outcomes[index], &expected[index]);
        assert!(
            got == wanted,
            "operation {index}, {operation:?}: the kernel {wanted:?}, the simulation {got:?}"
        );
    }
}

/// A FIFO that is opened again takes its end back; what nobody reads is gone with the last
/// who had it open.
#[test]
fn a_fifo_ends_and_goes_on_as_in_the_kernel() {
    use Operation::{Ask, Close, Open, Poll, Read, Watch, Write};
    expect_same(&[
        Open(0, FifoMode::Writing),
        Open(0, FifoMode::Reading),
        Watch(0, Interest::Readable),
        Ask(0),
        Poll,
        Read(0, 9),
        Open(1, FifoMode::Writing),
        Watch(1, Interest::Writable),
        Poll,
        Write(1, 5),
        Poll,
        Close(1),
        Poll,
        Ask(0),
        Read(0, 3),
        Open(2, FifoMode::Writing),
        Ask(0),
        Poll,
        Read(0, 9),
        Read(0, 9),
        Close(2),
        Ask(0),
        Poll,
        Read(0, 9),
        Close(0),
        Open(3, FifoMode::Both),
        Watch(3, Interest::Both),
        Write(3, 70_000),
        Poll,
        Close(3),
        Open(3, FifoMode::Both),
        Ask(3),
        Open(1, FifoMode::Writing),
        Watch(1, Interest::Writable),
        Poll,
        Close(3),
        Poll,
        Ask(1),
        Write(1, 1),
    ]);
}

/// `PIPE_BUF`, and pages that are filled up.
#[test]
fn a_full_pipe_takes_what_the_kernel_takes() {
    use Operation::{Open, Poll, Read, Watch, Write};
    let mut operations = vec![
        Open(0, FifoMode::Reading),
        Open(1, FifoMode::Writing),
        Watch(1, Interest::Writable),
        Poll,
    ];
    for size in [1, 4_095, 1, 4_096, 4_097, 100, 60_000, 5_000, 1, 4_096] {
        operations.extend([Write(1, size), Poll]);
    }
    for limit in [1, 4_095, 1, 4_094, 8_192, 1] {
        operations.extend([Read(0, limit), Poll, Write(1, 10), Write(1, 5_000), Poll]);
    }
    expect_same(&operations);
}

fn operation() -> impl Strategy<Value = Operation> {
    let mode = prop_oneof![
        4 => Just(FifoMode::Reading),
        4 => Just(FifoMode::Writing),
        1 => Just(FifoMode::Both),
    ];
    let length = prop_oneof![4 => 1..20usize, 3 => 3_000..9_000usize, 2 => 30_000..90_000usize];
    let limit = prop_oneof![2 => 1..40usize, 4 => 3_000..70_000usize];
    let interest = prop_oneof![
        Just(Interest::Readable),
        Just(Interest::Writable),
        Just(Interest::Both)
    ];
    let slot = || 0..SLOTS;
    prop_oneof![
        6 => (slot(), mode).prop_map(|(slot, mode)| Operation::Open(slot, mode)),
        30 => (slot(), length).prop_map(|(slot, bytes)| Operation::Write(slot, bytes)),
        30 => (slot(), limit).prop_map(|(slot, limit)| Operation::Read(slot, limit)),
        8 => (slot(), interest).prop_map(|(slot, it)| Operation::Watch(slot, it)),
        6 => slot().prop_map(Operation::Ask),
        3 => slot().prop_map(Operation::Close),
        20 => Just(Operation::Poll),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_list_of_operations_brings_what_a_pipe_brings(
        operations in prop::collection::vec(operation(), 1..150),
    ) {
        let mut all = vec![
            Operation::Open(0, FifoMode::Reading),
            Operation::Open(1, FifoMode::Writing),
            Operation::Watch(0, Interest::Readable),
            Operation::Watch(1, Interest::Writable),
        ];
        all.extend(operations);
        expect_same(&all);
    }
}
