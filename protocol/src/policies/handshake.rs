//! Peers that have connected and have not yet said who they are.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::rc::{Rc, Weak};
use std::time::Duration;

use bowline_reactor::{Description, Reactor};

use super::timeout::Timeout;
use super::wrapper::{Event, Policy, ProtocolWrapper};
use crate::address::Address;
use crate::connection::AnyConnection;
use crate::context::Context;
use crate::factory::{BuildContext, Factory, ListenerHandle};
use crate::log;

/// How many may be at it. Some hundreds of honest ones are rare.
const DEFAULT_MOST: usize = 1_024;

/// How long each has. D-Bus had half a minute, tried five seconds, and went back:
/// a machine that boots is slow.
const DEFAULT_DEADLINE: Duration = Duration::from_secs(30);

/// A factory whose connections have to get through a handshake. Only so many may be in
/// their handshake at a time, and each has a deadline.
///
/// The protocol knows what its handshake is. It is given a [`Handshake`], and
/// [completes](Handshake::complete) it when the peer has logged in, sent its first
/// request, or shown its certificate. A connection that misses its deadline is aborted.
///
/// When the limit is reached, the listener is
/// [held](crate::Listener::hold_accepting): further peers wait in the kernel's queue and
/// are not turned away. If several listeners share the factory, in an `Rc<RefCell<_>>`,
/// the one that brought the last connection is held.
///
/// # Examples
///
/// A peer has to say the word before anything else:
///
/// ```
/// use std::time::Duration;
/// use bowline::policies::{Handshake, LimitHandshakes};
/// use bowline::{Address, Context, Protocol, Transport};
///
/// struct Guarded(Handshake);
///
/// impl<T: Transport> Protocol<T> for Guarded {
///     fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
///         if self.0.is_complete() {
///             cx.transport.write(data);
///         } else if data == b"swordfish" {
///             self.0.complete(cx.reactor);
///         } else {
///             cx.transport.lose_connection();
///         }
///     }
/// }
///
/// let factory = LimitHandshakes::new(|_: &Address, handshake| Guarded(handshake))
///     .most(200)
///     .deadline(Duration::from_secs(10));
/// // reactor.listen_tcp(address, factory)?;
/// # let _ = factory;
/// ```
pub struct LimitHandshakes<B> {
    build: B,
    state: Rc<State>,
}

struct State {
    most: Cell<usize>,
    deadline: Cell<Duration>,
    open: Cell<usize>,
    timed_out: Cell<u64>,
    /// Those held by us.
    held: RefCell<Vec<ListenerHandle>>,
}

impl<B> LimitHandshakes<B> {
    /// `build` makes the protocol of each connection. It is given the connection's
    /// handshake.
    pub fn new<P>(build: B) -> Self
    where
        B: FnMut(&Address, Handshake) -> P + 'static,
    {
        Self {
            build,
            state: Rc::new(State {
                most: Cell::new(DEFAULT_MOST),
                deadline: Cell::new(DEFAULT_DEADLINE),
                open: Cell::new(0),
                timed_out: Cell::new(0),
                held: RefCell::new(Vec::new()),
            }),
        }
    }

    /// Sets how many connections may be in their handshake at a time; default 1,024, at
    /// least one.
    #[must_use]
    pub fn most(self, count: usize) -> Self {
        self.state.most.set(count.max(1));
        self
    }

    /// Sets how long each handshake may take, from the beginning of the connection;
    /// default 30 s.
    #[must_use]
    pub fn deadline(self, deadline: Duration) -> Self {
        self.state.deadline.set(deadline);
        self
    }

    /// The count, to look at from elsewhere.
    pub fn count(&self) -> HandshakeCount {
        HandshakeCount(Rc::clone(&self.state))
    }
}

impl<B, P> Factory for LimitHandshakes<B>
where
    B: FnMut(&Address, Handshake) -> P + 'static,
    P: 'static,
{
    type Protocol = ProtocolWrapper<P, Handshaking>;

    fn build_protocol(
        &mut self,
        cx: &mut BuildContext<'_>,
        peer: &Address,
    ) -> Option<Self::Protocol> {
        let slot = HandshakeSlot::taken(&self.state);
        let protocol = (self.build)(peer, Handshake(Rc::clone(&slot)));
        if self.state.open.get() >= self.state.most.get()
            && let Some(listener) = cx.listener()
        {
            listener.hold_accepting();
            let handle = listener.handle();
            State::hold(&self.state, cx.reactor, handle);
        }
        Some(ProtocolWrapper::new(protocol, Handshaking::new(slot)))
    }

    fn describe(&self, description: &mut Description) {
        let state = &self.state;
        description
            .section_of::<Self>()
            .set("open", state.open.get())
            .set("most", state.most.get())
            .set("timed_out", state.timed_out.get())
            .set("deadline", state.deadline.get())
            .set_some("holds", state.held.try_borrow().ok().map(|it| it.len()));
    }
}

impl State {
    fn hold(state: &Rc<Self>, reactor: &mut Reactor, listener: ListenerHandle) {
        let is_first = state.held.borrow().is_empty();
        state.held.borrow_mut().push(listener);
        if is_first {
            Self::look_later(state, reactor);
        }
    }

