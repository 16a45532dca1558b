//! A process that serves or is about to, predecessor or successor: its program, its
//! listeners, and what its service manager is told.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;

use bowline_protocol::{ListenerHandle, SocketFile};
use bowline_reactor::{Description, Reactor};
use bowline_transport::LayerState;

use super::Restart;
use super::error::RestartError;
use super::listeners::Listeners;
use super::moving::MoveList;
use super::program::{Program, Start};
use super::settings::RestartSettings;
use crate::channel::{self, ChannelSettings};
use crate::inherited::Inherited;
use crate::log;
use crate::pool::Pool;
use crate::systemd::Notice;
use crate::wire::MAX_PAYLOAD;

/// Where a process is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Life {
    Starting,
    Serving,
    HandedOver,
}

/// A listener by its name.
pub(super) struct Named {
    pub(super) name: String,
    pub(super) handle: ListenerHandle,
    /// The file that it owned, or is going to own.
    pub(super) file: Option<SocketFile>,
    /// Whether we keep it from accepting.
    is_held: bool,
}

/// A listener of a worker pool.
pub(super) struct PoolListener {
    pub(super) name: String,
    pub(super) handle: ListenerHandle,
    pub(super) pool: Pool,
    /// The channel on which the pool of the predecessor gives its connections.
    pub(super) channel: Option<OwnedFd>,
}

pub(super) struct Server {
    pub(super) settings: RestartSettings,
    program: RefCell<Box<dyn Program>>,
    pub(super) listeners: RefCell<Vec<Named>>,
    /// Those of worker pools among them, whose further sockets and connections go to a
    /// successor too.
    pub(super) pools: RefCell<Vec<PoolListener>>,
    /// What is offered to a successor beside the listeners, by name.
    pub(super) companions: RefCell<Vec<(String, Rc<OwnedFd>)>>,
    /// The connections that can move.
    pub(super) list: Rc<RefCell<MoveList>>,
    pub(super) life: Cell<Life>,
    /// How many connections have moved, from here or to here.
    pub(super) moved: Cell<usize>,
    /// How many of them to here.
    pub(super) moved_here: Cell<usize>,
    /// The process that this one has taken over from, and the one that has asked last to
    /// take over from it. 0 if there was none.
    pub(super) predecessor: Cell<u32>,
    pub(super) successor: Cell<u32>,
    /// How many times it was looked for a predecessor.
    pub(super) looks: Cell<u32>,
}

impl Server {
    pub(super) fn new(settings: RestartSettings, program: impl Program) -> Self {
        Self {
            settings,
            program: RefCell::new(Box::new(program)),
            listeners: RefCell::default(),
            pools: RefCell::default(),
            companions: RefCell::default(),
            list: Rc::default(),
            life: Cell::new(Life::Starting),
            moved: Cell::new(0),
            moved_here: Cell::new(0),
            predecessor: Cell::new(0),
            successor: Cell::new(0),
            looks: Cell::new(0),
        }
    }

    /// How a channel of these roles behaves, ours and the other's.
    pub(super) fn channel_settings(
        &self,
        ours: channel::Role,
        theirs: channel::Role,
    ) -> ChannelSettings {
        let mut settings = ChannelSettings::new(ours, theirs);
        settings.max_payload = MAX_PAYLOAD;
        settings.handshake_timeout = self.settings.answer;
        settings
    }

    /// What those see who look into the reactor.
    pub(super) fn describe(&self, description: &mut Description) {
        let some = |pid: &Cell<u32>| Some(pid.get()).filter(|pid| *pid != 0);
        let section = description.section("Restart");
        let state = match self.life.get() {
            Life::Starting => "starting",
            Life::Serving => "serving",
            Life::HandedOver => "handed over",
        };
        let moved_here = self.moved_here.get();
        section
            .set("state", state)
            .set_some("predecessor", some(&self.predecessor))
            .set("moved_here", moved_here)
            .set_some("successor", some(&self.successor))
            .set("moved_away", self.moved.get() - moved_here);
        if let Ok(list) = self.list.try_borrow() {
            section
                .set("movable", list.len())
                .set("stayed", list.stayed().values().sum::<usize>());
        }
    }

    // The program.

    /// Calls the program when no callback runs.
    pub(super) fn call(
        self: &Rc<Self>,
        reactor: &mut Reactor,
        call: impl FnOnce(&mut dyn Program, &mut Reactor) + 'static,
    ) {
        let this = Rc::clone(self);
        reactor.defer(move |reactor| call(&mut **this.program.borrow_mut(), reactor));
    }

