//! One turn of the loop: its phases, and what they are made of.

use std::cell::RefCell;
use std::cmp::Reverse;
use std::collections::BTreeSet;
use std::io;
use std::mem;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::thread;
use std::time::{Duration, Instant};

use mio::unix::SourceFd;

use super::{Alarm, Deferred, Reactor, State};
use crate::clock::Sleep;
use crate::delayed_call::DelayedCall;
use crate::descriptor::{Descriptor, Interest, Next, Readiness};
use crate::log;
use crate::meter::{Budget, CallbackKind, Ran, phase};
use crate::panic::{Contained, Panic, catch_panic};
use crate::slots::Slot;
use crate::sys::TimerFd;
use crate::token::Token;
use crate::triggers::{Phase, SystemEvent};

/// How long a turn waits whose poll failed; a hundred log lines a second tell
/// enough.
const POLL_RETRY: Duration = Duration::from_millis(10);

/// A turn whose delayed calls are so much overdue has begun late. A loop with much
/// to do takes some milliseconds for a turn; a time limit below this is none for
/// peers.
const LATE: Duration = Duration::from_millis(50);

/// For how many turns what is overdue waits at the most for what is ready, besides
/// one for each batch of events that there can be: enough for a socket whose
/// buffer holds some megabytes, and a fraction of a second where all do.
const CATCH_UP_TURNS: usize = 64;

/// How often a descriptor is told that it panicked which panics when it is told:
/// once for what happened, once for its last callback, and one to spare.
const TOLD_OF_PANICS: u32 = 3;

thread_local! {
    /// The [numbers](Reactor::number) of reactors that were replaced in a callback, and
    /// have not been turned since.
    static INTERRUPTED: RefCell<BTreeSet<u32>> = const { RefCell::new(BTreeSet::new()) };
}

/// A turn under way. Unwinding ends it too: nothing of a callback gets here, but
/// a clock may panic, or what a simulated process dies of may pass.
pub(super) struct Turning<'a> {
    pub(super) reactor: &'a mut Reactor,
    number: u32,
}

impl<'a> Turning<'a> {
    pub(super) fn begin(reactor: &'a mut Reactor) -> Self {
        reactor.is_turning = true;
        Self {
            number: reactor.number(),
            reactor,
        }
    }

    pub(super) fn end(self) {
        self.reactor.is_turning = false;
        if self.reactor.number() != self.number {
            replaced(self.number);
        }
        mem::forget(self);
    }
}

impl Drop for Turning<'_> {
    #[cold]
    fn drop(&mut self) {
        self.reactor.is_turning = false;
        if self.reactor.events.capacity() == 0 {
            self.reactor.make_room_for_events();
        }
        if self.reactor.number() != self.number {
            replaced(self.number);
        }
    }
}

#[cold]
fn replaced(number: u32) {
    log::error!(target: log::REACTOR, "the reactor was replaced by another inside of a callback");
    INTERRUPTED.with_borrow_mut(|it| it.insert(number));
}

impl Reactor {
    // The phases of a turn.

    pub(super) fn turn_once(&mut self, timeout: Option<Duration>) {
        self.statistics.turns += 1;
        let capacity = self.limits.events;
        let mut events = mem::replace(&mut self.events, mio::Events::with_capacity(0));
        self.poll_phase(&mut events, timeout);
        self.meter_turn();
        self.expire_timers();
        self.calls_phase();
        self.meter_phase(phase::CALLS);
        self.ready_phase(&events);
        self.meter_phase(phase::READY);
        let mut notices = 0..self.limits.notifications.max(1);
        self.notifications_phase(&mut notices);
        self.meter_phase(phase::NOTIFICATIONS);
        // Only now, since what was ready may have been what a deadline is for.
        if self.timers.has_due() {
            self.due_phase(&events, &mut notices);
        } else {
            self.held_back = 0;
        }
        self.meter_phase(phase::TIMERS);
        self.note_spent(&events);
        if self.limits.events == capacity {
            self.events = events;
        }
        self.slots.recycle();
        self.system_events_phase();
        self.meter_turned();
    }

