//! What a receiver takes: descriptors of a kind, and nothing else.

use std::error::Error;
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::closer::close_received;
use crate::sys;
use crate::sys::file::{FileKind, access, file_kind, is_event_counter, regular_length};
use crate::sys::{Family, SocketName};

/// Whether two descriptors are of one open file: one is a duplicate of the other, or they
/// came by the same way from one. False also where the kernel does not say (before Linux
/// 6.10, in a sandbox that forbids kcmp(2)).
pub fn is_same_open_file(one: BorrowedFd<'_>, other: BorrowedFd<'_>) -> bool {
    sys::file::is_same_file(one, other)
}

/// Whether the other end of a connection or a pipe is gone, or there is an error. False of
/// what has no other end, such as a listener or a file. Costs one system call (poll(2)).
pub fn is_hung_up(fd: BorrowedFd<'_>) -> bool {
    sys::file::is_broken(fd)
}

/// A kind of descriptor that a receiver takes.
///
/// A peer can send anything. Who says what it takes finds a wrong one where it arrives, and
/// can refuse it in the words of its protocol, instead of failing at it later.
///
/// The kernel is asked, and nothing is changed, read or waited for. Whether the bytes
/// behind it mean anything is another matter.
///
/// # Examples
///
/// ```
/// use std::net::TcpListener;
/// use std::os::fd::OwnedFd;
/// use bowline::descriptor::{DescriptorKind, DescriptorsOfKind};
///
/// let listener = TcpListener::bind("127.0.0.1:0")?;
/// let fd = DescriptorKind::TcpListener.check(listener.into())?;
/// let refused = DescriptorKind::EventCounter.check(fd).unwrap_err();
/// assert_eq!(
///     refused.to_string(),
///     "a counter was to be passed, and it was a listening TCP socket",
/// );
///
/// // Those of a message, with `cx.framing.descriptors()` for example.
/// let mut its = vec![refused.into_descriptor()].into_iter();
/// let wanted = [DescriptorKind::TcpListener, DescriptorKind::Pipe];
/// let refused = its.take_kinds(wanted).unwrap_err();
/// assert_eq!(refused.to_string(), "a pipe was to be passed, and there was none");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DescriptorKind {
    /// A TCP socket that accepts connections.
    TcpListener,
    /// A TCP socket that is connected.
    TcpStream,
    /// A UNIX stream socket that accepts connections.
    UnixListener,
    /// A UNIX stream socket that is connected.
    UnixStream,
    /// A counter (eventfd(2)), blocking or not.
    EventCounter,
    /// The side of a pseudo-terminal that holds it, as runtimes of containers pass it.
    TerminalMaster,
    /// Either side of a pseudo-terminal, or another terminal.
    Terminal,
    /// Memory (memfd_create(2)) of so many bytes at least, whose bytes and length are sealed:
    /// it can be mapped, as [`SealedMemory`](crate::SealedMemory) does.
    SealedMemory {
        /// How many bytes it has at least.
        at_least: u64,
    },
    /// A process (pidfd_open(2)).
    Pidfd,
    /// A regular file that is open for reading only.
    ReadOnlyFile,
    /// A pipe, either end.
    Pipe,
}

impl DescriptorKind {
    /// Returns the descriptor if it is of this kind.
    ///
    /// # Errors
    ///
    /// [`WrongDescriptor`] has it, and says what it is instead. Dropping that closes it.
    pub fn check(self, fd: OwnedFd) -> Result<OwnedFd, WrongDescriptor> {
        match self.is_kind_of(fd.as_fd()) {
            true => Ok(fd),
            false => Err(WrongDescriptor {
                wanted: self,
                found: Some(name_of(fd.as_fd())),
                fd: Some(fd),
            }),
        }
    }

