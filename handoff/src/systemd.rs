//! The interfaces of systemd. It passes us sockets on which it has listened, and we notify
//! it of our state. A program that manages services itself uses the other side: a
//! [`NoticeSocket`] receives their notices, and a [`DescriptorStore`] keeps the descriptors
//! that they give away.
//!
//! Without systemd nothing happens. [`inherited`] is then empty, and
//! [`Notifier::from_environment`] returns `None`. Other programs use both protocols as well
//! (`systemd-socket-activate`, s6, containers).

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