    /// Takes note of what waits for the next turn, since a budget is spent.
    fn note_spent(&mut self, events: &mio::Events) {
        if cfg!(not(feature = "inspect")) {
            return;
        }
        let most = self.limits.events.max(1);
        if events.iter().count() >= most {
            self.meter_spent(Budget::Events);
        }
        if !self.remote_calls.is_empty() || self.soon.len() > self.limits.calls {
            self.meter_spent(Budget::Calls);
        }
        if !self.deferred.is_empty() {
            self.meter_spent(Budget::Notifications);
        }
    }

    fn poll_phase(&mut self, events: &mut mio::Events, timeout: Option<Duration>) {
        let timeout = self.poll_timeout(timeout);
        if let Err(error) = self.poll.poll(events, timeout) {
            events.clear();
            if error.kind() != io::ErrorKind::Interrupted {
                Self::poll_failed(&error, timeout);
            }
        }
        self.now.set(None);
    }

    /// Waits a little in place of the poll, so that a loop whose poller is broken,
    /// by a program that closed its descriptor say, neither spins nor loses its
    /// timers.
    #[cold]
    fn poll_failed(error: &io::Error, timeout: Option<Duration>) {
        log::error!(target: log::REACTOR, "cannot poll: {error}");
        thread::sleep(timeout.map_or(POLL_RETRY, |timeout| timeout.min(POLL_RETRY)));
    }

    fn calls_phase(&mut self) {
        if self.remote_calls.is_empty() && self.remote.is_waiting() {
            let mut calls = Vec::new();
            self.remote.drain(&mut calls);
            self.remote_calls.extend(calls);
        }
        // What the calls add waits for the next turn: the counts are taken
        // first.
        let budget = self.limits.calls.max(1);
        let mut remote_calls = 0..self.remote_calls.len().min(budget);
        let mut soon = 0..self.soon.len().min(budget);
        self.guarded(|reactor| {
            reactor.current = Token::WAKER;
            for _ in &mut remote_calls {
                if let Some(call) = reactor.remote_calls.pop_front() {
                    call(reactor);
                    reactor.meter_ran(Ran::of(CallbackKind::Remote));
                }
            }
            for _ in &mut soon {
                if let Some(call) = reactor.soon.pop_front() {
                    let ran = Ran::named(CallbackKind::Soon, call.name());
                    call.run(reactor, ());
                    reactor.meter_ran(ran);
                }
            }
        });
    }

    /// Settles which delayed calls are due in this turn: what callbacks schedule
    /// from now on waits for the next one, however short its delay.
    fn expire_timers(&mut self) {
        if !self.timers.is_empty() {
            self.timers.expire(self.moment());
        }
    }

    /// Runs what is due, and delivers what that leaves; or has it wait.
    ///
    /// A turn that begins late, because the process was stopped or a callback took
    /// long, has deadlines to run that would have been met, had the loop looked in
    /// time. What is ready is read first, by as many turns as that takes. Where it
    /// never ends, the deadlines have waited long enough after some of them.
    // Apart from the rest, which has the registers to itself where nothing is due.
    #[inline(never)]
    fn due_phase(&mut self, events: &mio::Events, notices: &mut Range<usize>) {
        // They were looked at in this turn, so it is its time.
        if !self.timers.is_overdue(self.moment.get(), LATE) {
            self.held_back = 0;
        } else if !self.has_caught_up(events) {
            self.meter_spent(Budget::Late);
            return;
        }
        self.timers_phase();
        self.notifications_phase(notices);
        if self.timers.has_due() && self.held_back == 0 {
            self.meter_spent(Budget::Timers);
        }
    }

    #[cold]
    fn has_caught_up(&mut self, events: &mio::Events) -> bool {
        let most = CATCH_UP_TURNS + self.slots.len() / events.capacity().max(1);
        let is_behind = events.iter().count() >= events.capacity()
            || !self.again.is_empty()
            || !self.deferred.is_empty()
            || !self.remote_calls.is_empty()
            || self.source.has_events();
        if is_behind && self.held_back < most {
            self.held_back += 1;
            return false;
        }
        // Until the loop is in time again.
        self.held_back = usize::MAX;
        true
    }

