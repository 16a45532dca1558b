//! Work that blocks, in threads beside the reactor's.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::error::Error;
use std::fmt;
use std::io;
use std::mem;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::Duration;

use crate::log;
use crate::panic::{Panic, catch_panic};
use crate::reactor::Reactor;
use crate::sys::{self, Thread};
use crate::triggers::{Hold, Phase, SystemEvent};

/// As many as Twisted has. They are for waiting, on a disk or on a name server,
/// rather than for computing, so their number does not follow the processors'.
const MAX_THREADS: usize = 10;

/// How long a thread without work stays: longer than the gaps within a burst.
const IDLE_TIMEOUT: Duration = Duration::from_secs(10);

/// How much may wait. Whoever has more to do than this is not going to catch
/// up.
const MAX_QUEUED: usize = 65_536;

/// Threads for work that blocks, and a queue of the work that waits for them. A
/// clone is a handle on the same pool.
///
/// A thread is started when there is work and no thread is free, up to a limit. It
/// ends when it has had no work for a while, so an unused pool costs nothing. Each
/// reactor has a pool, for [`Reactor::call_in_thread`]. Make another one for work
/// that must not wait for the rest, or must not make the rest wait. (Twisted:
/// `ThreadPool`, `deferToThreadPool`.)
///
/// # Shutdown
///
/// With [`AtShutdown::Finish`], a reactor that was asked to stop goes on turning
/// until all work is done and its callers have been told. The threads have ended
/// before [`Reactor::run`] returns. Work that comes even later, while connections
/// are being closed, is finished without turning.
///
/// With [`AtShutdown::Abandon`] the reactor waits for nothing.
///
/// A reactor that is dropped without having stopped drops the work that waits. Work
/// that runs is left alone.
#[derive(Clone)]
pub struct ThreadPool {
    local: Rc<Local>,
}

/// How a [`ThreadPool`] works.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ThreadPoolSettings {
    /// How many threads there are at the most; default 10. Zero counts as one.
    pub max_threads: usize,
    /// How much work may wait for a thread; default 65,536. More is refused. With zero,
    /// work is accepted only while a thread is free or may still be started.
    pub max_queued: usize,
    /// How long a thread stays without work before it ends; default 10 s.
    pub idle_timeout: Duration,
    /// What a reactor that stops does about unfinished work; default
    /// [`AtShutdown::Finish`].
    pub at_shutdown: AtShutdown,
}

crate::setters!(ThreadPoolSettings {
    max_threads: usize,
    max_queued: usize,
    idle_timeout: Duration,
    at_shutdown: AtShutdown,
});

impl Default for ThreadPoolSettings {
    fn default() -> Self {
        Self {
            max_threads: MAX_THREADS,
            max_queued: MAX_QUEUED,
            idle_timeout: IDLE_TIMEOUT,
            at_shutdown: AtShutdown::Finish,
        }
    }
}

/// What a reactor that stops does about unfinished work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum AtShutdown {
    /// It waits until all work is done. Work that never ends holds the shutdown for
    /// ever; [`Reactor::crash`] is the way out.
    Finish,
    /// It waits for nothing. Work that has not begun never begins. Work that runs ends
    /// by itself at some time. The callers of both are told
    /// [`ThreadCallError::Stopped`]. For work without lasting effect, such as a lookup.
    Abandon,
}

/// How busy a [`ThreadPool`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ThreadPoolCounts {
    /// How many threads there are.
    pub threads: usize,
    /// How many of them have nothing to do.
    pub idle: usize,
    /// How many calls wait for a thread.
    pub queued: usize,
}

/// The name of a call that was given to a thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ThreadCall {
    id: u64,
}

/// Why a call in a thread has no result.
#[derive(Debug)]
#[non_exhaustive]
pub enum ThreadCallError {
    /// It panicked.
    Panicked(Panic),
    /// The queue is full. The work was not begun.
    QueueFull,
    /// The system gave us no thread, and the pool has none. The work was not begun.
    NoThread(io::Error),
    /// The reactor stopped. The work was not begun, or not waited for.
    Stopped,
    /// This process was forked meanwhile ([`Reactor::after_fork`]). The work is the
    /// parent's.
    Forked,
    /// The pool belongs to another reactor. The work was not begun.
    OtherReactor,
}

