//! Stopping: at once, or after waiting for what is in work.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::{Reactor, State};
use crate::delayed_call::DelayedCall;
use crate::error::ReactorError;
use crate::log;
use crate::token::Token;
use crate::triggers::{Phase, SystemEvent};

/// How long a graceful stop waits, unless said otherwise: what pools and
/// restarts allow too, and the least that supervisors in wide use do before they
/// kill (Kubernetes 30 s, systemd 90 s), `docker stop` with its 10 s excepted.
const DEADLINE: Duration = Duration::from_secs(30);

/// For how long a connection has to be quiet, unless said otherwise. A client
/// that is at work sends its next request sooner, and then learns from the
/// answer that it is the last one.
const GRACE: Duration = Duration::from_millis(500);

/// How a [graceful stop](Reactor::stop_gracefully) waits.
///
/// # Examples
///
/// ```
/// use std::time::Duration;
/// use bowline_reactor::{GracefulStop, Reactor};
///
/// let mut reactor = Reactor::new()?;
/// reactor.call_soon(|reactor| {
///     let how = GracefulStop::new().deadline(Duration::from_secs(8));
///     reactor.stop_gracefully(how).expect("it runs: this is one of its callbacks");
/// });
/// reactor.run()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GracefulStop {
    deadline: Duration,
    grace: Duration,
}

impl GracefulStop {
    /// The defaults: 30 s at the most, and 500 ms of quiet.
    pub fn new() -> Self {
        Self {
            deadline: DEADLINE,
            grace: GRACE,
        }
    }

    /// How long the stop takes at the most; default 30 s. What has not ended by
    /// then is cut. Choose less than your supervisor waits before it kills.
    #[must_use]
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// How long a connection has to be quiet before it counts as idle; default
    /// 500 ms.
    ///
    /// A client may have sent its next request when the connection closes, and
    /// cannot know whether it was heard. Within the grace it is answered. Zero
    /// closes what is idle as soon as there is nothing to be read.
    #[must_use]
    pub fn grace(mut self, grace: Duration) -> Self {
        self.grace = grace;
        self
    }
}

impl Default for GracefulStop {
    fn default() -> Self {
        Self::new()
    }
}

/// The rounds of a graceful stop, in order: each begins when what was waited for
/// in the one before has ended; see [`Descriptor::drain`](crate::Descriptor::drain).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum DrainRound {
    /// What takes in new work ends: listeners.
    Intake,
    /// What serves somebody finishes: connections that were accepted or adopted.
    Work,
    /// What that may have needed until now finishes: outgoing connections.
    Support,
}

impl DrainRound {
    fn next(self) -> Option<Self> {
        match self {
            Self::Intake => Some(Self::Work),
            Self::Work => Some(Self::Support),
            Self::Support => None,
        }
    }
}

/// What the reactor knows of its stop.
#[derive(Default)]
pub(super) struct Stopping {
    graceful: Option<Graceful>,
    /// The triggers of the first phase have run.
    has_fired: bool,
    /// Nobody is waited for any more.
    is_cut: bool,
}

/// A graceful stop, from the call that asked for it on.
struct Graceful {
    grace: Duration,
    until: Instant,
    /// What ends it then.
    deadline: DelayedCall,
    round: DrainRound,
    has_begun: bool,
    /// Those that have to be told of the round yet.
    untold: VecDeque<Token>,
}

impl Reactor {
    /// Ends the loop in an orderly way: the shutdown triggers run, every
    /// descriptor is disconnected, and [`run`](Self::run) returns.
    ///
    /// Only [holds](Self::hold) are waited for. What connections have not sent
    /// is dropped; [`stop_gracefully`](Self::stop_gracefully) waits for it.
    /// Returns before any of that has happened. (Twisted: `reactor.stop`.)
    ///
    /// # Errors
    ///
    /// [`ReactorError::NotRunning`] when the reactor was not started, or has
    /// stopped. That it is stopping already is no error: it does what was asked,
    /// or, in a [graceful stop](Self::stop_gracefully), waits before it does;
    /// [`stop_now`](Self::stop_now) has it not wait.
    pub fn stop(&mut self) -> Result<(), ReactorError> {
        match self.state {
            State::Starting | State::Running => {
                self.state = State::StopAsked;
                Ok(())
            }
            State::StopAsked | State::Stopping => Ok(()),
            State::Idle => Err(ReactorError::NotRunning),
        }
    }

