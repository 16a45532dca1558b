//! Byte streams on descriptors that need not be sockets: pipes, FIFOs, terminals,
//! standard input and output, files.

use std::cell::Cell;
use std::io::{self, IoSlice};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;

use bowline_protocol::{Address, FileAddress};
use bowline_reactor::{Interest, Reactor, Token};

use super::Plain;
use crate::StandIn;
use crate::endpoint::{Adopt, Carried, Side, Wrap};
use crate::error::{AdoptError, AdoptErrorKind};
use crate::file_descriptor::{FileDescriptor, Received, Socket, not_connected};
use crate::link::Link;
use crate::shared::ReadBuffers;
use crate::sys::file::FileKind;
use crate::sys::{self, file};

stream_type! {
    /// A stream on one or two descriptors that need not be sockets. See [`Pipe`].
    PipeStream over PipeEnds, known by bowline_protocol::TransportHandle
}

/// The most that one call writes to a file, or to another descriptor whose write may
/// take long. A call must not take the turn from others.
const MOST_AT_ONCE: usize = 65_536;

/// How much a pipe takes at the least once poll(2) says that it is writable (pipe(7),
/// `PIPE_BUF`). A packet of a pipe in packet mode is at most as long.
const PIPE_BYTES: usize = 4_096;

/// How much the master of a pseudo-terminal takes at the least once it is writable. It
/// is less than the buffer of about 1,790 bytes that the kernel fills each time.
const MASTER_BYTES: usize = 1_024;

/// How much a terminal takes at the least once it is writable. Its buffers have 256
/// bytes, and one byte may become two.
const TERMINAL_BYTES: usize = 128;

