//! Pipes from a seed, under the real kind: whatever the kernel does, bytes arrive in order,
//! and each end is told once; a FIFO goes on with each writer that opens it.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use bowline::testing::{
    Delivery, FifoMode, KernelSettings, MemoryPipe, ProcessId, Random, SimulatedKernel, Simulation,
};
use bowline::{
    AfterReadClosed, CloseReason, Context, Pipe, Protocol, Reactor, Transport, TransportHandle,
    Transports, WriteStatus,
};

use crate::seeds::{every_seed, tell};
use crate::support::DescriptorLedger;

const MOST: usize = 200_000;

fn pattern(from: usize, length: usize) -> Vec<u8> {
    (from..from + length).map(|n| (n % 251) as u8).collect()
}

/// What one end was told.
#[derive(Clone, Debug, Default, PartialEq)]
struct Seen {
    received: usize,
    written: usize,
    ends: usize,
    was_paused: bool,
    lost: Vec<String>,
}

/// Writes a pattern as room comes, and checks the one that it reads.
struct Node {
    seen: Rc<RefCell<Seen>>,
    kernel: SimulatedKernel,
    most: usize,
}

impl Node {
    fn write<T: Transport + ?Sized>(&self, transport: &mut T) {
        let mut seen = self.seen.borrow_mut();
        while seen.written < self.most {
            let length = self.kernel.choose(|random| match random.chance(80) {
                true => 1 + random.below(5_000),
                false => 1 + random.below(100_000),
            });
            let length = length.min(self.most - seen.written);
            match transport.write(&pattern(seen.written, length)) {
                WriteStatus::Refused => return,
                WriteStatus::Ready => seen.written += length,
                WriteStatus::Full => {
                    seen.written += length;
                    break;
                }
            }
        }
        if seen.written == self.most {
            transport.unregister_producer();
            // One that closes does not read. Of two that close before the other has taken
            // everything, neither would ever end by itself.
            transport.lose_connection_within(Duration::from_secs(60));
        }
    }
}

impl<T: Transport> Protocol<T> for Node {
    fn connection_made(&mut self, cx: &mut Context<'_, T>) {
        if self.most > 0 {
            let kind = bowline::ProducerKind::Push;
            cx.transport
                .register_producer(bowline::ProducerRef::Protocol, kind)
                .unwrap();
            self.write(cx.transport);
        }
    }

    fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
        let mut seen = self.seen.borrow_mut();
        assert!(
            data == pattern(seen.received, data.len()),
            "other bytes than were written, from {} on",
            seen.received
        );
        seen.received += data.len();
        if self.kernel.choose(|random| random.chance(20)) {
            seen.was_paused = true;
            cx.transport.pause_producing();
            let own = cx.transport.handle();
            cx.reactor
                .call_later(Duration::from_millis(3), move |reactor| {
                    resume(reactor, own)
                });
        }
    }

    fn resume_producing(&mut self, cx: &mut Context<'_, T>) {
        self.write(cx.transport);
    }

    fn read_connection_lost(&mut self, _: &mut Context<'_, T>) -> AfterReadClosed {
        self.seen.borrow_mut().ends += 1;
        AfterReadClosed::KeepWriting
    }

    fn connection_lost(&mut self, _: &mut Context<'_, T>, reason: &CloseReason) {
        self.seen.borrow_mut().lost.push(reason.to_string());
    }
}

fn resume(reactor: &mut Reactor, handle: TransportHandle) {
    if let Some(transport) = reactor.get(handle) {
        transport.resume_producing();
    }
}

struct World {
    simulation: Simulation,
    kernel: SimulatedKernel,
    choices: Random,
}

impl World {
    fn new(seed: u64, lasting: u16) -> Self {
        let mut choices = Random::new(seed);
        let simulation = Simulation::new(seed);
        let kernel = simulation.kernel().clone();
        let delivery = [Delivery::Batch, Delivery::OneAtATime, Delivery::Random];
        kernel.set_settings(
            KernelSettings::default()
                .pipe_size(4_096 << choices.below(5))
                .cut_percent(choices.below(50) as u8)
                .passing_errors_percent(choices.below(40) as u8)
                .lasting_errors_per_10_000(lasting)
                .delivery(delivery[choices.below(3)]),
        );
        Self {
            simulation,
            kernel,
            choices,
        }
    }

    fn node(&self, most: usize) -> (Node, Rc<RefCell<Seen>>) {
        let seen: Rc<RefCell<Seen>> = Rc::default();
        let node = Node {
            seen: Rc::clone(&seen),
            kernel: self.kernel.clone(),
            most,
        };
        (node, seen)
    }

    fn process(&mut self) -> ProcessId {
        self.simulation.spawn().unwrap()
    }