    /// Slots are also freed where no reactor is at hand: by then, though, each
    /// of those that are taken now is.
    fn look_later(state: &Rc<Self>, reactor: &mut Reactor) {
        let weak: Weak<Self> = Rc::downgrade(state);
        reactor.call_later(state.deadline.get(), move |reactor| {
            if let Some(state) = weak.upgrade() {
                state.resume_if_free(reactor);
                if !state.held.borrow().is_empty() {
                    Self::look_later(&state, reactor);
                }
            }
        });
    }

    fn resume_if_free(&self, reactor: &mut Reactor) {
        if self.open.get() < self.most.get() {
            for listener in self.held.take() {
                if let Some(listener) = reactor.get(listener) {
                    listener.release_accepting();
                }
            }
        }
    }
}

/// One of the handshakes there may be.
struct HandshakeSlot {
    state: Rc<State>,
    is_free: Cell<bool>,
    is_complete: Cell<bool>,
}

impl HandshakeSlot {
    fn taken(state: &Rc<State>) -> Rc<Self> {
        state.open.set(state.open.get() + 1);
        Rc::new(Self {
            state: Rc::clone(state),
            is_free: Cell::new(false),
            is_complete: Cell::new(false),
        })
    }

    fn free(&self) -> bool {
        let is_first = !self.is_free.replace(true);
        if is_first {
            self.state.open.set(self.state.open.get() - 1);
        }
        is_first
    }

    fn free_and_resume(&self, reactor: &mut Reactor) {
        if self.free() {
            self.state.resume_if_free(reactor);
        }
    }
}

impl Drop for HandshakeSlot {
    /// Where the factory panicked.
    fn drop(&mut self) {
        self.free();
    }
}

/// The handshake of one connection, for its protocol to complete. [`LimitHandshakes`]
/// makes it. It counts against the limit until it is completed or the connection is lost.
pub struct Handshake(Rc<HandshakeSlot>);

impl Handshake {
    /// The peer got through. Nothing limits this connection any more. A second call does
    /// nothing.
    pub fn complete(&self, reactor: &mut Reactor) {
        self.0.is_complete.set(true);
        self.0.free_and_resume(reactor);
    }

    /// Whether it was completed.
    pub fn is_complete(&self) -> bool {
        self.0.is_complete.get()
    }
}

/// The policy of [`LimitHandshakes`], for one connection.
pub struct Handshaking {
    slot: Rc<HandshakeSlot>,
    timeout: Timeout,
}

impl Handshaking {
    fn new(slot: Rc<HandshakeSlot>) -> Self {
        let of_timer = Rc::clone(&slot);
        let timeout = Timeout::with_action(move |reactor, transport| {
            let state = &of_timer.state;
            if !of_timer.is_free.get()
                && let Some(transport) = reactor.get(transport)
            {
                state.timed_out.set(state.timed_out.get() + 1);
                log::debug!(
                    target: log::TRANSPORT,
                    "no handshake with {} within {:?}: closing",
                    transport.peer(),
                    state.deadline.get(),
                );
                transport.abort_connection();
            }
        });
        Self { slot, timeout }
    }
}

impl<T: AnyConnection + ?Sized> Policy<T> for Handshaking {
    fn describe(&self, description: &mut Description) {
        description
            .section_of::<Self>()
            .set("complete", self.slot.is_complete.get())
            .set("deadline", self.slot.state.deadline.get());
    }

    fn before(&mut self, cx: &mut Context<'_, T>, event: &Event<'_>) {
        match event {
            Event::ConnectionMade => {
                let deadline = self.slot.state.deadline.get();
                self.timeout.set(cx, Some(deadline));
            }
            Event::ConnectionReattached => self.timeout.reattached(cx),
            Event::ConnectionLost(_) => {
                self.timeout.cancel(cx.reactor);
                self.slot.free_and_resume(cx.reactor);
            }
            _ => {}
        }
    }
}

impl Drop for Handshaking {
    fn drop(&mut self) {
        self.slot.free();
    }
}

/// Counts the handshakes of a [`LimitHandshakes`]. A clone shows the same count.
#[derive(Clone)]
pub struct HandshakeCount(Rc<State>);

impl HandshakeCount {
    /// How many connections are in their handshake.
    pub fn open(&self) -> usize {
        self.0.open.get()
    }

    /// How many have missed their deadline so far.
    pub fn timed_out(&self) -> u64 {
        self.0.timed_out.get()
    }
}

impl<B> fmt::Debug for LimitHandshakes<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LimitHandshakes")
            .field("most", &self.state.most.get())
            .field("deadline", &self.state.deadline.get())
            .field("open", &self.state.open.get())
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Handshake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handshake")
            .field("is_complete", &self.is_complete())
            .finish()
    }
}

impl fmt::Debug for Handshaking {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handshaking")
            .field("is_complete", &self.slot.is_complete.get())
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for HandshakeCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HandshakeCount")
            .field("open", &self.open())
            .field("timed_out", &self.timed_out())
            .finish()
    }
}
