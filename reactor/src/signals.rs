//! Signals as callbacks; feature `signals`.

use std::any::Any;
use std::borrow::Cow;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use signal_hook::SigId;
use signal_hook::consts::{SIGINT, SIGTERM};

use crate::description::Description;
use crate::descriptor::{Descriptor, Interest, Next, Readiness};
use crate::log;
use crate::reactor::{GracefulStop, Reactor};
use crate::token::Token;

/// The name of an installed signal handler, for
/// [`Reactor::remove_signal_handler`].
///
/// Feature `signals`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SignalHandler {
    token: Token,
}

impl Reactor {
    /// Calls `handler` when one of `signals` arrives, with the signal's number.
    /// [`signal`](crate::signal) has the numbers by name. The handler runs in the reactor's thread,
    /// like any other callback. Feature `signals`.
    ///
    /// Signals that arrive faster than the loop turns are merged, as the kernel does.
    /// The handlers are process-wide: several reactors, and other users of
    /// `signal-hook`, each get the signal. A handler is removed at the latest when its
    /// reactor stops or is dropped. When the last handler of a signal is removed, the
    /// signal has its default effect again.
    ///
    /// # Errors
    ///
    /// `EINVAL` for a signal that cannot be caught; those of socketpair(2).
    ///
    /// # Panics
    ///
    /// For SIGKILL, SIGSTOP, SIGILL, SIGFPE and SIGSEGV: `signal-hook` refuses them.
    pub fn on_signals(
        &mut self,
        signals: &[i32],
        handler: impl FnMut(&mut Self, i32) + 'static,
    ) -> io::Result<SignalHandler> {
        let (pipe, write_end) = UnixStream::pair()?;
        pipe.set_nonblocking(true)?;
        let mut installed = Installed {
            ids: Vec::new(),
            claimed: Vec::new(),
        };
        let mut arrived = Vec::new();
        for &signal in signals {
            let flag = Arc::new(AtomicBool::new(false));
            claim(signal)?;
            installed.claimed.push(signal);
            // In this order within the handler: the flag stands before the
            // byte in the pipe says that one does.
            let id = signal_hook::flag::register(signal, Arc::clone(&flag))?;
            installed.ids.push(id);
            let id = signal_hook::low_level::pipe::register(signal, write_end.try_clone()?)?;
            installed.ids.push(id);
            arrived.push((signal, flag));
        }
        let token = self.register(Interest::Readable, move |_| {
            Box::new(SignalPipe {
                pipe,
                arrived,
                handler: Box::new(handler),
                _installed: installed,
            })
        })?;
        Ok(SignalHandler { token })
    }

    /// On the first SIGINT or SIGTERM, stops the reactor
    /// [gracefully](Self::stop_gracefully) within 30 s. On the second, stops it
    /// [at once](Self::stop_now).
    ///
    /// # Errors
    ///
    /// Those of [`on_signals`](Self::on_signals).
    ///
    /// Feature `signals`.
    pub fn stop_on_signals(&mut self) -> io::Result<SignalHandler> {
        self.stop_on_signals_with(GracefulStop::new())
    }

    /// As [`stop_on_signals`](Self::stop_on_signals), with limits of your own.
    ///
    /// # Errors
    ///
    /// Those of [`on_signals`](Self::on_signals).
    ///
    /// Feature `signals`.
    pub fn stop_on_signals_with(&mut self, how: GracefulStop) -> io::Result<SignalHandler> {
        let mut first_came = None;
        self.on_signals(&[SIGINT, SIGTERM], move |reactor, signal| {
            let turn = reactor.statistics().turns;
            // Both signals in one turn are one wish.
            let is_second = first_came.is_some_and(|first| first != turn);
            let outcome = if reactor.is_stopping() && is_second {
                reactor.stop_now()
            } else {
                first_came = Some(turn);
                reactor.stop_gracefully(how)
            };
            if let Err(error) = outcome {
                log::debug!(target: log::REACTOR, "signal {signal}: {error}");
            }
        })
    }

