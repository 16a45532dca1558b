//! The load: neither bowline nor any framework, on sockets and epoll by hand.

use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use crate::child::ServerProcess;
use crate::sys::{self, Control, Epoll};

const READABLE: u32 = libc::EPOLLIN as u32;
const EVENTS: usize = 256;
const BULK_BYTES: usize = 256 * 1024;
/// How much the greedy peer does each time the generator comes by.
const GREEDY_BYTES: usize = 64 * 1024;
/// How many connections of a flood are made each time.
const FLOOD: usize = 2;
/// A server that does not answer for so long has failed.
const PATIENCE_MS: i32 = 10_000;

/// What a work has measured.
#[derive(Clone, Debug, Default)]
pub(crate) struct Outcome {
    pub(crate) operations: u64,
    pub(crate) elapsed: Duration,
    /// CPU time of the server.
    pub(crate) cpu: Duration,
    /// How long answers took, sorted, in nanoseconds.
    pub(crate) latencies: Vec<u32>,
}

impl Outcome {
    pub(crate) fn rate(&self) -> f64 {
        self.operations as f64 / self.elapsed.as_secs_f64()
    }

    pub(crate) fn cpu_per_operation(&self) -> f64 {
        self.cpu.as_nanos() as f64 / self.operations as f64
    }

    /// Nanoseconds; infinite when nothing was answered.
    pub(crate) fn percentile(&self, percent: f64) -> f64 {
        let Some(last) = self.latencies.len().checked_sub(1) else {
            return f64::INFINITY;
        };
        f64::from(self.latencies[(last as f64 * percent / 100.0) as usize])
    }
}

/// Who bothers the server beside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Beside {
    Nobody,
    /// A connection that sends as fast as it can, and reads the answers.
    Greedy,
    /// Connections that are made and closed.
    AcceptFlood,
}

/// One message on each connection at a time.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Echo {
    pub(crate) connections: usize,
    pub(crate) message: usize,
    /// How many times the message comes back.
    pub(crate) times: usize,
    pub(crate) beside: Beside,
}

struct Connection {
    socket: OwnedFd,
    /// Bytes of the answer that have come.
    received: usize,
    number: u64,
    sent_at: Instant,
}

pub(crate) struct Echoing {
    echo: Echo,
    connections: Vec<Connection>,
    epoll: Epoll,
    events: Vec<libc::epoll_event>,
    message: Vec<u8>,
    buffer: Vec<u8>,
    greedy: Option<OwnedFd>,
    bulk: Vec<u8>,
    operations: u64,
    latencies: Vec<u32>,
}

