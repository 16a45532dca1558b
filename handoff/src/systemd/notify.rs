//! `NOTIFY_SOCKET`: sends notices to the manager.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::rc::{Rc, Weak};
use std::time::{Duration, Instant};

use bowline_reactor::{
    DelayedCall, Hold, Interest, Phase, Reactor, RemoteHandle, SystemEvent, Token,
};

use super::notice::{LONGEST, Notice};
use super::queue::{MOST, Purpose, Queue};
use super::sender::{Barrier, Sender};
use super::watchdog::Dog;
use super::way::{ManagerSocket, Trouble, Way};
use crate::log;
use crate::wire::MAX_DESCRIPTORS;

/// How many notices leave in one turn, at most.
pub(super) const BUDGET: usize = 64;

/// How long a stop of the reactor waits for notices that were not sent, if the manager only
/// has no room. Usually it reads as fast as it can.
const FAREWELL: Duration = Duration::from_secs(5);

/// After this time without room, a line is logged.
const LONG: Duration = Duration::from_secs(10);

/// Sends notices to the service manager. Clones are the same notifier.
///
/// Sending never blocks. A busy manager does not read for a while, and its queue is
/// short: ten notices (`net.unix.max_dgram_qlen`), unless systemd has made it longer.
/// A notifier that is [attached](Self::attach) to a reactor keeps notices that find no
/// room. The reactor sends them when there is some, in order. A notifier that is not
/// attached refuses them with `WouldBlock`. A
/// [`Restart`](crate::restart::Restart), a [`Watchdog`](super::Watchdog) and a
/// [`barrier`](Self::barrier) attach it.
///
/// Each notice goes to whoever has the manager's address when it leaves. So a manager
/// may go and come back. While nobody has the address, notices are kept in the same
/// way, which is logged once.
///
/// After a fork, the child does not have the notices that wait, since the parent sends
/// them. The child is not the main process of the service. It sends its own notices once it
/// is attached to a reactor of its own.
///
/// At most 1,024 notices of the program are kept, with as many descriptors
/// ([`set_most_waiting`](Self::set_most_waiting)). When the reactor stops, it waits up
/// to 5 s for a manager that has no room. The log says how many notices have not left
/// by then.
///
/// An attached notifier sends `STOPPING=1` automatically when the reactor begins to
/// [stop](Reactor::stop). It does not if the program has sent it already, or if its process
/// is not the main one of the service: a successor that does not serve yet, or a
/// predecessor that has handed over.
///
/// # Examples
///
/// ```
/// use std::os::unix::net::UnixDatagram;
///
/// use bowline::handoff::systemd::{Notice, Notifier};
/// use bowline::Reactor;
///
/// let (path, mut reactor) = (std::env::temp_dir().join("notify-example"), Reactor::new()?);
/// # let _ = std::fs::remove_file(&path);
/// let manager = UnixDatagram::bind(&path)?;
/// let notifier = Notifier::connect(path.to_str().expect("text"))?;
/// notifier.attach(&mut reactor)?;
/// // More than the manager has room for.
/// for number in 0..300 {
///     notifier.send(&Notice::new().status(&number.to_string()))?;
/// }
/// notifier.send(&Notice::new().ready())?;
/// # manager.set_nonblocking(true)?;
/// # let mut last = Vec::new();
/// # while last != b"READY=1\n" {
/// #     let mut bytes = [0; 100];
/// #     reactor.turn(Some(std::time::Duration::ZERO));
/// #     while let Ok(count) = manager.recv(&mut bytes) {
/// #         last = bytes[..count].to_vec();
/// #     }
/// # }
/// # std::fs::remove_file(&path)?;
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Clone)]
pub struct Notifier {
    inner: Rc<Inner>,
}

pub(super) struct Inner {
    pub(super) way: Box<dyn Way>,
    pub(super) state: RefCell<State>,
}

pub(super) struct State {
    pub(super) queue: Queue,
    pub(super) runs_on: Option<RunsOn>,
    /// Since when the first notice waits, and for what.
    blocked: Option<(Trouble, Instant)>,
    is_long: bool,
    pub(super) watchers: Vec<Watcher>,
    next_watcher: u64,
    /// Barriers that could not be sent.
    pub(super) lost: BTreeSet<u64>,
    /// Keeps the reactor from stopping.
    pub(super) hold: Option<Hold>,
    is_main: bool,
    has_said_stopping: bool,
    dogs: Vec<Weak<Dog>>,
    /// The process that these notices belong to. A process that was forked from it has a
    /// copy of all this.
    process: u32,
}

