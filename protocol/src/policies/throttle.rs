//! Limits on the speed at which peers are read.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::fmt;
use std::num::NonZeroU64;
use std::rc::{Rc, Weak};
use std::time::{Duration, Instant};

use bowline_reactor::{DelayedCall, Description, Reactor};

use super::wrapper::{Event, Policy, ProtocolWrapper};
use crate::address::Address;
use crate::connection::{AnyConnection, ConnectionHandle};
use crate::context::Context;
use crate::factory::{BuildContext, Factory};
use crate::log;

/// A number of bytes per second, and how many of them may be read at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// How much is read on average, at the most.
    pub bytes_per_second: NonZeroU64,
    /// How many bytes are saved up while less is read. As many may be read at once.
    pub burst: u64,
}

impl Rate {
    /// So many bytes per second. The bytes of one second may be read at once.
    pub fn per_second(bytes_per_second: NonZeroU64) -> Self {
        Self {
            bytes_per_second,
            burst: bytes_per_second.get(),
        }
    }

    /// Sets how many bytes may be read at once.
    #[must_use]
    pub fn burst(mut self, burst: u64) -> Self {
        self.burst = burst;
        self
    }

    /// How long it takes to read so many bytes.
    fn time_for(self, bytes: u64) -> Duration {
        let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(self.bytes_per_second.get());
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }
}

/// A token bucket, kept as the moment at which it would be full again: nothing
/// is added up, so nothing drifts.
#[derive(Clone, Copy, Debug)]
struct Bucket {
    rate: Rate,
    /// `None` until something was taken.
    full_at: Option<Instant>,
}

impl Bucket {
    /// Takes `bytes`, beyond what is there if need be.
    fn take(&mut self, now: Instant, bytes: usize) {
        let from = self.full_at.map_or(now, |full_at| full_at.max(now));
        let time = self.rate.time_for(bytes as u64);
        self.full_at = Some(from.checked_add(time).unwrap_or(from));
    }

    /// How long until it is out of debt; zero when something may be taken.
    fn wait(&self, now: Instant) -> Duration {
        let to_full = self.full_at.map_or(Duration::ZERO, |full_at| {
            full_at.saturating_duration_since(now)
        });
        to_full.saturating_sub(self.rate.time_for(self.rate.burst))
    }
}

/// A token bucket, and the connections that wait for it. A clone is the same bucket.
///
/// A connection under a throttle is [`Throttled`]. All connections under one throttle
/// share its rate. For separate rates, make one throttle for each connection.
#[derive(Clone)]
pub struct Throttle {
    shared: Rc<Shared>,
}

struct Shared {
    bucket: Cell<Bucket>,
    /// Those that wait, and whether they do.
    held: RefCell<BTreeMap<ConnectionHandle, Rc<Cell<bool>>>>,
    call: Cell<Option<DelayedCall>>,
}

impl Throttle {
    /// A throttle. At first, as much is saved up as `rate` allows.
    pub fn new(rate: Rate) -> Self {
        Self {
            shared: Rc::new(Shared {
                bucket: Cell::new(Bucket {
                    rate,
                    full_at: None,
                }),
                held: RefCell::default(),
                call: Cell::new(None),
            }),
        }
    }

    /// The policy for one more connection under this throttle.
    pub fn throttled(&self) -> Throttled {
        Throttled {
            throttle: self.clone(),
            held_as: None,
            is_held: Rc::default(),
        }
    }

    /// How many connections are held at present.
    pub fn held(&self) -> usize {
        self.shared.held.borrow().len()
    }
}

impl Shared {
    fn schedule(shared: &Rc<Self>, reactor: &mut Reactor, wait: Duration) {
        let weak = Rc::downgrade(shared);
        let call = reactor.call_later(wait, move |reactor| Self::refilled(&weak, reactor));
        shared.call.set(Some(call));
    }

    /// The wait is over, unless more was taken meanwhile.
    fn refilled(shared: &Weak<Self>, reactor: &mut Reactor) {
        let Some(shared) = shared.upgrade() else {
            return;
        };
        shared.call.set(None);
        let wait = shared.bucket.get().wait(reactor.now());
        if !wait.is_zero() {
            Self::schedule(&shared, reactor, wait);
            return;
        }
        let held = shared.held.take();
        log::debug!(
            target: log::TRANSPORT,
            "throttling ends: {} connections are read again",
            held.len()
        );
        for (handle, is_held) in held {
            // One that was taken apart is held still if it comes back.
            if let Some(transport) = reactor.get(handle) {
                is_held.set(false);
                transport.release_reading();
            }
        }
    }
}

