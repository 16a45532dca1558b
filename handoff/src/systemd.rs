//! The interfaces of systemd: it hands us sockets that it has listened on, and we
//! notify it of our state.
//!
//! Without systemd nothing happens. [`inherited`] is empty then, and
//! [`Notifier::from_environment`] answers `None`. Other programs speak both protocols
//! too (`systemd-socket-activate`, s6, containers).

mod environment;
mod listen;
mod notice;
mod notify;
mod queue;
mod sender;
mod watchdog;
pub(crate) mod way;

pub(crate) use self::environment::prepare_successor;
pub(crate) use self::listen::announced_here;
pub use self::listen::{ActivationError, Announced, announced, inherited};
pub use self::notice::{Notice, NoticeError, NotifyAccess};
pub use self::notify::Notifier;
pub use self::watchdog::{Watchdog, watchdog_interval};