/// Where it is attached.
pub(super) struct RunsOn {
    remote: RemoteHandle,
    pub(super) token: Token,
}

/// Waits for a notice to be sent.
pub(super) struct Watcher {
    id: u64,
    number: u64,
    then: WhenLeft,
    deadline: DelayedCall,
    /// Why it will never be sent.
    pub(super) error: Option<io::Error>,
}

pub(super) type WhenLeft = Box<dyn FnOnce(&mut Reactor, io::Result<()>)>;

impl Notifier {
    /// Makes one for the manager that the environment names (`NOTIFY_SOCKET`), if it
    /// names one.
    ///
    /// The variable stays in the environment, since a successor that is started from
    /// here needs it.
    ///
    /// # Errors
    ///
    /// As [`connect`](Self::connect).
    pub fn from_environment() -> io::Result<Option<Self>> {
        match std::env::var("NOTIFY_SOCKET") {
            Ok(address) => Self::connect(&address).map(Some),
            Err(_) => Ok(None),
        }
    }

    /// Makes one for a manager at a path, or at `@name` in the abstract namespace. The
    /// manager need not be there yet: each notice looks for it.
    ///
    /// # Errors
    ///
    /// `InvalidInput` if the address is neither. Otherwise those of socket(2).
    pub fn connect(address: &str) -> io::Result<Self> {
        Ok(Self::over(ManagerSocket::to(address)?))
    }

    pub(crate) fn over(way: impl Way) -> Self {
        let state = State {
            queue: Queue::new(MOST),
            runs_on: None,
            blocked: None,
            is_long: false,
            watchers: Vec::new(),
            next_watcher: 0,
            lost: BTreeSet::new(),
            hold: None,
            is_main: true,
            has_said_stopping: false,
            dogs: Vec::new(),
            process: std::process::id(),
        };
        let state = RefCell::new(state);
        Self {
            inner: Rc::new(Inner {
                way: Box::new(way),
                state,
            }),
        }
    }

    /// Lets `reactor` send the notices that cannot be sent at once. If the notifier is
    /// attached already, it stays where it is. The reactor releases it when the last clone
    /// is dropped and everything was sent.
    ///
    /// # Errors
    ///
    /// As [`Reactor::vacancy`].
    pub fn attach(&self, reactor: &mut Reactor) -> io::Result<()> {
        self.inner.state.borrow_mut().leave_to_parent();
        if self.inner.state.borrow().runs_on.is_some() {
            return Ok(());
        }
        let vacancy = reactor.vacancy()?;
        let token = vacancy.token();
        vacancy.install(Box::new(Sender::new(Rc::clone(&self.inner), token)));
        let remote = reactor.remote();
        self.inner.state.borrow_mut().runs_on = Some(RunsOn { remote, token });
        let inner = Rc::downgrade(&self.inner);
        reactor.add_trigger(Phase::Before, SystemEvent::Shutdown, move |reactor| {
            if let Some(inner) = inner.upgrade() {
                inner.stops(reactor);
            }
        });
        Ok(())
    }

    /// Whether it is attached to a reactor that has not ended.
    pub fn is_attached(&self) -> bool {
        self.inner.state.borrow_mut().leave_to_parent();
        self.inner.state.borrow().runs_on.is_some()
    }

    /// Sets how many notices of the program may wait, and how many descriptors they
    /// may hold. The default is 1,024 each. A notice that waits alone may have as many
    /// descriptors as a message holds.
    pub fn set_most_waiting(&self, most: usize) {
        self.inner.state.borrow_mut().queue.set_most(most);
    }

    /// How many notices wait to be sent.
    pub fn waiting(&self) -> usize {
        self.inner.state.borrow_mut().leave_to_parent();
        self.inner.state.borrow().queue.len()
    }

    /// Sends a notice, now or when there is room.
    ///
    /// # Errors
    ///
    /// `InvalidInput` if it is longer than 4,096 bytes, which systemd would drop
    /// without a word. `WouldBlock` if too many wait already. If the notifier is not
    /// attached: `WouldBlock` if the manager has no room, `NotFound` and
    /// `ConnectionRefused` if there is no manager, and others of sendmsg(2). After an
    /// error the notice was not taken.
    pub fn send(&self, notice: &Notice) -> io::Result<()> {
        self.send_with(notice, &[])
    }

    /// Sends a notice with descriptors that are to be [stored](Notice::store). They are
    /// borrowed: the manager gets copies, and a notice that has to wait keeps copies.
    ///
    /// # Errors
    ///
    /// As [`send`](Self::send). `InvalidInput` if there are more than 253 descriptors.
    /// `EMFILE` if no copy can be made.
    pub fn send_with(&self, notice: &Notice, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.submit(notice, descriptors, Purpose::Program)?;
        Ok(())
    }

