//! A receiver of log messages, as syslogd is: over UDP and over a UNIX socket, into a file.
//!
//! ```text
//! cargo run --example syslog -- --file /tmp/messages --socket /tmp/log --udp 127.0.0.1:5140
//! logger --socket /tmp/log 'hello over a UNIX socket'
//! logger --server 127.0.0.1 --port 5140 --udp 'hello over UDP'
//! kill -HUP PID    # after the file was moved away
//! ```
//!
//! A UNIX socket loses no message: who logs waits for who reads. UDP does, and how many is
//! said at the end. The file is opened anew at SIGHUP, so that it can be moved away.

#![allow(clippy::print_stdout)]

mod common;

use std::cell::RefCell;
use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::rc::Rc;

use bowline::{
    AtDrain, Context, Datagram, DatagramHandle, DatagramProtocol, DatagramTransport, Reactor,
    Transports, Udp, UnixDatagram, signal,
};

use common::{Arguments, Inspect};

const HELP: &str = "
Receives log messages, and appends them to a file.

Usage: syslog --file FILE [--socket PATH] [--udp ADDRESS]

  --file FILE      where to; opened anew at SIGHUP
  --socket PATH    a UNIX socket, as /dev/log is
  --udp ADDRESS    an IP address and a port
  --inspect PLACE  show what is inside: on a UNIX socket (a path),
                   or to browsers (an address)
  --help           prints this
";

/// The longest message: RFC 5424 has receivers take 2,048 bytes at the least.
const LONGEST: usize = 8_192;

/// Where messages go.
struct Log {
    path: PathBuf,
    file: File,
    /// Messages that could not be written, and that came faster than they were read.
    failed: u64,
    lost: u32,
}

impl Log {
    fn open(path: PathBuf) -> io::Result<Self> {
        let file = OpenOptions::new().create(true).append(true).open(&path)?;
        Ok(Self {
            path,
            file,
            failed: 0,
            lost: 0,
        })
    }

    /// Goes on in a new file, if there can be one.
    fn rotate(&mut self) {
        match Self::open(self.path.clone()) {
            Ok(log) => self.file = log.file,
            Err(error) => log::error!("cannot open {}: {error}", self.path.display()),
        }
    }

    /// Appends one message, by one write: others may append too.
    fn append(&mut self, from: &str, message: &[u8]) {
        let mut line = from.as_bytes().to_vec();
        line.push(b' ');
        // A message is one line, whatever it has in it; some end with a NUL.
        let message = message.strip_suffix(b"\0").unwrap_or(message);
        let text = message.trim_ascii().iter();
        line.extend(text.map(|byte| if byte.is_ascii_control() { b' ' } else { *byte }));
        line.push(b'\n');
        if let Err(error) = self.file.write_all(&line) {
            self.failed += 1;
            log::error!("cannot write to {}: {error}", self.path.display());
        }
    }
}

/// What listens on one socket.
struct Receiver(Rc<RefCell<Log>>);

impl<T: DatagramTransport> DatagramProtocol<T> for Receiver {
    fn datagram_received(&mut self, _: &mut Context<'_, T>, datagram: &mut Datagram<'_>) {
        // Over a UNIX socket the kernel says which process it was.
        let from = match datagram.credentials.and_then(|sender| sender.pid) {
            Some(pid) => format!("pid {pid}"),
            None => datagram.from.to_address().to_string(),
        };
        self.0.borrow_mut().append(&from, datagram.data);
    }

    /// The reactor stops. What has arrived is written first.
    fn draining(&mut self, cx: &mut Context<'_, T>) -> AtDrain {
        self.0.borrow_mut().lost += cx.transport.dropped_by_kernel().unwrap_or(0);
        AtDrain::LoseWhenIdle
    }
}

fn main() -> common::Result {
    env_logger::init();
    let mut arguments = Arguments::parse(HELP);
    let inspect = Inspect::take(&mut arguments)?;
    let file = arguments.option::<PathBuf>("--file")?;
    let socket = arguments.option::<PathBuf>("--socket")?;
    let udp = arguments.option::<SocketAddr>("--udp")?;
    arguments.finish()?;
    let file = file.ok_or("--file FILE, please; try --help")?;

    let mut reactor = Reactor::new()?;
    Inspect::show(inspect.as_ref(), &mut reactor)?;
    let log = Rc::new(RefCell::new(Log::open(file)?));
    let mut sockets: Vec<DatagramHandle> = Vec::new();
    if let Some(path) = socket {
        let here = UnixDatagram::at(path)
            .credentials(true)
            .max_datagram(LONGEST);
        let handle = reactor.listen(here, Receiver(Rc::clone(&log)))?;
        sockets.extend(reactor.get(handle).map(|socket| socket.handle()));
    }
    if let Some(address) = udp {
        let here = Udp::at(address).max_datagram(LONGEST);
        let handle = reactor.listen(here, Receiver(Rc::clone(&log)))?;
        sockets.extend(reactor.get(handle).map(|socket| socket.handle()));
    }
    if sockets.is_empty() {
        return Err("--socket PATH or --udp ADDRESS, please; try --help".into());
    }
    let rotated = Rc::clone(&log);
    reactor.on_signals(&[signal::SIGHUP], move |_, _| rotated.borrow_mut().rotate())?;
    reactor.stop_on_signals()?;
    for handle in sockets {
        if let Some(socket) = reactor.get(handle) {
            println!("listening on {}", socket.host());
        }
    }
    reactor.run()?;
    let log = log.borrow();
    println!("{} lost, {} not written", log.lost, log.failed);
    Ok(())
}
