//! The works in which both ends are the peer's: one process accepts and passes
//! what it accepted to another, which answers; and one fetches descriptors from
//! another. By hand, by bowline, and by tokio with `sendfd`.

use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use ::bowline::{
    Address, BuildContext, CloseReason, Context, Protocol, Reactor, ReceivedDescriptors, Transport,
    Transports, UnixTransport,
};
use ::tokio::io::{AsyncReadExt, AsyncWriteExt};
use ::tokio::net::{TcpListener, TcpStream, UnixStream};
use sendfd::{RecvWithFd, SendWithFd};

use super::{Peer, tokio};
use crate::sys::{self, Control, Epoll, MAX_DESCRIPTORS};

const BUFFER_BYTES: usize = 65_536;
const EVENTS: usize = 256;

pub(crate) fn can(peer: Peer) -> bool {
    matches!(peer, Peer::Limit | Peer::Bowline | Peer::Tokio)
}

/// Accepts, and passes on to a worker process of the same peer.
pub(crate) fn accept(peer: Peer, listener: OwnedFd) -> io::Result<()> {
    let (ours, theirs) = StdUnixStream::pair()?;
    for end in [&ours, &theirs] {
        end.set_nonblocking(true)?;
    }
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["work", peer.name()]);
    // It ends with us.
    let _worker = sys::spawn_with_listener(&mut command, theirs.into())?;
    match peer {
        Peer::Bowline => accept_bowline(listener, ours.into()),
        Peer::Tokio => accept_tokio(listener, ours),
        _ => accept_by_hand(&listener, &ours.into()),
    }
}

/// Answers on the connections that come over a channel.
pub(crate) fn work(peer: Peer, channel: OwnedFd) -> io::Result<()> {
    match peer {
        Peer::Bowline => work_bowline(channel),
        Peer::Tokio => work_tokio(channel),
        _ => work_by_hand(&channel),
    }
}

/// Asks a server for descriptors; how many came, and in how many seconds.
pub(crate) fn fetch(peer: Peer, path: &Path, count: usize) -> io::Result<(usize, f64)> {
    match peer {
        Peer::Bowline => fetch_bowline(path, count),
        Peer::Tokio => fetch_tokio(path, count),
        _ => fetch_by_hand(path, count),
    }
}

// By hand.

