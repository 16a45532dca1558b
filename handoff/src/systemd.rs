//! The interfaces of systemd: it hands us sockets that it has listened on, and we
//! notify it of our state. A program that manages services itself has the other side:
//! [`NoticeSocket`] hears them, and a [`DescriptorStore`] keeps what they give away.
//!
//! Without systemd nothing happens. [`inherited`] is empty then, and
//! [`Notifier::from_environment`] answers `None`. Other programs speak both protocols
//! too (`systemd-socket-activate`, s6, containers).

mod environment;
mod listen;
mod notice;
mod notify;
mod queue;
mod receiver;
mod said;
mod sender;
mod store;
mod watchdog;
pub(crate) mod way;

pub(crate) use self::environment::prepare_successor;
pub(crate) use self::listen::announced_here;
pub use self::listen::{ActivationError, Announced, announced, inherited};
pub use self::notice::{Notice, NoticeError, NotifyAccess};
pub use self::notify::Notifier;
pub use self::receiver::{Dropped, NoticeHandler, NoticeSocket};
pub use self::said::Said;
pub use self::store::{Applied, DescriptorStore};
pub use self::watchdog::{Watchdog, watchdog_interval};
