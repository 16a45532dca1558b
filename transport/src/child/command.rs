//! The program of a child, and its descriptors.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use bowline_protocol::{Protocol, TerminalSize};

use super::ChildProcess;
use super::error::{SpawnError, SpawnStep};
use super::process::{ProcessSettings, RunningChild, launched, started};
use super::streams::{Install, Planned, by_number, with_protocol};
use crate::kinds::{OwnEnd, PipeStream, Unix, UnixStream};
use crate::process::{LISTEN_NUMBERS, listen_variables, names_of};
use crate::sys::{self, CleanStart, Group, Image, Launch};

/// A child for [`spawn_process`](crate::Transports::spawn_process): the program that it
/// runs, and what each of its descriptor numbers is.
///
/// [`program`](Self::program) begins with the name of a program, and methods of this type
/// add arguments, environment and directory. [`new`](Self::new) takes all of that from
/// std's [`Command`], and user, groups and `pre_exec` too. Its standard streams have no
/// effect, since all descriptors are set here. By default 0, 1 and 2 are pipes. We write
/// to 0, and read from 1 and 2. (Twisted: `childFDs`.)
///
/// | method | the child has | we have |
/// |---|---|---|
/// | [`write_to`](Self::write_to) | the reading end of a pipe | the other end, as a stream |
/// | [`read_from`](Self::read_from) | the writing end of a pipe | the other end, as a stream |
/// | [`socket_with`](Self::socket_with) | a UNIX socket, for bytes and descriptors both ways | the other end, as a connection |
/// | [`terminal`](Self::terminal) | a terminal, under 0, 1 and 2 | its master side, as one stream |
/// | [`descriptor`](Self::descriptor) | a copy of the given descriptor | the descriptor, as before |
/// | [`inherit`](Self::inherit) | our own standard stream of that number | the same, as before |
/// | [`null`](Self::null) | `/dev/null` | nothing |
/// | [`duplicate`](Self::duplicate) | the same as under another number | nothing more |
///
/// The bytes of a stream go to the process protocol, with the number
/// ([`child_data_received`](bowline_protocol::ProcessProtocol::child_data_received)).
/// The methods whose names end in `_with` give the stream a protocol of its own, such
/// as a [`Framed`](bowline_protocol::framing::Framed) for lines.
///
/// ```
/// use bowline::process::{ChildCommand, ProcessContext, ProcessProtocol, ProcessStatus};
/// use bowline::{Reactor, Transports};
///
/// /// Has a child say in capitals what it is told.
/// struct Louder(Vec<u8>);
///
/// impl ProcessProtocol for Louder {
///     fn connection_made(&mut self, cx: &mut ProcessContext<'_>) {
///         cx.write(b"what it is told");
///         cx.close_stdin();
///     }
///
///     fn child_data_received(&mut self, _: &mut ProcessContext<'_>, _: u32, data: &[u8]) {
///         self.0.extend_from_slice(data);
///     }
///
///     fn process_ended(&mut self, cx: &mut ProcessContext<'_>, status: ProcessStatus) {
///         assert!(status.is_success());
///         assert_eq!(self.0, b"WHAT IT IS TOLD");
///         let _ = cx.reactor.stop();
///     }
/// }
///
/// let mut reactor = Reactor::new()?;
/// let louder = ChildCommand::program("tr").args(["a-z", "A-Z"]);
/// reactor.spawn_process(louder.inherit(2), Louder(Vec::new()))?;
/// reactor.run()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # A clean start
///
/// In the child all signals have their default effect, and none is blocked, whatever
/// they are set to in this program. (With std's `Command` alone, ignored signals stay
/// ignored and blocked ones stay blocked.) The same holds for a signal that arrives
/// before the child runs its program.
///
/// The child has the descriptors that were set here, and no others. It does not get
/// descriptors that a library has opened here without close-on-exec. (Before Linux 5.11
/// it does.)
///
/// If the child has descriptors from 3 on, `BOWLINE_DESCRIPTORS` is in its environment.
/// [`take_granted`](crate::take_granted) reads it.
///
/// # Costs
///
/// Starting returns once the child runs its program. Each pipe takes two system calls.
///
/// A child that began with [`program`](Self::program) is not forked: it borrows the memory
/// of this program until its own begins, while this thread waits. (So does one of
/// posix_spawn(3).) That costs the same however large this program is. A child that began
/// with [`new`](Self::new) takes a fork(2), which copies page tables: only there a closure
/// can run in the child, and only there it can get another user. Choose `new` if you need
/// what only a `Command` has.
///
/// Under an emulator or a debugger that makes a plain fork of every child, like valgrind,
/// an error of the program's start is not told: the child then exits with code 127.
pub struct ChildCommand<'a> {
    command: Command,
    way: Way,
    ends: BTreeMap<u32, ChildEnd<'a>>,
    terminal: Option<TerminalEnd>,
    names: Option<Vec<String>>,
    leads_group: bool,
    settings: ProcessSettings,
    error: Option<io::Error>,
}