    fn timers_phase(&mut self) {
        self.timers_ran = self.now.get();
        let mut budget = 0..self.limits.timers.max(1);
        self.guarded(|reactor| {
            for _ in &mut budget {
                let Some((key, call)) = reactor.timers.pop_due() else {
                    break;
                };
                reactor.statistics.timers += 1;
                reactor.current = Token::WAKER;
                let ran = Ran::named(CallbackKind::Timer, call.name());
                call.run(reactor, DelayedCall { key });
                reactor.meter_ran(ran);
            }
        });
    }

    // Apart from the rest, so that its loop has the registers to itself.
    #[inline(never)]
    fn ready_phase(&mut self, events: &mio::Events) {
        // What asks for another turn from now on waits for the next one.
        let again = self.again.len();
        let mut each = events.iter();
        self.guarded(|reactor| {
            for event in &mut each {
                let token = Token::from_mio(event.token());
                reactor.deliver(token, || Readiness::from_mio(event));
            }
        });
        self.meter_events(events);
        if let Some(mut events) = self.source.poll() {
            self.guarded(|reactor| {
                for (token, readiness) in &mut events {
                    reactor.deliver(token, || readiness);
                    reactor.meter_ran(Ran::of(CallbackKind::Ready));
                }
            });
        }
        let mut again = 0..again;
        self.guarded(|reactor| {
            for _ in &mut again {
                if let Some(token) = reactor.again.pop_front()
                    && let Some(slot) = reactor.slots.get_mut(token)
                {
                    let readiness = slot.again.take().unwrap_or_default();
                    reactor.dispatch(token, |descriptor, reactor| {
                        descriptor.ready(reactor, readiness)
                    });
                    reactor.meter_ran(Ran::of(CallbackKind::Ready));
                }
            }
        });
    }

    /// What was reported is only asked for when the slot was found: where the registers are
    /// free for it.
    #[inline]
    fn deliver(&mut self, token: Token, readiness: impl Fn() -> Readiness) {
        if let Some(slot) = self.slots.get_mut(token)
            && let Some(latched) = &mut slot.again
        {
            // It is going to be called anyway, and no more than once: a peer
            // that sends without end would otherwise gain a call each turn.
            *latched |= readiness();
            self.statistics.events += 1;
            return;
        }
        let found = self.dispatch(token, |descriptor, reactor| {
            descriptor.ready(reactor, readiness())
        });
        if found {
            self.statistics.events += 1;
        } else {
            self.unclaimed_event(token);
        }
    }

    #[cold]
    fn unclaimed_event(&mut self, token: Token) {
        match token {
            // The calls phase looks by itself.
            Token::WAKER => {}
            Token::TIMER => {
                if let Some(alarm) = &mut self.alarm {
                    alarm.set_to = None;
                }
            }
            _ => {
                self.statistics.stale_events += 1;
                log::trace!(target: log::REACTOR, "{token}: event for a descriptor that is gone");
            }
        }
    }

    fn notifications_phase(&mut self, budget: &mut Range<usize>) {
        if self.deferred.is_empty() {
            return;
        }
        self.guarded(|reactor| {
            for _ in &mut *budget {
                let Some(deferred) = reactor.deferred.pop_front() else {
                    break;
                };
                reactor.deliver_deferred(deferred);
            }
        });
    }

    fn deliver_deferred(&mut self, deferred: Deferred) {
        match deferred {
            Deferred::Attend(token) => {
                if let Some(slot) = self.slots.get_mut(token) {
                    slot.set_queued(false);
                }
                self.dispatch(token, |descriptor, reactor| descriptor.attend(reactor));
                self.meter_ran(Ran::of(CallbackKind::Notified));
            }
            Deferred::Enter(token, entrance) => {
                let mut entrance = Some(entrance);
                let found = self.dispatch(token, |descriptor, reactor| {
                    let entrance = entrance.take().expect("dispatched once");
                    entrance(Some(descriptor), reactor)
                });
                if let Some(entrance) = entrance
                    && !found
                {
                    self.current = Token::WAKER;
                    let _: Next = entrance(None, self);
                }
                self.meter_ran(Ran::of(CallbackKind::Notified));
            }
            Deferred::Call(call) => {
                self.current = Token::WAKER;
                let ran = Ran::named(CallbackKind::Deferred, call.name());
                call.run(self, ());
                self.meter_ran(ran);
            }
            Deferred::Stray(stray) => self.end_stray(stray),
        }
    }

