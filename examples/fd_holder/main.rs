//! Keeps named descriptors for programs between their lives: a listener, say,
//! whose queue goes on filling while its program is replaced, crashes or moves.
//!
//! ```text
//! cargo run --release --example fd_holder
//! cargo run --release --example fd_holder -- --serve --path /tmp/holder
//! ```
//!
//! The first starts a holder, and a program that keeps its listener there; kills
//! the program, and shows that a client which connects meanwhile is answered by
//! the next. With the second, in another terminal:
//!
//! ```text
//! fd_holder --path /tmp/holder --store notes < /etc/hostname
//! fd_holder --path /tmp/holder --list
//! fd_holder --path /tmp/holder --retrieve notes       # prints what it reads
//! fd_holder --path /tmp/holder --remove notes
//! ```
//!
//! With `--notices PATH` it also hears what programs tell systemd (`sd_notify(3)`): those
//! that keep descriptors there (`FDSTORE=1`, `FDNAME`, `FDPOLL`, `FDSTOREREMOVE`) keep them
//! here if `NOTIFY_SOCKET` is that path, and a `BARRIER=1` is answered.
//!
//! The holder's socket takes connections of its own user alone. It keeps so many
//! descriptors and no more, and none twice; killing it closes them. `holder.rs` is the holder,
//! `client.rs` asks it, and this file is the demonstration.

#![allow(clippy::print_stdout)]

#[path = "../common/mod.rs"]
mod common;

mod client;
mod holder;

use std::io::{self, BufRead, BufReader, Read};
use std::net::TcpStream as StdTcpStream;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use bowline::Tcp;
use bowline::{Address, Context, Protocol, Reactor, Transport, Transports};

use crate::client::Answer;
use crate::common::{Arguments, Inspect};
use crate::holder::Request;

const HELP: &str = "
Keeps named descriptors for programs between their lives.

Usage: fd_holder
       fd_holder --path PATH --serve [--limit N] [--notices PATH]
       fd_holder --path PATH (--store NAME | --retrieve NAME | --remove NAME | --list)

  --path PATH       the holder's socket
  --serve           be the holder
  --limit N         how many descriptors it keeps [default: 1000]
  --notices PATH    also hear what is meant for systemd, at this socket
  --store NAME      have standard input kept under this name
  --retrieve NAME   take it back, and print what it reads
  --remove NAME     have it closed
  --list            print the names, and how many descriptors each has
  --inspect PLACE   show what is inside: on a UNIX socket (a path),
                    or to browsers (an address)
";

/// The hidden argument of the program whose listener is kept.
const PROGRAM: &str = "--program";

fn main() -> common::Result {
    env_logger::init();
    let mut arguments = Arguments::parse(HELP);
    let inspect = Inspect::take(&mut arguments)?;
    let path: Option<PathBuf> = arguments.option("--path")?;
    let limit = arguments.option("--limit")?.unwrap_or(1000);
    let notices: Option<PathBuf> = arguments.option("--notices")?;
    let is_holder = arguments.flag("--serve");
    let is_program = arguments.flag(PROGRAM);
    let list = arguments.flag("--list");
    let store: Option<String> = arguments.option("--store")?;
    let retrieve: Option<String> = arguments.option("--retrieve")?;
    let remove: Option<String> = arguments.option("--remove")?;
    arguments.finish()?;
    let Some(path) = path else {
        return demonstrate();
    };
    if is_holder {
        return holder::run(&path, notices, limit, inspect.as_ref());
    }
    if is_program {
        return program(&path);
    }
    let (request, descriptors) = match (store, retrieve, remove, list) {
        (Some(name), None, None, false) => {
            let input = io::stdin().as_fd().try_clone_to_owned()?;
            (Request::Store { name }, vec![input])
        }
        (None, Some(name), None, false) => (Request::Retrieve { name }, Vec::new()),
        (None, None, Some(name), false) => (Request::Remove { name }, Vec::new()),
        (None, None, None, true) => (Request::List, Vec::new()),
        _ => return Err("one thing at a time; try --help".into()),
    };
    match client::ask(&path, request, descriptors)? {
        Answer::Done => {}
        Answer::Names(names) => {
            for (name, count) in names {
                println!("{name} {count}");
            }
        }
        Answer::Descriptors(descriptors) => {
            for descriptor in descriptors {
                let mut file = std::fs::File::from(descriptor);
                io::copy(&mut file, &mut io::stdout())?;
            }
        }
    }
    Ok(())
}

