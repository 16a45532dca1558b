//! Closing what a stranger has had a hand in.
//!
//! close(2) of the last descriptor of a UNIX socket closes what lies unread in its
//! queue, and a descriptor there can be a socket that lingers, or hold one that does:
//! then the call sleeps, up to 2^31 - 1 seconds, for as long as the sender likes
//! (Linux 6.18). Nothing that could be asked of the outer socket says so, and reading
//! it out would take from others who hold it. So such sockets are closed in a thread,
//! which lives for as long as there are any.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::mem;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
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

thread_local! {
    /// Each thread that runs a loop has its own: threads may have tables of descriptors of
    /// their own too (unshare(2)), and one that is started here has the table of this one.
    static CLOSERS: RefCell<Option<OfThread>> = const { RefCell::new(None) };
}

/// What a thread has given away, and the process in which it did so.
struct OfThread {
    /// Its [number](bowline_reactor::forks).
    process: u32,
    closers: Arc<Closers>,
}

/// What is to be closed, of all reactors of a thread.
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

/// How many descriptors that this thread had to close are being closed in others; see
/// [`close_received`]. Ask in the thread that runs the reactor. If it stays above zero for
/// more than a moment, a peer has sent something whose close waits.
pub fn descriptors_closing() -> usize {
    Closers::of_this_thread().unclosed.load(Ordering::Acquire)
}

/// Closes a UNIX socket whose queue nobody has read.
#[cold]
pub(crate) fn close_elsewhere(fd: OwnedFd) {
    let closers = Closers::of_this_thread();
    closers.unclosed.fetch_add(1, Ordering::Relaxed);
    let mut queue = closers.queue();
    queue.waiting.push_back(fd);
    if queue.is_served {
        return;
    }
    let started = closers.start_serving(&mut queue);
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
    fn new() -> Self {
        Self {
            queue: Mutex::new(CloseQueue {
                waiting: VecDeque::new(),
                is_served: false,
            }),
            unclosed: AtomicUsize::new(0),
            closing: AtomicUsize::new(0),
        }
    }

    /// Those of the calling thread. One that is ending gets some for this once.
    fn of_this_thread() -> Arc<Self> {
        let process = bowline_reactor::forks();
        let of_thread = |slot: &RefCell<Option<OfThread>>| {
            let mut slot = slot.borrow_mut();
            let old = match &*slot {
                Some(known) if known.process == process => return Arc::clone(&known.closers),
                _ => slot.take(),
            };
            let closers = Arc::new(Self::new());
            if let Some(old) = old {
                closers.inherit(old.closers);
            }
            *slot = Some(OfThread {
                process,
                closers: Arc::clone(&closers),
            });
            closers
        };
        CLOSERS
            .try_with(of_thread)
            .unwrap_or_else(|_| Arc::new(Self::new()))
    }

    /// Takes over what waited in the process that this one was forked from. A forked child
    /// has none of its parent's threads, and what one of them had locked stays locked.
    fn inherit(self: &Arc<Self>, parents: Arc<Self>) {
        if let Ok(mut theirs) = parents.queue.try_lock()
            && !theirs.waiting.is_empty()
        {
            let mut queue = self.queue();
            queue.waiting = mem::take(&mut theirs.waiting);
            self.unclosed.store(queue.waiting.len(), Ordering::Relaxed);
            // Without a thread they wait for the next one that is to be closed.
            let _ = self.start_serving(&mut queue);
        }
        // Threads that are not here would have dropped theirs.
        mem::forget(parents);
    }

    fn queue(&self) -> MutexGuard<'_, CloseQueue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn start_serving(self: &Arc<Self>, queue: &mut CloseQueue) -> io::Result<()> {
        let closers = Arc::clone(self);
        let started = start(move || closers.serve());
        queue.is_served = started.is_ok();
        started
    }

    /// Has all that waits closed, and ends.
    fn serve(self: &Arc<Self>) {
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
    fn close_by(self: &Arc<Self>, closer: Option<Closer>, fd: OwnedFd) -> Option<Closer> {
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
    fn start(closers: &Arc<Closers>) -> io::Result<Self> {
        let (give, take) = mpsc::channel::<OwnedFd>();
        let (say, done) = mpsc::channel();
        let closers = Arc::clone(closers);
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
