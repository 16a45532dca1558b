//! Passes four open descriptors to another process, and proves each of them
//! usable there: a file, the end of a pipe, a listening socket and a connected
//! one.
//!
//! The other process is this program, started again with one end of a
//! socketpair as its standard input. Each descriptor travels in a message that
//! names it, and arrives together with exactly that message. Runs by itself and
//! ends with a table:
//!
//! ```text
//! cargo run --example fd_passing
//! ```

#![allow(clippy::print_stdout)]

mod common;

use std::cell::RefCell;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Seek, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{self, Command};
use std::rc::Rc;
use std::time::Duration;

use bowline::Tcp;
use bowline::framing::{FrameContext, FrameReceiver, Framed, LengthPrefixedFramer, Pairing};
use bowline::{Address, CloseReason, Context, Protocol, Reactor};
use bowline::{Transport, Transports, UnixTransport};

use crate::common::Arguments;

const HELP: &str = "
Passes descriptors to another process, and shows what arrived.

Usage: fd_passing
";

/// The hidden argument of the other process.
const RECEIVER: &str = "--receiver";

/// How long all of it may take.
const DEADLINE: Duration = Duration::from_secs(10);

type Cx<'a, T> = FrameContext<'a, T, LengthPrefixedFramer>;

fn main() -> common::Result {
    env_logger::init();
    let mut arguments = Arguments::parse(HELP);
    let is_receiver = arguments.flag(RECEIVER);
    arguments.finish()?;
    if is_receiver { receive() } else { send() }
}

// The sending process.

/// What is passed, and what has become of it.
struct Passed {
    what: &'static str,
    number: i32,
    /// What the kernel calls it: the same on both sides for the same object.
    object: String,
    /// Its number and object in the other process.
    arrived: Option<(String, String)>,
    proof: Option<String>,
}

type Table = Rc<RefCell<Vec<Passed>>>;

/// Passes everything as soon as there is a connection, and takes the answers.
struct Sender {
    to_send: Vec<(&'static str, OwnedFd)>,
    table: Table,
}

impl<T: UnixTransport> FrameReceiver<T, LengthPrefixedFramer> for Sender {
    fn connection_made(&mut self, cx: &mut Cx<'_, T>) {
        for (what, fd) in self.to_send.drain(..) {
            self.table.borrow_mut().push(Passed {
                what,
                number: fd.as_raw_fd(),
                object: object(fd.as_fd()),
                arrived: None,
                proof: None,
            });
            // Ours is closed once the message has left.
            cx.send_frame_with_descriptors(what.as_bytes(), vec![fd.into()])
                .expect("the connection is there, and nothing else was sent");
        }
    }

    fn frame_received(&mut self, cx: &mut Cx<'_, T>, answer: &[u8]) {
        let answer = String::from_utf8_lossy(answer);
        let mut fields = answer.split('\t').map(str::to_owned);
        let mut next = || fields.next().unwrap_or_default();
        let (what, number, object, proof) = (next(), next(), next(), next());
        if let Some(row) = self
            .table
            .borrow_mut()
            .iter_mut()
            .find(|row| row.what == what)
        {
            row.arrived = Some((number, object));
            if !proof.is_empty() {
                row.proof = Some(proof);
            }
        }
        stop_when_complete(cx.reactor, &self.table);
    }

    fn connection_lost(&mut self, cx: &mut Cx<'_, T>, _: &CloseReason) {
        // Too early if it is not stopping already; the table says so.
        let _ = cx.reactor.stop();
    }
}

/// Hears what the other process says on a socket that was passed to it.
struct Proof {
    what: &'static str,
    heard: Vec<u8>,
    table: Table,
}

impl<T: Transport> Protocol<T> for Proof {
    fn data_received(&mut self, _: &mut Context<'_, T>, data: &[u8]) {
        self.heard.extend_from_slice(data);
    }

