//! `WATCHDOG_USEC`: sd_watchdog_enabled(3).

use std::cell::Cell;
use std::rc::{Rc, Weak};
use std::time::Duration;

use bowline_reactor::Reactor;

use super::notice::Notice;
use super::notify::Notifier;
use super::queue::Purpose;
use crate::log;

/// Returns how often the service manager wants to hear from this process. `None` if it does
/// not. `variable` looks up a variable of the environment.
///
/// # Examples
///
/// ```
/// use std::time::Duration;
/// use bowline::handoff::systemd::watchdog_interval;
///
/// let environment = |name: &str| (name == "WATCHDOG_USEC").then(|| "2000000".to_owned());
/// assert_eq!(watchdog_interval(environment, 42), Some(Duration::from_secs(2)));
/// ```
pub fn watchdog_interval(variable: impl Fn(&str) -> Option<String>, pid: u32) -> Option<Duration> {
    let (interval, named) = asked(variable)?;
    let is_for_us = named.is_none_or(|named| named == NamedProcess::Process(pid));
    is_for_us.then_some(interval)
}

/// The process that `WATCHDOG_PID` names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum NamedProcess {
    Process(u32),
    /// The value is not a number.
    Nobody,
}

/// Returns how often the manager wants to hear, and from which process, if one is named.
fn asked(variable: impl Fn(&str) -> Option<String>) -> Option<(Duration, Option<NamedProcess>)> {
    let microseconds: u64 = variable("WATCHDOG_USEC")?.parse().ok()?;
    let named = variable("WATCHDOG_PID");
    let named = named.map(|pid| {
        pid.parse()
            .map_or(NamedProcess::Nobody, NamedProcess::Process)
    });
    (microseconds > 0).then(|| (Duration::from_micros(microseconds), named))
}

/// Tells the service manager that this process is alive, twice in each interval, until
/// this is dropped.
///
/// The loop tells it. So the manager notices a callback that does not return.
///
/// If a [`Restart`](crate::restart::Restart) with the same notifier restarts the
/// service, the process that serves tells it: a predecessor until it has handed over,
/// and then its successor.
#[derive(Debug)]
#[must_use = "it stops when it is dropped"]
pub struct Watchdog {
    dog: Rc<Dog>,
}

/// What a [`Watchdog`] and its notifier share.
#[derive(Debug)]
pub(super) struct Dog {
    every: Duration,
    /// The process to be watched, if one is named.
    named: Option<u32>,
    state: Cell<DogState>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum DogState {
    /// It is for another process, which this one has not taken over from yet.
    OfAnother,
    Running,
}

impl Watchdog {
    /// Starts if the environment asks for it, at the interval that it asks for
    /// (`WATCHDOG_USEC`).
    ///
    /// `WATCHDOG_PID` may name another process: a predecessor from which this process takes
    /// over, or a predecessor of that one. After the takeover, this process is watched in
    /// its place. Until then, and if it never takes over, it sends nothing. That is logged
    /// once.
    pub fn from_environment(reactor: &mut Reactor, notifier: Rc<Notifier>) -> Option<Self> {
        let (interval, named) = asked(|name| std::env::var(name).ok())?;
        let named = match named {
            Some(NamedProcess::Process(pid)) => pid,
            // No process has that number.
            Some(NamedProcess::Nobody) => 0,
            None => std::process::id(),
        };
        Some(Self::start_for(reactor, notifier, interval, named))
    }

    /// As [`from_environment`](Self::from_environment), for an environment that you have
    /// read yourself. `pid` is the process to be watched.
    pub fn start_for(
        reactor: &mut Reactor,
        notifier: Rc<Notifier>,
        interval: Duration,
        pid: u32,
    ) -> Self {
        let is_ours = pid == std::process::id();
        if !is_ours {
            log::warn!(
                target: log::HANDOFF,
                "WATCHDOG_PID names {pid}: the watchdog is off, unless that hands over to this process"
            );
        }
        let state = if is_ours {
            DogState::Running
        } else {
            DogState::OfAnother
        };
        Self::with(reactor, &notifier, interval, Some(pid), state)
    }