impl fmt::Display for ThreadCallError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Panicked(panic) => write!(f, "call in a thread panicked: {}", panic.message()),
            Self::QueueFull => f.write_str("too many calls wait for a thread"),
            Self::NoThread(error) => write!(f, "cannot start a thread: {error}"),
            Self::Stopped => f.write_str("reactor stopped before the call in a thread was done"),
            Self::Forked => f.write_str("call in a thread of the process that was forked"),
            Self::OtherReactor => f.write_str("thread pool belongs to another reactor"),
        }
    }
}

impl Error for ThreadCallError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::NoThread(error) => Some(error),
            Self::Panicked(_)
            | Self::QueueFull
            | Self::Stopped
            | Self::Forked
            | Self::OtherReactor => None,
        }
    }
}

impl Reactor {
    /// Runs `work` in a thread of this reactor's [pool](Self::thread_pool). Then runs
    /// `done` with the result in the reactor's thread, like any other callback.
    ///
    /// `done` is called exactly once, and never before this method returns. It is not
    /// called if the call is [cancelled](ThreadCall::cancel), or if the reactor is
    /// dropped or crashes first. It need not be `Send`, since it never leaves this
    /// thread. Work begins in the order it was given, even before the reactor runs.
    /// (Twisted: `deferToThread`.)
    ///
    /// # Examples
    ///
    /// ```
    /// use bowline::Reactor;
    ///
    /// let mut reactor = Reactor::new()?;
    /// reactor.call_in_thread(
    ///     || std::fs::read_to_string("/proc/self/comm"),
    ///     |reactor, name| {
    ///         println!("{:?}", name.expect("it does not panic"));
    ///         reactor.stop().expect("it runs: this is one of its callbacks");
    ///     },
    /// );
    /// reactor.run()?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn call_in_thread<R: Send + 'static>(
        &mut self,
        work: impl FnOnce() -> R + Send + 'static,
        done: impl FnOnce(&mut Self, Result<R, ThreadCallError>) + 'static,
    ) -> ThreadCall {
        let pool = self.thread_pool();
        pool.call_in_thread(self, work, done)
    }

    /// The pool of [`call_in_thread`](Self::call_in_thread). (Twisted:
    /// `getThreadPool`.)
    pub fn thread_pool(&mut self) -> ThreadPool {
        struct Own(ThreadPool);
        let own = self.extension(|| Own(ThreadPool::new(ThreadPoolSettings::default())));
        own.0.clone()
    }
}

impl ThreadPool {
    /// A pool, with no thread yet.
    pub fn new(settings: ThreadPoolSettings) -> Self {
        Self {
            local: Rc::new(Local {
                process: Cell::new(sys::generation()),
                shared: RefCell::new(Shared::new(settings)),
                reactor: Cell::new(None),
                unfinished: Cell::new(0),
                hold: Cell::new(None),
                is_awaiting_shutdown: Cell::new(false),
            }),
        }
    }

