//! Two FIFOs as one stream: one to read from, one to write to.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

use bowline::descriptor::{Interest, Token};
use bowline::endpoint::{Adopt, Carried, Connect, Dial, Side, Wrap};
use bowline::error::{AdoptError, AdoptErrorKind};
use bowline::layers::{FileDescriptor, Link, ReadBuffers, Received, Socket, Stream};
use bowline::{Address, ConnectError, Destination, Reactor, UnixAddress};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::{Errno, FdFlags};

/// The kind. By itself it is what two descriptors are adopted as, the one for reading
/// first; [`to`](Self::to) connects.
#[derive(Clone, Copy, Debug, Default)]
pub struct Fifos;

impl Fifos {
    /// Connects to whoever serves the two FIFOs `to-server` and `to-client` of a folder:
    /// who reads from the first, and holds the second open for writing.
    pub fn to(folder: impl Into<PathBuf>) -> FifosTo {
        FifosTo {
            folder: folder.into(),
            wrap: Self,
        }
    }
}

/// One end of such a stream.
#[derive(Debug)]
pub struct FifoPair {
    reading: Option<OwnedFd>,
    writing: Option<OwnedFd>,
    address: Address,
    /// That the peer did not read everything is told once.
    has_told: bool,
}

impl FifoPair {
    fn new(reading: OwnedFd, writing: OwnedFd, address: UnixAddress) -> Self {
        Self {
            reading: Some(reading),
            writing: Some(writing),
            address: address.into(),
            has_told: false,
        }
    }

    /// What UNIX sockets call a reset: the peer has closed, and has not read all that it
    /// was sent.
    fn is_reset(&self) -> bool {
        self.writing.as_ref().is_some_and(|writing| {
            has(writing, PollFlags::ERR) && rustix::io::ioctl_fionread(writing).unwrap_or(0) > 0
        })
    }
}

fn has(fd: &OwnedFd, flag: PollFlags) -> bool {
    let mut watched = [PollFd::new(fd, PollFlags::empty())];
    poll(&mut watched, Some(&Timespec::default())).is_ok() && watched[0].revents().contains(flag)
}

fn retried<R>(mut call: impl FnMut() -> Result<R, Errno>) -> io::Result<R> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            result => return result.map_err(io::Error::from),
        }
    }
}

impl FileDescriptor for FifoPair {
    fn write_some_data(&mut self, _: &mut Link, data: &[u8]) -> io::Result<usize> {
        let Some(writing) = &self.writing else {
            return Err(io::ErrorKind::NotConnected.into());
        };
        // A program of std ignores SIGPIPE.
        retried(|| rustix::io::write(writing, data))
    }

    fn do_read(
        &mut self,
        _: &mut Link,
        buffers: &mut ReadBuffers,
        limit: usize,
    ) -> io::Result<Received> {
        let Some(reading) = &self.reading else {
            return Err(io::ErrorKind::NotConnected.into());
        };
        let bytes = retried(|| rustix::io::read(reading, &mut buffers.bytes()[..limit]))?;
        if bytes == 0 && self.is_reset() && !std::mem::replace(&mut self.has_told, true) {
            return Err(Errno::PIPE.into());
        }
        Ok(Received::new(bytes, limit))
    }

    fn socket(&self) -> &dyn Socket {
        self
    }

    fn socket_mut(&mut self) -> &mut dyn Socket {
        self
    }

    fn take(&mut self) -> Option<Self> {
        Some(Self {
            reading: self.reading.take(),
            writing: self.writing.take(),
            address: self.address.clone(),
            has_told: self.has_told,
        })
    }
}