    /// Starts. The first notice is sent now.
    pub fn start(reactor: &mut Reactor, notifier: Rc<Notifier>, interval: Duration) -> Self {
        Self::with(reactor, &notifier, interval, None, DogState::Running)
    }

    fn with(
        reactor: &mut Reactor,
        notifier: &Notifier,
        interval: Duration,
        named: Option<u32>,
        state: DogState,
    ) -> Self {
        let dog = Rc::new(Dog {
            every: interval / 2,
            named,
            state: Cell::new(state),
        });
        notifier.add_dog(&dog);
        if let Err(error) = notifier.attach(reactor) {
            // What finds no room is not kept, then: the next one may be taken.
            log::warn!(target: log::HANDOFF, "the notifier is not attached: {error}");
        }
        if state == DogState::Running {
            tell(reactor, notifier.clone(), Rc::downgrade(&dog));
        }
        Self { dog }
    }

    /// Whether this process is the one to be watched. It is not while `WATCHDOG_PID`
    /// names another process that has not handed over to this one.
    pub fn is_for_us(&self) -> bool {
        self.dog.state.get() == DogState::Running
    }
}

impl Dog {
    /// Notes that this process is the main one of the service from now on.
    pub(super) fn wakes(
        self: &Rc<Self>,
        reactor: &mut Reactor,
        notifier: &Notifier,
        heir_of: &[u32],
    ) {
        match self.state.get() {
            // At once: the manager may have heard nothing for a while.
            DogState::Running => feed(notifier),
            DogState::OfAnother if self.named.is_some_and(|pid| heir_of.contains(&pid)) => {
                self.state.set(DogState::Running);
                log::debug!(target: log::HANDOFF, "watched in place of {:?}", self.named);
                tell(reactor, notifier.clone(), Rc::downgrade(self));
            }
            DogState::OfAnother => {}
        }
    }

    /// Returns the process that was originally to be watched, if this one is watched in its
    /// place.
    pub(super) fn stands_for(&self) -> Option<u32> {
        self.named.filter(|_| self.state.get() == DogState::Running)
    }
}

fn feed(notifier: &Notifier) {
    if let Err(error) = notifier.submit(&Notice::new().watchdog(), &[], Purpose::Watchdog) {
        // The next one may be taken.
        log::debug!(target: log::HANDOFF, "watchdog: {error}");
    }
}

fn tell(reactor: &mut Reactor, notifier: Notifier, dog: Weak<Dog>) {
    let Some(every) = dog.upgrade().map(|dog| dog.every) else {
        return;
    };
    if notifier.is_main() {
        feed(&notifier);
    }
    reactor.call_later(every, move |reactor| tell(reactor, notifier, dog));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interval_is_ours_only_if_it_names_us() {
        let with = |pid: Option<&str>, time: &str| {
            let (pid, time) = (pid.map(str::to_owned), time.to_owned());
            let variable = move |name: &str| match name {
                "WATCHDOG_PID" => pid.clone(),
                "WATCHDOG_USEC" => Some(time.clone()),
                _ => None,
            };
            watchdog_interval(variable, 42)
        };
        assert_eq!(with(None, "1000"), Some(Duration::from_millis(1)));
        assert_eq!(with(Some("42"), "1000"), Some(Duration::from_millis(1)));
        assert_eq!(with(Some("43"), "1000"), None);
        assert_eq!(with(Some("us"), "1000"), None);
        assert_eq!(with(None, "1"), Some(Duration::from_micros(1)));
        assert_eq!(with(Some("43"), "0"), None);
        assert_eq!(with(None, "0"), None);
        assert_eq!(with(None, "soon"), None);
    }
}
