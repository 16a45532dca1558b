//! What a program listens on.

use std::fmt;
use std::io;

use bowline_protocol::{Acceptor, Factory, ListenerHandle, SocketFile};
use bowline_reactor::Reactor;
use bowline_transport::endpoint::{ListenAt, ListenTransport, TransportFor};
use bowline_transport::{Tcp, Transports};

use super::Restart;
use super::control::CONTROL;
use super::handshake;
use super::server::{PoolListener, channel_name, member_name};
use crate::inherited::Inherited;
use crate::pool::Pool;

/// The listeners of a program: each is adopted by name, or bound.
///
/// Each listener has a name of its own, by which a successor finds it. If the listener of a
/// name is at another address, it is not adopted, and that is reported.
pub struct Listeners<'a> {
    restart: &'a Restart,
    inherited: Inherited,
    /// The socket files of the listeners that a predecessor had.
    files: Vec<(String, SocketFile)>,
}

impl<'a> Listeners<'a> {
    pub(super) fn new(
        restart: &'a Restart,
        inherited: Inherited,
        files: Vec<(String, SocketFile)>,
    ) -> Self {
        Self {
            restart,
            inherited,
            files,
        }
    }

    /// Returns the restart that this is part of, for [`Restart::movable`].
    pub fn restart(&self) -> &Restart {
        self.restart
    }

    /// Returns the inherited descriptors that were not claimed yet.
    pub fn inherited(&mut self) -> &mut Inherited {
        &mut self.inherited
    }

    /// Listens at an endpoint, such as [`Tcp::at`](bowline_transport::Tcp::at), and serves
    /// connections with the protocols of a factory. The kind may be one of packets:
    /// [`UnixSeqpacket::at`](bowline_transport::UnixSeqpacket::at).
    ///
    /// With port 0, the listener of that name is adopted with whatever port it has. The
    /// file of a UNIX socket passes from one process to the next with the listener. The
    /// last process that serves removes it. On a simulated kernel, the address is `name`.
    ///
    /// # Errors
    ///
    /// Those of listening and adopting. `AlreadyExists` if the name is in use.
    /// `InvalidInput` if there are more than 16,191 listeners.
    pub fn listen<E, F>(
        &mut self,
        reactor: &mut Reactor,
        name: &str,
        endpoint: E,
        factory: F,
    ) -> io::Result<ListenerHandle>
    where
        E: ListenAt,
        F: Factory,
        ListenTransport<E>: TransportFor<F::Protocol>,
    {
        self.check_name(name)?;
        let handle = match self.inherited.claim_for(name, &endpoint) {
            Some(fd) => reactor.listen(endpoint.on(fd), factory)?,
            None => reactor.listen(endpoint, factory)?,
        };
        Ok(self.add(reactor, name, handle))
    }

    /// Listens for an acceptor, such as that of a worker pool. See [`Transports::accept`].
    ///
    /// # Errors
    ///
    /// As [`listen`](Self::listen).
    pub fn accept(
        &mut self,
        reactor: &mut Reactor,
        name: &str,
        endpoint: impl ListenAt,
        acceptor: impl Acceptor,
    ) -> io::Result<ListenerHandle> {
        self.check_name(name)?;
        let handle = match self.inherited.claim_for(name, &endpoint) {
            Some(fd) => reactor.accept(endpoint.on(fd), acceptor)?,
            None => reactor.accept(endpoint, acceptor)?,
        };
        Ok(self.add(reactor, name, handle))
    }

    /// Listens for a worker pool, whichever of its processes
    /// [accepts](crate::pool::Accepting). Its connections have the label `label`.
    ///
    /// This does what [`accept`](Self::accept) does with the pool's
    /// [acceptor](Pool::acceptor), and more. The sockets on which workers accept are handed
    /// over with the listener, so no connection in their queues is lost. And the
    /// connections of workers move to the workers of the successor. For that, the program
    /// and its [workers](crate::pool::Service::takes) have to [take](super::Program::takes)
    /// their kind, and the connections have to be [movable](crate::pool::Live::movable).
    /// Other connections are told to drain. The worker that has them serves them to the
    /// end, within [`RestartSettings::drain`](super::RestartSettings::drain).
    ///
    /// # Errors
    ///
    /// As [`accept`](Self::accept).
    pub fn pool(
        &mut self,
        reactor: &mut Reactor,
        name: &str,
        endpoint: impl ListenAt,
        pool: &Pool,
        label: u32,
    ) -> io::Result<ListenerHandle> {
        self.check_name(name)?;
        let mut members = Vec::new();
        while let Some(member) = self.inherited.claim(&member_name(name, members.len() + 1)) {
            members.push(member);
        }
        let channel = self.inherited.claim(&channel_name(name));
        let mut spare = Vec::new();
        if !pool.shared.shares() {
            // It has shared its listener out before: what waits there is for the pool.
            spare = std::mem::take(&mut members);
        }
        let acceptor = pool.successor(label, members);
        let handle = self.accept(reactor, name, endpoint, acceptor)?;
        for (at, socket) in spare.into_iter().enumerate() {
            let listener = reactor.accept(Tcp::listening(socket), pool.acceptor(label));
            let listener = listener.map_err(io::Error::from)?;
            self.add(reactor, &member_name(name, at + 1), listener);
        }
        let mut pools = self.restart.server.pools.borrow_mut();
        pools.push(PoolListener {
            name: name.to_owned(),
            handle,
            pool: pool.clone(),
            channel,
        });
        Ok(handle)
    }

    fn check_name(&self, name: &str) -> io::Result<()> {
        let listeners = self.restart.server.listeners.borrow();
        if name == CONTROL || listeners.iter().any(|named| named.name == name) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        if handshake::batches(listeners.len() + 1).is_none() {
            let text = "more listeners than can be handed over";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        Ok(())
    }

    fn add(&self, reactor: &mut Reactor, name: &str, handle: ListenerHandle) -> ListenerHandle {
        let file = self.files.iter().find(|(of, _)| of == name);
        let file = file.map(|(_, file)| *file);
        let server = &self.restart.server;
        server.add_listener(reactor, name, handle, file);
        handle
    }
}

impl fmt::Debug for Listeners<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Listeners")
            .field("inherited", &self.inherited)
            .finish_non_exhaustive()
    }
}
