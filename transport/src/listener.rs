//! Listening sockets, which accept in budgeted batches.

mod farewell;

use std::any::Any;
use std::borrow::Cow;
use std::cell::Cell;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;

use bowline_protocol::{
    Acceptor, Address, BuildContext, Credentials, Factory, LingeringClose, Listener,
    ListenerHandle, Origin, SocketFile, UnixAddress,
};
use bowline_reactor::{
    DelayedCall, Description, Descriptor, DrainRound, Handle, Next, Panic, Reactor,
};
use bowline_reactor::{Readiness, Token};

use crate::detach::DetachListenerRequest;
use crate::endpoint::{ConnectionSocket, Listen, ListeningSocket, Side, Wrap};
use crate::establish::{Beginning, Establish, TransportFor};
use crate::link::Link;
use crate::log;
use crate::shared::{Ledger, Shared};
use crate::sys;

pub(crate) use self::farewell::Farewell;
use self::farewell::Farewells;

/// When a listener tries again after a lack of descriptors or memory. No event reports
/// that there are some again.
const RETRY_AFTER: Duration = Duration::from_millis(100);

/// How many clients a listener still accepts when the reactor stops gracefully. It is
/// the longest accept queue, unless somebody has raised `net.core.somaxconn`. Clients
/// beyond that were not waiting when the stop began.
const LAST_ACCEPTS: u32 = 4096;

struct Accepting<L: ListeningSocket, S> {
    control: ListenerControl<L>,
    service: S,
}

/// How a listener serves the sockets that it accepts.
pub(crate) trait OnAccept<L: ListeningSocket>: 'static {
    /// Whether it serves a listener at this address.
    ///
    /// # Errors
    /// The reason why it does not.
    fn suits(&self, _: &Address) -> io::Result<()> {
        Ok(())
    }

    fn started(&mut self, cx: &mut BuildContext<'_>);

    /// Accepts one socket, and serves it.
    ///
    /// # Errors
    /// Those of accepting.
    fn accept(&mut self, control: &mut ListenerControl<L>, reactor: &mut Reactor)
    -> io::Result<()>;

    fn stopped(&mut self, cx: &mut BuildContext<'_>);

    /// What accepts or builds.
    fn name(&self) -> Cow<'_, str>;

    /// What it says of itself.
    fn describe(&self, description: &mut Description);
}

/// Makes connections of the sockets, with the protocols of a factory.
pub(crate) struct Serve<W, F> {
    pub(crate) wrap: W,
    pub(crate) factory: F,
    pub(crate) lingering: Option<LingeringClose>,
}

/// Gives the sockets to an acceptor as they are.
pub(crate) struct HandOver<A> {
    pub(crate) acceptor: A,
}

/// The part of a listener that handles give access to.
pub(crate) struct ListenerControl<L: ListeningSocket> {
    /// `None` once closed or detached.
    socket: Option<L>,
    token: Token,
    address: Address,
    shared: Rc<Shared>,
    retry: Option<DelayedCall>,
    /// Latched readiness: connections may wait.
    is_readable: bool,
    is_paused: bool,
    /// How many reasons there are not to accept, besides the pause.
    holds: u32,
    is_stopping: bool,
    /// Whether somebody else, who has the socket too, has shut it down.
    is_shut: bool,
    /// Whether the listener stops once no connection waits.
    is_draining: bool,
    /// How many connections it accepts at the most until then.
    accepts_left: u32,
    is_started: bool,
    /// Whether another process may hold the socket, and so make it block.
    may_block: Cell<bool>,
    /// Whether another process may accept from the same queue.
    shares_queue: Cell<bool>,
    /// Whether the accept queue is served at a graceful stop, even if it is shared.
    serves_queue: bool,
    /// Whether the present shortage was logged. Each shortage has one line.
    is_short: bool,
    /// The accepted socket, while a protocol is built for it.
    accepted: Option<L::Accepted>,
    farewells: Farewells,
    /// How many sockets were accepted.
    count: u64,
    /// What became of those that connections were made of.
    #[cfg(feature = "inspect")]
    tally: crate::Tally,
}

impl<L: ListeningSocket> Listener for ListenerControl<L> {
    fn peer_credentials(&self) -> io::Result<Credentials> {
        match (&self.socket, &self.accepted) {
            (Some(socket), Some(accepted)) => socket.credentials_of(accepted),
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
        self.may_block.set(false);
        self.shares_queue.set(false);
    }

    fn serve_queue_at_stop(&mut self) {
        self.serves_queue = true;
    }

    fn stop_listening_when_drained(&mut self) {
        self.is_draining = true;
        self.is_paused = false;
        // The kernel is asked once more, whatever the latch says.
        self.is_readable = true;
    }

    fn is_listening(&self) -> bool {
        !self.is_stopping && self.socket.is_some()
    }

    fn socket_file(&self) -> Option<SocketFile> {
        self.socket.as_ref()?.socket_file()
    }

    fn disown_socket_file(&mut self) {
        if let Some(socket) = &mut self.socket {
            socket.disown_socket_file();
        }
    }

    fn own_socket_file(&mut self, file: SocketFile) -> io::Result<()> {
        match &mut self.socket {
            Some(socket) => socket.own_socket_file(file),
            None => Err(io::Error::from(io::ErrorKind::NotConnected)),
        }
    }

    fn handle(&self) -> ListenerHandle {
        Handle::new(self.token, |facet| {
            facet.downcast_mut::<Self>().map(|control| control as _)
        })
    }

    fn duplicate(&self) -> io::Result<OwnedFd> {
        self.is_shared_now();
        let socket = self.socket.as_ref();
        socket
            .ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected))?
            .duplicate()
    }
}

