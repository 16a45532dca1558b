//! Connections of packets from a seed: whatever the kernel does, each packet arrives once,
//! whole, in order and with its descriptors, and each end is told once.

use std::cell::RefCell;
use std::os::fd::OwnedFd;
use std::rc::Rc;

use bowline::testing::{
    Delivery, KernelSettings, MemoryPacketPeer, MemoryPackets, ProcessId, Random, SimulatedKernel,
    Simulation,
};
use bowline::{
    Address, AfterReadClosed, CloseReason, Context, Packet, PacketHandle, PacketProtocol,
    PacketTransport, PassedDescriptor, SendStatus, Transports,
};

use crate::seeds::every_seed;
use crate::support::DescriptorLedger;

/// What one end has seen.
#[derive(Clone, Debug, Default, PartialEq)]
struct Seen {
    made: usize,
    /// The number, length and descriptors of each packet.
    packets: Vec<(u32, usize, usize)>,
    ends: usize,
    lost: Vec<String>,
}

/// Sends numbered packets as room comes, and notes what it receives.
struct Node {
    seen: Rc<RefCell<Seen>>,
    kernel: SimulatedKernel,
    next: u32,
    most: u32,
    pauses: bool,
    spare: Rc<OwnedFd>,
}

impl Node {
    fn send<T: PacketTransport + ?Sized>(&mut self, transport: &mut T) {
        while self.next < self.most {
            let (length, count) = self
                .kernel
                .choose(|random| (4 + random.below(3_000), random.below(4)));
            let mut data = self.next.to_ne_bytes().to_vec();
            data.resize(length, 0);
            let descriptors = (0..count).map(|_| PassedDescriptor::shared(&self.spare));
            let status = match count {
                0 => transport.send(&data),
                _ => match transport.send_with_descriptors(&data, descriptors.collect()) {
                    Ok(status) => status,
                    Err(_) => return,
                },
            };
            match status {
                SendStatus::Ready => self.next += 1,
                SendStatus::Full => {
                    self.next += 1;
                    return;
                }
                SendStatus::Refused(_) => return,
            }
        }
        transport.lose_write_connection();
    }
}

impl<T: PacketTransport> PacketProtocol<T> for Node {
    fn connection_made(&mut self, cx: &mut Context<'_, T>) {
        self.seen.borrow_mut().made += 1;
        self.send(cx.transport);
    }

    fn packet_received(&mut self, cx: &mut Context<'_, T>, packet: &mut Packet<'_>) {
        let number = u32::from_ne_bytes(packet.data[..4].try_into().expect("four bytes"));
        let count = packet.descriptors.by_ref().count();
        let seen = (number, packet.length, count);
        self.seen.borrow_mut().packets.push(seen);
        if self.pauses && self.kernel.choose(|random| random.chance(20)) {
            cx.transport.pause_producing();
            let own = cx.transport.handle();
            cx.reactor
                .call_later(std::time::Duration::from_millis(3), move |reactor| {
                    resume(reactor.get(own));
                });
        }
    }

    fn sending_resumed(&mut self, cx: &mut Context<'_, T>) {
        self.send(cx.transport);
    }

    fn read_connection_lost(&mut self, _: &mut Context<'_, T>) -> AfterReadClosed {
        self.seen.borrow_mut().ends += 1;
        AfterReadClosed::KeepWriting
    }

    fn connection_lost(&mut self, _: &mut Context<'_, T>, reason: &CloseReason) {
        self.seen.borrow_mut().lost.push(reason.to_string());
    }
}

fn resume(transport: Option<&mut dyn PacketTransport>) {
    if let Some(transport) = transport {
        transport.resume_producing();
    }
}

struct World {
    simulation: Simulation,
    kernel: SimulatedKernel,
    spare: Rc<OwnedFd>,
}

impl World {
    fn new(seed: u64, lasting: u16) -> Self {
        let mut choices = Random::new(seed);
        let simulation = Simulation::new(seed);
        let kernel = simulation.kernel().clone();
        let delivery = [Delivery::Batch, Delivery::OneAtATime, Delivery::Random];
        kernel.set_settings(
            KernelSettings::default()
                .send_buffer(4_608 + choices.below(100_000))
                .passing_errors_percent(choices.below(40) as u8)
                .lasting_errors_per_10_000(lasting)
                .delivery(delivery[choices.below(3)]),
        );
        let spare = Rc::new(OwnedFd::from(std::fs::File::open("/dev/null").unwrap()));
        Self {
            simulation,
            kernel,
            spare,
        }
    }

    fn node(&self, most: u32) -> (Node, Rc<RefCell<Seen>>) {
        let seen: Rc<RefCell<Seen>> = Rc::default();
        let node = Node {
            seen: Rc::clone(&seen),
            kernel: self.kernel.clone(),
            next: 0,
            most,
            pauses: true,
            spare: Rc::clone(&self.spare),
        };
        (node, seen)
    }

