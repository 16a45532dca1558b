//! A pool whose process is replaced: the pool of the next one takes its connections, as if
//! it were a worker of this one.

use std::cell::Cell;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::ExitStatus;
use std::rc::Rc;
use std::time::Duration;

use bowline_protocol::PassedDescriptor;
use bowline_reactor::Reactor;
use bowline_transport::{ChildProcess, LayerState};

use super::WorkerId;
use super::connection::PassedConnection;
use super::dispatcher::{Pool, PoolShared, WorkerEnd};
use super::messages::{MovedRecord, ToWorker, VERSIONS, WorkerRefusal};
use super::process::StartedWorker;
use super::state::Job;
use super::worker::{Live, Service, Worker, WorkerSettings};
use crate::channel::{Channel, ChannelSettings, ChannelSocket, Role};
use crate::log;
use crate::restart::Moved;
use crate::wire;

/// The pool of the process that has taken over.
pub(super) struct Heir {
    pub(super) id: WorkerId,
    /// Its channel has ended.
    has_ended: Rc<Cell<bool>>,
}

impl Heir {
    /// Takes note that its channel has ended.
    pub(super) fn end(&self) {
        self.has_ended.set(true);
    }
}

/// Stands in the place of its process, which is not ours: it ends with its channel.
struct Elsewhere(Rc<Cell<bool>>);

impl ChildProcess for Elsewhere {
    fn pid(&self) -> u32 {
        std::process::id()
    }

    fn kill(&mut self) -> io::Result<()> {
        self.0.set(true);
        Ok(())
    }

    fn try_wait(&mut self) -> io::Result<Option<ExitStatus>> {
        Ok(self.0.get().then(ExitStatus::default))
    }

    fn exit_descriptor(&mut self) -> io::Result<Option<Rc<OwnedFd>>> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

impl PoolShared {
    /// Makes a channel on which the process that takes over can be given connections.
    /// Returns its end.
    pub(crate) fn offer(&self) -> io::Result<OwnedFd> {
        let (ours, theirs) = UnixStream::pair()?;
        self.state.borrow_mut().heir_end = Some(ours.into());
        Ok(theirs.into())
    }

    /// Another process serves now, which has the other end of what was
    /// [offered](Self::offer). Workers give up the connections that can move, and no
    /// worker is started any more.
    pub(crate) fn hand_over(self: &Rc<Self>, reactor: &mut Reactor) {
        let Some(end) = self.state.borrow_mut().heir_end.take() else {
            return;
        };
        let (id, workers) = {
            let state = &mut *self.state.borrow_mut();
            state.settings.workers = 0;
            state.places.clear();
            state.next_worker += 1;
            let workers: Vec<_> = state.workers.iter().map(|it| it.channel).collect();
            (WorkerId(state.next_worker - 1), workers)
        };
        let link = WorkerEnd {
            shared: Rc::clone(self),
            worker: id,
        };
        let has_ended = Rc::<Cell<bool>>::default();
        let mut settings = ChannelSettings::new(Role::DISPATCHER, Role::WORKER);
        settings.versions = VERSIONS;
        let channel = end.adopt(reactor, Channel::new(settings, link));
        let started = StartedWorker {
            process: Box::new(Elsewhere(Rc::clone(&has_ended))),
            channel: channel.map_err(Into::into),
        };
        {
            let state = &mut *self.state.borrow_mut();
            state.heir = Some(Heir { id, has_ended });
            state.heir_id = Some(id);
        }
        // Its place is none.
        if let Err(error) = self.install(reactor, id, usize::MAX, started) {
            log::error!(target: log::HANDOFF, "connections of workers do not move: {error}");
            self.state.borrow_mut().heir = None;
            return;
        }
        for channel in workers {
            if let Some(channel) = reactor.get(channel)
                && let Err(error) = wire::send(channel, &ToWorker::Move, Vec::new())
            {
                log::debug!(target: log::HANDOFF, "cannot ask for connections: {error}");
            }
        }
        self.arm_tick(reactor);
    }

    /// A worker gives up a connection, which is to go on elsewhere.
    pub(super) fn moving(
        self: &Rc<Self>,
        reactor: &mut Reactor,
        worker: WorkerId,
        id: u64,
        record: MovedRecord,
        descriptors: Vec<OwnedFd>,
    ) {
        let descriptors = descriptors.into_iter().map(Into::into).collect();
        let origin = Some((worker, id));
        match Job::moving(record, descriptors, origin, reactor.now()) {
            Some(job) => {
                self.state.borrow_mut().waiting.push_back(Box::new(job));
                self.pump_later(reactor);
                self.arm_tick(reactor);
            }
            None => self.settle(reactor, (worker, id), ToWorker::HasNotMoved { id }),
        }
    }

    /// Tells the worker what became of a connection that it gave up.
    pub(super) fn settle(
        &self,
        reactor: &mut Reactor,
        (worker, _): (WorkerId, u64),
        how: ToWorker,
    ) {
        let channel = self.state.borrow_mut().worker(worker).map(|it| it.channel);
        if let Some(channel) = channel.and_then(|channel| reactor.get(channel))
            && let Err(error) = wire::send(channel, &how, Vec::new())
        {
            log::debug!(target: log::HANDOFF, "{worker}: {error}");
        }
    }

    /// Gives a connection that has moved here to a worker.
    fn dispatch_moved(self: &Rc<Self>, reactor: &mut Reactor, moved: Moved) {
        let (record, descriptors): (_, Vec<PassedDescriptor>) = moved.into_record();
        let record = MovedRecord(Box::new(record));
        if let Some(job) = Job::moving(record, descriptors, None, reactor.now()) {
            self.dispatch_job(reactor, Box::new(job));
        }
    }
}

impl Pool {
    /// Takes what the pool of the process before this one gives. `takes` says which kinds
    /// of connections workers can go on with, and with what of their layers.
    pub(crate) fn follow(
        &self,
        reactor: &mut Reactor,
        channel: OwnedFd,
        takes: impl Fn(&str, &[LayerState]) -> bool + 'static,
    ) -> io::Result<()> {
        let service = Forward {
            pool: self.clone(),
            takes,
        };
        Worker::start(reactor, channel, WorkerSettings::default(), service)?;
        Ok(())
    }
}

/// Gives everything to the workers of this process.
struct Forward<F> {
    pool: Pool,
    takes: F,
}

impl<F: Fn(&str, &[LayerState]) -> bool + 'static> Service for Forward<F> {
    fn admit(&mut self, reactor: &mut Reactor, _: &PassedConnection) -> Result<(), WorkerRefusal> {
        match reactor.is_stopping() {
            true => Err(WorkerRefusal::Draining),
            false => Ok(()),
        }
    }

    fn serve(&mut self, reactor: &mut Reactor, connection: PassedConnection, _: Live) {
        self.pool.dispatch(reactor, connection);
    }

    fn takes(&self, _: &str) -> bool {
        true
    }

    fn takes_layers(&self, kind: &str, layers: &[LayerState]) -> bool {
        (self.takes)(kind, layers)
    }

    fn serve_moved(&mut self, reactor: &mut Reactor, moved: Moved, _: Live) {
        self.pool.shared.dispatch_moved(reactor, moved);
    }

    fn draining(&mut self, _: &mut Reactor, _: Duration) {
        // The process before this one has ended.
    }

    fn drained(&mut self, _: &mut Reactor) {}
}