    fn adopt(&mut self, process: ProcessId, end: MemoryPipe, node: Node) {
        let reactor = self.simulation.reactor(process).unwrap();
        let fd = end.into_descriptor().unwrap();
        reactor.adopt(Pipe, fd, node).unwrap();
    }

    /// Runs until nothing is left to do, whatever time it takes.
    fn run(&mut self) {
        self.simulation.run();
        while let Some(deadline) = self.simulation.next_deadline() {
            let clock = self.simulation.clock();
            let now = bowline::time::Clock::now(clock);
            clock.advance(deadline.saturating_duration_since(now));
            self.simulation.run();
        }
    }
}

type Outcome = (u64, Vec<Seen>);

#[test]
fn every_byte_comes_through_a_pipe_and_then_its_end() {
    fn simulate(seed: u64) -> Outcome {
        let _ledger = DescriptorLedger::open();
        let mut world = World::new(seed, 0);
        let most = world.choices.below(MOST);
        let (writer, at_writer) = world.node(most.max(1));
        let (reader, at_reader) = world.node(0);
        let (reading, writing) = world.kernel.pipe();
        let processes = [world.process(), world.process()];
        world.adopt(processes[0], writing, writer);
        world.adopt(processes[1], reading, reader);
        world.run();
        let all = [at_writer, at_reader].map(|it| it.borrow().clone());
        let [writer, reader] = &all;
        assert_eq!(
            (writer.written, reader.received),
            (most.max(1), most.max(1))
        );
        assert_eq!((reader.ends, writer.ends), (1, 0), "{reader:?} {writer:?}");
        assert_eq!(writer.lost, ["closed cleanly"]);
        world.run();
        assert!(world.kernel.open_pipes() <= 1);
        (world.kernel.fingerprint(), all.into())
    }

    let (mut bytes, mut paused) = (0, 0);
    let counted = every_seed((20, 10_000), simulate, |(_, all)| {
        bytes += all[1].received;
        paused += usize::from(all[1].was_paused);
    });
    assert!(counted.is_none_or(|(seeds, equal)| seeds == equal));
    assert!(counted.is_none() || paused > 0);
    if let Some((seeds, _)) = counted {
        tell(format_args!(
            "pipes: {seeds} seeds twice, equal; {bytes} bytes, {paused} readers paused"
        ));
    }
}

/// Two pipes as one connection, with a peer that dies, or calls that fail. W-16: of what was
/// cut off the beginning arrives.
#[test]
fn whatever_breaks_a_pair_of_pipes_is_told_once_behind_what_had_arrived() {
    fn simulate(seed: u64) -> Outcome {
        let _ledger = DescriptorLedger::open();
        let mut world = World::new(seed, 30);
        let most = [0; 2].map(|_| 1 + world.choices.below(MOST));
        let (there, back) = (world.kernel.pipe(), world.kernel.pipe());
        let mut all = Vec::new();
        let processes = [world.process(), world.process()];
        for (number, (reading, writing)) in [(back.0, there.1), (there.0, back.1)]
            .into_iter()
            .enumerate()
        {
            let (node, seen) = world.node(most[number]);
            all.push(seen);
            let both = (
                reading.into_descriptor().unwrap(),
                writing.into_descriptor().unwrap(),
            );
            let reactor = world.simulation.reactor(processes[number]).unwrap();
            reactor.adopt(Pipe::pair(), both, node).unwrap();
        }
        let dies = (!seed.is_multiple_of(3)).then(|| processes[(seed % 2) as usize]);
        if let Some(process) = dies {
            for _ in 0..world.choices.below(80) {
                world.simulation.turn();
            }
            world.simulation.kill(process);
        }
        world.run();
        let all: Vec<_> = all.iter().map(|it| it.borrow().clone()).collect();
        for (number, seen) in all.iter().enumerate() {
            let peer = &all[1 - number];
            assert!(seen.received <= peer.written && seen.ends <= 1, "{seen:?}");
            let lives = dies != Some(processes[number]);
            assert!(seen.lost.len() <= 1, "{seen:?}");
            assert!(!lives || seen.lost.len() == 1, "{seen:?}");
        }
        assert_eq!(world.kernel.open_pipes(), 0);
        (world.kernel.fingerprint(), all)
    }

    let mut outcomes = std::collections::BTreeSet::new();
    let counted = every_seed((30, 10_000), simulate, |(_, all)| {
        outcomes.extend(all.into_iter().flat_map(|it| it.lost));
    });
    assert!(counted.is_none_or(|(seeds, equal)| seeds == equal));
    assert!(counted.is_none() || outcomes.len() >= 3, "{outcomes:?}");
    if let Some((seeds, _)) = counted {
        tell(format_args!(
            "pairs of pipes that break: {seeds} seeds twice, equal; ends: {outcomes:?}"
        ));
    }
}

