//! Connecting again.

use std::borrow::Cow;
use std::cell::RefCell;
use std::fmt;
use std::rc::Rc;
use std::time::{Duration, Instant};

use bowline_reactor::{Description, Reactor};

use super::backoff::Backoff;
use crate::address::Address;
use crate::error::ConnectError;
use crate::factory::{BuildContext, ConnectorHandle, ConnectorState, Factory};
use crate::log;
use crate::reason::CloseReason;

/// How long a connection has to last, unless set otherwise, to count as a
/// success: a server that dies of every client is not one that is back.
const DEFAULT_SETTLED: Duration = Duration::from_secs(10);

/// Makes a connector try again after each failed attempt and each lost connection, with
/// growing waits ([`Backoff`]). It is a layer around the factory of *one* connector.
///
/// By default it goes on for ever, whoever closed the connection. It ends
///
/// - by [`Reconnection::stop_trying`],
/// - after [`max_retries`](Self::max_retries) in a row,
/// - by [`stop_connecting`](crate::Connector::stop_connecting) while there is no
///   connection, which includes the inner factory's `connection_failed` and
///   `connection_lost`,
/// - and with the reactor.
///
/// Then [`Factory::stopped`] follows.
///
/// The waits begin anew after a connection that lasted for
/// [`settled_after`](Self::settled_after), and by [`Reconnection::reset_delay`]. If the
/// inner factory itself asks for an attempt, the attempt after the wait replaces it.
/// (Twisted: `ReconnectingClientFactory`.)
///
/// # Examples
///
/// ```
/// use std::time::Duration;
/// use bowline::policies::{Backoff, Reconnecting};
/// use bowline::{Address, Context, Protocol, Transport};
///
/// struct Client;
///
/// impl<T: Transport> Protocol<T> for Client {
///     fn data_received(&mut self, _: &mut Context<'_, T>, _: &[u8]) {}
/// }
///
/// let factory = Reconnecting::new(|_: &Address| Client)
///     .backoff(Backoff::new().cap(Duration::from_secs(20)))
///     .max_retries(Some(50));
/// let reconnection = factory.reconnection();
/// // reactor.connect_tcp(address, factory)?;
/// assert_eq!(reconnection.retries(), 0);
/// ```
pub struct Reconnecting<F> {
    factory: F,
    max_retries: Option<u32>,
    settled_after: Duration,
    connected_at: Option<Instant>,
    reconnection: Reconnection,
}

/// Controls a [`Reconnecting`]. For the protocols of its connections, or for whoever else
/// decides. A clone controls the same one.
#[derive(Clone)]
pub struct Reconnection {
    state: Rc<RefCell<State>>,
}

struct State {
    backoff: Backoff,
    stage: RetryStage,
    connector: Option<ConnectorHandle>,
}

/// Whether it goes on, and if not, why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum RetryStage {
    Trying,
    /// Somebody asked for it.
    Stopped,
    /// There were as many retries as allowed.
    Spent,
    ReactorStopped,
}

impl<F> Reconnecting<F> {
    /// Tries again for ever, with the waits of [`Backoff::new`].
    pub fn new(factory: F) -> Self {
        Self {
            factory,
            max_retries: None,
            settled_after: DEFAULT_SETTLED,
            connected_at: None,
            reconnection: Reconnection {
                state: Rc::new(RefCell::new(State {
                    backoff: Backoff::new(),
                    stage: RetryStage::Trying,
                    connector: None,
                })),
            },
        }
    }

    /// Sets the waits.
    #[must_use]
    pub fn backoff(self, backoff: Backoff) -> Self {
        self.reconnection.state.borrow_mut().backoff = backoff;
        self
    }

    /// Sets how many retries in a row there are before it gives up. `None`, the default,
    /// never gives up. Zero tries once.
    #[must_use]
    pub fn max_retries(mut self, retries: Option<u32>) -> Self {
        self.max_retries = retries;
        self
    }

    /// Sets how long a connection has to last to count as a success; default 10 s. Then
    /// the waits begin anew, and the retries before it are forgotten.
    #[must_use]
    pub fn settled_after(mut self, settled_after: Duration) -> Self {
        self.settled_after = settled_after;
        self
    }

    /// The handle that controls it.
    pub fn reconnection(&self) -> Reconnection {
        self.reconnection.clone()
    }

    /// Asks for the next attempt, unless it is over.
    fn retry(&self, cx: &mut BuildContext<'_>) {
        let Some(connector) = cx.connector() else {
            return;
        };
        let destination = connector.destination();
        let mut state = self.reconnection.state.borrow_mut();
        if state.stage == RetryStage::Trying && connector.was_told_to_stop() {
            state.stage = RetryStage::Stopped;
        }
        if state.stage != RetryStage::Trying {
            // The inner factory may have asked for more.
            connector.stop_connecting();
            return;
        }
        let retries = state.backoff.retries();
        if self.max_retries.is_some_and(|most| retries >= most) {
            log::warn!(
                target: log::TRANSPORT,
                "{destination}: reconnecting abandoned after {retries} retries"
            );
            state.stage = RetryStage::Spent;
            connector.stop_connecting();
            return;
        }
        let wait = state.backoff.next_wait();
        log::debug!(
            target: log::TRANSPORT,
            "{destination}: will retry in {:.3} seconds",
            wait.as_secs_f64()
        );
        connector.connect_after(wait);
    }

