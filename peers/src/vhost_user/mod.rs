//! vhost-user: a virtual machine monitor (the front-end) has another process (the back-end)
//! be a device of its guest, on memory that both have.
//!
//! [`back_end`] is the protocol of the process that is the device, [`front_end`] that of the
//! monitor. Either may listen. Requests are values ([`VhostUserRequest`]), with descriptors
//! where they have some: memory, and the eventfds by which both sides wake each other
//! ([`EventCounter`](bowline::descriptor::EventCounter), which a
//! [reactor watches](bowline::Reactor::call_each_time_readable)).
//!
//! Rings and devices are not here. Descriptors of a ring have addresses of the guest, the
//! addresses of rings are those of the front-end ([`MemoryRegion::guest`] and
//! [`MemoryRegion::user`]).
//!
//! A message has its descriptors with its header, and its kind and payload say how many it
//! has. So they are claimed, and reads are not limited. One that no message claims is closed.
//! A front-end is trusted with the linger setting of what it passes
//! ([`Linger::Keep`](bowline::Linger::Keep)).
//!
//! | limit | default | of |
//! |---|---|---|
//! | bytes of a payload | 4,096 | rust-vmm; the specification has none |
//! | descriptors of a message, regions of memory | 8 | the specification |
//!
//! A back-end may ask, too, on a channel that the front-end gives it
//! ([`VhostUserRequest::SetBackendReqFd`]): [`back_end_channel`] and [`front_end_channel`] are
//! its two ends.
//!
//! Not spoken: the migration of a running guest's memory by demand (postcopy), and what has
//! its own answer beside the requests that are listed. A device that does not offer their
//! features is not asked.
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