    /// Ends the loop when what is in work is done, as a server has to that is
    /// replaced by another one.
    ///
    /// 1. Listeners close, after having accepted who waits in their queues (a
    ///    queue that other processes have too is left to them).
    /// 2. The [`Before`](crate::Phase::Before) triggers of the shutdown run.
    /// 3. Connections that were accepted or adopted are told to
    ///    [drain](crate::Descriptor::drain), and waited for.
    /// 4. When they have ended, and nobody [holds](Self::hold) the shutdown,
    ///    outgoing connections are told: the others may have needed them.
    /// 5. When these have ended too, it goes on as in [`stop`](Self::stop).
    ///
    /// At the [deadline](GracefulStop::deadline) it goes on at once: what is
    /// still there is cut, which a warning tells and
    /// [`Statistics::cut`](crate::Statistics::cut) counts. So does
    /// [`stop_now`](Self::stop_now) before.
    ///
    /// Called again, it takes the shorter of two deadlines and of two graces.
    /// Called while the reactor [stops](Self::stop) and somebody holds that, it
    /// makes a graceful stop of it. Returns before any of that has happened.
    ///
    /// # Errors
    ///
    /// [`ReactorError::NotRunning`] when the reactor was not started.
    pub fn stop_gracefully(&mut self, how: GracefulStop) -> Result<(), ReactorError> {
        if self.state == State::Idle {
            return Err(ReactorError::NotRunning);
        }
        let until = self.deadline_after(how.deadline);
        if let Some(graceful) = &mut self.stopping.graceful {
            graceful.grace = graceful.grace.min(how.grace);
            if until >= graceful.until {
                return Ok(());
            }
            graceful.until = until;
            let deadline = graceful.deadline;
            // It may be what runs.
            let _ = deadline.reset(self, how.deadline);
            return Ok(());
        }
        log::debug!(
            target: log::REACTOR,
            "stopping gracefully, within {:?}",
            how.deadline
        );
        let deadline = self.call_later(how.deadline, |reactor| reactor.stopping.is_cut = true);
        self.stopping.graceful = Some(Graceful {
            grace: how.grace,
            until,
            deadline,
            round: DrainRound::Intake,
            has_begun: false,
            untold: VecDeque::new(),
        });
        match self.state {
            State::Stopping => self.begin_draining(),
            _ => self.state = State::StopAsked,
        }
        Ok(())
    }

    /// Ends the loop in an orderly way and waits for nobody, not for
    /// [holds](Self::hold) either: the way to cut a stop short that has begun.
    ///
    /// The triggers run, every descriptor is told and removed, and
    /// [`run`](Self::run) returns, at the end of this turn.
    ///
    /// # Errors
    ///
    /// [`ReactorError::NotRunning`] when the reactor was not started.
    pub fn stop_now(&mut self) -> Result<(), ReactorError> {
        match self.state {
            State::Idle => return Err(ReactorError::NotRunning),
            State::Starting | State::Running => self.state = State::StopAsked,
            State::StopAsked | State::Stopping => {}
        }
        self.stopping.is_cut = true;
        Ok(())
    }

    /// Whether the reactor was asked to stop, in whichever way, and has not
    /// stopped yet. A protocol says the last word of its connection then:
    /// `Connection: close`, for one.
    pub fn is_stopping(&self) -> bool {
        matches!(self.state, State::StopAsked | State::Stopping)
    }

    /// When a [graceful stop](Self::stop_gracefully) cuts what is left; `None`
    /// if none was asked for.
    pub fn stop_deadline(&self) -> Option<Instant> {
        self.stopping
            .graceful
            .as_ref()
            .map(|graceful| graceful.until)
    }

    // For descriptors.

    /// How long a connection has to be quiet in the present
    /// [graceful stop](Self::stop_gracefully); zero outside of one.
    pub fn stop_grace(&self) -> Duration {
        self.stopping
            .graceful
            .as_ref()
            .map_or(Duration::ZERO, |graceful| graceful.grace)
    }

