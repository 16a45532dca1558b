//! Listening sockets, which accept in budgeted batches.

mod socket;

use std::any::Any;
use std::borrow::Cow;
use std::cell::Cell;
use std::io;
use std::marker::PhantomData;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use bowline_protocol as protocol;
use bowline_protocol::{
    Acceptor, Address, BuildContext, Factory, Listener, ListenerHandle, Origin, UnixAddress,
};
use bowline_reactor::{DelayedCall, Descriptor, Handle, Next, Panic, Reactor, Readiness, Token};

use crate::closer::close_elsewhere;
use crate::connection::{DescriptorTransport, connect_protocol, unix_address};
use crate::connection::{HostName, Names, Source};
use crate::error::{ListenError, ListenStep};
use crate::handoff::DetachListenerRequest;
use crate::log;
use crate::options::{StaleSocket, TcpListenOptions, UnixListenOptions};
use crate::shared::{Ledger, Shared};
use crate::sys::{self, Connecting, Family, FileIdentity, SocketName};
#[cfg(feature = "testing")]
use crate::testing::MemoryListener;

use self::socket::ListeningSocket;

/// When a listener that could not accept for want of descriptors or memory
/// tries again: no event is going to say that there are some.
const RETRY_AFTER: Duration = Duration::from_millis(100);

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
    socket: Option<ListeningSocket>,
    token: Token,
    host: HostName,
    address: Address,
    shared: Rc<Shared>,
    /// Unlinked when we close, if it is still ours.
    file: Option<SocketFile>,
    retry: Option<DelayedCall>,
    /// Latched: there may be connections to accept.
    is_readable: bool,
    is_paused: bool,
    /// How many reasons there are not to accept, beside the pause.
    holds: u32,
    is_stopping: bool,
    /// Stops when there is nothing more to accept.
    is_draining: bool,
    is_started: bool,
    /// Whether another process may hold the socket, and so make it block.
    is_shared: Cell<bool>,
    /// Whether a shortage has been logged; one line for each shortage.
    is_short: bool,
    /// Whether the kernel refuses descriptors to all who connect.
    refuses_descriptors: bool,
}

/// The file of a UNIX socket that we bound.
#[derive(Debug)]
pub(crate) struct SocketFile {
    path: PathBuf,
    identity: FileIdentity,
}

impl SocketFile {
    /// The path goes on to belong to whoever holds the listener.
    fn leave(self) {
        let mut file = ManuallyDrop::new(self);
        drop(std::mem::take(&mut file.path));
    }
}

impl Drop for SocketFile {
    /// Removes the file, unless another one has taken its place.
    fn drop(&mut self) {
        match sys::socket_file(&self.path) {
            Ok(identity) if identity == self.identity => {
                if let Err(error) = std::fs::remove_file(&self.path) {
                    log::warn!(
                        target: log::TRANSPORT,
                        "cannot remove {}: {error}",
                        self.path.display()
                    );
                }
            }
            Ok(_) => log::debug!(
                target: log::TRANSPORT,
                "{} is another's by now",
                self.path.display()
            ),
            Err(_) => log::debug!(
                target: log::TRANSPORT,
                "{} is gone already",
                self.path.display()
            ),
        }
    }
}

