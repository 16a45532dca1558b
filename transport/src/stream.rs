//! The plain stream: bytes to and from a socket.

use std::io::{self, IoSlice};
use std::time::Duration;

use crate::file_descriptor::{Core, FileDescriptor, Received, Sent};
use crate::shared::ReadBuffers;
use crate::socket::{Socket, TcpSocket};

/// A transport that moves bytes and nothing else: TCP as it is, and the base
/// that [`SendmsgMixin`](crate::SendmsgMixin) is put on for UNIX sockets.
#[derive(Debug)]
pub struct Stream<S> {
    core: Core<S>,
}

/// A TCP connection.
///
/// It passes no descriptors, which the compiler knows. A protocol of UNIX
/// connections may say
///
/// ```
/// use std::os::fd::OwnedFd;
/// use bowline_protocol::{Context, Protocol, Transport, UnixTransport};
/// use bowline_transport::UnixStream;
///
/// struct Lender(Option<OwnedFd>);
///
/// impl Protocol<UnixStream> for Lender {
///     fn data_received(&mut self, cx: &mut Context<'_, UnixStream>, data: &[u8]) {
///         if let Some(fd) = self.0.take() {
///             // An error gives it back, and closes it when it is dropped.
///             let _ = cx.transport.send_file_descriptor(fd.into());
///         }
///         cx.transport.write(data);
///     }
/// }
/// ```
///
/// and the same over TCP is an error:
///
/// ```compile_fail,E0599
/// use std::os::fd::OwnedFd;
/// use bowline_protocol::{Context, Protocol, Transport, UnixTransport};
/// use bowline_transport::TcpStream;
///
/// struct Lender(Option<OwnedFd>);
///
/// impl Protocol<TcpStream> for Lender {
///     fn data_received(&mut self, cx: &mut Context<'_, TcpStream>, data: &[u8]) {
///         if let Some(fd) = self.0.take() {
///             // An error gives it back, and closes it when it is dropped.
///             let _ = cx.transport.send_file_descriptor(fd.into());
///         }
///         cx.transport.write(data);
///     }
/// }
/// ```
///
/// So is a protocol for any transport that passes descriptors on a TCP
/// listener:
///
/// ```compile_fail,E0277
/// use bowline_protocol::{Address, Context, Protocol, UnixTransport};
/// use bowline_reactor::Reactor;
/// use bowline_transport::Transports;
///
/// struct Worker;
///
/// impl<T: UnixTransport> Protocol<T> for Worker {
///     fn data_received(&mut self, _: &mut Context<'_, T>, _: &[u8]) {}
/// }
///
/// let mut reactor = Reactor::new()?;
/// reactor.listen_tcp(([127, 0, 0, 1], 0).into(), |_: &Address| Worker)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub type TcpStream = Stream<TcpSocket>;

impl<S: Socket> Stream<S> {
    pub(crate) fn new(core: Core<S>) -> Self {
        Self { core }
    }
}

impl<S: Socket> FileDescriptor for Stream<S> {
    type Socket = S;

    #[inline]
    fn core(&self) -> &Core<S> {
        &self.core
    }

    #[inline]
    fn core_mut(&mut self) -> &mut Core<S> {
        &mut self.core
    }

    #[inline(always)]
    fn write_some_data(&self, data: &[u8]) -> io::Result<Sent> {
        let bytes = self.core.socket.send(data)?;
        Ok(Sent {
            bytes,
            descriptors: 0,
        })
    }

    fn write_some_pieces(&self, pieces: &[IoSlice<'_>]) -> io::Result<Sent> {
        let bytes = self.core.socket.send_pieces(pieces)?;
        Ok(Sent {
            bytes,
            descriptors: 0,
        })
    }

    #[inline(always)]
    fn do_read(&mut self, buffers: &mut ReadBuffers) -> io::Result<Received> {
        let limit = self.core.read_limit as usize;
        Ok(self.core.socket.recv(buffers, limit)?.into())
    }
}

impl_transport!(impl<S: Socket> Stream<S>);

impl bowline_protocol::TcpTransport for TcpStream {
    fn no_delay(&self) -> io::Result<bool> {
        crate::sys::no_delay(self.core.socket.fd()?)
    }

    fn set_no_delay(&mut self, on: bool) -> io::Result<()> {
        crate::sys::set_no_delay(self.core.socket.fd()?, on)
    }

    fn keep_alive(&self) -> io::Result<bool> {
        crate::sys::keep_alive(self.core.socket.fd()?)
    }

    fn set_keep_alive(&mut self, on: bool) -> io::Result<()> {
        crate::sys::set_keep_alive(self.core.socket.fd()?, on)
    }

    fn set_keep_alive_times(
        &mut self,
        idle: Duration,
        interval: Duration,
        probes: u32,
    ) -> io::Result<()> {
        crate::sys::set_keep_alive_times(self.core.socket.fd()?, idle, interval, probes)
    }
}
