//! Whole runs from a seed: two transports, a list of operations chosen at
//! random, a kernel that cuts and reorders and fails. Whatever happens, bytes
//! arrive in order, descriptors exactly once and no later than their bytes, and
//! every connection ends exactly once; and the same seed does the same again.

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::sync::LazyLock;
use std::time::Duration;

use bowline::testing::{Delivery, KernelSettings, MemoryStream, Pump, Random, SimulatedKernel};
use bowline::{
    AfterReadClosed, AnyConnection as _, CloseReason, Context, PassedDescriptor, ProducerKind,
    ProducerRef, Protocol, ReceivedDescriptors, Transport, TransportState, UnixTransport,
    WriteStatus,
};

use crate::support::DescriptorLedger;

/// How many seeds are run; `BOWLINE_SEEDS=1000000` for a night.
const SEEDS: u64 = 10_000;
/// How many files there are to tell descriptors apart by.
const FILES: usize = 16;
/// Transient for sendmsg(2): the transport tries again by a timer.
const ENOBUFS: i32 = 105;
const ETOOMANYREFS: i32 = 109;

/// What is sent, from any position on: every place can be told from its
/// neighbours.
static PATTERN: LazyLock<Vec<u8>> =
    LazyLock::new(|| (0..100_000).map(|n| (n % 251) as u8).collect());

fn pattern(position: usize, length: usize) -> &'static [u8] {
    &PATTERN[position % 251..][..length]
}

/// Files that can be told apart.
#[derive(Debug)]
struct Files {
    files: Vec<Rc<OwnedFd>>,
    inodes: Vec<u64>,
}

impl Files {
    fn new() -> Self {
        let files: Vec<_> = (0..FILES)
            .map(|_| Rc::new(OwnedFd::from(tempfile::tempfile().unwrap())))
            .collect();
        let inodes = files.iter().map(inode).collect();
        Self { files, inodes }
    }

    /// The descriptor that is the `nth` one of a side to be sent.
    fn nth(&self, nth: usize) -> PassedDescriptor {
        PassedDescriptor::shared(&self.files[nth % FILES])
    }
}

fn inode(fd: impl AsFd) -> u64 {
    rustix::fs::fstat(fd).unwrap().st_ino
}

/// What one side has done and seen.
#[derive(Debug, Default)]
struct Side {
    written: usize,
    /// Descriptors queued, and the byte of the stream that each may claim at
    /// the latest.
    queued: Vec<usize>,
    received: usize,
    descriptors: usize,
    made: usize,
    lost: usize,
    reason: String,
    /// It asked for an end, so it may not have read everything.
    has_closed: bool,
    has_failed: bool,
    was_paused: bool,
}

#[derive(Debug)]
struct Run {
    sides: [Side; 2],
    random: Random,
    files: Rc<Files>,
    trace: Vec<(&'static str, usize, usize)>,
}

struct Player {
    run: Rc<RefCell<Run>>,
    side: usize,
}

impl Player {
    /// Now and then does something from inside a callback.
    fn interfere(&self, cx: &mut Context<'_, MemoryStream>) {
        let run = &mut *self.run.borrow_mut();
        if run.random.chance(20) {
            run.act(self.side, cx.transport);
        }
    }
}

impl Run {
    /// One thing that a program may do to its transport.
    fn act(&mut self, side: usize, transport: &mut MemoryStream) {
        let choice = self.random.below(100);
        let mine = &mut self.sides[side];
        self.trace.push(("act", side, choice));
        match choice {
            0..40 => {
                let largest = if choice < 4 { 90_000 } else { 300 };
                let data = pattern(mine.written, self.random.below(largest));
                let status = if choice.is_multiple_of(2) {
                    transport.write(data)
                } else {
                    transport.write_owned(data.to_vec())
                };
                if status != WriteStatus::Refused {
                    mine.written += data.len();
                }
            }
            40..55 => {
                let fd = self.files.nth(mine.queued.len());
                if transport.send_file_descriptor(fd).is_ok() {
                    let next = mine.queued.last().map_or(0, |last| last + 1);
                    mine.queued.push(next.max(mine.written));
                }
            }
            55..70 => {
                let count = 1 + self.random.below(3);
                let data = pattern(mine.written, 1 + self.random.below(500));
                let first = mine.queued.len();
                let fds = (first..first + count).map(|nth| self.files.nth(nth));
                if transport
                    .write_with_descriptors(data, fds.collect())
                    .is_ok()
                {
                    mine.queued.resize(first + count, mine.written);
                    mine.written += data.len();
                }
            }
            70..80 => transport.pause_producing(),
            80..90 => resume(transport),
            90..93 => {
                let limit = self.random.below(2_000);
                transport.set_read_limit(std::num::NonZeroUsize::new(limit));
            }
            93 | 94 => {
                // Refused when there is one.
                let _ = transport.register_producer(ProducerRef::Protocol, ProducerKind::Push);
            }
            95 => transport.unregister_producer(),
            96 => transport.lose_write_connection(),
            97 => {
                mine.has_closed = true;
                transport.lose_connection();
            }
            98 => {
                mine.has_closed = true;
                transport.lose_connection_within(Duration::from_millis(5));
            }
            _ if self.random.chance(30) => {
                mine.has_closed = true;
                mine.has_failed = true;
                transport.abort_connection();
            }
            _ => {}
        }
    }

