//! The interfaces of systemd: sockets that it listened on for us, and telling
//! it how we are.
//!
//! Without systemd nothing happens: [`inherited`] is empty, and
//! [`Notifier::from_environment`] answers `None`. Both are protocols that
//! others speak too (`systemd-socket-activate`, s6, containers).

mod environment;
mod listen;
mod notice;
mod notify;
mod queue;
mod sender;
mod watchdog;
pub(crate) mod way;

pub(crate) use self::environment::prepare_successor;
pub use self::listen::{ActivationError, Announced, announced, inherited};
pub use self::notice::{Notice, NoticeError, NotifyAccess};
pub use self::notify::Notifier;
pub use self::watchdog::{Watchdog, watchdog_interval};
