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
/// use bowline::{GracefulStop, Reactor};
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

    /// How long the stop takes at the most; default 30 s. Connections that have not
    /// ended by then are cut. Choose less time than your supervisor waits before it
    /// kills.
    #[must_use]
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// How long a connection has to be quiet before it counts as idle; default
    /// 500 ms.
    ///
    /// A client may send its next request just as the connection closes, and cannot
    /// know whether it was heard. A request within the grace is answered. With zero, an
    /// idle connection closes as soon as there is nothing to read.
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

/// The rounds of a graceful stop, in order. Each begins when everything that the one
/// before waited for has ended; see [`Descriptor::drain`](crate::Descriptor::drain).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum DrainRound {
    /// Listeners end: they take in new work.
    Intake,
    /// Connections that were accepted or adopted finish: they serve somebody.
    Work,
    /// Outgoing connections finish: the others may have needed them until now.
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
    /// Waits for nothing but [holds](Self::hold). Bytes that connections have not sent
    /// are dropped; [`stop_gracefully`](Self::stop_gracefully) waits for them. This
    /// method returns before any of that has happened. (Twisted: `reactor.stop`.)
    ///
    /// # Errors
    ///
    /// [`ReactorError::NotRunning`] when the reactor was not started, or has stopped.
    /// While it is stopping this is no error and changes nothing: a
    /// [graceful stop](Self::stop_gracefully) goes on waiting.
    /// [`stop_now`](Self::stop_now) ends the wait.
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

    /// Ends the loop when the work at hand is done. This is for a server that another
    /// one replaces.
    ///
    /// 1. Listeners accept the clients that wait in their queues, and close. (A
    ///    queue that other processes share is left to them.)
    /// 2. The [`Before`](crate::Phase::Before) triggers of the shutdown run.
    /// 3. Connections that were accepted or adopted are told to
    ///    [drain](crate::Descriptor::drain), and waited for.
    /// 4. When they have ended, and nobody [holds](Self::hold) the shutdown,
    ///    outgoing connections are told. The others may have needed them until now.
    /// 5. When these have ended too, it goes on as in [`stop`](Self::stop).
    ///
    /// At the [deadline](GracefulStop::deadline) it goes on at once. Whatever is left
    /// is cut; a warning says so, and [`Statistics::cut`](crate::Statistics::cut)
    /// counts it. [`stop_now`](Self::stop_now) does the same before the deadline.
    ///
    /// A second call takes the shorter of the two deadlines and of the two graces. A
    /// call while the reactor [stops](Self::stop), and somebody holds that, turns it
    /// into a graceful stop. This method returns before any of that has happened.
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

    /// Ends the loop in an orderly way and waits for nobody, not even for
    /// [holds](Self::hold). This cuts short a stop that has begun.
    ///
    /// At the end of this turn the triggers run, every descriptor is told and removed,
    /// and [`run`](Self::run) returns.
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

    /// Whether the reactor was asked to stop, in whichever way, and has not stopped
    /// yet. A protocol then says the last word of its connection, such as
    /// `Connection: close`.
    pub fn is_stopping(&self) -> bool {
        matches!(self.state, State::StopAsked | State::Stopping)
    }

    /// When the [graceful stop](Self::stop_gracefully) cuts whatever is left. `None`
    /// if nobody asked for one.
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

    /// Makes a [graceful stop](Self::stop_gracefully) wait until the descriptor
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