    /// Whether a descriptor is of this kind.
    pub fn is_kind_of(self, fd: BorrowedFd<'_>) -> bool {
        let kind = file_kind(fd);
        match self {
            Self::TcpListener => Found::of(fd) == Found::TcpListener,
            Self::TcpStream => Found::of(fd) == Found::TcpStream,
            Self::UnixListener => Found::of(fd) == Found::UnixListener,
            Self::UnixStream => Found::of(fd) == Found::UnixStream,
            Self::EventCounter => is_event_counter(fd),
            Self::TerminalMaster => matches!(kind, Ok(FileKind::TerminalMaster)),
            Self::Terminal => {
                matches!(kind, Ok(FileKind::TerminalMaster | FileKind::Terminal))
            }
            Self::SealedMemory { at_least } => {
                sys::is_sealed(fd).unwrap_or(false)
                    && matches!(regular_length(fd), Ok(Some(length)) if length >= at_least)
            }
            Self::Pidfd => is_process(fd),
            Self::ReadOnlyFile => {
                matches!(regular_length(fd), Ok(Some(_))) && matches!(access(fd), Ok((true, false)))
            }
            Self::Pipe => matches!(kind, Ok(FileKind::Pipe)),
        }
    }
}

impl fmt::Display for DescriptorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self {
            Self::TcpListener => "a listening TCP socket",
            Self::TcpStream => "a connected TCP socket",
            Self::UnixListener => "a listening UNIX socket",
            Self::UnixStream => "a connected UNIX socket",
            Self::EventCounter => "a counter",
            Self::TerminalMaster => "a pseudo-terminal",
            Self::Terminal => "a terminal",
            Self::SealedMemory { at_least } => {
                return write!(f, "sealed memory of {at_least} bytes");
            }
            Self::Pidfd => "a process",
            Self::ReadOnlyFile => "a file to be read",
            Self::Pipe => "a pipe",
        };
        f.write_str(name)
    }
}

/// Descriptors that were received, taken by their kinds. For every iterator of descriptors,
/// such as [`FrameDescriptors`](bowline_protocol::framing::FrameDescriptors) and
/// [`ReceivedDescriptors`](bowline_protocol::ReceivedDescriptors).
pub trait DescriptorsOfKind: Iterator<Item = OwnedFd> {
    /// Takes the next, which has to be of this kind.
    ///
    /// # Errors
    ///
    /// It is of another, or there is none.
    fn take_kind(&mut self, kind: DescriptorKind) -> Result<OwnedFd, WrongDescriptor> {
        match self.next() {
            Some(fd) => kind.check(fd),
            None => Err(WrongDescriptor {
                wanted: kind,
                found: None,
                fd: None,
            }),
        }
    }

    /// Takes the next ones, which have to be of these kinds, in this order.
    ///
    /// # Errors
    ///
    /// One is of another kind, or there is none. Those before it are closed.
    fn take_kinds<const N: usize>(
        &mut self,
        kinds: [DescriptorKind; N],
    ) -> Result<[OwnedFd; N], WrongDescriptor> {
        let mut taken = Vec::with_capacity(N);
        for kind in kinds {
            match self.take_kind(kind) {
                Ok(fd) => taken.push(fd),
                Err(error) => {
                    taken.into_iter().for_each(close_received);
                    return Err(error);
                }
            }
        }
        Ok(taken.try_into().expect("as many as there are kinds"))
    }
}

impl<I: Iterator<Item = OwnedFd> + ?Sized> DescriptorsOfKind for I {}

/// A descriptor that is not of the kind that was wanted. Dropping this closes it, in a way
/// that cannot hold up the loop.
#[derive(Debug)]
pub struct WrongDescriptor {
    wanted: DescriptorKind,
    found: Option<&'static str>,
    /// Invariant: there if something was found, until it is taken.
    fd: Option<OwnedFd>,
}

impl WrongDescriptor {
    /// What was wanted.
    pub fn wanted(&self) -> DescriptorKind {
        self.wanted
    }

    /// What it is instead, in words. `None` if there was none.
    pub fn found(&self) -> Option<&'static str> {
        self.found
    }

    /// The descriptor.
    ///
    /// # Panics
    ///
    /// There was none.
    #[track_caller]
    pub fn into_descriptor(mut self) -> OwnedFd {
        self.fd.take().expect("there was none")
    }
}

