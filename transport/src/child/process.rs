//! A child process with its protocol and its streams. The reactor drives it. Its
//! streams are connections, which the reactor drives too.

use std::any::Any;
use std::borrow::Cow;
use std::cell::{Cell, RefCell};
use std::ffi::OsString;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, ExitStatus};
use std::rc::Rc;
use std::time::Duration;

use bowline_protocol::{
    AtDrain, ProcessContext, ProcessHandle, ProcessProtocol, ProcessStatus, ProcessTransport,
    Protocol, SignalError, TerminalSize, Transport, TransportHandle,
};
use bowline_reactor::signal::{SIGCONT, SIGKILL, SIGTERM};
use bowline_reactor::{
    DelayedCall, Description, Descriptor, DrainRound, Hold, Next, Panic, Phase, Reactor, Readiness,
    SystemEvent, Token, TriggerId,
};

use super::command::ChildCommand;
use super::error::{SpawnError, SpawnStep};
use super::pidfd::Numbered;
use super::streams::{OpenStream, Planned, by_number, with_protocol};
use super::{ChildProcess, ChildWatch, Pidfd};
use crate::endpoint::{Adopt, AdoptTransport};
use crate::error::CallError;
use crate::kinds::Pipe;
use crate::log;
use crate::stream::StreamTransport;
use crate::sys::{self, Launched};

/// How long the streams of a child may stay open after it was killed for being late.
/// They end when the last process that holds them does. If all were killed, that is at
/// once.
const AFTER_KILL: Duration = Duration::from_secs(1);

/// How often a child is asked whether it has exited if the kernel cannot report that:
/// before Linux 5.3, or without a free descriptor number.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// How long a child and its streams may go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ProcessSettings {
    /// A child that runs longer than this is
    /// [terminated](ProcessTransport::terminate_within). The default is `None`, no
    /// limit.
    pub time_limit: Option<Duration>,
    /// How long the child then has before it is killed. The default is 5 s.
    pub grace: Duration,
    /// How long streams may stay open after the child has exited. Other processes can
    /// hold them, mostly processes that the child has started. After this time they are
    /// [given up](ProcessTransport::give_up_streams), except for a stream whose reading
    /// is paused here. The default is `None`, no limit.
    pub streams_after_exit: Option<Duration>,
    /// When the reactor stops, the child is terminated, and is killed if it runs longer
    /// than this. The stop waits for that. A graceful stop lets connections end first.
    /// With `None`, the default, the child is left alone, and its streams close.
    pub stop_within: Option<Duration>,
}

bowline_reactor::setters!(ProcessSettings {
    time_limit: Option<Duration>,
    grace: Duration,
    streams_after_exit: Option<Duration>,
    stop_within: Option<Duration>,
});

impl Default for ProcessSettings {
    fn default() -> Self {
        Self {
            time_limit: None,
            grace: Duration::from_secs(5),
            streams_after_exit: None,
            stop_within: None,
        }
    }
}

/// A child that no [`ChildCommand`] started, with our ends of its streams. It is
/// [adopted](crate::Transports::adopt_process).
///
/// A child of std comes with its pipes, under 0, 1 and 2:
///
/// ```
/// use std::process::{Command, Stdio};
/// use bowline::process::{ProcessContext, ProcessProtocol, ProcessStatus};
/// use bowline::{Reactor, Transports};
///
/// struct Prints;
///
/// impl ProcessProtocol for Prints {
///     fn child_data_received(&mut self, _: &mut ProcessContext<'_>, number: u32, data: &[u8]) {
///         assert_eq!((number, data), (1, &b"hello\n"[..]));
///     }
///
///     fn process_ended(&mut self, cx: &mut ProcessContext<'_>, status: ProcessStatus) {
///         assert!(status.is_success());
///         let _ = cx.reactor.stop();
///     }
/// }
///
/// let mut reactor = Reactor::new()?;
/// let child = Command::new("echo").arg("hello").stdout(Stdio::piped()).spawn()?;
/// reactor.adopt_process(child.into(), Prints)?;
/// reactor.run()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct RunningChild {
    process: Box<dyn ChildProcess>,
    program: OsString,
    streams: Vec<Planned>,
    settings: ProcessSettings,
    leads_group: bool,
}

