//! A look inside a running reactor: what it measures, what everything says of itself, and
//! where that can be seen.

#[path = "../policies/capture.rs"]
mod capture;
#[path = "../support/mod.rs"]
mod support;

mod browser;
mod described;
mod measures;
mod socket;
mod top;
mod totals;
mod web;

use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use bowline::inspect::Inspector;
use bowline::{
    Address, Context, Producer, ProducerKind, ProducerRef, Protocol, Reactor, RemoteHandle,
    Transport, Transports,
};
use serde_json::{Value, json};

/// Echoes, unless it is told to be slow.
pub(crate) struct Echo;

impl<T: Transport> Protocol<T> for Echo {
    fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
        match data {
            b"slow" => thread::sleep(Duration::from_millis(30)),
            b"pause" => cx.transport.pause_producing(),
            b"flood" => flood(cx.transport.as_dyn()),
            _ => {}
        }
        cx.transport.write(data);
    }
}

/// Writes more than the peer takes, as a producer that is told to pause.
fn flood(transport: &mut dyn Transport) {
    struct Flood;
    impl Producer for Flood {
        fn resume_producing(&mut self, _: &mut Context<'_, dyn Transport>) {}
    }
    let producer = ProducerRef::boxed(Flood);
    transport
        .register_producer(producer, ProducerKind::Push)
        .unwrap();
    transport.write(&vec![0; 4_000_000]);
}

/// A program that is looked into: an echo server in a thread of its own.
pub(crate) struct Program {
    pub(crate) socket: PathBuf,
    pub(crate) page: String,
    pub(crate) echo: PathBuf,
    address: SocketAddr,
    remote: RemoteHandle,
    thread: Option<JoinHandle<()>>,
    _folder: tempfile::TempDir,
}

impl Program {
    pub(crate) fn start() -> Self {
        Self::start_with(None)
    }

    /// With the address of its page, and the secret of that.
    pub(crate) fn start_with(page: Option<(SocketAddr, &'static str)>) -> Self {
        Self::start_of(page, |reactor, path| {
            reactor.listen_unix(path, |_: &Address| Echo).unwrap();
        })
    }

    /// With a server of its own at the path that it is given.
    pub(crate) fn start_of(
        page: Option<(SocketAddr, &'static str)>,
        serve: impl FnOnce(&mut Reactor, &Path) + Send + 'static,
    ) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (socket, echo) = (folder.path().join("inspect"), folder.path().join("echo"));
        let (tell, told) = mpsc::channel();
        let paths = (socket.clone(), echo.clone());
        let thread = thread::spawn(move || {
            let mut reactor = Reactor::new().unwrap();
            Inspector::on_socket(&mut reactor, &paths.0).unwrap();
            let page = match page {
                Some((at, secret)) => Inspector::with_secret(&mut reactor, at, secret.into()),
                None => Inspector::on_address(&mut reactor, ([127, 0, 0, 1], 0).into()),
            };
            let page = page.unwrap();
            serve(&mut reactor, &paths.1);
            tell.send((reactor.remote(), page)).unwrap();
            reactor.run().unwrap();
        });
        let (remote, page) = told.recv_timeout(Duration::from_secs(10)).unwrap();
        Self {
            socket,
            page: page.url(),
            address: page.address(),
            echo,
            remote,
            thread: Some(thread),
            _folder: folder,
        }
    }

    /// Where its page is.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Connects to the echo, and has it answer once.
    pub(crate) fn connect(&self) -> UnixStream {
        let mut stream = connect(&self.echo);
        say(&mut stream, b"hello");
        stream
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let stopped = self.remote.call_from_thread(|reactor| {
            reactor.stop().unwrap();
        });
        let joined = self.thread.take().unwrap().join();
        if !thread::panicking() {
            stopped.unwrap();
            joined.unwrap();
        }
    }
}

/// Says that a test did not run, past the harness, which shows nothing of a test that
/// passes. Where the programs have to be there, it fails.
pub(crate) fn not_run(what: &str) {
    let required = std::env::var_os("BOWLINE_INTEROP").is_some_and(|it| it == "require");
    assert!(!required, "CANNOT RUN {what}");
    let _ = std::io::stderr().write_all(format!("NOT RUN: {what}\n").as_bytes());
}

pub(crate) fn connect(path: &Path) -> UnixStream {
    let stream = UnixStream::connect(path).unwrap();
    let patience = Some(Duration::from_secs(10));
    stream.set_read_timeout(patience).unwrap();
    stream
}

pub(crate) fn say(stream: &mut UnixStream, word: &[u8]) {
    stream.write_all(word).unwrap();
    let mut answer = vec![0; word.len()];
    std::io::Read::read_exact(stream, &mut answer).unwrap();
    assert_eq!(answer, word);
}

/// One who asks on the socket.
pub(crate) struct Asker {
    reader: BufReader<UnixStream>,
}

impl Asker {
    pub(crate) fn new(path: &Path) -> Self {
        Self {
            reader: BufReader::new(connect(path)),
        }
    }

    pub(crate) fn send(&self, line: &str) {
        let mut stream = self.reader.get_ref();
        stream.write_all(format!("{line}\n").as_bytes()).unwrap();
    }

    pub(crate) fn line(&mut self) -> Value {
        let mut line = String::new();
        self.reader.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line:?}"))
    }

    pub(crate) fn ask(&mut self, request: Value) -> Value {
        self.send(&request.to_string());
        self.line()
    }

    /// All descriptors, and the line behind them.
    pub(crate) fn descriptors(&mut self) -> (Vec<Value>, Value) {
        self.send(&json!({"get": "descriptors"}).to_string());
        let mut all = Vec::new();
        loop {
            let mut line = self.line();
            match line.get_mut("end") {
                Some(end) => return (all, end.take()),
                None => all.push(line),
            }
        }
    }

    /// The connections of the echo.
    pub(crate) fn connections(&mut self) -> Vec<Value> {
        let (all, _) = self.descriptors();
        let is_echo = |it: &Value| fact(it, "protocol") == "Echo";
        all.into_iter().filter(is_echo).collect()
    }
}

/// A fact of the first section that has it.
pub(crate) fn fact(descriptor: &Value, name: &str) -> Value {
    let sections = descriptor["sections"].as_array().into_iter().flatten();
    let mut facts = sections.filter_map(|section| section["facts"].get(name));
    facts.next().cloned().unwrap_or(Value::Null)
}
