//! Datagrams from a seed. UDP loses, repeats and reorders them, and who asks again gets an
//! answer all the same. UNIX sockets do none of that: each datagram arrives once, in order
//! and with its descriptors, however full a queue is and whatever call fails.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Duration;

use bowline::testing::{
    Delivery, KernelSettings, MemoryDatagramPeer, MemoryUdp, MemoryUdpPort, MemoryUnixDatagram,
    ProcessId, Random, SimulatedKernel, Simulation,
};
use bowline::{
    Address, CloseReason, Context, Datagram, DatagramHandle, DatagramProtocol, DatagramTransport,
    PassedDescriptor, QueueLimits, SendStatus, Transports, UdpHandle, UdpTransport, UnixAddress,
    UnixDatagramTransport, UnsentDatagram,
};

use crate::seeds::{every_seed, tell};
use crate::support::DescriptorLedger;

const HERE: ([u8; 4], u16) = ([192, 0, 2, 1], 53);
/// How many requests each client has answered.
const REQUESTS: u32 = 20;
const CLIENTS: usize = 3;

/// Runs until nothing is left to do, whatever time it takes.
fn run(simulation: &mut Simulation) {
    simulation.run();
    while let Some(deadline) = simulation.next_deadline() {
        let now = bowline::time::Clock::now(simulation.clock());
        let wait = deadline.saturating_duration_since(now);
        simulation.clock().advance(wait);
        simulation.run();
    }
}

fn kernel_of(simulation: &Simulation, settings: KernelSettings) -> SimulatedKernel {
    let kernel = simulation.kernel().clone();
    kernel.set_settings(settings);
    kernel
}

fn delivery(choices: &mut Random) -> Delivery {
    [Delivery::Batch, Delivery::OneAtATime, Delivery::Random][choices.below(3)]
}

// UDP.

/// Answers each request.
struct Server {
    seen: Rc<RefCell<Vec<Vec<u8>>>>,
}

/// Only listens.
struct Listens(Rc<RefCell<usize>>);

impl<T: DatagramTransport> DatagramProtocol<T> for Listens {
    fn datagram_received(&mut self, _: &mut Context<'_, T>, _: &mut Datagram<'_>) {
        *self.0.borrow_mut() += 1;
    }
}

impl<T: DatagramTransport> DatagramProtocol<T> for Server {
    fn datagram_received(&mut self, cx: &mut Context<'_, T>, datagram: &mut Datagram<'_>) {
        self.seen.borrow_mut().push(datagram.data.to_vec());
        cx.transport.send_to(datagram.data, datagram.from);
    }
}

/// Asks, and asks again until it has an answer.
struct Client {
    number: u8,
    answers: Rc<RefCell<Vec<u32>>>,
    lengths: Random,
    waiting_for: u32,
    sent: Rc<RefCell<usize>>,
}

impl Client {
    fn request(&self) -> Vec<u8> {
        let mut request = vec![self.number];
        request.extend(self.waiting_for.to_ne_bytes());
        // The same for the same request.
        let length = Random::new(u64::from(self.waiting_for)).below(1_400);
        request.resize(request.len() + length, self.number);
        request
    }

    fn ask<T: DatagramTransport + ?Sized>(&self, transport: &mut T) {
        if transport.send(&self.request()).is_taken() {
            *self.sent.borrow_mut() += 1;
        }
    }

    fn again(&self, cx: &mut Context<'_, MemoryUdpPort>) {
        let own = cx.transport.handle();
        let waiting_for = self.waiting_for;
        cx.reactor
            .call_later(Duration::from_millis(50), move |reactor| {
                reactor.call_protocol::<MemoryUdpPort, Self>(own, move |client, cx| {
                    if client.waiting_for == waiting_for {
                        client.ask(cx.transport);
                        client.again(cx);
                    }
                });
            });
    }
}

impl DatagramProtocol<MemoryUdpPort> for Client {
    fn started(&mut self, cx: &mut Context<'_, MemoryUdpPort>) {
        self.ask(cx.transport);
        self.again(cx);
    }

