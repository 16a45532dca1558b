//! Calls when a descriptor is readable: for what needs no transport.

use std::any::Any;
use std::borrow::Cow;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use crate::description::Description;
use crate::descriptor::{Descriptor, Interest, Next, Readiness};
use crate::handle::Handle;
use crate::reactor::Reactor;
use crate::sys;

/// A call that waits for a descriptor to be readable. It names the call, and does not keep
/// it: without anybody holding this it waits on.
pub struct ReadableCall<F: AsFd + 'static> {
    handle: Handle<Watched<F>>,
}

impl Reactor {
    /// Calls `call` once, when reading from `source` would not block: something is there, or
    /// the end, or an error. It is given `source` back, which is not watched any more.
    ///
    /// `source` is anything with a descriptor, such as an `OwnedFd`, a socket of std, a
    /// `Rc<OwnedFd>` that others hold too. Nothing is read from it, and no flag is changed.
    /// A regular file is always readable: the call is made in the next turn.
    ///
    /// When the reactor stops, `source` is dropped and nothing is called. A graceful stop
    /// does not wait for it.
    ///
    /// # Errors
    ///
    /// Those of epoll_ctl(2): `EEXIST` for a descriptor that is watched already, of which a
    /// duplicate can be. `source` is dropped.
    ///
    /// # Examples
    ///
    /// ```
    /// use std::io::{Read, Write};
    /// use std::os::unix::net::UnixStream;
    /// use bowline::Reactor;
    ///
    /// let (mut near, far) = UnixStream::pair()?;
    /// let mut reactor = Reactor::new()?;
    /// reactor.call_when_readable(far, |reactor, mut far| {
    ///     let mut word = [0; 5];
    ///     far.read_exact(&mut word).expect("it is there");
    ///     assert_eq!(&word, b"hello");
    ///     reactor.stop().expect("it runs");
    /// })?;
    /// near.write_all(b"hello")?;
    /// reactor.run()?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn call_when_readable<F: AsFd + 'static>(
        &mut self,
        source: F,
        call: impl FnOnce(&mut Self, F) + 'static,
    ) -> io::Result<ReadableCall<F>> {
        let mut call = Some(call);
        install(self, source, move |reactor, watched| {
            let (Some(source), Some(call)) = (watched.take(reactor), call.take()) else {
                return Next::Remove;
            };
            call(reactor, source);
            Next::Remove
        })
    }

    /// Calls `call` each time that reading from `source` would not block, at most once in a
    /// turn: again and again, until that would block or the answer is [`Next::Remove`],
    /// which drops `source`. [`Next::Keep`] and [`Next::Again`] are the same here.
    ///
    /// `call` has to read, or it is called in every turn, and the loop does not sleep. Who
    /// reads needs not read everything. At the end of a pipe or a socket, and after an error,
    /// reading never blocks: answer `Next::Remove` then.
    ///
    /// A call that panics is the last one. Otherwise as
    /// [`call_when_readable`](Self::call_when_readable).
    ///
    /// # Errors
    ///
    /// As [`call_when_readable`](Self::call_when_readable).
    ///
    /// # Examples
    ///
    /// ```
    /// use std::io::{Read, Write};
    /// use std::os::unix::net::UnixStream;
    /// use bowline::descriptor::Next;
    /// use bowline::Reactor;
    ///
    /// let (mut near, far) = UnixStream::pair()?;
    /// let mut reactor = Reactor::new()?;
    /// reactor.call_each_time_readable(far, |reactor, far| {
    ///     let mut letter = [0];
    ///     if far.read(&mut letter).is_ok_and(|count| count == 1) {
    ///         println!("{}", letter.escape_ascii());
    ///         return Next::Keep;
    ///     }
    ///     reactor.stop().expect("it runs");
    ///     Next::Remove
    /// })?;
    /// near.write_all(b"letters")?;
    /// drop(near);
    /// reactor.run()?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn call_each_time_readable<F: AsFd + 'static>(
        &mut self,
        source: F,
        mut call: impl FnMut(&mut Self, &mut F) -> Next + 'static,
    ) -> io::Result<ReadableCall<F>> {
        install(self, source, move |reactor, watched| {
            let Some(source) = &mut watched.source else {
                return Next::Remove;
            };
            match call(reactor, source) {
                Next::Remove => Next::Remove,
                // Not all that is there need have been read, and no event says so.
                Next::Keep | Next::Again if watched.is_readable() => Next::Again,
                Next::Keep | Next::Again => Next::Keep,
            }
        })
    }
}

