//! Callbacks of every kind panic: their own connection ends, and nobody else
//! notices.

use std::cell::Cell;
use std::os::fd::{AsFd, OwnedFd};
use std::panic::resume_unwind;
use std::rc::Rc;
use std::time::Duration;

use bowline::testing::{MemoryHandle, MemoryPeer, MemoryStream, Pump, Random, SimulatedKernel};
use bowline::{
    AfterReadClosed, AfterTruncation, AnyConnection as _, AtDrain, CloseReason, Context,
    GracefulStop, Producer, ProducerKind, ProducerRef, Protocol, ReceivedDescriptors, Transport,
    TransportHandle, Transports, UnixTransport, WriteStatus,
};

use crate::support::DescriptorLedger;
use crate::support::figures::{Bound, Figures, scaled};

const NEIGHBOURS: usize = 1_000;
/// How many connections panic between two exchanges with the neighbours, and
/// how many of those there are.
const AT_A_TIME: usize = 50;

/// Where it panics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Made,
    Data,
    Descriptors,
    Sent,
    ReadLost,
    WriteLost,
    Pause,
    Resume,
    Stop,
    ReadingResumed,
    BoxedPause,
    BoxedResume,
    BoxedStop,
    Lost,
    Called,
    Timer,
    Drop,
    OneDescriptor,
    Truncated,
    Detached,
    Reattached,
    Draining,
    Idle,
}

/// Those that are tried beside the neighbours again and again.
const KINDS: [Kind; 21] = [
    Kind::Made,
    Kind::Data,
    Kind::Descriptors,
    Kind::Sent,
    Kind::ReadLost,
    Kind::WriteLost,
    Kind::Pause,
    Kind::Resume,
    Kind::Stop,
    Kind::ReadingResumed,
    Kind::BoxedPause,
    Kind::BoxedResume,
    Kind::BoxedStop,
    Kind::Lost,
    Kind::Called,
    Kind::Timer,
    Kind::Drop,
    Kind::OneDescriptor,
    Kind::Truncated,
    Kind::Detached,
    Kind::Reattached,
];

/// And those that only the end of a reactor calls.
const KINDS_AT_THE_END: [Kind; 2] = [Kind::Draining, Kind::Idle];

/// What the victims have in common.
struct Scene {
    file: Rc<OwnedFd>,
    panics: Cell<usize>,
    made: Cell<usize>,
    lost: Cell<usize>,
}

struct Victim {
    kind: Kind,
    scene: Rc<Scene>,
    /// What it was given is closed with it.
    kept: Vec<OwnedFd>,
}

fn fail(kind: Kind, here: Kind, scene: &Scene) {
    if kind == here {
        scene.panics.set(scene.panics.get() + 1);
        // As a panic, but that nothing is printed.
        resume_unwind(Box::new("deliberate"));
    }
}

impl Victim {
    fn at(&self, here: Kind) {
        fail(self.kind, here, &self.scene);
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        self.at(Kind::Drop);
    }
}

impl Protocol<MemoryStream> for Victim {
    fn connection_made(&mut self, cx: &mut Context<'_, MemoryStream>) {
        self.scene.made.set(self.scene.made.get() + 1);
        // Leaves at once, and one more has no byte to leave with.
        let file = || bowline::PassedDescriptor::shared(&self.scene.file);
        cx.transport.send_file_descriptor(file()).expect("room");
        cx.transport.write(b"d");
        cx.transport.send_file_descriptor(file()).expect("room");
        self.at(Kind::Made);
        match self.kind {
            Kind::Pause | Kind::Resume | Kind::Stop => {
                let producer = ProducerRef::Protocol;
                let registered = cx.transport.register_producer(producer, ProducerKind::Push);
                registered.expect("the first");
            }
            Kind::BoxedPause | Kind::BoxedResume | Kind::BoxedStop => {
                let producer = Boxed {
                    kind: self.kind,
                    scene: Rc::clone(&self.scene),
                };
                let producer = ProducerRef::boxed(producer);
                let registered = cx.transport.register_producer(producer, ProducerKind::Push);
                registered.expect("the first");
            }
            Kind::ReadingResumed => cx.transport.pause_producing(),
            Kind::WriteLost => cx.transport.lose_write_connection(),
            Kind::Timer => {
                let scene = Rc::clone(&self.scene);
                let me = cx.transport.handle();
                cx.reactor.call_later(Duration::ZERO, move |reactor| {
                    if let Some(transport) = reactor.get(me) {
                        transport.abort_connection();
                    }
                    fail(Kind::Timer, Kind::Timer, &scene);
                });
            }
            Kind::Called => {
                let me: TransportHandle = cx.transport.handle();
                cx.reactor
                    .call_protocol::<MemoryStream, Self>(me, |victim, _| victim.at(Kind::Called));
            }
            Kind::Detached | Kind::Reattached => {
                let (kind, scene) = (self.kind, Rc::clone(&self.scene));
                let me: TransportHandle = cx.transport.handle();
                cx.reactor.detach::<Self>(me, move |reactor, detached| {
                    let detached = detached.expect("it is connected");
                    fail(kind, Kind::Detached, &scene);
                    let again = reactor.reattach::<MemoryStream, _>(detached);
                    again.expect("it was one");
                });
            }
            _ => {}
        }
        if matches!(
            self.kind,
            Kind::Pause | Kind::Resume | Kind::BoxedPause | Kind::BoxedResume
        ) {
            cx.transport.write(&[b'w'; 300_000]);
        }
        if matches!(self.kind, Kind::Stop | Kind::BoxedStop) {
            cx.transport.abort_connection();
        }
    }