    fn datagram_received(
        &mut self,
        cx: &mut Context<'_, MemoryUdpPort>,
        datagram: &mut Datagram<'_>,
    ) {
        assert_eq!(datagram.from, Address::Inet(HERE.into()).as_ref());
        let (number, rest) = datagram.data.split_first().expect("not empty");
        assert_eq!(*number, self.number, "somebody else's answer");
        let answered = u32::from_ne_bytes(rest[..4].try_into().expect("four bytes"));
        self.answers.borrow_mut().push(answered);
        if answered != self.waiting_for {
            return;
        }
        assert_eq!(datagram.data, self.request(), "other bytes than were sent");
        self.waiting_for += 1;
        match self.waiting_for {
            REQUESTS => cx.transport.stop_listening(),
            _ => {
                if self.lengths.chance(30) {
                    // Twice, as an impatient one does.
                    self.ask(cx.transport);
                }
                self.ask(cx.transport);
                self.again(cx);
            }
        }
    }
}

#[derive(Debug, PartialEq)]
struct UdpRun {
    fingerprint: u64,
    /// What the server has received.
    requests: usize,
    sent: usize,
    answers: Vec<Vec<u32>>,
    loses: bool,
    repeats: bool,
    reorders: bool,
}

fn simulate_udp(seed: u64) -> UdpRun {
    let _ledger = DescriptorLedger::open();
    let mut choices = Random::new(seed);
    let mut simulation = Simulation::new(seed);
    let mut percent = |most: usize| match choices.chance(50) {
        true => choices.below(most) as u8,
        false => 0,
    };
    let (loss, repeat, reorder) = (percent(60), percent(60), percent(60));
    let kernel = kernel_of(
        &simulation,
        KernelSettings::default()
            .loss_percent(loss)
            .duplicate_percent(repeat)
            .reorder_percent(reorder)
            .passing_errors_percent(percent(30))
            .delivery(delivery(&mut choices)),
    );
    let seen: Rc<RefCell<Vec<Vec<u8>>>> = Rc::default();
    let process = simulation.spawn().unwrap();
    let reactor = simulation.reactor(process).unwrap();
    let server = Server {
        seen: Rc::clone(&seen),
    };
    let server_handle: UdpHandle = reactor
        .listen(MemoryUdp::at(&kernel, HERE.into()), server)
        .unwrap();
    let sent: Rc<RefCell<usize>> = Rc::default();
    let mut answers = Vec::new();
    for number in 0..CLIENTS {
        let process = simulation.spawn().unwrap();
        let client = Client {
            number: number as u8,
            answers: Rc::default(),
            lengths: Random::new(seed ^ number as u64),
            waiting_for: 0,
            sent: Rc::clone(&sent),
        };
        answers.push(Rc::clone(&client.answers));
        let reactor = simulation.reactor(process).unwrap();
        reactor
            .connect(MemoryUdp::to(&kernel, HERE.into()), client)
            .unwrap();
    }
    run(&mut simulation);
    let reactor = simulation.reactor(process).unwrap();
    let counts = reactor.get(server_handle).unwrap().counts();
    let dropped = reactor.get(server_handle).unwrap().dropped_by_kernel();
    let requests = seen.borrow().len();
    assert_eq!(counts.received as usize, requests);
    assert_eq!(dropped.unwrap(), 0, "it was never full");
    assert_eq!(kernel.open_datagram_sockets(), 1, "the clients are done");
    let answers: Vec<_> = answers.iter().map(|it| it.borrow().clone()).collect();
    for all in &answers {
        let answered: BTreeSet<_> = all.iter().copied().collect();
        assert_eq!(answered, (0..REQUESTS).collect(), "each has an answer");
        if reorder == 0 {
            assert!(
                all.is_sorted(),
                "answers have overtaken each other: {all:?}"
            );
        }
    }
    let sent = *sent.borrow();
    if loss == 0 && repeat == 0 {
        assert_eq!(requests, sent, "each arrives once");
    }
    assert!(repeat > 0 || requests <= sent, "{requests} of {sent}");
    assert!(loss > 0 || requests >= sent, "{requests} of {sent}");
    UdpRun {
        fingerprint: kernel.fingerprint(),
        requests,
        sent,
        answers,
        loses: requests < sent,
        repeats: requests > sent,
        reorders: loss == 0 && reorder > 0,
    }
}