/// Pipes, FIFOs, terminals, and whatever else can be read or written as a byte stream.
/// This kind of connection is [adopted](crate::Transports::adopt).
///
/// `Pipe` takes one descriptor, and both reads and writes it if it is open for both, as
/// a pseudo-terminal or a socket is. [`Pipe::reading`] and [`Pipe::writing`] use it in
/// one direction only. [`Pipe::pair`] takes two descriptors as one connection.
/// [`Stdio`] is standard input and output.
///
/// ```
/// use std::io;
/// use bowline::{Context, Pipe, Protocol, Reactor, Transport, Transports};
///
/// struct Watcher;
///
/// impl<T: Transport> Protocol<T> for Watcher {
///     fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
///         println!("{} bytes from {}", data.len(), cx.transport.peer());
///     }
/// }
///
/// let mut reactor = Reactor::new()?;
/// let (reading, writing) = io::pipe()?;
/// reactor.adopt(Pipe, reading.into(), Watcher)?;
/// # drop(writing);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # What each of them can do
///
/// | | pipe, FIFO, one end | two descriptors, [`Stdio`] | terminal | socket | file, `/dev/null` |
/// |---|---|---|---|---|---|
/// | reading, pausing, read limits | if open for it | yes | yes | yes | yes, always ready |
/// | writing, watermarks, producers | if open for it | yes | yes | yes | yes, always ready |
/// | [`lose_connection`](bowline_protocol::AnyConnection::lose_connection) sends everything first | yes | yes | yes, and hangs up: what is unread by then is lost | yes | yes |
/// | half-close | the end of a writing end | closes the descriptor that is written to | ours only: the other side learns nothing | shuts down | ours only |
/// | the peer's end | no writer left | no writer left | `EIO` after a hang-up, 0 bytes (Ctrl-D) | yes | the end of the file |
/// | the reader's loss, with nothing to write | yes | yes | as the end | yes | never |
/// | [`detach`](crate::Transports::detach), `reattach` | yes | yes, with [`Detached::writing`](crate::Detached::writing) | yes | yes | yes |
/// | [going on in another process](crate::Detached::travels) | yes | no | yes | yes | yes |
/// | descriptors beside bytes | no | no | no | no: use [`Unix`](super::Unix) | no |
/// | addresses | [`Address::File`] | [`Address::File`] | [`Address::File`] | [`Address::File`] | [`Address::File`] |
///
/// A write is [`Refused`](bowline_protocol::WriteStatus::Refused) if the connection
/// cannot write. If it can only write, it never calls `data_received` or
/// `read_connection_lost`.
///
/// # `O_NONBLOCK` is left as it is
///
/// This flag belongs to the open file, and so to everyone who has it. For example, a
/// shell fails at its next prompt if its terminal does not block any more. So the flag
/// is neither set nor relied upon, whether the file blocks or not. Calls avoid blocking
/// in other ways:
///
/// | | how | costs |
/// |---|---|---|
/// | pipe(2) | preadv2(2), pwritev2(2) with `RWF_NOWAIT` | nothing |
/// | socket | `MSG_DONTWAIT` | nothing |
/// | terminal | is opened anew from `/proc/thread-self/fd`, an open file of our own, which does not block | two system calls at the beginning |
/// | FIFO; the side that holds a pseudo-terminal; a terminal that cannot be opened | poll(2) before each call; writes of no more than is taken then without waiting: 4,096, 1,024 and 128 bytes | a system call for each |
/// | file, `/dev/null` | as it is: it does not wait for anyone else | nothing; the disk is waited for |
///
/// With poll(2), a call blocks if somebody else reads or fills the same FIFO or
/// terminal between the two calls. No other call blocks.
///
/// # Ends
///
/// A FIFO is at its end when it is empty and nobody has it open for writing. It goes on
/// if somebody opens it again before that is noticed. It has no end either before the
/// first writer has opened it. To serve one writer after the other, open it for reading
/// and writing, and take it by [`Pipe::reading`]. Then it never ends.
///
/// A pseudo-terminal reports `EIO` when its other side has gone. That is a clean end,
/// once everything that was written there is read. It goes on if somebody opens the
/// other side again before that is noticed. The kernel keeps bytes written meanwhile
/// for whoever opens it.
///
/// When nobody reads a pipe any more, the connection is
/// [`Lost`](bowline_protocol::CloseReason::Lost) with `BrokenPipe`. That happens at
/// once, even if nothing is written. Bytes that wait in the other direction are
/// delivered first. If both directions of a pair end at once, that is the peer's end
/// and no error. SIGPIPE is not raised, even if the program has set it to its default.
///
/// A read of up to 4,096 bytes from a pipe is followed by another, which mostly finds
/// nothing. The pipe may hold packets (`O_DIRECT`), which are read one by one.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pipe;

impl Pipe {
    /// Uses one descriptor for reading only, even if it is open for both.
    pub fn reading() -> PipeWay {
        PipeWay {
            reads: true,
            writes: false,
        }
    }

    /// Uses one descriptor for writing only, even if it is open for both.
    pub fn writing() -> PipeWay {
        PipeWay {
            reads: false,
            writes: true,
        }
    }

    /// Uses two descriptors as one connection. The first is read, the second written
    /// to.
    pub fn pair() -> PipePair {
        PipePair
    }
}

/// One descriptor, used in one direction. [`Pipe::reading`] and [`Pipe::writing`] make
/// it.
#[derive(Clone, Copy, Debug)]
pub struct PipeWay {
    reads: bool,
    writes: bool,
}

/// Two descriptors as one connection. [`Pipe::pair`] makes it.
#[derive(Clone, Copy, Debug)]
pub struct PipePair;

/// One descriptor that was made here, so that its kind is known.
#[derive(Clone, Copy, Debug)]
pub(crate) struct OwnEnd {
    way: PipeWay,
    kind: FileKind,
}

impl OwnEnd {
    /// The reading end of a pipe.
    pub(crate) const READING: Self = Self {
        way: PipeWay {
            reads: true,
            writes: false,
        },
        kind: FileKind::Pipe,
    };

    /// The writing end of a pipe.
    pub(crate) const WRITING: Self = Self {
        way: PipeWay {
            reads: false,
            writes: true,
        },
        kind: FileKind::Pipe,
    };