impl Drop for WrongDescriptor {
    fn drop(&mut self) {
        if let Some(fd) = self.fd.take() {
            close_received(fd);
        }
    }
}

impl fmt::Display for WrongDescriptor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} was to be passed, and ", self.wanted)?;
        match self.found {
            Some(found) => write!(f, "it was {found}"),
            None => f.write_str("there was none"),
        }
    }
}

impl Error for WrongDescriptor {}

/// A socket of a kind that is told apart here.
#[derive(PartialEq, Eq)]
enum Found {
    TcpListener,
    TcpStream,
    UnixListener,
    UnixStream,
    OtherSocket,
    NoSocket,
}

impl Found {
    fn of(fd: BorrowedFd<'_>) -> Self {
        let Ok(kind) = sys::socket_kind(fd) else {
            return Self::NoSocket;
        };
        if !kind.stream {
            return Self::OtherSocket;
        }
        let is_connected = || sys::peer_name(fd).is_ok();
        match (sys::local_name(fd), kind.domain) {
            (Ok(SocketName::Inet(_)), _) if kind.listening => Self::TcpListener,
            (Ok(SocketName::Inet(_)), _) if is_connected() => Self::TcpStream,
            (Ok(_), Some(Family::Unix)) if kind.listening => Self::UnixListener,
            (Ok(_), Some(Family::Unix)) if is_connected() => Self::UnixStream,
            _ => Self::OtherSocket,
        }
    }
}

/// One that was waited for has no number any more, and is one still.
fn is_process(fd: BorrowedFd<'_>) -> bool {
    match sys::pid_of(fd) {
        Ok(_) => true,
        Err(error) => sys::is_no_process(&error),
    }
}

