//! The callbacks of a child process, and what they may ask of it.

use std::borrow::Cow;
use std::error::Error;
use std::fmt;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::time::Duration;

use bowline_reactor::{Description, Handle, Reactor};

use crate::context::Context;
use crate::producer::{Producer, ProducerRef};
use crate::protocol::{AtDrain, Part, short_type_name};
use crate::reason::CloseReason;
use crate::transport::{Transport, TransportHandle, WriteStatus};

/// The handle of a child process. See [`Reactor::get`].
pub type ProcessHandle = Handle<dyn ProcessTransport>;

/// The callbacks of one child process.
///
/// A child has descriptors under numbers: pipes, a terminal, files. The numbers are chosen
/// when it is started. If we have the other end of one, the number is a *stream*, with
/// everything that a [`Transport`] has ([`ProcessContext::stream`]). The bytes of each
/// stream arrive here, with its number. A stream can also have a
/// [`Protocol`](crate::Protocol) of its own. Then its bytes arrive there, and not here.
///
/// # Order
///
/// 1. [`connection_made`](Self::connection_made), once.
/// 2. [`child_data_received`](Self::child_data_received) any number of times, and
///    [`child_connection_lost`](Self::child_connection_lost) once for each stream.
/// 3. [`process_exited`](Self::process_exited), once, when the child has exited. It can
///    come before, between or after the calls of 2. A child can close everything long
///    before it exits, and its last bytes can be read long after.
/// 4. [`process_ended`](Self::process_ended), once and last, when the child has exited and
///    all streams have ended or were given up. The protocol is dropped afterwards.
///
/// (Twisted: `ProcessProtocol`.)
///
/// # Callbacks never nest
///
/// No callback is ever called from inside another, as with
/// [`Protocol`](crate::Protocol#callbacks-never-nest).
///
/// # Panics
///
/// After a panic in a callback, all streams of the process are given up. The child is not
/// killed. The protocol is still told of its exit and its end.
pub trait ProcessProtocol: Part {
    /// The child runs its program. Called once, first.
    fn connection_made(&mut self, cx: &mut ProcessContext<'_>) {
        let _ = cx;
    }

    /// The child has written bytes under `number`. They are any piece of the stream.
    /// (Twisted: `childDataReceived`.)
    ///
    /// A terminal can have several numbers. Its bytes arrive under 1 if it has that number,
    /// and else under its lowest number.
    fn child_data_received(&mut self, cx: &mut ProcessContext<'_>, number: u32, data: &[u8]);

    /// The stream under `number` has ended. Called once for each stream. From now on,
    /// [`ProcessContext::stream`] does not find it. (Twisted: `childConnectionLost`.)
    ///
    /// Either we have closed it, or the child has, and everybody who got it from the child.
    /// If we wrote to it and nobody reads it any more, `reason` is
    /// [`Lost`](CloseReason::Lost) with `BrokenPipe`.
    fn child_connection_lost(
        &mut self,
        cx: &mut ProcessContext<'_>,
        number: u32,
        reason: &CloseReason,
    ) {
        let _ = (cx, number, reason);
    }

    /// The child has exited, or was killed. Called once, when that happens. (Twisted:
    /// `processExited`.)
    ///
    /// Bytes that it wrote may still arrive. Processes that it has started may go on, and
    /// write more. The child itself can receive no more signals.
    fn process_exited(&mut self, cx: &mut ProcessContext<'_>, status: ProcessStatus) {
        let _ = (cx, status);
    }

    /// The child has exited, and every stream has ended. Called once, last. (Twisted:
    /// `processEnded`.)
    ///
    /// If the reactor stops first, the status is
    /// [`ReactorStopped`](ProcessStatus::ReactorStopped), and
    /// [`process_exited`](Self::process_exited) was not called.
    fn process_ended(&mut self, cx: &mut ProcessContext<'_>, status: ProcessStatus) {
        let _ = (cx, status);
    }

    /// The reactor stops gracefully. Called once at the most.
    ///
    /// The default, [`DoNotWait`](AtDrain::DoNotWait), leaves the child alone. With
    /// [`GoOn`](AtDrain::GoOn) the stop waits for its end. With
    /// [`LoseWhenIdle`](AtDrain::LoseWhenIdle) the stop waits too, and closes the streams
    /// that are only written, such as standard input. Many programs then end.
    fn draining(&mut self, cx: &mut ProcessContext<'_>) -> AtDrain {
        let _ = cx;
        AtDrain::DoNotWait
    }

    /// Stop writing to the stream under `number`: its buffer is above the high watermark.
    /// Called if this protocol is registered as the producer of the stream
    /// ([`ProducerRef::Protocol`]).
    fn pause_producing(&mut self, cx: &mut ProcessContext<'_>, number: u32) {
        let _ = (cx, number);
    }

    /// Go on writing to the stream under `number`, or write one portion. Called for a
    /// registered producer, like [`pause_producing`](Self::pause_producing).
    fn resume_producing(&mut self, cx: &mut ProcessContext<'_>, number: u32) {
        let _ = (cx, number);
    }

    /// The stream under `number` is lost. Called for a registered producer, like
    /// [`pause_producing`](Self::pause_producing).
    fn stop_producing(&mut self, cx: &mut ProcessContext<'_>, number: u32) {
        let _ = (cx, number);
    }

    /// Adds what the protocol says of itself to who looks into the reactor; see
    /// [`Protocol::describe`](crate::Protocol::describe).
    fn describe(&self, description: &mut Description) {
        description.section(self.log_prefix().into_owned());
    }

    /// The name of this protocol in log lines. By default it is the name of its type.
    fn log_prefix(&self) -> Cow<'_, str> {
        Cow::Borrowed(short_type_name::<Self>())
    }
}