    /// The master of a pseudo-terminal, which does not block.
    pub(crate) const TERMINAL: Self = Self {
        way: PipeWay {
            reads: true,
            writes: true,
        },
        kind: FileKind::TerminalMaster,
    };
}

/// Standard input and output as one connection. (Twisted: `stdio.StandardIO`.)
///
/// ```no_run
/// # use bowline::{Context, Protocol, Transport};
/// # use bowline::Reactor;
/// use bowline::{Stdio, Transports};
/// # struct Echo;
/// # impl<T: Transport> Protocol<T> for Echo {
/// #     fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
/// #         cx.transport.write(data);
/// #     }
/// # }
///
/// let mut reactor = Reactor::new()?;
/// reactor.adopt(Stdio, (), Echo)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// Each of the two may be a terminal, a pipe, a socket or a file. Everything said of
/// [`Pipe`] holds here too. Above all, a terminal is left as it was found.
///
/// The connection has copies of the two descriptors. Once it has ended, `println!`
/// writes to standard output as before. While it goes on, do not use the buffers of std
/// as well, since bytes in them are out of order with the connection. A half-close
/// redirects standard output to `/dev/null`, so that its reader sees the end.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stdio;

impl Adopt for Pipe {
    type Source = OwnedFd;
    type Socket = PipeEnds;
    type Wrap = Plain;

    fn check(&self, fd: OwnedFd) -> Result<PipeEnds, AdoptError> {
        match End::access(fd.as_fd()) {
            Ok((reads, writes)) => PipeWay { reads, writes }.check(fd),
            Err(error) => Err(AdoptError::os(error, fd)),
        }
    }

    fn not_installed(socket: PipeEnds, error: io::Error) -> AdoptError {
        AdoptError::os(error, socket.into_descriptor())
    }

    fn into_parts(self) -> (Plain, Carried) {
        (Plain, Carried::default())
    }
}

impl Adopt for PipeWay {
    type Source = OwnedFd;
    type Socket = PipeEnds;
    type Wrap = Plain;

    fn check(&self, fd: OwnedFd) -> Result<PipeEnds, AdoptError> {
        match End::check(fd.as_fd(), self.reads, self.writes) {
            Ok(kind) => Ok(PipeEnds::one(End::new(fd, kind), self.reads, self.writes)),
            Err(kind) => Err(AdoptError { kind, fd }),
        }
    }

    fn not_installed(socket: PipeEnds, error: io::Error) -> AdoptError {
        AdoptError::os(error, socket.into_descriptor())
    }

    fn into_parts(self) -> (Plain, Carried) {
        (Plain, Carried::default())
    }
}

impl Adopt for OwnEnd {
    type Source = OwnedFd;
    type Socket = PipeEnds;
    type Wrap = Plain;

    fn check(&self, fd: OwnedFd) -> Result<PipeEnds, AdoptError> {
        let means = match self.kind {
            FileKind::Pipe => Means::AtOnce,
            _ => Means::Own,
        };
        let end = End::by(fd, self.kind, means);
        let PipeWay { reads, writes } = self.way;
        Ok(match self.kind {
            FileKind::Pipe => PipeEnds::at(None, end, reads, writes),
            _ => PipeEnds::one(end, reads, writes),
        })
    }

    fn not_installed(socket: PipeEnds, error: io::Error) -> AdoptError {
        AdoptError::os(error, socket.into_descriptor())
    }

    fn into_parts(self) -> (Plain, Carried) {
        (Plain, Carried::default())
    }
}

impl Adopt for PipePair {
    type Source = (OwnedFd, OwnedFd);
    type Socket = PipeEnds;
    type Wrap = Plain;

    fn check(&self, fds: Self::Source) -> Result<PipeEnds, AdoptError<Self::Source>> {
        let kinds = End::check(fds.0.as_fd(), true, false)
            .and_then(|reading| Ok((reading, End::check(fds.1.as_fd(), false, true)?)));
        match kinds {
            Ok((reading, writing)) => Ok(PipeEnds::two(
                End::new(fds.0, reading),
                End::new(fds.1, writing),
            )),
            Err(kind) => Err(AdoptError { kind, fd: fds }),
        }
    }

