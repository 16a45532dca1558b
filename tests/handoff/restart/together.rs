//! Programs that start at the same moment: one of them serves.

use std::cell::Cell;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Barrier, Mutex};
use std::time::{Duration, Instant};
use std::{fs, io, thread};

use bowline::Unix;
use bowline::handoff::restart::{
    Listeners, Program, Restart, RestartError, RestartSettings, Start,
};
use bowline::{Address, Context, Protocol, Reactor, Transport};

use crate::support::figures::scaled;
use crate::support::{DEADLINE, DescriptorLedger};

/// What became of a program.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Said {
    Cold,
    /// Another has the control socket, or does not want this successor: it has one
    /// already.
    GaveWay,
    TookOver,
    Failed(String),
}

struct Server {
    path: PathBuf,
    said: Rc<Cell<Option<Said>>>,
}

struct Echo;

impl<T: Transport> Protocol<T> for Echo {
    fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
        cx.transport.write(data);
    }
}

impl Program for Server {
    fn listen(&mut self, reactor: &mut Reactor, listeners: &mut Listeners<'_>) -> io::Result<()> {
        listeners.listen(reactor, "echo", Unix::at(&*self.path), |_: &Address| Echo)?;
        Ok(())
    }

    fn serving(&mut self, _: &mut Reactor, start: Start) {
        let said = match start {
            Start::Cold => Said::Cold,
            _ => Said::TookOver,
        };
        self.said.set(Some(said));
    }

    fn not_started(&mut self, _: &mut Reactor, error: &RestartError) {
        let said = match error {
            RestartError::Control(error) if error.kind() == ErrorKind::AddrInUse => Said::GaveWay,
            RestartError::Refused(_) => Said::GaveWay,
            _ => Said::Failed(error.to_string()),
        };
        self.said.set(Some(said));
    }
}

/// One of `count` programs: begins with the others, and serves until `is_over`.
fn start(directory: &Path, gate: &Barrier, settled: &AtomicUsize, said: &Mutex<Vec<Said>>) {
    let mine = Rc::new(Cell::new(None));
    let server = Server {
        path: directory.join("echo"),
        said: Rc::clone(&mine),
    };
    let mut reactor = Reactor::new().unwrap();
    reactor.start().unwrap();
    gate.wait();
    let _restart = Restart::begin(&mut reactor, RestartSettings::new(directory), server).unwrap();
    let began = Instant::now();
    while began.elapsed() < DEADLINE && settled.load(SeqCst) != usize::MAX {
        reactor.turn(Some(Duration::from_millis(1)));
        if let Some(text) = mine.take() {
            said.lock().unwrap().push(text);
            settled.fetch_add(1, SeqCst);
        }
    }
}

/// What `count` programs say that start in `directory`, and whether a client is served
/// then.
fn start_together(directory: &Path, count: usize) -> (Vec<Said>, bool) {
    let (gate, settled) = (Barrier::new(count), AtomicUsize::new(0));
    let said = Mutex::default();
    let is_served = thread::scope(|scope| {
        for _ in 0..count {
            scope.spawn(|| start(directory, &gate, &settled, &said));
        }
        let began = Instant::now();
        while settled.load(SeqCst) < count && began.elapsed() < DEADLINE {
            thread::yield_now();
        }
        let is_served = UnixStream::connect(directory.join("echo")).is_ok_and(|mut client| {
            client.set_read_timeout(Some(DEADLINE)).unwrap();
            client.write_all(b"?").is_ok() && client.read_exact(&mut [0]).is_ok()
        });
        settled.store(usize::MAX, SeqCst);
        is_served
    });
    let mut said = said.into_inner().unwrap();
    said.sort();
    (said, is_served)
}

/// Contract L-24, W-44: one serves, and is reached; the others say that the control socket
/// is taken. Without what a program that was killed has left, and with it.
#[test]
fn of_programs_that_start_at_once_one_serves() {
    let ledger = DescriptorLedger::open();
    let base = tempfile::tempdir().unwrap();
    for round in 0..scaled(100, 10_000) {
        let directory = base.path().join(round.to_string());
        if round % 2 == 0 {
            fs::DirBuilder::new()
                .mode(0o700)
                .create(&directory)
                .unwrap();
            for name in ["control", "echo"] {
                drop(UnixListener::bind(directory.join(name)).unwrap());
            }
        }
        let count = 2 + round % 3;
        let (said, is_served) = start_together(&directory, count);
        let cold = said.iter().filter(|it| **it == Said::Cold).count();
        // A third may meet one that is handing over to the second, and find it gone.
        let is_right = count > 2 || said.iter().all(|it| !matches!(it, Said::Failed(_)));
        assert!(
            cold == 1 && said.len() == count && is_right,
            "{round}: {said:?}"
        );
        assert!(is_served, "{round}: {said:?}");
    }
    drop(base);
    ledger.assert_balanced();
}