/// A child process, as its protocol and everybody with its [handle](ProcessHandle) see it.
/// (Twisted: `IProcessTransport`.)
///
/// Every method may be called from any callback. None of them calls a protocol.
pub trait ProcessTransport: 'static {
    /// Its process id. Once the child has exited, another process may have this number.
    fn pid(&self) -> u32;

    /// Its handle, by which others reach it. After
    /// [`process_ended`](ProcessProtocol::process_ended) it reaches nothing.
    fn handle(&self) -> ProcessHandle;

    /// Returns the stream under `number`, while it is open. All numbers of a terminal have
    /// the same stream.
    fn stream(&self, number: u32) -> Option<TransportHandle>;

    /// Returns all open streams, the lowest number first. The stream of a terminal is
    /// listed for each of its numbers.
    fn streams(&self) -> Vec<(u32, TransportHandle)>;

    /// Whether the child is known to have exited.
    fn has_exited(&self) -> bool;

    /// Sends a signal to the child. (Twisted: `signalProcess`.)
    ///
    /// The signal is sent with the child's pidfd (pidfd_send_signal(2)). So it never
    /// reaches another process that has got the same number since.
    ///
    /// # Errors
    ///
    /// [`SignalError::ExitedAlready`] if the child has exited. Otherwise those of the
    /// kernel.
    fn signal_process(&mut self, signal: i32) -> Result<(), SignalError>;

    /// Sends a signal to every process of the group that the child leads. This also works
    /// after the child itself has exited (since Linux 6.9).
    ///
    /// # Errors
    ///
    /// [`SignalError::NoGroup`] if the child was not started as the leader of a group.
    /// [`SignalError::ExitedAlready`] if no process is left in the group.
    fn signal_group(&mut self, signal: i32) -> Result<(), SignalError>;

    /// Kills the child (SIGKILL).
    ///
    /// # Errors
    ///
    /// As [`signal_process`](Self::signal_process).
    fn kill(&mut self) -> Result<(), SignalError>;

    /// Ends the child, gently at first: sends SIGTERM now. Sends SIGKILL after `grace`, if
    /// the process has not [ended](ProcessProtocol::process_ended) by then.
    ///
    /// If the child leads a group, both signals go to the whole group. A stopped process is
    /// continued, so that it can react. Streams that are still open one second after the
    /// SIGKILL are given up. If this is called again, the earlier SIGKILL counts.
    fn terminate_within(&mut self, grace: Duration);

    /// Closes every stream, later in this turn. Unsent and unread bytes are dropped.
    ///
    /// A child can leave processes behind that hold its streams, and that go on for ever.
    /// After this call, the end does not wait for them.
    fn give_up_streams(&mut self);

    /// Sets the size of the child's terminal. The processes in its foreground get SIGWINCH.
    ///
    /// # Errors
    ///
    /// `NotConnected` if the child has no terminal, or it is closed.
    fn set_terminal_size(&mut self, size: TerminalSize) -> io::Result<()>;
}

