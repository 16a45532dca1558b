//! The text of the notices of sd_notify(3).

use std::error::Error;
use std::fmt::{self, Write as _};
use std::io;
use std::time::Duration;

use bowline_transport::monotonic_microseconds;

/// The longest name of a stored descriptor (systemd's own limit).
const LONGEST_NAME: usize = 255;

/// The longest notice, in bytes: what systemd has room for (`PIPE_BUF`). It drops a
/// longer one as a whole, without a word.
pub(super) const LONGEST: usize = 4096;

/// One message to the service manager. It is a pure value.
///
/// # Examples
///
/// ```
/// use bowline::handoff::systemd::Notice;
///
/// let notice = Notice::new().ready().status("serving").main_pid(42);
/// assert_eq!(notice.as_str(), "READY=1\nSTATUS=serving\nMAINPID=42\n");
/// ```
///
/// [`field`](Self::field) sets fields that have no method. [`parse`](Self::parse) reads
/// a notice on the manager's side:
///
/// ```
/// use bowline::handoff::systemd::Notice;
///
/// let sent = Notice::new().stopping().field("X_DRAINING", 17)?;
/// let got = Notice::parse(sent.as_str().as_bytes())?;
/// assert_eq!(got.get("X_DRAINING"), Some("17"));
/// # Ok::<(), bowline::handoff::systemd::NoticeError>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Notice {
    text: String,
}

/// Why a notice cannot be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum NoticeError {
    /// The name of a descriptor is not valid. It has to be of 1 to 255 printable ASCII
    /// characters, without colons.
    Name,
    /// A field is not valid. Its name has to be of ASCII capitals, digits and
    /// underscores, at least one. Its value may have no line break and no NUL in it,
    /// since that would end it.
    Field,
    /// The message is no text, or has a NUL in it that is not its last byte.
    Malformed,
}

/// Whose notices the manager takes, for [`Notice::access`]. In a unit this is
/// `NotifyAccess=`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum NotifyAccess {
    /// Nobody's.
    None,
    /// Those of the main process.
    Main,
    /// Those of the processes that the manager itself has started.
    Exec,
    /// Those of every process of the service.
    All,
}

impl Notice {
    /// Says nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// The service is up, or up again after [`reloading`](Self::reloading).
    #[must_use]
    pub fn ready(self) -> Self {
        self.with("READY", 1)
    }

    /// The service begins to reload its configuration, or to hand over to a successor.
    /// Adds the time (`MONOTONIC_USEC`), as services of `Type=notify-reload` have to.
    /// [`ready`](Self::ready) says that it is done.
    #[must_use]
    pub fn reloading(self) -> Self {
        self.with("RELOADING", 1)
            .with("MONOTONIC_USEC", monotonic_microseconds())
    }

    /// The service is shutting down.
    #[must_use]
    pub fn stopping(self) -> Self {
        self.with("STOPPING", 1)
    }

    /// One line for people to read. Line breaks become spaces.
    #[must_use]
    pub fn status(self, text: &str) -> Self {
        self.with("STATUS", text.replace(['\n', '\r', '\0'], " "))
    }

    /// The main process of the service is another one from now on. A predecessor says
    /// this of its successor, since systemd listens to the main process only
    /// (`NotifyAccess=main`).
    #[must_use]
    pub fn main_pid(self, pid: u32) -> Self {
        self.with("MAINPID", pid)
    }

    /// The process is alive. A [`Watchdog`](super::Watchdog) says it by itself.
    #[must_use]
    pub fn watchdog(self) -> Self {
        self.with("WATCHDOG", 1)
    }

    /// The manager is to keep the descriptors that are sent along, between the lives of
    /// the service. They come back as [inherited](super::inherited) ones under `name`.
    /// `FileDescriptorStoreMax=` limits their number.
    ///
    /// # Errors
    ///
    /// [`NoticeError::Name`].
    pub fn store(self, name: &str) -> Result<Self, NoticeError> {
        check_name(name)?;
        Ok(self.with("FDSTORE", 1).with("FDNAME", name))
    }

