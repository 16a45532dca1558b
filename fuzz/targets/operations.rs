//! Lists of operations on two transports over the simulated kernel: bytes arrive
//! in order, descriptors once, in order and no later than their bytes; every
//! connection ends once, and nothing stays open.

#![no_main]

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::rc::Rc;
use std::time::Duration;

use bowline::testing::{Delivery, KernelSettings, MemoryStream, Pump, SimulatedKernel};
use bowline::{
    AfterReadClosed, AfterTruncation, AnyConnection as _, CloseReason, Context, DescriptorLimits,
    PassedDescriptor, ProducerKind, ProducerRef, Protocol, ReceivedDescriptors, Transport,
    TransportState, UnixTransport, WriteStatus,
};

/// How many files there are to tell descriptors apart by.
const FILES: usize = 8;

/// Transient for sendmsg(2).
const ENOBUFS: i32 = 105;
const ETOOMANYREFS: i32 = 109;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    thread_local!(static SHARED: Files = Files::new());
    SHARED.with(|files| play(data, files));
});

#[derive(Clone)]
struct Files {
    all: Rc<[(Rc<OwnedFd>, u64)]>,
}

impl Files {
    fn new() -> Self {
        let path = std::env::temp_dir().join(format!("bowline-fuzz-{}", std::process::id()));
        let all = (0..FILES)
            .map(|_| {
                let file = File::create(&path).expect("a temporary file");
                let inode = file.metadata().expect("it is open").ino();
                std::fs::remove_file(&path).expect("it is there");
                (Rc::new(file.into()), inode)
            })
            .collect();
        Self { all }
    }
}

/// The choices that are left.
struct Choices<'a>(&'a [u8]);

impl Choices<'_> {
    fn next(&mut self) -> usize {
        let Some((first, rest)) = self.0.split_first() else {
            return 0;
        };
        self.0 = rest;
        usize::from(*first)
    }
}

#[derive(Default)]
struct Side {
    written: usize,
    /// The byte that each queued descriptor may claim at the latest.
    queued: Vec<usize>,
    received: usize,
    descriptors: usize,
    made: usize,
    lost: usize,
    /// Descriptors may be missing.
    was_truncated: bool,
    /// What to do inside of callbacks, in order.
    inside: Vec<usize>,
}

struct Run {
    sides: [Side; 2],
    files: Files,
}

fn byte_at(position: usize) -> u8 {
    (position % 251) as u8
}

fn pattern(position: usize, length: usize) -> Vec<u8> {
    (position..position + length).map(byte_at).collect()
}

impl Run {
    fn act(&mut self, side: usize, choice: usize, size: usize, transport: &mut MemoryStream) {
        let files = self.files.clone();
        let mine = &mut self.sides[side];
        let passed = |nth: usize| PassedDescriptor::shared(&files.all[nth % FILES].0);
        match choice % 18 {
            0..4 => {
                // Now and then more than the kernel takes at a time.
                let length = if choice % 4 == 3 { size * 300 } else { size };
                let data = pattern(mine.written, length);
                let status = match choice % 3 {
                    0 => transport.write(&data),
                    1 => transport.write_owned(data),
                    _ => {
                        let (first, second) = data.split_at(length / 2);
                        transport.write_sequence(&[first, second])
                    }
                };
                if status != WriteStatus::Refused {
                    mine.written += length;
                }
            }
            4 | 5 => {
                if transport
                    .send_file_descriptor(passed(mine.queued.len()))
                    .is_ok()
                {
                    let next = mine.queued.last().map_or(0, |last| last + 1);
                    mine.queued.push(next.max(mine.written));
                }
            }
            6 | 7 => {
                let first = mine.queued.len();
                let all = (first..first + 1 + size % 5).map(passed).collect();
                let data = pattern(mine.written, 1 + size);
                if transport.write_with_descriptors(&data, all).is_ok() {
                    mine.queued.resize(first + 1 + size % 5, mine.written);
                    mine.written += data.len();
                }
            }
            8 => transport.pause_producing(),
            9 => resume(transport),
            10 => transport.set_read_limit(std::num::NonZeroUsize::new(size)),
            11 => {
                let _ = transport.register_producer(ProducerRef::Protocol, ProducerKind::Push);
            }
            12 => transport.unregister_producer(),
            13 => transport.lose_write_connection(),
            14 if size % 4 == 0 => transport.lose_connection(),
            15 if size % 4 == 0 => transport.lose_connection_within(Duration::from_millis(5)),
            16 if size % 8 == 0 => transport.abort_connection(),
            17 => {
                let limits = DescriptorLimits::default().per_message(size);
                transport.set_descriptor_limits(limits.high(size / 2));
            }
            _ => {}
        }
    }
}