impl fmt::Debug for dyn ProcessTransport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ProcessTransport")
            .field("pid", &self.pid())
            .field("has_exited", &self.has_exited())
            .finish_non_exhaustive()
    }
}

/// The argument of the callbacks of a process: the process, its streams, and the reactor.
pub struct ProcessContext<'a> {
    /// The process.
    pub process: &'a mut dyn ProcessTransport,
    /// The reactor.
    pub reactor: &'a mut Reactor,
    /// The stream whose callback runs. The reactor does not give it out meanwhile.
    own: Option<&'a mut dyn Transport>,
}

impl<'a> ProcessContext<'a> {
    /// Makes a context, for code that drives processes, and for tests. `own` is the stream
    /// whose callback runs, if there is one.
    pub fn new(
        process: &'a mut dyn ProcessTransport,
        reactor: &'a mut Reactor,
        own: Option<&'a mut dyn Transport>,
    ) -> Self {
        Self {
            process,
            reactor,
            own,
        }
    }

    /// Returns the stream under `number`: a transport with watermarks, producers and
    /// pauses. `None` if there is no such stream, or if it has ended.
    ///
    /// # Examples
    ///
    /// An upload is read only as fast as the child reads it:
    ///
    /// ```
    /// # use bowline::process::ProcessContext;
    /// # use bowline::{ProducerKind, TransportHandle};
    /// fn feed(cx: &mut ProcessContext<'_>, upload: TransportHandle) {
    ///     if let Some(stdin) = cx.stream(0) {
    ///         let _ = stdin.register_producer(upload.into(), ProducerKind::Push);
    ///     }
    /// }
    /// ```
    pub fn stream(&mut self, number: u32) -> Option<&mut dyn Transport> {
        let handle = self.process.stream(number)?;
        self.get(handle)
    }

    /// Returns any transport by its handle. See [`Context::get`].
    pub fn get(&mut self, handle: TransportHandle) -> Option<&mut dyn Transport> {
        match &mut self.own {
            Some(own) if own.handle() == handle => Some(&mut **own),
            _ => self.reactor.get(handle),
        }
    }

    /// Writes to the stream under `number`. Returns `Refused` if there is no such stream,
    /// or if it has ended. (Twisted: `writeToChild`.)
    pub fn write_to_child(&mut self, number: u32, data: &[u8]) -> WriteStatus {
        match self.stream(number) {
            Some(stream) => stream.write(data),
            None => WriteStatus::Refused,
        }
    }

    /// Writes to the child's standard input.
    pub fn write(&mut self, data: &[u8]) -> WriteStatus {
        self.write_to_child(0, data)
    }

    /// Closes the stream under `number` once everything written to it was sent. Returns
    /// whether there is such a stream. (Twisted: `closeChildFD`.)
    ///
    /// The child then reads the end of its input. If it writes, it is told that nobody
    /// reads (SIGPIPE, `EPIPE`). A terminal hangs up.
    pub fn close_child_fd(&mut self, number: u32) -> bool {
        match self.stream(number) {
            Some(stream) => {
                stream.lose_connection();
                true
            }
            None => false,
        }
    }

