//! Closing sockets that may hold a stranger's descriptors.
//!
//! When the last descriptor of a UNIX socket is closed, close(2) also closes the unread
//! descriptors in its queue. One of them can be a socket that lingers, or can hold one.
//! Then the call sleeps for as long as the sender chose, up to 2^31 - 1 seconds (Linux
//! 6.18). The outer socket does not show this, and reading its queue would rob others
//! who hold it. So such sockets are closed in a thread, which lives as long as there
//! are any.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::mem;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bowline_reactor::start_thread;

use crate::log;
use crate::sys::{self, Ancillary, ControlBuffer};

/// The name of the threads.
const NAME: &str = "bowline-closer";

/// The threads call close(2) and little else.
const STACK_BYTES: usize = 64 * 1024;

/// How long a close may take before the others go on without it. A usual close takes a
/// thousandth of it.
const PATIENCE: Duration = Duration::from_millis(10);

/// How many closes may be asleep, each in a thread of its own. If there are more,
/// somebody means harm, and sockets are emptied before they are closed.
const MOST_ASLEEP: usize = 64;

/// How many messages and clients are taken out of one socket, and of the sockets in it.
const MOST_TAKEN: usize = 65_536;

thread_local! {
    /// Each thread that runs a loop has its own. A thread may have a descriptor table
    /// of its own (unshare(2)), and a thread that is started here shares the table of
    /// this one.
    static CLOSERS: RefCell<Option<OfThread>> = const { RefCell::new(None) };
}

/// The descriptors that a thread has given away, and the process in which it did so.
struct OfThread {
    /// The [number](bowline_reactor::forks) of the process.
    process: u32,
    closers: Arc<Closers>,
}

/// The descriptors that all reactors of a thread have to close.
struct Closers {
    queue: Mutex<CloseQueue>,
    /// How many were given away and are not closed yet.
    unclosed: AtomicUsize,
    /// How many of them a thread is closing.
    closing: AtomicUsize,
}

struct CloseQueue {
    waiting: VecDeque<OwnedFd>,
    /// Whether a thread takes from the queue.
    is_served: bool,
}

/// Closes a descriptor that a peer has sent, and never waits for it. If its close could
/// wait for something, another thread closes it a moment later. Otherwise it is closed
/// when this returns.
///
/// A UNIX socket may hold descriptors that nobody has read. Its close closes those too.
/// If one of them is a socket that lingers, dropping the [`OwnedFd`] holds up the whole
/// loop for as long as the sender chose. bowline closes in this way too, above all
/// descriptors that no protocol took.
///
/// # Examples
///
/// ```
/// use std::os::unix::net::UnixStream;
///
/// let (theirs, ours) = UnixStream::pair()?;
/// bowline::process::close_received(theirs.into());
/// // The other end sees it, as after any close.
/// assert_eq!(std::io::Read::read(&mut &ours, &mut [0; 1])?, 0);
/// # Ok::<(), std::io::Error>(())
/// ```
pub fn close_received(fd: OwnedFd) {
    drop(closable(fd));
}

/// A descriptor that a peer has sent, whose close does not wait for anything. `None` if
/// another thread closes it.
pub(crate) fn closable(fd: OwnedFd) -> Option<OwnedFd> {
    if sys::disarm_linger(fd.as_fd()) && sys::is_unix(fd.as_fd()) {
        close_elsewhere(fd);
        return None;
    }
    Some(fd)
}

/// Closes descriptors at once: those whose numbers follow each other by one system call,
/// as those of a message mostly do.
///
/// It does not look what they are. What a peer has sent who is not trusted is closed by
/// [`close_received`], one by one, if it may be a UNIX socket.
///
/// # Examples
///
/// ```
/// use std::fs::File;
/// use std::os::fd::OwnedFd;
///
/// let files: Vec<OwnedFd> = vec![
///     File::open("/dev/null")?.into(),
///     File::open("/dev/null")?.into(),
/// ];
/// bowline::process::close_all(files);
/// # Ok::<(), std::io::Error>(())
/// ```
#[doc(alias = "close_range")]
pub fn close_all(descriptors: impl IntoIterator<Item = OwnedFd>) {
    sys::close_all(descriptors);
}

/// How many descriptors of this thread are being closed in others. See
/// [`close_received`]. Ask in the thread that runs the reactor. If the number stays
/// above zero for more than a moment, a peer has sent something whose close waits.
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
        // The next descriptor tries again.
        log::warn!(target: log::DESCRIPTORS, "no thread to close {waiting} descriptors in: {error}");
    }
}

fn start(run: impl FnOnce() + Send + 'static) -> io::Result<()> {
    start_thread(NAME, Some(STACK_BYTES), run).map(drop)
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

    /// The closers of the calling thread. A thread that is ending gets new ones for
    /// this call.
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

    /// Takes over the queue of the process that this one was forked from. A forked
    /// child has none of its parent's threads, and a mutex that one of them held stays
    /// locked.
    fn inherit(self: &Arc<Self>, parents: Arc<Self>) {
        if let Ok(mut theirs) = parents.queue.try_lock()
            && !theirs.waiting.is_empty()
        {
            let mut queue = self.queue();
            queue.waiting = mem::take(&mut theirs.waiting);
            self.unclosed.store(queue.waiting.len(), Ordering::Relaxed);
            // If no thread starts, they wait for the next descriptor.
            let _ = self.start_serving(&mut queue);
        }
        // Only threads of the parent would drop their references.
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

    /// Has everything in the queue closed, and ends.
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

    /// Has `closer`, or a new one, close `fd`. Returns it if it can go on.
    fn close_by(self: &Arc<Self>, closer: Option<Closer>, fd: OwnedFd) -> Option<Closer> {
        let asleep = self.closing.load(Ordering::Relaxed);
        let closer = match closer.map_or_else(|| Closer::start(self), Ok) {
            Ok(closer) if asleep < MOST_ASLEEP => closer,
            others => {
                // If this has to wait, only this thread waits, and no loop.
                close_emptied(fd);
                self.unclosed.fetch_sub(1, Ordering::Release);
                return others.ok();
            }
        };
        self.closing.fetch_add(1, Ordering::Relaxed);
        closer.give.send(fd).ok()?;
        match closer.done.recv_timeout(PATIENCE) {
            Ok(()) => Some(closer),
            // That thread ends when it wakes up.
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => None,
        }
    }
}

/// Empties a socket and the sockets in its queue, so that no close can wait, and closes
/// them. Others who hold it lose the bytes that they have not read. Whoever sent it
/// could have done that too.
fn close_emptied(fd: OwnedFd) {
    let mut data = vec![0; 4_096];
    let mut control = Box::new(ControlBuffer::new());
    let mut ancillary = Ancillary::new();
    let mut left = MOST_TAKEN;
    let mut sockets = vec![fd];
    while let Some(fd) = sockets.pop() {
        // So that no more can come. (Before Linux 6.16 it can.)
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

/// A thread that closes one descriptor after the other, and reports each.
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
