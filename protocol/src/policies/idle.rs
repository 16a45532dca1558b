//! Connections without traffic.

use std::cell::Cell;
use std::fmt;
use std::rc::{Rc, Weak};
use std::time::{Duration, Instant};

use bowline_reactor::{DelayedCall, Description, Reactor};

use super::wrapper::{Event, Policy, ProtocolWrapper};
use crate::address::Address;
use crate::connection::{AnyConnection, ConnectionHandle};
use crate::context::Context;
use crate::factory::{BuildContext, Factory};
use crate::log;

/// Half an hour, as in Twisted.
const DEFAULT_PERIOD: Duration = Duration::from_secs(1800);

/// How long what was written may take to leave a connection that is closed for
/// want of traffic: its peer is probably gone.
const DEFAULT_CLOSE_WITHIN: Duration = Duration::from_secs(10);

/// How often a connection is looked at, for the traffic that its protocol is
/// not told of. With four, a connection that others write to is closed a
/// quarter of the period late at the most, and an idle one costs next to
/// nothing.
const LOOKS_PER_PERIOD: u32 = 4;

/// Ends connections that have had no traffic for some time. It is a layer around a
/// factory.
///
/// Traffic is everything that the peer sends, everything that is written to it, and
/// everything that the kernel takes of that. So a slow download is not idle. Bytes that
/// wait unread in the kernel, because reading is paused or held, do not count. Nor do empty
/// packets that others send.
///
/// A connection is closed exactly when its period has passed since the last callback with
/// traffic. Some traffic has no callback: writes of others, and bytes that the kernel
/// takes. It is noticed within a quarter of the period, and puts the close off as if it
/// had happened then. If the loop itself was stopped, by a debugger or with its virtual
/// machine, everything that came meanwhile is read before a connection is closed.
/// (Twisted: `policies.TimeoutFactory`.)
///
/// # Examples
///
/// ```
/// use std::time::Duration;
/// use bowline::policies::IdleTimeout;
/// use bowline::{Address, Context, Protocol, Transport};
///
/// struct Echo;
///
/// impl<T: Transport> Protocol<T> for Echo {
///     fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
///         cx.transport.write(data);
///     }
/// }
///
/// let factory = IdleTimeout::new(|_: &Address| Echo).period(Duration::from_secs(60));
/// // reactor.listen_tcp(address, factory)?;
/// # let _ = factory;
/// ```
pub struct IdleTimeout<F> {
    factory: F,
    period: Duration,
    close_within: Duration,
}

impl<F> IdleTimeout<F> {
    /// Ends connections after 1800 s without traffic.
    pub fn new(factory: F) -> Self {
        Self {
            factory,
            period: DEFAULT_PERIOD,
            close_within: DEFAULT_CLOSE_WITHIN,
        }
    }

    /// Sets the time without traffic after which a connection ends; default 1800 s.
    #[must_use]
    pub fn period(mut self, period: Duration) -> Self {
        self.period = period;
        self
    }

    /// Sets how long closing may take, as in
    /// [`lose_connection_within`](AnyConnection::lose_connection_within); default
    /// 10 s.
    #[must_use]
    pub fn close_within(mut self, close_within: Duration) -> Self {
        self.close_within = close_within;
        self
    }
}

impl<F: Factory> Factory for IdleTimeout<F> {
    type Protocol = ProtocolWrapper<F::Protocol, Idle>;

    fn build_protocol(
        &mut self,
        cx: &mut BuildContext<'_>,
        peer: &Address,
    ) -> Option<Self::Protocol> {
        let protocol = self.factory.build_protocol(cx, peer)?;
        let idle = Idle::new(self.period).close_within(self.close_within);
        Some(ProtocolWrapper::new(protocol, idle))
    }

    fn describe(&self, description: &mut Description) {
        description
            .section_of::<Self>()
            .set("period", self.period)
            .set("close_within", self.close_within);
        self.factory.describe(description);
    }

    forward_factory_events!();
}

impl<F> fmt::Debug for IdleTimeout<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IdleTimeout")
            .field("period", &self.period)
            .field("close_within", &self.close_within)
            .finish_non_exhaustive()
    }
}

/// The policy of [`IdleTimeout`], for one connection.
pub struct Idle {
    period: Duration,
    close_within: Duration,
    /// There from the beginning of the connection to its end.
    watch: Option<Rc<IdleWatch>>,
}

