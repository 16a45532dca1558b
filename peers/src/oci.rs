//! The console socket of OCI runtimes (runc, crun): a runtime passes the terminal of a
//! container to the engine that started it.
//!
//! The engine listens at a path ([`ConsoleSocket`]), and gives the path to the runtime with
//! `--console-socket`. The runtime connects, and sends one message with one descriptor: the
//! master side of a pseudo-terminal. The bytes are a label, of at least one byte and fewer
//! than 4,096: runc sends the name of the file, crun a blank. The engine does not answer.
//! After the message one of the runtimes hangs up and the other does not, so only the
//! message counts.
//!
//! The engine checks what it gets: exactly one descriptor, and that it is a terminal. Then
//! the socket is closed and its file removed, as in conmon: a container has one console.
//!
//! The terminal is a byte stream for [`Pipe`](bowline::Pipe), which does not change its
//! flags, and never blocks on it.
//! [`set_terminal_size`](bowline::process::set_terminal_size) sets its size. It ends when
//! no process of the container has it open any more. The engine has to read it, or the
//! container blocks.
//!
//! # Examples
//!
//! ```no_run
//! use std::time::Duration;
//!
//! use bowline::process::{TerminalSize, set_terminal_size};
//! use bowline::{Context, Pipe, Protocol, Reactor, Transport, Transports};
//! use bowline_peers::oci::ConsoleSocket;
//!
//! struct Screen;
//!
//! impl<T: Transport> Protocol<T> for Screen {
//!     fn data_received(&mut self, _: &mut Context<'_, T>, data: &[u8]) {
//!         print!("{}", String::from_utf8_lossy(data));
//!     }
//! }
//!
//! let mut reactor = Reactor::new()?;
//! let socket = ConsoleSocket::at("/run/engine/7.sock").within(Duration::from_secs(10));
//! socket.listen(&mut reactor, |reactor, console| {
//!     let console = console.expect("the runtime gave one");
//!     let size = TerminalSize::default().rows(40).columns(120);
//!     set_terminal_size(console.terminal(), size).expect("it is a terminal");
//!     reactor.adopt(Pipe, console.into_descriptor(), Screen).expect("it is one");
//! })?;
//! // Here the engine starts `runc run --detach --console-socket /run/engine/7.sock ID`.
//! reactor.run()?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use std::cell::{Cell, RefCell};
use std::error::Error;
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use bowline::descriptor::{DescriptorKind, DescriptorsOfKind as _, WrongDescriptor};
use bowline::error::{ListenError, SendDescriptorError};
use bowline::{
    Address, AnyConnection as _, CloseReason, Context, DelayedCall, ListenerHandle,
    PassedDescriptor, Protocol, Reactor, ReceivedDescriptors, Transports, Unix, UnixStream,
    UnixTransport, WriteStatus,
};

/// A label has to be shorter than this, in bytes, as in runc (`internal/cmsg`).
pub const LABEL_LIMIT: usize = 4_096;

/// The socket at which an engine waits for the console of a container.
#[derive(Clone, Debug)]
#[must_use = "nothing listens before `listen` is called"]
pub struct ConsoleSocket {
    path: PathBuf,
    within: Option<Duration>,
}

/// Called with the console, or with the reason why there is none.
type Taken = Box<dyn FnOnce(&mut Reactor, Result<Console, ConsoleError>)>;

impl ConsoleSocket {
    /// Makes one for a path, at which nothing may exist. Runtimes do not accept names of
    /// the abstract namespace. Only the user of this process may use the file (mode 0600).
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            within: None,
        }
    }

    /// Sets how long the runtime may take; no limit by default.
    pub fn within(mut self, limit: Duration) -> Self {
        self.within = Some(limit);
        self
    }

    /// Listens until a runtime has connected, and calls `taken` once. Then the socket is
    /// closed and its file removed.
    ///
    /// `taken` is also called, with an error, if the listener is stopped first or the
    /// reactor stops. To give up, stop the returned listener.
    ///
    /// # Errors
    ///
    /// The path cannot be bound.
    pub fn listen(
        self,
        reactor: &mut Reactor,
        taken: impl FnOnce(&mut Reactor, Result<Console, ConsoleError>) + 'static,
    ) -> Result<ListenerHandle, ListenError> {
        let desk = Rc::new(Desk {
            taken: RefCell::new(Some(Box::new(taken))),
            listener: Cell::new(None),
            deadline: Cell::new(None),
        });
        let factory = Accepting(Rc::clone(&desk));
        let listener = reactor.listen(Unix::at(self.path).mode(0o600), factory)?;
        desk.listener.set(Some(listener));
        if let Some(limit) = self.within {
            let late = Rc::downgrade(&desk);
            let call = reactor.call_later(limit, move |reactor| {
                if let Some(desk) = late.upgrade() {
                    desk.deadline.set(None);
                    desk.end(reactor, Err(ConsoleError::TimedOut));
                }
            });
            desk.deadline.set(Some(call));
        }
        Ok(listener)
    }
}

/// The console of a container: the master side of its terminal.
#[derive(Debug)]
pub struct Console {
    terminal: OwnedFd,
    label: Vec<u8>,
}

