//! Shows the inside of a running reactor.
//!
//! One thread owns everything, so everything can be shown as it is at one moment:
//! connections with their buffers, listeners, children, timers, how long callbacks take,
//! and where time goes. An [`Inspector`] shows it on a UNIX socket, as lines of JSON, and
//! on a page for a browser, which also has the metrics for Prometheus. The command
//! `bowline-top` shows what the socket says in a terminal, like `top`.
//!
//! Nothing that was sent or received is shown, only how much of it. An operator can ask for
//! [the log of one connection](Operation::LogTraffic), for a minute.
//!
//! # Examples
//!
//! ```
//! use bowline::inspect::Inspector;
//! use bowline::Reactor;
//!
//! let mut reactor = Reactor::new()?;
//! let path = std::env::temp_dir().join(format!("inspect-{}", std::process::id()));
//! Inspector::on_socket(&mut reactor, &path)?;
//! let page = Inspector::on_address(&mut reactor, ([127, 0, 0, 1], 0).into())?;
//! println!("look at {}", page.url());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # The socket
//!
//! Its mode is 0600, and it serves processes of the program's own user and of root. A
//! request is one line, a JSON object with one member:
//!
//! | request | answer |
//! |---|---|
//! | `{"get":"summary"}` | one line: the counts of the reactor, and its [parts](bowline_reactor::Reactor::parts) |
//! | `{"get":"descriptors"}` | one line for each, then a line with `end` |
//! | `{"get":"turns"}` | one line: the last 128 turns with their phases |
//! | `{"close":TOKEN}`, `{"abort":TOKEN}` | one line with `done` or `error` |
//! | `{"pause":TOKEN}`, `{"resume":TOKEN}` | the same; of listeners |
//! | `{"log":TOKEN}` | the same; logs the traffic of a connection for a minute |
//!
//! A list of descriptors is made in portions of 256, one in each turn, so that no turn is
//! long. It contains the descriptors that were registered when it was requested. Each line
//! says at which turn it was made. A connection names the listener that has accepted it.
//!
//! The last line adds up the connections of each listener (`listeners`), and the channels
//! of each pool to its workers (`pools`): how many are open, by state; bytes, descriptors
//! and messages in and out, also of those that have ended; what waits to be sent; and how
//! many are paused, by whom: by the protocol, by a policy or a layer, or, of producers, by
//! the peer, which does not read.

#![forbid(unsafe_code)]
#![cfg_attr(not(test), warn(clippy::unwrap_used))]

mod http;
mod inspector;
mod json;
mod log;
mod metrics;
mod socket;
mod survey;
mod totals;

pub use crate::http::{Browser, Browsers};
pub use crate::inspector::{InspectError, Inspector, Page};
pub use crate::socket::{Operator, Operators};
pub use bowline_reactor::{
    Budget, CallbackKind, Histogram, Measurements, SlowCallback, SlowLimits, SlowTurn, TurnRecord,
    TurnTimes,
};
pub use bowline_transport::{KindCounts, OperateError, Operation, Tally};