    pub(super) fn system_events_phase(&mut self) {
        if self.state == State::Running {
            return;
        }
        if self.state == State::Starting && !self.triggers.is_held(SystemEvent::Startup) {
            self.state = State::Running;
            self.fire(Phase::During, SystemEvent::Startup);
            if self.state != State::Idle {
                self.fire(Phase::After, SystemEvent::Startup);
            }
        }
        if self.state == State::StopAsked {
            self.state = State::Stopping;
            self.begin_draining();
        }
        if self.state == State::Stopping && !self.still_waits() {
            self.end_waiting();
            self.disconnect_all();
            self.fire(Phase::During, SystemEvent::Shutdown);
            self.fire(Phase::After, SystemEvent::Shutdown);
            self.forget_stop();
            self.state = State::Idle;
            log::debug!(target: log::REACTOR, "the loop has ended");
        }
    }

    // What the phases are made of.

    /// How long the poll may wait.
    fn poll_timeout(&mut self, asked: Option<Duration>) -> Option<Duration> {
        if asked == Some(Duration::ZERO) || !self.is_idle() {
            return Some(Duration::ZERO);
        }
        let deadline = self.timers.next_wakeup();
        if self.clock.before_sleep(deadline) == Sleep::Skip {
            return Some(Duration::ZERO);
        }
        let Some(deadline) = deadline else {
            return asked;
        };
        let deadline = self.with_slack(deadline);
        if self
            .alarm
            .as_ref()
            .is_some_and(|alarm| alarm.set_to == Some(deadline))
        {
            return asked;
        }
        let left = deadline.saturating_duration_since(self.clock.now());
        if left.is_zero() {
            return Some(Duration::ZERO);
        }
        if asked.is_some_and(|asked| asked <= left) {
            return asked;
        }
        match self.set_alarm(deadline, left) {
            Ok(()) => asked,
            Err(error) => {
                // Without a timer descriptor the poll's own timeout serves, in
                // whole milliseconds.
                log::debug!(target: log::TIMERS, "no timer descriptor: {error}");
                Some(left)
            }
        }
    }

    /// When to wake up for a call that is due at `deadline`: where calls are
    /// dense, one wake-up serves several.
    fn with_slack(&self, deadline: Instant) -> Instant {
        // One for the time of this turn or before is wanted at once.
        let is_for_now = self.now.get().is_some_and(|now| deadline <= now);
        let slack = self.limits.timer_slack;
        match self.timers_ran.and_then(|ran| ran.checked_add(slack)) {
            Some(earliest) if !is_for_now => deadline.max(earliest),
            _ => deadline,
        }
    }

    fn set_alarm(&mut self, deadline: Instant, left: Duration) -> io::Result<()> {
        let alarm = match &mut self.alarm {
            Some(alarm) => alarm,
            none => {
                let timer = TimerFd::new()?;
                self.poll.registry().register(
                    &mut SourceFd(&timer.as_fd().as_raw_fd()),
                    Token::TIMER.to_mio(),
                    mio::Interest::READABLE,
                )?;
                none.insert(Alarm {
                    timer,
                    set_to: None,
                })
            }
        };
        alarm.timer.set(left)?;
        alarm.set_to = Some(deadline);
        Ok(())
    }

    /// Calls a descriptor that is taken out of its slot meanwhile. False if
    /// there is none.
    #[inline]
    pub(super) fn dispatch(
        &mut self,
        token: Token,
        call: impl FnOnce(&mut dyn Descriptor, &mut Self) -> Next,
    ) -> bool {
        let Some(entry) = self.slots.take(token) else {
            return false;
        };
        self.current = token;
        let mut taken = Taken {
            reactor: self,
            token,
            entry: Some(entry),
        };
        let next = taken.call(call);
        drop(taken);
        if next != Next::Keep {
            self.follow(token, next);
        }
        true
    }

    /// Takes a descriptor whose callback put this reactor in the place of its own,
    /// which nothing here can reach: it is told later in this turn that it panicked.
    #[cold]
    #[inline(never)]
    pub(super) fn adopt_stray(&mut self, stray: Box<dyn Descriptor>) {
        // A panic may be on its way, and is the stray's.
        self.current = Token::WAKER;
        self.deferred.push_back(Deferred::Stray(stray));
    }

