//! calloop: one level-triggered source for each connection. Its events do not
//! say whether the peer has closed, so that an edge would cost another read.

use std::cell::Cell;
use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::rc::Rc;
use std::time::{Duration, Instant};

use ::calloop::generic::Generic;
use ::calloop::timer::{TimeoutAction, Timer};
use ::calloop::{
    EventLoop, EventSource, Interest, LoopHandle, Mode, Poll, PostAction, Readiness, Token,
    TokenFactory,
};

use super::hand::{After, Connection, Scratch, Socket, Trigger, socket_by_descriptor};
use super::{Family, Job, Server, Task, Wait, for_each_task};
use crate::sys::{self, own_cpu_time};
use crate::timers::{self, Timed};

/// How many connections are accepted before others have their turn: the level
/// brings the loop back for the rest.
const ACCEPTS: usize = 64;

/// As many as wait: removing one takes a time that grows with them.
const CALLOOP_BESIDE_PENDING: usize = 1_000;

pub(super) fn build(job: Job, listener: Option<OwnedFd>) -> io::Result<Box<dyn Server>> {
    for_each_task!(job.task, with_task(job, listener))
}

fn with_task<const TASK: u8>(job: Job, listener: Option<OwnedFd>) -> io::Result<Box<dyn Server>> {
    let events = EventLoop::try_new().map_err(io::Error::other)?;
    let server = Loop::<TASK> {
        state: State {
            scratch: Scratch::new()?,
            handle: events.handle(),
        },
        events,
        family: job.family,
    };
    match (job.family, listener) {
        (_, None) => {}
        (Family::Tcp, Some(listener)) => {
            server.listen(TcpListener::from(listener), |listener| {
                let (stream, _) = listener.accept()?;
                stream.set_nonblocking(true)?;
                Ok(stream)
            })?
        }
        (_, Some(listener)) => server.listen(UnixListener::from(listener), |listener| {
            let (stream, _) = listener.accept()?;
            stream.set_nonblocking(true)?;
            Ok(stream)
        })?,
    }
    Ok(Box::new(server))
}

struct Loop<const TASK: u8> {
    state: State,
    events: EventLoop<'static, State>,
    family: Family,
}

struct State {
    scratch: Scratch,
    handle: LoopHandle<'static, Self>,
}

impl<const TASK: u8> Loop<TASK> {
    fn listen<L: AsFd + 'static, S: Socket + AsFd + 'static>(
        &self,
        listener: L,
        accept: fn(&L) -> io::Result<S>,
    ) -> io::Result<()> {
        let source = Generic::new(listener, Interest::READ, Mode::Level);
        let inserted =
            self.events
                .handle()
                .insert_source(source, move |_, listener, state: &mut State| {
                    for _ in 0..ACCEPTS {
                        match accept(listener) {
                            Ok(stream) => serve::<S, TASK>(&state.handle, stream)?,
                            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                            Err(error) => return Err(error),
                        }
                    }
                    Ok(PostAction::Continue)
                });
        inserted.map_err(|error| io::Error::other(error.error))?;
        Ok(())
    }
}

impl<const TASK: u8> Server for Loop<TASK> {
    fn adopt(&mut self, socket: OwnedFd) -> io::Result<()> {
        match self.family {
            Family::Tcp => serve::<_, TASK>(&self.state.handle, TcpStream::from(socket)),
            _ => serve::<_, TASK>(&self.state.handle, UnixStream::from(socket)),
        }
    }

    fn turn(&mut self, wait: Wait) -> io::Result<()> {
        let timeout = match wait {
            Wait::No => Some(Duration::ZERO),
            Wait::Forever => None,
        };
        match self.events.dispatch(timeout, &mut self.state) {
            Err(::calloop::Error::IoError(error)) => Err(error),
            Err(error) => Err(io::Error::other(error)),
            Ok(()) => Ok(()),
        }
    }
}

fn serve<S: Socket + AsFd + 'static, const TASK: u8>(
    handle: &LoopHandle<'static, State>,
    socket: S,
) -> io::Result<()> {
    let source = Served::<S, TASK>(Generic::new(
        Shared(Connection::new(socket)),
        Interest::READ,
        Mode::Level,
    ));
    handle
        .insert_source(source, |(), connection, state: &mut State| {
            connection.ready(&mut state.scratch, Trigger::Level)
        })
        .map_err(|error| io::Error::other(error.error))?;
    Ok(())
}

/// What a source of calloop wants to see of a connection.
struct Shared<S, const TASK: u8>(Connection<S, TASK>);