    /// As [`store`](Self::store), but the manager keeps them when their other end has
    /// closed. By default systemd drops those.
    ///
    /// # Errors
    ///
    /// [`NoticeError::Name`].
    pub fn store_without_polling(self, name: &str) -> Result<Self, NoticeError> {
        Ok(self.store(name)?.with("FDPOLL", 0))
    }

    /// The manager is to close the descriptors that it keeps under `name`.
    ///
    /// # Errors
    ///
    /// [`NoticeError::Name`].
    pub fn remove_stored(self, name: &str) -> Result<Self, NoticeError> {
        check_name(name)?;
        Ok(self.with("FDSTOREREMOVE", 1).with("FDNAME", name))
    }

    /// Starting, reloading or stopping takes longer than the unit allows. The manager is
    /// to wait for `by` from now on, unless this is said again in that time. Rounded up
    /// to microseconds (`EXTEND_TIMEOUT_USEC`).
    #[must_use]
    pub fn extend_timeout(self, by: Duration) -> Self {
        self.with("EXTEND_TIMEOUT_USEC", microseconds(by))
    }

    /// The reason why the service fails, in the form of a number of errno(3).
    #[must_use]
    pub fn errno(self, number: i32) -> Self {
        self.with("ERRNO", number)
    }

    /// The exit status of something that the service runs, such as a virtual machine.
    #[must_use]
    pub fn exit_status(self, status: i32) -> Self {
        self.with("EXIT_STATUS", status)
    }

    /// Whose notices are taken from now on (`NOTIFYACCESS`).
    #[must_use]
    pub fn access(self, access: NotifyAccess) -> Self {
        self.with("NOTIFYACCESS", access.as_str())
    }

    /// How often the manager has to hear of this process from now on, in place of the
    /// unit's `WatchdogSec=` (`WATCHDOG_USEC`). A running
    /// [`Watchdog`](super::Watchdog) keeps its pace.
    #[must_use]
    pub fn watchdog_interval(self, interval: Duration) -> Self {
        self.with("WATCHDOG_USEC", microseconds(interval))
    }

    /// The service has found out by itself that it hangs. The manager is to do now what
    /// it does when the watchdog is not fed in time.
    #[must_use]
    pub fn watchdog_trigger(self) -> Self {
        self.with("WATCHDOG", "trigger")
    }

    /// The time of the notice, in microseconds of the kernel's monotonic clock
    /// ([`monotonic_microseconds`]). [`reloading`](Self::reloading) adds it by itself.
    #[must_use]
    pub fn monotonic(self, microseconds: u64) -> Self {
        self.with("MONOTONIC_USEC", microseconds)
    }

    /// The manager is to close the one descriptor that is sent along, when it has dealt
    /// with everything before. It has to be alone in its message, as systemd demands.
    /// [`Notifier::barrier`](super::Notifier::barrier) sends it.
    pub fn of_barrier() -> Self {
        Self::new().with("BARRIER", 1)
    }

    /// Any other field. By convention a field of a program's own begins with `X_`.
    ///
    /// # Errors
    ///
    /// [`NoticeError::Field`].
    pub fn field(self, name: &str, value: impl fmt::Display) -> Result<Self, NoticeError> {
        let value = value.to_string();
        let is_name = |byte: u8| matches!(byte, b'A'..=b'Z' | b'0'..=b'9' | b'_');
        if name.is_empty() || !name.bytes().all(is_name) || value.contains(['\n', '\0']) {
            return Err(NoticeError::Field);
        }
        Ok(self.with(name, value))
    }

    /// Reads a message that a manager has received, the reverse of
    /// [`as_str`](Self::as_str).
    ///
    /// The last line break may be missing, one NUL may end the message, and lines that
    /// are no fields are skipped, as systemd does it.
    ///
    /// # Errors
    ///
    /// [`NoticeError::Malformed`].
    pub fn parse(message: &[u8]) -> Result<Self, NoticeError> {
        let message = message.strip_suffix(b"\0").unwrap_or(message);
        let text = std::str::from_utf8(message).map_err(|_| NoticeError::Malformed)?;
        if text.contains('\0') {
            return Err(NoticeError::Malformed);
        }
        let mut notice = Self::new();
        for (name, value) in text.split('\n').filter_map(|line| line.split_once('=')) {
            notice = notice.with(name, value);
        }
        Ok(notice)
    }

