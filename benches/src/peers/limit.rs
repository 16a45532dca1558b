//! The limit: an edge-triggered epoll loop by hand, on libc.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use super::hand::{After, Connection, Scratch, Trigger};
use super::{Job, Server, Task, Wait, for_each_task};
use crate::sys::{self, Epoll};

pub(super) use crate::wheel::time;

const EVENTS: usize = 1024;
/// How many connections are accepted in a row.
const ACCEPTS: usize = 64;
/// The first listener has the number behind this, and the others those behind that.
const LISTENERS: u64 = 1 << 32;
const CLOSED: u32 = (libc::EPOLLRDHUP | libc::EPOLLHUP | libc::EPOLLERR) as u32;

pub(super) fn build(job: Job, listener: Option<OwnedFd>) -> io::Result<Box<dyn Server>> {
    for_each_task!(job.task, with_task(listener))
}

fn with_task<const TASK: u8>(listener: Option<OwnedFd>) -> io::Result<Box<dyn Server>> {
    let mut server = Limit::<TASK> {
        epoll: Epoll::new()?,
        events: Vec::with_capacity(EVENTS),
        connections: Vec::new(),
        free: Vec::new(),
        scratch: Scratch::new()?,
        listeners: Vec::new(),
    };
    if let Some(listener) = listener {
        server.listen(listener)?;
    }
    Ok(Box::new(server))
}

struct Limit<const TASK: u8> {
    epoll: Epoll,
    events: Vec<libc::epoll_event>,
    connections: Vec<Option<Connection<OwnedFd, TASK>>>,
    free: Vec<usize>,
    scratch: Scratch,
    listeners: Vec<OwnedFd>,
}

impl<const TASK: u8> Server for Limit<TASK> {
    fn adopt(&mut self, socket: OwnedFd) -> io::Result<()> {
        let index = self.free.pop().unwrap_or_else(|| {
            self.connections.push(None);
            self.connections.len() - 1
        });
        self.epoll
            .add(socket.as_raw_fd(), sys::READ, index as u64)?;
        self.connections[index] = Some(Connection::new(socket));
        Ok(())
    }

    fn listen(&mut self, listener: OwnedFd) -> io::Result<()> {
        let number = LISTENERS + self.listeners.len() as u64;
        self.epoll.add(listener.as_raw_fd(), sys::READ, number)?;
        self.listeners.push(listener);
        Ok(())
    }

    fn turn(&mut self, wait: Wait) -> io::Result<()> {
        let timeout = match wait {
            Wait::No => 0,
            Wait::Forever => -1,
        };
        self.epoll.wait(&mut self.events, timeout);
        for at in 0..self.events.len() {
            let libc::epoll_event { events, u64: data } = self.events[at];
            if data >= LISTENERS {
                self.accept(data)?;
                continue;
            }
            let slot = &mut self.connections[data as usize];
            // Served at once when it was accepted earlier in this batch.
            let Some(connection) = slot else { continue };
            let is_closed = events & CLOSED != 0;
            match connection.ready(&mut self.scratch, Trigger::Edge { is_closed }) {
                After::Read => {}
                After::Write => {
                    let fd = connection.socket.as_raw_fd();
                    self.epoll.modify(fd, sys::READ_AND_WRITE, data)?;
                }
                After::Close => {
                    *slot = None;
                    self.free.push(data as usize);
                }
            }
        }
        Ok(())
    }
}

impl<const TASK: u8> Limit<TASK> {
    #[cold]
    fn accept(&mut self, number: u64) -> io::Result<()> {
        let listener = self.listeners[(number - LISTENERS) as usize].as_raw_fd();
        for _ in 0..ACCEPTS {
            match sys::accept(listener) {
                Ok(socket) => self.adopt(socket)?,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        // Others have their turn; what is left is reported again.
        self.epoll.modify(listener, sys::READ, number)
    }
}
