//! Programs that serve: this one again, and peers in other languages, which
//! take the same arguments.

use std::env;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use crate::peers::Peer;

const LIBUV: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/peers/with_libuv.c");
const TWISTED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/peers/with_twisted.py");
/// What tests/interop/setup makes.
const PYTHON: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../target/interop-venv/bin/python"
);

/// The program that serves as a peer, with arguments still to be added.
pub(crate) fn program(peer: Peer) -> io::Result<Command> {
    let missing = || io::Error::new(io::ErrorKind::NotFound, "it is not installed");
    match peer {
        Peer::Libuv => Ok(Command::new(libuv().ok_or_else(missing)?)),
        Peer::Twisted => {
            let mut command = Command::new(python().ok_or_else(missing)?);
            command.arg(TWISTED);
            Ok(command)
        }
        _ => Ok(Command::new(env::current_exe()?)),
    }
}

/// What is missing for a peer to run.
pub(crate) fn missing(peer: Peer) -> Option<&'static str> {
    match peer {
        Peer::Libuv if libuv().is_none() => {
            Some("wants cc and libuv (Debian: apt-get install gcc libuv1-dev)")
        }
        Peer::Twisted if python().is_none() => Some("wants tests/interop/setup to be run"),
        _ => None,
    }
}

fn python() -> Option<&'static Path> {
    let python = Path::new(PYTHON);
    python.exists().then_some(python)
}

/// Compiled when it is first asked for.
fn libuv() -> Option<&'static Path> {
    static PROGRAM: OnceLock<Option<PathBuf>> = OnceLock::new();
    let program = PROGRAM.get_or_init(|| {
        let program = env::current_exe()
            .ok()?
            .with_file_name("bowline-bench-libuv");
        let output = Command::new("cc")
            .args(["-O2", "-o"])
            .arg(&program)
            .args([LIBUV, "-luv"])
            .output();
        output.ok()?.status.success().then_some(program)
    });
    program.as_deref()
}