impl RunningChild {
    /// Makes one of a process without streams. It need not be a child of this program.
    pub fn new(process: impl ChildProcess) -> Self {
        let program = OsString::from(format!("process {}", process.pid()));
        Self::of(Box::new(process), program)
    }

    pub(super) fn of(process: Box<dyn ChildProcess>, program: OsString) -> Self {
        Self {
            process,
            program,
            streams: Vec::new(),
            settings: ProcessSettings::default(),
            leads_group: false,
        }
    }

    /// Adds a stream: our end of the descriptor that the child has under `number`. Its
    /// bytes go to the process protocol. A stream that was added earlier under this
    /// number is dropped.
    #[must_use]
    pub fn stream<K: Adopt + 'static>(self, number: u32, kind: K, source: K::Source) -> Self
    where
        K::Source: 'static,
        AdoptTransport<K>: StreamTransport,
    {
        let install = by_number(number, kind, source);
        self.planned(Planned::new(number, install))
    }

    /// As [`stream`](Self::stream), with a protocol of its own for the stream.
    #[must_use]
    pub fn stream_with<K: Adopt + 'static>(
        self,
        number: u32,
        kind: K,
        source: K::Source,
        protocol: impl Protocol<AdoptTransport<K>>,
    ) -> Self
    where
        K::Source: 'static,
        AdoptTransport<K>: StreamTransport,
    {
        let install = with_protocol(kind, source, protocol);
        self.planned(Planned::new(number, install))
    }

    pub(super) fn planned(mut self, plan: Planned) -> Self {
        for earlier in &mut self.streams {
            earlier.numbers.retain(|it| !plan.numbers.contains(it));
        }
        self.streams.retain(|earlier| !earlier.numbers.is_empty());
        self.streams.push(plan);
        self
    }

    /// Sets how long the child and its streams may go on.
    #[must_use]
    pub fn settings(mut self, settings: ProcessSettings) -> Self {
        self.settings = settings;
        self
    }

    /// Says that the process leads a process group. Signals can then be sent to all of
    /// it.
    #[must_use]
    pub fn leads_group(mut self) -> Self {
        self.leads_group = true;
        self
    }
}

impl fmt::Debug for RunningChild {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RunningChild")
            .field("pid", &self.process.pid())
            .field("streams", &self.streams.len())
            .finish_non_exhaustive()
    }
}

impl From<Child> for RunningChild {
    fn from(mut child: Child) -> Self {
        let stdin = child.stdin.take();
        let stdout = child.stdout.take();
        let stderr = child.stderr.take();
        let program = OsString::from(format!("process {}", child.id()));
        let mut this = Self::of(process_of(child), program);
        if let Some(stdin) = stdin {
            this = this.stream(0, Pipe::writing(), stdin.into());
        }
        if let Some(stdout) = stdout {
            this = this.stream(1, Pipe::reading(), stdout.into());
        }
        if let Some(stderr) = stderr {
            this = this.stream(2, Pipe::reading(), stderr.into());
        }
        this
    }
}

/// The child by its pidfd, or by its number if it has none. It was just started here,
/// and nobody has waited for it. So the number is its own even if it has exited.
/// Opening the pidfd does not wait for it, so its group can still be signalled.
pub(super) fn started(child: Child) -> Box<dyn ChildProcess> {
    match Pidfd::open(child.id()) {
        Ok(process) => Box::new(process),
        Err(_) => Box::new(child),
    }
}

/// A child that std knows nothing of, by its pidfd, or by its number if it has none.
pub(super) fn launched(Launched { pid, pidfd }: Launched) -> Box<dyn ChildProcess> {
    match pidfd {
        Some(fd) => Box::new(Pidfd::of_child(fd, pid)),
        None => match Pidfd::open(pid) {
            Ok(process) => Box::new(process),
            Err(_) => Box::new(Numbered::new(pid)),
        },
    }
}

