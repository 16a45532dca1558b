//! Datagram sockets: what is written once for all kinds of them.
//!
//! A [`Port`] is a socket as its protocol sees it, with the queue of what waits to be
//! sent; `serving` is that with its protocol, which the reactor drives. What differs
//! between kinds is a [`DatagramSocket`].

mod connections;
mod packets;
mod port;
mod queue;
mod served;
mod serving;
mod socket;

pub(crate) use self::connections::{ConnectPackets, DialPackets, ServePackets};
pub(crate) use self::packets::{is_packed, named as packets_named, reattach as reattach_packets};
pub use self::port::Port;
pub(crate) use self::queue::SendQueue;
pub(crate) use self::serving::{ROOM, install, install_packets};
pub use self::socket::{
    AfterSendError, Arrivals, DatagramSocket, Outgoing, OutgoingDatagram, PacketSocket,
};
