//! One connection of any kind: our transport at one end, whatever the kind has for a
//! peer at the other.
//!
//! Which kinds there are, and what their peers are, is `crate::harness`'s to say: this
//! file, and the suite in `stream/`, is used by the tests of kinds and layers from
//! outside of the workspace too (`tests/outside`).

use std::cell::Cell;
use std::io;
use std::rc::{Rc, Weak};
use std::time::{Duration, Instant};

use bowline::testing::ManualClock;
use bowline::{
    AfterReadClosed, AtDrain, CloseReason, Context, Protocol, Reactor, Remains, Transport,
    TransportHandle,
};
use tempfile::TempDir;

use crate::harness::{Kind, Peer};
use crate::support::{DEADLINE, DescriptorLedger, Event, Record, Recorder, run_until_quiet_for};

pub(crate) type DynContext<'a> = Context<'a, dyn Transport>;
type Hook = Box<dyn FnMut(&mut DynContext<'_>)>;
type DataHook = Box<dyn FnMut(&mut DynContext<'_>, &[u8])>;
type ReadClosedHook = Box<dyn FnMut(&mut DynContext<'_>) -> AfterReadClosed>;
type DrainHook = Box<dyn FnMut(&mut DynContext<'_>) -> AtDrain>;
type LostHook = Box<dyn FnMut(&mut DynContext<'_>, &CloseReason)>;

/// A protocol that records everything, and does in each callback what the test
/// says.
#[derive(Default)]
pub(crate) struct Script {
    recorder: Recorder,
    alive: Rc<()>,
    on_made: Option<Hook>,
    on_data: Option<DataHook>,
    on_read_closed: Option<ReadClosedHook>,
    on_write_closed: Option<Hook>,
    on_broken: Option<Hook>,
    on_lost: Option<LostHook>,
    on_reading_resumed: Option<Hook>,
    on_pause: Option<Hook>,
    on_resume: Option<Hook>,
    on_drain: Option<DrainHook>,
    is_busy: Rc<Cell<bool>>,
}

impl Script {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    pub(crate) fn record(&self) -> Record {
        self.recorder.record.clone()
    }

    pub(crate) fn made(mut self, hook: impl FnMut(&mut DynContext<'_>) + 'static) -> Self {
        self.on_made = Some(Box::new(hook));
        self
    }

    pub(crate) fn data(mut self, hook: impl FnMut(&mut DynContext<'_>, &[u8]) + 'static) -> Self {
        self.on_data = Some(Box::new(hook));
        self
    }

    pub(crate) fn read_closed(
        mut self,
        hook: impl FnMut(&mut DynContext<'_>) -> AfterReadClosed + 'static,
    ) -> Self {
        self.on_read_closed = Some(Box::new(hook));
        self
    }

    pub(crate) fn drain(
        mut self,
        hook: impl FnMut(&mut DynContext<'_>) -> AtDrain + 'static,
    ) -> Self {
        self.on_drain = Some(Box::new(hook));
        self
    }

    /// Is not idle while the cell says so.
    pub(crate) fn busy(mut self, is_busy: &Rc<Cell<bool>>) -> Self {
        self.is_busy = Rc::clone(is_busy);
        self
    }

    /// Goes on writing when the peer has closed its side.
    pub(crate) fn keep_writing(self) -> Self {
        self.read_closed(|_| AfterReadClosed::KeepWriting)
    }

    pub(crate) fn write_closed(mut self, hook: impl FnMut(&mut DynContext<'_>) + 'static) -> Self {
        self.on_write_closed = Some(Box::new(hook));
        self
    }

    pub(crate) fn broken(mut self, hook: impl FnMut(&mut DynContext<'_>) + 'static) -> Self {
        self.on_broken = Some(Box::new(hook));
        self
    }

    pub(crate) fn lost(
        mut self,
        hook: impl FnMut(&mut DynContext<'_>, &CloseReason) + 'static,
    ) -> Self {
        self.on_lost = Some(Box::new(hook));
        self
    }

    pub(crate) fn reading_resumed(
        mut self,
        hook: impl FnMut(&mut DynContext<'_>) + 'static,
    ) -> Self {
        self.on_reading_resumed = Some(Box::new(hook));
        self
    }

    pub(crate) fn pause(mut self, hook: impl FnMut(&mut DynContext<'_>) + 'static) -> Self {
        self.on_pause = Some(Box::new(hook));
        self
    }

    pub(crate) fn resume(mut self, hook: impl FnMut(&mut DynContext<'_>) + 'static) -> Self {
        self.on_resume = Some(Box::new(hook));
        self
    }
}

fn call(hook: &mut Option<Hook>, cx: &mut DynContext<'_>) {
    if let Some(hook) = hook {
        hook(cx);
    }
}

impl<T: Transport> Protocol<T> for Script {
    fn connection_made(&mut self, cx: &mut Context<'_, T>) {
        self.recorder.connection_made(cx);
        call(&mut self.on_made, &mut cx.as_dyn());
    }

    fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
        self.recorder.data_received(cx, data);
        if let Some(hook) = &mut self.on_data {
            hook(&mut cx.as_dyn(), data);
        }
    }

    fn read_connection_lost(&mut self, cx: &mut Context<'_, T>) -> AfterReadClosed {
        self.recorder.record.push(Event::ReadClosed);
        match &mut self.on_read_closed {
            Some(hook) => hook(&mut cx.as_dyn()),
            // What the trait's own default answers.
            None => Protocol::<T>::read_connection_lost(&mut Plain, cx),
        }
    }

    fn write_connection_lost(&mut self, cx: &mut Context<'_, T>) {
        self.recorder.write_connection_lost(cx);
        call(&mut self.on_write_closed, &mut cx.as_dyn());
    }

    fn connection_lost(&mut self, cx: &mut Context<'_, T>, reason: &CloseReason) {
        self.recorder.connection_lost(cx, reason);
        if let Some(hook) = &mut self.on_lost {
            hook(&mut cx.as_dyn(), reason);
        }
    }

    fn connection_broken(&mut self, cx: &mut Context<'_, T>, remains: Remains) {
        self.recorder.connection_broken(cx, remains);
        call(&mut self.on_broken, &mut cx.as_dyn());
    }

    fn reading_resumed(&mut self, cx: &mut Context<'_, T>) {
        self.recorder.reading_resumed(cx);
        call(&mut self.on_reading_resumed, &mut cx.as_dyn());
    }

    fn draining(&mut self, cx: &mut Context<'_, T>) -> AtDrain {
        self.recorder.record.push(Event::Draining);
        match &mut self.on_drain {
            Some(hook) => hook(&mut cx.as_dyn()),
            // What the trait's own default answers.
            None => Protocol::<T>::draining(&mut Plain, cx),
        }
    }

    fn is_idle(&self) -> bool {
        !self.is_busy.get()
    }

    fn pause_producing(&mut self, cx: &mut Context<'_, T>) {
        self.recorder.pause_producing(cx);
        call(&mut self.on_pause, &mut cx.as_dyn());
    }

    fn resume_producing(&mut self, cx: &mut Context<'_, T>) {
        self.recorder.resume_producing(cx);
        call(&mut self.on_resume, &mut cx.as_dyn());
    }

    fn stop_producing(&mut self, cx: &mut Context<'_, T>) {
        self.recorder.stop_producing(cx);
    }
}

/// A protocol with nothing but defaults.
struct Plain;

impl<T: Transport> Protocol<T> for Plain {
    fn data_received(&mut self, _: &mut Context<'_, T>, _: &[u8]) {}
}

/// How a stream ended for the peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    Clean,
    Reset,
    /// Without the word that belongs to it, where there is one.
    CutOff,
}

/// How large the buffers of the sockets are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Buffers {
    Default,
    /// Much smaller than the default for sending, where they can be set.
    Small,
}

/// One connection, and everything around it.
pub(crate) struct Link {
    pub(crate) reactor: Reactor,
    pub(crate) clock: ManualClock,
    pub(crate) handle: TransportHandle,
    pub(crate) record: Record,
    /// `None` once closed.
    pub(crate) peer: Option<Peer>,
    alive: Weak<()>,
    directory: Option<TempDir>,
    ledger: DescriptorLedger,
}

impl Link {
    /// A connection with a reactor whose clock stands still.
    #[track_caller]
    pub(crate) fn new(kind: Kind, script: Script) -> Self {
        Self::with_buffers(kind, Buffers::Default, script)
    }

    #[track_caller]
    pub(crate) fn with_buffers(kind: Kind, buffers: Buffers, script: Script) -> Self {
        let ledger = DescriptorLedger::open();
        let record = script.record();
        let alive = Rc::downgrade(&script.alive);
        let clock = ManualClock::new();
        let mut reactor = Reactor::with_clock(clock.clone()).unwrap();
        let (peer, directory) = kind.connect(&mut reactor, buffers, script);
        if record.summary().is_empty() {
            // An adopted one: connection_made comes with the first turn.
            reactor.turn(Some(Duration::ZERO));
        }
        let handle = record.handle(0);
        Self {
            reactor,
            clock,
            handle,
            record,
            peer: Some(peer),
            alive,
            directory,
            ledger,
        }
    }

    #[track_caller]
    pub(crate) fn transport(&mut self) -> &mut dyn Transport {
        self.reactor.get(self.handle).expect("connected")
    }

    #[track_caller]
    pub(crate) fn peer(&mut self) -> &mut Peer {
        self.peer.as_mut().expect("not closed")
    }

    /// Closes the peer's end.
    pub(crate) fn close_peer(&mut self) {
        if let Some(peer) = self.peer.take() {
            peer.close();
        }
    }

    /// Ends the peer's end with a reset: linger on TCP, unread bytes on UNIX,
    /// which must be there.
    #[track_caller]
    pub(crate) fn reset_by_peer(&mut self) {
        self.peer.take().expect("not closed").reset();
    }

    pub(crate) fn turn(&mut self) {
        self.reactor.turn(Some(Duration::ZERO));
    }

    /// Turns until nothing happens any more. The clock stands.
    pub(crate) fn settle(&mut self) {
        // Loopback traffic is there at once; the wait is for the rest.
        run_until_quiet_for(&mut self.reactor, Duration::from_millis(1));
    }

    #[track_caller]
    pub(crate) fn run_until(&mut self, mut is_done: impl FnMut(&Record) -> bool) {
        let record = self.record.clone();
        crate::support::run_until(&mut self.reactor, |_| is_done(&record));
    }

    #[track_caller]
    pub(crate) fn run_until_lost(&mut self) {
        self.run_until(Record::is_lost);
        // Whatever would come after it.
        self.settle();
        assert_eq!(
            self.record.count(|event| matches!(event, Event::Lost(_))),
            1
        );
        assert!(
            self.reactor.get(self.handle).is_none(),
            "a handle of the lost"
        );
        assert_eq!(self.alive.strong_count(), 0, "the protocol was kept");
    }

    /// Turns while the peer reads, until it has `count` more bytes.
    #[track_caller]
    pub(crate) fn peer_receives(&mut self, count: usize) -> Vec<u8> {
        let (data, end) = self.peer_reads(count);
        assert_eq!((data.len(), end), (count, None));
        data
    }

    /// Turns while the peer reads to the end.
    #[track_caller]
    pub(crate) fn peer_receives_all(&mut self) -> (Vec<u8>, End) {
        let (data, end) = self.peer_reads(usize::MAX);
        (data, end.expect("reads to the end"))
    }

    #[track_caller]
    fn peer_reads(&mut self, count: usize) -> (Vec<u8>, Option<End>) {
        let started = Instant::now();
        let mut received = Vec::new();
        let mut buffer = vec![0; 65_536];
        while received.len() < count {
            assert!(
                started.elapsed() < DEADLINE,
                "the peer got {} bytes only; ours: {:?}",
                received.len(),
                self.record.summary()
            );
            let room = (count - received.len()).min(buffer.len());
            match self.peer().read(&mut buffer[..room]) {
                Ok(0) => return (received, Some(End::Clean)),
                Ok(length) => received.extend_from_slice(&buffer[..length]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.reactor.turn(Some(Duration::from_millis(1)));
                }
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                    return (received, Some(End::Reset));
                }
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                    return (received, Some(End::CutOff));
                }
                Err(error) => panic!("the peer cannot read: {error}"),
            }
        }
        (received, None)
    }

    /// Writes until the kernel takes no more and some bytes stay unsent; how
    /// many bytes were written. The peer must not be reading.
    #[track_caller]
    pub(crate) fn fill(&mut self) -> usize {
        let mut written = 0;
        let mut unsent = 0;
        loop {
            let _ = self.transport().write_owned(vec![b'f'; 1 << 20]);
            written += 1 << 20;
            self.settle();
            // TCP grows its buffers while it sends: twice the same is full.
            let now = self.transport().unsent_bytes();
            if now >= unsent + (1 << 20) {
                return written;
            }
            unsent = now;
            assert!(written < 64 << 20, "the kernel takes everything");
        }
    }

    /// Closes everything, and checks that nothing was left behind.
    #[track_caller]
    pub(crate) fn finish(self) {
        assert_eq!(self.reactor.statistics().panics, 0, "something panicked");
        self.finish_after_panic();
    }

    #[track_caller]
    pub(crate) fn finish_after_panic(self) {
        let Self {
            reactor,
            peer,
            alive,
            directory,
            ledger,
            ..
        } = self;
        drop(reactor);
        assert_eq!(alive.strong_count(), 0, "the protocol outlived its reactor");
        drop((peer, directory));
        ledger.assert_balanced();
    }
}

/// A pattern in which every place can be told from its neighbours.
pub(crate) fn pattern(length: usize) -> Vec<u8> {
    (0..length as u32)
        .map(|n| (n ^ (n >> 8) ^ (n >> 16)) as u8)
        .collect()
}