    /// A server process with one connection of a client process.
    fn connect(&mut self, most: u32) -> ([ProcessId; 2], [Rc<RefCell<Seen>>; 2]) {
        let processes = [(); 2].map(|()| self.simulation.spawn().unwrap());
        let [(server, at_server), (client, at_client)] = [self.node(most), self.node(most)];
        let kernel = self.kernel.clone();
        let reactor = self.simulation.reactor(processes[0]).unwrap();
        let mut server = Some(server);
        let factory = move |_: &Address| server.take().expect("one connection");
        reactor
            .listen(MemoryPackets::at(&kernel, "here"), factory)
            .unwrap();
        let reactor = self.simulation.reactor(processes[1]).unwrap();
        let mut client = Some(client);
        let factory = move |_: &Address| client.take().expect("one attempt");
        reactor
            .connect(MemoryPackets::to(&kernel, "here"), factory)
            .unwrap();
        (processes, [at_server, at_client])
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

fn assert_in_order(seen: &Seen) {
    for (place, (number, ..)) in seen.packets.iter().enumerate() {
        assert_eq!(*number as usize, place, "each once, in order");
    }
}

#[test]
fn every_packet_arrives_and_every_end_is_told() {
    fn simulate(seed: u64) -> (u64, Seen, Seen) {
        let _ledger = DescriptorLedger::open();
        let mut world = World::new(seed, 0);
        let (_, [server, client]) = world.connect(200);
        world.run();
        let (server, client) = (server.borrow().clone(), client.borrow().clone());
        for seen in [&server, &client] {
            assert_eq!((seen.made, seen.packets.len(), seen.ends), (1, 200, 1));
            assert_in_order(seen);
            assert_eq!(seen.lost, ["closed cleanly"]);
        }
        assert_eq!(world.kernel.open_sockets(), 0);
        (world.kernel.fingerprint(), server, client)
    }

    let counted = every_seed((20, 5_000), simulate, |_| {});
    assert!(counted.is_none_or(|(seeds, equal)| seeds == equal));
}

/// Law 17, and W-16: of what was cut off the beginning arrives, with its descriptors.
#[test]
fn whatever_breaks_is_told_once_behind_what_had_arrived() {
    fn simulate(seed: u64) -> (u64, Seen, Seen) {
        let _ledger = DescriptorLedger::open();
        let mut world = World::new(seed, 30);
        let (processes, seen) = world.connect(300);
        if seed.is_multiple_of(3) {
            // One dies in the middle.
            for _ in 0..(seed % 50) {
                world.simulation.turn();
            }
            world.simulation.kill(processes[(seed % 2) as usize]);
        }
        world.run();
        let [server, client] = seen.map(|seen| seen.borrow().clone());
        for (seen, process) in [(&server, processes[0]), (&client, processes[1])] {
            assert_in_order(seen);
            assert!(seen.ends <= 1 && seen.made <= 1);
            if world.simulation.is_alive(process) {
                assert_eq!(seen.lost.len(), seen.made, "{seen:?}");
            }
        }
        (world.kernel.fingerprint(), server, client)
    }

    let mut outcomes = std::collections::BTreeSet::new();
    let counted = every_seed((40, 5_000), simulate, |(_, server, client)| {
        outcomes.extend(server.lost);
        outcomes.extend(client.lost);
    });
    assert!(counted.is_none_or(|(seeds, equal)| seeds == equal));
    assert!(counted.is_none() || outcomes.len() >= 4, "{outcomes:?}");
}

#[test]
fn a_peer_in_the_hands_of_a_test_sees_packets() {
    let _ledger = DescriptorLedger::open();
    let mut world = World::new(1, 0);
    world.kernel.set_settings(KernelSettings::default());
    let process = world.simulation.spawn().unwrap();
    let kernel = world.kernel.clone();
    let (node, seen) = world.node(2);
    let mut node = Some(node);
    let reactor = world.simulation.reactor(process).unwrap();
    let factory = move |_: &Address| node.take().expect("one connection");
    reactor
        .listen(MemoryPackets::at(&kernel, "here"), factory)
        .unwrap();
    assert!(kernel.connect("here").is_err(), "it is for packets");
    let peer = MemoryPacketPeer::connect(&kernel, "here").unwrap();
    assert!(MemoryPacketPeer::connect(&kernel, "elsewhere").is_err());
    peer.send(&7_u32.to_ne_bytes()).unwrap();
    assert!(peer.receive().is_err());
    world.run();
    assert_eq!(seen.borrow().packets, [(7, 4, 0)]);
    for number in 0..2_u32 {
        let packet = peer.receive().unwrap().expect("no end");
        assert_eq!(packet.bytes[..4], number.to_ne_bytes());
    }
    assert!(peer.receive().unwrap().is_none(), "our side is closed");
    assert!(peer.send(&vec![0; 1_000_000]).is_err(), "too long");
    let (one, other) = kernel.pair_of_packets();
    let reactor = world.simulation.reactor(process).unwrap();
    let (node, adopted) = {
        let seen: Rc<RefCell<Seen>> = Rc::default();
        let spare = Rc::clone(&world.spare);
        let node = Node {
            seen: Rc::clone(&seen),
            kernel,
            next: 0,
            most: 1,
            pauses: false,
            spare,
        };
        (node, seen)
    };
    let _handle: PacketHandle = reactor.adopt(MemoryPackets, one, node).unwrap();
    let other = MemoryPacketPeer::new(other);
    world.run();
    other.shutdown_write();
    world.run();
    assert_eq!(adopted.borrow().lost, ["closed cleanly"]);
    drop((peer, other));
    world.run();
    assert_eq!(world.kernel.open_sockets(), 0);
}
