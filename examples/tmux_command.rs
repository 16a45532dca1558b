//! Runs a command of tmux through its server's socket, without the program `tmux`: a client
//! of imsg, which passes what it has as standard input and output.
//!
//! ```text
//! tmux -S /tmp/tmux.sock new-session -d -s work
//! cargo run --example tmux_command -- --socket /tmp/tmux.sock -- list-sessions
//! cargo run --example tmux_command -- --socket /tmp/tmux.sock -- \
//!     send-keys -t work 'make' Enter ';' capture-pane -p -t work
//! ```
//!
//! What the command prints is printed, and its exit code is the program's. tmux has two
//! dialects of imsg: `--dialect current` is that of tmux 3.6 and later.

#![allow(clippy::print_stdout, clippy::print_stderr)]

mod common;

use std::cell::Cell;
use std::fs::File;
use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::rc::Rc;

use bowline::framing::{EncodeError, FrameContext, FrameReceiver};
use bowline::{CloseReason, ConnectError, Once, Reactor, Transports, UnixTransport};
use bowline_peers::imsg::{self, Imsg, ImsgDialect, ImsgFramer, ImsgHeader};

use common::Arguments;

const HELP: &str = "
Runs a command of tmux through the socket of its server.

Usage: tmux_command [OPTIONS] -- COMMAND [ARGUMENT...]

  --socket PATH      where the server listens [default: /tmp/tmux-UID/default]
  --dialect DIALECT  legacy, of tmux up to 3.5, or current [default: legacy]
  --help             prints this
";

/// The kinds of messages that this client sends or understands: tmux's `tmux-protocol.h`.
mod kind {
    pub(crate) const VERSION: u32 = 12;
    pub(crate) const FLAGS: u32 = 111;
    pub(crate) const TERM: u32 = 101;
    pub(crate) const TTY_NAME: u32 = 102;
    pub(crate) const FOLDER: u32 = 108;
    pub(crate) const STDIN: u32 = 104;
    pub(crate) const STDOUT: u32 = 110;
    pub(crate) const IDENTIFIED: u32 = 106;
    pub(crate) const COMMAND: u32 = 200;
    pub(crate) const EXIT: u32 = 203;
    pub(crate) const WRITE_OPEN: u32 = 303;
    pub(crate) const WRITE: u32 = 304;
    pub(crate) const WRITE_READY: u32 = 305;
}

/// The version of tmux's protocol; the same in both dialects.
const VERSION: u32 = 8;

type Cx<'a, T> = FrameContext<'a, T, ImsgFramer>;

struct Client {
    command: Vec<String>,
    /// What the program ends with.
    exit: Rc<Cell<i32>>,
}

impl Client {
    fn header(kind: u32) -> ImsgHeader {
        ImsgHeader {
            kind,
            peer_id: VERSION,
            pid: u32::MAX,
        }
    }

    fn send<T: UnixTransport>(
        cx: &mut Cx<'_, T>,
        kind: u32,
        data: &[u8],
    ) -> Result<(), EncodeError> {
        cx.send_frame_of(&Self::header(kind), data)?;
        Ok(())
    }

    /// Says who asks, with a descriptor each for its input and output, and what it asks.
    fn ask<T: UnixTransport>(&self, cx: &mut Cx<'_, T>) -> common::Result {
        let folder = std::env::current_dir()?;
        let folder = [folder.as_os_str().as_encoded_bytes(), b"\0"].concat();
        Self::send(cx, kind::FLAGS, &[0; 8])?;
        Self::send(cx, kind::TERM, b"screen\0")?;
        // tmux's server crashes where a client has not said this.
        Self::send(cx, kind::TTY_NAME, b"\0")?;
        Self::send(cx, kind::FOLDER, &folder)?;
        // The terminal stays ours: tmux is not to make it non-blocking for all others.
        for kind in [kind::STDIN, kind::STDOUT] {
            let nothing = File::options().read(true).write(true).open("/dev/null")?;
            let nothing = OwnedFd::from(nothing).into();
            cx.send_frame_of_with_descriptors(&Self::header(kind), b"", vec![nothing])
                .map_err(|error| error.to_string())?;
        }
        Self::send(cx, kind::IDENTIFIED, b"")?;
        let count = i32::try_from(self.command.len())?;
        let mut command = count.to_ne_bytes().to_vec();
        for word in &self.command {
            command.extend_from_slice(word.as_bytes());
            command.push(0);
        }
        Self::send(cx, kind::COMMAND, &command)?;
        Ok(())
    }
}

impl<T: UnixTransport> FrameReceiver<T, ImsgFramer> for Client {
    fn connection_made(&mut self, cx: &mut Cx<'_, T>) {
        if let Err(error) = self.ask(cx) {
            eprintln!("not asked: {error}");
            cx.transport.abort_connection();
        }
    }

    fn frame_received(&mut self, cx: &mut Cx<'_, T>, frame: &[u8]) {
        let Imsg { header, data } = Imsg::of(frame);
        match (header.kind, data.split_first_chunk::<4>()) {
            // The server wants to write to a stream of ours: 1 or 2.
            (kind::WRITE_OPEN, Some((stream, _))) => {
                let without_error = [*stream, [0; 4]].concat();
                if Self::send(cx, kind::WRITE_READY, &without_error).is_err() {
                    cx.transport.abort_connection();
                }
            }
            (kind::WRITE, Some((stream, text))) => {
                let written = match i32::from_ne_bytes(*stream) {
                    2 => std::io::stderr().write_all(text),
                    _ => std::io::stdout().write_all(text),
                };
                if written.is_err() {
                    cx.transport.abort_connection();
                }
            }
            (kind::EXIT, code) => {
                let code = code.map_or(0, |(code, _)| i32::from_ne_bytes(*code));
                self.exit.set(code);
                cx.transport.lose_connection();
            }
            (kind::VERSION, _) => {
                eprintln!(
                    "the server has version {} of the protocol",
                    header.peer_id & 0xff
                );
                cx.transport.lose_connection();
            }
            // Nothing else is said to who is not attached to a session.
            _ => {}
        }
    }

    fn connection_lost(&mut self, cx: &mut Cx<'_, T>, reason: &CloseReason) {
        if let CloseReason::Lost(error) = reason {
            eprintln!("the server is gone: {error}");
        }
        // It may have been stopped already.
        let _ = cx.reactor.stop();
    }
}

fn main() -> common::Result {
    env_logger::init();
    let mut arguments = Arguments::parse(HELP);
    let command = arguments.rest();
    let user = bowline::process::effective_user();
    let socket: Option<String> = arguments.option("--socket")?;
    let socket = socket.unwrap_or_else(|| format!("/tmp/tmux-{user}/default"));
    let dialect = match arguments.option::<String>("--dialect")?.as_deref() {
        None | Some("legacy") => ImsgDialect::Legacy,
        Some("current") => ImsgDialect::Current,
        Some(other) => return Err(format!("--dialect {other}: legacy or current").into()),
    };
    arguments.finish()?;
    if command.is_empty() {
        return Err("-- COMMAND, please; try --help".into());
    }

    let mut reactor = Reactor::new()?;
    let exit = Rc::new(Cell::new(1));
    let client = Client {
        command,
        exit: Rc::clone(&exit),
    };
    let client = imsg::protocol(ImsgFramer::new(dialect), client);
    let once = Once::new(client).on_failure(|cx, _, error: &ConnectError| {
        eprintln!("no server there: {error}");
        let _ = cx.reactor.stop();
    });
    reactor.connect_unix(socket.as_str(), once)?;
    reactor.run()?;
    std::process::exit(exit.get())
}