/// What the timer looks at.
struct IdleWatch {
    period: Duration,
    close_within: Duration,
    transport: Cell<ConnectionHandle>,
    /// The last traffic that is known of.
    since: Cell<Instant>,
    /// The bytes sent and unsent at the last look.
    written: Cell<(u64, usize)>,
    call: Cell<Option<DelayedCall>>,
}

impl Idle {
    /// Ends its connection after `period` without traffic.
    pub fn new(period: Duration) -> Self {
        Self {
            period,
            close_within: DEFAULT_CLOSE_WITHIN,
            watch: None,
        }
    }

    /// As [`IdleTimeout::close_within`].
    #[must_use]
    pub fn close_within(mut self, close_within: Duration) -> Self {
        self.close_within = close_within;
        self
    }

    fn begin<T: AnyConnection + ?Sized>(&mut self, cx: &mut Context<'_, T>) {
        let watch = Rc::new(IdleWatch {
            period: self.period,
            close_within: self.close_within,
            transport: Cell::new(cx.transport.connection_handle()),
            since: Cell::new(cx.reactor.now()),
            written: Cell::new(written(cx.transport)),
            call: Cell::new(None),
        });
        IdleWatch::schedule(&watch, cx.reactor, self.period);
        self.watch = Some(watch);
    }

    fn reattached<T: AnyConnection + ?Sized>(&self, cx: &mut Context<'_, T>) {
        if let Some(watch) = &self.watch {
            watch.transport.set(cx.transport.connection_handle());
            if watch.call.get().is_none() {
                // It ran meanwhile, and found nobody.
                IdleWatch::schedule(watch, cx.reactor, Duration::ZERO);
            }
        }
    }

    fn end(&mut self, reactor: &mut Reactor) {
        if let Some(watch) = self.watch.take()
            && let Some(call) = watch.call.take()
        {
            // It may have run.
            let _ = call.cancel(reactor);
        }
    }
}

impl<T: AnyConnection + ?Sized> Policy<T> for Idle {
    fn describe(&self, description: &mut Description) {
        description
            .section_of::<Self>()
            .set("period", self.period)
            .set("close_within", self.close_within);
    }

    fn before(&mut self, cx: &mut Context<'_, T>, event: &Event<'_>) {
        match event {
            Event::ConnectionMade => self.begin(cx),
            Event::ConnectionReattached => self.reattached(cx),
            Event::ConnectionLost(_) => self.end(cx.reactor),
            _ => {}
        }
    }

    #[inline]
    fn after(&mut self, cx: &mut Context<'_, T>, event: &Event<'_>) {
        if let Some(watch) = &self.watch {
            let written = written(cx.transport);
            // That reading goes on is no traffic yet, nor that none is to come.
            let is_traffic = !matches!(
                event,
                Event::ReadingResumed | Event::ConnectionBroken(_) | Event::ConnectionReattached
            );
            if watch.written.replace(written) != written || is_traffic {
                watch.since.set(cx.reactor.now());
            }
        }
    }
}

impl IdleWatch {
    /// Looks again when `left` is over, and now and then before.
    fn schedule(watch: &Rc<Self>, reactor: &mut Reactor, left: Duration) {
        let weak = Rc::downgrade(watch);
        let delay = left.min(watch.period / LOOKS_PER_PERIOD);
        let call = reactor.call_later(delay, move |reactor| Self::look(&weak, reactor));
        watch.call.set(Some(call));
    }

    fn look(watch: &Weak<Self>, reactor: &mut Reactor) {
        let Some(watch) = watch.upgrade() else {
            return;
        };
        watch.call.set(None);
        let now = reactor.now();
        let Some(transport) = reactor.get(watch.transport.get()) else {
            return;
        };
        let written = written(transport);
        if watch.written.replace(written) != written {
            watch.since.set(now);
        }
        let passed = now.saturating_duration_since(watch.since.get());
        match watch.period.checked_sub(passed) {
            Some(left) if !left.is_zero() => Self::schedule(&watch, reactor, left),
            _ => {
                log::debug!(
                    target: log::TRANSPORT,
                    "{}: no traffic with {} for {:?}: closing",
                    watch.transport.get().token(),
                    transport.peer(),
                    watch.period
                );
                transport.lose_connection_within(watch.close_within);
            }
        }
    }
}

fn written<T: AnyConnection + ?Sized>(transport: &T) -> (u64, usize) {
    (transport.bytes_sent(), transport.unsent_bytes())
}

impl fmt::Debug for Idle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Idle")
            .field("period", &self.period)
            .field("close_within", &self.close_within)
            .finish_non_exhaustive()
    }
}
