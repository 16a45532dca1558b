//! What streams and connections of packets have in common.

use std::fmt;
use std::os::fd::BorrowedFd;
use std::rc::Rc;
use std::time::Duration;

use bowline_reactor::Handle;

use crate::address::Address;
use crate::transport::TransportState;

/// The name of any connection, of a stream or of packets; see
/// [`Reactor::get`](bowline_reactor::Reactor::get).
pub type ConnectionHandle = Handle<dyn AnyConnection>;

/// What every connection can be asked for: a [`Transport`](crate::Transport), which is a
/// stream, and a [`PacketTransport`](crate::PacketTransport).
///
/// For code that serves both, such as a [policy](crate::policies::Policy). A protocol that
/// is bound by one of the two has these methods too.
///
/// Every method may be called from any callback. It acts on the connection's state at
/// once, and calls no protocol or producer. Callbacks that follow from it are called
/// after the running one has returned.
pub trait AnyConnection: 'static {
    // Writing.

    /// How many bytes are buffered and not yet taken by the kernel. After the loss: how
    /// many were never taken.
    fn unsent_bytes(&self) -> usize;

    /// How many bytes the kernel has taken since the connection was made.
    fn bytes_sent(&self) -> u64;

    /// Whether a producer should wait. A stream has more unsent bytes than the high
    /// watermark, or more queued descriptors than their limit. A queue of packets is at its
    /// [limits](crate::QueueLimits).
    fn is_send_buffer_full(&self) -> bool;

    // Reading.

    /// Stops reading: nothing is delivered until
    /// [`resume_producing`](Self::resume_producing). Whatever the peer sends waits in the
    /// kernel, and so does its end.
    ///
    /// A write that fails during the pause does not end the connection yet. Later writes
    /// are refused. What had arrived is delivered after the pause, and then the
    /// connection ends with the error. If there is nothing left to read, it ends at once,
    /// paused or not.
    ///
    /// A reset by the peer is noticed during the pause too, and is like a failed write:
    /// nothing that had arrived is dropped. If the end has to wait for this reader,
    /// [`connection_broken`](crate::Protocol::connection_broken) says so at once, paused
    /// or not.
    fn pause_producing(&mut self);

    /// Reads again.
    fn resume_producing(&mut self);

    /// Whether reading is paused.
    fn is_reading_paused(&self) -> bool;

    /// Stops reading for a reason that neither the protocol nor a producer knows of,
    /// such as a [throttle](crate::policies::Throttle). Nothing is read until every hold
    /// is [released](Self::release_reading).
    ///
    /// Holds are counted, and independent of [`pause_producing`](Self::pause_producing):
    /// a connection is read when it is neither paused nor held. Failed writes and resets
    /// have the same effect as during a pause. Only a pause shows in
    /// [`is_reading_paused`](Self::is_reading_paused), and only its end is told with
    /// [`reading_resumed`](crate::Protocol::reading_resumed).
    fn hold_reading(&mut self);

    /// Takes one hold back. Nothing happens if there is none.
    fn release_reading(&mut self);

    // Closing.

    /// Closes in an orderly way: reads no more, sends what is buffered, waits for a
    /// registered producer, then ends with
    /// [`CloseReason::Done`](crate::CloseReason::Done).
    ///
    /// It also waits for a protocol that is its own producer: another connection may have
    /// asked for the close, and a message that is half sent should arrive. A protocol
    /// that is done itself calls [`stop_consuming`](crate::Transport::stop_consuming).
    ///
    /// Bytes that were written while a layer had not established the connection yet wait
    /// for that, in the time that the layer allows. Without any the connection ends at
    /// once.
    ///
    /// Later writes are refused, except those of a producer that is still registered.
    /// Nothing is called back before this returns. (Twisted: `loseConnection`.)
    fn lose_connection(&mut self);

    /// As [`lose_connection`](Self::lose_connection), but takes no longer than
    /// `deadline`. What is unsent then is dropped, and the reason is
    /// [`CloseReason::CloseTimedOut`](crate::CloseReason::CloseTimedOut).
    fn lose_connection_within(&mut self, deadline: Duration);

    /// Closes our side when everything buffered was sent, and goes on reading. Later
    /// writes are refused, except those of a producer that is still registered. (Twisted:
    /// `loseWriteConnection`.)
    fn lose_write_connection(&mut self);

    /// Ends the connection now, with [`CloseReason::Aborted`](crate::CloseReason::Aborted).
    /// What is buffered is dropped, and nothing more is read. A TCP peer sees a reset,
    /// unless the socket was adopted and others may hold it. (Twisted: `abortConnection`.)
    fn abort_connection(&mut self);

    // What it is.

    /// Where in its life the connection is.
    fn state(&self) -> TransportState;

    /// Our address. Also known after the loss.
    fn host(&self) -> Address;

    /// The peer's address. Also known after the loss.
    fn peer(&self) -> Address;

    /// The name of this connection, for code that does not care what is sent over it.
    fn connection_handle(&self) -> ConnectionHandle;

    /// The socket itself, for options that have no method here. `None` after the loss,
    /// and for transports in memory. (Twisted: `getHandle`.)
    ///
    /// Do not read, write or close it behind the transport's back: that breaks the
    /// transport.
    fn socket_descriptor(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Tells `observer` of everything that is written from now on. `None`, the default,
    /// tells nobody.
    ///
    /// There is one observer at a time. It goes along when the connection is detached.
    /// [`TrafficLog`](crate::policies::TrafficLog) uses it. The default implementation
    /// does nothing, for transports that cannot do this.
    fn set_write_observer(&mut self, observer: Option<Rc<dyn WriteObserver>>) {
        let _ = observer;
    }
}

/// Observes everything that is written to a connection; see
/// [`AnyConnection::set_write_observer`].
pub trait WriteObserver: fmt::Debug {
    /// `data` was taken to be sent: bytes of a stream, or one packet. Only a packet can be
    /// empty.
    ///
    /// Called inside the call that writes, such as [`write`](crate::Transport::write), so
    /// the order is that of the writes. It cannot reach the transport. A panic counts as
    /// one of the writer.
    fn written(&self, data: &[u8]);
}

impl fmt::Debug for dyn AnyConnection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AnyConnection")
            .field("handle", &self.connection_handle())
            .field("state", &self.state())
            .field("peer", &self.peer())
            .finish_non_exhaustive()
    }
}
