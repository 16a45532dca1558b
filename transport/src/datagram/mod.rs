//! Datagram sockets: what is written once for all kinds of them.
//!
//! A [`Port`] is a socket as its protocol sees it, with the queue of what waits to be
//! sent; `serving` is that with its protocol, which the reactor drives. What differs
//! between kinds is a [`DatagramSocket`].

mod port;
mod queue;
mod serving;
mod socket;

pub use self::port::Port;
pub(crate) use self::queue::SendQueue;
pub(crate) use self::serving::{ROOM, install};
pub use self::socket::{AfterSendError, Arrivals, DatagramSocket, Outgoing, OutgoingDatagram};