    /// As [`Reactor::call_in_thread`], in this pool. The pool belongs to the reactor
    /// that it was first used with. With another one, `done` is told
    /// [`ThreadCallError::OtherReactor`].
    pub fn call_in_thread<R: Send + 'static>(
        &self,
        reactor: &mut Reactor,
        work: impl FnOnce() -> R + Send + 'static,
        done: impl FnOnce(&mut Reactor, Result<R, ThreadCallError>) + 'static,
    ) -> ThreadCall {
        let (sender, receiver) = mpsc::channel::<Result<R, Panic>>();
        let tell = move |reactor: &mut Reactor, refused: Option<ThreadCallError>| {
            let result = match (refused, receiver.try_recv()) {
                (Some(error), _) => Err(error),
                (None, Ok(result)) => result.map_err(ThreadCallError::Panicked),
                // Its sender is gone, or is still at work.
                (None, Err(_)) => Err(ThreadCallError::Stopped),
            };
            done(reactor, result);
        };
        let calls = Calls::of(reactor);
        let id = calls.add(self, Box::new(tell));
        let remote = reactor.remote();
        let run = move || {
            let result = catch_panic(work);
            // Fails if nobody wants to know any more; what it brought is dropped
            // here then, as is everything if the reactor is gone.
            let _ = sender.send(result);
            let _ = remote.call_from_thread(move |reactor| Calls::finished(reactor, id));
        };
        let job = ThreadJob {
            id,
            run: Box::new(run),
        };
        if let Err(error) = self.submit(reactor, job) {
            self.call_ended();
            reactor.defer(move |reactor| Calls::tell(reactor, id, Some(error)));
        }
        ThreadCall { id }
    }

    /// Changes the settings from now on. If the limit is lower, surplus threads end
    /// when they have finished what they do.
    pub fn set_settings(&self, settings: ThreadPoolSettings) {
        let shared = self.local.shared();
        shared.queue().settings = settings;
        shared.changed.notify_all();
    }

    /// The settings in force.
    pub fn settings(&self) -> ThreadPoolSettings {
        self.local.shared().queue().settings.clone()
    }

    /// How busy the pool is at this moment.
    pub fn counts(&self) -> ThreadPoolCounts {
        let shared = self.local.shared();
        let queue = shared.queue();
        ThreadPoolCounts {
            threads: queue.alive,
            idle: queue.idle,
            queued: queue.jobs.len(),
        }
    }

    fn submit(&self, reactor: &mut Reactor, job: ThreadJob) -> Result<(), ThreadCallError> {
        let local = &self.local;
        local.unfinished.set(local.unfinished.get() + 1);
        let number = reactor.number();
        if local.reactor.get().is_some_and(|owner| owner != number) {
            return Err(ThreadCallError::OtherReactor);
        }
        local.reactor.set(Some(number));
        let shared = local.shared();
        let mut queue = shared.queue();
        if queue.is_closed && reactor.is_stopping() {
            return Err(ThreadCallError::Stopped);
        }
        queue.is_closed = false;
        let free = queue.settings.max_threads.max(1).saturating_sub(queue.busy);
        if queue.jobs.len() >= queue.settings.max_queued.saturating_add(free) {
            return Err(ThreadCallError::QueueFull);
        }
        // Those that are idle have a job each already, as far as they reach.
        if queue.jobs.len() >= queue.idle
            && queue.alive < queue.settings.max_threads.max(1)
            && let Err(error) = queue.start_thread(&shared)
            && queue.alive == 0
        {
            return Err(ThreadCallError::NoThread(error));
        }
        queue.jobs.push_back(job);
        let finishes = queue.settings.at_shutdown == AtShutdown::Finish;
        drop(queue);
        shared.changed.notify_one();
        if finishes && local.unfinished.get() == 1 {
            local.hold.set(Some(reactor.hold(SystemEvent::Shutdown)));
        }
        if !local.is_awaiting_shutdown.replace(true) {
            let local = Rc::downgrade(local);
            reactor.add_trigger(Phase::During, SystemEvent::Shutdown, move |reactor| {
                if let Some(local) = local.upgrade() {
                    Self { local }.stop(reactor);
                }
            });
        }
        Ok(())
    }

    /// Ends all threads, and tells of what is not done.
    fn stop(&self, reactor: &mut Reactor) {
        self.local.is_awaiting_shutdown.set(false);
        let shared = self.local.shared();
        let mut queue = shared.queue();
        queue.is_closed = true;
        let threads = mem::take(&mut queue.threads);
        let finishes = queue.settings.at_shutdown == AtShutdown::Finish;
        let dropped = if finishes {
            VecDeque::new()
        } else {
            mem::take(&mut queue.jobs)
        };
        drop(queue);
        shared.changed.notify_all();
        drop(dropped);
        if finishes {
            for thread in threads {
                thread.join();
            }
        }
        for id in Calls::of(reactor).of_pool(self) {
            // Each in a trigger of its own, for the case that it panics.
            reactor.add_trigger(Phase::During, SystemEvent::Shutdown, move |reactor| {
                Calls::finished(reactor, id);
            });
        }
    }

    fn call_ended(&self) {
        let left = self.local.unfinished.get().saturating_sub(1);
        self.local.unfinished.set(left);
        if left == 0 {
            self.local.hold.set(None);
        }
    }
}