impl<F: AsFd + 'static> ReadableCall<F> {
    /// Whether it still waits. Not inside of its own call.
    pub fn is_waiting(&self, reactor: &mut Reactor) -> bool {
        reactor.get(self.handle).is_some()
    }

    /// Has nothing called any more, and gives the source back. `None` if the call was made
    /// already, or is running, or the reactor is another one.
    pub fn cancel(self, reactor: &mut Reactor) -> Option<F> {
        let watched = reactor.get(self.handle)?;
        let (source, is_polled) = (watched.source.take()?, watched.is_polled);
        if is_polled {
            reactor.unwatch(source.as_fd());
        }
        reactor.remove(self.handle.token());
        Some(source)
    }
}

impl<F: AsFd + 'static> Clone for ReadableCall<F> {
    fn clone(&self) -> Self {
        Self {
            handle: self.handle,
        }
    }
}

impl<F: AsFd + 'static> fmt::Debug for ReadableCall<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ReadableCall").field(&self.handle).finish()
    }
}

/// What is watched for a call.
struct Watched<F> {
    /// There until it is given back.
    source: Option<F>,
    /// Whether the poller knows it. It refuses what is always ready.
    is_polled: bool,
}

impl<F: AsFd> Watched<F> {
    fn take(&mut self, reactor: &mut Reactor) -> Option<F> {
        let source = self.source.take()?;
        if self.is_polled {
            reactor.unwatch(source.as_fd());
        }
        Some(source)
    }

    fn is_readable(&self) -> bool {
        let source = self.source.as_ref();
        source.is_some_and(|source| !self.is_polled || sys::is_readable(source.as_fd()))
    }
}

/// A source with its call.
struct Source<F, C> {
    watched: Watched<F>,
    call: C,
}

impl<F, C> Descriptor for Source<F, C>
where
    F: AsFd + 'static,
    C: FnMut(&mut Reactor, &mut Watched<F>) -> Next + 'static,
{
    fn ready(&mut self, reactor: &mut Reactor, _: Readiness) -> Next {
        // Somebody else may have read it, and not every event says that there is something.
        match self.watched.is_readable() {
            true => (self.call)(reactor, &mut self.watched),
            false => Next::Keep,
        }
    }

    fn attend(&mut self, _: &mut Reactor) -> Next {
        match self.watched.is_polled {
            true => Next::Keep,
            false => Next::Again,
        }
    }

    fn source(&self) -> Option<BorrowedFd<'_>> {
        let source = self.watched.source.as_ref()?;
        self.watched.is_polled.then(|| source.as_fd())
    }

    fn facet(&mut self) -> &mut dyn Any {
        &mut self.watched
    }

    fn describe(&self, description: &mut Description) {
        description
            .section("readable call")
            .set("polled", self.watched.is_polled);
    }

    fn log_prefix(&self) -> Cow<'_, str> {
        Cow::Borrowed("readable call")
    }
}

fn install<F: AsFd + 'static>(
    reactor: &mut Reactor,
    source: F,
    call: impl FnMut(&mut Reactor, &mut Watched<F>) -> Next + 'static,
) -> io::Result<ReadableCall<F>> {
    let mut vacancy = reactor.vacancy()?;
    let is_polled = match vacancy.watch(source.as_fd(), Interest::Readable) {
        Ok(()) => true,
        // What epoll knows nothing of is always ready.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => false,
        Err(error) => return Err(error),
    };
    let watched = Watched {
        source: Some(source),
        is_polled,
    };
    let token = vacancy.install(Box::new(Source { watched, call }));
    reactor.notify(token);
    let handle = Handle::new(token, |facet| facet.downcast_mut());
    Ok(ReadableCall { handle })
}
