//! Closing what a stranger has had a hand in.
//!
//! close(2) of the last descriptor of a UNIX socket closes what lies unread in its
//! queue, and a descriptor there can be a socket that lingers, or hold one that does:
//! then the call sleeps, up to 2^31 - 1 seconds, for as long as the sender likes
//! (Linux 6.18). Nothing that could be asked of the outer socket says so, and reading
//! it out would take from others who hold it. So such sockets are closed in a thread,
//! which lives for as long as there are any.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use crate::log;
use crate::sys::{self, Ancillary, ControlBuffer};

/// What the threads are called.
const NAME: &str = "bowline-closer";

/// They call close(2) and little else.
const STACK_BYTES: usize = 64 * 1024;

/// How long a close may take before the others go on without it: a thousand
/// times what one takes.
const PATIENCE: Duration = Duration::from_millis(10);

/// How many may be asleep in a close, each in a thread of its own. Beyond that somebody
/// means harm, and sockets are emptied before they are closed.
const MOST_ASLEEP: usize = 64;

/// How many messages and clients are taken out of one socket, and those inside of it.
const MOST_TAKEN: usize = 65_536;

/// Those of this process are the ones that its [number](bowline_reactor::forks) says: a
/// forked child has none of its parent's threads, and what one of them had locked stays
/// locked there.
static CLOSERS: [Closers; 4] = [const { Closers::new() }; 4];

/// What is to be closed, of all reactors of a process.
struct Closers {
    queue: Mutex<CloseQueue>,
    /// How many were given away and are not closed.
    unclosed: AtomicUsize,
    /// How many of them a thread is closing.
    closing: AtomicUsize,
}

struct CloseQueue {
    waiting: VecDeque<OwnedFd>,
    /// Whether there is a thread that takes from it.
    is_served: bool,
    /// The process that it is of.
    process: u32,
}

/// Closes a descriptor that a peer has sent, and never waits for it. It is closed when this
/// returns or, if its close could wait for something, a moment later in another thread.
///
/// A UNIX socket may hold descriptors that nobody has read. Its close closes those too. If
/// one of them is a socket that lingers, dropping the [`OwnedFd`] holds up the whole loop
/// for as long as the sender chose. bowline itself closes in this way, above all
/// descriptors that no protocol took.
///
/// # Examples
///
/// ```
/// use std::os::unix::net::UnixStream;
///
/// let (theirs, ours) = UnixStream::pair()?;
/// bowline_transport::close_received(theirs.into());
/// // The other end sees it, as after any close.
/// assert_eq!(std::io::Read::read(&mut &ours, &mut [0; 1])?, 0);
/// # Ok::<(), std::io::Error>(())
/// ```
pub fn close_received(fd: OwnedFd) {
    if sys::disarm_linger(fd.as_fd()) && sys::is_unix(fd.as_fd()) {
        close_elsewhere(fd);
    }
}

/// How many descriptors other threads of this process are closing; see
/// [`close_received`]. If it stays above zero for more than a moment, a peer has sent
/// something whose close waits.
pub fn descriptors_closing() -> usize {
    Closers::of_this_process().unclosed.load(Ordering::Acquire)
}

/// Closes a UNIX socket whose queue nobody has read.
#[cold]
pub(crate) fn close_elsewhere(fd: OwnedFd) {
    let closers = Closers::of_this_process();
    closers.unclosed.fetch_add(1, Ordering::Relaxed);
    let mut queue = closers.queue();
    queue.waiting.push_back(fd);
    if queue.is_served {
        return;
    }
    let started = start(|| closers.serve());
    queue.is_served = started.is_ok();
    let waiting = queue.waiting.len();
    drop(queue);
    if let Err(error) = started {
        // The next one tries again.
        log::warn!(target: log::DESCRIPTORS, "no thread to close {waiting} descriptors in: {error}");
    }
}

fn start(run: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let thread = thread::Builder::new()
        .name(NAME.to_owned())
        .stack_size(STACK_BYTES);
    thread.spawn(run).map(drop)
}

