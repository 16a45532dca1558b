//! A server on hyper, restarted by the crate ecdysis as its documentation says: on SIGHUP
//! it starts itself anew with its listener, and when that process is ready, it accepts
//! nothing more and serves what it has to the end.
//!
//! ```text
//! bowline-bench-hyper PORT DIRECTORY TICKS MS TICK
//! ```
//!
//! `/` is answered with the number of the process, and `/stream` with a tick each so many
//! milliseconds. Whoever serves writes its number to `DIRECTORY/serving`. Started by
//! `benches/src/bin/jobs`.

use std::convert::Infallible;
use std::error::Error;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use std::{env, fs, io, process};

use ecdysis::tokio_ecdysis::{SignalKind, StopOnShutdown, TokioEcdysisBuilder};
use hyper::body::{Body, Bytes, Frame, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, Interval, interval_at};
use tokio_stream::StreamExt;

/// As many threads as the others have workers.
const THREADS: usize = 2;

#[derive(Clone)]
struct Ticks {
    count: u32,
    every: Duration,
    tick: Bytes,
}

/// The body of an answer.
enum Answer {
    Whole(Option<Bytes>),
    Ticks {
        left: u32,
        tick: Bytes,
        interval: Interval,
    },
}

impl Body for Answer {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let piece = match &mut *self {
            Self::Whole(bytes) => bytes.take(),
            Self::Ticks { left: 0, .. } => None,
            Self::Ticks {
                left,
                tick,
                interval,
            } => {
                ready!(interval.poll_tick(cx));
                *left -= 1;
                Some(tick.clone())
            }
        };
        Poll::Ready(piece.map(|piece| Ok(Frame::data(piece))))
    }

    fn size_hint(&self) -> hyper::body::SizeHint {
        match self {
            Self::Whole(bytes) => {
                let length = bytes.as_ref().map_or(0, Bytes::len);
                hyper::body::SizeHint::with_exact(length as u64)
            }
            Self::Ticks { .. } => hyper::body::SizeHint::default(),
        }
    }
}

fn answer(request: &Request<Incoming>, ticks: &Ticks) -> Response<Answer> {
    let body = match request.uri().path() {
        "/stream" => Answer::Ticks {
            left: ticks.count,
            tick: ticks.tick.clone(),
            interval: interval_at(Instant::now() + ticks.every, ticks.every),
        },
        _ => Answer::Whole(Some(format!("{}\n", process::id()).into())),
    };
    let mut response = Response::new(body);
    let text = HeaderValue::from_static("text/plain");
    response.headers_mut().insert(CONTENT_TYPE, text);
    response
}

/// Serves one connection, and when the process is to end, its last request.
async fn serve(socket: TcpStream, ticks: Ticks, mut end: watch::Receiver<bool>) {
    let service = service_fn(move |request| {
        let response = answer(&request, &ticks);
        async move { Ok::<_, Infallible>(response) }
    });
    let connection = http1::Builder::new().serve_connection(TokioIo::new(socket), service);
    let mut connection = std::pin::pin!(connection);
    let is_told = async { drop(end.wait_for(|ends| *ends).await) };
    tokio::select! {
        // Its client has gone, if it failed.
        _ = connection.as_mut() => {}
        () = is_told => {
            connection.as_mut().graceful_shutdown();
            let _ = connection.await;
        }
    }
}

async fn run(port: u16, directory: PathBuf, ticks: Ticks) -> io::Result<()> {
    let mut builder = TokioEcdysisBuilder::new(SignalKind::hangup())?;
    builder.stop_on_signal(SignalKind::terminate())?;
    let address = SocketAddr::from(([127, 0, 0, 1], port));
    let stops = StopOnShutdown::Yes;
    let mut sockets = builder.build_listen_tcp(stops, address, |socket, address| {
        socket.set_reuse_address(true)?;
        socket.bind(&address.into())?;
        socket.listen(4_096)?;
        Ok(socket.into())
    })?;
    let (_ecdysis, is_over) = builder.ready()?;
    // Whole, for whoever reads it.
    fs::write(directory.join("new"), process::id().to_string())?;
    fs::rename(directory.join("new"), directory.join("serving"))?;
    let (ends, end) = watch::channel(false);
    // Each connection has a copy: all have ended when there is none.
    let (live, mut none_live) = mpsc::channel::<Infallible>(1);
    tokio::spawn(async move {
        while let Some(socket) = sockets.next().await {
            let Ok(socket) = socket else { continue };
            let _ = socket.set_nodelay(true);
            let (ticks, end, live) = (ticks.clone(), end.clone(), live.clone());
            tokio::spawn(async move {
                serve(socket, ticks, end).await;
                drop(live);
            });
        }
    });
    is_over.await;
    let _ = ends.send(true);
    none_live.recv().await;
    Ok(())
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    if arguments == ["--version"] {
        println!("{}", env!("CARGO_PKG_VERSION"));
        return Ok(());
    }
    let [port, directory, count, every, tick] = &*arguments else {
        return Err("usage: bowline-bench-hyper PORT DIRECTORY TICKS MS TICK".into());
    };
    let ticks = Ticks {
        count: count.parse()?,
        every: Duration::from_millis(every.parse()?),
        tick: tick.clone().into(),
    };
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    let runtime = runtime.worker_threads(THREADS).enable_all().build()?;
    runtime.block_on(run(port.parse()?, directory.into(), ticks))?;
    Ok(())
}