fn accept_by_hand(listener: &OwnedFd, channel: &OwnedFd) -> io::Result<()> {
    let epoll = Epoll::new()?;
    epoll.add(listener.as_raw_fd(), sys::READ, 0)?;
    let mut events = Vec::with_capacity(EVENTS);
    let mut control = Control::new();
    loop {
        epoll.wait(&mut events, -1);
        loop {
            match sys::accept(listener.as_raw_fd()) {
                Ok(socket) => {
                    control.send(channel.as_raw_fd(), b"c", &[socket.as_raw_fd()])?;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
    }
}

fn work_by_hand(channel: &OwnedFd) -> io::Result<()> {
    const CHANNEL: u64 = u64::MAX;
    let epoll = Epoll::new()?;
    epoll.add(channel.as_raw_fd(), sys::READ, CHANNEL)?;
    let mut events = Vec::with_capacity(EVENTS);
    let mut control = Control::new();
    let mut buffer = vec![0; BUFFER_BYTES];
    let mut received = Vec::new();
    let mut connections: Vec<Option<OwnedFd>> = Vec::new();
    loop {
        epoll.wait(&mut events, -1);
        for &libc::epoll_event { u64: data, .. } in &events {
            if data == CHANNEL {
                while let Ok(1..) = control.receive(channel.as_raw_fd(), &mut buffer, &mut received)
                {
                    for socket in received.drain(..) {
                        let at = socket.as_raw_fd() as usize;
                        epoll.add(socket.as_raw_fd(), sys::READ, at as u64)?;
                        if connections.len() <= at {
                            connections.resize_with(at + 1, || None);
                        }
                        connections[at] = Some(socket);
                    }
                }
                continue;
            }
            let slot = &mut connections[data as usize];
            let Some(socket) = slot else { continue };
            match sys::receive(socket.as_raw_fd(), &mut buffer) {
                Ok(0) => *slot = None,
                Ok(length) => {
                    sys::send(socket.as_raw_fd(), &buffer[..length])?;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(_) => *slot = None,
            }
        }
    }
}

fn fetch_by_hand(path: &Path, count: usize) -> io::Result<(usize, f64)> {
    let start = Instant::now();
    let socket = StdUnixStream::connect(path)?;
    socket.set_nonblocking(true)?;
    let fd = socket.as_raw_fd();
    let epoll = Epoll::new()?;
    epoll.add(fd, sys::READ, 0)?;
    sys::send(fd, &count.to_le_bytes())?;
    let mut events = Vec::with_capacity(EVENTS);
    let mut control = Control::new();
    let mut buffer = vec![0; BUFFER_BYTES];
    let mut received = Vec::new();
    let mut arrived = 0;
    loop {
        match control.receive(fd, &mut buffer, &mut received) {
            Ok(0) => return Ok((arrived, start.elapsed().as_secs_f64())),
            Ok(_) => {
                arrived += received.len();
                received.clear();
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => epoll.wait(&mut events, -1),
            Err(error) => return Err(error),
        }
    }
}

// bowline.

fn accept_bowline(listener: OwnedFd, channel: OwnedFd) -> io::Result<()> {
    let mut reactor = Reactor::new()?;
    let worker = reactor
        .adopt_unix_stream(channel, Channel)
        .map_err(io::Error::other)?;
    let acceptor = move |cx: &mut BuildContext<'_>, socket: OwnedFd, _: &Address| {
        let worker = cx.reactor.get(worker).expect("the worker lives");
        worker
            .write_with_descriptors(b"c", vec![socket.into()])
            .expect("the queue is far from its limit");
    };
    let listener = reactor
        .accept_adopted(listener, acceptor)
        .map_err(io::Error::other)?;
    // The generator that made it has let go of it, and the worker has no copy.
    let listener = reactor.get(listener).expect("it was just made");
    listener.assume_sole_holder();
    reactor.run().map_err(io::Error::other)
}

fn work_bowline(channel: OwnedFd) -> io::Result<()> {
    let mut reactor = Reactor::new()?;
    reactor
        .adopt_unix_stream(channel, Channel)
        .map_err(io::Error::other)?;
    reactor.run().map_err(io::Error::other)
}

struct Channel;

impl<T: UnixTransport> Protocol<T> for Channel {
    fn data_received(&mut self, _: &mut Context<'_, T>, _: &[u8]) {}

    fn file_descriptor_received(
        &mut self,
        cx: &mut Context<'_, T>,
        fd: OwnedFd,
    ) -> Result<(), OwnedFd> {
        // One that is reset already is no loss.
        drop(cx.reactor.adopt_tcp_stream(fd, Answer));
        Ok(())
    }
}

struct Answer;

impl<T: Transport> Protocol<T> for Answer {
    fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
        cx.transport.write(data);
    }
}

fn fetch_bowline(path: &Path, count: usize) -> io::Result<(usize, f64)> {
    let start = Instant::now();
    let mut reactor = Reactor::new()?;
    let (done, result) = std::sync::mpsc::channel();
    reactor.connect_unix(path, move |_: &Address| Fetch {
        count,
        arrived: 0,
        done: done.clone(),
    })?;
    reactor.run().map_err(io::Error::other)?;
    let arrived = result.try_recv().map_err(io::Error::other)?;
    Ok((arrived, start.elapsed().as_secs_f64()))
}

struct Fetch {
    count: usize,
    arrived: usize,
    done: std::sync::mpsc::Sender<usize>,
}

impl<T: UnixTransport> Protocol<T> for Fetch {
    fn connection_made(&mut self, cx: &mut Context<'_, T>) {
        cx.transport.write(&self.count.to_le_bytes());
    }

    fn data_received(&mut self, _: &mut Context<'_, T>, _: &[u8]) {}

    fn descriptors_received(
        &mut self,
        _: &mut Context<'_, T>,
        descriptors: &mut ReceivedDescriptors<'_>,
        _: &[u8],
    ) {
        self.arrived += descriptors.count();
    }

    fn connection_lost(&mut self, cx: &mut Context<'_, T>, _: &CloseReason) {
        self.done.send(self.arrived).expect("somebody waits");
        cx.reactor.stop().expect("it runs: this is a callback");
    }
}

// tokio.

fn accept_tokio(listener: OwnedFd, channel: StdUnixStream) -> io::Result<()> {
    tokio::runtime()?.block_on(async {
        let listener = TcpListener::from_std(listener.into())?;
        let channel = UnixStream::from_std(channel)?;
        loop {
            let (socket, _) = listener.accept().await?;
            loop {
                match channel.send_with_fd(b"c", &[socket.as_fd().as_raw_fd()]) {
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {
                        channel.writable().await?;
                    }
                    other => {
                        other?;
                        break;
                    }
                };
            }
        }
    })
}

fn work_tokio(channel: OwnedFd) -> io::Result<()> {
    tokio::runtime()?.block_on(async {
        let channel = UnixStream::from_std(channel.into())?;
        let mut buffer = vec![0; 4096];
        let mut descriptors = [0; MAX_DESCRIPTORS];
        loop {
            channel.readable().await?;
            let received = match channel.recv_with_fd(&mut buffer, &mut descriptors) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => continue,
                other => other?.1,
            };
            for &fd in &descriptors[..received] {
                let mut socket = TcpStream::from_std(sys::own(fd).into())?;
                ::tokio::spawn(async move {
                    let mut buffer = vec![0; 4096];
                    while let Ok(length @ 1..) = socket.read(&mut buffer).await {
                        if socket.write_all(&buffer[..length]).await.is_err() {
                            break;
                        }
                    }
                });
            }
        }
    })
}

fn fetch_tokio(path: &Path, count: usize) -> io::Result<(usize, f64)> {
    let start = Instant::now();
    tokio::runtime()?.block_on(async {
        let mut stream = UnixStream::connect(path).await?;
        stream.write_all(&count.to_le_bytes()).await?;
        let mut buffer = vec![0; BUFFER_BYTES];
        let mut descriptors = [0; MAX_DESCRIPTORS];
        let mut arrived = 0;
        loop {
            stream.readable().await?;
            match stream.recv_with_fd(&mut buffer, &mut descriptors) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
                Ok((0, _)) => return Ok((arrived, start.elapsed().as_secs_f64())),
                Ok((_, received)) => {
                    arrived += received;
                    for &fd in &descriptors[..received] {
                        drop(sys::own(fd));
                    }
                }
            }
        }
    })
}