impl Listener for Control {
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
        let path = match &self.address {
            Address::Unix(UnixAddress::Path(path)) => std::path::absolute(path)?,
            _ => return Err(io::Error::from(io::ErrorKind::InvalidInput)),
        };
        let identity = sys::socket_file(&path)?;
        if (identity.device, identity.inode) != (file.device, file.inode) {
            return Err(io::Error::from(io::ErrorKind::AlreadyExists));
        }
        self.file = Some(SocketFile { path, identity });
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
                self.factory.log_prefix(),
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
        let protocol = self
            .factory
            .build_protocol(&mut control.context(reactor), &address);
        let Some(protocol) = protocol else {
            log::debug!(target: log::TRANSPORT, "{}: declined {address}", control.token);
            // Its peer may send at this very moment.
            return close_unserved(fd, true);
        };
        let names = Names {
            host: control.host.clone(),
            peer,
            refuses_descriptors: control.refuses_descriptors,
        };
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
                self.factory.log_prefix(),
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
            // The path first: a client that finds it finds a listener.
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
        // The connection that was accepted is closed already; the others of
        // the batch are served in the next turn.
        if self.control.socket.is_some() {
            Next::Again
        } else {
            Next::Remove
        }
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

/// Makes and binds a TCP listener.
pub(crate) fn bind_tcp(
    address: std::net::SocketAddr,
    options: &TcpListenOptions,
) -> Result<OwnedFd, ListenError> {
    let failed = |step| {
        move |error| ListenError {
            address: address.into(),
            step,
            error,
        }
    };
    let (fd, name) = (|| {
        let family = if address.is_ipv4() {
            Family::Inet4
        } else {
            Family::Inet6
        };
        let fd = sys::stream_socket(family)?;
        sys::set_reuse_address(fd.as_fd(), options.reuse_address)?;
        if options.reuse_port {
            sys::set_reuse_port(fd.as_fd(), true)?;
        }
        if address.is_ipv6() {
            sys::set_v6_only(fd.as_fd(), options.v6_only)?;
        }
        if options.no_delay {
            sys::set_no_delay(fd.as_fd(), true)?;
        }
        if options.keep_alive {
            sys::set_keep_alive(fd.as_fd(), true)?;
        }
        Ok((fd, SocketName::Inet(address)))
    })()
    .map_err(failed(ListenStep::Socket))?;
    sys::bind(fd.as_fd(), &name).map_err(failed(ListenStep::Bind))?;
    sys::listen(fd.as_fd(), backlog(options.backlog)).map_err(failed(ListenStep::Listen))?;
    Ok(fd)
}

/// Makes and binds a UNIX listener; with the file, if it has one.
pub(crate) fn bind_unix(
    address: &UnixAddress,
    options: &UnixListenOptions,
) -> Result<(OwnedFd, Option<SocketFile>), ListenError> {
    let failed = |step| {
        move |error| ListenError {
            address: address.clone().into(),
            step,
            error,
        }
    };
    let name = socket_name(address);
    let fd = sys::stream_socket(Family::Unix).map_err(failed(ListenStep::Socket))?;
    if !options.accepts_descriptors {
        // On the listener, so that nothing slips in before the accept.
        sys::set_pass_rights(fd.as_fd(), false).map_err(failed(ListenStep::Socket))?;
    }
    let path = address.as_path();
    if path.is_some() {
        // Linux gives the file the mode of the unbound socket, less the umask:
        // it is never more open than asked.
        sys::set_mode(fd.as_fd(), options.mode).map_err(failed(ListenStep::Mode))?;
    }
    let mut bound = sys::bind(fd.as_fd(), &name);
    if let Some(path) = path
        && options.stale == StaleSocket::Remove
        && bound
            .as_ref()
            .is_err_and(|error| error.kind() == io::ErrorKind::AddrInUse)
        && remove_stale(path, &name).map_err(failed(ListenStep::Bind))?
    {
        bound = sys::bind(fd.as_fd(), &name);
    }
    bound.map_err(failed(ListenStep::Bind))?;
    let file = match path {
        None => None,
        Some(path) => {
            let path = std::path::absolute(path).map_err(failed(ListenStep::Bind))?;
            let identity = sys::socket_file(&path).map_err(failed(ListenStep::Mode))?;
            let file = SocketFile { path, identity };
            // What the umask took away. Clients are refused until `listen`.
            sys::set_file_mode(&file.path, identity, options.mode)
                .map_err(failed(ListenStep::Mode))?;
            Some(file)
        }
    };
    sys::listen(fd.as_fd(), backlog(options.backlog)).map_err(failed(ListenStep::Listen))?;
    Ok((fd, file))
}

fn backlog(asked: u32) -> i32 {
    i32::try_from(asked).unwrap_or(i32::MAX)
}

/// Removes the socket file at `path` if nobody listens on it; whether it did.
fn remove_stale(path: &Path, name: &SocketName) -> io::Result<bool> {
    let Ok(found) = sys::socket_file(path) else {
        // A file that is no socket is none of ours.
        return Ok(false);
    };
    let probe = sys::stream_socket(Family::Unix)?;
    match sys::connect(probe.as_fd(), name) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
        Ok(Connecting::Done | Connecting::InProgress | Connecting::BacklogFull) | Err(_) => {
            return Ok(false);
        }
    }
    // Looked at again: it may have been replaced while we asked.
    if sys::socket_file(path).is_ok_and(|now| now == found) {
        std::fs::remove_file(path)?;
        log::debug!(target: log::TRANSPORT, "removed stale socket {}", path.display());
    }
    Ok(true)
}

pub(crate) fn socket_name(address: &UnixAddress) -> SocketName {
    match address {
        UnixAddress::Unnamed => SocketName::UnixUnnamed,
        UnixAddress::Path(path) => SocketName::UnixPath(path.clone()),
        UnixAddress::Abstract(name) => SocketName::UnixAbstract(name.clone()),
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
        is_started: false,
        is_shared: Cell::new(sharing == Sharing::Shared),
        is_short: false,
        refuses_descriptors,
    };
    let handle = control.handle();
    vacancy.install(Box::new(Accepting { control, service }));
    reactor.notify(token);
    Ok(handle)
}
