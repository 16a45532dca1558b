//! vhost-user: another process (the back-end) implements a device of a virtual machine, for
//! its monitor (the front-end). Both share the guest's memory.
//!
//! [`back_end`] is the protocol of the process that implements the device, [`front_end`]
//! that of the monitor. Either may listen. Requests are values ([`VhostUserRequest`]). Some
//! have descriptors: memory, and the eventfds with which the two sides wake each other
//! ([`EventCounter`](bowline::descriptor::EventCounter), which a [reactor
//! watches](bowline::Reactor::call_each_time_readable)).
//!
//! Rings and devices are not implemented here. The descriptors in a ring have guest
//! addresses; the addresses of the rings are those of the front-end
//! ([`MemoryRegion::guest`] and [`MemoryRegion::user`]).
//!
//! The descriptors of a message arrive with its header. The request and the payload say how
//! many there are. So they are claimed, and a read may be of any length. A descriptor that
//! no message claims is closed. A front-end is trusted with the linger setting of the
//! sockets that it passes ([`Linger::Keep`](bowline::Linger::Keep)).
//!
//! | limit | default | of |
//! |---|---|---|
//! | bytes of a payload | 4,096 | rust-vmm; the specification has none |
//! | descriptors of a message, regions of memory | 8 | the specification |
//!
//! A back-end may send requests as well, on a channel that the front-end gives it
//! ([`VhostUserRequest::SetBackendReqFd`]). [`back_end_channel`] and [`front_end_channel`]
//! are its two ends.
//!
//! Not supported: migration by postcopy, and other requests with answers of their own that
//! are not listed. A device that does not offer their features does not receive them.
//!
//! # Examples
//!
//! The skeleton of a device with one queue:
//!
//! ```
//! use bowline::descriptor::{EventCounter, Next};
//! use bowline::{Address, Factory, Protocol, UnixStream, UnixTransport};
//! use bowline_peers::vhost_user::{
//!     BackEndContext, MemoryRegion, VhostUserAnswer, VhostUserDevice, VhostUserRequest,
//!     back_end, features,
//! };
//!
//! #[derive(Default)]
//! struct Device {
//!     memory: Vec<MemoryRegion>,
//!     call: Option<EventCounter>,
//! }
//!
//! impl<T: UnixTransport> VhostUserDevice<T> for Device {
//!     fn request_received(
//!         &mut self,
//!         cx: &mut BackEndContext<'_, T>,
//!         request: VhostUserRequest,
//!     ) -> VhostUserAnswer {
//!         use VhostUserRequest as Request;
//!         match request {
//!             Request::GetFeatures => VhostUserAnswer::Value(features::VERSION_1),
//!             Request::SetMemTable(memory) => {
//!                 self.memory = memory;
//!                 VhostUserAnswer::Done
//!             }
//!             Request::SetVringCall { fd: Some(fd), .. } => {
//!                 self.call = EventCounter::from_descriptor(fd).ok();
//!                 VhostUserAnswer::Done
//!             }
//!             Request::SetVringKick { fd: Some(fd), .. } => {
//!                 if let Ok(kick) = EventCounter::from_descriptor(fd) {
//!                     // Look at the ring each time. A real device keeps the handle, and
//!                     // ends it at `GetVringBase`.
//!                     let watched = cx.reactor.call_each_time_readable(kick, |_, kick| {
//!                         let _ = kick.take();
//!                         Next::Keep
//!                     });
//!                     assert!(watched.is_ok());
//!                 }
//!                 VhostUserAnswer::Done
//!             }
//!             Request::GetVringBase { index } => VhostUserAnswer::Vring { index, number: 0 },
//!             _ => VhostUserAnswer::Done,
//!         }
//!     }
//! }
//!
//! fn factory() -> impl Factory<Protocol: Protocol<UnixStream>> {
//!     |_: &Address| back_end(Device::default())
//! }
//! # let _ = factory();
//! ```

mod asking;
mod back_end;
mod channel;
mod codec;
mod framing;
mod front_end;
mod messages;

pub use self::back_end::{BackEnd, BackEndContext, VhostUserAnswer, VhostUserDevice, back_end};
pub use self::channel::{
    Acknowledged, BackEndChannel, BackEndRequest, FrontEndChannel, back_end_channel,
    front_end_channel,
};
pub use self::framing::{VhostUserFramer, VhostUserHeader};
pub use self::front_end::{FrontEnd, FrontEndError, FrontEndReply, front_end};
pub use self::messages::{InflightRegion, MemoryRegion, VhostUserRequest, VringAddress, features};
