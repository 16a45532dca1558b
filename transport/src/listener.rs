//! Listening sockets, which accept in budgeted batches.

mod bind;
mod farewell;
mod socket;

use std::any::Any;
use std::borrow::Cow;
use std::cell::Cell;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;

use bowline_protocol as protocol;
use bowline_protocol::{
    Acceptor, Address, BuildContext, Credentials, Factory, Listener, ListenerHandle, Origin,
    UnixAddress,
};
use bowline_reactor::{DelayedCall, Descriptor, DrainRound, Handle, Next, Panic, Reactor};
use bowline_reactor::{Readiness, Token};

use crate::closer::close_elsewhere;
use crate::connection::{DescriptorTransport, connect_protocol, unix_address};
use crate::connection::{HostName, Names, Source};
use crate::handoff::DetachListenerRequest;
use crate::log;
use crate::shared::{Ledger, Shared};
use crate::sys::{self, SocketName};
#[cfg(feature = "testing")]
use crate::testing::MemoryListener;

pub(crate) use self::bind::{SocketFile, bind_tcp, bind_unix, socket_name};
pub use self::bind::{bind_tcp_listener, bind_unix_listener};
use self::farewell::Farewells;
use self::socket::ListeningSocket;

/// When a listener that could not accept for want of descriptors or memory
/// tries again: no event is going to say that there are some.
const RETRY_AFTER: Duration = Duration::from_millis(100);

/// How many clients a listener still accepts when the reactor stops gracefully:
/// as many as its queue can hold where nobody has raised `net.core.somaxconn`.
/// More than a queue is none that waited when it was told.
const LAST_ACCEPTS: u32 = 4096;

struct Accepting<S> {
    control: Control,
    service: S,
}