/// The policy for one connection under a [`Throttle`].
pub struct Throttled {
    throttle: Throttle,
    /// Under which name it was held last.
    held_as: Option<ConnectionHandle>,
    is_held: Rc<Cell<bool>>,
}

impl Throttled {
    fn account<T: AnyConnection + ?Sized>(&mut self, cx: &mut Context<'_, T>, bytes: usize) {
        let shared = &self.throttle.shared;
        let now = cx.reactor.now();
        let mut bucket = shared.bucket.get();
        bucket.take(now, bytes);
        shared.bucket.set(bucket);
        let wait = bucket.wait(now);
        if wait.is_zero() || self.is_held.replace(true) {
            return;
        }
        cx.transport.hold_reading();
        let handle = cx.transport.connection_handle();
        self.held_as = Some(handle);
        let is_held = Rc::clone(&self.is_held);
        shared.held.borrow_mut().insert(handle, is_held);
        // One line for all that are held together.
        if shared.call.get().is_none() {
            log::debug!(
                target: log::TRANSPORT,
                "throttling: {} is not read for {:.3} seconds, nor who comes after it",
                cx.transport.peer(),
                wait.as_secs_f64()
            );
            Shared::schedule(shared, cx.reactor, wait);
        }
    }

    /// Waits on under its new name, or not, if the wait ended meanwhile.
    fn reattached<T: AnyConnection + ?Sized>(&mut self, cx: &mut Context<'_, T>) {
        if !self.is_held.get() {
            return;
        }
        let handle = cx.transport.connection_handle();
        let earlier = self.held_as.replace(handle);
        let mut held = self.throttle.shared.held.borrow_mut();
        match earlier.and_then(|earlier| held.remove(&earlier)) {
            Some(is_held) => {
                held.insert(handle, is_held);
            }
            None => {
                self.is_held.set(false);
                cx.transport.release_reading();
            }
        }
    }

    fn end<T: AnyConnection + ?Sized>(&self, cx: &mut Context<'_, T>) {
        let shared = &self.throttle.shared;
        let mut held = shared.held.borrow_mut();
        if held.remove(&cx.transport.connection_handle()).is_some()
            && held.is_empty()
            && let Some(call) = shared.call.take()
        {
            log::debug!(target: log::TRANSPORT, "throttling ends: no connection is left");
            // It may have run.
            let _ = call.cancel(cx.reactor);
        }
    }
}

impl<T: AnyConnection + ?Sized> Policy<T> for Throttled {
    fn describe(&self, description: &mut Description) {
        let rate = self.throttle.shared.bucket.get().rate;
        description
            .section_of::<Self>()
            .set("bytes_per_second", rate.bytes_per_second.get())
            .set("held", self.is_held.get());
    }

    #[inline]
    fn before(&mut self, cx: &mut Context<'_, T>, event: &Event<'_>) {
        match event {
            // One that comes while others wait, waits with them.
            Event::ConnectionMade => self.account(cx, 0),
            Event::DataReceived(_)
            | Event::PacketReceived { .. }
            | Event::DescriptorsReceived { .. } => self.account(cx, event.received_bytes()),
            Event::ConnectionReattached => self.reattached(cx),
            Event::ConnectionLost(_) => self.end(cx),
            _ => {}
        }
    }
}

impl fmt::Debug for Throttle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Throttle")
            .field("rate", &self.shared.bucket.get().rate)
            .field("held", &self.held())
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Throttled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Throttled")
            .field("throttle", &self.throttle)
            .field("is_held", &self.is_held.get())
            .finish()
    }
}