/// What the network may do to UDP, it does.
#[test]
fn whoever_asks_again_over_udp_is_answered() {
    let (mut lossy, mut repeated, mut reordered, mut requests) = (0, 0, 0, 0);
    let counted = every_seed((30, 10_000), simulate_udp, |run| {
        lossy += usize::from(run.loses);
        repeated += usize::from(run.repeats);
        reordered += usize::from(run.reorders);
        requests += run.requests;
    });
    assert!(counted.is_none_or(|(seeds, equal)| seeds == equal));
    assert!(
        counted.is_none() || lossy > 0 && repeated > 0 && reordered > 0,
        "nothing went wrong: {lossy}, {repeated}, {reordered}"
    );
    if let Some((seeds, _)) = counted {
        tell(format_args!(
            "UDP: {seeds} seeds twice, equal; {requests} requests, {lossy} lossy, {repeated} \
             repeated, {reordered} reordered"
        ));
    }
}

/// A flood that nobody reads is lost at the receiver, and counted there.
#[test]
fn a_flood_of_udp_is_lost_and_counted_at_the_receiver() {
    let _ledger = DescriptorLedger::open();
    let mut simulation = Simulation::new(1);
    let kernel = kernel_of(&simulation, KernelSettings::default().receive_buffer(8_320));
    let process = simulation.spawn().unwrap();
    let seen: Rc<RefCell<Vec<Vec<u8>>>> = Rc::default();
    let server = Server {
        seen: Rc::clone(&seen),
    };
    let reactor = simulation.reactor(process).unwrap();
    let handle = reactor
        .listen(MemoryUdp::at(&kernel, HERE.into()), server)
        .unwrap();
    let peer = MemoryDatagramPeer::udp(&kernel, "192.0.2.9:0".parse().unwrap()).unwrap();
    for number in 0..100 {
        peer.send_to(&[number], &Address::Inet(HERE.into()))
            .unwrap();
    }
    simulation.run();
    let transport = simulation.reactor(process).unwrap().get(handle).unwrap();
    assert_eq!(transport.dropped_by_kernel().unwrap(), 90);
    let expected: Vec<_> = (0..10).map(|number| vec![number]).collect();
    assert_eq!(*seen.borrow(), expected);
}

