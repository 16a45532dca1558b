//! A server that is replaced by a new process of itself while it serves.
//!
//! ```text
//! cargo run --release --example hot_restart
//! cargo run --release --example hot_restart -- --move
//! cargo run --release --example hot_restart -- --move --tls
//! cargo run --release --example hot_restart -- --serve --listen tcp:127.0.0.1:7007 --move
//! ```
//!
//! The first three start a server, put it under a steady load, have it restart
//! itself several times, and print what became of every request; with `--move`
//! the live connections move along, those with TLS too. With the last, in another terminal:
//!
//! ```text
//! nc 127.0.0.1 7007      # each line comes back with the process that answers
//! kill -HUP PID          # and the next line is answered by another one
//! ```
//!
//! Under systemd it takes its sockets by name (`web`, `local`) and says what it
//! does; `systemd-socket-activate` works too:
//!
//! ```text
//! systemd-socket-activate -l 127.0.0.1:7007 --fdname=web hot_restart --serve
//! ```
//!
//! `server.rs` is the server, `load.rs` makes the load, and this file is the
//! demonstration.

#![allow(clippy::print_stdout)]

#[path = "../common/mod.rs"]
mod common;
mod load;
mod server;

use std::cell::RefCell;
use std::fs;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::rc::Rc;
use std::thread;
use std::time::{Duration, Instant};

use bowline::Reactor;
use bowline::tls::{TlsClient, client_config, rustls};
use rustix::process::{Pid, Signal, kill_process};

use crate::common::{Arguments, Endpoint, Inspect, STOP_DEADLINE};
use crate::load::Load;

const HELP: &str = "
A server that is replaced by a new process of itself while it serves.

Usage: hot_restart [--move] [--tls] [--restarts N] [--connections N] [--clients N]
       hot_restart --serve [--move] [--tls CERT KEY] [--listen ENDPOINT] [--unix PATH]
                   [--directory DIR] [--record FILE]

  --move              live connections move to the new process
  --tls [CERT KEY]    with TLS, and those that live move with --move; two PEM files
                      for --serve
  --restarts N        how often it restarts under load [default: 5]
  --connections N     how many connections the load makes at the least
                      [default: 5000]
  --clients N         how many of them at a time [default: 16]
  --serve             stay up, and restart on SIGHUP
  --listen ENDPOINT   where to listen
                      [default: tcp:127.0.0.1:0:backlog=4096:nodelay=1]
  --unix PATH         where to listen too
  --directory DIR     where processes find each other; ours alone [default:
                      hot_restart in the directory of temporary files]
  --record FILE       where each process appends its number and how many
                      descriptors it had open at its end
  --inspect PLACE     show what is inside: on a UNIX socket (a path),
                      or to browsers (an address)
";

/// That file, in the demonstration.
const RECORD: &str = "ended";

/// How long after a restart the next one follows. Meanwhile the load is what it
/// is without.
const BETWEEN_RESTARTS: Duration = Duration::from_millis(300);

/// A restart that nobody has noticed by then is asked for again: the signal
/// came when the process was not the one that serves yet.
const ASK_AGAIN_AFTER: Duration = Duration::from_secs(2);

fn main() -> common::Result {
    env_logger::init();
    let mut arguments = Arguments::parse(HELP);
    let inspect = Inspect::take(&mut arguments)?;
    let moves = arguments.flag("--move");
    let serve = arguments.flag("--serve");
    let listen: Option<Endpoint> = arguments.option("--listen")?;
    let unix: Option<PathBuf> = arguments.option("--unix")?;
    let directory = arguments.option("--directory")?;
    let record = arguments.option("--record")?;
    let restarts = arguments.option("--restarts")?.unwrap_or(5);
    let connections = arguments.option("--connections")?.unwrap_or(5_000);
    // The demonstration makes a certificate of its own.
    let tls = if serve { arguments.tls()? } else { None };
    let is_secured = arguments.flag("--tls");
    let clients = arguments.option("--clients")?.unwrap_or(16);
    arguments.finish()?;
    if serve {
        // Those that may move say so, and it is told them all alike.
        let tls = tls.map(|tls| tls.may_move(moves));
        let listen = match listen {
            Some(listen) => listen,
            None => "tcp:127.0.0.1:0:backlog=4096:nodelay=1".parse()?,
        };
        server::run(server::Options {
            listen: Some(listen.layered(tls.as_ref())),
            inspect,
            unix,
            directory: directory.unwrap_or_else(|| std::env::temp_dir().join("hot_restart")),
            moves,
            tls,
            record,
        })
    } else {
        demonstrate(moves, is_secured, restarts, connections, clients)
    }
}

/// The first server, ended with this process. Its successors end when the last
/// of them is told to.
struct Server {
    process: Child,
    address: SocketAddr,
}