/// What a descriptor is, for people.
fn name_of(fd: BorrowedFd<'_>) -> &'static str {
    match Found::of(fd) {
        Found::TcpListener => return "a listening TCP socket",
        Found::TcpStream => return "a connected TCP socket",
        Found::UnixListener => return "a listening UNIX socket",
        Found::UnixStream => return "a connected UNIX socket",
        Found::OtherSocket => return "another socket",
        Found::NoSocket => {}
    }
    match file_kind(fd) {
        Ok(FileKind::Pipe) => "a pipe",
        Ok(FileKind::Socket) => "another socket",
        Ok(FileKind::Directory) => "a directory",
        Ok(FileKind::TerminalMaster) => "a pseudo-terminal",
        Ok(FileKind::Terminal) => "a terminal",
        Ok(FileKind::Regular) if sys::is_sealed(fd).unwrap_or(false) => "sealed memory",
        Ok(FileKind::Regular) => match access(fd) {
            Ok((true, false)) => "a file to be read",
            Ok(_) => "a file to be written",
            Err(_) => "a file",
        },
        Ok(FileKind::Other) if is_event_counter(fd) => "a counter",
        Ok(FileKind::Other) if is_process(fd) => "a process",
        Ok(FileKind::Other) | Err(_) => "something else",
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::net::{TcpListener, TcpStream, UdpSocket};
    use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};

    use super::*;
    use crate::sys::{event_counter, open_terminal, pidfd_open};
    use crate::{EventCounter, SealedMemory};

    type Named = (&'static str, OwnedFd, Vec<DescriptorKind>);

    /// One of everything, and of which kinds it is.
    fn everything() -> Vec<Named> {
        let mut all = sockets();
        all.extend(files());
        all
    }

    fn sockets() -> Vec<Named> {
        use DescriptorKind as Kind;
        let folder = tempfile::tempdir().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let connected = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (accepted, _) = listener.accept().unwrap();
        let (left, _right) = UnixStream::pair().unwrap();
        vec![
            (
                "a listening TCP socket",
                listener.into(),
                vec![Kind::TcpListener],
            ),
            (
                "a connected TCP socket",
                connected.into(),
                vec![Kind::TcpStream],
            ),
            (
                "a listening UNIX socket",
                UnixListener::bind(folder.path().join("socket"))
                    .unwrap()
                    .into(),
                vec![Kind::UnixListener],
            ),
            (
                "a connected TCP socket",
                accepted.into(),
                vec![Kind::TcpStream],
            ),
            (
                "a connected UNIX socket",
                left.into(),
                vec![Kind::UnixStream],
            ),
            (
                "another socket",
                UdpSocket::bind("127.0.0.1:0").unwrap().into(),
                vec![],
            ),
            (
                "another socket",
                UnixDatagram::unbound().unwrap().into(),
                vec![],
            ),
        ]
    }

    fn files() -> Vec<Named> {
        use DescriptorKind as Kind;
        let (reads, writes) = std::io::pipe().unwrap();
        let (master, side) = open_terminal().unwrap();
        let memory = SealedMemory::new("kinds", &[7; 100]).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let written = File::create(folder.path().join("file")).unwrap();
        let read = File::open(folder.path().join("file")).unwrap();
        let own = std::process::id();
        vec![
            ("a pipe", reads.into(), vec![Kind::Pipe]),
            ("a pipe", writes.into(), vec![Kind::Pipe]),
            // It is none any more when the other side is closed.
            ("a terminal", side, vec![Kind::Terminal]),
            (
                "a pseudo-terminal",
                master,
                vec![Kind::TerminalMaster, Kind::Terminal],
            ),
            (
                "sealed memory",
                memory.into_descriptor(),
                vec![Kind::SealedMemory { at_least: 100 }],
            ),
            ("a file to be written", written.into(), vec![]),
            ("a file to be read", read.into(), vec![Kind::ReadOnlyFile]),
            (
                "a counter",
                event_counter().unwrap(),
                vec![Kind::EventCounter],
            ),
            ("a process", pidfd_open(own).unwrap(), vec![Kind::Pidfd]),
            ("a directory", File::open("/").unwrap().into(), vec![]),
            (
                "something else",
                File::open("/dev/null").unwrap().into(),
                vec![],
            ),
        ]
    }

    #[test]
    fn each_kind_takes_its_own_and_nothing_else() {
        let kinds = [
            DescriptorKind::TcpListener,
            DescriptorKind::TcpStream,
            DescriptorKind::UnixListener,
            DescriptorKind::UnixStream,
            DescriptorKind::EventCounter,
            DescriptorKind::TerminalMaster,
            DescriptorKind::Terminal,
            DescriptorKind::SealedMemory { at_least: 100 },
            DescriptorKind::Pidfd,
            DescriptorKind::ReadOnlyFile,
            DescriptorKind::Pipe,
        ];
        for (name, fd, its) in everything() {
            assert_eq!(name_of(fd.as_fd()), name);
            for kind in kinds {
                let is_its = its.contains(&kind);
                assert_eq!(kind.is_kind_of(fd.as_fd()), is_its, "{name} as {kind:?}");
            }
        }
        let memory = SealedMemory::new("kinds", &[7; 100]).unwrap();
        let longer = DescriptorKind::SealedMemory { at_least: 101 };
        assert!(!longer.is_kind_of(memory.as_fd()));
    }

    #[test]
    fn wrong_one_comes_back_or_is_closed_and_so_are_those_before_it() {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let counter = OwnedFd::from(EventCounter::new().unwrap());
        let mut its = vec![OwnedFd::from(theirs), counter].into_iter();
        let wanted = [DescriptorKind::UnixStream, DescriptorKind::Pipe];
        let error = its.take_kinds(wanted).unwrap_err();
        assert_eq!(
            error.to_string(),
            "a pipe was to be passed, and it was a counter"
        );
        assert_eq!(error.wanted(), DescriptorKind::Pipe);
        let counter = EventCounter::from_descriptor(error.into_descriptor());
        assert!(counter.is_ok(), "it comes back");
        // The first was closed: its other side ends.
        assert_eq!(std::io::Read::read(&mut ours, &mut [0]).unwrap(), 0);
        let error = its.take_kind(DescriptorKind::Pipe).unwrap_err();
        assert_eq!(error.found(), None);
    }
}