impl Echoing {
    pub(crate) fn connect(server: &ServerProcess, echo: Echo) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        let now = Instant::now();
        let mut connections = Vec::with_capacity(echo.connections);
        for number in 0..echo.connections {
            let socket = server.connect()?;
            sys::set_nonblocking(socket.as_raw_fd())?;
            epoll.add(socket.as_raw_fd(), READABLE, number as u64)?;
            connections.push(Connection {
                socket,
                received: 0,
                number: (number as u64) << 32,
                sent_at: now,
            });
        }
        let greedy = if echo.beside == Beside::Greedy {
            let socket = server.connect()?;
            sys::set_nonblocking(socket.as_raw_fd())?;
            Some(socket)
        } else {
            None
        };
        Ok(Self {
            echo,
            connections,
            epoll,
            events: Vec::with_capacity(EVENTS),
            message: (0..echo.message).map(|at| at as u8).collect(),
            buffer: vec![0; echo.message * echo.times],
            greedy,
            bulk: vec![0; GREEDY_BYTES],
            operations: 0,
            latencies: Vec::with_capacity(1 << 20),
        })
    }

    /// Runs for `warm_up`, and then measures for `span`.
    pub(crate) fn run(
        &mut self,
        server: &ServerProcess,
        warm_up: Duration,
        span: Duration,
    ) -> io::Result<Outcome> {
        let now = Instant::now();
        for index in 0..self.connections.len() {
            self.send(index, now)?;
        }
        self.run_until(server, now + warm_up)?;
        self.operations = 0;
        self.latencies.clear();
        let cpu = server.cpu_time()?;
        let start = Instant::now();
        let end = self.run_until(server, start + span)?;
        let cpu = server.cpu_time()? - cpu;
        let mut latencies = std::mem::take(&mut self.latencies);
        latencies.sort_unstable();
        Ok(Outcome {
            operations: self.operations,
            elapsed: end - start,
            cpu,
            latencies,
        })
    }

    /// One message on each connection, answered.
    pub(crate) fn once(&mut self) -> io::Result<()> {
        for index in 0..self.connections.len() {
            self.one(index)?;
        }
        Ok(())
    }

    /// One message on one connection, answered.
    pub(crate) fn one(&mut self, index: usize) -> io::Result<()> {
        self.send(index, Instant::now())?;
        loop {
            self.epoll.wait(&mut self.events, PATIENCE_MS);
            self.check_patience()?;
            if self.receive(index)? {
                return Ok(());
            }
        }
    }

    fn run_until(&mut self, server: &ServerProcess, end: Instant) -> io::Result<Instant> {
        let mut events = Vec::with_capacity(EVENTS);
        loop {
            let timeout = if self.echo.beside == Beside::Nobody {
                PATIENCE_MS
            } else {
                0
            };
            self.epoll.wait(&mut events, timeout);
            if events.is_empty() && timeout > 0 {
                return Err(ErrorKind::TimedOut.into());
            }
            for &libc::epoll_event { u64: index, .. } in &events {
                let index = index as usize;
                if self.receive(index)? {
                    let now = Instant::now();
                    let took = now - self.connections[index].sent_at;
                    self.latencies.push(took.as_nanos() as u32);
                    self.operations += 1;
                    self.send(index, now)?;
                }
            }
            self.bother(server)?;
            let now = Instant::now();
            if now >= end {
                return Ok(now);
            }
        }
    }

    fn check_patience(&self) -> io::Result<()> {
        if self.events.is_empty() {
            Err(ErrorKind::TimedOut.into())
        } else {
            Ok(())
        }
    }

    #[inline]
    fn send(&mut self, index: usize, now: Instant) -> io::Result<()> {
        let connection = &mut self.connections[index];
        connection.number += 1;
        connection.received = 0;
        connection.sent_at = now;
        self.message[..8].copy_from_slice(&connection.number.to_le_bytes());
        let sent = sys::send(connection.socket.as_raw_fd(), &self.message)?;
        assert_eq!(sent, self.message.len(), "one message fits any socket");
        Ok(())
    }

    /// Takes what has come; whether the answer is whole. Panics when it is
    /// wrong.
    #[inline]
    fn receive(&mut self, index: usize) -> io::Result<bool> {
        let connection = &mut self.connections[index];
        let length = self.message.len();
        let fd = connection.socket.as_raw_fd();
        let whole = length * self.echo.times;
        let room = whole - connection.received;
        let taken = match sys::receive(fd, &mut self.buffer[..room]) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(taken) => taken,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
            Err(error) => return Err(error),
        };
        self.message[..8].copy_from_slice(&connection.number.to_le_bytes());
        let mut at = connection.received;
        let mut answer = &self.buffer[..taken];
        while !answer.is_empty() {
            let expected = &self.message[at % length..];
            let here = expected.len().min(answer.len());
            assert!(answer[..here] == expected[..here], "wrong answer");
            answer = &answer[here..];
            at += here;
        }
        connection.received = at;
        Ok(at == whole)
    }

    fn bother(&mut self, server: &ServerProcess) -> io::Result<()> {
        match self.echo.beside {
            Beside::Nobody => {}
            Beside::Greedy => {
                if let Some(socket) = &self.greedy {
                    let fd = socket.as_raw_fd();
                    ignore_full(sys::send(fd, &self.bulk))?;
                    ignore_full(sys::receive(fd, &mut self.bulk))?;
                }
            }
            Beside::AcceptFlood => {
                for _ in 0..FLOOD {
                    match server.connect_at_once() {
                        Err(error) if error.kind() != ErrorKind::WouldBlock => return Err(error),
                        socket => drop(socket),
                    }
                }
            }
        }
        Ok(())
    }
}

fn ignore_full(result: io::Result<usize>) -> io::Result<usize> {
    match result {
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(0),
        other => other,
    }
}

