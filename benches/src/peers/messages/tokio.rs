//! tokio: its own UDP sockets, pipes and children, packets by `AsyncFd`.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd};

use ::tokio::io::unix::AsyncFd;
use ::tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use ::tokio::net::UdpSocket;
use ::tokio::net::unix::pipe;
use ::tokio::process::Command;
use ::tokio::task::JoinSet;

use super::{BURST, CHILDREN, DATAGRAM, PROGRAM, asked, report};
use crate::peers::tokio::{runtime, server};
use crate::peers::{Family, Job, Server, Task};
use crate::sys;

const CHUNK_BYTES: usize = 65_536;

pub(super) fn build(job: Job, fd: Option<OwnedFd>) -> io::Result<Box<dyn Server>> {
    let runtime = runtime()?;
    let guard = runtime.enter();
    if let Some(fd) = fd {
        sys::set_nonblocking(fd.as_raw_fd())?;
        match (job.family, job.task) {
            (Family::Packets, _) => {
                let listener = sys::async_fd(fd, Interest::READABLE)?;
                runtime.spawn(accept(listener));
            }
            (Family::Pipe, Task::Source) => {
                runtime.spawn(pipe_out(pipe::Sender::from_owned_fd(fd)?));
            }
            (Family::Pipe, _) => {
                runtime.spawn(pipe_in(pipe::Receiver::from_owned_fd(fd)?));
            }
            (_, task) => {
                let socket = UdpSocket::from_std(fd.into())?;
                runtime.spawn(datagrams(socket, task));
            }
        }
    }
    drop(guard);
    Ok(server(runtime, job))
}

/// Receives and answers without waiting for as long as there is something.
async fn datagrams(socket: UdpSocket, task: Task) -> io::Result<()> {
    let mut buffer = vec![7; CHUNK_BYTES];
    let mut count = 0_usize;
    loop {
        socket.readable().await?;
        loop {
            let (length, from) = match socket.try_recv_from(&mut buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                other => other?,
            };
            match task {
                Task::Sink | Task::SinkMerged => {
                    count += 1;
                    if count.is_multiple_of(BURST) {
                        send(&socket, &count.to_le_bytes(), from).await?;
                    }
                }
                Task::Source => {
                    for _ in 0..asked(&buffer) {
                        send(&socket, &buffer[..DATAGRAM], from).await?;
                    }
                }
                _ => send(&socket, &buffer[..length], from).await?,
            }
        }
    }
}

#[inline]
async fn send(socket: &UdpSocket, data: &[u8], to: SocketAddr) -> io::Result<()> {
    match socket.try_send_to(data, to) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
            socket.send_to(data, to).await?;
        }
        sent => drop(sent?),
    }
    Ok(())
}

async fn accept(listener: AsyncFd<OwnedFd>) -> io::Result<()> {
    loop {
        let socket = listener
            .async_io(Interest::READABLE, |fd| sys::accept(fd.as_raw_fd()))
            .await?;
        ::tokio::spawn(packets(socket));
    }
}

async fn packets(socket: OwnedFd) -> io::Result<()> {
    let socket = sys::async_fd(socket, Interest::READABLE | Interest::WRITABLE)?;
    let mut buffer = vec![0; 4_096];
    loop {
        let length = socket
            .async_io(Interest::READABLE, |fd| {
                sys::receive(fd.as_raw_fd(), &mut buffer)
            })
            .await?;
        if length == 0 {
            return Ok(());
        }
        socket
            .async_io(Interest::WRITABLE, |fd| {
                sys::send(fd.as_raw_fd(), &buffer[..length])
            })
            .await?;
    }
}

async fn pipe_in(mut pipe: pipe::Receiver) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK_BYTES];
    let mut count = 0;
    loop {
        match pipe.read(&mut buffer).await? {
            0 => break,
            length => count += length,
        }
    }
    report(count);
    Ok(())
}

async fn pipe_out(mut pipe: pipe::Sender) -> io::Result<()> {
    let buffer = vec![7; CHUNK_BYTES];
    loop {
        pipe.write_all(&buffer).await?;
    }
}

pub(super) fn spawn(count: usize) -> io::Result<()> {
    async fn child() {
        let mut command = Command::new(PROGRAM.to_str().expect("a name"));
        let status = command.env_clear().status().await;
        assert!(status.expect("it was started").success());
    }
    runtime()?.block_on(async {
        let mut children = JoinSet::new();
        let mut left = count;
        while left > 0 && children.len() < CHILDREN {
            children.spawn(child());
            left -= 1;
        }
        while children.join_next().await.is_some() {
            if left > 0 {
                children.spawn(child());
                left -= 1;
            }
        }
    });
    Ok(())
}