/// The child by its pidfd, or by its number if it has none.
fn process_of(mut child: Child) -> Box<dyn ChildProcess> {
    // The number of a child that was waited for may be another's.
    if matches!(child.try_wait(), Ok(None))
        && let Ok(process) = Pidfd::open(child.id())
    {
        return Box::new(process);
    }
    Box::new(child)
}

pub(crate) fn spawn_process(
    reactor: &mut Reactor,
    command: ChildCommand<'_>,
    protocol: impl ProcessProtocol,
) -> Result<ProcessHandle, SpawnError> {
    let running = command.start()?;
    adopt_process(reactor, running, protocol)
}

pub(crate) fn adopt_process(
    reactor: &mut Reactor,
    running: RunningChild,
    protocol: impl ProcessProtocol,
) -> Result<ProcessHandle, SpawnError> {
    let RunningChild {
        process,
        program,
        streams,
        settings,
        leads_group,
    } = running;
    let failed = |error| SpawnError {
        program,
        step: SpawnStep::Watch,
        error,
    };
    let pid = process.pid();
    let attended = |token| Attended::new(token, (pid, leads_group), settings, Box::new(protocol));
    // Registered before its streams. At a stop the reactor tells newer ones first, so
    // this comes last.
    let this = match install(reactor, attended) {
        Ok(this) => this,
        Err(error) => {
            abandon(reactor, process);
            return Err(failed(error));
        }
    };
    let token = this.token;
    // With this, the process protocol is told of the beginning before any stream is.
    reactor.notify(token);
    if let Err(error) = this.install_streams(reactor, streams) {
        this.stage.set(ProcessStage::Over);
        for (_, stream) in this.streams.take() {
            reactor.remove(stream.handle.token());
        }
        reactor.remove(token);
        abandon(reactor, process);
        return Err(failed(error));
    }
    let exited = Rc::downgrade(&this);
    let watch = ChildWatch::start(reactor, process, move |reactor, status| {
        if let Some(this) = exited.upgrade() {
            this.exited(reactor, status);
        }
    });
    watch.look_every(reactor, LOOK_EVERY);
    this.watch.replace(Some(watch));
    this.begin(reactor);
    log::debug!(target: log::TRANSPORT, "{token}: process {pid} was started");
    Ok(ProcessHandle::new(token, view_of))
}

fn install(
    reactor: &mut Reactor,
    make: impl FnOnce(Token) -> Attended,
) -> io::Result<Rc<Attended>> {
    let vacancy = reactor.vacancy()?;
    let this = Rc::new(make(vacancy.token()));
    let view = View(Rc::clone(&this));
    vacancy.install(Box::new(ProcessSlot { view }));
    Ok(this)
}

/// Ends a child whose protocol is never told.
fn abandon(reactor: &mut Reactor, mut process: Box<dyn ChildProcess>) {
    if let Err(error) = process.kill() {
        log::warn!(target: log::TRANSPORT, "cannot kill process {}: {error}", process.pid());
    }
    let watch = ChildWatch::start(reactor, process, |_, _| {});
    watch.look_every(reactor, LOOK_EVERY);
}

fn view_of(facet: &mut dyn Any) -> Option<&mut (dyn ProcessTransport + 'static)> {
    facet.downcast_mut::<View>().map(|view| view as _)
}

pub(crate) fn call_process_protocol<P: 'static>(
    reactor: &mut Reactor,
    handle: ProcessHandle,
    call: impl FnOnce(&mut P, &mut ProcessContext<'_>) + 'static,
    otherwise: impl FnOnce(&mut Reactor, CallError) + 'static,
) {
    reactor.enter(handle.token(), move |descriptor, reactor| {
        let mut call = Some(call);
        let mut error = CallError::Lost;
        let process = descriptor.map(|it| it.facet().downcast_ref().map(|View(it)| Rc::clone(it)));
        let next = match process {
            None => Next::Keep,
            Some(None) => {
                error = CallError::WrongTransport;
                Next::Keep
            }
            Some(Some(process)) => {
                process.tell(reactor, None, |protocol, cx| {
                    error = CallError::WrongProtocol;
                    if let Some(part) = protocol.as_any_mut().downcast_mut::<P>()
                        && let Some(call) = call.take()
                    {
                        call(part, cx);
                    }
                });
                process.work(reactor)
            }
        };
        if call.is_some() {
            // A call of its own, so that its panic does not end the process.
            reactor.defer(move |reactor| otherwise(reactor, error));
        }
        next
    });
}

