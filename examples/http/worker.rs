//! A worker: takes connections from its channel, and serves files on them.

use std::cell::Cell;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStringExt;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use bowline::descriptor::EventCounter;
use bowline::endpoint::Adopt as _;
use bowline::handoff::pool::inherited_channel;
use bowline::handoff::pool::{Live, PassedConnection, Service, Worker, WorkerSettings};
use bowline::handoff::restart::{Movable as _, Moved};
use bowline::layers::LayerState;
use bowline::policies::{Idle, ProtocolWrapper};
use bowline::process::{describe_socket, take_granted};
use bowline::signal::{SIGHUP, SIGINT, SIGTERM};
use bowline::tls::TlsServer;
use bowline::{Address, Reactor, Tcp, Transports as _, Unix};

use crate::COUNTER_NUMBER;
use crate::common::{self, WorkersTls};
use crate::connection::{Body, Http, Response, Site};

/// How long a connection may be without traffic.
const IDLE: Duration = Duration::from_secs(60);
/// How often requests are added to the common counter.
const COUNT_EVERY: Duration = Duration::from_millis(500);

/// Serves what comes through the channel, to its end.
pub(crate) fn run(root: &Path, tls: Option<[String; 2]>) -> common::Result {
    let channel = inherited_channel()?;
    let tls = tls.map(|files| WorkersTls::received(&files)).transpose()?;
    let counter = EventCounter::from_descriptor(take_granted(COUNTER_NUMBER)?);
    let counter = counter.map_err(|_| "no counter was given")?;
    let root = fs::canonicalize(root)?;
    let requests = Rc::new(Cell::new(0));
    let counted = Rc::clone(&requests);
    let site: Site = Rc::new(move |target| {
        counted.set(counted.get() + 1);
        match find(&root, target) {
            Ok(response) => response,
            Err(error) => {
                log::debug!("{target}: {error}");
                Response::not_found()
            }
        }
    });
    let files = Files { site, tls };
    let mut reactor = Reactor::new()?;
    Worker::start(&mut reactor, channel, WorkerSettings::default(), files)?;
    // A terminal and systemd send these to all processes. They are the accepting process's
    // to decide: it drains its workers. If it is gone, they end by themselves.
    reactor.on_signals(&[SIGINT, SIGTERM, SIGHUP], |_, _| {})?;
    let counter = Rc::new(counter);
    let count = move || match requests.take() {
        0 => Ok(()),
        count => counter.add(count),
    };
    let counting = count.clone();
    reactor.call_every(COUNT_EVERY, move |_, _| {
        if let Err(error) = counting() {
            log::warn!("requests are not counted: {error}");
        }
    });
    reactor.run()?;
    Ok(count()?)
}

/// What a worker does with its connections.
struct Files {
    site: Site,
    tls: Option<TlsServer>,
}

impl Service for Files {
    fn serve(&mut self, reactor: &mut Reactor, connection: PassedConnection, live: Live) {
        let http = ProtocolWrapper::new(Http::new(&self.site, Some(live)), Idle::new(IDLE));
        let error = match (connection.peer, self.tls.clone()) {
            (Some(_), None) => connection.adopt(reactor, Tcp, http).err(),
            (None, None) => connection.adopt(reactor, Unix, http).err(),
            (Some(_), Some(tls)) => connection.adopt(reactor, Tcp.layer(tls), http).err(),
            (None, Some(tls)) => connection.adopt(reactor, Unix.layer(tls), http).err(),
        };
        if let Some(error) = error {
            // Reset before it got here, most likely.
            log::debug!("cannot serve: {error}");
        }
    }

    fn takes(&self, kind: &str) -> bool {
        kind == Http::KIND
    }

    fn takes_layers(&self, _: &str, layers: &[LayerState]) -> bool {
        match (&self.tls, layers) {
            (None, []) => true,
            (Some(tls), [state]) => tls.can_resume(state),
            _ => false,
        }
    }

    /// One of the process before.
    fn serve_moved(&mut self, reactor: &mut Reactor, moved: Moved, live: Live) {
        if let Err(error) = self.go_on(reactor, moved, live) {
            log::debug!("a connection ended on its way: {error}");
        }
    }
}

impl Files {
    fn go_on(&self, reactor: &mut Reactor, moved: Moved, live: Live) -> common::Result {
        let http = Http::going_on(&self.site, live, moved.packed.unread);
        let http = ProtocolWrapper::new(http, Idle::new(IDLE));
        let is_tcp = describe_socket(moved.fd.as_fd())
            .is_ok_and(|socket| matches!(socket.address, Some(Address::Inet(_))));
        let (fd, unsent) = (moved.fd, moved.unsent);
        let tls = self.tls.as_ref().zip(moved.layers.into_iter().next());
        let tls = tls.map(|(tls, state)| tls.resume(state)).transpose()?;
        match (is_tcp, tls) {
            (true, None) => _ = reactor.adopt(Tcp.with_unsent(unsent), fd, http)?,
            (false, None) => _ = reactor.adopt(Unix.with_unsent(unsent), fd, http)?,
            (true, Some(tls)) => {
                reactor.adopt(Tcp.layer(tls).with_unsent(unsent), fd, http)?;
            }
            (false, Some(tls)) => {
                reactor.adopt(Unix.layer(tls).with_unsent(unsent), fd, http)?;
            }
        }
        Ok(())
    }
}

/// What `target` names below `root`. Links are followed: whoever writes there decides.
fn find(root: &Path, target: &str) -> io::Result<Response> {
    let path = target.split(['?', '#']).next().unwrap_or_default();
    let mut found = root.to_owned();
    for part in decode(path)?.split(|&byte| byte == b'/') {
        // `..` too.
        if part.starts_with(b".") || part.contains(&0) {
            return Err(io::ErrorKind::NotFound.into());
        }
        found.push(OsString::from_vec(part.to_vec()));
    }
    if found.is_dir() {
        found.push("index.html");
    }
    // Opening a FIFO would wait for its writer.
    if !found.is_file() {
        return Err(io::ErrorKind::NotFound.into());
    }
    let file = File::open(&found)?;
    let length = file.metadata()?.len();
    let extension = found.extension().and_then(|extension| extension.to_str());
    let content_type = match extension.unwrap_or_default() {
        "html" => "text/html; charset=utf-8",
        "txt" | "md" => "text/plain; charset=utf-8",
        "css" => "text/css",
        "js" => "text/javascript",
        "json" => "application/json",
        "svg" => "image/svg+xml",
        "png" => "image/png",
        "jpg" | "jpeg" => "image/jpeg",
        _ => "application/octet-stream",
    };
    Ok(Response::ok(content_type, Body::File(file, length)))
}

/// Replaces each `%41` by its byte.
fn decode(path: &str) -> io::Result<Vec<u8>> {
    let mut pieces = path.split('%');
    let mut bytes = pieces.next().unwrap_or_default().as_bytes().to_vec();
    for piece in pieces {
        let digits = (piece.get(..2)).filter(|it| it.bytes().all(|byte| byte.is_ascii_hexdigit()));
        let digits = digits.ok_or(io::ErrorKind::InvalidInput)?;
        bytes.push(u8::from_str_radix(digits, 16).map_err(io::Error::other)?);
        bytes.extend_from_slice(&piece.as_bytes()[2..]);
    }
    Ok(bytes)
}