    /// Removes a signal handler, later in this turn. A signal that has no other
    /// handler has its default effect again.
    ///
    /// Feature `signals`.
    pub fn remove_signal_handler(&mut self, handler: SignalHandler) {
        self.remove(handler.token);
    }
}

type Handler = Box<dyn FnMut(&mut Reactor, i32)>;

struct SignalPipe {
    pipe: UnixStream,
    arrived: Vec<(i32, Arc<AtomicBool>)>,
    handler: Handler,
    _installed: Installed,
}

/// What `signal-hook` runs for us; undone on drop.
struct Installed {
    ids: Vec<SigId>,
    claimed: Vec<i32>,
}

impl Drop for Installed {
    fn drop(&mut self) {
        for id in self.ids.drain(..) {
            signal_hook::low_level::unregister(id);
        }
        let mut effects = default_effects();
        for signal in self.claimed.drain(..) {
            if let Some(effect) = effects.iter_mut().find(|effect| effect.signal == signal) {
                effect.handlers -= 1;
                effect.is_on.store(effect.handlers == 0, Ordering::SeqCst);
            }
        }
    }
}

/// The default effect of a signal that we have handled at some time.
///
/// `signal-hook` never takes its own handler out of the kernel, so the effect
/// is emulated by an action of that handler. There is one for each signal and
/// process: it must know of all handlers, those installed after it included.
struct DefaultEffect {
    signal: i32,
    handlers: usize,
    /// Invariant: while `handlers` is zero.
    is_on: Arc<AtomicBool>,
}

static DEFAULT_EFFECTS: Mutex<Vec<DefaultEffect>> = Mutex::new(Vec::new());

fn default_effects() -> MutexGuard<'static, Vec<DefaultEffect>> {
    // What may panic under the lock does so before anything is changed.
    DEFAULT_EFFECTS
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
}

/// Counts one more handler of `signal`.
fn claim(signal: i32) -> io::Result<()> {
    let mut effects = default_effects();
    if let Some(effect) = effects.iter_mut().find(|effect| effect.signal == signal) {
        effect.handlers += 1;
        effect.is_on.store(false, Ordering::SeqCst);
        return Ok(());
    }
    let is_on = Arc::new(AtomicBool::new(false));
    signal_hook::flag::register_conditional_default(signal, Arc::clone(&is_on))?;
    effects.push(DefaultEffect {
        signal,
        handlers: 1,
        is_on,
    });
    Ok(())
}

impl Descriptor for SignalPipe {
    fn ready(&mut self, reactor: &mut Reactor, _: Readiness) -> Next {
        let mut bytes = [0; 64];
        loop {
            match self.pipe.read(&mut bytes) {
                Ok(0) => break,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => {
                    // The flags say which signals came; the pipe only wakes us.
                    log::error!(target: log::REACTOR, "cannot read the signal pipe: {error}");
                    break;
                }
            }
        }
        for (signal, flag) in &self.arrived {
            if flag.swap(false, Ordering::SeqCst) {
                log::debug!(target: log::REACTOR, "received signal {signal}");
                (self.handler)(reactor, *signal);
            }
        }
        Next::Keep
    }

    fn panicked(&mut self, _: &mut Reactor, _: crate::Panic) -> Next {
        // A handler that failed once is still the way to stop the program. The
        // flags of signals not handled yet stand, so look again.
        Next::Again
    }

    fn source(&self) -> Option<BorrowedFd<'_>> {
        Some(self.pipe.as_fd())
    }

    fn facet(&mut self) -> &mut dyn Any {
        &mut self.arrived
    }

    fn describe(&self, description: &mut Description) {
        let numbers = self.arrived.iter().map(|(signal, _)| signal.to_string());
        let numbers = numbers.collect::<Vec<_>>().join(" ");
        description.section("signals").set("numbers", numbers);
    }

    fn log_prefix(&self) -> Cow<'_, str> {
        Cow::Borrowed("signals")
    }
}