/// Connects, sends one message, waits for the answer and closes; so many at a
/// time.
pub(crate) fn churn(
    server: &ServerProcess,
    at_a_time: usize,
    span: Duration,
) -> io::Result<Outcome> {
    const MESSAGE: [u8; 64] = [7; 64];
    let epoll = Epoll::new()?;
    let mut events = Vec::with_capacity(EVENTS);
    let mut source = 0_u16;
    let mut open = || -> io::Result<OwnedFd> {
        // 127.0.0.1 to 127.0.255.255.
        source = source.wrapping_add(1);
        let socket = server.connect_from(source)?;
        sys::send(socket.as_raw_fd(), &MESSAGE)?;
        Ok(socket)
    };
    let mut sockets = Vec::new();
    for index in 0..at_a_time {
        let socket = open()?;
        epoll.add(socket.as_raw_fd(), READABLE, index as u64)?;
        sockets.push(socket);
    }
    let mut operations = 0;
    let cpu = server.cpu_time()?;
    let start = Instant::now();
    loop {
        epoll.wait(&mut events, PATIENCE_MS);
        if events.is_empty() {
            return Err(ErrorKind::TimedOut.into());
        }
        for &libc::epoll_event { u64: index, .. } in &events {
            let mut answer = [0; 65];
            let length = sys::receive(sockets[index as usize].as_raw_fd(), &mut answer)?;
            assert!(answer[..length] == MESSAGE, "wrong answer");
            let socket = open()?;
            epoll.add(socket.as_raw_fd(), READABLE, index)?;
            sockets[index as usize] = socket;
            operations += 1;
        }
        if start.elapsed() >= span {
            break;
        }
    }
    Ok(Outcome {
        operations,
        elapsed: start.elapsed(),
        cpu: server.cpu_time()? - cpu,
        latencies: Vec::new(),
    })
}

/// Sends so many bytes; the server says how many came.
pub(crate) fn bulk_in(server: &ServerProcess, bytes: usize) -> io::Result<Outcome> {
    let socket = server.connect()?;
    let fd = socket.as_raw_fd();
    let data = vec![5; BULK_BYTES];
    measured(server, bytes, || {
        let mut left = bytes;
        while left > 0 {
            left -= sys::send(fd, &data[..left.min(BULK_BYTES)])?;
        }
        sys::shut_down_writing(fd)?;
        expect_count(fd, bytes)
    })
}

/// Asks for so many bytes, and counts them.
pub(crate) fn bulk_out(server: &ServerProcess, bytes: usize) -> io::Result<Outcome> {
    let socket = server.connect()?;
    let fd = socket.as_raw_fd();
    let mut data = vec![0; BULK_BYTES];
    measured(server, bytes, || {
        sys::send(fd, &bytes.to_le_bytes())?;
        let mut count = 0;
        loop {
            match sys::receive(fd, &mut data)? {
                0 => break,
                length => count += length,
            }
        }
        assert_eq!(count, bytes, "bytes received");
        Ok(())
    })
}

/// Sends so many descriptors; the server says how many came.
pub(crate) fn descriptors_in(
    server: &ServerProcess,
    count: usize,
    per_message: usize,
) -> io::Result<Outcome> {
    let socket = server.connect()?;
    let fd = socket.as_raw_fd();
    let file = std::fs::File::open("/dev/null")?;
    let descriptors = vec![file.as_raw_fd(); per_message];
    let bytes = vec![0; per_message];
    let mut control = Control::new();
    measured(server, count, || {
        for _ in 0..count / per_message {
            control.send(fd, &bytes, &descriptors)?;
        }
        sys::shut_down_writing(fd)?;
        expect_count(fd, count / per_message * per_message)
    })
}

/// Asks for so many descriptors, and counts them.
pub(crate) fn descriptors_out(server: &ServerProcess, count: usize) -> io::Result<Outcome> {
    let socket = server.connect()?;
    let fd = socket.as_raw_fd();
    let mut control = Control::new();
    let mut buffer = vec![0; 4096];
    let mut received = Vec::new();
    measured(server, count, || {
        sys::send(fd, &count.to_le_bytes())?;
        let mut arrived = 0;
        while control.receive(fd, &mut buffer, &mut received)? > 0 {
            arrived += received.len();
            received.clear();
        }
        assert_eq!(arrived, count, "descriptors received");
        Ok(())
    })
}

fn expect_count(fd: i32, expected: usize) -> io::Result<()> {
    let mut answer = [0; 8];
    let length = sys::receive(fd, &mut answer)?;
    assert_eq!(
        (length, usize::from_le_bytes(answer)),
        (8, expected),
        "count"
    );
    Ok(())
}

pub(crate) fn measured(
    server: &ServerProcess,
    operations: usize,
    work: impl FnOnce() -> io::Result<()>,
) -> io::Result<Outcome> {
    let cpu = server.cpu_time()?;
    let start = Instant::now();
    work()?;
    Ok(Outcome {
        operations: operations as u64,
        elapsed: start.elapsed(),
        cpu: server.cpu_time()? - cpu,
        latencies: Vec::new(),
    })
}