impl<S: AsFd, const TASK: u8> AsFd for Shared<S, TASK> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.socket.as_fd()
    }
}

/// Waits for room to write while there is something left, and then for
/// reading again.
struct Served<S: AsFd, const TASK: u8>(Generic<Shared<S, TASK>>);

impl<S: Socket + AsFd, const TASK: u8> EventSource for Served<S, TASK> {
    type Event = ();
    type Metadata = Connection<S, TASK>;
    type Ret = After;
    type Error = io::Error;

    fn process_events<C>(
        &mut self,
        readiness: Readiness,
        token: Token,
        mut callback: C,
    ) -> io::Result<PostAction>
    where
        C: FnMut((), &mut Self::Metadata) -> After,
    {
        let mut interest = self.0.interest;
        let action = self.0.process_events(readiness, token, |_, shared| {
            let after = callback((), &mut sys::lend(shared).0);
            let wanted = match after {
                After::Close => return Ok(PostAction::Remove),
                After::Read => Interest::READ,
                After::Write => Interest::WRITE,
            };
            if wanted.writable == interest.writable {
                return Ok(PostAction::Continue);
            }
            interest = wanted;
            Ok(PostAction::Reregister)
        })?;
        self.0.interest = interest;
        Ok(action)
    }

    fn register(&mut self, poll: &mut Poll, factory: &mut TokenFactory) -> ::calloop::Result<()> {
        self.0.register(poll, factory)
    }

    fn reregister(&mut self, poll: &mut Poll, factory: &mut TokenFactory) -> ::calloop::Result<()> {
        self.0.reregister(poll, factory)
    }

    fn unregister(&mut self, poll: &mut Poll) -> ::calloop::Result<()> {
        self.0.unregister(poll)
    }
}

socket_by_descriptor!(TcpStream);
socket_by_descriptor!(UnixStream);

pub(super) fn time(timed: Timed, count: usize) -> io::Result<Vec<f64>> {
    let mut events = EventLoop::<usize>::try_new().map_err(io::Error::other)?;
    let handle = events.handle();
    let insert = |due: Instant| {
        handle
            .insert_source(Timer::from_deadline(due), |_, _, fired: &mut usize| {
                *fired += 1;
                TimeoutAction::Drop
            })
            .map_err(|error| io::Error::other(error.error))
    };
    let mut fired = 0;
    let before = own_cpu_time();
    let now = Instant::now();
    match timed {
        Timed::Fire => {
            for delay in timers::delays(count) {
                insert(now + delay)?;
            }
            while fired < count {
                events
                    .dispatch(None, &mut fired)
                    .map_err(io::Error::other)?;
            }
        }
        Timed::Cancel => {
            let tokens: io::Result<Vec<_>> = timers::far_delays(count)
                .map(|delay| insert(now + delay))
                .collect();
            for token in tokens? {
                handle.remove(token);
            }
        }
        Timed::Pending => {
            for delay in timers::far_delays(count) {
                insert(now + delay)?;
            }
            let before = own_cpu_time();
            for delay in timers::far_delays(CALLOOP_BESIDE_PENDING) {
                handle.remove(insert(now + delay)?);
            }
            return Ok(timers::per_operation(before, CALLOOP_BESIDE_PENDING));
        }
        Timed::Reset => {
            let tokens: io::Result<Vec<_>> = timers::far_delays(count)
                .map(|delay| insert(now + delay))
                .collect();
            let before = own_cpu_time();
            for (token, delay) in tokens?.into_iter().zip(timers::moved_delays(count)) {
                handle.remove(token);
                insert(now + delay)?;
            }
            return Ok(timers::per_operation(before, count));
        }
        Timed::Lateness => {
            let late: Rc<Cell<Vec<Duration>>> = Rc::default();
            for delay in timers::delays(count) {
                let late = Rc::clone(&late);
                let due = Instant::now() + delay;
                handle
                    .insert_source(Timer::from_deadline(due), move |_, _, _| {
                        let mut all = late.take();
                        all.push(Instant::now().saturating_duration_since(due));
                        late.set(all);
                        TimeoutAction::Drop
                    })
                    .map_err(|error| io::Error::other(error.error))?;
            }
            loop {
                events
                    .dispatch(None, &mut fired)
                    .map_err(io::Error::other)?;
                let all = late.take();
                if all.len() == count {
                    return Ok(timers::lateness(all));
                }
                late.set(all);
            }
        }
    }
    Ok(timers::per_operation(before, count))
}
