//! What a notice says, for its receiver; pure.

use std::time::Duration;

use super::notice::{Notice, NotifyAccess};

/// One thing that a [`Notice`] says. See [`Notice::said`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Said<'a> {
    /// The service is up, or up again (`READY=1`).
    Ready,
    /// The service reloads its configuration (`RELOADING=1`).
    Reloading,
    /// The service shuts down (`STOPPING=1`).
    Stopping,
    /// A line for people to read (`STATUS`).
    Status(&'a str),
    /// The reason why the service fails, a number of errno(3) (`ERRNO`).
    Errno(i32),
    /// The new main process of the service (`MAINPID`).
    MainPid(u32),
    /// The process is alive (`WATCHDOG=1`).
    Alive,
    /// The service has found out that it hangs (`WATCHDOG=trigger`).
    Hangs,
    /// The new interval of the watchdog (`WATCHDOG_USEC`).
    WatchdogInterval(Duration),
    /// The service needs this much time from now on (`EXTEND_TIMEOUT_USEC`).
    ExtendTimeout(Duration),
    /// The processes whose notices are to be accepted (`NOTIFYACCESS`).
    Access(NotifyAccess),
    /// The exit status of something that the service runs (`EXIT_STATUS`).
    ExitStatus(i32),
    /// The time of the notice on the monotonic clock, in microseconds (`MONOTONIC_USEC`).
    Monotonic(u64),
    /// Any other field, or a value that is not valid: the name of the field, and its value.
    /// The fields about descriptors are among these, since a
    /// [`DescriptorStore`](super::DescriptorStore) reads them.
    Field(&'a str, &'a str),
}

impl Notice {
    /// Returns what it says, in order. It is the reverse of the methods that make a notice,
    /// such as [`ready`](Self::ready).
    ///
    /// # Examples
    ///
    /// ```
    /// use bowline::handoff::systemd::{Notice, Said};
    ///
    /// let notice = Notice::parse(b"READY=1\nSTATUS=3 clients\nMAINPID=soon")?;
    /// let said: Vec<_> = notice.said().collect();
    /// let expected = [
    ///     Said::Ready,
    ///     Said::Status("3 clients"),
    ///     Said::Field("MAINPID", "soon"),
    /// ];
    /// assert_eq!(said, expected);
    /// # Ok::<(), bowline::handoff::systemd::NoticeError>(())
    /// ```
    pub fn said(&self) -> impl Iterator<Item = Said<'_>> {
        self.fields()
            .map(|(name, value)| one(name, value).unwrap_or(Said::Field(name, value)))
    }

    /// Whether a field has the value 1.
    pub(super) fn says_yes(&self, name: &str) -> bool {
        self.get(name) == Some("1")
    }
}

fn one<'a>(name: &str, value: &'a str) -> Option<Said<'a>> {
    let time = || Some(Duration::from_micros(value.parse().ok()?));
    Some(match (name, value) {
        ("READY", "1") => Said::Ready,
        ("RELOADING", "1") => Said::Reloading,
        ("STOPPING", "1") => Said::Stopping,
        ("STATUS", text) => Said::Status(text),
        ("WATCHDOG", "1") => Said::Alive,
        ("WATCHDOG", "trigger") => Said::Hangs,
        ("ERRNO", number) => Said::Errno(number.parse().ok()?),
        // Nothing else is a process.
        ("MAINPID", number) => Said::MainPid(number.parse().ok().filter(|pid| *pid > 0)?),
        ("WATCHDOG_USEC", _) => Said::WatchdogInterval(time()?),
        ("EXTEND_TIMEOUT_USEC", _) => Said::ExtendTimeout(time()?),
        ("NOTIFYACCESS", access) => Said::Access(NotifyAccess::parse(access)?),
        ("EXIT_STATUS", status) => Said::ExitStatus(status.parse().ok()?),
        ("MONOTONIC_USEC", count) => Said::Monotonic(count.parse().ok()?),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_said_is_heard() {
        let notice = Notice::new()
            .ready()
            .stopping()
            .status("a=b")
            .main_pid(7)
            .watchdog()
            .watchdog_trigger()
            .watchdog_interval(Duration::from_millis(3))
            .extend_timeout(Duration::from_secs(2))
            .errno(5)
            .exit_status(-1)
            .monotonic(u64::MAX)
            .access(NotifyAccess::Exec);
        let said: Vec<_> = notice.said().collect();
        let expected = [
            Said::Ready,
            Said::Stopping,
            Said::Status("a=b"),
            Said::MainPid(7),
            Said::Alive,
            Said::Hangs,
            Said::WatchdogInterval(Duration::from_millis(3)),
            Said::ExtendTimeout(Duration::from_secs(2)),
            Said::Errno(5),
            Said::ExitStatus(-1),
            Said::Monotonic(u64::MAX),
            Said::Access(NotifyAccess::Exec),
        ];
        assert_eq!(said, expected);
    }

    #[test]
    fn values_that_make_no_sense_are_fields() {
        for text in [
            "READY=2",
            "MAINPID=0",
            "MAINPID=-4",
            "WATCHDOG=",
            "NOTIFYACCESS=me",
        ] {
            let notice = Notice::parse(text.as_bytes()).unwrap();
            let (name, value) = text.split_once('=').unwrap();
            assert_eq!(notice.said().next(), Some(Said::Field(name, value)));
        }
    }
}