impl<L, W, F> OnAccept<L> for Serve<W, F>
where
    L: ListeningSocket,
    W: Wrap<L::Accepted>,
    W::Transport: TransportFor<F::Protocol>,
    F: Factory,
{
    fn started(&mut self, cx: &mut BuildContext<'_>) {
        log_factory(cx, "starting", || self.factory.log_prefix());
        self.factory.started(cx);
    }

    #[inline]
    fn accept(
        &mut self,
        control: &mut ListenerControl<L>,
        reactor: &mut Reactor,
    ) -> io::Result<()> {
        let (socket, may_block) = control.open()?;
        let (accepted, peer) = socket.accept(may_block)?;
        control.accepted(accepted.descriptor());
        control.accepted = Some(accepted);
        let protocol = self
            .factory
            .build_protocol(&mut control.context(reactor), &peer);
        let Some(mut accepted) = control.accepted.take() else {
            return Ok(());
        };
        let wrap = |socket| self.wrap.wrap(socket, Side::Accepted);
        let (listening, lingering) = (control.socket.as_ref(), self.lingering);
        let prepare = &|link: &mut Link| {
            if let Some(listening) = listening {
                listening.prepare(link);
            }
            if let Some(lingering) = lingering {
                link.linger(lingering);
            }
        };
        let beginning = Beginning {
            prepare,
            #[cfg(feature = "inspect")]
            tally: Some(&control.tally),
            ..Beginning::of(Side::Accepted)
        };
        let Some(protocol) = protocol else {
            log::debug!(target: log::TRANSPORT, "{}: declined {peer}", control.token);
            match control.farewells.next() {
                Some(farewell) => {
                    let said =
                        W::Transport::establish(reactor, accepted, wrap, farewell, beginning);
                    if let Err((error, ..)) = said {
                        log::debug!(target: log::TRANSPORT, "declined without a word: {error}");
                    }
                }
                // The peer may be sending at this moment.
                None => accepted.decline(),
            }
            return Ok(());
        };
        control.farewells.forget();
        let made = W::Transport::establish(reactor, accepted, wrap, protocol, beginning);
        if let Err((error, ..)) = made {
            log::error!(target: log::TRANSPORT, "{}: cannot serve {peer}: {error}", control.token);
        }
        Ok(())
    }

    fn stopped(&mut self, cx: &mut BuildContext<'_>) {
        log_factory(cx, "stopping", || self.factory.log_prefix());
        self.factory.stopped(cx);
    }

    fn name(&self) -> Cow<'_, str> {
        self.factory.log_prefix()
    }

    fn describe(&self, description: &mut Description) {
        self.factory.describe(description);
    }
}

/// Says that the factory of a listener is `starting` or `stopping`.
fn log_factory<'a>(cx: &mut BuildContext<'_>, what: &str, factory: impl FnOnce() -> Cow<'a, str>) {
    if let Some(listener) = cx.listener() {
        log::debug!(
            target: log::TRANSPORT,
            "{}: {what} factory {}",
            listener.handle().token(),
            log::name(factory),
        );
    }
}

impl<L: ListeningSocket, A: Acceptor> OnAccept<L> for HandOver<A> {
    fn suits(&self, address: &Address) -> io::Result<()> {
        self.acceptor.suits(address)
    }

    fn started(&mut self, cx: &mut BuildContext<'_>) {
        self.acceptor.started(cx);
    }

