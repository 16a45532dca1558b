//! `NOTIFY_SOCKET`: sd_notify(3).

use std::error::Error;
use std::fmt::{self, Write as _};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use bowline_reactor::{DelayedCall, Descriptor, Interest, Next, Reactor, Readiness};
use bowline_transport::{monotonic_microseconds, send_datagram};

/// The longest name of a stored descriptor (systemd's own limit).
const LONGEST_NAME: usize = 255;

/// What the service manager is told, in one message: a pure value.
///
/// # Examples
///
/// ```
/// use bowline_handoff::systemd::Notice;
///
/// let notice = Notice::new().ready().status("serving").main_pid(42);
/// assert_eq!(notice.as_str(), "READY=1\nSTATUS=serving\nMAINPID=42\n");
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Notice {
    text: String,
}

/// Why a notice cannot be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum NoticeError {
    /// The name of a descriptor is empty, longer than 255 bytes, or has
    /// something else in it than printable ASCII without colons.
    Name,
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

    /// The service reloads its configuration, or hands over to a successor,
    /// from now on; says when that is (`MONOTONIC_USEC`), as services of
    /// `Type=notify-reload` have to. [`ready`](Self::ready) ends it.
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

    /// One line for people to read; line breaks become spaces.
    #[must_use]
    pub fn status(self, text: &str) -> Self {
        self.with("STATUS", text.replace(['\n', '\r', '\0'], " "))
    }

    /// The main process of the service is another one from now on: for a
    /// predecessor to say of its successor, since systemd listens to the main
    /// process only (`NotifyAccess=main`).
    #[must_use]
    pub fn main_pid(self, pid: u32) -> Self {
        self.with("MAINPID", pid)
    }

    /// We are alive; see [`Watchdog`](super::Watchdog), which says it by itself.
    #[must_use]
    pub fn watchdog(self) -> Self {
        self.with("WATCHDOG", 1)
    }

    /// The descriptors sent along are to be kept between the lives of the
    /// service (`FileDescriptorStoreMax=` says how many), and come back as
    /// [inherited](super::inherited) ones under `name`.
    ///
    /// # Errors
    ///
    /// [`NoticeError::Name`].
    pub fn store(self, name: &str) -> Result<Self, NoticeError> {
        check_name(name)?;
        Ok(self.with("FDSTORE", 1).with("FDNAME", name))
    }

    /// As [`store`](Self::store), and they stay when they become unreadable:
    /// by default systemd drops those whose other end has closed.
    ///
    /// # Errors
    ///
    /// [`NoticeError::Name`].
    pub fn store_without_polling(self, name: &str) -> Result<Self, NoticeError> {
        Ok(self.store(name)?.with("FDPOLL", 0))
    }

    /// The descriptors kept under `name` are to be closed.
    ///
    /// # Errors
    ///
    /// [`NoticeError::Name`].
    pub fn remove_stored(self, name: &str) -> Result<Self, NoticeError> {
        check_name(name)?;
        Ok(self.with("FDSTOREREMOVE", 1).with("FDNAME", name))
    }

    /// The text as it is sent.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    fn with(mut self, name: &str, value: impl fmt::Display) -> Self {
        // Writing to a string cannot fail.
        let _ = writeln!(self.text, "{name}={value}");
        self
    }
}

fn check_name(name: &str) -> Result<(), NoticeError> {
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
        }
    }
}

impl Error for NoticeError {}

impl From<NoticeError> for io::Error {
    fn from(error: NoticeError) -> Self {
        Self::new(io::ErrorKind::InvalidInput, error)
    }
}

/// The way to the service manager.
///
/// Sending never blocks. The manager may not read for a while, and its queue
/// is short (`net.unix.max_dgram_qlen`): `WouldBlock` says that a notice was
/// not taken, and is to be sent again later.
#[derive(Debug)]
pub struct Notifier {
    socket: UnixDatagram,
}