    /// Has a [graceful stop](Self::stop_gracefully) wait until the descriptor
    /// `token` is removed. Nothing happens if it is gone.
    pub fn await_end(&mut self, token: Token) {
        self.slots.set_awaited(token, true);
    }

    /// Takes back [`await_end`](Self::await_end).
    pub fn await_no_more(&mut self, token: Token) {
        self.slots.set_awaited(token, false);
    }

    // The steps of a stop.

    /// What callbacks asked for while the reactor stopped already, or a crash left
    /// behind, is nothing to the next run.
    pub(super) fn forget_stop(&mut self) {
        self.stopping.is_cut = false;
        self.stopping.has_fired = false;
        self.end_waiting();
    }

    pub(super) fn begin_draining(&mut self) {
        let Some(graceful) = &mut self.stopping.graceful else {
            return;
        };
        if !graceful.has_begun {
            graceful.has_begun = true;
            graceful.untold = self.slots.tokens().into();
        }
    }

    /// Has a descriptor told that comes while the others are.
    #[cold]
    pub(super) fn drain_latecomer(&mut self, token: Token) {
        if let Some(graceful) = &mut self.stopping.graceful
            && graceful.has_begun
        {
            graceful.untold.push_back(token);
        }
    }

    /// Whether the next turn has to take a step of stopping, whatever happens.
    pub(super) fn has_stop_to_do(&self) -> bool {
        self.state == State::StopAsked
            || self.state == State::Stopping && (self.stopping.is_cut || self.has_untold())
    }

    fn has_untold(&self) -> bool {
        let graceful = self.stopping.graceful.as_ref();
        graceful.is_some_and(|graceful| !graceful.untold.is_empty())
    }

    /// Takes the steps of stopping that can be taken now. True if it has to wait
    /// for somebody then.
    pub(super) fn still_waits(&mut self) -> bool {
        loop {
            self.tell_draining();
            let graceful = self.stopping.graceful.as_ref();
            let is_awaited = graceful
                .is_some_and(|graceful| !graceful.untold.is_empty() || self.slots.awaited() > 0);
            if self.state != State::Stopping || is_awaited && !self.stopping.is_cut {
                return true;
            }
            if !self.stopping.has_fired {
                self.stopping.has_fired = true;
                self.fire(Phase::Before, SystemEvent::Shutdown);
            }
            // The state: a callback can have crashed the loop.
            if self.state != State::Stopping || self.stopping.is_cut {
                return self.state != State::Stopping;
            }
            let is_held = self.triggers.is_held(SystemEvent::Shutdown);
            let Some(graceful) = &mut self.stopping.graceful else {
                return is_held;
            };
            // What is held may be waiting for what is told in the second round.
            if is_held && graceful.round > DrainRound::Intake {
                return true;
            }
            let Some(round) = graceful.round.next() else {
                return false;
            };
            graceful.round = round;
            graceful.untold = self.slots.tokens().into();
        }
    }

    /// One portion, as large as that of a turn's notifications.
    fn tell_draining(&mut self) {
        if !self.has_untold() || self.stopping.is_cut {
            return;
        }
        let mut budget = 0..self.limits.notifications.max(1);
        self.guarded(|reactor| {
            for _ in &mut budget {
                let graceful = reactor.stopping.graceful.as_mut();
                let next = graceful.and_then(|it| Some((it.untold.pop_front()?, it.round)));
                let Some((token, round)) = next else {
                    break;
                };
                reactor.dispatch(token, |descriptor, reactor| {
                    descriptor.drain(reactor, round)
                });
            }
        });
        self.notify_all();
    }

    /// Nobody is waited for any more: says who was, if they had not finished.
    pub(super) fn end_waiting(&mut self) {
        let was_cut = std::mem::take(&mut self.stopping.is_cut);
        if let Some(graceful) = self.stopping.graceful.take() {
            // It may be what ran.
            let _ = graceful.deadline.cancel(self);
        }
        let awaited = self.slots.awaited();
        let is_held = self.triggers.is_held(SystemEvent::Shutdown);
        if was_cut && (awaited > 0 || is_held) {
            self.statistics.cut += awaited as u64;
            let holds = if is_held { ", and what is held" } else { "" };
            log::warn!(
                target: log::REACTOR,
                "stopping without waiting any longer: {awaited} descriptors are cut{holds}"
            );
        }
    }
}
