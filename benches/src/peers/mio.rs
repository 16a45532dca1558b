//! The same loop on `mio`.

use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use ::mio::event::Source;
use ::mio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use ::mio::{Events, Interest, Poll, Token};

use super::hand::{After, Connection, Scratch, Socket, Trigger};
use super::{Family, Job, Server, Task, Wait, for_each_task};

const EVENTS: usize = 1024;
/// How many connections are accepted in a row.
const ACCEPTS: usize = 64;
const LISTENER: Token = Token(usize::MAX);

pub(super) fn build(job: Job, listener: Option<OwnedFd>) -> io::Result<Box<dyn Server>> {
    match job.family {
        Family::Tcp => {
            let listener = listener.map(|fd| TcpListener::from_std(fd.into()));
            for_each_task!(job.task, tcp(listener))
        }
        _ => {
            let listener = listener.map(|fd| UnixListener::from_std(fd.into()));
            for_each_task!(job.task, unix(listener))
        }
    }
}

fn tcp<const TASK: u8>(listener: Option<TcpListener>) -> io::Result<Box<dyn Server>> {
    Loop::<TcpListener, TASK>::boxed(listener)
}

fn unix<const TASK: u8>(listener: Option<UnixListener>) -> io::Result<Box<dyn Server>> {
    Loop::<UnixListener, TASK>::boxed(listener)
}

trait Listener: Source + 'static {
    type Stream: Socket + Source;
    fn accept(&self) -> io::Result<Self::Stream>;
    fn adopt(fd: OwnedFd) -> io::Result<Self::Stream>;
}

impl Listener for TcpListener {
    type Stream = TcpStream;

    fn accept(&self) -> io::Result<TcpStream> {
        Ok(self.accept()?.0)
    }

    fn adopt(fd: OwnedFd) -> io::Result<TcpStream> {
        Ok(TcpStream::from_std(fd.into()))
    }
}

impl Listener for UnixListener {
    type Stream = UnixStream;

    fn accept(&self) -> io::Result<UnixStream> {
        Ok(self.accept()?.0)
    }

    fn adopt(fd: OwnedFd) -> io::Result<UnixStream> {
        Ok(UnixStream::from_std(fd.into()))
    }
}

macro_rules! socket {
    ($type:ty) => {
        impl Socket for $type {
            #[inline]
            fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
                (&*self).read(buffer)
            }

            #[inline]
            fn send(&self, data: &[u8]) -> io::Result<usize> {
                (&*self).write(data)
            }

            #[inline]
            fn raw(&self) -> RawFd {
                self.as_raw_fd()
            }
        }
    };
}
socket!(TcpStream);
socket!(UnixStream);

struct Loop<L: Listener, const TASK: u8> {
    poll: Poll,
    events: Events,
    connections: Vec<Option<Connection<L::Stream, TASK>>>,
    free: Vec<usize>,
    scratch: Scratch,
    listener: Option<L>,
}

impl<L: Listener, const TASK: u8> Loop<L, TASK> {
    fn boxed(mut listener: Option<L>) -> io::Result<Box<dyn Server>> {
        let poll = Poll::new()?;
        if let Some(listener) = &mut listener {
            poll.registry()
                .register(listener, LISTENER, Interest::READABLE)?;
        }
        Ok(Box::new(Self {
            poll,
            events: Events::with_capacity(EVENTS),
            connections: Vec::new(),
            free: Vec::new(),
            scratch: Scratch::new()?,
            listener,
        }))
    }

    fn serve(
        poll: &Poll,
        connections: &mut Vec<Option<Connection<L::Stream, TASK>>>,
        free: &mut Vec<usize>,
        mut stream: L::Stream,
    ) -> io::Result<()> {
        let index = free.pop().unwrap_or_else(|| {
            connections.push(None);
            connections.len() - 1
        });
        let registry = poll.registry();
        registry.register(&mut stream, Token(index), Interest::READABLE)?;
        connections[index] = Some(Connection::new(stream));
        Ok(())
    }
}

impl<L: Listener, const TASK: u8> Server for Loop<L, TASK> {
    fn adopt(&mut self, socket: OwnedFd) -> io::Result<()> {
        let stream = L::adopt(socket)?;
        Self::serve(&self.poll, &mut self.connections, &mut self.free, stream)
    }

    fn turn(&mut self, wait: Wait) -> io::Result<()> {
        let timeout = match wait {
            Wait::No => Some(std::time::Duration::ZERO),
            Wait::Forever => None,
        };
        match self.poll.poll(&mut self.events, timeout) {
            Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
            _ => {}
        }
        for event in &self.events {
            if event.token() == LISTENER {
                let Some(listener) = &mut self.listener else {
                    continue;
                };
                let mut has_more = true;
                for _ in 0..ACCEPTS {
                    match listener.accept() {
                        Ok(stream) => {
                            Self::serve(&self.poll, &mut self.connections, &mut self.free, stream)?
                        }
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                            has_more = false;
                            break;
                        }
                        Err(error) => return Err(error),
                    }
                }
                if has_more {
                    // Others have their turn; what is left is reported again.
                    let registry = self.poll.registry();
                    registry.reregister(listener, LISTENER, Interest::READABLE)?;
                }
                continue;
            }
            let slot = &mut self.connections[event.token().0];
            let Some(connection) = slot else { continue };
            let is_closed = event.is_read_closed() || event.is_error();
            match connection.ready(&mut self.scratch, Trigger::Edge { is_closed }) {
                After::Read => {}
                After::Write => self.poll.registry().reregister(
                    &mut connection.socket,
                    event.token(),
                    Interest::READABLE.add(Interest::WRITABLE),
                )?,
                After::Close => {
                    *slot = None;
                    self.free.push(event.token().0);
                }
            }
        }
        Ok(())
    }
}
