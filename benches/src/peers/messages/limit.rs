//! By hand: recvmmsg(2) and sendmmsg(2), with what the kernel cuts and merges; and
//! read(2), write(2), posix_spawn(3).

use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, OwnedFd};

use super::{BURST, CHILDREN, DATAGRAM, PROGRAM, asked, report};
use crate::peers::{Family, Job, Server, Task, Wait};
use crate::sys::{self, Batch, Epoll, MESSAGES};

const EVENTS: usize = 1_024;
const MAIN: u64 = u64::MAX;
const CHUNK_BYTES: usize = 65_536;
/// As many as one message may be that the kernel cuts.
const MOST_CUT: usize = 65_000 / DATAGRAM;
const LEVEL: u32 = libc::EPOLLIN as u32;

pub(super) fn build(job: Job, fd: Option<OwnedFd>) -> io::Result<Box<dyn Server>> {
    let epoll = Epoll::new()?;
    let merges = job.task == Task::SinkMerged;
    let room = if merges { CHUNK_BYTES } else { 2_048 };
    if let Some(fd) = &fd {
        sys::set_nonblocking(fd.as_raw_fd())?;
        if merges {
            sys::receive_segments(fd.as_raw_fd())?;
        }
        let events = match (job.family, job.task) {
            (Family::Pipe, Task::Source) => (libc::EPOLLOUT | libc::EPOLLET) as u32,
            _ => sys::READ,
        };
        epoll.add(fd.as_raw_fd(), events, MAIN)?;
    }
    Ok(Box::new(Limit {
        epoll,
        events: Vec::with_capacity(EVENTS),
        job,
        fd,
        batch: Batch::new(room, merges),
        sockets: Vec::new(),
        bytes: vec![7; CHUNK_BYTES],
        count: 0,
    }))
}

struct Limit {
    epoll: Epoll,
    events: Vec<libc::epoll_event>,
    job: Job,
    fd: Option<OwnedFd>,
    batch: Batch,
    /// Connections of packets.
    sockets: Vec<Option<OwnedFd>>,
    bytes: Vec<u8>,
    count: usize,
}

impl Server for Limit {
    fn adopt(&mut self, socket: OwnedFd) -> io::Result<()> {
        let index = self.sockets.len() as u64;
        sys::set_nonblocking(socket.as_raw_fd())?;
        // One message at a time: that there is more is reported again.
        self.epoll.add(socket.as_raw_fd(), LEVEL, index)?;
        self.sockets.push(Some(socket));
        Ok(())
    }

    fn turn(&mut self, wait: Wait) -> io::Result<()> {
        let timeout = match wait {
            Wait::No => 0,
            Wait::Forever => -1,
        };
        self.epoll.wait(&mut self.events, timeout);
        for at in 0..self.events.len() {
            let libc::epoll_event { u64: data, .. } = self.events[at];
            match (data, self.job.family) {
                (MAIN, Family::Packets) => self.accept()?,
                (MAIN, Family::Pipe) if self.job.task == Task::Source => self.produce()?,
                (MAIN, Family::Pipe) => self.consume()?,
                (MAIN, _) => self.datagrams()?,
                (index, _) => self.packet(index as usize)?,
            }
        }
        Ok(())
    }
}

impl Limit {
    fn main(&self) -> i32 {
        self.fd.as_ref().map_or(-1, AsRawFd::as_raw_fd)
    }

    fn datagrams(&mut self) -> io::Result<()> {
        let fd = self.main();
        loop {
            let count = match self.batch.receive(fd) {
                Ok(count) => count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            };
            match self.job.task {
                Task::Sink | Task::SinkMerged => {
                    for at in 0..count {
                        let before = self.count / BURST;
                        self.count += self.batch.datagrams(at);
                        if self.count / BURST > before {
                            let answer = self.count.to_le_bytes();
                            sys::send_to(fd, &answer, self.batch.name(at))?;
                        }
                    }
                }
                Task::Source => {
                    for at in 0..count {
                        let mut left = asked(self.batch.data(at));
                        while left > 0 {
                            let here = left.min(MOST_CUT);
                            let data = &self.bytes[..here * DATAGRAM];
                            let to = Some(self.batch.name(at));
                            sys::send_segments(fd, to, data, DATAGRAM as u16)?;
                            left -= here;
                        }
                    }
                }
                _ => self.batch.send_back(fd, count)?,
            }
            if count < MESSAGES {
                return Ok(());
            }
        }
    }

    fn accept(&mut self) -> io::Result<()> {
        loop {
            match sys::accept(self.main()) {
                Ok(socket) => self.adopt(socket)?,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }

    #[inline]
    fn packet(&mut self, index: usize) -> io::Result<()> {
        let Some(socket) = &self.sockets[index] else {
            return Ok(());
        };
        let fd = socket.as_raw_fd();
        match sys::receive(fd, &mut self.bytes) {
            Ok(0) => self.sockets[index] = None,
            Ok(length) => {
                let sent = sys::send(fd, &self.bytes[..length])?;
                assert_eq!(sent, length, "a packet leaves whole");
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(_) => self.sockets[index] = None,
        }
        Ok(())
    }

    fn consume(&mut self) -> io::Result<()> {
        loop {
            match sys::read(self.main(), &mut self.bytes) {
                Ok(0) => {
                    self.fd = None;
                    report(self.count);
                    return Ok(());
                }
                Ok(length) => self.count += length,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }

    fn produce(&self) -> io::Result<()> {
        loop {
            match sys::write(self.main(), &self.bytes) {
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }
}

pub(super) fn spawn(count: usize) -> io::Result<()> {
    let epoll = Epoll::new()?;
    let mut events = Vec::with_capacity(CHILDREN);
    let mut children: Vec<Option<(i32, OwnedFd)>> = Vec::new();
    let start = |index: usize| -> io::Result<_> {
        let pid = sys::spawn(PROGRAM)?;
        let pidfd = sys::open_pidfd(pid)?;
        epoll.add(pidfd.as_raw_fd(), LEVEL, index as u64)?;
        Ok(Some((pid, pidfd)))
    };
    let mut left = count;
    while left > 0 && children.len() < CHILDREN {
        children.push(start(children.len())?);
        left -= 1;
    }
    let mut ended = 0;
    while ended < count {
        epoll.wait(&mut events, -1);
        for &libc::epoll_event { u64: index, .. } in &events {
            let child = &mut children[index as usize];
            // A child that begins has copies for a moment, until its exec is through: what is
            // closed here may be reported once more.
            let Some((pid, pidfd)) = child.take() else {
                continue;
            };
            assert_eq!(sys::reap(pid)?, 0, "the status of a child");
            drop(pidfd);
            ended += 1;
            if left > 0 {
                left -= 1;
                *child = start(index as usize)?;
            }
        }
    }
    Ok(())
}