    /// Calls `then` when all notices that were sent before have left for the manager's
    /// queue. It is called with `TimedOut` after `limit`, and with another error if a
    /// notice never leaves. Notices go on waiting after the limit.
    /// [Attaches](Self::attach) the notifier.
    ///
    /// `then` runs once, in a callback of the loop. To learn that the manager has read
    /// the notices, use a [`barrier`](Self::barrier).
    ///
    /// # Errors
    ///
    /// As [`attach`](Self::attach). `then` is dropped.
    pub fn when_sent(
        &self,
        reactor: &mut Reactor,
        limit: Duration,
        then: impl FnOnce(&mut Reactor, io::Result<()>) + 'static,
    ) -> io::Result<()> {
        self.attach(reactor)?;
        match self.inner.state.borrow().queue.next().checked_sub(1) {
            Some(last) if !self.has_left(last) => {}
            _ => {
                reactor.defer(|reactor| then(reactor, Ok(())));
                return Ok(());
            }
        }
        let last = self.inner.state.borrow().queue.next() - 1;
        self.watch(reactor, last, limit, Box::new(then));
        Ok(())
    }

    fn watch(&self, reactor: &mut Reactor, number: u64, limit: Duration, then: WhenLeft) {
        let mut state = self.inner.state.borrow_mut();
        let id = state.next_watcher;
        state.next_watcher += 1;
        let inner = Rc::downgrade(&self.inner);
        let deadline = reactor.call_later(limit, move |reactor| {
            if let Some(inner) = inner.upgrade() {
                inner.is_late(reactor, id);
            }
        });
        state.watchers.push(Watcher {
            id,
            number,
            then,
            deadline,
            error: None,
        });
    }

    /// Calls `then` when the manager has handled all notices that were sent before, or
    /// with `TimedOut` at the deadline. Time in which the manager has no room counts.
    /// [Attaches](Self::attach) the notifier.
    ///
    /// If you exit after a notice that matters, wait for this first: when the process
    /// is gone, the manager may not know whose notice it was. `then` runs once, in a
    /// callback of the loop. It may own a copy of the notifier.
    ///
    /// # Errors
    ///
    /// As [`attach`](Self::attach) and [`send`](Self::send), but never `WouldBlock`. Also
    /// those of pipe(2). `then` is dropped.
    pub fn barrier(
        &self,
        reactor: &mut Reactor,
        deadline: Duration,
        then: impl FnOnce(&mut Reactor, io::Result<()>) + 'static,
    ) -> io::Result<()> {
        self.attach(reactor)?;
        let (read, write) = io::pipe()?;
        let number = self.submit(&Notice::of_barrier(), &[write.as_fd()], Purpose::Limited)?;
        drop(write);
        let token = reactor.register(Interest::Readable, |_| {
            Box::new(Barrier::new(
                &self.inner,
                number,
                read.into(),
                Box::new(then),
            ))
        })?;
        reactor.notify_later(deadline, token);
        Ok(())
    }