/// Reads on, unless it is over.
fn resume(transport: &mut MemoryStream) {
    if transport.state() != TransportState::Lost {
        transport.resume_producing();
    }
}

struct Player {
    run: Rc<RefCell<Run>>,
    side: usize,
}

impl Player {
    fn interfere(&self, cx: &mut Context<'_, MemoryStream>) {
        let run = &mut *self.run.borrow_mut();
        if let Some(choice) = run.sides[self.side].inside.pop() {
            run.act(self.side, choice, choice / 3, cx.transport);
        }
    }
}

impl Protocol<MemoryStream> for Player {
    fn connection_made(&mut self, cx: &mut Context<'_, MemoryStream>) {
        self.run.borrow_mut().sides[self.side].made += 1;
        self.interfere(cx);
    }

    fn data_received(&mut self, cx: &mut Context<'_, MemoryStream>, data: &[u8]) {
        assert!(!cx.transport.is_reading_paused() && cx.transport.is_open_for_reading());
        {
            let run = &mut *self.run.borrow_mut();
            let mine = &run.sides[self.side];
            assert!(data == pattern(mine.received, data.len()), "other bytes");
            let received = mine.received + data.len();
            let theirs = &run.sides[1 - self.side];
            assert!(received <= theirs.written);
            let due = theirs
                .queued
                .iter()
                .take_while(|at| **at < received)
                .count();
            assert!(
                mine.was_truncated || due <= mine.descriptors,
                "a descriptor is late"
            );
            run.sides[self.side].received = received;
        }
        self.interfere(cx);
    }

    fn descriptors_received(
        &mut self,
        cx: &mut Context<'_, MemoryStream>,
        descriptors: &mut ReceivedDescriptors<'_>,
        data: &[u8],
    ) {
        {
            let run = &mut *self.run.borrow_mut();
            let mine = &mut run.sides[self.side];
            for fd in descriptors {
                let inode = File::from(fd).metadata().expect("it is open").ino();
                let expected = run.files.all[mine.descriptors % FILES].1;
                assert!(
                    mine.was_truncated || inode == expected,
                    "another descriptor"
                );
                mine.descriptors += 1;
            }
            assert!(run.sides[self.side].descriptors <= run.sides[1 - self.side].queued.len());
        }
        self.data_received(cx, data);
    }

    fn descriptors_truncated(
        &mut self,
        cx: &mut Context<'_, MemoryStream>,
        received: usize,
    ) -> AfterTruncation {
        self.run.borrow_mut().sides[self.side].was_truncated = true;
        self.interfere(cx);
        match received % 2 {
            0 => AfterTruncation::KeepConnection,
            _ => AfterTruncation::LoseConnection,
        }
    }

    fn descriptors_sent(&mut self, cx: &mut Context<'_, MemoryStream>, _: usize) {
        self.interfere(cx);
    }

    fn read_connection_lost(&mut self, cx: &mut Context<'_, MemoryStream>) -> AfterReadClosed {
        self.interfere(cx);
        match self.run.borrow().sides[self.side].received % 3 {
            0 => AfterReadClosed::KeepWriting,
            1 => AfterReadClosed::LoseConnection,
            _ => AfterReadClosed::EndConnection,
        }
    }

    fn pause_producing(&mut self, cx: &mut Context<'_, MemoryStream>) {
        self.interfere(cx);
    }

