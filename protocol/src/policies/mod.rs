//! Layers around protocols and factories: trying again, time limits, limits of
//! connections and of bytes.
//!
//! Each is a [`Factory`](crate::Factory) around another one, which knows nothing of it.
//! They can be nested in any order. They hand on everything that a transport tells a
//! protocol: descriptors, truncation, half-closes, the calls of a producer. If the inner
//! factory declines a connection, it is declined. They serve streams and connections of
//! packets alike.
//!
//! | To | use |
//! |---|---|
//! | connect again after a failure or loss | [`Reconnecting`] |
//! | end connections without traffic | [`IdleTimeout`] |
//! | have a time limit in a protocol of your own | [`Timeout`] |
//! | bound how many connections there are, in all or from one peer | [`LimitConnections`] |
//! | bound how many peers have not logged in yet, and for how long | [`LimitHandshakes`] |
//! | bound how fast peers are read | [`ThrottleReading`] |
//! | log everything that is received and written | [`TrafficLog`] |
//! | write another policy | [`Policy`], [`ProtocolWrapper`] |
//!
//! They take the time from the reactor, so tests can move a clock by hand.

/// The events of a factory that a layer hands on as they are.
macro_rules! forward_factory_events {
    () => {
        fn started(&mut self, cx: &mut $crate::BuildContext<'_>) {
            self.factory.started(cx);
        }

        fn connection_failed(
            &mut self,
            cx: &mut $crate::BuildContext<'_>,
            error: &$crate::ConnectError,
        ) {
            self.factory.connection_failed(cx, error);
        }

        fn connection_lost(
            &mut self,
            cx: &mut $crate::BuildContext<'_>,
            reason: &$crate::CloseReason,
        ) {
            self.factory.connection_lost(cx, reason);
        }

        fn stopped(&mut self, cx: &mut $crate::BuildContext<'_>) {
            self.factory.stopped(cx);
        }

        fn log_prefix(&self) -> std::borrow::Cow<'_, str> {
            self.factory.log_prefix()
        }
    };
}

mod backoff;
mod handshake;
mod idle;
mod limit;
mod reconnecting;
mod throttle;
mod timeout;
mod traffic;
mod wrapper;

pub use self::backoff::{Backoff, Jitter};
pub use self::handshake::{Handshake, HandshakeCount, Handshaking, LimitHandshakes};
pub use self::idle::{Idle, IdleTimeout};
pub use self::limit::{ConnectionCount, Counted, LimitConnections};
pub use self::reconnecting::{Reconnecting, Reconnection};
pub use self::throttle::{Rate, Throttle, ThrottleReading, Throttled};
pub use self::timeout::Timeout;
pub use self::traffic::{Traffic, TrafficLog};
pub use self::wrapper::{Event, Policy, ProtocolWrapper};