impl Server {
    fn start(directory: &Path, moves: bool, files: Option<&[PathBuf; 2]>) -> common::Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command
            .arg("--serve")
            .arg("--directory")
            .arg(directory.join("control"))
            .arg("--unix")
            .arg(directory.join("socket"))
            .arg("--record")
            .arg(directory.join(RECORD))
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        if moves {
            command.arg("--move");
        }
        if let Some(files) = files {
            command.arg("--tls").args(files);
        }
        let mut process = command.spawn()?;
        let output = process.stdout.take().ok_or("no output")?;
        let mut line = String::new();
        BufReader::new(output).read_line(&mut line)?;
        let address = line.trim_end().strip_prefix("listening on ");
        let address = address.ok_or("the server did not start")?.parse()?;
        Ok(Self { process, address })
    }
}

/// The restarts, one after the other.
struct Restarts {
    wanted: usize,
    /// The process that was told to restart, and is still the latest.
    told: Option<u32>,
    asked: usize,
}

/// A certificate for this demonstration and its key, in files; and who trusts it.
fn certify(directory: &Path) -> common::Result<([PathBuf; 2], TlsClient)> {
    let certified = rcgen::generate_simple_self_signed(vec!["localhost".into()])?;
    let files = [directory.join("server.crt"), directory.join("server.key")];
    fs::write(&files[0], certified.cert.pem())?;
    fs::write(&files[1], certified.signing_key.serialize_pem())?;
    let mut roots = rustls::RootCertStore::empty();
    roots.add(certified.cert.der().clone())?;
    let client = TlsClient::new(client_config(roots), "localhost")?;
    Ok((files, client))
}

fn demonstrate(
    moves: bool,
    is_secured: bool,
    restarts: usize,
    connections: usize,
    clients: usize,
) -> common::Result {
    let directory = tempfile::tempdir()?;
    let certified = is_secured.then(|| certify(directory.path())).transpose()?;
    let (files, client) = certified.unzip();
    let mut server = Server::start(directory.path(), moves, files.as_ref())?;
    println!(
        "serving on {}, process {}",
        server.address,
        server.process.id()
    );
    let mut reactor = Reactor::new()?;
    let load = Load::start(
        &mut reactor,
        load::Plan {
            tcp: server.address,
            unix: directory.path().join("socket"),
            connections,
            clients,
            keep: moves,
            tls: client,
        },
    );
    let state = Rc::new(RefCell::new(Restarts {
        wanted: restarts,
        told: None,
        asked: 0,
    }));
    watch(&mut reactor, &load, &state);
    reactor.run()?;
    let load = load.borrow();
    // The latest serves still, and the first was waiting to be reaped all along.
    if let Some(pid) = load.latest.and_then(|pid| Pid::from_raw(pid.cast_signed())) {
        kill_process(pid, Signal::TERM)?;
    }
    let first = server.process.wait()?;
    println!("{}", load.report());
    let (ended, left) = descriptors_left(directory.path(), load.generations())?;
    println!("descriptors left open at the end of {ended} processes: {left}");
    if !first.success() {
        return Err(format!("the first server ended with {first}").into());
    }
    if load.failures() > 0 || load.generations() <= restarts || left > 0 {
        return Err("something was lost".into());
    }
    Ok(())
}

/// How many servers have ended, and how many descriptors they had open then, once
/// there are `wanted` of them. All but the first are nobody's children here.
fn descriptors_left(directory: &Path, wanted: usize) -> common::Result<(usize, usize)> {
    let began = Instant::now();
    loop {
        let record = fs::read_to_string(directory.join(RECORD)).unwrap_or_default();
        let left = record.lines().map(|line| {
            let count = line.split_once(' ').and_then(|(_, left)| left.parse().ok());
            count.ok_or_else(|| format!("what is {line}?"))
        });
        let left = left.collect::<Result<Vec<usize>, _>>()?;
        if left.len() >= wanted {
            return Ok((left.len(), left.iter().sum()));
        }
        if began.elapsed() > 2 * STOP_DEADLINE {
            return Err(format!("of {wanted} servers only {} ended well", left.len()).into());
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// Has the latest process restart, whenever the last restart is through.
fn watch(reactor: &mut Reactor, load: &Rc<RefCell<Load>>, state: &Rc<RefCell<Restarts>>) {
    let mut restarts = state.borrow_mut();
    let seen = load.borrow().generations();
    let latest = load.borrow().latest;
    let latest = latest.filter(|_| load.borrow().unheard == 0);
    if seen > restarts.wanted {
        // Every client has met the last of them, or has had the time to.
        load.borrow_mut().finish();
        return;
    }
    let mut wait = BETWEEN_RESTARTS;
    if let Some(pid) = latest {
        if restarts.told != Some(pid) {
            restarts.told = Some(pid);
            restarts.asked = 0;
        }
        let since = BETWEEN_RESTARTS * u32::try_from(restarts.asked).unwrap_or(u32::MAX);
        if restarts.asked == 0 || since >= ASK_AGAIN_AFTER {
            restarts.asked = 0;
            load.borrow_mut().restarting(reactor.now());
            if let Some(pid) = Pid::from_raw(pid.cast_signed())
                && let Err(error) = kill_process(pid, Signal::HUP)
            {
                log::error!("process {pid:?} is gone: {error}");
            }
        }
        restarts.asked += 1;
    } else {
        wait = Duration::from_millis(10);
    }
    let (load, state) = (Rc::clone(load), Rc::clone(state));
    reactor.call_later(wait, move |reactor| watch(reactor, &load, &state));
}
