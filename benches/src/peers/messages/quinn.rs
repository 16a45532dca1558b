//! quinn-udp, on tokio as quinn has it: what is received at once, and what the kernel cuts
//! and merges.

use std::io::{self, IoSliceMut};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;

use ::tokio::io::Interest;
use ::tokio::net::UdpSocket;
use quinn_udp::{BATCH_SIZE, RecvMeta, Transmit, UdpSocketState};

use super::{BURST, DATAGRAM, asked};
use crate::peers::tokio::{runtime, server};
use crate::peers::{Job, Server, Task};

pub(super) fn build(job: Job, fd: Option<OwnedFd>) -> io::Result<Box<dyn Server>> {
    let runtime = runtime()?;
    let guard = runtime.enter();
    if let Some(fd) = fd {
        let socket = std::net::UdpSocket::from(fd);
        let state = UdpSocketState::new((&socket).into())?;
        socket.set_nonblocking(true)?;
        let socket = Socket {
            socket: UdpSocket::from_std(socket)?,
            state,
        };
        runtime.spawn(datagrams(socket, job.task));
    }
    drop(guard);
    Ok(server(runtime, job))
}

struct Socket {
    socket: UdpSocket,
    state: UdpSocketState,
}

impl Socket {
    async fn send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let send = || self.state.try_send((&self.socket).into(), transmit);
        self.socket.async_io(Interest::WRITABLE, send).await
    }
}

fn transmit(contents: &[u8], to: SocketAddr, segment_size: Option<usize>) -> Transmit<'_> {
    Transmit {
        destination: to,
        ecn: None,
        contents,
        segment_size,
        src_ip: None,
    }
}

async fn datagrams(socket: Socket, task: Task) -> io::Result<()> {
    let bytes = vec![7; 65_536];
    let room = DATAGRAM * socket.state.gro_segments();
    let mut memory = vec![0; room * BATCH_SIZE];
    let mut metas = [RecvMeta::default(); BATCH_SIZE];
    let mut count = 0;
    loop {
        let mut buffers: Vec<_> = memory.chunks_exact_mut(room).map(IoSliceMut::new).collect();
        let received = socket
            .socket
            .async_io(Interest::READABLE, || {
                socket
                    .state
                    .recv((&socket.socket).into(), &mut buffers, &mut metas)
            })
            .await?;
        for (meta, data) in metas.iter().zip(&buffers).take(received) {
            let data = &data[..meta.len];
            match task {
                Task::Sink | Task::SinkMerged => {
                    for _ in data.chunks(meta.stride.max(1)) {
                        count += 1;
                        if usize::is_multiple_of(count, BURST) {
                            let answer = count.to_le_bytes();
                            socket.send(&transmit(&answer, meta.addr, None)).await?;
                        }
                    }
                }
                Task::Source => {
                    let mut left = asked(data);
                    let most = socket.state.max_gso_segments().min(65_000 / DATAGRAM);
                    while left > 0 {
                        let here = left.min(most);
                        let contents = &bytes[..here * DATAGRAM];
                        let cut = Some(DATAGRAM);
                        socket.send(&transmit(contents, meta.addr, cut)).await?;
                        left -= here;
                    }
                }
                _ => {
                    for piece in data.chunks(meta.stride.max(1)) {
                        socket.send(&transmit(piece, meta.addr, None)).await?;
                    }
                }
            }
        }
    }
}