    /// The fields in order, each with its value.
    pub fn fields(&self) -> impl Iterator<Item = (&str, &str)> {
        self.text.lines().filter_map(|line| line.split_once('='))
    }

    /// The value of the first field of that name.
    pub fn get(&self, name: &str) -> Option<&str> {
        let mut fields = self.fields();
        fields.find_map(|(found, value)| (found == name).then_some(value))
    }

    /// The text that is sent.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    fn with(mut self, name: &str, value: impl fmt::Display) -> Self {
        // Writing to a string cannot fail.
        let _ = writeln!(self.text, "{name}={value}");
        self
    }
}

impl NotifyAccess {
    pub(super) fn parse(text: &str) -> Option<Self> {
        let all = [Self::None, Self::Main, Self::Exec, Self::All];
        all.into_iter().find(|access| access.as_str() == text)
    }

    fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Main => "main",
            Self::Exec => "exec",
            Self::All => "all",
        }
    }
}

/// Rounded up: less than was asked for would be a limit that is too short.
fn microseconds(time: Duration) -> u128 {
    time.as_nanos().div_ceil(1_000)
}

pub(super) fn check_name(name: &str) -> Result<(), NoticeError> {
    let is_fine = |byte: u8| (b' '..=b'~').contains(&byte) && byte != b':';
    if name.is_empty() || name.len() > LONGEST_NAME || !name.bytes().all(is_fine) {
        return Err(NoticeError::Name);
    }
    Ok(())
}

impl fmt::Display for NoticeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name => f.write_str("this cannot be the name of a stored descriptor"),
            Self::Field => f.write_str("this cannot be a field of a notice"),
            Self::Malformed => f.write_str("this is no notice"),
        }
    }
}

impl Error for NoticeError {}