    /// Closes the child's standard input once everything was sent. Returns whether there is
    /// such a stream to close. (Twisted: `closeStdin`.)
    ///
    /// Does nothing, and returns false, if that is the terminal, since the child would lose
    /// the whole terminal. On a terminal, the end of the input is a byte, by default 4
    /// (Ctrl-D).
    pub fn close_stdin(&mut self) -> bool {
        self.close_one(0)
    }

    /// Closes our end of the child's standard output. Does nothing, and returns false, if
    /// that is the terminal.
    pub fn close_stdout(&mut self) -> bool {
        self.close_one(1)
    }

    /// Closes our end of the child's standard error. Does nothing, and returns false, if
    /// that is the terminal.
    pub fn close_stderr(&mut self) -> bool {
        self.close_one(2)
    }

    fn close_one(&mut self, number: u32) -> bool {
        let all = self.process.streams();
        let Some((_, wanted)) = all.iter().find(|(it, _)| *it == number) else {
            return false;
        };
        let has_others = all.iter().filter(|(_, it)| it == wanted).count() > 1;
        !has_others && self.close_child_fd(number)
    }

    /// Stops reading from the child, on all streams, until
    /// [`resume_producing`](Self::resume_producing). The child can write until its pipes
    /// are full.
    pub fn pause_producing(&mut self) {
        for (_, handle) in self.process.streams() {
            if let Some(stream) = self.get(handle) {
                stream.pause_producing();
            }
        }
    }

    /// Reads again.
    pub fn resume_producing(&mut self) {
        for (_, handle) in self.process.streams() {
            if let Some(stream) = self.get(handle) {
                stream.resume_producing();
            }
        }
    }

    /// Closes every stream once everything written to it was sent. (Twisted:
    /// `loseConnection`.)
    pub fn lose_connection(&mut self) {
        for (_, handle) in self.process.streams() {
            if let Some(stream) = self.get(handle) {
                stream.lose_connection();
            }
        }
    }
}

impl fmt::Debug for ProcessContext<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ProcessContext")
            .field("process", &self.process)
            .finish_non_exhaustive()
    }
}

/// How a child process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ProcessStatus {
    /// It exited with a code, or a signal killed it. (Twisted: `ProcessDone`,
    /// `ProcessTerminated`.)
    Exited(ExitStatus),
    /// It exited, and the kernel does not say how. Other code of this program has waited
    /// for it, or SIGCHLD is ignored. Linux 6.15 and later says it even then.
    Unknown,
    /// The reactor stopped. The child goes on without it.
    ReactorStopped,
}

impl ProcessStatus {
    /// Whether the child exited with code 0.
    pub fn is_success(self) -> bool {
        matches!(self, Self::Exited(status) if status.success())
    }

    /// Returns the code that the child exited with.
    pub fn code(self) -> Option<i32> {
        match self {
            Self::Exited(status) => status.code(),
            _ => None,
        }
    }

    /// Returns the signal that killed the child.
    pub fn signal(self) -> Option<i32> {
        match self {
            Self::Exited(status) => status.signal(),
            _ => None,
        }
    }
}

impl fmt::Display for ProcessStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exited(status) => match (status.code(), status.signal()) {
                (Some(code), _) => write!(f, "exited with code {code}"),
                (None, Some(signal)) => write!(f, "killed by signal {signal}"),
                (None, None) => status.fmt(f),
            },
            Self::Unknown => f.write_str("exited, and nobody can tell how"),
            Self::ReactorStopped => f.write_str("the reactor stopped before it exited"),
        }
    }
}

/// Why no signal was sent to a process.
#[derive(Debug)]
#[non_exhaustive]
pub enum SignalError {
    /// The process has exited. (Twisted: `ProcessExitedAlready`.)
    ExitedAlready,
    /// The process does not lead a process group.
    NoGroup,
    /// The kernel refused, for example with `PermissionDenied` for a process of another
    /// user.
    Os(io::Error),
}

impl fmt::Display for SignalError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ExitedAlready => f.write_str("the process has exited already"),
            Self::NoGroup => f.write_str("the process leads no group"),
            Self::Os(error) => write!(f, "cannot send the signal: {error}"),
        }
    }
}