    fn not_installed(socket: PipeEnds, error: io::Error) -> AdoptError<Self::Source> {
        let PipeEnds { first, second, .. } = socket;
        let both = first.fd.zip(second.and_then(|end| end.fd));
        AdoptError {
            kind: AdoptErrorKind::Os(error),
            fd: both.expect("they were just put there"),
        }
    }

    fn into_parts(self) -> (Plain, Carried) {
        (Plain, Carried::default())
    }
}

impl Adopt for Stdio {
    type Source = ();
    type Socket = PipeEnds;
    type Wrap = Plain;

    fn check(&self, (): ()) -> Result<PipeEnds, AdoptError<()>> {
        let copies = || {
            let reading = io::stdin().as_fd().try_clone_to_owned()?;
            io::Result::Ok((reading, io::stdout().as_fd().try_clone_to_owned()?))
        };
        let copies = copies().map_err(|error| AdoptError::os(error, ()))?;
        let mut ends = PipePair.check(copies).map_err(|error| AdoptError {
            kind: error.kind,
            fd: (),
        })?;
        ends.is_standard = true;
        Ok(ends)
    }

    fn not_installed(_: PipeEnds, error: io::Error) -> AdoptError<()> {
        AdoptError::os(error, ())
    }

    fn into_parts(self) -> (Plain, Carried) {
        (Plain, Carried::default())
    }
}

impl Wrap<PipeEnds> for Plain {
    type Transport = PipeStream;

    fn wrap(&mut self, socket: PipeEnds, _: Side) -> PipeEnds {
        socket
    }
}

/// How a descriptor is read and written without blocking.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Means {
    /// Each call has a flag for it (`RWF_NOWAIT`).
    AtOnce,
    /// Each call has a flag for it (`MSG_DONTWAIT`).
    Socket,
    /// The open file is our own, and does not block.
    Own,
    /// poll(2) is asked before each call. Then this many bytes are taken without
    /// blocking.
    Asking(usize),
    /// It never waits for anyone else.
    Always,
}

/// Whether the poller watches an end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Watched {
    No,
    Yes,
    /// The poller does not take it, since it is always ready.
    Refused,
}

/// One descriptor.
#[derive(Debug)]
struct End {
    /// `None` once closed or detached.
    fd: Option<OwnedFd>,
    kind: FileKind,
    means: Means,
    watched: Cell<Watched>,
    /// What it stands for, in tests on a simulated kernel.
    stand_in: Option<StandIn>,
}

impl End {
    /// What a descriptor is open for, reading and writing.
    fn access(fd: BorrowedFd<'_>) -> io::Result<(bool, bool)> {
        match StandIn::of_pipe(fd) {
            Some(stand_in) => Ok(stand_in.access()),
            None => file::access(fd),
        }
    }

    /// Returns the kind of a descriptor, or the reason why it cannot be adopted. Does
    /// nothing to it that its other holders could notice.
    fn check(fd: BorrowedFd<'_>, reads: bool, writes: bool) -> Result<FileKind, AdoptErrorKind> {
        let (can_read, can_write) = Self::access(fd).map_err(AdoptErrorKind::Os)?;
        if reads && !can_read || !reads && !writes {
            return Err(AdoptErrorKind::NotReadable);
        }
        if writes && !can_write {
            return Err(AdoptErrorKind::NotWritable);
        }
        let kind = file::file_kind(fd).map_err(AdoptErrorKind::Os)?;
        match kind {
            FileKind::Directory => {
                return Err(AdoptErrorKind::Os(io::ErrorKind::IsADirectory.into()));
            }
            FileKind::Socket if !sys::is_stream(fd).map_err(AdoptErrorKind::Os)? => {
                return Err(AdoptErrorKind::NotAStream);
            }
            _ => {}
        }
        sys::set_close_on_exec(fd).map_err(AdoptErrorKind::Os)?;
        Ok(kind)
    }

