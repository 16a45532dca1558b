//! An engine that runs a container with its console here, by runc.
//!
//! ```console
//! $ cargo build --example oci_console
//! $ mkdir -p /tmp/box/rootfs && docker export $(docker create busybox) | tar -C /tmp/box/rootfs -x
//! $ (cd /tmp/box && runc spec)
//! $ target/debug/examples/oci_console --bundle /tmp/box --id box-1
//! ```
//!
//! It waits for the terminal of the container at a console socket, and copies what the
//! container writes to standard output, and standard input to the container, line by line.
//! When nobody in the container has the terminal any more, it is over. Writing to standard
//! output may wait, which is a shortcut.

#![allow(clippy::print_stdout)]

mod common;

use std::io::{self, Write as _};
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use bowline::process::{
    ChildCommand, CollectOutput, ProcessStatus, TerminalSize, set_terminal_size,
};
use bowline::{
    CloseReason, Context, Pipe, Protocol, Reactor, Transport, TransportHandle, Transports,
};
use bowline_peers::oci::{Console, ConsoleError, ConsoleSocket};

use common::Arguments;

const HELP: &str = "
Runs a container by runc, with its console here.

Usage: oci_console --bundle FOLDER --id NAME

  --bundle FOLDER  the container: a root file system, and config.json
  --id NAME        what it is called
  --help           prints this
";

/// The terminal of the container, and what comes from it.
struct Screen;

impl<T: Transport> Protocol<T> for Screen {
    fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
        let mut out = io::stdout().lock();
        if let Err(error) = out.write_all(data).and_then(|()| out.flush()) {
            cx.reactor.fail(error);
        }
    }

    fn connection_lost(&mut self, cx: &mut Context<'_, T>, _: &CloseReason) {
        // It may be stopping already.
        let _ = cx.reactor.stop();
    }
}

/// Our standard input. Its end is left to the terminal, which has no other one than Control-D.
struct Keyboard(TransportHandle);

impl<T: Transport> Protocol<T> for Keyboard {
    fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
        if let Some(terminal) = cx.get(self.0) {
            terminal.write(data);
        }
    }

    fn read_connection_lost(&mut self, cx: &mut Context<'_, T>) -> bowline::AfterReadClosed {
        if let Some(terminal) = cx.get(self.0) {
            terminal.write(b"\x04");
        }
        bowline::AfterReadClosed::EndConnection
    }
}

fn show(reactor: &mut Reactor, console: Result<Console, ConsoleError>) -> io::Result<()> {
    let console = console.map_err(io::Error::other)?;
    let size = TerminalSize::default().rows(24).columns(80);
    set_terminal_size(console.terminal(), size)?;
    let terminal = reactor.adopt(Pipe, console.into_descriptor(), Screen)?;
    let keyboard = std::os::fd::AsFd::as_fd(&io::stdin()).try_clone_to_owned()?;
    reactor.adopt(Pipe::reading(), keyboard, Keyboard(terminal))?;
    Ok(())
}

/// The file of the console socket, and nothing when the program has ended.
struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn main() -> common::Result {
    env_logger::init();
    let mut arguments = Arguments::parse(HELP);
    let bundle: Option<String> = arguments.option("--bundle")?;
    let bundle = bundle.ok_or("--bundle FOLDER, please; try --help")?;
    let id: Option<String> = arguments.option("--id")?;
    let id = id.ok_or("--id NAME, please; try --help")?;
    arguments.finish()?;
    let folder = Folder(std::env::temp_dir().join(format!("oci-console-{}", std::process::id())));
    std::fs::create_dir(&folder.0)?;
    let path = folder.0.join("console");

    let mut reactor = Reactor::new()?;
    let socket = ConsoleSocket::at(&path).within(Duration::from_secs(30));
    socket.listen(&mut reactor, |reactor, console| {
        if let Err(error) = show(reactor, console) {
            reactor.fail(error);
        }
    })?;
    let runtime = ChildCommand::program("runc")
        .args(["run", "--detach", "--bundle", &bundle, "--console-socket"])
        .arg(&path)
        .arg(&id);
    let failed = CollectOutput::new(|reactor, output| {
        // The container may have ended, and this program with it, before runc has.
        let is_cut = output.status == ProcessStatus::ReactorStopped;
        if !is_cut && !output.status.is_success() {
            let why = String::from_utf8_lossy(&output.stderr).into_owned();
            reactor.fail(io::Error::other(format!("runc {}: {why}", output.status)));
        }
    });
    reactor.spawn_process(runtime, failed)?;
    reactor.stop_on_signals()?;
    let result = reactor.run();
    // It has ended, or has no console any more.
    Command::new("runc")
        .args(["delete", "--force", &id])
        .output()?;
    Ok(result?)
}