impl Console {
    /// Returns the console of a runtime's message: of its bytes, and of the descriptors that
    /// came with them. [`ConsoleSocket`] does this by itself. Use this only if your program
    /// has a listener of its own.
    ///
    /// # Errors
    ///
    /// The message is no console. Its descriptors are closed.
    pub fn of(
        label: &[u8],
        descriptors: &mut ReceivedDescriptors<'_>,
    ) -> Result<Self, ConsoleError> {
        let count = descriptors.len();
        if count != 1 {
            return Err(ConsoleError::NotOne { count });
        }
        if label.len() >= LABEL_LIMIT {
            return Err(ConsoleError::LongLabel);
        }
        let terminal = descriptors.take_kind(DescriptorKind::TerminalMaster);
        Ok(Self {
            terminal: terminal.map_err(ConsoleError::Wrong)?,
            label: label.to_vec(),
        })
    }

    /// Returns the terminal, for example to set its size.
    pub fn terminal(&self) -> BorrowedFd<'_> {
        self.terminal.as_fd()
    }

    /// Returns the label, at least one byte: `/dev/ptmx`, or a blank.
    pub fn label(&self) -> &[u8] {
        &self.label
    }

    /// Returns the terminal, to be adopted as a [`Pipe`](bowline::Pipe). It may be
    /// blocking, and is close-on-exec.
    pub fn into_descriptor(self) -> OwnedFd {
        self.terminal
    }
}

/// Why there is no console.
#[derive(Debug)]
#[non_exhaustive]
pub enum ConsoleError {
    /// The message did not have exactly one descriptor. All of them are closed.
    NotOne {
        /// How many arrived.
        count: usize,
    },
    /// The descriptor is not a terminal. Dropping this closes it.
    Wrong(WrongDescriptor),
    /// The label does not end, or is too long.
    LongLabel,
    /// The runtime has hung up without a message. It has probably failed.
    NoMessage,
    /// No message came in time.
    TimedOut,
    /// The listener was stopped.
    Stopped,
}

impl fmt::Display for ConsoleError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotOne { count } => {
                write!(f, "runtime passed {count} descriptors for a console")
            }
            Self::Wrong(error) => write!(f, "runtime passed no console: {error}"),
            Self::LongLabel => f.write_str("runtime sent a label of too many bytes"),
            Self::NoMessage => f.write_str("runtime hung up before it passed a console"),
            Self::TimedOut => f.write_str("runtime passed no console in time"),
            Self::Stopped => f.write_str("the console socket was closed"),
        }
    }
}

impl Error for ConsoleError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::Wrong(error) => Some(error),
            _ => None,
        }
    }
}

/// Sends the master side of a terminal to an engine, as a runtime does. The label has at
/// least one byte, and fewer than [`LABEL_LIMIT`].
///
/// # Errors
///
/// The transport refuses it, for example because the label is empty. The error returns the
/// descriptor.
pub fn send_console<T: UnixTransport>(
    transport: &mut T,
    terminal: PassedDescriptor,
    label: &[u8],
) -> Result<WriteStatus, SendDescriptorError> {
    let length = label.len().min(LABEL_LIMIT - 1);
    transport.write_with_descriptors(&label[..length], vec![terminal])
}

/// Where the result goes, once.
struct Desk {
    taken: RefCell<Option<Taken>>,
    listener: Cell<Option<ListenerHandle>>,
    deadline: Cell<Option<DelayedCall>>,
}

impl Desk {
    fn end(&self, reactor: &mut Reactor, result: Result<Console, ConsoleError>) {
        let Some(taken) = self.taken.take() else {
            return;
        };
        if let Some(call) = self.deadline.take() {
            // It may be what runs.
            let _ = call.cancel(reactor);
        }
        if let Some(listener) = self.listener.take().and_then(|it| reactor.get(it)) {
            listener.stop_listening();
        }
        taken(reactor, result);
    }
}

struct Accepting(Rc<Desk>);

impl bowline::Factory for Accepting {
    type Protocol = Taker;

    fn build_protocol(&mut self, cx: &mut bowline::BuildContext<'_>, _: &Address) -> Option<Taker> {
        // The first that connects is the runtime.
        if let Some(listener) = cx.listener() {
            listener.pause_accepting();
        }
        Some(Taker(Rc::clone(&self.0)))
    }

    fn stopped(&mut self, cx: &mut bowline::BuildContext<'_>) {
        self.0.end(cx.reactor, Err(ConsoleError::Stopped));
    }
}

/// The connection of a runtime.
struct Taker(Rc<Desk>);

impl Taker {
    fn end(&self, cx: &mut Context<'_, UnixStream>, result: Result<Console, ConsoleError>) {
        cx.transport.lose_connection();
        self.0.end(cx.reactor, result);
    }
}

impl Protocol<UnixStream> for Taker {
    fn data_received(&mut self, cx: &mut Context<'_, UnixStream>, _: &[u8]) {
        self.end(cx, Err(ConsoleError::NotOne { count: 0 }));
    }

    fn descriptors_received(
        &mut self,
        cx: &mut Context<'_, UnixStream>,
        descriptors: &mut ReceivedDescriptors<'_>,
        data: &[u8],
    ) {
        self.end(cx, Console::of(data, descriptors));
    }

    fn connection_lost(&mut self, cx: &mut Context<'_, UnixStream>, _: &CloseReason) {
        self.0.end(cx.reactor, Err(ConsoleError::NoMessage));
    }
}