    #[cold]
    fn end_stray(&mut self, stray: Box<dyn Descriptor>) {
        self.current = Token::WAKER;
        let mut stray = Contained::new(stray);
        let panicked: Result<(), Panic> =
            catch_panic(|| panic!("the reactor was replaced inside of its callback"));
        let Err(panic) = panicked else { return };
        self.statistics.panics += 1;
        let told = catch_panic(|| match stray.panicked(self, panic) {
            Next::Remove => {}
            Next::Keep | Next::Again => stray.shutdown(self),
        });
        if let Err(panic) = told {
            self.log_panic(Token::WAKER, &panic);
        }
    }

    /// Whether a turn of this reactor runs, and a callback with it.
    ///
    /// One that was replaced in a callback has not ended its turn. It begins anew:
    /// the events of that turn are asked for again, and the descriptor whose callback
    /// it was has ended elsewhere.
    #[cold]
    pub(super) fn is_turning(&mut self) -> bool {
        if !self.is_turning || !INTERRUPTED.with_borrow_mut(|it| it.remove(&self.number())) {
            return self.is_turning;
        }
        self.is_turning = false;
        self.make_room_for_events();
        self.slots.release_empty();
        self.slots.recycle();
        for token in self.slots.tokens() {
            if let Err(error) = self.watch_anew(token, Self::rewatch) {
                log::error!(target: log::REACTOR, "{token}: cannot be watched: {error}");
            }
        }
        false
    }