/// What becomes of the sockets that a listener accepts.
pub(crate) trait Service: 'static {
    fn started(&mut self, cx: &mut BuildContext<'_>);

    fn accepted(
        &mut self,
        control: &mut Control,
        reactor: &mut Reactor,
        fd: OwnedFd,
        peer: SocketName,
    );

    fn stopped(&mut self, cx: &mut BuildContext<'_>);
}

/// They become connections, with the protocols of a factory.
pub(crate) struct Serve<T, F> {
    factory: F,
    transport: PhantomData<fn() -> T>,
}

/// They are given to an acceptor as they are.
pub(crate) struct HandOver<A> {
    pub(crate) acceptor: A,
}

/// The part of a listener that handles give access to.
pub(crate) struct Control {
    /// Removed when we close, if it is still ours: before the socket, and so
    /// before it when this is dropped.
    file: Option<SocketFile>,
    socket: Option<ListeningSocket>,
    token: Token,
    host: HostName,
    address: Address,
    shared: Rc<Shared>,
    retry: Option<DelayedCall>,
    /// Latched: there may be connections to accept.
    is_readable: bool,
    is_paused: bool,
    /// How many reasons there are not to accept, beside the pause.
    holds: u32,
    is_stopping: bool,
    /// Stops when there is nothing more to accept.
    is_draining: bool,
    /// How many it accepts at the most until then.
    accepts_left: u32,
    is_started: bool,
    /// Whether another process may hold the socket, and so make it block.
    is_shared: Cell<bool>,
    /// Whether a shortage has been logged; one line for each shortage.
    is_short: bool,
    /// Whether the kernel refuses descriptors to all who connect.
    refuses_descriptors: bool,
    /// What was accepted, while a protocol is built for it.
    accepted: Option<OwnedFd>,
    farewells: Farewells,
}

impl Listener for Control {
    fn peer_credentials(&self) -> io::Result<Credentials> {
        match (&self.accepted, &self.address) {
            (Some(fd), Address::Unix(_)) => sys::peer_credentials(fd.as_fd()).map(Into::into),
            _ => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    fn decline_with(&mut self, word: &[u8]) {
        self.farewells.say_next(word);
    }

    fn address(&self) -> Address {
        self.address.clone()
    }

    fn stop_listening(&mut self) {
        self.is_stopping = true;
    }

    fn pause_accepting(&mut self) {
        self.is_paused = true;
    }

    fn resume_accepting(&mut self) {
        self.is_paused = false;
    }

    fn hold_accepting(&mut self) {
        self.holds += 1;
    }

    fn release_accepting(&mut self) {
        self.holds = self.holds.saturating_sub(1);
    }

    fn assume_sole_holder(&mut self) {
        self.is_shared.set(false);
    }

    fn stop_listening_when_drained(&mut self) {
        self.is_draining = true;
        self.is_paused = false;
        // Whatever the latch says: the kernel is asked once more.
        self.is_readable = true;
    }

    fn is_listening(&self) -> bool {
        !self.is_stopping && self.socket.is_some()
    }

    fn socket_file(&self) -> Option<protocol::SocketFile> {
        let identity = self.file.as_ref()?.identity;
        Some(protocol::SocketFile {
            device: identity.device,
            inode: identity.inode,
        })
    }

    fn disown_socket_file(&mut self) {
        if let Some(file) = self.file.take() {
            file.leave();
        }
    }

    fn own_socket_file(&mut self, file: protocol::SocketFile) -> io::Result<()> {
        let Address::Unix(UnixAddress::Path(path)) = &self.address else {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        };
        let found = SocketFile::at(path)?;
        if (found.identity.device, found.identity.inode) != (file.device, file.inode) {
            found.leave();
            return Err(io::Error::from(io::ErrorKind::AlreadyExists));
        }
        if let Some(before) = self.file.replace(found) {
            before.leave();
        }
        Ok(())
    }

    fn handle(&self) -> ListenerHandle {
        Handle::new(self.token, |facet| {
            facet.downcast_mut::<Self>().map(|control| control as _)
        })
    }

    fn duplicate(&self) -> io::Result<OwnedFd> {
        self.is_shared.set(true);
        let socket = self.socket.as_ref();
        socket
            .ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected))?
            .duplicate()
    }
}

impl<T, F> Serve<T, F> {
    pub(crate) fn new(factory: F) -> Self {
        Self {
            factory,
            transport: PhantomData,
        }
    }
}

impl<T: DescriptorTransport, F: Factory<T>> Service for Serve<T, F> {
    fn started(&mut self, cx: &mut BuildContext<'_>) {
        if let Some(listener) = cx.listener() {
            log::debug!(
                target: log::TRANSPORT,
                "{}: starting factory {}",
                listener.handle().token(),
                log::name(|| self.factory.log_prefix()),
            );
        }
        self.factory.started(cx);
    }

    #[inline]
    fn accepted(
        &mut self,
        control: &mut Control,
        reactor: &mut Reactor,
        fd: OwnedFd,
        peer: SocketName,
    ) {
        let address = peer_address(&peer);
        control.accepted = Some(fd);
        let protocol = self
            .factory
            .build_protocol(&mut control.context(reactor), &address);
        let Some(fd) = control.accepted.take() else {
            return;
        };
        let names = Names {
            host: control.host.clone(),
            peer,
            refuses_descriptors: control.refuses_descriptors,
        };
        let Some(protocol) = protocol else {
            log::debug!(target: log::TRANSPORT, "{}: declined {address}", control.token);
            return match control.farewells.next() {
                Some(farewell) => farewell.say_to::<T>(reactor, fd, names),
                // Its peer may send at this very moment.
                None => close_unserved(fd, true),
            };
        };
        control.farewells.forget();
        if let Err(error) = connect_protocol::<T, F>(reactor, protocol, fd, names, Source::Accepted)
        {
            log::error!(target: log::TRANSPORT, "{}: cannot serve {address}: {error}", control.token);
        }
    }

    fn stopped(&mut self, cx: &mut BuildContext<'_>) {
        if let Some(listener) = cx.listener() {
            log::debug!(
                target: log::TRANSPORT,
                "{}: stopping factory {}",
                listener.handle().token(),
                log::name(|| self.factory.log_prefix()),
            );
        }
        self.factory.stopped(cx);
    }
}

impl<A: Acceptor> Service for HandOver<A> {
    fn started(&mut self, cx: &mut BuildContext<'_>) {
        self.acceptor.started(cx);
    }

    #[inline]
    fn accepted(
        &mut self,
        control: &mut Control,
        reactor: &mut Reactor,
        fd: OwnedFd,
        peer: SocketName,
    ) {
        let address = peer_address(&peer);
        self.acceptor
            .accepted(&mut control.context(reactor), fd, &address);
    }

    fn stopped(&mut self, cx: &mut BuildContext<'_>) {
        self.acceptor.stopped(cx);
    }
}

impl Control {
    fn may_accept(&self) -> bool {
        let is_held = self.holds > 0 && !self.is_draining;
        !self.is_paused && !is_held && !self.is_stopping
    }

    /// What the callbacks of this listener can reach.
    fn context<'a>(&'a mut self, reactor: &'a mut Reactor) -> BuildContext<'a> {
        BuildContext {
            origin: Origin::Listener(self),
            reactor,
        }
    }
}

impl<S: Service> Accepting<S> {
    fn work(&mut self, reactor: &mut Reactor) -> Next {
        if !self.control.is_started {
            self.control.is_started = true;
            log::debug!(target: log::TRANSPORT, "{}: listening on {}", self.control.token, self.control.address);
            self.service.started(&mut self.control.context(reactor));
        }
        if self.control.is_shared.get()
            && self.control.is_readable
            && let Some(socket) = &self.control.socket
            && let Err(error) = socket.set_nonblocking()
        {
            log::warn!(target: log::TRANSPORT, "{}: cannot keep it from blocking: {error}", self.control.token);
        }
        let mut left = self.control.shared.budgets.get().accepts;
        while self.control.is_readable && self.control.may_accept() {
            if left == 0 {
                return Next::Again;
            }
            left -= 1;
            if self.control.accepts_left == 0 {
                self.control.is_stopping = true;
                break;
            }
            if self.control.retry.is_some() {
                break;
            }
            self.accept(reactor);
        }
        if self.control.is_draining && !self.control.is_readable {
            self.control.is_stopping = true;
        }
        if self.control.is_stopping {
            self.close(reactor);
            return Next::Remove;
        }
        Next::Keep
    }

    fn accept(&mut self, reactor: &mut Reactor) {
        let Some(socket) = &self.control.socket else {
            self.control.is_readable = false;
            return;
        };
        let numbers = &self.control.shared.numbers;
        if numbers.is_near() && !socket.has_room(numbers) {
            return self.wait_for_room(reactor);
        }
        let accepted = socket.accept(self.control.is_shared.get());
        match accepted {
            Ok((fd, peer)) => {
                self.control.is_short = false;
                if self.control.is_draining {
                    self.control.accepts_left -= 1;
                }
                // Accepted is served; but the next one looks first.
                let _ = self.control.shared.numbers.is_reserved(fd.as_fd());
                self.service.accepted(&mut self.control, reactor, fd, peer);
            }
            Err(error) => self.accept_failed(reactor, &error),
        }
    }

    /// Leaves clients waiting in the kernel's queue until descriptors are closed.
    #[cold]
    fn wait_for_room(&mut self, reactor: &mut Reactor) {
        let control = &mut self.control;
        if !control.is_short {
            control.is_short = true;
            log::warn!(
                target: log::TRANSPORT,
                "{} {}: only the reserve of {} descriptors is left, accepting later",
                control.token,
                control.address,
                control.shared.numbers.reserve(),
            );
        }
        control.retry = Some(reactor.notify_later(RETRY_AFTER, control.token));
    }

    #[cold]
    fn accept_failed(&mut self, reactor: &mut Reactor, error: &io::Error) {
        let control = &mut self.control;
        if error.kind() == io::ErrorKind::WouldBlock {
            control.is_readable = false;
            return;
        }
        if sys::is_of_one_connection(error) {
            log::debug!(target: log::TRANSPORT, "{}: accept: {error}", control.token);
            return;
        }
        let mut shed = None;
        if sys::is_out_of_descriptors(error)
            && control.shared.spend_reserve()
            && let Some(socket) = &control.socket
        {
            shed = socket.accept(false).ok().map(|(_, peer)| peer);
            control.shared.fill_reserve();
            control.shared.numbers.ran_out();
        }
        // Written only now: a log line could have taken the freed number.
        if let Some(peer) = shed {
            Ledger::add(&control.shared.ledger.shed, 1);
            log::debug!(
                target: log::TRANSPORT,
                "{}: no descriptors: gave up the reserve to close {}",
                control.token,
                peer_address(&peer),
            );
        }
        if !control.is_short {
            control.is_short = true;
            let what = if sys::is_out_of_descriptors(error) || sys::is_out_of_memory(error) {
                "short of resources"
            } else {
                "accept failed"
            };
            log::warn!(target: log::TRANSPORT, "{} {}: {what}, trying again: {error}", control.token, control.address);
        }
        control.retry = Some(reactor.notify_later(RETRY_AFTER, control.token));
    }

    fn close(&mut self, reactor: &mut Reactor) {
        let control = &mut self.control;
        if let Some(socket) = control.socket.take() {
            socket.unwatch(reactor);
            // The path first: a client that finds it finds a listener, and nobody has
            // taken it over while the socket is open.
            control.file = None;
            socket.close();
            Ledger::add(&control.shared.ledger.closed, 1);
            if let Some(retry) = control.retry.take() {
                // It may be what runs.
                let _ = retry.cancel(reactor);
            }
            log::debug!(target: log::TRANSPORT, "{}: closed {}", control.token, control.address);
            self.service.stopped(&mut self.control.context(reactor));
        }
    }
}

/// Closes a socket from which nobody has read, or accepted, what may have come.
fn close_unserved(fd: OwnedFd, may_have_come: bool) {
    if may_have_come && sys::is_unix(fd.as_fd()) {
        close_elsewhere(fd);
    }
}

fn peer_address(peer: &SocketName) -> Address {
    match peer {
        SocketName::Inet(address) => Address::Inet(*address),
        other => Address::Unix(unix_address(other.clone())),
    }
}

impl<S: Service> Descriptor for Accepting<S> {
    fn ready(&mut self, reactor: &mut Reactor, readiness: Readiness) -> Next {
        if !readiness.is_empty() {
            self.control.is_readable = true;
        }
        self.work(reactor)
    }

    fn attend(&mut self, reactor: &mut Reactor) -> Next {
        self.work(reactor)
    }

    fn timer_fired(&mut self, reactor: &mut Reactor, call: DelayedCall) -> Next {
        if self.control.retry == Some(call) {
            self.control.retry = None;
            // Somebody else may have taken its number, the last time.
            self.control.shared.fill_reserve();
        }
        self.work(reactor)
    }

    fn request(&mut self, reactor: &mut Reactor, request: &mut dyn Any) -> Next {
        if let Some(request) = request.downcast_mut::<DetachListenerRequest>()
            && let Some(socket) = self.control.socket.take()
        {
            socket.unwatch(reactor);
            Ledger::add(&self.control.shared.ledger.closed, 1);
            if let Some(file) = self.control.file.take() {
                file.leave();
            }
            if let Some(retry) = self.control.retry.take() {
                let _ = retry.cancel(reactor);
            }
            request.fd = Some(socket.into_descriptor());
            self.service.stopped(&mut self.control.context(reactor));
            return Next::Remove;
        }
        self.work(reactor)
    }

    fn panicked(&mut self, _: &mut Reactor, _: Panic) -> Next {
        // The connection that was accepted is closed; the others of the batch are
        // served in the next turn.
        if let Some(fd) = self.control.accepted.take() {
            close_unserved(fd, true);
        }
        self.control.farewells.forget();
        if self.control.socket.is_some() {
            Next::Again
        } else {
            Next::Remove
        }
    }

    fn drain(&mut self, reactor: &mut Reactor, _: DrainRound) -> Next {
        if self.control.is_draining || self.control.is_stopping {
            return self.work(reactor);
        }
        reactor.await_end(self.control.token);
        let control = &mut self.control;
        // Those who wait have connected, and may have sent a request already. In a
        // queue that others have too they are in good hands; and a listener that
        // accepts nobody at this time does not begin now.
        if control.is_shared.get() || !control.may_accept() || control.retry.is_some() {
            control.is_stopping = true;
        } else {
            control.is_draining = true;
            control.is_readable = true;
            control.accepts_left = control.accepts_left.min(LAST_ACCEPTS);
        }
        self.work(reactor)
    }

    fn shutdown(&mut self, reactor: &mut Reactor) {
        self.control.is_stopping = true;
        self.close(reactor);
    }

    fn source(&self) -> Option<BorrowedFd<'_>> {
        self.control.socket.as_ref()?.source()
    }

    fn facet(&mut self) -> &mut dyn Any {
        &mut self.control
    }

    fn log_prefix(&self) -> Cow<'_, str> {
        Cow::Owned(format!("listener,{}", self.control.address))
    }
}