    fn connection_lost(&mut self, cx: &mut Context<'_, T>, _: &CloseReason) {
        let mut table = self.table.borrow_mut();
        if let Some(row) = table.iter_mut().find(|row| row.what == self.what)
            && !self.heard.is_empty()
        {
            let heard = String::from_utf8_lossy(&self.heard);
            row.proof = Some(format!("heard \"{heard}\" from {}", cx.transport.peer()));
        }
        drop(table);
        stop_when_complete(cx.reactor, &self.table);
    }
}

fn stop_when_complete(reactor: &mut Reactor, table: &Table) {
    let is_complete = |row: &Passed| row.arrived.is_some() && row.proof.is_some();
    if table.borrow().iter().all(is_complete) {
        // The other process sees the end of its connection, and ends too.
        let _ = reactor.stop();
    }
}

fn send() -> common::Result {
    let mut reactor = Reactor::new()?;
    let table = Table::default();
    let proof = |what| {
        let table = Rc::clone(&table);
        move |_: &Address| Proof {
            what,
            heard: Vec::new(),
            table: Rc::clone(&table),
        }
    };

    // A listener. Whoever connects waits in its queue for the other process.
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address: SocketAddr = listener.local_addr()?;
    // A connected pair, of which one end goes.
    let connected = TcpStream::connect(address)?;
    let (kept, _) = listener.accept()?;
    reactor.adopt_tcp_stream(kept.into(), proof("connected socket")(&address.into()))?;
    // A file of which we read one line: the position is shared.
    let mut file = tempfile::tempfile()?;
    file.write_all(b"read here\nread there\n")?;
    file.rewind()?;
    skip_line(&file)?;
    // A pipe with something in it.
    let (pipe, mut writer) = io::pipe()?;
    writer.write_all(b"written before\n")?;
    drop(writer);
    let to_send: Vec<(_, OwnedFd)> = vec![
        ("open file", file.into()),
        ("end of a pipe", pipe.into()),
        ("listening socket", listener.into()),
        ("connected socket", connected.into()),
    ];

    let (ours, theirs) = UnixStream::pair()?;
    let mut receiver = Command::new(std::env::current_exe()?)
        .arg(RECEIVER)
        .stdin(OwnedFd::from(theirs))
        .spawn()?;
    let sender = Sender {
        to_send,
        table: Rc::clone(&table),
    };
    reactor.adopt_unix_stream(ours.into(), framed(sender))?;
    reactor.connect_tcp(address, proof("listening socket"))?;
    reactor.stop_on_signals()?;
    println!("listening on {address}");
    reactor.call_later(DEADLINE, |reactor| {
        let _ = reactor.stop();
    });
    reactor.run()?;

    // It ends with its connection, so this does not take long.
    let status = receiver.wait()?;
    print_table(&table.borrow());
    let is_proven = |row: &Passed| {
        let arrived = row.arrived.as_ref();
        row.proof.is_some() && arrived.is_some_and(|(_, object)| *object == row.object)
    };
    if !status.success() || !table.borrow().iter().all(is_proven) {
        return Err(format!("not everything arrived; the other process: {status}").into());
    }
    Ok(())
}

fn print_table(table: &[Passed]) {
    println!("what              sent as arrived as  the kernel's object    proof");
    for row in table {
        let (number, object) = row.arrived.clone().unwrap_or_default();
        let object = if object == row.object {
            object
        } else {
            format!("{}, not {object}", row.object)
        };
        let proof = row.proof.as_deref().unwrap_or("none");
        println!(
            "{:<17} {:>7} {number:>10}  {object:<22} {proof}",
            row.what, row.number
        );
    }
}

// The receiving process.

/// Uses what it is passed, and answers with what it found.
struct Receiver;

impl<T: UnixTransport> FrameReceiver<T, LengthPrefixedFramer> for Receiver {
    fn frame_received(&mut self, cx: &mut Cx<'_, T>, what: &[u8]) {
        let Some(fd) = cx.framing.descriptors().next() else {
            return;
        };
        let what = String::from_utf8_lossy(what);
        let (number, object) = (fd.as_raw_fd(), object(fd.as_fd()));
        let used = use_descriptor(cx.reactor, &what, fd);
        let proof = used.unwrap_or_else(|error| format!("failed: {error}"));
        let answer = format!("{what}\t{number}\t{object}\t{proof}");
        if cx.send_frame(answer.as_bytes()).is_err() {
            cx.transport.abort_connection();
        }
    }

    fn connection_lost(&mut self, cx: &mut Cx<'_, T>, _: &CloseReason) {
        let _ = cx.reactor.stop();
    }
}

/// Says what it proved; nothing where the other end is to say it.
fn use_descriptor(reactor: &mut Reactor, what: &str, fd: OwnedFd) -> common::Result<String> {
    match what {
        // A shortcut: files do not block, and all of the pipe's text is there.
        "open file" | "end of a pipe" => {
            let mut text = String::new();
            File::from(fd).read_to_string(&mut text)?;
            Ok(format!("read \"{}\"", text.trim_end()))
        }
        "listening socket" => {
            reactor.listen(Tcp::listening(fd), |_: &Address| Greeter)?;
            Ok(String::new())
        }
        _ => {
            reactor.adopt_tcp_stream(fd, Greeter)?;
            Ok(String::new())
        }
    }
}

/// Says who serves the socket now.
struct Greeter;

impl<T: Transport> Protocol<T> for Greeter {
    fn connection_made(&mut self, cx: &mut Context<'_, T>) {
        let greeting = format!("process {} here", process::id());
        cx.transport.write(greeting.as_bytes());
        cx.transport.lose_connection();
    }

    fn data_received(&mut self, _: &mut Context<'_, T>, _: &[u8]) {}
}

fn receive() -> common::Result {
    let mut reactor = Reactor::new()?;
    let channel = io::stdin().as_fd().try_clone_to_owned()?;
    reactor.adopt_unix_stream(channel, framed(Receiver))?;
    reactor.run()?;
    Ok(())
}

// Both.

/// Messages behind their length, each with its own descriptors.
fn framed<R>(receiver: R) -> Framed<LengthPrefixedFramer, R> {
    Framed::new(LengthPrefixedFramer::u32(), receiver)
        .pairing(Pairing::Exact)
        .max_descriptors(1)
}

/// What a descriptor stands for, as the kernel names it.
fn object(fd: BorrowedFd<'_>) -> String {
    let link = fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    link.map_or_else(|error| error.to_string(), |path| path.display().to_string())
}

/// Reads one line and not a byte more.
fn skip_line(file: &File) -> io::Result<()> {
    let mut line = Vec::new();
    BufReader::with_capacity(1, file).read_until(b'\n', &mut line)?;
    Ok(())
}