    fn new(fd: OwnedFd, kind: FileKind) -> Self {
        let mut fd = fd;
        let means = match kind {
            FileKind::Pipe => Means::AtOnce,
            FileKind::Socket => Means::Socket,
            FileKind::Regular | FileKind::Directory => Means::Always,
            FileKind::TerminalMaster => Means::Asking(MASTER_BYTES),
            FileKind::Terminal => match file::reopen(fd.as_fd()) {
                Ok(own) => {
                    fd = own;
                    Means::Own
                }
                Err(_) => Means::Asking(TERMINAL_BYTES),
            },
            FileKind::Other => Means::Asking(TERMINAL_BYTES),
        };
        Self::by(fd, kind, means)
    }

    fn by(fd: OwnedFd, kind: FileKind, means: Means) -> Self {
        Self {
            stand_in: StandIn::of_pipe(fd.as_fd()),
            fd: Some(fd),
            kind,
            means,
            watched: Cell::new(Watched::No),
        }
    }

    fn fd(&self) -> io::Result<BorrowedFd<'_>> {
        self.fd.as_ref().map(AsFd::as_fd).ok_or_else(not_connected)
    }

    fn borrowed(&self) -> Option<BorrowedFd<'_>> {
        self.fd.as_ref().map(AsFd::as_fd)
    }

    fn is_terminal(&self) -> bool {
        matches!(self.kind, FileKind::Terminal | FileKind::TerminalMaster)
    }

    fn means(&self) -> Means {
        match self.watched.get() {
            // poll(2) would always say that it is ready.
            Watched::Refused => Means::Always,
            _ => self.means,
        }
    }

    fn read(&mut self, data: &mut [u8]) -> io::Result<usize> {
        let fd = self.fd()?;
        match self.means() {
            Means::AtOnce => match self.read_at_once(fd, data) {
                Err(error) if file::is_unsupported(&error) => {
                    // This is a FIFO, which was opened by its path.
                    self.means = Means::Asking(PIPE_BYTES);
                    self.read(data)
                }
                result => result,
            },
            Means::Socket => sys::recv(fd, data),
            Means::Asking(_) if !self.has_waiting(fd)? => Err(io::ErrorKind::WouldBlock.into()),
            Means::Own | Means::Asking(_) | Means::Always => match &self.stand_in {
                None => file::read(fd, data),
                Some(stand_in) => stand_in.read(data),
            },
        }
    }

    #[inline]
    fn read_at_once(&self, fd: BorrowedFd<'_>, data: &mut [u8]) -> io::Result<usize> {
        match &self.stand_in {
            None => file::read_at_once(fd, data),
            Some(stand_in) => stand_in.read_at_once(data),
        }
    }

    fn has_waiting(&self, fd: BorrowedFd<'_>) -> io::Result<bool> {
        match &self.stand_in {
            None => sys::has_waiting(fd),
            Some(stand_in) => Ok(stand_in.has_waiting()),
        }
    }

    /// Tells what a read of `bytes` bytes means for the reads that follow.
    fn received(&self, bytes: usize, limit: usize) -> Received {
        let received = Received::new(bytes, limit);
        let is_exact = match self.means() {
            Means::Socket => true,
            // A shorter read may be one packet of several.
            Means::AtOnce => bytes > PIPE_BYTES,
            // It may be one line or buffer of several, or it is always ready.
            Means::Own | Means::Asking(_) | Means::Always => false,
        };
        match is_exact || received.is_end() {
            true => received,
            false => received.and_more(),
        }
    }

    fn write(&mut self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        let fd = self.fd()?;
        let first = &pieces[0];
        match self.means() {
            Means::AtOnce => match self.write_at_once(fd, pieces) {
                Err(error) if file::is_unsupported(&error) => {
                    self.means = Means::Asking(PIPE_BYTES);
                    self.write(pieces)
                }
                result => result,
            },
            Means::Socket => sys::send_vectored(fd, pieces),
            Means::Own => file::write(fd, pieces),
            Means::Asking(most) => match self.has_room(fd)? {
                true => self.write_now(fd, &first[..first.len().min(most)]),
                false => Err(io::ErrorKind::WouldBlock.into()),
            },
            Means::Always => self.write_now(fd, &first[..first.len().min(MOST_AT_ONCE)]),
        }
    }

    #[inline]
    fn write_at_once(&self, fd: BorrowedFd<'_>, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        match &self.stand_in {
            None => file::write_at_once(fd, pieces),
            Some(stand_in) => stand_in.write_at_once(pieces),
        }
    }

    fn write_now(&self, fd: BorrowedFd<'_>, data: &[u8]) -> io::Result<usize> {
        match &self.stand_in {
            None => file::write(fd, &[IoSlice::new(data)]),
            Some(stand_in) => stand_in.write(&[IoSlice::new(data)]),
        }
    }

    fn has_room(&self, fd: BorrowedFd<'_>) -> io::Result<bool> {
        match &self.stand_in {
            None => file::has_room(fd),
            Some(stand_in) => Ok(stand_in.has_room()),
        }
    }

    fn has_no_reader(&self, fd: BorrowedFd<'_>) -> bool {
        match &self.stand_in {
            None => file::has_no_reader(fd),
            Some(stand_in) => stand_in.has_no_reader(),
        }
    }

    fn is_hung_up(&self) -> bool {
        match &self.stand_in {
            None => self.borrowed().is_some_and(sys::is_hung_up),
            Some(stand_in) => stand_in.is_hung_up(),
        }
    }

    fn unread(&self) -> usize {
        match &self.stand_in {
            None => self
                .borrowed()
                .map_or(0, |fd| sys::bytes_unread(fd).unwrap_or(1)),
            Some(stand_in) => stand_in.unread(),
        }
    }

    fn watch(&self, reactor: &mut Reactor, token: Token, interest: Interest) -> io::Result<()> {
        let fd = self.fd()?;
        if let Some(stand_in) = &self.stand_in {
            stand_in.watch(reactor, token, interest)?;
            self.watched.set(Watched::Yes);
            return Ok(());
        }
        let result = match self.watched.get() {
            Watched::No => reactor.watch(token, fd, interest),
            Watched::Yes => reactor.rewatch(token, fd, interest),
            Watched::Refused => return Ok(()),
        };
        self.watched.set(match result {
            Ok(()) => Watched::Yes,
            // EPERM is for a regular file, or for a device that has no poll.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Watched::Refused,
            Err(error) => return Err(error),
        });
        Ok(())
    }

    fn unwatch(&self, reactor: &mut Reactor) {
        if self.watched.replace(Watched::No) == Watched::Yes
            && let Some(fd) = self.borrowed()
        {
            match &self.stand_in {
                None => reactor.unwatch(fd),
                Some(stand_in) => stand_in.unwatch(),
            }
        }
    }

    fn close(&mut self) {
        self.fd = None;
        self.stand_in = None;
    }

    /// Takes the descriptor out. An open file of our own is made to block again, as its
    /// next user expects.
    fn detach(&mut self) -> Option<OwnedFd> {
        let fd = self.fd.take()?;
        self.stand_in = None;
        if self.means == Means::Own {
            // If this fails for an open file of our own, the detach still goes on.
            let _ = file::set_blocking(fd.as_fd(), true);
        }
        Some(fd)
    }

    fn attach(&mut self, fd: OwnedFd) -> Result<(), OwnedFd> {
        if self.means == Means::Own && file::set_blocking(fd.as_fd(), false).is_err() {
            return Err(fd);
        }
        self.stand_in = StandIn::of_pipe(fd.as_fd());
        self.fd = Some(fd);
        Ok(())
    }
}