    fn data_received(&mut self, _: &mut Context<'_, MemoryStream>, _: &[u8]) {
        self.at(Kind::Data);
    }

    fn descriptors_received(
        &mut self,
        cx: &mut Context<'_, MemoryStream>,
        descriptors: &mut ReceivedDescriptors<'_>,
        data: &[u8],
    ) {
        // One is taken and one is not.
        self.kept.extend(descriptors.next());
        self.at(Kind::Descriptors);
        if self.kind == Kind::OneDescriptor
            && let Some(fd) = descriptors.next()
        {
            let taken = self.file_descriptor_received(cx, fd);
            taken.expect("it is taken");
        }
        self.data_received(cx, data);
    }

    fn file_descriptor_received(
        &mut self,
        _: &mut Context<'_, MemoryStream>,
        fd: OwnedFd,
    ) -> Result<(), OwnedFd> {
        self.at(Kind::OneDescriptor);
        drop(fd);
        Ok(())
    }

    fn descriptors_truncated(
        &mut self,
        _: &mut Context<'_, MemoryStream>,
        _: usize,
    ) -> AfterTruncation {
        self.at(Kind::Truncated);
        AfterTruncation::KeepConnection
    }

    fn connection_reattached(&mut self, _: &mut Context<'_, MemoryStream>) {
        self.at(Kind::Reattached);
    }

    fn draining(&mut self, _: &mut Context<'_, MemoryStream>) -> AtDrain {
        self.at(Kind::Draining);
        AtDrain::LoseWhenIdle
    }

    fn is_idle(&self) -> bool {
        self.at(Kind::Idle);
        true
    }

    fn descriptors_sent(&mut self, _: &mut Context<'_, MemoryStream>, _: usize) {
        self.at(Kind::Sent);
    }

    fn read_connection_lost(&mut self, _: &mut Context<'_, MemoryStream>) -> AfterReadClosed {
        self.at(Kind::ReadLost);
        AfterReadClosed::EndConnection
    }

    fn write_connection_lost(&mut self, _: &mut Context<'_, MemoryStream>) {
        self.at(Kind::WriteLost);
    }

    fn pause_producing(&mut self, _: &mut Context<'_, MemoryStream>) {
        self.at(Kind::Pause);
    }

    fn resume_producing(&mut self, _: &mut Context<'_, MemoryStream>) {
        self.at(Kind::Resume);
    }

    fn stop_producing(&mut self, _: &mut Context<'_, MemoryStream>) {
        self.at(Kind::Stop);
    }

    fn reading_resumed(&mut self, _: &mut Context<'_, MemoryStream>) {
        self.at(Kind::ReadingResumed);
    }

    fn connection_lost(&mut self, _: &mut Context<'_, MemoryStream>, _: &CloseReason) {
        self.scene.lost.set(self.scene.lost.get() + 1);
        self.at(Kind::Lost);
    }
}

struct Boxed {
    kind: Kind,
    scene: Rc<Scene>,
}

impl Producer for Boxed {
    fn pause_producing(&mut self, _: &mut Context<'_, dyn Transport>) {
        fail(self.kind, Kind::BoxedPause, &self.scene);
    }

    fn resume_producing(&mut self, _: &mut Context<'_, dyn Transport>) {
        fail(self.kind, Kind::BoxedResume, &self.scene);
    }

    fn stop_producing(&mut self, _: &mut Context<'_, dyn Transport>) {
        fail(self.kind, Kind::BoxedStop, &self.scene);
    }
}

struct Echo;

impl Protocol<MemoryStream> for Echo {
    fn data_received(&mut self, cx: &mut Context<'_, MemoryStream>, data: &[u8]) {
        assert_ne!(cx.transport.write(data), WriteStatus::Refused);
    }
}

/// A neighbour, and how far its stream has come.
struct Neighbour {
    peer: MemoryPeer,
    handle: MemoryHandle,
    sent: usize,
    received: usize,
}

impl Neighbour {
    fn say(&mut self, length: usize) {
        let data: Vec<u8> = (self.sent..self.sent + length).map(|n| n as u8).collect();
        self.sent += self.peer.send(&data).expect("room for it");
    }

    fn hear(&mut self) {
        for byte in self.peer.take().bytes {
            assert_eq!(byte, self.received as u8, "byte {}", self.received);
            self.received += 1;
        }
    }
}

