//! A worker in the reactor of the test, and its pool by hand.

use std::cell::{Cell, RefCell};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::rc::Rc;
use std::time::Duration;

use bowline::Reactor;
use bowline::handoff::channel::Role;
use bowline::handoff::pool::{
    FromWorker, Live, PassedConnection, Service, ToWorker, Worker, WorkerRefusal, WorkerSettings,
};
use bowline::testing::ManualClock;

use super::super::raw::{Raw, dispatch, hello};
use super::Staged;
use crate::support::{DescriptorLedger, socketpair, staged};

/// How many answers fill a channel that nobody reads, and more.
const REFUSED: u64 = 30;

/// What a service was told, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Told {
    Admit(u32),
    Serve(u32),
    Draining(Duration),
    Drained,
}

/// Keeps what it is given.
#[derive(Clone, Default)]
pub(super) struct Keeping {
    pub(super) told: Rc<RefCell<Vec<Told>>>,
    pub(super) kept: Rc<RefCell<Vec<(PassedConnection, Live)>>>,
    pub(super) refuses: Rc<Cell<Option<WorkerRefusal>>>,
    /// The last thing that it is told before it panics.
    pub(super) panics_at: Rc<RefCell<Option<Told>>>,
}

impl Keeping {
    fn note(&self, told: Told) {
        let panics = self.panics_at.borrow().as_ref() == Some(&told);
        self.told.borrow_mut().push(told);
        assert!(!panics, "a panic that is meant");
    }
}

impl Service for Keeping {
    fn admit(
        &mut self,
        _: &mut Reactor,
        connection: &PassedConnection,
    ) -> Result<(), WorkerRefusal> {
        self.note(Told::Admit(connection.label));
        self.refuses.get().map_or(Ok(()), Err)
    }

    fn serve(&mut self, _: &mut Reactor, connection: PassedConnection, live: Live) {
        self.note(Told::Serve(connection.label));
        self.kept.borrow_mut().push((connection, live));
    }

    fn draining(&mut self, _: &mut Reactor, within: Duration) {
        self.note(Told::Draining(within));
    }

    fn drained(&mut self, _: &mut Reactor) {
        self.note(Told::Drained);
    }
}

/// A worker in this process, and its pool by hand.
pub(super) struct Desk {
    pub(super) reactor: Reactor,
    pub(super) clock: ManualClock,
    pub(super) worker: Worker,
    pub(super) pool: Raw,
    pub(super) service: Keeping,
    pub(super) clients: Vec<StdUnixStream>,
    _ledger: DescriptorLedger,
}

staged!(Desk);

impl Desk {
    pub(super) fn new(settings: WorkerSettings) -> Self {
        let desk = Self::silent(settings, |_| ());
        desk.pool.send(&hello(Role::DISPATCHER), &[]).unwrap();
        desk
    }

    /// Its pool has said no hello.
    pub(super) fn silent(settings: WorkerSettings, prepare: impl FnOnce(&StdUnixStream)) -> Self {
        let ledger = DescriptorLedger::open();
        let service = Keeping::default();
        let clock = ManualClock::new();
        let mut reactor = Reactor::with_clock(clock.clone()).unwrap();
        let (ours, theirs) = socketpair();
        prepare(&ours);
        let worker = Worker::start(&mut reactor, ours, settings, service.clone()).unwrap();
        let mut desk = Self {
            reactor,
            clock,
            worker,
            pool: Raw::silent(theirs),
            service,
            clients: Vec::new(),
            _ledger: ledger,
        };
        desk.settle();
        desk
    }

    /// The kernel takes few of its answers that nobody has read.
    pub(super) fn narrow(settings: WorkerSettings) -> Self {
        let narrow = |socket: &StdUnixStream| {
            rustix::net::sockopt::set_socket_send_buffer_size(socket, 1).unwrap();
        };
        let mut desk = Self::silent(settings, narrow);
        desk.pool.send(&hello(Role::DISPATCHER), &[]).unwrap();
        desk.settle();
        desk
    }

    /// Its answers do not leave: nobody reads them, and the kernel has no room.
    pub(super) fn blocked(settings: WorkerSettings) -> Self {
        let mut desk = Self::narrow(settings);
        for id in 0..REFUSED {
            desk.pool.send(&dispatch(id, b""), &[]).unwrap();
            desk.settle();
        }
        desk
    }

    /// The pool sends connections under these numbers.
    pub(super) fn send(&mut self, ids: impl IntoIterator<Item = u64>) {
        for id in ids {
            let (client, accepted) = socketpair();
            let mut message = dispatch(id, b"");
            message.label = id as u32;
            self.pool.send(&message, &[accepted.as_fd()]).unwrap();
            self.clients.push(client);
        }
        self.settle();
    }

    /// What the worker has said since the last time.
    pub(super) fn said(&mut self) -> Vec<FromWorker> {
        self.pool.receive().expect("the channel is there")
    }

    /// What the service was told since the last time.
    pub(super) fn told(&self) -> Vec<Told> {
        self.service.told.take()
    }

    /// Ends the oldest connection that the service has.
    pub(super) fn end_one(&self) {
        drop(self.service.kept.borrow_mut().remove(0));
    }

    pub(super) fn drain(&mut self, within_ms: u32) {
        self.pool.send(&ToWorker::Drain { within_ms }, &[]).unwrap();
        self.settle();
    }
}