/// A group is heard by those who have joined it, and broadcasts by those who are
/// bound to all addresses.
#[test]
fn groups_and_broadcasts_reach_who_they_are_for() {
    let _ledger = DescriptorLedger::open();
    let mut simulation = Simulation::new(1);
    let kernel = simulation.kernel().clone();
    let process = simulation.spawn().unwrap();
    let all: SocketAddr = ([0, 0, 0, 0], 5_000).into();
    let seen: Rc<RefCell<usize>> = Rc::default();
    let reactor = simulation.reactor(process).unwrap();
    let server = Listens(Rc::clone(&seen));
    let handle = reactor.listen(MemoryUdp::at(&kernel, all), server).unwrap();
    let client_at = "192.0.2.7:0".parse().unwrap();
    let client = Listens(Rc::default());
    let client = reactor
        .listen(MemoryUdp::at(&kernel, client_at), client)
        .unwrap();
    let group: std::net::IpAddr = [239, 1, 2, 3].into();
    let to = Address::Inet((group, 5_000).into());
    let everybody = Address::Inet(([255, 255, 255, 255], 5_000).into());
    let any = bowline::MulticastInterface::Any;
    let send = |simulation: &mut Simulation, to: &Address| {
        let reactor = simulation.reactor(process).unwrap();
        let transport: &mut dyn UdpTransport = reactor.get(client).unwrap();
        assert!(transport.send_to(b"x", to.as_ref()).is_taken());
        simulation.run();
        std::mem::take(&mut *seen.borrow_mut())
    };
    assert_eq!(send(&mut simulation, &to), 0, "it has not joined");
    let server = |simulation: &mut Simulation, joins: bool| {
        let reactor = simulation.reactor(process).unwrap();
        let transport: &mut dyn UdpTransport = reactor.get(handle).unwrap();
        match joins {
            true => transport.join_multicast(group, any),
            false => transport.leave_multicast(group, any),
        }
    };
    server(&mut simulation, true).unwrap();
    assert!(server(&mut simulation, true).is_err(), "joined already");
    assert_eq!(send(&mut simulation, &to), 1);
    server(&mut simulation, false).unwrap();
    assert_eq!(send(&mut simulation, &to), 0);
    assert_eq!(send(&mut simulation, &everybody), 0, "not allowed yet");
    let reactor = simulation.reactor(process).unwrap();
    let transport: &mut dyn UdpTransport = reactor.get(client).unwrap();
    transport.set_broadcast(true).unwrap();
    assert_eq!(send(&mut simulation, &everybody), 1);
}

// UNIX.

/// What one sender was told.
#[derive(Clone, Debug, Default, PartialEq)]
struct SenderSeen {
    taken: u32,
    failed: Vec<u32>,
    /// The descriptors of those that failed.
    given_back: usize,
    resumed: usize,
    stopped: Vec<String>,
}

/// Sends numbered datagrams as room comes, to its peer or to a name.
struct Sender {
    number: u8,
    kernel: SimulatedKernel,
    seen: Rc<RefCell<SenderSeen>>,
    to: Option<Address>,
    most: u32,
    spare: Rc<OwnedFd>,
}

fn numbered(sender: u8, number: u32, length: usize) -> Vec<u8> {
    let mut data = vec![sender];
    data.extend(number.to_ne_bytes());
    data.resize(5 + length, sender);
    data
}

fn number_of(data: &[u8]) -> (u8, u32) {
    let number = u32::from_ne_bytes(data[1..5].try_into().expect("four bytes"));
    (data[0], number)
}

impl Sender {
    fn send<T: UnixDatagramTransport + ?Sized>(&self, transport: &mut T) {
        loop {
            let number = self.seen.borrow().taken;
            if number == self.most {
                transport.stop_listening();
                return;
            }
            let (length, count) = self
                .kernel
                .choose(|random| (random.below(3_000), random.below(3)));
            let data = numbered(self.number, number, length);
            let to = self.to.as_ref().map(|to| to.as_ref());
            let descriptors = (0..count).map(|_| PassedDescriptor::shared(&self.spare));
            match transport.send_with_descriptors(&data, to, descriptors.collect()) {
                Ok(SendStatus::Ready) => self.seen.borrow_mut().taken += 1,
                Ok(SendStatus::Full) => {
                    self.seen.borrow_mut().taken += 1;
                    return;
                }
                Ok(SendStatus::Refused(_)) => unreachable!("it gives the descriptors back"),
                Err(_) => return,
            }
        }
    }
}

impl<T: UnixDatagramTransport> DatagramProtocol<T> for Sender {
    fn started(&mut self, cx: &mut Context<'_, T>) {
        cx.transport
            .set_queue_limits(QueueLimits::default().full(8).most(16));
        self.send(cx.transport);
    }

    fn datagram_received(&mut self, _: &mut Context<'_, T>, _: &mut Datagram<'_>) {
        unreachable!("nobody answers");
    }

    fn sending_resumed(&mut self, cx: &mut Context<'_, T>) {
        self.seen.borrow_mut().resumed += 1;
        self.send(cx.transport);
    }