    #[inline]
    fn accept(
        &mut self,
        control: &mut ListenerControl<L>,
        reactor: &mut Reactor,
    ) -> io::Result<()> {
        let (socket, may_block) = control.open()?;
        let (fd, peer) = socket.accept_descriptor(may_block)?;
        control.accepted(Some(fd.as_fd()));
        self.acceptor
            .accepted(&mut control.context(reactor), fd, &peer);
        Ok(())
    }

    fn stopped(&mut self, cx: &mut BuildContext<'_>) {
        self.acceptor.stopped(cx);
    }

    fn name(&self) -> Cow<'_, str> {
        Cow::Borrowed(std::any::type_name::<A>())
    }

    fn describe(&self, description: &mut Description) {
        self.acceptor.describe(description);
    }
}

impl<L: ListeningSocket> ListenerControl<L> {
    /// Another process holds the socket from now on.
    fn is_shared_now(&self) {
        self.may_block.set(true);
        self.shares_queue.set(true);
    }

    fn may_accept(&self) -> bool {
        let is_held = self.holds > 0 && !self.is_draining;
        !self.is_paused && !is_held && !self.is_stopping
    }

    /// The socket, and whether it may block; `WouldBlock` after the close.
    #[inline]
    fn open(&mut self) -> io::Result<(&mut L, bool)> {
        match &mut self.socket {
            Some(socket) => Ok((socket, self.may_block.get())),
            None => Err(io::ErrorKind::WouldBlock.into()),
        }
    }

    /// Notes that a connection was accepted.
    #[inline]
    fn accepted(&mut self, fd: Option<BorrowedFd<'_>>) {
        self.is_short = false;
        self.count += 1;
        if self.is_draining {
            self.accepts_left -= 1;
        }
        if let Some(fd) = fd {
            // This connection is served all the same. The next accept checks for room
            // first.
            let _ = self.shared.numbers.is_reserved(fd);
        }
    }

    /// The context for callbacks of this listener.
    fn context<'a>(&'a mut self, reactor: &'a mut Reactor) -> BuildContext<'a> {
        BuildContext {
            origin: Origin::Listener(self),
            reactor,
        }
    }
}

