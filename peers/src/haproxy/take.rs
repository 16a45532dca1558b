//! The end that takes listeners.

use std::ffi::OsString;
use std::fmt;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use bowline::framing::{FrameContext, FrameReceiver, Framed, FramingError, Pairing, Unclaimed};
use bowline::process::{SocketDescription, describe_socket};
use bowline::{Address, CloseReason, DelayedCall, Reactor, UnixAddress, UnixTransport};

use super::framing::{GetsocksFramer, GetsocksPart, ListenerName, MAX_BATCH, int};

/// How long HAProxy waits for the next part of an answer.
const DEADLINE: Duration = Duration::from_secs(1);

/// How many listeners there may be by default.
const MAX_LISTENERS: usize = 65_536;

type Then = Box<dyn FnOnce(&mut Reactor, Result<Vec<TakenListener>, TakeError>)>;

/// Makes a protocol that takes the listeners of the process at the other end: a HAProxy
/// with `expose-fd listeners`, or [`give_listeners`](super::give_listeners). It is for
/// [`Once`](bowline::Once) and a connector.
///
/// `then` is called once, with the listeners in the order in which they were sent, or with
/// what went wrong. After an error everything that had arrived is closed. `then` is not
/// called if the connection is never made.
pub fn take_listeners(
    then: impl FnOnce(&mut Reactor, Result<Vec<TakenListener>, TakeError>) + 'static,
) -> Framed<GetsocksFramer, Taker> {
    let taker = Taker {
        then: Some(Box::new(then)),
        announced: None,
        taken: Vec::new(),
        acknowledged: 0,
        max_listeners: MAX_LISTENERS,
        deadline: DEADLINE,
        timer: None,
        error: None,
    };
    Framed::new(GetsocksFramer::new(GetsocksPart::Count), taker)
        .pairing(Pairing::Claimed(Unclaimed::Fail))
        .max_waiting(MAX_BATCH + 1)
}

/// A listener that was taken.
#[derive(Debug)]
pub struct TakenListener {
    /// The socket. The process that gave it has it as well, and may go on accepting.
    pub fd: OwnedFd,
    /// Where it belongs, besides its address.
    pub name: ListenerName,
    /// What the kernel says about the socket. HAProxy also gives datagram sockets, which do
    /// not listen.
    pub socket: SocketDescription,
}

impl TakenListener {
    /// Returns the address that HAProxy's configuration has for it, as far as it can be
    /// known.
    ///
    /// That is the address that the kernel reports, with two exceptions. HAProxy binds a
    /// path under a temporary name (`PATH.PID.tmp`), and the kernel keeps reporting that;
    /// this returns `PATH`. An `abns@` name is padded with zeros to 107 bytes; this returns
    /// it without them. Never unlink a path by the name that the kernel reports.
    pub fn address(&self) -> Option<Address> {
        let unix = match self.socket.address.as_ref()? {
            Address::Unix(UnixAddress::Path(path)) => UnixAddress::Path(without_suffix(path)),
            Address::Unix(UnixAddress::Abstract(name)) => {
                let end = name.iter().rposition(|byte| *byte != 0);
                UnixAddress::Abstract(name[..end.map_or(0, |last| last + 1)].to_vec())
            }
            other => return Some(other.clone()),
        };
        Some(Address::Unix(unix))
    }
}

/// Returns the configured path of a path that HAProxy has bound.
fn without_suffix(path: &Path) -> PathBuf {
    let asked_for = || {
        let rest = path.as_os_str().as_bytes().strip_suffix(b".tmp")?;
        let dot = rest.iter().rposition(|byte| *byte == b'.')?;
        let (asked_for, pid) = (&rest[..dot], &rest[dot + 1..]);
        let is_number = !pid.is_empty() && pid.iter().all(u8::is_ascii_digit);
        is_number.then(|| OsString::from_vec(asked_for.to_vec()))
    };
    asked_for().map_or_else(|| path.to_owned(), PathBuf::from)
}