/// One or two descriptors, read and written.
#[derive(Debug)]
pub struct PipeEnds {
    /// The end for reading, or for writing if there is none.
    first: End,
    /// The end for writing, if that is another descriptor.
    second: Option<End>,
    reads: bool,
    writes: bool,
    /// Whether it is standard input and output.
    is_standard: bool,
    /// Whether the loss of the reader was reported. A pipe reports it for ever.
    told_of_reader: Cell<bool>,
    /// Whether the end was read.
    is_read_out: bool,
    path: Option<Rc<FileAddress>>,
}

impl PipeEnds {
    fn one(end: End, reads: bool, writes: bool) -> Self {
        Self::at(path_of(&end), end, reads, writes)
    }

    fn at(path: Option<Rc<FileAddress>>, end: End, reads: bool, writes: bool) -> Self {
        Self {
            path,
            first: end,
            second: None,
            reads,
            writes,
            is_standard: false,
            told_of_reader: Cell::new(false),
            is_read_out: false,
        }
    }

    fn two(reading: End, writing: End) -> Self {
        Self {
            second: Some(writing),
            ..Self::one(reading, true, true)
        }
    }

    fn into_descriptor(self) -> OwnedFd {
        self.first.fd.expect("it was just put there")
    }

    fn writing_end(&mut self) -> io::Result<&mut End> {
        match &mut self.second {
            Some(end) => Ok(end),
            None if self.writes => Ok(&mut self.first),
            None => Err(not_connected()),
        }
    }