    fn send_failed(
        &mut self,
        _: &mut Context<'_, T>,
        datagram: UnsentDatagram<'_>,
        _: &std::io::Error,
    ) {
        let mut seen = self.seen.borrow_mut();
        seen.failed.push(number_of(datagram.data).1);
        seen.given_back += datagram.descriptors.len();
    }

    fn stopped(&mut self, _: &mut Context<'_, T>, reason: &CloseReason) {
        self.seen.borrow_mut().stopped.push(reason.to_string());
    }
}

/// Notes what it receives, and pauses now and then.
struct Receiver {
    kernel: SimulatedKernel,
    seen: Rc<RefCell<BTreeMap<u8, Vec<u32>>>>,
}

impl<T: DatagramTransport> DatagramProtocol<T> for Receiver {
    fn datagram_received(&mut self, cx: &mut Context<'_, T>, datagram: &mut Datagram<'_>) {
        let (sender, number) = number_of(datagram.data);
        assert!(datagram.data[5..].iter().all(|byte| *byte == sender));
        assert!(!datagram.lost_descriptors);
        datagram.descriptors.by_ref().for_each(drop);
        let mut seen = self.seen.borrow_mut();
        seen.entry(sender).or_default().push(number);
        if self.kernel.choose(|random| random.chance(20)) {
            cx.transport.pause_producing();
            let own: DatagramHandle = cx.transport.handle();
            cx.reactor
                .call_later(Duration::from_millis(3), move |reactor| {
                    if let Some(transport) = reactor.get(own) {
                        transport.resume_producing();
                    }
                });
        }
    }
}

struct UnixRun {
    simulation: Simulation,
    kernel: SimulatedKernel,
    receiver: ProcessId,
    received: Rc<RefCell<BTreeMap<u8, Vec<u32>>>>,
    senders: Vec<Rc<RefCell<SenderSeen>>>,
}

const DATAGRAMS: u32 = 60;

/// Two senders that are connected to the receiver, and one that names it each time.
fn start_unix(seed: u64, lasting: u16) -> UnixRun {
    let mut choices = Random::new(seed);
    let mut simulation = Simulation::new(seed);
    let kernel = kernel_of(
        &simulation,
        KernelSettings::default()
            .send_buffer(4_608 + choices.below(60_000))
            .datagram_queue(choices.below(12))
            .passing_errors_percent(choices.below(30) as u8)
            .lasting_errors_per_10_000(lasting)
            .delivery(delivery(&mut choices)),
    );
    let spare = Rc::new(OwnedFd::from(std::fs::File::open("/dev/null").unwrap()));
    let name = UnixAddress::Abstract(b"here".to_vec());
    let receiver = simulation.spawn().unwrap();
    let received: Rc<RefCell<BTreeMap<u8, Vec<u32>>>> = Rc::default();
    let protocol = Receiver {
        kernel: kernel.clone(),
        seen: Rc::clone(&received),
    };
    let reactor = simulation.reactor(receiver).unwrap();
    reactor
        .listen(MemoryUnixDatagram::at(&kernel, name.clone()), protocol)
        .unwrap();
    let mut senders = Vec::new();
    for number in 0..3 {
        let process = simulation.spawn().unwrap();
        let seen: Rc<RefCell<SenderSeen>> = Rc::default();
        senders.push(Rc::clone(&seen));
        let sender = Sender {
            number,
            kernel: kernel.clone(),
            seen,
            to: (number == 2).then(|| name.clone().into()),
            most: DATAGRAMS,
            spare: Rc::clone(&spare),
        };
        let reactor = simulation.reactor(process).unwrap();
        if number == 2 {
            let own = MemoryUnixDatagram::at(&kernel, UnixAddress::Unnamed);
            reactor.listen(own, sender).unwrap();
        } else {
            reactor
                .connect(MemoryUnixDatagram::to(&kernel, name.clone()), sender)
                .unwrap();
        }
    }
    UnixRun {
        simulation,
        kernel,
        receiver,
        received,
        senders,
    }
}