    /// Goes on no more, for this reason unless there is one already.
    fn give_up(&self, stage: RetryStage) {
        let mut state = self.reconnection.state.borrow_mut();
        if state.stage == RetryStage::Trying {
            state.stage = stage;
        }
    }
}

impl Reconnection {
    /// Tries no more. Ends the present wait or attempt. An established connection goes
    /// on, and nothing follows after its end. This cannot be undone.
    pub fn stop_trying(&self, reactor: &mut Reactor) {
        let connector = {
            let mut state = self.state.borrow_mut();
            if state.stage == RetryStage::Trying {
                state.stage = RetryStage::Stopped;
            }
            state.connector
        };
        if let Some(connector) = connector.and_then(|handle| reactor.get(handle))
            && connector.state() != ConnectorState::Connected
        {
            connector.stop_connecting();
        }
    }

    /// Begins the waits anew with the next one, and forgets the retries so far. The
    /// present wait does not change. If it was stopped, it stays stopped.
    pub fn reset_delay(&self) {
        self.state.borrow_mut().backoff.reset();
    }

    /// How many retries there were since the last success. A retry that is being waited
    /// for is counted.
    pub fn retries(&self) -> u32 {
        self.state.borrow().backoff.retries()
    }

    /// Whether another attempt follows the next failure or loss, as far as is known.
    /// False once it was stopped or has given up.
    pub fn is_trying(&self) -> bool {
        self.state.borrow().stage == RetryStage::Trying
    }
}

impl<F: Factory> Factory for Reconnecting<F> {
    type Protocol = F::Protocol;

    fn build_protocol(
        &mut self,
        cx: &mut BuildContext<'_>,
        peer: &Address,
    ) -> Option<Self::Protocol> {
        let protocol = self.factory.build_protocol(cx, peer)?;
        self.connected_at = Some(cx.reactor.now());
        Some(protocol)
    }

    fn started(&mut self, cx: &mut BuildContext<'_>) {
        if let Some(connector) = cx.connector() {
            let handle = connector.handle();
            self.reconnection.state.borrow_mut().connector = Some(handle);
        }
        self.factory.started(cx);
        if !self.reconnection.is_trying()
            && let Some(connector) = cx.connector()
        {
            // Stopped by the callback, which cannot reach the connector by its
            // handle.
            connector.stop_connecting();
        }
    }

    fn connection_failed(&mut self, cx: &mut BuildContext<'_>, error: &ConnectError) {
        self.connected_at = None;
        match error {
            ConnectError::Cancelled => self.give_up(RetryStage::Stopped),
            ConnectError::ReactorStopped => self.give_up(RetryStage::ReactorStopped),
            _ => {}
        }
        self.factory.connection_failed(cx, error);
        self.retry(cx);
    }

    fn connection_lost(&mut self, cx: &mut BuildContext<'_>, reason: &CloseReason) {
        let connected_at = self.connected_at.take();
        if connected_at.is_some_and(|since| {
            cx.reactor.now().saturating_duration_since(since) >= self.settled_after
        }) {
            self.reconnection.reset_delay();
        }
        if matches!(reason, CloseReason::ReactorStopped) {
            self.give_up(RetryStage::ReactorStopped);
        }
        self.factory.connection_lost(cx, reason);
        self.retry(cx);
    }

    fn stopped(&mut self, cx: &mut BuildContext<'_>) {
        // Still trying: the wait was given up, at the connector, or by the end.
        self.give_up(match cx.reactor.is_stopping() {
            true => RetryStage::ReactorStopped,
            false => RetryStage::Stopped,
        });
        if self.reconnection.state.borrow().stage == RetryStage::Stopped
            && let Some(connector) = cx.connector()
        {
            log::debug!(
                target: log::TRANSPORT,
                "{}: reconnecting abandoned on request",
                connector.destination()
            );
        }
        self.factory.stopped(cx);
    }

    fn describe(&self, description: &mut Description) {
        let state = self.reconnection.state.borrow();
        let stage = match state.stage {
            RetryStage::Trying => "trying",
            RetryStage::Stopped => "stopped",
            RetryStage::Spent => "given up",
            RetryStage::ReactorStopped => "reactor stopped",
        };
        description
            .section_of::<Self>()
            .set("stage", stage)
            .set("retries", state.backoff.retries())
            .set_some("max_retries", self.max_retries)
            .set("settled_after", self.settled_after);
        drop(state);
        self.factory.describe(description);
    }

    fn log_prefix(&self) -> Cow<'_, str> {
        self.factory.log_prefix()
    }
}

impl<F> fmt::Debug for Reconnecting<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reconnecting")
            .field("max_retries", &self.max_retries)
            .field("settled_after", &self.settled_after)
            .field("reconnection", &self.reconnection)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Reconnection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.state.borrow();
        f.debug_struct("Reconnection")
            .field("stage", &state.stage)
            .field("backoff", &state.backoff)
            .finish_non_exhaustive()
    }
}