    fn write(&mut self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        let result = self.writing_end()?.write(pieces);
        if let Err(error) = &result
            && error.kind() == io::ErrorKind::BrokenPipe
        {
            self.told_of_reader.set(true);
        }
        result
    }

    fn address(&self) -> Address {
        let path = self.path.as_deref();
        Address::File(path.map_or(FileAddress::Unnamed, FileAddress::clone))
    }
}

fn path_of(end: &End) -> Option<Rc<FileAddress>> {
    if end.kind == FileKind::Socket {
        return None;
    }
    let path = match &end.stand_in {
        None => file::file_path(end.borrowed()?)?,
        Some(stand_in) => stand_in.path()?,
    };
    Some(Rc::new(FileAddress::Path(path)))
}

impl FileDescriptor for PipeEnds {
    fn write_some_data(&mut self, _: &mut Link, data: &[u8]) -> io::Result<usize> {
        self.write(&[IoSlice::new(data)])
    }

    fn write_some_pieces(&mut self, _: &mut Link, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        self.write(pieces)
    }

    fn do_read(
        &mut self,
        _: &mut Link,
        buffers: &mut ReadBuffers,
        limit: usize,
    ) -> io::Result<Received> {
        match self.first.read(buffers.data.get_mut(limit)) {
            Ok(bytes) => {
                self.is_read_out |= bytes == 0;
                Ok(self.first.received(bytes, limit))
            }
            // A program in the background gets this error too, when it may not read.
            Err(error)
                if file::is_of_terminal(&error)
                    && self.first.is_terminal()
                    && self.is_hung_up() =>
            {
                Ok(Received::end())
            }
            Err(error) => Err(error),
        }
    }

    fn socket(&self) -> &dyn Socket {
        self
    }

    fn socket_mut(&mut self) -> &mut dyn Socket {
        self
    }

    fn start(&mut self, link: &mut Link) {
        if !self.writes {
            link.never_writes();
        }
        if !self.reads {
            link.never_reads();
        }
    }

    fn take(&mut self) -> Option<Self> {
        let taken = |end: &mut End| End {
            fd: end.fd.take(),
            stand_in: end.stand_in.take(),
            watched: Cell::new(Watched::No),
            ..*end
        };
        Some(Self {
            first: taken(&mut self.first),
            second: self.second.as_mut().map(taken),
            told_of_reader: self.told_of_reader.clone(),
            path: self.path.clone(),
            ..*self
        })
    }

    fn travels(&self) -> bool {
        true
    }
}