/// The last stage that the protocol was told of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ProcessStage {
    Running,
    Exited,
    /// The protocol is told nothing more.
    Over,
}

/// Requests that can only be met with the reactor at hand.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Wishes {
    /// Kill the child after this time.
    kill_after: Option<Duration>,
    /// Give up all streams.
    gives_up: bool,
}

/// Delayed calls that have not run yet.
#[derive(Clone, Copy, Debug, Default)]
struct Deadlines {
    time_limit: Option<DelayedCall>,
    kill: Option<DelayedCall>,
    /// Gives up the streams that are still open.
    give_up: Option<DelayedCall>,
}

/// A process from its start to its end. Its slot and its streams share it.
pub(super) struct Attended {
    token: Token,
    pid: u32,
    leads_group: bool,
    settings: ProcessSettings,
    /// Borrowed only while one of its callbacks runs. Callbacks never nest.
    protocol: RefCell<Box<dyn ProcessProtocol>>,
    was_made: Cell<bool>,
    stage: Cell<ProcessStage>,
    /// `Some` once it is known, even if it was not told yet.
    status: Cell<Option<ProcessStatus>>,
    /// `None` only while this is being set up.
    watch: RefCell<Option<ChildWatch>>,
    /// The streams by number, the lowest first.
    streams: RefCell<Vec<(u32, OpenStream)>>,
    /// The terminal, and the token of its stream.
    terminal: RefCell<Option<(Token, OwnedFd)>>,
    wishes: Cell<Wishes>,
    was_killed: Cell<bool>,
    was_told_to_drain: Cell<bool>,
    calls: Cell<Deadlines>,
    at_stop: Cell<Option<TriggerId>>,
    /// Keeps the reactor from stopping before the end.
    hold: RefCell<Option<Hold>>,
}

impl Attended {
    fn new(
        token: Token,
        (pid, leads_group): (u32, bool),
        settings: ProcessSettings,
        protocol: Box<dyn ProcessProtocol>,
    ) -> Self {
        Self {
            token,
            pid,
            leads_group,
            settings,
            protocol: RefCell::new(protocol),
            was_made: Cell::new(false),
            stage: Cell::new(ProcessStage::Running),
            status: Cell::default(),
            watch: RefCell::default(),
            streams: RefCell::default(),
            terminal: RefCell::default(),
            wishes: Cell::default(),
            was_killed: Cell::new(false),
            was_told_to_drain: Cell::new(false),
            calls: Cell::default(),
            at_stop: Cell::default(),
            hold: RefCell::default(),
        }
    }

    fn install_streams(
        self: &Rc<Self>,
        reactor: &mut Reactor,
        streams: Vec<Planned>,
    ) -> io::Result<()> {
        for plan in streams {
            let stream = (plan.install)(reactor, self)?;
            let all = plan.numbers.into_iter().map(|number| (number, stream));
            self.streams.borrow_mut().extend(all);
            if let Some(fd) = plan.terminal {
                self.terminal.replace(Some((stream.handle.token(), fd)));
            }
        }
        self.streams.borrow_mut().sort_by_key(|(number, _)| *number);
        Ok(())
    }

    pub(super) fn pid(&self) -> u32 {
        self.pid
    }