    /// Sends a notice or keeps it. Returns its number.
    pub(super) fn submit(
        &self,
        notice: &Notice,
        descriptors: &[BorrowedFd<'_>],
        purpose: Purpose,
    ) -> io::Result<u64> {
        let text = notice.as_str();
        if text.len() > LONGEST || descriptors.len() > MAX_DESCRIPTORS {
            let text = "a notice holds 4,096 bytes and 253 descriptors";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        let inner = &self.inner;
        inner.state.borrow_mut().leave_to_parent();
        let is_attached = inner.state.borrow().runs_on.is_some();
        if !is_attached {
            // What the reactor has left behind that it was attached to goes first.
            inner.pump(usize::MAX, None);
        }
        let state = &mut *inner.state.borrow_mut();
        state.has_said_stopping |= notice.get("STOPPING") == Some("1");
        if state.queue.is_empty() {
            match inner.way.send(text.as_bytes(), descriptors) {
                Ok(()) => return Ok(state.queue.pass()),
                Err(error) if !is_attached || Trouble::of(&error).is_none() => return Err(error),
                Err(_) => {}
            }
        } else if !is_attached {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        if let Some(number) = state.queue.stands_for(purpose) {
            return Ok(number);
        }
        if !state.queue.has_room(purpose, descriptors.len()) {
            let text = "too many notices wait for the service manager";
            return Err(io::Error::new(io::ErrorKind::WouldBlock, text));
        }
        let copies = descriptors.iter().map(BorrowedFd::try_clone_to_owned);
        let copies = copies.collect::<io::Result<_>>()?;
        let number = state.queue.push(notice.clone(), copies, purpose);
        if state.queue.len() == 1 {
            state.wake();
        }
        Ok(number)
    }

    /// As [`send`](Self::send), for a notice that the program's notices do not keep out.
    pub(crate) fn tell(&self, notice: &Notice) -> io::Result<u64> {
        self.submit(notice, &[], Purpose::Limited)
    }

    /// Calls `then` when a notice was sent, like [`when_sent`](Self::when_sent); at once if
    /// it was sent already.
    pub(crate) fn when_left(
        &self,
        reactor: &mut Reactor,
        number: u64,
        limit: Duration,
        then: impl FnOnce(&mut Reactor, io::Result<()>) + 'static,
    ) {
        if self.has_left(number) {
            then(reactor, Ok(()));
        } else {
            self.watch(reactor, number, limit, Box::new(then));
        }
    }

    fn has_left(&self, number: u64) -> bool {
        self.inner.state.borrow().queue.is_behind(number)
    }

    /// Takes back a notice that was not sent. Returns whether that was possible.
    pub(crate) fn take_back(&self, number: u64) -> bool {
        self.inner.state.borrow_mut().queue.cancel(number)
    }

    // Whose process is the main one of the service.

    pub(super) fn is_main(&self) -> bool {
        let state = &mut *self.inner.state.borrow_mut();
        state.leave_to_parent();
        state.is_main
    }

    pub(super) fn add_dog(&self, dog: &Rc<Dog>) {
        let mut state = self.inner.state.borrow_mut();
        state.dogs.retain(|dog| dog.strong_count() > 0);
        state.dogs.push(Rc::downgrade(dog));
    }

    /// Notes that this process is not the main one of its service, or no longer. Its
    /// watchdog rests.
    pub(crate) fn is_not_main(&self) {
        self.inner.state.borrow_mut().is_main = false;
    }

    /// Notes that this process is now the main one of its service. What was meant for a
    /// process that it took over from is now meant for it.
    pub(crate) fn becomes_main(&self, reactor: &mut Reactor, heir_of: &[u32]) {
        let dogs: Vec<_> = {
            let mut state = self.inner.state.borrow_mut();
            state.is_main = true;
            state.dogs.iter().filter_map(Weak::upgrade).collect()
        };
        for dog in dogs {
            dog.wakes(reactor, self, heir_of);
        }
    }

    /// Returns the number of the process that was originally to be watched. A successor of
    /// this process will be watched in its place as well.
    pub(crate) fn watched(&self) -> Option<u32> {
        let state = self.inner.state.borrow();
        let mut dogs = state.dogs.iter().filter_map(Weak::upgrade);
        dogs.find_map(|dog| dog.stands_for())
    }
}

impl Drop for Notifier {
    fn drop(&mut self) {
        // Of the sender and of this one.
        if Rc::strong_count(&self.inner) == 2 {
            self.inner.state.borrow().wake();
        }
    }
}

impl fmt::Debug for Notifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Notifier")
            .field("way", &self.inner.way)
            .field("waiting", &self.waiting())
            .finish_non_exhaustive()
    }
}

impl State {
    /// Makes the sender check what there is to do.
    fn wake(&self) {
        if let Some(RunsOn { remote, token }) = &self.runs_on {
            let token = *token;
            // Where the reactor is gone the sender is, too.
            let _ = remote.call_from_thread(move |reactor| reactor.notify(token));
        }
    }
}

/// How far sending got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pumped {
    Everything,
    /// As much as it was allowed to.
    Enough,
    /// The next notice has to wait.
    Blocked(Trouble),
}

impl Inner {
    /// Sends what waits, up to `budget` notices.
    pub(super) fn pump(&self, budget: usize, now: Option<Instant>) -> Pumped {
        let state = &mut *self.state.borrow_mut();
        state.leave_to_parent();
        for _ in 0..budget {
            let Some(first) = state.queue.first() else {
                state.blocked = None;
                return Pumped::Everything;
            };
            let descriptors: Vec<_> = first.descriptors.iter().map(AsFd::as_fd).collect();
            let sent = self
                .way
                .send(first.notice.as_str().as_bytes(), &descriptors);
            let trouble = match &sent {
                Ok(()) => None,
                Err(error) => Trouble::of(error),
            };
            if let (Some(trouble), Err(error)) = (trouble, &sent) {
                state.note_trouble(trouble, error, now);
                return Pumped::Blocked(trouble);
            }
            state.blocked = None;
            let Some(gone) = state.queue.pop() else {
                continue;
            };
            if let Err(error) = sent {
                log::error!(target: log::HANDOFF, "a notice to the service manager is lost: {error}");
                if gone.notice == Notice::of_barrier() {
                    state.lost.insert(gone.number);
                }
                for watcher in &mut state.watchers {
                    if watcher.number == gone.number {
                        watcher.error = Some(io::Error::new(error.kind(), error.to_string()));
                    }
                }
            }
        }
        if state.queue.is_empty() {
            Pumped::Everything
        } else {
            Pumped::Enough
        }
    }

