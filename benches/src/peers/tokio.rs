//! tokio: the current-thread runtime, one task and one reused buffer for each
//! connection, descriptors by `sendfd`.

use std::future::{Future, poll_fn};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::pin::Pin;
use std::task::Poll;
use std::time::Instant;

use ::tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufWriter};
use ::tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use ::tokio::runtime::{Builder, Runtime};
use ::tokio::task::yield_now;
use ::tokio::time::{Sleep, sleep_until};
use sendfd::{RecvWithFd, SendWithFd};

use super::{Family, Job, Server, Task, Wait};
use crate::sys::{self, MAX_DESCRIPTORS, own_cpu_time};
use crate::timers::{self, Timed};

const CHUNK_BYTES: usize = 65_536;
/// What one keeps for a connection whose messages are short.
const SMALL_BYTES: usize = 4_096;
const WRITES: usize = 10;
/// The driver is polled once, and then the tasks run, 61 between two polls.
const YIELDS_PER_TURN: usize = 4;

pub(super) fn build(job: Job, listener: Option<OwnedFd>) -> io::Result<Box<dyn Server>> {
    let runtime = runtime()?;
    let _guard = runtime.enter();
    match (job.family, listener) {
        (_, None) => {}
        (Family::Tcp, Some(listener)) => {
            let listener = TcpListener::from_std(listener.into())?;
            runtime.spawn(async move {
                while let Ok((stream, _)) = listener.accept().await {
                    ::tokio::spawn(serve(job, stream));
                }
            });
        }
        (_, Some(listener)) => {
            let listener = UnixListener::from_std(listener.into())?;
            runtime.spawn(async move {
                while let Ok((stream, _)) = listener.accept().await {
                    match job.task {
                        Task::ReceiveDescriptors | Task::ReceiveTrusted => {
                            ::tokio::spawn(receive_descriptors(stream));
                        }
                        Task::SendDescriptors => {
                            ::tokio::spawn(send_descriptors(stream));
                        }
                        _ => {
                            ::tokio::spawn(serve(job, stream));
                        }
                    }
                }
            });
        }
    }
    drop(_guard);
    Ok(server(runtime, job))
}

/// A server whose tasks are spawned already.
pub(super) fn server(runtime: Runtime, job: Job) -> Box<dyn Server> {
    Box::new(Tokio { runtime, job })
}

pub(super) fn runtime() -> io::Result<Runtime> {
    Builder::new_current_thread().enable_all().build()
}

struct Tokio {
    runtime: Runtime,
    job: Job,
}

impl Server for Tokio {
    fn adopt(&mut self, socket: OwnedFd) -> io::Result<()> {
        let _guard = self.runtime.enter();
        match self.job.family {
            Family::Tcp => {
                let stream = TcpStream::from_std(socket.into())?;
                self.runtime.spawn(serve(self.job, stream));
            }
            _ => {
                let stream = UnixStream::from_std(socket.into())?;
                self.runtime.spawn(serve(self.job, stream));
            }
        }
        Ok(())
    }

    fn turn(&mut self, wait: Wait) -> io::Result<()> {
        match wait {
            Wait::Forever => self.runtime.block_on(std::future::pending()),
            Wait::No => self.runtime.block_on(async {
                for _ in 0..YIELDS_PER_TURN {
                    yield_now().await;
                }
            }),
        }
        Ok(())
    }
}

/// A connection that fails is over; nobody asks why.
async fn serve(job: Job, stream: impl AsyncRead + AsyncWrite + Unpin) -> io::Result<()> {
    match job.task {
        Task::Sink => sink(stream).await,
        Task::Source => source(stream).await,
        Task::Ten => ten(stream).await,
        _ => echo(stream, job.message).await,
    }
}

async fn echo(mut stream: impl AsyncRead + AsyncWrite + Unpin, message: usize) -> io::Result<()> {
    let size = if message < SMALL_BYTES {
        SMALL_BYTES
    } else {
        CHUNK_BYTES
    };
    let mut buffer = vec![0; size];
    loop {
        let length = stream.read(&mut buffer).await?;
        if length == 0 {
            return Ok(());
        }
        stream.write_all(&buffer[..length]).await?;
    }
}

async fn ten(stream: impl AsyncRead + AsyncWrite + Unpin) -> io::Result<()> {
    let mut stream = BufWriter::new(stream);
    let mut buffer = vec![0; SMALL_BYTES];
    loop {
        let length = stream.read(&mut buffer).await?;
        if length == 0 {
            return Ok(());
        }
        for _ in 0..WRITES {
            stream.write_all(&buffer[..length]).await?;
        }
        stream.flush().await?;
    }
}