    /// Whether the program takes a connection of this kind, with what its layers say.
    pub(super) fn takes(&self, kind: &str, layers: &[LayerState]) -> bool {
        let program = self.program.borrow();
        program.takes(kind) && program.takes_layers(kind, layers)
    }

    /// Has the program listen, on what was inherited where it can. Nothing is accepted
    /// before [`accept`](Self::accept).
    pub(super) fn listen(
        restart: &Restart,
        reactor: &mut Reactor,
        inherited: Inherited,
        files: Vec<(String, SocketFile)>,
        panicked: impl FnOnce(&mut Reactor, io::Error) + 'static,
    ) -> io::Result<()> {
        // The next thing that happens, if the program panics.
        let has_returned = Rc::new(Cell::new(false));
        let returned = Rc::clone(&has_returned);
        reactor.defer(move |reactor| {
            if !returned.get() {
                panicked(reactor, io::Error::other("it panicked"));
            }
        });
        // What is not claimed is reported when these are dropped.
        let mut listeners = Listeners::new(restart, inherited, files);
        let mut program = restart.server.program.borrow_mut();
        let result = program.listen(reactor, &mut listeners);
        has_returned.set(true);
        result
    }

    /// The program serves, alone. `then` is called when the service manager has been
    /// told.
    pub(super) fn serve(
        self: &Rc<Self>,
        reactor: &mut Reactor,
        start: Start,
        heir_of: &[u32],
        then: impl FnOnce(&mut Reactor) + 'static,
    ) {
        self.life.set(Life::Serving);
        self.accept(reactor);
        self.tell_manager_then(reactor, &Notice::new().ready(), then);
        if let Some(notifier) = &self.settings.notifier {
            notifier.becomes_main(reactor, heir_of);
        }
        self.call(reactor, move |program, reactor| {
            program.serving(reactor, start);
        });
    }

    pub(super) fn not_started(self: &Rc<Self>, reactor: &mut Reactor, error: RestartError) {
        log::error!(target: log::HANDOFF, "not started: {error}");
        self.stop_listening(reactor);
        self.call(reactor, move |program, reactor| {
            program.not_started(reactor, &error);
        });
    }

    // The listeners.

    /// Adds a listener, which does not accept yet. Its file, if it owns none, is `file`,
    /// to be owned when the predecessor has let go of it.
    pub(super) fn add_listener(
        &self,
        reactor: &mut Reactor,
        name: &str,
        handle: ListenerHandle,
        file: Option<SocketFile>,
    ) {
        let own = reactor.get(handle).and_then(|listener| {
            listener.hold_accepting();
            listener.socket_file()
        });
        self.listeners.borrow_mut().push(Named {
            name: name.to_owned(),
            handle,
            file: own.or(file),
            is_held: true,
        });
    }

    /// Accepts on all listeners, and owns their files. Who waits in their queues is for this
    /// process to serve when it stops: others that may hold them, a predecessor that drains
    /// or a successor that has not got as far, do not accept.
    pub(super) fn accept(self: &Rc<Self>, reactor: &mut Reactor) {
        for named in &mut *self.listeners.borrow_mut() {
            let Some(listener) = reactor.get(named.handle) else {
                continue;
            };
            if std::mem::take(&mut named.is_held) {
                listener.release_accepting();
            }
            listener.serve_queue_at_stop();
            if let Some(file) = named.file
                && listener.socket_file().is_none()
                && let Err(error) = listener.own_socket_file(file)
            {
                log::warn!(
                    target: log::HANDOFF,
                    "{}: the file of {:?} is another's by now: {error}",
                    listener.address(),
                    named.name
                );
            }
        }
        self.accept_in_pools(reactor);
    }

    /// Has workers accept, and takes what the workers of a predecessor give up.
    fn accept_in_pools(self: &Rc<Self>, reactor: &mut Reactor) {
        for pool in &mut *self.pools.borrow_mut() {
            let PoolListener {
                handle,
                pool,
                channel,
                ..
            } = pool;
            pool.shared.begin_accepting(reactor, *handle);
            if let Some(channel) = channel.take() {
                let this = Rc::clone(self);
                let takes = move |kind: &str, layers: &[LayerState]| this.takes(kind, layers);
                if let Err(error) = pool.follow(reactor, channel, takes) {
                    log::warn!(target: log::HANDOFF, "no connections of the workers before: {error}");
                }
            }
        }
    }