/// How a child comes about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// Of a command that we have made: nothing is in it that could not be read.
    Launched,
    /// Of a command of the user's, which may have closures that run in the child, a user
    /// and groups. Only std knows them.
    Forked,
}

/// What one descriptor number of the child is.
enum ChildEnd<'a> {
    WriteTo(Maker),
    ReadFrom(Maker),
    Socket(Maker),
    Terminal,
    Given(BorrowedFd<'a>),
    Inherited,
    Null,
    As(u32),
}

/// Makes a connection of our end. `None` if the process protocol serves it, by number.
type Maker = Option<Box<dyn FnOnce(OwnedFd) -> Install>>;

struct TerminalEnd {
    size: TerminalSize,
    maker: Maker,
}

impl<'a> ChildCommand<'a> {
    /// Makes a child that runs a program, with pipes under 0, 1 and 2.
    ///
    /// It is looked for as execvp(3) does. A name without a slash is tried in the directories
    /// of the child's `PATH`, or of `/bin:/usr/bin` if it has none. An empty entry is the
    /// directory in which the child begins. A file that may be executed, and that the kernel
    /// takes for no program, is run by `/bin/sh`: also one for another machine, which then ends
    /// with code 127 or another error of the shell.
    ///
    /// Unless you say otherwise, the child has our environment and our directory.
    pub fn program(name: impl AsRef<OsStr>) -> Self {
        let command = Command::new(name.as_ref());
        Self::by(Way::Launched, command).checked(name.as_ref())
    }

    /// Makes a child that runs `command`, with pipes under 0, 1 and 2, by a fork(2).
    ///
    /// Everything that `command` has takes effect, except for its standard streams: user
    /// and groups, `arg0`, `pre_exec` closures.
    pub fn new(command: Command) -> Self {
        Self::by(Way::Forked, command)
    }

    fn by(way: Way, command: Command) -> Self {
        let ends = [
            (0, ChildEnd::WriteTo(None)),
            (1, ChildEnd::ReadFrom(None)),
            (2, ChildEnd::ReadFrom(None)),
        ];
        Self {
            command,
            way,
            ends: ends.into(),
            terminal: None,
            names: None,
            leads_group: false,
            settings: ProcessSettings::default(),
            error: None,
        }
    }