impl From<NoticeError> for io::Error {
    fn from(error: NoticeError) -> Self {
        Self::new(io::ErrorKind::InvalidInput, error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_stays_on_one_line() {
        let notice = Notice::new().status("all\nREADY=1");
        assert_eq!(notice.as_str(), "STATUS=all READY=1\n");
    }

    #[test]
    fn names_that_systemd_would_not_take_are_refused() {
        for name in ["", "a:b", "a\nb", "ä", "\u{7f}"] {
            assert_eq!(Notice::new().store(name), Err(NoticeError::Name), "{name}");
        }
        assert_eq!(
            Notice::new().store(&"x".repeat(256)),
            Err(NoticeError::Name)
        );
        let stored = Notice::new().store_without_polling("web").unwrap();
        assert_eq!(stored.as_str(), "FDSTORE=1\nFDNAME=web\nFDPOLL=0\n");
        let removed = Notice::new().remove_stored(&"x".repeat(255)).unwrap();
        assert!(removed.as_str().starts_with("FDSTOREREMOVE=1\nFDNAME=x"));
    }

    #[test]
    fn names_are_printable_up_to_the_longest() {
        for name in [" ", "~", "a b", &"x".repeat(255)] {
            let stored = Notice::new().store(name).unwrap();
            assert_eq!(stored.as_str(), format!("FDSTORE=1\nFDNAME={name}\n"));
        }
        let error = Notice::new().store("").unwrap_err();
        let text = "this cannot be the name of a stored descriptor";
        assert_eq!(error.to_string(), text);
        let error = io::Error::from(error);
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        assert_eq!(error.to_string(), text);
    }

    #[test]
    fn each_notice_is_a_line() {
        let notice = Notice::new().stopping().watchdog().ready().main_pid(9);
        let lines = "STOPPING=1\nWATCHDOG=1\nREADY=1\nMAINPID=9\n";
        assert_eq!(notice.as_str(), lines);
    }

    #[test]
    fn reloading_says_when() {
        let notice = Notice::new().reloading();
        let time = notice.as_str().strip_prefix("RELOADING=1\nMONOTONIC_USEC=");
        let time: u64 = time.unwrap().trim_end().parse().unwrap();
        assert!(time > 0 && time <= monotonic_microseconds());
    }

    #[test]
    fn every_field_of_the_manual_can_be_said() {
        let ms = Duration::from_millis;
        for (notice, text) in [
            (
                Notice::new().extend_timeout(ms(90_000)),
                "EXTEND_TIMEOUT_USEC=90000000\n",
            ),
            (
                Notice::new().extend_timeout(Duration::from_nanos(1_001)),
                "EXTEND_TIMEOUT_USEC=2\n",
            ),
            (Notice::new().errno(2), "ERRNO=2\n"),
            (Notice::new().exit_status(3), "EXIT_STATUS=3\n"),
            (
                Notice::new().access(NotifyAccess::None),
                "NOTIFYACCESS=none\n",
            ),
            (
                Notice::new().access(NotifyAccess::Main),
                "NOTIFYACCESS=main\n",
            ),
            (
                Notice::new().access(NotifyAccess::Exec),
                "NOTIFYACCESS=exec\n",
            ),
            (
                Notice::new().access(NotifyAccess::All),
                "NOTIFYACCESS=all\n",
            ),
            (
                Notice::new().watchdog_interval(ms(20)),
                "WATCHDOG_USEC=20000\n",
            ),
            (Notice::new().watchdog_trigger(), "WATCHDOG=trigger\n"),
            (Notice::new().monotonic(7), "MONOTONIC_USEC=7\n"),
            (Notice::of_barrier(), "BARRIER=1\n"),
        ] {
            assert_eq!(notice.as_str(), text);
        }
        let notice = Notice::new()
            .stopping()
            .field("BUSERROR", "org.example")
            .unwrap();
        assert_eq!(notice.as_str(), "STOPPING=1\nBUSERROR=org.example\n");
        assert_eq!(Notice::new().field("X_1", "").unwrap().as_str(), "X_1=\n");
    }

    /// A value that ends early would say something else.
    #[test]
    fn fields_that_would_say_something_else_are_refused() {
        for (name, value) in [
            ("", "1"),
            ("x", "1"),
            ("A B", "1"),
            ("A=B", "1"),
            ("A\n", "1"),
            ("\u{c4}", "1"),
            ("A", "1\nREADY=1"),
            ("A", "\0"),
        ] {
            let refused = Notice::new().field(name, value);
            assert_eq!(refused, Err(NoticeError::Field), "{name:?} {value:?}");
        }
        assert_eq!(
            NoticeError::Field.to_string(),
            "this cannot be a field of a notice"
        );
    }

    #[test]
    fn what_was_sent_is_read_back() {
        let sent = Notice::new().ready().status("a=b").main_pid(4);
        let got = Notice::parse(sent.as_str().as_bytes()).unwrap();
        assert_eq!(got, sent);
        let fields: Vec<_> = got.fields().collect();
        assert_eq!(
            fields,
            [("READY", "1"), ("STATUS", "a=b"), ("MAINPID", "4")]
        );
        assert_eq!(got.get("STATUS"), Some("a=b"));
        assert_eq!(got.get("STATU"), None);
        for message in [
            &b"READY=1"[..],
            b"READY=1\n",
            b"READY=1\n\0",
            b"\nno field\nREADY=1\n\n",
        ] {
            let got = Notice::parse(message).unwrap();
            assert_eq!(got, Notice::new().ready(), "{message:?}");
        }
        assert_eq!(Notice::parse(b"").unwrap(), Notice::new());
        for message in [&b"A=1\0B=2"[..], b"A=\xff", b"A=1\0\0"] {
            let refused = Notice::parse(message);
            assert_eq!(refused, Err(NoticeError::Malformed), "{message:?}");
        }
        assert_eq!(NoticeError::Malformed.to_string(), "this is no notice");
    }
}