    /// Makes ready what a successor is offered beside the listeners: the sockets of
    /// workers, in their order, and a channel for each pool.
    pub(super) fn prepare_companions(&self) {
        let mut all = Vec::new();
        let pools = self.pools.borrow();
        for (
            at,
            PoolListener {
                name, handle, pool, ..
            },
        ) in pools.iter().enumerate()
        {
            let members = pool.shared.members(*handle);
            let members = members.into_iter().zip(1..);
            all.extend(members.map(|(fd, at)| (member_name(name, at), fd)));
            let is_first = !pools[..at]
                .iter()
                .any(|it| Rc::ptr_eq(&it.pool.shared, &pool.shared));
            if is_first {
                match pool.shared.offer() {
                    Ok(end) => all.push((channel_name(name), Rc::new(end))),
                    Err(error) => {
                        log::warn!(target: log::HANDOFF, "connections of workers do not move: {error}");
                    }
                }
            }
        }
        self.companions.replace(all);
    }

    /// No successor takes what was made ready for it.
    pub(super) fn withdraw_companions(&self) {
        self.companions.take();
        for PoolListener { pool, .. } in &*self.pools.borrow() {
            pool.shared.withdraw_offer();
        }
    }

    /// The workers of pools give up their connections: the successor serves.
    pub(super) fn hand_pools_over(&self, reactor: &mut Reactor) {
        // The successor has its copies.
        self.companions.take();
        for PoolListener { pool, .. } in self.pools.take() {
            pool.shared.hand_over(reactor);
        }
    }

    /// Accepts on none, and leaves the files to whoever has the listeners now.
    pub(super) fn withdraw(&self, reactor: &mut Reactor) {
        for named in &mut *self.listeners.borrow_mut() {
            if let Some(listener) = reactor.get(named.handle) {
                if !std::mem::replace(&mut named.is_held, true) {
                    listener.hold_accepting();
                }
                if let Some(file) = listener.socket_file() {
                    named.file = Some(file);
                    listener.disown_socket_file();
                }
            }
        }
    }

    /// Closes the listeners. What waits in their queues is for whoever has them too.
    pub(super) fn stop_listening(&self, reactor: &mut Reactor) {
        for named in self.listeners.take() {
            if let Some(listener) = reactor.get(named.handle) {
                listener.stop_listening();
            }
        }
    }

    // The service manager.

    pub(super) fn tell_manager(&self, notice: &Notice) {
        if let Some(notifier) = &self.settings.notifier
            && let Err(error) = notifier.tell(notice)
        {
            log::warn!(target: log::HANDOFF, "the service manager was not told: {error}");
        }
    }

    /// Tells the service manager, and then does what comes after that: when the notice was
    /// sent, or when its time has passed. Returns the notice's number, if there is one.
    pub(super) fn tell_manager_then(
        self: &Rc<Self>,
        reactor: &mut Reactor,
        notice: &Notice,
        then: impl FnOnce(&mut Reactor) + 'static,
    ) -> Option<u64> {
        let Some(notifier) = &self.settings.notifier else {
            then(reactor);
            return None;
        };
        let number = match notifier.tell(notice) {
            Ok(number) => number,
            Err(error) => {
                self.manager_not_told(reactor, error);
                then(reactor);
                return None;
            }
        };
        let this = Rc::clone(self);
        notifier.when_left(
            reactor,
            number,
            self.settings.manager,
            move |reactor, left| {
                if let Err(error) = left {
                    this.manager_not_told(reactor, error);
                }
                then(reactor);
            },
        );
        Some(number)
    }

    fn manager_not_told(self: &Rc<Self>, reactor: &mut Reactor, error: io::Error) {
        log::error!(target: log::HANDOFF, "the service manager does not know of the restart: {error}");
        let error = RestartError::Manager(error);
        self.call(reactor, move |program, reactor| {
            program.manager_not_told(reactor, &error);
        });
    }
}

/// What the socket of a worker is called, from 1 on, beside the listener.
pub(super) fn member_name(name: &str, at: usize) -> String {
    format!("{name}#{at}")
}

/// What the channel of a pool is called.
pub(super) fn channel_name(name: &str) -> String {
    format!("{name}#pool")
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server")
            .field("life", &self.life)
            .finish_non_exhaustive()
    }
}