/// Has the reactor accept connections on a listening socket.
pub(crate) fn install(
    reactor: &mut Reactor,
    fd: OwnedFd,
    file: Option<SocketFile>,
    service: impl Service,
) -> Result<ListenerHandle, (io::Error, OwnedFd)> {
    install_as(
        reactor,
        ListeningSocket::Real(fd),
        file,
        Sharing::Ours,
        service,
    )
    .map_err(given_back)
}

/// As [`install`], for a socket that came from somewhere else.
pub(crate) fn install_adopted(
    reactor: &mut Reactor,
    fd: OwnedFd,
    service: impl Service,
) -> Result<ListenerHandle, (io::Error, OwnedFd)> {
    let socket = ListeningSocket::Real(fd);
    install_as(reactor, socket, None, Sharing::Shared, service).map_err(given_back)
}

/// As [`install`], on a simulated kernel. What fails is closed.
#[cfg(feature = "testing")]
pub(crate) fn install_simulated(
    reactor: &mut Reactor,
    listener: MemoryListener,
    service: impl Service,
) -> io::Result<ListenerHandle> {
    let socket = ListeningSocket::Simulated(listener);
    install_as(reactor, socket, None, Sharing::Shared, service).map_err(|(error, _)| error)
}

fn given_back((error, socket): (io::Error, ListeningSocket)) -> (io::Error, OwnedFd) {
    (error, socket.into_descriptor())
}