impl ThreadCall {
    /// Cancels the call: `done` is not called, and work that has not begun never
    /// begins. Work that runs goes on, and its result is dropped. Returns whether this
    /// was in time.
    pub fn cancel(self, reactor: &mut Reactor) -> bool {
        Calls::of(reactor).cancel(self.id)
    }
}

/// The pool's part in the reactor's thread.
struct Local {
    /// The [process](sys::generation) that has the threads.
    process: Cell<u32>,
    shared: RefCell<Arc<Shared>>,
    /// The [number](Reactor::number) of the reactor that it was first used with.
    reactor: Cell<Option<u32>>,
    /// What was submitted and has not come back, cancelled calls included.
    unfinished: Cell<usize>,
    /// Keeps the reactor turning while there is any.
    hold: Cell<Option<Hold>>,
    /// Whether the trigger that stops it is there.
    is_awaiting_shutdown: Cell<bool>,
}

impl Local {
    /// What the threads of this process have: in a forked child there are none yet.
    fn shared(&self) -> Arc<Shared> {
        let process = sys::known_generation();
        if self.process.get() != process {
            let (settings, jobs) = self.shared.borrow().leave();
            self.process.set(process);
            // A thread that is not there is not to be joined or detached either.
            mem::forget(self.shared.replace(Shared::new(settings)));
            drop(jobs);
        }
        Arc::clone(&self.shared.borrow())
    }
}

impl Drop for Local {
    fn drop(&mut self) {
        let shared = self.shared();
        let mut queue = shared.queue();
        queue.is_closed = true;
        let dropped = mem::take(&mut queue.jobs);
        drop(queue);
        shared.changed.notify_all();
        // What they own is dropped outside the lock.
        drop(dropped);
    }
}

/// The part that threads have too.
struct Shared {
    queue: Mutex<WorkQueue>,
    /// Work has come, or the pool has closed or changed.
    changed: Condvar,
}

struct WorkQueue {
    settings: ThreadPoolSettings,
    jobs: VecDeque<ThreadJob>,
    threads: Vec<Thread>,
    alive: usize,
    idle: usize,
    /// How many threads do a job just now.
    busy: usize,
    is_closed: bool,
}

struct ThreadJob {
    id: u64,
    run: Box<dyn FnOnce() + Send>,
}

impl WorkQueue {
    fn start_thread(&mut self, shared: &Arc<Shared>) -> io::Result<()> {
        self.threads.retain(|thread| !thread.is_finished());
        let shared = Arc::clone(shared);
        let thread = sys::start_thread("bowline-pool", None, move || shared.work())?;
        self.threads.push(thread);
        self.alive += 1;
        Ok(())
    }
}

impl Shared {
    fn new(settings: ThreadPoolSettings) -> Arc<Self> {
        Arc::new(Self {
            queue: Mutex::new(WorkQueue {
                settings,
                jobs: VecDeque::new(),
                threads: Vec::new(),
                alive: 0,
                idle: 0,
                busy: 0,
                is_closed: false,
            }),
            changed: Condvar::new(),
        })
    }

    /// How it worked in the process that this one was forked from, and what waited
    /// there. A thread may have had the lock, which nobody gives back here.
    fn leave(&self) -> (ThreadPoolSettings, VecDeque<ThreadJob>) {
        match self.queue.try_lock() {
            Ok(mut queue) => (queue.settings.clone(), mem::take(&mut queue.jobs)),
            Err(_) => (ThreadPoolSettings::default(), VecDeque::new()),
        }
    }

    /// What a thread does.
    fn work(&self) {
        let mut queue = self.queue();
        loop {
            if queue.alive > queue.settings.max_threads.max(1) {
                break;
            }
            if let Some(job) = queue.jobs.pop_front() {
                queue.busy += 1;
                drop(queue);
                // The work's own panic is its result. What is caught here is one
                // of what it leaves behind.
                if catch_panic(job.run).is_err() {
                    log::error!(target: log::REACTOR, "what a thread left behind panicked");
                }
                queue = self.queue();
                queue.busy -= 1;
                continue;
            }
            if queue.is_closed {
                break;
            }
            queue.idle += 1;
            let idle_timeout = queue.settings.idle_timeout;
            let (guard, waited) = self
                .changed
                .wait_timeout(queue, idle_timeout)
                .unwrap_or_else(PoisonError::into_inner);
            queue = guard;
            queue.idle -= 1;
            if waited.timed_out() && queue.jobs.is_empty() {
                break;
            }
        }
        queue.alive -= 1;
    }

