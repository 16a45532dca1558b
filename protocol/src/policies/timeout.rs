//! A time limit that messages put off.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::rc::{Rc, Weak};
use std::time::{Duration, Instant};

use bowline_reactor::{DelayedCall, Reactor};

use crate::connection::ConnectionHandle;
use crate::context::AnyContext;

/// A time limit for protocols. [Set](Self::set) it when a wait begins,
/// [reset](Self::reset) it when there is progress, and [cancel](Self::cancel) it when the
/// wait is over, at the latest in `connection_lost`.
///
/// When the time is over, the connection is closed with
/// [`lose_connection_within`](crate::AnyConnection::lose_connection_within), even if the peer
/// does not read or a producer is registered. With
/// [`with_action`](Self::with_action) your action runs instead. Afterwards there is no
/// limit until it is set again. Bytes that were written have as long to leave as the
/// limit was, but at least 1 s and at most 10 s;
/// [`close_within`](Self::close_within) sets another time.
///
/// If the loop itself was stopped for longer than the limit (by a debugger, with its
/// virtual machine, in a callback), it first reads everything that has come meanwhile, as
/// for all delayed calls.
///
/// A reset only notes the time: it allocates nothing and moves no timer. There is one
/// timer; when it runs, it looks how much time is left. A limit that is dropped has no
/// effect any more. (Twisted: `policies.TimeoutMixin`.)
///
/// # Examples
///
/// An echo that ends when nothing was said for a minute:
///
/// ```
/// use std::time::Duration;
/// use bowline::policies::Timeout;
/// use bowline::{CloseReason, Context, Protocol, Transport};
///
/// #[derive(Default)]
/// struct Polite {
///     patience: Timeout,
/// }
///
/// impl<T: Transport> Protocol<T> for Polite {
///     fn connection_made(&mut self, cx: &mut Context<'_, T>) {
///         self.patience.set(cx, Some(Duration::from_secs(60)));
///     }
///
///     fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
///         self.patience.reset(cx.reactor);
///         cx.transport.write(data);
///     }
///
///     fn connection_lost(&mut self, cx: &mut Context<'_, T>, _: &CloseReason) {
///         self.patience.cancel(cx.reactor);
///     }
/// }
/// ```
#[derive(Default)]
pub struct Timeout {
    state: Rc<State>,
}

type Action = Box<dyn FnMut(&mut Reactor, ConnectionHandle)>;

#[derive(Default)]
struct State {
    /// There while something is limited.
    limit: Cell<Option<Limit>>,
    call: Cell<Option<DelayedCall>>,
    close_within: Cell<Option<Duration>>,
    /// Out while it runs.
    action: RefCell<Option<Action>>,
}

/// The action, while it runs: it may drop the limit, and goes back in the end,
/// when it panics too.
struct RunningAction<'a> {
    place: &'a RefCell<Option<Action>>,
    action: Option<Action>,
}

impl RunningAction<'_> {
    fn call(&mut self, reactor: &mut Reactor, transport: ConnectionHandle) {
        if let Some(action) = &mut self.action {
            action(reactor, transport);
        }
    }
}

impl Drop for RunningAction<'_> {
    fn drop(&mut self) {
        self.place.replace(self.action.take());
    }
}

#[derive(Clone, Copy)]
struct Limit {
    period: Duration,
    since: Instant,
    transport: ConnectionHandle,
}

/// How long what was written may take to leave a connection that is closed: as long
/// as its limit, within these. A peer on the other side of the world has the time to
/// take a last word, and one that takes nothing is gone soon after its limit.
const CLOSE_WITHIN: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(10));

impl Limit {
    fn passed(&self, reactor: &Reactor) -> Duration {
        reactor.now().saturating_duration_since(self.since)
    }

    fn left(&self, reactor: &Reactor) -> Duration {
        self.period.saturating_sub(self.passed(reactor))
    }
}

impl Timeout {
    /// A limit that closes the connection. It is not set yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// A limit that calls `action` with the handle of the transport, outside of any other
    /// callback. It is not set yet. The action can reach the protocol with
    /// `call_protocol`.
    pub fn with_action(action: impl FnMut(&mut Reactor, ConnectionHandle) + 'static) -> Self {
        Self {
            state: Rc::new(State {
                action: RefCell::new(Some(Box::new(action))),
                ..State::default()
            }),
        }
    }