/// Limits how fast peers are read: each connection, all of them together, or both. It is
/// a layer around a factory, with no limit unless one is set.
///
/// A connection that has used up its bytes is not read until there are some again. Bytes
/// of the peer wait in the kernel, and so does the peer. The protocol does not notice the
/// hold ([`hold_reading`](AnyConnection::hold_reading)), and may pause and resume reading as
/// it likes.
///
/// Reads are not cut short. The read that uses up the last bytes may take more than is
/// left, up to 64 KiB by default. So may one read of every other connection under the
/// same limit. The wait afterwards is as much longer, so the average holds. Descriptors
/// are not counted. (Twisted: `policies.ThrottlingFactory`.)
///
/// # Examples
///
/// ```
/// use std::num::NonZeroU64;
/// use bowline::policies::{Rate, ThrottleReading};
/// use bowline::{Address, Context, Protocol, Transport};
///
/// struct Upload;
///
/// impl<T: Transport> Protocol<T> for Upload {
///     fn data_received(&mut self, _: &mut Context<'_, T>, _: &[u8]) {}
/// }
///
/// let megabyte = NonZeroU64::new(1_000_000).expect("not zero");
/// let factory = ThrottleReading::new(|_: &Address| Upload)
///     .total(Some(Rate::per_second(megabyte)))
///     .per_connection(Some(Rate::per_second(megabyte).burst(65_536)));
/// // reactor.listen_tcp(address, factory)?;
/// # let _ = factory;
/// ```
pub struct ThrottleReading<F> {
    factory: F,
    total: Option<Throttle>,
    per_connection: Option<Rate>,
}

impl<F> ThrottleReading<F> {
    /// Limits nothing yet.
    pub fn new(factory: F) -> Self {
        Self {
            factory,
            total: None,
            per_connection: None,
        }
    }

    /// Sets the rate for all connections together. `None`, the default, does not limit it.
    #[must_use]
    pub fn total(mut self, rate: Option<Rate>) -> Self {
        self.total = rate.map(Throttle::new);
        self
    }

    /// As [`total`](Self::total), but with a throttle that is shared with others.
    #[must_use]
    pub fn under(mut self, throttle: &Throttle) -> Self {
        self.total = Some(throttle.clone());
        self
    }

    /// Sets the rate for each connection. `None`, the default, does not limit it.
    #[must_use]
    pub fn per_connection(mut self, rate: Option<Rate>) -> Self {
        self.per_connection = rate;
        self
    }
}

impl<F: Factory> Factory for ThrottleReading<F> {
    type Protocol = ProtocolWrapper<F::Protocol, (Option<Throttled>, Option<Throttled>)>;

    fn build_protocol(
        &mut self,
        cx: &mut BuildContext<'_>,
        peer: &Address,
    ) -> Option<Self::Protocol> {
        let protocol = self.factory.build_protocol(cx, peer)?;
        let total = self.total.as_ref().map(Throttle::throttled);
        let own = self
            .per_connection
            .map(|rate| Throttle::new(rate).throttled());
        Some(ProtocolWrapper::new(protocol, (total, own)))
    }

    fn describe(&self, description: &mut Description) {
        let rate = |rate: Rate| rate.bytes_per_second.get();
        let total = self.total.as_ref().map(|it| it.shared.bucket.get().rate);
        description
            .section_of::<Self>()
            .set_some("total_bytes_per_second", total.map(rate))
            .set_some("bytes_per_second_each", self.per_connection.map(rate));
        self.factory.describe(description);
    }

    forward_factory_events!();
}

impl<F> fmt::Debug for ThrottleReading<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ThrottleReading")
            .field("total", &self.total)
            .field("per_connection", &self.per_connection)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use bowline_reactor::{Clock, SystemClock};
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Against a bucket that counts tokens: nothing is given out too early,
        /// and nothing later than rounding explains.
        #[test]
        fn bucket_keeps_the_rate(
            rate in 1..100_000u64,
            burst in 0..100_000u64,
            steps in proptest::collection::vec((0..5_000_000u64, 0..70_000usize), 1..50),
        ) {
            let rate = Rate {
                bytes_per_second: NonZeroU64::new(rate).unwrap(),
                burst,
            };
            let mut bucket = Bucket { rate, full_at: None };
            let mut now = SystemClock.now();
            let per_second = rate.bytes_per_second.get() as f64;
            let mut tokens = burst as f64;
            for (micros, bytes) in steps {
                let passed = Duration::from_micros(micros);
                now += passed;
                tokens = (tokens + passed.as_secs_f64() * per_second).min(burst as f64);
                bucket.take(now, bytes);
                tokens -= bytes as f64;
                let expected = (-tokens / per_second).max(0.0);
                let wait = bucket.wait(now).as_secs_f64();
                prop_assert!((wait - expected).abs() < 1e-3, "{wait} for {expected}");
            }
        }
    }
}