    /// Tells those whose notice has left, later in this turn.
    pub(super) fn settle(&self, reactor: &mut Reactor) {
        let state = &mut *self.state.borrow_mut();
        let (done, rest) = std::mem::take(&mut state.watchers)
            .into_iter()
            .partition(|watcher| state.queue.is_behind(watcher.number));
        state.watchers = rest;
        Self::tell_all(reactor, done);
    }

    pub(super) fn tell_all(reactor: &mut Reactor, watchers: Vec<Watcher>) {
        for watcher in watchers {
            // It may be what runs.
            let _ = watcher.deadline.cancel(reactor);
            let result = watcher.error.map_or(Ok(()), Err);
            let then = watcher.then;
            reactor.defer(|reactor| then(reactor, result));
        }
    }

    fn is_late(&self, reactor: &mut Reactor, id: u64) {
        // If it was late for want of turns, there is room by now.
        self.pump(BUDGET, Some(reactor.now()));
        self.settle(reactor);
        let late = {
            let watchers = &mut self.state.borrow_mut().watchers;
            let place = watchers.iter().position(|watcher| watcher.id == id);
            place.map(|place| watchers.remove(place))
        };
        if let Some(late) = late {
            (late.then)(reactor, Err(io::ErrorKind::TimedOut.into()));
        }
    }

    /// Handles a stop of the reactor.
    fn stops(self: &Rc<Self>, reactor: &mut Reactor) {
        let says_so = {
            let state = &mut *self.state.borrow_mut();
            state.leave_to_parent();
            state.is_main && !state.has_said_stopping && state.runs_on.is_some()
        };
        let notifier = Notifier {
            inner: Rc::clone(self),
        };
        if says_so && let Err(error) = notifier.tell(&Notice::new().stopping()) {
            log::warn!(target: log::HANDOFF, "the service manager was not told of the end: {error}");
        }
        if let Pumped::Blocked(Trouble::Full) = self.pump(usize::MAX, Some(reactor.now())) {
            self.state.borrow_mut().hold = Some(reactor.hold(SystemEvent::Shutdown));
            let inner = Rc::downgrade(self);
            reactor.call_later(FAREWELL, move |_| {
                if let Some(inner) = inner.upgrade() {
                    inner.state.borrow_mut().hold = None;
                }
            });
        }
    }
}

impl State {
    /// Used in a process that was forked. The notices that wait are the parent's to send,
    /// and the parent is the main process.
    fn leave_to_parent(&mut self) {
        let process = std::process::id();
        let parent = std::mem::replace(&mut self.process, process);
        if parent == process {
            return;
        }
        let count = self.queue.clear();
        log::debug!(target: log::HANDOFF, "{count} notices are left to process {parent}");
        // What it was attached to is the parent's, unless that was made this process's own,
        // which lets go of the sender.
        self.runs_on = None;
        self.hold = None;
        self.blocked = None;
        self.is_main = false;
    }

    fn note_trouble(&mut self, trouble: Trouble, error: &io::Error, now: Option<Instant>) {
        let Some(now) = now else { return };
        let since = match self.blocked {
            Some((of_old, since)) if of_old == trouble => since,
            _ => {
                self.is_long = false;
                if trouble == Trouble::Nobody {
                    log::warn!(
                        target: log::HANDOFF,
                        "the service manager cannot be reached, and {} notices wait: {error}",
                        self.queue.len()
                    );
                }
                now
            }
        };
        self.blocked = Some((trouble, since));
        if now.saturating_duration_since(since) >= LONG
            && !std::mem::replace(&mut self.is_long, true)
        {
            log::warn!(
                target: log::HANDOFF,
                "the service manager takes no notices, and {} wait: {error}",
                self.queue.len()
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_that_are_neither_path_nor_name_are_refused() {
        for address in ["", "vsock:2:1234", "relative/path"] {
            let error = Notifier::connect(address).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{address}");
        }
    }
}
