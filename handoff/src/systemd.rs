//! The interfaces of systemd: sockets that it listened on for us, and telling
//! it how we are.
//!
//! Without systemd nothing happens: [`inherited`] is empty, and
//! [`Notifier::from_environment`] answers `None`. Both are protocols that
//! others speak too (`systemd-socket-activate`, s6, containers).

mod listen;
mod notify;
mod watchdog;

pub use self::listen::{ActivationError, Announced, announced, inherited};
pub use self::notify::{Notice, NoticeError, Notifier};
pub use self::watchdog::{Watchdog, watchdog_interval};
