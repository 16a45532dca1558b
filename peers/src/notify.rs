//! sd_notify(3), the notification socket of systemd: a service tells its manager its state,
//! and gives it descriptors to keep.
//!
//! Both sides are part of bowline, since its own restarts need them
//! ([`bowline::handoff::systemd`]). This page lists them together, like the other
//! protocols.
//!
//! | side | |
//! |---|---|
//! | the service | [`Notifier`] sends a [`Notice`], with descriptors to store or with a barrier. It queues while the manager has no room |
//! | the manager | [`NoticeSocket`] receives from services, and tells a [`NoticeHandler`] who they are, by credentials and pidfd. [`Notice::said`] parses what they say |
//! | the manager's store | [`DescriptorStore`] keeps the descriptors of a service, by name, as many as are allowed |
//! | the service, started again | [`announced`] and [`inherited`] take the descriptors back; [`spawn_with_listen_fds`] is the manager's part |
//! | both | a [`Watchdog`] says regularly that the service is alive |
//!
//! A message is a datagram of lines `KEY=VALUE`, of at most 4,096 bytes. It has the
//! descriptors that arrived with it, at most 253. The manager keeps those that the notice
//! says. A datagram that was truncated, or that lost descriptors, is dropped as a whole, as
//! systemd does ([`Dropped`]).
//!
//! # Examples
//!
//! A manager that keeps what its own process stores:
//!
//! ```
//! use std::os::fd::{AsFd, OwnedFd};
//!
//! use bowline::{Credentials, Reactor, Transports};
//! use bowline_peers::notify::{DescriptorStore, Notice, NoticeHandler, NoticeSocket, Notifier};
//!
//! struct Manager(DescriptorStore);
//!
//! impl NoticeHandler for Manager {
//!     fn admits(&mut self, sender: &Credentials) -> bool {
//!         sender.pid == Some(std::process::id())
//!     }
//!
//!     fn notice_received(
//!         &mut self,
//!         reactor: &mut Reactor,
//!         _: &Credentials,
//!         notice: &Notice,
//!         descriptors: Vec<OwnedFd>,
//!     ) {
//!         assert_eq!(self.0.apply(notice, descriptors).stored, 1);
//!         reactor.stop().expect("it runs");
//!     }
//! }
//!
//! let here = NoticeSocket::at(format!("@a manager, {}", std::process::id()).as_str());
//! let variable = here.environment();
//! let mut reactor = Reactor::new()?;
//! reactor.listen(here, Manager(DescriptorStore::new(16)))?;
//!
//! // In the service, which has it as NOTIFY_SOCKET.
//! let notifier = Notifier::connect(variable.to_str().expect("a name"))?;
//! let log = std::fs::File::open("/dev/null")?;
//! notifier.send_with(&Notice::new().store("log")?, &[log.as_fd()])?;
//! reactor.run()?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

#[doc(inline)]
pub use bowline::handoff::systemd::{
    ActivationError, Announced, Applied, DescriptorStore, Dropped, Notice, NoticeError,
    NoticeHandler, NoticeSocket, Notifier, NotifyAccess, Said, Watchdog, announced, inherited,
    watchdog_interval,
};
#[doc(inline)]
pub use bowline::process::spawn_with_listen_fds;
