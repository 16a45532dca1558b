//! Datagram sockets, and everything that their kinds have in common.
//!
//! A [`Port`] is a socket as its protocol sees it, with its send queue. `serving` joins
//! it with its protocol, and the reactor drives that. Kinds differ in their
//! [`DatagramSocket`].

mod packets;
mod port;
mod queue;
mod served;
mod serving;
mod socket;

pub(crate) use self::packets::{check_packed, reattach as reattach_packets};
pub use self::port::Port;
pub(crate) use self::queue::SendQueue;
pub(crate) use self::serving::{ROOM, install, install_packets};
pub use self::socket::{
    AfterSendError, Arrivals, DatagramSocket, Outgoing, OutgoingDatagram, PacketSocket,
};