impl Closers {
    const fn new() -> Self {
        Self {
            queue: Mutex::new(CloseQueue {
                waiting: VecDeque::new(),
                is_served: false,
                process: 0,
            }),
            unclosed: AtomicUsize::new(0),
            closing: AtomicUsize::new(0),
        }
    }

    fn of_this_process() -> &'static Self {
        let process = bowline_reactor::forks();
        let closers = &CLOSERS[process as usize % CLOSERS.len()];
        let mut queue = closers.queue();
        if queue.process != process {
            // An ancestor's, whose threads are not here.
            queue.process = process;
            queue.is_served = false;
            closers
                .unclosed
                .store(queue.waiting.len(), Ordering::Relaxed);
            closers.closing.store(0, Ordering::Relaxed);
        }
        drop(queue);
        closers
    }

    fn queue(&self) -> MutexGuard<'_, CloseQueue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has all that waits closed, and ends.
    fn serve(&'static self) {
        let mut closer = None;
        loop {
            let mut queue = self.queue();
            let Some(fd) = queue.waiting.pop_front() else {
                queue.is_served = false;
                return;
            };
            drop(queue);
            closer = self.close_by(closer, fd);
        }
    }

    /// Has `closer`, or a new one, close `fd`; answers it if it can go on.
    fn close_by(&'static self, closer: Option<Closer>, fd: OwnedFd) -> Option<Closer> {
        let asleep = self.closing.load(Ordering::Relaxed);
        let closer = match closer.map_or_else(|| Closer::start(self), Ok) {
            Ok(closer) if asleep < MOST_ASLEEP => closer,
            others => {
                // If it has to wait, it is this thread that does, and no loop.
                close_emptied(fd);
                self.unclosed.fetch_sub(1, Ordering::Release);
                return others.ok();
            }
        };
        self.closing.fetch_add(1, Ordering::Relaxed);
        closer.give.send(fd).ok()?;
        match closer.done.recv_timeout(PATIENCE) {
            Ok(()) => Some(closer),
            // It ends when it wakes up.
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => None,
        }
    }
}

/// Closes a socket after everything was taken out of it whose close could wait, and out
/// of what was in that. Others who hold it lose what they had not read: whoever sent it
/// could have done that too.
fn close_emptied(fd: OwnedFd) {
    let mut data = vec![0; 4_096];
    let mut control = Box::new(ControlBuffer::new());
    let mut ancillary = Ancillary::new();
    let mut left = MOST_TAKEN;
    let mut sockets = vec![fd];
    while let Some(fd) = sockets.pop() {
        // So that nothing follows; before Linux 6.16 it can.
        let _ = sys::set_pass_rights(fd.as_fd(), false);
        let kind = sys::socket_kind(fd.as_fd());
        let (is_stream, is_listener) = kind.map_or((true, false), |it| (it.stream, it.listening));
        while left > 0 {
            left -= 1;
            if is_listener {
                match sys::accept_from(fd.as_fd(), true) {
                    Ok((client, _)) => sockets.push(client),
                    Err(_) => break,
                }
                continue;
            }
            let read = sys::receive(fd.as_fd(), &mut data, &mut control, &mut ancillary);
            for inner in ancillary.descriptors.drain(..) {
                if sys::disarm_linger(inner.as_fd()) && sys::is_unix(inner.as_fd()) {
                    sockets.push(inner);
                }
            }
            ancillary.clear();
            match read {
                Ok(received) if received.bytes > 0 || !is_stream => {}
                Ok(_) | Err(_) => break,
            }
        }
    }
}

/// A thread that closes one after the other, and says when it has.
struct Closer {
    give: Sender<OwnedFd>,
    done: Receiver<()>,
}

impl Closer {
    fn start(closers: &'static Closers) -> io::Result<Self> {
        let (give, take) = mpsc::channel::<OwnedFd>();
        let (say, done) = mpsc::channel();
        start(move || {
            for fd in take {
                drop(fd);
                closers.unclosed.fetch_sub(1, Ordering::Release);
                closers.closing.fetch_sub(1, Ordering::Relaxed);
                if say.send(()).is_err() {
                    return;
                }
            }
        })?;
        Ok(Self { give, done })
    }
}