    /// Tells the protocol something. Tells it first that the child was started, if it
    /// does not know yet. `own` is the transport whose callback runs, if one does.
    pub(super) fn tell(
        self: &Rc<Self>,
        reactor: &mut Reactor,
        own: Option<&mut dyn Transport>,
        call: impl FnOnce(&mut dyn ProcessProtocol, &mut ProcessContext<'_>),
    ) {
        if self.stage.get() == ProcessStage::Over {
            return;
        }
        self.tell_anyhow(reactor, own, call);
        if self.wishes.get() != Wishes::default() {
            reactor.notify(self.token);
        }
    }

    fn tell_anyhow(
        self: &Rc<Self>,
        reactor: &mut Reactor,
        own: Option<&mut dyn Transport>,
        call: impl FnOnce(&mut dyn ProcessProtocol, &mut ProcessContext<'_>),
    ) {
        let Ok(mut protocol) = self.protocol.try_borrow_mut() else {
            debug_assert!(false, "callbacks do not nest");
            return;
        };
        let protocol = &mut **protocol;
        let mut view = View(Rc::clone(self));
        let mut cx = ProcessContext::new(&mut view, reactor, own);
        if !self.was_made.replace(true) {
            protocol.connection_made(&mut cx);
        }
        call(protocol, &mut cx);
    }

    /// Removes a stream that has ended.
    pub(super) fn forget_stream(&self, token: Token) {
        let is_other = |stream: &OpenStream| stream.handle.token() != token;
        self.streams
            .borrow_mut()
            .retain(|(_, stream)| is_other(stream));
        // The terminal hangs up once nobody holds it.
        self.terminal.borrow_mut().take_if(|(it, _)| *it == token);
    }

    /// As [`forget_stream`](Self::forget_stream), for a stream with a protocol of its
    /// own.
    pub(super) fn stream_is_gone(&self, reactor: &mut Reactor, token: Token) {
        self.forget_stream(token);
        self.look_whether_over(reactor);
    }

    pub(super) fn look_whether_over(&self, reactor: &mut Reactor) {
        if self.stage.get() == ProcessStage::Exited && self.streams.borrow().is_empty() {
            reactor.notify(self.token);
        }
    }

    pub(super) fn give_up_streams(&self) {
        let mut wishes = self.wishes.get();
        wishes.gives_up = true;
        self.wishes.set(wishes);
    }

    // Requests to the reactor.

    fn begin(self: &Rc<Self>, reactor: &mut Reactor) {
        let mut calls = self.calls.get();
        let limit = self.settings.time_limit;
        calls.time_limit = limit.map(|limit| reactor.notify_later(limit, self.token));
        self.calls.set(calls);
        if self.settings.stop_within.is_some() {
            let this = Rc::downgrade(self);
            let at_stop = move |reactor: &mut Reactor| {
                if let Some(this) = this.upgrade() {
                    this.reactor_stops(reactor);
                }
            };
            let id = reactor.add_trigger(Phase::Before, SystemEvent::Shutdown, at_stop);
            self.at_stop.set(Some(id));
        }
    }

    fn reactor_stops(self: &Rc<Self>, reactor: &mut Reactor) {
        self.at_stop.set(None);
        // A graceful stop tells it later, after the connections that may need it.
        if reactor.stop_deadline().is_none() {
            self.stop_soon(reactor);
            self.hold.replace(Some(reactor.hold(SystemEvent::Shutdown)));
        }
    }

    fn stop_soon(self: &Rc<Self>, reactor: &mut Reactor) {
        if let Some(grace) = self.settings.stop_within {
            self.terminate_within(grace);
            reactor.notify(self.token);
        }
    }

    fn exited(&self, reactor: &mut Reactor, status: io::Result<ExitStatus>) {
        let status = match status {
            Ok(status) => ProcessStatus::Exited(status),
            Err(error) => {
                let pid = self.pid;
                log::warn!(target: log::TRANSPORT, "how process {pid} ended is not known: {error}");
                ProcessStatus::Unknown
            }
        };
        log::debug!(target: log::TRANSPORT, "{}: process {} {status}", self.token, self.pid);
        self.status.set(Some(status));
        reactor.notify(self.token);
    }

    /// Does everything that is left to do.
    fn work(self: &Rc<Self>, reactor: &mut Reactor) -> Next {
        if self.stage.get() == ProcessStage::Over {
            return Next::Remove;
        }
        if !self.was_made.get() {
            self.tell(reactor, None, |_, _| {});
        }
        self.carry_out_wishes(reactor);
        let Some(status) = self.status.get() else {
            return Next::Keep;
        };
        if self.stage.get() == ProcessStage::Running {
            self.stage.set(ProcessStage::Exited);
            self.tell(reactor, None, |protocol, cx| {
                protocol.process_exited(cx, status);
            });
            self.carry_out_wishes(reactor);
            self.wait_for_streams(reactor);
        }
        if !self.streams.borrow().is_empty() {
            return Next::Keep;
        }
        self.end(reactor, status);
        Next::Remove
    }

    fn carry_out_wishes(self: &Rc<Self>, reactor: &mut Reactor) {
        let wishes = self.wishes.take();
        if let Some(after) = wishes.kill_after {
            let mut calls = self.calls.get();
            let until = reactor.now().checked_add(after);
            let earlier = calls.kill.and_then(|kill| kill.due(reactor));
            if earlier.is_none_or(|earlier| until.is_some_and(|until| until < earlier)) {
                if let Some(kill) = calls.kill {
                    // This timer may be the one that has just fired.
                    let _ = kill.cancel(reactor);
                }
                calls.kill = Some(reactor.notify_later(after, self.token));
                self.calls.set(calls);
            }
        }
        if wishes.gives_up {
            self.abort_streams(reactor, |_, _| true);
        }
    }

    /// Aborts the streams for which `is_spent` is true. Returns whether there are
    /// others.
    fn abort_streams(
        &self,
        reactor: &mut Reactor,
        is_spent: impl Fn(&mut Reactor, &OpenStream) -> bool,
    ) -> bool {
        let all = self.streams.borrow().clone();
        let mut has_others = false;
        for (number, stream) in all {
            if !is_spent(reactor, &stream) {
                has_others = true;
            } else if let Some(transport) = reactor.get(stream.handle) {
                let pid = self.pid;
                log::debug!(target: log::TRANSPORT, "giving up stream {number} of process {pid}");
                transport.abort_connection();
            }
        }
        has_others
    }

    /// Sees to it that the streams end, once the child has exited.
    fn wait_for_streams(&self, reactor: &mut Reactor) {
        let after_exit = self.settings.streams_after_exit;
        let after = match self.was_killed.get() {
            true => Some(after_exit.map_or(AFTER_KILL, |it| it.min(AFTER_KILL))),
            false => after_exit,
        };
        let has_exited = self.stage.get() == ProcessStage::Exited;
        if let Some(after) = after.filter(|_| has_exited && !self.streams.borrow().is_empty()) {
            let mut calls = self.calls.get();
            if let Some(earlier) = calls.give_up.take() {
                // This timer may be the one that has just fired.
                let _ = earlier.cancel(reactor);
            }
            calls.give_up = Some(reactor.notify_later(after, self.token));
            self.calls.set(calls);
        }
    }

    fn timer_fired(self: &Rc<Self>, reactor: &mut Reactor, call: DelayedCall) {
        let mut calls = self.calls.get();
        let pid = self.pid;
        if calls.time_limit.take_if(|it| *it == call).is_some() {
            self.calls.set(calls);
            log::warn!(target: log::TRANSPORT, "process {pid} has reached its time limit");
            self.terminate_within(self.settings.grace);
        } else if calls.kill.take_if(|it| *it == call).is_some() {
            self.calls.set(calls);
            log::warn!(target: log::TRANSPORT, "killing process {pid}, which has not ended in time");
            self.kill_all();
            self.was_killed.set(true);
            self.wait_for_streams(reactor);
        } else if calls.give_up.take_if(|it| *it == call).is_some() {
            self.calls.set(calls);
            let is_spent = |reactor: &mut Reactor, it: &OpenStream| !it.is_kept_back(reactor);
            if self.abort_streams(reactor, is_spent) {
                self.wait_for_streams(reactor);
            }
        }
    }

    /// Ends the process, which is told last. Later requests are ignored.
    fn end(self: &Rc<Self>, reactor: &mut Reactor, status: ProcessStatus) {
        self.stage.set(ProcessStage::Over);
        let Deadlines {
            time_limit,
            kill,
            give_up,
        } = self.calls.take();
        for call in [time_limit, kill, give_up].into_iter().flatten() {
            // This timer may be the one that has just fired.
            let _ = call.cancel(reactor);
        }
        if let Some(id) = self.at_stop.take() {
            // The trigger may have run.
            let _ = reactor.remove_trigger(id);
        }
        self.hold.take();
        self.terminal.take();
        log::debug!(target: log::TRANSPORT, "{}: process {} {status}, and all its streams have ended", self.token, self.pid);
        self.tell_anyhow(reactor, None, |protocol, cx| {
            protocol.process_ended(cx, status);
        });
    }

    // Signals.

    fn watch(&self) -> Option<ChildWatch> {
        self.watch.borrow().clone()
    }

    fn signal(&self, signal: i32) -> Result<(), SignalError> {
        match self.watch().filter(|_| self.status.get().is_none()) {
            Some(watch) => watch.signal(signal).map_err(signal_error),
            None => Err(SignalError::ExitedAlready),
        }
    }

    fn signal_group(&self, signal: i32) -> Result<(), SignalError> {
        if !self.leads_group {
            return Err(SignalError::NoGroup);
        }
        match self.watch() {
            Some(watch) => watch.signal_group(signal).map_err(signal_error),
            None => Err(SignalError::ExitedAlready),
        }
    }

    fn kill(&self) -> Result<(), SignalError> {
        match self.watch().filter(|_| self.status.get().is_none()) {
            Some(watch) => watch.kill().map_err(signal_error),
            None => Err(SignalError::ExitedAlready),
        }
    }

    /// Kills the group, if the process leads one, and the process itself, in case it
    /// has left the group.
    fn kill_all(&self) {
        let group = self.signal_group(SIGKILL);
        for result in [group, self.kill()] {
            if let Err(SignalError::Os(error)) = result {
                log::warn!(target: log::TRANSPORT, "cannot kill process {}: {error}", self.pid);
            }
        }
    }

    fn terminate_within(&self, grace: Duration) {
        for signal in [SIGTERM, SIGCONT] {
            let result = match self.signal_group(signal) {
                Err(SignalError::NoGroup | SignalError::ExitedAlready) => self.signal(signal),
                result => result,
            };
            if let Err(SignalError::Os(error)) = result {
                log::warn!(target: log::TRANSPORT, "cannot terminate process {}: {error}", self.pid);
            }
        }
        let mut wishes = self.wishes.get();
        wishes.kill_after = Some(wishes.kill_after.map_or(grace, |it| it.min(grace)));
        self.wishes.set(wishes);
    }
}

fn signal_error(error: io::Error) -> SignalError {
    match error.kind() {
        io::ErrorKind::NotFound => SignalError::ExitedAlready,
        _ if sys::is_no_process(&error) => SignalError::ExitedAlready,
        _ => SignalError::Os(error),
    }
}

/// The part of a process that handles and callbacks reach.
struct View(Rc<Attended>);

impl ProcessTransport for View {
    fn pid(&self) -> u32 {
        self.0.pid
    }

    fn handle(&self) -> ProcessHandle {
        ProcessHandle::new(self.0.token, view_of)
    }

    fn stream(&self, number: u32) -> Option<TransportHandle> {
        let streams = self.0.streams.borrow();
        let found = streams.iter().find(|(it, _)| *it == number);
        found.map(|(_, stream)| stream.handle)
    }

    fn streams(&self) -> Vec<(u32, TransportHandle)> {
        let streams = self.0.streams.borrow();
        let all = streams.iter();
        all.map(|(number, stream)| (*number, stream.handle))
            .collect()
    }

    fn has_exited(&self) -> bool {
        self.0.status.get().is_some()
    }

    fn signal_process(&mut self, signal: i32) -> Result<(), SignalError> {
        self.0.signal(signal)
    }

    fn signal_group(&mut self, signal: i32) -> Result<(), SignalError> {
        self.0.signal_group(signal)
    }

    fn kill(&mut self) -> Result<(), SignalError> {
        self.0.kill()
    }

    fn terminate_within(&mut self, grace: Duration) {
        self.0.terminate_within(grace);
    }

    fn give_up_streams(&mut self) {
        self.0.give_up_streams();
    }

    fn set_terminal_size(&mut self, size: TerminalSize) -> io::Result<()> {
        match &*self.0.terminal.borrow() {
            Some((_, terminal)) => crate::set_terminal_size(terminal.as_fd(), size),
            None => Err(io::ErrorKind::NotConnected.into()),
        }
    }
}

/// The descriptor in the reactor.
struct ProcessSlot {
    view: View,
}

impl Descriptor for ProcessSlot {
    /// The poller watches nothing for it.
    fn ready(&mut self, reactor: &mut Reactor, _: Readiness) -> Next {
        self.view.0.work(reactor)
    }

    fn attend(&mut self, reactor: &mut Reactor) -> Next {
        self.view.0.work(reactor)
    }

    fn timer_fired(&mut self, reactor: &mut Reactor, call: DelayedCall) -> Next {
        self.view.0.timer_fired(reactor, call);
        self.view.0.work(reactor)
    }

    fn panicked(&mut self, reactor: &mut Reactor, _: Panic) -> Next {
        self.view.0.give_up_streams();
        self.view.0.work(reactor)
    }

    fn drain(&mut self, reactor: &mut Reactor, round: DrainRound) -> Next {
        let process = &self.view.0;
        if round >= DrainRound::Work && !process.was_told_to_drain.replace(true) {
            let mut answer = AtDrain::DoNotWait;
            process.tell(reactor, None, |protocol, cx| answer = protocol.draining(cx));
            if answer == AtDrain::LoseWhenIdle {
                let all = process.streams.borrow().clone();
                for (_, stream) in all {
                    if let Some(transport) = reactor.get(stream.handle)
                        && !transport.is_open_for_reading()
                    {
                        transport.lose_connection();
                    }
                }
            }
            if answer != AtDrain::DoNotWait {
                reactor.await_end(process.token);
            }
        }
        if round == DrainRound::Support && process.settings.stop_within.is_some() {
            process.stop_soon(reactor);
            reactor.await_end(process.token);
        }
        process.work(reactor)
    }

    fn shutdown(&mut self, reactor: &mut Reactor) {
        let process = &self.view.0;
        if process.work(reactor) == Next::Remove {
            return;
        }
        if process.settings.stop_within.is_some() {
            // No time is left.
            process.kill_all();
        }
        process.abort_streams(reactor, |_, _| true);
        let status = process.status.get();
        process.end(reactor, status.unwrap_or(ProcessStatus::ReactorStopped));
    }

    fn facet(&mut self) -> &mut dyn Any {
        &mut self.view
    }

    fn describe(&self, description: &mut Description) {
        let process = &self.view.0;
        let state = match process.status.get() {
            Some(status) => status.to_string().into(),
            None => Cow::Borrowed("running"),
        };
        description
            .section("process")
            .set("role", "child")
            .set("pid", process.pid)
            .set("state", state)
            .set("leads_group", process.leads_group)
            .set("streams", process.streams.borrow().len())
            .set_some("time_limit", process.settings.time_limit);
        // Borrowed while one of its callbacks runs.
        if let Ok(protocol) = process.protocol.try_borrow() {
            protocol.describe(description);
        }
    }

    fn log_prefix(&self) -> Cow<'_, str> {
        let process = &self.view.0;
        let protocol = process.protocol.try_borrow();
        let name = protocol.map(|it| log::name(|| it.log_prefix()).into_owned());
        let name = name.unwrap_or_else(|_| "-".into());
        Cow::Owned(format!("{name},process {}", process.pid))
    }
}