type UnixOutcome = (u64, BTreeMap<u8, Vec<u32>>, Vec<SenderSeen>);

impl UnixRun {
    fn finish(&mut self) -> UnixOutcome {
        run(&mut self.simulation);
        let senders = self.senders.iter().map(|it| it.borrow().clone()).collect();
        (
            self.kernel.fingerprint(),
            self.received.borrow().clone(),
            senders,
        )
    }
}

/// Nothing is lost on UNIX sockets, and who sends waits for who reads.
#[test]
fn every_unix_datagram_arrives_once_and_in_order() {
    fn simulate(seed: u64) -> UnixOutcome {
        let _ledger = DescriptorLedger::open();
        let mut run = start_unix(seed, 0);
        let outcome = run.finish();
        for (sender, numbers) in &outcome.1 {
            let expected: Vec<_> = (0..DATAGRAMS).collect();
            assert_eq!(*numbers, expected, "of sender {sender}");
        }
        assert_eq!(outcome.1.len(), 3);
        for seen in &outcome.2 {
            assert_eq!((seen.taken, seen.failed.len()), (DATAGRAMS, 0));
            assert_eq!(seen.stopped, ["closed cleanly"]);
        }
        assert_eq!(run.kernel.open_datagram_sockets(), 1);
        outcome
    }

    let mut resumed = 0;
    let counted = every_seed((20, 10_000), simulate, |(_, _, senders)| {
        resumed += senders.iter().map(|it| it.resumed).sum::<usize>();
    });
    assert!(counted.is_none_or(|(seeds, equal)| seeds == equal));
    assert!(counted.is_none() || resumed > 0, "no queue was ever full");
    if let Some((seeds, _)) = counted {
        tell(format_args!(
            "UNIX datagrams: {seeds} seeds twice, equal; {} datagrams each, {resumed} times full",
            3 * DATAGRAMS
        ));
    }
}

/// Law 16: what was taken and cannot leave comes back, with its descriptors. The receiver
/// dies, and calls fail for good.
#[test]
fn whatever_cannot_be_sent_comes_back() {
    fn simulate(seed: u64) -> UnixOutcome {
        let _ledger = DescriptorLedger::open();
        let mut run = start_unix(seed, 40);
        for _ in 0..(seed % 120) {
            run.simulation.turn();
        }
        if seed.is_multiple_of(2) {
            run.simulation.kill(run.receiver);
        }
        let outcome = run.finish();
        for (number, seen) in outcome.2.iter().enumerate() {
            let received = outcome.1.get(&(number as u8));
            let received = received.map_or(&[][..], |it| &it[..]);
            assert!(received.is_sorted() && seen.failed.is_sorted());
            let mut all: BTreeSet<_> = received.iter().copied().collect();
            assert_eq!(all.len(), received.len(), "twice");
            for failed in &seen.failed {
                assert!(all.insert(*failed), "{failed} has arrived, and failed");
            }
            assert!(all.len() <= seen.taken as usize);
            assert!(seen.stopped.len() <= 1);
            if run.simulation.is_alive(run.receiver) && seen.stopped == ["closed cleanly"] {
                let is_heard = run.kernel.open_datagram_sockets() == 1;
                assert!(
                    !is_heard || all.len() == seen.taken as usize,
                    "{} of {} are known of",
                    all.len(),
                    seen.taken
                );
            }
        }
        outcome
    }

    let mut failed = 0;
    let counted = every_seed((40, 10_000), simulate, |(_, _, senders)| {
        failed += senders.iter().map(|it| it.failed.len()).sum::<usize>();
    });
    assert!(counted.is_none_or(|(seeds, equal)| seeds == equal));
    assert!(counted.is_none() || failed > 0);
    if let Some((seeds, _)) = counted {
        tell(format_args!(
            "UNIX datagrams that fail: {seeds} seeds twice, equal; {failed} came back"
        ));
    }
}