    /// Has the poller report what is ready under `token`, as it did before.
    pub(super) fn watch_anew(
        &mut self,
        token: Token,
        watch: fn(&mut Self, Token, BorrowedFd<'_>, Interest) -> io::Result<()>,
    ) -> io::Result<()> {
        let Some(slot) = self.slots.get_mut(token) else {
            return Ok(());
        };
        let Some(interest) = slot.interest else {
            return Ok(());
        };
        let Some(entry) = self.slots.take(token) else {
            return Ok(());
        };
        let writing = entry.writing_source();
        let interest = match writing {
            // It was the two's together.
            Some(_) => Interest::Readable,
            None => interest,
        };
        let mut result = match entry.source() {
            Some(source) => watch(self, token, source, interest),
            None => Ok(()),
        };
        if let (Ok(()), Some(writing)) = (&result, writing) {
            result = watch(self, token, writing, Interest::Writable);
        }
        // It was there a moment ago.
        let _: Option<_> = self.slots.put(token, entry);
        result
    }

    /// Does what a descriptor wants after its callback.
    #[inline(never)]
    fn follow(&mut self, token: Token, next: Next) {
        match next {
            Next::Keep => {}
            Next::Again => self.ask_again(token),
            Next::Remove => {
                self.meter_leaves(token);
                self.discard(token);
            }
        }
    }

    /// Queues a descriptor for the next turn, once.
    fn ask_again(&mut self, token: Token) {
        if let Some(slot) = self.slots.get_mut(token)
            && slot.again.is_none()
        {
            slot.again = Some(Readiness::EMPTY);
            self.again.push_back(token);
        }
    }

    /// Deregisters and drops a descriptor.
    pub(super) fn discard(&mut self, token: Token) {
        if let Some(entry) = self.slots.release(token) {
            if let Some(source) = entry.source() {
                self.unwatch(source);
            }
            drop(entry);
        }
    }

    /// Runs a phase to its end, however many of its callbacks panic.
    ///
    /// One catch for a whole phase rather than one per callback: catching is
    /// then free for those that do not panic. A phase keeps its position
    /// outside of itself, so that it goes on where it was cut.
    pub(super) fn guarded(&mut self, mut phase: impl FnMut(&mut Self)) {
        // The state that a panic can leave behind is what callbacks may leave
        // behind anyway: `Taken` puts the descriptor back while unwinding.
        while let Err(panic) = catch_panic(|| phase(self)) {
            self.recover(panic);
        }
    }

    /// After a panic: tells the descriptor, whose end it normally is.
    ///
    /// Whatever is called for that, and whatever is dropped, may panic as well. It
    /// costs the same descriptor, and no more.
    #[cold]
    fn recover(&mut self, panic: Panic) {
        let mut token = mem::replace(&mut self.current, Token::WAKER);
        if !self.is_turning {
            // It took the place of the one whose callback it was.
            token = Token::WAKER;
        }
        let began = self.meter_panicked(token);
        self.tell_of_panic(token, panic);
        self.meter_told(token, began);
    }

    #[cold]
    fn tell_of_panic(&mut self, token: Token, mut panic: Panic) {
        for _ in 0..TOLD_OF_PANICS {
            self.statistics.panics += 1;
            self.log_panic(token, &panic);
            let told = catch_panic(|| {
                self.dispatch(token, |descriptor, reactor| {
                    descriptor.panicked(reactor, panic)
                });
            });
            match told {
                Ok(()) => return,
                Err(another) => panic = another,
            }
        }
        self.log_panic(token, &panic);
        // What panics here has left its slot.
        let dropped = catch_panic(|| self.discard(token));
        if let Err(panic) = dropped {
            self.log_panic(token, &panic);
        }
    }

    /// The name of the descriptor in the log is user code's, and so is the log.
    pub(super) fn log_panic(&mut self, token: Token, panic: &Panic) {
        let message = panic.message();
        let entry = self.slots.get_mut(token).and_then(Slot::entry_mut);
        let _ = match entry {
            Some(entry) => {
                let prefix = catch_panic(|| entry.log_prefix().into_owned());
                let prefix = prefix.unwrap_or_else(|_| "(whose log_prefix panics)".into());
                catch_panic(|| {
                    log::error!(target: log::REACTOR, "{token} {prefix}: a callback panicked: {message}");
                })
            }
            None => catch_panic(|| {
                log::error!(target: log::REACTOR, "a callback panicked: {message}");
            }),
        };
    }

    pub(super) fn fire(&mut self, phase: Phase, event: SystemEvent) {
        self.guarded(|reactor| {
            reactor.current = Token::WAKER;
            while let Some(call) = reactor.triggers.take(phase, event) {
                call.run(reactor, ());
            }
        });
        self.notify_all();
    }

    /// The notifications phase of what is no turn.
    pub(super) fn notify_all(&mut self) {
        let mut budget = 0..self.limits.notifications.max(1);
        self.notifications_phase(&mut budget);
    }

    /// Tells every descriptor that the reactor stops, and removes it. What
    /// their callbacks register meanwhile is told as well, for some rounds.
    fn disconnect_all(&mut self) {
        const ROUNDS: usize = 16;
        for _ in 0..ROUNDS {
            let mut tokens = self.slots.tokens();
            if tokens.is_empty() && self.deferred.is_empty() {
                break;
            }
            // The youngest first: what others were registered on behalf of is
            // told after them, a connector after its connection.
            tokens.sort_unstable_by_key(|token| Reverse(token.generation()));
            let mut tokens = tokens.into_iter();
            self.guarded(|reactor| {
                for token in &mut tokens {
                    reactor.dispatch(token, |descriptor, reactor| {
                        descriptor.shutdown(reactor);
                        Next::Remove
                    });
                }
            });
            self.notify_all();
            self.slots.recycle();
        }
        for token in self.slots.tokens() {
            log::warn!(target: log::REACTOR, "{token}: registered anew at every shutdown, dropped");
            self.guarded(|reactor| reactor.discard(token));
        }
        self.slots.recycle();
        self.again.clear();
    }
}

/// A descriptor out of its slot. Dropping puts it back, also when a panic
/// unwinds.
struct Taken<'a> {
    reactor: &'a mut Reactor,
    token: Token,
    entry: Option<Box<dyn Descriptor>>,
}

impl Taken<'_> {
    #[inline(always)]
    fn call(&mut self, call: impl FnOnce(&mut dyn Descriptor, &mut Reactor) -> Next) -> Next {
        match &mut self.entry {
            Some(entry) => call(&mut **entry, self.reactor),
            None => Next::Keep,
        }
    }
}

impl Drop for Taken<'_> {
    // Inlined, or the fields would have to stand in memory during the call.
    #[inline(always)]
    fn drop(&mut self) {
        if let Some(entry) = self.entry.take()
            && let Some(stray) = self.reactor.slots.put(self.token, entry)
        {
            self.reactor.adopt_stray(stray);
        }
    }
}
