//! Calls from other threads.

use std::error::Error;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::log;
use crate::reactor::Reactor;

pub(crate) type RemoteCall = Box<dyn FnOnce(&mut Reactor) + Send>;

/// A handle on a reactor that other threads may hold: `Send`, `Sync`, `Clone`.
///
/// (Twisted: `reactor.callFromThread`.)
#[derive(Clone)]
pub struct RemoteHandle {
    shared: Arc<Shared>,
}

pub(crate) struct Shared {
    queue: Mutex<RemoteQueue>,
    /// Whether calls wait. Set by the first call after a drain, which alone
    /// pays for the wake-up, so that a flood of calls costs one.
    waiting: AtomicBool,
    waker: mio::Waker,
}

struct RemoteQueue {
    calls: Vec<RemoteCall>,
    is_closed: bool,
}

impl RemoteHandle {
    pub(crate) fn new(waker: mio::Waker) -> Self {
        Self {
            shared: Arc::new(Shared {
                queue: Mutex::new(RemoteQueue {
                    calls: Vec::new(),
                    is_closed: false,
                }),
                waiting: AtomicBool::new(false),
                waker,
            }),
        }
    }

    /// Runs `call` in the reactor's thread, in its next turn. Wakes the reactor if it
    /// waits.
    ///
    /// Calls run in the order they were made. A call that is made while others run
    /// waits for the turn after. A call that is made before the reactor runs is kept
    /// until it does. Never blocks for longer than it takes to append to a list.
    ///
    /// # Errors
    ///
    /// [`RemoteError`] when the reactor is gone; the call is dropped.
    pub fn call_from_thread(
        &self,
        call: impl FnOnce(&mut Reactor) + Send + 'static,
    ) -> Result<(), RemoteError> {
        let mut queue = self.queue();
        if queue.is_closed {
            return Err(RemoteError);
        }
        queue.calls.push(Box::new(call));
        drop(queue);
        if !self.shared.waiting.swap(true, Ordering::AcqRel) {
            self.wake();
        }
        Ok(())
    }

    /// Wakes the reactor if it waits in its poll. Its turn then ends early.
    pub fn wake(&self) {
        if let Err(error) = self.shared.waker.wake() {
            log::error!(target: log::REACTOR, "cannot wake the reactor: {error}");
        }
    }

    /// Whether calls wait to be run.
    pub(crate) fn is_waiting(&self) -> bool {
        self.shared.waiting.load(Ordering::Acquire)
    }

    /// Takes what waits; later calls wake the reactor again.
    pub(crate) fn drain(&self, into: &mut Vec<RemoteCall>) {
        // Cleared before the queue is read: a call that comes in between wakes
        // once too often, which is harmless; the other order would lose it.
        self.shared.waiting.store(false, Ordering::Release);
        std::mem::swap(&mut self.queue().calls, into);
    }

    /// Refuses calls from now on; returns those that wait, to be dropped outside
    /// of the lock: what they own may call us.
    ///
    /// In a forked child a thread that does not exist there may have the lock; what
    /// waits is the parent's to be dropped then.
    pub(crate) fn close(&self, is_forked: bool) -> Vec<RemoteCall> {
        let mut queue = match self.shared.queue.try_lock() {
            Ok(queue) => queue,
            Err(_) if is_forked => return Vec::new(),
            Err(_) => self.queue(),
        };
        queue.is_closed = true;
        std::mem::take(&mut queue.calls)
    }

    fn queue(&self) -> MutexGuard<'_, RemoteQueue> {
        // Nothing panics while the lock is held, and a Vec of boxes is sound
        // anyway.
        self.shared
            .queue
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for RemoteHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RemoteHandle").finish_non_exhaustive()
    }
}

/// The reactor was dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RemoteError;

impl fmt::Display for RemoteError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("reactor is gone")
    }
}

impl Error for RemoteError {}