impl Notifier {
    /// The one that this process was told of, if it was (`NOTIFY_SOCKET`).
    ///
    /// The variable stays in the environment: a successor started from here
    /// needs it.
    ///
    /// # Errors
    ///
    /// As [`connect`](Self::connect).
    pub fn from_environment() -> io::Result<Option<Self>> {
        match std::env::var("NOTIFY_SOCKET") {
            Ok(address) => Self::connect(&address).map(Some),
            Err(_) => Ok(None),
        }
    }

    /// Connects to a path, or to `@name` in the abstract namespace.
    ///
    /// # Errors
    ///
    /// `InvalidInput` for an address that is neither; otherwise those of
    /// socket(2) and connect(2).
    pub fn connect(address: &str) -> io::Result<Self> {
        let address = if let Some(name) = address.strip_prefix('@') {
            SocketAddr::from_abstract_name(name)?
        } else if address.starts_with('/') {
            SocketAddr::from_pathname(address)?
        } else {
            // vsock:... for virtual machines, above all.
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        };
        let socket = UnixDatagram::unbound()?;
        socket.set_nonblocking(true)?;
        socket.connect_addr(&address)?;
        Ok(Self { socket })
    }

    /// Sends a notice.
    ///
    /// # Errors
    ///
    /// `WouldBlock` as said above; `ConnectionRefused` where nobody listens any
    /// more.
    pub fn send(&self, notice: &Notice) -> io::Result<()> {
        self.send_with(notice, &[])
    }

    /// Sends a notice with descriptors, those to be
    /// [stored](Notice::store). They are borrowed: the manager gets copies.
    ///
    /// # Errors
    ///
    /// As [`send`](Self::send); `InvalidInput` for more than 253.
    pub fn send_with(&self, notice: &Notice, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        send_datagram(self.socket.as_fd(), notice.as_str().as_bytes(), descriptors)
    }

    /// Calls `then` when the manager has handled everything that was sent
    /// before, or with `TimedOut` at the deadline.
    ///
    /// To be waited for before exiting after a notice that matters, since the
    /// manager may otherwise not know any more whose notice it was. `then` runs
    /// once, as a callback of the loop.
    ///
    /// # Errors
    ///
    /// As [`send`](Self::send), and those of pipe(2); `then` is dropped.
    pub fn barrier(
        &self,
        reactor: &mut Reactor,
        deadline: Duration,
        then: impl FnOnce(&mut Reactor, io::Result<()>) + 'static,
    ) -> io::Result<()> {
        let (read, write) = io::pipe()?;
        // Alone in its message, as systemd demands.
        let barrier = Notice::new().with("BARRIER", 1);
        self.send_with(&barrier, &[write.as_fd()])?;
        drop(write);
        let token = reactor.register(Interest::Readable, |_| {
            Box::new(Barrier {
                read: read.into(),
                then: Some(Box::new(then)),
            })
        })?;
        reactor.notify_later(deadline, token);
        Ok(())
    }
}

type Then = Box<dyn FnOnce(&mut Reactor, io::Result<()>)>;

/// Waits until the manager has closed the other end of a pipe.
struct Barrier {
    read: OwnedFd,
    then: Option<Then>,
}

impl Barrier {
    fn finish(&mut self, reactor: &mut Reactor, result: io::Result<()>) -> Next {
        if let Some(then) = self.then.take() {
            then(reactor, result);
        }
        Next::Remove
    }
}

impl Descriptor for Barrier {
    fn ready(&mut self, reactor: &mut Reactor, readiness: Readiness) -> Next {
        if readiness.intersects(Readiness::READ_CLOSED | Readiness::ERROR) {
            self.finish(reactor, Ok(()))
        } else {
            Next::Keep
        }
    }

    fn timer_fired(&mut self, reactor: &mut Reactor, _: DelayedCall) -> Next {
        self.finish(reactor, Err(io::ErrorKind::TimedOut.into()))
    }

    fn source(&self) -> Option<BorrowedFd<'_>> {
        Some(self.read.as_fd())
    }

    fn facet(&mut self) -> &mut dyn std::any::Any {
        &mut self.read
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
    fn addresses_that_are_neither_path_nor_name_are_refused() {
        for address in ["", "vsock:2:1234", "relative/path"] {
            let error = Notifier::connect(address).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{address}");
        }
    }
}