    fn receive(&mut self, side: usize, data: &[u8]) {
        let (mine, theirs) = {
            let [first, second] = &mut self.sides;
            if side == 0 {
                (first, &*second)
            } else {
                (second, &*first)
            }
        };
        assert!(
            data == pattern(mine.received, data.len()),
            "other bytes than were sent, from {} on",
            mine.received
        );
        mine.received += data.len();
        assert!(mine.received <= theirs.written);
        // Each descriptor came no later than the byte it claimed.
        let due = theirs.queued.iter();
        let due = due
            .take_while(|&&position| position < mine.received)
            .count();
        assert!(
            due <= mine.descriptors,
            "{due} due, {} came",
            mine.descriptors
        );
        self.trace.push(("data", side, data.len()));
    }
}

/// Reads on, unless it is over: then it stays on record that it was not reading.
fn resume(transport: &mut MemoryStream) {
    if transport.state() != TransportState::Lost {
        transport.resume_producing();
    }
}

impl Protocol<MemoryStream> for Player {
    fn connection_made(&mut self, cx: &mut Context<'_, MemoryStream>) {
        self.run.borrow_mut().sides[self.side].made += 1;
        self.interfere(cx);
    }

    fn data_received(&mut self, cx: &mut Context<'_, MemoryStream>, data: &[u8]) {
        assert!(!cx.transport.is_reading_paused() && cx.transport.is_open_for_reading());
        self.run.borrow_mut().receive(self.side, data);
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
            for fd in descriptors {
                let mine = &mut run.sides[self.side];
                let expected = run.files.inodes[mine.descriptors % FILES];
                assert_eq!(inode(&fd), expected, "descriptor {}", mine.descriptors);
                mine.descriptors += 1;
                run.trace.push(("fd", self.side, mine.descriptors));
            }
            let [first, second] = &run.sides;
            let (mine, theirs) = if self.side == 0 {
                (first, second)
            } else {
                (second, first)
            };
            assert!(mine.descriptors <= theirs.queued.len());
        }
        self.data_received(cx, data);
    }

    fn read_connection_lost(&mut self, cx: &mut Context<'_, MemoryStream>) -> AfterReadClosed {
        self.interfere(cx);
        let run = &mut *self.run.borrow_mut();
        run.trace.push(("end", self.side, 0));
        match run.random.below(3) {
            0 => AfterReadClosed::KeepWriting,
            1 => AfterReadClosed::LoseConnection,
            _ => {
                // Drops what is unsent, and calls that clean.
                run.sides[self.side].has_failed = true;
                AfterReadClosed::EndConnection
            }
        }
    }

    fn descriptors_sent(&mut self, cx: &mut Context<'_, MemoryStream>, _: usize) {
        self.interfere(cx);
    }

    fn pause_producing(&mut self, cx: &mut Context<'_, MemoryStream>) {
        self.run.borrow_mut().trace.push(("pause", self.side, 0));
        self.interfere(cx);
    }

    fn resume_producing(&mut self, cx: &mut Context<'_, MemoryStream>) {
        self.run.borrow_mut().trace.push(("resume", self.side, 0));
        self.interfere(cx);
    }

    fn connection_lost(&mut self, cx: &mut Context<'_, MemoryStream>, reason: &CloseReason) {
        let run = &mut *self.run.borrow_mut();
        run.trace.push(("lost", self.side, 0));
        let mine = &mut run.sides[self.side];
        mine.lost += 1;
        mine.reason = reason.to_string();
        mine.was_paused = cx.transport.is_reading_paused();
        assert_eq!(mine.made, 1);
    }
}