/// Reliability T-33: the connection whose callback panics ends, with all that
/// it owns, and no other one loses a byte.
#[test]
fn panic_in_any_callback_costs_only_its_own_connection() {
    let ledger = DescriptorLedger::open();
    let wanted = scaled(20_000, 100_000);
    let mut random = Random::new(33);
    let mut pump = Pump::with_kernel(SimulatedKernel::with_seed(33)).unwrap();
    let scene = Rc::new(Scene {
        file: Rc::new(tempfile::tempfile().unwrap().into()),
        panics: Cell::new(0),
        made: Cell::new(0),
        lost: Cell::new(0),
    });
    let mut neighbours: Vec<_> = (0..NEIGHBOURS)
        .map(|_| {
            let (handle, peer) = pump.connect(Echo).unwrap();
            Neighbour {
                peer,
                handle,
                sent: 0,
                received: 0,
            }
        })
        .collect();
    let mut of_kind = [0; KINDS.len()];
    let mut victims = 0;
    while scene.panics.get() < wanted {
        let mut peers = Vec::new();
        for _ in 0..AT_A_TIME {
            let kind = random.below(KINDS.len());
            of_kind[kind] += 1;
            let victim = Victim {
                kind: KINDS[kind],
                scene: Rc::clone(&scene),
                kept: Vec::new(),
            };
            let (handle, peer) = pump.connect(victim).unwrap();
            victims += 1;
            // Whatever it waits for.
            let fd = scene.file.as_fd();
            match KINDS[kind] {
                Kind::Data => assert!(peer.send(b"x").is_ok()),
                Kind::Truncated => {
                    pump.kernel().truncate_descriptors(handle.socket(), 1);
                    assert!(peer.send_with_descriptors(b"x", &[fd, fd]).is_ok());
                }
                Kind::Descriptors | Kind::OneDescriptor => {
                    assert!(peer.send_with_descriptors(b"x", &[fd, fd]).is_ok());
                }
                Kind::ReadLost | Kind::Lost | Kind::Drop => peer.shutdown_write(),
                _ => {}
            }
            peers.push((KINDS[kind], handle, peer));
            let neighbour = random.below(NEIGHBOURS);
            neighbours[neighbour].say(1 + random.below(100));
        }
        pump.run();
        for (kind, handle, peer) in &peers {
            match kind {
                Kind::Resume | Kind::BoxedResume => {
                    while !peer.take().bytes.is_empty() {
                        pump.run();
                    }
                }
                Kind::ReadingResumed => {
                    if let Some(transport) = pump.get(*handle) {
                        transport.resume_producing();
                    }
                }
                _ => {}
            }
        }
        pump.advance(Duration::from_millis(1));
        for (kind, handle, peer) in peers {
            assert!(pump.get(handle).is_none(), "{kind:?} lives on");
            peer.take();
            assert!(peer.is_at_end(), "{kind:?} is open");
        }
        neighbours.iter_mut().for_each(Neighbour::hear);
    }
    let alive = neighbours
        .iter()
        .filter(|it| pump.get(it.handle).is_some())
        .count();
    assert!(of_kind.iter().all(|count| *count > wanted / 100));
    // Those that panic when the reactor asks them to drain, and everybody else's end.
    for kind in [KINDS_AT_THE_END; AT_A_TIME].concat() {
        let victim = Victim {
            kind,
            scene: Rc::clone(&scene),
            kept: Vec::new(),
        };
        pump.connect(victim).unwrap();
        victims += 1;
    }
    pump.run();
    neighbours.iter_mut().for_each(|it| it.say(100));
    let second = Duration::from_secs(1);
    let how = GracefulStop::new().deadline(60 * second).grace(second);
    pump.reactor().stop_gracefully(how).unwrap();
    for _ in 0..60 {
        pump.run();
        pump.advance(second);
    }
    assert!(!pump.reactor().is_running(), "somebody is waited for");
    assert_eq!(pump.reactor().statistics().cut, 0);
    neighbours.iter_mut().for_each(Neighbour::hear);
    let lost: usize = neighbours.iter().map(|it| it.sent - it.received).sum();
    let bytes: usize = neighbours.iter().map(|it| it.received).sum();
    assert_eq!(scene.made.get(), victims);
    // Who is taken apart is nobody's when it is dropped.
    let taken_apart = of_kind[KINDS.iter().position(|it| *it == Kind::Detached).unwrap()];
    assert_eq!(
        scene.lost.get(),
        victims - taken_apart,
        "each is told of its end, once"
    );
    assert_eq!(
        pump.reactor().statistics().panics as usize,
        scene.panics.get()
    );
    Figures::of("T-33")
        .must("panics", scene.panics.get(), Bound::AtLeast, wanted)
        .must(
            "kinds of callbacks",
            KINDS.len() + KINDS_AT_THE_END.len(),
            Bound::AtLeast,
            23,
        )
        .must("neighbours alive", alive, Bound::Exactly, NEIGHBOURS)
        .must(
            "bytes of theirs exchanged meanwhile",
            bytes,
            Bound::AtLeast,
            wanted,
        )
        .must("bytes of theirs lost", lost, Bound::Exactly, 0);
    drop((pump, neighbours, scene));
    ledger.assert_balanced();
}