/// Why listeners could not be taken.
#[derive(Debug)]
#[non_exhaustive]
pub enum TakeError {
    /// The connection ended before the number of listeners arrived. HAProxy does this if
    /// its stats socket has no `expose-fd listeners`.
    Refused,
    /// The connection ended before all listeners had arrived.
    Ended {
        /// How many there are.
        announced: usize,
        /// How many had arrived.
        received: usize,
    },
    /// The next part did not arrive [in time](Taker::set_deadline).
    TimedOut,
    /// There are more than [allowed](Taker::set_max_listeners).
    TooMany {
        /// How many there are.
        announced: i32,
        /// How many are allowed.
        limit: usize,
    },
    /// One of the descriptors is not a socket.
    NotASocket(io::Error),
    /// The peer broke the framing.
    Framing(FramingError),
    /// The connection was lost.
    Lost(io::Error),
}

impl fmt::Display for TakeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused => f.write_str("the peer gives no listeners"),
            Self::Ended {
                announced,
                received,
            } => write!(f, "the peer gave {received} of {announced} listeners"),
            Self::TimedOut => f.write_str("the peer did not answer in time"),
            Self::TooMany { announced, limit } => {
                write!(f, "the peer has {announced} listeners, {limit} are allowed")
            }
            Self::NotASocket(error) => write!(f, "the peer gave no socket: {error}"),
            Self::Framing(error) => write!(f, "the peer did not keep to the protocol: {error}"),
            Self::Lost(error) => write!(f, "the connection broke: {error}"),
        }
    }
}

impl std::error::Error for TakeError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::NotASocket(error) | Self::Lost(error) => Some(error),
            Self::Framing(error) => Some(error),
            _ => None,
        }
    }
}

/// The receiver that [`take_listeners`] puts into its [`Framed`].
pub struct Taker {
    then: Option<Then>,
    announced: Option<usize>,
    taken: Vec<TakenListener>,
    /// How many had arrived when a batch was last acknowledged.
    acknowledged: usize,
    max_listeners: usize,
    deadline: Duration,
    timer: Option<DelayedCall>,
    /// Why it gives up.
    error: Option<TakeError>,
}

type Cx<'a, T> = FrameContext<'a, T, GetsocksFramer>;

impl Taker {
    /// Sets how long each part of the answer may take; default 1 second, as in HAProxy.
    pub fn set_deadline(&mut self, deadline: Duration) {
        self.deadline = deadline;
    }

    /// Sets how many listeners there may be; default 65,536. The number that the peer
    /// announces is checked before any is taken.
    pub fn set_max_listeners(&mut self, count: usize) {
        self.max_listeners = count;
    }

    fn count_received<T: UnixTransport>(&mut self, cx: &mut Cx<'_, T>, announced: i32) {
        match usize::try_from(announced) {
            Ok(count) if count <= self.max_listeners => {
                self.announced = Some(count);
                if cx.framing.rest_len() == 0 && self.refuse_surplus(cx) {
                    return;
                }
                cx.framing.framer_mut().set_part(GetsocksPart::Records);
                // A batch can be longer than a read, and its descriptors come with its first
                // byte.
                let pairing = Pairing::Claimed(Unclaimed::Wait);
                cx.framing.set_pairing(pairing);
                self.look_whether_done(cx);
            }
            _ => {
                let limit = self.max_listeners;
                self.fail(cx, TakeError::TooMany { announced, limit });
            }
        }
    }

    fn listener_received<T: UnixTransport>(&mut self, cx: &mut Cx<'_, T>, frame: &[u8]) {
        let fd = cx
            .framing
            .descriptors()
            .next()
            .expect("a record claims one");
        match describe_socket(fd.as_fd()) {
            Ok(socket) => {
                let name = ListenerName::of(frame);
                self.taken.push(TakenListener { fd, name, socket });
                self.look_whether_done(cx);
            }
            Err(error) => self.fail(cx, TakeError::NotASocket(error)),
        }
    }

    fn look_whether_done<T: UnixTransport>(&mut self, cx: &mut Cx<'_, T>) {
        if Some(self.taken.len()) != self.announced {
            return;
        }
        if self.refuse_surplus(cx) {
            return;
        }
        if !self.taken.is_empty() {
            self.acknowledge(cx);
        }
        // What follows does not matter any more.
        self.end(cx.reactor, Ok);
        cx.transport.lose_connection();
    }