    fn queue(&self) -> MutexGuard<'_, WorkQueue> {
        // Nothing panics while the lock is held.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

type TellDone = Box<dyn FnOnce(&mut Reactor, Option<ThreadCallError>)>;

/// The calls of one reactor that are out: what has to stay in its thread.
#[derive(Default)]
struct Calls {
    waiting: RefCell<BTreeMap<u64, WaitingCall>>,
}

struct WaitingCall {
    pool: ThreadPool,
    /// None once cancelled.
    tell: Option<TellDone>,
}

impl Calls {
    fn of(reactor: &mut Reactor) -> Rc<Self> {
        reactor.extension(Self::default)
    }

    fn add(&self, pool: &ThreadPool, tell: TellDone) -> u64 {
        // Of all reactors, so that none finds the call of another.
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        let waiting = WaitingCall {
            pool: pool.clone(),
            tell: Some(tell),
        };
        self.waiting.borrow_mut().insert(id, waiting);
        id
    }

    /// A call has come back, or is not going to.
    fn finished(reactor: &mut Reactor, id: u64) {
        let calls = Self::of(reactor);
        let Some(waiting) = calls.waiting.borrow_mut().remove(&id) else {
            return;
        };
        waiting.pool.call_ended();
        if let Some(tell) = waiting.tell {
            tell(reactor, None);
        }
    }

    /// Tells why a call was refused.
    fn tell(reactor: &mut Reactor, id: u64, error: Option<ThreadCallError>) {
        let calls = Self::of(reactor);
        let waiting = calls.waiting.borrow_mut().remove(&id);
        if let Some(tell) = waiting.and_then(|waiting| waiting.tell) {
            if let Some(error) = &error {
                log::debug!(target: log::REACTOR, "{error}");
            }
            tell(reactor, error);
        }
    }

    fn cancel(&self, id: u64) -> bool {
        let mut calls = self.waiting.borrow_mut();
        let Some(waiting) = calls.get_mut(&id) else {
            return false;
        };
        let tell = waiting.tell.take();
        let pool = waiting.pool.clone();
        let shared = pool.local.shared();
        let mut queue = shared.queue();
        let place = queue.jobs.iter().position(|job| job.id == id);
        let job = place.and_then(|place| queue.jobs.remove(place));
        drop(queue);
        let is_gone = job.is_some().then(|| calls.remove(&id));
        drop(calls);
        if is_gone.is_some() {
            pool.call_ended();
        }
        let was_in_time = tell.is_some();
        // What they own is the user's, the result among it if there is one already. It
        // is dropped when nothing is borrowed, and not at the cost of whoever cancels.
        if catch_panic(move || drop((job, tell))).is_err() {
            log::error!(target: log::REACTOR, "what a cancelled call left behind panicked");
        }
        was_in_time
    }

    fn of_pool(&self, pool: &ThreadPool) -> Vec<u64> {
        let calls = self.waiting.borrow();
        let of_pool =
            |(_, waiting): &(&u64, &WaitingCall)| Rc::ptr_eq(&waiting.pool.local, &pool.local);
        calls.iter().filter(of_pool).map(|(id, _)| *id).collect()
    }
}

/// In a forked child: has all who wait for a thread be told that there is none.
pub(crate) fn forget_threads(reactor: &mut Reactor) {
    let calls = Calls::of(reactor);
    let ids: Vec<_> = calls.waiting.borrow().keys().copied().collect();
    for id in ids {
        let pool = calls.waiting.borrow().get(&id).map(|it| it.pool.clone());
        if let Some(pool) = pool {
            pool.call_ended();
        }
        let forked = Some(ThreadCallError::Forked);
        reactor.defer(move |reactor| Calls::tell(reactor, id, forked));
    }
}

impl fmt::Debug for ThreadPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ThreadPool")
            .field("counts", &self.counts())
            .finish_non_exhaustive()
    }
}
