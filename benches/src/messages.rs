//! The load of datagrams and pipes, by hand as in `load`. Nothing is lost: no more is on
//! its way than a socket holds.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::net::UdpSocket;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use crate::child::ServerProcess;
use crate::load::{Outcome, measured};
use crate::peers::messages::{BURST, DATAGRAM};
use crate::sys;
use crate::works::Effort;

/// How many bursts are on their way.
const BURSTS: usize = 2;
const PATIENCE: Duration = Duration::from_secs(10);
const CHUNK_BYTES: usize = 65_536;

fn connect(server: &ServerProcess) -> io::Result<UdpSocket> {
    let socket = UdpSocket::from(server.connect()?);
    socket.set_read_timeout(Some(PATIENCE))?;
    Ok(socket)
}

/// Does the same again and again, first for the warm-up and then to be measured. Each
/// time is for `operations`.
fn rounds(
    server: &ServerProcess,
    effort: Effort,
    operations: usize,
    mut once: impl FnMut() -> io::Result<()>,
) -> io::Result<Outcome> {
    let until = Instant::now() + effort.warm_up;
    while Instant::now() < until {
        once()?;
    }
    let cpu = server.cpu_time()?;
    let start = Instant::now();
    let mut count = 0;
    while start.elapsed() < effort.span {
        once()?;
        count += operations as u64;
    }
    Ok(Outcome {
        operations: count,
        elapsed: start.elapsed(),
        cpu: server.cpu_time()? - cpu,
        latencies: Vec::new(),
    })
}

/// Sends bursts; the server says after each how many have come.
pub(crate) fn datagrams_in(
    server: &ServerProcess,
    effort: Effort,
    cut: bool,
) -> io::Result<Outcome> {
    let socket = connect(server)?;
    let fd = socket.as_raw_fd();
    let data = vec![5; BURST * DATAGRAM];
    let send = || match cut {
        true => sys::send_segments(fd, None, &data, DATAGRAM as u16),
        false => sys::send_many(fd, &data, DATAGRAM),
    };
    for _ in 1..BURSTS {
        send()?;
    }
    let mut told = 0;
    rounds(server, effort, BURST, || {
        send()?;
        let mut answer = [0; 8];
        assert_eq!(socket.recv(&mut answer)?, answer.len(), "a number");
        told += BURST;
        assert_eq!(usize::from_le_bytes(answer), told, "datagrams received");
        Ok(())
    })
}

/// Asks for bursts, and looks at each datagram.
pub(crate) fn datagrams_out(server: &ServerProcess, effort: Effort) -> io::Result<Outcome> {
    let socket = connect(server)?;
    let ask = || socket.send(&BURST.to_le_bytes()).map(drop);
    for _ in 1..BURSTS {
        ask()?;
    }
    let mut data = [0; 2 * DATAGRAM];
    rounds(server, effort, BURST, || {
        ask()?;
        for _ in 0..BURST {
            assert_eq!(socket.recv(&mut data)?, DATAGRAM, "a datagram");
        }
        Ok(())
    })
}

/// Writes so many bytes; the server says how many came.
pub(crate) fn pipe_in(server: &mut ServerProcess, bytes: usize) -> io::Result<Outcome> {
    let mut pipe = File::from(server.connect()?);
    let data = vec![5; CHUNK_BYTES];
    let cpu = server.cpu_time()?;
    let start = Instant::now();
    let mut left = bytes;
    while left > 0 {
        left -= pipe.write(&data[..left.min(CHUNK_BYTES)])?;
    }
    drop(pipe);
    assert_eq!(server.counted()?, bytes, "bytes received");
    Ok(Outcome {
        operations: bytes as u64,
        elapsed: start.elapsed(),
        cpu: server.cpu_time()? - cpu,
        latencies: Vec::new(),
    })
}

/// Reads so many bytes of a server that writes without end.
pub(crate) fn pipe_out(server: &ServerProcess, bytes: usize) -> io::Result<Outcome> {
    let mut pipe = File::from(server.connect()?);
    let mut data = vec![0; CHUNK_BYTES];
    measured(server, bytes, || {
        let mut left = bytes;
        while left > 0 {
            let room = left.min(CHUNK_BYTES);
            match pipe.read(&mut data[..room])? {
                0 => return Err(ErrorKind::UnexpectedEof.into()),
                length => left -= length,
            }
        }
        Ok(())
    })
}