impl Socket for PipeEnds {
    fn kind(&self) -> &'static str {
        match self.first.kind {
            FileKind::Pipe => "pipe",
            FileKind::Socket => "socket",
            FileKind::Terminal | FileKind::TerminalMaster => "terminal",
            FileKind::Regular | FileKind::Directory | FileKind::Other => "file",
        }
    }

    fn host(&self) -> Address {
        self.address()
    }

    fn peer(&self) -> Address {
        self.address()
    }

    fn reading(&self) -> Option<BorrowedFd<'_>> {
        self.first.borrowed()
    }

    fn writing(&self) -> Option<BorrowedFd<'_>> {
        match &self.second {
            Some(end) => end.borrowed(),
            None => self.first.borrowed(),
        }
    }

    /// A writing end is watched from the beginning too. So the loss of its reader is
    /// reported before anything is written.
    fn watch(&self, reactor: &mut Reactor, token: Token) -> io::Result<()> {
        let interest = match self.reads {
            true => Interest::Readable,
            false => Interest::Writable,
        };
        self.first.watch(reactor, token, interest)?;
        if let Some(second) = &self.second
            && let Err(error) = second.watch(reactor, token, Interest::Writable)
        {
            self.first.unwatch(reactor);
            return Err(error);
        }
        Ok(())
    }

    fn watch_writing(&self, reactor: &mut Reactor, token: Token) -> io::Result<()> {
        match &self.second {
            Some(second) => second.watch(reactor, token, Interest::Writable),
            None if self.reads => self.first.watch(reactor, token, Interest::Both),
            None => self.first.watch(reactor, token, Interest::Writable),
        }
    }

    fn unwatch(&self, reactor: &mut Reactor, _: bool) {
        self.first.unwatch(reactor);
        if let Some(second) = &self.second {
            second.unwatch(reactor);
        }
    }

    fn watches_both(&self) -> bool {
        let second = self.second.as_ref();
        second.is_some_and(|end| end.watched.get() == Watched::Yes)
    }

    fn is_always_ready(&self) -> bool {
        self.first.watched.get() == Watched::Refused
    }

    fn unread(&self) -> usize {
        self.first.unread()
    }

    fn is_hung_up(&self) -> bool {
        self.first.is_hung_up()
    }

    fn take_error(&self) -> Option<io::Error> {
        let end = match &self.second {
            Some(end) => end,
            None => &self.first,
        };
        let fd = end.borrowed()?;
        match end.kind {
            FileKind::Socket => sys::take_error(fd).unwrap_or_else(Some),
            // A peer that closes both directions has just ended, which the read
            // reports.
            FileKind::Pipe if self.reads && !self.is_read_out && self.is_hung_up() => None,
            FileKind::Pipe if self.writes && end.has_no_reader(fd) => {
                let is_known = self.told_of_reader.replace(true);
                (!is_known).then(file::no_reader)
            }
            _ => None,
        }
    }

    fn shutdown_write(&mut self) -> io::Result<()> {
        match (&self.second, self.first.kind) {
            // A descriptor of its own, or the only direction, is closed instead.
            (Some(_), _) => Ok(()),
            (None, _) if !self.reads => Ok(()),
            (None, FileKind::Socket) => sys::shutdown(self.first.fd()?, Shutdown::Write),
            // The other side cannot be told.
            (None, _) => Ok(()),
        }
    }

    fn release_writing(&mut self, reactor: &mut Reactor) {
        if let Some(mut second) = self.second.take() {
            second.unwatch(reactor);
            if second.kind == FileKind::Socket
                && let Some(fd) = second.borrowed()
            {
                // It may be the reading end too, as under inetd(8).
                let _ = sys::shutdown(fd, Shutdown::Write);
            }
            second.close();
            self.writes = false;
            if self.is_standard {
                // Otherwise it would stay open as long as the process.
                let _ = file::close_standard_output();
            }
        }
    }

    fn close(&mut self) {
        self.first.close();
        self.second = None;
    }

    fn detach(&mut self) -> Option<OwnedFd> {
        self.first.detach()
    }

    fn detach_writing(&mut self) -> Option<OwnedFd> {
        self.second.as_mut()?.detach()
    }

    fn attach(&mut self, fd: OwnedFd) -> Result<(), OwnedFd> {
        self.first.attach(fd)
    }

    fn attach_writing(&mut self, fd: OwnedFd) -> Result<(), OwnedFd> {
        match &mut self.second {
            Some(end) => end.attach(fd),
            None => Err(fd),
        }
    }
}
