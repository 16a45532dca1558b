//! The loop of [bowline]: registered descriptors, timers, wake-ups, shutdown.
//!
//! This crate drives things that become ready ([`Descriptor`]) and things that
//! become due ([`Reactor::call_later`]). It knows neither sockets nor
//! protocols: those are `bowline-transport` and `bowline-protocol`. Most
//! programs depend on the facade crate `bowline` and never name this one.
//!
//! # Callbacks never nest
//!
//! The reactor keeps every descriptor in a slot, and takes it out while its
//! callback runs. A callback may ask things of *another* descriptor. They
//! change that descriptor's state at once, or they are noted and delivered when
//! the running callback has returned, in the same turn. So an
//! `Rc<RefCell<State>>` that is borrowed only inside callbacks is never
//! borrowed twice. The stack does not grow with the number of callbacks.
//!
//! # Features
//!
//! - `inspect`: the loop [measures](Reactor::measurements) its callbacks and turns.
//! - `signals`: signals as callbacks, through the `signal-hook` crate.
//! - `testing`: the [manual clock](testing::ManualClock) and the seam through
//!   which a simulated kernel reports readiness.
//!
//! [bowline]: https://docs.rs/bowline

#![deny(unsafe_code)]
#![cfg_attr(not(test), warn(clippy::unwrap_used))]

#[macro_use]
mod settings;

mod clock;
mod delayed_call;
mod description;
mod descriptor;
mod error;
mod handle;
mod log;
mod meter;
mod panic;
mod periodic_call;
mod reactor;
mod readable_call;
mod remote;
#[cfg(feature = "signals")]
mod signals;
#[cfg_attr(feature = "testing", path = "testing/simulated.rs")]
mod simulated;
mod slots;
mod sys;
#[cfg(feature = "testing")]
pub mod testing;
mod thread_pool;
mod timers;
mod token;
mod triggers;

pub use crate::clock::{Clock, Sleep, SystemClock};
pub use crate::delayed_call::{DelayedCall, DelayedCallError};
pub use crate::description::{Description, Fact, Section};
pub use crate::descriptor::{Descriptor, Interest, Next, Readiness};
pub use crate::error::{ReactorError, RunError, TriggerError};
pub use crate::handle::Handle;
#[cfg(feature = "inspect")]
pub use crate::meter::{
    Budget, CallbackKind, Histogram, Measurements, SlowCallback, SlowLimits, SlowTurn, TurnRecord,
    TurnTimes,
};
pub use crate::panic::{Contained, Panic, catch_panic};
pub use crate::periodic_call::{PeriodicCall, PeriodicEnd};
pub use crate::reactor::{
    Descriptors, DrainRound, GracefulStop, Limits, Reactor, Registered, Statistics, Turn, Vacancy,
};
pub use crate::readable_call::ReadableCall;
pub use crate::remote::{RemoteError, RemoteHandle};
#[cfg(feature = "signals")]
pub use crate::signals::SignalHandler;
pub use crate::sys::signal;
#[doc(hidden)]
pub use crate::sys::{Thread, start_thread};
pub use crate::thread_pool::{
    AtShutdown, ThreadCall, ThreadCallError, ThreadPool, ThreadPoolCounts, ThreadPoolSettings,
};
pub use crate::token::Token;
pub use crate::triggers::{Hold, Phase, SystemEvent, TriggerId};

/// A number for this process that none of the processes it was forked from has. For the
/// layers above, which have threads of their own.
#[doc(hidden)]
pub fn forks() -> u32 {
    sys::generation()
}