impl<L: ListeningSocket, S: OnAccept<L>> Accepting<L, S> {
    fn work(&mut self, reactor: &mut Reactor) -> Next {
        if !self.control.is_started {
            self.control.is_started = true;
            log::debug!(target: log::TRANSPORT, "{}: listening on {}", self.control.token, self.control.address);
            self.service.started(&mut self.control.context(reactor));
        }
        if self.control.may_block.get()
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
            if self.control.retry.is_some() && !self.control.is_shut {
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
        if numbers.is_near()
            && let Some(source) = socket.source()
            && !numbers.has_room(source)
        {
            return self.wait_for_room(reactor);
        }
        if let Err(error) = self.service.accept(&mut self.control, reactor) {
            self.accept_failed(reactor, &error);
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
        let is_empty = error.kind() == io::ErrorKind::WouldBlock;
        if control.is_shut && (is_empty || sys::is_not_listening(error)) {
            if !control.is_draining {
                log::warn!(target: log::TRANSPORT, "{} {}: somebody else has shut it down", control.token, control.address);
            }
            control.is_stopping = true;
            return;
        }
        if is_empty {
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
            && let Some(socket) = &mut control.socket
        {
            shed = socket.accept_descriptor(false).ok().map(|(_, peer)| peer);
            control.shared.fill_reserve();
            control.shared.numbers.ran_out();
        }
        // Logged only now, since writing a line could have taken the freed number.
        if let Some(peer) = shed {
            Ledger::add(&control.shared.ledger.shed, 1);
            log::debug!(
                target: log::TRANSPORT,
                "{}: no descriptors: gave up the reserve to close {peer}",
                control.token,
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
            socket.close();
            Ledger::add(&control.shared.ledger.closed, 1);
            if let Some(retry) = control.retry.take() {
                // This timer may be the one that has just fired.
                let _ = retry.cancel(reactor);
            }
            log::debug!(target: log::TRANSPORT, "{}: closed {}", control.token, control.address);
            self.service.stopped(&mut self.control.context(reactor));
        }
    }
}

impl<L: ListeningSocket, S: OnAccept<L>> Descriptor for Accepting<L, S> {
    fn ready(&mut self, reactor: &mut Reactor, readiness: Readiness) -> Next {
        if !readiness.is_empty() {
            self.control.is_readable = true;
        }
        if readiness.intersects(Readiness::READ_CLOSED | Readiness::WRITE_CLOSED) {
            self.control.is_shut = true;
        }
        self.work(reactor)
    }

    fn attend(&mut self, reactor: &mut Reactor) -> Next {
        self.work(reactor)
    }

    fn timer_fired(&mut self, reactor: &mut Reactor, call: DelayedCall) -> Next {
        if self.control.retry == Some(call) {
            self.control.retry = None;
            // Somebody else may have taken the number of the spare descriptor.
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
            if let Some(retry) = self.control.retry.take() {
                let _ = retry.cancel(reactor);
            }
            request.fd = Some(socket.into_descriptor());
            self.service.stopped(&mut self.control.context(reactor));
            return Next::Remove;
        }
        #[cfg(feature = "inspect")]
        if let Some(request) = request.downcast_mut::<crate::operation::OperationRequest>() {
            request.of_listener(&mut self.control);
        }
        self.work(reactor)
    }

    fn panicked(&mut self, _: &mut Reactor, _: Panic) -> Next {
        // The accepted connection is closed. The rest of the batch is served in the
        // next turn.
        if let Some(mut accepted) = self.control.accepted.take() {
            accepted.decline();
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
        // Clients in the queue have connected, and may have sent a request already, so
        // they are accepted. If others hold the socket, they serve the queue. A
        // listener that is not accepting anyway does not begin now.
        let is_theirs = control.shares_queue.get() && !control.serves_queue;
        if is_theirs || !control.may_accept() || control.retry.is_some() {
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

    fn forked(&mut self) {
        self.control.is_shared_now();
    }

    fn source(&self) -> Option<BorrowedFd<'_>> {
        self.control.socket.as_ref()?.source()
    }

    fn facet(&mut self) -> &mut dyn Any {
        &mut self.control
    }

    fn describe(&self, description: &mut Description) {
        let control = &self.control;
        let state = if control.socket.is_none() || control.is_stopping {
            "closing"
        } else if control.is_draining {
            "draining"
        } else if control.retry.is_some() {
            // For descriptors or memory.
            "waiting"
        } else if control.is_paused {
            "paused"
        } else if control.holds > 0 {
            "held"
        } else {
            "listening"
        };
        let section = description.section("listener");
        section
            .set("role", "listener")
            .set("factory", log::name(|| self.service.name()).into_owned())
            .set("state", state)
            .set("local", control.address.to_string())
            .set("accepted", control.count)
            .set("shared", control.shares_queue.get());
        #[cfg(feature = "inspect")]
        control.tally.describe(section);
        self.service.describe(description);
    }

    fn log_prefix(&self) -> Cow<'_, str> {
        Cow::Owned(format!("listener,{}", self.control.address))
    }
}

/// Has the reactor accept connections on a listening socket.
pub(crate) fn install<E: Listen>(
    reactor: &mut Reactor,
    socket: E::Socket,
    service: impl OnAccept<E::Socket>,
) -> Result<ListenerHandle, E::Error> {
    let shared = Shared::of(reactor);
    shared.fill_reserve();
    let address = match socket.address() {
        Ok(address) => address,
        Err(error) => {
            let address = Address::Unix(UnixAddress::Unnamed);
            return Err(E::not_installed(socket, address, error));
        }
    };
    if let Err(error) = service.suits(&address) {
        return Err(E::not_installed(socket, address, error));
    }
    let mut vacancy = match reactor.vacancy() {
        Ok(vacancy) => vacancy,
        Err(error) => return Err(E::not_installed(socket, address, error)),
    };
    let token = vacancy.token();
    if let Err(error) = socket.watch(vacancy.reactor(), token) {
        return Err(E::not_installed(socket, address, error));
    }
    Ledger::add(&shared.ledger.opened, 1);
    let control = ListenerControl {
        socket: Some(socket),
        token,
        address,
        shared,
        retry: None,
        is_readable: false,
        is_paused: false,
        holds: 0,
        is_stopping: false,
        is_shut: false,
        is_draining: false,
        accepts_left: u32::MAX,
        is_started: false,
        may_block: Cell::new(E::MAY_BLOCK),
        shares_queue: Cell::new(E::SHARES_QUEUE),
        serves_queue: false,
        is_short: false,
        accepted: None,
        farewells: Farewells::default(),
        count: 0,
        #[cfg(feature = "inspect")]
        tally: crate::Tally::new("listener", token.to_bits()),
    };
    let handle = control.handle();
    vacancy.install(Box::new(Accepting { control, service }));
    reactor.notify(token);
    Ok(handle)
}