impl Error for SignalError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::Os(error) => Some(error),
            _ => None,
        }
    }
}

impl From<SignalError> for io::Error {
    fn from(error: SignalError) -> Self {
        match error {
            SignalError::Os(error) => error,
            SignalError::ExitedAlready => Self::new(io::ErrorKind::NotFound, error),
            SignalError::NoGroup => Self::new(io::ErrorKind::InvalidInput, error),
        }
    }
}

/// The size of a terminal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct TerminalSize {
    /// Lines. The default is 24.
    pub rows: u16,
    /// Characters in a line. The default is 80.
    pub columns: u16,
    /// Width in pixels. The default is 0, unknown.
    pub width: u16,
    /// Height in pixels. The default is 0, unknown.
    pub height: u16,
}

bowline_reactor::setters!(TerminalSize {
    rows: u16,
    columns: u16,
    width: u16,
    height: u16,
});

impl Default for TerminalSize {
    fn default() -> Self {
        Self {
            rows: 24,
            columns: 80,
            width: 0,
            height: 0,
        }
    }
}

/// A process as the producer of another transport. A pause stops reading from all its
/// streams.
impl From<ProcessHandle> for ProducerRef {
    fn from(process: ProcessHandle) -> Self {
        Self::boxed(ChildOutput(process))
    }
}

struct ChildOutput(ProcessHandle);

impl ChildOutput {
    fn each(&self, cx: &mut Context<'_, dyn Transport>, call: fn(&mut dyn Transport)) {
        let streams = cx.reactor.get(self.0).map(|process| process.streams());
        for (_, handle) in streams.unwrap_or_default() {
            if let Some(stream) = cx.get(handle)
                && stream.is_open_for_reading()
            {
                call(stream);
            }
        }
    }
}

impl Producer for ChildOutput {
    fn resume_producing(&mut self, cx: &mut Context<'_, dyn Transport>) {
        self.each(cx, |stream| stream.resume_producing());
    }

    fn pause_producing(&mut self, cx: &mut Context<'_, dyn Transport>) {
        self.each(cx, |stream| stream.pause_producing());
    }

    fn stop_producing(&mut self, cx: &mut Context<'_, dyn Transport>) {
        self.each(cx, |stream| stream.lose_connection());
    }
}

/// Forwards every callback to the protocol in the box.
impl<P: ProcessProtocol + ?Sized> ProcessProtocol for Box<P> {
    fn connection_made(&mut self, cx: &mut ProcessContext<'_>) {
        (**self).connection_made(cx);
    }

    fn child_data_received(&mut self, cx: &mut ProcessContext<'_>, number: u32, data: &[u8]) {
        (**self).child_data_received(cx, number, data);
    }

    fn child_connection_lost(
        &mut self,
        cx: &mut ProcessContext<'_>,
        number: u32,
        reason: &CloseReason,
    ) {
        (**self).child_connection_lost(cx, number, reason);
    }

    fn process_exited(&mut self, cx: &mut ProcessContext<'_>, status: ProcessStatus) {
        (**self).process_exited(cx, status);
    }

    fn process_ended(&mut self, cx: &mut ProcessContext<'_>, status: ProcessStatus) {
        (**self).process_ended(cx, status);
    }

    fn draining(&mut self, cx: &mut ProcessContext<'_>) -> AtDrain {
        (**self).draining(cx)
    }

    fn pause_producing(&mut self, cx: &mut ProcessContext<'_>, number: u32) {
        (**self).pause_producing(cx, number);
    }

    fn resume_producing(&mut self, cx: &mut ProcessContext<'_>, number: u32) {
        (**self).resume_producing(cx, number);
    }

    fn stop_producing(&mut self, cx: &mut ProcessContext<'_>, number: u32) {
        (**self).stop_producing(cx, number);
    }

    fn describe(&self, description: &mut Description) {
        (**self).describe(description);
    }

    fn log_prefix(&self) -> Cow<'_, str> {
        (**self).log_prefix()
    }
}
