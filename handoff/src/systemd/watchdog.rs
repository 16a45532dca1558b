//! `WATCHDOG_USEC`: sd_watchdog_enabled(3).

use std::rc::{Rc, Weak};
use std::time::Duration;

use bowline_reactor::Reactor;

use super::notify::{Notice, Notifier};
use crate::log;

/// How often the service manager wants to hear of this process, read from an
/// environment given as a lookup of variables; `None` where it does not.
///
/// # Examples
///
/// ```
/// use std::time::Duration;
/// use bowline_handoff::systemd::watchdog_interval;
///
/// let environment = |name: &str| (name == "WATCHDOG_USEC").then(|| "2000000".to_owned());
/// assert_eq!(watchdog_interval(environment, 42), Some(Duration::from_secs(2)));
/// ```
pub fn watchdog_interval(variable: impl Fn(&str) -> Option<String>, pid: u32) -> Option<Duration> {
    let for_us = match variable("WATCHDOG_PID") {
        Some(wanted) => wanted.parse() == Ok(pid),
        None => true,
    };
    let microseconds: u64 = variable("WATCHDOG_USEC")?.parse().ok()?;
    (for_us && microseconds > 0).then(|| Duration::from_micros(microseconds))
}

/// Tells the service manager from the loop that this process is alive, twice
/// in each interval, until this is dropped.
///
/// It is the loop that says so: a callback that does not return is noticed.
#[derive(Debug)]
#[must_use = "it stops when it is dropped"]
pub struct Watchdog {
    _alive: Rc<()>,
}

impl Watchdog {
    /// Starts as the environment asks (`WATCHDOG_USEC`), if it does.
    pub fn from_environment(reactor: &mut Reactor, notifier: Rc<Notifier>) -> Option<Self> {
        let interval = watchdog_interval(|name| std::env::var(name).ok(), std::process::id())?;
        Some(Self::start(reactor, notifier, interval))
    }

    /// Starts: the first notice leaves now.
    pub fn start(reactor: &mut Reactor, notifier: Rc<Notifier>, interval: Duration) -> Self {
        let alive = Rc::new(());
        tell(reactor, notifier, interval / 2, Rc::downgrade(&alive));
        Self { _alive: alive }
    }
}

fn tell(reactor: &mut Reactor, notifier: Rc<Notifier>, every: Duration, alive: Weak<()>) {
    if alive.strong_count() == 0 {
        return;
    }
    if let Err(error) = notifier.send(&Notice::new().watchdog()) {
        // The next one may be taken.
        log::debug!(target: log::HANDOFF, "watchdog: {error}");
    }
    reactor.call_later(every, move |reactor| tell(reactor, notifier, every, alive));
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