/// Whether others may hold a socket.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Sharing {
    Ours,
    Shared,
}

fn install_as(
    reactor: &mut Reactor,
    socket: ListeningSocket,
    file: Option<SocketFile>,
    sharing: Sharing,
    service: impl Service,
) -> Result<ListenerHandle, (io::Error, ListeningSocket)> {
    let (host, address) = match socket.name() {
        // Of a listener on all addresses each connection has its own.
        Ok(SocketName::Inet(address)) if address.ip().is_unspecified() => {
            (HostName::Unknown, Address::Inet(address))
        }
        Ok(SocketName::Inet(address)) => (HostName::Inet(address), Address::Inet(address)),
        Ok(other) => {
            let address = unix_address(other);
            (
                HostName::Unix(address.clone().into()),
                Address::Unix(address),
            )
        }
        Err(error) => return Err((error, socket)),
    };
    let shared = Shared::of(reactor);
    shared.fill_reserve();
    let mut vacancy = match reactor.vacancy() {
        Ok(vacancy) => vacancy,
        Err(error) => return Err((error, socket)),
    };
    let token = vacancy.token();
    if let Err(error) = socket.watch(vacancy.reactor(), token) {
        return Err((error, socket));
    }
    Ledger::add(&shared.ledger.opened, 1);
    let refuses_descriptors = matches!(host, HostName::Unix(_)) && !socket.passes_rights();
    let control = Control {
        socket: Some(socket),
        token,
        host,
        address,
        shared,
        file,
        retry: None,
        is_readable: false,
        is_paused: false,
        holds: 0,
        is_stopping: false,
        is_draining: false,
        accepts_left: u32::MAX,
        is_started: false,
        is_shared: Cell::new(sharing == Sharing::Shared),
        is_short: false,
        refuses_descriptors,
        accepted: None,
        farewells: Farewells::default(),
    };
    let handle = control.handle();
    vacancy.install(Box::new(Accepting { control, service }));
    reactor.notify(token);
    Ok(handle)
}