impl Socket for FifoPair {
    fn kind(&self) -> &'static str {
        "FIFOs"
    }

    fn host(&self) -> Address {
        UnixAddress::Unnamed.into()
    }

    fn peer(&self) -> Address {
        self.address.clone()
    }

    fn reading(&self) -> Option<BorrowedFd<'_>> {
        self.reading.as_ref().map(AsFd::as_fd)
    }

    fn writing(&self) -> Option<BorrowedFd<'_>> {
        self.writing.as_ref().map(AsFd::as_fd)
    }

    /// Both from the beginning: that the peer reads no more is told at the one for
    /// writing.
    fn watch(&self, reactor: &mut Reactor, token: Token) -> io::Result<()> {
        let (Some(reading), Some(writing)) = (self.reading(), self.writing()) else {
            return Err(io::ErrorKind::NotConnected.into());
        };
        reactor.watch(token, reading, Interest::Readable)?;
        let watched = reactor.watch(token, writing, Interest::Writable);
        if watched.is_err() {
            reactor.unwatch(reading);
        }
        watched
    }

    fn watch_writing(&self, _: &mut Reactor, _: Token) -> io::Result<()> {
        Ok(())
    }

    fn unwatch(&self, reactor: &mut Reactor, _: bool) {
        for source in [self.reading(), self.writing()].into_iter().flatten() {
            reactor.unwatch(source);
        }
    }

    fn take_error(&self) -> Option<io::Error> {
        self.is_reset().then(|| Errno::PIPE.into())
    }

    fn shutdown_write(&mut self) -> io::Result<()> {
        // By closing it.
        Ok(())
    }

    fn release_writing(&mut self, reactor: &mut Reactor) {
        if let Some(writing) = self.writing.take() {
            reactor.unwatch(writing.as_fd());
        }
    }

    fn close(&mut self) {
        self.reading = None;
        self.writing = None;
    }

    fn detach(&mut self) -> Option<OwnedFd> {
        self.reading.take()
    }

    fn detach_writing(&mut self) -> Option<OwnedFd> {
        self.writing.take()
    }

    fn attach(&mut self, fd: OwnedFd) -> Result<(), OwnedFd> {
        match made_fit(&fd) {
            Ok(()) => {
                self.reading = Some(fd);
                Ok(())
            }
            Err(_) => Err(fd),
        }
    }

    fn attach_writing(&mut self, fd: OwnedFd) -> Result<(), OwnedFd> {
        match made_fit(&fd) {
            Ok(()) => {
                self.writing = Some(fd);
                Ok(())
            }
            Err(_) => Err(fd),
        }
    }
}

/// Checks that it is a FIFO, and has it neither block nor be inherited.
fn made_fit(fd: &OwnedFd) -> io::Result<()> {
    if FileType::from_raw_mode(rustix::fs::fstat(fd)?.st_mode) != FileType::Fifo {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "no FIFO"));
    }
    let flags = rustix::fs::fcntl_getfl(fd)?;
    rustix::fs::fcntl_setfl(fd, flags | OFlags::NONBLOCK)?;
    rustix::io::fcntl_setfd(fd, FdFlags::CLOEXEC)?;
    Ok(())
}

impl Wrap<FifoPair> for Fifos {
    type Transport = Stream<FifoPair>;

    fn wrap(&mut self, pair: FifoPair, _: Side) -> FifoPair {
        pair
    }
}

impl Adopt for Fifos {
    type Source = (OwnedFd, OwnedFd);
    type Socket = FifoPair;
    type Wrap = Self;

    fn check(&self, source: Self::Source) -> Result<FifoPair, AdoptError<Self::Source>> {
        match made_fit(&source.0).and_then(|()| made_fit(&source.1)) {
            Ok(()) => Ok(FifoPair::new(source.0, source.1, UnixAddress::Unnamed)),
            Err(error) => Err(AdoptError {
                kind: AdoptErrorKind::Os(error),
                fd: source,
            }),
        }
    }

    fn not_installed(mut pair: FifoPair, error: io::Error) -> AdoptError<Self::Source> {
        let both = pair.reading.take().zip(pair.writing.take());
        AdoptError::os(error, both.expect("they were just put there"))
    }

    fn into_parts(self) -> (Self, Carried) {
        (self, Carried::default())
    }
}

/// Where to connect; made by [`Fifos::to`].
#[derive(Clone, Debug)]
#[must_use = "nothing connects before it is given to `connect`"]
pub struct FifosTo {
    folder: PathBuf,
    wrap: Fifos,
}

impl Connect for FifosTo {
    type Socket = FifoPair;
    type Wrap = Fifos;

    fn destination(&self) -> Destination {
        UnixAddress::Path(self.folder.clone()).into()
    }

    fn timeout(&self) -> Option<Duration> {
        None
    }

    fn dial(&mut self, _: &Address) -> Result<Dial<FifoPair>, ConnectError> {
        let open = |name, how| {
            let how = how | OFlags::NONBLOCK | OFlags::CLOEXEC;
            rustix::fs::open(self.folder.join(name), how, Mode::empty()).map_err(|error| {
                match error {
                    // Nobody reads from it.
                    Errno::NXIO => ConnectError::Refused(error.into()),
                    _ => ConnectError::Os(error.into()),
                }
            })
        };
        let reading = open("to-client", OFlags::RDONLY)?;
        let writing = open("to-server", OFlags::WRONLY)?;
        let address = UnixAddress::Path(self.folder.clone());
        Ok(Dial::Connected(FifoPair::new(reading, writing, address)))
    }

    fn wrap(&mut self) -> &mut Fifos {
        &mut self.wrap
    }
}