/// A FIFO that several open one after the other, or at once, and that is read by one who
/// holds it open for writing too, so that it never ends.
#[test]
fn a_fifo_goes_on_with_every_writer() {
    /// Counts the bytes that each writer has in it.
    struct Reader(Rc<RefCell<Vec<usize>>>, Rc<RefCell<usize>>);

    impl<T: Transport> Protocol<T> for Reader {
        fn data_received(&mut self, _: &mut Context<'_, T>, data: &[u8]) {
            for writer in data {
                self.0.borrow_mut()[usize::from(*writer)] += 1;
            }
        }

        fn connection_lost(&mut self, _: &mut Context<'_, T>, _: &CloseReason) {
            *self.1.borrow_mut() += 1;
        }
    }

    fn simulate(seed: u64) -> (u64, Vec<usize>, Vec<usize>) {
        let _ledger = DescriptorLedger::open();
        let mut world = World::new(seed, 0);
        let kernel = world.kernel.clone();
        kernel.make_fifo("/fifo").unwrap();
        assert!(kernel.make_fifo("/fifo").is_err());
        assert!(kernel.open_fifo("/fifo", FifoMode::Writing).is_err());
        let counts = Rc::new(RefCell::new(vec![0; 8]));
        let lost: Rc<RefCell<usize>> = Rc::default();
        let process = world.process();
        let reading = kernel.open_fifo("/fifo", FifoMode::Both).unwrap();
        let reactor = world.simulation.reactor(process).unwrap();
        let reader = Reader(Rc::clone(&counts), Rc::clone(&lost));
        let handle = reactor
            .adopt(Pipe::reading(), reading.into_descriptor().unwrap(), reader)
            .unwrap();
        let path = bowline::FileAddress::Path("/fifo".into());
        assert_eq!(
            reactor.get(handle).unwrap().host(),
            bowline::Address::File(path)
        );
        let mut written = vec![0; 8];
        let mut open: Vec<Option<MemoryPipe>> = (0..8).map(|_| None).collect();
        for _ in 0..300 {
            let writer = world.choices.below(8);
            match open[writer].take() {
                None => open[writer] = Some(kernel.open_fifo("/fifo", FifoMode::Writing).unwrap()),
                Some(_) if world.choices.chance(20) => {}
                Some(pipe) => {
                    let length = 1 + world.choices.below(6_000);
                    if let Ok(count) = pipe.write(&vec![writer as u8; length]) {
                        assert!(count == length || length > 4_096, "cut although short");
                        written[writer] += count;
                    }
                    open[writer] = Some(pipe);
                }
            }
            if world.choices.chance(60) {
                world.simulation.turn();
            }
        }
        open.clear();
        world.run();
        assert_eq!(*counts.borrow(), written, "each byte arrives once");
        assert_eq!(*lost.borrow(), 0, "its end was told, which never comes");
        let counts = counts.borrow().clone();
        (kernel.fingerprint(), counts, written)
    }

    let mut bytes = 0;
    let counted = every_seed((10, 10_000), simulate, |(_, counts, _)| {
        bytes += counts.iter().sum::<usize>();
    });
    assert!(counted.is_none_or(|(seeds, equal)| seeds == equal));
    if let Some((seeds, _)) = counted {
        tell(format_args!(
            "FIFOs: {seeds} seeds twice, equal; {bytes} bytes"
        ));
    }
}

/// An end that is taken back: a reader of a FIFO is told of none before its first writer has
/// come, and of none if another one is there by the time that it reads.
#[test]
fn the_end_of_a_fifo_is_taken_back_when_it_is_opened_again() {
    let _ledger = DescriptorLedger::open();
    let mut world = World::new(3, 0);
    world.kernel.set_settings(KernelSettings::default());
    let kernel = world.kernel.clone();
    kernel.make_fifo("/fifo").unwrap();
    let (node, seen) = world.node(0);
    let process = world.process();
    let reading = kernel.open_fifo("/fifo", FifoMode::Reading).unwrap();
    world.adopt(process, reading, node);
    world.run();
    assert!(seen.borrow().lost.is_empty(), "an end before the beginning");
    let first = kernel.open_fifo("/fifo", FifoMode::Writing).unwrap();
    first.write(&pattern(0, 5)).unwrap();
    drop(first);
    let second = kernel.open_fifo("/fifo", FifoMode::Writing).unwrap();
    world.run();
    assert_eq!(seen.borrow().received, 5);
    assert!(seen.borrow().lost.is_empty(), "somebody has it open again");
    second.write(&pattern(5, 7)).unwrap();
    world.run();
    drop(second);
    world.run();
    assert_eq!((seen.borrow().received, seen.borrow().ends), (12, 1));
}