    fn resume_producing(&mut self, cx: &mut Context<'_, MemoryStream>) {
        self.interfere(cx);
    }

    fn connection_lost(&mut self, _: &mut Context<'_, MemoryStream>, _: &CloseReason) {
        let run = &mut *self.run.borrow_mut();
        run.sides[self.side].lost += 1;
        assert_eq!(run.sides[self.side].made, 1);
    }
}

fn play(data: &[u8], files: &Files) {
    let mut choices = Choices(data);
    let kernel = SimulatedKernel::with_seed(choices.next() as u64);
    let settings = choices.next();
    kernel.set_settings(
        KernelSettings::default()
            .send_buffer([4_608, 20_000, 212_992][settings % 3])
            .largest_send([usize::MAX, 700][settings / 3 % 2])
            .largest_read([usize::MAX, 400][settings / 6 % 2])
            .cut_percent([0, 40][settings / 12 % 2])
            .delivery([Delivery::Batch, Delivery::OneAtATime, Delivery::Random][settings / 24 % 3])
            .passing_errors_percent([0, 30][settings / 72 % 2])
            // They end a connection at any moment, and the promises with it.
            .lasting_errors_per_10_000(0),
    );
    let run = Rc::new(RefCell::new(Run {
        sides: Default::default(),
        files: files.clone(),
    }));
    let mut pump = Pump::with_kernel(kernel.clone()).expect("a reactor");
    let player = |side| Player {
        run: Rc::clone(&run),
        side,
    };
    let (first, second) = pump.join(player(0), player(1)).expect("joined");
    let both = [first, second];
    let mut killed = None;

    // No input of a fuzzer is longer than some thousand operations.
    for _ in 0..2_000 {
        if choices.0.is_empty() {
            break;
        }
        let choice = choices.next();
        let (side, choice) = (choice % 2, choice / 2);
        match choice {
            0..64 => {
                let size = choices.next();
                if let Some(transport) = pump.get(both[side]) {
                    run.borrow_mut().act(side, choice, size, transport);
                }
            }
            64..90 => {
                pump.turn();
            }
            90..96 => pump.advance(Duration::from_millis(choices.next() as u64)),
            96..112 => run.borrow_mut().sides[side].inside.push(choices.next()),
            112..116 => {
                let error = io::Error::from_raw_os_error([ENOBUFS, ETOOMANYREFS][choice % 2]);
                kernel.fail_send(both[side].socket(), choices.next() % 8, error);
            }
            116..118 => {
                let error = io::Error::from(io::ErrorKind::ConnectionReset);
                kernel.fail_read(both[side].socket(), choices.next() % 8, error);
            }
            118..120 => {
                let error = io::Error::from(io::ErrorKind::BrokenPipe);
                kernel.fail_send(both[side].socket(), choices.next() % 8, error);
            }
            120..124 => kernel.truncate_descriptors(both[side].socket(), choices.next() % 4),
            124 if killed.is_none() => {
                pump.kill(both[side]);
                killed = Some(side);
            }
            _ => {}
        }
    }

    // Everything comes to an end when nobody holds it back.
    for mine in &mut run.borrow_mut().sides {
        mine.inside.clear();
    }
    for transport in both {
        if let Some(transport) = pump.get(transport) {
            transport.unregister_producer();
            resume(transport);
            transport.lose_connection_within(Duration::from_secs(2));
        }
    }
    for _ in 0..20 {
        if pump.is_lost() {
            break;
        }
        pump.advance(Duration::from_secs(1));
    }
    assert!(pump.is_lost(), "a connection does not end");
    assert_eq!(pump.reactor().statistics().panics, 0);
    drop(pump);
    assert_eq!(kernel.open_sockets(), 0);
    drop(kernel);
    for (side, mine) in run.borrow().sides.iter().enumerate() {
        let may_be_missing = killed == Some(side);
        assert!(mine.lost == 1 || (mine.lost == 0 && may_be_missing));
    }
    drop(run);
    assert!(
        files.all.iter().all(|(fd, _)| Rc::strong_count(fd) == 1),
        "kept"
    );
}