/// A server that lives as long as it can, and whose listener lives longer.
fn program(holder: &Path) -> common::Result {
    let name = || "web".to_owned();
    let listener = match client::ask(holder, Request::Retrieve { name: name() }, Vec::new()) {
        Ok(Answer::Descriptors(mut descriptors)) => descriptors.pop(),
        Ok(_) => None,
        Err(error) => {
            // The first of its kind.
            log::info!("{error}");
            None
        }
    };
    let listener = match listener {
        Some(listener) => listener,
        None => {
            let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
            listener.into()
        }
    };
    // Kept again at once: whoever retrieves it takes it out.
    let copy = listener.try_clone()?;
    client::ask(holder, Request::Store { name: name() }, vec![copy])?;
    let mut reactor = Reactor::new()?;
    let listener = reactor.listen(Tcp::listening(listener), |_: &Address| Name)?;
    common::print_address(&mut reactor, listener);
    reactor.run()?;
    Ok(())
}

/// Says which process answers.
struct Name;

impl<T: Transport> Protocol<T> for Name {
    fn connection_made(&mut self, cx: &mut Context<'_, T>) {
        let name = format!("process {}\n", std::process::id());
        cx.transport.write(name.as_bytes());
        cx.transport.lose_connection();
    }

    fn data_received(&mut self, _: &mut Context<'_, T>, _: &[u8]) {}
}

/// A process of ours, killed at the end.
struct Started {
    process: Child,
    said: String,
}

impl Started {
    /// Starts it, and waits for its first line.
    fn new(path: &Path, argument: &str) -> common::Result<Self> {
        let mut process = Command::new(std::env::current_exe()?)
            .arg("--path")
            .arg(path)
            .arg(argument)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()?;
        let output = process.stdout.take().ok_or("no output")?;
        let mut said = String::new();
        BufReader::new(output).read_line(&mut said)?;
        let said = said.trim_end().to_owned();
        Ok(Self { process, said })
    }

    fn kill(&mut self) -> io::Result<()> {
        self.process.kill()?;
        self.process.wait()?;
        Ok(())
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        // Nothing happens when it has ended.
        let _ = self.kill();
    }
}

fn demonstrate() -> common::Result {
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("holder");
    let _holder = Started::new(&path, "--serve")?;
    let mut first = Started::new(&path, PROGRAM)?;
    let address = first
        .said
        .strip_prefix("listening on ")
        .ok_or("no address")?;
    let address = address.to_owned();
    let ask = |mut stream: StdTcpStream| {
        let mut answer = String::new();
        stream.read_to_string(&mut answer).map(|_| answer)
    };
    let answer = ask(StdTcpStream::connect(&address)?)?;
    print!("its first life: {answer}");
    first.kill()?;
    // Nobody is there, and nobody is refused: the listener is in safe hands.
    let waiting = StdTcpStream::connect(&address)?;
    let Answer::Names(names) = client::ask(&path, Request::List, Vec::new())? else {
        return Err("no list".into());
    };
    println!("killed; the holder has {names:?}, and a client waits");
    let second = Started::new(&path, PROGRAM)?;
    let answer = ask(waiting)?;
    print!("its second life: {answer}");
    if second.said != first.said || !answer.contains(&second.process.id().to_string()) {
        return Err("the client was not answered by the second".into());
    }
    Ok(())
}