    /// Fails if there are descriptors that belong to nothing.
    fn refuse_surplus<T: UnixTransport>(&mut self, cx: &mut Cx<'_, T>) -> bool {
        let surplus = cx.framing.take_descriptors();
        let count = surplus.len();
        if count > 0 {
            cx.transport.close_unclaimed(surplus);
            let error = FramingError::DescriptorsUnclaimed { count };
            self.fail(cx, TakeError::Framing(error));
        }
        count > 0
    }

    /// Sends how many there were before this batch, as HAProxy does.
    fn acknowledge<T: UnixTransport>(&mut self, cx: &mut Cx<'_, T>) {
        let before = i32::try_from(self.acknowledged).expect("within an announced number");
        cx.transport.write(&before.to_ne_bytes());
        self.acknowledged = self.taken.len();
    }

    fn fail<T: UnixTransport>(&mut self, cx: &mut Cx<'_, T>, error: TakeError) {
        self.error = Some(error);
        cx.transport.abort_connection();
    }

    fn end(
        &mut self,
        reactor: &mut Reactor,
        answer: impl FnOnce(Vec<TakenListener>) -> Result<Vec<TakenListener>, TakeError>,
    ) {
        if let Some(timer) = self.timer.take() {
            // It may just have fired.
            let _ = timer.cancel(reactor);
        }
        if let Some(then) = self.then.take() {
            then(reactor, answer(std::mem::take(&mut self.taken)));
        }
    }

    /// Starts to wait for the next part.
    fn wait<T: UnixTransport>(&mut self, cx: &mut Cx<'_, T>) {
        let is_reset = self
            .timer
            .is_some_and(|timer| timer.reset(cx.reactor, self.deadline).is_ok());
        if !is_reset {
            let handle = cx.transport.handle();
            self.timer = Some(cx.reactor.call_later(self.deadline, move |reactor| {
                if let Some(transport) = reactor.get(handle) {
                    transport.abort_connection();
                }
            }));
        }
    }
}

impl<T: UnixTransport> FrameReceiver<T, GetsocksFramer> for Taker {
    fn connection_made(&mut self, cx: &mut Cx<'_, T>) {
        cx.transport.write(b"_getsocks\n");
        self.wait(cx);
    }

    fn frame_received(&mut self, cx: &mut Cx<'_, T>, frame: &[u8]) {
        match cx.framing.framer().part() {
            GetsocksPart::Records => self.listener_received(cx, frame),
            _ => self.count_received(cx, int(frame)),
        }
    }

    fn read_delivered(&mut self, cx: &mut Cx<'_, T>) {
        if self.then.is_some() && self.error.is_none() {
            // Inside of a record, the batch goes on.
            if self.taken.len() > self.acknowledged && cx.framing.rest_len() == 0 {
                self.acknowledge(cx);
            }
            self.wait(cx);
        }
    }

    fn framing_failed(&mut self, cx: &mut Cx<'_, T>, error: FramingError, _: &[u8]) {
        self.fail(cx, TakeError::Framing(error));
    }

    fn connection_lost(&mut self, cx: &mut Cx<'_, T>, reason: &CloseReason) {
        let error = self.error.take().unwrap_or_else(|| match reason {
            CloseReason::Aborted => TakeError::TimedOut,
            CloseReason::Lost(error) if error.kind() != io::ErrorKind::BrokenPipe => {
                let number = error.raw_os_error();
                TakeError::Lost(
                    number.map_or_else(|| error.kind().into(), io::Error::from_raw_os_error),
                )
            }
            _ => match self.announced {
                None => TakeError::Refused,
                Some(announced) => TakeError::Ended {
                    announced,
                    received: self.taken.len(),
                },
            },
        });
        self.end(cx.reactor, |_| Err(error));
    }
}

impl fmt::Debug for Taker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Taker")
            .field("announced", &self.announced)
            .field("taken", &self.taken)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn path_is_that_of_the_configuration() {
        for (bound, path) in [
            ("/run/a.sock.4711.tmp", "/run/a.sock"),
            ("/run/a.sock", "/run/a.sock"),
            ("/run/a.tmp", "/run/a.tmp"),
            ("/run/a.b.tmp", "/run/a.b.tmp"),
            ("/run/a..tmp", "/run/a..tmp"),
        ] {
            assert_eq!(without_suffix(Path::new(bound)), Path::new(path), "{bound}");
        }
    }
}
