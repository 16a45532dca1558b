//! What a notice says, for who receives it; pure.

use std::time::Duration;

use super::notice::{Notice, NotifyAccess};

/// One thing that a [`Notice`] says; see [`Notice::said`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Said<'a> {
    /// It is up, or up again (`READY=1`).
    Ready,
    /// It reloads (`RELOADING=1`).
    Reloading,
    /// It shuts down (`STOPPING=1`).
    Stopping,
    /// A line for people to read (`STATUS`).
    Status(&'a str),
    /// Why it fails, a number of errno(3) (`ERRNO`).
    Errno(i32),
    /// Its main process is another one (`MAINPID`).
    MainPid(u32),
    /// It is alive (`WATCHDOG=1`).
    Alive,
    /// It has found out that it hangs (`WATCHDOG=trigger`).
    Hangs,
    /// How often it is to be heard of from now on (`WATCHDOG_USEC`).
    WatchdogInterval(Duration),
    /// It is to be given so much time from now on (`EXTEND_TIMEOUT_USEC`).
    ExtendTimeout(Duration),
    /// Whose notices are to be taken (`NOTIFYACCESS`).
    Access(NotifyAccess),
    /// The exit status of something that it runs (`EXIT_STATUS`).
    ExitStatus(i32),
    /// When it was sent, on the monotonic clock, in microseconds (`MONOTONIC_USEC`).
    Monotonic(u64),
    /// Something else, or a value that makes no sense: a field with its value. The fields
    /// about descriptors are among these, since a [`DescriptorStore`](super::DescriptorStore)
    /// reads them.
    Field(&'a str, &'a str),
}

impl Notice {
    /// What it says, in order: the reverse of what its makers say, such as
    /// [`ready`](Self::ready).
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

    /// Whether a field says 1.
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