async fn sink(mut stream: impl AsyncRead + AsyncWrite + Unpin) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK_BYTES];
    let mut count = 0;
    loop {
        match stream.read(&mut buffer).await? {
            0 => return stream.write_all(&usize::to_le_bytes(count)).await,
            length => count += length,
        }
    }
}

async fn source(mut stream: impl AsyncRead + AsyncWrite + Unpin) -> io::Result<()> {
    let mut number = [0; 8];
    stream.read_exact(&mut number).await?;
    let mut count = usize::from_le_bytes(number);
    let buffer = vec![0; CHUNK_BYTES];
    while count > 0 {
        count -= stream.write(&buffer[..count.min(CHUNK_BYTES)]).await?;
    }
    Ok(())
}

async fn receive_descriptors(mut stream: UnixStream) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK_BYTES];
    let mut descriptors = [0; MAX_DESCRIPTORS];
    let mut count = 0;
    loop {
        stream.readable().await?;
        let (bytes, received) = match stream.recv_with_fd(&mut buffer, &mut descriptors) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            other => other?,
        };
        count += received;
        for &fd in &descriptors[..received] {
            drop(sys::own(fd));
        }
        if bytes == 0 {
            return stream.write_all(&usize::to_le_bytes(count)).await;
        }
    }
}

async fn send_descriptors(mut stream: UnixStream) -> io::Result<()> {
    let mut number = [0; 8];
    stream.read_exact(&mut number).await?;
    let mut count = usize::from_le_bytes(number);
    let file = std::fs::File::open("/dev/null")?;
    let descriptors = [file.as_raw_fd(); MAX_DESCRIPTORS];
    while count > 0 {
        let here = count.min(MAX_DESCRIPTORS);
        stream.writable().await?;
        match stream.send_with_fd(&[0; MAX_DESCRIPTORS][..here], &descriptors[..here]) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            sent => count -= sent?,
        }
    }
    Ok(())
}

pub(super) fn time(timed: Timed, count: usize) -> io::Result<Vec<f64>> {
    runtime()?.block_on(async {
        let before = own_cpu_time();
        let now = Instant::now();
        match timed {
            Timed::Fire => {
                let tasks: Vec<_> = timers::delays(count)
                    .map(|delay| ::tokio::spawn(sleep_until((now + delay).into())))
                    .collect();
                for task in tasks {
                    task.await?;
                }
            }
            Timed::Cancel => {
                let mut sleeps = registered(timers::far_delays(count), now);
                poll_all(&mut sleeps).await;
                drop(sleeps);
            }
            Timed::Pending => {
                let mut sleeps = registered(timers::far_delays(count), now);
                poll_all(&mut sleeps).await;
                let before = own_cpu_time();
                for delay in timers::far_delays(timers::BESIDE_PENDING) {
                    let sleep = sleep_until((now + delay).into());
                    poll_all(&mut [Box::pin(sleep)]).await;
                }
                return Ok(timers::per_operation(before, timers::BESIDE_PENDING));
            }
            Timed::Reset => {
                let mut sleeps = registered(timers::far_delays(count), now);
                poll_all(&mut sleeps).await;
                let before = own_cpu_time();
                for (sleep, delay) in sleeps.iter_mut().zip(timers::moved_delays(count)) {
                    sleep.as_mut().reset((now + delay).into());
                }
                return Ok(timers::per_operation(before, count));
            }
            Timed::Lateness => {
                let tasks: Vec<_> = timers::delays(count)
                    .map(|delay| {
                        let due = Instant::now() + delay;
                        ::tokio::spawn(async move {
                            sleep_until(due.into()).await;
                            Instant::now().saturating_duration_since(due)
                        })
                    })
                    .collect();
                let mut late = Vec::new();
                for task in tasks {
                    late.push(task.await?);
                }
                return Ok(timers::lateness(late));
            }
        }
        Ok(timers::per_operation(before, count))
    })
}

fn registered(
    delays: impl Iterator<Item = std::time::Duration>,
    now: Instant,
) -> Vec<Pin<Box<Sleep>>> {
    delays
        .map(|delay| Box::pin(sleep_until((now + delay).into())))
        .collect()
}

/// A sleep enters the wheel when it is first polled.
async fn poll_all(sleeps: &mut [Pin<Box<Sleep>>]) {
    poll_fn(|cx| {
        for sleep in &mut *sleeps {
            assert!(sleep.as_mut().poll(cx).is_pending(), "far ahead");
        }
        Poll::Ready(())
    })
    .await;
}