    /// A string that a program can be given ends where its NUL is. std notes one that has
    /// another, and does not say so.
    fn checked(mut self, text: &OsStr) -> Self {
        if text.as_bytes().contains(&0) {
            let text = "an argument, a variable or a path has a NUL in it";
            self.error = Some(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        self
    }

    /// Adds an argument.
    #[must_use]
    pub fn arg(mut self, argument: impl AsRef<OsStr>) -> Self {
        self.command.arg(argument.as_ref());
        self.checked(argument.as_ref())
    }

    /// Adds arguments.
    #[must_use]
    pub fn args(self, arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Self {
        arguments.into_iter().fold(self, Self::arg)
    }

    /// Sets a variable of the child's environment.
    #[must_use]
    pub fn env(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.command.env(name.as_ref(), value.as_ref());
        self.checked(name.as_ref()).checked(value.as_ref())
    }

    /// Removes a variable from the child's environment.
    #[must_use]
    pub fn env_remove(mut self, name: impl AsRef<OsStr>) -> Self {
        self.command.env_remove(name);
        self
    }

    /// Removes all variables from the child's environment, so that it has only those that
    /// are set afterwards.
    #[must_use]
    pub fn env_clear(mut self) -> Self {
        self.command.env_clear();
        self
    }

    /// Sets the directory in which the program begins. A program whose name is a relative
    /// path, or is found by a relative path of `PATH`, is looked for from there.
    #[must_use]
    pub fn current_dir(mut self, directory: impl AsRef<Path>) -> Self {
        self.command.current_dir(directory.as_ref());
        self.checked(directory.as_ref().as_os_str())
    }

    fn with(mut self, number: u32, end: ChildEnd<'a>) -> Self {
        self.ends.insert(number, end);
        self
    }

    /// Makes a pipe that we write to. The child reads it under `number`.
    #[must_use]
    pub fn write_to(self, number: u32) -> Self {
        self.with(number, ChildEnd::WriteTo(None))
    }

    /// As [`write_to`](Self::write_to), with a protocol of its own for the stream. It
    /// never receives data.
    #[must_use]
    pub fn write_to_with(self, number: u32, protocol: impl Protocol<PipeStream>) -> Self {
        let maker = |fd| with_protocol(OwnEnd::WRITING, fd, protocol);
        self.with(number, ChildEnd::WriteTo(Some(Box::new(maker))))
    }

    /// Makes a pipe that we read. The child writes to it under `number`.
    #[must_use]
    pub fn read_from(self, number: u32) -> Self {
        self.with(number, ChildEnd::ReadFrom(None))
    }

    /// As [`read_from`](Self::read_from), with a protocol of its own for the stream.
    /// Its transport refuses writes.
    #[must_use]
    pub fn read_from_with(self, number: u32, protocol: impl Protocol<PipeStream>) -> Self {
        let maker = |fd| with_protocol(OwnEnd::READING, fd, protocol);
        self.with(number, ChildEnd::ReadFrom(Some(Box::new(maker))))
    }

    /// Makes a pair of connected UNIX sockets. The child has one under `number`, and a
    /// protocol here has the other. Bytes and descriptors pass both ways.
    #[must_use]
    pub fn socket_with(self, number: u32, protocol: impl Protocol<UnixStream>) -> Self {
        let maker = |fd| with_protocol(Unix, fd, protocol);
        self.with(number, ChildEnd::Socket(Some(Box::new(maker))))
    }

    /// Makes a new terminal of this size, under 0, 1 and 2. (Twisted: `usePTY`.)
    ///
    /// It is the child's controlling terminal. The child leads a session and a process
    /// group of its own. Everything that it writes to the terminal arrives under
    /// number 1. You can set the three numbers to something else afterwards. For example,
    /// [`read_from(2)`](Self::read_from) gives the child a pipe for standard error.
    ///
    /// The terminal has the kernel's settings: it reads lines, echoes, and turns keys into
    /// signals. The variable `TERM` is up to the command. Closing the stream hangs up
    /// (SIGHUP).
    #[must_use]
    pub fn terminal(self, size: TerminalSize) -> Self {
        self.terminal_by(size, None)
    }

    /// As [`terminal`](Self::terminal), with a protocol of its own for the stream.
    #[must_use]
    pub fn terminal_with(self, size: TerminalSize, protocol: impl Protocol<PipeStream>) -> Self {
        let maker = |fd| with_protocol(OwnEnd::TERMINAL, fd, protocol);
        self.terminal_by(size, Some(Box::new(maker)))
    }

    fn terminal_by(mut self, size: TerminalSize, maker: Maker) -> Self {
        self.terminal = Some(TerminalEnd { size, maker });
        for number in 0..3 {
            self.ends.insert(number, ChildEnd::Terminal);
        }
        self
    }

    /// Puts the terminal of the child under `number` too.
    #[must_use]
    pub fn terminal_at(self, number: u32) -> Self {
        self.with(number, ChildEnd::Terminal)
    }

    /// Gives the child a copy of `fd` under `number`. The numbers may be in use here,
    /// or be those of other descriptors.
    #[must_use]
    pub fn descriptor(self, number: u32, fd: BorrowedFd<'a>) -> Self {
        self.with(number, ChildEnd::Given(fd))
    }

    /// Gives the child our own standard stream of the same number: 0, 1 or 2.
    #[must_use]
    pub fn inherit(self, number: u32) -> Self {
        self.with(number, ChildEnd::Inherited)
    }

    /// Gives the child `/dev/null` under `number`.
    #[must_use]
    pub fn null(self, number: u32) -> Self {
        self.with(number, ChildEnd::Null)
    }

    /// Makes `number` the same as `other` in the child, like `2>&1` in a shell.
    /// Everything that the child writes to both arrives in order, under `other`.
    #[must_use]
    pub fn duplicate(self, number: u32, other: u32) -> Self {
        self.with(number, ChildEnd::As(other))
    }

    /// Gives the child these descriptors from 3 on, each with its name. It finds them
    /// by `LISTEN_FDS`, as systemd passes them. See
    /// [`spawn_with_listen_fds`](crate::spawn_with_listen_fds) for the variables and
    /// the limits.
    #[must_use]
    pub fn listen_fds(mut self, descriptors: &[(BorrowedFd<'a>, &str)]) -> Self {
        match names_of(descriptors) {
            Ok(names) => {
                self.names = Some(names);
                for ((fd, _), number) in descriptors.iter().zip(3..) {
                    self.ends.insert(number, ChildEnd::Given(*fd));
                }
            }
            Err(error) => self.error = Some(error),
        }
        self
    }

    /// Has the child lead a process group of its own. Time limits and
    /// [`signal_group`](bowline_protocol::ProcessTransport::signal_group) then reach
    /// every process that it starts too. Ctrl-C on our own terminal no longer reaches
    /// it. A child with a [terminal](Self::terminal) always leads a group.
    #[must_use]
    pub fn in_own_group(mut self) -> Self {
        self.leads_group = true;
        self
    }

    /// Sets how long the child and its streams may go on.
    #[must_use]
    pub fn settings(mut self, settings: ProcessSettings) -> Self {
        self.settings = settings;
        self
    }

    /// Starts the child.
    pub(super) fn start(mut self) -> Result<RunningChild, SpawnError> {
        let program = self.command.get_program().to_owned();
        let begun = self.make().map_err(|error| (SpawnStep::Prepare, error));
        match begun.and_then(|made| made.begin(&program)) {
            Ok(running) => Ok(running),
            Err((step, error)) => Err(SpawnError {
                program,
                step,
                error,
            }),
        }
    }

    /// Makes all descriptors of the child, and our ends of them.
    fn make(&mut self) -> io::Result<Made<'a>> {
        if let Some(error) = self.error.take() {
            return Err(error);
        }
        let command = std::mem::replace(&mut self.command, Command::new(""));
        let mut made = Made {
            command,
            way: self.way,
            given: Vec::new(),
            streams: Vec::new(),
            group: self.leads_group.then_some(Group::Own),
            names: self.names.take(),
            settings: self.settings,
        };
        let mut pairs = BTreeMap::new();
        let terminal = self.make_terminal(&mut made)?;
        let mut aliases = Vec::new();
        for (number, end) in std::mem::take(&mut self.ends) {
            if let ChildEnd::As(other) = end {
                aliases.push((number, other));
            } else {
                pairs.insert(number, made.make_end(number, end, terminal.as_ref())?);
            }
        }
        for (number, other) in aliases {
            let theirs = pairs.get(&other).ok_or_else(nothing_there)?.copy(other)?;
            pairs.insert(number, theirs);
        }
        made.given.extend(pairs);
        Ok(made)
    }

    /// Makes the terminal, if the child has one, and our stream of it. Returns the
    /// child's side.
    fn make_terminal(&mut self, made: &mut Made<'a>) -> io::Result<Option<OwnedFd>> {
        let is_its = |(_, end): &(&u32, &ChildEnd<'_>)| matches!(end, ChildEnd::Terminal);
        let numbers = self.ends.iter().filter(is_its).map(|(number, _)| *number);
        let numbers: Vec<u32> = numbers.collect();
        let Some(TerminalEnd { size, maker }) = &mut self.terminal else {
            return Ok(None);
        };
        let Some(&first) = numbers.first() else {
            return Ok(None);
        };
        let (ours, theirs) = sys::open_terminal()?;
        crate::set_terminal_size(ours.as_fd(), *size)?;
        let told_as = if numbers.contains(&1) { 1 } else { first };
        let to_resize = ours.try_clone()?;
        let install = match maker.take() {
            Some(maker) => maker(ours),
            None => by_number(told_as, OwnEnd::TERMINAL, ours),
        };
        made.streams.push(Planned {
            numbers,
            terminal: Some(to_resize),
            install,
        });
        // A session has a process group.
        made.group = Some(Group::Session(first));
        Ok(Some(theirs))
    }
}

impl fmt::Debug for ChildCommand<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChildCommand")
            .field("command", &self.command)
            .field("numbers", &self.ends.keys().collect::<Vec<_>>())
            .finish_non_exhaustive()
    }
}

/// Everything that a child is started with.
struct Made<'a> {
    command: Command,
    way: Way,
    given: Vec<(u32, Given<'a>)>,
    streams: Vec<Planned>,
    group: Option<Group>,
    names: Option<Vec<String>>,
    settings: ProcessSettings,
}

impl<'a> Made<'a> {
    /// Starts the child.
    fn begin(mut self, program: &OsStr) -> Result<RunningChild, (SpawnStep, io::Error)> {
        let streams = std::mem::take(&mut self.streams);
        let (leads_group, settings) = (self.group.is_some(), self.settings);
        let process = match self.way {
            Way::Launched => self.launch()?,
            Way::Forked => self.fork()?,
        };
        let mut running = RunningChild::of(process, OsString::from(program)).settings(settings);
        if leads_group {
            running = running.leads_group();
        }
        Ok(streams.into_iter().fold(running, RunningChild::planned))
    }

    fn launch(self) -> Result<Box<dyn ChildProcess>, (SpawnStep, io::Error)> {
        let given = self.given.iter();
        let grants: Vec<_> = given
            .filter_map(|(number, it)| Some((it.as_grant()?.as_fd(), *number)))
            .collect();
        let variables = self.names.as_deref().map(listen_variables);
        let variables = variables.iter().flatten().cloned().collect::<Vec<_>>();
        let own = self.names.as_ref().map(|_| LISTEN_NUMBERS);
        let launch = Launch::new(self.command, &grants, &variables, own, self.group);
        let child = launch.map_err(|error| (SpawnStep::Prepare, error))?.start();
        child
            .map(launched)
            .map_err(|(reached, error)| (SpawnStep::of(reached, &error, false), error))
    }

    fn fork(mut self) -> Result<Box<dyn ChildProcess>, (SpawnStep, io::Error)> {
        let prepare = |error| (SpawnStep::Prepare, error);
        let has_directory = self.command.get_current_dir().is_some();
        let mut given = Vec::new();
        for (number, it) in std::mem::take(&mut self.given) {
            match number {
                0 => drop(self.command.stdin(it.into_stdio().map_err(prepare)?)),
                1 => drop(self.command.stdout(it.into_stdio().map_err(prepare)?)),
                2 => drop(self.command.stderr(it.into_stdio().map_err(prepare)?)),
                _ => given.extend(it.into_grant().map(|it| (number, it))),
            }
        }
        let terminal = match self.group {
            Some(Group::Session(terminal)) => Some(terminal),
            Some(Group::Own) => {
                self.command.process_group(0);
                None
            }
            None => None,
        };
        let start = CleanStart::new(terminal).map_err(prepare)?;
        let grants = given.iter().map(|(number, fd)| (fd.as_fd(), *number));
        let grants: Vec<_> = grants.collect();
        let names = self.names;
        let image = |command: &mut Command| match &names {
            Some(names) => {
                let variables = listen_variables(names);
                Image::of(command, &variables, Some(LISTEN_NUMBERS)).map(Some)
            }
            None => Ok(None),
        };
        let child = sys::spawn_announced(self.command, &grants, Some(&start), image);
        child.map(started).map_err(|error| {
            let step = SpawnStep::of(start.reached(), &error, has_directory);
            (step, error)
        })
    }

    /// Makes the child's end of what it has under a number, and our stream of it.
    fn make_end(
        &mut self,
        number: u32,
        end: ChildEnd<'a>,
        terminal: Option<&OwnedFd>,
    ) -> io::Result<Given<'a>> {
        Ok(match end {
            ChildEnd::WriteTo(maker) => {
                let (theirs, ours) = io::pipe()?;
                let install = match maker {
                    Some(maker) => maker(ours.into()),
                    None => by_number(number, OwnEnd::WRITING, ours.into()),
                };
                self.streams.push(Planned::new(number, install));
                Given::owned(theirs)
            }
            ChildEnd::ReadFrom(maker) => {
                let (ours, theirs) = io::pipe()?;
                let install = match maker {
                    Some(maker) => maker(ours.into()),
                    None => by_number(number, OwnEnd::READING, ours.into()),
                };
                self.streams.push(Planned::new(number, install));
                Given::owned(theirs)
            }
            ChildEnd::Socket(maker) => {
                let (ours, theirs) = StdUnixStream::pair()?;
                let maker = maker.ok_or_else(nothing_there)?;
                self.streams.push(Planned::new(number, maker(ours.into())));
                Given::owned(theirs)
            }
            ChildEnd::Terminal => {
                let terminal = terminal.ok_or_else(nothing_there)?;
                Given::owned(terminal.try_clone()?)
            }
            ChildEnd::Given(fd) => Given::Grant(Grant::Borrowed(fd)),
            ChildEnd::Inherited if number < 3 => Given::Inherited,
            ChildEnd::Inherited => return Err(nothing_there()),
            ChildEnd::Null => {
                let both = File::options().read(true).write(true).open("/dev/null")?;
                Given::owned(both)
            }
            // It is a copy of another one, once that is made.
            ChildEnd::As(_) => return Err(nothing_there()),
        })
    }
}

/// One descriptor of the child.
enum Given<'a> {
    Grant(Grant<'a>),
    /// A standard stream of ours, under the same number.
    Inherited,
}

enum Grant<'a> {
    Owned(OwnedFd),
    Borrowed(BorrowedFd<'a>),
}

impl<'a> Given<'a> {
    fn owned(fd: impl Into<OwnedFd>) -> Self {
        Self::Grant(Grant::Owned(fd.into()))
    }

    fn into_stdio(self) -> io::Result<Stdio> {
        Ok(match self {
            Self::Grant(Grant::Owned(fd)) => fd.into(),
            Self::Grant(Grant::Borrowed(fd)) => fd.try_clone_to_owned()?.into(),
            Self::Inherited => Stdio::inherit(),
        })
    }

    fn as_grant(&self) -> Option<&Grant<'a>> {
        match self {
            Self::Grant(grant) => Some(grant),
            Self::Inherited => None,
        }
    }

    fn into_grant(self) -> Option<Grant<'a>> {
        match self {
            Self::Grant(grant) => Some(grant),
            Self::Inherited => None,
        }
    }

    /// Makes a copy. The original has the number `number`.
    fn copy(&self, number: u32) -> io::Result<Self> {
        Ok(match self {
            Self::Grant(Grant::Owned(fd)) => Self::owned(fd.try_clone()?),
            Self::Grant(Grant::Borrowed(fd)) => Self::Grant(Grant::Borrowed(*fd)),
            Self::Inherited => Self::owned(match number {
                0 => io::stdin().as_fd().try_clone_to_owned()?,
                1 => io::stdout().as_fd().try_clone_to_owned()?,
                _ => io::stderr().as_fd().try_clone_to_owned()?,
            }),
        })
    }
}

impl AsFd for Grant<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Owned(fd) => fd.as_fd(),
            Self::Borrowed(fd) => *fd,
        }
    }
}

fn nothing_there() -> io::Error {
    let text = "there is nothing that the child could have under this number";
    io::Error::new(io::ErrorKind::InvalidInput, text)
}
