//! What a callback can reach.

use std::fmt;

use bowline_reactor::Reactor;

use crate::connection::{AnyConnection, ConnectionHandle};
use crate::transport::{Transport, TransportHandle};

/// Everything a callback of a connection can reach: its own transport, and the
/// reactor with everything else.
///
/// The two are disjoint borrows. So a callback can write, close, schedule, connect,
/// listen, and act on any other transport without `RefCell`, `Arc` or locks.
pub struct Context<'a, T: ?Sized> {
    /// The connection's own transport.
    pub transport: &'a mut T,
    /// The reactor that drives it.
    pub reactor: &'a mut Reactor,
}

impl<'a, T: ?Sized> Context<'a, T> {
    /// Makes a context of these two. For transports, wrappers and tests.
    pub fn new(transport: &'a mut T, reactor: &'a mut Reactor) -> Self {
        Self { transport, reactor }
    }
}

impl<T: Transport + ?Sized> Context<'_, T> {
    /// Reaches any transport by its handle, this one included. `None` when it is gone.
    /// ([`Reactor::get`] does not find this one while its callback runs.)
    ///
    /// What you do to it takes effect at once: writes are buffered, reading is paused.
    /// Callbacks that follow from it come after the running one.
    ///
    /// # Examples
    ///
    /// A message to everybody in a room:
    ///
    /// ```
    /// # use bowline::{Context, Transport, TransportHandle};
    /// fn announce<T: Transport>(cx: &mut Context<'_, T>, room: &[TransportHandle], text: &[u8]) {
    ///     for &member in room {
    ///         if let Some(transport) = cx.get(member) {
    ///             transport.write(text);
    ///         }
    ///     }
    /// }
    /// ```
    pub fn get(&mut self, handle: TransportHandle) -> Option<&mut dyn Transport> {
        if self.transport.handle() == handle {
            Some(self.transport.as_dyn())
        } else {
            self.reactor.get(handle)
        }
    }

    /// The same context, with the transport's type forgotten.
    pub fn as_dyn(&mut self) -> Context<'_, dyn Transport> {
        Context {
            transport: self.transport.as_dyn(),
            reactor: self.reactor,
        }
    }
}

/// A [`Context`], or one with more in it
/// ([`FrameContext`](crate::framing::FrameContext)). For code that only has to know
/// whose callback runs, such as a time limit.
pub trait AnyContext {
    /// The name of the connection whose callback runs.
    fn own_handle(&self) -> ConnectionHandle;

    /// The reactor that drives it.
    fn reactor(&mut self) -> &mut Reactor;
}

impl<T: AnyConnection + ?Sized> AnyContext for Context<'_, T> {
    fn own_handle(&self) -> ConnectionHandle {
        self.transport.connection_handle()
    }

    fn reactor(&mut self) -> &mut Reactor {
        self.reactor
    }
}

impl<T: AnyConnection + ?Sized> fmt::Debug for Context<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Context")
            .field("transport", &self.transport.connection_handle())
            .finish_non_exhaustive()
    }
}