    /// Sets how long written bytes may take to leave when the connection is closed. With
    /// zero it is aborted. This has no effect on a limit with an action.
    #[must_use]
    pub fn close_within(self, within: Duration) -> Self {
        self.state.close_within.set(Some(within));
        self
    }

    /// Sets a limit of `period` from now on. `None` [cancels](Self::cancel) it. Returns
    /// the limit that was set before. (Twisted: `setTimeout`.)
    pub fn set(&mut self, cx: &mut impl AnyContext, period: Option<Duration>) -> Option<Duration> {
        let transport = cx.own_handle();
        let reactor = cx.reactor();
        let Some(period) = period else {
            return self.cancel(reactor);
        };
        let limit = Limit {
            period,
            since: reactor.now(),
            transport,
        };
        let before = self.state.limit.replace(Some(limit));
        let call = self.state.call.get();
        if call.is_none_or(|call| call.reset(reactor, period).is_err()) {
            State::schedule(&self.state, reactor, period);
        }
        before.map(|limit| limit.period)
    }

    /// Begins the period anew, if one is set. (Twisted: `resetTimeout`.)
    #[inline]
    pub fn reset(&mut self, reactor: &Reactor) {
        if let Some(limit) = self.state.limit.get() {
            self.state.limit.set(Some(Limit {
                since: reactor.now(),
                ..limit
            }));
        }
    }

    /// Goes on with a connection that was taken apart and put together again. Call it in
    /// [`connection_reattached`](crate::Protocol::connection_reattached). The time that
    /// has passed meanwhile counts.
    pub fn reattached(&self, cx: &mut impl AnyContext) {
        let Some(limit) = self.state.limit.get() else {
            return;
        };
        self.state.limit.set(Some(Limit {
            transport: cx.own_handle(),
            ..limit
        }));
        if self.state.call.get().is_none() {
            let reactor = cx.reactor();
            State::schedule(&self.state, reactor, limit.left(reactor));
        }
    }

    /// Removes the limit and its timer. Returns the limit that was set.
    pub fn cancel(&mut self, reactor: &mut Reactor) -> Option<Duration> {
        if let Some(call) = self.state.call.take() {
            // It may be what runs.
            let _ = call.cancel(reactor);
        }
        self.state.limit.take().map(|limit| limit.period)
    }

    /// Limits nothing from now on, as [`cancel`](Self::cancel), but keeps the
    /// timer: where there soon is a limit again, that costs nothing.
    pub(crate) fn suspend(&self) {
        self.state.limit.set(None);
    }

    /// The limit that is set. `None` also when its time is over.
    pub fn period(&self) -> Option<Duration> {
        self.state.limit.get().map(|limit| limit.period)
    }
}

impl State {
    fn schedule(state: &Rc<Self>, reactor: &mut Reactor, delay: Duration) {
        let weak = Rc::downgrade(state);
        let call = reactor.call_later(delay, move |reactor| Self::check(&weak, reactor));
        state.call.set(Some(call));
    }

    /// The timer has run: ends the limit, or waits for what is left of it.
    fn check(state: &Weak<Self>, reactor: &mut Reactor) {
        let Some(state) = state.upgrade() else {
            return;
        };
        state.call.set(None);
        let Some(limit) = state.limit.get() else {
            return;
        };
        let left = limit.left(reactor);
        if !left.is_zero() {
            Self::schedule(&state, reactor, left);
            return;
        }
        if reactor.get(limit.transport).is_none() {
            // Taken apart: it goes on if it is put together again.
            return;
        }
        state.limit.set(None);
        let mut running = RunningAction {
            action: state.action.take(),
            place: &state.action,
        };
        if running.action.is_some() {
            running.call(reactor, limit.transport);
        } else if let Some(transport) = reactor.get(limit.transport) {
            let (least, most) = CLOSE_WITHIN;
            let within = state.close_within.get();
            let by_default = limit.period.clamp(least, most);
            transport.lose_connection_within(within.unwrap_or(by_default));
        }
    }
}

impl fmt::Debug for Timeout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Timeout")
            .field("period", &self.period())
            .finish_non_exhaustive()
    }
}
