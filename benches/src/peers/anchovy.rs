//! tokio with `anchovy`: descriptors through queues of the stream, as its
//! documentation shows.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use ::anchovy::{AnchovyStream, DBUS_FD_LIMIT};
use ::tokio::io::{AsyncReadExt, AsyncWriteExt};
use ::tokio::net::UnixListener;

use super::{Job, Server, Task, tokio};
use crate::sys::MAX_DESCRIPTORS;

const CHUNK_BYTES: usize = 65_536;

type Stream = AnchovyStream<DBUS_FD_LIMIT>;

pub(super) fn build(job: Job, listener: Option<OwnedFd>) -> io::Result<Box<dyn Server>> {
    let runtime = tokio::runtime()?;
    if let Some(listener) = listener {
        let guard = runtime.enter();
        let listener = UnixListener::from_std(listener.into())?;
        drop(guard);
        runtime.spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let Ok(stream) = Stream::new(stream) else {
                    continue;
                };
                match job.task {
                    Task::SendDescriptors => ::tokio::spawn(send(stream)),
                    _ => ::tokio::spawn(receive(stream)),
                };
            }
        });
    }
    Ok(tokio::server(runtime, job))
}

async fn receive(mut stream: Stream) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK_BYTES];
    let mut count = 0;
    while stream.read(&mut buffer).await? > 0 {
        let received = stream.read_queue_mut();
        count += received.len();
        received.clear();
    }
    stream.write_all(&usize::to_le_bytes(count)).await
}

async fn send(mut stream: Stream) -> io::Result<()> {
    let mut number = [0; 8];
    stream.read_exact(&mut number).await?;
    let mut left = usize::from_le_bytes(number);
    let file = OwnedFd::from(File::open("/dev/null")?);
    while left > 0 {
        let count = left.min(MAX_DESCRIPTORS);
        // It owns what it sends, so that each has to be a duplicate.
        for _ in 0..count {
            stream.write_queue_mut().push_back(file.try_clone()?);
        }
        stream.write_all(&[0; MAX_DESCRIPTORS][..count]).await?;
        left -= count;
    }
    Ok(())
}
