//! Connections in memory, for the tests of protocols.
//!
//! A [`SimulatedKernel`] holds both ends of each connection, and everything that is on
//! its way between them. The transport on top, [`MemoryStream`], is the real one; only
//! the socket at its bottom is simulated. [`Pump`] puts protocols on such transports.
//! It has a reactor whose clock stands still, and turns it until nothing is left to do.
//! [`MemoryPeer`] puts the other end into the hands of a test.
//!
//! A [`Simulation`] has several such reactors. They play processes that are connected,
//! pass each other descriptors, and die.
//!
//! Bytes and descriptors travel by the rules of a UNIX stream socket of Linux.

use std::fmt::Debug;

use bowline_protocol::{Address, UnixAddress};

mod datagrams;
mod kernel;
mod listener;
mod packets;
mod peer;
mod pump;
mod random;
mod simulation;
mod socket;

pub use self::datagrams::{MemoryDatagramSender, MemoryDatagrams};
pub use self::kernel::{Delivery, KernelSettings, SimulatedKernel, SocketId};
pub use self::listener::{MemoryListen, MemoryListener};
pub use self::packets::{
    MemoryPacketConnect, MemoryPacketListen, MemoryPacketPeer, MemoryPacketPort,
    MemoryPacketSocket, MemoryPackets, PacketRead,
};
pub use self::peer::{MemoryPeer, PeerRead};
pub use self::pump::Pump;
pub use self::random::Random;
pub use self::simulation::{Points, ProcessId, Simulation};
pub use self::socket::{Memory, MemoryConnect, MemoryHandle, MemorySocket, MemoryStream};

/// What a descriptor stands for that was made of a [`MemorySocket`] or a
/// [`MemoryListener`].
pub(crate) fn describe(fd: std::os::fd::BorrowedFd<'_>) -> Option<crate::SocketDescription> {
    let (kernel, id) = SimulatedKernel::unpark(fd)?;
    let name = kernel.name_of(id);
    let is_listening = name.is_some();
    let address = name.map_or(UnixAddress::Unnamed, |name| {
        UnixAddress::Abstract(name.into_bytes())
    });
    let is_packets = kernel.shape_of(id) == Some(kernel::Shape::Packets);
    Some(crate::SocketDescription {
        address: Some(Address::Unix(address)),
        is_stream: !is_packets,
        is_packets,
        is_listening,
    })
}

/// After how many turns it is given up: what does not come to rest within these never
/// will.
const MOST_TURNS: usize = 1_000_000;

/// Has `it` make turns until one says that nothing is left to do.
#[track_caller]
fn run_to_rest<T: Debug>(it: &mut T, turn: fn(&mut T) -> bool) {
    for _ in 0..MOST_TURNS {
        if !turn(it) {
            return;
        }
    }
    panic!("not at rest after {MOST_TURNS} turns: {it:?}");
}

#[cfg(test)]
mod tests;