/// What a run leaves to be compared.
type Trace = (u64, Vec<(&'static str, usize, usize)>, [String; 2]);

fn simulate(seed: u64, files: &Rc<Files>) -> Trace {
    let mut random = Random::new(!seed);
    let kernel = SimulatedKernel::with_seed(seed);
    kernel.set_settings(
        KernelSettings::default()
            .send_buffer([4_608, 20_000, 212_992][random.below(3)])
            .largest_send([usize::MAX, usize::MAX, 700][random.below(3)])
            .largest_read([usize::MAX, usize::MAX, 400][random.below(3)])
            .cut_percent([0, 20, 60][random.below(3)])
            .delivery([Delivery::Batch, Delivery::OneAtATime, Delivery::Random][random.below(3)])
            .passing_errors_percent([0, 0, 20][random.below(3)])
            .lasting_errors_per_10_000(0)
            .bound_first_percent(0),
    );
    let run = Rc::new(RefCell::new(Run {
        sides: Default::default(),
        random: Random::new(random.any()),
        files: Rc::clone(files),
        trace: Vec::new(),
    }));
    let player = |side| Player {
        run: Rc::clone(&run),
        side,
    };
    let mut pump = Pump::with_kernel(kernel.clone()).unwrap();
    let (first, second) = pump.join(player(0), player(1)).unwrap();
    let both = [first, second];
    let mut killed = None;

    for _ in 0..random.below(60) {
        let side = random.below(2);
        match random.below(20) {
            0..12 => {
                if let Some(transport) = pump.get(both[side]) {
                    run.borrow_mut().act(side, transport);
                }
            }
            12..17 => {
                pump.turn();
            }
            17 => pump.advance(Duration::from_millis(random.below(20) as u64)),
            18 => {
                let nth = random.below(6);
                let transient = [ENOBUFS, ETOOMANYREFS][random.below(2)];
                let error = io::Error::from_raw_os_error(transient);
                kernel.fail_send(both[side].socket(), nth, error);
            }
            _ if random.chance(20) => {
                let error = || io::Error::from(io::ErrorKind::ConnectionReset);
                if random.chance(50) {
                    kernel.fail_read(both[side].socket(), random.below(6), error());
                } else {
                    kernel.fail_send(both[side].socket(), random.below(6), error());
                }
                run.borrow_mut().sides[side].has_failed = true;
            }
            _ if random.chance(20) && killed.is_none() => {
                pump.kill(both[side]);
                killed = Some(side);
                run.borrow_mut().sides[side].has_failed = true;
            }
            _ => {}
        }
    }

    // Everything comes to an end when nobody holds it back.
    for transport in both {
        if let Some(transport) = pump.get(transport) {
            transport.unregister_producer();
            resume(transport);
        }
    }
    pump.advance(Duration::from_secs(1));
    for (side, transport) in both.into_iter().enumerate() {
        if let Some(transport) = pump.get(transport) {
            run.borrow_mut().sides[side].has_closed = true;
            transport.unregister_producer();
            resume(transport);
            transport.lose_connection_within(Duration::from_secs(2));
        }
        pump.advance(Duration::from_secs(1));
    }
    for _ in 0..100 {
        // A producer that registered anew holds its connection open.
        for transport in both {
            if let Some(transport) = pump.get(transport) {
                transport.unregister_producer();
            }
        }
        pump.advance(Duration::from_secs(1));
        if pump.is_lost() {
            break;
        }
    }
    assert!(pump.is_lost(), "a connection does not end: {pump:?}");
    assert_eq!(pump.reactor().statistics().panics, 0);
    drop(pump);
    assert_eq!(kernel.open_sockets(), 0);

    let run = &*run.borrow();
    for (side, mine) in run.sides.iter().enumerate() {
        // Who was killed may have been lost before.
        assert!(
            mine.lost == 1 || (mine.lost == 0 && killed == Some(side)),
            "lost {}",
            mine.lost
        );
        // Who closed in an orderly way has sent all; who only read has it all,
        // but who did not read is not waited for once its write has failed.
        let theirs = &run.sides[1 - side];
        let is_orderly = mine.reason == "closed cleanly"
            && mine.has_closed
            && ["closed cleanly", "connection lost"].contains(&theirs.reason.as_str())
            && !(mine.has_failed || theirs.has_failed || theirs.has_closed || theirs.was_paused);
        if is_orderly {
            assert_eq!(
                (theirs.received, theirs.descriptors),
                (mine.written, mine.queued.len()),
                "what side {side} sent: {run:?}, {:?}",
                kernel.settings()
            );
        }
    }
    let reasons = [run.sides[0].reason.clone(), run.sides[1].reason.clone()];
    (kernel.fingerprint(), run.trace.clone(), reasons)
}

#[test]
fn every_seed_keeps_the_promises() {
    let ledger = DescriptorLedger::open();
    let files = Rc::new(Files::new());
    let seeds = std::env::var("BOWLINE_SEEDS").ok();
    let seeds = seeds.map_or(SEEDS, |seeds| seeds.parse().expect("a number"));
    for seed in 0..seeds {
        let outcome =
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| simulate(seed, &files)));
        assert!(outcome.is_ok(), "seed {seed}");
    }
    drop(files);
    ledger.assert_balanced();
}

#[test]
fn same_seed_does_the_same_again() {
    let _ledger = DescriptorLedger::open();
    let files = Rc::new(Files::new());
    for seed in 0..500 {
        assert!(
            simulate(seed, &files) == simulate(seed, &files),
            "seed {seed}"
        );
    }
    // And another does something else.
    assert!(simulate(1, &files) != simulate(2, &files));
}

/// `BOWLINE_SEED=7 cargo test --test memory replay -- --ignored`.
#[test]
#[ignore = "replays one seed by hand"]
fn replay() {
    let _ledger = DescriptorLedger::open();
    let seed = std::env::var("BOWLINE_SEED").expect("the seed");
    simulate(seed.parse().expect("a number"), &Rc::new(Files::new()));
}
